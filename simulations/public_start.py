"""Describe weights that saw no patient, for ``--init`` and for everything that reads a checkpoint's description.

``python -m simulations.public_start TASK FILE.safetensors`` writes ``FILE.json`` beside weights that are there.
"""

import argparse
import hashlib
import sys
from pathlib import Path

from safetensors.torch import save
from torch import nn

from shared.files import write_atomic
from shared.provenance.ancestry import PUBLIC, SHIPPED, Ancestry
from shared.provenance.sidecar import Sidecar, write_sidecar
from shared.provenance.tensors import load_into, read_weights
from shared.tasks.registry import find_task
from simulations.scripts import run_script


def save_public(path: Path, model: nn.Module, task: str) -> str:
    """Write a model that saw no patient, and its description; return the SHA-256 of the weights.

    Raises:
        StorageError: If a file cannot be written.
    """
    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    write_atomic(path, content)
    describe_public(path, task, hashlib.sha256(content).hexdigest())
    return hashlib.sha256(content).hexdigest()


def describe_public(path: Path, task: str, sha256: str) -> None:
    """Write the description of public weights beside them. Raises StorageError."""
    ancestry = Ancestry(PUBLIC, sha256, SHIPPED)
    sidecar = Sidecar(task=task, sha256=sha256, run="public-start", round=0, path=path.name, ancestry=ancestry)
    write_sidecar(path.with_suffix(".json"), sidecar)


def main() -> None:
    """Describe weights that are there."""
    parser = argparse.ArgumentParser(description="Write the description of weights that saw no patient.")
    parser.add_argument("task", help="the task whose model they are")
    parser.add_argument("weights", type=Path, help="a *.safetensors")
    chosen = parser.parse_args()
    weights = read_weights(chosen.weights)
    load_into(find_task(chosen.task).build(), weights)
    describe_public(chosen.weights, chosen.task, weights.sha256)
    sys.stdout.write(f"{weights.sha256}\n")


if __name__ == "__main__":
    run_script(main)
