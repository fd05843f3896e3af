"""Training: what ends it, what interrupts it, what it ships, and that it learns."""

from __future__ import annotations

import csv
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg import checkpoint, io, optimisers, patches, train
from medseg.dataset import Dataset
from medseg.errors import InputError, PlanError, TrainingError
from medseg.evaluate import evaluate_cases
from medseg.losses import LOSSES
from medseg.package import FoldRecord, load_package, save_package
from medseg.patches import Batch, PreparedCase, prepare_cases
from medseg.pipeline import RunResult
from medseg.plan import Plan
from medseg.planning import override_plan
from medseg.predict import Predictor
from medseg.train import LOG, WEIGHTS, Budget, Job, TrainSettings, seconds_of, train_fold, validation_dice

NAME = "3d_fullres"
Progress = Callable[[str, float, str], None]


class Stop(Exception):
    """What a test interrupts a training with."""


@pytest.fixture(scope="module")
def tiny_job(phantom_dataset: Path, tiny_run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Six steps on fold 0 of the phantom; its folder is to be replaced."""
    return job_of(phantom_dataset, tiny_run.out, tmp_path_factory.mktemp("unused"), 6)


def job_of(dataset: Path, run: Path, folder: Path, iterations: int) -> Job:
    """A job on the prepared cases of a run."""
    data, plan = Dataset.open(dataset), Plan.load(run / "plan.json")
    prepared = {case.id: case for case in prepare_cases(data, plan, NAME, run / "prepared" / NAME)}
    fold = data.folds()[0]
    return Job(
        override_plan(plan, ["plan.augmentation=none"], NAME)[0],
        NAME,
        [prepared[case] for case in fold.train],
        [(data.case(case), prepared[case]) for case in fold.validation],
        folder,
        TrainSettings(iterations=iterations, device="cpu"),
    )


def planned(job: Job, **fields: Any) -> Job:
    """The job with other plan settings."""
    return replace(job, plan=override_plan(job.plan, [f"plan.{k}={v}" for k, v in fields.items()], NAME)[0])


def chosen(job: Job, **choices: Any) -> Job:
    """The job with other settings."""
    return replace(job, settings=TrainSettings(**{"device": "cpu", **choices}))


def into(job: Job, folder: Path) -> Job:
    return replace(job, folder=folder)


def stop_at(step: int) -> Progress:
    """A progress that ends the training when it hears of a step: before that step's checkpoint."""

    def progress(work: str, fraction: float, note: str) -> None:
        if note.startswith(f"step {step} "):
            raise Stop

    return progress


def trained(job: Job, folder: Path, *stops: int) -> bytes:
    """The weights after a training that was interrupted at each of ``stops``."""
    for step in stops:
        with pytest.raises(Stop):
            train_fold(into(job, folder), stop_at(step))
    train_fold(into(job, folder))
    return (folder / WEIGHTS).read_bytes()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / LOG).open(newline="") as file:
        return list(csv.DictReader(file))


# ---- interrupted -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Save after each step; the steps at which a training went on."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(train, "CHECKPOINT_PAUSE", 0.0)
    went_on = []

    def resume(state: checkpoint.State, path: Path, key: str) -> bool:
        found = checkpoint.resume(state, path, key)
        went_on.append(state.iteration)
        return found

    monkeypatch.setattr(train, "resume", resume)
    return went_on


