"""A checkpoint brings back every bit, and one that is foreign or damaged in any way is not believed."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg.checkpoint import State, resume, save_checkpoint
from medseg.optimisers import build_optimiser
from medseg.plan import TrainingPlan


def fresh(optimiser: str = "adamw", seed: int = 0) -> State:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    plan = TrainingPlan(optimiser=optimiser, learning_rate=0.01, momentum=0.9)  # type: ignore[arg-type]
    average = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return State(network, build_optimiser(network, plan), average)


def stepped(state: State, steps: int) -> State:
    """After some steps on random images, with numbers of all kinds."""
    for step in range(steps):
        state.optimiser.zero_grad()
        images = torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(state.iteration + step))
        state.network(images).square().mean().backward()
        state.optimiser.step()
    state.iteration += steps
    return state


def used(optimiser: str = "adamw") -> State:
    state = stepped(fresh(optimiser), 3)
    state.seconds, state.validations, state.best_dice, state.best_validation = 1.1, 2, 0.1 + 0.2, 1
    state.losses = [0.1, 1 / 3]
    state.rows = [{"iteration": 2, "seconds": 0.7, "loss": 2 / 3, "learning_rate": 1e-3, "dice": None}]
    state.best = {name: tensor + 1 for name, tensor in state.average.items()}
    return state


def bits(state: State) -> dict[str, bytes]:
    """Every tensor of a state, as bytes."""
    tensors = {f"network.{n}": t for n, t in state.network.state_dict().items()}
    tensors |= {f"average.{n}": t for n, t in state.average.items()}
    tensors |= {f"best.{n}": t for n, t in state.best.items()}
    for index, kept in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{n}": t for n, t in kept.items()}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def numbers(state: State) -> list[object]:
    return [state.iteration, state.seconds, state.validations, state.best_dice, state.best_validation, state.losses,
            state.rows]  # fmt: skip


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "muon"])
def test_everything_comes_back(optimiser: str, tmp_path: Path) -> None:
    state, again = used(optimiser), fresh(optimiser, seed=1)
    save_checkpoint(state, tmp_path / "checkpoint", "key")
    assert resume(again, tmp_path / "checkpoint", "key")
    assert bits(again) == bits(state)
    assert numbers(again) == numbers(state)
    assert bits(stepped(again, 4)) == bits(stepped(state, 4)), "and the optimiser goes on alike"


def test_none_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = fresh()
    before = bits(state)
    assert not resume(state, tmp_path / "checkpoint", "key")
    assert bits(state) == before
    assert not caplog.records, "nothing is amiss"


def refused(path: Path, key: str = "key") -> None:
    """Not taken, and the state is as if there had been no file."""
    state = fresh()
    before = bits(state), numbers(state)
    assert not resume(state, path, key)
    assert (bits(state), numbers(state)) == before


def test_of_another_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(used(), tmp_path / "checkpoint", "one")
    refused(tmp_path / "checkpoint", "two")
    assert "other data, settings or version: training starts anew" in caplog.text


def test_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(used(), tmp_path / "checkpoint", "key")
    monkeypatch.setattr("medseg.__version__", "999.0")
    refused(tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def content() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(used(), Path(folder) / "checkpoint", "key")
        return (Path(folder) / "checkpoint").read_bytes()


def refused_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoint").write_bytes(content)
        refused(Path(folder) / "checkpoint")


@settings(max_examples=200)
@given(data=st.data())
def test_one_flipped_bit(content: bytes, data: st.DataObject) -> None:
    header = 8 + int.from_bytes(content[:8], "little")  # half of the examples there: the numbers stand in it
    place = data.draw(st.integers(0, header - 1) | st.integers(header, len(content) - 1))
    flipped = bytearray(content)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    refused_bytes(bytes(flipped))


@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_short(content: bytes, share: float) -> None:
    refused_bytes(content[: int(len(content) * share)])


def test_damage_is_said(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="medseg")
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content[:-1])
    refused(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(path)
    path.unlink()
    path.mkdir()
    refused(path)
    said = [record.message for record in caplog.records]
    assert len(said) == 3
    assert all("checkpoint.safetensors is damaged" in line and "training starts anew" in line for line in said)
