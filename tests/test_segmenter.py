"""Segmenter: what is given, in whatever form, is what is trained on; what comes back has the shape of what went in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from monai.data import MetaTensor
from numpy.typing import NDArray
from PIL import Image

import medseg
from medseg import io, pipeline, segmenter, train
from medseg.dataset import Dataset
from medseg.errors import DatasetError, InputError, PlanError
from medseg.phantom import make_case
from medseg.pipeline import RunResult
from medseg.recipe import RECIPES
from medseg.segmenter import Segmenter

Array = NDArray[Any]
LABELS = {"organ": 1, "lesion": 5}
SPACING = (1.0, 1.0, 2.5)
RAS = np.diag([*SPACING, 1.0])
PICTURE = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's grid of a picture, LPS, in RAS
FLAT = ("plan.patch_size=[16,16]", "plan.features=[4,8,8]", "plan.batch_size=4")


@pytest.fixture(autouse=True, scope="module")
def no_curve() -> Iterator[None]:
    """No drawing, which takes longer than all the rest of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "save_curve", lambda *_: None)
        yield


def volumes(count: int = 4, channels: int = 1) -> tuple[list[Array], list[Array]]:
    """Phantoms as arrays without a grid, (I, J, K) for one channel."""
    names = ["MRI"] * channels
    pairs = [make_case(n, shape=(20, 18, 10), labels=LABELS, channels=names) for n in range(count)]
    images = [np.ascontiguousarray(image.array if channels > 1 else image.array[0]) for image, _ in pairs]
    return images, [np.ascontiguousarray(mask.array) for _, mask in pairs]


def pictures(count: int = 4, shape: tuple[int, int] = (20, 28)) -> tuple[list[Array], list[Array]]:
    """Grey pictures (H, W) uint8 with a bright bar that lies flat, and its mask, 0 and 3."""
    images, masks = [], []
    for number in range(count):
        rng = np.random.default_rng(number)
        row, column = rng.integers(2, shape[0] - 8), rng.integers(2, shape[1] - 16)
        mask = np.zeros(shape, np.uint8)
        mask[row : row + 5, column : column + 13] = 3
        images.append((rng.uniform(20, 60, shape) + 40.0 * mask).astype(np.uint8))
        masks.append(mask)
    return images, masks


@pytest.fixture(scope="module")
def solid(tiny_overrides: tuple[str, ...]) -> Segmenter:
    """Fitted to four volumes in two steps."""
    return Segmenter(LABELS, iterations=2, overrides=tiny_overrides, device="cpu").fit(*volumes(), SPACING)


@pytest.fixture(scope="module")
def flat() -> Segmenter:
    """Fitted to eight pictures, well."""
    return Segmenter({"bar": 3}, spatial_dims=2, iterations=60, overrides=FLAT, device="cpu").fit(*pictures(8))


class Stop(Exception):
    """What ends a ``fit`` when its dataset is written."""


Written = Callable[..., Dataset]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """What ``fit`` of some choices makes of its arguments, as a dataset on disk."""

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    def write(images: Any, masks: Any, spacing_mm: Any = None, **choices: Any) -> Dataset:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        with pytest.raises(Stop):
            Segmenter(folder=folder, **choices).fit(images, masks, spacing_mm)
        return Dataset.open(folder / "dataset")

    monkeypatch.setattr(segmenter, "run", stop)
    return write


# ---- the journey -----------------------------------------------------------------------------------------------------


def test_a_mask_is_the_one_that_the_saved_package_gives(solid: Segmenter, tmp_path: Path) -> None:
    image = volumes()[0][1]
    mask = solid.predict(image, SPACING)
    assert mask.shape == image.shape
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1, 5}
    assert mask.any(), "a mask of nothing would be equal to any other"
    for name in ("package", "model.zip"):
        solid.save(tmp_path / name)
        np.testing.assert_array_equal(medseg.load(tmp_path / name, device="cpu")((image, RAS)).array, mask)
        np.testing.assert_array_equal(Segmenter.load(tmp_path / name, device="cpu").predict(image, SPACING), mask)


def test_a_picture_is_segmented_with_its_rows_first(flat: Segmenter, tmp_path: Path) -> None:
    images, masks = pictures(9)
    found = flat.predict(images)
    assert [mask.shape for mask in found] == [(20, 28)] * 9
    pairs = [(found == 3, mask == 3) for found, mask in zip(found, masks, strict=True)]
    overlap = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]
    assert min(overlap) > 0.8
    flat.save(tmp_path / "package")
    volume = images[0].T[..., np.newaxis]
    mask = medseg.load(tmp_path / "package", device="cpu")((volume, PICTURE)).array
    np.testing.assert_array_equal(mask[..., 0].T, found[0])


