"""Which images to segment: every kind of place, what is said where nothing is found, and shards that share a list."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import write_series
from hypothesis import given
from hypothesis import strategies as st

from medseg import io
from medseg.cases import (
    MASK_FORMATS,
    Shard,
    files_of,
    find_cases,
    mask_name,
    mask_names,
    probability_name,
    require_apart,
)
from medseg.dataset import Case
from medseg.errors import DatasetError, IncompleteSeries, InputError
from medseg.io import dicom
from medseg.io.dicom import Series


def names(cases: list[Case]) -> dict[str, list[str]]:
    return {case.id: [path.name for path in case.paths] for case in cases}


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_a_folder_gives_its_images_by_name_whatever_the_names_are(tmp_path: Path) -> None:
    touch(tmp_path, "Ärzte 1.nii.gz", "b c.NII", "d.mha", "._d.mha", ".hidden.nii", "notes.txt", "deeper/e.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    found = names(find_cases(tmp_path))
    assert found == {"b c": ["b c.NII"], "d": ["d.mha"], "Ärzte 1": ["Ärzte 1.nii.gz"]}


def test_files_that_end_in_0000_are_channels_and_other_numbers_are_not(tmp_path: Path) -> None:
    touch(tmp_path / "channels", "p_0001.nii.gz", "p_0000.nii.gz", "q_0000.nii.gz")
    assert names(find_cases(tmp_path / "channels")) == {
        "p": ["p_0000.nii.gz", "p_0001.nii.gz"],
        "q": ["q_0000.nii.gz"],
    }
    touch(tmp_path / "numbers", "scan_0001.nii.gz", "scan_0002.nii.gz")
    assert list(names(find_cases(tmp_path / "numbers"))) == ["scan_0001", "scan_0002"]
    touch(tmp_path / "mixed", "scan_0000.nii.gz", "other.nii.gz")
    assert list(names(find_cases(tmp_path / "mixed"))) == ["other", "scan_0000"]
    assert list(names(find_cases(tmp_path / "channels" / "q_0000.nii.gz"))) == ["q"]


def test_of_a_pair_of_header_and_image_the_header_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, "a.hdr", "a.img", "b.hdr.gz", "b.img.gz")
    assert names(find_cases(tmp_path)) == {"a": ["a.hdr"], "b": ["b.hdr.gz"]}


def test_pictures_beside_volumes_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert names(find_cases(touch(tmp_path, "a.nii.gz", "a.png", "overview.tif"))) == {"a": ["a.nii.gz"]}
    assert "2 pictures beside volumes are passed over" in caplog.text


def test_where_nothing_is_found_it_is_said_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no image among its 2 entries.*\.nii\.gz.*Did you mean .*deeper\?"):
        find_cases(touch(tmp_path, "notes.txt", "deeper/a.nii"))
    with pytest.raises(InputError, match="no known image ending"):
        find_cases(tmp_path / "notes.txt")


def test_a_dataset_gives_its_test_cases(
    phantom_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [case.id for case in find_cases(phantom_dataset)] == ["phantom_007", "phantom_008"]
    assert find_cases(phantom_dataset / "dataset.json") == find_cases(phantom_dataset)
    copy = tmp_path / "copy"
    for source in phantom_dataset.rglob("*.*"):
        if source.name != "phantom_008.nii.gz":
            (copy / source.relative_to(phantom_dataset)).parent.mkdir(parents=True, exist_ok=True)
            (copy / source.relative_to(phantom_dataset)).write_bytes(source.read_bytes())
    assert [case.id for case in find_cases(copy)] == ["phantom_007"]
    assert "phantom_008" in caplog.text
    (copy / "imagesTs" / "phantom_007.nii.gz").unlink()
    with pytest.raises(InputError, match=r"no test case.*do not exist: phantom_007, phantom_008"):
        find_cases(copy)
    (copy / "dataset.json").write_text("{}")
    with pytest.raises(DatasetError):
        find_cases(copy)


def test_several_places_are_one_list(tmp_path: Path) -> None:
    touch(tmp_path, "a/p_0000.nii.gz", "a/p_0001.nii.gz", "b/q.nii.gz", "c.nii")
    places = [tmp_path / "a" / "p_0001.nii.gz", tmp_path / "a" / "p_0000.nii.gz", tmp_path / "b", tmp_path / "b"]
    assert names(find_cases(*places)) == {"p": ["p_0000.nii.gz", "p_0001.nii.gz"], "q": ["q.nii.gz"]}
    with pytest.raises(InputError, match="is not given"):
        find_cases()


def test_two_images_whose_masks_would_have_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/ct.nii.gz", "b/ct.nii.gz")
    with pytest.raises(InputError, match=r"ct: is the name of several images: .*a/ct\.nii\.gz and .*b/ct\.nii\.gz"):
        find_cases(tmp_path / "a", tmp_path / "b")


# Patterns


def test_a_pattern_names_cases_after_the_folders_that_vary(tmp_path: Path) -> None:
    touch(tmp_path, "anna/ct.nii.gz", "bob/ct.nii.gz", "bob/mr.nii.gz", "bob/deep/ct.nii.gz", "bob/ct.txt", "x.nii.gz")
    assert names(find_cases(f"{tmp_path}/*/ct.nii.gz")) == {"anna_ct": ["ct.nii.gz"], "bob_ct": ["ct.nii.gz"]}
    assert list(names(find_cases(f"{tmp_path}/**/ct.*"))) == ["anna_ct", "bob_ct", "bob_deep_ct"]
    assert list(names(find_cases(f"{tmp_path}/bob/*r.nii*"))) == ["mr"]
    with pytest.raises(InputError, match="matches no image"):
        find_cases(f"{tmp_path}/*/pet.nii.gz")


def test_a_pattern_groups_channels(tmp_path: Path) -> None:
    touch(tmp_path, "one/t_0000.nii", "one/t_0001.nii", "two/t_0000.nii", "two/t_0001.nii")
    found = find_cases(f"{tmp_path}/*/*.nii")
    assert names(found) == {name: ["t_0000.nii", "t_0001.nii"] for name in ("one_t", "two_t")}
    assert [path.parent.name for path in found[1].paths] == ["two", "two"]


def test_a_file_with_the_letters_of_a_pattern_in_its_name_is_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].nii.gz", "a1.nii.gz")
    assert names(find_cases(str(tmp_path / "a[1].nii.gz"))) == {"a[1]": ["a[1].nii.gz"]}


# Tables


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_lists_images_relative_to_itself(tmp_path: Path) -> None:
    found = find_cases(table(tmp_path / "list.csv", "age,image\n40,a/ct.nii.gz\n50,/elsewhere/mr.nii\n"))
    assert [(case.id, case.images) for case in found] == [
        ("ct", (tmp_path / "a" / "ct.nii.gz",)),
        ("mr", (Path("/elsewhere/mr.nii"),)),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_may_name_cases_and_channels(separator: str, tmp_path: Path) -> None:
    rows = [["image_1", "case", "image_0"], ["x/flair.nii", "anna", "x/t1.nii"], ["y/flair.nii", "bob", "y/t1.nii"]]
    text = "\ufeff" + "\n".join(separator.join(row) for row in rows)
    found = find_cases(table(tmp_path / "list.csv", text))
    assert names(found) == {"anna": ["t1.nii", "flair.nii"], "bob": ["t1.nii", "flair.nii"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns"),
        ("image\n", "it has no rows"),
        ("path\na.nii\n", "has the columns path .expected image, or image_0"),
        ("image,case\na.nii,x\n,y\nb.nii,z\n ,w\n", "row 3 names no image; row 5 names no image"),
        ("image_0,image_1\na.nii,\n", "row 2 names no image_1"),
        ("image,case\na.nii,x\nb.nii,y/z\n,w\n", r"row 4 names no image; row 3 names its case 'y/z'"),
        ("image,case\na.nii,x\nb.nii,x\n", "x: is the name of several images"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_every_fault(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        find_cases(table(tmp_path / "list.csv", text))


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"image\n\xff\xfe\n")
    with pytest.raises(InputError, match="CSV file in UTF-8"):
        find_cases(tmp_path / "list.csv")


# DICOM


VOXELS = np.arange(4 * 3 * 2, dtype=np.int16).reshape(4, 3, 2)


def study(folder: Path, **descriptions: str) -> Path:
    """A folder with a series a word, in a folder each: UIDs 1.2.NAME.1 on; the study is the folder's name."""
    number = int.from_bytes(folder.name.encode()) % 10**9
    for index, (name, description) in enumerate(descriptions.items(), start=1):
        described = partial(setattr_of, "SeriesDescription", description)
        uids = {"uid": f"1.2.{number}.{index}", "study_uid": f"1.2.{number}"}
        write_series(folder / name, VOXELS, change=described, **uids)
    return folder


