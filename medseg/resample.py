"""Resampling of images, masks and logits to another number of voxels over the same block of space.

Images: separable, so one small operator an axis; they equal ``skimage.transform.resize(..., mode="edge",
anti_aliasing=False)``, which nnU-Net uses: outer voxel edges stay in place, values beyond the border repeat the
outermost voxel. Every operator is a band, also the cubic one, whose spline prefilter fades by 0.27 a voxel. So it is
applied in small dense blocks, and planes are read, resampled and let go a few at a time.

Winners (of logits, or of labels resampled each by itself): an interpolated value is a weighted mean of at most eight
neighbours. Where all of these have one winner, it wins there too, whatever the weights. All classes are interpolated
only where neighbours differ.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medseg.plan import Resampling

Float32 = NDArray[np.float32]
Winners = NDArray[np.uint8]
Orders = tuple[int, int, int]
Place = tuple[slice, slice, slice]
Decide = Callable[[Tensor], Tensor]

CHUNK_BYTES = 32 * 2**20
"""What planes of an image that are read at once may take, and probabilities that are handed out at once."""
CACHE_BYTES = 4 * 2**20
"""What logits that are interpolated at once to be decided may take: 1 to 4 MiB stay in a cache, 32 take four times as
long (118 classes)."""
BLOCK = 32
"""Output voxels that one dense block of an operator makes: measured on 512 to 273 voxels, 24 to 32 take least time."""
COLUMNS = 64
"""Columns that one block is multiplied with at once."""
SAME = 1e-4
"""Relative difference of two spacings that are one: files keep affines in float32, and so 3 mm as 3.0000002."""
SAMPLE_BYTES = 150
"""What a sample takes that is interpolated, besides its logits: neighbours, weights and what these are made from."""
REACH = 13
"""Voxels beyond which a sample does not touch a cubic spline: its weight is below 1e-7 there, 0.27 to that power."""
MIXED = 255
"""Stands where neighbours have different winners. A class of that index would be interpolated everywhere, no more."""


class Source(Protocol):
    """An array (I, J, K), or what gives a part of one where it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its three sizes."""

    def __getitem__(self, place: Place, /) -> NDArray[Any]:
        """The values in a box."""


@dataclass(frozen=True)
class Slab:
    """Finished logits of a part of an array: planes across one axis, in whole or a block of their rows.

    Slabs come in order: along ``axis`` from its first plane to its last; where planes are cut into blocks of rows, so
    for each block anew, and each block but the last ends with the first row of the next.

    Attributes:
        axis: spatial axis (0, 1 or 2) that the planes are across.
        start, stop: planes.
        rows: first row and end of the rows, along the first of the other two axes.
        logits: float32 (planes, rows, columns, classes), where they are summed: on the device of the network, or on
            the host. Only valid until the next slab is asked for: its memory is used again.
    """

    axis: int
    start: int
    stop: int
    rows: tuple[int, int]
    logits: Tensor


def separate_axis(spacing_from: Sequence[float], spacing_to: Sequence[float], resampling: Resampling) -> int | None:
    """The axis of low resolution that is resampled apart, or None.

    With ``resampling.separate`` of "auto" that of the first of the two grids that is anisotropic, if one is; with
    "always" that of ``spacing_from``. Where several axes are equally coarse, none is apart (nnU-Net's rule).
    """
    limit = resampling.anisotropy * (1 + SAME)
    looked_at = {
        "never": [],
        "always": [spacing_from],
        "auto": [s for s in (spacing_from, spacing_to) if max(s) / min(s) > limit][:1],
    }[resampling.separate]
    for spacing in looked_at:
        low = [axis for axis in range(3) if spacing[axis] > max(spacing) * (1 - SAME)]
        if len(low) == 1:
            return low[0]
    return None


def axis_orders(
    spacing_from: Sequence[float], spacing_to: Sequence[float], resampling: Resampling, order: int, order_low: int
) -> Orders:
    """Spline order for each of three axes: ``order_low`` for that of ``separate_axis``, ``order`` for the others."""
    separate = separate_axis(spacing_from, spacing_to, resampling)
    first, second, third = (order_low if axis == separate else order for axis in range(3))
    return first, second, third


def largest(logits: Tensor) -> Tensor:
    """Index of the largest of the last axis, uint8; the first where several are equal."""
    if logits.device.type == "cpu":  # numpy takes 0.6 of torch's time for 118 classes, as long for few
        return torch.from_numpy(logits.numpy().argmax(axis=-1).astype(np.uint8))
    return logits.argmax(dim=-1).to(torch.uint8)


def last_positive(logits: Tensor) -> Tensor:
    """1 + index of the last of the last axis that is positive, uint8: what is painted last is on top. 0: none is."""
    numbers = torch.arange(1, logits.shape[-1] + 1, dtype=torch.uint8, device=logits.device)
    return ((logits > 0) * numbers).amax(dim=-1)


def resample_image(array: NDArray[Any], shape: Sequence[int], orders: Orders) -> Float32:
    """Resample the last three axes of (..., I, J, K) to ``shape``; see ``resample_into``."""
    result = np.empty((*array.shape[:-3], *shape), dtype=np.float32)
    for channel in np.ndindex(array.shape[:-3]):
        resample_into(result[channel], array[channel], orders)
    return result


def resample_into(result: Float32, source: Source, orders: Orders, separate: int | None = None) -> None:
    """Fill ``result`` (I', J', K') with a channel (I, J, K), of which a few planes are read at a time, none twice.

    A cubic is clipped to the range of its input. Where an axis is apart, each plane across it is resampled by itself
    and clipped to its own range, and nothing is clipped afterwards, as in nnU-Net. That axis is ``separate``, or else
    the one that has an order of its own.
    """
    separate = _odd_axis(orders) if separate is None else separate
    axis = separate or 0
    order, *within = (orders[a] for a in _leading(axis))
    is_whole = separate is None and 3 in orders and result.shape != tuple(source.shape)
    target = result.transpose(_leading(axis))
    if len(target) != source.shape[axis]:
        target[...] = 0
    low, high = np.inf, -np.inf
    for voxels, samples, matrix in _column_blocks(source.shape[axis], len(target), order):
        block = target[samples] if matrix is None else np.empty((len(voxels), *target.shape[1:]), dtype=np.float32)
        done = 0
        while done < len(voxels):
            planes = _read(source, axis, voxels[done:])
            if is_whole:
                low, high = min(low, planes.min()), max(high, planes.max())
            block[done : done + len(planes)] = _in_plane(planes, target.shape[1:], within, separate is not None)
            done += len(planes)
        if matrix is not None:
            _multiply(matrix, block.swapaxes(0, 1), target[samples].swapaxes(0, 1), adds=True)
    if is_whole:
        np.clip(result, low, high, out=result)


def resample_labels(indices: Winners, shape: Sequence[int], orders: Orders) -> Winners:
    """Resample an index mask (I, J, K): each label by itself with ``orders`` (0 or 1), and the largest share wins.

    Of equal shares that of the nearest voxel wins; where it is not among them, the smallest index (nnU-Net's rule).
    With orders of 0 this is nearest-neighbour resampling.
    """
    if tuple(shape) == indices.shape:
        return indices
    nearest = [_linear(size, new_size, 0)[0] for size, new_size in zip(indices.shape, shape, strict=True)]
    result = indices[np.ix_(*nearest)]
    planes = (
        Slab(0, n, n + 1, (0, indices.shape[1]), torch.from_numpy(np.array(plane[np.newaxis], order="C")))
        for n, plane in enumerate(indices)
    )
    count = int(indices.max()) + 1
    for cut in _cuts(planes, indices.shape, shape, orders):
        plane = result[cut.place].reshape(-1)
        for samples in _mixed(cut.agreed(lambda labels: labels), count):
            plane[samples] = _largest_share(cut.shares(samples, count), plane[samples])
    return result


def decided(
    slabs: Iterable[Slab], plan_shape: Sequence[int], shape: Sequence[int], orders: Orders, decide: Decide
) -> Iterator[tuple[Place, Winners]]:
    """Resample logits and decide, in bounded memory.

    The result is that of interpolating all classes everywhere and deciding then (where two are equal but for rounding,
    either may win), the same for any cutting into slabs. Besides a slab there are two planes of logits, and
    ``CACHE_BYTES`` of interpolated ones.

    Args:
        slabs: of an array of ``plan_shape``.
        plan_shape: three sizes.
        shape: of the result, its axes in the same order.
        orders: 0 or 1 an axis.
        decide: logits (..., classes) -> winners (...) uint8. Logits that have one winner must have it in all their
            weighted means too: so it is with ``largest`` and with ``last_positive``. On the processor it is called in
            another thread.

    Yields:
        places of the result and their winners; together they cover it, none twice.
    """
    with _one_thread() as run:
        for cut in _cuts(slabs, plan_shape, shape, orders):
            yield cut.place, run(cut, functools.partial(_Cut.decided, decide=decide))
            del cut  # and with it the logits, before the next slab is made


def interpolated(
    slabs: Iterable[Slab], plan_shape: Sequence[int], shape: Sequence[int], orders: Orders
) -> Iterator[tuple[Place, Tensor]]:
    """Resample logits in bounded memory: as ``decided``, but all logits, as they are.

    Yields:
        places of the result and their logits, float32 (i, j, k, classes): what of them ``CHUNK_BYTES`` hold with all
        that they are made from, or one row.
    """
    with _one_thread() as run:
        for cut in _cuts(slabs, plan_shape, shape, orders):
            many = max(1, CHUNK_BYTES // ((4 * cut.classes + SAMPLE_BYTES) * cut.shape[1]))
            for first in range(0, cut.shape[0], many):
                rows = range(first, min(first + many, cut.shape[0]))
                yield cut.part(rows), run(cut, functools.partial(_Cut.logits, rows=rows))
            del cut


@dataclass(frozen=True)
class _Line:
    """Where new samples lie along one axis: their neighbours, and the weight of the upper one.

    Attributes:
        linear: whether the upper neighbour counts at all.
    """

    low: NDArray[np.int32]
    high: NDArray[np.int32]
    weight: Float32
    linear: bool

    @classmethod
    def of(cls, size: int, new_size: int, order: int) -> _Line:
        """The samples that resample an axis of ``size`` to ``new_size``."""
        low, high, weight = _linear(size, new_size, order)
        return cls(low.astype(np.int32), high.astype(np.int32), weight, linear=order == 1 and size != new_size)

    def within(self, rows: tuple[int, int], size: int) -> tuple[int, _Line]:
        """The samples that a block of rows yields: those whose lower neighbour is in it, and not in the next block.

        Args:
            rows: first row and end of the block. Its last row is the first of the next block, if there is one.
            size: of the axis.

        Returns:
            The number of the first of these samples; and the samples, their neighbours counted from the first row.
        """
        start, stop = np.searchsorted(self.low, [rows[0], rows[1] - (rows[1] < size)])
        own = slice(start, stop)
        return int(start), _Line(self.low[own] - rows[0], self.high[own] - rows[0], self.weight[own], self.linear)

    def neighbours(self, samples: NDArray[np.int32]) -> list[tuple[NDArray[np.int32], Float32]]:
        """Each neighbour of some samples, with its weight."""
        low, weight = self.low[samples], self.weight[samples]
        return [(low, 1 - weight), (self.high[samples], weight)] if self.linear else [(low, np.ones_like(weight))]


@dataclass
class _Plane:
    """A plane of values (rows, columns, ...) and what was decided of it.

    Attributes:
        linear: whether samples lie between two rows, and between two columns.
        cells: for each voxel the winner of all of its cell (with the next row, the next column and both), or ``MIXED``.
    """

    values: Tensor
    linear: tuple[bool, bool]
    cells: Winners | None = None

    def winners(self, decide: Decide) -> Winners:
        """The cells, decided when first asked for."""
        if self.cells is None:
            found: Winners = decide(self.values).cpu().numpy()
            if self.linear[0]:
                found = np.concatenate([_agreed(found[:-1], found[1:]), found[-1:]])
            if self.linear[1]:
                found = np.concatenate([_agreed(found[:, :-1], found[:, 1:]), found[:, -1:]], axis=1)
            self.cells = found
        return self.cells


@dataclass(frozen=True)
class _Cut:
    """One plane of the result, in a block of its rows, and the planes of logits on both sides with their weights.

    Attributes:
        axis: that the plane is across.
        index: of the plane.
        first_row: of the block.
        rows, columns: where its samples lie in the planes of logits.
        planes: one or two.
    """

    axis: int
    index: int
    first_row: int
    rows: _Line
    columns: _Line
    planes: tuple[tuple[_Plane, np.float32], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows.low), len(self.columns.low)

    @property
    def classes(self) -> int:
        """Of the logits."""
        return self.planes[0][0].values.shape[-1]

    @property
    def place(self) -> Place:
        """Of all of it in the result."""
        return self.part(range(self.shape[0]))

    def part(self, rows: range) -> Place:
        """The place of some of its rows in the result."""
        place = [slice(self.first_row + rows.start, self.first_row + rows.stop), slice(0, self.shape[1])]
        place.insert(self.axis, slice(self.index, self.index + 1))
        return place[0], place[1], place[2]

    def agreed(self, decide: Decide) -> Winners:
        """The winner at every sample (rows * columns) all of whose neighbours have it, elsewhere ``MIXED``."""
        winners = functools.reduce(_agreed, [plane.winners(decide) for plane, _ in self.planes])
        return winners.take(self.rows.low, 0).take(self.columns.low, 1).ravel()

    def decided(self, decide: Decide) -> Winners:
        """The winner at every sample: what all neighbours agree on, or what is decided of interpolated logits.

        Of the result's axes: (1, rows, columns), (rows, 1, columns) or (rows, columns, 1).
        """
        result = self.agreed(decide)
        for samples in _mixed(result, self.classes):
            result[samples] = decide(self.logits_at(samples)).cpu().numpy()
        return np.expand_dims(result.reshape(self.shape), self.axis)

    def logits(self, rows: range) -> Tensor:
        """All logits of some rows, of the result's axes and (classes)."""
        samples = np.arange(rows.start * self.shape[1], rows.stop * self.shape[1], dtype=np.int32)
        return self.logits_at(samples).reshape(len(rows), self.shape[1], -1).unsqueeze(self.axis)

    def logits_at(self, samples: NDArray[np.int32]) -> Tensor:
        """Logits (n, classes) at some samples, counted along the rows."""
        voxels, weights = self._neighbours(samples)
        parts = [_interpolate(plane.values, voxels, weights * share) for plane, share in self.planes]
        return functools.reduce(Tensor.add_, parts)

    def shares(self, samples: NDArray[np.int32], count: int) -> NDArray[Any]:
        """Of planes of labels below ``count``: the share (count, n) that each has at some samples."""
        voxels, weights = self._neighbours(samples)
        n = len(samples)
        parts = []
        for plane, share in self.planes:
            places = plane.values.numpy().ravel()[voxels].astype(np.intp) * n + np.arange(n)[:, np.newaxis]
            parts.append(np.bincount(places.ravel(), (weights * share).ravel(), count * n))
        return functools.reduce(np.add, parts).reshape(count, n)

    def _neighbours(self, samples: NDArray[np.int32]) -> tuple[NDArray[np.int32], Float32]:
        """Voxels (n, m) of a plane around each sample, counted along its rows, and their weights."""
        row, column = np.divmod(samples, np.int32(self.shape[1]))
        width = np.int32(self.planes[0][0].values.shape[1])
        corners = list(itertools.product(self.rows.neighbours(row), self.columns.neighbours(column)))
        voxels = np.stack([r * width + c for (r, _), (c, _) in corners], axis=1)
        return voxels, np.stack([of_row * of_column for (_, of_row), (_, of_column) in corners], axis=1)


def _cuts(slabs: Iterable[Slab], plan_shape: Sequence[int], shape: Sequence[int], orders: Orders) -> Iterator[_Cut]:
    """All planes of the result, each when the planes of logits that it lies between are there."""
    lines = [_Line.of(*axis) for axis in zip(plan_shape, shape, orders, strict=True)]
    planes: dict[int, _Plane] = {}
    done = 0
    for slab in slabs:
        across = lines[slab.axis]
        down, along = (axis for axis in range(3) if axis != slab.axis)
        first_row, rows = lines[down].within(slab.rows, plan_shape[down])
        linear = (lines[down].linear, lines[along].linear)
        if slab.start == 0:  # of the next block of rows
            planes, done = {}, 0
        planes |= {slab.start + n: _Plane(plane, linear) for n, plane in enumerate(slab.logits)}
        between: tuple[tuple[_Plane, np.float32], ...] = ()
        while done < len(across.low) and across.high[done] < slab.stop:
            sides = [(across.low[done], 1 - across.weight[done]), (across.high[done], across.weight[done])]
            between = tuple((planes[n], share) for n, share in sides if share > 0)
            if len(rows.low):
                yield _Cut(slab.axis, done, first_row, rows, lines[along], between)
            done += 1
        last = planes[slab.stop - 1]
        planes = {slab.stop - 1: replace(last, values=last.values.clone())}  # the slab's memory is used again
        del slab, last, between


def _mixed(winners: Winners, classes: int) -> Iterator[NDArray[np.int32]]:
    """The samples that are ``MIXED``, as many at a time as are interpolated at once."""
    samples = np.flatnonzero(winners == MIXED).astype(np.int32)
    many = max(1, CACHE_BYTES // (4 * classes + SAMPLE_BYTES))
    for start in range(0, len(samples), many):
        yield samples[start : start + many]


Run = Callable[[_Cut, Callable[[_Cut], Any]], Any]


@contextlib.contextmanager
def _one_thread() -> Iterator[Run]:
    """What calls a function of a cut in a thread of its own, for which torch's number of threads is 1.

    The work on the processor is in pieces of half a millisecond. Beside other work on the same cores, two threads that
    wait for each other at the end of each piece took ten times as long as one. ``torch.set_num_threads`` holds for the
    thread that calls it, and for those in which torch is used for the first time afterwards: for these it is put back
    at once. Logits on another device are not touched by all this (a stream belongs to a thread).
    """
    with ThreadPoolExecutor(1) as pool:

        def run(cut: _Cut, function: Callable[[_Cut], Any]) -> Any:
            if cut.planes[0][0].values.device.type != "cpu":
                return function(cut)
            return pool.submit(function, cut).result()

        pool.submit(torch.get_num_threads).result()  # the first use, which takes over what is set
        threads = torch.get_num_threads()
        pool.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)
        yield run


def _interpolate(plane: Tensor, voxels: NDArray[np.int32], weights: Float32) -> Tensor:
    """Sums (n, classes) of logits (rows, columns, classes) at some voxels (n, m), times their weights.

    An embedding bag is 5 times as fast as gathering and adding (118 classes, one thread), and makes no copy of logits.
    """
    rows, shares = torch.from_numpy(voxels).to(plane.device), torch.from_numpy(weights).to(plane.device)
    return F.embedding_bag(rows, plane.reshape(-1, plane.shape[-1]), per_sample_weights=shares, mode="sum")


def _largest_share(shares: NDArray[Any], nearest: Winners) -> Winners:
    """The label whose share of (labels, n) is the largest but for rounding; of several the nearest, else the first."""
    is_largest = shares > shares.max(axis=0) - 1e-5
    is_nearest = is_largest[nearest, np.arange(len(nearest))]
    return np.where(is_nearest, nearest, is_largest.argmax(axis=0).astype(np.uint8))


def _agreed(one: Winners, other: Winners) -> Winners:
    """What both say, or ``MIXED``."""
    return np.where(one == other, one, np.uint8(MIXED))


def _read(source: Source, axis: int, voxels: NDArray[np.int64]) -> Float32:
    """Planes across an axis, contiguous: of those asked for the first, and as many that follow it as a chunk holds."""
    many = max(1, CHUNK_BYTES // (4 * max(1, int(np.prod(source.shape)) // source.shape[axis])))
    gaps = np.flatnonzero(np.diff(voxels[:many]) > 1)
    start, count = int(voxels[0]), int(gaps[0]) + 1 if len(gaps) else len(voxels[:many])
    place = [slice(None)] * 3
    place[axis] = slice(start, start + count)
    return np.ascontiguousarray(source[place[0], place[1], place[2]].transpose(_leading(axis)), dtype=np.float32)


def _in_plane(planes: Float32, shape: Sequence[int], orders: Sequence[int], clip: bool) -> Float32:
    """Resample the last two axes of (n, J, K), each plane clipped to its own range if asked."""
    result = planes
    # The axis that shrinks most goes first: less work for the other.
    for axis in sorted((1, 2), key=lambda a: shape[a - 1] / planes.shape[a]):
        if result.shape[axis] == shape[axis - 1]:
            continue
        sizes = list(result.shape)
        sizes[axis] = shape[axis - 1]
        source, result = result, np.empty(sizes, dtype=np.float32)
        for rows, columns, matrix in _blocks(source.shape[axis], shape[axis - 1], orders[axis - 1]):
            if axis == 1:
                _multiply(matrix, source[:, columns], result[:, rows])
            else:
                _multiply(matrix, source[:, :, columns].swapaxes(1, 2), result[:, :, rows].swapaxes(1, 2))
    if clip and result is not planes:
        np.clip(result, planes.min(axis=(1, 2), keepdims=True), planes.max(axis=(1, 2), keepdims=True), out=result)
    return result


def _multiply(matrix: Float32, planes: Float32, result: Float32, adds: bool = False) -> None:
    """Fill ``result`` (n, rows, columns) with the product of a matrix (rows, m) and planes (n, m, columns), or add it.

    In parts so small that the BLAS starts no threads: beside a network at work they take four times as long as one.
    """
    for row, column in itertools.product(range(0, len(matrix), BLOCK), range(0, planes.shape[2], COLUMNS)):
        rows, columns = slice(row, row + BLOCK), slice(column, column + COLUMNS)
        if adds:
            result[:, rows, columns] += np.matmul(matrix[rows], planes[:, :, columns])
        else:
            np.matmul(matrix[rows], planes[:, :, columns], out=result[:, rows, columns])


def cubic_operator(size: int, new_size: int) -> Float32:
    """The matrix (new_size, size) that resamples a line by a cubic spline, its prefilter and edge rule folded in."""
    voxels, weights = _band(size, new_size, 3)
    return _matrix(np.arange(new_size)[:, np.newaxis], voxels, weights, (new_size, size))


def _odd_axis(orders: Orders) -> int | None:
    """The axis that has an order of its own where the other two have one."""
    return next((axis for axis in range(3) if orders.count(orders[axis]) == 1 < len(set(orders)) < 3), None)


def _leading(axis: int) -> tuple[int, int, int]:
    """The three axes, one of them brought to the front."""
    return (axis, *(a for a in range(3) if a != axis))  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _blocks(size: int, new_size: int, order: int) -> list[tuple[slice, slice, Float32]]:
    """The operator that resamples a line of ``size`` voxels, cut into blocks of rows: rows, columns, matrix."""
    voxels, weights = _band(size, new_size, order)
    blocks = []
    for start in range(0, new_size, BLOCK):
        rows = slice(start, min(start + BLOCK, new_size))
        columns = slice(int(voxels[rows].min()), int(voxels[rows].max()) + 1)
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        matrix = _matrix(np.arange(shape[0])[:, np.newaxis], voxels[rows] - columns.start, weights[rows], shape)
        blocks.append((rows, columns, matrix))
    return blocks


@functools.lru_cache(maxsize=64)
def _column_blocks(size: int, new_size: int, order: int) -> list[tuple[NDArray[np.int64], slice, Float32 | None]]:
    """The same operator, cut into blocks of columns whose products are added: columns, rows, matrix (rows, columns).

    Columns without any weight are left out; those of a cubic are all there, as their values are its range. Where
    nothing is to be resampled the matrix is None.
    """
    if size == new_size:
        ends = [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
        return [(np.arange(*place), slice(*place), None) for place in ends]
    voxels, weights = _band(size, new_size, order)
    all_columns = np.arange(size) if order == 3 else np.unique(voxels[weights != 0])
    blocks: list[tuple[NDArray[np.int64], slice, Float32 | None]] = []
    for start in range(0, len(all_columns), BLOCK):
        columns = all_columns[start : start + BLOCK]
        row, entry = np.nonzero((voxels >= columns[0]) & (voxels <= columns[-1]) & (weights != 0))
        rows = slice(int(row.min()), int(row.max()) + 1) if len(row) else slice(0, 0)
        column = np.searchsorted(columns, voxels[row, entry])
        shape = (rows.stop - rows.start, len(columns))
        blocks.append((columns, rows, _matrix(row - rows.start, column, weights[row, entry], shape)))
    return blocks


def _matrix(rows: NDArray[Any], columns: NDArray[Any], weights: NDArray[Any], shape: tuple[int, int]) -> Float32:
    """A matrix of the sums of weights that fall on each place."""
    matrix = np.zeros(shape)
    np.add.at(matrix, (rows, columns), weights)
    return matrix.astype(np.float32)


def _band(size: int, new_size: int, order: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each new sample the voxels that count (new_size, n), and their weights, which add up to 1.

    What is beyond the border is the outermost voxel, which so may be there several times.
    """
    if order < 3:
        low, high, weight = _linear(size, new_size, order)
        return np.stack([low, high], axis=1), np.stack([1.0 - weight, weight], axis=1)
    place = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    voxel = np.floor(place).astype(np.int64)
    t = place - voxel
    # Cubic B-splines at the sample, of the four voxels around it
    splines = np.stack([(1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3], axis=1) / 6
    # Their coefficients, by the inverse of the sampled B-spline: sqrt(3) z^|n|, z = sqrt(3) - 2 (Unser 1999, "Splines")
    reach = np.arange(1 - REACH, 1 + REACH)
    weights = splines @ (np.sqrt(3) * (np.sqrt(3) - 2) ** np.abs(np.arange(-1, 3)[:, np.newaxis] - reach))
    return np.clip(voxel[:, np.newaxis] + reach, 0, size - 1), weights / weights.sum(axis=1, keepdims=True)


@functools.lru_cache(maxsize=256)
def _linear(size: int, new_size: int, order: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Float32]:
    """Lower and upper neighbour of every new sample, and the weight of the upper one; order 0: the nearest, twice."""
    place = np.clip((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0, size - 1)
    if order == 0:  # where two are as near, rounding decides: here as in scipy, and so in skimage and nnU-Net
        nearest = np.floor(place + 0.5).astype(np.int64)
        return nearest, nearest, np.zeros(new_size, dtype=np.float32)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    return low, high, (place - low).astype(np.float32)
