"""``fedward-sim``: the researcher's command. What is heavy is imported by the command that needs it."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from shared.errors import StorageError
from simulations import service_cli
from simulations.scripts import run_script
from simulations.step_attacks import cli as attack_cli

_CONSOLE = Console()
_EXAMPLES = """
Examples:

  fedward-sim run --task nodule-classification --out runs/first

  fedward-sim run --task nodule-classification --epsilon 4 --seed 7 --baselines --out runs/eps4

  fedward-sim run --task nodule-classification --data hospital-a --data hospital-b --out runs/mine

  fedward-sim run --set strategy=median --set byzantine-sites=1 --set deadline-s=60 --out runs/median

  fedward-sim run --augment-with runs/gan/server/checkpoints/round-00040.safetensors --out runs/augmented

  fedward-sim run --resume runs/first
"""
_SYNTHESISE_EXAMPLES = """
Examples:

  fedward-sim run --task ct-synthesis --epsilon 10 --patients-per-site 400 --out runs/gan

  fedward-sim synthesise runs/gan/server/checkpoints/round-00040.safetensors --count 200 --out synthetic
"""
_DEAL_EXAMPLES = """
Examples:

  fedward-sim deal slices.npz --seed 7 --out hospitals

  fedward-sim deal pneumoniamnist_train_val.npz --sites 1 --out xrays   # and xrays/heldout, for 'run --heldout'
