from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from ai4land.grid import Window, coarse_window, read_coarse
from ai4land.model.unet import UNet, interpolate
from tests.models import CLASSES, FACTOR, randomised


def inputs(size: int, *, seed: int = 0, batch: int = 1):
    rng = torch.Generator().manual_seed(seed)
    window, offset = coarse_window(Window(0, 0, size, size), FACTOR)
    static = torch.randn(batch, 2, size, size, generator=rng, dtype=torch.float64)
    reference = torch.randint(0, CLASSES, (batch, size, size), generator=rng, dtype=torch.uint8)
    reference[torch.rand(reference.shape, generator=rng) < 0.2] = 255
    coarse = torch.randn(batch, 3, window.height, window.width, generator=rng, dtype=torch.float64)
    return static, reference, coarse, torch.tensor([offset] * batch)


@torch.inference_mode()
def changed(net: UNet, before, after) -> np.ndarray:
    """Cells of each batch item whose output differs."""
    return (net(*before) != net(*after)).any(dim=1).numpy()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_receptive_radius_is_a_tight_bound(depth):
    net = randomised(depth)
    radius, stride = net.receptive_radius, net.stride
    size = 2 * (-(-radius // stride) + 2) * stride
    static, reference, coarse, offset = inputs(size)
    middle, reach = size // 2 // stride * stride, []
    for phase in range(stride):
        cell = (middle + phase, middle + (3 * phase) % stride)
        poked, map_poked = static.clone(), reference.clone()
        poked[0, :, cell[0], cell[1]] += torch.tensor([1000.0, -1000.0], dtype=torch.float64)
        map_poked[0, cell[0], cell[1]] = (int(reference[0, cell[0], cell[1]]) + 1) % CLASSES
        for touched in ((poked, reference, coarse, offset), (static, map_poked, coarse, offset)):
            rows, cols = np.nonzero(changed(net, (static, reference, coarse, offset), touched)[0])
            assert rows.size
            reach.append(max(abs(rows - cell[0]).max(), abs(cols - cell[1]).max()))
    assert max(reach) <= radius
    assert max(reach) > radius - stride
    assert min(middle, size - middle - stride) > radius
    assert radius <= net.halo < radius + stride
    assert net.halo % stride == 0


@pytest.mark.parametrize(("depth", "cell"), [(1, (3, 3)), (2, (4, 3))])
def test_a_coarse_cell_reaches_its_fine_cells_and_the_radius(depth, cell):
    net, size = randomised(depth, base=6), 96
    static, reference, coarse, offset = inputs(size)
    poked = coarse.clone()
    poked[0, :, cell[0], cell[1]] += 1.0
    mark = torch.zeros_like(coarse[:, :1])
    mark[0, 0, cell[0], cell[1]] = 1
    own = interpolate(mark, offset, (size, size), FACTOR)[0, 0].numpy() > 0
    assert own.sum() == (2 * FACTOR) ** 2
    got = changed(net, (static, reference, coarse, offset), (static, reference, poked, offset))[0]
    assert got[own].mean() > 0.9
    assert not (got & ~ndimage.binary_dilation(own, np.ones((3, 3)), iterations=net.receptive_radius)).any()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_windows_on_the_stride_agree_in_their_interior(depth):
    net = randomised(depth).float()
    net.head.weight.data /= 10
    whole, halo, stride = 192, net.halo, net.stride
    static, reference, _, _ = inputs(whole, seed=1)
    states = np.random.default_rng(2).standard_normal((3, whole // FACTOR, whole // FACTOR)).astype(np.float32)

    @torch.inference_mode()
    def predict(w: Window) -> torch.Tensor:
        cells, offset = coarse_window(w, FACTOR)
        coarse = torch.from_numpy(read_coarse(states, cells, wrap=False))[None]
        rows, cols = w.slices
        return net(static[:, :, rows, cols].float(), reference[:, rows, cols], coarse, torch.tensor([offset]))[0]

    everything = predict(Window(0, 0, whole, whole))
    scale = float(everything.abs().max())
    for row, col, height, width in (
        (halo, halo, 32, 32),
        (halo + stride, halo + 3 * stride, 40, 24),
        (whole - halo - 16, halo, 16, 64),
    ):
        inner = (slice(halo, halo + height), slice(halo, halo + width))
        part = predict(Window(row - halo, col - halo, height + 2 * halo, width + 2 * halo))[(slice(None), *inner)]
        assert torch.allclose(part, everything[:, row : row + height, col : col + width], atol=1e-5 * max(scale, 1), rtol=0)
    off = predict(Window(1, 1, 2 * halo + 32, 2 * halo + 32))[:, halo:-halo, halo:-halo]
    assert not torch.allclose(off, everything[:, halo + 1 : halo + 33, halo + 1 : halo + 33], atol=1e-3 * scale)


@given(
    depth=st.integers(1, 3), rows=st.integers(1, 4), cols=st.integers(1, 4), classes=st.integers(2, 9), factor=st.integers(1, 9)
)
@settings(max_examples=10, deadline=None)
def test_untrained_network_copies_the_reference_map(depth, rows, cols, classes, factor):
    net = UNet(static_channels=3, coarse_channels=5, classes=classes, factor=factor, base=4, depth=depth, coarse_features=4)
    size = (rows * net.stride, cols * net.stride)
    window, offset = coarse_window(Window(0, 0, *size), factor)
    reference = torch.randint(0, classes, (2, *size), dtype=torch.uint8)
    reference[:, :, 0] = 255
    arguments = (torch.randn(2, 3, *size), reference, torch.randn(2, 5, window.height, window.width), torch.tensor([offset] * 2))
    for training in (True, False):
        logits = net.train(training)(*arguments)
        assert logits.shape == (2, classes, *size)
        assert logits.dtype == torch.float32
        assert (logits[..., 0] == 0).all()
        known = reference != 255
        assert (logits.argmax(1)[known] == reference[known]).all()
        assert (torch.softmax(logits, 1).amax(1)[known] > 0.5).all()


def test_convolutions_see_channels_last_and_the_layout_of_weights_is_free():
    net = randomised(2, base=8).float()
    seen = []
    net.down[0][0].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    static, reference, coarse, offset = inputs(32)
    with torch.inference_mode():
        plain = net(static.float(), reference, coarse.float(), offset)
        last = net.to(memory_format=torch.channels_last)(static.float(), reference.long(), coarse.float(), offset)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert torch.allclose(plain, last, atol=1e-5 * float(plain.abs().max()))


def test_evaluation_of_an_item_does_not_depend_on_its_batch():
    net = randomised(2)
    batch = inputs(16, batch=3)
    with torch.inference_mode():
        together = net(*batch)
        alone = torch.cat([net(*(x[i : i + 1] for x in batch)) for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-10)


def test_gradient_reaches_every_part():
    net = UNet(static_channels=2, coarse_channels=3, classes=CLASSES, factor=FACTOR, base=2, depth=2, coarse_features=2)
    nn.init.normal_(net.head.weight)
    static, reference, coarse, offset = inputs(32)
    F.cross_entropy(net(static.float(), reference, coarse.float(), offset), torch.randint(0, CLASSES, (1, 32, 32))).backward()
    dead = [name for name, p in net.named_parameters() if not p.grad.any()]
    assert dead == []


@given(factor=st.integers(1, 12), rows=st.integers(3, 6), cols=st.integers(3, 6))
@settings(max_examples=25, deadline=None)
def test_interpolate_equals_torch_in_the_interior(factor, rows, cols):
    coarse = torch.randn(2, 3, rows, cols, dtype=torch.float64)
    size = (rows * factor, cols * factor)
    expected = F.interpolate(coarse, scale_factor=factor, mode="bilinear", align_corners=False)
    got = interpolate(coarse, torch.zeros(2, 2, dtype=torch.int64), size, factor)
    edge = factor // 2
    inside = (..., slice(edge, size[0] - edge), slice(edge, size[1] - edge))
    assert torch.allclose(got[inside], expected[inside], atol=1e-12)


@given(
    factor=st.integers(1, 12), row=st.integers(0, 40), col=st.integers(0, 40), height=st.integers(1, 30), width=st.integers(1, 30)
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_interpolation_is_the_same_in_every_window(factor, row, col, height, width):
    states = np.random.default_rng(factor).standard_normal((2, 75 // factor + 1, 75 // factor + 1)).astype(np.float32)

    def at(w: Window) -> torch.Tensor:
        cells, offset = coarse_window(w, factor)
        coarse = torch.from_numpy(read_coarse(states, cells, wrap=False))[None]
        return interpolate(coarse, torch.tensor([offset]), (w.height, w.width), factor)

    whole = at(Window(0, 0, 72, 72))
    window = Window(row, col, height, width)
    assert torch.allclose(at(window), whole[(..., *window.slices)], atol=1e-6, rtol=0)


@given(factor=st.integers(1, 30), row=st.integers(-50, 50), col=st.integers(-50, 50), value=st.floats(-1e3, 1e3, width=32))
@settings(max_examples=25, deadline=None)
def test_interpolation_of_a_constant_is_the_constant(factor, row, col, value):
    cells, offset = coarse_window(Window(row, col, 20, 33), factor)
    made = interpolate(torch.full((1, 1, cells.height, cells.width), value), torch.tensor([offset]), (20, 33), factor)
    assert torch.allclose(made, torch.full_like(made, value), rtol=1e-6, atol=0)


def test_each_item_has_its_own_offset():
    coarse = torch.randn(2, 1, 4, 4)
    offsets = torch.tensor([[8, 9], [11, 14]])
    both = interpolate(coarse, offsets, (8, 8), 8)
    for i in range(2):
        assert torch.equal(both[i : i + 1], interpolate(coarse[i : i + 1], offsets[i : i + 1], (8, 8), 8))
