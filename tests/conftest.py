"""Fixtures that several test files share: a tiny phantom dataset, and a model trained on it for a few steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from small_datasets import write_pictures

from medseg.phantom import make_dataset

if TYPE_CHECKING:
    from medseg.package import ModelPackage
    from medseg.pipeline import RunResult
    from medseg.predict import Predictor

pytest_plugins = ("browser",)  # page, open_file, niivue

settings.register_profile("medseg", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("medseg")


@pytest.fixture(scope="session", autouse=True)
def _own_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test finds what the user has downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def phantom_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Decathlon folder of six labelled cases of about 20 x 20 x 10 voxels, and two without label. Do not change it.

    Its labels are 1 and 5, so that nothing can take a channel's index for a label's value.
    """
    folder = tmp_path_factory.mktemp("phantom")
    return make_dataset(folder, cases=6, test_cases=2, shape=(20, 20, 10), labels={"organ": 1, "lesion": 5})


@pytest.fixture(scope="session")
def tiny_overrides() -> tuple[str, ...]:
    """Plan settings for a network of three stages that takes a hundredth of a second a step."""
    return ("plan.patch_size=[8,16,16]", "plan.features=[8,16,16]", "plan.batch_size=2", "plan.warmup=0")


@pytest.fixture(scope="session")
def tiny_run(
    phantom_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    """What ``pipeline.run`` makes of the phantom dataset in forty steps, seed 0, on a CPU. Do not change its files."""
    from medseg.pipeline import run
    from medseg.train import TrainSettings

    out = tmp_path_factory.mktemp("run")
    # float32, so that the model is the same on processors with and without bfloat16
    settings = TrainSettings(iterations=40, device="cpu", precision="32")
    return run(phantom_dataset, out, train=settings, overrides=tiny_overrides, report=False)


@pytest.fixture(scope="session")
def picture_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An nnU-Net folder of six RGB pictures with labels 1 and 3, two of them on their side. Do not change it."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def picture_run(picture_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """What ``pipeline.run`` makes of the pictures in forty steps, without a configuration. Do not change its files."""
    from medseg.pipeline import run
    from medseg.train import TrainSettings

    tiny = ("plan.patch_size=[16,32]", "plan.features=[8,16,16]", "plan.batch_size=4", "plan.warmup=0")
    out = tmp_path_factory.mktemp("picture_run")
    settings = TrainSettings(iterations=40, device="cpu", precision="32")
    return run(picture_dataset, out, train=settings, overrides=tiny, report=False)


@pytest.fixture(scope="session")
def package(tiny_run: RunResult) -> ModelPackage:
    """The model of ``tiny_run``."""
    from medseg.package import load_package

    return load_package(tiny_run.package)


@pytest.fixture(scope="session")
def predictor(tiny_run: RunResult) -> Predictor:
    """A predictor with the model of ``tiny_run``."""
    from medseg.predict import load

    return load(tiny_run.package, device="cpu")


@pytest.fixture(scope="session")
def of_pictures(picture_run: RunResult) -> Predictor:
    """A predictor with the model of ``picture_run``."""
    from medseg.predict import load

    return load(picture_run.package, device="cpu")


@pytest.fixture
def images(tmp_path: Path, phantom_dataset: Path) -> Path:
    """A folder with two good images, a.nii.gz and b.nii.gz."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, source in zip("ab", sorted((phantom_dataset / "imagesTs").iterdir()), strict=True):
        (folder / f"{name}.nii.gz").write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test data; the test is skipped where ``MEDSEG_TEST_DATA`` does not name it."""
    folder = os.environ.get("MEDSEG_TEST_DATA")
    if not folder:
        pytest.skip("needs real data: set MEDSEG_TEST_DATA to their folder")
    return Path(folder)
