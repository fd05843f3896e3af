"""The command line: what each command prints where, its exit codes, and that stations give what the journey gives."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import nibabel
import numpy as np
import pytest
from dicoms import write_series
from rich.console import Console
from typer.testing import CliRunner

import medseg
from medseg import cli, pipeline, train
from medseg import io as read
from medseg.batch import Outputs
from medseg.cases import MASK_FORMATS
from medseg.cli import app
from medseg.engines import ENGINES, PRECISIONS, Quantisation
from medseg.errors import InputError, TrainingError
from medseg.phantom import make_dataset
from medseg.pipeline import RunResult
from medseg.plan import Plan
from medseg.volume import Mask

COMMANDS = (
    *("run", "check", "plan", "train", "predict", "import-nnunet", "quantise"),
    *("evaluate", "compare", "report", "convert", "stats", "preview", "download", "doctor", "demo", "dicom"),
)
PIPELINES = Path(__file__).parent.parent / "pipelines"


def medseg_(*arguments: str | Path) -> Any:
    """Call the command line in this process; its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def set_options(overrides: tuple[str, ...]) -> list[str]:
    return [word for setting in overrides for word in ("--set", setting)]


def bad_dataset(source: Path, target: Path) -> Path:
    """A copy of a dataset, in which the first labelled image is cut short."""
    shutil.copytree(source, target)
    image = target / "imagesTr" / "phantom_001.nii.gz"
    image.write_bytes(image.read_bytes()[:-30])
    return target


# Help


def test_help_lists_every_command_with_a_whole_sentence() -> None:
    result = medseg_("--help")
    assert result.exit_code == 0
    listed = re.findall(r"^  ([\w-]+) {2,}(\S.*)$", result.stdout.partition("Commands:")[2], re.MULTILINE)
    assert [name for name, _ in listed] == list(COMMANDS)
    assert all(sentence.endswith(".") and not sentence.endswith("...") for _, sentence in listed)
    assert "not a medical device" in result.stdout
    assert medseg_("-h").stdout == result.stdout
    assert medseg_().stderr.strip() == result.stdout.strip()


