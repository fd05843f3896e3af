"""Resampling along one axis at a time: nearest, linear and cubic spline.

Resampling a grid to another number of voxels over the same block of space is separable, so an image is resampled by
one small operator an axis. The operators equal ``skimage.transform.resize(..., mode="edge", anti_aliasing=False)``,
which nnU-Net uses: outer voxel edges stay in place, values beyond the border repeat the outermost voxel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medseg.plan import Resampling

Float32 = NDArray[np.float32]
Orders = tuple[int, int, int]


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

    All axes have ``order``, but the axis of low resolution of an anisotropic grid has ``order_low``. The grid looked
    at is the first of the two that is anisotropic; where two axes are equally coarse, neither is treated apart
    (nnU-Net's rule).
    """
    for spacing in (spacing_from, spacing_to):
        if max(spacing) / min(spacing) > resampling.anisotropy:
            low = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            if len(low) == 1:
                first, second, third = (order_low if axis == low[0] else order for axis in range(3))
                return first, second, third
            break
    return order, order, order


def resample_image(array: Float32, shape: Sequence[int], orders: Orders) -> Float32:
    """Resample the last three axes of (..., I, J, K) to ``shape``; a cubic channel is clipped to its own range."""
    result = array
    # Axes that shrink most go first: less work for the others.
    for axis in sorted(range(3), key=lambda a: shape[a] / array.shape[a - 3]):
        result = _along(result, axis - 3, shape[axis], orders[axis])
    if 3 in orders and result is not array:
        space = (-3, -2, -1)
        result = np.clip(result, array.min(axis=space, keepdims=True), array.max(axis=space, keepdims=True))
    return np.ascontiguousarray(result, dtype=np.float32)


def resample_labels(indices: NDArray[np.uint8], shape: Sequence[int], orders: Orders) -> NDArray[np.uint8]:
    """Resample an index mask (I, J, K): each label by itself with ``orders``, and the largest wins.

    Ties go to the smaller index. With orders of 0 this is nearest-neighbour resampling.
    """
    if tuple(shape) == indices.shape:
        return indices
    best = np.zeros(tuple(shape), dtype=np.float32)
    result = np.zeros(tuple(shape), dtype=np.uint8)
    for value in np.unique(indices):
        share = resample_image((indices == value).astype(np.float32), shape, orders)
        wins = share > best
        best[wins] = share[wins]
        result[wins] = value
    return result


def slab_indices(
    slabs: Iterable[tuple[int, int, Float32]], depth: int, shape: Sequence[int], orders: Orders
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Resample logits slab by slab and take the largest class.

    Only the logits of one slab, and those neighbours that the next slab still needs, exist at a time. The result is
    the same for any cutting into slabs.

    Args:
        slabs: ``(start, stop, logits (C, stop - start, H, W))`` in order, covering ``depth`` planes of the first axis.
        depth: planes in all.
        shape: of the result (I, J, K).
        orders: 0 or 1 an axis.

    Yields:
        ``(start, stop, indices (stop - start, J, K))`` in order, covering the first axis of ``shape``.
    """
    low, high, weight = _linear(depth, shape[0], orders[0])
    kept, first, done = None, 0, 0
    for _, stop, logits in slabs:
        kept = logits if kept is None else np.concatenate([kept, logits], axis=1)
        ready = int(np.searchsorted(high, stop, side="left"))
        if ready > done:
            planes = slice(done, ready)
            yield done, ready, _classes(kept, low[planes] - first, high[planes] - first, weight[planes], shape, orders)
            done = ready
        if done < shape[0]:
            drop = min(int(low[done]) - first, kept.shape[1])
            kept, first = kept[:, drop:].copy(), first + drop  # a view would keep the whole slab
        del logits  # before the next slab is made


def _classes(
    logits: Float32,
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    weight: Float32,
    shape: Sequence[int],
    orders: Orders,
) -> NDArray[np.uint8]:
    """The winning class of the planes between ``low`` and ``high``, one class in memory at a time at full size."""
    best = winner = None
    for index, channel in enumerate(logits):
        plane_weight = weight[:, np.newaxis, np.newaxis]
        score = channel[low] if orders[0] == 0 else channel[low] * (1 - plane_weight) + channel[high] * plane_weight
        score = _along(_along(score, -2, shape[1], orders[1]), -1, shape[2], orders[2])
        if best is None or winner is None:
            best, winner = score.copy(), np.zeros(score.shape, dtype=np.uint8)
            continue
        wins = score > best
        best[wins] = score[wins]
        winner[wins] = index
    if winner is None:
        raise ValueError("logits need at least one class")
    return winner


def _along(array: Float32, axis: int, size: int, order: int) -> Float32:
    """Resample one axis (negative number) to ``size``."""
    if array.shape[axis] == size:
        return array
    if order == 3:
        moved = np.moveaxis(array, axis, -1)
        return np.moveaxis(moved @ cubic_operator(array.shape[axis], size).T, -1, axis)
    low, high, weight = _linear(array.shape[axis], size, order)
    if order == 0:
        return np.take(array, low, axis=axis)
    sizes = [1] * array.ndim
    sizes[axis] = size
    share = weight.reshape(sizes)
    result: Any = np.take(array, low, axis=axis) * (1 - share) + np.take(array, high, axis=axis) * share
    return result  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def cubic_operator(size: int, new_size: int) -> Float32:
    """The matrix (new_size, size) that resamples a line by a cubic spline, with its prefilter and edge rule folded in.

    Had by resampling the unit vectors: the spline is linear in its values.
    """
    if size == 1:
        return np.ones((new_size, 1), dtype=np.float32)
    columns = [ndimage.zoom(unit, new_size / size, order=3, mode="nearest", grid_mode=True) for unit in np.eye(size)]
    operator = np.stack(columns, axis=1).astype(np.float32)
    operator.flags.writeable = False
    return operator


@lru_cache(maxsize=256)
def _linear(size: int, new_size: int, order: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Float32]:
    """Lower and upper neighbour of every new sample, and the weight of the upper one; order 0: the nearest, twice."""
    if order == 0:
        nearest = (2 * np.arange(new_size) + 1) * size // (2 * new_size)  # in integers: exact where two are as near
        return nearest, nearest, np.zeros(new_size, dtype=np.float32)
    place = np.clip((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0, size - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    return low, high, (place - low).astype(np.float32)
