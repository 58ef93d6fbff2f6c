"""Print the tables of docs/results.md from finished runs.

For example: `python benchmarks/tables.py runs/bavaria runs/bavaria_1 runs/bavaria_2`. Several folders must be runs that differ
only in their seed. Scores are then means ± standard deviations, without the latter where it rounds to 0. Intervals are those
of the first run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ai4land.cli import SCORES as HEADLINES

METHODS = {
    "model": "model",
    "most_likely": "most likely",
    "persistence": "persistence",
    "proportional": "proportional",
    "gradient_boosting": "gradient boosting",
    "nearest": "nearest coarse",
}
SCORES = {
    **HEADLINES,
    "flicker": "flicker",
    "false_flicker": "flicker where the truth has none",
    "accuracy_loss": "accuracy lost over the lead years",
}


def text(values: list[float | None]) -> str:
    """Format the mean of the available values, with the standard deviation unless it rounds to 0."""
    there = [v for v in values if v is not None]
    if not there:
        return "-"
    spread = stdev(there) if len(there) > 1 else 0.0
    return f"{mean(there):.4f}" + (f" ± {spread:.4f}" if spread >= 5e-5 else "")


def row(cells: list[str]) -> str:
    """Format a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def score_lines(parts: list[dict[str, Any]]) -> list[str]:
    """Tabulate the pooled scores of every method."""
    methods = [m for m in METHODS if m in parts[0]]
    lines = [row(["score", *(METHODS[m] for m in methods)]), "|" + "---|" * (len(methods) + 1)]
    for name, label in SCORES.items():
        cells = [text([p[m].get(name) for p in parts if m in p]) for m in methods]
        if any(c != "-" for c in cells):
            lines.append(row([label, *cells]))
    return lines


def year_lines(parts: list[dict[str, Any]]) -> list[str]:
    """Tabulate accuracy and Figure of Merit by year."""
    methods = [m for m in METHODS if m in parts[0] and m not in ("proportional", "nearest")]
    merits = [m for m in methods if m in ("model", "gradient_boosting")]
    heads = [f"accuracy, {METHODS[m]}" for m in methods] + [f"Figure of Merit, {METHODS[m]}" for m in merits]
    lines = [row(["year", "lead", *heads]), "|" + "---|" * (len(heads) + 2)]
    for year, first in parts[0]["model"]["per_year"].items():
        pairs = [(m, "overall_accuracy") for m in methods] + [(m, "figure_of_merit") for m in merits]
        cells = [text([p[m]["per_year"][year][name] for p in parts if m in p]) for m, name in pairs]
        lines.append(row([year, str(first.get("lead", "-")), *cells]))
    return lines


def other_lines(parts: list[dict[str, Any]]) -> list[str]:
    """List what the tables lack: intervals, calibration, observed change, and the error against the totals."""
    lines = []
    for pair, scores in parts[0]["differences"].items():
        for name in ("overall_accuracy", "figure_of_merit", "mean_iou"):
            found = scores.get(name) or {}
            if found.get("value") is not None and found.get("interval") and None not in found["interval"]:
                low, high = found["interval"]
                lines.append(f"- {pair}, {SCORES[name]}: {found['value']:.4f} ({low:.4f} to {high:.4f})")
    observed = parts[0]["observed"]
    lines += [
        f"- observed {n}: {text([observed.get(n)])}" for n in ("gross", "coarse_net", "figure_of_merit_bound", "coarse_error")
    ]
    for name in ("calibration", "change_calibration"):
        made = [p["model"].get(name) for p in parts]
        if all(made):
            lines.append(f"- {name}, expected error: {text([m['expected_calibration_error'] for m in made])}")
    if all(p["model"].get("change_calibration") for p in parts):
        lines.append(f"- area under the ROC curve of change: {text([p['model']['change_calibration']['auc'] for p in parts])}")
    sides = parts[0]["model"].get("figure_of_merit_by_side") or {}
    if sides:
        lines.append("- Figure of Merit by side: " + ", ".join(f"{k}: {v:.3f}" for k, v in sides.items() if v is not None))
    totals = [p["totals"] for p in parts]
    return lines + [f"- totals: cells off {t['cells_off']:.2f}, fractions off {t['fraction_error']:.1e}" for t in totals]


def main(folders: list[str]) -> None:
    """Print all tables of one run, or of runs that differ in their seed."""
    found = [json.loads((Path(f) / "evaluation.json").read_text(encoding="utf-8")) for f in folders]
    for split in ("validation", "test"):
        parts = [f[split] for f in found if split in f]
        if parts:
            print(f"## {folders[0]}: {split}, {len(parts)} run(s)\n")
            print("\n".join([*score_lines(parts), "", *year_lines(parts), "", *other_lines(parts), ""]))


if __name__ == "__main__":
    main(sys.argv[1:])
