"""Optimisers and learning-rate schedules, by the names that a plan uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from medseg.plan import TrainingPlan

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ADAM_LEARNING_RATE = 2e-3


class Muon(Optimizer):
    """Momentum whose update for each convolution kernel is replaced by its nearest orthogonal matrix.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (kellerjordan.github.io/posts/muon):
    the momentum, seen as a matrix out_channels x (in_channels * kernel voxels), is orthogonalised by five
    Newton-Schulz steps with the quintic coefficients given there, and scaled by sqrt(max(1, rows / columns)). Where
    gradients are few, as in a training of minutes, this makes each of them move all directions of a kernel. Biases, norms,
    first and last layers are left to AdamW, as advised there.

    Args:
        kernels: parameters of two dimensions or more.
        lr: learning rate; it is the size of the update in spectral norm.
        momentum: decay of the running gradient (Nesterov form).
        weight_decay: decoupled.
    """

    def __init__(self, kernels: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(kernels, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every kernel that has a gradient; ``closure`` is not supported."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                running = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                running.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(running, group["momentum"]).flatten(1))
                rows, columns = update.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = max(1.0, rows / columns) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest matrix with orthonormal rows (or columns): singular values end between 0.7 and 1.2.

    A zero matrix stays zero.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def build_optimisers(network: nn.Module, plan: TrainingPlan) -> list[Optimizer]:
    """The optimisers of a plan: one, or for ``muon`` that and AdamW for what is no inner kernel."""
    parameters = dict(network.named_parameters())
    if plan.optimiser == "sgd":
        return [
            SGD(parameters.values(), plan.learning_rate, plan.momentum, weight_decay=plan.weight_decay, nesterov=True)
        ]
    if plan.optimiser == "adamw":
        betas = (plan.momentum, 0.99)
        return [AdamW(parameters.values(), plan.learning_rate, betas, weight_decay=plan.weight_decay)]
    outer = {next(iter(parameters)), *(name for name in parameters if name.startswith("heads."))}
    inner = {name for name, p in parameters.items() if p.ndim > 2 and name not in outer}
    kernels = [p for name, p in parameters.items() if name in inner]
    rest = [p for name, p in parameters.items() if name not in inner]
    return [
        Muon(kernels, plan.learning_rate, plan.momentum, plan.weight_decay),
        AdamW(rest, _ADAM_LEARNING_RATE, (0.9, 0.99), weight_decay=plan.weight_decay),
    ]


def _poly(done: float) -> float:
    return float((1 - done) ** 0.9)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(done: float) -> float:
    return 1 - done


SCHEDULES: dict[str, Callable[[float], float]] = {"poly": _poly, "cosine": _cosine, "linear": _linear}
"""Fraction of the budget that is done (0 to 1) -> fraction of the learning rate."""


def learning_rate_factor(plan: TrainingPlan, iteration: int, done: float) -> float:
    """Fraction of each optimiser's learning rate at an iteration, with ``done`` of the budget spent."""
    warm = min(1.0, (iteration + 1) / plan.warmup) if plan.warmup else 1.0
    return warm * SCHEDULES[plan.schedule](min(max(done, 0.0), 1.0))
