"""Quality: flags of predicted cases that a person should look at first.

Flags are heuristics. They compare a mask with the cases that the model was trained on, and say what is unusual. A case
without flags may be wrong, and one with flags may be right. The flags of a case are short texts, ``kind:subject`` or
``kind:subject:detail``; colons, semicolons and percent signs within names are written as %3A, %3B and %25.

================================  ==================================================================================
``empty:LABEL``                   the mask marks no voxel with the label
``touches_border:LABEL:FACES``    it reaches the faces of the image: ``left``, ``right``, ``posterior``,
                                  ``anterior``, ``inferior``, ``superior``, joined by ``+``; the organ may be cut
``volume:LABEL:low`` or high      see ``VOLUME_FACTOR``
``components:LABEL:N``            N pieces, more than the label has in any training case
``spacing:AXIS:low`` or high      see ``SPACING_FACTOR``; the axes are x (left to right), y (back to front), z (up)
``intensity:CHANNEL:low`` or high see ``Sample.medians``
``margin:LABEL:M``                the mean softmax margin M of its voxels is below ``LOW_MARGIN``
================================  ==================================================================================

All but ``empty``, ``touches_border`` and ``margin`` need the ranges of the training data, which packages of
``medseg run`` hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medseg.fingerprint import Fingerprint
from medseg.geometry import Geometry
from medseg.records import Record

NOTICE = "qc_flags are heuristics: a case without flags may be wrong, and one with flags may be right."

VOLUME_FACTOR = 1.5
"""A volume is flagged below the smallest of the training cases divided by this, or above the largest times this.

The range of n cases misses 2 in n + 1 new ones: of ten cases every sixth would be flagged without a margin. Sizes of
organs are about log-normal, with a spread of a quarter: half as large again is one and a half such spreads more."""
SPACING_FACTOR = 1.1
"""A spacing is flagged below the smallest of the training cases divided by this, or above the largest times this.

Protocols differ by less from visit to visit, and resampling makes up for it."""
LOW_MARGIN = 0.8
"""Mean difference of the two largest probabilities below which a label is flagged.

