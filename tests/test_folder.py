"""The folder of a run: its log, its hold, what is swept. Two runs at once: tests/test_pipeline.py and test_cli.py."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from medseg.cases import Shard
from medseg.errors import InputError
from medseg.folder import writing_to


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with writing_to(tmp_path):
        pass
    assert "cannot be locked (No locks available): start no other run on it" in caplog.text


def test_what_is_logged_and_how_it_ended_stands_in_the_log(tmp_path: Path) -> None:
    with writing_to(tmp_path):
        logging.getLogger("medseg.any").info("a step")
    with pytest.raises(KeyboardInterrupt), writing_to(tmp_path):
        raise KeyboardInterrupt
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO a step", "ERROR KeyboardInterrupt()"]


def test_one_run_a_folder_and_one_process_a_shard(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with writing_to(tmp_path), pytest.raises(InputError, match="another run is writing here"), writing_to(tmp_path):
        pass
    with writing_to(tmp_path, Shard(1, 2)):
        with writing_to(tmp_path, Shard(2, 2)):
            pass
        with pytest.raises(InputError, match="another run is writing here"), writing_to(tmp_path):
            pass
    assert (tmp_path / "log-1-of-2.txt").exists()
