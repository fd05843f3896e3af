"""The viewer of a report: what is packed, by numbers worked out by hand; and what a browser makes of it, from disk."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from browser import faults
from numpy.typing import NDArray
from PIL import Image

from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Geometry
from medseg.io import read_mask, read_volume
from medseg.io.picture import picture_grid
from medseg.report import viewer
from medseg.report.viewer import MARGIN_MM, MOST_VOXELS, pack
from medseg.volume import Labels, Mask, Volume

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

Open = Callable[[Path], "Page"]

LABELS = Labels(values={"organ": 7, "lesion": 300}, colours={"organ": (230, 159, 0), "lesion": (86, 180, 233)})


def grid(shape: tuple[int, int, int], *diagonal: float, origin: tuple[float, float, float] = (0, 0, 0)) -> Geometry:
    affine = np.diag([*(diagonal or (1.0, 1.0, 1.0)), 1.0])
    affine[:3, 3] = origin
    return Geometry(shape, affine)


def bytes_of(body: dict[str, Any], part: str) -> NDArray[np.uint8]:
    """What a browser unpacks, in the order of the axes (R, A, S); with channels first where there are several."""
    flat = np.frombuffer(gzip.decompress(base64.b64decode(body[part])), np.uint8)
    shape = body["shape"] if part != "image" or body["channels"] == 1 else [body["channels"], *body["shape"]]
    return flat.reshape(shape, order="F")


def masked(shape: tuple[int, int, int], *places: tuple[tuple[int, int, int], int], on: Geometry | None = None) -> Mask:
    array = np.zeros(shape, np.uint16)
    for place, value in places:
        array[place] = value
    return Mask(array, on or grid(shape))


# ---- what is packed --------------------------------------------------------------------------------------------------


def test_voxels_are_in_the_order_right_front_head_wherever_they_were() -> None:
    array = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    there = Volume(array, grid((2, 3, 4)))
    body = pack("a", there, None, None, LABELS)
    assert body["shape"] == [2, 3, 4]
    # the same voxels stored as (S, L, P): axis 0 is the old axis 2, axes 1 and 2 the old 0 and 1, backwards
    turned = array.transpose(0, 3, 1, 2)[:, :, ::-1, ::-1]
    affine = np.array([[0, -1, 0, 1], [0, 0, -1, 2], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
    assert pack("a", Volume(turned, Geometry((4, 2, 3), affine)), None, None, LABELS) == body
    image = bytes_of(body, "image")
    assert image[0, 0, 0] == 0
    assert image[1, 2, 3] == 255
    assert (np.diff(image.astype(int), axis=2) > 0).all()  # as the numbers along the last axis


def test_masks_are_indices_whatever_their_values() -> None:
    mask = masked((4, 4, 4), ((1, 1, 1), 7), ((2, 2, 2), 300))
    body = pack("a", None, mask, None, LABELS)
    indices = bytes_of(body, "reference")
    assert (indices[1, 1, 1], indices[2, 2, 2], indices.sum()) == (1, 2, 3)
    assert [label["name"] for label in body["labels"]] == ["organ", "lesion"]
    assert body["labels"][1]["colour"] == [86, 180, 233]
    assert body["image"] is None
    assert body["prediction"] is None


def test_a_value_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"label values \[8\] have no name"):
        pack("a", None, masked((4, 4, 4), ((1, 1, 1), 8)), None, LABELS)


def test_voxels_that_no_one_labelled_are_named_so() -> None:
    labels = Labels(values={"organ": 1}, ignore=9)
    body = pack("a", None, masked((4, 4, 4), ((1, 1, 1), 9)), None, labels)
    assert body["labels"][bytes_of(body, "reference")[1, 1, 1] - 1]["name"] == "not labelled"


def test_shown_is_the_box_around_both_masks_and_its_margin() -> None:
    shape, on = (100, 60, 20), grid((100, 60, 20), 1.0, 2.0, 5.0, origin=(-10.0, 0.0, 0.0))
    reference = masked(shape, ((40, 30, 10), 7), on=on)
    prediction = masked(shape, ((43, 30, 10), 7), on=on)
    body = pack("a", None, reference, prediction, LABELS)
    # 20 mm are 20, 10 and 4 voxels
    assert MARGIN_MM == 20.0
    assert body["shape"] == [20 + 4 + 20, 10 + 1 + 10, 4 + 1 + 4]
    assert body["affine"] == [[1.0, 0, 0, 10.0], [0, 2.0, 0, 40.0], [0, 0, 5.0, 30.0], [0, 0, 0, 1.0]]
    assert np.argwhere(bytes_of(body, "reference")).tolist() == [[20, 10, 4]]
    assert np.argwhere(bytes_of(body, "prediction")).tolist() == [[23, 10, 4]]
    assert body["note"] == "Cropped to 20 mm around the structures."


def test_an_image_without_labels_is_shown_whole_from_its_middle() -> None:
    empty = masked((30, 20, 10))
    body = pack("a", Volume(np.zeros((1, 30, 20, 10)), empty.geometry), empty, empty, LABELS)
    assert body["shape"] == [30, 20, 10]
    assert body["start"] == [15, 10, 5]
    assert body["note"] == ""


def test_the_finest_axes_are_shrunk_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "MOST_VOXELS", 9)
    array = np.arange(36, dtype=np.int16).reshape(1, 6, 3, 2)
    body = pack("a", Volume(array, grid((6, 3, 2), 1.0, 1.5, 4.0)), None, None, LABELS)
    # 36 voxels; the first axis by 2 (now 2 mm): 18; the second by 2 (now 3 mm): 3 x 2 x 2 = 12; the first by 3: 8
    assert body["shape"] == [2, 2, 2]
    assert body["spacing_mm"] == [3.0, 3.0, 4.0]
    assert body["note"] == "Shown at 3 x 3 x 4 mm."
    # centres of the first block: between voxels 0 and 2, and 0 and 1
    assert [row[3] for row in body["affine"][:3]] == [1.0, 0.75, 0.0]
    # its mean: voxels i * 6 + j * 2 of i in 0, 1, 2 and j in 0, 1; the last block of the second axis holds j = 2 alone
    low, high = body["range"]
    means = bytes_of(body, "image") / 255 * (high - low) + low
    expected = [[[7.0, 8.0], [10.0, 11.0]], [[25.0, 26.0], [28.0, 29.0]]]
    assert means == pytest.approx(np.array(expected), abs=(high - low) / 255)


def test_a_shrunk_mask_keeps_the_middle_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "MOST_VOXELS", 4)
    mask = masked((7, 1, 1), ((1, 0, 0), 7), ((4, 0, 0), 300), ((6, 0, 0), 7), on=grid((7, 1, 1)))
    body = pack("a", None, mask, None, LABELS)
    # blocks 0-1, 2-3, 4-5, 6: the middle of a block of two is its second voxel, that of one its only
    assert bytes_of(body, "reference").ravel().tolist() == [1, 0, 0, 1]


def test_a_large_case_stays_within_the_budget_of_a_page() -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 1000, (1, 160, 160, 80), dtype=np.int16)  # noise, which does not compress
    mask = Mask((rng.random((160, 160, 80)) < 0.5).astype(np.uint8) * 7, grid((160, 160, 80)))
    body = pack("a", Volume(array, mask.geometry), mask, mask, LABELS)
    assert np.prod(body["shape"]) <= MOST_VOXELS
    assert len(json.dumps(body)) < 2_000_000
    assert body == pack("a", Volume(array, mask.geometry), mask, mask, LABELS)


def test_it_begins_where_the_masks_differ_most() -> None:
    reference, prediction = masked((12, 12, 12)), masked((12, 12, 12))
    reference.array[2:10, 2:10, 2:10] = 7
    prediction.array[2:10, 2:10, 2:10] = 7
    prediction.array[3, 4:6, 5] = 0
    assert pack("a", None, reference, prediction, LABELS)["start"] == [3, 5, 5]


def test_it_begins_where_the_masks_differ_most_also_turned_cropped_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "MOST_VOXELS", 50 * 50 * 50)
    on = Geometry((80, 80, 80), np.diag([-1.0, -1.0, 1.0, 1.0]))
    reference, prediction = masked((80, 80, 80), ((30, 40, 50), 7), on=on), masked((80, 80, 80), on=on)
    body = pack("a", None, reference, prediction, LABELS)
    # turned 49, 39, 50; cropped to 41 voxels from 29, 19, 30
    assert body["shape"] == [41, 41, 41]
    assert body["start"] == [20, 20, 20]
    monkeypatch.setattr(viewer, "MOST_VOXELS", 21 * 21 * 21)
    assert pack("a", None, reference, prediction, LABELS)["start"] == [10, 10, 10]


def test_values_that_are_not_finite_are_the_darkest() -> None:
    array = np.linspace(100, 200, 64).reshape(1, 4, 4, 4)
    array[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    body = pack("a", Volume(array, grid((4, 4, 4))), None, None, LABELS)
    assert bytes_of(body, "image")[0, 0, :3].tolist() == [0, 0, 0]
    assert 100 < body["range"][0] < body["range"][1] <= 200


def test_an_image_of_one_value_and_one_of_none_can_be_shown() -> None:
    for value in (5.0, np.nan):
        body = pack("a", Volume(np.full((1, 3, 3, 3), value), grid((3, 3, 3))), None, None, LABELS)
        assert body["range"][0] < body["range"][1]
        assert (bytes_of(body, "image") == 0).all()


def test_the_widest_window_is_twice_the_first_as_far_as_there_are_values() -> None:
    array = np.linspace(0, 1000, 1001).reshape(1, 1001, 1, 1)
    array[0, -1] = 1e6
    body = pack("a", Volume(array, grid((1001, 1, 1))), None, None, LABELS)
    low, high = body["window"]
    assert (low, high) == pytest.approx((5.0, 995.0))
    assert body["range"] == pytest.approx([0.0, 995.0 + 495.0])


def test_a_ct_is_windowed_by_its_structure() -> None:
    array = np.full((1, 40, 40, 40), -1000, np.int16)
    mask = masked((40, 40, 40))
    mask.array[10:20, 10:20, 10:20] = 7
    array[0, 10:20, 10:20, 10:20] = 60
    far_off = masked((40, 40, 40))
    far_off.array[20:40, 20:40, 20:40] = 7
    body = pack("a", Volume(array, mask.geometry), mask, far_off, LABELS)
    assert body["window"] == [-160, 60 + 150]  # fat is not black
    assert pack("a", Volume(array, mask.geometry), None, None, LABELS)["window"] == [-160, 240]


def test_a_picture_is_whole_and_in_colours() -> None:
    array = np.zeros((3, 40, 30, 1), np.uint8)
    array[0, 3, 5] = 250  # red, in column 3 and row 5
    on = picture_grid((40, 30, 1))
    body = pack("a", Volume(array, on), masked((40, 30, 1), ((3, 5, 0), 7), on=on), None, LABELS)
    assert body["picture"] is True
    assert (body["shape"], body["channels"], body["range"]) == ([40, 30, 1], 3, [0.0, 250.0])
    # column 3 from the viewer's left is the fourth last voxel to the right of the patient
    assert np.argwhere(bytes_of(body, "image")).tolist() == [[0, 40 - 1 - 3, 30 - 1 - 5, 0]]
    assert bytes_of(body, "image").max() == 255


def test_another_grid_is_refused() -> None:
    image = Volume(np.zeros((1, 4, 4, 4)), grid((4, 4, 4)))
    with pytest.raises(GeometryMismatch, match="differs from the image's"):
        pack("a", image, masked((4, 4, 5)), None, LABELS)
    with pytest.raises(GeometryMismatch, match="differs from the reference's"):
        pack("a", None, masked((4, 4, 4)), masked((4, 4, 4), on=grid((4, 4, 4), 1, 1, 2)), LABELS)


def test_text_for_a_page_cannot_end_its_element() -> None:
    labels = Labels(values={"</script><script>alert(1)</script>": 1})
    text = viewer.as_json(pack("<!--", None, masked((2, 2, 2), ((0, 0, 0), 1)), None, labels))
    assert "<" not in text
    assert json.loads(text)["case"] == "<!--"


def test_niivue_is_not_there_before_it_is_downloaded() -> None:
    assert viewer.niivue_script() is None


def test_niivue_comes_with_its_licence_and_cannot_end_its_element(niivue: Path) -> None:
    code = viewer.niivue_script()
    assert code is not None
    assert code.startswith("/*\nNiiVue 0.69.0")
    assert "Copyright (c) 2021, Niivue" in code
    assert "</script" not in code.lower()
    assert "<!--" not in code
    assert len(code) > niivue.stat().st_size


# ---- in a browser ----------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Viewer</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark;
 --bg: #fff; --fg: #1a1a1a; --muted: #595959; --line: #ccc; --accent: #0b5cad; --panel: #f5f5f5; }
@media (prefers-color-scheme: dark) {
 :root { --bg: #15181c; --fg: #e6e6e6; --muted: #a8a8a8; --line: #444; --accent: #7ab7ff; --panel: #20252b; }
}
body { margin: 0 1rem; font: 16px/1.5 sans-serif; color: var(--fg); background: var(--bg); }
%s</style></head><body><main><h1>Viewer</h1>%s</main>%s<script>%s</script></body></html>"""

