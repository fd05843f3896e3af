"""The parts of networks: padding, averaging, and instance norm by its fast way."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.blocks import (
    BATCH_NORM,
    INSTANCE_NORM,
    LEAKY_RELU,
    RELU,
    ConvBlock,
    Stage,
    arranged,
    conv_stage,
    cropped,
    normalised,
    padded,
    pooled_stage,
    stages_of,
)
from medseg.plan import divisor_of

# ---- sizes


@settings(max_examples=60)
@given(
    st.integers(2, 3).flatmap(
        lambda dims: st.tuples(st.tuples(*[st.integers(1, 17)] * dims), st.tuples(*[st.integers(1, 4)] * dims))
    )
)
def test_padding_and_cropping_are_one_another_undone(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    size, divisor = sizes
    x = torch.rand(1, 2, *size) + 1
    wide = padded(x, divisor)
    assert all(n % d == 0 for n, d in zip(wide.shape[2:], divisor, strict=True))
    assert wide.shape[2:] != torch.Size(divisor)  # the lowest stage has two voxels at least
    assert torch.equal(cropped(wide, size), x)
    assert wide.sum() == pytest.approx(x.sum().item(), rel=1e-5)  # zeros
    extra = [n - m for n, m in zip(wide.shape[2:], size, strict=True)]
    assert all(e < d for e, d in zip(extra[:-1], divisor[:-1], strict=True))
    assert extra[-1] < 2 * divisor[-1]


def test_stages_from_short_forms() -> None:
    assert stages_of(2, (4, 8), None, None, 2) == [Stage(4, (3, 3), (1, 1), 2), Stage(8, (3, 3), (2, 2), 2)]
    found = stages_of(3, (4, 8, 8), ((1, 3, 3), 3, 5), (1, (1, 2, 2), 2), (1, 2, 3))
    assert found[1:] == [Stage(8, (3, 3, 3), (1, 2, 2), 2), Stage(8, (5, 5, 5), (2, 2, 2), 3)]
    assert divisor_of([stage.stride for stage in found]) == (2, 4, 4)


def test_integers_of_numpy_are_sizes() -> None:
    sizes = np.array([[1, 1], [1, 2]])
    assert stages_of(2, (4, 8), [np.int64(3)] * 2, list(sizes), np.array([1, 2])) == [  # type: ignore[list-item,arg-type]
        Stage(4, (3, 3), (1, 1), 1),
        Stage(8, (3, 3), (1, 2), 2),
    ]
    assert stages_of(2, (4, 8), None, None, np.int64(2)) == stages_of(2, (4, 8), None, None, 2)  # type: ignore[arg-type]


def test_a_step_by_stride_or_by_pooling() -> None:
    def conv(inputs: int, outputs: int, kernel: Any, stride: Any) -> nn.Module:
        return ConvBlock(2, inputs, outputs, kernel, stride)

    strided = conv_stage(conv, 1, Stage(2, (3, 3), (2, 1), 2))
    assert [block.conv.stride for block in strided] == [(2, 1), (1, 1)]  # type: ignore[union-attr]
    pooled = pooled_stage(conv, 1, Stage(2, (3, 3), (2, 1), 2))
    assert isinstance(pooled[0], nn.MaxPool2d)
    assert pooled[0].kernel_size == pooled[0].stride == (2, 1)
    assert pooled(torch.zeros(1, 1, 8, 8)).shape == strided(torch.zeros(1, 1, 8, 8)).shape == (1, 2, 4, 8)
    assert len(pooled_stage(conv, 1, Stage(2, (3, 3), (1, 1), 2))) == 2


# ---- memory format


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 6), (4, 6, 5)])
def test_an_image_is_arranged_once(size: tuple[int, ...], channels: int) -> None:
    """By its strides: one of a single channel is contiguous in both formats, whatever these say."""
    x = torch.randn(2, channels, *size)
    last = arranged(x)
    assert torch.equal(last, x)
    assert last.stride(1) == 1
    assert last.stride(-1) == channels
    assert arranged(last) is last


# ---- instance norm


def affine_norm(dims: int, channels: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    norm = (nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d)(channels, affine=True, dtype=dtype)
    torch.manual_seed(0)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


def torch_norm(norm: Any, x: Tensor) -> Tensor:
    return F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def laid_out(x: Tensor, last: bool) -> Tensor:
    if not last:
        return x
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("size", [(5, 4), (1, 2), (3, 4, 5)])
def test_instance_norm_is_that_of_torch(size: tuple[int, ...], batch: int, last: bool) -> None:
    norm = affine_norm(len(size), 3)
    torch.manual_seed(batch)
    x = laid_out(torch.randn(batch, 3, *size) * 4 + 7, last).requires_grad_()
    weights = torch.randn(batch, 3, *size)
    results = [normalised(norm, x), torch_norm(norm, x)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    inputs = (x, *norm.parameters())
    found, expected = (torch.autograd.grad((result * weights).sum(), inputs) for result in results)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert found[0].stride() == x.stride()
    with torch.no_grad():  # another way
        torch.testing.assert_close(normalised(norm, x), results[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_a_mean_far_above_the_deviation(training: bool) -> None:
    """As of a bright image that is nearly even."""
    torch.manual_seed(0)
    norm = affine_norm(3, 2)
    x = laid_out(torch.randn(1, 2, 8, 8, 8) + 100, last=True)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(
            normalised(norm, x), torch_norm(norm.double(), x.double()).float(), rtol=0, atol=1e-3
        )


def test_its_gradients_in_double_precision() -> None:
    norm = affine_norm(2, 2, torch.float64)
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(_Apply(norm), {"norm.weight": weight, "norm.bias": bias}, (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in norm.parameters()))
    assert torch.autograd.gradcheck(run, inputs)


class _Apply(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return normalised(self.norm, x)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_that_are_not_contiguous(last: bool) -> None:
    norm = affine_norm(2, 3)
    x = laid_out(torch.randn(2, 3, 4, 6), last).requires_grad_()
    expanded = torch.randn(2, 1, 1, 6).expand(2, 3, 4, 6)
    sliced = torch.randn(2, 3, 4, 12)[..., ::2]
    turned = torch.randn(2, 3, 6, 4).transpose(2, 3)
    for gradient in (expanded, sliced, turned):
        (found,) = torch.autograd.grad(normalised(norm, x), x, gradient)
        (expected,) = torch.autograd.grad(torch_norm(norm, x), x, gradient)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_single_voxel_becomes_the_shift() -> None:
    """torch's own refuses it in training."""
    norm: Any = affine_norm(2, 3)
    x = torch.randn(2, 3, 1, 1, requires_grad=True)
    result = normalised(norm, x)
    torch.testing.assert_close(result, norm.bias.reshape(1, 3, 1, 1).expand(2, 3, 1, 1), rtol=0, atol=1e-4)
    (result * torch.randn_like(result)).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x))


