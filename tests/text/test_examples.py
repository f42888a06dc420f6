import gzip
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import DOCUMENTS, TOPICS, write_jsonl

from effir_search.cli.errors import describe_error
from effir_search.text.examples import (
    Example,
    Examples,
    document_key,
    prepare_examples,
    with_scores,
)
from effir_search.text.training_records import Record, read_records

SOUP = Record("hot soup", ["tomato soup", "soup with onion"], ["sweet tea", "jam"], None)
SCORED = SOUP._replace(scores=[3.0, 2.5, -1.0, 0.0])


def passages(texts):
    """As Tevatron writes them, the first word in the title."""
    split = [text.partition(" ") for text in texts]
    return [{"docid": str(i), "title": title, "text": text} for i, (title, _, text) in enumerate(split)]


FORMATS = {
    "ours": ({"query": SOUP.query, "positives": SOUP.positives, "negatives": SOUP.negatives}, SOUP),
    "ours with titles": (
        {"query": SOUP.query, "positives": passages(SOUP.positives), "negatives": passages(SOUP.negatives)},
        SOUP,
    ),
    "ours with scores": (
        {"query": SOUP.query, "positives": SOUP.positives, "negatives": SOUP.negatives, "scores": [3, 2.5, -1, 0]},
        SCORED,
    ),
    "ours with scores in two lists": (
        {
            "query": SOUP.query, "positives": SOUP.positives, "positive_scores": [3, 2.5],
            "negatives": SOUP.negatives, "negative_scores": [-1, 0],
        },
        SCORED,
    ),
    "tevatron": (
        {
            "query_id": "7", "query": SOUP.query, "answers": ["x"],
            "positive_passages": passages(SOUP.positives), "negative_passages": passages(SOUP.negatives),
        },
        SOUP,
    ),
    "tevatron's query_text": (
        {"query_id": "7", "query_text": SOUP.query, "positive_passages": passages(SOUP.positives)},
        SOUP._replace(negatives=[]),
    ),
    "sentence-transformers": (
        {"anchor": SOUP.query, "positive": "tomato soup", "negative": "sweet tea", "label": [3, -1]},
        Record(SOUP.query, ["tomato soup"], ["sweet tea"], [3.0, -1.0]),
    ),
    "sentence-transformers, numbered": (
        {"query": "q", "pos": "p", "negative_10": "c", "negative_2": "b", "negative_1": "a", "score": [4, 3, 2, 1]},
        Record("q", ["p"], ["a", "b", "c"], [4.0, 3.0, 2.0, 1.0]),
    ),
    "sentence-transformers, a null": (
        {"anchor": "q", "positive": "p", "negative": "n", "negative_1": "a", "negative_2": None},
        Record("q", ["p"], ["n", "a"], None),
    ),
    "flagembedding": (
        {
            "query": SOUP.query, "pos": SOUP.positives, "neg": SOUP.negatives, "pos_scores": [3, 2.5],
            "neg_scores": [-1, 0], "prompt": "Find it: ", "type": "normal",
        },
        SCORED,
    ),
}  # fmt: skip


def read(tmp_path, *records, **options):
    path = write_jsonl(tmp_path / "train.jsonl", records)
    return [record for _, record in read_records(path, **options)]


# Reading


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_record(tmp_path, name):
    line, record = FORMATS[name]
    assert read(tmp_path, line) == [record]


