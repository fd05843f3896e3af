"""Small datasets that tests write and then spoil."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

SHAPE = (8, 9, 10)


def image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(1, 100, shape).astype(np.float32)


def mask(shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    array = np.zeros(shape, np.uint8)
    array[2:4, 2:4, 2:4], array[5:7, 2:4, 2:4] = 1, 2
    return array


def write(path: Path, array: np.ndarray[Any, Any], spacing: tuple[float, ...] = (1, 1, 1), shift: float = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    affine[0, 3] = shift
    nibabel.Nifti1Image(array, affine).to_filename(path)


def decathlon(root: Path, count: int = 6, **changes: Any) -> Path:
    """A sound Decathlon task of ``count`` cases c0, c1, ..."""
    names = [f"c{n}" for n in range(count)]
    for n, name in enumerate(names):
        write(root / "imagesTr" / f"{name}.nii.gz", image(n))
        write(root / "labelsTr" / f"{name}.nii.gz", mask())
    body = {
        "name": "Blobs",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "near", "2": "far"},
        "numTraining": count,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps({**body, **changes}))
    return root


def nnunet(root: Path, **changes: Any) -> Path:
    for n, name in enumerate(["b", "a"]):
        for channel in range(2):
            write(root / "imagesTr" / f"{name}_000{channel}.nii.gz", image(2 * n + channel))
        write(root / "labelsTr" / f"{name}.nii.gz", mask())
    write(root / "imagesTs" / "t_0000.nii.gz", image(10))
    write(root / "imagesTs" / "t_0001.nii.gz", image(11))
    body = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "near": 1, "far": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps({**body, **changes}))
    return root


def write_pictures(root: Path, count: int = 6, size: tuple[int, int] = (40, 32), ending: str = ".png") -> Path:
    """A sound nnU-Net dataset of RGB pictures p0, p1, ...: bright discs (label 1) and dark squares (3) on grey noise.

    ``size`` is columns and rows; every third picture lies on its side in the file.
    """
    for n in range(count):
        pixels, label = picture(n, size)
        for part, name, array in (("imagesTr", f"p{n}_0000", pixels), ("labelsTr", f"p{n}", label)):
            save_picture(root / part / f"{name}{ending}", array, 6 if n % 3 == 2 else 1)
    body = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "disc": 1, "square": 3},
        "numTraining": count,
        "file_ending": ending,
    }
    (root / "dataset.json").write_text(json.dumps(body))
    return root


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """An upright RGB picture (rows, columns, 3) with its mask (rows, columns)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size[::-1])
    label = np.zeros(size[::-1], np.uint8)
    j, i = rng.integers(8, size[1] - 8), rng.integers(8, size[0] // 2)
    label[(rows - j) ** 2 + (columns - i) ** 2 < 25] = 1
    label[j - 4 : j + 4, size[0] // 2 + 4 : size[0] // 2 + 11] = 3
    shade = np.choose(label, [120, 250, 0, 10])[..., np.newaxis] * np.array([1.0, 0.9, 0.5])
    return np.clip(shade + rng.normal(0, 6, (*label.shape, 3)), 1, 255).astype(np.uint8), label


def save_picture(path: Path, upright: np.ndarray[Any, Any], orientation: int = 1) -> Path:
    """Save an upright picture; with orientation 6 its pixels are turned in the file, and the tag turns them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.rot90(upright) if orientation == 6 else upright
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    return path


def nuclei(root: Path, count: int = 6, size: tuple[int, int] = (48, 40)) -> Path:
    """A folder as the Data Science Bowl 2018 has it: RGBA images n0, n1, ... and one mask a nucleus.

    Each has two squares of 10 pixels that touch, and one of 6 by itself, bright on black; every third is dark on white.
    ``size`` is columns and rows.
    """
    for n in range(count):
        rng = np.random.default_rng(n)
        rows, columns = rng.integers(2, size[1] - 12), rng.integers(2, size[0] - 34)
        shade = rng.normal(20, 3, size[::-1])
        for number, (column, edge) in enumerate(((columns, 10), (columns + 10, 10), (columns + 24, 6))):
            mask = np.zeros(size[::-1], np.uint8)
            mask[rows : rows + edge, column : column + edge] = 255
            shade[mask > 0] += 150 + 20 * number
            save_picture(root / "stage1_train" / f"n{n}" / "masks" / f"{number}.png", mask)
        grey = (255 - shade if n % 3 == 2 else shade).clip(0, 255).astype(np.uint8)
        pixels = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
        save_picture(root / "stage1_train" / f"n{n}" / "images" / f"n{n}.png", pixels)
    return root
