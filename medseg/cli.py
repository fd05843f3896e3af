"""The command line: parse, one call, print. The only place that prints.

Results go to standard output, everything else to standard error. Exit codes: 0 all well, 1 unexpected error, 2 wrong
usage or nothing usable found, 3 finished but some cases failed or are unusable, 130 interrupted.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import posixpath
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg import NOTICE
from medseg.errors import InputError, MedsegError, TrainingError

if TYPE_CHECKING:  # the rest is imported by the command that needs it: `medseg --help` stays fast
    from medseg.cases import MaskFormat, Shard
    from medseg.compare import Comparison
    from medseg.dataset import Case
    from medseg.evaluate import EvaluateSettings, Evaluation
    from medseg.io.dicom import Scan, Series
    from medseg.pipeline import RunResult
    from medseg.plan import Plan
    from medseg.recipe import Recipe
    from medseg.train import TrainSettings
    from medseg.volume import Labels

_REMEDY_FOR_ALL = "run again with -v for the traceback, and report it with the log"


def _examples(*lines: str) -> str:
    """The end of a help text: command lines that stay as they are."""
    # a backspace at the start of a paragraph keeps Click from wrapping it
    return "\b\n" + "\n".join(("Examples:", *(f"  {line}" for line in lines)))


app = typer.Typer(
    name="medseg",
    help=f"Medical image segmentation with U-Nets in 2D and 3D: from data to a scored model.\n\n{NOTICE}",
    epilog=_examples(
        "medseg demo                                              # made-up data, two minutes",
        "medseg run Task04_Hippocampus --time-budget 10m          # train and score",
        "medseg predict scans -m medseg-Task04_Hippocampus/package -o masks",
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: no boxes around wrapped words
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
dicom_app = typer.Typer(
    help="Say what a folder of DICOM files holds.",
    epilog=_examples("medseg dicom scan study"),
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(dicom_app, name="dicom")


@functools.lru_cache(maxsize=4)
def _console_on(stream: TextIO) -> Console:
    """One console a stream, so that log lines and progress bars know of each other; no wrapping but on a terminal."""
    width = None if stream.isatty() else 10_000
    return Console(file=stream, width=width, highlight=False, soft_wrap=True, emoji=False)


def _console(*, stderr: bool) -> Console:
    return _console_on(sys.stderr if stderr else sys.stdout)


# Options that several commands share

DatasetArgument = Annotated[Path, typer.Argument(metavar="DATASET", help="Folder with a dataset.json.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FOLDER", help="Output folder.", show_default="medseg-DATASET"),
]
Configuration = Annotated[
    Literal["2d", "3d_fullres", "3d_lowres"] | None,
    typer.Option("--configuration", "-c", help="Of the plan.", show_default="3d_fullres; 2d for pictures"),
]
Folds = Annotated[str, typer.Option(metavar="N,N|all", help="Folds to train.")]
TimeBudget = Annotated[str, typer.Option(metavar="TIME", help="Length of training a fold, as 90s, 10m or 1h30m.")]
Epochs = Annotated[int | None, typer.Option(metavar="N", help="Length of training in passes over the cases.", min=1)]
Iterations = Annotated[int | None, typer.Option(metavar="N", help="Length of training in steps.", min=1)]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[Literal["auto", "32", "bf16", "16"], typer.Option(help="Of the arithmetic.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of weights, batches and augmentation.", min=0)]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Only deterministic kernels, also on a GPU.")]
Patience = Annotated[
    int, typer.Option(metavar="N", help="Stop after so many validations without gain; 0 never.", min=0)
]
Accumulate = Annotated[int, typer.Option(metavar="N", help="Batches of one training step.", min=1)]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Train in less memory, and longer: compute activations again.")
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME", help="Plan settings that go together, as classic.")
]
MemoryBudget = Annotated[str, typer.Option(metavar="SIZE", help="What a training step may take, as 6GB or 900MB.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="plan.FIELD=VALUE", help="Change a plan field; may be repeated.")
]
SkipBadCases = Annotated[bool, typer.Option("--skip-bad-cases", help="Go on without unusable cases.")]
Tolerance = Annotated[
    float | None,
    typer.Option(
        metavar="MM",
        help="Surface distance, mm, that NSD lets pass.",
        min=0.0,
        show_default="the Decathlon's for its tasks, else 1",
    ),
]
Lesions = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS,...|none", help="Count the single lesions of these.", show_default="tumours and other lesions"
    ),
]
LesionIou = Annotated[
    float, typer.Option(metavar="IOU", help="Overlap above which a lesion counts as found.", min=0.0, max=0.99)
]
LabelsFrom = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="PLACE",
        help="Names of the labels: a model package, a dataset.json, or a table (Slicer .csv, ITK-SNAP, dseg.tsv).",
        show_default="the mask's own",
    ),
]
SeriesOfChannels = Annotated[
    list[str],
    typer.Option(
        "--series",
        metavar="UID|PATTERN",
        help="Which DICOM series of a study, as `medseg dicom scan` lists them; once a channel.",
        show_default="the only one",
    ),
]
ResampleIrregular = Annotated[
    bool, typer.Option("--resample-irregular", help="Take DICOM series with tilted or uneven slices too.")
]
SegType = Annotated[Literal["binary", "labelmap"], typer.Option(help="Of DICOM SEG; few viewers know labelmap yet.")]
AllowUncoded = Annotated[
    bool, typer.Option("--allow-uncoded", help="Write labels without SNOMED CT code into DICOM SEG.")
]
Mirror = Annotated[
    bool, typer.Option("--mirror", help="Average over mirrored images: two to eight times the time, a little better.")
]
WithReport = Annotated[
    bool, typer.Option("--report", help="Show it all in report.html too, with pictures of the cases.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and results.")]


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """A function as a command: logging is set up, and errors become a message and an exit code."""

    @functools.wraps(function)
    def guarded(**arguments: Any) -> None:
        verbose, quiet = arguments.get("verbose", False), arguments.get("quiet", False)
        errors = _console(stderr=True)
        logger = logging.getLogger("medseg")
        handler = _ConsoleHandler(errors)
        handler.setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if verbose else logging.WARNING)
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            function(**arguments)
        except typer.Exit:
            raise
        except MedsegError as failure:
            _fail(errors, f"error: {failure}", 1 if isinstance(failure, TrainingError) else 2, verbose)
        except KeyboardInterrupt:
            _fail(errors, "interrupted: what is finished is kept; the same command goes on from there", 130, False)
        except BrokenPipeError:
            raise  # whoever read the output has enough: Click ends quietly
        except OSError as failure:
            _fail(errors, f"error: {_told(failure)}", 1, verbose)
        except Exception as failure:  # noqa: BLE001 - the door: every bug becomes a message and exit code 1
            _fail(errors, f"unexpected {type(failure).__name__}: {failure}\n{_REMEDY_FOR_ALL}", 1, verbose)
        finally:
            logger.removeHandler(handler)

    return guarded


def _fail(console: Console, message: str, code: int, verbose: bool) -> NoReturn:
    if verbose:
        console.print(escape(traceback.format_exc()), style="dim")
    console.print(escape(message), style="red")
    raise typer.Exit(code)


def _told(failure: OSError) -> str:
    """What the system refused: which file, why, and what to do about it."""
    if failure.errno is None:
        return str(failure)
    remedy = ""
    if failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "make room; what is finished is kept, and the same command goes on from there"
    elif failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "give another place with -o, or see to the rights of this one"
    found = failure.strerror or "cannot be used"
    return str(MedsegError(failure.filename or "the disk", found[0].lower() + found[1:], remedy=remedy))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _ConsoleHandler(logging.Handler):
    """Log records on the console, above a running progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def filter(self, record: logging.LogRecord) -> bool:
        """All but the error that ends a run, logged under the name of the package itself: ``_fail`` shows it."""
        return record.name != "medseg"

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(escape(f"{record.levelname.lower()}: {record.getMessage()}"), style="yellow")


