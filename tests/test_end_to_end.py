from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
import rasterio
from affine import Affine

from ai4land import cli
from ai4land.cube import cube, ledger
from ai4land.cube.claim import claim
from ai4land.cube.verify import strike, verify
from ai4land.errors import MismatchError
from ai4land.model.checkpoint import load_card, load_model, save_model
from ai4land.model.forward import precision_of
from ai4land.reconstruct.blocks import run_blocks
from ai4land.reconstruct.plan import plan_blocks
from ai4land.run import evaluate as results
from ai4land.run import reconstruct as stages
from ai4land.run import train as training
from ai4land.run.align import align
from ai4land.run.file import load_run
from ai4land.store.read import open_store
from ai4land.train.splits import load_split
from tests import ROOT
from tests.runs import CHECKPOINT, STEPS, ai4land, another_process, command, contents, write_run

TEST_YEARS = (2005, 2006, 2007)
NAMES = {
    "overall_accuracy",
    "macro_f1",
    "mean_iou",
    "figure_of_merit",
    "change_f1",
    "quantity_disagreement",
    "allocation_disagreement",
    "coarse_error",
}


def cube_bytes(run: Path) -> dict[str, bytes]:
    return {f"{name}/{k}": v for name in ("cube.zarr", "validation.zarr") for k, v in contents(run / name, "*/c/**/*").items()}


@pytest.fixture(scope="session")
def finished(planet: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    file = write_run(tmp_path_factory.mktemp("finished"), planet)
    done = ai4land("run", file)
    return file, done


@pytest.fixture
def copied(finished, tmp_path: Path) -> Path:
    """The run file of a finished run that a test may spoil."""
    shutil.copytree(finished[0].parent / "runs", tmp_path / "runs")
    return write_run(tmp_path, Path(load_run(finished[0]).data))


# -- what a run leaves behind -------------------------------------------------------------------------------------------


def test_run_leaves_everything_behind(finished):
    file, done = finished
    run = load_run(file)
    folder = run.folder
    assert "Results are in" in done.stdout and "Traceback" not in done.stderr and "distributed.scheduler" not in done.stderr
    assert load_run(folder / "config.yaml") == run
    split = load_split(folder / "splits.json")
    assert split.training_years == [2000, 2001, 2002, 2003] and split.test is not None and split.test.years == TEST_YEARS
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(STEPS + 1))
    other = [json.loads(line) for line in (folder / "member_2" / "metrics.jsonl").read_text().splitlines()]
    assert len(other) == len(rows) and other[-1]["loss"] != rows[-1]["loss"]
    _model, card = load_model(folder)
    assert card.members == 2 and card.sharpness != 1
    assert card.training["years"] == [2000, 2001, 2002, 2003] and card.split == split.hash
    assert {"map.png", "change.png", "curves.png", "curves_member_2.png", "test_by_year.png"} <= {
        p.name for p in (folder / "figures").iterdir()
    }
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (folder / "figures").iterdir())
    assert not list(folder.glob("**/*.part*"))


def test_results_of_other_inputs_are_not_gone_on_with(copied, planet, tmp_path):
    run = load_run(copied)
    shutil.copytree(planet, tmp_path / "planet")
    raster("static/soil_depth.tif", lambda values, _: values + 1)(tmp_path / "planet")
    other = write_run(tmp_path, tmp_path / "planet")
    shutil.rmtree(run.folder / "store.zarr")
    weights = (run.folder / "model.safetensors").read_bytes()
    with pytest.raises(MismatchError, match="the settings are the same; the package, the split or what the inputs hold is not"):
        training.train(load_run(other))
    with pytest.raises(MismatchError, match=r"begun with another configuration \(it differs in contents\)"):
        stages.reconstruct(load_run(other))
    with pytest.raises(MismatchError, match=r"validation\.zarr was made from other inputs than store"):
        results.evaluate(load_run(other))
    lines: list[str] = []
    for name in ("cube", "validation"):
        shutil.rmtree(run.folder / f"{name}.zarr")
        shutil.rmtree(run.folder / f"{name}.ledger")
    stages.reconstruct(load_run(other), tell=lines.append)
    assert any("was trained with other settings or inputs" in line for line in lines)
    assert (run.folder / "model.safetensors").read_bytes() == weights


