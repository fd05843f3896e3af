"""Terminology: what labels stand for in the coding schemes of DICOM, mostly SNOMED CT, and their colours.

Only what is certain is coded: a name that could mean two things has no code. Codes and meanings are those of DICOM
PS3.16 (context groups 7150, 7159, 7191, 7192, 6300, 8135, 244). The common ones stand here; other anatomy is found by
its meaning among the two groups of what a segmentation may show, tissues and anatomical structures.
"""

from __future__ import annotations

import colorsys
import re
import unicodedata
from collections.abc import Sequence
from functools import cache

from pydantic import Field

from medseg.records import Record

Triplet = tuple[str, str, str]
"""Scheme, value and meaning of a code; three empty words where there is none."""

_SHORT = r"^[^\\\s\x00-\x1f\x7f]{1,16}$"
_LONG = r"^[^\\\x00-\x1f\x7f]{0,63}[^\\\s\x00-\x1f\x7f]$"


class Code(Record):
    """A concept of a coding scheme (DICOM PS3.3, 8.8), as the values of DICOM can hold it (PS3.5, 6.2).

    Attributes:
        value: of the concept, as ``10200004``.
        meaning: in words, as "Liver".
        scheme: designator, as ``SCT`` (SNOMED CT) or ``99MEDSEG`` (private: no code of any standard).
    """

    value: str = Field(pattern=_SHORT)
    meaning: str = Field(pattern=_LONG)
    scheme: str = Field(default="SCT", pattern=_SHORT)

    @classmethod
    def of(cls, triplet: Triplet) -> Code | None:
        """The code that a file holds; None where it is not whole, or none that DICOM can hold."""
        scheme, value, meaning = (part.strip() for part in triplet)
        meaning = "".join(c for c in meaning if c.isprintable() and c != "\\").strip()[:64].strip()
        fits = re.fullmatch(_SHORT, scheme) and re.fullmatch(_SHORT, value) and meaning
        return cls(scheme=scheme, value=value, meaning=meaning) if fits else None


PRIVATE_SCHEME = "99MEDSEG"
"""Designator of what has no code of any standard; 99 begins private ones (PS3.3, 8.2)."""

ANATOMICAL_STRUCTURE = Code(value="91723000", meaning="Anatomical Structure")
ABNORMAL_STRUCTURE = Code(value="49755003", meaning="Morphologically Abnormal Structure")
TISSUE = Code(value="85756007", meaning="Tissue")
_TISSUES = (TISSUE.value, "T-D0050")


