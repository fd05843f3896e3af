"""How the slices of a volume must lie: one orientation, one size, and even steps along one line. No pixels, no files.

Positions and directions are DICOM's (LPS, mm); the affine that comes out is RAS+. Tolerances are highdicom's, so that
what is accepted here can be written as DICOM SEG: neighbours within 1 % of the mean distance, and the line of slices
within 2.6 degrees of their normal (cosine 0.999). Positions that jitter by more only because they are rounded are put
on the line between the first and the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.geometry import Geometry

Float = NDArray[np.float64]

EVEN = 0.01
"""Neighbouring slices may be this part of the mean distance nearer or further."""
ROUNDED_MM = 0.002
"""... or this much where that is more, as positions are rounded to 0.001 mm by some scanners; a tenth at the most."""
COARSEST = 0.1
"""Half a unit of the decimals of positions may be this part of the distance, where slices are even but for rounding."""
DRIFT = 0.05
"""No slice may be further than this part of the distance from its place on an even grid."""
PERPENDICULAR = 1e-3
"""1 less the cosine between the line of slices and their normal, up to which they count as straight."""
PARALLEL = 1e-3
"""Largest difference of a direction cosine between slices of one orientation: 0.5 mm over 500 mm."""
UPRIGHT = 2e-3
"""Largest cosine between rows and columns: what rounding of directions to three decimals makes of 0."""
SAME_SIZE = 5e-4
"""Part by which pixel spacings of slices may differ: 0.7 mm are the 0.7001 mm of another computer's rounding."""
SAME_PLACE_MM = 0.01
"""Slices nearer than this, or than a tenth of a pixel, repeat a position."""
MAX_TILT = 45.0
"""Degrees; slices further from upright are no stack."""
MAX_FILLED = 3
"""An uneven stack that would need more than this many times its slices on an even grid is none."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNEVEN = "give --resample-irregular (`medseg predict`, `medseg stats`) to read it on an even grid"


@dataclass(frozen=True)
class Plane:
    """Where a slice lies: Image Position, Image Orientation (Patient) and Pixel Spacing of DICOM, and its size.

    Attributes:
        position: of the centre of the first pixel, mm.
        orientation: direction of a row (to the next column), then of a column.
        spacing: distance of rows, of columns, mm.
        rows, columns: size.
    """

    position: tuple[float, float, float]
    orientation: tuple[float, float, float, float, float, float]
    spacing: tuple[float, float]
    rows: int
    columns: int

    @property
    def normal(self) -> Float:
        """Unit vector from the slice to the next: row direction x column direction."""
        normal = np.cross(self.orientation[:3], self.orientation[3:])
        return np.asarray(normal / np.linalg.norm(normal))


@dataclass(frozen=True, eq=False)
class Stack:
    """How slices make a volume, or why they do not.

    Attributes:
        order: indices of the slices along their normal.
        geometry: of the array (columns, rows, slices); None where there is a reason.
        reason: why it is no volume.
        irregular: what is tilted or uneven, where ``mended`` can handle it.
        offsets: of every slice from the first along their line, mm, where uneven.
        warning: what was assumed.
        planes: the slices in their order; where their positions are rounded, on the even line that they mean.
    """

    order: tuple[int, ...] = ()
    geometry: Geometry | None = None
    reason: str = ""
    irregular: str = ""
    offsets: tuple[float, ...] = ()
    warning: str = ""
    planes: tuple[Plane, ...] = ()


def differing(planes: Sequence[Plane]) -> str:
    """Why slices are not parallel and of one size; empty where they are."""
    first = planes[0]
    x, y = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    if max(abs(np.linalg.norm(x) - 1), abs(np.linalg.norm(y) - 1)) > 1e-2 or abs(x @ y) > UPRIGHT:
        if (np.round(first.orientation, 2) == first.orientation).all() and abs(x @ y) < 10 * UPRIGHT:
            return "the directions of rows and columns are too coarsely rounded: they are not perpendicular"
        return "the directions of rows and columns are not perpendicular unit vectors"
    turned = np.abs(np.array([plane.orientation for plane in planes]) - first.orientation).max(axis=1)
    if turned.max() > PARALLEL:
        kinds = len({tuple(np.round(plane.orientation, 3)) for plane in planes})
        return f"slices of {max(2, kinds)} orientations, as those of a localizer"
    sizes = {(plane.columns, plane.rows) for plane in planes}
    if len(sizes) > 1:
        return f"slices of {len(sizes)} sizes: {', '.join(f'{c}x{r}' for c, r in sorted(sizes)[:4])} pixels"
    spacings = np.array([plane.spacing for plane in planes])
    if np.abs(spacings / spacings[0] - 1).max() > SAME_SIZE:
        return f"slices of several pixel sizes, {spacings.min():.4g} to {spacings.max():.4g} mm"
    return ""


def places(planes: Sequence[Plane]) -> NDArray[np.intp]:
    """For each of some parallel slices the number of its position, counted along the normal; repeated where equal."""
    offsets = _positions(planes) @ planes[0].normal
    order = np.argsort(offsets, kind="stable")
    steps = np.diff(offsets[order]) > _same_place(planes)
    numbers = np.empty(len(planes), dtype=np.intp)
    numbers[order] = np.concatenate([[0], np.cumsum(steps)])
    return numbers


def repeated(planes: Sequence[Plane]) -> str:
    """Which positions of some parallel slices are taken more than once; empty where none is."""
    numbers = places(planes)
    counts = np.bincount(numbers)
    if counts.max() == 1:
        return ""
    offsets = _positions(planes) @ planes[0].normal
    where = [float(offsets[numbers == number][0]) for number in np.flatnonzero(counts > 1)]
    listed = _listed(where)
    most = int(counts.max())
    if len(counts) == 1:
        return f"{most} images at the one position {listed}: no volume"
    return f"{len(where)} of {len(counts)} positions have up to {most} images each: {listed}"


def stack(planes: Sequence[Plane], step_mm: float = 0.0) -> Stack:
    """How slices make a volume.

    Args:
        planes: one or more slices, in any order.
        step_mm: distance of slices to take for a single one; 0 where it is not known.
    """
    if fault := differing(planes) or repeated(planes):
        return Stack(reason=fault)
    if len(planes) == 1:
        return _single(planes[0], step_mm)
    order = tuple(np.argsort(_positions(planes) @ planes[0].normal, kind="stable").tolist())
    laid, warning = _laid([planes[n] for n in order])
    found = _judged(laid)
    return replace(found, order=order, planes=tuple(laid), warning=warning if found.geometry else "")


def _judged(planes: Sequence[Plane]) -> Stack:
    """How slices in their order make a volume."""
    positions = _positions(planes)
    line, offsets = _line(positions)
    if fault := _off_line(positions, planes[0]):
        return Stack(reason=fault)
    tilt, uneven = _tilt(line, planes[0]), _uneven(offsets, positions @ planes[0].normal)
    kept = tuple(offsets.tolist()) if uneven else ()
    if uneven and _steps(offsets) > MAX_FILLED * len(planes):
        return Stack(reason=f"{uneven}: they lie too far apart for a volume", offsets=kept)
    if tilt or uneven:
        text = " and ".join(filter(None, (tilt, uneven)))
        return Stack(reason=f"{text}; {_UNEVEN}", irregular=text, offsets=kept)
    step = (positions[-1] - positions[0]) / (len(planes) - 1)
    return Stack(geometry=_geometry(planes[0], positions[0], step, len(planes)))


def mended(planes: Sequence[Plane]) -> Geometry:
    """The even grid for slices that ``stack`` calls irregular: along their line, with its ends at theirs.

    A tilt makes it a sheared grid, with every slice where it is. Uneven slices get the steps of their median distance.
    """
    laid = stack(planes).planes
    positions = _positions(laid)
    _, offsets = _line(positions)
    count = _steps(offsets) if _uneven(offsets, offsets) else len(planes)
    return _geometry(laid[0], positions[0], (positions[-1] - positions[0]) / (count - 1), count)


def _laid(planes: list[Plane]) -> tuple[list[Plane], str]:
    """Slices in their order as they are, or (said in a text) on the even line that their rounded positions mean."""
    positions = _positions(planes)
    _, offsets = _line(positions)
    if not (_off_line(positions, planes[0]) or _uneven(offsets, offsets)):
        return planes, ""
    units = np.array([_unit(axis) for axis in positions.T])
    mean = float(offsets[-1]) / (len(planes) - 1)
    if units @ planes[0].normal ** 2 / 2 > COARSEST * mean:
        return planes, ""
    if not all(_fits(axis, unit) for axis, unit in zip(positions.T, units, strict=True)):
        return planes, ""
    even = np.linspace(positions[0], positions[-1], len(planes)).tolist()
    laid = [replace(plane, position=tuple(place)) for plane, place in zip(planes, even, strict=True)]
    return laid, f"positions of slices are rounded to {units.max():g} mm: taken as even, {mean:.4g} mm apart"


def _unit(values: Float) -> float:
    """To what numbers are rounded: 0.1, 0.01 or 0.001, whichever is the first that all of them are multiples of."""
    return next((10.0**-n for n in (1, 2) if (np.round(values, n) == values).all()), 1e-3)


def _fits(values: Float, unit: float) -> bool:
    """Whether numbers are what rounding to a unit makes of some even ones.

    They are, if all are within half a unit of one line: if there is a slope from which no two numbers differ by more
    than a unit over the steps between them.
    """
    low, high = -np.inf, np.inf
    for steps in range(1, len(values)):
        gaps = values[steps:] - values[:-steps]
        low, high = max(low, (gaps.max() - unit) / steps), min(high, (gaps.min() + unit) / steps)
    return bool(low <= high + 1e-9)


def _positions(planes: Sequence[Plane]) -> Float:
    return np.array([plane.position for plane in planes], dtype=np.float64)


def _same_place(planes: Sequence[Plane]) -> float:
    return min(SAME_PLACE_MM, 0.1 * min(planes[0].spacing))


def _single(plane: Plane, step_mm: float) -> Stack:
    text = "one slice: its thickness is unknown, 1 mm is assumed" if not step_mm else "one slice"
    grid = _geometry(plane, np.array(plane.position), plane.normal * (step_mm or 1.0), 1)
    return Stack((0,), grid, warning=text, planes=(plane,))


def _line(positions: Float) -> tuple[Float, Float]:
    """Direction from the first slice to the last, and how far along it each of them lies, mm."""
    line = (positions[-1] - positions[0]) / np.linalg.norm(positions[-1] - positions[0])
    return line, (positions - positions[0]) @ line


def _off_line(positions: Float, plane: Plane) -> str:
    """Why slices do not lie behind one another."""
    line, offsets = _line(positions)
    angle = _angle(line, plane)
    if angle > MAX_TILT:
        return f"slices lie beside one another, {angle:.0f} degrees from their normal"
    aside = np.linalg.norm(positions - positions[0] - offsets[:, None] * line, axis=1)
    mean = offsets[-1] / (len(offsets) - 1)
    allowed = max(EVEN * mean, SAME_PLACE_MM)
    if aside.max() > allowed:
        where = float(positions[int(aside.argmax())] @ plane.normal)
        return f"slices do not lie on one line: that at {where:.2f} mm is {aside.max():.2f} mm beside it"
    return ""


def _angle(line: Float, plane: Plane) -> float:
    return float(np.degrees(np.arccos(np.clip(line @ plane.normal, -1.0, 1.0))))


def _tilt(line: Float, plane: Plane) -> str:
    if 1 - line @ plane.normal <= PERPENDICULAR:
        return ""
    return f"a gantry tilt of {_angle(line, plane):.1f} degrees: slices are not stacked along their normal"


def _uneven(offsets: Float, along: Float) -> str:
    """What is uneven about slices at some offsets; ``along`` says where they are in messages."""
    gaps = np.diff(offsets)
    mean = float(gaps.mean())
    drift = np.abs(offsets - np.linspace(offsets[0], offsets[-1], len(offsets))).max()
    allowed = max(EVEN * mean, min(ROUNDED_MM, 0.1 * mean))
    if np.abs(gaps - mean).max() <= allowed and drift <= DRIFT * mean:
        return ""
    usual = float(np.median(gaps))
    worst = np.flatnonzero(np.abs(gaps - usual) > EVEN * usual)
    worst = worst if len(worst) else np.array([int(np.abs(gaps - mean).argmax())])
    text = ", ".join(f"{gaps[n]:.2f} mm from {along[n]:.2f} to {along[n + 1]:.2f}" for n in worst[:4])
    more = f" and {len(worst) - 4} more" if len(worst) > 4 else ""
    return f"uneven distance of slices: usually {usual:.2f} mm, but {text}{more}"


def _steps(offsets: Float) -> int:
    """Slices of the even grid for uneven ones."""
    return round(float(offsets[-1] / np.median(np.diff(offsets)))) + 1


def _listed(values: Sequence[float]) -> str:
    text = ", ".join(f"{value:.2f}" for value in values[:4])
    return f"{text} mm" + (f" and {len(values) - 4} more" if len(values) > 4 else "")


def _geometry(plane: Plane, origin: Float, step: Float, count: int) -> Geometry:
    """Affine of PS3.3 C.7.6.2.1.1, with the step between slices as third column, turned from LPS to RAS+."""
    affine: NDArray[Any] = np.eye(4)
    affine[:3, 0] = np.array(plane.orientation[:3]) * plane.spacing[1]
    affine[:3, 1] = np.array(plane.orientation[3:]) * plane.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = origin
    return Geometry((plane.columns, plane.rows, count), _LPS_TO_RAS @ affine)