"""
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Simulate a federation of hospitals on this machine.",
)
app.add_typer(service_cli.app, name="bench-service")
app.add_typer(attack_cli.app, name="attack")


@app.callback()
def _root() -> None:
    """Simulate a federation of hospitals on this machine."""


@app.command(epilog=_EXAMPLES)
def run(
    context: typer.Context,
    task: Annotated[str, typer.Option(help="What to train.")] = "nodule-classification",
    sites: Annotated[int, typer.Option(min=1, help="How many hospitals to generate.")] = 4,
    rounds: Annotated[int | None, typer.Option(min=1, help="Aggregations. Default: the task's.")] = None,
    epsilon: Annotated[float, typer.Option(help="Privacy each patient is promised; 'inf' trains without.")] = 8.0,
    delta: Annotated[float | None, typer.Option(help="Default: a tenth of 1/declared patients.")] = None,
    max_epsilon: Annotated[float | None, typer.Option(help="The hospitals' own cap. Default: epsilon.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Same seed, same weights.")] = 0,
    out: Annotated[Path | None, typer.Option(help="New folder for everything the run writes.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="A raw or prepared hospital; repeat for each.")] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Held-out patients, raw or prepared as with --data. Default: a fifth of each hospital's."),
    ] = None,
    sensitivity: Annotated[
        float | None,
        typer.Option(help="Choose the threshold that finds this share of positives. Default: balanced accuracy."),
    ] = None,
    partition: Annotated[str, typer.Option(help="'vendors' or 'dirichlet'.")] = "vendors",
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration: smaller is more skewed.")] = 1.0,
    patients_per_site: Annotated[int | None, typer.Option(min=1, max=10_000, help="Generate this many each.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also judge simple methods, pooled and local-only models.")
    ] = False,
    backend: Annotated[str, typer.Option(help="'local' (worker processes) or 'ray'.")] = "local",
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster that is already there.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. Default: the cores.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="A checkpoint to start from, or 'random'. Default: the task's, if any.")
    ] = None,
    init_is_public: Annotated[
        bool, typer.Option("--init-is-public", help="Say that no patient of these hospitals was in its training.")
    ] = False,
    augment_with: Annotated[
        Path | None,
        typer.Option(help="A private ct-synthesis checkpoint; every hospital adds 200 patients drawn from it."),
    ] = None,
    patience: Annotated[int | None, typer.Option(min=0, help="Stop after so many rounds without gain.")] = None,
    local_steps: Annotated[int | None, typer.Option(min=1, help="Steps a site takes each round.")] = None,
    sample_rate: Annotated[float | None, typer.Option(help="Probability of a patient joining a step.")] = None,
    records_per_patient: Annotated[int | None, typer.Option(min=1, help="Records drawn per patient.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Bound on a patient's gradient.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="'sgd' or 'adam'.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the sites' optimizer.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Of the learning rate: 'constant' or 'linear'.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd.")] = None,
    strategy: Annotated[str | None, typer.Option(help="fedavg, fedprox, fedadam, fedyogi, median, krum …")] = None,
    engine: Annotated[str | None, typer.Option(help="Who clips: 'bookkeeping' or 'opacus' (slow).")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any field of the plan, as in a plan.toml; repeat for each."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
) -> None:
    """Run a federation to its end and write summary.json and report.html."""
    assigned = _assigned(context, settings or ())  # before torch is imported: a mistyped key is said at once
    from simulations.display import Display
    from simulations.run import Simulation, start
    from simulations.run import resume as go_on

    display = Display(_CONSOLE)
    if resume is not None:
        with _resumable(resume):
            _show(go_on(Simulation.load(resume), resume, display), resume)
        return
    if out is None:
        raise StorageError("Say with --out where the run's folder shall be.")
    fields = {
        "rounds": rounds,
        "patience": patience,
        "local_steps": local_steps,
        "sample_rate": sample_rate,
        "records_per_patient": records_per_patient,
        "max_grad_norm": max_grad_norm,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "momentum": momentum,
        "strategy": strategy,
        "engine": engine,
    }
    simulation = Simulation(
        task=assigned.pop("task", task),
        sites=len(data) if data else sites,
        epsilon=assigned.pop("epsilon", epsilon),
        delta=assigned.pop("delta", delta),
        max_epsilon=max_epsilon,
        seed=assigned.pop("seed", seed),
        sensitivity=sensitivity,
        data=tuple(str(folder.resolve()) for folder in data or ()),
        heldout=str(heldout.resolve()) if heldout else None,
        partition=partition,
        alpha=alpha,
        patients_per_site=patients_per_site,
        baselines=baselines,
        backend=backend,
        ray_address=ray_address,
        workers=_workers(workers),
        init=_start(init),
        init_is_public=init_is_public,
        augment_with=str(augment_with.resolve()) if augment_with else None,
        plan={**{name: value for name, value in fields.items() if value is not None}, **assigned},
    )
    with _resumable(out):
        _show(start(simulation, out, display), out)


@app.command(epilog="Example:  fedward-sim generate --sites 4 --seed 7 --out hospitals")
def generate(
    out: Annotated[Path, typer.Option(help="New folder; one sub-folder per hospital.")],
    task: Annotated[str, typer.Option(help="Whose data to make.")] = "nodule-classification",
    sites: Annotated[int, typer.Option(min=1, help="How many hospitals.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Same seed, same files.")] = 0,
    partition: Annotated[str, typer.Option(help="'vendors' or 'dirichlet'.")] = "vendors",
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration: smaller is more skewed.")] = 1.0,
    patients_per_site: Annotated[int | None, typer.Option(min=1, help="Default: all LIDC patients.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: the cores.")] = None,
) -> None:
    """Write the hospitals' raw files only: DICOM and annotations.csv."""
    from simulations.display import Display
    from simulations.sources import find_source

    source = find_source(task)
    with Display(_CONSOLE).phase("Generating hospitals") as report:
        folders = source.generate(
            out,
            sites=sites,
            seed=seed,
            patients_per_site=patients_per_site,
            partition=partition,
            alpha=alpha,
            workers=_workers(workers),
            on_progress=report,
        )
    for folder in folders:
        _CONSOLE.print(str(folder), highlight=False, markup=False)


@app.command(epilog=_DEAL_EXAMPLES)
def deal(
    archive: Annotated[Path, typer.Argument(help="NumPy archive of nodule slices, nodule cubes or chest X-rays.")],
    out: Annotated[Path, typer.Option(help="New folder; one prepared hospital each, for 'run --data'.")],
    sites: Annotated[int, typer.Option(min=1, help="How many hospitals.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same hospitals.")] = 0,
) -> None:
    """Deal real images that others prepared to prepared hospitals."""
    from simulations.generators.archives import deal_archive

    for folder in deal_archive(archive, out, sites=sites, seed=seed):
        _CONSOLE.print(str(folder), highlight=False, markup=False)


