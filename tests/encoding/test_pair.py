"""A student and its teacher in one folder, for sentence-transformers."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import QUERIES, TEXTS, save_model, save_sentence_files
from sentence_transformers import SentenceTransformer

from effir_search.cli import cli
from effir_search.encoding.encoder import Encoder
from effir_search.encoding.pair import pair
from effir_search.indexing.build import index_corpus
from effir_search.pruning.prune import prune_encoder
from effir_search.searching.searcher import Searcher
from effir_search.settings import DataSettings, EncoderOptions, TrainingSettings
from effir_search.training.finetune import finetune

FP32 = EncoderOptions(device="cpu", dtype="fp32")
QUICK = TrainingSettings(max_steps=2, batch_size=8, bf16=False)
PROMPTS = {"query": "red ? ", "document": "green "}


def student_of(teacher, output, texts, **reading):
    """A model without one MLP that imitates the whole one."""
    options = EncoderOptions(device="cpu", **reading)
    dropped = output.with_name(f"{output.name}-dropped")
    prune_encoder(str(teacher), dropped, numbers={}, layers={"mlp": [1]}, options=options)
    data = DataSettings(texts=(texts,), teacher=str(teacher))
    finetune(str(dropped), output, data, QUICK, options=EncoderOptions(device="cpu"), teacher_options=options)
    return output


def models_of(folder, family, texts):
    """Teacher and student; of the encoder, prompts that count; of the decoder, a reading that no file of it says."""
    if family == "bert":
        teacher = save_sentence_files(save_model(folder / "full", family), prompts=PROMPTS, max_length=20)
        return teacher, student_of(teacher, folder / "small", texts)
    teacher = save_model(folder / "full", family, causal=True)
    reading = {"pooling": "last", "append_eos": True, "normalize": True, "query_prompt": "red ? "}
    return teacher, student_of(teacher, folder / "small", texts, **reading)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_pair_gives_the_vectors_of_both_models(tmp_path, texts, collection, family):
    teacher, student = models_of(tmp_path, family, texts)
    result = CliRunner().invoke(
        cli, ["pair", "--queries", str(student), "--documents", str(teacher), "--output", str(tmp_path / "pair")]
    )
    assert result.exit_code == 0, result.output
    reading = {} if family == "bert" else {"pooling": "last", "append_eos": True, "normalize": True}
    small = Encoder.from_pretrained(student, FP32)
    full = Encoder.from_pretrained(teacher, FP32, **reading)
    model = SentenceTransformer(str(tmp_path / "pair"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(model.encode_query(QUERIES), small.encode_queries(QUERIES), atol=1e-5)
    np.testing.assert_allclose(model.encode_document(TEXTS), full.encode_documents(TEXTS), atol=1e-5)
    assert abs(small.encode_queries(QUERIES) - full.encode_queries(QUERIES)).max() > 1e-3  # else any route would do
    # Each of the two is a model of its own here, with the weights that it had: one indexes, the other searches.
    places = {route: tmp_path / "pair" / route for route in ("query", "document")}
    # What its tokenizer does by itself now is asked for all the same, as the student's record has it.
    as_taught = replace(FP32, append_eos=family == "llama")
    index_corpus(str(collection / "corpus.jsonl"), str(places["document"]), tmp_path / "index", options=as_taught)
    searcher = Searcher(tmp_path / "index", str(places["query"]), options=FP32)
    assert searcher.encoder.weights_sha256 == small.weights_sha256
    np.testing.assert_array_equal(searcher.encoder.encode_queries(QUERIES), small.pack().encode_queries(QUERIES))
    for command in ("index", "info"):
        options = ["--corpus", str(collection / "corpus.jsonl"), "--output", str(tmp_path / "no"), "--encoder"]
        result = CliRunner().invoke(cli, [command, *(options if command == "index" else []), str(tmp_path / "pair")])
        assert result.exit_code == 1
        assert f"is a pair of models: give {places['document']} to index and {places['query']}" in result.output


ELSEWHERE = """
import json, sys

sys.modules["effir_search"] = None
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
print(json.dumps([model.encode_query(["the cat"]).tolist(), model.encode_document(["the cat"]).tolist()]))
"""


@pytest.mark.processes
def test_a_pair_loads_where_this_package_is_not(tmp_path, texts):
    teacher, student = models_of(tmp_path, "bert", texts)
    pair(str(student), str(teacher), tmp_path / "pair")
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "pair")], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    query, document = json.loads(result.stdout.splitlines()[-1])
    np.testing.assert_allclose(query, Encoder.from_pretrained(student, FP32).encode_queries(["the cat"]), atol=1e-5)
    documents = Encoder.from_pretrained(teacher, FP32).encode_documents(["the cat"])
    np.testing.assert_allclose(document, documents, atol=1e-5)
    card = (tmp_path / "pair" / "README.md").read_text()
    assert 'SentenceTransformer("pair", trust_remote_code=True)' in card


def test_prompts_that_are_not_pooled_are_not_pooled_in_a_pair_either(tmp_path, texts):
    teacher = save_sentence_files(save_model(tmp_path / "full", "bert"), prompts=PROMPTS, include_prompt=False)
    student = student_of(teacher, tmp_path / "small", texts)
    pair(str(student), str(teacher), tmp_path / "pair")
    model = SentenceTransformer(str(tmp_path / "pair"), device="cpu", trust_remote_code=True)
    small, full = (Encoder.from_pretrained(folder, FP32) for folder in (student, teacher))
    np.testing.assert_allclose(model.encode_query(QUERIES), small.encode_queries(QUERIES), atol=1e-5)
    np.testing.assert_allclose(model.encode_document(TEXTS), full.encode_documents(TEXTS), atol=1e-5)


def test_models_that_share_no_space_make_no_pair(tmp_path, texts, bert_folder):
    student = student_of(bert_folder, tmp_path / "small", texts)
    other = save_sentence_files(save_model(tmp_path / "other", "roberta"))
    for queries, documents in (
        (student, other), (tmp_path / "small-dropped", bert_folder), (bert_folder, student), (student, student)
    ):  # fmt: skip
        with pytest.raises(ValueError, match="does not say that it gives the vectors of .* as --teacher"):
            pair(str(queries), str(documents), tmp_path / "pair")
    shutil.copytree(student, tmp_path / "half")
    record = json.loads((student / "training.json").read_text())
    record["same_space_as"][0]["dimension"] = 16
    (tmp_path / "half" / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="learned the first 16 components .* and has 32; only models"):
        pair(str(tmp_path / "half"), str(bert_folder), tmp_path / "pair")
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="exists already"):
        pair(str(student), str(bert_folder), tmp_path / "pair")
