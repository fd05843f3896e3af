"""Batches: masks lie on their images' grids; folders survive bad cases, little memory and interruptions."""

from __future__ import annotations

import csv
import errno
import gzip
import itertools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from dicoms import write_series
from numpy.typing import NDArray
from PIL import Image
from predicting import FIELDS, GRIDS, SHAPE, affine_of, limited, save, statuses, untrained, voxels
from small_datasets import picture, save_picture

from medseg import batch, io, predict, records
from medseg.batch import Outputs, predict_cases, predict_folder
from medseg.cases import MASK_FORMATS, MaskFormat, Shard, find_cases
from medseg.dataset import Case
from medseg.engines import build_engine
from medseg.errors import InputError
from medseg.io import label_tables, nifti
from medseg.journal import Journal, Prediction
from medseg.package import ModelPackage
from medseg.pipeline import RunResult
from medseg.predict import Predictor, PredictSettings
from medseg.volume import Labels, Volume

BESIDE = ("cases.csv", "dseg.tsv", "journal.jsonl", "labels.csv", "labels.txt", "run.json")
"""What is in every output folder of volumes."""


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Pictures


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
    assert "has 1 channel (expected 3)" in reasons["grey"]
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


def test_the_mask_of_a_picture_does_not_replace_it(of_pictures: Predictor, tmp_path: Path) -> None:
    before = save_picture(tmp_path / "a.png", picture(0)[0]).read_bytes()
    with pytest.raises(InputError, match=r"holds input images, as a\.png"):
        predict_cases(of_pictures, find_cases(tmp_path), tmp_path, overwrite=True)
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