class Coding(Record):
    """What a label stands for: the codes of a segment (DICOM PS3.3, C.8.20.2).

    Attributes:
        type: property type, as liver.
        category: property category.
        modifier: of the type, as left, or anterior; None where there is none.
        region: anatomic region, of what lies within another organ, as a tumour in the liver; None where there is none.
        region_modifier: of the region, as left, of a tumour in the left kidney; None where there is none.
    """

    type: Code
    category: Code = ANATOMICAL_STRUCTURE
    modifier: Code | None = None
    region: Code | None = None
    region_modifier: Code | None = None

    @property
    def triplets(self) -> tuple[Triplet, ...]:
        """Category, type, its modifier, region and its modifier; the order and form of 3D Slicer's files."""
        parts = (self.category, self.type, self.modifier, self.region, self.region_modifier)
        return tuple(("", "", "") if part is None else (part.scheme, part.value, part.meaning) for part in parts)

    @classmethod
    def from_triplets(cls, triplets: Sequence[Triplet]) -> Coding | None:
        """What ``triplets`` gives, as a coding; None where it says nothing.

        That is where it has no category or type, a type of ``PRIVATE_SCHEME``, or "tissue" for both, which 3D Slicer
        writes where nothing was chosen (in SNOMED CT, or in the SRT codes of its older versions).

        A category of 123037004, which is SNOMED CT's body structure and stood for anatomical structure in older
        programs, becomes what DICOM has for that (PS3.16, 7150).
        """
        category, kind, modifier, region, region_modifier = map(Code.of, triplets)
        if category is None or kind is None or kind.scheme == PRIVATE_SCHEME:
            return None
        if category.value == kind.value and kind.value in _TISSUES:
            return None
        if (category.scheme, category.value) == ("SCT", "123037004"):
            category = ANATOMICAL_STRUCTURE
        return cls(type=kind, category=category, modifier=modifier, region=region, region_modifier=region_modifier)


Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255 each."""


def coding_of(name: str, dataset: str = "") -> Coding | None:
    """The coding of a label by its name; None where there is no certain one.

    Args:
        name: of the label, as "liver", "left_kidney", "kidney (right)".
        dataset: name of the dataset or model, as "Task04_Hippocampus", where labels mean something within it alone.
    """
    if any(unicodedata.category(c)[0] in "LM" and not c.isascii() for c in name):
        return None  # what the other letters say is not known
    words, organ = _plain(name), _organ_of(dataset)
    if (organ, words) in _WITHIN:
        return _WITHIN[organ, words]
    return _lesion(words, organ) or _structure(words)


def is_lesion(name: str, dataset: str = "") -> bool:
    """Whether a label is a lesion by its name, as "liver tumour"; arguments as ``coding_of``."""
    words = _plain(name)
    if not words.endswith(tuple(_LESIONS)) and words not in {within for _, within in _WITHIN}:
        return False  # without the context groups, which take a while to load
    coding = coding_of(name, dataset)
    return coding is not None and coding.category == ABNORMAL_STRUCTURE


def fractions_of(colour: Colour) -> tuple[str, str, str]:
    """A colour as files of Caret and 3D Slicer have it: numbers of 0 to 1, as text."""
    red, green, blue = (f"{part / 255:.6g}" for part in colour)
    return red, green, blue


def colour_of_fractions(parts: Sequence[str]) -> Colour | None:
    """The colour that ``fractions_of`` gives so; None where it is none."""
    try:
        red, green, blue = (float(part) for part in parts)
    except ValueError:
        return None
    if not all(0 <= part <= 1 for part in (red, green, blue)):
        return None
    return round(255 * red), round(255 * green), round(255 * blue)


def colour_of(index: int) -> Colour:
    """The colour of the label of that place (0 is the first) among the labels; no two of the first 254 are equal.

    The first seven are those of Okabe and Ito (Color Universal Design, 2008) but black, which eyes of all kinds tell
    apart. The others go round the circle of hues by the golden ratio, in three strengths.
    """
    if index < len(_COLOURS):
        return _COLOURS[index]
    further = index - len(_COLOURS)
    saturation, value = ((0.85, 0.95), (0.5, 0.85), (0.9, 0.6))[further % 3]
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * further % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


_COLOURS: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
)

_SIDES = {
    "left": Code(value="7771000", meaning="Left"),
    "right": Code(value="24028007", meaning="Right"),
}
_SHORT_SIDES = {"l": "left", "lt": "left", "r": "right", "rt": "right"}

_STRUCTURES: dict[str, Code] = {
    meaning.lower(): Code(value=value, meaning=meaning)
    for meaning, value in {
        "Adrenal gland": "23451007",
        "Aorta": "15825003",
        "Bladder": "89837001",
        "Blood Vessel": "59820001",
        "Brain": "12738006",
        "Cell": "4421005",
        "Colon": "71854001",
        "Descending aorta": "281130003",  # the group has 32672002, its thoracic part, under the same meaning
        "Duodenum": "38848004",
        "Esophagus": "32849002",
        "Femur": "71341001",
        "Gallbladder": "28231008",
        "Heart": "80891009",
        "Hepatic vein": "8993003",
        "Hippocampus": "5366008",
        "Inferior vena cava": "64131007",
        "Kidney": "64033007",
        "Left atrium": "82471001",
        "Left ventricle": "87878005",
        "Liver": "10200004",
        "Lung": "39607008",
        "Nucleus": "84640000",
        "Pancreas": "15776009",
        "Peripheral zone of the prostate": "279706003",
        "Portal vein": "32764006",
        "Prostate": "41216001",
        "Pulmonary vein": "122972007",  # the group has 430757002 too
        "Rectum": "34402009",
        "Right atrium": "73829009",
        "Right ventricle": "53085002",
        "Spinal cord": "2748008",
        "Spleen": "78961009",
        "Stomach": "69695003",
        "Thyroid": "69748006",
        "Trachea": "44567001",
        "Transition zone of the prostate": "399384005",
        "Urethra": "13648007",
        "Uterus": "35039007",
    }.items()
}

_SYNONYMS = {
    "adrenal": "adrenal gland",
    "airway": "airway structure",
    "brachiocephalic trunk": "innominate artery",
    "brachiocephalic vein": "innominate vein",
    "brainstem": "brain stem",
    "celiac trunk": "truncus coeliacus",
    "cell nuclei": "nucleus",
    "cell nucleus": "nucleus",
    "clavicula": "clavicle",
    "csf": "cerebrospinal fluid",
    "gall bladder": "gallbladder",
    "grey matter": "gray matter",
    "iliac vena": "iliac vein",
    "ivc": "inferior vena cava",
    "left atrial appendage": "left auricular appendage",
    "lung lower lobe": "lower lobe of lung",
    "lung upper lobe": "upper lobe of lung",
    "lower lung lobe": "lower lobe of lung",
    "upper lung lobe": "upper lobe of lung",
    "postcava": "inferior vena cava",
    "prostate peripheral zone": "peripheral zone of the prostate",
    "prostate transition zone": "transition zone of the prostate",
    "right lung middle lobe": "middle lobe of right lung",
    "right middle lung lobe": "middle lobe of right lung",
    "small bowel": "small intestine",
    "svc": "superior vena cava",
    "thyroid gland": "thyroid",
    "urinary bladder": "bladder",
    "vessel": "blood vessel",
}

_UNCERTAIN = frozenset(
    (
        *("artery", "atrium", "back", "calyx", "head", "hiatus", "hip", "intracranial", "joint", "left ventricle"),
        *("media", "neck", "nucleus", "organ", "parasternal", "pelvis", "phantom", "right ventricle", "stripe"),
        *("subcostal", "submental", "subxiphoid", "tissue", "vein", "ventricle"),
    )
)
"""Meanings that a label can have in another sense, as the head of the pancreas or the ventricle of a brain."""

_NO_STRUCTURE = re.compile(r"\b(baffle|collateral|conduit|defect|fistula|graft|scar|shunt|thrombus)\b")
"""Of what is among the anatomical structures but is none of a healthy body: its category is not certain."""

_PAIRED = frozenset(
    (
        *("adrenal gland", "kidney", "ureter", "lung", "lower lobe of lung", "upper lobe of lung", "breast", "ovary"),
        *("testis", "seminal vesicle", "fallopian tube", "parotid gland", "submandibular gland", "eye", "eyeball"),
        *("femur", "fibula", "humerus", "scapula", "clavicle", "patella", "ilium", "rib", "mandible", "maxilla"),
        *("thalamus", "putamen", "amygdala", "hippocampus", "caudate nucleus", "globus pallidus", "nucleus accumbens"),
        *("lateral ventricle", "cerebral hemisphere", "cerebral cortex", "cerebral white matter", "insula"),
        *("frontal lobe", "temporal lobe", "parietal lobe", "occipital lobe", "cerebellar white matter"),
        *("renal artery", "renal vein", "iliac artery", "iliac vein", "common iliac artery", "common iliac vein"),
        *("external iliac artery", "internal iliac artery", "subclavian artery", "subclavian vein", "innominate vein"),
        *("common carotid artery", "internal carotid artery", "external carotid artery", "vertebral artery"),
        *("femoral vein", "internal jugular vein", "middle cerebral artery", "anterior cerebral artery"),
        "posterior cerebral artery",
    )
)
"""Structures that left and right are told of."""

_NEOPLASM = Code(value="108369006", meaning="Neoplasm")
_PRIMARY = Code(value="372087000", meaning="Neoplasm, Primary")
_SECONDARY = Code(value="14799000", meaning="Neoplasm, Secondary")
_EDEMA = Code(value="79654002", meaning="Edema")
_NECROSIS = Code(value="6574001", meaning="Necrosis")
_ENHANCING = Code(value="C113842", meaning="Enhancing Lesion", scheme="NCIt")
_NON_ENHANCING = Code(value="C81175", meaning="Non-Enhancing Lesion", scheme="NCIt")
_LESIONS = {
    "abscess": Code(value="44132006", meaning="Abscess"),
    "cancer": _NEOPLASM,
    "cancer primary": _PRIMARY,
    "carcinoma": _NEOPLASM,
    "cyst": Code(value="367643001", meaning="Cyst"),
    "edema": _EDEMA,
    "enhancing lesion": _ENHANCING,
    "enhancing tumor": _ENHANCING,
    "hemorrhage": Code(value="50960005", meaning="Hemorrhage"),
    "lesion": Code(value="52988006", meaning="Lesion"),
    "mass": Code(value="4147007", meaning="Mass"),
    "metastasis": _SECONDARY,
    "necrosis": _NECROSIS,
    "neoplasm": _NEOPLASM,
    "nodule": Code(value="27925004", meaning="Nodule"),
    "non enhancing lesion": _NON_ENHANCING,
    "non enhancing tumor": _NON_ENHANCING,
    "non enhancing tumor core": _NON_ENHANCING,
    "peritumoral edema": _EDEMA,
    "primary tumor": _PRIMARY,
    "tumor": _NEOPLASM,
}
_ADJECTIVES = {
    "cerebral": "brain",
    "hepatic": "liver",
    "pancreatic": "pancreas",
    "prostatic": "prostate",
    "pulmonary": "lung",
    "renal": "kidney",
    "splenic": "spleen",
}

_WITH_MASSES = frozenset(
    ("adrenal gland", "brain", "breast", "kidney", "liver", "lung", "ovary", "pancreas", "prostate")
)
"""Organs whose mass is a lesion; that of muscle or of the heart may be how much there is of it."""

_DATASETS = {
    word: organ
    for organ, words in {
        "hippocampus": "hippocampus hippocampi hippocampal",
        "prostate": "prostate prostatic",
        "liver": "liver hepatic lits",
        "lung": "lung pulmonary",
        "pancreas": "pancreas pancreatic",
        "colon": "colon",
        "kidney": "kidney renal kits",
        "brain": "brain cerebral glioma glioblastoma brats",
        "heart": "heart cardiac acdc",
        "microscopy": "nucleus nuclei cell cellular microscopy",
    }.items()
    for word in words.split()
}
"""What a word of a dataset's name says that its labels are about."""
_OF_MANY_ORGANS = frozenset(("blood vessel", "lesion"))


