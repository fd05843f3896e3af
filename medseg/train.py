"""Training of one fold: one readable loop on Lightning Fabric.

Batches are functions of seed and iteration, so a training that was killed goes on from its last checkpoint to the same
weights, bit for bit on a CPU (with a budget in iterations or epochs; a budget in time depends on the clock).
"""

from __future__ import annotations

import csv
import io as text_io
import json
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from lightning_fabric import Fabric
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from medseg import io
from medseg.dataset import Case
from medseg.engines import choose_device, keep_freed_memory
from medseg.errors import InputError, TrainingError
from medseg.losses import build_loss
from medseg.metrics import score_pair
from medseg.networks import build_network
from medseg.optimisers import build_optimiser, learning_rate_factor
from medseg.package import FoldRecord
from medseg.patches import Batch, PreparedCase, batches
from medseg.plan import Configuration, Plan
from medseg.preprocess import restore
from medseg.progress import Progress, silent
from medseg.records import Record, digest_of, write_bytes, write_text
from medseg.sliding_window import slabs

log = logging.getLogger(__name__)

VALIDATIONS = 8
"""How often in a training some whole validation cases are segmented and scored."""
VALIDATION_CASES = 8
"""How many of them: enough to see a trend; all are scored after training."""
CHECKPOINT_SECONDS = 20.0
"""Time between checkpoints; more where writing one takes over a twentieth of that."""

CHECKPOINT, LOG, WEIGHTS, RESULT = "checkpoint.safetensors", "log.csv", "weights.safetensors", "result.json"
_COLUMNS = ("iteration", "seconds", "loss", "learning_rate", "dice")


