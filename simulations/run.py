"""A whole federation on one machine, from raw hospitals to the report; every step can be taken up again.

OUT/simulation.json   what was asked for
OUT/data/             raw hospitals, where they were generated
OUT/sites/NAME/       each hospital's folder: policy, store, ledger
OUT/heldout/          the server's reference patients
OUT/plan.json         the plan, with its digest and epsilon
OUT/server/           registry and checkpoints
OUT/summary.json, OUT/report.html, and whatever files the task's examination leaves
"""

import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict, UserConfig

from client.site import Site
from server.checkpoints import checkpoint_sha256, latest_checkpoint
from server.findings import EXAMINATION
from server.lineage import ancestry_of, record_start, start_of, start_words
from server.registry import Registry, finite
from server.report import write_report
from server.summary import summarise, write_summary
from shared.drafting import draft_plan
from shared.errors import ErrorCode, FederationError, PlanError, StorageError
from shared.files import storage_errors, write_atomic
from shared.messages import PlanQuery
from shared.plan import RANDOM_START, RunPlan
from shared.provenance.ancestry import PUBLIC, SHIPPED, Ancestry
from shared.provenance.bounded import parse_json
from shared.records import RecordStore
from shared.suggest import suggestion
from shared.tasks.registry import find_task
from simulations.baselines import judge_baselines
from simulations.display import Display
from simulations.grid import LocalGrid, worker_pool
from simulations.sites import Federation, merge_stores, prepare_federation, write_policies
from simulations.sources import Simple, find_source, keys_beside, shipped_starts

