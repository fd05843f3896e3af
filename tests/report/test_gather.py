"""Gathering: what is found in each kind of folder, and that what is missing is said and costs nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from reporting import scored

from medseg.batch import predict_folder
from medseg.errors import InputError
from medseg.evaluate import Evaluation
from medseg.pipeline import RunResult
from medseg.predict import Predictor
from medseg.report.gather import gather, without_folders
from medseg.volume import Labels

LABELS = Labels(values={"organ": 1, "lesion": 5})


@pytest.fixture
def run(tiny_run: RunResult, tmp_path: Path) -> Path:
    """A finished run, free to be changed."""
    return Path(shutil.copytree(tiny_run.out, tmp_path / "run"))


def test_a_run_is_found_with_its_masks_images_and_references(tiny_run: RunResult, phantom_dataset: Path) -> None:
    found = gather(tiny_run.out)
    assert (found.kind, found.evaluation, found.notes) == ("run", tiny_run.evaluation, ())
    case = tiny_run.evaluation.cases[0].case
    files = found.files[case]
    assert files.images == (phantom_dataset / "imagesTr" / f"{case}.nii.gz",)
    assert files.reference == phantom_dataset / "labelsTr" / f"{case}.nii.gz"
    assert files.prediction == tiny_run.out / "predictions" / "fold_0" / f"{case}.nii.gz"
    assert [batch.name for batch in found.batches] == ["fold 0"]
    assert found.predicted[case].status == "done"
    assert set(found.predicted[case].volumes_ml) == {"organ", "lesion"}
    assert list(found.logs) == [0]
    assert found.run["settings"]["iterations"] == 40
    assert found.run["configuration"] == "3d_fullres"
    assert (found.check, found.plan, found.fingerprint) != (None, None, None)
    assert len(found.folds) == 5
    assert found.date[:2] == "20"


def test_a_dataset_that_is_gone_costs_images_and_references_alone(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "dataset_folder": "/secret/place/gone"}))
    found = gather(run)
    assert found.evaluation is not None
    (note,) = found.notes
    assert note.startswith("The dataset is not where it was")
    assert "secret" not in note
    assert all(files.prediction and not files.images for files in found.files.values())


def test_other_images_may_be_named(run: Path, phantom_dataset: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(phantom_dataset, tmp_path / "moved"))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "dataset_folder": "gone"}))
    found = gather(run, moved)
    case = next(iter(found.predicted))
    assert found.files[case].images == (moved / "imagesTr" / f"{case}.nii.gz",)
    with pytest.raises(InputError, match="nowhere"):
        gather(run, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["plan.json", "evaluation/evaluation.json", "check.json", "fingerprint.json", "run.json"]
)
def test_a_record_of_another_version_is_noted_and_left_out(name: str, run: Path) -> None:
    (run / name).write_text('{"schema_version": 0}' if name != "run.json" else "[]")
    found = gather(run)
    assert any(note.startswith(f"{Path(name).name} cannot be") for note in found.notes)
    assert found.predicted


def test_folds_and_tables_that_are_damaged_are_noted(run: Path) -> None:
    (run / "folds.json").write_text("[")
    (run / "predictions" / "fold_0" / "cases.csv").write_text("case,status\na,done\n")
    found = gather(run)
    assert [note.split(" cannot")[0] for note in found.notes] == ["cases.csv", "folds.json"]
    assert found.folds == ()
    assert found.predicted == {}


def test_an_evaluation_knows_where_its_masks_are(tmp_path: Path) -> None:
    blocks = {"a": ({1: (2, 8)}, {1: (3, 8)}), "b": ({1: (2, 8)}, None), "c": ({5: (2, 8)}, {5: (2, 8)})}
    evaluation = scored(tmp_path, blocks, LABELS)
    found = gather(tmp_path / "scores")
    assert (found.kind, found.evaluation, found.name) == ("evaluation", evaluation, "predictions")
    assert found.files["a"].prediction == tmp_path / "predictions" / "a.nii.gz"
    assert found.files["b"].prediction is None
    assert found.files["b"].reference == tmp_path / "references" / "b.nii.gz"
    shutil.rmtree(tmp_path / "predictions")
    gone = gather(tmp_path / "scores")
    assert gone.evaluation == evaluation
    assert gone.files == {}
    assert "not where they were" in gone.notes[0]


def test_an_evaluation_against_a_dataset_has_its_name_and_images(phantom_dataset: Path, tmp_path: Path) -> None:
    from medseg.evaluate import evaluate_folders

    evaluation = evaluate_folders(phantom_dataset / "labelsTr", phantom_dataset)
    evaluation.save(tmp_path / "evaluation.json")
    found = gather(tmp_path)
    assert found.name == json.loads((phantom_dataset / "dataset.json").read_text())["name"]
    case = evaluation.cases[0].case
    assert found.files[case].images == (phantom_dataset / "imagesTr" / f"{case}.nii.gz",)


def test_predictions_are_found_again_with_their_images(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (images / "cut.nii.gz").write_bytes((images / "a.nii.gz").read_bytes()[:200])
    predict_folder(predictor, images, out)
    found = gather(out)
    assert (found.kind, found.labels) == ("predictions", predictor.labels)
    assert found.files["a"].images == (images / "a.nii.gz",)
    assert found.files["a"].prediction == out / "a.nii.gz"
    assert found.predicted["cut"].status == "failed"
    assert found.files["cut"].prediction is None
    shutil.rmtree(images)
    gone = gather(out)
    assert set(gone.predicted) == {"a", "b", "cut"}
    assert gone.files["a"].images == ()
    assert "The images are not where they were" in gone.notes[0]


def test_shards_are_put_together(tmp_path: Path) -> None:
    head = "case,status,output,seconds,read_s,prepare_s,network_s,write_s,peak_memory_mb,strategy,liver_ml,qc_flags"
    for number, row in (
        (1, "a,done,a.nii.gz,2.5,1,,1.5,,300,,12.5,empty:liver;volume:liver:low"),
        (2, "b,failed,,,,,,,,,,"),
    ):
        (tmp_path / f"cases-{number}-of-2.csv").write_text(f"{head},warnings,reason\n{row},,broken\n")
        (tmp_path / f"run-{number}-of-2.json").write_text("{}")
    found = gather(tmp_path)
    assert [batch.name for batch in found.batches] == ["shard 1 of 2", "shard 2 of 2"]
    first = found.predicted["a"]
    assert (first.seconds, first.stages, first.peak_memory_mb) == (2.5, {"read": 1.0, "network": 1.5}, 300.0)
    assert (first.volumes_ml, first.flags) == ({"liver": 12.5}, ("empty:liver", "volume:liver:low"))
    assert found.predicted["b"].reason == "broken"
    assert found.labels is None
    assert any("does not name the labels" in note for note in found.notes)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no results"):
        gather(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        gather(tmp_path / "missing")
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(InputError, match="schema version"):
        gather(tmp_path)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/home/anna/data/a.nii.gz: is damaged", "…/a.nii.gz: is damaged"),
        (
            "/home/Anna Muster/my data/a.nii.gz: is damaged (expected /x/y.dcm)",
            "…/a.nii.gz: is damaged (expected …/y.dcm)",
        ),
        (r"C:\Users\anna\a.nii.gz: is damaged", "…/a.nii.gz: is damaged"),
        ("masks/today/a.nii.gz: is damaged", "…/a.nii.gz: is damaged"),
        ("found 3/5 of 0.5 mm and/or a file", "found 3/5 of 0.5 mm and/or a file"),
        ("a.nii.gz: has shape (2, 3, 4)", "a.nii.gz: has shape (2, 3, 4)"),
    ],
)
def test_messages_lose_the_folders_of_their_paths(text: str, short: str) -> None:
    assert without_folders(text) == short


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    evaluation = scored(tmp_path, {"a": ({1: (2, 8)}, {1: (2, 8)})}, LABELS)
    assert Evaluation.load(tmp_path / "scores" / "evaluation.json") == evaluation
