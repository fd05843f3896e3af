"""The command line: parse, one call, print. The only place that prints.

Results go to standard output, everything else to standard error. Exit codes: 0 all well, 1 unexpected error, 2 wrong
usage or nothing usable found, 3 finished but some cases failed or are unusable, 130 interrupted.
"""

from __future__ import annotations

import functools
import logging
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg.errors import MedsegError

if TYPE_CHECKING:  # the rest is imported by the command that needs it: `medseg --help` stays fast
    from medseg.evaluate import Evaluation
    from medseg.pipeline import Recipe, RunResult
    from medseg.plan import Plan
    from medseg.train import TrainSettings

NOTICE = "Research software, not a medical device."
_EXAMPLES = f"""Medical image segmentation with U-Nets in 2D and 3D: one command from data to a scored model.

  medseg demo                                              made-up data, the whole journey, two minutes
  medseg run Task04_Hippocampus --time-budget 10m          train, predict, score a Decathlon folder
  medseg predict scans/ -m medseg-Task04/package -o masks  segment a folder of NIfTI files

{NOTICE}"""
_REMEDY_FOR_ALL = "run again with -v for the traceback, and report it with the log"

app = typer.Typer(
    name="medseg",
    help=_EXAMPLES.replace("\n  ", "\n\n  "),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _console(*, stderr: bool) -> Console:
    """A console that does not wrap lines into a narrow default width when it is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 200, highlight=False, soft_wrap=True)


# Options that several commands share

DatasetArgument = Annotated[Path, typer.Argument(metavar="DATASET", help="Folder with a dataset.json.")]
Configuration = Annotated[
    Literal["2d", "3d_fullres", "3d_lowres"], typer.Option("--configuration", "-c", help="Of the plan.")
]
Folds = Annotated[str, typer.Option(help="Folds to train, as 0,1, or all.")]
TimeBudget = Annotated[str, typer.Option(help="Length of training a fold, as 90s, 10m or 1h30m.")]
Epochs = Annotated[int, typer.Option(help="Length of training in passes over the cases.", min=0)]
Iterations = Annotated[int, typer.Option(help="Length of training in steps.", min=0)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[Literal["auto", "32", "bf16", "16"], typer.Option(help="Of the arithmetic.")]
Seed = Annotated[int, typer.Option(help="Of weights, batches and augmentation.", min=0)]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Only deterministic kernels, also on a GPU.")]
Patience = Annotated[int, typer.Option(help="Stop after so many validations without gain; 0 never.", min=0)]
MemoryBudget = Annotated[str, typer.Option(help="What a training step may take, as 6GB or 900MB.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="plan.FIELD=VALUE", help="Change a plan field; may be repeated.")
]
SkipBadCases = Annotated[bool, typer.Option("--skip-bad-cases", help="Go on without unusable cases.")]
Tolerance = Annotated[float, typer.Option(help="Surface distance, mm, that NSD lets pass.", min=0.0)]
Mirror = Annotated[bool, typer.Option("--mirror", help="Average over mirrored images: slower, a little better.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and results.")]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Set up logging, and turn errors into a message and an exit code."""

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
        except MedsegError as failure:
            _fail(errors, f"error: {failure}", 2, verbose)
        except KeyboardInterrupt:
            _fail(errors, "interrupted: what is finished is kept; the same command goes on from there", 130, False)
        except OSError as failure:
            _fail(errors, f"error: {failure}", 1, verbose)
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


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _ConsoleHandler(logging.Handler):
    """Log records on the console, above a running progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(escape(f"{record.levelname.lower()}: {record.getMessage()}"), style="yellow")


class _Show:
    """Progress: bars with an estimate on a terminal, a plain line now and then elsewhere."""

    def __init__(self, quiet: bool = False, every_s: float = 15.0) -> None:
        self.console = _console(stderr=True)
        self.quiet = quiet
        self.every_s = every_s
        self.started: dict[str, float] = {}
        self.shown: dict[str, float] = {}
        self.bars: Any = None
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Show:
        if self.console.is_terminal and not self.quiet:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TimeElapsedColumn())
            note = TextColumn("{task.fields[note]}")
            self.bars = Progress(*columns, TimeRemainingColumn(), note, console=self.console)
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, work: str, fraction: float, note: str) -> None:
        """Show how far a piece of work is; see ``medseg.progress``."""
        if self.bars is not None:
            if work not in self.tasks or self.bars.tasks[self.tasks[work]].finished:
                self.tasks[work] = self.bars.add_task(work, total=1.0, note="")
            self.bars.update(self.tasks[work], completed=fraction, note=escape(note))
        elif not self.quiet:
            self._line(work, fraction, note)

    def _line(self, work: str, fraction: float, note: str) -> None:
        now = time.monotonic()
        start = self.started.setdefault(work, now)
        if fraction < 1 and now - self.shown.get(work, start) < self.every_s:
            return
        self.shown[work] = now
        left = (now - start) * (1 - fraction) / fraction if fraction > 0 else 0.0
        self.console.print(escape(f"{work} {fraction:4.0%} {note} ({_duration(left)} left)".replace("  ", " ")))
        if fraction >= 1:
            self.started.pop(work)
            self.shown.pop(work)


# Commands


@app.command()
@_command
def run(
    dataset: DatasetArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder [default: medseg-<dataset>].")] = None,
    configuration: Configuration = "3d_fullres",
    folds: Folds = "0",
    time_budget: TimeBudget = "",
    epochs: Epochs = 0,
    iterations: Iterations = 0,
    patience: Patience = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Seed = 0,
    deterministic: Deterministic = False,
    memory_budget: MemoryBudget = "8GB",
    overrides: Overrides = [],  # noqa: B006 - Typer needs a list, and copies it
    tolerance_mm: Tolerance = 1.0,
    mirror: Mirror = False,
    skip_bad_cases: SkipBadCases = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """From a dataset to a trained model, masks of held-out cases and their scores.

    Checks the data, plans, prepares, trains, packages, predicts the cases that each fold did not train on, and scores
    them. Run it again to go on after an interruption: what is done and still valid is skipped.
    """
    training = _train_settings(device, precision, seed, deterministic, iterations, epochs, time_budget, patience)
    _run(
        dataset,
        out,
        quiet,
        configuration=configuration,
        folds=_folds(folds),
        train=training,
        memory_budget_mb=_megabytes(memory_budget),
        tolerance_mm=tolerance_mm,
        overrides=overrides,
        mirror=mirror,
        skip_bad_cases=skip_bad_cases,
    )


def run_recipe(recipe: Recipe) -> None:
    """Run a recipe on the dataset that the command line names: the door of the scripts in ``pipelines/``."""

    @_command
    def command(
        dataset: DatasetArgument,
        out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder.")] = None,
        folds: Folds = "0",
        time_budget: TimeBudget = "",
        epochs: Epochs = 0,
        iterations: Iterations = 0,
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
            train=_train_settings(device, "auto", seed, False, iterations, epochs, time_budget, 0),
            memory_budget_mb=_megabytes(memory_budget),
            tolerance_mm=recipe.tolerance_mm,
            regions=recipe.regions,
            overrides=[*recipe.overrides, *overrides],
            skip_bad_cases=skip_bad_cases,
        )

    command.__doc__ = f"Train and score {recipe.task}."
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command()(command)
    script()


@app.command()
@_command
def check(
    dataset: DatasetArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Name every fault of a dataset at once, with the case and a remedy. Exit code 3 when cases are unusable."""
    from medseg.dataset import Dataset
    from medseg.dataset import check as check_dataset

    with _Show(quiet) as show:
        findings = check_dataset(Dataset.open(dataset), show)
    output = _console(stderr=False)
    if as_json:
        output.print_json(findings.model_dump_json())
    else:
        if findings.findings:
            rows = [
                (f.case or "dataset", f.kind, "unusable" if f.unusable else "warning", f.found, f.remedy)
                for f in findings.findings
            ]
            _table(output, ("case", "fault", "", "found", "remedy"), rows)
        bad = len(findings.unusable_cases)
        output.print(
            f"{findings.cases_checked} cases checked: {bad} unusable, {len(findings.findings)} findings in all"
        )
    if any(f.unusable for f in findings.findings):
        raise typer.Exit(3)


@app.command()
@_command
def plan(
    dataset: DatasetArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder [default: medseg-<dataset>].")] = None,
    configuration: Configuration = "3d_fullres",
    device: Device = "auto",
    memory_budget: MemoryBudget = "8GB",
    overrides: Overrides = [],  # noqa: B006 - Typer needs a list, and copies it
    skip_bad_cases: SkipBadCases = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure a dataset and decide how to train on it; writes fingerprint.json and plan.json, prints the reasons."""
    from medseg.dataset import Dataset
    from medseg.pipeline import check_station, plan_station, writing_to

    target = out or _default_out(dataset)
    with writing_to(target), _Show(quiet) as show:
        data, _ = check_station(Dataset.open(dataset), target, skip_bad_cases, show)
        made = plan_station(
            data,
            target,
            device,
            _megabytes(memory_budget),
            configuration,
            overrides,
            show,
        )
    _print_plan(made, target)


@app.command()
@_command
def train(
    dataset: DatasetArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder that `medseg plan` wrote to.")] = None,
    configuration: Configuration = "3d_fullres",
    folds: Folds = "0",
    time_budget: TimeBudget = "",
    epochs: Epochs = 0,
    iterations: Iterations = 0,
    patience: Patience = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Seed = 0,
    deterministic: Deterministic = False,
    skip_bad_cases: SkipBadCases = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train folds by the plan.json in the output folder (edited by hand, if you like); writes a model package."""
    from medseg.dataset import Dataset
    from medseg.pipeline import check_station, chosen_folds, train_station, writing_to
    from medseg.plan import Plan

    target = out or _default_out(dataset)
    settings = _train_settings(device, precision, seed, deterministic, iterations, epochs, time_budget, patience)
    with writing_to(target), _Show(quiet) as show:
        made = Plan.load(target / "plan.json")
        data, _ = check_station(Dataset.open(dataset), target, skip_bad_cases, show)
        chosen = chosen_folds(data, _folds(folds), target)
        train_station(data, made, configuration, chosen, target, settings, show)
    _console(stderr=False).print(f"model package: {target / 'package'}")


@app.command()
@_command
def predict(
    images: Annotated[Path, typer.Argument(metavar="INPUT", help="Image, folder of images, or dataset.json.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Model package, folder or zip.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the masks.")],
    mirror: Mirror = False,
    overlap: Annotated[float, typer.Option(help="Fraction that neighbouring tiles share.", min=0.0, max=0.9)] = 0.5,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks of other origin.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Segment images with a model package: one mask a case on the image's own grid. Exit code 3 when cases failed."""
    from medseg.predict import find_cases, load, predict_cases

    predictor = load(model, device=device, mirror=mirror, overlap=overlap)
    cases = find_cases(images, len(predictor.package.plan.channels))
    with _Show(quiet) as show:
        results = predict_cases(predictor, cases, out, overwrite=overwrite, progress=show)
    output = _console(stderr=False)
    failed = [result for result in results if result.status == "failed"]
    if failed:
        _table(output, ("failed case", "reason"), [(result.case, result.reason) for result in failed])
    kept = sum(result.status == "kept" for result in results)
    output.print(f"{len(results) - len(failed)} masks in {out} ({kept} kept from before), {len(failed)} failed")
    if failed:
        raise typer.Exit(3)


@app.command()
@_command
def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Folder of masks, or one mask.")],
    references: Annotated[Path, typer.Argument(metavar="REFERENCES", help="Folder of masks, one mask, or a dataset.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for scores.csv and evaluation.json.")],
    tolerance_mm: Tolerance = 1.0,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Score masks against references: Dice, NSD, HD95, volumes. Needs no model. Exit code 3 when cases failed."""
    from medseg.evaluate import evaluate_folders

    with _Show(quiet) as show:
        result = evaluate_folders(predictions, references, tolerance_mm=tolerance_mm, progress=show)
    result.save(out / "evaluation.json")
    result.save_csv(out / "scores.csv")
    _print_scores(result)
    _console(stderr=False).print(f"scores: {out / 'scores.csv'}")
    if result.failed or result.unscored:
        raise typer.Exit(3)


@app.command()
@_command
def download(
    task: Annotated[str, typer.Argument(metavar="TASK", help="A Decathlon task: Task04, Task04_Hippocampus.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to put it in.")] = Path("data"),
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Download a task of the Medical Segmentation Decathlon, checked by its checksum; goes on where it stopped."""
    from medseg.download import download_task

    with _Show(quiet) as show:
        folder = download_task(task, out, show)
    _console(stderr=False).print(str(folder))


@app.command()
@_command
def doctor(verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Say what is installed, which device would be used, and how to install what is missing."""
    import importlib.util

    from medseg.engines import choose_device
    from medseg.pipeline import versions

    output = _console(stderr=False)
    _table(output, ("package", "version"), list(versions().items()))
    output.print(f"device: {choose_device('auto')}")
    for module, extra, use in (
        ("SimpleITK", "itk", ".mha, .mhd and .nrrd files"),
        ("tensorboard", "tensorboard", "training curves in TensorBoard"),
    ):
        found = importlib.util.find_spec(module) is not None
        output.print(
            f"{module}: " + ("installed" if found else escape(f"missing, for {use}: pip install 'medseg[{extra}]'"))
        )


@app.command()
@_command
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("medseg-demo"),
    seconds: Annotated[float, typer.Option(help="Length of training.", min=1.0)] = 60.0,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """The whole journey on made-up data: a phantom dataset is written, trained on, predicted and scored."""
    from medseg.phantom import make_dataset
    from medseg.train import TrainSettings

    dataset = make_dataset(out / "dataset")
    _run(dataset, out / "run", quiet, train=TrainSettings(time_budget_s=seconds))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from medseg import __version__

        _console(stderr=False).print(__version__)
        raise typer.Exit


def main() -> None:
    """The entry point of the ``medseg`` command."""
    app()


# Pieces


def _run(dataset: Path, out: Path | None, quiet: bool, **choices: Any) -> None:
    from medseg.pipeline import run as run_pipeline

    with _Show(quiet) as show:
        result = run_pipeline(dataset, out or _default_out(dataset), progress=show, **choices)
    _print_run(result)
    if result.evaluation.failed or result.evaluation.unscored:
        raise typer.Exit(3)


def _print_run(result: RunResult) -> None:
    _print_scores(result.evaluation)
    output = _console(stderr=False)
    if result.skipped_cases:
        output.print(f"left out as unusable: {', '.join(result.skipped_cases)} (see {result.out / 'check.json'})")
    for what, path in result.paths.items():
        output.print(f"{what}: {path}")
    output.print(NOTICE)


def _print_scores(evaluation: Evaluation) -> None:
    from medseg.report import score_table

    header, *rows = score_table(evaluation)
    output = _console(stderr=False)
    _table(output, header, rows)
    for case, reason in {**evaluation.failed, **evaluation.unscored}.items():
        output.print(escape(f"failed: {case}: {reason}"))


def _print_plan(made: Plan, target: Path) -> None:
    output = _console(stderr=False)
    _table(output, ("decision", "reason"), list(made.reasons.items()))
    for name, setup in made.configurations.items():
        output.print(
            f"{name}: patch {setup.patch_size}, batch {setup.batch_size}, features {setup.network.features}, "
            f"about {setup.estimated_memory_mb:.0f} MB"
        )
    output.print(f"plan: {target / 'plan.json'}")


def _table(output: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*header)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    output.print(table, soft_wrap=False)


def _default_out(dataset: Path) -> Path:
    folder = dataset.resolve()
    return Path(f"medseg-{folder.parent.name if folder.name == 'dataset.json' else folder.name}")


def _train_settings(
    device: str,
    precision: str,
    seed: int,
    deterministic: bool,
    iterations: int,
    epochs: int,
    time_budget: str,
    patience: int,
) -> TrainSettings:
    from medseg.train import TrainSettings

    body = {
        "device": device,
        "precision": precision,
        "seed": seed,
        "deterministic": deterministic,
        "iterations": iterations or None,
        "epochs": epochs or None,
        "time_budget_s": _seconds(time_budget) if time_budget else None,
        "patience": patience,
    }
    return TrainSettings.checked(body, "command line")


def _folds(text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of folds, as 0,1 or all") from None


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if seconds <= 0:
        raise typer.BadParameter(f"{text!r} is no length of time, as 90s, 10m or 1h30m")
    return seconds


def _megabytes(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|G|MB|M)", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is no amount of memory, as 6GB or 900MB")
    return float(match[1]) * (1024 if match[2].upper().startswith("G") else 1)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


if __name__ == "__main__":
    main()
