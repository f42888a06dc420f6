"""``effir benchmark`` on tiny models, from its options to its files."""

import json
import logging
import re
import shlex
import shutil
import signal
import statistics

import pytest
import torch
from click.testing import CliRunner
from conftest import save_model, save_sentence_files, write_jsonl
from processes import Command

from effir_search.benchmarking.benchmark import Collection, _queries, _work, load_contenders, run_name
from effir_search.cli import cli
from effir_search.encoding.encoder import Encoder
from effir_search.evaluation.measures import evaluate_run, parse_measures
from effir_search.settings import EncoderOptions
from effir_search.text.trec import Query

REPORT = {"benchmark.json", "benchmark.md", "pareto.png", "index.html"}
SHORT = ["--rounds", 2, "--device", "cpu", "--threads", 1]
pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A tiny model of another family, whose vectors are as long."""
    return save_sentence_files(save_model(tmp_path_factory.mktemp("mpnet"), "mpnet"))


def files_of(collection):
    return ["--corpus", collection / "corpus.jsonl", "--topics", collection / "queries.jsonl"]


def qrels_of(collection):
    return ["--qrels", collection / "qrels" / "test.tsv"]


def run(*words):
    return CliRunner().invoke(cli, ["benchmark", *map(str, words)])


def error_of(*words):
    result = run(*words)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    return result.stderr.splitlines()[-1]


def record_in(folder):
    return json.loads((folder / "benchmark.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory, bert_folder, other, collection):
    """A benchmark of two models in float32: its answer and its folder."""
    output = tmp_path_factory.mktemp("benchmark") / "bench"
    result = run(
        *(bert_folder, other, *files_of(collection), *qrels_of(collection), "--dtype", "fp32", "--output", output),
        *(*SHORT, "--limit", 9),
    )
    assert result.exit_code == 0, result.output
    return result.stdout, output


def test_a_benchmark_leaves_its_report_and_its_runs(done):
    answer, output = done
    assert {path.name for path in output.iterdir()} == {*REPORT, "runs", "settings.json", "job.lock"}
    record = record_in(output)
    # 9 of 12 documents, 2 rounds, 3 topics.
    assert (record["num_texts"], record["corpus"]["documents"]) == (9, 12)
    for encoder in record["encoders"]:
        assert len(encoder["seconds"]) == 2
        assert [len(of_round) for of_round in encoder["latencies"]] == [3, 3]
        assert encoder["memory"]["peak"] >= encoder["memory"]["before"] > 0
        assert encoder["label"] in answer
    assert str(output) in answer


def test_the_answer_is_the_tables_of_the_markdown_file(done):
    answer, output = done
    markdown = (output / "benchmark.md").read_text()
    cells = [cell.strip() for line in markdown.splitlines() if line.startswith("| ") for cell in line.split("|")]
    shown = " ".join(answer.split())
    assert len([cell for cell in cells if cell and "---" not in cell]) > 20
    assert [cell for cell in cells if "---" not in cell and " ".join(cell.split()) not in shown] == []


def test_figures_are_those_of_the_raw_ones(done):
    record = record_in(done[1])
    first, second = record["encoders"]
    assert record["figures"][1]["documents_per_second"] == 9 / statistics.median(second["seconds"])
    ratios = [a / b for a, b in zip(first["seconds"], second["seconds"], strict=True)]
    assert record["figures"][1]["speedup"] == statistics.median(ratios)


def test_quality_is_that_of_index_search_and_evaluate(done, tmp_path, bert_folder, collection):
    index, found = tmp_path / "index", tmp_path / "run.trec"
    for words in (
        [
            "index",
            "--corpus",
            collection / "corpus.jsonl",
            "--encoder",
            bert_folder,
            "--output",
            index,
            "--dtype",
            "fp32",
        ],
        ["search", "--index", index, "--topics", collection / "queries.jsonl", "--output", found],
    ):
        assert CliRunner().invoke(cli, list(map(str, words))).exit_code == 0
    qrels = str(collection / "qrels" / "test.tsv")
    expected = evaluate_run(found, qrels, "nDCG@10").mean[parse_measures("nDCG@10")[0]]
    assert record_in(done[1])["figures"][0]["ndcg"] == pytest.approx(expected)


def test_the_page_needs_no_other_file(done):
    page = (done[1] / "index.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"https?://|<script|<link|<img|\bsrc=", page)
    assert "<svg" in page and page.count("<table>") == 2
    assert (done[1] / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_in_the_record_is_one_that_can_be_given_again(done, bert_folder):
    program, name, *words = shlex.split(record_in(done[1])["command"])
    assert (program, name) == ("effir", "benchmark")
    with cli.commands["benchmark"].make_context("benchmark", words) as context:
        assert context.params["models"][0] == str(bert_folder)
        assert (context.params["rounds"], context.params["limit"], context.params["dtypes"]) == (2, 9, (("fp32",),))


def test_a_stopped_benchmark_does_not_search_again_what_it_has_found(tmp_path, done, bert_folder, collection, caplog):
    output = tmp_path / "bench"
    words = [bert_folder, *files_of(collection), *qrels_of(collection), "--dtype", "fp32", *SHORT, "--output", output]
    process = Command("benchmark", *words)
    while not list(output.glob("runs/*.trec")):
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not {path.name for path in output.iterdir()} & REPORT
    (found,) = output.glob("runs/*.trec")
    before = found.stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        result = run(*words)
    assert result.exit_code == 0, result.output
    assert found.stat().st_mtime_ns == before
    assert f"was searched before, {found}" in caplog.text
    assert record_in(output)["encoders"][0]["ndcg"] == record_in(done[1])["encoders"][0]["ndcg"]


def test_a_run_has_another_name_wherever_its_hits_may_be_others(bert_folder, other):
    judged = [Query("1", "fish")]

    def name(model=bert_folder, dtype="fp32", corpus="sha", topics=judged, **options):
        (contender,) = load_contenders([str(model)], (dtype,), EncoderOptions(device="cpu", **options))
        return run_name(contender, Collection("c", "t", "q", corpus, remove_query=False), topics)

    assert name() == name()
    others = [
        *(name(model=other), name(dtype="bf16"), name(corpus="other"), name(topics=[Query("1", "soup")])),
        *(name(max_length=5), name(pooling="cls"), name(query_prompt="query: ")),
    ]
    assert len({name(), *others}) == 8


def test_without_topics_titles_are_timed_and_likeness_stands_for_quality(tmp_path, bert_folder, collection):
    words = ["--corpus", collection / "corpus.jsonl", "--dtype", "fp32", *SHORT, "--output", tmp_path / "bench"]
    result = run(bert_folder, *words)
    assert result.exit_code == 0, result.output
    record = record_in(tmp_path / "bench")
    assert record["num_queries"] == [9, "titles of documents"]  # three of the twelve have none
    assert "cosine to the first" in (tmp_path / "bench" / "benchmark.md").read_text()
    assert not (tmp_path / "bench" / "runs").exists() and "nDCG@10" not in result.stdout


def test_empty_titles_and_topics_are_not_timed(tmp_path):
    topics = write_jsonl(tmp_path / "topics.jsonl", [{"_id": "1", "text": " "}, {"_id": "2", "text": "hot soup"}])
    assert _queries(None, None, ["", "cat", " "]) == (["cat"], "titles of documents")
    assert _queries(None, None, [""]) == ([], "titles of documents")
    assert _queries(str(topics), None, ["cat"]) == (["hot soup"], "topics")


def test_every_model_is_measured_in_every_arithmetic(bert_folder, other):
    options = EncoderOptions(device="cpu")
    contenders = load_contenders([str(bert_folder), str(other)], ("fp32", "bf16"), options)
    assert [contender.label.split()[1] for contender in contenders] == ["fp32", "bf16"] * 2
    assert [contender.encoder.dtype for contender in contenders] == [torch.float32, torch.bfloat16] * 2


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path, bert_folder):
    names = []
    for place in ("a", "b"):
        names.append(str(tmp_path / place / "encoder"))
        shutil.copytree(bert_folder, names[-1])
    contenders = load_contenders(names, ("fp32",), EncoderOptions(device="cpu"))
    assert [contender.label for contender in contenders] == [f"{name} fp32" for name in names]


def test_work_is_that_of_each_text_with_its_own_tokens(bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="fp32")
    work = _work(encoder, ["cat", "the cat eats fish"])
    # With <s> and </s> 3 and 6 tokens. A layer has four matrices of 32 x 32 and two of 32 x 48, two operations each a
    # token, and two products of 32 components for each pair of tokens; there are four layers.
    linear, pairs = 2 * (4 * 32 * 32 + 2 * 32 * 48), 4 * 32
    assert work.tokens == 9
    assert work.flops == 4 * (9 * linear + (3**2 + 6**2) * pairs)


def test_a_family_that_cannot_be_pruned_has_its_parameters_and_no_work(tmp_path):
    encoder = Encoder.from_pretrained(save_model(tmp_path / "t5", "t5"), device="cpu", dtype="fp32")
    work = _work(encoder, ["the cat"])
    parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    assert work.sizes == {"parameters": parameters, "weights_bytes": 4 * parameters}
    assert work.flops is None


# Errors


def test_what_cannot_be_measured_is_an_error_before_anything_is(tmp_path, bert_folder, collection):
    corpus, output = ["--corpus", collection / "corpus.jsonl"], ["--output", tmp_path / "bench"]
    qrels = qrels_of(collection)
    assert "--qrels goes with --topics" in error_of(bert_folder, *corpus, *qrels, *output)
    assert "--backend auto is for effir index" in error_of(bert_folder, *corpus, "--backend", "auto", *output)
    twice = error_of(bert_folder, bert_folder, *corpus, "--dtype", "fp32", *output)
    assert "fp32 stands twice; name each model and each --dtype once" in twice
    assert "stands twice" in error_of(bert_folder, *corpus, "--dtype", "fp32", "--dtype", "fp32", *output)
    assert "no-such-model" in error_of(bert_folder, tmp_path / "no-such-model", *corpus, *output)
    (tmp_path / "empty.jsonl").write_text("")
    assert "no documents" in error_of(bert_folder, "--corpus", tmp_path / "empty.jsonl", *output)
    others = write_jsonl(tmp_path / "others.jsonl", [{"_id": "x", "text": "fish"}])
    assert "is judged in the qrels" in error_of(bert_folder, *corpus, "--topics", others, *qrels, *output)
    assert not (tmp_path / "bench").exists()


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path, bert_folder, collection):
    (tmp_path / "notes.txt").write_text("mine")
    error = error_of(bert_folder, "--corpus", collection / "corpus.jsonl", "--output", tmp_path)
    assert "is not a job's folder, and is left as it is" in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
