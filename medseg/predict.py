"""Prediction: a Predictor loaded once, and whole folders that survive bad cases and interruptions."""

from __future__ import annotations

import csv
import glob
import io as text_io
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

import medseg
from medseg import io
from medseg.dataset import Case, Dataset
from medseg.engines import choose_device
from medseg.errors import InputError, MedsegError
from medseg.geometry import Geometry
from medseg.io import itk, nifti
from medseg.package import ModelPackage, load_package
from medseg.preprocess import prepare, restore
from medseg.progress import Progress, silent
from medseg.records import Record, digest_file, digest_of, write_bytes, write_json
from medseg.sliding_window import slabs
from medseg.volume import Mask, Volume

log = logging.getLogger(__name__)

JOURNAL, TABLE, RUN = "journal.jsonl", "cases.csv", "run.json"
_CHANNEL_FILE = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
_TWO_FILES = (".hdr", ".hdr.gz", ".img", ".img.gz", ".mhd")


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
        status: ``done``; ``kept`` from an earlier run with the same input, model and settings; ``failed``; and in the
            journal ``started``, after which a file under the mask's name is known to be from here.
        output: file name of the mask, empty for a failed case.
        reason: why it failed.
        seconds: spent on it.
        volumes_ml: volume of each class.
        warnings: what was odd about the input.
        key, output_digest: SHA-256 of what it was made from, and of the mask's file.
    """

    case: str
    status: Literal["started", "done", "kept", "failed"]
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


def find_cases(path: Path) -> list[Case]:
    """The images to segment at a path.

    Args:
        path: an image file; a folder of images (one file a case, or files ``CASE_0000``, ``CASE_0001``, ... one a
            channel; hidden files are passed over); or a dataset.json, or the folder that holds one, of which the test
            cases are taken.

    Raises:
        InputError: nothing is found, with what was looked for.
        DatasetError: the dataset.json cannot be used.
    """
    listing = path / "dataset.json" if path.is_dir() else path
    if listing.name.endswith(".json") and listing.is_file():
        return _listed_cases(listing)
    if not path.exists():
        raise InputError(path, "does not exist", "an image, a folder of images, or a dataset.json")
    if path.is_file() and io.suffix_of(path) is None:
        raise InputError(path, "has no known image ending", " ".join(io.SUFFIXES))
    files = [path] if path.is_file() else _images_in(path)
    if not files:
        inner = next((folder for folder in sorted(path.iterdir()) if folder.is_dir() and _images_in(folder)), None)
        found = f"holds no image among its {sum(1 for _ in path.iterdir())} entries"
        remedy = f"did you mean {inner}?" if inner else ""
        raise InputError(path, found, f"files ending in {' '.join(io.SUFFIXES)}", remedy)
    return _group_channels(files)


def mask_name(case: Case) -> str:
    """File name of a case's mask: ``CASE.png`` for a picture (``CASE.tif`` for a TIFF), else ``CASE.nii.gz``."""
    if not io.is_picture(case.images[0]):
        return f"{case.id}.nii.gz"
    is_tiff = io.suffix_of(case.images[0]) in (".tif", ".tiff")
    return f"{case.id}{'.tif' if is_tiff else '.png'}"


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[Prediction]:
    """Segment cases into a folder: one mask each, named by ``mask_name``, ``cases.csv`` and ``run.json``.

    A case that fails is recorded with its reason, and the others are done. A case whose mask is there and was made from
    the same input, model and settings (by digest) is kept. A mask that was not written here, or was changed since, is
    not replaced, unless ``overwrite`` says so.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = _read_journal(out / JOURNAL)
    settings = predictor.settings.model_dump(mode="json", exclude={"device"})
    model = digest_of([medseg.__version__, predictor.package.digest, settings])
    results = []
    for number, case in enumerate(cases, start=1):
        result = _predict_case(predictor, case, out, known.get(case.id), model, overwrite)
        results.append(result)
        if result.status == "failed":
            log.error("%s failed: %s", case.id, result.reason)
        progress("predicting", number / len(cases), f"{case.id} {result.status}")
    _write_run(out, results, predictor)
    return results


def _predict_case(
    predictor: Predictor, case: Case, out: Path, earlier: Prediction | None, model: str, overwrite: bool
) -> Prediction:
    """Segment one case, or say why not; ``model`` is the digest of all that masks depend on besides the image."""
    start = time.monotonic()
    target = out / mask_name(case)
    key = ""
    try:
        _require_one_image(case)
        key = digest_of([model, *_input_digests(case)])
        if earlier is not None and earlier.key == key and _is_intact(target, earlier):
            return earlier.model_copy(update={"status": "kept"})
        _require_free(target, case, earlier, overwrite)
        mask = predictor(list(case.images))
        for warning in mask.warnings:
            log.warning("%s: %s", case.id, warning)
        _append(out / JOURNAL, Prediction(case=case.id, status="started", key=key))
        io.write_mask(mask, target)
        result = Prediction(
            case=case.id,
            status="done",
            output=target.name,
            seconds=round(time.monotonic() - start, 3),
            volumes_ml={name: round(ml, 4) for name, ml in mask.volumes_ml().items()},
            warnings=mask.warnings,
            key=key,
            output_digest=digest_file(target),
        )
        _append(out / JOURNAL, result)
        return result
    except MedsegError as failure:
        reason = str(failure)
    except Exception as failure:  # whatever is wrong with one case, the others are done
        log.info("%s", case.id, exc_info=True)
        reason = f"{type(failure).__name__}: {failure}"
    if earlier is not None and key and earlier.key != key and _is_intact(target, earlier):
        target.unlink()  # a mask of the former input or model would be taken for this one's
    return Prediction(case=case.id, status="failed", reason=reason, seconds=round(time.monotonic() - start, 3))


def _require_one_image(case: Case) -> None:
    """Refuse ``a.nii`` beside ``a.nii.gz``: two images, or one in two formats, and nothing says which is meant."""
    if len({(path.parent, io.name_of(path)) for path in case.images}) < len(case.images):
        names = " and ".join(path.name for path in case.images)
        raise InputError(case.id, f"is the name of several images: {names}", "one image a case", "rename or remove one")


def _require_free(target: Path, case: Case, earlier: Prediction | None, overwrite: bool) -> None:
    """Refuse to write where there is a file that is not from here, or no longer as it was written.

    Raises:
        InputError: see above; or the id cannot name a file.
    """
    if Path(case.id).name != case.id:
        raise InputError(case.id, "cannot name a mask", "an id without slashes")
    if not target.exists():
        return
    if any(target.samefile(path) for path in case.images):
        raise InputError(target, "is the input itself", "another output folder")
    if overwrite or (earlier is not None and earlier.status == "started"):
        return
    if earlier is None:
        raise InputError(target, "exists and was not written here", "a free name", "move it away, or use --overwrite")
    if not _is_intact(target, earlier) and _is_mask(target):
        raise InputError(target, "was changed since it was written", "a free name", "move it away, or use --overwrite")


def _to_volume(image: Any, channels: int) -> Volume:
    if isinstance(image, str | os.PathLike):
        return io.read_volume(Path(image), channels)
    if isinstance(image, list) and image and all(isinstance(path, str | os.PathLike) for path in image):
        return io.read_volume([Path(path) for path in image], channels)
    volume = volume_of(image)
    if volume.array.shape[0] != channels:
        raise InputError("image", f"has {volume.array.shape[0]} channels", str(channels))
    return replace(volume, array=io.finite_float32(volume.array, "image"))


def volume_of(image: Any, where: str = "image") -> Volume:
    """An image in memory as a Volume, its voxels as they are; see ``Predictor.__call__`` for what is an image.

    ``where`` names the image in errors.

    Raises:
        InputError: it is none, or has no real numbers, no shape or no affine that an image can have.
    """
    if isinstance(image, tuple) and len(image) == 2:
        return _from_array(np.asarray(image[0]), image[1], where)
    if hasattr(image, "dataobj"):
        return nifti.from_nibabel(image)
    if hasattr(image, "GetDirection"):
        return itk.from_simpleitk(image)
    if hasattr(image, "affine"):  # MetaTensor
        return _from_array(image.detach().cpu().numpy(), image.affine, where)
    kinds = "a path, a list of paths, a nibabel or SimpleITK image, a MetaTensor, or (array, affine)"
    raise InputError(where, f"is a {type(image).__name__}", kinds)


def _from_array(array: Any, affine: Any, where: str) -> Volume:
    if array.dtype.kind not in "biuf":
        raise InputError(where, f"holds {array.dtype} voxels", "one real number a voxel and channel")
    array = array[np.newaxis] if array.ndim == 3 else array
    if array.ndim != 4:
        raise InputError(where, f"has shape {array.shape}", "(I, J, K) or (C, I, J, K)")
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise InputError(f"affine of the {where}", "is no invertible 4x4 matrix", "voxel indices to RAS+ mm")
    return Volume(array, Geometry(array.shape[1:], matrix))


def _listed_cases(listing: Path) -> list[Case]:
    dataset = Dataset.open(listing)
    missing = " ".join(fault.found for fault in dataset.faults if fault.kind == "missing-test")
    if not dataset.test:
        found = f"has no test case to segment {missing}".strip()
        raise InputError(listing, found, "a test list whose images are there", "give a folder of images")
    if missing:
        log.warning("%s", missing)
    return list(dataset.test)


def _images_in(folder: Path) -> list[Path]:
    """The images of a folder by name; of a pair of header and image the header; beside volumes no pictures."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    images = [path for path in files if io.suffix_of(path) and not _is_second_half(path)]
    volumes = [path for path in images if not io.is_picture(path)]
    if volumes and len(volumes) < len(images):  # previews, as many programs make them
        log.warning("%s: %d pictures beside volumes are passed over", folder, len(images) - len(volumes))
    return volumes or images


