"""What a catalogue may reach, tried with files and with a real server on this machine."""

from __future__ import annotations

import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from urllib3 import Retry

from ai4land.errors import DataError
from ai4land.sources import hrefs
from ai4land.sources.hrefs import CatalogIO, Reach, local_path
from ai4land.sources.search import find_collection, find_items

ITEM = {
    "type": "Feature", "stac_version": "1.1.0", "id": "a", "geometry": None, "properties": {"datetime": "2000-01-01T00:00:00Z"},
    "collection": "zones", "links": [], "assets": {"zone": {"href": "https://a.org/zone.tif"}},
}  # fmt: skip
COLLECTION = {
    "type": "Collection", "stac_version": "1.1.0", "id": "zones", "description": "d", "license": "CC0-1.0", "links": [],
    "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}},
}  # fmt: skip


def catalog_of(*links):
    return {"type": "Catalog", "stac_version": "1.1.0", "id": "c", "description": "d", "links": list(links)}


def child(href):
    return {"rel": "child", "href": href}


def with_items(*links):
    return {**COLLECTION, "links": [{"rel": "item", "href": href} for href in links]}


@contextmanager
def serving(answers):
    """A server that gives JSON, or calls what makes the answer; path to answer."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            path, body = urlparse(self.path).path, b""
            if self.command == "POST":
                body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.command, self.path, dict(self.headers), body))
            answer = answers.get(path, (404, {}, {}))
            status, headers, content = (
                answer(self) if callable(answer) else answer if isinstance(answer, tuple) else (200, {}, answer)
            )
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            try:
                self.wfile.write(data)
            except OSError:
                self.close_connection = True

        do_POST = do_GET

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", asked
    finally:
        http.shutdown()
        http.server_close()


def api_of(url, search):
    """Answers of a small STAC API."""
    links = [
        {"rel": "search", "href": f"{url}/search", "method": "POST", "type": "application/geo+json"},
        {"rel": "data", "href": f"{url}/collections"},
    ]
    links.append({"rel": "self", "href": url})
    kinds = [
        "https://api.stacspec.org/v1.0.0/core",
        "https://api.stacspec.org/v1.0.0/item-search",
        "https://api.stacspec.org/v1.0.0/collections",
    ]
    return {
        "": {**catalog_of(*links), "conformsTo": kinds},
        "/": {**catalog_of(*links), "conformsTo": kinds},
        "/collections": {"collections": [COLLECTION], "links": []},
        "/search": search,
    }


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(hrefs, "RETRIES", hrefs.RETRIES.new(backoff_factor=0.01))


# -- the rule -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("href", ["a.tif", "stac/x.json", "../stac/../a.tif"])
def test_a_local_catalogue_reaches_the_folder_above_its_own(tmp_path, href):
    reach = Reach.of(tmp_path / "planet" / "stac" / "catalog.json")
    assert reach.root == tmp_path / "planet"
    for known in (str(tmp_path / "planet" / "stac" / href), f"file://{tmp_path}/planet/{href.replace('../stac/../', '')}"):
        reach.check(known, what="link")


@pytest.mark.parametrize(
    "href", ["{0}/secret.tif", "file://{0}/secret.tif", "{0}/planet/../secret.tif", "file://{0}/planet/%2e%2e/secret.tif", "/etc/passwd", "{0}/planet/link/secret.tif"]
)  # fmt: skip
def test_a_local_catalogue_does_not_leave_it(tmp_path, href):
    (tmp_path / "planet" / "stac").mkdir(parents=True)
    (tmp_path / "planet" / "link").symlink_to(tmp_path)
    catalog = tmp_path / "planet" / "stac" / "catalog.json"
    with pytest.raises(DataError, match=r"asset a of catalogue .* is .*, expected a file below .*planet; correct the catalogue"):
        Reach.of(catalog).check(href.format(tmp_path), what="asset a")
    Reach.of(catalog, beyond="all").check(href.format(tmp_path), what="asset a")


def test_other_hosts_are_reached_if_the_user_says_so(tmp_path):
    for href in ("https://a.org/b.tif", "s3://bucket/key.tif"):
        with pytest.raises(DataError, match=r'fetch it to a mirror \(ai4land fetch\), or give beyond="hosts"'):
            Reach.of(tmp_path / "catalog.json").check(href, what="asset a")
        Reach.of(tmp_path / "catalog.json", beyond="hosts").check(href, what="asset a")
        Reach.of("https://b.org/catalog.json").check(href, what="asset a")


@pytest.mark.parametrize("href", ["file:///etc/passwd", "/etc/passwd", "etc/passwd"])
def test_a_remote_catalogue_names_no_local_file(href):
    with pytest.raises(DataError, match=r'expected a URL, since the catalogue is remote; .* beyond="all"'):
        Reach.of("https://a.org/stac", beyond="hosts").check(href, what="asset a")
    Reach.of("https://a.org/stac", beyond="all").check(href, what="asset a")


@pytest.mark.parametrize(
    "href",
    [
        "/vsicurl/https://a.org/b.tif",
        "/vsizip//etc/a.zip/b",
        "/vsimem/a",
        "zip+file:///a.zip",
        "vrt:///etc/passwd",
        "ftp://a.org/b",
    ],
)
def test_no_catalogue_names_file_systems_of_gdal(tmp_path, href):
    for catalog in (tmp_path / "catalog.json", "https://a.org/stac"):
        with pytest.raises(DataError, match="expected a URL with one of http, https, s3, gs or a file"):
            Reach.of(catalog, beyond="all").check(href, what="asset a")


def test_a_name_that_is_no_path_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a file below"):
        Reach.of(tmp_path / "a" / "catalog.json").check("a\0b", what="link")


def test_a_catalogue_at_the_root_of_a_disk_has_a_rule_too():
    assert Reach.of("/catalog.json").root == Path("/") and Reach.of("/a/collection.json").root == Path("/")


def test_paths_of_urls():
    assert (
        local_path("https://a.org/b") is None
        and str(local_path("file:///a%20b/c")) == "/a b/c"
        and str(local_path("a b")) == "a b"
    )


# -- links --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("href", ["../../out.json", "{0}/out.json", "file://{0}/out.json", "https://127.0.0.1:9/out.json"])
def test_links_of_a_local_catalogue_are_not_followed_out_of_it(tmp_path, href):
    folder = tmp_path / "planet" / "stac"
    folder.mkdir(parents=True)
    (tmp_path / "out.json").write_text(json.dumps(with_items()))
    (folder / "catalog.json").write_text(json.dumps(catalog_of(child(href.format(tmp_path)))))
    with pytest.raises(DataError, match=r"link of catalogue .*catalog.json is '.*out.json', expected a file below .*planet"):
        find_items(folder / "catalog.json", collection="zones")
    if "127" not in href:
        with pytest.raises(DataError, match="has no item"):
            find_items(folder / "catalog.json", collection="zones", beyond="all")


def test_links_of_a_remote_catalogue_are_not_followed_to_files(tmp_path):
    (tmp_path / "out.json").write_text(json.dumps(with_items()))
    for href in (f"file://{tmp_path}/out.json", f"{tmp_path}/out.json"):
        with serving({"/catalog.json": catalog_of(child(href))}) as (url, _), pytest.raises(DataError, match=r"out.json"):
            find_items(f"{url}/catalog.json", collection="zones")


def test_assets_of_an_api_are_not_local_files():
    answers = {}
    with serving(answers) as (url, _):
        for href in ("file:///etc/passwd", "/etc/passwd", "/vsicurl/http://a.org/b.tif"):
            answers |= api_of(
                url, {"type": "FeatureCollection", "features": [{**ITEM, "assets": {"zone": {"href": href}}}], "links": []}
            )
            with pytest.raises(DataError, match=rf"asset zone of item a of catalogue {url} is '{href}'"):
                find_items(url, collection="zones")
        answers |= api_of(url, {"type": "FeatureCollection", "features": [ITEM], "links": []})
        assert find_items(url, collection="zones")[0].assets["zone"].href == "https://a.org/zone.tif"


# -- limits -------------------------------------------------------------------------------------------------------------


def test_large_documents_are_refused_unparsed(tmp_path, monkeypatch):
    monkeypatch.setattr(hrefs, "LARGEST_DOCUMENT", 2**20)
    content = json.dumps({**with_items(), "description": "x" * 2**21})
    (tmp_path / "catalog.json").write_text(content)
    with pytest.raises(DataError, match=r"STAC document .*catalog.json is larger than 1 MiB"):
        find_items(tmp_path / "catalog.json", collection="zones")
    with serving({"/c.json": content.encode()}) as (url, _), pytest.raises(DataError, match=r"c.json is larger than 1 MiB"):
        find_items(f"{url}/c.json", collection="zones")


def test_a_compressed_document_is_measured_as_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(hrefs, "LARGEST_DOCUMENT", 2**20)
    packed = gzip.compress(b" " * 2**26)
    assert len(packed) < 2**17
    with (
        serving({"/c.json": (200, {"Content-Encoding": "gzip"}, packed)}) as (url, _),
        pytest.raises(DataError, match="larger than 1 MiB"),
    ):
        find_items(f"{url}/c.json", collection="zones")


def test_endless_catalogues_and_levels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hrefs, "MOST_DOCUMENTS", 20)

    def deeper(request):
        number = int(parse_qs(urlparse(request.path).query).get("n", ["0"])[0])
        return 200, {}, {**catalog_of(child(f"http://{request.headers['Host']}/c?n={number + 1}")), "id": f"c{number}"}

    with serving({"/c": deeper}) as (url, asked), pytest.raises(DataError, match="has more than 20 documents"):
        find_items(f"{url}/c", collection="zones")
    assert len(asked) <= 21
    (tmp_path / "loop.json").write_text(json.dumps(catalog_of(child("./loop.json"))))
    with pytest.raises(DataError):
        find_items(tmp_path / "loop.json", collection="zones")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="can not be read"):
        find_items(tmp_path / "deep.json", collection="zones")


@pytest.mark.parametrize(
    "text", ['{"type": "Catalog"}', '"text"', "null", "[]", '{"type": "Catalog", "links": 3}', '{"links": [3]}', "\xff", ""]
)
def test_what_is_no_catalogue_is_told(tmp_path, text):
    (tmp_path / "c.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError):
        find_items(tmp_path / "c.json", collection="zones")


@pytest.mark.parametrize(
    "fields",
    [
        {"id": 7},
        {"bbox": "everywhere", "geometry": {"type": "Point", "coordinates": [0, 0]}},
        {"assets": {"zone": {"href": 5}}},
        {"assets": {"zone": {}}},
        {"assets": [1]},
        {"properties": None},
        {"properties": {"datetime": "yesterday"}},
    ],
)
def test_items_that_make_no_sense_are_refused(tmp_path, fields):
    (tmp_path / "stac").mkdir()
    (tmp_path / "stac" / "c.json").write_text(json.dumps(with_items("./item.json", "./fine.json")))
    (tmp_path / "stac" / "item.json").write_text(json.dumps({**ITEM, **fields}))
    (tmp_path / "stac" / "fine.json").write_text(json.dumps({**ITEM, "id": "fine"}))
    with pytest.raises(DataError):
        find_items(tmp_path / "stac" / "c.json", collection="zones", bbox=(0, 0, 1, 1), years=[2000], beyond="hosts")


# -- retries and headers ------------------------------------------------------------------------------------------------


def test_a_busy_api_is_asked_again(quick):
    busy = [(429, {"Retry-After": "0"}, {}), (503, {}, {}), (502, {}, {}), (500, {}, {})]

    def search(request):
        return busy.pop() if busy else (200, {}, {"type": "FeatureCollection", "features": [ITEM], "links": []})

    answers = {}
    with serving(answers) as (url, asked):
        answers |= api_of(url, search)
        assert [i.id for i in find_items(url, collection="zones", bbox=(0, 0, 1, 1))] == ["a"]
        assert sum(path == "/search" for _, path, _, _ in asked) == 5


def test_an_api_that_stays_busy_is_given_up(quick):
    answers = {}
    with serving(answers) as (url, asked):
        answers |= api_of(url, (503, {}, {}))
        with pytest.raises(DataError, match=r"STAC catalogue .* can not be read"):
            find_items(url, collection="zones")
        assert sum(path == "/search" for _, path, _, _ in asked) == 6
        answers["/search"] = (400, {}, {"detail": "invalid bbox"})
        asked.clear()
        with pytest.raises(DataError, match="invalid bbox"):
            find_items(url, collection="zones")
        assert sum(path == "/search" for _, path, _, _ in asked) == 1


def test_waits_grow_and_are_bounded():
    retry = hrefs.RETRIES
    waits = []
    for _ in range(5):
        retry = retry.increment(method="POST", url="/search", response=None, error=None)
        waits.append(retry.get_backoff_time())
    assert waits == [0, 1, 2, 4, 8] and isinstance(retry, Retry) and retry.backoff_max == 30


def test_headers_are_for_the_host_of_the_catalogue():
    with serving({"/zones.json": with_items()}) as (other, foreign):
        with serving({"/c.json": catalog_of(child(f"{other}/zones.json"))}) as (url, own):
            about = find_collection(f"{url}/c.json", collection="zones", headers={"Authorization": "Bearer SECRET"})
        assert about["license"] == "CC0-1.0"
        assert {h.get("Authorization") for _, _, h, _ in own} == {"Bearer SECRET"}
        assert foreign and {h.get("Authorization") for _, _, h, _ in foreign} == {None}


def test_pages_of_a_search_are_followed():
    answers = {}

    def search(request):
        if request.command == "POST":
            link = {"rel": "next", "href": f"http://{request.headers['Host']}/page", "method": "GET"}
            return 200, {}, {"type": "FeatureCollection", "features": [ITEM], "links": [link]}
        return 404, {}, {}

    with serving(answers) as (url, _):
        answers |= api_of(url, search)
        answers["/page"] = {"type": "FeatureCollection", "features": [{**ITEM, "id": "b"}], "links": []}
        assert [i.id for i in find_items(url, collection="zones")] == ["a", "b"]
        io = CatalogIO(Reach.of(url), timeout=5)
        assert json.loads(io.read_text(f"{url}/page"))["features"][0]["id"] == "b"
