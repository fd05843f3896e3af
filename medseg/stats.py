"""Statistics: what a mask marks, label by label: volume, pieces, place, and the intensities of the image there.

Measured on the grid that the files have; nothing is resampled. Needs no model and no torch.
"""

from __future__ import annotations

import csv
import io as text_io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.cases import find_cases, find_masks
from medseg.dataset import Case
from medseg.errors import GeometryMismatch, InputError, MedsegError
from medseg.geometry import Geometry
from medseg.io import describe_grid, read_mask, read_volume
from medseg.postprocess import piece_sizes
from medseg.progress import Progress, silent
from medseg.records import Record, write_text
from medseg.volume import Labels, Mask, Volume

DEFINITIONS = {
    "volume_ml": "voxels times the volume of one, which is the determinant of the affine",
    "mean, sd": "of the intensities of the voxels; sd is that of these voxels (divided by n, not by n - 1)",
    "p05 to p95, median": "exact percentiles, linear between the two nearest ranks (Hyndman and Fan's definition 7, "
    "numpy's usual one)",
    "components": "pieces of voxels that share a face, an edge or a corner (26 neighbours; 8 in a picture)",
    "largest_component_ml": "volume of the largest piece",
    "box": "voxel indices on the mask's grid, start inclusive, stop exclusive",
    "centroid": "mean position of the voxel centres, mm, in RAS+ coordinates as in NIfTI",
    "touches_border": "faces of the image that the label reaches, by anatomy; an axis of a single voxel has none",
}
"""What each number means."""

FACES = {"L": "left", "R": "right", "P": "posterior", "A": "anterior", "I": "inferior", "S": "superior"}
_PERCENTS = (0.0, 5.0, 25.0, 50.0, 75.0, 95.0, 100.0)
_CHUNK = 1 << 20
"""Voxels whose squares are summed at a time."""

Voxels = tuple[int, int, int]


class Intensities(Record):
    """Intensities of one channel within a label; see ``DEFINITIONS``."""

    mean: float
    sd: float
    minimum: float
    p05: float
    p25: float
    median: float
    p75: float
    p95: float
    maximum: float


class LabelStats(Record):
    """What a mask marks with one label (or region); see ``DEFINITIONS``.

    Attributes:
        label: its name.
        values: its integer; of a region those that it unites.
        voxels, volume_ml: how large it is.
        components: pieces; 0 of an empty label.
        largest_component_ml: volume of the largest of them.
        box_start, box_stop: the smallest box that holds it; None of an empty label.
        centroid_mm: (x, y, z); None of an empty label.
        touches_border: faces of the image, of ``FACES``.
        intensities: one a channel; none of an empty label, or where there is no image.
    """

    label: str
    values: tuple[int, ...]
    voxels: int = 0
    volume_ml: float = 0.0
    components: int = 0
    largest_component_ml: float = 0.0
    box_start: Voxels | None = None
    box_stop: Voxels | None = None
    centroid_mm: tuple[float, float, float] | None = None
    touches_border: tuple[str, ...] = ()
    intensities: tuple[Intensities, ...] = ()


class CaseStats(Record):
    """One case.

    Attributes:
        case: its id.
        labels: one a label, then one a region.
        reason: why it could not be measured; empty where it could.
    """

    case: str
    labels: tuple[LabelStats, ...] = ()
    reason: str = ""


class CohortStats(Record):
    """Many cases.

    Attributes:
        definitions: of every number.
        cases: one a mask, by name.
        without_mask: ids of images that have no mask.
    """

    definitions: dict[str, str] = DEFINITIONS
    cases: tuple[CaseStats, ...]
    without_mask: tuple[str, ...] = ()

    @property
    def failed(self) -> dict[str, str]:
        """The cases that could not be measured, and why."""
        return {case.case: case.reason for case in self.cases if case.reason}

    def save_csv(self, path: Path) -> None:
        """Write the table of ``as_csv``, atomically."""
        write_text(path, self.as_csv())

    def as_csv(self) -> str:
        """A table with one row a case and label; of a failed case one row with its reason.

        Of a mask without names that marks nothing there is one row too, with neither label nor reason. What is not
        known (the intensities of an empty label) is left empty. Intensities are rounded to six digits; of images of
        several channels, their columns end in the channel's number, from 0.
        """
        text = text_io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        channels = max((len(s.intensities) for case in self.cases for s in case.labels), default=1) or 1
        names = list(Intensities.model_fields)
        measured = names if channels == 1 else [f"{name}_{n}" for n in range(channels) for name in names]
        writer.writerow(["case", "label", "value", *_COLUMNS, *measured, "reason"])
        for case in self.cases:
            for stats in case.labels:
                numbers = (number for channel in stats.intensities for number in channel.model_dump().values())
                found = [f"{number:.6g}" for number in numbers]
                found += [""] * (len(measured) - len(found))
                values = "+".join(map(str, stats.values))
                writer.writerow([case.case, stats.label, values, *_cells(stats), *found, ""])
            if not case.labels:
                blank = [""] * (2 + len(_COLUMNS) + len(measured))
                writer.writerow([case.case, *blank, " ".join(case.reason.split())])
        return text.getvalue()


