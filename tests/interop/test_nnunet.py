"""nnU-Net's networks and ours give the same logits, and its model folders become packages that say what they said."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from medseg.errors import InputError, MedsegError, PackageError
from medseg.interop.nnunet import import_model, network_weights
from medseg.io import read_mask, read_volume
from medseg.networks import ResidualUNet, UNet
from medseg.package import ModelPackage, load_package
from medseg.plan import Resampling
from medseg.predict import Predictor, PredictSettings
from medseg.preprocess import prepare

ANISOTROPIC: dict[str, Any] = {
    "features": (4, 6, 8, 8),
    "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 1)),
}
ISOTROPIC: dict[str, Any] = {"features": (4, 6, 8), "kernel_sizes": ((3, 3),) * 3, "strides": ((1, 1), (2, 2), (2, 2))}


def theirs(kind: str, dims: int, sizes: dict[str, Any], supervised: bool = False, channels: int = 2) -> nn.Module:
    """A network of nnU-Net with random weights, norms too."""
    reason = "dynamic_network_architectures (nnU-Net's networks) is not installed"
    networks = pytest.importorskip("dynamic_network_architectures.architectures.unet", reason=reason)
    stages = len(sizes["features"])
    convs = {"n_conv_per_stage": 2} if kind == "PlainConvUNet" else {"n_blocks_per_stage": (1, 3, 4, 6)[:stages]}
    network: nn.Module = getattr(networks, kind)(
        input_channels=channels,
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


def plain_state(
    dims: int = 2, channels: int = 1, outputs: int = 3, decoder_convs: int = 1, features: Sequence[int] = (2, 4)
) -> dict[str, Tensor]:
    """Of two stages with one convolution each, every kind of layer with a number of its own."""
    high, low = features
    state = {}
    for prefix in ("encoder.", "decoder.encoder."):
        for stage, (before, after) in enumerate([(channels, high), (high, low)]):
            state |= block(f"{prefix}stages.{stage}.0.convs.0.", before, after, dims, stage + 1.0)
    state["decoder.transpconvs.0.weight"] = torch.full((low, high, *[2] * dims), 3.0)
    state["decoder.transpconvs.0.bias"] = torch.zeros(high)
    for conv in range(decoder_convs):
        state |= block(f"decoder.stages.0.convs.{conv}.", high if conv else 2 * high, high, dims, 4.0)
    state["decoder.seg_layers.0.weight"] = torch.full((outputs, high, *[1] * dims), 5.0)
    state["decoder.seg_layers.0.bias"] = torch.arange(float(outputs))
    return state


def block(prefix: str, before: int, after: int, dims: int, number: float) -> dict[str, Tensor]:
    """A convolution and a norm, by both names that nnU-Net has for them."""
    state = {}
    for conv, norm in (("conv", "norm"), ("all_modules.0", "all_modules.1")):
        state[f"{prefix}{conv}.weight"] = torch.full((after, before, *[3] * dims), number)
        state |= {
            f"{prefix}{layer}": torch.zeros(after) for layer in (f"{conv}.bias", f"{norm}.weight", f"{norm}.bias")
        }
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


# ---- model folders ---------------------------------------------------------------------------------------------------

IMAGE = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
LABEL = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
LOGITS = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
INTENSITIES = {"mean": 99.5, "std": 37.1, "median": 97.0, "percentile_00_5": -958.0, "percentile_99_5": 270.0}


def settings_of(dims: int = 3, **changes: Any) -> dict[str, Any]:
    """A configuration of nnU-Net's plans with the network of ``plain_state``."""
    return {
        "data_identifier": "nnUNetPlans_x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 9,
        "patch_size": [16, 24, 32][:dims],
        "median_image_size_in_voxels": [36.0, 50.5, 35.0][:dims],
        "spacing": [3.6, 0.6, 0.7][:dims],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": IMAGE,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": LABEL,
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": LOGITS,
        "batch_dice": False,
        "architecture": architecture_of(dims),
        **changes,
    }


def architecture_of(dims: int = 3, kind: str = "PlainConvUNet", **changes: Any) -> dict[str, Any]:
    arguments = {
        "n_stages": 2,
        "features_per_stage": [2, 4],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * 2,
        "strides": [[1] * dims, [2] * dims],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }
    name = f"dynamic_network_architectures.architectures.unet.{kind}"
    named = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    return {"network_class_name": name, "arch_kwargs": arguments, "_kw_requires_import": named}


