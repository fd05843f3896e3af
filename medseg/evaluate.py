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
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import numpy as np
from pydantic import Field

from medseg import bootstrap
from medseg.cases import printable
from medseg.errors import DatasetError, GeometryMismatch, InputError, UnreadableFile
from medseg.geometry import Box, Float, Geometry
from medseg.io import describe_grid, has_segments, own_labels, read_mask
from medseg.metrics import (
    DECATHLON,
    DECATHLON_TOLERANCES_MM,
    DEFINITIONS,
    LESION_IOU,
    MEASURES,
    ClassScore,
    LesionScore,
    Measures,
    Scoring,
    score_failure,
    score_pair,
)
from medseg.pairs import Pair, find
from medseg.progress import Progress, silent
from medseg.records import Record, write_text
from medseg.terminology import ABNORMAL_STRUCTURE, is_lesion
from medseg.volume import Labels, Mask

log = logging.getLogger(__name__)

DEFAULT_TOLERANCE_MM = 1.0
"""Tolerance of NSD where none is given; every evaluation records the one it used."""

MOST_VOXELS = 2**31
"""Of the grid that holds two masks of segments: with more they are of different places."""

_WORST = 5
_WORKERS = min(4, os.cpu_count() or 1)  # each holds one pair of masks: bounded memory


class EvaluateSettings(Record):
    """Choices of the person who evaluates.

    Attributes:
        tolerance_mm: of NSD; None for the Decathlon's of a dataset that is a task of it, else ``DEFAULT_TOLERANCE_MM``.
        lesions: classes and regions whose single lesions are counted; None for those that are lesions by what they
            stand for (``Labels.coding``), as tumours.
        lesion_iou: overlap above which a lesion counts as found.
    """

    tolerance_mm: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    lesions: tuple[str, ...] | None = None
    lesion_iou: float = Field(default=LESION_IOU, ge=0.0, lt=1.0)


DEFAULTS = EvaluateSettings()


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
    """How one measure is spread over the cases of a class.

    Attributes:
        mean: over the cases that count.
        low, high: ends of the 95 % interval of the mean (``medseg.bootstrap``); None with too few cases.
        median, p25, p75, p05, p95: percentiles, linear between ranks.
    """

    mean: float
    low: float | None
    high: float | None
    median: float
    p25: float
    p75: float
    p05: float
    p95: float


class LesionSummary(Record):
    """The single lesions of one class over all cases.

    Attributes:
        n_cases: in which lesions were looked for; all that have a reference.
        n_reference, n_predicted, n_found: sums over them.
        sensitivity: n_found / n_reference; None where there are no lesions.
        precision: n_found / n_predicted; None where nothing was predicted.
        f1: 2 n_found / (n_reference + n_predicted); None where both are 0.
        false_positives_per_case: (n_predicted - n_found) / n_cases.
    """

    n_cases: int
    n_reference: int
    n_predicted: int
    n_found: int
    sensitivity: float | None
    precision: float | None
    f1: float | None
    false_positives_per_case: float


class ClassSummary(Record):
    """One class (or region) over all cases.

    Attributes:
        name: of the class or region.
        n: cases that count, all but the true negatives.
        n_true_negative: left out: both empty.
        n_empty_reference: cases without this class in the reference, left out or not.
        n_missed, n_false_positive, n_failed: cases with the worst scores, by the reason.
        worst: ids of the (at most five) cases with the lowest Dice, of equal ones with the largest HD95, worst first.
        dice and the other measures: over the cases that count; None where there are none.
        lesions: where they are counted.
    """

    name: str
    n: int
    n_true_negative: int
    n_empty_reference: int
    n_missed: int
    n_false_positive: int
    n_failed: int
    worst: tuple[str, ...]
    dice: Spread | None
    nsd: Spread | None
    hd95_mm: Spread | None
    iou: Spread | None
    sensitivity: Spread | None
    precision: Spread | None
    hd_mm: Spread | None
    assd_mm: Spread | None
    volume_difference_ml: Spread | None
    volume_difference_percent: Spread | None
    lesions: LesionSummary | None = None


class Means(Measures):
    """One number a measure, over the classes (regions left out) of each class's mean over the cases."""


