import dataclasses
import json
import shutil

import faiss
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DOCUMENTS, QRELS, TOPICS, save_model, save_sentence_files, write_jsonl
from ir_measures import ScoredDoc

from effir_search.cli import cli
from effir_search.encoding.config import EncoderConfig
from effir_search.encoding.encoder import Encoder
from effir_search.indexing.build import Source, build_index
from effir_search.indexing.verify import verify_index
from effir_search.searching.search_topics import format_hits, load_topics, search, search_text, search_topics
from effir_search.searching.searcher import load_encoder
from effir_search.settings import EncoderOptions, IndexSettings, SearchSettings
from effir_search.text.corpus import Document, read_corpus
from effir_search.text.trec import Query, read_qrels, read_run, strictly_decreasing


@pytest.fixture(scope="module")
def topics(collection):
    return load_topics(str(collection / "queries.jsonl"))


def test_hits_are_the_largest_dot_products_best_first(toy_index, collection, encoder, topics):
    documents = list(read_corpus(collection / "corpus.jsonl"))
    products = encoder.encode_queries([query.text for query in topics]) @ encoder.encode_documents(documents).T
    expected = []
    for query, row in zip(topics, products, strict=True):
        hits = [
            ScoredDoc(query.query_id, document.doc_id, float(score))
            for document, score in zip(documents, row, strict=True)
        ]
        expected += strictly_decreasing(hits)[:5]
    found = list(search(toy_index, encoder, topics, k=5))
    assert [hit[:2] for hit in found] == [hit[:2] for hit in expected]
    np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in expected], atol=1e-5)


def test_scores_of_a_query_decrease_strictly_even_among_equal_documents(tmp_path, encoder):
    build_index(
        [Document(name, "the same cat") for name in "cadb"] + [Document("x", "soup")], encoder, tmp_path / "index"
    )
    hits = list(search(tmp_path / "index", encoder, [Query("q", "cat")], k=5))
    assert [hit.doc_id for hit in hits if hit.doc_id != "x"] == ["d", "c", "b", "a"]  # as trec_eval: id descending
    scores = np.array([hit.score for hit in hits])
    assert (np.diff(scores) < 0).all()
    assert (scores == scores.astype(np.float32)).all()


@pytest.fixture(scope="module")
def tied(tmp_path_factory, encoder):
    """Two indexes with a thousand empty documents, a dozen equal ones and some others between them."""
    folder, rng = tmp_path_factory.mktemp("tied"), np.random.default_rng(0)
    texts = (
        ["" for _ in range(1000)]
        + ["the same cat"] * 12
        + list(dict.fromkeys(" ".join(DOCUMENTS[i]) for i in DOCUMENTS))
    )
    documents = [Document(f"d{number:04}", text) for number, text in enumerate(texts)]
    documents = [documents[number] for number in rng.permutation(len(documents))]
    for name, part in {"one": documents, "first": documents[:700], "second": documents[700:]}.items():
        build_index(part, encoder, folder / name)
    return folder


@pytest.mark.parametrize("remove_query", [False, True])
@pytest.mark.parametrize("names", [["one"], ["first", "second"]])
def test_the_run_of_k_hits_is_the_beginning_of_any_deeper_run(tied, encoder, names, remove_query):
    queries = [Query("d1005", "the same cat"), Query("d0003", "a"), Query("2", "hot soup")]
    folders = [tied / name for name in names]

    def run(k):
        hits = list(search(folders, encoder, queries, k=k, remove_query=remove_query))
        return {query.query_id: [hit for hit in hits if hit.query_id == query.query_id] for query in queries}

    deepest = run(2000)
    assert {len(of_query) for of_query in deepest.values()} <= {1024, 1023}
    for k in (1, 3, 5, 11, 12, 13, 500, 1010, 1023):
        assert run(k) == {query_id: of_query[:k] for query_id, of_query in deepest.items()}
    first = [hit.doc_id for hit in run(3)["d1005"]]
    assert first == ["d1011", "d1010", "d1009"]  # of the twelve, the ids that trec_eval ranks first


def test_a_query_by_itself_gets_the_hits_that_it_gets_among_many(tied, encoder):
    queries = [
        Query(str(number), f"{word} soup") for number, word in enumerate("cat dog red hot tea fish".split() * 10)
    ]
    together = list(search(tied / "one", encoder, queries, k=15))
    alone = [hit for query in queries[:6] for hit in search(tied / "one", encoder, [query], k=15)]
    assert [hit[:2] for hit in alone] == [hit[:2] for hit in together[: len(alone)]]


