"""What a header says of the patient goes nowhere: every command over images that hold a marker in every text.

The marker may stand in what `medseg dicom scan` prints, and in the patient and study attributes of a DICOM SEG.
"""

from __future__ import annotations

import gzip
import logging
import re
import shutil
import socket
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicoms import write_enhanced, write_series
from numpy.typing import NDArray
from predicting import save
from pydicom import Dataset, Sequence, dcmread
from pydicom.config import disable_value_validation
from pydicom.datadict import DicomDictionary, keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless
from typer.testing import CliRunner

from medseg import io
from medseg.cases import MASK_FORMATS
from medseg.cli import app
from medseg.io.dicom import segmentation
from medseg.phantom import make_case
from medseg.pipeline import RunResult

MARKER = "CANARY^ZOE"
_TEXTS = ("PN", "LO", "SH", "ST", "LT", "UT", "UC", "UR", "AE")
_OTHERS = ("CS", "DA", "TM", "DT", "AS", "DS", "IS")
_NEEDED = {  # without these there is no volume; the marker in them is the matter of test_a_marker_in_what_is_needed
    *("SpecificCharacterSet", "ImageType", "Modality", "PhotometricInterpretation", "RescaleIntercept"),
    *("RescaleSlope", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "NumberOfFrames", "PixelPresentation", "VolumetricProperties"),
}
INHERITED = {
    *("PatientName", "PatientID", "AccessionNumber", "StudyID", "ReferringPhysicianName", "IssuerOfPatientID"),
    *("StudyDescription", "DeidentificationMethod"),
}
"""What a DICOM SEG has of the text of its images: Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1)."""


def raw(tag: int, vr: str, value: str = MARKER) -> RawDataElement:
    """An element whose value is as it is, whether the kind of value allows that or not."""
    content = value.encode() + b" " * (len(value) % 2)
    return RawDataElement(Tag(tag), vr, len(content), content, 0, False, True)


def mark_texts(dataset: Dataset, _: int = 0) -> None:
    """Put the marker into all texts there are, private and nested ones too, and in what should be dates and numbers."""
    for tag, (vr, _vm, _name, _retired, keyword) in DicomDictionary.items():
        if vr in (*_TEXTS, *_OTHERS) and 4 < tag >> 16 < 0xFFFA and keyword not in _NEEDED:
            dataset[tag] = raw(tag, vr)
    dataset[0x00290010] = raw(0x00290010, "LO", "TESTS")
    for element, vr in enumerate(_TEXTS):
        dataset[0x00291010 + element] = raw(0x00291010 + element, vr)
    item = Dataset()
    item.add(raw(0x00400007, "LO"))
    item.add(raw(0x00100010, "PN"))
    dataset.RequestAttributesSequence = Sequence([item])
    dataset.ReferencedPatientSequence = Sequence([item])
    dataset.file_meta.SourceApplicationEntityTitle = dataset.file_meta.ImplementationVersionName = MARKER


def marked(folder: Path, array: NDArray[Any], **options: Any) -> list[Path]:
    """A series, or with ``enhanced`` one file, with the marker in all texts; pydicom's warnings are of no matter."""
    enhanced = options.pop("enhanced", False)
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        options = {"change": mark_texts, "modality": "MR", **options}
        return [write_enhanced(folder, array, **options)] if enhanced else write_series(folder, array, **options)


def voxels() -> NDArray[np.int16]:
    volume, _ = make_case(0, shape=(24, 22, 12))
    return np.ascontiguousarray(volume.array[0], dtype=np.int16)