SECTION = """<section class="viewer" aria-label="Viewer %s"></section>
<script type="application/json" class="viewer-data">%s</script>"""


def written(folder: Path, *bodies: dict[str, Any]) -> Path:
    """A page of viewers, with NiiVue where that is there."""
    sections = "".join(SECTION % (n, viewer.as_json(body)) for n, body in enumerate(bodies))
    niivue = viewer.niivue_script()
    element = f'<script type="text/plain" class="niivue">{niivue}</script>' if niivue else ""
    path = folder / "page.html"
    path.write_text(PAGE % (viewer.asset("viewer.css"), sections, element, viewer.script()), encoding="utf-8")
    return path


def a_case() -> tuple[Volume, Mask, Mask]:
    """A grey image of 40 x 30 x 8 voxels of 1 x 1 x 5 mm with one bright corner, and masks apart from each other.

    Bright: right, front and head. Organ of the reference: the middle; of the prediction: 4 mm further left.
    """
    on = grid((40, 30, 8), 1.0, 1.0, 5.0)
    array = np.full((1, 40, 30, 8), 100, np.int16)
    array[0, :2, :2, :2] = 0
    array[0, 32:, 24:, 6:] = 200
    reference, prediction = masked((40, 30, 8), on=on), masked((40, 30, 8), on=on)
    reference.array[14:24, 10:20, 3:5] = 7
    prediction.array[10:20, 10:20, 3:5] = 7
    return Volume(array, on), reference, prediction


