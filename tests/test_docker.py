"""The container files, by reading: no engine is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instruction and argument of each logical line."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, re.sub(r"\s+", " ", rest)) for word, _, rest in (line.partition(" ") for line in joined.splitlines())
    ]


def final_stage(path: Path) -> list[tuple[str, str]]:
    found = instructions(path)
    last = max(n for n, (word, _) in enumerate(found) if word == "FROM")
    return found[last:]


def test_there_is_one_for_the_cpu_and_one_for_cuda() -> None:
    assert [f.suffix for f in FILES] == [".cpu", ".cuda"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
class TestDockerfile:
    def test_starts_from_a_slim_python(self, path: Path) -> None:
        bases = {rest.split()[0] for word, rest in instructions(path) if word == "FROM"}
        assert bases == {"python:3.12-slim"}

    def test_runs_as_a_number_that_is_not_root(self, path: Path) -> None:
        users = [rest for word, rest in final_stage(path) if word == "USER"]
        assert users == ["1000:1000"]

    def test_runs_medseg_and_shows_help_by_itself(self, path: Path) -> None:
        stage = dict(final_stage(path))
        assert stage["ENTRYPOINT"] == '["medseg"]'
        assert stage["CMD"] == '["--help"]'

    def test_writes_nowhere_but_tmp(self, path: Path) -> None:
        settings = dict(
            part.split("=", 1) for word, rest in final_stage(path) if word == "ENV" for part in rest.split()
        )
        for name in ("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCHINDUCTOR_CACHE_DIR"):
            assert Path(settings[name]).is_relative_to("/tmp"), name
        assert dict(final_stage(path))["WORKDIR"] == "/tmp"

    def test_installs_what_is_pinned_and_keeps_no_cache(self, path: Path) -> None:
        installs = re.findall(r"pip install[^&]*", " ".join(rest for word, rest in instructions(path) if word == "RUN"))
        assert installs
        for command in installs:
            assert "-c constraints.txt" in command
            assert "--no-cache-dir" in command

    def test_adds_nothing_from_elsewhere_and_no_weights(self, path: Path) -> None:
        assert "ADD" not in {word for word, _ in instructions(path)}
        copied = [rest for word, rest in instructions(path) if word == "COPY"]
        assert copied == [
            "pyproject.toml constraints.txt README.md LICENSE ./",
            "medseg medseg",
            "--from=build /opt/medseg /opt/medseg",
        ]

    def test_copies_only_what_exists_and_is_not_ignored(self, path: Path) -> None:
        allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
        needed = {
            name
            for word, rest in instructions(path)
            if word == "COPY" and "--from" not in rest
            for name in rest.split()[:-1]
        }
        assert needed == allowed
        assert [name for name in needed if not (ROOT / name).exists()] == []


def test_the_cpu_image_takes_the_cpu_wheel_and_only_torch_from_its_index() -> None:
    text = " ".join(rest for word, rest in instructions(FILES[0]) if word == "RUN")
    assert "--no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch" in text


def test_everything_but_a_list_is_kept_out_of_the_build() -> None:
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