def test_more_hits_than_documents_are_all_documents(toy_index, encoder, topics):
    hits = list(search(toy_index, encoder, topics, k=1000))
    assert len(hits) == 3 * 12
    assert {hit.doc_id for hit in hits} == DOCUMENTS.keys()


@pytest.fixture(scope="module")
def halves(tmp_path_factory, collection, encoder):
    """The toy corpus in two indexes: its even documents and its odd ones."""
    folder, documents = tmp_path_factory.mktemp("halves"), list(read_corpus(collection / "corpus.jsonl"))
    for name, half in {"even": documents[::2], "odd": documents[1::2]}.items():
        build_index(half, encoder, folder / name)
    return [folder / "even", folder / "odd"]


@pytest.mark.parametrize(("k", "remove_query"), [(1, False), (4, False), (5, True), (1000, False)])
def test_indexes_searched_together_give_what_one_over_all_documents_gives(
    toy_index, halves, encoder, topics, k, remove_query
):
    together = list(search(halves, encoder, topics, k=k, remove_query=remove_query))
    one = list(search(toy_index, encoder, topics, k=k, remove_query=remove_query))
    assert [hit[:2] for hit in together] == [hit[:2] for hit in one]
    np.testing.assert_allclose([hit.score for hit in together], [hit.score for hit in one], atol=1e-6)


def test_a_document_that_two_indexes_have_is_an_error(toy_index, halves, encoder, topics):
    with pytest.raises(ValueError, match=f'document "001" is in {halves[0]} and in {toy_index}'):
        search([*halves, toy_index], encoder, topics)
    with pytest.raises(ValueError, match="must be unique among indexes"):
        search([toy_index, toy_index], encoder, topics)


def test_every_one_of_several_indexes_must_be_of_the_encoder(tmp_path, halves, bert_folder, topics):
    other = Encoder.from_pretrained(bert_folder, pooling="cls")
    build_index([Document("x", "hot soup")], other, tmp_path / "other")
    model = load_encoder(halves[0])
    cannot = f"{halves[0]} and {tmp_path / 'other'} cannot be searched together: pooling is 'mean' in one and 'cls' in"
    with pytest.raises(ValueError, match=cannot):
        search([halves[0], tmp_path / "other"], model, topics)


def holding(vectors, kind, index_dir, copy, *, record=True):
    """A copy of an index that holds other vectors, in an index of another kind."""
    shutil.copytree(index_dir, copy)
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(copy / "index"))
    if not record:
        (copy / "effir.json").unlink()
    return copy


@pytest.mark.parametrize("flipped", [0x40, 0x80 | 0x40])
def test_a_flipped_bit_that_makes_a_score_huge_is_an_error_that_names_the_index(tmp_path, toy_index, encoder, flipped):
    damaged = shutil.copytree(toy_index, tmp_path / "index")
    content = bytearray((damaged / "index").read_bytes())
    content[-1] ^= flipped  # of the exponent, and of the sign, of the last component of document 012
    (damaged / "index").write_bytes(content)
    with pytest.raises(ValueError, match=f'{damaged}: is damaged: document "012" has the score .*effir verify'):
        list(search(damaged, encoder, [Query("q", "cat")], k=12))


# A row that is the query's own vector times c has the score c.
@pytest.mark.parametrize(
    ("kind", "factor", "sound"),
    [("Flat", 1.005, True), ("Flat", 1.02, False), ("SQ8", 1.4, True), ("SQ8", 1.6, False), ("Flat", np.inf, False)],
)
def test_no_cosine_is_above_1_but_for_what_quantisation_may_add(tmp_path, toy_index, encoder, kind, factor, sound):
    rows = encoder.encode_queries(["cat"]) * np.linspace(0, 1, 12, dtype=np.float32)[:, None]
    rows[-1] = np.where(rows[-1] == 0, 0, rows[-1] * np.float32(factor))
    index_dir = holding(rows, kind, toy_index, tmp_path / "index")
    if sound:
        (hit,) = search(index_dir, encoder, [Query("q", "cat")], k=1)
        assert hit.score == pytest.approx(factor, abs=0.02)
    else:
        with pytest.raises(ValueError, match="is damaged"):
            list(search(index_dir, encoder, [Query("q", "cat")], k=1))


