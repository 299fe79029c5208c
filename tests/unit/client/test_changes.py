"""Another declared number and another key: what enrolment says changes, what was spent does not."""

import tomllib
from pathlib import Path

import pytest

from client.audit_check import verify
from client.changes import declare, renew_key, trust
from client.config import SitePolicy
from client.folder import open_books
from client.keys import make_key, read_key
from client.site import Site
from server.members import Members, read_site_key
from shared.errors import PolicyError, StorageError
from shared.provenance.keys import SIGNING_PUB, ensure_signing_key, fingerprint


@pytest.fixture
def site(tmp_path: Path) -> Path:
    policy = SitePolicy(name="h1", declared_patients=200, tasks=("nodule-classification",), max_epsilon=8.0)
    folder = tmp_path / "H1"
    folder.mkdir()
    policy.write(folder / "site.toml")
    make_key(folder, policy.name, policy.declared_patients)
    open_books(folder)
    return folder


def test_the_declared_number_changes_in_both_files_and_nothing_else(site: Path, tmp_path: Path) -> None:
    Members(tmp_path).enrol(read_site_key(site / "site.pub"), None, None)
    with (site / "site.toml").open("a") as handle:
        handle.write('\n# ours\n[glucose]\npatient = "MRN"\ndeclared-patients = 7\n')
    before, key = (site / "site.toml").read_text(), read_site_key(site / "site.pub")
    policy = declare(site, 5000)
    assert SitePolicy.read(site / "site.toml") == policy
    assert (policy.declared_patients, policy.max_delta) == (5000, pytest.approx(0.1 / 5000))
    changed = before.replace("declared-patients = 200", "declared-patients = 5000").replace("0.0005", "2e-05")
    assert (site / "site.toml").read_text() == changed
    now = read_site_key(site / "site.pub")
    assert (now.public_key, now.declared_patients) == (key.public_key, 5000)
    assert Members(tmp_path).redeclare(now, None, None, []) is not None
    assert not verify(Site(site).audit).problems
    assert policy.digest in (site / "audit.jsonl").read_text()


def test_a_max_delta_of_the_stewards_own_stays_or_stands_in_the_way(site: Path) -> None:
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text.replace("max-delta = 0.0005", "max-delta = 1e-4  # ours"))
    assert declare(site, 300).max_delta == 1e-4
    assert "max-delta = 1e-4  # ours" in (site / "site.toml").read_text()
    before = {path.name: path.read_bytes() for path in site.iterdir()}
    with pytest.raises(PolicyError, match="max-delta must be positive and at most 1/declared-patients"):
        declare(site, 20_000)
    assert {path.name: path.read_bytes() for path in site.iterdir()} == before


def test_a_file_without_max_delta_and_one_that_cannot_be_changed(site: Path) -> None:
    (site / "site.toml").write_text('name = "h1"\ntasks = []\nmax-epsilon = 1.0\ndeclared-patients=200#why\n')
    assert declare(site, 400).max_delta == pytest.approx(0.1 / 400)
    assert (site / "site.toml").read_text().endswith("declared-patients=400#why\n")
    (site / "site.toml").write_text('name = "h1"\ntasks = []\nmax-epsilon = 1.0\n"declared-patients" = 200\n')
    with pytest.raises(PolicyError, match="Write into it: declared-patients = 50"):
        declare(site, 50)
    assert tomllib.loads((site / "site.toml").read_text())["declared-patients"] == 200


def test_a_new_key_keeps_everything_but_the_key(site: Path) -> None:
    old, books = read_key(site), (site / "ledger.sqlite").read_bytes()
    renew_key(site)
    new, public = read_key(site), read_site_key(site / "site.pub")
    assert new.private_numbers() != old.private_numbers()
    assert (public.name, public.declared_patients) == ("h1", 200)
    assert (site / "site.key").stat().st_mode & 0o777 == 0o600
    assert (site / "ledger.sqlite").read_bytes() == books
    (site / "site.key").unlink()  # died in between
    with pytest.raises(StorageError):
        declare(site, 300)
    renew_key(site)
    assert read_site_key(site / "site.pub").public_key != public.public_key


def test_a_trusted_key_is_added_and_named_in_the_log(site: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ensure_signing_key(tmp_path / name)
    first, second = (trust(site, tmp_path / name / SIGNING_PUB) for name in ("a", "b"))
    assert trust(site, tmp_path / "a" / SIGNING_PUB) == first
    assert list(map(fingerprint, Site(site).trusted)) == [first, second]
    noted = [entry.fields["key"] for entry in Site(site).audit.read()[0].entries if entry.event == "trusted"]
    assert noted == [first, second, first]
    assert not verify(Site(site).audit).problems
    with pytest.raises(StorageError, match="Ask the server's operator"):
        trust(site, tmp_path / "nowhere.pub")
    with pytest.raises(StorageError, match=r"no signing\.pub"):
        trust(site, site / "site.pub")
    assert len(Site(site).trusted) == 2
