import json
import subprocess
import sys

import faiss
import numpy as np
import pandas as pd
import pyterrier as pt
import pyterrier_alpha as pta
import pytest
from click.testing import CliRunner
from conftest import DOCUMENTS, QRELS, TOPICS
from ir_measures import nDCG

from effir_search.adapters.pyterrier import EffirRetriever, to_flex_index
from effir_search.adapters.pyterrier_dr import EffirBiEncoder
from effir_search.cli import cli
from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.indexing.build import build_index, rebuild_index
from effir_search.searching.search_topics import search
from effir_search.settings import IndexSettings, SearchSettings
from effir_search.text.corpus import Document, read_corpus
from effir_search.text.trec import Query, read_qrels

QUERIES = [Query(query_id, text) for query_id, text in TOPICS.items()]


@pytest.fixture
def topics():
    return pd.DataFrame({"qid": list(TOPICS), "query": list(TOPICS.values())})


@pytest.fixture(scope="module")
def retriever(toy_index, encoder):
    return EffirRetriever(str(toy_index), encoder)


def hits_of(frame):
    return list(frame[["qid", "docno", "score"]].itertuples(index=False, name=None))


def test_the_hits_are_those_of_a_search_with_ranks_from_0(toy_index, encoder, topics):
    found = EffirRetriever(toy_index, encoder, num_results=5)(topics)
    expected = [tuple(hit) for hit in search(toy_index, encoder, QUERIES, k=5)]
    assert hits_of(found) == expected
    assert list(found.columns) == ["qid", "query", "docno", "score", "rank"]
    assert found["rank"].tolist() == [0, 1, 2, 3, 4] * 3
    assert found["query"].tolist() == [text for text in TOPICS.values() for _ in range(5)]


def test_an_index_may_be_opened_by_its_name_alone(toy_index, topics):
    assert len(EffirRetriever(str(toy_index), num_results=2)(topics)) == 6


def test_several_indexes_are_searched_as_one(tmp_path, collection, encoder, retriever, topics):
    documents = list(read_corpus(collection / "corpus.jsonl"))
    for name, share in {"a": documents[:5], "b": documents[5:]}.items():
        build_index(share, encoder, tmp_path / name)
    together = EffirRetriever([tmp_path / "a", tmp_path / "b"], encoder)(topics)
    alone = retriever(topics)
    assert together["docno"].tolist() == alone["docno"].tolist()
    np.testing.assert_allclose(together["score"], alone["score"], atol=1e-6)


def test_columns_of_the_query_are_handed_on_and_those_of_documents_are_not(retriever):
    vector = np.ones(3)
    frame = pd.DataFrame(
        {"qid": ["q", "q"], "query": ["hot soup"] * 2, "query_0": ["soup"] * 2, "query_vec": [vector] * 2}
        | {"docno": ["x", "y"], "score": [1.0, 0.5], "rank": [0, 1]}
    )
    found = retriever(frame)
    assert list(found.columns) == ["qid", "query", "query_0", "query_vec", "docno", "score", "rank"]
    assert len(found) == len(DOCUMENTS) and found["docno"].is_unique
    assert found["query_vec"][3] is vector


def test_ids_that_are_numbers_stay_numbers(retriever):
    found = retriever(pd.DataFrame({"qid": [7, 8], "query": ["hot soup", "sweet tea"]}))
    assert found["qid"].tolist() == [7] * 12 + [8] * 12


def test_a_query_without_a_text_gets_no_hits(retriever):
    columns = ["qid", "query", "docno", "score", "rank"]
    some = retriever(pd.DataFrame({"qid": ["1", "2"], "query": ["", "hot soup"]}))
    assert set(some["qid"]) == {"2"}
    for frame in (pd.DataFrame({"qid": ["1"], "query": [" "]}), pd.DataFrame(columns=["qid", "query"])):
        none = retriever(frame)
        assert list(none.columns) == columns and len(none) == 0


def test_a_frame_without_queries_is_an_error(retriever):
    with pytest.raises(pt.validate.InputValidationError, match="missing_columns=.'query'"):
        retriever(pd.DataFrame({"qid": ["1"], "docno": ["d"]}))


def test_the_document_that_is_the_query_is_left_out(toy_index, encoder):
    queries = [Query("008", "hot soup"), Query("009", "cat fish")]
    frame = pd.DataFrame(queries).rename(columns={"query_id": "qid", "text": "query"})
    found = EffirRetriever(toy_index, encoder, num_results=11, settings=SearchSettings(remove_query=True))(frame)
    expected = search(toy_index, encoder, queries, k=11, remove_query=True)
    assert hits_of(found) == [tuple(hit) for hit in expected]


