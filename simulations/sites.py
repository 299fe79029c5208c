"""Site folders for a simulation: raw hospitals → prepared stores → training patients and held-out patients."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from client.config import SitePolicy
from client.folder import open_books
from shared.drafting import DELTA_SHARE
from shared.errors import FederationError, IntakeError, StorageError
from shared.files import write_atomic
from shared.provenance.bounded import parse_json
from shared.provenance.keys import SIGNING_PUB, public_line
from shared.records import RecordStore, find_store, open_store, store_path, stores_in, write_store
from shared.tasks.cgm_windows import SITE
from shared.tasks.registry import find_task
from simulations.sources import Progress, Source, find_source, keys_beside

HELDOUT_SHARE = 0.2
_COARSE = 10


@dataclass(frozen=True)
class Federation:
    """A simulation's prepared hospitals.

    Attributes:
        names: Site names.
        declared_patients: Their public numbers of patients.
        folder: Holds ``sites/NAME`` and ``heldout``.
    """

    names: tuple[str, ...]
    declared_patients: tuple[int, ...]
    folder: Path

    @property
    def sites(self) -> tuple[Path, ...]:
        """The sites' folders."""
        return tuple(self.folder / "sites" / name for name in self.names)

    def stores(self, task: str) -> tuple[Path, ...]:
        """Return the sites' prepared stores of a task's kind. Raises StorageError if one is missing."""
        return tuple(find_store(folder, find_task(task).store_kind) for folder in self.sites)

    @property
    def heldout(self) -> Path:
        """The server's reference patients."""
        return self.folder / "heldout"

    @property
    def delta(self) -> float:
        """A delta below one over the number of any site's patients."""
        return DELTA_SHARE / max(self.declared_patients)

    @classmethod
    def open(cls, folder: Path) -> "Federation | None":
        """Return the federation prepared in ``folder``, or ``None`` if that was not finished.

        Raises:
            StorageError: If its description is damaged.
        """
        path = folder / "federation.json"
        if not path.exists():
            return None
        try:
            values = parse_json(path.read_bytes(), str(path))
            return cls(tuple(values["names"]), tuple(values["declared_patients"]), folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path} is damaged. Start again with another --out.") from error


def prepare_federation(
    folder: Path,
    raw: Sequence[Path],
    *,
    task: str,
    seed: int,
    heldout: Path | None,
    workers: int,
    report: Progress,
) -> Federation:
    """Prepare one site folder per raw or prepared hospital, and the held-out store.

    Without ``heldout``, a fifth of every hospital's patients is set aside as held-out before anything is
    trained, and no patient is ever in both; or, where the task's source divides by time, the later part of every
    patient's records.

    ``raw`` and ``heldout`` may each be a raw export or a prepared store.

    Raises:
        FederationError: Naming the hospital's folder, if it gives no patient.
    """
    names = tuple(f"site-{number}" for number in range(1, len(raw) + 1))
    declared, reserved, first = [], [], None
    for number, (name, source) in enumerate(zip(names, raw, strict=True)):
        # A real hospital keeps a random secret; here it must repeat, for it decides the order of the patients.
        secret = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        try:
            store = _prepared(folder / "prepared" / name, source, task, secret, workers, report)
        except IntakeError as error:
            raise IntakeError(f"The hospital in {source} cannot take part: {error}") from error
        if store.kind != find_task(task).store_kind:
            raise IntakeError(f"{source} holds {store.kind}, the task {task} reads {find_task(task).store_kind}.")
        if stores_differ(store, first := first or store):
            raise IntakeError(f"{source} was prepared in another way than the hospitals before it.")
        if heldout is None:
            store, aside = _set_aside(store, find_source(task), np.random.default_rng([seed, number]))
            reserved.append(_with_site(aside, number, names) if find_source(task).split else aside)
        _write(store_path(folder / "sites" / name, store.kind), store)
        declared.append(coarse(len(store)))
    apart = _given_heldout(folder, heldout, task, seed, workers, report) if heldout else merge_stores(reserved)
    if not len(apart):
        raise IntakeError("Too few patients to set a fifth aside as held-out; give held-out patients with --heldout.")
    if heldout is not None or find_source(task).split is None:
        _refuse_overlap(folder, names, apart)
    _write(folder / "heldout", apart)
    federation = Federation(names, tuple(declared), folder)
    write_atomic(
        folder / "federation.json",
        json.dumps({key: value for key, value in asdict(federation).items() if key != "folder"}).encode(),
    )
    return federation


