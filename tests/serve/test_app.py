from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pystac
import pytest
import xarray as xr
import zarr
from PIL import Image

from ai4land.cube.cube import open_cube
from ai4land.errors import ConfigError, DataError
from ai4land.run.publish import publish_run
from ai4land.serve.app import make_app
from ai4land.serve.atlas import open_atlas
from ai4land.serve.tiles import point, series, tile
from tests.maps import HILDA, some_codes, write_maps
from tests.published import make_run
from tests.servers import running


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; names of headers with ``_`` for ``-``."""
    request = urllib.request.Request(url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def raw(address: str, target: str) -> bytes:
    """Answer to a request line that no client library would send."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1"))
        return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run's folder: the cube with an overview, its ledger, a catalogue, and things that nobody may read."""
    run = tmp_path_factory.mktemp("run")
    codes = some_codes()
    path = write_maps(run / "cube.zarr", codes=codes, levels={4: (codes[:, 2::4, 2::4], (2000, 2001, 2005))})
    (run / "secret.txt").write_text("SECRET")
    (run / "cube.ledger").mkdir()
    (run / "cube.ledger" / "zarr.json").write_text("SECRET")
    (path / ".hidden").write_text("SECRET")
    (path / "notes.txt").write_text("SECRET")
    (path / "ledger").mkdir()
    (path / "ledger" / "a.jsonl").write_text("SECRET")
    (path / "confidence" / "c" / "7").symlink_to(run / "secret.txt")
    (path / "out").symlink_to(run)
    (path / "inner").symlink_to(path / "land_cover")
    space = pystac.SpatialExtent([[-180, -90, 180, 90]])
    collection = pystac.Collection("maps", "of a test", pystac.Extent(space, pystac.TemporalExtent([[None, None]])))
    collection.add_asset("cube", pystac.Asset("../../cube.zarr", media_type="application/vnd.zarr; version=3", roles=["data"]))
    catalogue = pystac.Catalog("test", "a catalogue")
    catalogue.add_child(collection)
    catalogue.normalize_and_save(str(run / "stac"), pystac.CatalogType.SELF_CONTAINED)
    (run / "stac" / "evil.html").write_text("<script>alert(1)</script>")
    (run / "stac" / ".env").write_text("SECRET")
    return run


@pytest.fixture(scope="module")
def served(folder):
    with running(make_app(str(folder / "cube.zarr"))) as (url, answered):
        yield url, answered, folder


@pytest.fixture(scope="module")
def url(served) -> str:
    return served[0]


# -- the cube -----------------------------------------------------------------------------------------------------------


def http_store(kind: str, address: str) -> Any:
    if kind == "obstore":
        from obstore.store import HTTPStore
        from zarr.storage import ObjectStore

        return ObjectStore(HTTPStore.from_url(address, client_options={"allow_http": True}), read_only=True)
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip("aiohttp, which fsspec reads http with, is not installed")
    return address


@pytest.mark.parametrize("kind", ["obstore", "fsspec"])
def test_the_cube_reads_over_http_as_from_its_folder(served, kind):
    url, answered, folder = served
    before = len(answered)
    ds = xr.open_zarr(http_store(kind, f"{url}/cube"), chunks=None, decode_coords="all")
    local = open_cube(folder / "cube.zarr")
    part = ds["land_cover"][1, 3:12, 50:60].values
    assert np.array_equal(part, local["land_cover"][1, 3:12, 50:60])
    xr.testing.assert_equal(ds["confidence"].isel(time=2).drop_vars("time"), local["confidence"].isel(time=2).drop_vars("time"))
    shards = {status for _, path, status in answered[before:] if "/land_cover/c/" in path}
    assert shards == {206}, "a sharded reader asks for the index and for single chunks"


def test_overviews_read_over_http(url, folder):
    got = zarr.open_group(http_store("obstore", f"{url}/cube"), mode="r")["overviews/1/land_cover"]
    assert np.array_equal(got[...], zarr.open_group(folder / "cube.zarr", mode="r")["overviews/1/land_cover"][...])


SHARD = "cube/land_cover/c/0/0/0"


