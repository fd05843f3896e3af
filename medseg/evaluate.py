"""Evaluate: masks against references, from files. Needs no model and no torch.

Every case counts. A prediction that is missing, unreadable, on another grid or with unknown values fails and has the
worst scores; a reference that cannot be used is listed, as there is nothing to score against. Nothing is resampled:
scores are taken on the reference's grid. A DICOM SEG or ``.seg.nrrd``, which may hold no more than what the labels take
up, is turned and padded to the other mask's grid where both have the same voxels. Labels are matched by their names
where masks have them (see ``Mask.named``), else by their values; what a prediction names and nobody asked for, as most
organs of a tool that knows a hundred, is background, and listed.
"""

from __future__ import annotations

import csv
import io as text_io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median

import numpy as np

from medseg.cases import find_masks
from medseg.dataset import Dataset
from medseg.errors import DatasetError, GeometryMismatch, InputError, UnreadableFile
from medseg.geometry import Box, Geometry
from medseg.io import describe_grid, has_segments, own_labels, read_mask
from medseg.metrics import DEFINITIONS, ClassScore, score_failure, score_pair
from medseg.progress import Progress, silent
from medseg.records import Record, write_text
from medseg.volume import Labels, Mask

DEFAULT_TOLERANCE_MM = 1.0
"""Tolerance of NSD where none is given; every evaluation records the one it used."""

MOST_VOXELS = 2**31
"""Of the grid that holds two masks of segments: with more they are of different places."""

_WORKERS = min(4, os.cpu_count() or 1)  # each holds one pair of masks: bounded memory

Pair = tuple[str, Path, Path]
"""Case id, path of the prediction (which may be missing), path of the reference; files, or folders of a DICOM SEG."""


class CaseScores(Record):
    """One case.

    Attributes:
        case: its id.
        scores: one a class, then one a region.
        reason: why the case failed; empty where it did not.
        left_out: labels that the prediction names and that are not scored.
    """

    case: str
    scores: tuple[ClassScore, ...]
    reason: str = ""
    left_out: tuple[str, ...] = ()


_Result = CaseScores | str  # the scores, or why there are none


class Spread(Record):
    """How one measure is spread over the cases of a class."""

    mean: float
    median: float


class ClassSummary(Record):
    """One class (or region) over all cases.

    Attributes:
        name: of the class or region.
        n: cases that count, all but the true negatives.
        n_true_negative: left out: both empty.
        n_empty_reference: cases without this class in the reference, left out or not.
        n_missed, n_false_positive, n_failed: cases with the worst scores, by the reason.
        dice, nsd, hd95_mm: over the cases that count; None where there are none.
    """

    name: str
    n: int
    n_true_negative: int
    n_empty_reference: int
    n_missed: int
    n_false_positive: int
    n_failed: int
    dice: Spread | None
    nsd: Spread | None
    hd95_mm: Spread | None


class Means(Record):
    """Means over the classes (regions left out) of each class's mean over the cases."""

    dice: float | None
    nsd: float | None
    hd95_mm: float | None


class Evaluation(Record):
    """What an evaluation found.

    Attributes:
        labels: what was scored.
        tolerance_mm: of NSD.
        definitions: of every measure and status.
        order: of averaging.
        mean: over cases, then over classes.
        classes: one a class, then one a region, over the cases.
        cases: one a case.
        unscored: cases whose reference cannot be used, and why. They are in no number.
        extra: predictions without a reference.
    """

    labels: Labels
    tolerance_mm: float
    definitions: dict[str, str] = DEFINITIONS
    order: str = "mean over cases, then over classes (regions left out)"
    mean: Means
    classes: tuple[ClassSummary, ...]
    cases: tuple[CaseScores, ...]
    unscored: dict[str, str] = {}
    extra: tuple[str, ...] = ()

    @property
    def failed(self) -> dict[str, str]:
        """The cases without a usable prediction, and why."""
        return {case.case: case.reason for case in self.cases if case.reason}

    @property
    def left_out(self) -> tuple[str, ...]:
        """Labels that predictions name and that are not scored, in the order of the alphabet."""
        return tuple(sorted({name for case in self.cases for name in case.left_out}))

    def save_csv(self, path: Path) -> None:
        """Write one row a case and class, atomically. Undefined numbers are empty."""
        text = text_io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "class", *list(ClassScore.model_fields)[1:], "tolerance_mm", "reason"])
        for case in self.cases:
            for score in case.scores:
                writer.writerow([case.case, *score.model_dump().values(), self.tolerance_mm, case.reason])
        write_text(path, text.getvalue())


