"""Compare: evaluations of several methods on the same cases, so that "better" is a claim with evidence.

Cases are paired. Of each pair of methods the mean difference has a bootstrap interval, and a Wilcoxon signed-rank test;
its p values are corrected by Holm over all pairs, once for the mean of the classes, which is the verdict, and once for
the classes by themselves. A method is called better where both the corrected p is below 0.05 and the interval lies on
one side of 0; elsewhere there is no evidence of difference, which is not evidence that there is none.
"""

from __future__ import annotations

import csv
import io as text_io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg import bootstrap
from medseg.errors import InputError
from medseg.evaluate import Evaluation
from medseg.geometry import Float
from medseg.metrics import DISTANCES, ClassScore
from medseg.records import Record, write_text

Measure = Literal["dice", "nsd", "hd95_mm", "iou", "sensitivity", "precision", "hd_mm", "assd_mm"]
Verdict = Literal["better", "worse", "no evidence of difference"]

OVERALL = "mean of classes"
ALPHA = 0.05

DEFINITIONS = {
    "value": "of a case and class the measure; of a case its mean over the classes that a method or the reference has",
    "both empty": "a class that neither the reference nor any method has in a case does not count there; where another "
    "method finds it wrongly, not finding it counts as perfect",
    "difference": "second minus first, mean over the cases",
    "low, high": "95 % interval of the difference, by bootstrap of the cases (medseg.bootstrap)",
    "p": "Wilcoxon signed-rank test of the differences, two-sided; 1 where all are 0",
    "p_holm": "corrected by Holm over all pairs of methods, of the classes over all pairs and classes",
    "probability": "part of the cases in which the second is better, ties half",
    "wins, ties, losses": "cases in which the second is better, alike (within 1e-9), worse",
    "verdict": f"better or worse (the second than the first) where p_holm < {ALPHA} and the interval is without 0",
    "ranks": "parts of the resamples in which a method has each rank, from the first on; equal ones share it",
    "kendall_tau": "mean rank correlation of the resamples with all cases: 1 where the order never changes",
}
"""What each number of a comparison means."""

_TIE = 1e-9


class Ranked(Record):
    """One method: the mean over the cases of the mean over the classes, its interval, and its rank, also in resamples.

    Attributes: see ``DEFINITIONS``; ``n_failed`` counts cases.
    """

    name: str
    mean: float
    low: float | None
    high: float | None
    rank: int
    ranks: tuple[float, ...]
    n_failed: int


class Difference(Record):
    """How two methods differ in one class, or in the mean of the classes; see ``DEFINITIONS``."""

    structure: str
    first: str
    second: str
    n: int
    mean_first: float
    mean_second: float
    difference: float
    low: float | None
    high: float | None
    probability: float
    wins: int
    ties: int
    losses: int
    p: float
    p_holm: float
    verdict: Verdict


class Comparison(Record):
    """What a comparison found.

    Attributes:
        measure: that was compared.
        tolerance_mm: of NSD.
        definitions: of every number.
        cases: ids that all methods have.
        left_out: ids that some method has not.
        classes: that all methods have.
        methods: by rank.
        kendall_tau: how stable the ranking is.
        differences: one a pair of methods for the mean of the classes, then one a class and pair.
        values: of each case and class (and the mean of the classes), one a method in the order in which they were
            given; None where the class does not count.
    """

    measure: Measure
    tolerance_mm: float
    definitions: dict[str, str] = DEFINITIONS
    cases: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    classes: tuple[str, ...]
    names: tuple[str, ...]
    methods: tuple[Ranked, ...]
    kendall_tau: float
    differences: tuple[Difference, ...]
    values: dict[str, dict[str, tuple[float | None, ...]]]

    def save_csv(self, path: Path) -> None:
        """Write one row a case and class with the value of each method, atomically."""
        text = text_io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "class", *self.names])
        for case in self.cases:
            for structure in (OVERALL, *self.classes):
                writer.writerow([case, structure, *self.values[structure][case]])
        write_text(path, text.getvalue())

    @property
    def sentences(self) -> tuple[str, ...]:
        """The verdict over each pair of methods, in words."""
        return tuple(_sentence(one, self.measure) for one in self.differences if one.structure == OVERALL)