class TrainSettings(Record):
    """Choices of the person who trains.

    Attributes:
        device: ``auto`` takes a GPU where there is one; a device that is named and missing is an error.
        precision: ``auto`` is float32 on a CPU, and on a GPU bfloat16 where it has that, else float16.
        seed: of weights, batches and augmentation.
        deterministic: only deterministic kernels, also on a GPU.
        iterations: length in steps.
        epochs: length in passes: as many steps as there are training cases over the batch size.
        time_budget_s: length in seconds of training; learning rate and end follow the clock.
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
    patience: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [n for n in ("iterations", "epochs", "time_budget_s") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"only one budget can hold; got {' and '.join(given)}")
        return self


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
        epoch = math.ceil(cases / configuration.batch_size)
        if settings.epochs is not None:
            return cls(settings.epochs * epoch, None)
        return cls(settings.iterations or configuration.training.iterations, None)

    def done(self, iteration: int, seconds: float) -> float:
        """Fraction that is spent, 0 to 1."""
        spent = iteration / self.iterations if self.iterations else seconds / (self.seconds or 1.0)
        return min(1.0, spent)


@dataclass
class State:
    """All that changes while training; what a checkpoint holds."""

    network: nn.Module
    optimiser: Optimizer
    average: dict[str, Tensor]
    iteration: int = 0
    seconds: float = 0.0
    validations: int = 0
    best_dice: float = -1.0
    best_validation: int = 0
    losses: list[float] = field(default_factory=list)
    rows: list[dict[str, float | int | None]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def train_fold(
    plan: Plan,
    configuration: str,
    train_cases: Sequence[PreparedCase],
    validation: Sequence[tuple[Case, PreparedCase]],
    folder: Path,
    settings: TrainSettings,
    progress: Progress = silent,
) -> FoldRecord:
    """Train the network of a plan's configuration on prepared cases.

    Writes to ``folder``: a checkpoint while it runs, ``log.csv``, TensorBoard events where that is installed, and at the
    end ``weights.safetensors`` and ``result.json`` (last). Called again after a kill, it goes on from the checkpoint;
    after its end, it returns the result.

    Raises:
        TrainingError: no case to train on, no class in any case, or a loss that is not finite.
        InputError: the device does not exist.
    """
    setup = plan.configuration(configuration)
    key = digest_of(
        [plan.digest(), configuration, [c.stem.name for c in train_cases], settings.model_dump(mode="json")]
    )
    if (finished := _finished(folder, key)) is not None:
        return finished
    if not any(case.coordinates for case in train_cases):
        raise TrainingError("training", f"no label in {len(train_cases)} training cases", "a class to learn")
    fabric = _fabric(settings)
    budget = Budget.of(settings, setup, len(train_cases))
    with _reproducible(settings):
        state = _new_state(plan, setup, settings)
        _resume(state, folder / CHECKPOINT, key)
        _to_device(state, fabric)
        _loop(state, plan, setup, train_cases, validation, folder, fabric, budget, settings, key, progress)
    return _finish(state, folder, key, settings, len(train_cases), len(validation))


def _loop(
    state: State,
    plan: Plan,
    setup: Configuration,
    train_cases: Sequence[PreparedCase],
    validation: Sequence[tuple[Case, PreparedCase]],
    folder: Path,
    fabric: Fabric,
    budget: Budget,
    settings: TrainSettings,
    key: str,
    progress: Progress,
) -> None:
    """Step until the budget is spent: draw, forward, backward, clip, update, average; now and then look and save."""
    network, optimiser = fabric.setup(state.network, state.optimiser)
    levels = len(setup.network.features) - 1 if setup.network.deep_supervision else 1
    loss_of = build_loss("dice_ce", batch=setup.batch_dice, ignore_index=plan.labels.ignore_index, levels=levels)
    rates = [group["lr"] for group in optimiser.param_groups]
    writer = _tensorboard(folder)
    source = batches(train_cases, setup, settings.seed, state.iteration, workers=_workers(fabric.device))
    clock = _Clock(state.seconds)
    saved_at, saving_took = clock.seconds(), 0.0
    network.train()
    while budget.done(state.iteration, state.seconds) < 1 and not _out_of_patience(state, settings):
        batch = next(source)
        done = budget.done(state.iteration, state.seconds)
        factor = learning_rate_factor(setup.training, state.iteration, done)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        loss = loss_of(network(batch.images.to(fabric.device)), batch.labels.to(fabric.device))
        state.losses.append(_finite(loss, state, batch))
        optimiser.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(network, optimiser, max_norm=setup.training.gradient_clip, error_if_nonfinite=False)
        optimiser.step()
        _update_average(state, setup.training.average)
        state.iteration += 1
        state.seconds = clock.seconds()
        done = budget.done(state.iteration, state.seconds)
        progress("training", done, f"step {state.iteration} loss {np.mean(state.losses[-50:]):.3f}{_dice_note(state)}")
        if done >= (state.validations + 1) / VALIDATIONS:
            state.validations = int(done * VALIDATIONS)
            dice = _validate(state, plan, setup, validation[:VALIDATION_CASES], fabric.device)
            _note_validation(state, rates[0] * factor, dice, settings)
            _write_log(state, folder, writer)
            state.seconds = clock.seconds()
        if clock.seconds() - saved_at > max(CHECKPOINT_SECONDS, 20 * saving_took):
            before = clock.seconds()
            _save_checkpoint(state, folder / CHECKPOINT, key)
            saved_at = clock.seconds()
            saving_took = saved_at - before
    source.close()  # type: ignore[attr-defined]
    if writer is not None:
        writer.close()


def validation_dice(
    network: nn.Module, plan: Plan, setup: Configuration, case: Case, prepared: PreparedCase, device: torch.device
) -> float | None:
    """Mean Dice over the classes of one whole case at native spacing, by the path that prediction takes.

    None where neither the reference nor the prediction has any class.
    """
    image = np.asarray(prepared.image, dtype=np.float32)
    finished = slabs([network], image, setup.patch_size, device=device)
    mask = restore(finished, prepared.record.trace, plan.labels)
    if case.label is None:
        return None
    reference = io.read_mask(case.label, plan.labels)
    scores = score_pair(mask, reference.array, reference.geometry, plan.labels, tolerance_mm=1.0, where=case.id)
    dices = [score.dice for score in scores if score.dice is not None]
    return float(np.mean(dices)) if dices else None


def _validate(
    state: State,
    plan: Plan,
    setup: Configuration,
    validation: Sequence[tuple[Case, PreparedCase]],
    device: torch.device,
) -> float | None:
    """Mean Dice of some whole cases with the weights that would be shipped."""
    if not validation:
        return None
    network = build_network(setup, len(plan.channels), plan.labels.count)
    network.load_state_dict(_shipped(state))
    network.to(device).eval()
    dices = [validation_dice(network, plan, setup, case, prepared, device) for case, prepared in validation]
    known = [dice for dice in dices if dice is not None]
    return float(np.mean(known)) if known else None


def _note_validation(state: State, rate: float, dice: float | None, settings: TrainSettings) -> None:
    state.rows.append(
        {
            "iteration": state.iteration,
            "seconds": round(state.seconds, 1),
            "loss": float(np.mean(state.losses)),
            "learning_rate": rate,
            "dice": dice,
        }
    )
    state.losses.clear()
    if dice is not None and dice > state.best_dice:
        state.best_dice, state.best_validation = dice, state.validations
        if settings.patience:
            state.best = {name: tensor.detach().cpu().clone() for name, tensor in _shipped(state).items()}


def _out_of_patience(state: State, settings: TrainSettings) -> bool:
    return bool(settings.patience) and state.validations - state.best_validation >= settings.patience


def _shipped(state: State) -> Mapping[str, Tensor]:
    """The weights that a package gets: the running average where the plan keeps one."""
    return state.average or state.network.state_dict()


def _update_average(state: State, decay: float) -> None:
    """Move the running average towards the weights; its memory grows with the training's length, up to ``decay``."""
    if not decay:
        return
    share = 1 - min(decay, (state.iteration + 1) / (state.iteration + 10))
    with torch.no_grad():
        for name, tensor in state.network.state_dict().items():
            state.average[name].lerp_(tensor, share)


