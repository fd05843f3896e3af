from itertools import combinations

import pytest
from pydantic import ValidationError
from pydicom.sr.codedict import codes

from medseg import terminology
from medseg.terminology import Code, Coding, coding_of, colour_of, colour_of_fractions, fractions_of


def in_words(coding: Coding | None) -> str | None:
    """Category, type, modifier, region and its modifier: the codes' values."""
    if coding is None:
        return None
    parts = (coding.category, coding.type, coding.modifier, coding.region, coding.region_modifier)
    return " ".join("-" if part is None else part.value for part in parts)


# PS3.16: 91723000 anatomical structure, 49755003 morphologically abnormal structure, 108369006 neoplasm
DECATHLON = {
    ("BRATS", "edema"): "49755003 79654002 - 12738006 -",
    ("BRATS", "non-enhancing tumor"): "49755003 C81175 - 12738006 -",
    ("Task01_BrainTumour", "enhancing tumour"): "49755003 C113842 - 12738006 -",
    ("LeftAtrium", "left atrium"): "91723000 82471001 - - -",
    ("liver", "liver"): "91723000 10200004 - - -",
    ("liver", "cancer"): "49755003 108369006 - 10200004 -",
    ("Hippocampus", "Anterior"): "91723000 5366008 255549009 - -",
    ("Task04_Hippocampus", "Posterior"): "91723000 5366008 255551008 - -",
    ("PROSTATE", "PZ"): "91723000 279706003 - - -",
    ("Task05_Prostate", "TZ"): "91723000 399384005 - - -",
    ("lung", "cancer"): "49755003 108369006 - 39607008 -",
    ("pancreas", "pancreas"): "91723000 15776009 - - -",
    ("pancreas", "cancer"): "49755003 108369006 - 15776009 -",
    ("hepatic vessel", "Vessel"): "91723000 59820001 - 10200004 -",
    ("Task08_HepaticVessel", "Tumour"): "49755003 108369006 - 10200004 -",
    ("Spleen", "spleen"): "91723000 78961009 - - -",
    ("Colon", "colon cancer primaries"): "49755003 372087000 - 71854001 -",
}


@pytest.mark.parametrize(("dataset", "name"), DECATHLON)
def test_every_label_of_the_decathlon_has_its_code(dataset: str, name: str) -> None:
    assert in_words(coding_of(name, dataset)) == DECATHLON[dataset, name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("left_kidney", "91723000 64033007 7771000 - -"),
        ("Kidney (right)", "91723000 64033007 24028007 - -"),
        ("kidney-right", "91723000 64033007 24028007 - -"),
        ("kidney_l", "91723000 64033007 7771000 - -"),
        ("R kidney", "91723000 64033007 24028007 - -"),
        ("Kidneys", "91723000 64033007 - - -"),
        ("adrenal_gland_left", "91723000 23451007 7771000 - -"),
        ("lung_upper_lobe_left", "91723000 45653009 7771000 - -"),
        ("lung_middle_lobe_right", "91723000 72481006 - - -"),  # there is but one
        ("vertebrae_L5", "91723000 49668003 - - -"),
        ("atrial_appendage_left", "91723000 33626005 - - -"),  # a code of its own
        ("iliac_vena_left", "91723000 244411005 7771000 - -"),
        ("gall bladder", "91723000 28231008 - - -"),
        ("postcava", "91723000 64131007 - - -"),
        ("oesophagus", "91723000 32849002 - - -"),
        ("Sternum", "91723000 56873002 - - -"),  # not listed here: found among the anatomical structures of DICOM
        ("costal_cartilages", "91723000 50016007 - - -"),
        ("fat", "85756007 55603005 - - -"),  # a tissue
        ("cell nuclei", "91723000 84640000 - - -"),
        ("left kidney mass", "49755003 4147007 - 64033007 7771000"),
        ("liver tumour", "49755003 108369006 - 10200004 -"),
        ("hepatic lesion", "49755003 52988006 - 10200004 -"),
        ("kidney_cyst_left", "49755003 367643001 - 64033007 7771000"),
        ("tumor", "49755003 108369006 - - -"),
    ],
)
def test_names_of_many_spellings(name: str, expected: str) -> None:
    assert in_words(coding_of(name)) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("label_1", "1", "", "left", "foo", "left foo tumour"),
        *("Anterior", "PZ", "ED"),  # without a dataset
        *("head", "body", "nucleus", "ventricle", "hip_left"),  # of what?
        *("prostate/uterus", "portal_vein_and_splenic_vein", "left_right_kidney"),  # two things
        *("left_liver", "left spleen", "rib_left_1", "vertebrae_S1", "L5"),  # more than the codes can say, or less
        *(
            "muscle mass",
            "fat mass",
            "bone mass",
            "left ventricle mass",
            "heart mass",
            "cell mass",
        ),  # how much there is
        *("left ventricle", "right_ventricle", "nuclei", "pelvis"),  # of the heart or brain, an atom or cell, bones?
        *(
            "thrombus",
            "vascular graft",
            "atrial septal defect",
            "pulmonary arteriovenous fistula",
        ),  # of no healthy body
        *("l'insula", "l\u2019hippocampus"),  # an article
        *("liver \u0431\u0435\u0437", "liver\u809d", "\u809d\u81d3", "nai\u0308ve kidney"),  # letters of other scripts
    ],
)
def test_what_is_not_certain_has_no_code(name: str) -> None:
    assert coding_of(name) is None


def test_a_dataset_of_two_organs_tells_nothing_of_where_a_tumour_is() -> None:
    assert in_words(coding_of("tumour", "Liver and pancreas")) == "49755003 108369006 - - -"
    assert coding_of("anterior", "Hippocampus and prostate") is None


