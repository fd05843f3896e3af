"""Masks in other formats: the same labels at the same place, or a refusal with the reason."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicoms import affine_of, write_series
from numpy.typing import NDArray

from medseg import io
from medseg.convert import ENDINGS, convert, labels_at
from medseg.errors import DatasetError, GeometryMismatch, IncompleteSeries, InputError
from medseg.geometry import Geometry
from medseg.pipeline import RunResult
from medseg.terminology import coding_of
from medseg.volume import Labels, Mask

SHAPE = (12, 10, 6)
TURNED = {"spacing": (0.8, 0.9, 2.5), "row": (0, 1, 0), "column": (0, 0, -1), "origin": (-31.5, 7.25, 100)}
LABELS = Labels(values={"liver": 1, "spleen": 7})


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A sagittal series of 6 slices; the last two have no label."""
    voxels = np.random.default_rng(0).integers(-100, 900, SHAPE).astype(np.int16)
    write_series(tmp_path / "study", voxels, **TURNED)  # type: ignore[arg-type]
    return tmp_path / "study"


def drawn() -> NDArray[np.uint8]:
    array = np.zeros(SHAPE, np.uint8)
    array[2:6, 3:7, 1:3], array[7:9, 3, 2:4] = 1, 7
    return array


def grid() -> Geometry:
    return Geometry(SHAPE, affine_of(**TURNED))  # type: ignore[arg-type]


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """The labels of the series, as NIfTI that was turned to RAS."""
    turn = grid().to("RAS")
    io.write_mask(Mask(np.ascontiguousarray(turn.apply(drawn())), grid().reoriented(turn)), tmp_path / "mask.nii.gz")
    return tmp_path / "mask.nii.gz"


def volumes(path: Path) -> dict[str, float]:
    """Volume and mean world position of each label by its name (or value), rounded."""
    mask = io.read_mask(path)
    names = mask.labels.values if mask.labels else {"liver": 1, "spleen": 7}
    found = {}
    for name, value in names.items():
        places = np.argwhere(mask.array == value).astype(float)
        assert len(places)
        found[name] = (len(places), *np.round(mask.geometry.world(places).mean(axis=0), 3).tolist())
    return found


def worked_out() -> dict[str, tuple[float, ...]]:
    """What ``volumes`` finds: 4 x 4 x 2 voxels around index (3.5, 4.5, 1.5), and 2 x 1 x 2 around (7.5, 3, 2.5).

    In LPS these lie at origin + 0.8 i y - 0.9 j z + 2.5 k (row x column = -x); RAS has x and y the other way round.
    """
    return {
        "liver": (32, 31.5 + 2.5 * 1.5, -(7.25 + 0.8 * 3.5), 100 - 0.9 * 4.5),
        "spleen": (4, 31.5 + 2.5 * 2.5, -(7.25 + 0.8 * 7.5), 100 - 0.9 * 3),
    }


def expected() -> dict[str, tuple[float, ...]]:
    return {name: tuple(np.round(numbers, 3).tolist()) for name, numbers in worked_out().items()}


# Formats


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_keeps_labels_where_they_are(ending: str, series: Path, mask: Path, tmp_path: Path) -> None:
    assert volumes(mask) == expected()
    target = tmp_path / f"out{ending}"
    convert(mask, target, reference=series, labels=LABELS)
    assert volumes(target) == expected()
    back = tmp_path / "back.nii.gz"
    convert(target, back, reference=mask, labels=LABELS)
    assert volumes(back) == expected()
    assert io.read_mask(back).geometry.close_to(io.read_mask(mask).geometry)
    np.testing.assert_array_equal(io.read_mask(back).array, io.read_mask(mask).array)


def test_a_segmentation_keeps_its_names_and_gets_the_whole_grid_of_its_series(
    series: Path, mask: Path, tmp_path: Path
) -> None:
    convert(mask, tmp_path / "seg.dcm", reference=series, labels=LABELS)
    alone = convert(tmp_path / "seg.dcm", tmp_path / "alone.nii.gz")
    assert alone.array.shape[2] < SHAPE[2]  # the slices with labels
    whole = convert(tmp_path / "seg.dcm", tmp_path / "whole.seg.nrrd", reference=series)
    assert whole.array.shape == SHAPE
    assert whole.geometry.close_to(grid())
    assert io.read_mask(tmp_path / "whole.seg.nrrd").labels is not None
    np.testing.assert_array_equal(np.where(whole.array == 2, 7, whole.array), drawn())  # segments count from 1
    assert volumes(tmp_path / "whole.seg.nrrd") == volumes(tmp_path / "alone.nii.gz") == expected()


def test_segments_get_the_values_of_the_labels_that_are_given(series: Path, mask: Path, tmp_path: Path) -> None:
    convert(mask, tmp_path / "seg.dcm", reference=series, labels=LABELS)
    made = convert(tmp_path / "seg.dcm", tmp_path / "m.nii.gz", reference=series, labels=LABELS)
    np.testing.assert_array_equal(made.array, drawn())
    other = Labels(values={"spleen": 3, "liver": 40, "kidney": 5})
    made = convert(tmp_path / "seg.dcm", tmp_path / "n.nii.gz", reference=series, labels=other)
    np.testing.assert_array_equal(made.array, np.choose(np.searchsorted([0, 1, 7], drawn()), [0, 40, 3]))