def test_pyterrier_knows_what_comes_out(retriever):
    assert list(pt.inspect.transformer_outputs(retriever, ["qid", "query"])) == [
        *("qid", "query", "docno", "score", "rank")
    ]


def test_the_operators_of_pyterrier(retriever, topics):
    plain = retriever(topics)
    by_query = {query_id: group for query_id, group in plain.groupby("qid")}
    # % cuts, + adds scores, * multiplies them, | unites.
    cut = (retriever % 3)(topics)
    assert {(q, d) for q, d, _ in hits_of(cut)} == {(q, d) for q, group in by_query.items() for d in group["docno"][:3]}
    doubled = (retriever + 2 * retriever)(topics).set_index(["qid", "docno"])["score"]
    for row in plain.itertuples():
        assert doubled[row.qid, row.docno] == pytest.approx(3 * row.score)
    assert len((retriever % 2 | retriever % 4)(topics)) == 12
    # >> hands hits on: a transformer that turns the order round.
    turned = (retriever >> pt.apply.doc_score(lambda row: -row["score"]))(topics)
    last = turned[turned["rank"] == 0].set_index("qid")["docno"]
    assert {q: last[q] for q in by_query} == {q: group["docno"].iloc[-1] for q, group in by_query.items()}


def test_reciprocal_ranks_of_two_retrievers_are_added(retriever, topics):
    fused = pta.RRFusion(retriever, retriever % 1)(topics).set_index(["qid", "docno"])["score"]
    first = retriever(topics).groupby("qid").head(2)
    for row in first.itertuples():
        # 1 / (60 + rank), which PyTerrier counts from 0; twice for what both found.
        expected = 2 / 60 if row.rank == 0 else 1 / 61
        assert fused[row.qid, row.docno] == pytest.approx(expected)


def test_an_experiment_has_the_measure_of_effir_evaluate(toy_index, collection, encoder, retriever, topics):
    qrels = pd.DataFrame([(q, d, grade) for (q, d), grade in QRELS.items()], columns=["qid", "docno", "label"])
    table = pt.Experiment([retriever], topics, qrels, [nDCG @ 10])
    (measure,) = parse_measures("nDCG@10")
    judgments = read_qrels(collection / "qrels" / "test.tsv")
    expected = evaluate_queries(list(search(toy_index, encoder, QUERIES)), judgments, [measure]).mean[measure]
    assert 0 < expected < 1
    assert table["nDCG@10"][0] == pytest.approx(expected, abs=1e-6)


def test_the_encoder_gives_the_vectors_of_the_index(toy_index, encoder, collection):
    index = faiss.read_index(str(toy_index / "index"))
    texts = [f"{document.title} {document.text}".strip() for document in read_corpus(collection / "corpus.jsonl")]
    bi_encoder = EffirBiEncoder(encoder)
    np.testing.assert_allclose(bi_encoder.encode_docs(texts), index.reconstruct_n(0, 12), atol=1e-6)
    queries = bi_encoder.encode_queries(pd.Series(TOPICS.values()))
    np.testing.assert_allclose(queries, encoder.encode_queries(list(TOPICS.values())), atol=1e-6)
    np.testing.assert_array_equal(bi_encoder.encode_queries_torch(list(TOPICS.values())).numpy(), queries)


def test_the_encoder_reranks_by_the_scores_of_a_search(retriever, encoder, topics):
    texts = {doc_id: f"{title} {text}".strip() for doc_id, (title, text) in DOCUMENTS.items()}
    found = (retriever % 4)(topics)
    ranked = EffirBiEncoder(encoder).scorer()(found.assign(text=found["docno"].map(texts)))
    np.testing.assert_allclose(ranked["score"], found["score"], atol=1e-6)


def test_a_flex_index_holds_the_vectors_and_finds_the_hits(tmp_path, toy_index, encoder, retriever, topics):
    from pyterrier_dr import FlexIndex

    assert to_flex_index(toy_index, tmp_path / "toy.flex") == 12
    flex = FlexIndex(str(tmp_path / "toy.flex"), verbose=False)
    assert list(flex.docnos()) == list(DOCUMENTS)
    vectors = np.array([row["doc_vec"] for row in flex.get_corpus_iter()])
    np.testing.assert_array_equal(vectors, faiss.read_index(str(toy_index / "index")).reconstruct_n(0, 12))
    found = (EffirBiEncoder(encoder) >> flex.np_retriever(num_results=12))(topics).set_index(["qid", "docno"])["score"]
    for query_id, doc_id, score in hits_of(retriever(topics)):
        assert found[query_id, doc_id] == pytest.approx(score, abs=1e-6)
    # The files are those that pyterrier-dr writes itself.
    own = FlexIndex(str(tmp_path / "own.flex"), verbose=False)
    own.index([{"docno": doc_id, "doc_vec": vector} for doc_id, vector in zip(DOCUMENTS, vectors, strict=True)])
    for name in ("vecs.f4", "docnos.npids"):
        assert (tmp_path / "toy.flex" / name).read_bytes() == (tmp_path / "own.flex" / name).read_bytes()
    metas = [json.loads((tmp_path / folder / "pt_meta.json").read_text()) for folder in ("toy.flex", "own.flex")]
    assert metas[0] == metas[1]


