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
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

import safetensors
import safetensors.torch
from torch import Tensor, nn

from medseg.errors import InputError, PackageError, PlanError
from medseg.networks import build_network
from medseg.plan import Configuration, ConfigurationName, Plan
from medseg.quality import Ranges
from medseg.records import Record, digest_of, replacing, write_bytes, write_text

R = TypeVar("R", bound=Record)
MANIFEST, CARD = "package.json", "README.md"
MOST_COMPRESSED = 100
"""Times that a file of a package may be larger than in its zip: JSON is about ten, weights are one."""


class FoldRecord(Record):
    """How the weights of one fold came to be; None where that is not known, as of weights from another program.

    Attributes:
        weights: name of the file in the package.
        seed: of its training.
        precision: that the network was trained in: 32, bf16 or 16 bits.
        iterations: steps of training.
        seconds: time in training, all runs together.
        train_cases, validation_cases: how many.
        dice: mean Dice on the validation cases, if it was measured.
        source: the file of another program that the weights were taken from.
    """

    weights: str
    seed: int | None = None
    precision: str | None = "32"
    iterations: int | None = None
    seconds: float | None = None
    train_cases: int | None = None
    validation_cases: int | None = None
    dice: float | None = None
    source: str | None = None


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
        ranges: what the training cases are like, by which predicted ones are judged; None where that is not known.
        notes: what else whoever uses the model should know; on the card too.
        previous: of the earlier stage of a cascade, whose files are in the same package.
    """

    name: str
    configuration: ConfigurationName
    plan: str
    folds: dict[int, FoldRecord]
    files: dict[str, str]
    versions: dict[str, str]
    licence: str = "as the training data"
    intended_use: str = "Research. Not a medical device."
    ranges: Ranges | None = None
    notes: tuple[str, ...] = ()
    previous: Manifest | None = None


@dataclass(frozen=True)
class ModelPackage:
    """A loaded package.

    Attributes:
        manifest: its table of contents.
        plan: how images are prepared, and the network.
        weights: by fold, then by name.
        previous: the earlier stage of a cascade, whose masks the networks see beside the image.
        path: the folder or zip that it was loaded from.
    """

    manifest: Manifest
    plan: Plan
    weights: Mapping[int, Mapping[str, Tensor]]
    previous: ModelPackage | None = None
    path: Path | None = field(default=None, compare=False)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what decides the masks: configuration, plan and the weights that are here; of all stages."""
        names = [self.manifest.plan, *(self.manifest.folds[fold].weights for fold in sorted(self.weights))]
        parts = [self.manifest.configuration, *(self.manifest.files[name] for name in names)]
        return digest_of(parts if self.previous is None else [*parts, self.previous.digest])

    @property
    def configuration(self) -> Configuration:
        """The configuration that the weights belong to."""
        return self.plan.configuration(self.manifest.configuration)

    def only(self, fold: int) -> ModelPackage:
        """The package with the weights of one fold alone, for predicting cases that this fold did not train on.

        The earlier stage of a cascade is that of the same fold too: it was trained on the same cases.

        Raises:
            PackageError: there are no weights of that fold.
        """
        if fold not in self.weights:
            raise PackageError(self.manifest.name, f"has no fold {fold}", " or ".join(map(str, sorted(self.weights))))
        previous = self.previous and self.previous.only(fold)
        return replace(self, weights={fold: self.weights[fold]}, previous=previous)

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
    ranges: Ranges | None = None,
) -> Manifest:
    """Write a package; ``weights`` are safetensors files as bytes, one fold at least.

    The manifest comes last: until then a package that was in the folder before stays valid, and a crash leaves it so.
    A fold's Dice is that of its record, or else the one that was noted in the folder for the same weights.
    """
    said = {"name": name, "configuration": configuration, "folds": folds, "versions": versions, "ranges": ranges}
    return _written(folder, plan, *_packed_stage(Manifest(plan="", files={}, **said), plan, weights))


def write_package(package: ModelPackage, folder: Path) -> Manifest:
    """Write a package that is in memory, with the folds whose weights are there; as ``save_package`` does.

    Names of files and digests in its manifest are made anew. Of an earlier stage they are too.

    Raises:
        PackageError: weights hold values that are not finite.
    """
    return _written(folder, package.plan, *_packed(package))


def _packed(package: ModelPackage) -> tuple[Manifest, dict[str, bytes]]:
    """As ``_packed_stage``, of a package and those before it."""
    weights = {}
    for fold, tensors in package.weights.items():
        _refuse_infinite(tensors, f"fold {fold}")
        weights[fold] = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    manifest, contents = _packed_stage(package.manifest, package.plan, weights)
    if package.previous is None:
        return manifest, contents
    earlier, more = _packed(package.previous)
    return manifest.model_copy(update={"previous": earlier}), more | contents


