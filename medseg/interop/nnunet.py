"""nnU-Net's models run here: a model folder of nnU-Net v2 becomes an ordinary package.

A model folder has ``plans.json``, ``dataset.json`` and ``fold_*/checkpoint_final.pth``. They are read, never run:
weights are unpickled by torch with ``weights_only`` and an explicit list of harmless types, the pickle of its
postprocessing not at all. What a package cannot express is refused by its name.

nnU-Net's PlainConvUNet is our ``UNet``, its ResidualEncoderUNet our ``ResidualUNet``: with features, kernels, strides
and numbers of convolutions (blocks) of its plan they have the same layers in the same places. Its arrays are
(K, J, I) where ours are (I, J, K).

Read in nnU-Net 2.8.1: ``plans_handler.py``, ``label_handling.py``, ``default_preprocessor.py``,
``default_resampling.py``, ``resample_torch.py`` and ``predict_from_raw_data.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

import medseg
from medseg.errors import InputError, PackageError
from medseg.geometry import Geometry
from medseg.networks import UNet, build_network
from medseg.package import MOST_COMPRESSED, FoldRecord, Manifest, ModelPackage, write_package
from medseg.plan import ConfigurationName, Plan
from medseg.planning import estimated

Source = Path | zipfile.Path
Body = Mapping[str, Any]
PLANS, DATASET = "plans.json", "dataset.json"
FINAL = "checkpoint_final.pth"

_READERS = {
    "SimpleITKIO": "stored",
    "NibabelIO": "stored",
    "NaturalImage2DIO": "stored",
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}
"""Orientation of the arrays that nnU-Net's readers give, once their axes are reversed."""
_SCHEMES = {
    "CTNormalization": "ct",
    "ZScoreNormalization": "zscore",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "minmax",
    "RGBTo01Normalization": "rgb",
}
_KINDS = {
    "PlainConvUNet": ("unet", "n_conv_per_stage"),
    "ResidualEncoderUNet": ("residual_unet", "n_blocks_per_stage"),
}
_SEPARATE = {None: "auto", True: "always", False: "never"}
_ANISOTROPY = 3.0  # nnU-Net's ANISO_THRESHOLD
_SHOWN = 3
_FOLD = re.compile("fold_(0|[1-9][0-9]*|all)")


def import_model(
    folder: Path,
    out: Path,
    *,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = FINAL,
    previous: Path | None = None,
    orientation: str = "stored",
    name: str | None = None,
) -> Manifest:
    """Write a package with the weights and the plan of a model of nnU-Net v2.

    Args:
        folder: the model folder, with ``plans.json``; or a zip of ``nnUNetv2_export_model_to_zip`` that holds one.
        out: folder of the package.
        folds: by number, or "all" for nnU-Net's ``fold_all``, which was trained on all cases; by default every numbered
            fold that is there, or else ``fold_all``.
        checkpoint: name of its file in the folder of a fold.
        previous: of a cascade, the model folder of its low-resolution stage; the same folds of it are taken.
        orientation: of the images that the model was trained on, where all were stored in one ("RAS" for
            TotalSegmentator's): images in another are turned to it. ``stored`` takes the axes as they lie in the file,
            as nnU-Net does.
        name: of the package; by default the dataset's.

    Returns:
        What the package has; its ``notes`` are for whoever imports.

    Raises:
        PackageError: a file is missing, damaged, or holds what is not plain weights; or the model has something that a
            package cannot express.
        InputError: no such orientation, or another than the one that the model's reader turns images to.
        PlanError: sizes that our networks cannot have.
    """
    model = _read(folder, folds, checkpoint, orientation)
    stage = model.settings.get("previous_stage")
    if stage is None:
        if previous is not None:
            raise PackageError(folder, f"{model.configuration} is no cascade", "no previous model")
        return write_package(_packed(model, name), out)
    if previous is None:
        raise PackageError(
            folder, f"{model.configuration} is a cascade", f"a model of {stage} before it", "name its folder too"
        )
    earlier = _read(previous, folds, checkpoint, orientation)
    if earlier.configuration != stage:
        raise PackageError(previous, f"is a model of {earlier.configuration}", f"of {stage}")
    # nnU-Net hands the masks of the first stage on as they are
    first = _packed(replace(earlier, keep_largest=()), name)
    return write_package(_packed(model, name, first), out)


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Checkpoint(NamedTuple):
    """What of a checkpoint is used: weights, and as nnU-Net's predictor takes them from it, three facts."""

    weights: Mapping[str, Tensor]
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]


