"""Topics, qrels and runs in every format, and the order of tied scores, with trec_eval's own code as the reference."""

import gzip
import random
import re

import ir_datasets
import ir_measures
import numpy as np
import pytest
import pytrec_eval
from ir_measures import RR, Qrel, ScoredDoc

from effir_search.text.trec import Query, read_qrels, read_run, read_topics, strictly_decreasing, write_run


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def irds(tmp_path):
    """An ir_datasets data set of one topic, two documents and two judgments, under a name of this test's own."""
    write(tmp_path / "docs.tsv", "d1\tThe cat.", "d2\tThe dog.")
    write(tmp_path / "queries.tsv", "007\twhat eats the cat?")
    write(tmp_path / "qrels", "007 0 d1 2", "007 0 d2 0")
    paths = {"docs_tsv": "docs.tsv", "queries_tsv": "queries.tsv", "qrels_trec": "qrels"}
    dataset = ir_datasets.create_dataset(**{kind: str(tmp_path / name) for kind, name in paths.items()})
    ir_datasets.registry.register(f"effir-search-test{tmp_path}", dataset)
    return f"irds:effir-search-test{tmp_path}"


# Topics


def test_beir_topics_are_read_in_file_order(tmp_path):
    path = write(
        tmp_path / "queries.jsonl",
        '{"_id": "007", "text": "what eats the cat?", "metadata": {}}',
        "",
        '{"_id": "1", "text": "été à Köln"}',
    )
    assert read_topics(path) == [Query("007", "what eats the cat?"), Query("1", "été à Köln")]


@pytest.mark.parametrize("name", ["_id", "id", "docid", "query_id", "qid"])
def test_a_query_id_may_stand_under_five_names(tmp_path, name):
    path = write(tmp_path / "queries.jsonl", f'{{"{name}": "1", "query": "cat"}}')
    assert read_topics(path) == [Query("1", "cat")]


def test_tsv_topics_are_id_and_text(tmp_path):
    path = write(tmp_path / "queries.tsv", "007\twhat eats the cat?", "1\thot\tsoup")
    assert read_topics(path) == [Query("007", "what eats the cat?"), Query("1", "hot\tsoup")]


def test_a_header_of_tsv_topics_is_no_topic(tmp_path):
    path = write(tmp_path / "queries.tsv", "query_id\ttext", "1\thot soup", "id\ttext")
    assert read_topics(path) == [Query("1", "hot soup"), Query("id", "text")]


def test_the_format_of_topics_is_told_by_their_content(tmp_path):
    jsonl = write(tmp_path / "queries.txt", '{"_id": "1", "text": "cat"}')
    trec = write(tmp_path / "topics.jsonl", "<top><num> 1 <title> cat </top>")
    assert read_topics(jsonl) == read_topics(trec) == [Query("1", "cat")]