class Show:
    """Progress: bars with an estimate on a terminal, a plain line now and then (of brief work none) elsewhere."""

    def __init__(self, quiet: bool = False, every_s: float = 15.0, brief_s: float = 0.0) -> None:
        self.console = _console(stderr=True)
        self.quiet = quiet
        self.every_s = every_s
        self.brief_s = brief_s
        self.work = ""
        self.fraction = 0.0
        self.start = self.shown = self.last = time.monotonic()
        self.bars: Any = None
        self.bar: Any = None

    def __enter__(self) -> Show:
        if self.console.is_terminal and not self.quiet:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            bar = BarColumn(None, table_column=Column(max_width=20))  # the column that gives way in a narrow window
            left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
            percent, note = "{task.percentage:>3.0f}%", TextColumn("{task.fields[note]}")
            self.bars = Progress("{task.description}", bar, percent, left, note, console=self.console)
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, work: str, fraction: float, note: str) -> None:
        """Show how far a piece of work is; see ``medseg.progress``."""
        if self.quiet:
            return
        now = time.monotonic()
        new = work != self.work or fraction < self.fraction or self.fraction >= 1
        if new:  # it began where the one before ended
            self.start = self.shown = self.last
        self.work, self.fraction, self.last = work, fraction, now
        if self.bars is None:
            self._line(note, now)
            return
        if new:
            self.bar = self.bars.add_task(work, total=1.0, note="")
            self.bars.tasks[self.bar].start_time = self.start
        self.bars.update(self.bar, completed=fraction, note=escape(note))

    def _line(self, note: str, now: float) -> None:
        took = now - self.start
        if took < self.brief_s or (self.fraction < 1 and now - self.shown < self.every_s):
            return
        self.shown = now
        rest = f"{_duration(took * (1 / self.fraction - 1))} left" if 0 < self.fraction < 1 else _duration(took)
        self.console.print(escape(" ".join(f"{self.work} {self.fraction:.0%} {note} ({rest})".split())))


# Commands


@app.command(
    epilog=_examples(
        "medseg run Task04_Hippocampus --time-budget 10m                # fold 0, ten minutes",
        "medseg run Task04_Hippocampus --folds all --memory-budget 6GB",
        "medseg run Task09_Spleen -c 3d_lowres --set plan.batch_size=4 -o spleen",
        "medseg run Task09_Spleen --recipe classic --set plan.loss=cldice -o classic",
    )
)
@as_command
def run(
    dataset: DatasetArgument,
    out: Out = None,
    configuration: Configuration = None,
    folds: Folds = "0",
    time_budget: TimeBudget = "",
    epochs: Epochs = None,
    iterations: Iterations = None,
    patience: Patience = 0,
    accumulate: Accumulate = 1,
    checkpointing: Checkpointing = False,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Seed = 0,
    deterministic: Deterministic = False,
    memory_budget: MemoryBudget = "8GB",
    recipe: RecipeName = None,
    overrides: Overrides = [],  # noqa: B006 - Typer needs a list, and copies it
    tolerance_mm: Tolerance = None,
    lesions: Lesions = None,
    lesion_iou: LesionIou = 0.1,
    mirror: Mirror = False,
    skip_bad_cases: SkipBadCases = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="End with report.html.")] = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """From a dataset to a trained model, masks and scores.

    Checks the data, plans, prepares, trains, packages, predicts the cases that each fold did not train on, and scores
    them. It ends with report.html, which shows it all, and pictures of the cases. Run it again to go on after an
    interruption: what is done and still valid is skipped.
    """
    from medseg.recipe import settings_of

    training = train_settings(
        time_budget=time_budget,
        epochs=epochs,
        iterations=iterations,
        patience=patience,
        accumulate=accumulate,
        checkpointing=checkpointing,
        device=device,
        precision=precision,
        seed=seed,
        deterministic=deterministic,
    )
    _run(
        dataset,
        out,
        quiet,
        configuration=configuration,
        folds=_folds(folds),
        train=training,
        memory_budget_mb=_megabytes(memory_budget),
        evaluate=_evaluate_settings(tolerance_mm, lesions, lesion_iou),
        overrides=[*settings_of(recipe), *overrides],
        mirror=mirror,
        skip_bad_cases=skip_bad_cases,
        report=report,
    )


def run_recipe(recipe: Recipe) -> None:
    """Run a recipe on the dataset that the command line names: the door of the scripts in ``pipelines/``."""
    recipe_app(recipe)()


def recipe_app(recipe: Recipe) -> typer.Typer:
    """The command line of a recipe: that of ``medseg run`` without what the recipe decides."""

    def command(
        dataset: DatasetArgument,
        out: Out = None,
        folds: Folds = "0",
        time_budget: TimeBudget = "",
        epochs: Epochs = None,
        iterations: Iterations = None,
        device: Device = "auto",
        seed: Seed = 0,
        memory_budget: MemoryBudget = "8GB",
        overrides: Overrides = [],  # noqa: B006 - Typer needs a list, and copies it
        skip_bad_cases: SkipBadCases = False,
        verbose: Verbose = False,
        quiet: Quiet = False,
    ) -> None:
        _run(
            dataset,
            out,
            quiet,
            configuration=recipe.configuration,
            folds=_folds(folds),
            train=train_settings(
                time_budget=time_budget, epochs=epochs, iterations=iterations, device=device, seed=seed
            ),
            memory_budget_mb=_megabytes(memory_budget),
            evaluate=_evaluate_settings(recipe.tolerance_mm),
            regions=recipe.regions,
            overrides=[*recipe.overrides, *overrides],
            skip_bad_cases=skip_bad_cases,
        )

    return script_app(f"Train and score {recipe.task}: `medseg run` with what suits it.", command)