@dataclass(frozen=True)
class _Model:
    """A model folder as read: by fold its weights and their record; the JSON files; what they say about the rest."""

    where: str
    plans: Body
    dataset: Body
    settings: Body
    checkpoints: Mapping[str, _Checkpoint]
    records: Mapping[str, FoldRecord]
    orientation: str
    keep_largest: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    fingerprint_digest: str

    @property
    def first(self) -> _Checkpoint:
        return next(iter(self.checkpoints.values()))

    @property
    def configuration(self) -> str:
        """nnU-Net's name of it."""
        return self.first.configuration


def _read(folder: Path, folds: Sequence[int | str] | None, checkpoint: str, orientation: str) -> _Model:
    with _opened(folder) as source:
        plans, dataset = _json(source / PLANS), _json(source / DATASET)
        chosen = _chosen(source, folds, checkpoint)
        checkpoints = {fold: _load(path) for fold, path in chosen.items()}
        names = {c.configuration for c in checkpoints.values()}
        if len(names) > 1:
            raise PackageError(source, f"its folds are of {' and '.join(sorted(names))}", "one configuration")
        keep, note = _postprocessing(source, list(chosen))
        fingerprint = source / "dataset_fingerprint.json"
        return _Model(
            where=str(source / PLANS),
            plans=plans,
            dataset=dataset,
            settings=_settings(plans, names.pop(), str(source / PLANS)),
            checkpoints=checkpoints,
            records={fold: _record(path, fold, checkpoint) for fold, path in chosen.items()},
            orientation=_orientation(plans, orientation, str(source / PLANS)),
            keep_largest=keep,
            notes=note,
            fingerprint_digest=hashlib.sha256(_bytes(fingerprint)).hexdigest() if fingerprint.is_file() else "",
        )


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Source]:
    """The folder that has ``plans.json``: this one, or the only one in a zip, of which nothing is unpacked to disk."""
    if (folder / PLANS).is_file():
        yield folder
    elif folder.is_dir():
        below = [str(path.parent) for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/{PLANS}"))]
        raise PackageError(folder, f"has no {PLANS}", " or ".join(below) or "a model folder of nnU-Net")
    else:
        try:
            archive = zipfile.ZipFile(folder)
        except (OSError, zipfile.BadZipFile) as failure:
            raise PackageError(folder, f"cannot be read: {failure}", "a model folder of nnU-Net, or a zip") from None
        with archive:
            yield zipfile.Path(archive, at=_model_in(archive, folder))


def _model_in(archive: zipfile.ZipFile, path: Path) -> str:
    members = archive.infolist()
    whole = sum(info.file_size for info in members)
    if whole > MOST_COMPRESSED * max(1, sum(info.compress_size for info in members)):
        raise PackageError(path, f"unpacks to {whole:,} bytes", "weights and JSON")
    models = [str(PurePosixPath(info.filename).parent) for info in members if _is_plans(info.filename)]
    if len(models) != 1:
        found = f"holds {len(models)} models ({', '.join(models)})"
        raise PackageError(path, found, f"one {PLANS}", "unpack it, and give the folder of one of them")
    return "" if models[0] == "." else f"{models[0]}/"


def _is_plans(name: str) -> bool:
    return PurePosixPath(name).name == PLANS


def _bytes(path: Source) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as failure:  # RuntimeError: encrypted
        raise PackageError(path, f"cannot be read: {failure}", "a file of nnU-Net's model folder") from None


def _json(path: Source) -> dict[str, Any]:
    try:
        body = json.loads(_bytes(path))
    except ValueError as failure:
        raise PackageError(path, f"is no JSON: {failure}") from None
    if not isinstance(body, dict):
        raise PackageError(path, f"holds a JSON {type(body).__name__}", "a JSON object")
    return body


def _chosen(source: Source, folds: Sequence[int | str] | None, checkpoint: str) -> dict[str, Source]:
    """The checkpoints to read, by fold."""
    there = {child.name.removeprefix("fold_"): child for child in source.iterdir() if _FOLD.fullmatch(child.name)}
    found = {fold: child / checkpoint for fold, child in sorted(there.items()) if (child / checkpoint).is_file()}
    wanted = [str(fold) for fold in folds] if folds else [fold for fold in found if fold != "all"] or list(found)
    missing = [f"fold_{fold}/{checkpoint}" for fold in wanted if fold not in found]
    if missing or not wanted:
        files = (f"{child.name}/{file.name}" for child in there.values() for file in child.iterdir())
        listed = " or ".join(sorted(name for name in files if name.endswith(".pth")))
        found_there = f"has no {', '.join(missing) or f'fold_*/{checkpoint}'}"
        raise PackageError(source, found_there, listed or "a checkpoint", "choose folds and checkpoint that are there")
    return {fold: found[fold] for fold in wanted}


_scalar = np.float64(0).__reduce__()[0]  # numpy's own, whose module has had two names
_HARMLESS: list[Any] = [
    np.dtype,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)),
]
"""What a checkpoint that nnU-Net's trainer wrote holds beside tensors and plain values: the scalars of its log."""