def test_records_come_with_file_and_line_and_blank_lines_count(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('\n{"query": "a", "pos": ["b"]}\n\n{"query": "c", "pos": ["d"]}\n')
    assert list(read_records(path)) == [
        (f"{path}:2", Record("a", ["b"], [], None)),
        (f"{path}:4", Record("c", ["d"], [], None)),
    ]


def test_texts_are_joined_and_stripped_as_those_of_a_corpus(tmp_path):
    (record,) = read(
        tmp_path,
        {"query": " q ", "pos": [" a ", {"text": "b "}, {"title": "t", "text": ""}, {"title": None, "text": "c"}]},
    )
    assert record == Record(" q ", ["a", "b", "t", "c"], [], None)


@pytest.mark.parametrize("kind", ["ids", "document_ids"])
def test_ids_are_looked_up_in_corpus_and_topics(tmp_path, collection, kind):
    record = {"query_id": "2", f"positive_{kind}": ["008"], f"negative_{kind}": ["004", "001"], "scores": [3, 2, 1]}
    texts = {doc_id: f"{title} {text}".strip() for doc_id, (title, text) in DOCUMENTS.items()}
    places = {"corpus": collection / "corpus.jsonl", "topics": collection / "queries.jsonl"}
    assert read(tmp_path, record, **places) == [
        Record(TOPICS["2"], [texts["008"]], [texts["004"], texts["001"]], [3.0, 2.0, 1.0])
    ]


def test_a_text_in_the_record_needs_no_lookup(tmp_path, collection):
    # As Tevatron's newer files have it: the query as text, documents by id. The query's id is in no topics.
    record = {"query_id": "x", "query_text": "soup", "positive_document_ids": [3], "negative_document_ids": []}
    (tmp_path / "corpus.jsonl").write_text('{"_id": "3", "text": "hot soup"}\n')
    assert read(tmp_path, record, corpus=tmp_path / "corpus.jsonl") == [Record("soup", ["hot soup"], [], None)]
    # As effir mine writes them.
    record = {"query_id": "x", "query": "q", "positives": ["p"], "positive_ids": ["y"], "negatives": ["n"]}
    assert read(tmp_path, record | {"negative_ids": ["z"]}) == [Record("q", ["p"], ["n"], None)]


def test_a_beir_folder_gives_its_judged_queries_and_what_is_judged_above_0(collection):
    texts = {doc_id: f"{title} {text}".strip() for doc_id, (title, text) in DOCUMENTS.items()}
    records = dict(read_records(collection, split="test"))
    assert list(records.values()) == [
        Record(TOPICS["1"], [texts["009"], texts["001"]], [], None),
        Record(TOPICS["2"], [texts["008"]], [], None),
        Record(TOPICS["007"], [texts["007"], texts["006"]], [], None),
    ]
    assert list(records)[0] == f'{collection / "qrels" / "test.tsv"}, query "1"'


def test_records_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"query": "a", "pos": ["b"]}\n' * 2 + "broken\n")
    records = read_records(path)
    assert [next(records)[1].query, next(records)[1].query] == ["a", "a"]
    with pytest.raises(ValueError, match=r"train\.jsonl:3: not JSON"):
        next(records)


