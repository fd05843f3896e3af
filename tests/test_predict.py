"""Prediction: any door gives the same mask, on the image's own grid; folders survive bad cases and interruptions."""

from __future__ import annotations

import csv
import errno
import gzip
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation
from small_datasets import picture, save_picture

from medseg import io, predict, records
from medseg.cases import find_cases
from medseg.dataset import Case
from medseg.errors import InputError, PackageError
from medseg.geometry import Geometry
from medseg.io import nifti
from medseg.journal import Prediction
from medseg.networks import build_network
from medseg.package import ModelPackage, load_package, zip_package
from medseg.phantom import make_case
from medseg.pipeline import RunResult
from medseg.predict import Predictor, PredictSettings, load, predict_cases
from medseg.volume import Labels

TURN, HALF = Rotation.from_euler("xyz", [20, -15, 10], degrees=True), Rotation.from_euler("z", 45, degrees=True)
GRIDS = {
    "axial": np.diag([0.9, 0.9, 2.5]),
    "left-handed": np.diag([-0.9, 0.9, 2.5]),
    "oblique": TURN.as_matrix() * [0.9, 0.9, 2.5],
    "turned by 45 degrees": HALF.as_matrix() * [0.9, 0.9, 2.5],
    "sheared": np.array([[0.9, 0.2, 0], [0, 0.9, 0.3], [0, 0, 2.5]]),
}
SHAPE = (20, 18, 9)
FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


def affine_of(name: str) -> NDArray[np.float64]:
    """The affine as a NIfTI-1 header holds it."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = GRIDS[name], [-12.3, 7.7, 100.1]
    return affine.astype(np.float32).astype(float)


def voxels(channels: int = 1) -> NDArray[np.int16]:
    """A phantom of the fixed shape (C, 20, 18, 9), cut out of one that is a little larger."""
    volume, _ = make_case(0, shape=(24, 22, 12), channels=("MRI",) * channels)
    return np.ascontiguousarray(volume.array[:, :20, :18, :9])


def save(path: Path, array: NDArray[Any], affine: NDArray[Any] | None = None, **fields: Any) -> Path:
    """Write an array (I, J, K[, C]) with nibabel; ``fields`` of the header as given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine_of("axial") if affine is None else affine)
    for name, value in fields.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def package(tiny_run: RunResult) -> ModelPackage:
    return load_package(tiny_run.package)


@pytest.fixture(scope="module")
def predictor(package: ModelPackage) -> Predictor:
    return Predictor(package, PredictSettings(device="cpu"))


def untrained(package: ModelPackage, **changes: Any) -> Predictor:
    """A predictor with fresh weights for a plan with some fields changed: masks are nonsense, but always the same."""
    plan = package.plan.model_copy(update=changes)
    torch.manual_seed(0)
    weights = build_network(package.configuration, len(plan.channels), plan.labels.count).state_dict()
    return Predictor(replace(package, plan=plan, weights={0: weights}), PredictSettings())


