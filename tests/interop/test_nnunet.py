"""nnU-Net's networks and ours, with the same weights, give the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.errors import PackageError
from medseg.interop.nnunet import network_weights
from medseg.networks import ResidualUNet, UNet

ANISOTROPIC: dict[str, Any] = {
    "features": (4, 6, 8, 8),
    "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 1)),
}
ISOTROPIC: dict[str, Any] = {"features": (4, 6, 8), "kernel_sizes": ((3, 3),) * 3, "strides": ((1, 1), (2, 2), (2, 2))}


def theirs(kind: str, dims: int, sizes: dict[str, Any], supervised: bool = False) -> nn.Module:
    """A network of nnU-Net with random weights, norms too."""
    reason = "dynamic_network_architectures (nnU-Net's networks) is not installed"
    networks = pytest.importorskip("dynamic_network_architectures.architectures.unet", reason=reason)
    stages = len(sizes["features"])
    convs = {"n_conv_per_stage": 2} if kind == "PlainConvUNet" else {"n_blocks_per_stage": (1, 3, 4, 6)[:stages]}
    network: nn.Module = getattr(networks, kind)(
        input_channels=2,
        n_stages=stages,
        features_per_stage=sizes["features"],
        conv_op=nn.Conv2d if dims == 2 else nn.Conv3d,
        kernel_sizes=sizes["kernel_sizes"],
        strides=sizes["strides"],
        num_classes=3,
        n_conv_per_stage_decoder=2 if kind == "PlainConvUNet" else 1,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=supervised,
        **convs,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm.weight" in name else weight.uniform_(-0.3, 0.3)
    return network


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    assert [a.shape for a in first] == [b.shape for b in second]
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


@pytest.mark.peer
@pytest.mark.parametrize(("dims", "sizes"), [(2, ISOTROPIC), (3, ANISOTROPIC)])
@pytest.mark.parametrize(("kind", "ours"), [("PlainConvUNet", UNet), ("ResidualEncoderUNet", ResidualUNet)])
def test_equal_function(kind: str, ours: type[UNet], dims: int, sizes: dict[str, Any]) -> None:
    known = theirs(kind, dims, sizes, supervised=True)
    network = ours(dims, 2, 3, **sizes, deep_supervision=True)
    network.load_state_dict(network_weights(known.state_dict(), network))
    x = torch.randn(2, 2, *[16] * dims)
    difference = largest_difference(known(x), network.train()(x))
    assert difference < 1e-4
    shipped = ours(dims, 2, 3, **sizes)
    shipped.load_state_dict(network_weights(known.state_dict(), shipped))
    with torch.inference_mode():
        assert largest_difference([known(x)[0]], [shipped.eval()(x)]) < 1e-4
        odd = shipped(x[..., :13])  # nnU-Net refuses it
    assert odd.shape == (2, 3, *[16] * (dims - 1), 13)
    assert sum(p.numel() for p in known.parameters()) == sum(p.numel() for p in network.parameters())


# Without the peer: the names as nnU-Net writes them


def plain_state() -> dict[str, Tensor]:
    """Of two stages with 2 and 4 features, one convolution each, 1 channel and 3 classes."""
    state = {}
    for prefix in ("encoder.", "decoder.encoder."):
        for stage, (before, after) in enumerate([(1, 2), (2, 4)]):
            block = f"{prefix}stages.{stage}.0.convs.0."
            for conv, norm in (("conv", "norm"), ("all_modules.0", "all_modules.1")):
                state[f"{block}{conv}.weight"] = torch.full((after, before, 3, 3), stage + 1.0)
                state |= {f"{block}{layer}": torch.zeros(after) for layer in (f"{conv}.bias", f"{norm}.weight")}
                state[f"{block}{norm}.bias"] = torch.zeros(after)
    state["decoder.transpconvs.0.weight"] = torch.full((4, 2, 2, 2), 3.0)
    state["decoder.transpconvs.0.bias"] = torch.zeros(2)
    state["decoder.stages.0.convs.0.conv.weight"] = torch.full((2, 4, 3, 3), 4.0)
    for name in ("conv.bias", "norm.weight", "norm.bias"):
        state[f"decoder.stages.0.convs.0.{name}"] = torch.zeros(2)
    state["decoder.seg_layers.0.weight"] = torch.full((3, 2, 1, 1), 5.0)
    state["decoder.seg_layers.0.bias"] = torch.zeros(3)
    return state


def small(**more: Any) -> UNet:
    return UNet(2, 1, 3, (2, 4), convs_per_stage=1, decoder_convs=1, **more)


def test_every_layer_is_taken_once() -> None:
    network = small()
    network.load_state_dict(network_weights(plain_state(), network))
    assert network.encoder[1][0].conv.weight.unique().tolist() == [2]  # type: ignore[index,union-attr]
    assert network.upsample[0].weight.unique().tolist() == [3]
    assert network.decoder[0][0].conv.weight.unique().tolist() == [4]  # type: ignore[index,union-attr]
    assert network.heads[0].weight.unique().tolist() == [5]


def residual_state() -> dict[str, Tensor]:
    """Of two stages with 2 and 4 features, one and two blocks, 1 channel and 3 classes; each convolution its number."""
    convs = {
        "encoder.stem.convs.0": (1, 2),
        "encoder.stages.0.blocks.0.conv1": (2, 2),
        "encoder.stages.0.blocks.0.conv2": (2, 2),
        "encoder.stages.1.blocks.0.conv1": (2, 4),
        "encoder.stages.1.blocks.0.conv2": (4, 4),
        "encoder.stages.1.blocks.0.skip.1": (2, 4),
        "encoder.stages.1.blocks.1.conv1": (4, 4),
        "encoder.stages.1.blocks.1.conv2": (4, 4),
        "decoder.stages.0.convs.0": (4, 2),
    }
    state = {}
    for number, (place, (before, after)) in enumerate(convs.items(), start=1):
        is_skip = "skip" in place
        kernel = (1, 1) if is_skip else (3, 3)
        for repeated in ("", "decoder.") if place.startswith("encoder") else ("",):
            for conv, norm in (("conv", "norm"), ("all_modules.0", "all_modules.1")):
                block = f"{repeated}{place}."
                state[f"{block}{conv}.weight"] = torch.full((after, before, *kernel), float(number))
                state |= {f"{block}{norm}.{part}": torch.zeros(after) for part in ("weight", "bias")}
                if not is_skip:
                    state[f"{block}{conv}.bias"] = torch.zeros(after)
    upsampled = {"weight": torch.full((4, 2, 2, 2), 10.0), "bias": torch.zeros(2)}
    head = {"weight": torch.full((3, 2, 1, 1), 11.0), "bias": torch.zeros(3)}
    state |= {f"decoder.transpconvs.0.{part}": tensor for part, tensor in upsampled.items()}
    return state | {f"decoder.seg_layers.0.{part}": tensor for part, tensor in head.items()}


def test_every_layer_of_a_residual_network_is_taken_once() -> None:
    network = ResidualUNet(2, 1, 3, (2, 4), convs_per_stage=(1, 2))
    network.load_state_dict(network_weights(residual_state(), network))
    places = {name: w.unique().tolist() for name, w in network.state_dict().items() if w.ndim > 1}
    assert places == {
        "encoder.0.0.conv.weight": [1],  # the stem
        "encoder.0.1.first.conv.weight": [2],
        "encoder.0.1.second.conv.weight": [3],
        "encoder.1.0.first.conv.weight": [4],
        "encoder.1.0.second.conv.weight": [5],
        "encoder.1.0.skip.1.conv.weight": [6],
        "encoder.1.1.first.conv.weight": [7],
        "encoder.1.1.second.conv.weight": [8],
        "decoder.0.0.conv.weight": [9],
        "upsample.0.weight": [10],
        "heads.0.weight": [11],
    }


def test_what_does_not_fit_is_named() -> None:
    whole = plain_state()
    with pytest.raises(PackageError, match=r"1 have no place \(encoder.pooling.weight\) .expected"):
        network_weights({**whole, "encoder.pooling.weight": torch.zeros(1)}, small())
    del whole["decoder.seg_layers.0.bias"]
    with pytest.raises(PackageError, match=r"1 are missing \(heads.0.bias\)"):
        network_weights(whole, small())
    del whole["decoder.seg_layers.0.weight"]
    whole["encoder.stages.0.0.convs.0.conv.bias"] = torch.zeros(3)
    whole["encoder.stages.1.0.convs.0.conv.bias"] = torch.zeros(3)
    with pytest.raises(PackageError, match=r"2 are missing .heads.0.weight, heads.0.bias.; 2 have another shape"):
        network_weights(whole, small())
    with pytest.raises(PackageError, match=r"28 are missing .*, \.\.\."):
        network_weights({}, UNet(2, 1, 3, (2, 4)))
