"""Preparing and restoring: hand-worked intensities, and masks that come back on any grid."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from medseg import preprocess, resample
from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Box, Geometry, Reorientation
from medseg.plan import (
    Configuration,
    ConfigurationName,
    NetworkPlan,
    Normalisation,
    Plan,
    Resampling,
    TrainingPlan,
)
from medseg.preprocess import GridTrace, Prepared, normalise, on_grid, plan_grid, prepare, restore
from medseg.resample import Place, Slab
from medseg.volume import Labels, Mask, Volume

ALL_48 = [
    Reorientation(axes, flips)  # type: ignore[arg-type]
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]
ZSCORE = Normalisation(scheme="zscore")
LABELS = Labels(values={"organ": 7, "lesion": 300})
angles = st.floats(-3.1, 3.1)
seeds = st.integers(0, 2**32 - 1)


def make_plan(
    spacing: tuple[float | None, float | None, float | None],
    *,
    labels: Labels = LABELS,
    normalisation: tuple[Normalisation, ...] = (ZSCORE,),
    axes: tuple[int, int, int] = (2, 1, 0),
    orientation: str = "RAS",
    previous: ConfigurationName | None = None,
    region_order: tuple[int, ...] = (),
    **resampling: Any,
) -> Plan:
    dims = 2 if spacing[0] is None and spacing[1] is not None else 3
    network = NetworkPlan(features=(2, 2), kernel_sizes=((3,) * dims,) * 2, strides=((1,) * dims, (2,) * dims))
    configuration = Configuration(
        spatial_dims=2 if dims == 2 else 3,
        spacing_mm=spacing,
        median_shape=(8, 8, 8),
        patch_size=(8,) * dims,
        batch_size=2,
        batch_dice=False,
        mirror_axes=(),
        network=network,
        training=TrainingPlan(),
        estimated_memory_mb=1,
        previous=previous,
    )
    return Plan(
        dataset="test",
        fingerprint_digest="",
        device="cpu",
        memory_budget_mb=1,
        orientation=orientation,
        axes=axes,
        channels=tuple(map(str, range(len(normalisation)))),
        normalisation=normalisation,
        resampling=Resampling(**resampling),
        labels=labels,
        region_order=region_order,
        configurations={"2d" if dims == 2 else "3d_fullres": configuration},
    )


def prepared(
    volume: Volume, plan: Plan, mask: NDArray[Any] | None = None, previous: NDArray[Any] | None = None
) -> Prepared:
    (configuration,) = plan.configurations.values()
    masks = [None if array is None else Mask(array, volume.geometry) for array in (mask, previous)]
    return prepare(volume, plan, configuration, *masks)


def affine_of(spacing: tuple[float, ...], turns: tuple[float, float, float] = (0, 0, 0), shear: float = 0) -> Any:
    a, b, c = turns
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    affine = np.eye(4)
    affine[:3, :3] = x @ y @ z @ np.array([[1, 0, 0], [0, 1, shear], [0, 0, 1]]) * spacing
    affine[:3, 3] = (-31.7, 12.3, 101.9)
    return affine


def cut(logits: NDArray[np.float32], axis: int = 0) -> Iterator[Slab]:
    """Slabs of (D, H, W, classes), three planes each."""
    planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(logits, axis, 0)))
    for start in range(0, len(planes), 3):
        piece = planes[start : start + 3]
        yield Slab(axis, start, start + len(piece), (0, piece.shape[1]), piece)


def one_hot(indices: NDArray[np.uint8], classes: int, axis: int = 0) -> Iterator[Slab]:
    """The slabs of a network that knows the answer."""
    return cut((indices[..., np.newaxis] == np.arange(classes)).astype(np.float32), axis)


def bright(ready: Prepared) -> Iterator[Slab]:
    """The slabs of a network that takes what is brighter than the mean for the organ."""
    image = ready.image[0]
    return cut(np.stack([-image, image, np.full_like(image, -1e9)], axis=-1))


def blob(shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float32]:
    """A ball off the centre with some texture, 0 around it."""
    centre = np.array(shape).reshape(3, 1, 1, 1) * np.array([0.45, 0.55, 0.5]).reshape(3, 1, 1, 1)
    distance = np.sqrt((((np.indices(shape) - centre) / np.array(shape).reshape(3, 1, 1, 1)) ** 2).sum(axis=0))
    texture = np.random.default_rng(seed).uniform(0.9, 1.1, shape)
    return np.asarray(np.where(distance < 0.42, (0.6 - distance) * texture, 0), dtype=np.float32)


@st.composite
def grids(draw: st.DrawFn) -> Geometry:
    spacing = draw(st.tuples(*[st.floats(0.3, 8)] * 3))
    return Geometry(
        draw(st.tuples(*[st.integers(1, 7)] * 3)), affine_of(spacing, (draw(angles), draw(angles), draw(angles)))
    )


@given(grids(), st.sampled_from(ALL_48), st.permutations(range(3)), st.sampled_from(["RAS", "LPS", "AIL"]), seeds)
def test_restore_undoes_prepare(
    grid: Geometry, turn: Reorientation, axes: list[int], orientation: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    grid = grid.reoriented(turn)
    mask = rng.choice([0, 7, 300], size=grid.shape).astype(np.int32)
    margins = [slice(rng.integers(0, 2), n - rng.integers(0, 2) or None) for n in grid.shape]
    inside = np.zeros(grid.shape, dtype=bool)
    inside[tuple(margins)] = True
    mask[~inside] = 0
    image = np.where(inside, rng.uniform(1, 2, grid.shape), 0).astype(np.float32)
    order = (axes[0], axes[1], axes[2])
    plan = make_plan((1, 1, 1), axes=order, orientation=orientation)
    letters = "".join(orientation[axis] for axis in order)
    own = grid.reoriented(grid.to(letters)).spacing
    plan = make_plan(own, axes=order, orientation=orientation)  # the case's own spacing: nothing is resampled
    ready = prepared(Volume(image[np.newaxis], grid), plan, mask)
    assert ready.indices is not None
    assert ready.image.shape == (1, *ready.indices.shape) == (1, *ready.trace.plan_shape)
    assert ready.trace.orientation == letters
    found = restore(one_hot(ready.indices, 3), ready.trace, plan)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("shear", [0.0, 0.35])
def test_the_mask_of_a_reoriented_image_is_the_reoriented_mask(shear: float) -> None:
    grid = Geometry((9, 8, 7), affine_of((1.0, 1.3, 2.1), (0.3, -0.2, 0.1), shear))
    image = blob(grid.shape)[np.newaxis]
    plan = make_plan((1.4, 1.1, 1.2))
    first = prepared(Volume(image, grid), plan)
    expected = restore(bright(first), first.trace, plan)
    assert 0 < (expected == 7).mean() < 0.5
    for turn in ALL_48:
        ready = prepared(Volume(turn.apply(image), grid.reoriented(turn)), plan)
        if not shear:
            np.testing.assert_array_equal(ready.image, first.image)
        np.testing.assert_allclose(ready.image, first.image, atol=1e-4)
        np.testing.assert_array_equal(restore(bright(ready), ready.trace, plan), turn.apply(expected))


@settings(max_examples=30)
@given(st.floats(-0.6, 0.6), st.tuples(angles, angles, angles), st.sampled_from(ALL_48))
def test_a_sheared_grid_comes_back_nearly(shear: float, turns: tuple[float, float, float], turn: Reorientation) -> None:
    grid = Geometry((18, 17, 16), affine_of((1.0, 1.1, 1.2), turns, shear)).reoriented(turn)
    image = blob(grid.shape)
    mask = np.where(image > 0, 7, 0)
    own = grid.reoriented(grid.to("SAR")).spacing
    plan = make_plan(own)
    ready = prepared(Volume(image[np.newaxis] + 1, grid), plan, mask)
    assert ready.indices is not None
    found = restore(one_hot(ready.indices, 3), ready.trace, plan)
    assert found.shape == grid.shape
    both = ((found == 7) & (mask == 7)).sum()
    assert 2 * both / ((found == 7).sum() + (mask == 7).sum()) > 0.95


def test_the_plan_grid_by_hand() -> None:
    """An LAS image of 10 x 20 x 5 voxels of 2 x 1 x 6 mm, a margin of zeros, and a plan of 3 x 2 x 1 mm in S A R."""
    image = np.zeros((1, 10, 20, 5), dtype=np.float32)
    image[:, 2:8, 4:16, 1:5] = np.random.default_rng(0).uniform(1, 2, (6, 12, 4))
    grid = Geometry((10, 20, 5), np.diag([-2.0, 1.0, 6.0, 1.0]))
    mask = np.zeros((10, 20, 5), dtype=np.int32)
    mask[2:4] = 7  # x falls along i: the right end of the box
    ready = prepared(Volume(image, grid), make_plan((3, 2, 1)), mask)
    assert ready.trace.orientation == "SAR"
    assert (ready.trace.box_start, ready.trace.box_stop) == ((1, 4, 2), (5, 16, 8))  # i runs backwards: 10 - 8 is 2
    assert ready.trace.plan_shape == (8, 6, 12)  # 4 * 6 / 3, 12 * 1 / 2, 6 * 2 / 1
    assert ready.trace.orders == (0, 1, 1)  # the native 6 mm are more than 3 times 1 mm
    assert ready.indices is not None
    assert ready.indices[:, :, 8:].all()  # two voxels of 2 mm are four of 1 mm, at the right end
    assert not ready.indices[:, :, :8].any()
    assert abs(ready.image.mean()) < 0.1


def test_an_anisotropic_case_is_resampled_apart_along_its_coarse_axis() -> None:
    grid = Geometry((6, 6, 3), np.diag([1.0, 1.0, 4.0, 1.0]))
    ready = prepared(Volume(np.ones((1, 6, 6, 3), dtype=np.float32), grid), make_plan((1, 1.5, 1.5)))
    assert ready.trace.plan_shape == (12, 4, 4)
    assert ready.trace.orders == (0, 1, 1)


def test_slices_keep_their_distance_in_2d() -> None:
    grid = Geometry((8, 6, 5), np.diag([1.0, 1.0, 5.0, 1.0]))
    image = np.random.default_rng(0).normal(size=(1, 8, 6, 5)).astype(np.float32)
    mask = np.random.default_rng(1).choice([0, 7], (8, 6, 5))
    plan = make_plan((None, 0.5, 2))
    ready = prepared(Volume(image, grid), plan, mask)
    assert ready.trace.plan_shape == (5, 12, 4)
    np.testing.assert_array_equal(
        prepared(Volume(image, grid), make_plan((None, 1, 1)), mask).image[0],
        normalise(image, (ZSCORE,))[0].transpose(2, 1, 0),
    )
    assert plan_grid(grid, plan.configurations["2d"])[1] == (1.0, 0.5, 2.0)


def test_a_picture_is_a_volume_of_one_slice() -> None:
    grid = Geometry((6, 4, 1), np.eye(4))
    mask = np.random.default_rng(1).choice([0, 300], (6, 4, 1))
    plan = make_plan((None, 1, 1))
    ready = prepared(Volume(np.ones((1, 6, 4, 1), dtype=np.float32), grid), plan, mask)
    assert ready.indices is not None
    assert ready.image.shape == (1, 1, 4, 6)
    np.testing.assert_array_equal(restore(one_hot(ready.indices, 3), ready.trace, plan), mask)


@pytest.mark.parametrize("value", [0.0, 3.7, -1000.0])
def test_a_constant_image_becomes_zero_and_comes_back_whole(value: float) -> None:
    grid = Geometry((5, 4, 3), np.eye(4))
    mask = np.full((5, 4, 3), 7)
    plan = make_plan((1, 1, 1), normalisation=(ZSCORE, Normalisation(scheme="zscore", nonzero_only=True)))
    ready = prepared(Volume(np.full((2, 5, 4, 3), value, dtype=np.float32), grid), plan, mask)
    assert ready.image.shape == (2, 3, 4, 5)
    assert not ready.image.any()
    assert ready.indices is not None
    assert (restore(one_hot(ready.indices, 3), ready.trace, plan) == 7).all()


def test_outside_the_crop_is_background() -> None:
    image = np.zeros((1, 4, 4, 4), dtype=np.float32)
    image[0, 1:3, 1:3, 1:3] = 1
    plan = make_plan((1, 1, 1))
    ready = prepared(Volume(image, Geometry((4, 4, 4), np.eye(4))), plan)
    found = restore(one_hot(np.ones((2, 2, 2), dtype=np.uint8), 3), ready.trace, plan)
    np.testing.assert_array_equal(found, np.where(image[0], 7, 0))


def line(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (
            Normalisation(scheme="ct", mean=50, std=25, lower=-100, upper=300),
            (-1000, 0, 50, 3000),
            (-6, -2, 0, 10),  # (-100 - 50) / 25, (0 - 50) / 25, 0, (300 - 50) / 25
        ),
        (ZSCORE, (1, 1, 3, 3), (-1, -1, 1, 1)),  # mean 2, standard deviation 1
        (Normalisation(scheme="zscore", nonzero_only=True), (0, 0, 2, 4), (0, 0, -1, 1)),  # of 2 and 4: 3 and 1
        (Normalisation(scheme="minmax"), (-2, 0, 2, 6), (0, 0.25, 0.5, 1)),
        (Normalisation(scheme="minmax"), (5, 5), (0, 0)),
        (Normalisation(scheme="rgb"), (0, 51, 255), (0, 0.2, 1)),
        (Normalisation(scheme="none"), (-2, 5), (-2, 5)),
    ],
)
def test_normalisation_by_hand(rule: Normalisation, values: tuple[float, ...], expected: tuple[float, ...]) -> None:
    found = normalise(line(*values), (rule,))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)


def test_a_voxel_counts_as_zero_where_every_channel_is() -> None:
    rule = Normalisation(scheme="zscore", nonzero_only=True)
    both = normalise(np.concatenate([line(0, 0, 2), line(0, 1, 3)]), (rule, rule))
    np.testing.assert_allclose(both[:, :, 0, 0], [[0, -1, 1], [0, -1, 1]], atol=1e-6)  # of 0 and 2; of 1 and 3


def test_the_trace_survives_json_bit_for_bit(tmp_path: Path) -> None:
    grid = Geometry((9, 8, 7), affine_of((1 / 3, 0.1, 2.7), (0.3, -0.2, 0.1)))
    trace = prepared(Volume(blob(grid.shape)[np.newaxis], grid), make_plan((1, 1, 1))).trace
    trace.save(tmp_path / "trace.json")
    again = GridTrace.load(tmp_path / "trace.json")
    assert again == trace
    assert again.native == grid


def test_voxels_to_ignore_have_an_index_of_their_own() -> None:
    labels = Labels(values={"organ": 7, "lesion": 300}, ignore=9)
    mask = np.array([0, 7, 9, 300]).reshape(4, 1, 1)
    plan = make_plan((1, 1, 1), labels=labels)
    ready = prepared(Volume(line(1, 2, 3, 4), Geometry((4, 1, 1), np.eye(4))), plan, mask)
    assert ready.indices is not None
    assert ready.indices.ravel().tolist() == [0, 1, 3, 2]
    assert restore(one_hot(ready.indices, 4), ready.trace, plan).ravel().tolist() == [0, 7, 9, 300]


def test_a_mask_that_does_not_fit_is_refused() -> None:
    volume = Volume(line(1, 2, 3, 4), Geometry((4, 1, 1), np.eye(4)))
    with pytest.raises(InputError, match=r"\[5\] have no name"):
        prepared(volume, make_plan((1, 1, 1)), np.array([0, 5, 0, 0]).reshape(4, 1, 1))
    with pytest.raises(GeometryMismatch, match=r"shape \(3, 1, 1\)"):
        prepared(volume, make_plan((1, 1, 1)), np.zeros((3, 1, 1), dtype=np.uint8))


STORED = "stored"


@given(grids(), st.permutations(range(3)), st.integers(0, 2), seeds)
def test_a_stored_orientation_only_puts_axes_in_order(grid: Geometry, axes: list[int], across: int, seed: int) -> None:
    order = (axes[0], axes[1], axes[2])
    rng = np.random.default_rng(seed)
    image, mask = rng.uniform(1, 2, grid.shape), rng.choice([0, 7, 300], grid.shape)
    own = Geometry(grid.shape, grid.affine).spacing
    plan = make_plan((own[axes[0]], own[axes[1]], own[axes[2]]), axes=order, orientation=STORED)
    for turn in (ALL_48[seed % 48], Reorientation((0, 1, 2), (False,) * 3)):
        turned = Volume(turn.apply(image[np.newaxis]), grid.reoriented(turn))
        ready = prepared(turned, make_plan((None,) * 3, axes=order, orientation=STORED), turn.apply(mask))
        np.testing.assert_array_equal(
            ready.image[0],
            normalise(turned.array.transpose(0, *(a + 1 for a in order)), (ZSCORE,))[0],
        )
        assert ready.indices is not None
        np.testing.assert_array_equal(restore(one_hot(ready.indices, 3, across), ready.trace, plan), turn.apply(mask))


def test_all_48_orientations_come_back_as_they_are_stored() -> None:
    """A file's axes are not looked at: the same array gives the same mask, whatever its affine says."""
    array = blob((9, 8, 7))
    plan = make_plan((1.4, 1.1, 1.2), orientation=STORED)
    grid = Geometry(array.shape, np.diag([1.0, 1.3, 2.1, 1.0]))
    first = prepared(Volume(array[np.newaxis], grid), plan)
    expected = restore(bright(first), first.trace, plan)
    for turn in ALL_48:
        affine = np.eye(4)
        affine[:3, :3] = grid.reoriented(turn).direction * grid.spacing
        same = Geometry(array.shape, affine)
        ready = prepared(Volume(array[np.newaxis], same), plan)
        assert same.orientation == grid.reoriented(turn).orientation
        np.testing.assert_array_equal(ready.image, first.image)
        np.testing.assert_array_equal(restore(bright(ready), ready.trace, plan), expected)


