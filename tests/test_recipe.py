"""Recipes: records that load nothing heavy, so that a script in pipelines/ answers --help at once; settings by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from medseg.errors import PlanError
from medseg.pipeline import RunResult
from medseg.plan import Configuration, Plan
from medseg.planning import override_plan
from medseg.recipe import RECIPES, Recipe, settings_of

SCRIPT = Path(__file__).parent.parent / "pipelines" / "task04_hippocampus.py"


def test_a_recipe_is_refused_where_a_field_is_misspelt_or_its_configuration_is_unknown() -> None:
    recipe = Recipe(task="Task04_Hippocampus", configuration="3d_fullres", tolerance_mm=1)
    assert (recipe.regions, recipe.overrides) == ({}, ())
    with pytest.raises(ValidationError, match="tolerance_m\n"):
        Recipe.model_validate({**recipe.model_dump(), "tolerance_m": 2})
    with pytest.raises(ValidationError, match="3d_lowres"):
        Recipe.model_validate({**recipe.model_dump(), "configuration": "4d"})


def test_the_help_of_a_script_loads_neither_torch_nor_monai() -> None:
    code = (
        f"import runpy, sys\nsys.argv = ['task04', '--help']\n"
        f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit as end:\n"
        "    assert not end.code\n"
        "print('LOADED', [m for m in ('torch', 'monai', 'nibabel', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "DATASET" in result.stdout
    assert result.stdout.endswith("LOADED []\n")


def applied(plan: Plan, *settings: str) -> Configuration:
    return override_plan(plan, settings, "3d_fullres")[0].configuration("3d_fullres")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_a_plan(tiny_run: RunResult, name: str) -> None:
    applied(Plan.load(tiny_run.out / "plan.json"), *settings_of(name))


def test_the_classic_recipe_is_that_of_the_literature(tiny_run: RunResult) -> None:
    setup = applied(Plan.load(tiny_run.out / "plan.json"), *settings_of("classic"))
    training, network = setup.training, setup.network
    assert (training.optimiser, training.learning_rate, training.momentum) == ("adam", 1e-4, 0.9)
    assert (training.weight_decay, training.schedule, training.warmup) == (1e-5, "plateau", 0)
    assert (training.loss, training.augmentation, training.average) == ("bce_dice", "classic", 0)
    assert (network.norm, network.act, network.downsampling, network.dropout) == ("batch", "relu", "pool", 0)
    assert (setup.batch_size, network.deep_supervision) == (8, False)


def test_what_the_user_sets_wins_over_the_recipe(tiny_run: RunResult) -> None:
    """A later setting of the same field wins, whether it is addressed by its name or by its whole path."""
    plan = Plan.load(tiny_run.out / "plan.json")
    own = ("plan.batch_size=2", "plan.configurations.3d_fullres.training.loss=focal")
    setup = applied(plan, *settings_of("classic"), *own)
    assert (setup.batch_size, setup.training.loss, setup.training.optimiser) == (2, "focal", "adam")
    assert applied(plan, *own, *settings_of("classic")).batch_size == 8
    assert applied(plan, "plan.batch_size=3", "plan.batch_size=5").batch_size == 5


def test_an_unknown_recipe_is_refused_and_none_sets_nothing() -> None:
    with pytest.raises(PlanError, match=r"recipe: there is no 'modern' \(expected classic\)"):
        settings_of("modern")
    assert settings_of(None) == ()