def write_model(
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    *,
    plans: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
    configuration: str = "3d_fullres",
    folds: Sequence[int | str] = (0,),
    state: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> Path:
    """A model folder as nnU-Net writes it, with changes at every level."""
    settings = settings_of() if settings is None else settings
    body = {
        "dataset_name": "Dataset004_Hippocampus",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [36, 50, 35],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": INTENSITIES},
        "configurations": {configuration: settings},
        **(plans or {}),
    }
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": 260,
        "file_ending": ".nii.gz",
        **(dataset or {}),
    }
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(body))
    (folder / "dataset.json").write_text(json.dumps(about))
    saved = {
        "network_weights": plain_state(len(settings["patch_size"])) if state is None else state,
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": configuration, "device": torch.device("cpu")},
        "inference_allowed_mirroring_axes": (0, 1),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(1)], "lrs": [0.01]},
        "_best_ema": np.float64(0.5),
        **(checkpoint or {}),
    }
    for fold in folds:
        (folder / f"fold_{fold}").mkdir()
        torch.save(saved, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def imported(tmp_path: Path, *args: Any, orientation: str = "stored", **changes: Any) -> ModelPackage:
    folder = write_model(tmp_path / "model", *args, **changes)
    import_model(folder, tmp_path / "package", orientation=orientation)
    return load_package(tmp_path / "package")


def test_a_model_becomes_a_package(tmp_path: Path) -> None:
    package = imported(tmp_path)
    plan, setup = package.plan, package.configuration
    assert (package.manifest.name, package.manifest.configuration) == ("Dataset004_Hippocampus", "3d_fullres")
    assert (plan.orientation, plan.axes, plan.channels) == ("stored", (2, 1, 0), ("MRI",))
    assert plan.labels.values == {"anterior": 1, "posterior": 2}
    assert plan.normalisation[0].scheme == "zscore"
    assert (setup.spacing_mm, setup.patch_size, setup.mirror_axes) == ((3.6, 0.6, 0.7), (16, 24, 32), (0, 1))
    assert (setup.median_shape, setup.batch_size, setup.batch_dice) == ((36, 50, 35), 9, False)
    assert setup.estimated_memory_mb > 1
    (network,) = package.networks()
    assert isinstance(network, UNet)
    assert network.heads[0].weight.unique().tolist() == [5]
    assert network.heads[0].bias.tolist() == [0, 1, 2]
    record = package.manifest.folds[0]
    assert (record.source, record.seed, record.train_cases) == ("fold_0/checkpoint_final.pth", None, None)
    card = (tmp_path / "package" / "README.md").read_text()
    words = "From nnU-Net v2: Dataset004_Hippocampus, nnUNetPlans, 3d_fullres, trained by nnUNetTrainer; fold_0/check"
    assert words in card
    assert "| 0 | not known | not known | not known | not known | not measured |" in card


def test_pictures_are_two_dimensional(tmp_path: Path) -> None:
    settings = settings_of(2, normalization_schemes=["RGBTo01Normalization"] * 3, use_mask_for_norm=[False] * 3)
    channels = {"channel_names": {"2": "B", "0": "R", "1": "G"}, "file_ending": ".png"}
    package = imported(
        tmp_path,
        settings,
        plans={"image_reader_writer": "NaturalImage2DIO"},
        dataset=channels,
        configuration="2d",
        state=plain_state(2, channels=3),
    )
    assert package.plan.channels == ("R", "G", "B")
    assert {rule.scheme for rule in package.plan.normalisation} == {"rgb"}
    assert package.configuration.spacing_mm == (None, 3.6, 0.6)
    assert package.configuration.median_shape == (36, 36, 50)
    assert package.configuration.patch_size == (16, 24)


def test_old_plans_say_the_same(tmp_path: Path) -> None:
    """Those before version 2.4, as in TotalSegmentator's models."""
    old = settings_of() | {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 2,
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "num_pool_per_axis": [1, 1, 1],
        "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
        "conv_kernel_sizes": [[3, 3, 3], [3, 3, 3]],
    }
    del old["architecture"]
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    first, second = imported(tmp_path / "new"), imported(tmp_path / "old", old)
    assert first.digest == second.digest
    capped = old | {"unet_max_num_features": 3}
    with pytest.raises(PackageError, match="have another shape"):
        import_model(write_model(tmp_path / "capped", capped), tmp_path / "out")


def test_a_residual_network(tmp_path: Path) -> None:
    shape = {"n_conv_per_stage": None, "n_blocks_per_stage": [1, 2]}
    body = architecture_of(2, "ResidualEncoderUNet", **shape)
    with pytest.raises(PackageError, match="architecture, n_conv_per_stage: is None"):
        import_model(write_model(tmp_path / "a", settings_of(2, architecture=body), configuration="2d"), tmp_path / "p")
    del body["arch_kwargs"]["n_conv_per_stage"]
    package = imported(tmp_path, settings_of(2, architecture=body), configuration="2d", state=residual_state())
    assert package.configuration.network.name == "residual_unet"
    assert package.configuration.network.convs_per_stage == (1, 2)
    package.networks()


def test_the_decoder_begins_at_the_bottom(tmp_path: Path) -> None:
    """And numbers of convolutions, kernels, strides and features may be one for all stages."""
    sizes = {"n_stages": 3, "features_per_stage": 2, "kernel_sizes": 3, "strides": [1, [2, 2, 2], 2]}
    convs = {"n_conv_per_stage": 1, "n_conv_per_stage_decoder": [1, 3]}
    state = {}
    for stage in range(3):
        state |= block(f"encoder.stages.{stage}.0.convs.0.", 2 if stage else 1, 2, 3, 1.0)
    for stage, count in enumerate((1, 3)):
        for conv in range(count):
            state |= block(f"decoder.stages.{stage}.convs.{conv}.", 2 if conv else 4, 2, 3, 1.0)
        state |= {f"decoder.transpconvs.{stage}.weight": torch.ones(2, 2, 2, 2, 2)}
        state |= {f"decoder.transpconvs.{stage}.bias": torch.ones(2)}
        state |= {f"decoder.seg_layers.{stage}.weight": torch.full((3, 2, 1, 1, 1), stage + 1.0)}
        state |= {f"decoder.seg_layers.{stage}.bias": torch.ones(3)}
    package = imported(tmp_path, settings_of(architecture=architecture_of(**sizes, **convs)), state=state)
    network = package.configuration.network
    assert (network.decoder_convs, network.features, network.divisor) == ((3, 1), (2, 2, 2), (4, 4, 4))
    (built,) = package.networks()
    assert [len(stage) for stage in built.decoder] == [3, 1]  # type: ignore[arg-type,union-attr]
    assert [head.weight.unique().item() for head in built.heads] == [2]  # type: ignore[union-attr]


def test_a_trainer_with_batch_norm(tmp_path: Path) -> None:
    state = plain_state(3)
    for name in [name for name in state if name.endswith((".norm.bias", ".all_modules.1.bias"))]:
        for part in ("running_mean", "running_var"):
            state[name.replace("bias", part)] = torch.ones_like(state[name])
        state[name.replace("bias", "num_batches_tracked")] = torch.tensor(7)
    package = imported(tmp_path, state=state, checkpoint={"trainer_name": "nnUNetTrainerBN"})
    assert package.configuration.network.norm == "batch"
    (network,) = package.networks()
    assert network.encoder[0][0].norm.num_batches_tracked == 7  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "PrimusM"}, "architecture: is 'PrimusM' .expected 'PlainConvUNet' or 'ResidualEncoderUNet'"),
        ({"conv_bias": False}, "conv_bias: is False"),
        ({"conv_op": "torch.nn.modules.conv.Conv2d"}, "conv_op: is 'Conv2d'"),
        ({"norm_op": "torch.nn.modules.normalization.GroupNorm"}, "norm_op: is 'GroupNorm'"),
        ({"norm_op_kwargs": {"eps": 0.001, "affine": True}}, "norm_op_kwargs: is {'eps': 0.001"),
        ({"norm_op_kwargs": None}, "norm_op_kwargs: is .*'affine': False"),
        ({"nonlin": "torch.nn.GELU"}, "nonlin: is 'GELU'"),
        ({"nonlin_kwargs": {"negative_slope": 0.2}}, "nonlin_kwargs: is {'negative_slope': 0.2}"),
        ({"nonlin_first": True}, "nonlin_first: is True"),
        ({"stem_channels": 3}, "stem_channels: is 3"),
        ({"dropout_op": "torch.nn.AlphaDropout"}, "dropout_op: is 'AlphaDropout'"),
        ({"squeeze_excitation": True}, "squeeze_excitation: is True"),
    ],
)
def test_a_network_that_ours_is_not_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = write_model(tmp_path / "model", settings_of(architecture=architecture_of(**change)))
    with pytest.raises(PackageError, match=words):
        import_model(folder, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_what_makes_no_difference_is_taken(tmp_path: Path) -> None:
    same = {
        "dropout_op": "torch.nn.Dropout3d",
        "dropout_op_kwargs": {"p": 0.25},
        "nonlin_kwargs": {"negative_slope": 0.01, "inplace": False},
        "stem_channels": 2,
        "block": "dynamic_network_architectures.building_blocks.residual.BasicBlockD",
        "deep_supervision": True,
    }
    package = imported(tmp_path, settings_of(architecture=architecture_of(**same)))
    assert package.configuration.network.dropout == 0.25
    package.networks()


# ---- intensities, grids, labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "asked", "forward", "orientation", "axes"),
    [
        ("SimpleITKIO", "stored", [0, 1, 2], "stored", (2, 1, 0)),
        ("NibabelIO", "stored", [2, 0, 1], "stored", (0, 2, 1)),  # (K, J, I) to (I, K, J)
        ("SimpleITKIO", "RAS", [1, 0, 2], "RAS", (1, 2, 0)),
        ("NibabelIOWithReorient", "stored", [0, 1, 2], "RAS", (2, 1, 0)),
        ("SimpleITKIOWithReorient", "RAS", [0, 1, 2], "RAS", (2, 1, 0)),
    ],
)
def test_axes(
    tmp_path: Path, reader: str, asked: str, forward: list[int], orientation: str, axes: tuple[int, ...]
) -> None:
    plans = {"image_reader_writer": reader, "transpose_forward": forward}
    plan = imported(tmp_path, plans=plans, orientation=asked).plan
    assert (plan.orientation, plan.axes) == (orientation, axes)


