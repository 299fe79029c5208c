"""Drawing patients and their records.

Privacy: a patient's records are drawn from that patient's own alone. That they also do not hang on who else is drawn is
the caller's part: ``client.training.draw_own`` draws each patient by itself.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor


def poisson_sample(patients: int, sample_rate: float, uniform: Callable[[int], npt.NDArray[np.float64]]) -> Tensor:
    """Return the indices of the patients in one step: each joins independently with ``sample_rate``.

    This is the sampling that the accountant assumes; the result may be empty.

    Args:
        patients: How many there are.
        sample_rate: In (0, 1].
        uniform: Returns so many fresh uniforms in [0, 1).
    """
    return torch.from_numpy(np.flatnonzero(uniform(patients) < sample_rate))


def draw_records(
    offsets: npt.NDArray[np.int64], patients: Tensor, records_per_patient: int, generator: Generator
) -> npt.NDArray[np.int64]:
    """Return record numbers ``(B, K)``: K uniform draws with replacement from each patient's own records."""
    first = torch.from_numpy(offsets)[patients]
    owned = torch.from_numpy(offsets)[patients + 1] - first
    uniform = torch.rand(len(patients), records_per_patient, generator=generator, dtype=torch.float64)
    rows = first[:, None] + (uniform * owned[:, None]).long()
    return rows.numpy()
