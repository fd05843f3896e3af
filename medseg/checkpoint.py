"""Checkpoint: all that changes while training, in one safetensors file that a killed training goes on from.

The tensors are weights, their running average, the best weights and the optimiser's state; the numbers stand in the
file's header as JSON, with a digest of all of it, as safetensors has none. Batches and dropout are drawn from
seed and iteration at each step, so no random state has to be kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import medseg
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
    average: dict[str, Tensor] = field(default_factory=dict)
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
    tensors, text = on_host(tensors), json.dumps(numbers)
    header = {"key": key, "version": medseg.__version__, "state": text, "digest": _digest(tensors, text)}
    write_bytes(path, safetensors.torch.save(tensors, header))


def resume(state: State, path: Path, key: str) -> bool:
    """Bring a fresh state to where a checkpoint of the same training stood; whether there was one.

    A missing or damaged file, or one of a training with another key or version of medseg, leaves the state as it is.
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
    text = header.get("state", "")
    if header.get("digest") != _digest(tensors, text):
        log.warning("%s is damaged (its digest differs): training starts anew", path.name)
        return False
    if header.get("key") != key or header.get("version") != medseg.__version__:
        log.warning("%s belongs to a training with other data, settings or version: training starts anew", path.name)
        return False
    for name, value in json.loads(text).items():
        setattr(state, name, value)
    _load(state, tensors)
    log.info("training goes on from step %d", state.iteration)
    return True


def _load(state: State, tensors: dict[str, Tensor]) -> None:
    """Give tensors back to where ``save_checkpoint`` took them from, on the device that these are on."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _TENSORS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    state.network.load_state_dict(parts["network"])
    for name, tensor in parts["average"].items():
        state.average[name].copy_(tensor)
    state.best = parts["best"]
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimiser"].items():
        index, _, rest = name.partition(".")
        kept.setdefault(int(index), {})[rest] = tensor
    groups = state.optimiser.state_dict()["param_groups"]
    state.optimiser.load_state_dict({"state": kept, "param_groups": groups})


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 (hex) over contiguous tensors in main memory, with names, types and shapes, and a text."""
    total = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors as safetensors wants them: detached, contiguous, in main memory."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
