"""Resampling: equal to skimage's, by numbers from there and by a formulation of scipy's; the same for any cutting."""

from __future__ import annotations

import itertools
import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medseg import resample
from medseg.geometry import Geometry
from medseg.plan import Resampling
from medseg.resample import (
    Orders,
    Place,
    Slab,
    axis_orders,
    cubic_operator,
    decided,
    interpolated,
    largest,
    last_positive,
    resample_image,
    resample_into,
    resample_labels,
)

LINE = np.array([0, 1, 4, 9, 16, -3], dtype=np.float32)
orders01 = st.tuples(*[st.sampled_from([0, 1])] * 3)
image_orders = st.tuples(*[st.sampled_from([0, 1, 3])] * 2, st.integers(0, 2)).map(
    lambda o: tuple(o[1] if axis == o[2] else o[0] for axis in range(3))
)
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 9)] * 3)


def reference(array: NDArray[Any], shape: tuple[int, ...], orders: tuple[int, ...]) -> NDArray[Any]:
    """One axis at a time by scipy's coordinates, of a line that is padded far enough for no edge rule to matter."""
    result = array.astype(np.float64)
    for axis, (new, order) in enumerate(zip(shape, orders, strict=True)):
        old = result.shape[axis]
        places = (np.arange(new) + 0.5) * (old / new) - 0.5
        margin = 40 if order == 3 else 0
        padded = np.pad(result, [(margin, margin) if a == axis else (0, 0) for a in range(3)], mode="edge")

        def sample(line: NDArray[Any], at: NDArray[Any] = places + margin, order: int = order) -> NDArray[Any]:
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


@given(shapes, shapes, image_orders, seeds)
def test_any_orders_equal_the_reference(shape: Orders, new: Orders, orders: Orders, seed: int) -> None:
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    expected = reference(array, new, orders)
    alone = [axis for axis in range(3) if orders.count(orders[axis]) == 1]
    if 3 in orders and shape != new:
        if alone and orders[alone[0]] == 3:  # planes that are not cubic stay in their range; what is between may not
            pass
        elif alone:  # each plane is resampled and clipped by itself, then these are
            axis = alone[0]
            others = tuple(a for a in range(3) if a != axis)
            within = [n if a == axis else m for a, (n, m) in enumerate(zip(shape, new, strict=True))]
            planes = reference(array, tuple(within), tuple(0 if a == axis else 3 for a in range(3)))
            planes = planes.clip(array.min(axis=others, keepdims=True), array.max(axis=others, keepdims=True))
            expected = reference(planes, new, tuple(orders[axis] if a == axis else 0 for a in range(3)))
        else:
            expected = expected.clip(array.min(), array.max())
    np.testing.assert_allclose(resample_image(array, new, orders), expected, atol=1e-4 * max(np.ptp(array), 1))


@settings(max_examples=40)
@given(st.tuples(*[st.integers(2, 60)] * 2), st.tuples(*[st.integers(1, 90)] * 2), st.sampled_from([0, 1, 3]), seeds)
def test_skimage_itself(shape: tuple[int, int], new: tuple[int, int], order: int, seed: int) -> None:
    transform = pytest.importorskip("skimage.transform", reason="scikit-image is an extra")
    array = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    expected = transform.resize(array.astype(np.float64), (2, *new), order, mode="edge", anti_aliasing=False)
    found = resample_image(array, (2, *new), (order, order, order))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(array))


