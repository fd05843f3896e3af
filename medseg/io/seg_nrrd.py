"""Segmentations of 3D Slicer (.seg.nrrd): a mask in NRRD whose header names, colours and codes each segment.

The fields are those of Slicer's developer guide on segmentations; NRRD is as its definition has it (teem,
"Definition of NRRD File Format"). Both are plain: a header of text and, after an empty line, the voxels. They are read
and written here, in pieces and with names in UTF-8, which Slicer writes and libraries for NRRD in Python lose.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import InputError, UnreadableFile
from medseg.geometry import Geometry
from medseg.io import nifti
from medseg.records import replacing
from medseg.terminology import Coding, Colour, colour_of_fractions, fractions_of
from medseg.volume import Labels, Mask, Volume

SUFFIXES: tuple[str, ...] = (".seg.nrrd",)

_MAX_HEADER = 1 << 22
_MAGIC = re.compile(rb"NRRD000[1-5]\s*")
_TYPES = {
    kind: names
    for kind, *names in (
        ("u1", "unsigned char", "uchar", "uint8", "uint8_t"),
        ("i1", "signed char", "int8", "int8_t"),
        ("u2", "unsigned short", "ushort", "unsigned short int", "uint16", "uint16_t"),
        ("i2", "short", "short int", "signed short", "signed short int", "int16", "int16_t"),
        ("u4", "unsigned int", "uint", "uint32", "uint32_t"),
        ("i4", "int", "signed int", "int32", "int32_t"),
    )
}
_SPACES = {
    name: np.array([*signs, 1.0])
    for signs, names in (
        ((-1.0, -1.0, 1.0), ("left-posterior-superior", "lps")),
        ((1.0, 1.0, 1.0), ("right-anterior-superior", "ras")),
        ((-1.0, 1.0, 1.0), ("left-anterior-superior", "las")),
    )
    for name in names
}
"""What the axes of each space have to be multiplied with to become RAS+."""
_BINARY = "Binary labelmap"
_ONE_VECTOR = r"\(\s*[^(),]+\s*,\s*[^(),]+\s*,\s*[^(),]+\s*\)"
_TERMINOLOGY = ("Segmentation category and type - DICOM master list", "Anatomic codes - DICOM master list")
_SAVE_AGAIN = "save it again with 3D Slicer"


@dataclass(frozen=True)
class _Segment:
    """One segment: where in the file it is, and what it is."""

    name: str
    layer: int
    value: int
    colour: Colour | None
    coding: Coding | None


@dataclass(frozen=True)
class _Header:
    """What the text before the voxels says.

    Attributes:
        fields: of NRRD, by their names in lower case.
        extra: key/value pairs, as ``Segment0_Name``.
        size: in bytes.
    """

    fields: Mapping[str, str]
    extra: Mapping[str, str]
    size: int


def read(path: Path) -> Volume:
    """Read the labels as an image (1, I, J, K); see ``read_mask``."""
    mask = read_mask(path)
    return Volume(mask.array[np.newaxis], mask.geometry, mask.paths, None, mask.warnings)


read_labels = read


def read_mask(path: Path) -> Mask:
    """Read a segmentation with the names, codes and colours of its segments.

    The values are those of the file. Where two segments of several layers have the same, all get 1 to n in their order,
    with a warning. A file without segments is a mask without labels.

    Raises:
        UnreadableFile: damaged, truncated, or no NRRD.
        InputError: voxels that are no integers, that lie in another file, or in a space that cannot be used; segments
            that overlap, or cannot be told apart by name or value.
    """
    header = _read_header(path)
    kept_as = {header.extra.get(f"Segmentation_{name}Representation", _BINARY).strip() for name in ("Source", "Master")}
    if kept_as != {_BINARY}:
        raise InputError(path, "holds no binary labels", "segments of whole voxels", "export them as a binary labelmap")
    kind, sizes, axis = _kind(header, path), _sizes(header, path), _layer_axis(header, path)
    affine = _affine(header, path)
    layers = _layers(_voxels(header, kind, sizes, path), axis)
    geometry = Geometry(layers[0].shape, affine)
    segments = _segments(header, len(layers) > 1, path)
    if not segments:
        if len(layers) > 1:
            raise InputError(path, f"has {len(layers)} layers and no segments", "segments", _SAVE_AGAIN)
        return Mask(layers[0], geometry, None, (path,))
    values, warnings = _values(segments)
    named = list(zip(segments, values, strict=True))
    array = layers[0] if len(layers) == 1 else _united(layers, named, path)
    return Mask(array, geometry, _labels(named, path), (path,), None, warnings)


def write(mask: Mask, path: Path) -> None:
    """Write a mask with the names, codes and colours of its labels, atomically; the same mask gives the same bytes.

    Raises:
        InputError: the mask has no labels, or values that they do not name.
    """
    if mask.labels is None:
        raise InputError(path, "a segmentation needs a name for each label", "a mask with labels")
    kind = np.dtype(np.uint8) if mask.array.dtype == bool else mask.array.dtype.newbyteorder("<")
    text = "\n".join([*_header_lines(mask, kind), *_segment_lines(mask, mask.labels, path)])
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(text.encode() + b"\n\n")
        with gzip.GzipFile("", "wb", 3, file, mtime=0) as stream:
            for part in nifti.pieces(mask.array):
                stream.write(part.astype(kind, copy=False).tobytes(order="F"))


# ---- writing ---------------------------------------------------------------------------------------------------------


def _header_lines(mask: Mask, kind: np.dtype[Any]) -> Iterator[str]:
    if kind.str[1:] not in _TYPES:
        raise InputError("mask", f"holds {kind} voxels", "integers of at most 32 bits")
    affine = _SPACES["lps"][:, np.newaxis] * mask.geometry.affine
    yield from ("NRRD0004", "# Complete NRRD file format specification at:")
    yield "# http://teem.sourceforge.net/nrrd/format.html"
    yield f"type: {_TYPES[kind.str[1:]][0]}"
    yield from ("dimension: 3", "space: left-posterior-superior")
    yield "sizes: " + " ".join(map(str, mask.array.shape))
    yield "space directions: " + " ".join(_vector(column) for column in affine[:3, :3].T)
    yield from ("kinds: domain domain domain", "endian: little", "encoding: gzip")
    yield f"space origin: {_vector(affine[:3, 3])}"


def _vector(values: NDArray[np.float64]) -> str:
    return f"({','.join(repr(float(v)) for v in values)})"  # as many digits as tell the number from all others


def _segment_lines(mask: Mask, labels: Labels, path: Path) -> Iterator[str]:
    yield f"Segmentation_ContainedRepresentationNames:={_BINARY}|"
    yield "Segmentation_ReferenceImageExtentOffset:=0 0 0"
    yield f"Segmentation_SourceRepresentation:={_BINARY}"
    found = ndimage.find_objects(labels.to_indices(mask.array, path), len(labels.names))
    for n, (name, place) in enumerate(zip(labels.names, found, strict=True)):
        colour = " ".join(fractions_of(labels.colour(name)))
        extent = " ".join("0 -1" if axis is None else f"{axis.start} {axis.stop - 1}" for axis in place or [None] * 3)
        fields = {
            "ID": f"Segment_{n + 1}",
            "Name": _escaped(name),
            "NameAutoGenerated": "0",
            "Color": colour,
            "ColorAutoGenerated": "0",
            "LabelValue": str(labels.values[name]),
            "Layer": "0",
            "Extent": extent,
            "Tags": _tags(labels.coding(name)),
        }
        yield from (f"Segment{n}_{field}:={value}" for field, value in fields.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", " ")


def _unescaped(text: str) -> str:
    return re.sub(r"\\([\\n])", lambda match: "\n" if match[1] == "n" else "\\", text)


def _tags(coding: Coding | None) -> str:
    if coding is None:
        return "|"
    category, kind, modifier, region, region_modifier = ("^".join(map(_term, t)) for t in coding.triplets)
    first, second = _TERMINOLOGY
    return f"TerminologyEntry:{'~'.join((first, category, kind, modifier, second, region, region_modifier))}|"


def _term(text: str) -> str:
    """Without the characters that part terms."""
    return " ".join(re.sub(r"[|~^\\]", " ", text).split())


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read_header(path: Path) -> _Header:
    with nifti.explained(path), path.open("rb") as file:
        lines, size = _text(file, path)
    fields: dict[str, str] = {}
    extra: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"([^:]+):(=?)\s*(.*)", line, re.DOTALL)
        if match is None:
            raise UnreadableFile(path, "a line of the header is neither field nor pair", "a sound NRRD", _SAVE_AGAIN)
        kept, name = (extra, match[1]) if match[2] == "=" else (fields, match[1].strip().lower())
        if name in kept:
            raise UnreadableFile(path, "a field of the header is there twice", "a sound NRRD", _SAVE_AGAIN)
        kept[name] = match[3].strip()
    lacking = [name for name in ("type", "dimension", "sizes", "encoding", "space directions") if name not in fields]
    if lacking:
        raise UnreadableFile(
            path, f"the header has no {', '.join(lacking)}", "a segmentation of 3D Slicer", _SAVE_AGAIN
        )
    if "data file" in fields or "datafile" in fields:
        raise InputError(path, "says that its voxels lie in another file", "voxels behind the header", _SAVE_AGAIN)
    return _Header(fields, extra, size)


def _text(file: BinaryIO, path: Path) -> tuple[list[str], int]:
    """The lines of the header but comments, and its size in bytes up to the voxels."""
    if not _MAGIC.fullmatch(file.readline(64)):
        raise UnreadableFile(path, "is no NRRD file", "the mark NRRD0001 to NRRD0005 in the first line")
    lines: list[str] = []
    while line := file.readline(_MAX_HEADER):
        if file.tell() > _MAX_HEADER:
            break
        if not line.strip(b"\r\n"):
            return lines, file.tell()
        if not line.startswith(b"#"):
            lines.append(line.decode(errors="replace").rstrip("\r\n"))
    raise UnreadableFile(path, "the header does not end", "an empty line before the voxels", _SAVE_AGAIN)


def _kind(header: _Header, path: Path) -> np.dtype[Any]:
    name = header.fields["type"].lower()
    code = next((code for code, names in _TYPES.items() if name in names), None)
    if code is None:
        raise InputError(path, "holds voxels that are no integers of at most 32 bits", "labels", _SAVE_AGAIN)
    endian = header.fields.get("endian", "little" if code[1] == "1" else "").lower()
    if endian not in ("little", "big"):
        raise UnreadableFile(path, "the header does not say the order of bytes", "endian: little", _SAVE_AGAIN)
    return np.dtype(f"{'<' if endian == 'little' else '>'}{code}")


def _sizes(header: _Header, path: Path) -> list[int]:
    texts = header.fields["sizes"].split()
    sizes = [int(text) for text in texts if re.fullmatch(r"\d{1,9}", text)]
    if len(sizes) != len(texts) or header.fields["dimension"] != str(len(sizes)) or min(sizes, default=0) < 1:
        raise UnreadableFile(path, "the header has impossible sizes", "one positive size a dimension", _SAVE_AGAIN)
    if len(sizes) not in (3, 4):
        raise InputError(path, f"has {len(sizes)} dimensions", "3, or 4 with layers", _SAVE_AGAIN)
    return sizes


def _directions(header: _Header) -> list[str]:
    return re.findall(rf"none|{_ONE_VECTOR}", header.fields["space directions"])


def _layer_axis(header: _Header, path: Path) -> int | None:
    """The axis of layers: the one without a direction; None where there are three dimensions."""
    listed = [n for n, text in enumerate(_directions(header)) if text == "none"]
    count = int(header.fields["dimension"])
    if len(_directions(header)) != count or len(listed) != count - 3:
        raise UnreadableFile(path, "three axes need a direction in space", "three vectors", _SAVE_AGAIN)
    return listed[0] if listed else None


def _affine(header: _Header, path: Path) -> NDArray[np.float64]:
    space = header.fields.get("space", "").lower()
    if space not in _SPACES:
        raise InputError(path, "does not say where left and right are", "space: left-posterior-superior", _SAVE_AGAIN)
    origin = header.fields.get("space origin", "")
    vectors = [text for text in _directions(header) if text != "none"]
    if not re.fullmatch(_ONE_VECTOR, origin):
        raise UnreadableFile(path, "the header has no origin", "space origin: (x,y,z)", _SAVE_AGAIN)
    affine = np.eye(4)
    try:
        affine[:3, :3] = np.array([text.strip("()").split(",") for text in vectors], dtype=np.float64).T
        affine[:3, 3] = np.array(origin.strip("()").split(","), dtype=np.float64)
    except ValueError:
        raise UnreadableFile(path, "a direction or the origin is no vector", "three numbers", _SAVE_AGAIN) from None
    affine = _SPACES[space][:, np.newaxis] * affine
    nifti.check_affine(affine, path)
    return affine


def _voxels(header: _Header, kind: np.dtype[Any], sizes: list[int], path: Path) -> NDArray[Any]:
    """The voxels in the machine's own order of bytes, after checking that the file can hold as many."""
    encoding = header.fields["encoding"].lower()
    skipped = {header.fields.get(name, "0") for name in ("line skip", "lineskip", "byte skip", "byteskip")}
    if encoding not in ("raw", "gzip", "gz") or skipped != {"0"}:
        raise InputError(path, "its voxels are not packed as 3D Slicer does", "encoding raw or gzip", _SAVE_AGAIN)
    expected = kind.itemsize
    for n in sizes:
        expected *= n  # Python integers: no overflow
    there = path.stat().st_size - header.size
    if expected > nifti.MAX_IMAGE_BYTES:
        raise InputError(path, f"the header claims {expected:,} bytes", f"at most {nifti.MAX_IMAGE_BYTES:,}")
    if expected > there * (1 if encoding == "raw" else nifti.DEFLATE_MAX_RATIO):
        raise UnreadableFile(path, f"the file is shorter than its header says ({there:,} bytes)", f"{expected:,} bytes")
    content = np.empty(expected, dtype=np.uint8)
    with nifti.explained(path), path.open("rb") as file:
        file.seek(header.size)
        _fill(content, file if encoding == "raw" else gzip.GzipFile(fileobj=file), path)
    array = content.view(kind)
    if not kind.isnative:
        array = array.byteswap(inplace=True).view(kind.newbyteorder("="))
    return array.reshape(sizes, order="F")


