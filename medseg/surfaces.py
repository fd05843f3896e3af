"""Surfaces of masks: their elements, and how far each is from another surface.

Surfaces are those of google-deepmind/surface-distance (Nikolov et al., arXiv:1809.04430): a surface element lies where
the eight voxels around a voxel corner are not all alike, has the area (mm^2) of the marching-cubes surface there, and
sits on that corner. A picture (K = 1) has a contour instead, of elements with a length in mm. The image is taken to be
surrounded by background, so that a structure cut by the image border has a surface there.

Distances run along the voxel axes with their spacing: on a sheared grid they are approximate.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from medseg.geometry import Float

Spacing = tuple[float, float, float]

_TOLERANCE_SLACK = 1e-6
"""Relative slack of tolerance comparisons: a spacing of 0.8 mm kept in 32 bits must not exceed a tolerance of 0.8."""

_SURFELS = {
    (0,): [(1, 1, 1)],
    (0, 1): [(4, 4, 0)],
    (1, 2): [(2, 2, 2)],
    (3, 4): [(2, 2, 2)],
    (0, 1, 2): [(3, 3, 3), (4, 0, 0)],
    (1, 2, 4): [(3, 3, 3)],
    (0, 3, 4): [(0, 4, 4), (1, 1, 1)],
    (0, 1, 2, 3): [(8, 0, 0)],
    (0, 1, 2, 4): [(6, 6, 6)],
    (0, 1, 3, 4): [(4, 4, 4), (0, 2, 2), (2, 0, 2)],
    (1, 2, 3, 4): [(4, 4, 4), (4, 0, 0)],
    (2, 3, 4, 5): [(8, 8, 0)],
    (0, 3, 5, 6): [(4, 4, 4)],
}
"""Marching-cubes surface through a cube of eight voxel centres, by the corners inside (corner 4 i + 2 j + k).

