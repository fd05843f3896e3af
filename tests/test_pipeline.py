"""The whole journey on a tiny phantom: what a second run skips, what a change redoes, and what a kill leaves behind."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from medseg import patches, pipeline, records, train
from medseg.dataset import Dataset
from medseg.errors import DatasetError, InputError, MedsegError, PlanError
from medseg.evaluate import EvaluateSettings
from medseg.fingerprint import Fingerprint
from medseg.io import read_mask, read_volume
from medseg.networks import ARCHITECTURES
from medseg.package import load_package
from medseg.phantom import make_dataset
from medseg.pipeline import RunResult, plan_station, run, train_station
from medseg.plan import Plan
from medseg.planning import override_plan
from medseg.quality import ranges_of
from medseg.records import TEMPORARY_PREFIX
from medseg.train import TrainSettings

SETTINGS = TrainSettings(iterations=40, device="cpu", precision="32")  # as of tiny_run
BAD = "phantom_002"
TRAINED = {"loop": 1, "save_curve": 1}


@pytest.fixture(autouse=True)
def quick_curve(tiny_run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture at hand instead of a drawn one, which takes longer than all the rest of a tiny run."""
    picture = (tiny_run.out / "training" / "fold_0" / "curve.png").read_bytes()
    monkeypatch.setattr(pipeline, "save_curve", lambda log, png: records.write_bytes(png, picture))


@pytest.fixture(autouse=True)
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty page instead of one with pictures, which tests of reports look at."""

    def write(out: Path, **_: Any) -> Path:
        records.write_text(out / "report.html", "")
        return out / "report.html"

    monkeypatch.setattr(pipeline, "write_report", write)


@pytest.fixture
def copy(phantom_dataset: Path, tmp_path: Path) -> Path:
    """The dataset, free to be changed."""
    return Path(shutil.copytree(phantom_dataset, tmp_path / "data"))


@pytest.fixture
def done(tiny_run: RunResult, tmp_path: Path) -> Path:
    """The finished run's folder, free to be run in again."""
    return Path(shutil.copytree(tiny_run.out, tmp_path / "out"))