def _finite(loss: Tensor, state: State, batch: Batch) -> float:
    value = float(loss)
    if math.isfinite(value):
        return value
    weights = all(bool(p.isfinite().all()) for p in state.network.parameters())
    images = bool(batch.images.isfinite().all())
    cause = (
        "the images of this batch hold values that are not finite: check the data"
        if not images
        else "the weights are no longer finite: lower plan.training.learning_rate"
        if not weights
        else "the forward pass overflowed: use --precision 32"
    )
    raise TrainingError(f"iteration {state.iteration}", f"the loss is {value}; {cause}", "a finite loss")


# Starting, resuming, ending


def _new_state(plan: Plan, setup: Configuration, settings: TrainSettings) -> State:
    torch.manual_seed(settings.seed)
    network = build_network(setup, len(plan.channels), plan.labels.count)
    average = {n: t.detach().clone() for n, t in network.state_dict().items()} if setup.training.average else {}
    return State(network, build_optimiser(network, setup.training), average)


def _to_device(state: State, fabric: Fabric) -> None:
    state.average = {name: tensor.to(fabric.device) for name, tensor in state.average.items()}


def _save_checkpoint(state: State, path: Path, key: str) -> None:
    """Everything a training needs to go on, as one safetensors file whose header holds the numbers."""
    tensors = {f"network.{name}": tensor for name, tensor in state.network.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in state.average.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    for index, kept in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in kept.items()}
    numbers = {
        name: getattr(state, name)
        for name in ("iteration", "seconds", "validations", "best_dice", "best_validation", "losses", "rows")
    }
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(ready, {"key": key, "state": json.dumps(numbers)}))


def _resume(state: State, path: Path, key: str) -> None:
    """Go on from a checkpoint of the same training; start anew where there is none or it belongs to another."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, safetensors.SafetensorError):
        return
    if header.get("key") != key:
        log.warning("%s belongs to a training with other data or settings: starting anew", path.name)
        return
    for name, value in json.loads(header["state"]).items():
        setattr(state, name, value)
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "best": {}, "optimiser": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    state.network.load_state_dict(parts["network"])
    state.average, state.best = parts["average"], parts["best"]
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimiser"].items():
        index, _, rest = name.partition(".")
        kept.setdefault(int(index), {})[rest] = tensor
    groups = state.optimiser.state_dict()["param_groups"]
    state.optimiser.load_state_dict({"state": kept, "param_groups": groups})
    log.info("going on from step %d", state.iteration)


def _finish(
    state: State, folder: Path, key: str, settings: TrainSettings, train_cases: int, validation_cases: int
) -> FoldRecord:
    weights = {n: t.detach().cpu().contiguous() for n, t in (state.best or _shipped(state)).items()}
    write_bytes(folder / WEIGHTS, safetensors.torch.save(weights))
    record = FoldRecord(
        weights=WEIGHTS,
        seed=settings.seed,
        iterations=state.iteration,
        seconds=round(state.seconds, 1),
        train_cases=train_cases,
        validation_cases=validation_cases,
    )
    FinishedFold(key=key, record=record).save(folder / RESULT)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return record


class FinishedFold(Record):
    """What ``result.json`` holds: the fold, and the digest of all that it was trained from."""

    key: str
    record: FoldRecord


def _finished(folder: Path, key: str) -> FoldRecord | None:
    try:
        result = FinishedFold.load(folder / RESULT)
        safetensors.torch.load_file(folder / WEIGHTS)
    except (InputError, OSError, safetensors.SafetensorError):
        return None
    return result.record if result.key == key else None


# Device, time and logs


def _fabric(settings: TrainSettings) -> Fabric:
    device = choose_device(settings.device)
    precision = settings.precision
    if precision == "auto":
        precision = "32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "16"
    names: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    devices = [device.index or 0] if device.type == "cuda" else 1
    if device.type == "cpu":
        keep_freed_memory()
    return Fabric(accelerator=device.type, devices=devices, precision=names[precision])


def _workers(device: torch.device) -> int:
    """Threads that draw batches ahead: on a CPU none, as the network takes all its cores."""
    return 0 if device.type == "cpu" else min(8, torch.get_num_threads())


class _Clock:
    """Seconds of training, all runs together; the monotonic clock does not jump."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start


class _reproducible:  # noqa: N801 - a context manager used as a function
    """Deterministic kernels for the time of a training, and the global setting back afterwards."""

    def __init__(self, settings: TrainSettings) -> None:
        self.wanted = settings.deterministic

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.wanted or self.before)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)


def _dice_note(state: State) -> str:
    known = [row["dice"] for row in state.rows if row["dice"] is not None]
    return f" Dice {known[-1]:.3f}" if known else ""


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


def _tensorboard(folder: Path) -> Any:
    """A TensorBoard writer where TensorBoard is installed, else None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TensorBoard's own dependencies
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
