"""Attacks on a released GAN by somebody who holds candidate patients: who of them was trained on?

Both attacks get every candidate's real patches, far more than an outsider has; what they cannot tell, nobody can by
these means. The privacy guarantee bounds any attack; these only look for a mistake in the machinery.

References:
    Hayes, Melis, Danezis, De Cristofaro, "LOGAN: Membership Inference Attacks Against Generative Models", PETS 2019:
        a discriminator is surer of what it was trained on.
    Chen, Yu, Zhang, Fritz, "GAN-Leaks: A Taxonomy of Membership Inference Attacks against Generative Models", CCS
        2020: a generator comes nearer to what it was trained on.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from shared.metrics import Estimate, bootstrap_auroc
from shared.models.cnn import LungCTNet
from shared.models.gan import ConditionalGan
from shared.records import RecordStore
from shared.synthesis import Patches, features, generated_patches, real_patches
from shared.synthesis_metrics import nearest, neighbour_ratio
from shared.tasks.ct_synthesis import SIDE_PX

_GENERATED: Final = 2000
_AT_ONCE: Final = 512
_SEED: Final = 31
Scores = npt.NDArray[np.float64]


def membership(model: ConditionalGan, training: RecordStore, heldout: RecordStore) -> dict[str, Estimate]:
    """Return the AUROC of each attack at telling training patients from held-out ones; 0.5 is chance.

    Returns:
        ``membership_by_discriminator``, ``membership_by_generator``, and ``membership_auc``, the higher of them: to
        take the better attack with hindsight favours the attacker.
    """
    made = _generated(model)
    found = {
        "membership_by_discriminator": _attack(lambda real: _confidence(model, real), training, heldout),
        "membership_by_generator": _attack(lambda real: _closeness(real, made), training, heldout),
    }
    return {**found, "membership_auc": max(found.values(), key=lambda estimate: estimate.value)}


def copying(model: ConditionalGan, classifier: LungCTNet, training: RecordStore, heldout: RecordStore) -> float:
    """Return how much nearer generated patches are to training than to held-out patients: 1 is no nearer.

    Distances are in the classifier's features; of the larger set as many patients are taken as the smaller has.
    """
    fewer = min(len(training), len(heldout))
    generator = np.random.default_rng(_SEED)
    spaces = []
    for store in (training, heldout):
        chosen = store.subset(np.sort(generator.permutation(len(store))[:fewer]))
        spaces.append(features(classifier, real_patches(chosen, SIDE_PX)))
    return neighbour_ratio(features(classifier, _generated(model)), *spaces)


def _attack(score: Callable[[Patches], Scores], training: RecordStore, heldout: RecordStore) -> Estimate:
    """Return the AUROC over patients of a score ``(R,)`` of records, averaged within each patient."""
    scores, labels = [], []
    for store, label in ((training, 1), (heldout, 0)):
        by_record = score(real_patches(store, SIDE_PX))
        owners = store.patient_of_record
        scores.append(np.bincount(owners, weights=by_record) / np.bincount(owners))
        labels.append(np.full(len(store), label, np.int64))
    patients = np.arange(len(training) + len(heldout))
    return bootstrap_auroc(np.concatenate(labels), np.concatenate(scores), patients)


@torch.no_grad()
def _confidence(model: ConditionalGan, real: Patches) -> Scores:
    parts = zip(real.images[:, None].split(_AT_ONCE), real.labels.split(_AT_ONCE), strict=True)
    return torch.cat([model.judge(images, labels) for images, labels in parts]).double().numpy()


def _closeness(real: Patches, made: Patches) -> Scores:
    """Return minus the distance to the nearest generated patch of the same class."""
    scores = np.zeros(len(real))
    for label in (0, 1):
        mine = (real.labels == label).numpy()
        theirs = made.images[made.labels == label].numpy()
        if mine.any():
            scores[mine] = -nearest(real.images.numpy()[mine], theirs)
    return scores


def _generated(model: ConditionalGan) -> Patches:
    return generated_patches(model, torch.arange(_GENERATED) % 2, _SEED)
