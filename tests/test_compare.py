"""Comparisons: p values against scipy and statsmodels, empty classes, and what may not be compared."""

from __future__ import annotations

import csv
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medseg.compare import OVERALL, Comparison, compare, holm, load_evaluation, wilcoxon
from medseg.errors import InputError
from medseg.evaluate import CaseScores, Evaluation, Means
from medseg.metrics import MEASURES, ClassScore
from medseg.volume import Labels

LABELS = Labels(values={"a": 1, "b": 2})


def score(name: str, value: float | None, ml: float = 1.0) -> ClassScore:
    """A class with one value for every measure; None for a true negative."""
    known: dict[str, Any] = dict.fromkeys(MEASURES, value)
    empty = value is None
    status = "true_negative" if empty else "scored"
    return ClassScore(name=name, status=status, reference_ml=0.0 if empty else ml, prediction_ml=ml, **known)


def evaluation(rows: dict[str, tuple[float | None, ...]], **changes: Any) -> Evaluation:
    cases = [
        CaseScores(case=case, scores=tuple(score(name, value) for name, value in zip("ab", values, strict=False)))
        for case, values in rows.items()
    ]
    body = {"labels": LABELS, "tolerance_mm": 1.0, "mean": Means(), "mean_low": Means(), "mean_high": Means()}
    return Evaluation(**{**body, "classes": (), "cases": tuple(cases), **changes})


def noisy(seed: int, gain: float = 0.0, n: int = 40) -> dict[str, tuple[float | None, ...]]:
    """Values of cases whose difficulty is shared by all seeds."""
    base = np.random.default_rng(99).beta(18.0, 2.0, n)
    rng = np.random.default_rng(seed)
    return {
        f"case_{i:02d}": (float(base[i] + gain + rng.normal(0, 0.005)), float(base[i] + gain + rng.normal(0, 0.005)))
        for i in range(n)
    }


# ---- verdicts --------------------------------------------------------------------------------------------------------


def test_two_seeds_do_not_differ() -> None:
    found = compare({"first": evaluation(noisy(1)), "second": evaluation(noisy(2))})
    overall = found.differences[0]
    assert overall.verdict == "no evidence of difference"
    assert overall.low is not None
    assert overall.high is not None
    assert overall.low < 0 < overall.high
    assert found.sentences[0].startswith("no evidence of difference between first and second: dice ")


def test_a_better_method_is_called_better_and_the_other_way_round_worse() -> None:
    plain, better = evaluation(noisy(1)), evaluation(noisy(2, gain=0.01))
    found = compare({"plain": plain, "better": better})
    assert [one.verdict for one in found.differences] == ["better"] * 3
    assert found.sentences[0].startswith("better is better than plain: dice +0.0")
    assert [method.name for method in found.methods] == ["better", "plain"]
    assert found.methods[0].ranks[0] == 1.0
    assert found.kendall_tau == 1.0
    assert compare({"better": better, "plain": plain}).differences[0].verdict == "worse"


def test_distances_are_better_the_smaller_they_are() -> None:
    found = compare({"near": evaluation(noisy(1)), "far": evaluation(noisy(2, gain=0.01))}, "hd95_mm")
    assert found.differences[0].verdict == "worse"
    assert found.methods[0].name == "near"


def test_numbers_by_hand() -> None:
    first = evaluation({"1": (0.5, 0.7), "2": (0.6, 0.8), "3": (0.9, 0.9), "4": (0.8, 0.6)})
    second = evaluation({"1": (0.7, 0.7), "2": (0.6, 0.8), "3": (0.8, 0.8), "4": (0.9, 0.7)})
    found = compare({"first": first, "second": second})
    overall, a, _ = found.differences
    assert (overall.structure, overall.n, overall.wins, overall.ties, overall.losses) == (OVERALL, 4, 2, 1, 1)
    assert overall.mean_first == pytest.approx((0.6 + 0.7 + 0.9 + 0.7) / 4)
    assert overall.difference == pytest.approx((0.1 + 0.0 - 0.1 + 0.1) / 4)
    assert overall.probability == (2 + 0.5) / 4
    assert (overall.p, overall.p_holm) == (wilcoxon(np.array([0.1, -0.1, 0.1])),) * 2
    assert (overall.low, overall.high, overall.verdict) == (None, None, "no evidence of difference")
    assert a.difference == pytest.approx((0.2 - 0.1 + 0.1) / 4)
    assert found.values["a"]["2"] == (0.6, 0.6)


