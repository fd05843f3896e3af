"""Terminology: what labels stand for in the coding schemes of DICOM, mostly SNOMED CT, and their colours."""

from __future__ import annotations

from medseg.records import Record


class Code(Record):
    """A concept of a coding scheme (DICOM PS3.3, 8.8).

    Attributes:
        value: of the concept, as ``10200004``.
        meaning: in words, as "Liver".
        scheme: designator, as ``SCT`` (SNOMED CT) or ``99MEDSEG`` (private: no code of any standard).
    """

    value: str
    meaning: str
    scheme: str = "SCT"


ANATOMICAL_STRUCTURE = Code(value="91723000", meaning="Anatomical Structure")


class Coding(Record):
    """What a label stands for: the codes of a segment (DICOM PS3.3, C.8.20.2).

    Attributes:
        type: property type, as liver.
        category: property category.
        modifier: of the type, as left, or anterior; None where there is none.
        region: anatomic region, of what lies within another organ, as a tumour in the liver; None where there is none.
    """

    type: Code
    category: Code = ANATOMICAL_STRUCTURE
    modifier: Code | None = None
    region: Code | None = None


Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255 each."""


def coding_of(name: str, dataset: str = "") -> Coding | None:
    """The coding of a label by its name; None where there is no certain one.

    Args:
        name: of the label, as "liver", "left_kidney", "kidney (right)".
        dataset: name of the dataset or model, as "Task04_Hippocampus", where labels mean something within it alone.
    """
    raise NotImplementedError
