from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ai4land.errors import DataError, MismatchError
from ai4land.legend import load_legend
from ai4land.model.checkpoint import CARD, WEIGHTS, check_fits, load_card, load_model, load_state, save_model, save_state
from ai4land.model.unet import UNet
from ai4land.places import write_atomically
from tests.models import LEGEND, SPEC, card, network


def arguments():
    rng = torch.Generator().manual_seed(1)
    reference = torch.randint(0, LEGEND.n, (1, 8, 8), generator=rng, dtype=torch.uint8)
    coarse = torch.randn(1, len(SPEC.coarse_names), 5, 5, generator=rng)
    return torch.randn(1, len(SPEC.static_names), 8, 8, generator=rng), reference, coarse, torch.tensor([[4, 4]])


@torch.inference_mode()
def output(net: UNet) -> torch.Tensor:
    return net(*arguments())


def test_a_saved_model_gives_the_same_outputs(saved):
    net, read = load_model(saved)
    assert not net.training
    assert torch.allclose(output(net), torch.log_softmax(output(network()), dim=1), atol=1e-6)
    assert read == card(network()).model_copy(update={"weights": read.weights})
    assert load_card(saved) == read
    assert (read.legend, read.spec, read.network) == (LEGEND, SPEC, network().settings)


def test_members_and_their_sharpness_come_back(tmp_path):
    nets = [network(0), network(1)]
    written = save_model(tmp_path, [n.state_dict() for n in nets], card(nets[0]).model_copy(update={"sharpness": 0.8}))
    both, read = load_model(tmp_path)
    assert read == written and (read.members, read.sharpness) == (2, 0.8)
    wanted = 0.8 * sum(torch.log_softmax(output(n), dim=1) for n in nets) / 2
    assert torch.allclose(output(both), wanted, atol=1e-5)


def test_the_same_weights_are_the_same_bytes(saved, tmp_path):
    net = network().to(memory_format=torch.channels_last)
    shuffled = dict(reversed(net.state_dict().items()))
    again = save_model(tmp_path / "again", [shuffled], card(net))
    for name in (WEIGHTS, CARD):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    other = save_model(tmp_path / "other", [network(1).state_dict()], card(net))
    assert other.weights != again.weights


def test_tampered_and_exchanged_weights_are_refused(saved):
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (saved / WEIGHTS).write_bytes(data)
    with pytest.raises(MismatchError, match=r"do not have the checksum of model\.json"):
        load_model(saved)
    save_model(saved.parent / "other", [network(1).state_dict()], card(network(1)))
    (saved / WEIGHTS).write_bytes((saved.parent / "other" / WEIGHTS).read_bytes())
    with pytest.raises(MismatchError, match="the files are of two trainings"):
        load_model(saved)


@pytest.mark.parametrize(("name", "message"), [(CARD, r"no model in .*model\.json is missing"), (WEIGHTS, "no weights at")])
def test_missing_files_are_named(saved, name, message):
    (saved / name).unlink()
    with pytest.raises(DataError, match=message):
        load_model(saved)


@pytest.mark.parametrize("change", [{"format": 1}, {"legend": None}, {"surprise": 1}, {"cell": [1]}])
def test_damaged_cards_are_refused(saved, change):
    values = json.loads((saved / CARD).read_text())
    (saved / CARD).write_text(json.dumps({**values, **change}))
    with pytest.raises(DataError, match=r"model\.json is not valid"):
        load_card(saved)
    (saved / CARD).write_bytes(b"\xff{")
    with pytest.raises(DataError, match="is not valid"):
        load_card(saved)


@pytest.mark.parametrize("change", [{"base": 3}, {"depth": 2}, {"width": 7}])
def test_a_card_of_another_network_is_refused(saved, change):
    values = json.loads((saved / CARD).read_text())
    values["network"].update(change)
    (saved / CARD).write_text(json.dumps(values))
    with pytest.raises(MismatchError, match="do not fit the network"):
        load_model(saved)


FITS = {"legend": LEGEND, "feature_names": ["height", "zone"], "states": ["primf", "urban"], "factor": 4}


def test_a_model_fits_the_store_it_was_made_for(saved):
    check_fits(load_card(saved), **FITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"legend": load_legend("ipcc")}, r"checkpoint has legend \('hildaplus'.*expected \('ipcc'"),
        ({"feature_names": ["zone", "height"]}, r"static maps \['height', 'zone'\], expected \['zone', 'height'\]"),
        ({"feature_names": ["height"]}, "static maps"),
        ({"states": ["urban", "primf"]}, r"coarse states \['primf', 'urban'\], expected \['urban', 'primf'\]"),
        ({"factor": 8}, "fine cells in a coarse cell 4, expected 8"),
    ],
)
def test_a_model_of_another_store_is_refused_by_what_differs(saved, change, message):
    with pytest.raises(MismatchError, match=message):
        check_fits(load_card(saved), **{**FITS, **change})


def test_training_state_comes_back(tmp_path):
    net = network().train()
    optimiser = torch.optim.AdamW(net.parameters())
    net(*arguments()).sum().backward()
    optimiser.step()
    state = {
        "step": 3,
        "best": 0.25,
        "model": net.state_dict(),
        "optimiser": optimiser.state_dict(),
        "rng": torch.get_rng_state(),
    }
    save_state(tmp_path / "deep" / "state.pt", state)
    again = load_state(tmp_path / "deep" / "state.pt")
    assert (again["step"], again["best"]) == (3, 0.25)
    assert all(torch.equal(again["model"][k], v) for k, v in state["model"].items())
    torch.optim.AdamW(network().parameters()).load_state_dict(again["optimiser"])
    assert torch.equal(again["rng"], state["rng"])


class Touch:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_objects_in_a_training_state_are_refused_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"step": 1, "evil": Touch(mark)}, tmp_path / "state.pt")
    with pytest.raises(
        DataError,
        match=r"cannot be read \(UnpicklingError\), expected tensors and plain values .*delete it to start the training anew",
    ):
        load_state(tmp_path / "state.pt")
    assert not mark.exists()
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("data", [b"", b"no zip file", None])
def test_damaged_training_states_are_refused(tmp_path, data):
    if data is not None:
        (tmp_path / "state.pt").write_bytes(data)
    with pytest.raises(DataError, match=r"state\.pt cannot be read"):
        load_state(tmp_path / "state.pt")


@given(old=st.binary(max_size=50), new=st.binary(max_size=50))
@settings(max_examples=10, deadline=None)
def test_atomic_write_replaces_and_leaves_no_part_file(old, new, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atomic")
    for data in (old, new):
        write_atomically(folder / "deep" / "file.bin", data)
        assert (folder / "deep" / "file.bin").read_bytes() == data
        assert [p.name for p in (folder / "deep").iterdir()] == ["file.bin"]


def test_failed_write_leaves_no_part_file(tmp_path):
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "taken", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
