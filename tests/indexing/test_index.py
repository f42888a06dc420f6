import json
import os
import resource
import shutil
from functools import partial

import faiss
import numpy as np
import pytest
from conftest import DOCUMENTS, save_model, save_sentence_files, write_jsonl
from processes import run_command

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import Encoder
from effir_search.files.reading import file_sha256
from effir_search.indexing.build import Source, build_index, index_corpus
from effir_search.indexing.index_record import read_index, read_index_info
from effir_search.indexing.resume import PART_SIZE
from effir_search.indexing.verify import cosine, verify_index
from effir_search.searching.search_topics import search_text
from effir_search.settings import EncoderOptions, IndexSettings
from effir_search.text.corpus import Document, read_corpus, scan_corpus


@pytest.fixture
def index_copy(tmp_path, toy_index):
    shutil.copytree(toy_index, tmp_path / "index")
    return tmp_path / "index"


def test_folder_is_pyserinis_layout_with_a_record_beside_it(toy_index):
    assert sorted(path.name for path in toy_index.iterdir()) == ["docid", "effir.json", "index"]
    assert (toy_index / "docid").read_text() == "".join(f"{doc_id}\n" for doc_id in DOCUMENTS)
    index = faiss.read_index(str(toy_index / "index"))
    assert isinstance(index, faiss.IndexFlatIP) and index.ntotal == 12 and index.d == 32


def test_rows_are_the_documents_vectors_in_corpus_order(toy_index, collection, encoder):
    index = faiss.read_index(str(toy_index / "index"))
    vectors = encoder.encode_documents(list(read_corpus(collection / "corpus.jsonl")))
    np.testing.assert_allclose(index.reconstruct_n(0, 12), vectors, atol=1e-6)


def test_the_record_says_what_the_index_was_built_from(toy_index, collection, bert_folder, encoder):
    info = read_index_info(toy_index)
    assert info.model == str(bert_folder)
    assert info.model_sha256 == file_sha256(bert_folder / "model.safetensors")
    assert info.encoder == encoder.config
    assert (info.dtype, info.dimension, info.kind) == ("float32", 32, "Flat")
    assert (info.num_documents, info.num_empty, info.num_truncated, info.num_skipped) == (12, 1, 0, 0)
    assert info.corpus == str(collection / "corpus.jsonl")
    assert info.corpus_sha256 == scan_corpus(collection / "corpus.jsonl").sha256
    assert info.index_sha256 == file_sha256(toy_index / "index")
    assert info.docid_sha256 == file_sha256(toy_index / "docid")
    assert {"python", "torch", "transformers", "faiss-cpu", "effir_search"} <= info.versions.keys()


def test_documents_of_several_parts_keep_their_order(tmp_path, encoder):
    documents = [Document(str(number), "cat " * (number % 7)) for number in range(2 * PART_SIZE + 5)]
    assert build_index(iter(documents), encoder, tmp_path / "index") == len(documents)
    index, doc_ids = read_index(tmp_path / "index")
    assert doc_ids == [document.doc_id for document in documents]
    for row in (0, PART_SIZE - 1, PART_SIZE, 2 * PART_SIZE + 4):
        expected = encoder.encode_documents([documents[row]])[0]
        np.testing.assert_allclose(index.reconstruct(row), expected, atol=1e-5)


def test_cosine_similarity_without_a_normalize_module_is_scaled_in_the_index(tmp_path):
    folder = save_sentence_files(save_model(tmp_path / "m", "bert"), normalize=False, similarity="cosine")
    encoder = Encoder.from_pretrained(folder)
    build_index([Document("1", "cat"), Document("2", "hot soup")], encoder, tmp_path / "index")
    index, _ = read_index(tmp_path / "index")
    vectors = encoder.encode_documents(["cat", "hot soup"])
    assert np.linalg.norm(vectors, axis=1).min() > 1.5
    np.testing.assert_allclose(index.reconstruct_n(0, 2), vectors / np.linalg.norm(vectors, axis=1)[:, None], atol=1e-6)


def test_dot_similarity_is_left_as_it_is(tmp_path):
    folder = save_sentence_files(save_model(tmp_path / "m", "bert"), normalize=False, similarity="dot")
    encoder = Encoder.from_pretrained(folder)
    build_index([Document("1", "cat")], encoder, tmp_path / "index")
    np.testing.assert_array_equal(
        read_index(tmp_path / "index")[0].reconstruct(0), encoder.encode_documents(["cat"])[0]
    )


def test_scaling_leaves_a_zero_vector_zero(tmp_path):
    folder = save_sentence_files(save_model(tmp_path / "m", "bert"), normalize=False, similarity="cosine")
    config = Encoder.from_pretrained(folder).config
    np.testing.assert_array_equal(scale(np.array([[0.0, 0.0], [3.0, 4.0]]), config), [[0, 0], [0.6, 0.8]])