def setattr_of(keyword: str, value: str, dataset: Any, k: int) -> None:
    setattr(dataset, keyword, value)


def uneven(folder: Path) -> Path:
    write_series(folder, np.zeros((4, 3, 4), np.int16), offsets=(0, 1, 2, 4), uid="1.9.1", study_uid="1.9")
    return folder


def uids(cases: list[Case]) -> list[list[str]]:
    return [[image.uid.rpartition(".")[2] for image in case.images if isinstance(image, Series)] for case in cases]


def test_each_study_of_a_folder_or_zip_is_a_case(tmp_path: Path) -> None:
    for name in ("anna", "bob"):
        study(tmp_path / "in" / name, t1="T1")
    cases = find_cases(tmp_path / "in")
    assert uids(cases) == [["1"], ["1"]]
    assert all(re.fullmatch(r"series_[0-9a-f]{12}", case.id) for case in cases)
    assert [case.id for case in cases] == [io.name_of(case.images[0]) for case in cases]
    packed = Path(shutil.make_archive(str(tmp_path / "in"), "zip", tmp_path / "in"))
    assert [case.id for case in find_cases(packed)] == [case.id for case in cases]
    assert list(files_of(find_cases(packed)[0])) == [packed]
    assert len(list(files_of(cases[0]))) == VOXELS.shape[2]


