"""Fixtures that several rooms of the tests share."""

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from shared.records import PatientItem, RecordStore, write_store
from shared.tasks.ct_nodules import STORE_KIND, STORED_PX

settings.register_profile(
    "fedward",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("fedward")

StoreMaker = Callable[..., RecordStore]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two test workers with two torch threads each would fight over two cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data sets beside the checkout; skip where there is none."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at {folder}")
    return folder


@pytest.fixture
def make_nodule_store() -> StoreMaker:
    """Return a writer of small ``ct-nodules`` stores whose malignant nodules are bigger and so learnable."""
    return write_nodule_store


@pytest.fixture
def disk_full_after() -> Callable[[int], AbstractContextManager[None]]:
    """Return what lets no file grow beyond a size: the kernel then says what a full disk says, but for the number."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def write_nodule_store(path: Path, patients: int = 12, seed: int = 0, nodules: int = 2) -> RecordStore:
    generator = np.random.default_rng(seed)
    return write_store(
        path,
        kind=STORE_KIND,
        patients=[_patient(generator, int(generator.integers(1, nodules + 1))) for _ in range(patients)],
        attributes={"spacing_mm": 1.0, "window_hu": [-1000.0, 400.0]},
    )


def _patient(generator: np.random.Generator, nodules: int) -> PatientItem:
    malignant = generator.integers(0, 2, nodules).repeat(3)
    diameter = (6.0 + 8.0 * malignant + generator.normal(0, 1.5, len(malignant))).clip(3.0)
    axis = np.arange(STORED_PX) - (STORED_PX - 1) / 2
    radius = np.hypot(axis[:, None], axis[None, :])
    discs = 1.0 / (1.0 + np.exp(radius[None] - diameter[:, None, None] / 2))
    images = 0.1 + 0.6 * discs + generator.normal(0, 0.03, discs.shape)
    arrays = {
        "image": images.clip(0, 1).astype(np.float16),
        "malignant": malignant.astype(np.uint8),
        "nodule": np.arange(nodules).repeat(3).astype(np.int32),
        "diameter_mm": diameter.astype(np.float32),
        "vendor": np.full(len(malignant), generator.integers(0, 2), np.uint8),
    }
    return PatientItem(generator.bytes(16), arrays)


@pytest.fixture
def make_cgm_store() -> StoreMaker:
    """Return a writer of small ``cgm-5min`` stores: waves of each patient's own period, which can be learnt."""
    return write_cgm_store


def write_cgm_store(
    path: Path, patients: int = 4, seed: int = 0, segments: tuple[int, ...] = (240, 200), noise: float = 1.0
) -> RecordStore:
    generator = np.random.default_rng(seed)
    return write_store(
        path,
        kind="cgm-5min",
        patients=[_glucose(generator, segments, noise) for _ in range(patients)],
        attributes={"step_min": 5, "covariates": []},
    )


def _glucose(generator: np.random.Generator, segments: tuple[int, ...], noise: float) -> PatientItem:
    period, phase = generator.uniform(30, 60), generator.uniform(0, 6)
    at = np.concatenate([np.arange(length) + 1000 * number for number, length in enumerate(segments)])
    glucose = 130 + 50 * np.sin(2 * np.pi * at / period + phase) + noise * generator.normal(size=len(at))
    arrays = {
        "glucose": glucose.astype(np.float32),
        "insulin": np.zeros(len(at), np.float32),
        "carbohydrate": np.zeros(len(at), np.float32),
        "minute_of_day": (at * 5 % 1440).astype(np.int16),
        "segment": np.repeat(np.arange(len(segments)), segments).astype(np.int32),
        "measured": np.ones(len(at), bool),
    }
    return PatientItem(generator.bytes(16), arrays)
