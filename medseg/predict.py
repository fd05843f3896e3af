"""Prediction: a Predictor loaded once, and whole folders that survive bad cases and interruptions."""

from __future__ import annotations

import csv
import io as text_io
import json
import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medseg import io
from medseg.dataset import Case, Dataset
from medseg.engines import choose_device
from medseg.errors import InputError, MedsegError
from medseg.geometry import Geometry
from medseg.io import itk, nifti
from medseg.package import ModelPackage, load_package
from medseg.preprocess import prepare, restore
from medseg.progress import Progress, silent
from medseg.records import Record, digest_file, digest_of, write_json, write_text
from medseg.sliding_window import slabs
from medseg.volume import Mask, Volume

log = logging.getLogger(__name__)

JOURNAL, TABLE, RUN = "journal.jsonl", "cases.csv", "run.json"
_CHANNEL_FILE = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


class PredictSettings(Record):
    """Choices of the person who predicts.

    Attributes:
        device: as in training.
        mirror: average over mirrored images along the axes that the plan allows: two to eight times the work.
        overlap: fraction of a patch that neighbouring tiles share.
    """

    device: str = "auto"
    mirror: bool = False
    overlap: float = Field(default=0.5, ge=0, le=0.9)


class Prediction(Record):
    """What became of one case.

    Attributes:
        case: id.
        status: ``done``; ``kept`` from an earlier run with the same input, model and settings; or ``failed``.
        output: file name of the mask, empty for a failed case.
        reason: why it failed.
        seconds: spent on it.
        volumes_ml: volume of each class.
        warnings: what was odd about the input.
        key, output_digest: SHA-256 of what it was made from, and of the mask's file.
    """

    case: str
    status: Literal["done", "kept", "failed"]
    output: str = ""
    reason: str = ""
    seconds: float = 0.0
    volumes_ml: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    key: str = ""
    output_digest: str = ""


class Predictor:
    """A model in memory: call it with image after image. Spawns no process and prints nothing."""

    def __init__(self, package: ModelPackage, settings: PredictSettings | None = None) -> None:
        self.package = package
        self.settings = settings or PredictSettings()
        self.device = choose_device(self.settings.device)
        self._networks = [network.to(self.device) for network in package.networks()]

    def __call__(self, image: Any) -> Mask:
        """Segment an image.

        Args:
            image: a path (or a list of paths, one a channel), a nibabel image, a SimpleITK image, a MONAI MetaTensor
                (C, I, J, K) with its affine, or a tuple (array, affine) with an array (I, J, K) or (C, I, J, K) and a
                4x4 affine to RAS+ mm.

        Returns:
            The mask on the image's own grid, with label values as in the training data.

        Raises:
            InputError: the image cannot be used; with the reason.
        """
        return self.segment(_to_volume(image, len(self.package.plan.channels)))

    def segment(self, volume: Volume) -> Mask:
        """Segment a Volume; see ``__call__``."""
        plan, setup = self.package.plan, self.package.configuration
        ready = prepare(volume, plan, setup)
        finished = slabs(
            self._networks,
            ready.image,
            setup.patch_size,
            overlap=self.settings.overlap,
            mirror_axes=setup.mirror_axes if self.settings.mirror else (),
            device=self.device,
        )
        array = restore(finished, ready.trace, plan.labels)
        return Mask(array, volume.geometry, plan.labels, volume.paths, volume.header, volume.warnings)


def load(package: Path | str, **settings: Any) -> Predictor:
    """Load a model package (folder or zip) for prediction; ``settings`` are those of ``PredictSettings``.

    Raises:
        PackageError: the package is incomplete, altered or of another version.
        InputError: the device is not there, or a setting does not exist.
    """
    return Predictor(load_package(Path(package)), PredictSettings.checked(settings, "medseg.load"))


