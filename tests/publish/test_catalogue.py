from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import odc.stac
import pystac
import pytest
import rasterio
import rustac
import uvicorn
import xarray as xr
import zarr
from matplotlib.image import imread
from moto.server import ThreadedMotoServer
from obstore.store import HTTPStore
from pystac.validation import JsonSchemaSTACValidator, validate_dict
from pystac_client import Client
from starlette.applications import Starlette
from starlette.staticfiles import StaticFiles
from zarr.storage import ObjectStore

from ai4land.cube import cube
from ai4land.errors import ConfigError, DataError, MismatchError
from ai4land.legend import Legend
from ai4land.model.checkpoint import save_model
from ai4land.publish.catalogue import publish
from ai4land.publish.credits import credits_of
from ai4land.publish.export import equal_area
from ai4land.rasters.items import load_asset
from ai4land.run.config import RunConfig
from ai4land.run.publish import publish_run
from ai4land.sources import known
from ai4land.sources.search import find_items
from tests import ROOT
from tests.models import card, network
from tests.published import GRID, HILDA, YEARS, codes_of, make_cube, make_run, run_in, write_years

OWN = Legend(
    name="own",
    title="Mine & <b>yours</b>",
    fill={"code": 200, "name": "no.land", "colour": "#000000"},
    classes=(
        {"code": 0, "name": "wet+low", "colour": "#0000ff"},
        {"code": 7, "name": "dry", "colour": "#ff8800"},
    ),
)


@pytest.fixture(scope="module")
def published(tmp_path_factory, terrain) -> tuple[RunConfig, Path]:
    """A run with sources and a static map of a catalogue, and its catalogue with two years as GeoTIFF."""
    static = [{"name": "height", "catalog": str(terrain), "collection": "relief", "asset": "height"}]
    run = make_run(tmp_path_factory.mktemp("a folder"), sources=["hildaplus-v2", "luh2-v2h"], static=static)
    return run, publish_run(run, cog=[2004, 2100])


@pytest.fixture(scope="module")
def server(published) -> Iterator[str]:
    """The folder of the run over HTTP, with ranges."""
    app = Starlette()
    app.mount("/", StaticFiles(directory=published[0].folder))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # who comes before the server is up waits
        http = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        http.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


def objects(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.relative_to(folder).as_posix(): json.loads(p.read_text()) for p in sorted(folder.rglob("*.json"))}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_all(folder: Path, schemas: JsonSchemaSTACValidator) -> int:
    found = objects(folder)
    for place, value in found.items():
        checked = validate_dict(value, validator=schemas)
        assert len(checked) == 1 + len(value.get("stac_extensions", [])), place
    return len(found)


# -- valid -----------------------------------------------------------------------------------------------------------------


def test_every_object_is_valid(published, schemas):
    assert check_all(published[1].parent, schemas) == 1 + 1 + len(YEARS) + 2


def test_objects_of_an_own_legend_without_sources_and_model_are_valid(tmp_path, schemas):
    run = make_run(tmp_path, legend=OWN, model=False)
    said: list[str] = []
    path = publish_run(run, cog=[850], tell=said.append)
    assert check_all(path.parent, schemas) == 2 + len(YEARS) and any("no model" in line for line in said)
    about = objects(path.parent)["tiny-map/collection.json"]
    assert about["license"] == "other" and [p["name"] for p in about["providers"]] == ["AI4Land"]
    assert about["summaries"]["classification:classes"][0] == {
        "value": 200,
        "name": "no-land",
        "description": "no.land",
        "color_hint": "000000",
        "nodata": True,
    }
    with rasterio.open(path.parent / "tiny-map" / "tiny-map-850" / "tiny-map-850.tif") as file:
        assert file.nodata == 200 and (file.read(1) == codes_of(OWN, 850)).all() and file.colormap(1)[7] == (255, 136, 0, 255)


