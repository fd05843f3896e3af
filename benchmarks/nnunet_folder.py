"""A model folder of nnU-Net v2 out of a medseg package, so that both programs run the same weights.

    python benchmarks/nnunet_folder.py FOLDER --package PACKAGE
    python benchmarks/nnunet_folder.py FOLDER --classes 3 --features 8 16 32 --patch 32 32 32 --spacing 1 1 1
    nnUNetv2_predict_from_modelfolder -i IMAGES -o MASKS -m FOLDER -f 0 -device cpu

nnU-Net 2.8.1 loads it: ``plans.json``, ``dataset.json`` and ``fold_0/checkpoint_final.pth`` with the weights under its
own names, the inverse of ``medseg.interop.nnunet``. Without a package the weights are random. nnU-Net takes the axes of
an image as they are stored, so it sees what the package sees where images lie as the plan's ``orientation`` says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from medseg.networks import build_network
from medseg.package import FoldRecord, ModelPackage, load_package, save_package
from medseg.plan import Configuration, ConfigurationName, NetworkPlan, Normalisation, Plan, Resampling, TrainingPlan
from medseg.volume import Labels

CT = Normalisation(scheme="ct", mean=40.0, std=150.0, lower=-160.0, upper=240.0)
_SCHEMES = {
    "ct": "CTNormalization",
    "zscore": "ZScoreNormalization",
    "minmax": "RescaleTo01Normalization",
    "rgb": "RGBTo01Normalization",
    "none": "NoNormalization",
}
_BLOCKS = "dynamic_network_architectures.architectures.unet."


def plan_of(
    classes: int,
    features: Sequence[int],
    patch_size: Sequence[int],
    spacing_mm: Sequence[float],
    *,
    normalisation: Normalisation = CT,
    resampling: Resampling | None = None,
    axes: tuple[int, int, int] = (2, 1, 0),
) -> Plan:
    """A plan of one 3-D configuration; an axis coarser than twice the finest has no kernels or strides at first.

    ``classes`` counts the background; spacing and patch are in plan order, the last voxel axis first.
    """
    strides: list[tuple[int, ...]] = [(1, 1, 1)]
    kernels: list[tuple[int, ...]] = []
    spacing = list(spacing_mm)
    for _ in features:
        fine = tuple(mm < 2 * min(spacing) for mm in spacing)
        kernels.append(tuple(3 if is_fine else 1 for is_fine in fine))
        strides.append(tuple(2 if is_fine else 1 for is_fine in fine))
        spacing = [mm * step for mm, step in zip(spacing, strides[-1], strict=True)]
    network = NetworkPlan(features=tuple(features), kernel_sizes=tuple(kernels), strides=tuple(strides[:-1]))
    setup = Configuration(
        spatial_dims=3,
        spacing_mm=tuple(spacing_mm),
        median_shape=tuple(patch_size),
        patch_size=tuple(patch_size),
        batch_size=2,
        batch_dice=False,
        mirror_axes=(0, 1, 2),
        network=network,
        training=TrainingPlan(),
        estimated_memory_mb=1.0,
    )
    return Plan(
        dataset="Benchmark",
        fingerprint_digest="",
        device="cpu",
        memory_budget_mb=8192.0,
        axes=axes,
        channels=("CT" if normalisation.scheme == "ct" else "MRI",),
        normalisation=(normalisation,),
        resampling=resampling or Resampling(),
        labels=Labels(values={f"structure {n}": n for n in range(1, classes)}),
        configurations={"3d_fullres": setup},
    )


def random_weights(plan: Plan, configuration: ConfigurationName = "3d_fullres", seed: int = 0) -> dict[str, Tensor]:
    """Random weights whose masks have regions rather than noise: every kernel is a box, that blurs."""
    torch.manual_seed(seed)
    setup = plan.configuration(configuration)
    network = build_network(setup, plan.inputs(setup), plan.outputs)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv3d) and module.bias is not None:
                flat = module.weight.mean(dim=(2, 3, 4), keepdim=True)
                module.weight.copy_(flat.expand_as(module.weight) * module.weight[0, 0].numel() ** 0.5)
                nn.init.normal_(module.bias, std=0.1)
    return network.state_dict()


def random_package(folder: Path, plan: Plan) -> ModelPackage:
    """A package of a plan with random weights."""
    record = FoldRecord(weights="", seed=0, iterations=0, seconds=0, train_cases=0, validation_cases=0)
    content = safetensors.torch.save(random_weights(plan))
    save_package(folder, "random weights", plan, "3d_fullres", {0: record}, {0: content}, {})
    return load_package(folder)


def write_model_folder(
    folder: Path,
    plan: Plan,
    configuration: ConfigurationName,
    weights: Mapping[int, Mapping[str, Tensor]],
    mirror_axes: Sequence[int] | None = None,
) -> Path:
    """Write a model as nnU-Net keeps it.

    Args:
        folder: for the files.
        plan: with labels 1, 2, 3, ...
        configuration: that the weights are of: a U-Net or residual U-Net.
        weights: of each fold.
        mirror_axes: that nnU-Net may mirror; by default the plan's.

    Returns:
        ``folder``.

    Raises:
        ValueError: nnU-Net cannot say what the plan says.
    """
    if sorted(plan.labels.values.values()) != list(range(1, plan.labels.count)) or plan.region_order:
        raise ValueError(f"nnU-Net's labels are 1, 2, 3, ..., not {dict(plan.labels.values)}")
    setup = plan.configuration(configuration)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(_plans(plan), indent=2))
    (folder / "dataset.json").write_text(json.dumps(_dataset(plan), indent=2))
    axes = tuple(setup.mirror_axes if mirror_axes is None else mirror_axes)
    for number, state in weights.items():
        checkpoint = {
            "network_weights": _peer_weights(state, setup, plan.outputs),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": configuration},
            "inference_allowed_mirroring_axes": axes or None,
        }
        (folder / f"fold_{number}").mkdir(exist_ok=True)
        torch.save(checkpoint, folder / f"fold_{number}" / "checkpoint_final.pth")
    return folder


def _dataset(plan: Plan) -> dict[str, Any]:
    return {
        "channel_names": {str(n): name for n, name in enumerate(plan.channels)},
        "labels": {"background": 0, **plan.labels.values},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }


def _plans(plan: Plan) -> dict[str, Any]:
    forward = [2 - axis for axis in plan.axes]  # its arrays are (K, J, I)
    intensities = {
        str(n): {
            "mean": rule.mean,
            "std": rule.std,
            "median": rule.mean,
            "percentile_00_5": rule.lower,
            "percentile_99_5": rule.upper,
            "min": rule.lower,
            "max": rule.upper,
        }
        for n, rule in enumerate(plan.normalisation)
    }
    return {
        "dataset_name": f"Dataset999_{plan.dataset}",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [1, 1, 1],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": intensities,
        "configurations": {name: _configuration(plan, setup) for name, setup in plan.configurations.items()},
    }


def _configuration(plan: Plan, setup: Configuration) -> dict[str, Any]:
    rule = plan.resampling
    separate = {"auto": None, "always": True, "never": False}[rule.separate]

    def kwargs(is_seg: bool, order: int, along_low: int) -> dict[str, Any]:
        return {"is_seg": is_seg, "order": order, "order_z": along_low, "force_separate_z": separate}

    body = {
        "data_identifier": "benchmark",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": setup.batch_size,
        "patch_size": list(setup.patch_size),
        "median_image_size_in_voxels": list(setup.median_shape)[3 - setup.spatial_dims :],
        "spacing": list(setup.spacing_mm)[3 - setup.spatial_dims :],
        "normalization_schemes": [_SCHEMES[n.scheme] for n in plan.normalisation],
        "use_mask_for_norm": [n.nonzero_only for n in plan.normalisation],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": kwargs(False, rule.image, rule.image_along_low),
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": kwargs(True, rule.label, rule.label_along_low),
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": kwargs(False, rule.logits, rule.logits_along_low),
        "batch_dice": setup.batch_dice,
        "architecture": _architecture(setup),
    }
    return body | ({"previous_stage": setup.previous} if setup.previous else {})


def _architecture(setup: Configuration) -> dict[str, Any]:
    network, dims = setup.network, setup.spatial_dims
    stages = len(network.features)
    residual = _is_residual(setup)
    kind, convs = ("ResidualEncoderUNet", "n_blocks") if residual else ("PlainConvUNet", "n_conv")
    kwargs = {
        "n_stages": stages,
        "features_per_stage": list(network.features),
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [list(size) for size in network.kernel_sizes],
        "strides": [list(step) for step in network.strides],
        f"{convs}_per_stage": _each(network.convs_per_stage, stages),
        "n_conv_per_stage_decoder": _each(network.decoder_convs, stages - 1)[::-1],  # from the bottom
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    imported = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    return {"network_class_name": _BLOCKS + kind, "arch_kwargs": kwargs, "_kw_requires_import": imported}


def _is_residual(setup: Configuration) -> bool:
    network = setup.network
    form = (network.downsampling, network.norm, network.act, network.dropout)
    if network.name not in ("unet", "residual_unet") or form != ("stride", "instance", "leakyrelu", 0.0):
        raise ValueError(f"nnU-Net has no network {network.name} with {form}")
    return network.name == "residual_unet"


def _each(numbers: int | Sequence[int], stages: int) -> list[int]:
    return [numbers] * stages if isinstance(numbers, int) else list(numbers)


def _peer_weights(weights: Mapping[str, Tensor], setup: Configuration, outputs: int) -> dict[str, Tensor]:
    """The weights under every name that nnU-Net has for them, and heads of deep supervision where there are none."""
    levels, residual = len(setup.network.features) - 1, _is_residual(setup)
    state = {name: w.clone() for ours, w in weights.items() for name in _peer_names(ours, levels, residual)}
    for level in range(levels):
        name = f"decoder.seg_layers.{levels - 1 - level}"
        shape = (outputs, setup.network.features[level], *[1] * setup.spatial_dims)
        state.setdefault(f"{name}.weight", torch.zeros(shape))
        state.setdefault(f"{name}.bias", torch.zeros(outputs))
    return state


def _peer_names(ours: str, levels: int, residual: bool) -> Iterator[str]:
    """Each layer stands in its block and in the block's list, and the encoder also within the decoder."""
    name = _peer_name(ours.split("."), levels, residual)
    listed = name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
    for one in dict.fromkeys((name, listed)):
        yield one
        if one.startswith("encoder."):
            yield f"decoder.{one}"


