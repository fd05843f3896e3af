"""How well a prediction agrees with its reference: overlap, surfaces, volumes, lesions, objects; empty cases defined.

One pass over a pair serves all labels: runs of voxels give overlaps, volumes and the box around each structure, and
surfaces (see ``medseg.surfaces``) are looked at only within that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from medseg.errors import GeometryMismatch
from medseg.geometry import Box, Geometry
from medseg.records import Record
from medseg.surfaces import surface_distances
from medseg.volume import Labels

Status = Literal["scored", "true_negative", "missed", "false_positive", "failed"]

DEFINITIONS = {
    "dice": "2 |A and B| / (|A| + |B|) in voxels of the reference grid",
    "iou": "|A and B| / |A or B| (Jaccard)",
    "sensitivity": "|A and B| / |reference|",
    "precision": "|A and B| / |prediction|",
    "nsd": "normalised surface Dice: the part of both surfaces' area that lies within tolerance_mm of the other "
    "surface, as google-deepmind/surface-distance defines it",
    "hd95_mm": "the larger of the two directed 95th percentiles of surface distance, weighted by surface area, as "
    "google-deepmind/surface-distance defines it",
    "hd_mm": "the largest surface distance in either direction (Hausdorff), of the same surface elements",
    "assd_mm": "mean distance of all elements of both surfaces from the other surface, weighted by area",
    "volume_difference_ml": "prediction minus reference",
    "volume_difference_percent": "the same in percent of the reference; none where the reference is empty",
    "true_negative": "both empty: left out of the means, and counted",
    "missed": "prediction empty: overlap and NSD 0, distances the image diagonal",
    "false_positive": "reference empty: overlap and NSD 0, distances the image diagonal",
    "failed": "no usable prediction: scored as one that is empty, and counted apart",
    "lesions": "connected pieces (26 neighbours; 8 in a picture); a predicted and a true one match where their "
    "intersection over union is more than lesion_iou, each with one other at most and as many as can be",
}
"""What each number and each status means; kept with every evaluation."""

DISTANCES = ("hd95_mm", "hd_mm", "assd_mm")
"""The measures that are better the smaller they are."""

DECATHLON_TOLERANCES_MM = {
    "Task01_BrainTumour": 5.0,
    "Task02_Heart": 4.0,
    "Task03_Liver": 7.0,
    "Task04_Hippocampus": 1.0,
    "Task05_Prostate": 4.0,
    "Task06_Lung": 2.0,
    "Task07_Pancreas": 5.0,
    "Task08_HepaticVessel": 3.0,
    "Task09_Spleen": 3.0,
    "Task10_Colon": 4.0,
}
"""Tolerance of NSD by task, see ``DECATHLON``."""

DECATHLON = "Antonelli et al. 2022, The Medical Segmentation Decathlon, Nature Communications 13:4128, Methods"

LESION_IOU = 0.1
"""Overlap from which a lesion counts as found, where none is given: that of nnDetection (Baumgartner et al. 2021)."""

_BLOCK = 2**22
"""Voxels of a pair that are looked at together."""


class Measures(Record):
    """A number for each measure, None where there is none; see ``DEFINITIONS``.

    Attributes:
        dice, nsd, iou, sensitivity, precision: 0 to 1.
        hd95_mm, hd_mm, assd_mm: distances of surfaces.
        volume_difference_ml, volume_difference_percent: prediction minus reference.
    """

    dice: float | None = None
    nsd: float | None = None
    hd95_mm: float | None = None
    iou: float | None = None
    sensitivity: float | None = None
    precision: float | None = None
    hd_mm: float | None = None
    assd_mm: float | None = None
    volume_difference_ml: float | None = None
    volume_difference_percent: float | None = None


MEASURES = tuple(Measures.model_fields)
"""The names of the measures, the usual ones first."""


class LesionScore(Record):
    """The single lesions of one class in one case; see ``DEFINITIONS``.

    Attributes:
        n_reference, n_predicted: pieces.
        n_found: matches, so many of both.
    """

    n_reference: int
    n_predicted: int
    n_found: int


class ClassScore(Measures):
    """The agreement of one class (or region) in one case; measures of a true negative are None.

    Attributes:
        name: of the class or region.
        status: how the pair was scored; see ``DEFINITIONS``.
        reference_ml, prediction_ml: volumes; of a failed prediction None.
        lesions: where they are counted.
    """

    name: str
    status: Status
    reference_ml: float
    prediction_ml: float | None
    lesions: LesionScore | None = None


@dataclass(frozen=True)
class Scoring:
    """What is scored, and how.

    Attributes:
        labels: classes and regions.
        tolerance_mm: how far surfaces may be apart to count as agreeing in NSD.
        lesions: names of the classes and regions whose single lesions are counted.
        lesion_iou: overlap above which a lesion counts as found.
    """

    labels: Labels
    tolerance_mm: float
    lesions: tuple[str, ...] = ()
    lesion_iou: float = LESION_IOU

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """Name of each class, then of each region -> its indices; a region with the name of a class says what it is."""
        index = {self.labels.values[name]: n for n, name in enumerate(self.labels.names, start=1)}
        found: dict[str, tuple[int, ...]] = {name: (n,) for n, name in enumerate(self.labels.names, start=1)}
        for name, values in self.labels.regions.items():
            members = tuple({index[value] for value in values})
            if found.get(name) != members:  # else it is that class
                found[f"{name} (region)" if name in found else name] = members
        return found


def score_pair(
    prediction: NDArray[Any], reference: NDArray[Any], geometry: Geometry, scoring: Scoring, where: object = "mask"
) -> tuple[ClassScore, ...]:
    """Score one prediction against its reference, on their common grid.

    Args:
        prediction: integers (I, J, K), label values.
        reference: the same shape. Voxels with ``Labels.ignore`` here are background in both.
        geometry: of both.
        scoring: classes and regions to score, and how.
        where: the prediction's name, for messages; an error in the reference's values says "reference of" it.

    Returns:
        One score a class, in the order of ``Labels.names``, then one a region. Both empty, one empty: ``DEFINITIONS``.

    Raises:
        GeometryMismatch: the shapes differ.
        InputError: a value without a name.
    """
    if not prediction.shape == reference.shape == geometry.shape:
        raise GeometryMismatch(where, f"has shape {prediction.shape}", f"{reference.shape} as the reference")
    pair = _Pair.of(prediction, reference, geometry, scoring.labels, where)
    return tuple(_score(pair, name, members, scoring) for name, members in scoring.structures.items())


def class_dice(
    prediction: NDArray[Any], reference: NDArray[Any], labels: Labels, where: object = "mask"
) -> tuple[float | None, ...]:
    """The Dice of each class as ``score_pair`` gives it, without the surfaces that take most of its time.

    Raises:
        GeometryMismatch: the shapes differ.
        InputError: a value without a name.
    """
    if prediction.shape != reference.shape:
        raise GeometryMismatch(where, f"has shape {prediction.shape}", f"{reference.shape} as the reference")
    return joint_dice(joint_histogram(*_indices(prediction, reference, labels, where), labels.count))


def joint_dice(joint: NDArray[np.int64]) -> tuple[float | None, ...]:
    """Dice of each index from 1 on: 2 |A and B| / (|A| + |B|); None for one that neither mask has.

    Args:
        joint: how many voxels have index i in one mask and j in the other, (m, n). Indices from n on, which only the
            first mask may have, count as background.
    """
    n = joint.shape[1]
    sizes = joint[:n].sum(axis=1) + joint.sum(axis=0)
    return tuple(float(2 * joint[i, i] / sizes[i]) if sizes[i] else None for i in range(1, n))


def score_failure(
    reference: NDArray[Any], geometry: Geometry, scoring: Scoring, where: object = "reference"
) -> tuple[ClassScore, ...]:
    """The scores of a case without a usable prediction: those of an empty one, with the status of a failure.

    Also where the reference has nothing of a class: whatever went wrong, it was not the finding that there is none.

    Raises:
        InputError: the reference has a value without a name.
    """
    pair = _Pair.of(np.zeros_like(reference), reference, geometry, scoring.labels, where)
    return tuple(
        _unmatched(pair, name, members, scoring).model_copy(update={"status": "failed", "prediction_ml": None})
        for name, members in scoring.structures.items()
    )


@dataclass(frozen=True)
class _Pair:
    """Two masks as indices 0..n, with what one pass over them tells.

    ``joint[r, p]`` counts the voxels of reference index r and prediction index p; ``boxes`` holds for each index the
    box around its voxels in either mask (None where there are none).
    """

    prediction: NDArray[np.uint8]
    reference: NDArray[np.uint8]
    geometry: Geometry
    joint: NDArray[np.int64]
    boxes: list[Box | None]

    @classmethod
    def of(
        cls, prediction: NDArray[Any], reference: NDArray[Any], geometry: Geometry, labels: Labels, where: object
    ) -> _Pair:
        r, p = _indices(prediction, reference, labels, where)
        return cls(p, r, geometry, *_overview(r, p, labels.count))

    def counts(self, members: tuple[int, ...]) -> tuple[int, int, int]:
        """Voxels of the united indices: of the reference, of the prediction, of both."""
        chosen = list(members)
        rows, columns = self.joint[chosen], self.joint[:, chosen]
        return int(rows.sum()), int(columns.sum()), int(rows[:, chosen].sum())

    def masks(self, members: tuple[int, ...]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Reference and prediction of the united indices, cut to the box around both."""
        found = [box for m in members if (box := self.boxes[m])]
        start = tuple(map(min, zip(*(box.start for box in found), strict=True)))
        stop = tuple(map(max, zip(*(box.stop for box in found), strict=True)))
        both = (array[Box(start, stop).slices] for array in (self.reference, self.prediction))
        r, p = (np.logical_or.reduce([array == m for m in members]) for array in both)
        return r, p

    def lesions(self, members: tuple[int, ...], iou: float) -> LesionScore:
        """The single lesions of the united indices."""
        if not any(self.counts(members)):
            return LesionScore(n_reference=0, n_predicted=0, n_found=0)
        return score_lesions(*self.masks(members), iou)