def test_topics_may_be_gzipped_and_a_path_may_be_a_string(tmp_path):
    (tmp_path / "queries.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "1", "text": "cat"}\n'))
    assert read_topics(str(tmp_path / "queries.jsonl.gz")) == [Query("1", "cat")]


def test_ir_datasets_topics_are_read_by_their_name(irds):
    assert read_topics(irds) == [Query("007", "what eats the cat?")]


@pytest.mark.parametrize("read", [read_topics, read_qrels])
def test_an_ir_datasets_name_that_nobody_knows_is_an_error(read):
    with pytest.raises(ValueError, match="irds:no/such/set: ir_datasets knows no data set of this name"):
        read("irds:no/such/set")


@pytest.mark.parametrize(("read", "kind"), [(read_topics, "queries"), (read_qrels, "qrels")])
def test_an_ir_datasets_set_without_topics_or_qrels_is_an_error(tmp_path, read, kind):
    write(tmp_path / "docs.tsv", "d1\tThe cat.")
    name = f"effir-search-test{tmp_path}"
    ir_datasets.registry.register(name, ir_datasets.create_dataset(docs_tsv=str(tmp_path / "docs.tsv")))
    with pytest.raises(ValueError, match=f"no {kind} in this data set; names like irds:"):
        read(f"irds:{name}")


WITHOUT_CLOSING_TAGS = """\
<top>
<num> Number: 301
<title> International Organized Crime

<desc> Description:
Identify organizations that participate
in international criminal activity.

<narr> Narrative:
A relevant document must name the organization.
</top>

<top>
<num> Number: 302
<title>
Poliomyelitis and
Post-Polio

<desc> Description: Is polio under control?
<narr> Narrative:
Only the world's polio counts.
</top>
"""
WITH_CLOSING_TAGS = """\
<top>
<num>301</num>
<title>International Organized Crime</title>
<desc>Identify organizations that participate in international criminal activity.</desc>
<narr>A relevant document must name the organization.</narr>
</top>
<top>
<num> 302 </num>
<title>
Poliomyelitis and Post-Polio
</title>
<desc>
Is polio under control?
</desc>
<narr>
Only the world's polio counts.
</narr>
</top>
"""
TREC_FIELDS = {
    "title": ["International Organized Crime", "Poliomyelitis and Post-Polio"],
    "description": [
        "Identify organizations that participate in international criminal activity.",
        "Is polio under control?",
    ],
    "narrative": ["A relevant document must name the organization.", "Only the world's polio counts."],
}


@pytest.mark.parametrize("field", TREC_FIELDS)
@pytest.mark.parametrize("content", [WITHOUT_CLOSING_TAGS, WITH_CLOSING_TAGS], ids=["open", "closed"])
def test_trec_topics_are_read_with_and_without_closing_tags(tmp_path, content, field):
    (tmp_path / "topics.txt").write_text(content)
    first, second = TREC_FIELDS[field]
    assert read_topics(tmp_path / "topics.txt", field=field) == [Query("301", first), Query("302", second)]


def test_a_trec_topic_may_start_with_the_word_topic(tmp_path):
    path = write(tmp_path / "topics.txt", "<top>", "<num> Number: 051", "<title> Topic: Airbus Subsidies", "</top>")
    assert read_topics(path) == [Query("051", "Airbus Subsidies")]


def test_all_trec_topics_of_one_line_are_read(tmp_path):
    path = write(tmp_path / "topics.txt", "<top><num> 1 <title> cat </top><top><num> 2 <title> dog </top>")
    assert read_topics(path) == [Query("1", "cat"), Query("2", "dog")]


TOPIC_ERRORS = {
    "no JSON": (['{"_id": "1", "text": "a"}', '{"_id": "2"'], 2, "not JSON"),
    "no id": (['{"text": "a"}'], 1, "no id field"),
    "no text": (['{"_id": "1", "subject": "a"}'], 1, r'no "text" field that is a string \(found: _id, subject\)'),
    "text a number": (['{"_id": "1", "text": 7}'], 1, 'no "text" field that is a string'),
    "repeated id": (["1\ta", "", "1\tb"], 3, 'repeated topic id "1"'),
    "empty id": (["1\ta", "\tb"], 2, "empty id"),
    "id with white space": (["1 2\ta"], 1, "'1 2' holds white space"),
    "no tab": (["1\ta", "2 b"], 2, "neither JSON, nor a TREC <top>, nor id and text with a tab between"),
    "lone surrogate in the text": (['{"_id": "1", "text": "\\ud800"}'], 1, "lone surrogate"),
    "lone surrogate in the id": (['{"_id": "\\ud800", "text": "a"}'], 1, "lone surrogate"),
    "TREC without num": (["<top>", "<title> a", "</top>"], 1, "topic without <num>"),
    "TREC without title": (["<top>", "<num> 1", "</top>"], 1, "topic without <title>"),
    "TREC not closed": (["<top>", "<num> 1", "<title> a"], 1, "<top> without </top>"),
    "TREC opened twice": (["<top>", "<num> 1", "<title> a", "<top>"], 4, "a second <top> before the </top> of the one"),
    "TREC text outside": (["<top><num> 1 <title> a </top>", "b"], 2, "text outside <top> ... </top>"),
    "XML not closed": (["<topics>", "<topic>"], 2, "<topic> without </topic>"),
    "XML without id": (["<topics><topic>", "a</topic></topics>"], 1, "topic without <num>, <number> or another id"),
    "XML with two titles": (
        ['<topic number="1"><title>a</title><title>b</title></topic>'],
        1,
        "a topic with 2 times <title>; leave one",
    ),
    "XML with parts but no title": (
        ["", '<topic number="1"><summary>a</summary></topic>'],
        2,
        r"topic without <title>, its title \(found: <summary>\)",
    ),
    "entities of its own": (['<!DOCTYPE t [<!ENTITY a "b">]>', "<topics>"], 1, "the DOCTYPE declares names of its own"),
    "CSV without header": (['1,"a"'], 1, "neither JSON, nor a TREC <top>, nor id and text with a tab between"),
}


@pytest.mark.parametrize(("lines", "line_number", "complaint"), TOPIC_ERRORS.values(), ids=TOPIC_ERRORS)
def test_a_bad_topic_is_an_error_with_file_and_line(tmp_path, lines, line_number, complaint):
    path = write(tmp_path / "topics", *lines)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:{line_number}: .*{complaint}"):
        read_topics(path)


def test_a_trec_topic_without_the_field_that_is_asked_for_is_an_error(tmp_path):
    path = write(tmp_path / "topics", "<top><num> 1 <title> a </top>")
    with pytest.raises(ValueError, match="topics:1: topic without <desc>"):
        read_topics(path, field="description")


def test_topics_that_are_not_utf_8_are_an_error_with_file_and_line(tmp_path):
    (tmp_path / "topics").write_bytes(b"1\ta\n2\tb\xff\n")
    with pytest.raises(ValueError, match="topics:2: invalid UTF-8 at byte 3 of the line"):
        read_topics(tmp_path / "topics")


@pytest.mark.parametrize(
    ("read", "complaint"),
    [(read_topics, "no topics$"), (read_qrels, "no judgments$"), (read_run, "no hits; a TREC run has lines of")],
)
def test_an_empty_file_is_an_error(tmp_path, read, complaint):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match=f"empty: {complaint}"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("read", [read_topics, read_qrels, read_run])
def test_a_folder_in_place_of_a_file_is_an_error(tmp_path, read):
    with pytest.raises(IsADirectoryError, match="is a folder, a file is needed"):
        read(tmp_path)


# Qrels


def test_beir_qrels_are_read_with_their_header(tmp_path):
    path = write(tmp_path / "test.tsv", "query-id\tcorpus-id\tscore", "q1\td1\t2", "007\t001\t0")
    assert read_qrels(path) == [Qrel("q1", "d1", 2), Qrel("007", "001", 0)]


def test_beir_qrels_without_a_header_lose_no_line(tmp_path):
    path = write(tmp_path / "test.tsv", "q1\td1\t2", "007\t001\t0")
    assert read_qrels(path) == [Qrel("q1", "d1", 2), Qrel("007", "001", 0)]


def test_trec_qrels_are_read_as_ir_measures_reads_them(tmp_path):
    path = write(tmp_path / "qrels", "q1 0 d1 2", "007\t0\t001\t0", "q1  0  d2  -1")
    assert read_qrels(str(path)) == list(ir_measures.read_trec_qrels(str(path)))


def test_ir_datasets_qrels_are_read_by_their_name(irds):
    assert read_qrels(irds) == [Qrel("007", "d1", 2), Qrel("007", "d2", 0)]


def test_a_judgment_that_is_there_twice_counts_once(tmp_path):
    assert read_qrels(write(tmp_path / "qrels", "q1 0 d1 2", "q1 0 d1 2")) == [Qrel("q1", "d1", 2)]


QREL_ERRORS = {
    "two grades": (["q1 0 d1 2", "q2 0 d1 1", "q1 0 d1 1"], 3, 'a second, different grade .* "q1", document "d1"'),
    "a fraction": (["q1\td1\t0.5"], 1, "the grade '0.5' is not a whole number"),
    "a word": (["q1 0 d1 1", "q1 0 d2 high"], 2, "the grade 'high' is not a whole number"),
    "two columns": (["q1 d1"], 1, "2 columns; qrels have 3 .* or 4"),
    "a run": (["q1 Q0 d1 1 0.5 tag"], 1, "6 columns; qrels have 3 .* or 4"),
    "a second header": (["qid\tdocid\tgrade", "q1\td1\t1", "qid\tdocid\tgrade"], 3, "the grade 'grade' is not"),
}


@pytest.mark.parametrize(("lines", "line_number", "complaint"), QREL_ERRORS.values(), ids=QREL_ERRORS)
def test_a_bad_judgment_is_an_error_with_file_and_line(tmp_path, lines, line_number, complaint):
    path = write(tmp_path / "qrels", *lines)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:{line_number}: {complaint}"):
        read_qrels(path)


# Runs


def test_a_run_is_read_as_ir_measures_reads_it(tmp_path):
    path = write(tmp_path / "run", "q1 Q0 d1 1 1.5 tag", "007\tQ0\t001\t1\t-2e-3\ttag", "q1 Q0 d2 2 0 tag")
    assert read_run(path) == list(ir_measures.read_trec_run(str(path)))


RUN_ERRORS = {
    "five columns": (["q1 Q0 d1 1 1.5"], 1, "5 columns; a TREC run has 6"),
    "an id with a blank": (["q1 Q0 d1 1 1.5 tag", "q1 Q0 d 2 2 1.0 tag"], 2, "7 columns; a TREC run has 6"),
    "NaN": (["q1 Q0 d1 1 nan tag"], 1, "the score 'nan' is not a finite number"),
    "infinite": (["q1 Q0 d1 1 -inf tag"], 1, "the score '-inf' is not a finite number"),
    "too large": (["q1 Q0 d1 1 1e999 tag"], 1, "the score '1e999' is not a finite number"),
    "a word": (["q1 Q0 d1 1 high tag"], 1, "the score 'high' is not a finite number"),
    "twice": (["q1 Q0 d1 1 2 t", "q2 Q0 d1 1 2 t", "", "q1 Q0 d1 2 1 t"], 4, 'document "d1" is there twice .* "q1"'),
}


@pytest.mark.parametrize(("lines", "line_number", "complaint"), RUN_ERRORS.values(), ids=RUN_ERRORS)
def test_a_bad_hit_is_an_error_with_file_and_line(tmp_path, lines, line_number, complaint):
    path = write(tmp_path / "run", *lines)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:{line_number}: {complaint}"):
        read_run(path)


def test_a_written_run_has_six_columns_and_ranks_from_1_for_each_query(tmp_path):
    hits = [ScoredDoc("q1", "d2", 1.5), ScoredDoc("q1", "d1", 0.25), ScoredDoc("007", "001", -2.0)]
    assert write_run(hits, tmp_path / "run", tag="mine") == 3
    assert (tmp_path / "run").read_text() == "q1 Q0 d2 1 1.5 mine\nq1 Q0 d1 2 0.25 mine\n007 Q0 001 1 -2 mine\n"


def test_every_float32_score_comes_back_exactly(tmp_path):
    # All bit patterns are equally likely, so that tiny, huge and denormal numbers are among them.
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    extremes = [np.finfo(np.float32).max, np.finfo(np.float32).tiny, np.float32(2**-149), np.float32(0.1)]
    scores = [float(score) for score in [*bits, *extremes] if np.isfinite(score)]
    hits = [ScoredDoc("q", f"d{number}", score) for number, score in enumerate(scores)]
    write_run(hits, tmp_path / "run")
    read = np.array([hit.score for hit in read_run(tmp_path / "run")]).astype(np.float32)
    np.testing.assert_array_equal(read, np.array(scores).astype(np.float32))


@pytest.mark.parametrize("tag", ["", "two words", "line\nbreak"])
def test_a_tag_of_not_one_word_is_refused_before_anything_is_written(tmp_path, tag):
    with pytest.raises(ValueError, match="run tag .*: must be one word"):
        write_run([ScoredDoc("q1", "d1", 1.0)], tmp_path / "run", tag=tag)
    assert list(tmp_path.iterdir()) == []


def test_hits_that_end_in_an_error_leave_no_run(tmp_path):
    def hits():
        yield ScoredDoc("q1", "d1", 1.0)
        raise OSError("the index is gone")

    with pytest.raises(OSError, match="the index is gone"):
        write_run(hits(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Ties


def hits_of(scores, query_id="q"):
    return [ScoredDoc(query_id, doc_id, score) for doc_id, score in scores.items()]


def test_tied_documents_stand_in_descending_order_of_their_ids_with_scores_one_float32_apart():
    ranked = strictly_decreasing(hits_of({"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.5}))
    # From 1/4 to 1/2 float32 numbers are 2**-25 apart: 24 bits, of which the first is worth 2**-2.
    assert ranked == hits_of({"b": 1.0, "d": 0.5, "c": 0.5 - 2**-25, "a": 0.5 - 2**-24})


def test_a_score_that_a_tie_above_has_taken_is_lowered_too():
    ranked = strictly_decreasing(hits_of({"a": 0.5, "b": 0.5, "z": 0.5 - 2**-25}))
    assert ranked == hits_of({"b": 0.5, "a": 0.5 - 2**-25, "z": 0.5 - 2**-24})


def test_zeros_and_negative_scores_are_told_apart_below_them():
    ranked = strictly_decreasing(hits_of({"a": 0.0, "b": -0.0, "c": -1.0, "d": -1.0}))
    # Below zero comes the smallest float32, and from -1 to -2 they are 2**-23 apart.
    assert ranked == hits_of({"b": 0.0, "a": -(2**-149), "d": -1.0, "c": -1 - 2**-23})


def test_scores_that_are_equal_as_float32_are_tied():
    ranked = strictly_decreasing(hits_of({"a": 0.1 + 1e-12, "b": 0.1}))
    assert [hit.doc_id for hit in ranked] == ["b", "a"]
    assert ranked[1].score < ranked[0].score


def test_scores_without_ties_are_not_changed():
    scores = {f"d{number}": float(np.float32(number * 0.1)) for number in range(-20, 20)}
    ranked = strictly_decreasing(hits_of(scores))
    assert ranked == sorted(hits_of(scores), key=lambda hit: -hit.score)


def test_no_hits_stay_no_hits():
    assert strictly_decreasing([]) == []


def tied_scores(seed, num_docs=200):
    """200 documents with 12 different scores, zero and negative ones among them."""
    generator = random.Random(seed)
    return {f"d{number}": generator.randrange(-4, 8) / 7 for number in generator.sample(range(1000), num_docs)}


def test_the_order_of_the_input_does_not_matter():
    hits = hits_of(tied_scores(0))
    assert strictly_decreasing(hits[::-1]) == strictly_decreasing(hits)


def test_scores_decrease_strictly_as_float32_and_after_a_round_trip_through_a_file(tmp_path):
    ranked = strictly_decreasing(hits_of(tied_scores(1)))
    write_run(ranked, tmp_path / "run")
    for hits in (ranked, read_run(tmp_path / "run")):
        assert (np.diff(np.array([hit.score for hit in hits]).astype(np.float32)) < 0).all()


def test_doing_it_twice_changes_nothing():
    ranked = strictly_decreasing(hits_of(tied_scores(2)))
    assert strictly_decreasing(ranked) == ranked


TREC_EVAL_MEASURES = {"ndcg", "ndcg_cut", "map", "recip_rank", "P", "recall", "Rprec", "bpref", "success", "infAP"}


@pytest.fixture(scope="module")
def tied():
    """Runs full of ties and qrels, as the dicts that pytrec_eval takes."""
    run = {f"q{seed}": tied_scores(seed) for seed in range(10)}
    generator = random.Random(10)
    qrels = {
        query_id: {doc_id: generator.choice([0, 1, 2]) for doc_id in generator.sample(sorted(scores), 20)}
        for query_id, scores in run.items()
    }
    return run, qrels


def test_measures_are_those_of_trec_eval_on_the_tied_run(tied):
    run, qrels = tied
    ranked = {query_id: strictly_decreasing(hits_of(scores, query_id)) for query_id, scores in run.items()}
    decreasing = {query_id: {hit.doc_id: hit.score for hit in hits} for query_id, hits in ranked.items()}
    trec_eval = pytrec_eval.RelevanceEvaluator(qrels, TREC_EVAL_MEASURES)
    assert trec_eval.evaluate(decreasing) == trec_eval.evaluate(run)


def test_rr_at_10_of_ir_measures_is_trec_evals_reciprocal_rank_of_the_tied_run(tied):
    run, qrels = tied
    ranked = [hit for query_id, scores in run.items() for hit in strictly_decreasing(hits_of(scores, query_id))]
    found = {metric.query_id: metric.value for metric in ir_measures.iter_calc([RR @ 10], qrels, ranked)}
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)
    # A first relevant document below rank 10 counts 0 with the cut-off.
    assert found == {q: of["recip_rank"] if of["recip_rank"] >= 0.1 else 0.0 for q, of in expected.items()}
    assert any(found.values())


def test_the_columns_of_tsv_topics_are_those_their_header_names(tmp_path):
    path = write(tmp_path / "topics.tsv", "qid\tnarrative\ttext", "1\tlong\thot soup")
    assert read_topics(path) == [Query("1", "hot soup")]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -1e39])
def test_a_score_that_is_no_finite_float32_is_an_error(score):
    with pytest.raises(ValueError, match='query "q", document "d": the score .* is not a finite float32'):
        strictly_decreasing([ScoredDoc("q", "d", score)])


@pytest.mark.parametrize(("read", "line"), [(read_qrels, "q 0 d 1_0"), (read_run, "q Q0 d 1 1_0 tag")])
def test_an_underscore_is_in_no_number(tmp_path, read, line):
    with pytest.raises(ValueError, match="1_0"):
        read(write(tmp_path / "file", line))


# Other layouts of topics


@pytest.mark.parametrize("tag", ["dom", "smry", "con", "fac", "anything-else"])
def test_any_tag_ends_a_part_of_a_topic(tmp_path, tag):
    path = write(
        tmp_path / "topics",
        *("<top>", "<num> Number: 051", f"<{tag}> Other: x", "<title> Topic: a", f"<{tag}> x", "<desc> b", f"<{tag}>"),
        *("x", "</top>"),
    )
    assert read_topics(path) == [Query("051", "a")]
    assert read_topics(path, field="description") == [Query("051", "b")]


def test_html_in_a_part_and_what_only_looks_like_a_tag_does_not_end_it(tmp_path):
    path = write(tmp_path / "topics", "<top><num> 1 <title> a <b>bold</b> x < y, p<q and r>s, <1 mg <me@b.org> </top>")
    assert read_topics(path) == [Query("1", "a bold x < y, p<q and r>s, <1 mg <me@b.org>")]


def test_entities_of_a_topic_are_decoded_once_and_only_with_their_semicolon(tmp_path):
    text = "AT&amp;T &lt;b&gt; &#39;x&#x27; &amp;lt; R&D &copy=1 &unknown; <![CDATA[a <i> &amp; b]]><!-- not this -->"
    path = write(tmp_path / "topics", f"<topics><topic number='1'><title>{text}</title></topic></topics>")
    assert read_topics(path) == [Query("1", "AT&T <b> 'x' &lt; R&D &copy=1 &unknown; a <i> &amp; b")]


def test_an_entity_bomb_is_refused_and_nothing_external_is_read(tmp_path):
    bomb = '<!DOCTYPE t [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>\n<topics><topic number="1">&b;</topic></topics>'
    with pytest.raises(ValueError, match="topics:1: the DOCTYPE declares names of its own, which are not read"):
        read_topics(write(tmp_path / "topics", bomb))
    (tmp_path / "secret").write_text("secret")
    external = f'<!DOCTYPE t SYSTEM "file://{tmp_path}/secret">\n<topics><topic number="1">a &x;</topic></topics>'
    assert read_topics(write(tmp_path / "topics", external)) == [Query("1", "a &x;")]


def test_the_id_of_an_xml_topic_is_that_of_its_elements_before_its_attribute(tmp_path):
    path = write(tmp_path / "topics", '<topics><topic number="9"><number>1</number><query>a</query></topic></topics>')
    assert read_topics(path) == [Query("1", "a")]


def test_errors_of_xml_topics_count_lines_that_are_blank(tmp_path):
    path = write(tmp_path / "topics", "<topics>", "", '<topic number="1">a</topic>', "", "", "  b", "</topics>")
    with pytest.raises(ValueError, match="topics:6: text outside <topic> ... </topic>"):
        read_topics(path)
    path = write(tmp_path / "topics", "<topics>", "", '<topic number="1"/>', "</topics>")
    with pytest.raises(ValueError, match="topics:3: <topic> without </topic>"):
        read_topics(path)
    with pytest.raises(ValueError, match="topics: begins with <, and has no <top> or <topic>"):
        read_topics(write(tmp_path / "topics", "<topics>", "</topics>"))


def test_the_part_that_is_asked_for_is_not_replaced_by_another(tmp_path):
    jsonl = write(tmp_path / "a", '{"id": "1", "text": "t", "narrative": "n"}')
    tsv = write(tmp_path / "b", "qid\ttitle\tnarrative", "1\tt\tn")
    for path in (jsonl, tsv):
        assert read_topics(path) == [Query("1", "t")]
        assert read_topics(path, field="narrative") == [Query("1", "n")]
        with pytest.raises(ValueError, match="description"):
            read_topics(path, field="description")
    with pytest.raises(ValueError, match="b:1: no header names the columns, so none is the narrative"):
        read_topics(write(tmp_path / "b", "1\tt"), field="narrative")


def test_ir_datasets_topics_without_the_part_that_is_asked_for_are_an_error(irds):
    with pytest.raises(ValueError, match=r"topic 1: has no description \(found: query_id, text\)"):
        read_topics(irds, field="description")


def test_rows_of_topics_that_do_not_fit_their_header_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="topics:2: 3 columns, expected 2"):
        read_topics(write(tmp_path / "topics", "qid\tquery", "1\ta\tb"))


def test_qrels_are_no_topics(tmp_path):
    with pytest.raises(ValueError, match="topics:1: these are qrels, which hold no texts"):
        read_topics(write(tmp_path / "topics", "query-id\tcorpus-id\tscore", "q1\td1\t1"))


# Other layouts of qrels and runs


def test_an_id_with_a_blank_between_tabs_is_an_error_in_qrels_and_runs(tmp_path):
    for line in ("1\ta b\t1", "1\t0\ta b\t1"):
        with pytest.raises(ValueError, match="qrels:1: the id 'a b' holds white space"):
            read_qrels(write(tmp_path / "qrels", line))
    with pytest.raises(ValueError, match="run:1: the id 'a b' holds white space"):
        read_run(write(tmp_path / "run", "1\tQ0\ta b\t1\t0.5\ttag"))
    # White space alone would make six columns of these five.
    with pytest.raises(ValueError, match="run:1: 5 columns; a TREC run has 6"):
        read_run(write(tmp_path / "run", "1\tQ0\ta b\t1\t0.5"))


def test_all_lines_of_qrels_have_as_many_columns_as_the_first(tmp_path):
    with pytest.raises(ValueError, match="qrels:2: 4 columns; the lines above have 3"):
        read_qrels(write(tmp_path / "qrels", "q1 d1 1", "q1 d 2 1"))


@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_an_empty_column_of_qrels_does_not_move_the_others(tmp_path, column):
    columns = ["7", "0", "8", "1"]
    columns[column] = ""
    path = write(tmp_path / "qrels", "\t".join(columns))
    if column == 1:  # which nobody reads
        assert read_qrels(path) == [Qrel("7", "8", 1)]
    else:
        with pytest.raises(ValueError, match="qrels:1: (empty id|the grade '' is not a whole number)"):
            read_qrels(path)


HEADERS = [
    "qid iter docno rel", "topic 0 docid relevance", "query_id,doc_id,relevance", "query-id\tcorpus-id\tscore",
    "Query_ID\tQ0\tDoc_ID\tLabel", "topic_id iteration document_id judgment", '"query_id","iteration","doc_id","rel"',
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_of_qrels_of_any_spelling_is_no_judgment(tmp_path, header):
    separator = "," if "," in header else "\t" if "\t" in header else " "
    row = ["q1", "d1", "2"] if header.count(separator) == 2 else ["q1", "0", "d1", "2"]
    assert read_qrels(write(tmp_path / "qrels", header, separator.join(row))) == [Qrel("q1", "d1", 2)]


def test_a_header_of_qrels_says_where_its_columns_are(tmp_path):
    path = write(tmp_path / "qrels", "relevance\tdocid\tqid\titeration", "2\td1\tq1\t0")
    assert read_qrels(path) == [Qrel("q1", "d1", 2)]
    with pytest.raises(ValueError, match="qrels:1: it is not clear what the columns what docid qid are"):
        read_qrels(write(tmp_path / "qrels", "what docid qid", "1 d1 q1"))


def test_grades_with_a_decimal_point_are_whole_numbers_or_errors(tmp_path):
    assert read_qrels(write(tmp_path / "qrels", "q 0 a 1.0", "q 0 b -1.", "q 0 c 2.000", "q 0 a 1")) == [
        Qrel("q", "a", 1),
        Qrel("q", "b", -1),
        Qrel("q", "c", 2),
    ]
    with pytest.raises(ValueError, match="qrels:1: the grade '0.5' is not a whole number"):
        read_qrels(write(tmp_path / "qrels", "q 0 a 0.5"))


@pytest.mark.parametrize("read", [read_qrels, read_run])
@pytest.mark.parametrize("line", ['{"q1": {"d1": 1}}', '[{"query_id": "q1"}]'])
def test_json_is_named_where_columns_are_needed(tmp_path, read, line):
    with pytest.raises(ValueError, match="file:1: it looks like JSON, not (qrels|a TREC run), which"):
        read(write(tmp_path / "file", line))


def test_quotes_of_csv_qrels_that_do_not_match_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="qrels:2: not CSV: "):
        read_qrels(write(tmp_path / "qrels", "q1,d1,1", '"q1"x,d1,1'))


def test_topics_without_a_text_are_read_as_they_are(tmp_path):
    jsonl = write(tmp_path / "topics.jsonl", '{"_id": "1", "text": " "}', '{"_id": "2", "text": "cat"}')
    assert read_topics(jsonl) == [Query("1", " "), Query("2", "cat")]
    trec = write(tmp_path / "topics", "<top>", "<num> 1", "<title>", "</top>")
    assert read_topics(trec) == [Query("1", "")]


@pytest.mark.parametrize(
    "header", ["QueryID\tQuery", "topic\tquery", "#qid\tquery", "id\tquery text", "number\tquestion"]
)
def test_a_header_of_topics_of_any_spelling_is_no_topic(tmp_path, header):
    assert read_topics(write(tmp_path / "topics", header, "1\tcat")) == [Query("1", "cat")]


def test_a_word_with_a_dot_between_angle_brackets_is_no_tag(tmp_path):
    path = write(tmp_path / "topics", "<top><num> 1 <title>use of <stdio.h> in C </top>")
    assert read_topics(path) == [Query("1", "use of <stdio.h> in C")]
