"""The journal: what is kept, what is known to be from here, wherever a run was killed and whichever shard wrote it."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

from medseg.cases import Shard
from medseg.journal import Journal, Prediction, versions
from medseg.records import digest_file


def written(out: Path, case: str, key: str = "k", text: str = "mask", **facts: object) -> Prediction:
    """A record of a mask that is in the folder."""
    out.mkdir(exist_ok=True)
    (out / f"{case}.nii.gz").write_text(text)
    digest = digest_file(out / f"{case}.nii.gz")
    fields = {"case": case, "status": "done", "output": f"{case}.nii.gz", "key": key, "output_digest": digest, **facts}
    return Prediction.checked(fields, "test")


def test_a_case_is_kept_where_key_and_file_are_as_they_were(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    record = written(tmp_path, "a", volumes_ml={"organ": 1.5})
    first.add(record)
    again = Journal(tmp_path)
    kept = again.kept("a", "k")
    assert kept is not None
    assert (kept.status, kept.volumes_ml) == ("kept", {"organ": 1.5})
    assert again.kept("a", "another key") is None
    assert again.kept("b", "k") is None
    (tmp_path / "a.nii.gz").write_text("changed")
    assert again.kept("a", "k") is None
    (tmp_path / "a.nii.gz").unlink()
    assert again.kept("a", "k") is None


def test_a_line_whose_mask_never_took_its_name_keeps_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """A kill between the line and the file: the mask of before is still known to be from here."""
    Journal(tmp_path).add(written(tmp_path, "a", key="old", text="old mask"))
    Journal(tmp_path).add(written(tmp_path, "a", key="new", text="new mask"))
    (tmp_path / "a.nii.gz").write_text("old mask")
    found = Journal(tmp_path)
    assert found.kept("a", "new") is None
    assert found.kept("a", "old") is not None
    assert found.wrote("a", "a.nii.gz")
    assert not found.wrote("b", "a.nii.gz")
    (tmp_path / "a.nii.gz").write_text("by hand")
    assert not found.wrote("a", "a.nii.gz")
    assert found.knows("a", "a.nii.gz")
    assert not found.knows("a", "b.nii.gz")


def test_a_case_is_kept_only_with_the_probabilities_that_are_wanted(tmp_path: Path) -> None:
    name = "probabilities/a_organ.nii.gz"
    (tmp_path / "probabilities").mkdir()
    (tmp_path / name).write_text("p")
    made = Journal(tmp_path)
    made.add(written(tmp_path, "a"))
    assert made.kept("a", "k") is not None
    assert made.kept("a", "k", [name]) is None
    made.add(written(tmp_path, "a", probability_digests={name: digest_file(tmp_path / name)}))
    assert made.kept("a", "k", [name]) is not None
    (tmp_path / name).write_text("q")
    assert made.kept("a", "k", [name]) is None
    assert made.kept("a", "k") is not None


def test_lines_that_are_torn_foreign_or_of_another_version_are_passed_over(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.add(written(tmp_path, "a"))
    first.add(written(tmp_path, "b"))
    whole = first.path.read_bytes()
    first.path.write_bytes(b'[1]\n{"case": "c", "status": "started"}\n\xff\xfe\n' + whole[:-20])
    found = Journal(tmp_path)
    assert found.kept("a", "k") is not None
    assert found.kept("b", "k") is None
    found.add(written(tmp_path, "b"))  # on a line of its own
    assert Journal(tmp_path).kept("b", "k") is not None


def test_a_kept_case_has_the_flags_of_its_record_and_an_old_record_has_none(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.add(written(tmp_path, "a", qc_flags=FLAGS))
    first.add(written(tmp_path, "b"))
    line, of_today = first.path.read_text().splitlines()
    old = of_today.replace('"qc_flags": [], ', "")
    assert "qc_flags" not in old
    first.path.write_text(f"{line}\n{old}\n")
    found = Journal(tmp_path)
    kept = [found.kept(case, "k") for case in "ab"]
    assert [record and (record.status, record.qc_flags) for record in kept] == [("kept", FLAGS), ("kept", ())]


def test_shards_write_files_of_their_own_and_read_those_of_all(tmp_path: Path) -> None:
    for index, case in ((1, "a"), (2, "b")):
        made = Journal(tmp_path, Shard(index, 2))
        made.add(written(tmp_path, case))
        made.results[case] = written(tmp_path, case)
        made.write_tables(["organ"], 1, {})
    expected = {f"{stem}-{n}-of-2{end}" for n in (1, 2) for stem, end in zip(*FILES, strict=True)}
    assert {path.name for path in tmp_path.iterdir()} == expected | {"a.nii.gz", "b.nii.gz"}
    alone = Journal(tmp_path)
    assert alone.kept("a", "k") is not None
    assert alone.kept("b", "k") is not None
    assert alone.path.name == "journal.jsonl"


FLAGS = ("empty:lesion", "touches_border:organ:left+superior")
FILES = (("journal", "cases", "run"), (".jsonl", ".csv", ".json"))


def test_the_tables_say_what_became_of_every_case(tmp_path: Path) -> None:
    made = Journal(tmp_path)
    stages = {"read": 0.5, "prepare": 1.0, "network": 4.0, "write": 0.25}
    facts = {"seconds": 5.75, "stages": stages, "peak_memory_mb": 900.5, "strategy": "summed on the host"}
    made.results["b"] = written(
        tmp_path, "b", volumes_ml={"organ": 2.0}, warnings=("odd", "strange"), qc_flags=FLAGS, **facts
    )
    made.results["a"] = Prediction(case="a", status="failed", reason="line one\nline two")
    made.write_tables(["organ", "whole"], 5, {"model": "phantom"})
    with made.table.open(newline="") as file:
        bad, good = csv.DictReader(file)
    assert good == {
        "case": "b",
        "status": "done",
        "output": "b.nii.gz",
        "seconds": "5.75",
        "read_s": "0.5",
        "prepare_s": "1.0",
        "network_s": "4.0",
        "write_s": "0.25",
        "peak_memory_mb": "900.5",
        "strategy": "summed on the host",
        "organ_ml": "2.0",
        "whole_ml": "",
        "qc_flags": "empty:lesion;touches_border:organ:left+superior",
        "warnings": "odd; strange",
        "reason": "",
    }
    assert (bad["case"], bad["status"], bad["reason"], bad["network_s"]) == ("a", "failed", "line one line two", "")
    run = json.loads(made.run.read_text())
    assert run["model"] == "phantom"
    assert run["cases"] == {"done": 1, "kept": 0, "failed": 1, "open": 3}
    assert run["seconds"] == stages
    assert (run["peak_memory_mb"], run["strategies"]) == (900.5, {"summed on the host": 1})
    assert "not a medical device" in run["notice"]
    assert "heuristics" in run["qc_notice"]


def test_tables_of_nothing(tmp_path: Path) -> None:
    made = Journal(tmp_path)
    made.write_tables([], 0, {})
    assert made.table.read_text().count("\n") == 1
    assert json.loads(made.run.read_text())["cases"] == {"done": 0, "kept": 0, "failed": 0, "open": 0}


def test_versions_name_python_and_the_libraries() -> None:
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"medseg", "torch", "monai", "numpy"} <= set(found)
    assert all(re.match(r"\d+\.\d+", version) for version in found.values())


def test_a_case_is_kept_with_the_formats_that_are_wanted_whichever_was_written_first(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_text("segments")
    made = Journal(tmp_path)
    made.add(written(tmp_path, "a", mask_digests={"a.dcm": digest_file(tmp_path / "a.dcm")}))
    again = Journal(tmp_path)
    for files in (["a.nii.gz"], ["a.nii.gz", "a.dcm"], ["a.dcm"]):
        kept = again.kept("a", "k", files)
        assert kept is not None
        assert kept.output == files[0]
        assert kept.output_digest == digest_file(tmp_path / files[0])
    assert again.kept("a", "k", ["a.nii.gz", "a.mha"]) is None
    assert again.wrote("a", "a.dcm")
    assert again.outdated("a", "another image") == [tmp_path / "a.nii.gz", tmp_path / "a.dcm"]
    (tmp_path / "a.dcm").unlink()
    assert again.kept("a", "k", ["a.nii.gz", "a.dcm"]) is None
    assert again.kept("a", "k", ["a.nii.gz"]) is not None


def test_lines_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_text("mask")
    line = {"case": "a", "status": "done", "output": "a.nii.gz", "key": "k", "input_digest": "i"}
    line |= {"output_digest": digest_file(tmp_path / "a.nii.gz"), "probability_digests": {}}
    (tmp_path / "journal.jsonl").write_text(json.dumps(line) + "\n")
    assert Journal(tmp_path).kept("a", "k", ["a.nii.gz"]) is not None
