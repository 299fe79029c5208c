import json
from pathlib import Path

import numpy as np
import pytest
import torch

from server.checkpoints import latest_checkpoint, load_strategy, load_weights, save_checkpoint
from shared.errors import StorageError
from shared.models.cnn import LungCTNet
from shared.operating_point import OperatingPoint
from shared.weights import pack


def save(folder: Path, number: int):  # type: ignore[no-untyped-def]
    torch.manual_seed(number)
    model = LungCTNet()
    return model, save_checkpoint(folder, model, run="r", number=number, task="t", plan_digest="p")


def test_the_latest_is_found_and_loads_to_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    model, checkpoint = save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == checkpoint
    loaded = LungCTNet()
    assert load_weights(checkpoint.path, loaded, checkpoint.sha256) == checkpoint.sha256
    assert pack(loaded).tobytes() == pack(model).tobytes()


def test_old_checkpoints_do_not_pile_up(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path, number)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(tmp_path.glob("*.json"))) == 2


def test_the_strategys_state_is_saved_beside_the_model_and_goes_with_it(tmp_path: Path) -> None:
    moments = {"m_t": np.arange(4, dtype=np.float32), "v_t": np.arange(4, dtype=np.float64)}
    for number in range(4):
        checkpoint = save_checkpoint(
            tmp_path, LungCTNet(), run="r", number=number, task="t", plan_digest="p", strategy_state=moments
        )
    found = latest_checkpoint(tmp_path)
    assert found == checkpoint
    loaded = load_strategy(checkpoint)
    assert {name: (value.dtype, value.tobytes()) for name, value in loaded.items()} == {
        name: (value.dtype, value.tobytes()) for name, value in moments.items()
    }
    files = sorted(tmp_path.glob("*.strategy"))
    assert [file.name for file in files] == ["round-00002.strategy", "round-00003.strategy"]
    files[-1].write_bytes(files[-1].read_bytes() + b" ")
    with pytest.raises(StorageError, match="changed after"):
        load_strategy(checkpoint)


def test_a_strategy_without_state_saves_none(tmp_path: Path) -> None:
    _, checkpoint = save(tmp_path, 1)
    assert load_strategy(checkpoint) == {}
    assert not list(tmp_path.glob("*.strategy"))


def test_weights_without_a_sidecar_are_no_checkpoint(tmp_path: Path) -> None:
    """A crash between the two writes leaves the earlier checkpoint in force."""
    save(tmp_path, 1)
    _, second = save(tmp_path, 2)
    second.path.with_suffix(".json").unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.round == 1


def test_nothing_is_found_in_an_empty_folder(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_tampering_and_damage_are_noticed(tmp_path: Path) -> None:
    _, checkpoint = save(tmp_path, 1)
    content = bytearray(checkpoint.path.read_bytes())
    content[-1] ^= 1
    checkpoint.path.write_bytes(content)
    with pytest.raises(StorageError, match="changed after"):
        load_weights(checkpoint.path, LungCTNet(), checkpoint.sha256)
    checkpoint.path.write_bytes(b"rubbish")
    with pytest.raises(StorageError, match="not a checkpoint"):
        load_weights(checkpoint.path, LungCTNet())
    save_checkpoint(tmp_path / "other", torch.nn.Linear(2, 2), run="r", number=1, task="t", plan_digest="p")
    with pytest.raises(StorageError, match="not a checkpoint"):
        load_weights(tmp_path / "other" / "round-00001.safetensors", LungCTNet())
    checkpoint.path.with_suffix(".json").write_text(json.dumps({"run": 1}))
    with pytest.raises(StorageError, match="damaged"):
        latest_checkpoint(tmp_path)


def test_the_operating_point_stands_in_the_sidecar_and_is_absent_where_there_is_none(tmp_path: Path) -> None:
    point = OperatingPoint(0.37, 1.25, "balanced-accuracy")
    for number, chosen in ((1, None), (2, point)):
        checkpoint = save_checkpoint(
            tmp_path, LungCTNet(), run="r", number=number, task="t", plan_digest="p", operating_point=chosen
        )
    first, second = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json")))
    assert "operating_point" not in first
    assert second["operating_point"] == {"threshold": 0.37, "temperature": 1.25, "rule": "balanced-accuracy"}
    assert latest_checkpoint(tmp_path) == checkpoint
    second["operating_point"]["threshold"] = 3
    checkpoint.path.with_suffix(".json").write_text(json.dumps(second))
    with pytest.raises(StorageError, match="damaged"):
        latest_checkpoint(tmp_path)
