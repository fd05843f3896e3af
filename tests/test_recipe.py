"""Recipe: a record that loads nothing heavy, so that a script in pipelines/ answers --help at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from medseg.recipe import Recipe

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