def test_a_sheared_grid_is_left_as_it_is_stored() -> None:
    grid = Geometry((5, 6, 7), affine_of((1, 1, 1), (0.2, 0.1, 0.3), 0.4))
    image = np.random.default_rng(0).uniform(1, 2, (1, *grid.shape)).astype(np.float32)
    plan = make_plan((None,) * 3, orientation=STORED, normalisation=(Normalisation(scheme="none"),))
    ready = prepared(Volume(image, grid), plan)
    assert grid.is_sheared
    assert not ready.trace.orthogonal
    np.testing.assert_array_equal(ready.image, image.transpose(0, 3, 2, 1))
    assert restore(bright(ready), ready.trace, plan).shape == grid.shape
    assert prepared(Volume(image, grid), make_plan((None,) * 3)).trace.plan_shape != (7, 6, 5)


@pytest.mark.parametrize("orientation", ["RAS", STORED])
def test_a_body_on_a_sheared_grid_has_no_rings_around_it(orientation: str) -> None:
    """A bright cube in zeros, 10 of 40 voxels a side: its crop has a voxel more on each side, and what shear moves."""
    grid = Geometry((40, 40, 40), affine_of((1, 1, 1), (0.1, 0.2, 0.3), 0.35))
    image = np.zeros((1, 40, 40, 40), dtype=np.int16)
    image[0, 15:25, 15:25, 15:25] = 1000
    rule = Normalisation(scheme="zscore", nonzero_only=True)
    ready = prepared(Volume(image, grid), make_plan((None,) * 3, orientation=orientation, normalisation=(rule,)))
    assert max(ready.trace.box.shape) <= 10 + 2 + 0.36 * 10
    assert (ready.image != 0).sum() <= (10 + 2) ** 2 * (10 + 2 + 0.36 * 10)
    none = make_plan((None,) * 3, orientation=orientation, normalisation=(Normalisation(scheme="none"),))
    values = prepared(Volume(image, grid), none).image
    assert (values.min(), values.max()) == (1000 if orientation == STORED else 0, 1000)
    if orientation != STORED:
        assert ((values % 1) != 0).any()  # not rounded to the type of the file
        assert values.sum() == pytest.approx(1000 * 10**3 / np.sqrt(1 + 0.35**2), rel=0.05)


