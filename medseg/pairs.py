"""Pairs: which mask is the prediction of which reference, by the names of their files."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from medseg.cases import find_masks
from medseg.dataset import Dataset

log = logging.getLogger(__name__)

Pair = tuple[str, Path, Path]
"""Case id, path of the prediction (which may be missing), path of the reference; files, or folders of a DICOM SEG."""


@dataclass(frozen=True)
class Found:
    """Masks of predictions and references.

    Attributes:
        dataset: that the references are of, if they are those of one.
        references, predictions: by the name of the reference; a prediction without one has its own name.
        how: names were matched where they differ, in words; empty where they do not.
    """

    dataset: Dataset | None
    references: dict[str, Path]
    predictions: dict[str, Path]
    how: str


def pairs_of(predictions: Path, references: Path) -> list[Pair]:
    """Every reference with the prediction of its name, or with where it would be; see ``find``."""
    found = find(predictions, references)
    return [
        (case, found.predictions.get(case, predictions / case), path) for case, path in sorted(found.references.items())
    ]


def find(predictions: Path, references: Path) -> Found:
    """Find masks, and match their names.

    Names are those of the files without ending. Where no prediction has the name of a reference, a prediction belongs
    to the longest name of a reference that it holds (``pred_007_seg`` to ``007``), or that holds its own; else what all
    predictions begin and end with is left out, and likewise of the references, if one of these has nothing that the
    other has not (``sub-7_desc-model_dseg`` and ``sub-7_dseg``). All of this only where every prediction then has a
    reference of its own; what was done is logged. Two single files are a pair whatever their names.

    Args:
        predictions: a folder of masks, one mask, or a pattern; see ``find_masks``.
        references: likewise, or a dataset folder with its ``dataset.json``, whose training labels are meant.

    Raises:
        InputError: there is none, or two files are of one name.
    """
    dataset = Dataset.open(references) if (references / "dataset.json").is_file() else None
    labels = {case.id: case.label for case in dataset.cases if case.label} if dataset else {}
    found = labels or find_masks(references)
    predicted = find_masks(predictions)
    if predictions.is_file() and references.is_file():
        return Found(dataset, found, dict(zip(found, predicted.values(), strict=True)), "")
    names, how = _matched(predicted, found)
    if how:
        log.warning("names: %s", how)
    return Found(dataset, found, {names[name]: path for name, path in predicted.items()}, how)


def _matched(predicted: Collection[str], found: Collection[str]) -> tuple[dict[str, str], str]:
    """The name of the reference of each prediction, and how that was found where names differ; see ``find``."""
    same = {name: name for name in predicted}
    if set(predicted) & set(found):
        return same, ""
    held = {name: _held(name, found) for name in predicted}
    if None in held.values():
        held = {name: _held(name, found, within=True) for name in predicted}
    if None not in held.values() and len(set(held.values())) == len(predicted):
        example = min(predicted)
        return {name: str(other) for name, other in held.items()}, f"{example} is the prediction of {held[example]}"
    (ends_p, cores_p), (ends_r, cores_r) = _cores(predicted), _cores(found)
    names = {core: name for name, core in cores_r.items()}
    alike = all(a in b or b in a for a, b in zip(ends_p, ends_r, strict=True))
    if not alike or len(found) < 2 or len(predicted) < 2 or not set(cores_p.values()) <= set(names):
        return same, ""
    how = f"{'*'.join(ends_p)} of the predictions is {'*'.join(ends_r)} of the references"
    return {name: names[core] for name, core in cores_p.items()}, how


def _held(name: str, others: Collection[str], within: bool = False) -> str | None:
    """The longest of the other names that a name holds as whole words, or (``within``) the only one that holds it."""
    whole = r"(?<![^\W_]){}(?![^\W_])"
    if within:
        holders = [other for other in others if re.search(whole.format(re.escape(name)), other)]
        return holders[0] if len(holders) == 1 else None
    return max((other for other in others if re.search(whole.format(re.escape(other)), name)), key=len, default=None)


def _cores(names: Collection[str]) -> tuple[tuple[str, str], dict[str, str]]:
    """What all names begin and end with, and each without it."""
    start = _shared(names)
    rest = {name: name.removeprefix(start) for name in names}
    stop = _shared([text[::-1] for text in rest.values()])[::-1]
    return (start, stop), {name: text.removesuffix(stop) for name, text in rest.items()}


def _shared(texts: Collection[str]) -> str:
    """What all texts begin with, up to their numbers: ``01`` and ``02`` share nothing."""
    first, last = min(texts), max(texts)
    count = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:count].rstrip("0123456789")
