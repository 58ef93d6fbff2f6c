from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import ai4land
from ai4land import cli
from ai4land.run.file import load_run
from tests import ROOT

VERBS = ["plan", "align", "train", "reconstruct", "evaluate", "publish", "run", "verify", "commit", "fetch", "serve", "demo"]
OF_A_RUN = [verb for verb in VERBS if verb not in ("verify", "commit", "fetch", "serve")]


def call(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(args))
    return result.exit_code, result.output


def main(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ai4land", *args])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def plain(text: str) -> str:
    """Text of a table without its lines and breaks."""
    return " ".join(text.replace("│", " ").split())


def shown(table, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_every_verb_is_listed_in_order():
    code, text = call("--help")
    assert code == 0
    assert [line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line.strip()] == VERBS


@pytest.mark.parametrize("verb", OF_A_RUN)
def test_help_of_every_verb_shows_an_example(verb):
    code, text = call(verb, "--help")
    words = " ".join(text.split())
    assert code == 0 and f"Example: ai4land {verb}" in words and "Settings to change" in words
    example = words.split("Example: ai4land ", 1)[1].split()
    if verb != "demo":
        assert (ROOT / example[1]).is_file()
    overrides = [part for part in example[1:] if re.fullmatch(r"[a-z_.]+=\S+", part)]
    assert load_run("bavaria.yaml", overrides).name


def test_version_is_that_of_the_package():
    code, text = call("--version")
    assert code == 0 and text.strip() == ai4land.__version__


def test_nothing_given_shows_the_help():
    _, text = call()
    assert "Usage" in text and all(verb in text for verb in VERBS)


def test_plan_prints_a_shipped_run(monkeypatch, capsys, tmp_path):
    code, out, err = main(monkeypatch, capsys, "plan", "bavaria.yaml", f"runs={tmp_path}", "train.steps=2500")
    assert code == 0 and not err
    text = plain(out)
    assert "1600 x 2000 fine cells" in text and "lccs_level1: 22 classes" in text and "28 pairs of years, 3 x 2500 steps" in text
    assert not list(tmp_path.iterdir())


def test_overrides_reach_the_run(monkeypatch, capsys, tmp_path):
    changes = ["train.steps=7", "split.train=1992-1994", "reconstruct.years=[2001, 2003]", "grid.shard=800", f"runs={tmp_path}"]
    code, out, _ = main(monkeypatch, capsys, "plan", "bavaria.yaml", *changes)
    assert code == 0
    text = plain(out)
    assert "3 pairs of years, 3 x 7 steps" in text and "2 years from the map of 2001" in text and "shards of 800" in text


@pytest.mark.parametrize("verb", ["plan", "align", "train", "reconstruct", "evaluate", "publish", "run"])
def test_every_verb_refuses_in_one_style(monkeypatch, capsys, tmp_path, verb):
    code, out, err = main(monkeypatch, capsys, verb, "bavaria.yaml", f"runs={tmp_path}", "train.stepz=1")
    assert code == 1 and not out
    assert err.startswith("error: run file ") and "train.stepz: Extra inputs are not permitted (got 1" in err.replace("'", "")
    assert "Traceback" not in err and not list(tmp_path.iterdir())


def test_long_error_is_not_broken_and_markup_is_left_alone(monkeypatch, capsys, tmp_path):
    path = tmp_path / ("very_long_" * 12) / "[bold]run[/bold].yaml"
    code, _, err = main(monkeypatch, capsys, "plan", str(path))
    assert code == 1 and str(path) in err and err.count("\n") == 1


def test_bug_is_not_dressed_up_as_an_error_of_the_user(monkeypatch, capsys, tmp_path):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "load_run", broken)
    with pytest.raises(ZeroDivisionError):
        main(monkeypatch, capsys, "plan", "demo.yaml")


def test_module_runs_as_a_program(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    args = [sys.executable, "-m", "ai4land.cli", "plan", "none.yaml"]
    done = subprocess.run(args, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: run file none.yaml does not exist") and "demo.yaml" in done.stderr


def test_own_log_level_holds_for_the_loggers_of_libraries():
    text = "import logging, sys; from ai4land.cli import _root; _root(False, '-v' in sys.argv)\n"
    text += "noisy = logging.getLogger('distributed'); noisy.setLevel('INFO'); noisy.info('hello'); noisy.warning('careful')"
    for flag, expected in (("", False), ("-v", True)):
        args = [sys.executable, "-c", text, flag]
        done = subprocess.run(args, capture_output=True, text=True, check=True, timeout=100)
        assert ("hello" in done.stderr) is expected and "careful" in done.stderr


def scores(accuracy: float | None) -> dict[str, float | None]:
    return {**dict.fromkeys(cli.SCORES, 0.25), "overall_accuracy": accuracy}


def test_score_table_has_a_row_a_score_and_a_column_a_method():
    part = {"years": [2001, 2002], "observed": {"gross": 0.1}, "model": scores(0.98765), "persistence": scores(None)}
    table = cli.score_table(part, title="tiny: test 2001-2002")
    text = shown(table)
    assert [c.header for c in table.columns] == ["score", "model", "persistence"]
    assert table.row_count == len(cli.SCORES) and all(label in text for label in cli.SCORES.values())
    line = next(line for line in text.splitlines() if "overall accuracy" in line)
    assert [v.strip() for v in line.replace("│", "|").split("|")[2:4]] == ["0.9877", "-"]
    assert "tiny: test 2001-2002" in text and "gross" not in text


def test_progress_without_a_terminal_is_a_line_a_tenth(capsys):
    with cli._bar("train") as bar:
        for step in range(1, 101):
            bar(step, 100, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == "train: 100 of 100 loss 1"


def test_shipped_runs_are_listed_and_load():
    for name in ("demo.yaml", "bavaria.yaml", "uk.yaml"):
        assert load_run(name) == load_run(ROOT / "pipelines" / name)


def test_demo_is_refused_before_its_planet_is_made(monkeypatch, capsys, tmp_path):
    values = yaml.safe_load((ROOT / "pipelines" / "demo.yaml").read_text())
    assert values["data"] == f"runs/{values['name']}/planet"
    code, out, err = main(monkeypatch, capsys, "demo", "--runs", str(tmp_path), "train.stepz=1")
    assert code == 1 and "train.stepz" in err and not out and not list(tmp_path.iterdir())