def test_another_number_of_channels_than_the_plan_has_is_refused() -> None:
    plan = make_plan((1, 1, 1), normalisation=(ZSCORE, ZSCORE))
    for channels in (1, 3):
        with pytest.raises(InputError, match=f"has {channels} channels.*2: 0, 1"):
            prepared(Volume(np.ones((channels, 2, 2, 2)), Geometry((2, 2, 2), np.eye(4))), plan)


def test_the_body_takes_five_bytes_a_voxel() -> None:
    array = np.random.default_rng(0).choice(np.array([0, 1], dtype=np.int16), (1, 64, 256, 256), p=[0.01, 0.99])
    tracemalloc.start()
    preprocess._body(array)
    assert tracemalloc.get_traced_memory()[1] < 5.5 * array.size
    tracemalloc.stop()


@pytest.mark.parametrize("spacing", [(2.0, None, None), (None, None, 0.5), (None, None, None)])
def test_an_axis_without_a_spacing_keeps_its_own(spacing: tuple[float | None, ...]) -> None:
    grid = Geometry((4, 6, 8), np.diag([1.0, 1.0, 1.0, 1.0]))
    ready = prepared(Volume(np.ones((1, 4, 6, 8)), grid), make_plan((spacing[0], spacing[1], spacing[2])))
    assert ready.trace.plan_shape == (4 if spacing[0] else 8, 6, 8 if spacing[2] else 4)


