"""Made-up datasets, of anatomy and of land seen from above: for demos, and for tests of what needs whole cases.

A phantom is a body with a rim of fat, a bone, and one organ a label: lobed, differently deformed from case to case, at
its own place and with its own intensity. With two labels or more, the last one is a lesion inside the first organ. A
smooth bias field, noise and blobs that look like organs but are none keep thresholds from solving it.

A scene is land in six bands of reflectance: open land, and on it water, forest, fields and towns, with clouds that hide
some of it. Each cover is a mixture of materials which other covers have too, so that a pixel alone does not tell:
gardens are green as crops are, and bare fields are what open land is. Texture and shape tell.
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
from medseg.io.picture import picture_grid
from medseg.records import replacing, write_json
from medseg.resample import cubic_operator
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

LAND_COVER: Mapping[str, int] = MappingProxyType({"water": 1, "forest": 2, "field": 3, "built-up": 4})
LAND_BANDS = ("blue", "green", "red", "near infrared", "short-wave infrared 1", "short-wave infrared 2")
_WATER, _TREES, _CROP, _SOIL, _ROOF, _ASPHALT = range(6)
_SPECTRA = np.array(  # reflectance times 10,000 of the materials, band by band; typical values
    [
        [600, 500, 350, 200, 120, 90],
        [350, 550, 350, 3000, 1500, 700],
        [500, 850, 550, 3600, 2000, 1100],
        [1100, 1500, 1900, 2500, 3200, 2700],
        [2200, 2400, 2600, 2900, 3100, 2900],
        [1100, 1200, 1300, 1500, 1700, 1600],
    ],
    dtype=np.float32,
)
_PIXEL_M = 10.0
_UTM_32_NORTH = 32632  # EPSG code


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


def write_scenes(
    folder: Path,
    *,
    name: str = "Land",
    tiles: int = 20,
    tile_shape: tuple[int, int] = (256, 256),
    scene_shape: tuple[int, int] = (1500, 1000),
    seed: int = 0,
) -> Path:
    """Write a dataset of small GeoTIFF tiles with masks, and a large scene; the same arguments give the same bytes.

    All lie on one map, in UTM zone 32 north with pixels of 10 m, the tiles beside the scene. Pixels under clouds are 0
    in every band, which the images have as nodata value, and background in the masks.

    Args:
        folder: where ``dataset.json``, ``imagesTr`` and ``labelsTr`` go, and ``scene.tif`` with ``reference.tif``.
        name: of the dataset, and in lower case of its tiles.
        tiles: how many.
        tile_shape: columns and rows of a tile.
        scene_shape: columns and rows of the scene.
        seed: another seed gives other land.

    Returns:
        ``folder``.
    """
    ids = [f"{name.lower()}_{number:03d}" for number in range(1, tiles + 1)]
    for number, case in enumerate(ids, start=1):
        image, mask = make_scene(number, shape=tile_shape, seed=seed)
        corner = (number * tile_shape[0] + scene_shape[0], 0)
        _write_geotiff(folder / "imagesTr" / f"{case}.tif", image.array, corner, nodata=0)
        _write_geotiff(folder / "labelsTr" / f"{case}.tif", mask.array[np.newaxis], corner)
    image, mask = make_scene(0, shape=scene_shape, seed=seed)
    _write_geotiff(folder / "scene.tif", image.array, (0, 0), nodata=0)
    _write_geotiff(folder / "reference.tif", mask.array[np.newaxis], (0, 0))
    # channels are named after their unit, which asks for one scale for all tiles and lets a scene be cut into windows
    channels = ["reflectance"] * len(LAND_BANDS)
    write_json(folder / "dataset.json", _description(name, ids, [], LAND_COVER, channels, ".tif"))
    return folder


def make_scene(number: int, *, shape: tuple[int, int] = (256, 256), seed: int = 0) -> tuple[Volume, Mask]:
    """Land as a picture: uint16 reflectance times 10,000 (6, I, J, 1) and its mask (I, J, 1); columns I, rows J.

    Clouds are 0 in both; elsewhere no band is.
    """
    rng = np.random.default_rng([seed, number])
    cover = _land_cover(rng, shape)
    shares = _materials(rng, cover)
    crowns = np.where(cover == LAND_COVER["forest"], 0.25 * _noise(rng, shape, 3), 0)
    light = 1 + 0.08 * _noise(rng, shape, 120) + crowns
    haze = 80 * (1.5 + _noise(rng, shape, 200))
    clean = [np.tensordot(spectrum, shares, axes=1) * light for spectrum in _SPECTRA.T]
    image = np.stack([_band(rng, band, haze / (n + 1)) for n, band in enumerate(clean)])
    cloud = _noise(rng, shape, 80) > 1.9
    image[:, cloud], cover[cloud] = 0, 0
    geometry = picture_grid((*shape, 1))
    labels = Labels(values=dict(LAND_COVER))
    return Volume(image[..., np.newaxis], geometry), Mask(cover[..., np.newaxis], geometry, labels)


def _description(
    name: str,
    training: list[str],
    test: list[str],
    labels: Mapping[str, int],
    channels: Sequence[str],
    suffix: str = ".nii.gz",
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
        "training": [
            {"image": f"./imagesTr/{case}{suffix}", "label": f"./labelsTr/{case}{suffix}"} for case in training
        ],
        "test": [f"./imagesTs/{case}{suffix}" for case in test],
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


# ---- land ------------------------------------------------------------------------------------------------------------


def _land_cover(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Label of every pixel, 0 for open land: where smooth noise is high or low, with borders bent by finer noise."""
    cover = np.zeros(shape, np.uint8)
    rough = 0.25 * _noise(rng, shape, 8)
    cover[_noise(rng, shape, 90) + 0.3 * rough > -0.4] = LAND_COVER["field"]
    cover[_noise(rng, shape, 60) + rough > 0.6] = LAND_COVER["forest"]
    cover[_noise(rng, shape, 70) + rough > 0.9] = LAND_COVER["built-up"]
    river, lake = np.abs(_noise(rng, shape, 150) + 0.1 * rough), _noise(rng, shape, 100) + rough
    cover[(river < 0.07) | (lake > 1.4)] = LAND_COVER["water"]
    return cover