def script_app(help_text: str, function: Callable[..., None]) -> typer.Typer:
    """The command line of a script in ``pipelines/``: one command, with the parameters of the function."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    script.command(help=help_text)(as_command(function))
    return script


def end_script(evaluation: Evaluation) -> None:
    """The last lines of a script, and its exit code: the notice, and every case that failed or was not scored."""
    typer.echo(NOTICE)
    for case, reason in {**evaluation.failed, **evaluation.unscored}.items():
        typer.echo(f"failed: {case}: {reason}")
    _end_with(evaluation)


@dicom_app.command(
    "scan",
    epilog=_examples(
        "medseg dicom scan study",
        "medseg dicom scan study.zip --json",
        "medseg predict study -m liver/package -o masks --series '*portal*'   # one of those listed",
    ),
)
@as_command
def scan_dicom(
    place: Annotated[Path, typer.Argument(metavar="PLACE", help="Folder, zip or file; folders below it too.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """List the DICOM series of a folder or zip, and why some are no use.

    Reads headers alone. Masks are named after the first column, a digest of the series UID, as descriptions may tell of
    the patient: they are shown here and nowhere else. What is no volume (scouts, screenshots, reports) is counted.
    Below each row stand why it is no use, its UID and its folder. A narrow window shows fewer columns.

    Exit code 3 when some series cannot be used, 2 when none can.
    """
    from medseg.io import dicom

    with Show(quiet, brief_s=1.0) as show:
        found = dicom.scan(place, show)
    if as_json:
        print(json.dumps(_scan_body(found), indent=2))
    else:
        _print_scan(found)
    if not found.series:
        raise InputError(place, _no_series(found), "a DICOM series", "give the folder or zip that it lies in")
    usable = sum(not series.reason for series in found.series)
    if usable < len(found.series) or not usable:
        raise typer.Exit(3 if usable else 2)


@app.command(
    epilog=_examples(
        "medseg check Task04_Hippocampus",
        "medseg check Task04_Hippocampus --json",
        "medseg check study                     # DICOM, or a folder of images",
    )
)
@as_command
def check(
    place: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Folder with a dataset.json; or images, a DICOM folder or zip.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Name every fault of a dataset at once, with a remedy.

    Reads every file. Exit code 3 when cases are unusable; `medseg run --skip-bad-cases` goes on without them. Of images
    without a dataset.json, and of every DICOM series, it says which cannot be read as a volume. Which of several usable
    series of a study is meant is for --series of `medseg predict` to say.
    """
    from medseg.check import check as check_dataset
    from medseg.check import check_images
    from medseg.dataset import Dataset

    is_dataset = place.suffix == ".json" or (place / "dataset.json").is_file()
    with Show(quiet) as show:
        findings = check_dataset(Dataset.open(place), show) if is_dataset else check_images(_images_at(place), show)
    output = _console(stderr=False)
    if as_json:
        print(findings.model_dump_json(indent=2))
    else:
        if findings.findings:
            rows = [
                (f.case or "dataset", f.kind, "unusable" if f.unusable else "warning", f.found, f.remedy)
                for f in findings.findings
            ]
            _table(output, ("case", "fault", "", "found", "remedy"), rows)
        bad = len(findings.unusable_cases)
        output.print(
            f"{_count(findings.cases_checked, 'case')} checked: {bad} unusable, "
            f"{_count(len(findings.findings), 'finding')} in all"
        )
    if any(f.unusable for f in findings.findings):
        raise typer.Exit(3)


