"""The page: in a browser, from disk, it shows what was found, asks for nothing, and names in it stay names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browser import faults
from reporting import ALERT, CLOSE, GRID, gathered, mask, scored

from medseg.batch import places_of, predict_cases
from medseg.cases import find_cases
from medseg.errors import InputError
from medseg.evaluate import Evaluation
from medseg.io import write_mask
from medseg.pipeline import RunResult
from medseg.predict import Predictor
from medseg.report.gather import CaseFiles, Gathered, gather
from medseg.report.page import render, write_report
from medseg.report.words import NONE
from medseg.volume import Labels, Mask

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

Open = Callable[[Path], "Page"]

LABELS = Labels(values={"organ": 1, "lesion": 5})
BLOCKS = {
    "a": ({1: (2, 8), 5: (9, 12)}, {1: (2, 8), 5: (9, 12)}),
    "b": ({1: (2, 8), 5: (9, 12)}, {1: (4, 8)}),
    "c": ({1: (2, 10)}, {1: (2, 9)}),
    "d": ({1: (2, 8)}, None),
}
"""Perfect; half an organ and a missed lesion; a little less; no prediction."""


@pytest.fixture(scope="module")
def run_page(tiny_run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of ``tiny_run``."""
    return write_report(tiny_run.out, tmp_path_factory.mktemp("page") / "run.html")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Gathered:
    """An evaluation of four small cases without images."""
    folder = tmp_path_factory.mktemp("small")
    scored(folder, BLOCKS, LABELS)
    return gather(folder / "scores")


