"""What all that a model descends from has cost the patients of each hospital.

A model starts from random weights, from a public checkpoint, or from another run's model. What patients are promised
of it is then composed over all these runs. The neighbouring relation: one hospital's data differ by one patient with
all records, in every run that the hospital took part in.

- A hospital in one run only: the run's own epsilon. The other runs saw no patient of it, so they are post-processing
  after that run and part of the plan before it; its one plan was fixed beforehand, so the tight composition holds.
- A hospital in several: the later plans may depend on the earlier models, so the adaptive composition of
  :mod:`shared.renyi`.

Everything is stated at the *smallest* delta of the runs. What holds there holds at every larger delta, so it meets
each hospital's rule that delta stays below one over its patients; a larger delta may not.

Two runs' hospitals are one if they share a key or a name. A hospital that changed both is not recognised.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.accounting import Mechanism, epsilon_of
from shared.provenance.ancestry import UNKNOWN, Ancestry, PastRun, Share
from shared.renyi import adaptive_epsilon_of


@dataclass(frozen=True)
class Card:
    """What a model's patients are promised, over everything that it comes from.

    Attributes:
        epsilon: What no hospital's patients have spent more than; ``inf`` where nothing is guaranteed.
        delta: At which it holds; None if no run is known.
        by_site: The same for each hospital.
        composed: Hospitals in more than one of the runs.
        why: Why nothing is guaranteed; None if something is.
    """

    epsilon: float
    delta: float | None
    by_site: Mapping[str, float]
    composed: tuple[str, ...]
    why: str | None

    @property
    def private(self) -> bool:
        """Whether there is any promise."""
        return math.isfinite(self.epsilon)

    def sentence(self) -> str:
        """Return the card in words."""
        if not self.private:
            return f"Not private: {self.why or 'the noise is too little for any finite epsilon'}."
        if self.delta is None:
            return "No hospital's patients were trained on."
        said = f"No patient's epsilon is above {self.epsilon:.4g} at delta {self.delta:.3g}, all runs composed."
        if self.composed:
            said += f" In more than one of the runs: {', '.join(self.composed)}."
        return said

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values; what is infinite is None."""
        return {
            "private": self.private,
            "epsilon": _plain(self.epsilon),
            "delta": self.delta,
            "by_site": {site: _plain(epsilon) for site, epsilon in self.by_site.items()},
            "composed": list(self.composed),
            "says": self.sentence(),
        }


def card_of(ancestry: Ancestry) -> Card:
    """Return what the patients of every hospital in ``ancestry`` are promised; see the module for why it holds."""
    delta = min((run.delta for run in ancestry.runs), default=None)
    by_site: dict[str, float] = {}
    composed: list[str] = []
    for shares in _hospitals(ancestry.runs):
        name = shares[-1][1].site
        mechanisms = [run.mechanism(share.steps) for run, share in shares if share.steps]
        by_site[name] = math.inf if ancestry.origin == UNKNOWN else _epsilon(mechanisms, delta or 1.0)
        if len(mechanisms) > 1:
            composed.append(name)
    why = _why(ancestry)
    epsilon = math.inf if why else max(by_site.values(), default=0.0)
    return Card(epsilon, delta, by_site, tuple(composed), why)


def _epsilon(mechanisms: list[Mechanism], delta: float) -> float:
    if not mechanisms:
        return 0.0
    return epsilon_of(mechanisms, delta) if len(mechanisms) == 1 else adaptive_epsilon_of(mechanisms, delta)


def _why(ancestry: Ancestry) -> str | None:
    if ancestry.origin == UNKNOWN:
        return "it starts from a checkpoint of unknown origin"
    noiseless = [run.run for run in ancestry.runs if run.noise_multiplier == 0.0 and any(s.steps for s in run.sites)]
    return f"the run {noiseless[0]} added no noise" if noiseless else None


def _hospitals(runs: Iterable[PastRun]) -> list[list[tuple[PastRun, Share]]]:
    """Return the shares of each hospital; two shares are one hospital's if name or key are the same."""
    groups: dict[int, list[tuple[PastRun, Share]]] = {}
    group_of: dict[str, int] = {}
    for number, (run, share) in enumerate((past, part) for past in runs for part in past.sites):
        earlier = {group_of[mark] for mark in _marks(share) if mark in group_of}
        groups[number] = [entry for other in sorted(earlier) for entry in groups.pop(other)] + [(run, share)]
        for _, member in groups[number]:
            group_of.update(dict.fromkeys(_marks(member), number))
    return list(groups.values())


def _marks(share: Share) -> list[str]:
    return [f"name {share.site}", *([f"key {share.key_sha256}"] if share.key_sha256 else [])]


def _plain(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None
