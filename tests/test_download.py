"""Downloads from a server on loopback: broken connections, wrong checksums, archives that climb."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest
from typer.testing import CliRunner

from medseg import download
from medseg.cli import app
from medseg.download import (
    NIIVUE,
    Archive,
    download_archive,
    download_task,
    download_viewer,
    find_archive,
    viewer_file,
    viewer_folder,
)
from medseg.errors import InputError, UnreadableFile
from medseg.records import TEMPORARY_PREFIX

NAME = "Task99_Tiny"


class Server(ThreadingHTTPServer):
    """Serves ``files``; cuts every answer after ``limit`` bytes; notes what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.limit = 2**30
        self.ranges = True
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.limit])
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def tar_of(*entries: tuple[str, bytes] | tarfile.TarInfo, mode: Literal["w", "w:gz"] = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                file.addfile(entry)
                continue
            member = tarfile.TarInfo(entry[0])
            member.size = len(entry[1])
            file.addfile(member, io.BytesIO(entry[1]))
    return buffer.getvalue()


GOOD = tar_of(
    ("._Task99_Tiny", b"macOS"),
    (f"./{NAME}/dataset.json", b"{}"),
    (f"{NAME}/labelsTr/a.nii.gz", bytes(3000)),
    (f"{NAME}/labelsTr/._a.nii.gz", b"macOS"),
)


def offered(server: Server, content: bytes, md5: str = "") -> Archive:
    server.files[f"/{NAME}.tar"] = content
    return Archive(NAME, f"{server.url}/{NAME}.tar", md5 or hashlib.md5(content).hexdigest())


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


WHOLE = [f"{NAME}.tar", f"{NAME}/dataset.json", f"{NAME}/labelsTr/a.nii.gz"]


def test_download_and_unpack(server: Server, tmp_path: Path) -> None:
    steps: list[tuple[str, float, str]] = []
    archive = offered(server, GOOD)
    assert download_archive(archive, tmp_path / "data", lambda *step: steps.append(step)) == tmp_path / "data" / NAME
    assert listing(tmp_path / "data") == WHOLE
    assert {step[0] for step in steps} == {"downloading", "unpacking"}
    assert all(0.0 < step[1] <= 1.0 for step in steps)


def test_what_is_there_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    archive = offered(server, GOOD)
    download_archive(archive, tmp_path)
    download_archive(archive, tmp_path)
    assert server.asked == [None]
    (tmp_path / NAME / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"has no dataset\.json"):
        download_archive(archive, tmp_path)
    (tmp_path / NAME).rename(tmp_path / "aside")
    download_archive(archive, tmp_path)
    assert server.asked == [None]  # the archive was still there


def test_goes_on_where_an_earlier_run_stopped(server: Server, tmp_path: Path) -> None:
    archive = offered(server, GOOD)
    (tmp_path / f"{NAME}.tar.part").write_bytes(GOOD[:1234])
    download_archive(archive, tmp_path)
    assert server.asked == ["bytes=1234-"]
    assert listing(tmp_path) == WHOLE


def test_reconnects_while_something_comes(server: Server, tmp_path: Path) -> None:
    archive = offered(server, GOOD)
    server.limit = 4000
    download_archive(archive, tmp_path)
    assert server.asked == [None, "bytes=4000-", "bytes=8000-"]
    assert listing(tmp_path) == WHOLE


def test_gives_up_when_nothing_comes_and_goes_on_later(server: Server, tmp_path: Path) -> None:
    archive = offered(server, GOOD)
    server.limit = 0
    (tmp_path / f"{NAME}.tar.part").write_bytes(GOOD[:100])
    with pytest.raises(InputError, match="after 100 bytes"):
        download_archive(archive, tmp_path)
    server.limit = 2**30
    download_archive(archive, tmp_path)
    assert listing(tmp_path) == WHOLE


def test_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    archive = offered(server, GOOD)
    server.ranges = False
    (tmp_path / f"{NAME}.tar.part").write_bytes(b"x" * 100)
    download_archive(archive, tmp_path)
    assert listing(tmp_path) == WHOLE


def test_part_that_is_whole_is_taken(server: Server, tmp_path: Path) -> None:
    archive = offered(server, GOOD)
    (tmp_path / f"{NAME}.tar.part").write_bytes(GOOD)
    download_archive(archive, tmp_path)
    assert listing(tmp_path) == WHOLE


def test_wrong_checksum_is_refused_and_deleted(server: Server, tmp_path: Path) -> None:
    archive = offered(server, GOOD, md5="0" * 32)
    with pytest.raises(InputError, match="0000"):
        download_archive(archive, tmp_path)
    assert listing(tmp_path) == []


def test_foreign_archive_in_the_way_is_left_alone(server: Server, tmp_path: Path) -> None:
    archive = offered(server, GOOD)
    (tmp_path / f"{NAME}.tar").write_bytes(b"mine")
    with pytest.raises(InputError, match="Delete it"):
        download_archive(archive, tmp_path)
    assert (tmp_path / f"{NAME}.tar").read_bytes() == b"mine"


def link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(f"{NAME}/link")
    member.type, member.linkname = kind, "../../outside"
    return member


BEGINNING = (f"{NAME}/dataset.json", b"{}")


@pytest.mark.parametrize(
    "climbing",
    [
        ("../outside", b"x"),
        (f"{NAME}/../../outside", b"x"),
        ("/outside", b"x"),
        link(tarfile.SYMTYPE),
        link(tarfile.LNKTYPE),
        link(tarfile.CHRTYPE),
        link(tarfile.FIFOTYPE),
    ],
    ids=["up", "in and up", "absolute", "symbolic link", "hard link", "device", "pipe"],
)
def test_archive_that_climbs_is_refused(
    server: Server, tmp_path: Path, climbing: tuple[str, bytes] | tarfile.TarInfo
) -> None:
    archive = offered(server, tar_of(BEGINNING, climbing))
    with pytest.raises(InputError, match=r"leaves the archive's folder|is a link or a device"):
        download_archive(archive, tmp_path / "data")
    assert listing(tmp_path) == [f"data/{NAME}.tar"]
    assert not list((tmp_path / "data").glob(f"{TEMPORARY_PREFIX}*"))


def test_damaged_archive_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="cannot be unpacked"):
        download_archive(offered(server, GOOD[:1000]), tmp_path)
    assert not (tmp_path / NAME).exists()


