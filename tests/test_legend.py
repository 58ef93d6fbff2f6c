from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from ai4land.errors import ConfigError, DataError
from ai4land.legend import MISSING, LandClass, Legend, load_legend

DATA = Path(str(files("ai4land"))) / "data"
LEGENDS = sorted(p.stem for p in (DATA / "legends").glob("*.yaml"))
HILDA = load_legend("hildaplus")


def small(**changes) -> dict:
    land = [LandClass(code=1, name="a", colour="#000000"), LandClass(code=2, name="b", colour="#ffffff")]
    return {"name": "small", "title": "t", "fill": LandClass(code=0, name="none", colour="#123456"), "classes": land, **changes}


def test_built_in_legends_are_there():
    assert {"hildaplus", "hildaplus_forest", "lccs", "lccs_level1", "ipcc", "igbp"} <= set(LEGENDS)


@pytest.mark.parametrize("name", LEGENDS)
@given(data=st.data())
def test_encode_and_decode_are_inverse(name, data):
    legend = load_legend(name)
    index = data.draw(hnp.arrays(np.uint8, (5, 4), elements=st.sampled_from([*range(legend.n), MISSING])))
    codes = legend.decode(index)
    assert codes.dtype == np.uint8
    assert np.array_equal(legend.encode(codes), index)
    assert np.array_equal(legend.encode(codes.astype(np.float32)), index)
    assert np.array_equal(codes == legend.fill.code, index == MISSING)


@pytest.mark.parametrize("name", LEGENDS)
def test_aliases_and_no_data_are_read_as_their_class(name):
    legend = load_legend(name)
    assert legend.encode(legend.codes).tolist() == list(range(legend.n))
    for code, target in legend.aliases.items():
        assert legend.encode(np.array([code])) == legend.encode(np.array([target]))
    assert (legend.encode(np.array([legend.fill.code, *legend.nodata])) == MISSING).all()


@pytest.mark.parametrize("name", LEGENDS)
def test_flag_attributes_agree_with_each_other(name):
    legend = load_legend(name)
    attrs = legend.flag_attrs()
    values, meanings, colours = attrs["flag_values"], attrs["flag_meanings"].split(" "), attrs["flag_colors"].split(" ")
    assert values.dtype == np.uint8
    assert values.tolist() == [legend.fill.code, *legend.codes.tolist()]
    assert meanings == [legend.fill.name, *legend.names]
    assert len(colours) == len(values) == legend.n + 1


def test_unknown_codes_are_named_with_their_counts():
    codes = np.array([[11, 13, 13], [200, 13, 0]], dtype=np.uint8)
    with pytest.raises(
        DataError, match=r"the file holds class codes 13 \(3 cells\), 200 \(1 cells\) that legend hildaplus"
    ) as info:
        HILDA.encode(codes, source="the file")
    assert "known: [0, 11" in str(info.value)


@pytest.mark.parametrize(
    ("codes", "shown"),
    [(np.array([11, -1]), "-1"), (np.array([300, 11]), "300"), (np.array([11.0, np.nan]), "nan"), (np.array([11.5]), "11.5"),
     (np.array([-3], np.int8), "-3"), (np.array([np.inf]), "inf")],
)  # fmt: skip
def test_codes_that_are_no_whole_numbers_of_a_byte_are_refused(codes, shown):
    with pytest.raises(DataError, match=f"class code {shown}, expected whole numbers of 0..255"):
        HILDA.encode(codes)


def test_a_users_own_file_loads(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(Legend(**small(aliases={7: 2})).model_dump(mode="json", exclude={"name"})))
    legend = load_legend(tmp_path / "mine.yaml")
    assert (legend.name, legend.n, legend.encode(np.array([7, 1])).tolist()) == ("mine", 2, [1, 0])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml does not exist"):
        load_legend(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match=r"'gone', expected one of \['"):
        load_legend("gone")


def test_python_objects_in_yaml_are_refused(tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / "evil.yaml"
    path.write_text(f"title: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]\n")
    with pytest.raises(ConfigError, match="is not valid"):
        load_legend(path)
    path.write_text("title: !!python/object:ai4land.legend.LandClass {}\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_legend(path)
    assert not mark.exists()


@pytest.mark.parametrize("text", ["", "- a\n", "title: [", "title: t\nunknown: 1\n", b"\xff\xfe"])
def test_bad_legend_files_are_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid"):
        load_legend(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill": LandClass(code=2, name="x", colour="#000000")}, r"codes \[2\] twice"),
        ({"aliases": {7: 9}}, r"aliases for codes \[9\]"),
        ({"aliases": {300: 1}}, r"\[300\], expected 0..255"),
        ({"nodata": (-1,)}, r"\[-1\], expected 0..255"),
        ({"nodata": (2,)}, r"codes \[2\] two meanings"),
        ({"aliases": {1: 2}}, r"codes \[1\] two meanings"),
        ({"classes": [LandClass(code=1, name="a", colour="#000000")]}, "at least 2 items"),
    ],
)
def test_inconsistent_legends_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Legend(**small(**changes))


@pytest.mark.parametrize("changes", [{"code": 256}, {"code": -1}, {"name": "two words"}, {"colour": "red"}])
def test_bad_classes_are_refused(changes):
    with pytest.raises(ValidationError):
        LandClass(**{"code": 1, "name": "a", "colour": "#000000", **changes})
