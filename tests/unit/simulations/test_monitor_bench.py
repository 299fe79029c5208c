"""The monitor's bench on a stream too short to time."""

from pathlib import Path

import torch

from server.checkpoints import save_checkpoint
from shared.tasks.glucose_forecast import TASK
from simulations import monitor_bench


def test_every_cycle_is_timed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = save_checkpoint(tmp_path / "c", TASK.build(), run="r", number=1, task=TASK.name, plan_digest="p").path
    assert len(monitor_bench.seconds_a_cycle(checkpoint, 3, 2)) == 2