# What is wrong with a record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"positive": "p"}, "no query, one of query, query_text, anchor, query_id (found: positive)"),
        ({"query": None, "positive": "p"}, "query_id (found: query, positive)"),
        ({"query": " ", "positive": "p"}, "the query is empty"),
        ({"query": ["q"], "positive": "p"}, "the query is not a string but list"),
        ({"query": "\ud800", "positive": "p"}, "lone surrogate"),
        (
            {"query": "q", "neg": ["n"]},
            "no positives, one of positives, positive, positive_passages, pos, positive_ids, positive_document_ids "
            "(found: query, neg)",
        ),
        ({"query": "q", "pos": []}, "no positives, the list is empty"),
        ({"query": "q", "pos": ["p", ""]}, "positive 2 is empty"),
        ({"query": "q", "pos": ["p"], "neg": ["n", {"text": " ", "title": ""}]}, "negative 2 is empty"),
        ({"query": "q", "pos": ["\udfff"]}, "lone surrogate"),
        ({"query": "q", "pos": [7]}, "positive 1 is not a text but int"),
        ({"query": "q", "pos": [{"title": "t"}]}, 'no "text" that is a string, with or without a "title" (found: t'),
        ({"query": "q", "pos": [{"title": 5, "text": "t"}]}, 'positive 1 has no "text" that is a string'),
        ({"query": "q", "pos": ["p"], "neg": ["n"], "scores": [1]}, "1 scores, 2 are needed for 1 positives and 1 neg"),
        ({"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1]}, "0 negative_scores, 1 are needed"),
        ({"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": [1]}, "0 positive_scores, 1 are needed"),
        ({"query": "q", "pos": ["p"], "label": 1.0}, "scores is not a list of numbers but float"),
        ({"query": "q", "pos": ["p"], "scores": ["1"]}, "scores holds '1', which is not a finite number"),
        ({"query": "q", "pos": ["p"], "scores": [True]}, "scores holds 'True', which is not a finite number"),
        ({"query": "q", "pos": ["p"], "scores": [float("nan")]}, "scores holds 'nan', which is not a finite number"),
        ({"query": "q", "pos": ["p"], "scores": [float("inf")]}, "scores holds 'inf', which is not a finite number"),
        ({"query": "q", "pos": ["p"], "scores": [10**400]}, "which is not a finite number"),
        ({"query": "q", "pos": ["p"], "scores": [1], "pos_scores": [1]}, "scores and positive_scores say the same"),
        ({"query": "q", "anchor": "q", "pos": ["p"]}, '"query" and "anchor" are two names of one field'),
        ({"query": "q", "pos": ["p"], "text": "t", "url": "u"}, "unknown fields: text, url; docs/formats.md lists"),
        ({"query_id": "1", "pos": ["p"]}, "names a query by id; say with --topics where its text is"),
        ({"query": "q", "positive_ids": ["1"]}, "names a document by id; say with --corpus where its text is"),
        ({"query": "q", "positive_ids": [1.5]}, "positive_ids holds no id but float"),
        ({"query_id": [], "positive": "p"}, "query_id holds no id but list"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_with_its_line(tmp_path, record, message):
    with pytest.raises(ValueError, match=re.escape("train.jsonl:2: ") + ".*" + re.escape(message)):
        read(tmp_path, {"query": "q", "pos": ["p"]}, record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query_id": "99", "positive_ids": ["001"]}, r'train\.jsonl:1: no query "99" in .*queries\.jsonl'),
        ({"query_id": "1", "positive_ids": ["099"]}, r'train\.jsonl:1: no document "099" in .*corpus\.jsonl'),
        ({"query_id": "1", "positive_ids": ["001"], "negative_ids": [9]}, r'no document "9" in .*corpus\.jsonl'),
        ({"query_id": "1", "positive_ids": ["010"]}, r"train\.jsonl:1: positive 1 is empty"),
    ],
)
def test_an_unknown_id_is_named_with_its_line(tmp_path, collection, record, message):
    places = {"corpus": collection / "corpus.jsonl", "topics": collection / "queries.jsonl"}
    with pytest.raises(ValueError, match=message):
        read(tmp_path, record, **places)


def test_a_source_without_a_record_is_an_error(tmp_path, collection):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no training record in it"):
        next(read_records(tmp_path / "empty.jsonl"))
    with pytest.raises(FileNotFoundError):
        next(read_records(tmp_path / "missing.jsonl"))


def test_what_qrels_name_and_their_folder_lacks_is_left_out_and_told_once(tmp_path, collection, caplog):
    folder = shutil.copytree(collection, tmp_path / "folder")
    with open(folder / "qrels" / "test.tsv", "a") as file:
        file.write("1\tgone\t1\n7\t001\t1\n2\tlost\t0\n")
    expected = [record for _, record in read_records(collection, split="test")]
    assert prepare_examples(folder, tmp_path / "prepared.jsonl", split="test") == sum(
        len(record.positives) for record in expected
    )
    topics, documents = (record.getMessage() for record in caplog.records)
    assert topics == (
        f"{folder / 'queries.jsonl'}: 1 of 4 topics that {folder / 'qrels' / 'test.tsv'} names are not in it "
        "and are left out: 7"
    )
    assert f"{folder}: 1 of 6 documents that " in documents and documents.endswith(": gone")
    assert [record for _, record in read_records(folder, split="test")] == expected
    write_jsonl(folder / "queries.jsonl", [{"_id": "other", "text": "soup"}])
    with pytest.raises(ValueError, match=r'queries\.jsonl: has no topic of .*test\.tsv, such as "007"'):
        next(read_records(folder, split="test"))


def test_empty_topics_of_a_beir_folder_are_left_out_and_counted(tmp_path, collection, caplog):
    folder = shutil.copytree(collection, tmp_path / "collection")
    write_jsonl(folder / "queries.jsonl", [{"_id": i, "text": text if i != "1" else " "} for i, text in TOPICS.items()])
    records = dict(read_records(folder, split="test"))
    assert [record.query for record in records.values()] == [TOPICS["2"], TOPICS["007"]]
    assert "queries.jsonl: 1 of 3 judged topics are empty and left out" in caplog.text


def test_a_folder_must_be_a_beir_folder_with_a_positive(tmp_path, collection):
    with pytest.raises(FileNotFoundError, match=r"no qrels/train\.tsv, which a BEIR folder has \(splits found: test\)"):
        next(read_records(collection))
    with pytest.raises(ValueError, match="a folder with texts of its own; --corpus and --topics go with a file"):
        next(read_records(collection, split="test", topics=collection / "queries.jsonl"))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("q\td\t0\n")
    with pytest.raises(FileNotFoundError, match=r"no queries\.jsonl, which a BEIR folder has"):
        next(read_records(tmp_path))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "soup"}\n')
    with pytest.raises(ValueError, match="no training record in it"):
        next(read_records(tmp_path))
    (tmp_path / "qrels" / "train.tsv").write_text("q\td\t1\n")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "other", "text": "soup"}\n')
    with pytest.raises(ValueError, match=r'has no document of .*qrels/train\.tsv, such as "d": do they belong'):
        next(read_records(tmp_path))


# Keys


