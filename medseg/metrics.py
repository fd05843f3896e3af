"""How well a prediction agrees with its reference: overlap, surfaces, volumes, lesions, objects; empty cases defined.

One pass over a pair serves all labels: a joint histogram gives overlaps and volumes, and surfaces are looked at only
in the box around each structure. Surfaces are those of google-deepmind/surface-distance (Nikolov et al.,
arXiv:1809.04430): a surface element lies where the eight voxels around a voxel corner are not all alike, has the area
(in mm^2) of the marching-cubes surface there, and sits on that corner. A picture (K = 1) has a contour instead, of
elements with a length in mm. The image is taken to be surrounded by background, so that a structure cut by the image
border has a surface there.

Distances run along the voxel axes with their spacing: on a sheared grid they are approximate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, Literal

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

from medseg.errors import GeometryMismatch
from medseg.geometry import Box, Float, Geometry
from medseg.records import Record
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

MEASURES = (
    *("dice", "nsd", "hd95_mm", "iou", "sensitivity", "precision", "hd_mm", "assd_mm"),
    *("volume_difference_ml", "volume_difference_percent"),
)
"""What a class is scored by in each case, the usual ones first."""

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

_TOLERANCE_SLACK = 1e-6
"""Relative slack of tolerance comparisons: a spacing of 0.8 mm kept in 32 bits must not exceed a tolerance of 0.8."""

_SURFELS = {
    (0,): [(1, 1, 1)],
    (0, 1): [(4, 4, 0)],
    (1, 2): [(2, 2, 2)],
    (3, 4): [(2, 2, 2)],
    (0, 1, 2): [(3, 3, 3), (4, 0, 0)],
    (1, 2, 4): [(3, 3, 3)],
    (0, 3, 4): [(0, 4, 4), (1, 1, 1)],
    (0, 1, 2, 3): [(8, 0, 0)],
    (0, 1, 2, 4): [(6, 6, 6)],
    (0, 1, 3, 4): [(4, 4, 4), (0, 2, 2), (2, 0, 2)],
    (1, 2, 3, 4): [(4, 4, 4), (4, 0, 0)],
    (2, 3, 4, 5): [(8, 8, 0)],
    (0, 3, 5, 6): [(4, 4, 4)],
}
"""Marching-cubes surface through a cube of eight voxel centres, by the corners inside (corner 4 i + 2 j + k).

