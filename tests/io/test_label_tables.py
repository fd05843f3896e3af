"""Tables of labels: what other programs read, and what is read of theirs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import DatasetError, InputError, UnreadableFile
from medseg.io.label_tables import read_labels_file, tables
from medseg.terminology import Code, Coding
from medseg.volume import Labels

LIVER, KIDNEY = Code(value="10200004", meaning="Liver"), Code(value="64033007", meaning="Kidney")
LABELS = Labels(
    values={"liver": 1, "kidney_left": 7},
    codings={"liver": Coding(type=LIVER)},
    colours={"liver": (221, 130, 101)},
)


def written(labels: Labels, folder: Path, dataset: str = "") -> list[Path]:
    made = tables(labels.coded(dataset))
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in made]


def test_what_each_program_is_given(tmp_path: Path) -> None:
    slicer, itk_snap, bids = written(LABELS, tmp_path)
    assert slicer.read_text() == (
        "LabelValue,Name,Color_R,Color_G,Color_B,Color_A,Category_CodingScheme,Category_CodeValue,Category_CodeMeaning,"
        "Type_CodingScheme,Type_CodeValue,Type_CodeMeaning,TypeModifier_CodingScheme,TypeModifier_CodeValue,"
        "TypeModifier_CodeMeaning,Region_CodingScheme,Region_CodeValue,Region_CodeMeaning,RegionModifier_CodingScheme,"
        "RegionModifier_CodeValue,RegionModifier_CodeMeaning\n"
        "1,liver,221,130,101,255,SCT,91723000,Anatomical Structure,SCT,10200004,Liver,,,,,,,,,\n"
        "7,kidney_left,86,180,233,255,SCT,91723000,Anatomical Structure,SCT,64033007,Kidney,SCT,7771000,Left,,,,,,\n"
    )
    lines = itk_snap.read_text().splitlines()
    assert lines[1] == "# ITK-SnAP Label Description File"
    assert lines[5:] == [
        '    0     0    0    0        0  0  0    "Clear Label"',
        '    1   221  130  101        1  1  1    "liver"',
        '    7    86  180  233        1  1  1    "kidney_left"',
    ]
    assert bids.read_text() == "index\tname\tcolor\n1\tliver\t#dd8265\n7\tkidney_left\t#56b4e9\n"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    slicer, itk_snap, bids = map(read_labels_file, written(LABELS, tmp_path))
    assert slicer.values == itk_snap.values == bids.values == {"liver": 1, "kidney_left": 7}
    assert (
        slicer.colours == itk_snap.colours == bids.colours == {"liver": (221, 130, 101), "kidney_left": (86, 180, 233)}
    )
    assert slicer.codings["liver"] == Coding(type=LIVER)
    assert slicer.codings["kidney_left"] == Coding(type=KIDNEY, modifier=Code(value="7771000", meaning="Left"))
    assert itk_snap.codings == bids.codings == {}


def test_the_dataset_tells_what_its_labels_mean(tmp_path: Path) -> None:
    labels = Labels(values={"Anterior": 1, "label_2": 2})
    assert set(read_labels_file(written(labels, tmp_path, "Task04_Hippocampus")[0]).codings) == {"Anterior"}
    assert read_labels_file(written(labels, tmp_path)[0]).codings == {}


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda n: n.strip())


@given(st.lists(names, min_size=1, max_size=5, unique_by=lambda n: " ".join(n.replace('"', "'").split())))
def test_any_name_makes_a_sound_table(tmp_path_factory: pytest.TempPathFactory, given_names: list[str]) -> None:
    labels = Labels(values={name: n for n, name in enumerate(given_names, start=1)})
    for path in written(labels, tmp_path_factory.mktemp("tables")):
        marks = path.suffix == ".tsv"  # which keeps quotation marks
        expected = {" ".join(n.split()) if marks else " ".join(n.replace('"', "'").split()) for n in given_names}
        read = read_labels_file(path)
        assert set(read.values) == expected
        assert sorted(read.values.values()) == list(range(1, len(given_names) + 1))


def test_a_table_of_slicers_own(tmp_path: Path) -> None:
    """Rows of the example in Slicer's developer guide, with its older category, and one of the background."""
    path = tmp_path / "table.csv"
    path.write_text(
        "LabelValue,Name,Color_R,Color_G,Color_B,Category_CodingScheme,Category_CodeValue,Category_CodeMeaning,"
        "Type_CodingScheme,Type_CodeValue,Type_CodeMeaning,Region_CodingScheme,Region_CodeValue,Region_CodeMeaning,"
        "RegionModifier_CodingScheme,RegionModifier_CodeValue,RegionModifier_CodeMeaning\n"
        "0,Background,0,0,0,,,,,,,,,,,,\n"
        "5,right_kidney,185,102,83,SCT,123037004,Anatomical Structure,SCT,64033007,Kidney,,,,,,\n"
        '6,"mass, right",144,238,144,SCT,49755003,Morphologically Altered Structure,SCT,4147007,Mass,'
        "SCT,64033007,Kidney,SCT,24028007,Right\n"
        "9,,,,,SCT,85756007,Tissue,SCT,85756007,Tissue,,,,,,\n"
    )
    labels = read_labels_file(path)
    assert labels.values == {"right_kidney": 5, "mass, right": 6, "label_9": 9}
    assert labels.colours == {"right_kidney": (185, 102, 83), "mass, right": (144, 238, 144)}
    assert set(labels.codings) == {"right_kidney", "mass, right"}  # "tissue" twice: nothing was chosen
    assert labels.codings["right_kidney"].category.value == "91723000"
    mass = labels.codings["mass, right"]
    assert (mass.category.meaning, mass.type.meaning) == ("Morphologically Altered Structure", "Mass")
    assert mass.region == KIDNEY
    assert mass.region_modifier == Code(value="24028007", meaning="Right")


