"""How long scoring takes, and in how much memory: Dice + NSD + HD95 beside MONAI's metrics and surface-distance.

    MEDSEG_TEST_DATA=data python benchmarks/evaluate.py [--runs 3] [--peer PYTHON]

Two sets of pairs, the same for all: the 200 labels of the Decathlon's Task04 with predictions that are warped by about
a voxel (two classes), and one pair of 512 x 512 x 600 voxels with 25 organs of 5 ml to 1500 ml. Each tool is a whole
fresh Python that reads the files and scores them: start-up included, as for whoever waits for it. MONAI is called class
by class on binary masks, as one-hot masks of the large pair would take more memory than most machines have, with
``use_subvoxels=True``, which is the same NSD. surface-distance is taken from the Python that ``--peer`` names (an
environment with surface-distance, nibabel, numpy and scipy; its name is left out where there is none). Seconds are the
least of ``--runs``, memory is the most; each line has the ratio to medseg.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from medseg.dataset import Dataset
from medseg.geometry import Geometry
from medseg.io import read_mask, write_mask
from medseg.volume import Mask

TOLERANCE_MM = 1.0
LARGE = (512, 512, 600)
SPACING_MM = (0.8, 0.8, 1.0)
ORGANS = 25

MEDSEG = """
import sys
from pathlib import Path
from medseg.evaluate import EvaluateSettings, evaluate_folders
folder, tolerance = Path(sys.argv[1]), float(sys.argv[2])
settings = EvaluateSettings(tolerance_mm=tolerance)
found = evaluate_folders(folder / "predictions", folder / "references", settings=settings)
found.save(folder / "scores.json")
found.save_csv(folder / "scores.csv")
print(found.mean.dice, found.mean.nsd, found.mean.hd95_mm)
"""

_LOOP = """
import sys
from pathlib import Path
import nibabel, numpy as np
{imports}
folder, tolerance = Path(sys.argv[1]), float(sys.argv[2])
rows = []
for path in sorted((folder / "references").iterdir()):
    images = [nibabel.load(folder / part / path.name) for part in ("predictions", "references")]
    spacing = [float(s) for s in images[1].header.get_zooms()[:3]]
    y_pred, y = (np.asarray(image.dataobj) for image in images)
    for label in np.unique(y)[1:]:
        a, b = y_pred == label, y == label
{body}
print(*np.mean(rows, axis=0))
"""

MONAI = _LOOP.format(
    imports="import torch\nfrom monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice",
    body="""
        a, b = (torch.from_numpy(mask)[None, None] for mask in (a, b))
        common = dict(include_background=True, spacing=spacing)
        rows.append([
            compute_dice(a, b).item(),
            compute_surface_dice(a, b, [tolerance], use_subvoxels=True, **common).item(),
            compute_hausdorff_distance(a, b, percentile=95, **common).item(),
        ])
""",
)

SURFACE_DISTANCE = _LOOP.format(
    imports="import surface_distance as sd",
    body="""
        found = sd.compute_surface_distances(b, a, spacing)
        rows.append([
            sd.compute_dice_coefficient(b, a),
            sd.compute_surface_dice_at_tolerance(found, tolerance),
            sd.compute_robust_hausdorff(found, 95),
        ])
""",
)


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    peak_mb: float
    output: str


def make_task04(folder: Path) -> None:
    """The labels of Task04, and predictions that are warped by a smooth random field of about a voxel."""
    dataset = Dataset.open(Path(os.environ["MEDSEG_TEST_DATA"]) / "Task04_Hippocampus")
    rng = np.random.default_rng(0)
    for case in dataset.cases:
        assert case.label is not None
        mask = read_mask(case.label, dataset.labels)
        moved = [ndimage.gaussian_filter(rng.normal(0.0, 1.0, mask.array.shape), 3.0) * 20.0 for _ in range(3)]
        places = [index + shift for index, shift in zip(np.indices(mask.array.shape), moved, strict=True)]
        warped = ndimage.map_coordinates(mask.array, places, order=0)
        save(folder, case.id, warped.astype(np.uint8), mask.array.astype(np.uint8), mask.geometry)


def make_large(folder: Path) -> None:
    """25 ellipsoids; those of the prediction are moved, stretched and ragged by about two voxels."""
    rng = np.random.default_rng(0)
    arrays = [np.zeros(LARGE, dtype=np.uint8) for _ in range(2)]
    cells = [(i, j, k) for i in range(3) for j in range(3) for k in range(3)][:ORGANS]
    for value, cell in enumerate(cells, start=1):
        radius_mm = np.cbrt(np.geomspace(5e3, 1.5e6, ORGANS)[value - 1] * 3 / (4 * np.pi))
        radii = np.minimum(radius_mm / np.array(SPACING_MM) * rng.uniform(0.8, 1.2, 3), np.array(LARGE) / 6.5)
        centre = (np.array(cell) + 0.5) * np.array(LARGE) / 3.0
        for array, off, noise in ((arrays[1], 0.0, 0.0), (arrays[0], rng.normal(0.0, 1.0, 3), 1.0)):
            start, stop = (np.clip(centre + s * (radii + 4.0), 0, LARGE).astype(int) for s in (-1, 1))
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            i, j, k = np.ogrid[box]
            at = [(index - c) / r for index, c, r in zip((i, j, k), centre + off, radii, strict=True)]
            shape = tuple(stop - start)
            ragged = noise * rng.normal(0.0, 2.0, shape) / radii.min() if noise else 0.0
            array[box][at[0] ** 2 + at[1] ** 2 + at[2] ** 2 + ragged < 1.0] = value
    save(folder, "large", *arrays, Geometry(LARGE, np.diag([*SPACING_MM, 1.0])))


def save(folder: Path, case: str, prediction: np.ndarray, reference: np.ndarray, geometry: Geometry) -> None:
    for part, array in (("predictions", prediction), ("references", reference)):
        path = folder / part / f"{case}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mask(Mask(array, geometry), path)


def cost(python: str, code: str, folder: Path) -> Cost:
    """Wall time and peak memory of a fresh Python that runs ``code`` on the folder."""
    start = time.perf_counter()
    command = [python, "-W", "ignore", "-c", code, str(folder), str(TOLERANCE_MM)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command[:3])}")
    return Cost(time.perf_counter() - start, usage.ru_maxrss / 1024, output.strip())


def compare(name: str, folder: Path, runs: int, peer: str | None) -> None:
    tools = {"medseg": (sys.executable, MEDSEG), "MONAI": (sys.executable, MONAI)}
    if peer:
        tools["surface-distance"] = (peer, SURFACE_DISTANCE)
    print(f"\n{name}; mean Dice, NSD at {TOLERANCE_MM:g} mm, HD95 mm behind each", flush=True)
    ours = 0.0
    for tool, (python, code) in tools.items():
        costs = [cost(python, code, folder) for _ in range(runs)]
        seconds = min(c.seconds for c in costs)
        ours = ours or seconds
        peak = max(c.peak_mb for c in costs)
        print(f"{tool:18} {seconds:7.2f} s  x{seconds / ours:5.1f}  {peak:6.0f} MB   {costs[0].output}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer", help="Python that has surface-distance")
    parser.add_argument("--only", choices=["task04", "large"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.only != "large":
            make_task04(Path(name) / "task04")
            compare("200 pairs of Task04", Path(name) / "task04", options.runs, options.peer)
        if options.only != "task04":
            make_large(Path(name) / "large")
            title = f"one pair of {'x'.join(map(str, LARGE))} voxels, {ORGANS} labels"
            compare(title, Path(name) / "large", options.runs, options.peer)


if __name__ == "__main__":
    main()