@pytest.mark.parametrize(
    ("reader", "asked", "error", "words"),
    [
        ("Tiff3DIO", "stored", PackageError, "read by Tiff3DIO .expected SimpleITKIO or NibabelIO"),
        ("NibabelIOWithReorient", "LPS", InputError, "is LPS .expected RAS, to which NibabelIOWithReorient"),
        ("SimpleITKIO", "RAX", InputError, "orientation letter is one of"),
        ("SimpleITKIO", "RRS", InputError, "each of L/R, P/A and I/S once"),
    ],
)
def test_axes_that_cannot_be(tmp_path: Path, reader: str, asked: str, error: type[MedsegError], words: str) -> None:
    folder = write_model(tmp_path / "model", plans={"image_reader_writer": reader})
    with pytest.raises(error, match=words):
        import_model(folder, tmp_path / "package", orientation=asked)


def test_intensities(tmp_path: Path) -> None:
    schemes = ["CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization"]
    settings = settings_of(normalization_schemes=schemes, use_mask_for_norm=[False, True, True, False])
    channels = {"modality": {str(n): f"c{n}" for n in range(4)}}
    folder = write_model(tmp_path / "model", settings, state=plain_state(3, channels=4))
    about = json.loads((folder / "dataset.json").read_text())
    del about["channel_names"]
    (folder / "dataset.json").write_text(json.dumps(about | channels))
    import_model(folder, tmp_path / "package")
    plan = load_package(tmp_path / "package").plan
    assert [rule.scheme for rule in plan.normalisation] == ["ct", "zscore", "none", "minmax"]
    assert [rule.nonzero_only for rule in plan.normalisation] == [False, True, False, False]
    ct = plan.normalisation[0]
    assert (ct.mean, ct.std, ct.lower, ct.upper) == (99.5, 37.1, -958.0, 270.0)
    other = write_model(tmp_path / "other", settings_of(normalization_schemes=["SquareRoot"]))
    with pytest.raises(PackageError, match="normalization_schemes: is 'SquareRoot'"):
        import_model(other, tmp_path / "package")


def resampling(function: str = "resample_data_or_seg_to_shape", **kwargs: Mapping[str, Any]) -> dict[str, Any]:
    given = {"data": IMAGE, "seg": LABEL, "probabilities": LOGITS} | kwargs
    return {f"resampling_fn_{kind}": function for kind in given} | {
        f"resampling_fn_{kind}_kwargs": value for kind, value in given.items()
    }


