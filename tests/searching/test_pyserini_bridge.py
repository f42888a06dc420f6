import json
import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import QRELS, TOPICS

from effir_search.encoding.encoder import Encoder
from effir_search.searching.pyserini_bridge import (
    build_bm25,
    builtin_topics,
    faiss_searcher,
    java_home,
    pyserini_faiss,
    query_encoder,
    search_bm25,
    start_java,
)
from effir_search.text.corpus import read_corpus
from effir_search.text.trec import Query


def test_an_older_java_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "release").write_text('JAVA_VERSION="17.0.15"\n')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert java_home() != str(tmp_path)
    assert 'JAVA_VERSION="21' in (Path(java_home()) / "release").read_text()


def test_a_java_21_or_newer_in_java_home_is_used(tmp_path, monkeypatch):
    (tmp_path / "release").write_text('IMPLEMENTOR="x"\nJAVA_VERSION="23.0.1"\n')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert java_home() == str(tmp_path)


@pytest.mark.processes
def test_pyserini_starts_without_a_key_a_java_or_the_hub(tmp_path):
    module = "effir_search.searching.pyserini_bridge"
    code = f"from {module} import pyserini_faiss; print(pyserini_faiss().FaissSearcher.__name__)"
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment = kept | {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "FaissSearcher\n", done.stderr


def test_no_key_stays_behind_in_the_environment(monkeypatch):
    pyserini_faiss()
    assert os.environ.get("OPENAI_API_KEY") != "not needed"


def test_pyserinis_own_searcher_opens_the_folder_and_gives_the_same_hits(toy_index, encoder):
    reference = pyserini_faiss().FaissSearcher(str(toy_index), query_encoder(encoder))
    ours = faiss_searcher(toy_index, encoder)
    for text in TOPICS.values():
        hits, expected = ours.search(text, k=5), reference.search(text, k=5)
        assert [hit.docid for hit in hits] == [hit.docid for hit in expected]
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in expected], atol=1e-6)


def test_scores_are_the_dot_products_of_the_embeddings(toy_index, collection, encoder):
    documents = list(read_corpus(collection / "corpus.jsonl"))
    products = encoder.encode_queries(list(TOPICS.values())) @ encoder.encode_documents(documents).T
    found = faiss_searcher(toy_index, encoder).batch_search(list(TOPICS.values()), list(TOPICS), k=12)
    for query_id, row in zip(TOPICS, products, strict=True):
        scores = {hit.docid: hit.score for hit in found[query_id]}
        np.testing.assert_allclose([scores[document.doc_id] for document in documents], row, atol=1e-5)


def test_query_encoder_gives_one_vector_or_a_batch_of_them(encoder):
    adapter = query_encoder(encoder)
    assert adapter.encode("hot soup").shape == (32,)
    np.testing.assert_allclose(adapter.encode_batch(["cat", "hot soup"])[1], adapter.encode("hot soup"), atol=1e-6)


def test_average_prf_takes_our_searcher(toy_index, encoder):
    from pyserini.search.faiss import DenseVectorAveragePrf, DenseVectorRocchioPrf

    searcher = faiss_searcher(toy_index, encoder)
    vector, candidates = searcher.search("hot soup", k=3, return_vector=True)
    new = DenseVectorAveragePrf().get_prf_q_emb(vector[0], candidates)
    np.testing.assert_allclose(new, np.mean([vector[0], *(hit.vectors for hit in candidates)], axis=0), atol=1e-6)
    assert len(searcher.search(new[None], k=4)) == 4
    vectors, batch = searcher.batch_search(list(TOPICS.values()), list(TOPICS), k=3, return_vector=True)
    rocchio = DenseVectorRocchioPrf(0.9, 0.1, 0.0, 3, 0).get_batch_prf_q_emb(list(TOPICS), vectors, batch)
    assert searcher.batch_search(rocchio, list(TOPICS), k=2).keys() == TOPICS.keys()