@pytest.mark.parametrize(("size", "new"), [(1, 5), (2, 7), (3, 2), (40, 25), (25, 40), (200, 333), (333, 50)])
def test_the_cubic_operator_is_the_splines_of_the_unit_vectors(size: int, new: int) -> None:
    """The formula is cut off where it has faded; scipy's prefilter is not."""
    columns = [ndimage.zoom(unit, new / size, order=3, mode="nearest", grid_mode=True) for unit in np.eye(size)]
    expected = np.ones((new, 1)) if size == 1 else np.stack(columns, axis=1)  # scipy does not resample one voxel
    np.testing.assert_allclose(cubic_operator(size, new), expected, atol=1e-6)
    np.testing.assert_allclose(cubic_operator(size, new).sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("size", "new"), [(400, 250), (250, 400), (400, 9), (7, 300), (130, 131)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_blocks_of_an_operator_are_the_operator(size: int, new: int, axis: int) -> None:
    shape = [3, 4, 5]
    shape[axis] = size
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    target = list(shape)
    target[axis] = new
    expected = np.moveaxis(np.tensordot(cubic_operator(size, new), array, (1, axis)), 0, axis)
    found = resample_image(array, target, (3, 3, 3))
    np.testing.assert_allclose(found, expected.clip(array.min(), array.max()), atol=2e-6 * np.ptp(array))


class Counted:
    """A source that counts how often each plane across the first axis is read."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self.array, self.shape = array, array.shape
        self.reads = np.zeros(len(array), dtype=int)

    def __getitem__(self, place: Place) -> NDArray[np.float32]:
        self.reads[place[0]] += 1
        return self.array[place]


@pytest.mark.parametrize("orders", [(3, 3, 3), (0, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("depth", [20, 90, 300])
def test_an_image_read_plane_by_plane_is_the_same_bit_for_bit(
    orders: Orders, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.random.default_rng(0).normal(size=(90, 30, 20)).astype(np.float32)
    expected = resample_image(array, (depth, 17, 33), orders)
    monkeypatch.setattr(resample, "CHUNK_BYTES", 3 * 4 * 30 * 20)
    source, found = Counted(array), np.empty((depth, 17, 33), dtype=np.float32)
    resample_into(found, source, orders)
    np.testing.assert_array_equal(found, expected)
    low = np.floor((np.arange(depth) + 0.5) * 90 / depth - 0.5).clip(0, 89)
    picked = {0: np.rint((np.arange(depth) + 0.5) * 90 / depth - 0.5 + 1e-9), 1: np.append(low, low + 1), 3: range(90)}
    assert set(np.flatnonzero(source.reads)) == set(np.clip(picked[orders[0]], 0, 89).astype(int))
    assert source.reads.max() == 1


@pytest.mark.parametrize("orders", [(3, 3, 3), (1, 1, 1), (3, 3, 0)])
def test_a_large_image_is_never_there_twice(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    """int16 of 32 MB becomes float32 of 4 MB; of what is between there is a megabyte at a time."""
    monkeypatch.setattr(resample, "CHUNK_BYTES", 2**20)
    array = np.random.default_rng(0).integers(-1000, 1000, (256, 256, 256), dtype=np.int16)
    tracemalloc.start()
    resample_image(array, (100, 100, 100), orders)
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("orders", [(3, 3, 3), (0, 3, 3), (1, 1, 1), (3, 1, 1)])
@pytest.mark.parametrize("planes", [400, 31, 30, 5])
def test_thin_slices_made_thick_are_never_there_at_once(
    orders: Orders, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 planes to 30, as of thin slices to 5 mm: the values are the same, and a part of 32 planes is held."""
    monkeypatch.setattr(resample, "CHUNK_BYTES", 2**18)
    array = np.random.default_rng(0).normal(size=(400, 64, 64)).astype(np.float32)
    result = np.empty((planes, 64, 64), dtype=np.float32)
    resample_into(result, array, orders)  # so that all operators are there
    tracemalloc.start()
    resample_into(result, array, orders)
    assert tracemalloc.get_traced_memory()[1] < 64 * 64 * 4 * (32 + 16) + 2 * 2**18 + 2**20
    tracemalloc.stop()
    expected = reference(array, result.shape, (orders[0], 0, 0))
    if orders == (3, 3, 3):
        expected = expected.clip(array.min(), array.max())
    np.testing.assert_allclose(result, expected, atol=1e-5 * np.ptp(array))


def test_planes_that_are_not_picked_are_not_read() -> None:
    source = Counted(np.random.default_rng(0).normal(size=(130, 6, 5)).astype(np.float32))
    result = np.empty((10, 9, 8), dtype=np.float32)
    resample_into(result, source, (0, 3, 3))
    assert np.flatnonzero(source.reads).tolist() == list(range(6, 130, 13))


@pytest.mark.parametrize("orders", [(3, 3, 3), (3, 1, 1), (0, 3, 3)])
def test_a_cubic_along_an_axis_apart_is_not_clipped(orders: Orders) -> None:
    """As nnU-Net's ``order_z``: each plane is clipped by itself, and then nothing any more."""
    step = np.zeros((6, 2, 2), dtype=np.float32)
    step[3:] = 1
    found = np.empty((13, 2, 2), dtype=np.float32)
    resample_into(found, step, orders, 0)
    assert (found.max() > 1.03, found.min() < -0.03) == (orders[0] == 3,) * 2
    np.testing.assert_allclose(found[:, 0, 0], reference(step, (13, 2, 2), orders)[:, 0, 0], atol=1e-5)


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


@pytest.mark.parametrize(
    ("separate", "spacing_from", "spacing_to", "expected"),
    [
        ("never", (5, 1, 1), (1, 1, 1), (3, 3, 3)),
        ("always", (1.1, 1, 1), (1, 1, 9), (1, 3, 3)),  # the first grid's, however little it is coarser
        ("always", (1, 1, 1), (1, 1, 9), (3, 3, 3)),  # the second is not asked
        ("always", (2, 2, 1), (1, 1, 1), (3, 3, 3)),
        ("auto", (1.1, 1, 1), (1, 1, 9), (3, 3, 1)),
    ],
)
def test_whether_an_axis_is_apart_can_be_said(
    separate: Any, spacing_from: tuple[float, ...], spacing_to: tuple[float, ...], expected: Orders
) -> None:
    assert axis_orders(spacing_from, spacing_to, Resampling(separate=separate), 3, 1) == expected


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 3.0), (0.8, 5.0, 5.0), (2.0, 2.0, 2.0), (1.0, 5.0, 1.0)])
def test_spacings_of_oblique_scans_are_compared_but_for_rounding(spacing: tuple[float, float, float]) -> None:
    """The spacing of an affine in float32 is right to seven digits; the rule is that of the spacing that is meant."""
    turns = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 3, 3)))[0]
    found = [Geometry((2, 2, 2), np.eye(4)).spacing]
    for turn in turns:
        affine = np.eye(4, dtype=np.float32)
        affine[:3, :3] = turn * spacing
        found.append(Geometry((2, 2, 2), affine).spacing)
    assert spacing not in found  # as it is meant, but for rounding
    orders = {axis_orders(one, (1, 1, 1), Resampling(separate=s), 3, 0) for one in found[1:] for s in ("auto", "never")}
    assert orders == {(3, 3, 3), (3, 0 if spacing == (1.0, 5.0, 1.0) else 3, 3)}