@pytest.mark.parametrize("average", [0, 0.9])
@pytest.mark.parametrize(("optimiser", "stop"), [("sgd", 3), ("adam", 5), ("adamw", 7), ("muon", 4)])
def test_interrupted_training_gives_the_same_weights(
    tiny_job: Job,
    optimiser: str,
    stop: int,
    average: float,
    saving: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(train, "VALIDATIONS", 4)
    monkeypatch.setattr(train, "VALIDATION_CASES", 1)
    job = planned(chosen(tiny_job, iterations=8, patience=3), optimiser=optimiser, average=average, learning_rate=0.01)
    whole = trained(job, tmp_path / "whole")
    assert trained(job, tmp_path / "broken", stop) == whole
    assert saving == [0, 0, stop - 1], "it went on from the step before"
    assert [row["iteration"] for row in rows(tmp_path / "broken")] == [str(n) for n in range(1, 9)]


def test_interrupted_training_on_a_plateau_with_accumulation_gives_the_same_weights(
    tiny_job: Job, saving: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plateau knows of the losses before the interruption: the learning rate falls at the same steps."""
    monkeypatch.setattr(optimisers, "PLATEAU_PATIENCE", 0)
    monkeypatch.setattr(optimisers, "PLATEAU_ROWS", 2)
    monkeypatch.setattr(optimisers, "_PLATEAU_GAIN", 0.5)  # no look halves the loss
    job = planned(chosen(tiny_job, iterations=8, accumulate=2), schedule="plateau", loss="boundary", warmup=0)
    whole = trained(job, tmp_path / "whole")
    assert trained(job, tmp_path / "broken", 3, 6) == whole
    assert saving == [0, 0, 2, 5]
    tables = [[row | {"seconds": ""} for row in rows(tmp_path / name)] for name in ("whole", "broken")]
    assert tables[0] == tables[1]
    rates, losses = ([float(row[name]) for row in tables[0]] for name in ("learning_rate", "loss"))
    expected = [job.setup.training.learning_rate * optimisers.plateau_factor(losses[:n]) for n in range(8)]
    assert rates == pytest.approx(expected)
    assert rates[-1] < rates[0], "it did fall"


def test_interrupted_training_with_dropout_gives_the_same_weights(
    tiny_job: Job, saving: list[int], tmp_path: Path
) -> None:
    """What is left out in a step does not depend on what was drawn before it, in this training or another."""
    job = planned(chosen(tiny_job, iterations=6, accumulate=2), dropout=0.2)
    whole = trained(job, tmp_path / "whole")
    assert trained(job, tmp_path / "broken", 2, 5) == whole
    assert saving == [0, 0, 1, 4]
    assert trained(planned(job, dropout=0), tmp_path / "without") != whole


def test_every_step_leaves_out_others() -> None:
    drawn = set()
    for seed, iteration in ((0, 0), (0, 1), (1, 0), (1, 1)):
        train._seed_dropout(seed, iteration)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 4


def test_interrupted_anywhere_and_often(tiny_job: Job, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(train, "CHECKPOINT_PAUSE", 0.0)
        patch.setattr(train, "VALIDATIONS", 2)
        patch.setattr(train, "VALIDATION_CASES", 1)
        job = planned(chosen(tiny_job, iterations=5, patience=1), augmentation="light")
        whole = trained(job, tmp_path)

        @settings(max_examples=5)
        @given(stops=st.lists(st.integers(1, 5), min_size=1, max_size=2, unique=True).map(sorted))
        def same(stops: list[int]) -> None:
            with tempfile.TemporaryDirectory() as folder:
                assert trained(job, Path(folder), *stops) == whole

        same()


_CHILD = """
import runpy, sys
from pathlib import Path
from medseg import train
train.CHECKPOINT_SECONDS = train.CHECKPOINT_PAUSE = 0.0
job_of = runpy.run_path(sys.argv[1])["job_of"]
job = job_of(*map(Path, sys.argv[2:]), 16)
train.train_fold(job, lambda work, fraction, note: print(note, flush=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL")
def test_killed_training_gives_the_same_weights(
    phantom_dataset: Path, tiny_run: RunResult, tiny_job: Job, tmp_path: Path
) -> None:
    job = into(chosen(tiny_job, iterations=16), tmp_path / "killed")
    threads = str(torch.get_num_threads())  # sums in other parts round differently
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, __file__, phantom_dataset, tiny_run.out, job.folder],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            if line.startswith(b"step 9 "):
                child.kill()
                break
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert (job.folder / "checkpoint.safetensors").exists()
    assert not (job.folder / WEIGHTS).exists()
    assert trained(job, job.folder) == trained(job, tmp_path / "whole")
    assert not (job.folder / "checkpoint.safetensors").exists()
    assert len(rows(job.folder)) == len({row["iteration"] for row in rows(job.folder)}) == 16


def test_log_and_tensorboard_have_no_row_twice(tiny_job: Job, saving: list[int], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The row of step 5 is written before the checkpoint of step 5: it is written again after the resume.
    trained(chosen(tiny_job, iterations=9), tmp_path, 5, 7)
    assert [int(row["iteration"]) for row in rows(tmp_path)] == list(range(1, 10))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))


def test_a_checkpoint_of_another_job_or_a_damaged_one_is_not_used(
    tiny_job: Job, saving: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = chosen(tiny_job, iterations=4)
    whole = trained(job, tmp_path / "whole")
    with pytest.raises(Stop):
        train_fold(into(chosen(tiny_job, iterations=4, seed=1), tmp_path / "other"), stop_at(3))
    assert trained(job, tmp_path / "other") == whole
    assert "belongs to a training with other data, settings" in caplog.text
    with pytest.raises(Stop):
        train_fold(into(job, tmp_path / "flipped"), stop_at(3))
    path = tmp_path / "flipped" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    assert trained(job, tmp_path / "flipped") == whole
    assert "is damaged" in caplog.text
    assert saving == [0, 0, 0, 0, 0]


def test_a_checkpoint_belongs_to_the_arithmetic_of_its_machine(tiny_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a training in bfloat16 would go on in float32 on another processor; once finished, it holds everywhere."""
    keys, begun = set(), set()
    for able in (False, True):
        monkeypatch.setattr(train, "computes_bfloat16", lambda device, able=able: able)
        job = chosen(tiny_job, iterations=4)
        keys.add(job.key)
        begun.add(job.checkpoint_key)
    monkeypatch.setattr(train, "choose_device", lambda name: torch.device("cuda", 1))
    job = chosen(tiny_job, iterations=4)
    keys.add(job.key)
    begun.add(job.checkpoint_key)
    assert (len(keys), len(begun)) == (1, 3)


def test_half_precision_is_not_for_a_cpu(tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric would silently train in bfloat16."""
    settings = TrainSettings(device="cpu", precision="16")
    with pytest.raises(InputError, match=r"--precision: 16 is not for a CPU \(expected auto, 32 or bf16\)"):
        train_fold(into(replace(tiny_job, settings=settings), tmp_path))
    monkeypatch.setattr(train, "choose_device", lambda name: torch.device("cuda"))
    assert train.precision_of(settings) == "16"


def test_a_finished_training_is_kept_and_a_damaged_result_is_not(tiny_job: Job, tmp_path: Path) -> None:
    job = into(chosen(tiny_job, iterations=2), tmp_path)
    record = train_fold(job)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"left by a kill between the result and its removal")
    assert train_fold(job, stop_at(1)) == record
    assert not (tmp_path / "checkpoint.safetensors").exists()
    content = (tmp_path / WEIGHTS).read_bytes()
    for damage in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        (tmp_path / WEIGHTS).write_bytes(damage)
        with pytest.raises(Stop):
            train_fold(job, stop_at(1))
    assert trained(job, tmp_path) == content


def test_the_seed_decides(tiny_job: Job, tmp_path: Path) -> None:
    weights = [
        trained(chosen(tiny_job, iterations=2, seed=seed), tmp_path / name)
        for name, seed in zip("abc", (1, 1, 2), strict=True)
    ]
    assert weights[0] == weights[1] != weights[2]


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_two_batches_of_a_step_are_one_of_twice_the_size(
    tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With Dice of each sample; batches 0 and 1 make the first step, 2 and 3 the second."""
    job = planned(tiny_job, optimiser="sgd", batch_dice="false", average=0, gradient_clip=1e9, learning_rate=0.1)
    trained(chosen(job, iterations=2, accumulate=2, precision="32"), tmp_path / "two")

    def joined(*arguments: Any) -> Iterator[Batch]:
        drawn = patches.batches(*arguments)
        while True:
            first, second = next(drawn), next(drawn)
            yield Batch(*(torch.cat([a, b]) for a, b in ((first.images, second.images), (first.labels, second.labels))))

    monkeypatch.setattr(train, "batches", joined)
    trained(chosen(job, iterations=2, precision="32"), tmp_path / "one")
    before = {name: tensor.clone() for name, tensor in started(job).items()}
    two, one = (safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("two", "one"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    assert any((one[name] - before[name]).abs().max() > 1e-3 for name in one), "a step that can be seen"
    assert [float(row["loss"]) for row in rows(tmp_path / "two")] == pytest.approx(
        [float(row["loss"]) for row in rows(tmp_path / "one")], abs=1e-5
    )


def started(job: Job) -> dict[str, torch.Tensor]:
    """The weights that a job starts from."""
    torch.manual_seed(job.settings.seed)
    return job.network().state_dict()


def test_the_steps_of_a_training_that_accumulates_are_counted_in_steps(tiny_job: Job, tmp_path: Path) -> None:
    setup = tiny_job.setup.model_copy(update={"batch_size": 3})
    assert Budget.of(TrainSettings(epochs=4, accumulate=2), setup, 7) == Budget(8, None), "4 passes of 6 and 1 samples"
    assert Budget.of(TrainSettings(iterations=5, accumulate=2), setup, 7) == Budget(5, None)
    assert train_fold(into(chosen(tiny_job, iterations=3, accumulate=3), tmp_path)).iterations == 3
    assert [row["iteration"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_checkpointing_changes_the_memory_alone(tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert chosen(tiny_job, iterations=2).key != chosen(tiny_job, iterations=2, checkpointing=True).key
    build, calls = train.build_network, []

    def counting(*arguments: Any, **named: Any) -> Any:
        network: Any = build(*arguments, **named)
        network.encoder[0].register_forward_pre_hook(lambda stage, _: calls.append(1) if stage.training else None)
        return network

    monkeypatch.setattr(train, "build_network", counting)
    for name, wanted, expected in (("with", True, 4), ("without", False, 2)):
        calls.clear()
        trained(chosen(tiny_job, iterations=2, checkpointing=wanted), tmp_path / name)
        assert len(calls) == expected, "two steps; with checkpointing the backward pass computes the stage again"
    first, second = (safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("with", "without"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(tiny_job: Job, name: str, tmp_path: Path) -> None:
    job = into(planned(chosen(tiny_job, iterations=2), loss=name, optimiser="adam"), tmp_path)
    train_fold(job)
    before, after = started(job), safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert any((after[key] - before[key]).abs().max() > 1e-6 for key in after)


@pytest.mark.parametrize(
    ("name", "strides", "untrained"),
    [
        ("unet", "[[1,1,1],[1,2,2]]", []),  # one level alone, in a list
        ("unet", "[[1,1,1],[1,2,2],[2,2,2]]", ["heads.1"]),  # the coarsest of several has the weight 0
        ("unet_plus_plus", "[[1,1,1],[1,2,2],[2,2,2]]", []),
    ],
)
def test_deep_supervision_trains_the_levels(
    tiny_job: Job, name: str, strides: str, untrained: list[str], tmp_path: Path
) -> None:
    job = planned(
        chosen(tiny_job, iterations=2),
        **{"network.name": name, "strides": strides, "features": [4, 8, 8][: strides.count("],") + 1]},
        deep_supervision="true",
        optimiser="adam",
        weight_decay=0,
        average=0,
    )
    train_fold(into(job, tmp_path))
    before, after = started(job), safetensors.torch.load_file(tmp_path / WEIGHTS)
    heads = {key.rpartition(".")[0] for key in before if key.startswith("heads.")}
    assert [h for h in sorted(heads) if torch.equal(before[f"{h}.weight"], after[f"{h}.weight"])] == untrained


def test_a_loss_that_does_not_exist_is_refused(tiny_job: Job, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no loss 'mse'"):
        train_fold(into(planned(tiny_job, loss="mse"), tmp_path))


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_budgets_by_hand(tiny_job: Job) -> None:
    setup = tiny_job.setup.model_copy(update={"batch_size": 3})
    assert Budget.of(TrainSettings(epochs=4), setup, 7) == Budget(12, None), "4 passes of 3 batches, the last not full"
    assert Budget.of(TrainSettings(iterations=5), setup, 7) == Budget(5, None)
    assert Budget.of(TrainSettings(time_budget_s=9), setup, 7) == Budget(None, 9)
    assert Budget.of(TrainSettings(), setup, 7) == Budget(setup.training.iterations, None)
    assert Budget(8, None).done(2, 1e9) == 0.25
    assert Budget(None, 8).done(10**9, 2) == 0.25
    assert Budget(None, 8).done(1, 9) == 1.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("1h1m1s", 3661), (" 2m ", 120)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["10", "", "soon", "-5m", "0s", "5m1h", "1.2.3s", "10 m s", "1d"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="90s, 10m or 1h30m"):
        seconds_of(text)


@pytest.mark.parametrize("two", [{"iterations": 1, "epochs": 1}, {"epochs": 1, "time_budget_s": 1.0}])
def test_two_budgets_are_refused(two: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"only one budget can hold; got \w+ and \w+"):
        TrainSettings.checked(two, "command line")


def test_epochs(tiny_job: Job, tmp_path: Path) -> None:
    record = train_fold(into(chosen(tiny_job, epochs=3), tmp_path))
    assert record.iterations == 6, "4 cases, 2 a batch, 3 times"
    assert record.train_cases == 4
    assert record.validation_cases == 2


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that each look puts on by a second."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=monotonic))
    return now


def test_a_time_budget_ends_in_time_with_the_rate_at_zero(
    tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock(monkeypatch)
    monkeypatch.setattr(train, "LOG_ROWS", 10)
    monkeypatch.setattr(train, "VALIDATIONS", 2)
    monkeypatch.setattr(train, "validation_dice", lambda *_: 0.5)
    job = planned(chosen(tiny_job, time_budget_s=60.0), schedule="linear", warmup=0, learning_rate=0.01)
    record = train_fold(into(job, tmp_path))
    table = rows(tmp_path)
    # A step takes a second, a row one more, a look at two cases three more: none takes a tenth of the budget.
    assert 60 <= record.seconds <= 65
    assert len(table) == 10
    assert [row["dice"] for row in table] == ["", "", "", "", "0.5", "", "", "", "", "0.5"]
    rates = [float(row["learning_rate"]) for row in table]
    assert rates == pytest.approx([0.01 * (1 - n / 10) for n in range(1, 11)], abs=0.01 * 3 / 60), "a line to zero"


@pytest.mark.parametrize(
    ("budget", "patience", "expected"),
    [
        (Budget(800, None), 0, 1),  # 800 steps * 0.1 / 8 looks = 10 steps a look: one case of 10
        (Budget(1600, None), 0, 2),
        (Budget(None, 400.0), 0, 1),  # at 0.5 s a step that is 800 steps
        (Budget(400, None), 0, 1),  # 5 steps are not enough, but 10 are less than half of the 50 between two looks
        (Budget(100, None), 0, 0),
        (Budget(100, None), 3, 1),  # patience has to see something
    ],
)
def test_validation_takes_its_share_and_no_more(
    tiny_job: Job, monkeypatch: pytest.MonkeyPatch, budget: Budget, patience: int, expected: int
) -> None:
    monkeypatch.setattr(train, "tile_count", lambda *_: 60)  # of a third of a sample each: 10 steps of batch 2
    two = [*tiny_job.validation, *tiny_job.validation][:2]
    job = replace(chosen(tiny_job, iterations=4, patience=patience), validation=two)
    state = train.State(torch.nn.Identity(), torch.optim.SGD([torch.zeros(1)]), iteration=100, seconds=50.0)
    assert len(train._affordable(state, job, budget)) == expected


def test_a_time_budget_goes_on_where_it_stopped(
    tiny_job: Job, monkeypatch: pytest.MonkeyPatch, saving: list[int], tmp_path: Path
) -> None:
    now = clock(monkeypatch)
    job = into(chosen(tiny_job, time_budget_s=30.0), tmp_path)
    with pytest.raises(Stop):
        train_fold(job, stop_at(6))
    now[0] += 1e6  # a pause of days
    record = train_fold(job)
    assert saving[1] == 5
    assert 30 <= record.seconds <= 45


# ---- what stops it ---------------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, dices: list[float | None]) -> list[dict[str, torch.Tensor]]:
    """Let validation give these Dice (one case a look); the weights that each look saw."""
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(train, "VALIDATION_CASES", 1)

    def dice(network: torch.nn.Module, *_: object) -> float | None:
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return dices[len(seen) - 1]

    monkeypatch.setattr(train, "validation_dice", dice)
    return seen


@pytest.mark.parametrize("average", [0, 0.9])
def test_patience_stops_and_ships_the_best(
    tiny_job: Job, average: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = scripted(monkeypatch, [0.3, 0.5, 0.4, None, 0.5, 0.9, 0.9, 0.9])
    job = planned(chosen(tiny_job, iterations=16, patience=3), average=average)
    record = train_fold(into(job, tmp_path))
    assert len(seen) == 5, "the fifth look is the third without gain; equal is no gain"
    assert record.iterations == 10
    shipped = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(shipped[name], seen[1][name]) for name in seen[1])
    assert not all(torch.equal(seen[0][name], seen[1][name]) for name in seen[1])


def test_without_patience_the_last_weights_are_shipped(
    tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "VALIDATION_LIMIT", math.inf)
    seen = scripted(monkeypatch, [0.3, 0.9, 0.4, 0.1])
    train_fold(into(chosen(tiny_job, iterations=4), tmp_path))
    shipped = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert len(seen) == 4, "each of four steps passes two of eight parts"
    assert all(torch.equal(shipped[name], seen[3][name]) for name in shipped)
    assert [float(row["dice"]) for row in rows(tmp_path)] == [0.3, 0.9, 0.4, 0.1]


def test_patience_waits_where_no_dice_can_be_measured(
    tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = scripted(monkeypatch, [None] * 8)
    assert train_fold(into(chosen(tiny_job, iterations=8, patience=1), tmp_path)).iterations == 8
    shipped = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(shipped[name], seen[7][name]) for name in shipped)


def test_loss_that_is_not_finite_by_the_images(tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> Iterator[Batch]:
        images = torch.zeros(2, 1, 8, 16, 16)
        images[0, 0, 0, 0, 0] = torch.nan
        yield Batch(images, torch.zeros(2, 1, 8, 16, 16, dtype=torch.uint8))

    monkeypatch.setattr(train, "batches", broken)
    with pytest.raises(TrainingError, match=r"step 0: the loss is nan: the images .* not finite .*Check the data"):
        train_fold(into(tiny_job, tmp_path))


def test_loss_that_is_not_finite_by_the_weights(tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def diverge(state: checkpoint.State, decay: float) -> None:
        torch.nn.init.constant_(next(state.network.parameters()), torch.inf)

    monkeypatch.setattr(train, "_update_average", diverge)  # the last thing of a step
    job = planned(tiny_job, average=0)
    what = r"the weights are no longer finite \(expected finite weights\). Lower plan.learning_rate"
    for budget, where in ((20, "step 1: the loss is nan: "), (1, "step 1: ")):  # by the next loss, or at the end
        with pytest.raises(TrainingError, match=where + what):
            train_fold(replace(job, folder=tmp_path, settings=TrainSettings(iterations=budget, device="cpu")))
        assert not (tmp_path / WEIGHTS).exists()


def test_loss_that_is_not_finite_by_overflow(tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train, "build_loss", lambda *_, **__: lambda logits, labels: logits.exp().sum() * 1e38 * 1e38)
    with pytest.raises(TrainingError, match=r"the loss is inf: the forward pass overflowed .*--precision 32"):
        train_fold(into(tiny_job, tmp_path))


def without_labels(case: PreparedCase) -> PreparedCase:
    bare = PreparedCase(case.stem, case.record)
    bare.__dict__["coordinates"] = {}  # as if read
    return bare


def test_nothing_to_learn(tiny_job: Job, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no label in 4 training cases"):
        train_fold(into(replace(tiny_job, cases=[without_labels(case) for case in tiny_job.cases]), tmp_path))
    with pytest.raises(TrainingError, match="no label in 0 training cases"):
        train_fold(into(replace(tiny_job, cases=[]), tmp_path))


def test_a_device_that_is_not_there(tiny_job: Job, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'cuda:99' is not there"):
        train_fold(into(chosen(tiny_job, iterations=1, device="cuda:99"), tmp_path))
    with pytest.raises(InputError, match="device"):
        train_fold(into(chosen(tiny_job, iterations=1, device="abacus"), tmp_path))


# ---- surroundings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "warn_only"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_is_set_for_the_training_alone(
    tiny_job: Job, wanted: bool, before: bool, warn_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    found = []

    def look(*_: object) -> None:
        flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        found.append(flags)
        raise Stop

    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    try:
        with pytest.raises(Stop):
            train_fold(into(chosen(tiny_job, iterations=1, deterministic=wanted), tmp_path), look)
        assert found == [(True, False) if wanted else (before, warn_only)]
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_tensorboard(tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train_fold(into(tiny_job, tmp_path))
    assert not (tmp_path / "tensorboard").exists()
    assert len(rows(tmp_path)) == 6


def test_progress_and_log(
    tiny_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "VALIDATION_LIMIT", math.inf)
    told: list[tuple[str, float, str]] = []
    train_fold(into(tiny_job, tmp_path), lambda *news: told.append(news))
    assert [fraction for _, fraction, _ in told] == pytest.approx([n / 6 for n in range(1, 7)])
    assert all(work == "training" and note.startswith("step ") and " loss " in note for work, _, note in told)
    assert " Dice 0." in told[-1][2]
    assert list(rows(tmp_path)[0]) == ["iteration", "seconds", "loss", "learning_rate", "dice"]
    assert capsys.readouterr() == ("", "")


# ---- learning, and what is measured ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tiny_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A training on one case, of which it can learn each voxel."""
    job = planned(
        chosen(tiny_job, iterations=100),
        features="[8,16,16]",
        augmentation="none",
        optimiser="adamw",
        learning_rate=0.03,
        average=0.9,
        warmup=5,
        foreground=0.5,
    )
    case, prepared = job.validation[0]
    job = replace(job, cases=[prepared], validation=[(case, prepared)], folder=tmp_path_factory.mktemp("learned"))
    train_fold(job)
    return job


def test_it_learns(learned: Job) -> None:
    dices = [float(row["dice"]) for row in rows(learned.folder) if row["dice"]]
    assert len(dices) == train.VALIDATIONS
    assert dices[-1] > 0.8, dices


def test_validation_is_prediction(learned: Job, tmp_path: Path) -> None:
    case, prepared = learned.validation[0]
    record = FoldRecord(weights="", seed=0, iterations=1, seconds=1, train_cases=1, validation_cases=1)
    weights = (learned.folder / WEIGHTS).read_bytes()
    save_package(tmp_path / "package", "tiny", learned.plan, NAME, {0: record}, {0: weights}, {})
    predictor = Predictor(load_package(tmp_path / "package"))
    mask = predictor(list(case.images))
    io.write_mask(mask, tmp_path / "mask.nii.gz")
    assert case.label is not None
    measured = evaluate_cases([(case.id, tmp_path / "mask.nii.gz", case.label)], learned.plan.labels).mean.dice
    network = load_package(tmp_path / "package").networks()[0]
    dice = validation_dice(network, learned.plan, learned.setup, case, prepared, torch.device("cpu"))
    assert measured is not None
    # The prepared image is stored in half precision: a voxel between two classes may fall to the other side.
    assert dice == pytest.approx(measured, abs=0.01)
    last = [row["dice"] for row in rows(learned.folder) if row["dice"]][-1]
    assert float(last) == dice, "the log's last Dice is that of the weights that are shipped"


def test_regions_are_no_part_of_the_validation_dice(learned: Job) -> None:
    case, prepared = learned.validation[0]
    network = learned.network().eval()
    labels = learned.plan.labels.model_copy(update={"regions": {"all": (1, 5), "organ again": (1,)}})
    plan = learned.plan.model_copy(update={"labels": labels})
    dices = [
        validation_dice(network, p, learned.setup, case, prepared, torch.device("cpu")) for p in (plan, learned.plan)
    ]
    assert dices[0] == dices[1]


def test_validation_of_empty_cases(learned: Job, tmp_path: Path) -> None:
    case, prepared = learned.validation[0]
    assert case.label is not None
    reference = io.read_mask(case.label, learned.plan.labels)
    io.write_mask(replace(reference, array=np.zeros_like(reference.array)), tmp_path / "empty.nii.gz")
    empty = replace(case, label=tmp_path / "empty.nii.gz")

    class Background(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.ones_like(batch), torch.zeros_like(batch), torch.zeros_like(batch)], dim=1)

    def dice(network: torch.nn.Module, case: Any) -> float | None:
        return validation_dice(network, learned.plan, learned.setup, case, prepared, torch.device("cpu"))

    assert dice(Background(), empty) is None
    assert dice(Background(), case) == 0.0, "a missed class counts"
    assert dice(Background(), replace(case, label=None)) is None


def test_the_average_moves_by_hand() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    state = checkpoint.State(network, torch.optim.SGD(network.parameters()), {"weight": torch.zeros(1, 1)})
    torch.nn.init.ones_(network.weight)
    train._update_average(state, 0.99)  # at the first step 1 - 1/10 of the way
    assert state.average["weight"].item() == pytest.approx(0.9)
    state.iteration = 9990
    train._update_average(state, 0.99)  # later 1 - 0.99 of the rest
    assert state.average["weight"].item() == pytest.approx(0.901)
    train._update_average(state, 0.0)
    assert state.average["weight"].item() == pytest.approx(0.901)


def test_the_average_of_a_network_with_batch_norm(tiny_job: Job, tmp_path: Path) -> None:
    """Counts of batches are no numbers to average: they are the last ones."""
    trained(planned(chosen(tiny_job, iterations=3), norm="batch", average=0.9), tmp_path)
    counts = [n for name, n in safetensors.torch.load_file(tmp_path / WEIGHTS).items() if name.endswith("tracked")]
    assert counts
    assert all(count.item() == 3 for count in counts)


def test_resume_says_where_it_goes_on(
    tiny_job: Job, saving: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="medseg")
    trained(chosen(tiny_job, iterations=3), tmp_path, 2)
    assert "training goes on from step 1" in caplog.text