def test_hybrid_search_takes_our_searcher(tmp_path, toy_index, collection, encoder):
    build_bm25(read_corpus(collection / "corpus.jsonl"), tmp_path / "bm25")
    from pyserini.search.hybrid import HybridSearcher
    from pyserini.search.lucene import LuceneSearcher

    dense = faiss_searcher(toy_index, encoder)
    hits = HybridSearcher(dense, LuceneSearcher(str(tmp_path / "bm25"))).search("hot soup", k0=12, k=12, alpha=0.0)
    assert [hit.docid for hit in hits] == [hit.docid for hit in dense.search("hot soup", k=12)]


def test_bm25_finds_the_document_with_the_rare_words(tmp_path, collection):
    build_bm25(read_corpus(collection / "corpus.jsonl"), tmp_path / "bm25")
    hits = list(search_bm25(tmp_path / "bm25", [Query("2", "tomato soup"), Query("007", "sweet honey")], k=3))
    best = {query_id: [hit.doc_id for hit in hits if hit.query_id == query_id][0] for query_id in ("2", "007")}
    assert best == {"2": "008", "007": "007"}
    assert ("007", best["007"]) in QRELS


def test_another_encoder_than_the_indexs_is_an_error_with_both_values(toy_index, llama_folder, bert_folder):
    other = Encoder.from_pretrained(llama_folder)
    ours = Encoder.from_pretrained(bert_folder, dtype="fp32")
    values = f"'{ours.weights_sha256[:12]}' in the index and '{other.weights_sha256[:12]}' in the encoder"
    with pytest.raises(ValueError, match=f"weights is {values}; give the model that the index was made with"):
        faiss_searcher(toy_index, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "cls"}, "pooling is 'mean' in the index and 'cls' in the encoder"),
        ({"query_prompt": "red "}, "query_prompt is '' in the index and 'red ' in the encoder"),
        ({"document_prompt": "red "}, "document_prompt is '' in the index and 'red ' in the encoder"),
        ({"max_length": 9}, "max_length is 64 in the index and 9 in the encoder"),
        ({"append_eos": True}, "append_eos is False in the index and True in the encoder"),
    ],
)
def test_another_setting_than_the_indexs_is_an_error_with_both_values(toy_index, bert_folder, options, message):
    with pytest.raises(ValueError, match=message):
        faiss_searcher(toy_index, Encoder.from_pretrained(bert_folder, **options))


def test_a_folder_pyserini_made_is_searched_with_the_encoder_that_is_given(tmp_path, toy_index, collection, encoder):
    pyserini_faiss()
    from pyserini.encode.optional import FaissRepresentationWriter

    documents = list(read_corpus(collection / "corpus.jsonl"))
    writer = FaissRepresentationWriter(str(tmp_path), dimension=32)
    with writer:
        vectors = encoder.encode_documents(documents)
        writer.write({"id": [document.doc_id for document in documents], "vector": vectors}, fields=["contents"])
    hits = faiss_searcher(tmp_path, encoder).search("hot soup", k=3)
    assert [hit.docid for hit in hits] == [
        hit.docid for hit in faiss_searcher(toy_index, encoder).search("hot soup", k=3)
    ]


def test_another_dimension_in_a_folder_of_pyserini_is_an_error(tmp_path, encoder):
    faiss.write_index(faiss.IndexFlatIP(7), str(tmp_path / "index"))
    (tmp_path / "docid").write_text("")
    with pytest.raises(ValueError, match="dimension is 7 in the index and 32 in the encoder"):
        faiss_searcher(tmp_path, encoder)


@pytest.fixture
def names_of_topics(tmp_path, monkeypatch):
    """What Pyserini 2.4 and later download, names of topics and topics, as files; earlier versions know the names."""
    start_java()
    from pyserini.search import _base

    if hasattr(_base, "topics_mapping"):
        return False
    reader = "io.anserini.search.topicreader.TsvStringTopicReader"
    files = {"topics.json": {"toy": {"path": "toy.tsv", "reader_class": reader}}, "topics-aliases.json": {}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "topics").mkdir()
    (tmp_path / "topics" / "toy.tsv").write_text("007\tsweet honey\n8\thot soup\n")
    monkeypatch.setattr(_base, "_topics_mapping", None)
    monkeypatch.setattr(_base, "EVAL_BASE_URL", f"{tmp_path.as_uri()}/")
    monkeypatch.setattr(_base, "TOPICS_BASE_URL", f"{tmp_path.as_uri()}/topics/")
    monkeypatch.setattr(_base, "get_cache_home", lambda: str(tmp_path / "cache"))
    return True