@pytest.mark.parametrize(
    ("wanted", "slice_"), [("bytes=0-9", slice(0, 10)), ("bytes=-20", slice(-20, None)), ("bytes=30-", slice(30, None))]
)
def test_ranges_are_answered_206(url, folder, wanted, slice_):
    whole = (folder / "cube.zarr/land_cover/c/0/0/0").read_bytes()
    status, headers, body = ask(f"{url}/{SHARD}", Range=wanted)
    start = slice_.indices(len(whole))[0]
    assert status == 206 and body == whole[slice_]
    assert headers["content-range"] == f"bytes {start}-{start + len(body) - 1}/{len(whole)}"
    assert headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        ("bytes=0-1,5-6", 416),
        ("bytes=99999999-", 416),
        ("bytes=9-3", 400),
        ("lines=1-2", 400),
        ("bytes=a-b", 400),
        ("bytes=-0", 416),
    ],
)
def test_ranges_that_are_refused(url, wanted, status):
    assert ask(f"{url}/{SHARD}", Range=wanted)[0] == status


def test_head_etag_and_media_type(url, folder):
    size = (folder / "cube.zarr/land_cover/c/0/0/0").stat().st_size
    status, headers, body = ask(f"{url}/{SHARD}", "HEAD")
    assert (status, body, int(headers["content-length"])) == (200, b"", size) and headers["accept-ranges"] == "bytes"
    status, again, body = ask(f"{url}/{SHARD}", If_None_Match=headers["etag"])
    assert (status, body, again["etag"]) == (304, b"", headers["etag"])
    assert ask(f"{url}/{SHARD}", If_None_Match='"other"')[0] == 200
    status, headers, body = ask(f"{url}/cube/zarr.json")
    assert headers["content-type"] == "application/json" and json.loads(body)["node_type"] == "group"


def test_pages_of_other_sites_may_read_only_if_allowed(served, folder):
    for path in ("cube/zarr.json", "stac/catalog.json", "info.json", "tiles/2000/0/0/0.png", SHARD, "cube/none/zarr.json"):
        headers = ask(f"{served[0]}/{path}", Origin="https://example.org")[1]
        assert not [name for name in headers if name.startswith("access-control")]
    with running(make_app(str(folder / "cube.zarr"), cors=True)) as (url, _):
        check_open_to_all(url)


def check_open_to_all(url: str) -> None:
    for path in ("cube/zarr.json", "stac/catalog.json", "info.json", "tiles/2000/0/0/0.png", "cube/none/zarr.json"):
        assert ask(f"{url}/{path}", Origin="https://example.org")[1]["access-control-allow-origin"] == "*"
    asked = {"Origin": "https://example.org", "Access_Control_Request_Method": "GET", "Access_Control_Request_Headers": "range"}
    status, headers, _ = ask(f"{url}/{SHARD}", "OPTIONS", **asked)
    assert status == 200 and "range" in headers["access-control-allow-headers"].lower()
    asked["Access_Control_Request_Method"] = "PUT"
    assert ask(f"{url}/{SHARD}", "OPTIONS", **asked)[0] == 400


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_written(url, method):
    for path in ("cube/zarr.json", "info.json", "tiles/2000/0/0/0.png", "stac/catalog.json", ""):
        assert ask(f"{url}/{path}", method)[0] == 405


@pytest.mark.parametrize(
    "target",
    [
        "/cube/../secret.txt",
        "/cube/%2e%2e/secret.txt",
        "/cube/..%2fsecret.txt",
        "/cube/%2e%2e%2fsecret.txt",
        "/cube/..%5csecret.txt",
        "/cube/..;/secret.txt",
        "/cube//etc/passwd",
        "/cube/%2fetc%2fpasswd",
        "/cube/land_cover/../../cube.ledger/zarr.json",
        "/cube/land_cover/c/../../../cube.ledger/zarr.json",
        "/cube/out/cube.ledger/zarr.json",
        "/cube/confidence/c/7",
        "/cube/.hidden",
        "/cube/notes.txt",
        "/cube/ledger/a.jsonl",
        "/cube.ledger/zarr.json",
        "/cube/zarr.json%00.png",
        "/cube.zarr/../secret.txt",
        "/stac/../secret.txt",
        "/stac/.env",
        "/stac/evil.html",
        "/stac/..%2f..%2fcube.ledger%2fzarr.json",
        "/../web.py",
        "/..%2fweb.py",
        "/page/index.html",
        "/cube/land_cover/c/" + "9" * 400,
    ],
)
def test_nothing_else_can_be_read(url, target):
    answer = raw(url, target)
    assert answer.startswith(b"HTTP/1.1 404 ") and b"SECRET" not in answer and b"root:" not in answer and b"<script" not in answer