@app.command(
    epilog=_examples(
        "medseg plan Task04_Hippocampus -o hippocampus",
        "medseg plan Task04_Hippocampus -o hippocampus --set plan.batch_size=4",
        "medseg plan Task04_Hippocampus -o for-a-gpu --device cuda --memory-budget 24GB",
    )
)
@as_command
def plan(
    dataset: DatasetArgument,
    out: Out = None,
    configuration: Configuration = None,
    device: Annotated[str, typer.Option(help="What to plan for: auto, cpu or cuda, also on another machine.")] = "auto",
    memory_budget: MemoryBudget = "8GB",
    recipe: RecipeName = None,
    overrides: Overrides = [],  # noqa: B006 - Typer needs a list, and copies it
    skip_bad_cases: SkipBadCases = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure a dataset and decide how to train on it.

    Writes fingerprint.json and plan.json and prints every decision with its reason. The plan may be edited by hand
    before `medseg train`.
    """
    from medseg.dataset import Dataset
    from medseg.folder import writing_to
    from medseg.pipeline import check_station, plan_station
    from medseg.recipe import settings_of

    target = out or _default_out(dataset)
    budget = _megabytes(memory_budget)
    opened = Dataset.open(dataset)
    with writing_to(target), Show(quiet) as show:
        data, _ = check_station(opened, target, skip_bad_cases, show)
        made = plan_station(data, target, device, budget, configuration, [*settings_of(recipe), *overrides], show)
    _print_plan(made, target)


@app.command(
    epilog=_examples(
        "medseg train Task04_Hippocampus -o hippocampus --time-budget 10m",
        "medseg train Task04_Hippocampus -o hippocampus --folds 0,1,2 --epochs 50",
    )
)
@as_command
def train(
    dataset: DatasetArgument,
    out: Out = None,
    configuration: Configuration = None,
    folds: Folds = "0",
    time_budget: TimeBudget = "",
    epochs: Epochs = None,
    iterations: Iterations = None,
    patience: Patience = 0,
    accumulate: Accumulate = 1,
    checkpointing: Checkpointing = False,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Seed = 0,
    deterministic: Deterministic = False,
    skip_bad_cases: SkipBadCases = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train by a plan, and pack the model.

    Takes the plan.json that `medseg plan` wrote to the output folder, and writes the package there. The same command
    goes on after an interruption.
    """
    from medseg.dataset import Dataset
    from medseg.folder import writing_to
    from medseg.pipeline import check_station, chosen_folds, train_station
    from medseg.plan import Plan

    target = out or _default_out(dataset)
    settings = train_settings(
        time_budget=time_budget,
        epochs=epochs,
        iterations=iterations,
        patience=patience,
        accumulate=accumulate,
        checkpointing=checkpointing,
        device=device,
        precision=precision,
        seed=seed,
        deterministic=deterministic,
    )
    if not (target / "plan.json").exists():
        raise InputError(target, "holds no plan.json", "the output folder of `medseg plan`", "run that first")
    made, opened = Plan.load(target / "plan.json"), Dataset.open(dataset)
    with writing_to(target), Show(quiet) as show:
        data, _ = check_station(opened, target, skip_bad_cases, show)
        chosen = chosen_folds(data, _folds(folds), target)
        train_station(data, made, configuration, chosen, target, settings, show)
    _console(stderr=False).print(f"model package: {target / 'package'}")


@app.command(
    epilog=_examples(
        "medseg predict scan.nii.gz -m hippocampus/package -o masks",
        "medseg predict scans -m hippocampus/package -o masks --mirror",
        "medseg predict 'patients/*/ct.nii.gz' -m liver/package -o masks --memory-limit 6GB",
        "medseg predict study -m liver/package -o masks --series '*portal*' --format dicom-seg,nii.gz   # DICOM",
        "medseg predict list.csv -m liver/package -o masks --probabilities liver,tumour",
        "medseg predict Task04_Hippocampus/dataset.json -m hippocampus/package -o masks --shard 2/8",
    )
)
@as_command
def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT", help="Image, folder of images or of DICOM, zip, 'pattern', dataset.json or CSV file."
        ),
    ],
    model: Annotated[Path, typer.Option("--model", "-m", metavar="PACKAGE", help="Model package, folder or zip.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the masks.")],
    series: SeriesOfChannels = [],  # noqa: B006 - Typer needs a list, and copies it
    resample_irregular: ResampleIrregular = False,
    resample_channels: Annotated[
        bool, typer.Option("--resample-channels", help="Bring the channels of an image to the grid of the first.")
    ] = False,
    formats: Annotated[
        str, typer.Option("--format", metavar="FORMAT,...", help="nii.gz, dicom-seg, seg.nrrd, nrrd or mha.")
    ] = "nii.gz",
    seg_type: SegType = "binary",
    allow_uncoded: AllowUncoded = False,
    mirror: Mirror = False,
    overlap: Annotated[
        float,
        typer.Option(
            metavar="FRACTION", help="Part of a tile that its neighbour covers too: more is slower.", min=0.0, max=0.9
        ),
    ] = 0.5,
    engine: Annotated[
        Literal["auto", "eager", "compiled", "onnx", "openvino", "openvino-int8"],
        typer.Option(help="Program that computes the network; auto is the fastest that keeps the masks."),
    ] = "auto",
    precision: Annotated[
        Literal["32", "bf16", "16"],
        typer.Option(help="Bits that the network computes with: fewer may be faster; masks differ a little."),
    ] = "32",
    device: Device = "auto",
    memory_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="What the process may take, as 6GB.", show_default="what is free")
    ] = "",
    probabilities: Annotated[
        str, typer.Option(metavar="CLASS,...|all", help="Write probabilities of these classes too.")
    ] = "",
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Do every N-th case from the I-th on. In a Slurm array each job takes its share; 1/1: all.",
            show_default="as in a Slurm array",
        ),
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace masks that medseg did not write, or that were edited since.")
    ] = False,
    report: WithReport = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Segment images with a model package.

    Each mask CASE.nii.gz (of a picture CASE.png or .tif) lies on its image's own grid. Several channels are one 4-D
    file, or files CASE_0000, CASE_0001. A CSV file has a column image (or image_0, image_1) of paths, and perhaps a
    column case. Masks that are there, made from the same image and model, are kept; so the same command goes on after
    an interruption. Probabilities go into probabilities/CASE, as 16-bit NIfTI.

    Of DICOM each study is a case, named series_ and a digest of the series' UID, and several channels are several
    --series. A CSV file may have a column series (or series_0, series_1).

    Exit code 3 when cases failed; the reasons are in cases.csv. Several processes may share a list and a folder as
    shards; in a Slurm array each job takes its own.
    """
    from medseg.batch import Outputs, places_of, predict_cases, require_fitting
    from medseg.cases import find_cases, require_apart
    from medseg.folder import writing_to
    from medseg.io import suffix_of
    from medseg.predict import load

    if out.is_file() or suffix_of(out):
        raise InputError(out, "names a file", "a folder: the masks are named after the images", "leave the name out")
    chosen = {"formats": _formats(formats), "seg_type": seg_type, "allow_uncoded": allow_uncoded}
    outputs = Outputs.checked(chosen, "--format")
    with Show(quiet, brief_s=1.0) as show:
        cases = find_cases(*images, series=series, resample_irregular=resample_irregular, progress=show)
    require_apart(cases, out)
    part = _shard(shard)
    predictor = load(
        model,
        device=device,
        mirror=mirror,
        overlap=overlap,
        engine=engine,
        precision=precision,
        memory_limit_mb=_megabytes(memory_limit, "--memory-limit") if memory_limit else None,
        probabilities=_words(probabilities),
        resample_channels=resample_channels,
    )
    require_fitting(predictor, cases, outputs)
    with writing_to(out, part), Show(quiet) as show:
        results = predict_cases(
            predictor,
            cases,
            out,
            outputs=outputs,
            shard=part,
            overwrite=overwrite,
            found_at=places_of(images, series, resample_irregular),
            progress=show,
        )
    output = _console(stderr=False)
    failed = [result for result in results if result.status == "failed"]
    kept = sum(result.status == "kept" for result in results)
    masks = _count(len(results) - len(failed), "mask")
    output.print(escape(f"{masks} in {out} ({kept} kept from before), {len(failed)} failed"))
    if failed:  # each was told when it happened
        output.print(escape(f"reasons: {out / f'cases{part.suffix if part else str()}.csv'}"))
    if report:
        _write_report(out, quiet)
    if failed:
        raise typer.Exit(3)


@app.command(
    "import-nnunet",
    epilog=_examples(
        "medseg import-nnunet nnUNetTrainer__nnUNetPlans__3d_fullres -o liver",
        "medseg import-nnunet nnUNetTrainer__nnUNetPlans__3d_cascade_fullres -o liver \\\n"
        "      --previous nnUNetTrainer__nnUNetPlans__3d_lowres",
    ),
)
@as_command
def import_nnunet(
    folder: Annotated[Path, typer.Argument(metavar="MODELFOLDER", help="With plans.json, dataset.json and fold_*.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PACKAGE", help="Folder for the model package.")],
    folds: Annotated[
        str | None,
        typer.Option(
            metavar="N,N|all",
            help="Folds to take; all is nnU-Net's fold_all.",
            show_default="every numbered fold that is there, else fold_all",
        ),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(metavar="FILE", help="File with the weights, in the folder of each fold.")
    ] = "checkpoint_final.pth",
    previous: Annotated[
        Path | None, typer.Option(metavar="MODELFOLDER", help="Of a cascade: the model of its first stage.")
    ] = None,
    orientation: Annotated[
        str,
        typer.Option(
            metavar="stored|LETTERS",
            help="Of the training images: axes as stored in each file, or all turned one way, as RAS or LPS.",
        ),
    ] = "stored",
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Make a package of a model trained by nnU-Net v2.

    Weights are read as numbers alone: a checkpoint that would run code is refused. From then on it is a model like any
    other, for `medseg predict`.
    """
    from medseg.interop.nnunet import import_model

    chosen = ("all",) if folds == "all" else _folds(folds) if folds else None
    made = import_model(folder, out, folds=chosen, checkpoint=checkpoint, previous=previous, orientation=orientation)
    output = _console(stderr=False)
    for note in made.notes:
        output.print(escape(f"note: {note}"))
    output.print(f"model package: {out}")


