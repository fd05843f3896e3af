"""Scenes: the same mask for every window, in the scene's place, in bounded memory, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine
from torch import Tensor, nn

from medseg import scenes
from medseg.errors import GeometryMismatch, InputError, MedsegError, PlanError, UnreadableFile
from medseg.io import read_mask
from medseg.io.picture import picture_grid
from medseg.package import FoldRecord, Manifest, ModelPackage
from medseg.plan import Configuration, NetworkPlan, Normalisation, Plan, TrainingPlan
from medseg.predict import Predictor, PredictSettings
from medseg.scenes import Lattice, predict_scene, scene_dice
from medseg.volume import Labels, Volume

LABELS = Labels(values={"water": 1, "forest": 5})
PLACE = Affine(10, 0, 500_000, 0, -10, 5_400_000)


class OfPixels(nn.Module):
    """The class is the band that is largest."""

    def forward(self, batch: Tensor) -> Tensor:
        return batch


class OfPlaces(nn.Module):
    """Sees neighbours, is not symmetric, and depends on the place in the tile: another tiling, another mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 5, padding=2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, batch: Tensor) -> Tensor:
        rows, columns = (torch.linspace(-1, 1, n) for n in batch.shape[2:])
        ramp = rows[:, None] ** 3 - 0.5 * columns
        return self.conv(batch) + torch.stack([ramp, -ramp, ramp * 0])


@dataclass(frozen=True)
class Package(ModelPackage):
    """A package of any network at all, and the number of tiles that it has seen."""

    network: nn.Module = field(default_factory=OfPixels)
    seen: list[int] = field(default_factory=list)

    def networks(self) -> list[nn.Module]:
        self.network.register_forward_hook(lambda *_: self.seen.append(1))
        return [self.network]


def package(
    network: nn.Module | None = None,
    *,
    patch: tuple[int, int] = (8, 12),
    axes: tuple[int, int, int] = (2, 1, 0),
    **changes: Any,
) -> Package:
    setup = Configuration(
        spatial_dims=2,
        spacing_mm=(None, 1.0, 1.0),
        median_shape=(1, 32, 32),
        patch_size=patch,
        batch_size=2,
        batch_dice=True,
        mirror_axes=(0, 1),
        network=NetworkPlan(features=(2, 4), kernel_sizes=((3, 3), (3, 3)), strides=((1, 1), (1, 1))),
        training=TrainingPlan(),
        estimated_memory_mb=1,
    )
    plan = Plan(
        dataset="Land",
        fingerprint_digest="",
        device="cpu",
        memory_budget_mb=1,
        axes=axes,
        channels=("a", "b", "c"),
        normalisation=(Normalisation(scheme="ct", mean=50, std=30, lower=0, upper=200),) * 3,
        labels=LABELS,
        configurations={"2d": setup},
    ).model_copy(update=changes)
    fold = FoldRecord(weights="w", seed=0, iterations=0, seconds=0, train_cases=0, validation_cases=0)
    manifest = Manifest(
        name="land", configuration="2d", plan="p", folds={0: fold}, files={"p": "12", "w": "34"}, versions={}
    )
    return Package(manifest, plan, {0: {}}, network=network or OfPixels())


def pixels(rows: int, columns: int, bands: int = 3, seed: int = 0) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(1, 100, (bands, rows, columns), dtype=np.uint16)


def write(path: Path, array: NDArray[Any], **profile: Any) -> Path:
    """A GeoTIFF of (bands, rows, columns), in place where nothing else is said."""
    place = {"crs": "EPSG:32632", "transform": PLACE}
    count, height, width = array.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype=array.dtype,
            **{**place, **profile},
        ) as file:
            file.write(array)
    return path