def test_holes_belong_to_what_encloses_them() -> None:
    """A box of 2 and 4 around a hole of 0, in a margin; and a bay that is open to the outside."""
    image = np.zeros((1, 7, 7, 7), dtype=np.float32)
    image[0, 1:6, 1:6, 1:6] = 2
    image[0, 1:6, 1:6, 1:4] = 4
    image[0, 3, 3, 3] = 0  # enclosed
    image[0, 5, 3, 3:6] = 0  # open
    inside = image[0] != 0
    inside[3, 3, 3] = True
    found = normalise(image, (Normalisation(scheme="zscore", nonzero_only=True),))
    mean, std = image[0][inside].mean(), image[0][inside].std()
    np.testing.assert_allclose(found[0], np.where(inside, (image[0] - mean) / std, 0), atol=1e-6)
    assert found[0, 3, 3, 3] == pytest.approx(-mean / std)


@given(st.tuples(*[st.integers(1, 7)] * 3), st.integers(1, 2), seeds)
def test_holes_are_those_of_scipy(shape: tuple[int, int, int], channels: int, seed: int) -> None:
    array = np.random.default_rng(seed).choice([0, 1], (channels, *shape), p=[0.3, 0.7])
    np.testing.assert_array_equal(preprocess._body(array), ndimage.binary_fill_holes(array.any(axis=0)))


