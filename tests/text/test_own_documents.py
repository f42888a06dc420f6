"""A collection whose queries stand in the corpus as documents of their own id, as in ArguAna."""

import json
import shutil

import ir_measures
import pytest
from click.testing import CliRunner
from conftest import DOCUMENTS, QRELS, TOPICS, WORDS, save_model, save_sentence_files, write_jsonl
from ir_measures import nDCG

from effir_search.cli import cli
from effir_search.compression.compress import compress
from effir_search.compression.defaults_without_labels import merged
from effir_search.compression.recipe import as_compression
from effir_search.encoding.encoder import Encoder
from effir_search.evaluation.benchmark import check_topics
from effir_search.indexing.build import index_corpus
from effir_search.searching.search_topics import search_topics
from effir_search.settings import DataSettings, EncoderOptions, SearchSettings
from effir_search.text.corpus import Document
from effir_search.text.own_documents import has_text
from effir_search.training.dev import ndcg, read_dev_split, search_exactly

# Ids apart from those of the toy corpus, whose 007 is another document than query 007.
QUERIES = {f"q{query_id}": text for query_id, text in TOPICS.items()}


def write_collection(folder, *, own=True, others=False):
    """The toy collection; its queries are documents too, in capitals and with a title; or others have their ids."""
    records = [{"_id": i, "title": t, "text": x} for i, (t, x) in DOCUMENTS.items()]
    records += [{"_id": i, "title": "tea", "text": f" {x.upper()}"} for i, x in QUERIES.items() if own]
    records += [{"_id": i, "text": "plum jam"} for i in QUERIES if others]
    folder.mkdir()
    write_jsonl(folder / "corpus.jsonl", records)
    write_jsonl(folder / "queries.jsonl", [{"_id": i, "text": x} for i, x in QUERIES.items()])
    (folder / "qrels").mkdir()
    rows = [f"q{query_id}\t{doc_id}\t{grade}\n" for (query_id, doc_id), grade in QRELS.items()]
    for split in ("test", "dev"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("own") / "standing")


JUDGED = [ir_measures.Qrel(f"q{query_id}", doc_id, grade) for (query_id, doc_id), grade in QRELS.items()]


def ndcg_without_own(hits):
    """nDCG@10 by ir-measures of hits without the documents that have their query's id."""
    return ir_measures.calc_aggregate([nDCG @ 10], JUDGED, [h for h in hits if h.doc_id != h.query_id])[nDCG @ 10]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("document", "same"),
    [
        (Document("1", "hot soup"), True),
        (Document("1", " Hot\n SOUP "), True),
        (Document("1", "soup", "hot"), True),
        (Document("1", "hot soup", "dinner"), True),
        (Document("1", "", "hot soup"), True),
        (Document("1", "with onion", "hot soup"), False),
        (Document("1", "hot soup ."), False),
        (Document("1", ""), False),
    ],
)
def test_a_document_has_a_text_with_its_title_or_without(document, same):
    assert has_text(document, "hot soup") is same


# effir search


def search(collection, encoder, folder, *, remove_query=False):
    index_dir, run = folder / "index", folder / "run.trec"
    if not index_dir.exists():
        index_corpus(str(collection / "corpus.jsonl"), str(encoder), index_dir, options=EncoderOptions(device="cpu"))
    search_topics(
        str(collection / "queries.jsonl"),
        run,
        options=EncoderOptions(device="cpu"),
        settings=SearchSettings(hits=10, remove_query=remove_query),
        index_dir=index_dir,
    )
    return list(ir_measures.read_trec_run(str(run)))


def test_queries_that_find_themselves_are_counted_unless_they_are_removed(standing, bert_folder, tmp_path, caplog):
    search(standing, bert_folder, tmp_path)
    (told,) = warnings(caplog)
    assert f"{tmp_path / 'run.trec'}: 3 of 3 queries stand in the corpus with their id and text" in told
    assert "--remove-query leaves the document with the query's id out" in told
    caplog.clear()
    hits = search(standing, bert_folder, tmp_path, remove_query=True)
    assert not warnings(caplog) and not [hit for hit in hits if hit.doc_id == hit.query_id]


@pytest.mark.parametrize("prompts", [None, {"query": "hot ", "document": "the "}])
def test_they_are_found_by_their_scores_where_the_corpus_is_gone(tmp_path, bert_folder, caplog, prompts):
    encoder = bert_folder
    if prompts:
        encoder = save_sentence_files(save_model(tmp_path / "model", "bert"), prompts=prompts)
    records = [{"_id": i, "text": x} for i, x in QUERIES.items()]
    collection = write_collection(tmp_path / "gone", own=False)
    with open(collection / "corpus.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    index_corpus(
        str(collection / "corpus.jsonl"), str(encoder), tmp_path / "index", options=EncoderOptions(device="cpu")
    )
    (collection / "corpus.jsonl").unlink()
    search(collection, encoder, tmp_path)
    assert [told for told in warnings(caplog) if "3 of 3 queries stand in the corpus" in told]


