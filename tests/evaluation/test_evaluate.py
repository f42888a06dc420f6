"""Measures: by hand, and against the commands of ir-measures and of trec_eval as Pyserini ships it."""

import csv
import importlib.util
import io
import json
import logging
import random
import subprocess
import sys
from math import log2
from pathlib import Path

import ir_measures
import pytest
from ir_measures import AP, RR, P, Qrel, R, ScoredDoc, nDCG

from effir_search.evaluation.measures import (
    FORMATS,
    evaluate,
    evaluate_queries,
    evaluate_run,
    format_evaluation,
    parse_measures,
)

# q1: its positives are at ranks 2 and 4. q2: its only positive is at rank 1. q3: judged, not in the run.
QRELS = [Qrel("q1", "a", 1), Qrel("q1", "b", 2), Qrel("q1", "c", 0), Qrel("q2", "d", 1), Qrel("q3", "e", 1)]
RUN = [
    ScoredDoc("q1", "c", 0.9), ScoredDoc("q1", "b", 0.8), ScoredDoc("q1", "x", 0.7), ScoredDoc("q1", "a", 0.6),
    ScoredDoc("q2", "d", 0.5), ScoredDoc("q2", "x", 0.4),
]  # fmt: skip
MEASURES = [nDCG @ 10, R @ 2, RR @ 10, AP]
# Gains are the grades: (2 / log2(3) + 1 / log2(5)) / (2 / log2(2) + 1 / log2(3)).
NDCG_Q1 = (2 / log2(3) + 1 / log2(5)) / (2 + 1 / log2(3))
Q1 = {nDCG @ 10: NDCG_Q1, R @ 2: 1 / 2, RR @ 10: 1 / 2, AP: (1 / 2 + 2 / 4) / 2}
Q2 = {nDCG @ 10: 1.0, R @ 2: 1.0, RR @ 10: 1.0, AP: 1.0}
Q3 = {nDCG @ 10: 0.0, R @ 2: 0.0, RR @ 10: 0.0, AP: 0.0}
MEAN = {nDCG @ 10: (NDCG_Q1 + 1) / 3, R @ 2: 1.5 / 3, RR @ 10: 1.5 / 3, AP: 1.5 / 3}


def trec_files(folder, run=RUN, qrels=QRELS):
    """Write a run and TREC qrels; return their paths."""
    run_path, qrels_path = folder / "run.txt", folder / "qrels.txt"
    run_path.write_text("".join(f"{hit.query_id} Q0 {hit.doc_id} 1 {hit.score!r} tag\n" for hit in run))
    qrels_path.write_text("".join(f"{qrel.query_id} 0 {qrel.doc_id} {qrel.relevance}\n" for qrel in qrels))
    return run_path, qrels_path


# Values


def test_measures_of_each_query_are_those_worked_out_by_hand():
    evaluation = evaluate_queries(RUN, QRELS, MEASURES)
    assert list(evaluation.per_query) == ["q1", "q2", "q3"]
    for query_id, expected in {"q1": Q1, "q2": Q2, "q3": Q3}.items():
        assert evaluation.per_query[query_id] == pytest.approx(expected)


def test_a_judged_query_that_the_run_lacks_counts_0_and_is_named():
    evaluation = evaluate_queries(RUN, QRELS, MEASURES)
    assert evaluation.mean == pytest.approx(MEAN)
    assert evaluation.missing == ["q3"]


def test_the_mean_alone_is_the_mean_of_all_judged_queries():
    assert evaluate(RUN, QRELS, MEASURES) == pytest.approx(MEAN)


def test_measures_keep_the_order_they_are_given_in():
    assert list(evaluate(RUN, QRELS, MEASURES[::-1])) == MEASURES[::-1]


def test_a_query_that_is_not_judged_changes_nothing():
    run = [ScoredDoc("q9", "a", 1.0), *RUN]
    assert evaluate_queries(run, QRELS, MEASURES) == evaluate_queries(RUN, QRELS, MEASURES)


def test_the_order_of_the_hits_does_not_matter():
    assert evaluate_queries(RUN[::-1], QRELS, MEASURES) == evaluate_queries(RUN, QRELS, MEASURES)


def test_run_and_qrels_may_be_iterators():
    assert evaluate(iter(RUN), iter(QRELS), MEASURES) == evaluate(RUN, QRELS, MEASURES)


