"""Identifiers that the steward says are one person are one patient, in every intake from then on."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.intake.glucose import prepare_glucose
from client.intake.identities import Identities, IssuerRule, read_identities
from client.intake.links import LINKS, Links, add_links, read_links
from client.intake.pseudonyms import PatientIdentity, pseudonym
from client.predict import predict
from server.checkpoints import save_checkpoint
from shared.errors import IntakeError, StorageError
from shared.records import RecordStore
from shared.tasks.registry import find_task

SECRET = bytes(range(32))
AS_WRITTEN = IssuerRule()
CANARY = "Kanarienvogel-4711"


def key(number, issuer=""):
    return pseudonym(SECRET, PatientIdentity(issuer, number))


def linked(tmp_path, text, rule=AS_WRITTEN):
    """Give a table to a site's folder and return what its next intake knows."""
    table = tmp_path / "links.csv"
    table.write_text(text)
    policy = tmp_path / "site.toml"
    policy.write_text(f'[intake]\nissuer = "{rule.issuer}"\n')
    add_links(tmp_path / LINKS, read_links(table, SECRET))
    return read_identities(policy, tmp_path / LINKS)


def from_issuer(name):
    return lambda dataset, _k: setattr(dataset, "IssuerOfPatientID", name) if name else None


def waves(path, *patients, readings=230):
    at = np.datetime_as_string(np.datetime64("2024-01-01T00:00") + np.arange(readings) * np.timedelta64(5, "m"))
    rows = ["patient_id,timestamp,glucose_mg_dl"]
    for number, patient in enumerate(patients):
        days = [text.replace("2024-01", f"2024-{number + 1:02}") for text in at]
        rows += [f"{patient},{time},{120 + 30 * np.sin(k / 8):.1f}" for k, time in enumerate(days)]
    path.write_text("\n".join(rows))
    return path


def test_two_identifiers_are_one_patient_in_both_intakes_and_k_records_are_drawn_over_both(export, tmp_path):
    identities = linked(tmp_path, "P-1,P-2\n")
    for number, patient in enumerate(("P-1", "P-2", "P-3")):
        export.annotate(export.cube(patient=patient, value=-400 + 200 * number))
    report, store = export.prepare(identities=identities)
    one = min(key("P-1"), key("P-2"))
    assert report.patients == 2
    assert {item.key: len(item.arrays["malignant"]) for item in store.items()} == {one: 6, key("P-3"): 3}
    (of_both,) = [p for p in range(len(store)) if store.keys[p].tobytes() == one]
    patients = find_task("ct-synthesis").load(store)
    seen = {
        float(patients.draw(torch.tensor([of_both]), 1, torch.Generator().manual_seed(seed))["image"].mean())
        for seed in range(20)
    }
    assert len(seen) == 2  # one record is drawn of both identifiers together

    glucose = waves(tmp_path / "glucose.csv", "P-1", "P-2", "P-3")
    found = prepare_glucose(glucose, tmp_path / "glucose", SECRET, identities=identities)
    records = RecordStore.open(tmp_path / "glucose")
    assert found.patients == 2
    assert {item.key: len(item.arrays["glucose"]) for item in records.items()} == {one: 460, key("P-3"): 230}


def test_links_join_and_every_later_table_adds_to_them(tmp_path):
    first = linked(tmp_path, "A,B\n\nC;D\n")
    assert len({first.key(SECRET, PatientIdentity("", name)) for name in "ABCD"}) == 2
    both = linked(tmp_path, '"B",C\n')
    assert {both.key(SECRET, PatientIdentity("", name)) for name in "ABCD"} == {min(map(key, "ABCD"))}
    assert both.key(SECRET, PatientIdentity("", "E")) == key("E")


def test_an_identifier_without_issuer_is_that_under_every_issuer_and_one_with_it_under_this_only(export, tmp_path):
    exact = linked(tmp_path, "NORTH,A,SOUTH,B\n")
    for patient, issuer in (("A", "NORTH"), ("A", "WEST"), ("B", "SOUTH"), ("B", "")):
        export.annotate(export.cube(patient=patient, edit=from_issuer(issuer)))
    assert export.prepare(identities=exact)[0].patients == 3
    any_issuer = linked(tmp_path, "B,C\n")  # now ("", "B") is in it, beside ("SOUTH", "B")
    assert export.prepare(identities=any_issuer)[0].patients == 2
    everybody = linked(tmp_path, "A,C\n")
    assert export.prepare(identities=everybody)[0].patients == 1


