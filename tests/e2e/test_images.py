"""The images without an engine: linted, their hardening read off the files, their build carried out in clean places."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
IMAGES = {
    "server": ("fedward-server", {"server", "shared"}, {"client", "simulations"}),
    "client": ("fedward-site", {"client", "shared"}, {"server", "simulations"}),
}


def _rehearse(dockerfile, folder):
    spec = importlib.util.spec_from_file_location("rehearse", DOCKER / "rehearse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rehearse(dockerfile, folder), module.instructions(dockerfile)


@pytest.mark.parametrize("role", IMAGES)
def test_the_linter_finds_nothing(role):
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, DOCKER / f"{role}.Dockerfile"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("role", IMAGES)
def test_the_build_runs_in_a_clean_environment_and_holds_one_role_only(role, tmp_path):
    script, present, absent = IMAGES[role]
    ((command, venv), lines) = _rehearse(DOCKER / f"{role}.Dockerfile", tmp_path)
    assert Path(command[0]).name == script
    helped = subprocess.run([*command, "--help"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert helped.returncode == 0
    assert "Usage" in helped.stdout
    probe = "import importlib.util,sys; print([m for m in sys.argv[1:] if importlib.util.find_spec(m)])"
    found = subprocess.run(
        [venv / "bin" / "python", "-c", probe, *sorted(present | absent)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(sorted(present))
    assert ("USER", "10001:10001") in lines
    assert (role == "client") == ("EXPOSE" not in dict(lines))


def test_compose_hardens_every_service_and_opens_no_port_at_a_hospital():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"server", "hospital-1", "hospital-2", "hospital-3"}
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        if name != "server":
            assert "ports" not in service
            assert [volume for volume in service["volumes"] if volume.endswith(":/data:ro")]
