"""A public start for ``ct-synthesis``: the same networks, trained without privacy on images of no patient.

``python -m simulations.phantom_start OUT.safetensors`` writes one; ``shared/starts/ct-synthesis.safetensors`` is
its output with the defaults, kept for the reason that :mod:`simulations.warm_start` gives.

It costs no privacy, and it leaves to the patients' budget only what phantoms do not show: what real patches look like,
and which of them are malignant. Of the classes the start knows nothing whatever: in training they are dealt to phantoms
by chance, and afterwards the weights that belong to a class are replaced by their mean over the classes, so that both
networks treat all classes exactly alike.

References:
    Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually Converge?", ICML 2018: the penalty on the
        discriminator's gradient at real images, here every fourth step.
"""

import argparse
import sys
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from shared.files import storage_errors
from shared.models.gan import ConditionalGan
from shared.synthesis import CLASSES
from shared.tasks.ct_synthesis import SIDE_PX, TASK, build
from simulations.generators.phantoms import draw_phantoms
from simulations.public_start import save_public
from simulations.scripts import run_script

STEPS: Final = 4000
_PHANTOMS: Final = 4000
_BATCH: Final = 32
_RATE: Final = 4e-4
_BETAS: Final = (0.5, 0.99)
_PENALTY: Final = 2.0
_PENALTY_EVERY: Final = 4
_DECAY: Final = 0.995


def write_start(path: Path, steps: int = STEPS, seed: int = 0) -> str:
    """Train on phantoms, write the weights and their description, and return the weights' SHA-256.

    Raises:
        StorageError: If ``path`` cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)  # before the training: it takes minutes
    model = train_on_phantoms(steps, seed)
    return save_public(path, model, TASK.name)


def train_on_phantoms(steps: int, seed: int) -> ConditionalGan:
    """Return both networks after ``steps`` steps each; generator and average are the same."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(draw_phantoms(_PHANTOMS, SIDE_PX, rng))
    labels = torch.from_numpy(rng.integers(0, len(CLASSES), _PHANTOMS))
    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    critics, makers = (
        torch.optim.Adam(part.parameters(), lr=_RATE, betas=_BETAS) for part in (model.discriminator, model.generator)
    )
    for step in range(steps):
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        _update(critics, _critic_loss(model, images[chosen], labels[chosen], step, generator))
        _update(makers, -model.judge(*_made(model, generator)).mean())
        model.follow(_DECAY)
    model.generator.load_state_dict(model.average.state_dict())
    _treat_classes_alike(model)
    return model


@torch.no_grad()
def _treat_classes_alike(model: ConditionalGan) -> None:
    """Replace what belongs to a class by its mean: the generator's inputs and the discriminator's outputs."""
    for maker in (model.generator, model.average):
        inputs = cast(nn.Linear, maker.layers[0]).weight[:, maker.latent :]
        inputs.copy_(inputs.mean(1, keepdim=True).expand_as(inputs))
    last = cast(nn.Linear, model.discriminator.layers[-1])
    for outputs in (last.weight, last.bias):
        outputs.copy_(outputs.mean(0, keepdim=True).expand_as(outputs))


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    gradients = torch.autograd.grad(loss, parameters := [p for g in optimizer.param_groups for p in g["params"]])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def _critic_loss(model: ConditionalGan, real: Tensor, labels: Tensor, step: int, generator: Generator) -> Tensor:
    penalised = step % _PENALTY_EVERY == 0
    images = real[:, None].requires_grad_(penalised)
    logits = model.judge(images, labels)
    with torch.no_grad():
        made, classes = _made(model, generator)
    loss = F.relu(1.0 - logits).mean() + F.relu(1.0 + model.judge(made, classes)).mean()
    if penalised:
        (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        loss = loss + _PENALTY * slope.flatten(1).square().sum(1).mean()
    return loss


def _made(model: ConditionalGan, generator: Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, len(CLASSES), (_BATCH,), generator=generator)
    return model.generator(torch.randn(_BATCH, model.generator.latent, generator=generator), labels), labels


def main() -> None:
    """Write a start and print its SHA-256."""
    parser = argparse.ArgumentParser(description="Train a public start for ct-synthesis on images of no patient.")
    parser.add_argument("out", type=Path, help="a *.safetensors to write")
    sys.stdout.write(f"{write_start(parser.parse_args().out)}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(main)
