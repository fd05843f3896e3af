"""Names and colours of labels as the XML that Caret, and Connectome Workbench after it, keep in NIfTI files.

It is the label table of a ``CaretExtension``, extension code 30 of NIfTI (``NIFTI_ECODE_CARET``). TotalSegmentator
writes the same XML under the code 0 and reads it under any, so that one table serves both. ITK-SNAP and 3D Slicer read
no names from NIfTI: for them are the files of ``label_tables``.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from medseg.errors import InputError
from medseg.terminology import Colour, colour_of_fractions, fractions_of
from medseg.volume import Labels

CODE = 30
MAX_BYTES = 100_000
"""Programs built on the C library of NIfTI take a longer extension for damage (``LNI_MAX_NIA_EXT_LEN``)."""

_CHANNELS = ("Red", "Green", "Blue")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_xml(labels: Labels) -> bytes:
    """The labels as XML in UTF-8; ``ignore`` and regions are left out. Characters that XML has not become spaces."""
    rows = [
        f'<Label Key="{labels.values[name]}" {_channels(labels.colour(name))} Alpha="1">'
        f"{escape(_NOT_XML.sub(' ', name))}</Label>"
        for name in labels.names
    ]
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<CaretExtension><VolumeInformation Index="0"><LabelTable>',
        *rows,
        "</LabelTable><StudyMetaDataLinkSet/><VolumeType>Label</VolumeType></VolumeInformation></CaretExtension>",
    ]
    return "\n".join(lines).encode()


def from_xml(content: bytes) -> Labels | None:
    """The labels of the first label table; None where there is none, or none that is sound.

    XML with a document type is passed over, so that no entity is ever expanded.
    """
    try:
        text = content.strip(b"\0").decode()
        root = ElementTree.fromstring(text) if "<LabelTable" in text and "<!DOCTYPE" not in text else None  # noqa: S314
    except (UnicodeDecodeError, ElementTree.ParseError):
        return None
    rows = [] if root is None else [(_key(row), row) for row in root.findall(".//LabelTable[1]/Label")]
    named = {(row.text or "").strip() or f"label_{key}": (key, _colour(row)) for key, row in rows if key}
    if len(named) < sum(key != 0 for key, _ in rows):
        return None  # a key that is no number, or a name of two
    values = {name: key for name, (key, _) in named.items()}
    colours = {name: colour for name, (_, colour) in named.items() if colour}
    try:
        return Labels.checked({"values": values, "colours": colours}, "label table")
    except InputError:
        return None


def _channels(colour: Colour) -> str:
    return " ".join(f'{name}="{part}"' for name, part in zip(_CHANNELS, fractions_of(colour), strict=True))


def _key(row: ElementTree.Element) -> int | None:
    text = row.get("Key", "")
    return int(text) if re.fullmatch(r"-?\d{1,10}", text) else None


def _colour(row: ElementTree.Element) -> Colour | None:
    return colour_of_fractions([row.get(name, "") for name in _CHANNELS])