@given(st.tuples(*[st.integers(1, 5)] * 3), st.integers(1, 2), seeds)
def test_the_crop_is_the_box_around_what_is_not_zero(shape: tuple[int, int, int], channels: int, seed: int) -> None:
    array = np.random.default_rng(seed).choice([0, 0.1], (channels, *shape), p=[0.9, 0.1])
    assert preprocess._nonzero_box(array) == Box.around(array.any(axis=0))


def test_nnunets_order_of_steps() -> None:
    """Transpose, crop, normalise, resample: statistics of the crop, the range of the normalised image for the clip."""
    transform = pytest.importorskip("skimage.transform", reason="scikit-image is an extra")
    rng = np.random.default_rng(0)
    image = np.zeros((1, 12, 10, 8), dtype=np.int16)
    image[0, 2:11, 1:9, 2:8] = rng.integers(-900, 900, (9, 8, 6)) | 1
    plan = make_plan((1.5, 0.7, 1.2), orientation=STORED)
    ready = prepared(Volume(image, Geometry((12, 10, 8), np.diag([1.0, 1.0, 2.0, 1.0]))), plan)
    crop = image[0, 2:11, 1:9, 2:8].transpose(2, 1, 0).astype(np.float64)
    scaled = (crop - crop.mean()) / crop.std()
    expected = transform.resize(
        scaled, (8, 11, 8), 3, mode="edge", anti_aliasing=False
    )  # 6 * 2 / 1.5, 8 / 0.7, 9 / 1.2
    np.testing.assert_allclose(ready.image[0], expected, atol=1e-4 * np.ptp(scaled))