def _load(path: Source) -> _Checkpoint:
    content = _bytes(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as failure:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(failure))
        raise PackageError(
            path,
            f"holds {culprit[1] if culprit else 'an instruction'}, which could run code, and was not loaded",
            "tensors, numbers and text",
            "where you trust it, save its network_weights, trainer_name, init_args and "
            "inference_allowed_mirroring_axes again with torch.save",
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as failure:
        raise PackageError(path, f"is no checkpoint: {failure}", "a file of torch.save", "copy it again") from None
    try:
        weights = {_unwrapped(name): tensor.detach() for name, tensor in state["network_weights"].items()}
        return _Checkpoint(
            weights={
                name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()
            },
            trainer=str(state["trainer_name"]),
            configuration=str(state["init_args"]["configuration"]),
            mirror_axes=tuple(int(axis) for axis in state.get("inference_allowed_mirroring_axes") or ()),
        )
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as failure:
        found = f"is no checkpoint of nnU-Net v2: {type(failure).__name__} {failure}"
        raise PackageError(path, found, "network_weights, trainer_name and init_args") from None


def _unwrapped(name: str) -> str:
    """The name of a weight without what DistributedDataParallel and torch.compile put before it."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)


def _record(path: Source, fold: str, checkpoint: str) -> FoldRecord:
    """What is known about a fold: the Dice of nnU-Net's validation, which is of the final checkpoint.

    ``fold_all`` has none: its validation is on the cases that it was trained on.
    """
    said = FoldRecord(weights="", precision=None, source=f"fold_{fold}/{checkpoint}")
    summary = cast(Source, path.parent) / "validation" / "summary.json"
    if fold == "all" or checkpoint != FINAL or not summary.is_file():
        return said
    body = _json(summary)
    with _understood(str(summary)):
        dice = body.get("foreground_mean", {}).get("Dice")
        cases = len(body.get("metric_per_case", ()))
        known = dice is not None and math.isfinite(dice)
        return said.model_copy(update={"dice": dice if known else None, "validation_cases": cases or None})


def _postprocessing(source: Source, folds: Sequence[str]) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """The steps of the cross-validation of these folds, or else of the only one; and a note where there are none."""
    prefix = "crossval_results_folds_"
    found = {child.name: child for child in source.iterdir() if child.name.startswith(prefix)}
    own = prefix + "_".join(folds)
    if not found:
        return (), ()
    if own not in found and len(found) > 1:
        return (), (f"No postprocessing: there are {', '.join(sorted(found))}, and no {own}",)
    chosen = found.get(own) or next(iter(found.values()))
    file = chosen / "postprocessing.json"
    if file.is_file():
        body = _json(file)
        with _understood(str(file)):
            steps = zip(body["postprocessing_fns"], body["postprocessing_kwargs"], strict=True)
            return tuple(_group(function, kwargs, file) for function, kwargs in steps), ()
    if (chosen / "postprocessing.pkl").is_file():
        return (), (f"No postprocessing: {chosen.name} has it as a pickle alone, which is not read",)
    return (), ()


def _group(function: str, kwargs: Body, file: Source) -> tuple[int, ...]:
    known = "remove_all_but_largest_component_from_segmentation"
    if function != known or kwargs.keys() - {"labels_or_regions", "background_label"}:
        raise PackageError(file, f"has the step {function} with {', '.join(kwargs)}", known)
    if kwargs.get("background_label", 0) != 0:
        raise PackageError(file, f"writes {kwargs['background_label']} in place of what it removes", "0")
    return tuple(_integers(kwargs["labels_or_regions"]))


def _integers(nested: Any) -> list[int]:
    """A label, a region, or a list of both."""
    return [n for part in nested for n in _integers(part)] if isinstance(nested, list | tuple) else [int(nested)]


def _settings(plans: Body, name: str, where: str) -> dict[str, Any]:
    """A configuration with what it inherits."""
    with _understood(where):
        configurations, chain = plans["configurations"], [name]
        while chain[-1] in configurations and "inherits_from" in configurations[chain[-1]]:
            chain.append(configurations[chain[-1]]["inherits_from"])
            if chain[-1] in chain[:-1]:
                raise PackageError(where, f"{' inherits from '.join(chain)}", "no circle")
        if chain[-1] not in configurations:
            raise PackageError(where, f"has no configuration {chain[-1]!r}", " or ".join(configurations))
        return {key: value for link in reversed(chain) for key, value in configurations[link].items()}


@contextlib.contextmanager
def _understood(where: str) -> Iterator[None]:
    """Whatever is not of the form in which nnU-Net writes it is a fault of the file."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as failure:
        found = f"is not as nnU-Net v2 writes it: {type(failure).__name__} {failure}"
        raise PackageError(where, found, "the file beside the checkpoints") from failure


def _orientation(plans: Body, wanted: str, where: str) -> str:
    reader = str(plans.get("image_reader_writer"))
    if reader not in _READERS:
        raise PackageError(where, f"images are read by {reader}", " or ".join(_READERS))
    own = _READERS[reader]
    if wanted != "stored":
        try:
            Geometry((1, 1, 1), np.eye(4)).to(wanted)
        except ValueError as failure:
            raise InputError("orientation", str(failure), "three letters, or stored") from None
        if own not in ("stored", wanted):
            raise InputError("orientation", f"is {wanted}", f"{own}, to which {reader} turns images")
        return wanted
    return own


# ---- a package -------------------------------------------------------------------------------------------------------


def _packed(model: _Model, name: str | None, previous: ModelPackage | None = None) -> ModelPackage:
    with _understood(model.where):
        plan = _plan(model, previous)
    ((ours, setup),) = plan.configurations.items()
    with torch.device("meta"):
        network = cast(UNet, build_network(setup, plan.inputs(setup), plan.outputs))
    numbers = _numbers(model.checkpoints)
    weights = {numbers[fold]: network_weights(c.weights, network) for fold, c in model.checkpoints.items()}
    source = (
        f"From nnU-Net v2: {plan.dataset}, {model.plans.get('plans_name')}, {model.configuration}, trained by "
        f"{model.first.trainer}; {', '.join(str(record.source) for record in model.records.values())}"
    )
    reference = model.dataset.get("reference")
    said = {"licence": str(licence)} if (licence := model.dataset.get("licence", model.dataset.get("license"))) else {}
    manifest = Manifest(
        name=name or plan.dataset,
        configuration=ours,
        plan="",
        folds={numbers[fold]: record for fold, record in model.records.items()},
        files={},
        versions={"medseg": medseg.__version__},
        notes=(source, *([f"Data: {reference}"] if reference else []), *model.notes),
        **said,
    )
    return ModelPackage(manifest, plan, weights, previous)


def _numbers(folds: Mapping[str, Any]) -> dict[str, int]:
    """Folds by number; ``all`` takes the first that is free."""
    numbers = {fold: int(fold) for fold in folds if fold.isdecimal()}
    free = next(n for n in range(len(folds)) if n not in numbers.values()) if len(numbers) < len(folds) else 0
    return {fold: numbers.get(fold, free) for fold in folds}


def _plan(model: _Model, previous: ModelPackage | None) -> Plan:
    plans, settings = model.plans, model.settings
    _refuse_other("label_manager", plans.get("label_manager"), (None, "LabelManager"))
    _refuse_other("preprocessor_name", settings.get("preprocessor_name"), (None, "DefaultPreprocessor"))
    earlier = previous.manifest.configuration if previous else None
    labels, region_order = _labels(model.dataset)
    if previous is not None and dict(previous.plan.labels.values) != labels["values"]:
        raise PackageError(
            model.where, f"labels are {labels['values']}", f"those before, {previous.plan.labels.values}"
        )
    resampling, is_resampled = _resampling(settings, earlier is not None)
    dims = len(settings["patch_size"])
    ours = _our_name(model.configuration, dims, earlier is not None)
    setup = {
        "spatial_dims": dims,
        "spacing_mm": _leading(settings["spacing"] if is_resampled else [], [None, None, None]),
        "median_shape": _leading(
            [max(1, round(n)) for n in settings["median_image_size_in_voxels"]],
            [max(1, round(n)) for n in plans.get("original_median_shape_after_transp", (1, 1, 1))],
        ),
        "patch_size": settings["patch_size"],
        "batch_size": settings["batch_size"],
        "batch_dice": settings["batch_dice"],
        "mirror_axes": model.first.mirror_axes,
        "network": _network(settings, dims, model.first.trainer),
        "training": {"loss": "bce_dice" if region_order else "dice_ce"},
        "estimated_memory_mb": 1.0,
        "previous": earlier,
    }
    body = {
        "dataset": str(plans["dataset_name"]),
        "fingerprint_digest": model.fingerprint_digest,
        "device": "gpu",
        "memory_budget_mb": 1.0,
        "orientation": model.orientation,
        "axes": [2 - axis for axis in plans["transpose_forward"]],
        "channels": _channels(model.dataset),
        "normalisation": _normalisation(plans, settings),
        "resampling": resampling,
        "labels": labels,
        "region_order": region_order,
        "keep_largest": model.keep_largest,
        "configurations": {ours: setup},
        "reasons": _reasons(model, ours),
    }
    plan = Plan.checked(body, model.where, PackageError)
    made = estimated(plan, plan.configurations[ours])
    return plan.model_copy(
        update={"configurations": {ours: made}, "memory_budget_mb": math.ceil(made.estimated_memory_mb)}
    )


def _leading(given: Sequence[Any], usual: Sequence[Any]) -> list[Any]:
    """Three entries: those of a configuration of two dimensions come last."""
    return [*usual[: 3 - len(given)], *given]


def _our_name(name: str, dims: int, is_cascaded: bool) -> ConfigurationName:
    """Of a configuration with a name of its own, what it is by its dimensions."""
    if dims == 2:
        return "2d"
    if is_cascaded:
        return "3d_cascade_fullres"
    return "3d_lowres" if name.startswith("3d_lowres") else "3d_fullres"


def _reasons(model: _Model, ours: str) -> dict[str, str]:
    plans = f"nnU-Net's plans ({model.plans.get('plans_name')}, {model.configuration})"
    given = {
        "orientation": f"Images are read by {model.plans['image_reader_writer']}.",
        "axes": f"transpose_forward of {plans}, whose arrays are (K, J, I).",
        "resampling": f"As in {plans}.",
        "normalisation": f"As in {plans}.",
        "memory_budget_mb": "What a training step is estimated to take; the plans do not say it.",
    }
    setup = {
        "spacing_mm": f"As in {plans}.",
        "patch_size": f"As in {plans}.",
        "mirror_axes": "inference_allowed_mirroring_axes of the checkpoint.",
        "network": f"As in {plans}; the heads of deep supervision are left out.",
        "training": f"nnU-Net's recipe; the weights were trained by {model.first.trainer}.",
    }
    return given | {f"configurations.{ours}.{field}": text for field, text in setup.items()}


def _refuse_other(what: str, found: Any, expected: Sequence[Any]) -> None:
    if found not in expected:
        raise PackageError(
            f"nnU-Net's {what}", f"is {found!r}", " or ".join(repr(e) for e in expected if e is not None)
        )


def _channels(dataset: Body) -> list[str]:
    named = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    return [str(named[key]) for key in sorted(named, key=int)]


def _labels(dataset: Body) -> tuple[dict[str, Any], list[int]]:
    """Labels, and the order in which regions are painted; nnU-Net's regions are all entries but the background.

    An integer that only regions have is named after itself.
    """
    given = {name: tuple(_integers(members)) for name, members in dataset["labels"].items() if name != "ignore"}
    marked = {name: members for name, members in given.items() if set(members) != {0}}
    if any(0 in members for members in marked.values()):
        raise PackageError(f"{DATASET}, labels", "a region holds the background", "regions of labels")
    alone = {members[0]: name for name, members in reversed(marked.items()) if len(members) == 1}
    numbers = sorted({n for members in marked.values() for n in members})
    labels = {"values": {alone.get(n, f"label {n}"): n for n in numbers}, "ignore": dataset["labels"].get("ignore")}
    if all(len(members) == 1 for members in marked.values()):
        return labels, []
    if not dataset.get("regions_class_order"):
        raise PackageError(f"{DATASET}, regions_class_order", "is missing", "an integer for each region")
    return {**labels, "regions": marked}, _integers(dataset["regions_class_order"])


def _normalisation(plans: Body, settings: Body) -> list[dict[str, Any]]:
    name = "foreground_intensity_properties_per_channel"
    measured = plans.get(name) or plans.get("foreground_intensity_properties_by_modality") or {}
    masks = settings["use_mask_for_norm"]
    rules = []
    for channel, (scheme, is_masked) in enumerate(zip(settings["normalization_schemes"], masks, strict=True)):
        _refuse_other("normalization_schemes", scheme, tuple(_SCHEMES))
        rule: dict[str, Any] = {"scheme": _SCHEMES[scheme]}
        if rule["scheme"] == "ct":
            keys = {"mean": "mean", "std": "std", "lower": "percentile_00_5", "upper": "percentile_99_5"}
            rule |= {ours: measured[str(channel)][theirs] for ours, theirs in keys.items()}
        if rule["scheme"] == "zscore":
            rule["nonzero_only"] = bool(is_masked)
        rules.append(rule)
    return rules


class _Spline(NamedTuple):
    """A resampling function with its arguments; where an axis of low resolution has an order of its own."""

    order: int
    along_low: int
    where: tuple[str, float]


def _resampling(settings: Body, is_cascaded: bool) -> tuple[dict[str, Any], bool]:
    """Our resampling, and whether images are resampled at all. Labels are in a cascade alone."""
    image, logits = _spline(settings, "data", (0, 1, 3)), _spline(settings, "probabilities", (0, 1))
    if image is None:
        return {}, False
    label = _spline(settings, "seg", (0, 1)) if is_cascaded else None
    if logits is None or (is_cascaded and label is None):
        raise PackageError("nnU-Net's resampling", "is of images alone", "of the network's output and labels too")
    body = {"image": image.order, "image_along_low": image.along_low, "logits": logits.order}
    body["logits_along_low"] = logits.along_low
    others = [logits]
    if label is not None:
        body |= {"label": label.order, "label_along_low": label.along_low}
        others.append(label)
    for other in others:
        _refuse_other("force_separate_z and threshold", other.where, [image.where])
    separate, anisotropy = image.where
    return {**body, "separate": separate, "anisotropy": anisotropy}, True


def _spline(settings: Body, kind: str, orders: tuple[int, ...]) -> _Spline | None:
    """The resampling of images (data), labels (seg) or logits (probabilities); None for none."""
    name, given = settings[f"resampling_fn_{kind}"], settings[f"resampling_fn_{kind}_kwargs"]
    what = f"resampling_fn_{kind}"
    _refuse_other(what, name, ("resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"))
    if name == "no_resampling_hack":
        return None
    default: dict[str, Any] = {"is_seg": False, "separate_z_anisotropy_threshold": _ANISOTROPY}
    if name == "resample_torch_fornnunet":
        default |= {"force_separate_z": None, "memefficient_seg_resampling": False, "num_threads": 4}
        default |= {"mode": "linear", "aniso_axis_mode": "nearest-exact"}
    else:
        default |= {"force_separate_z": False, "order": 3, "order_z": 0}
    for unknown in given.keys() - default.keys():
        raise PackageError(f"nnU-Net's {what}", f"{name} has the argument {unknown!r}", ", ".join(sorted(default)))
    used = default | given
    _refuse_other(f"{what}, is_seg", used["is_seg"], (kind == "seg",))
    separate = _SEPARATE[used["force_separate_z"]]
    where = (separate, float(used["separate_z_anisotropy_threshold"]) if separate == "auto" else _ANISOTROPY)
    if name == "resample_torch_fornnunet":
        _refuse_other(f"{what}, mode", used["mode"], ("linear",))
        _refuse_other(f"{what}, memefficient_seg_resampling", used["memefficient_seg_resampling"], (False,))
        along = {"nearest-exact": 0, "linear": 1}
        _refuse_other(f"{what}, aniso_axis_mode", used["aniso_axis_mode"], tuple(along))
        return _Spline(1, along[used["aniso_axis_mode"]], where)
    _refuse_other(f"{what}, order", used["order"], orders)
    _refuse_other(f"{what}, order_z", used["order_z"], orders)
    return _Spline(used["order"], used["order_z"], where)


# ---- the network -----------------------------------------------------------------------------------------------------


def _network(settings: Body, dims: int, trainer: str) -> dict[str, Any]:
    """Our network plan; of a trainer that changes the network, as nnU-Net's own does with batch norm."""
    kind, given = _architecture(settings, dims)
    _refuse_other("architecture", kind, tuple(_KINDS))
    name, convs = _KINDS[kind]
    stages = given["n_stages"]
    if trainer == "nnUNetTrainerBN":
        given = {**given, "norm_op": f"BatchNorm{dims}d"}
    features = _each(given["features_per_stage"], stages)
    neutral = {
        "conv_op": (f"Conv{dims}d",),
        "conv_bias": (True,),
        "block": (None, "BasicBlockD"),
        "bottleneck_channels": (None,),
        "stem_channels": (None, features[0]),
        "nonlin_first": (None, False),
    }
    for argument, expected in neutral.items():
        _refuse_other(f"architecture, {argument}", _last(given.get(argument)), expected)
    known = {"n_stages", "features_per_stage", "kernel_sizes", "strides", convs, "n_conv_per_stage_decoder", *neutral}
    known |= {f"{part}{end}" for part in ("norm_op", "dropout_op", "nonlin") for end in ("", "_kwargs")}
    for unknown in given.keys() - known - {"deep_supervision"}:
        raise PackageError(f"nnU-Net's architecture, {unknown}", f"is {given[unknown]!r}", ", ".join(sorted(known)))
    decoder = _each(given["n_conv_per_stage_decoder"], stages - 1)
    return {
        "name": name,
        "features": features,
        "kernel_sizes": [_each(size, dims) for size in _each(given["kernel_sizes"], stages)],
        "strides": [_each(step, dims) for step in _each(given["strides"], stages)],
        "convs_per_stage": _each(given[convs], stages),
        "decoder_convs": decoder[::-1],  # nnU-Net's decoder begins at the bottom
        "norm": _norm(given, dims),
        "act": _act(given),
        "dropout": _dropout(given, dims),
        "deep_supervision": False,
    }


def _architecture(settings: Body, dims: int) -> tuple[str, Body]:
    """Name of the network and its arguments; plans before version 2.4 say less, as all their networks were alike."""
    if "architecture" in settings:
        body = settings["architecture"]
        return str(_last(body["network_class_name"])), body["arch_kwargs"]
    kind, convs = str(settings["UNet_class_name"]), settings["n_conv_per_stage_encoder"]
    first, most = settings["UNet_base_num_features"], settings["unet_max_num_features"]
    return kind, {
        "n_stages": len(convs),
        "features_per_stage": [min(first * 2**stage, most) for stage in range(len(convs))],
        "conv_op": f"Conv{dims}d",
        "kernel_sizes": settings["conv_kernel_sizes"],
        "strides": settings["pool_op_kernel_sizes"],
        _KINDS.get(kind, ("", "n_conv_per_stage"))[1]: convs,
        "n_conv_per_stage_decoder": settings["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "nonlin": "LeakyReLU",
    }


def _norm(given: Body, dims: int) -> str:
    kinds = {f"InstanceNorm{dims}d": "instance", f"BatchNorm{dims}d": "batch"}
    norm = _last(given.get("norm_op"))
    _refuse_other("architecture, norm_op", norm, tuple(kinds))
    used = {"eps": 1e-05, "affine": kinds[norm] == "batch"} | (given.get("norm_op_kwargs") or {})
    _refuse_other("architecture, norm_op_kwargs", used, ({"eps": 1e-05, "affine": True},))
    return kinds[norm]


def _act(given: Body) -> str:
    kinds = {"LeakyReLU": ("leakyrelu", {"negative_slope": 0.01}), "ReLU": ("relu", {})}
    act = _last(given.get("nonlin"))
    _refuse_other("architecture, nonlin", act, tuple(kinds))
    name, usual = kinds[act]
    used = usual | {key: value for key, value in (given.get("nonlin_kwargs") or {}).items() if key != "inplace"}
    _refuse_other("architecture, nonlin_kwargs", used, (usual,))
    return name


def _dropout(given: Body, dims: int) -> float:
    """The probability: in prediction there is none."""
    kind = _last(given.get("dropout_op"))
    _refuse_other("architecture, dropout_op", kind, (None, "Dropout", f"Dropout{dims}d"))
    return 0.0 if kind is None else float((given.get("dropout_op_kwargs") or {}).get("p", 0.5))


def _last(dotted: Any) -> Any:
    """The name of a class without its module."""
    return dotted.rpartition(".")[2] if isinstance(dotted, str) else dotted


def _each(given: Any, count: int) -> list[Any]:
    """One number for all, or one for each."""
    return list(given) if isinstance(given, list | tuple) else [given] * count


def network_weights(state: Mapping[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """The state of a network of nnU-Net, for ``network.load_state_dict``.

    nnU-Net names every layer several times; each is taken once. It keeps the heads of deep supervision in any case; a
    network without it leaves them out.

    Args:
        state: the ``network_weights`` of a checkpoint of nnU-Net, or the state of a PlainConvUNet or
            ResidualEncoderUNet.
        network: a ``UNet`` or ``ResidualUNet`` of the same topology.

    Raises:
        PackageError: a weight has no place in the network, or none for a place of it, or another shape; the first
            few are named.
    """
    own = network.state_dict()
    levels = len(network.decoder)
    renamed = {_renamed(name, levels): tensor for name, tensor in state.items() if not _is_repeated(name)}
    unused = {f"heads.{level}.{part}" for level in range(len(network.heads), levels) for part in ("weight", "bias")}
    found = {name: tensor for name, tensor in renamed.items() if name not in unused}
    faults = {
        "have no place": [name for name in found if name not in own],
        "are missing": [name for name in own if name not in found],
        "have another shape": [n for n, tensor in found.items() if n in own and tensor.shape != own[n].shape],
    }
    if any(faults.values()):
        listed = (f"{len(names)} {fault} ({_first(names)})" for fault, names in faults.items() if names)
        raise PackageError("nnU-Net's weights", "; ".join(listed), "those of a network of the same topology")
    return found


def _is_repeated(name: str) -> bool:
    return ".all_modules." in name or name.startswith("decoder.encoder.")


def _renamed(name: str, levels: int) -> str:
    """Our name of a weight; as it is where it has none. Their decoder begins at the bottom, ours at the top."""
    match name.split("."):
        case ["encoder", "stem", "convs", "0", *rest]:
            parts = ["encoder", "0", "0", *rest]
        case ["encoder", "stages", stage, "0", "convs", conv, *rest]:
            parts = ["encoder", stage, conv, *rest]
        case ["encoder", "stages", stage, "blocks", block, part, *rest]:
            place = int(block) + (stage == "0")  # the stem comes before the first stage's blocks
            parts = ["encoder", stage, str(place), {"conv1": "first", "conv2": "second"}.get(part, part), *rest]
        case ["decoder", "stages", stage, "convs", conv, *rest]:
            parts = ["decoder", str(levels - 1 - int(stage)), conv, *rest]
        case ["decoder", ("transpconvs" | "seg_layers") as kind, stage, *rest]:
            parts = [{"transpconvs": "upsample", "seg_layers": "heads"}[kind], str(levels - 1 - int(stage)), *rest]
        case parts:
            pass
    return ".".join(parts)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
