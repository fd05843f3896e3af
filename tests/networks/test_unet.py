"""The U-Net: shapes, a parameter count by hand, MONAI's specifications, export."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg.networks import UNet


def unet(dims: int = 2, **more: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(dims, **{"in_channels": 1, "out_channels": 2, "features": (2, 4, 4), **more})


def logits_of(network: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        result = network.eval()(x)
    assert isinstance(result, Tensor)
    return result


@settings(max_examples=40)
@given(
    st.integers(2, 3).flatmap(lambda dims: st.tuples(*[st.integers(1, 13)] * dims)),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
)
def test_any_size_goes_in_and_comes_out(size: tuple[int, ...], channels: int, classes: int, supervised: bool) -> None:
    network = unet(len(size), in_channels=channels, out_channels=classes, deep_supervision=supervised)
    x = torch.randn(2, channels, *size)
    logits = logits_of(network, x)
    assert logits.shape == (2, classes, *size)
    assert logits.isfinite().all()
    trained = network.train()(x)
    assert isinstance(trained, list) == supervised
    highest = trained[0] if supervised else trained
    assert highest.shape == (2, classes, *size)


@settings(max_examples=40)
@given(st.tuples(st.integers(1, 13), st.integers(1, 13), st.integers(1, 13)))
def test_lower_levels_are_without_the_padding(size: tuple[int, ...]) -> None:
    """As long as the input over the strides, rounded up, so that labels of the input's size are as far as they."""
    network = unet(3, features=(2, 2, 2, 2), strides=(1, (1, 2, 3), 2, 2), deep_supervision=True).train()
    levels = network(torch.randn(1, 1, *size))
    steps = ((1, 1, 1), (1, 2, 3), (2, 4, 6))
    expected = [tuple(math.ceil(n / s) for n, s in zip(size, step, strict=True)) for step in steps]
    assert [tuple(level.shape[2:]) for level in levels] == expected


def test_levels_of_deep_supervision_come_highest_resolution_first() -> None:
    network = unet(3, features=(2, 4, 4, 4), strides=(1, (1, 2, 2), 2, 2), deep_supervision=True).train()
    levels = network(torch.randn(1, 1, 8, 16, 24))
    assert [tuple(level.shape) for level in levels] == [(1, 2, 8, 16, 24), (1, 2, 8, 8, 12), (1, 2, 4, 4, 6)]
    assert network.divisor == (4, 8, 8)


def test_the_number_of_parameters_by_hand() -> None:
    # A convolution has in * out * 9 weights and a bias for each output; an instance norm a scale and a shift.
    first = (1 * 2 * 9 + 2) + 4 + (2 * 2 * 9 + 2) + 4
    second = (2 * 4 * 9 + 4) + 8 + (4 * 4 * 9 + 4) + 8
    upsample = 4 * 2 * 4 + 2  # kernel and step 2 x 2
    decoder = (4 * 2 * 9 + 2) + 4 + (2 * 2 * 9 + 2) + 4  # the skip doubles its channels
    head = 2 * 2 + 2
    assert first + second + upsample + decoder + head == 466
    assert sum(p.numel() for p in unet(features=(2, 4)).parameters()) == 466


def test_three_convolutions_a_stage_add_two_a_resolution() -> None:
    # one more of 2 -> 2 in encoder and decoder (38 + 4 each), and one more of 4 -> 4 in the lowest stage (148 + 8)
    more = unet(features=(2, 4), convs_per_stage=3, decoder_convs=3)
    assert sum(p.numel() for p in more.parameters()) == 466 + 2 * 42 + 156
    lower = unet(features=(2, 4), convs_per_stage=(2, 3))
    assert sum(p.numel() for p in lower.parameters()) == 466 + 156