@app.command(
    epilog=_examples(
        "medseg quantise hippocampus/package Task04_Hippocampus",
        "medseg predict scans -m hippocampus/package -o masks --engine openvino-int8",
    )
)
@as_command
def quantise(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="Model package, folder or zip.")],
    dataset: DatasetArgument,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Make a model's 8-bit form, and measure what it costs.

    It is calibrated on cases that the model was trained on and kept beside the package, where `medseg predict --engine
    openvino-int8` finds it: faster on a CPU, with masks that differ a little. The mean Dice of both forms is measured
    on cases that calibration did not see.
    """
    from medseg.dataset import Dataset
    from medseg.quantise import quantise as quantise_package

    with Show(quiet) as show:
        records = quantise_package(package, Dataset.open(dataset), show)
    rows = []
    for record in records:
        measures = (record.agreement, record.dice_float32, record.dice_int8, record.dice_loss)
        agreement, *dices = ("not measured" if value is None else f"{value:.4f}" for value in measures)
        counts = (str(record.tiles), agreement, str(len(record.measured_cases)))
        rows.append((record.network[:12], *counts, *dices))
    header = ("network", "calibration tiles", "agreement", "measured cases", "Dice", "Dice in 8 bits", "loss")
    _table(_console(stderr=False), header, rows)


@app.command(
    epilog=_examples(
        "medseg evaluate masks Task04_Hippocampus -o scores             # with the names of its labels",
        "medseg evaluate masks references -o scores --tolerance-mm 2",
        "medseg evaluate 'masks/*.dcm' references -o scores --labels liver/package   # DICOM SEG",
    )
)
@as_command
def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Folder of masks, a mask, or 'pattern'.")],
    references: Annotated[Path, typer.Argument(metavar="REFERENCES", help="As PREDICTIONS, or a dataset.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for scores.csv and evaluation.json.")
    ],
    tolerance_mm: Tolerance = None,
    lesions: Lesions = None,
    lesion_iou: LesionIou = 0.1,
    labels: LabelsFrom = None,
    only_predicted: Annotated[
        bool, typer.Option("--only-predicted", help="Leave out references without a mask: they count as 0 otherwise.")
    ] = False,
    report: WithReport = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Score masks of any tool against references.

    Dice, NSD, HD95 and volumes of each case and class; needs no model. A reference without a mask, or with one on
    another grid, counts as 0. Exit code 3 when there are such cases. Labels are matched by their names where masks have
    them, as a DICOM SEG does, else by their values. Those that nobody asked for are not scored.
    """
    from medseg.evaluate import evaluate_folders
    from medseg.folder import require_writable

    for file in ("scores.csv", "evaluation.json"):
        require_writable(out / file)
    names, settings = _labels(labels), _evaluate_settings(tolerance_mm, lesions, lesion_iou)
    with Show(quiet) as show:
        result = evaluate_folders(
            predictions, references, names, settings, only_predicted=only_predicted, progress=show
        )
    result.save(out / "evaluation.json")
    result.save_csv(out / "scores.csv")
    _print_scores(result)
    _console(stderr=False).print(f"scores: {out / 'scores.csv'}")
    if report:
        _write_report(out, quiet)
    _end_with(result)