def _abnormal(kind: Code, region: Code | None = None, region_modifier: Code | None = None) -> Coding:
    return Coding(type=kind, category=ABNORMAL_STRUCTURE, region=region, region_modifier=region_modifier)


_LIVER_VESSEL = Coding(type=_STRUCTURES["blood vessel"], region=_STRUCTURES["liver"])
_WITHIN: dict[tuple[str | None, str], Coding] = {
    ("hippocampus", "anterior"): Coding(
        type=_STRUCTURES["hippocampus"], modifier=Code(value="255549009", meaning="Anterior")
    ),
    ("hippocampus", "posterior"): Coding(
        type=_STRUCTURES["hippocampus"], modifier=Code(value="255551008", meaning="Posterior")
    ),
    ("prostate", "pz"): Coding(type=_STRUCTURES["peripheral zone of the prostate"]),
    ("prostate", "peripheral zone"): Coding(type=_STRUCTURES["peripheral zone of the prostate"]),
    ("prostate", "tz"): Coding(type=_STRUCTURES["transition zone of the prostate"]),
    ("prostate", "transition zone"): Coding(type=_STRUCTURES["transition zone of the prostate"]),
    ("liver", "vessel"): _LIVER_VESSEL,
    ("liver", "hepatic vessel"): _LIVER_VESSEL,
    ("brain", "ed"): _abnormal(_EDEMA, _STRUCTURES["brain"]),
    ("brain", "et"): _abnormal(_ENHANCING, _STRUCTURES["brain"]),
    ("brain", "ncr"): _abnormal(_NECROSIS, _STRUCTURES["brain"]),
    ("heart", "left ventricle"): Coding(type=_STRUCTURES["left ventricle"]),
    ("heart", "right ventricle"): Coding(type=_STRUCTURES["right ventricle"]),
    ("brain", "netc"): _abnormal(_NON_ENHANCING, _STRUCTURES["brain"]),
    ("microscopy", "nucleus"): Coding(type=_STRUCTURES["nucleus"]),
    ("microscopy", "nuclei"): Coding(type=_STRUCTURES["nucleus"]),
}
"""Labels that have a meaning by the dataset that they are of."""