_COLUMNS = (
    *("voxels", "volume_ml", "components", "largest_component_ml"),
    *(f"box_{end}_{axis}" for end in ("start", "stop") for axis in "ijk"),
    *("centroid_x_mm", "centroid_y_mm", "centroid_z_mm", "touches_border"),
)


def measure(image: Volume | None, mask: Mask) -> tuple[LabelStats, ...]:
    """Measure every label and region of a mask.

    Beside image and mask this takes a byte a voxel of the mask, and for one label after the other two bytes a voxel of
    its box and its intensities once.

    Args:
        image: (C, I, J, K) on the grid of the mask; None for the mask alone.
        mask: its labels say what is measured; without labels every value but 0 is, as ``label_<value>``.

    Returns:
        One a label by its integer, then one a region. An empty label has 0 voxels, no place and no intensities; a mask
        without labels that is empty gives none. Voxels of ``Labels.ignore`` are in no number.

    Raises:
        GeometryMismatch: image and mask lie on different grids.
        InputError: the mask holds a value without a name, or (without labels) more than 254 values.
    """
    if image is not None and not mask.geometry.close_to(image.geometry):
        raise GeometryMismatch(
            mask.paths[0] if mask.paths else "mask",
            f"grid {describe_grid(mask)} differs from the image's",
            describe_grid(image),
            "measure a mask on the image that it was made of; nothing is resampled here",
        )
    labels = mask.labels or _found(mask)
    if labels is None:
        return ()
    indices = np.empty(mask.array.shape, dtype=np.uint8)
    for plane, numbered in zip(mask.array, indices, strict=True):  # a look-up takes eight bytes a voxel meanwhile
        numbered[...] = labels.to_indices(plane, mask.paths[0] if mask.paths else "mask")
    boxes = ndimage.find_objects(indices, labels.count - 1)
    numbers = {labels.values[name]: index for index, name in enumerate(labels.names, start=1)}
    groups = {name: (labels.values[name],) for name in labels.names} | labels.regions
    return tuple(
        _measured(
            LabelStats(label=name, values=values), image, indices, mask.geometry, boxes, [numbers[v] for v in values]
        )
        for name, values in groups.items()
    )


def measure_folders(
    images: Path | str | Sequence[Path | str],
    masks: Path,
    labels: Labels | None = None,
    progress: Progress = silent,
    *,
    series: Sequence[str] = (),
    resample_irregular: bool = False,
) -> CohortStats:
    """Measure every mask on the image of its name (endings aside).

    Args:
        images: where the images are, as ``medseg.cases.find_cases`` takes it.
        masks: a folder of masks, or one mask. One image and one mask are a pair whatever their names.
        labels: names of the values; without them those that each file knows, else ``label_<value>``.
        progress: called after each case.
        series: which DICOM series are meant, as ``find_cases`` takes it.
        resample_irregular: likewise.

    Returns:
        One a mask. A DICOM SEG or ``.seg.nrrd`` is first turned, cut and padded to the image's grid, if both have the
        same voxels. A case that cannot be measured (no image of its name, another grid, a damaged file) has its reason
        and stops no other.

    Raises:
        InputError: no image or mask is found, or no two have a name in common.
        DatasetError: a dataset.json that cannot be used.
    """
    places = [images] if isinstance(images, Path | str) else images
    cases = {case.id: case for case in find_cases(*places, series=series, resample_irregular=resample_irregular)}
    found = find_masks(masks)
    if len(cases) == len(found) == 1:
        cases = dict(zip(found, cases.values(), strict=True))
    if not set(cases) & set(found):
        raise InputError(masks, f"no mask has the name of an image: {min(found)}, ...", f"names as {min(cases)}")
    rows: list[CaseStats] = []
    for name, path in found.items():
        rows.append(_measure_case(name, cases.get(name), path, labels))
        progress("measuring", len(rows) / len(found), name)
    return CohortStats(cases=tuple(rows), without_mask=tuple(sorted(set(cases) - set(found))))