def test_the_original_by_hand() -> None:
    # batch norm has a scale and a shift; 1 channel, 2 classes, 64 to 512 features and 1024 at the bottom
    def stage(inputs: int, outputs: int) -> int:
        return inputs * outputs * 9 + outputs * outputs * 9 + 2 * (outputs + 2 * outputs)

    down = 37_824 + 221_952 + 886_272 + 3_542_016 + 14_161_920
    assert [stage(1, 64), stage(64, 128), stage(128, 256), stage(256, 512)] == [37_824, 221_952, 886_272, 3_542_016]
    assert stage(512, 1024) == 14_161_920
    up = 1024 * 512 * 4 + 512 + 512 * 256 * 4 + 256 + 256 * 128 * 4 + 128 + 128 * 64 * 4 + 64
    merge = 7_080_960 + 1_771_008 + 443_136 + 110_976
    assert [stage(1024, 512), stage(512, 256), stage(256, 128), stage(128, 64)] == [
        7_080_960,
        1_771_008,
        443_136,
        110_976,
    ]
    assert down + up + merge + 64 * 2 + 2 == 31_042_434
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet.classic(2, 1, 2).parameters()) == 31_042_434


@pytest.mark.parametrize(
    ("preset", "dims", "expected"),
    [
        ("original", 2, 31_042_434),
        ("original", 3, 90_304_514),
        ("small", 2, 7_765_442),
        ("small", 3, 22_581_250),
        ("large", 2, 124_385_154),
        ("large", 3, 361_905_154),
    ],
)
def test_the_presets_by_hand(preset: str, dims: int, expected: int) -> None:
    widths = {
        "original": (64, 128, 256, 512, 1024),
        "small": (32, 64, 128, 256, 512),
        "large": (64, 128, 256, 512, 1024, 2048),
    }[preset]

    def stage(inputs: int, outputs: int) -> int:
        return (inputs + outputs) * outputs * 3**dims + 6 * outputs

    total = sum(stage(*pair) for pair in zip((1, *widths), widths, strict=False))
    for high, low in itertools.pairwise(widths):
        total += low * high * 2**dims + high + stage(2 * high, high)
    assert total + widths[0] * 2 + 2 == expected
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet.classic(dims, 1, 2, preset).parameters()) == expected  # type: ignore[arg-type]


def test_the_form_of_the_literature() -> None:
    network = UNet.classic(3, 1, 2)
    kinds = [type(module) for module in network.modules()]
    assert (kinds.count(nn.MaxPool3d), kinds.count(nn.BatchNorm3d), kinds.count(nn.ReLU)) == (4, 18, 18)
    assert {m.stride for m in network.modules() if isinstance(m, nn.Conv3d)} == {(1, 1, 1)}
    assert UNet.classic(2, 1, 2).encoder[0][0].conv.out_channels == 64  # type: ignore[index,union-attr]
    assert network.encoder[0][0].conv.out_channels == 32  # type: ignore[index,union-attr]
    assert {type(m) for m in UNet.classic(2, 1, 2, norm="instance").modules()} & {nn.InstanceNorm2d}
    with pytest.raises(ValueError, match="no preset 'huge'; there are original, small, large"):
        UNet.classic(2, 1, 2, "huge")  # type: ignore[arg-type]


def test_weights_fit_with_and_without_deep_supervision() -> None:
    trained, shipped = unet(deep_supervision=True), unet(deep_supervision=False)
    assert [name for name in trained.state_dict() if name not in shipped.state_dict()] == [
        "heads.1.weight",
        "heads.1.bias",
    ]
    shipped.load_state_dict({name: trained.state_dict()[name] for name in shipped.state_dict()})
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(logits_of(trained, x), logits_of(shipped, x))


def test_kernels_follow_the_plan() -> None:
    network = unet(3, kernel_sizes=((1, 3, 3), 3, 3))
    sizes = {p.shape[2:] for name, p in network.encoder[0].named_parameters() if name.endswith("conv.weight")}
    assert sizes == {(1, 3, 3)}
    # kernels of 1 along the first axis of the first stage, and nothing lower: planes do not see each other
    flat = unet(3, features=(2, 2), kernel_sizes=((1, 3, 3), (1, 3, 3)), strides=(1, (1, 2, 2)), norm="batch").eval()
    x = torch.randn(1, 1, 3, 8, 8)
    changed = x.clone()
    changed[:, :, 2] += 1
    assert torch.equal(logits_of(flat, x)[:, :, :2], logits_of(flat, changed)[:, :, :2])


