"""The ladder: three ways to run the passes of a private step, which agree up to rounding.

A patient's rounded gradient must not depend on the patient's row, or on who fills the other rows. Fast kernels divide
rows among threads and vector registers, and may round the odd rows at a border differently. Which do so depends on
the processor, the library and the number of threads. So there are three rungs:

| rung | how | invariant because |
| --- | --- | --- |
| ``fast`` | the fast kernels on all the wanted threads | the self-test found no difference |
| ``one-thread`` | the same kernels on one thread | the self-test found no difference |
| ``one-by-one`` | each patient alone in a pass, on one thread | every patient has row 0 of a pass of one shape |

:mod:`shared.dp.selftest` takes the first that is invariant on this machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from shared.dp.passes import Passes
from shared.dp.subnormals import with_subnormals_flushed

_T = TypeVar("_T")
FAST, ONE_THREAD, ONE_BY_ONE = "fast", "one-thread", "one-by-one"


@dataclass(frozen=True)
class Rung:
    """One way to run a step's passes.

    Attributes:
        name: ``FAST``, ``ONE_THREAD`` or ``ONE_BY_ONE``.
        threads: Of torch, while the passes run.
    """

    name: str
    threads: int

    def passes(self, of_plan: Passes) -> Passes:
        """Return how the room of the plan's passes is divided: ``one-by-one`` has a pass for each place."""
        return Passes(1, of_plan.room) if self.name == ONE_BY_ONE else of_plan

    def run(self, work: Callable[[], _T]) -> _T:
        """Return what ``work`` returns, done in a fresh thread with this rung's threads and in full precision.

        OpenMP keeps a pool and a number of threads for each thread that calls it. So both are set in the very thread
        that does the work, and the self-test comes through here too: what it tests is what trains.
        """

        def here() -> _T:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                return work()
            finally:
                torch.set_num_threads(before)

        compute_in_full_precision()
        return with_subnormals_flushed(here)


def ladder(threads: int) -> tuple[Rung, ...]:
    """Return the rungs for so many wanted threads, the fastest first. For one thread the first two are the same."""
    fast = (Rung(FAST, threads),) if threads > 1 else ()
    return *fast, Rung(ONE_THREAD, 1), Rung(ONE_BY_ONE, 1)


def compute_in_full_precision() -> None:
    """Have every product in single precision computed in single precision, and by a fixed algorithm.

    TF32 and bfloat16 keep 10 and 7 bits of a factor. The bounds on rounding in :mod:`shared.dp.tape` count on 23, for
    norm and sum must come from the same numbers. The setting stays: gradients are private in this process.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.mkldnn.fp32_precision = "ieee"
