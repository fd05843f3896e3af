"""What a batch of predictions did: a record a case, a journal to go on from, and tables for people.

The journal has a line for every case, written before its mask takes its name: a file in the folder is known to be from
here when its digest stands in a line. So it is no matter where a run is killed, and several processes (shards) may
work in one folder: each writes a journal, a table and a run record of its own, and reads the journals of all.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io as text_io
import json
import logging
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import medseg
from medseg import quality
from medseg.cases import Shard
from medseg.errors import InputError
from medseg.records import Record, digest_file, failures_named, write_bytes, write_json

log = logging.getLogger(__name__)

STAGES = ("read", "prepare", "network", "write")


class Prediction(Record):
    """What became of one case.

    Attributes:
        case: id; empty for the tables of labels, which are of all cases.
        status: ``done``; ``kept`` from an earlier run with the same input, model and settings; ``failed``.
        output: file name of the mask, empty for a failed case.
        reason: why it failed.
        seconds: from reading to writing, waiting left out.
        stages: seconds of reading, preparing, the network (with resampling its output to the mask) and writing.
        peak_memory_mb: most memory that the process held while the case was worked on; on other systems than Linux
            while the process lived.
        strategy: how memory was used, in words.
        volumes_ml: volume of each class, and of each region.
        warnings: what was odd about the input.
        qc_flags: what is unusual about the mask, see ``medseg.quality``.
        key, input_digest, output_digest: SHA-256 of all that it was made from, of the image's files alone, and of the
            mask's file.
        mask_digests: file -> SHA-256, of the mask in further formats.
        probability_digests: file -> SHA-256, of the probabilities that were asked for.
    """

    case: str
    status: Literal["done", "kept", "failed"]
    output: str = ""
    reason: str = ""
    seconds: float = 0.0
    stages: dict[str, float] = {}
    peak_memory_mb: float | None = None
    strategy: str = ""
    volumes_ml: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    qc_flags: tuple[str, ...] = ()
    key: str = ""
    input_digest: str = ""
    output_digest: str = ""
    mask_digests: dict[str, str] = {}
    probability_digests: dict[str, str] = {}

    @property
    def files(self) -> dict[str, str]:
        """Every file of the case, relative to the folder, with its digest."""
        if not self.output:
            return {}
        return {self.output: self.output_digest, **self.mask_digests, **self.probability_digests}


class Journal:
    """What was and is done in an output folder, by this process and others.

    Args:
        out: the folder.
        shard: which of several processes this is; None for the only one.

    Attributes:
        results: of this run, by case, in the order in which they ended.
    """

    def __init__(self, out: Path, shard: Shard | None = None) -> None:
        suffix = shard.suffix if shard else ""
        self.out = out
        self.path, self.table, self.run = (
            out / f"{stem}{suffix}{ending}"
            for stem, ending in (("journal", ".jsonl"), ("cases", ".csv"), ("run", ".json"))
        )
        self.results: dict[str, Prediction] = {}
        self._past: dict[str, list[Prediction]] = {}
        for path in sorted(out.glob("journal*.jsonl")):
            for record in _read_lines(path):
                self._past.setdefault(record.case, []).append(record)

    def kept(self, case: str, key: str, files: Sequence[str] = ()) -> Prediction | None:
        """The record of a case that was made from what the key stands for, where its files are as they were written.

        Args:
            case: id.
            key: digest of input, model and settings.
            files: that are wanted, a mask first; none for the mask alone.
        """
        for record in reversed(self._past.get(case, [])):
            digests, wanted = record.files, files or (record.output,)
            if record.key != key or not set(wanted) <= set(digests):
                continue
            if all(_is(self.out / name, digests[name]) for name in wanted):
                first = {"output": wanted[0], "output_digest": digests[wanted[0]]}
                return record.model_copy(update={"status": "kept", **first})
        return None

    def wrote(self, case: str, file: str) -> bool:
        """Whether a file of the folder is, as it is now, one that was written for this case by any run."""
        digests = {
            digest for record in self._past.get(case, []) for name, digest in record.files.items() if name == file
        }
        return bool(digests) and (found := _digest(self.out / file)) is not None and found in digests

    def knows(self, case: str, file: str) -> bool:
        """Whether a file of this name was ever written for the case."""
        return any(file in record.files for record in self._past.get(case, []))

    def outdated(self, case: str, input_digest: str) -> list[Path]:
        """Files of the folder that are, as they are now, what was written for this case from other images alone."""
        made: dict[tuple[str, str], set[str]] = {}
        for record in self._past.get(case, []):
            for written in record.files.items():
                made.setdefault(written, set()).add(record.input_digest)
        others = [written for written, inputs in made.items() if input_digest not in inputs]
        return [self.out / name for name, digest in others if _is(self.out / name, digest)]

    def add(self, record: Prediction) -> None:
        """Write a line; on a line of its own even where a kill, or a full disk, cut the last one short.

        Raises:
            OSError: it cannot be written, with the name of the journal.
        """
        whole = not self.path.exists() or self.path.stat().st_size == 0 or _last_byte(self.path) == b"\n"
        with failures_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(record.model_dump(mode="json")) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the mask has its name, also where the power fails
        self._past.setdefault(record.case, []).append(record)

    def write_tables(self, names: Sequence[str], planned: int, facts: Mapping[str, Any]) -> None:
        """Write one row a case (``cases.csv``), and what ran and how far it came (``run.json``), both atomically.

        Args:
            names: of classes and regions.
            planned: number of cases of this run.
            facts: what else goes into ``run.json``.
        """
        text = text_io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        head = [
            "case",
            "status",
            "output",
            "seconds",
            *(f"{stage}_s" for stage in STAGES),
            "peak_memory_mb",
            "strategy",
        ]
        table.writerow([*head, *(f"{name}_ml" for name in names), "qc_flags", "warnings", "reason"])
        results = [self.results[case] for case in sorted(self.results)]
        for r in results:
            memory = "" if r.peak_memory_mb is None else r.peak_memory_mb
            row = [r.case, r.status, r.output, r.seconds, *(r.stages.get(stage, "") for stage in STAGES)]
            volumes = [r.volumes_ml.get(name, "") for name in names]
            notes = [";".join(r.qc_flags), "; ".join(r.warnings), " ".join(r.reason.split())]
            table.writerow([*row, memory, r.strategy, *volumes, *notes])
        # a file name may hold bytes that are no text
        write_bytes(self.table, text.getvalue().encode("utf-8", "backslashreplace"))
        states = Counter(r.status for r in results)
        done = [r for r in results if r.status == "done"]
        totals = {
            "cases": {
                **{state: states[state] for state in ("done", "kept", "failed")},
                "open": planned - len(results),
            },
            "seconds": {stage: round(sum(r.stages.get(stage, 0.0) for r in done), 3) for stage in STAGES},
            "peak_memory_mb": max((r.peak_memory_mb for r in done if r.peak_memory_mb is not None), default=None),
            "strategies": dict(Counter(r.strategy for r in done)),
        }
        notices = {"notice": medseg.NOTICE, "qc_notice": quality.NOTICE}
        write_json(self.run, {**notices, **facts, **totals})


def versions() -> dict[str, str]:
    """Versions of medseg and of what its results rest on."""
    names = ("torch", "monai", "lightning-fabric", "numpy", "scipy", "nibabel", "pydicom", "highdicom", "safetensors")
    return {
        "medseg": medseg.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _read_lines(path: Path) -> list[Prediction]:
    """The records of a journal; a line that a kill cut short, or another version wrote, is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(Prediction.checked(json.loads(line), path))
        except (ValueError, TypeError, InputError):
            continue
    return records


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1)


def _digest(path: Path) -> str | None:
    try:
        return digest_file(path)
    except OSError:
        return None


def _is(path: Path, digest: str) -> bool:
    return _digest(path) == digest