def test_nnunets_planes_apart() -> None:
    """Slices of 5 mm: each resampled in its plane by itself, and then the nearest of them taken."""
    transform = pytest.importorskip("skimage.transform", reason="scikit-image is an extra")
    image = np.random.default_rng(0).normal(5, 1, (1, 9, 8, 5)).astype(np.float32)
    plan = make_plan((2.5, 0.7, 0.8), normalisation=(Normalisation(scheme="none"),))
    ready = prepared(Volume(image, Geometry((9, 8, 5), np.diag([1.0, 1.0, 5.0, 1.0]))), plan)
    planes = [transform.resize(p, (11, 11), 3, mode="edge", anti_aliasing=False) for p in image[0].T]
    np.testing.assert_allclose(ready.image[0], np.repeat(planes, 2, axis=0), atol=1e-4 * np.ptp(image))


def test_the_orders_of_the_plan_are_used() -> None:
    grid = Geometry((6, 6, 3), np.diag([1.0, 1.0, 4.0, 1.0]))
    volume = Volume(np.ones((1, 6, 6, 3), dtype=np.float32), grid)
    assert prepared(volume, make_plan((1, 1.5, 1.5), logits_along_low=1)).trace.orders == (1, 1, 1)
    assert prepared(volume, make_plan((1, 1.5, 1.5), separate="never")).trace.orders == (1, 1, 1)
    assert prepared(volume, make_plan((1.6, 1.5, 1.5), separate="always")).trace.orders == (0, 1, 1)
    mask = np.zeros((6, 6, 3), dtype=np.uint8)
    mask[..., 1] = 7
    # Five slices of three, in which the outer four lie 0.8 and 0.2 beside the middle of a slice
    nearest = prepared(volume, make_plan((2.4, 1, 1)), mask).indices
    shares = prepared(volume, make_plan((2.4, 1, 1), label_along_low=1, separate="always"), mask).indices
    assert nearest is not None
    assert shares is not None
    assert nearest[:, 0, 0].tolist() == shares[:, 0, 0].tolist() == [0, 0, 1, 0, 0]


