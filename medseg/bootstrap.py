"""Bootstrap: how far a mean over cases may be off, learnt by drawing the cases again and again.

Intervals are bias-corrected and accelerated (BCa; Efron 1987, JASA 82:171), with the tails widened for few cases as
Hesterberg 2015 (The American Statistician 69:371, "expanded") has it: BCa alone holds the mean of ten cases in 90 % of
experiments where 95 % are meant. Cases are drawn whole, with all of their classes, so that a mean over classes has an
interval too, and so has the difference of two methods on the same cases. What never happened in the cases at hand,
as a rare failure, no bootstrap knows of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from medseg.geometry import Float

RESAMPLES = 9_999
SEED = 0
CONFIDENCE = 0.95
FEWEST = 10
"""With fewer cases there is no interval: of five it would hold the truth in 90 % of experiments where 95 are meant."""

_CHUNK = 2**22
"""Numbers drawn at a time."""

Interval = tuple[float, float]


def draws(n: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[NDArray[np.int64]]:
    """Which of ``n`` cases each resample draws: blocks of rows (some of the resamples, n), the same for equal seeds."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(n, size=(min(rows, resamples - start), n))


@dataclass(frozen=True)
class Resampled:
    """Means of columns over the same cases: as measured, of resamples, and with each case left out once.

    Attributes:
        values: (n cases, m columns); NaN where a case does not count in a column.
        means: (m,); NaN of a column without any case.
        of_resamples: (``RESAMPLES``, m).
        without_one: (n, m).
    """

    values: Float
    means: Float
    of_resamples: Float
    without_one: Float

    @classmethod
    def of(cls, values: Float, seed: int = SEED) -> Resampled:
        """Resample the rows of ``values`` (n, m), one row at least."""
        counts = np.isfinite(values)
        known = np.where(counts, values, 0.0)
        total, number = known.sum(axis=0), counts.sum(axis=0)
        blocks = []
        for block in draws(len(values), seed=seed):
            drawn = _times(block, len(values))
            blocks.append(ratio(drawn @ known, drawn @ counts.astype(np.float64)))
        without = ratio(total - known, number - counts)
        return cls(values, ratio(total, number), np.concatenate(blocks), without)

    def interval(self, columns: Sequence[int]) -> Interval | None:
        """The interval of the mean of some columns' means; None with too few cases (``FEWEST``) in one of them.

        Resamples without any case of a column are left out: they are of another mean.
        """
        chosen = list(columns)
        counts = np.isfinite(self.values[:, chosen])
        n = int(counts.sum(axis=0).min(initial=len(self.values)))
        if not chosen or n < FEWEST:
            return None
        resampled = self.of_resamples[:, chosen].mean(axis=1)
        left_out = self.without_one[counts.any(axis=1)][:, chosen].mean(axis=1)
        return bca(float(self.means[chosen].mean()), resampled[np.isfinite(resampled)], left_out, n)


def bca(estimate: float, resampled: Float, without_one: Float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """The BCa interval of a statistic (Efron and Tibshirani 1993, 14.3), expanded for ``n`` cases.

    Args:
        estimate: the statistic of all cases.
        resampled: that of resamples, one at least.
        without_one: that of all cases but one, one number a case.
        n: how many cases there are, two at least.
        confidence: how often the interval should hold the truth.

    Returns:
        Its ends; both are ``estimate`` where the cases are all alike.
    """
    resampled = np.sort(resampled)
    below = np.searchsorted(resampled, estimate, "left") + np.searchsorted(resampled, estimate, "right")
    part = below / (2.0 * len(resampled))  # ties count half
    bias = ndtri(np.clip(part, 1.0 / (len(resampled) + 1), len(resampled) / (len(resampled) + 1)))
    influence = without_one.mean() - without_one
    spread = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6.0 * spread**1.5) if spread > 0 else 0.0
    reach = stdtrit(n - 1, 0.5 + confidence / 2.0) * np.sqrt(n / (n - 1.0))
    tails = bias + np.array([-reach, reach])
    low, high = np.quantile(resampled, ndtr(bias + tails / (1.0 - acceleration * tails)))
    return float(low), float(high)


def _times(block: NDArray[np.int64], n: int) -> Float:
    """How often each case is drawn: (rows, n)."""
    places = block + n * np.arange(len(block))[:, np.newaxis]
    return np.bincount(places.ravel(), minlength=n * len(block)).reshape(len(block), n).astype(np.float64)


def ratio(total: Float, number: NDArray[Any]) -> Float:
    """Sums divided by how many numbers they are of; NaN where that is none."""
    return np.asarray(np.divide(total, number, out=np.full(np.shape(total), np.nan), where=number > 0))
