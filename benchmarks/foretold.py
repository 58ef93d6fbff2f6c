"""Compare the estimates of ``ai4land plan --calibrate`` with a run.

``python benchmarks/foretold.py RUN.yaml [name=value …]`` prints a table for docs/performance.md: time of training and of
reconstruction, memory of a worker, bytes and shards of the cubes. The run may be aligned, but training must not have started.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import psutil

from ai4land.cube.template import VARIABLES
from ai4land.run.align import align
from ai4land.run.cost import count, estimate
from ai4land.run.file import load_run
from ai4land.run.inputs import cubes_of
from ai4land.run.reconstruct import reconstruct
from ai4land.run.timing import calibrate
from ai4land.run.train import train


class Watch(threading.Thread):
    """Record the peak memory of any child of this process, sampled every tenth of a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        """Sample until ``over`` is set."""
        me = psutil.Process()
        while not self.over.wait(0.1):
            for child in me.children(recursive=True):
                try:
                    self.peak = max(self.peak, child.memory_info().rss)
                except psutil.Error:
                    continue


def main() -> None:
    """Run the comparison from the command line."""
    run = load_run(Path(sys.argv[1]), sys.argv[2:])
    if (run.folder / "resume.pt").exists() or any(path.exists() for path, *_ in cubes_of(run).values()):
        raise SystemExit(f"{run.folder} holds a started run, expected at most an aligned store; choose another name")
    workers = run.reconstruct.workers
    fresh = estimate(count(run), calibrate(run, tell=print), workers=workers)
    align(run, tell=lambda _: None)
    work = count(run)
    rates = calibrate(run, tell=print)
    cost = estimate(work, rates, workers=workers)
    began = time.perf_counter()
    train(run, tell=print)
    trained = time.perf_counter() - began
    late = calibrate(run, tell=print)
    last = estimate(work, late, workers=workers)
    watch = Watch()
    watch.start()
    began = time.perf_counter()
    reconstruct(run, tell=print)
    mapped = time.perf_counter() - began
    watch.over.set()
    files = [
        f
        for path, *_ in cubes_of(run).values()
        for name in (*VARIABLES, "overviews/*/land_cover")
        for f in path.glob(f"{name}/c/**/*")
        if f.is_file()
    ]
    size = sum(f.stat().st_size for f in files)
    print(
        "| | estimate, nothing done | aligned | trained | measured | aligned / measured | trained / measured |\n|---|---|---|---|---|---|---|"
    )
    for name, first, told, later, real in (
        ("training, s", fresh.train, cost.train, None, trained),
        ("reconstruction, s", fresh.reconstruct, cost.reconstruct, last.reconstruct, mapped),
        ("memory of a worker, GB", None, work.worker.both / 1e9, None, watch.peak / 1e9),
        (
            "bytes of the cubes, GB",
            None,
            work.mapped * (rates.cell or 0.0) / 1e9,
            work.mapped * (late.cell or 0.0) / 1e9,
            size / 1e9,
        ),
        ("shards of the cubes", None, work.objects, None, len(files)),
    ):
        columns = ["-" if x is None else f"{x:.4g}" for x in (first, told, later, real)]
        columns += ["-" if x is None else f"{x / real:.2f}" for x in (told, later)]
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