@pytest.mark.parametrize(("relevant", "rank"), [("b", 1), ("a", 2)])
def test_every_measure_ranks_tied_documents_by_descending_id(relevant, rank):
    run = [ScoredDoc("q", "a", 0.5), ScoredDoc("q", "b", 0.5)]
    found = evaluate(run, [Qrel("q", relevant, 1)], [nDCG @ 10, RR, RR @ 10, P @ 1, AP])
    expected = {nDCG @ 10: 1 / log2(rank + 1), RR: 1 / rank, RR @ 10: 1 / rank, P @ 1: 2 - rank, AP: 1 / rank}
    assert found == pytest.approx(expected)


def test_queries_without_a_positive_count_0_and_are_named():
    qrels = [*QRELS, Qrel("q4", "x", 0), Qrel("q5", "x", -1)]
    evaluation = evaluate_queries([*RUN, ScoredDoc("q4", "x", 1.0)], qrels, [RR @ 10])
    assert evaluation.mean == {RR @ 10: pytest.approx(1.5 / 5)}
    assert evaluation.per_query["q4"] == {RR @ 10: 0.0}
    assert evaluation.without_positive == ["q4", "q5"]
    assert evaluation.missing == ["q3", "q5"]


def test_queries_without_a_positive_can_be_left_out():
    qrels = [*QRELS, Qrel("q4", "x", 0), Qrel("q5", "x", 0)]
    run = [*RUN, ScoredDoc("q4", "x", 1.0)]
    evaluation = evaluate_queries(run, qrels, MEASURES, only_with_positives=True)
    assert evaluation.mean == pytest.approx(MEAN)
    assert list(evaluation.per_query) == ["q1", "q2", "q3"]
    assert evaluation.without_positive == ["q4", "q5"]
    assert evaluation.missing == ["q3"]


