"""The monitor's bench on a stream too short to time."""

import sys
from pathlib import Path

import pytest
import torch

from server.checkpoints import save_checkpoint
from shared.tasks.glucose_forecast import TASK
from simulations import monitor_bench


def test_every_cycle_is_timed_and_a_bad_path_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    checkpoint = save_checkpoint(tmp_path / "c", TASK.build(), run="r", number=1, task=TASK.name, plan_digest="p").path
    assert len(monitor_bench.seconds_a_cycle(checkpoint, 3, 2)) == 2
    monkeypatch.setattr(sys, "argv", ["monitor_bench", str(tmp_path / "absent.safetensors")])
    with pytest.raises(SystemExit, match=r"^monitor_bench: .*absent\.safetensors"):
        monitor_bench.main()
