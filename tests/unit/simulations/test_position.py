"""The attack by position, on other kernels and threads: each case is a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from shared.errors import PlanError
from simulations.step_attacks.position import attack_position

KERNELS = {
    "default": {},
    "avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "ATEN_CPU_CAPABILITY": "avx512",
    },
}
"""What makes torch, MKL and oneDNN use an instruction set; one that the processor lacks is not used."""
MOST = 1.0 + 1e-5
"""What one patient may move, in units of C: the bound itself, and the rounding of a pass's sum."""


def attack(task: str, kernels: str, threads: int, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "simulations.cli", "attack", "position", "--task", task]
    done = subprocess.run(
        [*command, "--threads", str(threads), "--json", *more],
        env=os.environ | KERNELS[kernels],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def avx2_is_what_runs() -> bool:
    """Whether this processor can be told to use AVX2: the attack was found on such kernels of an x86."""
    return os.uname().machine == "x86_64"


@pytest.mark.skipif(not avx2_is_what_runs(), reason="the kernels that the attack needs are an x86 processor's")
def test_the_attack_by_position_succeeds_on_fast_kernels_and_fails_on_the_rung_taken() -> None:
    """One patient more at the front moved the sum by 10.5 C when nothing chose the kernels."""
    forced = attack("nodule-classification", "avx2", 4, "--rung", "fast")
    taken = attack("nodule-classification", "avx2", 4)
    assert forced["moved"] > 2.0
    assert taken["rung"] != "fast"
    assert taken["moved"] <= MOST


@pytest.mark.parametrize(
    ("task", "kernels", "threads"),
    [
        ("nodule-classification", "default", 2),
        ("nodule-classification", "avx512", 8),
        ("glucose-forecast", "default", 4),
        ("glucose-forecast-lstm", "avx512", 1),
        ("ct-synthesis", "avx2", 8),
    ],
)
def test_one_patient_more_moves_the_sum_by_at_most_the_bound_wherever_it_is_inserted(
    task: str, kernels: str, threads: int
) -> None:
    assert attack(task, kernels, threads)["moved"] <= MOST


def test_a_rung_that_does_not_exist_is_refused_with_the_names_of_those_that_do() -> None:
    with pytest.raises(PlanError, match="one-thread, one-by-one"):
        attack_position("nodule-classification", rung="slow")
