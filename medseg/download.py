"""Download the tasks of the Medical Segmentation Decathlon, and NiiVue. The only place that uses the network.

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
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import platformdirs

from medseg.errors import InputError, UnreadableFile
from medseg.progress import Progress, silent
from medseg.records import TEMPORARY_PREFIX, digest_file, write_bytes

_BLOCK = 2**20
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Archive:
    """A tar file on a server.

    Attributes:
        name: of itself and, of a task, of the one folder in it, which has a ``dataset.json``.
        url: where it is.
        digest: in hexadecimal digits.
        algorithm: of the digest, as ``hashlib`` calls it.
    """

    name: str
    url: str
    digest: str
    algorithm: str = "md5"

    @property
    def file(self) -> str:
        """What it is called on disk."""
        return self.name + PurePosixPath(self.url).suffix


NIIVUE = Archive(
    "niivue-niivue-0.69.0",  # as `npm pack` calls it
    "https://registry.npmjs.org/@niivue/niivue/-/niivue-0.69.0.tgz",
    # npm's integrity, sha512-YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA==
    "60c8d0bc9803d56d9bec3ba8c64c250b85716eb80878f449e6ac90cd72b18b6b"
    "f6301560dbce4ffc2210ca0e3aa030c60c871a3656ddf8c86d3bf79d31b5c990",
    "sha512",
)
"""The npm package of the viewer in three dimensions: https://niivue.com, BSD-2-Clause."""

_NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
_NIIVUE_FILES = {"niivue.umd.js": "package/dist/niivue.umd.js", "package.json": "package/package.json"}
"""What is kept of it, and where it lies in there: the script, and what names its version and licence."""


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
        archive = Archive(archive.name, f"{base_url.rstrip('/')}/{archive.name}.tar", archive.digest)
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
    _unpack(_fetched(archive, folder, progress), target, progress)
    return target


def viewer_folder() -> Path:
    """Where NiiVue is kept: the user's data folder, which outlives caches and versions of medseg."""
    return platformdirs.user_data_path("medseg", appauthor=False) / "niivue"


def viewer_file() -> Path | None:
    """NiiVue as ``download_viewer`` has kept it; None where it is not there, or not what it should be."""
    path = viewer_folder() / "niivue.umd.js"
    try:
        return path if digest_file(path) == _NIIVUE_SHA256 else None
    except OSError:
        return None


def download_viewer(progress: Progress = silent, *, base_url: str | None = None) -> Path:
    """Download NiiVue, the viewer in three dimensions; go on from where an earlier attempt stopped.

    Where there is no network, put what ``npm pack @niivue/niivue@0.69.0`` makes elsewhere into ``viewer_folder()`` and
    call this: the archive is taken from there.

    Args:
        progress: called as data arrive.
        base_url: another registry of npm packages.

    Returns:
        The script. Where it is there already, nothing is fetched.

    Raises:
        InputError: the server cannot be reached or does not have it, or the checksum differs.
    """
    if path := viewer_file():
        return path
    archive, folder = NIIVUE, viewer_folder()
    if base_url is not None:
        path_there = archive.url.removeprefix("https://registry.npmjs.org/")
        archive = replace(archive, url=f"{base_url.rstrip('/')}/{path_there}")
    tgz = _fetched(archive, folder, progress)
    with tarfile.open(tgz, "r:gz") as file:
        for name, member in _NIIVUE_FILES.items():
            content = file.extractfile(member)
            write_bytes(folder / name, content.read() if content else b"")
    tgz.unlink()
    return folder / "niivue.umd.js"


def _fetched(archive: Archive, folder: Path, progress: Progress) -> Path:
    """The verified archive in a folder; fetched, or the rest of it, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    tar = folder / archive.file
    if tar.exists():
        _verify(tar, archive)
        return tar
    part = tar.with_name(f"{tar.name}.part")
    _fetch(archive.url, part, progress)
    _verify(part, archive)
    part.replace(tar)
    return tar


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


def _verify(path: Path, archive: Archive) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(archive.algorithm, usedforsecurity=False)).hexdigest()
    if found == archive.digest:
        return
    said = f"its {archive.algorithm.upper()} is {found}"
    if path.suffix == ".part":
        path.unlink()  # going on from damaged data would never end well
        raise InputError(path, said, archive.digest, "it was deleted; run the same command again")
    raise InputError(path, said, archive.digest, "delete it and run the same command again")


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
