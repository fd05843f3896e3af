"""Prediction beside nnU-Net and MONAI: time, memory and labels, with the same weights, tiles and mirroring in one run.

    python benchmarks/predict.py memory --slices 1000 --classes 118 --limit 6GB
    python benchmarks/predict.py memory --slices 600 --classes 25 --limit 3GB
    python benchmarks/predict.py equality
    python benchmarks/predict.py task04 --peer PEER/bin/python --data Task04_Hippocampus --package PACKAGE --cases 60
    python benchmarks/predict.py anisotropic --peer PEER/bin/python          # and: larger, fullsize; with --mirror
    python benchmarks/predict.py prepare --peer PEER/bin/python
    python benchmarks/predict.py monai

PEER is a virtual environment of its own with nnunetv2; psutil is needed beside medseg. Whole commands are timed, from
start to exit, and their memory is the largest sum of resident memory of all their processes, looked at every 50 ms.
nnU-Net gets the weights as a model folder (see ``nnunet_folder.py``), and medseg reads them from there with ``medseg
import-nnunet``: both run the same network on the same tiles. Phantoms and random weights are made by this script: a
CT-like body with organs and noise, and networks whose kernels are boxes, so that their masks have regions.

Where labels differ, the gap between the two logits in question is compared with what nnU-Net's accumulation in half
precision may be off by, bounded voxel by voxel (``HalfPrecision``): a voxel within it is a tie.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import torch
from nnunet_folder import plan_of, random_package, write_model_folder
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medseg.dataset import Dataset
from medseg.evaluate import evaluate_folders
from medseg.io import read_mask, read_volume
from medseg.io.nifti import write_volume
from medseg.package import ModelPackage, load_package
from medseg.phantom import make_case, make_dataset
from medseg.plan import Resampling
from medseg.preprocess import GridTrace, prepare
from medseg.sliding_window import gaussian, tile_starts

EVERY_S = 0.05
HALF, SMALLEST_HALF = 2.0**-11, 2.0**-24  # of half precision: largest relative error, and smallest number
Row = dict[str, Any]


# Whole commands


@dataclass(frozen=True)
class Run:
    """A command's wall time, and the memory of it and its children."""

    seconds: float
    peak_mb: float


