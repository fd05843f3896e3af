"""From a native image to the plan grid, and from logits back to a native mask. Each undoes the other's geometry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medseg import io
from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Box, Geometry, Reorientation
from medseg.plan import Configuration, Normalisation, Plan
from medseg.records import Record
from medseg.resample import (
    CHUNK_BYTES,
    Orders,
    Place,
    Slab,
    Winners,
    axis_orders,
    decided,
    interpolated,
    largest,
    last_positive,
    resample_into,
    resample_labels,
    separate_axis,
)
from medseg.volume import Labels, Mask, Volume

Float32 = NDArray[np.float32]
Matrix = tuple[tuple[float, float, float, float], ...]
Probabilities = Callable[[Place, Float32], None]
"""Gets a place of the native array (I, J, K) and the probabilities there, float32 (channels, i, j, k)."""


class GridTrace(Record):
    """How a prepared array lies in its native image: made by ``prepare``, consumed by ``restore``.

    Attributes:
        native_shape, native_affine: the grid of the file.
        orientation: letters of the plan order, for example "SAR".
        box_start, box_stop: the crop, on the grid after reorientation.
        plan_shape: shape of the prepared array.
        orders: spline orders of the way back.
        orthogonal: whether a grid whose axes are not orthogonal is resampled to one that is, before the crop.
    """

    native_shape: tuple[int, int, int]
    native_affine: Matrix
    orientation: str
    box_start: tuple[int, int, int]
    box_stop: tuple[int, int, int]
    plan_shape: tuple[int, int, int]
    orders: Orders
    orthogonal: bool = True

    @property
    def native(self) -> Geometry:
        """The grid of the file."""
        return Geometry(self.native_shape, np.array(self.native_affine))

    @property
    def box(self) -> Box:
        """The crop."""
        return Box(self.box_start, self.box_stop)


@dataclass(frozen=True)
class Prepared:
    """A case on the plan grid.

    Attributes:
        image: normalised float32 (C, *plan_shape); in a cascade then one channel a class of the earlier mask, 0 or 1.
        indices: label indices uint8 (*plan_shape), or None without a mask.
        trace: the way back.
    """

    image: Float32
    indices: NDArray[np.uint8] | None
    trace: GridTrace


def prepare(
    volume: Volume, plan: Plan, configuration: Configuration, mask: Mask | None = None, previous: Mask | None = None
) -> Prepared:
    """Reorient, crop, normalise and resample an image (and its mask) to the plan grid.

    An image whose voxel axes are not orthogonal is resampled to the nearest orthogonal grid of the same spacing, after
    it is reoriented: so all orientations of one image give one array. That is linear at most, as a cubic rings: around
    a body it would leave values that are not 0. Under the orientation "stored" the axes are only put in the plan's
    order. The crop is the box of voxels that are not 0 in some channel; the whole image where there
    is none. Then the image goes through normalisation and resampling a few planes at a time.

    Args:
        volume: native image.
        plan: what to do with it.
        configuration: one of the plan's.
        mask: native mask of its labels.
        previous: native mask that the earlier configuration of a cascade gave; resampled as ``mask`` is.

    Raises:
        InputError: the image has another number of channels than the plan; a mask has a value without a name; or
            ``previous`` is missing, or is not asked for.
        GeometryMismatch: a mask has another shape than the image.
    """
    _require_channels(volume, plan)
    _require_fitting(previous, configuration)
    letters, oriented, grid = plan_order(volume.geometry, plan)
    turn = volume.geometry.to(letters)
    array = turn.apply(volume.array)
    if grid is not oriented:
        array = _sampled(array, oriented, grid, min(plan.resampling.image, 1))
    box = _nonzero_box(array)
    cropped, rule = grid.cropped(box), plan.resampling
    shape, spacing = plan_grid(cropped, configuration)

    def to_plan_grid(mask: Mask) -> Winners:
        indices = turn.apply(_indices(mask, volume, plan.labels))
        if grid is not oriented:
            whole = np.empty(grid.shape, dtype=np.uint8)
            _sample(indices, oriented, grid, 0, "constant", whole)
            indices = whole
        orders = axis_orders(cropped.spacing, spacing, rule, rule.label, rule.label_along_low)
        return np.ascontiguousarray(resample_labels(indices[box.slices], shape, orders))

    image = np.empty((plan.inputs(configuration), *shape), dtype=np.float32)
    orders = axis_orders(cropped.spacing, spacing, rule, rule.image, rule.image_along_low)
    separate = separate_axis(cropped.spacing, spacing, rule)
    channels = _scaled(array[:, *box.slices], plan.normalisation)
    for result, channel in zip(image[: len(plan.channels)], channels, strict=True):
        resample_into(result, channel, orders, separate)
    if previous is not None:
        classes = np.arange(1, plan.labels.count).reshape(-1, 1, 1, 1)
        np.equal(to_plan_grid(previous), classes, out=image[len(plan.channels) :])
    trace = GridTrace(
        native_shape=volume.geometry.shape,
        native_affine=_matrix(volume.geometry.affine),
        orientation=letters,
        box_start=_three(box.start),
        box_stop=_three(box.stop),
        plan_shape=shape,
        orders=axis_orders(spacing, cropped.spacing, rule, rule.logits, rule.logits_along_low),
        orthogonal=plan.orientation != "stored",
    )
    return Prepared(image, None if mask is None else to_plan_grid(mask), trace)


def restore(
    slabs: Iterable[Slab], trace: GridTrace, plan: Plan, probabilities: Probabilities | None = None
) -> NDArray[Any]:
    """The native mask of logits on the plan grid.

    Args:
        slabs: of the logits, channels as in ``Plan.outputs``.
        trace: from ``prepare``.
        plan: says what the channels are: classes of which the largest wins, or regions.
        probabilities: called for place after place of the crop with the softmax of the classes, or the sigmoid of the
            regions. Nothing is known of voxels outside the crop, where the image is 0: they are background.

    Returns:
        Label values (I, J, K) on the native grid; background outside the crop.

    Raises:
        InputError: probabilities are asked for on a grid whose axes are not orthogonal.
    """
    turn = trace.native.to(trace.orientation)
    oriented = trace.native.reoriented(turn)
    grid = _orthogonal(oriented) if trace.orthogonal else oriented
    if probabilities is not None and grid is not oriented:
        remedy = "resample the image to a grid with orthogonal axes"
        raise InputError("probabilities", "are asked for on sheared voxel axes", "orthogonal axes", remedy)
    values = _label_values(plan)
    decide = last_positive if plan.region_order else largest
    if probabilities is None:
        found = decided(slabs, trace.plan_shape, trace.box.shape, trace.orders, decide)
    else:
        found = _with_probabilities(slabs, trace, decide, probabilities)
    native = np.zeros(trace.native_shape, dtype=values.dtype)
    whole = turn.apply(native) if grid is oriented else np.zeros(grid.shape, dtype=values.dtype)
    inside = whole[trace.box.slices]
    for place, winners in found:
        inside[place] = values[winners]
    if grid is not oriented:
        _sample(whole, grid, oriented, 0, "constant", turn.apply(native))
    return native


def on_grid(volume: Volume, grid: Geometry) -> Volume:
    """An image on another grid, by where its voxels lie in the world: linear, beyond its own grid its minimum.

    Returns:
        Volume, float32; the image itself where it lies on the grid, else with a warning that says so.
    """
    if volume.geometry.close_to(grid):
        return volume
    result = np.empty((len(volume.array), *grid.shape), dtype=np.float32)
    for channel, out in zip(volume.array, result, strict=True):
        # "grid-constant": to the minimum within a voxel, so that rounding at the border is of no matter
        _sample(channel, volume.geometry, grid, 1, "grid-constant", out, fill=float(channel.min()))
    warning = f"{io.title(volume)} was resampled to the grid of the first channel"
    return replace(volume, array=result, geometry=grid, warnings=(*volume.warnings, warning))


def normalise(array: NDArray[Any], normalisation: tuple[Normalisation, ...]) -> Float32:
    """Bring each channel of (C, I, J, K), or of a picture (C, H, W), to the plan's scale, float32.

    A constant channel becomes 0 under z-score. Of a volume, holes that its voxels enclose count as inside under
    ``nonzero_only``; those of a picture or of a single plane do not: in three dimensions they are open.
    """
    return np.stack([channel[(slice(None),) * (array.ndim - 1)] for channel in _scaled(array, normalisation)])


def plan_order(native: Geometry, plan: Plan) -> tuple[str, Geometry, Geometry]:
    """A native grid in the order of the plan's axes.

    Returns:
        the letters of the axes; the grid reoriented to them; and the orthogonal grid that it is brought to where it is
        sheared, else (and under the orientation "stored") the reoriented grid itself.
    """
    orientation = native.orientation if plan.orientation == "stored" else plan.orientation
    letters = "".join(orientation[axis] for axis in plan.axes)
    oriented = native.reoriented(native.to(letters))
    return letters, oriented, oriented if plan.orientation == "stored" else _orthogonal(oriented)


def plan_grid(cropped: Geometry, configuration: Configuration) -> tuple[tuple[int, int, int], tuple[float, ...]]:
    """Shape and spacing (mm) that a cropped grid in plan order takes on the plan grid; at least one voxel an axis."""
    pairs = list(zip(cropped.spacing, configuration.spacing_mm, strict=True))
    spacing = tuple(own if target is None else target for own, target in pairs)
    sizes = [max(1, round(own / new * n)) for own, new, n in zip(cropped.spacing, spacing, cropped.shape, strict=True)]
    return _three(sizes), spacing


@dataclass(frozen=True)
class _Scaled:
    """A channel of which any part is normalised when it is asked for: clipped, shifted, divided, 0 outside.

    Attributes:
        channel: (I, J, K), any real numbers.
        limits: to clip to.
        shift: is subtracted.
        divisor: of the difference.
        inside: voxels that are not 0 afterwards; all where it is None.
    """

    channel: NDArray[Any]
    limits: tuple[float, float] | None = None
    shift: float = 0.0
    divisor: float = 1.0
    inside: NDArray[np.bool_] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the channel."""
        return self.channel.shape

    def __getitem__(self, place: tuple[slice, ...]) -> Float32:
        values = np.array(self.channel[place], dtype=np.float32, order="C")
        if self.limits is not None:
            np.clip(values, *self.limits, out=values)
        if self.shift:
            values -= np.float32(self.shift)
        if self.divisor != 1:
            values /= np.float32(self.divisor)
        if self.inside is not None:
            values *= self.inside[place]
        return values


