"""Rehearse an image without a Docker engine: its own COPY and RUN lines in a clean folder and virtual environment.

    python docker/rehearse.py docker/client.Dockerfile

Every instruction of the build stage is carried out as written, with ``/build`` and ``/venv`` moved into a temporary
folder; then the entry point must print its help. What an engine adds (users, volumes, network) is not rehearsed.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return ``(instruction, argument)`` pairs, continued lines joined, comments dropped."""
    text = "\n".join(line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in lines) if name.strip()]


def rehearse(dockerfile: Path, folder: Path) -> tuple[list[str], Path]:
    """Carry out the build stage in ``folder``; return the entry point's command and the environment it lies in.

    Raises:
        subprocess.CalledProcessError: If a line fails.
    """
    build, venv = folder / "build", folder / "venv"
    build.mkdir()
    entry: list[str] = []
    stage = 0
    for name, argument in instructions(dockerfile):
        stage += name == "FROM"
        if stage == 1 and name == "COPY":
            *sources, target = shlex.split(argument)
            for source in sources:
                _copy(ROOT / source, build / target)
        elif stage == 1 and name == "RUN":
            command = argument.replace("/venv", str(venv)).replace("python -m venv", f"{sys.executable} -m venv")
            environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
            subprocess.run(["/bin/sh", "-c", command], cwd=build, env=environment, check=True)
        elif name == "ENTRYPOINT":
            entry = json.loads(argument)
    return [str(venv / "bin" / entry[0]), *entry[1:]], venv


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target / source.name)


def main() -> None:
    """Rehearse the Dockerfiles named on the command line."""
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            command, _ = rehearse(Path(name).resolve(), Path(folder))
            subprocess.run([*command, "--help"], cwd=folder, check=True)


if __name__ == "__main__":
    main()
