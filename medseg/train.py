"""Training of one fold: one readable loop on Lightning Fabric.

Batches and dropout are functions of seed and iteration, so a training that was killed goes on from its last checkpoint
to the same weights, bit for bit on a CPU (with a budget in iterations or epochs; one in time depends on the clock).
"""

from __future__ import annotations

import contextlib
import csv
import io as text_io
import itertools
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors.torch
import torch
from lightning_fabric import Fabric
from pydantic import Field, model_validator
from torch import Tensor, nn

from medseg import io
from medseg.checkpoint import State, on_host, resume, save_checkpoint
from medseg.dataset import Case
from medseg.engines import choose_device, computes_bfloat16, keep_freed_memory
from medseg.errors import InputError, PlanError, TrainingError
from medseg.losses import build_loss, build_target
from medseg.metrics import class_dice
from medseg.networks import build_network
from medseg.optimisers import build_optimiser, learning_rate_factor
from medseg.package import FoldRecord
from medseg.patches import Batch, PreparedCase, batches
from medseg.plan import Configuration, Plan
from medseg.preprocess import restore
from medseg.progress import Progress, silent
from medseg.records import Record, digest_file, digest_of, write_bytes, write_text
from medseg.sliding_window import slabs, tile_count
from medseg.volume import Mask

LOG_ROWS = 80
"""Rows of the log, evenly spread over the budget; fewer where there are fewer steps."""
VALIDATIONS = 8
"""How often some whole held-out cases are segmented and scored, the last time at the end; a divisor of ``LOG_ROWS``."""
VALIDATION_CASES = 8
"""How many of them: enough to see a trend; all are scored after training."""
VALIDATION_SHARE = 0.1
"""Part of a training that validation may take: where cases are large it scores fewer of them."""
VALIDATION_LIMIT = 0.5
"""Part of the time between two looks that the first case may take: where it is larger, none is scored."""
CHECKPOINT_SECONDS = 20.0
"""Time between checkpoints; more where that is less than ``CHECKPOINT_PAUSE`` times what writing one takes."""
CHECKPOINT_PAUSE = 20.0

CHECKPOINT, LOG, WEIGHTS, RESULT = "checkpoint.safetensors", "log.csv", "weights.safetensors", "result.json"
_WEIGHTS_NOT_FINITE = ("the weights are no longer finite", "finite weights", "lower plan.learning_rate")
_COLUMNS = ("iteration", "seconds", "loss", "learning_rate", "dice")


class TrainSettings(Record):
    """Choices of the person who trains.

    Attributes:
        device: ``auto`` takes a GPU where there is one; a device that is named and missing is an error.
        precision: ``auto`` is bfloat16 where the device multiplies it in hardware, else float16 on a GPU and float32
            on a CPU; ``16`` is not for a CPU. Weights, norms' statistics and the loss stay in float32.
        seed: of weights, batches and augmentation.
        deterministic: only deterministic kernels, also on a GPU.
        iterations: length in steps.
        epochs: length in passes: as many steps as there are training cases over the samples of a step.
        time_budget_s: length in seconds of training; learning rate and end follow the clock.
        accumulate: batches of one step: the gradient is the mean of theirs, in the memory of one. With a loss and norms
            that take each sample by itself (neither batch Dice nor batch norm), the step of a batch so many times
            larger.
        checkpointing: take less memory and more time: what the backward pass needs is computed again.
        patience: stop after so many validations without a better Dice, and keep the best weights; 0 never stops.

    At most one of ``iterations``, ``epochs`` and ``time_budget_s``; with none the plan's iterations.
    """

    device: str = "auto"
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    seed: int = Field(default=0, ge=0)
    deterministic: bool = False
    iterations: int | None = Field(default=None, gt=0)
    epochs: int | None = Field(default=None, gt=0)
    time_budget_s: float | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, gt=0)
    checkpointing: bool = False
    patience: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [n for n in ("iterations", "epochs", "time_budget_s") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"only one budget can hold; got {' and '.join(given)}")
        return self


