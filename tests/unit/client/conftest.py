"""A small hospital: writes DICOM series and annotations as a scanner's export would hold them."""

import copy
import csv
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

from client.intake.nodules import IntakeReport, prepare_nodules
from shared.records import RecordStore

SECRET = bytes(range(32))
COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm", "malignancy")
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass
class Export:
    """A hospital's export under ``root``, with its annotations beside it."""

    root: Path
    rows: list[Sequence[object]] = field(default_factory=list)

    @property
    def dicom(self) -> Path:
        return self.root / "dicom"

    @property
    def store(self) -> Path:
        return self.root / "store"

    def series(
        self,
        hounsfield,
        *,
        positions,
        patient="P-1",
        orientation=AXIAL,
        spacing=(1.0, 1.0),
        syntax=ExplicitVRLittleEndian,
        names=None,
        uid=None,
        edit: Callable[[Dataset, int], None] = lambda _dataset, _k: None,
    ) -> str:
        """Write ``(S, H, W)`` as one series, each slice at its position; return the series UID."""
        uid = uid or generate_uid()
        self.dicom.mkdir(parents=True, exist_ok=True)
        names = names or [f"{uid}-{k:03}.dcm" for k in range(len(hounsfield))]
        for k, (slice_hu, position, name) in enumerate(zip(hounsfield, positions, names, strict=True)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataset = ct_slice(slice_hu, uid, patient, position, orientation, spacing)
                edit(dataset, k)
            save(dataset, self.dicom / name, syntax)
        return uid

    def cube(self, *, count=8, side=48, interval=2.0, value=-400, **options) -> str:
        """Write a plain axial series from the origin on: x, y in [0, side), z in [0, count * interval)."""
        volume = np.full((count, side, side), value, np.int16)
        return self.series(volume, positions=[(0, 0, interval * k) for k in range(count)], **options)

    def annotate(self, uid, centre=(24.0, 24.0, 7.0), diameter=10, malignancy=5):
        self.rows.append((uid, *centre, diameter, malignancy))

    @property
    def annotations(self) -> Path:
        path = self.root / "annotations.csv"
        with path.open("w", newline="") as handle:
            csv.writer(handle).writerows([COLUMNS, *self.rows])
        return path

    def prepare(self, **options) -> tuple[IntakeReport, RecordStore]:
        report = prepare_nodules(self.dicom, self.annotations, self.store, SECRET, **options)
        return report, RecordStore.open(self.store)


def ct_slice(hounsfield, series_uid, patient, position, orientation, spacing) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series_uid, generate_uid(entropy_srcs=["study"])
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame", series_uid])
    dataset.Modality, dataset.Manufacturer = "CT", "SIEMENS"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientID, dataset.PatientName = patient, "Doe^Jane"
    dataset.Rows, dataset.Columns = hounsfield.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelSpacing, dataset.ImagePositionPatient = list(spacing), [round(float(x), 6) for x in position]
    dataset.ImageOrientationPatient = [round(float(x), 8) for x in orientation]
    dataset.PixelData = (np.asarray(hounsfield, np.int32) + 1024).astype(np.uint16).tobytes()
    return dataset


def save(dataset: Dataset, path: Path, syntax=ExplicitVRLittleEndian) -> None:
    """Write a Part 10 file; pydicom's own complaints about deliberately odd values are not the test's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = copy.deepcopy(dataset)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"  # overwritten by the data set's own if it has one
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if syntax.is_compressed and syntax.is_encapsulated:
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            plugin = "pydicom" if syntax == RLELossless else "pyjpegls"
            dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
        dataset.save_as(path, enforce_file_format=True)


@pytest.fixture
def export(tmp_path) -> Export:
    return Export(tmp_path)


@pytest.fixture
def save_slice() -> Callable[..., None]:
    return save
