"""What every architecture must do, whatever its form: a new one joins through ``ARCHITECTURES``.

Exporting is slow: it runs for each architecture in 2D and 3D in two forms, and not for every size and channel.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import torch
from monai.bundle import verify_net_in_out
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.losses import LOSSES, Loss, build_loss
from medseg.networks import ARCHITECTURES

CLASSES = 3
SIZES = {"odd": (7, 9, 5), "even": (8, 12, 8)}
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EVERY = list(itertools.product(ARCHITECTURES, (2, 3)))
every_network = pytest.mark.parametrize(("name", "dims"), EVERY)


def made(name: str, dims: int, in_channels: int = 1, **more: Any) -> nn.Module:
    """A tiny network of three stages with kernels and strides of an anisotropic plan."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"features": (4, 6, 8), "kernel_sizes": (3, 3, 3), "strides": (1, 2, (1, 2))}
    if dims == 3:
        sizes |= {"kernel_sizes": ((1, 3, 3), 3, 3), "strides": (1, (1, 2, 2), 2)}
    return ARCHITECTURES[name](dims, in_channels, CLASSES, **{**sizes, **more})


def shapes_of(levels: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(level.shape) for level in levels]


def image(dims: int, channels: int = 1, kind: str = "odd", batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, channels, *SIZES[kind][:dims])