def test_beir_qrels_with_a_header_and_grades_of_0_average_over_every_judged_query(tmp_path):
    run_path, _ = trec_files(tmp_path)
    rows = [f"{qrel.query_id}\t{qrel.doc_id}\t{qrel.relevance}" for qrel in [*QRELS, Qrel("q4", "x", 0)]]
    (tmp_path / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    evaluation = evaluate_run(run_path, str(tmp_path / "test.tsv"), "RR@10")
    # Four judged queries; q3 is not in the run and q4 has no positive.
    assert evaluation.mean == {RR @ 10: pytest.approx(1.5 / 4)}


def test_only_queries_without_a_positive_are_an_error_if_those_are_left_out():
    with pytest.raises(ValueError, match="no judged query has a relevant document"):
        evaluate_queries(RUN, [Qrel("q1", "c", 0)], MEASURES, only_with_positives=True)


def test_a_run_of_other_queries_is_an_error_that_shows_a_query_of_each():
    message = "no query of the run is judged, .*: 'q1' is a query of the run, 'x1' one of the qrels"
    with pytest.raises(ValueError, match=message):
        evaluate(RUN, [Qrel("x1", "a", 1)], MEASURES)
    with pytest.raises(ValueError, match=message):
        evaluate_queries(RUN, [Qrel("q1", "a", 0), Qrel("x1", "a", 1)], MEASURES, only_with_positives=True)


def test_an_empty_run_is_an_error():
    with pytest.raises(ValueError, match="the run holds no hits"):
        evaluate([], QRELS, MEASURES)


def test_queries_that_count_0_unsearched_are_warned_of(tmp_path, caplog):
    run_path, qrels_path = trec_files(tmp_path, qrels=[*QRELS, Qrel("q4", "x", 0)])
    with caplog.at_level(logging.WARNING):
        evaluate_run(run_path, str(qrels_path), "RR@10")
    missing, without_positive = (record.getMessage() for record in caplog.records)
    assert missing == f"2 judged queries are not in {run_path} and count 0: q3, q4"
    assert without_positive.startswith("1 judged queries have no relevant document and count 0")


def test_a_run_without_a_judged_hit_is_warned_of_with_a_document_of_each(tmp_path, caplog):
    # Queries of two collections may both be called 1, 2, 3.
    qrels = [qrel._replace(doc_id=f"other-{qrel.doc_id}") for qrel in QRELS[:4]]
    run_path, qrels_path = trec_files(tmp_path, qrels=qrels)
    assert evaluate_run(run_path, str(qrels_path), "RR@10").mean == {RR @ 10: 0.0}
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning == (
        f"no hit of {run_path} is judged: do they belong together? "
        "'c' is a document of the run, 'other-a' one of the qrels"
    )
    caplog.clear()
    evaluate_run(run_path, str(trec_files(tmp_path, qrels=[*qrels, QRELS[2]])[1]), "RR@10")
    assert not caplog.records


def test_of_many_missing_queries_ten_are_named(tmp_path, caplog):
    run_path, qrels_path = trec_files(tmp_path, qrels=[*QRELS, *(Qrel(f"m{number}", "x", 1) for number in range(20))])
    with caplog.at_level(logging.WARNING):
        evaluate_run(run_path, str(qrels_path), "RR@10")
    names = ", ".join(["q3", *(f"m{number}" for number in range(9))])
    assert caplog.records[0].getMessage() == f"21 judged queries are not in {run_path} and count 0: {names}, ..."


# Names of measures


@pytest.mark.parametrize("text", ["nDCG@10 R@2 RR@10 AP", "nDCG@10,R@2,RR@10,AP", " nDCG@10, R@2\tRR@10 ,\nAP,"])
def test_measures_are_split_at_blanks_and_commas(text):
    assert parse_measures(text) == MEASURES


def test_commas_and_blanks_in_brackets_do_not_split():
    assert parse_measures("nDCG(dcg='exp-log2', cutoff=10),AP(rel=2) RR") == [
        nDCG(dcg="exp-log2", cutoff=10),
        AP(rel=2),
        RR,
    ]


def test_a_measure_that_is_named_twice_is_computed_once():
    assert parse_measures("AP RR AP") == [AP, RR]


def test_grades_below_the_level_of_a_measure_are_not_relevant_to_it():
    (measure,) = parse_measures("AP(rel=2)")
    # Of q1's documents only b has grade 2, and it is at rank 2; q2 has none of that grade.
    per_query = evaluate_queries(RUN, QRELS, [measure]).per_query
    assert (per_query["q1"][measure], per_query["q2"][measure]) == (1 / 2, 0)


def test_a_measure_whose_own_program_fails_is_an_error_that_names_it():
    # ERR comes from gdeval.pl, which takes numbers alone as query ids.
    with pytest.raises((ValueError, OSError), match="ERR@10"):
        evaluate(RUN, QRELS, parse_measures("ERR@10"))


@pytest.mark.parametrize(
    "name", ["quality", "nDCG@", "nDCG@ten", "nDCG@-1", "AP(rel=2", "1", "@10", "ndcg_cut", "map_cut_10x", "official"]
)
def test_an_unknown_measure_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match="measure .*ir-measures has names like nDCG@10, R@100, RR@10, AP") as caught:
        parse_measures(f"RR@10 {name}")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nDCG@0", "'nDCG@0': its cutoff is 0; it must be from 1 to 2147483647"),
        ("P@99999999999999999999", "its cutoff is 99999999999999999999; it must be from 1"),
        ("ndcg_cut_0", "its cutoff is 0"),
        ("Accuracy@0", "its cutoff is 0"),
        ("nDCG@10.5", r"its cutoff is 10\.5; it must be from 1"),
        ("P@True", "its cutoff is True"),
        ("AP(rel=0)", "its rel is 0; it must be from 1 to 1000000"),
        ("AP(rel='a')", "its rel is 'a'"),
        ("IPrec@1.5", r"its recall is 1\.5; it must be from 0 to 1"),
        ("IPrec@0.123", "with two decimals at most"),
        ("SetF(beta=0.0000001)", "its beta is 1e-07"),
        ("Compat(p=1)", r"its p is 1\.0; it must be between 0 and 1"),
        ("nDCG(gains={1: 2.5})", r"its gains is \{1: 2\.5\}; it must be whole numbers by grade"),
        ("nDCG(dcg='log3')@10", "its dcg is 'log3'; it must be one of log2, exp-log2"),
        ("R(judged_only=1)@10", "its judged_only is 1; it must be a bool"),
        ("P", "measure 'P' needs a cutoff, as in P@10"),
        ("IPrec", "measure 'IPrec' needs a recall, as in IPrec@0.5"),
        ("nDCG(depth=3)", "takes no depth; it takes cutoff, dcg, gains, judged_only"),
        ("NumQ@10", "takes no cutoff; it takes no parameter"),
        ("ERR", "'ERR' is known to ir-measures, but no tool computes it so; try other parameters"),
    ],
)
def test_a_parameter_that_no_tool_can_compute_with_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        parse_measures(name)


