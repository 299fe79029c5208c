"""Archives of real images, dealt to hospitals: whose records they become, and what each pixel is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import IntakeError
from shared.records import RecordStore
from shared.tasks.ct_nodules import is_upright
from shared.tasks.registry import find_task
from simulations.generators.archives import deal_archive

RATINGS = np.array([[1, 5], [2, 3], [3, 1], [4, 4]], np.uint8)


def write(path: Path, **fields: Any) -> Path:
    np.savez(path, **fields)
    return path


def cubes(**changes: Any) -> dict[str, Any]:
    """Four cubes whose voxels say where they lie; the malignancies are 5, 3 (undecided), 1 and 4."""
    z, y, x = np.meshgrid(*[np.arange(41)] * 3, indexing="ij")
    image = np.stack([(z * 1000 + y * 30 + x + number).astype(np.uint16) for number in range(4)])
    mask = np.broadcast_to((z - 20) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 <= 25, image.shape)
    names = np.array(["subtlety", "malignancy"])
    return {"image": image, "mask": mask, "ratings": RATINGS, "rating_names": names, **changes}


def xrays(**changes: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "train_images": generator.integers(0, 256, (9, 28, 28), np.uint8),
        "train_labels": np.arange(9)[:, None] % 2,
        "val_images": generator.integers(0, 256, (4, 28, 28), np.uint8),
        "val_labels": np.arange(4)[:, None] % 2,
        **changes,
    }


def test_a_cube_gives_a_slice_across_each_axis_and_an_undecided_one_none(tmp_path: Path) -> None:
    (folder,) = deal_archive(write(tmp_path / "x.npz", **cubes()), tmp_path / "out", sites=1, seed=0)
    store = RecordStore.open(folder)
    assert np.diff(store.offsets).tolist() == [3, 3, 3]
    assert sorted(store.arrays["malignant"][::3].tolist()) == [0, 1, 1]
    expected = cubes()["image"][0].astype(float) / 65_535
    inner = slice(2, 38)
    planes = [expected[20, inner, inner], expected[inner, 20, inner], expected[inner, inner, 20]]
    rows = min(range(0, 9, 3), key=lambda row: np.abs(store.arrays["image"][row] - planes[0]).max())
    np.testing.assert_allclose(store.arrays["image"][rows : rows + 3].astype(float), planes, atol=1e-3)
    np.testing.assert_allclose(store.arrays["diameter_mm"], 10.0, atol=0.5)


def test_x_rays_become_one_upright_patient_each_and_the_validation_part_is_held_out(tmp_path: Path) -> None:
    content = xrays()
    folders = deal_archive(write(tmp_path / "x.npz", **content), tmp_path / "out", sites=2, seed=0)
    stores = [RecordStore.open(folder) for folder in folders]
    apart = RecordStore.open(tmp_path / "out" / "heldout")
    assert [len(store) for store in (*stores, apart)] == [5, 4, 4]
    assert all(is_upright(store) for store in (*stores, apart))
    assert not {key.tobytes() for key in apart.keys} & {key.tobytes() for store in stores for key in store.keys}
    found = {
        (image.tobytes(), label) for image, label in zip(apart.arrays["image"], apart.arrays["malignant"], strict=True)
    }
    padded = (np.pad(content["val_images"], ((0, 0), (4, 4), (4, 4)), mode="edge") / 255.0).astype(np.float16)
    assert found == {(image.tobytes(), label) for image, label in zip(padded, (0, 1, 0, 1), strict=True)}


@pytest.mark.parametrize("task", ["ct-synthesis", "nodule-classification"])
def test_upright_images_are_not_turned_and_others_are(tmp_path: Path, task: str) -> None:
    """A ramp from top to bottom stays one, wherever it is cut and whatever its contrast."""
    ramp = np.broadcast_to(np.linspace(0, 255, 28).astype(np.uint8)[:, None], (9, 28, 28))
    (folder,) = deal_archive(write(tmp_path / "x.npz", **xrays(train_images=ramp)), tmp_path / "out", sites=1, seed=0)
    store = RecordStore.open(folder)

    def draw(store: RecordStore) -> torch.Tensor:
        return find_task(task).load(store).draw(torch.arange(9), 8, torch.Generator().manual_seed(0))["image"]

    images = draw(store)
    assert (images.diff(dim=-2) >= 0).all()
    assert (images.diff(dim=-1) == 0).all()
    lying = draw(replace(store, attributes={}))
    assert (lying.diff(dim=-2) < 0).any()
    assert (lying.diff(dim=-1) != 0).any()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"rubbish", "no archive of nodule slices, nodule cubes or chest X-rays"),
        ({"something": np.zeros(3)}, "lacks their fields"),
        (xrays(train_labels=np.zeros((3, 1))), "as many labels"),
        (xrays(val_images=np.zeros((4, 32, 32), np.uint8)), "28, 28"),
        (cubes(rating_names=np.array(["subtlety", "margin"])), "malignancy"),
        (cubes(mask=np.zeros((4, 3, 3, 3), bool)), "36 voxels"),
        (
            {"image": np.zeros((2, 8, 8)), "malignant": np.zeros(2), "exam": np.zeros(2), "nodule": np.zeros(2)},
            "64, 64",
        ),
        (cubes(), "3 patients, too few for 4"),
    ],
)
def test_an_archive_of_another_form_is_one_clear_sentence(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, **content)
    with pytest.raises(IntakeError, match=said):
        deal_archive(path, tmp_path / "out", sites=4, seed=0)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(IntakeError, match="not empty"):
        deal_archive(write(tmp_path / "x.npz", **xrays()), tmp_path / "out", sites=1, seed=0)


@pytest.mark.realdata
def test_real_slices_become_four_hospitals_of_whole_exams(real_data: Path, tmp_path: Path) -> None:
    folders = deal_archive(real_data / "nodule_slices" / "slices.npz", tmp_path, sites=4, seed=7)
    stores = [RecordStore.open(folder) for folder in folders]
    assert [len(store) for store in stores] == [93] * 4
    assert sum(int(store.offsets[-1]) for store in stores) == 3756
    keys = {key.tobytes() for store in stores for key in store.keys}
    assert len(keys) == 372
    task = find_task("nodule-classification")
    assert task.evaluate(task.build(), stores[0]).details["cases"] > 50


@pytest.mark.realdata
def test_real_cubes_and_x_rays_are_read_whole(real_data: Path, tmp_path: Path) -> None:
    cubes = deal_archive(real_data / "nodule_cubes" / "cubes.npz", tmp_path / "cubes", sites=4, seed=0)
    assert [len(RecordStore.open(folder)) for folder in cubes] == [13, 12, 12, 12]  # 19 of 68 are undecided
    archive = real_data / "pneumonia" / "pneumoniamnist_train_val.npz"
    (site,) = deal_archive(archive, tmp_path / "xrays", sites=1, seed=0)
    store, apart = RecordStore.open(site), RecordStore.open(tmp_path / "xrays" / "heldout")
    assert (len(store), len(apart)) == (4708, 524)
    assert int(apart.arrays["malignant"].sum()) == 389
