"""What every view of a case has in common: one grid in a standard order, the place to look at, and the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryMismatch
from medseg.geometry import Box, Float, Geometry, Reorientation
from medseg.io import describe_grid
from medseg.io.picture import picture_grid
from medseg.volume import Labels, Mask, Volume

Voxel = tuple[int, int, int]

_DARKEST, _BRIGHTEST = 0.5, 99.5  # percentiles
_AIR_HU = -500.0
_CT_MARGIN_HU = 150.0
_SOFT_TISSUE_HU = (-160.0, 240.0)


class Window(NamedTuple):
    """The intensities that are shown black and white."""

    low: float
    high: float

    def shades(self, values: NDArray[Any]) -> Float:
        """Intensities as 0 (black) to 1 (white); what is not a number is black."""
        part = (np.asarray(values, dtype=np.float64) - self.low) / (self.high - self.low)
        return np.nan_to_num(np.clip(part, 0.0, 1.0), nan=0.0)


@dataclass(frozen=True, eq=False)
class View:
    """A case whose axes run to the patient's right, front and head, as nearly as those of its own grid do.

    The arrays are views of those of the case, not copies.

    Attributes:
        grid: of all arrays.
        turn: what turned the axes of the case so.
        image: (C, I, J, K), the colours of a picture or one channel; None where there is no image.
        reference: label values (I, J, K); None where there is no reference.
        prediction: likewise.
        is_picture: whether it is a picture (.png and the like), which has no sides of a patient.
    """

    grid: Geometry
    turn: Reorientation
    image: NDArray[Any] | None
    reference: NDArray[Any] | None
    prediction: NDArray[Any] | None
    is_picture: bool

    @classmethod
    def of(cls, image: Volume | None, reference: Mask | None, prediction: Mask | None) -> View:
        """The view of a case.

        Raises:
            GeometryMismatch: the parts do not lie on one grid.
            ValueError: there is none of the three.
        """
        own = _common_grid(image, reference, prediction)
        turn, is_picture = own.to("RAS"), _is_picture(own)
        channels = 3 if image is not None and is_picture and len(image.array) == 3 else 1
        return cls(
            own.reoriented(turn),
            turn,
            None if image is None else turn.apply(image.array[:channels]),
            None if reference is None else turn.apply(reference.array),
            None if prediction is None else turn.apply(prediction.array),
            is_picture,
        )

    @property
    def masks(self) -> tuple[NDArray[Any], ...]:
        """Those that there are, the reference first."""
        return tuple(mask for mask in (self.reference, self.prediction) if mask is not None)

    def worst_place(self, labels: Labels) -> Voxel:
        """For each axis the slice in which reference and prediction differ in most voxels.

        Without both, or where they agree everywhere, the slice with most voxels marked (by the reference, if it marks
        any), and where nothing is marked the middle; of equal slices the middle one. Voxels that the reference or the
        prediction has as ``Labels.ignore`` are no difference, and values without a name are background.
        """
        pairs = [self.masks] if len(self.masks) == 2 else []
        for first, second in [*pairs, *((mask, _nothing(mask)) for mask in self.masks)]:
            counts = _differing(first, second, labels)
            if counts[0].any():
                return _middle([np.flatnonzero(along == along.max()) for along in counts])
        return _middle([np.arange(n) for n in self.grid.shape])

    def marked_box(self, labels: Labels) -> Box | None:
        """The smallest box around all that the masks mark; None where that is nothing."""
        counts = [_differing(mask, _nothing(mask), labels) for mask in self.masks]
        totals = [np.sum(along, axis=0) for along in zip(*counts, strict=True)]
        if not totals or not totals[0].any():
            return None
        hits = [np.flatnonzero(total) for total in totals]
        return Box(tuple(int(hit[0]) for hit in hits), tuple(int(hit[-1]) + 1 for hit in hits))

    def window(self, place: Voxel, shown: NDArray[Any], marks: Sequence[NDArray[np.bool_]]) -> Window:
        """One window for all that is shown of the image.

        As ``window_of``, but for CT, where air and bone would leave all soft tissue one grey. There the structures tell
        what is looked for: their 5th to 95th percentile with a margin, as wide as that range and 150 HU at least, and
        fat is never black: about -160 to 270 HU for a liver, -1200 to -300 for a lung. Where nothing is marked it is
        soft tissue. A CT is known by values that only air has in HU.

        Args:
            place: a voxel; the whole slices through it tell whether it is a CT.
            shown: intensities (C, ...) that are shown.
            marks: which of them (...) each mask marks; the first that marks anything tells the structures.
        """
        if not self._is_ct(place):
            return window_of(shown)
        inside = next((found for mark in marks if len(found := _finite(shown[0][mark]))), np.zeros(0))
        return _ct_window(inside)

    def _is_ct(self, place: Voxel) -> bool:
        if self.image is None or self.is_picture:
            return False
        slices = (across(self.image[0], axis, n) for axis, n in enumerate(place))
        return any(bool((_finite(shown) < _AIR_HU).any()) for shown in slices)


def window_of(values: NDArray[Any]) -> Window:
    """A window of all but the darkest and brightest few intensities."""
    finite = _finite(values)
    if not len(finite):
        return Window(0.0, 1.0)
    low, high = np.percentile(finite, (_DARKEST, _BRIGHTEST)).tolist()
    if low == high:
        low, high = float(finite.min()), float(finite.max())
    return Window(low, high if high > low else low + max(1.0, abs(low)))


def across(array: NDArray[Any], axis: int, n: int) -> NDArray[Any]:
    """Slice ``n`` across one of the last three axes of an array (a view, no copy)."""
    return np.asarray(np.moveaxis(array, axis - 3, 0)[n])


def _common_grid(image: Volume | None, reference: Mask | None, prediction: Mask | None) -> Geometry:
    every: list[tuple[str, Volume | Mask | None]]
    every = [("image", image), ("reference", reference), ("prediction", prediction)]
    given = [(what, part) for what, part in every if part is not None]
    if not given:
        raise ValueError("there is neither an image nor a mask to show")
    (name, first), *others = given
    for what, part in others:
        if not part.geometry.close_to(first.geometry):
            raise GeometryMismatch(
                part.paths[0] if part.paths else what,
                f"grid {describe_grid(part)} differs from the {name}'s",
                describe_grid(first),
                "show a mask on the image that it was made of; nothing is resampled here",
            )
    return first.geometry


def _is_picture(grid: Geometry) -> bool:
    return grid.shape[2] == 1 and any(picture_grid(grid.shape, tag).close_to(grid) for tag in range(1, 9))


def _middle(slices: Sequence[NDArray[Any]]) -> Voxel:
    """The middle one of some slices along each axis."""
    i, j, k = (int(numbers[len(numbers) // 2]) for numbers in slices)
    return i, j, k


def _nothing(mask: NDArray[Any]) -> NDArray[Any]:
    """An empty mask of the same shape that takes no memory."""
    return np.broadcast_to(np.zeros_like(mask, shape=()), mask.shape)


def _differing(first: NDArray[Any], second: NDArray[Any], labels: Labels) -> list[NDArray[np.int64]]:
    """For each axis, in how many voxels of each slice two masks differ.

    Slab by slab as they lie in memory, without an array of the masks' size.
    """
    slowest = int(np.argmax(np.abs(first.strides)))
    slabs, others = np.moveaxis(first, slowest, 0), np.moveaxis(second, slowest, 0)
    along, across = np.zeros(len(slabs), np.int64), np.zeros(slabs.shape[1:], np.int64)
    for n, (a, b) in enumerate(zip(slabs, others, strict=True)):
        differ = a != b
        if differ.any():
            differ[differ] = _count_as_different(a[differ], b[differ], labels)
            along[n] = np.count_nonzero(differ)
            across += differ
    counts = [across.sum(axis=1), across.sum(axis=0)]
    counts.insert(slowest, along)
    return counts


def _count_as_different(first: NDArray[Any], second: NDArray[Any], labels: Labels) -> NDArray[np.bool_]:
    """Whether values (n,) differ that have a name; ``Labels.ignore`` differs from nothing."""
    named = list(labels.values.values())
    different = np.where(np.isin(first, named), first, 0) != np.where(np.isin(second, named), second, 0)
    if labels.ignore is not None:
        different &= (first != labels.ignore) & (second != labels.ignore)
    return np.asarray(different)


def _ct_window(inside: Float) -> Window:
    """See ``View.window``; ``inside`` are the values of the structures."""
    if not len(inside):
        return Window(*_SOFT_TISSUE_HU)
    low, high = np.percentile(inside, (5.0, 95.0)).tolist()
    margin = max(_CT_MARGIN_HU, high - low)
    return Window(min(low - margin, _SOFT_TISSUE_HU[0]), high + margin)


def _finite(values: NDArray[Any]) -> Float:
    """The values (n,) that are numbers."""
    return np.asarray(values[np.isfinite(values)], dtype=np.float64)
