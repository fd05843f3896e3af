"""The scripts: each recipe fits its task, and data like the task's own are checked, measured and planned."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import small_datasets
import typer

from medseg import pipeline
from medseg.check import check
from medseg.cli import as_command
from medseg.dataset import Dataset
from medseg.errors import InputError
from medseg.fingerprint import measure
from medseg.folder import writing_to
from medseg.io import read_mask, write_mask
from medseg.metrics import InstanceMeans, score_instances
from medseg.phantom import make_dataset, write_scenes
from medseg.plan import Plan
from medseg.planning import make_plan, override_plan
from medseg.postprocess import separate
from medseg.recipe import Recipe
from medseg.report import InstanceResult, Panel
from medseg.train import TrainSettings

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "pipelines").glob("task*.py"))
NUCLEI = ROOT / "pipelines" / "nuclei_dsb2018.py"
SATELLITE = ROOT / "pipelines" / "satellite.py"


@dataclass(frozen=True)
class Task:
    """What a task's own ``dataset.json`` says, its usual spacing (right, front, head), and its tolerance."""

    channels: tuple[str, ...]
    labels: tuple[str, ...]
    spacing_mm: tuple[float, float, float]
    tolerance_mm: float


# Labels and channels as in dataset.json; spacing is the median that nnU-Net's fingerprints have.
TASKS = {
    "Task01_BrainTumour": Task(
        ("FLAIR", "T1w", "t1gd", "T2w"), ("edema", "non-enhancing tumor", "enhancing tumour"), (1, 1, 1), 5
    ),
    "Task02_Heart": Task(("MRI",), ("left atrium",), (1.25, 1.25, 1.37), 4),
    "Task03_Liver": Task(("CT",), ("liver", "cancer"), (0.77, 0.77, 1), 7),
    "Task04_Hippocampus": Task(("MRI",), ("Anterior", "Posterior"), (1, 1, 1), 1),
    "Task05_Prostate": Task(("T2", "ADC"), ("PZ", "TZ"), (0.62, 0.62, 3.6), 4),
    "Task06_Lung": Task(("CT",), ("cancer",), (0.79, 0.79, 1.24), 2),
    "Task07_Pancreas": Task(("CT",), ("pancreas", "cancer"), (0.8, 0.8, 2.5), 5),
    "Task08_HepaticVessel": Task(("CT",), ("Vessel", "Tumour"), (0.8, 0.8, 5), 3),
    "Task09_Spleen": Task(("CT",), ("spleen",), (0.79, 0.79, 5), 3),
    "Task10_Colon": Task(("CT",), ("colon cancer primaries",), (0.78, 0.78, 5), 4),
}