class Evaluation(Record):
    """What an evaluation found.

    Attributes:
        labels: what was scored.
        tolerance_mm: of NSD.
        tolerance_source: where it is from, in words.
        lesion_iou: overlap above which a lesion counts as found.
        definitions: of every measure and status.
        order: of averaging.
        intervals: how the ends of intervals were found.
        mean: over cases, then over classes.
        mean_low, mean_high: ends of the 95 % interval of each; None with too few cases.
        classes: one a class, then one a region, over the cases.
        cases: one a case.
        unscored: cases whose reference cannot be used, and why. They are in no number.
        extra: predictions without a reference.
        matched: how predictions and references were matched where their names differ; empty where they do not.
        predictions, references: the places that were given; empty where pairs were.
    """

    schema_version: ClassVar[int] = 2  # 1 knew three measures

    labels: Labels
    tolerance_mm: float
    tolerance_source: str = ""
    lesion_iou: float = LESION_IOU
    definitions: dict[str, str] = DEFINITIONS
    order: str = "mean over cases, then over classes (regions left out)"
    intervals: str = (
        f"95 % by bootstrap of whole cases (BCa with tails expanded for few cases, {bootstrap.RESAMPLES} resamples, "
        f"seed {bootstrap.SEED}); none with fewer than {bootstrap.FEWEST} cases"
    )
    mean: Means
    mean_low: Means
    mean_high: Means
    classes: tuple[ClassSummary, ...]
    cases: tuple[CaseScores, ...]
    unscored: dict[str, str] = {}
    extra: tuple[str, ...] = ()
    matched: str = ""
    predictions: str = ""
    references: str = ""

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
        counts = list(LesionScore.model_fields)
        columns = ("status", *MEASURES, "reference_ml", "prediction_ml")
        lesions = [f"lesions_{name.removeprefix('n_')}" for name in counts] if self.counts_lesions else []
        writer.writerow(["case", "class", *columns, *lesions, "tolerance_mm", "reason"])
        for case in self.cases:
            for score in case.scores:
                row = [case.case, score.name, *(getattr(score, name) for name in columns)]
                row += [getattr(score.lesions, name, None) for name in counts] if lesions else []
                writer.writerow([*row, self.tolerance_mm, case.reason])
        write_text(path, text.getvalue())

    @property
    def counts_lesions(self) -> bool:
        """Whether the single lesions of a class are counted."""
        return any(summary.lesions for summary in self.classes)