def test_names_that_a_format_makes_equal_are_numbered(tmp_path: Path) -> None:
    labels = Labels(values={'a"b': 1, "a'b": 2, "a\tb": 3, "a b": 4, "a b 2": 5, "\n": 6, 'a""': 7, "a''": 8})
    slicer, itk_snap, bids = (read_labels_file(path).values for path in written(labels, tmp_path))
    expected = {"a'b 2": 1, "a'b": 2, "a b 3": 3, "a b": 4, "a b 2": 5, "label_6": 6, "a'' 2": 7, "a''": 8}
    assert slicer == itk_snap == expected
    assert bids == {'a"b': 1, "a'b": 2, "a b 3": 3, "a b": 4, "a b 2": 5, "label_6": 6, 'a""': 7, "a''": 8}


def test_labels_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("index\tname\n1\t\n2\t \n3\tliver\n")
    assert read_labels_file(tmp_path / "a.tsv").values == {"label_1": 1, "label_2": 2, "liver": 3}
    (tmp_path / "a.txt").write_text('1 255 0 0 1 1 1 ""\n2 0 0 0 1 1 1 "liver"\n')
    assert read_labels_file(tmp_path / "a.txt").values == {"label_1": 1, "liver": 2}
    columns = "LabelValue,Type_CodeMeaning,TypeModifier_CodeMeaning"
    codes = "Category_CodingScheme,Category_CodeValue,Category_CodeMeaning,Type_CodingScheme,Type_CodeValue"
    of_kidney = "TypeModifier_CodingScheme,TypeModifier_CodeValue"
    table = f"{columns},{codes},{of_kidney}\n1,Liver,,SCT,91723000,Anatomical Structure,SCT,10200004,,\n"
    table += "2,Kidney,Left,SCT,91723000,Anatomical Structure,SCT,64033007,SCT,7771000\n3,,,,,,,,,\n"
    (tmp_path / "a.csv").write_text(table)
    labels = read_labels_file(tmp_path / "a.csv")
    assert labels.values == {"Liver": 1, "Left Kidney": 2, "label_3": 3}
    assert labels.codings["Liver"] == Coding(type=LIVER)


