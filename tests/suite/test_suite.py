"""A suite: the figures of its runs, what it does again and what it does not, groups, depths, downloads."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import ir_datasets
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DOCUMENTS, kill_when_there, save_model, save_sentence_files, write_jsonl
from processes import Command

from effir_search.cli import cli
from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.indexing.build import index_corpus
from effir_search.indexing.index_record import read_index_info
from effir_search.settings import EncoderOptions, IndexSettings, SuiteSettings
from effir_search.suite.collections import BEIR, NANO, find_collections, is_on_disk
from effir_search.suite.report import Results, as_latex, columns_of, means_of, table_of
from effir_search.suite.suite import suite
from effir_search.text.trec import read_qrels, read_run

(NDCG,) = parse_measures("nDCG@10")


def make_collection(folder: Path, *, splits=("test",), seed=0, num_queries=24) -> Path:
    """A BEIR folder whose queries are two words of a document that is relevant; splits share no query."""
    rng = np.random.default_rng(seed)
    write_jsonl(folder / "corpus.jsonl", [{"_id": i, "title": t, "text": x} for i, (t, x) in DOCUMENTS.items()])
    (folder / "qrels").mkdir()
    queries = []
    for split in splits:
        rows = []
        for number in range(num_queries):
            doc_id = str(rng.choice(["001", "002", "003", "004", "005", "008", "009", "011", "012"]))
            words = rng.choice([word for word in DOCUMENTS[doc_id][1].split() if len(word) > 2], 2)
            queries.append({"_id": f"{split}{number}", "text": f"{words[0]} {words[1]} {split}{number}"})
            rows.append(f"{split}{number}\t{doc_id}\t1\n")
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    write_jsonl(folder / "queries.jsonl", queries)
    return folder


@pytest.fixture(scope="module")
def collections(tmp_path_factory):
    """A folder of collections: two by themselves, of which one has a dev split, and a group of two."""
    folder = tmp_path_factory.mktemp("collections")
    for number, name in enumerate(["alone", "split", "cqadupstack/tex", "cqadupstack/unix"]):
        (folder / name).mkdir(parents=True)
        splits = ("test", "train") if name == "split" else ("test",)
        make_collection(folder / name, splits=splits, seed=number, num_queries=10 + 4 * number)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, bert_folder):
    other = save_sentence_files(save_model(tmp_path_factory.mktemp("other"), "mpnet"))
    return [f"full={bert_folder}", f"small={other}"]


@pytest.fixture(scope="module")
def done(tmp_path_factory, collections, models):
    """A whole suite, and what it printed."""
    output = tmp_path_factory.mktemp("suites") / "suite"
    printed = suite(models, output, SuiteSettings((str(collections),), bm25=True, hybrid=True, prf=True))
    return output, printed


def rows_of(output):
    with open(output / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_figures_are_those_of_the_runs(done, collections):
    output, _ = done
    rows = [row for row in rows_of(output) if row["measure"] == "nDCG@10"]
    assert len(rows) == (1 + 2 * 5) * 4
    files = {"BM25": "bm25", "full": "full", "small + BM25, RRF": "small-rrf", "full + BM25, tuned": "full-tuned"}
    files["small, PRF Rocchio"] = "small-prf-rocchio"
    for row in rows:
        if row["system"] in files:
            run = read_run(output / "runs" / row["collection"] / f"{files[row['system']]}.trec")
            qrels = read_qrels(collections / row["collection"] / "qrels" / "test.tsv")
            expected = evaluate_queries(run, qrels, [NDCG]).mean[NDCG]
            assert float(row["value"]) == pytest.approx(expected, abs=1e-12)
    assert len({row["value"] for row in rows}) > 10


def test_the_table_has_a_group_as_one_column_and_the_mean_over_columns(done):
    output, printed = done
    (header,) = (line for line in printed.splitlines() if line.startswith("| system"))
    assert header == "| system | alone | cqadupstack (mean of 2) | split | mean | of full |"
    values = {
        (row["system"], row["collection"]): float(row["value"])
        for row in rows_of(output)
        if row["measure"] == "nDCG@10"
    }
    (bm25,) = (line.split(" | ") for line in printed.splitlines() if line.startswith("| BM25 "))
    group = (values["BM25", "cqadupstack/tex"] + values["BM25", "cqadupstack/unix"]) / 2
    assert bm25[2] == f"{group:.4f}"
    assert bm25[4] == f"{(values['BM25', 'alone'] + group + values['BM25', 'split']) / 3:.4f}"
    (full,) = (line for line in printed.splitlines() if line.startswith("| full |"))
    assert full.endswith("| - |")  # what others are compared with


def test_weights_are_tuned_on_another_split_or_on_the_other_half(done):
    output, printed = done
    record = json.loads((output / "runs" / "split" / "full-tuned.trec.json").read_text())["tuned"]
    assert len(record) == 1 and record[0]["on"].endswith("qrels/train.tsv") and record[0]["queries"] == 14
    record = json.loads((output / "runs" / "alone" / "full-tuned.trec.json").read_text())["tuned"]
    assert [(one["on"], one["queries"]) for one in record] == [("the other half", 5)] * 2
    assert len({hit.query_id for hit in read_run(output / "runs" / "alone" / "full-tuned.trec")}) == 10
    assert "14 queries of train" in printed and "5 queries of the other half" in printed


def test_every_form_of_the_table_is_written(done):
    output, printed = done
    text = (output / "results.md").read_text(encoding="utf-8")
    assert printed in text and "## R@100" in text
    page = (output / "results.html").read_text(encoding="utf-8")
    assert page.count("<table>") == 2 and "small + BM25, RRF" in page and "http" not in page
    latex = (output / "results.tex").read_text(encoding="utf-8")
    assert latex.count(r"\begin{tabular}{lrrrrr}") == 2 and latex.count(r"\bottomrule") == 2
    assert r"\%" in latex and " % " not in "\n".join(x for x in latex.splitlines() if not x.startswith("%"))


def test_what_is_there_is_not_made_again(done, collections, models, caplog):
    output, printed = done
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")}
    settings = SuiteSettings((str(collections),), bm25=True, hybrid=True, prf=True)
    with caplog.at_level("INFO"):
        assert suite(models, output, settings) == printed
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")} == before
    assert caplog.text.count("is there already") == 44


def written(output):
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("*.trec")}


def test_only_what_changed_is_made_again(tmp_path, collections, models):
    shutil.copytree(collections / "split", tmp_path / "split")
    shutil.copytree(collections / "alone", tmp_path / "alone")
    settings = SuiteSettings((str(tmp_path / "split"), str(tmp_path / "alone")), bm25=True)
    suite(models[:1], tmp_path / "out", settings)
    first = written(tmp_path / "out")
    suite(models, tmp_path / "out", settings)  # another encoder joins
    second = written(tmp_path / "out")
    assert first.items() < second.items() and len(second) == 6

    (tmp_path / "split" / "qrels" / "test.tsv").write_text("test0\t001\t1\ntest1\t002\t1\n")
    suite(models, tmp_path / "out", settings)
    third = written(tmp_path / "out")
    assert {name for name in third if third[name] != second[name]} == {n for n in third if "/split/" in n}

    documents = [{"_id": "001", "text": "hot soup"}, {"_id": "002", "text": "tea"}]
    write_jsonl(tmp_path / "split" / "corpus.jsonl", documents)
    suite(models, tmp_path / "out", settings)
    run = read_run(tmp_path / "out" / "runs" / "split" / "full.trec")
    assert {hit.doc_id for hit in run} == {"001", "002"}


def test_a_model_that_changed_is_indexed_again(tmp_path, collections, models, bert_folder):
    settings = SuiteSettings((str(collections / "alone"),))
    shutil.copytree(bert_folder, tmp_path / "model")
    suite([str(tmp_path / "model")], tmp_path / "out", settings)
    first = (tmp_path / "out" / "runs" / "alone" / "model.trec").read_text()
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(models[1].partition("=")[2], tmp_path / "model")
    suite([str(tmp_path / "model")], tmp_path / "out", settings)
    assert (tmp_path / "out" / "runs" / "alone" / "model.trec").read_text() != first


def test_settings_of_a_model_and_options_that_changed_are_indexed_again(tmp_path, collections, bert_folder):
    settings, folder = SuiteSettings((str(collections / "alone"),)), shutil.copytree(bert_folder, tmp_path / "model")
    index_dir, run = tmp_path / "out/indexes/alone/model", tmp_path / "out/runs/alone/model.trec"

    def made(**options):
        suite([str(folder)], tmp_path / "out", settings, EncoderOptions(**options))
        return read_index_info(index_dir), run.stat().st_mtime_ns

    first, when = made(dtype="fp32")
    assert first.dtype == "float32" and made(dtype="fp32") == (first, when)
    second, when = made(dtype="bf16", max_length=5)
    assert (second.dtype, second.encoder.max_length) == ("bfloat16", 5)
    save_sentence_files(folder, pooling="cls")
    third, later = made(dtype="bf16", max_length=5)
    assert third.encoder.pooling == "cls" and later > when


def test_what_another_model_had_begun_to_encode_is_discarded(tmp_path, collections, models):
    index_dir = tmp_path / "out" / "indexes" / "alone" / "model"
    corpus, (full, small) = collections / "alone" / "corpus.jsonl", (name.partition("=")[2] for name in models)
    index_corpus(str(corpus), full, index_dir, IndexSettings(keep_embeddings=True))
    shutil.rmtree(index_dir)  # as a job that was stopped leaves it
    (tmp_path / "out" / "settings.json").write_text('{"command": "suite"}')
    suite([f"model={small}"], tmp_path / "out", SuiteSettings((str(collections / "alone"),)))
    assert read_index_info(index_dir).model == small


@pytest.mark.processes
def test_a_suite_that_was_killed_goes_on(tmp_path, done, collections, models):
    words = ["suite", "--encoder", models[0], "--encoder", models[1], "--collections", collections]
    words += ["--bm25", "--hybrid", "--prf", "--output", tmp_path / "out"]
    kill_when_there(Command(*words), tmp_path / "out" / "runs" / "alone" / "full-rrf.trec")
    assert not (tmp_path / "out" / "results.csv").exists()
    killed = written(tmp_path / "out")
    (tmp_path / "out" / "indexes" / "alone" / ".bm25.left").mkdir()
    ended = CliRunner().invoke(cli, list(map(str, words)))
    assert ended.exit_code == 0, ended.output
    made_before = [name for name, when in written(tmp_path / "out").items() if killed.get(name) == when]
    assert "runs/alone/bm25.trec" in made_before
    assert rows_of(tmp_path / "out") == rows_of(done[0])
    assert not list((tmp_path / "out").rglob(".bm25*"))


def test_each_collection_has_its_depth_and_its_own_documents_go_where_told(tmp_path, collections, models):
    write_jsonl(tmp_path / "q.jsonl", [])
    for name in ("arguana", "other"):
        shutil.copytree(collections / "alone", tmp_path / "data" / name)
        write_jsonl(tmp_path / "data" / name / "queries.jsonl", [{"_id": "008", "text": "hot soup"}])
        (tmp_path / "data" / name / "qrels" / "test.tsv").write_text("008\t004\t1\n")
    settings = SuiteSettings((str(tmp_path / "data"),), hits_of=("other=3",), hits=5)
    printed = suite(models[:1], tmp_path / "out", settings)
    runs = {name: read_run(tmp_path / "out" / "runs" / name / "full.trec") for name in ("arguana", "other")}
    assert {name: len(run) for name, run in runs.items()} == {"arguana": 5, "other": 3}
    assert "008" not in {hit.doc_id for hit in runs["arguana"]} and "008" in {hit.doc_id for hit in runs["other"]}
    assert "is left out in arguana." in printed and "Hits a query: 5 in arguana, 3 in other." in printed


def test_intervals_are_of_paired_draws(done):
    # Of two systems with the same figures the share is 1 in every sample, however few queries there are.
    values = {"nDCG@10": {"c": np.array([[0.2, 0.9, 0.4], [0.2, 0.9, 0.4]])}}
    (collection,) = find_collections_of(done)[:1]
    results = Results(["a", "b"], 0, [named(collection, "c")], values, [], 0)
    assert table_of(results, "nDCG@10").rows[1][-1] == "100.0% (100.0% to 100.0%)"


def find_collections_of(done):
    return find_collections(SuiteSettings((str(collections_of(done)),)))


def collections_of(done):
    record = json.loads((done[0] / "indexes" / "alone" / "full" / "effir.json").read_text())
    return Path(record["corpus"]).parents[1]


def named(collection, name, group=""):
    return type(collection)(**{**vars(collection), "name": name, "group": group})


def test_a_group_counts_as_one_collection_by_hand(done):
    (one,) = find_collections_of(done)[:1]
    collections = [named(one, "x"), named(one, "g/1", "g"), named(one, "g/2", "g")]
    values = {"m": {"x": np.array([[1.0, 1.0]]), "g/1": np.array([[0.0, 0.2]]), "g/2": np.array([[0.5]])}}
    results = Results(["a"], 0, collections, values, [], 0)
    assert columns_of(results) == {"x": ["x"], "g": ["g/1", "g/2"]}
    figures, means = means_of(results, "m")
    np.testing.assert_allclose(figures[:, 0], [1.0, (0.1 + 0.5) / 2])
    assert means[0, 0] == pytest.approx((1.0 + 0.3) / 2)


def test_latex_escapes_names(done):
    (one,) = find_collections_of(done)[:1]
    values = {"m": {"a_b": np.array([[0.5, 0.1], [0.4, 0.3]])}}
    latex = as_latex(table_of(Results(["x_y", "50% & more"], 0, [named(one, "a_b")], values, [], 0), "m"))
    body = "\n".join(line for line in latex.splitlines() if not line.startswith("%"))
    assert r"a\_b" in body and r"x\_y" in body and r"50\% \& more" in body and r"\%" in body.splitlines()[-3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"collections": ("absent",)}, "absent: no such folder of a collection"),
        ({"collections": ("{empty}",)}, "neither a BEIR folder nor a folder of them"),
        ({"collections": ("{alone}", "{alone}")}, "alone: two collections of this name"),
        ({"collections": ("{alone}",), "split": "dev"}, "has no qrels/dev.tsv"),
        ({"collections": ("{alone}",), "hits_of": ("alone",)}, "is not NAME=NUMBER, as in arguana=100"),
        ({"collections": ("{alone}",), "hits_of": ("alone=\u00b2",)}, "is not NAME=NUMBER, as in arguana=100"),
        ({"collections": ("{alone}",), "hits_of": ("other=3",)}, 'no collection is called "other"; there are alone'),
        ({"collections": ("irds:no-such",)}, "irds:no-such: ir_datasets knows no data set of this name"),
        ({"collections": ("irds:beir/scifact",)}, "irds:beir/scifact: has no qrels"),
        ({"collections": ("{alone}",), "measures": "nDGC"}, "measure 'nDGC' is unknown"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, collections, models, settings, message):
    (tmp_path / "empty").mkdir()
    places = {"alone": collections / "alone", "empty": tmp_path / "empty"}
    settings["collections"] = tuple(name.format(**places) for name in settings["collections"])
    with pytest.raises((ValueError, OSError), match=message):
        suite(models[:1], tmp_path / "out", SuiteSettings(**settings))
    assert not (tmp_path / "out").exists()


def test_nothing_to_measure_and_two_encoders_of_a_name_are_refused(tmp_path, collections, bert_folder):
    settings = SuiteSettings((str(collections / "alone"),))
    with pytest.raises(ValueError, match="nothing to measure: give --encoder, or --bm25"):
        suite([], tmp_path / "out", settings)
    with pytest.raises(ValueError, match="two encoders are called .*; name them, as in --encoder small=models/"):
        suite([str(bert_folder), str(bert_folder)], tmp_path / "out", settings)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["small", "small-tuned"], '"small \\+ BM25, tuned" and of "small-tuned" would both be small-tuned.trec'),
        (["small", "bm25"], '"BM25" and of "bm25" would both be bm25.trec'),
        (["small", ""], "'' is no name of a run"),
        (["small", ".."], "'..' is no name of a run"),
    ],
)
def test_two_systems_never_share_a_run(tmp_path, collections, bert_folder, names, message):
    settings = SuiteSettings((str(collections / "alone"),), hybrid=True)
    with pytest.raises(ValueError, match=message):
        suite([f"{name}={bert_folder}" for name in names], tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_the_folder_that_the_command_runs_in_is_an_encoder(tmp_path, collections, bert_folder, monkeypatch):
    monkeypatch.chdir(bert_folder)
    printed = suite(["."], tmp_path / "out", SuiteSettings((str(collections / "alone"),)))
    assert f"| {bert_folder.name} | " in printed


def test_bm25_alone_needs_no_encoder(tmp_path, collections):
    printed = suite([], tmp_path / "out", SuiteSettings((str(collections / "alone"),), bm25=True))
    assert "| BM25 | " in printed and "| of BM25 |" in printed


def test_ids_that_are_not_on_this_machine_are_said_and_refused(tmp_path, models, monkeypatch):
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match=r"26 of 26 ids of ir_datasets are not on this machine: beir/msmarco/dev, "):
        suite(models[:1], tmp_path / "out", SuiteSettings(("irds:beir",)))
    assert not is_on_disk("beir/scifact/test")
    (tmp_path / "home" / "beir" / "scifact" / "docs.pklz4").mkdir(parents=True)
    assert is_on_disk("beir/scifact/test") and not is_on_disk("beir/nfcorpus/test")
    (found,) = find_collections(SuiteSettings(("irds:beir/scifact/test",)))
    assert (found.corpus, found.dev_qrels) == ("irds:beir/scifact/test", "irds:beir/scifact/train")


def test_the_ids_of_beir_and_nanobeir_have_documents_queries_and_judgments():
    found = find_collections(SuiteSettings(("irds:beir", "nano"), download=True))
    assert len(found) == len(BEIR) + len(NANO) == 26 + 13
    for one in found:
        dataset = ir_datasets.load(one.name)
        assert dataset.has_docs() and dataset.has_queries() and dataset.has_qrels()
    assert Counter(one.group for one in found) == {"": 27, "cqadupstack": 12}
    removed = {one.name for one in found if one.remove_query}
    assert removed == {"beir/arguana", "beir/quora/test", "nano-beir/arguana", "nano-beir/quora"}


def test_tasks_of_mteb_are_a_table_of_their_own_and_are_not_done_again(tmp_path, monkeypatch, collections, models):
    import mteb

    from effir_search.adapters.mteb import collection_task, run_tasks

    # mteb knows tasks of the hub by name; here one of this machine goes by the name of one.
    task = collection_task(collections / "alone")
    monkeypatch.setattr(mteb, "get_task", lambda name: {"Alone": task}[name])
    settings = SuiteSettings(mteb=("Alone",))
    printed = suite(models, tmp_path / "suite", settings)
    full = run_tasks(models[0].partition("=")[2], [task], tmp_path / "own")["alone"]
    assert f"| full | {full:.4f} | {full:.4f} |" in printed
    assert (tmp_path / "suite" / "mteb.md").read_text() == f"{printed}\n"
    monkeypatch.setattr(mteb, "get_task", lambda name: {"Alone": collection_task(collections / "alone")}[name])
    monkeypatch.setattr("effir_search.adapters.mteb.EffirEncoder.encode", None)
    assert suite(models, tmp_path / "suite", settings) == printed


@pytest.mark.parametrize(
    ("encoders", "settings", "message"),
    [
        (["model"], {}, "give --collections, or --mteb"),
        ([], {"mteb": ("SciFact",)}, "--mteb goes with --encoder"),
        ([], {"collections": ("x",), "bm25": True, "prf": True}, "--prf goes with --encoder"),
        ([], {"collections": ("x",), "hybrid": True}, "--hybrid goes with --encoder"),
        (["model"], {"mteb": ("SciFact",), "prf": True}, "--prf goes with --collections"),
    ],
)
def test_a_suite_of_nothing_is_an_error(tmp_path, bert_folder, encoders, settings, message):
    with pytest.raises(ValueError, match=message):
        suite([str(bert_folder) for _ in encoders], tmp_path / "suite", SuiteSettings(**settings))
