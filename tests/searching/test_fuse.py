"""Fusion of runs: laws, arithmetic by hand, Pyserini's own fusion."""

import itertools
import json
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from ir_measures import ScoredDoc

from effir_search.cli import cli
from effir_search.errors import UserError
from effir_search.searching.fuse import MissingCounts, fuse, fuse_lists, normalized
from effir_search.searching.pyserini_bridge import pyserini_faiss
from effir_search.settings import FuseSettings, FusionSettings
from effir_search.text.trec import read_run, strictly_decreasing, write_run


def hits(**scores):
    return [ScoredDoc("q", doc_id, score) for doc_id, score in scores.items()]


def fused(*lists, method="rrf", weights=None, **settings):
    weights = weights or [1.0] * len(lists)
    return {
        hit.doc_id: hit.score
        for hit in fuse_lists(lists, method=method, weights=weights, settings=FusionSettings(**settings))
    }


def test_reciprocal_ranks_are_added_up_by_hand():
    scores = fused(hits(a=9.0, b=8.0), hits(b=0.3, c=0.2), rrf_k=60)
    assert scores == pytest.approx({"b": 1 / 62 + 1 / 61, "a": 1 / 61, "c": 1 / 62})
    assert list(scores) == ["b", "a", "c"]


def test_scores_from_0_to_1_are_weighed_by_hand():
    # a list of 4, 3, 0 becomes 1, 0.75, 0; one of 20, 10 becomes 1, 0. What is missing has 0.
    scores = fused(hits(a=4.0, b=3.0, c=0.0), hits(b=20.0, d=10.0), method="interpolation", weights=[0.25, 0.75])
    assert scores == pytest.approx({"b": 0.25 * 0.75 + 0.75, "a": 0.25, "c": 0.0, "d": 0.0}, abs=1e-6)


def test_standard_scores_are_those_of_the_list_by_hand():
    # mean 2, variance ((1 + 0 + 1) / 3): 3 is 1 / sqrt(2 / 3) above the mean.
    scores, lowest = normalized(np.array([3.0, 2.0, 1.0]), "z-score")
    np.testing.assert_allclose(scores, np.array([1, 0, -1]) / math.sqrt(2 / 3))
    assert lowest == pytest.approx(-1 / math.sqrt(2 / 3))


def test_a_missing_document_has_the_lowest_score_of_the_list_or_0():
    dense, bm25 = hits(a=0.9, b=0.5), hits(b=7.0, c=3.0)
    how = {"method": "interpolation", "weights": [1.0, 1.0], "normalization": "none"}
    assert fused(dense, bm25, **how) == pytest.approx({"b": 7.5, "a": 3.9, "c": 3.5})
    assert fused(dense, bm25, missing="zero", **how) == pytest.approx({"b": 7.5, "a": 0.9, "c": 3.0})


@pytest.fixture(scope="module")
def run_files(tmp_path_factory):
    """Three runs that share most documents; one query has hits of one score, one is in two of the runs alone."""
    folder, rng, paths = tmp_path_factory.mktemp("runs"), np.random.default_rng(0), []
    for number in range(3):
        rows = []
        for query in range(8):
            if query == 7 and number == 0:
                continue
            docs = rng.choice(60, size=40, replace=False)
            scores = np.full(40, 0.25) if query == 6 else np.sort(rng.normal(5, 20 if number else 1, size=40))[::-1]
            rows += [
                f"q{query} Q0 d{doc} {rank} {score:.6f} tag{number}\n"
                for rank, (doc, score) in enumerate(zip(sorted(docs, reverse=True), scores, strict=True), start=1)
            ]
        paths.append(folder / f"run{number}.trec")
        paths[-1].write_text("".join(rows))
    return paths


def pyserinis(run_files, method, **options):
    pyserini_faiss()
    from pyserini import fusion
    from pyserini.trectools import TrecRun

    merged = getattr(fusion, method)([TrecRun(str(path)) for path in run_files], **options).run_data
    return {(row.topic, row.docid): row.score for row in merged.itertuples()}


def ours(run_files, output, **settings):
    fuse(run_files, output, FuseSettings(hits=10_000, **settings))
    return {hit[:2]: hit.score for hit in read_run(output)}


def same(ours, theirs, *, times=1.0, at_most=1e-6):
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] * times - theirs[key]) for key in ours) < at_most * max(1, *map(abs, theirs.values()))


def test_rrf_is_pyserinis_but_for_tied_ranks(run_files, tmp_path):
    # Query 6 has ties, which Pyserini ranks as the file does, and ours as trec_eval: by id, descending.
    got = {key: score for key, score in ours(run_files, tmp_path / "o").items() if key[0] != "q6"}
    expected = {
        key: score for key, score in pyserinis(run_files, "reciprocal_rank_fusion", rrf_k=60).items() if key[0] != "q6"
    }
    same(got, expected)
    # For one query, the best of both, in the same order where scores differ.
    best = sorted((key for key in got if key[0] == "q0"), key=expected.get, reverse=True)[:5]
    assert [hit.doc_id for hit in read_run(tmp_path / "o") if hit.query_id == "q0"][:5] == [key[1] for key in best]


