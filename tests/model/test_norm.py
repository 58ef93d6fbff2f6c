"""Normalisation over processes: what they add up is what one process would have had."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from ai4land.model.norm import ALONE, Group, Norm, shared_norms
from ai4land.train.group import joined, torchrun_group
from tests import ROOT

SHAPE = (6, 3, 5, 4)


def norm(dtype=torch.float64) -> Norm:
    torch.manual_seed(0)
    made = Norm(SHAPE[1]).double()
    with torch.no_grad():
        made.weight.uniform_(0.5, 2)
        made.bias.normal_()
    return made.to(dtype)


def results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of the input, weight and bias, and the running statistics."""
    x = x.clone().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad((out**3).sum(), [x, module.weight, module.bias])
    return [out.detach(), *grads, module.running_mean.clone(), module.running_var.clone()]


def data(dtype=torch.float64) -> torch.Tensor:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 5).to(dtype)


def test_normalisation_of_one_process_is_that_of_pytorch():
    ours, theirs = norm(), nn.BatchNorm2d(SHAPE[1]).double()
    theirs.load_state_dict(ours.state_dict())
    for a, b in zip(results(ours, data()), results(theirs, data()), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert int(ours.num_batches_tracked) == 1
    assert torch.allclose(ours.eval()(data()), theirs.eval()(data()), rtol=1e-12)
    assert torch.autograd.gradcheck(norm(), data().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalisation_in_low_precision_is_near_that_in_float64(dtype):
    x = data(dtype).contiguous(memory_format=torch.channels_last)
    whole, low = results(norm(), x.double()), results(norm(torch.float32), x)
    assert low[0].dtype == dtype and low[1].dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(whole, low, strict=True):
        assert torch.allclose(a, b.double(), rtol=tolerance, atol=tolerance * float(a.abs().max()))


def test_normalisation_keeps_the_variance_of_values_far_from_zero():
    """The mean is 1000 times the standard deviation; float32 resolves such values to 6e-5 of it."""
    x = (torch.randn((8, SHAPE[1], 32, 32), generator=torch.Generator().manual_seed(2)) + 1000).contiguous(
        memory_format=torch.channels_last
    )
    low, whole = results(norm(torch.float32), x), results(norm(), x.double())
    for a, b in zip(low, whole, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


PART = """
import sys, time, torch
from datetime import timedelta
from torch.distributed import FileStore
from importlib import import_module
from ai4land.train.group import joined
from ai4land.errors import WorkerError
from ai4land.model.norm import shared_norms

torch.set_num_threads(1)
mine = import_module(sys.argv[4])
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with joined(FileStore(folder + "/store", world), rank=rank, world=world, timeout=30) as group:
    made = mine.norm()
    with shared_norms(made, group):
        own = mine.results(made, mine.data()[rank::world])
    net = mine.Net()
    net(torch.full((1, 2), rank + 1.0)).sum().backward()
    numbers = group.add_gradients(net, torch.tensor(rank + 0.5), torch.tensor(1.0))
    group.first(lambda: open(folder + "/made", "w").write("yes"))
    there = open(folder + "/made").read()

    def later():
        time.sleep(0.5)
        open(folder + "/again", "w").write(" again")

    group.first(later)
    there += open(folder + "/again").read()
    try:
        group.first(lambda: 1 / 0)
    except (ZeroDivisionError, WorkerError) as error:
        there += f" {error}"
    torch.save({"own": own, "grads": [p.grad for p in net.parameters()], "numbers": numbers, "there": there}, f"{folder}/{rank}.pt")
"""


class Net(nn.Module):
    """A layer, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.unused = nn.Linear(2, 3), nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("world", [2, 3])
def test_parts_of_a_batch_add_up_to_the_whole(tmp_path, world):
    call = [sys.executable, "-c", PART]
    started = [subprocess.Popen([*call, str(rank), str(world), str(tmp_path), __name__], cwd=ROOT) for rank in range(world)]
    assert [p.wait(timeout=120) for p in started] == [0] * world
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    whole = results(norm(), data())
    for kind in (0, 1):  # outputs and gradients of the input, each process its own cells
        joint = torch.empty(SHAPE, dtype=torch.float64)
        for rank, part in enumerate(parts):
            joint[rank::world] = part["own"][kind]
        assert torch.allclose(joint, whole[kind], rtol=1e-12, atol=1e-12)
    for kind in (2, 3):  # gradients of weight and bias add up
        assert torch.allclose(sum(p["own"][kind] for p in parts), whole[kind], rtol=1e-12)
    for kind in (4, 5):  # running statistics are the same everywhere, bit for bit
        assert all(torch.equal(p["own"][kind], parts[0]["own"][kind]) for p in parts)
        assert torch.allclose(parts[0]["own"][kind], whole[kind], rtol=1e-12)
    total = world * (world + 1) / 2
    for rank, part in enumerate(parts):
        failed = "process 0 failed with ZeroDivisionError" if rank else "division by zero"
        assert part["there"].startswith(f"yes again {failed}")
        unused, weight, bias = part["grads"]
        assert unused is None and torch.equal(weight, torch.full((3, 2), total)) and torch.equal(bias, torch.full((3,), world))
        assert part["numbers"].tolist() == [world**2 / 2, world]


def test_one_process_needs_no_others(tmp_path):
    made = []
    with joined(None, rank=0, world=1, timeout=1) as group, shared_norms(norm(), group):
        group.first(lambda: made.append(1))
        value = torch.ones(2)
        assert group == Group() == ALONE and group.sum(value) is value and made == [1]
        net = Net()
        net(torch.ones(1, 2)).sum().backward()
        assert group.add_gradients(net, torch.tensor(2.0)).tolist() == [2.0]
    with torchrun_group(timeout=1) as group:
        assert group == ALONE
