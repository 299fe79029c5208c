"""One parser for what others wrote: whatever the bytes, a valid value or one sentence."""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shared.errors import StorageError
from shared.plan import RunPlan
from shared.provenance.ancestry import PUBLIC, Ancestry, PastRun, Share
from shared.provenance.bounded import MOST_DEPTH, is_bare, parse_json, read_bounded
from shared.provenance.sidecar import OperatingPoint, Sidecar, parse_ancestry, parse_sidecar, read_sidecar
from shared.provenance.tensors import MOST_WEIGHT, WeightsFile, load_into, metadata_of, read_weights

RUN = PastRun("first", "d" * 64, 0.1, 1.0, 1e-3, (Share("h1", 40, "e" * 64), Share("h2", 30)))
FULL = Sidecar(
    task="nodule-classification", sha256="a" * 64, run="second", round=7, plan_digest="b" * 64,
    path="round-00007.safetensors", strategy_sha256="c" * 64, epsilon=3.25, delta=1e-3,
    ancestry=Ancestry(PUBLIC, "f" * 64, "somebody", (RUN, replace(RUN, run="second"))),
    operating_point=OperatingPoint(0.4, 1.3, "balanced accuracy"), rounds=7, sites=2, onnx_sha256="0" * 64,
    onnx_differs_by=1e-6, metrics={"auroc": {"value": 0.8, "low": None, "high": 0.9}, "brier": None},
)  # fmt: skip
TEXT = FULL.to_json()
OF_TODAY = {
    "run": "r", "round": 3, "task": "nodule-classification", "plan_digest": "p", "sha256": "a" * 64,
    "path": "round-00003.safetensors", "strategy_sha256": None, "epsilon": 4.5, "delta": 1e-3,
}  # fmt: skip


def weights_of(model: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    return bytes(safetensors.torch.save(model.state_dict(), metadata=metadata))


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(TEXT), **fields}).encode()


def test_what_is_written_is_read_as_it_was() -> None:
    assert parse_sidecar(TEXT, "it") == FULL
    assert parse_sidecar(TEXT, "it").to_json() == TEXT


def test_a_description_of_before_versions_is_read_and_is_of_unknown_origin() -> None:
    read = parse_sidecar(json.dumps(OF_TODAY).encode(), "it")
    assert (read.version, read.epsilon, read.round, read.ancestry, read.signature) == (0, 4.5, 3, None, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "too deeply"),
        (b'{"task": ' + b'{"a":' * (MOST_DEPTH + 1), "too deeply"),
        (changed(epsilon=1).replace(b'"epsilon": 1', b'"epsilon": ' + b"9" * 4000), "too large"),
        (changed(epsilon=1).replace(b'"epsilon": 1', b'"epsilon": ' + b"9" * 4000 + b".5"), "not finite"),
        (changed(epsilon=1).replace(b'"epsilon": 1', b'"epsilon": 1e999'), "not finite"),
        (changed(epsilon=1).replace(b'"epsilon": 1', b'"epsilon": NaN'), "not finite"),
        (changed(epsilon=-1), "epsilon"),
        (changed(epsilon=True), "epsilon"),
        (changed(run="\x1b[2Jgone"), "cannot be printed"),
        (changed(run="r\u202etxt"), "cannot be printed"),
        (changed(run="two words"), "run"),
        (changed(path="../../etc/passwd"), "path"),
        (changed(path="/etc/passwd"), "path"),
        (changed(path=".."), "path"),
        (changed(path="a\\b"), "path"),
        (changed(sha256="z" * 64), "sha256"),
        (changed(surprise=1), "does not know"),
        (changed(version=2), "another version"),
        (changed(ancestry={"origin": "made-up", "runs": []}), "ancestry"),
        (changed(metrics={"a": "text"}), "metrics"),
        (changed(operating_point={"threshold": 2.0, "temperature": 1.0, "rule": ""}), "operating_point"),
        (TEXT.replace(b'"round": 7', b'"round": 7, "round": 8'), "twice"),
        (b"\xff\xfe", "UTF-8"),
        (b"[]", "no JSON object"),
        (b"{", "not JSON"),
        (b"{}", "lacks task"),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_one_sentence(content: bytes, said: str) -> None:
    with pytest.raises(StorageError, match=said) as refused:
        parse_sidecar(content, "round-00007.json")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


