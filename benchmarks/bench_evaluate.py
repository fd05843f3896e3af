"""How long evaluation takes: 200 pairs of masks of Task04's size, two classes, Dice + NSD + HD95.

Times the whole of a fresh Python (start-up, reading, scoring, writing JSON and CSV), and beside it a plain loop over
MONAI's metrics on the same files, with the same definition of NSD (``use_subvoxels=True``). MONAI's HD95 counts edge
voxels where ours weighs surface, so that column differs.

    python benchmarks/bench_evaluate.py [PAIRS]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from medseg.geometry import Geometry
from medseg.io import write_mask
from medseg.volume import Mask

SHAPE = (36, 50, 35)  # about the median of Task04_Hippocampus, at 1 mm
TOLERANCE_MM = 1.0

MEDSEG = """
import sys
from pathlib import Path
from medseg.evaluate import evaluate_folders
folder, tolerance = Path(sys.argv[1]), float(sys.argv[2])
found = evaluate_folders(folder / "predictions", folder / "references", tolerance_mm=tolerance)
found.save(folder / "scores.json")
found.save_csv(folder / "scores.csv")
print(found.mean.dice, found.mean.nsd, found.mean.hd95_mm)
"""

MONAI = """
import sys
from pathlib import Path
import nibabel, numpy as np, torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
folder, tolerance = Path(sys.argv[1]), float(sys.argv[2])
rows = []
for path in sorted((folder / "references").iterdir()):
    images = [nibabel.load(folder / part / path.name) for part in ("predictions", "references")]
    spacing = [float(s) for s in images[1].header.get_zooms()[:3]]
    y_pred, y = (torch.nn.functional.one_hot(torch.from_numpy(np.asarray(i.dataobj)).long(), 3).movedim(-1, 0)[None]
                 for i in images)
    rows.append(torch.stack([
        compute_dice(y_pred, y, include_background=False)[0],
        compute_surface_dice(y_pred, y, [tolerance] * 2, spacing=spacing, use_subvoxels=True)[0],
        compute_hausdorff_distance(y_pred, y, percentile=95, spacing=spacing)[0],
    ]))
print(*torch.stack(rows).mean(dim=(0, 2)).tolist())
"""


def make_pairs(folder: Path, pairs: int) -> None:
    """Two touching ellipsoids a case, and a prediction whose borders are ragged by about a voxel."""
    rng = np.random.default_rng(0)
    i, j, k = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    for case in range(pairs):
        ragged = rng.normal(0.0, 0.15, SHAPE)
        for part, noise in (("references", 0.0), ("predictions", ragged)):
            array = np.zeros(SHAPE, dtype=np.uint8)
            for value, middle in ((1, 33.0), (2, 17.0)):
                distance = ((i - 18.0) / 7.0) ** 2 + ((j - middle) / 9.0) ** 2 + ((k - 17.0) / 8.0) ** 2
                array[distance + noise < 1.0] = value
            path = folder / part / f"case_{case:03d}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            write_mask(Mask(array, Geometry(SHAPE, np.eye(4))), path)


def seconds(code: str, folder: Path) -> float:
    """Wall time of a fresh Python that runs ``code`` on the folder; its output is shown."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folder), str(TOLERANCE_MM)], check=True)
    return time.perf_counter() - start


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pairs(folder, pairs)
        print(f"{pairs} pairs; mean Dice, NSD at {TOLERANCE_MM:g} mm, HD95 mm:")
        ours, theirs = seconds(MEDSEG, folder), seconds(MONAI, folder)
    print(f"medseg {ours:.2f} s, MONAI {theirs:.2f} s, ratio {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
