import pytest

from effir_search.demo.demo import demo_model, refuse_foreign, write_collection
from effir_search.encoding.encoder import Encoder
from effir_search.text.corpus import Document, read_corpus
from effir_search.text.trec import read_qrels, read_topics


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match="not the demo's; choose another --output"):
        refuse_foreign(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_the_demos_own_folder_is_taken_again(tmp_path):
    refuse_foreign(tmp_path / "demo")
    (tmp_path / "demo" / "corpus.jsonl").write_text("the demo's")
    refuse_foreign(tmp_path / "demo")


def test_the_collection_is_a_beir_folder(tmp_path):
    documents = [Document("str.split", "Return a list.", "str.split"), Document("len", "", "len")]
    write_collection(documents, tmp_path)
    assert list(read_corpus(tmp_path)) == documents
    judged = {qrel.query_id for qrel in read_qrels(tmp_path / "qrels" / "test.tsv")}
    assert judged == {query.query_id for query in read_topics(tmp_path / "queries.jsonl")}


def test_the_demos_model_is_all_minilm_l6_v2():
    encoder = Encoder.from_pretrained(demo_model())
    assert (encoder.dimension, encoder.config.pooling, encoder.config.normalize) == (384, "mean", True)