def find_cases(path: Path, channels: int) -> list[Case]:
    """The images to segment at a path.

    Args:
        path: an image file; a folder of images (one file a case, or files ``CASE_0000``, ``CASE_0001``, ... one a
            channel); or a dataset.json, or the folder that holds one, of which the test cases are taken.
        channels: of the model.

    Raises:
        InputError: nothing is found; with what was looked for.
    """
    listing = path / "dataset.json" if path.is_dir() else path
    if listing.name.endswith(".json") and listing.is_file():
        cases = list(Dataset.open(listing).test)
        if not cases:
            raise InputError(path, "lists no test cases", "a dataset.json with a test list", "give a folder of images")
        return cases
    if path.is_file():
        return [Case(io.name_of(path), (path,), None)]
    if not path.is_dir():
        raise InputError(path, "does not exist", "an image, a folder of images, or a dataset.json")
    files = sorted(p for p in path.iterdir() if io.suffix_of(p) and not p.name.startswith("."))
    cases = _group_channels(files, channels)
    if not cases:
        found = sum(1 for _ in path.iterdir())
        raise InputError(path, f"holds no image among its {found} entries", f"files ending in {' '.join(io.SUFFIXES)}")
    return cases


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[Prediction]:
    """Segment cases into a folder: one ``CASE.nii.gz`` each, ``cases.csv`` and ``run.json``.

    A case that fails is recorded with its reason, and the others are done. A case whose mask is there and was made from
    the same input, model and settings (by digest) is kept. A mask that was not written here is not replaced, unless
    ``overwrite`` says so.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = _read_journal(out / JOURNAL)
    results = []
    settings_key = digest_of([predictor.package.digest, predictor.settings.model_dump(mode="json", exclude={"device"})])
    for number, case in enumerate(cases, start=1):
        result = _predict_case(predictor, case, out, known.get(case.id), settings_key, overwrite)
        results.append(result)
        if result.status == "done":
            _append(out / JOURNAL, result)
        elif result.status == "failed":
            log.error("%s failed: %s", case.id, result.reason)
        progress("predicting", number / len(cases), f"{case.id} {result.status}")
    _write_run(out, results, predictor)
    return results


def _predict_case(
    predictor: Predictor, case: Case, out: Path, earlier: Prediction | None, settings_key: str, overwrite: bool
) -> Prediction:
    start = time.monotonic()
    target = out / f"{case.id}.nii.gz"
    try:
        key = digest_of([settings_key, *(digest_file(path) for path in case.images)])
        if target.exists() and any(target.samefile(path) for path in case.images):
            raise InputError(target, "is the input itself", "another output folder")
        if earlier is not None and earlier.key == key and _is_intact(target, earlier):
            return earlier.model_copy(update={"status": "kept"})
        if target.exists() and earlier is None and not overwrite:
            raise InputError(target, "exists and was not written by this run", "a free name", "use --overwrite")
        mask = predictor(list(case.images))
        for warning in mask.warnings:
            log.warning("%s: %s", case.id, warning)
        io.write_mask(mask, target)
        return Prediction(
            case=case.id,
            status="done",
            output=target.name,
            seconds=round(time.monotonic() - start, 3),
            volumes_ml={name: round(ml, 4) for name, ml in mask.volumes_ml().items()},
            warnings=mask.warnings,
            key=key,
            output_digest=digest_file(target),
        )
    except MedsegError as failure:
        reason = str(failure)
    except (OSError, MemoryError, RuntimeError) as failure:  # RuntimeError: what torch raises, out of memory too
        reason = f"{type(failure).__name__}: {failure}"
    return Prediction(case=case.id, status="failed", reason=reason, seconds=round(time.monotonic() - start, 3))


def _to_volume(image: Any, channels: int) -> Volume:
    if isinstance(image, str | Path):
        return io.read_volume(Path(image), channels)
    if isinstance(image, list):
        return io.read_volume([Path(path) for path in image], channels)
    if isinstance(image, tuple):
        array, affine = image
        volume = _from_array(np.asarray(array), affine)
    elif hasattr(image, "dataobj"):
        volume = nifti.from_nibabel(image)
    elif hasattr(image, "GetDirection"):
        volume = itk.from_simpleitk(image)
    elif hasattr(image, "affine"):  # MetaTensor
        volume = _from_array(image.detach().cpu().numpy(), image.affine)
    else:
        kinds = "a path, a nibabel or SimpleITK image, a MetaTensor or (array, affine)"
        raise InputError("image", f"is a {type(image).__name__}", kinds)
    if volume.array.shape[0] != channels:
        raise InputError("image", f"has {volume.array.shape[0]} channels", str(channels))
    return replace(volume, array=io.finite_float32(volume.array, "image"))


def _from_array(array: Any, affine: Any) -> Volume:
    array = array[np.newaxis] if array.ndim == 3 else array
    if array.ndim != 4:
        raise InputError("image", f"has shape {array.shape}", "(I, J, K) or (C, I, J, K)")
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise InputError("affine", "is no invertible 4x4 matrix", "voxel indices to RAS+ mm")
    return Volume(array, Geometry(array.shape[1:], matrix))


def _group_channels(files: Iterable[Path], channels: int) -> list[Case]:
    """Files as cases: by ``_0000`` endings where all have one, else one file a case (channels last inside)."""
    files = list(files)
    matches = [_CHANNEL_FILE.match(io.name_of(path)) for path in files]
    if not files or not all(matches):
        return [Case(io.name_of(path), (path,), None) for path in files]
    groups: dict[str, list[Path]] = {}
    for path, match in zip(files, matches, strict=True):
        if match is not None:
            groups.setdefault(match["case"], []).append(path)
    return [Case(name, tuple(paths), None) for name, paths in groups.items()]


def _is_intact(target: Path, earlier: Prediction) -> bool:
    try:
        return digest_file(target) == earlier.output_digest
    except OSError:
        return False


def _read_journal(path: Path) -> dict[str, Prediction]:
    """What earlier runs wrote, by case; a line that a kill cut short is passed over."""
    known = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            result = Prediction.checked(json.loads(line), path)
        except (ValueError, InputError):
            continue
        known[result.case] = result
    return known


def _append(path: Path, result: Prediction) -> None:
    """Add a line to the journal, on a line of its own even where a kill cut the last one short."""
    whole = not path.exists() or path.stat().st_size == 0 or path.read_bytes()[-1:] == b"\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(result.model_dump(mode="json")) + "\n")


def _write_run(out: Path, results: Sequence[Prediction], predictor: Predictor) -> None:
    text = text_io.StringIO(newline="")
    names = predictor.package.plan.labels.names
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", "status", "output", "seconds", *(f"{name}_ml" for name in names), "warnings", "reason"])
    for r in results:
        volumes = [r.volumes_ml.get(name, "") for name in names]
        table.writerow([r.case, r.status, r.output, r.seconds, *volumes, "; ".join(r.warnings), r.reason])
    write_text(out / TABLE, text.getvalue())
    summary = {
        "notice": "Research software, not a medical device.",
        "model": predictor.package.manifest.name,
        "model_digest": predictor.package.digest,
        "settings": predictor.settings.model_dump(mode="json"),
        "device": str(predictor.device),
        "cases": {status: sum(r.status == status for r in results) for status in ("done", "kept", "failed")},
    }
    write_json(out / RUN, summary)
