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
        logits: float32 (planes, rows, columns, classes), on the device of the network. Only valid until the next slab
            is asked for: its memory is used again.
    """

    axis: int
    start: int
    stop: int
    rows: tuple[int, int]
    logits: Tensor


def axis_orders(
    spacing_from: Sequence[float], spacing_to: Sequence[float], resampling: Resampling, order: int, order_low: int
) -> Orders:
    """Spline order for each of three axes.

    All axes have ``order``, but the axis of low resolution has ``order_low``: with ``resampling.separate`` of "auto"
    that of the first of the two grids that is anisotropic, if one is; with "always" that of ``spacing_from``. Where
    several axes are equally coarse, none is treated apart (nnU-Net's rule).
    """
    looked_at = {
        "never": [],
        "always": [spacing_from],
        "auto": [s for s in (spacing_from, spacing_to) if max(s) / min(s) > resampling.anisotropy][:1],
    }[resampling.separate]
    for spacing in looked_at:
        low = [axis for axis in range(3) if spacing[axis] == max(spacing)]
        if len(low) == 1:
            first, second, third = (order_low if axis == low[0] else order for axis in range(3))
            return first, second, third
    return order, order, order


def resample_image(array: NDArray[Any], shape: Sequence[int], orders: Orders) -> Float32:
    """Resample the last three axes of (..., I, J, K) to ``shape``; see ``resample_into``."""
    result = np.empty((*array.shape[:-3], *shape), dtype=np.float32)
    for channel in np.ndindex(array.shape[:-3]):
        resample_into(result[channel], array[channel], orders)
    return result


def resample_into(result: Float32, source: Source, orders: Orders) -> None:
    """Fill ``result`` (I', J', K') with a channel (I, J, K), of which a few planes are read at a time, each once.

    A cubic is clipped to the range of its input. Where one axis has an order of its own, each plane across it is
    resampled by itself and clipped to its own range, as in nnU-Net.
    """
    axis = _apart(orders)
    order, *within = (orders[a] for a in _leading(axis))
    clip_planes = 3 in within and order != 3
    target = result.transpose(_leading(axis))
    low, high = np.inf, -np.inf
    window, first = np.empty((0, *target.shape[1:]), dtype=np.float32), 0
    for rows, columns, matrix in _blocks(source.shape[axis], len(target), order):
        window, first = window[columns.start - first :], columns.start
        while first + len(window) < columns.stop:
            planes = _read(source, axis, first + len(window), columns.stop)
            if order == 3:
                low, high = min(low, planes.min()), max(high, planes.max())
            window = np.concatenate([window, _in_plane(planes, target.shape[1:], within, clip_planes)])
        if matrix is None:
            target[rows] = window
        else:
            _multiply(matrix, window.swapaxes(0, 1), target[rows].swapaxes(0, 1))
    if order == 3 and result.shape != tuple(source.shape):
        np.clip(result, low, high, out=result)


def resample_labels(indices: Winners, shape: Sequence[int], orders: Orders) -> Winners:
    """Resample an index mask (I, J, K): each label by itself with ``orders`` (0 or 1), and the largest share wins.

    Ties go to the smaller index. With orders of 0 this is nearest-neighbour resampling.
    """
    if tuple(shape) == indices.shape:
        return indices
    one_hot = torch.eye(int(indices.max()) + 1)

    def shares(plane: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
        return _weighted(one_hot, plane.reshape(-1)[neighbours.long()].int(), weights)

    planes = (
        Slab(0, n, n + 1, (0, indices.shape[1]), torch.from_numpy(np.array(plane[np.newaxis], order="C")))
        for n, plane in enumerate(indices)
    )
    result = np.empty(tuple(shape), dtype=np.uint8)
    with _one_thread():
        for cut in _cuts(planes, indices.shape, shape, orders):
            result[cut.place] = cut.upright(cut.winners(lambda plane: plane, shares, _largest_share, len(one_hot)))
    return result


def decided(
    slabs: Iterable[Slab], plan_shape: Sequence[int], shape: Sequence[int], orders: Orders, decide: Decide
) -> Iterator[tuple[Place, Winners]]:
    """Resample logits and decide, in bounded memory.

    The result is that of interpolating all classes everywhere and deciding then (where two are equal but for rounding,
    either may win), the same for any cutting into slabs. Besides a slab there are two planes of logits, and
    ``CHUNK_BYTES`` of interpolated ones.

    Args:
        slabs: of an array of ``plan_shape``.
        plan_shape: three sizes.
        shape: of the result, its axes in the same order.
        orders: 0 or 1 an axis.
        decide: logits (..., classes) -> winners (...) uint8. Logits that have one winner must have it in all their
            weighted means too: so it is with the index of the largest, and with that of the last positive.

    Yields:
        places of the result and their winners; together they cover it, none twice.
    """
    for cut in _cuts(slabs, plan_shape, shape, orders):
        yield cut.place, cut.upright(cut.winners(decide, _interpolate, decide, cut.classes))
        del cut  # and with it the logits, before the next slab is made


def interpolated(
    slabs: Iterable[Slab], plan_shape: Sequence[int], shape: Sequence[int], orders: Orders
) -> Iterator[tuple[Place, Tensor]]:
    """Resample logits in bounded memory: as ``decided``, but all logits, as they are.

    Yields:
        places of the result and their logits, float32 (i, j, k, classes): ``CHUNK_BYTES`` of them, or one row.
    """
    for cut in _cuts(slabs, plan_shape, shape, orders):
        many = max(1, CHUNK_BYTES // (4 * cut.classes * cut.shape[1]))
        for first in range(0, cut.shape[0], many):
            rows = range(first, min(first + many, cut.shape[0]))
            voxels = np.arange(rows.start * cut.shape[1], rows.stop * cut.shape[1])
            with _one_thread():
                logits = cut.at(voxels, _interpolate).reshape(len(rows), cut.shape[1], -1)
            yield cut.part(rows), logits.unsqueeze(cut.axis)
            del logits
        del cut


@dataclass(frozen=True)
class _Line:
    """Where new samples lie along one axis: their neighbours, and the weight of the upper one.

    Attributes:
        linear: whether the upper neighbour counts at all.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    weight: Float32
    linear: bool

    @classmethod
    def of(cls, size: int, new_size: int, order: int) -> _Line:
        """The samples that resample an axis of ``size`` to ``new_size``."""
        return cls(*_linear(size, new_size, order), linear=order == 1 and size != new_size)

    def within(self, rows: tuple[int, int], size: int) -> tuple[int, _Line]:
        """The samples whose lower neighbour lies in a block of rows and not in the next, counted from its first row.

        ``size`` is that of the axis. The first sample comes too.
        """
        start, stop = np.searchsorted(self.low, [rows[0], rows[1] - (rows[1] < size)])
        own = slice(start, stop)
        return int(start), _Line(self.low[own] - rows[0], self.high[own] - rows[0], self.weight[own], self.linear)

    def neighbours(self, samples: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], Float32]]:
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
    planes: tuple[tuple[_Plane, float], ...]

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

    def upright(self, winners: Winners) -> Winners:
        """(rows, columns) with the axis across, as the result has it."""
        return np.expand_dims(winners, self.axis)

    def winners(self, decide: Decide, between: Between, decide_between: Decide, classes: int) -> Winners:
        """The winner at every sample (rows, columns).

        ``decide`` says it of planes; ``between`` gives so many ``classes`` where their voxels differ, and
        ``decide_between`` says it of these.
        """
        with _one_thread():
            agreed = functools.reduce(_agreed, [plane.winners(decide) for plane, _ in self.planes])
            result = agreed.take(self.rows.low, 0).take(self.columns.low, 1).ravel()
            mixed = np.flatnonzero(result == MIXED)
            many = max(1, CACHE_BYTES // (4 * classes))
            for start in range(0, len(mixed), many):
                samples = mixed[start : start + many]
                result[samples] = decide_between(self.at(samples, between)).cpu().numpy()
        return result.reshape(self.shape)

    def at(self, samples: NDArray[np.int64], between: Between) -> Tensor:
        """Values (n, classes) at some samples, counted along the rows."""
        row, column = np.divmod(samples, self.shape[1])
        width = self.planes[0][0].values.shape[1]
        corners = [
            (r * width + c, of_row * of_column)
            for (r, of_row), (c, of_column) in itertools.product(
                self.rows.neighbours(row), self.columns.neighbours(column)
            )
        ]
        device = self.planes[0][0].values.device
        voxels = torch.from_numpy(np.stack([voxel for voxel, _ in corners], axis=1).astype(np.int32)).to(device)
        weights = np.stack([weight for _, weight in corners], axis=1)
        parts = [
            between(plane.values, voxels, torch.from_numpy(weights * np.float32(share)).to(device))
            for plane, share in self.planes
        ]
        return functools.reduce(Tensor.add_, parts)


Between = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A plane, its voxels (n, neighbours) counted along the rows, and their weights -> values (n, classes)."""


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
        between: tuple[tuple[_Plane, float], ...] = ()
        while done < len(across.low) and across.high[done] < slab.stop:
            sides = [(across.low[done], 1 - across.weight[done]), (across.high[done], across.weight[done])]
            between = tuple((planes[n], float(share)) for n, share in sides if share > 0)
            if len(rows.low):
                yield _Cut(slab.axis, done, first_row, rows, lines[along], between)
            done += 1
        last = planes[slab.stop - 1]
        planes = {slab.stop - 1: replace(last, values=last.values.clone())}  # the slab's memory is used again
        del slab, last, between


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch's work on the processor: it is in pieces of half a millisecond.

    Beside other work on the same cores, two threads that wait for each other at the end of each piece took ten times
    as long as one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _interpolate(plane: Tensor, voxels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of logits (rows, columns, classes)."""
    return _weighted(plane.reshape(-1, plane.shape[-1]), voxels, weights)


def _weighted(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sums (n, classes) of the given rows (n, m) of a table, times their weights.

    An embedding bag is 5 times as fast as gathering and adding (118 classes, one thread), and makes no copy of rows.
    """
    return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")


def _largest_share(shares: Tensor) -> Tensor:
    """The first index whose share is the largest but for rounding."""
    return (shares > shares.amax(dim=-1, keepdim=True) - 1e-5).to(torch.uint8).argmax(dim=-1).to(torch.uint8)


def _agreed(one: Winners, other: Winners) -> Winners:
    """What both say, or ``MIXED``."""
    return np.where(one == other, one, np.uint8(MIXED))


def _read(source: Source, axis: int, start: int, stop: int) -> Float32:
    """Planes across an axis, from ``start`` on as many as fit in a chunk, contiguous."""
    many = max(1, CHUNK_BYTES // (4 * max(1, int(np.prod(source.shape)) // source.shape[axis])))
    place = [slice(None)] * 3
    place[axis] = slice(start, min(stop, start + many))
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


def _multiply(matrix: Float32, planes: Float32, result: Float32) -> None:
    """Fill ``result`` (n, rows, columns) with the product of a matrix (rows, m) and planes (n, m, columns).

    In parts so small that the BLAS starts no threads: beside a network at work they take four times as long as one.
    """
    for start in range(0, planes.shape[2], COLUMNS):
        columns = slice(start, start + COLUMNS)
        np.matmul(matrix, planes[:, :, columns], out=result[:, :, columns])


def cubic_operator(size: int, new_size: int) -> Float32:
    """The matrix (new_size, size) that resamples a line by a cubic spline, its prefilter and edge rule folded in."""
    first, weights = _band(size, new_size, 3)
    operator = np.zeros((new_size, size), dtype=np.float64)
    columns = np.clip(first[:, np.newaxis] + np.arange(weights.shape[1]), 0, size - 1)
    np.add.at(operator, (np.arange(new_size)[:, np.newaxis], columns), weights)
    return operator.astype(np.float32)


def _apart(orders: Orders) -> int:
    """The axis that has an order of its own; the first where none has."""
    return next((axis for axis in range(3) if orders.count(orders[axis]) == 1 < len(set(orders)) < 3), 0)


def _leading(axis: int) -> tuple[int, int, int]:
    """The three axes, one of them brought to the front."""
    return (axis, *(a for a in range(3) if a != axis))  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _blocks(size: int, new_size: int, order: int) -> list[tuple[slice, slice, Any]]:
    """The operator that resamples a line of ``size`` voxels, cut into blocks of rows: rows, columns, matrix (float32).

    The columns of all blocks together are all columns, in order. Where nothing is to be resampled the matrix is None.
    """
    if size == new_size:
        return [(place, place, None) for place in (slice(n, min(n + BLOCK, size)) for n in range(0, size, BLOCK))]
    first, weights = _band(size, new_size, order)
    columns = np.clip(first[:, np.newaxis] + np.arange(weights.shape[1]), 0, size - 1)
    blocks = []
    stop = 0
    for start in range(0, new_size, BLOCK):
        rows = slice(start, min(start + BLOCK, new_size))
        left = min(int(columns[rows].min()), stop)
        stop = size if rows.stop == new_size else int(columns[rows].max()) + 1
        matrix = np.zeros((rows.stop - start, stop - left))
        np.add.at(matrix, (np.arange(len(matrix))[:, np.newaxis], columns[rows] - left), weights[rows])
        blocks.append((rows, slice(left, stop), matrix.astype(np.float32)))
    return blocks


def _band(size: int, new_size: int, order: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each new sample the first voxel that counts, and the weights (new_size, n) of this and the next n - 1.

    A voxel beyond the border stands for the outermost. Weights of a sample add up to 1.
    """
    if order < 3:
        low, _, weight = _linear(size, new_size, order)
        return low, np.stack([1.0 - weight, weight], axis=1)
    place = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    voxel = np.floor(place).astype(np.int64)
    t = place - voxel
    # Cubic B-splines at the sample, of the four voxels around it
    splines = np.stack([(1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3], axis=1) / 6
    # Their coefficients, by the inverse of the sampled B-spline: sqrt(3) z^|n|, z = sqrt(3) - 2 (Unser 1999, "Splines")
    near = np.arange(-1, 3)[:, np.newaxis] - np.arange(1 - REACH, 1 + REACH)
    weights = splines @ (np.sqrt(3) * (np.sqrt(3) - 2) ** np.abs(near))
    return voxel + 1 - REACH, weights / weights.sum(axis=1, keepdims=True)


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
