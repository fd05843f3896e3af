"""From a mask to single objects and back: cells that touch are parted, and boundaries are drawn for a network to learn.

Instance ids are integers (I, J, K): 0 background, one positive number an object. A picture has K = 1. Distances are in
mm along the voxel axes, so that thick slices count as thick.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medseg.errors import GeometryMismatch, InputError

Ids = NDArray[np.int32]
Spacing = tuple[float, float, float]

ISOTROPIC: Spacing = (1.0, 1.0, 1.0)
NECK = 0.9
"""Without a boundary class, two parts of a mask are two objects where the neck between them is narrower than this part
of the thickness of the thinner one. Two equal discs of radius r are parted where their centres are more than
2 x sqrt(1 - 0.9^2) = 0.87 r apart.

Chosen on references alone, united and parted again: the 5638 nuclei of 128 images of the Data Science Bowl 2018, which
fold 0 of the 160 images at hand trains on. Mean F1 at IoU 0.5 is 0.944 at 0.6, 0.959 at 0.8, 0.966 at 0.9, 0.961 at
0.92 and 0.942 at 0.96."""
NECK_INSIDE = 0.7
"""As ``NECK``, for insides without their boundary: where the boundary of two cells was not found, their neck may show.

Chosen on the same references with the boundaries that ``boundary_classes`` draws, and with a tenth, three tenths and a
half of the boundary taken for inside, in patches. F1 is 0.995, 0.993, 0.988 and 0.981; without this rule 0.998, 0.973,
0.941 and 0.921. On average 0.6 to 0.75 are equal to 0.001. No prediction of a network was looked at."""
SMOOTHING_VOXELS = 0.5
"""Standard deviation with which distances are smoothed before necks are looked for: an outline is known to half a
voxel."""
SPECK = 0.01
"""A piece smaller than this part of the typical object is no object. Of the same 5638 nuclei none is so small, those
that the image's border cuts included: the smallest is 1.1 % of its image's typical one, and at 0.02 sixteen would be
lost. F1 with the boundaries drawn is 0.9946, and 0.9936 without this rule."""

SLAB_VOXELS = 2**22
"""Voxels that ``keep_largest`` labels at a time."""

_ALL_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)


def separate(
    mask: NDArray[Any], inside: int | Sequence[int], boundary: int | None = None, spacing_mm: Spacing = ISOTROPIC
) -> Ids:
    """Part the objects of a mask.

    Without a boundary class, every connected piece (across corners too) is cut at its necks (``NECK``): the watershed
    of the distance from the background, from all its peaks that a neck parts from higher ground. It knows no size:
    large and small objects are cut by one rule. With a boundary class, the inside is cut so (``NECK_INSIDE``), but
    mostly the boundary has done it; a piece of boundary alone is an object too, and the rest of the boundary goes to
    the nearest object.

    A piece below ``SPECK`` of the typical size is a speck: its voxels go to the objects that they touch, or else to the
    background. The typical object is the one to which the median voxel belongs.

    Args:
        mask: label values (I, J, K).
        inside: value of the inside of objects, or all values where several kinds of object have one each.
        boundary: value of their boundary; None where the mask has none.
        spacing_mm: distance of voxel centres along each axis.

    Returns:
        Ids 1..n; all 0 where the mask marks nothing.

    Raises:
        InputError: scikit-image is not installed.
    """
    core = np.isin(mask, inside)
    marked = core if boundary is None else core | (mask == boundary)
    if not marked.any():
        return np.zeros(mask.shape, dtype=np.int32)
    if boundary is None:
        ground, markers = _hills(marked, spacing_mm, NECK)
    else:
        ground, markers = _from_cores(core, marked, spacing_mm)
    watershed = load_skimage().segmentation.watershed
    ids = watershed(ground, markers, _ALL_NEIGHBOURS, mask=marked)
    sizes = np.bincount(ids.ravel())
    sizes[0] = 0
    large = sizes >= SPECK * _typical(sizes)
    if not large[1:].all():
        ids = watershed(ground, np.where(large[markers], markers, 0), _ALL_NEIGHBOURS, mask=marked)
    return np.asarray(np.where(ids > 0, (np.cumsum(large) * large)[ids], 0), dtype=np.int32)


def boundary_classes(instances: NDArray[Any], width_mm: float = 1.0, spacing_mm: Spacing = ISOTROPIC) -> NDArray[Any]:
    """What a network with a boundary class learns: 0 background, 1 inside of an object, 2 its boundary.

    The boundary is the voxels of an object whose centre lies within ``width_mm`` of a voxel that is not of the object.
    So two objects that touch have a boundary of both between them. In a picture, with a width of a pixel or more, their
    insides are then apart; in a volume they may still touch in a corner, or along an axis whose spacing is more than
    ``width_mm``. An object without an inside keeps its innermost voxel, wherever that lies. The border of the image is
    none: an object that it cuts goes on.

    Args:
        instances: ids (I, J, K).
        width_mm: of the boundary on the object's side.
        spacing_mm: distance of voxel centres along each axis.

    Returns:
        uint8 (I, J, K).
    """
    classes = np.zeros(instances.shape, dtype=np.uint8)
    reach = [int(np.ceil(width_mm / spacing)) + 1 for spacing in spacing_mm]
    for number, box in enumerate(ndimage.find_objects(instances), start=1):
        if box is None:
            continue
        wide = tuple(slice(max(s.start - n, 0), s.stop + n) for s, n in zip(box, reach, strict=True))
        own = instances[wide] == number
        depth = ndimage.distance_transform_edt(own, sampling=spacing_mm) if not own.all() else own * np.inf
        depth_inside = depth > width_mm
        if not depth_inside.any():
            depth_inside.flat[int(depth.argmax())] = True
        classes[wide][own] = np.where(depth_inside[own], 1, 2)
    return classes


@dataclass(frozen=True)
class Joined:
    """Masks of single objects as one array of ids.

    Attributes:
        ids: (I, J, K); an object's id is the place of its mask, from 1.
        overlapping: voxels that several masks claim.
        empty: masks without a voxel.
        hidden: masks of which no voxel is left, as of one that is there twice.
    """

    ids: Ids
    overlapping: int
    empty: int
    hidden: int


def join(masks: Iterable[NDArray[Any]], shape: tuple[int, int, int]) -> Joined:
    """Join masks of one object each; one is held at a time.

    A voxel that several masks claim goes to the smallest of them, of equal ones to the first: the smaller object loses
    a larger part of itself, and would vanish where it lies within another one.

    Args:
        masks: (I, J, K) each, not 0 where the object is.
        shape: that all must have.

    Raises:
        GeometryMismatch: a mask has another shape.
    """
    ids, claims = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    smallest = np.full(shape, np.inf)
    sizes = [0]
    for number, mask in enumerate(masks, start=1):
        if mask.shape != shape:
            raise GeometryMismatch(f"mask {number}", f"has shape {mask.shape}", f"{shape}")
        own = mask != 0
        sizes.append(int(np.count_nonzero(own)))
        claims += own
        won = own & (smallest > sizes[-1])
        ids[won], smallest[won] = number, sizes[-1]
    there = np.bincount(ids.ravel(), minlength=len(sizes)) > 0
    hidden = sum(size > 0 and not left for size, left in zip(sizes, there, strict=True))
    return Joined(ids, int(np.count_nonzero(claims > 1)), sizes[1:].count(0), hidden)


def keep_largest(array: NDArray[Any], groups: Iterable[Sequence[int]]) -> NDArray[Any]:
    """Of the voxels of each group of values, keep the largest connected piece (across corners too).

    The groups are done in order; a later one sees what an earlier one left. Of several pieces of the largest size all
    are kept. As nnU-Net's ``remove_all_but_largest_component_from_segmentation``. Memory beside the result: 16
    bytes a voxel of ``SLAB_VOXELS``.

    Args:
        array: values (I, J, K).
        groups: values that count as one object.

    Returns:
        A copy in which the removed voxels are 0; an equal one where there are no groups or none of their values.
    """
    result = array.copy()
    for group in groups:
        box = _box_of(result, group)
        if box is not None:
            _keep_largest(result[box], group)
    return result


def piece_sizes(array: NDArray[Any], group: Sequence[int]) -> NDArray[np.int64]:
    """Voxels of each connected piece (across corners too) of the voxels with a value of the group, the largest first.

    Memory: 16 bytes a voxel of ``SLAB_VOXELS``.

    Args:
        array: values (I, J, K).
        group: values that count as one object.

    Returns:
        One number a piece; none where no voxel has a value of the group.
    """
    box = _box_of(array, group)
    if box is None:
        return np.zeros(0, dtype=np.int64)
    sizes, whole = _wholes(array[box], group)
    totals = np.bincount(whole, weights=sizes).astype(np.int64)
    return np.sort(totals[totals > 0])[::-1]


def load_skimage() -> Any:
    """The package ``skimage``, which is an extra: only those install it who part cells.

    Raises:
        InputError: it is not installed; with how to.
    """
    try:
        import skimage  # its parts are loaded when first asked for
    except ImportError:
        remedy = "pip install 'medseg[cells]'"
        raise InputError("scikit-image", "is not installed", "it, to part cells", remedy) from None
    return skimage


def _from_cores(
    core: NDArray[np.bool_], marked: NDArray[np.bool_], spacing_mm: Spacing
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Distance from the insides, and every inside with the boundary that is nearest to it.

    A piece of boundary without inside is one too. What is nearest to an inside across background is left to the flood.
    """
    ground, peaks = _hills(core, spacing_mm, NECK_INSIDE)
    cores = load_skimage().segmentation.watershed(ground, peaks, _ALL_NEIGHBOURS, mask=core)
    pieces, _ = ndimage.label(marked, _ALL_NEIGHBOURS)
    alone = np.ones(pieces.max() + 1, dtype=bool)
    alone[pieces[core]] = alone[0] = False
    lonely, _ = ndimage.label(alone[pieces], _ALL_NEIGHBOURS)
    markers = np.where(lonely > 0, lonely + cores.max(), cores)
    distance, nearest = ndimage.distance_transform_edt(markers == 0, sampling=spacing_mm, return_indices=True)
    regions = np.where(marked, markers[tuple(nearest)], 0)
    parts = load_skimage().measure.label(regions)
    return distance, np.where(np.isin(parts, np.unique(parts[markers > 0])), regions, 0)