def loaded(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_of(script: Path) -> Recipe:
    recipe = loaded(script).RECIPE
    assert isinstance(recipe, Recipe)
    return recipe


def test_there_is_one_script_a_task_and_the_table_of_data_lists_it() -> None:
    assert [recipe_of(script).task for script in SCRIPTS] == list(TASKS)
    table = (ROOT / "data" / "README.md").read_text()
    assert [task for task in TASKS if f"| {task} |" not in table] == []


@pytest.mark.parametrize("script", [*SCRIPTS, NUCLEI, SATELLITE], ids=lambda p: p.stem)
def test_a_script_tells_the_story_of_its_data(script: Path) -> None:
    story = script.read_text().split('"""')[1]
    for part in ("What and where from:", "How acquired:", "Labels:", "What is hard:", "Trap:"):
        assert part in story


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_data_like_the_tasks_are_checked_measured_and_planned(script: Path, tmp_path: Path) -> None:
    recipe = recipe_of(script)
    task = TASKS[recipe.task]
    thick = task.spacing_mm[2] / task.spacing_mm[0] > 3
    make_dataset(
        tmp_path,
        name=recipe.task.split("_")[1],
        cases=5,
        test_cases=1,
        shape=(32, 32, 10 if thick else 24),
        spacing_mm=task.spacing_mm,
        labels={name: value for value, name in enumerate(task.labels, start=1)},
        channels=task.channels,
    )
    dataset = Dataset.open(tmp_path)
    assert check(dataset).unusable_cases == ()
    labels = dataset.labels.model_copy(update={"regions": recipe.regions})
    dataset = replace(dataset, labels=type(labels).model_validate(labels.model_dump()))  # regions fit the labels

    plan = make_plan(measure(dataset), dataset.name, dataset.channels, dataset.labels, device="cpu")
    plan, _ = override_plan(plan, recipe.overrides, recipe.configuration)
    configuration = plan.configuration(recipe.configuration)
    assert recipe.tolerance_mm == task.tolerance_mm
    assert plan.channels == task.channels
    assert plan.labels.names == task.labels
    assert plan.axes[0] == (2 if task.spacing_mm[2] > task.spacing_mm[0] else plan.axes[0])
    # within 5 %, by which phantoms differ, and half of the slice distance, which thick slices may be thinned to
    along, *plane = configuration.spacing_mm
    np.testing.assert_allclose(plane, task.spacing_mm[:2], rtol=0.06)
    assert along is not None
    assert task.spacing_mm[2] * 0.5 < along < task.spacing_mm[2] * 1.06
    assert len(configuration.network.strides) >= 2
    for normalisation, channel in zip(plan.normalisation, task.channels, strict=True):
        assert normalisation.scheme == ("ct" if channel == "CT" else "zscore")
        if channel == "CT":
            assert -400 < normalisation.lower < normalisation.mean < normalisation.upper < 500
            assert normalisation.std > 10


def test_the_regions_of_brain_tumours_are_those_of_the_decathlons_numbers() -> None:
    assert recipe_of(SCRIPTS[0]).regions == {"whole tumour": (1, 2, 3), "tumour core": (2, 3)}


@pytest.mark.parametrize(("script", "argument"), [(SCRIPTS[3], "DATASET"), (NUCLEI, "FOLDER"), (SATELLITE, "FOLDER")])
def test_a_script_is_a_command(
    script: Path, argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code
    assert argument in capsys.readouterr().out


# ---- nuclei ----------------------------------------------------------------------------------------------------------

SMALL = ("plan.patch_size=[16,16]", "plan.features=[4,8]", "plan.strides=[[1,1],[2,2]]", "plan.batch_size=2")


@pytest.mark.parametrize("boundary", [True, False])
def test_nuclei_from_the_folder_to_the_scores(boundary: bool, tmp_path: Path) -> None:
    folder = small_datasets.nuclei(tmp_path / "data")
    script = loaded(NUCLEI)
    settings = TrainSettings(iterations=3, device="cpu")
    out = tmp_path / "out"
    means, run = script.run_nuclei(folder, out, boundary=boundary, train=settings, overrides=SMALL)
    assert run.package == out / "package"
    header, *rows = (out / "instances.csv").read_text().splitlines()
    assert header.startswith("case,dice,f1,")
    assert len(rows) == means.n == 2  # a fifth of six, rounded up
    assert means == InstanceMeans.load(out / "instances.json")
    assert (out / "worst.png").exists()
    for row in rows:
        case = row.split(",")[0]
        ids, predicted, reference = (
            read_mask(out / place / f"{case}.png").array
            for place in ("instances", "predictions/fold_0", "dataset/instances")
        )
        assert np.array_equal(ids, separate(predicted, 1, 2 if boundary else None))
        assert float(row.split(",")[1]) == score_instances(ids, reference).dice
    plan = (out / "plan.json").read_text()
    assert ('"cell_segmenter"' in plan) == boundary


def test_nuclei_of_broken_images_are_named_and_the_others_kept(tmp_path: Path) -> None:
    place = small_datasets.nuclei(tmp_path / "data", count=7) / "stage1_train"
    (place / "n0" / "images" / "n0.png").unlink()
    (place / "n1" / "masks" / "1.png").write_bytes(b"no picture")
    small_datasets.save_picture(place / "n2" / "masks" / "1.png", np.ones((5, 5), np.uint8))
    for file in (place / "n3" / "masks").iterdir():
        file.unlink()
    first = (place / "n4" / "masks" / "0.png").read_bytes()
    (place / "n4" / "masks" / "9.png").write_bytes(first)
    small_datasets.save_picture(place / "n5" / "masks" / "9.png", np.zeros((40, 48), np.uint8))
    findings = loaded(NUCLEI).write_dataset(place, tmp_path / "dataset")
    assert findings.unusable_cases == ("n0", "n1", "n2", "n3")
    kinds = {case: [f.kind for f in findings.of(case)] for case in ("n4", "n5", "n6")}
    assert kinds == {"n4": ["overlap", "hidden"], "n5": ["empty"], "n6": []}
    assert "holds 0 images" in findings.of("n0")[0].found
    assert [case.id for case in Dataset.open(tmp_path / "dataset").cases] == ["n4", "n5", "n6"]
    assert check(Dataset.open(tmp_path / "dataset")).unusable_cases == ()


def test_nuclei_where_none_can_be_used(tmp_path: Path) -> None:
    script = loaded(NUCLEI)
    with pytest.raises(InputError, match="holds no ID/images"):
        script.write_dataset(tmp_path, tmp_path / "dataset")
    place = small_datasets.nuclei(tmp_path / "data", count=1)
    (place / "stage1_train" / "n0" / "images" / "n0.png").unlink()
    with pytest.raises(InputError, match="none of its 1 images"):
        script.write_dataset(place, tmp_path / "dataset")


def test_nuclei_whose_mask_is_turned_are_refused_and_hidden_files_passed_over(tmp_path: Path) -> None:
    script = loaded(NUCLEI)
    place = small_datasets.nuclei(tmp_path / "data", count=2) / "stage1_train"
    (place / ".trash" / "images").mkdir(parents=True)
    for part in ("images", "masks"):
        (place / "n0" / part / "._1.png").write_bytes(b"of another system")
    small_datasets.save_picture(place / "n1" / "masks" / "1.png", np.ones((48, 40), np.uint8), 6)  # 48 x 40 as stored
    findings = script.write_dataset(place, tmp_path / "dataset")
    assert findings.cases_checked == 2
    assert [(f.case, f.kind) for f in findings.findings] == [("n1", "unusable")]
    assert "differs from the image's" in findings.of("n1")[0].found


def test_nuclei_without_scikit_image_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_datasets.nuclei(tmp_path / "data", count=2)
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"medseg\[cells\]"):
        loaded(NUCLEI).run_nuclei(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_for_nuclei_says_what_was_odd_and_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, out = loaded(NUCLEI), tmp_path / "out"
    place = small_datasets.nuclei(tmp_path / "data", count=7) / "stage1_train"
    (place / "n1" / "masks" / "1.png").write_bytes(b"no picture")
    plain = pipeline.run

    def without_a_mask(*arguments: Any, **choices: Any) -> Any:
        with writing_to(out):  # not held while it runs
            pass
        result = plain(*arguments, **choices)
        first, *others = result.evaluation.cases
        (out / "predictions" / "fold_0" / f"{first.case}.png").unlink()
        cases = (first.model_copy(update={"reason": "no mask"}), *others)
        return replace(result, evaluation=result.evaluation.model_copy(update={"cases": cases}))

    monkeypatch.setattr("medseg.pipeline.run", without_a_mask)
    monkeypatch.setattr(script, "train_settings", lambda **_: TrainSettings(iterations=1, device="cpu"))
    with pytest.raises(typer.Exit) as end:
        as_command(script.command)(folder=place, out=out, overrides=list(SMALL))
    assert end.value.exit_code == 3
    said = capsys.readouterr()
    assert "1 unusable; left out: n1; see" in said.err
    assert "1 unusable; left out: n1; see" in (out / "log.txt").read_text()
    for line in (f"model package: {out / 'package'}", f"{out / 'dataset' / 'findings.json'}", ": no mask"):
        assert line in said.out


def test_the_worst_nuclei_are_drawn_from_the_lowest_score_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = loaded(NUCLEI)
    script.write_dataset(small_datasets.nuclei(tmp_path / "data", count=4), tmp_path / "dataset")
    results = []
    for n, found in ((0, (1, 2, 3)), (1, ()), (2, (1, 2)), (3, (1,))):  # of three nuclei each: F1 1, 0, 0.8 and 0.5
        nuclei = read_mask(tmp_path / "dataset" / "instances" / f"n{n}.png")
        ids = np.where(np.isin(nuclei.array, found), nuclei.array, 0)
        write_mask(replace(nuclei, array=ids), tmp_path / "instances" / f"n{n}.png")
        results.append(InstanceResult(f"n{n}", score_instances(ids, nuclei.array)))
    drawn: list[Panel] = []
    monkeypatch.setattr(script, "SHOWN", 2)
    monkeypatch.setattr(script, "save_contact_sheet", lambda panels, png: drawn.extend(panels))
    script.save_worst(results, tmp_path)
    assert [panel.title[:11] for panel in drawn] == ["n1: F1 0.00", "n3: F1 0.50"]
    assert [len(np.unique(panel.prediction)) - 1 for panel in drawn] == [0, 1]
    assert all(np.unique(panel.reference).tolist() == [0, 1, 2, 3] for panel in drawn)
    (tmp_path / "worst.png").write_bytes(b"of an earlier model")
    script.save_worst([], tmp_path)
    assert not (tmp_path / "worst.png").exists()


def test_real_nuclei_are_read_and_parted_again(real_data: Path, tmp_path: Path) -> None:
    script = loaded(NUCLEI)
    folders = script.image_folders(real_data / "nuclei_dsb2018")
    assert len(folders) == 160
    sizes, scores, overlaps = set(), [], []
    for folder in folders[:60:6]:
        image, nuclei, warnings = script.read_nuclei(folder)
        overlaps += [warning.found for warning in warnings]
        assert image.stem == folder.name
        sizes.add(nuclei.array.shape)
        assert nuclei.array.max() == len(list((folder / "masks").iterdir()))
        scores.append(
            score_instances(separate(script.boundary_classes(nuclei.array, script.BOUNDARY_WIDTH), 1, 2), nuclei.array)
        )
    assert {(256, 256, 1), (320, 256, 1)} < sizes  # columns before rows
    assert overlaps == ["1 pixels are in several masks"]
    f1 = InstanceMeans.of(scores).f1
    assert f1 is not None
    assert f1 > 0.98


# ---- land ------------------------------------------------------------------------------------------------------------


def test_land_from_the_tiles_to_the_mask_of_the_scene(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "land", tiles=5, tile_shape=(64, 64), scene_shape=(150, 100))
    tiny = ("plan.patch_size=[32,32]", "plan.features=[4,8,8,8]")
    settings = TrainSettings(iterations=2, device="cpu")
    dice, run = loaded(SATELLITE).run_satellite(folder, tmp_path / "out", train=settings, overrides=tiny)
    assert run.package == tmp_path / "out" / "package"
    assert list(dice) == ["water", "forest", "field", "built-up"]
    with rasterio.open(folder / "scene.tif") as scene, rasterio.open(tmp_path / "out" / "scene_mask.tif") as mask:
        assert (mask.crs, mask.transform, mask.shape) == (scene.crs, scene.transform, scene.shape)
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert {n.scheme for n in plan.normalisation} == {"ct"}
    assert plan.configuration("2d").network.name == "satellite_segmenter"
    assert plan.configuration("2d").mirror_axes == (0, 1)


def test_made_up_land_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = loaded(SATELLITE)
    small: dict[str, Any] = {"tiles": 2, "tile_shape": (64, 64), "scene_shape": (64, 64)}
    monkeypatch.setattr(script, "write_scenes", lambda folder: write_scenes(folder, **small))
    folder = script.made_up(tmp_path / "out")
    (folder / "scene.tif").write_bytes(b"as it was")
    assert script.made_up(tmp_path / "out") == folder
    assert (folder / "scene.tif").read_bytes() == b"as it was"
    with writing_to(tmp_path / "out"), pytest.raises(InputError, match="another run"):
        script.made_up(tmp_path / "out")


def test_land_without_a_scene_is_not_trained_on(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "land", tiles=2, tile_shape=(64, 64), scene_shape=(64, 64))
    (folder / "scene.tif").unlink()
    with pytest.raises(InputError, match="a scene beside"):
        loaded(SATELLITE).run_satellite(folder, tmp_path / "out", train=TrainSettings(iterations=1))
    assert not (tmp_path / "out").exists()
