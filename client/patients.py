"""A hospital's patients as training sees them: opened once, and kept while the daemon runs.

To open a store, and to find where its records lie, takes time that grows with the number of records. Within a round
that time would tell the server about a patient with a long record, in every reply anew and outside the ledger. So it is
spent when the daemon starts. A store that an intake replaces while the daemon runs is opened once, by the next message.
"""

from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import PolicyError
from shared.records import RecordStore, open_store, stores_in
from shared.tasks.base import PatientDataset, Task

_Mark = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Patients:
    """What was opened so far."""

    _stores: dict[tuple[Path, str], tuple[_Mark, RecordStore]] = field(default_factory=dict)
    _datasets: dict[tuple[Path, str], tuple[RecordStore, PatientDataset]] = field(default_factory=dict)

    def store_of(self, folder: Path, kind: str) -> RecordStore:
        """Return a hospital's prepared patients of one kind.

        Raises:
            PolicyError: If only other kinds are prepared.
            StorageError: If nothing is, or the store is damaged.
        """
        found = stores_in(folder)
        others = [name for name in found if name not in ("", kind)]
        if others and kind not in found:
            raise PolicyError(f"The prepared stores hold {', '.join(others)}, the task reads {kind}. Run intake.")
        mark, known = _mark(found.get(kind)), self._stores.get((folder, kind))
        if known is None or mark is None or known[0] != mark:
            store = open_store(folder, kind)
            if mark is None:
                return store
            self._stores[folder, kind] = known = mark, store
        return known[1]

    def of_task(self, folder: Path, task: Task) -> PatientDataset:
        """Return a hospital's patients as a task draws them, indexed. Raises as :meth:`store_of`."""
        store, known = self.store_of(folder, task.store_kind), self._datasets.get((folder, task.name))
        if known is None or known[0] is not store:
            dataset = task.load(store)
            len(dataset)  # finds where the records lie
            self._datasets[folder, task.name] = known = store, dataset
        return known[1]


def _mark(store: Path | None) -> _Mark | None:
    """Return what changes when a store is replaced; ``None`` if there is none to look at."""
    try:
        stat = (store / "store.json").stat() if store else None
    except OSError:
        return None
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size) if stat else None
