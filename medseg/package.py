"""ModelPackage: a trained model on disk. A folder, or the same folder in one zip, of JSON and safetensors.

Nothing in it is code and nothing is unpickled. ``package.json`` lists plan and weights with their SHA-256, and only
what it lists is read; loading refuses a package with a missing or altered file. Files are named by their content, so
that those of an earlier package stay as they are until a new ``package.json`` takes its place. ``README.md`` is the
model card, for people.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor, nn

from medseg.errors import InputError, PackageError, PlanError
from medseg.networks import build_network
from medseg.plan import Configuration, ConfigurationName, Plan
from medseg.records import Record, digest_of, replacing, write_bytes, write_text

R = TypeVar("R", bound=Record)
MANIFEST, CARD = "package.json", "README.md"
MOST_COMPRESSED = 100
"""Times that a file of a package may be larger than in its zip: JSON is about ten, weights are one."""


class FoldRecord(Record):
    """How the weights of one fold came to be.

    Attributes:
        weights: name of the file in the package.
        seed: of its training.
        precision: that the network was trained in: 32, bf16 or 16 bits.
        iterations: steps of training.
        seconds: time in training, all runs together.
        train_cases, validation_cases: how many.
        dice: mean Dice on the validation cases, if it was measured.
    """

    weights: str
    seed: int
    precision: str = "32"
    iterations: int
    seconds: float
    train_cases: int
    validation_cases: int
    dice: float | None = None


class Manifest(Record):
    """Table of contents of a package.

    Attributes:
        name: of the model.
        configuration: the plan's configuration that was trained.
        plan: name of the plan's file in the package.
        folds: by their number.
        files: name -> SHA-256 of plan and weights.
        versions: of medseg and the libraries that trained it.
        licence, intended_use: said on the card too.
    """

    name: str
    configuration: ConfigurationName
    plan: str
    folds: dict[int, FoldRecord]
    files: dict[str, str]
    versions: dict[str, str]
    licence: str = "as the training data"
    intended_use: str = "Research. Not a medical device."


@dataclass(frozen=True)
class ModelPackage:
    """A loaded package: manifest, plan and the weights of each fold."""

    manifest: Manifest
    plan: Plan
    weights: Mapping[int, Mapping[str, Tensor]]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what decides the masks: configuration, plan and the weights that are here."""
        names = [self.manifest.plan, *(self.manifest.folds[fold].weights for fold in sorted(self.weights))]
        return digest_of([self.manifest.configuration, *(self.manifest.files[name] for name in names)])

    @property
    def configuration(self) -> Configuration:
        """The configuration that the weights belong to."""
        return self.plan.configuration(self.manifest.configuration)

    def only(self, fold: int) -> ModelPackage:
        """The package with the weights of one fold alone, for predicting cases that this fold did not train on.

        Raises:
            PackageError: there are no weights of that fold.
        """
        if fold not in self.weights:
            raise PackageError(self.manifest.name, f"has no fold {fold}", " or ".join(map(str, sorted(self.weights))))
        return replace(self, weights={fold: self.weights[fold]})

    def networks(self) -> list[nn.Module]:
        """One network a fold, with its weights, in evaluation mode.

        Raises:
            PackageError: the weights do not fit the plan's network.
        """
        networks = []
        for fold, weights in sorted(self.weights.items()):
            network = build_network(self.configuration, self.plan.inputs(self.configuration), self.plan.outputs)
            try:
                network.load_state_dict(dict(weights))
            except RuntimeError as failure:
                raise PackageError(f"fold {fold}", f"weights do not fit the plan's network: {failure}") from None
            networks.append(network.eval())
        return networks


def save_package(
    folder: Path,
    name: str,
    plan: Plan,
    configuration: ConfigurationName,
    folds: Mapping[int, FoldRecord],
    weights: Mapping[int, bytes],
    versions: Mapping[str, str],
) -> Manifest:
    """Write a package; ``weights`` are safetensors files as bytes, one fold at least.

    The manifest comes last: until then a package that was in the folder before stays valid, and a crash leaves it so.
    A fold's Dice is that of its record, or else the one that was noted in the folder for the same weights.
    """
    contents: dict[str, bytes] = {}
    noted = _noted_dice(folder)

    def add(stem: str, suffix: str, content: bytes) -> str:
        name = f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
        contents[name] = content
        return name

    def place(fold: int, file: str) -> FoldRecord:
        record = folds[fold]
        dice = noted.get(file) if record.dice is None else record.dice
        return record.model_copy(update={"weights": file, "dice": dice})

    manifest = Manifest(
        name=name,
        configuration=configuration,
        plan=add("plan", ".json", plan.as_json().encode()),
        folds={fold: place(fold, add(f"fold_{fold}", ".safetensors", content)) for fold, content in weights.items()},
        files={file: hashlib.sha256(content).hexdigest() for file, content in contents.items()},
        versions=dict(versions),
    )
    for file, content in contents.items():
        write_bytes(folder / file, content)
    manifest.save(folder / MANIFEST)
    write_text(folder / CARD, _card(manifest, plan))
    for path in (*folder.glob("plan-*.json"), *folder.glob("fold_*.safetensors")):
        if path.name not in contents:
            path.unlink()
    return manifest


def note_dice(folder: Path, dice: Mapping[int, float | None]) -> None:
    """Write the mean Dice of folds on their held-out cases into the manifest and the card of a package folder."""
    manifest, plan, _ = _read(folder)
    folds = {
        fold: record.model_copy(update={"dice": dice.get(fold, record.dice)}) for fold, record in manifest.folds.items()
    }
    if folds != manifest.folds:
        manifest = manifest.model_copy(update={"folds": folds})
        manifest.save(folder / MANIFEST)
        write_text(folder / CARD, _card(manifest, plan))


