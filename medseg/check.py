"""The check of a dataset, or of images alone: every fault of every case, named at once, with a remedy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.dataset import Case, Dataset, Finding, Findings, short_name
from medseg.errors import GeometryMismatch, InputError, MedsegError
from medseg.geometry import Geometry
from medseg.io import (
    describe_grid,
    finite_float32,
    format_of,
    has_segments,
    integral,
    is_picture,
    own_labels,
    read_mask,
    read_volume,
)
from medseg.progress import Progress, silent, track
from medseg.volume import Labels, Volume

FOREIGN_GROUP = 4
"""Fewest cases among which one can be called foreign."""
FOREIGN_MEAN_FACTOR = 4.0
"""A grid is foreign where the mean over the axes of spacing or extent is this many times the median case's. Distances
of CT slices from 0.8 to 8 mm change the mean spacing by 2.2."""
FOREIGN_AXIS_FACTOR = 12.0
"""... or where one axis by itself is this many times off: more than any mixture of slice distances (0.6 to 8 mm from a
median of 1 or 5 mm), less than a unit mistaken for another."""
FOREIGN_SPREADS = 6.0
"""... and it also lies this many robust standard deviations from the median, so that a dataset which is varied by
nature has no foreign cases."""
FOREIGN_NEGATIVE = (0.001, 0.1)
"""Fractions of negative voxels that count as none and as many: the one mark of modality that does not depend on the
scale of an image (MR maxima within one dataset run from 112 to 1.7e6). CT has air and fat below 0, raw MR nothing."""
FOREIGN_CT_FACTOR = 20.0
"""CT has a scale: a 99th percentile this many times off is no Hounsfield unit."""
SAMPLE_VOXELS = 1_000_000
"""Intensities are looked at on at most this many evenly spaced voxels of a channel."""


def check(dataset: Dataset, progress: Progress = silent) -> Findings:
    """Find every fault of a dataset in one pass: each file is read once, one case is in memory at a time.

    A case that cannot be read is reported and the rest goes on. Grids and intensities are also compared with those of
    the other cases; what counts as foreign is said beside the ``FOREIGN_`` constants.

    Returns:
        Findings, the dataset's own first and then by case; none for a sound dataset.
    """
    findings = list(dataset.faults)
    looks = []
    everything = [*dataset.cases, *dataset.test]
    for case in track(everything, "checking", progress):
        look, faults = _look_at(case, dataset)
        looks.append(look)
        findings += faults
    findings += _classes_missing(looks, dataset.labels)
    findings += _foreign_grids(looks)
    for channel, name in enumerate(dataset.channels):
        findings += _foreign_intensities(looks, channel, name)
    findings += _copies(looks, len(dataset.cases))
    return Findings(findings=tuple(sorted(findings, key=lambda f: f.case)), cases_checked=len(everything))


def check_images(cases: Sequence[Case], progress: Progress = silent) -> Findings:
    """Read images that no dataset speaks of, and say which of them cannot be segmented, and what is odd about others.

    Returns:
        Findings by case, as of a dataset.
    """
    findings: list[Finding] = []
    for case in track(cases, "checking", progress):
        try:
            volume = read_volume(case.images)
        except MedsegError as failure:
            expected = f" (expected {failure.expected})" if failure.expected else ""
            remedy = failure.remedy or "replace it, or leave it out"
            findings.append(Finding.fault(case.id, "unreadable", f"{failure.where}: {failure.found}{expected}", remedy))
        else:
            remedy = "check that this is as it should be"
            findings += [Finding.warning(case.id, "odd", warning, remedy) for warning in volume.warnings]
    return Findings(findings=tuple(sorted(findings, key=lambda f: f.case)), cases_checked=len(cases))


# ---- one case --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What is kept of a case to compare it with the others."""

    id: str
    geometry: Geometry | None = None
    negative: tuple[float, ...] = ()
    percentile_99: tuple[float, ...] = ()
    content: str = ""
    absent: tuple[str, ...] = ()
    labelled: bool = False