@pytest.mark.parametrize("rrf_k", [0, 1, 20])
def test_another_constant_and_depth_are_pyserinis_too(run_files, tmp_path, rrf_k):
    got = ours(run_files[:2], tmp_path / "o", rrf_k=rrf_k, depth=7)
    expected = pyserinis(run_files[:2], "reciprocal_rank_fusion", rrf_k=rrf_k, depth=7)
    same(*({key: score for key, score in scores.items() if key[0] != "q6"} for scores in (got, expected)))


def test_interpolation_of_raw_scores_is_pyserinis(run_files, tmp_path):
    raw = {"normalization": "none", "missing": "zero"}
    got = ours(run_files[:2], tmp_path / "o", method="interpolation", weights=(0.3, 0.7), **raw)
    same(got, pyserinis(run_files[:2], "interpolation", alpha=0.3))


def test_average_is_pyserinis(run_files, tmp_path):
    got = ours(run_files, tmp_path / "o", method="average", normalization="none", missing="zero")
    same(got, pyserinis(run_files, "average"))


def test_average_of_scores_from_0_to_1_is_a_third_of_pyserinis_sum_of_them(run_files, tmp_path):
    # The 40 ties of query 6 are 40 steps of a float32 apart in the run.
    got = ours(run_files, tmp_path / "o", method="average")
    same(got, pyserinis(run_files, "normalize"), times=3, at_most=3e-6)


@pytest.mark.parametrize("normalization", [True, False])
@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_interpolation_of_a_dense_list_and_bm25s_is_hybrid_searchers(normalization, weight):
    pyserini_faiss()
    from pyserini.search.hybrid import HybridSearcher

    rng = np.random.default_rng(1)
    dense, bm25 = (
        [SimpleNamespace(docid=f"d{doc}", score=float(score)) for doc, score in zip(docs, scores, strict=True)]
        for docs, scores in (
            (rng.choice(40, 25, replace=False), rng.uniform(0.1, 0.9, 25)),
            (rng.choice(40, 25, replace=False), rng.uniform(3, 20, 25)),
        )
    )
    theirs = HybridSearcher._hybrid_results(dense, bm25, (1 - weight) / weight, 100, normalization)
    lists = [[ScoredDoc("q", hit.docid, hit.score) for hit in of_one] for of_one in (dense, bm25)]
    how = {"method": "interpolation", "normalization": "min-max" if normalization else "none"}
    got = fused(*lists, weights=[weight, 1 - weight], **how)
    # Theirs is divided by the weight, and its scores go from -1/2 to 1/2.
    shift = 0.5 if normalization else 0.0
    assert got == pytest.approx({hit.docid: weight * hit.score + shift for hit in theirs}, abs=1e-5)
    assert list(got) == [hit.docid for hit in theirs]


@pytest.mark.parametrize("normalization", ["min-max", "z-score", "none"])
@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5], [0.0, 0.0]])
def test_equal_scores_stay_equal_and_finite(normalization, scores):
    found, lowest = normalized(np.array(scores), normalization)
    assert np.isfinite(found).all() and np.ptp(found) == 0
    assert (found[0], lowest) == {"min-max": (1, 0), "z-score": (0, 0), "none": (scores[0], scores[0])}[normalization]


@pytest.mark.parametrize("score", [0.7, 23.5, 0.0, -3.0])
def test_ties_that_a_run_tells_apart_by_the_smallest_step_are_ties(tmp_path, score):
    tied = [ScoredDoc("q", f"d{number}", score) for number in range(50)]
    write_run(strictly_decreasing(tied), tmp_path / "run")
    assert len({hit.score for hit in read_run(tmp_path / "run")}) == 50
    scores = fused(read_run(tmp_path / "run"), hits(x=2.0, y=1.0), method="interpolation")
    assert [scores[f"d{number}"] for number in range(50)] == pytest.approx([1.0] * 50, abs=1e-5)


def test_ties_that_anserini_lowers_by_a_millionth_are_ties():
    anserinis = hits(**{f"d{number}": 12.3456 - 1e-6 * number for number in range(20)}, last=12.34)
    scores = fused(anserinis, hits(x=2.0, y=1.0), method="interpolation")
    assert min(scores[f"d{number}"] for number in range(20)) > 1 - 1e-5
    assert scores["last"] == pytest.approx(0, abs=1e-5)


def test_close_scores_that_are_no_ties_are_told_apart():
    scores = fused(hits(a=0.50002, b=0.50001, c=0.5), hits(x=2.0, y=1.0), method="interpolation")
    assert scores["b"] == pytest.approx(0.5, abs=1e-2)