def _hills(marked: NDArray[np.bool_], spacing_mm: Spacing, neck: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """The negative distance from the background, and its basins that a neck parts from deeper ones.

    A basin is kept where every way to a deeper one passes a height below ``neck`` times its own: the regional maxima of
    the reconstruction of ``neck`` x height under the height (Vincent 1993), h-maxima with an h in proportion to the
    height. Around the image is background, but not before and behind a picture.
    """
    margin = [(0, 0) if n == 1 < marked.size else (1, 1) for n in marked.shape]
    within = tuple(slice(before, before + n) for (before, _), n in zip(margin, marked.shape, strict=True))
    padded = np.pad(marked, margin)
    height = ndimage.distance_transform_edt(padded, sampling=spacing_mm)
    height = padded * ndimage.gaussian_filter(height, [SMOOTHING_VOXELS * (after > 0) for _, after in margin])
    morphology = load_skimage().morphology
    peaks = morphology.local_maxima(morphology.reconstruction(neck * height, height)) & padded
    markers, _ = ndimage.label(peaks, _ALL_NEIGHBOURS)
    return -height[within], markers[within]


def _typical(sizes: NDArray[np.int64]) -> float:
    """Size of the object to which the median voxel belongs: specks, however many, do not change it."""
    order = np.sort(sizes)
    return float(order[np.searchsorted(np.cumsum(order), order.sum() / 2)])


def _box_of(array: NDArray[Any], group: Sequence[int]) -> tuple[slice, ...] | None:
    """The box of the voxels with a value of the group; None where there are none."""
    occupied = [np.zeros(n, dtype=bool) for n in array.shape]
    for start, stop in _slabs(array.shape):
        mask = np.isin(array[start:stop], group)
        occupied[0][start:stop] = mask.any(axis=(1, 2))
        occupied[1] |= mask.any(axis=(0, 2))
        occupied[2] |= mask.any(axis=(0, 1))
    if not occupied[0].any():
        return None
    places = [np.flatnonzero(along) for along in occupied]
    return tuple(slice(int(place[0]), int(place[-1]) + 1) for place in places)


def _keep_largest(array: NDArray[Any], group: Sequence[int]) -> None:
    """Remove all but the largest piece of a group, in place."""
    sizes, whole = _wholes(array, group)
    totals = np.bincount(whole, weights=sizes)
    keep = (totals == totals.max())[whole]
    keep[0] = True  # what is not of the group
    known = 0
    for place, labels, count in _labelled_slabs(array, group):
        numbers = np.where(labels[1:] > 0, labels[1:] + known, 0)
        array[place][~keep[numbers]] = 0
        known += count


def _wholes(array: NDArray[Any], group: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Voxels of every piece of every slab, and the number of the piece of the whole array that it is a part of."""
    sizes, meetings = _pieces(array, group)
    links = coo_array((np.ones(len(meetings)), meetings.T), shape=(len(sizes), len(sizes)))
    _, whole = connected_components(links, directed=False)
    return sizes, whole


def _pieces(array: NDArray[Any], group: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Voxels of every piece of every slab, numbered through from 1, and pairs of pieces (n, 2) that are one."""
    sizes, meetings = [np.zeros(1, dtype=np.int64)], []
    last = np.zeros(array.shape[1:], dtype=np.int64)
    known = 0
    for _, labels, count in _labelled_slabs(array, group):
        met = last > 0
        meetings.append(np.unique(np.stack([last[met], labels[0][met] + known], axis=1), axis=0))
        sizes.append(np.bincount(labels[1:].ravel(), minlength=count + 1)[1:])
        last = np.where(labels[-1] > 0, labels[-1] + known, 0)
        known += count
    return np.concatenate(sizes), np.concatenate(meetings)


def _labelled_slabs(array: NDArray[Any], group: Sequence[int]) -> Iterator[tuple[slice, NDArray[np.int32], int]]:
    """Each slab's place, its connected pieces with the plane before it as first plane, and their number.

    That plane is as it was when its slab was asked for, whatever has been done to the array since.
    """
    before = np.zeros((1, *array.shape[1:]), dtype=bool)
    for start, stop in _slabs(array.shape):
        mask = np.concatenate([before, np.isin(array[start:stop], group)])
        labels, count = ndimage.label(mask, _ALL_NEIGHBOURS)
        yield slice(start, stop), labels, int(count)
        before = mask[-1:].copy()


def _slabs(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and stop along the first axis, of ``SLAB_VOXELS`` each."""
    planes = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2]))
    return ((start, min(start + planes, shape[0])) for start in range(0, shape[0], planes))