@pytest.fixture
def images(tmp_path: Path, phantom_dataset: Path) -> Path:
    """A folder with two good images, a.nii.gz and b.nii.gz."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, source in zip("ab", sorted((phantom_dataset / "imagesTs").iterdir()), strict=True):
        (folder / f"{name}.nii.gz").write_bytes(source.read_bytes())
    return folder


def statuses(results: list[Prediction]) -> dict[str, str]:
    return {result.case: result.status for result in results}


# Pictures


@pytest.fixture(scope="module")
def of_pictures(picture_run: RunResult) -> Predictor:
    return load(picture_run.package, device="cpu")


def test_a_folder_of_pictures_gives_masks_on_their_own_pixels(of_pictures: Predictor, tmp_path: Path) -> None:
    shown = {name: picture(n, (52, 37)) for n, name in enumerate("abc")}
    for name, orientation, ending in (("a", 1, ".png"), ("b", 6, ".png"), ("c", 6, ".tif")):
        save_picture(tmp_path / "in" / f"{name}{ending}", shown[name][0], orientation)
    save_picture(tmp_path / "in" / "grey.png", shown["a"][0][..., 0])
    touch(tmp_path / "in", "empty.jpg")
    results = predict_cases(of_pictures, find_cases(tmp_path / "in"), tmp_path / "out")
    assert {r.case: r.output for r in results} == {"a": "a.png", "b": "b.png", "c": "c.tif", "empty": "", "grey": ""}
    reasons = {r.case: r.reason for r in results}
    assert "is empty" in reasons["empty"]
    assert "has 1 channels (expected 3)" in reasons["grey"]
    for name, file, orientation in (("a", "a.png", 1), ("b", "b.png", 6), ("c", "c.tif", 6)):
        with Image.open(tmp_path / "out" / file) as image:
            assert image.getexif().get(0x0112, 1) == orientation  # so that viewers turn both alike
        mask = io.read_mask(tmp_path / "out" / file, of_pictures.package.plan.labels)
        assert mask.geometry == io.read_volume(next((tmp_path / "in").glob(f"{name}.*"))).geometry
        upright = mask.geometry.to("LPS").apply(mask.array)[..., 0].T
        assert upright.shape == (37, 52)
        for value in (1, 3):
            truth, found = shown[name][1] == value, upright == value
            assert (truth & found).sum() > 0.8 * truth.sum()  # it lies where the picture shows it,
            assert found.mean() < 0.25  # and not everywhere


def test_a_picture_on_its_side_is_segmented_as_upright(of_pictures: Predictor, tmp_path: Path) -> None:
    upright = of_pictures(save_picture(tmp_path / "a.png", picture(7)[0]))
    turned = of_pictures(save_picture(tmp_path / "b.png", picture(7)[0], 6))
    assert turned.array.shape == (32, 40, 1)
    np.testing.assert_array_equal(turned.geometry.to("LPS").apply(turned.array), upright.array)
    assert len(np.unique(upright.array)) > 1


def test_the_mask_of_a_picture_does_not_replace_it(of_pictures: Predictor, tmp_path: Path) -> None:
    before = save_picture(tmp_path / "a.png", picture(0)[0]).read_bytes()
    (result,) = predict_cases(of_pictures, find_cases(tmp_path), tmp_path, overwrite=True)
    assert "is the input itself" in result.reason
    assert (tmp_path / "a.png").read_bytes() == before


def test_jpeg_in_png_out(of_pictures: Predictor, tmp_path: Path) -> None:
    Image.fromarray(picture(0)[0]).save(tmp_path / "a.jpg", quality=95)
    (result,) = predict_cases(of_pictures, find_cases(tmp_path / "a.jpg"), tmp_path / "out")
    assert result.output == "a.png"
    assert predict_cases(of_pictures, find_cases(tmp_path / "a.jpg"), tmp_path / "out")[0].status == "kept"


# Geometry


@pytest.mark.parametrize(
    ("grid", "codes"),
    # sform and qform code; a quaternion holds no shear
    [(g, c) for g in GRIDS for c in [(1, 1), (2, 0), (4, 3), (0, 1)] if g != "sheared" or c[0]],
)
def test_the_mask_file_has_the_affine_and_codes_of_its_image_bit_for_bit(
    grid: str, codes: tuple[int, int], predictor: Predictor, tmp_path: Path
) -> None:
    image = nibabel.Nifti1Image(voxels()[0], affine_of(grid))
    image.set_sform(affine_of(grid), codes[0])
    image.set_qform(affine_of(grid) if grid != "sheared" else affine_of("axial"), codes[1])
    nibabel.save(image, tmp_path / "in.nii.gz")
    predict_cases(predictor, find_cases(tmp_path / "in.nii.gz"), tmp_path / "out")
    before, after = nibabel.load(tmp_path / "in.nii.gz"), nibabel.load(tmp_path / "out" / "in.nii.gz")
    assert after.affine.tobytes() == before.affine.tobytes()
    assert after.shape == SHAPE
    for field in FIELDS:
        assert after.header[field].tobytes() == before.header[field].tobytes(), field
    assert after.header["pixdim"][:4].tobytes() == before.header["pixdim"][:4].tobytes()
    assert after.get_data_dtype() == np.uint8
    assert len(np.unique(after.dataobj)) == 3


@pytest.mark.parametrize("grid", ["oblique", "turned by 45 degrees", "sheared"])
def test_turning_the_image_turns_the_mask_for_all_48_orientations(grid: str, predictor: Predictor) -> None:
    image = nibabel.Nifti1Image(voxels()[0].astype(np.float32), affine_of(grid))
    mask = nibabel.Nifti1Image(predictor(image).array, image.affine)
    assert len(np.unique(mask.dataobj)) == 3
    own = io_orientation(image.affine)
    turned = 0
    for axes in itertools.permutations((("R", "L"), ("A", "P"), ("S", "I"))):
        for codes in itertools.product(*axes):
            turn = ornt_transform(own, axcodes2ornt(codes))  # nibabel's arithmetic, not medseg's
            found = predictor(image.as_reoriented(turn))
            np.testing.assert_array_equal(found.array, np.asarray(mask.as_reoriented(turn).dataobj), str(codes))
            turned += 1
    assert turned == 48


def test_label_values_come_back_whatever_they_are(package: ModelPackage, tmp_path: Path) -> None:
    model = untrained(package, labels=Labels(values={"organ": 7, "lesion": 300}))
    mask = model((voxels(), affine_of("axial")))
    assert mask.array.dtype == np.uint16
    assert sorted(np.unique(mask.array)) == [0, 7, 300]
    assert set(mask.volumes_ml()) == {"organ", "lesion"}
    voxel_ml = 0.9 * 0.9 * 2.5 / 1000
    assert mask.volumes_ml()["lesion"] == pytest.approx((mask.array == 300).sum() * voxel_ml, rel=1e-6)
    save(tmp_path / "in.nii.gz", voxels()[0])
    predict_cases(model, find_cases(tmp_path / "in.nii.gz"), tmp_path / "out")
    written = np.asanyarray(nibabel.load(tmp_path / "out" / "in.nii.gz").dataobj)
    assert written.dtype == np.uint16
    np.testing.assert_array_equal(written, mask.array)


# Doors


def doors(path: Path) -> dict[str, Any]:
    image = nibabel.load(path)
    array = np.asanyarray(image.dataobj)
    return {
        "text": str(path),
        "path": path,
        "list": [path],
        "nibabel": image,
        "SimpleITK": SimpleITK.ReadImage(str(path)),
        "MetaTensor": MetaTensor(torch.from_numpy(array[np.newaxis].astype(np.float32)), affine=image.affine),
        "array": (array, image.affine),
        "array with channels": (array[np.newaxis], image.affine),
        "tensor": (torch.from_numpy(array.astype(np.float32)), torch.from_numpy(image.affine)),
    }


@pytest.mark.parametrize("grid", ["oblique", "left-handed"])
def test_every_door_gives_the_same_mask(grid: str, predictor: Predictor, tmp_path: Path) -> None:
    path = save(tmp_path / "in.nii.gz", voxels()[0], affine_of(grid))
    expected = predictor(path)
    assert len(np.unique(expected.array)) == 3
    for door, image in doors(path).items():
        mask = predictor(image)
        np.testing.assert_array_equal(mask.array, expected.array, door)
        np.testing.assert_allclose(mask.geometry.affine, expected.geometry.affine, atol=1e-5, err_msg=door)


def test_channels_in_one_file_and_in_several_are_the_same_image(package: ModelPackage, tmp_path: Path) -> None:
    rules = package.plan.normalisation * 2
    model = untrained(package, channels=("T1", "T2"), normalisation=rules)
    both = voxels(2)
    whole = save(tmp_path / "case.nii.gz", np.moveaxis(both, 0, -1))
    parts = [save(tmp_path / "parts" / f"case_000{n}.nii.gz", both[n]) for n in (0, 1)]
    expected = model((both, affine_of("axial"))).array
    assert len(np.unique(expected)) > 1
    for image in (whole, parts, nibabel.load(whole)):
        np.testing.assert_array_equal(model(image).array, expected)
    predict_cases(model, find_cases(tmp_path / "parts"), tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "out" / "case.nii.gz").dataobj), expected)
    with pytest.raises(InputError, match=r"1 channels.*expected 2"):
        model(parts[0])


@pytest.mark.parametrize(
    "image",
    [None, 3, np.zeros((4, 4, 4)), torch.zeros(1, 4, 4, 4), [], [1, 2], (1, 2, 3), {"image": "a"}],
    ids=lambda i: type(i).__name__,
)
def test_another_kind_of_image_is_refused_with_the_list_of_kinds(image: Any, predictor: Predictor) -> None:
    with pytest.raises(InputError, match=r"path.*nibabel.*SimpleITK.*MetaTensor.*affine"):
        predictor(image)


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((4, 4)), np.eye(4), "shape"),
        (np.zeros((2, 4, 4, 4)), np.eye(4), "2 channels.*expected 1"),
        (np.full((4, 4, 4), np.nan), np.eye(4), "64 voxels are not finite"),
        (np.zeros((4, 4, 4), complex), np.eye(4), "complex"),
        (np.zeros((4, 4, 4)), np.eye(3), "affine"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4)), "affine"),
        (np.zeros((4, 4, 4)), np.diag([1, 1, np.inf, 1]), "affine"),
    ],
    ids=["2D", "channels", "NaN", "complex", "3x3", "singular", "infinite"],
)
def test_an_array_that_cannot_be_used_is_refused(array: Any, affine: Any, message: str, predictor: Predictor) -> None:
    with pytest.raises(InputError, match=message):
        predictor((array, affine))


def test_an_image_without_anything_in_it_gives_a_mask_of_its_shape(predictor: Predictor) -> None:
    assert predictor((np.zeros((3, 4, 5)), np.eye(4))).array.shape == (3, 4, 5)
    assert predictor((np.ones((1, 1, 1)), np.eye(4))).array.shape == (1, 1, 1)


def test_nothing_is_printed_and_no_process_spawned(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was spawned")

    for door in ("fork", "posix_spawn"):
        monkeypatch.setattr(f"os.{door}", refuse)
    monkeypatch.setattr("subprocess.Popen.__init__", refuse)
    predictor((voxels(), affine_of("axial")))
    assert capfd.readouterr() == ("", "")


SCRIPT = """
import multiprocessing, sys, threading
import numpy as np
import medseg
multiprocessing.set_start_method("spawn")  # a process that is started would run this file again
sys.stdout.write("begin\\n")
model = medseg.load(sys.argv[1], device="cpu")
masks = []
thread = threading.Thread(target=lambda: masks.append(model((np.ones((9, 9, 9)), np.eye(4)))), daemon=True)
thread.start()
thread.join()
sys.stdout.write(f"end {masks[0].array.shape}\\n")
"""


def test_a_script_without_a_guard_can_predict_in_a_daemon_thread(tiny_run: RunResult, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tiny_run.package)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr, result.returncode) == ("begin\nend (9, 9, 9)\n", "", 0)


def test_load_takes_folders_zips_and_settings(tiny_run: RunResult, tmp_path: Path) -> None:
    zip_package(tiny_run.package, tmp_path / "model.zip")
    image = (voxels(), affine_of("axial"))
    expected = load(tiny_run.package)(image).array
    np.testing.assert_array_equal(load(str(tmp_path / "model.zip"))(image).array, expected)
    mirrored = load(tiny_run.package, mirror=True, overlap=0.25)
    assert mirrored.settings == PredictSettings(mirror=True, overlap=0.25)
    assert mirrored(image).array.shape == expected.shape
    with pytest.raises(InputError, match="mirrored"):
        load(tiny_run.package, mirrored=True)
    with pytest.raises(InputError, match="overlap"):
        load(tiny_run.package, overlap=1.0)
    with pytest.raises(InputError, match=r"'abacus' is not there.*cpu"):
        load(tiny_run.package, device="abacus")
    with pytest.raises(PackageError):
        load(tmp_path)


# Folders


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_two_images_of_one_name_are_refused_and_the_others_done(
    predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    (images / "a.nii").write_bytes(gzip.decompress((images / "a.nii.gz").read_bytes()))
    results = predict_cases(predictor, find_cases(images), tmp_path / "out")
    assert statuses(results) == {"a": "failed", "b": "done"}
    assert "a.nii and a.nii.gz" in results[0].reason
    (result,) = predict_cases(predictor, find_cases(touch(tmp_path / "pictures", "c.png", "c.tif")), tmp_path / "out")
    assert "c.png and c.tif" in result.reason
    touch(tmp_path / "channels", "p_0000.nii", "p_0000.nii.gz", "p_0001.nii")
    (case,) = find_cases(tmp_path / "channels")
    assert statuses(predict_cases(predictor, [case], tmp_path / "out")) == {"p": "failed"}


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def with_nan(path: Path) -> None:
    array = voxels()[0].astype(np.float32)
    array[3, 3, 3] = np.nan
    save(path, array)


def with_channels(path: Path) -> None:
    save(path, np.moveaxis(voxels(2), 0, -1))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated, "truncated"),
        (with_nan, "1 voxels are not finite"),
        (with_channels, "2 channels (expected 1)"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("<html>not found</html>"), "no NIfTI"),
    ],
    ids=["truncated", "NaN", "channels", "empty", "html"],
)
def test_a_bad_case_is_recorded_with_its_reason_and_the_others_are_done(
    spoil: Callable[[Path], None], reason: str, predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    spoil(images / "a.nii.gz")
    out = tmp_path / "out"
    seen: list[tuple[str, float, str]] = []
    results = predict_cases(predictor, find_cases(images), out, progress=lambda *step: seen.append(step))
    assert statuses(results) == {"a": "failed", "b": "done"}
    assert seen == [("predicting", 0.5, "a failed"), ("predicting", 1.0, "b done")]
    assert sorted(path.name for path in out.iterdir()) == ["b.nii.gz", "cases.csv", "journal.jsonl", "run.json"]
    with (out / "cases.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert reason in rows["a"]["reason"]
    assert (rows["a"]["status"], rows["a"]["organ_ml"]) == ("failed", "")
    assert (rows["b"]["status"], rows["b"]["output"], rows["b"]["reason"]) == ("done", "b.nii.gz", "")
    assert float(rows["b"]["organ_ml"]) > 0
    run = json.loads((out / "run.json").read_text())
    assert run["cases"] == {"done": 1, "kept": 0, "failed": 1}
    assert (run["device"], run["model_digest"]) == ("cpu", predictor.package.digest)


def test_a_file_that_may_not_be_read_fails_alone(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(path: Path) -> str:
        if path.name == "a.nii.gz" and path.parent == images:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return records.digest_file(path)

    monkeypatch.setattr(predict, "digest_file", digest)  # whoever runs as root may read everything
    results = predict_cases(predictor, find_cases(images), tmp_path / "out")
    assert statuses(results) == {"a": "failed", "b": "done"}
    assert "Permission denied" in results[0].reason


def test_a_disk_that_is_full_leaves_no_part_of_a_mask(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sync = tmp_path / "out", records._sync

    def full(path: Path) -> None:
        if path.name.endswith("a.nii.gz"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(records, "_sync", full)
    results = predict_cases(predictor, find_cases(images), out)
    assert statuses(results) == {"a": "failed", "b": "done"}
    assert "No space left" in results[0].reason
    assert sorted(path.name for path in out.iterdir()) == ["b.nii.gz", "cases.csv", "journal.jsonl", "run.json"]
    monkeypatch.undo()
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "done", "b": "kept"}


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("out of memory"), ValueError("a bug")], ids=repr)
def test_whatever_one_case_raises_the_others_are_done(
    failure: Exception, package: ModelPackage, images: Path, tmp_path: Path
) -> None:
    class Fragile(Predictor):
        def __call__(self, image: Any) -> Any:
            if image[0].name == "a.nii.gz":
                raise failure
            return super().__call__(image)

    results = predict_cases(Fragile(package), find_cases(images), tmp_path / "out")
    assert statuses(results) == {"a": "failed", "b": "done"}
    assert type(failure).__name__ in results[0].reason


def test_names_with_spaces_other_scripts_and_bytes_that_are_no_text(predictor: Predictor, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    for name in ("mit Leerzeichen", "Ärztin", "病例", "x" * 200, "b\udcff"):
        save(images / f"{name}.nii", voxels()[0])
    results = predict_cases(predictor, find_cases(images), out)
    assert {result.status for result in results} == {"done"}
    assert (out / "病例.nii.gz").exists()
    assert "Ärztin,done,Ärztin.nii.gz" in (out / "cases.csv").read_text(encoding="utf-8")
    assert {r.status for r in predict_cases(predictor, find_cases(images), out)} == {"kept"}


def test_an_id_that_leads_out_of_the_folder_is_refused(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "inner" / "out"
    (result,) = predict_cases(predictor, [Case("../escaped", (images / "a.nii.gz",), None)], out)
    assert (result.status, "slashes" in result.reason) == ("failed", True)
    assert not (tmp_path / "inner" / "escaped.nii.gz").exists()


# Resuming


def stamp(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}


def test_a_second_call_keeps_what_is_there_and_still_valid(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = predict_cases(predictor, find_cases(images), out)
    times = stamp(out)
    second = predict_cases(predictor, find_cases(images), out)
    assert statuses(second) == {"a": "kept", "b": "kept"}
    assert stamp(out) == times
    assert [result.volumes_ml for result in second] == [result.volumes_ml for result in first]
    assert json.loads((out / "run.json").read_text())["cases"] == {"done": 0, "kept": 2, "failed": 0}


def test_what_depends_on_a_changed_input_is_done_again(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_cases(predictor, find_cases(images), out)
    (images / "a.nii.gz").write_bytes((images / "b.nii.gz").read_bytes())
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "done", "b": "kept"}
    assert (out / "a.nii.gz").read_bytes() == (out / "b.nii.gz").read_bytes()


def test_the_second_file_of_a_pair_is_part_of_the_input(predictor: Predictor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "pair").mkdir()
    for array, status in ((voxels()[0], "done"), (voxels()[0], "kept"), (voxels()[0][::-1].copy(), "done")):
        nibabel.save(nibabel.Nifti1Pair(array, affine_of("axial")), tmp_path / "pair" / "a.img")
        assert statuses(predict_cases(predictor, find_cases(tmp_path / "pair"), out)) == {"a": status}


def test_other_settings_and_models_do_it_again(
    predictor: Predictor, package: ModelPackage, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    cases = find_cases(images)[:1]
    mirrored = Predictor(package, PredictSettings(device="cpu", mirror=True))
    files = dict.fromkeys(package.manifest.files, "0" * 64)
    manifest = package.manifest.model_copy(update={"files": files})
    another = Predictor(replace(package, manifest=manifest), predictor.settings)
    on_auto = Predictor(package, PredictSettings(device="auto"))
    found = [predict_cases(model, cases, out)[0].status for model in (predictor, mirrored, another, predictor, on_auto)]
    assert found == ["done", "done", "done", "done", "kept"]  # the device changes nothing that matters
    monkeypatch.setattr("medseg.__version__", "99")
    assert predict_cases(predictor, cases, out)[0].status == "done"


def test_half_a_mask_is_done_again(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_cases(predictor, find_cases(images), out)
    whole = (out / "a.nii.gz").read_bytes()
    (out / "a.nii.gz").write_bytes(whole[: len(whole) // 2])
    (out / "b.nii.gz").unlink()
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "done", "b": "done"}
    assert (out / "a.nii.gz").read_bytes() == whole


def test_a_mask_that_is_not_from_here_is_replaced_only_on_demand(
    predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    foreign = save(out / "a.nii.gz", np.ones(SHAPE, np.uint8)).read_bytes()
    for _ in range(2):
        results = predict_cases(predictor, find_cases(images), out)
        assert results[0].status == "failed"
        assert "--overwrite" in results[0].reason
        assert (out / "a.nii.gz").read_bytes() == foreign
    assert statuses(predict_cases(predictor, find_cases(images), out, overwrite=True)) == {"a": "done", "b": "kept"}
    assert (out / "a.nii.gz").read_bytes() != foreign


def test_a_mask_corrected_by_hand_is_not_replaced(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_cases(predictor, find_cases(images), out)
    corrected = save(out / "a.nii.gz", np.ones(SHAPE, np.uint8)).read_bytes()
    results = predict_cases(predictor, find_cases(images), out)
    assert statuses(results) == {"a": "failed", "b": "kept"}
    assert "changed since it was written" in results[0].reason
    assert (out / "a.nii.gz").read_bytes() == corrected


def test_the_input_itself_is_never_replaced(predictor: Predictor, images: Path) -> None:
    before = (images / "a.nii.gz").read_bytes()
    results = predict_cases(predictor, find_cases(images), images, overwrite=True)
    assert {result.status for result in results} == {"failed"}
    assert "the input itself" in results[0].reason
    assert (images / "a.nii.gz").read_bytes() == before


def test_a_kill_between_mask_and_journal_is_recovered_from(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(result: Prediction, append: Callable[[Path, Prediction], None] = predict._append) -> None:
        if result.status == "done":
            raise KeyboardInterrupt
        append(out / "journal.jsonl", result)

    monkeypatch.setattr(predict, "_append", lambda _, result: killed(result))
    with pytest.raises(KeyboardInterrupt):
        predict_cases(predictor, find_cases(images), out)
    monkeypatch.undo()
    assert (out / "a.nii.gz").exists()
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "done", "b": "done"}


def test_a_journal_with_a_torn_last_line_is_read_up_to_there(
    predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict_cases(predictor, find_cases(images), out)
    journal = out / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])  # of b's "done": its mask is there, and known by "started"
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "kept", "b": "done"}
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "kept", "b": "kept"}


def test_the_mask_of_a_former_input_does_not_stay_where_the_new_one_fails(
    predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict_cases(predictor, find_cases(images), out)
    with_nan(images / "a.nii.gz")
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "failed", "b": "kept"}
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["b.nii.gz"]


# Privacy


def test_text_in_a_header_goes_into_no_output(
    predictor: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    canary = b"DOE^JANE 1955"
    (tmp_path / "images").mkdir()
    fields = {"descrip": canary, "intent_name": canary, "aux_file": canary, "db_name": canary}
    for name, array in (("good", voxels()[0]), ("bad", np.full(SHAPE, np.nan, np.float32))):
        image = nibabel.Nifti1Image(array, affine_of("oblique"))
        for field, value in fields.items():
            image.header[field] = value
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", canary))
        nibabel.save(image, tmp_path / "images" / f"{name}.nii.gz")
    assert canary in gzip.decompress((tmp_path / "images" / "good.nii.gz").read_bytes())
    results = predict_cases(predictor, find_cases(tmp_path / "images"), tmp_path / "out")
    assert statuses(results) == {"bad": "failed", "good": "done"}
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix != ".gz")
    for mask in (tmp_path / "out").glob("*.nii.gz"):
        written += gzip.decompress(mask.read_bytes())
    in_memory = predictor(nibabel.load(tmp_path / "images" / "good.nii.gz"))
    written += nifti.to_nibabel(in_memory).header.binaryblock + caplog.text.encode()
    assert b"DOE" not in written
    assert b"JANE" not in written


def test_geometry_of_a_mask_is_that_of_its_image(predictor: Predictor) -> None:
    mask = predictor((voxels(), affine_of("oblique")))
    assert mask.geometry.shape == SHAPE
    assert mask.geometry.affine.tobytes() == Geometry(SHAPE, affine_of("oblique")).affine.tobytes()
