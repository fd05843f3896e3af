"""Packages: what goes in comes out, and whatever is amiss is refused without anything being unpickled."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from medseg import package
from medseg.errors import PackageError
from medseg.networks import build_network
from medseg.package import (
    FoldRecord,
    Manifest,
    ModelPackage,
    load_package,
    note_dice,
    save_package,
    write_package,
    zip_package,
)
from medseg.plan import Configuration, NetworkPlan, Normalisation, Plan, TrainingPlan
from medseg.quality import Range, Ranges
from medseg.records import digest_file
from medseg.volume import Labels

FOLD = FoldRecord(weights="", seed=3, iterations=10, seconds=1.5, train_cases=4, validation_cases=1)


def plan_of(name: str = "test", **network: Any) -> Plan:
    sizes: dict[str, Any] = {"features": (2, 3), "kernel_sizes": ((3, 3),) * 2, "strides": ((1, 1), (2, 2)), **network}
    configuration = Configuration(
        spatial_dims=2,
        spacing_mm=(None, 1, 1),
        median_shape=(8, 8, 8),
        patch_size=(8, 8),
        batch_size=2,
        batch_dice=False,
        mirror_axes=(),
        network=NetworkPlan(**sizes),
        training=TrainingPlan(),
        estimated_memory_mb=1,
    )
    return Plan(
        dataset=name,
        fingerprint_digest="",
        device="cpu",
        memory_budget_mb=1,
        axes=(2, 1, 0),
        channels=("MR",),
        normalisation=(Normalisation(scheme="zscore"),),
        labels=Labels(values={"organ": 1}),
        configurations={"2d": configuration},
    )


def weights_of(plan: Plan, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(build_network(plan.configurations["2d"], 1, 2).state_dict())


def write(folder: Path, plan: Plan | None = None, seeds: tuple[int, ...] = (0, 1), **changed: Tensor) -> Manifest:
    plan = plan or plan_of()
    contents = {fold: safetensors.torch.save(weights_of(plan, fold) | changed) for fold in seeds}
    return save_package(folder, "Heart", plan, "2d", dict.fromkeys(seeds, FOLD), contents, {"medseg": "0"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "package")
    return tmp_path / "package"


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest as someone with an editor would."""
    path = folder / "package.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(first: ModelPackage, second: ModelPackage) -> bool:
    return (
        (first.manifest, first.plan, first.digest) == (second.manifest, second.plan, second.digest)
        and first.weights.keys() == second.weights.keys()
        and all(torch.equal(t, second.weights[f][n]) for f, fold in first.weights.items() for n, t in fold.items())
    )


def test_what_goes_in_comes_out(folder: Path) -> None:
    loaded = load_package(folder)
    assert loaded.plan == plan_of()
    assert loaded.configuration == plan_of().configurations["2d"]
    assert sorted(loaded.weights) == [0, 1]
    for fold in (0, 1):
        expected = weights_of(plan_of(), fold)
        assert all(torch.equal(loaded.weights[fold][name], tensor) for name, tensor in expected.items())
        assert loaded.manifest.folds[fold].model_copy(update={"weights": ""}) == FOLD
    assert set(loaded.manifest.files) == {p.name for p in folder.iterdir()} - {"package.json", "README.md"}


def test_networks_are_ready_to_predict(folder: Path) -> None:
    loaded = load_package(folder)
    networks = loaded.networks()
    assert [network.training for network in networks] == [False, False]
    x = torch.randn(1, 1, 8, 8)
    with torch.inference_mode():
        first, second = (network(x) for network in networks)
        (alone,) = (network(x) for network in loaded.only(1).networks())
    assert not torch.equal(first, second)
    assert torch.equal(second, alone)


def test_a_noted_dice_stays_with_its_weights(folder: Path) -> None:
    before = load_package(folder)
    note_dice(folder, {1: 0.875})
    noted = load_package(folder)
    assert [noted.manifest.folds[fold].dice for fold in (0, 1)] == [None, 0.875]
    assert "| not measured |" in (folder / "README.md").read_text()
    assert "| 0.8750 |" in (folder / "README.md").read_text()
    assert noted.digest == before.digest  # it is the same model
    write(folder, seeds=(1,))
    assert load_package(folder).manifest.folds[1].dice == 0.875
    write(folder, seeds=(1,), **{"heads.0.bias": torch.ones(2)})
    assert load_package(folder).manifest.folds[1].dice is None