@given(st.binary(max_size=400))
def test_no_bytes_give_anything_but_a_value_or_a_sentence(content: bytes) -> None:
    for read in (parse_sidecar, parse_ancestry, parse_json, metadata_of):
        try:
            read(content, "it")
        except StorageError as error:
            assert str(error).isprintable()  # noqa: PT017


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(json.loads(TEXT))), JSON)
def test_any_value_in_any_field_is_taken_or_refused(name: str, value: Any) -> None:
    try:
        read = parse_sidecar(changed(**{name: value}), "it")
    except StorageError:
        return
    assert parse_sidecar(read.to_json(), "it") == read


@given(st.integers(0, len(TEXT) - 1), st.binary(min_size=0, max_size=3), st.integers(0, 40))
def test_a_mutated_description_is_taken_or_refused(at: int, put: bytes, cut: int) -> None:
    try:
        read = parse_sidecar(TEXT[:at] + put + TEXT[at + cut :], "it")
    except StorageError:
        return
    assert parse_sidecar(read.to_json(), "it") == read


MODEL = weights_of(nn.Linear(3, 2), {"fedward": "x"})


@given(st.integers(0, len(MODEL) - 1), st.binary(max_size=9), st.integers(0, 40))
def test_a_mutated_weights_file_is_loaded_whole_or_refused(at: int, put: bytes, cut: int) -> None:
    content, model = MODEL[:at] + put + MODEL[at + cut :], nn.Linear(3, 2)
    before = [parameter.clone() for parameter in model.parameters()]
    try:
        load_into(model, WeightsFile("it", content, "", metadata_of(content)))
    except StorageError:
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        return
    assert all(bool((parameter.abs() <= MOST_WEIGHT).all()) for parameter in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -2 * MOST_WEIGHT])
def test_weights_that_no_trained_model_has_are_refused(value: float, tmp_path: Path) -> None:
    hostile, model = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        hostile.weight[1, 2] = value
    (tmp_path / "w.safetensors").write_bytes(weights_of(hostile))
    before = model.weight.clone()
    with pytest.raises(StorageError, match="not finite or above"):
        load_into(model, read_weights(tmp_path / "w.safetensors"))
    assert torch.equal(model.weight, before)


def test_weights_of_another_type_or_shape_or_norm_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "w.safetensors", nn.Linear(3, 2)
    for other in (nn.Linear(2, 3), nn.Linear(3, 2, bias=False), nn.Linear(3, 2).double()):
        path.write_bytes(weights_of(other))
        with pytest.raises(StorageError, match="of this task's model"):
            load_into(model, read_weights(path))
    path.write_bytes(weights_of(model))
    norm = sum(float(parameter.detach().square().sum()) for parameter in model.parameters()) ** 0.5
    load_into(model, read_weights(path), most_norm=norm * 1.001)
    with pytest.raises(StorageError, match="max-weights-norm"):
        load_into(model, read_weights(path), most_norm=norm * 0.999)


def test_a_header_that_lies_about_its_length_or_is_deep_is_refused() -> None:
    for content in (b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 200_000) + b"[" * 200_000):
        with pytest.raises(StorageError, match="not a checkpoint"):
            metadata_of(content, "w")


def test_a_pipe_or_a_large_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(StorageError, match="no regular file"):
        read_sidecar(tmp_path / "pipe.json")
    (tmp_path / "large.json").write_bytes(b" " * 101)
    with pytest.raises(StorageError, match="larger than 100"):
        read_bounded(tmp_path / "large.json", 100)


def test_a_file_name_stays_in_its_folder() -> None:
    assert all(map(is_bare, ("round-00007.safetensors", "model.onnx")))
    assert not any(map(is_bare, ("", ".", "..", "../a", "a/b", "/a", ".hidden", "a\0b", "a\nb", "C:\\a")))


def test_a_plan_goes_through_the_same_parser() -> None:
    """A hostile server sends plans."""
    plan = RunPlan(
        task="t", rounds=2, local_steps=1, sample_rate=0.5, records_per_patient=1, max_grad_norm=1.0,
        noise_multiplier=1.0, delta=1e-3, learning_rate=0.1,
    )  # fmt: skip
    for text in (plan.to_json().replace('"rounds":2', '"learning_rate":' + "9" * 4000), "[" * 100_000):
        with pytest.raises(Exception, match="plan") as refused:
            RunPlan.from_json(text)
        assert type(refused.value).__name__ == "PlanError"