TORCH = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}
APART = {"is_seg": False, "force_separate_z": None, "separate_z_anisotropy_threshold": 4}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (resampling(), Resampling()),
        (
            resampling(data=IMAGE | {"order": 1, "order_z": 3}, probabilities=LOGITS | {"order": 0, "order_z": 1}),
            Resampling(image=1, image_along_low=3, logits=0, logits_along_low=1),
        ),
        (
            resampling(data=IMAGE | {"force_separate_z": True}, probabilities=LOGITS | {"force_separate_z": True}),
            Resampling(separate="always"),
        ),
        # without the argument nnU-Net's function never treats an axis apart
        (resampling(data={}, probabilities={"order": 1}), Resampling(separate="never")),
        (
            resampling("resample_torch_fornnunet", data=TORCH, probabilities=TORCH),
            Resampling(image=1, separate="never"),
        ),
        (
            resampling("resample_torch_fornnunet", data=APART, probabilities=APART),
            Resampling(image=1, anisotropy=4),
        ),
    ],
)
def test_resampling(tmp_path: Path, change: dict[str, Any], expected: Resampling) -> None:
    assert imported(tmp_path, settings_of(**change)).plan.resampling == expected


def test_without_resampling_every_grid_is_its_own(tmp_path: Path) -> None:
    package = imported(tmp_path, settings_of(**resampling("no_resampling_hack", data={}, seg={}, probabilities={})))
    assert package.configuration.spacing_mm == (None, None, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (resampling("my_resampling"), "resampling_fn_data: is 'my_resampling'"),
        (resampling(data=IMAGE | {"order": 2}), "resampling_fn_data, order: is 2 .expected 0 or 1 or 3"),
        (resampling(probabilities=LOGITS | {"order": 3}), "resampling_fn_probabilities, order: is 3 .expected 0 or 1"),
        (resampling(data=IMAGE | {"order_z": 4}), "order_z: is 4"),
        (resampling(data=IMAGE | {"is_seg": True}), "is_seg: is True"),
        (resampling(data=IMAGE | {"mode": "wrap"}), "has the argument 'mode'"),
        (resampling(data=IMAGE | {"force_separate_z": False}), "force_separate_z and threshold: is ..auto', 3.0"),
        (resampling("resample_torch_fornnunet", data=APART | {"mode": "area"}, probabilities=APART), "mode: is 'area'"),
        (
            resampling("resample_torch_fornnunet", data=APART | {"aniso_axis_mode": "nearest"}, probabilities=APART),
            "aniso_axis_mode: is 'nearest' .expected 'nearest-exact' or 'linear'",
        ),
        (
            {**resampling(), "resampling_fn_probabilities": "no_resampling_hack"},
            "resampling: is of images alone",
        ),
    ],
)
def test_resampling_that_cannot_be(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(PackageError, match=words):
        import_model(write_model(tmp_path / "model", settings_of(**change)), tmp_path / "package")


def test_regions_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    """As in BraTS, where one integer has a name of its own and an ignore label is above all."""
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    package = imported(
        tmp_path,
        dataset={"labels": labels, "regions_class_order": [1, 2, 3]},
        state=plain_state(3, outputs=3),
    )
    plan = package.plan
    assert list(plan.labels.regions.items()) == [("whole", (1, 2, 3)), ("core", (2, 3)), ("enhancing", (3,))]
    assert plan.labels.values == {"label 1": 1, "label 2": 2, "enhancing": 3}
    assert (plan.labels.ignore, plan.region_order, plan.outputs) == (4, (1, 2, 3), 3)
    assert package.configuration.training.loss == "bce_dice"
    package.networks()


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ({"labels": {"background": 0, "all": [1, 2], "one": 1}}, "regions_class_order: is missing"),
        ({"labels": {"background": 0, "all": [0, 1]}, "regions_class_order": [1]}, "a region holds the background"),
        ({"labels": {"background": 0, "all": [1, 2]}, "regions_class_order": [1, 2]}, "one integer a region"),
        ({"labels": {"background": 0}}, "at least one label"),
        ({"labels": ["a", "b"]}, "not as nnU-Net v2 writes it"),
        ({"channel_names": {"x": "MRI"}}, "not as nnU-Net v2 writes it: ValueError"),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, dataset: dict[str, Any], words: str) -> None:
    with pytest.raises(PackageError, match=words):
        import_model(write_model(tmp_path / "model", dataset=dataset), tmp_path / "package")


# ---- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours"), [("3d_lowres", "3d_lowres"), ("3d_lowres_large", "3d_lowres"), ("3d_high", "3d_fullres")]
)
def test_a_configuration_of_another_name(tmp_path: Path, name: str, ours: str) -> None:
    assert imported(tmp_path, configuration=name).manifest.configuration == ours


def test_a_configuration_inherits(tmp_path: Path) -> None:
    configurations = {
        "3d_fullres": settings_of(),
        "3d_bs4": {"inherits_from": "3d_fullres", "batch_size": 4, "patch_size": [32, 32, 32]},
        "3d_bs4_ct": {"inherits_from": "3d_bs4", "normalization_schemes": ["CTNormalization"]},
    }
    package = imported(tmp_path, plans={"configurations": configurations}, configuration="3d_bs4_ct")
    assert (package.configuration.batch_size, package.configuration.patch_size) == (4, (32, 32, 32))
    assert package.configuration.spacing_mm == (3.6, 0.6, 0.7)
    assert package.plan.normalisation[0].scheme == "ct"