def load_evaluation(place: Path) -> Evaluation:
    """The evaluation at a place: a file, the output folder of ``medseg evaluate``, or that of ``medseg run``.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    for path in (place, place / "evaluation.json", place / "evaluation" / "evaluation.json"):
        if path.is_file():
            return Evaluation.load(path)
    found = "holds no evaluation.json" if place.is_dir() else "is not there"
    remedy = "score masks with `medseg evaluate` first"
    raise InputError(place, found, "the output folder of `medseg evaluate` or `medseg run`", remedy)


def compare(evaluations: Mapping[str, Evaluation], measure: Measure = "dice") -> Comparison:
    """Compare methods on the cases and classes that all of them were scored on.

    Args:
        evaluations: two at least, by the name of the method.
        measure: one, chosen before looking: with each further one something differs by chance.

    Raises:
        InputError: fewer than two, no case or class in common, other references, or NSD of other tolerances.
    """
    names = tuple(evaluations)
    if len(names) < 2:
        raise InputError("compare", f"{len(names)} evaluation", "two at least")
    first = evaluations[names[0]]
    scores = {name: _by_case(evaluation) for name, evaluation in evaluations.items()}
    cases = [case for case in scores[names[0]] if all(case in scores[name] for name in names)]
    classes = [c for c in first.labels.names if all(c in evaluations[other].labels.values for other in names)]
    if not cases or not classes:
        what = "case" if not cases else "class"
        raise InputError(names[1], f"has no {what} in common with {names[0]}", "evaluations of the same references")
    _require_alike(evaluations, scores, cases, classes, measure)
    every = {case for name in names for case in scores[name]}
    values = {
        name: np.array([_values([scores[m][c][name] for m in names], measure) for c in cases]) for name in classes
    }
    values = {OVERALL: _mean_known(np.stack(list(values.values()))), **values}
    if not np.isfinite(values[OVERALL]).any():
        raise InputError("compare", "no class counts in any case: all are empty", "cases with a class")
    overall = _corrected(_differences({OVERALL: values[OVERALL]}, names, measure))
    alone = _corrected(_differences({name: values[name] for name in classes}, names, measure))
    methods, tau = _ranking(
        values[OVERALL], names, measure, {n: evaluations[n].failed.keys() & set(cases) for n in names}
    )
    return Comparison(
        measure=measure,
        tolerance_mm=first.tolerance_mm,
        cases=tuple(cases),
        left_out=tuple(sorted(every - set(cases))),
        classes=tuple(classes),
        names=names,
        methods=methods,
        kendall_tau=tau,
        differences=(*overall, *alone),
        values={name: _plain(cases, rows) for name, rows in values.items()},
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p values, in the order given (Holm 1979, Scandinavian Journal of Statistics 6:65)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = least
    return corrected


def wilcoxon(differences: Float) -> float:
    """The p value of the two-sided Wilcoxon signed-rank test, as scipy has it; 1 where all differences are 0."""
    from scipy import stats

    moved = differences[np.abs(differences) > _TIE]
    return float(stats.wilcoxon(moved).pvalue) if len(moved) else 1.0


def _by_case(evaluation: Evaluation) -> dict[str, dict[str, ClassScore]]:
    return {case.case: {score.name: score for score in case.scores} for case in evaluation.cases}


def _require_alike(
    evaluations: Mapping[str, Evaluation],
    scores: Mapping[str, dict[str, dict[str, ClassScore]]],
    cases: Sequence[str],
    classes: Sequence[str],
    measure: Measure,
) -> None:
    first, *others = evaluations
    for name in others:
        for case, structure in ((case, structure) for case in cases for structure in classes):
            volumes = [scores[method][case][structure].reference_ml for method in (first, name)]
            if not math.isclose(*volumes, rel_tol=1e-6):
                found = f"the reference of {structure} in {case} has {volumes[1]:g} ml, in {first} {volumes[0]:g} ml"
                raise InputError(name, found, "evaluations with the same references")
        tolerances = [evaluations[method].tolerance_mm for method in (first, name)]
        if measure == "nsd" and tolerances[0] != tolerances[1]:
            found = f"its NSD is at {tolerances[1]:g} mm, that of {first} at {tolerances[0]:g} mm"
            raise InputError(name, found, "one tolerance", "score again with --tolerance-mm")


def _values(scores: Sequence[ClassScore], measure: Measure) -> list[float]:
    """The measure of one class in one case, by method; all NaN where it does not count, perfect where that is due."""
    found = [getattr(score, measure) for score in scores]
    perfect = 0.0 if measure in DISTANCES else 1.0
    counts = any(value is not None for value in found)
    return [(perfect if value is None else value) if counts else math.nan for value in found]


def _mean_known(values: Float) -> Float:
    """Mean over the first axis (classes) of what counts; NaN where nothing does."""
    known = np.isfinite(values)
    number = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.asarray(np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0))


def _differences(values: Mapping[str, Float], names: Sequence[str], measure: Measure) -> Iterator[Difference]:
    """Of each structure every pair of methods, over the cases where it counts."""
    pairs = list(combinations(range(len(names)), 2))
    moved = [rows[:, b] - rows[:, a] for rows in values.values() for a, b in pairs]
    resampled = bootstrap.Resampled.of(np.stack(moved, axis=1))
    columns = ((structure, rows, a, b) for structure, rows in values.items() for a, b in pairs)
    for column, (structure, rows, a, b) in enumerate(columns):
        counted = rows[np.isfinite(rows).all(axis=1)]
        if len(counted):
            low, high = resampled.interval([column]) or (None, None)
            known = {"structure": structure, "first": names[a], "second": names[b], "low": low, "high": high}
            yield Difference(**known, **_paired(counted[:, a], counted[:, b], measure))


def _paired(first: Float, second: Float, measure: Measure) -> dict[str, Any]:
    """What two methods' values of the same cases say without resampling; p is not corrected yet."""
    moved = second - first
    gain = -moved if measure in DISTANCES else moved
    wins, losses = int((gain > _TIE).sum()), int((gain < -_TIE).sum())
    ties = len(moved) - wins - losses
    p = wilcoxon(moved)
    return {
        "n": len(moved),
        "mean_first": float(first.mean()),
        "mean_second": float(second.mean()),
        "difference": float(moved.mean()),
        "probability": (wins + ties / 2) / len(moved),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "p": p,
        "p_holm": p,
        "verdict": "better" if gain.mean() > 0 else "worse",
    }


