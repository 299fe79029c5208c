"""The prepared store: what intake writes and training reads; one item per patient.

Format (version 2). A folder of plain NumPy files, readable without Fedward, pydicom or torch:

    store.json     {"format": 2, "kind", "patients", "records", "attributes": {...}, "files": {name: sha256}}
    offsets.npy    int64 (P + 1,): patient p owns the records offsets[p] to offsets[p + 1] of every array
    keys.npy       uint8 (P, 16): keyed hash of the hospital's patient identifier (see client.intake)
    <name>.npy     any dtype, (R, ...): one array per field, memory-mapped when read

``files`` has the SHA-256 of every file ``<name>.npy``, offsets and keys too. So ``store.json`` binds the whole content,
and with it the store's digest. Version 1 is still read: its ``arrays`` has the SHA-256 of the fields' values only.

``attributes`` hold public facts about the preparation (voxel spacing, window) and nothing of any patient.
The number of patients is sensitive: the store stays in the hospital.

A hospital's folder holds one store of each kind, ``stores/KIND/``. A folder of an earlier version has one store only,
``store/``, which counts as the store of the kind that it states.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from shared.errors import StorageError
from shared.files import storage_errors, sync_directory, write_atomic
from shared.provenance.bounded import is_bare, parse_json

FORMAT = 2
_FIELDS_HASHED = 1  # the format that states no hash of offsets and keys
_INDEX = frozenset({"offsets", "keys"})
_CHUNK = 2**20
KEY_BYTES = 16
STORES, _SINGLE = "stores", "store"
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PatientItem:
    """One patient's records.

    Attributes:
        key: ``KEY_BYTES`` bytes that stand for the patient inside this hospital only.
        arrays: Field name to array ``(records, ...)``; all of the same, positive length.
    """

    key: bytes
    arrays: Mapping[str, Array]


@dataclass(frozen=True)
class RecordStore:
    """A prepared store, opened read-only and memory-mapped.

    Attributes:
        kind: What was prepared, e.g. ``ct-nodules``; a task states the kind it reads.
        attributes: Public facts about the preparation.
        offsets: ``(P + 1,)`` first record of each patient.
        keys: ``(P, 16)`` pseudonyms.
        arrays: Field name to array ``(R, ...)``.
        digest: SHA-256 of the store's description, which names every file's own hash.
    """

    kind: str
    attributes: Mapping[str, Any]
    offsets: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint8]
    arrays: Mapping[str, Array]
    digest: str

    def __len__(self) -> int:
        """Return the number of patients."""
        return len(self.offsets) - 1

    @cached_property
    def patient_of_record(self) -> npt.NDArray[np.int64]:
        """``(R,)`` index of the patient who owns each record."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @classmethod
    def open(cls, path: Path) -> "RecordStore":
        """Open the store at ``path``, and verify the hashes that it states.

        Raises:
            StorageError: If there is no store there, or it is of another format or damaged, or was changed.
        """
        try:
            text = (path / "store.json").read_bytes()
            header = parse_json(text, f"The prepared store at {path}")
            if header["format"] not in (FORMAT, _FIELDS_HASHED):
                raise StorageError(f"{path} has store format {header['format']}, this version reads {FORMAT}.")
            arrays = _verified(path, header)
            offsets, keys = np.array(arrays.pop("offsets")), np.array(arrays.pop("keys"))
            kind, attributes = str(header["kind"]), dict(header["attributes"])
            _check_index(offsets, keys, header, arrays)
        except FileNotFoundError as error:
            raise StorageError(f"{path} holds no prepared store. Run intake first.") from error
        except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, SyntaxError, TokenError) as error:
            raise StorageError(
                f"The prepared store at {path} is damaged, or was changed after it was prepared. Run intake again."
            ) from error
        return cls(kind, attributes, offsets, keys, arrays, hashlib.sha256(text).hexdigest())

    def subset(self, patients: npt.NDArray[np.int64]) -> "RecordStore":
        """Return an in-memory store of the given patients, in the given order."""
        rows = [np.arange(self.offsets[p], self.offsets[p + 1]) for p in patients]
        index = np.concatenate(rows) if rows else np.empty(0, np.int64)
        return RecordStore(
            kind=self.kind,
            attributes=self.attributes,
            offsets=np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64),
            keys=self.keys[patients],
            arrays={name: np.asarray(array[index]) for name, array in self.arrays.items()},
            digest=hashlib.sha256(self.digest.encode() + self.keys[patients].tobytes()).hexdigest(),
        )

    def items(self) -> Iterable[PatientItem]:
        """Yield each patient's records."""
        for p in range(len(self)):
            rows = slice(self.offsets[p], self.offsets[p + 1])
            yield PatientItem(self.keys[p].tobytes(), {n: a[rows] for n, a in self.arrays.items()})


def _verified(path: Path, header: Mapping[str, Any]) -> dict[str, Array]:
    """Return every array of a store, memory-mapped, offsets and keys too.

    Raises:
        ValueError: If one has another hash than the header states, or a name that is none.
        OSError, EOFError: If one cannot be read.
    """
    older = header["format"] == _FIELDS_HASHED
    hashes = dict(header["arrays" if older else "files"])
    if not all(map(is_bare, hashes)) or older != _INDEX.isdisjoint(hashes):
        raise ValueError
    if not older:  # before NumPy interprets a byte of them
        for name, stated in hashes.items():
            with (path / f"{name}.npy").open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != stated:
                    raise ValueError
    arrays: dict[str, Array] = {n: np.load(path / f"{n}.npy", mmap_mode="r") for n in _INDEX | hashes.keys()}
    if older and any(_values_digest(arrays[name]) != stated for name, stated in hashes.items()):
        raise ValueError
    return arrays