def read(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = tifffile.imread(path)
    return array


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write(tmp_path / "scene.tif", pixels(37, 53))


# The lattice


def test_tiles_around_a_window_worked_out_by_hand() -> None:
    # 20 pixels, tiles of 8: they begin at 0, 4, 8 and 12
    assert Lattice(20, 8).around(0, 4) == (0, 8)
    assert Lattice(20, 8).around(4, 5) == (0, 12)
    assert Lattice(20, 8).around(19, 20) == (12, 20)
    assert Lattice(20, 8).around(0, 20) == (0, 20)
    # one pixel more: a tile from 16 to 24, beyond the end
    assert Lattice(21, 8).around(20, 21) == (16, 24)
    # smaller than a tile: as it is
    assert Lattice(5, 8).around(2, 3) == (0, 5)


@given(st.integers(1, 90), st.integers(1, 12), st.data())
def test_tiles_around_a_window_are_those_that_touch_it(size: int, half: int, data: st.DataObject) -> None:
    patch = 2 * half
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    starts = [0]
    while starts[-1] + patch < size:
        starts.append(starts[-1] + half)
    touching = [s for s in starts if s < stop and s + patch > start]
    end = touching[-1] + patch if size > patch else size
    assert Lattice(size, patch).around(start, stop) == (touching[0], end)


# The mask


@pytest.mark.parametrize("axes", [(2, 1, 0), (2, 0, 1)])
def test_every_window_gives_the_same_mask(scene: Path, tmp_path: Path, axes: tuple[int, int, int]) -> None:
    model = package(OfPlaces(), axes=axes)
    masks = []
    for window in (1000, 53, 37, 16, 7):
        predict_scene(model, scene, tmp_path / "mask.tif", window=window, device="cpu")
        masks.append(read(tmp_path / "mask.tif"))
    assert set(np.unique(masks[0])) == {0, 1, 5}
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "axes"),
    # on the lattice of tiles of 8 rows and 12 columns (or the other way round), or smaller than a tile
    [(24, 42, (2, 1, 0)), (42, 24, (2, 0, 1)), (6, 10, (2, 1, 0))],
)
def test_a_scene_on_the_lattice_is_segmented_as_a_picture_is(
    tmp_path: Path, rows: int, columns: int, axes: tuple[int, int, int], mirror: bool
) -> None:
    model = package(OfPlaces(), axes=axes)
    array = pixels(rows, columns)
    predict_scene(model, write(tmp_path / "a.tif", array), tmp_path / "b.tif", window=9, mirror=mirror, device="cpu")
    picture = array.astype(np.float32).transpose(0, 2, 1)[..., np.newaxis]
    volume = Volume(picture, picture_grid(picture.shape[1:]))
    expected = Predictor(model, PredictSettings(device="cpu", mirror=mirror, engine="eager")).segment(volume).array
    written = read_mask(tmp_path / "b.tif", LABELS)
    np.testing.assert_array_equal(written.array, expected)
    assert written.geometry == volume.geometry


