"""Files of a folder and members of a zip, to be read one after the other: nothing is unpacked, no link is followed up.

A zip is judged by its list of members before any of them is opened: names that lead out of it, links and
decompression bombs are refused.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import BinaryIO

from medseg.errors import InputError, UnreadableFile

MAX_MEMBERS = 10**6
MAX_RATIO = 1000
"""A zip whose members are together more than this many times its size is a bomb (deflate itself ends at 1032)."""
MAX_BYTES = 2**38
"""What the members of a zip may hold together, 256 GiB."""
MAX_DEPTH = 64
"""Folders below the one that is asked for; what lies deeper is counted, not read."""
UNSEEN = ("folder that cannot be opened", "folder too deep", "link that leads nowhere")
"""What is passed over although slices may lie there."""

_CHUNK = 1 << 20
_SAFE_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others are unpacked without a limit on what comes out
_FAILURES = (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
_REMEDY = "unpack it yourself if you trust it, and give the folder"


@dataclass(frozen=True, order=True)
class Instance:
    """A DICOM file: one on disk, or a member of a zip, which is never unpacked.

    Attributes:
        path: the file, or the zip.
        member: name in the zip; empty for a file.
    """

    path: Path
    member: str = ""

    def within(self, place: Path) -> PurePosixPath:
        """Where it lies in the folder or zip in which it was found; of a file that was given itself, ``.``."""
        return PurePosixPath(self.member or self.path.relative_to(place).as_posix())


def instances(place: Path, passed_over: Counter[str]) -> list[Instance]:
    """Every file at a place, in the order of their names.

    Args:
        place: a folder (with those below it), a zip (by its content), or a file.
        passed_over: counts what is there but cannot be opened; added to.

    Raises:
        InputError: there is nothing of that name, or a zip that may not be opened.
        UnreadableFile: a zip whose list of members is damaged.
    """
    if place.is_dir():
        return sorted(Instance(path) for path in _files(place, passed_over))
    if not place.is_file():
        raise InputError(place, "there is no such file or folder", "a DICOM file, or a folder or zip with some")
    if not is_zip(place):
        return [Instance(place)]
    with _zip(place) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
        _check(place, archive.infolist())
    return sorted(Instance(place, info.filename) for info in members)


def is_zip(path: Path) -> bool:
    """Whether a file is a zip by its content."""
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    except OSError:
        return False


def damaged(instance: Instance) -> UnreadableFile:
    """The error of an instance that cannot be read to its end."""
    found = "a member of the zip is damaged" if instance.member else "cannot be read to its end"
    return UnreadableFile(instance.path, found, "a whole file", "copy it again from its source")


class Reader:
    """Opens instances; keeps the zip that it has open. Use it in one thread, and as a context.

    ::

        with Reader() as reader, reader.open(instance) as stream:
            stream.read(132)
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._archive: zipfile.ZipFile | None = None

    @contextlib.contextmanager
    def open(self, instance: Instance) -> Iterator[BinaryIO]:
        """The bytes of an instance as a stream that can seek; of a member not all is checked against its CRC.

        Raises:
            UnreadableFile: it cannot be opened.
        """
        try:
            stream = self._member(instance) if instance.member else instance.path.open("rb")
        except _FAILURES:
            raise UnreadableFile(instance.path, "cannot be opened", "a readable file") from None
        with stream:
            yield stream

    def content(self, instance: Instance) -> bytes:
        """All bytes of an instance; of a member no more than the zip declares, and checked against its CRC.

        Raises:
            UnreadableFile: it is damaged.
        """
        try:
            if instance.member:
                return self._opened(instance.path).read(instance.member)
            return instance.path.read_bytes()
        except _FAILURES:
            raise damaged(instance) from None

    def head(self, instance: Instance, count: int) -> bytes:
        """The first bytes of an instance that may be damaged further on; none where not even they can be read."""
        try:
            with self.open(instance) as stream:
                return stream.read(count)
        except (UnreadableFile, *_FAILURES):
            return b""

    def size(self, instance: Instance) -> int:
        """Bytes of an instance; of a member as the zip declares it, beyond which it is not read."""
        if not instance.member:
            return instance.path.stat().st_size
        return self._opened(instance.path).getinfo(instance.member).file_size

    def _member(self, instance: Instance) -> BinaryIO:
        return io.BufferedReader(self._opened(instance.path).open(instance.member), _CHUNK)  # type: ignore[type-var]

    def _opened(self, path: Path) -> zipfile.ZipFile:
        if self._archive is None or self._path != path:
            self.__exit__()
            self._archive, self._path = zipfile.ZipFile(path), path
        return self._archive

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._archive is not None:
            self._archive.close()
            self._archive = None