def test_scores_of_vectors_of_any_length_may_be_above_1(tmp_path, toy_index, encoder):
    rows = encoder.encode_queries(["cat"]).repeat(12, axis=0) * 7
    of_another_program = holding(rows, "Flat", toy_index, tmp_path / "index", record=False)
    (hit,) = search(of_another_program, encoder, [Query("q", "cat")], k=1)
    assert hit.score == pytest.approx(7, abs=1e-4)
    folder = save_sentence_files(save_model(tmp_path / "m", "bert"), normalize=False, similarity="dot")
    model = Encoder.from_pretrained(folder)
    build_index([Document("1", "cat")], model, tmp_path / "dot")
    (hit,) = search(tmp_path / "dot", model, [Query("q", "cat")], k=1)
    assert hit.score > 1.5


def test_fewer_hits_than_one_are_an_error(toy_index, encoder, topics):
    with pytest.raises(ValueError, match="at least 1"):
        search(toy_index, encoder, topics, k=0)


def test_missing_hits_of_an_approximate_index_are_dropped(tmp_path, toy_index, encoder):
    # One list of four is probed, so FAISS fills up with -1.
    vectors = faiss.read_index(str(toy_index / "index")).reconstruct_n(0, 12)
    index = faiss.index_factory(32, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "index"))
    shutil.copy(toy_index / "docid", tmp_path / "docid")
    hits = list(search(tmp_path, encoder, [Query("q", "cat")], k=12))
    assert 0 < len(hits) < 12
    assert len({hit.doc_id for hit in hits}) == len(hits)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_remove_query_drops_the_querys_own_id_and_still_gives_k_hits(toy_index, encoder, k):
    own = [Query("007", DOCUMENTS["007"][1]), Query("7", "sweet tea")]
    plain = {k_: [h for h in search(toy_index, encoder, own, k=12) if h.query_id == k_] for k_ in ("007", "7")}
    assert plain["007"][0].doc_id == "007"
    removed = list(search(toy_index, encoder, own, k=k, remove_query=True))
    assert not any(hit.doc_id == hit.query_id for hit in removed)
    assert [hit.doc_id for hit in removed if hit.query_id == "007"] == [h.doc_id for h in plain["007"]][1 : k + 1]
    # "7" is not "007": nothing is removed for it.
    assert [hit.doc_id for hit in removed if hit.query_id == "7"] == [h.doc_id for h in plain["7"]][:k]


def test_without_remove_query_the_own_id_stays(toy_index, encoder):
    hits = list(search(toy_index, encoder, [Query("007", DOCUMENTS["007"][1])], k=1))
    assert [hit.doc_id for hit in hits] == ["007"]


def test_the_encoder_comes_from_the_index(toy_index, bert_folder, encoder):
    assert load_encoder(toy_index).config == encoder.config
    assert load_encoder(toy_index).weights_sha256 == encoder.weights_sha256


def test_settings_an_index_was_built_with_hold_for_its_searches(tmp_path, bert_folder, collection):
    options = {
        "pooling": "cls",
        "query_prompt": "red ",
        "document_prompt": "green ",
        "max_length": 9,
        "append_eos": True,
    }
    built = Encoder.from_pretrained(bert_folder, dtype="bf16", **options)
    build_index(read_corpus(collection / "corpus.jsonl"), built, tmp_path / "index")
    loaded = load_encoder(tmp_path / "index")
    assert loaded.config == built.config and loaded.dtype == built.dtype
    assert list(search(tmp_path / "index", loaded, [Query("q", "cat")], k=2))


# Of each setting a value that the tiny BERT's own files do not say.
OTHER_SETTINGS = {
    "pooling": "cls",
    "normalize": False,
    "similarity": "dot",
    "query_prompt": "red ",
    "document_prompt": "green ",
    "include_prompt": False,
    "max_length": 9,
    "append_eos": True,
    "dimension": 16,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EncoderConfig)])
def test_every_setting_of_the_encoder_comes_from_the_index(tmp_path, bert_folder, collection, encoder, field):
    assert getattr(encoder.config, field) != OTHER_SETTINGS[field]
    built = Encoder.from_pretrained(bert_folder, dtype="fp32", append_eos=field == "append_eos")
    built.config = dataclasses.replace(built.config, **{field: OTHER_SETTINGS[field]})
    build_index(read_corpus(collection / "corpus.jsonl"), built, tmp_path / "index")
    loaded = load_encoder(tmp_path / "index")
    assert loaded.config == built.config
    assert len(list(search(tmp_path / "index", loaded, [Query("q", "cat")], k=2))) == 2
    assert verify_index(tmp_path / "index", loaded, corpus=collection / "corpus.jsonl").num_sampled == 12


