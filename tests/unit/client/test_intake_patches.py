"""Where things are: Hounsfield units, order of slices, and a ball whose place in the patient is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from client.intake.patches import StackGeometry, plan_patches
from shared.tasks.ct_nodules import STORED_PX, VENDORS

BALL_MM = np.array([13.0, -21.5, 104.0])
RADIUS_MM = 4.0
ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "feet first, prone": (-1, 0, 0, 0, -1, 0),
    "turned": (0, 1, 0, -1, 0, 0),
    "flipped": (1, 0, 0, 0, -1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (0.8, 0.6, 0, -0.48, 0.64, 0.6),
}


def _ball(orientation, spacing, interval, tilt=0.0):
    """Return a volume of 64³ voxels around a bright ball, and each slice's position; the plane equation as is."""
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    step = (np.cross(row, column) + tilt * column) * interval
    count = int(60 / interval)
    first = BALL_MM - row * 28.3 * spacing[1] - column * 33.6 * spacing[0] - step * (count / 2 + 0.3)
    positions = first + np.arange(count)[:, None] * step
    j, i = np.mgrid[:64, :64]
    plane = i[..., None] * row * spacing[1] + j[..., None] * column * spacing[0]
    distance = np.linalg.norm(positions[:, None, None] + plane - BALL_MM, axis=-1)
    # A soft edge of 1 mm, as the scanner's own resolution gives.
    return (1000 * np.clip(RADIUS_MM + 0.5 - distance, 0, 1) - 900).astype(np.int16), positions


def _centroid(patch):
    weight = np.asarray(patch, np.float64) - patch.min()
    return np.array([(weight * axis).sum() / weight.sum() for axis in np.mgrid[:STORED_PX, :STORED_PX]])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_ball_at_a_known_place_ends_in_the_centre(export, name, reverse):
    volume, positions = _ball(ORIENTATIONS[name], spacing=(0.7, 0.9), interval=1.1)
    if reverse:
        volume, positions = volume[::-1], positions[::-1]
    uid = export.series(volume, positions=positions, orientation=ORIENTATIONS[name], spacing=(0.7, 0.9))
    export.annotate(uid, BALL_MM)
    _, store = export.prepare()
    for patch in store.arrays["image"]:
        np.testing.assert_allclose(_centroid(patch), (STORED_PX - 1) / 2, atol=0.3)
    areas = ((np.asarray(store.arrays["image"], np.float64) * 1400 - 100) / 1000).sum(axis=(1, 2))
    np.testing.assert_allclose(areas, np.pi * (RADIUS_MM**2 - np.array([4, 0, 4])), rtol=0.05)


def test_a_tilted_gantry_shears_nothing(export):
    volume, positions = _ball(ORIENTATIONS["axial"], (0.8, 0.8), 1.5, tilt=0.4)
    export.annotate(export.series(volume, positions=positions, spacing=(0.8, 0.8)), BALL_MM)
    _, store = export.prepare()
    for patch in store.arrays["image"]:
        np.testing.assert_allclose(_centroid(patch), (STORED_PX - 1) / 2, atol=0.3)


def test_left_and_back_stay_where_they_are(export):
    """Columns of a patch run to the patient's left, rows to the back, patches to the head."""
    z, y, x = np.mgrid[:8, :48, :48]
    export.annotate(export.series(x * 10 - 500, positions=[(0, 0, 2 * k) for k in range(8)]))
    export.annotate(export.series(y * 10 - 500, positions=[(0, 0, 2 * k) for k in range(8)]), (24, 24, 7.1))
    export.annotate(export.series(z * 20 - 500, positions=[(0, 0, 2 * k) for k in range(8)]), (24, 24, 7.2))
    _, store = export.prepare()
    images = np.asarray(store.arrays["image"], np.float64).reshape(3, 3, STORED_PX, STORED_PX) * 1400
    steps = {tuple(np.round([np.diff(image, axis=axis).mean() for axis in range(3)])) for image in images}
    assert steps == {(20, 0, 0), (0, 10, 0), (0, 0, 10)}


@pytest.mark.parametrize(("hounsfield", "value"), [(-2000, 0), (-1000, 0), (-300, 0.5), (400, 1), (3000, 1)])
def test_hounsfield_golden(export, hounsfield, value):
    """Stored values are rescaled by each slice's own slope and intercept, then windowed to [-1000, 400]."""

    def rescaled(dataset, k):
        slope = 2 + k % 2
        stored = np.full((48, 48), (hounsfield + 3000) / slope)
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, -3000
        dataset.PixelData = stored.astype(np.uint16).tobytes()

    export.annotate(export.cube(edit=rescaled))
    _, store = export.prepare()
    np.testing.assert_allclose(store.arrays["image"][:, 12:24, 12:24], value, atol=2e-3)
    assert store.arrays["image"].dtype == np.float16


