"""The residual encoder: ResEnc's blocks, a parameter count by hand, blocks that begin as their shortcuts."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from medseg.networks import ResidualUNet
from medseg.networks.blocks import ConvBlock
from medseg.networks.residual_unet import ResidualBlock


def conv(inputs: int, outputs: int, kernel: int) -> int:
    """Weights, biases, and the norm's scale and shift."""
    return inputs * outputs * kernel + outputs + 2 * outputs


def block(inputs: int, outputs: int, kernel: int) -> int:
    """Two convolutions, and where the channels change one of kernel 1 without bias, with its norm."""
    shortcut = inputs * outputs + 2 * outputs if inputs != outputs else 0
    return conv(inputs, outputs, kernel) + conv(outputs, outputs, kernel) + shortcut


@pytest.mark.parametrize(
    ("dims", "features", "expected"),
    [
        (3, (32, 64, 128, 256, 320, 320), 102_348_226),
        (2, (32, 64, 128, 256, 512, 512, 512, 512), 140_013_058),
    ],
)
def test_the_number_of_parameters_by_hand(dims: int, features: tuple[int, ...], expected: int) -> None:
    kernel, doubled = 3**dims, 2**dims
    blocks = (1, 3, 4, 6, 6, 6, 6, 6)
    total = conv(1, 32, kernel)  # the stem, of 1 channel
    for before, after, count in zip((32, *features), features, blocks, strict=False):
        total += block(before, after, kernel) + (count - 1) * block(after, after, kernel)
    for high, low in itertools.pairwise(features):
        total += low * high * doubled + high + conv(2 * high, high, kernel)
    total += 32 * 2 + 2
    assert total == expected
    with torch.device("meta"):  # counted, not made
        network = ResidualUNet(dims, 1, 2, features)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_blocks_of_a_stage() -> None:
    network = ResidualUNet(2, 1, 2, (2, 4, 4, 4))
    assert [len(stage) for stage in network.encoder] == [1 + 1, 3, 4, 6]  # type: ignore[arg-type]
    assert [len(stage) for stage in network.decoder] == [1, 1, 1]  # type: ignore[arg-type]
    chosen = ResidualUNet(2, 1, 2, (2, 4), convs_per_stage=2, decoder_convs=3)
    assert [len(stage) for stage in chosen.encoder] == [1 + 2, 2]  # type: ignore[arg-type]
    assert len(chosen.decoder[0]) == 3  # type: ignore[arg-type]
    pooled = ResidualUNet(2, 1, 2, (2, 4), convs_per_stage=2, downsampling="pool")
    assert pooled.eval()(torch.zeros(1, 1, 5, 6)).shape == (1, 2, 5, 6)


def test_a_block_begins_as_its_shortcut() -> None:
    plain = partial(ConvBlock, 2)
    x = torch.randn(2, 3, 8, 6)
    same = ResidualBlock(plain, 3, 3, (3, 3), (1, 1))
    torch.testing.assert_close(same(x), F.leaky_relu(x, 0.01))
    halved = ResidualBlock(plain, 3, 3, (3, 3), (2, 1))
    torch.testing.assert_close(halved(x), F.leaky_relu(F.avg_pool2d(x, (2, 1)), 0.01))
    wider = ResidualBlock(plain, 3, 5, (3, 3), (1, 1))
    expected = F.instance_norm(F.conv2d(x, wider.skip[0].conv.weight))  # type: ignore[union-attr,arg-type]
    torch.testing.assert_close(wider(x), F.leaky_relu(expected, 0.01), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_shortcut_averages_volumes(dtype: torch.dtype) -> None:
    halved = ResidualBlock(partial(ConvBlock, 3), 2, 2, (3, 3, 3), (1, 2, 3)).skip
    x = torch.randn(2, 2, 3, 4, 6, dtype=dtype)
    expected = F.avg_pool3d(x.double(), (1, 2, 3)).to(dtype)
    step = torch.finfo(dtype).eps  # of each of the sums
    torch.testing.assert_close(halved(x), expected, rtol=4 * step, atol=4 * step)


def test_a_block_is_the_sum_of_its_ways() -> None:
    """With the last norm's scale at 1: convolution, norm, activation, convolution, norm, plus the input."""
    x = torch.randn(1, 2, 6, 6)
    whole = ResidualBlock(partial(ConvBlock, 2), 2, 2, (3, 3), (1, 1))
    torch.nn.init.ones_(whole.second.norm.weight)  # type: ignore[arg-type]
    inside = F.leaky_relu(F.instance_norm(whole.first.conv(x)), 0.01)
    inside = F.instance_norm(whole.second.conv(inside))
    torch.testing.assert_close(whole(x), F.leaky_relu(inside + x, 0.01), rtol=1e-4, atol=1e-5)


def test_blocks_of_other_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry a stage"):
        ResidualUNet(2, 1, 2, (2, 4), convs_per_stage=(1, 3, 4))