def _noted_dice(folder: Path) -> dict[str, float | None]:
    """Dice by weight file of the package that is in a folder; none where there is no sound one."""
    try:
        return {record.weights: record.dice for record in Manifest.load(folder / MANIFEST).folds.values()}
    except InputError:
        return {}


def load_package(path: Path) -> ModelPackage:
    """Load a package from a folder or a zip, verifying the digest of every file that is read.

    Raises:
        PackageError: there is no package, a file is missing, altered or not listed, the schema version is another, or
            weights hold values that are not finite.
    """
    manifest, plan, contents = _read(path)
    weights = {fold: _tensors(contents[record.weights], record.weights) for fold, record in manifest.folds.items()}
    return ModelPackage(manifest, plan, weights)


def zip_package(folder: Path, target: Path) -> None:
    """Put a package folder into one zip file (stored, not compressed: weights do not shrink).

    Raises:
        PackageError: the folder holds no sound package.
    """
    manifest, plan, contents = _read(folder)
    contents[CARD] = _card(manifest, plan).encode()
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(contents.items()):
            archive.writestr(zipfile.ZipInfo(name), content)


def _read(path: Path) -> tuple[Manifest, Plan, dict[str, bytes]]:
    """Manifest, plan and every file that they need by its name: each listed, and as its digest says."""
    try:
        if path.is_dir():
            return _checked(path, lambda name: (path / name).read_bytes())
        with zipfile.ZipFile(path) as archive:
            return _checked(path, lambda name: _member(archive, name))
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as failure:  # RuntimeError: encrypted
        raise PackageError(path, f"cannot be read: {failure}", "a package folder or zip") from None


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > MOST_COMPRESSED * max(info.compress_size, 1):
        raise PackageError(archive.filename, f"{name} unpacks to {info.file_size:,} bytes", "weights and JSON")
    return archive.read(name)


def _checked(path: Path, read: Callable[[str], bytes]) -> tuple[Manifest, Plan, dict[str, bytes]]:
    try:
        contents = {MANIFEST: read(MANIFEST)}
    except (FileNotFoundError, KeyError):
        remedy = "give the folder that `medseg run` calls package"
        raise PackageError(path, f"has no {MANIFEST}", "a model package", remedy) from None
    manifest = _record(Manifest, contents[MANIFEST], f"{path}/{MANIFEST}")
    if not manifest.folds:
        raise PackageError(path, "holds no weights", "one fold at least")
    for name in (manifest.plan, *(record.weights for record in manifest.folds.values())):
        contents[name] = _verified(path, name, manifest.files.get(name), read)
    plan = _record(Plan, contents[manifest.plan], f"{path}/{manifest.plan}")
    try:
        plan.configuration(manifest.configuration)
    except PlanError as failure:
        raise PackageError(path, failure.found, failure.expected) from None
    return manifest, plan, contents


def _verified(path: Path, name: str, digest: str | None, read: Callable[[str], bytes]) -> bytes:
    """The bytes of a listed file of the package."""
    if digest is None:
        raise PackageError(path, f"{name} has no digest", f"one in {MANIFEST}")
    if PurePosixPath(name).name != name or "\\" in name or name in ("", ".."):
        raise PackageError(path, f"names the file {name!r}", "a file in the package itself")
    try:
        content = read(name)
    except (FileNotFoundError, KeyError):
        raise PackageError(path, f"{name} is missing", "a complete package", "copy the package again") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise PackageError(path, f"{name} was altered or damaged", f"the digest in {MANIFEST}", "copy it again")
    return content


def _record(kind: type[R], content: bytes, where: str) -> R:
    try:
        body: Any = json.loads(content)
    except ValueError as failure:
        raise PackageError(where, f"is no JSON: {failure}") from None
    version = body.pop("schema_version", None) if isinstance(body, dict) else None
    if version != kind.schema_version:
        raise PackageError(
            where, f"has schema version {version}", str(kind.schema_version), "use the medseg that made it"
        )
    return kind.checked(body, where, PackageError)


def _tensors(content: bytes, name: str) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as failure:
        raise PackageError(name, f"is no safetensors file: {failure}") from None
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise PackageError(name, f"weights {key} are not finite", "finite numbers", "train again")
    return tensors


def _card(manifest: Manifest, plan: Plan) -> str:
    """The model card: what it is, on what it was trained, how well it did, what it is not for."""
    setup = plan.configuration(manifest.configuration)
    spacing = " x ".join("own" if mm is None else f"{mm:.3g}" for mm in setup.spacing_mm)
    patch = " x ".join(map(str, setup.patch_size))
    lines = [
        f"# {manifest.name}",
        "",
        f"{manifest.intended_use} Not for diagnosis or treatment.",
        "",
        f"- Segments: {', '.join(plan.labels.names)}",
        f"- Input channels: {', '.join(plan.channels)}",
        f"- Configuration: {manifest.configuration}, voxels of {spacing} mm, patches of {patch}",
        f"- Network: {setup.network.name} with {setup.network.features} features",
        f"- Licence of the weights: {manifest.licence}",
        "",
        "| Fold | Trained on | Validated on | Iterations | Seconds | Mean Dice |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, fold in sorted(manifest.folds.items()):
        dice = "not measured" if fold.dice is None else f"{fold.dice:.4f}"
        lines.append(
            f"| {number} | {fold.train_cases} cases | {fold.validation_cases} cases | {fold.iterations} | "
            f"{fold.seconds:.0f} | {dice} |"
        )
    lines += ["", "Use it with `medseg predict INPUT -m PACKAGE -o OUT`."]
    return "\n".join(lines) + "\n"