def test_a_picture_in_a_file_gives_the_mask_of_its_array(flat: Segmenter, tmp_path: Path) -> None:
    image = pictures()[0][0]
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(flat.predict(tmp_path / "a.png"), flat.predict(image))
    Image.fromarray(image).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(flat.predict(str(tmp_path / "a.tif")), flat.predict(image))


def test_scores_are_those_of_the_cases_held_out(flat: Segmenter) -> None:
    assert flat.scores.keys() == {"bar"}
    assert flat.scores["bar"] == flat.evaluation.mean.dice
    assert flat.scores["bar"] is not None
    assert flat.scores["bar"] > 0.8
    fold = flat.package.manifest.folds[0]
    assert (fold.train_cases, fold.validation_cases) == (6, 2), "8 cases in 5 folds: the first two have two"
    held_out = {case.case for case in flat.evaluation.cases}
    assert len(held_out) == 2
    assert held_out < {f"case_{n}" for n in range(8)}
    assert fold.dice == pytest.approx(flat.scores["bar"], abs=1e-4)


def test_the_plan_and_the_package_can_be_read(solid: Segmenter, flat: Segmenter) -> None:
    assert solid.plan.labels.values == LABELS
    assert solid.plan is solid.package.plan
    assert solid.package.manifest.configuration == "3d_fullres"
    assert flat.package.manifest.configuration == "2d"
    assert solid.plan.channels == ("channel_0",)
    assert solid.plan.normalisation[0].scheme == "zscore"


def test_saving_and_loading_changes_nothing(solid: Segmenter, flat: Segmenter, tmp_path: Path) -> None:
    for model, dims in ((solid, 3), (flat, 2)):
        model.save(tmp_path / str(dims))
        loaded = Segmenter.load(tmp_path / str(dims), device="cpu")
        assert loaded.package.digest == model.package.digest
        assert loaded.package.manifest == model.package.manifest
        assert loaded.spatial_dims == dims
        assert loaded.labels == dict(model.labels or {})
        with pytest.raises(InputError, match="has scored no case"):
            _ = loaded.scores


def test_a_package_of_medseg_run_is_loaded(tiny_run: RunResult, phantom_dataset: Path) -> None:
    model = Segmenter.load(tiny_run.package, device="cpu")
    path = phantom_dataset / "imagesTs" / "phantom_007.nii.gz"
    expected = medseg.load(tiny_run.package, device="cpu")(path)
    np.testing.assert_array_equal(model.predict(path), expected.array)
    assert model.configuration == "3d_fullres"
    assert model.labels == LABELS


def test_a_loaded_segmenter_can_be_fitted_anew(solid: Segmenter, tmp_path: Path, written: Written) -> None:
    solid.save(tmp_path / "model.zip")
    model = Segmenter.load(tmp_path / "model.zip", device="cpu")
    model.folder = tmp_path / "again"
    with pytest.raises(Stop):
        model.fit(*volumes())
    assert Dataset.open(tmp_path / "again" / "dataset").labels.values == LABELS


