"""Views: axes run to the right, front and head, the slices of most error are found, and the window suits the image."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from medseg.errors import GeometryMismatch
from medseg.geometry import Box, Geometry
from medseg.io.picture import picture_grid
from medseg.report.view import View, Window, across, window_of
from medseg.volume import Labels, Mask, Volume

LABELS = Labels(values={"organ": 1, "lesion": 300})
ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("LR", "PA", "IS")) for letters in itertools.product(*axes)
]


def cube(n: int = 9) -> Geometry:
    """A grid whose axes run to the right, to the front and to the head."""
    return Geometry((n, n, n), np.eye(4))


def mask_of(grid: Geometry, *places: Any, value: int = 1) -> Mask:
    array = np.zeros(grid.shape, dtype=np.uint16)
    for place in places:
        array[place] = value
    return Mask(array, grid)


def worst(reference: Mask | None, prediction: Mask | None, labels: Labels = LABELS) -> tuple[int, int, int]:
    return View.of(None, reference, prediction).worst_place(labels)


# Axes


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["straight", "oblique and sheared"])
def test_axes_run_to_the_right_front_and_head_however_a_file_is_stored(orientation: str, kind: str) -> None:
    shape = (3, 4, 5)
    affine = np.diag([0.8, 1.1, 5.0, 1.0])
    affine[:3, 3] = -20.0, 30.0, 7.0
    if kind != "straight":
        affine[:3, :3] += [[0.0, -0.2, 0.9], [0.15, 0.0, -0.8], [0.1, 0.2, 0.0]]
    grid = Geometry(shape, affine)
    turn = grid.to(orientation)
    # every voxel holds a number of its own, and so tells where in the world it is
    numbers = np.arange(60, dtype=np.float32).reshape(1, *shape)
    view = View.of(Volume(turn.apply(numbers), grid.reoriented(turn)), None, None)
    assert view.image is not None
    assert np.array_equal(view.image, numbers)
    assert np.allclose(view.grid.affine, affine)
    for axis in range(3):
        along = np.moveaxis(view.image[0], axis, 0)
        voxels = [np.argwhere(numbers[0] == value)[0] for value in (along[0, 0, 0], along[-1, 0, 0])]
        first, last = (affine[:3, :3] @ voxel for voxel in voxels)
        assert (last - first)[axis] > 0  # to the right, to the front, to the head


def test_nothing_is_copied() -> None:
    grid = Geometry((3, 4, 5), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image, mask = Volume(np.zeros((2, 3, 4, 5)), grid), mask_of(grid)
    view = View.of(image, mask, None)
    assert view.image is not None
    assert view.image.shape == (1, 3, 4, 5)
    assert np.shares_memory(view.image, image.array)
    assert np.shares_memory(view.masks[0], mask.array)
    assert np.shares_memory(across(view.image, 1, 2), image.array)
    assert across(view.image, 1, 2).shape == (1, 3, 5)


def test_a_picture_has_its_colours_and_a_scan_of_one_slice_its_first_channel() -> None:
    array = np.zeros((3, 4, 5, 1), np.uint8)
    for tag in range(1, 9):
        view = View.of(Volume(array, picture_grid((4, 5, 1), tag)), None, None)
        assert view.is_picture
        assert view.image is not None
        assert len(view.image) == 3
    scan = View.of(Volume(array, Geometry((4, 5, 1), np.diag([1.0, 1.0, 5.0, 1.0]))), None, None)
    assert (scan.is_picture, scan.image is not None and len(scan.image)) == (False, 1)


def test_parts_on_different_grids_and_no_parts_are_refused() -> None:
    image = Volume(np.zeros((1, 9, 9, 9)), cube())
    with pytest.raises(GeometryMismatch, match=r"prediction: grid 8x8x8 .* the image's"):
        View.of(image, mask_of(cube()), mask_of(cube(8)))
    moved = Geometry((9, 9, 9), np.diag([1.0, 1.0, 1.2, 1.0]))
    with pytest.raises(GeometryMismatch, match=r"prediction: .* the reference's"):
        View.of(None, mask_of(cube()), mask_of(moved))
    with pytest.raises(ValueError, match="neither"):
        View.of(None, None, None)


# Places


def test_the_place_is_where_most_voxels_differ() -> None:
    reference = mask_of(cube(), np.s_[2:7, 2:7, 2:7])
    prediction = mask_of(cube(), np.s_[2:7, 2:7, 2:7], np.s_[8, 1:4, 0])
    prediction.array[3, 3, 3] = 300  # another label is a difference too
    # i: slice 8 has three, slice 3 one; j: slice 3 has two; k: slice 0 has three
    assert worst(reference, prediction) == (8, 3, 0)


@pytest.mark.parametrize("order", ["C", "F"])
def test_of_equal_slices_the_middle_one_is_taken(order: Any) -> None:
    grid = cube()
    empty = Mask(np.zeros(grid.shape, np.int32, order=order), grid)
    marked = Mask(np.asarray(mask_of(grid, np.s_[2:7, 1:4, 0:8]).array, np.int32, order=order), grid)
    assert worst(empty, marked) == (4, 2, 4)
    assert worst(marked, marked) == (4, 2, 4)
    assert worst(None, marked) == worst(marked, None) == (4, 2, 4)


@pytest.mark.parametrize("orientation", ORIENTATIONS[::5])
def test_the_place_does_not_depend_on_how_a_file_is_stored(orientation: str) -> None:
    mask = mask_of(Geometry((8, 7, 6), np.eye(4)), np.s_[2:6, 1:3, 0:6])
    turn = mask.geometry.to(orientation)
    stored = Mask(turn.apply(mask.array), mask.geometry.reoriented(turn))
    assert worst(stored, None) == worst(mask, None) == (4, 2, 3)
    assert worst(replace(stored, array=stored.array * 0), None) == (4, 3, 3)


def test_what_is_ignored_or_has_no_name_is_no_error() -> None:
    labels = Labels(values={"organ": 1}, ignore=255)
    reference = mask_of(cube(), np.s_[0:4, 0:4, 0:4])
    prediction = replace(reference, array=reference.array.copy())
    reference.array[0] = 255
    prediction.array[7:] = 99
    prediction.array[5, 5, 5] = 1
    assert worst(reference, prediction, labels) == (5, 5, 5)
    assert View.of(None, reference, prediction).marked_box(labels) == Box((0, 0, 0), (6, 6, 6))


def test_where_nobody_labelled_anything_the_place_is_in_the_prediction() -> None:
    labels = Labels(values={"organ": 1}, ignore=255)
    nothing, prediction = mask_of(cube(), np.s_[:], value=255), mask_of(cube(), np.s_[0:3, 0:3, 6:9])
    assert worst(nothing, prediction, labels) == (1, 1, 7)


def test_where_nothing_is_marked_the_place_is_the_middle() -> None:
    image = Volume(np.zeros((1, 9, 9, 9)), cube())
    nothing = [(None, mask_of(cube())), (mask_of(cube(), np.s_[0, 0, 0], value=7), None), (None, None)]
    for masks in nothing:
        view = View.of(image, *masks)
        assert view.worst_place(LABELS) == (4, 4, 4)
        assert view.marked_box(LABELS) is None


# Windows


def test_a_window_leaves_out_the_extremes_and_what_is_no_number() -> None:
    values = np.array([*range(1001), np.nan, np.inf, -np.inf])
    window = window_of(values)
    assert window == pytest.approx((5.0, 995.0))
    shades = window.shades(np.array([[5.0, 500.0, 995.0], [np.nan, np.inf, -np.inf]]))
    assert shades == pytest.approx(np.array([[0.0, 0.5, 1.0], [0.0, 1.0, 0.0]]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([np.nan], (0.0, 1.0)),
        ([], (0.0, 1.0)),
        ([-7.0] * 5, (-7.0, 0.0)),
        ([1e30] * 5, (1e30, 2e30)),
        ([0.0] * 999 + [50.0], (0.0, 50.0)),
    ],
)
def test_a_window_is_never_empty(values: list[float], expected: tuple[float, float]) -> None:
    assert window_of(np.array(values)) == expected


def test_a_ct_has_the_window_of_what_the_first_mask_marks() -> None:
    image = np.full((1, 9, 9, 9), -1000, np.int16)
    image[0, 3:6, 3:6, 3:6] = 60
    view = View.of(Volume(image, cube()), None, None)
    soft, air = image[0] == 60, image[0] == -1000
    nothing = np.zeros_like(air)
    assert view.window((4, 4, 4), image, [soft, air]) == Window(60 - 220, 60 + 150)  # fat is not black
    assert view.window((4, 4, 4), image, [nothing, air]) == Window(-1000 - 150, -1000 + 150)
    assert view.window((4, 4, 4), image, []) == Window(-160, 240)
    # air anywhere in the slices makes it a CT, even where none is shown
    assert view.window((4, 4, 4), image[:, 3:6, 3:6, 3:6], []) == Window(-160, 240)
    endless = np.where(image == -1000, -np.inf, image)
    assert View.of(Volume(endless, cube()), None, None).window((4, 4, 4), endless, []) == Window(60, 120)
