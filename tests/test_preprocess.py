"""Preparing and restoring: hand-worked intensities, and masks that come back on any grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Geometry, Reorientation
from medseg.plan import Configuration, NetworkPlan, Normalisation, Plan, TrainingPlan
from medseg.preprocess import GridTrace, Prepared, normalise, plan_grid, prepare, restore
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
    spacing: tuple[float | None, float, float],
    *,
    labels: Labels = LABELS,
    normalisation: tuple[Normalisation, ...] = (ZSCORE,),
    axes: tuple[int, int, int] = (2, 1, 0),
    orientation: str = "RAS",
) -> Plan:
    dims = 2 if spacing[0] is None else 3
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
        labels=labels,
        configurations={"2d" if dims == 2 else "3d_fullres": configuration},
    )


def prepared(volume: Volume, plan: Plan, mask: NDArray[Any] | None = None) -> Prepared:
    (configuration,) = plan.configurations.values()
    return prepare(volume, plan, configuration, None if mask is None else Mask(mask, volume.geometry))


def affine_of(spacing: tuple[float, ...], turns: tuple[float, float, float] = (0, 0, 0), shear: float = 0) -> Any:
    a, b, c = turns
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    affine = np.eye(4)
    affine[:3, :3] = x @ y @ z @ np.array([[1, 0, 0], [0, 1, shear], [0, 0, 1]]) * spacing
    affine[:3, 3] = (-31.7, 12.3, 101.9)
    return affine


def one_hot(indices: NDArray[np.uint8], classes: int, step: int = 3) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """The slabs of a network that knows the answer."""
    for start in range(0, len(indices), step):
        piece = indices[start : start + step]
        yield start, start + len(piece), (piece == np.arange(classes).reshape(-1, 1, 1, 1)).astype(np.float32)


def bright(ready: Prepared) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """The slabs of a network that takes what is brighter than the mean for the organ."""
    for start in range(0, len(ready.image[0]), 3):
        piece = ready.image[0, start : start + 3]
        yield start, start + len(piece), np.stack([-piece, piece, np.full_like(piece, -1e9)])


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
    found = restore(one_hot(ready.indices, 3), ready.trace, plan.labels)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("shear", [0.0, 0.35])
def test_the_mask_of_a_reoriented_image_is_the_reoriented_mask(shear: float) -> None:
    grid = Geometry((9, 8, 7), affine_of((1.0, 1.3, 2.1), (0.3, -0.2, 0.1), shear))
    image = blob(grid.shape)[np.newaxis]
    plan = make_plan((1.4, 1.1, 1.2))
    first = prepared(Volume(image, grid), plan)
    expected = restore(bright(first), first.trace, plan.labels)
    assert 0 < (expected == 7).mean() < 0.5
    for turn in ALL_48:
        ready = prepared(Volume(turn.apply(image), grid.reoriented(turn)), plan)
        if not shear:
            np.testing.assert_array_equal(ready.image, first.image)
        np.testing.assert_allclose(ready.image, first.image, atol=1e-4)
        np.testing.assert_array_equal(restore(bright(ready), ready.trace, plan.labels), turn.apply(expected))


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
    found = restore(one_hot(ready.indices, 3), ready.trace, plan.labels)
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
    np.testing.assert_array_equal(restore(one_hot(ready.indices, 3), ready.trace, plan.labels), mask)


@pytest.mark.parametrize("value", [0.0, 3.7, -1000.0])
def test_a_constant_image_becomes_zero_and_comes_back_whole(value: float) -> None:
    grid = Geometry((5, 4, 3), np.eye(4))
    mask = np.full((5, 4, 3), 7)
    plan = make_plan((1, 1, 1), normalisation=(ZSCORE, Normalisation(scheme="zscore", nonzero_only=True)))
    ready = prepared(Volume(np.full((2, 5, 4, 3), value, dtype=np.float32), grid), plan, mask)
    assert ready.image.shape == (2, 3, 4, 5)
    assert not ready.image.any()
    assert ready.indices is not None
    assert (restore(one_hot(ready.indices, 3), ready.trace, plan.labels) == 7).all()


def test_outside_the_crop_is_background() -> None:
    image = np.zeros((1, 4, 4, 4), dtype=np.float32)
    image[0, 1:3, 1:3, 1:3] = 1
    plan = make_plan((1, 1, 1))
    ready = prepared(Volume(image, Geometry((4, 4, 4), np.eye(4))), plan)
    found = restore(one_hot(np.ones((2, 2, 2), dtype=np.uint8), 3), ready.trace, plan.labels)
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
    ready = prepared(
        Volume(line(1, 2, 3, 4), Geometry((4, 1, 1), np.eye(4))), make_plan((1, 1, 1), labels=labels), mask
    )
    assert ready.indices is not None
    assert ready.indices.ravel().tolist() == [0, 1, 3, 2]
    assert restore(one_hot(ready.indices, 4), ready.trace, labels).ravel().tolist() == [0, 7, 9, 300]


def test_a_mask_that_does_not_fit_is_refused() -> None:
    volume = Volume(line(1, 2, 3, 4), Geometry((4, 1, 1), np.eye(4)))
    with pytest.raises(InputError, match=r"\[5\] have no name"):
        prepared(volume, make_plan((1, 1, 1)), np.array([0, 5, 0, 0]).reshape(4, 1, 1))
    with pytest.raises(GeometryMismatch, match=r"shape \(3, 1, 1\)"):
        prepared(volume, make_plan((1, 1, 1)), np.zeros((3, 1, 1), dtype=np.uint8))
