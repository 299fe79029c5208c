"""A real hospital's export, with folder names as they come: Lung-PET-CT-Dx, two series of 30 slices of 8 mm."""

import csv
import xml.etree.ElementTree as ET

import numpy as np
import pydicom
import pytest

from client.intake.nodules import prepare_nodules
from client.intake.rejects import RejectCode
from shared.records import RecordStore
from shared.tasks.ct_nodules import VENDORS

COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm", "malignancy")


def _rows(folder):
    """Turn the Pascal-VOC boxes (pixels, named by SOPInstanceUID) into rows with world coordinates."""
    headers = {}
    for path in folder.rglob("*.dcm"):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        headers[header.SOPInstanceUID] = header
    for path in sorted(folder.rglob("*.xml")):
        header = headers[path.stem]
        x, y, z = header.ImagePositionPatient
        row_mm, column_mm = header.PixelSpacing
        for box in ET.parse(path).iter("bndbox"):
            left, top, right, bottom = (int(box.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
            centre = x + (left + right) / 2 * column_mm, y + (top + bottom) / 2 * row_mm, z
            yield header.SeriesInstanceUID, *centre, (right - left) * column_mm, 5


@pytest.mark.realdata
def test_a_real_export_passes(real_data, tmp_path):
    folder = real_data / "ct_dicom"
    rows = list(_rows(folder))
    with (tmp_path / "annotations.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([COLUMNS, *rows])
    report = prepare_nodules(folder, tmp_path / "annotations.csv", tmp_path / "store", bytes(32))
    assert report.counts() == {
        "patients": 1,
        "records": 3 * len(rows),
        "nodules": len(rows),
        "files": 89,
        "rejected": {RejectCode.NOT_DICOM: 29},
    }
    store = RecordStore.open(tmp_path / "store")
    assert {VENDORS[v] for v in store.arrays["vendor"]} == {"Siemens"}
    # The tumour is in the middle: soft tissue, 0 to 100 HU, in windowed units 0.71 to 0.79.
    middles = np.asarray(store.arrays["image"][1::3, 16:20, 16:20], np.float32).mean(axis=(1, 2))
    assert np.median(middles) == pytest.approx(0.75, abs=0.04)
    assert middles.min() > 0.6
