"""Records: JSON and back, refusals, overrides, digests, and files that are old or new but never half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from medseg import records
from medseg.errors import InputError, PlanError
from medseg.records import (
    Record,
    digest_file,
    digest_of,
    failures_named,
    read_json,
    remove_leftovers,
    replacing,
    write_bytes,
    write_json,
    write_text,
)


class Inner(Record):
    sizes: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] = "a"


class Outer(Record):
    name: str
    rate: float = Field(default=0.5, gt=0)
    inner: Inner = Inner()
    table: dict[str, int] = {}


@given(
    st.builds(
        Outer,
        name=st.text(),
        rate=st.floats(min_value=1e-300, allow_nan=False),
        inner=st.builds(Inner, sizes=st.lists(st.integers(-(2**60), 2**60)).map(tuple)),
        table=st.dictionaries(st.text(), st.integers(0, 9)),
    )
)
def test_json_and_back_is_the_same_record_with_the_same_digest(record: Outer) -> None:
    copy = Outer.model_validate_json(record.model_dump_json())
    assert copy == record
    assert copy.digest() == record.digest()


def test_save_and_load(tmp_path: Path) -> None:
    record = Outer(name="café", rate=float("inf"), table={"b": 1, "a": 2})
    record.save(tmp_path / "deep" / "outer.json")
    assert Outer.load(tmp_path / "deep" / "outer.json") == record
    assert json.loads((tmp_path / "deep" / "outer.json").read_text())["schema_version"] == 1


def test_digest_ignores_key_order_and_nothing_else() -> None:
    expected = (
        "0855bfc20eb6cfaa4be7d6b510c63dd22997718bddadcb1a4915cec3a16145b9"  # printf '{"a":1,"b":[2]}' | sha256sum
    )
    assert digest_of({"b": [2], "a": 1}) == digest_of({"a": 1, "b": [2]}) == expected
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_a_record_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().kind = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[1]", "holds a JSON list"),
        ('{"name": "x"}', "schema version None"),
        ('{"schema_version": 99, "name": "x"}', "schema version 99"),
        ('{"schema_version": 1}', "name: Field required"),
        ('{"schema_version": 1, "name": "x", "other": 3}', "other: Extra inputs"),
        ('{"schema_version": 1, "name": 3}', "name: Input should be a valid string"),
        ('{"schema_version": 1, "name": "x", "inner": {"kind": "c"}}', "inner.kind"),
    ],
)
def test_load_refuses_with_the_reason_and_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"record\.json") as caught:
        Outer.load(path)
    assert words in str(caught.value)


def test_load_refuses_a_missing_file_and_binary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Outer.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no JSON"):
        read_json(tmp_path / "binary.json")


def test_override_parses_json_and_bare_words() -> None:
    record = Outer(name="x", table={"a": 1}).override(
        ["plan.rate=2", "plan.inner.sizes=[4, 5]", "plan.inner.kind=b", "plan.table.a = 7", "plan.name=new name"]
    )
    assert record == Outer(name="new name", rate=2.0, inner=Inner(sizes=(4, 5), kind="b"), table={"a": 7})


def test_override_of_one_entry_of_a_tuple_and_with_another_prefix() -> None:
    assert Inner().override(["train.sizes.1=9"], prefix="train") == Inner(sizes=(1, 9))


def test_override_of_nothing_is_the_same_record() -> None:
    assert Inner().override([]) == Inner()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("plan.rate", "not a setting"),
        ("rate=1", "not a setting"),
        ("plan=1", "not a setting"),
        ("plan.speed=1", "plan has no field 'speed'"),
        ("plan.inner.colour=1", "one of sizes, kind"),
        ("plan.inner.sizes.2=1", "one of 0, 1"),
        ("plan.rate.x=1", "one of nothing"),
        ("plan.rate=fast", "rate"),
        ("plan.rate=-1", "greater than 0"),
        ("plan.inner.kind=c", "'a' or 'b'"),
    ],
)
def test_override_refuses(setting: str, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        Outer(name="x").override([setting])
    assert words in str(caught.value)
    assert setting in str(caught.value)


def test_override_names_its_own_prefix() -> None:
    with pytest.raises(PlanError, match="train has no field 'x'"):
        Inner().override(["train.x=1"], prefix="train")


def test_files_are_written_as_given(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"\0\1")
    write_text(tmp_path / "b", "ä\n")
    write_json(tmp_path / "c", {"x": [1]})
    assert (tmp_path / "a").read_bytes() == b"\0\1"
    assert (tmp_path / "b").read_bytes() == b"\xc3\xa4\n"
    assert read_json(tmp_path / "c") == {"x": [1]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")  # the test vector of FIPS 180-2, appendix B.1
    assert digest_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_digest_of_a_folder_is_of_the_names_and_contents_in_it(tmp_path: Path) -> None:
    for folder, names in (("one", "a/x b"), ("same", "a/x b"), ("other", "a/y b"), ("less", "b")):
        for name in names.split():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(name[-1])
    one, same, other, less = (digest_file(tmp_path / folder) for folder in ("one", "same", "other", "less"))
    assert one == same
    assert len({one, other, less}) == 3
    (tmp_path / "same" / "b").write_text("changed")
    assert digest_file(tmp_path / "same") != one


def _write_half_and_fail(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")


def test_a_failing_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="No space") as caught:
        _write_half_and_fail(path)
    assert caught.value.filename == str(path)  # not the temporary one
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_has_the_name_of_the_file_that_was_wanted(tmp_path: Path) -> None:
    path, other = tmp_path / "result.txt", tmp_path / "none"
    with pytest.raises(FileNotFoundError) as caught, replacing(path) as outer, replacing(outer) as inner:
        inner.rename(other)  # it was never written
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught, replacing(path):
        other.read_text()  # another file: its name stays
    assert caught.value.filename == str(other)
    with pytest.raises(OSError, match=r"^of a library$"), failures_named(path):
        raise OSError("of a library")
    path.mkdir()
    with pytest.raises(IsADirectoryError) as folder:
        write_text(path, "x")
    assert folder.value.filename == str(path)


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path: Path) -> None:
    path = tmp_path / "result.nii.gz"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
        assert temporary.name.endswith(".nii.gz")
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["ü" * 120 + ".nii.gz", "脳" * 80 + ".nii.gz", "x" * 240 + ".json"])
def test_long_names_can_be_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("keep.txt", f"{records.TEMPORARY_PREFIX}1-a", f"sub/{records.TEMPORARY_PREFIX}2-b"):
        (tmp_path / name).write_text("x")
    assert remove_leftovers(tmp_path) == 2
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["keep.txt"]
    assert remove_leftovers(tmp_path) == 0
