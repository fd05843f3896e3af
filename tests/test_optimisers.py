"""Optimisers: Muon's two kinds of steps, resuming bit for bit, and the schedules by hand."""

from __future__ import annotations

import copy
import math
from statistics import fmean
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from medseg.networks import UNet
from medseg.optimisers import (
    ADAM_LEARNING_RATE,
    PLATEAU_ROWS,
    Muon,
    build_optimiser,
    learning_rate_factor,
    orthogonalised,
    plateau_factor,
)
from medseg.plan import TrainingPlan
from medseg.train import LOG_ROWS

Name = Literal["sgd", "adam", "adamw", "muon"]


def tensor(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(1e-5, 1e5), st.integers(0, 1000))
def test_an_orthogonalised_matrix_moves_all_directions_alike(rows: int, columns: int, scale: float, seed: int) -> None:
    """Singular values from 1 to 1/4 of the largest all come near to 1, and the directions stay."""
    u, _, vh = torch.linalg.svd(tensor(rows, columns, seed=seed), full_matrices=False)
    values = torch.linspace(1, 0.25, len(vh))
    found = orthogonalised(scale * (u * values) @ vh)
    assert found.shape == (rows, columns)
    spectrum = torch.linalg.svdvals(found)
    assert spectrum.min() > 0.6
    assert spectrum.max() < 1.3
    torch.testing.assert_close(u.T @ found @ vh.T, torch.diag((u.T @ found @ vh.T).diag()), atol=1e-4, rtol=0)


def test_zero_stays_zero() -> None:
    assert not orthogonalised(torch.zeros(3, 5)).any()


def test_muon_by_hand() -> None:
    """A kernel whose gradient is (3, 0; 0, 1) moves by the learning rate times nearly the unit matrix."""
    kernel = nn.Parameter(torch.zeros(2, 2, 1))
    optimiser = Muon([kernel], [], lr=0.1, momentum=0.9, weight_decay=0.0)
    kernel.grad = torch.tensor([[3.0, 0.0], [0.0, 1.0]])[..., None]
    optimiser.step()
    # Momentum 0.1 g, Nesterov 0.1 g + 0.9 * 0.1 g: in the direction of g, of which only the direction matters
    torch.testing.assert_close(kernel.detach()[..., 0], -0.1 * orthogonalised(torch.diag(torch.tensor([3.0, 1.0]))))
    assert (-kernel.detach()[..., 0].diagonal() / 0.1 - 1).abs().max() < 0.35


def test_a_tall_kernel_moves_further() -> None:
    """Eight outputs of two inputs: the update is scaled by sqrt(8 / 2)."""
    kernel = nn.Parameter(torch.zeros(8, 2, 1))
    kernel.grad = tensor(8, 2, 1)
    Muon([kernel], [], lr=1.0, momentum=0.9, weight_decay=0.0).step()
    torch.testing.assert_close(kernel.detach()[..., 0], -2 * orthogonalised(kernel.grad[..., 0]))


