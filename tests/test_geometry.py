"""Geometry: crop, reorient, resample and straighten as arithmetic, checked at world points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medseg.geometry import Box, Geometry, Reorientation

ALL_48 = [
    Reorientation(axes, flips)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]
ORIENTATIONS = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]
shapes = st.tuples(*[st.integers(1, 6)] * 3)
angles = st.floats(-3.1, 3.1)


def rotation(a: float, b: float, c: float) -> NDArray[np.float64]:
    """Rotations about z, y and x, one after the other."""
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    return x @ y @ z


@st.composite
def grids(draw: st.DrawFn, shear: bool = False) -> Geometry:
    matrix = rotation(draw(angles), draw(angles), draw(angles))
    if shear:
        matrix = matrix @ np.array([[1, draw(st.floats(-0.5, 0.5)), draw(st.floats(-0.5, 0.5))], [0, 1, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = matrix * draw(st.tuples(*[st.floats(0.3, 8)] * 3))
    affine[:3, 3] = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    return Geometry(draw(shapes), affine)


def voxels(shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.indices(shape).reshape(3, -1).T.astype(float)


def numbered(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.arange(np.prod(shape)).reshape(shape)


def test_what_an_affine_says() -> None:
    affine = np.array([[0, -2.0, 0, 10], [0.5, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
    g = Geometry((4, 5, 6), affine)
    assert g.spacing == (0.5, 2.0, 3.0)
    assert g.orientation == "ALS"  # i to the front, j to the left, k to the head
    assert g.origin.tolist() == [10, -20, 5]
    assert g.direction.tolist() == [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    assert g.voxel_volume_ml == pytest.approx(0.003)
    assert g.diagonal_mm == pytest.approx(np.sqrt(2**2 + 10**2 + 18**2))
    assert g.shear == 0
    assert not g.is_sheared
    assert g.world(np.array([[1.0, 1.0, 1.0]])).tolist() == [[8.0, -19.5, 8.0]]


def test_a_geometry_is_a_value() -> None:
    affine = np.eye(4)
    g = Geometry((np.int64(1), 2, 3), affine)  # type: ignore[arg-type]
    affine[0, 0] = 7
    assert g.affine[0, 0] == 1
    assert g == Geometry((1, 2, 3), np.eye(4))
    assert hash(g) == hash(Geometry((1, 2, 3), np.eye(4)))
    assert g != Geometry((1, 2, 4), np.eye(4))
    assert g != Geometry((1, 2, 3), np.diag([1, 1, 1 + 1e-9, 1]))
    assert g != "geometry"
    with pytest.raises(ValueError, match="read-only"):
        g.affine[0, 0] = 2


def test_reorienting_las_to_ras_by_hand() -> None:
    g = Geometry((4, 2, 2), np.diag([-2.0, 1.0, 1.0, 1.0]))
    turn = g.to("RAS")
    assert turn == Reorientation((0, 1, 2), (True, False, False))
    # the last voxel along i lies at x = -6 and becomes the first
    assert g.reoriented(turn).affine.tolist() == [[2, 0, 0, -6], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_there_are_48_orientations() -> None:
    assert len(ALL_48) == len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("target", ORIENTATIONS)
def test_every_orientation_is_reached_from_an_oblique_grid_and_undone(target: str) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(0.3, -0.2, 0.4) * (1, 2, 3)
    g = Geometry((2, 3, 4), affine)
    turn = g.to(target)
    assert g.reoriented(turn).orientation == target
    assert turn.inverse.inverse == turn
    array = numbered((2, 2, 3, 4))
    turned = turn.apply(array)
    assert turned.shape[1:] == g.reoriented(turn).shape
    np.testing.assert_array_equal(turn.inverse.apply(turned), array)
    np.testing.assert_allclose(g.reoriented(turn).reoriented(turn.inverse).affine, g.affine, atol=1e-12)


@given(grids(shear=True), st.sampled_from(ALL_48))
def test_reoriented_voxels_stay_at_their_world_points(g: Geometry, turn: Reorientation) -> None:
    moved = turn.apply(np.moveaxis(g.world(voxels(g.shape)).reshape(*g.shape, 3), -1, 0))
    after = g.reoriented(turn)
    np.testing.assert_allclose(after.world(voxels(after.shape)), moved.reshape(3, -1).T, atol=1e-9)


@given(grids(), st.sampled_from(ALL_48))
def test_all_48_orientations_of_one_image_give_one_canonical_array(g: Geometry, turn: Reorientation) -> None:
    image = numbered(g.shape)
    other, other_image = g.reoriented(turn), turn.apply(image)
    np.testing.assert_array_equal(other.to("RAS").apply(other_image), g.to("RAS").apply(image))


@pytest.mark.parametrize(
    "turns", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (-1, 0, 0), (3, 0, 0)]
)
def test_a_tie_at_exactly_45_degrees_is_broken_the_same_way_in_all_48(turns: tuple[int, int, int]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(*(n * np.pi / 4 for n in turns)) * (1, 1.5, 2)
    g, image = Geometry((2, 3, 4), affine), numbered((2, 3, 4))
    expected = g.to("RAS").apply(image)
    for turn in ALL_48:
        np.testing.assert_array_equal(g.reoriented(turn).to("RAS").apply(turn.apply(image)), expected)


@pytest.mark.parametrize("wrong", ["RAX", "RRS", "RA", "RASL", "", "ras"])
def test_wrong_orientation_letters_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="orientation"):
        Geometry((1, 1, 1), np.eye(4)).to(wrong)


def test_box_by_hand() -> None:
    mask = np.zeros((4, 5, 6), dtype=bool)
    mask[1, 2, 3] = mask[2, 2, 5] = True
    box = Box.around(mask)
    assert box == Box((1, 2, 3), (3, 3, 6))
    assert box.shape == (2, 1, 3)
    assert mask[box.slices].sum() == 2
    assert box.grown(2, mask.shape) == Box((0, 0, 1), (4, 5, 6))


def test_box_of_an_empty_mask_is_the_whole_grid() -> None:
    assert Box.around(np.zeros((2, 3, 4), dtype=bool)) == Box.whole((2, 3, 4))


@given(grids(shear=True), st.data())
def test_cropped_voxels_stay_at_their_world_points(g: Geometry, data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(0, n - 1)) for n in g.shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, g.shape, strict=True))
    small = g.cropped(Box(start, stop))
    assert small.shape == Box(start, stop).shape
    np.testing.assert_allclose(small.world(voxels(small.shape)), g.world(voxels(small.shape) + start), atol=1e-9)


def test_resampling_by_hand() -> None:
    # 4 voxels of 1 mm cover -0.5 .. 3.5; cut in two they are 2 mm each, with centres at 0.5 and 2.5
    g = Geometry((4, 1, 1), np.eye(4)).resampled((2, 1, 1))
    assert g.shape == (2, 1, 1)
    assert g.spacing == (2.0, 1.0, 1.0)
    assert g.origin.tolist() == [0.5, 0, 0]


@given(grids(shear=True), shapes)
def test_resampling_keeps_the_outer_edges_and_can_be_undone(g: Geometry, shape: tuple[int, int, int]) -> None:
    r = g.resampled(shape)
    low = np.full((1, 3), -0.5)
    np.testing.assert_allclose(r.world(low), g.world(low), atol=1e-8)
    np.testing.assert_allclose(r.world(np.array([shape]) - 0.5), g.world(np.array([g.shape]) - 0.5), atol=1e-8)
    np.testing.assert_allclose(r.resampled(g.shape).affine, g.affine, atol=1e-8)


@given(grids(), st.sampled_from(ALL_48), shapes)
def test_reorienting_and_resampling_commute(g: Geometry, turn: Reorientation, shape: tuple[int, int, int]) -> None:
    turned_shape = tuple(shape[a] for a in turn.axes)
    one = g.reoriented(turn).resampled(turned_shape)
    other = g.resampled(shape).reoriented(turn)
    assert one.shape == other.shape
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-8)


def test_shear_by_hand() -> None:
    affine = np.eye(4)
    affine[0, 2] = 1.0  # k leans 45 degrees to the right
    g = Geometry((3, 3, 3), affine)
    assert g.shear == pytest.approx(np.sqrt(0.5))
    assert g.is_sheared
    affine[0, 2] = 5e-4
    assert not Geometry((3, 3, 3), affine).is_sheared


@given(grids(shear=True))
def test_the_straightened_grid_is_orthogonal_and_holds_every_voxel_centre(g: Geometry) -> None:
    straight = g.orthogonalised()
    assert straight.shear < 1e-9
    np.testing.assert_allclose(straight.spacing, g.spacing, rtol=1e-9)
    index = (g.world(voxels(g.shape)) - straight.origin) @ np.linalg.inv(straight.affine[:3, :3]).T
    assert index.min() >= -1e-4
    assert (index <= np.array(straight.shape) - 1 + 1e-4).all()


def test_straightening_a_straight_grid_changes_nothing() -> None:
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    straight = Geometry((3, 4, 5), affine).orthogonalised()
    assert straight.shape == (3, 4, 5)
    np.testing.assert_allclose(straight.affine, affine, atol=1e-12)


def test_close_to_measures_at_the_corners_in_voxels() -> None:
    g = Geometry((101, 10, 10), np.diag([1.0, 1.0, 2.0, 1.0]))
    stretched = np.diag([1.00009, 1.0, 2.0, 1.0])  # 0.009 mm off at the far corner
    assert g.close_to(Geometry(g.shape, stretched))
    stretched[0, 0] = 1.00011
    assert not g.close_to(Geometry(g.shape, stretched))
    assert g.close_to(Geometry(g.shape, stretched), tolerance=0.02)
    assert not g.close_to(Geometry((100, 10, 10), g.affine))
