import json
import os
from pathlib import Path

import mteb
import numpy as np
import pytest
from conftest import QRELS, TOPICS, save_model, save_sentence_files
from mteb.models.models_protocols import EncoderProtocol, SearchProtocol
from mteb.types import PromptType

from effir_search.adapters.mteb import EffirEncoder, EffirIndex, collection_task, model_meta, run_tasks, searched_with
from effir_search.demo.demo import demo_model
from effir_search.encoding.config import scale
from effir_search.encoding.encoder import Encoder
from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.indexing.build import index_corpus
from effir_search.searching.search_topics import load_topics, search
from effir_search.settings import EncoderOptions, IndexSettings
from effir_search.text.trec import read_qrels

FP32 = EncoderOptions(device="cpu", dtype="fp32")
BATCHES = [{"text": ["hot soup", "the cat"]}, {"text": ["tea"]}]
TEXTS = ["hot soup", "the cat", "tea"]


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A model with prompts, whose similarity is the dot product of vectors of any length."""
    folder = save_model(tmp_path_factory.mktemp("prompted"), "bert")
    prompts = {"query": "red ", "document": "green "}
    return save_sentence_files(folder, normalize=False, prompts=prompts, similarity="dot")


def ndcg(collection, model, index_dir, options=FP32):
    """nDCG@10 as effir evaluate gives it, through an index on disk."""
    corpus, queries = str(collection / "corpus.jsonl"), str(collection / "queries.jsonl")
    index_corpus(corpus, str(model), index_dir, options=options)
    qrels = read_qrels(collection / "qrels" / "test.tsv")
    (measure,) = parse_measures("nDCG@10")
    run = search(index_dir, Encoder.from_pretrained(model, options), load_topics(queries, qrels=qrels))
    return evaluate_queries(run, qrels, [measure]).mean[measure]


@pytest.mark.parametrize(
    ("prompt_type", "prompt"), [(PromptType.query, "red "), (PromptType.document, "green "), (None, "")]
)
def test_each_kind_of_text_gets_its_prompt(prompted, prompt_type, prompt):
    encoder = Encoder.from_pretrained(prompted, FP32)
    given = EffirEncoder(encoder).encode(BATCHES, prompt_type=prompt_type, task_metadata=None, hf_split="test")
    np.testing.assert_allclose(given, encoder.encode(TEXTS, prompt=prompt).embeddings, atol=1e-6)


def test_a_shorter_dimension_gives_the_first_components_at_length_1(bert_folder):
    full, short = EffirEncoder(bert_folder, FP32), EffirEncoder(bert_folder, EncoderOptions(dtype="fp32", dimension=8))
    vectors = full.encode(BATCHES)[:, :8]
    np.testing.assert_allclose(
        short.encode(BATCHES), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-6
    )
    assert short.mteb_model_meta.embed_dim == 8
    assert short.mteb_model_meta.experiment_kwargs == {"dimension": 8}


def test_the_record_says_what_the_model_is(bert_folder, prompted):
    encoder = Encoder.from_pretrained(bert_folder, FP32)
    meta = model_meta(encoder)
    assert meta.name == f"effir/{bert_folder.name}"
    assert (meta.embed_dim, meta.max_tokens, meta.use_instructions) == (32, encoder.config.max_length, False)
    assert meta.n_parameters == sum(p.numel() for p in encoder.model.parameters())
    assert meta.memory_usage_mb == pytest.approx(4 * meta.n_parameters / 2**20)
    assert meta.experiment_kwargs is None
    assert meta.similarity_fn_name.value == "cosine"
    other = model_meta(Encoder.from_pretrained(prompted, FP32))
    assert (other.similarity_fn_name.value, other.use_instructions) == ("dot", True)
    # The same weights, read in another way.
    assert other.revision != meta.revision


def test_settings_that_are_not_the_models_own_are_an_experiment_of_it(bert_folder):
    options = EncoderOptions(device="cpu", dtype="bf16", pooling="cls", query_prompt="hot ")
    meta = model_meta(Encoder.from_pretrained(bert_folder, options))
    assert meta.experiment_kwargs == {"pooling": "cls", "query_prompt": "hot ", "dtype": "bfloat16"}


@pytest.mark.parametrize("name", ["bert_folder", "prompted"])
def test_similarity_is_the_encoders(request, name):
    model = EffirEncoder(request.getfixturevalue(name), FP32)
    vectors = scale(model.encoder.encode(TEXTS).embeddings, model.encoder.config)
    np.testing.assert_allclose(model.similarity(vectors, vectors), vectors @ vectors.T, rtol=1e-5, atol=1e-5)


def test_mteb_takes_the_two_as_its_protocols(bert_folder):
    model = EffirEncoder(bert_folder, FP32)
    assert isinstance(model, EncoderProtocol) and not isinstance(model, SearchProtocol)
    assert isinstance(searched_with(model, IndexSettings()), SearchProtocol)


def test_mteb_loads_the_model_by_its_record(bert_folder):
    meta = EffirEncoder(bert_folder, EncoderOptions(dtype="fp32", dimension=8)).mteb_model_meta
    again = meta.load_model()
    assert again.mteb_model_meta.revision == meta.revision and again.encode(BATCHES).shape == (3, 8)


@pytest.mark.parametrize("settings", [None, IndexSettings()])
def test_a_collection_has_the_measure_of_effir_evaluate(tmp_path, collection, bert_folder, settings):
    expected = ndcg(collection, bert_folder, tmp_path / "index")
    scores = run_tasks(bert_folder, [collection_task(collection)], tmp_path / "out", options=FP32, settings=settings)
    assert 0 < expected < 1
    assert scores == {collection.name: pytest.approx(expected, abs=1e-4)}


def test_results_are_mtebs_own_files_and_are_not_made_again(tmp_path, collection, bert_folder):
    model = EffirEncoder(bert_folder, FP32)
    scores = run_tasks(model.encoder, [collection_task(collection)], tmp_path)
    meta = model.mteb_model_meta
    folder = tmp_path / "results" / meta.name.replace("/", "__") / meta.revision
    record = json.loads((folder / f"{collection.name}.json").read_text())
    (result,) = record["scores"]["test"]
    assert scores == {collection.name: pytest.approx(result["main_score"])}
    assert result["main_score"] == result["ndcg_at_10"]
    assert json.loads((folder / "model_meta.json").read_text())["name"] == meta.name
    result["main_score"] = 0.25  # what is not computed again, but read
    (folder / f"{collection.name}.json").write_text(json.dumps(record))
    assert run_tasks(model.encoder, [collection_task(collection)], tmp_path) == {collection.name: 0.25}


def test_a_collection_that_changed_is_run_again(tmp_path, collection, bert_folder):
    other = tmp_path / collection.name
    other.mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        (other / name).write_bytes((collection / name).read_bytes())
    (other / "qrels").mkdir()
    (other / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n2\t010\t1\n")
    (before,) = run_tasks(bert_folder, [collection_task(collection)], tmp_path / "out", options=FP32).values()
    (after,) = run_tasks(bert_folder, [collection_task(other)], tmp_path / "out", options=FP32).values()
    assert before != after


def test_an_approximate_index_has_results_of_its_own(tmp_path, collection, bert_folder):
    for settings in (None, IndexSettings(kind="SQ8")):
        run_tasks(bert_folder, [collection_task(collection)], tmp_path, options=FP32, settings=settings)
    files = [path.parent.name for path in tmp_path.rglob(f"{collection.name}.json")]
    assert sorted(files)[-1] == "kind_SQ8" and len(files) == 2


def test_only_judged_queries_are_searched(collection):
    data = collection_task(collection).dataset["default"]["test"]
    assert sorted(data["queries"]["id"]) == sorted({query_id for query_id, _ in QRELS}) == sorted(TOPICS)


@pytest.mark.parametrize("kind", ["Flat", "HNSW4", "SQ8"])
def test_an_index_finds_the_largest_products_best_first(bert_folder, kind):
    model = EffirEncoder(bert_folder, FP32)
    index = EffirIndex(model, IndexSettings(kind=kind))
    texts = ["hot soup", "the cat", "tea", "the dog", "the cat"]
    vectors = model.encode([{"text": texts}])
    index.add_documents(vectors[:2], ["a b", "c"])
    index.add_documents(vectors[2:], ["d", "e", "f"])
    queries = model.encode([{"text": ["cat", "sweet tea"]}], prompt_type=PromptType.query)
    scores, rows = index.search(queries, 10, model.similarity)
    products = queries @ vectors.T
    for query in range(2):
        assert sorted(rows[query]) == [0, 1, 2, 3, 4]
        tolerance = 0.02 if kind == "SQ8" else 1e-5
        np.testing.assert_allclose(scores[query], products[query][rows[query]], atol=tolerance)
        assert scores[query] == sorted(scores[query], reverse=True)
    assert index.search(queries, 2, model.similarity)[1] == [row[:2] for row in rows]
    index.clear()
    index.add_documents(vectors[3:], ["e", "f"])
    assert sorted(index.search(queries, 10, model.similarity)[1][0]) == [0, 1]


def test_candidates_alone_are_ranked_where_a_task_gives_some(bert_folder):
    model = EffirEncoder(bert_folder, FP32)
    index = EffirIndex(model)
    vectors = model.encode([{"text": ["hot soup", "the cat", "tea"]}])
    index.add_documents(vectors, ["a", "b", "c"])
    queries = vectors[1:2]
    ranked, names = {"q": ["c", "b"]}, {0: "q"}
    scores, places = index.search(queries, 5, model.similarity, top_ranked=ranked, query_idx_to_id=names)
    assert places == [[1, 0]]  # "b" is the query itself
    np.testing.assert_allclose(scores[0], [1, vectors[2] @ vectors[1]], atol=1e-6)


def test_an_index_without_documents_and_a_kind_that_does_not_fit_are_errors(bert_folder):
    model = EffirEncoder(bert_folder, FP32)
    with pytest.raises(ValueError, match="no documents were added"):
        EffirIndex(model).search(np.ones((1, 32), dtype=np.float32), 5, model.similarity)
    with pytest.raises(ValueError, match="PQ7"):
        EffirIndex(model, IndexSettings(kind="PQ7"))


def test_a_task_that_mteb_does_not_know_is_an_error(tmp_path, bert_folder):
    with pytest.raises(ValueError, match="NoSuchTask: mteb .* has no task and no benchmark"):
        run_tasks(bert_folder, ["NoSuchTask"], tmp_path)


def test_a_folder_that_is_no_collection_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no corpus.jsonl"):
        collection_task(tmp_path)


@pytest.mark.slow
def test_tasks_of_every_type_run(bert_folder):
    results = mteb.mock_run(EffirEncoder(bert_folder, FP32))
    assert results.all_passed
    ran = [name for name, result in results.items() if result is not None]
    assert len(ran) > 20


@pytest.mark.collections
def test_scifact_has_the_measure_of_effir_evaluate(tmp_path):
    if "EFFIR_COLLECTIONS" not in os.environ:
        pytest.fail("set EFFIR_COLLECTIONS to the folder of test collections")
    folder = Path(os.environ["EFFIR_COLLECTIONS"]) / "scifact"
    options = EncoderOptions(device="cpu", dtype="fp32", max_length=64)  # the beginning of a text is enough for this
    expected = ndcg(folder, demo_model(), tmp_path / "index", options)
    task, how = collection_task(folder), {"options": options, "settings": IndexSettings()}
    scores = run_tasks(demo_model(), [task], tmp_path / "out", **how)
    assert scores == {"scifact": pytest.approx(expected, abs=1e-4)}
