"""Estimate the globe on 1 to 128 nodes of 4 devices, with the model of ``ai4land plan --device``.

``python benchmarks/scaling.py [device]`` prints the tables of docs/scaling.md. It reads only the shipped run files; the
scheduler's time per block comes from ``results.json``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from ai4land.run.config import RunConfig
from ai4land.run.cost import count, estimate, rates_of
from ai4land.run.file import load_run

LAND = 0.45
"""Approximate share of shards with land, for shards of 12 degrees and of 10."""
NODES = (1, 2, 4, 8, 16, 32, 64, 128)
DEVICES = 4
"""Devices per node."""


def scheduler_seconds() -> float:
    """Read the benchmark's seconds of scheduler and client per block."""
    rows = json.loads(Path(__file__).with_name("results.json").read_text(encoding="utf-8"))
    about = next(row["versus"] for row in rows if row["name"] == "scheduler_share")
    found = re.search(r"([0-9.]+) ms of CPU each", about)
    if found is None:
        raise SystemExit(
            "results.json lacks the scheduler's time per block, expected it in row scheduler_share; run `make bench` first"
        )
    return float(found[1]) / 1e3


def table(run: RunConfig, device: str) -> None:
    """Print the table of a run."""
    work, rates = count(run, land=LAND, cuda=True), rates_of(run, device)
    print(f"\n{run.title}: {work.blocks} blocks, {work.cubes / 1e12:.2f} TB at most in {work.objects:,} shards\n")
    print(
        "| nodes | devices | reconstruct, h | device hours | network's share | GB/s written | shards/s | scheduler's share | train, h |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for nodes in NODES:
        devices = DEVICES * nodes
        cost = estimate(work, rates, workers=devices)
        seconds = cost.reconstruct
        training = cost.train / devices / 3600
        print(
            f"| {nodes} | {devices} | {seconds / 3600:.2f} | {seconds * devices / 3600:.0f} | {cost.network:.3f} | {work.cubes / seconds / 1e9:.2f} | "
            f"{work.objects / seconds:.0f} | {work.blocks * scheduler_seconds() / seconds:.1e} | {training:.2f} |"
        )


def main() -> None:
    """Print the tables."""
    device = sys.argv[1] if len(sys.argv) > 1 else "h100"
    for name in ("global_1km.yaml", "global_300m.yaml"):
        table(load_run(Path(name)), device)


if __name__ == "__main__":
    main()