# Folders


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_tables_of_labels_replace_no_file_of_the_user(
    predictor: Predictor,
    images: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases, out = find_cases(images)[:1], tmp_path / "out"
    out.mkdir()
    (out / "labels.csv").write_text("my own")
    predict_cases(predictor, cases, out)
    assert (out / "labels.csv").read_text() == "my own"
    assert f"{out / 'labels.csv'}: was not written here" in caplog.text
    assert len([record for record in caplog.records if "not written here" in record.message]) == 1
    made = (out / "dseg.tsv").read_text()
    assert made.startswith("index\tname\tcolor\n1\torgan\t")
    journal = (out / "journal.jsonl").read_text()
    (out / "labels.txt").write_text("changed")
    monkeypatch.setattr(label_tables, "_bids", lambda labels: "of another model")
    predict_cases(predictor, cases, out)
    assert (out / "dseg.tsv").read_text() == "of another model"  # it was from here
    assert (out / "labels.txt").read_text() == "changed"
    assert (out / "journal.jsonl").read_text().startswith(journal)
    journal = (out / "journal.jsonl").read_text()
    predict_cases(predictor, cases, out)
    assert (out / "journal.jsonl").read_text() == journal  # nothing to do
    predict_cases(predictor, cases, out, overwrite=True)
    assert (out / "labels.csv").read_text().startswith("LabelValue,")
    assert "ITK" in (out / "labels.txt").read_text()


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
    assert [step for step in seen if step[2].startswith("a ")] == [("predicting", 0.5, "a failed (1 of 2)")]
    assert seen[-1] == ("predicting", 1.0, "b done (2 of 2)")
    assert [fraction for _, fraction, _ in seen] == sorted(fraction for _, fraction, _ in seen)
    assert [fraction for _, fraction, _ in seen].count(1.0) == 1
    assert names_in(out) == {"b.nii.gz", *BESIDE}
    with (out / "cases.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert reason in rows["a"]["reason"]
    assert (rows["a"]["status"], rows["a"]["organ_ml"]) == ("failed", "")
    assert (rows["b"]["status"], rows["b"]["output"], rows["b"]["reason"]) == ("done", "b.nii.gz", "")
    assert float(rows["b"]["organ_ml"]) > 0
    run = json.loads((out / "run.json").read_text())
    assert run["cases"] == {"done": 1, "kept": 0, "failed": 1, "open": 0}
    assert set(run["seconds"]) == {"read", "prepare", "network", "write"}
    assert (run["engine"], run["threads"], run["shard"]) == (predictor.engine, torch.get_num_threads(), None)
    assert float(rows["b"]["network_s"]) > 0
    assert float(rows["b"]["peak_memory_mb"]) > 10
    assert (run["device"], run["model_digest"]) == ("cpu", predictor.package.digest)


def test_a_file_that_may_not_be_read_fails_alone(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(path: Path) -> str:
        if path.name == "a.nii.gz" and path.parent == images:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return records.digest_file(path)

    monkeypatch.setattr(batch, "digest_file", digest)  # whoever runs as root may read everything
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
    assert names_in(out) == {"b.nii.gz", *BESIDE}
    monkeypatch.undo()
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "done", "b": "kept"}


@pytest.mark.parametrize("moment", ["line", "rename"])
def test_a_disk_that_fails_after_the_mask_is_whole_fails_the_case_alone(
    moment: str, predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add, rename = tmp_path / "out", Journal.add, Path.replace

    def no_line(journal: Journal, record: Prediction) -> None:
        if record.case == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        add(journal, record)

    def no_rename(path: Path, target: Path) -> Path:
        if target.name == "a.nii.gz":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    if moment == "line":
        monkeypatch.setattr(Journal, "add", no_line)
    else:
        monkeypatch.setattr(Path, "replace", no_rename)
    results = predict_cases(predictor, find_cases(images), out)
    assert statuses(results) == {"a": "failed", "b": "done"}
    assert "OSError: [Errno" in results[0].reason
    assert results[0].peak_memory_mb
    assert names_in(out) == {"b.nii.gz", *BESIDE}
    monkeypatch.undo()
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "done", "b": "kept"}


FULL = """
import resource, sys
from pathlib import Path
import medseg
from medseg.batch import predict_folder
from medseg.io import label_tables, nifti
write, limit = nifti.Probabilities.write, resource.getrlimit(resource.RLIMIT_FSIZE)
def full(self, index, mask, path):
    if path.parent.name == "b":
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
    try:
        write(self, index, mask, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
nifti.Probabilities.write = full
model = medseg.load(sys.argv[1], device="cpu", engine="eager", probabilities=("all",))
for case in predict_folder(model, sys.argv[2], Path(sys.argv[3])):
    sys.stdout.write(f"{case.case} {case.status} {case.reason}\\n")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of a process")
def test_a_disk_that_fills_while_probabilities_are_written_fails_the_case_alone(
    tiny_run: RunResult, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL, str(tiny_run.package), str(images), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "a done "
    assert second.startswith("b failed OSError: [Errno 27]")
    assert sorted(path.name for path in out.rglob("*.nii.gz")) == ["a.nii.gz", "lesion.nii.gz", "organ.nii.gz"]
    assert not list(out.rglob(".*"))


def test_an_image_that_is_listed_and_not_there_says_so(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image\nimages/a.nii.gz\nimages/gone.nii.gz\n")
    results = predict_cases(predictor, find_cases(tmp_path / "list.csv"), tmp_path / "out")
    assert statuses(results) == {"a": "done", "gone": "failed"}
    assert results[1].reason.startswith(f"{images / 'gone.nii.gz'}: cannot be read: No such file")
    assert "Correct the path" in results[1].reason


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("out of memory"), ValueError("a bug")], ids=repr)
@pytest.mark.parametrize("stage", ["read_volume", "prepare", "infer", "write_mask"])
def test_whatever_one_case_raises_in_any_stage_the_others_are_done(
    stage: str, failure: Exception, predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The case in the middle: of three, each stage is in another thread or between two others."""
    shutil.copy(images / "b.nii.gz", images / "c.nii.gz")
    holder: Any = Predictor if stage in ("prepare", "infer") else io
    function = getattr(holder, stage)

    def fragile(*arguments: Any, **choices: Any) -> Any:
        for argument in arguments:
            paths = getattr(getattr(argument, "source", argument), "paths", argument)
            if isinstance(paths, tuple) and paths[0].name == "b.nii.gz":
                raise failure
        return function(*arguments, **choices)

    monkeypatch.setattr(holder, stage, fragile)
    results = predict_cases(predictor, find_cases(images), tmp_path / "out")
    assert statuses(results) == {"a": "done", "b": "failed", "c": "done"}
    assert results[1].reason.startswith(type(failure).__name__)
    monkeypatch.undo()
    assert statuses(predict_cases(predictor, find_cases(images), tmp_path / "out")) == {
        "a": "kept",
        "b": "done",
        "c": "kept",
    }


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
    assert json.loads((out / "run.json").read_text())["cases"] == {"done": 0, "kept": 2, "failed": 0, "open": 0}


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
    # the other model has the same weights here, so that its mask is the first one's too; the device is of no matter
    assert found == ["done", "done", "done", "kept", "kept"]
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
    with pytest.raises(InputError, match="holds input images"):
        predict_cases(predictor, find_cases(images), images, overwrite=True)
    assert sorted(path.name for path in images.iterdir()) == ["a.nii.gz", "b.nii.gz"]
    assert (images / "a.nii.gz").read_bytes() == before


@pytest.mark.parametrize("moment", ["before the line", "after the line"])
def test_a_kill_around_the_line_in_the_journal_is_recovered_from(
    moment: str, predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add = tmp_path / "out", Journal.add

    def killed(journal: Journal, record: Prediction) -> None:
        if moment == "after the line" or not record.case:  # the tables of labels
            add(journal, record)
        if record.case:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        predict_cases(predictor, find_cases(images), out)
    monkeypatch.undo()
    assert names_in(out) == {*BESIDE}
    assert json.loads((out / "run.json").read_text())["cases"]["open"] == 2
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "done", "b": "done"}


def test_a_journal_with_a_torn_last_line_is_read_up_to_there(
    predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict_cases(predictor, find_cases(images), out)
    journal = out / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    (out / "b.nii.gz").unlink()  # which had not got its name
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


def test_a_mask_stays_where_settings_disk_or_memory_fail_rather_than_its_image(
    predictor: Predictor, package: ModelPackage, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cases = tmp_path / "out", find_cases(images)
    predict_cases(predictor, cases, out)
    masks = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    mirrored = Predictor(package, PredictSettings(device="cpu", mirror=True))
    for stage in ("prepare", "infer"):
        with monkeypatch.context() as patch:
            patch.setattr(Predictor, stage, no_network)
            assert {result.status for result in predict_cases(mirrored, cases, out)} == {"failed"}
    rules = package.plan.normalisation * 2
    of_another = untrained(package, mirrored.settings, channels=("T1", "T2"), normalisation=rules)
    assert {r.status for r in predict_cases(of_another, cases, out)} == {"failed"}
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == masks


def test_probabilities_of_a_former_image_do_not_stay_beside_a_new_mask(
    predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    model = Predictor(predictor.package, PredictSettings(device="cpu", probabilities=("lesion",)))
    predict_cases(model, find_cases(images)[:1], tmp_path / "out")
    (images / "a.nii.gz").write_bytes((images / "b.nii.gz").read_bytes())
    assert predict_cases(predictor, find_cases(images)[:1], tmp_path / "out")[0].status == "done"
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.nii.gz")) == ["a.nii.gz"]


# Networks in 8 bits


class Small:
    """A network in 8 bits, of which here only the digest is of interest."""

    def __init__(self, digest: str) -> None:
        self.digest = digest


def in_8_bits(package: ModelPackage, monkeypatch: pytest.MonkeyPatch, made: list[str]) -> Predictor:
    """A predictor whose network in 8 bits is calibrated (recorded in ``made``), and computes as torch does."""

    def quantised(*_: Any, cases: list[str], **__: Any) -> Small:
        made.extend(cases)
        return Small(f"of {cases[0]}")

    def eager(_: str, *arguments: Any, quantised: Small, **choices: Any) -> Any:
        return build_engine("eager", *arguments, **choices)

    monkeypatch.setattr(predict, "check_engine", lambda *_: None)
    monkeypatch.setattr(predict, "quantised_network", quantised)
    monkeypatch.setattr(predict, "build_engine", eager)
    settings = PredictSettings(device="cpu", engine="openvino-int8")
    return Predictor(replace(package, path=None), settings)


def test_which_network_in_8_bits_made_a_mask_is_part_of_its_key(
    package: ModelPackage, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    out, cases = tmp_path / "out", find_cases(images)
    results = predict_cases(in_8_bits(package, monkeypatch, made), cases[::-1], out)
    assert (made, statuses(results)) == (["a"], {"b": "done", "a": "done"})  # the first by name calibrates, once
    assert statuses(predict_cases(in_8_bits(package, monkeypatch, made), cases, out)) == {"a": "kept", "b": "kept"}
    another = predict_cases(in_8_bits(package, monkeypatch, made), cases[1:], out)
    assert (made, statuses(another)) == (["a", "a", "b"], {"b": "done"})


def test_a_case_that_cannot_be_read_calibrates_nothing(
    package: ModelPackage, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    with_nan(images / "a.nii.gz")
    results = predict_cases(in_8_bits(package, monkeypatch, made), find_cases(images), tmp_path / "out")
    assert (made, statuses(results)) == (["b"], {"a": "failed", "b": "done"})


def test_shards_do_not_each_make_a_network_in_8_bits(
    package: ModelPackage, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_8_bits(package, monkeypatch, [])
    with pytest.raises(InputError, match=r"each shard would make its own.*`medseg quantise` first"):
        predict_folder(model, images, tmp_path / "out", shard=Shard(1, 2))
    assert statuses(predict_folder(model, images, tmp_path / "out", shard=Shard(1, 1))) == {"a": "done", "b": "done"}


# Shards


def test_shards_share_a_folder_and_its_masks(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    out, places = tmp_path / "out", [str(images / "*.nii.gz")]
    first = predict_folder(predictor, places, out, shard=Shard(1, 2))
    second = predict_folder(predictor, places, out, shard=Shard(2, 2))
    assert (statuses(first), statuses(second)) == ({"a": "done"}, {"b": "done"})
    assert statuses(predict_folder(predictor, images, out)) == {"a": "kept", "b": "kept"}
    assert json.loads((out / "run-2-of-2.json").read_text())["shard"] == "2/2"
    assert len((out / "cases-1-of-2.csv").read_text().splitlines()) == 2


def test_a_shard_without_a_case_is_no_fault(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    assert predict_folder(predictor, images, tmp_path / "out", shard=Shard(3, 3)) == []


# Probabilities


def test_probabilities_in_files_are_those_in_memory(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    model = Predictor(predictor.package, PredictSettings(device="cpu", probabilities=("all",)))
    out = tmp_path / "out"
    (result, _) = predict_cases(model, find_cases(images), out)
    names = {name: f"probabilities/a/{name}.nii.gz" for name in ("organ", "lesion")}
    assert set(result.probability_digests) == set(names.values())
    whole = np.zeros((2, *nibabel.load(images / "a.nii.gz").shape), np.float32)

    def take(place: tuple[slice, slice, slice], values: NDArray[np.float32]) -> None:
        whole[(slice(None), *place)] = values

    mask = model.infer(model.prepare(io.read_volume(images / "a.nii.gz")), take).mask
    assert whole.min() >= 0
    assert whole.sum(axis=0).max() <= 1 + 1e-6
    for n, name in enumerate(("organ", "lesion")):
        image = nibabel.load(out / names[name])
        assert np.abs(image.get_fdata() - whole[n]).max() < 1 / 65535
        source = nibabel.load(images / "a.nii.gz").header
        for field in FIELDS:
            assert image.header[field].tobytes() == source[field].tobytes(), field
        sure = mask.array == predictor.package.plan.labels.values[name]
        assert (whole[n][sure] >= whole[1 - n][sure]).all()
    np.testing.assert_array_equal(mask.array, io.read_mask(out / "a.nii.gz").array)


def test_probabilities_that_are_missing_or_spoilt_are_made_again(
    predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    out, cases = tmp_path / "out", find_cases(images)[:1]
    model = Predictor(predictor.package, PredictSettings(device="cpu", probabilities=("lesion",)))
    assert predict_cases(predictor, cases, out)[0].status == "done"
    assert predict_cases(model, cases, out)[0].status == "done"  # the mask was there, its probabilities not
    assert [path.name for path in (out / "probabilities" / "a").iterdir()] == ["lesion.nii.gz"]
    assert predict_cases(model, cases, out)[0].status == "kept"
    path = out / "probabilities" / "a" / "lesion.nii.gz"
    path.write_bytes(path.read_bytes()[:-10])
    assert predict_cases(predictor, cases, out)[0].status == "kept"  # who wants none does not mind
    assert predict_cases(model, cases, out)[0].status == "done"
    save(path, np.ones(SHAPE, np.uint8))
    (result,) = predict_cases(model, cases, out)
    assert (result.status, "changed since" in result.reason) == ("failed", True)


def test_no_two_cases_share_a_file_of_probabilities(package: ModelPackage, tmp_path: Path) -> None:
    """Of case p the class kidney_tumour, and of case p_kidney the class tumour."""
    labels = Labels(values={"kidney_tumour": 1, "tumour": 5})
    model = untrained(package, PredictSettings(probabilities=("all",)), labels=labels)
    for name in ("p", "p_kidney"):
        save(tmp_path / "in" / f"{name}.nii", voxels()[0])
    results = predict_cases(model, find_cases(tmp_path / "in"), tmp_path / "out")
    assert statuses(results) == {"p": "done", "p_kidney": "done"}
    assert len({name for result in results for name in result.probability_digests}) == 4


def test_probabilities_of_regions(package: ModelPackage, images: Path, tmp_path: Path) -> None:
    labels = Labels(values={"organ": 1, "lesion": 5}, regions={"whole": (1, 5), "core/1": (5,)})
    model = untrained(package, PredictSettings(probabilities=("core/1",)), labels=labels, region_order=(1, 5))
    (result, *_) = predict_cases(model, find_cases(images), tmp_path)
    assert list(result.probability_digests) == ["probabilities/a/core_1.nii.gz"]
    assert set(result.volumes_ml) == {"organ", "lesion", "whole", "core/1"}
    found = nibabel.load(tmp_path / "probabilities" / "a" / "core_1.nii.gz").get_fdata()
    np.testing.assert_array_equal(found > 0.5 + 1e-5, io.read_mask(tmp_path / "a.nii.gz").array == 5)


# Flags


def test_what_is_unusual_about_a_case_stands_in_the_table(package: ModelPackage, images: Path, tmp_path: Path) -> None:
    """Of b the voxels are twice as far apart along one axis, and a hundred times as bright."""
    image = nibabel.load(images / "b.nii.gz")
    affine = image.affine.copy()
    affine[:, 2] *= 2
    save(images / "b.nii.gz", np.asarray(image.dataobj) * np.float32(100), affine)
    model, out = untrained(package), tmp_path / "out"
    first = predict_cases(model, find_cases(images), out)
    again = predict_cases(model, find_cases(images), out)
    assert statuses(again) == {"a": "kept", "b": "kept"}
    with (out / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for result, kept, row in zip(first, again, rows, strict=True):
        assert row["qc_flags"].split(";") == list(result.qc_flags) == list(kept.qc_flags)
        mask = io.read_mask(out / result.output)
        array = mask.geometry.to("RAS").apply(mask.array)
        for name, value in (("organ", 1), ("lesion", 5)):
            own = array == value
            ends = [own[0], own[-1], own[:, 0], own[:, -1], own[:, :, 0], own[:, :, -1]]
            names = ("left", "right", "posterior", "anterior", "inferior", "superior")
            faces = "+".join(face for face, end in zip(names, ends, strict=True) if end.any())
            assert (f"empty:{name}" in result.qc_flags) == (not own.any())
            assert (f"touches_border:{name}:{faces}" in result.qc_flags) == bool(faces)
    a, b = (set(result.qc_flags) for result in first)
    of_image = {"spacing:z:high", f"intensity:{package.plan.channels[0]}:high"}
    assert not a & of_image
    assert of_image <= b
    assert any(flag.startswith("margin:") for flag in a), "a network that was not trained is not sure"


def test_without_ranges_a_case_has_the_flags_that_need_none(
    package: ModelPackage, images: Path, tmp_path: Path
) -> None:
    bare = replace(package, manifest=package.manifest.model_copy(update={"ranges": None}))
    full, less = (
        predict_cases(untrained(each), find_cases(images), tmp_path / name)
        for name, each in (("full", package), ("less", bare))
    )
    for one, other in zip(full, less, strict=True):
        kinds = ("empty:", "touches_border:", "margin:")
        assert other.qc_flags == tuple(flag for flag in one.qc_flags if flag.startswith(kinds))


def test_regions_have_margins_and_their_labels_the_other_flags(
    package: ModelPackage, images: Path, tmp_path: Path
) -> None:
    labels = Labels(values={"organ": 1, "lesion": 5}, regions={"whole": (1, 5), "core/1": (5,)})
    model = untrained(package, labels=labels, region_order=(1, 5))
    for result in predict_cases(model, find_cases(images), tmp_path):
        subjects = {tuple(flag.split(":")[:2]) for flag in result.qc_flags}
        assert {name for kind, name in subjects if kind == "margin"} <= {"whole", "core/1"}
        assert {name for kind, name in subjects if kind != "margin"} <= {"organ", "lesion"}
        assert any(kind == "margin" for kind, _ in subjects)


def test_a_disk_without_room_for_probabilities_fails_the_case_alone(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Predictor(predictor.package, PredictSettings(device="cpu", probabilities=("all",)))
    write, count = nifti.Probabilities.write, itertools.count()

    def full(*arguments: Any) -> None:
        if next(count) == 1:  # the second file of the first case
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(nifti.Probabilities, "write", full)
    assert statuses(predict_cases(model, find_cases(images), tmp_path)) == {"a": "failed", "b": "done"}
    assert sorted(path.name for path in tmp_path.rglob("*.nii.gz") if "images" not in str(path.parent)) == [
        "b.nii.gz",
        "lesion.nii.gz",
        "organ.nii.gz",
    ]


# Memory


def test_a_case_that_does_not_fit_fails_with_what_is_needed_and_the_others_are_done(
    package: ModelPackage, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = limited(package, monkeypatch, 120)
    save(images / "c.nii", np.zeros((400, 400, 60), np.int16) + np.int16(1))
    results = predict_cases(model, find_cases(images), tmp_path / "out")
    assert statuses(results) == {"a": "done", "b": "done", "c": "failed"}
    assert "needs about" in results[2].reason


def test_an_image_that_takes_too_much_to_be_read_is_not_read(
    package: ModelPackage, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(images / "c.nii", np.zeros((400, 400, 60), np.float64))  # 73 MB, and 37 MB in float32
    read, whole = list[str](), io.read_volume

    def watched(paths: Any, channels: int) -> Any:
        read.append(paths[0].name)
        return whole(paths, channels)

    monkeypatch.setattr(io, "read_volume", watched)
    results = predict_cases(limited(package, monkeypatch, 200), find_cases(images), tmp_path / "out")
    assert statuses(results) == {"a": "done", "b": "done", "c": "failed"}
    assert "needs about 0.2 GB of memory to be read and prepared (expected 0.2 GB)" in results[2].reason
    assert read == ["a.nii.gz", "b.nii.gz"]


def test_what_does_not_fit_beside_another_case_is_prepared_alone(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, refused = Predictor.prepare, list[str]()

    def alone(self: Predictor, volume: Volume) -> Any:
        if threading.current_thread() is not threading.main_thread():
            refused.append(volume.paths[0].name)
            raise MemoryError
        return prepare(self, volume)

    monkeypatch.setattr(Predictor, "prepare", alone)
    assert statuses(predict_cases(predictor, find_cases(images), tmp_path)) == {"a": "done", "b": "done"}
    assert refused == ["b.nii.gz"]


def no_network(*_: Any, **__: Any) -> Any:
    raise InputError("network", "is none")


@pytest.mark.parametrize(("limit_mb", "threads"), [(None, {"MainThread", "medseg _read"}), (113.0, {"MainThread"})])
def test_the_next_case_is_read_ahead_only_where_both_fit(
    limit_mb: float | None, threads: set[str], package: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image takes 7 MB to prepare and 9 MB on the network; 100 MB are taken at rest."""
    for name in "abc":
        save(tmp_path / "in" / f"{name}.nii", np.ones((128, 128, 128), np.int16), np.eye(4))
    seen = set()

    def read(paths: Any, channels: int) -> Any:
        seen.add(threading.current_thread().name)
        raise InputError(paths[0], "is only looked at")

    model = limited(package, monkeypatch, limit_mb or 10_000)
    monkeypatch.setattr(io, "read_volume", read)
    predict_cases(model, find_cases(tmp_path / "in"), tmp_path / "out")
    assert seen == {"MainThread"}  # what has failed is on no network, so that nothing is read beside it
    monkeypatch.undo()
    read_volume = io.read_volume

    def watched(paths: Any, channels: int) -> Any:
        seen.add(threading.current_thread().name)
        return read_volume(paths, channels)

    model = limited(package, monkeypatch, limit_mb or 10_000)
    monkeypatch.setattr(io, "read_volume", watched)
    monkeypatch.setattr(Predictor, "infer", no_network)
    seen.clear()
    predict_cases(model, find_cases(tmp_path / "in"), tmp_path / "out")
    assert seen == threads


# Interruption


def test_an_interrupted_batch_finishes_the_mask_in_hand_and_writes_its_tables(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, out = Predictor.infer, tmp_path / "out"

    def interrupted(self: Predictor, ready: Any, *arguments: Any, **choices: Any) -> Any:
        if ready.source.paths[0].name == "b.nii.gz":
            raise KeyboardInterrupt
        return infer(self, ready, *arguments, **choices)

    monkeypatch.setattr(Predictor, "infer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_cases(predictor, find_cases(images), out)
    assert json.loads((out / "run.json").read_text())["cases"] == {"done": 1, "kept": 0, "failed": 0, "open": 1}
    assert names_in(out) == {"a.nii.gz", *BESIDE}
    monkeypatch.undo()
    assert statuses(predict_cases(predictor, find_cases(images), out)) == {"a": "kept", "b": "done"}


def test_tables_are_written_now_and_then(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "TABLE_SECONDS", 0.0)
    write, rows = Journal.write_tables, list[int]()

    def counted(self: Journal, *arguments: Any) -> None:
        rows.append(len(self.results))
        write(self, *arguments)

    monkeypatch.setattr(Journal, "write_tables", counted)
    predict_cases(predictor, find_cases(images), tmp_path)
    assert rows == [1, 2, 2]


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


# DICOM


ENDINGS = ("nii.gz", "dcm", "seg.nrrd", "nrrd", "mha")


def scan_of(folder: Path, number: int = 0, **facts: Any) -> Path:
    """A series of a phantom, 0.9 x 0.9 x 2.5 mm."""
    array = np.roll(voxels()[0], number, axis=0)
    return write_series(folder, array, spacing=(0.9, 0.9, 2.5), modality="MR", **facts)[0].parent


def coded(package: ModelPackage) -> Predictor:
    """A predictor whose labels are structures that SNOMED CT has."""
    return untrained(package, PredictSettings(device="cpu"), labels=Labels(values={"liver": 1, "spleen": 5}))


def test_masks_of_a_series_lie_on_it_in_every_format_and_say_the_same(package: ModelPackage, tmp_path: Path) -> None:
    model, outputs = coded(package), Outputs(formats=MASK_FORMATS)
    (result,) = predict_folder(model, scan_of(tmp_path / "scan"), tmp_path / "out", outputs=outputs)
    series = io.series(tmp_path / "scan")
    assert (result.status, result.case, result.output) == ("done", series.name, f"{series.name}.nii.gz")
    assert names_in(tmp_path / "out") == {f"{series.name}.{end}" for end in ENDINGS} | {*BESIDE}
    mask = model(tmp_path / "scan")
    assert len(np.unique(mask.array)) == 3
    for end in ENDINGS:
        found = io.read_mask(tmp_path / "out" / f"{series.name}.{end}", model.labels)
        found = found.placed(mask.geometry)
        np.testing.assert_array_equal(found.array, mask.array, end)
    assert result.files == {
        f"{series.name}.{end}": records.digest_file(tmp_path / "out" / f"{series.name}.{end}") for end in ENDINGS
    }
    assert predict_folder(model, tmp_path / "scan", tmp_path / "out", outputs=outputs)[0].status == "kept"


def test_what_is_kept_has_all_formats_that_are_wanted(package: ModelPackage, tmp_path: Path) -> None:
    model, out = coded(package), tmp_path / "out"
    cases = find_cases(scan_of(tmp_path / "scan"))

    def again(*formats: MaskFormat, **choices: Any) -> tuple[str, str]:
        (result,) = predict_cases(model, cases, out, outputs=Outputs(formats=formats, **choices))
        return result.status, result.output.partition(".")[2]

    assert again("nii.gz") == ("done", "nii.gz")
    assert again("dicom-seg", "nii.gz") == ("done", "dcm")
    assert again("nii.gz") == ("kept", "nii.gz")
    assert again("dicom-seg") == ("kept", "dcm")
    assert again("nii.gz", "mha") == ("done", "nii.gz")
    assert again("dicom-seg", allow_uncoded=True) == ("kept", "dcm")  # all have codes
    assert again("dicom-seg", seg_type="labelmap") == ("done", "dcm")
    assert pydicom.dcmread(out / f"{cases[0].id}.dcm").SegmentationType == "LABELMAP"
    (out / f"{cases[0].id}.dcm").unlink()
    assert again("dicom-seg") == ("done", "dcm")


@pytest.mark.parametrize("format_", ["dicom-seg", "mha"])
def test_all_formats_of_a_case_appear_or_none(
    format_: MaskFormat, package: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = io.write_mask

    def failing(mask: Any, path: Path, **options: Any) -> None:
        write(mask, path, **options)
        if path.suffix == ".mha":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io, "write_mask", failing)
    outputs = Outputs(formats=("nii.gz", format_, "mha"))
    (result,) = predict_folder(coded(package), scan_of(tmp_path / "scan"), tmp_path / "out", outputs=outputs)
    assert (result.status, result.output) == ("failed", "")
    assert names_in(tmp_path / "out") == {*BESIDE}


def test_what_cannot_become_a_dicom_segmentation_is_refused_before_anything_starts(
    predictor: Predictor, package: ModelPackage, images: Path, tmp_path: Path
) -> None:
    outputs, out = Outputs(formats=("nii.gz", "dicom-seg")), tmp_path / "out"
    scan_of(tmp_path / "scan")
    with pytest.raises(InputError, match=r"2 of 3 images are no DICOM, as a .*Leave it out; `medseg convert`"):
        predict_folder(coded(package), [images, tmp_path / "scan"], out, outputs=outputs)
    model = untrained(package, labels=Labels(values={"liver": 1, "structure x": 5}))
    with pytest.raises(InputError, match=r"no code for structure x .*--allow-uncoded"):
        predict_folder(model, tmp_path / "scan", out, outputs=outputs)
    assert not out.exists()
    allowed = outputs.model_copy(update={"allow_uncoded": True})
    assert predict_folder(model, tmp_path / "scan", out, outputs=allowed)[0].status == "done"


def test_a_study_that_cannot_be_used_fails_and_the_others_are_done(predictor: Predictor, tmp_path: Path) -> None:
    scan_of(tmp_path / "in" / "a", study_uid="1.2.1")
    scan_of(tmp_path / "in" / "b1", study_uid="1.2.2")
    scan_of(tmp_path / "in" / "b2", study_uid="1.2.2")
    scan_of(tmp_path / "in" / "c", study_uid="1.2.3", offsets=(0, 2.5, 5, 7.5, 10, 12.5, 15, 17.5, 25))
    results = predict_cases(predictor, find_cases(tmp_path / "in"), tmp_path / "out")
    assert [result.status for result in results] == ["done", "failed", "failed"]
    assert "2 series could be meant" in results[1].reason
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1


def test_an_uneven_series_is_segmented_on_a_straight_grid_and_says_so(package: ModelPackage, tmp_path: Path) -> None:
    offsets = (0, 2.5, 5, 7.5, 10, 12.5, 15, 17.5, 25)
    cases = find_cases(scan_of(tmp_path / "scan", offsets=offsets), resample_irregular=True)
    outputs = Outputs(formats=("nii.gz", "dicom-seg"))
    (result,) = predict_cases(coded(package), cases, tmp_path / "out", outputs=outputs)
    assert result.status == "done", result.reason
    assert any("interpolated on an even grid" in warning for warning in result.warnings)
    straight = io.read_mask(tmp_path / "out" / f"{result.case}.nii.gz")
    assert straight.array.shape == (20, 18, 11)
    segments = pydicom.dcmread(tmp_path / "out" / f"{result.case}.dcm")
    places = {
        float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
        for frame in segments.PerFrameFunctionalGroupsSequence
    }
    assert places
    assert places <= set(offsets)  # the slices that were scanned


def test_a_changed_slice_is_a_changed_input(predictor: Predictor, tmp_path: Path) -> None:
    folder, out = scan_of(tmp_path / "scan", uid="1.2.1", study_uid="1.2"), tmp_path / "out"
    assert predict_cases(predictor, find_cases(folder), out)[0].status == "done"
    assert predict_cases(predictor, find_cases(folder), out)[0].status == "kept"
    shutil.rmtree(folder)
    scan_of(folder, 3, uid="1.2.1", study_uid="1.2")
    assert predict_cases(predictor, find_cases(folder), out)[0].status == "done"


def test_series_of_one_zip_are_different_inputs(predictor: Predictor, tmp_path: Path) -> None:
    for number in (1, 2):
        scan_of(tmp_path / "in" / str(number), number, study_uid=f"1.2.{number}")
    packed = shutil.make_archive(str(tmp_path / "in"), "zip", tmp_path / "in")
    results = predict_cases(predictor, find_cases(packed), tmp_path / "out")
    assert [result.status for result in results] == ["done", "done"]
    assert results[0].input_digest != results[1].input_digest


def test_a_series_a_channel_is_required_at_once(package: ModelPackage, tmp_path: Path) -> None:
    (rule,) = package.plan.normalisation
    model = untrained(package, channels=("T1", "T2"), normalisation=(rule, rule))
    folder = scan_of(tmp_path / "scan" / "a", uid="1.2.1", study_uid="1.2").parent
    scan_of(folder / "b", 2, uid="1.2.2", study_uid="1.2")
    with pytest.raises(
        InputError, match=r"--series: picks 1 of a study .expected 2, one a channel: T1, T2.*once a channel"
    ):
        predict_folder(model, folder / "a", tmp_path / "out")
    both = find_cases(folder, series=["1.2.2", "1.2.1"])
    (result,) = predict_cases(model, both, tmp_path / "out")
    assert (result.status, result.case) == ("done", io.series(folder, "1.2.2").name)
    (result,) = predict_cases(model, find_cases(folder, series=["1.2.1", "1.2.1"]), tmp_path / "out")
    assert "one series for several channels" in result.reason


def test_nothing_of_the_patient_is_written_but_into_the_segmentation(
    package: ModelPackage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    scan_of(tmp_path / "in" / "a", marker="CANARY7")
    scan_of(tmp_path / "in" / "b", marker="CANARY7", offsets=(0, 1, 2, 3, 4, 5, 6, 7, 99))
    outputs = Outputs(formats=MASK_FORMATS)
    results = predict_folder(coded(package), tmp_path / "in", tmp_path / "out", outputs=outputs)
    assert sorted(result.status for result in results) == ["done", "failed"]
    holders = set()
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        content += gzip.decompress(content) if path.suffix == ".gz" else b""
        if b"CANARY7" in content or "CANARY7" in path.name:
            holders.add(path.suffix)
    assert holders == {".dcm"}  # which belongs to the patient's study
    assert "CANARY7" not in caplog.text


def test_what_nobody_expected_of_dicom_does_not_quote_it(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    header = "CANARY7"

    def failing(*_: object) -> None:
        raise ValueError(f"Invalid value for VR PN: {header}")

    caplog.set_level("INFO")
    cases = find_cases(scan_of(tmp_path / "scan"))
    monkeypatch.setattr(io, "read_volume", failing)
    (result,) = predict_cases(predictor, cases, tmp_path / "out")
    assert result.reason == "ValueError, which nobody expected"
    assert "CANARY7" not in caplog.text
    assert "in failing" in caplog.text  # where it was
