import dataclasses
import json

import pytest

from effir_search.benchmarking.record import BenchmarkRecord, Measured, figures_of, pareto_front
from effir_search.benchmarking.report import pareto_figure, tables_of


def measured(label, **changes):
    """An encoder of which everything is simple."""
    values = dict(
        label=label, model=label, dtype="float32", weights_sha256="0", config={},
        sizes={"parameters": 1000, "weights_bytes": 4000}, tokens=500, flops=8000, matmul_flops=4000.0,
        seconds=[2.0, 4.0, 10.0], joules=None, latencies=[], memory={"before": 10, "peak": 30, "gpu": None},
        cosine=1.0, ndcg=None,
    )  # fmt: skip
    return Measured(**values | changes)


def record_of(*encoders, num_queries=(0, "topics")):
    return BenchmarkRecord(
        command="effir benchmark a b", machine={"processor": "one", "threads": 1, "device": "cpu"},
        versions={"torch": "2"}, corpus={"name": "data/corpus.jsonl", "documents": 100}, num_texts=100,
        num_queries=num_queries, encoders=list(encoders),
    )  # fmt: skip


def test_speed_is_the_median_and_its_ratio_the_median_of_the_ratios():
    first, second = figures_of(record_of(measured("a"), measured("b", seconds=[1.0, 1.0, 20.0])))
    # 100 texts of 500 tokens in 4 and in 1 seconds.
    assert (first.documents_per_second, second.documents_per_second) == (25, 100)
    assert (first.tokens_per_second, second.tokens_per_second) == (125, 500)
    # Of 2 / 1, 4 / 1 and 10 / 20 the one in the middle, which is not 100 / 25.
    assert (first.speedup, second.speedup) == (1, 2)


def test_latencies_are_percentiles_over_all_rounds_and_queries_in_milliseconds():
    # 100 values, 0 to 99 ms: half of the 99 steps between them are 49.5, 99 % are 98.01.
    rounds = [[n / 1000 for n in range(50)], [n / 1000 for n in range(50, 100)]]
    (figures,) = figures_of(record_of(measured("a", latencies=rounds)))
    assert (figures.latency_p50, figures.latency_p99) == (pytest.approx(49.5), pytest.approx(98.01))


def test_the_ratio_of_latencies_is_the_median_of_the_ratios_of_the_rounds_medians():
    ours = measured("b", latencies=[[1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [8.0, 8.0, 8.0]])
    theirs = measured("a", latencies=[[4.0, 4.0, 4.0], [1.0, 6.0, 7.0], [8.0, 8.0, 8.0]])
    # 4 / 1, 6 / 2 and 8 / 8.
    assert [row.latency_speedup for row in figures_of(record_of(theirs, ours))] == [1, 3]


def test_work_is_compared_with_what_products_of_matrices_reach():
    first, second = figures_of(record_of(measured("a"), measured("b", flops=2000)))
    # 8,000 operations in the median of 4 seconds, where 4,000 a second can be.
    assert (first.share_of_peak, second.share_of_peak) == (0.5, 0.125)
    assert (first.flops_per_text, first.flops_ratio, second.flops_ratio) == (80, 1, 4)


def test_energy_is_that_of_a_thousand_documents():
    (figures,) = figures_of(record_of(measured("a", joules=[70.0, 20.0, 30.0])))
    assert figures.joules_per_thousand == 300  # 30 for 100


def test_quality_is_the_mean_and_the_share_kept_has_the_interval_of_pairs():
    ndcg = {"1": 0.2, "2": 0.6, "3": 1.0}
    half = {query: value / 2 for query, value in ndcg.items()}
    first, second = figures_of(record_of(measured("a", ndcg=ndcg), measured("b", ndcg=half)))
    assert (first.ndcg, second.ndcg) == (pytest.approx(0.6), pytest.approx(0.3))
    # Half at every query is half of every sample of queries.
    assert second.kept == pytest.approx((0.5, 0.5, 0.5))


def test_a_first_encoder_that_finds_nothing_has_no_share_to_be_kept():
    record = record_of(measured("a", ndcg={"1": 0.0}), measured("b", ndcg={"1": 0.5}))
    figures = figures_of(record)
    assert [row.kept for row in figures] == [None, None]
    assert "No share is kept of a first encoder that finds nothing." in tables_of(record, figures)[0].notes


def test_what_was_not_measured_has_no_column_and_is_said():
    record = record_of(measured("a", flops=None), measured("b", flops=None, cosine=None))
    worth, taken = tables_of(record, figures_of(record))
    assert worth.header == ["", "documents/s", "speedup", "tokens/s", "cosine"]
    assert taken.header == ["", "parameters", "weights, MB", "peak memory, MB"]
    said = " ".join(worth.notes + taken.notes)
    for words in ("No latency", "No cosine", "No FLOPs", "No energy"):
        assert words in said


def test_what_was_measured_has_a_column_and_no_excuse():
    everything = dict(
        joules=[1.0, 1.0, 1.0], latencies=[[0.5, 0.5]], ndcg={"1": 0.5},
        memory={"before": 1_000_000, "peak": 3_000_000, "gpu": 2_000_000},
    )  # fmt: skip
    record = record_of(measured("a", **everything), measured("b", **everything), num_queries=(2, "topics"))
    worth, taken = tables_of(record, figures_of(record))
    assert {"query p50, ms", "p99, ms", "p50 speedup", "nDCG@10", "kept"} <= set(worth.header)
    row = dict(zip(taken.header, taken.rows[1], strict=True))
    # 1 J for 100 documents; 8,000 / 4 s of 4,000 a second; of 3 MB 2 are on a GPU.
    assert (row["J/1000 documents"], row["of peak"]) == ("10.0", "50.0%")
    assert (row["peak memory, MB"], row["GPU memory, MB"]) == ("3", "2")
    assert not [
        note for note in worth.notes + taken.notes if note.startswith("No ") and "faster and better" not in note
    ]


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 9), (2, 5), (3, 7), (4, 1)], [0, 2, 3]),  # (3, 7) is faster and better than (2, 5)
        ([(1, 1), (1, 1)], [0, 1]),  # neither is better than the other
        ([(1, 1), (1, 2), (2, 2)], [2]),
        ([(5, 5)], [0]),
    ],
)
def test_the_front_is_what_no_other_beats_in_both(points, front):
    assert pareto_front(points) == front


def test_the_picture_has_a_point_and_a_name_for_each_encoder_with_a_quality():
    encoders = [measured("a", cosine=1.0), measured("b", cosine=None), measured("c", cosine=0.5)]
    record = record_of(*encoders)
    figure = pareto_figure(record, figures_of(record))
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "c"]
    assert figure.axes[0].get_ylabel() == "cosine to the first"
    low, high = figure.axes[0].get_ylim()
    assert low < 0.5 and high > 1


def test_encoders_that_find_nothing_can_be_drawn():
    record = record_of(measured("a", ndcg={"1": 0.0}), measured("b", ndcg={"1": 0.0}))
    figure = pareto_figure(record, figures_of(record))
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b"]


def test_every_raw_figure_is_json():
    # A tuple, or a number of numpy's, would not come back as it was.
    raw = dataclasses.asdict(record_of(measured("a"), num_queries=[0, "topics"]))
    assert json.loads(json.dumps(raw)) == raw