class _Faults(list[Finding]):
    """The findings of one case while it is looked at."""

    def __init__(self, case: Case, root: Path) -> None:
        super().__init__()
        self.case, self.root = case, root

    def add(self, kind: str, found: str, remedy: str, unusable: bool = True) -> None:
        self.append(Finding(case=self.case.id, kind=kind, unusable=unusable, found=found, remedy=remedy))

    def image(self, file: Path) -> Volume | None:
        """The image with its voxels as they are stored, or None and a finding."""
        return self._read(file, "image", lambda: replace(format_of(file).read(file), paths=(file,)))

    def label(self, file: Path, image: Volume | None, labels: Labels) -> Volume | None:
        """The mask likewise; one that names its labels with the values of the names, segments on the image's grid."""
        return self._read(file, "label", lambda: _label(file, image, labels))

    def _read(self, file: Path, what: str, read: Callable[[], Volume]) -> Volume | None:
        if not file.exists():
            self.add(
                f"missing-{what}",
                f"{self.name(file)} does not exist",
                "restore the file, or remove the case from the list",
            )
            return None
        try:
            return read()
        except MedsegError as failure:
            expected = f" (expected {failure.expected})" if failure.expected else ""
            remedy = failure.remedy or "replace the file, or remove the case from the list"
            kind = "grid" if isinstance(failure, GeometryMismatch) else "damaged"
            self.add(kind, f"{self.name(file)} {failure.found}{expected}", remedy)
        except (OSError, ValueError, RuntimeError, MemoryError) as failure:
            self.add("damaged", f"{self.name(file)} cannot be read: {failure}", "replace the file")
        return None

    def name(self, file: Path) -> str:
        return short_name(file, self.root)


def _label(file: Path, image: Volume | None, labels: Labels) -> Volume:
    if not has_segments(file) and own_labels(file) is None:
        return format_of(file).read_labels(file)
    mask = read_mask(file, labels, image)
    return Volume(mask.array[np.newaxis], mask.geometry, (file,), warnings=mask.warnings)


def _look_at(case: Case, dataset: Dataset) -> tuple[_Look, list[Finding]]:
    faults = _Faults(case, dataset.root)
    parts = [part for file in case.paths if (part := faults.image(file))]
    mask = faults.label(case.label, parts[0] if parts else None, dataset.labels) if case.label else None
    for warning, name in _oddities([*parts, mask] if mask else parts, faults).items():
        faults.add("odd", f"{name} {warning}", "check that this is as it should be", unusable=False)
    whole = len(parts) == len(case.images)
    if parts:
        _check_channels(parts, len(dataset.channels) if whole else None, faults)
    if parts and mask:
        _check_one_grid(mask, parts[0], "grid", "draw the label on this image's grid, or resample it to it", faults)
    absent = _check_label(mask, dataset.labels, faults) if mask else None
    shown = parts[0] if parts else mask
    look = _Look(
        case.id,
        shown.geometry if shown and not is_picture(shown.paths[0]) else None,  # a picture has any number of pixels
        absent=absent or (),
        labelled=absent is not None,
    )
    if whole and (measured := _check_intensities(parts, faults)):
        look = replace(look, negative=measured[0], percentile_99=measured[1], content=measured[2])
    return look, list(faults)


def _oddities(files: Sequence[Volume], faults: _Faults) -> dict[str, str]:
    """What readers found odd, each with the first file of which it is true."""
    return {warning: faults.name(file.paths[0]) for file in reversed(files) for warning in file.warnings}


def _check_channels(parts: Sequence[Volume], expected: int | None, faults: _Faults) -> None:
    found = sum(part.array.shape[0] for part in parts)
    if expected is not None and found != expected:
        faults.add(
            "channels",
            f"the image has {found} channels, and dataset.json names {expected}",
            "add or remove channels, or correct the names in dataset.json",
        )
    for part in parts[1:]:
        _check_one_grid(part, parts[0], "channel-grids", "resample the channels of a case to one grid", faults)