def test_folders_files_and_zips_of_dicom_match_a_pattern(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("anna", "bob"):
        study(tmp_path / name, t1="T1")
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "notes.txt")
    both = find_cases(f"{tmp_path}/*/")
    assert len(both) == 2
    assert "empty: holds no DICOM image, and is passed over" in caplog.text
    assert [case.id for case in find_cases(tmp_path / "anna", f"{tmp_path}/*")] == [case.id for case in both]
    shutil.make_archive(str(tmp_path / "zips" / "x"), "zip", tmp_path / "bob")
    assert [case.id for case in find_cases(f"{tmp_path}/zips/*.zip")] == [both[1].id]
    with pytest.raises(InputError, match="matches no image"):
        find_cases(f"{tmp_path}/emp*")


def test_files_of_one_series_are_no_cases_of_their_own(tmp_path: Path) -> None:
    files = sorted((study(tmp_path / "a", t1="T1") / "t1").iterdir())
    for places in ([files[0]], files, [f"{tmp_path}/a/t1/*"]):
        with pytest.raises(IncompleteSeries, match=r"is one slice of a series of several files\. Give the folder"):
            find_cases(*places)
    with pytest.raises(InputError, match=r"several images: .*Give the folder that holds all files of the series"):
        find_cases(*files, study(tmp_path / "bob", t1="T1"))
    assert uids(find_cases(f"{tmp_path}/**/*")) == [["1"], ["1"]]  # the files of a folder that is matched are its own
    files[1].unlink()
    (case,) = find_cases(files[0])
    assert io.name_of(case.images[0]) == case.id


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["t1*"], [["1"], ["1"]]),
        (["*ce", "T2"], [["2", "3"], ["2", "3"]]),  # one a channel, in this order
        (["t2", "t1 ce"], [["3", "2"], ["3", "2"]]),
    ],
)
def test_patterns_pick_the_series_of_every_study(patterns: list[str], found: list[list[str]], tmp_path: Path) -> None:
    first, second = ("T1", "x") if patterns == ["t1*"] else ("T1 x", "T1 ce")
    for name in ("anna", "bob"):
        study(tmp_path / name, a=first, b=second, c="T2")
    assert uids(find_cases(tmp_path, series=patterns)) == found


