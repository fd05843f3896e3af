"""What tests of prediction share: phantoms on grids of all kinds, and models with a field changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from medseg import memory
from medseg.journal import Prediction
from medseg.networks import build_network
from medseg.package import ModelPackage
from medseg.phantom import make_case
from medseg.predict import Predictor, PredictSettings

TURN, HALF = Rotation.from_euler("xyz", [20, -15, 10], degrees=True), Rotation.from_euler("z", 45, degrees=True)


GRIDS = {
    "axial": np.diag([0.9, 0.9, 2.5]),
    "left-handed": np.diag([-0.9, 0.9, 2.5]),
    "oblique": TURN.as_matrix() * [0.9, 0.9, 2.5],
    "turned by 45 degrees": HALF.as_matrix() * [0.9, 0.9, 2.5],
    "sheared": np.array([[0.9, 0.2, 0], [0, 0.9, 0.3], [0, 0, 2.5]]),
}


SHAPE = (20, 18, 9)


FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


def affine_of(name: str) -> NDArray[np.float64]:
    """The affine as a NIfTI-1 header holds it."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = GRIDS[name], [-12.3, 7.7, 100.1]
    return affine.astype(np.float32).astype(float)


def voxels(channels: int = 1) -> NDArray[np.int16]:
    """A phantom of the fixed shape (C, 20, 18, 9), cut out of one that is a little larger."""
    volume, _ = make_case(0, shape=(24, 22, 12), channels=("MRI",) * channels)
    return np.ascontiguousarray(volume.array[:, :20, :18, :9])


def save(path: Path, array: NDArray[Any], affine: NDArray[Any] | None = None, **fields: Any) -> Path:
    """Write an array (I, J, K[, C]) with nibabel; ``fields`` of the header as given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine_of("axial") if affine is None else affine)
    for name, value in fields.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def untrained(package: ModelPackage, settings: PredictSettings | None = None, **changes: Any) -> Predictor:
    """A predictor with fresh weights for a plan with some fields changed: masks are nonsense, but always the same."""
    plan = package.plan.model_copy(update=changes)
    torch.manual_seed(0)
    weights = build_network(package.configuration, len(plan.channels), plan.outputs).state_dict()
    return Predictor(replace(package, plan=plan, weights={0: weights}), settings)


def statuses(results: list[Prediction]) -> dict[str, str]:
    return {result.case: result.status for result in results}


def limited(package: ModelPackage, monkeypatch: pytest.MonkeyPatch, limit_mb: float) -> Predictor:
    """A predictor that takes 100 MB at rest, and nothing for chunks."""
    monkeypatch.setattr(memory, "_CHUNKS_MB", 0.0)
    model = Predictor(package, PredictSettings(device="cpu", engine="eager", memory_limit_mb=limit_mb))
    model.memory = replace(model.memory, baseline_mb=100.0)
    return model