def seconds_of(text: str) -> float:
    """A length of time as people write it, in seconds: ``90s``, ``10m``, ``1h30m``.

    Raises:
        InputError: it is none, has no unit, or is not longer than 0.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip())
    try:
        hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0, 0, 0)
    except ValueError:  # as 1.2.3s
        hours = minutes = seconds = 0.0
    if not (total := 3600 * hours + 60 * minutes + seconds) > 0:
        raise InputError("--time-budget", f"{text!r} is no length of time", "numbers with units, as 90s, 10m or 1h30m")
    return total


@dataclass(frozen=True)
class Budget:
    """When training ends: after ``iterations`` steps, or ``seconds`` of training."""

    iterations: int | None
    seconds: float | None

    @classmethod
    def of(cls, settings: TrainSettings, configuration: Configuration, cases: int) -> Budget:
        """The budget of the settings, or the plan's."""
        if settings.time_budget_s is not None:
            return cls(None, settings.time_budget_s)
        epoch = math.ceil(cases / (configuration.batch_size * settings.accumulate))
        if settings.epochs is not None:
            return cls(settings.epochs * epoch, None)
        return cls(settings.iterations or configuration.training.iterations, None)

    def done(self, iteration: int, seconds: float) -> float:
        """Fraction that is spent, 0 to 1."""
        spent = iteration / self.iterations if self.iterations else seconds / (self.seconds or 1.0)
        return min(1.0, spent)


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and where it is written.

    Attributes:
        plan, configuration: decide everything about the network and its recipe.
        cases: prepared, to train on.
        validation: held-out cases to look at now and then.
        folder: of the fold.
        settings: of the person who trains.
    """

    plan: Plan
    configuration: str
    cases: Sequence[PreparedCase]
    validation: Sequence[tuple[Case, PreparedCase]]
    folder: Path
    settings: TrainSettings

    @property
    def setup(self) -> Configuration:
        """The plan's configuration."""
        return self.plan.configuration(self.configuration)

    @cached_property
    def key(self) -> str:
        """Digest of all that was asked for: a finished training holds on any machine."""
        cases = [case.stem.name for case in (*self.cases, *(prepared for _, prepared in self.validation))]
        plan = self.plan.model_dump(
            mode="json", exclude={"labels": {"codings", "colours"}}
        )  # no weight depends on these
        return digest_of([plan, self.configuration, cases, self.settings.model_dump(mode="json")])

    @cached_property
    def checkpoint_key(self) -> str:
        """The same with what ``auto`` means on this machine: a training goes on only in the arithmetic it began in."""
        return digest_of([self.key, choose_device(self.settings.device).type, precision_of(self.settings)])

    def network(self) -> nn.Module:
        """The network, freshly initialised."""
        return build_network(
            self.setup, self.plan.inputs(self.setup), self.plan.outputs, checkpointing=self.settings.checkpointing
        )


def refuse_impossible(plan: Plan, configuration: str) -> None:
    """Build the network and the loss of a plan, without any memory, so that a typo is found before cases are prepared.

    Raises:
        PlanError: no such configuration, network or loss, or sizes that the network cannot have; regions, or a
            cascade, which can be imported and predict, but not be trained here.
    """
    setup = plan.configuration(configuration)
    if plan.region_order or setup.previous:
        what = "region_order" if plan.region_order else "previous"
        raise PlanError(f"plan.{what}", "is set", "a network of classes that sees the image alone, to be trained here")
    with torch.device("meta"):
        build_network(setup, plan.inputs(setup), plan.outputs)
    build_loss(setup.training.loss, batch=setup.batch_dice, ignore_index=plan.labels.ignore_index)


