from __future__ import annotations

import hashlib

import pytest

from ai4land.cube.describe import read_map
from ai4land.errors import DataError, MismatchError
from ai4land.model.checkpoint import save_model
from ai4land.publish.credits import Credit
from ai4land.publish.mlm import checksum, model_collection, model_item
from tests.cubes import bare_cube
from tests.models import LEGEND, SPEC, card, network


@pytest.fixture
def made(tmp_path):
    nets = [network(0), network(1)]
    saved = save_model(tmp_path, [n.state_dict() for n in nets], card(nets[0]))
    m = read_map(bare_cube(tmp_path / "c.zarr"), id="a", title="A")
    return nets, saved, m, tmp_path


def test_item_says_what_goes_in_and_out(made):
    nets, saved, m, folder = made
    item = model_item(folder, saved, m, title="A", collection="a-model", to_folder="../..")
    said = item["properties"]
    learnt = sum(p.numel() for n in nets for p in n.parameters())
    assert said["mlm:total_parameters"] == learnt
    static, reference, coarse, offset = said["mlm:input"]
    assert static["bands"] == SPEC.static_names == ["height", "zone=1", "zone=2"] and coarse["bands"] == SPEC.coarse_names
    assert static["value_scaling"][0] == {"type": "z-score", "mean": 3.5, "stddev": 0.25} and len(static["value_scaling"]) == 3
    assert static["input"]["shape"][1] == nets[0].settings["static_channels"]
    assert coarse["input"]["shape"][1] == nets[0].settings["coarse_channels"]
    assert reference["bands"] == offset["bands"] == []
    assert [b["name"] for b in said["bands"]] == static["bands"] + coarse["bands"]
    (output,) = said["mlm:output"]
    assert [c["value"] for c in output["classification:classes"]] == LEGEND.codes.tolist()
    assert all(c["description"] for c in output["classification:classes"])
    assert said["mlm:hyperparameters"]["members"] == 2 and said["mlm:hyperparameters"]["base"] == nets[0].settings["base"]


def test_checksums_are_multihashes_of_the_files(made):
    _, saved, m, folder = made
    assets = model_item(folder, saved, m, title="A", collection="a-model", to_folder="../..")["assets"]
    for name, file in (("weights", "model.safetensors"), ("card", "model.json")):
        data = (folder / file).read_bytes()
        assert assets[name]["href"] == f"../../{file}" and assets[name]["file:size"] == len(data)
        assert assets[name]["file:checksum"] == "1220" + hashlib.sha256(data).hexdigest()
    assert checksum(folder / "model.json")["file:size"] > 0


def test_weights_that_are_not_those_of_the_card_are_refused(made):
    _, saved, m, folder = made
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(MismatchError, match="checksum"):
        model_item(folder, saved, m, title="A", collection="a-model", to_folder="../..")
    bad = saved.model_copy(update={"weights": hashlib.sha256(b"other").hexdigest()})
    with pytest.raises(DataError, match="no safetensors header"):
        model_item(folder, bad, m, title="A", collection="a-model", to_folder="../..")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        model_item(folder, saved, m, title="A", collection="a-model", to_folder="../..")


def test_collection_carries_the_credits(made):
    _, saved, m, folder = made
    item = model_item(folder, saved, m, title="A", collection="a-model", to_folder="../..")
    bare = model_collection(m, id="a-model", title="A", credits=[], licence="other", item=item)
    assert "sci:publications" not in bare and len(bare["stac_extensions"]) == 1
    full = model_collection(
        m, id="a-model", title="A", credits=[Credit("A", "CC0-1.0", citation="A 2000")], licence="CC0-1.0", item=item
    )
    assert full["license"] == "CC0-1.0" and len(full["stac_extensions"]) == 2
