import functools
import json

import pytest
import torch
from click.testing import CliRunner
from conftest import DOCUMENTS, TOPICS, write_jsonl
from sentence_transformers import CrossEncoder

from effir_search.cli import cli
from effir_search.settings import EncoderOptions, MiningSettings
from effir_search.text.training_records import read_records
from effir_search.training.mine import MiningResult, describe_mined, highest_negative, mine
from effir_search.training.teachers import load_teacher

TEXTS = {doc_id: f"{title} {text}".strip() for doc_id, (title, text) in DOCUMENTS.items()}
# Positives are 009 and 001 of query 1, 008 of query 2 and 007 and 006 of query 007; 002 is judged 0 for query 2, 010 is
# empty, and query "other" has no judgment.
RUN = {
    "1": {"001": 5.0, "002": 4.0, "009": 3.0, "003": 2.5, "010": 2.0, "004": 1.0},
    "2": {"002": 9.0, "004": 8.0, "005": 7.0},
    "other": {"001": 1.0},
}


def write_run(path, run):
    lines = [
        f"{query_id} Q0 {doc_id} {rank} {score} tag\n"
        for query_id, hits in run.items()
        for rank, (doc_id, score) in enumerate(hits.items(), start=1)
    ]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def mined(tmp_path, collection):
    """Mine from a run of the toy collection; return the counts and, by query, the record that was written."""

    def run(hits=RUN, **options):
        output = tmp_path / "mined.jsonl"
        places = {"corpus": collection / "corpus.jsonl", "topics": collection / "queries.jsonl"}
        places |= {"qrels": collection / "qrels" / "test.tsv"} | {
            name: options.pop(name) for name in ("corpus", "topics", "qrels") if name in options
        }
        places = {name: str(place) for name, place in places.items()}
        settings = MiningSettings(**{"sample": "top"} | options)
        counts = mine(write_run(tmp_path / "run.txt", hits), output=output, **places, settings=settings)
        records = map(json.loads, output.read_text().splitlines())
        return counts, {record["query_id"]: record for record in records}

    return run


def negatives(records):
    return {query_id: record["negative_ids"] for query_id, record in records.items()}


# Candidates


def test_negatives_are_the_hits_that_are_neither_positive_nor_empty(mined):
    counts, records = mined()
    assert records["1"] == {
        "query_id": "1",
        "query": TOPICS["1"],
        "positives": [TEXTS["009"], TEXTS["001"]],
        "positive_ids": ["009", "001"],
        "negatives": [TEXTS["002"], TEXTS["003"], TEXTS["004"]],
        "negative_ids": ["002", "003", "004"],
    }
    assert negatives(records) == {"1": ["002", "003", "004"], "2": ["002", "004", "005"]}
    assert counts == MiningResult(
        num_queries=2,
        num_negatives=6,
        num_false=0,
        num_own=0,
        num_copies=0,
        without_positive=1,
        without_negative=0,
        not_in_run=1,
    )


def test_candidates_have_ranks_from_first_to_last(mined):
    # Of query 1, ranks 2 to 4 are 002, 009 (a positive) and 003; of query 2, ranks 2 and 3 are 004 and 005.
    assert negatives(mined(first=2, last=4)[1]) == {"1": ["002", "003"], "2": ["004", "005"]}
    assert negatives(mined(first=1, last=1)[1]) == {"2": ["002"]}
    assert mined(first=1, last=1)[0].without_negative == 1


def test_ranks_are_those_of_trec_eval_whatever_the_order_of_the_file(mined):
    # Equal scores: the larger id is ranked first.
    run = {"2": {"003": 1.0, "005": 1.0, "004": 1.0, "002": 2.0}}
    assert negatives(mined(run)[1]) == {"2": ["002", "005", "004", "003"]}


def test_at_most_so_many_are_taken_from_the_top(mined):
    counts, records = mined(negatives=2)
    assert negatives(records) == {"1": ["002", "003"], "2": ["002", "004"]}
    assert counts.num_negatives == 4


