"""Damaged files of every format that medseg reads: only typed errors, no hang, no more memory than the file needs.

    python benchmarks/fuzz.py nifti --count 10000 --seed 0 --keep found
    kinds: nifti dicom seg nrrd tables

Every case is a small sound sample with some damage: bytes changed, cut, put in and taken out; fields of NIfTI headers
set to their extremes; elements of DICOM with another VR, length or value, dropped, repeated, nested; lines of text
headers changed. The cases of a seed are the same again but for the UIDs of the samples. They are read in a process of
its own, so that one that crashes or hangs it is found and the next go on. What is counted:

- a failure: any error that is no MedsegError, more than 5 s of processor time, the end of the process, text of the
  file's names, ids and comments in an error, its causes or the log, or more resident memory than twice the need (the
  files, and the voxels as `reading_bytes` promises them) and 4 MiB of the libraries' own;
- what was refused, by the class of the error, and what was read: damage that changes no rule of the format.

Failures are listed with their number and place; --keep FOLDER keeps their files. Memory is measured on Linux alone.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import queue
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # dicoms.py, which makes the DICOM samples

from medseg import terminology
from medseg.errors import MedsegError
from medseg.geometry import Geometry
from medseg.io import dicom, label_tables, nifti, read_mask, seg_nrrd
from medseg.io.dicom import segmentation
from medseg.volume import Labels, Mask, Volume

LIMIT_S = 5.0
"""Processor time of one case."""
HANG_S = 180.0
"""After so long without a word the process is ended; generous, for machines with other work."""
SLACK_BYTES = 4 << 20
MARKER = "CANARY^JOHN"
Sample = dict[str, bytes]
"""A sound file, or the files of a series, by name."""


@dataclass
class Case:
    """What became of one damaged file."""

    number: int
    outcome: str  # "read", "refused: TYPE" or "FAILED: ..."
    seconds: float = 0.0
    memory: float = 0.0  # what it took, as a part of what it may take


@dataclass
class Report:
    """What became of many."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[Case] = field(default_factory=list)
    slowest: Case = field(default_factory=lambda: Case(0, ""))
    largest: Case = field(default_factory=lambda: Case(0, ""))

    def add(self, case: Case) -> None:
        """Count a case."""
        self.outcomes[case.outcome.partition(" at ")[0]] += 1
        self.slowest = max(self.slowest, case, key=lambda c: c.seconds)
        self.largest = max(self.largest, case, key=lambda c: c.memory)
        if case.outcome.startswith("FAILED"):
            self.failures.append(case)

    def __str__(self) -> str:
        lines = [f"{count:7,} {outcome}" for outcome, count in self.outcomes.most_common()]
        lines.append(f"slowest {self.slowest.seconds:.2f} s of processor time (case {self.slowest.number})")
        lines.append(f"most memory {self.largest.memory:.0%} of what is allowed (case {self.largest.number})")
        lines += [f"case {case.number}: {case.outcome}" for case in self.failures[:40]]
        return "\n".join([*lines, f"{len(self.failures)} failures"])


# Damage ---------------------------------------------------------------------------------------------------------------