def run(command: Sequence[object], log: Path, **environment: str) -> Run:
    """Run a command to its end, its output in ``log``; what it said is shown where it fails."""
    words = [str(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        start, peak = time.perf_counter(), 0
        process = psutil.Popen(words, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        while True:
            peak = max(peak, resident_bytes(process))
            try:
                code = process.wait(EVERY_S)
                break
            except psutil.TimeoutExpired:
                continue
        seconds = time.perf_counter() - start
    if code:
        raise SystemExit(f"{' '.join(words)}\nended with {code}:\n{log.read_text()[-3000:]}")
    return Run(seconds, peak / 2**20)


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and all below it."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def medseg(arguments: Sequence[object], log: Path) -> Run:
    return run([Path(sys.executable).with_name("medseg"), *arguments], log)


def predict(package: Path, images: Path, out: Path, engine: str, mirror: bool, *more: object) -> Run:
    """``medseg predict``, from nothing."""
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--mirror"] if mirror else []
    command = ["predict", images, "-m", package, "-o", out, "--engine", engine, "--device", "cpu", *flags, *more]
    return medseg(command, out.with_suffix(".log"))


def nnunet_predict(peer: Path, model: Path, images: Path, out: Path, mirror: bool) -> Run:
    """``nnUNetv2_predict_from_modelfolder`` of fold 0 on the processor."""
    shutil.rmtree(out, ignore_errors=True)
    script, flags = peer.with_name("nnUNetv2_predict_from_modelfolder"), [] if mirror else ["--disable_tta"]
    command = [script, "-i", images, "-o", out, "-m", model, "-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1, *flags]
    return run(command, out.with_suffix(".log"), **peer_environment(model))


def model_folder(folder: Path, package: ModelPackage) -> Path:
    """A package for nnU-Net, with mirroring along all axes, as nnU-Net trains by default."""
    configuration = package.manifest.configuration
    return write_model_folder(folder, package.plan, configuration, package.weights, (0, 1, 2))


def peer_environment(folder: Path) -> dict[str, str]:
    paths = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), str(folder))
    return {**paths, "nnUNet_compile": "f"}


# Data


def ct_phantom(
    path: Path, shape: Sequence[int], spacing_mm: Sequence[float], seed: int = 0, organs: int = 30, noise: float = 10
) -> Path:
    """Write an int16 CT (I, J, K) in RAS, if it is not there: a body in air, with a rim of fat, organs and noise."""
    if path.exists():
        return path
    rng = np.random.default_rng(seed)
    i, j = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape[:2]), indexing="ij")
    centres, radii = rng.uniform(-0.6, 0.6, (organs, 3)), rng.uniform(0.08, 0.3, (organs, 3))
    units = rng.choice([-700, -60, 10, 60, 100, 150, 220, 700], organs)
    volume = np.empty(shape, np.int16, order="F")
    rim = (i / 0.9) ** 2 + (j / 0.7) ** 2
    for k, z in enumerate(np.linspace(-1, 1, shape[2])):
        plane = np.select([rim < 0.88, rim < 1], [40.0, -100.0], -1000.0)
        for centre, radius, unit in zip(centres, radii, units, strict=True):
            left = 1 - ((z - centre[2]) / radius[2]) ** 2
            if left > 0:
                inside = ((i - centre[0]) / radius[0]) ** 2 + ((j - centre[1]) / radius[1]) ** 2 < left
                plane[inside & (rim < 0.88)] = unit
        volume[..., k] = np.rint(plane + rng.normal(0, noise, plane.shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(volume, np.diag([*spacing_mm, 1.0])).to_filename(path)
    return path


def linked(images: Mapping[str, Path], folder: Path) -> Path:
    """A folder of links to images, named as nnU-Net wants them; medseg takes them too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for case, image in images.items():
        (folder / f"{case}_0000.nii.gz").symlink_to(image.resolve())
    return folder


# The plain way: all logits of a volume at once


@dataclass(frozen=True)
class HalfPrecision:
    """How far nnU-Net's logits may be off, as it weights tiles and adds them up in half precision.

    A sum of k weighted tiles is rounded k times, each time by at most 2^-11 of what the sum may have been, or by 2^-25
    where that is so small that half precision has no smaller steps (far from the centres of all tiles, where the
    weights are tiny). The division and the resampled result are rounded once more each. The weights are rounded too,
    and none is below 2^-24, which shifts the mean of the tiles.

    Attributes:
        tiles: float32 (D, H, W), how many tiles a voxel is in.
        mass: what nnU-Net's weights of them add up to.
        largest: the largest logit of any class in any of these tiles, in absolute value.
    """

    tiles: Tensor
    mass: Tensor
    largest: Tensor

    @property
    def gap(self) -> Tensor:
        """Largest difference of two logits that may be lost, (D, H, W)."""
        sums = (self.tiles + 2) * HALF * self.largest + self.tiles * SMALLEST_HALF / 2 / self.mass
        weights = 2 * self.largest * (HALF + self.tiles * SMALLEST_HALF / self.mass)
        return 2 * (sums + weights)


@torch.inference_mode()
def whole_logits(package: ModelPackage, image: NDArray[np.float32], mirror: bool) -> tuple[Tensor, HalfPrecision]:
    """Logits (classes, D, H, W) of a prepared image (C, D, H, W): a sum over tiles, and a sum over mirrorings."""
    setup, (network, *_) = package.configuration, package.networks()
    patch, shape = setup.patch_size, image.shape[1:]
    missing = [max(0, p - n) for p, n in zip(patch, shape, strict=True)]
    padded = F.pad(torch.from_numpy(image), [side for m in reversed(missing) for side in (m // 2, m - m // 2)])
    total = torch.zeros(package.plan.outputs, *padded.shape[1:])
    tiles, mass, half_mass, largest = (torch.zeros(padded.shape[1:]) for _ in range(4))
    weight = gaussian(patch)
    half_weight = weight.half().float().clamp_min(SMALLEST_HALF)
    flips = [[axis + 2 for axis in setup.mirror_axes if 1 << axis & n] for n in range(8 if mirror else 1)]
    starts = (tile_starts(n, p, 0.5) for n, p in zip(padded.shape[1:], patch, strict=True))
    for corner in torch.cartesian_prod(*(torch.tensor(s) for s in starts)).tolist():
        place = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        tile = padded[(slice(None), *place)][None]
        logits = sum(network(tile.flip(axes)).flip(axes) for axes in flips)[0] / len(flips)
        total[(slice(None), *place)] += logits * weight
        largest[place] = torch.maximum(largest[place], logits.abs().amax(dim=0))
        mass[place] += weight
        half_mass[place] += half_weight
        tiles[place] += 1
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape, strict=True))
    sums = HalfPrecision(tiles[inside], half_mass[inside], largest[inside])
    return (total / mass)[(slice(None), *inside)], sums


def resampled(values: Tensor, trace: GridTrace) -> Tensor:
    """(C, D, H, W) on the plan grid to the native crop, in plan order: trilinear, or nearest along an axis."""
    box = [stop - start for start, stop in zip(trace.box_start, trace.box_stop, strict=True)]
    for axis, order in enumerate(trace.orders):
        if order == 0:
            nearest = (2 * torch.arange(box[axis]) + 1) * values.shape[axis + 1] // (2 * box[axis])
            values = values.index_select(axis + 1, nearest)
    return F.interpolate(values[None], box, mode="trilinear", align_corners=False)[0]


def plain_prediction(package: ModelPackage, path: Path, mirror: bool) -> tuple[Tensor, Tensor, Any]:
    """Logits (classes, *box) of an image, the gap of ties (*box), and the place of the box in the array (K, J, I).

    The image lies as the plan's orientation says, or that is how it is stored.
    """
    plan = package.plan
    ready = prepare(read_volume(path, len(plan.channels)), plan, package.configuration)
    logits, sums = whole_logits(package, ready.image, mirror)
    place = tuple(slice(a, b) for a, b in zip(ready.trace.box_start, ready.trace.box_stop, strict=True))
    return resampled(logits, ready.trace), resampled(sums.gap[None], ready.trace)[0], place


# Beside nnU-Net


@dataclass(frozen=True)
class Agreement:
    """How two folders of masks compare."""

    voxels: int
    differing: int
    ties: int
    widest_gap: float

    @property
    def equal(self) -> float:
        """Fraction of the voxels."""
        return 1 - self.differing / self.voxels


def agreement(ours: Path, theirs: Path, images: Path, package: ModelPackage | None, mirror: bool) -> Agreement:
    """Compare masks of the same cases; with a package, whether each difference is a tie."""
    voxels = differing = ties = 0
    widest = 0.0
    for image in sorted(images.iterdir()):
        name = image.name.replace("_0000", "")
        mine, other = read_mask(ours / name).array, read_mask(theirs / name).array
        voxels, here = voxels + mine.size, int((mine != other).sum())
        differing += here
        if here and package is not None:
            found, gap = explained(package, image, mine, other, mirror)
            ties, widest = ties + found, max(widest, gap)
    return Agreement(voxels, differing, ties, widest)


def explained(
    package: ModelPackage, image: Path, mine: NDArray[Any], other: NDArray[Any], mirror: bool
) -> tuple[int, float]:
    """How many of the voxels where two masks differ are ties, and the widest gap of logits among them all."""
    logits, allowed, place = plain_prediction(package, image, mirror)
    first, second = (torch.from_numpy(m.transpose(package.plan.axes)[place].astype(np.int64)) for m in (mine, other))
    where = first != second
    pair = [logits[:, where].gather(0, labels[where][None])[0] for labels in (first, second)]
    gap = (pair[0] - pair[1]).abs()
    return int((gap <= allowed[where]).sum()), float(gap.max()) if len(gap) else 0.0


@dataclass(frozen=True)
class Comparison:
    """What both programs are given.

    Attributes:
        work: folder for everything that is written.
        package: the weights.
        images: case id -> file.
        dataset: to calibrate the 8-bit network on; by default it calibrates itself on the first case.
        held_out: cases that the network has not seen, for the Dice against the dataset's labels.
    """

    work: Path
    package: ModelPackage
    images: Mapping[str, Path]
    dataset: Path | None = None
    held_out: tuple[str, ...] = ()

    def rows(self, peer: Path, engines: Sequence[str], mirror: bool) -> list[Row]:
        """nnU-Net's row, and one an engine."""
        images = linked(self.images, self.work / "images")
        model = model_folder(self.work / "model", self.package)
        imported = self.work / "imported"
        shutil.rmtree(imported, ignore_errors=True)
        medseg(["import-nnunet", model, "-o", imported], self.work / "import.log")
        if "openvino-int8" in engines:
            print(f"quantised once, in {self.quantised(imported, images).seconds:.1f} s", flush=True)
        theirs = self.work / "nnunet"
        peer_run = nnunet_predict(peer, model, images, theirs, mirror)
        rows = [row("nnU-Net", mirror, peer_run, dice=self.dice(theirs, mirror))]
        for engine in engines:
            ours = self.work / engine
            own = predict(imported, images, ours, engine, mirror)
            exact = None if engine == "openvino-int8" else load_package(imported)
            same = agreement(ours, theirs, images, exact, mirror)
            rows.append(
                row(f"medseg {engine}", mirror, own, peer_run, same, exact is not None, self.dice(ours, mirror))
            )
        return rows

    def quantised(self, package: Path, images: Path) -> Run:
        """Have the package's 8-bit network made, which it then keeps."""
        if self.dataset is None:
            return predict(package, images, self.work / "quantise", "openvino-int8", False)
        return medseg(["quantise", package, self.dataset], self.work / "quantise.log")

    def dice(self, masks: Path, mirror: bool) -> float | None:
        """Mean Dice on the held-out cases; none with mirroring, along axes that the training may not have mirrored."""
        if self.dataset is None or not self.held_out or mirror:
            return None
        return evaluate_folders(masks, self.dataset, cases=self.held_out).mean.dice


def row(
    program: str,
    mirror: bool,
    own: Run,
    peer: Run | None = None,
    same: Agreement | None = None,
    exact: bool = False,
    dice: float | None = None,
) -> Row:
    return {
        "program": program,
        "mirroring": "yes" if mirror else "no",
        "seconds": f"{own.seconds:.1f}",
        "times faster": f"{peer.seconds / own.seconds:.2f}" if peer else "",
        "peak MB": f"{own.peak_mb:.0f}",
        "equal voxels": f"{same.equal:.4%}" if same else "",
        "differing, of these ties": f"{same.differing}, {same.ties}" if same and exact else "",
        "widest gap": f"{same.widest_gap:.2g}" if same and exact else "",
        "Dice": "" if dice is None else f"{dice:.4f}",
    }


def task04(args: argparse.Namespace) -> list[Row]:
    """Cases of Task04 with trained weights, held-out ones first."""
    dataset = Dataset.open(args.data)
    held_out = dataset.folds()[args.fold].validation
    order = [*held_out, *(case.id for case in dataset.cases if case.id not in held_out)][: args.cases]
    images = {case: dataset.case(case).images[0] for case in order}
    chosen = tuple(case for case in order if case in held_out)
    package = load_package(args.package).only(args.fold)
    comparison = Comparison(args.work / "task04", package, images, args.data, chosen)
    return comparison.rows(args.peer, args.engines, args.mirror)


# voxels and mm of the cases to train on, and of the volume to segment
TRAINED = {
    "anisotropic": (((64, 64, 16), (0.9, 0.9, 4.5)), ((144, 128, 30), (0.8, 0.8, 5.0))),
    "larger": (((56, 56, 48), (1.2, 1.2, 1.2)), ((160, 144, 128), (1.0, 1.0, 1.0))),
}


def trained(args: argparse.Namespace) -> list[Row]:
    """One oblique phantom, with weights trained on smaller ones for some steps."""
    (shape, spacing_mm), (large, large_mm) = TRAINED[args.part]
    work = args.work / args.part
    if not (work / "package").exists():
        data = make_dataset(work / "data", cases=8, test_cases=0, shape=shape, spacing_mm=spacing_mm)
        medseg(["plan", data, "-o", work], work / "plan.log")
        medseg(["train", data, "-o", work, "--iterations", args.iterations], work / "train.log")
    volume, _ = make_case(100, shape=large, spacing_mm=large_mm)
    write_volume(volume, work / "phantom.nii.gz")
    package = load_package(work / "package").only(0)
    return Comparison(work, package, {"phantom": work / "phantom.nii.gz"}).rows(args.peer, args.engines, args.mirror)


def fullsize(args: argparse.Namespace) -> list[Row]:
    """256 x 256 x 160 voxels and nnU-Net's largest usual network, of random weights, on the plan's own grid."""
    work, spacing_mm = args.work / "fullsize", (0.8, 0.8, 1.0)
    image = ct_phantom(work / "phantom.nii.gz", args.shape, spacing_mm)
    plan = plan_of(args.classes, args.features, args.patch, spacing_mm[::-1])
    package = random_package(work / "random", plan)
    return Comparison(work, package, {"phantom": image}).rows(args.peer, args.engines, args.mirror)


# Memory


def memory(args: argparse.Namespace) -> list[Row]:
    """A large CT with many classes, within a limit; beside it what nnU-Net would take, by its own steps."""
    shape, native_mm, plan_mm = (args.columns, args.columns, args.slices), (0.8, 0.8, 1.0), (1.5, 1.5, 1.5)
    work = args.work / f"memory-{args.slices}-{args.classes}"
    print("writing the phantom", flush=True)
    images = ct_phantom(work / "images" / "ct.nii.gz", shape, native_mm).parent
    random_package(work / "package", plan_of(args.classes, args.features, args.patch, plan_mm))
    rows = []
    for engine in args.engines:
        own = predict(work / "package", images, work / engine, engine, args.mirror, "--memory-limit", args.limit)
        found = np.bincount(read_mask(work / engine / "ct.nii.gz").array.ravel(), minlength=args.classes)
        rows.append(row(f"medseg {engine}", args.mirror, own))
        rows[-1]["classes found"] = str(np.count_nonzero(found))
    computed = nnunet_bytes(args.classes, shape, native_mm, plan_mm)
    rows.append({"program": "nnU-Net, computed", "peak MB": f"{computed / 2**20:.0f}"})
    return rows


def nnunet_bytes(classes: int, shape: Sequence[int], native_mm: Sequence[float], plan_mm: Sequence[float]) -> float:
    """Peak of nnU-Net's export: half-precision logits, as float64, resampled to the native grid, and their argmax."""
    native = float(np.prod(shape))
    plan = float(np.prod([round(n * a / b) for n, a, b in zip(shape, native_mm, plan_mm, strict=True)]))
    return classes * (2 * plan + 8 * plan + 2 * native) + 8 * native


def equality(args: argparse.Namespace) -> list[Row]:
    """Masks of medseg against those of the plain way, where all logits fit into memory."""
    work = args.work / "equality"
    image = ct_phantom(work / "images" / "ct.nii.gz", (120, 112, 140), (0.8, 0.8, 1.0))
    package = random_package(work / "package", plan_of(args.classes, args.features, args.patch, (1.5, 1.5, 1.5)))
    logits, _, place = plain_prediction(package, image, args.mirror)
    winners = torch.zeros(read_volume(image, 1).array.shape[:0:-1], dtype=torch.int64)
    winners[place] = logits.argmax(dim=0)
    top = logits.topk(2, dim=0).values
    margin = torch.full(winners.shape, torch.inf)
    margin[place] = top[0] - top[1]
    rows = []
    for engine in args.engines:
        own = predict(work / "package", image.parent, work / engine, engine, args.mirror)
        mask = torch.from_numpy(read_mask(work / engine / "ct.nii.gz").array.transpose(package.plan.axes).astype(int))
        wrong = mask != winners
        rows.append(row(f"medseg {engine}", args.mirror, own))
        rows[-1] |= {
            "equal voxels": f"{1 - wrong.float().mean().item():.4%}",
            "differing": str(int(wrong.sum())),
            "widest gap": f"{margin[wrong].max().item():.2g}" if wrong.any() else "0",
        }
    return rows


# Preparation alone

OUR_PREPARE = """
import sys, time
from pathlib import Path
import numpy as np
from medseg.io import read_volume
from medseg.package import load_package
from medseg.preprocess import prepare
package, image, out = load_package(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
for _ in range(int(sys.argv[4])):
    start = time.perf_counter()
    volume = read_volume(image, 1)
    read = time.perf_counter()
    ready = prepare(volume, package.plan, package.configuration)
    print("seconds", read - start, time.perf_counter() - read)
np.save(out, ready.image)
"""

PEER_PREPARE = """
import sys, time
import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
model, image, out = sys.argv[1:4]
plans = PlansManager(model + "/plans.json")
setup = plans.get_configuration("3d_fullres")
preprocessor = setup.preprocessor_class(verbose=False)
for _ in range(int(sys.argv[4])):
    start = time.perf_counter()
    volume, properties = plans.image_reader_writer_class().read_images([image])
    read = time.perf_counter()
    array = preprocessor.run_case_npy(volume, None, properties, plans, setup, model + "/dataset.json")[0]
    print("seconds", read - start, time.perf_counter() - read)
np.save(out, array)
"""


def preparation(args: argparse.Namespace) -> list[Row]:
    """Reading, and cropping, normalising and cubic resampling, of one volume; medians of some times in one process."""
    work = args.work / "prepare"
    image = ct_phantom(work / "ct_0000.nii.gz", args.shape, (0.8, 0.8, 1.0))
    package = random_package(work / "package", plan_of(3, (8, 16), (32, 32, 32), (1.5, 1.5, 1.5)))
    model = model_folder(work / "model", package)
    seconds: dict[str, list[float]] = {}
    for name, python, code, weights in (
        ("nnU-Net", args.peer, PEER_PREPARE, model),
        ("medseg", Path(sys.executable), OUR_PREPARE, work / "package"),
    ):
        log = work / f"{name}.log"
        run([python, "-c", code, weights, image, work / f"{name}.npy", args.times], log, **peer_environment(work))
        times = [line.split()[1:] for line in log.read_text().splitlines() if line.startswith("seconds")]
        seconds[name] = [statistics.median(map(float, column)) for column in zip(*times, strict=True)]
    ours, theirs = (np.load(work / f"{name}.npy") for name in ("medseg", "nnU-Net"))
    difference = float(np.abs(ours - theirs).max() / np.ptp(theirs))
    return [
        {
            "step": step,
            "nnU-Net, seconds": f"{seconds['nnU-Net'][n]:.3f}",
            "medseg, seconds": f"{seconds['medseg'][n]:.3f}",
            "times faster": f"{seconds['nnU-Net'][n] / seconds['medseg'][n]:.1f}",
            "largest difference / range": f"{difference:.1e}" if n else "",
        }
        for n, step in enumerate(("read", "prepare"))
    ]


# Beside MONAI

MONAI = """
import sys
from pathlib import Path
import torch
from monai.data import decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    AsDiscreted, Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd, SaveImaged, ScaleIntensityRanged,
    Spacingd)
from medseg.package import load_package
package, image, out = load_package(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
setup, rule = package.configuration, package.plan.normalisation[0]
network = package.networks()[0]
before = Compose([
    LoadImaged(keys="image"), EnsureChannelFirstd(keys="image"),
    Orientationd(keys="image", axcodes="SAR", labels=None),
    ScaleIntensityRanged(keys="image", a_min=rule.lower, a_max=rule.upper, b_min=(rule.lower - rule.mean) / rule.std,
                         b_max=(rule.upper - rule.mean) / rule.std, clip=True),
    Spacingd(keys="image", pixdim=setup.spacing_mm, mode="bilinear"),
])
after = Compose([
    Invertd(keys="pred", transform=before, orig_keys="image", nearest_interp=False, to_tensor=True),
    AsDiscreted(keys="pred", argmax=True),
    SaveImaged(keys="pred", output_dir=out, output_postfix="", separate_folder=False, output_dtype="uint8"),
])
inferer = SlidingWindowInferer(setup.patch_size, sw_batch_size=1, overlap=0.5, mode="gaussian")
with torch.inference_mode():
    batch = list_data_collate([before({"image": image})])
    batch["pred"] = inferer(batch["image"], network)
    for one in decollate_batch(batch):
        after(one)
"""


def monai(args: argparse.Namespace) -> list[Row]:
    """A MONAI user's program: SlidingWindowInferer, Invertd, AsDiscreted, SaveImaged; both resample linearly.

    MONAI's plan grid begins at the first voxel's centre and medseg's at its edge, so the masks are alike, not equal.
    """
    work = args.work / "monai"
    image = ct_phantom(work / "images" / "ct.nii.gz", args.shape, (0.8, 0.8, 1.0))
    plan = plan_of(args.classes, args.features, args.patch, (1.5, 1.5, 1.5), resampling=Resampling(image=1))
    random_package(work / "package", plan)
    theirs, log = work / "theirs", work / "theirs.log"
    shutil.rmtree(theirs, ignore_errors=True)
    peer = run([sys.executable, "-W", "ignore", "-c", MONAI, work / "package", image, theirs], log)
    rows = [row("MONAI", False, peer)]
    for engine in args.engines:
        own = predict(work / "package", image.parent, work / engine, engine, False)
        same = agreement(work / engine, theirs, image.parent, None, False)
        rows.append(row(f"medseg {engine}", False, own, peer, same))
        rows[-1]["memory / MONAI's"] = f"{own.peak_mb / peer.peak_mb:.2f}"
    return rows


# Command line


def print_table(rows: Sequence[Row]) -> None:
    columns = [name for name in dict.fromkeys(name for one in rows for name in one) if any(r.get(name) for r in rows)]
    for cells in (columns, ["---"] * len(columns), *([one.get(name, "") for name in columns] for one in rows)):
        print(f"| {' | '.join(cells)} |")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = top.add_subparsers(dest="part", required=True)

    def part(name: str, work: Any, engines: Sequence[str], peer: bool = False) -> argparse.ArgumentParser:
        own = parts.add_parser(name, description=work.__doc__, help=(work.__doc__ or "").splitlines()[0])
        own.set_defaults(function=work)
        own.add_argument("--work", type=Path, default=Path("benchmark-predict"), help="folder for all that is written")
        own.add_argument("--json", type=Path, help="write the rows here too")
        own.add_argument("--engines", nargs="+", default=engines)
        own.add_argument("--mirror", action="store_true", help="along all three axes")
        if peer:
            own.add_argument("--peer", type=Path, required=True, help="python of an environment with nnunetv2")
        return own

    def network(
        own: argparse.ArgumentParser, classes: int, features: Sequence[int] = (8, 16, 32), patch: int = 96
    ) -> None:
        own.add_argument("--classes", type=int, default=classes, help="with the background")
        own.add_argument("--features", type=int, nargs="+", default=features)
        own.add_argument("--patch", type=int, nargs=3, default=[patch] * 3)

    exact = ("eager", "openvino")
    one = part("task04", task04, (*exact, "openvino-int8"), peer=True)
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--package", type=Path, required=True)
    one.add_argument("--fold", type=int, default=0)
    one.add_argument("--cases", type=int, default=20)
    for name in TRAINED:
        part(name, trained, exact, peer=True).add_argument("--iterations", type=int, default=300)
    one = part("fullsize", fullsize, (*exact, "openvino-int8"), peer=True)
    one.add_argument("--shape", type=int, nargs=3, default=[256, 256, 160])
    network(one, 5, [32, 64, 128, 256, 320, 320], 128)
    one = part("memory", memory, ("auto",))
    one.add_argument("--slices", type=int, default=1000)
    one.add_argument("--columns", type=int, default=512, help="and rows")
    one.add_argument("--limit", default="6GB", help="as for medseg predict --memory-limit")
    network(one, 118)
    network(part("equality", equality, exact), 118)
    one = part("prepare", preparation, (), peer=True)
    one.add_argument("--times", type=int, default=3)
    one.add_argument("--shape", type=int, nargs=3, default=[256, 256, 160])
    one = part("monai", monai, ("auto",))
    one.add_argument("--shape", type=int, nargs=3, default=[256, 256, 160])
    network(one, 25)
    return top


def main() -> None:
    args = parser().parse_args()
    rows: list[Row] = args.function(args)
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