@pytest.mark.parametrize(
    "target", ["/cube/", "/cube", "/cube/land_cover", "/cube/land_cover/", "/cube/land_cover/c/0", "/stac", "/stac/"]
)
def test_folders_are_not_listed(url, target):
    answer = raw(url, target)
    assert answer.split()[1] in (b"404", b"307") and b"zarr.json" not in answer and b"catalog.json" not in answer


def test_a_link_that_stays_inside_is_followed(url):
    assert ask(f"{url}/cube/inner/zarr.json")[0] == 200


def test_noise_is_answered_and_ends(url):
    host, port = url.removeprefix("http://").split(":")
    for noise in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000):
        with socket.create_connection((host, int(port)), timeout=5) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(noise)
            assert not sock.recv(100) or True
    assert ask(f"{url}/info.json")[0] == 200


def test_every_answer_has_the_security_headers(url):
    for path in ("", "app.js", "info.json", "none", "cube/zarr.json", "tiles/1/1/1/1.png", "point.json"):
        headers = ask(f"{url}/{path}")[1]
        assert (
            headers["content-security-policy"].startswith("default-src 'self'")
            and "unsafe" not in headers["content-security-policy"]
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert ask(f"{url}/stac/catalog.json")[1]["content-security-policy"] == "default-src 'none'; sandbox"


# -- the catalogue ------------------------------------------------------------------------------------------------------


def test_the_catalogue_leads_to_the_cube(url):
    catalogue = pystac.Catalog.from_file(f"{url}/stac/catalog.json")
    (collection,) = catalogue.get_children()
    href = collection.assets["cube"].get_absolute_href()
    assert href == f"{url}/cube.zarr"
    assert ask(f"{href}/zarr.json")[2] == ask(f"{url}/cube/zarr.json")[2]


def test_every_link_of_a_published_run_is_answered(tmp_path):
    """A catalogue by :mod:`ai4land.publish.catalogue`, followed from page to page as a browser of catalogues does."""
    run = make_run(tmp_path, sources=["hildaplus-v2"])
    publish_run(run, cog=[2004])
    with running(make_app(str(run.folder / "cube.zarr"))) as (url, _):
        todo, seen = [f"{url}/stac/catalog.json"], {}
        while todo:
            address = todo.pop()
            if address in seen or not address.startswith(url):
                continue
            status, headers, body = ask(f"{address}/zarr.json" if address.endswith(".zarr") else address)
            seen[address] = headers["content-type"]
            assert status == 200, address
            if "/stac/" in address and address.endswith(".json"):
                about = json.loads(body)
                hrefs = [link["href"] for link in about["links"]] + [a["href"] for a in about.get("assets", {}).values()]
                todo += [urljoin(address, href) for href in hrefs]
        assert {f"{url}/cube.zarr", f"{url}/model.safetensors", f"{url}/model.json"} <= set(seen) and len(seen) > 10
        assert [kind.split(";")[0] for address, kind in seen.items() if address.endswith(".tif")] == ["image/tiff"]
        assert ask(f"{url}/config.yaml")[0] == 404


def test_a_cube_without_a_catalogue_has_none(tmp_path):
    app = make_app(str(write_maps(tmp_path / "c.zarr", codes=some_codes())))
    with running(app) as (url, _):
        assert json.loads(ask(f"{url}/info.json")[2])["catalogue"] is None
        assert ask(f"{url}/stac/catalog.json")[0] == 404
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"holds no catalog\.json or collection\.json"):
        make_app(str(tmp_path / "c.zarr"), catalogue=tmp_path / "other")


# -- maps ---------------------------------------------------------------------------------------------------------------


def test_tiles_are_kept_by_the_browser_and_said_to_be_the_same(url, folder):
    part = open_atlas(str(folder / "cube.zarr")).parts[""]
    status, headers, body = ask(f"{url}/tiles/2001/1/1/0.png")
    assert status == 200 and headers["content-type"] == "image/png" and "max-age" in headers["cache-control"]
    assert body == tile(part, year=2001, z=1, x=1, y=0) and Image.open(io.BytesIO(body)).size == (256, 256)
    status, _, body = ask(f"{url}/tiles/2001/1/1/0.png", If_None_Match=headers["etag"])
    assert (status, body) == (304, b"")
    assert ask(f"{url}/tiles/2005/1/1/0.png")[1]["etag"] != headers["etag"]


