"""The operator's settings and a new aggregator's folder."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import ServerConfig, find_heldout, make_server, port_taken
from shared.errors import PlanError, StorageError
from shared.records import RecordStore

CONFIG = ServerConfig(
    names=("localhost",), fleet_address="127.0.0.1", fleet_port=9092, control_port=20001, health_port=20002
)


@given(
    names=st.lists(st.text(min_size=1, alphabet=st.characters(codec="utf-8", exclude_categories=("C",))), min_size=1),
    heldout=st.sampled_from(["", "/data/held out", 'odd "quoted" \\ path']),
    share=st.floats(0.01, 1.0),
    norm=st.floats(0.0, 1e6),
    sensitivity=st.floats(0.0, 1.0),
)
def test_what_is_written_is_read(
    tmp_path: Path, names: list[str], heldout: str, share: float, norm: float, sensitivity: float
) -> None:
    config = replace(
        CONFIG, names=tuple(names), heldout=heldout, max_share=share, max_update_norm=norm, sensitivity=sensitivity
    )
    (tmp_path / "server.toml").write_text(config.to_toml(), encoding="utf-8")
    assert ServerConfig.read(tmp_path) == config


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fleet-port = 0", "between 1 and 65535"),
        ("fleet-port = 20001", "must differ"),
        ("fleet-port = true", "wrong type"),
        ("max-share = 0.0", "max-share"),
        ("max-share = nan", "max-share"),
        ("max-update-norm = -1", "max-update-norm"),
        ("sensitivity = 1.5", "sensitivity must lie"),
        ("fleet-prt = 9092", "Did you mean fleet-port?"),
        ("names = []", "names"),
        ("colour = 1", "unknown keys: colour"),
        ("names = [", "not valid TOML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, line: str, said: str) -> None:
    key = line.split(" = ", maxsplit=1)[0]
    text = "\n".join(kept for kept in CONFIG.to_toml().splitlines() if not kept.startswith(f"{key} "))
    (tmp_path / "server.toml").write_text(f"{text}\n{line}\n")
    with pytest.raises(PlanError, match=said):
        ServerConfig.read(tmp_path)


@pytest.mark.parametrize("key", ["names", "fleet-address", "fleet-port", "control-port", "health-port"])
def test_a_missing_setting_is_named(tmp_path: Path, key: str) -> None:
    kept = [line for line in CONFIG.to_toml().splitlines() if not line.startswith(f"{key} ")]
    (tmp_path / "server.toml").write_text("\n".join(kept))
    with pytest.raises(PlanError, match=rf"server\.toml lacks {key}\."):
        ServerConfig.read(tmp_path)


def test_init_makes_a_folder_once(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> None:
    make_nodule_store(tmp_path / "heldout")
    config = make_server(tmp_path / "srv", ["localhost", "10.0.0.1", "localhost"], 9092, tmp_path / "heldout")
    assert ServerConfig.read(tmp_path / "srv") == config
    assert config.names == ("localhost", "10.0.0.1")
    assert config.fleet_address == "0.0.0.0"
    assert Path(config.heldout) == tmp_path / "heldout"
    before = (tmp_path / "srv" / "ca.key").read_bytes()
    with pytest.raises(StorageError, match="holds an aggregator already"):
        make_server(tmp_path / "srv", ["localhost"], 9092, None)
    assert (tmp_path / "srv" / "ca.key").read_bytes() == before


def test_init_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="not empty"):
        make_server(tmp_path, ["localhost"], 9092, None)
    with pytest.raises(StorageError, match="no prepared store"):
        make_server(tmp_path / "srv", ["localhost"], 9092, tmp_path / "nowhere")
    assert not (tmp_path / "srv").exists()
    assert make_server(tmp_path / "srv", ["localhost"], 9092, None).fleet_address == "127.0.0.1"


def test_a_listener_takes_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert port_taken("127.0.0.1", port)
    assert not port_taken("127.0.0.1", port)


def test_reference_patients_may_be_named_by_the_folder_of_the_site_that_prepared_them(
    tmp_path: Path, make_nodule_store: Callable[..., RecordStore]
) -> None:
    make_nodule_store(tmp_path / "reference" / "store")
    for named in (tmp_path / "reference", tmp_path / "reference" / "store"):
        assert find_heldout(named) == named


def test_a_raw_export_is_refused_with_how_to_prepare_it(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(StorageError, match="fedward-site intake reference"):
        make_server(tmp_path / "srv", ["localhost"], 9092, tmp_path / "export")
    assert not (tmp_path / "srv").exists()