def test_equal_methods_are_all_ties() -> None:
    found = compare({"x": evaluation(noisy(1)), "y": evaluation(noisy(1))})
    overall = found.differences[0]
    assert (overall.difference, overall.low, overall.high, overall.p, overall.ties) == (0.0, 0.0, 0.0, 1.0, 40)
    assert overall.verdict == "no evidence of difference"
    assert [(method.rank, method.ranks) for method in found.methods] == [(1, (1.0, 0.0))] * 2
    assert found.kendall_tau == 1.0  # the order never changes


def test_three_methods_are_ranked() -> None:
    gains = {"worst": -0.02, "best": 0.02, "middle": 0.0}
    found = compare({name: evaluation(noisy(n, gain)) for n, (name, gain) in enumerate(gains.items())})
    assert [method.name for method in found.methods] == ["best", "middle", "worst"]
    assert len(found.differences) == 3 * 3
    assert [(one.first, one.second) for one in found.differences[:3]] == [
        ("worst", "best"),
        ("worst", "middle"),
        ("best", "middle"),
    ]
    assert all(sum(method.ranks) == pytest.approx(1.0) for method in found.methods)


# ---- what counts -----------------------------------------------------------------------------------------------------


def quiet_and_loud() -> tuple[Evaluation, Evaluation]:
    """Two cases without b, which the second method finds wrongly in the first case."""
    quiet = evaluation({"1": (0.5, None), "2": (0.5, None)})
    wrong = CaseScores(case="1", scores=(score("a", 0.5), score("b", 0.0, ml=0.0)))
    return quiet, quiet.model_copy(update={"cases": (wrong, quiet.cases[1])})


def test_a_true_negative_is_perfect_beside_a_false_positive() -> None:
    quiet, loud = quiet_and_loud()
    found = compare({"quiet": quiet, "loud": loud})
    assert found.values["b"] == {"1": (None, 0.0), "2": (None, None)}
    overall, _, b = found.differences
    assert (b.n, b.mean_first, b.mean_second, b.losses) == (1, 1.0, 0.0, 1)
    assert (overall.n, overall.mean_first, overall.mean_second) == (2, 0.75, 0.25)
    far = compare({"quiet": quiet, "loud": loud}, "hd95_mm")
    assert (far.differences[2].mean_first, far.differences[2].mean_second) == (0.0, 0.0)  # here 0 is perfect


def test_two_methods_compare_the_same_whatever_the_third() -> None:
    quiet, loud = quiet_and_loud()
    pair = compare({"x": quiet, "y": quiet}).differences[0]
    among = compare({"x": quiet, "y": quiet, "z": loud}).differences[0]
    assert pair.model_dump(exclude={"p_holm"}) == among.model_dump(exclude={"p_holm"})


def test_the_mean_of_classes_is_that_of_an_evaluation() -> None:
    # b is there in one case of twelve: its mean weighs as much as that of a.
    first = {f"{n:02d}": (0.8, 0.9 if n == 0 else None) for n in range(12)}
    second = {f"{n:02d}": (0.81, 0.7 if n == 0 else None) for n in range(12)}
    overall = compare({"x": evaluation(first), "y": evaluation(second)}).differences[0]
    assert (overall.mean_first, overall.mean_second) == (pytest.approx(0.85), pytest.approx(0.755))
    assert overall.difference == pytest.approx(-0.095)
    assert (overall.wins, overall.losses, overall.low) == (11, 1, None)  # of one case there is no interval


def test_labels_are_matched_by_their_words_and_what_only_some_have_is_listed() -> None:
    first = evaluation({"1": (0.5, 0.6)}, labels=Labels(values={"a": 1, "b": 2, "own": 3}))
    scores = (score("A", 0.7), score("b", 0.8))
    second = evaluation({"1": (0.7, 0.8)}, labels=Labels(values={"A": 4, "b": 2}))
    second = second.model_copy(update={"cases": (CaseScores(case="1", scores=scores),)})
    found = compare({"x": first, "y": second})
    assert (found.classes, found.left_out_classes) == (("a", "b"), ("own",))
    assert found.values["a"]["1"] == (0.5, 0.7)