@pytest.mark.parametrize("use", [lambda s: s.predict(np.zeros((4, 4, 4))), lambda s: s.plan, lambda s: s.save("x")])
def test_nothing_comes_of_a_segmenter_that_was_not_fitted(use: Callable[[Segmenter], Any]) -> None:
    with pytest.raises(InputError, match=r"Segmenter: has no model .*Call fit\(images, masks\)"):
        use(Segmenter())


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each training that really took place."""
    original, counted = train._loop, []

    def loop(*arguments: Any) -> None:
        counted.append(arguments)
        original(*arguments)

    monkeypatch.setattr(train, "_loop", loop)
    return counted


def test_a_folder_is_kept_and_gone_on_from(
    tmp_path: Path, trainings: list[Any], tiny_overrides: tuple[str, ...]
) -> None:
    images, masks = volumes(2)
    choices: dict[str, Any] = {"iterations": 1, "overrides": tiny_overrides, "device": "cpu", "folder": tmp_path}
    first = Segmenter(LABELS, **choices).fit(images, masks)
    assert (tmp_path / "plan.json").is_file()
    second = Segmenter(LABELS, **choices).fit(images, masks)
    assert len(trainings) == 1
    assert second.package.digest == first.package.digest
    assert second.evaluation == first.evaluation
    Segmenter(LABELS, **choices).fit([images[0] + 1, images[1]], masks)
    assert len(trainings) == 2, "other data are other work"


def test_without_a_folder_nothing_is_left_and_each_fit_trains(
    tmp_path: Path, trainings: list[Any], tiny_overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = Segmenter(LABELS, iterations=1, overrides=tiny_overrides, device="cpu")
    said: list[str] = []
    assert model.fit(*volumes(2), progress=lambda work, *_: said.append(work)) is model
    model.fit(*volumes(2))
    model.save(tmp_path / "model.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert len(trainings) == 2
    assert {"checking", "training", "predicting"} <= set(said)


# ---- what is written -------------------------------------------------------------------------------------------------


def test_volumes_lie_along_ras_with_their_spacing(written: Written) -> None:
    images, masks = volumes()
    data = written(images, masks, SPACING, labels=LABELS, channels="CT")
    assert data.channels == ("CT",)
    assert data.labels.values == LABELS
    assert [case.id for case in data.cases] == ["case_0", "case_1", "case_2", "case_3"]
    for case, image, mask in zip(data.cases, images, masks, strict=True):
        volume = io.read_volume(case.images)
        np.testing.assert_array_equal(volume.array[0], image)
        np.testing.assert_array_equal(volume.geometry.affine, RAS)
        assert case.label is not None
        np.testing.assert_array_equal(io.read_mask(case.label).array, mask)


def test_each_case_may_have_its_own_spacing(written: Written) -> None:
    data = written(*volumes(2), [(1, 1, 2), (3, 1, 2)], labels=LABELS)
    assert [io.read_volume(case.images).geometry.spacing for case in data.cases] == [(1, 1, 2), (3, 1, 2)]
    assert io.read_volume(written(*volumes(2)).cases[0].images).geometry.spacing == (1, 1, 1)


@settings(max_examples=25)  # each writes files
@given(
    arrays.arrays(
        st.sampled_from([np.dtype(name) for name in ("bool", "uint8", ">i2", "int64", "float16", "float64")]),
        arrays.array_shapes(min_dims=2, max_dims=3, max_side=5),
        elements=st.integers(0, 1),
    )
)
def test_a_picture_of_any_number_type_lies_as_its_file_would(array: Array) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmenter, "run", lambda *_, **__: (_ for _ in ()).throw(Stop))
        mask = np.ones(array.shape[-2:], bool)
        with pytest.raises(Stop):
            Segmenter(spatial_dims=2, folder=folder).fit([array, array], [mask, mask], (2, 3))
        volume = io.read_volume(Path(folder) / "dataset" / "imagesTr" / "case_0.nii")
    expected = array.reshape(-1, *array.shape[-2:]).transpose(0, 2, 1)[..., np.newaxis]  # columns are the first axis
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_array_equal(volume.geometry.affine, np.diag([-3.0, -2.0, 1.0, 1.0]))


def test_a_picture_lies_on_the_grid_of_its_file(written: Written, tmp_path: Path) -> None:
    images, masks = pictures(2)
    for n in range(2):
        Image.fromarray(images[n]).save(tmp_path / f"{n}.png")
        Image.fromarray(masks[n]).save(tmp_path / f"{n}_mask.png")
    of_arrays = written(images, masks, spatial_dims=2)
    files = [tmp_path / "0.png", str(tmp_path / "1.png")]
    of_files = written(files, [tmp_path / "0_mask.png", masks[1]], spatial_dims=2)
    for a, b in zip(of_arrays.cases, of_files.cases, strict=True):
        one, other = io.read_volume(a.images), io.read_volume(b.images)
        np.testing.assert_array_equal(one.array, other.array)
        np.testing.assert_array_equal(one.geometry.affine, other.geometry.affine)
        assert a.label is not None
        assert b.label is not None
        np.testing.assert_array_equal(io.read_mask(a.label).array, io.read_mask(b.label).array)
    assert of_files.cases[1].images == (tmp_path / "1.png",), "files are read where they lie"
    assert of_files.labels.values == {"label_3": 3}


def test_files_of_channels_are_read_where_they_lie(written: Written, tmp_path: Path, phantom_dataset: Path) -> None:
    path = shutil.copy(phantom_dataset / "imagesTr" / "phantom_001.nii.gz", tmp_path / "a.nii.gz")
    label = phantom_dataset / "labelsTr" / "phantom_001.nii.gz"
    data = written([(path, path)] * 2, [label, io.read_mask(label).array])
    assert data.cases[0].images == (tmp_path / "a.nii.gz",) * 2
    assert data.channels == ("channel_0", "channel_1")
    assert data.labels.values == {"label_1": 1, "label_5": 5}
    assert not (data.root / "imagesTr").exists()
    assert data.cases[1].label is not None
    mask = io.read_mask(data.cases[1].label)
    assert mask.geometry.close_to(io.read_mask(label).geometry), "an array is on the grid of its image's file"


FORMS: dict[str, Callable[[Array], Any]] = {
    "array": lambda a: a,
    "tensor": torch.from_numpy,
    "array of one channel": lambda a: a[np.newaxis],
    "MetaTensor": lambda a: MetaTensor(torch.from_numpy(a)[None], affine=torch.from_numpy(RAS)),
    "array and affine": lambda a: (a, RAS),
    "tensor and affine": lambda a: (torch.from_numpy(a), torch.from_numpy(RAS)),
    "nibabel": lambda a: nibabel.Nifti1Image(a, RAS),
}


def sitk_of(array: Array) -> Any:
    image = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing(SPACING)
    image.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1])
    return image


FORMS["SimpleITK"] = sitk_of


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_all_forms_of_an_image_are_the_same_case_and_have_the_same_mask(
    form: Callable[[Array], Any], solid: Segmenter, written: Written
) -> None:
    images, masks = volumes(2)
    expected = written(images, masks, SPACING, labels=LABELS)
    found = written([form(image) for image in images], [form(mask) for mask in masks], SPACING, labels=LABELS)
    for a, b in zip(expected.cases, found.cases, strict=True):
        for one, other in zip(a.files, b.files, strict=True):
            one_volume, other_volume = io.read_volume(one), io.read_volume(other)
            np.testing.assert_array_equal(one_volume.array, other_volume.array)
            np.testing.assert_allclose(one_volume.geometry.affine, other_volume.geometry.affine, atol=1e-6)
    np.testing.assert_array_equal(solid.predict(form(images[0]), SPACING), solid.predict(images[0], SPACING))


def test_a_mask_without_a_grid_takes_axes_and_grid_of_its_image(written: Written) -> None:
    image, mask = (some[0] for some in pictures(1))
    plane = np.array([[0.0, 2, 5], [3, 0, 7], [0, 0, 1]])  # of (I, J), as MONAI has it
    tensor = MetaTensor(torch.from_numpy(image)[None], affine=torch.from_numpy(plane))
    data = written([(image, plane), tensor], [mask, mask], spatial_dims=2)
    for case in data.cases:
        assert case.label is not None
        volume, label = io.read_volume(case.images), io.read_mask(case.label)
        np.testing.assert_array_equal(volume.array[0, ..., 0], image)
        np.testing.assert_array_equal(label.array[..., 0], mask)
        expected = [[0, 2, 0, 5], [3, 0, 0, 7], [0, 0, 1, 0], [0, 0, 0, 1]]
        np.testing.assert_array_equal(volume.geometry.affine, expected)
        np.testing.assert_array_equal(label.geometry.affine, expected)


def test_a_picture_that_knows_its_grid_keeps_its_axes(flat: Segmenter) -> None:
    image = pictures()[0][0]
    turned = flat.predict((image.T, PICTURE))
    np.testing.assert_array_equal(turned.T, flat.predict(image))
    np.testing.assert_array_equal(flat.predict(SimpleITK.GetImageFromArray(image)), turned)


def test_tensors_of_16_bits_are_taken(written: Written) -> None:
    images, masks = pictures(2)
    data = written([torch.from_numpy(image).to(torch.bfloat16) for image in images], masks, spatial_dims=2)
    expected = torch.from_numpy(images[0]).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(io.read_volume(data.cases[0].images).array[0, ..., 0], expected.T)


def test_one_array_may_hold_all_cases(written: Written) -> None:
    images, masks = pictures(3)
    data = written(np.stack(images), torch.from_numpy(np.stack(masks)), spatial_dims=2)
    assert len(data.cases) == 3
    np.testing.assert_array_equal(io.read_volume(data.cases[2].images).array[0, ..., 0], images[2].T)


def test_cases_keep_their_order(written: Written) -> None:
    images, masks = pictures(11, (20, 20))
    data = written(images, masks, spatial_dims=2)
    assert [case.id for case in data.cases] == [f"case_{n:02d}" for n in range(11)]
    np.testing.assert_array_equal(io.read_volume(data.cases[10].images).array[0, ..., 0], images[10].T)


def test_labels_may_have_regions_and_voxels_to_ignore(written: Written) -> None:
    labels = {"whole": [1, 5], "organ": 1, "lesion": 5, "ignore": 9}
    found = written(*volumes(2), labels=labels).labels
    assert (found.values, found.regions, found.ignore) == (LABELS, {"whole": (1, 5)}, 9)


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_all_faulty_cases_are_named_at_once() -> None:
    images, masks = volumes(6)
    images[1] = images[1].astype(float)
    images[1][3, 3, 3] = np.nan
    masks[2] = masks[2][:-1]
    masks[3] = masks[3] * 0.5
    masks[4] = np.where(masks[4] == 5, 7, masks[4])
    with pytest.raises(DatasetError) as caught:
        Segmenter(LABELS, device="cpu").fit(images, masks)
    lines = str(caught.value).splitlines()
    assert lines[0] == "images and masks: 4 of 6 cases cannot be used:"
    for line, case, words in zip(
        lines[1:],
        ("case_1", "case_2", "case_3", "case_4"),
        ("1 voxels are not finite", "labelsTr/case_2.nii is ", "are no integers", "holds the values [7]"),
        strict=True,
    ):
        assert line.startswith(f"  {case}: ")
        assert words in line
    assert lines[-1].endswith("Correct them, or leave them out")


def test_all_that_are_no_images_are_named_at_once() -> None:
    images: list[Any] = volumes(6)[0]
    masks: list[Any] = volumes(6)[1]
    images[0] = np.zeros((4, 4))
    images[1] = np.zeros((2, 2, 0))
    masks[2] = "abc"
    masks[3] = {"mask": masks[3]}
    images[4] = images[4].astype(complex)
    images[5] = (images[5], np.zeros((4, 4)))
    with pytest.raises(DatasetError) as caught:
        Segmenter().fit(images, masks)
    found = str(caught.value)
    assert "6 of 6 cases" in found
    assert "case_0: image: has shape (4, 4) (expected (I, J, K) or (C, I, J, K)). Spatial_dims is 3" in found
    assert "case_1: image: has shape (2, 2, 0)" in found
    assert "case_2: " in found
    assert "abc: has no known image ending" in found
    assert "case_3: mask: is a dict" in found
    assert "case_4: image: holds complex128 voxels" in found
    assert "case_5: affine of the image: is no invertible 4x4 matrix" in found


@pytest.mark.parametrize(("images", "masks"), [(0, 0), (1, 1), (3, 2)])
def test_there_are_two_cases_at_least_and_a_mask_for_each(images: int, masks: int) -> None:
    with pytest.raises(DatasetError, match=f"{images} images and {masks} masks"):
        Segmenter().fit(volumes(3)[0][:images], volumes(3)[1][:masks])


def test_masks_of_nothing_have_no_labels() -> None:
    with pytest.raises(DatasetError, match="at least one label"):
        Segmenter().fit(volumes(2)[0], [np.zeros_like(mask) for mask in volumes(2)[1]])


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, np.nan), 2.0, [(1, 1, 1)] * 3, [(1, 1, 1), (1, 1)], "1"])
def test_what_is_no_spacing_is_refused(spacing: Any) -> None:
    with pytest.raises(InputError, match="3 lengths in mm, for all images or for each of the 2"):
        Segmenter().fit(*volumes(2), spacing)


def test_an_image_of_other_channels_is_refused(solid: Segmenter) -> None:
    with pytest.raises(InputError, match=r"has 2 channels \(expected 1\)"):
        solid.predict(np.zeros((2, 9, 9, 9)))


def test_no_images_have_no_masks(solid: Segmenter) -> None:
    assert solid.predict([]) == []


def test_arguments_become_settings() -> None:
    assert Segmenter(time_budget="1h30m").settings.time_budget_s == 5400
    made = Segmenter(iterations=7, seed=3, device="cpu").settings
    assert (made.iterations, made.time_budget_s, made.seed, made.device) == (7, None, 3, "cpu")
    assert Segmenter().settings.iterations is None
    name, recipe = next(iter(RECIPES.items()))
    assert Segmenter(recipe=name, overrides=("plan.batch_size=1",)).overrides == (*recipe, "plan.batch_size=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims: is 4"),
        ({"time_budget": "soon"}, "'soon' is no length of time"),
        ({"time_budget": "9s", "iterations": 9}, "only one budget can hold"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Segmenter(**arguments)
    with pytest.raises(PlanError, match="recipe: there is no 'soup'"):
        Segmenter(recipe="soup")