def test_tables_of_the_documentation_are_printed_from_runs(finished):
    folder = load_run(finished[0]).folder
    script = ROOT / "benchmarks" / "tables.py"
    made = subprocess.run([sys.executable, script, folder, folder], capture_output=True, text=True, check=True, timeout=60).stdout
    scores = json.loads((folder / "evaluation.json").read_text())["test"]
    assert f"| overall accuracy | {scores['model']['overall_accuracy']:.4f} |" in made
    for year in TEST_YEARS:
        assert f"| {year} | {year - 2004} | {scores['model']['per_year'][str(year)]['overall_accuracy']:.4f} |" in made
    assert "test, 2 run(s)" in made and "±" not in made


def test_cube_has_the_promised_form(finished):
    run = load_run(finished[0])
    ds = cube.open_cube(run.folder / "cube.zarr")
    assert ds["land_cover"].dims == ("time", "latitude", "longitude")
    assert ds["fraction"].dims == ("time", "class", "latitude", "longitude")
    assert ds["confidence"].dims == ds["land_cover"].dims
    assert ds["year"].dims == ("time",) and ds["year"].dtype.kind == "i" and ds["year"].values.tolist() == list(range(2003, 2008))
    assert ds["land_cover"].shape == (5, 96, 192) and ds.sizes["class"] == 7
    mapped = ds["land_cover"].values != 0
    assert np.allclose(ds["fraction"].sum("class", skipna=False).values[mapped], 1)
    changed = ds["land_cover"].values[-1] != ds["land_cover"].values[1]
    assert 0 < changed.mean() < 0.2


def read_map(planet: Path, year: int) -> np.ndarray:
    with rasterio.open(planet / "landcover" / f"HILDAplus_{year}.tif") as file:
        return file.read(1)


def row_areas() -> np.ndarray:
    """Area of a cell of each row by quadrature of the surface element of WGS 84."""
    a, e2 = 6378137.0, 6.69437999014e-3
    edges = np.deg2rad(np.linspace(90, -90, 97))
    x, w = np.polynomial.legendre.leggauss(12)
    half = (edges[:-1] - edges[1:]) / 2
    phi = (edges[:-1] + edges[1:])[:, None] / 2 + half[:, None] * x
    return half * (a**2 * (1 - e2) * np.cos(phi) / (1 - e2 * np.sin(phi) ** 2) ** 2 @ w) * np.deg2rad(360 / 192)


def recomputed(reference: np.ndarray, truth: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    """Scores of stacks of maps ``(year, row, column)`` in plain numpy."""
    area = np.broadcast_to(row_areas()[:, None], truth.shape)
    area = np.where((reference != 0) & (truth != 0), area, 0.0)
    assert (guess[area > 0] != 0).all()
    total = area.sum()
    right, true_change, guessed_change = truth == guess, truth != reference, guess != reference
    either = area[true_change | guessed_change].sum()
    both = area[true_change & guessed_change].sum()
    classes = np.unique(truth[area > 0])
    per = [[area[(truth == k) & right].sum(), area[truth == k].sum(), area[guess == k].sum()] for k in classes]
    hit, true, guessed = np.array(per).T
    return {
        "overall_accuracy": area[right].sum() / total,
        "figure_of_merit": area[right & true_change & guessed_change].sum() / either,
        "change_f1": 2 * both / (both + either),
        "macro_f1": (2 * hit / (true + guessed)).mean(),
        "mean_iou": (hit / (true + guessed - hit)).mean(),
        "quantity_disagreement": np.abs(true - guessed).sum() / 2 / total,
        "allocation_disagreement": (np.minimum(true, guessed) - hit).sum() / total,
    }


@pytest.mark.parametrize(("split", "store"), [("test", "cube.zarr"), ("validation", "validation.zarr")])
def test_scores_agree_with_plain_numpy(finished, planet, split, store):
    run = load_run(finished[0])
    part = json.loads((run.folder / "evaluation.json").read_text())[split]
    experiment = getattr(run.split, split)
    assert part["years"] == experiment.years
    assert all(part[method].keys() >= NAMES for method in ("model", "persistence", "proportional"))
    ds = cube.open_cube(run.folder / store).swap_dims(time="year")
    truth = np.stack([read_map(planet, year) for year in experiment.years])
    start = np.broadcast_to(read_map(planet, experiment.reference), truth.shape)
    mask = read_map(planet, run.reconstruct.reference) != 0
    guess = ds["land_cover"].sel(year=experiment.years).values
    for method, maps in (("model", guess), ("persistence", start)):
        for name, value in recomputed(np.where(mask, start, 0), truth, maps).items():
            assert part[method][name] == pytest.approx(value, abs=1e-9), (method, name)
    assert part["persistence"]["figure_of_merit"] == 0 < part["model"]["figure_of_merit"] < 1
    assert part["proportional"]["coarse_error"] < part["persistence"]["coarse_error"] < 1
    assert part["totals"]["cells_off"] < 1 and part["totals"]["fraction_error"] < 5e-6
    low, high = part["model"]["interval"]["overall_accuracy"]
    assert low <= part["model"]["overall_accuracy"] <= high
    assert set(part["differences"]) >= {"model - persistence", "most_likely - persistence"}
    likely = ds["most_likely"].sel(year=experiment.years).values
    assert part["most_likely"]["overall_accuracy"] == pytest.approx(
        recomputed(np.where(mask, start, 0), truth, likely)["overall_accuracy"], abs=1e-9
    )


def test_second_run_does_nothing_again(finished, monkeypatch, capsys):
    run = load_run(finished[0])
    watched = [p for p in run.folder.rglob("*") if p.is_file() and "figures" not in p.parts and p.name != "zarr.json"]
    watched = [p for p in watched if p.name != "evaluation.json" and p.suffix != ".nc" and p.name != "claim"]
    scores = (run.folder / "evaluation.json").read_bytes()
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in watched}
    code, _out, err = main(monkeypatch, capsys, "run", finished[0])
    assert code == 0 and "cube: 0 blocks to do" in err and "training" not in err and "Dask" not in err
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in watched} == before
    assert (run.folder / "evaluation.json").read_bytes() == scores


