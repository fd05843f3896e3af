"""A trained package in 8 bits: calibrated on its training cases, its cost measured on the others and kept."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medseg import io, quantise
from medseg.dataset import Dataset
from medseg.engines import Quantisation, Quantised, load_quantised
from medseg.errors import InputError
from medseg.metrics import class_dice
from medseg.package import MANIFEST, Manifest, load_package, zip_package
from medseg.phantom import make_case
from medseg.pipeline import RunResult
from medseg.predict import Predictor, PredictSettings
from medseg.volume import Labels


@pytest.fixture(scope="module")
def dataset(phantom_dataset: Path) -> Dataset:
    return Dataset.open(phantom_dataset)


@pytest.fixture(scope="module")
def quantised(
    tiny_run: RunResult, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Quantisation, list[str]]:
    """A package after ``quantise``, its record, and the progress that was told."""
    folder, told = Path(shutil.copytree(tiny_run.package, tmp_path_factory.mktemp("quantised") / "package")), []
    (record,) = quantise.quantise(folder, dataset, lambda work, fraction, note: told.append(work))
    return folder, record, told


@pytest.fixture
def folder(tiny_run: RunResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.package, tmp_path / "package"))


@pytest.fixture
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing is quantised, and nothing measured, for tests of what is around that."""

    def described(*_: object, digest: str, cases: list[str], **__: object) -> Quantisation:
        return Quantisation(network=digest, tiles=1, cases=tuple(cases), agreement=1, versions={})

    monkeypatch.setattr(quantise, "quantise_network", lambda *_: Quantised(b"xml", b"bin"))
    monkeypatch.setattr(quantise, "describe", described)
    monkeypatch.setattr(quantise, "_dice", lambda predictor, case: {"openvino": 0.75}.get(predictor.engine, 0.5))
    return monkeypatch


def mean_dice(path: Path, dataset: Dataset, names: tuple[str, ...], **settings: Any) -> float:
    predictor = Predictor(load_package(path), PredictSettings(device="cpu", **settings))
    dices = []
    for case in map(dataset.case, names):
        assert case.label is not None
        mask = predictor(list(case.images))
        found = class_dice(mask.array, io.read_mask(case.label).array, mask.labels)
        dices.append(statistics.fmean(dice for dice in found if dice is not None))
    return statistics.fmean(dices)


def test_the_cost_is_measured_on_held_out_cases(
    quantised: tuple[Path, Quantisation, list[str]], dataset: Dataset
) -> None:
    folder, record, told = quantised
    fold = dataset.folds()[0]
    assert record.held_out
    assert record.measured_cases == fold.validation
    assert record.cases == fold.train  # fewer than CALIBRATION_CASES
    assert set(told) == {"calibrating", "measuring"}
    assert record.dice_float32 == pytest.approx(mean_dice(folder, dataset, fold.validation, engine="eager"), abs=1e-3)
    assert record.dice_int8 == pytest.approx(mean_dice(folder, dataset, fold.validation, engine="openvino-int8"))
    assert record.dice_float32 is not None
    assert record.dice_int8 is not None
    assert record.dice_loss == record.dice_float32 - record.dice_int8
    assert abs(record.dice_loss) < 0.1
    assert record.agreement is not None
    assert 0.8 < record.agreement < 1


def test_prediction_takes_what_is_kept(
    quantised: tuple[Path, Quantisation, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, record, _ = quantised
    kept = load_quantised(folder / "int8", load_package(folder).only(0).digest)
    assert kept is not None
    assert kept[1] == record

    def refuse(*_: object) -> None:
        raise AssertionError("calibrated once more")

    monkeypatch.setattr("medseg.engines.quantise_network", refuse)
    volume, _ = make_case(0, shape=(20, 20, 10))
    predictor = Predictor(load_package(folder), PredictSettings(device="cpu", engine="openvino-int8"))
    assert predictor.segment(volume).array.any()


@pytest.mark.usefixtures("in_no_time")
def test_a_zip_has_them_beside_it(folder: Path, dataset: Dataset, tmp_path: Path) -> None:
    zip_package(folder, tmp_path / "model.zip")
    before = (tmp_path / "model.zip").read_bytes()
    (record,) = quantise.quantise(tmp_path / "model.zip", dataset)
    assert (record.dice_float32, record.dice_int8, record.dice_loss) == (0.75, 0.5, 0.25)
    names = sorted(path.name for path in (tmp_path / "model-int8").iterdir())
    assert names == sorted([*record.files, f"{record.network[:12]}.json"])
    assert (tmp_path / "model.zip").read_bytes() == before


def test_where_no_mask_has_any_class_there_is_no_cost(
    folder: Path, dataset: Dataset, in_no_time: pytest.MonkeyPatch
) -> None:
    in_no_time.setattr(quantise, "_dice", lambda *_: None)
    (record,) = quantise.quantise(folder, dataset)
    assert (record.dice_float32, record.dice_int8, record.dice_loss) == (None, None, None)


def test_a_folder_that_cannot_be_written_to_is_refused_first(
    folder: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "int8").write_text("a file where the folder should be")
    monkeypatch.setattr(quantise, "_quantised", None)
    with pytest.raises(InputError, match=r"int8: cannot be written to.*Copy the package to a folder of your own"):
        quantise.quantise(folder, dataset)


def test_a_disk_that_fills_meanwhile_is_an_error_too(
    folder: Path, dataset: Dataset, in_no_time: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    in_no_time.setattr(quantise, "keep_quantised", full)
    with pytest.raises(InputError, match="int8: cannot be written to: No space left"):
        quantise.quantise(folder, dataset)


def test_a_missing_extra_is_named_first(folder: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setattr(quantise, "_quantised", None)
    with pytest.raises(InputError, match=r'pip install "medseg\[int8\]"'):
        quantise.quantise(folder, dataset)


def of_other_counts(folder: Path, dataset: Dataset) -> Dataset:
    manifest = Manifest.load(folder / MANIFEST)
    folds = {0: manifest.folds[0].model_copy(update={"train_cases": 100})}
    manifest.model_copy(update={"folds": folds}).save(folder / MANIFEST)
    return dataset


@pytest.mark.usefixtures("in_no_time")
@pytest.mark.parametrize(
    "other",
    [
        of_other_counts,
        lambda folder, dataset: replace(dataset, name="another"),
        lambda folder, dataset: replace(dataset, channels=("another",)),
        lambda folder, dataset: replace(dataset, labels=Labels(values={"another": 1})),
    ],
)
def test_of_other_cases_it_is_not_known_what_the_network_has_seen(
    folder: Path, dataset: Dataset, other: Callable[[Path, Dataset], Dataset]
) -> None:
    (record,) = quantise.quantise(folder, other(folder, dataset))
    ids = sorted(case.id for case in dataset.cases)
    assert not record.held_out
    assert record.measured_cases == (ids[0], ids[5])
    assert record.cases == tuple(ids[1:5])


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(10, 5, [0, 2, 4, 6, 8]), (7, 3, [0, 2, 4]), (3, 8, [0, 1, 2]), (0, 8, [])],
)
def test_cases_are_evenly_chosen(count: int, most: int, expected: list[int]) -> None:
    assert quantise._evenly([str(n) for n in range(count)], most) == [str(n) for n in expected]