def test_a_cascade_sees_the_earlier_mask_class_by_class() -> None:
    grid = Geometry((4, 4, 6), np.diag([-1.0, 1.0, 1.0, 1.0]))
    image = np.zeros((1, 4, 4, 6), dtype=np.float32)
    image[..., 1:] = 1
    earlier = np.random.default_rng(0).choice([0, 7, 300], (4, 4, 6))
    plan = make_plan((0.5, 1, 1), previous="3d_lowres")
    ready = prepared(Volume(image, grid), plan, earlier, earlier)
    assert ready.indices is not None
    assert ready.image.shape == (3, 10, 4, 4)
    np.testing.assert_array_equal(ready.image[1], ready.indices == 1)
    np.testing.assert_array_equal(ready.image[2], ready.indices == 2)
    np.testing.assert_array_equal(ready.image[1, ::2], earlier.transpose(2, 1, 0)[1:, :, ::-1] == 7)


def test_a_cascade_needs_its_earlier_mask_and_nothing_else_takes_one() -> None:
    volume = Volume(line(1, 2, 3, 4), Geometry((4, 1, 1), np.eye(4)))
    with pytest.raises(InputError, match=r"is missing.*3d_lowres"):
        prepared(volume, make_plan((1, 1, 1), previous="3d_lowres"))
    with pytest.raises(InputError, match="is given"):
        prepared(volume, make_plan((1, 1, 1)), previous=np.zeros((4, 1, 1), dtype=np.uint8))


REGIONS = Labels(values={"edema": 1, "core": 2, "enhancing": 300}, regions={"whole": (1, 2, 300), "tumour": (2, 300)})


def region_logits() -> NDArray[np.float32]:
    """Four voxels in a row: of neither region, of the first, of both, and of the second alone."""
    return np.array([[-1, -1], [1, -1], [1, 2], [-3, 1]], dtype=np.float32).reshape(1, 1, 4, 2)


def test_regions_are_painted_in_order() -> None:
    plan = make_plan((1, 1, 1), labels=REGIONS, region_order=(1, 300))
    ready = prepared(Volume(line(1, 2, 3, 4), Geometry((4, 1, 1), np.eye(4))), plan)
    found = restore(cut(region_logits()), ready.trace, plan)
    assert found.dtype == np.uint16
    assert found.ravel().tolist() == [0, 1, 300, 300]


def test_values_are_of_the_smallest_type() -> None:
    for value, kind in ((255, np.uint8), (256, np.uint16), (-1, np.int32), (70000, np.int32)):
        plan = make_plan((1, 1, 1), labels=Labels(values={"organ": value}))
        ready = prepared(Volume(line(1, 2), Geometry((2, 1, 1), np.eye(4))), plan)
        found = restore(one_hot(np.array([[[0, 1]]], dtype=np.uint8), 2), ready.trace, plan)
        assert found.dtype == kind
        assert found.ravel().tolist() == [0, value]