def _values_digest(array: Array) -> str:
    """Return the SHA-256 of an array's values in C order, a few at a time."""
    found, step = hashlib.sha256(), max(1, _CHUNK // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        found.update(array[start : start + step].tobytes())
    return found.hexdigest()


def _check_index(offsets: Array, keys: Array, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Check that every record belongs to one patient, and every patient has records and a key of their own.

    The bound on one patient's share in a step holds only then.

    Raises:
        ValueError: If not.
    """
    patients, records = header["patients"], header["records"]
    good = (
        offsets.dtype == np.int64
        and offsets.shape == (patients + 1,)
        and keys.dtype == np.uint8
        and keys.shape == (patients, KEY_BYTES)
        and patients > 0
        and (offsets[0], offsets[-1]) == (0, records)
        and bool((offsets[1:] > offsets[:-1]).all())
        and len(np.unique(keys, axis=0)) == patients
        and all(len(array) == records for array in arrays.values())
    )
    if not good:
        raise ValueError


def store_path(folder: Path, kind: str) -> Path:
    """Return where the store of a kind belongs in a hospital's folder."""
    return folder / STORES / kind


def stores_in(folder: Path) -> dict[str, Path]:
    """Return the stores in a hospital's folder by kind; that of an earlier version only where no newer one is.

    A store of an earlier version that does not state its kind is damaged; it stands under "".
    """
    found = {}
    if (folder / _SINGLE).exists():
        found[_kind_of(folder / _SINGLE)] = folder / _SINGLE
    paths = sorted((folder / STORES).glob("[!.]*"))
    return found | {path.name: path for path in paths if path.is_dir()}


def open_store(folder: Path, kind: str) -> RecordStore:
    """Open the store of a kind in a hospital's folder. Raises StorageError if there is none, or it is damaged."""
    stores = stores_in(folder)
    store = RecordStore.open(stores.get(kind) or stores.get("") or store_path(folder, kind))
    if store.kind != kind:
        raise StorageError(f"The store in {STORES}/{kind} of {folder} holds {store.kind}. Run intake again.")
    return store


def find_store(folder: Path, kind: str) -> Path:
    """Return a prepared store: the folder itself, or a site's store of ``kind``, or of the only kind it has.

    Raises:
        StorageError: If there are only others.
    """
    if (folder / "store.json").exists():
        return folder
    found = stores_in(folder)
    if kind not in found and len(found) != 1:
        raise StorageError(f"{folder} holds no prepared store of kind {kind}. Run intake first.")
    return found.get(kind) or next(iter(found.values()))


def _kind_of(path: Path) -> str:
    try:
        return str(json.loads((path / "store.json").read_bytes())["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def write_store(
    path: Path, *, kind: str, patients: Iterable[PatientItem], attributes: Mapping[str, Any]
) -> RecordStore:
    """Write a store atomically: ``path`` appears complete or not at all; an older store there is replaced.

    Patients are stored in the order of their keys, so the order of a hospital's files leaves no trace.

    Raises:
        StorageError: If ``patients`` is empty or inconsistent, or the folder cannot be written.
    """
    ordered = sorted(patients, key=lambda item: item.key)
    if not ordered:
        raise StorageError(f"No patient to store at {path}: every one was rejected or there was none.")
    lengths = [_record_count(item) for item in ordered]
    names = sorted(ordered[0].arrays)
    if len({item.key for item in ordered}) != len(ordered) or any(sorted(i.arrays) != names for i in ordered):
        raise StorageError("Patients must have distinct keys and the same fields.")
    if not _INDEX.isdisjoint(names):
        raise StorageError("A field of a patient cannot be called offsets or keys.")
    content = {name: np.concatenate([item.arrays[name] for item in ordered]) for name in names}
    content["offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    content["keys"] = np.frombuffer(b"".join(item.key for item in ordered), np.uint8).reshape(-1, KEY_BYTES)
    header = {
        "format": FORMAT,
        "kind": kind,
        "patients": len(ordered),
        "records": sum(lengths),
        "attributes": dict(attributes),
    }
    with storage_errors(path):
        _replace_folder(path, content, header)
    return RecordStore.open(path)


def _record_count(item: PatientItem) -> int:
    counts = {len(array) for array in item.arrays.values()}
    if len(item.key) != KEY_BYTES or len(counts) != 1 or 0 in counts:
        raise StorageError(f"A patient needs a {KEY_BYTES}-byte key and equally many records in every field.")
    return counts.pop()


def _replace_folder(path: Path, content: Mapping[str, Array], header: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(mode=0o700)
        files = {name: _save(temporary / f"{name}.npy", array) for name, array in content.items()}
        write_atomic(
            temporary / "store.json", json.dumps({**header, "files": files}, indent=1, sort_keys=True).encode()
        )
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, half a store would keep it full
    sync_directory(path.parent)


class _Writer:
    """What ``np.save`` may only write to: to a real file it writes by itself and loses the system's reason."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self.digest = handle, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._handle.write(content)


def _save(path: Path, array: Array) -> str:
    """Write an array durably; return the SHA-256 of its file."""
    with path.open("wb") as handle:
        writer = _Writer(handle)
        np.lib.format.write_array(writer, array, allow_pickle=False)
        handle.flush()
        os.fsync(handle.fileno())
    return writer.digest.hexdigest()
