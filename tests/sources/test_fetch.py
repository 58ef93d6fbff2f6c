"""Sources brought to a mirror from real servers on this machine, and read back without them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from pystac.validation import validate_dict

from ai4land import cli
from ai4land.errors import ConfigError, DataError
from ai4land.grid import make_grid
from ai4land.rasters.items import load_asset
from ai4land.rasters.read import open_raster
from ai4land.sources import fetch as fetching
from ai4land.sources.download import verify
from ai4land.sources.fetch import fetch, fetch_all
from ai4land.sources.known import SourceFile, load_source
from ai4land.sources.mirror import FILE, locked
from ai4land.sources.search import find_items

GRID = make_grid((-180, -90, 180, 90), coarse_cell=10, factor=2, shard=18)
VALUES = np.random.default_rng(0).integers(1, 200, GRID.shape).astype("uint8")
HALF = GRID.shape[1] // 2
PARTS = {"west": slice(0, HALF), "east": slice(HALF, None)}


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.server.gate is not None and not self.server.gate(self):
            self.send_error(403)
        else:
            super().do_GET()


@contextmanager
def serving(folder: Path):
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    http.daemon_threads, http.asked, http.gate = True, [], None
    http.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield http
    finally:
        http.shutdown()
        http.server_close()


def write_tif(path: Path, values, transform) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff",
        "height": values.shape[0],
        "width": values.shape[1],
        "count": 1,
        "dtype": values.dtype,
        "nodata": 0,
    }
    with rasterio.open(path, "w", crs="EPSG:4326", transform=transform, **profile) as file:
        file.write(values, 1)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two halves of a map of the globe."""
    folder = tmp_path_factory.mktemp("files")
    for name, cut in PARTS.items():
        write_tif(folder / f"{name}.tif", VALUES[:, cut], GRID.fine.affine * Affine.translation(cut.start, 0))
    return folder


@pytest.fixture
def server(files):
    with serving(files) as http:
        yield http


def make_item(name, hrefs, cut=PARTS["west"], *, year=2000, **fields):
    t = GRID.fine.affine * Affine.translation(cut.start, 0)
    width = len(range(*cut.indices(GRID.shape[1])))
    west, east = t.c, t.c + width * t.a
    ring = [[west, -90], [east, -90], [east, 90], [west, 90], [west, -90]]
    asset = {
        "type": "image/tiff; application=geotiff", "roles": ["data"], "bands": [{"name": "zone", "data_type": "uint8", "nodata": 0}],
        "proj:code": "EPSG:4326", "proj:shape": [GRID.shape[0], width], "proj:transform": list(t)[:6], **fields,
    }  # fmt: skip
    return {
        "type": "Feature", "stac_version": "1.1.0", "id": name, "collection": "zones", "geometry": {"type": "Polygon", "coordinates": [ring]},
        "stac_extensions": ["https://stac-extensions.github.io/projection/v2.0.0/schema.json"],
        "bbox": [west, -90, east, 90], "properties": {"datetime": f"{year}-06-01T00:00:00Z"}, "links": [],
        "assets": {key: {**asset, "href": href} for key, href in hrefs.items()},
    }  # fmt: skip


def write_static(folder: Path, items) -> Path:
    """Write a static catalogue with one collection, exactly as given."""
    collection = {
        "type": "Collection", "stac_version": "1.1.0", "id": "zones", "description": "zones", "license": "CC0-1.0",
        "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [["2000-01-01T00:00:00Z", None]]}},
        "links": [
            {"rel": "license", "href": "https://creativecommons.org/publicdomain/zero/1.0/"},
            *({"rel": "item", "href": f"./item{n}.json"} for n in range(len(items))),
        ],
    }  # fmt: skip
    catalog = {
        "type": "Catalog", "stac_version": "1.1.0", "id": "c", "description": "c",
        "links": [{"rel": "child", "href": "./zones/collection.json"}],
    }  # fmt: skip
    (folder / "stac" / "zones").mkdir(parents=True)
    (folder / "stac" / "catalog.json").write_text(json.dumps(catalog))
    (folder / "stac" / "zones" / "collection.json").write_text(json.dumps(collection))
    for n, item in enumerate(items):
        (folder / "stac" / "zones" / f"item{n}.json").write_text(json.dumps(item))
    return folder / "stac" / "catalog.json"