RUN = "simulation"
BACKENDS = ("local", "ray")
_MADE_BEFORE_THE_PLAN = {"data", "prepared", "sites", "heldout", "federation.json"}


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a researcher asks for; see ``fedward-sim run --help``."""

    task: str
    sites: int = 4
    epsilon: float = 8.0
    delta: float | None = None
    max_epsilon: float | None = None
    seed: int = 0
    data: tuple[str, ...] = ()
    heldout: str | None = None
    partition: str = "vendors"
    alpha: float = 1.0
    patients_per_site: int | None = None
    sensitivity: float | None = None
    baselines: bool = False
    backend: str = "local"
    ray_address: str | None = None
    workers: int = 1
    init: str | None = None
    init_is_public: bool = False
    augment_with: str | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        find_source(self.task)
        if self.sites < 1 or self.workers < 1:
            raise PlanError("A simulation needs at least one site and one worker.")
        if len(set(self.data)) < len(self.data):
            raise PlanError("The same hospital is given twice with --data.")
        if self.ray_address and self.backend != "ray":
            raise PlanError("--ray-address needs --backend ray.")
        if self.max_epsilon is not None and not self.max_epsilon > 0.0:
            raise PlanError(f"--max-epsilon must be positive, not {self.max_epsilon}.")
        if self.baselines and find_task(self.task).post_process:
            raise PlanError(f"--baselines cannot train the task {self.task} alone; its summary has real_auroc instead.")
        find_task(self.task).check_sensitivity(self.sensitivity)
        if self.augment_with and not find_task(self.task).augmented_by:
            raise PlanError(f"The task {self.task} cannot be augmented with synthetic patients.")
        if self.backend not in BACKENDS:
            meant = suggestion(self.backend, BACKENDS)
            raise PlanError(f"The backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}.{meant}")

    @property
    def start(self) -> str | None:
        """The public checkpoint that the run starts from: what was asked for, else the task's own, if any."""
        if self.init == RANDOM_START:
            return None
        own = find_source(self.task).start
        return self.init or (str(own) if own else None)

    def start_ancestry(self) -> Ancestry:
        """Return what the checkpoint comes from that the run starts from.

        Raises:
            PlanError: If it is of unknown origin and nobody says that it is public.
            StorageError: If it cannot be read.
        """
        if self.start is None:
            return Ancestry()
        path = Path(self.start)
        digest = checkpoint_sha256(path)
        if digest in shipped_starts():
            return Ancestry(PUBLIC, digest, SHIPPED)
        return ancestry_of(path, self.task, keys_beside(path), is_public=self.init_is_public)

    def save(self, out: Path) -> None:
        """Write ``simulation.json``; the infinite epsilon is written as text, since JSON has none."""
        values = {**asdict(self), "epsilon": str(self.epsilon)}
        write_atomic(out / "simulation.json", json.dumps(values, indent=1).encode())

    @classmethod
    def load(cls, out: Path) -> "Simulation":
        """Read what an earlier call saved.

        Raises:
            StorageError: If there is nothing to resume.
        """
        try:
            values = parse_json((out / "simulation.json").read_bytes(), "simulation.json")
            return cls(**{**values, "epsilon": float(values["epsilon"]), "data": tuple(values["data"])})
        except OSError as error:
            raise StorageError(f"There is no simulation to resume in {out}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(f"{out / 'simulation.json'} is damaged. Start again with another --out.") from error


def start(simulation: Simulation, out: Path, display: Display) -> dict[str, Any]:
    """Begin a simulation in an empty or new folder and return its summary.

    Raises:
        StorageError: If ``out`` holds a simulation already or cannot be written.
        FederationError: Whatever stops the run.
    """
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        inputs = (*simulation.data, simulation.heldout, simulation.start, simulation.augment_with)
        given = [Path(path).resolve() for path in inputs if path]
        if any(path.is_relative_to(out.resolve()) for path in given):
            raise StorageError(f"The input lies inside {out}, which is the run's own folder. Give another --out.")
        present = {entry.name for entry in out.iterdir()}
        if "plan.json" in present:
            raise StorageError(f"{out} holds a run already: go on with --resume {out}, or give another --out.")
        if present and "simulation.json" not in present:
            raise StorageError(f"{out} is not empty. Give a new folder to --out.")
        for leftover in _MADE_BEFORE_THE_PLAN & present:  # of a start that failed
            shutil.rmtree(out / leftover) if (out / leftover).is_dir() else (out / leftover).unlink()
    simulation.start_ancestry()  # a start of unknown origin is said before the data are made
    simulation.save(out)
    return resume(simulation, out, display)


def resume(simulation: Simulation, out: Path, display: Display) -> dict[str, Any]:
    """Carry a simulation from wherever it stands to its end; see :func:`start`."""
    began = time.monotonic()
    out = out.resolve()
    _quiet()
    with ExitStack() as stack:
        local_workers = simulation.workers if simulation.backend == "local" else 1
        pool = stack.enter_context(worker_pool(local_workers))
        federation = Federation.open(out) or _prepare(simulation, out, display)
        plan = _agree(simulation, federation, out)
        registry = Registry(_folder(out) / "registry.sqlite")
        setup_s = time.monotonic() - began
        _note_origin(registry, simulation, plan, start_of(_folder(out), plan))
        try:
            with display.watch(registry, RUN, plan), _explained(federation, plan):
                _run_server(simulation, federation, plan, out, LocalGrid(federation.sites, simulation.seed, pool))
            if "baselines" not in registry.read(RUN).notes and (simulation.baselines or _simple(simulation)):
                with display.phase("Baselines") as report:
                    registry.add_note(RUN, "baselines", _baselines(simulation, federation, pool, report))
            if EXAMINATION not in registry.read(RUN).notes and find_source(simulation.task).examine:
                with display.phase("Examination"):
                    _examine(simulation, federation, registry, out)
        finally:
            summary = _finish(registry, out, setup_s, time.monotonic() - began)
    return summary


def _folder(out: Path) -> Path:
    folder = out / "server"
    folder.mkdir(exist_ok=True)
    return folder


def _prepare(simulation: Simulation, out: Path, display: Display) -> Federation:
    raw = tuple(Path(folder) for folder in simulation.data)
    if not raw:
        shutil.rmtree(out / "data", ignore_errors=True)  # of a generation that was cut off
        with display.phase("Generating hospitals") as report:
            raw = find_source(simulation.task).generate(
                out / "data",
                sites=simulation.sites,
                seed=simulation.seed,
                patients_per_site=simulation.patients_per_site,
                partition=simulation.partition,
                alpha=simulation.alpha,
                workers=simulation.workers,
                on_progress=report,
            )
    with display.phase("Intake") as report:
        return prepare_federation(
            out,
            raw,
            task=simulation.task,
            seed=simulation.seed,
            heldout=Path(simulation.heldout) if simulation.heldout else None,
            workers=simulation.workers,
            report=lambda _stage, done, total: report(done, total),
        )


def _agree(simulation: Simulation, federation: Federation, out: Path) -> RunPlan:
    """Draft the plan and give the hospitals their rules and ledgers, once; later calls read the plan only."""
    path = out / "plan.json"
    if path.exists():
        return read_plan(path)
    init = checkpoint_sha256(Path(simulation.start)) if simulation.start else RANDOM_START
    record_start(_folder(out), simulation.start_ancestry())
    overrides = {"min_sites": 1, "seed": simulation.seed, "init": init, **simulation.plan}
    plan = draft_plan(
        simulation.task,
        epsilon=simulation.epsilon,
        delta=federation.delta if simulation.delta is None else simulation.delta,
        overrides=overrides,
    )
    cap = simulation.epsilon if simulation.max_epsilon is None else simulation.max_epsilon
    write_policies(federation, task=plan.task, max_epsilon=cap, augment_with=simulation.augment_with or "")
    for folder in federation.sites:
        Site(folder).check_augmentation()  # a bad checkpoint is said before the run
    values = finite({**asdict(plan), "digest": plan.digest, "epsilon": plan.epsilon()})
    write_atomic(path, json.dumps(values, indent=1).encode())
    return plan


@contextmanager
def _explained(federation: Federation, plan: RunPlan) -> Iterator[None]:
    """Add to a refusal the reason that a hospital gives to its own people only."""
    try:
        yield
    except FederationError as error:
        for folder in federation.sites if error.code is ErrorCode.QUORUM_LOST else ():
            try:
                Site(folder).answer_query(PlanQuery(RUN, plan))
            except FederationError as reason:
                raise FederationError(f"{error} {folder.name} says: {reason}", error.code) from error
        raise


def read_plan(path: Path) -> RunPlan:
    """Read the plan that a simulation wrote.

    Raises:
        StorageError: If the file is damaged or was changed.
    """
    try:
        values = parse_json(path.read_bytes(), f"The plan {path}")
        plan = RunPlan.from_mapping({k: v for k, v in values.items() if k not in ("digest", "epsilon")})
        intact = plan.digest == values["digest"]
    except (OSError, ValueError, KeyError, AttributeError, PlanError) as error:
        raise StorageError(f"The plan {path} is damaged. Start again with another --out.") from error
    if not intact:
        raise StorageError(f"The plan {path} was changed after the run began. Start again with another --out.")
    return plan


def _note_origin(registry: Registry, simulation: Simulation, plan: RunPlan, ancestry: Ancestry) -> None:
    registry.begin(RUN, plan)
    origin = "Data given by the researcher." if simulation.data else find_source(simulation.task).origin
    if simulation.augment_with:
        origin += f" Every hospital adds synthetic patients drawn from {Path(simulation.augment_with).name}."
    registry.add_note(RUN, "data", origin)
    start_note = start_words(ancestry, simulation.start, plan.init) if simulation.start else "random weights"
    registry.add_note(RUN, "start", start_note)
    registry.add_note(RUN, "simulated_noise", True)


def _run_server(simulation: Simulation, federation: Federation, plan: RunPlan, out: Path, grid: LocalGrid) -> None:
    config = {
        "run": RUN,
        "plan": plan.to_json(),
        "folder": str(_folder(out)),
        "heldout": str(federation.heldout),
        **({"start": simulation.start} if simulation.start else {}),
        **({} if simulation.sensitivity is None else {"sensitivity": repr(simulation.sensitivity)}),
    }
    if simulation.backend == "ray":
        from simulations.ray_backend import run_on_ray  # noqa: PLC0415 - Ray takes seconds to import

        run_on_ray(
            federation.sites,
            config,
            seed=simulation.seed,
            workers=simulation.workers,
            address=simulation.ray_address,
        )
        return
    from server.app import app  # noqa: PLC0415 - beside its Ray twin

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        app(grid, Context(1, 1, {}, RecordDict(), UserConfig(config)))
    finally:
        torch.set_num_threads(threads)


def _simple(simulation: Simulation) -> Simple | None:
    """Return the judge of simple methods; a forecaster's need the later readings of the patients who train."""
    source = find_source(simulation.task)
    if simulation.heldout is not None and source.split is not None:
        return None
    return (source.baselines if simulation.baselines else None) or source.simple


def _baselines(
    simulation: Simulation, federation: Federation, pool: Executor | None, report: Callable[[int, int], None]
) -> dict[str, Any]:
    """Judge the simple methods that take seconds; if asked to, the others too, and train pooled and local models."""
    stores = dict(zip(federation.names, federation.stores(simulation.task), strict=True))
    return judge_baselines(
        simulation.task,
        stores,
        federation.heldout,
        simple=_simple(simulation),
        train=simulation.baselines,
        seed=simulation.seed,
        sensitivity=simulation.sensitivity,
        pool=pool,
        report=report,
    )


def _examine(simulation: Simulation, federation: Federation, registry: Registry, out: Path) -> None:
    """Note what a task finds out about its final model from all patients together, if it has such a thing."""
    examine, checkpoint = find_source(simulation.task).examine, latest_checkpoint(out / "server" / "checkpoints")
    if examine and checkpoint:
        training = merge_stores([RecordStore.open(path) for path in federation.stores(simulation.task)])
        found = examine(checkpoint.path, training, RecordStore.open(federation.heldout), out)
        registry.add_note(RUN, EXAMINATION, dict(found))


def _finish(registry: Registry, out: Path, setup_s: float, total_s: float) -> dict[str, Any]:
    """Write summary and report of whatever there is, a failed run included."""
    earlier = registry.read(RUN).notes.get("timings", {"total_s": 0.0, "setup_s": 0.0})
    registry.add_note(
        RUN,
        "timings",
        {"total_s": earlier["total_s"] + total_s, "setup_s": earlier["setup_s"] + setup_s},
    )
    kib = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    registry.add_note(RUN, "peak_rss_mib", round(kib / 1024, 1))
    record = registry.read(RUN)
    checkpoint = latest_checkpoint(out / "server" / "checkpoints")
    write_summary(out / "summary.json", record, checkpoint)
    write_report(out / "report.html", record, checkpoint)
    return summarise(record, checkpoint)


def _quiet() -> None:
    """Flower reports to a vendor and to the terminal unless told not to; Ray advises on every start."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    for name in ("flwr", "client.guard"):
        logging.getLogger(name).setLevel(logging.ERROR)