def anyhow(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut off, put in or taken out, rather at the beginning than elsewhere."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        end = max(1, min(len(data), chance.choice((64, 400, 2000, len(data)))))
        place, kind = chance.randrange(end), chance.random()
        if kind < 0.4 and data:
            data[place] = chance.randrange(256)
        elif kind < 0.55:
            data[place : place + 4] = chance.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
        elif kind < 0.7:
            data[place:place] = chance.randbytes(chance.choice((1, 2, 8, 100)))
        elif kind < 0.85:
            del data[place : place + chance.choice((1, 2, 8, 100))]
        else:
            del data[chance.randrange(len(data) + 1) :]
            break
    return bytes(data)


def of_nifti(content: bytes, chance: random.Random) -> bytes:
    """Fields of a header set to what they may least be; the file, or what is packed in it, damaged anyhow."""
    packed = content[:2] == b"\x1f\x8b"
    if packed and chance.random() < 0.2:
        return anyhow(content, chance)
    plain = gzip.decompress(content) if packed else content
    plain = anyhow(plain, chance) if chance.random() < 0.3 else _fields_changed(plain, chance)
    return gzip.compress(plain, 1, mtime=0) if packed else plain


def _fields_changed(content: bytes, chance: random.Random) -> bytes:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    kind = Nifti2Header if content[4:6] == b"n+" else Nifti1Header
    size = kind.template_dtype.itemsize
    if len(content) < size:
        return anyhow(content, chance)
    header = kind(content[:size], check=False).structarr.copy()
    for _ in range(chance.choice((1, 1, 2, 5))):
        name = chance.choice(("dim", "pixdim", "vox_offset", "datatype", *header.dtype.names))
        values = header[name].reshape(-1)
        values[chance.randrange(values.size)] = _extreme(values.dtype, chance)
        header[name] = values.reshape(header[name].shape)
    return bytes(header.tobytes()) + content[size:]


def _extreme(kind: np.dtype[Any], chance: random.Random) -> Any:
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return chance.choice((limits.min, limits.max, 0, 1, 2, 3, 5, 8, 16, 100, chance.randint(0, limits.max)))
    if kind.kind == "f":
        limit = float(np.finfo(kind).max)
        values = (np.nan, np.inf, -np.inf, limit, -limit, 1e-40, 0.0, -1.0, 1.0, 1e3, 352.5, chance.gauss(0, 10))
        return chance.choice(values)
    return chance.randbytes(max(1, kind.itemsize))


_VRS = (
    b"AE AS AT CS DA DS DT FL FD IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV ZZ".split()
)
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_NASTY = [b"", b"nan ", b"-inf", b"1e999 ", b"-1e308", b"1e-320", b"0 ", b"-1", b"1,5 ", b"0x10", b"1\\2\\3\\4\\5\\6 ",
          b"\\ ", b"9" * 64, b"9" * 5000, b"\xff" * 6, bytes(8), b"\xff\xff", b"\0\x80", b"\1\0", b"\0\xff\0\0",
          b"ISO_IR 192", b"ISO 2022 IR 87\\ISO 2022 IR 149 ", b"NONSENSE", "Zäölüß漢字".encode() + b" ",
          b"../../../x", b"1.2.3.", b"\x1b$B\x1b(B", b"CANARY^JOHN "]  # fmt: skip
_ITEM, _ITEM_END, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0" + bytes(4), b"\xfe\xff\xdd\xe0" + bytes(4)


def of_dicom(content: bytes, chance: random.Random) -> bytes:
    """Elements with another VR, length or value, dropped, repeated, nested; or the file damaged anyhow."""
    elements = list(_elements(content))
    if not elements or chance.random() < 0.3:
        return content[:132] + anyhow(content[132:], chance)
    data = content
    for start, head, end in sorted(chance.sample(elements, min(len(elements), chance.choice((1, 1, 2, 5)))))[::-1]:
        data = data[:start] + _element_changed(data[start:end], head, chance) + data[end:]
    return data


def _elements(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Start, length of the head and end of elements with explicit VR, little-endian, those of items too."""
    place = 132
    while place + 8 <= len(content):
        tag, vr = content[place : place + 4], content[place + 4 : place + 6]
        item = tag[:2] == b"\xfe\xff"
        if not (item or vr in _VRS):
            return
        head = 12 if vr in _LONG and not item else 8
        form, where = ("<I", head - 4) if head == 12 or item else ("<H", 6)
        if place + head > len(content):
            return
        (length,) = struct.unpack_from(form, content, place + where)
        inside = item or vr == b"SQ" or length == 0xFFFFFFFF
        if not item:
            yield place, head, min(len(content), place + head + (0 if inside else length))
        place += head + (0 if inside else length)


def _element_changed(element: bytes, head: int, chance: random.Random) -> bytes:
    tag, vr, value = element[:4], element[4:6], element[head:]
    kind = chance.random()
    if kind < 0.45:
        return _element(tag, vr, chance.choice(_NASTY))
    if kind < 0.6:
        return _element(tag, chance.choice(_VRS), value)
    if kind < 0.72:
        wrong = chance.choice((0, 1, len(value) + 1, len(value) + 2, 0xFFFE, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE))
        return _element(tag, vr, value, wrong)
    if kind < 0.8:
        return b""
    if kind < 0.87:
        return element * chance.choice((2, 3, 50))
    if kind < 0.95:
        return _nested(tag, element, chance.choice((1, 2, 50, 2000)))
    return _element(chance.randbytes(4), vr, value)


def _element(tag: bytes, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    if vr in _LONG:
        return tag + vr + b"\0\0" + struct.pack("<I", size) + value
    return tag + vr + struct.pack("<H", min(size, 0xFFFF)) + value


def _nested(tag: bytes, element: bytes, depth: int) -> bytes:
    opened = tag + b"SQ\0\0\xff\xff\xff\xff" + _ITEM + b"\xff\xff\xff\xff"
    return opened * depth + element + (_ITEM_END + _END) * depth


_WORDS = [
    *(
        "",
        "0",
        "-1",
        "1",
        "nan",
        "inf",
        "9" * 20,
        "4294967296",
        "none",
        "(1,0,0)",
        "(0,0,0)",
        "(1,nan,0)",
        "NaN",
        "gzip",
    ),
    *(
        "raw",
        "bzip2",
        "hex",
        "big",
        "double",
        "int64",
        "uint8",
        "block",
        "\\",
        '"',
        "../../etc",
        ",",
        "\t",
        "~",
        "^",
        "|",
    ),
    *("é", "\0", "SCT", "1 1 1 1", "2 2 2", "domain domain domain"),
]


def of_text(content: bytes, chance: random.Random) -> bytes:
    """Words and lines of a text (of a header before an empty line) changed, dropped or repeated; or damage anyhow."""
    if chance.random() < 0.3:
        return anyhow(content, chance)
    head, gap, rest = content.partition(b"\n\n")
    lines = head.decode("utf-8", "replace").split("\n")
    for _ in range(chance.choice((1, 1, 2, 5))):
        n, kind = chance.randrange(len(lines)), chance.random()
        if kind < 0.7:
            mark = next((m for m in (":=", ": ", "\t", ",", " ") if m in lines[n]), "")
            words = lines[n].split(mark) if mark else [lines[n]]
            words[chance.randrange(len(words))] = chance.choice(_WORDS)
            lines[n] = mark.join(words)
        elif kind < 0.85 and len(lines) > 1:
            del lines[n]
        else:
            lines.insert(chance.randrange(len(lines)), lines[n])
    return "\n".join(lines).encode("utf-8", "replace") + gap + rest


# Samples --------------------------------------------------------------------------------------------------------------


def _mask(header: Any = None, geometry: Geometry | None = None) -> Mask:
    geometry = geometry or Geometry((6, 5, 4), np.diag([1.0, 2.0, 3.0, 1.0]))
    array = np.zeros(geometry.shape, np.uint8)
    array[1:4, 1:4, 1:3], array[4:, 3:, :] = 1, 7
    names = {"liver": 1, "kidney_left": 7}
    codings = {name: coding for name in names if (coding := terminology.coding_of(name)) is not None}
    labels = Labels(values=names, codings=codings)
    return Mask(array, geometry, labels, (), header)


def _nifti_samples(folder: Path) -> list[Sample]:
    """Images and masks of versions 1 and 2, either order of bytes, packed or not, single and in pairs, scaled."""
    import nibabel

    array = np.arange(6 * 5 * 4).reshape(6, 5, 4).astype(np.int16)
    samples = []
    for number, (kind, order, ending) in enumerate(
        [
            (nibabel.Nifti1Image, "<", ".nii"),
            (nibabel.Nifti1Image, ">", ".nii.gz"),
            (nibabel.Nifti1Pair, "<", ".hdr"),
            (nibabel.Nifti2Image, "<", ".nii.gz"),
            (nibabel.Nifti2Image, ">", ".nii"),
        ]
    ):
        header = kind.header_class(endianness=order)
        header["descrip"] = MARKER.encode()
        image = kind(array.astype(array.dtype.newbyteorder(order)), np.diag([1.0, 2.0, 3.0, 1.0]), header)
        image.header.set_slope_inter(*((2.0, -5.0) if number % 2 else (1.0, 0.0)))
        place = folder / f"n{number}"
        place.mkdir()
        nibabel.save(image, place / f"case{ending}")
        samples.append(_sample(place))
    for ending in (".nii", ".nii.gz"):
        place = folder / f"mask{ending}"
        place.mkdir()
        nifti.write(_mask(), place / f"case{ending}")
        samples.append(_sample(place))
    return samples


def _dicom_samples(folder: Path) -> list[Sample]:
    """Two slices, and an enhanced file of two frames, in every transfer syntax."""
    from dicoms import write_enhanced, write_series
    from pydicom import uid

    array = (np.arange(36 * 34 * 2).reshape(36, 34, 2) % 251).astype(np.int16)
    names = ["ExplicitVRLittleEndian"] * 4 + ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "RLELossless"]
    names += ["DeflatedExplicitVRLittleEndian", "JPEG2000Lossless", "JPEGLSLossless", "JPEGLossless", "HTJ2KLossless"]
    for number, name in enumerate(names):
        syntax = getattr(uid, name)
        write_series(folder / f"s{number}", array, syntax=syntax, marker=MARKER, slope=(1, 2) if number == 1 else 1)
        write_enhanced(folder / f"e{number}", array, syntax=syntax, marker=MARKER)
    return [_sample(place) for place in sorted(folder.iterdir())]


def _seg_samples(folder: Path) -> list[Sample]:
    from dicoms import write_series

    array = (np.arange(36 * 34 * 4).reshape(36, 34, 4) % 251).astype(np.int16)
    write_series(folder / "source", array, marker=MARKER)
    (series,) = dicom.scan(folder / "source").series
    samples = []
    for kind in ("BINARY", "LABELMAP"):
        place = folder / kind
        place.mkdir()
        segmentation.write(_mask(series, series.geometry), place / "case.dcm", kind=kind)
        samples.append(_sample(place))
    return samples


def _nrrd_samples(folder: Path) -> list[Sample]:
    seg_nrrd.write(_mask(), folder / "case.seg.nrrd")
    packed = _sample(folder)["case.seg.nrrd"]
    head, _, voxels = packed.partition(b"\n\n")
    raw = head.replace(b"encoding: gzip", b"encoding: raw") + b"\n\n" + gzip.decompress(voxels)
    return [{"case.seg.nrrd": packed}, {"case.seg.nrrd": raw}]


def _table_samples(_: Path) -> list[Sample]:
    return [{name: text.encode()} for name, text in label_tables.tables(_mask().labels).items()]


def _sample(folder: Path) -> Sample:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Readers: each reads all there is in a folder, and gives the bytes that this may take ---------------------------------


def read_nifti(folder: Path) -> int:
    path = next(path for path in sorted(folder.iterdir()) if path.suffix != ".img")
    need = nifti.reading_bytes(nifti.read_outline(path))
    volume = nifti.read(path)
    mask = read_mask(path) if _is_integral(volume) else None
    return need + volume.array.nbytes + (0 if mask is None else mask.array.nbytes)


def _is_integral(volume: Volume) -> bool:
    return volume.array.shape[0] == 1 and volume.array.dtype.kind in "iu"


def read_dicom(folder: Path) -> int:
    need, fault = 0, None
    found = dicom.scan(folder)
    for series in found.series:
        for one in [series, *([series.resampled()] if series.irregular else [])]:
            try:
                dicom.headers(one)
                need += dicom.read_series(one).array.nbytes + dicom.reading_bytes(one)
            except MedsegError as error:
                fault = error
    if fault is not None:
        raise fault
    dicom.select(found)
    return need


def read_seg(folder: Path) -> int:
    return 2 * segmentation.read_mask(folder / "case.dcm").array.nbytes


def read_nrrd(folder: Path) -> int:
    return 2 * seg_nrrd.read_mask(folder / "case.seg.nrrd").array.nbytes


def read_tables(folder: Path) -> int:
    label_tables.read_labels_file(next(folder.iterdir()))
    return 0


@dataclass(frozen=True)
class Kind:
    """A format: its samples, what damages them, and what reads them."""

    samples: Callable[[Path], list[Sample]]
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], int]


KINDS = {
    "nifti": Kind(_nifti_samples, of_nifti, read_nifti),
    "dicom": Kind(_dicom_samples, of_dicom, read_dicom),
    "seg": Kind(_seg_samples, of_dicom, read_seg),
    "nrrd": Kind(_nrrd_samples, of_text, read_nrrd),
    "tables": Kind(_table_samples, of_text, read_tables),
}


# Runs -----------------------------------------------------------------------------------------------------------------


class Fuzzer:
    """Reads damaged files of a kind, one after the other, in this process.

    Args:
        kind: a key of ``KINDS``.
        seed: of the damage.
        folder: for files.
        keep: where the files of failures are kept.
    """

    def __init__(self, kind: str, seed: int, folder: Path, keep: Path | None = None) -> None:
        self.name, self.kind, self.seed, self.folder, self.keep = kind, KINDS[kind], seed, folder, keep
        self.log = io.StringIO()
        made = folder / "made"
        made.mkdir()
        self.samples = self.kind.samples(made)
        self.needs = [self.kind.read(self._written(sample)) for sample in self.samples]

    def case(self, number: int) -> Case:
        """Damage a sample, and read it."""
        chance = random.Random(f"{self.name} {self.seed} {number}")
        which = chance.randrange(len(self.samples))
        sample = dict(self.samples[which])
        for name in chance.sample(sorted(sample), chance.choice((1, 1, len(sample)))):
            sample[name] = self.kind.damage(sample[name], chance)
        place = self._written(sample)
        result = self._read(number, place, sum(map(len, sample.values())) + self.needs[which])
        if self.keep is not None and result.outcome.startswith("FAILED"):
            shutil.copytree(place, self.keep / f"{self.name}_{self.seed}_{number}", dirs_exist_ok=True)
        return result

    def _read(self, number: int, place: Path, need: int) -> Case:
        case, before, start = Case(number, "read"), _reset_peak(), time.process_time()
        try:
            need = max(need, self.kind.read(place))
        except MedsegError as error:
            case.outcome = f"refused: {type(error).__name__}"
            if MARKER in "".join(traceback.format_exception(error)):
                case.outcome = "FAILED: text of the file in an error"
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            steps = [f"{Path(step.filename).name}:{step.lineno}" for step in traceback.extract_tb(error.__traceback__)]
            case.outcome = f"FAILED: {type(error).__name__} at {' < '.join(steps[:-5:-1])}: {str(error)[:100]}"
        case.seconds = time.process_time() - start
        case.memory = (_peak_bytes() - before) / (2 * need + SLACK_BYTES)
        if MARKER in self.log.getvalue():
            case.outcome = "FAILED: text of the file in the log"
        elif not case.outcome.startswith("FAILED"):
            case.outcome = f"FAILED: {case.seconds:.1f} s" if case.seconds > LIMIT_S else case.outcome
            case.outcome = f"FAILED: memory {case.memory:.0%} at {need} bytes" if case.memory > 1 else case.outcome
        self.log.truncate(self.log.seek(0))
        return case

    def _written(self, sample: Sample) -> Path:
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name, content in sample.items():
            (place / name).write_bytes(content)
        return place

    def __enter__(self) -> Fuzzer:
        self._handler = logging.StreamHandler(self.log)
        logging.getLogger().addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._handler)


def _reset_peak() -> int:
    """Resident bytes now, from which the peak is counted again; 0 where this cannot be asked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def _peak_bytes() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def run(kind: str, count: int, seed: int = 0, keep: Path | None = None) -> Report:
    """Read ``count`` damaged files in processes of their own, a new one where one ends or hangs."""
    report, number = Report(), 0
    while number < count:
        for case in _process(kind, number, count, seed, keep):
            report.add(case)
            number = case.number + 1
            if sys.stderr.isatty():
                print(f"\r{number}", end="", file=sys.stderr, flush=True)
    return report


def _process(kind: str, first: int, count: int, seed: int, keep: Path | None) -> Iterator[Case]:
    """Cases from ``first`` on; the last of them may be one with which the process ended."""
    arguments = [kind, "--count", str(count), "--seed", str(seed), "--first", str(first)]
    arguments += [] if keep is None else ["--keep", str(keep)]
    command = [sys.executable, __file__, *arguments, "--child"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
        number, fault = first, ""
        while number < count:
            try:
                line = lines.get(timeout=HANG_S)
            except queue.Empty:
                fault = f"no word in {HANG_S:.0f} s"
                break
            if not line:
                fault = "the process ended"
                break
            yield Case(**json.loads(line))
            number += 1
        child.kill()
    if fault:
        yield Case(number, f"FAILED: {fault} ({child.returncode})")


def _forward(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _child(kind: str, first: int, count: int, seed: int, keep: Path | None) -> None:
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder, Fuzzer(kind, seed, Path(folder), keep) as fuzzer:
        for number in range(first, count):
            print(json.dumps(asdict(fuzzer.case(number))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of failures")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _child(given.kind, given.first, given.count, given.seed, given.keep)
    else:
        report = run(given.kind, given.count, given.seed, given.keep)
        print(f"{given.kind}, seed {given.seed}\n{report}")
        sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