@pytest.fixture(scope="module")
def small_page(small: Gathered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its page."""
    return written(tmp_path_factory.mktemp("small_page"), render(small))


def column(page: Page, index: int) -> list[str]:
    return [row.strip() for row in page.locator(f"#table-cases tbody tr > :nth-child({index})").all_inner_texts()]


def is_drawn(canvas: Locator) -> bool:
    """Whether a canvas has more than one colour."""
    found: bool = canvas.evaluate(
        "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size > 1"
    )
    return found


def written(folder: Path, text: str) -> Path:
    path = folder / "page.html"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))
    return path


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_shows_all_of_it(run_page: Path, tiny_run: RunResult, open_file: Open) -> None:
    page = open_file(run_page)
    dice = f"{tiny_run.evaluation.mean.dice:.3f}"
    assert page.locator(".lead").inner_text().startswith(f"Mean Dice {dice} over 2 held-out cases and 2 classes;")
    assert "Research software, not a medical device." in page.locator(".notice").inner_text()
    assert "Image data of the cases are inside this file" in page.locator(".notice").inner_text()
    titles = ["Scores", "Cases", "Pictures", "Look at them slice by slice", "Training and prediction", "What was done"]
    assert page.locator("main h2").all_inner_texts() == titles
    for link in page.locator(".toc a").all():
        assert page.locator(link.get_attribute("href") or "").count() == 1
    assert sorted({*column(page, 1)}) == sorted(case.case for case in tiny_run.evaluation.cases)
    assert page.locator("figure.picture img").count() == 2
    assert all(page.evaluate("() => [...document.images].map(image => image.naturalWidth > 300)"))
    assert page.locator("svg[role=img]").count() == 1, "of the training: two cases make no plot"
    text = page.locator("main").inner_text()
    assert "A 3D U-Net was trained to segment organ and lesion in the dataset" in text
    assert "--iterations 40 --device cpu --precision 32 --set 'plan.patch_size=[8,16,16]'" in text
    assert str(tiny_run.out) not in run_page.read_text()


def test_the_viewers_of_a_run_draw(run_page: Path, open_file: Open) -> None:
    page = open_file(run_page)
    page.wait_for_selector(".viewer-status:not(:empty)")
    canvases = page.locator(".viewer canvas").all()
    assert len(canvases) == 2 * 3
    assert all(is_drawn(canvas) for canvas in canvases)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_run_is_accessible(scheme: str, run_page: Path, page: Page, open_file: Open) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    open_file(run_page)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert faults(page) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]


def test_the_page_fits_a_phone(run_page: Path, page: Page, open_file: Open) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    open_file(run_page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert faults(page) == []


def test_the_page_prints_with_nothing_folded_away(run_page: Path, page: Page, open_file: Open) -> None:
    open_file(run_page)
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == page.locator("details").count()


def test_niivue_is_once_in_the_page_where_it_was_downloaded(
    niivue: Path, tiny_run: RunResult, run_page: Path, open_file: Open, tmp_path: Path
) -> None:
    path = write_report(tiny_run.out, tmp_path / "with.html")
    assert path.stat().st_size - run_page.stat().st_size == pytest.approx(niivue.stat().st_size, rel=0.01)
    page = open_file(path)
    page.wait_for_selector(".viewer-status:not(:empty)")
    assert page.locator("script.niivue").count() == 1
    buttons = page.get_by_role("button", name=re.compile("3-D"))
    assert buttons.count() == 2
    buttons.first.click()
    page.wait_for_selector(".viewer-3d canvas")


def test_equal_results_give_equal_pages(small: Gathered, small_page: Path) -> None:
    assert render(small) == small_page.read_text()


# ---- what moves ------------------------------------------------------------------------------------------------------


def test_cases_are_sorted_by_click_and_by_keyboard(small_page: Path, open_file: Open) -> None:
    page = open_file(small_page)
    # d failed; b has no lesion and half an organ; both empty lesions of c have no score and stay at the end
    first = [
        ("b", "lesion"),
        ("d", "lesion"),
        ("d", "organ"),
        ("b", "organ"),
        ("c", "organ"),
        ("a", "lesion"),
        ("a", "organ"),
    ]
    shown = list(zip(column(page, 1), column(page, 2), strict=True))
    assert sorted(shown[:3]) == sorted(first[:3])
    assert shown[3:5] == first[3:5]
    assert shown[-1] == ("c", "lesion")
    dice = page.locator("#table-cases th", has_text="Dice")
    assert dice.get_attribute("aria-sort") == "ascending"
    dice.locator("button").click()
    assert dice.get_attribute("aria-sort") == "descending"
    values = column(page, 4)
    assert values == [*sorted(values[:-1], reverse=True), NONE]
    distance = page.locator("#table-cases th", has_text="HD95")
    distance.locator("button").focus()
    page.keyboard.press("Enter")
    assert distance.get_attribute("aria-sort") == "descending", "the worst first"
    assert dice.get_attribute("aria-sort") == "none"
    lengths = [float(text) for text in column(page, 6)[:-1]]
    assert lengths == sorted(lengths, reverse=True)
    page.keyboard.press("Space")
    assert distance.get_attribute("aria-sort") == "ascending"
    assert column(page, 6)[-1] == NONE
    page.locator("#table-cases th button", has_text="Case").click()
    assert column(page, 1) == sorted(column(page, 1))


def test_rows_are_filtered_by_words(small_page: Path, open_file: Open) -> None:
    page = open_file(small_page)
    visible = page.locator("#table-cases tbody tr:visible")
    assert visible.count() == 8
    box = page.get_by_label("Filter rows by words")
    box.fill("LESION missed")
    assert [row.split()[0] for row in visible.all_inner_texts()] == ["b"]
    assert page.locator("#filtered").inner_text() == "1 of 8 rows"
    box.fill("nothing of it")
    assert visible.count() == 0
    box.fill("")
    assert page.locator("#filtered").inner_text() == "8 rows"


def test_the_methods_are_copied_or_selected(run_page: Path, page: Page, open_file: Open) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_file(run_page)
    page.get_by_role("button", name="Copy the text").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("A 3D U-Net was trained")


# ---- other folders ---------------------------------------------------------------------------------------------------


def test_the_page_of_an_evaluation_lists_what_failed(small_page: Path, open_file: Open) -> None:
    page = open_file(small_page)
    assert page.locator(".lead").inner_text().endswith("over 4 cases and 2 classes; 1 case failed, 1 structure missed.")
    assert page.locator("svg[role=img]").count() == 3 + 1 + 2
    problems = page.locator("section[aria-labelledby=problems]").inner_text()
    assert "Failed cases (1)" in problems
    assert "d: …/d: there is no prediction" in problems
    assert "Without a mask to show, as they failed: d." in page.locator("main").inner_text()
    assert faults(page) == []


def test_the_page_of_predictions_has_a_mosaic_and_every_case(
    predictor: Predictor, images: Path, open_file: Open, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (images / "cut.nii.gz").write_bytes((images / "a.nii.gz").read_bytes()[:200])
    predict_cases(predictor, find_cases(images), out, found_at=places_of([images]))
    page = open_file(write_report(out))
    assert (out / "report.html").is_file()
    assert page.locator(".lead").inner_text().startswith("2 masks of 3 images; 1 failed")
    assert column(page, 1)[0] == "cut"
    assert "…/cut.nii.gz: " in page.locator("section[aria-labelledby=problems]").inner_text()
    assert page.locator("figure.picture img").get_attribute("alt") is not None
    page.wait_for_selector(".viewer-status:not(:empty)")
    assert all(is_drawn(canvas) for canvas in page.locator(".viewer canvas").all())
    assert faults(page) == []
    assert str(tmp_path) not in (out / "report.html").read_text()


def test_a_run_without_scores_and_dataset_has_a_page(tiny_run: RunResult, open_file: Open, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run.out, tmp_path / "run"))
    (run / "run.json").unlink()
    (run / "evaluation" / "evaluation.json").write_text('{"schema_version": 0}')
    page = open_file(write_report(run))
    assert page.locator(".lead").inner_text().startswith("2 masks of 2 images; 0 failed")
    lacking = page.locator("section[aria-labelledby=done] .reasons").inner_text()
    assert "evaluation.json cannot be used" in lacking
    assert "The dataset is not where it was" in lacking
    assert page.locator("figure.picture img").count() == 1
    shutil.rmtree(run / "predictions")
    shutil.rmtree(run / "training")
    page = open_file(write_report(run))
    assert page.locator(".lead").inner_text() == "There are no scores and no predictions here."


def test_a_folder_that_cannot_be_read_gives_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


# ---- names that would be markup --------------------------------------------------------------------------------------


def hostile(folder: Path) -> Gathered:
    """An evaluation whose cases, classes, dataset, reasons and flags are markup, with pictures and viewers."""
    labels = Labels(values={ALERT: 1, CLOSE: 5}, regions={"<b>all</b>": (1, 5)})
    found = scored(folder, {"a": BLOCKS["a"], "b": BLOCKS["b"], "d": BLOCKS["d"]}, labels)
    names = {"a": ALERT, "b": CLOSE, "d": "'\"><svg onload=alert(3)> \udcff"}
    cases = tuple(case.model_copy(update={"case": names[case.case]}) for case in found.cases)
    evaluation = found.model_copy(
        update={"cases": cases, "unscored": {ALERT: CLOSE}, "extra": (ALERT,), "matched": CLOSE}
    )
    files = {
        names[name]: CaseFiles((), folder / "references" / f"{name}.nii.gz", folder / "predictions" / f"{name}.nii.gz")
        for name in "ab"
    }
    run = {"dataset": ALERT, "settings": {"device": CLOSE}, "versions": {"medseg": ALERT}, "folds": {CLOSE: {}}}
    return gathered(evaluation, name=CLOSE, files=files, run=run, notes=(ALERT,))


def test_names_stay_names(page: Page, open_file: Open, tmp_path: Path) -> None:
    said: list[str] = []
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss())[0])  # type: ignore[func-returns-value]
    found = hostile(tmp_path)
    open_file(written(tmp_path, render(found)))
    page.wait_for_selector(".viewer-status:not(:empty)")
    assert said == []
    assert page.locator("img[onerror], svg[onload], h1 *, td b, h1 script").count() == 0
    assert page.locator("h1").inner_text() == f"{CLOSE}: evaluation"
    assert {*column(page, 1)} == {ALERT, CLOSE, "'\"><svg onload=alert(3)> \\udcff"}
    assert {*column(page, 2)} == {ALERT, CLOSE, "<b>all</b>"}
    bodies = [json.loads(text) for text in page.locator("script.viewer-data").all_inner_texts()]
    assert {body["case"] for body in bodies} == {ALERT, CLOSE}
    assert faults(page) == []


# ---- size ------------------------------------------------------------------------------------------------------------


def test_two_hundred_cases_fit_into_fifteen_megabytes(tmp_path: Path) -> None:
    """Noise, and blocks as masks, can hardly be compressed: what there is no room for is left out, and said."""
    import nibabel

    rng = np.random.default_rng(0)
    image = tmp_path / "noise.nii.gz"
    array = rng.integers(0, 1000, (100, 100, 100)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), image)  # type: ignore[no-untyped-call]
    noisy = np.kron(rng.choice([0, 1, 5], (20, 20, 20)), np.ones((5, 5, 5))).astype(np.uint8)
    grid = replace(GRID, shape=(100, 100, 100), affine=np.eye(4))
    write_mask(Mask(noisy, grid), tmp_path / "reference.nii.gz")
    write_mask(Mask(np.roll(noisy, 3, 0), grid), tmp_path / "prediction.nii.gz")
    found = scored(tmp_path, {"a": BLOCKS["a"]}, LABELS)
    cases = tuple(found.cases[0].model_copy(update={"case": f"case_{n:03d}"}) for n in range(200))
    evaluation: Evaluation = found.model_copy(update={"cases": cases})
    files = CaseFiles((image,), tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz")
    text = render(gathered(evaluation, files={case.case: files for case in cases}))
    niivue = 2.4e6  # what it adds, where it is
    assert 9e6 < len(text.encode()) < 15e6 - niivue
    drawn, viewers = text.count("data:image/png"), text.count('class="viewer-data"')
    assert drawn >= 6
    assert viewers >= 3
    assert text.count("Without a picture, as the page would be too large.") == 10 - drawn > 0
    assert text.count("Without a viewer, as the page would be too large.") == 5 - viewers > 0


def test_a_mask_value_without_a_name_is_said_below_the_picture(tmp_path: Path) -> None:
    found = scored(tmp_path, {"a": BLOCKS["a"]}, LABELS)
    write_mask(mask({1: (2, 8), 9: (9, 12)}), tmp_path / "predictions" / "a.nii.gz")
    text = render(gather(tmp_path / "scores"))
    assert "The prediction cannot be read: …/a.nii.gz: label values [9] have no name" in text
    assert found.cases[0].case in text
