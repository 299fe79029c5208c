from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import PlanError
from simulations.partition import VENDOR_SCANS, by_dirichlet, by_vendor_shares, evenly, resized

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
seeds = st.integers(0, 2**32)


@PROPERTY
@given(st.integers(1, 12), st.integers(0, 800), seeds)
def test_vendor_shares_deal_every_patient_once_and_leave_no_hospital_empty(sites, more, seed):
    patients = sites + more
    parts = by_vendor_shares(patients, sites, np.random.default_rng(seed))
    assert sorted(p for part in parts for p in part) == list(range(patients))
    assert len(parts) == sites
    assert all(parts)


def test_four_hospitals_have_the_vendors_shares():
    sizes = [len(part) for part in by_vendor_shares(740, 4, np.random.default_rng(7))]
    exact = np.array(list(VENDOR_SCANS.values())) / sum(VENDOR_SCANS.values()) * 740
    assert sizes == [485, 149, 55, 51]
    np.testing.assert_allclose(sizes, exact, atol=3)


@PROPERTY
@given(st.lists(st.booleans(), min_size=40, max_size=300), st.integers(1, 5), st.floats(0.5, 100), seeds)
def test_dirichlet_deals_every_patient_once_and_leaves_no_hospital_empty(labels, sites, alpha, seed):
    parts = by_dirichlet(labels, sites, alpha, np.random.default_rng(seed))
    assert sorted(p for part in parts for p in part) == list(range(len(labels)))
    assert len(parts) == sites
    assert all(parts)


def test_a_small_concentration_skews_sizes_and_malignancy_and_a_large_one_does_not():
    labels = [True, False] * 370

    def spread(alpha):
        sizes, shares = [], []
        for seed in range(20):
            parts = by_dirichlet(labels, 4, alpha, np.random.default_rng(seed))
            sizes.append(np.std([len(part) for part in parts]))
            shares.append(np.std([np.mean([labels[p] for p in part]) for part in parts]))
        return np.mean(sizes), np.mean(shares)

    skewed, alike = spread(0.5), spread(1000)
    assert skewed[0] > 10 * alike[0]
    assert skewed[1] > 10 * alike[1]


@PROPERTY
@given(st.integers(1, 50), st.integers(1, 6), st.integers(1, 30), seeds)
def test_evenly_uses_no_patient_again_before_all_have_been_used(patients, sites, each, seed):
    parts = evenly(patients, sites, each, np.random.default_rng(seed))
    assert [len(part) for part in parts] == [each] * sites
    uses = Counter(p for part in parts for p in part)
    assert max(uses.values()) - min(uses[p] for p in range(patients)) <= 1


def test_resized_repeats_or_cuts_a_hospitals_own_patients():
    assert resized(((1, 2), (3, 4, 5, 6)), 3) == ((1, 2, 1), (3, 4, 5))


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        (lambda rng: by_vendor_shares(3, 4, rng), "3 patients cannot be split over 4 hospitals"),
        (lambda rng: by_vendor_shares(3, 0, rng), "at least one hospital, not 0"),
        (lambda rng: by_dirichlet([True] * 9, 2, 0.0, rng), "must be a positive number"),
        (lambda rng: by_dirichlet([True] * 9, 2, float("nan"), rng), "must be a positive number"),
        (lambda rng: by_dirichlet([True] * 9, 9, 0.01, rng), "Choose a larger concentration"),
        (lambda rng: evenly(5, 2, 0, rng), "Cannot give 0"),
        (lambda rng: resized(((1,),), 0), "at least one patient"),
    ],
)
def test_an_impossible_split_is_one_clear_sentence(split, sentence):
    with pytest.raises(PlanError, match=sentence):
        split(np.random.default_rng(0))