def test_the_zeros_around_an_odd_size_are_after_its_end() -> None:
    """In a network without norm, an image with zeros appended gives the same logits."""
    network = unet(norm=None)
    x = torch.randn(1, 1, 7, 6)
    whole = torch.zeros(1, 1, 8, 8)
    whole[..., :7, :6] = x
    torch.testing.assert_close(logits_of(network, x), logits_of(network, whole)[..., :7, :6])


def test_the_default_is_instance_norm_and_leaky_relu() -> None:
    network = unet()
    assert sum(isinstance(m, nn.InstanceNorm2d) and m.affine for m in network.modules()) == 10
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.01}


@pytest.mark.parametrize("dims", [2, 3])
def test_an_image_that_shrinks_to_one_voxel_is_padded_once_more(dims: int) -> None:
    """torch refuses to normalise a single voxel; two are nothing to it."""
    network = unet(dims)
    for size in ((1,) * dims, (4,) * dims, (1,) * (dims - 1) + (3,)):
        x = torch.randn(1, 1, *size)
        assert logits_of(network, x).isfinite().all()
        assert network.train()(x).shape == (1, 2, *size)
    padded = torch.zeros(1, 1, *[4] * (dims - 1), 8)
    padded[..., :4] = x = torch.randn(1, 1, *[4] * dims)
    torch.testing.assert_close(logits_of(network, x), logits_of(network, padded)[..., :4])


def test_arguments_can_be_kept_as_json() -> None:
    arguments = {
        "spatial_dims": 3,
        "in_channels": 2,
        "out_channels": 3,
        "features": (2, 4),
        "kernel_sizes": ((1, 3, 3), 3),
        "strides": (1, (1, 2, 2)),
        "norm": ("INSTANCE", {"affine": True}),
        "act": ("LEAKYRELU", {"negative_slope": 0.01}),
    }
    torch.manual_seed(0)
    first = UNet(**arguments)  # type: ignore[arg-type]
    torch.manual_seed(0)
    second = UNet(**json.loads(json.dumps(arguments)))
    x = torch.randn(1, 2, 4, 6, 6)
    assert torch.equal(logits_of(first, x), logits_of(second, x))


def test_initialised_as_he_et_al_say() -> None:
    torch.manual_seed(0)
    network = UNet(2, 1, 2, features=(64, 128))
    weight = network.encoder[1][1].conv.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)  # the slope of 0.01 adds nothing
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("conv.bias"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"features": (4,)}, "one entry a stage"),
        ({"strides": (1, 2)}, "one entry a stage"),
        ({"kernel_sizes": (3, 3)}, "one entry a stage"),
        ({"kernel_sizes": (3, 3, (3, 3, 3))}, "2 axes"),
        ({"kernel_sizes": (3, 3, 2)}, "kernels odd"),
        ({"strides": (2, 2, 2)}, "first stride must be 1"),
        ({"dims": 1}, "spatial_dims must be 2 or 3; got 1"),
        ({"dims": 4}, "spatial_dims must be 2 or 3; got 4"),
        ({"convs_per_stage": 0}, "1 at least; got 0"),
        ({"convs_per_stage": (2, 2, 0)}, "1 at least; got 0"),
        ({"decoder_convs": 0}, "1 at least; got 0"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unet(**arguments)


def test_every_decoder_stage_has_its_own_number_of_convolutions() -> None:
    network = unet(decoder_convs=(3, 1))
    assert [len(stage) for stage in network.decoder] == [3, 1]  # type: ignore[arg-type]
    whole = unet(decoder_convs=2).state_dict()
    assert unet(decoder_convs=(2, 2)).state_dict().keys() == whole.keys()
    with pytest.raises(ValueError, match="one entry a decoder stage, 2; got 3"):
        unet(decoder_convs=(1, 1, 1))
