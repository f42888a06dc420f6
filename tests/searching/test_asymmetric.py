"""Queries by a student, documents by the model whose vectors it learned to give."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TOPICS, save_model, save_sentence_files, write_jsonl
from safetensors.numpy import load_file, save_file

from effir_search.cli import cli
from effir_search.encoding.encoder import Encoder
from effir_search.encoding.same_space import learned_spaces, spaces_of
from effir_search.indexing.build import build_index, index_corpus
from effir_search.pruning.prune import prune_encoder
from effir_search.searching.pyserini_bridge import faiss_searcher
from effir_search.searching.search_topics import search
from effir_search.searching.searcher import Searcher, load_encoder
from effir_search.settings import DataSettings, EncoderOptions, LossSettings, TrainingSettings
from effir_search.text.corpus import read_corpus
from effir_search.text.trec import Query
from effir_search.training.finetune import finetune

FP32 = EncoderOptions(device="cpu", dtype="fp32")
QUICK = TrainingSettings(max_steps=2, batch_size=8, bf16=False)
QUERIES = [Query(query_id, text) for query_id, text in TOPICS.items()]
NO_STUDENT = (
    r"weights is '\w{12}' in the index and '\w{12}' in the encoder; give .*\(same_space_as in its training.json\)"
)


def imitate(model, teacher, output, texts, losses=LossSettings(), **data):  # noqa: B008, frozen
    data = DataSettings(texts=(texts,), teacher=str(teacher), **data)
    finetune(str(model), output, data, QUICK, losses, EncoderOptions(device="cpu"))
    return output


def training_of(folder):
    return json.loads((folder / "training.json").read_text())


def copied(folder, to, **changes):
    """A copy of a model folder whose training.json has other fields; None removes one."""
    shutil.copytree(folder, to)
    record = {name: value for name, value in (training_of(to) | changes).items() if value is not None}
    (to / "training.json").write_text(json.dumps(record))
    return to


@pytest.fixture(scope="module")
def dropped(tmp_path_factory, bert_folder):
    folder = tmp_path_factory.mktemp("models") / "dropped"
    prune_encoder(str(bert_folder), folder, numbers={}, layers={"mlp": [1, 2]})
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, bert_folder, texts, short):
    """The tiny BERT compressed by ``effir compress`` without labels, as a person would."""
    folder = tmp_path_factory.mktemp("models") / "small"
    options = ["--recipe", short, "--encoder", bert_folder, "--texts", texts, "--output", folder, "--drop-mlp", 2]
    options += ["--narrow", 0.25, "--max-steps", 2, "--batch-size", 8, "--device", "cpu"]
    result = CliRunner().invoke(cli, ["compress", *map(str, options)])
    assert result.exit_code == 0, result.output
    return folder


def test_hits_are_by_the_dot_products_of_student_queries_and_teacher_documents(
    toy_index, collection, bert_folder, student, tmp_path, caplog
):
    small = Encoder.from_pretrained(student, FP32)
    full = Encoder.from_pretrained(bert_folder, FP32)
    documents = list(read_corpus(collection / "corpus.jsonl"))
    products = small.encode_queries(list(TOPICS.values())) @ full.encode_documents(documents).T
    own = full.encode_queries(list(TOPICS.values())) @ full.encode_documents(documents).T
    assert abs(products - own).max() > 1e-3  # else the test could not tell whose queries they are
    run = tmp_path / "run.trec"
    options = ["--index", toy_index, "--encoder", student, "--topics", collection / "queries.jsonl", "--output", run]
    with caplog.at_level("INFO"):
        result = CliRunner().invoke(cli, ["search", *map(str, options)])
    assert result.exit_code == 0, result.output
    scores = {tuple(line.split()[0:3:2]): float(line.split()[4]) for line in run.read_text().splitlines()}
    expected = {
        (query_id, document.doc_id): products[row, column]
        for row, query_id in enumerate(TOPICS)
        for column, document in enumerate(documents)
    }
    assert scores.keys() == expected.keys()
    np.testing.assert_allclose([scores[pair] for pair in expected], list(expected.values()), atol=1e-5)
    assert len([message for message in caplog.messages if f"by the student {student}" in message]) == 1
    # The same by a loaded encoder, and by Pyserini's own searcher.
    hits = list(search(toy_index, small, QUERIES))
    np.testing.assert_allclose([hit.score for hit in hits], [expected[hit[:2]] for hit in hits], atol=1e-5)
    first = faiss_searcher(toy_index, small).search(TOPICS["1"], k=1)[0]
    assert first.score == pytest.approx(products[0].max(), abs=1e-5)


def test_the_record_names_the_teacher_by_its_hash_and_info_shows_it(student, bert_folder):
    record, full = training_of(student), Encoder.from_pretrained(bert_folder, FP32)
    (space,) = record["same_space_as"]
    assert (space["model_sha256"], space["dimension"]) == (full.weights_sha256, 32)
    assert space["encoder"]["pooling"] == "mean" and space["encoder"]["normalize"]
    assert record["weights_sha256"] == Encoder.from_pretrained(student, FP32).weights_sha256
    shown = json.loads(CliRunner().invoke(cli, ["info", str(student), "--format", "json"]).output)
    assert shown["same_space_as"] == [f"{space['model']} {full.weights_sha256}"]
    assert f"| Gives the vectors of | {space['model']} |" in (student / "README.md").read_text()
    full_shown = json.loads(CliRunner().invoke(cli, ["info", str(bert_folder), "--format", "json"]).output)
    assert "same_space_as" not in full_shown


def refused(index_dir, model, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        Searcher(index_dir, str(model), options=EncoderOptions(device="cpu", **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_that_says_nothing_is_refused(toy_index, dropped, student, tmp_path):
    refused(toy_index, dropped, NO_STUDENT)  # dropped without training
    refused(toy_index, copied(student, tmp_path / "old", same_space_as=None), NO_STUDENT)
    refused(toy_index, copied(student, tmp_path / "none", same_space_as=[]), NO_STUDENT)
    with pytest.raises(ValueError, match="weights is"):
        list(search(toy_index, Encoder.from_pretrained(dropped, FP32), QUERIES))
    wrong = copied(student, tmp_path / "newer", same_space_as=[{"model": "x", "colour": "red", "encoder": {}}])
    refused(toy_index, wrong, "same_space_as is not of this version")


def test_a_record_counts_for_the_weights_that_it_was_written_for(toy_index, student, tmp_path, caplog):
    changed = copied(student, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, changed / "model.safetensors", metadata={"format": "pt"})
    refused(toy_index, changed, NO_STUDENT)
    assert "is of other weights than those beside it" in caplog.text


def test_pruning_a_student_further_loses_what_it_learned(toy_index, student, tmp_path):
    layer = json.loads((student / "config.json").read_text())["mlp_widths"].index(0)
    prune_encoder(str(student), tmp_path / "less", numbers={}, layers={"attention": [layer]})
    refused(toy_index, tmp_path / "less", NO_STUDENT)


def test_fine_tuning_on_labels_loses_it_with_a_teacher_s_scores_too(toy_index, student, bert_folder, tmp_path):
    records = [{"query": "hot soup", "positives": ["tomato soup"], "negatives": ["the dog"]}] * 4
    train = str(write_jsonl(tmp_path / "train.jsonl", records))
    for name, data in {
        "labels": DataSettings(train=train),
        "kl": DataSettings(train=train, teacher=str(bert_folder)),
    }.items():
        finetune(str(student), tmp_path / name, data, QUICK, options=EncoderOptions(device="cpu"))
        assert training_of(tmp_path / name)["same_space_as"] == []
        refused(toy_index, tmp_path / name, NO_STUDENT)


def test_directions_alone_and_score_matrices_alone_share_no_space(tmp_path, dropped, texts):
    # A student of cosines matches the directions of a teacher whose vectors have lengths, and half the components none.
    teacher = save_sentence_files(save_model(tmp_path / "full", "bert"), similarity="dot", normalize=False)
    assert training_of(imitate(dropped, teacher, tmp_path / "dot", texts))["same_space_as"] == []
    truncated = save_sentence_files(save_model(tmp_path / "short", "bert"))
    settings = json.loads((truncated / "config_sentence_transformers.json").read_text())
    (truncated / "config_sentence_transformers.json").write_text(json.dumps(settings | {"truncate_dim": 16}))
    assert training_of(imitate(dropped, truncated, tmp_path / "16", texts))["same_space_as"] == []


def test_a_student_of_a_student_shares_the_space_of_its_teacher_s_teacher(
    toy_index, collection, student, dropped, texts, tmp_path
):
    second = imitate(dropped, student, tmp_path / "second", texts)
    small = Encoder.from_pretrained(student, FP32)
    assert [space.model_sha256 for space in spaces_of(Encoder.from_pretrained(second, FP32))] == [
        small.weights_sha256, training_of(student)["same_space_as"][0]["model_sha256"],
    ]  # fmt: skip
    Searcher(toy_index, str(second), options=FP32)
    index_corpus(str(collection / "corpus.jsonl"), str(student), tmp_path / "by-student", options=FP32)
    Searcher(tmp_path / "by-student", str(second), options=FP32)
    # A student's own queries go with its own index as ever.
    Searcher(tmp_path / "by-student", str(student), options=FP32)
    # A student that was read otherwise than it learned teaches its own vectors alone.
    assert len(learned_spaces(small.with_config(max_length=9), 32)) == 2
    assert len(learned_spaces(small.with_config(pooling="cls"), 32)) == 1


def test_a_student_of_leading_components_goes_with_an_index_of_these(tmp_path, collection, bert_folder, dropped, texts):
    half = imitate(dropped, bert_folder, tmp_path / "half", texts, LossSettings(dimensions=(16, 8)))
    assert training_of(half)["same_space_as"][0]["dimension"] == 16
    documents = list(read_corpus(collection / "corpus.jsonl"))
    for dimension in (None, 16):
        full = Encoder.from_pretrained(bert_folder, FP32, dimension=dimension)
        build_index(documents, full, tmp_path / f"index-{dimension}")
    refused(tmp_path / "index-None", half, "learned the first 16 components .* the index has 32; .* --dimension 16")
    searcher = Searcher(tmp_path / "index-16", str(half), options=FP32)
    assert searcher.encoder.dimension == 16
    # By hand: components cut off, then vectors of length 1.
    query = Encoder.from_pretrained(half, FP32).encode_queries(["hot soup"])[0, :16]
    vectors = Encoder.from_pretrained(bert_folder, FP32).encode_documents(documents)[:, :16]
    best = (vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)).max()
    assert searcher.search_text("hot soup", 1)[0].score == pytest.approx(best, abs=1e-5)


def test_documents_that_were_read_otherwise_than_by_the_teacher_are_refused(tmp_path, collection, bert_folder, student):
    documents = list(read_corpus(collection / "corpus.jsonl"))
    for name, value in {"pooling": "cls", "document_prompt": "red "}.items():
        build_index(documents, Encoder.from_pretrained(bert_folder, FP32, **{name: value}), tmp_path / name)
        refused(tmp_path / name, student, f"{name} is '{value}' in the index, and was '.*' when .* learned")
    build_index(documents, Encoder.from_pretrained(bert_folder, FP32, max_length=9), tmp_path / "short")
    searcher = Searcher(tmp_path / "short", str(student), options=FP32)
    assert searcher.encoder.config.max_length == 64  # the student's own: the index says how documents were cut


def test_a_student_reads_queries_by_its_own_files_alone(toy_index, student):
    message = refused(toy_index, student, "with the pooling of its own files, and 'cls' is asked for", pooling="cls")
    assert message.endswith("leave that out")
    refused(toy_index, student, "with the query_prompt of its own files, and 'a ' is asked for", query_prompt="a ")
    refused(toy_index, student, "with the max_length of its own files, and 9 is asked for", max_length=9)


def test_verify_wants_the_very_model(toy_index, student):
    result = CliRunner().invoke(cli, ["verify", str(toy_index), "--encoder", str(student), "--device", "cpu"])
    assert result.exit_code == 1
    assert "give the model that the index was made with as --encoder, or index again" in result.output


def test_a_moved_model_is_still_the_index_s(toy_index, bert_folder, tmp_path, caplog):
    shutil.copytree(bert_folder, tmp_path / "moved")
    with caplog.at_level("INFO"):
        assert Searcher(toy_index, str(tmp_path / "moved"), options=FP32).encoder.name == str(tmp_path / "moved")
    assert "by the student" not in caplog.text
    assert load_encoder(toy_index, str(tmp_path / "moved"), replace(FP32, dtype=None)).config.pooling == "mean"
