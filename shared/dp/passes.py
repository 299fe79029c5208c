"""How often and on how many rows a private step runs: a function of public numbers alone.

A step that took a pass more when more patients joined would tell, by its time, how many did. So every step runs the
same number of passes of the same size, whoever joins; empty rows are padding.

Room is needed for a public number of patients. A hospital has at most :func:`most_patients`, N; each joins a step
with ``sample_rate`` q. :func:`most_sampled` is the least c with

    P[Binomial(N - 1, q) ≥ c] ≤ η = ``OVERFLOW_PROBABILITY`` = 2⁻⁴⁰

and a larger sample is cut to the room there is, which is at least c. Take two neighbouring data sets of at most N
patients. Unless c or more of the patients they share were sampled, both samples have at most c patients and nothing is
cut, on either of them. The number of shared patients who join is Binomial(n, q) with n ≤ N - 1, which is at most as
likely to reach c as Binomial(N - 1, q) is. :mod:`shared.accounting` shows why delta pays η a step for that.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy.special import bdtrc
from torch import Tensor

from shared.accounting import OVERFLOW_PROBABILITY
from shared.tasks.base import Batch

_RECORDS_AT_ONCE = 64
_TWENTIETH, _FEWEST_MORE = 20, 5


def most_patients(declared_patients: int) -> int:
    """Return how many patients a hospital that declares so many may have: a twentieth more, and at least five more.

    Declared numbers are rounded, and a hospital gains patients after it has declared.
    """
    return declared_patients + max(_FEWEST_MORE, declared_patients // _TWENTIETH)


def most_sampled(declared_patients: int, sample_rate: float) -> int:
    """Return the least c, at least 1, that a sample reaches with probability at most ``OVERFLOW_PROBABILITY``."""
    others = most_patients(declared_patients) - 1
    rare = bisect_left(range(others), True, key=lambda c: _exceeds(c, others, sample_rate) <= OVERFLOW_PROBABILITY)
    return rare + 1


def _exceeds(count: int, most: int, sample_rate: float) -> float:
    """Return P[Binomial(most, sample_rate) > count] for ``count`` below ``most``."""
    return float(bdtrc(count, most, sample_rate))


@dataclass(frozen=True)
class Passes:
    """The passes of every step.

    Attributes:
        size: Patients in a pass; a row of padding comes on top.
        count: Passes in a step.
    """

    size: int
    count: int

    @classmethod
    def of(
        cls, records_per_patient: int, records_at_once: int | None, declared_patients: int, sample_rate: float
    ) -> "Passes":
        """Return as few passes as there is room for in memory, and the least size that they need.

        Args:
            records_per_patient: K.
            records_at_once: Most records in a pass, where a task's are so small that a pass costs more for being one
                than for what is in it; ``None`` for 64.
            declared_patients: The public number of patients, synthetic ones included.
            sample_rate: The plan's.
        """
        most = max(1, (records_at_once or _RECORDS_AT_ONCE) // records_per_patient - 1)
        sampled = most_sampled(declared_patients, sample_rate)
        count = math.ceil(sampled / most)
        return cls(math.ceil(sampled / count), count)

    @property
    def rows(self) -> int:
        """Rows of a pass: its patients, and one row that is always padding."""
        return self.size + 1

    @property
    def room(self) -> int:
        """How many patients a step takes."""
        return self.size * self.count

    def of_step(self, sampled: Tensor, patients: int, draw: Callable[[Tensor], Batch]) -> Iterator[Batch]:
        """Yield a step's batches, ``count`` of ``rows`` rows each, drawn one at a time.

        To draw a patient takes time. So every pass draws as many as it has rows: beside the sampled patients it draws
        others, whose rows are then cleared and count zero. Those are the store's first, whoever was sampled.

        Args:
            sampled: ``(B,)`` who joins the step; beyond ``room``, patients are left out.
            patients: How many there are. Of none, nothing is drawn.
            draw: Draws the records of some patients.
        """
        others = torch.arange(self.rows) % max(1, patients)
        for number in range(self.count):
            mine = sampled[number * self.size : min((number + 1) * self.size, self.room)]
            if patients:
                yield draw(torch.cat([mine, others[len(mine) :]])).first(len(mine))
            else:
                yield draw(mine).padded(self.rows)