def test_archive_of_something_else_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no Task99_Tiny/dataset\.json"):
        download_archive(offered(server, tar_of(("Other/dataset.json", b"{}"))), tmp_path)
    assert listing(tmp_path) == [f"{NAME}.tar"]


def test_leftovers_of_a_killed_unpacking_vanish(server: Server, tmp_path: Path) -> None:
    left = tmp_path / f"{TEMPORARY_PREFIX}{NAME}"
    left.mkdir()
    (left / "half").touch()
    download_archive(offered(server, GOOD), tmp_path)
    assert not left.exists()


def test_server_without_the_archive(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="answered 404"):
        download_task("Task04", tmp_path, base_url=server.url)


def test_mirror_must_have_the_same_archive(server: Server, tmp_path: Path) -> None:
    server.files["/mirror/Task04_Hippocampus.tar"] = GOOD
    with pytest.raises(InputError, match="expected 9d24dba78a72977dbd1d2e110310f31b"):  # MONAI's checksum of Task04
        download_task("hippocampus", tmp_path, base_url=f"{server.url}/mirror/")


def test_server_that_cannot_be_reached(tmp_path: Path) -> None:
    with Server() as server:
        url = server.url
    with pytest.raises(InputError, match="goes on"):
        download_archive(Archive(NAME, f"{url}/x.tar", ""), tmp_path)


