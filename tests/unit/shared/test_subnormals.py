"""Numbers too small for the normal format are zero while a private step runs, in every thread."""

import threading

import pytest
import torch

from shared.dp.subnormals import subnormals_are_flushed, with_subnormals_flushed


@pytest.fixture
def threads():
    torch.set_num_threads(4)
    torch.rand(1 << 20).mul_(0.5)  # this thread's pool is there before anything is switched
    yield
    torch.set_num_threads(1)


def test_they_are_flushed_in_all_threads_of_the_step_and_in_nobody_elses(threads):
    """The switch set in a thread whose pool exists already leaves the pool as it was."""
    assert not subnormals_are_flushed()
    assert with_subnormals_flushed(subnormals_are_flushed)
    assert not subnormals_are_flushed()
    torch.set_flush_denormal(True)
    try:
        assert not subnormals_are_flushed()
    finally:
        torch.set_flush_denormal(False)


def test_a_backward_pass_works_in_the_flushing_threads(threads):
    def product() -> bool:
        weight = torch.full((1 << 20,), 1e-30, requires_grad=True)
        (weight * 1e-10).mul(1.0).sum().backward()
        return bool((weight.grad * 1e-30 == 0.0).all())

    assert with_subnormals_flushed(product)


def test_results_and_errors_come_back_and_the_thread_ends():
    def fail() -> None:
        raise ValueError("so")

    assert with_subnormals_flushed(lambda: threading.current_thread().name).startswith("private")
    with pytest.raises(ValueError, match="so"):
        with_subnormals_flushed(fail)
    assert not any(thread.name.startswith("private") for thread in threading.enumerate())


def test_where_the_processor_cannot_the_work_is_done_and_that_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _on: False)
    assert with_subnormals_flushed(lambda: 3) == 3
    assert [record.msg for record in caplog.records] == ["subnormals"]
