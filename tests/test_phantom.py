"""Phantoms: a Decathlon folder, the same bytes for the same seed, and bodies that are not trivial."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import rasterio

from medseg.check import check
from medseg.dataset import Dataset
from medseg.io import read_mask, read_volume
from medseg.phantom import (
    DEMO_LABELS,
    LAND_COVER,
    ORIENTATIONS,
    make_case,
    make_dataset,
    make_scene,
    write_scenes,
)
from medseg.records import digest_file, read_json


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(
        tmp_path_factory.mktemp("phantom"),
        name="Brain",
        cases=5,
        test_cases=1,
        channels=("FLAIR", "T1w"),
        shape=(24, 20, 16),
    )


def test_the_folder_is_laid_out_as_the_decathlon_ships_it(dataset: Path) -> None:
    body = read_json(dataset / "dataset.json")
    assert body["modality"] == {"0": "FLAIR", "1": "T1w"}
    assert body["labels"] == {"0": "background", "1": "liver", "2": "kidney", "3": "tumour"}
    assert (body["numTraining"], body["numTest"], body["tensorImageSize"]) == (5, 1, "4D")
    assert body["training"][4] == {"image": "./imagesTr/brain_005.nii.gz", "label": "./labelsTr/brain_005.nii.gz"}
    assert body["test"] == ["./imagesTs/brain_006.nii.gz"]
    listed = {dataset / path for pair in body["training"] for path in pair.values()} | {dataset / body["test"][0]}
    assert listed | {dataset / "dataset.json"} == {p for p in dataset.rglob("*") if p.is_file()}


def test_the_files_are_read_without_a_warning_and_lie_on_one_grid(dataset: Path) -> None:
    for number, pair in enumerate(read_json(dataset / "dataset.json")["training"]):
        image, mask = read_volume(dataset / pair["image"], channels=2), read_mask(dataset / pair["label"])
        assert image.warnings == mask.warnings == ()
        assert image.geometry == mask.geometry
        assert not image.geometry.is_sheared
        assert image.geometry.orientation == ORIENTATIONS[number]
        assert np.unique(mask.array).tolist() == [0, 1, 2, 3]
        # oblique: no axis along the world's
        assert (np.abs(image.geometry.direction) < 0.99999).all()


def test_the_file_holds_the_case_bit_for_bit(dataset: Path) -> None:
    image, mask = make_case(3, channels=("FLAIR", "T1w"), shape=(24, 20, 16))
    written = read_volume(dataset / "imagesTr" / "brain_004.nii.gz")
    np.testing.assert_array_equal(written.array, image.array)
    assert written.geometry == image.geometry
    np.testing.assert_array_equal(read_mask(dataset / "labelsTr" / "brain_004.nii.gz").array, mask.array)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    small = {"cases": 1, "test_cases": 1, "shape": (12, 12, 8)}
    files = [make_dataset(tmp_path / n, seed=s, **small) for n, s in (("a", 1), ("b", 1), ("c", 2))]  # type: ignore[arg-type]
    for name in (
        "dataset.json",
        "imagesTr/phantom_001.nii.gz",
        "labelsTr/phantom_001.nii.gz",
        "imagesTs/phantom_002.nii.gz",
    ):
        assert digest_file(files[0] / name) == digest_file(files[1] / name)
    image = "imagesTr/phantom_001.nii.gz"
    assert digest_file(files[0] / image) != digest_file(files[2] / image)


def test_the_labels_given_are_the_integers_written() -> None:
    _, mask = make_case(0, labels={"PZ": 70, "TZ": 300})
    assert np.unique(mask.array).tolist() == [0, 70, 300]
    assert mask.array.dtype == np.uint16
    _, mask = make_case(0, labels={"spleen": 1})
    assert np.unique(mask.array).tolist() == [0, 1]


def test_shape_and_spacing_are_along_right_front_and_head() -> None:
    for number in range(5):
        image, _ = make_case(number, shape=(32, 40, 16), spacing_mm=(1.0, 0.5, 3.0))
        geometry = image.geometry.reoriented(image.geometry.to("RAS"))
        np.testing.assert_allclose(geometry.spacing, (1.0, 0.5, 3.0), rtol=0.0501)
        assert np.abs(np.array(geometry.shape) - (32, 40, 16)).max() <= 2


def test_ct_is_in_hounsfield_units() -> None:
    image, mask = make_case(0, channels=("CT",))
    assert image.array[0][0, 0, 0] == pytest.approx(-1000, abs=120)  # air in the corner
    assert np.median(image.array[0][mask.array == 1]) == pytest.approx(40 + 200 * 0.45, abs=10)
    assert 400 < image.array.max() < 700  # bone


def test_mr_has_another_scale_in_every_case() -> None:
    medians = [np.median(make_case(n)[0].array) for n in range(8)]
    assert max(medians) > 2 * min(medians)


def test_no_threshold_finds_the_organs() -> None:
    image, mask = make_case(0)
    for value in DEMO_LABELS.values():
        low, high = np.percentile(image.array[0][mask.array == value], (5, 95))
        found = (image.array[0] >= low) & (image.array[0] <= high)
        truth = mask.array == value
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) < 0.8


def test_the_last_label_is_a_lesion_inside_the_first_organ() -> None:
    _, mask = make_case(2)
    lesion = np.argwhere(mask.array == 3)
    organ = np.argwhere(mask.array == 1)
    assert (lesion.min(axis=0) >= organ.min(axis=0)).all()
    assert (lesion.max(axis=0) <= organ.max(axis=0)).all()


# Land


@pytest.fixture(scope="module")
def land(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("land"), tiles=5, tile_shape=(96, 80), scene_shape=(300, 200))


def test_the_tiles_are_a_sound_dataset_of_six_bands_with_one_scale(land: Path) -> None:
    dataset = Dataset.open(land)
    assert dataset.channels == ("reflectance",) * 6
    assert dict(dataset.labels.values) == dict(LAND_COVER)
    assert [case.id for case in dataset.cases] == [f"land_00{n}" for n in range(1, 6)]
    assert check(dataset).unusable_cases == ()
    image, mask = make_scene(2, shape=(96, 80))
    case = dataset.case("land_002")
    assert case.label is not None
    written, labels = read_volume(case.images[0]), read_mask(case.label)
    (warning,) = written.warnings
    assert labels.warnings == (warning,)
    assert "place on the map" in warning
    np.testing.assert_array_equal(written.array, image.array)
    np.testing.assert_array_equal(labels.array, mask.array)
    assert written.geometry == labels.geometry == image.geometry == mask.geometry


def test_tiles_and_scene_lie_on_one_map_without_touching(land: Path) -> None:
    spans = []
    for path in (land / "scene.tif", *sorted((land / "imagesTr").iterdir())):
        with rasterio.open(path) as image:
            assert image.crs.to_epsg() == 32632
            assert image.res == (10, 10)
            assert (image.count, image.dtypes[0], image.nodata) == (6, "uint16", 0)
            spans.append((image.bounds.left, image.bounds.right))
    assert spans[0] == (500_000, 503_000)
    assert spans[1][0] > spans[0][1]
    assert [a for (_, end), (a, _) in itertools.pairwise(spans) if a < end] == []
    with rasterio.open(land / "scene.tif") as image, rasterio.open(land / "reference.tif") as mask:
        assert mask.transform == image.transform
        assert (mask.width, mask.height, mask.nodata) == (300, 200, None)
        np.testing.assert_array_equal(mask.read(1), make_scene(0, shape=(300, 200))[1].array[..., 0].T)


def test_clouds_hide_every_band_and_the_mask() -> None:
    image, mask = make_scene(0, shape=(400, 300))
    cloud = (image.array == 0).any(axis=0)
    assert 0.005 < cloud.mean() < 0.2
    assert (image.array[:, cloud] == 0).all()
    assert (mask.array[cloud] == 0).all()


def test_land_is_the_same_for_a_seed_and_another_for_another(tmp_path: Path) -> None:
    small = {"tiles": 1, "tile_shape": (40, 30), "scene_shape": (50, 40)}
    folders = [write_scenes(tmp_path / n, seed=s, **small) for n, s in (("a", 1), ("b", 1), ("c", 2))]  # type: ignore[arg-type]
    for name in ("dataset.json", "imagesTr/land_001.tif", "labelsTr/land_001.tif", "scene.tif", "reference.tif"):
        same = [digest_file(folder / name) for folder in folders]
        assert same[0] == same[1]
        assert (same[0] == same[2]) == (name == "dataset.json")


def test_a_pixel_alone_does_not_tell_its_cover() -> None:
    """The best that the spectrum of a pixel can say if each cover is a Gaussian, fitted to the answer itself."""
    image, mask = make_scene(0, shape=(600, 500))
    pixels, truth = image.array.reshape(6, -1).T, mask.array.ravel()
    seen = pixels.any(axis=1)
    logs, truth = np.log(pixels[seen]), truth[seen]
    scores = []
    for value in range(5):
        of_cover = logs[truth == value]
        off = logs - of_cover.mean(axis=0)
        spread = np.cov(of_cover.T)
        distance = np.einsum("ni,ij,nj->n", off, np.linalg.inv(spread), off)
        scores.append(np.log(len(of_cover)) - (distance + np.linalg.slogdet(spread)[1]) / 2)
    best = np.argmax(scores, axis=0)
    dice = {
        name: 2 * ((best == value) & (truth == value)).sum() / ((best == value).sum() + (truth == value).sum())
        for name, value in LAND_COVER.items()
    }
    assert all(dice[name] < 0.85 for name in ("forest", "field", "built-up"))
    assert all(0.5 < value < 0.999 for value in dice.values())
