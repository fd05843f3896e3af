"""From a native image to the plan grid, and from logits back to a native mask. Each undoes the other's geometry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import GeometryMismatch
from medseg.geometry import Box, Geometry
from medseg.plan import Configuration, Normalisation, Plan
from medseg.records import Record
from medseg.resample import Orders, axis_orders, resample_image, resample_labels, slab_indices
from medseg.volume import Labels, Mask, Volume

Float32 = NDArray[np.float32]
Matrix = tuple[tuple[float, float, float, float], ...]


class GridTrace(Record):
    """How a prepared array lies in its native image: made by ``prepare``, consumed by ``restore``.

    Attributes:
        native_shape, native_affine: the grid of the file.
        orientation: letters of the plan order, for example "SAR".
        box_start, box_stop: the crop, on the grid after reorientation.
        plan_shape: shape of the prepared array.
        orders: spline orders of the way back.
    """

    native_shape: tuple[int, int, int]
    native_affine: Matrix
    orientation: str
    box_start: tuple[int, int, int]
    box_stop: tuple[int, int, int]
    plan_shape: tuple[int, int, int]
    orders: Orders

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
        image: normalised float32 (C, *plan_shape).
        indices: label indices uint8 (*plan_shape), or None without a mask.
        trace: the way back.
    """

    image: Float32
    indices: NDArray[np.uint8] | None
    trace: GridTrace


def prepare(volume: Volume, plan: Plan, configuration: Configuration, mask: Mask | None = None) -> Prepared:
    """Reorient, crop, normalise and resample an image (and its mask) to the plan grid.

    An image whose voxel axes are not orthogonal is resampled to the nearest orthogonal grid of the same spacing, after
    it is reoriented: so all orientations of one image give one array. The crop is the box of voxels that are not 0 in
    some channel; the whole image where there is none.

    Raises:
        InputError: the mask has a value without a name.
        GeometryMismatch: the mask has another shape than the image.
    """
    letters = "".join(plan.orientation[axis] for axis in plan.axes)
    turn = volume.geometry.to(letters)
    array, oriented = turn.apply(volume.array), volume.geometry.reoriented(turn)
    values = None if mask is None else turn.apply(_indices(mask, volume, plan.labels))
    grid = _straight(oriented)
    if grid is not oriented:
        array = np.stack([_sample(channel, oriented, grid, plan.resampling.image, "nearest") for channel in array])
        values = None if values is None else _sample(values, oriented, grid, 0, "constant")
    box = Box.around((array != 0).any(axis=0))
    i, j, k = box.slices
    array = normalise(array[:, i, j, k], plan.normalisation)
    cropped = grid.cropped(box)
    shape, spacing = plan_grid(cropped, configuration)
    rule = plan.resampling
    image_orders = axis_orders(cropped.spacing, spacing, rule, rule.image, rule.image_along_low)
    label_orders = axis_orders(cropped.spacing, spacing, rule, rule.label, 0)
    logit_orders = axis_orders(spacing, cropped.spacing, rule, rule.logits, 0)
    indices = None
    if values is not None:
        indices = np.ascontiguousarray(resample_labels(values[box.slices], shape, label_orders))
    trace = GridTrace(
        native_shape=volume.geometry.shape,
        native_affine=_matrix(volume.geometry.affine),
        orientation=letters,
        box_start=_three(box.start),
        box_stop=_three(box.stop),
        plan_shape=shape,
        orders=logit_orders,
    )
    return Prepared(resample_image(array, shape, image_orders), indices, trace)