def test_a_document_with_the_text_of_a_positive_or_a_better_candidate_is_none(mined, tmp_path):
    texts = {**TEXTS, "003": TEXTS["001"], "004": TEXTS["002"]}
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": i, "text": text} for i, text in texts.items()])
    assert negatives(mined(corpus=corpus)[1])["1"] == ["002"]


def test_the_query_itself_is_no_negative(mined, tmp_path):
    # As in ArguAna, where each query is a document of its own id with a title.
    texts = [
        {"_id": "1", "title": "cats", "text": f"  {TOPICS['1'].upper()}"},
        {"_id": "2", "title": "hot", "text": "soup"},
        {"_id": "twin", "text": "hot\tsoup"},
        {"_id": "longer", "title": "hot soup", "text": "with onion"},
    ]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*({"_id": i, "text": t} for i, t in TEXTS.items()), *texts])
    run = {"1": {"1": 9.0, "2": 8.0, "009": 7.0}, "2": {"2": 9.0, "twin": 8.0, "longer": 7.0, "1": 6.0}}
    counts, records = mined(run, corpus=corpus)
    # Another query's text is a candidate like any other.
    assert negatives(records) == {"1": ["2"], "2": ["longer", "1"]}
    assert (counts.num_own, counts.num_copies) == (3, 0)


def test_a_copy_of_a_positive_is_no_negative_whatever_its_case_and_white_space(mined, tmp_path):
    texts = {**TEXTS, "003": f" {TEXTS['001'].upper()}", "004": TEXTS["002"].replace(" ", "  ")}
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": i, "text": text} for i, text in texts.items()])
    counts, records = mined(corpus=corpus)
    assert negatives(records)["1"] == ["002"]  # 003 is positive 001, and 004 is 002 again
    assert (counts.num_own, counts.num_copies) == (0, 1)


def test_an_empty_positive_is_left_out_and_a_query_with_no_other_too(mined, tmp_path):
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("1 0 010 1\n1 0 001 1\n2 0 010 1\n")
    counts, records = mined(qrels=qrels)
    assert list(records) == ["1"] and records["1"]["positive_ids"] == ["001"]
    assert counts.without_positive == 2  # query 2, and "other", which is not judged


def test_empty_topics_are_left_out_and_counted(mined, tmp_path):
    records = [{"_id": query_id, "text": "" if query_id == "1" else text} for query_id, text in TOPICS.items()]
    counts, records = mined(topics=write_jsonl(tmp_path / "topics.jsonl", records))
    assert list(records) == ["2"] and counts.without_text == 1
    assert "; 1 queries without a text" in describe_mined(counts)


def test_the_margin_counts_from_the_lowest_positive_of_the_run(mined):
    # The lowest positive of query 1 has 3.0: with 0.5, up to 2.5 stays, so only 002 with 4.0 goes. Query 2 has no
    # positive in the run.
    counts, records = mined(margin=0.5)
    assert negatives(records) == {"1": ["003", "004"], "2": ["002", "004", "005"]}
    assert counts.num_false == 1
    # With -1.0, up to 4.0 stays.
    assert mined(margin=-1.0)[0].num_false == 0
    # A positive sets the bound also where its rank is outside.
    assert negatives(mined(margin=0.5, first=2, last=2)[1]) == {"2": ["004"]}


# The sample


def wide_run(numbers=range(1, 13)):
    return {query_id: {f"{number:03}": 1.0 / number for number in numbers} for query_id in TOPICS}


def test_the_same_seed_takes_the_same_and_another_others_in_order_of_rank(mined):
    sample, again, other = (negatives(mined(wide_run(), sample="random", negatives=4, seed=s)[1]) for s in (0, 0, 1))
    assert sample == again and sample != other
    for taken in (*sample.values(), *other.values()):
        assert len(set(taken)) == 4 and taken == sorted(taken)


def test_what_a_query_gets_does_not_depend_on_other_queries(mined):
    every = negatives(mined(wide_run(), sample="random", negatives=4)[1])
    for query_id, hits in wide_run().items():
        assert negatives(mined({query_id: hits}, sample="random", negatives=4)[1]) == {query_id: every[query_id]}