@app.command(epilog=_SYNTHESISE_EXAMPLES)
def synthesise(
    checkpoint: Annotated[Path, typer.Argument(help="Weights of a ct-synthesis run, with the JSON beside them.")],
    out: Annotated[Path, typer.Option(help="New folder for PNG sheet, NumPy archive and DICOM files.")],
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 96,
    label: Annotated[str, typer.Option(help="'benign' or 'malignant'.")] = "malignant",
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Same seed, same images.")] = 0,
) -> None:
    """Draw synthetic nodules from a trained generator; every file says that it shows no patient."""
    from client.synthesise import synthesise as draw
    from client.trained import Trust
    from simulations.sources import keys_beside

    written = draw(checkpoint, count, label, out, seed, trust=Trust(keys_beside(checkpoint)))
    for path in (written.sheet, written.arrays, written.dicom):
        _CONSOLE.print(str(path), highlight=False, markup=False)


@app.command(epilog="Example:  fedward-sim bench --models lungctnet,gru --json bench.json")
def bench(
    models: Annotated[
        str, typer.Option(help="Comma-separated: lungctnet, unet, discriminator, ct-discriminator, lstm, gru.")
    ] = "all",
    batch: Annotated[int | None, typer.Option(min=2, help="Patients a step. Default: each model's own sizes.")] = None,
    repeats: Annotated[int, typer.Option(min=4, help="Steps of each engine.")] = 30,
    keep_freed_memory: Annotated[
        bool, typer.Option("--keep-freed-memory", help="Let the process keep freed memory, as training does.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    into: Annotated[Path | None, typer.Option(help="Put the table into this document, between its marks.")] = None,
) -> None:
    """Measure what a private step costs, beside the ordinary one and Opacus."""
    import json

    from shared.files import write_atomic
    from simulations.benchmark import as_json, as_markdown, document, measure
    from simulations.benchmark_cases import CASES

    rows = measure(list(CASES) if models == "all" else models.split(","), batch, repeats, keep_freed=keep_freed_memory)
    table = as_markdown(rows)
    _CONSOLE.print(table, highlight=False, markup=False, soft_wrap=True)
    if json_file:
        write_atomic(json_file, json.dumps(as_json(rows), indent=1).encode())
    if into:
        document(into, table)


@app.command(epilog="Example:  fedward-sim bench-run --data hospitals/site-1 --data hospitals/site-2 --rounds 5")
def bench_run(
    data: Annotated[list[Path], typer.Option(help="A prepared hospital; repeat for each.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each variant.")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. Default: the cores.")] = None,
) -> None:
    """Time a whole run: by engine, on Ray, without privacy, and as a bare loop of its steps."""
    from simulations.benchmark_run import measure_runs
    from simulations.run import Simulation

    simulation = Simulation(task="nodule-classification", seed=seed, workers=_workers(workers), plan={"rounds": rounds})
    seconds = measure_runs([folder.resolve() for folder in data], simulation)
    for name, value in seconds.items():
        ratio = value / seconds["bare loop of the same steps"]
        _CONSOLE.print(f"| {name} | {value:.1f} s | {ratio:.2f} |", highlight=False, markup=False, soft_wrap=True)


def _workers(wanted: int | None) -> int:
    """Return how many processes to use: no more than there are cores."""
    cores = os.cpu_count() or 1
    return min(wanted or cores, cores)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Turn Ctrl-C into how to go on. Ends the process at once: a backend's threads may still wait for replies."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"Stopped. Go on with: fedward-sim run --resume {out}", highlight=False, soft_wrap=True, markup=False
        )
        sys.stderr.flush()
        os._exit(130)


def _assigned(context: typer.Context, settings: Sequence[str]) -> dict[str, Any]:
    """Return what --set sets; what an option of its own sets as well is refused."""
    from click.core import ParameterSource

    from shared.errors import PlanError
    from shared.plan_keys import read_assignments

    assigned = read_assignments(settings)
    for name in assigned:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            key = name.replace("_", "-")
            raise PlanError(f"--{key} and --set {key} both set {key}. Give one of them.")
    return assigned


def _start(checkpoint: Path | None) -> str | None:
    from shared.plan import RANDOM_START

    if checkpoint is None or str(checkpoint) == RANDOM_START:
        return None if checkpoint is None else RANDOM_START
    return str(checkpoint.resolve())


def _show(summary: dict[str, Any], out: Path) -> None:
    from simulations.display import outcome

    for line, style in outcome(summary):
        _CONSOLE.print(line, style=style, highlight=False, soft_wrap=True, markup=False)
    _CONSOLE.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Run the command; errors become one sentence and exit code 1."""
    run_script(app, "fedward-sim")


if __name__ == "__main__":
    main()