Of 40 held-out cases of the Decathlon's hippocampus (Dice 0.82 to 0.94), whose lowest mean is 0.91, none is flagged. Of
20 of them turned by 90 degrees, with slices in random order, or with noise alone all are flagged (mean Dice below
0.17), of mirrored ones 18 (0.14), of noisy ones 7 (0.70). Structures that are mostly outline, as small lesions, have
lower means."""
SAMPLES = 2**20
"""Voxels of an image that are kept, at the most about, to be looked at again when its mask is there."""


class Measured(Protocol):
    """What is looked at of a label: as ``medseg.stats.LabelStats``."""

    @property
    def label(self) -> str:
        """Its name."""

    @property
    def voxels(self) -> int:
        """How many it has."""

    @property
    def volume_ml(self) -> float:
        """How large it is."""

    @property
    def components(self) -> int:
        """Connected pieces."""

    @property
    def touches_border(self) -> tuple[str, ...]:
        """Faces of the image that it reaches."""


class Range(Record):
    """From the least to the largest."""

    low: float
    high: float

    def side(self, value: float, factor: float = 1.0) -> str:
        """``low`` or ``high`` where a value lies outside of the range, widened by a factor, else nothing."""
        return "low" if value < self.low / factor else "high" if value > self.high * factor else ""


class Ranges(Record):
    """What the training cases of a model are like.

    Attributes:
        cases: how many there are.
        spacing_mm: along x, y and z (left to right, back to front, up) of the images turned to RAS.
        volumes_ml: by label, of the cases that have it; 0 to 0 where none has.
        components: by label, most connected pieces in any case; of labels where that was measured.
        intensities: of each channel, percentiles 0.5 and 99.5 of the labelled voxels, every case with the same weight.
    """

    cases: int
    spacing_mm: tuple[Range, Range, Range]
    volumes_ml: dict[str, Range]
    components: dict[str, int]
    intensities: tuple[Range, ...]


def ranges_of(fingerprint: Fingerprint) -> Ranges:
    """The ranges of the data that a fingerprint was measured on; it has one case at least."""
    x, y, z = (
        Range(low=min(along), high=max(along))
        for along in zip(*(case.spacing_mm for case in fingerprint.cases), strict=True)
    )
    found = fingerprint.classes
    return Ranges(
        cases=len(fingerprint.cases),
        spacing_mm=(x, y, z),
        volumes_ml={name: Range(low=c.volume_ml_minimum, high=c.volume_ml_maximum) for name, c in found.items()},
        components={name: c.components_maximum for name, c in found.items() if c.components_maximum is not None},
        intensities=tuple(Range(low=c.percentile_00_5, high=c.percentile_99_5) for c in fingerprint.intensities),
    )


@dataclass(frozen=True)
class Sample:
    """Every n-th voxel of an image, to be looked at when its mask is there and the image is gone.

    Attributes:
        values: (C, i, j, k).
        steps: n, along each axis.
    """

    values: NDArray[Any]
    steps: tuple[int, int, int]

    @classmethod
    def of(cls, array: NDArray[Any]) -> Sample:
        """A sample of about ``SAMPLES`` voxels of (C, I, J, K) at the most; of smaller images it is the whole."""
        steps = [1, 1, 1]
        shape = list(array.shape[1:])
        while np.prod(shape, dtype=float) > SAMPLES:
            axis = int(np.argmax(shape))  # the longest goes first: flat images keep their slices
            steps[axis] += 1
            shape[axis] = -(-array.shape[1 + axis] // steps[axis])
        i, j, k = steps
        return cls(array[:, ::i, ::j, ::k].copy(), (i, j, k))

    def medians(self, mask: NDArray[Any]) -> tuple[float, ...]:
        """Median intensity of each channel where the mask (I, J, K) of the image is not 0; none where it is 0."""
        i, j, k = self.steps
        inside = mask[::i, ::j, ::k] != 0
        return tuple(float(np.median(channel[inside])) for channel in self.values) if inside.any() else ()


def flags(
    labels: Sequence[Measured],
    grid: Geometry,
    channels: Sequence[tuple[str, float]],
    margins: Mapping[str, float],
    ranges: Ranges | None,
) -> tuple[str, ...]:
    """What is unusual about a predicted case.

    Args:
        labels: what the mask marks.
        grid: of the image.
        channels: name of each, and median intensity of the voxels that the mask marks; none where it marks nothing.
        margins: by label (or region), the mean softmax margin of its voxels, of those that have some.
        ranges: of the training cases; None where they are not known.

    Returns:
        Flags, those of the whole image first, then label by label; see the module.
    """
    found = list(_of_image(grid, channels, ranges)) if ranges else []
    for label in labels:
        found += _of_label(label, ranges)
    found += [_flag("margin", name, f"{margin:.2f}") for name, margin in margins.items() if margin < LOW_MARGIN]
    return tuple(found)


def _of_image(grid: Geometry, channels: Sequence[tuple[str, float]], ranges: Ranges) -> Iterator[str]:
    spacing = grid.reoriented(grid.to("RAS")).spacing
    for axis, mm, known in zip("xyz", spacing, ranges.spacing_mm, strict=True):
        if side := known.side(mm, SPACING_FACTOR):
            yield _flag("spacing", axis, side)
    for (name, median), known in zip(channels, ranges.intensities, strict=False):
        if side := known.side(median):
            yield _flag("intensity", name, side)


def _of_label(label: Measured, ranges: Ranges | None) -> Iterator[str]:
    if not label.voxels:
        yield _flag("empty", label.label)
        return
    if label.touches_border:
        yield _flag("touches_border", label.label, "+".join(label.touches_border))
    volume = ranges.volumes_ml.get(label.label) if ranges else None
    if volume and (side := volume.side(label.volume_ml, VOLUME_FACTOR)):
        yield _flag("volume", label.label, side)
    most = ranges.components.get(label.label) if ranges else None
    if most is not None and label.components > most:
        yield _flag("components", label.label, str(label.components))


def _flag(kind: str, *parts: str) -> str:
    escaped = (part.replace("%", "%25").replace(":", "%3A").replace(";", "%3B") for part in parts)
    return ":".join((kind, *escaped))