def test_a_key_is_the_first_8_bytes_of_the_sha256_as_a_signed_number():
    digest = hashlib.sha256("Käse".encode()).hexdigest()
    unsigned = int(digest[:16], 16)
    assert document_key("Käse") == (unsigned - 2**64 if unsigned >= 2**63 else unsigned)
    assert np.array([document_key(str(i)) for i in range(100)], dtype=np.int64).min() < 0


# Preparing


def test_each_query_and_positive_is_a_line_with_the_first_negatives(tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [FORMATS["ours with scores"][0], FORMATS["ours"][0]])
    assert prepare_examples(source, tmp_path / "examples.jsonl", max_negatives=1) == 4
    examples = Examples(tmp_path / "examples.jsonl")
    known = [document_key("tomato soup"), document_key("soup with onion")]
    # Of the scores 3, 2.5, -1, 0 those of one positive and of the first negative.
    assert [examples[number] for number in range(len(examples))] == [
        Example("hot soup", "tomato soup", ["sweet tea"], [3.0, -1.0], known),
        Example("hot soup", "soup with onion", ["sweet tea"], [2.5, -1.0], known),
        Example("hot soup", "tomato soup", ["sweet tea"], None, known),
        Example("hot soup", "soup with onion", ["sweet tea"], None, known),
    ]
    assert "scores" not in json.loads((tmp_path / "examples.jsonl").read_text().splitlines()[2])


def test_known_are_the_positives_of_the_query_text_anywhere_in_the_source(tmp_path):
    records = [
        {"query": "a", "positive": "one", "negative": "two"},
        {"query": "b", "positive": "three"},
        {"query": "a", "positives": ["two", "one"]},
    ]
    source = write_jsonl(tmp_path / "train.jsonl", records)
    prepare_examples(source, tmp_path / "examples.jsonl")
    known = [set(example.known) for example in Examples(tmp_path / "examples.jsonl")]
    of_a, of_b = {document_key("one"), document_key("two")}, {document_key("three")}
    assert known == [of_a, of_b, of_a, of_a]


def test_preparing_twice_is_preparing_once(tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [line for line, _ in FORMATS.values()])
    prepare_examples(source, tmp_path / "once.jsonl")
    prepare_examples(tmp_path / "once.jsonl", tmp_path / "twice.jsonl")
    assert (tmp_path / "once.jsonl").read_bytes() == (tmp_path / "twice.jsonl").read_bytes()


def test_no_negatives_can_be_asked_for_but_not_less(tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [FORMATS["ours with scores"][0]])
    prepare_examples(source, tmp_path / "examples.jsonl", max_negatives=0)
    assert Examples(tmp_path / "examples.jsonl")[0][2:4] == ([], [3.0])
    with pytest.raises(ValueError, match="max_negatives -1 must be at least 0"):
        prepare_examples(source, tmp_path / "examples.jsonl", max_negatives=-1)


