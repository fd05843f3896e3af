"""Reports: the curve is drawn from any log that a training can leave, tables say what was counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from medseg.errors import InputError
from medseg.evaluate import CaseScores, ClassSummary, Evaluation, Means, Spread
from medseg.io import read_mask, write_mask
from medseg.io.picture import picture_grid
from medseg.metrics import MEASURES, ClassScore, InstanceScore, score_instances
from medseg.postprocess import boundary_classes
from medseg.report import (
    InstanceResult,
    Panel,
    markdown_summary,
    save_contact_sheet,
    save_curve,
    save_instances,
    score_case,
    score_table,
    worst,
)
from medseg.report.curves import smoothed
from medseg.volume import Labels, Mask

HEADING = "iteration,seconds,loss,learning_rate,dice\n"
ROWS = "".join(f"{n},{n * 0.5},{1 / n},0.01,{'' if n % 5 else n / 20}\n" for n in range(1, 21))
PNG = b"\x89PNG\r\n\x1a\n"


def size(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == PNG
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize(
    "text",
    [
        HEADING + ROWS,
        HEADING + ROWS + "21,10",
        HEADING + "1,0.5,1.0,0.01,\n",
        HEADING + "1,0.5,1.0,0.01,0.5\n2,1.0,nan,0.0,\n",
        "iteration,seconds,loss,learning_rate,dice,extra\n1,0.5,1.0,0.01,0.5,word\n",
    ],
    ids=["whole", "row cut short", "one row, no validation", "loss that is not finite", "further column"],
)
def test_curve_is_drawn(text: str, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(text)
    save_curve(log, tmp_path / "curve.png")
    assert size(tmp_path / "curve.png") == (960, 840)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "log.csv"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no iteration"),
        (HEADING, "has no iteration"),
        ("iteration,loss\n1,2\n", "has no seconds, learning_rate, dice"),
        (HEADING + "1,0.5,oops,0.01,\n", "oops"),
    ],
    ids=["empty", "no row", "no column", "no number"],
)
def test_log_that_cannot_be_drawn_is_refused(text: str, words: str, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(text)
    with pytest.raises(InputError, match=words):
        save_curve(log, tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_running_mean_goes_on_after_a_loss_that_is_not_finite() -> None:
    values = np.arange(100.0)  # the mean of two
    values[[10, 20, 21]] = np.nan, np.inf, -np.inf
    expected = np.arange(100.0) - 0.5
    expected[[0, 10, 11, 20, 21, 22]] = 0.0, 9.0, 11.0, 19.0, np.nan, 22.0
    assert np.array_equal(smoothed(values), expected, equal_nan=True)


def test_missing_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        save_curve(tmp_path / "log.csv", tmp_path / "curve.png")


def spread(mean: float, low: float | None, high: float | None, median: float) -> Spread:
    return Spread(mean=mean, low=low, high=high, median=median, p25=0.0, p75=0.0, p05=0.0, p95=0.0)


def evaluation(reason: str = "") -> Evaluation:
    spreads = {
        "dice": spread(0.5, 0.4, 0.61, 0.625),
        "nsd": spread(0.75, None, None, 0.8),
        "hd95_mm": spread(3.14159, 1.0, 5.0, 2.0),
    }
    score = ClassScore(
        name="a|b", status="missed", dice=0.0, nsd=0.0, hd95_mm=9.0, reference_ml=1.0, prediction_ml=None
    )
    scored = ClassSummary(
        name="a|b",
        n=4,
        n_true_negative=1,
        n_empty_reference=2,
        n_missed=1,
        n_false_positive=2,
        n_failed=3,
        worst=("case_1",),
        **{**dict.fromkeys(MEASURES), **spreads},
    )
    absent = scored.model_copy(update={"name": "absent", "n": 0, "dice": None, "nsd": None, "hd95_mm": None})
    return Evaluation(
        labels=Labels(values={"a|b": 1, "absent": 2}),
        tolerance_mm=2.0,
        mean=Means(dice=0.5, nsd=0.75, hd95_mm=3.14159),
        mean_low=Means(dice=0.4),
        mean_high=Means(dice=0.61),
        classes=(scored, absent),
        cases=(CaseScores(case="case_1", scores=(score,), reason=reason),),
        unscored={"case_2": "truncated"} if reason else {},
        extra=("case_9",) if reason else (),
    )


def test_score_table() -> None:
    heading, first, second, mean = score_table(evaluation())
    assert heading[4] == "NSD at 2 mm"
    assert first == ("a|b", "0.5000", "0.400 to 0.610", "0.6250", "0.7500", "3.14", "4", "2", "1", "2", "3")
    assert second[:7] == ("absent", "-", "-", "-", "-", "-", "0")
    assert mean == ("mean of classes", "0.5000", "0.400 to 0.610", "", "0.7500", "3.14", "", "", "", "", "")


def test_markdown_names_what_failed() -> None:
    text = markdown_summary(evaluation(reason="there is no prediction"))
    assert "| a&#124;b | 0.5000 |" in text
    for line in ("- case_1: there is no prediction", "- case_2: truncated", "- case_9", "surface-distance"):
        assert line in text
    assert all(line.count("|") == 12 for line in text.splitlines() if line.startswith("|"))


def test_markdown_of_a_clean_evaluation_lists_nothing() -> None:
    text = markdown_summary(evaluation())
    assert [line for line in text.splitlines() if line.startswith("#")] == ["## Scores"]


def test_contact_sheet_has_a_row_a_panel(tmp_path: Path) -> None:
    ids = np.zeros((20, 10, 1), dtype=int)
    ids[2:6, 3:9] = 1
    grey, colours = np.full((1, 20, 10, 1), 7.0), np.zeros((3, 20, 10, 1), dtype=np.uint8)
    panels = [Panel("n0: F1 0.00", image, ids, ids * 0) for image in (grey, colours)]
    heights = []
    for count in (1, 2):
        save_contact_sheet(panels[:count], tmp_path / "worst.png")
        heights.append(size(tmp_path / "worst.png")[1])
    assert heights == [450, 900]
    assert [path.name for path in tmp_path.iterdir()] == ["worst.png"]


def test_contact_sheet_has_columns_to_the_right_rows_down_and_the_colours_of_the_image(tmp_path: Path) -> None:
    image, ids = np.zeros((3, 20, 10, 1), np.uint8), np.zeros((20, 10, 1), int)
    image[1, :, :3], image[0, 12:18] = 255, 255  # green above, red to the right, yellow where they cross
    ids[2:6, 3:9] = 1
    save_contact_sheet([Panel("n0", image, ids, np.roll(ids, 5, axis=0))], tmp_path / "worst.png")
    expected = np.zeros((10, 20, 3), int)  # rows, columns
    expected[:3, :, 1], expected[:, 12:18, 0] = 255, 255
    with PIL.Image.open(tmp_path / "worst.png") as sheet:
        thirds = np.split(np.asarray(sheet.convert("RGB")).astype(int), 3, axis=1)
    for third, first, colour in zip(thirds, (None, 2, 7), (None, (0, 158, 115), (213, 94, 0)), strict=True):
        rows, columns = np.nonzero((third[..., 1] == 255) & (third[..., 2] == 0))  # green and yellow: the upper edge
        top, left, cell = rows.min(), columns.min(), (np.ptp(columns) + 1) / 20
        for row, column in np.ndindex(10, 20):
            middle = around(third, top + cell * (row + 0.5), left + cell * (column + 0.5))
            assert np.abs(middle - expected[row, column]).max() < 5
        if first is not None:  # the object is 4 x 6 pixels from column ``first`` and row 3: lines run around these
            for row, column in ((3, first + 0.5), (9, first + 3.5), (3.5, first), (8.5, first + 4)):
                edge = around(third, top + cell * row, left + cell * column)
                assert np.abs(edge - colour).max(axis=-1).min() < 40


def around(picture: NDArray[Any], y: float, x: float) -> NDArray[Any]:
    """Three by three pixels."""
    return picture[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2]


# ---- single objects --------------------------------------------------------------------------------------------------


def squares() -> Mask:
    """Two squares of 9 pixels that touch, and one by itself."""
    ids = np.zeros((40, 20, 1), np.uint8)
    ids[3:12, 3:12], ids[12:21, 3:12], ids[25:34, 3:12] = 1, 2, 3
    return Mask(ids, picture_grid(ids.shape))


def test_objects_of_a_predicted_mask_are_parted_written_and_scored(tmp_path: Path) -> None:
    reference, found = tmp_path / "reference.png", tmp_path / "found.png"
    write_mask(squares(), reference)
    write_mask(replace(squares(), array=boundary_classes(squares().array)), tmp_path / "mask.png")
    result = score_case("a", tmp_path / "mask.png", reference, found, 1, 2)
    assert (result.case, result.score.n_predicted, result.score.f1, result.reason) == ("a", 3, 1.0, "")
    assert score_instances(read_mask(found).array, squares().array).matches == (3,) * 10


@pytest.mark.parametrize("what", ["gone", "damaged", "turned"])
def test_objects_without_a_usable_prediction_count_as_missed(what: str, tmp_path: Path) -> None:
    reference, mask, found = (tmp_path / f"{name}.png" for name in ("reference", "mask", "found"))
    write_mask(squares(), reference)
    found.write_bytes(b"of an earlier model")
    if what == "damaged":
        mask.write_bytes(b"no picture")
    if what == "turned":  # the same shape on another place
        write_mask(replace(squares(), geometry=picture_grid(squares().array.shape, 3)), mask)
    result = score_case("a", mask, reference, found, 1, 2)
    assert (result.score.n_reference, result.score.n_predicted, result.score.f1) == (3, 0, 0.0)
    assert {"gone": "missing", "damaged": "cannot be read", "turned": "differs"}[what] in result.reason
    assert not found.exists()


def scored(case: str, f1: float | None, precision: float | None = None, reason: str = "") -> InstanceResult:
    score = InstanceScore(n_reference=4, n_predicted=3, matches=(3, 2), f1=f1, average_precision=precision)
    return InstanceResult(case, score, reason)


def test_the_worst_come_first_and_what_was_not_segmented_not_at_all() -> None:
    results = [
        scored("good", 0.9, 0.8),
        scored("bad", 0.2, 0.1),
        scored("worse", 0.2, 0.05),
        scored("empty", None),
        scored("failed", 0.0, 0.0, "no mask"),
        scored("middle", 0.5, 0.3),
    ]
    assert [result.case for result in worst(results, 3)] == ["worse", "bad", "middle"]
    assert [result.case for result in worst(results, 9)] == ["worse", "bad", "middle", "good"]


def test_table_of_objects(tmp_path: Path) -> None:
    save_instances([scored("a", 0.5, 0.25), scored("b", None, reason="gone, lost")], tmp_path / "instances.csv")
    assert (tmp_path / "instances.csv").read_text() == (
        "case,dice,f1,average_precision,segmentation_quality,panoptic_quality,n_reference,n_predicted,matches,reason\n"
        "a,,0.5,0.25,,,4,3,3 2,\n"
        'b,,,,,,4,3,3 2,"gone, lost"\n'
    )