def test_an_object_that_is_not_valid_is_told(published, schemas):
    about = objects(published[1].parent)["tiny-map/collection.json"]
    for broken in ({**about, "cube:dimensions": {"time": {"type": "temporal"}}}, {**about, "license": "not an id"}):
        with pytest.raises(pystac.STACValidationError):
            validate_dict(broken, validator=schemas)


def test_titles_are_data(published):
    about = objects(published[1].parent)["tiny-map/collection.json"]
    assert about["title"] == "A *map* of <i>land</i>"
    assert about["description"].startswith("A \\*map\\* of &lt;i&gt;land&lt;/i&gt;: annual land cover 850-2100")
    assert "<script>" not in about["description"]


# -- found and opened --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "http"])
def test_cube_opened_from_the_catalogue_alone_has_the_same_values(published, server, where):
    path = published[1]
    root = pystac.Catalog.from_file(str(path) if where == "disk" else f"{server}/stac/catalog.json")
    asset = root.get_child("tiny-map").assets["cube"]
    assert asset.media_type == "application/vnd.zarr; version=3" and asset.roles == ["data"]
    href = asset.get_absolute_href()
    assert href.startswith("http" if where == "http" else "/")
    times = xr.coders.CFDatetimeCoder(time_unit="s")
    store = ObjectStore(HTTPStore(href, client_options={"allow_http": True}), read_only=True) if where == "http" else href
    got = xr.open_zarr(store, decode_times=times, consolidated=True)
    np.testing.assert_array_equal(got["land_cover"].values, [codes_of(HILDA, year) for year in YEARS])
    item = root.get_child("tiny-map").get_item("tiny-map-850")
    assert item.assets["cube"].get_absolute_href() == href and str(got["time"].values[0])[:10] == "0850-07-02"


def test_model_file_is_where_the_catalogue_says(published):
    run, path = published
    (item,) = pystac.Catalog.from_file(str(path)).get_child("tiny-map-model").get_items()
    assert Path(item.assets["weights"].get_absolute_href()) == run.folder / "model.safetensors"
    (origin,) = pystac.Collection.from_file(str(path.parent / "tiny-map" / "collection.json")).get_links("derived_from")
    assert origin.get_absolute_href() == item.get_self_href()


def test_every_link_leads_somewhere(published):
    folder = published[1].parent
    for place, value in objects(folder).items():
        assets = [a["href"] for a in value.get("assets", {}).values()]
        for href in [*assets, *(link["href"] for link in value["links"])]:
            assert href.startswith("https://") or (folder / place).parent.joinpath(href).exists(), (place, href)
            assert not href.startswith("/")


def test_geotiffs_load_onto_the_grid_with_the_same_codes(published):
    path = published[1]
    collection = pystac.Catalog.from_file(str(path)).get_child("tiny-map")
    items = [i for i in collection.get_items() if "land_cover" in i.assets]
    assert len(items) == 2
    got = odc.stac.load(items, bands=["land_cover"], geobox=GRID.fine, use_overviews=False)["land_cover"]
    assert got.dtype == np.uint8 and got.attrs["nodata"] == 0 and [int(t) for t in got["time"].dt.year] == [2004, 2100]
    np.testing.assert_array_equal(got.values, [codes_of(HILDA, 2004), codes_of(HILDA, 2100)])


@pytest.mark.parametrize("where", ["disk", "http"])
def test_someone_else_maps_from_this_map(published, server, where):
    catalog = str(published[1]) if where == "disk" else f"{server}/stac/catalog.json"
    items = find_items(catalog, collection="tiny-map", bbox=(0, 0, 10, 10), years=[2100])
    assert [i.id for i in items] == ["tiny-map-2100"]
    got = load_asset(items, asset="land_cover", grid=GRID, resampling="exact", dtype="uint8")
    np.testing.assert_array_equal(got.values, codes_of(HILDA, 2100))
    every = find_items(catalog, collection="tiny-map")
    with pytest.raises(DataError, match=r"asset is 'land_cover', expected one of \['cube'\]"):
        load_asset(every, asset="land_cover", grid=GRID, resampling="exact", dtype="uint8")


