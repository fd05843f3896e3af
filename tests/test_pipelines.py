"""The ten scripts: each recipe fits its task, and data like the task's own are checked, measured and planned."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from medseg.check import check
from medseg.dataset import Dataset
from medseg.fingerprint import measure
from medseg.phantom import make_dataset
from medseg.planning import make_plan, override_plan
from medseg.recipe import Recipe

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "pipelines").glob("*.py"))


@dataclass(frozen=True)
class Task:
    """What a task's own ``dataset.json`` says, its usual spacing (right, front, head), and its tolerance."""

    channels: tuple[str, ...]
    labels: tuple[str, ...]
    spacing_mm: tuple[float, float, float]
    tolerance_mm: float


# Labels and channels as in dataset.json; spacing is the median that nnU-Net's fingerprints have.
TASKS = {
    "Task01_BrainTumour": Task(
        ("FLAIR", "T1w", "t1gd", "T2w"), ("edema", "non-enhancing tumor", "enhancing tumour"), (1, 1, 1), 5
    ),
    "Task02_Heart": Task(("MRI",), ("left atrium",), (1.25, 1.25, 1.37), 4),
    "Task03_Liver": Task(("CT",), ("liver", "cancer"), (0.77, 0.77, 1), 7),
    "Task04_Hippocampus": Task(("MRI",), ("Anterior", "Posterior"), (1, 1, 1), 1),
    "Task05_Prostate": Task(("T2", "ADC"), ("PZ", "TZ"), (0.62, 0.62, 3.6), 4),
    "Task06_Lung": Task(("CT",), ("cancer",), (0.79, 0.79, 1.24), 2),
    "Task07_Pancreas": Task(("CT",), ("pancreas", "cancer"), (0.8, 0.8, 2.5), 5),
    "Task08_HepaticVessel": Task(("CT",), ("Vessel", "Tumour"), (0.8, 0.8, 5), 3),
    "Task09_Spleen": Task(("CT",), ("spleen",), (0.79, 0.79, 5), 3),
    "Task10_Colon": Task(("CT",), ("colon cancer primaries",), (0.78, 0.78, 5), 4),
}


def recipe_of(script: Path) -> Recipe:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = module.RECIPE
    assert isinstance(recipe, Recipe)
    return recipe


def test_there_is_one_script_a_task_and_the_table_of_data_lists_it() -> None:
    assert [recipe_of(script).task for script in SCRIPTS] == list(TASKS)
    table = (ROOT / "data" / "README.md").read_text()
    assert [task for task in TASKS if f"| {task} |" not in table] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_tells_the_story_of_its_data(script: Path) -> None:
    story = script.read_text().split('"""')[1]
    for part in ("What and where from:", "How acquired:", "Labels:", "What is hard:", "Trap:"):
        assert part in story


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_data_like_the_tasks_are_checked_measured_and_planned(script: Path, tmp_path: Path) -> None:
    recipe = recipe_of(script)
    task = TASKS[recipe.task]
    thick = task.spacing_mm[2] / task.spacing_mm[0] > 3
    make_dataset(
        tmp_path,
        name=recipe.task.split("_")[1],
        cases=5,
        test_cases=1,
        shape=(32, 32, 10 if thick else 24),
        spacing_mm=task.spacing_mm,
        labels={name: value for value, name in enumerate(task.labels, start=1)},
        channels=task.channels,
    )
    dataset = Dataset.open(tmp_path)
    assert check(dataset).unusable_cases == ()
    labels = dataset.labels.model_copy(update={"regions": recipe.regions})
    dataset = replace(dataset, labels=type(labels).model_validate(labels.model_dump()))  # regions fit the labels

    plan = make_plan(measure(dataset), dataset.name, dataset.channels, dataset.labels, device="cpu")
    plan, _ = override_plan(plan, recipe.overrides, recipe.configuration)
    configuration = plan.configuration(recipe.configuration)
    assert recipe.tolerance_mm == task.tolerance_mm
    assert plan.channels == task.channels
    assert plan.labels.names == task.labels
    assert plan.axes[0] == (2 if task.spacing_mm[2] > task.spacing_mm[0] else plan.axes[0])
    # within 5 %, by which phantoms differ, and half of the slice distance, which thick slices may be thinned to
    along, *plane = configuration.spacing_mm
    np.testing.assert_allclose(plane, task.spacing_mm[:2], rtol=0.06)
    assert along is not None
    assert task.spacing_mm[2] * 0.5 < along < task.spacing_mm[2] * 1.06
    assert len(configuration.network.strides) >= 2
    for normalisation, channel in zip(plan.normalisation, task.channels, strict=True):
        assert normalisation.scheme == ("ct" if channel == "CT" else "zscore")
        if channel == "CT":
            assert -400 < normalisation.lower < normalisation.mean < normalisation.upper < 500
            assert normalisation.std > 10


def test_the_regions_of_brain_tumours_are_those_of_the_decathlons_numbers() -> None:
    assert recipe_of(SCRIPTS[0]).regions == {"whole tumour": (1, 2, 3), "tumour core": (2, 3)}


def test_a_script_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[3]), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS[3]), run_name="__main__")
    assert not end.value.code
    assert "DATASET" in capsys.readouterr().out