def _check_one_grid(item: Volume, first: Volume, kind: str, remedy: str, faults: _Faults) -> None:
    if item.geometry.close_to(first.geometry):
        return
    found = (
        f"{faults.name(item.paths[0])} is {describe_grid(item)}, {faults.name(first.paths[0])} {describe_grid(first)}"
    )
    if item.geometry.shape == first.geometry.shape:
        corners = np.array(np.meshgrid(*((0.0, n - 1.0) for n in first.geometry.shape))).reshape(3, -1).T
        apart = np.linalg.norm(item.geometry.world(corners) - first.geometry.world(corners), axis=1).max()
        found += f"; their corners lie up to {apart:.3g} mm apart"
    faults.add(kind, found, remedy)


def _check_label(mask: Volume, labels: Labels, faults: _Faults) -> tuple[str, ...] | None:
    """The names of the classes that a mask lacks; None where it is no mask of these labels."""
    name = faults.name(mask.paths[0])
    if mask.array.shape[0] != 1:
        faults.add("channels", f"{name} has {mask.array.shape[0]} channels", "give the label one channel")
        return None
    try:
        values = {int(v) for v in np.unique(integral(mask.array[0], name))}
    except InputError as failure:
        faults.add("label-values", f"{name}: {failure.found}", "make it a mask of whole numbers, as by a threshold")
        return None
    unknown = labels.unknown(np.array(sorted(values)))
    if unknown:
        faults.add(
            "unknown-labels",
            f"{name} holds the values {unknown[:10]}, which have no name (known: 0 and {dict(labels.values)})",
            labels.naming(values),
        )
        return None
    if not values & set(labels.values.values()):
        faults.add("empty", f"{name} marks no voxel of any class", "check that nothing was lost", unusable=False)
        return None
    return tuple(n for n in labels.names if labels.values[n] not in values)


def _check_intensities(
    parts: Sequence[Volume], faults: _Faults
) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Negative fraction and 99th percentile by channel, and a digest of the voxels; None where they are not finite."""
    content = hashlib.sha256()
    negative, high = [], []
    for part in parts:
        name = faults.name(part.paths[0])
        try:
            array = finite_float32(part.array, name)
        except InputError as failure:
            faults.add("not-finite", f"{name}: {failure.found}", "replace these voxels, or remove the case")
            return None
        content.update(repr(array.shape).encode() + array.tobytes())
        for channel, voxels in enumerate(array):
            if voxels.min() == voxels.max():
                where = f" channel {channel}" if len(array) > 1 else ""
                one_colour = is_picture(part.paths[0]) and array.min() != array.max()  # as of fluorescence
                found = f"{name}{where} is {voxels.flat[0]:g} everywhere"
                faults.add("constant", found, "replace the image", unusable=not one_colour)
            sample = _sample(voxels)
            negative.append(float((sample < 0).mean()))
            high.append(float(np.quantile(sample, 0.99)))
    return tuple(negative), tuple(high), content.hexdigest()


def _sample(voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = voxels.reshape(-1)
    return flat[:: max(1, flat.size // SAMPLE_VOXELS)]


# ---- one case against the others -------------------------------------------------------------------------------------


def _classes_missing(looks: Sequence[_Look], labels: Labels) -> Iterator[Finding]:
    labelled = [look for look in looks if look.labelled]
    nowhere = {name for name in labels.names if labelled and all(name in look.absent for look in labelled)}
    for name in sorted(nowhere):
        yield Finding.warning(
            "",
            "class-missing",
            f"no label holds class {name!r}",
            "check the labels; a class without examples cannot be learned",
        )
    for look in labelled:
        if absent := [f"{name!r} ({labels.values[name]})" for name in look.absent if name not in nowhere]:
            yield Finding.warning(
                look.id, "class-missing", f"the label lacks {', '.join(absent)}", "check that this is so in the patient"
            )


def _foreign_grids(looks: Sequence[_Look]) -> Iterator[Finding]:
    seen = [(look, look.geometry) for look in looks if look.geometry is not None]
    if len(seen) < FOREIGN_GROUP:
        return
    canonical = [geometry.reoriented(geometry.to("RAS")) for _, geometry in seen]
    spacing = np.array([g.spacing for g in canonical])
    extent = np.array([np.array(g.shape) * g.spacing for g in canonical])
    foreign = _far_off(spacing) | _far_off(extent)
    for (look, geometry), odd, size in zip(seen, foreign, extent, strict=True):
        if odd:
            yield Finding.fault(
                look.id,
                "foreign-grid",
                f"{_sizes(geometry.shape)} voxels of {_sizes(geometry.spacing)} mm span "
                f"{_sizes(size, 3)} mm; the median case has voxels of "
                f"{_sizes(np.median(spacing, axis=0))} mm and spans "
                f"{_sizes(np.median(extent, axis=0), 3)} mm",
                "check that it is of this study: another scan, or a wrong unit of length",
            )


def _far_off(lengths: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows of (cases, axes) lie far from the others, on a logarithmic scale."""
    logs = np.log(lengths)
    off = np.abs(logs - np.median(logs, axis=0))
    mean = logs.mean(axis=1)
    mean_off = np.abs(mean - np.median(mean))
    return np.asarray(
        (mean_off > np.maximum(np.log(FOREIGN_MEAN_FACTOR), _spread(mean_off)))
        | (off > np.maximum(np.log(FOREIGN_AXIS_FACTOR), _spread(off))).any(axis=1)
    )


