import gzip
import hashlib

import pytest
from conftest import DOCUMENTS, TOPICS, write_jsonl

from effir_search.pruning.calibration import read_texts, sample_texts


@pytest.fixture
def numbered(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"text {number}\n" for number in range(1000)))
    return str(path)


def test_a_corpus_a_folder_topics_and_plain_text_are_all_texts(tmp_path, collection):
    corpus = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
    assert list(read_texts(str(collection / "corpus.jsonl"))) == list(read_texts(str(collection))) == corpus
    assert list(read_texts(str(collection / "queries.jsonl"))) == list(TOPICS.values())
    (tmp_path / "t.tsv").write_text("1\thot soup\n2\tsweet tea\n")
    (tmp_path / "topics.trec").write_text("<top>\n<num> Number: 7\n<title> hot soup\n</top>\n")
    with gzip.open(tmp_path / "plain.txt.gz", "wt") as file:
        file.write("\n  one line \n\nanother\n")
    assert list(read_texts(str(tmp_path / "t.tsv"))) == ["hot soup", "sweet tea"]
    assert list(read_texts(str(tmp_path / "topics.trec"))) == ["hot soup"]
    assert list(read_texts(str(tmp_path / "plain.txt.gz"))) == ["  one line ", "another"]


def test_the_same_seed_takes_the_same_texts_in_file_order_and_another_seed_others(numbered):
    sample, again, other = (sample_texts([numbered], size=50, seed=seed) for seed in (3, 3, 4))
    assert sample == again and sample.texts != other.texts
    numbers = [int(text.split()[1]) for text in sample.texts]
    assert len(set(numbers)) == 50 and numbers == sorted(numbers)


def test_every_text_is_as_likely_as_any_other(numbered):
    # Of 1,000 texts 100 are taken, 200 times: each about 20 times; the two halves of the file 10,000 times each, with a
    # standard deviation of about sqrt(20000 * 0.5 * 0.5 * 0.9) = 67.
    samples = [sample_texts([numbered], size=100, seed=seed).texts for seed in range(200)]
    late = sum(int(text.split()[1]) >= 500 for sample in samples for text in sample)
    assert abs(late - 10_000) < 5 * 67


def test_several_sources_have_the_same_share(tmp_path, numbered):
    other = tmp_path / "other.txt"
    other.write_text("".join(f"other {number}\n" for number in range(30)))
    sample = sample_texts([numbered, str(other)], size=21)
    assert [text.split()[0] for text in sample.texts] == ["text"] * 10 + ["other"] * 11
    assert sample.sources == ["texts.txt", "other.txt"]


def test_of_few_texts_all_are_taken_but_empty_ones(collection):
    sample = sample_texts([str(collection / "corpus.jsonl")])
    assert len(sample.texts) == 11  # document 010 is empty
    assert sample.record(128) == {
        "texts": 11,
        "sources": ["corpus.jsonl"],
        "seed": 0,
        "sha256": hashlib.sha256("".join(f"{text}\n" for text in sample.texts).encode()).hexdigest(),
        "max_length": 128,
    }


def test_a_source_without_text_is_an_error(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"blank.txt: no text in it"):
        sample_texts([str(tmp_path / "blank.txt")])
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"_id": "1", "text": ""}])
    with pytest.raises(ValueError, match=r"empty.jsonl: no text in it"):
        sample_texts([str(empty)])


def test_fewer_texts_than_sources_are_an_error_since_a_source_would_be_ignored(numbered, collection):
    assert len(sample_texts([numbered, str(collection)], size=2).texts) == 2
    with pytest.raises(ValueError, match="1 texts cannot be taken from 2 sources; give --num-texts 2"):
        sample_texts([numbered, str(collection)], size=1)


def test_bad_lines_and_missing_files_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"_id": "1", "text": "a"}\n{"_id": "2"}\n')
    with pytest.raises(ValueError, match=r'bad.jsonl:2: no "text"'):
        sample_texts([str(tmp_path / "bad.jsonl")])
    (tmp_path / "latin.txt").write_bytes(b"good\nb\xe9d\n")
    with pytest.raises(ValueError, match=r"latin.txt:2: invalid UTF-8"):
        sample_texts([str(tmp_path / "latin.txt")])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sample_texts([str(tmp_path / "nowhere.txt")])