@app.command(
    epilog=_examples(
        "medseg compare baseline-scores new-scores              # output folders of `medseg evaluate`",
        "medseg compare medseg-Task04_Hippocampus classic wide -o comparison     # and of `medseg run`",
        "medseg compare baseline-scores new-scores --measure nsd",
    )
)
@as_command
def compare(
    places: Annotated[
        list[Path], typer.Argument(metavar="A B [C...]", help="Output folders of evaluate or run, or evaluation.json.")
    ],
    measure: Annotated[
        Literal["dice", "nsd", "hd95_mm", "iou", "sensitivity", "precision", "hd_mm", "assd_mm"],
        typer.Option(help="What is compared; choose it before looking."),
    ] = "dice",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Folder for comparison.json and values.csv."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Say which of several methods is better, with the evidence.

    Takes evaluations with the same references and pairs their cases: mean difference with its bootstrap interval,
    Wilcoxon test with Holm's correction, probability of improvement, wins and losses, and how stable the ranking is.
    "No evidence of difference" does not say that there is none.
    """
    from medseg.compare import compare as compare_evaluations
    from medseg.compare import load_evaluation
    from medseg.folder import require_writable

    for file in ("comparison.json", "values.csv"):
        if out:
            require_writable(out / file)
    if len({place.resolve() for place in places}) < len(places):
        raise InputError("compare", "the same place is named twice", "different evaluations")
    short = [place.resolve().name for place in places]
    names = short if len(set(short)) == len(places) else [str(place) for place in places]
    found = compare_evaluations(
        {name: load_evaluation(place) for name, place in zip(names, places, strict=True)}, measure
    )
    if out:
        found.save(out / "comparison.json")
        found.save_csv(out / "values.csv")
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        _print_comparison(found)


@app.command(
    epilog=_examples(
        "medseg report medseg-Task04_Hippocampus                         # of a run, again",
        "medseg report masks -o masks.html                               # of predictions",
        "medseg report scores --images Task04_Hippocampus                # of an evaluation",
    )
)
@as_command
def report(
    place: Annotated[
        Path, typer.Argument(metavar="PLACE", help="Output folder of `medseg run`, `predict` or `evaluate`.")
    ],
    images: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="Images of the cases: a folder, 'pattern', dataset, list or DICOM.",
            show_default="where they were",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Page.", show_default="PLACE/report.html")
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Show what was found as one HTML page.

    Scores with their intervals, every case, pictures of the worst ones and a viewer of their slices, training, plan and
    settings, in one file that opens from disk and asks no network for anything. Image data of the cases are inside it:
    share it as you would share the images.
    """
    from medseg.folder import require_writable
    from medseg.report import write_report

    require_writable(out or place / "report.html")
    with Show(quiet, brief_s=1.0) as show:
        page = write_report(place, out, images, show)
    _console(stderr=False).print(escape(f"report: {page}"))


@app.command(
    epilog=_examples(
        "medseg convert mask.nii.gz -o liver.dcm --reference study --labels liver/package   # DICOM SEG",
        "medseg convert liver.dcm -o liver.nii.gz --reference study",
        "medseg convert mask.nii.gz -o mask.seg.nrrd --labels Task04_Hippocampus/dataset.json",
    )
)
@as_command
def convert(
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="Mask; of DICOM SEG also its folder or zip.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help=".nii.gz, .nii, .seg.nrrd, .nrrd, .mha, or .dcm (DICOM SEG)."),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(metavar="PLACE", help="Image that the mask belongs to: a file, or a folder or zip of DICOM."),
    ] = None,
    series: Annotated[
        str,
        typer.Option(
            metavar="UID|PATTERN",
            help="Which DICOM series of PLACE, as `medseg dicom scan` lists them.",
            show_default="the only one",
        ),
    ] = "",
    labels: LabelsFrom = None,
    seg_type: SegType = "binary",
    allow_uncoded: AllowUncoded = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write a mask in another format, on the grid of its image.

    Names of labels are the mask's own (DICOM SEG, .seg.nrrd, and .nii.gz from medseg), or come with --labels. A DICOM
    SEG needs the DICOM series that it belongs to as --reference, and may hold no more than the slices with labels: with
    --reference a mask made of one has the whole grid. Nothing is resampled: a mask of another grid is refused.
    """
    from medseg.convert import convert as convert_mask

    convert_mask(
        mask,
        out,
        reference=reference,
        series=series,
        labels=_labels(labels),
        kind="LABELMAP" if seg_type == "labelmap" else "BINARY",
        allow_uncoded=allow_uncoded,
        overwrite=overwrite,
    )
    _console(stderr=False).print(escape(f"mask: {out}"))


@app.command(
    epilog=_examples(
        "medseg stats scan.nii.gz mask.nii.gz",
        "medseg stats scans masks -o stats.csv                    # a cohort: one row a case and label",
        "medseg stats study liver.dcm --series '*portal*'",
    )
)
@as_command
def stats(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="Image, folder of images, DICOM folder or zip, 'pattern' or list.")
    ],
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="Mask, folder or 'pattern' of masks named as images.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Table to write.", show_default="standard output"),
    ] = None,
    labels: LabelsFrom = None,
    series: SeriesOfChannels = [],  # noqa: B006 - Typer needs a list, and copies it
    resample_irregular: ResampleIrregular = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with what each number means.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure what masks mark, label by label.

    Volume in ml, mean, spread and percentiles of the intensities, pieces, bounding box, centroid and the borders of the
    image that are touched, as one CSV table with a row a case and label. Nothing is resampled. Exit code 3 when cases
    could not be measured; their rows say why.
    """
    from medseg.folder import require_writable
    from medseg.stats import measure_folders

    if out:
        require_writable(out)
    with Show(quiet) as show:
        result = measure_folders(
            image, mask, _labels(labels), show, series=series, resample_irregular=resample_irregular
        )
    if out:
        result.save_csv(out)
    if as_json:
        print(result.model_dump_json(indent=2))
    elif out:
        _console(stderr=False).print(escape(f"statistics: {out}"))
    else:
        print(result.as_csv(), end="")
    for case, reason in result.failed.items():
        _console(stderr=True).print(escape(f"not measured: {case}: {reason}"), style="red")
    if result.failed:
        raise typer.Exit(3)


@app.command(
    epilog=_examples(
        "medseg preview scan.nii.gz mask.nii.gz -o case.png",
        "medseg preview scan.nii.gz mask.nii.gz --reference truth.nii.gz -o case.png   # where they differ most",
        "medseg preview study liver.dcm --series '*portal*' -o liver.png",
    )
)
@as_command
def preview(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image, or folder or zip of DICOM.")],
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="Mask; of DICOM SEG also its folder or zip.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Picture to write, a .png.")],
    reference: Annotated[
        Path | None, typer.Option(metavar="MASK", help="Mask to compare with: solid lines, MASK in dashes.")
    ] = None,
    labels: LabelsFrom = None,
    series: SeriesOfChannels = [],  # noqa: B006 - Typer needs a list, and copies it
    resample_irregular: ResampleIrregular = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Draw the outlines of a mask on its image, in three planes.

    Axial, coronal and sagittal, the patient's right on the left, through the slices with the most voxels marked, or in
    which the mask differs most from the reference. Nothing is resampled: a mask of another grid is refused.
    """
    from medseg.report.planes import save_preview

    save_preview(image, mask, out, reference, _labels(labels), series=series, resample_irregular=resample_irregular)
    _console(stderr=False).print(escape(f"picture: {out}"))


@app.command(epilog=_examples("medseg download Task04 -o data", "medseg download viewer    # for 3-D views in reports"))
@as_command
def download(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK|viewer", help="A Decathlon task: Task04, Task04_Hippocampus; or the 3-D viewer."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Folder to put a task in.", show_default="data"),
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Download a Decathlon task, or the 3-D viewer of reports.

    Verified by its checksum; the same command goes on after an interruption. Prints the dataset folder, or the viewer's
    file, which is kept in the user's data folder.
    """
    from medseg.download import download_task, download_viewer

    if task == "viewer" and out:
        raise InputError("--out", f"is {out}", "none: the viewer is kept in the user's data folder")
    with Show(quiet) as show:
        place = download_viewer(show) if task == "viewer" else download_task(task, out or Path("data"), show)
    _console(stderr=False).print(str(place))