def test_a_link_under_an_issuer_still_holds_where_issuers_are_ignored(export, tmp_path):
    identities = linked(tmp_path, "NORTH,A,SOUTH,B\n", IssuerRule("ignore"))
    for patient, issuer in (("A", "NORTH"), ("B", "")):
        export.annotate(export.cube(patient=patient, edit=from_issuer(issuer)))
    assert export.prepare(identities=identities)[0].patients == 1


def test_slices_of_one_person_under_two_identifiers_are_one_series(export, tmp_path):
    def renamed(dataset, k):
        dataset.PatientID = "P-1" if k < 3 else "P-2"

    export.annotate(export.cube(edit=renamed))
    report, _ = export.prepare(identities=linked(tmp_path, "P-1,P-2\n"))
    assert (report.patients, report.rejected) == (1, {})


def test_the_file_of_a_patient_who_is_named_by_it_can_be_linked(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for patient in ("anna", "1234"):
        lines = waves(folder / f"{patient}.csv", "x").read_text().splitlines()
        head = "Timestamp (YYYY-MM-DDThh:mm:ss),Event Type,Event Subtype,Glucose Value (mg/dL)"
        shift = [line.replace("2024-01", "2024-02" if patient == "anna" else "2024-01") for line in lines[1:]]
        body = [f"{line.split(',')[1]},EGV,,{line.split(',')[2]}" for line in shift]
        (folder / f"{patient}.csv").write_text("\n".join([head, *body]))
    identities = linked(tmp_path, "anna,1234\n")
    assert prepare_glucose(folder, tmp_path / "s", SECRET).patients == 2
    assert prepare_glucose(folder, tmp_path / "s", SECRET, identities=identities).patients == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12), st.randoms())
def test_groups_are_the_transitive_closure_in_any_order(pairs, shuffle):
    names = [bytes([n]) * 16 for n in range(10)]
    groups = [{n} for n in range(10)]
    for one, other in pairs:
        whole = groups[one] | groups[other]
        for n in whole:
            groups[n] = whole
    shuffled = random.Random(shuffle.random()).sample(pairs, len(pairs))
    links = Links.of(((names[a], names[a]), (names[b], names[b])) for a, b in shuffled)
    assert [links.together(name, name) for name in names] == [names[min(group)] for group in groups]


@pytest.mark.parametrize(
    "row",
    [CANARY, f"{CANARY},", f",{CANARY}", f"{CANARY},b,c", f"{CANARY},a,b,c,d", f"{CANARY}\0,b", "x" * 200_000 + ",b"],
)
def test_a_bad_row_is_refused_by_its_line_and_prints_no_identifier(tmp_path, row):
    table = tmp_path / "links.csv"
    table.write_text(f"A,B\n\n{row}\nC,D\n")
    with pytest.raises(IntakeError, match=r"Line 3 of links\.csv does not link two identifiers") as caught:
        read_links(table, SECRET)
    assert CANARY not in str(caught.value)
    assert caught.value.__context__ is None


def test_what_is_kept_is_the_owners_alone_and_holds_no_identifier(tmp_path):
    linked(tmp_path, f"{CANARY},B\nN,{CANARY},S,C\n")
    kept = tmp_path / LINKS
    assert kept.stat().st_mode & 0o777 == 0o600
    assert CANARY.encode() not in kept.read_bytes()
    assert len(json.loads(kept.read_bytes())["links"]) == 2
    kept.write_text("{}")
    with pytest.raises(StorageError, match="damaged"):
        Links.read(kept)


def test_an_empty_table_and_none_are_refused(tmp_path):
    (tmp_path / "links.csv").write_text("\n")
    with pytest.raises(IntakeError, match="links nobody"):
        read_links(tmp_path / "links.csv", SECRET)
    with pytest.raises(IntakeError, match=r"Cannot read none\.csv: No such file"):
        read_links(tmp_path / "none.csv", SECRET)


def test_predictions_carry_the_one_pseudonym_of_linked_identifiers(export, tmp_path):
    identities = linked(tmp_path, "P-1,P-2\n")
    for patient in ("P-1", "P-2"):
        export.annotate(export.cube(patient=patient))
    model = find_task("nodule-classification").build()
    saved = save_checkpoint(tmp_path / "c", model, run="r", number=1, task="nodule-classification", plan_digest="p")
    out = tmp_path / "p.csv"
    predict(saved.path, export.dicom, export.annotations, out, secret=SECRET, identities=identities, pseudonymous=True)
    assert out.read_text().count(min(key("P-1"), key("P-2")).hex()) == 2


def test_without_links_everybody_is_alone():
    assert Identities().key(SECRET, PatientIdentity("N", "A")) == key("A", "N")
