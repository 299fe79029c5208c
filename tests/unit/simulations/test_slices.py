from pathlib import Path

import numpy as np
import pytest

from shared.errors import IntakeError
from shared.records import RecordStore
from shared.tasks.registry import find_task
from simulations.generators.slices import deal_slices, diameter_px, shrink


def disc(radius: float) -> np.ndarray:
    axis = np.arange(64) - 31.5
    return np.where(np.hypot(axis[:, None], axis) <= radius, 200, 0).astype(np.uint8)


def test_the_diameter_of_a_disc_is_its_diameter() -> None:
    np.testing.assert_allclose(diameter_px(np.stack([disc(5), disc(20)])), [10, 40], rtol=0.03)


def test_shrinking_keeps_the_mean_and_leaves_a_black_margin() -> None:
    patch = shrink(disc(20)[None])[0].astype(float)
    assert patch.shape == (36, 36)
    assert patch[:4].max() == patch[:, -4:].max() == 0.0
    assert patch[4:-4, 4:-4].mean() == pytest.approx(disc(20).mean() / 255, rel=0.02)


@pytest.mark.realdata
def test_real_slices_become_four_hospitals_of_whole_exams(real_data: Path, tmp_path: Path) -> None:
    folders = deal_slices(real_data / "nodule_slices" / "slices.npz", tmp_path, sites=4, seed=7)
    stores = [RecordStore.open(folder) for folder in folders]
    assert [len(store) for store in stores] == [93] * 4
    assert sum(int(store.offsets[-1]) for store in stores) == 3756
    keys = {key.tobytes() for store in stores for key in store.keys}
    assert len(keys) == 372
    task = find_task("nodule-classification")
    assert task.evaluate(task.build(), stores[0]).details["cases"] > 50


def test_a_file_that_is_no_archive_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"rubbish")
    with pytest.raises(IntakeError, match="no archive of nodule slices"):
        deal_slices(tmp_path / "x.npz", tmp_path / "out", sites=4, seed=0)
