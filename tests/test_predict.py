"""Prediction: any door gives the same mask, on the image's own grid."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import dicoms
import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from dicoms import write_series
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from predicting import SHAPE, affine_of, save, statuses, untrained, voxels
from small_datasets import picture, save_picture

import medseg
from medseg import io, predict
from medseg.batch import predict_cases
from medseg.cases import find_cases
from medseg.errors import GeometryMismatch, InputError, PackageError
from medseg.geometry import Geometry
from medseg.networks import build_network
from medseg.package import ModelPackage, zip_package
from medseg.pipeline import RunResult
from medseg.postprocess import keep_largest
from medseg.predict import Predictor, PredictSettings, load
from medseg.preprocess import prepare, restore
from medseg.sliding_window import slabs
from medseg.volume import Labels, Volume

# Pictures


def test_a_picture_on_its_side_is_segmented_as_upright(of_pictures: Predictor, tmp_path: Path) -> None:
    upright = of_pictures(save_picture(tmp_path / "a.png", picture(7)[0]))
    turned = of_pictures(save_picture(tmp_path / "b.png", picture(7)[0], 6))
    assert turned.array.shape == (32, 40, 1)
    np.testing.assert_array_equal(turned.geometry.to("LPS").apply(turned.array), upright.array)
    assert len(np.unique(upright.array)) > 1


# Geometry


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
    with pytest.raises(InputError, match=r"1 channel .*expected 2"):
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


# Probabilities


def test_probabilities_of_a_class_that_is_not_there_are_refused(package: ModelPackage) -> None:
    with pytest.raises(InputError, match=r"the model has no heart, liver .expected all, organ, lesion"):
        Predictor(package, PredictSettings(probabilities=("liver", "organ", "heart")))


# Postprocessing and cascades


def test_of_a_group_only_the_largest_piece_is_kept(package: ModelPackage) -> None:
    image = (voxels(), affine_of("axial"))
    plain = untrained(package)(image).array
    kept = untrained(package, keep_largest=((1,),))(image).array
    np.testing.assert_array_equal(kept, keep_largest(plain, [(1,)]))
    assert (kept != plain).any()


def test_a_cascade_shows_the_mask_of_its_first_model_to_the_second(
    package: ModelPackage, images: Path, tmp_path: Path
) -> None:
    name = package.manifest.configuration
    setup = package.configuration.model_copy(update={"previous": name})
    plan = package.plan.model_copy(update={"configurations": {"3d_cascade_fullres": setup}})
    torch.manual_seed(0)
    weights = build_network(setup, plan.inputs(setup), plan.outputs).state_dict()
    manifest = package.manifest.model_copy(update={"configuration": "3d_cascade_fullres"})
    model = Predictor(
        replace(package, manifest=manifest, plan=plan, weights={0: weights}, previous=package),
        PredictSettings(device="cpu", engine="eager"),
    )
    volume = io.volume_of((voxels(), affine_of("oblique")))
    first = Predictor(package, model.settings).segment(volume)
    ready = prepare(volume, plan, setup, previous=first)
    assert ready.image.shape[0] == 3
    assert ready.image[1:].any()
    (network,) = model.package.networks()
    expected = restore(slabs([network], ready.image, setup.patch_size), ready.trace, plan)
    np.testing.assert_array_equal(model.segment(volume).array, expected)
    results = predict_cases(model, find_cases(images), tmp_path / "out")
    assert statuses(results) == {"a": "done", "b": "done"}


# Memory


def short_of_memory(times: int, failure: Exception, tried: list[int]) -> Any:
    """``slabs`` that run out of memory so many times, half-way."""

    def run(*arguments: Any, **choices: Any) -> Any:
        tried.append(choices["blocks"])
        for slab in slabs(*arguments, **choices):
            yield slab
            if len(tried) <= times:
                raise failure

    return run


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you asked for 8 bytes."),
    ],
    ids=["numpy", "torch", "torch on the host"],
)
def test_out_of_memory_goes_down_one_step_and_says_so(
    failure: Exception, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = (voxels(), affine_of("axial"))
    expected, tried = predictor(image).array, list[int]()
    monkeypatch.setattr(predict, "slabs", short_of_memory(1, failure, tried))
    np.testing.assert_array_equal(predictor(image).array, expected)
    assert tried == [1, 2]
    assert "out of memory" in caplog.text
    assert "in 2 blocks" in caplog.text
    tried.clear()
    monkeypatch.setattr(predict, "slabs", short_of_memory(2, failure, tried))
    with pytest.raises(type(failure)):
        predictor(image)
    assert tried == [1, 2]  # once, and not on and on


def test_another_error_is_not_taken_for_memory(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(predict, "slabs", short_of_memory(1, RuntimeError("worker died: out of memory?"), tried))
    with pytest.raises(RuntimeError, match="worker died"):
        predictor((voxels(), affine_of("axial")))
    assert tried == [1]


# Privacy


def test_geometry_of_a_mask_is_that_of_its_image(predictor: Predictor) -> None:
    mask = predictor((voxels(), affine_of("oblique")))
    assert mask.geometry.shape == SHAPE
    assert mask.geometry.affine.tobytes() == Geometry(SHAPE, affine_of("oblique")).affine.tobytes()


# DICOM


def test_every_door_of_dicom_gives_the_same_mask(predictor: Predictor, tmp_path: Path) -> None:
    write_series(tmp_path / "scan", voxels()[0], spacing=(0.9, 0.9, 2.5), modality="MR")
    packed = shutil.make_archive(str(tmp_path / "scan"), "zip", tmp_path / "scan")
    grid = dicoms.affine_of(spacing=(0.9, 0.9, 2.5))
    expected = predictor((voxels(), grid))
    assert len(np.unique(expected.array)) == 3
    series = medseg.series(tmp_path / "scan")
    for image in (str(tmp_path / "scan"), tmp_path / "scan", packed, series, [series], [tmp_path / "scan"]):
        mask = predictor(image)
        np.testing.assert_array_equal(mask.array, expected.array)
        np.testing.assert_allclose(mask.geometry.affine, grid, atol=1e-6)
        assert mask.header.uid == series.uid
        assert io.title(Volume(mask.array, mask.geometry, header=mask.header)) == series.name


def test_the_mask_of_a_series_can_be_written_as_a_segmentation(package: ModelPackage, tmp_path: Path) -> None:
    write_series(tmp_path / "scan", voxels()[0], spacing=(0.9, 0.9, 2.5))
    mask = untrained(package, labels=Labels(values={"liver": 2, "spleen": 9}))(tmp_path / "scan")
    io.write_mask(mask, tmp_path / "mask.dcm")
    found = io.read_mask(tmp_path / "mask.dcm", mask.labels)
    assert found.labels is not None
    assert found.labels.values == mask.labels.values
    assert found.labels.codings == mask.labels.codings
    assert (found.array == 9).sum() == (mask.array == 9).sum() > 0


def test_masks_know_the_codes_of_their_labels_in_the_models_dataset(package: ModelPackage) -> None:
    labels = Labels(values={"Anterior": 1, "Posterior": 5})
    plan = package.plan.model_copy(update={"labels": labels})
    named = package.manifest.model_copy(update={"name": "Task04_Hippocampus"})
    model = Predictor(replace(package, plan=plan, manifest=named))
    assert {name: coding.type.meaning for name, coding in model.labels.codings.items()} == {
        "Anterior": "Hippocampus",
        "Posterior": "Hippocampus",
    }
    assert Predictor(replace(package, plan=plan)).labels.codings == {}  # of a phantom: anterior of what?


@pytest.mark.parametrize("kind", ["NIfTI", "DICOM"])
def test_channels_on_several_grids_are_brought_to_the_first_on_request(
    kind: str, package: ModelPackage, tmp_path: Path
) -> None:
    (rule,) = package.plan.normalisation
    fields: Any = {"channels": ("T1", "T2"), "normalisation": (rule, rule)}
    first, second = voxels(2)
    if kind == "NIfTI":
        paths = [save(tmp_path / "a.nii.gz", first), save(tmp_path / "b.nii.gz", second[2:-2])]
        shifted = affine_of("axial").copy()
        shifted[:3, 3] += shifted[:3, :3] @ [2, 0, 0]
        save(paths[1], second[2:-2], shifted)
    else:
        paths = [tmp_path / "a", tmp_path / "b"]
        write_series(paths[0], first, spacing=(0.9, 0.9, 2.5))
        write_series(paths[1], second[2:-2], spacing=(0.9, 0.9, 2.5), origin=(1.8, 0, 0))
    with pytest.raises(GeometryMismatch, match="differs from that of"):
        untrained(package, **fields)([*paths])
    settings = PredictSettings(resample_channels=True)
    model = untrained(package, settings, **fields)
    volume = model.read(paths)
    np.testing.assert_array_equal(volume.array[0], first)
    np.testing.assert_allclose(volume.array[1, 2:-2], second[2:-2], atol=1e-3)
    assert (volume.array[1, :1] == second[2:-2].min()).all()
    name = io.name_of(io.located(paths[1]))
    assert f"{name} was resampled to the grid of the first channel" in volume.warnings
    assert model.key != untrained(package, **fields).key
    assert model.memory.preparing_mb(paths) > untrained(package, **fields).memory.preparing_mb(paths)