def test_regions_are_compared_but_not_in_the_mean() -> None:
    labels = Labels(values={"a": 1, "b": 2}, regions={"whole": (1, 2)})
    made = []
    for value in (0.5, 0.9):
        scores = (score("a", 0.5), score("b", 0.7), score("whole", value))
        body = evaluation({"1": (0.5, 0.7)}, labels=labels)
        made.append(body.model_copy(update={"cases": (CaseScores(case="1", scores=scores),)}))
    found = compare({"x": made[0], "y": made[1]})
    assert found.regions == ("whole",)
    assert [one.structure for one in found.differences] == [OVERALL, "a", "b", "whole"]
    assert (found.differences[0].difference, found.differences[3].difference) == (0.0, pytest.approx(0.4))


# ---- the verdict needs all of its witnesses --------------------------------------------------------------------------


def differing(gains: NDArray[np.float64]) -> Comparison:
    base = np.random.default_rng(5).uniform(0.5, 0.6, len(gains))
    rows = [{f"{n:03d}": (float(v), float(v)) for n, v in enumerate(base + add)} for add in (0.0 * gains, gains)]
    return compare({"old": evaluation(rows[0]), "new": evaluation(rows[1])})


def test_a_mean_that_few_cases_make_is_not_better() -> None:
    gains = np.where(np.arange(100) < 15, 0.3, -0.01)
    found = differing(gains + np.random.default_rng(0).normal(0, 0.001, 100))
    overall = found.differences[0]
    assert overall.low is not None
    assert (overall.low > 0, overall.p_holm < 0.001, overall.wins) == (True, True, 15)
    assert overall.verdict == "mean and cases disagree"
    assert "better in 15, worse in 85" in found.sentences[0]


def test_an_interval_alone_is_no_evidence() -> None:
    # Eleven of twenty cases a little better, four much better, five worse: the mean is above 0, the ranks are not sure.
    overall = differing(np.array([0.3] * 3 + [0.001] * 8 + [-0.002] * 9)).differences[0]
    assert overall.p > 0.05
    assert overall.verdict == "no evidence of difference"


def test_a_test_alone_is_no_evidence() -> None:
    # Nearly all cases are a little better, and one is lost: the mean may be on either side.
    overall = differing(np.array([0.01] * 29 + [-0.5])).differences[0]
    assert overall.p < 0.05
    assert overall.low is not None
    assert overall.high is not None
    assert overall.low < 0 < overall.high
    assert overall.verdict == "no evidence of difference"


def test_p_values_are_corrected_for_the_number_of_pairs_and_of_classes() -> None:
    found = compare({str(n): evaluation(noisy(n, gain=0.0014 * n)) for n in range(3)})
    assert [one.p_holm for one in found.differences[:3]] == holm([one.p for one in found.differences[:3]])
    assert [one.p_holm for one in found.differences[3:]] == holm([one.p for one in found.differences[3:]])
    saved = [one for one in found.differences if one.p < 0.05 <= one.p_holm]
    assert saved  # without the correction they would differ
    assert {one.verdict for one in saved} == {"no evidence of difference"}


def test_failed_cases_are_counted() -> None:
    made = evaluation(noisy(1))
    failed = made.cases[0].model_copy(update={"reason": "there is no prediction"})
    found = compare({"x": made, "y": made.model_copy(update={"cases": (failed, *made.cases[1:])})})
    assert {method.name: method.n_failed for method in found.methods} == {"x": 0, "y": 1}


def test_a_ranking_that_changes_with_the_cases_is_not_stable() -> None:
    found = compare({"x": evaluation(noisy(1)), "y": evaluation(noisy(2))})
    assert -0.9 < found.kendall_tau < 0.9
    first, second = found.methods
    assert first.ranks[0] == pytest.approx(second.ranks[1])
    assert found.kendall_tau == pytest.approx(first.ranks[0] - second.ranks[0])


def test_only_common_cases_count_and_the_others_are_listed() -> None:
    first, second = evaluation({"1": (0.5, 0.5), "2": (0.5, 0.5)}), evaluation({"2": (0.6, 0.6), "3": (0.1, 0.1)})
    found = compare({"x": first, "y": second})
    assert (found.cases, found.left_out) == (("2",), ("1", "3"))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (evaluation({"9": (0.5, 0.5)}), "no case in common"),
        (evaluation({"1": (0.5,)}, labels=Labels(values={"c": 1})), "no class in common"),
        (evaluation({"1": (None, 0.5)}), "the reference of a in 1 has 0 ml, in x 1 ml"),
        (evaluation({"1": (0.5, 0.5)}, tolerance_mm=2.0), "NSD is at 2 mm, that of x at 1 mm"),
    ],
    ids=["cases", "classes", "references", "tolerance"],
)
def test_what_cannot_be_compared_is_refused(second: Evaluation, words: str) -> None:
    with pytest.raises(InputError, match=words):
        compare({"x": evaluation({"1": (0.5, 0.5)}), "y": second}, "nsd")