@pytest.fixture
def calls(quick_curve: None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each station's work was really done."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            counted[name.strip("_")] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, counting)

    count(pipeline, "check")
    count(pipeline, "measure")
    count(patches, "prepare")
    count(train, "_loop")
    count(pipeline, "save_curve")
    count(pipeline, "evaluate_cases")
    count(pipeline.Predictor, "infer")
    return counted


def stop(work: str, fraction: float, note: str) -> None:
    """A progress that ends a run in the middle of its training."""
    if note.startswith("step 2 "):
        raise KeyboardInterrupt


def results(out: Path) -> dict[str, bytes]:
    """Weights, masks and scores by name, as bytes."""
    wanted = ("training/*/weights.safetensors", "predictions/*/*.nii.gz", "evaluation/scores.csv")
    return {str(path.relative_to(out)): path.read_bytes() for pattern in wanted for path in out.glob(pattern)}


def leftovers(out: Path) -> list[Path]:
    return list(out.rglob(f"{TEMPORARY_PREFIX}*"))


# ---- the journey -----------------------------------------------------------------------------------------------------


def test_everything_is_there(tiny_run: RunResult) -> None:
    out = tiny_run.out
    assert all(path.exists() for path in tiny_run.paths.values())
    assert tiny_run.skipped_cases == ()
    held_out = json.loads((out / "folds.json").read_text())[0]["validation"]
    assert sorted(case.case for case in tiny_run.evaluation.cases) == sorted(held_out)
    assert len(held_out) == 2, "6 cases in 5 folds: the first has two"
    assert sorted(path.name for path in (out / "predictions" / "fold_0").glob("*.nii.gz")) == [
        f"{case}.nii.gz" for case in sorted(held_out)
    ]
    with (out / "evaluation" / "scores.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in scores] == [
        (case, name) for case in held_out for name in ("organ", "lesion")
    ]
    assert (out / "training" / "fold_0" / "curve.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "run.json").read_text())
    assert record["cases"] == 6
    assert record["skipped_cases"] == []
    assert record["folds"]["0"]["iterations"] == 40
    assert record["mean"]["dice"] == tiny_run.evaluation.mean.dice
    assert "not a medical device" in (out / "summary.md").read_text()
    assert "plan: configurations.3d_fullres.patch_size: Set by hand" in (out / "log.txt").read_text()
    assert not leftovers(out)
    dice = record["folds"]["0"]["dice"]
    assert dice == pytest.approx(record["mean"]["dice"], abs=1e-4), "one fold: the same mean"
    assert f"| {dice:.4f} |" in (out / "package" / "README.md").read_text()


def test_the_package_knows_the_ranges_of_the_training_data(
    tiny_run: RunResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, plan = load_package(tiny_run.package).manifest, Plan.load(tiny_run.out / "plan.json")
    fingerprint = Fingerprint.load(tiny_run.out / "fingerprint.json")
    assert manifest.ranges == ranges_of(fingerprint)
    assert manifest.ranges is not None
    assert (manifest.ranges.cases, set(manifest.ranges.components)) == (6, {"organ", "lesion"})
    assert pipeline._ranges(tmp_path, plan) is None
    fingerprint.model_copy(update={"empty_cases": 1}).save(tmp_path / "fingerprint.json")
    caplog.clear()
    assert pipeline._ranges(tmp_path, plan) is None
    assert "is not the plan's" in caplog.text


def test_a_plan_for_another_machine(phantom_dataset: Path, tmp_path: Path) -> None:
    data = Dataset.open(phantom_dataset)
    plans = {device: plan_station(data, tmp_path, device) for device in ("auto", "cpu", "cuda", "cuda:1", "mps")}
    assert {name: plan.device for name, plan in plans.items()} | {"auto": ""} == {
        "auto": "", "cpu": "cpu", "cuda": "gpu", "cuda:1": "gpu", "mps": "gpu"
    }  # fmt: skip
    assert plans["cuda"].configurations["3d_fullres"].network.features[0] == 32
    with pytest.raises(InputError, match="'tpu' is no device"):
        plan_station(data, tmp_path, "tpu")


def test_a_plan_edited_by_hand_is_not_replaced_unsaid(
    phantom_dataset: Path, done: Path, tiny_overrides: tuple[str, ...]
) -> None:
    path = done / "plan.json"
    before = path.read_text()
    path.write_text(before.replace('"batch_size": 2', '"batch_size": 7'))
    run(phantom_dataset, done, train=SETTINGS, overrides=tiny_overrides)
    assert "plan.json was edited by hand and is made anew" in (done / "log.txt").read_text()
    assert path.read_text() == before


def test_pictures_go_the_whole_way_in_2d(picture_run: RunResult, picture_dataset: Path) -> None:
    out = picture_run.out
    plan = Plan.load(out / "plan.json")
    assert list(plan.configurations) == ["2d"]  # which is taken where none is named
    assert plan.axes[0] == 2  # the flat axis comes first
    assert plan.configuration("2d").median_shape == (1, 32, 40)
    assert plan.configuration("2d").spacing_mm == (None, 1.0, 1.0)
    assert [n.scheme for n in plan.normalisation] == ["zscore"] * 3
    masks = sorted(path.name for path in (out / "predictions" / "fold_0").glob("*.png"))
    assert len(masks) == 2
    assert picture_run.evaluation.failed == {}
    assert picture_run.evaluation.mean.dice is not None
    assert picture_run.evaluation.mean.dice > 0.4
    for name in masks:
        image = read_volume(picture_dataset / "imagesTr" / name.replace(".png", "_0000.png"))
        assert read_mask(out / "predictions" / "fold_0" / name).geometry == image.geometry


def test_a_run_ends_with_its_report_unless_it_should_not(
    phantom_dataset: Path, done: Path, tiny_overrides: tuple[str, ...]
) -> None:
    choices = {"train": SETTINGS, "overrides": tiny_overrides}
    result = run(phantom_dataset, done, **choices, report=False)  # type: ignore[arg-type]
    assert "report" not in result.paths
    assert not (done / "report.html").exists()
    result = run(phantom_dataset, done, **choices)  # type: ignore[arg-type]
    assert result.paths["report"] == done / "report.html"
    assert (done / "report.html").exists()


def test_a_report_that_fails_costs_nothing_else(
    phantom_dataset: Path,
    done: Path,
    tiny_overrides: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> Path:
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr(pipeline, "write_report", fail)
    result = run(phantom_dataset, done, train=SETTINGS, overrides=tiny_overrides)
    assert result.evaluation.mean.dice is not None
    assert "report" not in result.paths
    assert "the report could not be written: no picture. Try again with `medseg report`" in caplog.text
    assert "no picture" in (done / "log.txt").read_text()


def test_masks_lie_on_their_images(tiny_run: RunResult, phantom_dataset: Path) -> None:
    for path in (tiny_run.out / "predictions" / "fold_0").glob("*.nii.gz"):
        mask, image = nib.load(path), nib.load(phantom_dataset / "imagesTr" / path.name)
        assert mask.shape == image.shape
        assert np.array_equal(mask.affine, image.affine)
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 5}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_goes_the_whole_way(
    name: str, phantom_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = (*tiny_overrides, f"plan.network.name={name}", "plan.features=[4,6,8]", "plan.deep_supervision=true")
    result = run(phantom_dataset, tmp_path, train=TrainSettings(iterations=2, device="cpu"), overrides=overrides)
    assert type(load_package(result.package).networks()[0]) is ARCHITECTURES[name]
    assert result.evaluation.failed == {}
    assert result.evaluation.mean.dice is not None
    assert len(list((tmp_path / "predictions" / "fold_0").glob("*.nii.gz"))) == 2


def test_all_folds(phantom_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path: Path) -> None:
    settings = TrainSettings(iterations=1, device="cpu")
    result = run(phantom_dataset, tmp_path, folds=None, train=settings, overrides=tiny_overrides)
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == [f"fold_{n}" for n in range(5)]
    assert sorted(case.case for case in result.evaluation.cases) == [f"phantom_{n:03d}" for n in range(1, 7)]
    assert "folds 0, 1, 2, 3, 4" in result.paths["summary"].read_text()


def test_folds_that_are_not_there(phantom_dataset: Path, done: Path) -> None:
    with pytest.raises(InputError, match=r"--folds: there is no fold \[7, -1\] \(expected 0 to 4, or all\)"):
        run(phantom_dataset, done, folds=(0, 7, -1), train=SETTINGS)
    with pytest.raises(InputError, match="no fold is named"):
        run(phantom_dataset, done, folds=(), train=SETTINGS)


# ---- a second run ----------------------------------------------------------------------------------------------------


def test_a_second_run_skips_everything(
    phantom_dataset: Path, tiny_run: RunResult, done: Path, tiny_overrides: tuple[str, ...], calls: Counter[str]
) -> None:
    before = results(done)
    again = run(phantom_dataset, done, train=SETTINGS, overrides=tiny_overrides)
    assert not calls
    assert again.evaluation == tiny_run.evaluation
    assert results(done) == before


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"train": TrainSettings(iterations=4, device="cpu", seed=1)}, {**TRAINED, "infer": 2, "evaluate_cases": 1}),
        ({"more": ("plan.learning_rate=0.001",)}, {**TRAINED, "infer": 2, "evaluate_cases": 1}),
        ({"more": ("plan.spacing_mm=[3,1.2,1.2]",)}, {"prepare": 6, **TRAINED, "infer": 2, "evaluate_cases": 1}),
        ({"mirror": True}, {"infer": 2, "evaluate_cases": 1}),
        ({"evaluate": EvaluateSettings(tolerance_mm=2.0)}, {"evaluate_cases": 1}),
        ({"regions": {"all": (1, 5)}}, {"evaluate_cases": 1}),
    ],
    ids=lambda value: ",".join(value),
)
def test_a_change_redoes_what_follows_from_it(
    change: dict[str, Any],
    redone: dict[str, int],
    phantom_dataset: Path,
    done: Path,
    tiny_overrides: tuple[str, ...],
    calls: Counter[str],
) -> None:
    choices = {"train": SETTINGS, **change}
    overrides = (*tiny_overrides, *choices.pop("more", ()))
    run(phantom_dataset, done, overrides=overrides, **choices)
    assert calls == redone