def restore(slabs: Iterable[tuple[int, int, Float32]], trace: GridTrace, labels: Labels) -> NDArray[Any]:
    """The native mask of logits on the plan grid.

    Args:
        slabs: ``(start, stop, logits (C, stop - start, H, W))``, in order along the first plan axis.
        trace: from ``prepare``.
        labels: turn channel indices into label values.

    Returns:
        Label values (I, J, K) on the native grid; background outside the crop.
    """
    turn = trace.native.to(trace.orientation)
    oriented = trace.native.reoriented(turn)
    grid = _straight(oriented)
    indices = np.zeros(grid.shape, dtype=np.uint8)
    inside = indices[trace.box.slices]
    for start, stop, winners in slab_indices(slabs, trace.plan_shape[0], trace.box.shape, trace.orders):
        inside[start:stop] = winners
    if grid is not oriented:
        indices = _sample(indices, grid, oriented, 0, "constant")
    return np.ascontiguousarray(labels.to_values(turn.inverse.apply(indices)))


def normalise(array: NDArray[Any], normalisation: tuple[Normalisation, ...]) -> Float32:
    """Bring each channel of (C, I, J, K) to the plan's scale, float32. A constant channel becomes 0 under z-score."""
    nonzero = (array != 0).any(axis=0)
    channels = [_normalise_channel(c, n, nonzero) for c, n in zip(array, normalisation, strict=True)]
    return np.stack(channels)


def plan_grid(cropped: Geometry, configuration: Configuration) -> tuple[tuple[int, int, int], tuple[float, ...]]:
    """Shape and spacing (mm) that a cropped grid in plan order takes on the plan grid; at least one voxel an axis."""
    pairs = list(zip(cropped.spacing, configuration.spacing_mm, strict=True))
    spacing = tuple(own if target is None else target for own, target in pairs)
    sizes = [max(1, round(own / new * n)) for own, new, n in zip(cropped.spacing, spacing, cropped.shape, strict=True)]
    return _three(sizes), spacing


def _normalise_channel(channel: NDArray[Any], rule: Normalisation, nonzero: NDArray[np.bool_]) -> Float32:
    values = np.asarray(channel, dtype=np.float32)
    if rule.scheme == "ct":
        return (np.clip(values, rule.lower, rule.upper) - np.float32(rule.mean)) / np.float32(max(rule.std, 1e-8))
    if rule.scheme == "zscore":
        chosen = values[nonzero] if rule.nonzero_only and nonzero.any() else values
        # float64 sums: float32 ones lose the mean of large volumes
        mean, std = float(chosen.mean(dtype=np.float64)), float(chosen.std(dtype=np.float64))
        scaled = (values - np.float32(mean)) / np.float32(max(std, 1e-8))
        return np.where(nonzero, scaled, np.float32(0)) if rule.nonzero_only else scaled
    if rule.scheme == "minmax":
        low, high = values.min(), values.max()
        scaled = (values - low) / np.maximum(high - low, np.float32(1e-8))
        return np.asarray(scaled, dtype=np.float32)
    return values / np.float32(255) if rule.scheme == "rgb" else values


def _indices(mask: Mask, volume: Volume, labels: Labels) -> NDArray[np.uint8]:
    where = mask.paths[0] if mask.paths else "mask"
    if mask.array.shape != volume.geometry.shape:
        raise GeometryMismatch(where, f"has shape {mask.array.shape}", f"that of its image, {volume.geometry.shape}")
    return labels.to_indices(mask.array, where)


def _straight(grid: Geometry) -> Geometry:
    """The grid itself, or the nearest orthogonal one where it is sheared."""
    return grid.orthogonalised() if grid.is_sheared else grid


def _sample(array: NDArray[Any], source: Geometry, target: Geometry, order: int, outside: str) -> NDArray[Any]:
    """Values of (I, J, K) of the source grid at the voxels of the target grid; ``outside`` is scipy's mode."""
    matrix = np.linalg.inv(source.affine) @ target.affine
    return np.asarray(
        ndimage.affine_transform(
            array, matrix[:3, :3], matrix[:3, 3], output_shape=target.shape, order=order, mode=outside
        )
    )


def _matrix(affine: NDArray[np.float64]) -> Matrix:
    return tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine)


def _three(sizes: Iterable[int]) -> tuple[int, int, int]:
    first, second, third = (int(n) for n in sizes)
    return first, second, third