@pytest.mark.parametrize(
    "path",
    [
        "1999/0/0/0",
        "2000/0/1/0",
        "2000/99/0/0",
        "2000/0/-1/0",
        "2000/0/0/x",
        "2000/0/0/" + "1" * 5000,
        "2000/0/0/0.png/..",
        "²/0/0/0",
    ],
)
def test_what_is_no_tile_is_not_found(url, path):
    assert raw(url, f"/tiles/{path}.png").split()[1] in (b"404", b"400")
    assert ask(f"{url}/tiles/2000/0/0/0.png?part=none")[0] == 404


def test_tiles_are_quick(url):
    ask(f"{url}/tiles/2000/0/0/0.png")
    start = time.perf_counter()
    for x in range(8):
        assert ask(f"{url}/tiles/2005/3/{x}/3.png")[0] == 200
    assert (time.perf_counter() - start) / 8 < 0.2


def test_points_and_series(url, folder):
    part = open_atlas(str(folder / "cube.zarr")).parts[""]
    got = json.loads(ask(f"{url}/point.json?lon=10&lat=50&year=2001")[2])
    assert got == json.loads(json.dumps(point(part, lon=10, lat=50, year=2001)))
    assert json.loads(ask(f"{url}/series.json?lon=10&lat=50")[2]) == series(part, lon=10, lat=50)
    for query, status in (
        ("lon=a&lat=5&year=2000", 400),
        ("lon=nan&lat=5&year=2000", 400),
        ("lon=1&lat=5&year=1", 404),
        ("", 400),
    ):
        assert ask(f"{url}/point.json?{query}")[0] == status
    assert ask(f"{url}/series.json?lon=1&lat=1&part=x")[0] == 404


def test_info_describes_the_cube(url, folder):
    info = json.loads(ask(f"{url}/info.json")[2])
    assert info["cube"] == "cube" and info["catalogue"] == "stac/catalog.json"
    (part,) = info["parts"]
    assert part["title"] == "Maps for a test" and part["license"] == "CC-BY-4.0" and part["years"] == [2000, 2001, 2005]
    assert [c["code"] for c in part["classes"]] == HILDA.codes.tolist() and part["bounds"] == [-180, -90, 180, 90]


def test_a_cube_that_grows_shows_its_new_years_and_a_torn_one_stays(tmp_path):
    path = write_maps(tmp_path / "c.zarr", codes=some_codes())
    with running(make_app(str(path))) as (url, _):
        before = json.loads(ask(f"{url}/info.json")[2])
        assert ask(f"{url}/tiles/2006/0/0/0.png")[0] == 404
        write_maps(tmp_path / "d.zarr", codes=some_codes((4, 64, 128)), years=(2000, 2001, 2005, 2006))
        path.rename(tmp_path / "old.zarr")
        (tmp_path / "d.zarr").rename(path)
        after = json.loads(ask(f"{url}/info.json")[2])
        assert after["version"] != before["version"] and after["parts"][0]["years"][-1] == 2006
        assert ask(f"{url}/tiles/2006/0/0/0.png")[0] == 200
        (path / "zarr.json").write_text("{")
        assert json.loads(ask(f"{url}/info.json")[2]) == after


def test_parts_are_named_in_the_query(tmp_path):
    maps = {"ssp126": some_codes(seed=1), "ssp585": some_codes(seed=2)}
    for name, codes in maps.items():
        write_maps(tmp_path / "c.zarr", codes=codes, group=name)
    with running(make_app(str(tmp_path / "c.zarr"))) as (url, _):
        assert [p["name"] for p in json.loads(ask(f"{url}/info.json")[2])["parts"]] == list(maps)
        tiles = {name: ask(f"{url}/tiles/2000/0/0/0.png?part={name}")[2] for name in maps}
        assert tiles["ssp126"] != tiles["ssp585"]
        assert ask(f"{url}/tiles/2000/0/0/0.png")[0] == 404
        assert ask(f"{url}/cube/ssp126/land_cover/zarr.json")[0] == 200