def _is_second_half(path: Path) -> bool:
    return io.suffix_of(path) in (".img", ".img.gz") and any(
        path.with_name(io.name_of(path) + ending).exists() for ending in (".hdr", ".hdr.gz")
    )


def _group_channels(files: Sequence[Path]) -> list[Case]:
    """Files as cases: one a channel where all names end in a number and some in ``_0000``, else one a case.

    Files of one name and several endings become one case, which is refused when its turn comes.
    """
    matches = [_CHANNEL_FILE.match(io.name_of(path)) for path in files]
    numbered = all(matches) and any(match["channel"] == "0000" for match in matches if match)
    groups: dict[str, list[Path]] = {}
    for path, match in zip(files, matches, strict=True):
        groups.setdefault(match["case"] if match and numbered else io.name_of(path), []).append(path)
    return [Case(name, tuple(paths), None) for name, paths in groups.items()]


def _input_digests(case: Case) -> Iterator[str]:
    """Digests of all files of a case, of images in two files both."""
    for path in case.images:
        if io.suffix_of(path) in _TWO_FILES:
            yield from (digest_file(part) for part in sorted(path.parent.glob(f"{glob.escape(io.name_of(path))}.*")))
        else:
            yield digest_file(path)


def _is_mask(path: Path) -> bool:
    try:
        io.read_mask(path)
    except InputError:
        return False
    return True


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
        reason = " ".join(r.reason.split())
        table.writerow([r.case, r.status, r.output, r.seconds, *volumes, "; ".join(r.warnings), reason])
    # a file name may hold bytes that are no text
    write_bytes(out / TABLE, text.getvalue().encode("utf-8", "backslashreplace"))
    summary = {
        "notice": "Research software, not a medical device.",
        "medseg": medseg.__version__,
        "model": predictor.package.manifest.name,
        "model_digest": predictor.package.digest,
        "settings": predictor.settings.model_dump(mode="json"),
        "device": str(predictor.device),
        "cases": {status: sum(r.status == status for r in results) for status in ("done", "kept", "failed")},
    }
    write_json(out / RUN, summary)
