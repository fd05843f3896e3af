"""The check of a dataset: every fault by itself, all at once, and nothing where there is none."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import write_series
from PIL import Image
from small_datasets import decathlon, image, mask, nnunet, picture, save_picture, write, write_pictures

from medseg import io
from medseg.check import check, check_images
from medseg.dataset import Case, Dataset, Finding, Findings
from medseg.volume import Labels, Mask

DATA = os.environ.get("MEDSEG_TEST_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MEDSEG_TEST_DATA is not set")


def found(root: Path) -> list[tuple[str, str, bool]]:
    return [(f.case, f.kind, f.unusable) for f in check(Dataset.open(root)).findings]


# ---- check -----------------------------------------------------------------------------------------------------------


def test_a_sound_dataset_has_no_findings(tmp_path: Path) -> None:
    decathlon(tmp_path)
    seen: list[float] = []
    findings = check(Dataset.open(tmp_path), lambda work, fraction, note: seen.append(fraction))
    assert findings == Findings(findings=(), cases_checked=6)
    assert seen[-1] == 1.0
    assert findings.unusable_cases == ()


def spoil(change: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        array = image(1)
        write(root / "imagesTr" / "c1.nii.gz", np.asarray(change(array)))

    return apply


def relabel(change: Callable[[np.ndarray[Any, Any]], Any], **grid: Any) -> Callable[[Path], None]:
    return lambda root: write(root / "labelsTr" / "c1.nii.gz", np.asarray(change(mask())), **grid)


def with_nan(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array[0, 0, :3] = np.nan
    return array


def truncated(root: Path) -> None:
    file = root / "imagesTr" / "c1.nii.gz"
    file.write_bytes(file.read_bytes()[:-200])


def half_as_long(root: Path) -> None:
    file = root / "imagesTr" / "c1.nii.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1000]))


FAULTS: dict[str, tuple[Callable[[Path], Any], list[tuple[str, str, bool]]]] = {
    "image gone": (lambda r: (r / "imagesTr/c1.nii.gz").unlink(), [("c1", "missing-image", True)]),
    "label gone": (lambda r: (r / "labelsTr/c1.nii.gz").unlink(), [("c1", "missing-label", True)]),
    "truncated": (truncated, [("c1", "damaged", True)]),
    "shorter than its header": (half_as_long, [("c1", "damaged", True)]),
    "no image": (lambda r: (r / "imagesTr/c1.nii.gz").write_bytes(b"hello"), [("c1", "damaged", True)]),
    "nan": (spoil(with_nan), [("c1", "not-finite", True)]),
    "constant": (spoil(np.ones_like), [("c1", "constant", True)]),
    "two channels": (spoil(lambda a: np.stack([a, a], -1)), [("c1", "channels", True)]),
    "other shape": (relabel(lambda m: m[:-1]), [("c1", "grid", True)]),
    "other origin": (relabel(lambda m: m, shift=0.5), [("c1", "grid", True)]),
    "halves": (relabel(lambda m: m * 0.75), [("c1", "label-values", True)]),
    "unknown value": (relabel(lambda m: m * 2), [("c1", "unknown-labels", True)]),
    "float but whole": (relabel(lambda m: m.astype(np.float64)), []),
    "empty": (relabel(np.zeros_like), [("c1", "empty", False)]),
    "no class 2": (relabel(lambda m: m % 2), [("c1", "class-missing", False)]),
    "CT among MR": (spoil(lambda a: a * 20 - 1000), [("c1", "foreign-intensity", True)]),
    "another scale of MR": (spoil(lambda a: a * 1000), []),
    "a copy": (lambda r: write(r / "imagesTr/c1.nii.gz", image(0)), [("c1", "duplicate-image", True)]),
    "strays": (
        lambda r: [(r / p).write_bytes(b"x") for p in ("imagesTr/._c1.nii.gz", "labelsTr/a.txt", ".DS_Store")],
        [("", "stray", False)],
    ),
    "not listed": (lambda r: write(r / "imagesTr/c9.nii.gz", image(9)), [("c9", "not-listed", False)]),
    "two endings": (lambda r: write(r / "imagesTr/c1.nii", image(9)), [("c1", "duplicate-id", False)]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_alone(tmp_path: Path, name: str) -> None:
    plant, expected = FAULTS[name]
    plant(decathlon(tmp_path))
    assert found(tmp_path) == expected


def test_all_at_once(tmp_path: Path) -> None:
    decathlon(tmp_path, 9)
    (tmp_path / "imagesTr/c1.nii.gz").unlink()
    (tmp_path / "imagesTr/c2.nii.gz").write_bytes(b"")
    write(tmp_path / "imagesTr/c3.nii.gz", with_nan(image(3)))
    write(tmp_path / "labelsTr/c3.nii.gz", mask() * 3)
    write(tmp_path / "imagesTr/c4.nii.gz", image(4, (8, 9, 11)))
    assert found(tmp_path) == [
        ("c1", "missing-image", True),
        ("c2", "damaged", True),
        ("c3", "unknown-labels", True),
        ("c3", "not-finite", True),
        ("c4", "grid", True),
    ]
    findings = check(Dataset.open(tmp_path))
    assert findings.unusable_cases == ("c1", "c2", "c3", "c4")
    assert findings.counts == {"damaged": 1, "grid": 1, "missing-image": 1, "not-finite": 1, "unknown-labels": 1}
    assert [f.kind for f in findings.of("c3")] == ["unknown-labels", "not-finite"]
    assert all(f.found and f.remedy for f in findings.findings)
    assert found_after_skipping(tmp_path, findings) == []
    path = tmp_path / "findings.json"
    findings.save(path)
    assert Findings.load(path) == findings


def found_after_skipping(root: Path, findings: Findings) -> list[Finding]:
    return list(check(Dataset.open(root).without(findings.unusable_cases)).findings)


def test_faults_of_the_list(tmp_path: Path) -> None:
    decathlon(tmp_path, 4)
    write(tmp_path / "imagesTr/c1.nii", image(11))
    write(tmp_path / "imagesTr/C2.nii.gz", image(12))
    pair = {"label": "./labelsTr/c1.nii.gz"}
    entries = [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in (0, 0, 1, 2, 3)]
    entries += [{"image": "./imagesTr/c1.nii", **pair}, {"image": "./imagesTr/C2.nii.gz", **pair}]
    tests = ["./imagesTs/gone.nii.gz", "./imagesTr/c3.nii.gz"]
    body = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**body, "training": entries, "test": tests}))
    assert found(tmp_path) == [
        ("", "missing-test", False),
        ("", "count", False),
        ("c0", "listed-twice", False),
        ("c1", "duplicate-id", True),
        ("c2", "duplicate-id", True),
        ("c3", "leak", False),
    ]


def test_a_test_case_that_is_trained_on(tmp_path: Path) -> None:
    decathlon(tmp_path, 2, test=["./imagesTs/t.nii.gz"])
    write(tmp_path / "imagesTs/t.nii.gz", image(1))
    assert found(tmp_path) == [("t", "leak", True)]


def test_nnunet_half_cases(tmp_path: Path) -> None:
    nnunet(tmp_path)
    (tmp_path / "labelsTr/a.nii.gz").unlink()
    (tmp_path / "imagesTr/b_0001.nii.gz").unlink()
    assert found(tmp_path) == [("a", "missing-label", True), ("b", "missing-image", True)]


def test_channels_on_two_grids(tmp_path: Path) -> None:
    nnunet(tmp_path)
    write(tmp_path / "imagesTr/a_0001.nii.gz", image(1), shift=3)
    assert found(tmp_path) == [("a", "channel-grids", True)]


def test_sound_pictures_have_no_findings(tmp_path: Path) -> None:
    write_pictures(tmp_path, 5)
    large, label = picture(9, (900, 700))  # twenty times as many pixels: pictures have no size in the world
    save_picture(tmp_path / "imagesTr" / "p5_0000.png", large)
    save_picture(tmp_path / "labelsTr" / "p5.png", label)
    assert [kind for _, kind, _ in found(tmp_path)] == ["count"]


def test_faults_of_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path, 6)
    labels = tmp_path / "labelsTr"
    pixels, label = picture(0)
    save_picture(labels / "p0.png", label[:, 1:])
    save_picture(labels / "p1.png", (label > 0).astype(np.uint8) * 255)
    save_picture(labels / "p2.png", label)  # upright, and its picture lies on its side in the file
    save_picture(labels / "p3.png", pixels)
    (tmp_path / "imagesTr" / "p4_0000.png").write_bytes(b"")
    save_picture(tmp_path / "imagesTr" / "p5_0000.png", pixels * np.array([0, 1, 1], np.uint8), 6)
    findings = check(Dataset.open(tmp_path))
    assert [(f.case, f.kind, f.unusable) for f in findings.findings] == [
        ("p0", "grid", True),
        ("p1", "unknown-labels", True),
        ("p2", "grid", True),
        ("p3", "damaged", True),
        ("p4", "damaged", True),
        ("p5", "constant", False),
    ]
    assert '"labels": {"disc": 255}' in findings.of("p1")[0].remedy
    assert "coloured" in findings.of("p3")[0].found


def test_what_a_reader_finds_odd_is_told_and_leaves_the_case_usable(tmp_path: Path) -> None:
    write_pictures(tmp_path, 5)
    for folder, name in (("imagesTr", "p1_0000"), ("labelsTr", "p1"), ("labelsTr", "p3")):
        path = tmp_path / folder / f"{name}.png"
        with Image.open(path) as stored:
            clear = (1, 2, 3) if stored.mode == "RGB" else 9
            stored.save(path, transparency=clear)
    findings = check(Dataset.open(tmp_path))
    assert [(f.case, f.kind, f.unusable) for f in findings.findings] == [("p1", "odd", False), ("p3", "odd", False)]
    assert [f.found.split(" names ")[0] for f in findings.findings] == ["imagesTr/p1_0000.png", "labelsTr/p3.png"]


def test_a_class_that_no_case_has(tmp_path: Path) -> None:
    decathlon(tmp_path, 3, labels={"0": "background", "1": "near", "2": "far", "3": "nowhere"})
    assert found(tmp_path) == [("", "class-missing", False)]


def test_foreign_grid_is_named_with_its_figures(tmp_path: Path) -> None:
    decathlon(tmp_path)
    big = (64, 64, 20)
    write(tmp_path / "imagesTr/c1.nii.gz", image(1, big), (0.7, 0.7, 5))
    write(tmp_path / "labelsTr/c1.nii.gz", mask(big), (0.7, 0.7, 5))
    (finding,) = check(Dataset.open(tmp_path)).findings
    assert (finding.case, finding.kind, finding.unusable) == ("c1", "foreign-grid", True)
    assert "64x64x20 voxels of 0.7x0.7x5 mm span 44.8x44.8x100 mm" in finding.found
    assert "spans 8x9x10 mm" in finding.found


def test_slice_distances_of_ct_are_not_foreign(tmp_path: Path) -> None:
    decathlon(tmp_path, 9, modality={"0": "CT"})
    for n, distance in enumerate([0.8, 1, 1, 1, 1, 1, 2.5, 5, 8]):
        shape = (8, 9, round(60 / distance))
        spacing = (0.7 + 0.03 * n, 0.7 + 0.03 * n, distance)
        write(tmp_path / f"imagesTr/c{n}.nii.gz", image(n, shape) * 20 - 1000, spacing)
        write(tmp_path / f"labelsTr/c{n}.nii.gz", mask(shape), spacing)
    assert found(tmp_path) == []
    write(tmp_path / "imagesTr/c5.nii.gz", image(5, (8, 9, 60)) * 20 + 24, (0.85, 0.85, 1))  # slope lost: no air
    write(tmp_path / "labelsTr/c5.nii.gz", mask((8, 9, 60)), (0.85, 0.85, 1))
    assert found(tmp_path) == [("c5", "foreign-intensity", True)]


# ---- real data -------------------------------------------------------------------------------------------------------


@needs_data
def test_planted_faults_and_nothing_else() -> None:
    root = Path(DATA) / "Task04_planted"
    assert found(root) == [
        ("", "stray", False),
        ("hippocampus_010", "missing-image", True),
        ("hippocampus_118", "missing-label", True),
        ("hippocampus_281", "missing-image", True),
        ("hippocampus_281", "class-missing", False),
        ("hippocampus_281", "foreign-grid", True),
    ]


@needs_data
def test_nothing_false_on_task04() -> None:
    dataset = Dataset.open(Path(DATA) / "Task04_Hippocampus")
    assert check(dataset) == Findings(findings=(), cases_checked=200)


# ---- DICOM -----------------------------------------------------------------------------------------------------------

LIVER = Labels(values={"liver": 2, "spleen": 40})


def of_series(root: Path, count: int = 2) -> Path:
    """A sound dataset whose images are folders and zips of DICOM, and whose labels are DICOM segmentations."""
    for n in range(count):
        folder = root / "imagesTr" / f"d{n}"
        voxels = np.random.default_rng(n).integers(0, 900, (10, 8, 6)).astype(np.int16)
        write_series(folder, voxels, spacing=(0.5, 0.75, 3.0), row=(0, 1, 0), column=(0, 0, -1))
        segmented(folder, root / "labelsTr" / f"d{n}.dcm")
    shutil.make_archive(str(root / "imagesTr" / "d0"), "zip", root / "imagesTr" / "d0")
    shutil.rmtree(root / "imagesTr" / "d0")
    entries = [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name[:2]}.dcm"} for name in ("d0.zip", "d1")]
    body = {"name": "DICOM", "modality": {"0": "CT"}, "labels": {"0": "background", **named()}, "training": entries}
    (root / "dataset.json").write_text(json.dumps(body))
    return root


def named() -> dict[str, str]:
    return {str(value): name for name, value in LIVER.values.items()}


def segmented(folder: Path, path: Path, labels: Labels = LIVER, spleen: bool = True) -> None:
    series = io.series(folder)
    array = np.zeros(io.dicom.check(series).shape, np.uint8)
    array[2:5, 2:5, 2:4], array[6, 2:4, 2] = 2, 40 if spleen else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    io.write_mask(Mask(array, io.dicom.check(series), labels, header=series), path, allow_uncoded=True)


def test_a_dataset_of_dicom_is_sound_or_its_faults_are_named(tmp_path: Path) -> None:
    of_series(tmp_path)
    assert found(tmp_path) == []
    series, seg = tmp_path / "imagesTr" / "d1", tmp_path / "labelsTr" / "d1.dcm"

    segmented(series, seg, spleen=False)
    assert found(tmp_path) == [("d1", "class-missing", False)]
    segmented(series, seg, Labels(values={"liver": 2, "elbow": 40}))
    assert found(tmp_path) == [("d1", "damaged", True)]  # a segment that nobody knows
    write_series(tmp_path / "other", np.zeros((10, 8, 6), np.int16), spacing=(1, 0.75, 3.0))
    segmented(tmp_path / "other", seg)
    assert found(tmp_path) == [("d1", "grid", True)]
    seg.write_bytes(b"DICOM?")
    assert found(tmp_path) == [("d1", "damaged", True)]
    segmented(series, seg)
    io.series(series).files[2].unlink()
    (finding,) = check(Dataset.open(tmp_path)).findings
    assert (finding.case, finding.kind, finding.unusable) == ("d1", "damaged", True)
    assert "imagesTr/d1" in finding.found


def test_images_without_a_dataset(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", image(0))
    write(tmp_path / "b.nii.gz", with_nan(image(1)))
    write_series(tmp_path / "c", np.ones((8, 8, 4), np.int16), offsets=[0, 1, 2, 4])
    (bad,) = io.dicom.scan(tmp_path / "c").series
    cases = [Case(name, (tmp_path / f"{name}.nii.gz",), None) for name in ("b", "a", "missing")]
    seen: list[str] = []
    findings = check_images([*cases, Case(bad.name, (bad,), None)], lambda work, fraction, note: seen.append(note))
    assert [(f.case, f.kind, f.unusable) for f in findings.findings] == [
        *(("b", "unreadable", True), ("missing", "unreadable", True), (bad.name, "unreadable", True)),
    ]
    b, missing, gap = findings.findings
    assert "not finite" in b.found
    assert "missing.nii.gz" in missing.found
    assert "2.00 mm" in gap.found
    assert "--resample-irregular" in gap.remedy
    assert findings.cases_checked == len(seen) == 4
    assert check_images([]) == Findings(findings=(), cases_checked=0)


def test_what_is_odd_about_an_image_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", image(0))
    (tmp_path / "a.nii.gz").rename(tmp_path / "a.nii")
    (finding,) = check_images([Case("a", (tmp_path / "a.nii",), None)]).findings
    assert (finding.kind, finding.unusable, "compressed" in finding.found) == ("odd", False, True)