@app.command(epilog=_examples("medseg doctor"))
@as_command
def doctor(verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Say what is installed or missing, and which device is used."""
    import importlib.util

    from medseg.download import viewer_file
    from medseg.io.dicom.pixels import decoders
    from medseg.journal import versions

    output = _console(stderr=False)
    _table(output, ("package", "version"), list(versions().items()))
    output.print(f"device: {_device_found()}")
    for module, extra, use in (
        ("SimpleITK", "itk", ".mha, .mhd and .nrrd files"),
        ("openvino", "openvino", "the fastest prediction on a CPU"),
        ("nncf", "int8", "prediction in 8-bit integers, faster still"),
        ("onnxruntime", "onnx", "prediction with ONNX Runtime"),
        ("tensorboard", "tensorboard", "training curves in TensorBoard"),
        ("skimage", "cells", "parting cells that touch"),
        ("rasterio", "satellite", "scenes larger than memory, with their place on the map"),
    ):
        found = importlib.util.find_spec(module) is not None
        output.print(
            f"{module}: " + ("installed" if found else escape(f"missing, for {use}: pip install 'medseg[{extra}]'"))
        )
    how = "not downloaded; for 3-D views in reports: medseg download viewer"
    output.print(f"NiiVue: {'downloaded' if viewer_file() else how}")
    for syntax, missing in decoders().items():
        output.print(escape(f"DICOM {syntax}: {missing or 'can be read'}"))


@app.command(epilog=_examples("medseg demo", "medseg demo -o trial --time-budget 30s"))
@as_command
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Output folder.")] = Path("medseg-demo"),
    time_budget: TimeBudget = "70s",
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """The whole journey on made-up data, in two minutes.

    A phantom dataset is written, checked, trained on, predicted and scored; nothing is downloaded.
    """
    from medseg.phantom import make_dataset

    settings = train_settings(time_budget=time_budget)
    dataset = make_dataset(out / "dataset")
    _run(dataset, out / "run", quiet, train=settings)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from medseg import __version__

        _console(stderr=False).print(f"medseg {__version__}")
        raise typer.Exit


def main() -> None:
    """The entry point of the ``medseg`` command."""
    try:
        app()
    except SystemExit as end:
        # an interrupted batch may leave a thread that reads: ending the interpreter below it could crash or wait
        if end.code == 130 and any(thread.daemon for thread in threading.enumerate()):
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(130)
        raise


# Pieces


def _run(dataset: Path, out: Path | None, quiet: bool, **choices: Any) -> None:
    from medseg.pipeline import run as run_pipeline

    with Show(quiet) as show:
        result = run_pipeline(dataset, out or _default_out(dataset), progress=show, **choices)
    _print_run(result)
    _end_with(result.evaluation)


def _end_with(evaluation: Evaluation) -> None:
    """Exit code 3 where cases failed or could not be scored."""
    if evaluation.failed or evaluation.unscored:
        raise typer.Exit(3)


def _write_report(place: Path, quiet: bool) -> None:
    """Write the page of what a command has just made, which a failure here does not undo."""
    from medseg.report import write_report

    try:
        with Show(quiet, brief_s=1.0) as show:
            page = write_report(place, progress=show)
    except Exception as failure:  # noqa: BLE001 - the masks and scores are there, and the exit code is about them
        _console(stderr=True).print(escape(f"the report could not be written: {failure}"), style="yellow")
    else:
        _console(stderr=False).print(escape(f"report: {page}"))


def _labels(place: Path | None) -> Labels | None:
    from medseg.convert import labels_at

    return labels_at(place) if place else None


def _images_at(place: Path) -> list[Case]:
    """Every image at a place; of DICOM every series, also those that cannot be used."""
    from medseg import io
    from medseg.cases import find_cases
    from medseg.dataset import Case

    has_files = place.is_dir() and any(io.suffix_of(path) and not io.is_dicom(path) for path in place.iterdir())
    if has_files or not io.is_dicom(place):
        return find_cases(place)
    return [Case(series.name, (series,), None) for series in io.dicom.scan(place).series] or find_cases(place)


def _print_run(result: RunResult) -> None:
    _print_scores(result.evaluation)
    output = _console(stderr=False)
    if result.skipped_cases:
        output.print(f"left out as unusable: {', '.join(result.skipped_cases)} (see {result.out / 'check.json'})")
    for what, path in result.paths.items():
        output.print(f"{what}: {path}")
    output.print(NOTICE)


def _print_scores(evaluation: Evaluation) -> None:
    from medseg.report import lesion_table, score_table

    output = _console(stderr=False)
    for header, *rows in filter(None, (score_table(evaluation), lesion_table(evaluation))):
        _table(output, header, rows)
    for case, reason in evaluation.failed.items():
        output.print(escape(f"failed, counted as 0: {case}: {reason}"))
    for case, reason in evaluation.unscored.items():
        output.print(escape(f"not scored, in no number: {case}: {reason}"))
    if evaluation.extra:
        output.print(escape(f"masks without a reference: {', '.join(evaluation.extra)}"))
    if evaluation.left_out:
        output.print(escape(f"labels of the masks that are not scored: {', '.join(evaluation.left_out)}"))


def _print_comparison(found: Comparison) -> None:
    output = _console(stderr=False)
    header = ("rank", "method", f"mean {found.measure}", "95 % interval", "first in", "failed cases")
    rows = [
        (str(m.rank), m.name, f"{m.mean:.4f}", _interval(m.low, m.high), f"{m.ranks[0]:.0%}", str(m.n_failed))
        for m in found.methods
    ]
    _table(output, header, rows)
    columns = ("class", "second - first", "difference", "95 % interval", "p (Holm)", "P(better)", "win/tie/loss", "")
    differences = [
        (
            one.structure,
            f"{one.second} - {one.first}",
            f"{one.difference:+.4f}",
            _interval(one.low, one.high, "+.4f"),
            f"{one.p_holm:.2g}",
            f"{one.probability:.2f}",
            f"{one.wins}/{one.ties}/{one.losses}",
            one.verdict,
        )
        for one in found.differences
    ]
    output.print()
    _table(output, columns, differences)
    output.print()
    if found.left_out:
        output.print(escape(f"left out, as not every method has them: {', '.join(found.left_out)}"))
    if found.left_out_classes:
        output.print(escape(f"classes left out, as not every method has them: {', '.join(found.left_out_classes)}"))
    cases = _count(len(found.cases), "case")
    output.print(f"{cases}; rank correlation of resamples (Kendall's tau) {found.kendall_tau:.2f}")
    for sentence in found.sentences:
        output.print(escape(sentence))


def _interval(low: float | None, high: float | None, form: str = ".4f") -> str:
    return "too few cases" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _print_plan(made: Plan, target: Path) -> None:
    output = _console(stderr=False)
    _table(output, ("decision", "reason"), list(made.reasons.items()))
    for name, setup in made.configurations.items():
        output.print(
            f"{name}: patch {setup.patch_size}, batch {setup.batch_size}, features {setup.network.features}, "
            f"about {setup.estimated_memory_mb:.0f} MB"
        )
    output.print(f"plan: {target / 'plan.json'}")


def _print_scan(found: Scan) -> None:
    output = _console(stderr=False)
    rows = [_scan_row(series) for series in found.series]
    widths = [max(map(cell_len, cells)) for cells in zip(_SCAN_HEADER, *rows, strict=True)]
    fitting = (columns for columns in _SCAN_COLUMNS if sum(widths[c] + 2 for c in columns) - 2 <= output.width)
    columns = next(fitting, _SCAN_COLUMNS[-1])
    study = ""
    for series, row in zip(found.series, rows, strict=True):
        if series.study_uid != study:
            _print_lines(
                output, *([""] if study else []), f"study {series.study_uid}", _row(_SCAN_HEADER, widths, columns)
            )
            study = series.study_uid
        _print_lines(output, _row(row, widths, columns), *_below(output, series, found.place, columns))
    _print_lines(output, *([""] if found.series else []))
    for kind, count in found.passed_over.items():
        _print_lines(output, f"passed over: {count} {kind}")
    usable = sum(not series.reason for series in found.series)
    _print_lines(output, f"{len(found.series)} series, {usable} usable")


_SCAN_HEADER = ("series", "", "description", "slices", "size", "voxel mm", "axes", "transfer syntax", "")
_SCAN_COLUMNS: tuple[tuple[int, ...], ...] = (tuple(range(9)), (0, 1, 2, 3, 4, 5, 6, 8), (0, 1, 4, 5))
"""Those of a wide window, of a narrower one, and of one where description and state stand below the row."""


def _row(cells: Sequence[str], widths: Sequence[int], columns: Sequence[int]) -> str:
    """Some cells of a row, none of them wrapped."""
    return "  ".join(set_cell_size(cells[c], widths[c]) for c in columns).rstrip()


def _below(output: Console, series: Series, place: Path, columns: Sequence[int]) -> Iterator[str]:
    """What stands below the row of a series: what has no column, its UID, which is copied, and where it lies."""
    notes = [series.reason] if series.reason else list(series.warnings)
    if columns is _SCAN_COLUMNS[-1]:
        state = "not usable" if series.reason else "usable"
        notes = [series.description, ": ".join((state, *notes[:1])), *notes[1:]]
    files = f"{_count(len(series.instances), 'file')} in {_folder_of(series, place)}"
    for text in (*notes, series.key, files):
        width = max(output.width - 2, 20)
        for part in textwrap.wrap(_visible(text), width, break_long_words=False, break_on_hyphens=False):
            yield f"  {part}"


def _print_lines(output: Console, *lines: str) -> None:
    for line in lines:
        output.print(escape(line))


def _scan_row(series: Series) -> tuple[str, ...]:
    grid = series.geometry
    size, spacing, axes = ("", "", "")
    if grid:
        size, axes = "x".join(map(str, grid.shape)), grid.orientation
        spacing = "x".join(f"{length:.4g}" for length in grid.spacing)
    known = (series.name, series.modality, series.description, str(len(series.frames)), size, spacing, axes)
    return tuple(map(_visible, (*known, series.syntax, "not usable" if series.reason else "usable")))


def _folder_of(series: Series, place: Path) -> str:
    """The folder with all files of a series, in the folder or zip that was looked at."""
    return posixpath.commonpath({str(instance.within(place).parent) for instance in series.instances}) or "."


def _no_series(found: Scan) -> str:
    files = sum(found.passed_over.values())
    return f"holds no DICOM series: {_count(files, 'file')} looked at"


def _scan_body(found: Scan) -> dict[str, Any]:
    """A scan as JSON; what ``dicom scan --json`` prints."""
    return {
        "series": [
            {
                "name": series.name,
                "study_uid": series.study_uid,
                "uid": series.uid,
                "part": series.part,
                "modality": series.modality,
                "description": series.description,
                "folder": _folder_of(series, found.place),
                "files": len(series.instances),
                "slices": len(series.frames),
                "size": series.geometry and series.geometry.shape,
                "spacing_mm": series.geometry and series.geometry.spacing,
                "orientation": series.geometry and series.geometry.orientation,
                "transfer_syntax": series.syntax,
                "usable": not series.reason,
                "reason": series.reason,
                "irregular": series.irregular,
                "warnings": series.warnings,
            }
            for series in found.series
        ],
        "passed_over": found.passed_over,
    }


def _visible(text: str) -> str:
    """Text from a file for a terminal: what would steer it, or turn the direction of writing, is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _table(output: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    output.print(table, soft_wrap=False)


def _device_found() -> str:
    """The device that ``auto`` takes, in words."""
    import torch

    from medseg.engines import choose_device

    device = choose_device("auto")
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"cuda, {card.name} with {card.total_memory / 2**30:.0f} GiB"
    if device.type == "cpu" and not (torch.version.cuda or torch.version.hip):
        return "cpu (this build of PyTorch is for CPUs only; for a GPU see https://pytorch.org/get-started/locally)"
    return str(device)


def _default_out(dataset: Path) -> Path:
    folder = dataset.resolve()
    return Path(f"medseg-{folder.parent.name if folder.name == 'dataset.json' else folder.name}")


def train_settings(
    *, time_budget: str = "", epochs: int | None = None, iterations: int | None = None, **choices: Any
) -> TrainSettings:
    """Settings of training from a command's options; InputError where several say how long it takes."""
    from medseg.train import TrainSettings, seconds_of

    budgets = {"--time-budget": time_budget, "--epochs": epochs, "--iterations": iterations}
    given = [name for name, value in budgets.items() if value]
    if len(given) > 1:
        raise InputError(" and ".join(given), "both say how long to train", "one of them")
    seconds = seconds_of(time_budget) if time_budget else None
    return TrainSettings(time_budget_s=seconds, epochs=epochs, iterations=iterations, **choices)


def _evaluate_settings(
    tolerance_mm: float | None, lesions: str | None = None, lesion_iou: float = 0.1
) -> EvaluateSettings:
    """Settings of the scores from a command's options."""
    from medseg.evaluate import EvaluateSettings

    named = None if lesions is None else () if lesions == "none" else _words(lesions)
    chosen = {"tolerance_mm": tolerance_mm, "lesions": named, "lesion_iou": lesion_iou}
    return EvaluateSettings.checked(chosen, "--tolerance-mm, --lesions, --lesion-iou")


def _folds(text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise InputError("--folds", f"{text!r} is no list of folds", "numbers, as 0 or 0,1, or all")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _shard(text: str) -> Shard | None:
    """The shard that is asked for, or that a job of a Slurm array is."""
    from medseg.cases import Shard

    found = Shard.of(text) if text else Shard.of_slurm(os.environ)
    if found and not text:  # nobody asked for it: --quiet does not hide it
        _console(stderr=True).print(f"shard {found.index}/{found.count}, as this job in its Slurm array")
    return found


def _megabytes(text: str, option: str = "--memory-budget") -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|G|MB|M)", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise InputError(option, f"{text!r} is no amount of memory", "a number with its unit, as 6GB or 900MB")
    return float(match[1]) * (1024 if match[2].upper().startswith("G") else 1)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 or noun == "series" else f"{number} {noun}s"


def _words(text: str) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word for part in text.split(",") if (word := part.strip()))


def _formats(text: str) -> tuple[MaskFormat, ...]:
    """The formats of a list with commas."""
    from medseg.cases import MASK_FORMATS

    words = _words(text) or ("",)
    for word in words:
        if word not in MASK_FORMATS:
            raise InputError("--format", f"{word!r} is no format", ", ".join(MASK_FORMATS))
    return tuple(form for word in words for form in MASK_FORMATS if form == word)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


if __name__ == "__main__":
    main()