def train_fold(job: Job, progress: Progress = silent) -> FoldRecord:
    """Train one network.

    Writes to the job's folder: a checkpoint while it runs, ``log.csv``, TensorBoard events where that is installed,
    and at the end ``weights.safetensors`` and ``result.json`` (last). Called again after a kill, it goes on from the
    checkpoint; after its end, it returns the result.

    Raises:
        TrainingError: no case to train on, no class in any case, or a loss that is not finite.
        InputError: the device does not exist, or cannot train in the precision.
        PlanError: no such network or loss, or sizes that the network cannot have.
    """
    record = _finished(job)
    if record is None:
        if not any(case.coordinates for case in job.cases):
            raise TrainingError("training", f"no label in {len(job.cases)} training cases", "a class to learn")
        fabric = _fabric(job.settings)
        with _deterministic(job.settings.deterministic):
            torch.manual_seed(job.settings.seed)
            network = job.network()
            state = State(network, build_optimiser(network, job.setup.training))
            _loop(state, job, fabric, progress)
        record = _finish(state, job)
    (job.folder / CHECKPOINT).unlink(missing_ok=True)
    return record


def _loop(state: State, job: Job, fabric: Fabric, progress: Progress) -> None:
    """Step until the budget is spent: draw, forward, backward, clip, update, average; now and then look and save."""
    setup, training = job.setup, job.setup.training
    budget = Budget.of(job.settings, setup, len(job.cases))
    network, optimiser = fabric.setup(state.network, state.optimiser)
    if training.average:
        state.average = {name: tensor.detach().clone() for name, tensor in state.network.state_dict().items()}
    # now that all is on the device, where an optimiser loads its state
    resume(state, job.folder / CHECKPOINT, job.checkpoint_key)
    loss_of = _loss(job)
    groups = state.optimiser.param_groups
    rates = [group["lr"] for group in groups]
    start = time.monotonic() - state.seconds
    save_at = state.seconds + CHECKPOINT_SECONDS
    network.train()
    # On a CPU the network takes all cores; on a GPU threads draw the next batches meanwhile.
    workers = 0 if fabric.device.type == "cpu" else min(8, torch.get_num_threads())
    with (
        _tensorboard(job.folder, state.iteration) as writer,
        contextlib.closing(_batches(job, state.iteration, workers)) as source,
    ):
        while (before := budget.done(state.iteration, state.seconds)) < 1 and not _out_of_patience(state, job):
            losses = [float(row["loss"] or 0) for row in state.rows]
            factor = learning_rate_factor(training, state.iteration, before, losses)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
            optimiser.zero_grad()
            _seed_dropout(job.settings.seed, state.iteration)
            parts = []
            for batch in itertools.islice(source, job.settings.accumulate):
                loss = loss_of(network(batch.images.to(fabric.device)), batch.labels.to(fabric.device))
                parts.append(_finite(loss, state, batch))
                fabric.backward(loss / job.settings.accumulate)
            state.losses.append(float(np.mean(parts)))
            fabric.clip_gradients(network, optimiser, max_norm=training.gradient_clip, error_if_nonfinite=False)
            optimiser.step()
            _update_average(state, training.average)
            state.iteration += 1
            state.seconds = time.monotonic() - start
            done = budget.done(state.iteration, state.seconds)
            if _passes(before, done, LOG_ROWS):
                look = _passes(before, done, VALIDATIONS)
                _add_row(state, rates[0] * factor, _validate(state, job, budget, fabric.device) if look else None)
                _write_log(state, job.folder, writer)
                state.seconds = time.monotonic() - start
            progress("training", budget.done(state.iteration, state.seconds), _note(state))
            if state.seconds >= save_at:
                save_checkpoint(state, job.folder / CHECKPOINT, job.checkpoint_key)
                took = time.monotonic() - start - state.seconds
                save_at = state.seconds + max(CHECKPOINT_SECONDS, CHECKPOINT_PAUSE * took)


def _seed_dropout(seed: int, iteration: int) -> None:
    """Make what torch draws in a step, which is dropout, the same whatever was drawn before it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0]))


def _loss(job: Job) -> Callable[[Tensor | Sequence[Tensor], Tensor], Tensor]:
    """The loss of the plan."""
    ignore = job.plan.labels.ignore_index
    return build_loss(job.setup.training.loss, batch=job.setup.batch_dice, ignore_index=ignore)


def _batches(job: Job, step: int, workers: int) -> Generator[Batch, None, None]:
    """The batches from a step on: numbered from the first of the training, so that a step's are always the same."""
    labels = job.plan.labels
    target_of = build_target(job.setup.training.loss, classes=labels.count, ignore_index=labels.ignore_index)
    return batches(job.cases, job.setup, job.settings.seed, step * job.settings.accumulate, workers, target_of)


