"""The house keeps its shape: layers, lint, types, start-up, names, and a test for every module."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import medseg

ROOT = Path(__file__).parent.parent
MODULES = sorted(p.relative_to(ROOT / "medseg") for p in (ROOT / "medseg").rglob("*.py"))
HEAVY = ("torch", "monai", "nibabel", "SimpleITK", "matplotlib")
CHECKS = {
    "layers": [str(Path(sysconfig.get_path("scripts")) / "lint-imports")],
    "lint": [sys.executable, "-m", "ruff", "check", "."],
    "format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "types": [sys.executable, "-m", "mypy"],
}


@pytest.mark.parametrize("command", CHECKS.values(), ids=CHECKS.keys())
def test_static_check(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


def loaded_by(statement: str) -> list[str]:
    """The heavy packages that a fresh Python has loaded after a statement."""
    code = f"import sys\n{statement}\nprint('LOADED', *[m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.rpartition("LOADED")[2].split()


def test_importing_medseg_loads_nothing_heavy() -> None:
    assert loaded_by("import medseg") == []


def test_help_loads_nothing_heavy() -> None:
    call = (
        "sys.argv = ['medseg', '--help']\nfrom medseg.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert loaded_by(call) == []


def test_every_module_has_its_tests() -> None:
    missing = []
    for module in MODULES:
        if module.name == "__main__.py" or module == Path("__init__.py"):
            continue
        name = "init" if module.name == "__init__.py" else module.stem
        of_module = ROOT / "tests" / module.parent / f"test_{name}.py"
        of_package = ROOT / "tests" / f"test_{module.parent.name}.py"
        if not of_module.exists() and not of_package.exists():
            missing.append(f"medseg/{module} needs {of_module.relative_to(ROOT)}")
    assert missing == []


def test_no_file_is_named_after_no_storey() -> None:
    nameless = {"utils", "util", "helpers", "helper", "common", "core", "base", "misc"}
    assert [str(m) for m in MODULES if nameless & {*m.parent.parts, m.stem}] == []


def test_the_public_names_are_sorted_and_can_be_imported() -> None:
    assert medseg.__all__ == sorted(medseg.__all__)
    assert dir(medseg) == medseg.__all__
    for name in medseg.__all__:
        assert getattr(medseg, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = medseg.nothing
