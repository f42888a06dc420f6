import numpy as np
import pytest

from effir_search.evaluation.benchmark import Benchmark, format_benchmark, resampled_means
from effir_search.evaluation.bootstrap import RESAMPLES


@pytest.fixture
def figures():
    """Of three models on two collections: the second is half as good as the first at every query, the third alike."""
    rng = np.random.default_rng(1)
    first = {"many": rng.random(200), "few": rng.random(30) ** 3}
    return {name: np.stack([values, values / 2, values]) for name, values in first.items()}


def test_the_first_row_is_the_mean_over_collections_of_the_means_over_queries(figures):
    means = resampled_means(figures)
    assert means.shape == (RESAMPLES + 1, 3)
    expected = (sum(figures["many"][0]) / 200 + sum(figures["few"][0]) / 30) / 2
    assert means[0] == pytest.approx([expected, expected / 2, expected])


def test_all_models_are_given_the_same_queries(figures):
    means = resampled_means(figures)
    assert means[:, 1] / means[:, 0] == pytest.approx(np.full(len(means), 0.5))
    assert np.array_equal(means[:, 2], means[:, 0])


def test_the_samples_spread_as_the_mean_of_such_queries_does(figures):
    # The variance of a mean of n drawn values is theirs by n; of the mean of two such means a quarter of their sum.
    variance = sum(values[0].var() / values.shape[1] for values in figures.values()) / 4
    drawn = resampled_means(figures)[1:, 0]
    assert drawn.std() == pytest.approx(np.sqrt(variance), rel=0.05)  # 10,000 samples: 0.7 % is one standard error
    assert drawn.mean() == pytest.approx(resampled_means(figures)[0, 0], abs=4 * np.sqrt(variance / RESAMPLES))


def test_the_seed_is_that_of_the_draws(figures):
    assert np.array_equal(resampled_means(figures, seed=3), resampled_means(figures, seed=3))
    assert not np.array_equal(resampled_means(figures, seed=3)[1:], resampled_means(figures, seed=4)[1:])


def test_a_model_that_finds_nothing_has_no_share_to_be_kept():
    sizes = dict.fromkeys(("parameters", "flops"), 10)
    measured = Benchmark((sizes, sizes), 7.0, (1.0, 2.0), 2.0, 0.5, {"a": (0.0, 0.25)}, {"a": 3}, None)
    row = next(line for line in format_benchmark(measured).splitlines() if line.startswith("nDCG@10 a"))
    assert row.split() == ["nDCG@10", "a", "0.0000", "0.2500", "-"]