def test_a_uid_picks_one_series_of_one_study(tmp_path: Path) -> None:
    for name in ("anna", "bob"):
        study(tmp_path / name, a="T1", b="T1")
    wanted = dicom.scan(tmp_path / "bob").series[1]
    for pattern in (wanted.uid, wanted.name):
        (case,) = find_cases(tmp_path, series=[pattern])
        assert case.id == wanted.name


def test_a_study_that_leaves_the_choice_open_fails_alone(tmp_path: Path) -> None:
    study(tmp_path / "anna", a="T1", b="T2")
    study(tmp_path / "bob", a="T1")
    uneven(tmp_path / "carl")
    cases = find_cases(tmp_path)
    reasons = {}
    for case in cases:
        try:
            io.read_volume(case.images)
        except InputError as failure:
            reasons[case.id] = str(failure)
    assert len(cases) == 3
    series = {one.uid: one.name for one in dicom.scan(tmp_path).series}
    (several, open_choice), (crooked, uneven_one) = reasons.items()
    assert re.fullmatch(r"study_[0-9a-f]{12}", several)  # no series is called so: none is chosen
    assert "2 series could be meant: series_" in open_choice
    assert crooked == series["1.9.1"]
    assert "series 1.9.1: " in uneven_one
    assert len(find_cases(tmp_path, resample_irregular=True)) == 3
    (case,) = find_cases(tmp_path / "carl", resample_irregular=True)
    assert io.read_volume(case.images).array.shape[3] == 5


