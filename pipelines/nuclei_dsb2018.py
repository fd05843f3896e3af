"""Nuclei in microscopy, each by itself (Data Science Bowl 2018, stage 1).

What and where from: 670 training images of the Kaggle competition, kept as BBBC038 in the Broad Bioimage Benchmark
Collection (https://bbbc.broadinstitute.org/BBBC038, CC0; Caicedo et al., Nature Methods 16, 1247-1253, 2019). As
downloaded, ``stage1_train/ID/images/ID.png`` is an image and ``stage1_train/ID/masks/*.png`` has one mask a nucleus.

How acquired: by many laboratories, of cells of humans, mice and flies, in culture and in tissue, by fluorescence,
brightfield and stain, at many magnifications; 256 x 256 to 1272 x 603 pixels of unknown size. Outlines were drawn by
a team of biologists.

Labels: 1 nucleus, 2 its boundary, made here from the masks: the outermost pixels of each nucleus. The network learns
these classes; the single nuclei are parted afterwards in its masks. With ``--no-boundary`` there is only class 1, a
plain U-Net learns it, and nuclei are parted by their shape.

What is hard: nuclei touch, and are 20 to 2000 pixels large; one that is merged with its neighbour counts as an error
for both. The two kinds of image (nuclei bright on black, or dark on a light tissue) are the opposite of each other,
and there are four of the first to one of the second.

Trap: images are RGBA with an opaque alpha, most of them grey all the same; fluorescence fills the lowest tenth of the
scale, so each image is scaled by itself. Masks overlap here and there (the smaller nucleus keeps the pixels), some
images of the first release have masks that are wrong or lack, and a mask cannot be told from its file name.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

import medseg
from medseg.cli import Device, Overrides, Quiet, Seed, Show, TimeBudget, Verbose, end_script, script_app, train_settings
from medseg.dataset import Dataset, Finding, Findings
from medseg.errors import GeometryMismatch, InputError, MedsegError
from medseg.geometry import Geometry
from medseg.io import describe_grid, read_mask, read_volume, write_mask
from medseg.metrics import InstanceMeans
from medseg.pipeline import RunResult, writing_to
from medseg.postprocess import boundary_classes, join, load_skimage
from medseg.progress import Progress, silent, track
from medseg.records import write_json
from medseg.report import InstanceResult, Panel, save_contact_sheet, save_instances, score_case, worst
from medseg.train import TrainSettings
from medseg.volume import Mask

log = logging.getLogger("medseg.pipelines.nuclei_dsb2018")  # its name is __main__ where it is run

NUCLEUS, BOUNDARY = 1, 2
BOUNDARY_WIDTH = 2.0
"""Of the boundary, pixels. A network learns two better than one, whose Dice stays at a half (docs/experiments.md)."""
SHOWN = 8
"""Images on the contact sheet."""
OVERRIDES = ("plan.patch_size=[192,192]", "plan.batch_size=5")
"""Smaller patches than planned, and more of them: a batch of two images is of one kind two times of three."""


class Nuclei(NamedTuple):
    """What a run found: the scores of the single nuclei, and the run that segmented them."""

    means: InstanceMeans
    run: RunResult


# ---- the folder as downloaded ----------------------------------------------------------------------------------------


def image_folders(folder: Path) -> list[Path]:
    """The folders of the images by id, in ``folder`` or its ``stage1_train``.

    Raises:
        InputError: there is none.
    """
    inner = folder / "stage1_train"
    place = inner if inner.is_dir() else folder
    found = sorted(path.parent for path in place.glob("[!.]*/images"))
    if not found:
        raise InputError(place, "holds no ID/images", "the folder of the Data Science Bowl 2018, as downloaded")
    return found


def read_nuclei(folder: Path) -> tuple[Path, Mask, list[Finding]]:
    """The image of one folder, its nuclei as ids, and what was odd about them.

    Raises:
        InputError: no image or several, no masks, one that cannot be read or lies on another grid. A nucleus without a
            mask would be taught as background, so that the image is of no use.
    """
    images = sorted((folder / "images").glob("[!.]*.png"))
    if len(images) != 1:
        raise InputError(folder / "images", f"holds {len(images)} images", "one")
    volume = read_volume(images[0], channels=3)
    files = sorted((folder / "masks").glob("[!.]*.png"))
    if not files:
        raise InputError(folder / "masks", "holds no mask", "one a nucleus")
    joined = join((_read_nucleus(file, volume.geometry) for file in files), volume.geometry.shape)
    odd = {
        "overlap": f"{joined.overlapping} pixels are in several masks" if joined.overlapping else "",
        "empty": f"{joined.empty} masks are empty" if joined.empty else "",
        "hidden": f"{joined.hidden} masks lie within others" if joined.hidden else "",
    }
    remedy = "nothing: the smaller nucleus keeps what two claim, and masks without a pixel of their own are left out"
    warnings = [Finding.warning(folder.name, kind, found, remedy) for kind, found in odd.items() if found]
    return images[0], Mask(joined.ids, volume.geometry), warnings


def _read_nucleus(file: Path, grid: Geometry) -> NDArray[np.bool_]:
    mask = read_mask(file)
    if not mask.geometry.close_to(grid):
        raise GeometryMismatch(file, f"grid {describe_grid(mask)} differs from the image's", f"shape {grid.shape}")
    return np.asarray(mask.array != 0)


def write_dataset(folder: Path, out: Path, boundary: bool = True, progress: Progress = silent) -> Findings:
    """Write a dataset of medseg: ``dataset.json``, ``labels`` and ``instances``; images stay where they are.

    Returns:
        What is wrong with the images; those that are of no use are not in the dataset.

    Raises:
        InputError: none is of use.
    """
    found: list[Finding] = []
    cases = {}
    folders = image_folders(folder)
    for place in track(folders, "reading", progress):
        case = place.name
        try:
            image, nuclei, warnings = read_nuclei(place)
        except MedsegError as failure:
            found.append(Finding.fault(case, "unusable", str(failure), failure.remedy or "it is left out"))
            continue
        found += warnings
        classes = boundary_classes(nuclei.array, BOUNDARY_WIDTH) if boundary else np.minimum(nuclei.array, NUCLEUS)
        write_mask(replace(nuclei, array=classes), out / "labels" / f"{case}.png")
        write_mask(nuclei, out / "instances" / f"{case}.png")
        cases[case] = {"images": [str(image.resolve())], "label": f"labels/{case}.png"}
    findings = Findings(findings=tuple(found), cases_checked=len(folders))
    findings.save(out / "findings.json")
    if not cases:
        raise InputError(folder, f"none of its {len(folders)} images can be used: {found[0].found}")
    labels = {"background": 0, "nucleus": NUCLEUS, **({"boundary": BOUNDARY} if boundary else {})}
    channels = {"0": "red", "1": "green", "2": "blue"}
    body = {"name": "Nuclei", "channel_names": channels, "labels": labels, "dataset": cases}
    write_json(out / "dataset.json", body)
    return findings


# ---- the single nuclei of the held-out images ------------------------------------------------------------------------


def save_worst(results: Sequence[InstanceResult], out: Path) -> None:
    """Draw the images with the lowest scores of those that were segmented; no picture where there are none."""
    (out / "worst.png").unlink(missing_ok=True)
    data = Dataset.open(out / "dataset")
    panels = []
    for case, score, _ in worst(results, SHOWN):
        title = f"{case[:12]}: F1 {score.f1:.2f}, AP {score.average_precision:.2f}, Dice {score.dice:.2f}"
        reference, ids = (read_mask(root / "instances" / f"{case}.png").array for root in (data.root, out))
        panels.append(Panel(title, read_volume(data.case(case).images).array, reference, ids))
    if panels:
        save_contact_sheet(panels, out / "worst.png")


def run_nuclei(
    folder: Path,
    out: Path,
    *,
    boundary: bool = True,
    train: TrainSettings | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
) -> Nuclei:
    """From the folder as downloaded to scored nuclei of fold 0; called again it goes on.

    Args:
        folder: as downloaded.
        out: where everything is written; ``instances.csv``, ``instances.json`` and ``worst.png`` are about nuclei.
        boundary: learn the boundaries, by the cell segmenter.
        train: settings of training.
        overrides: plan settings, after those of the script.
        progress: told how far each station is.

    Raises:
        MedsegError: as ``medseg.run``; or no image can be used, or scikit-image is not installed.
    """
    load_skimage()  # missed now rather than after training
    with writing_to(out):
        findings = write_dataset(folder, out / "dataset", boundary, progress)
        if findings.findings:
            counts = ", ".join(f"{count} {kind}" for kind, count in findings.counts.items())
            unusable = ", ".join(findings.unusable_cases) or "none"
            path = out / "dataset" / "findings.json"
            log.warning("%d images read: %s; left out: %s; see %s", findings.cases_checked, counts, unusable, path)
    result = medseg.run(
        out / "dataset",
        out,
        configuration="2d",
        folds=(0,),
        train=train,
        regions={"whole nucleus": (NUCLEUS, BOUNDARY)} if boundary else None,
        overrides=(f"plan.network.name={'cell_segmenter' if boundary else 'unet'}", *OVERRIDES, *overrides),
        skip_bad_cases=True,
        progress=progress,
    )
    with writing_to(out):
        results = [
            score_case(
                case.case,
                out / "predictions" / "fold_0" / f"{case.case}.png",
                out / "dataset" / "instances" / f"{case.case}.png",
                out / "instances" / f"{case.case}.png",
                NUCLEUS,
                BOUNDARY if boundary else None,
            )
            for case in track(result.evaluation.cases, "parting nuclei", progress)
        ]
        save_instances(results, out / "instances.csv")
        save_worst(results, out)
        means = InstanceMeans.of(case.score for case in results)
        means.save(out / "instances.json")
    return Nuclei(means, result)


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder as downloaded.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Output folder.")] = Path("medseg-nuclei"),
    time_budget: TimeBudget = "12m",
    seed: Seed = 0,
    device: Device = "auto",
    overrides: Overrides = [],  # noqa: B006 - Typer needs a list, and copies it
    no_boundary: Annotated[bool, typer.Option("--no-boundary", help="Part nuclei by their shape alone.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """The command line; see ``run_nuclei``."""
    settings = train_settings(time_budget=time_budget, seed=seed, device=device)
    with Show(quiet) as show:
        means, run = run_nuclei(
            folder, out, boundary=not no_boundary, train=settings, overrides=overrides, progress=show
        )
    for name, value in means.model_dump().items():
        typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    paths = {
        "nuclei": out / "instances.csv",
        "worst images": out / "worst.png",
        "what is odd about the data": out / "dataset" / "findings.json",
        "model package": run.package,
    }
    for what, path in paths.items():
        if path.exists():  # there are no worst images where nothing was scored
            typer.echo(f"{what}: {path}")
    end_script(run.evaluation)


app = script_app(
    "Train and score the Data Science Bowl 2018: the nuclei of microscopy images, each by itself.", command
)

if __name__ == "__main__":
    app()