def _corrected(differences: Iterator[Difference]) -> Iterator[Difference]:
    """With p values corrected over all of them, and the verdict that follows."""
    found = list(differences)
    for one, p in zip(found, holm([one.p for one in found]), strict=True):
        aside = one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
        verdict: Verdict = one.verdict if aside and p < ALPHA else "no evidence of difference"
        yield one.model_copy(update={"p_holm": p, "verdict": verdict})


def _ranking(
    values: Float, names: Sequence[str], measure: Measure, failed: Mapping[str, set[str]]
) -> tuple[tuple[Ranked, ...], float]:
    """Methods by rank, and how stable that is (Wiesenfarth et al. 2021, Scientific Reports 11:2369)."""
    counted = values[np.isfinite(values).all(axis=1)]
    resampled = bootstrap.Resampled.of(counted)
    sign = 1.0 if measure in DISTANCES else -1.0
    at, drawn = _ranks(sign * resampled.means), _ranks(sign * resampled.of_resamples)
    pairs = list(combinations(range(len(names)), 2))
    agree = [np.sign(at[a] - at[b]) * np.sign(drawn[:, a] - drawn[:, b]) for a, b in pairs]
    methods = []
    for n, name in enumerate(names):
        low, high = resampled.interval([n]) or (None, None)
        shares = tuple(float((drawn[:, n] == rank).mean()) for rank in range(1, len(names) + 1))
        mean = float(resampled.means[n])
        known = {"name": name, "mean": mean, "low": low, "high": high, "n_failed": len(failed[name])}
        methods.append(Ranked(**known, rank=int(at[n]), ranks=shares))
    return tuple(sorted(methods, key=lambda method: method.rank)), float(np.mean(agree))


def _ranks(values: Float) -> Float:
    """Rank of each along the last axis, from 1 for the smallest; equal ones share the best."""
    return np.asarray(1 + (values[..., np.newaxis, :] < values[..., :, np.newaxis] - _TIE).sum(axis=-1))


def _plain(cases: Sequence[str], rows: Float) -> dict[str, tuple[float | None, ...]]:
    return {
        case: tuple(None if math.isnan(value) else value for value in row)
        for case, row in zip(cases, rows.tolist(), strict=True)
    }


def _sentence(one: Difference, measure: str) -> str:
    interval = "too few cases for an interval"
    if one.low is not None and one.high is not None:
        interval = f"95 % interval {one.low:+.4f} to {one.high:+.4f}"
    figures = f"{measure} {one.difference:+.4f} ({interval}), Wilcoxon p {one.p_holm:.2g} (Holm), {one.n} cases"
    if one.verdict == "no evidence of difference":
        return f"no evidence of difference between {one.first} and {one.second}: {figures}"
    return f"{one.second} is {one.verdict} than {one.first}: {figures}"
