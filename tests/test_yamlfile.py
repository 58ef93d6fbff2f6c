from __future__ import annotations

import pytest

from ai4land.errors import ConfigError
from ai4land.legend import load_legend
from ai4land.run.file import load_run
from ai4land.yamlfile import LARGEST, parse_yaml, read_yaml


def test_plain_values_and_aliases_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("years: &y [1992, 1999]\ntest: *y\nname: Köln\nnone:\n", encoding="utf-8")
    assert read_yaml(path, what="run file") == {"years": [1992, 1999], "test": [1992, 1999], "name": "Köln", "none": None}
    assert parse_yaml("", what="override") is None


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch PWNED']", "!!python/name:os.system", "!!python/object:x.Y {}", "!mine 3"]
)
def test_tags_construct_nothing(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.yaml"
    path.write_text(f"name: {tag}\n")
    with pytest.raises(
        ConfigError, match=r"(?s)run file .*a\.yaml is not plain YAML: could not determine a constructor .*remove its tags"
    ):
        load_run(path)
    with pytest.raises(ConfigError, match=r"legend file .*a\.yaml is not plain YAML"):
        load_legend(path)
    with pytest.raises(ConfigError, match=r"(?s)override .name=!.* is not plain YAML"):
        load_run("demo.yaml", [f"name={tag}"])
    assert not (tmp_path / "PWNED").exists()


def test_endless_levels_are_refused():
    with pytest.raises(ConfigError, match="override has too many levels, expected a flat file"):
        parse_yaml("[" * 50_000, what="override")


def test_large_files_are_refused_unread(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("#" * LARGEST + "\nname: a\n")
    with pytest.raises(ConfigError, match=rf"run file .*a\.yaml has {LARGEST + 9} bytes, expected at most {LARGEST}"):
        load_run(path)


def test_what_is_no_yaml_is_told(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not YAML: 'utf-8' codec"):
        read_yaml(path, what="run file")
    for text in ("a: [", "a: 2001-99-99", "a: *b"):
        with pytest.raises(ConfigError, match="override is not YAML"):
            parse_yaml(text, what="override")