@pytest.mark.parametrize(
    ("configurations", "words"),
    [
        ({"2d": {}}, "has no configuration '3d_fullres' .expected 2d"),
        ({"3d_fullres": {"inherits_from": "base"}}, "has no configuration 'base'"),
        ({"3d_fullres": {"inherits_from": "b"}, "b": {"inherits_from": "3d_fullres"}}, "no circle"),
        ({"3d_fullres": {**settings_of(), "spacing": None}}, "not as nnU-Net v2 writes it: TypeError"),
        ({"3d_fullres": {k: v for k, v in settings_of().items() if k != "patch_size"}}, "KeyError 'patch_size'"),
        ({"3d_fullres": settings_of(patch_size=[15, 16, 16])}, "no multiple of"),
        ({"3d_fullres": settings_of(preprocessor_name="Mine")}, "preprocessor_name: is 'Mine'"),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path: Path, configurations: dict[str, Any], words: str) -> None:
    folder = write_model(tmp_path / "model", plans={"configurations": configurations})
    with pytest.raises(PackageError, match=words):
        import_model(folder, tmp_path / "package")


def test_a_label_manager_of_ones_own_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", plans={"label_manager": "Mine"})
    with pytest.raises(PackageError, match="label_manager: is 'Mine'"):
        import_model(folder, tmp_path / "package")


def cascade(tmp_path: Path, **dataset: Any) -> tuple[Path, Path]:
    """A low-resolution model and the one after it, which sees two classes beside the image."""
    configurations = {
        "3d_lowres": settings_of(spacing=[4.0, 2.0, 2.0]),
        "3d_fullres": settings_of(),
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    plans = {"configurations": configurations}
    low = write_model(tmp_path / "low", plans=plans, dataset=dataset, configuration="3d_lowres", folds=(0, 1))
    high = write_model(
        tmp_path / "high",
        plans=plans,
        configuration="3d_cascade_fullres",
        folds=(0, 1),
        state=plain_state(3, channels=3),
    )
    return low, high


def test_a_cascade_is_one_package(tmp_path: Path) -> None:
    low, high = cascade(tmp_path)
    write_postprocessing(low, "0_1", [1])
    write_postprocessing(high, "0_1", [2])
    import_model(high, tmp_path / "package", previous=low)
    package = load_package(tmp_path / "package")
    assert (package.manifest.configuration, package.configuration.previous) == ("3d_cascade_fullres", "3d_lowres")
    assert package.previous is not None
    assert package.previous.configuration.spacing_mm == (4.0, 2.0, 2.0)
    assert package.plan.inputs(package.configuration) == 3
    assert [len(stage.networks()) for stage in (package, package.previous)] == [2, 2]
    # nnU-Net's second stage sees the masks of the first as they are
    assert (package.plan.keep_largest, package.previous.plan.keep_largest) == (((2,),), ())


def test_a_cascade_needs_both_stages(tmp_path: Path) -> None:
    low, high = cascade(tmp_path)
    with pytest.raises(PackageError, match=r"3d_cascade_fullres is a cascade .expected a model of 3d_lowres before it"):
        import_model(high, tmp_path / "package")
    with pytest.raises(PackageError, match=r"is a model of 3d_cascade_fullres .expected of 3d_lowres"):
        import_model(high, tmp_path / "package", previous=high)
    with pytest.raises(PackageError, match="3d_lowres is no cascade"):
        import_model(low, tmp_path / "package", previous=low)
    other, _ = cascade(tmp_path / "other", labels={"background": 0, "left": 1, "right": 2})
    with pytest.raises(PackageError, match=r"labels are .*anterior.*those before.*left"):
        import_model(high, tmp_path / "package", previous=other)
    plans = json.loads((high / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["resampling_fn_seg_kwargs"] = {**LABEL, "order": 3}
    (high / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(PackageError, match="resampling_fn_seg, order: is 3"):
        import_model(high, tmp_path / "package", previous=low)


# ---- folds and checkpoints -------------------------------------------------------------------------------------------


def test_folds(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", folds=(0, 1, 3, "all"))
    (folder / "fold_2").mkdir()
    torch.save({}, folder / "fold_2" / "checkpoint_best.pth")
    for copy in ("fold_0_before", "fold_backup", "fold_01"):  # no folds of nnU-Net
        shutil.copytree(folder / "fold_0", folder / copy)

    def folds(**more: Any) -> dict[int, str | None]:
        import_model(folder, tmp_path / "package", **more)
        return {n: record.source for n, record in load_package(tmp_path / "package").manifest.folds.items()}

    assert list(folds()) == [0, 1, 3]
    assert list(folds(folds=["1"])) == [1]
    assert folds(folds=["all"]) == {0: "fold_all/checkpoint_final.pth"}
    assert folds(folds=(0, "all")) == {0: "fold_0/checkpoint_final.pth", 1: "fold_all/checkpoint_final.pth"}
    words = "has no fold_2/checkpoint_final.pth .expected fold_0/checkpoint_final.pth or .*fold_2/checkpoint_best.pth"
    with pytest.raises(PackageError, match=words):
        folds(folds=[0, 2])
    with pytest.raises(PackageError, match=r"has no fold_backup/checkpoint_final.pth"):
        folds(folds=["backup"])
    with pytest.raises(PackageError, match=r"has no fold_\*/checkpoint_latest.pth"):
        folds(checkpoint="checkpoint_latest.pth")
    alone = write_model(tmp_path / "alone", folds=["all"])
    import_model(alone, tmp_path / "package")
    assert list(load_package(tmp_path / "package").manifest.folds) == [0]


def test_folds_of_two_configurations_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    other = write_model(tmp_path / "other", configuration="3d_lowres")
    (other / "fold_0").rename(folder / "fold_1")
    with pytest.raises(PackageError, match="folds are of 3d_fullres and 3d_lowres"):
        import_model(folder, tmp_path / "package")


def test_the_dice_of_the_validation(tmp_path: Path) -> None:
    said = {"licence": "CC-BY-SA 4.0", "reference": "KCL"}
    folder = write_model(tmp_path / "model", folds=(0, 1, 2), dataset=said)
    for fold, dice in ((0, 0.875), (1, float("nan")), (2, None)):
        (folder / f"fold_{fold}" / "validation").mkdir()
        summary = {"foreground_mean": {"Dice": dice}, "metric_per_case": [{}, {}]}
        (folder / f"fold_{fold}" / "validation" / "summary.json").write_text(json.dumps(summary))
    (folder / "dataset_fingerprint.json").write_text("{}")
    import_model(folder, tmp_path / "package", name="Mine")
    package = load_package(tmp_path / "package")
    assert [(r.dice, r.validation_cases) for r in package.manifest.folds.values()] == [(0.875, 2), *2 * [(None, 2)]]
    assert (package.manifest.name, package.manifest.licence) == ("Mine", "CC-BY-SA 4.0")
    assert "Data: KCL" in package.manifest.notes
    assert package.plan.fingerprint_digest.startswith("44136fa355b3678a")  # SHA-256 of {}


@pytest.mark.parametrize(
    "summary", [{"foreground_mean": []}, {"foreground_mean": {"Dice": "0.9"}}, {"metric_per_case": 3}]
)
def test_another_summary_is_refused(tmp_path: Path, summary: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "fold_0" / "validation").mkdir()
    (folder / "fold_0" / "validation" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(PackageError, match=r"summary.json: is not as nnU-Net v2 writes it"):
        import_model(folder, tmp_path / "package")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_weights_are_unwrapped(tmp_path: Path, prefix: str) -> None:
    state = {prefix + name: tensor.half() for name, tensor in plain_state(3).items()}
    package = imported(tmp_path, state=state)
    assert package.networks()[0].heads[0].weight.unique().tolist() == [5]  # type: ignore[index,union-attr]


@pytest.mark.parametrize("axes", [None, ()])
def test_without_mirroring(tmp_path: Path, axes: Any) -> None:
    package = imported(tmp_path, checkpoint={"inference_allowed_mirroring_axes": axes})
    assert package.configuration.mirror_axes == ()


class Trap:
    """Unpickling one of these leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = write_model(tmp_path / "model", checkpoint={"logging": Trap(mark)})
    torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert mark.exists()  # so the trap works
    mark.rmdir()
    with pytest.raises(
        PackageError, match=r"checkpoint_final.pth: holds (posix|nt).mkdir, which could run code, and was"
    ):
        import_model(folder, tmp_path / "package")
    assert not mark.exists()
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(pickle.dumps(Trap(mark), protocol=2))
    with pytest.raises(PackageError):
        import_model(folder, tmp_path / "package")
    assert not mark.exists()


def test_a_checkpoint_of_numpy_1(tmp_path: Path) -> None:
    """Its scalars come from a module that has another name since."""
    folder = write_model(tmp_path / "model")
    path = folder / "fold_0" / "checkpoint_final.pth"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            assert name.endswith("data.pkl") == (new in content)
            archive.writestr(name, content.replace(new, old))
    import_model(folder, tmp_path / "package")
    load_package(tmp_path / "package").networks()


MODEL: dict[str, Any] = {
    "network_weights": {},
    "trainer_name": "nnUNetTrainer",
    "init_args": {"configuration": "3d_fullres"},
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"network_weights": {"a": 1}}, "no checkpoint of nnU-Net v2: AttributeError"),
        ({"state_dict": {}}, "no checkpoint of nnU-Net v2: KeyError 'network_weights'"),
        ([1, 2], "no checkpoint of nnU-Net v2: TypeError"),
        (torch.zeros(3), "no checkpoint of nnU-Net v2: IndexError"),
        (MODEL | {"inference_allowed_mirroring_axes": ["x"]}, "no checkpoint of nnU-Net v2: ValueError"),
        (MODEL | {"inference_allowed_mirroring_axes": [math.inf]}, "no checkpoint of nnU-Net v2: OverflowError"),
        (MODEL | {"inference_allowed_mirroring_axes": torch.ones(2)}, "no checkpoint of nnU-Net v2: RuntimeError"),
        ({"network_weights": {}, "trainer_name": "nnUNetTrainer", "init_args": {}}, "KeyError 'configuration'"),
    ],
)
def test_another_checkpoint_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    folder = write_model(tmp_path / "model")
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(PackageError, match=words):
        import_model(folder, tmp_path / "package")


@pytest.mark.parametrize("size", [0, 10, 1000, -100])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, size: int) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PackageError, match=r"fold_0/checkpoint_final.pth"):
        import_model(folder, tmp_path / "package")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = plain_state(3) | {"decoder.seg_layers.0.bias": torch.tensor([0.0, float("nan"), 1.0])}
    folder = write_model(tmp_path / "model", state=state)
    with pytest.raises(PackageError, match=r"fold 0: weights heads\.0\.bias are not finite"):
        import_model(folder, tmp_path / "package")
    assert not (tmp_path / "package").exists()


# ---- postprocessing, zips, other folders -----------------------------------------------------------------------------

LARGEST = "remove_all_but_largest_component_from_segmentation"


def write_postprocessing(folder: Path, folds: str, *steps: Any, function: str = LARGEST, **more: Any) -> Path:
    results = folder / f"crossval_results_folds_{folds}"
    results.mkdir()
    kwargs = [{"labels_or_regions": step, **more} for step in steps]
    body = {"postprocessing_fns": [function] * len(steps), "postprocessing_kwargs": kwargs}
    (results / "postprocessing.json").write_text(json.dumps(body))
    return results


def test_postprocessing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", folds=(0, 1))
    write_postprocessing(folder, "0_1_2_3_4", [1, 2], 1, [[1, 2], 2])
    import_model(folder, tmp_path / "package")
    assert load_package(tmp_path / "package").plan.keep_largest == ((1, 2), (1,), (1, 2, 2))
    write_postprocessing(folder, "0_1", 2)
    import_model(folder, tmp_path / "package")
    assert load_package(tmp_path / "package").plan.keep_largest == ((2,),)
    manifest = import_model(folder, tmp_path / "package", folds=[1])
    assert load_package(tmp_path / "package").plan.keep_largest == ()
    words = "No postprocessing: there are crossval_results_folds_0_1, crossval_results_folds_0_1_2_3_4, and no cross"
    assert manifest.notes[-1].startswith(words)


def test_a_pickle_of_postprocessing_is_not_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    results = write_postprocessing(folder, "0")
    (results / "postprocessing.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    assert len(import_model(folder, tmp_path / "package").notes) == 1
    (results / "postprocessing.json").unlink()
    note = import_model(folder, tmp_path / "package").notes[-1]
    assert note == "No postprocessing: crossval_results_folds_0 has it as a pickle alone, which is not read"
    assert not (tmp_path / "mark").exists()
    (results / "postprocessing.pkl").unlink()
    assert len(import_model(folder, tmp_path / "package").notes) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"function": "fill_holes"}, "has the step fill_holes"),
        ({"connectivity": 1}, "with labels_or_regions, connectivity"),
        ({"background_label": 7}, "writes 7 in place of what it removes"),
    ],
)
def test_another_postprocessing_is_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    folder = write_model(tmp_path / "model")
    write_postprocessing(folder, "0", 1, **more)
    with pytest.raises(PackageError, match=words):
        import_model(folder, tmp_path / "package")


def zipped(path: Path, *folders: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in folders:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    archive.write(file, f"Dataset004/{folder.name}/{file.relative_to(folder)}")
        archive.writestr("../outside.txt", "climbs out")
    return path


def test_a_zip_of_one_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "trainer__plans__3d_fullres", folds=(0, 1))
    write_postprocessing(folder, "0_1", 1)
    import_model(zipped(tmp_path / "model.zip", folder), tmp_path / "package")
    import_model(folder, tmp_path / "other")
    assert load_package(tmp_path / "package").digest == load_package(tmp_path / "other").digest
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.zip", "other", "package", "trainer__plans__3d_fullres",
    ]  # fmt: skip


def test_a_zip_that_is_not_one_model(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    both = zipped(tmp_path / "both.zip", first, second)
    with pytest.raises(PackageError, match=r"holds 2 models .Dataset004/a, Dataset004/b.*Unpack it"):
        import_model(both, tmp_path / "package")
    with pytest.raises(PackageError, match="holds 0 models"):
        import_model(zipped(tmp_path / "none.zip"), tmp_path / "package")
    (first / "noise.bin").write_bytes(bytes(20_000_000))
    with pytest.raises(PackageError, match="unpacks to"):
        import_model(zipped(tmp_path / "bomb.zip", first), tmp_path / "package")
    (tmp_path / "text.zip").write_text("no zip")
    for missing in (tmp_path / "text.zip", tmp_path / "nowhere"):
        with pytest.raises(PackageError, match="cannot be read"):
            import_model(missing, tmp_path / "package")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    write_model(tmp_path / "Dataset004" / "trainer__plans__2d")
    with pytest.raises(PackageError, match=r"has no plans.json .expected .*trainer__plans__2d"):
        import_model(tmp_path / "Dataset004", tmp_path / "package")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackageError, match="expected a model folder of nnU-Net"):
        import_model(tmp_path / "empty", tmp_path / "package")
    folder = write_model(tmp_path / "model")
    for text, words in (("{", "is no JSON"), ("[]", "holds a JSON list")):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(PackageError, match=words):
            import_model(folder, tmp_path / "package")
    (folder / "dataset.json").unlink()
    with pytest.raises(PackageError, match=r"dataset.json: cannot be read"):
        import_model(folder, tmp_path / "package")


# ---- beside nnU-Net itself -------------------------------------------------------------------------------------------


def write_image(path: Path, array: NDArray[Any], spacing: Sequence[float], orientation: str = "RAS") -> Path:
    """An array (I, J, K) of RAS axes, stored in another orientation."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])).as_reoriented(turn), path)
    return path


@pytest.mark.peer
@pytest.mark.parametrize("forward", [[0, 1, 2], [2, 0, 1]])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "SimpleITKIOWithReorient", "NibabelIOWithReorient"])
@pytest.mark.parametrize("stored", ["RAS", "LPI", "SAR", "PIL"])
def test_the_network_sees_the_axes_of_nnunets_reader(
    tmp_path: Path, reader: str, forward: list[int], stored: str
) -> None:
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed")
    package = {"N": "nibabel_reader_writer", "S": "simpleitk_reader_writer"}[reader[0]]
    known = getattr(importlib.import_module(f"nnunetv2.imageio.{package}"), reader)()
    array = np.arange(1, 2 * 3 * 4 + 1, dtype=np.int16).reshape(2, 3, 4)
    path = write_image(tmp_path / "image.nii.gz", array, (1.0, 1.5, 2.0), stored)
    theirs, _ = known.read_images([str(path)])
    kept = resampling("no_resampling_hack", data={}, seg={}, probabilities={})
    made = imported(
        tmp_path,
        settings_of(normalization_schemes=["NoNormalization"], **kept),
        plans={"image_reader_writer": reader, "transpose_forward": forward},
    )
    prepared = prepare(read_volume(path), made.plan, made.configuration)
    assert np.array_equal(prepared.image, theirs.transpose(0, *(axis + 1 for axis in forward)))


REGIONS = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
    "regions_class_order": [1, 2, 3],
}
SETUPS: dict[str, dict[str, Any]] = {
    "anisotropic": {
        "kind": "PlainConvUNet",
        "sizes": ANISOTROPIC,
        "settings": {"patch_size": [8, 32, 32], "spacing": [3.0, 0.7, 0.7]},
        "plans": {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]},
        "image": ((36, 12, 44), (0.8, 3.6, 0.6), "LPI"),
    },
    "pictures of slices": {
        "kind": "PlainConvUNet",
        "sizes": ISOTROPIC,
        "settings": {"patch_size": [24, 32], "spacing": [0.9, 0.7]},
        "image": ((40, 36, 5), (0.8, 0.8, 2.0), "LPS"),
    },
    "residual, regions, masked, by torch": {
        "kind": "ResidualEncoderUNet",
        "sizes": ISOTROPIC | {"kernel_sizes": [[3] * 3] * 3, "strides": [[1] * 3, [2] * 3, [2] * 3]},
        "settings": {
            "patch_size": [24, 24, 16],
            "spacing": [1.2, 1.0, 1.4],
            "normalization_schemes": ["ZScoreNormalization"] * 2,
            "use_mask_for_norm": [True] * 2,
            **resampling("resample_torch_fornnunet", data=TORCH, seg=TORCH | {"is_seg": True}, probabilities=TORCH),
        },
        "dataset": REGIONS,
        "image": ((30, 34, 22), (1.0, 1.0, 1.0), "RAS"),
    },
}


def blurring(network: nn.Module) -> dict[str, Tensor]:
    """Random weights whose masks have regions rather than noise: every kernel is a box."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if not isinstance(module, nn.Conv2d | nn.Conv3d):
                continue
            if max(module.kernel_size) > 1:
                flat = module.weight.mean(dim=tuple(range(2, module.weight.ndim)), keepdim=True)
                module.weight.copy_(flat * module.weight[0, 0].numel() ** 0.5)
            elif module.bias is not None:  # a head: no class is above the others everywhere
                module.weight -= module.weight.mean(dim=1, keepdim=True)
                module.bias.zero_()
    return network.state_dict()


def phantom(folder: Path, shape: tuple[int, ...], spacing: Sequence[float], stored: str, channels: int) -> list[Path]:
    """Smooth noise within an ellipsoid, which has a hole; 0 around it and in it."""
    inside = sum((2 * n / (size - 1) - 1) ** 2 for n, size in zip(np.indices(shape), shape, strict=True)) < 1.3
    inside[tuple(slice(n // 2 - 1, n // 2 + 1) for n in shape)] = False
    generator = np.random.default_rng(0)
    paths = []
    for channel in range(channels):
        noise = ndimage.gaussian_filter(generator.normal(size=shape), [1.5 / mm for mm in spacing])
        values = np.where(inside, 500 + 100 * noise / noise.std(), 0).astype(np.int16)
        paths.append(write_image(folder / f"case_{channel:04d}.nii.gz", values, spacing, stored))
    return paths


@pytest.mark.peer
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
@pytest.mark.filterwarnings("ignore")
def test_the_masks_of_nnunets_predictor(
    tmp_path: Path, setup: dict[str, Any], mirror: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net sums logits and rounds weights of tiles in half precision; here in full, so that only ties are left."""
    module = pytest.importorskip("nnunetv2.inference.predict_from_raw_data", reason="nnunetv2 is not installed")
    dims, channels = len(setup["settings"]["patch_size"]), 2 if "dataset" in setup else 1
    network = theirs(setup["kind"], dims, setup["sizes"], channels=channels)
    convs = {"n_conv_per_stage": [2] * len(setup["sizes"]["features"]), "n_conv_per_stage_decoder": 2}
    if setup["kind"] == "ResidualEncoderUNet":
        convs = {"n_blocks_per_stage": [1, 3, 4], "n_conv_per_stage_decoder": 1}
    body = architecture_of(dims, setup["kind"], n_stages=len(setup["sizes"]["features"]))
    del body["arch_kwargs"]["n_conv_per_stage"]
    body["arch_kwargs"] |= {"features_per_stage": setup["sizes"]["features"], **convs}
    body["arch_kwargs"] |= {name: setup["sizes"][name] for name in ("kernel_sizes", "strides")}
    intensities = {"foreground_intensity_properties_per_channel": {"0": INTENSITIES, "1": INTENSITIES}}
    folder = write_model(
        tmp_path / "model",
        settings_of(dims, architecture=body, **setup["settings"]),
        plans=intensities | setup.get("plans", {}),
        dataset=setup.get("dataset"),
        configuration="2d" if dims == 2 else "3d_fullres",
        state=blurring(network),
    )
    shape, spacing, stored = setup["image"]
    paths = phantom(tmp_path, shape, spacing, stored, channels)
    precise = functools.partial(module.compute_gaussian, dtype=torch.float32)
    precise.cache_clear = module.compute_gaussian.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "compute_gaussian", precise)
    predictor = module.nnUNetPredictor(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    with monkeypatch.context() as context:
        context.setattr(torch, "half", torch.float32)
        predictor.predict_from_files_sequential([list(map(str, paths))], [str(tmp_path / "known")])
    import_model(folder, tmp_path / "package")
    settings = PredictSettings(device="cpu", engine="eager", mirror=mirror)
    mask = Predictor(load_package(tmp_path / "package"), settings)(paths if channels > 1 else paths[0])
    known = read_mask(tmp_path / "known.nii.gz")
    assert np.unique(known.array, return_counts=True)[1].max() < 0.95 * known.array.size
    assert (mask.array != known.array).sum() <= 1e-4 * mask.array.size
    assert np.allclose(mask.geometry.affine, known.geometry.affine, atol=1e-5)
