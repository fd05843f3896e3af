"""ModelPackage: a trained model on disk. A folder, or the same folder in one zip, of JSON and safetensors.

Nothing in it is code and nothing is unpickled. ``package.json`` lists every file with its SHA-256 and is written last;
loading refuses a package with a missing or altered file.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor, nn

from medseg.errors import InputError, PackageError
from medseg.networks import build_network
from medseg.plan import Configuration, ConfigurationName, Plan
from medseg.records import Record, digest_of, replacing, write_bytes

R = TypeVar("R", bound=Record)
MANIFEST, PLAN, CARD = "package.json", "plan.json", "README.md"


class FoldRecord(Record):
    """How the weights of one fold came to be.

    Attributes:
        weights: name of the file in the package.
        seed: of its training.
        iterations: steps of training.
        seconds: time in training, all runs together.
        train_cases, validation_cases: how many.
        dice: mean Dice on the validation cases, if it was measured.
    """

    weights: str
    seed: int
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
        folds: by their number.
        files: name -> SHA-256 of every other file.
        versions: of medseg and the libraries that trained it.
        licence, intended_use: said on the card too.
    """

    name: str
    configuration: ConfigurationName
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
    digest: str

    @property
    def configuration(self) -> Configuration:
        """The configuration that the weights belong to."""
        return self.plan.configuration(self.manifest.configuration)

    def only(self, fold: int) -> ModelPackage:
        """The package with the weights of one fold alone, for predicting cases that this fold did not train on."""
        return replace(self, weights={fold: self.weights[fold]}, digest=digest_of([self.digest, fold]))

    def networks(self) -> list[nn.Module]:
        """One network a fold, with its weights, in evaluation mode.

        Raises:
            PackageError: the weights do not fit the plan's network.
        """
        networks = []
        for fold, weights in sorted(self.weights.items()):
            network = build_network(self.configuration, len(self.plan.channels), self.plan.labels.count)
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
    """Write a package; ``weights`` are safetensors files as bytes. The manifest comes last, so a crash leaves no half.

    Weight files are named by their content: those of an earlier package stay valid until the new manifest is there.
    """
    contents: dict[str, bytes] = {PLAN: _plan_bytes(plan)}
    named = {}
    for fold, content in weights.items():
        file = f"weights/fold_{fold}-{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
        contents[file] = content
        named[fold] = folds[fold].model_copy(update={"weights": file})
    contents[CARD] = _card(name, plan, configuration, named).encode()
    for file, content in contents.items():
        write_bytes(folder / file, content)
    files = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    manifest = Manifest(name=name, configuration=configuration, folds=dict(named), files=files, versions=dict(versions))
    manifest.save(folder / MANIFEST)
    for path in (folder / "weights").iterdir():
        if f"weights/{path.name}" not in files:
            path.unlink()
    return manifest


def load_package(path: Path) -> ModelPackage:
    """Load a package from a folder or a zip, verifying every file's digest.

    Raises:
        PackageError: there is no package, a file is missing or altered, the schema version is another, or weights hold
            values that are not finite.
    """
    files = _read_all(path)
    if MANIFEST not in files:
        raise PackageError(
            path, f"has no {MANIFEST}", "a model package", "give the folder that `medseg run` calls package"
        )
    manifest = _record(Manifest, files[MANIFEST], f"{path}/{MANIFEST}")
    for name, digest in manifest.files.items():
        if name not in files:
            raise PackageError(path, f"{name} is missing", "a complete package", "copy the package again")
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise PackageError(path, f"{name} was altered or damaged", "the digest in package.json", "copy it again")
    plan = _record(Plan, files[PLAN], f"{path}/{PLAN}")
    weights = {fold: _tensors(files[record.weights], record.weights) for fold, record in manifest.folds.items()}
    if not weights:
        raise PackageError(path, "holds no weights", "one fold at least")
    return ModelPackage(manifest, plan, weights, hashlib.sha256(files[MANIFEST]).hexdigest())


def zip_package(folder: Path, target: Path) -> None:
    """Put a package folder into one zip file (stored, not compressed: weights do not shrink)."""
    load_package(folder)
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(_read_all(folder).items()):
            archive.writestr(zipfile.ZipInfo(name), content)


def _read_all(path: Path) -> dict[str, bytes]:
    """Every file of a package by its name inside; a zip's members are read in memory, never unpacked to disk."""
    try:
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file()]
            return {p.relative_to(path).as_posix(): p.read_bytes() for p in found}
        with zipfile.ZipFile(path) as archive:
            return {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    except (OSError, zipfile.BadZipFile) as failure:
        raise PackageError(path, f"cannot be read: {failure}", "a package folder or zip") from None


def _record(kind: type[R], content: bytes, where: str) -> R:
    body: Any
    try:
        body = json.loads(content)
    except ValueError as failure:
        raise PackageError(where, f"is no JSON: {failure}") from None
    version = body.pop("schema_version", None) if isinstance(body, dict) else None
    if version != kind.schema_version:
        raise PackageError(
            where, f"has schema version {version}", str(kind.schema_version), "use the medseg that made it"
        )
    try:
        return kind.checked(body, where)
    except InputError as failure:
        raise PackageError(where, failure.found) from None


def _tensors(content: bytes, name: str) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as failure:
        raise PackageError(name, f"is no safetensors file: {failure}") from None
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise PackageError(name, f"weights {key} are not finite", "finite numbers", "train again")
    return tensors


def _plan_bytes(plan: Plan) -> bytes:
    return (
        json.dumps({"schema_version": plan.schema_version, **plan.model_dump(mode="json")}, indent=2) + "\n"
    ).encode()


def _card(name: str, plan: Plan, configuration: str, folds: Mapping[int, FoldRecord]) -> str:
    """The model card: what it is, on what it was trained, how well it did, what it is not for."""
    setup = plan.configuration(configuration)
    lines = [
        f"# {name}",
        "",
        "Research software, not a medical device. Not for diagnosis or treatment.",
        "",
        f"- Segments: {', '.join(plan.labels.names)}",
        f"- Input channels: {', '.join(plan.channels)}",
        f"- Configuration: {configuration}, voxels of {setup.spacing_mm} mm, patches of {setup.patch_size}",
        f"- Network: {setup.network.name} with {setup.network.features} features",
        "- Licence of the weights: as the training data allow",
        "",
        "| Fold | Trained on | Validated on | Iterations | Seconds | Mean Dice |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, fold in sorted(folds.items()):
        dice = "not measured" if fold.dice is None else f"{fold.dice:.4f}"
        lines.append(
            f"| {number} | {fold.train_cases} cases | {fold.validation_cases} cases | {fold.iterations} | "
            f"{fold.seconds:.0f} | {dice} |"
        )
    lines += ["", "Use it with `medseg predict INPUT -m PACKAGE -o OUT`."]
    return "\n".join(lines) + "\n"