def evaluate_folders(
    predictions: Path,
    references: Path,
    labels: Labels | None = None,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    cases: Sequence[str] | None = None,
    only_predicted: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Score predictions against references with the same file names (endings aside).

    Args:
        predictions: a folder of masks, one mask, or a pattern; see ``find_masks``.
        references: likewise, or a dataset folder with its ``dataset.json``, whose training labels and label names are
            used. Two single files are a pair whatever their names.
        labels: names of the values. Without them and without a dataset: those that the references name; for values
            that they do not name, the names that other masks have for them, or ``label_<value>``.
        tolerance_mm: of NSD.
        cases: ids to score; all that have a reference otherwise.
        only_predicted: score only cases that have a prediction, as those of one fold; the others are no failures then.
        progress: called after each case.

    Raises:
        InputError: nothing to score, no name in common, a wanted case without reference, two files of one name, or
            (without labels) a mask that does not name its values where those of the others do not tell what they are.
        DatasetError: none of the references can be used.
    """
    known, found = _references(references)
    predicted = find_masks(predictions)
    if predictions.is_file():
        if references.is_file():
            predicted = dict(zip(found, predicted.values(), strict=True))
        cases = cases or list(predicted)
    wanted = sorted(found) if cases is None else list(dict.fromkeys(cases))
    if only_predicted:
        wanted = [case for case in wanted if case in predicted] or wanted
    if absent := [case for case in wanted if case not in found]:
        raise InputError(references, f"has no reference for {', '.join(absent[:10])}", "a mask of the same name")
    if not set(wanted) & set(predicted):
        raise InputError(
            predictions, f"no mask has the name of a reference: {min(predicted)}, ...", f"names as {wanted[0]}"
        )
    pairs = [(case, predicted.get(case, predictions / case), found[case]) for case in wanted]
    names = labels or known or _found_labels([path for *_, path in pairs], [path for _, path, _ in pairs])
    extra = tuple(sorted(set(predicted) - set(found)))
    return evaluate_cases(pairs, names, tolerance_mm, progress).model_copy(update={"extra": extra})


def evaluate_cases(
    pairs: Sequence[Pair],
    labels: Labels,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    progress: Progress = silent,
) -> Evaluation:
    """Score the given pairs of mask files.

    Args:
        pairs: case id, prediction (a missing file makes a failed case), reference.
        labels: classes and regions to score.
        tolerance_mm: of NSD.
        progress: called after each case.

    Raises:
        InputError: no pairs, or a tolerance that is no positive number.
        DatasetError: none of the references can be used; each is listed with its reason.
    """
    if not pairs:
        raise InputError("evaluation", "no case to score", "one pair of masks at least")
    if not 0.0 <= tolerance_mm < np.inf:
        raise InputError("tolerance_mm", f"is {tolerance_mm}", "a length in mm of 0 or more")
    results = _in_threads(pairs, labels, tolerance_mm, progress)
    scored = tuple(result for result in results if isinstance(result, CaseScores))
    unscored = {pair[0]: result for pair, result in zip(pairs, results, strict=True) if isinstance(result, str)}
    if not scored:
        raise DatasetError(
            "references", f"none of {len(pairs)} can be used: {'; '.join(unscored.values())}", "masks that can be read"
        )
    classes = tuple(_summarise(column) for column in zip(*(case.scores for case in scored), strict=True))
    alone = classes[: len(labels.values)]  # the rest are regions
    return Evaluation(
        labels=labels,
        tolerance_mm=tolerance_mm,
        mean=Means(
            dice=_mean(c.dice for c in alone), nsd=_mean(c.nsd for c in alone), hd95_mm=_mean(c.hd95_mm for c in alone)
        ),
        classes=classes,
        cases=scored,
        unscored=unscored,
    )


def _in_threads(pairs: Sequence[Pair], labels: Labels, tolerance_mm: float, progress: Progress) -> list[_Result]:
    results = []
    with ThreadPoolExecutor(_WORKERS) as pool:
        try:
            for result in pool.map(partial(_score_case, labels=labels, tolerance_mm=tolerance_mm), pairs):
                results.append(result)
                progress("scoring", len(results) / len(pairs), pairs[len(results) - 1][0])
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupted run does not score the rest first
    return results


def _score_case(pair: Pair, labels: Labels, tolerance_mm: float) -> _Result:
    """The scores of one case, or why its reference cannot be used."""
    case, prediction_path, reference_path = pair
    try:
        reference = read_mask(reference_path, labels)
        worst = score_failure(reference.array, reference.geometry, labels, reference_path)
    except InputError as failure:
        return str(failure)
    try:
        if not prediction_path.exists():
            raise UnreadableFile(prediction_path, "there is no prediction", "a mask")
        prediction = read_mask(prediction_path)
        left_out = _left_out(prediction, labels, prediction_path)
        prediction = prediction.without(left_out).named(labels)
        prediction, reference = _on_one_grid(prediction, reference, prediction_path, reference_path)
        scores = score_pair(
            prediction.array, reference.array, reference.geometry, labels, tolerance_mm, prediction_path
        )
    except InputError as failure:
        return CaseScores(case=case, scores=worst, reason=str(failure))
    return CaseScores(case=case, scores=scores, left_out=left_out)


def _left_out(prediction: Mask, labels: Labels, where: Path) -> tuple[str, ...]:
    """The labels of a prediction that are not scored.

    Raises:
        InputError: they are all of its labels.
    """
    names = prediction.labels.names if prediction.labels else ()
    left_out = tuple(name for name in names if not labels.like(name))
    if names and len(left_out) == len(names):
        remedy = "rename its labels, or name them in the file given with --labels"
        raise InputError(where, "none of its labels has a name that is scored", ", ".join(labels.names), remedy)
    return left_out


def _on_one_grid(prediction: Mask, reference: Mask, path: Path, reference_path: Path) -> tuple[Mask, Mask]:
    """Both masks on the grid that is scored: the reference's, unless it alone has segments, or both have."""
    if prediction.geometry.close_to(reference.geometry):
        return prediction, reference
    parts = has_segments(path), has_segments(reference_path)
    if not any(parts):
        raise GeometryMismatch(
            path,
            f"grid {describe_grid(prediction)} differs from the reference's",
            describe_grid(reference),
            "predict on the grid of the image; masks are never resampled here",
        )
    grid = prediction.geometry if parts == (False, True) else reference.geometry
    if all(parts):
        grid = _extended(grid, prediction.geometry, path)
    return prediction.placed(grid), reference.placed(grid)


def _extended(grid: Geometry, other: Geometry, where: Path) -> Geometry:
    """A grid with as many more voxels on each side as it takes to hold another."""
    inverse = np.linalg.inv(grid.affine)
    places = np.rint(other.world(other.corners) @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    start = np.minimum(places.min(axis=0), 0)
    stop = np.maximum(places.max(axis=0) + 1, grid.shape)
    if np.prod(stop - start, dtype=float) > MOST_VOXELS:
        raise GeometryMismatch(where, "lies far away from the reference", "a mask of the same image")
    return grid.cropped(Box(tuple(start.tolist()), tuple(stop.tolist())))


def _summarise(scores: Sequence[ClassScore]) -> ClassSummary:
    count = Counter(score.status for score in scores)
    return ClassSummary(
        name=scores[0].name,
        n=len(scores) - count["true_negative"],
        n_true_negative=count["true_negative"],
        n_empty_reference=sum(score.reference_ml == 0 for score in scores),
        n_missed=count["missed"],
        n_false_positive=count["false_positive"],
        n_failed=count["failed"],
        dice=_spread(score.dice for score in scores),
        nsd=_spread(score.nsd for score in scores),
        hd95_mm=_spread(score.hd95_mm for score in scores),
    )


def _spread(values: Iterable[float | None]) -> Spread | None:
    numbers = [value for value in values if value is not None]
    return Spread(mean=fmean(numbers), median=median(numbers)) if numbers else None


def _mean(spreads: Iterable[Spread | None]) -> float | None:
    means = [spread.mean for spread in spreads if spread]
    return fmean(means) if means else None


def _references(path: Path) -> tuple[Labels | None, dict[str, Path]]:
    """Label names, where a dataset gives them, and the reference of each case."""
    if not (path / "dataset.json").is_file():
        return None, find_masks(path)
    dataset = Dataset.open(path)
    return dataset.labels, {case.id: case.label for case in dataset.cases if case.label}


@dataclass(frozen=True)
class _Look:
    """What a mask tells of its labels: the names that it gives, and the values that it holds (none of a prediction)."""

    path: Path
    names: Labels | None
    values: frozenset[int] = frozenset()


def _found_labels(references: Sequence[Path], predictions: Sequence[Path]) -> Labels:
    """What the references hold, by the names that masks give it, or as ``label_<value>``; see ``evaluate_folders``.

    Raises:
        InputError: the references hold nothing, or a mask names no values and those of the others do not tell its own.
    """
    with ThreadPoolExecutor(_WORKERS) as pool:
        truth = [look for look in pool.map(_look_at_voxels, references) if look]
        looks = truth + [look for look in pool.map(_look_at_names, predictions) if look]
    named = [look for look in looks if look.names]
    nameless = [look for look in looks if not look.names]
    agreed = _agreed([look.names for look in named if look.names])
    if named and nameless and (agreed is None or any(has_segments(look.path) for look in named)):
        found = "its values have no names, and the masks that have names do not agree on values or are of segments"
        remedy = "give --labels, a file that names the values"
        raise InputError(nameless[0].path, found, "masks that all name their labels, or none", remedy)
    held = frozenset[int]().union(*(look.values for look in truth if not look.names)) - {0}
    names = {value: name for name, value in (agreed or {}).items()}
    values = {names.get(value, f"label_{value}"): value for value in sorted(held)}
    values |= _common([look.names for look in truth if look.names])
    if not values:
        raise InputError("references", "hold no label but background", "masks with structures, or named labels")
    return Labels.checked({"values": values}, "references")


def _common(found: Sequence[Labels]) -> dict[str, int]:
    """The labels of several masks, with values of their own where these differ from mask to mask."""
    agreed = _agreed(found)
    if agreed is not None:
        return agreed
    return {name: n for n, name in enumerate(sorted({name for name, _ in _pairs(found)}), start=1)}


def _agreed(found: Sequence[Labels]) -> dict[str, int] | None:
    """The labels of several masks; None where one has another value, or a value another name, in another mask."""
    pairs = _pairs(found)
    values = dict(pairs)
    return values if len(pairs) == len(values) == len(set(values.values())) else None


def _pairs(found: Sequence[Labels]) -> set[tuple[str, int]]:
    """Names and values of several masks, spelled as in the first, unless capitals tell two labels of a mask apart."""
    distinct = any(len({name.casefold() for name in labels.values}) < len(labels.values) for labels in found)
    spelled: dict[str, str] = {}
    return {
        (name if distinct else spelled.setdefault(name.casefold(), name), value)
        for labels in found
        for name, value in labels.values.items()
    }


def _look_at_voxels(path: Path) -> _Look | None:
    """Names and values of a mask; None where it cannot be read."""
    try:
        mask = read_mask(path)
    except InputError:
        return None  # listed when the case is scored
    return _Look(path, mask.labels, frozenset(np.unique(mask.array).tolist()))


def _look_at_names(path: Path) -> _Look | None:
    """The names of a mask; None where it cannot be read."""
    try:
        return _Look(path, own_labels(path))
    except InputError:
        return None