def test_labels_by_hand() -> None:
    line = np.array([0, 1, 2], dtype=np.uint8).reshape(3, 1, 1)
    # Six samples lie at -1/4, 1/4, 3/4, 5/4, 7/4 and 9/4 of the old indices: the nearest label has 3/4 of the weight
    assert resample_labels(line, (6, 1, 1), (1, 1, 1)).ravel().tolist() == [0, 0, 1, 1, 2, 2]
    # The one sample of two lies between them: a tie, which goes to the nearest, that of halves that are rounded up
    assert resample_labels(np.array([2, 1], dtype=np.uint8).reshape(2, 1, 1), (1, 1, 1), (1, 1, 1)).item() == 1
    assert resample_labels(np.array([1, 2], dtype=np.uint8).reshape(2, 1, 1), (1, 1, 1), (1, 1, 1)).item() == 2
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


def test_shares_that_are_equal_but_for_rounding_are_a_tie() -> None:
    """The middle of five samples of two voxels has a half of each; thirds and sixths do not add up in binary.

    The nearest voxel is the upper one, as of halves that are rounded up.
    """
    line = np.array([2, 1, 1, 2], dtype=np.uint8).reshape(1, 2, 2)
    assert resample_labels(line, (3, 3, 3), (1, 1, 1))[:, 1].tolist() == [[1, 2, 2]] * 3


def test_of_tied_labels_that_of_the_nearest_voxel_wins() -> None:
    """A cube of two voxels an axis and a sample at its middle, whose nearest voxel is the last."""
    cube = np.array([3, 1, 1, 1, 2, 2, 2, 3], dtype=np.uint8).reshape(2, 2, 2)
    assert resample_labels(cube, (1, 1, 1), (1, 1, 1)).item() == 1  # 1 and 2 tie at 3/8, and 3 has 2/8
    assert resample_labels(4 - cube, (1, 1, 1), (1, 1, 1)).item() == 2
    cube[0, 0, 0] = 2
    assert resample_labels(cube, (1, 1, 1), (1, 1, 1)).item() == 2  # half of all
    cube = np.array([2, 2, 1, 1, 1, 1, 2, 2], dtype=np.uint8).reshape(2, 2, 2)
    assert resample_labels(cube, (1, 1, 1), (1, 1, 1)).item() == 2
    assert resample_labels(3 - cube, (1, 1, 1), (1, 1, 1)).item() == 1


def test_labels_of_many_values_on_a_turned_array() -> None:
    indices = np.arange(254, dtype=np.uint8).reshape(127, 2, 1)
    turned = indices[::-1].transpose(2, 1, 0)
    found = resample_labels(turned, (1, 2, 254), (1, 1, 1))
    np.testing.assert_array_equal(found, np.repeat(turned, 2, axis=2))