@pytest.mark.parametrize("axes", [(2, 1, 0), (2, 0, 1)])
def test_rows_stay_rows_and_left_stays_left(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    array = np.full((3, 30, 20), 10, np.uint16)
    array[1, 2:4, :15] = 90  # a bar at the top, from the left
    array[2, 5:29, 17] = 90  # a line down the right side
    predict_scene(package(axes=axes), write(tmp_path / "a.tif", array), tmp_path / "b.tif", window=8, device="cpu")
    expected = np.zeros((30, 20), np.uint8)
    expected[2:4, :15], expected[5:29, 17] = 1, 5
    np.testing.assert_array_equal(read(tmp_path / "b.tif"), expected)


def test_labels_of_more_than_a_byte_keep_their_values(scene: Path, tmp_path: Path) -> None:
    model = package(labels=Labels(values={"a": 300, "b": 2}))
    predict_scene(model, scene, tmp_path / "mask.tif", device="cpu")
    mask = read(tmp_path / "mask.tif")
    assert mask.dtype == np.uint16
    assert np.unique(mask).tolist() == [0, 2, 300]


# The file


def test_the_mask_lies_where_the_scene_lies(tmp_path: Path) -> None:
    turned = Affine(9.4, 3.4, 7e5, 3.4, -9.4, 5e6)  # 20 degrees, 10 m
    source = write(tmp_path / "a.tif", pixels(300, 520), transform=turned, crs="EPSG:25833", nodata=0)
    predict_scene(package(patch=(64, 64)), source, tmp_path / "b.tif", device="cpu")
    with rasterio.open(source) as scene, rasterio.open(tmp_path / "b.tif") as mask:
        assert mask.crs == scene.crs
        assert mask.transform.almost_equals(scene.transform, 1e-9)
        assert (mask.shape, mask.count, mask.dtypes) == (scene.shape, 1, ("uint8",))
        assert mask.block_shapes == [(256, 256)]
        assert mask.compression.name == "deflate"
        assert mask.nodata is None  # 0 is background, which is something to know
        tags = mask.tags()
        assert tags["labels"] == '{"background": 0, "water": 1, "forest": 5}'
        assert tags["model"] == "land"


def test_a_scene_without_coordinates_is_a_picture(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tif", pixels(20, 30), crs=None, transform=Affine.identity())
    predict_scene(package(), source, tmp_path / "b.tif", device="cpu")
    with rasterio.open(tmp_path / "b.tif") as mask:
        assert mask.crs is None
        assert mask.shape == (20, 30)


def test_control_points_are_kept(tmp_path: Path) -> None:
    points = [GroundControlPoint(row=r, col=c, x=10.0 + c, y=50.0 - r) for r, c in [(0, 0), (0, 9), (9, 0), (9, 9)]]
    source = write(tmp_path / "a.tif", pixels(10, 10), crs="EPSG:4326", transform=Affine.identity(), gcps=points)
    predict_scene(package(), source, tmp_path / "b.tif", device="cpu")
    with rasterio.open(tmp_path / "b.tif") as mask:
        found, system = mask.gcps
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
        assert system.to_epsg() == 4326


# No data


def test_pixels_without_data_are_background(tmp_path: Path) -> None:
    array = pixels(20, 30)
    array[:, 3, 4] = 0  # in every band: no data
    array[2, 5, 6], array[:2, 5, 6] = 90, 0  # in two of three: dark, and the third is largest
    predict_scene(package(), write(tmp_path / "a.tif", array, nodata=0), tmp_path / "b.tif", device="cpu")
    mask = read(tmp_path / "b.tif")
    assert mask[3, 4] == 0
    assert mask[5, 6] == 5
    array[:, 3, 4] = 1, 2, 3
    predict_scene(package(), write(tmp_path / "a.tif", array), tmp_path / "c.tif", device="cpu")
    assert read(tmp_path / "c.tif")[3, 4] == 5
    mask[3, 4] = 5
    np.testing.assert_array_equal(mask, read(tmp_path / "c.tif"))


def test_a_pixel_that_is_not_finite_is_background_and_harms_no_neighbour(tmp_path: Path) -> None:
    array = pixels(20, 30).astype(np.float32)
    for window in (100, 6):
        predict_scene(package(), write(tmp_path / "a.tif", array), tmp_path / "b.tif", window=window, device="cpu")
        clean = read(tmp_path / "b.tif")
        spoilt = array.copy()
        spoilt[0, 3, 4], spoilt[1, 19, 29], spoilt[:, 0, 0] = np.nan, np.inf, np.nan
        source = write(tmp_path / "c.tif", spoilt, nodata=np.nan)
        predict_scene(package(), source, tmp_path / "d.tif", window=window, device="cpu")
        clean[3, 4] = clean[19, 29] = clean[0, 0] = 0
        np.testing.assert_array_equal(read(tmp_path / "d.tif"), clean)


def test_what_is_hidden_is_not_computed_and_changes_nothing(tmp_path: Path) -> None:
    array = pixels(40, 40)
    array[:, :, :30] = 0
    source = write(tmp_path / "a.tif", array, nodata=0)
    masks, seen = [], []
    for window in (40, 10):
        model = package(OfPlaces())
        predict_scene(model, source, tmp_path / "b.tif", window=window, device="cpu")
        masks.append(read(tmp_path / "b.tif"))
        seen.append(len(model.seen))
    np.testing.assert_array_equal(*masks)
    assert masks[0][:, :30].max() == 0
    assert masks[0].max() > 0
    # rows begin at 0, 4, ... 32, columns at 0, 6, ... 30: 9 x 6 tiles. From column 30 on windows of 10 rows are touched
    # by 3, 4, 4 and 3 rows of tiles, of those that reach beyond column 30: 24 and 30. The 9 x 4 tiles of nothing but
    # zeros, which one window over all has too, are computed once
    assert seen == [54 - 36 + 1, 28]
    array[:] = 0
    model = package()
    predict_scene(model, write(tmp_path / "a.tif", array, nodata=0), tmp_path / "b.tif", device="cpu")
    assert model.seen == []
    assert read(tmp_path / "b.tif").max() == 0


def test_an_alpha_band_is_a_mask_and_no_channel(tmp_path: Path) -> None:
    array = np.concatenate([pixels(20, 30), np.full((1, 20, 30), 255, np.uint16)])
    array[3, 3, 4] = 0
    source = write(tmp_path / "a.tif", array)
    with rasterio.open(source, "r+") as file:
        file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    predict_scene(package(), source, tmp_path / "b.tif", device="cpu")
    predict_scene(package(), write(tmp_path / "c.tif", array[:3]), tmp_path / "d.tif", device="cpu")
    expected = read(tmp_path / "d.tif")
    expected[3, 4] = 0
    np.testing.assert_array_equal(read(tmp_path / "b.tif"), expected)


# Memory


def test_memory_does_not_grow_with_the_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = scenes._window

    def counting(rows: tuple[int, int], columns: tuple[int, int]) -> Any:
        asked.append((rows[1] - rows[0]) * (columns[1] - columns[0]))
        return plain(rows, columns)

    monkeypatch.setattr(scenes, "_window", counting)
    peaks = []
    for edge in (512, 2048):
        source = write(tmp_path / "a.tif", pixels(edge, edge), tiled=True, blockxsize=256, blockysize=256)
        tracemalloc.start()
        predict_scene(package(patch=(64, 64)), source, tmp_path / "b.tif", window=256, device="cpu")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(asked) == (256 + 64) ** 2
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 2048**2 * 3 * 2 / 3  # a third of the scene


# Whole or not at all


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("a.tif", "scene.tif"))


def test_an_interruption_leaves_what_was_there(scene: Path, tmp_path: Path) -> None:
    def interrupt(work: str, fraction: float, note: str) -> None:
        assert work == "segmenting"
        if fraction > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_scene(package(), scene, tmp_path / "b.tif", window=16, progress=interrupt, device="cpu")
    assert leftovers(tmp_path) == []
    (tmp_path / "b.tif").write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt):
        predict_scene(package(), scene, tmp_path / "b.tif", window=16, progress=interrupt, device="cpu")
    assert leftovers(tmp_path) == ["b.tif"]
    assert (tmp_path / "b.tif").read_bytes() == b"earlier"