def test_a_damaged_shard_is_an_error_of_its_tile_alone(tmp_path):
    path = write_maps(tmp_path / "c.zarr", codes=some_codes())
    (path / "land_cover/c/0/0/0").write_bytes(b"nonsense" * 40)
    with running(make_app(str(path))) as (url, _):
        assert ask(f"{url}/tiles/2000/0/0/0.png")[0] == 503
        assert ask(f"{url}/tiles/2001/0/0/0.png")[0] == 200


# -- a cube that lies elsewhere -----------------------------------------------------------------------------------------


def test_a_remote_cube_gives_tiles_and_points_and_sends_readers_there(served):
    url, _, folder = served
    with running(make_app(f"{url}/cube.zarr")) as (far, _):
        assert ask(f"{far}/tiles/2001/2/1/1.png")[2] == ask(f"{url}/tiles/2001/2/1/1.png")[2]
        assert ask(f"{far}/point.json?lon=10&lat=50&year=2001")[2] == ask(f"{url}/point.json?lon=10&lat=50&year=2001")[2]
        assert raw(far, "/cube/land_cover/zarr.json").split(b"\r\n")[0].split()[1] == b"307"
        assert ask(f"{far}/cube/land_cover/zarr.json")[2] == (folder / "cube.zarr/land_cover/zarr.json").read_bytes()
        assert raw(far, "/cube/../secret.txt").split()[1] == b"404"
        assert json.loads(ask(f"{far}/info.json")[2])["cube"] == f"{url}/cube.zarr"


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_cube_is_served_from_any_kind_of_place(tmp_path, kind):
    there = (tmp_path / "a b" / "c.zarr").as_uri() if kind == "file" else f"memory://{tmp_path.name}/c.zarr"
    write_maps(tmp_path / "a b" / "c.zarr" if kind == "file" else there, codes=some_codes())
    here = write_maps(tmp_path / "here.zarr", codes=some_codes())
    (part,) = open_atlas(str(here)).parts.values()
    with running(make_app(there)) as (url, _):
        assert ask(f"{url}/tiles/2001/2/1/1.png")[2] == tile(part, year=2001, z=2, x=1, y=1)
        assert json.loads(ask(f"{url}/info.json")[2])["cube"] == ("cube" if kind == "file" else there)
        assert ask(f"{url}/cube/zarr.json")[0] == (200 if kind == "file" else 404)  # the memory of this process is no address


def test_an_address_with_a_secret_is_not_passed_on(served):
    url, _, _ = served
    hidden = url.replace("http://", "http://user:pass@") + "/cube.zarr"
    with running(make_app(hidden)) as (far, _):
        answer = raw(far, "/cube/zarr.json") + raw(far, "/info.json")
        assert answer.split()[1] == b"404" and b"pass" not in answer and ask(f"{far}/tiles/2000/0/0/0.png")[0] == 200


def test_a_remote_address_without_a_cube_is_refused(url):
    with pytest.raises(DataError, match=f"no cube at {url}/none"):
        make_app(f"{url}/none")


def test_a_cube_in_a_bucket_is_shown_and_not_passed_on(folder, monkeypatch):
    server_of = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    from obstore.store import S3Store

    bucket = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    bucket.start()
    try:
        _, port = bucket.get_host_and_port()
        endpoint = f"http://127.0.0.1:{port}"
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "hidden",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        assert ask(f"{endpoint}/maps", "PUT")[0] == 200
        store = S3Store("maps", client_options={"allow_http": True}, virtual_hosted_style_request=False)
        cube = folder / "cube.zarr"
        for file in (f for part in ("", "land_cover", "overviews", *_SMALL) for f in (cube / part).glob("**/*" if part else "*")):
            if file.is_file() and not file.is_symlink():
                store.put(f"cubes/{file.relative_to(cube)}", file.read_bytes())
        with running(make_app("s3://maps/cubes")) as (url, _):
            part = open_atlas(str(cube)).parts[""]
            assert ask(f"{url}/tiles/2001/1/0/1.png")[2] == tile(part, year=2001, z=1, x=0, y=1)
            assert ask(f"{url}/cube/zarr.json")[0] == 404
            assert json.loads(ask(f"{url}/info.json")[2])["cube"] == "s3://maps/cubes"
    finally:
        bucket.stop()


_SMALL = ("latitude", "longitude", "time", "year", "spatial_ref", "confidence")