def _spread(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """``FOREIGN_SPREADS`` standard deviations, estimated by the median of the absolute deviations."""
    return np.asarray(FOREIGN_SPREADS * 1.4826 * np.median(deviations, axis=0))


def _foreign_intensities(looks: Sequence[_Look], channel: int, name: str) -> Iterator[Finding]:
    seen = [look for look in looks if len(look.negative) > channel]
    if len(seen) < FOREIGN_GROUP:
        return
    none, many = FOREIGN_NEGATIVE
    negative = np.array([look.negative[channel] for look in seen])
    high = np.array([look.percentile_99[channel] for look in seen])
    typical = float(np.median(negative))
    odd = np.zeros(len(seen), dtype=bool)
    if np.mean(negative <= none) >= 0.75:
        odd = negative > many
    elif np.mean(negative >= many / 2) >= 0.75:
        odd = negative <= none
    scale = float(np.median(high))
    if name.casefold() == "ct" and scale > 0:
        odd |= high > scale * FOREIGN_CT_FACTOR
    for look, is_odd, fraction, top in zip(seen, odd, negative, high, strict=True):
        if is_odd:
            yield Finding.fault(
                look.id,
                "foreign-intensity",
                f"channel {name!r}: {fraction:.0%} of the voxels are negative and the 99th percentile "
                f"is {top:.4g}; in the median case {typical:.0%} and {scale:.4g}",
                "check modality, rescale slope and intercept of the image",
            )


def _copies(looks: Sequence[_Look], trained: int) -> Iterator[Finding]:
    """Equal images under several ids; the first ``trained`` looks are at training cases, the others at test cases."""
    first: dict[str, int] = {}
    for number, look in enumerate(looks):
        index = first.setdefault(look.content, number)
        if not look.content or index == number:
            continue
        original, leak = looks[index], index < trained <= number
        yield Finding.fault(
            look.id,
            "leak" if leak else "duplicate-image",
            f"has the very voxels of {'training case ' if leak else ''}{original.id}",
            "remove it from the test cases: it is trained on"
            if leak
            else "keep one of them: a copy in training and validation flatters the score",
        )


def _sizes(values: Iterable[float], digits: int = 4) -> str:
    return "x".join(f"{value:.{digits}g}" for value in values)
