import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from shared.errors import ProtocolError, StorageError
from shared.models.cnn import LungCTNet
from shared.records import Array, PatientItem, RecordStore, write_store
from shared.tasks.sampling import draw_records, poisson_sample
from shared.weights import pack, unpack


def item(key: int, records: int) -> PatientItem:
    return PatientItem(bytes([key]) * 16, {"value": np.full((records, 2), key, np.int16)})


def test_a_store_keeps_each_patient_whole(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", kind="k", patients=[item(9, 1), item(3, 4), item(5, 2)], attributes={"a": 1})
    reopened = RecordStore.open(tmp_path / "s")
    assert (len(reopened), reopened.kind, dict(reopened.attributes)) == (3, "k", {"a": 1})
    assert reopened.offsets.tolist() == [0, 4, 6, 7]
    assert [set(part.arrays["value"].ravel()) for part in reopened.items()] == [{3}, {5}, {9}]
    assert isinstance(reopened.arrays["value"], np.memmap)
    assert reopened.digest == store.digest


def test_the_order_of_a_hospitals_files_leaves_no_trace(tmp_path: Path) -> None:
    patients = [item(9, 1), item(3, 4)]
    digests = {
        write_store(tmp_path / name, kind="k", patients=order, attributes={}).digest
        for name, order in {"a": patients, "b": patients[::-1]}.items()
    }
    assert len(digests) == 1


def test_a_store_is_replaced_whole(tmp_path: Path) -> None:
    write_store(tmp_path / "s", kind="k", patients=[item(1, 3)], attributes={})
    write_store(tmp_path / "s", kind="k", patients=[item(2, 1)], attributes={})
    assert RecordStore.open(tmp_path / "s").keys[0, 0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("damage", ["offsets.npy", "value.npy", "store.json"])
def test_damage_is_one_clear_sentence(tmp_path: Path, damage: str) -> None:
    write_store(tmp_path, kind="k", patients=[item(1, 3)], attributes={})
    (tmp_path / damage).write_bytes(b"")
    with pytest.raises(StorageError, match="damaged"):
        RecordStore.open(tmp_path)


def as_version_1(folder: Path) -> None:
    """Describe a store as version 1 did: the values of its fields have a hash, and offsets and keys have none."""
    header = json.loads((folder / "store.json").read_bytes())
    fields = sorted(header.pop("files").keys() - {"offsets", "keys"})
    values = {name: hashlib.sha256(np.load(folder / f"{name}.npy").tobytes()).hexdigest() for name in fields}
    (folder / "store.json").write_text(json.dumps({**header, "format": 1, "arrays": values}))


@pytest.mark.parametrize("name", ["offsets", "keys", "value"])
def test_a_flipped_byte_anywhere_in_a_store_is_found(tmp_path: Path, name: str) -> None:
    write_store(tmp_path, kind="k", patients=[item(1, 3), item(2, 2)], attributes={})
    content = (tmp_path / f"{name}.npy").read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        (tmp_path / f"{name}.npy").write_bytes(flipped)
        with pytest.raises(StorageError, match="was changed after it was prepared"):
            RecordStore.open(tmp_path)


def test_a_store_of_version_1_opens_and_its_values_are_verified(tmp_path: Path) -> None:
    write_store(tmp_path, kind="k", patients=[item(1, 3), item(2, 2)], attributes={})
    as_version_1(tmp_path)
    assert [set(part.arrays["value"].ravel()) for part in RecordStore.open(tmp_path).items()] == [{1}, {2}]
    values = np.load(tmp_path / "value.npy")
    values[-1, -1] += 1
    np.save(tmp_path / "value.npy", values)
    with pytest.raises(StorageError, match="was changed"):
        RecordStore.open(tmp_path)


def test_a_store_of_version_1_with_a_damaged_file_header_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, kind="k", patients=[item(1, 3)], attributes={})
    as_version_1(tmp_path)
    content = (tmp_path / "keys.npy").read_bytes()
    (tmp_path / "keys.npy").write_bytes(content.replace(b"{", b"z"))
    with pytest.raises(StorageError, match="damaged"):
        RecordStore.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("offsets", np.array([0, 5, 0, 5])),  # two patients own the same records
        ("offsets", np.array([0, 3, 3, 5])),  # one owns none
        ("offsets", np.array([1, 3, 4, 5])),  # nobody owns the first
        ("offsets", np.array([0, 3, 4, 4])),  # nobody owns the last
        ("offsets", np.array([0, 3, 4, 6])),
        ("offsets", np.array([0, 3, 5])),
        ("offsets", np.array([0.0, 3.0, 4.0, 5.0])),
        ("offsets", np.array([[0, 3, 4, 5]])),
        ("keys", np.repeat(np.array([[1], [2], [1]], np.uint8), 16, axis=1)),  # one patient counts as two
        ("keys", np.repeat(np.array([[1], [2], [3]], np.uint8), 8, axis=1)),
        ("keys", np.repeat(np.array([[1], [2], [3]]), 16, axis=1)),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_an_index_that_does_not_give_each_record_one_patient_is_refused(
    tmp_path: Path, name: str, array: Array, version: int
) -> None:
    """Also where the hashes agree: version 1 states none of them, and anybody can state one."""
    write_store(tmp_path, kind="k", patients=[item(1, 3), item(2, 1), item(3, 1)], attributes={})
    np.save(tmp_path / f"{name}.npy", array)
    if version == 1:
        as_version_1(tmp_path)
    else:
        header = json.loads((tmp_path / "store.json").read_bytes())
        header["files"][name] = hashlib.sha256((tmp_path / f"{name}.npy").read_bytes()).hexdigest()
        (tmp_path / "store.json").write_text(json.dumps(header))
    with pytest.raises(StorageError, match="Run intake again"):
        RecordStore.open(tmp_path)


def test_stores_that_differ_in_any_file_have_different_digests(tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.int16).reshape(4, 2)
    stores: dict[str, list[tuple[int, Array]]] = {
        "first": [(1, values[:2]), (2, values[2:])],
        "other-offsets": [(1, values[:1]), (2, values[1:])],
        "other-keys": [(1, values[:2]), (3, values[2:])],
        "other-type": [(1, values[:2].view(np.uint16)), (2, values[2:].view(np.uint16))],
    }
    digests = {
        write_store(
            tmp_path / name,
            kind="k",
            patients=[PatientItem(bytes([key]) * 16, {"value": part}) for key, part in parts],
            attributes={},
        ).digest
        for name, parts in stores.items()
    }
    assert len(digests) == len(stores)


def test_a_missing_store_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Run intake first"):
        RecordStore.open(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="No patient"):
        write_store(tmp_path / "s", kind="k", patients=[], attributes={})


@pytest.mark.parametrize(
    "patients",
    [
        [item(1, 1), item(1, 1)],
        [item(1, 0)],
        [PatientItem(b"1" * 16, {"offsets": np.zeros(1)})],
        [PatientItem(b"short", {"value": np.zeros(1)})],
        [item(1, 1), PatientItem(b"2" * 16, {"other": np.zeros(1)})],
    ],
)
def test_inconsistent_patients_are_refused(tmp_path: Path, patients: list[PatientItem]) -> None:
    with pytest.raises(StorageError):
        write_store(tmp_path / "s", kind="k", patients=patients, attributes={})
    assert not (tmp_path / "s").exists()


def test_a_folder_that_cannot_be_made_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Check the path"):
        write_store(tmp_path / "file" / "s", kind="k", patients=[item(1, 1)], attributes={})


def test_a_subset_holds_the_chosen_patients_only(tmp_path: Path) -> None:
    store = write_store(tmp_path, kind="k", patients=[item(k, k) for k in (1, 2, 3)], attributes={})
    part = store.subset(np.array([0, 2]))
    assert part.offsets.tolist() == [0, 1, 4]
    assert part.arrays["value"][:, 0].tolist() == [1, 3, 3, 3]
    assert part.digest != store.digest


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_drawn_records_belong_to_their_patient(lengths: list[int], k: int, seed: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    patients = torch.arange(len(lengths))
    rows = draw_records(offsets, patients, k, Generator().manual_seed(seed))
    assert rows.shape == (len(lengths), k)
    assert (rows >= offsets[:-1, None]).all()
    assert (rows < offsets[1:, None]).all()


def test_every_record_of_a_patient_is_drawn_equally_often() -> None:
    rows = draw_records(np.array([0, 2, 5]), torch.tensor([1]), 30_000, Generator().manual_seed(0))
    counts = np.bincount(rows[0], minlength=5)
    assert counts[:2].tolist() == [0, 0]
    np.testing.assert_allclose(counts[2:] / 30_000, 1 / 3, atol=0.01)


def test_patients_join_independently_at_the_sample_rate() -> None:
    """Poisson sampling: a binomial number of patients, each equally often, pairs uncorrelated."""
    uniform = np.random.default_rng(0).random
    joined = torch.stack([torch.bincount(poisson_sample(6, 0.3, uniform), minlength=6) for _ in range(20_000)])
    assert joined.max() == 1
    frequency = joined.double().mean(0)
    torch.testing.assert_close(frequency, torch.full((6,), 0.3, dtype=torch.float64), atol=0.015, rtol=0)
    correlation = torch.corrcoef(joined.double().T) - torch.eye(6, dtype=torch.float64)
    assert correlation.abs().max() < 0.03
    assert (joined.sum(1) == 0).any()  # an empty step is ordinary


def test_everyone_joins_at_sample_rate_one() -> None:
    assert poisson_sample(5, 1.0, np.random.default_rng(0).random).tolist() == [0, 1, 2, 3, 4]


def test_weights_survive_packing() -> None:
    torch.manual_seed(0)
    first, second = LungCTNet(), LungCTNet()
    unpack(pack(first), second)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["short", "double", "nan", "inf"])
def test_weights_that_do_not_fit_are_refused(change: str) -> None:
    model = LungCTNet()
    vector: Any = pack(model)
    if change == "short":
        vector = vector[:-1]
    elif change == "double":
        vector = vector.astype(np.float64)
    else:
        vector[3] = float(change)
    with pytest.raises(ProtocolError):
        unpack(vector, model)