def _scaled(array: NDArray[Any], normalisation: tuple[Normalisation, ...]) -> Iterator[_Scaled]:
    """The channels of (C, I, J, K), each with what its rule says."""
    body = _body(array) if any(rule.scheme == "zscore" and rule.nonzero_only for rule in normalisation) else None
    for channel, rule in zip(array, normalisation, strict=True):
        if rule.scheme == "ct":
            yield _Scaled(channel, (rule.lower, rule.upper), rule.mean, max(rule.std, 1e-8))
        elif rule.scheme == "zscore":
            inside = body if rule.nonzero_only else None
            mean, std = _mean_and_std(channel, inside)
            yield _Scaled(channel, None, mean, max(std, 1e-8), inside)
        elif rule.scheme == "minmax":
            low, high = float(channel.min()), float(channel.max())
            yield _Scaled(channel, None, low, max(high - low, 1e-8))
        else:
            yield _Scaled(channel, divisor=255.0 if rule.scheme == "rgb" else 1.0)


def _mean_and_std(channel: NDArray[Any], inside: NDArray[np.bool_] | None) -> tuple[float, float]:
    """Mean and standard deviation of the voxels inside (0 and 0 of none), a few planes at a time, in float64."""

    def parts() -> Iterator[NDArray[np.float64]]:
        many = max(1, CHUNK_BYTES // (8 * max(1, channel[0].size)))
        for start in range(0, len(channel), many):
            part = np.array(channel[start : start + many], dtype=np.float64, order="C")
            yield part if inside is None else part[inside[start : start + many]]

    count = max(1, channel.size if inside is None else int(np.count_nonzero(inside)))
    mean = sum(float(part.sum()) for part in parts()) / count
    return mean, float(np.sqrt(sum(float(np.square(part - mean).sum()) for part in parts()) / count))


def _body(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Voxels of (C, I, J, K) that are not 0 in some channel, and the holes that they enclose (nnU-Net's mask).

    A hole is a piece of the rest, joined by faces, that the border of the image does not cut.
    """
    body = np.atleast_3d(array[0] != 0)
    for channel in array[1:]:
        body |= channel.reshape(body.shape) != 0
    np.invert(body, out=body)
    pieces, count = ndimage.label(body)
    is_open = np.zeros(count + 1, dtype=bool)
    for axis in range(3):
        for end in (0, -1):
            is_open[pieces.take(end, axis)] = True
    is_open[0] = False  # the body itself
    for plane, numbers in zip(body, pieces, strict=True):  # in place: no third array
        plane[...] = ~is_open[numbers]
    return body.reshape(array.shape[1:])


def _nonzero_box(array: NDArray[Any]) -> Box:
    """The box of voxels of (C, I, J, K) that are not 0 in some channel, all where none is: planes from both ends."""
    box = Box.whole(array.shape[1:])
    for axis in range(3):
        planes = np.moveaxis(array[:, *box.slices], axis + 1, 0)
        first = next((n for n, plane in enumerate(planes) if plane.any()), None)
        if first is None:
            return Box.whole(array.shape[1:])
        last = next(n for n in reversed(range(len(planes))) if planes[n].any())
        start, stop = list(box.start), list(box.stop)
        start[axis], stop[axis] = first, last + 1
        box = Box(tuple(start), tuple(stop))
    return box


def _label_values(plan: Plan) -> NDArray[Any]:
    """The label value that each winner stands for, in the smallest type that holds all of the plan's."""
    labels = plan.labels
    values = labels.to_values(np.arange(labels.count + (labels.ignore is not None)))
    return np.array([0, *plan.region_order], dtype=values.dtype) if plan.region_order else values


def _with_probabilities(
    slabs: Iterable[Slab], trace: GridTrace, decide: Callable[[Tensor], Tensor], probabilities: Probabilities
) -> Iterator[tuple[Place, Winners]]:
    """As ``decided``, but all logits are interpolated, and their probabilities handed out."""
    back = trace.native.to(trace.orientation).inverse
    activate = torch.sigmoid if decide is last_positive else partial(torch.softmax, dim=-1)
    for place, logits in interpolated(slabs, trace.plan_shape, trace.box.shape, trace.orders):
        values = activate(logits).permute(3, 0, 1, 2).cpu().numpy()
        probabilities(_native_place(place, trace, back), np.ascontiguousarray(back.apply(values)))
        yield place, decide(logits).cpu().numpy()


def _native_place(place: Place, trace: GridTrace, back: Reorientation) -> Place:
    """The place in the file's array of a place in the crop; ``back`` leads from the plan's axes to the file's."""
    slices = []
    for axis, flip, size in zip(back.axes, back.flips, trace.native_shape, strict=True):
        start, stop = (trace.box_start[axis] + n for n in (place[axis].start, place[axis].stop))
        slices.append(slice(size - stop, size - start) if flip else slice(start, stop))
    return slices[0], slices[1], slices[2]


def _require_channels(volume: Volume, plan: Plan) -> None:
    if len(volume.array) != len(plan.channels):
        where = ", ".join(map(str, volume.paths)) or "image"
        expected = f"{len(plan.channels)}: {', '.join(plan.channels)}"
        raise InputError(where, f"has {len(volume.array)} channels", expected)


def _require_fitting(previous: Mask | None, configuration: Configuration) -> None:
    if (previous is None) == (configuration.previous is None):
        return
    found, expected = ("is given", "none: it is no cascade")
    if previous is None:
        found, expected = "is missing", f"that of {configuration.previous}"
    raise InputError("mask of the earlier configuration", found, expected)


def _indices(mask: Mask, volume: Volume, labels: Labels) -> NDArray[np.uint8]:
    where = mask.paths[0] if mask.paths else "mask"
    if mask.array.shape != volume.geometry.shape:
        raise GeometryMismatch(where, f"has shape {mask.array.shape}", f"that of its image, {volume.geometry.shape}")
    return labels.to_indices(mask.array, where)


def _orthogonal(grid: Geometry) -> Geometry:
    """The grid itself, or the nearest orthogonal one where it is sheared."""
    return grid.orthogonalised() if grid.is_sheared else grid


def _sampled(array: NDArray[Any], source: Geometry, target: Geometry, order: int) -> Float32:
    """An image (C, I, J, K) on the target grid; beyond the source grid its outermost voxels are repeated.

    What is left of a neighbour whose weight is 0 but for rounding is 0: else it would count as body.
    """
    result = np.empty((len(array), *target.shape), dtype=np.float32)
    for channel, out in zip(array, result, strict=True):
        _sample(channel, source, target, order, "nearest", out)
        least = 1e-6 * max(-out.min(), out.max())
        for plane in out:
            plane[np.abs(plane) < least] = 0
    return result


def _sample(
    array: NDArray[Any],
    source: Geometry,
    target: Geometry,
    order: int,
    outside: str,
    result: NDArray[Any],
    fill: float = 0.0,
) -> None:
    """Fill ``result`` with values of (I, J, K) of the source grid at the voxels of the target grid.

    With an ``order`` of 0 or 1 scipy makes no array besides. ``outside`` is its mode, ``fill`` what a constant is.
    """
    matrix = np.linalg.inv(source.affine) @ target.affine
    ndimage.affine_transform(array, matrix[:3, :3], matrix[:3, 3], output=result, order=order, mode=outside, cval=fill)


def _matrix(affine: NDArray[np.float64]) -> Matrix:
    return tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine)


def _three(sizes: Iterable[int]) -> tuple[int, int, int]:
    first, second, third = (int(n) for n in sizes)
    return first, second, third