def _plain(name: str) -> str:
    """Words in lower case, in the singular and as DICOM spells them, with one space between."""
    words = re.sub(r"[^a-z0-9]+", " ", re.sub("['`\u2019]", "", name.lower())).split()  # l'insula has no side
    return " ".join(_singular(_SPELT.get(word, word)) for word in words)


_SPELT = {
    "haemorrhage": "hemorrhage",
    "metastases": "metastasis",
    "oedema": "edema",
    "oesophagus": "esophagus",
    "primaries": "primary",
    "tumour": "tumor",
    "tumours": "tumor",
    "vertebrae": "vertebra",
}
_NO_PLURAL = ("us", "is", "ss", "as", "ens")


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(_NO_PLURAL) else word


def _organ_of(dataset: str) -> str | None:
    """The only organ that the name of a dataset is about; None where it names none, several, or another structure."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=\D)(?=\d)|(?<=\d)(?=\D)", " ", dataset)
    written = re.findall("[a-z]+", dataset.lower())  # LiTS and BraTS are a word each
    words = _plain(apart).split()
    named = {_DATASETS[word] for word in (*written, *words) if word in _DATASETS}
    runs = [" ".join(words[n : n + size]) for size in (1, 2, 3) for n in range(len(words) - size + 1)]
    return named.pop() if len(named) == 1 and not any(map(_is_structure, runs)) else None


def _is_structure(words: str) -> bool:
    """Whether words mean a part of the body other than the organs of datasets."""
    words = _SYNONYMS.get(words, words)
    known = words in _STRUCTURES or words in _context_groups()
    return known and words not in _DATASETS and words not in _OF_MANY_ORGANS


def _lesion(words: str, organ: str | None) -> Coding | None:
    """The coding of a lesion, alone or with the organ that it is in before it."""
    side, others = _side(words)
    words = f"{side} {others}" if side else words
    kind = next((kind for kind in sorted(_LESIONS, key=len, reverse=True) if f" {words}".endswith(f" {kind}")), None)
    if kind is None:
        return None
    place = words.removesuffix(kind).strip()
    if not place:
        return _abnormal(_LESIONS[kind], _STRUCTURES.get(organ or ""))
    where = " ".join(_ADJECTIVES.get(word, word) for word in place.split())
    if kind == "mass" and _SYNONYMS.get(_side(where)[1], _side(where)[1]) not in _WITH_MASSES:
        return None
    within = _structure(where)
    return within and _abnormal(_LESIONS[kind], within.type, within.modifier)


def _structure(words: str) -> Coding | None:
    """The coding of a part of the body, with its side where it is one of two."""
    if re.fullmatch(r"vertebra [ctl]\d+", words):
        words = " ".join(reversed(words.split()))
    side, base = _side(words)
    whole = _concept(f"{side} {base}" if side else base)
    if whole is not None or side is None:
        return whole
    part = _concept(base) if _SYNONYMS.get(base, base) in _PAIRED else None
    return part and part.model_copy(update={"modifier": _SIDES[side]})


def _side(words: str) -> tuple[str | None, str]:
    """The side that is named, if one is, and the other words."""
    split = words.split()
    named = [n for n, word in enumerate(split) if word in _SIDES]
    if not named:
        named = [n for n in {0, len(split) - 1} if split and split[n] in _SHORT_SIDES]
    if len(named) != 1 or len(split) == 1:
        return None, words
    word = split.pop(named[0])
    return _SHORT_SIDES.get(word, word), " ".join(split)


def _concept(words: str) -> Coding | None:
    if words in _UNCERTAIN or _NO_STRUCTURE.search(words):
        return None
    words = _SYNONYMS.get(words, words)
    if words in _STRUCTURES:
        return Coding(type=_STRUCTURES[words])
    return _context_groups().get(words)


@cache
def _context_groups() -> dict[str, Coding]:
    """Tissues (7191) and anatomical structures (7192) by their meaning, where it is that of one alone."""
    from pydicom.sr.codedict import codes

    found: dict[str, list[Coding]] = {}
    for group, category in ((codes.cid7191, TISSUE), (codes.cid7192, ANATOMICAL_STRUCTURE)):
        for concept in group.concepts.values():
            code = Code(value=concept.value, meaning=concept.meaning, scheme=concept.scheme_designator)
            found.setdefault(_plain(concept.meaning), []).append(Coding(type=code, category=category))
    return {words: codings[-1] for words, codings in found.items() if len({c.type.value for c in codings}) == 1}
