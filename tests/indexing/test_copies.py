import json
import shutil

import faiss
import numpy as np
import pytest
from conftest import WORDS, list_in_manifest, write_jsonl

from effir_search.encoding.encoder import Encoder
from effir_search.indexing.build import build_index, index_corpus, rebuild_index
from effir_search.indexing.copies import best_documents, first_of_equal, read_copies, vector_digests
from effir_search.indexing.index_record import read_index_info
from effir_search.indexing.store import Store
from effir_search.indexing.verify import verify_index
from effir_search.searching.info import describe
from effir_search.searching.pyserini_bridge import faiss_searcher, pyserini_faiss, query_encoder
from effir_search.searching.search_topics import search
from effir_search.settings import EncoderOptions, IndexSettings
from effir_search.text.corpus import Document, read_corpus
from effir_search.text.trec import Query

NUM_EMPTY, NUM_REAL = 1500, 120
NUM_TWO_PARTS = 1300
QUERIES = [
    Query(str(number), text) for number, text in enumerate(["hot soup", "the cat eats fish", "sweet tea", "red"])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bert_folder):
    """A corpus of 1,500 empty documents among 120 others, of which 20 are there three times; flat, embeddings kept."""
    folder, rng = tmp_path_factory.mktemp("copies"), np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(4, 12))) for _ in range(NUM_REAL - 40)]
    texts = [""] * NUM_EMPTY + texts + 2 * texts[:20]
    records = [{"_id": f"d{number:04}", "text": text} for number, text in enumerate(texts)]
    write_jsonl(folder / "corpus.jsonl", [records[row] for row in rng.permutation(len(records))])
    index_corpus(
        str(folder / "corpus.jsonl"),
        str(bert_folder),
        folder / "flat",
        IndexSettings(keep_embeddings=True),
        EncoderOptions(dtype="fp32"),
    )
    for kind in ("HNSW16", "HNSW16,SQ8", "SQ8"):
        rebuild_index(folder / "flat", folder / kind, IndexSettings(kind=kind))
    return folder


def hits_by_query(index_dir, encoder, k, **options):
    hits = list(search(index_dir, encoder, QUERIES, k=k, **options))
    return {query.query_id: [hit.doc_id for hit in hits if hit.query_id == query.query_id] for query in QUERIES}


@pytest.mark.parametrize("k", [1, 10, 200, 2000])
@pytest.mark.parametrize(("kind", "exact"), [("HNSW16", "flat"), ("HNSW16,SQ8", "SQ8")])
def test_an_hnsw_of_many_equal_documents_finds_what_exact_search_finds(folder, encoder, kind, exact, k):
    assert hits_by_query(folder / kind, encoder, k) == hits_by_query(folder / exact, encoder, k)


def test_equal_vectors_are_one_row_and_the_others_are_named_beside_it(folder):
    doc_ids = (folder / "HNSW16" / "docid").read_text().split()
    copies = read_copies(folder / "HNSW16", len(doc_ids))
    names = doc_ids + [doc_id for of_row in copies.values() for doc_id in of_row]
    texts = {document.doc_id: document.text for document in read_corpus(folder / "corpus.jsonl")}
    assert sorted(names) == sorted(texts)
    for row, of_row in copies.items():
        assert {texts[doc_id] for doc_id in of_row} == {texts[doc_ids[row]]}
    assert len({texts[doc_id] for doc_id in doc_ids}) == len(doc_ids) == NUM_REAL - 40 + 1
    assert read_index_info(folder / "HNSW16").num_documents == NUM_EMPTY + NUM_REAL
    assert not (folder / "flat" / "copies").exists() and not (folder / "SQ8" / "copies").exists()


def test_pyserini_opens_an_index_with_copies(folder, encoder):
    reference = pyserini_faiss().FaissSearcher(str(folder / "HNSW16"), query_encoder(encoder))
    texts = {document.doc_id: document.text for document in read_corpus(folder / "corpus.jsonl")}
    found = [texts[hit.docid] for hit in reference.search("the cat eats fish", k=20)]
    exact = dict.fromkeys(texts[doc_id] for doc_id in hits_by_query(folder / "flat", encoder, 1620)["1"])
    assert found == list(exact)[:20]  # each distinct text once
    assert len(faiss_searcher(folder / "HNSW16", encoder).search("the cat", k=1620)) == 1620


def test_remove_query_and_several_indexes_know_copies(tmp_path, folder, encoder):
    own = hits_by_query(folder / "HNSW16", encoder, 300)["0"]
    copy = next(iter(read_copies(folder / "HNSW16", 81).values()))[0]
    (query,) = [Query(copy, "hot soup")]
    removed = [hit.doc_id for hit in search(folder / "HNSW16", encoder, [query], k=1620, remove_query=True)]
    assert len(removed) == 1619 and copy not in removed
    build_index(
        [Document("x", "hot soup"), Document("y", "hot soup")], encoder, tmp_path / "more", IndexSettings(kind="HNSW16")
    )
    assert (tmp_path / "more" / "copies").read_text() == "0 y\n"
    together = [hit.doc_id for hit in search([folder / "HNSW16", tmp_path / "more"], encoder, QUERIES[:1], k=302)]
    assert together == ["y", "x", *own]
    build_index(
        [Document("z", "tea"), Document(copy, "tea")], encoder, tmp_path / "clash", IndexSettings(kind="HNSW16")
    )
    with pytest.raises(ValueError, match=f'document "{copy}" is in'):
        search([folder / "HNSW16", tmp_path / "clash"], encoder, QUERIES)


