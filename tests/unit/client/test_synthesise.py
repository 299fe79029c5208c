"""Images drawn from a checkpoint: repeatable, and in every form marked as nobody's."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from safetensors.torch import save_file

from client import cli
from client.synthesise import load_generator, synthesise
from shared.errors import PlanError, StorageError
from shared.tasks.ct_synthesis import TASK


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "round-00003.safetensors"
    save_file(TASK.build().state_dict(), path)
    describe(path, epsilon=9.98, delta=3e-4)
    return path


def describe(path: Path, **more: Any) -> None:
    described = {"task": TASK.name, "run": "trial", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **more}
    path.with_suffix(".json").write_text(json.dumps(described))


def test_sheet_arrays_and_dicom_hold_the_same_images(checkpoint: Path, tmp_path: Path) -> None:
    written = synthesise(checkpoint, 3, "malignant", tmp_path / "out", seed=5)
    content = np.load(written.arrays)
    assert content["image"].shape == (3, 32, 32)
    assert content["malignant"].tolist() == [1, 1, 1]
    assert written.sheet.read_bytes().startswith(b"\x89PNG")
    files = sorted(written.dicom.iterdir())
    assert len(files) == written.images == 3
    for file, image in zip(files, content["image"], strict=True):
        dataset = pydicom.dcmread(file)
        hounsfield = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        np.testing.assert_allclose(hounsfield, -1000 + 1400 * image, atol=0.51)


def test_every_file_says_that_it_shows_nobody(checkpoint: Path, tmp_path: Path) -> None:
    written = synthesise(checkpoint, 2, "benign", tmp_path / "out")
    datasets = [pydicom.dcmread(file) for file in written.dicom.iterdir()]
    for dataset in datasets:
        assert dataset.PatientName == "SYNTHETIC"
        assert list(dataset.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert dataset.ConversionType == "SYN"
        assert dataset.SOPInstanceUID.startswith("2.25.")
        (equipment,) = dataset.ContributingEquipmentSequence
        assert "ct-synthesis/trial" in equipment.ContributionDescription
        assert "epsilon 9.98 at delta 0.0003" in equipment.ContributionDescription
    assert len({dataset.SOPInstanceUID for dataset in datasets}) == 2
    assert len({dataset.SeriesInstanceUID for dataset in datasets}) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"version": 1, "ancestry": {"origin": "unknown", "runs": []}}, "no epsilon is guaranteed"),
        ({"epsilon": None}, "not stated"),
        ({}, "not stated"),
    ],
)
def test_what_is_not_promised_is_not_claimed(checkpoint: Path, more: dict[str, Any], words: str) -> None:
    describe(checkpoint, **more)
    assert words in load_generator(checkpoint)[1].privacy


def test_the_same_seed_draws_the_same_files_and_another_does_not(checkpoint: Path, tmp_path: Path) -> None:
    def files(name: str, seed: int, label: str = "benign") -> list[bytes]:
        return [
            file.read_bytes()
            for file in sorted(synthesise(checkpoint, 2, label, tmp_path / name, seed).dicom.iterdir())
        ]

    first = files("a", 1)
    assert first == files("b", 1)
    assert not set(first) & {*files("c", 2), *files("d", 1, "malignant")}


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
def test_a_validator_finds_no_error(checkpoint: Path, tmp_path: Path) -> None:
    file = next(synthesise(checkpoint, 1, "malignant", tmp_path / "out").dicom.iterdir())
    said = subprocess.run(["dciodvfy", "-new", file], capture_output=True, text=True, check=False).stderr
    assert "SCImage" in said
    assert "Error" not in said


def test_a_wrong_request_is_refused_in_words(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="benign, malignant"):
        synthesise(checkpoint, 1, "spiky", tmp_path / "out")
    with pytest.raises(PlanError, match="between 1 and"):
        synthesise(checkpoint, 0, "benign", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(StorageError, match="not empty"):
        synthesise(checkpoint, 1, "benign", tmp_path / "full")


def test_a_changed_or_foreign_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    described = json.loads(checkpoint.with_suffix(".json").read_text())
    checkpoint.with_suffix(".json").write_text(json.dumps({**described, "task": "nodule-classification"}))
    with pytest.raises(PlanError, match="does not draw images"):
        synthesise(checkpoint, 1, "benign", tmp_path / "out")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-4])
    with pytest.raises(StorageError, match="was changed"):
        synthesise(checkpoint, 1, "benign", tmp_path / "out")
    with pytest.raises(StorageError):
        synthesise(tmp_path / "none.safetensors", 1, "benign", tmp_path / "out")


def test_the_hospitals_command_draws_what_the_function_draws(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["fedward-site", "synthesise", checkpoint, "--count", 2, "--seed", 4, "--out", tmp_path / "command"]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    expected = synthesise(checkpoint, 2, "malignant", tmp_path / "function", seed=4)
    assert np.array_equal(np.load(tmp_path / "command" / "malignant.npz")["image"], np.load(expected.arrays)["image"])
