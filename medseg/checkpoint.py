"""Checkpoint: all that changes while training, in one safetensors file that a killed training goes on from.

The tensors are weights, their running average, the best weights and the optimiser's state; the numbers stand in the
file's header as JSON. Batches are functions of seed and iteration, so there is no random state to keep.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from medseg.records import write_bytes

log = logging.getLogger(__name__)

_NUMBERS = ("iteration", "seconds", "validations", "best_dice", "best_validation", "losses", "rows")
_TENSORS = ("network", "average", "best", "optimiser")


@dataclass
class State:
    """The state of a training.

    Attributes:
        network, optimiser: being trained.
        average: running average of the weights, by name; empty where none is kept.
        iteration: steps done.
        seconds: spent in training, all runs together.
        validations: looks at whole cases so far.
        best_dice, best_validation: of them, and which it was.
        best: the weights then; empty where they are not wanted.
        losses: since the last row.
        rows: of the log.
    """

    network: nn.Module
    optimiser: Optimizer
    average: dict[str, Tensor]
    iteration: int = 0
    seconds: float = 0.0
    validations: int = 0
    best_dice: float = -1.0
    best_validation: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    rows: list[dict[str, float | int | None]] = field(default_factory=list)


def save_checkpoint(state: State, path: Path, key: str) -> None:
    """Write a checkpoint, atomically. ``key`` is the digest of what is trained on what, and how."""
    tensors = {f"network.{name}": tensor for name, tensor in state.network.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in state.average.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    for index, kept in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in kept.items()}
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    content = safetensors.torch.save(on_host(tensors), {"key": key, "state": json.dumps(numbers)})
    write_bytes(path, content)


def resume(state: State, path: Path, key: str) -> bool:
    """Bring a fresh state to where a checkpoint of the same training stood; whether there was one.

    A missing or damaged file, or one of a training with another key, leaves the state as it is.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        return False
    except (OSError, safetensors.SafetensorError) as failure:
        log.warning("%s is damaged (%s): training starts anew", path.name, failure)
        return False
    if header.get("key") != key:
        log.warning("%s belongs to a training with other data or settings: training starts anew", path.name)
        return False
    for name, value in json.loads(header["state"]).items():
        setattr(state, name, value)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _TENSORS}
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
    log.info("training goes on from step %d", state.iteration)
    return True


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors as safetensors wants them: detached, contiguous, in main memory."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