def test_an_unknown_name_is_no_builtin_topics(names_of_topics):
    assert builtin_topics("no-such-topics") is None


def test_names_of_topics_that_are_downloaded_too_give_topics_whose_ids_are_text(names_of_topics):
    if not names_of_topics:
        pytest.skip("this Pyserini knows the names and downloads the topics in Java")
    assert sorted(builtin_topics("toy")) == [Query("007", "sweet honey"), Query("8", "hot soup")]


def test_catalogues_of_prebuilt_indexes_are_read_once_they_are_looked_into():
    code = """
import sys, types
from effir_search.searching.pyserini_catalogues import MODULE, defer_catalogues
from effir_search.searching.pyserini_bridge import pyserini_faiss

pyserini_faiss()
from pyserini import prebuilt_index_info, util

assert sys.modules[MODULE] is prebuilt_index_info
assert "TF_INDEX_INFO" not in vars(prebuilt_index_info), "the real module is not read yet"
import urllib.request, io, json

record = {"name": "toy", "description": "", "filename": "toy.tgz", "urls": [], "md5": "", "size": 1}
names = ("msmarco-v1-passage.unicoil", "msmarco-v2-passage.unicoil-0shot")
records = [record | {"name": name} for name in names]
urllib.request.urlopen = lambda *_args, **_options: io.BytesIO(json.dumps(records).encode())
assert "msmarco-v1-passage.unicoil" in util.IMPACT_INDEX_INFO
assert "filename" in util.IMPACT_INDEX_INFO["msmarco-v1-passage.unicoil"]
assert "no-such-index" not in util.IMPACT_INDEX_INFO
assert len(list(util.IMPACT_INDEX_INFO)) == len(util.IMPACT_INDEX_INFO) >= 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_builtin_topics_without_a_network_are_one_os_error(monkeypatch, tmp_path):
    # "trec1-adhoc" is a name of Pyserini's, which it downloads; the cache folder is empty and there is no network.
    import jnius

    jnius.autoclass("java.lang.System").setProperty("anserini.topics.cache", str(tmp_path))
    with pytest.raises(OSError, match="trec1-adhoc: .*cannot be downloaded"):
        builtin_topics("trec1-adhoc")


def test_what_only_encoders_of_pyserini_need_is_imported_once_they_need_it():
    code = """
import os, sys
import numpy as np
from effir_search.searching.pyserini_bridge import pyserini_faiss

os.environ.pop("OPENAI_API_KEY", None)
pyserini_faiss()
assert not [name for name in sys.modules if name.partition(".")[0] in ("sklearn", "openai")]
assert not [name for name in sys.modules if name.startswith("pandas.")]
from pyserini import encode
from pyserini.encode import _auto

rows = np.array([[3.0, 4.0], [0.0, 2.0]])
np.testing.assert_allclose(_auto.normalize(rows, axis=1, norm="l2"), [[0.6, 0.8], [0.0, 1.0]])
assert encode._base.pd.DataFrame([[1, 2]]).shape == (1, 2)
import pandas
import sklearn.preprocessing

assert sklearn.preprocessing.__file__
assert pandas.Series([1, 2]).sum() == 3
os.environ["OPENAI_API_KEY"] = "none"
import pyserini.encode._openai as real

assert isinstance(real.OpenAiQueryEncoder, type)
assert encode.OpenAiQueryEncoder is not real.OpenAiQueryEncoder
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_encoder_that_a_function_stands_for_is_made_by_its_own_class():
    code = """
from effir_search.searching.pyserini_bridge import pyserini_faiss

pyserini_faiss()
from pyserini import encode

try:
    encode.OpenAiQueryEncoder(embeddings=1, surely_unknown=2, model_name=3, tokenizer_name="no such tokenizer")
except Exception as error:
    print(type(error).__name__, error)
import sys
print("openai" in sys.modules)
"""
    environment = dict(os.environ, OPENAI_API_KEY="none")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"