def evaluate_folders(
    predictions: Path,
    references: Path,
    labels: Labels | None = None,
    settings: EvaluateSettings = DEFAULTS,
    cases: Sequence[str] | None = None,
    only_predicted: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Score predictions against references with the same file names (endings aside).

    Args:
        predictions: a folder of masks, one mask, or a pattern; see ``find_masks``.
        references: likewise, or a dataset folder with its ``dataset.json``, whose training labels and label names are
            used. How names are matched: ``medseg.pairs.find``.
        labels: names of the values. Without them and without a dataset: those that the references name; for values
            that they do not name, the names that other masks have for them, or ``label_<value>``.
        settings: tolerance and lesions.
        cases: ids to score; all that have a reference otherwise.
        only_predicted: score only cases that have a prediction, as those of one fold; the others are no failures then.
        progress: called after each case.

    Raises:
        InputError: nothing to score, no name in common, a wanted case without reference, two files of one name, or
            (without labels) a mask that does not name its values where those of the others do not tell what they are.
        DatasetError: none of the references can be used.
    """
    found = find(predictions, references)
    if predictions.is_file():
        cases = cases or list(found.predictions)
    wanted = sorted(found.references) if cases is None else list(dict.fromkeys(cases))
    if only_predicted:
        wanted = [case for case in wanted if case in found.predictions] or wanted
    if absent := [case for case in wanted if case not in found.references]:
        raise InputError(references, f"has no reference for {', '.join(absent[:10])}", "a mask of the same name")
    if not set(wanted) & set(found.predictions):
        there = f"no mask has the name of a reference: {min(found.predictions)}, ..."
        raise InputError(predictions, there, f"names as {wanted[0]}")
    pairs = [(case, found.predictions.get(case, predictions / case), found.references[case]) for case in wanted]
    dataset = found.dataset
    known = labels or (dataset.labels if dataset else None)
    names = known or _found_labels([path for *_, path in pairs], [path for _, path, _ in pairs])
    facts = {
        "extra": tuple(sorted(set(found.predictions) - set(found.references))),
        "matched": found.how,
        "predictions": printable(str(predictions.absolute())),
        "references": printable(str(references.absolute())),
    }
    name = dataset.root.resolve().name if dataset else ""
    return evaluate_cases(pairs, names, settings, name, progress).model_copy(update=facts)


def evaluate_cases(
    pairs: Sequence[Pair],
    labels: Labels,
    settings: EvaluateSettings = DEFAULTS,
    dataset: str = "",
    progress: Progress = silent,
) -> Evaluation:
    """Score the given pairs of mask files.

    Args:
        pairs: case id, prediction (a missing file makes a failed case), reference.
        labels: classes and regions to score.
        settings: tolerance and lesions.
        dataset: name of its folder, which tells the tolerance of a task of the Decathlon, and what tumours are of.
        progress: called after each case.

    Raises:
        InputError: no pairs, or lesions of an unknown class.
        DatasetError: none of the references can be used; each is listed with its reason.
    """
    if not pairs:
        raise InputError("evaluation", "no case to score", "one pair of masks at least")
    if twice := [case for case, count in Counter(case for case, *_ in pairs).items() if count > 1]:
        raise InputError(twice[0], "is given twice", "ids that are different")
    scoring, source = scoring_of(labels, settings, dataset)
    results = _in_threads(pairs, scoring, progress)
    scored = tuple(result for result in results if isinstance(result, CaseScores))
    unscored = {pair[0]: result for pair, result in zip(pairs, results, strict=True) if isinstance(result, str)}
    if not scored:
        raise DatasetError(
            "references", f"none of {len(pairs)} can be used: {'; '.join(unscored.values())}", "masks that can be read"
        )
    classes, means, low, high = _summaries(scored, len(labels.values))
    return Evaluation(
        labels=labels,
        tolerance_mm=scoring.tolerance_mm,
        tolerance_source=source,
        lesion_iou=scoring.lesion_iou,
        mean=means,
        mean_low=low,
        mean_high=high,
        classes=classes,
        cases=scored,
        unscored=unscored,
    )


def scoring_of(labels: Labels, settings: EvaluateSettings, dataset: str) -> tuple[Scoring, str]:
    """What is scored, and where its tolerance is from; arguments as ``evaluate_cases``.

    Raises:
        InputError: lesions of an unknown class.
    """
    known = [*labels.names, *labels.regions]
    lesions = settings.lesions
    if lesions is None:
        lesions = tuple(name for name in labels.names if _is_lesion(name, labels, dataset))
    if strange := [name for name in lesions if name not in known]:
        raise InputError("lesions", f"there is no class {', '.join(strange)}", ", ".join(known))
    tolerance_mm, source = _tolerance(settings.tolerance_mm, dataset)
    return Scoring(labels, tolerance_mm, lesions, settings.lesion_iou), source


def _tolerance(wanted_mm: float | None, dataset: str) -> tuple[float, str]:
    """Tolerance of NSD in mm, and where it is from."""
    if wanted_mm is not None:
        return wanted_mm, "chosen by the user"
    if name := re.fullmatch(r"(?:Task|Dataset)0*(\d+)_(\w+)", dataset):  # as the Decathlon and as nnU-Net write it
        task = f"Task{int(name[1]):02d}_{name[2]}"
        if task in DECATHLON_TOLERANCES_MM:
            return DECATHLON_TOLERANCES_MM[task], f"of {task}: {DECATHLON}"
    return DEFAULT_TOLERANCE_MM, "the usual one of medseg, as none was chosen"


def _is_lesion(name: str, labels: Labels, dataset: str) -> bool:
    coding = labels.codings.get(name)
    return coding.category == ABNORMAL_STRUCTURE if coding else is_lesion(name, dataset)


def _in_threads(pairs: Sequence[Pair], scoring: Scoring, progress: Progress) -> list[_Result]:
    results = []
    with ThreadPoolExecutor(_WORKERS) as pool:
        try:
            for result in pool.map(partial(_score_case, scoring=scoring), pairs):
                results.append(result)
                progress("scoring", len(results) / len(pairs), pairs[len(results) - 1][0])
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupted run does not score the rest first
    return results


def _score_case(pair: Pair, scoring: Scoring) -> _Result:
    """The scores of one case, or why there are none."""
    try:
        return _scored(pair, scoring)
    except Exception as failure:  # whatever is wrong with one case, the others are scored
        log.warning("%s: could not be scored", pair[0], exc_info=failure)
        return f"could not be scored: unexpected {type(failure).__name__}: {failure}"


def _scored(pair: Pair, scoring: Scoring) -> _Result:
    """The scores of one case, or why its reference cannot be used."""
    case, prediction_path, reference_path = pair
    labels = scoring.labels
    try:
        reference = read_mask(reference_path, labels)
    except InputError as failure:
        return printable(str(failure))
    if reference.geometry.is_sheared:
        log.warning("%s: the axes of its grid are not at right angles: distances are approximate", case)
    try:
        if not prediction_path.exists():
            raise UnreadableFile(prediction_path, "there is no prediction", "a mask")
        prediction = read_mask(prediction_path)
        left_out = _left_out(prediction, labels, prediction_path)
        prediction = prediction.without(left_out).named(labels)
        prediction, reference = _on_one_grid(prediction, reference, prediction_path, reference_path)
        scores = score_pair(prediction.array, reference.array, reference.geometry, scoring, prediction_path)
    except InputError as failure:
        worst = score_failure(reference.array, reference.geometry, scoring, reference_path)
        return CaseScores(case=case, scores=worst, reason=printable(str(failure)))
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


def _summaries(cases: Sequence[CaseScores], classes: int) -> tuple[tuple[ClassSummary, ...], Means, Means, Means]:
    """Each class and region over the cases; then the mean over the classes of each measure, and its interval's ends."""
    columns = list(zip(*(case.scores for case in cases), strict=True))
    places = {(measure, n): i for i, (measure, n) in enumerate(product(MEASURES, range(len(columns))))}
    values = np.array([[_number(columns[n][case], measure) for measure, n in places] for case in range(len(cases))])
    resampled = bootstrap.Resampled.of(values)
    ends: dict[str, tuple[float | None, float | None, float | None]] = {}
    for measure in MEASURES:
        alone = [i for n in range(classes) if np.isfinite(resampled.means[i := places[measure, n]])]  # no regions
        mean = fmean(resampled.means[alone].tolist()) if alone else None
        ends[measure] = (mean, *(resampled.interval(alone) or (None, None)))
    means, low, high = (Means(**{measure: found[n] for measure, found in ends.items()}) for n in range(3))
    names = [case.case for case in cases]
    summaries = tuple(
        _summarise(names, column, {m: _spread(values[:, i := places[m, n]], resampled.interval([i])) for m in MEASURES})
        for n, column in enumerate(columns)
    )
    return summaries, means, low, high


def _number(score: ClassScore, measure: str) -> float:
    value = getattr(score, measure)
    return float("nan") if value is None else value


def _summarise(
    cases: Sequence[str], scores: Sequence[ClassScore], spreads: Mapping[str, Spread | None]
) -> ClassSummary:
    count = Counter(score.status for score in scores)
    ranked = sorted(
        (score.dice, -(score.hd95_mm or 0.0), case)
        for case, score in zip(cases, scores, strict=True)
        if score.dice is not None
    )
    return ClassSummary(
        name=scores[0].name,
        n=len(scores) - count["true_negative"],
        n_true_negative=count["true_negative"],
        n_empty_reference=sum(score.reference_ml == 0 for score in scores),
        n_missed=count["missed"],
        n_false_positive=count["false_positive"],
        n_failed=count["failed"],
        worst=tuple(case for *_, case in ranked[:_WORST]),
        lesions=_lesions([score.lesions for score in scores if score.lesions]),
        **spreads,
    )


def _lesions(scores: Sequence[LesionScore]) -> LesionSummary | None:
    if not scores:
        return None
    reference, predicted, found = (
        sum(getattr(score, name) for score in scores) for name in ("n_reference", "n_predicted", "n_found")
    )
    return LesionSummary(
        n_cases=len(scores),
        n_reference=reference,
        n_predicted=predicted,
        n_found=found,
        sensitivity=found / reference if reference else None,
        precision=found / predicted if predicted else None,
        f1=2 * found / (reference + predicted) if reference + predicted else None,
        false_positives_per_case=(predicted - found) / len(scores),
    )


def _spread(values: Float, interval: bootstrap.Interval | None) -> Spread | None:
    """The spread of the numbers that are known; None where none is."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = interval or (None, None)
    p05, p25, median, p75, p95 = np.percentile(known, (5, 25, 50, 75, 95)).tolist()
    mean = fmean(known.tolist())
    return Spread(mean=mean, low=low, high=high, median=median, p25=p25, p75=p75, p05=p05, p95=p95)


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
    return _Look(path, mask.labels, frozenset(mask.counts()))


def _look_at_names(path: Path) -> _Look | None:
    """The names of a mask; None where it cannot be read."""
    try:
        return _Look(path, own_labels(path))
    except InputError:
        return None
