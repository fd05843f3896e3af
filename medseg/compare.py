"""Compare: evaluations of several methods on the same cases, so that "better" is a claim with evidence.

Cases are paired. Of each pair of methods the mean difference has a bootstrap interval, and a Wilcoxon signed-rank test;
its p values are corrected by Holm over all pairs, once for the mean of the classes, which is the verdict, and once for
the classes and regions by themselves. A method is called better where the corrected p is below 0.05, the interval lies
on one side of 0, and most of what differs goes the same way; elsewhere there is no evidence of difference, which is not
evidence that there is none.
"""

from __future__ import annotations

import csv
import io as text_io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from medseg import bootstrap
from medseg.errors import InputError
from medseg.evaluate import Evaluation
from medseg.geometry import Float
from medseg.metrics import DISTANCES, MEASURES, ClassScore
from medseg.records import Record, write_text

Verdict = Literal["better", "worse", "no evidence of difference", "mean and cases disagree"]

COMPARABLE = tuple(measure for measure in MEASURES if not measure.startswith("volume"))
"""The measures that are better in one direction."""

OVERALL = "mean of classes"
ALPHA = 0.05

DEFINITIONS = {
    "mean": "over the cases of each class, then over the classes, as in an evaluation",
    "difference": "second minus first, likewise",
    "both empty": "a class that neither the reference nor the two methods have in a case does not count there; where "
    "one of them finds it wrongly, the other, which does not, counts as perfect",
    "low, high": "95 % interval of the difference, by bootstrap of the cases (medseg.bootstrap)",
    "p": "Wilcoxon signed-rank test of the differences of the cases (for the mean of classes: of each case's mean over "
    "its classes), two-sided, rounded to nine digits; 1 where all are 0",
    "p_holm": "corrected by Holm over all pairs of methods; of classes and regions over all pairs and all of them",
    "probability": "part of the cases in which the second is better, ties half",
    "wins, ties, losses": "cases in which the second is better, alike (within 1e-9), worse",
    "verdict": f"better or worse (the second than the first) where p_holm < {ALPHA} and the interval is without 0; if "
    "then the signed ranks point the other way than the mean, the two disagree",
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
    """How two methods differ in one class or region, or in the mean of the classes; see ``DEFINITIONS``."""

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
        names: of the methods, in the order in which they were given.
        cases: ids that all methods have.
        left_out: ids that some method has not.
        classes, regions: that all methods have, by the names that the first gives them.
        left_out_classes: classes and regions that some method has not.
        methods: by rank.
        kendall_tau: how stable the ranking is.
        differences: one a pair of methods for the mean of the classes, then one a class or region and pair.
        values: structure -> case -> the measure, one a method; None where both masks are empty.
    """

    measure: str
    tolerance_mm: float
    definitions: dict[str, str] = DEFINITIONS
    names: tuple[str, ...]
    cases: tuple[str, ...]
    left_out: tuple[str, ...]
    classes: tuple[str, ...]
    regions: tuple[str, ...]
    left_out_classes: tuple[str, ...]
    methods: tuple[Ranked, ...]
    kendall_tau: float
    differences: tuple[Difference, ...]
    values: dict[str, dict[str, tuple[float | None, ...]]]

    def save_csv(self, path: Path) -> None:
        """Write one row a case and class or region with the value of each method, atomically."""
        text = text_io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "class", *self.names])
        for case in self.cases:
            for structure, values in self.values.items():
                writer.writerow([case, structure, *values[case]])
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


def compare(evaluations: Mapping[str, Evaluation], measure: str = "dice") -> Comparison:
    """Compare methods on the cases, classes and regions that all of them were scored on.

    Args:
        evaluations: two at least, by the name of the method. Labels are matched as ``Labels.like`` does.
        measure: one of ``COMPARABLE``, chosen before looking: of several measures one soon differs by chance.

    Raises:
        InputError: fewer than two, an unknown measure, no case or class in common or none that counts, other
            references, or NSD of other tolerances.
    """
    names = tuple(evaluations)
    if len(names) < 2:
        raise InputError("compare", f"{len(names)} evaluation", "two at least")
    if measure not in COMPARABLE:
        raise InputError("compare", f"{measure!r} is no measure to compare by", ", ".join(COMPARABLE))
    shared = _shared_structures(evaluations)
    scores = {name: _by_case(evaluations[name], {new: own[name] for new, own in shared.items()}) for name in names}
    cases = [case for case in scores[names[0]] if all(case in scores[name] for name in names)]
    classes = [name for name in evaluations[names[0]].labels.names if name in shared]
    if not cases or not classes:
        what = "class" if cases else "case"
        raise InputError(names[1], f"has no {what} in common with {names[0]}", "evaluations of the same references")
    _require_alike(evaluations, scores, cases, measure)
    values = {
        name: np.array([[_number(scores[m][case][name], measure) for m in names] for case in cases]) for name in shared
    }
    differences = [
        [*_pair_differences(values, classes, names, pair, measure)] for pair in combinations(range(len(names)), 2)
    ]
    if not differences[0]:
        raise InputError("compare", "no class counts in any case: all are empty", "cases with a class")
    overall = _corrected([one for pair in differences for one in pair if one.structure == OVERALL])
    alone = _corrected([one for pair in differences for one in pair if one.structure != OVERALL])
    failed = {name: len(evaluations[name].failed.keys() & set(cases)) for name in names}
    methods, tau = _ranking([_filled(values[name], measure) for name in classes], names, measure, failed)
    every = {case for name in names for case in scores[name]}
    known = {name for e in evaluations.values() for name in (*e.labels.names, *e.labels.regions)}
    used = {own for by_method in shared.values() for own in by_method.values()}
    return Comparison(
        measure=measure,
        tolerance_mm=evaluations[names[0]].tolerance_mm,
        names=names,
        cases=tuple(cases),
        left_out=tuple(sorted(every - set(cases))),
        classes=tuple(classes),
        regions=tuple(name for name in shared if name not in classes),
        left_out_classes=tuple(sorted(known - used)),
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
    """The p value of the two-sided Wilcoxon signed-rank test, as scipy has it; 1 where all differences are 0.

    Differences that are equal but for rounding are ties: they are rounded to nine digits first. The test is exact for
    up to 50 different ones, and by the normal distribution otherwise.
    """
    from scipy import stats

    apart = _apart(differences)
    if not len(apart):
        return 1.0
    exact = len(apart) <= 50 and len(np.unique(np.abs(apart))) == len(apart)
    return float(stats.wilcoxon(apart, method="exact" if exact else "approx").pvalue)


def _apart(differences: Float) -> Float:
    """The differences that are not 0, rounded."""
    rounded = np.round(differences, 9)
    return np.asarray(rounded[rounded != 0])


def _signed_ranks(differences: Float) -> float:
    """The sum of the ranks of the positive differences less that of the negative ones."""
    from scipy import stats

    apart = _apart(differences)
    return float((np.sign(apart) * stats.rankdata(np.abs(apart))).sum())


def _shared_structures(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, str]]:
    """Classes, then regions, that all have: by the name that the first gives them, the name that each method does."""
    first, *_ = evaluations.values()
    shared: dict[str, dict[str, str]] = {}
    for name in (*first.labels.names, *first.labels.regions):
        own = {method: _like(name, evaluation) for method, evaluation in evaluations.items()}
        if None not in own.values():
            shared[name] = {method: str(other) for method, other in own.items()}
    return shared


def _like(name: str, evaluation: Evaluation) -> str | None:
    """The class or region of that name in an evaluation; None where there is none, or several."""
    found = evaluation.labels.like(name)
    if not found and name in evaluation.labels.regions:
        return name
    return found[0] if len(found) == 1 else None


def _by_case(evaluation: Evaluation, names: Mapping[str, str]) -> dict[str, dict[str, ClassScore]]:
    """The scores of each case by the names of structures that all methods share."""
    found = {}
    for case in evaluation.cases:
        scores = {score.name: score for score in case.scores}
        found[case.case] = {new: scores[own] for new, own in names.items()}
    return found


def _require_alike(
    evaluations: Mapping[str, Evaluation],
    scores: Mapping[str, dict[str, dict[str, ClassScore]]],
    cases: Sequence[str],
    measure: str,
) -> None:
    first, *others = evaluations
    for name in others:
        for case in cases:
            for structure, score in scores[first][case].items():
                volumes = score.reference_ml, scores[name][case][structure].reference_ml
                if not math.isclose(*volumes, rel_tol=1e-6):
                    found = (
                        f"the reference of {structure} in {case} has {volumes[1]:g} ml, in {first} {volumes[0]:g} ml"
                    )
                    raise InputError(name, found, "evaluations with the same references")
        tolerances = [evaluations[method].tolerance_mm for method in (first, name)]
        if measure == "nsd" and tolerances[0] != tolerances[1]:
            found = f"its NSD is at {tolerances[1]:g} mm, that of {first} at {tolerances[0]:g} mm"
            raise InputError(name, found, "one tolerance", "score again with --tolerance-mm")


def _number(score: ClassScore, measure: str) -> float:
    value = getattr(score, measure)
    return math.nan if value is None else value


def _filled(rows: Float, measure: str) -> Float:
    """Values (cases, methods) with the perfect one where a method rightly found nothing and another did; see above."""
    perfect = 0.0 if measure in DISTANCES else 1.0
    known = np.isfinite(rows)
    return np.where(known | ~known.any(axis=1, keepdims=True), rows, perfect)


def _pair_differences(
    values: Mapping[str, Float], classes: Sequence[str], names: Sequence[str], pair: tuple[int, int], measure: str
) -> Iterator[Difference]:
    """How two methods differ in the mean of the classes, then in each structure; nothing where none counts.

    p is not corrected yet, and there is no verdict.
    """
    both = {name: _filled(rows[:, pair], measure) for name, rows in values.items()}
    both = {name: rows for name, rows in both.items() if np.isfinite(rows).any()}
    moved = np.stack([rows[:, 1] - rows[:, 0] for rows in both.values()], axis=1) if both else np.zeros((0, 0))
    columns = {name: [column] for column, name in enumerate(both)}
    alone = [column for name, [column] in columns.items() if name in classes]
    if not alone:
        return
    resampled = bootstrap.Resampled.of(moved)
    for structure, chosen in {OVERALL: alone, **columns}.items():
        means = [float(np.mean([_known(rows[:, m]).mean() for rows in _chosen(both, chosen)])) for m in (0, 1)]
        differences = _known(_mean_of_known(moved[:, chosen]))
        low, high = resampled.interval(chosen) or (None, None)
        wins, losses = _wins_and_losses(differences, measure)
        ties = len(differences) - wins - losses
        p = wilcoxon(differences)
        yield Difference(
            structure=structure,
            first=names[pair[0]],
            second=names[pair[1]],
            n=len(differences),
            mean_first=means[0],
            mean_second=means[1],
            difference=means[1] - means[0],
            low=low,
            high=high,
            probability=(wins + ties / 2) / len(differences),
            wins=wins,
            ties=ties,
            losses=losses,
            p=p,
            p_holm=p,
            verdict=_direction(means[1] - means[0], _signed_ranks(differences), measure),
        )


def _chosen(values: Mapping[str, Float], columns: Sequence[int]) -> list[Float]:
    return [rows for column, rows in enumerate(values.values()) if column in columns]


def _wins_and_losses(differences: Float, measure: str) -> tuple[int, int]:
    gain = -differences if measure in DISTANCES else differences
    return int((gain > _TIE).sum()), int((gain < -_TIE).sum())


def _direction(difference: float, signed_ranks: float, measure: str) -> Verdict:
    """Which of two methods is better, were there evidence."""
    if difference * signed_ranks <= 0:
        return "mean and cases disagree"
    return "better" if (difference > 0) != (measure in DISTANCES) else "worse"


def _known(values: Float) -> Float:
    return np.asarray(values[np.isfinite(values)])


def _mean_of_known(rows: Float) -> Float:
    """Mean of each row over what is known in it; NaN where nothing is."""
    known = np.isfinite(rows)
    return bootstrap.ratio(np.where(known, rows, 0.0).sum(axis=1), known.sum(axis=1))


def _corrected(differences: Sequence[Difference]) -> Iterator[Difference]:
    """With p values corrected over all of them, and the direction only where there is evidence."""
    for one, p in zip(differences, holm([one.p for one in differences]), strict=True):
        without_zero = one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
        verdict: Verdict = one.verdict if without_zero and p < ALPHA else "no evidence of difference"
        yield one.model_copy(update={"p_holm": p, "verdict": verdict})


def _ranking(
    classes: Sequence[Float], names: Sequence[str], measure: str, failed: Mapping[str, int]
) -> tuple[tuple[Ranked, ...], float]:
    """Methods by rank, and how stable that is (Wiesenfarth et al. 2021, Scientific Reports 11:2369).

    Args:
        classes: values (cases, methods) of each class.
        names: of the methods.
        measure: that they are of.
        failed: cases without a usable prediction, by method.
    """
    counted = [rows for rows in classes if np.isfinite(rows).any()]
    resampled = bootstrap.Resampled.of(np.concatenate(counted, axis=1))
    columns = [[n + place * len(names) for place in range(len(counted))] for n in range(len(names))]
    means = np.array([resampled.means[own].mean() for own in columns])
    drawn = np.stack([resampled.of_resamples[:, own].mean(axis=1) for own in columns], axis=1)
    sign = 1.0 if measure in DISTANCES else -1.0
    order, orders = _ranks(sign * means), _ranks(sign * drawn[np.isfinite(drawn).all(axis=1)])
    methods = []
    for n, name in enumerate(names):
        low, high = resampled.interval(columns[n]) or (None, None)
        shares = tuple(float((orders[:, n] == rank).mean()) for rank in range(1, len(names) + 1))
        rank, mean = int(order[n]), float(means[n])
        methods.append(Ranked(name=name, mean=mean, low=low, high=high, rank=rank, ranks=shares, n_failed=failed[name]))
    pairs = list(combinations(range(len(names)), 2))
    same = [np.sign(order[a] - order[b]) == np.sign(orders[:, a] - orders[:, b]) for a, b in pairs]
    turned = [np.sign(order[a] - order[b]) == -np.sign(orders[:, a] - orders[:, b]) for a, b in pairs]
    agreement = np.where(same, 1.0, np.where(turned, -1.0, 0.0))
    return tuple(sorted(methods, key=lambda method: method.rank)), float(agreement.mean())


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
    if one.verdict in ("better", "worse"):
        return f"{one.second} is {one.verdict} than {one.first}: {figures}"
    if one.verdict == "mean and cases disagree":
        counts = f"better in {one.wins}, worse in {one.losses}"
        return f"the mean and most cases disagree between {one.first} and {one.second} ({counts}): {figures}"
    return f"no evidence of difference between {one.first} and {one.second}: {figures}"