@pytest.mark.skipif(importlib.util.find_spec("pyndeval") is not None, reason="pyndeval computes alpha_nDCG")
def test_a_measure_that_no_installed_package_computes_is_an_error_that_says_which_does():
    with pytest.raises(ValueError, match=r"'alpha_nDCG@10' is known .* that is not installed: pip install .*pyndeval"):
        parse_measures("alpha_nDCG@10")


@pytest.mark.processes
def test_every_measure_that_is_read_has_a_value_or_an_error_of_its_own():
    # In a process of its own: some tools end theirs where they cannot compute.
    program = """
import ir_measures
from ir_measures import Qrel, ScoredDoc
from effir_search.evaluation.measures import evaluate, parse_measures

qrels = [Qrel("1", "a", 1), Qrel("1", "b", 2), Qrel("1", "c", 0), Qrel("2", "d", 1), Qrel("3", "e", 1)]
run = [ScoredDoc("1", "c", 0.9), ScoredDoc("1", "b", 0.8), ScoredDoc("2", "d", 0.5), ScoredDoc("2", "x", 0.4)]
for name in ir_measures.measures.registry:
    for end in ("", "@0", "@1", "@10", "@2147483647", "@3000000000", "@0.5", "(rel=0)", "(rel=7)@3", "(rel=1000000)"):
        try:
            (value,) = evaluate(run, qrels, parse_measures(name + end)).values()
            assert 0 <= value < 10, (name, end, value)
        except ValueError as error:
            assert "\\n" not in str(error) and name in str(error), (name, end, error)
"""
    subprocess.run([sys.executable, "-c", program], check=True, stderr=subprocess.PIPE)


TREC_NAMES = {
    "map": "AP", "map_cut_100": "AP@100", "ndcg": "nDCG", "ndcg_cut_10": "nDCG@10", "ndcg_cut.10": "nDCG@10",
    "P_10": "P@10", "P.5": "P@5", "recall_100": "R@100", "recip_rank": "RR", "success_5": "Success@5",
    "Rprec": "Rprec", "bpref": "Bpref", "infAP": "infAP", "iprec_at_recall_0.10": "IPrec@0.1", "num_q": "NumQ",
    "num_rel": "NumRel", "num_ret": "NumRet", "num_rel_ret": "NumRelRet", "set_P": "SetP", "set_recall": "SetR",
    "set_F": "SetF", "set_map": "SetAP", "set_relative_P": "SetRelP",
}  # fmt: skip


@pytest.mark.parametrize(("trec_name", "name"), TREC_NAMES.items())
def test_measures_have_trec_evals_names_too(trec_name, name):
    assert parse_measures(trec_name) == parse_measures(name)


def test_whole_numbers_are_read_where_real_ones_are_meant():
    assert parse_measures("IPrec@0 IPrec@1 SetF(beta=2)") == parse_measures("IPrec@0.0 IPrec@1.0 SetF(beta=2.0)")


# Measures of which ir-measures alone would compute something else


def test_the_mean_of_accuracy_counts_every_judged_query():
    accuracy = parse_measures("Accuracy@10")
    # q1 ranks c, b, x, a: of b or a with c or x, only (b, x) is in order. q2 is in order, q3 not in the run.
    per_query = {"q1": 1 / 4, "q2": 1.0, "q3": 0.0}
    found = evaluate_queries(RUN, QRELS, accuracy)
    assert {query_id: of[accuracy[0]] for query_id, of in found.per_query.items()} == per_query
    assert found.mean[accuracy[0]] == pytest.approx(1.25 / 3)
    assert evaluate(RUN, QRELS, parse_measures("Accuracy(rel=2)@1")) == {parse_measures("Accuracy(rel=2)@1")[0]: 0.0}


def test_a_measure_without_a_value_is_an_error_that_names_it():
    # At cutoff 1, q2 has a relevant document and no other to be compared with.
    with pytest.raises(
        ValueError, match="Accuracy@1 has no value for a query of which all hits that count are relevant"
    ):
        evaluate(RUN, QRELS, parse_measures("Accuracy@1"))


