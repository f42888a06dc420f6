"""Intervals of means over queries and over collections: the paired bootstrap."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
# Draws that are in memory at a time, of queries times samples; it changes neither draw nor result.
DRAWS = 4_000_000


class Means(NamedTuple):
    """Each model's means, ``(resamples + 1, models)``; row 0 is that of the queries as they are.

    Attributes:
        macro: The mean over collections of the means over their queries.
        micro: The mean over all queries.
    """

    macro: np.ndarray
    micro: np.ndarray


def resample(
    figures: Mapping[str, np.ndarray], *, seed: int = 0, over_collections: bool = False, resamples: int = RESAMPLES
) -> Means:
    """Return means of samples drawn with replacement, the same for every model: the paired bootstrap.

    Queries are drawn within each collection. The interval then is about other queries of these collections. Over
    collections as many collections are drawn first, and queries within each of them, so that it is about other
    collections as well; of a few collections it is coarse.

    Args:
        figures: By collection ``(models, queries)``.
        seed: Of the draws.
        over_collections: Draw collections too.
        resamples: Samples.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
    """
    generator = np.random.default_rng(seed)
    values = list(figures.values())
    macro, micro, queries = (np.zeros((resamples, len(values[0]))) for _ in range(3))
    for place in range(len(values)):
        chosen = generator.integers(len(values), size=resamples) if over_collections else np.full(resamples, place)
        for number, of_collection in enumerate(values):
            rows = np.flatnonzero(chosen == number)
            sums = _drawn_sums(of_collection, len(rows), generator)
            macro[rows] += sums / of_collection.shape[1] / len(values)
            micro[rows] += sums
            queries[rows] += of_collection.shape[1]
    together = np.concatenate(values, axis=1)
    whole = np.mean([of_collection.mean(axis=1) for of_collection in values], axis=0)
    return Means(np.vstack([whole, macro]), np.vstack([together.mean(axis=1), micro / queries]))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % interval of resampled figures, the first of which is the sample's own."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(low), float(high)


def _drawn_sums(values: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """Return the sums of so many samples of the queries, ``(number, models)``."""
    num_queries = values.shape[1]
    sums = [np.zeros((0, len(values)))]
    step = max(1, DRAWS // num_queries)
    for start in range(0, number, step):
        size = min(step, number - start)
        drawn = generator.integers(num_queries, size=(size, num_queries))
        drawn += num_queries * np.arange(size)[:, None]
        # How often each sample has each query, so that a sample costs a product, whatever the number of models.
        times = np.bincount(drawn.ravel(), minlength=size * num_queries).reshape(size, num_queries)
        sums.append(times @ values.T)
    return np.concatenate(sums)