@pytest.mark.parametrize(
    "dataset",
    [
        *("Liver_Spleen", "Liver_Ovary", "BreastLungTumors", "HeadNeck_Brain", "bacterial colony", "NoBrainer"),
        *("KidneySpinalCord", "colonial", "Excellent", "Miscellaneous"),
    ],
)
def test_a_dataset_of_more_than_an_organ_or_of_none_says_no_region(dataset: str) -> None:
    assert in_words(coding_of("lesion", dataset)) == "49755003 52988006 - - -"
    assert coding_of("nucleus", dataset) is None


@pytest.mark.parametrize(
    ("dataset", "region"),
    [
        *(("LiverLesions", "10200004"), ("LiTS17", "10200004"), ("KiTS", "64033007"), ("Kidneys2", "64033007")),
        *(("BraTS2021", "12738006"), ("HepaticVessel", "10200004"), ("MSD Task06_Lung", "39607008")),
    ],
)
def test_words_of_a_dataset_are_told_apart(dataset: str, region: str) -> None:
    assert in_words(coding_of("cyst", dataset)) == f"49755003 367643001 - {region} -"


def test_ventricles_and_nuclei_are_known_where_they_can_be_but_one_thing() -> None:
    for dataset in ("Task02_Heart", "CardiacMR", "ACDC"):
        assert in_words(coding_of("left ventricle", dataset)) == "91723000 87878005 - - -"
        assert in_words(coding_of("Right-Ventricle", dataset)) == "91723000 53085002 - - -"
    assert coding_of("left ventricle", "Brain structures") is None
    assert in_words(coding_of("nuclei", "CellNuclei")) == "91723000 84640000 - - -"
    assert coding_of("nuclei", "brain") is None


def listed_codes() -> set[Code]:
    listed = {*terminology._STRUCTURES.values(), *terminology._LESIONS.values(), *terminology._SIDES.values()}
    for coding in (coding for coding in terminology._WITHIN.values() if coding):
        listed |= {code for code in (coding.type, coding.category, coding.modifier, coding.region) if code}
    return listed | {terminology.ANATOMICAL_STRUCTURE, terminology.ABNORMAL_STRUCTURE, terminology.TISSUE}


def test_every_listed_code_is_dicoms_with_its_meaning() -> None:
    """Categories 7150; lesions 7159; anatomy 7192; prostate 6300; cells 8135; sides 244 and places 2."""
    groups = (codes.cid7150, codes.cid7159, codes.cid7192, codes.cid6300, codes.cid8135, codes.cid244, codes.cid2)
    known = {(c.scheme_designator, c.value, c.meaning) for group in groups for c in group.concepts.values()}
    assert {(code.scheme, code.value, code.meaning) for code in listed_codes()} - known == set()
    assert "123037004" not in {code.value for code in listed_codes()}  # body structure: no category of DICOM's


def test_other_names_lead_to_concepts() -> None:
    lost = [name for name, other in terminology._SYNONYMS.items() if coding_of(name) is None or name == other]
    assert lost == []
    sided = [name for name in terminology._PAIRED if (c := coding_of(f"left {name}")) is None or c.modifier is None]
    assert sided == []


@pytest.mark.parametrize("wrong", ["", "x" * 17, "a\\b", "a b", "a\n"])
def test_codes_are_what_dicom_can_hold(wrong: str) -> None:
    for field in ("value", "scheme"):
        with pytest.raises(ValidationError, match=field):
            Code(**{"value": "10200004", "meaning": "Liver", field: wrong})
    triplets = [("SCT", "91723000", "Anatomical Structure"), ("SCT", wrong, "Liver"), *[("", "", "")] * 3]
    assert Coding.from_triplets(triplets) is None or wrong == "a\n"  # around it files may have space


@pytest.mark.parametrize("wrong", ["", "x" * 65, "a\\b", "a\nb", " ", "a "])
def test_meanings_are_what_dicom_can_hold(wrong: str) -> None:
    with pytest.raises(ValidationError, match="meaning"):
        Code(value="10200004", meaning=wrong)
    assert Code(value="1" * 16, meaning="x" * 64).scheme == "SCT"


@pytest.mark.parametrize(
    "kind",
    [("SCT", "85756007", "Tissue"), ("SRT", "T-D0050", "Tissue"), ("99MEDSEG", "ABCDEF0123456789", "blob")],
)
def test_what_stands_for_nothing_is_no_coding(kind: tuple[str, str, str]) -> None:
    category = kind if kind[2] == "Tissue" else ("99MEDSEG", "UNCODED", "Uncoded")
    assert Coding.from_triplets([category, kind, *[("", "", "")] * 3]) is None


def test_colours_are_told_apart() -> None:
    colours = [colour_of(index) for index in range(254)]
    assert colours[:2] == [(230, 159, 0), (86, 180, 233)]  # Okabe and Ito's orange and sky blue
    assert len(set(colours)) == 254
    assert all(0 <= part <= 255 for colour in colours for part in colour)
    nearest = min(sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in combinations(colours[:24], 2))
    assert nearest >= 30


def test_a_colour_of_fractions_is_the_one_that_was_written() -> None:
    assert fractions_of((255, 0, 51)) == ("1", "0", "0.2")
    assert all(colour_of_fractions(fractions_of((n, 255 - n, 7))) == (n, 255 - n, 7) for n in range(256))
    for parts in (["1", "0"], ["1", "0", "red"], ["1", "0", "1.1"], ["nan", "0", "0"]):
        assert colour_of_fractions(parts) is None
