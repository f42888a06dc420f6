"""Published figures on test collections; EFFIR_COLLECTIONS names a folder of them, each in the layout of BEIR."""

import os
from pathlib import Path

import pytest

from effir_search.demo.demo import demo_model
from effir_search.encoding.encoder import Encoder
from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.indexing.build import index_corpus
from effir_search.indexing.verify import verify_index
from effir_search.pruning.calibration import sample_texts
from effir_search.pruning.dropping_order import by_embedding
from effir_search.searching.pyserini_bridge import build_bm25, search_bm25
from effir_search.searching.search_topics import load_topics, search
from effir_search.settings import EncoderOptions
from effir_search.text.corpus import read_corpus
from effir_search.text.trec import read_qrels

pytestmark = pytest.mark.collections

# BM25 (k1 = 0.9, b = 0.4) of an independent program, with another tokenizer and stop list: nDCG@10.
BM25 = {"adi": 0.474, "cacm": 0.466, "cisi": 0.361, "scifact": 0.676}


@pytest.fixture(scope="module")
def collections():
    if "EFFIR_COLLECTIONS" not in os.environ:
        pytest.fail("set EFFIR_COLLECTIONS to the folder of test collections")
    return Path(os.environ["EFFIR_COLLECTIONS"])


def ndcg(run, folder):
    (measure,) = parse_measures("nDCG@10")
    return evaluate_queries(run, read_qrels(folder / "qrels" / "test.tsv"), [measure]).mean[measure]


def judged_topics(folder):
    return load_topics(str(folder / "queries.jsonl"), qrels=read_qrels(folder / "qrels" / "test.tsv"))


@pytest.mark.parametrize("name", BM25)
def test_bm25_is_that_of_an_independent_program(tmp_path, collections, name):
    build_bm25(read_corpus(collections / name / "corpus.jsonl"), tmp_path / "bm25")
    assert ndcg(search_bm25(tmp_path / "bm25", judged_topics(collections / name)), collections / name) == pytest.approx(
        BM25[name], abs=0.015
    )


def test_minilm_on_scifact_has_the_published_value(tmp_path, collections):
    # 0.6451: the MTEB leaderboard's figure for all-MiniLM-L6-v2 on SciFact.
    folder = collections / "scifact"
    index_corpus(
        str(folder / "corpus.jsonl"), str(demo_model()), tmp_path / "index", options=EncoderOptions(dtype="fp32")
    )
    encoder = Encoder.from_pretrained(demo_model(), dtype="fp32")
    assert ndcg(search(tmp_path / "index", encoder, judged_topics(folder)), folder) == pytest.approx(0.6451, abs=0.003)
    assert verify_index(tmp_path / "index", encoder).lowest_cosine > 0.9999


@pytest.mark.parametrize("name", ["adi", "cacm", "cisi"])
def test_small_collections_run_whole(tmp_path, collections, name):
    folder = collections / name
    info = index_corpus(
        str(folder / "corpus.jsonl"), str(demo_model()), tmp_path / "index", options=EncoderOptions(dtype="bf16")
    )
    encoder = Encoder.from_pretrained(demo_model(), dtype="bf16")
    topics = judged_topics(folder)
    hits = list(search(tmp_path / "index", encoder, topics, k=100))
    assert len(hits) == len(topics) * min(100, info.num_documents)
    assert ndcg(hits, folder) > 0.3


def test_without_an_mlp_minilm_s_embedding_drifts_as_an_independent_measurement_found(collections):
    # Layers 0 to 5, on 192 texts, half SciFact documents and half its claims, by a prototype on others of these texts:
    # the mean cosine of the final embedding when one MLP is left out and its LayerNorm kept.
    cosines = [0.934, 0.958, 0.954, 0.928, 0.874, 0.793]
    encoder = Encoder.from_pretrained(demo_model(), dtype="fp32")
    folder = collections / "scifact"
    sample = sample_texts([str(folder / "corpus.jsonl"), str(folder / "queries.jsonl")], size=192)
    order = by_embedding(encoder, encoder.tokenize(sample.texts), ["mlp"])["mlp"]
    assert [1 - score for _, score in sorted(order)] == pytest.approx(cosines, abs=0.02)