def test_a_study_alone_is_refused_at_once(tmp_path: Path) -> None:
    study(tmp_path / "anna", a="T1", b="T2")
    with pytest.raises(IncompleteSeries, match=r"anna: 2 series could be meant: series_\w+ \(CT, .*--series"):
        find_cases(tmp_path / "anna")
    with pytest.raises(IncompleteSeries, match="no series is called 'T3'"):
        find_cases(tmp_path / "anna", series=["T3"])
    with pytest.raises(IncompleteSeries, match=r"series 1\.9\.1"):
        find_cases(uneven(tmp_path / "carl"))
    study(tmp_path / "bob", a="T1", b="T2")
    with pytest.raises(IncompleteSeries, match="the first of 3 that cannot be used"):
        find_cases(tmp_path)
    write_series(tmp_path / "shots", VOXELS, change=partial(setattr_of, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.7"))
    with pytest.raises(IncompleteSeries, match="2 x secondary capture"):
        find_cases(tmp_path / "shots")
    (tmp_path / "bad.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"bad\.zip"):
        find_cases(tmp_path / "bad.zip")


def test_images_come_before_dicom_below_them_unless_a_series_is_named(tmp_path: Path) -> None:
    touch(study(tmp_path, t1="T1"), "a.nii.gz")
    assert names(find_cases(tmp_path)) == {"a": ["a.nii.gz"]}
    assert uids(find_cases(tmp_path, series=["T1"])) == [["1"]]
    with pytest.raises(InputError, match=r"--series: picks series of DICOM, and .*a\.nii\.gz is none"):
        find_cases(tmp_path / "a.nii.gz", series=["T1"])


def test_previews_beside_dicom_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(study(tmp_path, t1="T1") / "t1", "preview.png")
    assert uids(find_cases(tmp_path / "t1")) == [["1"]]
    touch(tmp_path, "preview.png")
    assert uids(find_cases(f"{tmp_path}/*")) == [["1"]]
    assert "pictures beside DICOM are passed over, as preview.png" in caplog.text


def test_a_pattern_matches_images_and_dicom_alike(tmp_path: Path) -> None:
    touch(study(tmp_path / "anna", t1="T1").parent, "a.nii.gz", "b.mha")
    expected = [[], [], ["1"]]
    assert uids(find_cases(f"{tmp_path}/*")) == uids(find_cases(*sorted(tmp_path.iterdir()))) == expected
    assert uids(find_cases(f"{tmp_path}/*", series=["T1"])) == expected


def test_dicom_beside_images_is_not_passed_over_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.nii.gz", "results/table.csv", "notes.txt")
    assert names(find_cases(tmp_path)) == {"a": ["a.nii.gz"]}
    assert not caplog.text
    study(tmp_path / "anna", t1="T1")
    assert names(find_cases(tmp_path)) == {"a": ["a.nii.gz"]}
    assert re.search(r"DICOM beside images is passed over: name \S+/anna too", caplog.text)
    caplog.clear()
    assert uids(find_cases(tmp_path, series=["T1"])) == [["1"]]
    assert "images beside DICOM are passed over, as a.nii.gz" in caplog.text


def test_a_series_is_picked_for_the_dicom_of_a_list_alone(tmp_path: Path) -> None:
    study(tmp_path / "anna", a="T1", b="T2")
    touch(tmp_path, "a.nii.gz", "images/b.nii.gz")
    cases = find_cases(tmp_path / "a.nii.gz", tmp_path / "images", tmp_path / "anna", series=["T2"])
    assert ([case.id for case in cases][:2], uids(cases)) == (["a", "b"], [[], [], ["2"]])
    cases = find_cases(table(tmp_path / "list.csv", "image\na.nii.gz\nanna\n"), series=["T1"])
    assert uids(cases) == [[], ["1"]]
    with pytest.raises(InputError, match=r"--series: picks series of DICOM, and .*b\.nii\.gz is none"):
        find_cases(tmp_path / "images", series=["T1"])


def test_a_table_names_cases_of_dicom_and_their_series(tmp_path: Path) -> None:
    study(tmp_path / "anna", a="T1", b="T2")
    text = "case;image;series_1;series_0\nx;anna;T1;t2\ny;anna/a;;\nz;anna;;\n;anna/b;;\nw;gone.nii;;\n"
    cases = find_cases(table(tmp_path / "list.csv", text))
    assert [case.id for case in cases][:3] == ["x", "y", "z"]
    assert uids([case for case in cases if case.id != "z"]) == [["2", "1"], ["1"], ["2"], []]
    assert cases[3].id == io.name_of(cases[3].images[0])
    assert cases[4].paths == (tmp_path / "gone.nii",)
    with pytest.raises(InputError, match="2 series could be meant"):
        io.read_volume(cases[2].images)
    text = "image_0,image_1\nanna/a,anna/b\n"
    assert uids(find_cases(table(tmp_path / "two.csv", text))) == [["1", "2"]]
    with pytest.raises(InputError, match="row 2: 1 series do not fit its 2 images"):
        find_cases(tmp_path / "two.csv", series=["T1"])


def test_test_images_of_a_dataset_may_be_folders(phantom_dataset: Path, tmp_path: Path) -> None:
    study(tmp_path / "anna", a="T1")
    image = next((phantom_dataset / "imagesTr").iterdir())
    label = phantom_dataset / "labelsTr" / image.name
    training = [{"image": str(image), "label": str(label)}]
    body = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "organ"}, "test": ["anna"]}
    (tmp_path / "dataset.json").write_text(json.dumps({**body, "training": training}))
    (case,) = find_cases(tmp_path / "dataset.json")
    assert (case.id, uids([case])) == ("anna", [["1"]])


def test_the_folders_of_series_are_no_place_for_masks(tmp_path: Path) -> None:
    cases = find_cases(study(tmp_path / "in" / "anna", t1="T1"))
    require_apart(cases, tmp_path / "in")
    require_apart(cases, tmp_path / "in" / "anna" / "masks")
    for place in (tmp_path / "in" / "anna", tmp_path / "in" / "anna" / "t1"):
        with pytest.raises(InputError, match="holds input images, as anna"):
            require_apart(cases, place)
    packed = Path(shutil.make_archive(str(tmp_path / "zips" / "x"), "zip", tmp_path / "in"))
    with pytest.raises(InputError, match=r"as x\.zip"):
        require_apart(find_cases(packed), tmp_path / "zips")


def test_masks_in_several_formats_have_names_of_their_own() -> None:
    case = Case("a", (Path("x.nii"),), None)
    assert mask_names(case, MASK_FORMATS) == ("a.nii.gz", "a.dcm", "a.seg.nrrd", "a.nrrd", "a.mha")
    assert mask_names(Case("a", (Path("x.tiff"),), None), ("nii.gz", "nrrd")) == ("a.tif", "a.nrrd")


# Names and files


def test_masks_are_named_after_their_cases() -> None:
    named = {name: mask_name(Case("a", (Path(name),), None)) for name in ("x.nii", "x.mha", "x.jpg", "x.tif", "x.TIFF")}
    expected = {"x.nii": "a.nii.gz", "x.mha": "a.nii.gz", "x.jpg": "a.png", "x.tif": "a.tif", "x.TIFF": "a.tif"}
    assert named == expected


def test_an_image_of_two_files_consists_of_both(tmp_path: Path) -> None:
    touch(tmp_path, "a.hdr", "a.img", "ab.img", "b.nii")
    case = Case("a", (tmp_path / "a.hdr", tmp_path / "b.nii"), None)
    assert [path.name for path in files_of(case)] == ["a.hdr", "a.img", "b.nii"]


# Shards


@given(ids=st.lists(st.text(min_size=1), unique=True), count=st.integers(1, 12))
def test_shards_have_each_case_once_and_differ_by_one_at_most(ids: list[str], count: int) -> None:
    cases = [Case(name, (Path("a.nii"),), None) for name in ids]
    shares = [[case.id for case in Shard(index, count).share(cases)] for index in range(1, count + 1)]
    assert sorted(name for share in shares for name in share) == sorted(ids)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    again = [case.id for case in Shard(1, count).share(cases[::-1])]
    assert again == shares[0]  # whatever the order in which they were found


def test_a_shard_is_written_as_a_fraction() -> None:
    assert Shard.of("2/8") == Shard(2, 8)
    assert [Shard.of(text).suffix for text in ("2/8", "1/1")] == ["-2-of-8", ""]


@pytest.mark.parametrize("text", ["", "2", "0/8", "9/8", "1/0", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="2/8"):
        Shard.of(text)


def slurm(**numbers: int) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("variables", "shard"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "5"}, None),
        (slurm(ID=1, MIN=1, MAX=8, STEP=1, COUNT=8), Shard(1, 8)),
        (slurm(ID=7, MIN=0, MAX=7, COUNT=8), Shard(8, 8)),
        (slurm(ID=20, MIN=10, MAX=30, STEP=10), Shard(2, 3)),  # --array=10-30:10
        (slurm(ID=5, MIN=5, MAX=5, STEP=1, COUNT=1), Shard(1, 1)),
    ],
)
def test_a_slurm_array_says_which_shard_it_is(variables: dict[str, str], shard: Shard | None) -> None:
    assert Shard.of_slurm(variables) == shard