@pytest.mark.parametrize("gone", [False, True])
def test_other_documents_with_the_ids_of_queries_are_not_warned_of(tmp_path, bert_folder, caplog, gone):
    collection = write_collection(tmp_path / "others", own=False, others=True)
    hits = search(collection, bert_folder, tmp_path)
    if gone:
        (collection / "corpus.jsonl").unlink()
        hits = search(collection, bert_folder, tmp_path)
    assert any(hit.doc_id == hit.query_id for hit in hits) and not warnings(caplog)


# The dev measure


def test_the_dev_measure_can_leave_the_queries_own_documents_out(standing, bert_folder, caplog):
    encoder, split = Encoder.from_pretrained(bert_folder, device="cpu", dtype="fp32"), read_dev_split(standing, "dev")
    expected = ndcg_without_own(search_exactly(encoder, split.queries, split.documents))
    assert ndcg(split, remove_query=True)[1](encoder) == pytest.approx(expected)
    assert not warnings(caplog)
    assert ndcg(split)[1](encoder) < expected
    (told,) = warnings(caplog)
    assert "--dev: 3 of 3 queries stand in the corpus" in told and "--dev-remove-query" in told


def test_a_dev_split_of_other_documents_with_the_ids_of_queries_is_warned_of_if_they_go(tmp_path, caplog):
    split = read_dev_split(write_collection(tmp_path / "others", own=False, others=True), "dev")
    ndcg(split)
    assert not warnings(caplog)
    ndcg(split, remove_query=True)
    (told,) = warnings(caplog)
    assert "leaves out 3 documents that have the id of a query and another text" in told


# effir compress


def test_what_is_evaluated_otherwise_costs_no_stage_of_training_and_no_search(standing, bert_folder, tmp_path, caplog):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{a} {b}\n" for a, b in zip(WORDS, WORDS[5:], strict=False)))
    given = {"encoder": str(bert_folder), "data": {"texts": [str(texts)]}, "prune": {"num_texts": 8}}
    given |= {"slim": {"narrow": 0.25, "steps": 1}, "finetune": {"max_steps": 1, "batch_size": 8}}
    given |= {"evaluate": {"collections": [str(standing)]}}
    compress(as_compression(given), tmp_path / "small", device="cpu")
    (told,) = (told for told in warnings(caplog) if "this training does not help" not in told)
    assert f"{standing}: 3 of 3 queries stand in the corpus" in told and "remove_query in [evaluate]" in told
    caplog.clear()
    stages = tmp_path / "small.stages"
    files = [stages / "4-tuned" / "model.safetensors", *sorted((stages / "5-evaluation").glob("*.trec"))]
    written = [file.stat().st_mtime_ns for file in files]
    before = json.loads((tmp_path / "small" / "benchmark.json").read_text())["ndcg"][standing.name]
    shutil.rmtree(tmp_path / "small")
    measured = compress(
        as_compression(merged(given, {"evaluate": {"remove_query": True}})), tmp_path / "small", device="cpu"
    )
    assert not warnings(caplog) and len(files) == 3
    assert [file.stat().st_mtime_ns for file in files] == written
    assert "remove_query = true" in (tmp_path / "small" / "recipe.toml").read_text()
    for role, now, once in zip(("full", "compressed"), measured.ndcg[standing.name], before, strict=True):
        path = stages / "5-evaluation" / f"{standing.name}-{role}.trec"
        assert now == pytest.approx(ndcg_without_own(ir_measures.read_trec_run(str(path)))) and now > once


def test_judged_queries_without_a_text_are_told_of(tmp_path, caplog):
    folder = write_collection(tmp_path / "lacking", own=False)
    with open(folder / "qrels" / "test.tsv", "a") as file:
        file.write("lost\t001\t1\nunjudged\t001\t0\n")
    paths = [str(folder / name) for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")]
    check_topics(folder, *paths, remove_query=False)
    assert warnings(caplog) == [f"{folder}: 1 of 4 judged queries are no topics and count 0"]


def test_the_plan_says_whether_queries_are_removed(bert_folder, standing):
    options = ["--encoder", bert_folder, "--texts", "texts.txt", "--evaluate", standing, "--dev", standing, "--plan"]
    plain = CliRunner().invoke(cli, ["compress", *map(str, options)])
    assert "\nremove_query = false\n" in plain.output and "dev_remove_query = false\n" in plain.output
    given = CliRunner().invoke(cli, ["compress", *map(str, options), "--remove-query", "--dev-remove-query"])
    assert "\nremove_query = true\n" in given.output and "dev_remove_query = true\n" in given.output


def test_an_option_to_remove_queries_of_nothing_is_refused():
    with pytest.raises(ValueError, match="--remove-query goes with --evaluate"):
        as_compression({"encoder": "model", "data": {"train": "x"}, "evaluate": {"remove_query": True}})
    with pytest.raises(ValueError, match="--dev-remove-query goes with --dev"):
        DataSettings(train="x", dev_remove_query=True)


def test_the_commands_have_the_option():
    for command in ("search", "compress"):
        assert "--remove-query" in CliRunner().invoke(cli, [command, "--help"]).output
    assert "--dev-remove-query" in CliRunner().invoke(cli, ["finetune", "--help"]).output
