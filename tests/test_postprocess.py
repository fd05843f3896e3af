"""Parting and joining of objects: rows and squares that one can check on paper, and what must always hold."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from medseg import postprocess
from medseg.errors import GeometryMismatch, InputError
from medseg.metrics import score_instances
from medseg.postprocess import Joined, boundary_classes, join, keep_largest, separate

Array = NDArray[Any]


def row(*values: int) -> Array:
    return np.array(values).reshape(-1, 1, 1)


def flat(array: Array) -> list[int]:
    return [int(v) for v in array.ravel()]


def discs(*circles: tuple[int, int, int], shape: tuple[int, int] = (60, 40)) -> Array:
    """A picture with discs (i, j, radius), numbered in order; a later one lies over an earlier."""
    i, j = np.ogrid[: shape[0], : shape[1]]
    ids = np.zeros((*shape, 1), dtype=int)
    for number, (a, b, radius) in enumerate(circles, start=1):
        ids[(i - a) ** 2 + (j - b) ** 2 <= radius**2] = number
    return ids


# ---- with a boundary class -------------------------------------------------------------------------------------------


def test_boundary_goes_to_the_nearest_inside() -> None:
    mask = row(0, 1, 1, 2, 2, 2, 2, 1, 0, 2, 1, 2)
    assert flat(separate(mask, 1, 2)) == [0, 1, 1, 1, 1, 2, 2, 2, 0, 3, 3, 3]


def test_thick_slices_are_far_away() -> None:
    # The corner between two insides is two steps from each.
    mask = np.array([[1, 2, 2], [0, 0, 2], [0, 0, 1]]).reshape(3, 3, 1)
    assert flat(separate(mask, 1, 2, spacing_mm=(1.0, 2.0, 1.0))) == [1, 1, 2, 0, 0, 2, 0, 0, 2]
    assert flat(separate(mask, 1, 2, spacing_mm=(2.0, 1.0, 1.0))) == [1, 1, 1, 0, 0, 2, 0, 0, 2]


def test_boundary_stays_with_an_inside_that_it_hangs_together_with() -> None:
    # The end of the upper row is nearer to the lower inside (2, across background) than to its own (4).
    mask = np.array([[1, 2, 2, 2, 2], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).reshape(3, 5, 1)
    assert flat(separate(mask, 1, 2)) == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_a_boundary_alone_is_an_object() -> None:
    assert flat(separate(row(1, 0, 2, 2, 0, 1), 1, 2)) == [1, 0, 3, 3, 0, 2]


def test_insides_that_touch_in_a_corner_are_two() -> None:
    # Squares of 3: the middle is 2 deep, the corner 1.
    mask = np.zeros((6, 6, 1), dtype=int)
    mask[:3, :3] = mask[3:, 3:] = 1
    ids = separate(mask, 1, 2)
    assert (ids[:3, :3] == 1).all()
    assert (ids[3:, 3:] == 2).all()
    assert (ids > 0).sum() == 18


def test_a_boundary_with_a_gap_is_helped_by_the_neck() -> None:
    ids = discs((15, 20, 10), (31, 20, 10))
    classes = boundary_classes(ids, 1.0)
    classes[20:27, 19:22] = 1
    assert ndimage.label(classes == 1)[1] == 1
    assert score_instances(separate(classes, 1, 2), ids).matches[:9] == (2,) * 9


def test_several_kinds_of_cells_have_one_boundary() -> None:
    assert flat(separate(row(1, 3, 0, 1, 2, 3), [1, 2], 3)) == [1, 1, 0, 2, 2, 2]


def test_specks_go_to_what_they_touch_or_away() -> None:
    square = np.ones((21, 21, 1), dtype=int)  # 441 voxels: a speck has at most 4
    mask = np.pad(square, ((0, 5), (0, 0), (0, 0)))
    mask[20, :4] = 2
    mask[20, 0] = 1
    mask[20, 4] = 2  # inside, behind a line of boundary: with the boundary that is nearest to it 3 voxels
    mask[19, :5] = 2
    mask[24, 3:7] = 1  # 4 voxels by themselves
    ids = separate(mask, 1, 2)
    assert np.unique(ids).tolist() == [0, 1]
    assert (ids[:21] == 1).all()
    mask[24, 3:8] = 1  # and 5 of them
    assert np.unique(separate(mask, 1, 2)).tolist() == [0, 1, 2]


def test_a_cell_around_a_cell() -> None:
    ids = discs((20, 20, 18), (20, 20, 8))
    found = separate(boundary_classes(ids, 1.0), 1, 2)
    assert score_instances(found, ids).matches == (2,) * 10


# ---- by distance alone -----------------------------------------------------------------------------------------------


def test_two_discs_are_parted_at_their_neck() -> None:
    ids = discs((15, 20, 10), (31, 20, 10))
    found = separate(ids > 0, 1)
    assert score_instances(found, ids).matches[:9] == (2,) * 9  # at IoU 0.9
    assert (found > 0).sum() == (ids > 0).sum()


@pytest.mark.parametrize(("apart", "count"), [(6, 1), (14, 2)])
def test_discs_of_one_size_are_two_from_their_neck_on(apart: int, count: int) -> None:
    # Radius 12, half the distance 3 or 7: the neck is sqrt(144 - 9) = 0.97 of the radius, or sqrt(144 - 49) = 0.81.
    assert separate(discs((20, 20, 12), (20 + apart, 20, 12)) > 0, 1).max() == count


def test_large_and_small_are_parted_by_one_rule() -> None:
    ids = discs((20, 20, 16), (41, 20, 5))
    assert score_instances(separate(ids > 0, 1), ids).matches[0] == 2


def test_two_balls_of_a_scan_with_thick_slices() -> None:
    i, j, k = np.ogrid[:44, :24, :8]
    balls = [(i - a) ** 2 + (j - 12) ** 2 + ((k - 4) * 3) ** 2 <= 10**2 for a in (12, 28)]
    found = separate(balls[0] | balls[1], 1, spacing_mm=(1.0, 1.0, 3.0))
    assert score_instances(found, balls[0] + 2 * (balls[1] & ~balls[0])).matches[6] == 2


def test_a_square_a_bar_and_a_full_image_are_one() -> None:
    shapes = [(9, 9, 1), (30, 4, 1), (1, 1, 1), (2, 2, 1), (1, 7, 1), (6, 5, 4)]
    for mask in (*map(np.ones, shapes), row(0, 1, 1, 1, 0)):
        assert np.array_equal(separate(mask, 1), mask != 0)


# ---- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [None, 2])
def test_nothing_marked_gives_nothing(boundary: int | None) -> None:
    found = separate(np.zeros((3, 4, 1), dtype=np.uint8), 1, boundary)
    assert (found.dtype, found.shape, found.any()) == (np.int32, (3, 4, 1), False)


def test_without_scikit_image_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"medseg\[cells\]"):
        separate(row(1), 1)


masks = st.lists(st.integers(0, 2), min_size=60, max_size=60).map(lambda v: np.array(v).reshape(4, 5, 3))


@given(masks, st.booleans())
def test_objects_are_numbered_without_gaps_and_connected(mask: Array, guided: bool) -> None:
    found = separate(mask, 1, 2) if guided else separate(mask > 0, 1)
    assert np.unique(np.append(found, 0)).tolist() == list(range(found.max() + 1))
    assert not (found > 0)[mask == 0].any()
    for number in range(1, found.max() + 1):
        assert ndimage.label(found == number, np.ones((3, 3, 3)))[1] == 1


@given(st.lists(st.integers(0, 3), min_size=48, max_size=48).map(lambda v: np.array(v).reshape(6, 8, 1)))
def test_every_object_has_an_inside_and_keeps_its_voxels(ids: Array) -> None:
    classes = boundary_classes(ids, 1.0)
    assert np.array_equal(classes > 0, ids > 0)
    assert set(ids[classes == 1].tolist()) == set(ids[ids > 0].tolist())


# ---- boundaries ------------------------------------------------------------------------------------------------------


def test_boundary_of_touching_rows() -> None:
    # The image's ends are no boundary; 2 and 3 touch; 4 has one voxel, which stays inside.
    ids = row(1, 1, 1, 0, 2, 2, 2, 3, 3, 3, 0, 4, 0)
    assert flat(boundary_classes(ids, 1.0)) == [1, 1, 2, 0, 2, 1, 2, 2, 1, 2, 0, 1, 0]
    assert flat(boundary_classes(ids, 2.0)) == [1, 2, 2, 0, 2, 1, 2, 2, 1, 2, 0, 1, 0]
    assert flat(boundary_classes(ids, 2.0, (2.0, 1.0, 1.0))) == flat(boundary_classes(ids, 1.0))


def test_boundary_of_a_square_is_its_outline() -> None:
    ids = np.zeros((6, 6, 1), dtype=int)
    ids[1:5, 1:5] = 7
    classes = boundary_classes(ids, 1.0)
    assert (classes.dtype, (classes == 1).sum(), (classes == 2).sum()) == (np.uint8, 4, 12)
    assert (classes[2:4, 2:4] == 1).all()


def test_boundary_where_there_is_one_object_or_none() -> None:
    assert flat(boundary_classes(row(5, 5), 1.0)) == [1, 1]
    assert flat(boundary_classes(row(0, 0), 1.0)) == [0, 0]


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_the_smaller_mask_has_what_two_claim() -> None:
    masks = [row(255, 255, 255, 255, 0), row(0, 0, 0, 1, 1), row(0, 1, 0, 0, 0)]
    for order, expected in (((0, 1, 2), [1, 3, 1, 2, 2]), ((2, 1, 0), [3, 1, 3, 2, 2])):
        joined = join([masks[n] for n in order], (5, 1, 1))
        assert flat(joined.ids) == expected
        assert (joined.overlapping, joined.empty, joined.hidden) == (2, 0, 0)


def test_empty_and_repeated_masks_are_counted() -> None:
    joined = join(iter([row(0, 0), row(1, 1), row(1, 1)]), (2, 1, 1))
    assert flat(joined.ids) == [2, 2]
    assert (joined.overlapping, joined.empty, joined.hidden) == (2, 1, 1)


def test_no_mask_at_all_is_an_empty_image() -> None:
    joined = join([], (2, 3, 1))
    assert isinstance(joined, Joined)
    assert (joined.ids.shape, joined.ids.any(), joined.empty) == ((2, 3, 1), False, 0)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(GeometryMismatch, match="mask 2"):
        join([row(1, 0), row(1, 0, 0)], (2, 1, 1))


# ---- the largest piece -----------------------------------------------------------------------------------------------


def test_the_largest_piece_of_each_group_stays() -> None:
    mask = row(1, 1, 0, 1, 2, 0, 2, 2, 2, 0, 3)
    assert flat(keep_largest(mask, [(1,)])) == [1, 1, 0, 0, 2, 0, 2, 2, 2, 0, 3]
    assert flat(keep_largest(mask, [(1, 2)])) == [0, 0, 0, 0, 0, 0, 2, 2, 2, 0, 3]
    # 1 and 2 are one object at first: of 1 nothing is left for the second step to look at
    assert flat(keep_largest(mask, [(1, 2, 3), (1,), (2,)])) == [0, 0, 0, 0, 0, 0, 2, 2, 2, 0, 0]
    assert flat(mask) == [1, 1, 0, 1, 2, 0, 2, 2, 2, 0, 3]


def test_pieces_hang_together_across_corners_and_equal_ones_all_stay() -> None:
    mask = np.zeros((4, 4, 4), dtype=np.uint16)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 0] = 300
    assert np.argwhere(keep_largest(mask, [(300,)])).tolist() == [[0, 0, 0], [1, 1, 1]]
    mask[1, 1, 1] = 0
    assert np.array_equal(keep_largest(mask, [(300,)]), mask)
    assert keep_largest(mask, [(300,)]).dtype == np.uint16


def test_nothing_to_keep_is_left_as_it_is() -> None:
    mask = row(0, 5, 0, 5)
    assert np.array_equal(keep_largest(mask, []), mask)
    assert np.array_equal(keep_largest(mask, [(4,), ()]), mask)


@given(st.lists(st.integers(0, 2), min_size=120, max_size=120).map(lambda v: np.array(v).reshape(8, 5, 3)))
def test_slabs_do_not_matter(mask: Array) -> None:
    """As by labelling the whole array at once."""
    expected = mask.copy()
    for group in ([1, 2], [1]):
        labels, _ = ndimage.label(np.isin(expected, group), np.ones((3, 3, 3)))
        sizes = np.bincount(labels.ravel())[1:]
        expected[(labels > 0) & ~np.isin(labels, np.flatnonzero(sizes == sizes.max(initial=0)) + 1)] = 0
    with pytest.MonkeyPatch.context() as patch:
        for voxels in (1, 40, 1000):
            patch.setattr(postprocess, "SLAB_VOXELS", voxels)
            assert np.array_equal(keep_largest(mask, [(1, 2), (1,)]), expected)


@pytest.mark.peer
def test_as_nnunet_does() -> None:
    reason = "nnunetv2 is not installed"
    module = pytest.importorskip("nnunetv2.postprocessing.remove_connected_components", reason=reason)
    mask = np.random.default_rng(0).integers(0, 4, (9, 8, 7)).astype(np.uint8) * (np.indices((9, 8, 7)).sum(0) % 5 > 2)
    theirs = mask
    for group in ([1, 2], (2, 3), 1):
        theirs = module.remove_all_but_largest_component_from_segmentation(theirs, group)
    assert np.array_equal(keep_largest(mask, [(1, 2), (2, 3), (1,)]), theirs)
    assert (theirs != mask).any()