def test_no_measure_changes_another():
    # Together, ir-measures counts only judged hits for NumRet, and computes one of the two IPrec.
    names = "NumRet P(judged_only=True)@10 IPrec@0.5 IPrec(judged_only=True)@0.5 nDCG(gains={1: 5})@10 nDCG@10"
    together = evaluate(RUN, QRELS, parse_measures(names))
    alone = {measure: evaluate(RUN, QRELS, [measure])[measure] for measure in parse_measures(names)}
    assert together == alone and together[parse_measures("NumRet")[0]] == 6


def test_a_grade_that_trec_eval_has_no_room_for_is_an_error():
    with pytest.raises(ValueError, match="the qrels have the grade 999999999; the highest that counts is 1000000"):
        evaluate(RUN, [Qrel("q1", "a", 999_999_999)], MEASURES)


@pytest.mark.parametrize("text", ["", " , "])
def test_no_measures_are_an_error(text):
    with pytest.raises(ValueError, match="no measures given"):
        parse_measures(text)


# Formats


@pytest.fixture
def evaluation():
    return evaluate_queries(RUN, QRELS, MEASURES)


NAMED = {"q1": Q1, "q2": Q2, "q3": Q3, "all": MEAN}
NAMES = ["nDCG@10", "R@2", "RR@10", "AP"]


def expected_rows(per_query, digits=None):
    """The rows as {query_id: {name: value}}, the mean last."""
    rows = NAMED if per_query else {"all": MEAN}
    return {
        query_id: {str(measure): round(value, digits) if digits else value for measure, value in values.items()}
        for query_id, values in rows.items()
    }


@pytest.mark.parametrize("per_query", [False, True])
def test_text_has_trec_evals_three_columns(evaluation, per_query):
    rows = {}
    for line in format_evaluation(evaluation, "text", per_query=per_query).split("\n"):
        name, query_id, value = line.split("\t")
        rows.setdefault(query_id, {})[name.strip()] = float(value)
    assert rows == expected_rows(per_query, digits=4)
    assert list(rows)[-1] == "all"


def test_json_of_the_mean_is_one_number_a_measure(evaluation):
    found = json.loads(format_evaluation(evaluation, "json"))
    assert found == pytest.approx(expected_rows(False)["all"])
    assert list(found) == NAMES


def test_json_of_each_query_has_them_beside_the_mean(evaluation):
    found = json.loads(format_evaluation(evaluation, "json", per_query=True))
    expected = expected_rows(True)
    assert found["mean"] == pytest.approx(expected.pop("all"))
    assert found["per_query"] == {query_id: pytest.approx(values) for query_id, values in expected.items()}


def test_json_holds_a_query_that_is_called_as_the_mean_is():
    evaluation = evaluate_queries(RUN, [Qrel("all", "x", 1), *QRELS[:1]], [RR @ 10])
    found = json.loads(format_evaluation(evaluation, "json", per_query=True))
    # The only positive of q1 is at rank 4: 1/4, and half of that on average.
    assert found == {"mean": {"RR@10": 0.125}, "per_query": {"all": {"RR@10": 0.0}, "q1": {"RR@10": 0.25}}}


@pytest.mark.parametrize("per_query", [False, True])
def test_csv_has_a_row_for_each_query_and_a_column_for_each_measure(evaluation, per_query):
    rows = csv.DictReader(io.StringIO(format_evaluation(evaluation, "csv", per_query=per_query)))
    found = {row.pop("query_id"): {name: float(value) for name, value in row.items()} for row in rows}
    assert found == {query_id: pytest.approx(values) for query_id, values in expected_rows(per_query).items()}


@pytest.mark.parametrize("per_query", [False, True])
def test_markdown_is_a_table(evaluation, per_query):
    lines = format_evaluation(evaluation, "markdown", per_query=per_query).split("\n")
    header, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header == ["query", *NAMES]
    assert rule == ["---", "---:", "---:", "---:", "---:"]
    found = {query_id: dict(zip(NAMES, map(float, values), strict=True)) for query_id, *values in rows}
    assert found == expected_rows(per_query, digits=4)


