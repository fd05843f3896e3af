from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dicoms
import numpy as np
import pydicom
import pytest

from medseg.geometry import Geometry
from medseg.io import dicom, dicom_seg
from medseg.volume import Labels, Mask

LABELS = Labels(values={"liver": 7, "left kidney": 300, "spleen": 400})


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(paths: Sequence[Path], geometry: Geometry) -> dicom.Series:
        headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
        monkeypatch.setattr(dicom, "headers", lambda _: headers)
        first = headers[0]
        uids = (first.SeriesInstanceUID, first.StudyInstanceUID, first.FrameOfReferenceUID)
        return dicom.Series(paths[0].parent, *uids, "", first.Modality, "", (), geometry, "int16", "")

    return made


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_that_labels_come_back_where_they_were(kind: Any, series: Any, tmp_path: Path) -> None:
    array = np.zeros((6, 5, 4), dtype=np.uint16)
    array[1, 2, 1], array[4, 0, 2] = 7, 300
    place = {"spacing": (0.7, 0.9, 2.5), "origin": (-10.5, 33.2, 12.1), "row": (0, 1, 0), "column": (0, 0, -1)}
    paths = dicoms.write_series(tmp_path, array.astype(np.int16), **place)  # type: ignore[arg-type]
    geometry = Geometry(array.shape, dicoms.affine_of(**place))  # type: ignore[arg-type]
    dicom_seg.write(Mask(array, geometry, LABELS, header=series(paths, geometry)), tmp_path / "s.dcm", kind=kind)
    mask = dicom_seg.read_mask(tmp_path / "s.dcm")
    assert mask.labels is not None
    assert mask.labels.values == {"liver": 1, "left kidney": 2, "spleen": 3}
    found = dicom_seg.matched(mask, geometry).array
    assert np.argwhere(found == 1).tolist() == [[1, 2, 1]]
    assert np.argwhere(found == 2).tolist() == [[4, 0, 2]]
    assert np.count_nonzero(found) == 2