def test_an_index_that_normalizes_against_the_models_files_is_searched_by_the_cosine(tmp_path, collection):
    folder = save_sentence_files(save_model(tmp_path / "m", "bert"), normalize=False, similarity="dot")
    arguments = ["index", "--corpus", str(collection / "corpus.jsonl"), "--encoder", str(folder), "--dtype", "fp32"]
    done = CliRunner().invoke(cli, [*arguments, "--output", str(tmp_path / "index"), "--normalize"])
    assert done.exit_code == 0, done.output
    hits = search_text(" ".join(DOCUMENTS["007"]), index_dir=tmp_path / "index", settings=SearchSettings(hits=12))
    assert (hits[0][0].doc_id, hits[0][0].score) == ("007", pytest.approx(1, abs=1e-5))
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "index")])
    assert done.exit_code == 0 and "12 encoded again" in done.output
    done = CliRunner().invoke(cli, ["index", "--from", str(tmp_path / "index"), "--output", "x", "--normalize"])
    assert done.exit_code == 2 and "--normalize does not go with --from" in done.output


def test_a_folder_of_pyserini_needs_an_encoder(pyserini_folder, bert_folder):
    with pytest.raises(ValueError, match="give --encoder"):
        load_encoder(pyserini_folder)
    assert load_encoder(pyserini_folder, str(bert_folder)).dimension == 32