def _files(folder: Path, passed_over: Counter[str]) -> Iterator[Path]:
    """Regular files, links to such included; linked folders are left out, so that no loop is walked."""
    waiting = [(os.fspath(folder), 0)]
    while waiting:
        here, depth = waiting.pop()
        try:
            entries = list(os.scandir(here))
        except OSError:
            passed_over["folder that cannot be opened"] += 1
            continue
        for entry in entries:
            kind = _kind(entry)
            if kind == "file":
                yield Path(entry.path)
            elif kind == "folder" and depth < MAX_DEPTH:
                waiting.append((entry.path, depth + 1))
            else:
                passed_over["folder too deep" if kind == "folder" else kind] += 1


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "link to a folder" if entry.is_symlink() else "folder"
        if entry.is_symlink() and not Path(entry.path).exists():
            return "link that leads nowhere"
    except OSError:
        pass
    return "no file"


@contextlib.contextmanager
def _zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        raise UnreadableFile(path, "is a damaged zip", "a whole zip", "copy it again from its source") from None
    with archive:
        if not _complete(path, len(archive.infolist())):
            raise UnreadableFile(path, "is a damaged zip", "a whole zip", "copy it again from its source")
        yield archive


def _complete(path: Path, count: int) -> bool:
    """Whether a zip has as many members as its end record counts: zipfile stops at a damaged entry.

    Source: APPNOTE 4.3.16, and 4.3.14 for the record of 64 bits, which holds the number where the first is full.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 22))
        end = file.read()
    place, place64 = end.rfind(b"PK\x05\x06"), end.rfind(b"PK\x06\x06")
    counted = int.from_bytes(end[place + 10 : place + 12], "little")
    if counted == 0xFFFF and place64 >= 0:
        counted = int.from_bytes(end[place64 + 32 : place64 + 40], "little")
    return counted == count


def _check(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuse a zip by its list of members."""
    if len(members) > MAX_MEMBERS:
        raise InputError(path, f"holds {len(members):,} members", f"at most {MAX_MEMBERS:,}", _REMEDY)
    for info in members:
        if _leads_out(info.orig_filename):
            raise InputError(path, "a member's name leads out of the zip", "names within it", "do not trust it")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise InputError(path, "a member is a link", "files", _REMEDY)
        if info.flag_bits & 1:
            raise InputError(path, "a member is encrypted", "a zip without a password", "unpack it first")
        if info.compress_type not in _SAFE_METHODS:
            raise InputError(path, "a member is compressed otherwise than by deflate", "deflate", _REMEDY)
    if len({info.filename for info in members}) < len(members):
        raise InputError(path, "several members have one name", "a name for each", _REMEDY)  # only one can be opened
    total = sum(info.file_size for info in members)
    if total > MAX_BYTES or total > MAX_RATIO * path.stat().st_size:
        found = f"its members take {total:,} bytes, {total // max(1, path.stat().st_size):,} times its size"
        raise InputError(path, found, f"at most {MAX_BYTES:,} bytes and {MAX_RATIO} times", _REMEDY)


def _leads_out(name: str) -> bool:
    windows = PureWindowsPath(name)
    if "\0" in name or windows.drive or windows.root or PurePosixPath(name).is_absolute():
        return True
    return ".." in windows.parts