def _packed_stage(manifest: Manifest, plan: Plan, weights: Mapping[int, bytes]) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest with names and digests of plan and weights, and these files by their name."""
    contents: dict[str, bytes] = {}

    def add(stem: str, suffix: str, content: bytes) -> str:
        name = f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
        contents[name] = content
        return name

    folds = {
        fold: manifest.folds[fold].model_copy(update={"weights": add(f"fold_{fold}", ".safetensors", content)})
        for fold, content in weights.items()
    }
    named = {"plan": add("plan", ".json", plan.as_json().encode()), "folds": folds}
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return manifest.model_copy(update={**named, "files": files}), contents


def _written(folder: Path, plan: Plan, manifest: Manifest, contents: Mapping[str, bytes]) -> Manifest:
    noted = _noted_dice(folder)
    folds = {
        fold: record if record.dice is not None else record.model_copy(update={"dice": noted.get(record.weights)})
        for fold, record in manifest.folds.items()
    }
    manifest = manifest.model_copy(update={"folds": folds})
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
    ((manifest, plan), *_), _ = _read(folder)
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
    stages, contents = _read(path)
    package = None
    for manifest, plan in reversed(stages):
        weights = {fold: _tensors(contents[record.weights], record.weights) for fold, record in manifest.folds.items()}
        package = ModelPackage(manifest, plan, weights, package, path)
    return cast(ModelPackage, package)  # there is one stage at least


def zip_package(folder: Path, target: Path) -> None:
    """Put a package folder into one zip file (stored, not compressed: weights do not shrink).

    Raises:
        PackageError: the folder holds no sound package.
    """
    ((manifest, plan), *_), contents = _read(folder)
    contents[CARD] = _card(manifest, plan).encode()
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(contents.items()):
            archive.writestr(zipfile.ZipInfo(name), content)


def _read(path: Path) -> tuple[list[tuple[Manifest, Plan]], dict[str, bytes]]:
    """Manifest and plan, of the last stage first, and every file that they need by its name: as its digest says."""
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


def _checked(path: Path, read: Callable[[str], bytes]) -> tuple[list[tuple[Manifest, Plan]], dict[str, bytes]]:
    try:
        contents = {MANIFEST: read(MANIFEST)}
    except (FileNotFoundError, KeyError):
        remedy = "give the folder that `medseg run` calls package"
        raise PackageError(path, f"has no {MANIFEST}", "a model package", remedy) from None
    manifest: Manifest | None = _record(Manifest, contents[MANIFEST], f"{path}/{MANIFEST}")
    stages = []
    while manifest is not None:
        stages.append((manifest, _checked_stage(path, manifest, contents, read)))
        manifest = manifest.previous
    return stages, contents


def _checked_stage(path: Path, manifest: Manifest, contents: dict[str, bytes], read: Callable[[str], bytes]) -> Plan:
    """The plan of a stage; its files are added to ``contents``."""
    if not manifest.folds:
        raise PackageError(path, "holds no weights", "one fold at least")
    for name in (manifest.plan, *(record.weights for record in manifest.folds.values())):
        contents[name] = _verified(path, name, manifest.files.get(name), read)
    plan = _record(Plan, contents[manifest.plan], f"{path}/{manifest.plan}")
    try:
        configuration = plan.configuration(manifest.configuration)
    except PlanError as failure:
        raise PackageError(path, failure.found, failure.expected) from None
    earlier = manifest.previous and manifest.previous.configuration
    if configuration.previous != earlier:
        raise PackageError(path, f"has {earlier} before {manifest.configuration}", f"{configuration.previous}")
    return plan


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
    _refuse_infinite(tensors, name)
    return tensors


def _refuse_infinite(tensors: Mapping[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise PackageError(where, f"weights {key} are not finite", "finite numbers", "train again")


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
        *(f"- {note}" for note in [*_after(manifest), *manifest.notes]),
        "",
        "| Fold | Trained on | Validated on | Iterations | Seconds | Mean Dice |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, fold in sorted(manifest.folds.items()):
        dice = "not measured" if fold.dice is None else f"{fold.dice:.4f}"
        cells = [
            _or_unknown(fold.train_cases, " cases"),
            _or_unknown(fold.validation_cases, " cases"),
            _or_unknown(fold.iterations),
            _or_unknown(fold.seconds),
        ]
        lines.append(f"| {number} | {' | '.join(cells)} | {dice} |")
    lines += ["", "Use it with `medseg predict INPUT -m PACKAGE -o OUT`."]
    return "\n".join(lines) + "\n"


def _or_unknown(number: float | None, unit: str = "") -> str:
    return "not known" if number is None else f"{number:.0f}{unit}"


def _after(manifest: Manifest) -> list[str]:
    return [f"A second stage: it sees the masks of {manifest.previous.configuration}"] if manifest.previous else []
