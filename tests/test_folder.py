"""The folder of a run: its log, its hold, what is swept. Two runs at once: tests/test_pipeline.py and test_cli.py."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from medseg.cases import Shard
from medseg.errors import InputError
from medseg.folder import _LogFile, require_writable, writing_to


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


def test_a_log_without_room_says_so_once_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no disk that is always full")
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with writing_to(tmp_path):
        for step in ("one", "two"):
            logging.getLogger("medseg.any").info(step)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        f"{tmp_path / 'log.txt'}: cannot be written: No space left on device"
    ]
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="a fault"), writing_to(tmp_path):  # which is not hidden by the log's
        raise InputError("here", "a fault")


def test_a_fault_of_a_log_line_itself_is_told_by_logging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)
    handler = _LogFile(tmp_path / "log.txt")
    handler.handle(logging.LogRecord("medseg", logging.INFO, "", 0, "%d", ("no number",), None))
    handler.close()
    assert "Logging error" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "new" / "deeper" / "x.csv")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    require_writable(tmp_path / "file")
    with pytest.raises(InputError, match=r"file is a file .*-o"):
        require_writable(tmp_path / "file" / "x.csv")
    with pytest.raises(InputError, match="is a folder"):
        require_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(InputError, match="no right to write"):
        require_writable(tmp_path / "new" / "x.csv")
