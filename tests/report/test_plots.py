"""Plots: what they say in words and in marks, that they stand within a page, and that names are drawn as they are."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.errors import InputError
from medseg.evaluate import CaseScores, ClassSummary, Evaluation, Means, Spread
from medseg.metrics import MEASURES, ClassScore, Status
from medseg.report.curves import COLUMNS
from medseg.report.plots import bland_altman, dice_by_volume, strip_plot, training_curves
from medseg.volume import Labels

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ("_a$x^2$</script>", "b & \"c\" --> \n\x00 <svg onload='x'>")


def score(
    name: str, status: Status, dice: float | None, reference_ml: float, prediction_ml: float | None
) -> ClassScore:
    measures: dict[str, Any] = {} if dice is None else dict.fromkeys(MEASURES, dice)
    if dice is not None:
        measures["hd95_mm"] = 100.0 if status != "scored" else 1.0
    return ClassScore(name=name, status=status, reference_ml=reference_ml, prediction_ml=prediction_ml, **measures)


def evaluation(columns: dict[str, Sequence[ClassScore]], regions: int = 0) -> Evaluation:
    """An evaluation of scores by class; the last ``regions`` of them are regions."""
    names = list(columns)
    classes = names[: len(names) - regions]
    values = {name: n for n, name in enumerate(classes, start=1)}
    unions = {name: tuple(values.values()) for name in names[len(classes) :]}
    rows = zip(*columns.values(), strict=True)
    cases = tuple(CaseScores(case=f"case_{n}", scores=row) for n, row in enumerate(rows))
    return Evaluation(
        labels=Labels(values=values, regions=unions),
        tolerance_mm=2.5,
        mean=Means(),
        mean_low=Means(),
        mean_high=Means(),
        classes=tuple(summary(name, scores) for name, scores in columns.items()),
        cases=cases,
    )


def summary(name: str, scores: Sequence[ClassScore]) -> ClassSummary:
    count = [s.status for s in scores].count
    spreads = {measure: spread([getattr(s, measure) for s in scores]) for measure in MEASURES}
    return ClassSummary(
        name=name,
        n=len(scores) - count("true_negative"),
        n_true_negative=count("true_negative"),
        n_empty_reference=0,
        n_missed=count("missed"),
        n_false_positive=count("false_positive"),
        n_failed=count("failed"),
        worst=(),
        **spreads,
    )


def spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    p05, p25, median, p75, p95 = np.percentile(known, (5, 25, 50, 75, 95))
    mean = float(np.mean(known))
    many = len(known) > 4
    low, high = (mean - 0.01, mean + 0.01) if many else (None, None)
    return Spread(mean=mean, low=low, high=high, median=median, p25=p25, p75=p75, p05=p05, p95=p95)


def of_all_kinds(name: str) -> list[ClassScore]:
    return [
        score(name, "scored", 0.9, 10.0, 11.0),
        score(name, "scored", 0.8, 20.0, 19.0),
        score(name, "scored", 0.7, 30.0, 33.0),
        score(name, "missed", 0.0, 2.0, 0.0),
        score(name, "false_positive", 0.0, 0.0, 4.0),
        score(name, "failed", 0.0, 5.0, None),
        score(name, "true_negative", None, 0.0, 0.0),
    ]


def many(classes: int, cases: int) -> Evaluation:
    rng = np.random.default_rng(0)
    columns = {}
    for n in range(classes):
        dice, volume = rng.beta(20, 3, cases), rng.lognormal(2, 1, cases)
        columns[f"class_{n}"] = [
            score(f"class_{n}", "scored", float(d), float(v), float(v * 1.1)) for d, v in zip(dice, volume, strict=True)
        ]
    return evaluation(columns)


def label_of(svg: str) -> str:
    return ET.fromstring(svg).attrib["aria-label"]


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


def marks(svg: str) -> int:
    """Copies of markers, those of legends and ticks included."""
    return svg.count("<use ")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rows = [f"{n},{n * 0.5},{1 / n},{0.01 * (1 - n / 21)},{'' if n % 5 else n / 40}" for n in range(1, 21)]
    path = tmp_path / "log.csv"
    path.write_text("\n".join([",".join(COLUMNS), *rows, ""]))
    return path


def every_plot(found: Evaluation, log: Path) -> list[str]:
    plots = [strip_plot(found, measure) for measure in ("dice", "hd95_mm", "volume_difference_ml")]
    return [*plots, bland_altman(found, found.classes[0].name), dice_by_volume(found), training_curves({0: log})]


# All of them


def test_plots_stand_within_a_page_and_take_its_colours(log: Path) -> None:
    found = evaluation({"organ": of_all_kinds("organ"), "lesion": of_all_kinds("lesion")})
    for svg in every_plot(found, log):
        root = ET.fromstring(svg)
        assert svg.startswith("<svg ")
        assert root.attrib["role"] == "img"
        assert "viewBox" in root.attrib
        assert "currentColor" in svg
        assert not re.search(r"#010203|<\?xml|<!DOCTYPE|<!--|<style|<metadata|<script|<dc:", svg)
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg)  # nothing is fetched


def test_ids_are_of_one_plot_alone_and_all_references_lead_somewhere(log: Path) -> None:
    found = evaluation({"organ": of_all_kinds("organ"), "lesion": of_all_kinds("lesion")})
    seen: set[str] = set()
    for svg in every_plot(found, log):
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(ids)
        seen |= set(ids)


def test_the_same_evaluation_gives_the_same_text(log: Path) -> None:
    found = evaluation({"organ": of_all_kinds("organ")})
    assert every_plot(found, log) == every_plot(found, log)


def test_names_are_drawn_as_they_are(log: Path) -> None:
    found = evaluation({name: of_all_kinds(name) for name in HOSTILE}, regions=1)
    shown = ["_a$x^2$</script>", 'b & "c" -->    <svg onload=\'x…']
    strip, _, _, limits, volumes, _ = every_plot(found, log)
    assert [name for name in shown if any(name in text for text in texts(strip))] == shown
    assert shown[0] in texts(limits)
    assert set(shown) <= set(texts(volumes))
    assert shown[0] in label_of(strip)
    assert "</script>" not in strip + limits + volumes


def test_names_that_look_like_marks_of_our_own_stay_as_they_are() -> None:
    name = 'x id="a" url(#b) #010203'
    assert name in texts(bland_altman(evaluation({name: of_all_kinds(name)}), name))


def test_plots_of_many_cases_stay_small() -> None:
    two = many(2, 200)
    for svg in (strip_plot(two, "dice"), bland_altman(two, "class_0"), dice_by_volume(two)):
        assert len(svg) < 150_000
    most = many(25, 200)
    for svg in (strip_plot(most, "dice"), dice_by_volume(most)):
        assert len(svg) < 400_000
        assert "data:image/png;base64," in svg
    assert {f"class_{n} (n = 200)" for n in range(25)} <= set(texts(strip_plot(most, "dice")))


# One by one


def test_the_strip_plot_has_a_mark_a_case_and_says_what_they_are() -> None:
    svg = strip_plot(evaluation({"organ": of_all_kinds("organ"), "lesion": of_all_kinds("lesion")}), "dice")
    said = texts(svg)
    # Dice 0.9, 0.8, 0.7 and three times 0
    assert label_of(svg) == ("Strip plot of 7 cases: Dice, higher is better. Medians: organ 0.35, lesion 0.35.")
    assert "Dice, higher is better" in said
    for words in ("scored (6)", "missed: prediction empty (2)", "failed: no usable prediction (2)"):
        assert words in said
    assert "false positive: reference empty (2)" in said
    one = strip_plot(evaluation({"organ": [s for s in of_all_kinds("organ") if s.status == "scored"]}), "dice")
    two = strip_plot(evaluation({"organ": [s for s in of_all_kinds("organ") if s.status == "scored"] * 2}), "dice")
    assert marks(two) - marks(one) == 3


def test_no_mark_hides_another_of_the_same_value() -> None:
    scores = [score("organ", status, 0.0, 1.0, 1.0) for status in ("scored", "missed", "false_positive", "failed")] * 5
    places = re.findall(r'<use [^>]*x="([-\d.]+)" y="([-\d.]+)"', strip_plot(evaluation({"organ": scores}), "dice"))
    assert len(places) == len(set(places)) > 20


def test_the_limits_of_agreement_lie_within_the_frame() -> None:
    svg = bland_altman(evaluation({"organ": of_all_kinds("organ")[:2]}), "organ")  # differences 1 and -1
    paths = [(path.get("d", ""), path.get("style", "")) for path in ET.fromstring(svg).iter(f"{SVG}path")]
    _, frame = (heights(d) for d, style in paths if style == "fill: none")  # of the picture, and of the axes
    limits = [heights(d)[0] for d, style in paths if "dasharray" in style]
    assert len(limits) == 2
    assert min(frame) + 5 < min(limits) < max(limits) < max(frame) - 5


def heights(path: str) -> list[float]:
    """How far below the upper edge of the picture the corners of a path are."""
    return [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", path)]


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ("nsd", "NSD at 2.5 mm, higher is better"),
        ("assd_mm", "ASSD (mm), lower is better"),
        ("volume_difference_percent", "volume difference (%), 0 is best"),
        ("sensitivity", "sensitivity, higher is better"),
    ],
)
def test_the_axis_names_measure_unit_tolerance_and_direction(measure: str, words: str) -> None:
    assert words in texts(strip_plot(evaluation({"organ": of_all_kinds("organ")}), measure))


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_can_be_drawn_with_few_cases_or_none(measure: str) -> None:
    for scores in (of_all_kinds("organ")[:1], of_all_kinds("organ")[-1:], of_all_kinds("organ")[5:6]):
        assert strip_plot(evaluation({"organ": scores}), measure).startswith("<svg ")


def test_distances_of_missed_cases_do_not_hide_the_others() -> None:
    far = evaluation(
        {"organ": [score("organ", "scored", 0.9, 1.0, 1.0)] * 9 + [score("organ", "missed", 0.0, 1.0, 0.0)]}
    )
    near = evaluation({"organ": [score("organ", "scored", 0.9, 1.0, 1.0)] * 9})
    assert "HD95 (mm), lower is better (log)" in texts(strip_plot(far, "hd95_mm"))
    assert "100" in texts(strip_plot(far, "hd95_mm"))
    assert "HD95 (mm), lower is better" in texts(strip_plot(near, "hd95_mm"))


def test_the_scale_ends_at_one_and_begins_at_zero_or_near_the_worst_case() -> None:
    good = evaluation({"organ": [score("organ", "scored", dice, 1.0, 1.0) for dice in (0.87, 0.93)]})
    bad = evaluation({"organ": of_all_kinds("organ")})
    for draw in (lambda found: strip_plot(found, "dice"), dice_by_volume):
        assert ends_of_scale(draw(good)) == (0.8, 1.0)
        assert ends_of_scale(draw(bad)) == (0.0, 1.0)


def ends_of_scale(svg: str) -> tuple[float, float]:
    """The lowest and the highest number on the upright axis; its numbers end where the axis begins."""
    ticks = [text for text in ET.fromstring(svg).iter(f"{SVG}text") if "text-anchor: end" in text.attrib["style"]]
    numbers = [float(tick.text or "") for tick in ticks]
    return min(numbers), max(numbers)


def test_bias_and_limits_of_agreement_are_those_of_bland_and_altman() -> None:
    svg = bland_altman(evaluation({"organ": of_all_kinds("organ")}), "organ")
    # differences 1, -1, 3, -2, 4: mean 1; deviations 0, -2, 2, -3, 3: variance 26 / 4, 1.96 sd = 4.997
    assert label_of(svg) == (
        "Bland-Altman plot of the volume of organ, 5 cases: upper limit +6 ml, bias +1 ml, lower limit -4 ml."
    )
    said = texts(svg)
    for words in ("upper limit +6 ml", "bias +1 ml", "lower limit -4 ml"):
        assert words in said
    assert "left out: 1 case failed, 1 case empty in both" in said


def test_one_case_has_a_bias_and_no_limits_and_none_has_nothing() -> None:
    one = bland_altman(evaluation({"organ": of_all_kinds("organ")[1:2]}), "organ")
    assert "bias -1 ml" in texts(one)
    assert "limit" not in one.replace("no limits", "")
    none = bland_altman(evaluation({"organ": of_all_kinds("organ")[5:]}), "organ")
    assert "no case with volumes" in texts(none)
    assert "no limits of agreement" in label_of(none)


def test_volumes_get_a_log_axis_where_they_span_more_than_tenfold() -> None:
    scores = of_all_kinds("organ")
    wide, narrow = evaluation({"organ": scores}), evaluation({"organ": scores[:3]})  # 2 to 30 ml, and 10 to 30
    assert {"10", "not shown: 1 of"} <= set(texts(dice_by_volume(wide))) | {
        text.partition("\n")[0] for text in texts(dice_by_volume(wide))
    }
    assert "20" not in texts(dice_by_volume(wide))
    assert "20" in texts(dice_by_volume(narrow)) or "20.0" in texts(dice_by_volume(narrow))
    assert {"missed", "failed"} <= set(texts(dice_by_volume(wide)))
    assert not {"missed", "failed"} & set(texts(dice_by_volume(narrow)))
    assert label_of(dice_by_volume(wide)).startswith("Dice against reference volume, 5 structures of 7 cases.")


def test_classes_have_the_colours_of_pictures_and_regions_others() -> None:
    found = evaluation({name: of_all_kinds(name) for name in ("organ", "lesion", "both")}, regions=1)
    svg = dice_by_volume(found)
    assert all(colour in svg for colour in ("#e69f00", "#56b4e9", "#009e73"))


def test_only_empty_references_leave_an_empty_plot() -> None:
    svg = dice_by_volume(evaluation({"organ": of_all_kinds("organ")[-1:]}))
    assert label_of(svg) == "Dice against reference volume, 0 structures of 1 case. Classes: organ."


def test_curves_have_a_line_a_fold_and_say_the_best_dice(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text(",".join(COLUMNS) + "\n1,0.5,1.0,0.01,\n2,1.0,nan,0.0,\n")
    svg = training_curves({3: log, 1: other})
    assert label_of(svg).endswith("Best validation Dice: fold 3 0.500.")
    said = texts(svg)
    assert [text for text in said if text.startswith("fold")] == ["fold 1", "fold 3"]
    assert {"training loss", "validation Dice", "learning rate"} <= set(said)
    assert "no validation was run" in texts(training_curves({1: other}))
    assert "no validation was run" in label_of(training_curves({1: other}))


def test_curves_of_long_trainings_are_thinned(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    rng = np.random.default_rng(0)
    rows = (f"{n},{n},{rng.random():.4f},0.01,{'' if n % 50 else 0.5}" for n in range(1, 20_001))
    log.write_text("\n".join([",".join(COLUMNS), *rows, ""]))
    assert len(training_curves({0: log})) < 150_000


def test_a_log_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        training_curves({0: tmp_path / "log.csv"})
