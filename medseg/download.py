"""Download the tasks of the Medical Segmentation Decathlon. The only place that uses the network.

Addresses and checksums are MONAI's (``monai.apps.DecathlonDataset``). Fetching is done here, because MONAI's loses
what it has when the connection breaks, and unpacks into place, so that half a task can be taken for a whole one.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medseg.errors import InputError, UnreadableFile
from medseg.progress import Progress, silent
from medseg.records import TEMPORARY_PREFIX

_BLOCK = 2**20
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Archive:
    """A tar file that holds one folder called ``name``, with a ``dataset.json`` in it."""

    name: str
    url: str
    md5: str


def find_archive(task: str) -> Archive:
    """The archive of a Decathlon task.

    Args:
        task: as ``Task04``, ``Task04_Hippocampus`` or ``hippocampus``; upper and lower case are alike.

    Raises:
        InputError: no such task; all are listed.
    """
    from monai.apps.datasets import DecathlonDataset

    for name, url in DecathlonDataset.resource.items():
        if task.casefold() in {name.casefold(), *name.casefold().split("_")}:
            return Archive(name, url, DecathlonDataset.md5[name])
    raise InputError(task, "is no task of the Decathlon", ", ".join(DecathlonDataset.resource))


def download_task(task: str, folder: Path, progress: Progress = silent, *, base_url: str | None = None) -> Path:
    """Download a Decathlon task and unpack it; go on from where an earlier attempt stopped.

    Args:
        task: as in ``find_archive``.
        folder: where the task's folder comes to lie. The archive is kept beside it.
        progress: called as data arrive and are unpacked.
        base_url: a mirror that has the archives under the same names.

    Returns:
        The dataset folder. Where it is there already, nothing is fetched.

    Raises:
        InputError: see ``find_archive`` and ``download_archive``.
    """
    archive = find_archive(task)
    if base_url is not None:
        archive = Archive(archive.name, f"{base_url.rstrip('/')}/{archive.name}.tar", archive.md5)
    return download_archive(archive, folder, progress)


def download_archive(archive: Archive, folder: Path, progress: Progress = silent) -> Path:
    """Download an archive, verify it and unpack it; see ``download_task``.

    Raises:
        InputError: the server cannot be reached or does not have it, the checksum differs, or the archive holds a
            link, a device or a path that leaves its folder.
    """
    target = folder / archive.name
    if (target / "dataset.json").is_file():
        return target
    if target.exists():
        raise InputError(target, "is there, but has no dataset.json", "a whole task or nothing", "move it away")
    folder.mkdir(parents=True, exist_ok=True)
    tar = folder / f"{archive.name}.tar"
    if not tar.exists():
        part = tar.with_name(f"{tar.name}.part")
        _fetch(archive.url, part, progress)
        _verify(part, archive.md5)
        part.replace(tar)
    else:
        _verify(tar, archive.md5)
    _unpack(tar, target, progress)
    return target


def _fetch(url: str, part: Path, progress: Progress) -> None:
    """Append to ``part`` until it is whole; reconnect for as long as every connection brings something."""
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _continue(url, part, progress):
                return
            reason = "the connection broke"
        except urllib.error.HTTPError as failure:
            raise InputError(url, f"the server answered {failure.code} {failure.reason}", "the archive") from None
        except (OSError, http.client.HTTPException) as failure:
            reason = str(failure)
        here = part.stat().st_size if part.exists() else 0
        if here <= before:
            raise InputError(
                url, f"{reason} after {here:,} bytes", "the whole archive", "run the same command again: it goes on"
            )


def _continue(url: str, part: Path, progress: Progress) -> bool:
    """Fetch what is missing; whether all has arrived."""
    here = part.stat().st_size if part.exists() else 0
    if not url.startswith(("https://", "http://")):
        raise InputError(url, "is no web address", "https://...")
    request = urllib.request.Request(url, headers={"Range": f"bytes={here}-"} if here else {})  # noqa: S310 checked
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310 checked above
    except urllib.error.HTTPError as failure:
        if failure.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return True  # nothing lies beyond what is here; the checksum decides whether it is right
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            here = 0  # the server sends all of it again
        length = response.headers.get("Content-Length")
        total = here + int(length) if length else 0
        with part.open("ab" if here else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                here += len(block)
                progress("downloading", here / total if total else 0.0, f"{here / 1e6:,.0f} MB")
    return here >= total


def _verify(path: Path, md5: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found == md5:
        return
    if path.suffix == ".part":
        path.unlink()  # going on from damaged data would never end well
        raise InputError(path, f"its MD5 is {found}", md5, "it was deleted; run the same command again")
    raise InputError(path, f"its MD5 is {found}", md5, "delete it and run the same command again")


def _unpack(tar: Path, target: Path, progress: Progress) -> None:
    """Unpack beside ``target`` and rename at the end, so that a task is there whole or not at all."""
    place = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    shutil.rmtree(place, ignore_errors=True)  # what a killed run left
    try:
        with tarfile.open(tar, "r:") as file:
            file.extractall(place, members=_members(file, tar, progress), filter="data")
        if not (place / target.name / "dataset.json").is_file():
            raise InputError(tar, f"holds no {target.name}/dataset.json", "a Decathlon task")
        (place / target.name).replace(target)
    except tarfile.FilterError as failure:
        raise InputError(tar, f"is refused: {failure}", "files within one folder", "do not use it") from None
    except tarfile.TarError as failure:
        raise UnreadableFile(tar, f"cannot be unpacked: {failure}", "a tar archive") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _members(file: tarfile.TarFile, tar: Path, progress: Progress) -> Iterator[tarfile.TarInfo]:
    """The folders and files of an archive. ``._`` files hold macOS metadata and are left out."""
    size = tar.stat().st_size
    for member in file:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(tar, f"{member.name!r} leaves the archive's folder", "paths within it", "do not use it")
        if not (member.isfile() or member.isdir()):
            raise InputError(tar, f"{member.name!r} is a link or a device", "files and folders", "do not use it")
        if not path.name.startswith("._"):
            yield member
            progress("unpacking", (member.offset_data + member.size) / size, path.name)