def _materials(rng: np.random.Generator, cover: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Share of each material in every pixel, (materials, I, J); soil is what the others leave."""
    shape = cover.shape
    house = np.repeat(np.repeat(rng.random((shape[0] // 4 + 1, shape[1] // 4 + 1)), 4, axis=0), 4, axis=1)
    house = house[: shape[0], : shape[1]]
    mixtures: dict[int, dict[int, NDArray[Any]]] = {
        0: {_CROP: 0.5 + 0.2 * _noise(rng, shape, 25), _TREES: 0.2 * _noise(rng, shape, 9)},
        LAND_COVER["water"]: {_WATER: 0.9 + 0.08 * _noise(rng, shape, 30)},
        LAND_COVER["forest"]: {_TREES: 0.8 + 0.15 * _noise(rng, shape, 5), _CROP: 0.2 * _noise(rng, shape, 12)},
        LAND_COVER["field"]: {_CROP: _crops(rng, shape)},
        LAND_COVER["built-up"]: {
            _ROOF: house < 0.35,
            _ASPHALT: (house >= 0.35) & (house < 0.55),
            _CROP: (house >= 0.55) & (house < 0.85),
            _TREES: house >= 0.9,
        },
    }
    share = np.zeros((len(_SPECTRA), *shape), np.float32)
    for value, materials in mixtures.items():
        for material, part in materials.items():
            share[material] += np.where(cover == value, np.clip(part, 0, 1), 0)
    share /= np.maximum(share.sum(axis=0), 1)
    share[_SOIL] = 1 - share.sum(axis=0)
    return share


def _crops(rng: np.random.Generator, shape: tuple[int, int]) -> Float:
    """How green fields are: parcels from bare to full, each with rows along its longer side."""
    i, j = np.meshgrid(*(np.arange(n) + 4 * rng.random() for n in shape), indexing="ij")
    angle = rng.uniform(0, np.pi)
    along, across = i * np.cos(angle) + j * np.sin(angle), j * np.cos(angle) - i * np.sin(angle)
    table = rng.random((64, 64))
    parcel = table[np.floor(along / 45).astype(int) % 64, np.floor(across / 25).astype(int) % 64]
    crops: Float = 0.1 + 0.8 * parcel + 0.12 * np.sin(across * (2 * np.pi / 5))
    return crops


def _band(rng: np.random.Generator, clean: NDArray[Any], haze: NDArray[Any]) -> NDArray[np.uint16]:
    """A band as a sensor gives it: blurred over neighbouring pixels, hazy, noisy, in steps of 1 from 1 on."""
    seen = ndimage.gaussian_filter(clean, 0.8) + haze
    noisy = seen * (1 + 0.03 * rng.standard_normal(seen.shape)) + 60 * rng.standard_normal(seen.shape)
    stored: NDArray[np.uint16] = np.clip(np.rint(noisy), 1, 65535).astype(np.uint16)
    return stored


def _noise(rng: np.random.Generator, shape: tuple[int, int], pixels: int) -> Float:
    """Smooth noise (I, J) of mean 0 and standard deviation near 1, without details smaller than so many pixels."""
    sizes = [max(4, n // pixels + 3) for n in shape]
    along, across = (cubic_operator(m, m * pixels)[:n] for m, n in zip(sizes, shape, strict=True))
    smooth: Float = along @ rng.standard_normal(sizes) @ across.T * 1.3  # interpolation evens out a part of it
    return smooth


def _write_geotiff(path: Path, array: NDArray[Any], corner: tuple[int, int], nodata: int | None = None) -> None:
    """Write bands (C, I, J, 1) whose first pixel is so many columns and rows from the map's first, atomically.

    The tags are those of the GeoTIFF standard (OGC 19-008r4) and GDAL's for the nodata value.
    """
    import tifffile

    east, north = 500_000 + _PIXEL_M * corner[0], 5_400_000 - _PIXEL_M * corner[1]
    keys = (1, 1, 0, 3, *(1024, 0, 1, 1), *(1025, 0, 1, 1), *(3072, 0, 1, _UTM_32_NORTH))  # projected, area, system
    tags: list[tuple[int, str, int, Any, bool]] = [
        (33550, "d", 3, (_PIXEL_M, _PIXEL_M, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, east, north, 0.0), True),
        (34735, "H", len(keys), keys, True),
    ]
    if nodata is not None:
        tags.append((42113, "s", 0, str(nodata), True))
    with replacing(path) as temporary:
        tifffile.imwrite(
            temporary,
            array[..., 0].transpose(2, 1, 0) if len(array) > 1 else array[0, ..., 0].T,
            photometric="minisblack",
            planarconfig="contig" if len(array) > 1 else None,
            tile=(256, 256),
            compression="zlib",
            software="medseg",
            metadata=None,
            extratags=tags,
        )