def test_a_code_that_is_none_is_refused(tmp_path: Path) -> None:
    for code in ("a b", "1" * 17, "1\\2"):
        table = f"LabelValue,Name,Type_CodingScheme,Type_CodeValue,Type_CodeMeaning\n1,liver,SCT,{code},Liver\n"
        (tmp_path / "a.csv").write_text(table)
        with pytest.raises(InputError, match="label 1 has a code that is none"):
            read_labels_file(tmp_path / "a.csv")


def test_tables_of_other_programs(tmp_path: Path) -> None:
    freesurfer = tmp_path / "FreeSurferColorLUT.txt"
    freesurfer.write_text("#No. Label Name: R G B A\n\n0 Unknown 0 0 0 0\n17  Left-Hippocampus  220 216 20  0\r\n")
    assert read_labels_file(freesurfer).values == {"Left-Hippocampus": 17}
    assert read_labels_file(freesurfer).colours == {"Left-Hippocampus": (220, 216, 20)}
    older = tmp_path / "table.ctbl"
    older.write_text("# Color table file\n0 Background 0 0 0 0\n1 artery 216 101 79 255\n")
    assert read_labels_file(older).values == {"artery": 1}
    plain = tmp_path / "atlas_dseg.tsv"
    plain.write_text('\ufeffindex\tname\tabbreviation\n1\tGray Matter\tGM\n2\t"White" Matter\tn/a\n', encoding="utf-8")
    assert read_labels_file(plain).values == {"Gray Matter": 1, '"White" Matter': 2}
    assert read_labels_file(plain).colours == {}


def test_labels_of_a_dataset(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"background": 0, "liver": 1}, "colours": {"liver": [1, 2, 3]}}))
    assert read_labels_file(path) == Labels(values={"liver": 1}, colours={"liver": (1, 2, 3)})
    path.write_text(json.dumps({"labels": {"0": "background", "1": "liver"}, "colours": {"lever": [1, 2, 3]}}))
    with pytest.raises(DatasetError, match="lever"):
        read_labels_file(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "no column LabelValue"),
        ("a.csv", b"Value,Name\n1,liver\n", "no column LabelValue"),
        ("a.csv", b"LabelValue,Name\n1.5,liver\n", "no integer"),
        ("a.csv", b"LabelValue,Name\n,liver\n", "no integer"),
        ("a.csv", b"LabelValue,Name\n1,a\n2,a\n", "several labels are called 'a'"),
        ("a.csv", b"LabelValue,Name\n1,a\n1,b\n", "integer of its own"),
        ("a.csv", b"LabelValue,Name\n0,a\n", "at least one label"),
        ("a.csv", b"LabelValue,Name,Color_R,Color_G,Color_B\n1,a,300,0,0\n", "0 to 255"),
        ("a.csv", b'LabelValue,Name\n1,"' + b"a" * 200_000 + b'"\n', "no table"),
        ("a.tsv", b"index\tcolor\n1\t#000000\n", "no column name"),
        ("a.txt", b"1 liver\n", "line 1 is no label"),
        ("a.txt", b"\xff\xfe", "no UTF-8"),
        ("a.txt", b"#" * (1 << 22) + b"#", "bytes"),
        ("a.json", b"[]", "JSON list"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_labels_file(tmp_path / name)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="cannot be read"):
        read_labels_file(tmp_path / "labels.csv")


def test_slicer_gets_what_its_reader_can_take(tmp_path: Path) -> None:
    """VTK's reader of delimited text knows no quotation mark within a value."""
    path = written(Labels(values={'the "big", one': 1}), tmp_path)[0]
    assert "1,\"the 'big', one\"," in path.read_text()
    assert list(csv.reader(path.read_text().splitlines()))[1][1] == "the 'big', one"
