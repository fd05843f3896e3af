"""Dataset: what the two kinds of dataset.json mean, and the folds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from small_datasets import decathlon, image, mask, nnunet, picture, save_picture, write, write_pictures

from medseg.dataset import Case, Dataset, Fold
from medseg.errors import DatasetError, InputError
from medseg.terminology import Code, Coding

DATA = os.environ.get("MEDSEG_TEST_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MEDSEG_TEST_DATA is not set")


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


def test_nnunet_finds_its_cases_by_name(tmp_path: Path) -> None:
    dataset = Dataset.open(nnunet(tmp_path))
    assert dataset.name == tmp_path.name
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert [file.name for file in dataset.case("a").files] == ["a_0000.nii.gz", "a_0001.nii.gz", "a.nii.gz"]
    assert [(case.id, len(case.images), case.label) for case in dataset.test] == [("t", 2, None)]
    assert dataset.faults == ()


def test_nnunet_with_an_explicit_list(tmp_path: Path) -> None:
    files = {"images": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "label": "labelsTr/a.nii.gz"}
    dataset = Dataset.open(nnunet(tmp_path, dataset={"patient one": files}, numTraining=1))
    assert [case.id for case in dataset.cases] == ["patient one"]
    assert {f.case for f in dataset.faults} == {"b", "b_0000", "b_0001"}  # they are there and not listed


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_nnunet_pictures_hold_all_channels_in_one_file(tmp_path: Path, ending: str) -> None:
    write_pictures(tmp_path, 2, ending=ending)
    save_picture(tmp_path / "imagesTs" / f"t_0000{ending}", picture(9)[0])
    dataset = Dataset.open(tmp_path)
    assert dataset.channels == ("R", "G", "B")
    assert [[file.name for file in case.files] for case in dataset.cases] == [
        [f"p0_0000{ending}", f"p0{ending}"],
        [f"p1_0000{ending}", f"p1{ending}"],
    ]
    assert [[file.name for file in case.images] for case in dataset.test] == [[f"t_0000{ending}"]]
    assert dataset.faults == ()


def test_nnunet_pictures_of_one_file_a_channel(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    for channel in range(3):
        save_picture(tmp_path / "imagesTr" / f"p0_000{channel}.png", picture(0)[0][..., channel])
    (case,) = Dataset.open(tmp_path).cases
    assert [file.name for file in case.images] == ["p0_0000.png", "p0_0001.png", "p0_0002.png"]


def test_a_decathlon_list_of_pictures(tmp_path: Path) -> None:
    listed = [{"image": "imagesTr/c0.png", "label": "labelsTr/c0.png"}]
    decathlon(tmp_path, 0, training=listed, modality={"0": "R", "1": "G", "2": "B"}, numTraining=1)
    for folder, array in zip(("imagesTr", "labelsTr"), picture(0), strict=True):
        save_picture(tmp_path / folder / "c0.png", array)
    dataset = Dataset.open(tmp_path)
    assert [case.id for case in dataset.cases] == ["c0"]
    assert dataset.faults == ()


def test_regions_and_ignore(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 4], "core": [2, 4], "oedema": 1, "enhancing": [4], "ignore": 9}
    known = Dataset.open(nnunet(tmp_path, labels=labels)).labels
    assert known.values == {"oedema": 1, "enhancing": 4, "label_2": 2}
    assert known.regions == {"whole": (1, 2, 4), "core": (2, 4)}
    assert known.ignore == 9


@pytest.mark.parametrize("layout", [decathlon, nnunet])
def test_labels_may_be_coded_and_coloured(tmp_path: Path, layout: Any) -> None:
    plain = Dataset.open(layout(tmp_path / "plain"))
    more = {"codings": {"near": {"type": {"value": "10200004", "meaning": "Liver"}}}, "colours": {"far": [1, 2, 3]}}
    dataset = Dataset.open(layout(tmp_path / "more", **more))
    assert dataset.labels.codings == {"near": Coding(type=Code(value="10200004", meaning="Liver", scheme="SCT"))}
    assert dataset.labels.colours == {"far": (1, 2, 3)}
    assert dataset.digest() == plain.digest()  # nothing is to be measured or trained anew for a colour


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codings": {"nearer": {"type": {"value": "1", "meaning": "x"}}}}, "nearer"),
        ({"codings": {"near": {"type": {"value": "1", "meaning": "x"}, "side": "left"}}}, "codings.near.side"),
        ({"codings": {"near": {}}}, "codings.near.type"),
        ({"codings": ["near"]}, "codings"),
        ({"colours": {"near": "red"}}, "colours.near"),
        ({"colours": {"near": [1, 2, 256]}}, "0 to 255"),
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


# ---- real data ----


@needs_data
def test_folds_of_task04_are_those_of_scikit_learn() -> None:
    # KFold(5, shuffle=True, random_state=12345) on the 200 sorted ids, first ten held out of folds 0 and 4
    folds = Dataset.open(Path(DATA) / "Task04_Hippocampus").folds()
    assert all(isinstance(fold, Fold) and len(fold.validation) == 40 for fold in folds)
    assert [int(case[-3:]) for case in folds[0].validation[:10]] == [20, 36, 37, 40, 51, 99, 102, 105, 108, 109]
    assert [int(case[-3:]) for case in folds[4].validation[:10]] == [3, 15, 23, 45, 53, 58, 65, 68, 88, 126]