@pytest.fixture(scope="module")
def api(files, tmp_path_factory):
    """A STAC API of rustac whose assets lie on another server."""
    program = Path(sys.executable).with_name("rustac")
    if not program.exists():
        pytest.skip("rustac is not installed")
    with serving(files) as http:
        items = [make_item(name, {"zone": f"{http.url}/{name}.tif"}, cut) for name, cut in PARTS.items()]
        path = tmp_path_factory.mktemp("api") / "items.json"
        path.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [str(program), "serve", "-a", f"http://{place}", "--bind", place, "--create-collections", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(200):
                try:
                    urllib.request.urlopen(f"http://{place}/collections", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield f"http://{place}", http
        finally:
            process.terminate()
            process.wait(10)


def quick(source, **options):
    return fetch(source, timeout=5, pause=0.01, threads=2, **options)


def pixels(items, asset="zone"):
    return load_asset(items, asset=asset, grid=GRID, resampling="exact", dtype="uint8").values


# -- APIs ---------------------------------------------------------------------------------------------------------------


def test_a_collection_of_an_api_is_read_offline_with_the_same_pixels(api, tmp_path):
    url, _ = api
    online = pixels(find_items(url, collection="zones"))
    done = quick("zones", to=tmp_path, catalog=url)
    assert (done.kept, done.brought, done.failed) == (0, 2, {})
    moved = shutil.move(tmp_path, tmp_path.with_name("elsewhere"))
    items = find_items(Path(moved) / "catalog.json", collection="zones")
    assert [i.id for i in items] == ["east", "west"] and all(
        a.href.startswith("file://") for i in items for a in i.assets.values()
    )
    np.testing.assert_array_equal(pixels(items), online)
    np.testing.assert_array_equal(online, VALUES)
    by_path = open_raster(Path(moved) / "zones" / "west" / "zone.tif", grid=GRID, resampling="exact", dtype="uint8", nodata=0)
    np.testing.assert_array_equal(by_path.values[:, PARTS["west"]], VALUES[:, PARTS["west"]])


def test_a_box_and_years_choose_and_a_later_fetch_adds(api, tmp_path):
    url, _ = api
    assert quick("zones", to=tmp_path, catalog=url, bbox=(10, 0, 20, 10), years=[2000]).brought == 1
    assert [i.id for i in find_items(tmp_path / "catalog.json", collection="zones")] == ["east"]
    done = quick("zones", to=tmp_path, catalog=url, bbox=(170, 0, -170, 10))
    assert (done.kept, done.brought) == (1, 1)
    assert len(find_items(tmp_path / "catalog.json", collection="zones")) == 2
    with pytest.raises(DataError, match="no item that meets"):
        quick("zones", to=tmp_path, catalog=url, years=[1990])
    with pytest.raises(DataError, match=r"collection is 'soil', expected one of \['zones'\]"):
        quick("soil", to=tmp_path, catalog=url)
    with pytest.raises(DataError, match=r"assets are \['height'\], expected some of \['zone'\]"):
        quick("zones", to=tmp_path, catalog=url, assets=["height"])


def test_a_second_run_brings_only_what_is_missing_or_damaged(api, tmp_path):
    url, http = api
    quick("zones", to=tmp_path, catalog=url)
    http.asked.clear()
    assert quick("zones", to=tmp_path, catalog=url).kept == 2 and http.asked == []
    west = tmp_path / "zones" / "west" / "zone.tif"
    data = bytearray(west.read_bytes())
    data[-1] ^= 1
    west.write_bytes(data)
    done = quick("zones", to=tmp_path, catalog=url)
    assert (done.kept, done.brought) == (1, 1) and [path for path, _ in http.asked] == ["/west.tif"]
    west.unlink()
    done = quick("zones", to=tmp_path, catalog=url)
    assert (done.kept, done.brought) == (1, 1)
    np.testing.assert_array_equal(pixels(find_items(tmp_path / "catalog.json", collection="zones")), VALUES)


def test_assets_that_are_fetched_later_are_added(server, tmp_path):
    catalog = write_static(
        tmp_path / "site", [make_item("west", {"zone": f"{server.url}/west.tif", "age": f"{server.url}/east.tif"})]
    )
    for asset in ("zone", "age"):
        assert quick("zones", to=tmp_path / "mirror", catalog=catalog, assets=[asset]).brought == 1
    (item,) = find_items(tmp_path / "mirror" / "catalog.json", collection="zones")
    assert sorted(item.assets) == ["age", "zone"]
    (tmp_path / "mirror" / "zones" / "west" / "age.tif").unlink()
    quick("zones", to=tmp_path / "mirror", catalog=catalog, assets=["zone"])
    (item,) = find_items(tmp_path / "mirror" / "catalog.json", collection="zones")
    assert sorted(item.assets) == ["zone"]


# -- signing, tokens ----------------------------------------------------------------------------------------------------


def every_text(folder: Path) -> str:
    return "\n".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file() and p.suffix != ".tif")


def test_items_are_signed_when_they_are_downloaded_and_the_signature_is_not_kept(api, tmp_path):
    url, http = api
    http.gate = lambda request: "sig=SECRET" in request.path

    def sign(item):
        for asset in item.assets.values():
            asset.href += "?sig=SECRET"
        return item

    try:
        failed = quick("zones", to=tmp_path / "a", catalog=url).failed
        assert sorted(failed) == ["east/zone.tif", "west/zone.tif"] and "status 403" in failed["east/zone.tif"]
        assert quick("zones", to=tmp_path / "b", catalog=url, modifier=sign).brought == 2
    finally:
        http.gate = None
    assert "SECRET" not in every_text(tmp_path / "b") and f"{http.url}/west.tif" in every_text(tmp_path / "b")


def test_a_token_goes_to_the_host_of_the_catalogue_only(files, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(files, site)
    with serving(site) as own, serving(files) as foreign:
        items = [
            make_item("west", {"zone": "../../west.tif"}),
            make_item("east", {"zone": f"{foreign.url}/east.tif"}, PARTS["east"]),
        ]
        write_static(site, items)
        catalog = f"{own.url}/stac/catalog.json"
        done = quick("zones", to=tmp_path / "mirror", catalog=catalog, token="SECRET")
        assert done.brought == 2 and {t for _, t in own.asked} == {"Bearer SECRET"} and {t for _, t in foreign.asked} == {None}
        foreign.asked.clear()
        quick("zones", to=tmp_path / "m2", catalog=catalog, token="SECRET", token_hosts=[foreign.url])
        assert {t for _, t in foreign.asked} == {"Bearer SECRET"}
    assert "SECRET" not in every_text(tmp_path / "mirror") + every_text(tmp_path / "m2")


# -- failures and strangers ---------------------------------------------------------------------------------------------


def test_what_fails_is_named_and_the_rest_is_kept(server, files, tmp_path):
    site = tmp_path / "site"
    items = [
        make_item("west", {"zone": f"{server.url}/west.tif"}),
        make_item("gone", {"zone": f"{server.url}/gone.tif"}, PARTS["east"]),
    ]
    catalog = write_static(site, items)
    lines = []
    with pytest.raises(DataError, match=r"1 of what was asked for failed; (?s:.*)zones/gone/zone\.tif: .*gone.tif .*status 404"):
        fetch_all(["zones"], to=tmp_path / "mirror", catalog=str(catalog), tell=lines.append, pause=0.01)
    assert lines == [f"zones: 1 files, 0.0 MB in {tmp_path / 'mirror' / 'zones'}: 0 were there, 1 brought, 1 failed"]
    assert [i.id for i in find_items(tmp_path / "mirror" / "catalog.json", collection="zones")] == ["west"]
    shutil.copy(files / "east.tif", files / "gone.tif")
    try:
        fetch_all(["zones"], to=tmp_path / "mirror", catalog=str(catalog), tell=lines.append, pause=0.01)
    finally:
        (files / "gone.tif").unlink()
    assert "1 were there, 1 brought, 0 failed" in lines[1]


def test_nothing_is_written_outside_the_mirror(server, tmp_path):
    evil = ["../../../evil", "/etc/evil", "..", ".hidden", "a/b\\c", "n\x00ul", "x" * 300, "con\nsole"]
    items = [make_item(name, {"../../zone": f"{server.url}/west.tif"}) for name in evil]
    items.append(make_item("twin/a", {"zone": f"{server.url}/west.tif", "../zone": f"{server.url}/east.tif"}))
    site = tmp_path / "site"
    catalog = write_static(site, items)
    before = {p for p in tmp_path.rglob("*") if p.is_relative_to(site)}
    mirror = tmp_path / "deep" / "in" / "mirror"
    done = quick("zones", to=mirror, catalog=catalog)
    assert done.failed == {} and done.brought == len(evil) + 2
    outside = {p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(mirror)}
    assert outside == {p for p in before if p.is_file()}
    found = find_items(mirror / "catalog.json", collection="zones")
    assert sorted(i.id for i in found) == sorted([*evil, "twin/a"])
    assert {len(i.assets) for i in found} == {1, 2}


def test_a_link_that_leads_out_of_the_mirror_is_not_followed(server, tmp_path):
    catalog = write_static(tmp_path / "site", [make_item("west", {"zone": f"{server.url}/west.tif"})])
    (tmp_path / "outside").mkdir()
    (tmp_path / "mirror" / "zones").mkdir(parents=True)
    (tmp_path / "mirror" / "zones" / "west").symlink_to(tmp_path / "outside", target_is_directory=True)
    assert "leads to" in quick("zones", to=tmp_path / "mirror", catalog=catalog).failed["west/zone.tif"]
    assert list((tmp_path / "outside").iterdir()) == []


def test_files_beside_a_local_catalogue_are_copied_and_others_refused(files, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(files, site)
    catalog = write_static(site, [make_item("west", {"zone": "../../west.tif"})])
    assert quick("zones", to=tmp_path / "mirror", catalog=catalog).brought == 1
    secret = tmp_path / "secret.tif"
    shutil.copy(files / "west.tif", secret)
    for n, href in enumerate((f"file://{secret}", str(secret), "../../../secret.tif", f"/vsicurl/{secret}", "/vsizip/a.zip/b")):
        with pytest.raises(DataError, match=r"asset zone of item west of catalogue .* is .*, expected"):
            quick(
                "zones", to=tmp_path / "m2", catalog=write_static(tmp_path / f"s{n}" / "x", [make_item("west", {"zone": href})])
            )
    assert not list((tmp_path / "m2").rglob("*.tif"))


def test_a_wrong_checksum_of_the_catalogue_fails(server, files, tmp_path):
    right = verify(files / "west.tif", name="a").multihash
    for n, checksum in enumerate((right, right[:-4] + "0000", "nonsense")):
        item = make_item("west", {"zone": f"{server.url}/west.tif"}, **{"file:checksum": checksum})
        done = quick("zones", to=tmp_path / f"m{n}", catalog=write_static(tmp_path / f"s{n}", [item]))
        assert (done.brought == 1) == (n == 0)
        assert n == 0 or "checksum" in str(done.failed) or "sha256 of" in str(done.failed)
        assert n == 0 or not list((tmp_path / f"m{n}").rglob("*.tif*"))


def test_a_full_disk_is_told_before_anything_is_brought(server, tmp_path, monkeypatch):
    catalog = write_static(tmp_path / "site", [make_item("west", {"zone": f"{server.url}/west.tif"})])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage(1, 1, fetching.SPARE + 100))
    with pytest.raises(DataError, match=r"disk of .*zones has .* GB free, expected .* GB for 1 files; make room"):
        quick("zones", to=tmp_path / "mirror", catalog=catalog)
    assert server.asked == []


def test_two_processes_do_not_fill_one_folder(server, tmp_path):
    catalog = write_static(tmp_path / "site", [make_item("west", {"zone": f"{server.url}/west.tif"})])
    with locked(tmp_path / "mirror" / "zones"), pytest.raises(DataError, match="is being filled by another process"):
        quick("zones", to=tmp_path / "mirror", catalog=catalog)
    assert quick("zones", to=tmp_path / "mirror", catalog=catalog).brought == 1


def test_the_catalogue_of_somebody_else_is_not_written_over(server, tmp_path):
    catalog = write_static(tmp_path / "site", [make_item("west", {"zone": f"{server.url}/west.tif"})])
    before = every_text(tmp_path)
    with pytest.raises(DataError, match=r"stac/catalog.json is another catalogue, expected that of a mirror or none"):
        quick("zones", to=tmp_path / "site" / "stac", catalog=catalog)
    (tmp_path / "site" / "stac" / "catalog.json").rename(tmp_path / "site" / "stac" / "c.json")
    with pytest.raises(DataError, match="zones holds a collection that is not of a mirror"):
        quick("zones", to=tmp_path / "site" / "stac", catalog=tmp_path / "site" / "stac" / "c.json")
    assert sorted(every_text(tmp_path)) == sorted(before) and server.asked == []


# -- known sources ------------------------------------------------------------------------------------------------------


@pytest.fixture
def uk(server, files, monkeypatch):
    """The source of the UK with the files of this machine."""
    known = load_source("hildaplus-uk")
    given = tuple(
        SourceFile(
            f"map-{year}", f"{server.url}/{name}.tif", "image/tiff; application=geotiff", f"Map of {year}", (year, year),
            (files / f"{name}.tif").stat().st_size, verify(files / f"{name}.tif", name=name).multihash,
        )
        for name, year in (("west", 2009), ("east", 2012))
    )  # fmt: skip
    source = dataclasses.replace(known, access=dataclasses.replace(known.access, files=given))
    monkeypatch.setattr(fetching, "load_source", lambda name: source)
    return source


def test_files_of_a_known_source_become_items(uk, tmp_path):
    assert quick("hildaplus-uk", to=tmp_path, years=[2009]).brought == 1
    assert quick("hildaplus-uk", to=tmp_path).brought == 1
    assert (tmp_path / "hildaplus-uk" / "west.tif").is_file()
    items = find_items(tmp_path / "catalog.json", collection="hildaplus-uk")
    assert [i.id for i in items] == ["map-2009", "map-2012"]
    assert [i.id for i in find_items(tmp_path / "catalog.json", collection="hildaplus-uk", years=[2012])] == ["map-2012"]
    np.testing.assert_array_equal(pixels(items, "data"), VALUES)
    with pytest.raises(DataError, match="years of hildaplus-uk are 2009-2012"):
        quick("hildaplus-uk", to=tmp_path, years=[1900])


def test_a_known_source_of_an_api_is_signed_and_keeps_its_credits(api, tmp_path, monkeypatch):
    url, http = api
    known = load_source("esa-cci-lc")
    access = dataclasses.replace(known.access, api=url, collection="zones", asset="zone")
    monkeypatch.setattr(fetching, "load_source", lambda name: dataclasses.replace(known, access=access))
    signing = types.ModuleType("planetary_computer")

    def sign(item):
        item.assets["zone"].href += "?sig=SECRET"
        return item

    signing.sign = sign
    monkeypatch.setitem(sys.modules, "planetary_computer", signing)
    http.gate = lambda request: "sig=SECRET" in request.path
    try:
        assert quick("esa-cci-lc", to=tmp_path, bbox=(-20, 0, -10, 10)).brought == 1
        with pytest.raises(DataError, match="years of esa-cci-lc are 1992-2015, expected some of those asked for"):
            quick("esa-cci-lc", to=tmp_path, years=[2020])
    finally:
        http.gate = None
    (item,) = find_items(tmp_path / "catalog.json", collection="esa-cci-lc", years=[2000])
    assert item.id == "west" and item.collection_id == "esa-cci-lc" and "SECRET" not in every_text(tmp_path)
    about = json.loads((tmp_path / "esa-cci-lc" / "collection.json").read_text())
    assert about["sci:doi"] == "10.24381/cds.006f2c9a" and about["ai4land:legend"] == "lccs"


def test_real_climate_zones_keep_their_pixels(real_data, tmp_path, monkeypatch):
    known = load_source("koppen-geiger-0p1")
    with serving(real_data / "global_koppen_geiger") as http:
        given = tuple(
            dataclasses.replace(f, href=f"{http.url}/{f.key}/../{f.key}_koppen_geiger_0p1.tif") for f in known.access.files
        )
        source = dataclasses.replace(known, access=dataclasses.replace(known.access, files=given))
        monkeypatch.setattr(fetching, "load_source", lambda name: source)
        done = quick(source.id, to=tmp_path, years=[1970, 2000])
    assert (done.brought, done.failed) == (2, {})
    (item,) = find_items(tmp_path / "catalog.json", collection=source.id, years=[1970])
    bavaria = make_grid((8, 47, 14, 51), coarse_cell=1, factor=10, shard=40)
    got = load_asset([item], asset="data", grid=bavaria, resampling="exact", dtype="uint8").values
    path = real_data / "global_koppen_geiger" / "1961_1990_koppen_geiger_0p1.tif"
    np.testing.assert_array_equal(got, open_raster(path, grid=bavaria, resampling="exact", dtype="uint8", nodata=0).values)
    assert len(np.unique(got)) > 3


def test_the_catalogue_of_a_mirror_is_valid(uk, api, tmp_path, schemas):
    quick("hildaplus-uk", to=tmp_path)
    quick("zones", to=tmp_path, catalog=api[0])
    documents = [p for p in tmp_path.rglob("*.json") if p.name != "manifest.json"]
    for path in documents:
        fields = json.loads(path.read_text())
        fields["stac_extensions"] = [e for e in fields.get("stac_extensions", []) if e != FILE]
        validate_dict(fields, validator=schemas)
    assert len(documents) == 1 + 2 + 4
    own = json.loads((tmp_path / "hildaplus-uk" / "collection.json").read_text())
    assert own["license"] == "CC-BY-4.0" and own["sci:doi"] == "10.1594/PANGAEA.921846"
    assert "assets" not in own and {k["rel"] for k in own["links"]} >= {"license", "cite-as", "item"}
    hrefs = [
        k["href"]
        for p in documents
        for k in json.loads(p.read_text())["links"]
        if k["rel"] in ("root", "parent", "child", "item")
    ]
    assert not any(h.startswith(("/", "http", "file")) for h in hrefs)


def test_a_source_by_hand_says_what_to_do_and_takes_what_is_put_there(tmp_path):
    with pytest.raises(
        DataError, match=r"hildaplus-v2 is got by hand, and no file \*states\*.tif is in .*(?s:.*)Open https://doi.org/10.1594"
    ):
        quick("hildaplus-v2", to=tmp_path)
    write_tif(tmp_path / "hildaplus-v2" / "states" / "hilda_plus_states_1960_GLOB-v2_wgs84.tif", VALUES, GRID.fine.affine)
    (tmp_path / "hildaplus-v2" / "read me.txt").write_text("unpacked by hand")
    for kept in (1, 1):
        done = quick("hildaplus-v2", to=tmp_path)
        assert (done.kept, done.brought, done.failed) == (kept, 0, {})
    (item,) = find_items(tmp_path / "catalog.json", collection="hildaplus-v2", years=[1960])
    np.testing.assert_array_equal(pixels([item], "data"), VALUES)
    manifest = json.loads((tmp_path / "hildaplus-v2" / "manifest.json").read_text())
    assert [f["href"] for f in manifest["files"].values()] == ["by hand"]


def test_the_command_line_fetches_and_fails_by_name(server, tmp_path, monkeypatch, capsys):
    items = [make_item("west", {"zone": f"{server.url}/west.tif"}), make_item("gone", {"zone": f"{server.url}/gone.tif"})]
    catalog = write_static(tmp_path / "site", items)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["ai4land", "fetch", *args, "--to", str(tmp_path / "mirror")])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    code, out, err = call("zones", "--catalog", str(catalog), "--years", "1999-2001", "--bbox=-20,0,-10,10", "--asset", "zone")
    assert code == 1 and "zones/gone/zone.tif: " in err and "status 404" in err and "Traceback" not in err and not out
    (tmp_path / "site" / "stac" / "zones" / "item1.json").write_text(json.dumps(items[0]))
    code, out, err = call("zones", "--catalog", str(catalog), "--threads", "1")
    assert code == 0 and out.strip() == str(tmp_path / "mirror" / "catalog.json") and "1 were there, 0 brought, 0 failed" in err
    code, _, err = call("hildaplus-v2")
    assert code == 1 and "Open https://doi.org/10.1594/PANGAEA.974335" in err


def test_an_interrupted_fetch_keeps_what_is_whole(server, tmp_path):
    items = [make_item(f"i{n}", {"zone": f"{server.url}/west.tif"}) for n in range(6)]
    catalog = write_static(tmp_path / "site", items)

    def interrupt(done, total, name):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick("zones", to=tmp_path / "mirror", catalog=catalog, progress=interrupt)
    kept = json.loads((tmp_path / "mirror" / "zones" / "manifest.json").read_text())["files"]
    assert len(kept) == 2
    done = quick("zones", to=tmp_path / "mirror", catalog=catalog)
    assert done.kept >= 2 and done.kept + done.brought == 6 and done.failed == {}


def test_options_of_the_command_line_are_checked(tmp_path, monkeypatch):
    for options, told in (
        ({"years": "1999-1992"}, "years are '1999-1992', expected the first year first"),
        ({"years": "last"}, "--"),
        ({"bbox": "1,2,3"}, "--bbox is '1,2,3', expected west,south,east,north"),
        ({"token": "AI4LAND_NO_SUCH"}, "environment variable AI4LAND_NO_SUCH is not set"),
    ):
        with pytest.raises(ConfigError, match=told):
            fetch_all(["hildaplus-v2"], to=tmp_path, **options)
    with pytest.raises(ConfigError, match="source is 'luh4'"):
        fetch_all(["hildaplus-v2", "luh4"], to=tmp_path)