def _indices(
    prediction: NDArray[Any], reference: NDArray[Any], labels: Labels, where: object
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Reference and prediction as indices 0..n, background in both where the reference is to be ignored.

    A prediction cannot have anything ignored: its own ``ignore`` is background.
    """
    r = labels.to_indices(reference, f"reference of {where}")
    p = labels.to_indices(prediction, where)
    if labels.ignore_index is not None:
        left_out = r == labels.ignore_index
        r = np.where(left_out, np.uint8(0), r)
        p = np.where(left_out | (p == labels.ignore_index), np.uint8(0), p)
    return r, p


def joint_histogram(first: NDArray[np.uint8], second: NDArray[np.uint8], n: int) -> NDArray[np.int64]:
    """How many voxels of two masks of indices below n, of any shape, have each pair of indices: (n, n)."""
    return _overview(first, second, n)[0]


def _overview(
    first: NDArray[np.uint8], second: NDArray[np.uint8], n: int
) -> tuple[NDArray[np.int64], list[Box | None]]:
    """The joint histogram of two masks of indices below n, and the box around each index in either of them.

    Both are read once, a block after the other, as runs of voxels along a row in which neither changes: of these there
    are few. Memory: about 30 bytes a voxel of ``_BLOCK``; of masks that are stored in different orders, also copies.
    """
    turned = first.flags.f_contiguous and second.flags.f_contiguous  # as NIfTI is read; turned, rows are in one piece
    a, b = (np.ascontiguousarray(mask.T if turned else mask) for mask in (first, second))
    width = max(a.shape[-1], 1)
    a, b, axes = a.reshape(-1, width), b.reshape(-1, width), a.shape[:-1]
    joint = np.zeros(n * n, dtype=np.int64)
    low, high = np.full((len(axes) + 1, n), np.iinfo(np.int64).max), np.zeros((len(axes) + 1, n), np.int64)
    step = max(1, _BLOCK // width)
    for row in range(0, len(a), step):
        starts, stops, pair = _runs(a[row : row + step], b[row : row + step], n)
        joint += np.bincount(pair, weights=stops - starts, minlength=n * n).astype(np.int64)
        marked = pair > 0
        starts, stops, pair = starts[marked], stops[marked], pair[marked]
        lines = np.unravel_index(row + starts // width, axes) if axes else ()
        first_of, last_of = (*lines, starts % width), (*lines, (stops - 1) % width)
        for index in (pair // n, pair % n):
            for axis, (least, most) in enumerate(zip(first_of, last_of, strict=True)):
                np.minimum.at(low[axis], index, least)
                np.maximum.at(high[axis], index, most + 1)
    if turned:
        low, high = low[::-1], high[::-1]
    boxes = [Box(tuple(low[:, i].tolist()), tuple(high[:, i].tolist())) if high[0, i] else None for i in range(n)]
    return joint.reshape(n, n), boxes


def _runs(
    first: NDArray[np.uint8], second: NDArray[np.uint8], n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Runs of equal pairs in rows (m, width): where each starts and stops along all rows, and n first + second."""
    a, b = first.ravel(), second.ravel()
    begins = np.ones(len(a), dtype=np.bool_)
    np.not_equal(a[1:], a[:-1], out=begins[1:])
    begins[1:] |= b[1:] != b[:-1]
    begins[:: first.shape[1]] = True
    starts = np.flatnonzero(begins)
    return starts, np.append(starts[1:], len(a)), a[starts].astype(np.int64) * n + b[starts]


def _score(pair: _Pair, name: str, members: tuple[int, ...], scoring: Scoring) -> ClassScore:
    reference, prediction, both = pair.counts(members)
    voxel_ml = pair.geometry.voxel_volume_ml
    lesions = pair.lesions(members, scoring.lesion_iou) if name in scoring.lesions else None
    if not reference and not prediction:
        return ClassScore(name=name, status="true_negative", reference_ml=0.0, prediction_ml=0.0, lesions=lesions)
    if not (reference and prediction):
        return _unmatched(pair, name, members, scoring)
    if both == reference == prediction:
        nsd, hd95_mm, hd_mm, assd_mm = 1.0, 0.0, 0.0, 0.0
    else:
        surfaces = surface_distances(*pair.masks(members), pair.geometry.spacing, flat=pair.geometry.shape[2] == 1)
        nsd, assd_mm = surfaces.nsd(scoring.tolerance_mm), surfaces.mean_mm
        hd95_mm, hd_mm = surfaces.percentile_mm(95.0), surfaces.largest_mm
    return ClassScore(
        name=name,
        status="scored",
        dice=2.0 * both / (reference + prediction),
        nsd=nsd,
        hd95_mm=hd95_mm,
        iou=both / (reference + prediction - both),
        sensitivity=both / reference,
        precision=both / prediction,
        hd_mm=hd_mm,
        assd_mm=assd_mm,
        volume_difference_ml=(prediction - reference) * voxel_ml,
        volume_difference_percent=100.0 * (prediction - reference) / reference,
        reference_ml=reference * voxel_ml,
        prediction_ml=prediction * voxel_ml,
        lesions=lesions,
    )


def _unmatched(pair: _Pair, name: str, members: tuple[int, ...], scoring: Scoring) -> ClassScore:
    """The worst scores: of a class that one of the masks has not (or neither, where the case failed)."""
    reference, prediction, _ = pair.counts(members)
    voxel_ml, diagonal_mm = pair.geometry.voxel_volume_ml, pair.geometry.diagonal_mm
    return ClassScore(
        name=name,
        status="false_positive" if prediction else "missed",
        dice=0.0,
        nsd=0.0,
        hd95_mm=diagonal_mm,
        iou=0.0,
        sensitivity=0.0,
        precision=0.0,
        hd_mm=diagonal_mm,
        assd_mm=diagonal_mm,
        volume_difference_ml=(prediction - reference) * voxel_ml,
        volume_difference_percent=-100.0 if reference else None,
        reference_ml=reference * voxel_ml,
        prediction_ml=prediction * voxel_ml,
        lesions=pair.lesions(members, scoring.lesion_iou) if name in scoring.lesions else None,
    )


def score_lesions(reference: NDArray[np.bool_], prediction: NDArray[np.bool_], iou: float = LESION_IOU) -> LesionScore:
    """Count the pieces of two masks, and those that match; see ``DEFINITIONS``.

    Args:
        reference: (I, J, K).
        prediction: the same shape.
        iou: intersection over union that a match has more than.

    Returns:
        The counts; of empty masks 0.
    """
    from scipy.sparse import csr_array  # a third of the time that importing this module would take
    from scipy.sparse.csgraph import maximum_bipartite_matching

    pieces_r, pieces_p = (
        scipy.ndimage.label(mask, structure=np.ones((3, 3, 3)))[0] for mask in (reference, prediction)
    )
    meetings = _meetings(pieces_r, pieces_p)
    n_reference, n_predicted = len(meetings.sizes[0]), len(meetings.sizes[1])
    matches = meetings.iou > iou
    found = 0
    if matches.any():
        places = meetings.pairs[0][matches], meetings.pairs[1][matches]
        graph = csr_array((np.ones(len(places[0]), dtype=np.int8), places), shape=(n_reference, n_predicted))
        found = int((maximum_bipartite_matching(graph) >= 0).sum())
    return LesionScore(n_reference=n_reference, n_predicted=n_predicted, n_found=found)


# ---- single objects --------------------------------------------------------------------------------------------------

IOU_THRESHOLDS = tuple(twentieths / 20 for twentieths in range(10, 20))
"""0.5, 0.55, ... 0.95, those of the Data Science Bowl 2018."""

INSTANCE_DEFINITIONS = {
    "match": "an object of the prediction and one of the reference whose intersection over union (IoU) is more than "
    "the threshold; one of exactly the threshold is none. From 0.5 on, an object has one match at most",
    "dice": "of all objects united",
    "f1": "2 TP / (2 TP + FP + FN) at IoU 0.5, TP being the matches, FP and FN the objects without one",
    "average_precision": "TP / (TP + FP + FN), mean over the thresholds 0.5 to 0.95, as in the Data Science Bowl 2018",
    "segmentation_quality": "mean IoU of the matches at IoU 0.5; 0 where there are none (Kirillov et al. 2019)",
    "panoptic_quality": "segmentation_quality times f1, which is their recognition quality; of several images the mean "
    "of the images' values, not that of all their objects together, as it is defined",
    "both empty": "every score undefined: left out of the means, and counted",
    "one empty": "every score 0",
}
"""What each number of an ``InstanceScore`` means."""


class InstanceMeasures(Record):
    """How well single objects agree, 0 to 1; None where there is nothing to score. See ``INSTANCE_DEFINITIONS``."""

    dice: float | None = None
    f1: float | None = None
    average_precision: float | None = None
    segmentation_quality: float | None = None
    panoptic_quality: float | None = None


class InstanceScore(InstanceMeasures):
    """The agreement of the single objects in one image; every measure is None where both are empty.

    Attributes:
        n_reference, n_predicted: objects.
        matches: at each of ``IOU_THRESHOLDS``.
    """

    n_reference: int
    n_predicted: int
    matches: tuple[int, ...]


class InstanceMeans(InstanceMeasures):
    """Means over the images that have objects, in the reference or the prediction; each image has the same weight.

    Attributes:
        n: images that count.
        n_empty: left out: both empty.
    """

    n: int
    n_empty: int

    @classmethod
    def of(cls, scores: Iterable[InstanceScore]) -> InstanceMeans:
        """The means of the scores of some images."""
        everything = list(scores)
        counted = [score for score in everything if score.n_reference or score.n_predicted]
        means = {}
        if counted:
            means = {name: fmean(getattr(s, name) for s in counted) for name in InstanceMeasures.model_fields}
        return cls(n=len(counted), n_empty=len(everything) - len(counted), **means)


def score_instances(prediction: NDArray[Any], reference: NDArray[Any], where: object = "prediction") -> InstanceScore:
    """Score the single objects of one image.

    Args:
        prediction: ids, any shape; 0 is background, any other integer an object.
        reference: ids, the same shape.
        where: the prediction's name, for messages.

    Raises:
        GeometryMismatch: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise GeometryMismatch(where, f"has shape {prediction.shape}", f"{reference.shape} as the reference")
    meetings = _meetings(reference, prediction)
    sizes_r, sizes_p = meetings.sizes
    both, union = meetings.shared, meetings.union
    matches = tuple(int((20 * both > n * union).sum()) for n in range(10, 20))  # IOU_THRESHOLDS, exact in integers
    objects = len(sizes_r) + len(sizes_p)
    if not objects:
        return InstanceScore(n_reference=0, n_predicted=0, matches=matches)
    matched = 2 * both > union
    f1 = 2 * matches[0] / objects
    quality = float((both[matched] / union[matched]).mean()) if matches[0] else 0.0
    return InstanceScore(
        n_reference=len(sizes_r),
        n_predicted=len(sizes_p),
        matches=matches,
        dice=float(2 * both.sum() / (sizes_r.sum() + sizes_p.sum())),
        f1=f1,
        average_precision=fmean(n / (objects - n) for n in matches),
        segmentation_quality=quality,
        panoptic_quality=quality * f1,
    )


@dataclass(frozen=True)
class _Meetings:
    """Which objects of two arrays of ids share voxels: only those, as of many objects most never meet.

    Attributes:
        sizes: voxels of each object of the first array, and of the second.
        pairs: of each meeting the object of the first array, and of the second, as places in ``sizes``.
        shared: voxels of each meeting.
    """

    sizes: tuple[NDArray[np.int64], NDArray[np.int64]]
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]]
    shared: NDArray[np.int64]

    @property
    def union(self) -> NDArray[np.int64]:
        """Voxels of both objects of each meeting together."""
        (sizes_a, sizes_b), (a, b) = self.sizes, self.pairs
        return sizes_a[a] + sizes_b[b] - self.shared

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each meeting."""
        return np.asarray(self.shared / self.union)


def _meetings(first: NDArray[Any], second: NDArray[Any]) -> _Meetings:
    """The meetings of the objects of two arrays of ids; 0 is background."""
    both = (first != 0) & (second != 0)
    (names_a, sizes_a), (names_b, sizes_b) = (np.unique(ids[ids != 0], return_counts=True) for ids in (first, second))
    a, b = np.searchsorted(names_a, first[both]), np.searchsorted(names_b, second[both])
    pairs, shared = np.unique(a * max(1, len(names_b)) + b, return_counts=True)
    return _Meetings((sizes_a, sizes_b), np.divmod(pairs, max(1, len(names_b))), shared)