def test_the_catalogue_tells_the_licence_to_someone_else(published):
    (credit,) = credits_of([], [(str(published[1]), "tiny-map")])
    assert credit.licence == "CC-BY-SA-4.0" and credit.title == "A *map* of <i>land</i>" and "AI4Land" in credit.citation
    assert {p["name"] for p in credit.providers} >= {"AI4Land", "Hill Survey"}


def test_relative_links_survive_moving_the_run(published, tmp_path):
    moved = tmp_path / "else where"
    shutil.copytree(published[0].folder, moved)
    collection = pystac.Catalog.from_file(str(moved / "stac" / "catalog.json")).get_child("tiny-map")
    href = collection.assets["cube"].get_absolute_href()
    assert Path(href) == moved / "cube.zarr" and "land_cover" in zarr.open_group(href, mode="r")
    assert len(list(collection.get_items())) == len(YEARS)


@pytest.fixture
def api(published, tmp_path) -> Iterator[str]:
    """A STAC API that serves the catalogue: collections and items with addresses instead of links."""
    root = pystac.Catalog.from_file(str(published[1]))
    files, items = [], []
    for collection in root.get_children():
        items += [i.to_dict(include_self_link=False, transform_hrefs=False) for i in _absolute(collection)]
        files.append(tmp_path / f"{collection.id}.json")
        files[-1].write_text(json.dumps({**collection.to_dict(include_self_link=False), "links": []}))
    files.append(tmp_path / "items.json")
    files[-1].write_text(json.dumps({"type": "FeatureCollection", "features": [{**i, "links": []} for i in items]}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [Path(sys.executable).with_name("rustac"), "serve", "-a", address, "--bind", f"127.0.0.1:{port}", *files]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "the API did not start"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def _absolute(collection: pystac.Collection) -> Iterator[pystac.Item]:
    for item in collection.get_items():
        for asset in item.assets.values():
            href = asset.get_absolute_href()
            asset.href = f"file://{href}"
        yield item


def test_a_real_api_finds_the_items(api):
    client = Client.open(api)
    assert {c.id for c in client.get_collections()} == {"tiny-map", "tiny-map-model"}

    def ids(**query: Any) -> list[str]:
        return [i.id for i in client.search(**query).items()]

    every = [f"tiny-map-{year}" for year in YEARS]
    assert sorted(ids(collections=["tiny-map"])) == sorted(every)
    late = client.search(collections=["tiny-map"], bbox=[0, 0, 1, 1], datetime="2005-03-01/2100-12-31").items()
    assert [i.id for i in sorted(late, key=lambda i: i.datetime, reverse=True)] == every[:1:-1]
    assert ids(collections=["tiny-map"], datetime="0850-01-01T00:00:00Z/0850-12-31T00:00:00Z") == every[:1]
    assert ids(ids=["tiny-map-2004"]) == ["tiny-map-2004"]
    assert ids(collections=["tiny-map"], datetime="1900-01-01/1950-01-01") == []
    (found,) = find_items(api, collection="tiny-map", years=[2004], beyond="all")
    got = load_asset([found], asset="land_cover", grid=GRID, resampling="exact", dtype="uint8")
    np.testing.assert_array_equal(got.values, codes_of(HILDA, 2004))


def test_index_holds_the_items(published):
    path = published[1].parent / "items.parquet"
    rows = rustac.read_sync(str(path))["features"]
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    items = {i["id"]: i for i in objects(published[1].parent).values() if i.get("collection") == "tiny-map"}
    assert [r["id"] for r in rows] == table["id"].to_pylist() == [f"tiny-map-{y}" for y in YEARS]
    assert set(items) == {r["id"] for r in rows}
    for row, box, when in zip(rows, table["bbox"].to_pylist(), table["datetime"].cast("int64").to_pylist(), strict=True):
        item = items[row["id"]]
        assert list(row["bbox"]) == item["bbox"] == [box[k] for k in ("xmin", "ymin", "xmax", "ymax")]
        said = {k: v.replace("+00:00", "Z") if k in ("created", "updated") else v for k, v in row["properties"].items()}
        assert row["geometry"] == item["geometry"] and said == item["properties"]
        stamp = item["properties"]["datetime"].rstrip("Z")
        assert when == np.datetime64(stamp, "ms").astype(int)
        for asset in row["assets"].values():
            assert (path.parent / asset["href"]).exists()


def test_with_a_base_url_objects_say_where_they_are(published, tmp_path):
    path = publish_run(published[0], to=tmp_path / "out", base_url="https://example.org/a/stac/", cog=[2004])
    for place, value in objects(path.parent).items():
        (own,) = [link["href"] for link in value["links"] if link["rel"] == "self"]
        assert own == f"https://example.org/a/stac/{place}"
    rows = {r["id"]: r for r in rustac.read_sync(str(path.parent / "items.parquet"))["features"]}
    assert (
        rows["tiny-map-2004"]["assets"]["land_cover"]["href"]
        == "https://example.org/a/stac/tiny-map/tiny-map-2004/tiny-map-2004.tif"
    )


# -- credits ---------------------------------------------------------------------------------------------------------------


def test_licences_and_citations_of_the_inputs_travel(published):
    found = objects(published[1].parent)
    for about in (found["tiny-map/collection.json"], found["tiny-map-model/collection.json"]):
        inputs = known.credits_of(["hildaplus-v2", "luh2-v2h"])
        assert about["license"] == "CC-BY-SA-4.0" and {s.licence for s in inputs} == {"CC-BY-4.0", "CC-BY-SA-4.0"}
        names = {p["name"] for p in about["providers"]}
        assert {n for s in inputs for n in s.providers} | {"Hill Survey"} <= names
        assert all("url" not in p for p in about["providers"] if p["name"] == "Hill Survey")
        licences = {link["href"] for link in about["links"] if link["rel"] == "license"}
        assert licences == {*(s.licence_url for s in inputs), "https://example.org/terms"}
        cited = {p.get("citation") for p in about["sci:publications"]}
        assert {s.citation for s in inputs} <= cited
        assert {p["doi"] for p in about["sci:publications"] if "doi" in p} == {s.doi for s in inputs if s.doi}
        assert {link["href"] for link in about["links"] if link["rel"] == "via"} == {s.page for s in inputs}
        assert {link["href"] for link in about["links"] if link["rel"] == "cite-as"} == {
            f"https://doi.org/{s.doi}" for s in inputs
        }


def test_catalogue_that_is_gone_is_told_and_its_licence_counts_as_unknown(tmp_path):
    static = [{"name": "height", "catalog": "gone/catalog.json", "collection": "relief", "asset": "height"}]
    run = make_run(tmp_path, model=False, sources=["hildaplus-v2"], static=static)
    said: list[str] = []
    about = objects(publish_run(run, tell=said.append).parent)["tiny-map/collection.json"]
    assert about["license"] == "other" and any("licence of collection relief" in line for line in said)
    assert "relief: licence not stated" in about["description"]


def test_licence_is_that_of_the_sources(tmp_path):
    run = make_run(tmp_path, model=False, sources=["hildaplus-v2"])
    about = objects(publish_run(run).parent)["tiny-map/collection.json"]
    assert about["license"] == known.load_source("hildaplus-v2").licence
    with pytest.raises(ConfigError, match="source is 'nobody'"):
        publish_run(make_run(tmp_path / "b", model=False, sources=["nobody"]))


# -- a folder that is ours ----------------------------------------------------------------------------------------------------


def test_published_again_gives_the_same_bytes(published):
    run, path = published
    before = contents(path.parent)
    code = (
        "import sys; from pathlib import Path; from ai4land.run.publish import publish_run; from ai4land.run.config import RunConfig;"
        "publish_run(RunConfig.model_validate_json(sys.argv[1]), cog=[2004, 2100])"
    )
    subprocess.run([sys.executable, "-c", code, run.model_dump_json()], check=True, timeout=60, cwd=ROOT)
    assert contents(path.parent) == before and b"2026-01-02T03:04:05Z" in before["tiny-map/collection.json"]
    assert not [p for p in run.folder.iterdir() if p.name.startswith(".")]
    assert not list(path.parent.rglob(".*"))


def test_what_is_not_ours_is_not_replaced(tmp_path):
    run = make_run(tmp_path, model=False)
    for target, text in (("notes", None), ("other", '{"type": "Catalog"}'), ("broken", "{")):
        folder = tmp_path / target
        folder.mkdir()
        (folder / "catalog.json").write_text(text or "") if text else (folder / "a.txt").write_text("mine")
        before = contents(folder)
        with pytest.raises(ConfigError, match="files that are not a catalogue of ai4land"):
            publish_run(run, to=folder)
        assert contents(folder) == before
    path = publish_run(run, to=tmp_path / "out")
    (path.parent / "tiny-map" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds tiny-map/notes.txt, which would be lost"):
        publish_run(run, to=tmp_path / "out")
    (path.parent / "tiny-map" / "notes.txt").unlink()
    publish_run(run, to=tmp_path / "out")
    other = run.model_copy(update={"name": "second"})
    other.folder.mkdir()
    shutil.copytree(run.folder / "cube.zarr", other.folder / "cube.zarr")
    with pytest.raises(ConfigError, match=r"catalogue of run 'tiny.map', expected 'second'"):
        publish_run(other, to=tmp_path / "out")
    for within in (run.folder, run.folder / "cube.zarr", run.folder / "cube.zarr" / "stac"):
        with pytest.raises(ConfigError):
            publish_run(run, to=within)


def test_a_failure_leaves_the_old_catalogue(tmp_path):
    run = make_run(tmp_path)
    path = publish_run(run)
    before = contents(path.parent)
    (run.folder / "model.safetensors").write_bytes(b"spoiled")
    with pytest.raises(MismatchError, match="checksum"):
        publish_run(run)
    assert contents(path.parent) == before
    assert {p.name for p in run.folder.iterdir() if p.is_dir()} == {"cube.zarr", "cube.ledger", "stac"}


def test_what_a_killed_publication_left_is_removed_by_the_next(tmp_path):
    run = make_run(tmp_path, model=False)
    path = publish_run(run)
    want = contents(path.parent)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for kind in ("old", "part"):
        shutil.copytree(path.parent, run.folder / f".stac.{socket.gethostname()}.{dead.pid}.{kind}")
    shutil.rmtree(path.parent)
    assert contents(publish_run(run).parent) == want
    assert not [p for p in run.folder.iterdir() if p.name.startswith(".")]


def test_what_can_not_be_published_is_refused(tmp_path):
    run = run_in(tmp_path)
    with pytest.raises(DataError, match="ai4land reconstruct"):
        publish_run(run)
    make_cube(run.folder / "cube.zarr", years=YEARS, finish=False)
    with pytest.raises(DataError, match="no finished year"):
        publish_run(run)
    assert cube.show(run.folder / "cube.zarr") == YEARS
    with pytest.raises(ConfigError, match=r"years to export are \[1999\]"):
        publish_run(run, cog=[2004, 1999])
    with pytest.raises(ConfigError, match="years to export cannot be read"):
        publish_run(run, cog=["next"])
    with pytest.raises(ConfigError, match="base URL is 'stac'"):
        publish_run(run, base_url="stac")
    with pytest.raises(ConfigError, match="expected one on this machine"):
        publish_run(run, to="s3://bucket/stac")
    assert not (run.folder / "stac").exists()


def test_command_publishes(tmp_path):
    run = make_run(tmp_path, model=False)
    run.save(tmp_path / "run.yaml")
    command = [
        sys.executable,
        "-m",
        "ai4land.cli",
        "publish",
        tmp_path / "run.yaml",
        "title=Else",
        "--cog",
        "2004-2005",
        "--cog",
        "850",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str((run.folder / "stac" / "catalog.json").resolve())
    assert objects(run.folder / "stac")["catalog.json"]["title"] == "Else"
    assert sorted(p.name for p in run.folder.rglob("*.tif")) == [f"tiny-map-{y}.tif" for y in (2004, 2005, 850)]


# -- other cubes -------------------------------------------------------------------------------------------------------------


def test_cube_elsewhere_is_described_where_it_is(published, server, tmp_path, schemas):
    """Over HTTP, where nothing can be listed."""
    place = f"{server}/cube.zarr"
    reconstruct = {"reference": 2004, "years": YEARS, "cube": place}
    run = run_in(tmp_path, reconstruct=reconstruct)
    path = publish_run(run, cog=[2005], base_url="https://example.org/stac")
    assert check_all(path.parent, schemas) == 2 + len(YEARS)
    found = objects(path.parent)
    for at in ("tiny-map/collection.json", "tiny-map/tiny-map-850/tiny-map-850.json"):
        assert found[at]["assets"]["cube"]["href"] == place
    (row, *_) = rustac.read_sync(str(path.parent / "items.parquet"))["features"]
    assert row["assets"]["cube"]["href"] == place
    with rasterio.open(path.parent / "tiny-map" / "tiny-map-2005" / "tiny-map-2005.tif") as file:
        np.testing.assert_array_equal(file.read(1), codes_of(HILDA, 2005))


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """A bucket of a real S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="publish-maps")
        yield "s3://publish-maps"
    finally:
        server.stop()


def test_one_run_publishes_all_parts_of_a_cube_in_an_object_store(bucket, tmp_path):
    place = f"{bucket}/globe.zarr"
    for part, years in (("historical", [2004]), ("ssp126", [2005])):
        make_cube(f"{place}/{part}", years=years)
    run = run_in(tmp_path, reconstruct={"reference": 2004, "years": [2005], "cube": place, "part": "ssp126"})
    path = publish_run(run, cog=[2005])
    found = objects(path.parent)
    for part in ("historical", "ssp126"):
        about = found[f"tiny-map-{part}/collection.json"]
        assert about["assets"]["cube"]["href"] == f"{place}/{part}"
        assert [link["href"] for link in about["links"] if link["rel"] == "store"] == [place]
    with rasterio.open(path.parent / "tiny-map-ssp126" / "tiny-map-ssp126-2005" / "tiny-map-ssp126-2005.tif") as file:
        np.testing.assert_array_equal(file.read(1), codes_of(HILDA, 2005))


@pytest.mark.parametrize("kind", ["folder", "file", "memory"])
def test_a_cube_at_any_kind_of_place_is_published(tmp_path, kind):
    path = tmp_path / "a b" / "cube.zarr"
    place = {"folder": path, "file": path.as_uri(), "memory": f"memory://{tmp_path.name}/cube.zarr"}[kind]
    make_cube(place, years=[2004, 2005], license="CC-BY-4.0" if kind == "file" else "free for all")
    to = tmp_path / "out it"
    catalog = publish(place, to=to.as_uri() if kind == "file" else to, name="tiny.map", cog=[2005])
    about = objects(catalog.parent)["tiny-map/collection.json"]
    assert about["assets"]["cube"]["href"] == (place if kind == "memory" else "../../a b/cube.zarr")
    assert about["title"] == "tiny.map" and about["license"] == ("CC-BY-4.0" if kind == "file" else "other")
    with rasterio.open(catalog.parent / "tiny-map" / "tiny-map-2005" / "tiny-map-2005.tif") as file:
        np.testing.assert_array_equal(file.read(1), codes_of(HILDA, 2005))
    assert publish(place, to=to, name="tiny.map") == catalog == to / "catalog.json"


def test_years_that_are_whole_are_published_and_more_of_them_later(tmp_path):
    run = run_in(tmp_path)
    place, years = run.folder / "cube.zarr", [2004, 2005]
    make_cube(place, years=years, finish=False, license="CC-BY-4.0", years_a_shard=1, whole=1)
    assert cube.show(place) == [2004]
    path = publish_run(run, cog=[2004])
    assert sorted(p.name for p in (path.parent / "tiny-map").iterdir() if p.is_dir()) == ["tiny-map-2004"]
    about = objects(path.parent)["tiny-map/collection.json"]
    assert about["license"] == "CC-BY-4.0" and about["extent"]["temporal"]["interval"][0][1] == "2004-12-31T23:59:59Z"
    for window in GRID.shards():
        write_years(place, window, [2005], HILDA)
    assert cube.show(place) == years
    assert {i["id"] for i in objects(publish_run(run).parent).values()} >= {"tiny-map-2004", "tiny-map-2005"}
    assert not list(path.parent.rglob("*.tif"))


def test_model_of_another_cube_is_left_out(tmp_path):
    run = make_run(tmp_path, model=False)
    save_model(run.folder, [network(1).state_dict()], card(network(1)))
    shutil.rmtree(run.folder / "cube.zarr")
    make_cube(run.folder / "cube.zarr", years=[2004], model="0" * 64)
    said: list[str] = []
    assert "tiny-map-model/collection.json" not in objects(publish_run(run, tell=said.append).parent)
    assert any("not the one that the cube was made with" in line for line in said)


def test_picture_comes_from_an_overview_of_the_cube(published):
    """The coarsest one here is too small to fill the picture, so that the map itself is drawn."""
    run, path = published
    group = zarr.open_group(run.folder / "cube.zarr", mode="r")
    assert [e["asset"] for e in group.attrs["multiscales"]["layout"]] == ["land_cover", "overviews/1/land_cover"]
    box, codes = GRID.fine, codes_of(HILDA, 2100)
    rows, cols = equal_area(box, codes.shape, side=512)
    table = np.zeros((256, 3))
    for c in (HILDA.fill, *HILDA.classes):
        table[c.code] = [int(c.colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    want = table[codes[np.ix_(rows, cols)]]
    np.testing.assert_allclose(imread(path.parent / "tiny-map" / "thumbnail.png")[..., :3], want, atol=1e-3)


# -- parts -------------------------------------------------------------------------------------------------------------------


def test_parts_of_a_cube_are_collections(tmp_path, schemas):
    run = run_in(tmp_path)
    for part, years in (("historical", [2004]), ("ssp126", [2005, 2100])):
        make_cube(run.folder / "cube.zarr" / part, years=years)
    path = publish_run(run, cog=[2005])
    assert check_all(path.parent, schemas) == 3 + 3
    root = pystac.Catalog.from_file(str(path))
    assert [c.id for c in root.get_children()] == ["tiny-map-historical", "tiny-map-ssp126"]
    later = root.get_child("tiny-map-ssp126")
    assert [i.id for i in later.get_items()] == ["tiny-map-ssp126-2005", "tiny-map-ssp126-2100"]
    assert later.extra_fields["ai4land:part"] == "ssp126"
    got = xr.open_zarr(later.assets["cube"].get_absolute_href(), decode_times=False, consolidated=True)
    np.testing.assert_array_equal(got["land_cover"].values[1], codes_of(HILDA, 2100))
    (store,) = later.get_links("store")
    assert Path(store.get_absolute_href()) == run.folder / "cube.zarr"
    assert {i["id"] for i in rustac.read_sync(str(path.parent / "items.parquet"))["features"]} == {
        "tiny-map-historical-2004",
        "tiny-map-ssp126-2005",
        "tiny-map-ssp126-2100",
    }
    assert imread(path.parent / "tiny-map-ssp126" / "thumbnail.png").shape[1] == 512