def test_a_failure_half_way_leaves_the_finished_parts_and_no_index(tmp_path, encoder):
    def documents():
        yield from (Document(str(number), "cat") for number in range(PART_SIZE + 1))
        raise ValueError("the corpus ends here")

    with pytest.raises(ValueError, match="ends here"):
        build_index(documents(), encoder, tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["index.parts"]


def test_a_failure_in_the_first_part_leaves_nothing(tmp_path, encoder):
    def documents():
        yield Document("1", "cat")
        raise ValueError("the corpus ends here")

    with pytest.raises(ValueError, match="ends here"):
        build_index(documents(), encoder, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_id_is_an_error(tmp_path, encoder):
    with pytest.raises(ValueError, match='repeated document id "1"'):
        build_index([Document("1", "cat"), Document("1", "dog")], encoder, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_no_documents_are_an_error(tmp_path, encoder):
    with pytest.raises(ValueError, match="no documents"):
        build_index([], encoder, tmp_path / "index")


def test_an_existing_folder_is_replaced_only_on_request(index_copy, encoder):
    before = (index_copy / "index").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        build_index([Document("1", "cat")], encoder, index_copy)
    assert (index_copy / "index").read_bytes() == before
    build_index([Document("1", "cat")], encoder, index_copy, IndexSettings(overwrite=True))
    assert (index_copy / "docid").read_text() == "1\n"
    assert [path.name for path in index_copy.parent.iterdir()] == ["index"]


def test_bad_lines_are_counted_in_the_record(tmp_path, bert_folder, caplog):
    write_jsonl(
        tmp_path / "c.jsonl", [{"_id": "1", "text": "cat"}, {"_id": "1", "text": "dog"}, {"_id": "2", "text": ""}]
    )
    info = index_corpus(str(tmp_path / "c.jsonl"), str(bert_folder), tmp_path / "index", IndexSettings(skip_bad=True))
    assert (info.num_documents, info.num_skipped, info.num_empty) == (2, 1, 1)
    assert "c.jsonl:2: repeated id" in caplog.text
    assert verify_index(tmp_path / "index", Encoder.from_pretrained(bert_folder)).num_documents == 2


@pytest.mark.processes
# 2,000 vectors of 32 float32 are 256,000 bytes, and 131,072 of them are the first part's.
@pytest.mark.parametrize(("room", "named"), [(100_000, "out/index.parts/part-00000.npy"), (200_000, "out/index")])
def test_a_full_disk_is_one_line_that_names_the_file_and_no_index(tmp_path, bert_folder, room, named):
    write_jsonl(tmp_path / "c.jsonl", [{"_id": str(number), "text": "cat"} for number in range(2000)])
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    places = ["--corpus", "c.jsonl", "--encoder", bert_folder, "--output", "out/index"]
    done = run_command("index", *places, cwd=tmp_path, prepare=limit)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith(f"Error: {named}: ") and "cannot be written" in last and len(last) <= 300
    # What is encoded already stays for the next try; a first part that did not fit leaves nothing.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ([] if room == 100_000 else ["index.parts"])


def test_verify_finds_a_right_index_right(toy_index, encoder):
    checked = verify_index(toy_index, encoder)
    assert (checked.num_documents, checked.num_sampled) == (12, 12)
    assert checked.lowest_cosine > 0.99999


def test_verify_accepts_documents_with_equal_vectors(tmp_path, encoder):
    write_jsonl(tmp_path / "c.jsonl", [{"_id": str(number), "text": "the same cat"} for number in range(5)])
    build_index(
        read_corpus(tmp_path / "c.jsonl"), encoder, tmp_path / "index", source=Source(corpus=tmp_path / "c.jsonl")
    )
    assert verify_index(tmp_path / "index", encoder).num_sampled == 5


@pytest.mark.parametrize("name", ["index", "docid"])
def test_verify_names_a_file_with_a_flipped_byte(index_copy, encoder, name):
    content = bytearray((index_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (index_copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: its SHA-256"):
        verify_index(index_copy, encoder)


def test_verify_notices_vectors_of_another_model(tmp_path, collection, index_copy, encoder):
    # A record that fits the files, but vectors that do not fit the texts.
    index = faiss.read_index(str(index_copy / "index"))
    shuffled = faiss.IndexFlatIP(index.d)
    shuffled.add(np.ascontiguousarray(index.reconstruct_n(0, index.ntotal)[::-1]))
    faiss.write_index(shuffled, str(index_copy / "index"))
    record = json.loads((index_copy / "effir.json").read_text())
    record["index_sha256"] = file_sha256(index_copy / "index")
    (index_copy / "effir.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="below 0.999"):
        verify_index(index_copy, encoder)


def test_verify_notices_another_corpus(tmp_path, toy_index, encoder):
    changed = [{"_id": i, "title": t, "text": x + "x" * (i == "005")} for i, (t, x) in DOCUMENTS.items()]
    write_jsonl(tmp_path / "text.jsonl", changed)
    with pytest.raises(ValueError, match="counts and hashes are right, .*SHA-256 differs.*; give .* --corpus"):
        verify_index(toy_index, encoder, corpus=tmp_path / "text.jsonl")
    write_jsonl(tmp_path / "order.jsonl", [{"_id": i, "text": ""} for i in sorted(DOCUMENTS, reverse=True)])
    with pytest.raises(ValueError, match='document 1, "012"'):
        verify_index(toy_index, encoder, corpus=tmp_path / "order.jsonl")


def test_verify_needs_a_record_and_a_corpus(tmp_path, index_copy, encoder):
    build_index([Document("1", "cat")], encoder, tmp_path / "from-program")
    with pytest.raises(ValueError, match="give --corpus"):
        verify_index(tmp_path / "from-program", encoder)
    (index_copy / "effir.json").unlink()
    with pytest.raises(ValueError, match="nothing to verify"):
        verify_index(index_copy, encoder)


def test_cosine_of_rows():
    # (3, 4) to (4, 3): 24 / 25; a vector to its multiple: 1; two zero vectors are the same: 1; zero to another: 0.
    a = np.array([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    b = np.array([[4.0, 3.0], [5.0, 5.0], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosine(a, b), [0.96, 1, 1, 0])


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def foreign(path):
    path.write_text("this is not an index\n" * 50)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, foreign, empty])
def test_a_damaged_index_is_an_error_that_names_the_file(index_copy, damage):
    damage(index_copy / "index")
    with pytest.raises(ValueError, match="index/index: not a FAISS index, or a cut one"):
        read_index(index_copy)


def test_another_number_of_ids_than_vectors_is_an_error(index_copy):
    (index_copy / "docid").write_text("1\n2\n")
    with pytest.raises(ValueError, match="12 vectors and 2 document ids"):
        read_index(index_copy)


def test_an_index_of_distances_is_an_error(index_copy):
    index = faiss.IndexFlatL2(32)
    index.add(np.zeros((12, 32), dtype=np.float32))
    faiss.write_index(index, str(index_copy / "index"))
    with pytest.raises(ValueError, match="metric is not the inner product"):
        read_index(index_copy)


def test_a_folder_that_is_no_index_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a FAISS index folder"):
        read_index(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"encoder": {"pooling": "mean", "colour": "red"}}'])
def test_a_damaged_record_is_an_error_that_names_it(index_copy, content):
    (index_copy / "effir.json").write_text(content)
    with pytest.raises(ValueError, match="effir.json"):
        read_index_info(index_copy)


def test_folders_follow_the_umask(tmp_path, encoder):
    old = os.umask(0o027)
    try:
        build_index([Document("1", "cat")], encoder, tmp_path / "index")
    finally:
        os.umask(old)
    assert (tmp_path / "index").stat().st_mode & 0o777 == 0o750


def test_the_field_of_the_id_is_recorded_and_read_again_and_old_records_without_it_open(tmp_path, bert_folder, encoder):
    corpus = tmp_path / "docs.jsonl"
    records = [{"pid": "p1", "docid": "d1", "passage": "hot soup"}, {"pid": "p2", "docid": "d2", "passage": "tea"}]
    write_jsonl(corpus, records)
    settings = IndexSettings(fields=("passage",), id_field="docid")
    on_cpu = EncoderOptions(dtype="fp32", device="cpu")
    info = index_corpus(str(corpus), str(bert_folder), tmp_path / "index", settings, on_cpu)
    assert (tmp_path / "index" / "docid").read_text() == "d1\nd2\n"
    assert (info.corpus_fields, info.corpus_id_field) == (["passage"], "docid")
    assert verify_index(tmp_path / "index", encoder).num_sampled == 2
    hits = search_text(
        "soup", index_dir=tmp_path / "index", corpora=[str(corpus)], options=EncoderOptions(device="cpu")
    )
    assert {document.doc_id for _, document in hits} == {"d1", "d2"}
    record = json.loads((tmp_path / "index" / "effir.json").read_text())
    del record["corpus_id_field"]
    (tmp_path / "index" / "effir.json").write_text(json.dumps(record))
    assert read_index_info(tmp_path / "index").corpus_id_field is None
