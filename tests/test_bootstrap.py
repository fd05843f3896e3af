"""Intervals: they hold the truth as often as they say, and are scipy's where the definitions agree."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from medseg.bootstrap import FEWEST, Resampled, bca, draws

Float = NDArray[np.float64]
EXPERIMENTS = 1500
MANY = 10**9  # of so many cases the tails are not expanded


def dice_like(rng: np.random.Generator, n: int) -> Float:
    return rng.beta(18.0, 2.0, (n, EXPERIMENTS))  # mean 0.9, with a tail to the left


def normal(rng: np.random.Generator, n: int) -> Float:
    return rng.normal(0.9, 1.0, (n, EXPERIMENTS))


@pytest.mark.parametrize(("kind", "n"), [(normal, 12), (normal, 40), (dice_like, 40)])
def test_intervals_hold_the_truth_as_often_as_they_say(kind: object, n: int) -> None:
    values = kind(np.random.default_rng(n), n)  # type: ignore[operator]
    found = Resampled.of(values)
    ends = np.array([found.interval([column]) for column in range(EXPERIMENTS)])
    assert 0.93 <= np.mean((ends[:, 0] <= 0.9) & (ends[:, 1] >= 0.9)) <= 0.97


def test_intervals_of_a_mean_over_classes_hold_it_too() -> None:
    # Two classes of one case are alike (correlation 0.8): drawn apart, their mean would seem more certain than it is.
    rng = np.random.default_rng(3)
    shared = rng.normal(size=(40, EXPERIMENTS))
    first, second = (2.0 * shared + rng.normal(size=shared.shape) for _ in range(2))
    found = Resampled.of(np.concatenate([first, second], axis=1))
    ends = np.array([found.interval([column, column + EXPERIMENTS]) for column in range(EXPERIMENTS)])
    assert 0.93 <= np.mean((ends[:, 0] <= 0) & (ends[:, 1] >= 0)) <= 0.97


@pytest.mark.parametrize("kind", [normal, dice_like])
def test_equals_scipy_without_expansion(kind: object) -> None:
    values = kind(np.random.default_rng(7), 30)[:, 0]  # type: ignore[operator]
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=1).confidence_interval
    found = Resampled.of(values[:, np.newaxis])
    ends = bca(float(found.means[0]), found.of_resamples[:, 0], found.without_one[:, 0], MANY)
    assert ends == pytest.approx(tuple(expected), abs=0.02 * values.std())  # the noise of resampling


def test_bca_by_hand() -> None:
    # Resamples 1 to 99 about 50 are without bias, cases left out evenly without acceleration: plain percentiles.
    resampled = np.arange(1.0, 100.0)
    low, high = bca(50.0, resampled, np.array([49.0, 50.0, 51.0]), MANY)
    assert (low, high) == pytest.approx((1 + 0.025 * 98, 1 + 0.975 * 98))
    # The expansion for ten cases: t of 9 degrees of freedom is 2.2622, times the root of 10/9.
    low, _ = bca(50.0, resampled, np.array([49.0, 50.0, 51.0]), 10)
    assert low == pytest.approx(1 + scipy.stats.norm.sf(2.262157 * np.sqrt(10 / 9)) * 98, rel=1e-5)


def test_a_skewed_statistic_moves_the_interval_towards_its_tail() -> None:
    # Cases left out: nine alike and one far below. With influences u of -1 nine times and 9 once, their sum of cubes is
    # 9^3 - 9 = 720 and of squares 90: the acceleration is 720 / (6 * 90^1.5) = 0.14055.
    resampled = np.arange(1.0, 100.0)
    left_out = np.array([51.0] * 9 + [41.0])
    low, high = bca(50.0, resampled, left_out, MANY)
    z = scipy.stats.norm.ppf(0.975)
    ends = [scipy.stats.norm.cdf(t / (1 - 0.140546 * t)) for t in (-z, z)]
    assert (low, high) == pytest.approx([1 + end * 98 for end in ends], rel=1e-4)


def test_bias_moves_the_interval_towards_the_statistic() -> None:
    resampled = np.arange(1.0, 100.0)
    low, high = bca(60.0, resampled, np.array([59.0, 60.0, 61.0]), MANY)
    plain = bca(50.0, resampled, np.array([49.0, 50.0, 51.0]), MANY)
    assert low > plain[0]
    assert high > plain[1]


def test_equal_seeds_draw_equally_and_whole_cases_are_drawn() -> None:
    blocks = [np.concatenate(list(draws(7, resamples=50, seed=3))) for _ in range(2)]
    assert (blocks[0] == blocks[1]).all()
    assert blocks[0].shape == (50, 7)
    assert set(np.unique(blocks[0])) == set(range(7))


def test_blocks_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(draws(7, resamples=50)))
    monkeypatch.setattr("medseg.bootstrap._CHUNK", 40)
    assert (np.concatenate(list(draws(7, resamples=50))) == whole).all()


def test_cases_that_do_not_count_are_left_out() -> None:
    values = np.array([[0.5, np.nan], [0.7, 0.2], [0.9, 0.4], [0.6, 0.3], [0.8, 0.1], [0.7, 0.5]])
    values = np.concatenate([values, values])
    found = Resampled.of(values)
    assert found.means == pytest.approx([0.7, 0.3])
    assert found.without_one[0] == pytest.approx([7.9 / 11, 0.3])
    assert found.without_one[1] == pytest.approx([7.7 / 11, 2.8 / 9])
    counted = np.isfinite(values[:, 1])
    alone = Resampled.of(values[counted, 1:])
    assert found.interval([1]) == pytest.approx(alone.interval([0]), abs=0.03)
    # Cases that do not count have no say in how skewed the interval is.
    expected = bca(0.3, found.of_resamples[:, 1], found.without_one[counted, 1], 10)
    assert found.interval([1]) == expected


def test_resamples_without_a_class_are_left_out() -> None:
    values = np.zeros((100, 2))
    values[10:, 1] = np.nan
    values[:10, 1] = 1.0
    found = Resampled.of(values)
    assert found.interval([0, 1]) == (0.5, 0.5)  # not 0, which the mean of the first class alone would be


def test_too_few_cases_have_no_interval() -> None:
    rng = np.random.default_rng(0)
    assert Resampled.of(rng.random((FEWEST - 1, 1))).interval([0]) is None
    assert Resampled.of(rng.random((FEWEST, 1))).interval([0]) is not None
    assert Resampled.of(rng.random((20, 1))).interval([]) is None
    rare = np.full((20, 1), np.nan)
    rare[3] = 1.0
    assert Resampled.of(rare).interval([0]) is None


def test_equal_cases_have_an_interval_without_width() -> None:
    assert Resampled.of(np.full((12, 1), 0.75)).interval([0]) == (0.75, 0.75)


def test_a_column_without_cases_has_no_mean() -> None:
    found = Resampled.of(np.array([[np.nan, 1.0]] * 12))
    assert np.isnan(found.means[0])
    assert found.interval([0, 1]) is None
