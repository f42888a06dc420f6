import itertools

import numpy as np
import pytest
from scipy import stats

from effir_search.evaluation import bootstrap
from effir_search.evaluation.bootstrap import interval, resample


@pytest.fixture
def figures():
    """Of two models on two collections of different sizes."""
    rng = np.random.default_rng(2)
    return {"many": rng.random((2, 120)), "few": rng.random((2, 15)) ** 2}


def test_the_first_row_is_both_means_by_hand():
    means = resample({"a": np.array([[0.2, 0.4]]), "b": np.array([[0.9, 0.5, 0.1, 0.1]])})
    assert means.macro[0] == pytest.approx([0.35])  # ((0.2 + 0.4) / 2 + (0.9 + 0.5 + 0.1 + 0.1) / 4) / 2
    assert means.micro[0] == pytest.approx([2.2 / 6])


def test_samples_of_two_queries_are_those_that_there_are_by_hand():
    # Of queries of 0 and 1 a sample of two has the mean 0, 1/2 or 1, with chances of 1/4, 1/2 and 1/4.
    macro = resample({"a": np.array([[0.0, 1.0]])}, seed=5).macro[1:, 0]
    shares = [(macro == value).mean() for value in (0, 0.5, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)  # one standard error is 0.005


def test_the_interval_of_one_collection_is_that_of_scipy():
    values = np.random.default_rng(3).random(80)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    found = interval(resample({"a": values[None]}, seed=1).macro[:, 0])
    assert found == pytest.approx((expected.low, expected.high), abs=0.003)  # the mean's standard error is 0.03


def test_the_interval_of_a_difference_is_that_of_the_pairs_in_scipy():
    rng = np.random.default_rng(4)
    first = rng.random(60)
    second = first + rng.normal(0.02, 0.05, 60)
    means = resample({"a": np.stack([first, second])}, seed=2).macro
    expected = stats.bootstrap((second - first,), np.mean, method="percentile", rng=2).confidence_interval
    assert interval(means[:, 1] - means[:, 0]) == pytest.approx((expected.low, expected.high), abs=0.002)


def test_the_mean_of_queries_weighs_collections_by_their_queries(figures):
    means = resample(figures, seed=1)
    together = np.concatenate(list(figures.values()), axis=1)
    assert means.micro[0] == pytest.approx(together.mean(axis=1))
    # Drawn within collections, the variance of the mean of all is the sum of n * var over the square of their number.
    variance = sum(values[0].var() * values.shape[1] for values in figures.values()) / 135**2
    assert means.micro[1:, 0].std() == pytest.approx(np.sqrt(variance), rel=0.05)


def test_over_collections_of_one_value_each_the_samples_are_those_of_the_values():
    # Three collections whose queries are all alike: a sample is three of their values, each as likely.
    figures = {name: np.full((1, 4), value) for name, value in (("a", 0.1), ("b", 0.4), ("c", 0.7))}
    macro = resample(figures, over_collections=True).macro[1:, 0]
    possible = {round(sum(values) / 3, 9) for values in itertools.product((0.1, 0.4, 0.7), repeat=3)}
    assert set(macro.round(9)) == possible
    assert (macro.round(9) == 0.1).mean() == pytest.approx(1 / 27, abs=0.01)
    assert resample(figures).macro[1:, 0] == pytest.approx(np.full(10_000, 0.4))


def test_all_models_get_the_same_queries_and_collections(figures):
    doubled = {name: np.stack([values[0], values[0] / 2]) for name, values in figures.items()}
    for over_collections in (False, True):
        means = resample(doubled, over_collections=over_collections)
        assert means.macro[:, 1] == pytest.approx(means.macro[:, 0] / 2)
        assert means.micro[:, 1] == pytest.approx(means.micro[:, 0] / 2)


def test_how_many_draws_are_in_memory_changes_nothing(figures, monkeypatch):
    expected = resample(figures, seed=7)
    monkeypatch.setattr(bootstrap, "DRAWS", 1000)
    assert np.allclose(resample(figures, seed=7).macro, expected.macro)
