"""What a page says of results: tables of classes and cases, plots, failures, and the captions of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from medseg import quality
from medseg.evaluate import CaseScores, Evaluation
from medseg.metrics import ClassScore, Status
from medseg.progress import Progress, track
from medseg.report import plots
from medseg.report.gather import Gathered, Predicted, without_folders
from medseg.report.pictures import Pictures, Shown
from medseg.report.words import count, number

_FEWEST = 3
"""Cases that make a plot."""
_MOST_BLAND_ALTMAN = 6
_MOST_NAMED = 8
"""Classes below a picture."""
_MOST_NARROW = 6
"""Classes that a strip plot of half the width has room for."""
_STATUS: dict[Status, str] = {
    "scored": "",
    "true_negative": "both empty, left out",
    "missed": "missed",
    "false_positive": "false positive",
    "failed": "failed",
}


# ---- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plot:
    """A figure; a wide one has a row of its own."""

    title: str
    caption: str
    svg: str
    wide: bool


def scores(found: Gathered, progress: Progress) -> dict[str, Any]:
    """Tables and plots of an evaluation, and all that failed."""
    evaluation = found.evaluation
    if evaluation is None:
        return {"plots": [], "lesions": [], "problems": _unpredicted(found), "definitions": []}
    return {
        "plots": _plots(evaluation, progress),
        "lesions": [(summary.name, summary.lesions) for summary in evaluation.classes if summary.lesions],
        "problems": _problems(evaluation),
        "definitions": list(evaluation.definitions.items()),
        "has_intervals": any(summary.dice and summary.dice.low is not None for summary in evaluation.classes),
    }


def _plots(evaluation: Evaluation, progress: Progress) -> list[_Plot]:
    """The figures of an evaluation; none of so few cases that the tables say it all."""
    known = [summary for summary in evaluation.classes if summary.dice]
    if max((summary.n for summary in known), default=0) < _FEWEST:
        return []
    by_size = sorted((summary.name for summary in known), key=lambda name: -_volume(evaluation, name))
    names = by_size[:_MOST_BLAND_ALTMAN]
    strips = {"dice": "Dice", "nsd": "Normalised surface Dice", "hd95_mm": "95th percentile of the surface distance"}
    dots = "Every case is a dot; bar: median and quartiles; mark: mean with its interval."
    largest = f" The {len(names)} largest of {len(known)} classes." if len(names) < len(known) else ""
    limits = "Prediction minus reference against the mean of both; lines: bias and limits of agreement."
    size = "Each voxel weighs more in a small structure."
    wanted: list[tuple[str, str, Callable[[], str]]] = [
        *((title, dots, partial(plots.strip_plot, evaluation, measure)) for measure, title in strips.items()),
        ("Dice by size", size, partial(plots.dice_by_volume, evaluation)),
        *((f"Volumes of {name}", limits + largest, partial(plots.bland_altman, evaluation, name)) for name in names),
    ]
    is_wide = len(evaluation.classes) > _MOST_NARROW
    return [
        _Plot(title, caption, plot(), is_wide and n < len(strips) + 1)
        for n, (title, caption, plot) in enumerate(track(wanted, "drawing", progress))
    ]


def _volume(evaluation: Evaluation, name: str) -> float:
    return sum(score.reference_ml for case in evaluation.cases for score in case.scores if score.name == name)


def _problems(evaluation: Evaluation) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Everything that is in the scores as a failure, or not in them: title, what it means, cases with their reasons."""
    listed = [
        (
            "Failed cases",
            "Without a usable prediction: in all means with the worst scores.",
            [(case, without_folders(reason)) for case, reason in evaluation.failed.items()],
        ),
        (
            "Cases that could not be scored",
            "Their references cannot be used: they are in no number on this page.",
            [(case, without_folders(reason)) for case, reason in evaluation.unscored.items()],
        ),
        ("Predictions without a reference", "They are in no number.", [(case, "") for case in evaluation.extra]),
        ("Labels of predictions that are not scored", "Background here.", [(n, "") for n in evaluation.left_out]),
    ]
    return [entry for entry in listed if entry[2]]


