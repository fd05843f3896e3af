"""Convert: a mask in another format, its names kept, on the grid of the image that it belongs to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from medseg import io
from medseg.errors import InputError
from medseg.io import label_tables, nifti
from medseg.records import read_json
from medseg.volume import Labels, Mask, Volume

log = logging.getLogger(__name__)

ENDINGS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".dcm")
"""What a mask can become; ``.dcm`` is a DICOM SEG."""
_NAMED = (*nifti.SUFFIXES, ".seg.nrrd", ".dcm")
"""Endings of files that hold the names of labels beside their voxels."""


def convert(
    source: Path,
    target: Path,
    *,
    reference: Path | None = None,
    series: str = "",
    labels: Labels | None = None,
    kind: Literal["BINARY", "LABELMAP"] = "BINARY",
    allow_uncoded: bool = False,
    overwrite: bool = False,
) -> Mask:
    """Write a mask in the format of the target's ending.

    Args:
        source: a mask of any format that is read, a DICOM SEG among them, or a folder or zip that holds one.
        target: the new file; see ``ENDINGS``.
        reference: the image that the mask belongs to, whose grid it is brought onto; of a DICOM SEG the series.
        series: which of several series of a DICOM reference is meant; see ``dicom.select``.
        labels: names of the values; the mask's own otherwise. A mask with names of its own gets these values.
        kind: of a DICOM SEG.
        allow_uncoded: write a DICOM SEG of labels that no code is known for too.
        overwrite: replace the target, if it is there.

    Returns:
        The mask as it was written.

    Raises:
        InputError: a mask or reference that cannot be used, names that are not known where the format needs them, or a
            target that is there or has another ending.
        GeometryMismatch: the mask does not lie on the reference's grid, whichever way it is turned and cut.
    """
    ending = _ending(target)
    if target.exists() and not overwrite:
        raise InputError(target, "is there already", "a new file", "give another name, or --overwrite")
    if ending == ".dcm" and reference is None:
        expected = "a mask of the DICOM series that it belongs to"
        raise InputError(target, "a DICOM SEG lies on the slices of a series", expected, "name it with --reference")
    image = _image(reference, series, of_series=ending == ".dcm") if reference else None
    mask = io.read_mask(source, labels, image)
    if mask.labels is None and ending in (".dcm", ".seg.nrrd"):
        expected = "a name for each label"
        remedy = "give --labels: the labels.csv beside the masks, a model package, a dataset.json"
        raise InputError(source, f"does not name its labels, which {ending} needs", expected, remedy)
    if mask.labels is not None and ending not in _NAMED:
        log.warning("%s: a file ending in %s does not keep the names of labels", target, ending)
    if image is not None:
        mask = mask.placed(image.geometry)
    written = Mask(mask.array, mask.geometry, mask.labels, header=image and image.header)
    options = {"kind": kind, "allow_uncoded": allow_uncoded} if ending == ".dcm" else {}
    io.write_mask(written, target, **options)
    return written


def labels_at(place: Path) -> Labels:
    """The labels that a file or folder names, with codes where the name of the dataset or model tells what they mean.

    Args:
        place: a table of labels (see ``io.label_tables``), a ``dataset.json`` or the folder that holds one, or a model
            package, folder or zip.

    Raises:
        InputError, DatasetError, PackageError: it is none of these.
    """
    listing = place / "dataset.json" if place.is_dir() else place
    if listing.suffix == ".json" and listing.is_file():
        body = read_json(listing)
        return label_tables.labels_of_dataset(body, listing).coded(str(body.get("name", "")))
    if place.is_dir() or place.suffix == ".zip":
        from medseg.package import load_package

        package = load_package(place)
        return package.plan.labels.coded(package.manifest.name)
    return label_tables.read_labels_file(place)


def _ending(target: Path) -> str:
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if target.name.lower().endswith(ending):
            return ending
    raise InputError(target, "has no ending that a mask can be written with", " ".join(ENDINGS))


def _image(reference: Path, pattern: str, *, of_series: bool) -> Volume:
    """The image that a mask is brought to; by the headers where these suffice, its voxels 0 then."""
    if not io.is_dicom(reference):
        if of_series:
            raise InputError(reference, "is no DICOM series", "the folder or zip of one, for a DICOM SEG")
        return io.outline([reference]) or io.read_volume(reference)
    # a mask of a tilted or uneven series lies on the grid that it was read on, or is refused
    series = io.series(reference, pattern, resample_irregular=True)
    return io.outline([series]) or io.read_volume(series)
