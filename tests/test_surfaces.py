"""Surfaces: elements and their areas by hand, and distances against the plain search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medseg.surfaces import SurfaceDistances, surface_distances

Mask = NDArray[np.uint8]
COARSE = (0.7, 1.3, 3.0)

masks = st.binary(min_size=60, max_size=60).map(lambda b: (np.frombuffer(b, np.uint8) % 2).reshape(3, 4, 5))


def test_surface_of_one_voxel() -> None:
    voxel = np.ones((1, 1, 1), dtype=bool)
    areas = surface_distances(voxel, voxel, (1.0, 1.0, 1.0), flat=False).reference_areas
    assert areas == pytest.approx([math.sqrt(3) / 8] * 8)  # triangles through the middles of three edges


def test_surface_of_a_cuboid_counts_the_spacing() -> None:
    # 2x2x2 voxels of 1 x 2 x 3 mm. Of the 27 corners 1 is inside; 6 in the middle of a face carry a whole voxel face;
    # 12 on an edge carry half the diagonal plane; 8 at a corner carry a triangle.
    a, b, c = 1.0, 2.0, 3.0
    faces = 2 * (b * c + a * c + a * b)
    edges = 4 * (a * math.hypot(b, c) / 2 + b * math.hypot(a, c) / 2 + c * math.hypot(a, b) / 2)
    triangles = 8 * math.sqrt((b * c) ** 2 + (a * c) ** 2 + (a * b) ** 2) / 8
    cuboid = np.ones((2, 2, 2), dtype=bool)
    areas = surface_distances(cuboid, cuboid, (a, b, c), flat=False).reference_areas
    assert len(areas) == 26
    assert areas.sum() == pytest.approx(faces + edges + triangles)


def test_contour_of_a_square_in_a_picture() -> None:
    square = np.ones((2, 2, 1), dtype=bool)
    lengths = surface_distances(square, square, (1.0, 2.0, 9.0), flat=True).reference_areas
    # Eight points around: two sides of 1 mm, two of 2 mm (each half a pixel short of its corners), four cut corners.
    assert len(lengths) == 8
    assert lengths.sum() == pytest.approx(2 * 1 + 2 * 2 + 4 * math.hypot(1, 2) / 2)


def test_single_slice_of_another_axis_is_a_surface() -> None:
    sheet = np.ones((1, 2, 2), dtype=bool)
    assert len(surface_distances(sheet, sheet, (1.0, 1.0, 1.0), flat=False).reference_areas) == 18


def test_percentile_is_weighted_by_area() -> None:
    exact = np.array([0.0] * 19 + [5.0])
    apart = SurfaceDistances(exact, np.ones(20), np.zeros(1), np.ones(1))
    assert apart.percentile_mm(95.0) == 0.0  # 19 of 20 equal elements are 95 %
    assert apart.percentile_mm(96.0) == 5.0
    heavy = SurfaceDistances(np.zeros(1), np.ones(1), exact, np.array([1.0] * 19 + [2.0]))
    assert heavy.percentile_mm(95.0) == 5.0  # the larger direction counts


def test_mean_and_largest_distance_by_hand() -> None:
    # Elements of 1 and 3 mm^2 that are 0 and 2 mm away, and one of 4 mm^2 that is 1 mm away.
    apart = SurfaceDistances(np.array([0.0, 2.0]), np.array([1.0, 3.0]), np.array([1.0]), np.array([4.0]))
    assert apart.mean_mm == (0 * 1 + 2 * 3 + 1 * 4) / (1 + 3 + 4)
    assert apart.largest_mm == 2.0


@settings(deadline=None, max_examples=25)
@given(masks, masks)
def test_distances_equal_the_plain_search(a: Mask, b: Mask) -> None:
    """Every surface corner against every other one, the slow way."""
    assume(a.any() and b.any())
    corners = [np.array(list(_surface_corners(mask))) * COARSE for mask in (b, a)]
    distance = np.linalg.norm(corners[0][:, None] - corners[1][None], axis=-1)
    surfaces = surface_distances(b.astype(bool), a.astype(bool), COARSE, flat=False)
    assert np.sort(surfaces.from_reference_mm) == pytest.approx(np.sort(distance.min(axis=1)))
    assert np.sort(surfaces.from_prediction_mm) == pytest.approx(np.sort(distance.min(axis=0)))


def _surface_corners(mask: Mask) -> list[tuple[int, ...]]:
    padded = np.pad(mask, 1)
    return [
        corner
        for corner in itertools.product(*(range(n + 1) for n in mask.shape))
        if 0 < padded[tuple(slice(c, c + 2) for c in corner)].sum() < 8
    ]


@pytest.mark.parametrize("gap", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 5.0), (5.0, 0.5, 0.5)], ids=str)
def test_near_and_far_distances_are_those_of_one_voxel_from_another(
    gap: int, spacing: tuple[float, float, float]
) -> None:
    # Along an axis the near corners of two voxels are gap - 1 voxels apart, and the far ones gap from the near ones.
    for axis in range(3):
        reference, prediction = (np.zeros([gap + 1 if a == axis else 1 for a in range(3)], dtype=bool) for _ in "rp")
        reference[0, 0, 0], prediction[-1, -1, -1] = True, True
        found = surface_distances(reference, prediction, spacing, flat=False)
        expected = [(gap - 1) * spacing[axis]] * 4 + [gap * spacing[axis]] * 4
        assert np.sort(found.from_reference_mm) == pytest.approx(expected)
        assert np.sort(found.from_prediction_mm) == pytest.approx(expected)


def test_what_lies_beyond_the_neighbours_is_measured_along_the_shortest_way() -> None:
    # The corners at (1, y, z) are 4 mm from those at (5, y, z), and (1, 1, 1) is sqrt(27) mm from (4, 4, 4).
    reference, prediction = (np.zeros((6, 5, 5), dtype=bool) for _ in range(2))
    reference[0, 0, 0] = prediction[5, 0, 0] = prediction[4, 4, 4] = True
    found = surface_distances(reference, prediction, (1.0, 1.0, 1.0), flat=False)
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    others = np.concatenate([corners + np.array([5, 0, 0]), corners + np.array([4, 4, 4])])
    plain = np.linalg.norm(corners[:, None] - others[None], axis=-1).min(axis=1)
    assert np.sort(found.from_reference_mm) == pytest.approx(np.sort(plain))