def test_other_norms_take_their_own_way() -> None:
    x = torch.randn(2, 4, 3, 5)
    plain = nn.InstanceNorm2d(4)
    assert torch.equal(normalised(plain, x), plain(x))
    tracking = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    normalised(tracking, x)
    assert tracking.running_mean is not None
    assert tracking.running_mean.any()
    assert normalised(nn.Identity(), x) is x


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("norm", [INSTANCE_NORM, BATCH_NORM])
@pytest.mark.parametrize("act", [RELU, LEAKY_RELU])
def test_layers_that_are_made_here_are_those_of_monai(spatial_dims: int, norm: Any, act: Any) -> None:
    block = ConvBlock(spatial_dims, 1, 4, (3,) * spatial_dims, (1,) * spatial_dims, norm=norm, act=act)
    assert repr(block.norm) == repr(get_norm_layer(norm, spatial_dims, 4))
    assert repr(block.act) == repr(get_act_layer(act))


def test_other_layers_are_made_by_monai() -> None:
    block = ConvBlock(2, 1, 4, (3, 3), (1, 1), norm=("GROUP", {"num_groups": 2}), act="PRELU", dropout=0.5)
    assert isinstance(block.norm, nn.GroupNorm)
    assert isinstance(block.act, nn.PReLU)
    assert isinstance(block.dropout, nn.Dropout2d)


def test_a_network_of_a_plan_needs_no_monai() -> None:
    """Importing it takes two seconds, which is most of the start of a prediction."""
    code = (
        "import sys, torch\n"
        "from medseg.batch import predict_folder\n"
        "from medseg.networks import ARCHITECTURES\n"
        "for build in ARCHITECTURES.values():\n"
        "    build(spatial_dims=2, in_channels=1, out_channels=3, features=(4, 8)).eval()(torch.zeros(1, 1, 16, 16))\n"
        "assert 'monai' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
