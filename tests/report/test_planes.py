"""Planes: every one lies as radiology shows it, with outlines on the edges of voxels, names and a scale."""

from __future__ import annotations

import io as bytes_io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medseg import io
from medseg.errors import GeometryMismatch, InputError
from medseg.geometry import Geometry
from medseg.io.picture import picture_grid
from medseg.report.planes import (
    MOST_TILES,
    mosaic_png,
    plain,
    planes_png,
    save_preview,
)
from medseg.volume import Labels, Mask, Volume

RED, BLUE = (255, 0, 0), (0, 0, 255)
LABELS = Labels(values={"organ": 1, "lesion": 5}, colours={"organ": RED, "lesion": BLUE})
SIDE, GAP, TOP = 400, 6, 32  # pixels of a square plane, between planes, and above them without a title
FIRST, SECOND, THIRD = (
    np.s_[TOP : TOP + SIDE, GAP + n * (SIDE + GAP) : GAP + n * (SIDE + GAP) + SIDE] for n in range(3)
)
"""Where axial, coronal and sagittal lie in a picture of three square planes."""


def pixels(png: bytes) -> NDArray[np.int64]:
    return np.asarray(PIL.Image.open(bytes_io.BytesIO(png)).convert("RGB"), dtype=np.int64)


def coloured(picture: NDArray[Any], colour: tuple[int, int, int] = RED) -> NDArray[np.bool_]:
    """Where a picture has a colour, however its edges are smoothed."""
    return np.abs(picture - np.array(colour)).max(axis=-1) < 60