def test_one_changed_label(
    copy: Path, tiny_overrides: tuple[str, ...], tiny_run: RunResult, done: Path, calls: Counter[str]
) -> None:
    path = copy / "labelsTr" / "phantom_001.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[array == 5] = 1
    nib.save(nib.Nifti1Image(array, image.affine, image.header), path)
    run(copy, done, train=SETTINGS, overrides=tiny_overrides)
    assert calls == {"check": 1, "measure": 1, "prepare": 1, **TRAINED, "infer": 2, "evaluate_cases": 1}


def test_a_changed_test_image_is_checked(
    copy: Path, tiny_overrides: tuple[str, ...], done: Path, calls: Counter[str]
) -> None:
    shutil.copy(copy / "imagesTr" / "phantom_001.nii.gz", copy / "imagesTs" / "phantom_007.nii.gz")
    run(copy, done, train=SETTINGS, overrides=tiny_overrides)
    assert calls == {"check": 1}
    assert "phantom_007: leak" in (done / "log.txt").read_text()


@pytest.mark.parametrize(
    "name", ["check.json", "fingerprint.json", "plan.json", "check.key.json", "evaluation/evaluation.json"]
)
def test_a_damaged_record_is_made_again(
    name: str, phantom_dataset: Path, done: Path, tiny_overrides: tuple[str, ...], tiny_run: RunResult
) -> None:
    whole = (done / name).read_bytes()
    (done / name).write_bytes(whole[: len(whole) // 2])
    again = run(phantom_dataset, done, train=SETTINGS, overrides=tiny_overrides)
    assert (done / name).read_bytes() == whole
    assert again.evaluation == tiny_run.evaluation


def test_a_failed_prediction_is_not_replaced_by_an_older_mask(
    phantom_dataset: Path, done: Path, tiny_overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = "phantom_004"
    mask = done / "predictions" / "fold_0" / f"{case}.nii.gz"
    assert mask.exists()
    mask.write_bytes(mask.read_bytes()[:-9])  # neither as it was written nor whole
    original = pipeline.Predictor.infer

    def fails(self: Any, ready: Any, *arguments: Any, **choices: Any) -> Any:
        if case in str(ready.source.paths):
            raise RuntimeError("out of memory")
        return original(self, ready, *arguments, **choices)

    monkeypatch.setattr(pipeline.Predictor, "infer", fails)
    result = run(phantom_dataset, done, train=SETTINGS.model_copy(update={"seed": 3}), overrides=tiny_overrides)
    assert not mask.exists()
    assert list(result.evaluation.failed) == [case]
    assert f"{case} failed: RuntimeError: out of memory" in (done / "log.txt").read_text()
    assert case in result.paths["summary"].read_text()


def test_regions_are_scored_beside_the_labels(
    phantom_dataset: Path, done: Path, tiny_overrides: tuple[str, ...], tiny_run: RunResult
) -> None:
    regions = {"whole": (1, 5)}
    result = run(phantom_dataset, done, train=SETTINGS, overrides=tiny_overrides, regions=regions)
    assert [summary.name for summary in result.evaluation.classes] == ["organ", "lesion", "whole"]
    assert result.evaluation.mean == tiny_run.evaluation.mean, "regions are left out of it"
    assert "| whole |" in result.paths["summary"].read_text()
    with pytest.raises(InputError, match=r"regions use integers \[3\] that no label has"):
        run(phantom_dataset, done, train=SETTINGS, overrides=tiny_overrides, regions={"odd": (1, 3)})


# ---- what is amiss ---------------------------------------------------------------------------------------------------


def truncate(dataset: Path, case: str) -> None:
    path = dataset / "imagesTr" / f"{case}.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])


def test_bad_cases_stop_a_run(copy: Path, tiny_overrides: tuple[str, ...], tmp_path: Path) -> None:
    truncate(copy, BAD)
    truncate(copy, "phantom_005")
    with pytest.raises(DatasetError) as failure:
        run(copy, tmp_path / "out", train=SETTINGS, overrides=tiny_overrides)
    lines = str(failure.value).splitlines()
    assert "2 of 6 cases cannot be used:" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == [f"  {BAD}", "  phantom_005"]
    assert "--skip-bad-cases" in lines[-1]
    assert BAD in (tmp_path / "out" / "log.txt").read_text()
    assert not (tmp_path / "out" / "training").exists()


def test_bad_cases_are_skipped_and_named(copy: Path, tiny_overrides: tuple[str, ...], tmp_path: Path) -> None:
    truncate(copy, BAD)
    out = tmp_path / "out"
    result = run(copy, out, train=SETTINGS, overrides=tiny_overrides, skip_bad_cases=True)
    assert result.skipped_cases == (BAD,)
    assert f"Left out as unusable (1): {BAD}" in result.paths["summary"].read_text()
    assert json.loads((out / "run.json").read_text())["skipped_cases"] == [BAD]
    assert f"left out 1 of 6 cases: {BAD}" in (out / "log.txt").read_text()
    assert BAD not in (out / "folds.json").read_text()
    assert not list((out / "prepared").rglob(f"{BAD}*"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("plan.network.name=unnet", "plan.network.name: no architecture 'unnet' .expected unet or"),
        ("plan.loss=dise", "plan.loss: no loss 'dise' .expected dice or"),
        ("plan.network.name=cell_segmenter", "3 out_channels at least are needed .* got 2"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_prepared(
    override: str,
    words: str,
    two_classes: Path,
    tiny_overrides: tuple[str, ...],
    tmp_path: Path,
    calls: Counter[str],
) -> None:
    with pytest.raises(PlanError, match=words):
        run(two_classes, tmp_path / "run", train=SETTINGS, overrides=(*tiny_overrides, override))
    assert not (tmp_path / "run" / "plan.json").exists()
    # and by `medseg train`, for which a plan may be edited by hand
    data = Dataset.open(two_classes)
    plan = override_plan(plan_station(data, tmp_path, "cpu"), [override], "3d_fullres")[0]
    with pytest.raises(PlanError, match=words):
        train_station(data, plan, None, {0: data.folds()[0]}, tmp_path, SETTINGS)
    assert not {"prepare", "loop"} & calls.keys()
    assert not list(tmp_path.rglob("prepared"))


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of background and one organ."""
    folder = tmp_path_factory.mktemp("two_classes")
    return make_dataset(folder, cases=5, test_cases=0, shape=(20, 20, 10), labels={"organ": 1})


def test_a_precision_that_the_device_lacks_is_refused_first(phantom_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="16 is not for a CPU"):
        run(phantom_dataset, tmp_path / "out", train=TrainSettings(device="cpu", precision="16"))
    assert not (tmp_path / "out").exists()


def test_two_runs_in_one_folder(
    phantom_dataset: Path, done: Path, tiny_overrides: tuple[str, ...], calls: Counter[str]
) -> None:
    refused = []

    def second(*_: object) -> None:
        with pytest.raises(InputError, match="another run is writing here"):
            run(phantom_dataset, done, train=SETTINGS, overrides=tiny_overrides)
        refused.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(phantom_dataset, done, train=SETTINGS, overrides=tiny_overrides, mirror=True, progress=second)
    assert refused
    run(phantom_dataset, done, train=SETTINGS, overrides=tiny_overrides)  # the hold ended with the run


def test_a_folder_that_cannot_be_written_to(
    phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be written to: .* Give another folder with -o"):
        run(phantom_dataset, tmp_path / "file", train=SETTINGS)
    with pytest.raises(InputError, match="cannot be written to: Not a directory"):
        run(phantom_dataset, tmp_path / "file" / "deeper", train=SETTINGS)

    def refuse(*_: object, **__: object) -> None:  # simulated: no folder is read-only to root
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="cannot be written to: Permission denied"):
        run(phantom_dataset, tmp_path / "new", train=SETTINGS)


def test_errors_stand_in_the_log(phantom_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        run(phantom_dataset, tmp_path, train=SETTINGS, overrides=["plan.nonsense=1"])
    log = (tmp_path / "log.txt").read_text()
    assert "ERROR --set plan.nonsense=1" in log


# ---- interrupted -----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(
    phantom_dataset: Path, tiny_run: RunResult, tiny_overrides: tuple[str, ...], tmp_path: Path, calls: Counter[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(phantom_dataset, tmp_path, train=SETTINGS, overrides=tiny_overrides, progress=stop)
    calls.clear()
    result = run(phantom_dataset, tmp_path, train=SETTINGS, overrides=tiny_overrides)
    assert calls == {**TRAINED, "infer": 2, "evaluate_cases": 1}
    assert results(tmp_path) == results(tiny_run.out)
    assert result.evaluation == tiny_run.evaluation


def full_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> Callable[[], int]:
    """Let the disk be full from a write on, to be called for how many there were."""
    count = [0]

    def sync(handle: int) -> None:
        count[0] += 1
        if count[0] > writes:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", sync)
    return lambda: count[0]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.8, 0.9, 0.99])
def test_a_full_disk_leaves_no_half(
    share: float,
    phantom_dataset: Path,
    tiny_run: RunResult,
    tiny_overrides: tuple[str, ...],
    tmp_path: Path,
    syncs_of_a_run: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        full_after(patch, int(syncs_of_a_run * share))
        with pytest.raises((OSError, MedsegError), match="No space left"):
            run(phantom_dataset, tmp_path, train=SETTINGS, overrides=tiny_overrides, report=False)
    assert not leftovers(tmp_path)
    require_whole(tmp_path)
    run(phantom_dataset, tmp_path, train=SETTINGS, overrides=tiny_overrides)
    assert results(tmp_path) == results(tiny_run.out)


@pytest.fixture(scope="module")
def syncs_of_a_run(
    phantom_dataset: Path,
    tiny_run: RunResult,
    tiny_overrides: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> int:
    with pytest.MonkeyPatch.context() as patch:
        count = full_after(patch, 10**9)
        out = tmp_path_factory.mktemp("counted")
        run(phantom_dataset, out, train=SETTINGS, overrides=tiny_overrides, report=False)
        return count()


def require_whole(out: Path) -> None:
    """Every file under its final name is whole; logs, which only grow, aside."""
    for path in out.rglob("*"):
        if path.is_dir() or path.name.startswith(TEMPORARY_PREFIX) or "tensorboard" in path.parts:
            continue
        if path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict | list), path
        elif path.suffix == ".safetensors":
            safetensors.torch.load_file(path)
        elif path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        elif path.suffix == ".gz":
            nib.load(path)
            assert gzip.decompress(path.read_bytes())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix in (".csv", ".md"):
            assert path.read_text().endswith("\n"), path


KILLS = 20
_COMMAND = """
import sys
from medseg import train
train.CHECKPOINT_SECONDS = train.CHECKPOINT_PAUSE = 0.0
from medseg.cli import main
main()
"""


def start(dataset: Path, out: Path, overrides: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """``medseg run``, with a checkpoint after each step."""
    settings = [part for override in overrides for part in ("--set", override)]
    arguments = ["run", str(dataset), "-o", str(out), "--iterations", "12", "--device", "cpu", "--folds", "0,1", "-q"]
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments, *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def started_at(child: subprocess.Popen[bytes], out: Path) -> float:
    """When the run took hold of its folder, after a start-up that is longer than all the rest."""
    log = out / "log.txt"
    before = log.stat().st_mtime_ns if log.exists() else 0
    lock = out / ".lock"
    while child.poll() is None:
        if lock.exists() and (_is_held(lock) or (log.exists() and log.stat().st_mtime_ns != before)):
            break
        time.sleep(0.005)
    return time.monotonic()


def _is_held(lock: Path) -> bool:
    import fcntl

    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
    return False


STATIONS = {
    "starting": ".lock",
    "checking": "check.json",
    "planning": "fingerprint.json",
    "preparing": "prepared/*/*",
    "training": "training/*/*",
    "packaging": "package/*",
    "predicting": "predictions/*/*",
    "writing": "evaluation/*",
    "finished": "run.json",
}
"""Every station, and what it writes first."""


def station(out: Path) -> int:
    """The last station that has written anything, by its number; 0 where none has."""
    return max((n for n, pattern in enumerate(STATIONS.values()) if next(out.glob(pattern), None)), default=0)


def kill(child: subprocess.Popen[bytes], out: Path, length: float, rng: random.Random) -> None:
    """Kill a run at a random moment of a random station, of those that are still to be done."""
    begin, now = started_at(child, out), station(out)
    goal = rng.randrange(now, len(STATIONS) - 1)
    if goal == now:
        time.sleep(max(0.0, begin + rng.uniform(0, length / 2) - time.monotonic()))
    else:
        while station(out) < goal and child.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
    child.kill()
    child.wait()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL")
def test_twenty_kills(phantom_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    child = start(phantom_dataset, whole, tiny_overrides)
    begin = started_at(child, whole)
    said, _ = child.communicate()
    length = time.monotonic() - begin
    assert child.returncode == 0, said.decode()
    rng = random.Random(0)
    killed: Counter[str] = Counter()
    while killed.total() < KILLS:
        child = start(phantom_dataset, broken, tiny_overrides)
        kill(child, broken, length, rng)
        said, _ = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), said.decode()
        killed[list(STATIONS)[station(broken)]] += child.returncode != 0
        require_whole(broken)
        if station(broken) == len(STATIONS) - 1:
            require_equal(phantom_dataset, broken, whole, tiny_overrides)
            shutil.rmtree(broken)
    require_equal(phantom_dataset, broken, whole, tiny_overrides)
    assert len(results(whole)) == 2 + 3 + 1, "two folds, their three held-out cases, the scores"
    print(f"a run takes {length:.1f} s after its start; killed while {dict(killed)}")  # noqa: T201 - shown with -s


def require_equal(dataset: Path, broken: Path, whole: Path, overrides: tuple[str, ...]) -> None:
    """One more run, to its end, makes of what the kills left what a run in one go makes."""
    child = start(dataset, broken, overrides)
    said, _ = child.communicate()
    assert child.returncode == 0, said.decode()
    assert results(broken) == results(whole)
    assert not leftovers(broken)