def test_an_index_whose_rows_are_all_documents_is_searched_as_before(tmp_path, folder, encoder):
    # As it was written before equal vectors were put together: every vector a row, and no copies in the record.
    shutil.copytree(folder / "flat", tmp_path / "old")
    index = faiss.index_factory(32, "HNSW16", faiss.METRIC_INNER_PRODUCT)
    index.add(faiss.read_index(str(folder / "flat" / "index")).reconstruct_n(0, NUM_EMPTY + NUM_REAL))
    faiss.write_index(index, str(tmp_path / "old" / "index"))
    record = json.loads((tmp_path / "old" / "effir.json").read_text()) | {"kind": "HNSW16"}
    del record["copies_sha256"]
    (tmp_path / "old" / "effir.json").write_text(json.dumps(record))
    assert [len(of_query) for of_query in hits_by_query(tmp_path / "old", encoder, 10).values()] == [10] * 4


@pytest.mark.parametrize("kind", ["HNSW16", "HNSW16,SQ8"])
def test_verify_counts_copies_and_measures_recall(folder, encoder, kind):
    checked = verify_index(folder / kind, encoder)
    assert (checked.num_documents, checked.num_sampled) == (NUM_EMPTY + NUM_REAL, 64)
    assert (checked.recall.at_10, checked.recall.at_100) == (1, 1)
    assert checked.recall.reference == ("the vectors in it" if kind == "HNSW16" else "the codes in it")


def test_a_missing_or_damaged_file_of_copies_is_an_error(tmp_path, folder, encoder):
    broken = shutil.copytree(folder / "HNSW16", tmp_path / "broken")
    lines = (broken / "copies").read_text().splitlines()
    (broken / "copies").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="copies: its SHA-256"):
        verify_index(broken, encoder)
    with pytest.raises(ValueError, match="1619 documents, where 1620 were indexed; is a file missing"):
        search(broken, encoder, QUERIES)
    (broken / "copies").unlink()
    with pytest.raises(ValueError, match="81 documents, where 1620 were indexed; is a file missing"):
        search(broken, encoder, QUERIES)
    with pytest.raises(FileNotFoundError, match="copies"):
        verify_index(broken, encoder)
    for line in ("81 d0001", "x d0001", "3", "-1 d0001", "3 "):
        (broken / "copies").write_text(f"0 d0000\n{line}\n")
        with pytest.raises(ValueError, match="copies:2: not a row of the 81 and an id"):
            search(broken, encoder, QUERIES)


def test_info_counts_copies(folder):
    told = json.loads(describe(str(folder / "HNSW16"), "json"))
    assert (told["documents"], told["documents_with_the_vector_of_another"]) == (1620, 1539)


def test_an_index_with_copies_is_replaced_on_request(tmp_path, folder, encoder):
    shutil.copytree(folder / "HNSW16", tmp_path / "index")
    build_index([Document("1", "cat")], encoder, tmp_path / "index", IndexSettings(overwrite=True))
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["docid", "effir.json", "index"]


def test_the_first_of_equal_digests():
    rows = np.array([[1, 0], [2, 0], [1, -0.0], [0, 0], [2, 0], [-0.0, 0]], dtype=np.float32)
    digests = vector_digests(rows)
    assert first_of_equal([digests[:2], digests[2:]]).tolist() == [0, 1, 0, 3, 1, 3]


def test_the_best_documents_are_ordered_by_score_and_id_descending():
    rows, scores = np.array([0, 1, 2]), np.array([0.5, 0.75, 0.5], dtype=np.float32)
    best = best_documents(rows, scores, ["b", "x", "c"], {0: ["d"], 2: ["a"]}, 4)
    assert best == [(0.75, "x"), (0.5, "d"), (0.5, "c"), (0.5, "b")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_tokens_have_the_same_vector_whatever_batch_and_part_they_were_in(tmp_path, bert_folder, dtype):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) for _ in range(NUM_TWO_PARTS)]
    texts[::7] = ["the cat eats fish"] * len(texts[::7])
    texts[1::21] = ["The  CAT eats fish"] * len(texts[1::21])  # as the tokenizer sees it, the same
    encoder = Encoder.from_pretrained(bert_folder, dtype=dtype, batch_tokens=700)
    build_index([Document(f"d{row}", text) for row, text in enumerate(texts)], encoder, tmp_path / "index")
    rows = faiss.read_index(str(tmp_path / "index" / "index")).reconstruct_n(0, NUM_TWO_PARTS)
    equal = np.unique([*range(0, NUM_TWO_PARTS, 7), *range(1, NUM_TWO_PARTS, 21)])
    assert len(np.unique(rows[equal], axis=0)) == 1
    np.testing.assert_allclose(rows, encoder.encode_documents(texts), atol=1e-5 if dtype == "fp32" else 0.02)
    own = encoder.encode_documents(texts[:1024])  # the first part by itself, in its own batches
    np.testing.assert_array_equal(rows[0], own[0])


def test_a_store_of_an_earlier_version_has_no_digests_and_is_read_as_it_is(tmp_path, folder):
    shutil.copytree(folder / "flat.parts", tmp_path / "flat.parts")
    list_in_manifest(tmp_path / "flat.parts", without=["tokens_sha256"])
    for file in (tmp_path / "flat.parts").glob("*.tokens"):
        file.unlink()
    blocks = list(Store(tmp_path / "flat.parts").read_all())
    for number, (vectors, _) in enumerate(blocks):
        np.testing.assert_array_equal(vectors, np.load(tmp_path / "flat.parts" / f"part-{number:05}.npy"))
    assert len(blocks) == 2