def cut(logits: NDArray[np.float32], cuts: Iterable[int] = (), axis: int = 0, blocks: int = 1) -> Iterator[Slab]:
    """Slabs of (classes, D, H, W); the memory of each is spoilt when the next is asked for."""
    moved = np.moveaxis(np.moveaxis(logits, 0, -1), axis, 0)  # planes, rows, columns, classes
    edges = sorted({0, len(moved), *(c for c in cuts if c < len(moved))})
    blocks = max(1, min(blocks, moved.shape[1] // 2))
    row_edges = [n * moved.shape[1] // blocks for n in range(blocks)]
    for first, after in zip(row_edges, [*row_edges[1:], None], strict=True):
        rows = (first, moved.shape[1] if after is None else after + 1)
        for start, stop in itertools.pairwise(edges):
            piece = torch.from_numpy(moved[start:stop, rows[0] : rows[1]].copy())
            yield Slab(axis, start, stop, rows, piece)
            piece.fill_(torch.nan)


def joined(pieces: Iterable[tuple[Place, Any]], shape: Sequence[int]) -> NDArray[Any]:
    """All pieces in their places, each voxel given once."""
    result: NDArray[Any] | None = None
    times = np.zeros(tuple(shape), dtype=int)
    for place, piece in pieces:
        piece = np.asarray(piece)
        assert piece.shape[:3] == tuple(s.stop - s.start for s in place)
        result = np.zeros((*shape, *piece.shape[3:]), dtype=piece.dtype) if result is None else result
        result[place] = piece
        times[place] += 1
    assert (times == 1).all()
    assert result is not None
    return result


def smooth(shape: Sequence[int], classes: int, seed: int) -> NDArray[np.float32]:
    """Logits whose winners fill regions, as those of a network."""
    noise = np.random.default_rng(seed).normal(size=(classes, *shape))
    return np.asarray(ndimage.gaussian_filter(noise, (0, 2, 2, 2)) * 10, dtype=np.float32)


@given(
    st.tuples(*[st.integers(1, 11)] * 3),
    st.tuples(*[st.integers(1, 17)] * 3),
    orders01,
    st.integers(0, 2),
    st.integers(1, 3),
    st.lists(st.integers(1, 10)),
    st.booleans(),
    st.sampled_from([largest, last_positive]),
    seeds,
)
def test_winners_are_those_of_all_classes_interpolated_everywhere(
    shape: Orders,
    new: Orders,
    orders: Orders,
    axis: int,
    blocks: int,
    cuts: list[int],
    is_smooth: bool,
    decide: Callable[[Tensor], Tensor],
    seed: int,
) -> None:
    logits = smooth(shape, 3, seed)
    if not is_smooth:
        logits = np.random.default_rng(seed).normal(size=(3, *shape)).astype(np.float32)
    whole = np.stack([reference(channel, new, orders) for channel in logits], axis=-1)
    values = joined(interpolated(cut(logits, cuts, axis, blocks), shape, new, orders), new)
    np.testing.assert_allclose(values, whole, atol=1e-5 * max(1, np.ptp(logits)))
    found = joined(decided(cut(logits, cuts, axis, blocks), shape, new, orders, decide), new)
    unsure = (
        np.ptp(np.sort(whole, axis=-1)[..., -2:], axis=-1) < 1e-4 if decide is largest else (abs(whole) < 1e-4).any(-1)
    )
    np.testing.assert_array_equal(found[~unsure], decide(torch.from_numpy(whole)).numpy()[~unsure])


@pytest.mark.parametrize("decide", [largest, last_positive])
@pytest.mark.parametrize("noisy", [False, True])
def test_a_volume_of_many_classes_against_torch(decide: Callable[[Tensor], Tensor], noisy: bool) -> None:
    """Against torch's trilinear interpolation of all of it; a few voxels where two classes tie may differ."""
    shape, new = (14, 24, 19), (31, 40, 37)
    logits = smooth(shape, 20, 0)
    if noisy:
        logits = np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)
    whole = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], new, mode="trilinear")[0].movedim(0, -1)
    found = joined(decided(cut(logits, (5, 6, 11), 1, 2), shape, new, (1, 1, 1), decide), new)
    assert (found != decide(whole).numpy()).sum() <= 2
    assert len(np.unique(found)) > 10


