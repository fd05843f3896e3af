"""What tests of reports share: evaluations of small masks on disk, and names that would be markup elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medseg.evaluate import Evaluation, evaluate_folders
from medseg.geometry import Geometry
from medseg.io import write_mask
from medseg.report.gather import CaseFiles, Gathered
from medseg.volume import Labels, Mask

ALERT = "<script>alert(1)</script>"
CLOSE = "</script><img src=x onerror=alert(2)>"
GRID = Geometry((16, 14, 12), np.diag([1.0, 1.5, 2.0, 1.0]))

Block = tuple[int, int]
"""From where to where along the first axis a label is marked; nothing of (0, 0)."""


def mask(blocks: Mapping[int, Block], labels: Labels | None = None) -> Mask:
    """A mask in which each value marks some of the planes, of those 8 x 6 voxels."""
    array = np.zeros(GRID.shape, np.uint8)
    for value, (start, stop) in blocks.items():
        array[start:stop, 2:10, 3:9] = value
    return Mask(array, GRID, labels)


def scored(
    folder: Path, cases: Mapping[str, tuple[Mapping[int, Block], Mapping[int, Block] | None]], labels: Labels
) -> Evaluation:
    """Write masks (reference, and prediction or none), score them, and keep what ``evaluate`` does in ``scores``."""
    for name, (reference, prediction) in cases.items():
        write_mask(mask(reference), folder / "references" / f"{name}.nii.gz")
        if prediction is not None:
            write_mask(mask(prediction), folder / "predictions" / f"{name}.nii.gz")
    evaluation = evaluate_folders(folder / "predictions", folder / "references", labels)
    evaluation.save(folder / "scores" / "evaluation.json")
    return evaluation


def gathered(evaluation: Evaluation, **facts: object) -> Gathered:
    """An evaluation alone, without files."""
    known = {"kind": "evaluation", "name": "small", "labels": evaluation.labels}
    files = {case.case: CaseFiles() for case in evaluation.cases}
    return Gathered(**{**known, "evaluation": evaluation, "files": files, **facts})  # type: ignore[arg-type]
