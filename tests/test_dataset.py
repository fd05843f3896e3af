"""Dataset: what the two kinds of dataset.json mean, the folds, and every fault of the check."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medseg.check import check
from medseg.dataset import Case, Dataset, Finding, Findings, Fold
from medseg.errors import DatasetError, InputError

DATA = os.environ.get("MEDSEG_TEST_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MEDSEG_TEST_DATA is not set")
SHAPE = (8, 9, 10)


def image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(1, 100, shape).astype(np.float32)


def mask(shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    array = np.zeros(shape, np.uint8)
    array[2:4, 2:4, 2:4], array[5:7, 2:4, 2:4] = 1, 2
    return array


def write(path: Path, array: np.ndarray[Any, Any], spacing: tuple[float, ...] = (1, 1, 1), shift: float = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    affine[0, 3] = shift
    nibabel.Nifti1Image(array, affine).to_filename(path)


def decathlon(root: Path, count: int = 6, **changes: Any) -> Path:
    """A sound Decathlon task of ``count`` cases c0, c1, ..."""
    names = [f"c{n}" for n in range(count)]
    for n, name in enumerate(names):
        write(root / "imagesTr" / f"{name}.nii.gz", image(n))
        write(root / "labelsTr" / f"{name}.nii.gz", mask())
    body = {
        "name": "Blobs",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "near", "2": "far"},
        "numTraining": count,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps({**body, **changes}))
    return root


def found(root: Path) -> list[tuple[str, str, bool]]:
    return [(f.case, f.kind, f.unusable) for f in check(Dataset.open(root)).findings]


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_decathlon_as_downloaded(tmp_path: Path) -> None:
    decathlon(tmp_path, 3, modality={"1": "T1", "0": "FLAIR"}, test=["./imagesTs/t1.nii.gz"])
    write(tmp_path / "imagesTs" / "t1.nii.gz", image(99))
    dataset = Dataset.open(tmp_path)
    assert dataset == Dataset.open(tmp_path / "dataset.json")
    assert (dataset.name, dataset.channels) == ("Blobs", ("FLAIR", "T1"))
    assert dataset.labels.values == {"near": 1, "far": 2}
    assert [case.id for case in dataset.cases] == ["c0", "c1", "c2"]
    assert dataset.case("c1").images == (tmp_path / "imagesTr" / "c1.nii.gz",)
    assert dataset.test == (Case("t1", (tmp_path / "imagesTs" / "t1.nii.gz",), None),)
    assert dataset.faults == ()


def nnunet(root: Path, **changes: Any) -> Path:
    for n, name in enumerate(["b", "a"]):
        for channel in range(2):
            write(root / "imagesTr" / f"{name}_000{channel}.nii.gz", image(2 * n + channel))
        write(root / "labelsTr" / f"{name}.nii.gz", mask())
    write(root / "imagesTs" / "t_0000.nii.gz", image(10))
    write(root / "imagesTs" / "t_0001.nii.gz", image(11))
    body = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "near": 1, "far": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps({**body, **changes}))
    return root


def test_nnunet_finds_its_cases_by_name(tmp_path: Path) -> None:
    dataset = Dataset.open(nnunet(tmp_path))
    assert dataset.name == tmp_path.name
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert [file.name for file in dataset.case("a").files] == ["a_0000.nii.gz", "a_0001.nii.gz", "a.nii.gz"]
    assert [(case.id, len(case.images), case.label) for case in dataset.test] == [("t", 2, None)]
    assert check(dataset).findings == ()


def test_nnunet_with_an_explicit_list(tmp_path: Path) -> None:
    files = {"images": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "label": "labelsTr/a.nii.gz"}
    dataset = Dataset.open(nnunet(tmp_path, dataset={"patient one": files}, numTraining=1))
    assert [case.id for case in dataset.cases] == ["patient one"]
    assert {f.case for f in dataset.faults} == {"b", "b_0000", "b_0001"}  # they are there and not listed


def test_regions_and_ignore(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 4], "core": [2, 4], "oedema": 1, "enhancing": [4], "ignore": 9}
    known = Dataset.open(nnunet(tmp_path, labels=labels)).labels
    assert known.values == {"oedema": 1, "enhancing": 4, "label_2": 2}
    assert known.regions == {"whole": (1, 2, 4), "core": (2, 4)}
    assert known.ignore == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {}}, "no labels"),
        ({"labels": {"0": "background"}}, "at least one label"),
        ({"labels": {"1": "a", "2": "a"}}, "several values"),
        ({"labels": {"a": 1.5}}, "integer"),
        ({"labels": {"one": "a"}}, "integer"),
        ({"modality": {}}, "no channels"),
        ({"modality": {"T1": 0}}, "numbers"),
        ({"training": []}, "no labelled case"),
        ({"training": [{"label": "x"}]}, "an entry is"),
        ({"training": [{"image": "imagesTr/x.nii.gz", "label": "labelsTr/x.nii.gz"}]}, "none of the files"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        Dataset.open(decathlon(tmp_path, 1, **changes))


def test_nothing_there_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="it is empty"):
        Dataset.open(tmp_path)
    decathlon(tmp_path / "Task99", 1)
    with pytest.raises(DatasetError, match=r"holds Task99.*Did you mean .*Task99"):
        Dataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        Dataset.open(tmp_path)


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_only_and_without(tmp_path: Path) -> None:
    decathlon(tmp_path, 3)
    write(tmp_path / "imagesTr" / "c1.nii", image(5))  # a fault of c1
    dataset = Dataset.open(tmp_path)
    assert [case.id for case in dataset.only(["c2", "c0"]).cases] == ["c0", "c2"]
    assert [case.id for case in dataset.without(["c1", "unknown"]).cases] == ["c0", "c2"]
    assert dataset.without(["c1"]).faults == ()
    assert len(dataset.only(["c1"]).faults) == 1
    with pytest.raises(DatasetError, match="x, y"):
        dataset.only(["y", "c0", "x"])
    with pytest.raises(DatasetError, match="'c9'"):
        dataset.case("c9")


def test_folds_of_seven_by_hand(tmp_path: Path) -> None:
    # sizes 2 2 1 1 1 by the rule; the lists are those of scikit-learn 1.9's KFold(5, shuffle=True, random_state=12345)
    folds = Dataset.open(decathlon(tmp_path, 7)).folds()
    assert [len(fold.validation) for fold in folds] == [2, 2, 1, 1, 1]
    assert sorted(case for fold in folds for case in fold.validation) == [f"c{n}" for n in range(7)]
    assert all(set(fold.train) | set(fold.validation) == {f"c{n}" for n in range(7)} for fold in folds)
    assert all(not set(fold.train) & set(fold.validation) for fold in folds)
    assert [fold.validation for fold in folds] == [("c3", "c6"), ("c0", "c4"), ("c1",), ("c5",), ("c2",)]


def test_few_cases_leave_one_out(tmp_path: Path) -> None:
    dataset = Dataset.open(decathlon(tmp_path, 3))
    folds = dataset.folds()
    assert len(folds) == 3
    assert all(len(fold.train) == 2 for fold in folds)
    with pytest.raises(DatasetError, match="1 labelled cases"):
        dataset.only(["c0"]).folds()


def test_digest_follows_every_byte(tmp_path: Path) -> None:
    dataset = Dataset.open(decathlon(tmp_path, 2))
    first = dataset.digest()
    assert Dataset.open(tmp_path).digest() == first
    assert dataset.only(["c0"]).digest() != first
    array = mask()
    array[0, 0, 0] = 1
    write(tmp_path / "labelsTr" / "c1.nii.gz", array)
    assert dataset.digest() != first


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


@needs_data
def test_folds_of_task04_are_those_of_scikit_learn() -> None:
    # KFold(5, shuffle=True, random_state=12345) on the 200 sorted ids, first ten held out of folds 0 and 4
    folds = Dataset.open(Path(DATA) / "Task04_Hippocampus").folds()
    assert all(isinstance(fold, Fold) and len(fold.validation) == 40 for fold in folds)
    assert [int(case[-3:]) for case in folds[0].validation[:10]] == [20, 36, 37, 40, 51, 99, 102, 105, 108, 109]
    assert [int(case[-3:]) for case in folds[4].validation[:10]] == [3, 15, 23, 45, 53, 58, 65, 68, 88, 126]
