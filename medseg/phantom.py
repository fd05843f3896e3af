"""Made-up datasets that look like anatomy: for the demo, and for tests of everything that needs whole cases.

A phantom is a body with a rim of fat, a bone, and one organ a label: lobed, differently deformed from case to case, at
its own place and with its own intensity. With two labels or more, the last one is a lesion inside the first organ. A
smooth bias field, noise and blobs that look like organs but are none keep thresholds from solving it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.geometry import Geometry
from medseg.io import nifti
from medseg.records import write_json
from medseg.volume import Labels, Mask, Volume

Float = NDArray[np.float64]
DEMO_LABELS: Mapping[str, int] = MappingProxyType({"liver": 1, "kidney": 2, "tumour": 3})
ORIENTATIONS = ("LAS", "LPS", "RAS", "PIR", "ASL")
"""Voxel orders of the cases, in turn: as scanners write them, and two with their axes exchanged."""

_AIR, _FAT, _BODY, _BONE, _FIRST_ORGAN = range(5)
_CONTRASTS = (1.45, 0.65, 1.95, 0.85, 1.25)  # intensities of the organs where the body has 1
_NOISE = 0.12  # standard deviation, in the same unit
_HU_A_UNIT = 200.0
_TILT_DEGREES = 12.0


def make_dataset(
    folder: Path,
    *,
    name: str = "Phantom",
    cases: int = 12,
    test_cases: int = 2,
    shape: tuple[int, int, int] = (48, 48, 20),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 2.5),
    labels: Mapping[str, int] = DEMO_LABELS,
    channels: Sequence[str] = ("MRI",),
    seed: int = 0,
) -> Path:
    """Write a dataset as the Medical Segmentation Decathlon ships its own; the same arguments give the same bytes.

    Args:
        folder: where ``dataset.json``, ``imagesTr``, ``labelsTr`` and ``imagesTs`` go.
        name: of the dataset, and in lower case of its cases.
        cases: labelled ones.
        test_cases: ones without label.
        shape: voxels along right, front and head; each case differs a little.
        spacing_mm: along the same directions; each case differs by up to 5 %.
        labels: name -> integer.
        channels: modalities; one called ``CT`` is in Hounsfield units, any other has an arbitrary scale.
        seed: another seed gives other cases.

    Returns:
        ``folder``.
    """
    ids = [f"{name.lower()}_{number:03d}" for number in range(1, cases + test_cases + 1)]
    for number, case in enumerate(ids):
        image, mask = make_case(number, shape=shape, spacing_mm=spacing_mm, labels=labels, channels=channels, seed=seed)
        nifti.write_volume(image, folder / ("imagesTr" if number < cases else "imagesTs") / f"{case}.nii.gz")
        if number < cases:
            nifti.write(mask, folder / "labelsTr" / f"{case}.nii.gz")
    write_json(folder / "dataset.json", _description(name, ids[:cases], ids[cases:], labels, channels))
    return folder


def make_case(
    number: int,
    *,
    shape: tuple[int, int, int] = (48, 48, 20),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 2.5),
    labels: Mapping[str, int] = DEMO_LABELS,
    channels: Sequence[str] = ("MRI",),
    seed: int = 0,
) -> tuple[Volume, Mask]:
    """One case of ``make_dataset``: an int16 image (C, I, J, K) and its mask, on an oblique grid."""
    rng = np.random.default_rng([seed, number])
    size = tuple(max(4, n + int(rng.integers(-(n // 16), n // 16 + 1))) for n in shape)
    geometry = _oblique_grid(rng, size, np.array(spacing_mm) * rng.uniform(0.95, 1.05))
    tissue, indices = _anatomy(rng, size, len(labels))
    image = np.stack([_channel(rng, tissue, channel, n, len(labels)) for n, channel in enumerate(channels)])
    named = Labels(values=dict(labels))
    integers = np.array([0, *labels.values()])[indices].astype(named.to_values(np.zeros(1, np.uint8)).dtype)
    turn = geometry.to(ORIENTATIONS[number % len(ORIENTATIONS)])
    turned = geometry.reoriented(turn)
    turned = Geometry(turned.shape, turned.affine.astype(np.float32))  # what a NIfTI-1 header can hold
    return Volume(turn.apply(image), turned), Mask(turn.apply(integers), turned, named)


def _description(
    name: str, training: list[str], test: list[str], labels: Mapping[str, int], channels: Sequence[str]
) -> dict[str, Any]:
    return {
        "name": name,
        "description": "Phantom made by medseg",
        "reference": "medseg",
        "licence": "CC0",
        "release": "1.0",
        "tensorImageSize": "4D" if len(channels) > 1 else "3D",
        "modality": {str(n): channel for n, channel in enumerate(channels)},
        "labels": {"0": "background", **{str(value): label for label, value in labels.items()}},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in training],
        "test": [f"./imagesTs/{case}.nii.gz" for case in test],
    }


def _oblique_grid(rng: np.random.Generator, shape: tuple[int, ...], spacing: Float) -> Geometry:
    """A grid near RAS, tilted about a random axis, its centre near the world's origin."""
    axis = rng.standard_normal(3)
    x, y, z = axis / np.linalg.norm(axis)
    angle = np.deg2rad(rng.uniform(-_TILT_DEGREES, _TILT_DEGREES))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross  # Rodrigues' formula
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = rng.uniform(-20, 20, 3) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine)  # type: ignore[arg-type]


