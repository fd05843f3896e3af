"""Names, codes and colours of labels as files of other programs: 3D Slicer's colour table, ITK-SNAP's, and BIDS's.

Each is read back too, and so are FreeSurfer's colour table, the older one of 3D Slicer, and the labels of a
``dataset.json``. Their formats: Slicer's developer guide on colours, ITK-SNAP's label description file, and the BIDS
specification on discrete segmentations.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medseg.errors import DatasetError, InputError, UnreadableFile
from medseg.records import read_json
from medseg.terminology import Code, Coding, Colour
from medseg.volume import Labels

SLICER, ITK_SNAP, BIDS = "labels.csv", "labels.txt", "dseg.tsv"
"""Names of the files that ``tables`` makes."""

_MAX_BYTES = 1 << 22
_PARTS = ("Category", "Type", "TypeModifier", "Region", "RegionModifier")
_CODE = ("CodingScheme", "CodeValue", "CodeMeaning")
_UNCODED = (("", "", ""),) * len(_PARTS)
_CODE_COLUMNS = tuple(f"{part}_{field}" for part in _PARTS for field in _CODE)
_ITK_SNAP_LINE = re.compile(r'(-?\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+[\d.]+\s+\d\s+\d\s+"(.*)"')
_LOOKUP_LINE = re.compile(r"(-?\d+)\s+(\S+)\s+(\d+)\s+(\d+)\s+(\d+)(?:\s+\d+)?")
_HEX = re.compile(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")


@dataclass(frozen=True)
class _Row:
    """One label of a table that is read."""

    value: int
    name: str
    colour: Colour | None = None
    coding: Coding | None = None


def tables(labels: Labels) -> dict[str, str]:
    """The labels as files to lie beside masks: ``labels.csv`` (Slicer), ``labels.txt`` (ITK-SNAP), ``dseg.tsv`` (BIDS).

    Of names, what a format cannot hold is replaced: line ends and tabs by spaces and, but for BIDS, quotation marks by
    apostrophes; names that are equal then are numbered.

    Labels without a colour of their own have that of their place, those without codes those of their name
    (``Labels.colour``, ``Labels.coding``).

    Args:
        labels: what the masks hold; ``ignore`` and regions are left out.

    Returns:
        Name of each file and its text (UTF-8).
    """
    return {SLICER: _slicer(labels), ITK_SNAP: _itk_snap(labels), BIDS: _bids(labels)}


def read_labels_file(path: Path) -> Labels:
    """Read the labels of a table: ``.csv`` (Slicer), ``.tsv`` (BIDS), ``.json`` (a dataset's), or text with one a line.

    Text is ITK-SNAP's, or FreeSurfer's and Slicer's older one (number, name without spaces, red, green, blue, alpha).
    The value 0 is background and passed over.

    Raises:
        UnreadableFile: it is missing, no UTF-8, larger than a table can be, or holds something else.
        InputError: two labels of one name or value; none at all.
        DatasetError: a ``dataset.json`` whose labels cannot be used.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        return labels_of_dataset(read_json(path), path)
    text = _text(path)
    rows = {".csv": _slicer_rows, ".tsv": _bids_rows}.get(suffix, _lines)(text, path)
    return _labels(rows, path)


def labels_of_dataset(body: Mapping[str, Any], listing: Path) -> Labels:
    """The labels of a ``dataset.json``, the Decathlon's {"1": "liver"} or nnU-Net's {"liver": 1}.

    Optional beside them: ``"codings": {"liver": {"type": {"value": "10200004", "meaning": "Liver"}}}``, with the fields
    of ``terminology.Coding``, and ``"colours": {"liver": [221, 130, 101]}``.

    Raises:
        DatasetError: no labels, values that are no integers, one name or value for two, codings or colours of no label.
    """
    named = body.get("labels")
    if not isinstance(named, dict) or not named:
        raise DatasetError(listing, "has no labels", 'labels as {"0": "background", "1": "liver"}')
    by_name = _by_value(named, listing) if all(isinstance(v, str) for v in named.values()) else named
    values: dict[str, int] = {}
    regions: dict[str, tuple[int, ...]] = {}
    ignore = None
    for name, value in by_name.items():
        members = _integers(value, name, listing)
        if len(members) > 1:
            regions[name] = members
        elif name.casefold() == "ignore":
            ignore = members[0]
        elif members[0] != 0:
            values[name] = members[0]
    for member in sorted({m for members in regions.values() for m in members} - set(values.values())):
        values[f"label_{member}"] = member
    optional = {field: body[field] for field in ("codings", "colours") if field in body}
    whole = {"values": values, "regions": regions, "ignore": ignore, **optional}
    return Labels.checked(whole, f"{listing}, labels", DatasetError)


def _by_value(named: Mapping[str, str], listing: Path) -> dict[str, int]:
    """The Decathlon's {"1": "liver"} turned round."""
    repeated = [name for name, count in Counter(named.values()).items() if count > 1]
    if repeated:
        raise DatasetError(listing, f"label names {repeated} stand for several values", "one name a value")
    return {name: _integers(value, name, listing)[0] for value, name in named.items()}


def _integers(value: Any, name: str, listing: Path) -> tuple[int, ...]:
    members = value if isinstance(value, list) else [value]
    try:
        if members and not any(isinstance(m, bool) or (isinstance(m, float) and m % 1) for m in members):
            return tuple(int(m) for m in members)
    except (TypeError, ValueError):
        pass
    raise DatasetError(listing, f"label {name!r} has the value {value!r}", "an integer, or a list of them for a region")


# ---- writing ---------------------------------------------------------------------------------------------------------


def _slicer(labels: Labels) -> str:
    table = [["LabelValue", "Name", "Color_R", "Color_G", "Color_B", "Color_A", *_CODE_COLUMNS]]
    for name, kept in _held(labels, _unquoted):
        coding = labels.coding(name)
        codes = [_unquoted(field) for triplet in (coding.triplets if coding else _UNCODED) for field in triplet]
        table.append([str(labels.values[name]), kept, *map(str, labels.colour(name)), "255", *codes])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()


def _itk_snap(labels: Labels) -> str:
    rule = "#" * 48
    head = [
        rule,
        "# ITK-SnAP Label Description File",
        "# File format:",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        rule,
    ]
    lines = ['    0     0    0    0        0  0  0    "Clear Label"']
    for name, kept in _held(labels, _unquoted):
        red, green, blue = labels.colour(name)
        lines.append(f'{labels.values[name]:5} {red:5} {green:4} {blue:4}        1  1  1    "{kept}"')
    return "\n".join([*head, *lines]) + "\n"


def _bids(labels: Labels) -> str:
    named = _held(labels, _one_line)
    lines = [f"{labels.values[name]}\t{kept}\t#{bytes(labels.colour(name)).hex()}" for name, kept in named]
    return "\n".join(["index\tname\tcolor", *lines]) + "\n"


def _held(labels: Labels, hold: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Each name and what a format holds of it: with a number where that is another's too, so that all are told."""
    taken = {name for name in labels.names if hold(name) == name}
    for name in labels.names:
        first = hold(name) or f"label_{labels.values[name]}"
        kept = first
        for number in itertools.count(2):
            if kept == name or kept not in taken:
                break
            kept = f"{first} {number}"
        taken.add(kept)
        yield name, kept


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _unquoted(text: str) -> str:
    """Without quotation marks, which neither Slicer's nor ITK-SNAP's reader takes within a value."""
    return _one_line(text).replace('"', "'")


# ---- reading ---------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UnreadableFile(
                path, f"has {path.stat().st_size:,} bytes", f"a table of labels, {_MAX_BYTES:,} at most"
            )
        return path.read_text(encoding="utf-8-sig")
    except OSError as failure:
        raise UnreadableFile(path, f"cannot be read: {failure.strerror}", "a table of labels") from None
    except UnicodeDecodeError:
        raise UnreadableFile(path, "is no UTF-8 text", "a table of labels") from None


def _slicer_rows(text: str, path: Path) -> list[_Row]:
    found = []
    for row in _records(text, path, ",", "LabelValue"):
        value = _integer(row["LabelValue"], path)
        codes = [row.get(column) or "" for column in _CODE_COLUMNS]
        triplets = list(zip(codes[::3], codes[1::3], codes[2::3], strict=True))
        if wrong := [triplet for triplet in triplets if any(triplet) and Code.of(triplet) is None]:
            expected = "scheme and value of 1 to 16 characters without spaces, and a meaning"
            raise InputError(path, f"label {value} has a code that is none: {' '.join(wrong[0])!r}", expected)
        coding = Coding.from_triplets(triplets)
        colour = [row.get(f"Color_{part}") or "" for part in "RGB"]
        meaning = " ".join(code.meaning for code in (coding.modifier, coding.type) if code) if coding else ""
        name = row.get("Name") or meaning or f"label_{value}"
        found.append(_Row(value, name, _colour(colour, path) if all(colour) else None, coding))
    return found


def _bids_rows(text: str, path: Path) -> list[_Row]:
    found = []
    for row in _records(text, path, "\t", "index", "name"):
        parts = _HEX.fullmatch(row.get("color") or "")
        colour = _colour([str(int(part, 16)) for part in parts.groups()], path) if parts else None
        value = _integer(row["index"], path)
        found.append(_Row(value, (row["name"] or "").strip() or f"label_{value}", colour))
    return found


def _records(text: str, path: Path, delimiter: str, *columns: str) -> list[dict[str, str | None]]:
    """The rows of a table by the names of its columns.

    Raises:
        UnreadableFile: it lacks one of ``columns``, or is no such table.
    """
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL  # BIDS knows no quotes
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    try:
        rows = list(reader)
    except csv.Error:
        raise UnreadableFile(path, "is no table", f"columns {', '.join(columns)}") from None
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise UnreadableFile(path, f"has no column {', '.join(missing)}", f"columns {', '.join(columns)}")
    return rows


def _lines(text: str, path: Path) -> list[_Row]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if match := _ITK_SNAP_LINE.fullmatch(line):
            value, *colour, name = match.groups()
        elif match := _LOOKUP_LINE.fullmatch(line):
            value, name, *colour = match.groups()
        else:
            raise UnreadableFile(path, f"line {number} is no label", 'as 1 255 0 0 1 1 1 "liver", or 1 liver 255 0 0 0')
        found.append(_Row(_integer(value, path), name.strip() or f"label_{value}", _colour(colour, path)))
    return found


def _integer(text: str | None, path: Path) -> int:
    if not re.fullmatch(r"\s*-?\d{1,10}\s*", text or ""):
        raise UnreadableFile(path, "a label's number is no integer", "integers")
    return int(text or "")


def _colour(parts: Iterable[str], path: Path) -> Colour:
    red, green, blue = (_integer(part, path) for part in parts)
    return red, green, blue


def _labels(rows: Iterable[_Row], path: Path) -> Labels:
    kept = [row for row in rows if row.value != 0]
    names = Counter(row.name for row in kept)
    if len(names) < len(kept):
        raise InputError(path, f"several labels are called {names.most_common(1)[0][0]!r}", "one name a label")
    body = {
        "values": {row.name: row.value for row in kept},
        "codings": {row.name: row.coding for row in kept if row.coding},
        "colours": {row.name: row.colour for row in kept if row.colour},
    }
    return Labels.checked(body, path)