def test_a_bar_in_a_query_id_is_escaped_in_markdown():
    evaluation = evaluate_queries([ScoredDoc("a|b", "d", 1.0)], [Qrel("a|b", "d", 1)], [RR @ 10])
    assert r"| a\|b | 1.0000 |" in format_evaluation(evaluation, "markdown", per_query=True).split("\n")


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_counts_are_whole_numbers_and_shares_are_not(form):
    evaluation = evaluate_queries(RUN, QRELS[:4], parse_measures("NumQ NumRet NumRel P@1"))
    values = format_evaluation(evaluation, form).replace("|", " ").split()
    # Two judged queries, six hits, three positives; one query of two has a positive at rank 1.
    assert [value for value in values if value[0].isdigit()] == ["2", "6", "3", "0.5000"]


def test_a_measure_with_a_comma_in_its_name_is_one_column_of_csv():
    (measure,) = parse_measures("P(rel=2, judged_only=True)@10")
    header, _values = csv.reader(io.StringIO(format_evaluation(evaluate_queries(RUN, QRELS, [measure]), "csv")))
    assert "," in str(measure)
    assert header == ["query_id", str(measure)]


def test_every_format_has_a_test_here():
    assert set(FORMATS) == {"text", "json", "csv", "markdown"}


# References


def random_collection(*, ties):
    """20 judged queries, two of them not in the run and one without a positive."""
    generator = random.Random(0)
    docs = [f"d{number}" for number in range(60)]
    grades = {f"q{number}": (0,) if number == 5 else (0, 1, 2) for number in range(20)}
    qrels = [
        Qrel(query_id, doc_id, generator.choice(choice))
        for query_id, choice in grades.items()
        for doc_id in generator.sample(docs, 12)
    ]
    run = []
    for query_id in [f"q{number}" for number in range(2, 22)]:
        scores = [generator.randrange(8) / 8 for _ in docs] if ties else generator.sample(range(1000), len(docs))
        run += [ScoredDoc(query_id, doc_id, float(score)) for doc_id, score in zip(docs, scores, strict=True)]
    return run, qrels


def printed(output):
    """Name to value of lines of ``name [query] value``."""
    return {fields[0]: float(fields[-1]) for fields in map(str.split, output.splitlines())}


@pytest.mark.processes
def test_means_are_those_of_the_ir_measures_command(tmp_path):
    names = ["nDCG@10", "R@20", "RR@10", "AP", "P@5"]
    run_path, qrels_path = trec_files(tmp_path, *random_collection(ties=False))
    command = [sys.executable, "-m", "ir_measures", qrels_path, run_path, *names]
    expected = printed(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = format_evaluation(evaluate_run(run_path, str(qrels_path), " ".join(names)), "text")
    assert printed(found) == expected
    assert list(expected) == names


@pytest.mark.processes
def test_means_are_those_of_pyserinis_trec_eval_also_with_ties(tmp_path):
    from effir_search.searching.pyserini_bridge import java_home

    names = {"nDCG@10": "ndcg_cut.10", "R@20": "recall.20", "RR": "recip_rank", "AP": "map", "P@5": "P.5"}
    names |= {"NumQ": "num_q", "NumRel": "num_rel", "NumRet": "num_ret", "IPrec@0.1": "iprec_at_recall.0.10"}
    run_path, qrels_path = trec_files(tmp_path, *random_collection(ties=True))
    (package,) = importlib.util.find_spec("pyserini").submodule_search_locations
    (jar,) = Path(package).glob("resources/jars/anserini-*-fatjar.jar")
    measures = [argument for name in names.values() for argument in ("-m", name)]
    # -c averages over all judged queries, also over those that the run lacks.
    command = [Path(java_home(), "bin", "java"), "-cp", jar, "trec_eval", "-c", *measures, qrels_path, run_path]
    expected = printed(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = printed(format_evaluation(evaluate_run(run_path, str(qrels_path), " ".join(names)), "text"))
    assert {name.replace(".", "_", 1): found[ours] for ours, name in names.items()} == expected


def test_each_query_has_the_value_that_ir_measures_gives_it():
    run, qrels = random_collection(ties=False)
    expected = {(m.query_id, m.measure): m.value for m in ir_measures.iter_calc(MEASURES, qrels, run)}
    found = evaluate_queries(run, qrels, MEASURES).per_query
    assert {(query_id, m): value for query_id, of in found.items() for m, value in of.items() if value} == {
        key: value for key, value in expected.items() if value
    }