def write_policies(federation: Federation, *, task: str, max_epsilon: float, augment_with: str = "") -> None:
    """Give each site its ``site.toml``, ledger and audit log; infinite ``max_epsilon`` permits zero noise.

    Each trusts the keys that lie in the folders of the run which made the checkpoint of ``augment_with``.
    """
    for name, declared, folder in zip(federation.names, federation.declared_patients, federation.sites, strict=True):
        SitePolicy(
            name=name,
            declared_patients=declared,
            tasks=(task,),
            max_epsilon=max_epsilon,
            max_delta=1.0 / declared,
            min_noise_multiplier=0.0 if np.isinf(max_epsilon) else 0.3,
            augment_with=augment_with,
        ).write(folder / "site.toml")
        if augment_with and (keys := keys_beside(Path(augment_with))):
            write_atomic(folder / SIGNING_PUB, b"".join(map(public_line, keys)))
        open_books(folder)


def coarse(patients: int) -> int:
    """Round a number of patients to a figure that a hospital may publish: to tens, at least ten."""
    return max(_COARSE, round(patients / _COARSE) * _COARSE)


def _prepared(target: Path, source: Path, task: str, secret: bytes, workers: int, progress: Progress) -> RecordStore:
    """Open a prepared store, or prepare a raw export."""
    if not source.is_dir() and not (source.is_file() and ".csv" in source.suffixes):
        raise StorageError(f"There is no folder {source}. Give one folder per hospital, or one CSV of its glucose.")
    if (source / "store.json").exists() or stores_in(source):
        return RecordStore.open(find_store(source, find_task(task).store_kind))
    find_source(task).prepare(source, target, secret, workers, progress)
    return RecordStore.open(target)


def _given_heldout(folder: Path, heldout: Path, task: str, seed: int, workers: int, report: Progress) -> RecordStore:
    """Return the reference patients that the researcher gives, raw or prepared."""
    wanted = find_task(task).store_kind
    secret = hashlib.sha256(f"{seed}/heldout".encode()).digest()
    try:
        store = _prepared(folder / "prepared" / "heldout", heldout, task, secret, workers, report)
    except FederationError as error:
        raise IntakeError(
            f"--heldout {heldout} holds neither a prepared store nor a raw export for the task {task}: {error}"
        ) from error
    if store.kind != wanted:
        raise IntakeError(f"{heldout} holds {store.kind}, the task {task} reads {wanted}.")
    return store


def merge_stores(stores: Sequence[RecordStore]) -> RecordStore:
    """Return the patients of several stores of one kind as one in-memory store."""
    first = stores[0]
    lengths = np.concatenate([np.diff(store.offsets) for store in stores])
    return RecordStore(
        kind=first.kind,
        attributes=first.attributes,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        keys=np.concatenate([store.keys for store in stores]),
        arrays={name: np.concatenate([store.arrays[name] for store in stores]) for name in first.arrays},
        digest=hashlib.sha256("".join(store.digest for store in stores).encode()).hexdigest(),
    )


def _set_aside(store: RecordStore, source: Source, generator: np.random.Generator) -> tuple[RecordStore, RecordStore]:
    """Return what a hospital trains on and what is held out of it."""
    if source.split is not None:
        return source.split(store)
    order = generator.permutation(len(store))
    aside = round(len(store) * HELDOUT_SHARE)
    return store.subset(np.sort(order[aside:])), store.subset(np.sort(order[:aside]))


def _with_site(store: RecordStore, number: int, names: Sequence[str]) -> RecordStore:
    """Return the store with a field that says that its records are of hospital ``names[number]``."""
    site = np.full(int(store.offsets[-1]), number, np.int16)
    return replace(store, attributes={**store.attributes, "sites": list(names)}, arrays={**store.arrays, SITE: site})


def stores_differ(one: RecordStore, other: RecordStore) -> bool:
    """Whether two stores were prepared in different ways, so that their records must not be mixed."""
    return dict(one.attributes) != dict(other.attributes) or set(one.arrays) != set(other.arrays)


def _refuse_overlap(folder: Path, names: Sequence[str], heldout: RecordStore) -> None:
    """Refuse held-out patients who also train, found by pseudonym or, under another secret, by equal records."""
    judged = _traces(heldout)
    for name in names:
        if judged & _traces(open_store(folder / "sites" / name, heldout.kind)):
            raise IntakeError(f"Held-out patients are among the training patients of {name}. Give other ones.")


def _traces(store: RecordStore) -> set[bytes]:
    """Return each patient's pseudonym and a hash of the patient's records."""
    traces = {key.tobytes() for key in store.keys}
    for item in store.items():
        content = hashlib.sha256()
        for field in sorted(item.arrays.keys() - {SITE}):
            content.update(np.ascontiguousarray(item.arrays[field]).tobytes())
        traces.add(content.digest())
    return traces


def _write(path: Path, store: RecordStore) -> None:
    write_store(path, kind=store.kind, patients=store.items(), attributes=store.attributes)
