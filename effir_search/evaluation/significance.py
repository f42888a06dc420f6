"""Is a difference between two runs more than chance? Paired tests, and Holm's correction for their number.

A further test is one more entry of ``TESTS``: its p-values are then corrected and shown like those of the others.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# Values of a query that are no further apart are a tie: measures are sums of fractions, rounded at about 1e-16.
TIE = 1e-9
# Sign patterns held in memory at a time; it changes neither draw nor result.
BATCH = 500


def t_test(differences: np.ndarray) -> float | None:
    """Return the two-sided p of the paired t-test, 1 if all differences are 0, None where it is undefined.

    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    if len(differences) < 2:
        return None
    if not differences.any():
        return 1.0
    if np.ptp(differences) <= TIE:  # No variance to divide by.
        return None
    return float(stats.ttest_1samp(differences, 0).pvalue)


def randomisation_test(differences: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p of the paired randomisation test of the mean.

    If it is chance which of two runs gave which of a query's two values, every pattern of signs is as likely. p is
    the share of patterns whose mean is at least as far from 0: of all where ``resamples`` permits it, else of that
    many drawn with ``seed``, plus the one observed. It depends on neither the order of queries nor that of the runs.

    Source: Smucker, Allan and Carterette, A comparison of statistical significance tests for information retrieval
    evaluation, CIKM 2007.
    """
    differences = differences[differences != 0]  # A tie is 0 under both signs.
    if len(differences) < 2:
        return 1.0
    # One order and one direction, so that the same patterns meet the same differences.
    differences = np.sort(differences * np.sign(differences.sum()))
    return float(
        stats.permutation_test(
            (differences,),
            _distance_from_0,
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            batch=BATCH,
            alternative="greater",
            rng=np.random.default_rng(seed),
        ).pvalue
    )


class PairedTest(NamedTuple):
    """A paired test and how comparisons show it.

    Attributes:
        title: What it is called.
        column: Heads its p-values.
        mark: Stands behind the means of runs that differ from the baseline by it.
        p: Takes differences, ``(queries,)``, and by keyword ``resamples`` and ``seed``; returns the two-sided p, or
            None where the test is undefined.
    """

    title: str
    column: str
    mark: str
    p: Callable[..., float | None]


def _t_test(differences: np.ndarray, **_drawing: int) -> float | None:
    return t_test(differences)


TESTS: dict[str, PairedTest] = {
    "t_test": PairedTest("t-test", "t-test p", "†", _t_test),
    "randomisation": PairedTest("randomisation test", "randomisation p", "‡", randomisation_test),
}


class PValue(NamedTuple):
    """A test's p: alone, and corrected by ``holm`` over all comparisons; None where the test is undefined."""

    p: float | None
    holm: float | None


def tested(differences: Sequence[np.ndarray], *, resamples: int, seed: int) -> list[dict[str, PValue]]:
    """Return for each comparison the p of each of ``TESTS``, corrected for the number of comparisons.

    Args:
        differences: Of each comparison ``(queries,)``; ties are 0.
        resamples: See ``randomisation_test``.
        seed: Likewise.
    """
    results: list[dict[str, PValue]] = [{} for _ in differences]
    for name, test in TESTS.items():
        p_values = [test.p(values, resamples=resamples, seed=seed) for values in differences]
        for result, p, corrected in zip(results, p_values, holm(p_values), strict=True):
            result[name] = PValue(p, corrected)
    return results


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for their number, in their order; None is no test, and stays.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none becomes less than the one before, nor
    more than 1.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected = list(p_values)
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[place] = largest
    return corrected


def _distance_from_0(differences: np.ndarray, axis: int) -> np.ndarray:
    """Absolute sum, in which patterns that tie are equal whatever the rounding of floats."""
    return np.abs(differences.sum(axis=axis)).round(9)