The area vectors of its flat pieces, in eighths of a cube's face, up to signs. All other codes follow by turning,
mirroring and exchanging inside and outside. Figures: the lookup table of google-deepmind/surface-distance, which has
these symmetries.
"""


class LesionScore(Record):
    """The single lesions of one class in one case; see ``DEFINITIONS``.

    Attributes:
        n_reference, n_predicted: pieces.
        n_found: matches, so many of both.
    """

    n_reference: int
    n_predicted: int
    n_found: int


class ClassScore(Record):
    """The agreement of one class (or region) in one case.

    Attributes:
        name: of the class or region.
        status: how the pair was scored; see ``DEFINITIONS``.
        dice, nsd, iou, sensitivity, precision: 0 to 1.
        hd95_mm, hd_mm, assd_mm: distances of surfaces.
        volume_difference_ml, volume_difference_percent: prediction minus reference.
        reference_ml, prediction_ml: volumes; of a failed prediction None.
        lesions: where they are counted.

    Measures of a true negative are None.
    """

    name: str
    status: Status
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
        """Name of each class, then of each region -> its indices."""
        index = {self.labels.values[name]: n for n, name in enumerate(self.labels.names, start=1)}
        regions = {name: tuple({index[value] for value in values}) for name, values in self.labels.regions.items()}
        return {**{name: (n,) for n, name in enumerate(self.labels.names, start=1)}, **regions}


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
    box of the reference's and of the prediction's voxels (None where there are none).
    """

    prediction: NDArray[np.uint8]
    reference: NDArray[np.uint8]
    geometry: Geometry
    joint: NDArray[np.int64]
    boxes: tuple[list[tuple[slice, ...] | None], list[tuple[slice, ...] | None]]

    @classmethod
    def of(
        cls, prediction: NDArray[Any], reference: NDArray[Any], geometry: Geometry, labels: Labels, where: object
    ) -> _Pair:
        r, p = _indices(prediction, reference, labels, where)
        boxes = tuple([None, *scipy.ndimage.find_objects(array, max_label=labels.count - 1)] for array in (r, p))
        return cls(p, r, geometry, joint_histogram(r, p, labels.count), boxes)  # type: ignore[arg-type]

    def counts(self, members: tuple[int, ...]) -> tuple[int, int, int]:
        """Voxels of the united indices: of the reference, of the prediction, of both."""
        chosen = list(members)
        rows, columns = self.joint[chosen], self.joint[:, chosen]
        return int(rows.sum()), int(columns.sum()), int(rows[:, chosen].sum())

    def masks(self, members: tuple[int, ...]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Reference and prediction of the united indices, cut to the box around both."""
        found = [boxes[m] for boxes in self.boxes for m in members]
        corners = np.array([[(s.start, s.stop) for s in box] for box in found if box is not None])
        box = Box(tuple(corners[..., 0].min(axis=0)), tuple(corners[..., 1].max(axis=0)))
        chosen = np.isin(np.arange(len(self.joint)), members)
        return chosen[self.reference[box.slices]], chosen[self.prediction[box.slices]]

    def lesions(self, members: tuple[int, ...], iou: float) -> LesionScore:
        """The single lesions of the united indices."""
        if not any(self.counts(members)):
            return LesionScore(n_reference=0, n_predicted=0, n_found=0)
        return score_lesions(*self.masks(members), iou)


def _indices(
    prediction: NDArray[Any], reference: NDArray[Any], labels: Labels, where: object
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Reference and prediction as indices 0..n, background in both where either is to be ignored."""
    r = labels.to_indices(reference, f"reference of {where}")
    p = labels.to_indices(prediction, where)
    if labels.ignore_index is not None:
        p[(p == labels.ignore_index) | (r == labels.ignore_index)] = 0
        r[r == labels.ignore_index] = 0
    return r, p


def joint_histogram(first: NDArray[np.uint8], second: NDArray[np.uint8], n: int) -> NDArray[np.int64]:
    """How many voxels of two masks of indices below n, of two axes or more, have each pair of indices: (n, n)."""
    joint = np.zeros(n * n, dtype=np.int64)
    for a, b in zip(first, second, strict=True):  # slice by slice, as bincount makes 8 bytes of every voxel
        joint += np.bincount((a * np.uint16(n) + b).ravel(), minlength=n * n)
    return joint.reshape(n, n)


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
        hd95_mm, hd_mm = surfaces.percentile_mm(95.0), surfaces.percentile_mm(100.0)
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
    pieces_r, pieces_p = (
        scipy.ndimage.label(mask, structure=np.ones((3, 3, 3)))[0] for mask in (reference, prediction)
    )
    both, sizes_r, sizes_p = _overlaps(pieces_r, pieces_p)
    found = both / (sizes_r[:, np.newaxis] + sizes_p - both)
    rows, columns = linear_sum_assignment(found > iou, maximize=True)
    matches = int(np.count_nonzero(found[rows, columns] > iou))
    return LesionScore(n_reference=len(sizes_r), n_predicted=len(sizes_p), n_found=matches)


@dataclass(frozen=True)
class SurfaceDistances:
    """Every surface element of two masks: how far it is from the other surface (mm), and how large (mm^2; mm in 2D).

    Measured once; the measures are short readers of it.
    """

    from_reference_mm: Float
    reference_areas: Float
    from_prediction_mm: Float
    prediction_areas: Float

    def nsd(self, tolerance_mm: float) -> float:
        """Normalised surface Dice: the part of both surfaces within the tolerance of the other one."""
        limit = tolerance_mm * (1.0 + _TOLERANCE_SLACK)
        near = self.reference_areas[self.from_reference_mm <= limit].sum()
        near += self.prediction_areas[self.from_prediction_mm <= limit].sum()
        return float(near / (self.reference_areas.sum() + self.prediction_areas.sum()))

    @property
    def mean_mm(self) -> float:
        """Mean distance of the elements of both surfaces, weighted by area."""
        moved = self.from_reference_mm @ self.reference_areas + self.from_prediction_mm @ self.prediction_areas
        return float(moved / (self.reference_areas.sum() + self.prediction_areas.sum()))

    def percentile_mm(self, percent: float) -> float:
        """The larger of the two directed percentiles of distance, weighted by area."""
        return max(
            _weighted_percentile(self.from_reference_mm, self.reference_areas, percent),
            _weighted_percentile(self.from_prediction_mm, self.prediction_areas, percent),
        )


def surface_distances(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing_mm: tuple[float, float, float], flat: bool
) -> SurfaceDistances:
    """Measure the distances between the surfaces of two masks (I, J, K), neither of them empty.

    Args:
        reference: cut anywhere outside the structure; background is assumed around it.
        prediction: the same shape.
        spacing_mm: distance of voxel centres along each axis.
        flat: take the single slice as a picture, with a contour rather than a surface.
    """
    spacing = np.array([*spacing_mm[:2], 1.0 if flat else spacing_mm[2]])
    areas = _surfel_areas(spacing)
    codes = [_neighbour_codes(mask, flat) for mask in (reference, prediction)]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    r, p = surfaces
    return SurfaceDistances(
        _distances(r, p, spacing), areas[codes[0][r]], _distances(p, r, spacing), areas[codes[1][p]]
    )


def _neighbour_codes(mask: NDArray[np.bool_], flat: bool) -> NDArray[np.uint8]:
    """For each voxel corner the bits of the eight voxels around it: bit 4 i + 2 j + k.

    A picture is repeated along K instead of surrounded: its contour becomes a wall one unit high, whose area is the
    contour's length.
    """
    padded = np.pad(mask, ((1, 1), (1, 1), (0, 0) if flat else (1, 1))).view(np.uint8)
    padded = padded.repeat(2, axis=2) if flat else padded
    code = padded[:, :, :-1] | padded[:, :, 1:] << 1
    code = code[:, :-1] | code[:, 1:] << 2
    return np.asarray(code[:-1] | code[1:] << 4)


def _distances(surface: NDArray[np.bool_], other: NDArray[np.bool_], spacing: Float) -> Float:
    """Distance (mm) of each true voxel of ``surface`` from the nearest true voxel of ``other``."""
    result = np.zeros(np.count_nonzero(surface))
    apart = ~other[surface]
    if apart.any():
        points, targets = (np.argwhere(s) * spacing for s in (surface & ~other, other))
        tree = cKDTree(targets, balanced_tree=False, compact_nodes=False)  # best on grid points, near and far
        result[apart] = tree.query(points)[0]
    return result


def _weighted_percentile(distances_mm: Float, areas: Float, percent: float) -> float:
    """The smallest distance within which ``percent`` of the area lies."""
    order = np.argsort(distances_mm)
    area = np.cumsum(areas[order])
    place = np.searchsorted(area, area[-1] * (percent / 100.0) * (1.0 - 1e-9))  # rounding must not skip an element
    return float(distances_mm[order[min(int(place), len(order) - 1)]])


def _surfel_areas(spacing: Float) -> Float:
    """Area of the surface element of each of the 256 neighbour codes, for a spacing in mm."""
    faces = spacing.prod() / spacing
    return np.asarray(np.linalg.norm(_area_vectors() * faces, axis=-1).sum(axis=-1))


@cache
def _area_vectors() -> Float:
    """Area vectors (256 codes, 3 pieces, 3 axes) in faces of a cube, up to signs."""
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    weights = np.array([4, 2, 1])
    table = np.zeros((256, 3, 3))
    for inside, vectors in _SURFELS.items():
        for axes in itertools.permutations(range(3)):
            for flips in corners:
                turned = (corners[list(inside)] ^ flips)[:, axes] @ weights
                code = int((1 << turned).sum())
                for same in (code, 255 - code):
                    table[same, : len(vectors)] = np.array(vectors)[:, axes] / 8.0
    return table


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
    both, sizes_r, sizes_p = _overlaps(reference, prediction)
    union = sizes_r[:, np.newaxis] + sizes_p - both
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


def _overlaps(
    first: NDArray[Any], second: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """How many voxels each object of the first shares with each of the second, and the sizes of both; one histogram."""
    marked = (first != 0) | (second != 0)
    # a background voxel is added to both, so that each has that entry
    (names_a, a), (names_b, b) = (np.unique(np.append(ids[marked], 0), return_inverse=True) for ids in (first, second))
    joint = np.bincount(a * len(names_b) + b, minlength=len(names_a) * len(names_b)).reshape(len(names_a), -1)
    rows, columns = names_a != 0, names_b != 0
    return joint[np.ix_(rows, columns)], joint.sum(axis=1)[rows], joint.sum(axis=0)[columns]
