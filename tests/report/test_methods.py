"""The methods: sentences that are true of what was done, in two and three dimensions, of one fold and of all."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from reporting import gathered, scored

from medseg.batch import places_of, predict_cases
from medseg.cases import find_cases
from medseg.cli import app
from medseg.evaluate import Means
from medseg.pipeline import RunResult
from medseg.predict import Predictor
from medseg.report.gather import gather
from medseg.report.methods import command, paragraphs
from medseg.volume import Labels

LABELS = Labels(values={"organ": 1, "lesion": 5})


def test_a_run_in_three_dimensions_on_a_cpu(tiny_run: RunResult) -> None:
    training, scoring = paragraphs(gather(tiny_run.out))
    for said in (
        "A 3D U-Net was trained to segment organ and lesion in the dataset",
        "(6 labelled cases) with medseg 0",
        "except for 4 settings chosen by hand.",
        "normalised to zero mean and unit standard deviation image by image",
        "The network had 3 resolution stages with 8, 16, 16 features, instance normalisation and leaky ReLU",
        "Patches of 8 × 16 × 16 voxels were drawn in batches of 2.",  # noqa: RUF001
        "One split of a 5-fold cross-validation (fold 0) was used, with 4 training cases and 2 cases held out.",
        "Training took 40 iterations",
        "on a CPU, single precision), with random seed 0.",
    ):
        assert said in training, training
    assert "at a tolerance of 1 mm and the 95th percentile" in scoring
    assert "with fewer than 10 cases none is given." in scoring
    assert "Over 2 cases the means were Dice " in scoring
    assert "  " not in training + scoring
    assert str(tiny_run.out) not in training + scoring


def test_a_run_in_two_dimensions(picture_run: RunResult) -> None:
    training, _ = paragraphs(gather(picture_run.out))
    assert training.startswith("A 2D U-Net was trained")
    assert "pixels were drawn in batches of 4" in training
    assert "and resampled to 1 × 1 mm within the slices by cubic spline interpolation." in training  # noqa: RUF001


def test_folds_are_told_apart(tiny_run: RunResult) -> None:
    found = gather(tiny_run.out)
    record = found.run["folds"]["0"]
    two = replace(found, run={**found.run, "folds": {"0": record, "2": {**record, "iterations": 50, "seed": 1}}})
    text = paragraphs(two)[0]
    assert "Folds 0 and 2 of a 5-fold cross-validation were trained, with 4 cases held out in all." in text
    assert "Training took 40 to 50 iterations each" in text
    assert "with random seed 0 and 1." in text
    every = replace(found, run={**found.run, "folds": {str(n): record for n in range(5)}, "mirror": True})
    text = paragraphs(every)[0]
    assert "5-fold cross-validation, and every case was segmented by the network that had not been trained" in text
    assert "and averaged over mirrored images" in text


def test_a_gpu_is_named_as_one(tiny_run: RunResult) -> None:
    found = gather(tiny_run.out)
    (batch,) = found.batches
    for device, said in (("cuda:0", "on a GPU,"), ("mps", "on an Apple GPU,"), ("cpu", "on a CPU,")):
        other = replace(found, batches=(replace(batch, facts={**batch.facts, "device": device}),))
        assert said in paragraphs(other)[0]


def test_a_run_of_an_older_version_says_what_it_knows(tiny_run: RunResult) -> None:
    found = replace(gather(tiny_run.out), run={}, evaluation=None)
    (text,) = paragraphs(found)
    assert text.startswith("A 3D U-Net was trained")
    assert "iterations" not in text
    assert command(found) == ""


def test_empty_masks_and_failures_are_counted(tmp_path: Path) -> None:
    cases = {
        "a": ({1: (2, 8), 5: (9, 12)}, {1: (2, 8)}),
        "b": ({1: (2, 8)}, {1: (2, 8)}),
        "c": ({1: (2, 8)}, {1: (2, 8), 5: (9, 12)}),
        "d": ({1: (2, 8)}, None),
    }
    evaluation = scored(tmp_path, cases, LABELS)
    (text,) = paragraphs(gathered(evaluation))
    assert "left out of the mean of that class (once)" in text
    assert "where one alone was empty (1 missed, 1 false positive)" in text
    assert "Cases without a usable prediction (1) were kept in all means with these worst scores." in text
    interval = evaluation.model_copy(
        update={
            "mean": Means(dice=0.5, nsd=0.25, hd95_mm=3.0),
            "mean_low": Means(dice=0.4, nsd=0.2, hd95_mm=2.0),
            "mean_high": Means(dice=0.6, nsd=0.3, hd95_mm=4.0),
            "tolerance_mm": 2.5,
            "tolerance_source": "chosen by the user",
        }
    )
    (text,) = paragraphs(gathered(interval))
    assert "a tolerance of 2.5 mm (chosen by the user)" in text
    assert text.endswith(
        "Dice 0.500 (95 % interval 0.400 to 0.600), NSD 0.250 (95 % interval 0.200 to 0.300) and HD95 3.00 mm "
        "(95 % interval 2.00 to 4.00)."
    )


def test_predictions_name_their_model(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    predict_cases(predictor, find_cases(images), tmp_path / "out", found_at=places_of([images]))
    (text,) = paragraphs(gather(tmp_path / "out"))
    assert text.startswith("2 images were segmented with medseg ")
    assert predictor.package.digest[:12] in text
    assert text.endswith("in windows that overlap by 50%; 2 masks resulted.")


def test_the_command_is_one_that_can_be_called(tiny_run: RunResult) -> None:
    words = shlex.split(command(gather(tiny_run.out)))
    assert words[:2] == ["medseg", "run"]
    assert words[words.index("--iterations") + 1] == "40"
    assert words.count("--set") == 4
    assert words[words.index("--configuration") + 1] == "3d_fullres"
    known = {name for option in _options("run") for name in option}
    assert {word for word in words if word.startswith("--")} <= known


def _options(name: str) -> list[list[str]]:
    import typer

    return [parameter.opts for parameter in typer.main.get_command(app).commands[name].params]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"epochs": 3}, ["--epochs", "3"]),
        ({"time_budget_s": 600.0}, ["--time-budget", "600s"]),
        ({"seed": 4}, ["--seed", "4"]),
    ],
)
def test_the_command_has_what_differs_from_the_usual(
    settings: dict[str, object], length: list[str], tiny_run: RunResult
) -> None:
    found = gather(tiny_run.out)
    run = {**found.run, "settings": settings, "overrides": [], "mirror": True}
    words = shlex.split(command(replace(found, run=run)))
    assert words[words.index(length[0]) + 1] == length[1]
    assert "--mirror" in words
    assert "--set" not in words