@pytest.fixture(scope="module")
def package(tiny_run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model."""
    return Path(shutil.copytree(tiny_run.package, tmp_path_factory.mktemp("model") / "package"))


class Console:
    """Runs commands and gathers what they say."""

    def __init__(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        self.said, self._caplog, self._capfd = "", caplog, capfd

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        """Run a command; its standard output."""
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        here = self._capfd.readouterr()
        self.said += result.output + here.out + here.err + self._caplog.text
        if arguments[0] != "dicom":
            assert "CANARY" not in self.said
        else:
            assert "CANARY" not in result.stderr + here.err + self._caplog.text
            self.said = ""
        return result.stdout


@pytest.fixture
def medseg_(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Console:
    caplog.set_level(logging.DEBUG)
    return Console(caplog, capfd)


def contents(path: Path) -> Iterator[bytes]:
    """What a file holds, as it is and unpacked: gzip at its start, or behind the header of a NRRD."""
    content = path.read_bytes()
    yield content
    for start in [0, *(match.end() for match in re.finditer(rb"\n\n", content[:100_000]))]:
        if content[start : start + 2] == b"\x1f\x8b":
            yield gzip.decompress(content[start:])
        elif content[start : start + 1] == b"\x78":
            yield zlib.decompress(content[start:])


def holders(folder: Path) -> set[Path]:
    """Files with the marker in their name or content, in any of the usual encodings."""
    marks = [re.compile(re.escape("CANARY".encode(code)), re.IGNORECASE) for code in ("utf-8", "utf-16-le")]
    found = set()
    for path in folder.rglob("*"):
        assert "canary" not in str(path.relative_to(folder)).lower()
        if path.is_file() and any(mark.search(content) for content in contents(path) for mark in marks):
            found.add(path)
    return found


def marked_in(dataset: Any, keywords: set[str]) -> set[str]:
    """Keywords of elements with the marker, of the items of sequences too."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                marked_in(item, keywords)
        elif "CANARY" in str(element.value):
            keywords.add(keyword_for_tag(element.tag) or str(element.tag))
    return keywords


@pytest.mark.parametrize("make", ["classic", "enhanced", "compressed"])
def test_every_command_over_marked_dicom(
    make: str, medseg_: Console, package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scan, out = tmp_path / "scan", tmp_path / "out"
    syntax = JPEG2000Lossless if make == "compressed" else ExplicitVRLittleEndian
    marked(scan, voxels(), syntax=syntax, enhanced=make == "enhanced")
    caplog.clear()
    assert "CANARY" in medseg_("dicom", "scan", scan, "-v")
    assert "CANARY" in medseg_("dicom", "scan", scan, "--json")  # the user asks for the descriptions
    medseg_("check", scan, "-v")
    formats = ",".join(MASK_FORMATS)
    medseg_("predict", scan, "-m", package, "-o", out, "--format", formats, "--allow-uncoded", "-v")
    medseg_("predict", scan, "-m", package, "-o", out, "--format", formats, "--allow-uncoded", "--report", "-v")
    (mask,) = out.glob("*.nii.gz")
    (segmentation,) = out.glob("*.dcm")
    medseg_("stats", scan, mask, "-o", out / "stats.csv", "-v")
    medseg_("stats", scan, segmentation, "--json", "-v")
    for number, source in enumerate((mask, segmentation, *out.glob("*.seg.nrrd"))):
        for ending in (".nii.gz", ".seg.nrrd", ".mha"):
            medseg_("convert", source, "-o", out / f"converted{number}{ending}", "--reference", scan, "-v")
    medseg_("convert", mask, "-o", out / "converted.dcm", "--reference", scan, "--allow-uncoded", "-v")
    medseg_("evaluate", mask, segmentation, "-o", out / "scores", "--report", "-v")
    found = holders(out)
    assert {path.name for path in found} <= {segmentation.name, "converted.dcm"}
    for path in (segmentation, out / "converted.dcm"):
        dataset = dcmread(path)
        assert marked_in(dataset, set()) | marked_in(dataset.file_meta, set()) == INHERITED
        assert dataset.PatientID.strip() == MARKER


def test_refusals_say_nothing_of_the_patient(package: Path, tmp_path: Path) -> None:
    """Damaged pixels, slices with a gap, a tilt, several series, and what is no volume; alone and in a batch."""
    array = voxels()
    scans = tmp_path / "scans"
    (damaged, *_) = marked(scans / "damaged", array, syntax=JPEG2000Lossless)
    content = bytearray(damaged.read_bytes())
    place = content.index(b"\xff\x4f\xff\x51")  # of JPEG 2000: SOC, SIZ
    content[place : place + 40] = bytes(40)
    damaged.write_bytes(content)
    (short, *_) = marked(scans / "short", array)
    short.write_bytes(short.read_bytes()[:-600])
    marked(scans / "gap", array, offsets=[0, 1, 2, 3, 5, *range(7, 14)])
    marked(scans / "tilt", array, step=(0, 0.3, 1))
    for number in (1, 2):
        marked(scans / f"two{number}", array, study_uid="1.2.3")
    for command in ("check", "predict"):
        for place in [scans, *sorted(scans.iterdir())[:4]]:
            options = ("-m", package, "-o", tmp_path / "out" / place.name) if command == "predict" else ()
            result = CliRunner().invoke(app, [str(a) for a in (command, place, *options, "-v")])
            assert result.exit_code in (2, 3), result.output
            assert "CANARY" not in result.output
    for pattern in ("CANARY^ZO?", "*", "none"):
        arguments = ("predict", scans, "-m", package, "-o", tmp_path / "out", "--series", pattern, "-v")
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        said = result.output.replace(repr(pattern), "").replace(pattern, "")  # the user's own words
        assert result.exit_code in (2, 3)
        assert "CANARY" not in said
    assert not holders(tmp_path / "out")


@pytest.mark.parametrize("keyword", sorted(_NEEDED))
def test_a_marker_in_what_is_needed(keyword: str, tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        mark_texts(dataset)
        tag = Tag(keyword)
        dataset[tag] = raw(tag, DicomDictionary[tag][0])

    marked(tmp_path / "scan", voxels()[:, :, :3], change=change)
    for arguments in (["check", "-v"], ["dicom", "scan", "--json", "-v"]):
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / "scan")])
        assert result.exit_code in (0, 2, 3), result.output
        assert "CANARY" not in result.stderr
        if arguments[0] == "check":
            assert "CANARY" not in result.stdout