def _peer_name(ours: Sequence[str], levels: int, residual: bool) -> str:
    match ours:
        case ["encoder", "0", "0", *rest] if residual:
            parts = ["encoder", "stem", "convs", "0", *rest]
        case ["encoder", stage, place, part, *rest] if residual:
            block = int(place) - (stage == "0")  # the stem comes before the first stage's blocks
            part = {"first": "conv1", "second": "conv2"}.get(part, part)
            parts = ["encoder", "stages", stage, "blocks", str(block), part, *rest]
        case ["encoder", stage, conv, *rest]:
            parts = ["encoder", "stages", stage, "0", "convs", conv, *rest]
        case ["decoder", level, conv, *rest]:
            parts = ["decoder", "stages", str(levels - 1 - int(level)), "convs", conv, *rest]
        case [kind, level, *rest]:
            layers = {"upsample": "transpconvs", "heads": "seg_layers"}[kind]
            parts = ["decoder", layers, str(levels - 1 - int(level)), *rest]
        case _:
            raise ValueError(f"nnU-Net has no weight for {'.'.join(ours)}")
    return ".".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package", type=Path, help="medseg package; else random weights")
    parser.add_argument("--classes", type=int, default=3, help="with the background")
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 32, 32])
    parser.add_argument("--spacing", type=float, nargs=3, default=[1.0, 1.0, 1.0])
    parser.add_argument("--mirror-axes", type=int, nargs="*")
    args = parser.parse_args()
    if args.package:
        package = load_package(args.package)
        plan, configuration, weights = package.plan, package.manifest.configuration, package.weights
    else:
        plan, configuration = plan_of(args.classes, args.features, args.patch, args.spacing), "3d_fullres"
        weights = {0: random_weights(plan)}
    print(write_model_folder(args.folder, plan, configuration, weights, args.mirror_axes))


if __name__ == "__main__":
    main()
