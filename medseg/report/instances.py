"""Single objects of an evaluation: parted in predicted masks and scored, as a table and the worst of them."""

from __future__ import annotations

import csv
import io as text_io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medseg.errors import GeometryMismatch, InputError
from medseg.io import describe_grid, read_mask, write_mask
from medseg.metrics import InstanceScore, score_instances
from medseg.postprocess import separate
from medseg.records import write_text


class InstanceResult(NamedTuple):
    """The single objects of one case.

    Attributes:
        case: its id.
        score: of its objects.
        reason: why there is no usable prediction; empty where there is one.
    """

    case: str
    score: InstanceScore
    reason: str = ""


def score_case(
    case: str,
    prediction: Path,
    reference: Path,
    instances: Path,
    inside: int | Sequence[int],
    boundary: int | None = None,
) -> InstanceResult:
    """Part the objects in a predicted mask, write their ids to a file, and score them.

    A case without a usable prediction counts as one in which nothing was found; ids of an earlier one are deleted then.

    Args:
        case: its id.
        prediction: a mask of classes.
        reference: ids on the same grid.
        instances: where the predicted ids are written, in the format of its ending.
        inside: value of the inside of objects, or of several kinds of them.
        boundary: value of their boundary; None where the mask has none.

    Raises:
        InputError: the reference cannot be read, the ids cannot be written, or scikit-image is not installed.
    """
    truth = read_mask(reference)
    try:
        mask = read_mask(prediction)
        if not mask.geometry.close_to(truth.geometry):
            raise GeometryMismatch(
                prediction, f"grid {describe_grid(mask)} differs from the reference's", describe_grid(truth)
            )
    except InputError as failure:
        instances.unlink(missing_ok=True)
        return InstanceResult(case, score_instances(np.zeros_like(truth.array), truth.array), str(failure))
    ids = separate(mask.array, inside, boundary, mask.geometry.spacing)
    write_mask(replace(mask, array=ids), instances)
    return InstanceResult(case, score_instances(ids, truth.array, case))


def save_instances(results: Sequence[InstanceResult], path: Path) -> None:
    """Write a CSV table of one row a case, atomically. Undefined numbers are empty."""
    text = text_io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", *InstanceScore.model_fields, "reason"])
    for result in results:
        scores = {**result.score.model_dump(), "matches": " ".join(map(str, result.score.matches))}
        table.writerow([result.case, *scores.values(), result.reason])
    write_text(path, text.getvalue())


def worst(results: Sequence[InstanceResult], count: int) -> list[InstanceResult]:
    """At most ``count`` results, from the lowest F1 up, of equal ones by average precision.

    Only cases with objects and a usable prediction: there is nothing to see in the others.
    """
    shown = [result for result in results if result.score.f1 is not None and not result.reason]
    return sorted(shown, key=lambda result: (result.score.f1 or 0.0, result.score.average_precision or 0.0))[:count]
