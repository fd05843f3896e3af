"""medseg.io.dicom.archive: folders and zips read in place; what leads out of a zip, or out of memory, refused."""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from medseg.errors import InputError, UnreadableFile
from medseg.io.dicom import archive
from medseg.io.dicom.archive import Instance, Reader, instances


def zipped(path: Path, *names: str, content: bytes = b"content", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name in names:
            file.writestr(zipfile.ZipInfo(name), content, method)
    return path


def test_files_of_a_folder_and_below(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z", ".hidden", "b/c/y"):
        (tmp_path / name).write_bytes(b"")
    passed_over: Counter[str] = Counter()
    assert instances(tmp_path, passed_over) == [Instance(tmp_path / name) for name in (".hidden", "b/c/y", "z")]
    assert not passed_over


def test_links_to_folders_and_deep_folders_are_counted(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    deep = tmp_path
    for _ in range(archive.MAX_DEPTH + 2):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"")
    (tmp_path / "linked").symlink_to(Path(__file__))
    os.mkfifo(tmp_path / "pipe")
    passed_over: Counter[str] = Counter()
    assert instances(tmp_path, passed_over) == [Instance(tmp_path / "linked")]
    assert passed_over == {"link to a folder": 1, "no file": 1, "link that leads nowhere": 1, "folder too deep": 1}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        instances(tmp_path / "nothing", Counter())


def test_members_of_a_zip_are_read_in_place(tmp_path: Path) -> None:
    path = zipped(tmp_path / "study", "b/2", "a/1", "empty/", content=bytes(range(256)) * 40)
    found = instances(path, Counter())
    assert found == [Instance(path, "a/1"), Instance(path, "b/2")]
    with Reader() as reader:
        with reader.open(found[0]) as stream:
            assert stream.read(4) == b"\0\1\2\3"
            stream.seek(1)
            assert stream.read(2) == b"\1\2"
        assert reader.size(found[1]) == 10240
        assert reader.content(found[1]) == bytes(range(256)) * 40
        assert reader.head(found[1], 3) == b"\0\1\2"
        assert reader.head(Instance(path, "missing"), 3) == b""
    assert [entry.name for entry in tmp_path.iterdir()] == ["study"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "\\x", "C:\\x", "C:x", "a\\..\\..\\x", "a\0b"])
def test_names_that_lead_out_of_a_zip(name: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", "x" * len(name))
    path.write_bytes(path.read_bytes().replace(b"x" * len(name), name.encode()))
    with pytest.raises(InputError, match="leads out of the zip"):
        instances(path, Counter())


def test_links_passwords_and_other_methods(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    locked = zipped(tmp_path / "locked.zip", "a")
    content = bytearray(locked.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    locked.write_bytes(content)
    packed = zipped(tmp_path / "packed.zip", "a", method=zipfile.ZIP_BZIP2)
    for path, found in ((tmp_path / "link.zip", "is a link"), (locked, "encrypted"), (packed, "otherwise than by")):
        with pytest.raises(InputError, match=found):
            instances(path, Counter())


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "a.zip", "a", content=bytes(10**6))  # 1000 times, by deflate
    monkeypatch.setattr(archive, "MAX_RATIO", 500)
    with pytest.raises(InputError, match="times its size"):
        instances(path, Counter())
    monkeypatch.setattr(archive, "MAX_RATIO", 2000)
    monkeypatch.setattr(archive, "MAX_BYTES", 10**6 - 1)
    with pytest.raises(InputError, match="1,000,000 bytes"):
        instances(path, Counter())
    monkeypatch.setattr(archive, "MAX_BYTES", 10**6)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 0)
    with pytest.raises(InputError, match="1 members"):
        instances(path, Counter())
    monkeypatch.setattr(archive, "MAX_MEMBERS", 1)
    assert len(instances(path, Counter())) == 1


def test_a_member_longer_than_it_says_is_cut_and_found_out(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", "a", content=bytes(10**6))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\1\2") + 24
    content[place : place + 4] = (5000).to_bytes(4, "little")
    path.write_bytes(content)
    with Reader() as reader, pytest.raises(UnreadableFile, match="member of the zip is damaged"):
        reader.content(Instance(path, "a"))


def test_a_damaged_member_and_a_damaged_zip(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", "a", content=os.urandom(9000), method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    with Reader() as reader, pytest.raises(UnreadableFile, match="member of the zip is damaged"):
        reader.content(Instance(path, "a"))
    path.write_bytes(content[:5000])
    with pytest.raises(UnreadableFile, match="damaged zip"):
        instances(path, Counter())
    content = bytearray(zipped(path, "a", "b").read_bytes())
    content[content.rindex(b"PK\1\2")] ^= 1  # the second entry of the list is none: zipfile sees one member
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match="damaged zip"):
        instances(path, Counter())
    assert not archive.is_zip(tmp_path / "nothing")


def test_a_zip_that_counts_more_members_than_it_lists(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", "a", "b")
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\5\6") + 10
    content[place : place + 2] = (3).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match="damaged zip"):
        instances(path, Counter())


@pytest.mark.parametrize("missing", [0, 1])
def test_a_zip_of_more_members_than_16_bits_can_count(missing: int, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", *map(str, range(65536)), content=b"", method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\6\6") + 32
    content[place : place + 8] = (65536 + missing).to_bytes(8, "little")
    path.write_bytes(content)
    if missing:
        with pytest.raises(UnreadableFile, match="damaged zip"):
            instances(path, Counter())
    else:
        assert len(instances(path, Counter())) == 65536


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_two_members_of_one_name(tmp_path: Path) -> None:
    """Only the last of them could be opened, twice."""
    with pytest.raises(InputError, match="several members have one name"):
        instances(zipped(tmp_path / "a.zip", "a", "a"), Counter())