@pytest.mark.parametrize("command", [*COMMANDS[:-1], "dicom scan"])
def test_help_of_a_command_says_what_it_does_and_gives_examples(command: str) -> None:
    result = medseg_(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"\n    medseg {command}" in result.stdout.partition("Examples:")[2]
    assert max(len(line) for line in result.stdout.partition("Examples:")[0].splitlines()) <= 80
    assert all(name in result.stdout for name in ("--verbose", "--quiet", "--help"))


def test_help_of_dicom_names_its_commands() -> None:
    assert re.search(r"^  scan +List .*\w\.$", medseg_("dicom", "--help").stdout, re.MULTILINE)


def test_version() -> None:
    assert medseg_("--version").stdout == f"medseg {medseg.__version__}\n"


# Values


@pytest.mark.parametrize(("text", "megabytes"), [("8GB", 8192), ("6g", 6144), ("900MB", 900), ("0.5 GB", 512)])
def test_amounts_of_memory(text: str, megabytes: float) -> None:
    assert cli._megabytes(text) == megabytes


def test_lists_of_folds() -> None:
    assert cli._folds("0") == (0,)
    assert cli._folds("3,1,1") == (1, 3)
    assert cli._folds("all") is None


@pytest.mark.parametrize("text", ["8", "", "lots", "-1GB", "0MB", "8TB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="6GB or 900MB"):
        cli._megabytes(text)


@pytest.mark.parametrize("text", ["", "x", "0,", "-1", "0 1", "All"])
def test_what_is_no_list_of_folds_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="0 or 0,1, or all"):
        cli._folds(text)


# Wrong usage: exit code 2, one message on stderr that says what to do, nothing on stdout, nothing written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["run"], "Missing argument 'DATASET'"),
        (["run", "nowhere"], "nowhere: does not exist"),
        (["run", "DATA", "--time-budget", "soon"], "--time-budget: 'soon' is no length of time"),
        (["run", "DATA", "--epochs", "1", "--iterations", "2"], "--epochs and --iterations"),
        (["run", "DATA", "--epochs", "0"], "--epochs"),
        (["run", "DATA", "--folds", "x"], "--folds: 'x'"),
        (["run", "DATA", "--memory-budget", "8"], "--memory-budget: '8'"),
        (["run", "DATA", "--configuration", "4d"], "3d_fullres"),
        (["run", "DATA", "--colour"], "No such option: --colour"),
        (["plan", "nowhere"], "nowhere: does not exist"),
        (["train", "DATA", "-o", "OUT"], "OUT: holds no plan.json"),
        (["predict", "DATA", "-o", "OUT"], "Missing option '--model'"),
        (["predict", "DATA", "-m", "nothing", "-o", "OUT"], "nothing: "),
        (["predict", "nowhere", "-m", "PACKAGE", "-o", "OUT"], "nowhere: does not exist"),
        (["predict", "EMPTY", "-m", "PACKAGE", "-o", "OUT"], "holds no image among its 0 entries"),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "mask.nii.gz"], "mask.nii.gz: names a file"),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--overlap", "2"], "--overlap"),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--device", "abacus"], "'abacus' is not there"),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--memory-limit", "6"], "--memory-limit: '6' is no amount"),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--shard", "3/2"], "--shard: '3/2' is no shard"),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--engine", "steam"], "--engine"),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--probabilities", "heart"], "the model has no heart"),
        (["predict", "EMPTY/*.nii", "-m", "PACKAGE", "-o", "OUT"], "matches no image"),
        (
            ["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--format", "nii.gz,jpeg"],
            "'jpeg' is no format (expected nii.gz, dic",
        ),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--format", ","], "--format: '' is no format"),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--format", "dicom-seg"], "2 of 2 images are no DICOM"),
        (["predict", "DATA", "-m", "PACKAGE", "-o", "OUT", "--series", "T1"], "--series: picks series of DICOM"),
        (["predict", "DATA", "EMPTY", "-m", "PACKAGE", "-o", "OUT"], "holds no image among its 0 entries"),
        (["import-nnunet", "EMPTY", "-o", "OUT"], "EMPTY"),
        (["quantise", "nothing", "DATA"], "nothing: "),
        (["evaluate", "EMPTY", "DATA", "-o", "OUT"], "holds no masks"),
        (["evaluate", "nowhere", "DATA", "-o", "OUT"], "nowhere: is not there"),
        (["evaluate", "DATA", "DATA", "-o", "OUT", "--labels", "nowhere.csv"], "nowhere.csv: "),
        (["convert", "nowhere.nii.gz", "-o", "OUT.mha"], "nowhere.nii.gz: "),
        (["convert", "nowhere.nii.gz", "-o", "OUT.jpg"], "OUT.jpg: has no ending that a mask can be written with"),
        (["convert", "nowhere.nii.gz", "-o", "OUT.dcm"], "Name it with --reference"),
        (["stats", "EMPTY", "EMPTY"], "holds no image among its 0 entries"),
        (["stats", "DATA", "EMPTY/*.nii"], "holds no masks"),
        (["dicom", "scan", "nowhere"], "nowhere"),
        (["dicom", "frobnicate"], "No such command 'frobnicate'"),
        (["check", "EMPTY"], "holds no image among its 0 entries"),
        (["download", "Task99"], "Task04_Hippocampus, Task05_Prostate"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_wrong_usage(
    arguments: list[str], message: str, tiny_run: RunResult, phantom_dataset: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    places = {"DATA": str(phantom_dataset), "PACKAGE": str(tiny_run.package)}
    result = medseg_(*(places.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("rror:") == 1
    assert "Traceback" not in result.stderr
    if arguments[0] != "run":  # whose folder holds the log of what was refused
        assert [path.name for path in tmp_path.iterdir()] == ["EMPTY"]


def test_an_unknown_plan_field_is_answered_with_the_fields_there_are(phantom_dataset: Path, tmp_path: Path) -> None:
    result = medseg_("plan", phantom_dataset, "-o", tmp_path, "--set", "plan.patchsize=[8,8,8]")
    assert result.exit_code == 2
    assert "no field 'patchsize'" in result.stderr
    assert "patch_size" in result.stderr
    wrong = medseg_("plan", phantom_dataset, "-o", tmp_path, "--set", "plan.batch_size=many")
    assert (wrong.exit_code, "batch_size" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (ZeroDivisionError("a bug"), 1, "unexpected ZeroDivisionError: a bug"),
        (
            PermissionError(13, "Permission denied", "OUT"),
            1,
            "error: OUT: permission denied. Give another place with -o",
        ),
        (OSError(28, "No space left on device", "OUT"), 1, "error: OUT: no space left on device. Make room; "),
        (OSError(5, "Input/output error"), 1, "error: the disk: input/output error\n"),
        (OSError("of a library"), 1, "error: of a library\n"),
        (TrainingError("step 3", "the loss is nan"), 1, "step 3: the loss is nan"),
        (InputError("file", "is [bold]odd[/bold]"), 2, "file: is [bold]odd[/bold]"),
        (KeyboardInterrupt(), 130, "interrupted: what is finished is kept"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_goes_wrong_is_a_message_and_an_exit_code(
    failure: BaseException, code: int, message: str, phantom_dataset: Path, monkeypatch: Any
) -> None:
    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr("medseg.check.check", fail)
    result = medseg_("check", phantom_dataset)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if code != 130:
        assert "Traceback" in medseg_("check", phantom_dataset, "-v").stderr
    assert logging.getLogger("medseg").handlers == []


# Stations


def test_check_tells_every_fault_and_ends_with_3_when_cases_are_unusable(phantom_dataset: Path, tmp_path: Path) -> None:
    good = medseg_("check", phantom_dataset)
    assert (good.exit_code, good.stdout) == (0, "8 cases checked: 0 unusable, 0 findings in all\n")
    assert "checking 100%" in good.stderr
    broken = bad_dataset(phantom_dataset, tmp_path / "broken")
    bad = medseg_("check", broken)
    assert bad.exit_code == 3
    assert re.search(r"^phantom_001 .*unusable .*truncated", bad.stdout, re.MULTILINE)
    assert "1 unusable" in bad.stdout


def test_check_as_json_is_json_and_nothing_else(phantom_dataset: Path, tmp_path: Path) -> None:
    assert json.loads(medseg_("check", phantom_dataset, "--json").stdout)["findings"] == []
    result = medseg_("check", bad_dataset(phantom_dataset, tmp_path / "broken"), "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)["findings"]
    assert [(f["case"], f["unusable"]) for f in found if f["unusable"]] == [("phantom_001", True)]


def test_quiet_says_nothing_but_results(phantom_dataset: Path) -> None:
    result = medseg_("check", phantom_dataset, "--quiet")
    assert result.stderr == ""
    assert result.stdout.startswith("8 cases checked")


def test_stations_one_by_one_give_the_scores_of_the_journey(
    phantom_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path: Path
) -> None:
    stations, journey = tmp_path / "stations", tmp_path / "journey"
    common = ("--iterations", "3", "--device", "cpu", "--seed", "4")

    made = medseg_("plan", phantom_dataset, "-o", stations, *set_options(tiny_overrides))
    assert made.exit_code == 0, made.stderr
    assert re.search(r"^axes +The .* axis comes first", made.stdout, re.MULTILINE)
    assert f"plan: {stations / 'plan.json'}" in made.stdout
    body = json.loads((stations / "plan.json").read_text())  # edited by hand
    body["configurations"]["3d_fullres"]["training"]["learning_rate"] = 0.02
    (stations / "plan.json").write_text(json.dumps(body))

    trained = medseg_("train", phantom_dataset, "-o", stations, *common)
    assert trained.exit_code == 0, trained.stderr
    assert trained.stdout == f"model package: {stations / 'package'}\n"
    held_out = json.loads((stations / "folds.json").read_text())[0]["validation"]
    for case in held_out:
        for part in ("images", "labels"):
            (tmp_path / part).mkdir(exist_ok=True)
            shutil.copy(phantom_dataset / f"{part}Tr" / f"{case}.nii.gz", tmp_path / part)
    masks = medseg_("predict", tmp_path / "images", "-m", stations / "package", "-o", tmp_path / "masks")
    assert (masks.exit_code, masks.stdout) == (0, f"2 masks in {tmp_path / 'masks'} (0 kept from before), 0 failed\n")
    again = medseg_("predict", tmp_path / "images", "-m", stations / "package", "-o", tmp_path / "masks")
    assert "(2 kept from before)" in again.stdout
    scored = medseg_("evaluate", tmp_path / "masks", tmp_path / "labels", "-o", tmp_path / "scores")
    assert scored.exit_code == 0, scored.stderr

    overrides = (*tiny_overrides, "plan.learning_rate=0.02")
    ran = medseg_("run", phantom_dataset, "-o", journey, *common, *set_options(overrides))
    assert ran.exit_code == 0, ran.stderr
    assert Plan.load(journey / "plan.json").configurations == Plan.load(stations / "plan.json").configurations

    def scores(path: Path) -> list[list[str]]:
        with path.open(newline="") as file:
            return [[cell for name, cell in row.items() if name != "class"] for row in csv.DictReader(file)]

    assert scores(tmp_path / "scores" / "scores.csv") == scores(journey / "evaluation" / "scores.csv")
    files = ("evaluation/scores.csv", "summary.md", "plan.json", "log.txt", "report.html")
    for path in ("package", "predictions", *files):
        assert (journey / path).exists()
        assert str(journey / path) in ran.stdout
    assert re.search(r"^mean of classes +0\.\d{4}", ran.stdout, re.MULTILINE)
    assert "\x1b" not in ran.stdout + ran.stderr
    assert "training" not in ran.stdout.replace("training/", "")


def test_bad_cases_stop_a_run_and_are_left_out_on_demand(
    phantom_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path: Path
) -> None:
    broken = bad_dataset(phantom_dataset, tmp_path / "broken")
    words = ("--iterations", "1", "--no-report", *set_options(tiny_overrides))
    arguments = ("run", broken, "-o", tmp_path / "out", *words)
    stopped = medseg_(*arguments)
    assert stopped.exit_code == 2
    assert "phantom_001" in stopped.stderr
    assert "--skip-bad-cases" in stopped.stderr
    result = medseg_(*arguments, "--skip-bad-cases")
    assert result.exit_code == 0, result.stderr
    assert "left out as unusable: phantom_001" in result.stdout
    assert "phantom_001" in (tmp_path / "out" / "summary.md").read_text()


def test_predict_goes_on_after_a_bad_case_and_ends_with_3(
    tiny_run: RunResult, phantom_dataset: Path, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "masks"
    shutil.copytree(phantom_dataset / "imagesTs", images)
    (images / "broken.nii.gz").write_bytes(b"\x1f\x8b")
    out.mkdir()
    (out / ".medseg-tmp-0-of-a-killed-run.nii.gz").touch()
    result = medseg_("predict", images, "-m", tiny_run.package, "-o", out)
    assert result.exit_code == 3
    assert result.stdout == f"2 masks in {out} (0 kept from before), 1 failed\nreasons: {out / 'cases.csv'}\n"
    assert (
        len(re.findall(r"gzip", result.stderr)) == len(re.findall(r"^error: broken failed: ", result.stderr, re.M)) == 1
    )
    written = {path.name for path in out.iterdir()} - {".lock"}
    beside = {"cases.csv", "journal.jsonl", "run.json", "log.txt", "dseg.tsv", "labels.csv", "labels.txt"}
    assert written == {"phantom_007.nii.gz", "phantom_008.nii.gz", *beside}


def test_predict_takes_several_places_and_writes_probabilities(
    tiny_run: RunResult, phantom_dataset: Path, tmp_path: Path
) -> None:
    one, two = sorted((phantom_dataset / "imagesTs").iterdir())
    (tmp_path / "list.csv").write_text(f"case,image\nsecond,{two}\n")
    words = ["--probabilities", "organ, lesion", "--memory-limit", "16GB", "--engine", "eager", "--device", "cpu"]
    out = tmp_path / "out"
    result = medseg_("predict", one, tmp_path / "list.csv", "-m", tiny_run.package, "-o", out, *words)
    assert (result.exit_code, result.stdout) == (0, f"2 masks in {out} (0 kept from before), 0 failed\n")
    assert re.search(r"^predicting 100% second done \(2 of 2\)", result.stderr, re.MULTILINE)
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.nii.gz")) == [
        *("phantom_007.nii.gz", "probabilities/phantom_007/lesion.nii.gz", "probabilities/phantom_007/organ.nii.gz"),
        *("probabilities/second/lesion.nii.gz", "probabilities/second/organ.nii.gz", "second.nii.gz"),
    ]
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["probabilities"] == ["organ", "lesion"]
    assert (run["settings"]["memory_limit_mb"], run["engine"]) == (16384, "eager")


def test_predict_takes_the_series_that_is_named_and_writes_the_formats_that_are_wanted(
    tiny_run: RunResult, phantom_dataset: Path, tmp_path: Path
) -> None:
    array = np.asanyarray(nibabel.load(phantom_dataset / "imagesTs" / "phantom_007.nii.gz").dataobj).astype(np.int16)
    for number, offsets in ((1, None), (2, [*range(array.shape[2] - 1), 2 * array.shape[2]])):
        write_series(
            tmp_path / "study" / str(number),
            array,
            uid=f"1.2.{number}",
            study_uid="1.2",
            offsets=offsets,
            marker="ANNA",
        )
    arguments = (
        "predict",
        tmp_path / "study",
        "-m",
        tiny_run.package,
        "-o",
        tmp_path / "out",
        "--format",
        "mha,dicom-seg",
    )
    uncoded = medseg_(*arguments)
    assert (uncoded.exit_code, uncoded.stdout) == (2, "")
    assert "no code for organ" in uncoded.stderr
    refused = medseg_(*arguments, "--series", "1.2.2", "--allow-uncoded")
    assert (refused.exit_code, "series 1.2.2: " in refused.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
    done = medseg_(*arguments, "--series", "1.2.2", "--allow-uncoded", "--seg-type", "labelmap", "--resample-irregular")
    assert done.exit_code == 0, done.stderr
    name = medseg.series(tmp_path / "study", "1.2.2", resample_irregular=True).name
    assert {f"{name}.mha", f"{name}.dcm"} < {path.name for path in (tmp_path / "out").iterdir()}
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["outputs"] == {"formats": ["mha", "dicom-seg"], "seg_type": "labelmap", "allow_uncoded": True}
    assert run["settings"]["resample_channels"] is False
    written = [path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix != ".dcm"]
    said = [result.stdout + result.stderr for result in (uncoded, refused, done)]
    assert b"ANNA" not in b"".join([*written, *(text.encode() for text in said)])


def test_a_job_of_a_slurm_array_takes_its_share_and_says_so(
    tiny_run: RunResult, phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in {"ID": 11, "MIN": 10, "MAX": 11, "STEP": 1, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(number))
    arguments = ("predict", phantom_dataset, "-m", tiny_run.package, "-o", tmp_path / "out")
    result = medseg_(*arguments, "--quiet")  # which does not hide it
    assert result.exit_code == 0
    assert "shard 2/2, as this job in its Slurm array" in result.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()} - {".lock", ".lock-2-of-2"}
    own = {"cases-2-of-2.csv", "journal-2-of-2.jsonl", "run-2-of-2.json", "log-2-of-2.txt"}
    assert written == own | {"phantom_008.nii.gz", "dseg.tsv", "labels.csv", "labels.txt"}
    result = medseg_(*arguments, "--shard", "1/1")  # what is said comes before what is found
    assert "Slurm" not in result.stderr
    assert "2 masks" in result.stdout
    assert "(1 kept from before)" in result.stdout


def test_import_nnunet_passes_on_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def import_model(folder: Path, out: Path, **choices: Any) -> Any:
        calls.append((folder, out, choices))
        return types.SimpleNamespace(notes=("turned to [RAS]",))

    monkeypatch.setattr("medseg.interop.nnunet.import_model", import_model)
    words = ["--folds", "0,2", "--checkpoint", "best.pth", "--previous", "low", "--orientation", "RAS"]
    result = medseg_("import-nnunet", "model", "-o", "package", *words)
    assert (result.exit_code, result.stdout) == (0, "note: turned to [RAS]\nmodel package: package\n")
    choices = {"folds": (0, 2), "checkpoint": "best.pth", "previous": Path("low"), "orientation": "RAS"}
    assert calls == [(Path("model"), Path("package"), choices)]
    medseg_("import-nnunet", "model", "-o", "package")
    usual = {"folds": None, "checkpoint": "checkpoint_final.pth", "previous": None, "orientation": "stored"}
    assert calls[1][2] == usual
    medseg_("import-nnunet", "model", "-o", "package", "--folds", "all")
    assert calls[2][2] == {**usual, "folds": ("all",)}  # nnU-Net's word for the model of all cases


def test_predict_offers_the_engines_and_precisions_that_there_are() -> None:
    hints = get_type_hints(cli.predict)
    assert get_args(hints["engine"]) == ("auto", *ENGINES)
    assert get_args(hints["precision"]) == PRECISIONS
    assert get_args(hints["seg_type"]) == get_args(Outputs.model_fields["seg_type"].annotation)
    assert all(form in medseg_("predict", "--help").stdout for form in MASK_FORMATS)


def test_an_output_folder_that_holds_the_images_is_refused_before_the_model_is_loaded(scans: Path) -> None:
    result = medseg_("predict", scans, "-m", "nothing", "-o", scans)
    assert (result.exit_code, "holds input images, as a.nii.gz" in result.stderr) == (2, True)


def test_quantise_tells_what_it_costs(phantom_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Quantisation(
        network="0123456789abcdef",
        tiles=32,
        cases=("a", "b"),
        agreement=0.9912,
        measured_cases=("c",),
        dice_float32=0.9,
        dice_int8=0.8986,
        dice_loss=0.0014,
        versions={},
    )
    bare = record.model_copy(update={"dice_float32": None, "dice_int8": None, "dice_loss": None, "measured_cases": ()})
    monkeypatch.setattr("medseg.quantise.quantise", lambda package, dataset, show: [record, bare])
    result = medseg_("quantise", "package", phantom_dataset)
    assert result.exit_code == 0
    assert re.search(r"^0123456789ab +32 +0\.9912 +1 +0\.9000 +0\.8986 +0\.0014", result.stdout, re.MULTILINE)
    assert re.search(r"^0123456789ab +32 +0\.9912 +0 +not measured", result.stdout, re.MULTILINE)


# DICOM

DESCRIPTION = "portal [bold]phase :smile:"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of a CT and of two echoes of MR with hostile descriptions, another with a gap, and a file of text."""

    def described(text: str, echo: float = 0) -> Callable[[Any, int], object]:
        def change(dataset: Any, k: int) -> None:
            dataset.SeriesDescription, dataset.FrameOfReferenceUID = text, "1.2.3.9"
            if echo:
                dataset.EchoTime = echo

        return change

    voxels = np.random.default_rng(0).integers(0, 900, (20, 16, 8)).astype(np.int16)
    folder = tmp_path / "study"
    oblique = {"spacing": (0.5, 0.75, 3.0), "row": (0, 1, 0), "column": (0, 0, -1), "study_uid": "1.2.3"}
    write_series(folder / "ct", voxels, **oblique, uid="1.2.3.1", change=described(DESCRIPTION))  # type: ignore[arg-type]
    for echo in (4.5, 9):
        name = f"mr{echo:g}"
        change = described("T2 \x1b[31m\u202emap", echo)
        write_series(folder / name, voxels, modality="MR", uid="1.2.3.2", study_uid="1.2.3", change=change)
    write_series(folder / "gap", voxels, offsets=[0, 1, 2, 3, 4, 5, 7, 8], uid="1.2.4.1", study_uid="1.2.4")
    (folder / "notes.txt").write_text("call back")
    return folder


def test_scan_lists_what_is_there(study: Path) -> None:
    result = medseg_("dicom", "scan", study)
    assert (result.exit_code, result.stderr) == (3, "")  # some are no use
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("study")] == ["study 1.2.3", "study 1.2.4"]
    rows = {
        row[2]: row
        for line in lines
        if len(row := re.split(r" {2,}", line.strip())) > 5 and row[0].startswith("series_")
    }
    (name,) = (series.name for series in read.dicom.scan(study / "ct").series)
    assert rows[DESCRIPTION] == [
        *(name, "CT", DESCRIPTION, "8", "20x16x8", "0.5x0.75x3", "PIR"),
        *("Explicit VR Little Endian", "usable"),
    ]
    at = lines.index("  1.2.3.1")
    assert (lines[at - 1].split()[0], lines[at + 1]) == (name, "  8 files in ct")
    assert {"  1.2.3.2[EchoTime=4.5]", "  1.2.3.2[EchoTime=9]", "  8 files in mr4.5", "  8 files in mr9"} < set(lines)
    assert len(re.findall(r"not usable\n  .*2.00 mm", result.stdout)) == 1
    assert "passed over: 1 no DICOM" in lines
    assert lines[-1] == "4 series, 3 usable"
    assert "\x1b" not in result.stdout
    assert "\u202e" not in result.stdout
    assert r"T2 \x1b[31m\u202emap" in result.stdout  # spelled out


def test_scan_as_json_is_json_and_nothing_else(study: Path) -> None:
    zipped = shutil.make_archive(str(study), "zip", study)
    result = medseg_("dicom", "scan", zipped, "--json")
    assert (result.exit_code, result.stderr) == (3, "")
    found = json.loads(result.stdout)
    assert found == json.loads(medseg_("dicom", "scan", study, "--json").stdout)
    assert found["passed_over"] == {"no DICOM": 1}
    (ct,) = (series for series in found["series"] if series["uid"] == "1.2.3.1")
    assert re.fullmatch("series_[0-9a-f]{12}", ct.pop("name"))
    places = {"study_uid": "1.2.3", "uid": "1.2.3.1", "part": ""}
    grid = {"slices": 8, "size": [20, 16, 8], "spacing_mm": [0.5, 0.75, 3.0], "orientation": "PIR"}
    places |= {"folder": "ct", "files": 8}
    facts = {"modality": "CT", "description": DESCRIPTION, "transfer_syntax": "Explicit VR Little Endian"}
    assert ct == {**places, **facts, **grid, "usable": True, "reason": "", "irregular": "", "warnings": []}
    (gap,) = (series for series in found["series"] if not series["usable"])
    assert (gap["uid"], gap["size"], gap["slices"]) == ("1.2.4.1", None, 8)
    assert gap["reason"]
    assert {series["part"] for series in found["series"]} == {"", "EchoTime=4.5", "EchoTime=9"}


def test_scan_ends_with_0_where_all_is_usable_and_with_2_where_nothing_is(study: Path, tmp_path: Path) -> None:
    assert medseg_("dicom", "scan", study / "ct").exit_code == 0
    assert medseg_("dicom", "scan", study / "gap").exit_code == 2
    (tmp_path / "empty").mkdir()
    nothing = medseg_("dicom", "scan", tmp_path / "empty")
    assert (nothing.exit_code, nothing.stdout) == (2, "0 series, 0 usable\n")
    assert "empty: holds no DICOM series: 0 files looked at" in nothing.stderr
    assert medseg_("dicom", "scan", tmp_path / "nowhere").exit_code == 2


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_a_listing_is_wrapped_between_words_alone(
    columns: int, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    uid = "1." + "2345678" * 8 + ".31416"  # 64 characters

    def described(dataset: Any, _: int) -> None:
        dataset.SeriesDescription = "portal venous phase of the liver"

    good, bad = tmp_path / "a" / "b", tmp_path / "a" / "c"
    voxels, spacing, gaps = np.ones((16, 12, 8), np.int16), (0.8398, 0.8398, 2.5), [0, 1, 2, 3, 4, 5, 7, 8]
    write_series(good, voxels, spacing=spacing, uid=uid, study_uid="1.2.3", change=described)
    write_series(bad, voxels, offsets=gaps, uid="1.2.4.1", study_uid="1.2.3")
    found = read.dicom.scan(tmp_path)
    cli._print_scan(found)
    text = terminal.getvalue()
    lines = text.splitlines()
    assert all(len(line) <= columns or line.strip() == uid for line in lines)
    assert {"  8 files in a/b", "  8 files in a/c", f"  {uid}", "  1.2.4.1"} < set(lines)
    (row,) = (line for line in lines if "0.8398x0.8398x2.5" in line)
    usable, unusable = sorted(found.series, key=lambda series: series.reason)
    assert row.split()[:2] == [usable.name, "CT"]
    assert "16x12x8" in row
    assert "portal venous phase of the liver" in text
    assert unusable.reason in " ".join(text.split())
    assert text.count("not usable") == 1
    assert ("Explicit VR Little Endian" in text) == (columns == 200)


def test_where_nothing_can_be_written_is_said_before_the_work(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode != os.W_OK or path != tmp_path
    )  # root may write everywhere
    for words in (
        ["stats", study, study, "-o", tmp_path / "new" / "x.csv"],
        ["evaluate", study, study, "-o", tmp_path],
    ):
        result = medseg_(*words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"no right to write in {tmp_path}" in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_full_disk_names_the_file_and_what_to_do(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, out = tmp_path / "mask.nii.gz", tmp_path / "x.csv"
    image = read.read_volume(study / "ct")
    read.write_mask(Mask(np.ones(image.geometry.shape, np.uint8), image.geometry), mask)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = medseg_("stats", study / "ct", mask, "-o", out, "-q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {out}: no space left on device. Make room; ")
    assert "medseg-tmp" not in result.stderr


def test_a_mask_becomes_a_segmentation_and_is_measured_and_scored(study: Path, tmp_path: Path) -> None:
    ct, seg, mask = study / "ct", tmp_path / "liver.dcm", tmp_path / "liver.nii.gz"
    image = read.read_volume(ct)
    array = np.zeros(image.geometry.shape, np.uint8)
    array[4:8, 4:8, 2:4] = 1
    read.write_mask(Mask(array, image.geometry), mask)
    (tmp_path / "dseg.tsv").write_text("index\tname\n1\tliver\n")
    words = ("--reference", study, "--labels", tmp_path / "dseg.tsv")
    shutil.rmtree(study / "gap")
    assert "EchoTime=9" in medseg_("convert", mask, "-o", seg, *words).stderr  # several: which one?
    made = medseg_("convert", mask, "-o", seg, *words, "--series", "*portal*")
    assert (made.exit_code, made.stdout, made.stderr) == (0, f"mask: {seg}\n", "")
    refused = medseg_("convert", mask, "-o", seg, *words, "--series", "*portal*")
    assert (refused.exit_code, "--overwrite" in refused.stderr) == (2, True)

    found = medseg_("stats", study, seg, "--series", "*portal*", "-q")
    assert (found.exit_code, found.stderr) == (0, "")
    (row,) = csv.DictReader(io.StringIO(found.stdout))
    assert (row["label"], row["voxels"], float(row["volume_ml"])) == ("liver", "32", 32 * 0.5 * 0.75 * 3 / 1000)
    assert float(row["mean"]) == pytest.approx(image.array[0][array == 1].mean())
    table = medseg_("stats", ct, mask, "-o", tmp_path / "stats.csv", "--labels", tmp_path / "dseg.tsv", "-q")
    assert table.stdout == f"statistics: {tmp_path / 'stats.csv'}\n"
    (same,) = csv.DictReader(io.StringIO((tmp_path / "stats.csv").read_text()))
    assert {**same, "case": row["case"]} == row
    assert json.loads(medseg_("stats", ct, mask, "--json").stdout)["cases"][0]["labels"][0]["voxels"] == 32
    wrong = medseg_("stats", study / "mr9", mask)
    assert (wrong.exit_code, "not measured: liver: " in wrong.stderr) == (3, True)

    scored = medseg_("evaluate", seg, mask, "-o", tmp_path / "scores", "--labels", tmp_path / "dseg.tsv")
    assert scored.exit_code == 0, scored.stderr
    assert re.search(r"^liver +1\.0000", scored.stdout, re.MULTILINE)


def test_check_says_which_images_cannot_be_segmented(study: Path, scans: Path) -> None:
    result = medseg_("check", study)
    assert result.exit_code == 3
    (row,) = re.findall(r"^(series_\w+) +unreadable +unusable +(.*)", result.stdout, re.MULTILINE)
    assert "2.00 mm" in row[1]
    assert result.stdout.endswith("4 cases checked: 1 unusable, 1 finding in all\n")
    assert medseg_("check", study / "ct").exit_code == 0
    assert medseg_("check", scans).exit_code == 0
    (scans / "b.nii.gz").write_bytes(b"no image")
    result = medseg_("check", scans)
    assert (result.exit_code, "b " in result.stdout) == (3, True)


def test_evaluate_has_a_word_each_for_failed_and_for_not_scored(tiny_run: RunResult, tmp_path: Path) -> None:
    (predictions,) = (tiny_run.out / "predictions").iterdir()
    one, two = sorted(path.name for path in predictions.glob("*.nii.gz"))
    references = tmp_path / "references"
    references.mkdir()
    shutil.copy(predictions / one, references / one)
    shutil.copy(predictions / one, references / "missing.nii.gz")
    (references / two).write_bytes(b"broken")
    result = medseg_("evaluate", predictions, references, "-o", tmp_path / "scores")
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert [line.split(":")[:2] for line in lines if line.startswith("failed")] == [
        ["failed, counted as 0", " missing"]
    ]
    assert [line.split(":")[0] for line in lines if two.removesuffix(".nii.gz") in line] == ["not scored, in no number"]
    assert (tmp_path / "scores" / "evaluation.json").exists()
    (references / "missing.nii.gz").unlink()
    (references / two).unlink()
    result = medseg_("evaluate", predictions, references, "-o", tmp_path / "scores")
    assert result.exit_code == 0
    assert f"masks without a reference: {two.removesuffix('.nii.gz')}" in result.stdout


def test_doctor_names_what_is_missing_with_the_line_that_installs_it(monkeypatch: Any) -> None:
    whole = medseg_("doctor")
    assert (whole.exit_code, whole.stderr) == (0, "")
    assert re.search(r"^torch +\d", whole.stdout, re.MULTILINE)
    assert re.search(r"^device: (cpu|cuda|mps)", whole.stdout, re.MULTILINE)
    assert "SimpleITK: installed" in whole.stdout
    assert "missing" not in whole.stdout
    read = re.findall(r"^DICOM (.+): can be read$", whole.stdout, re.MULTILINE)
    assert len(read) == 12  # RLE, two of JPEG, two of lossless JPEG, two of JPEG-LS, five of JPEG 2000
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    without = medseg_("doctor").stdout
    assert re.findall(r"^DICOM (.+): can be read$", without, re.MULTILINE) == ["RLE Lossless"]
    name = "JPEG-LS Lossless Image Compression"
    assert f"DICOM {name}: no decoder of {name} is installed; pip install imagecodecs" in without
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "SimpleITK: missing, for .mha, .mhd and .nrrd files: pip install 'medseg[itk]'" in medseg_("doctor").stdout


def test_download_prints_the_folder(monkeypatch: Any) -> None:
    monkeypatch.setattr("medseg.download.download_task", lambda task, out, show: out / f"{task}_Somewhere")
    result = medseg_("download", "Task04", "-o", "here")
    assert (result.exit_code, result.stdout) == (0, f"{Path('here') / 'Task04_Somewhere'}\n")


def test_demo_is_the_journey_on_made_up_data(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(cli, "_run", lambda dataset, out, quiet, **choices: calls.append((dataset, out, choices)))
    assert medseg_("demo", "-o", tmp_path).exit_code == 0
    ((dataset, out, choices),) = calls
    assert (dataset / "dataset.json").exists()
    assert out == tmp_path / "run"
    assert choices["train"].time_budget_s == 70


def test_a_script_of_a_task_is_a_command(tiny_overrides: tuple[str, ...], tmp_path: Path, capfd: Any) -> None:
    labels = {"Anterior": 1, "Posterior": 2}
    dataset = make_dataset(tmp_path / "data", cases=5, test_cases=0, shape=(20, 20, 16), labels=labels)
    sys.argv, before = ["task04", str(dataset), "-o", str(tmp_path / "out"), "--iterations", "1"], sys.argv
    sys.argv += set_options(tiny_overrides)
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(PIPELINES / "task04_hippocampus.py"), run_name="__main__")
    finally:
        sys.argv = before
    output = capfd.readouterr()
    assert not end.value.code, output.err
    assert re.search(r"^hippocampus +\S", output.out, re.MULTILINE)  # the recipe's region


# Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(cli, "_console", lambda *, stderr: cli._console_on(stream))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def last_frame(text: str) -> list[str]:
    """The lines that a terminal shows at the end: each frame begins by going up over the one before."""
    plain = re.sub(r"\x1b\[(?!\d*A)[\d;?]*[a-zA-Z]", "", text).rpartition("\x1b[1A")[2]
    return [line for line in plain.replace("\r", "\n").splitlines() if line.strip()]


def test_on_a_terminal_bars_show_fraction_time_loss_and_dice(terminal: Terminal) -> None:
    with cli.Show() as show:
        show("preparing for 3d_fullres", 1.0, "")
        show("training", 0.25, "step 10 loss 0.531 Dice 0.702")
    text = terminal.getvalue()
    line = next(line for line in reversed(last_frame(text)) if line.startswith("training"))
    assert re.fullmatch(r"training +\S+ +25% +\S+ step 10 loss 0\.531 Dice 0\.702 *", line)
    assert len(line) <= 80


def test_a_log_line_on_a_terminal_stands_above_the_bars(terminal: Terminal) -> None:
    with cli.Show() as show:
        show("training", 0.5, "")
        handler = cli._ConsoleHandler(cli._console_on(terminal))
        handler.handle(logging.LogRecord("medseg.train", logging.WARNING, "", 0, "look [at] this", None, None))
        show("training", 1.0, "")
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"\rwarning: look \[at\] this\ntraining", plain)
    assert any(line.startswith("training") for line in last_frame(terminal.getvalue()))


def test_colours_are_for_terminals_that_want_them(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def red(stream: io.StringIO) -> str:
        cli._console_on.cache_clear()
        cli._console_on(stream).print("careful", style="red")
        return stream.getvalue()

    assert red(Terminal()) == "\x1b[31mcareful\x1b[0m\n"
    assert red(io.StringIO()) == "careful\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert red(Terminal()) == "careful\n"


def test_elsewhere_progress_is_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = iter([0.0, 10.0, 20.0, 22.0, 40.0, 41.0, 43.0])
    monkeypatch.setattr(cli, "_console", lambda *, stderr: cli._console_on(stream))
    monkeypatch.setattr("medseg.cli.time.monotonic", lambda: next(clock))
    with cli.Show() as show:
        for fraction in (0.25, 0.5, 0.55, 1.0):
            show("training", fraction, f"step {fraction * 100:.0f}")
        show("scoring", 0.5, "a")
        show("scoring", 1.0, "b")
    assert stream.getvalue().splitlines() == [
        "training 50% step 50 (0:20 left)",  # 20 s for a half; 15 s after the beginning
        "training 100% step 100 (0:40)",
        "scoring 100% b (0:03)",
    ]


def test_brief_work_has_no_line_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = iter([0.0, 0.5, 0.9, 2.0, 3.0])
    monkeypatch.setattr(cli, "_console", lambda *, stderr: cli._console_on(stream))
    monkeypatch.setattr("medseg.cli.time.monotonic", lambda: next(clock))
    with cli.Show(brief_s=1.0) as show:
        for fraction in (0.5, 1.0, 0.5, 1.0):
            show("reading", fraction, "")
    assert stream.getvalue() == "reading 100% (0:02)\n"


def test_reading_many_headers_shows_a_bar(terminal: Terminal, study: Path) -> None:
    medseg_("dicom", "scan", study)
    assert re.search(r"^reading DICOM headers +\S+ +100% ", "\n".join(last_frame(terminal.getvalue())), re.MULTILINE)


def test_a_table_loses_nothing_in_a_window_of_80_columns() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    header = ("class", "Dice", "median Dice", "NSD at 1 mm", "HD95 mm", "cases", "missed", "false positive", "failed")
    cli._table(console, header, [("mean of classes", "0.8712", "0.8755", "0.9551", "1.23", "40", "0", "0", "[0]")])
    text = stream.getvalue()
    assert "…" not in text
    assert all(word in text for word in ("positive", "missed", "0.8712", "0.8755", "0.9551", "[0]"))
    assert len(text.splitlines()) == 4  # only the headings and the name of the class are wrapped


# Signals


def wait_for(happened: Callable[[], bool], process: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        if isinstance(process, subprocess.Popen):
            assert process.poll() is None, process.communicate()
        else:
            assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_training_that_is_interrupted_ends_with_130_and_goes_on(
    phantom_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [str(phantom_dataset), "-o", str(out), "--iterations", "300", "--device", "cpu"]
    arguments = ["run", *arguments, *set_options(tiny_overrides)]
    log = out / "training" / "fold_0" / "log.csv"
    for number in (signal.SIGINT, signal.SIGTERM):
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "medseg.cli", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(log.exists, process)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (130, "")
        assert stderr.splitlines()[-1].startswith("interrupted: ")
        assert not (out / "package").exists()
    result = medseg_(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "checking" not in result.stderr  # was done before
    assert not list(out.rglob(".medseg-tmp-*"))


@pytest.fixture
def scans(phantom_dataset: Path, tmp_path: Path) -> Path:
    """A folder of six images, a to f."""
    (tmp_path / "scans").mkdir()
    for name, source in zip("abcdef", sorted((phantom_dataset / "imagesTr").iterdir()), strict=True):
        shutil.copy(source, tmp_path / "scans" / f"{name}.nii.gz")
    return tmp_path / "scans"


SLOW = """
import sys, time
from medseg import cli, io, predict
slabs, read_volume = predict.slabs, io.read_volume
def slow(*arguments, **choices):
    for slab in slabs(*arguments, **choices):
        time.sleep(0.2)
        yield slab
def stuck(paths, channels):
    if paths[0].name == "d.nii.gz":
        time.sleep(1000)
    return read_volume(paths, channels)
predict.slabs, io.read_volume = slow, stuck
cli.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("moment", "number"), [("on the network", signal.SIGTERM), ("while a file does not come", signal.SIGINT)]
)
def test_an_interrupted_batch_ends_in_ten_seconds_with_its_tables(
    moment: str, number: signal.Signals, tiny_run: RunResult, scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["predict", str(scans), "-m", str(tiny_run.package), "-o", str(out), "--engine", "eager"]
    command = [sys.executable, "-c", SLOW, *arguments, "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    last = "a" if moment == "on the network" else "c"
    wait_for((out / f"{last}.nii.gz").exists, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=10)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1].startswith("interrupted: ")
    with (out / "cases.csv").open(newline="") as file:
        done = [row["output"] for row in csv.DictReader(file)]
    assert done == sorted(path.name for path in out.glob("*.nii.gz"))
    assert last in {name[0] for name in done}
    run = json.loads((out / "run.json").read_text())
    assert run["cases"] == {"done": len(done), "kept": 0, "failed": 0, "open": 6 - len(done)}
    result = medseg_(*arguments, "--device", "cpu")
    assert result.stdout == f"6 masks in {out} ({len(done)} kept from before), 0 failed\n"
    assert not list(out.glob(".medseg-tmp-*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no locks of this kind")
def test_two_processes_share_a_folder_as_shards(tiny_run: RunResult, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["predict", str(scans), "-m", str(tiny_run.package), "-o", str(out), "--engine", "eager"]
    command = [sys.executable, "-c", SLOW.replace('"d.nii.gz"', "None"), *arguments, "--device", "cpu", "--shard"]
    processes = [
        subprocess.Popen([*command, f"{n}/2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in (1, 2)
    ]
    wait_for(lambda: all((out / f"journal-{n}-of-2.jsonl").exists() for n in (1, 2)), processes[0])
    alone = medseg_(*arguments)
    again = medseg_(*arguments, "--shard", "2/2")
    for process in processes:
        stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stdout) == (0, f"3 masks in {out} (0 kept from before), 0 failed\n"), stderr
    for refused in (alone, again):
        assert refused.exit_code == 2
        assert "another run is writing here" in refused.stderr
    assert medseg_(*arguments, "--device", "cpu").stdout == f"6 masks in {out} (6 kept from before), 0 failed\n"


def spoilt(content: bytes, kind: int) -> bytes:
    """An image file with one of five faults."""
    array = np.asanyarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj).astype(np.float32)
    array[0, 0, 0] = np.nan
    two = np.stack([array, array], axis=-1)
    made = [nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes() for voxels in (array, two)]
    return [content[:-40], b"", b"<html>", gzip.compress(made[0]), gzip.compress(made[1])][kind % 5]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_batch_that_is_killed_a_hundred_times_is_as_if_it_never_had_been(
    tiny_run: RunResult, phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 cases, 10 of them bad. Processes are forked from one that has all modules, so that they begin at once."""
    images = [path.read_bytes() for path in sorted((phantom_dataset / "imagesTr").iterdir())]
    (tmp_path / "scans").mkdir()
    chance = random.Random(0)
    bad = {f"case_{n:03d}" for n in chance.sample(range(200), 10)}
    for n in range(200):
        content = images[n % len(images)]
        path = tmp_path / "scans" / f"case_{n:03d}.nii.gz"
        path.write_bytes(spoilt(content, n) if path.name[:8] in bad else content)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["medseg.cli", "medseg.pipeline", "medseg.predict"])

    def begin(out: Path) -> Any:
        words = ["predict", str(tmp_path / "scans"), "-m", str(tiny_run.package), "-o", str(out), "--quiet"]
        monkeypatch.setattr(sys, "argv", ["medseg", *words, "--engine", "eager", "--device", "cpu"])
        process = server.Process(target=cli.main)
        process.start()
        return process

    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    first = server.Process(target=int)  # with it the server loads the modules
    first.start()
    first.join()
    start = time.monotonic()
    whole = begin(undisturbed)
    wait_for((undisturbed / "journal.jsonl").exists, whole)
    loading = time.monotonic() - start
    whole.join()
    each = (time.monotonic() - start - loading) / 200
    assert whole.exitcode == 3
    expected = {path.name: path.read_bytes() for path in undisturbed.glob("*.nii.gz")}
    assert set(expected) == {f"case_{n:03d}.nii.gz" for n in range(200)} - {f"{name}.nii.gz" for name in bad}

    def visible() -> list[Path]:
        return [path for path in out.glob("*.nii.gz") if not path.name.startswith(".")]

    def lines(case: str = "") -> int:
        journal = out / "journal.jsonl"
        return journal.read_bytes().count(f'"output": "{case}'.encode()) if journal.exists() else 0

    seen: dict[str, tuple[int, int, int]] = {}
    for _ in range(100):
        before, more = lines(), chance.choice((0, 0, 1, 1, 2))
        process = begin(out)
        if more:  # masks are written; else it may not even have begun
            wait_for(lambda: lines() >= before + more, process)  # noqa: B023 - called in this round
        process.join(chance.uniform(0, each if more else loading))
        assert process.exitcode is None, "the batch is done before it was killed often enough"
        process.kill()
        process.join()
        for path in visible():
            assert path.read_bytes() == expected[path.name]  # whole and right, whenever it can be seen
            now = (path.stat().st_mtime_ns, path.stat().st_ino, lines(path.name))
            assert seen.setdefault(path.name, now) == now  # and never done again
    assert len(seen) > 50
    last = begin(out)
    last.join()
    assert last.exitcode == 3
    assert {path.name: path.read_bytes() for path in visible()} == expected
    for name, (modified, inode, count) in seen.items():
        status = (out / name).stat()
        assert (status.st_mtime_ns, status.st_ino, lines(name)) == (modified, inode, count)
    with (out / "cases.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert len(rows) == 200
    assert {name for name, row in rows.items() if row["status"] == "failed"} == bad
    assert all(bool(row["reason"]) == (name in bad) for name, row in rows.items())
    assert not list(out.rglob(".medseg-tmp-*"))


# Recipes and the settings of training


def test_a_recipe_is_planned_trained_interrupted_and_goes_on(
    phantom_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's settings come after the recipe's; a run that was cut short ends with the weights of a whole one."""
    words = ["--recipe", "classic", *set_options(tiny_overrides), "--iterations", "4", "--accumulate", "2"]
    words += ["--checkpointing", "--device", "cpu", "--no-report"]
    assert medseg_("run", phantom_dataset, "-o", tmp_path / "whole", *words).exit_code == 0
    setup = Plan.load(tmp_path / "whole" / "plan.json").configuration("3d_fullres")
    assert (setup.batch_size, setup.network.norm, setup.training.loss) == (2, "batch", "bce_dice")

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(train, "CHECKPOINT_PAUSE", 0.0)
    save = train.save_checkpoint

    def save_and_stop(state: Any, path: Path, key: str) -> None:
        save(state, path, key)
        if state.iteration == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", save_and_stop)
    assert medseg_("run", phantom_dataset, "-o", tmp_path / "broken", *words).exit_code == 130
    monkeypatch.setattr(train, "save_checkpoint", save)
    assert medseg_("run", phantom_dataset, "-o", tmp_path / "broken", *words).exit_code == 0
    weights = [(tmp_path / name / "training" / "fold_0" / train.WEIGHTS).read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    assert "training goes on from step 2" in (tmp_path / "broken" / "log.txt").read_text()


def test_a_recipe_is_planned_and_an_unknown_one_refused(phantom_dataset: Path, tmp_path: Path) -> None:
    assert medseg_("plan", phantom_dataset, "-o", tmp_path, "--recipe", "classic").exit_code == 0
    assert Plan.load(tmp_path / "plan.json").configuration("3d_fullres").training.schedule == "plateau"
    for command in ("plan", "run"):
        result = medseg_(command, phantom_dataset, "-o", tmp_path, "--recipe", "modern")
        assert result.exit_code == 2
        assert "recipe: there is no 'modern' (expected classic)" in result.stderr


def test_accumulation_and_checkpointing_reach_the_training(
    phantom_dataset: Path, tiny_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []

    def train_fold(job: Any, progress: Any) -> None:
        jobs.append(job)
        raise TrainingError("here", "stopped")

    monkeypatch.setattr(pipeline, "train_fold", train_fold)
    shutil.copytree(tiny_run.out, tmp_path, dirs_exist_ok=True)
    words = ["--iterations", "3", "--accumulate", "5", "--checkpointing"]
    assert medseg_("train", phantom_dataset, "-o", tmp_path, *words).exit_code == 1
    assert medseg_("train", phantom_dataset, "-o", tmp_path, "--iterations", "3").exit_code == 1
    assert [(job.settings.accumulate, job.settings.checkpointing) for job in jobs] == [(5, True), (1, False)]
    assert medseg_("train", phantom_dataset, "-o", tmp_path, "--accumulate", "0").exit_code == 2


# Pictures


def test_preview_draws_a_mask_on_its_image_and_says_where(phantom_dataset: Path, tmp_path: Path) -> None:
    image, mask = (phantom_dataset / folder / "phantom_001.nii.gz" for folder in ("imagesTr", "labelsTr"))
    words = ["--reference", mask, "--labels", phantom_dataset / "dataset.json"]
    result = medseg_("preview", image, mask, *words, "-o", tmp_path / "case.png")
    assert (result.exit_code, result.stdout.strip()) == (0, f"picture: {tmp_path / 'case.png'}")
    assert (tmp_path / "case.png").read_bytes().startswith(b"\x89PNG")
    for out, reason in ((tmp_path / "case.jpg", "is no name of a PNG file"), (tmp_path, "is no name of a PNG file")):
        result = medseg_("preview", image, mask, "-o", out)
        assert result.exit_code == 2
        assert reason in result.stderr


# Scores


def test_compare_says_which_is_better_and_keeps_the_numbers(phantom_dataset: Path, tmp_path: Path) -> None:
    labels = phantom_dataset / "labelsTr"
    half = tmp_path / "half"
    for path in sorted(labels.iterdir()):
        mask = read.read_mask(path)
        array = mask.array.copy()
        array[::2] = 0
        read.write_mask(replace(mask, array=array), half / path.name)
    for name, masks in (("exact", labels), ("halved", half)):
        words = ("evaluate", masks, phantom_dataset, "-o", tmp_path / name, "--lesions", "none", "-q")
        assert medseg_(*words).exit_code == 0
    result = medseg_("compare", tmp_path / "halved", tmp_path / "exact", "-o", tmp_path / "compared")
    assert result.exit_code == 0
    sentence = r"^no evidence of difference between halved and exact: dice \+0\.\d+ \(too few cases for an interval\), "
    assert re.search(sentence + r"Wilcoxon p 0\.031 \(Holm\), 6 cases$", result.stdout, re.M)  # 2 / 2^6
    assert re.search(r"^1 +exact +1\.0000 ", result.stdout, re.M)
    body = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert [method["name"] for method in body["methods"]] == ["exact", "halved"]
    assert (tmp_path / "compared" / "values.csv").read_text().startswith("case,class,halved,exact\n")
    as_json = json.loads(medseg_("compare", tmp_path / "halved", tmp_path / "exact", "--json").stdout)
    assert as_json == {key: value for key, value in body.items() if key != "schema_version"}
    result = medseg_("compare", tmp_path / "exact", tmp_path)
    assert result.exit_code == 2
    assert "holds no evaluation.json" in result.stderr
    assert medseg_("compare", tmp_path / "exact").exit_code == 2
    result = medseg_("compare", tmp_path / "exact", tmp_path / "halved", tmp_path / "exact")
    assert result.exit_code == 2
    assert "named twice" in result.stderr


def test_evaluate_counts_the_lesions_that_are_asked_for(phantom_dataset: Path, tmp_path: Path) -> None:
    labels = phantom_dataset / "labelsTr"
    result = medseg_("evaluate", labels, phantom_dataset, "-o", tmp_path)
    assert result.exit_code == 0
    assert "found at IoU > 0.1" in result.stdout  # one of the phantom's labels is called lesion
    result = medseg_("evaluate", labels, phantom_dataset, "-o", tmp_path, "--lesions", "organ", "--lesion-iou", "0.5")
    assert re.search(r"^lesions of .*found at IoU > 0\.5 *\norgan +1\.000 ", result.stdout, re.M)
    result = medseg_("evaluate", labels, phantom_dataset, "-o", tmp_path, "--lesions", "spleen")
    assert result.exit_code == 2
    assert "there is no class spleen (expected organ, lesion)" in result.stderr


# Reports


def test_report_shows_what_a_folder_holds(tiny_run: RunResult, tmp_path: Path) -> None:
    result = medseg_("report", tiny_run.out, "-o", tmp_path / "page.html")
    assert (result.exit_code, result.stdout) == (0, f"report: {tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert not (tiny_run.out / "report.html").exists()
    for words, reason in (
        ([tmp_path], "holds no results"),
        ([tmp_path / "missing"], "is no folder"),
        ([tiny_run.out, "-o", tmp_path], "is a folder"),
        ([tiny_run.out, "--images", tmp_path / "missing", "-o", tmp_path / "page.html"], "missing: does not exist"),
    ):
        result = medseg_("report", *words)
        assert result.exit_code == 2
        assert reason in result.stderr


def test_predict_and_evaluate_write_a_report_on_demand(
    tiny_run: RunResult, phantom_dataset: Path, tmp_path: Path
) -> None:
    images, masks, scores = phantom_dataset / "imagesTr", tmp_path / "masks", tmp_path / "scores"
    predicted = medseg_("predict", images, "-m", tiny_run.package, "-o", masks, "--report")
    assert (predicted.exit_code, predicted.stdout.splitlines()[-1]) == (0, f"report: {masks / 'report.html'}")
    assert "6 masks of 6 images" in (masks / "report.html").read_text()
    evaluated = medseg_("evaluate", masks, phantom_dataset, "-o", scores, "--report")
    assert (evaluated.exit_code, evaluated.stdout.splitlines()[-1]) == (0, f"report: {scores / 'report.html'}")
    page = (scores / "report.html").read_text()
    assert "over 6 cases and 2 classes" in page
    assert "The image is not known" not in page


def test_a_report_that_fails_leaves_masks_scores_and_exit_codes(
    phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Path:
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr("medseg.report.write_report", fail)
    result = medseg_("evaluate", phantom_dataset / "labelsTr", phantom_dataset, "-o", tmp_path, "--report")
    assert result.exit_code == 0
    assert "the report could not be written: no picture" in result.stderr
    assert (tmp_path / "scores.csv").exists()
