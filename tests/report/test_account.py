"""How results came to be: what is taken from a run's records, and what is said where there are none."""

from __future__ import annotations

from dataclasses import replace

from medseg.pipeline import RunResult
from medseg.plan import Plan
from medseg.report.account import done, training, versions
from medseg.report.gather import Batch, Gathered, Predicted, gather
from medseg.report.words import NONE


def test_training_and_prediction_have_a_table_each(tiny_run: RunResult) -> None:
    found = training(gather(tiny_run.out))["training"]
    assert found["curves"].startswith("<svg")
    (fold,) = found["folds"]
    assert (fold["number"], fold["train"], fold["validation"], fold["iterations"]) == ("0", "4", "2", "40")
    (batch,) = found["batches"]
    assert (batch["name"], batch["n"], batch["device"]) == ("fold 0", 2, "cpu")
    assert len(batch["seconds"]) == 5


def test_times_are_medians_of_what_was_computed() -> None:
    rows = tuple(
        Predicted(str(n), status, "", seconds, {"read": seconds or 0.0}, 100.0 * n, {}, (), "", "")
        for n, (status, seconds) in enumerate([("done", 1.0), ("done", 2.0), ("kept", 9.0), ("failed", 50.0)])
    )
    found = training(Gathered("predictions", "masks", batches=(Batch("", {"device": "cuda"}, rows),)))["training"]
    (batch,) = found["batches"]
    assert (batch["name"], batch["n"], batch["device"], batch["engine"]) == ("all", 4, "cuda", NONE)
    assert batch["seconds"] == [2.0, None, None, None, 2.0]
    assert batch["memory"] == 200.0


def test_without_records_nothing_is_said() -> None:
    empty = Gathered("predictions", "masks")
    assert training(empty)["training"] is None
    told = done(empty)
    assert (told["methods"], told["command"], told["facts"], told["decisions"], told["folds"]) == ([], "", [], [], [])
    assert versions(empty) == {}


def test_a_damaged_log_costs_the_curves_alone(tiny_run: RunResult) -> None:
    found = gather(tiny_run.out)
    broken = replace(found, logs={0: tiny_run.out / "plan.json"})
    assert training(broken)["training"]["curves"] == ""
    assert training(broken)["training"]["folds"]


def test_facts_settings_and_decisions_are_those_of_the_run(tiny_run: RunResult) -> None:
    found = gather(tiny_run.out)
    told = done(found)
    facts = dict(told["facts"])
    assert facts["Cases"] == "6"
    assert facts["Labels"] == "organ (1), lesion (5)"
    assert "iterations 40" in facts["Settings of training"]
    assert "medseg 0" in facts["Versions"]
    assert not any(str(tiny_run.out.parent) in value for value in facts.values())
    decisions = {field: (value, why) for field, value, why in told["decisions"]}
    plan = Plan.load(tiny_run.out / "plan.json")
    assert len(decisions) == len(plan.reasons)
    assert decisions["orientation"][0] == "RAS"
    assert decisions["axes"][0] == ", ".join(map(str, plan.axes))
    assert decisions["3d_fullres.patch_size"][0] == "8 \N{MULTIPLICATION SIGN} 16 \N{MULTIPLICATION SIGN} 16"
    assert decisions["3d_fullres.patch_size"][1] == plan.reasons["configurations.3d_fullres.patch_size"]
    assert [used for _, _, used in told["folds"]] == [True, False, False, False, False]