def test_a_kill_leaves_no_target(scene: Path, tmp_path: Path) -> None:
    code = (
        f"import os, sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
        "import test_scenes as t\n"
        f"t.predict_scene(t.package(), Path({str(scene)!r}), Path({str(tmp_path / 'b.tif')!r}), window=16,\n"
        "    device='cpu', progress=lambda *_: os._exit(9))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert not (tmp_path / "b.tif").exists()
    assert all(name.startswith(".medseg-tmp-") for name in leftovers(tmp_path))


@pytest.mark.parametrize("compress", [None, "deflate"])
def test_a_scene_that_was_cut_short_is_no_scene(tmp_path: Path, compress: str | None) -> None:
    source = write(tmp_path / "a.tif", pixels(400, 400), tiled=True, blockxsize=64, blockysize=64, compress=compress)
    content = source.read_bytes()
    source.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UnreadableFile, match="cannot be read"):
        predict_scene(package(patch=(64, 64)), source, tmp_path / "b.tif", window=64, device="cpu")
    assert leftovers(tmp_path) == []


def test_a_window_that_cannot_be_computed_fails_the_scene(scene: Path, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self, failure: Exception) -> None:
            super().__init__()
            self.failure = failure

        def forward(self, batch: Tensor) -> Tensor:
            raise self.failure

    for failure in (MemoryError("out of memory"), torch.OutOfMemoryError("out of memory")):
        with pytest.raises(InputError, match=r"rows 0 to 16, columns 0 to 16: out of memory .*smaller window"):
            predict_scene(package(Broken(failure)), scene, tmp_path / "b.tif", window=16, device="cpu")
    with pytest.raises(RuntimeError, match="sizes of tensors"):  # which no window would change
        predict_scene(package(Broken(RuntimeError("sizes of tensors"))), scene, tmp_path / "b.tif", device="cpu")
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
@pytest.mark.parametrize("window", [40, 256])  # the second one is written only when the file is closed
def test_a_full_disk_is_noticed(tmp_path: Path, window: int) -> None:
    import resource

    source = write(tmp_path / "a.tif", pixels(200, 200))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, unlimited[1]))
    try:
        with pytest.raises(InputError, match="could not be written whole"):
            predict_scene(package(patch=(64, 64)), source, tmp_path / "b.tif", window=window, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert leftovers(tmp_path) == []


def test_why_a_mask_could_not_be_written_is_said(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = scenes._profile
    monkeypatch.setattr(scenes, "_profile", lambda *given: {**plain(*given), "blockxsize": 100})
    with pytest.raises(InputError, match=r"could not be written whole: .*multiples of 16"):
        predict_scene(package(), scene, tmp_path / "b.tif", device="cpu")
    assert leftovers(tmp_path) == []


# What is refused


def test_what_cannot_be_segmented_is_refused(tmp_path: Path, scene: Path) -> None:
    by_image = (Normalisation(scheme="ct"), Normalisation(scheme="zscore"), Normalisation(scheme="ct"))
    setup = package().configuration
    coarse = {"2d": setup.model_copy(update={"spacing_mm": (None, 2.0, 2.0)})}
    palette = tmp_path / "p.tif"
    tifffile.imwrite(palette, np.zeros((9, 9), np.uint8), photometric="miniswhite")
    cases: list[tuple[Package, Path, str, type[MedsegError], str]] = [
        (package(), write(tmp_path / "a.tif", pixels(9, 9, bands=4)), "m.tif", InputError, "has 4 bands .*3: a, b, c"),
        (package(), write(tmp_path / "c.tif", pixels(9, 9) * 1j), "m.tif", InputError, "complex"),
        (package(), palette, "m.tif", InputError, "palette"),
        (package(), tmp_path / "none.tif", "m.tif", UnreadableFile, "cannot be read"),
        (package(), scene, "m.png", InputError, r"\.tif or \.tiff"),
        (package(), scene, "scene.tif", InputError, "is the scene itself"),
        (package(normalisation=by_image), scene, "m.tif", PlanError, "'b' .* mean and standard deviation.*reflectance"),
        (package(axes=(0, 1, 2)), scene, "m.tif", PlanError, "none of pictures"),
        (package(patch=(7, 12)), scene, "m.tif", PlanError, "even size"),
        (package(configurations=coarse), scene, "m.tif", PlanError, "not resampled"),
    ]
    before = sorted(tmp_path.iterdir())
    for model, source, target, error, message in cases:
        with pytest.raises(error, match=message):
            predict_scene(model, source, tmp_path / target, device="cpu")
    with pytest.raises(InputError, match="1 pixel or more"):
        predict_scene(package(), scene, tmp_path / "m.tif", window=0)
    assert sorted(tmp_path.iterdir()) == before


def test_without_rasterio_the_extra_is_named(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(InputError, match=r"medseg\[satellite\]"):
        predict_scene(package(), scene, tmp_path / "mask.tif", device="cpu")


# Scores


def test_dice_of_a_scene_worked_out_by_hand(tmp_path: Path) -> None:
    prediction = np.array([[1, 1, 1, 0], [0, 0, 1, 1]], np.uint8)[np.newaxis]
    reference = np.array([[1, 1, 0, 0], [0, 7, 7, 1]], np.uint8)[np.newaxis]
    labels = Labels(values={"water": 1, "forest": 5}, ignore=7)
    a, b = write(tmp_path / "a.tif", prediction), write(tmp_path / "b.tif", reference)
    for window in (4096, 3, 1):  # 3 pixels in both, 4 in the prediction (one is ignored), 3 in the reference
        assert scene_dice(a, b, labels, window=window) == {"water": 2 * 3 / (4 + 3), "forest": None}


def test_masks_of_other_places_are_not_compared(tmp_path: Path) -> None:
    mask = np.ones((1, 4, 5), np.uint8)
    a = write(tmp_path / "a.tif", mask)
    for changed, what in (
        (write(tmp_path / "b.tif", mask[:, :3]), "shape"),
        (write(tmp_path / "c.tif", mask, crs="EPSG:25833"), "crs"),
        (write(tmp_path / "d.tif", mask, transform=Affine(10, 0, 500_001, 0, -10, 5_400_000)), "transform"),
    ):
        with pytest.raises(GeometryMismatch, match=what):
            scene_dice(changed, a, LABELS)
    rounded = write(tmp_path / "f.tif", mask, transform=Affine(10 + 1e-9, 0, 500_000 + 1e-6, 0, -10, 5_400_000))
    assert scene_dice(rounded, a, LABELS)["water"] == 1.0
    with pytest.raises(InputError, match=r"\[9\] have no name"):
        scene_dice(write(tmp_path / "e.tif", mask * 9), a, LABELS)
