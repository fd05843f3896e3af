"""Every command that the documents and the help texts show exists and can be called so; the documents' are run.

Commands run in a folder of their own, on phantoms in place of the data they name and with a network of a few steps.
Python is run the same way. A script for an array of Slurm runs once for each of its jobs, with the variables that Slurm
sets. What would download or takes minutes (``medseg demo``), and containers, are read only.
"""

from __future__ import annotations

import ast
import csv
import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from dicoms import write_series
from small_datasets import nuclei, picture, save_picture
from typer.main import get_command

from medseg import cli, networks, pipeline
from medseg.evaluate import evaluate_folders
from medseg.geometry import Geometry
from medseg.io import dicom, is_picture, read_volume, series, suffix_of, write_mask
from medseg.package import load_package, write_package
from medseg.pipeline import RunResult
from medseg.train import TrainSettings
from medseg.volume import Labels, Mask

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "data/*.md", "docker/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # what it tells of may be gone
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(medseg [^`\n]+)`")
SHELLS = ("", "bash", "sh", "console", "shell")
IMAGE = re.compile(r"medseg(?::cpu|:cuda|\.sif)$")
CONTAINERS = ("docker", "apptainer")
ARRAY = re.compile(r"^#SBATCH --array=(\d+)-(\d+)$", re.MULTILINE)
MINUTES = ("demo",)
READ_ONLY = ("experiments.md",)
LIVER = Labels(values={"liver": 1, "spleen": 5})
"""The labels of the phantom, renamed to what SNOMED CT knows."""
USAGE_ERROR: Any = typer.BadParameter.__base__


def text_of(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def shown_commands(text: str) -> list[str]:
    """The calls of medseg and of its scripts in a document's shell blocks, one a line, comments left out."""
    found = []
    for language, block in FENCED.findall(text):
        if language in SHELLS:
            lines = block.replace("\\\n", " ").splitlines()
            parts = [part.strip().removeprefix("$ ") for line in lines for part in line.split("&&")]
            found += [part for part in parts if re.match(r"medseg |python pipelines/|(docker|apptainer) run ", part)]
    return found


def parse(line: str) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """The function that a command line calls, and its arguments; None where it only asks for help or the version.

    Raises:
        UsageError: no such command or option, a missing argument, or a value that is none.
        FileNotFoundError: no such script.
    """
    words = shlex.split(line, comments=True)
    if words[0] in CONTAINERS:  # what stands behind the image's name
        words = ["medseg", *words[next(n for n, word in enumerate(words) if IMAGE.search(word)) + 1 :]]
    if words[0] == "python":
        script = runpy.run_path(str(ROOT / words[1]))
        name, command = words[1], get_command(script.get("app") or cli.recipe_app(script["RECIPE"]))
        arguments = words[2:]
    else:
        if words[1] in ("--help", "-h", "--version"):
            return None
        name, command, arguments = "medseg", get_command(cli.app), words[1:]
        while isinstance(command, typer.core.TyperGroup) and not {"--help", "-h"} & set(arguments[:1]):
            with command.make_context(name, list(arguments)) as context:
                name, command, arguments = command.resolve_command(context, arguments)  # type: ignore[assignment]
    if {"--help", "-h"} & set(arguments):
        return None
    with command.make_context(name, list(arguments)) as context:
        assert command.callback is not None
        return command.callback, dict(context.params)


# Reading


ALL_SHOWN = [(path, line) for path in DOCUMENTS for line in shown_commands(text_of(path))]


def test_the_readme_shows_commands() -> None:
    assert Path("README.md") in {path for path, _ in ALL_SHOWN}


@pytest.mark.parametrize(("path", "line"), ALL_SHOWN, ids=str)
def test_a_shown_command_can_be_called_so(path: Path, line: str) -> None:
    parse(line)


def mentions() -> Iterator[str]:
    """Commands within sentences and tables, and those in help texts."""
    for path in DOCUMENTS:
        yield from INLINE.findall(FENCED.sub("", text_of(path)))
    for command in commands_of(get_command(cli.app)):
        yield from re.findall(r"^  (medseg .*)$", re.sub(r"\\\n\s*", "", command.epilog), re.MULTILINE)


def commands_of(command: Any) -> Iterator[Any]:
    """A command, and those below it."""
    yield command
    for below in getattr(command, "commands", {}).values():
        yield from commands_of(below)


@pytest.mark.parametrize("line", sorted(set(mentions())))
def test_a_mentioned_command_exists_and_one_with_arguments_can_be_called_so(line: str) -> None:
    command: Any = get_command(cli.app)
    words = shlex.split(line, comments=True)[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if words or command.name == "medseg":
        parse(line)


@pytest.mark.parametrize(
    "line",
    [
        "medseg frobnicate data",
        "medseg run data --colour",
        "medseg run",
        "medseg run data --epochs many",
        "medseg --colour",
        "python pipelines/task04_hippocampus.py data --mirror",
        "python pipelines/task99_elbow.py data",
        "docker run --rm -v a:b medseg:cpu predict /input --model",
        "apptainer run --bind a:b medseg.sif segment /input",
    ],
)
def test_a_command_that_does_not_exist_would_be_found(line: str) -> None:
    assert shown_commands(f"```bash\n{line}\n```\n") == [line]
    with pytest.raises((FileNotFoundError, USAGE_ERROR)):
        parse(line)


def test_blocks_are_taken_apart_into_commands() -> None:
    text = "```console\n$ pip install . && medseg demo\n$ medseg run data \\\n    --epochs 3\n```\n"
    text += "```text\nmedseg tree\n```\n"
    assert [line.split() for line in shown_commands(text)] == [
        ["medseg", "demo"],
        ["medseg", "run", "data", "--epochs", "3"],
    ]


# Running


class Sandbox:
    """An empty working folder in which whatever a document names is provided when it is first used."""

    def __init__(self, dataset: Path, made: RunResult) -> None:
        self.dataset, self.made = dataset, made

    def provide(self, kind: str, path: Path) -> None:
        """Put something of that kind at a relative path, if nothing is there."""
        if path.exists() or path.is_absolute():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        makers: dict[str, Callable[[Path], object]] = {
            "package": self._write_package,
            "study": self._write_study,
            "mask": self._write_mask,
            "masks": lambda folder: shutil.copytree(self.dataset / "labelsTr", folder),
            "nuclei": lambda folder: nuclei(folder.parent),
            "planned": self._write_plan,
            "model folder": write_model_folder,
            "scores": self._write_scores,
            "run": lambda folder: shutil.copytree(self.made.out, folder),
            "mask of a scan": lambda file: self._write_mask(file, read_volume(Path("scan.nii.gz")).geometry),
        }
        if kind in makers:
            makers[kind](path)
        elif is_picture(path):
            save_picture(path, picture(0)[0])
        elif suffix_of(path):
            shutil.copy(self.dataset / "imagesTs" / "phantom_007.nii.gz", path)
        elif path.suffix == ".csv":
            self.provide("images", path.with_name("listed.nii.gz"))
            path.write_text("case,image\nfirst,listed.nii.gz\n", encoding="utf-8")
        elif kind == "images":
            shutil.copytree(self.dataset / "imagesTs", path)
        else:
            shutil.copytree(self.dataset, path.parent if path.name == "dataset.json" else path, dirs_exist_ok=True)

    def _write_package(self, folder: Path) -> None:
        """A model; in a folder called liver, one of labels that SNOMED CT knows."""
        if folder.parent.name != "liver":
            shutil.copytree(self.made.package, folder)
            return
        made = load_package(self.made.package)
        write_package(replace(made, plan=made.plan.model_copy(update={"labels": LIVER})), folder)

    def _write_study(self, folder: Path) -> None:
        """Two series of DICOM with a phantom each."""
        for name, phase in (("phantom_007", "arterial"), ("phantom_008", "portal venous")):
            image = read_volume(self.dataset / "imagesTs" / f"{name}.nii.gz").array[0].astype(np.int16)
            described = {"SeriesDescription": phase}
            write_series(folder / name, image, study_uid="1.2.3", change=lambda data, k, d=described: data.update(d))

    def _write_scores(self, folder: Path) -> None:
        """An evaluation of the labels against themselves."""
        evaluate_folders(self.dataset / "labelsTr", self.dataset).save(folder / "evaluation.json")

    def _write_mask(self, path: Path, geometry: Geometry | None = None) -> None:
        """A mask on the grid of the series that the documents mean, or on another one."""
        geometry = geometry or dicom.check(series("study", "*portal*"))
        path.parent.mkdir(exist_ok=True)
        array = np.zeros(geometry.shape, np.uint8)
        array[4:9, 4:9, 2:5], array[12:14, 4:9, 2:5] = LIVER.values.values()
        write_mask(Mask(array, geometry), path)

    def _write_plan(self, folder: Path) -> None:
        folder.mkdir()
        shutil.copy(self.made.out / "plan.json", folder)

    def provide_arguments(self, name: str, arguments: dict[str, Any]) -> None:
        """Put there what a command reads."""
        kinds = {"dataset": "dataset", "model": "package", "predictions": "masks", "references": "masks"}
        kinds |= {"package": "package", "labels": "package", "previous": "model folder"}
        kinds |= {"place": "study" if str(arguments.get("place")) == "study" else "dataset"}
        kinds |= {"reference": "study", "mask": "mask"}
        kinds["folder"] = "model folder" if name == "import_nnunet" else "nuclei"
        for image in arguments.get("images") or ():
            kind = "dataset" if image.endswith(".json") else "study" if image == "study" else "images"
            self.provide(kind, Path(image.replace("*", "patient")))
        if "Task" in str(arguments.get("references", "")):
            kinds["references"] = "dataset"
        if name == "train":
            kinds["out"] = "planned"
        if name == "report":
            kinds["place"] = "run"
        if name == "preview":
            kinds |= {"image": "images", "mask": "mask of a scan"}
        for place in arguments.get("places", ()):
            self.provide("scores", place)
        for argument, kind in sorted(kinds.items()):
            if arguments.get(argument) is not None:
                self.provide(kind, Path(arguments[argument]))

    def provide_names(self, code: str) -> None:
        """Put there what the texts in a piece of Python name."""
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                path = Path(node.value)
                if path.name in ("package", "PACKAGE") or path.suffix == ".zip":
                    self.provide("package", path)
                elif suffix_of(path):
                    self.provide("images", path)
                elif path.name.startswith("Task"):
                    self.provide("dataset", path)


def write_model_folder(path: Path) -> None:
    """A model folder of nnU-Net, of the configuration that its name ends in, with random weights."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "nnunet_folder.py"))
    plan = made["plan_of"](6, (4, 8), (16, 16, 8), (1.0, 1.0, 1.0))  # labels 1 to 5: the phantoms' are among them
    full = plan.configuration("3d_fullres")
    low = full.model_copy(update={"spacing_mm": (2.0, 2.0, 2.0)})
    configurations = {
        "3d_fullres": full,
        "3d_lowres": low,
        "3d_cascade_fullres": full.model_copy(update={"previous": "3d_lowres"}),
    }
    plan = plan.model_copy(update={"configurations": configurations})
    name = path.name.rsplit("__", 1)[1]
    made["write_model_folder"](path, plan, name, {0: made["random_weights"](plan, name)})


@pytest.fixture
def sandbox(
    phantom_dataset: Path,
    tiny_run: RunResult,
    tiny_overrides: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Sandbox:
    box = Sandbox(phantom_dataset, tiny_run)
    run, plan_station = pipeline.run, pipeline.plan_station
    quick = TrainSettings(iterations=2, device="cpu")

    # the phantom has other labels than a task's regions, and one configuration
    def quick_run(dataset: Path | str, out: Path | str, **choices: Any) -> RunResult:
        if choices.get("configuration") == "2d":  # of a script for pictures
            small = (*choices["overrides"], "plan.patch_size=[32,32]", "plan.batch_size=2")
            return run(dataset, out, **{**choices, "train": quick, "overrides": small, "report": False})
        overrides = (*choices.pop("overrides", ()), *tiny_overrides)
        changed = {"train": quick, "overrides": overrides, "configuration": "3d_fullres", "regions": None}
        changed["report"] = False  # tests/report looks at these
        return run(dataset, out, **{**choices, **changed})

    def quick_fit(dataset: Path, out: Path, **choices: Any) -> RunResult:
        with monkeypatch.context() as patch:
            patch.setattr("medseg.pipeline.plan_station", plan_station)  # its arrays are small, and some are flat
            return run(dataset, out, **{**choices, "train": quick})

    def quick_plan(*arguments: Any) -> Any:
        *rest, configuration, overrides, show = arguments
        tiny = () if configuration == "2d" else tiny_overrides  # quick_run has made it small
        return plan_station(*rest, configuration, [*overrides, *tiny], show)

    def copy(task: str, folder: Path, *_: Any) -> Path:
        box.provide("dataset", folder / next(n for n in ("Task04_Hippocampus", task) if n.startswith(task)))
        return folder

    (tmp_path / "deep" / "below").mkdir(parents=True)  # so that ../ stays within
    monkeypatch.chdir(tmp_path / "deep" / "below")
    monkeypatch.setattr("medseg.segmenter.run", quick_fit)  # first: it takes medseg.pipeline.run when it is imported
    monkeypatch.setattr("medseg.pipeline.run", quick_run)
    monkeypatch.setattr("medseg.pipeline.plan_station", quick_plan)
    monkeypatch.setattr("medseg.cli.train_settings", lambda **_: quick)
    monkeypatch.setattr("medseg.download.download_task", copy)
    monkeypatch.setattr("medseg.networks.ARCHITECTURES", dict(networks.ARCHITECTURES))  # one document adds to it
    return box


def jobs_of(block: str) -> list[dict[str, str]]:
    """The variables that Slurm sets for each job of the array that a script asks for; else one job without any."""
    if not (array := ARRAY.search(block)):
        return [{}]
    first, last = int(array[1]), int(array[2])
    same = {"MIN": first, "MAX": last, "STEP": 1, "COUNT": last - first + 1}
    numbers = [{"ID": job, **same} for job in range(first, last + 1)]
    return [{f"SLURM_ARRAY_TASK_{name}": str(n) for name, n in job.items()} for job in numbers]


def pieces(text: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Commands, with the variables of their environment, and pieces of Python of a document, in order."""
    for match in FENCED.finditer(text):
        if match[1] == "python":
            yield "python", match[2], {}
        else:
            yield from (("shell", line, job) for job in jobs_of(match[2]) for line in shown_commands(match[0]))


def exit_code(function: Callable[..., Any], arguments: dict[str, Any]) -> int:
    try:
        function(**arguments)
    except typer.Exit as end:
        return end.exit_code
    return 0


RUN = [path for path in DOCUMENTS if path.name not in READ_ONLY and list(pieces(text_of(path)))]


def run_from_top_to_bottom(path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "shown"}
    for kind, piece, variables in pieces(text_of(path)):
        if kind == "python":
            sandbox.provide_names(piece)
            exec(compile(piece, f"{path.name}: {piece.splitlines()[0]}", "exec"), names)
        elif not piece.startswith(CONTAINERS) and (parsed := parse(piece)):
            function, arguments = parsed
            if function.__name__ in MINUTES:
                continue
            sandbox.provide_arguments(function.__name__, arguments)
            with monkeypatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                assert exit_code(function, arguments) == 0, piece


@pytest.mark.parametrize("path", RUN, ids=str)
def test_what_a_document_shows_runs_from_top_to_bottom(
    path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_from_top_to_bottom(path, sandbox, monkeypatch)


def test_the_jobs_of_an_array_share_the_cases(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    run_from_top_to_bottom(Path("docs/how-to/on-a-cluster.md"), sandbox, monkeypatch)

    def states(table: Path) -> dict[str, str]:
        with table.open(encoding="utf-8", newline="") as file:
            return {row["case"]: row["status"] for row in csv.DictReader(file)}

    shards = [states(table) for table in sorted(Path("masks").glob("cases-*-of-4.csv"))]
    assert len(shards) == 4
    assert [state for shard in shards for state in shard.values()] == ["done", "done"]
    assert states(Path("masks/cases.csv")) == {case: "kept" for shard in shards for case in shard}


def test_python_that_does_not_run_would_be_found(sandbox: Sandbox) -> None:
    good = 'import medseg\nmodel = medseg.load("some/package")\nassert model("scan.nii.gz").volumes_ml()\n'
    for code in (good, good.replace("volumes_ml", "litres")):
        sandbox.provide_names(code)
    exec(good, {})
    with pytest.raises(AttributeError, match="litres"):
        exec(good.replace("volumes_ml", "litres"), {})