def test_a_list_without_hits_gives_nothing():
    one = hits(a=3.0, b=1.0)
    assert fused(one, [], method="interpolation") == pytest.approx({"a": 1.0, "b": 0.0})
    assert fused(one, []) == pytest.approx({"a": 1 / 61, "b": 1 / 62})


@pytest.mark.parametrize("method", ["rrf", "interpolation"])
def test_a_list_that_weighs_nothing_orders_the_documents_where_no_other_has_any(method):
    alone = hits(z=3.0, a=2.0, m=1.0)
    assert list(fused(alone, [], method=method, weights=[0, 1])) == ["z", "a", "m"]
    assert list(fused(alone, hits(a=1.0), method=method, weights=[0, 1]))[0] == "a"


def test_what_is_missing_is_counted_and_said(caplog):
    counts = MissingCounts()
    for lists in ([hits(a=3.0, b=1.0), hits(b=2.0, c=1.0, d=0.5)], [hits(a=1.0), []]):
        fuse_lists(lists, method="interpolation", weights=[1, 1], settings=FusionSettings(), counts=counts)
    with caplog.at_level(logging.INFO):
        counts.say(["one", "two"], "interpolation", FusionSettings())
    assert [record.getMessage() for record in caplog.records] == [
        "one lacks 2 of 5 documents; each has its lowest score there",
        "two lacks 1 of 5 documents; each has its lowest score there",
        "two has no hits for 1 of 2 queries; their hits are those of the other lists",
    ]


def test_the_run_has_decreasing_scores_and_ties_by_id_descending(tmp_path):
    for name, first, second in (("a", "x", "y"), ("b", "y", "x")):
        (tmp_path / name).write_text(f"q Q0 {first} 1 2.0 t\nq Q0 {second} 2 1.0 t\n")
    assert fuse([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tag="mine") == 2
    assert [hit.doc_id for hit in read_run(tmp_path / "out")] == ["y", "x"]
    lines = [line.split() for line in (tmp_path / "out").read_text().splitlines()]
    assert [line[3] for line in lines] == ["1", "2"] and {line[5] for line in lines} == {"mine"}
    assert float(lines[0][4]) > float(lines[1][4])


def test_the_command_fuses_and_cuts(run_files, tmp_path):
    words = ["fuse", *map(str, run_files), "--method", "interpolation", "--weights", "0.5,0.3,0.2", "--hits", "5"]
    done = CliRunner().invoke(cli, [*words, "--output", str(tmp_path / "out")])
    assert done.output.endswith(f"40 hits -> {tmp_path / 'out'}\n"), done.output  # 8 queries
    queries = [key for key, _ in itertools.groupby(read_run(tmp_path / "out"), key=lambda hit: hit.query_id)]
    assert queries == [f"q{number}" for number in range(8)]  # of which the first run lacks the last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{0}"], "a fusion needs at least two runs, got 1"),
        (["{0}", "{1}", "--weights", "1"], "1 weights for 2 runs; give one for each"),
        (["{0}", "{1}", "--method", "average", "--weights", "1,2"], "an average weighs all runs alike"),
        (["{0}", "{1}", "--weights", "0,0"], "one of them must be above 0"),
        (["{0}", "{1}", "--missing", "zero"], "--missing is for scores, and --method rrf adds up ranks"),
        (["{0}", "{other}"], "no query is in two of"),
        (["{0}", "{absent}"], "No such file"),
    ],
)
def test_what_cannot_be_fused_is_one_line(run_files, tmp_path, words, message):
    (tmp_path / "other").write_text("elsewhere Q0 d1 1 2.0 t\n")
    places = {"other": tmp_path / "other", "absent": tmp_path / "absent"}
    words = [word.format(*run_files, **places) for word in words]
    done = CliRunner().invoke(cli, ["fuse", *words, "--output", str(tmp_path / "out")])
    assert done.exit_code in (1, 2) and message in done.output, done.output
    assert "Traceback" not in done.output and not (tmp_path / "out").exists()


def test_a_fusion_does_not_replace_one_of_its_runs(run_files):
    before = run_files[1].read_bytes()
    with pytest.raises(UserError, match="is one of the runs, and would replace it"):
        fuse(run_files, run_files[1])
    assert run_files[1].read_bytes() == before


@pytest.mark.processes
def test_fusing_starts_neither_torch_nor_java(run_files, tmp_path):
    words = ["fuse", *map(str, run_files), "--output", str(tmp_path / "out")]
    code = (
        "import json, sys\nfrom effir_search.cli import cli\n"
        f"cli({words!r}, standalone_mode=False)\nprint(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert not {"torch", "transformers", "faiss", "pyserini", "jnius", "pandas"} & set(loaded)
    assert (tmp_path / "out").is_file()
