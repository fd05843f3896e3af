"""Small datasets that tests write and then spoil."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

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
