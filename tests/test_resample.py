"""Resampling: equal to skimage's, by numbers from there and by a formulation of scipy's; the same for any cutting."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from medseg.plan import Resampling
from medseg.resample import axis_orders, resample_image, resample_labels, slab_indices

LINE = np.array([0, 1, 4, 9, 16, -3], dtype=np.float32)
orders01 = st.tuples(*[st.sampled_from([0, 1])] * 3)
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 9)] * 3)


def reference(array: NDArray[Any], shape: tuple[int, ...], orders: tuple[int, ...]) -> NDArray[Any]:
    """One axis at a time by scipy's coordinates, of a line that is padded far enough for no edge rule to matter."""
    result = array.astype(np.float64)
    for axis, (new, order) in enumerate(zip(shape, orders, strict=True)):
        old = result.shape[axis]
        places = (np.arange(new) + 0.5) * (old / new) - 0.5
        if order == 0:  # scipy rounds halves up, but its own rounding errors decide where two are as near
            result = np.take(result, np.floor(places + 0.5 + 1e-9).astype(int), axis=axis)
            continue
        padded = np.pad(result, [(40, 40) if a == axis else (0, 0) for a in range(3)], mode="edge")

        def sample(line: NDArray[Any], at: NDArray[Any] = places + 40, order: int = order) -> NDArray[Any]:
            return np.asarray(ndimage.map_coordinates(line, [at], order=order, mode="nearest"))

        result = np.apply_along_axis(sample, axis, padded)
    return result


# Numbers from skimage.transform.resize(LINE, (n,), order=order, mode="edge", anti_aliasing=False) of skimage 0.26
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (0, [0, 1, 1, 4, 9, 9, 16, -3, -3]),
        (0, [0, 4, 9, -3]),
        (0, [9]),
        (1, [0, 0.5, 1.5, 3.5, 6.5, 10.16667, 14.83333, 6.5, -3]),
        (1, [0.25, 3.25, 10.75, 1.75]),
        (1, [6.5]),
        (3, [-0.02493, 0.24595, 1.4152, 3.49993, 5.5596, 10.91177, 16.0, 7.08846, -3.0]),
        (3, [0.08015, 3.23561, 11.94279, 1.41196]),
        (3, [5.5596]),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_line_as_skimage_resizes_it(order: int, expected: list[float], axis: int) -> None:
    shape, new = [1, 1, 1], [1, 1, 1]
    shape[axis], new[axis] = len(LINE), len(expected)
    found = resample_image(LINE.reshape(1, *shape), new, (order, order, order))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-4 * np.ptp(LINE))


def test_a_volume_as_skimage_resizes_it() -> None:
    i, j, k = np.indices((4, 5, 3))
    volume = ((i * i * 7 + j * 3 + k**3 * 5 + i * j * k) % 11).astype(np.float32)
    linear = resample_image(volume[np.newaxis], (6, 3, 4), (1, 1, 1))[0]
    cubic = resample_image(volume[np.newaxis], (6, 3, 4), (3, 3, 3))[0]
    np.testing.assert_allclose(
        linear[::5, ::2],
        [
            [[1.0, 4.125, 6.75, 8.0], [3.66667, 4.5, 5.75, 7.0]],
            [[5.33333, 4.5, 3.75, 3.33333], [8.0, 6.54167, 6.41667, 7.66667]],
        ],
        atol=1e-3,
    )
    np.testing.assert_allclose(
        cubic[::5, ::2],
        [
            [[0.0, 4.30431, 8.27056, 8.80014], [3.18642, 4.56619, 6.65373, 7.91993]],
            [[5.30065, 4.92717, 4.18606, 3.62017], [8.56775, 6.54837, 6.56958, 8.61584]],
        ],
        atol=1e-3,
    )
    assert (linear.sum(), cubic.sum()) == pytest.approx((338.25, 349.1677), rel=1e-5)
    assert ((linear**2).sum(), (cubic**2).sum()) == pytest.approx((1853.3238, 2137.2402), rel=1e-5)


@given(shapes, shapes, st.tuples(*[st.sampled_from([0, 1, 3])] * 3), seeds)
def test_any_orders_equal_the_reference(
    shape: tuple[int, ...], new: tuple[int, ...], orders: tuple[int, int, int], seed: int
) -> None:
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    expected = reference(array, new, orders)
    if 3 in orders:
        expected = expected.clip(array.min(), array.max())
    np.testing.assert_allclose(resample_image(array, new, orders), expected, atol=1e-4 * max(np.ptp(array), 1))


def test_each_channel_of_a_cubic_is_clipped_to_its_own_range() -> None:
    step = np.repeat(np.array([0, 0, 0, 1, 1, 1], dtype=np.float32), 1).reshape(1, 6, 1, 1)
    both = resample_image(np.concatenate([step, step * 100]), (13, 1, 1), (3, 3, 3))
    assert (both[0].min(), both[0].max()) == (0, 1)
    np.testing.assert_array_equal(both[0], resample_image(step, (13, 1, 1), (3, 3, 3))[0])


def test_the_same_shape_gives_the_same_values() -> None:
    array = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(resample_image(array, (3, 4, 5), (3, 3, 3)), array)