def _found(mask: Mask) -> Labels | None:
    """Labels for the values of a mask, ``label_<value>`` each; None where it is empty.

    Raises:
        InputError: it holds more than 254 values.
    """
    values = set(mask.counts()) - {0}
    return Labels.numbered(values, mask.paths[0] if mask.paths else "mask") if values else None


def _measure_case(name: str, case: Case | None, path: Path, labels: Labels | None) -> CaseStats:
    if case is None:
        return CaseStats(case=name, reason=f"{path}: there is no image of this name")
    try:
        image = read_volume(case.images)
        mask = read_mask(path, labels, image)
        return CaseStats(case=name, labels=measure(image, mask))
    except MedsegError as failure:
        return CaseStats(case=name, reason=str(failure))


def _measured(
    empty: LabelStats,
    image: Volume | None,
    indices: NDArray[np.uint8],
    grid: Geometry,
    boxes: Sequence[tuple[slice, ...] | None],
    numbers: Sequence[int],
) -> LabelStats:
    """One label: ``numbers`` are its indices, ``boxes`` those of all labels."""
    own = [box for n in numbers if (box := boxes[n - 1]) is not None]
    if not own:
        return empty
    box = tuple(slice(min(s.start for s in along), max(s.stop for s in along)) for along in zip(*own, strict=True))
    inside = indices[box] == numbers[0]
    for number in numbers[1:]:
        inside |= indices[box] == number
    along = [np.count_nonzero(inside, axis=others) for others in ((1, 2), (0, 2), (0, 1))]
    voxels = int(along[0].sum())
    centre = [float(n @ np.arange(s.start, s.stop)) / voxels for n, s in zip(along, box, strict=True)]
    x, y, z = (float(mm) for mm in grid.world(np.array([centre]))[0])
    pieces = piece_sizes(inside.view(np.uint8), (1,))
    return empty.model_copy(
        update={
            "voxels": voxels,
            "volume_ml": voxels * grid.voxel_volume_ml,
            "components": len(pieces),
            "largest_component_ml": int(pieces[0]) * grid.voxel_volume_ml,
            "box_start": tuple(s.start for s in box),
            "box_stop": tuple(s.stop for s in box),
            "centroid_mm": (x, y, z),
            "touches_border": _touched(box, grid),
            "intensities": () if image is None else tuple(_intensities(c[box][inside]) for c in image.array),
        }
    )


def _touched(box: Sequence[slice], grid: Geometry) -> tuple[str, ...]:
    """Faces of the grid that a box reaches, in the order of ``FACES``."""
    towards = grid.orientation
    away = "".join(letter.translate(str.maketrans("LRPAIS", "RLAPSI")) for letter in towards)
    found = {back for back, s, size in zip(away, box, grid.shape, strict=True) if size > 1 and s.start == 0}
    found |= {front for front, s, size in zip(towards, box, grid.shape, strict=True) if size > 1 and s.stop == size}
    return tuple(word for letter, word in FACES.items() if letter in found)


def _intensities(values: NDArray[Any]) -> Intensities:
    """The statistics of values (n,), one at least, which are reordered."""
    mean = float(values.mean(dtype=np.float64))
    squares = sum(
        float(np.square(values[start : start + _CHUNK].astype(np.float64) - mean).sum())
        for start in range(0, len(values), _CHUNK)
    )
    ranks = [(len(values) - 1) * percent / 100.0 for percent in _PERCENTS]
    values.partition(sorted({int(r) for r in ranks} | {int(np.ceil(r)) for r in ranks}))
    low, p05, p25, median, p75, p95, high = (
        float(values[int(r)]) + (r - int(r)) * (float(values[int(np.ceil(r))]) - float(values[int(r)])) for r in ranks
    )
    return Intensities(
        mean=mean,
        sd=float(np.sqrt(squares / len(values))),
        minimum=low,
        p05=p05,
        p25=p25,
        median=median,
        p75=p75,
        p95=p95,
        maximum=high,
    )


def _cells(stats: LabelStats) -> Iterator[Any]:
    """The cells of ``_COLUMNS``."""
    yield from (stats.voxels, round(stats.volume_ml, 6), stats.components, round(stats.largest_component_ml, 6))
    for place in (stats.box_start, stats.box_stop, stats.centroid_mm):
        yield from ("", "", "") if place is None else (round(n, 4) for n in place)
    yield "+".join(stats.touches_border)