The area vectors of its flat pieces, in eighths of a cube's face, up to signs. All other codes follow by turning,
mirroring and exchanging inside and outside. Figures: the lookup table of google-deepmind/surface-distance, which has
these symmetries.
"""


@dataclass(frozen=True)
class SurfaceDistances:
    """Every surface element of two masks: how far it is from the other surface (mm), and how large (mm^2; mm in 2D).

    Measured once; the measures are short readers of it.
    """

    from_reference_mm: Float
    reference_areas: Float
    from_prediction_mm: Float
    prediction_areas: Float

    def nsd(self, tolerance_mm: float) -> float:
        """Normalised surface Dice: the part of both surfaces within the tolerance of the other one."""
        limit = tolerance_mm * (1.0 + _TOLERANCE_SLACK)
        near = self.reference_areas[self.from_reference_mm <= limit].sum()
        near += self.prediction_areas[self.from_prediction_mm <= limit].sum()
        return float(near / (self.reference_areas.sum() + self.prediction_areas.sum()))

    @property
    def mean_mm(self) -> float:
        """Mean distance of the elements of both surfaces, weighted by area."""
        moved = self.from_reference_mm @ self.reference_areas + self.from_prediction_mm @ self.prediction_areas
        return float(moved / (self.reference_areas.sum() + self.prediction_areas.sum()))

    def percentile_mm(self, percent: float) -> float:
        """The larger of the two directed percentiles of distance, weighted by area."""
        return max(
            _weighted_percentile(self.from_reference_mm, self.reference_areas, percent),
            _weighted_percentile(self.from_prediction_mm, self.prediction_areas, percent),
        )

    @property
    def largest_mm(self) -> float:
        """The largest distance in either direction (Hausdorff)."""
        return float(max(self.from_reference_mm.max(), self.from_prediction_mm.max()))


def surface_distances(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing_mm: Spacing, flat: bool
) -> SurfaceDistances:
    """Measure the distances between the surfaces of two masks (I, J, K), neither of them empty.

    Args:
        reference: cut anywhere outside the structure; background is assumed around it.
        prediction: the same shape.
        spacing_mm: distance of voxel centres along each axis.
        flat: take the single slice as a picture, with a contour rather than a surface.
    """
    spacing = (*spacing_mm[:2], 1.0 if flat else spacing_mm[2])
    codes = [_neighbour_codes(mask, flat) for mask in (reference, prediction)]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    table = _surfel_areas(np.array(spacing))
    areas = [table[code[surface]] for code, surface in zip(codes, surfaces, strict=True)]
    shells = _shells(spacing)
    margin = tuple(int(n) for n in np.max([np.abs(offsets).max(axis=0) for _, offsets in shells], axis=0))
    r, p = (_surrounded(surface, margin) for surface in surfaces)
    return SurfaceDistances(_distances(r, p, spacing), areas[0], _distances(p, r, spacing), areas[1])


def _neighbour_codes(mask: NDArray[np.bool_], flat: bool) -> NDArray[np.uint8]:
    """For each voxel corner the bits of the eight voxels around it: bit 4 i + 2 j + k.

    A picture is repeated along K instead of surrounded: its contour becomes a wall one unit high, whose area is the
    contour's length.
    """
    padded = _surrounded(mask.view(np.uint8), (1, 1, 0 if flat else 1))
    padded = padded.repeat(2, axis=2) if flat else padded
    code = padded[:, :, :-1] | padded[:, :, 1:] << 1
    code = code[:, :-1] | code[:, 1:] << 2
    return np.asarray(code[:-1] | code[1:] << 4)


def _surrounded(array: NDArray[Any], margin: tuple[int, ...]) -> NDArray[Any]:
    """An array with so many zeros before and behind along each axis; as ``np.pad``, a third of the time if small."""
    result = np.zeros([n + 2 * m for n, m in zip(array.shape, margin, strict=True)], dtype=array.dtype)
    result[tuple(slice(m, m + n) for n, m in zip(array.shape, margin, strict=True))] = array
    return result


def _distances(surface: NDArray[np.bool_], other: NDArray[np.bool_], spacing_mm: Spacing) -> Float:
    """Distance (mm) of each true voxel of ``surface`` from the nearest true voxel of ``other``.

    Both are surrounded by as much background as ``_shells`` reach. Most surfaces that are compared lie close together:
    the neighbours are looked at from the nearest on, and only what is further away than all of them is searched for in
    a tree.
    """
    flat = other.ravel()
    strides = np.array(other.strides)
    places = np.flatnonzero(surface)
    result = np.zeros(len(places))
    left = np.flatnonzero(~flat[places])
    for distance_mm, offsets in _shells(spacing_mm):
        if not len(left):
            return result
        looked_at = places[left]
        near = flat[looked_at + offsets[0] @ strides]
        for step in (offsets[1:] @ strides).tolist():
            near |= flat[looked_at + step]
        result[left[near]] = distance_mm
        left = left[~near]
    if len(left):
        tree = cKDTree(np.argwhere(other) * spacing_mm, balanced_tree=False, compact_nodes=False)  # best on grid points
        points = np.stack(np.unravel_index(places[left], surface.shape), axis=1)
        result[left] = tree.query(points * spacing_mm)[0]
    return result


@lru_cache(maxsize=64)
def _shells(spacing_mm: Spacing) -> list[tuple[float, NDArray[np.int64]]]:
    """Offsets to the voxels around one, by distance (mm), nearest first: within three of the smallest spacing."""
    furthest = 3.0 * min(spacing_mm)
    reach = [int(furthest / length) for length in spacing_mm]
    offsets = np.array(list(itertools.product(*(range(-n, n + 1) for n in reach))))
    distances = np.linalg.norm(offsets * np.array(spacing_mm), axis=1)
    kept = (distances > 0) & (distances <= furthest)
    found, group = np.unique(distances[kept].round(9), return_inverse=True)
    shells = [(distances[kept][group == n], offsets[kept][group == n]) for n in range(len(found))]
    return [(float(own.min()), places) for own, places in shells]


def _weighted_percentile(distances_mm: Float, areas: Float, percent: float) -> float:
    """The smallest distance within which ``percent`` of the area lies."""
    wanted = areas.sum() * (percent / 100.0) * (1.0 - 1e-9)  # rounding must not skip an element
    apart = np.flatnonzero(distances_mm)  # only these have to be sorted
    alike = areas.sum() - areas[apart].sum()
    if alike >= wanted or not len(apart):
        return 0.0
    order = apart[np.argsort(distances_mm[apart])]
    place = np.searchsorted(alike + np.cumsum(areas[order]), wanted)
    return float(distances_mm[order[min(int(place), len(order) - 1)]])


def _surfel_areas(spacing: Float) -> Float:
    """Area of the surface element of each of the 256 neighbour codes, for a spacing in mm."""
    faces = spacing.prod() / spacing
    return np.asarray(np.linalg.norm(_area_vectors() * faces, axis=-1).sum(axis=-1))


@cache
def _area_vectors() -> Float:
    """Area vectors (256 codes, 3 pieces, 3 axes) in faces of a cube, up to signs."""
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    weights = np.array([4, 2, 1])
    table = np.zeros((256, 3, 3))
    for inside, vectors in _SURFELS.items():
        for axes in itertools.permutations(range(3)):
            for flips in corners:
                turned = (corners[list(inside)] ^ flips)[:, axes] @ weights
                code = int((1 << turned).sum())
                for same in (code, 255 - code):
                    table[same, : len(vectors)] = np.array(vectors)[:, axes] / 8.0
    return table
