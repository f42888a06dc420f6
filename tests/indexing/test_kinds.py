import shutil
import sys

import faiss
import numpy as np
import pytest
from conftest import peak_memory, write_jsonl

from effir_search.encoding.encoder import Encoder
from effir_search.indexing.build import Source, build_index, index_corpus, rebuild_index
from effir_search.indexing.faiss_kinds import (
    memory,
    new_index,
    sample_rows,
    set_search_parameters,
    train,
    training_size,
    well_trained_size,
)
from effir_search.indexing.index_record import read_index, read_index_info
from effir_search.indexing.verify import describe_verified, recalls, verify_index
from effir_search.searching.search_topics import search
from effir_search.searching.searcher import load_encoder
from effir_search.settings import EncoderOptions, IndexSettings
from effir_search.text.corpus import Document
from effir_search.text.trec import Query

KINDS = [
    "Flat",
    "SQ8",
    "SQfp16",
    "HNSW16",
    "HNSW16,SQ8",
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,PQ8x4",
    "PQ8x4",
    "OPQ8,PQ8x4",
]


@pytest.fixture(autouse=True)
def one_thread():
    """FAISS trains PQ in many small steps, whose threads wait for each other without end on a busy machine."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 32))
    rows = centres[rng.integers(0, 40, 4000)] + 0.3 * rng.normal(size=(4000, 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_by_inner_product(vectors, kind):
    # Unequal lengths: by L2 distance a long vector would lose to a short one that points elsewhere.
    rows = vectors * np.random.default_rng(1).uniform(0.5, 2, size=(len(vectors), 1)).astype(np.float32)
    index = new_index(kind, 32)
    if not index.is_trained:
        train(index, kind, rows)
    index.add(rows)
    set_search_parameters(index)
    queries = vectors[:50]
    exact = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    scores, found = index.search(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])
    assert recall > (0.3 if "PQ" in kind else 0.8)
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize(
    "kind", ["", "flat", "IVF", "OPQ64", "IVF16", "Flat,Flat", "HNSW32,", "IVF16,HNSW32", "LSH", "PQ"]
)
def test_an_unknown_kind_is_an_error_that_shows_known_ones(kind):
    with pytest.raises(ValueError, match="--kind .* is unknown; known are .*IVF4096,PQ64"):
        new_index(kind, 384)


def test_a_kind_that_does_not_fit_the_dimension_is_an_error():
    with pytest.raises(ValueError, match="--kind PQ7: FAISS cannot make it for 32 dimensions"):
        new_index("PQ7", 32)


def test_too_few_vectors_to_train_on_are_an_error(vectors):
    with pytest.raises(ValueError, match="IVF5000,Flat: needs at least 5,000 vectors to train on, there are 4,000"):
        train(new_index("IVF5000,Flat", 32), "IVF5000,Flat", vectors)
    with pytest.raises(ValueError, match="needs at least 256 vectors"):
        train(new_index("PQ16", 32), "PQ16", vectors[:255])


# 39 vectors for each of 16 lists, of 256 centroids of a code of 8 bits or of the rotation, of 16 of a code of 4.
@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("IVF16,Flat", 624), ("PQ8", 9984), ("IVF16,PQ8", 9984), ("OPQ8,PQ8x4", 9984), ("PQ8x4", 624), ("SQ8", 0)],
)
def test_a_kind_is_well_trained_on_what_faiss_asks_for(kind, wanted):
    assert well_trained_size(kind) == wanted


@pytest.mark.parametrize(
    "kind", ["IVF16,SQ8", "PQ4x4", "IVF16,PQ4x4", "OPQ4,IVF16,PQ4x4", "OPQ4_8,PQ4x4", "HNSW8,PQ4x4"]
)
def test_faiss_says_nothing_and_training_is_to_the_bit_what_it_is_without_us(vectors, kind, capfd):
    plain, ours = new_index(kind, 32), new_index(kind, 32)
    plain.train(vectors[:300])
    assert "WARNING clustering 300 points" in "".join(capfd.readouterr())
    train(ours, kind, vectors[:300])
    assert "".join(capfd.readouterr()) == ""
    np.testing.assert_array_equal(faiss.serialize_index(ours), faiss.serialize_index(plain))


@pytest.mark.parametrize(
    ("num_documents", "train_size", "advice"),
    [(700, 300, "raise --train-size"), (300, None, "a smaller kind, such as SQ8, needs fewer")],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_poor_training_is_warned_of_once_with_advice(
    tmp_path, bert_folder, caplog, known, num_documents, train_size, advice
):
    documents = [Document(str(number), f"tea {'cat ' * (number % 17)}") for number in range(num_documents)]
    source = Source(num_documents=num_documents if known else None)
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    build_index(documents, encoder, tmp_path / "index", IndexSettings("IVF16,PQ8x4", train_size), source=source)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning == (
        f"IVF16,PQ8x4 is trained on 300 vectors where FAISS asks for 624, so it may miss more hits: {advice}"
    )


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("Flat", 4 * 384),
        ("SQ8", 384),
        ("SQfp16", 2 * 384),
        ("PQ64", 64),
        ("PQ64x4", 32),
    ],
)
def test_memory_of_a_row_is_its_code(kind, row):
    assert memory(kind, 384, 1000, 0) == 1000 * row
    assert new_index(kind, 384).sa_code_size() == row


def test_memory_counts_lists_links_and_the_sample():
    # 10 lists of 4 dimensions in float32, 8 bytes an id, 16 bytes a row, half as much of room, and a sample of 5 rows.
    assert memory("IVF10,Flat", 4, 100, 5) == 10 * 4 * 4 + 100 * (8 + 16) * 3 // 2 + 5 * 16
    # 2 * 32 links of 4 bytes on level 0, 8 bytes of bookkeeping.
    assert memory("HNSW32", 4, 100, 0) == 100 * (16 + 256 + 8)


def test_memory_of_an_hnsw_is_close_to_its_size_on_disk(vectors):
    index = new_index("HNSW32", 32)
    index.add(vectors)
    assert len(faiss.serialize_index(index)) == pytest.approx(memory("HNSW32", 32, len(vectors), 0), rel=0.1)


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "rows"), [("Flat", 2**15 + 1), ("SQfp16", 2**15 + 1), ("HNSW8", 2**13 + 1)])
def test_an_index_takes_its_memory_once(kind, rows):
    # One row more than a power of two, where what grows by doubling would take twice as much, and copy it.
    building = (
        "import sys; import numpy as np; from effir_search.indexing.faiss_kinds import new_index, reserve\n"
        "kind, rows = sys.argv[1], int(sys.argv[2])\n"
        "index, block = new_index(kind, 512), np.random.default_rng(0).random((1025, 512), dtype=np.float32)\n"
        "if kind == 'HNSW8': index.hnsw.efConstruction = 1\n"
        "reserve(index, rows)\n"
        "for start in range(0, rows, 1024): index.add(block[:min(1024, rows - start)])\n"
        "assert index.ntotal == rows\n"
    )
    small, large = (peak_memory([sys.executable, "-c", building, kind, str(number)]) for number in (1025, rows))
    assert large - small < 1.15 * memory(kind, 512, rows, 0) + 5e6


def test_kinds_without_training_take_no_sample():
    assert [training_size(kind, 10**6) for kind in ("Flat", "SQfp16", "HNSW32")] == [0, 0, 0]
    assert training_size("IVF4096,PQ64", 10**7) == 64 * 4096
    assert training_size("PQ64", 10**7) == 65536
    assert training_size("PQ64", 100) == 100


def test_a_sample_is_rows_of_the_stream_in_order_and_the_same_each_time(vectors):
    def blocks():
        return (vectors[start : start + 700] for start in range(0, 4000, 700))

    sample = sample_rows(blocks(), 4000, 300)
    positions = [int(np.flatnonzero((vectors == row).all(axis=1))[0]) for row in sample]
    assert len(positions) == 300 and positions == sorted(set(positions))
    np.testing.assert_array_equal(sample, sample_rows(blocks(), 4000, 300))
    np.testing.assert_array_equal(sample_rows(blocks(), 4000, 4000), vectors)


def test_search_parameters_are_for_their_kinds(vectors):
    flat, ivf, hnsw = new_index("Flat", 32), new_index("OPQ16,IVF32,PQ16", 32), new_index("HNSW16", 32)
    set_search_parameters(ivf, nprobe=7)
    assert faiss.extract_index_ivf(ivf).nprobe == 7
    set_search_parameters(ivf)
    assert faiss.extract_index_ivf(ivf).nprobe == 2  # a sixteenth of 32
    set_search_parameters(hnsw, ef_search=77)
    assert hnsw.hnsw.efSearch == 77
    set_search_parameters(hnsw, hits=1000)
    assert hnsw.hnsw.efSearch == 128  # it is empty
    hnsw.add(vectors)
    for hits, wanted in ((0, 128), (1000, 1000), (10**6, len(vectors))):
        set_search_parameters(hnsw, hits=hits)
        assert hnsw.hnsw.efSearch == wanted
    with pytest.raises(ValueError, match="--nprobe is for IVF"):
        set_search_parameters(flat, nprobe=4)
    with pytest.raises(ValueError, match="--ef-search is for HNSW"):
        set_search_parameters(ivf, ef_search=4)


@pytest.fixture(scope="module")
def flat_index(tmp_path_factory, bert_folder):
    folder = tmp_path_factory.mktemp("kinds")
    words = ["cat", "dog", "soup", "tea", "red", "green", "hot", "sweet", "fish", "milk"]
    rng = np.random.default_rng(0)
    records = [{"_id": str(n), "text": " ".join(rng.choice(words, size=rng.integers(1, 12)))} for n in range(3000)]
    write_jsonl(folder / "corpus.jsonl", records)
    index_corpus(str(folder / "corpus.jsonl"), str(bert_folder), folder / "flat", options=EncoderOptions(dtype="fp32"))
    return folder / "flat"


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "SQfp16", "IVF16,Flat", "IVF16,PQ8x4", "HNSW16"])
def test_a_kind_built_again_from_kept_embeddings_is_the_same_to_the_bit(tmp_path, flat_index, bert_folder, kind):
    corpus = str(flat_index.parent / "corpus.jsonl")
    at_once = index_corpus(
        corpus,
        str(bert_folder),
        tmp_path / "at-once",
        IndexSettings(kind=kind, keep_embeddings=True),
        EncoderOptions(dtype="fp32"),
    )
    rebuilt = rebuild_index(tmp_path / "at-once", tmp_path / "rebuilt", IndexSettings(kind=kind))
    assert rebuilt.kind == at_once.kind == kind
    assert rebuilt.docid_sha256 == at_once.docid_sha256
    if "HNSW" not in kind:  # its links depend on which thread comes first
        assert rebuilt.index_sha256 == at_once.index_sha256


@pytest.mark.parametrize("kind", ["SQ8", "HNSW16", "IVF16,PQ8x4"])
def test_another_kind_comes_from_a_flat_index_without_encoding(tmp_path, flat_index, bert_folder, kind):
    rebuild_index(flat_index, tmp_path / "new", IndexSettings(kind=kind))
    if "HNSW" not in kind:  # in which equal vectors are one row
        assert (tmp_path / "new" / "docid").read_bytes() == (flat_index / "docid").read_bytes()
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    assert len(list(search(tmp_path / "new", encoder, [Query("q", "hot soup")], k=10))) == 10


@pytest.mark.parametrize("name", ["index", "docid"])
def test_a_damaged_index_is_no_source(tmp_path, flat_index, name):
    damaged = shutil.copytree(flat_index, tmp_path / "flat")
    content = bytearray((damaged / name).read_bytes())
    content[-2] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: its SHA-256 is not the one in effir.json"):
        rebuild_index(damaged, tmp_path / "sq", IndexSettings(kind="SQ8"))
    assert not (tmp_path / "sq").exists()


def test_embeddings_of_another_job_are_no_source(tmp_path, bert_folder):
    documents = [Document(f"x{number}", f"sweet tea {number}") for number in range(300)]
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    build_index(documents, encoder, tmp_path / "sq", IndexSettings(kind="SQ8", keep_embeddings=True))
    rebuild_index(tmp_path / "sq", tmp_path / "again", IndexSettings(kind="Flat"))
    other = Encoder.from_pretrained(bert_folder, dtype="fp32", pooling="cls")
    build_index(documents[:200], other, tmp_path / "other", IndexSettings(kind="SQ8", keep_embeddings=True))
    shutil.rmtree(tmp_path / "sq.parts")
    (tmp_path / "other.parts").rename(tmp_path / "sq.parts")
    with pytest.raises(ValueError, match="sq.parts: its embeddings are not those that"):
        rebuild_index(tmp_path / "sq", tmp_path / "third", IndexSettings(kind="Flat"))


@pytest.mark.parametrize("kind", ["SQ8", "HNSW8", "IVF4,Flat", "PQ4x4", "OPQ4,IVF4,PQ4x4"])
def test_verify_finds_every_kind_right(tmp_path, bert_folder, kind):
    records = [
        {"_id": f"x{number}", "text": f"tea {'cat ' * (number % 7)} {'soup ' * (number % 11)}"} for number in range(300)
    ]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", records)
    index_corpus(
        str(corpus),
        str(bert_folder),
        tmp_path / "index",
        IndexSettings(kind=kind),
        EncoderOptions(dtype="fp32"),
    )
    encoder = load_encoder(tmp_path / "index")
    checked = verify_index(tmp_path / "index", encoder)
    assert checked.num_sampled == 64
    # 77 texts differ, and an HNSW of so few finds all; one list of four is searched.
    if kind == "HNSW8":
        assert (checked.recall.at_10, checked.recall.at_100) == (1, 1)
        assert checked.recall.reference == "the vectors in it"
    elif "IVF" in kind:
        assert 0 < checked.recall.at_100 < 1
    else:
        assert checked.recall is None
        assert "recall is not measured: " + kind in describe_verified(checked, tmp_path)


@pytest.mark.parametrize(("kind", "at_least", "at_most"), [("SQ8", 0.9, 1), ("PQ4x4", 0.05, 0.9)])
def test_verify_measures_codes_against_the_embeddings_that_were_kept(tmp_path, bert_folder, kind, at_least, at_most):
    rng, words = np.random.default_rng(0), ["cat", "dog", "soup", "tea", "red", "green", "hot", "sweet", "fish", "milk"]
    records = [{"_id": f"x{number}", "text": " ".join(rng.choice(words, size=8))} for number in range(600)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", records)
    index_dir = tmp_path / "index"
    index_corpus(
        str(corpus),
        str(bert_folder),
        index_dir,
        IndexSettings(kind=kind, keep_embeddings=True),
        EncoderOptions(dtype="fp32"),
    )
    encoder = load_encoder(index_dir)
    checked = verify_index(index_dir, encoder)
    assert at_least <= checked.recall.at_10 <= at_most
    line = describe_verified(checked, index_dir)
    assert f"over the embeddings that were kept, recall@10 is {checked.recall.at_10:.3f}" in line
    # By hand: the queries are the documents' first eight words, which are all of these, and 64 of 600 are taken.
    assert checked.recall.num_queries == 64


def test_recall_is_the_share_of_the_best_documents_among_the_first_hits():
    # Scores of 101 documents are 0, 1, ..., 100; the best ten are 91 to 100. Two of these are found, and one other.
    rows = [(np.arange(101, dtype=np.float32)[:, None], [f"d{number}" for number in range(101)])]
    at_10, at_100 = recalls([["d100", "d91", "d90"]], np.ones((1, 1), dtype=np.float32), rows)
    assert (at_10, at_100) == (pytest.approx(2 / 10), pytest.approx(3 / 100))
    # Of tied documents it does not matter which is found.
    tied = [(np.ones((20, 1), dtype=np.float32), [f"d{number}" for number in range(20)])]
    assert recalls([[f"d{number}" for number in range(10, 20)]], np.ones((1, 1), dtype=np.float32), tied) == [1, 0.5]


def test_an_index_that_is_not_exact_and_has_no_embeddings_is_no_source(tmp_path, flat_index):
    rebuild_index(flat_index, tmp_path / "sq", IndexSettings(kind="SQ8"))
    with pytest.raises(ValueError, match="SQ8 holds no exact vectors"):
        rebuild_index(tmp_path / "sq", tmp_path / "other", IndexSettings(kind="Flat"))


def test_the_memory_it_takes_is_said_first(tmp_path, flat_index, caplog):
    caplog.set_level("INFO")
    rebuild_index(flat_index, tmp_path / "new", IndexSettings(kind="SQ8"))
    # 3,000 rows of 32 bytes, and a sample of 3,000 rows of 128 bytes: 0.48 MB.
    assert (
        "a SQ8 index of 3,000 vectors, trained on 3,000 of them, takes about 0.5 MB of memory while it is built"
        in caplog.text
    )


def test_from_takes_an_index_with_a_record(tmp_path, flat_index):
    for name in ("index", "docid"):
        shutil.copy(flat_index / name, tmp_path / name)
    with pytest.raises(ValueError, match="--from takes an index that effir built"):
        rebuild_index(tmp_path, tmp_path / "new", IndexSettings(kind="SQ8"))


def test_an_unknown_kind_is_refused_before_anything_is_encoded(tmp_path, bert_folder):
    def documents():
        pytest.fail("a document was read")
        yield

    with pytest.raises(ValueError, match="is unknown"):
        build_index(
            documents(), Encoder.from_pretrained(bert_folder), tmp_path / "index", IndexSettings(kind="nonsense")
        )
    assert list(tmp_path.iterdir()) == []


def test_the_record_names_the_kind_and_its_sample(tmp_path, flat_index):
    rebuild_index(flat_index, tmp_path / "new", IndexSettings(kind="IVF16,Flat", train_size=2000))
    info = read_index_info(tmp_path / "new")
    assert (info.kind, info.train_size, info.num_documents) == ("IVF16,Flat", 2000, 3000)
    assert read_index(tmp_path / "new")[0].ntotal == 3000


def test_a_search_looks_at_as_many_lists_as_it_is_told(tmp_path, flat_index, bert_folder):
    rebuild_index(flat_index, tmp_path / "ivf", IndexSettings(kind="IVF16,Flat"))
    encoder, query = Encoder.from_pretrained(bert_folder, dtype="fp32"), [Query("q", "hot soup")]
    exact = [hit.doc_id for hit in search(flat_index, encoder, query, k=50)]
    assert [hit.doc_id for hit in search(tmp_path / "ivf", encoder, query, k=50, nprobe=16)] == exact
    assert len(list(search(tmp_path / "ivf", encoder, query, k=3000, nprobe=1))) < 3000
    with pytest.raises(ValueError, match=f"^{flat_index}: --nprobe is for IVF indexes; this one is IndexFlat"):
        search([tmp_path / "ivf", flat_index], encoder, query, nprobe=4)


def test_too_small_an_effort_for_the_hits_is_warned_of(tmp_path, flat_index, bert_folder, caplog):
    rebuild_index(flat_index, tmp_path / "ivf", IndexSettings(kind="IVF16,Flat"))
    rebuild_index(flat_index, tmp_path / "hnsw", IndexSettings(kind="HNSW16"))
    encoder, queries = Encoder.from_pretrained(bert_folder, dtype="fp32"), [Query("1", "hot soup"), Query("2", "cat")]
    list(search(tmp_path / "ivf", encoder, queries, k=10))
    list(search(tmp_path / "hnsw", encoder, queries, k=500, ef_search=500))
    assert caplog.messages == []
    list(search(tmp_path / "ivf", encoder, queries, k=3000))
    (message,) = caplog.messages
    advice = "the 1 of 16 lists that are searched hold no more; raise --nprobe"
    assert message == f"{tmp_path / 'ivf'}: 2 of 2 queries have fewer than 3000 hits: {advice}"
    caplog.clear()
    list(search(tmp_path / "hnsw", encoder, queries, k=500, remove_query=True, ef_search=500))
    assert "--ef-search 500 is below the 501 hits asked for" in caplog.text


def test_an_hnsw_finds_a_thousand_hits_as_exact_search_does(tmp_path, flat_index, bert_folder):
    rebuild_index(flat_index, tmp_path / "hnsw", IndexSettings(kind="HNSW16"))
    encoder, queries = Encoder.from_pretrained(bert_folder, dtype="fp32"), [Query("1", "hot soup"), Query("2", "cat")]
    exact, found = (
        {(hit.query_id, hit.doc_id) for hit in search(index_dir, encoder, queries, k=1000)}
        for index_dir in (flat_index, tmp_path / "hnsw")
    )
    assert len(found) == 2000 and len(exact & found) >= 0.98 * len(exact)