def test_signed_pixels(export):
    def signed(dataset, _k):
        dataset.PixelRepresentation, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = np.full((48, 48), -300, np.int16).tobytes()

    export.annotate(export.cube(edit=signed))
    _, store = export.prepare()
    np.testing.assert_allclose(store.arrays["image"], 0.5, atol=1e-3)


def test_the_order_of_slices_is_not_their_names(export):
    z, _, _ = np.mgrid[:8, :48, :48]
    names = [f"{k}.dcm" for k in (3, 7, 1, 0, 6, 2, 5, 4)]
    export.annotate(export.series(z * 100 - 800, positions=[(0, 0, 2 * k) for k in range(8)], names=names))
    _, store = export.prepare()
    middle = np.asarray(store.arrays["image"][:, 18, 18], np.float64) * 1400 - 1000
    np.testing.assert_allclose(middle, [-550, -450, -350], atol=1)


def test_uneven_slices_are_interpolated_at_their_true_places(export):
    places = np.array([0, 2, 4, 6.5, 8, 10.9, 12])
    export.annotate(
        export.series(np.repeat(places, 48 * 48).reshape(7, 48, 48) * 50 - 800, positions=[(0, 0, p) for p in places])
    )
    _, store = export.prepare()
    middle = np.asarray(store.arrays["image"][:, 18, 18], np.float64) * 1400 - 1000
    np.testing.assert_allclose(middle, np.array([5, 7, 9]) * 50 - 800, atol=1)


def test_beyond_the_volume_there_is_air(export):
    uid = export.cube(value=400)
    export.annotate(uid, (2.0, 24.0, 14.0))
    _, store = export.prepare()
    image = np.asarray(store.arrays["image"])
    assert (image[:, 10, :13] == 0).all()  # x from -15.5 to -2.6 mm: air
    assert (image[:, 10, 14:] == 1).all()  # within EDGE_MM of the face, or inside
    assert image[2, 18, 20] == 1  # 2 mm above the last slice: that slice again


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        JPEGLSLossless,
        RLELossless,
    ],
    ids=lambda syntax: syntax.name,
)
def test_transfer_syntaxes_give_the_same_pixels(export, syntax):
    z, y, x = np.mgrid[:8, :48, :48]
    volume = z * 40 + y * 7 - x * 5 - 500

    def big_endian(dataset, _k):
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()

    positions = [(0, 0, 2 * k) for k in range(8)]
    export.annotate(export.series(volume, positions=positions, syntax=syntax, edit=big_endian))
    report, store = export.prepare()
    assert report.rejected == {}
    offsets = np.arange(STORED_PX) - (STORED_PX - 1) / 2
    expected = 40 * 3.5 + 7 * (24 + offsets[:, None]) - 5 * (24 + offsets[None]) - 500
    np.testing.assert_allclose(np.asarray(store.arrays["image"][1], np.float64) * 1400 - 1000, expected, atol=1)


@pytest.mark.parametrize(
    ("manufacturer", "vendor"),
    [
        ("GE MEDICAL SYSTEMS", "GE"),
        ("SIEMENS", "Siemens"),
        ("Siemens Healthineers", "Siemens"),
        ("Philips", "Philips"),
        ("TOSHIBA", "Toshiba"),
        ("Canon Medical Systems", "Toshiba"),
        ("Genericon", "other"),
        ("", "other"),
    ],
)
def test_vendors(export, manufacturer, vendor):
    export.annotate(export.cube(edit=lambda d, _k: setattr(d, "Manufacturer", manufacturer)))
    _, store = export.prepare()
    assert [VENDORS[v] for v in store.arrays["vendor"]] == [vendor] * 3


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)),
    interval=st.floats(0.5, 5),
)
def test_voxels_and_points_are_inverse(angles, spacing, interval):
    from scipy.spatial.transform import Rotation  # noqa: PLC0415

    axes = Rotation.from_euler("xyz", angles).as_matrix()
    geometry = StackGeometry(np.array([5.0, -7, 90]), axes, np.arange(40) * interval, spacing, (60, 70))
    voxel = np.array([[20.0, 30.5, 33.25], [0, 0, 0], [39, 59, 69]])
    points = geometry.origin_mm + voxel * geometry.voxel_mm @ axes.T
    along = geometry.along_axes(points)
    np.testing.assert_allclose(geometry.voxels(along), voxel, atol=1e-6)
    assert (geometry.beyond_faces_mm(along) < 0).all()
    plan = plan_patches(geometry, tuple(points[0]))
    assert plan.index[:, ~plan.air].min() >= 0