def box(where: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """First and last row, first and last column."""
    rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def cube(n: int = 9, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Geometry:
    """A grid whose axes run to the right, to the front and to the head."""
    return Geometry((n, n, n), np.diag([*spacing, 1.0]))


def mask_of(grid: Geometry, *places: Any, value: int = 1) -> Mask:
    array = np.zeros(grid.shape, dtype=np.uint8)
    for place in places:
        array[place] = value
    return Mask(array, grid)


def turned(mask: Mask, orientation: str) -> Mask:
    turn = mask.geometry.to(orientation)
    return Mask(turn.apply(mask.array), mask.geometry.reoriented(turn))


# The picture


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAI", "PIR", "SRA", "ASL"])
def test_right_is_left_front_and_head_are_up_whatever_the_file_has(orientation: str) -> None:
    mask = mask_of(cube(), np.s_[8, 8, 8])  # the furthest to the right, to the front and to the head
    found = coloured(pixels(planes_png(None, None, turned(mask, orientation), LABELS)))
    for plane in (FIRST, SECOND, THIRD):
        top, bottom, left, right = box(found[plane])
        # three of nine voxels are shown, the marked one in the upper left corner
        assert (top, left) == (pytest.approx(0, abs=2), pytest.approx(0, abs=2))
        assert (bottom, right) == (pytest.approx(SIDE / 3, abs=2), pytest.approx(SIDE / 3, abs=2))


def test_orientations_of_one_case_give_one_picture() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.normal(size=(1, 9, 9, 9)), mask_of(cube(), np.s_[2:7, 3:6, 1:6], np.s_[7, 7, 7])
    pictures = []
    for orientation in ("RAS", "ILP"):
        turn = mask.geometry.to(orientation)
        volume = Volume(turn.apply(image), mask.geometry.reoriented(turn))
        pictures.append(pixels(planes_png(volume, None, turned(mask, orientation), LABELS)))
    assert np.array_equal(pictures[0][TOP:], pictures[1][TOP:])  # captions above count slices as the file does


def test_slices_far_apart_are_drawn_so() -> None:
    mask = mask_of(cube(spacing=(1.0, 1.0, 5.0)), np.s_[4, 4, 4])
    found = coloured(pixels(planes_png(None, None, mask, LABELS)))
    rows, columns = np.nonzero(found[:, GAP + SIDE + GAP : GAP + SIDE + GAP + 300])  # the coronal plane
    height, width = np.ptp(rows), np.ptp(columns)
    assert height / width == pytest.approx(5.0, rel=0.06)


def test_reference_is_solid_and_prediction_dashed_both_on_the_edges_of_voxels() -> None:
    grid = cube()
    reference, prediction = mask_of(grid, np.s_[3:5, 3:5, 3:5]), mask_of(grid, np.s_[4:6, 3:5, 3:5], value=5)
    picture = pixels(planes_png(None, reference, prediction, LABELS))[FIRST]
    # three of nine voxels wide are marked, 1.4 times that is shown: 5 of them, from index 2 (right) to 6
    scale = SIDE / 5
    solid = coloured(picture)
    top, bottom, left, right = box(solid)
    assert [left, right] == pytest.approx([(6 - 4) * scale, (6 - 2) * scale], abs=2)
    assert [top, bottom] == pytest.approx([scale, 3 * scale] if top < 100 else [2 * scale, 4 * scale], abs=2)
    column = solid[top:bottom, right - 1 : right + 1].any(axis=1)
    assert column.mean() > 0.95
    bluish = (picture[..., 2] > 120) & (picture[..., 0] < 130)  # a light tint, so that it can be seen on a line
    dashes = bluish[top:bottom].mean(axis=0)
    assert 0.3 < dashes.max() < 0.8
    assert int(np.argmax(dashes)) in [pytest.approx(edge * scale, abs=2) for edge in (1, 3)]


def test_small_structures_fill_a_part_of_the_picture_and_some_of_the_plane_is_always_shown() -> None:
    grid = cube(100)
    found = coloured(pixels(planes_png(None, None, mask_of(grid, np.s_[50, 50, 50]), LABELS)))
    top, bottom, *_ = box(found[FIRST])
    assert bottom - top == pytest.approx(SIDE / 30, abs=3)  # 30 of 100 voxels
    found = coloured(pixels(planes_png(None, None, mask_of(grid, np.s_[20:70, 20:70, 20:70]), LABELS)))
    top, bottom, *_ = box(found[FIRST])
    assert bottom - top == pytest.approx(SIDE / 1.4, abs=3)


def grey_at_centre(image: NDArray[Any], mask: Mask | None) -> float:
    picture = pixels(planes_png(Volume(image[np.newaxis], cube(30)), None, mask, LABELS))[FIRST]
    inside = picture[SIDE // 2 - 5 : SIDE // 2 + 5, SIDE // 2 - 5 : SIDE // 2 + 5]
    assert np.ptp(inside, axis=-1).max() == 0
    return float(inside.mean())


def test_a_ct_is_shown_in_the_window_of_what_is_marked() -> None:
    mask = mask_of(cube(30), np.s_[10:20, 10:20, 10:20])
    image = np.full((30, 30, 30), -1000, dtype=np.int16)
    image[5:25, 5:25, 5:25] = -100
    image[10:20, 10:20, 10:20] = 60
    assert grey_at_centre(image, mask) == pytest.approx(255 * (60 + 160) / (210 + 160), abs=1.5)
    image[10:20, 10:20, 10:20] = -850  # a lung
    assert grey_at_centre(image, mask) == pytest.approx(127.5, abs=1.5)
    image[:] = 40
    image[0] = -1000
    assert grey_at_centre(image, None) == pytest.approx(127.5, abs=1.5)  # soft tissue: -160 to 240


def test_other_images_are_shown_between_their_percentiles_whatever_is_not_finite() -> None:
    image = np.zeros((30, 30, 30))
    image[:15] = 1000.0
    image[13:17] = 250.0
    image[0, 0] = np.nan
    image[29, 29] = np.inf
    image[29, 0] = -np.inf
    assert grey_at_centre(image, None) == pytest.approx(255 / 4, abs=1.5)
    assert pixels(planes_png(Volume(np.full((1, 9, 9, 9), np.nan), cube()), None, None, LABELS)).max() > 0


def test_a_picture_is_one_plane_in_its_colours_as_on_screen() -> None:
    array = np.zeros((3, 40, 20, 1), dtype=np.uint8)
    array[0, :20, :10] = 255  # red above on the left
    array[1, 20:, :10] = 255  # green above on the right
    array[2, :, 10:] = 255  # blue below
    upright = pixels(planes_png(Volume(array, picture_grid(array.shape[1:])), None, None, LABELS))
    # 600 pixels wide and 300 high in the middle of a plane of 400
    assert tuple(upright[90, 100]) == (255, 0, 0)
    assert tuple(upright[90, 500]) == (0, 255, 0)
    assert tuple(upright[300, 300]) == (0, 0, 255)
    lying = Volume(array.transpose(0, 2, 1, 3), picture_grid((20, 40, 1), 5))  # rows and columns exchanged
    assert np.array_equal(pixels(planes_png(lying, None, None, LABELS)), upright)


def test_a_single_slice_of_a_scan_is_one_plane_with_its_letters() -> None:
    grid = Geometry((1, 30, 30), np.diag([4.0, 1.0, 1.0, 1.0]))
    image = np.zeros((1, 1, 30, 30), dtype=np.int16)
    picture = pixels(planes_png(Volume(image, grid), None, None, LABELS))
    assert picture.shape[1] == 500  # one plane is about as wide as it is high
    assert (picture[TOP : TOP + SIDE] == 255).any()  # letters


def test_the_same_case_gives_the_same_bytes_and_names_are_no_formulas() -> None:
    names = {"_a$\\frac{1}{$": 1, "名<b>\n\x00" + "x" * 80: 5}
    labels = Labels(values=names)
    mask = mask_of(cube(), np.s_[1:4, 1:4, 1:4])
    mask.array[6:8, 6:8, 6:8] = 5
    first, second = (planes_png(None, mask, mask, labels, title="$_case 名$") for _ in range(2))
    assert first == second
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert plain("a\nb\x00c") == "a b c"
    assert plain("x" * 80) == "x" * 39 + "…"


def test_many_labels_are_drawn_and_a_legend_names_no_more_than_fit() -> None:
    labels = Labels(values={f"label {n}": n for n in range(1, 101)})
    array = np.arange(1000, dtype=np.uint8).reshape(10, 10, 10) % 101
    few = pixels(planes_png(None, None, Mask(array % 3, cube(10)), labels))
    many = pixels(planes_png(None, None, Mask(array, cube(10)), labels))
    assert few.shape[1] == many.shape[1]
    assert 0 < many.shape[0] - few.shape[0] < 100


@pytest.mark.parametrize("what", ["reference", "prediction"])
def test_masks_of_another_grid_are_refused(what: str) -> None:
    image, mask = Volume(np.zeros((1, 9, 9, 9)), cube()), mask_of(cube())
    given = {"reference": mask, "prediction": mask} | {what: mask_of(cube(8))}
    with pytest.raises(GeometryMismatch, match=f"{what}: grid 8x8x8 .* the image's"):
        planes_png(image, **given, labels=LABELS)
    with pytest.raises(GeometryMismatch, match=r"prediction: .* the reference's"):
        planes_png(None, mask, mask_of(cube(8)), LABELS)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="neither an image nor a mask"):
        planes_png(None, None, None, LABELS)


# The mosaic


def test_tiles_of_a_mosaic_are_all_of_the_plane_that_shows_most() -> None:
    flat = mask_of(cube(), np.s_[1:8, 1:8, 4])  # axial
    upright = mask_of(cube(), np.s_[4, 2:7, 2:7])  # sagittal: 5 x 5, and 1 x 5 in an axial slice
    picture = coloured(pixels(mosaic_png(iter([("a", None, flat), ("b", None, flat), ("c", None, upright)]), LABELS)))
    tiles = [picture[26:176, 6 + n * 156 : 6 + n * 156 + 150] for n in range(3)]
    top, bottom, left, right = box(tiles[2])
    assert right - left == pytest.approx(150 / 7, abs=3)
    assert bottom - top == pytest.approx(5 * 150 / 7, abs=3)
    assert np.array_equal(tiles[0], tiles[1])


def test_a_mosaic_has_rows_of_eight_and_an_end() -> None:
    tile = ("case", Volume(np.zeros((1, 9, 9, 9)), cube()), mask_of(cube()))
    heights = [pixels(mosaic_png([tile] * n, LABELS)).shape[0] for n in (1, 8, 9)]
    assert heights[0] == heights[1]
    assert heights[2] - heights[1] == 176
    for tiles in ([], [tile] * (MOST_TILES + 1)):
        with pytest.raises(ValueError, match="1 to 48 tiles"):
            mosaic_png(tiles, LABELS)
    with pytest.raises(GeometryMismatch):
        mosaic_png([("case", tile[1], mask_of(cube(8)))], LABELS)


# From files


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with image.nii.gz, mask.nii.gz and truth.nii.gz, which have no names for their values."""
    grid = cube(20)
    image = np.random.default_rng(0).normal(size=grid.shape).astype(np.float32)
    io.write_mask(mask_of(grid, np.s_[2:9, 2:9, 2:9], value=7), tmp_path / "mask.nii.gz")
    io.write_mask(mask_of(grid, np.s_[4:9, 2:9, 2:9], value=7), tmp_path / "truth.nii.gz")
    import nibabel

    nibabel.Nifti1Image(image, grid.affine).to_filename(tmp_path / "image.nii.gz")
    return tmp_path


def test_a_preview_is_what_the_planes_of_its_files_are(files: Path) -> None:
    save_preview(files / "image.nii.gz", files / "mask.nii.gz", files / "new" / "x.png", files / "truth.nii.gz")
    image = io.read_volume(files / "image.nii.gz")
    mask, truth = (io.read_mask(files / f"{name}.nii.gz") for name in ("mask", "truth"))
    expected = planes_png(image, truth, mask, Labels(values={"label_7": 7}), title="image")
    assert (files / "new" / "x.png").read_bytes() == expected
    assert [path.name for path in (files / "new").iterdir()] == ["x.png"]


def test_a_preview_takes_names_and_colours_from_the_masks_or_from_outside(files: Path) -> None:
    named = Labels(values={"spleen": 1}, colours={"spleen": RED})
    mask = mask_of(cube(20), np.s_[2:9, 2:9, 2:9])
    io.write_mask(replace(mask, labels=named), files / "named.seg.nrrd")
    save_preview(files / "image.nii.gz", files / "named.seg.nrrd", files / "a.png")
    image = io.read_volume(files / "image.nii.gz")
    assert (files / "a.png").read_bytes() == planes_png(image, None, mask, named, title="image")
    save_preview(
        files / "image.nii.gz", files / "mask.nii.gz", files / "b.png", labels=Labels(values={"x": 1, "spleen": 7})
    )
    with pytest.raises(InputError, match="have no name"):
        save_preview(files / "image.nii.gz", files / "mask.nii.gz", files / "c.png", labels=named)
    assert not (files / "c.png").exists()


@pytest.mark.parametrize(
    ("image", "mask", "out", "words"),
    [
        ("image.nii.gz", "mask.nii.gz", "x.jpg", "is no name of a PNG file"),
        ("image.nii.gz", "mask.nii.gz", "folder.png", "is a folder"),
        ("image.nii.gz", "none.nii.gz", "x.png", "cannot be opened"),
        ("none.nii.gz", "mask.nii.gz", "x.png", "none.nii.gz"),
        (".", "mask.nii.gz", "x.png", "holds 3 images"),
        ("image.nii.gz", "small.nii.gz", "x.png", "grid 8x8x8 .* differs from the image's"),
    ],
)
def test_what_no_preview_can_be_made_of_is_said(files: Path, image: str, mask: str, out: str, words: str) -> None:
    (files / "folder.png").mkdir()
    if mask == "small.nii.gz":
        io.write_mask(mask_of(cube(8)), files / mask)
    with pytest.raises(InputError, match=words):
        save_preview(files / image, files / mask, files / out)
    assert not (files / "x.png").exists()


def test_real_cases_are_drawn(real_data: Path) -> None:
    spleen = real_data / "spleen_ct"
    mask = io.read_mask(spleen / "sub-spleen2_ct_seg-manual.nii.gz")
    shifted = replace(mask, array=np.roll(mask.array, 3, axis=0))
    labels = Labels(values={"spleen": 1}, colours={"spleen": RED})
    png = planes_png(io.read_volume(spleen / "sub-spleen2_ct.nii.gz"), mask, shifted, labels)
    assert coloured(pixels(png)).sum() > 500
    assert len(png) < 500_000


@given(st.integers(1, 40), st.integers(1, 40))
def test_bars_of_scale_are_round(first: int, second: int) -> None:
    from medseg.report.planes import _round_length

    most = first / second
    length = _round_length(most)
    assert length <= most * (1 + 1e-9) < 2.5 * length * (1 + 1e-6)
