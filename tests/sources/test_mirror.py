from __future__ import annotations

import errno
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai4land.errors import DataError
from ai4land.sources.mirror import inside, locked, plain_href, read_manifest, safe_name, write_catalog, write_json


@given(st.text(max_size=300))
def test_names_are_safe_and_stay_where_they_are(text):
    name = safe_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,120}", name) and name not in ("collection.json", "manifest.json")


@given(st.text(max_size=40), st.text(max_size=40))
def test_other_ids_have_other_names(one, other):
    assert (safe_name(one) == safe_name(other)) == (one == other)


@pytest.mark.parametrize(
    ("href", "plain"),
    [
        ("https://a.org/b/c.tif?sv=1&sig=x#y", "https://a.org/b/c.tif"),
        ("https://user:pass@a.org:8443/c.tif", "https://a.org:8443/c.tif"),
        ("file:///a/b.tif", "file:///a/b.tif"),
    ],
)
def test_addresses_are_kept_without_secrets(href, plain):
    assert plain_href(href) == plain


def test_links_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    assert inside(tmp_path / "in", "a/b.tif") == tmp_path / "in" / "a" / "b.tif"
    for name in ("link/x", "../x", "a/../../x"):
        with pytest.raises(DataError, match="expected a place below"):
            inside(tmp_path / "in", name)


def test_a_folder_is_held_by_one(tmp_path):
    with locked(tmp_path / "a"), pytest.raises(DataError, match="another process"), locked(tmp_path / "a"):
        pass
    with locked(tmp_path / "a"):
        assert (tmp_path / "a" / ".lock").is_file()


def test_a_folder_without_locks_is_filled_with_a_warning(tmp_path, monkeypatch, caplog):
    def lockless(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", lockless)
    assert write_catalog(tmp_path / "a").is_file()
    assert "cannot be locked: its file system has no locks" in caplog.text and "one process at a time" in caplog.text


def test_a_damaged_manifest_counts_as_none(tmp_path):
    assert read_manifest(tmp_path) == {}
    write_json(tmp_path / "manifest.json", {"files": {"a": {"size": 1}}})
    assert read_manifest(tmp_path) == {"a": {"size": 1}}
    for text in ("{", "[]", '{"files": 3}', '{"files": {"a": 3}}'):
        (tmp_path / "manifest.json").write_text(text)
        assert read_manifest(tmp_path) == {}