def test_only_where_neighbours_differ_all_classes_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves: of 40 planes across the border between them, the two beside it are looked at more closely."""
    asked = []
    interpolate = resample._interpolate
    monkeypatch.setattr(resample, "_interpolate", lambda p, v, w: asked.append(len(v)) or interpolate(p, v, w))
    logits = np.zeros((2, 20, 6, 6), dtype=np.float32)
    logits[1] = np.linspace(-9.5, 9.5, 20).reshape(-1, 1, 1)
    found = joined(decided(cut(logits), (20, 6, 6), (40, 12, 12), (1, 1, 1), largest), (40, 12, 12))
    np.testing.assert_array_equal(found, np.broadcast_to((np.arange(40) >= 20).reshape(-1, 1, 1), (40, 12, 12)))
    assert sum(asked) == 2 * 2 * 12 * 12  # two planes of the result, from the two planes of logits around them


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("depth", "new"), [(200, 1), (200, 3), (1, 200), (2, 301), (200, 199)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slabs_shrunk_and_stretched_far(depth: int, new: int, order: int, axis: int) -> None:
    shape, target, orders = [2, 2, 2], [2, 2, 2], [1, 1, 1]
    shape[axis], target[axis], orders[axis] = depth, new, order
    logits = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    whole = np.stack([reference(channel, tuple(target), tuple(orders)) for channel in logits])
    pieces = decided(cut(logits, range(depth), axis), shape, target, (orders[0], orders[1], orders[2]), largest)
    np.testing.assert_array_equal(joined(pieces, target), whole.argmax(axis=0))


def test_winners_by_hand() -> None:
    logits = torch.tensor([[-1, -1, -2], [3, 3, -1], [0, 1, 5], [1, -1, 1]], dtype=torch.float32)
    assert (largest(logits).tolist(), last_positive(logits).tolist()) == ([0, 0, 2, 0], [0, 2, 3, 3])
    assert largest(logits).dtype == last_positive(logits).dtype == torch.uint8


def test_threads_of_torch_are_left_as_they_are() -> None:
    """One where logits are decided; in the caller, and where torch is used for the first time, as many as before."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)

    def decide(logits: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as other:
            found.append((torch.get_num_threads(), other.submit(torch.get_num_threads).result()))
        return largest(logits)

    logits = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    try:
        for _ in decided(cut(logits), (4, 4, 4), (8, 8, 8), (1, 1, 1), decide):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(found) == {(1, 2)}


def test_of_equal_logits_the_first_class_wins() -> None:
    logits = np.zeros((3, 2, 1, 1), dtype=np.float32)
    assert not joined(decided(cut(logits), (2, 1, 1), (4, 1, 1), (1, 1, 1), largest), (4, 1, 1)).any()


def test_a_later_region_is_painted_over_an_earlier_one() -> None:
    """One voxel becomes four: the first region is positive in the first three, the second from the third on."""
    logits = np.array([[3, -1], [-3, 1]], dtype=np.float32).reshape(2, 2, 1, 1)
    # at 0, 1/4, 3/4 and 1 between the two: 3, 2, 0 and -1 of the first region, -3, -2, 0 and 1 of the second
    found = joined(decided(cut(logits), (2, 1, 1), (4, 1, 1), (1, 1, 1), last_positive), (4, 1, 1))
    assert found.ravel().tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize("new", [5, 30, 77])
def test_a_slab_is_let_go_before_the_next_is_made(new: int) -> None:
    kept: list[weakref.ref[Any]] = []

    def source() -> Iterator[Slab]:
        for start in range(0, 30, 10):
            assert not any(logits() is not None for logits in kept)
            logits = torch.rand(10, 3, 3, 2)
            kept.append(weakref.ref(logits))
            yield Slab(0, start, start + 10, (0, 3), logits)
            del logits

    for function in (
        lambda: decided(source(), (30, 3, 3), (new, 3, 3), (1, 1, 1), largest),
        lambda: interpolated(source(), (30, 3, 3), (new, 3, 3), (1, 1, 1)),
    ):
        covered = sum(place[0].stop - place[0].start for place, _ in function())
        assert covered == new


def test_logits_are_interpolated_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    whole = joined(interpolated(cut(logits), (4, 5, 6), (7, 8, 9), (1, 1, 1)), (7, 8, 9))
    monkeypatch.setattr(resample, "CHUNK_BYTES", (4 * 3 + resample.SAMPLE_BYTES) * 9 * 2)
    pieces = list(interpolated(cut(logits), (4, 5, 6), (7, 8, 9), (1, 1, 1)))
    assert {piece.shape for _, piece in pieces} == {(1, 2, 9, 3)}
    np.testing.assert_array_equal(joined(pieces, (7, 8, 9)), whole)
