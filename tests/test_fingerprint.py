"""Fingerprint: sizes, intensities and volumes counted by hand, and nnU-Net's sampling on real data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import write_pictures

from medseg import fingerprint
from medseg.dataset import Dataset
from medseg.errors import DatasetError
from medseg.fingerprint import Fingerprint, measure
from medseg.io import read_mask, read_volume

DATA = os.environ.get("MEDSEG_TEST_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MEDSEG_TEST_DATA is not set")
Array = np.ndarray[Any, Any]
LABELS = {"0": "background", "1": "near", "2": "far"}


def dataset(root: Path, cases: list[tuple[Array, Array]], affine: Array | None = None, **changes: Any) -> Dataset:
    """A Decathlon task of (image, label) arrays."""
    listed = []
    for n, (image, label) in enumerate(cases):
        for folder, array in (("imagesTr", image), ("labelsTr", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            file = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
            file.to_filename(root / folder / f"c{n}.nii.gz")
        listed.append({"image": f"imagesTr/c{n}.nii.gz", "label": f"labelsTr/c{n}.nii.gz"})
    body = {"modality": {"0": "MRI"}, "labels": LABELS, "training": listed, **changes}
    (root / "dataset.json").write_text(json.dumps(body))
    return Dataset.open(root)


def test_sizes_in_ras_order(tmp_path: Path) -> None:
    image = np.zeros((4, 6, 10), np.float32)
    image[1:3, 2:6, 5:6] = 7
    label = (image > 0).astype(np.uint8)
    affine = np.array([[0, 0, -3.0, 0], [1.5, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])  # axes run to A, S and L
    (case,) = measure(dataset(tmp_path, [(image, label)], affine)).cases
    assert case.shape == (10, 4, 6)
    assert case.spacing_mm == (3.0, 1.5, 2.0)
    assert case.cropped_shape == (1, 2, 4)
    assert case.relative_size == pytest.approx(8 / 240)


def test_pictures(tmp_path: Path) -> None:
    found = measure(Dataset.open(write_pictures(tmp_path, 3)))
    # the third lies on its side in its file; turned to RAS all are alike
    assert {(case.shape, case.spacing_mm, case.cropped_shape) for case in found.cases} == {
        ((40, 32, 1), (1.0, 1.0, 1.0), (40, 32, 1))
    }
    assert found.classes["square"].volume_ml_median == 0.056  # 7 x 8 pixels of 1 mm, 1 mm thick
    assert len(found.intensities) == 3
    assert found.intensities[0].maximum > 200


def test_each_case_weighs_the_same(tmp_path: Path) -> None:
    few, many = np.ones((2, 2, 2), np.float32), np.ones((4, 4, 4), np.float32)
    few[0, 0, 0] = 3.0  # foreground 3 in one case, 5 in 63 voxels of the other and 21 in one
    small = np.zeros((2, 2, 2), np.uint8)
    small[0, 0, 0] = 1
    many[:] = 5.0
    many[3, 3, 3] = 21.0
    found = measure(dataset(tmp_path, [(few, small), (many, np.full((4, 4, 4), 2, np.uint8))]))
    (channel,) = found.intensities
    assert channel.mean == pytest.approx((3 + (63 * 5 + 21) / 64) / 2)  # 4.125
    assert channel.std == pytest.approx(np.sqrt((9 + (63 * 25 + 441) / 64) / 2 - 4.125**2))
    assert (channel.minimum, channel.maximum) == (3.0, 21.0)
    assert (channel.percentile_00_5, channel.percentile_99_5) == (3.0, 21.0)  # 21 has 1/128 of the weight
    assert channel.median in (3.0, 5.0)
    assert found.classes["near"].cases == 1
    assert found.classes["near"].volume_ml_median == pytest.approx(0.001)
    assert found.classes["far"].volume_ml_maximum == pytest.approx(0.064)


def test_volumes_median_and_range(tmp_path: Path) -> None:
    cases = []
    for count in (1, 2, 6):
        label = np.zeros((3, 3, 3), np.uint8)
        label.flat[:count] = 1
        cases.append((np.ones((3, 3, 3), np.float32), label))
    near = measure(dataset(tmp_path, cases, np.diag([1.0, 2.0, 5.0, 1.0]))).classes["near"]  # a voxel is 0.01 ml
    assert (near.cases, near.volume_ml_median) == (3, pytest.approx(0.02))
    assert (near.volume_ml_minimum, near.volume_ml_maximum) == (pytest.approx(0.01), pytest.approx(0.06))


def test_empty_labels_are_counted(tmp_path: Path) -> None:
    image, label = np.ones((3, 3, 3), np.float32), np.ones((3, 3, 3), np.uint8)
    found = measure(dataset(tmp_path, [(image * 4, label), (image * 100, label * 0)]))
    assert found.empty_cases == 1
    assert found.intensities[0].maximum == 4.0
    assert found.classes["far"].model_dump() == {
        "cases": 0, "volume_ml_median": 0.0, "volume_ml_minimum": 0.0, "volume_ml_maximum": 0.0,
        "components_maximum": 0,
    }  # fmt: skip


def test_nothing_but_background(tmp_path: Path) -> None:
    image, label = np.ones((3, 3, 3), np.float32), np.zeros((3, 3, 3), np.uint8)
    with pytest.raises(DatasetError, match="no label marks"):
        measure(dataset(tmp_path, [(image, label)] * 2))


def test_every_bad_case_is_named(tmp_path: Path) -> None:
    image, label = np.ones((3, 3, 3), np.float32), np.ones((3, 3, 3), np.uint8)
    bad = dataset(tmp_path, [(image, label), (image, label[:2]), (image * np.nan, label)])
    with pytest.raises(DatasetError, match=r"2 cases.*c1.*c2"):
        measure(bad)
    with pytest.raises(DatasetError, match="no labelled cases"):
        measure(bad.only([]))


def test_the_most_pieces_of_any_case(tmp_path: Path) -> None:
    """Three pieces, of which two would be four if corners did not join; and one piece."""
    image, label = np.ones((5, 5, 5), np.float32), np.zeros((2, 5, 5, 5), np.uint8)
    for place in ((0, 0, 0), (1, 1, 1), (3, 3, 3), (4, 3, 4), (0, 4, 0)):
        label[0][place] = 1
    label[1, 2] = 1
    found = measure(dataset(tmp_path, [(image, label[0]), (image, label[1])]))
    assert (found.classes["near"].components_maximum, found.classes["far"].components_maximum) == (3, 0)
    body = found.model_dump()
    del body["classes"]["near"]["components_maximum"]  # as it was written before this was measured
    assert Fingerprint.checked(body, "old").classes["near"].components_maximum is None


def test_ignored_voxels_are_no_foreground(tmp_path: Path) -> None:
    image = np.arange(1, 28, dtype=np.float32).reshape(3, 3, 3)
    label = np.full((3, 3, 3), 9, np.uint8)
    label[0, 0, 0] = 1
    labels = {"background": 0, "near": 1, "ignore": 9}
    found = measure(dataset(tmp_path, [(image, label)], labels=labels))
    assert (found.intensities[0].minimum, found.intensities[0].maximum) == (1.0, 1.0)


def test_two_channels(tmp_path: Path) -> None:
    image = np.stack([np.full((3, 3, 3), 2.0), np.full((3, 3, 3), 8.0)], -1).astype(np.float32)
    label = np.ones((3, 3, 3), np.uint8)
    found = measure(dataset(tmp_path, [(image, label)], modality={"0": "T1", "1": "T2"}))
    assert [channel.mean for channel in found.intensities] == [2.0, 8.0]


def test_more_values_than_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).permutation(8000).astype(np.float32).reshape(20, 20, 20)
    label = np.ones((20, 20, 20), np.uint8)
    monkeypatch.setattr(fingerprint, "SUPPORTS", 500)
    (channel,) = measure(dataset(tmp_path, [(image, label)])).intensities
    assert channel.mean == pytest.approx(3999.5)
    assert channel.maximum == 7999.0
    for value, exact in ((channel.percentile_00_5, 40), (channel.median, 4000), (channel.percentile_99_5, 7960)):
        assert abs(value - exact) <= 8000 / 500


def test_fingerprint_survives_the_file(tmp_path: Path) -> None:
    image, label = np.ones((3, 3, 3), np.float32), np.ones((3, 3, 3), np.uint8)
    data = dataset(tmp_path, [(image, label)])
    found = measure(data)
    found.save(tmp_path / "f.json")
    assert Fingerprint.load(tmp_path / "f.json") == found
    assert found.dataset_digest == data.digest()


# ---- mirror agreement ------------------------------------------------------------------------------------------------


def blobs(centres: list[tuple[int, int, int]]) -> tuple[Array, Array]:
    """Class n around the n-th centre in a box of 24 voxels."""
    label = np.zeros((24, 24, 24), np.uint8)
    for value, (i, j, k) in enumerate(centres, start=1):
        label[i - 2 : i + 2, j - 2 : j + 2, k - 2 : k + 2] = value
    return np.ones(label.shape, np.float32), label


def test_classes_that_change_places_do_not_agree(tmp_path: Path) -> None:
    # "near" in front of "far", both in the middle from left to right and from foot to head
    found = measure(dataset(tmp_path, [blobs([(12, 18, 12), (12, 6, 12)])] * 3))
    assert found.mirror_agreement == pytest.approx((1.0, 0.0, 1.0))


def test_a_pool_of_left_and_right_agrees(tmp_path: Path) -> None:
    left, right = blobs([(4, 12, 12)]), blobs([(20, 12, 12)])
    balanced = measure(dataset(tmp_path / "a", [left, right] * 8)).mirror_agreement
    assert balanced[0] == pytest.approx(1.0)  # 64 mixed pairs of 120 cross, more than the 56 that do not: clipped
    one_sided = measure(dataset(tmp_path / "b", [left] * 8)).mirror_agreement
    assert one_sided == pytest.approx((0.0, 1.0, 1.0))
    # six left, two right: 2*6*2 mirrored pairs over 6*5 + 2*1 straight ones
    mixed = measure(dataset(tmp_path / "c", [left] * 6 + [right] * 2)).mirror_agreement
    assert mixed[0] == pytest.approx(24 / 32)


def test_no_evidence_is_no_objection(tmp_path: Path) -> None:
    assert measure(dataset(tmp_path / "a", [blobs([(4, 4, 4)])])).mirror_agreement == (1.0, 1.0, 1.0)
    apart = [blobs([(4, 4, 4)]), blobs([(12, 20, 8)])]
    assert measure(dataset(tmp_path / "b", apart)).mirror_agreement == (1.0, 1.0, 1.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 59), st.integers(1, 60))
def test_coarse_cells_keep_the_volume(size: int, start: int, length: int) -> None:
    line = np.zeros((size, 1, 1), bool)
    line[start : start + length] = True
    coarse = fingerprint._coarse(line)
    assert coarse.mean() == pytest.approx(line.mean(), abs=1e-6)
    assert np.allclose(fingerprint._coarse(line[::-1]), coarse[::-1], atol=1e-6)


# ---- real data -------------------------------------------------------------------------------------------------------


@needs_data
def test_task04_agrees_with_drawing_voxels() -> None:
    data = Dataset.open(Path(DATA) / "Task04_Hippocampus")
    found = measure(data)
    rng = np.random.RandomState(1234)
    drawn = []
    for case in data.cases:
        assert case.label is not None
        values = read_volume(case.images).array[0][read_mask(case.label).array > 0]
        drawn.append(rng.choice(values, 20_000, replace=True))
    pool = np.concatenate(drawn)
    (channel,) = found.intensities
    low, middle, high = np.percentile(pool, [0.5, 50, 99.5])
    assert channel.mean == pytest.approx(pool.mean(dtype=np.float64), rel=1e-3)
    assert channel.std == pytest.approx(pool.std(dtype=np.float64), rel=1e-3)
    assert channel.median == pytest.approx(middle, rel=3e-3)
    assert channel.percentile_00_5 == pytest.approx(low, abs=1)
    assert channel.percentile_99_5 == pytest.approx(high, rel=3e-3)
    assert (channel.minimum, channel.maximum) == pytest.approx((pool.min(), pool.max()), rel=0.2, abs=20)


@needs_data
def test_task04_is_as_it_is_known() -> None:
    found = measure(Dataset.open(Path(DATA) / "Task04_Hippocampus"))
    assert len(found.cases) == 200
    assert {case.spacing_mm for case in found.cases} == {(1.0, 1.0, 1.0)}
    assert {name: c.cases for name, c in found.classes.items()} == {"Anterior": 200, "Posterior": 200}
    assert 1 < found.classes["Anterior"].volume_ml_minimum < 1.1
    right, front, head = found.mirror_agreement
    assert right > 0.4  # left and right hippocampi
    assert head < 0.05
    assert front < 0.001  # anterior and posterior change places