def _passes(before: float, done: float, parts: int) -> bool:
    """Whether a step went past one of so many even parts of the budget; those passed while validating are left out."""
    return math.floor(done * parts) > math.floor(before * parts)


def validation_dice(
    network: nn.Module, plan: Plan, setup: Configuration, case: Case, prepared: PreparedCase, device: torch.device
) -> float | None:
    """Mean Dice over the classes of one whole case at native spacing, by the path of prediction.

    None where neither the reference nor the prediction has any class.
    """
    if case.label is None:
        return None
    image = np.asarray(prepared.image, dtype=np.float32)
    trace = prepared.record.trace
    mask = Mask(restore(slabs([network], image, setup.patch_size, device=device), trace, plan), trace.native)
    reference = io.read_mask(case.label, plan.labels, mask)
    dices = [dice for dice in class_dice(mask.array, reference.array, plan.labels, case.id) if dice is not None]
    return float(np.mean(dices)) if dices else None


def _validate(state: State, job: Job, budget: Budget, device: torch.device) -> float | None:
    """Mean Dice of some whole cases with the weights that would be shipped.

    Raises:
        TrainingError: these are not finite.
    """
    weights = _shipped(state)
    if not _all_finite(weights.values()):
        raise TrainingError(f"step {state.iteration}", *_WEIGHTS_NOT_FINITE)
    network = job.network()
    network.load_state_dict(weights)
    network.to(device).eval()
    dices = [
        validation_dice(network, job.plan, job.setup, case, prepared, device)
        for case, prepared in _affordable(state, job, budget)
    ]
    known = [dice for dice in dices if dice is not None]
    dice = float(np.mean(known)) if known else None
    state.validations += 1
    if dice is not None and dice > state.best_dice:
        state.best_dice, state.best_validation = dice, state.validations
        if job.settings.patience:
            state.best = {name: tensor.clone() for name, tensor in on_host(weights).items()}
    return dice


def _affordable(state: State, job: Job, budget: Budget) -> list[tuple[Case, PreparedCase]]:
    """The validation cases that this look can pay for, in steps of training; with patience always one at least.

    A tile takes about a third of a training sample: it has no backward pass.
    """
    steps = budget.iterations or (budget.seconds or 0.0) * state.iteration / max(state.seconds, 1e-9)
    left = VALIDATION_SHARE * steps / VALIDATIONS
    chosen: list[tuple[Case, PreparedCase]] = []
    for case, prepared in job.validation[:VALIDATION_CASES]:
        tiles = tile_count(prepared.indices.shape, job.setup.patch_size)
        cost = tiles / (3 * job.setup.batch_size * job.settings.accumulate)
        first = not chosen and (job.settings.patience > 0 or cost <= VALIDATION_LIMIT * steps / VALIDATIONS)
        if not first and cost > left:
            break
        chosen.append((case, prepared))
        left -= cost
    return chosen


def _out_of_patience(state: State, job: Job) -> bool:
    """Whether the Dice has not risen for long; never where none could be measured."""
    patience = job.settings.patience
    return 0 < patience <= state.validations - state.best_validation and state.best_validation > 0


def _shipped(state: State) -> dict[str, Tensor]:
    """The weights that a package gets: the running average where the plan keeps one."""
    return state.average or state.network.state_dict()


def _update_average(state: State, decay: float) -> None:
    """Move the running average towards the weights; its memory grows with the training's length, up to ``decay``."""
    if not decay:
        return
    share = 1 - min(decay, (state.iteration + 1) / (state.iteration + 10))
    with torch.no_grad():
        for name, tensor in state.network.state_dict().items():
            if tensor.is_floating_point():
                state.average[name].lerp_(tensor, share)
            else:  # a batch norm's count of batches
                state.average[name].copy_(tensor)