def pixels(canvas: Locator) -> NDArray[np.uint8]:
    """What is drawn: (rows, columns, 3)."""
    return decoded(base64.b64decode(canvas.evaluate("canvas => canvas.toDataURL().split(',')[1]")))


def decoded(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def settled(page: Page) -> None:
    """Wait until all that was asked for is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def said(page: Page) -> str:
    settled(page)
    return page.locator(".viewer-status").inner_text()


def count_of(page: Page, colour: tuple[int, int, int], plane: int = 0) -> int:
    """How many pixels of a plane are near a colour."""
    settled(page)
    drawn = pixels(page.locator(".viewer-planes canvas").nth(plane)).astype(int)
    return int((np.abs(drawn - colour).max(axis=-1) < 40).sum())


ORANGE = (230, 159, 0)


@pytest.fixture
def shown(open_file: Open, tmp_path: Path) -> Page:
    """A page with the viewer of ``a_case``."""
    page = open_file(written(tmp_path, pack("a case", *a_case(), LABELS)))
    page.wait_for_selector(".viewer-status:not(:empty)")
    settled(page)
    return page


def test_three_planes_are_drawn_with_the_right_aspect(shown: Page) -> None:
    canvases = shown.locator(".viewer-planes canvas")
    assert canvases.count() == 3
    boxes = [canvas.bounding_box() for canvas in canvases.all()]
    # 40 mm wide; 30 mm, and 8 slices of 5 mm, high; the sagittal plane is 30 mm wide
    aspects = [box["width"] / box["height"] for box in boxes if box]
    assert aspects == pytest.approx([40 / 30, 40 / 40, 30 / 40], rel=0.02)
    widths = [box["width"] for box in boxes if box]
    assert widths[0] == pytest.approx(widths[1], abs=1.5)
    assert widths[0] / widths[2] == pytest.approx(40 / 30, rel=0.02)
    for canvas in canvases.all():
        assert pixels(canvas).std() > 10


def test_right_is_on_the_left_and_the_front_and_the_head_are_above(shown: Page) -> None:
    for key in ("r", "p"):
        shown.locator("canvas").first.press(key)
    middles = []
    for canvas in shown.locator(".viewer-planes canvas").all():
        canvas.press("End")  # the uppermost, foremost and rightmost slice
    settled(shown)
    for canvas in shown.locator(".viewer-planes canvas").all():
        drawn = pixels(canvas)[..., 0].astype(float)
        rows, columns = drawn.shape
        quarters = [
            drawn[: rows // 10, : columns // 10],
            drawn[: rows // 10, -columns // 10 :],
            drawn[-rows // 10 :, : columns // 10],
        ]
        middles.append([float(np.median(part)) for part in quarters])
    for upper_left, upper_right, lower_left in middles:
        assert upper_left > 240
        assert max(upper_right, lower_left) < 180


def test_wheel_keys_and_sliders_move_through_the_slices(shown: Page) -> None:
    assert said(shown).startswith("Axial 5 of 8 · Coronal 16 of 30 · Sagittal 21 of 40")
    axial = shown.locator("canvas").first
    axial.hover()
    shown.wait_for_timeout(350)  # the wheel is the page's while that scrolls
    shown.mouse.wheel(0, -100)
    assert said(shown).startswith("Axial 6 of 8")
    shown.mouse.wheel(0, 100)
    shown.mouse.wheel(0, 100)
    assert said(shown).startswith("Axial 4 of 8")
    axial.press("PageUp")
    assert said(shown).startswith("Axial 5 of 8")
    axial.press("Home")
    axial.press("PageDown")  # there is none below
    assert said(shown).startswith("Axial 1 of 8")
    shown.get_by_label("Coronal 16 of 30").fill("3")
    assert "Coronal 4 of 30" in said(shown)
    assert shown.get_by_label("Coronal 4 of 30").get_attribute("aria-valuetext") == "4 of 30"
    axial.press("ArrowRight")  # to the patient's left
    axial.press("ArrowUp")  # to the front
    assert said(shown).startswith("Axial 1 of 8 · Coronal 5 of 30 · Sagittal 20 of 40")
    axial.press("0")
    assert said(shown).startswith("Axial 5 of 8 · Coronal 16 of 30 · Sagittal 21 of 40")


def test_a_click_says_what_is_there(shown: Page) -> None:
    axial = shown.locator("canvas").first
    box = axial.bounding_box()
    assert box is not None

    def click(i: int, j: int) -> str:
        axial.click(position={"x": (39.5 - i) / 40 * box["width"], "y": (29.5 - j) / 30 * box["height"]})
        return said(shown)

    assert "R 15.0, A 12.0, S 20.0 mm · value 100 · reference: organ · prediction: organ" in click(15, 12)
    assert "R 22.0, A 12.0, S 20.0 mm · value 100 · reference: organ · prediction: background" in click(22, 12)
    assert "R 11.0, A 12.0, S 20.0 mm · value 100 · reference: background · prediction: organ" in click(11, 12)
    assert "Coronal 13 of 30 · Sagittal 12 of 40" in said(shown)


def test_reference_and_prediction_can_be_hidden_and_filled(shown: Page) -> None:
    both = count_of(shown, ORANGE)
    reference = shown.get_by_role("button", name="Reference")
    assert reference.get_attribute("aria-pressed") == "true"
    shown.locator("canvas").first.press("r")
    without_reference = count_of(shown, ORANGE)
    assert reference.get_attribute("aria-pressed") == "false"
    shown.get_by_role("button", name="Prediction").click()
    assert count_of(shown, ORANGE) == 0
    reference.click()
    without_prediction = count_of(shown, ORANGE)
    # a closed line has more pixels than a dashed one; the dashed one lies above the other in part
    assert 0 < without_reference < without_prediction <= both + without_reference
    before = pixels(shown.locator("canvas").first).astype(int)
    shown.get_by_role("button", name="Fill").click()
    settled(shown)
    box = before.shape
    inside = (int(box[0] * 14.2 / 30), int(box[1] * (39.5 - 16) / 40))  # within both masks
    after = pixels(shown.locator("canvas").first).astype(int)
    assert after[inside][0] - after[inside][2] > 40  # orange where it was grey
    assert before[inside][0] == before[inside][2]


def test_brightness_and_contrast_change_the_window(shown: Page) -> None:
    first = shown.locator(".viewer-window").inner_text()
    assert first == "Window 100 to 200"
    before = int(np.median(pixels(shown.locator("canvas").first)[..., 0]))
    brightness = shown.get_by_label("Brightness")
    brightness.focus()
    for _ in range(3):
        brightness.press("PageUp")
    settled(shown)
    assert shown.locator(".viewer-window").inner_text() != first
    assert int(np.median(pixels(shown.locator("canvas").first)[..., 0])) > before
    assert " to " in (brightness.get_attribute("aria-valuetext") or "")
    box = shown.locator("canvas").first.bounding_box()
    assert box is not None
    shown.mouse.move(box["x"] + 50, box["y"] + 50)
    shown.mouse.down(button="right")
    shown.mouse.move(box["x"] + 90, box["y"] + 20)
    shown.mouse.up(button="right")
    settled(shown)
    dragged = shown.locator(".viewer-window").inner_text()
    assert dragged != first
    shown.get_by_role("button", name="Reset").click()
    settled(shown)
    assert shown.locator(".viewer-window").inner_text() == first


def test_lines_follow_the_edges_of_voxels(open_file: Open, tmp_path: Path) -> None:
    """Two voxels that touch at a corner, one with a hole beside them: each line lies just inside of its label."""
    on = grid((20, 20, 1), 1.0, 1.0, 1.0, origin=(50.0, 0.0, 0.0))
    mask = masked((20, 20, 1), on=on)
    mask.array[4, 4], mask.array[5, 5] = 7, 7
    mask.array[10:15, 10:15], mask.array[12, 12] = 300, 0
    page = open_file(written(tmp_path, pack("a", None, mask, None, LABELS)))
    page.wait_for_selector(".viewer-status:not(:empty)")
    settled(page)
    drawn = pixels(page.locator("canvas")).astype(int)
    size = drawn.shape[0] / 20
    for colour, array in (((230, 159, 0), mask.array == 7), ((86, 180, 233), mask.array == 300)):
        rows, columns = np.nonzero(np.abs(drawn - colour).max(axis=-1) < 40)
        i, j = 19 - np.floor((columns + 0.5) / size).astype(int), 19 - np.floor((rows + 0.5) / size).astype(int)
        assert array[i, j, 0].all()
        assert set(zip(i.tolist(), j.tolist(), strict=True)) >= edge_voxels(array[:, :, 0])


def edge_voxels(array: NDArray[np.bool_]) -> set[tuple[int, int]]:
    """The voxels with an edge on the outside."""
    padded = np.pad(array, 1)
    kept = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return {(int(i), int(j)) for i, j in np.argwhere(array & ~kept)}


def test_a_picture_is_one_plane_as_on_screen(open_file: Open, tmp_path: Path) -> None:
    array = np.zeros((3, 40, 30, 1), np.uint8)
    array[0, :8, :6] = 250  # red: upper left
    body = pack("a", Volume(array, picture_grid((40, 30, 1))), None, None, LABELS)
    page = open_file(written(tmp_path, body))
    page.wait_for_selector(".viewer-status:not(:empty)")
    assert page.locator("canvas").count() == 1
    assert page.locator(".viewer-planes input").count() == 0
    drawn = pixels(page.locator("canvas"))
    assert drawn[5, 5].tolist() == [255, 0, 0]  # the brightest that there is
    assert drawn[-5, -5].tolist() == [0, 0, 0]
    page.locator("canvas").click(position={"x": 3, "y": 3})
    assert said(page) == "Column 1, row 1 · value 250, 0, 0"


def test_several_viewers_work_apart_from_each_other(open_file: Open, tmp_path: Path) -> None:
    image, reference, _ = a_case()
    page = open_file(written(tmp_path, pack("a", *a_case(), LABELS), pack("b", image, None, reference, LABELS)))
    page.wait_for_selector("section:nth-of-type(2) .viewer-status:not(:empty)")
    second = page.locator("section").nth(1)
    second.locator("canvas").first.press("Home")
    settled(page)
    assert second.locator(".viewer-status").inner_text().startswith("Axial 1 of 8")
    assert page.locator("section").nth(0).locator(".viewer-status").inner_text().startswith("Axial 5 of 8")
    assert second.get_by_role("button", name="Reference").count() == 0


def test_a_page_that_was_saved_with_its_viewer_in_it_has_one_still(
    shown: Page, open_file: Open, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.html"
    saved.write_text(shown.content(), encoding="utf-8")
    page = open_file(saved)
    page.wait_for_selector(".viewer-status:not(:empty)")
    assert page.locator(".viewer-body").count() == 1
    assert count_of(page, ORANGE) > 0


def test_printed_the_planes_stay_and_the_controls_go(shown: Page) -> None:
    shown.emulate_media(media="print")
    settled(shown)
    assert shown.locator("canvas:visible").count() == 3
    assert shown.locator("input:visible").count() == 0
    assert shown.locator("button:visible").all_inner_texts() == ["Reference", "Prediction"]  # what the lines are
    assert shown.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hinders_people_who_use_keys_or_a_screen_reader(shown: Page, scheme: Any) -> None:
    shown.emulate_media(color_scheme=scheme)
    assert faults(shown) == []
    focused = []
    for _ in range(20):  # the tab key leads through everything and out again
        shown.keyboard.press("Tab")
        focused.append(shown.evaluate("document.activeElement.tagName"))
    assert focused[:12] == ["BUTTON"] * 4 + ["INPUT"] * 2 + ["CANVAS", "INPUT"] * 3
    assert "BODY" in focused


def test_a_browser_that_cannot_unpack_says_so(page: Page, open_file: Open, tmp_path: Path) -> None:
    page.add_init_script("delete globalThis.DecompressionStream")
    open_file(written(tmp_path, pack("a", *a_case(), LABELS)))
    assert "cannot unpack the images" in page.get_by_role("alert").inner_text()


def test_niivue_shows_the_same_voxels(niivue: Path, open_file: Open, tmp_path: Path) -> None:
    page = open_file(written(tmp_path, pack("a", *a_case(), LABELS)))
    page.set_viewport_size({"width": 600, "height": 500})  # a small picture: the graphics card is software
    assert page.evaluate("typeof niivue") == "undefined"  # not run before somebody wants it
    page.get_by_role("button", name="3-D view").click()
    page.wait_for_selector(".viewer-3d[data-ready]", timeout=30_000)
    assert colours_in_3d(page) > 20
    page.locator(".viewer-planes canvas").first.press("r")
    page.locator(".viewer-planes canvas").first.press("p")
    settled(page)
    assert colours_in_3d(page) == 0
    assert faults(page) == []


def colours_in_3d(page: Page) -> int:
    """How many pixels of NiiVue's picture are orange rather than grey, from a screenshot: WebGL keeps no pixels."""
    drawn = decoded(page.locator(".viewer-3d canvas").screenshot()).astype(int)
    assert drawn.std() > 10  # not blank
    return int((drawn[..., 0] - drawn[..., 2] > 40).sum())


def test_niivue_without_webgl_is_a_sentence(niivue: Path, page: Page, open_file: Open, tmp_path: Path) -> None:
    page.add_init_script(
        "const get = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (kind, ...more) {"
        " return kind === 'webgl2' ? null : get.call(this, kind, ...more); };"
    )
    open_file(written(tmp_path, pack("a", *a_case(), LABELS)))
    page.get_by_role("button", name="3-D view").click()
    assert "no WebGL2" in page.get_by_role("alert").inner_text()
    assert pixels(page.locator(".viewer-planes canvas").first)[..., 0].std() > 10


def test_a_real_case_is_shown(real_data: Path, open_file: Open, tmp_path: Path) -> None:
    folder = real_data / "spleen_ct"
    image = read_volume(folder / "sub-spleen2_ct.nii.gz")
    mask = read_mask(folder / "sub-spleen2_ct_seg-manual.nii.gz", Labels(values={"spleen": 1}))
    shifted = replace(mask, array=np.roll(mask.array, 4, axis=0))
    body = pack("spleen", image, mask, shifted, Labels(values={"spleen": 1}))
    assert len(json.dumps(body)) < 1_300_000
    assert -161 < body["window"][0] < 0 < 200 < body["window"][1] < 350  # spleen
    page = open_file(written(tmp_path, body))
    page.wait_for_selector(".viewer-status:not(:empty)")
    assert count_of(page, ORANGE) > 200