@pytest.mark.parametrize(
    "variables",
    [
        slurm(ID=2, MIN=1, MAX=7, STEP=1, COUNT=3),  # --array=1,2,7
        slurm(ID=3),
        slurm(ID=9, MIN=1, MAX=3, COUNT=3),
    ],
)
def test_a_slurm_array_of_other_numbers_is_refused(variables: dict[str, str]) -> None:
    with pytest.raises(InputError, match="--shard i/n"):
        Shard.of_slurm(variables)


def test_probabilities_have_a_folder_a_case_and_a_sound_name() -> None:
    assert probability_name("p", "kidney tumour/left") == "probabilities/p/kidney_tumour_left.nii.gz"


def test_an_output_folder_that_holds_images_is_refused(tmp_path: Path) -> None:
    case = Case("x", (tmp_path / "in" / "x.mha",), None)
    for elsewhere in (tmp_path, tmp_path / "out", tmp_path / "in" / "masks"):
        require_apart([case], elsewhere)
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for place in (tmp_path / "in", tmp_path / "out" / ".." / "in", tmp_path / "link"):
        with pytest.raises(InputError, match=r"holds input images, as x\.mha"):
            require_apart([case], place)


def test_headers_are_read_with_one_progress_for_all_places(tmp_path: Path) -> None:
    """Three studies of two slices each: a folder, and two rows of a table, the second of two channels."""
    for name in "abc":
        write_series(tmp_path / name, np.zeros((4, 3, 2), dtype=np.int16))
    (tmp_path / "list.csv").write_text("case,image_0,image_1\none,b,b\ntwo,c,c\n")
    seen: list[float] = []
    find_cases(tmp_path / "a", tmp_path / "list.csv", progress=lambda work, fraction, note: seen.append(fraction))
    assert seen == [n / 16 for n in (4, 8, 9, 10, 11, 12, 13, 14, 15, 16)]