def _anatomy(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Tissue of every voxel, and index of its label (0 none, 1 to ``count``).

    Places and radii are fractions of the field of view, -1 to 1 along each axis, bent by a smooth displacement.
    """
    points = np.stack(np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in shape), indexing="ij"))
    points = points + 0.08 * np.stack([_smooth_field(rng, shape) for _ in range(3)])
    tissue = np.full(shape, _AIR, np.uint8)
    indices = np.zeros(shape, np.intp)
    tissue[_ellipsoid(points, np.zeros(3), np.array([0.92, 0.88, 1.4]))] = _FAT
    body = _ellipsoid(points, np.zeros(3), np.array([0.86, 0.82, 1.35]))
    tissue[body] = _BODY
    tissue[_ellipsoid(points, np.array([0, -0.62, 0]), np.array([0.13, 0.13, 2.0]))] = _BONE
    for _ in range(3):
        place = rng.uniform(-0.6, 0.6, 3)
        decoy = _ellipsoid(points, place, rng.uniform(0.07, 0.13, 3)) & (tissue == _BODY)
        tissue[decoy] = _FIRST_ORGAN + rng.integers(count)
    organs = max(1, count - 1)
    places = [_place(rng, organ, organs) for organ in range(organs)]
    for organ, (centre, radius) in enumerate(places):
        lobe = _ellipsoid(points, centre + rng.uniform(-0.7, 0.7, 3) * radius, radius * rng.uniform(0.4, 0.6, 3))
        inside = (_ellipsoid(points, centre, radius * rng.uniform(0.85, 1.1, 3)) | lobe) & body
        tissue[inside], indices[inside] = _FIRST_ORGAN + organ, organ + 1
    if count > 1:
        centre, radius = places[0]
        lesion = _ellipsoid(points, centre + rng.uniform(-0.2, 0.2, 3) * radius, radius * rng.uniform(0.6, 0.75, 3))
        inside = lesion & (indices == 1)
        tissue[inside], indices[inside] = _FIRST_ORGAN + count - 1, count
    return tissue, indices


def _place(rng: np.random.Generator, organ: int, organs: int) -> tuple[Float, float]:
    """Centre and radius of one of ``organs``: they stand in a ring about the middle, above and below it in turn."""
    radius = min(0.36, 0.42 * np.sin(np.pi / organs)) if organs > 1 else 0.36
    angle = 2 * np.pi * organ / organs + 0.5
    centre = np.array([0.42 * np.cos(angle), 0.42 * np.sin(angle), 0.2 * (-1) ** organ])
    return centre + rng.uniform(-0.05, 0.05, 3), radius


def _ellipsoid(points: Float, centre: Float, radii: Float) -> NDArray[np.bool_]:
    scaled = (points - centre[:, None, None, None]) / radii[:, None, None, None]
    inside: NDArray[np.bool_] = (scaled**2).sum(axis=0) < 1
    return inside


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...]) -> Float:
    """A field without details, between -1 and 1: noise on a coarse grid, interpolated."""
    coarse = rng.uniform(-1, 1, (4, 4, 4))
    places = np.meshgrid(*(np.linspace(0, 3, n) for n in shape), indexing="ij")
    field: Float = np.clip(ndimage.map_coordinates(coarse, places, order=3, mode="nearest"), -1, 1)
    return field


def _channel(
    rng: np.random.Generator, tissue: NDArray[Any], modality: str, number: int, count: int
) -> NDArray[np.int16]:
    """Intensities of one channel: CT in Hounsfield units, or MR with bias field, Rician noise and any scale."""
    organs = np.array([_CONTRASTS[(n + number) % len(_CONTRASTS)] for n in range(count)])
    if modality == "CT":
        table = np.array([-1000.0, -100.0, 40.0, 500.0, *(40 + _HU_A_UNIT * (organs - 1))])
        blurred = ndimage.gaussian_filter(table[tissue], 0.5)
        return _int16(blurred + rng.normal(0, _HU_A_UNIT * _NOISE, tissue.shape))
    table = np.array([0.0, 1.2, 1.0, 0.3, *organs])
    clean = ndimage.gaussian_filter(table[tissue], 0.5) * (1 + 0.15 * _smooth_field(rng, tissue.shape))
    real, imaginary = rng.normal(0, _NOISE, (2, *tissue.shape))
    scale = 100 * np.exp(rng.uniform(0, 3))  # MR has no unit: scanners differ by more than this
    return _int16(scale * np.hypot(clean + real, imaginary))


def _int16(values: Float) -> NDArray[np.int16]:
    stored: NDArray[np.int16] = np.rint(values).astype(np.int16)
    return stored