def test_one_evaluation_or_nothing_but_empty_classes_is_refused() -> None:
    with pytest.raises(InputError, match="two at least"):
        compare({"x": evaluation({"1": (0.5, 0.5)})})
    with pytest.raises(InputError, match="'volume_difference_ml' is no measure to compare by"):
        compare({name: evaluation({"1": (0.5, 0.5)}) for name in "xy"}, "volume_difference_ml")
    empty = evaluation({"1": (None, None)})
    with pytest.raises(InputError, match="no class counts"):
        compare({"x": empty, "y": empty})


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.06 as none may fall below the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_equals_statsmodels() -> None:
    # Figures: statsmodels 0.15.0, stats.multitest.multipletests(p, method="holm").
    p = [0.001, 0.2, 0.013, 0.013, 0.04, 0.7]
    assert holm(p) == pytest.approx([0.006, 0.4, 0.065, 0.065, 0.12, 0.7])


@pytest.mark.peer
@given(p=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12))
def test_holm_equals_statsmodels_everywhere(p: list[float]) -> None:
    if importlib.util.find_spec("statsmodels") is None:
        pytest.skip("statsmodels is not installed: pip install statsmodels")
    from statsmodels.stats.multitest import multipletests

    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist())


@pytest.mark.parametrize(("n", "method"), [(6, "exact"), (50, "exact"), (200, "approx")])
def test_wilcoxon_equals_scipy(n: int, method: str) -> None:
    differences = np.random.default_rng(n).normal(0.1, 1.0, n)
    expected = float(scipy.stats.wilcoxon(np.round(differences, 9), method=method).pvalue)
    assert wilcoxon(differences) == expected
    assert wilcoxon(np.concatenate([differences, np.zeros(3)])) == expected  # zeros say nothing of the direction


def test_wilcoxon_equals_all_choices_of_signs() -> None:
    ranks = np.arange(1, 9)
    sums = [sum(chosen) for size in range(9) for chosen in itertools.combinations(ranks, size)]
    positive = 1 + 2 + 4  # the smallest, the second and the fourth are above 0
    extreme = sum(total <= positive or total >= 36 - positive for total in sums)
    signs = np.array([1, 1, -1, 1, -1, -1, -1, -1])
    assert wilcoxon(signs * ranks / 10) == pytest.approx(extreme / 2**8)


def test_rounding_does_not_part_ties() -> None:
    rng = np.random.default_rng(0)
    signs = np.where(np.arange(24) < 17, 0.1, -0.1)
    found = {
        round(wilcoxon((base + signs) - base), 12) for base in (rng.integers(0, 900, 24) / 1000 for _ in range(50))
    }
    assert found == {round(float(scipy.stats.wilcoxon(signs, method="approx").pvalue), 12)}


def test_wilcoxon_by_hand() -> None:
    # Five differences of one sign: of the 32 ways to choose signs two are as far from the middle.
    assert wilcoxon(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == 2 / 32
    assert wilcoxon(np.zeros(5)) == 1.0


# ---- files -----------------------------------------------------------------------------------------------------------


def test_record_and_table_are_kept(tmp_path: Path) -> None:
    found = compare({"x": evaluation({"1": (0.5, None)}), "y": evaluation({"1": (0.25, None)})})
    found.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == found
    found.save_csv(tmp_path / "values.csv")
    with (tmp_path / "values.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case", "class", "x", "y"]
    assert rows[1:] == [["1", "a", "0.5", "0.25"], ["1", "b", "", ""]]


def test_evaluations_are_found_where_runs_and_evaluate_leave_them(tmp_path: Path) -> None:
    made = evaluation({"1": (0.5, 0.5)})
    made.save(tmp_path / "scores" / "evaluation.json")
    made.save(tmp_path / "run" / "evaluation" / "evaluation.json")
    for place in ("scores", "run", "scores/evaluation.json"):
        assert load_evaluation(tmp_path / place) == made
    with pytest.raises(InputError, match=r"holds no evaluation\.json.*medseg evaluate"):
        load_evaluation(tmp_path)
    with pytest.raises(InputError, match="is not there"):
        load_evaluation(tmp_path / "nowhere")
