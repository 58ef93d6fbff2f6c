"""Ablate the choices of pipelines/bavaria.yaml: `python benchmarks/ablation.py`, about an hour on two cores.

Each variant is a run that differs in one setting. All are trained on 1992-1996, stopped on 1997, and scored on 1998-2001 from
the map of 1997, so that nothing is chosen on the test years 2002-2015. One network with fewer steps than in the run file
stands for the ensemble. Finished runs are not repeated.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tables import row

RUNS = Path("runs/ablation")
COMMON = [
    "split.train=1992-1996",
    "split.validation={reference: 1996, years: 1997}",
    "split.test={reference: 1997, years: 1998-2001}",
    "reconstruct.reference=1997",
    "reconstruct.years=1997-2001",
    "evaluate.boosting=0",
    "train.members=1",
    "train.steps=600",
    f"runs={RUNS}",
]
FIRST = "as in the run file"
TRAINED = {
    FIRST: [],
    "another seed": ["seed=1"],
    "no mirrored or rotated patches": ["train.turn=false"],
    "totals not imposed in training": ["train.totals_share=0"],
    "changed cells weighted as others": ["train.change_weight=1"],
}
PUBLISHED = {
    "no preference for the previous class": ["constrain.keep=0"],
    "net change only": ["constrain.keep=null"],
    "cells may go back": ["constrain.settle=0"],
}
"""Variants of the constraint, with the network of the first variant."""
SCORES = {
    ("model", "overall_accuracy"): "accuracy, model",
    ("model", "figure_of_merit"): "Figure of Merit, model",
    ("model", "flicker"): "flicker, model",
    ("most_likely", "overall_accuracy"): "accuracy, most likely",
    ("most_likely", "figure_of_merit"): "Figure of Merit, most likely",
    ("persistence", "overall_accuracy"): "accuracy, persistence",
}


def folder_of(variant: str) -> Path:
    """Name the folder of a variant's run."""
    return RUNS / variant.replace(" ", "_")


def run(variant: str, overrides: list[str], extra: list[str], *, keep: tuple[str, ...]) -> None:
    """Run a variant, starting from the named files of the first variant's folder."""
    folder, first = folder_of(variant), folder_of(FIRST)
    if (folder / "evaluation.json").is_file():
        return
    if variant != FIRST and not folder.exists():
        others = {p.name for p in first.iterdir()} - set(keep)
        shutil.copytree(first, folder, ignore=lambda at, _: others if Path(at) == first else set())
    command = [sys.executable, "-m", "ai4land.cli", "run", "pipelines/bavaria.yaml", f"name={folder.name}"]
    subprocess.run([*command, *COMMON, *overrides, *extra], check=True)


def main(extra: list[str]) -> None:
    """Run all variants and print their table; ``extra`` key=value settings apply to every run."""
    for variant, overrides in TRAINED.items():
        run(variant, overrides, extra, keep=("store.zarr",))
    for variant, overrides in PUBLISHED.items():
        run(variant, overrides, extra, keep=("store.zarr", "config.yaml", "splits.json", "model.json", "model.safetensors"))
    print(row(["variant", "validation loss", *SCORES.values()]))
    print("|" + "---|" * (len(SCORES) + 2))
    for variant in (*TRAINED, *PUBLISHED):
        test = json.loads((folder_of(variant) / "evaluation.json").read_text(encoding="utf-8"))["test"]
        losses = json.loads((folder_of(variant) / "model.json").read_text(encoding="utf-8"))["training"]["validation_loss"]
        numbers = [f"{test[method][score]:.4f}" for method, score in SCORES]
        print(row([variant, " ".join(f"{v:.4f}" for v in losses), *numbers]))


if __name__ == "__main__":
    main(sys.argv[1:])
