"""Fingerprint: what the data look like, measured in one pass over the cases.

Everything is measured on the voxel grid of the file turned to RAS, in the order (I, J, K): I to the right, J to the
front, K to the head. What is measured, and that nothing else is, follows nnU-Net's fingerprint (Isensee et al., Nature
Methods 18, 2021); the mirror agreement and the measures of classes are new here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.dataset import Case, Dataset
from medseg.errors import DatasetError, GeometryMismatch, MedsegError
from medseg.geometry import Box
from medseg.io import describe_grid, read_mask, read_volume
from medseg.progress import Progress, silent, track
from medseg.records import Record

Vector = tuple[float, float, float]
Shape = tuple[int, int, int]

SUPPORTS = 16384
"""Intensities that are kept of a case and channel. A case with at most this many distinct foreground intensities (any
integer CT) enters the percentiles exactly; of another one, order statistics at evenly spaced ranks, each percentile
then being off by at most 1/32768 in rank. 500 cases of 4 channels take 250 MB."""
MIRROR_GRID = 24
"""Cells along each axis of the coarse grid on which label maps are compared with their mirror images."""


class CaseMeasures(Record):
    """Size of one case, in RAS order.

    Attributes:
        id: of the case.
        shape: voxels of the whole image.
        spacing_mm: distance of voxel centres.
        cropped_shape: voxels of the smallest box that holds everything that is not 0 in every channel.
        relative_size: voxels of that box over voxels of the image, 0 to 1.
    """

    id: str
    shape: Shape
    spacing_mm: Vector
    cropped_shape: Shape
    relative_size: float


class Intensities(Record):
    """Statistics of one channel over the foreground voxels of all cases, each case weighing the same."""

    mean: float
    median: float
    std: float
    minimum: float
    maximum: float
    percentile_00_5: float
    percentile_99_5: float


class ClassMeasures(Record):
    """How often and how large a class is; the volumes are those of the cases that have it, 0 where none has.

    Attributes:
        cases: that have it.
        volume_ml_median, volume_ml_minimum, volume_ml_maximum: over these.
        components_maximum: most connected pieces (across corners too) in any case; None of an earlier fingerprint.
    """

    cases: int
    volume_ml_median: float
    volume_ml_minimum: float
    volume_ml_maximum: float
    components_maximum: int | None = None


class Fingerprint(Record):
    """What the data look like.

    Attributes:
        dataset_digest: of the dataset that was measured.
        cases: sizes, in the order of the dataset.
        intensities: one entry a channel.
        classes: by name.
        empty_cases: cases whose label marks no class at all.
        mirror_agreement: for the axes right, front and head, how well the place of each class agrees with its own
            mirror image: 1 where mirroring makes no difference, near 0 where a class comes to lie where it never is.
            The lowest of the classes.
    """

    dataset_digest: str
    cases: tuple[CaseMeasures, ...]
    intensities: tuple[Intensities, ...]
    classes: dict[str, ClassMeasures]
    empty_cases: int
    mirror_agreement: Vector


def measure(dataset: Dataset, progress: Progress = silent) -> Fingerprint:
    """Measure the labelled cases of a dataset, one case in memory at a time.

    nnU-Net draws the same number of foreground voxels from every case, with replacement, and takes the statistics of
    the pool. Here the same mixture is computed without drawing: each case's distribution has the weight 1/n. Cases
    without foreground count in the sizes and in no statistic of intensity.

    Returns:
        Fingerprint; the same for the same files.

    Raises:
        DatasetError: no case, cases that cannot be read (all of them are listed), or no foreground in any case.
    """
    if not dataset.cases:
        raise DatasetError(dataset.root, "has no labelled cases", "one at least", "check the dataset")
    measures: list[CaseMeasures] = []
    pools = [_Pool() for _ in dataset.channels]
    maps = {name: _PlaceMap() for name in dataset.labels.names}
    volumes: dict[str, list[float]] = {name: [] for name in dataset.labels.names}
    components = dict.fromkeys(dataset.labels.names, 0)
    failures: list[str] = []
    empty = 0
    for case in track(dataset.cases, "measuring", progress):
        try:
            look = _read(case, dataset)
        except MedsegError as failure:
            failures.append(f"{case.id}: {failure}")
            continue
        measures.append(look.measures)
        empty += not look.foreground.any()
        for pool, channel in zip(pools, look.array, strict=True):
            pool.add(channel[look.foreground])
        for index, name in enumerate(dataset.labels.names, start=1):
            own = look.mask == index
            if count := maps[name].add(own):
                volumes[name].append(count * look.voxel_ml)
                components[name] = max(components[name], _pieces(own))
    if failures:
        raise DatasetError(dataset.root, f"{len(failures)} cases cannot be used: " + "; ".join(failures))
    if empty == len(measures):
        raise DatasetError(dataset.root, "no label marks any voxel of a class", f"voxels of {dataset.labels.values}")
    return Fingerprint(
        dataset_digest=dataset.digest(),
        cases=tuple(measures),
        intensities=tuple(pool.statistics() for pool in pools),
        classes={name: _class_measures(found, components[name]) for name, found in volumes.items()},
        empty_cases=empty,
        mirror_agreement=_mirror_agreement(list(maps.values())),
    )


@dataclass(frozen=True)
class _Read:
    """One case turned to RAS and cut to its box of voxels that are not 0."""

    measures: CaseMeasures
    array: NDArray[np.float32]
    mask: NDArray[np.uint8]
    foreground: NDArray[np.bool_]
    voxel_ml: float


def _read(case: Case, dataset: Dataset) -> _Read:
    if case.label is None:
        raise DatasetError(case.id, "has no label", "a labelled case")
    volume = read_volume(case.images, channels=len(dataset.channels))
    mask = read_mask(case.label, dataset.labels, volume)
    if not mask.geometry.close_to(volume.geometry):
        raise GeometryMismatch(
            case.label, f"is {describe_grid(mask)}", f"the grid of its image, {describe_grid(volume)}"
        )
    turn = volume.geometry.to("RAS")
    geometry = volume.geometry.reoriented(turn)
    box = Box.around(turn.apply(np.any(volume.array != 0, axis=0)))
    measures = CaseMeasures(
        id=case.id,
        shape=geometry.shape,
        spacing_mm=geometry.spacing,
        cropped_shape=box.shape,
        relative_size=float(np.prod(box.shape) / np.prod(geometry.shape)),
    )
    indices = dataset.labels.to_indices(turn.apply(mask.array)[box.slices], case.label)
    foreground = (indices > 0) & (indices < dataset.labels.count)
    array = turn.apply(volume.array)[:, *box.slices].astype(np.float32, copy=False)
    return _Read(measures, array, indices, foreground, geometry.voxel_volume_ml)


def _pieces(mask: NDArray[np.bool_]) -> int:
    """Connected pieces of a mask (I, J, K), joined by faces, edges or corners."""
    _, count = ndimage.label(mask[Box.around(mask).slices], np.ones((3, 3, 3), dtype=bool))
    return int(count)


def _class_measures(volumes: Sequence[float], components: int) -> ClassMeasures:
    known = volumes or [0.0]
    return ClassMeasures(
        cases=len(volumes),
        volume_ml_median=float(np.median(known)),
        volume_ml_minimum=min(known),
        volume_ml_maximum=max(known),
        components_maximum=components,
    )


@dataclass
class _Pool:
    """One channel's foreground intensities of all cases, as weighted values."""

    values: list[NDArray[np.float32]] = field(default_factory=list)
    weights: list[NDArray[np.float64]] = field(default_factory=list)
    moments: list[tuple[float, float]] = field(default_factory=list)
    extremes: list[float] = field(default_factory=list)

    def add(self, intensities: NDArray[np.float32]) -> None:
        """Add the intensities of one case, (N,); none are of no matter."""
        if not intensities.size:
            return
        values, counts = np.unique(intensities, return_counts=True)
        self.extremes += [float(values[0]), float(values[-1])]
        self.moments.append((float(intensities.mean(dtype=np.float64)), float(intensities.var(dtype=np.float64))))
        if values.size > SUPPORTS:
            ranks = (np.arange(SUPPORTS) + 0.5) / SUPPORTS * intensities.size
            values = values[np.searchsorted(np.cumsum(counts), ranks, side="right")]
            counts = np.ones(SUPPORTS, dtype=np.int64)
        self.values.append(values)
        self.weights.append(counts / counts.sum())

    def statistics(self) -> Intensities:
        """Mean, spread and percentiles of the mixture in which every case has the same weight."""
        means, variances = np.array(self.moments).T
        values = np.concatenate(self.values)
        order = np.argsort(values, kind="stable")
        share = np.cumsum(np.concatenate(self.weights)[order])
        low, middle, high = (
            float(values[order[np.searchsorted(share, q * share[-1]).clip(max=len(order) - 1)]])
            for q in (0.005, 0.5, 0.995)
        )
        return Intensities(
            mean=float(means.mean()),
            median=middle,
            std=float(np.sqrt(variances.mean() + means.var())),
            minimum=min(self.extremes),
            maximum=max(self.extremes),
            percentile_00_5=low,
            percentile_99_5=high,
        )