def test_a_bad_record_leaves_no_file(tmp_path):
    source = write_jsonl(tmp_path / "train.jsonl", [FORMATS["ours"][0], {"query": "q", "pos": []}])
    with pytest.raises(ValueError, match=r"train\.jsonl:2"):
        prepare_examples(source, tmp_path / "examples.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


# The data set


@pytest.fixture
def examples(tmp_path):
    records = [{"query": f"frage {i} ä", "positive": f"p{i}", "negatives": [f"n{i}"] * (i % 4)} for i in range(50)]
    source = write_jsonl(tmp_path / "train.jsonl", records)
    prepare_examples(source, tmp_path / "examples.jsonl")
    return Examples(tmp_path / "examples.jsonl")


def test_examples_are_read_in_any_order(examples):
    order = np.random.default_rng(0).permutation(len(examples))
    assert [examples[number].query for number in order] == [f"frage {number} ä" for number in order]


@pytest.mark.parametrize("number", [-1, 50])
def test_an_index_outside_is_an_error(examples, number):
    with pytest.raises(IndexError, match=f"no line {number}, there are 50, counted from 0"):
        examples[number]


def test_examples_can_be_pickled(examples):
    assert pickle.loads(pickle.dumps(examples))[7] == examples[7]


@pytest.mark.processes
def test_examples_are_read_by_several_forked_processes(examples):
    # Forked in a process of its own: in this one, signal handlers and threads would be inherited.
    forking = (
        "import multiprocessing, sys\n"
        "from effir_search.text.examples import Examples\n"
        "examples, numbers = Examples(sys.argv[1]), list(range(50)) * 20\n"
        "one = [examples[number] for number in numbers]\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    assert pool.map(examples.__getitem__, numbers, chunksize=7) == one\n"
    )
    subprocess.run([sys.executable, "-c", forking, str(examples.lines.path)], check=True, timeout=120)


def test_a_file_that_is_not_prepared_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no examples in it"):
        Examples(tmp_path / "empty.jsonl")
    source = write_jsonl(tmp_path / "train.jsonl", [{"query": "q", "pos": ["p"]}])
    with pytest.raises(ValueError, match=r"train\.jsonl:1: no 'positive' field, so these are no prepared examples"):
        Examples(source)[0]


# Scores


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_every_candidate_gets_the_score_of_its_own_pair(tmp_path, examples, batch_size):
    def score(pairs):
        return [float(len(query) * 1000 + int(text[1:])) for query, text in pairs]

    output = tmp_path / "scored.jsonl"
    assert with_scores(examples.lines.path, output, score, batch_size=batch_size) == 50
    for before, after in zip(examples, Examples(output), strict=True):
        texts = [before.positive, *before.negatives]
        assert after == before._replace(scores=[len(before.query) * 1000 + int(text[1:]) for text in texts])


def test_scores_that_are_there_are_replaced_in_the_same_file(examples):
    with_scores(examples.lines.path, examples.lines.path, lambda pairs: [1.0] * len(pairs))
    with_scores(examples.lines.path, examples.lines.path, lambda pairs: [2.0] * len(pairs))
    assert Examples(examples.lines.path)[3].scores == [2.0] * 4


@pytest.mark.parametrize("torn", [b"", b'{"query": "q'])
def test_scoring_that_was_stopped_goes_on_after_the_batches_it_had_done(tmp_path, examples, torn):
    seen = []

    def score(pairs):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(pairs)
        return [float(len(seen))] * len(pairs)

    output, whole = tmp_path / "scored.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(KeyboardInterrupt):
        with_scores(examples.lines.path, output, score, batch_size=8)
    assert not output.exists()
    with open(tmp_path / "scored.jsonl.part", "ab") as part:
        part.write(torn)
    again = []
    with_scores(examples.lines.path, output, lambda pairs: again.append(pairs) or [9.0] * len(pairs), batch_size=8)
    with_scores(examples.lines.path, whole, lambda pairs: seen.append(pairs) or [0.0] * len(pairs), batch_size=8)
    assert seen[:3] + again == seen[3:]
    assert [example.scores[0] for example in Examples(output)] == [1.0] * 8 + [2.0] * 8 + [3.0] * 8 + [9.0] * 26
    assert sorted(path.name for path in tmp_path.glob("*scored*")) == ["scored.jsonl"]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda pairs: [1.0], r"the teacher gave 1 scores for \d+ pairs"),
        (lambda pairs: [float("nan")] * len(pairs), "the teacher gave the score nan, which is not finite"),
    ],
)  # fmt: skip
def test_scores_that_are_too_few_or_not_finite_are_an_error(tmp_path, examples, score, message):
    with pytest.raises(ValueError, match=message):
        with_scores(examples.lines.path, tmp_path / "scored.jsonl", score)
    assert not (tmp_path / "scored.jsonl").exists()


# Fields that no training reads


def test_unknown_fields_that_are_null_and_harmless_ones_are_not_read(tmp_path):
    record = {"query": "q", "positives": ["p"], "query_image": None, "whatever": None, "source": "s", "id": 7}
    assert read(tmp_path, record) == [Record("q", ["p"], [], None)]


def test_a_field_that_is_not_null_is_an_error_that_fits_a_line(tmp_path):
    record = {"query": "q", "positives": ["p"], "query_image": "a.png"} | {f"field_{n}" * 5: 1 for n in range(50)}
    with pytest.raises(ValueError, match="unknown fields: query_image, .* and 48 more; ") as raised:
        read(tmp_path, record)
    assert "; docs/formats.md lists what is known: query, positives," in describe_error(raised.value)


def test_a_json_array_of_records_is_read_and_other_formats_are_named(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"query": "a", "pos": ["b"]}, {"query": "c", "pos": ["d"]}], indent=1))
    assert [record.query for _, record in read_records(path)] == ["a", "c"]
    for line, name in (("query,positive", "CSV"), ("query\tpositive", "TSV"), ("<xml>", "XML")):
        path.write_text(f"{line}\n")
        with pytest.raises(ValueError, match=rf"train\.json:1: not JSON, .*it looks like {name}"):
            next(read_records(path))


def test_a_passage_with_a_null_text_has_its_title(tmp_path):
    assert read(tmp_path, {"query": "q", "pos": [{"title": "t", "text": None}]}) == [Record("q", ["t"], [], None)]
