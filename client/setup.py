"""Make a hospital's folder, and fill its store: what ``fedward-site init`` and ``fedward-site intake`` do."""

import os
import shutil
from pathlib import Path

from cryptography import x509

from client.changes import trust
from client.config import SitePolicy
from client.folder import LEDGER, POLICY, Folder, open_books
from client.intake.exports import holds_glucose
from client.intake.glucose import GlucoseReport, prepare_glucose
from client.intake.glucose_formats import read_mapping
from client.intake.identities import Identities, read_identities
from client.intake.links import LINKS, add_links, read_links
from client.intake.nodules import IntakeReport, Progress, prepare_nodules
from client.intake.pseudonyms import load_or_create_secret
from client.keys import make_key
from shared.errors import IntakeError, StorageError
from shared.files import storage_errors, sync_directory, write_atomic
from shared.records import STORES, RecordStore, store_path, stores_in

AUTHORITY, PSEUDONYMS, ANNOTATIONS = "ca.crt", "pseudonyms.key", "annotations.csv"


def init_site(folder: Path, policy: SitePolicy, authority: Path, signing: Path | None = None) -> None:
    """Make a site's folder: keys, policy, certificate, empty ledger and audit log. It appears whole or not at all.

    Args:
        folder: New.
        policy: Becomes ``site.toml``.
        authority: The server's ``ca.crt``.
        signing: The server's ``signing.pub``, if the hospital has it.

    Raises:
        StorageError: If the folder exists or cannot be written, or a file of the server's is not what it must be.
        PolicyError: If the name does not fit a key.
    """
    if os.path.lexists(folder):
        raise StorageError(f"{folder} exists. A site is made once: its ledger must not be lost. Name a new folder.")
    certificate = _read_certificate(authority)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(mode=0o700)
        policy.write(temporary / POLICY)
        write_atomic(temporary / AUTHORITY, certificate)
        load_or_create_secret(temporary / PSEUDONYMS)
        make_key(temporary, policy.name, policy.declared_patients)
        open_books(temporary)
        (temporary / LEDGER).chmod(0o600)  # it holds the keys of open releases
        Folder(temporary).audit.note("configured", policy=policy.digest)
        if signing is not None:
            trust(temporary, signing)
        with storage_errors(folder):
            sync_directory(temporary)
            temporary.rename(folder)
            sync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_annotations(annotations: Path | None, dicom_dir: Path) -> Path:
    """Return the annotations where they are named, or else inside the export; by default its annotations.csv.

    Raises:
        IntakeError: If none are named and none are there.
    """
    if annotations is None:
        inside = dicom_dir / ANNOTATIONS
        if not os.path.lexists(inside):
            raise IntakeError(
                f"{dicom_dir.name or dicom_dir} holds DICOM files and no {ANNOTATIONS}; say with --annotations where "
                "the CSV of their nodules is."
            )
        return inside
    inside = dicom_dir / annotations
    return inside if not annotations.exists() and inside.exists() else annotations


def fill_store(
    site: Folder,
    export: Path,
    annotations: Path | None,
    *,
    same_patient: Path | None = None,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> tuple[IntakeReport | GlucoseReport, bool]:
    """Prepare an export as the site's store of its kind; say whether an older store was replaced.

    The stores of other kinds stay as they are. The old store serves until the new one is complete, and the audit log
    names the new one before it serves.

    Args:
        site: Whose store it becomes.
        export: With ``annotations`` a folder of DICOM; without, a CSV of glucose readings or a folder of them, read
            by the table ``[glucose]`` of ``site.toml``, or a folder of DICOM with its ``annotations.csv``.
        annotations: CSV of nodules, or None.
        same_patient: Table of identifiers that are one person, kept for this and every later intake; or None.
        workers: Processes that read DICOM.
        on_progress: Told how far the work is.

    Raises:
        IntakeError: If the export or the table cannot be read, or nothing usable is left of the export.
        StorageError: If the folder cannot be written.
    """
    if not (site.folder / POLICY).exists():
        raise StorageError(f"There is no site at {site.folder}. Make one with fedward-site init.")
    secret_file = site.folder / PSEUDONYMS
    if not secret_file.exists():
        raise StorageError(
            f"The secret {secret_file} is missing. Restore it: with another, every patient is a new one."
        )
    if export.resolve() in (site.folder.resolve(), *site.folder.resolve().parents):
        raise IntakeError("The export must not hold the site's own folder. Name the folder with the export only.")
    new, secret = _clear_way(site), load_or_create_secret(secret_file)
    if same_patient is not None:
        add_links(site.folder / LINKS, read_links(same_patient, secret))
    identities = identities_of(site.folder)
    report: IntakeReport | GlucoseReport
    if annotations is None and holds_glucose(export):
        mapping = read_mapping(site.folder / POLICY)
        report = prepare_glucose(export, new, secret, mapping=mapping, identities=identities, on_progress=on_progress)
    else:
        marked = find_annotations(annotations, export)
        report = prepare_nodules(
            export, marked, new, secret, identities=identities, on_progress=on_progress, workers=workers
        )
    return report, _install(site, new)


def identities_of(folder: Path) -> Identities:
    """Return who is one patient at a site. Raises StorageError or IntakeError."""
    return read_identities(folder / POLICY, folder / LINKS)


def _clear_way(site: Folder) -> Path:
    """Tidy up what an earlier intake left that died; return where the new store is made."""
    new, stores = site.folder / ".store.new", site.folder / STORES
    with storage_errors(stores):
        stores.mkdir(mode=0o700, exist_ok=True)
        for left_over in (new, *site.folder.glob("..store.new.*.tmp")):
            shutil.rmtree(left_over, ignore_errors=True)
        for old in stores.glob(".*.old"):
            store = stores / old.name[1:].removesuffix(".old")
            if not store.exists():  # died between the two renames of _install
                old.rename(store)
            shutil.rmtree(old, ignore_errors=True)
    return new


def _install(site: Folder, new: Path) -> bool:
    """Put the new store into the place of its kind; say whether it replaced another."""
    made = RecordStore.open(new)
    store = store_path(site.folder, made.kind)
    old, before = store.with_name(f".{made.kind}.old"), stores_in(site.folder).get(made.kind)
    site.audit.note("prepared", store=made.digest, store_kind=made.kind)
    with storage_errors(store):
        if before is not None:
            before.rename(old)  # from wherever an earlier version kept it
        new.rename(store)
        sync_directory(store.parent)
        sync_directory(site.folder)
        shutil.rmtree(old, ignore_errors=True)
    return before is not None


def _read_certificate(path: Path) -> bytes:
    with storage_errors(path):
        content = path.read_bytes()
    try:
        x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise StorageError(f"{path} is no PEM certificate. Ask the server's operator for ca.crt.") from error
    return content
