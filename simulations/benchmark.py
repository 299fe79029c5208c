"""How much privacy costs: one training step of each model by each engine, interleaved in one process.

A step is everything between two batches: forward, backward, clipping, noise, update. Times are CPU seconds of one
thread; the engines take turns, so that a busy machine slows all alike, and medians are compared. The yardstick is
the non-private step in its faster memory layout. Peak memory is what a fresh process grows by, the median of three:
how blocks come to lie in memory differs from process to process.
"""

import multiprocessing
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import Generator, Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from shared.dp.memory import keep_freed_memory
from shared.dp.noise import SeededNoise
from shared.dp.passes import Passes
from shared.dp.step import PrivateStep
from shared.errors import PlanError, StorageError
from shared.files import storage_errors, write_atomic
from shared.tasks.base import Batch
from shared.tasks.glucose_forecast import TASK
from simulations.benchmark_cases import CASES, Case

_WARM_UP, _PROCESSES = 3, 3
_RATE = 0.01
_DAMP = "Full backward hook is firing|Secure RNG turned off|Optimal order is"
Step = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """One row of the result; ``spread_ms`` is the interquartile range."""

    model: str
    batch: int
    engine: str
    ms: float
    spread_ms: float
    ratio_to_nonprivate: float
    speedup_over_opacus: float | None
    peak_mib: float


_MARKS = ("<!-- bench -->", "<!-- end of bench -->")
ENGINES = ("nonprivate", "opacus", "opacus-ghost", "bookkeeping")


def measure(models: Sequence[str], batch: int | None, repeats: int, *, keep_freed: bool = False) -> list[Measurement]:
    """Measure every engine on the chosen models, at ``batch`` or at each model's own batch sizes.

    With ``keep_freed``, this process keeps freed memory from now on, as one that trains does; else every engine runs
    on the C library as it comes.

    Raises:
        PlanError: If a model is not known.
    """
    if unknown := sorted(set(models) - set(CASES)):
        raise PlanError(f"There is no benchmark of {', '.join(unknown)}; there is: {', '.join(CASES)}.")
    rows = []
    for model in models:
        for size in (batch,) if batch else CASES[model].batches:
            rows += _measure_case(model, size, repeats, keep_freed=keep_freed)
    return rows


def _measure_case(model: str, batch: int, repeats: int, *, keep_freed: bool) -> list[Measurement]:
    if keep_freed:
        keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layouts = ("nonprivate", "nonprivate-channels-last") if CASES[model].images else ("nonprivate",)
        times = _interleave({name: _step(name, model, batch) for name in (*layouts, *ENGINES[1:])}, repeats)
    finally:
        torch.set_num_threads(threads)
    fastest = min(layouts, key=lambda name: median(times[name]))
    times["nonprivate"] = times[fastest]
    engines = {name: fastest if name == "nonprivate" else name for name in ENGINES}
    memory = {name: _peak_mib(engine, model, batch, keep_freed) for name, engine in engines.items()}
    ordinary = median(times["nonprivate"])
    opacus = min(median(times["opacus"]), median(times["opacus-ghost"]))
    return [
        Measurement(
            model=model,
            batch=batch,
            engine=name,
            ms=round(median(times[name]) * 1e3, 3),
            spread_ms=round(_spread(times[name]) * 1e3, 3),
            ratio_to_nonprivate=round(median(times[name]) / ordinary, 3),
            speedup_over_opacus=round(opacus / median(times[name]), 3) if name == "bookkeeping" else None,
            peak_mib=memory[name],
        )
        for name in ENGINES
    ]