def test_one_fold_alone_is_another_model(folder: Path) -> None:
    loaded = load_package(folder)
    assert list(loaded.only(1).weights) == [1]
    assert len({loaded.digest, loaded.only(0).digest, loaded.only(1).digest}) == 3
    with pytest.raises(PackageError, match=r"has no fold 2 .expected 0 or 1."):
        loaded.only(2)


def test_a_zip_is_the_same_package(folder: Path, tmp_path: Path) -> None:
    zip_package(folder, tmp_path / "a.zip")
    zip_package(folder, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert same(load_package(tmp_path / "a.zip"), load_package(folder))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert sorted(archive.namelist()) == sorted(p.name for p in folder.iterdir())
        archive.extractall(tmp_path / "unpacked")
    assert same(load_package(tmp_path / "unpacked"), load_package(folder))


def test_the_card_says_what_matters(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for words in (
        "# Heart",
        "not a medical device",
        "organ",
        "MR",
        "| 0 | 4 cases | 1 cases | 10 | 2 | not measured |",
    ):
        assert words.lower() in card.lower()


def test_a_new_package_takes_the_place_of_the_old(folder: Path) -> None:
    old = load_package(folder)
    write(folder, plan_of("other"), seeds=(1, 2))
    new = load_package(folder)
    assert new.plan.dataset == "other"
    assert sorted(new.weights) == [1, 2]
    assert new.digest != old.digest
    assert len(list(folder.iterdir())) == 5  # manifest, card, plan, two weights: nothing of the old is left


@pytest.mark.parametrize("written", range(4))
def test_the_old_package_stays_valid_until_the_new_manifest(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """A kill after any number of the new files (a plan, two weights, then the manifest)."""
    old, calls = load_package(folder), []
    real = package.write_bytes

    def counted(path: Path, content: bytes) -> None:
        if len(calls) == written:
            raise KeyboardInterrupt
        calls.append(path)
        real(path, content)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(package, "write_bytes", counted)
        context.setattr(Manifest, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            write(folder, plan_of("other"), seeds=(2, 3))
    assert same(load_package(folder), old)
    write(folder, plan_of("other"), seeds=(2, 3))
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["plan", "fold_0", "fold_1"])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_a_harmed_file_is_named(folder: Path, tmp_path: Path, kind: str, harm: str, zipped: bool) -> None:
    (path,) = folder.glob(f"{kind}-*")
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    path.write_bytes({"flip": flipped, "cut": good[:-1], "empty": b"", "remove": b""}[harm])
    if harm == "remove":
        path.unlink()
    words = f"{path.name} is missing" if harm == "remove" else f"{path.name} was altered or damaged"
    with pytest.raises(PackageError, match=words):
        load_package(packed(folder, tmp_path) if zipped else folder)
    with pytest.raises(PackageError, match=words):
        zip_package(folder, tmp_path / "sound.zip")
    assert not (tmp_path / "sound.zip").exists()


def packed(folder: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    return tmp_path / "packed.zip"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "schema version 2 .expected 1"),
        ({"schema_version": None}, "schema version None"),
        ({"extra": 1}, "extra"),
        ({"folds": {}}, "holds no weights"),
        ({"folds": 3}, "folds"),
        ({"configuration": "3d_fullres"}, "no configuration '3d_fullres'"),
        ({"plan": "plan.json"}, "plan.json has no digest"),
        ({"files": {}}, "has no digest"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(PackageError, match=words):
        load_package(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufeff"])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "package.json").write_text(text)
    with pytest.raises(PackageError):
        load_package(folder)


def test_no_package_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("not a zip")
    with zipfile.ZipFile(tmp_path / "bare.zip", "w"):
        pass
    for name, words in (
        ("empty", "has no package.json"),
        ("bare.zip", "has no package.json"),
        ("text.zip", "cannot be read"),
        ("missing", "cannot be read"),
    ):
        with pytest.raises(PackageError, match=words):
            load_package(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    write(tmp_path, **{"heads.0.bias": torch.tensor([0.0, value])})
    with pytest.raises(PackageError, match=r"heads\.0\.bias are not finite"):
        load_package(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [{"heads.0.bias": torch.zeros(3)}, {"unknown": torch.zeros(2)}, {"heads.0.weight": torch.zeros(2, 3, 1, 1)}],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, changed: dict[str, Tensor]) -> None:
    write(tmp_path, seeds=(0,), **changed)
    with pytest.raises(PackageError, match="fold 0: weights do not fit"):
        load_package(tmp_path).networks()


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    save_package(tmp_path, "Heart", plan_of(), "2d", {0: FOLD}, {0: pickle.dumps({"weight": 1})}, {})
    with pytest.raises(PackageError, match="no safetensors file"):
        load_package(tmp_path)


class Trap:
    """Unpickling one of these leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("zipped", [False, True])
def test_only_what_the_manifest_lists_is_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    trap, opened = pickle.dumps(Trap(tmp_path / "mark")), []
    for name in ("weights.pt", "plan.pkl", "fold_0.pth"):
        (folder / name).write_bytes(trap)
    path = packed(folder, tmp_path) if zipped else folder
    read_folder, read_zip = Path.read_bytes, zipfile.ZipFile.read
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.name) or read_folder(self))
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, name, *more: opened.append(name) or read_zip(self, name, *more)
    )
    loaded = load_package(path)
    assert sorted(opened) == sorted([*loaded.manifest.files, "package.json"])
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/hostname", "a/b.json", "..", "", "a\\b", "C:\\x", "./plan.json"]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_names_that_climb_out_are_refused(folder: Path, tmp_path: Path, name: str, zipped: bool) -> None:
    """The file is there, and its digest is right: it is the name that is refused."""
    (plan,) = folder.glob("plan-*.json")
    (tmp_path / "outside.json").write_bytes(plan.read_bytes())
    files = load_package(folder).manifest.files
    rewrite(folder, plan=name, files={**files, name: digest_file(plan)})
    path = folder
    if zipped:
        path = packed(folder, tmp_path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name or "x", plan.read_bytes())
    with pytest.raises(PackageError, match="names the file"):
        load_package(path)


def test_a_member_that_unpacks_to_too_much_is_refused(folder: Path, tmp_path: Path) -> None:
    (plan,) = folder.glob("plan-*.json")
    plan.write_bytes(b" " * 10_000_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    with pytest.raises(PackageError, match=f"{plan.name} unpacks to 10,000,000 bytes"):
        load_package(tmp_path / "bomb.zip")


def test_a_compressed_zip_is_taken(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "small.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    assert same(load_package(tmp_path / "small.zip"), load_package(folder))


@pytest.mark.parametrize("part", ["middle", "end"])
def test_a_damaged_zip_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    zip_package(folder, tmp_path / "whole.zip")
    content = (tmp_path / "whole.zip").read_bytes()
    at = len(content) // 2
    broken = content[:at] + b"\0" * 50 + content[at + 50 :] if part == "middle" else content[:at]
    (tmp_path / "broken.zip").write_bytes(broken)
    with pytest.raises(PackageError):
        load_package(tmp_path / "broken.zip")


# ---- packages made in memory, and cascades ---------------------------------------------------------------------------


def in_memory(previous: ModelPackage | None = None, **said: Any) -> ModelPackage:
    """A network of its own seeds; after another one it sees that one's class beside the image."""
    plan = plan_of("second" if previous else "first")
    setup = plan.configurations["2d"].model_copy(update={"previous": previous and "2d"})
    plan = plan.model_copy(update={"configurations": {"2d": setup}})
    torch.manual_seed(7)
    networks = {fold: build_network(setup, plan.inputs(setup), plan.outputs) for fold in (0, 1)}
    manifest = Manifest(
        name=plan.dataset, configuration="2d", plan="", folds=dict.fromkeys((0, 1), FoldRecord(weights="")),
        files={}, versions={}, **said,
    )  # fmt: skip
    return ModelPackage(manifest, plan, {fold: dict(n.state_dict()) for fold, n in networks.items()}, previous)


def test_what_is_not_known_and_what_is_to_be_said_is_on_the_card(tmp_path: Path) -> None:
    manifest = write_package(in_memory(licence="CC0", notes=("From elsewhere.",)), tmp_path)
    loaded = load_package(tmp_path)
    assert (loaded.manifest, loaded.path) == (manifest, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "- From elsewhere.\n" in card
    assert "- Licence of the weights: CC0\n" in card
    assert "| 1 | not known | not known | not known | not known | not measured |" in card


def test_a_package_written_again_is_the_same(folder: Path, tmp_path: Path) -> None:
    loaded = load_package(folder)
    write_package(loaded, tmp_path / "again")
    assert same(load_package(tmp_path / "again"), loaded)
    write_package(loaded.only(1), tmp_path / "one")
    assert same(load_package(tmp_path / "one"), load_package(tmp_path / "one").only(1))
    assert load_package(tmp_path / "one").digest == loaded.only(1).digest


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    package = in_memory()
    package.weights[1]["heads.0.bias"][0] = float("inf")
    with pytest.raises(PackageError, match=r"fold 1: weights heads\.0\.bias are not finite"):
        write_package(package, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cascade_is_one_package(tmp_path: Path) -> None:
    write_package(in_memory(in_memory()), tmp_path / "package")
    loaded = load_package(tmp_path / "package")
    assert loaded.previous is not None
    assert (loaded.plan.dataset, loaded.previous.plan.dataset) == ("second", "first")
    assert [network(torch.ones(1, 2, 8, 8)).shape[1] for network in loaded.networks()] == [2, 2]
    assert [network(torch.ones(1, 1, 8, 8)).shape[1] for network in loaded.previous.networks()] == [2, 2]
    assert "A second stage: it sees the masks of 2d" in (tmp_path / "package" / "README.md").read_text()
    assert len(list((tmp_path / "package").iterdir())) == 8  # manifest and card; of each stage a plan and two weights
    zip_package(tmp_path / "package", tmp_path / "package.zip")
    zipped = load_package(tmp_path / "package.zip")
    assert same(zipped, loaded)
    assert zipped.previous is not None
    assert same(zipped.previous, loaded.previous)


def test_the_digest_covers_the_earlier_stage(tmp_path: Path) -> None:
    write_package(in_memory(in_memory()), tmp_path)
    loaded = load_package(tmp_path)
    assert loaded.previous is not None
    one = loaded.only(1)
    assert one.previous is not None
    assert list(one.previous.weights) == [1]
    other = replace(loaded, previous=loaded.previous.only(1))
    assert len({loaded.digest, one.digest, other.digest, loaded.previous.digest}) == 4


@pytest.mark.parametrize("change", ["altered", "missing", "without", "needless"])
def test_a_harmed_earlier_stage_is_refused(tmp_path: Path, change: str) -> None:
    write_package(in_memory(in_memory()), tmp_path)
    manifest = Manifest.load(tmp_path / "package.json")
    assert manifest.previous is not None
    file = tmp_path / manifest.previous.folds[0].weights
    if change == "altered":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    if change == "missing":
        file.unlink()
    if change == "without":
        rewrite(tmp_path, previous=None)
    if change == "needless":
        body = json.loads((tmp_path / "package.json").read_text())
        rewrite(tmp_path, previous={**body["previous"], "previous": body["previous"]})
    words = {
        "altered": "was altered", "missing": "is missing", "without": "has None before 2d .expected 2d",
        "needless": "has 2d before 2d .expected None",
    }  # fmt: skip
    with pytest.raises(PackageError, match=words[change]):
        load_package(tmp_path)


def test_a_package_of_before_cascades_loads(folder: Path) -> None:
    """Its manifest lacks what has been added since."""
    loaded = load_package(folder)
    body = json.loads((folder / "package.json").read_text())
    for added in ("notes", "previous"):
        del body[added]
    for fold in body["folds"].values():
        del fold["source"]
    (folder / "package.json").write_text(json.dumps(body))
    assert same(load_package(folder), loaded)


def test_ranges_of_the_training_data_are_kept_and_older_packages_have_none(folder: Path, tmp_path: Path) -> None:
    known = Range(low=1, high=2)
    ranges = Ranges(
        cases=3,
        spacing_mm=(known, known, known),
        volumes_ml={"a": known},
        components={"a": 1},
        intensities=(known,),
    )
    contents = {0: safetensors.torch.save(weights_of(plan_of(), 0))}
    save_package(tmp_path / "new", "Heart", plan_of(), "2d", {0: FOLD}, contents, {}, ranges)
    assert load_package(tmp_path / "new").manifest.ranges == ranges
    body = json.loads((folder / "package.json").read_text())
    assert body.pop("ranges") is None
    (folder / "package.json").write_text(json.dumps(body))
    assert load_package(folder).manifest.ranges is None
