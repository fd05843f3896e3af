"""A package's networks in 8-bit integers: calibrated on cases of its training, their cost measured on others.

``medseg predict --engine openvino-int8`` calibrates on the first case that it sees; this calibrates on several, and
says what the masks lose.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from medseg import io
from medseg.dataset import Case, Dataset, Fold
from medseg.engines import (
    Float32,
    Quantisation,
    check_engine,
    describe,
    int8_folder,
    keep_quantised,
    quantise_network,
    tiles_of,
)
from medseg.errors import InputError
from medseg.metrics import class_dice
from medseg.package import ModelPackage, load_package
from medseg.predict import Predictor, PredictSettings
from medseg.progress import Progress, silent, track
from medseg.volume import Volume

CALIBRATION_CASES = 8
"""Cases that tiles are taken from."""
TILES_OF_A_CASE = 4
MEASURED_CASES = 50
"""Held-out cases at most that the cost is measured on."""


def quantise(path: Path, dataset: Dataset, progress: Progress = silent) -> list[Quantisation]:
    """Quantise each network of a package, and keep it beside its weights with what it costs.

    Of the cases that a fold was trained on, evenly chosen ones calibrate it; on those that it was not, mean Dice is
    measured in float32 and in 8 bits. Where the dataset is not like that of the training (another name, other channels,
    labels or numbers of cases), nothing tells which cases the network has seen: then every fifth measures, the others
    calibrate.

    Args:
        path: a package, folder or zip.
        dataset: that of its training, or labelled cases like it; two at least.
        progress: told what is done.

    Returns:
        One record a network, by stage of a cascade, then by fold, as ``medseg.engines.load_quantised`` gives it.

    Raises:
        PackageError: there is no sound package.
        DatasetError: fewer than two cases have a label.
        InputError: OpenVINO or NNCF is not installed, a case cannot be read, or the folder cannot be written to.
    """
    check_engine("openvino-int8", torch.device("cpu"))
    package = load_package(path)
    folder = int8_folder(path)
    _require_writable(folder)
    stages = [replace(stage, path=path) for stage in (package.previous, package) if stage]
    ones = [stage.only(fold) for stage in stages for fold in sorted(stage.weights)]
    return [_quantised(one, folder, dataset, progress) for one in ones]


def _quantised(package: ModelPackage, folder: Path, dataset: Dataset, progress: Progress) -> Quantisation:
    """Of one network: made, kept, measured as it is kept, and the record kept once more with that."""
    setup, plan = package.configuration, package.plan
    channels, (network,) = plan.inputs(setup), package.networks()
    fold, held_out = _split(package, dataset)
    exact = Predictor(package, PredictSettings(device="cpu", engine="openvino"))
    chosen = [dataset.case(name) for name in _evenly(fold.train, CALIBRATION_CASES)]
    tiles = [tile for case in track(chosen, "calibrating", progress) for tile in _tiles(exact, case)]
    small = quantise_network(network, channels, setup.patch_size, tiles)
    names, regions = [case.id for case in chosen], bool(plan.region_order)
    record = describe(small, network, tiles, digest=package.digest, cases=names, regions=regions)
    with _writing(folder):
        record = keep_quantised(folder, small, record)
    rough = Predictor(package, PredictSettings(device="cpu", engine="openvino-int8"))
    measured = [dataset.case(name) for name in _evenly(fold.validation, MEASURED_CASES)]
    dices = [[_dice(p, case) for p in (exact, rough)] for case in track(measured, "measuring", progress)]
    before, after = (_mean(column) for column in zip(*dices, strict=True))
    cost = {
        "measured_cases": tuple(case.id for case in measured),
        "held_out": held_out,
        "dice_float32": before,
        "dice_int8": after,
        "dice_loss": None if before is None or after is None else before - after,
    }
    with _writing(folder):
        return keep_quantised(folder, small, record.model_copy(update=cost))


def _split(package: ModelPackage, dataset: Dataset) -> tuple[Fold, bool]:
    """Cases to calibrate and to measure on, and whether the latter pass for cases that the network has not seen."""
    ((number, record),) = ((n, package.manifest.folds[n]) for n in package.weights)
    plan = package.plan
    trained = (plan.dataset, plan.channels, plan.labels, record.train_cases, record.validation_cases)
    for fold in dataset.folds()[number : number + 1]:
        given = (dataset.name, dataset.channels, dataset.labels, len(fold.train), len(fold.validation))
        if given == trained:
            return fold, True
    ids = sorted(case.id for case in dataset.cases)
    return Fold(tuple(name for n, name in enumerate(ids) if n % 5), tuple(ids[::5])), False


def _evenly(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, evenly spread."""
    count = min(most, len(names))
    return [names[n * len(names) // count] for n in range(count)]


def _tiles(predictor: Predictor, case: Case) -> list[Float32]:
    image = predictor.prepare(_read(predictor, case)).prepared.image
    return tiles_of(image, predictor.package.configuration.patch_size, TILES_OF_A_CASE)


def _dice(predictor: Predictor, case: Case) -> float | None:
    """Mean Dice of the classes of a case; None where neither mask has any."""
    if case.label is None:  # pragma: no cover - for the type checker: a dataset's cases have labels
        return None
    labels = predictor.package.plan.labels
    mask = predictor.segment(_read(predictor, case))
    reference = io.read_mask(case.label, labels, mask)
    return _mean(class_dice(mask.array, reference.array, labels, case.id))


def _read(predictor: Predictor, case: Case) -> Volume:
    return io.read_volume(case.images, len(predictor.package.plan.channels))


def _mean(dices: Iterable[float | None]) -> float | None:
    known = [dice for dice in dices if dice is not None]
    return statistics.fmean(known) if known else None


def _require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to before all the work for it, not after."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        remedy = "copy the package to a folder of your own"
        raise InputError(folder, f"cannot be written to: {failure}", "a folder for the networks", remedy) from None
