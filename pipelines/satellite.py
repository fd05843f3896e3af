"""Land cover in scenes of many bands, larger than memory (made up).

What and where from: scenes that `medseg.phantom` makes up, as no real ones with labels come with a licence that lets
them be handed on here. 20 tiles of 256 x 256 pixels to train on and one large scene, all GeoTIFF. A folder of your own
is taken as well: dataset.json with tiles whose channels are called "reflectance", scene.tif, and reference.tif where
there is one to score with.

How acquired: six bands of reflectance times 10,000 as an optical satellite gives them (three visible, one near and two
short-wave infrared), 10 m a pixel in UTM zone 32 north, with haze, noise and uneven light.

Labels: 1 water, 2 forest, 3 field, 4 built-up; 0 is open land, and what clouds hide.

What is hard: covers share materials. Gardens in towns have the spectrum of crops, bare fields that of open land; only
texture and shape tell, at scales from a house to a parcel, for which the network joins all levels of its decoder.

Trap: a scene cut into windows must not be scaled window by window. Its channels are therefore named after a unit that
means the same everywhere, which asks for one scale for the whole dataset.

Research software.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

import medseg
from medseg.cli import Device, Overrides, Quiet, Seed, Show, TimeBudget, Verbose, end_script, script_app, train_settings
from medseg.dataset import Dataset
from medseg.errors import InputError
from medseg.evaluate import EvaluateSettings
from medseg.package import load_package
from medseg.phantom import write_scenes
from medseg.pipeline import RunResult, writing_to
from medseg.progress import Progress, silent
from medseg.recipe import Recipe
from medseg.scenes import load_rasterio, predict_scene, scene_dice
from medseg.train import TrainSettings

RECIPE = Recipe(
    task="Land",
    configuration="2d",
    tolerance_mm=1.0,  # a pixel
    # seen from above no direction is special
    overrides=("plan.network.name=satellite_segmenter", "plan.mirror_axes=[0,1]"),
)
SCENE, REFERENCE, MASK = "scene.tif", "reference.tif", "scene_mask.tif"


class Satellite(NamedTuple):
    """What a run found: Dice of the scene by class, and the run that trained on the tiles."""

    dice: dict[str, float | None]
    run: RunResult


def made_up(out: Path) -> Path:
    """The folder of tiles and scene that are made up, in ``out``; written where it is not there yet."""
    folder = out / "dataset"
    with writing_to(out):
        if not (folder / "dataset.json").exists():  # which is written last
            write_scenes(folder)
    return folder


def run_satellite(
    folder: Path,
    out: Path,
    *,
    train: TrainSettings | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
) -> Satellite:
    """Train on the tiles of a folder and segment its scene, window by window, into ``out``.

    Args:
        folder: ``dataset.json`` and what it lists, ``scene.tif``, and ``reference.tif`` where there is one.
        out: where everything is written.
        train: settings of training.
        overrides: plan settings, after those of the script.
        progress: told how far each station is.

    Returns:
        Dice is None for a class that is not there; there is none without a reference.

    Raises:
        MedsegError: as ``medseg.run`` and ``predict_scene``; or there is no scene.
    """
    load_rasterio()  # missed now rather than after training
    scene, reference = folder / SCENE, folder / REFERENCE
    if not scene.is_file():
        raise InputError(scene, "does not exist", "a scene beside dataset.json")
    result = medseg.run(
        folder,
        out,
        configuration=RECIPE.configuration,
        train=train,
        evaluate=EvaluateSettings(tolerance_mm=RECIPE.tolerance_mm),
        overrides=(*RECIPE.overrides, *overrides),
        progress=progress,
    )
    with writing_to(out):
        device = train.device if train else "auto"
        predict_scene(load_package(result.package), scene, out / MASK, device=device, progress=progress)
    dice = scene_dice(out / MASK, reference, Dataset.open(folder).labels) if reference.is_file() else {}
    return Satellite(dice, result)


def command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Tiles and scene.", show_default="made up")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Output folder.")] = Path(
        "medseg-satellite"
    ),
    time_budget: TimeBudget = "10m",
    seed: Seed = 0,
    device: Device = "auto",
    overrides: Overrides = [],  # noqa: B006 - Typer needs a list, and copies it
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """The command line; see ``run_satellite``."""
    settings = train_settings(time_budget=time_budget, seed=seed, device=device)
    with Show(quiet) as show:
        folder = folder or made_up(out)
        dice, run = run_satellite(folder, out, train=settings, overrides=overrides, progress=show)
    for name, value in dice.items():
        typer.echo(f"Dice of {name} in the scene: {'none there' if value is None else f'{value:.4f}'}")
    typer.echo(f"scene: {folder / SCENE}\nmask of the scene: {out / MASK}")
    typer.echo(f"model package: {run.package}\nheld-out tiles: {out / 'summary.md'}")
    end_script(run.evaluation)


app = script_app("Train on tiles of land and segment a scene that is larger than memory.", command)

if __name__ == "__main__":
    app()