IDS = {
    "two": ["first", "second"],
    "numbers": [str(number) for number in range(300)],
    "from 1": [str(number) for number in range(1, 1001)],
    "zeros": [f"{number:05}" for number in range(700)],
    "mixed": ["007", "7", "MED-10", "é", "长", "doc_1", "d" * 300, *(f"x{n}" for n in range(400)), "0", "-1", "1.0"],
    "late": [*(str(number) for number in range(600)), "late", "001"],
    "last": [*(str(number) for number in range(600)), "last"],
}


@pytest.mark.parametrize("doc_ids", IDS.values(), ids=list(IDS))
def test_ids_of_every_form_are_read_back(tmp_path, encoder, doc_ids):
    from pyterrier_dr import FlexIndex

    build_index([Document(doc_id, "hot soup") for doc_id in doc_ids], encoder, tmp_path / "index")
    to_flex_index(tmp_path / "index", tmp_path / "flex")
    docnos = FlexIndex(str(tmp_path / "flex")).docnos()
    assert [docnos.fwd[row] for row in range(len(doc_ids))] == doc_ids
    assert docnos.inv[np.array(doc_ids)].tolist() == list(range(len(doc_ids)))


def test_a_single_document_whose_id_npids_cannot_hold_is_an_error(tmp_path, encoder):
    build_index([Document("only", "hot soup")], encoder, tmp_path / "index")
    with pytest.raises(ValueError, match="npids, the format of a FlexIndex' ids, cannot hold those"):
        to_flex_index(tmp_path / "index", tmp_path / "flex")
    assert not (tmp_path / "flex").exists()


def test_kept_embeddings_make_a_flex_index_of_any_kind(tmp_path, collection, encoder):
    documents = list(read_corpus(collection / "corpus.jsonl"))
    build_index(documents, encoder, tmp_path / "sq8", IndexSettings(kind="SQ8", keep_embeddings=True))
    build_index(documents, encoder, tmp_path / "flat")
    for name in ("sq8", "flat"):
        to_flex_index(tmp_path / name, tmp_path / f"{name}.flex")
    assert (tmp_path / "sq8.flex" / "vecs.f4").read_bytes() == (tmp_path / "flat.flex" / "vecs.f4").read_bytes()


def test_an_index_without_exact_vectors_is_refused_and_nothing_is_written(tmp_path, toy_index):
    rebuild_index(toy_index, tmp_path / "sq8", IndexSettings(kind="SQ8"))
    with pytest.raises(ValueError, match="SQ8 holds no exact vectors; take a Flat index"):
        to_flex_index(tmp_path / "sq8", tmp_path / "flex")
    (tmp_path / "sq8" / "effir.json").unlink()
    with pytest.raises(ValueError, match="IndexScalarQuantizer holds no exact vectors; take a Flat index"):
        to_flex_index(tmp_path / "sq8", tmp_path / "flex")
    assert [path.name for path in tmp_path.iterdir()] == ["sq8"]


def test_a_damaged_index_is_refused(tmp_path, encoder):
    build_index([Document("a", "hot soup")], encoder, tmp_path / "index")
    with open(tmp_path / "index" / "docid", "a") as file:
        file.write("b\n")
    with pytest.raises(ValueError, match="SHA-256"):
        to_flex_index(tmp_path / "index", tmp_path / "flex")


def test_a_flat_index_of_pyserini_is_exported(tmp_path, pyserini_folder):
    assert to_flex_index(pyserini_folder, tmp_path / "flex") == 12


def test_the_command_exports_an_index_and_refuses_what_a_model_needs(tmp_path, toy_index):
    words = ["export", str(toy_index), "--to", "flex", "--output", str(tmp_path / "flex")]
    done = CliRunner().invoke(cli, words)
    assert (done.exit_code, done.output) == (0, f"12 documents -> {tmp_path / 'flex'}\n")
    again = CliRunner().invoke(cli, words)
    assert again.exit_code == 1 and "exists already" in again.output
    for option in (["--int8"], ["--texts", "t"], ["--pooling", "cls"], ["--weights", "f16"]):
        done = CliRunner().invoke(cli, [*words, *option])
        assert done.exit_code == 2 and f"{option[0]} does not go with --to flex" in done.output


def test_the_retriever_needs_no_pyterrier_dr():
    code = "import sys, effir_search.adapters.pyterrier; sys.exit('pyterrier_dr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