def test_codes_and_colours_of_a_mask_are_kept_with_the_values_that_are_given(
    series: Path, mask: Path, tmp_path: Path
) -> None:
    odd = Labels(values={"liver": 1, "frobnicator": 7}, colours={"frobnicator": (10, 20, 30)})
    odd = odd.model_copy(update={"codings": {"frobnicator": coding_of("spleen")}})
    convert(mask, tmp_path / "odd.seg.nrrd", labels=odd)
    only_values = Labels(values={"frobnicator": 3, "liver": 4})
    made = convert(tmp_path / "odd.seg.nrrd", tmp_path / "odd.dcm", reference=series, labels=only_values)
    assert made.labels is not None
    assert (made.labels.values, made.labels.codings["frobnicator"]) == (only_values.values, coding_of("spleen"))
    assert made.labels.colours["frobnicator"] == (10, 20, 30)


def test_no_organ_becomes_another_by_the_number_of_its_segment(series: Path, mask: Path, tmp_path: Path) -> None:
    convert(mask, tmp_path / "seg.dcm", reference=series, labels=Labels(values={"spleen": 1, "liver": 7}))
    other = Labels(values={"liver": 1, "tumor": 2})
    with pytest.raises(InputError, match=r"unknown names \(values \[1\]\)"):
        convert(tmp_path / "seg.dcm", tmp_path / "a.nii.gz", labels=other)
    convert(tmp_path / "seg.dcm", tmp_path / "plain.nii.gz")
    with pytest.raises(InputError, match=r"unknown names \(values \[1\]\)"):
        convert(tmp_path / "plain.nii.gz", tmp_path / "a.nii.gz", labels=other)
    both = Labels(values={**other.values, "spleen": 3})  # as the message says
    assert np.unique(convert(tmp_path / "plain.nii.gz", tmp_path / "a.nii.gz", labels=both).array).tolist() == [0, 1, 3]


def test_labelmap_and_uncoded_labels_are_asked_for(series: Path, mask: Path, tmp_path: Path) -> None:
    odd = Labels(values={"liver": 1, "frobnicator": 7})
    with pytest.raises(InputError, match="frobnicator"):
        convert(mask, tmp_path / "odd.dcm", reference=series, labels=odd)
    assert not (tmp_path / "odd.dcm").exists()
    convert(mask, tmp_path / "odd.dcm", reference=series, labels=odd, allow_uncoded=True, kind="LABELMAP")
    assert set(volumes(tmp_path / "odd.dcm")) == {"liver", "frobnicator"}
    assert b"1.2.840.10008.5.1.4.1.1.66.7" in (tmp_path / "odd.dcm").read_bytes()  # Label Map Segmentation Storage


def test_a_format_that_keeps_no_names_says_so(mask: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "medseg"):
        convert(mask, tmp_path / "a.nii.gz", labels=LABELS)
        assert caplog.messages == []
        convert(tmp_path / "a.nii.gz", tmp_path / "a.mha")  # the names are in the file
    assert caplog.messages == [f"{tmp_path / 'a.mha'}: a file ending in .mha does not keep the names of labels"]


# Refusals


def test_what_cannot_be_converted_says_why(series: Path, mask: Path, tmp_path: Path) -> None:
    for target, choices, message in [
        ("x.jpg", {}, r"x.jpg: has no ending that a mask can be written with \(expected .nii.gz .nii .seg.nrrd"),
        ("mask.nii.gz", {}, "mask.nii.gz: is there already.*--overwrite"),
        ("x.dcm", {"labels": LABELS}, "--reference"),
        ("x.dcm", {"labels": LABELS, "reference": mask}, "mask.nii.gz: is no DICOM series"),
        ("x.dcm", {"reference": series}, "does not name its labels, which .dcm needs.*--labels"),
        ("x.seg.nrrd", {}, "does not name its labels, which .seg.nrrd needs"),
        ("x.nii.gz", {"labels": Labels(values={"liver": 1})}, r"label values \[7\] have no name"),
        ("x.nii.gz", {"reference": tmp_path / "nowhere"}, "nowhere"),
    ]:
        with pytest.raises(InputError, match=message):
            convert(mask, tmp_path / target, **choices)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nothing"):
        convert(tmp_path / "nothing.nii.gz", tmp_path / "x.nii.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.nii.gz", "study"]