def _unpredicted(found: Gathered) -> list[tuple[str, str, list[tuple[str, str]]]]:
    failed = [(r.case, without_folders(r.reason)) for r in found.predicted.values() if r.status == "failed"]
    warned = [(r.case, without_folders(r.warnings)) for r in found.predicted.values() if r.warnings]
    listed = [("Failed cases", "There is no mask.", failed), ("Warnings about the images", "", warned)]
    return [entry for entry in listed if entry[2]]


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One case and class in the table."""

    case: str
    score: ClassScore
    flags: tuple[str, ...]

    @property
    def status(self) -> str:
        """In words; nothing of what is scored as usual."""
        return _STATUS[self.score.status]

    @property
    def is_bad(self) -> bool:
        """Whether it counts with the worst scores."""
        return self.score.status in ("failed", "missed", "false_positive")

    @property
    def order(self) -> tuple[bool, float, float, str]:
        """Sorts the worst first; what has no score stands at the end."""
        dice, distance = self.score.dice, self.score.hd95_mm
        return dice is None, 0.0 if dice is None else dice, -(distance or 0.0), self.case


def cases(found: Gathered, drawn: Pictures) -> dict[str, Any]:
    """The rows of the table of cases: one a case and class, or where nothing is scored one a case."""
    predicted = found.predicted
    common = {
        "has_flags": any(row.flags for row in predicted.values()),
        "flag_notice": quality.NOTICE.replace("qc_flags", "Flags"),
        "words_of_flags": words_of_flags,
        "numbers": drawn.numbers,
    }
    if found.evaluation is None:
        rows = sorted(predicted.values(), key=lambda row: (row.status != "failed", not row.flags, row.case))
        volumes = list(dict.fromkeys(name for row in rows for name in row.volumes_ml))
        return {**common, "rows": rows, "volumes": volumes, "numbers": {s.case: s.number for s in drawn.viewers}}
    scored = [
        _Row(case.case, score, _flags_of(predicted.get(case.case), score.name, found.evaluation))
        for case in found.evaluation.cases
        for score in case.scores
    ]
    scored = sorted(scored, key=lambda row: row.order)
    return {**common, "rows": scored, "has_statuses": any(row.status for row in scored)}


def words_of_flags(flags: Iterable[str], without: str = "") -> list[str]:
    """Flags as words, see ``medseg.quality``: ``volume liver low``; the name of a class may be left out."""
    found = []
    for flag in flags:
        kind, *rest = (_unescaped(text) for text in flag.split(":"))
        found.append(" ".join([kind.replace("_", " "), *(text for text in rest if text != without)]))
    return found


def _unescaped(text: str) -> str:
    return text.replace("%3A", ":").replace("%3B", ";").replace("%25", "%")


def _flags_of(row: Predicted | None, name: str, evaluation: Evaluation) -> tuple[str, ...]:
    """The flags that tell of a class, or of the whole image."""
    if row is None:
        return ()
    subjects = {flag: _unescaped([*flag.split(":"), ""][1]) for flag in row.flags}
    others = {*evaluation.labels.names} - {name}
    return tuple(words_of_flags((flag for flag, subject in subjects.items() if subject not in others), name))


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Caption:
    """What stands below a picture."""

    scores: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """The scores as one text."""
        return "; ".join(self.scores)


def pictures(found: Gathered, drawn: Pictures) -> dict[str, Any]:
    """The pictures in groups, with their captions, and what is missing among them."""
    evaluation, predicted = found.evaluation, found.predicted
    scores = {case.case: case for case in evaluation.cases} if evaluation else {}
    captions = {
        shown.case: _Caption(
            _captioned(scores[shown.case]) if shown.case in scores else (),
            tuple(words_of_flags(predicted[shown.case].flags)) if shown.case in predicted else (),
        )
        for shown in (*drawn.worst, *drawn.typical)
    }
    lines = "Slices in which reference (solid) and prediction (dashed) differ most."
    known = len(evaluation.cases) - len(evaluation.failed) if evaluation else 0
    everything = not drawn.typical
    groups: list[tuple[str, str, tuple[Shown, ...]]] = []
    if evaluation and drawn.worst:
        title = "All cases, the worst first" if everything else f"The {len(drawn.worst)} worst of {known} cases"
        groups = [
            (title, f"By the mean Dice over the classes. {lines}", drawn.worst),
            ("Typical cases", f"Nearest the median of the mean Dice. {lines}", drawn.typical),
        ]
    notes = list(drawn.notes)
    if evaluation and evaluation.failed:
        notes.append(f"Without a mask to show, as they failed: {', '.join(evaluation.failed)}.")
    return {
        "pictures": drawn,
        "picture_groups": groups,
        "picture_notes": notes,
        "captions": captions,
        "has_pictures": bool(groups or drawn.mosaics or notes),
    }


def _captioned(case: CaseScores) -> tuple[str, ...]:
    """The scores of a case: of many classes the eight worst."""
    known = sorted((s for s in case.scores if s.dice is not None), key=lambda s: s.dice or 0.0)
    texts = [f"{s.name}: Dice {number(s.dice)}, HD95 {number(s.hd95_mm, 1)} mm" for s in known[:_MOST_NAMED]]
    more = len(known) - _MOST_NAMED
    return (*texts, f"and {count(more, 'class')} with a higher Dice") if more > 0 else tuple(texts)