def test_only_web_addresses(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(GOOD)
    with pytest.raises(InputError, match="is no web address"):
        download_archive(Archive(NAME, (tmp_path / "x.tar").as_uri(), ""), tmp_path / "data")


@pytest.mark.parametrize("name", ["Task04", "task04_hippocampus", "Hippocampus", "HIPPOCAMPUS"])
def test_tasks_have_several_names(name: str) -> None:
    archive = find_archive(name)
    assert archive.name == "Task04_Hippocampus"
    assert archive.url.endswith("/Task04_Hippocampus.tar")
    assert archive.digest == "9d24dba78a72977dbd1d2e110310f31b"


@pytest.mark.parametrize("name", ["Task11", "", "Task", "04"])
def test_unknown_task_lists_the_known(name: str) -> None:
    with pytest.raises(InputError, match=r"Task01_BrainTumour.*Task10_Colon"):
        find_archive(name)


# ---- the viewer ------------------------------------------------------------------------------------------------------

SCRIPT = b"(function () { /* not NiiVue */ })();"
PACKAGE = tar_of(
    ("package/README.md", b"read me"),
    ("package/package.json", b'{"license": "BSD-2-Clause"}'),
    ("package/dist/niivue.umd.js", SCRIPT),
    ("package/dist/index.js", b"the same for others"),
    mode="w:gz",
)
PLACE = "/@niivue/niivue/-/niivue-0.69.0.tgz"


@pytest.fixture
def registry(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a registry whose package has the right checksums; the user's data folder is ``tmp_path``."""
    server.files[f"/npm{PLACE}"] = PACKAGE
    archive = replace(NIIVUE, digest=hashlib.sha512(PACKAGE).hexdigest())
    monkeypatch.setattr("medseg.download.NIIVUE", archive)
    monkeypatch.setattr("medseg.download._NIIVUE_SHA256", hashlib.sha256(SCRIPT).hexdigest())
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return f"{server.url}/npm/"


KEPT = ["medseg/niivue/niivue.umd.js", "medseg/niivue/package.json"]


def test_viewer_is_fetched_once_and_kept_with_what_names_its_licence(
    server: Server, registry: str, tmp_path: Path
) -> None:
    assert viewer_file() is None
    path = download_viewer(base_url=registry)
    assert path.read_bytes() == SCRIPT
    assert viewer_file() == path
    assert download_viewer(base_url=registry) == path
    assert server.asked == [None]
    assert listing(tmp_path) == KEPT


def test_viewer_goes_on_where_an_earlier_run_stopped(server: Server, registry: str, tmp_path: Path) -> None:
    viewer_folder().mkdir(parents=True)
    (viewer_folder() / f"{NIIVUE.file}.part").write_bytes(PACKAGE[:50])
    download_viewer(base_url=registry)
    assert server.asked == ["bytes=50-"]
    assert listing(tmp_path) == KEPT


def test_viewer_that_was_changed_is_not_taken_but_fetched_again(server: Server, registry: str) -> None:
    path = download_viewer(base_url=registry)
    path.write_bytes(b"alert(1)")
    assert viewer_file() is None
    assert download_viewer(base_url=registry).read_bytes() == SCRIPT
    assert server.asked == [None, None]


def test_viewer_of_another_checksum_is_refused(server: Server, registry: str, tmp_path: Path) -> None:
    server.files[f"/npm{PLACE}"] = PACKAGE + b"more"
    with pytest.raises(InputError, match="its SHA512 is"):
        download_viewer(base_url=registry)
    assert listing(tmp_path) == []


def test_viewer_can_be_brought_to_a_machine_without_network(server: Server, registry: str, tmp_path: Path) -> None:
    viewer_folder().mkdir(parents=True)
    (viewer_folder() / "niivue-niivue-0.69.0.tgz").write_bytes(PACKAGE)
    download_viewer()
    assert server.asked == []
    assert listing(tmp_path) == KEPT


def test_viewer_is_the_package_that_npm_has(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tarball = os.environ.get("MEDSEG_TEST_VIEWER")
    if not tarball:
        pytest.skip("needs NiiVue: set MEDSEG_TEST_VIEWER to what `npm pack @niivue/niivue@0.69.0` makes")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    server.files[PLACE] = Path(tarball).read_bytes()
    path = download_viewer(base_url=server.url)
    assert viewer_file() == path
    assert '"license": "BSD-2-Clause"' in path.with_name("package.json").read_text(encoding="utf-8")


def test_command_downloads_the_viewer_and_doctor_says_whether_it_is_there(
    registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    medseg = CliRunner()
    assert "NiiVue: not downloaded; for 3-D views in reports: medseg download" in medseg.invoke(app, ["doctor"]).stdout
    archive = replace(download.NIIVUE, url=registry.rstrip("/") + PLACE)
    monkeypatch.setattr("medseg.download.NIIVUE", archive)
    done = medseg.invoke(app, ["download", "viewer"])
    assert (done.exit_code, done.stdout) == (0, f"{viewer_file()}\n")
    assert "NiiVue: downloaded" in medseg.invoke(app, ["doctor"]).stdout
    refused = medseg.invoke(app, ["download", "viewer", "-o", "here"])
    assert refused.exit_code == 2
    assert "the viewer is kept in the user's data folder" in refused.stderr
