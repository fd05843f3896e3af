"""The folder that a run writes to: held by one run at a time, swept of what a killed one left, with a log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from medseg.cases import Shard
from medseg.errors import InputError, MedsegError
from medseg.records import remove_leftovers

log = logging.getLogger(__name__)

SWEEP_SECONDS = 10.0
"""So long a shard waits for another that sweeps the folder they share."""


@contextlib.contextmanager
def writing_to(out: Path, shard: Shard | None = None) -> Iterator[None]:
    """Hold an output folder: one writer at a time, what a killed run left half-written swept away, and a log kept.

    Shards hold it together, each of them once, and only the first that comes sweeps.

    Raises:
        InputError: another run holds the folder, or it cannot be written to.
    """
    suffix = shard.suffix if shard else ""
    with _sole_writer(out, suffix), _log_file(out / f"log{suffix}.txt"):
        yield


def require_writable(path: Path) -> None:
    """Refuse a file that could not be written, before long work for it; nothing is made.

    Raises:
        InputError: it is a folder; or the nearest folder above it that is there cannot be written to, or is a file.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        found = "is a folder"
    elif not above.is_dir():
        found = f"cannot be written: {above} is a file"
    elif not os.access(above, os.W_OK):
        found = f"cannot be written: no right to write in {above}"
    else:
        return
    raise InputError(path, found, "a file to write", "give another name or folder with -o")


@contextlib.contextmanager
def _sole_writer(out: Path, suffix: str) -> Iterator[None]:
    """Hold the output folder; a second run on it is refused. The system frees the hold when the process ends."""
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((out / ".lock").open("a"))
            own = stack.enter_context((out / f".lock{suffix}").open("a")) if suffix else file
        except OSError as failure:
            remedy = "give another folder with -o"
            found = f"cannot be written to: {failure.strerror}"
            raise InputError(out, found, "a folder for results", remedy) from None
        try:
            import fcntl
        except ImportError:  # Windows: no such lock
            remove_leftovers(out)
            yield
            return
        try:
            if _locked(file, fcntl.LOCK_EX, fcntl):
                remove_leftovers(out)
            elif not suffix:
                raise _held(out)
            if suffix and not (
                _locked(file, fcntl.LOCK_SH, fcntl, SWEEP_SECONDS) and _locked(own, fcntl.LOCK_EX, fcntl)
            ):
                raise _held(out)
        except OSError as failure:  # some network file systems know no locks
            log.warning("%s cannot be locked (%s): start no other run on it", out, failure.strerror)
        yield


def _locked(file: IO[str], kind: int, fcntl: Any, patience: float = 0.0) -> bool:
    """Lock a file, or change the lock that there is; whether no other process was in the way for so many seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)


def _held(out: Path) -> InputError:
    return InputError(out, "another run is writing here", "one run a folder", "wait, or give another -o")


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Append what medseg logs to a file while the block runs, and how it ended if not well."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("medseg")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except BaseException as failure:
        logger.error("%s", failure if isinstance(failure, MedsegError) else repr(failure))
        raise
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # what the disk has no room for; it was told when the line was written
            handler.close()


class _LogFile(logging.FileHandler):
    """A log that stops where its disk is full, and says so once; the run itself goes on."""

    stopped = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging gives it
        """Tell of a failure of the disk elsewhere: on the console."""
        failure = sys.exc_info()[1]
        if not isinstance(failure, OSError):
            super().handleError(record)
        elif not self.stopped:
            self.stopped = True
            log.warning("%s: cannot be written: %s", self.baseFilename, failure.strerror)