def test_overwriting_is_asked_for(mask: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.nii.gz"
    target.write_text("precious")
    with pytest.raises(InputError, match="is there already"):
        convert(mask, target)
    assert target.read_text() == "precious"
    convert(mask, target, overwrite=True)
    assert volumes(target) == expected()


@pytest.mark.parametrize("change", ["shifted by half a voxel", "shifted out of the image", "other spacing"])
def test_a_mask_of_another_image_is_refused(change: str, series: Path, tmp_path: Path) -> None:
    affine = grid().affine.copy()
    if change == "other spacing":
        affine[:3, :3] *= 1.01
    else:
        affine[:3, 3] += affine[:3, 0] * (0.5 if "half" in change else SHAPE[0] - 4)
    io.write_mask(Mask(drawn(), Geometry(SHAPE, affine)), tmp_path / "m.nii.gz")
    for target in ("m.dcm", "other.nii.gz"):
        with pytest.raises(GeometryMismatch):
            convert(tmp_path / "m.nii.gz", tmp_path / target, reference=series, labels=LABELS)


def test_one_of_several_series_is_named(series: Path, mask: Path, tmp_path: Path) -> None:
    write_series(series / "other", np.ones((4, 4, 4), np.int16), uid="1.2.3.4", study_uid="1.2.3")
    with pytest.raises(InputError, match=r"1\.2\.3\.4"):
        convert(mask, tmp_path / "a.dcm", reference=series, labels=LABELS)
    with pytest.raises(GeometryMismatch):
        convert(mask, tmp_path / "a.dcm", reference=series, series="1.2.3.4", labels=LABELS)
    (wanted,) = (one for one in io.dicom.scan(series).series if one.uid != "1.2.3.4")
    convert(mask, tmp_path / "a.dcm", reference=series, series=wanted.name, labels=LABELS)
    assert volumes(tmp_path / "a.dcm") == expected()


def test_a_mask_on_the_grid_that_a_tilted_or_uneven_series_is_read_on_becomes_a_segmentation(tmp_path: Path) -> None:
    for name, grid in (("tilted", {"step": (0, 0.5, 2)}), ("uneven", {"offsets": [0, 2, 4, 8]})):
        write_series(tmp_path / name, np.ones((6, 6, 4), np.int16), **grid)  # type: ignore[arg-type]
        read_on = io.dicom.check(io.series(tmp_path / name, resample_irregular=True))
        array = np.zeros(read_on.shape, np.uint8)
        array[2:4, 2:4, 1] = 1
        io.write_mask(Mask(array, read_on, LABELS), tmp_path / f"{name}.nii.gz")
        made = convert(tmp_path / f"{name}.nii.gz", tmp_path / f"{name}.dcm", reference=tmp_path / name)
        np.testing.assert_array_equal(made.array, array)


def test_a_segmentation_of_an_uneven_series_has_the_planes_between_its_slices(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_series(tmp_path / "study", np.ones((6, 6, 4), np.int16), offsets=[0, 2, 4, 8])
    read_on = io.series(tmp_path / "study", resample_irregular=True)
    array = np.zeros((6, 6, 5), np.uint8)
    array[2:4, 2:4, 1:] = 1
    io.write_mask(Mask(array, io.dicom.check(read_on), LABELS, header=read_on), tmp_path / "seg.dcm")
    made = convert(tmp_path / "seg.dcm", tmp_path / "back.nii.gz", reference=tmp_path / "study")
    np.testing.assert_array_equal(made.array, array)
    assert "no slice" not in caplog.text
    convert(tmp_path / "seg.dcm", tmp_path / "alone.nii.gz")
    assert "1 of 4 planes have no slice in this DICOM SEG" in caplog.text  # at 2, 4 and 8 mm


def test_a_series_that_is_no_volume_is_no_reference(mask: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "one", np.arange(64, dtype=np.int16).reshape(4, 4, 4), offsets=[0, 0, 0, 0])
    with pytest.raises(IncompleteSeries):
        convert(mask, tmp_path / "a.dcm", reference=tmp_path / "one", labels=LABELS)


# Names


def test_labels_come_from_tables_datasets_and_packages(
    phantom_dataset: Path, tiny_run: RunResult, tmp_path: Path
) -> None:
    (tmp_path / "dseg.tsv").write_text("index\tname\n0\tBackground\n2\tliver\n")
    assert labels_at(tmp_path / "dseg.tsv").values == {"liver": 2}
    for place in (phantom_dataset, phantom_dataset / "dataset.json", tiny_run.package):
        assert labels_at(place).values == {"organ": 1, "lesion": 5}
    packed = Path(shutil.make_archive(str(tmp_path / "package"), "zip", tiny_run.package))
    assert labels_at(packed).values == {"organ": 1, "lesion": 5}
    with pytest.raises(InputError, match="nowhere"):
        labels_at(tmp_path / "nowhere.csv")
    (tmp_path / "dataset.json").write_text('{"name": "x"}')
    with pytest.raises(DatasetError, match="has no labels"):
        labels_at(tmp_path)


def test_the_name_of_a_dataset_says_what_its_labels_stand_for(tmp_path: Path) -> None:
    assert coding_of("Anterior") is None
    (tmp_path / "dataset.json").write_text('{"name": "Task04_Hippocampus", "labels": {"1": "Anterior", "2": "odd"}}')
    found = labels_at(tmp_path)
    assert found.codings == {"Anterior": coding_of("Anterior", "Task04_Hippocampus")}
