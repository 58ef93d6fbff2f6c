"""Measure training and prediction on one device, against its matrix peak: ``python benchmarks/gpu.py`` on a CUDA machine.

Needs only PyTorch (2.6 or later) and the module ``ai4land.model.unet`` of the checkout: no Dask, no Zarr, no installation. Prints a
table and writes ``gpu.json`` with the name of the hardware. Training is a step of AdamW in bfloat16 (autocast, channels last).
Prediction is the network with folded normalisation in bfloat16 on one window: eager, compiled and as a CUDA graph.
The peak is that of a bfloat16 matrix product, measured first on the same device.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

STATIC, COARSE, CLASSES, FACTOR = 16, 38, 12, 30
"""Static channels, coarse channels, classes and fine cells along a coarse cell, as for HILDA+ and the states of LUH2."""


def load_unet() -> Any:
    """Load the network's module from this checkout, so that the package need not be installed: it needs PyTorch alone."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    return importlib.import_module("ai4land.model.unet")


def timed(work: Callable[[], object], device: torch.device, *, rounds: int, least: float = 0.2) -> float:
    """Return the median seconds of a warm call; each round makes as many calls as take ``least`` seconds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        work()
    wait()
    began = time.perf_counter()
    work()
    wait()
    calls = max(1, int(least / max(time.perf_counter() - began, 1e-6)))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        seconds.append((time.perf_counter() - began) / calls)
    return median(seconds)


def peak(device: torch.device, side: int, *, rounds: int) -> float:
    """Measure the operations per second of a product of two bfloat16 matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b, device, rounds=rounds)


def inputs(batch: int, side: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Make random inputs for a batch of patches."""
    cells = side // FACTOR + 3
    static = torch.randn(batch, STATIC, side, side, device=device, dtype=torch.float16)
    reference = torch.randint(0, CLASSES, (batch, side, side), device=device, dtype=torch.uint8)
    return (
        static,
        reference,
        torch.rand(batch, COARSE, cells, cells, device=device),
        torch.full((batch, 2), FACTOR, device=device),
    )


def network(module: Any, base: int, depth: int, device: torch.device) -> Any:
    """Make a network of the given base and depth."""
    torch.manual_seed(0)
    sizes = {"static_channels": STATIC, "coarse_channels": COARSE, "classes": CLASSES, "factor": FACTOR}
    return module.UNet(**sizes, base=base, depth=depth).to(device, memory_format=torch.channels_last)


def operations(model: Any, *given: torch.Tensor) -> float:
    """Count the operations of one forward pass with PyTorch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*given)
    return float(counter.get_total_flops())


def memory(device: torch.device) -> float | None:
    """Return the peak memory of the device since the last call, in GB; None without CUDA."""
    if device.type != "cuda":
        return None
    held = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return round(held, 3)


def train_row(module: Any, device: torch.device, *, base: int, depth: int, batch: int, patch: int, rounds: int) -> dict[str, Any]:
    """Time a training step."""
    model = network(module, base, depth, device).train()
    given = inputs(batch, patch, device)
    target = torch.randint(0, CLASSES, (batch, patch, patch), device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    work = 3 * operations(model, *given)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(*given)
        loss = F.cross_entropy(logits.float(), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    memory(device)
    seconds = timed(step, device, rounds=rounds)
    return {
        "what": "train",
        "how": "eager",
        "batch": batch,
        "side": patch,
        "seconds": seconds,
        "work": work,
        "memory_gb": memory(device),
    }


def predict_rows(
    module: Any, device: torch.device, *, base: int, depth: int, side: int, rounds: int, quick: bool
) -> list[dict[str, Any]]:
    """Time the forward pass over one window: eager, compiled, and as a CUDA graph."""
    model = copy.deepcopy(network(module, base, depth, device)).eval()
    for block in (*model.down, *model.merge):
        for conv, norm in ((0, 1), (3, 4)):
            block[conv] = fuse_conv_bn_eval(block[conv], block[norm])
            block[norm] = torch.nn.Identity()
    for part in (model.down, model.up, model.merge, model.head):
        part.to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(1, model.inputs, side, side, device=device, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )

    def network_of(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.head(model.trunk(x))
        return logits

    rows = []
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            network_of(x)
        work = float(counter.get_total_flops())
        ways: dict[str, Callable[[], object]] = {"eager": lambda: network_of(x)}
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            network_of(x)
            torch.cuda.synchronize(device)
            with torch.cuda.graph(graph):
                network_of(x)
            ways["graph"] = graph.replay
        if not quick:
            compiled = torch.compile(network_of)
            ways["compiled"] = lambda: compiled(x)
        for how, call in ways.items():
            memory(device)
            try:
                seconds = timed(call, device, rounds=rounds)
            except Exception as error:
                print(f"{how} failed: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            row = {"what": "predict", "how": how, "batch": 1, "side": side, "seconds": seconds, "work": work}
            rows.append({**row, "memory_gb": memory(device)})
    return rows


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    device, module = torch.device(given.device), load_unet()
    quick, rounds = given.quick, 1 if given.quick else 5
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    top = peak(device, 256 if quick else 8192, rounds=rounds)
    rows = []
    for base, depth in ((4, 2),) if quick else ((16, 3), (32, 3), (32, 4), (64, 4)):
        made = []
        for batch in (2,) if quick else (16, 64, 256):
            try:
                made.append(
                    train_row(module, device, base=base, depth=depth, batch=batch, patch=32 if quick else 128, rounds=rounds)
                )
            except torch.OutOfMemoryError:
                print(f"base {base}, depth {depth}, batch {batch}: out of memory", file=sys.stderr)
        made += predict_rows(module, device, base=base, depth=depth, side=64 if quick else 1552, rounds=rounds, quick=quick)
        for row in made:
            work, cells = row.pop("work"), row["batch"] * row["side"] ** 2
            rate = {"samples_per_s": row["batch"] / row["seconds"], "mpx_per_s": cells / row["seconds"] / 1e6}
            rows.append(
                {
                    "base": base,
                    "depth": depth,
                    **row,
                    **rate,
                    "tflops": work / row["seconds"] / 1e12,
                    "share_of_peak": work / row["seconds"] / top,
                }
            )
    about = {"device": name, "torch": torch.__version__, "python": platform.python_version(), "peak_tflops": top / 1e12}
    given.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"{name}, PyTorch {torch.__version__}; bfloat16 matrix product {top / 1e12:.1f} TFLOP/s\n")
    print("| what | how | base | depth | batch | side | samples/s | Mpx/s | TFLOP/s | share of peak | memory GB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        held = "-" if r["memory_gb"] is None else f"{r['memory_gb']:.2f}"
        print(
            f"| {r['what']} | {r['how']} | {r['base']} | {r['depth']} | {r['batch']} | {r['side']} | {r['samples_per_s']:.4g} | "
            f"{r['mpx_per_s']:.4g} | {r['tflops']:.3g} | {r['share_of_peak']:.2f} | {held} |"
        )


if __name__ == "__main__":
    main()