def _interleave(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Time the steps in turns. In training a step follows its like, whose data are in the caches: so it does here."""
    for step in steps.values():
        for _ in range(_WARM_UP):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            step()
            began = time.process_time()
            step()
            times[name].append(time.process_time() - began)
    return times


def _spread(times: Sequence[float]) -> float:
    low, _, high = quantiles(times, n=4)
    return high - low


def _peak_mib(engine: str, model: str, batch: int, keep_freed: bool) -> float:
    """Return how much a fresh process grows by taking steps, over one that took steps of two patients."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return median(pool.map(_growth, *zip(*[(engine, model, batch, keep_freed)] * _PROCESSES, strict=True)))


def _growth(engine: str, model: str, batch: int, keep_freed: bool) -> float:
    if keep_freed:
        keep_freed_memory()
    torch.set_num_threads(1)
    _step(engine, model, 2)()
    before = _peak_kib()
    step = _step(engine, model, batch)
    for _ in range(_WARM_UP):
        step()
    return round((_peak_kib() - before) / 1024, 1)


def _peak_kib() -> int:
    """Return this process's peak memory; ``getrusage`` would count its parent's from before the exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0])


def _step(engine: str, model: str, batch: int) -> Step:
    case = CASES[model]
    torch.manual_seed(1)
    inputs, targets = case.draw(batch * case.records, Generator().manual_seed(0))
    if engine.startswith("nonprivate"):
        return _ordinary(case, inputs, targets, channels_last=engine.endswith("channels-last"))
    if engine == "bookkeeping":
        return _bookkeeping(case, inputs, targets)
    return _opacus(case, inputs, targets, "ghost" if engine == "opacus-ghost" else "hooks")


def _ordinary(case: Case, inputs: Tensor, targets: Tensor, *, channels_last: bool) -> Step:
    model = case.build()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = inputs.to(memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=_RATE)

    def step() -> None:
        optimizer.zero_grad()
        case.loss(model(inputs), targets).mean().backward()
        optimizer.step()

    return step


def _bookkeeping(case: Case, inputs: Tensor, targets: Tensor) -> Step:
    model = case.build()
    whole = Batch({"inputs": _by_patient(inputs, case), "targets": _by_patient(targets, case)})

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        values = case.loss(network(batch["inputs"].flatten(0, 1)), batch["targets"].flatten(0, 1))
        return values.view(len(batch), case.records).mean(dim=1)

    step = PrivateStep(
        model,
        SGD(model.parameters(), lr=_RATE),
        loss,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_patients=float(len(whole)),
        noise=SeededNoise(Generator().manual_seed(0)),
    )
    parts = [whole]
    if case.records > 1:
        passes = Passes.of(case.records, TASK.records_at_once, len(whole), 1.0)
        parts = list(passes.of_step(torch.arange(len(whole)), len(whole), partial(_chosen, whole)))
    return lambda: step(parts)


def _by_patient(records: Tensor, case: Case) -> Tensor:
    return records.view(-1, case.records, *records.shape[1:])


def _chosen(batch: Batch, patients: Tensor) -> Batch:
    return Batch({name: tensor[patients] for name, tensor in batch.fields.items()})


class _Mean(nn.Module):
    """A case's loss in the form that Opacus's ghost mode wants."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss, self.reduction = loss, "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        values = self.loss(outputs, targets)
        return values.mean() if self.reduction == "mean" else values


def _opacus(case: Case, inputs: Tensor, targets: Tensor, mode: str) -> Step:
    model = (case.opacus or case.build)()
    optimizer = SGD(model.parameters(), lr=_RATE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_DAMP)
        wrapped = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=_Mean(case.loss),
            data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=len(inputs)),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
    network, private = wrapped[0], wrapped[1]
    criterion: Any = wrapped[2] if mode == "ghost" else _Mean(case.loss)
    private.step_hook = None  # accounting is measured apart

    def step() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_DAMP)
            private.zero_grad()
            criterion(network(inputs), targets).backward()
            private.step()

    return step


def as_markdown(rows: Sequence[Measurement]) -> str:
    """Return the table of ``docs/performance.md``."""
    lines = [
        "| model | batch | engine | ms a step | to non-private | over Opacus's better mode | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        faster = f"{row.speedup_over_opacus:.1f}×" if row.speedup_over_opacus else ""
        lines.append(
            f"| {row.model} | {row.batch} | {row.engine} | {row.ms:.1f} ± {row.spread_ms / 2:.1f} "
            f"| {row.ratio_to_nonprivate:.2f} | {faster} | {row.peak_mib:.0f} |"
        )
    return "\n".join(lines)


def document(path: Path, table: str, marks: tuple[str, str] = _MARKS) -> None:
    """Put the table, with the machine that measured it, between the marks of a document.

    Raises:
        StorageError: If the document cannot be read or has no marks.
    """
    with storage_errors(path):
        text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end:
        raise StorageError(f"{path} has no line {marks[0]} with {marks[1]} after it.")
    write_atomic(path, f"{before}{start}\n\nMeasured on: {machine()}\n\n{table}\n\n{end}{after}".encode())


def machine() -> str:
    """Describe the machine without naming it."""
    return (
        f"{platform.machine()}, one thread, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    )


def as_json(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return the rows as plain JSON values."""
    return [asdict(row) for row in rows]