def _fill(content: NDArray[np.uint8], stream: Any, path: Path) -> None:
    """Read to the stream's end, so that the checksum of gzip is looked at."""
    filled = 0
    while filled < len(content) and (count := stream.readinto(content.data[filled : filled + (1 << 21)])):
        filled += count
    if filled < len(content) or stream.read(1):
        raise UnreadableFile(
            path, "holds more or fewer voxels than its header says", f"{len(content):,} bytes", _SAVE_AGAIN
        )


def _layers(array: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """The voxels as (layers, I, J, K), a view."""
    return array[np.newaxis] if axis is None else np.moveaxis(array, axis, 0)


def _segments(header: _Header, layered: bool, path: Path) -> list[_Segment]:
    numbers = {int(m[1]) for key in header.extra if (m := re.fullmatch(r"Segment(\d{1,6})_\w+", key))}
    found = []
    for order, number in enumerate(sorted(numbers)):
        field = {name: header.extra.get(f"Segment{number}_{name}", "") for name in ("Name", "ID", "Color", "Tags")}
        found.append(
            _Segment(
                name=_unescaped(field["Name"] or field["ID"] or f"Segment_{number + 1}"),
                layer=_integer(header, f"Segment{number}_Layer", order if layered else 0, path),
                value=_integer(header, f"Segment{number}_LabelValue", 1, path),
                colour=colour_of_fractions(field["Color"].split()),
                coding=_coding(field["Tags"]),
            )
        )
    return found


def _integer(header: _Header, key: str, default: int, path: Path) -> int:
    """A number of a segment; Slicer before 4.11 wrote none, and each segment as a layer of 0 and 1."""
    text = header.extra.get(key, str(default))
    if not re.fullmatch(r"-?\d{1,10}", text):
        raise UnreadableFile(path, "the layer or value of a segment is no integer", "a sound header", _SAVE_AGAIN)
    return int(text)


def _coding(tags: str) -> Coding | None:
    entry = next((tag for tag in tags.split("|") if tag.strip().startswith("TerminologyEntry:")), "")
    parts = entry.partition(":")[2].split("~")
    if len(parts) != 7:
        return None
    codes = [part.split("^") for n, part in enumerate(parts) if n not in (0, 4)]  # those are the names of lists
    if any(len(code) != 3 for code in codes):
        return None
    return Coding.from_triplets([(scheme.strip(), value.strip(), meaning.strip()) for scheme, value, meaning in codes])


def _values(segments: list[_Segment]) -> tuple[list[int], tuple[str, ...]]:
    """The value of each segment in the mask, and a warning where it is not the one of the file."""
    own = [segment.value for segment in segments]
    if len({segment.layer for segment in segments}) == 1 or (len(set(own)) == len(own) and 0 not in own):
        return own, ()
    return list(range(1, len(own) + 1)), ("segments of several layers share values: they are numbered anew from 1",)


def _united(layers: NDArray[Any], named: list[tuple[_Segment, int]], path: Path) -> NDArray[Any]:
    """One mask of all layers.

    Raises:
        InputError: a voxel is of two segments, or a segment of a layer that is not there.
    """
    values = [value for _, value in named]
    united = np.zeros(
        layers.shape[1:], np.result_type(*(np.min_scalar_type(v) for v in (min(values), max(values)))), "F"
    )
    for n, (segment, value) in enumerate(named, start=1):
        if not 0 <= segment.layer < len(layers):
            raise UnreadableFile(path, f"segment {n} is in a layer that is not there", f"0 to {len(layers) - 1}")
        inside = layers[segment.layer] == segment.value
        if shared := np.count_nonzero(united[inside]):
            found = f"segment {n} shares {shared:,} voxels with those before it"
            raise InputError(path, found, "one label a voxel", "make the segments not overlap in 3D Slicer")
        united[inside] = value
    return united


def _labels(named: list[tuple[_Segment, int]], path: Path) -> Labels:
    """The labels of the segments; their texts, which can be anything, go into no message."""
    if len({segment.name for segment, _ in named}) < len(named):
        raise InputError(path, "two segments have one name", "one name a segment", "rename one in 3D Slicer")
    body = {
        "values": {segment.name: value for segment, value in named},
        "codings": {segment.name: segment.coding for segment, _ in named if segment.coding},
        "colours": {segment.name: segment.colour for segment, _ in named if segment.colour},
    }
    try:
        return Labels.checked(body, path)
    except InputError:
        expected = "1 to 254 segments, each with an integer of its own that is not 0"
        raise InputError(
            path, f"the values of its {len(named)} segments cannot be labels", expected, _SAVE_AGAIN
        ) from None
