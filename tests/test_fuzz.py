"""Damaged headers of every format: typed errors, no hang, no memory beyond the need. See benchmarks/fuzz.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from dicoms import write_series
from pydicom import Dataset, dcmread
from pydicom.uid import RLELossless

from medseg.errors import UnreadableFile
from medseg.geometry import Geometry
from medseg.io import dicom
from medseg.io.dicom import segmentation
from medseg.volume import Labels, Mask

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """benchmarks/fuzz.py as a module."""
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["nifti", "dicom", "seg", "nrrd", "tables"])
def test_some_damaged_files_are_read_or_refused(fuzz: ModuleType, kind: str, tmp_path: Path) -> None:
    report = fuzz.Report()
    with fuzz.Fuzzer(kind, 3, tmp_path) as fuzzer:
        for number in range(200):
            report.add(fuzzer.case(number))
    assert not report.failures, str(report)
    assert report.outcomes["read"] > 10  # not all of them so damaged that nothing looks at their fields
    assert report.outcomes["refused: UnreadableFile"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nifti", "dicom", "seg", "nrrd", "tables"])
def test_ten_thousand_damaged_files_are_read_or_refused(fuzz: ModuleType, kind: str) -> None:
    report = fuzz.run(kind, 10_000)
    assert not report.failures, str(report)
    assert report.outcomes.total() == 10_000


def _broken(fuzz: ModuleType, how: str) -> None:
    """Puts a kind of file "broken" that fails as told to the third time that it is read."""
    times = iter(range(1000))

    def read(folder: Path) -> int:
        if next(times) == 2:
            exec(how, {"fuzz": fuzz, "UnreadableFile": UnreadableFile})
        return 0

    fuzz.KINDS["broken"] = fuzz.Kind(lambda _: [{"a": b"abcdefgh"}, {"b": b"12345678"}], fuzz.anyhow, read)


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import logging; logging.getLogger('medseg').error('of %s', fuzz.MARKER)", "in the log"),
        ("raise UnreadableFile('a.dcm', f'is of {fuzz.MARKER}')", "in an error"),
        ("fuzz.LIMIT_S = -1.0", " s"),
    ],
)
def test_failures_are_found(
    fuzz: ModuleType, how: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "LIMIT_S", fuzz.LIMIT_S)
    monkeypatch.setattr(fuzz, "KINDS", dict(fuzz.KINDS))
    _broken(fuzz, how)
    with fuzz.Fuzzer("broken", 0, tmp_path, tmp_path / "kept") as fuzzer:
        case = fuzzer.case(0)
    assert case.outcome.startswith("FAILED")
    assert found in case.outcome
    assert (tmp_path / "kept" / "broken_0_0").is_dir()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux alone")
def test_memory_beyond_the_need_is_found(fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "KINDS", dict(fuzz.KINDS))
    _broken(fuzz, "b'1' * (32 * fuzz.SLACK_BYTES)")  # more than an allocator keeps of what was freed before
    with fuzz.Fuzzer("broken", 0, tmp_path) as fuzzer:
        assert "memory" in fuzzer.case(0).outcome


def test_a_process_that_ends_is_found_and_the_next_go_on(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script in place of fuzz.py that crashes at case 1 and goes on from 2."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\n"
        "for number in range(int(sys.argv[sys.argv.index('--first') + 1]), 4):\n"
        "    if number == 1: os.abort()\n"
        "    print(json.dumps({'number': number, 'outcome': 'read'}), flush=True)\n"
    )
    monkeypatch.setattr(fuzz, "__file__", str(script))
    report = fuzz.run("nifti", 4)
    assert report.outcomes["read"] == 3
    assert [(case.number, "the process ended" in case.outcome) for case in report.failures] == [(1, True)]


def test_a_process_without_a_word_is_ended(fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    script.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(fuzz, "__file__", str(script))
    monkeypatch.setattr(fuzz, "HANG_S", 0.5)
    assert "no word" in fuzz.run("nifti", 1).failures[0].outcome


# What was found so


def test_a_rescale_intercept_of_another_kind(tmp_path: Path) -> None:
    def change(dataset: Dataset, _: int) -> None:
        del dataset.RescaleIntercept
        dataset.add_new(0x00281052, "SS", -7)

    array = np.arange(4 * 3 * 2, dtype=np.int16).reshape(4, 3, 2)
    write_series(tmp_path, array, change=change)
    np.testing.assert_array_equal(dicom.read(tmp_path).array[0], array - 7)


def test_run_lengths_are_not_unpacked_for_more_than_they_can_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(dataset: Dataset, _: int) -> None:
        dataset.Rows = 65535

    write_series(tmp_path, np.zeros((4, 3, 2), np.int16), syntax=RLELossless, change=change)
    monkeypatch.setattr("pydicom.pixels.decoders.base.get_decoder", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableFile, match="cannot be decoded"):
        dicom.read(tmp_path)


def test_frames_of_a_segmentation_too_large_for_their_run_lengths(tmp_path: Path) -> None:
    write_series(tmp_path / "images", np.zeros((40, 30, 2), np.int16))
    series = dicom.select(dicom.scan(tmp_path / "images"))[0]
    assert isinstance(series.geometry, Geometry)
    mask = Mask(np.ones((40, 30, 2), np.uint8), series.geometry, Labels(values={"liver": 1}), (), series)
    segmentation.write(mask, tmp_path / "a.dcm", kind="LABELMAP")
    dataset = dcmread(tmp_path / "a.dcm")
    assert dataset.file_meta.TransferSyntaxUID == RLELossless
    dataset.Rows = dataset.Columns = 1000  # two million voxels in 300 bytes
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(UnreadableFile, match="2 frames of 1000x1000"):
        segmentation.read_mask(tmp_path / "a.dcm")
