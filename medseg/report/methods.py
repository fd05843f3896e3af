"""The methods: what was done, in paragraphs that can be pasted into a paper; written by rules, from records."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from medseg.bootstrap import FEWEST, RESAMPLES, SEED
from medseg.evaluate import ClassSummary, Evaluation
from medseg.plan import Configuration, Normalisation, Plan
from medseg.report.gather import Gathered
from medseg.report.words import MINUS, by, count, listed, number

_NETWORKS = {
    "unet": "U-Net",
    "residual_unet": "U-Net with a residual encoder",
    "attention_unet": "attention U-Net",
    "unet_plus_plus": "U-Net++",
}
_LOSSES = {
    "dice": "soft Dice",
    "dice_ce": "sum of soft Dice and cross-entropy",
    "bce_dice": "sum of soft Dice and binary cross-entropy",
    "focal": "focal loss",
    "dice_focal": "sum of soft Dice and focal loss",
    "tversky": "Tversky loss",
    "generalised_dice": "generalised Dice loss",
    "cldice": "sum of soft Dice and centreline Dice (clDice)",
    "boundary": "sum of generalised Dice and boundary loss",
}
_OPTIMISERS = {
    "sgd": "stochastic gradient descent with Nesterov momentum",
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon (AdamW for all parameters but the convolution kernels)",
}
_SCHEDULES = {
    "poly": "polynomial decay (power 0.9)",
    "cosine": "cosine decay",
    "linear": "linear decay to zero",
    "step": "a tenfold decrease after each third of the training",
    "plateau": "a tenfold decrease on plateaus of the loss",
}
_AUGMENTATION = {
    "none": "No augmentation was used",
    "light": "Training patches were augmented by random rotation, scaling, noise, brightness, contrast and gamma",
    "full": "Training patches were augmented by random rotation, scaling, noise, blur, brightness, contrast, low "
    "resolution and gamma",
    "classic": "Training patches were augmented by random elastic deformation, rotation, and shifts and scaling of "
    "intensities",
}
_MOST_NAMED = 5
_SPLINES = {0: "nearest-neighbour", 1: "linear", 3: "cubic spline"}
_PRECISIONS = {"32": "single precision", "bf16": "bfloat16 mixed precision", "16": "float16 mixed precision"}


def paragraphs(found: Gathered) -> list[str]:
    """How it was trained or predicted, and how it was scored, as plain text; those that no record tells of left out."""
    made: Iterable[str] = ()
    if found.plan and (configuration := _configuration(found)):
        made = _training(found, found.plan, configuration)
    elif found.kind == "predictions":
        made = _prediction(found)
    scored = _scoring(found.evaluation) if found.evaluation else ()
    texts = [" ".join(sentence for sentence in sentences if sentence) for sentences in (made, scored)]
    return [text for text in texts if text]


def command(found: Gathered) -> str:
    """The command that does a run again, without folders; empty where its record does not tell of its settings."""
    settings = found.run.get("settings")
    if not settings:
        return ""
    words = ["medseg", "run", _name_of_folder(str(found.run.get("dataset_folder", "DATASET")))]
    words += ["--configuration", str(found.run.get("configuration"))]
    words += ["--folds", ",".join(found.run.get("folds", {"0": None}))]
    words += _length(settings)
    for name in ("device", "precision", "seed", "patience", "accumulate"):
        if settings.get(name) not in (None, "auto", 0) and (name, settings[name]) != ("accumulate", 1):
            words += [f"--{name}", str(settings[name])]
    words += [f"--{name}" for name in ("deterministic", "checkpointing") if settings.get(name)]
    if found.plan and found.plan.memory_budget_mb != 8192.0:
        words += ["--memory-budget", f"{found.plan.memory_budget_mb:g}MB"]
    words += ["--mirror"] if found.run.get("mirror") else []
    words += [word for override in found.run.get("overrides", ()) for word in ("--set", override)]
    if found.evaluation:
        words += ["--tolerance-mm", f"{found.evaluation.tolerance_mm:g}"]
    return shlex.join(words)


def _name_of_folder(path: str) -> str:
    return path.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]


def _length(settings: dict[str, Any]) -> list[str]:
    if seconds := settings.get("time_budget_s"):
        return ["--time-budget", f"{seconds:g}s"]
    return [
        word for name in ("epochs", "iterations") if settings.get(name) for word in (f"--{name}", str(settings[name]))
    ]


def _configuration(found: Gathered) -> Configuration | None:
    """The configuration that was trained: as the run says; of an older run the usual one."""
    known = found.plan.configurations if found.plan else {}
    name = found.run.get("configuration") or ("3d_fullres" if "3d_fullres" in known else "2d")
    return next((configuration for own, configuration in known.items() if own == name), None)


def _training(found: Gathered, plan: Plan, configuration: Configuration) -> Iterable[str]:
    dims, versions = configuration.spatial_dims, found.run.get("versions", {})
    network = _NETWORKS.get(configuration.network.name, configuration.network.name)
    cases = found.run.get("cases") or (found.check.cases_checked if found.check else None)
    of_cases = f" ({count(cases, 'labelled case')})" if cases else ""
    yield (
        f"A {dims}D {network} was trained to segment {_structures(plan.labels.names)} in the dataset "
        f"{plan.dataset}{of_cases} with medseg {versions.get('medseg', '')}".rstrip()
        + (
            f" (PyTorch {versions['torch']}, MONAI {versions['monai']})."
            if {"torch", "monai"} <= set(versions)
            else "."
        )
    )
    by_hand = sum(reason.startswith("Set by hand") for reason in plan.reasons.values())
    changed = f", except for {count(by_hand, 'setting')} chosen by hand" if by_hand else ""
    yield f"Preprocessing, network topology and training settings were derived from the data by fixed rules{changed}."
    yield _preprocessing(plan, configuration)
    yield _network(configuration)
    yield _recipe(configuration, plan)
    yield _folds(found, plan)
    mirror = " and averaged over mirrored images" if found.run.get("mirror") else ""
    yield (
        "Whole images were segmented with overlapping, Gaussian-weighted windows"
        f"{mirror}; network outputs were resampled to the native grid of each image before the classes were decided."
    )


def _preprocessing(plan: Plan, configuration: Configuration) -> str:
    turned = "kept in their stored orientation" if plan.orientation == "stored" else f"reoriented to {plan.orientation}"
    spacing = [size for size in configuration.spacing_mm if size is not None]
    within = " within the slices" if len(spacing) < 3 else ""
    size = by([f"{length:.3g}" for length in spacing])
    schemes = list(dict.fromkeys(_normalised(rule) for rule in plan.normalisation))
    order = _SPLINES[plan.resampling.image]
    return (
        f"Images were {turned}, cropped to the box of non-zero voxels, {' and '.join(schemes)}, and resampled to "
        f"{size} mm{within} by {order} interpolation."
    )


def _normalised(rule: Normalisation) -> str:
    if rule.scheme == "ct":
        return (
            f"clipped to [{rule.lower:g}, {rule.upper:g}], and standardised with the mean and standard deviation of "
            "the foreground of the training data"
        ).replace("-", MINUS)
    return {
        "zscore": "normalised to zero mean and unit standard deviation image by image"
        + (" (over non-zero voxels)" if rule.nonzero_only else ""),
        "minmax": "scaled to the range 0 to 1 image by image",
        "rgb": "divided by 255",
        "none": "left at their intensities",
    }[rule.scheme]


def _network(configuration: Configuration) -> str:
    network = configuration.network
    norm = f"{network.norm} normalisation"
    act = {"leakyrelu": "leaky ReLU", "relu": "ReLU"}[network.act]
    features = ", ".join(map(str, network.features))
    supervised = "with" if network.deep_supervision else "without"
    return (
        f"The network had {len(network.features)} resolution stages with {features} features, {norm} and {act} "
        f"activations, and was trained {supervised} deep supervision."
    )


def _recipe(configuration: Configuration, plan: Plan) -> str:
    training = configuration.training
    unit = "pixels" if configuration.spatial_dims == 2 else "voxels"
    averaged = f" The shipped weights are a running average (decay {training.average:g})." if training.average else ""
    augmentation = _AUGMENTATION[training.augmentation]
    if training.augmentation != "none" and configuration.mirror_axes:
        augmentation += ", and were mirrored at random"
    return (
        f"Patches of {by(configuration.patch_size)} {unit} were drawn in batches of {configuration.batch_size}. "
        f"The loss was the {_LOSSES.get(training.loss, training.loss)}; the optimiser was "
        f"{_OPTIMISERS[training.optimiser]} with an initial learning rate of {training.learning_rate:g} and "
        f"{_SCHEDULES[training.schedule]}. {augmentation}.{averaged}"
    )


def _folds(found: Gathered, plan: Plan) -> str:
    records: dict[str, dict[str, Any]] = found.run.get("folds", {})
    if not records:
        return ""
    total = len(found.folds) or 5
    held_out = sum(record.get("validation_cases") or 0 for record in records.values())
    numbers = listed(list(records))
    if len(records) == total:
        split = f"The data were split for {total}-fold cross-validation, and every case was segmented by the network "
        split += "that had not been trained on it."
    elif len(records) == 1:
        record = next(iter(records.values()))
        split = f"One split of a {total}-fold cross-validation (fold {numbers}) was used, with "
        split += f"{record.get('train_cases')} training cases and {held_out} cases held out."
    else:
        split = (
            f"Folds {numbers} of a {total}-fold cross-validation were trained, with {held_out} cases held out in all."
        )
    return f"{split} {_effort(records.values(), plan, _device(found))}".strip()


def _device(found: Gathered) -> str:
    """The kind of device that the held-out cases were predicted on, which is that of the training."""
    named = {str(batch.facts.get("device", "")) for batch in found.batches} - {""}
    return next(iter(named), "") if len(named) == 1 else ""


def _effort(records: Iterable[dict[str, Any]], plan: Plan, device: str) -> str:
    known = [record for record in records if record.get("iterations")]
    if not known:
        return ""
    iterations = sorted(record["iterations"] for record in known)
    minutes = [record["seconds"] / 60.0 for record in known if record.get("seconds") is not None]
    precision = _PRECISIONS.get(str(known[0].get("precision")), str(known[0].get("precision")))
    where = "a GPU" if device.startswith("cuda") or (not device and plan.device == "gpu") else "a CPU"
    where = "an Apple GPU" if device.startswith("mps") else where
    steps = f"{iterations[0]:,}" if iterations[0] == iterations[-1] else f"{iterations[0]:,} to {iterations[-1]:,}"
    took = f" ({_duration(minutes)} on {where}, {precision})" if minutes else f" on {where} ({precision})"
    seeds = sorted({record["seed"] for record in known if record.get("seed") is not None})
    seed = f", with random seed {listed([str(s) for s in seeds])}" if seeds else ""
    each = " each" if len(known) > 1 else ""
    return f"Training took {steps} iterations{each}{took}{seed}."


def _duration(minutes: Sequence[float]) -> str:
    low, high = min(minutes), max(minutes)
    unit, scale = ("hours", 60.0) if high >= 90 else ("minutes", 1.0)
    if high < 2:
        unit, scale = "seconds", 1.0 / 60.0
    first, last = f"{low / scale:.3g}", f"{high / scale:.3g}"
    return f"{first} {unit}" if first == last else f"{first} to {last} {unit}"


def _prediction(found: Gathered) -> list[str]:
    if not found.batches or not found.batches[0].facts.get("model"):
        return []
    facts = found.batches[0].facts
    masks = sum(row.status != "failed" for row in found.predicted.values())
    settings = facts.get("settings", {})
    mirror = ", averaged over mirrored images" if settings.get("mirror") else ""
    return [
        f"{count(len(found.predicted), 'image')} were segmented with medseg "
        f"{facts.get('versions', {}).get('medseg', '')} and the model {facts['model']} (digest "
        f"{str(facts.get('model_digest', ''))[:12]}) on {facts.get('device')} with the engine {facts.get('engine')}, "
        f"in windows that overlap by {float(settings.get('overlap', 0.5)):.0%}{mirror}; {count(masks, 'mask')} "
        "resulted."
    ]


def _scoring(evaluation: Evaluation) -> Iterable[str]:
    yield (
        "Segmentations were compared with the reference on the reference's own grid, case by case, by the Dice "
        f"similarity coefficient, the normalised surface Dice (NSD) at a tolerance of {evaluation.tolerance_mm:g} mm"
        f"{_source(evaluation)} and the 95th percentile of the Hausdorff distance (HD95; the larger of the two "
        "directed percentiles, weighted by surface area); surfaces are defined as in google-deepmind/surface-distance."
    )
    yield f"Scores were averaged over cases and then over classes. {_empties(evaluation.classes)}{_failed(evaluation)}"
    yield (
        f"Intervals are 95 % bias-corrected and accelerated (BCa) bootstrap intervals of the mean over cases "
        f"({RESAMPLES:,} resamples of whole cases, seed {SEED}; tails widened for few cases by Student's t)"
        + (f"; with fewer than {FEWEST} cases none is given." if len(evaluation.cases) < FEWEST else ".")
    )
    yield _result(evaluation)


def _source(evaluation: Evaluation) -> str:
    source = evaluation.tolerance_source
    return f" ({source})" if source and "usual" not in source else ""


def _empties(classes: Sequence[ClassSummary]) -> str:
    out = sum(summary.n_true_negative for summary in classes)
    missed, wrong = sum(s.n_missed for s in classes), sum(s.n_false_positive for s in classes)
    one = f" ({missed} missed, {wrong} false positive)" if missed or wrong else " (which did not occur)"
    return (
        "Where reference and prediction were both empty, the case was left out of the mean of that class "
        f"({_times(out)}); where one alone was empty{one}, Dice and NSD counted as 0 and HD95 as the diagonal of the "
        "image."
    )


def _failed(evaluation: Evaluation) -> str:
    failed = len(evaluation.failed)
    said = (
        f" Cases without a usable prediction ({failed}) were kept in all means with these worst scores."
        if failed
        else ""
    )
    unscored = len(evaluation.unscored)
    return said + (f" {count(unscored, 'case')} without a usable reference could not be scored." if unscored else "")


def _result(evaluation: Evaluation) -> str:
    cases, mean, low, high = len(evaluation.cases), evaluation.mean, evaluation.mean_low, evaluation.mean_high
    if mean.dice is None:
        return ""
    parts = [
        f"Dice {_with_interval(mean.dice, low.dice, high.dice)}",
        f"NSD {_with_interval(mean.nsd, low.nsd, high.nsd)}",
        f"HD95 {_with_interval(mean.hd95_mm, low.hd95_mm, high.hd95_mm, 2, ' mm')}",
    ]
    return f"Over {count(cases, 'case')} the means were {', '.join(parts[:-1])} and {parts[-1]}."


def _with_interval(value: float | None, low: float | None, high: float | None, digits: int = 3, unit: str = "") -> str:
    if low is None or high is None:
        return number(value, digits) + unit
    return f"{number(value, digits)}{unit} (95 % interval {number(low, digits)} to {number(high, digits)})"


def _structures(names: Sequence[str]) -> str:
    return listed(names) if len(names) <= _MOST_NAMED else f"{len(names)} structures ({', '.join(names)})"


def _times(number_of: int) -> str:
    return {0: "which did not occur", 1: "once", 2: "twice"}.get(number_of, f"{number_of} times")