class _PlaceMap:
    """Where a class lies, as a fraction of its case's box: sums over the cases on a coarse grid."""

    def __init__(self) -> None:
        self.cases = 0
        self.total = np.zeros((MIRROR_GRID,) * 3)
        self.own = np.zeros(1 + 3)

    def add(self, mask: NDArray[np.bool_]) -> int:
        """Add one case's mask (I, J, K); how many voxels it has."""
        count = int(np.count_nonzero(mask))
        if not count:
            return 0
        place = _coarse(mask)
        self.cases += 1
        self.total += place
        self.own += _overlaps(place)
        return count

    def agreement(self) -> NDArray[np.float64]:
        """For each axis: how often two cases agree where one is mirrored, relative to where none is; clipped to 1."""
        straight, *mirrored = _overlaps(self.total) - self.own
        if straight <= 1e-12 * max(1.0, float(self.own[0])):
            return np.ones(3)  # no two cases have the class at one place: nothing speaks against mirroring
        return np.asarray(np.clip(np.array(mirrored) / straight, 0.0, 1.0))


def _mirror_agreement(maps: Sequence[_PlaceMap]) -> Vector:
    """The lowest agreement of any class with its mirror image, for the axes right, front and head.

    For a class with coarse maps P_n (the fraction of each cell that it fills in case n) and an axis with mirror image
    F: the sum over pairs of different cases of <P_m, F P_n>, divided by that of <P_m, P_n>. Pairs of a case with itself
    are left out, because they would make every small structure look tied to its place. A class that lies at one place
    in fewer than two cases gives 1.
    """
    i, j, k = (float(v) for v in np.min([np.ones(3), *(place.agreement() for place in maps)], axis=0))
    return i, j, k


def _overlaps(place: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products of a map with itself and with its mirror image along each of the three axes."""
    return np.array([np.vdot(place, place), *(np.vdot(place, np.flip(place, axis)) for axis in range(3))])


def _coarse(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The fraction of each coarse cell that a mask fills; the cells span the whole array, whatever its shape."""
    box = Box.around(mask)
    result: NDArray[Any] = mask[box.slices].astype(np.float32)
    for axis, (size, start, stop) in enumerate(zip(mask.shape, box.start, box.stop, strict=True)):
        result = np.moveaxis(np.tensordot(_cells(size)[:, start:stop], result, (1, axis)), 0, axis)
    return result.astype(np.float64)


def _cells(size: int) -> NDArray[np.float32]:
    """(cells, size): the share of each coarse cell that each of ``size`` voxels covers."""
    cells = np.arange(MIRROR_GRID + 1) / MIRROR_GRID
    voxels = np.arange(size + 1) / size
    low = np.maximum(cells[:-1, None], voxels[None, :-1])
    high = np.minimum(cells[1:, None], voxels[None, 1:])
    return np.asarray(np.maximum(high - low, 0.0) * MIRROR_GRID, dtype=np.float32)