def test_every_candidate_is_as_likely_as_any_other(mined):
    # Query 2 has 10 candidates (not 008, not 010), of which 3 are taken: each about 60 times in 200 samples, with a
    # standard deviation of sqrt(200 * 0.3 * 0.7) = 6.5.
    run = {"2": wide_run()["2"]}
    taken = [
        doc_id for s in range(200) for doc_id in negatives(mined(run, sample="random", negatives=3, seed=s)[1])["2"]
    ]
    counts = {doc_id: taken.count(doc_id) for doc_id in sorted(TEXTS.keys() - {"008", "010"})}
    assert sum(counts.values()) == len(taken) == 600
    assert all(abs(count - 60) < 4 * 6.5 for count in counts.values())


# Teachers


@pytest.mark.parametrize(("positive", "bound"), [(0.8, 0.76), (-0.8, -0.84), (0.0, 0.0)])
def test_a_negative_scores_at_most_95_percent_of_the_positive(positive, bound):
    # 0.95 * 0.8 = 0.76; -0.8 - 0.05 * 0.8 = -0.84.
    assert highest_negative(positive, 0.95) == pytest.approx(bound)


@pytest.mark.parametrize("kind", ["teacher", "reranker"])
def test_what_the_teacher_takes_for_a_positive_is_left_out(mined, bert_folder, reranker, kind):
    folder = {"teacher": bert_folder, "reranker": reranker}[kind]
    counts, records = mined(wide_run(), negatives=12, **{kind: str(folder)}, device="cpu", teacher_ratio=0.99)
    before = mined(wide_run(), negatives=12)[1]
    if kind == "reranker":
        model = CrossEncoder(str(folder), device="cpu")
        score = functools.partial(model.predict, activation_fn=torch.nn.Identity())
    else:
        score = load_teacher(folder, options=EncoderOptions(device="cpu"))
    ids_of = {query_id: [*record["positive_ids"], *record["negative_ids"]] for query_id, record in before.items()}
    # All in one call, as in mining: in bfloat16 a score depends on what shares its batch.
    answers = iter(score([(TOPICS[query_id], TEXTS[doc_id]) for query_id, ids in ids_of.items() for doc_id in ids]))
    num_false = 0
    for query_id, record in before.items():
        scores = {doc_id: next(answers) for doc_id in ids_of[query_id]}
        lowest = min(scores[doc_id] for doc_id in record["positive_ids"])
        bound = 0.99 * lowest if lowest > 0 else 1.01 * lowest
        kept = [doc_id for doc_id in record["negative_ids"] if scores[doc_id] <= bound]
        num_false += len(record["negative_ids"]) - len(kept)
        assert negatives(records).get(query_id, []) == kept
        if kept:
            expected = [scores[doc_id] for doc_id in (*record["positive_ids"], *kept)]
            assert records[query_id]["scores"] == pytest.approx(expected, abs=1e-3)
    assert counts.num_false == num_false and 0 < num_false
    assert counts.num_negatives == sum(map(len, negatives(records).values())) > 0


# What is written


@pytest.mark.parametrize("with_teacher", [False, True])
def test_the_file_is_training_data(mined, tmp_path, bert_folder, with_teacher):
    options = {"teacher": str(bert_folder), "device": "cpu", "teacher_ratio": 1.0} if with_teacher else {}
    _, records = mined(wide_run(), **options)
    read = [record for _, record in read_records(tmp_path / "mined.jsonl")]
    assert [record._asdict() for record in read] == [
        {name: record.get(name) for name in ("query", "positives", "negatives", "scores")}
        for record in records.values()
    ]
    assert all((record.scores is not None) == with_teacher for record in read)