def test_a_model_that_has_moved_is_an_error_that_names_it(tmp_path, toy_index):
    shutil.copytree(toy_index, tmp_path / "index")
    record = (tmp_path / "index" / "effir.json").read_text()
    (tmp_path / "index" / "effir.json").write_text(json.dumps(json.loads(record) | {"model": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match="gone"):
        load_encoder(tmp_path / "index")


def test_cosine_scores_of_a_model_without_a_normalize_module(tmp_path):
    folder = save_sentence_files(save_model(tmp_path / "m", "bert"), normalize=False, similarity="cosine")
    model = Encoder.from_pretrained(folder)
    build_index([Document("1", "cat"), Document("2", "hot soup")], model, tmp_path / "index")
    hits = {hit.doc_id: hit.score for hit in search(tmp_path / "index", model, [Query("q", "dog")], k=2)}
    query, *documents = (v / np.linalg.norm(v) for v in model.encode_documents(["dog", "cat", "hot soup"]))
    np.testing.assert_allclose([hits["1"], hits["2"]], [query @ documents[0], query @ documents[1]], atol=1e-5)


def test_a_run_is_written_for_the_judged_topics(tmp_path, toy_index, collection):
    qrels = tmp_path / "some.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\n2\t008\t1\n")
    topics_file = str(collection / "queries.jsonl")
    assert search_topics(
        topics_file,
        tmp_path / "run",
        settings=SearchSettings(hits=4),
        index_dir=toy_index,
        qrels=str(qrels),
        tag="mine",
    ) == (
        1,
        4,
    )
    lines = [line.split() for line in (tmp_path / "run").read_text().splitlines()]
    assert [(line[0], line[1], line[3], line[5]) for line in lines] == [
        ("2", "Q0", str(rank), "mine") for rank in (1, 2, 3, 4)
    ]


def test_a_run_read_again_has_the_scores_of_the_search(tmp_path, toy_index, collection, encoder, topics):
    search_topics(str(collection / "queries.jsonl"), tmp_path / "run", index_dir=toy_index)
    read, found = read_run(tmp_path / "run"), list(search(toy_index, encoder, topics))
    assert [hit[:2] for hit in read] == [hit[:2] for hit in found]
    np.testing.assert_allclose([hit.score for hit in read], [hit.score for hit in found], atol=1e-6)


def test_topics_without_a_judged_one_are_an_error(collection):
    with pytest.raises(ValueError, match="none of its 3 topics is judged"):
        load_topics(
            str(collection / "queries.jsonl"),
            qrels=[q._replace(query_id="x") for q in read_qrels(collection / "qrels/test.tsv")],
        )


def test_judged_topics_are_chosen_in_file_order(collection):
    chosen = load_topics(str(collection / "queries.jsonl"), qrels=read_qrels(collection / "qrels" / "test.tsv"))
    assert [query.query_id for query in chosen] == list(TOPICS)
    assert {query_id for query_id, _ in QRELS} == set(TOPICS)


def test_topics_that_are_neither_a_file_nor_a_name_are_an_error():
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: no such topics file"):
        load_topics("nowhere.jsonl")


def test_one_text_is_searched_and_shown_with_its_documents(toy_index, collection):
    own_text = " ".join(DOCUMENTS["007"])
    hits = search_text(
        own_text, settings=SearchSettings(hits=2), index_dir=toy_index, corpora=[str(collection / "corpus.jsonl")]
    )
    assert [document.doc_id for _, document in hits] == [hit.doc_id for hit, _ in hits]
    first, second, *_ = format_hits(hits).splitlines()
    assert first.split() == ["1", "1.0000", "007", "lemon"]
    assert second.strip() == DOCUMENTS["007"][1]


def test_one_text_without_a_corpus_is_shown_by_ids(toy_index):
    hits = search_text("hot soup", index_dir=toy_index)
    assert len(hits) == 10 and all(document is None for _, document in hits)
    assert len(format_hits(hits).splitlines()) == 10


def test_a_corpus_that_is_not_the_indexs_is_an_error(tmp_path, toy_index):
    write_jsonl(tmp_path / "other.jsonl", [{"_id": "x", "text": "cat"}])
    with pytest.raises(ValueError, match="2 of 2 hits are not there"):
        search_text(
            "hot soup", settings=SearchSettings(hits=2), index_dir=toy_index, corpora=[str(tmp_path / "other.jsonl")]
        )


def test_hits_of_several_indexes_are_shown_from_several_corpora(tmp_path, encoder):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    write_jsonl(old, [{"_id": "1", "title": "soup", "text": "hot soup"}])
    write_jsonl(new, [{"_id": "2", "abstract": "sweet tea"}])
    for path, fields in ((old, ()), (new, ("abstract",))):
        documents = read_corpus(path, fields=fields or None)
        build_index(documents, encoder, path.with_suffix(""), IndexSettings(fields=fields), source=Source(corpus=path))
    indexes = [tmp_path / "old", tmp_path / "new"]
    hits = search_text(
        "tea", options=EncoderOptions(device="cpu", dtype="fp32"), index_dir=indexes, corpora=[str(old), str(new)]
    )
    assert {document for _, document in hits} == {Document("1", "hot soup", "soup"), Document("2", "sweet tea")}


def test_topics_without_a_text_get_no_hits_and_one_warning(tmp_path, toy_index, topics, encoder, caplog):
    records = [{"_id": query.query_id, "text": query.text} for query in topics]
    records[1:1] = [{"_id": "empty", "text": ""}, {"_id": "blank", "text": " \t\u00a0"}]
    file = write_jsonl(tmp_path / "topics.jsonl", records)
    assert search_topics(str(file), tmp_path / "run", index_dir=toy_index, settings=SearchSettings(hits=4)) == (5, 12)
    assert caplog.text.count("2 of 5 topics are empty and get no hits") == 1
    # As without them, but for the last bits: the model has other batches.
    expected = list(search(toy_index, encoder, topics, k=4))
    assert [hit[:2] for hit in read_run(tmp_path / "run")] == [hit[:2] for hit in expected]


def test_topics_that_are_all_empty_are_an_error(tmp_path, toy_index):
    file = write_jsonl(tmp_path / "topics.jsonl", [{"_id": "1", "text": ""}, {"_id": "2", "text": "  "}])
    with pytest.raises(ValueError, match="2 topics, none of them with a text"):
        search_topics(str(file), tmp_path / "run", index_dir=toy_index)
    assert not (tmp_path / "run").exists()


def test_an_empty_query_is_an_error(toy_index):
    with pytest.raises(ValueError, match="the text is empty"):
        search_text("  ", index_dir=toy_index)


def test_threads_do_not_change_the_hits(toy_index, encoder, topics):
    assert list(search(toy_index, encoder, topics, threads=1)) == list(search(toy_index, encoder, topics, threads=2))


def test_cut_queries_are_warned_of(toy_index, encoder, caplog):
    list(search(toy_index, encoder, [Query("1", "cat " * 100), Query("2", "cat")], k=1))
    assert "1 queries were cut at 64 tokens" in caplog.text


def test_a_moved_model_is_searched_with_the_settings_of_the_index(tmp_path, bert_folder, collection):
    shutil.copytree(bert_folder, tmp_path / "model")
    options = {"pooling": "cls", "max_length": 9, "dtype": "bf16"}
    built = Encoder.from_pretrained(tmp_path / "model", **options)
    build_index(read_corpus(collection / "corpus.jsonl"), built, tmp_path / "index")
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match="index: its model .*model is not there; if it has moved, give --encoder"
    ):
        load_encoder(tmp_path / "index")
    moved = load_encoder(tmp_path / "index", str(tmp_path / "moved"))
    assert (moved.config, moved.dtype) == (built.config, built.dtype)
    assert list(search(tmp_path / "index", moved, [Query("q", "cat")], k=1))