@pytest.mark.parametrize("where", ["read_volume", "write_mask"])
def test_a_crash_quotes_no_header(where: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug while a case is under way whose error quotes a value, as many of pydicom's do; with -v."""
    marked(tmp_path / "scan", voxels())

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError(f"a bug with {MARKER}")

    monkeypatch.setattr(io, where, broken)
    result = CliRunner().invoke(
        app, ["predict", str(tmp_path / "scan"), "-m", str(package), "-o", str(tmp_path / "o"), "-v"]
    )
    assert result.exit_code in (1, 3), result.output
    assert "ZeroDivisionError" in result.output
    assert "CANARY" not in result.output
    assert not holders(tmp_path / "o")


@pytest.mark.parametrize("kind", [NameError, ValueError])
def test_a_crash_over_a_segmentation_quotes_no_header(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in reading or writing one, with -v: its kind and its place are told."""

    def broken(*_: object) -> None:
        raise kind(MARKER) from RuntimeError(MARKER)

    marked(tmp_path / "scan", voxels()[:, :, :3])
    affine = io.read_volume(tmp_path / "scan").geometry.affine
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 22, 3), np.uint8), affine), tmp_path / "mask.nii.gz")
    (tmp_path / "labels.tsv").write_text("index\tname\n1\tliver\n")
    convert = ["convert", "--reference", str(tmp_path / "scan"), "--labels", str(tmp_path / "labels.tsv"), "-v", "-o"]
    seg = str(tmp_path / "seg.dcm")
    assert CliRunner().invoke(app, [*convert, seg, str(tmp_path / "mask.nii.gz")]).exit_code == 0
    for where, target, source in (("_frames", "other.dcm", "mask.nii.gz"), ("_grid", "other.nii.gz", "seg.dcm")):
        monkeypatch.setattr(segmentation, where, broken)
        result = CliRunner().invoke(app, [*convert, str(tmp_path / target), str(tmp_path / source)])
        assert result.exit_code == 1, result.output
        assert f"unexpected {kind.__name__}" in result.output
        assert "in broken" in result.output
        assert "CANARY" not in result.output


def test_free_text_of_nifti_goes_no_further(medseg_: Console, package: Path, tmp_path: Path) -> None:
    fields = {name: MARKER.encode() for name in ("descrip", "aux_file", "db_name", "intent_name")}
    image = save(tmp_path / "in" / "a.nii.gz", voxels(), **fields)
    loaded = nibabel.load(image)
    loaded.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", MARKER.encode()))
    nibabel.save(loaded, image)
    assert holders(tmp_path / "in") == {image}  # that the marker is there, and found
    out = tmp_path / "out"
    medseg_("check", image.parent, "-v")
    medseg_(
        "predict",
        image,
        "-m",
        package,
        "-o",
        out,
        "--format",
        "nii.gz,seg.nrrd,nrrd,mha",
        "--probabilities",
        "all",
        "-v",
    )
    medseg_("stats", image, out / "a.nii.gz", "-o", out / "stats.csv", "-v")
    save(tmp_path / "in" / "mask.nii.gz", (voxels() > 50).astype(np.uint8), **fields)
    for ending in (".nii.gz", ".seg.nrrd", ".mha"):
        labels = tmp_path / "labels.tsv"
        labels.write_text("index\tname\n1\tliver\n")
        medseg_("convert", tmp_path / "in" / "mask.nii.gz", "-o", out / f"x{ending}", "--labels", labels, "-v")
    medseg_(
        "evaluate", out / "x.nii.gz", tmp_path / "in" / "mask.nii.gz", "-o", out / "scores", "--labels", labels, "-v"
    )
    assert holders(out) == set()


def test_no_command_asks_the_network(
    medseg_: Console, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    write_series(tmp_path / "scan", voxels())
    out = tmp_path / "out"
    medseg_("dicom", "scan", tmp_path / "scan")
    medseg_("check", tmp_path / "scan")
    words = ("--format", "dicom-seg,nii.gz", "--allow-uncoded", "--report")
    medseg_("predict", tmp_path / "scan", "-m", package, "-o", out, *words)
    (mask,) = out.glob("*.nii.gz")
    medseg_("stats", tmp_path / "scan", mask)
    medseg_("convert", mask, "-o", out / "x.seg.nrrd")
    medseg_("evaluate", mask, mask, "-o", out / "scores")