def test_the_answer_tells_what_was_left_out():
    assert describe_mined(MiningResult(3, 9, 0, 0, 0, 0, 0, 0)) == "3 queries, 9 negatives"
    assert describe_mined(MiningResult(3, 9, 4, 6, 7, 1, 2, 5)) == (
        "3 queries, 9 negatives; 4 probable positives left out; 6 hits with the query's own text left out; "
        "7 copies of positives left out; 1 queries without a positive; 2 queries without a negative; "
        "5 queries not in the run"
    )


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 0}, "ranks from 0 to 100: --first must be at least 1, and --last not below it"),
        ({"first": 5, "last": 4}, "ranks from 5 to 4"),
        ({"negatives": 0}, "--negatives 0 must be at least 1"),
        ({"teacher_ratio": 0.0}, r"--teacher-ratio 0\.0 must be above 0 and at most 1"),
        ({"teacher_ratio": 1.5}, r"--teacher-ratio 1\.5 must be above 0"),
        ({"sample": "best"}, "sample 'best' is unknown; known are random, top"),
        ({"teacher": "a", "reranker": "b"}, "give one teacher"),
        ({"hits": {"8": {"001": 1.0}}}, r"run\.txt: no query of the run is judged in .*test\.tsv"),
        ({"hits": {"1": {"099": 1.0}}}, r'corpus\.jsonl: no document "099" \(1 of 1 hits of the run are not'),
        (
            {"first": 50},
            r"run\.txt: no query has both a positive and a negative left \(1 without a positive, 2 without",
        ),
    ],
)
def test_what_cannot_be_mined_is_an_error_and_leaves_no_file(mined, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        mined(**options)
    assert not (tmp_path / "mined.jsonl").exists()


def test_a_query_that_the_topics_lack_is_left_out_and_told(mined, tmp_path, caplog):
    topics = write_jsonl(tmp_path / "topics.jsonl", [{"_id": "2", "text": "hot soup"}])
    assert negatives(mined(topics=topics)[1]) == {"2": ["002", "004", "005"]}
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith(f"{topics}: 1 of 2 topics that ") and told.endswith(" are not in it and are left out: 1")
    write_jsonl(topics, [{"_id": "8", "text": "hot soup"}])
    with pytest.raises(ValueError, match=r'topics\.jsonl: has no topic of .*test\.tsv, such as "1": do they belong'):
        mined(topics=topics)


def test_a_positive_that_the_corpus_lacks_is_left_out_and_told(mined, tmp_path, caplog):
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("1 0 gone 1\n1 0 001 1\n2 0 lost 1\n")
    counts, records = mined(qrels=qrels)
    assert list(records) == ["1"] and records["1"]["positive_ids"] == ["001"]
    assert counts.without_positive == 2  # query 2, and "other", which is not judged
    (told,) = (record.getMessage() for record in caplog.records)
    assert f"2 of 3 documents that {qrels} names are not in it and are left out: gone, lost" in told
    qrels.write_text("1 0 gone 1\n2 0 lost 1\n")
    with pytest.raises(ValueError, match=r'corpus\.jsonl: has no document of .*qrels\.txt, such as "gone"'):
        mined(qrels=qrels)


# effir mine


@pytest.fixture
def command(tmp_path, collection):
    def run(*options):
        places = {
            "--run": write_run(tmp_path / "run.txt", RUN), "--qrels": collection / "qrels" / "test.tsv",
            "--corpus": collection, "--topics": collection / "queries.jsonl", "--output": tmp_path / "mined.jsonl",
        }  # fmt: skip
        return CliRunner().invoke(cli, ["mine", *(str(part) for pair in places.items() for part in pair), *options])

    return run


def test_the_command_says_what_it_wrote(command, tmp_path):
    result = command("--sample", "top", "--negatives", "2", "--first", "2")
    answer = "2 queries, 4 negatives; 1 queries without a positive; 1 queries not in the run"
    assert (result.exit_code, result.stdout) == (0, f"{answer} -> {tmp_path / 'mined.jsonl'}\n")
    records = map(json.loads, (tmp_path / "mined.jsonl").read_text().splitlines())
    assert [record["negative_ids"] for record in records] == [["002", "003"], ["004", "005"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher-ratio", "0.9"], "--teacher-ratio goes with --teacher or --reranker"),
        (["--device", "cpu"], "--device goes with --teacher or --reranker"),
        (["--sample", "top", "--seed", "1"], "--seed goes with --sample random"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(command, options, message):
    result = command(*options)
    assert result.exit_code == 2 and message in result.stderr
