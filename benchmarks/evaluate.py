"""How long scoring takes, and in how much memory: Dice + NSD + HD95 beside MONAI's metrics and surface-distance.

    MEDSEG_TEST_DATA=data python benchmarks/evaluate.py [--runs 3] [--peer PYTHON] [--only task04|large]

Two sets of pairs, the same for all: the 200 labels of the Decathlon's Task04 with predictions that are warped by about
a voxel (two classes), and one pair of 512 x 512 x 600 voxels with 25 organs of 5 ml to 1500 ml. Each tool is a fresh
Python that reads the files by nibabel and scores one pair after the other on one core's worth of its own threads; two
times are taken: of scoring alone, and of the whole process. ``medseg evaluate`` stands beside them: it finds
the labels first, checks files, scores ten measures, bootstraps intervals and writes tables.

MONAI is called class by class on binary masks, as one-hot masks of the large pair would take more memory than most
machines have, with ``use_subvoxels=True``, which is the same NSD. surface-distance is taken from the Python that
``--peer`` names (with surface-distance, nibabel, numpy and scipy; it is left out where there is none). Seconds are the
least of ``--runs``, memory is the most; the ratios are to medseg's.
"""

from __future__ import annotations

import argparse
import math
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

COMMAND = """
import sys
from pathlib import Path
from medseg.evaluate import EvaluateSettings, evaluate_folders
folder, tolerance = Path(sys.argv[1]), float(sys.argv[2])
settings = EvaluateSettings(tolerance_mm=tolerance)
found = evaluate_folders(folder / "predictions", folder / "references", settings=settings)
found.save(folder / "scores.json")
found.save_csv(folder / "scores.csv")
print("nan", found.mean.dice, found.mean.nsd, found.mean.hd95_mm)
"""

LOOP = """
import sys, time
from pathlib import Path
import nibabel, numpy as np
folder, tolerance = Path(sys.argv[1]), float(sys.argv[2])
{score}
def read(path):
    image = nibabel.load(path)
    return np.asarray(image.dataobj), [float(s) for s in image.header.get_zooms()[:3]]
names = sorted(path.name for path in (folder / "references").iterdir())
rows, seconds = [], 0.0
for n, name in enumerate([names[0], *names] if len(names) > 1 else names):
    prediction, spacing = read(folder / "predictions" / name)
    reference, _ = read(folder / "references" / name)
    labels = [int(label) for label in np.unique(reference)[1:]]
    start = time.perf_counter()
    found = score(prediction, reference, spacing, labels)
    if n or len(names) == 1:  # the first of many warms up
        seconds += time.perf_counter() - start
        rows += found
print(seconds, *np.mean(rows, axis=0))
"""

MEDSEG = """
from medseg.geometry import Geometry
from medseg.metrics import Scoring, score_pair
from medseg.volume import Labels
def score(prediction, reference, spacing, labels):
    names = Labels(values={f"label_{label}": label for label in labels})
    geometry = Geometry(reference.shape, np.diag([*spacing, 1.0]))
    found = score_pair(prediction, reference, geometry, Scoring(names, tolerance))
    return [(one.dice, one.nsd, one.hd95_mm) for one in found]
"""

MONAI = """
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
def score(prediction, reference, spacing, labels):
    rows, common = [], dict(include_background=True, spacing=spacing)
    for label in labels:
        a, b = (torch.from_numpy(mask == label)[None, None] for mask in (prediction, reference))
        rows.append((
            compute_dice(a, b).item(),
            compute_surface_dice(a, b, [tolerance], use_subvoxels=True, **common).item(),
            compute_hausdorff_distance(a, b, percentile=95, **common).item(),
        ))
    return rows
"""

SURFACE_DISTANCE = """
import surface_distance as sd
def score(prediction, reference, spacing, labels):
    rows = []
    for label in labels:
        a, b = prediction == label, reference == label
        found = sd.compute_surface_distances(b, a, spacing)
        rows.append((
            sd.compute_dice_coefficient(b, a),
            sd.compute_surface_dice_at_tolerance(found, tolerance),
            sd.compute_robust_hausdorff(found, 95),
        ))
    return rows
"""


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    scoring_s: float
    peak_mb: float
    means: str


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
    scoring, means = output.split(maxsplit=1)
    return Cost(time.perf_counter() - start, float(scoring), usage.ru_maxrss / 1024, means.strip())


def compare(name: str, folder: Path, runs: int, peer: str | None) -> None:
    loop = {tool: LOOP.format(score=score) for tool, score in (("medseg", MEDSEG), ("MONAI", MONAI))}
    tools = {tool: (sys.executable, code) for tool, code in loop.items()}
    if peer:
        tools["surface-distance"] = (peer, LOOP.format(score=SURFACE_DISTANCE))
    tools["medseg evaluate"] = (sys.executable, COMMAND)
    print(f"\n{name}: seconds of scoring, of the process, peak memory; mean Dice, NSD at {TOLERANCE_MM:g} mm, HD95 mm")
    ours = Cost(0.0, 0.0, 0.0, "")
    for tool, (python, code) in tools.items():
        costs = [cost(python, code, folder) for _ in range(runs)]
        seconds, scoring = min(c.seconds for c in costs), min(c.scoring_s for c in costs)
        peak = max(c.peak_mb for c in costs)
        ours = ours if ours.seconds else Cost(seconds, scoring, peak, "")
        alone = " " * 17 if math.isnan(scoring) else f"{scoring:8.2f} s x{scoring / ours.scoring_s:5.1f}"
        print(
            f"{tool:17}{alone} {seconds:8.2f} s x{seconds / ours.seconds:5.1f} {peak:6.0f} MB  {costs[0].means}",
            flush=True,
        )


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