def logits_of(network: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        result = network.eval()(x)
    assert isinstance(result, Tensor)
    return result


def gradients_of(network: nn.Module, x: Tensor, half: bool = False) -> dict[str, Tensor | None]:
    """Of a loss that all logits of training count in; with ``half`` after a forward pass that is autocast."""
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        result = network.train()(x)
    levels = result if isinstance(result, list) else [result]
    torch.manual_seed(2)
    sum((level * torch.randn_like(level)).mean() for level in levels).backward()
    return {key: None if p.grad is None else p.grad.clone() for key, p in network.named_parameters()}


def calls_of(module: nn.Module) -> list[None]:
    """Grows by an entry at each forward pass of a module from now on."""
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def blurred(network: nn.Module) -> nn.Module:
    """Without the zeros that biases and the norms of residual blocks begin with, behind which gradients are 0."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 1:
                weight += 0.2 + 0.2 * torch.rand_like(weight)
    return network


@every_network
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("supervised", [False, True])
def test_any_size_any_channels(name: str, dims: int, kind: str, channels: int, supervised: bool) -> None:
    network = blurred(made(name, dims, channels, deep_supervision=supervised))
    x = image(dims, channels, kind)
    whole = (2, CLASSES, *x.shape[2:])
    # in training: a list, highest resolution first, or one tensor
    result = network.train()(x)
    assert isinstance(result, list) == supervised
    levels = result if supervised else [result]
    lower = [-(-n // step) for n, step in zip(x.shape[2:], (2, 2) if dims == 2 else (1, 2, 2), strict=True)]
    second = whole if name == "unet_plus_plus" else (2, CLASSES, *lower)
    assert shapes_of(levels) == ([whole, second] if supervised else [whole])
    assert all(level.isfinite().all() for level in levels)
    # every parameter learns
    gradients = gradients_of(network, x)
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert [k for k, g in gradients.items() if g is not None and g.ndim > 1 and not g.any()] == []
    # in evaluation: one tensor, the same each time, and a sample's does not depend on its neighbours
    logits = logits_of(network, x)
    assert logits.shape == whole
    assert torch.equal(logits, logits_of(network, x))
    torch.testing.assert_close(logits[1:], logits_of(network, x[1:]), rtol=1e-3, atol=1e-4)


# an odd size, and an even one with what is made in another way
exported = pytest.mark.parametrize(
    ("kind", "form"), [("odd", {}), ("even", {"deep_supervision": True, "downsampling": "pool"})], ids=["odd", "even"]
)


@every_network
@exported
def test_torch_export(name: str, dims: int, kind: str, form: dict[str, Any]) -> None:
    network = made(name, dims, **form).eval()
    x = image(dims, kind=kind)
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), logits_of(network, x), rtol=1e-4, atol=1e-4)


@every_network
@exported
# a trace is of one size, which is what its warnings say
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript(name: str, dims: int, kind: str, form: dict[str, Any]) -> None:
    network = made(name, dims, **form).eval()
    x = image(dims, kind=kind)
    with torch.no_grad():
        traced = torch.jit.trace(network, x)
        torch.testing.assert_close(traced(x), logits_of(network, x), rtol=1e-4, atol=1e-4)


@every_network
@exported
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporter's own parts
def test_onnx(name: str, dims: int, kind: str, form: dict[str, Any]) -> None:
    network = made(name, dims, 2, **form).eval()
    x = image(dims, 2, kind)
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), logits_of(network, x), rtol=0, atol=1e-4)


@every_network
def test_sliding_window_of_monai(name: str, dims: int) -> None:
    network = made(name, dims).eval()
    x = image(dims, kind="even", batch=1)
    window = tuple(n // 2 for n in x.shape[2:])
    with torch.inference_mode():
        result = SlidingWindowInferer(roi_size=window, sw_batch_size=3, overlap=0)(x, network)
        assert result.shape == (1, CLASSES, *x.shape[2:])
        first = (..., *(slice(n) for n in window))
        torch.testing.assert_close(result[first], network(x[first]), rtol=1e-4, atol=1e-5)
        smooth = SlidingWindowInferer(roi_size=window, sw_batch_size=3, overlap=0.5, mode="gaussian")(x, network)
    assert smooth.shape == result.shape


@every_network
def test_deep_supervision_loss_of_monai(name: str, dims: int) -> None:
    sizes = {"features": (4, 6, 8, 8), "kernel_sizes": None, "strides": None}  # four stages, so three levels
    network = made(name, dims, deep_supervision=True, **sizes).train()
    x = image(dims)
    labels = torch.randint(0, CLASSES, (2, 1, *x.shape[2:])).float()
    levels = network(x)
    single = DiceCELoss(softmax=True, to_onehot_y=True)
    loss = DeepSupervisionLoss(single, weight_mode="exp")(levels, labels)
    loss.backward()
    assert loss.item() > single(levels[0], labels).item() * 0.99  # the first level has the weight 1
    found = build_loss("dice_ce", batch=False, ignore_index=None)(levels, labels)
    weights = (1 / 3, 1 / 3, 1 / 3) if name == "unet_plus_plus" else (2 / 3, 1 / 3, 0)
    ours = Loss(LOSSES["dice_ce"])
    targets = [F.interpolate(labels, level.shape[2:], mode="nearest-exact") for level in levels]
    parts = [w * ours(level, target) for w, level, target in zip(weights, levels, targets, strict=True)]
    torch.testing.assert_close(found, parts[0] + parts[1] + parts[2])


@every_network
def test_a_tensor_of_monai_is_as_good_as_any(name: str, dims: int) -> None:
    network = blurred(made(name, dims))
    x = image(dims)
    expected, found = gradients_of(network, x), gradients_of(network, MetaTensor(x))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    logits = logits_of(network, MetaTensor(x, affine=affine, meta={"filename_or_obj": "scan.nii.gz"}))
    assert torch.equal(logits, logits_of(network, x))
    assert isinstance(logits, MetaTensor)
    assert torch.equal(logits.affine, affine)
    assert logits.meta["filename_or_obj"] == "scan.nii.gz"
    assert type(logits_of(network, x)) is Tensor


@every_network
def test_a_batch_of_monais_loader_is_taken_apart_with_its_metadata(name: str, dims: int) -> None:
    affines = [torch.diag(torch.tensor([n, n, n, 1.0], dtype=torch.float64)) for n in (2.0, 3.0)]
    images = [MetaTensor(x, affine=affine) for x, affine in zip(image(dims), affines, strict=True)]
    logits = logits_of(made(name, dims), list_data_collate(images))
    assert all(torch.equal(one.affine, affine) for one, affine in zip(decollate_batch(logits), affines, strict=True))


@every_network
def test_a_bundle_of_monai(name: str, dims: int, tmp_path: Path) -> None:
    kind = ARCHITECTURES[name].__name__
    arguments = {"spatial_dims": dims, "in_channels": 2, "out_channels": CLASSES, "features": [4, 6, 8]}
    config = {"network_def": {"_target_": f"medseg.networks.{kind}", "deep_supervision": True, **arguments}}
    size = ["8*n"] * (dims - 1) + [7]
    outer = {"type": "tuple", "format": "segmentation", "modality": "MR", "dtype": "float32", "spatial_shape": size}
    formats = {
        "inputs": {"image": {**outer, "num_channels": 2, "value_range": [-10, 10], "is_patch_data": True}},
        "outputs": {"pred": {**outer, "num_channels": CLASSES, "value_range": [-99, 99], "is_patch_data": True}},
    }
    (tmp_path / "inference.json").write_text(json.dumps(config))
    (tmp_path / "metadata.json").write_text(json.dumps({"network_data_format": formats}))
    places = {"config_file": str(tmp_path / "inference.json"), "meta_file": str(tmp_path / "metadata.json")}
    verify_net_in_out(net_id="network_def", device="cpu", n=2, **places)
    with pytest.raises(ValueError, match="channel number"):  # it would have noticed
        verify_net_in_out(net_id="network_def", device="cpu", **places, **{"network_def#out_channels": CLASSES + 1})


@every_network
def test_weights_through_safetensors(name: str, dims: int) -> None:
    network = blurred(made(name, dims, norm="batch"))
    x = image(dims)
    network.train()(x)  # running means, too
    other = made(name, dims, norm="batch")
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(network.state_dict())))
    assert torch.equal(logits_of(network, x), logits_of(other, x))


@every_network
@pytest.mark.parametrize(
    ("norm", "act", "dropout"),
    [
        ("batch", "relu", 0.0),
        (("group", {"num_groups": 2}), ("prelu", {"init": 0.1}), 0.3),
        (("INSTANCE", {"affine": False}), "GELU", ("alphadropout", {"p": 0.1})),
        ("instance", ("ELU", {"alpha": 0.5}), ("dropout", {"p": 0.2})),
        (None, "mish", None),
    ],
)
def test_specifications_of_monai(name: str, dims: int, norm: Any, act: Any, dropout: Any) -> None:
    network = made(name, dims, norm=norm, act=act, dropout=dropout)
    x = image(dims)
    assert all(g is not None and g.isfinite().all() for g in gradients_of(network, x).values())
    assert torch.equal(logits_of(network, x), logits_of(network, x))  # no dropout in evaluation
    differ = not torch.equal(network.train()(x), network(x))
    assert differ == bool(dropout)


@every_network
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_checkpointing_changes_no_number(name: str, dims: int, norm: str) -> None:
    usual = blurred(made(name, dims, norm=norm, deep_supervision=True))
    saving = made(name, dims, norm=norm, deep_supervision=True, checkpointing=True)
    assert saving.state_dict().keys() == usual.state_dict().keys()
    saving.load_state_dict(usual.state_dict())
    x = image(dims)
    calls = [calls_of(network.encoder[0]) for network in (usual, saving)]  # type: ignore[index]
    expected, found = gradients_of(usual, x), gradients_of(saving, x)
    assert [len(each) for each in calls] == [1, 2], "once more in the backward pass"
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)
    for (key, value), same in zip(usual.named_buffers(), saving.buffers(), strict=True):  # running means
        torch.testing.assert_close(same, value, msg=key)


@every_network
@pytest.mark.parametrize("how", ["converted", "autocast"])
def test_half_precision(name: str, dims: int, how: str) -> None:
    network = made(name, dims)
    x = image(dims, kind="even")
    exact = logits_of(network, x)
    if how == "converted":
        half = logits_of(copy.deepcopy(network).bfloat16(), x.bfloat16())
        assert half.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            half = logits_of(network, x)
        gradients = gradients_of(network, x, half=True)
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert (half.float() - exact).abs().mean() < 0.05 * exact.abs().mean()  # bfloat16 has 8 bits: 0.4 % a step


@every_network
def test_channels_last(name: str, dims: int) -> None:
    network = made(name, dims, 4)
    x = image(dims, 4)
    last = x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    torch.testing.assert_close(logits_of(network, last), logits_of(network, x))
    expected, found = gradients_of(network, x), gradients_of(network, last)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)


@every_network
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("form", [{}, {"downsampling": "pool", "norm": "batch"}], ids=["instance", "batch"])
def test_every_convolution_sees_channels_last(name: str, dims: int, channels: int, form: dict[str, Any]) -> None:
    """By strides: where there is one channel, a tensor says that it is contiguous in whatever format."""
    network = made(name, dims, channels, deep_supervision=True, **form)
    last: Any = torch.channels_last if dims == 2 else torch.channels_last_3d
    others = []

    def look(key: str, x: Tensor) -> None:
        if x.stride() != torch.empty_like(x, memory_format=last).stride():
            others.append((key, tuple(x.shape), x.stride()))

    convolutions = {k: m for k, m in network.named_modules() if isinstance(m, CONVOLUTIONS)}
    for key, module in convolutions.items():
        module.register_forward_pre_hook(lambda _, arguments, key=key: look(key, arguments[0]))
    calls = [calls_of(module) for module in convolutions.values()]
    network.train()(image(dims, channels, "even"))
    network(image(dims, channels, "odd"))
    assert others == []
    assert all(len(each) == 2 for each in calls)
