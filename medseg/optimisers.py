"""Optimisers and learning-rate schedules, by the names that a plan uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from medseg.plan import TrainingPlan

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ADAM_LEARNING_RATE = 2e-3
"""Of the parameters that ``Muon`` leaves to AdamW."""


class Muon(Optimizer):
    """Momentum whose update of each convolution kernel is made its nearest orthogonal matrix; AdamW for the rest.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (kellerjordan.github.io/posts/muon):
    the momentum, seen as a matrix out_channels x (in_channels * kernel voxels), is orthogonalised by five
    Newton-Schulz steps with the quintic coefficients given there, and scaled by sqrt(max(1, rows / columns)). Where
    gradients are few, as in a training of minutes, this makes each of them move all directions of a kernel. Biases,
    norms, the first and the last layer are left to AdamW, as advised there.

    Args:
        kernels: parameters of two dimensions or more, to be orthogonalised.
        others: parameters for AdamW, with learning rate ``ADAM_LEARNING_RATE`` times the same schedule.
        lr: learning rate of the kernels: the size of an update in spectral norm.
        momentum: decay of the running gradient (Nesterov form).
        weight_decay: decoupled, for all.
    """

    def __init__(
        self, kernels: Iterable[Tensor], others: Iterable[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        shared = {"momentum": momentum, "weight_decay": weight_decay}
        groups = [
            {"params": list(kernels), "lr": lr, "orthogonal": True},
            {"params": list(others), "lr": ADAM_LEARNING_RATE, "orthogonal": False},
        ]
        super().__init__([group for group in groups if group["params"]], shared)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; what ``closure`` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    move = self._orthogonal_move if group["orthogonal"] else self._adam_move
                    parameter.add_(move(parameter, group["momentum"]), alpha=-group["lr"])
        return loss

    def _orthogonal_move(self, parameter: Tensor, momentum: float) -> Tensor:
        running = self._running(parameter, "momentum").lerp_(parameter.grad, 1 - momentum)  # type: ignore[arg-type]
        matrix = parameter.grad.lerp(running, momentum).flatten(1)  # type: ignore[union-attr]
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        move: Tensor = orthogonalised(matrix).view_as(parameter) * scale
        return move

    def _adam_move(self, parameter: Tensor, momentum: float) -> Tensor:
        """AdamW's step (Loshchilov and Hutter 2019) with betas (0.9, 0.99)."""
        first, second, steps = (self._running(parameter, name) for name in ("first", "second", "steps"))
        steps += 1
        first.lerp_(parameter.grad, 0.1)  # type: ignore[arg-type]
        second.lerp_(parameter.grad.square(), 0.01)  # type: ignore[union-attr]
        return (first / (1 - 0.9**steps)) / ((second / (1 - 0.99**steps)).sqrt() + 1e-8)

    def _running(self, parameter: Tensor, name: str) -> Tensor:
        """A tensor kept for a parameter between steps, zeros at first; ``steps`` is a single number."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros((), device=parameter.device) if name == "steps" else torch.zeros_like(parameter)
        kept: Tensor = state[name]
        return kept


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest matrix with orthonormal rows (or columns): singular values end between 0.7 and 1.2.

    A zero matrix stays zero.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix.float() / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = (x.T if tall else x).to(matrix.dtype)
    return result


def build_optimiser(network: nn.Module, plan: TrainingPlan) -> Optimizer:
    """The optimiser of a plan over all parameters of a network."""
    parameters = dict(network.named_parameters())
    rate, momentum, decay = plan.learning_rate, plan.momentum, plan.weight_decay
    if plan.optimiser == "sgd":
        return SGD(parameters.values(), rate, momentum, weight_decay=decay, nesterov=momentum > 0)
    if plan.optimiser == "adam":
        return Adam(parameters.values(), rate, (momentum, 0.999), weight_decay=decay)
    if plan.optimiser == "adamw":
        return AdamW(parameters.values(), rate, (momentum, 0.99), weight_decay=decay)
    first = next(iter(parameters))
    kernels = [p for name, p in parameters.items() if p.ndim > 2 and name != first and not name.startswith("heads.")]
    chosen = {id(p) for p in kernels}
    return Muon(kernels, (p for p in parameters.values() if id(p) not in chosen), rate, momentum, decay)


def _poly(done: float) -> float:
    return float((1 - done) ** 0.9)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(done: float) -> float:
    return 1 - done


def _step(done: float) -> float:
    return float(0.1 ** min(math.floor(3 * done), 2))


SCHEDULES: dict[str, Callable[[float], float]] = {"poly": _poly, "cosine": _cosine, "linear": _linear, "step": _step}
"""Fraction of the budget that is done (0 to 1) -> fraction of the learning rate; ``plateau`` looks at the losses."""

PLATEAU_ROWS = 4
"""Losses whose mean a plateau looks at: of the 80 rows of a log, so 20 looks, each at a twentieth of the budget."""
PLATEAU_PATIENCE = 5
"""Looks without gain that a plateau takes; the next one makes the learning rate a tenth: at most three in a budget."""
_PLATEAU_GAIN = 1e-4  # relative; smaller gains are none
_PLATEAU_FLOOR = 1e-3


def plateau_factor(losses: Sequence[float]) -> float:
    """Fraction of the learning rate after these losses: a tenth for each time that they stopped falling, 1e-3 at least.

    The rule of torch's ReduceLROnPlateau (factor 0.1, patience 5, other settings its defaults) on the means of each
    ``PLATEAU_ROWS`` losses, as one row of a short training is a few noisy batches. A function of all losses so far, the
    oldest first, so that a training that goes on has nothing to remember but its log. 1 for none.
    """
    factor, best, without_gain = 1.0, math.inf, 0
    for end in range(PLATEAU_ROWS, len(losses) + 1, PLATEAU_ROWS):
        loss = fmean(losses[end - PLATEAU_ROWS : end])
        if loss < best * (1 - _PLATEAU_GAIN):
            best, without_gain = loss, 0
        else:
            without_gain += 1
        if without_gain > PLATEAU_PATIENCE:
            factor, without_gain = max(factor * 0.1, _PLATEAU_FLOOR), 0
    return factor


def learning_rate_factor(plan: TrainingPlan, iteration: int, done: float, losses: Sequence[float] = ()) -> float:
    """Fraction of the learning rate at an iteration.

    Args:
        plan: with schedule and warm-up.
        iteration: steps done.
        done: part of the budget that is spent, 0 to 1.
        losses: mean training losses of even parts of the budget (the rows of the log), the oldest first; for
            ``plateau``.
    """
    warm = min(1.0, (iteration + 1) / plan.warmup) if plan.warmup else 1.0
    if plan.schedule == "plateau":
        return warm * plateau_factor(losses)
    return warm * SCHEDULES[plan.schedule](min(max(done, 0.0), 1.0))