@pytest.mark.parametrize(
    ("spacing_from", "spacing_to", "expected"),
    [
        ((1, 1, 1), (2, 2, 2), (3, 3, 3)),
        ((3, 1, 1), (1, 1, 1), (3, 3, 3)),  # 3 is not more than 3
        ((3.1, 1, 1), (1, 1, 1), (0, 3, 3)),
        ((1, 5, 1), (1, 1, 1), (3, 0, 3)),
        ((1, 1, 1), (1, 1, 5), (3, 3, 0)),  # the first grid is not anisotropic: the second decides
        ((5, 1, 1), (1, 1, 5), (0, 3, 3)),  # both are: the first decides
        ((5, 5, 1), (5, 1, 1), (3, 3, 3)),  # two axes as coarse: none is apart, and the second is not asked
        ((4, 3.9, 1), (1, 1, 1), (0, 3, 3)),
    ],
)
def test_orders_of_an_anisotropic_grid(
    spacing_from: tuple[float, ...], spacing_to: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    assert axis_orders(spacing_from, spacing_to, Resampling(), 3, 0) == expected


def test_labels_by_hand() -> None:
    line = np.array([0, 1, 2], dtype=np.uint8).reshape(3, 1, 1)
    # Six samples lie at -1/4, 1/4, 3/4, 5/4, 7/4 and 9/4 of the old indices: the nearest label has 3/4 of the weight
    assert resample_labels(line, (6, 1, 1), (1, 1, 1)).ravel().tolist() == [0, 0, 1, 1, 2, 2]
    # The one sample of two lies between them: a tie, which goes to the smaller index
    assert resample_labels(np.array([2, 1], dtype=np.uint8).reshape(2, 1, 1), (1, 1, 1), (1, 1, 1)).item() == 1
    assert resample_labels(line, (1, 1, 1), (0, 0, 0)).item() == 1


@given(shapes, shapes, orders01, seeds)
def test_labels_are_those_of_the_largest_share(
    shape: tuple[int, ...], new: tuple[int, ...], orders: tuple[int, int, int], seed: int
) -> None:
    indices = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    found = resample_labels(indices, new, orders)
    shares = np.stack([reference(indices == value, new, orders) for value in range(4)])
    assert found.shape == new
    assert set(np.unique(found)) <= set(np.unique(indices))
    chosen = np.take_along_axis(shares, found[np.newaxis].astype(int), axis=0)[0]
    np.testing.assert_allclose(chosen, shares.max(axis=0), atol=1e-5)


def cut(logits: NDArray[np.float32], cuts: list[int]) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    edges = sorted({0, logits.shape[1], *(c for c in cuts if c < logits.shape[1])})
    for start, stop in itertools.pairwise(edges):
        yield start, stop, logits[:, start:stop].copy()


def joined(pieces: Iterator[tuple[int, int, NDArray[np.uint8]]], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    result, expected_start = [], 0
    for start, stop, piece in pieces:
        assert start == expected_start
        assert piece.shape == (stop - start, *shape[1:])
        expected_start = stop
        result.append(piece)
    assert expected_start == shape[0]
    return np.concatenate(result)


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
    orders01,
    st.lists(st.integers(1, 19)),
    seeds,
)
def test_slabs_give_the_argmax_of_the_whole_for_any_cutting(
    shape: tuple[int, int, int], new: tuple[int, int, int], orders: tuple[int, int, int], cuts: list[int], seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(3, *shape)).astype(np.float32)
    found = joined(slab_indices(cut(logits, cuts), shape[0], new, orders), new)
    np.testing.assert_array_equal(found, joined(slab_indices(cut(logits, []), shape[0], new, orders), new))
    whole = np.stack([reference(channel, new, orders) for channel in logits])
    chosen = np.take_along_axis(whole, found[np.newaxis].astype(int), axis=0)[0]
    np.testing.assert_allclose(chosen, whole.max(axis=0), atol=1e-4)  # where two tie, either


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("depth", "new"), [(200, 1), (200, 3), (1, 200), (2, 301), (200, 199)])
def test_slabs_shrunk_and_stretched_far(depth: int, new: int, order: int) -> None:
    logits = np.random.default_rng(1).normal(size=(2, depth, 2, 2)).astype(np.float32)
    shape, orders = (new, 2, 2), (order, 1, 1)
    found = joined(slab_indices(cut(logits, list(range(depth))), depth, shape, orders), shape)
    whole = np.stack([reference(channel, shape, orders) for channel in logits])
    np.testing.assert_array_equal(found, whole.argmax(axis=0))


def test_of_equal_logits_the_first_class_wins() -> None:
    logits = np.zeros((3, 2, 1, 1), dtype=np.float32)
    assert not joined(slab_indices(cut(logits, []), 2, (4, 1, 1), (1, 1, 1)), (4, 1, 1)).any()


@pytest.mark.parametrize("new", [5, 30, 77])
def test_a_slab_is_let_go_before_the_next_is_made(new: int) -> None:
    kept: list[weakref.ref[Any]] = []

    def source() -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        for start in range(0, 30, 10):
            assert not any(slab() is not None for slab in kept)
            slab = np.zeros((2, 10, 3, 3), dtype=np.float32)
            kept.append(weakref.ref(slab))
            yield start, start + 10, slab
            del slab

    assert joined(slab_indices(source(), 30, (new, 3, 3), (1, 1, 1)), (new, 3, 3)).shape == (new, 3, 3)


def test_logits_without_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="one class"):
        list(slab_indices(cut(np.zeros((0, 2, 1, 1), dtype=np.float32), []), 2, (2, 1, 1), (1, 1, 1)))
