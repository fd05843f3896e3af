"""medseg.io.dicom.stack: slices become a volume, or a reason in millimetres why they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.io.dicom import stack
from medseg.io.dicom.stack import Plane


def planes(*offsets: float, tilt: float = 0.0) -> list[Plane]:
    """Axial slices of 4 x 5 pixels (rows, columns) of 2 x 3 mm at z, each moved along y by ``tilt`` times z."""
    return [Plane((10.0, 20.0 + tilt * z, z), (1, 0, 0, 0, 1, 0), (2.0, 3.0), 4, 5) for z in offsets]


def test_the_affine_of_even_slices() -> None:
    found = stack.stack(planes(7.0, 1.0, 4.0))
    assert found.order == (1, 2, 0)
    assert found.geometry is not None
    assert found.geometry.shape == (5, 4, 3)
    # LPS (10, 20, 1) is RAS (-10, -20, 1); columns 3 mm apart run to -x, rows 2 mm apart to -y, slices 3 mm to +z
    expected = [[-3, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, 1], [0, 0, 0, 1]]
    np.testing.assert_allclose(found.geometry.affine, expected, atol=1e-12)
    assert (found.reason, found.irregular, found.offsets, found.warning) == ("", "", (), "")


def test_slices_follow_their_normal_also_downwards() -> None:
    turned = [replace(plane, orientation=(1, 0, 0, 0, -1, 0)) for plane in planes(0.0, 1.0, 2.0)]  # normal is -z
    found = stack.stack(turned)
    assert found.order == (2, 1, 0)
    assert found.geometry is not None
    np.testing.assert_allclose(found.geometry.affine[:3, 2], (0, 0, -1), atol=1e-12)


def test_one_slice_takes_the_step_that_it_is_given() -> None:
    known, unknown = stack.stack(planes(5.0), 2.5), stack.stack(planes(5.0))
    assert known.geometry is not None
    assert known.geometry.spacing == (3.0, 2.0, 2.5)
    assert known.warning == "one slice"
    assert unknown.geometry is not None
    assert unknown.geometry.spacing == (3.0, 2.0, 1.0)
    assert "1 mm is assumed" in unknown.warning


def test_a_gap_is_named_in_mm_and_can_be_filled() -> None:
    slices = planes(0.0, 5.0, 10.0, 20.0)
    found = stack.stack(slices)
    assert found.geometry is None
    assert "10.00 mm from 10.00 to 20.00" in found.reason
    assert "--resample-irregular" in found.reason
    assert found.irregular
    assert found.offsets == (0.0, 5.0, 10.0, 20.0)
    geometry = stack.mended(slices)
    assert geometry.shape == (5, 4, 5)  # 20 mm in steps of 5
    np.testing.assert_allclose(geometry.affine[:3, 2], (0, 0, 5))


def test_a_tilt_is_named_in_degrees_and_read_as_it_lies() -> None:
    slices = planes(0.0, 4.0, 8.0, tilt=0.25)
    found = stack.stack(slices)
    assert "14.0 degrees" in found.reason  # atan 0.25 = 14.04 degrees
    assert found.offsets == ()
    geometry = stack.mended(slices)
    assert geometry.shape == (5, 4, 3)
    np.testing.assert_allclose(geometry.affine[:3, 2], (0, -1, 4))


@pytest.mark.parametrize(
    ("offsets", "even"),
    [
        ((0.0, 5.0, 10.04, 15.0), True),  # neighbours 0.8 % off
        ((0.0, 5.0, 10.06, 15.0), False),  # 1.2 %
        ((0.0, 0.1, 0.2019, 0.3), True),  # positions rounded to 0.001 mm
        (
            (*np.arange(40) * 0.992, *(39 * 0.992 + 1.008 * np.arange(1, 41))),
            False,
        ),  # each 0.8 %, but a third of a slice in sum
    ],
)
def test_how_even_is_even(offsets: tuple[float, ...], even: bool) -> None:
    assert (stack.stack(planes(*offsets)).geometry is not None) == even


def test_repeated_positions_are_named() -> None:
    assert "4 images at the one position 61.50 mm" in stack.stack(planes(61.5, 61.5, 61.5, 61.5)).reason
    assert stack.stack(planes(0.0, 1.0, 1.001, 2.0)).reason == "1 of 3 positions have up to 2 images each: 1.00 mm"
    np.testing.assert_array_equal(stack.places(planes(2.0, 0.0, 2.004, 1.0)), (2, 0, 2, 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"orientation": (0, 1, 0, 0, 0, -1)}, "2 orientations"),
        ({"rows": 6}, "2 sizes: 5x4, 5x6 pixels"),
        ({"spacing": (2.0, 3.1)}, "several pixel sizes"),
        ({"position": (11.0, 20.0, 1.0)}, "one line"),
    ],
)
def test_slices_that_differ(change: dict[str, tuple[float, ...]], reason: str) -> None:
    slices = planes(0.0, 1.0, 2.0)
    slices[1] = replace(slices[1], **change)
    found = stack.stack(slices)
    assert reason in found.reason
    assert not found.irregular


def test_what_is_no_stack_at_all() -> None:
    beside = [replace(plane, position=(30.0 * n, 0.0, 0.1 * n)) for n, plane in enumerate(planes(0.0, 1.0, 2.0))]
    assert "beside one another" in stack.stack(beside).reason
    far = stack.stack(planes(0.0, 1.0, 2.0, 500.0))
    assert "too far apart" in far.reason
    assert not far.irregular
    skewed = [replace(plane, orientation=(1, 0, 0, 0.5, 0.8, 0)) for plane in planes(0.0, 1.0)]
    assert "not perpendicular" in stack.stack(skewed).reason


def test_rounded_directions() -> None:
    """Three decimals are enough; two make an axis that is 1 % off, 5 mm over 500."""
    turned = np.array([0.7526, 0.3923, -0.5289, -0.1843, 0.8980, 0.4038])  # perpendicular to 1e-4
    for digits, reason in ((4, ""), (3, ""), (2, "too coarsely rounded")):
        orientation: Any = tuple(np.round(turned, digits).tolist())
        normal = np.cross(orientation[:3], orientation[3:])
        slices = [Plane(tuple((k * normal).tolist()), orientation, (1.0, 1.0), 4, 5) for k in range(3)]
        assert reason in stack.stack(slices).reason
        assert bool(reason) == bool(stack.stack(slices).reason)


def test_the_worst_of_three_decimals_is_accepted() -> None:
    """All six cosines half a unit off, in the direction in which it adds up: 1.7e-3."""
    x, y = np.array([1, 1, 1]) / 3**0.5, np.array([1, 1, -2]) / 6**0.5
    off = np.concatenate([x + 5e-4 * np.sign(y), y + 5e-4 * np.sign(x)])
    assert 1e-3 < off[:3] @ off[3:] < stack.UPRIGHT
    assert not stack.differing([Plane((0, 0, 0), tuple(off.tolist()), (1.0, 1.0), 4, 5)])


def test_pixel_spacings_of_two_roundings() -> None:
    slices = planes(0.0, 1.0, 2.0)
    for spacing, ok in (((0.7, 0.7), True), ((0.7001, 0.7001), True), ((0.701, 0.701), False)):
        every = [replace(plane, spacing=(0.7, 0.7)) for plane in slices[:2]] + [replace(slices[2], spacing=spacing)]
        assert bool(stack.stack(every).geometry) == ok


@given(
    st.lists(st.floats(0.9, 1.1), min_size=1, max_size=8),
    st.floats(0.0, 0.1),
    st.sampled_from([(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (0.6, 0.8, 0, 0, 0, 1)]),
)
def test_what_is_accepted_highdicom_takes_for_a_volume(
    gaps: list[float], tilt: float, orientation: tuple[float, float, float, float, float, float]
) -> None:
    from highdicom.spatial import get_volume_positions

    normal, across = np.cross(orientation[:3], orientation[3:]), np.array(orientation[:3])
    offsets = np.concatenate([[0.0], np.cumsum(gaps)])
    positions = [tuple((offset * (normal + tilt * across)).tolist()) for offset in offsets]
    slices = [Plane(position, orientation, (1.0, 1.0), 4, 5) for position in positions]
    found = stack.stack(slices)
    spacing, order = get_volume_positions(positions, orientation)
    if found.warning:  # what rounding alone made uneven is even once it is put on its line
        spacing, order = get_volume_positions([plane.position for plane in found.planes], orientation)
        assert order in (list(range(len(slices))), list(range(len(slices)))[::-1])
    elif found.geometry is not None:
        assert spacing is not None
        assert order is not None
        assert [order[n] for n in found.order] in (list(range(len(slices))), list(range(len(slices)))[::-1])
    elif spacing is not None:  # stricter in one thing alone: what adds up
        assert "uneven" in found.reason


OBLIQUE = (0.8, 0.6, 0, 0, 0, -1)  # normal (-0.6, 0.8, 0)


def rounded(step: float, count: int, digits: int, orientation: Any = (1, 0, 0, 0, 1, 0)) -> list[Plane]:
    """Even slices from an odd origin whose positions are rounded to some digits."""
    step_mm = step * np.cross(orientation[:3], orientation[3:])
    places = np.round([-120.2875, 33.3333, 71.0625] + np.arange(count)[:, None] * step_mm, digits)
    return [Plane(tuple(place), orientation, (0.7, 0.7), 4, 5) for place in places.tolist()]


@pytest.mark.parametrize(
    ("step", "digits", "unit"), [(0.625, 1, "0.1"), (0.5333, 1, "0.1"), (0.3333, 2, "0.01"), (0.0777, 2, "0.01")]
)
@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), OBLIQUE])
@pytest.mark.parametrize("count", [9, 300])
def test_positions_that_jitter_for_they_are_rounded(
    step: float, digits: int, unit: str, orientation: Any, count: int
) -> None:
    """The corners stay where the file has them, and no slice goes further than its position may be from the truth."""
    slices = rounded(step, count, digits, orientation)
    found = stack.stack(slices[::-1])
    assert found.geometry is not None
    assert found.order == tuple(range(count))[::-1]
    affine = np.diag([-1, -1, 1, 1]) @ found.geometry.affine  # in LPS
    np.testing.assert_allclose(affine[:3, 3], slices[0].position, atol=1e-9)
    np.testing.assert_allclose(affine @ [0, 0, count - 1, 1], [*slices[-1].position, 1], atol=1e-9)
    laid = np.array([plane.position for plane in found.planes])
    assert np.abs(laid - [plane.position for plane in slices]).max() <= 10.0**-digits + 1e-9
    np.testing.assert_allclose(laid, affine[:3, 3] + np.arange(count)[:, None] * affine[:3, 2], atol=1e-9)
    assert found.warning.startswith(f"positions of slices are rounded to {unit} mm: taken as even")


def test_rounding_in_three_tenths_of_a_millimetre_is_too_much() -> None:
    assert "uneven" in stack.stack(rounded(0.3333, 30, 1)).reason  # half a unit is 15 % of the distance
    assert "uneven" in stack.stack(rounded(5.3333, 30, 0)).reason  # whole millimetres are none that scanners round to


@pytest.mark.parametrize("change", [0.2, -0.2, 0.06])
def test_more_than_rounding_is_uneven(change: float) -> None:
    slices = rounded(0.625, 30, 1)
    x, y, z = slices[9].position
    slices[9] = replace(slices[9], position=(x, y, round(z + change, 3)))
    found = stack.stack(slices)
    assert "uneven" in found.reason
    assert found.planes == tuple(slices)
    del slices[9]
    assert "uneven" in stack.stack(slices).reason  # one that is missing


def test_a_tilt_with_rounded_positions_is_a_tilt_alone() -> None:
    places = np.round([[10.0, 20 + 0.25 * z, z] for z in np.arange(20) * 0.625], 1).tolist()
    slices = [replace(planes(0.0)[0], position=tuple(place)) for place in places]
    found = stack.stack(slices)
    assert found.irregular.startswith("a gantry tilt of 14.")
    assert "uneven" not in found.irregular
    assert stack.mended(slices).shape == (5, 4, 20)


@given(
    st.floats(0.5, 5.0),
    st.floats(-300, 300),
    st.integers(2, 60),
    st.sampled_from([(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), OBLIQUE]),
)
def test_no_even_stack_is_refused_for_its_positions_are_rounded(
    step: float, origin: float, count: int, orientation: Any
) -> None:
    normal = np.cross(orientation[:3], orientation[3:])
    places = np.round(origin + np.arange(count)[:, None] * step * normal, 1).tolist()
    slices = [Plane(tuple(place), orientation, (0.7, 0.7), 4, 5) for place in places]
    assert stack.stack(slices).geometry is not None or step * count < 4  # few: a tilt, by the rounding of two corners