# -- kill -9 ------------------------------------------------------------------------------------------------------------


def lines(folder: Path, pattern: str) -> int:
    return sum(p.read_bytes().count(b"\n") for p in folder.glob(pattern))


def run_and_kill(file: Path, when: Callable[[], bool]) -> None:
    """Start a run and end its whole process group with SIGKILL as soon as ``when`` holds."""
    process = subprocess.Popen(
        **command("run", file), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not when():
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_killed_run_ends_with_the_same_bytes(finished, planet, tmp_path):
    whole = load_run(finished[0]).folder
    file = write_run(tmp_path, planet)
    folder = load_run(file).folder

    run_and_kill(file, lambda: lines(folder, "metrics.jsonl") >= CHECKPOINT + 6)
    steps = lines(folder, "metrics.jsonl") - 1
    assert CHECKPOINT < steps < 2 * CHECKPOINT and (folder / "resume.pt").is_file() and not (folder / "model.json").exists()

    run_and_kill(file, lambda: lines(folder, "member_2/metrics.jsonl") >= CHECKPOINT + 6)
    assert (folder / "member_2" / "resume.pt").is_file() and not (folder / "model.json").exists()

    run_and_kill(file, lambda: lines(folder, "cube.ledger/*.jsonl") >= 5)
    blocks = lines(whole, "cube.ledger/*.jsonl")
    done = lines(folder, "cube.ledger/*.jsonl")
    assert 5 <= done < blocks - 5 and not (folder / "evaluation.json").exists()
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    again = ai4land("run", file)
    left = int(re.search(r"cube: (\d+) blocks to do", again.stderr)[1])
    every = plan_blocks(whole / "store.zarr", years=[2003, 2004, 2005, 2006, 2007], reference=2004, years_a_shard=2)
    assert "training" not in again.stderr and 0 < left < len(every)
    assert lines(folder, "cube.ledger/*.jsonl") == blocks
    assert cube_bytes(folder) == cube_bytes(whole) and len(cube_bytes(whole)) > 3 * 5
    assert ledger.recorded(folder / "cube.zarr") == ledger.recorded(whole / "cube.zarr")
    assert (folder / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


def test_no_test_year_reaches_training(finished, planet, tmp_path):
    spoiled = tmp_path / "planet"
    shutil.copytree(planet, spoiled)
    rng = np.random.default_rng(0)
    for year in TEST_YEARS:
        with rasterio.open(spoiled / "landcover" / f"HILDAplus_{year}.tif", "r+") as raster:
            raster.write(rng.choice(np.array([11, 22, 33, 44, 55, 66, 77], np.uint8), raster.shape), 1)
    with netCDF4.Dataset(spoiled / "luh2" / "states.nc", "r+") as states:
        names = [n for n in states.variables if n not in ("time", "lat", "lon", "secma", "secmb")]
        late = [states[n][5:] for n in names]
        for name, values in zip(names, reversed(late), strict=True):
            states[name][5:] = values
    file = write_run(tmp_path, spoiled)
    ai4land("train", file)
    run, whole = load_run(file), load_run(finished[0]).folder
    stores = [open_store(f / "store.zarr") for f in (run.folder, whole)]
    maps, shares = ([s[name].values for s in stores] for name in ("land_cover", "coarse"))
    assert np.array_equal(maps[0][:5], maps[1][:5]) and (maps[0][5:] != maps[1][5:]).mean() > 0.5
    assert np.array_equal(shares[0][:5], shares[1][:5], equal_nan=True)
    assert (np.abs(shares[0][5:] - shares[1][5:]) > 0.01).mean() > 0.1
    assert (run.folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert load_model(run.folder)[1] == load_model(whole)[1]


# -- bad input ----------------------------------------------------------------------------------------------------------


def main(monkeypatch, capsys, *args: str | Path) -> tuple[int, str, str]:
    """The command line in this process: exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["ai4land", *map(str, args)])
    capsys.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def refused(monkeypatch, capsys, text: str, *args: str | Path) -> str:
    """The one clear error of a command that is refused."""
    code, out, err = main(monkeypatch, capsys, *args)
    assert code == 1, err
    first = [n for n, line in enumerate(err.splitlines()) if line.startswith("error: ")]
    assert len(first) == 1 and "Traceback" not in err and not out
    message = " ".join(" ".join(err.splitlines()[first[0] :]).split())
    assert text in message
    return message


Change = Callable[[Path], list[str] | None]


def states_file(edit: Callable[[Any], None]) -> Change:
    def change(planet: Path) -> None:
        with netCDF4.Dataset(planet / "luh2" / "states.nc", "r+") as file:
            edit(file)

    return change


def raster(name: str, edit: Callable[[np.ndarray, dict[str, Any]], np.ndarray], *overrides: str) -> Change:
    """Write a GeoTIFF of the planet anew."""

    def change(planet: Path) -> list[str]:
        path = planet / name
        with rasterio.open(path) as file:
            values, profile = file.read(1), dict(file.profile)
        profile.update(driver="GTiff", tiled=False)
        for key in ("blockxsize", "blockysize"):
            profile.pop(key, None)
        values = edit(values, profile)
        profile.update(height=values.shape[0], width=values.shape[1])
        path.unlink()
        with rasterio.open(path, "w", **profile) as file:
            file.write(values, 1)
        return list(overrides)

    return change


def moved(cells: float, *, origin: float | None = None) -> Callable[[np.ndarray, dict[str, Any]], np.ndarray]:
    def edit(values: np.ndarray, profile: dict[str, Any]) -> np.ndarray:
        t = profile["transform"]
        profile["transform"] = Affine(t.a, 0, (t.c if origin is None else origin) + cells * t.a, 0, t.e, t.f)
        return values

    return edit


def west(values: np.ndarray, profile: dict[str, Any]) -> np.ndarray:
    return values[:, : values.shape[1] // 2]


def coded(code: int) -> Callable[[np.ndarray, dict[str, Any]], np.ndarray]:
    def edit(values: np.ndarray, profile: dict[str, Any]) -> np.ndarray:
        values[40:43, 7] = code
        return values

    return edit


def filled(value: float) -> Callable[[np.ndarray, dict[str, Any]], np.ndarray]:
    return lambda values, profile: np.full_like(values, value)


def cut(name: str, part: float) -> Change:
    def change(planet: Path) -> None:
        path = planet / name
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])

    return change


def without(name: str) -> Change:
    return lambda planet: (planet / name).unlink()


def settings(*overrides: str) -> Change:
    return lambda planet: list(overrides)


def lessened(file: Any) -> None:
    values = file["range"][3]
    values[values < 2] *= 0.5
    file["range"][3] = values


def unmeasured(file: Any) -> None:
    for variable in file.variables.values():
        if variable.dimensions == ("time", "lat", "lon"):
            variable.units = "hectares"


MAP = "landcover/HILDAplus_{}.tif"
BAD: dict[str, tuple[Change, str]] = {
    "a state is missing": (
        states_file(lambda f: f.renameVariable("c3nfx", "beans")),
        "states.nc lacks the states ['c3nfx']",
    ),
    "wrong units": (states_file(unmeasured), "are 'hectares', expected 1, percent or km2: wrong units"),
    "km2 without the side of a cell": (settings("scenario.units=km2"), "wrong units; if the values are km2"),
    "shares do not sum": (states_file(lessened), "expected 1 - icwtr ="),
    "scenario is cut off": (cut("luh2/states.nc", 0.6), "states.nc is truncated or not NetCDF"),
    "scenario lacks years": (settings("reconstruct.years=2003-2009"), "years are [2008, 2009], expected years of"),
    "scenario is not there": (settings("scenario.paths=[luh2/none.nc]"), "luh2/none.nc does not exist"),
    "crosswalk is unknown": (settings("scenario.crosswalk=mine"), "crosswalk is 'mine', expected one of"),
    "maps lack a year": (without(MAP.format(2006)), "land-cover maps of [2006] are needed"),
    "unknown code in the reference map": (raster(MAP.format(2004), coded(9)), "holds class codes 9 (3 cells)"),
    "unknown code in a later map": (raster(MAP.format(2007), coded(9)), "holds class codes 9 (3 cells)"),
    "map half a cell off": (raster(MAP.format(2004), moved(0.5)), "half-pixel shift"),
    "map in 0..360": (raster(MAP.format(2002), moved(0, origin=0.0)), "longitudes run 0..360"),
    "map elsewhere": (raster(MAP.format(2004), west, "grid.bbox=[0, 0, 90, 90]"), "does not meet the grid"),
    "map is cut off": (cut(MAP.format(2004), 0.7), "HILDAplus_2004.tif is truncated"),
    "map without land": (raster(MAP.format(2004), filled(0)), "no cell is mapped in (-180"),
    "later map without land": (raster(MAP.format(2007), filled(0)), "map of 2007 has no class on any mapped cell"),
    "static layer is empty": (raster("static/soil_depth.tif", filled(np.nan)), "static layer soil_depth is all nodata"),
    "static layer of a catalogue is empty": (
        raster("static/temperature.tif", filled(np.nan)),
        "static layer temperature is all nodata on the mapped cells",
    ),
    "static layer is infinite": (raster("static/soil_depth.tif", filled(np.inf)), "static layer soil_depth is all nodata"),
    "static layer is cut off": (cut("static/soil_depth.tif", 0.7), "soil_depth.tif is truncated"),
    "static layer half a cell off": (
        raster("static/soil_depth.tif", moved(0.5), "static=[{name: soil, path: static/soil_depth.tif, resampling: exact}]"),
        "soil_depth.tif lies 0.50 x 0.00 cells off the lattice of the grid, expected 0: half-pixel shift",
    ),
    "collection is unknown": (
        settings("static=[{name: x, catalog: catalog/catalog.json, collection: ice, asset: x}]"),
        "collection is 'ice', expected one of",
    ),
    "nothing to stop training by": (settings("split.validation=null"), "neither validation years nor validation cells"),
    "years that training has seen": (settings("split.test={reference: 2002, years: 2003-2005}"), "test scores years [2003]"),
    "override of an unknown key": (settings("train.stepz=5"), "train.stepz: Extra inputs are not permitted"),
    "override without a value": (settings("train.steps"), "override is 'train.steps', expected key=value"),
    "value of another kind": (settings("train.steps=many"), "train.steps: Input should be a valid integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(planet, tmp_path, monkeypatch, capsys, case):
    change, text = BAD[case]
    shutil.copytree(planet, tmp_path / "planet")
    overrides = change(tmp_path / "planet") or []
    file = write_run(tmp_path, tmp_path / "planet")
    before = contents(tmp_path / "planet")
    refused(monkeypatch, capsys, text, "run", file, *overrides)
    assert not [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert contents(tmp_path / "planet") == before


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("name: [tiny", "run.yaml is not YAML"),
        ("- tiny", "run.yaml holds list, expected keys such as name, grid and train"),
        ("name: tiny\ntrian: {}", "trian: Extra inputs are not permitted"),
        ("name: tiny", "grid: Field required"),
        (None, "run.yaml does not exist; give a YAML file"),
    ],
)
def test_broken_run_file_is_refused(tmp_path, monkeypatch, capsys, text, wanted):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    refused(monkeypatch, capsys, wanted, "plan", tmp_path / "run.yaml")


@pytest.mark.parametrize(("verb", "wanted"), [("reconstruct", "no model in"), ("evaluate", "no cube at")])
def test_stage_without_the_one_before_is_refused(planet, tmp_path, monkeypatch, capsys, verb, wanted):
    refused(monkeypatch, capsys, wanted, verb, write_run(tmp_path, planet))
    assert not (tmp_path / "runs").exists()


def retrained(folder: Path) -> None:
    """Put another model of the same form in place of the one of a run."""
    model, card = load_model(folder)
    nudged = [{k: v + 0.01 if v.is_floating_point() else v for k, v in m.state_dict().items()} for m in model.members]
    save_model(folder, nudged, card)


def no_first_member(folder: Path) -> None:
    """Delete what the message names, but the states of further members."""
    for name in ("model.json", "resume.pt"):
        (folder / name).unlink()


def half_written(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unfinished(folder: Path) -> None:
    (folder / "model.json").unlink()


def lost(folder: Path) -> None:
    shutil.rmtree(folder / "cube.ledger")


MINE: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "another static layer": (
        lambda _: None,
        ["run", "static=[{name: soil_depth, path: static/soil_depth.tif}]"],
        "store.zarr was made with another configuration (it differs in static)",
    ),
    "another reference map": (lambda _: None, ["run", "reconstruct.reference=2003"], "(it differs in reference)"),
    "years that the store lacks": (
        lambda _: None,
        ["run", "reconstruct.years=2000-2007", "split.train=2001-2003", "split.test.years=2005-2008"],
        "store.zarr was made for other years and lacks the land-cover maps [2008]",
    ),
    "another training of a finished run": (
        lambda _: None,
        ["run", "train.learning_rate=0.1", "split.max_lead=2"],
        "was begun with another configuration (split.max_lead is 2, was 3; train.learning_rate is 0.1, was 0.02)",
    ),
    "another training of an unfinished run": (unfinished, ["train", "train.seed=5"], "(train.seed is 5, was 2)"),
    "another training of a further member": (no_first_member, ["train", "train.seed=5"], "(train.seed is 5, was 2)"),
    "another model than the cube's": (
        retrained,
        ["reconstruct"],
        "cube.zarr was begun with another configuration (it differs in model)",
    ),
    "more years than the cube has": (lambda _: None, ["run", "reconstruct.years=2002-2007"], "(it differs in years)"),
    "weights that are cut off": (half_written, ["reconstruct"], "do not have the checksum of model.json"),
    "evaluation of an unfinished cube": (lost, ["evaluate"], "finish it with: ai4land reconstruct"),
    "evaluation of other years": (lambda _: None, ["evaluate", "split.test.years=2005-2006"], "was trained with split"),
    "evaluation with another store": (lambda _: None, ["evaluate", "grid.shard=96"], "(it differs in grid)"),
}


@pytest.mark.parametrize("case", MINE)
def test_finished_run_is_not_touched_by_another_configuration(copied, monkeypatch, capsys, case):
    spoil, (verb, *overrides), text = MINE[case]
    folder = load_run(copied).folder
    spoil(folder)
    before = contents(folder)
    refused(monkeypatch, capsys, text, verb, copied, *overrides)
    assert contents(folder) == before


def test_cube_is_not_gone_on_with_in_another_precision(copied, monkeypatch, capsys):
    folder = load_run(copied).folder
    other = "float32" if precision_of(load_card(folder)) == "bfloat16" else "bfloat16"
    before = contents(folder)
    refused(monkeypatch, capsys, "(it differs in precision)", "run", copied, f"reconstruct.precision={other}")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("static=[{name: soil_depth, path: static/soil_depth.tif}]", "checkpoint has static maps ['elevation', 'temperature'"),
        ("landcover.legend=mine.yaml", "checkpoint has legend ('hildaplus', [11,"),
        ("grid.factor=16", "checkpoint has fine cells in a coarse cell 8, expected 16"),
    ],
)
def test_checkpoint_of_another_kind_is_refused_before_the_store_is_made(copied, planet, monkeypatch, capsys, override, text):
    folder = load_run(copied).folder
    other = folder.with_name("other")
    other.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(folder / name, other)
    data = folder.with_name("data")
    shutil.copytree(planet, data)
    legend = Path(str(files("ai4land"))) / "data" / "legends" / "hildaplus.yaml"
    shutil.copy(legend, data / "mine.yaml")
    refused(monkeypatch, capsys, text, "reconstruct", copied, "name=other", f"data={data}", override)
    assert sorted(p.name for p in other.iterdir()) == ["model.json", "model.safetensors"]


def test_a_foreign_model_is_not_trained_over(copied, monkeypatch, capsys):
    folder = load_run(copied).folder
    shutil.copytree(folder, folder.with_name("other"))
    for name in ("config.yaml", "resume.pt"):
        (folder.with_name("other") / name).unlink()
    before = contents(folder.with_name("other"))
    refused(monkeypatch, capsys, "no config.yaml that tells which", "train", copied, "name=other", "train.steps=7")
    assert contents(folder.with_name("other")) == before


def test_damaged_cube_is_told_and_mended(copied, monkeypatch, capsys):
    """A flipped byte, a lost shard, lost metadata and a torn ledger at once; the bytes are those of before."""
    folder = load_run(copied).folder
    path = folder / "cube.zarr"
    before = contents(path, "**/*")
    shards = sorted(p for p in path.glob("*/c/**/*") if p.is_file() and p.stat().st_size > 500)
    flipped, lost = shards[3], shards[-2]
    data = bytearray(flipped.read_bytes())
    data[100] ^= 4
    flipped.write_bytes(data)
    lost.unlink()
    (path / "confidence" / "zarr.json").unlink()
    torn = max((folder / "cube.ledger").glob("*.jsonl"))
    torn.write_text(torn.read_text()[:-40])
    code, _, err = main(monkeypatch, capsys, "verify", path, "--check")
    assert code == 1 and all(p.relative_to(path).as_posix() in err for p in (flipped, lost, path / "confidence" / "zarr.json"))
    assert "the ledger lacks" in err and "mend them with: ai4land verify" in err
    code, out, err = main(monkeypatch, capsys, "verify", path)
    assert code == 0 and "is mended" in out, err
    assert contents(path, "**/*") == before
    code, out, err = main(monkeypatch, capsys, "verify", path)
    assert code == 0 and "is as its ledger says" in out and not err.replace("verify", "").strip(": \n").startswith("error")


def test_second_run_of_a_folder_is_refused_while_the_first_is_at_it(copied, monkeypatch, capsys):
    folder = load_run(copied).folder
    before = contents(folder)
    with another_process(folder) as first:
        for verb in ("run", "reconstruct", "evaluate", "train", "align"):
            code, _, err = main(monkeypatch, capsys, verb, copied)
            assert code == 1 and f"is in use by process {first.pid} on" in err
    (folder / "claim").unlink()
    assert contents(folder) == before


def test_mending_holds_the_cube_from_the_first_to_the_last_change(copied, monkeypatch):
    """No other run may take the cube between striking its damaged shards and making them anew."""
    run = load_run(copied)
    place = run.folder / "cube.zarr"
    next(p for p in sorted(place.glob("land_cover/c/**/*")) if p.is_file()).unlink()
    refusals = []

    def refused_then(verb):
        def then(*given, **options):
            with pytest.raises(MismatchError, match="being made by another run") as refusal, claim(place):
                pass
            refusals.append(refusal)
            return verb(*given, **options)

        return then

    for name, verb in (("strike", strike), ("align", align), ("run_blocks", run_blocks)):
        monkeypatch.setattr(stages, name, refused_then(verb))
    stages.mend(run, place, verify(place))
    assert len(refusals) >= 3 and not verify(place)


def test_partial_files_may_vanish_while_they_are_removed(tmp_path, monkeypatch):
    (tmp_path / "a.partial").touch()
    monkeypatch.setattr(Path, "rglob", lambda folder, _: iter([folder / "a.partial", folder / "vanished.partial"]))
    stages._remove_partial(tmp_path)
    assert not (tmp_path / "a.partial").exists()


def test_second_run_on_a_cube_is_refused_while_the_first_is_at_it(copied, monkeypatch, capsys):
    with claim(load_run(copied).folder / "cube.zarr"):
        code, _, err = main(monkeypatch, capsys, "reconstruct", copied)
    assert code == 1 and f"being made by another run (process {os.getpid()} on" in err
    assert main(monkeypatch, capsys, "reconstruct", copied)[0] == 0