def test_the_rest_takes_adamws_steps() -> None:
    ours, theirs = nn.Parameter(tensor(7)), nn.Parameter(tensor(7))
    muon = Muon([], [ours], lr=0.5, momentum=0.95, weight_decay=0.01)
    adamw = AdamW([theirs], lr=ADAM_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(5):
        ours.grad, theirs.grad = tensor(7, seed=step), tensor(7, seed=step)
        muon.step()
        adamw.step()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_first_step_of_adamw_by_hand() -> None:
    """The first step is the sign of the gradient times the learning rate, whatever the gradient's size."""
    bias = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    bias.grad = torch.tensor([1000.0, -0.01, 0.0])
    Muon([], [bias], lr=0.5, momentum=0.9, weight_decay=0.0).step()
    expected = [1 - ADAM_LEARNING_RATE, 1 + ADAM_LEARNING_RATE, 1.0]
    assert bias.tolist() == pytest.approx(expected, abs=1e-6)


def test_decay_shrinks_all_alike() -> None:
    kernel, bias = nn.Parameter(torch.ones(2, 2, 1)), nn.Parameter(torch.ones(2))
    kernel.grad, bias.grad = torch.zeros(2, 2, 1), torch.zeros(2)
    Muon([kernel], [bias], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert kernel.flatten().tolist() == pytest.approx([1 - 0.1 * 0.5] * 4)
    assert bias.tolist() == pytest.approx([1 - ADAM_LEARNING_RATE * 0.5] * 2)


def test_a_parameter_without_gradient_stays() -> None:
    kernel = nn.Parameter(torch.ones(2, 2, 1))
    Muon([kernel], [], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert (kernel == 1).all()


def plan(name: Name, **more: Any) -> TrainingPlan:
    rates: dict[Name, float] = {"sgd": 0.01, "adam": 0.01, "adamw": 0.01, "muon": 0.02}
    return TrainingPlan(optimiser=name, learning_rate=rates[name], momentum=0.9, **more)


def step(network: nn.Module, optimiser: torch.optim.Optimizer, number: int) -> float:
    x = tensor(2, 1, 8, 8, seed=number)
    loss = (network(x) - torch.cat([x, -x], dim=1)).square().mean()
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_a_loss_goes_down(name: Name) -> None:
    torch.manual_seed(0)
    network = UNet(2, 1, 2, features=(4, 4))
    optimiser = build_optimiser(network, plan(name))
    losses = [step(network, optimiser, number) for number in range(60)]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_training_goes_on_bit_for_bit(name: Name) -> None:
    torch.manual_seed(0)
    network = UNet(2, 1, 2, features=(4, 4))
    optimiser = build_optimiser(network, plan(name))
    for number in range(3):
        step(network, optimiser, number)
    other = copy.deepcopy(network)
    resumed = build_optimiser(other, plan(name))
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for number in range(3, 6):
        step(network, optimiser, number)
        step(other, resumed, number)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_which_parameters_muon_takes() -> None:
    network = UNet(2, 1, 2, features=(4, 4, 4), deep_supervision=True)
    optimiser = build_optimiser(network, plan("muon"))
    kernels = {id(p) for p in optimiser.param_groups[0]["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in kernels}
    every = {name for name, p in network.named_parameters() if p.ndim > 2}
    assert every - names == {"encoder.0.0.conv.weight", "heads.0.weight", "heads.1.weight"}
    assert all(p.ndim > 2 for p in optimiser.param_groups[0]["params"])
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(list(network.parameters()))


def test_settings_of_the_plan_arrive() -> None:
    network = nn.Conv2d(1, 1, 3)
    sgd = build_optimiser(network, TrainingPlan(optimiser="sgd", learning_rate=0.3, momentum=0.8, weight_decay=0.1))
    assert isinstance(sgd, SGD)
    assert {key: sgd.defaults[key] for key in ("lr", "momentum", "weight_decay", "nesterov")} == {
        "lr": 0.3,
        "momentum": 0.8,
        "weight_decay": 0.1,
        "nesterov": True,
    }
    adamw = build_optimiser(network, TrainingPlan(optimiser="adamw", learning_rate=0.3, momentum=0.8))
    assert isinstance(adamw, AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.99)
    adam = build_optimiser(network, TrainingPlan(optimiser="adam", learning_rate=0.3, momentum=0.8, weight_decay=0.1))
    assert isinstance(adam, Adam)
    assert not isinstance(adam, AdamW)
    assert {key: adam.defaults[key] for key in ("lr", "betas", "weight_decay", "decoupled_weight_decay")} == {
        "lr": 0.3,
        "betas": (0.8, 0.999),
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
    }


@pytest.mark.parametrize(
    ("schedule", "done", "expected"),
    [
        ("poly", 0.0, 1.0),
        ("poly", 0.5, 0.5**0.9),
        ("poly", 1.0, 0.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 1 / 3, 0.75),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 0.0),
        ("linear", 0.25, 0.75),
        ("step", 0.0, 1.0),
        ("step", 0.33, 1.0),
        ("step", 10 / 30, 0.1),
        ("step", 0.66, 0.1),
        ("step", 20 / 30, 0.01),
        ("step", 1.0, 0.01),
        ("linear", 1.5, 0.0),  # past the end, as a clock may be
        ("poly", -0.1, 1.0),
    ],
)
def test_schedules_by_hand(schedule: Any, done: float, expected: float) -> None:
    assert learning_rate_factor(TrainingPlan(schedule=schedule), 100, done) == pytest.approx(expected)


def test_warm_up_by_hand() -> None:
    plan = TrainingPlan(schedule="linear", warmup=4)
    assert [learning_rate_factor(plan, n, 0.0) for n in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert learning_rate_factor(plan, 1, 0.5) == pytest.approx(0.25)
    assert math.isclose(learning_rate_factor(TrainingPlan(schedule="linear"), 0, 0.0), 1.0)


def rows_of(*looks: float) -> list[float]:
    """Losses of a log of which each four rows have this mean."""
    return [loss for look in looks for loss in (look, look + 0.5, look - 0.25, look - 0.25)]


def test_a_plateau_by_hand() -> None:
    """Five looks without gain are taken, the sixth is too many, and a gain starts the count anew."""
    falling, flat = (3.0, 2.0, 1.0), (1.0,)
    for enough in ((), falling, (*falling, *flat * 5), (*falling, *flat * 5, 0.5, *flat * 5)):
        assert plateau_factor(rows_of(*enough)) == 1
    assert plateau_factor(rows_of(*falling, *flat * 6)) == pytest.approx(0.1)
    assert plateau_factor(rows_of(*falling, *flat * 11)) == pytest.approx(0.1)
    assert plateau_factor(rows_of(*falling, *flat * 12)) == pytest.approx(0.01)
    assert plateau_factor(rows_of(*falling, *flat * 6)[:-1]) == 1, "a look takes four rows"
    assert plateau_factor(rows_of(*(1 - n * 1e-5 for n in range(7)))) == pytest.approx(0.1), "gains of 1e-5 are none"
    assert plateau_factor(rows_of(*flat * 99)) == 1e-3


def test_a_whole_log_has_twenty_looks_and_falls_three_times_at_most() -> None:
    factors = [plateau_factor([1.0] * rows) for rows in range(LOG_ROWS + 1)]
    falls = [rows for rows in range(1, LOG_ROWS + 1) if factors[rows] < factors[rows - 1]]
    assert falls == [28, 52, 76], "at the looks 7, 13 and 19"
    assert LOG_ROWS / PLATEAU_ROWS == 20


def test_a_few_noisy_batches_are_no_plateau() -> None:
    """A loss that falls by a quarter over 80 steps, under noise of as much."""
    noise = [0.25 * (-1) ** n for n in range(80)]
    losses = [1 - 0.25 * n / 80 + noise[n] for n in range(80)]
    assert plateau_factor(losses) == 1


@given(st.lists(st.floats(-2, 2) | st.sampled_from([0.5, 0.49999, 0.4]), max_size=160))
def test_a_plateau_is_torchs_on_the_means(losses: list[float]) -> None:
    optimiser = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = ReduceLROnPlateau(optimiser, factor=0.1, patience=5, min_lr=1e-3, eps=0)
    for end in range(4, len(losses) + 1, 4):
        theirs.step(fmean(losses[end - 4 : end]))
    assert plateau_factor(losses) == pytest.approx(optimiser.param_groups[0]["lr"])


def test_the_rate_on_a_plateau_follows_the_losses_and_the_warm_up() -> None:
    plan = TrainingPlan(schedule="plateau", warmup=4)
    assert learning_rate_factor(plan, 1, 0.9, [1.0] * 28) == pytest.approx(0.5 * 0.1)
    assert learning_rate_factor(plan, 100, 0.9) == 1