class Told:
    """Gathers probabilities, and how often each voxel was told."""

    def __init__(self, channels: int, shape: tuple[int, ...]) -> None:
        self.values = np.full((channels, *shape), np.nan, dtype=np.float32)
        self.times = np.zeros(shape, dtype=int)

    def __call__(self, place: Place, values: NDArray[np.float32]) -> None:
        assert values.dtype == np.float32
        self.values[:, *place] = values
        self.times[place] += 1


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("turn", ALL_48[::5])
def test_probabilities_lie_where_the_mask_does(turn: Reorientation, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "CHUNK_BYTES", 400)
    image = np.zeros((1, 9, 8, 7), dtype=np.float32)
    image[0, 1:8, 2:7, 1:7] = blob((7, 5, 6)) + 1
    grid = Geometry((9, 8, 7), np.diag([1.0, 1.3, 2.1, 1.0]))
    plan = make_plan((1.4, 1.1, 1.2))
    ready = prepared(Volume(turn.apply(image), grid.reoriented(turn)), plan)
    logits = np.random.default_rng(0).normal(size=(*ready.trace.plan_shape, 3)).astype(np.float32)
    told = Told(3, ready.trace.native_shape)
    mask = restore(cut(logits, axis), ready.trace, plan, told)
    np.testing.assert_array_equal(mask, restore(cut(logits, axis), ready.trace, plan))
    inside = turn.apply(image)[0] != 0
    np.testing.assert_array_equal(told.times, inside)
    np.testing.assert_allclose(told.values[:, inside].sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(np.array([0, 7, 300])[told.values[:, inside].argmax(axis=0)], mask[inside])


def test_probabilities_of_regions_are_sigmoids() -> None:
    plan = make_plan((1, 1, 1), labels=REGIONS, region_order=(1, 300))
    ready = prepared(Volume(line(1, 2, 3, 4), Geometry((4, 1, 1), np.eye(4))), plan)
    told = Told(2, (4, 1, 1))
    assert restore(cut(region_logits()), ready.trace, plan, told).ravel().tolist() == [0, 1, 300, 300]
    np.testing.assert_allclose(told.values[0].ravel(), [0.26894, 0.73106, 0.73106, 0.04743], atol=1e-5)


def test_probabilities_of_a_straightened_grid_are_refused() -> None:
    grid = Geometry((5, 6, 7), affine_of((1, 1, 1), (0, 0, 0), 0.4))
    plan = make_plan((1, 1, 1))
    ready = prepared(Volume(np.ones((1, 5, 6, 7), dtype=np.float32), grid), plan)
    with pytest.raises(InputError, match="sheared"):
        restore(bright(ready), ready.trace, plan, Told(3, grid.shape))


@pytest.mark.parametrize("rule", [ZSCORE, Normalisation(scheme="ct", lower=-900, upper=900, mean=0, std=1)])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.0, 1.0, 1.0)])
def test_preparing_takes_the_result_and_a_few_planes(
    rule: Normalisation, spacing: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resample, "CHUNK_BYTES", 2**20)
    monkeypatch.setattr(preprocess, "CHUNK_BYTES", 2**20)
    array = np.random.default_rng(0).integers(-1000, 1000, (1, 256, 192, 128), dtype=np.int16)
    volume, plan = Volume(array, Geometry((256, 192, 128), np.eye(4))), make_plan(spacing, normalisation=(rule,))
    tracemalloc.start()
    ready = prepared(volume, plan)
    assert tracemalloc.get_traced_memory()[1] < ready.image.nbytes + 16 * 2**20
    tracemalloc.stop()


def test_an_image_is_brought_to_another_grid_by_its_place_in_the_world() -> None:
    ramp = np.arange(6, dtype=np.int16).reshape(1, 6, 1, 1) * 10 + np.zeros((1, 6, 4, 4), np.int16) + 5
    volume = Volume(ramp, Geometry((6, 4, 4), np.diag([2.0, 1, 1, 1])))
    assert on_grid(volume, Geometry((6, 4, 4), np.diag([2.0, 1, 1, 1]))) is volume
    finer = np.diag([-1.0, 1, 1, 1])
    finer[0, 3] = 9  # from 9 mm down to -2 mm
    found = on_grid(volume, Geometry((12, 4, 4), finer))
    assert found.array.dtype == np.float32
    assert found.array[0, :, 1, 2].tolist() == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5, 5, 5]  # beyond 0: its minimum
    assert found.geometry == Geometry((12, 4, 4), finer)
    assert found.warnings == ("image was resampled to the grid of the first channel",)