def _finite(loss: Tensor, state: State, batch: Batch) -> float:
    """The loss as a number.

    Raises:
        TrainingError: it is not finite; with the likely cause.
    """
    value = float(loss.detach())
    if math.isfinite(value):
        return value
    cause, expected = "the forward pass overflowed", "a finite loss"
    remedy = "train with --precision 32, or lower plan.learning_rate"
    if not batch.images.isfinite().all():
        cause, expected, remedy = "the images of the batch are not finite", "finite images", "check the data"
    elif not _all_finite(state.network.parameters()):
        cause, expected, remedy = _WEIGHTS_NOT_FINITE
    raise TrainingError(f"step {state.iteration}", f"the loss is {value}: {cause}", expected, remedy)


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


class FinishedFold(Record):
    """What ``result.json`` holds: the fold, the digest of all that it was trained from, and that of its weights."""

    key: str
    weights_digest: str
    record: FoldRecord


def _finish(state: State, job: Job) -> FoldRecord:
    write_bytes(job.folder / WEIGHTS, safetensors.torch.save(on_host(state.best or _shipped(state))))
    record = FoldRecord(
        weights=WEIGHTS,
        seed=job.settings.seed,
        precision=precision_of(job.settings),
        iterations=state.iteration,
        seconds=round(state.seconds, 1),
        train_cases=len(job.cases),
        validation_cases=len(job.validation),
    )
    digest = digest_file(job.folder / WEIGHTS)
    FinishedFold(key=job.key, weights_digest=digest, record=record).save(job.folder / RESULT)
    return record


def _finished(job: Job) -> FoldRecord | None:
    """The result of an earlier call, if it is whole and of the same job."""
    try:
        result = FinishedFold.load(job.folder / RESULT)
        whole = digest_file(job.folder / WEIGHTS) == result.weights_digest
    except (InputError, OSError):
        return None
    return result.record if whole and result.key == job.key else None


# Device, time and logs


def _fabric(settings: TrainSettings) -> Fabric:
    device = choose_device(settings.device)
    names: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    devices = [device.index or 0] if device.type == "cuda" else 1
    if device.type == "cpu":
        keep_freed_memory()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it prints which precision it was told
    return Fabric(accelerator=device.type, devices=devices, precision=names[precision_of(settings)])


def precision_of(settings: TrainSettings) -> str:
    """The precision that is trained in: ``32``, ``bf16`` or ``16``.

    Raises:
        InputError: the device does not exist, or it is a CPU, which has no training in float16.
    """
    device = choose_device(settings.device)
    if settings.precision == "16" and device.type == "cpu":
        raise InputError("--precision", "16 is not for a CPU", "auto, 32 or bf16")
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if computes_bfloat16(device) else "16" if device.type == "cuda" else "32"


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic kernels while the block runs, if they are wanted, and the setting of before afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses matrix products on CUDA
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _add_row(state: State, rate: float, dice: float | None) -> None:
    loss = float(np.mean(state.losses))
    row = {"iteration": state.iteration, "seconds": round(state.seconds, 1), "loss": loss}
    state.rows.append({**row, "learning_rate": rate, "dice": dice})
    state.losses.clear()


def _note(state: State) -> str:
    """Step, loss and the last Dice, for the progress display."""
    losses = state.losses[-20:] or [float(row["loss"] or 0) for row in state.rows[-1:]]
    dices = [row["dice"] for row in state.rows if row["dice"] is not None]
    dice = f" Dice {dices[-1]:.3f}" if dices else ""
    return f"step {state.iteration} loss {np.mean(losses):.3f}{dice}"


def _write_log(state: State, folder: Path, writer: Any) -> None:
    """Write the whole log again: after a resume it has no row twice."""
    text = text_io.StringIO(newline="")
    table = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(state.rows)
    write_text(folder / LOG, text.getvalue())
    if writer is not None:
        row = state.rows[-1]
        for name in ("loss", "learning_rate", "dice"):
            if row[name] is not None:
                writer.add_scalar(name, row[name], row["iteration"])


@contextlib.contextmanager
def _tensorboard(folder: Path, iteration: int) -> Iterator[Any]:
    """A TensorBoard writer where that is installed, else None; what was written of later iterations is taken back."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TensorBoard's own dependencies
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1) as writer:
        yield writer
