import gzip
import itertools
import json
import logging
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
from conftest import NUM_DOCUMENTS, list_in_manifest, peak_memory
from processes import Command, run_command

from effir_search.encoding.encoder import Encoder
from effir_search.indexing.build import Source, build_index, index_corpus, rebuild_index
from effir_search.indexing.copies import digests
from effir_search.indexing.encode import encode_corpus, in_parts
from effir_search.indexing.index_record import read_index, read_index_info, store_of
from effir_search.indexing.read_ahead import read_ahead
from effir_search.indexing.resume import PART_SIZE, processor_name, settings_of
from effir_search.indexing.shard import Shard
from effir_search.indexing.store import KEPT, Part, Store
from effir_search.searching.info import describe
from effir_search.searching.searcher import load_encoder
from effir_search.settings import EncoderOptions, IndexSettings, PlanSettings
from effir_search.text.corpus import Document, documents_sha256, read_corpus, scan_corpus


@pytest.fixture(scope="module")
def encoder(bert_folder):
    """Packed, as jobs encode; without that vectors differ by rounding."""
    return Encoder.from_pretrained(bert_folder, dtype="fp32").pack()


def arguments(corpus, model, index_dir, *options):
    places = ["--corpus", corpus, "--encoder", model, "--output", index_dir]
    return ["index", *map(str, places), "--threads", "1", "--dtype", "fp32", *options]


def run(*args, **options):
    return run_command(*arguments(*args), **options)


def files_of(index_dir):
    return {name: (index_dir / name).read_bytes() for name in ("index", "docid")}


def kill_after(num_parts, *args):
    """Start a job and kill -9 it once the manifest lists so many parts; it must have been at work."""
    job = Command(*arguments(*args))
    store = store_of(args[2])
    while not (store.settings() and len(store.parts()) >= num_parts):
        assert job.poll() is None, "the job ended before it could be killed"
        time.sleep(0.001)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL


@pytest.mark.processes
def test_a_killed_job_is_continued_and_its_index_is_the_undisturbed_one(tmp_path, corpus, bert_folder, whole):
    kill_after(4, corpus, bert_folder, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    reused = sum(part.num_documents for part in store_of(tmp_path / "index").parts().values())
    done = run(corpus, bert_folder, tmp_path / "index")
    assert done.returncode == 0, done.stderr
    assert f"continuing: {reused} documents are encoded already" in done.stderr
    assert files_of(tmp_path / "index") == files_of(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.processes
def test_a_job_told_to_end_leaves_its_parts_and_nothing_hidden(tmp_path, corpus, bert_folder, whole):
    job = Command(*arguments(corpus, bert_folder, tmp_path / "index"))
    store = store_of(tmp_path / "index")
    while not (store.settings() and store.parts()):
        assert job.poll() is None, "the job ended before it could be told to"
        time.sleep(0.001)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 143
    assert [path.name for path in tmp_path.iterdir()] == ["index.parts"]
    assert run(corpus, bert_folder, tmp_path / "index").returncode == 0
    assert files_of(tmp_path / "index") == files_of(whole)


@pytest.mark.processes
@pytest.mark.slow
def test_memory_grows_with_the_index_and_little_else(tmp_path, bert_folder):
    peaks, sizes = [], []
    for name, num_documents in (("small", 4 * PART_SIZE), ("large", 80 * PART_SIZE)):
        path = tmp_path / f"{name}.jsonl.gz"
        with gzip.open(path, "wt", compresslevel=1) as file:
            for number in range(num_documents):
                file.write(json.dumps({"_id": f"d{number}", "text": f"sweet tea {number} " * 50}) + "\n")
        line = [sys.executable, "-m", "effir_search", *arguments(path, bert_folder, tmp_path / name)]
        peaks.append(peak_memory([*line, "--max-length", "16"]))
        sizes.append(sum(len(content) for content in files_of(tmp_path / name).values()))
    growth, of_index = peaks[1] - peaks[0], sizes[1] - sizes[0]
    logging.info(f"peak memory grew by {growth / 1e6:.0f} MB, the index by {of_index / 1e6:.0f} MB")
    assert growth <= of_index + 100e6


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_jobs_killed_at_random_moments_are_continued_to_the_same_index(tmp_path, corpus, bert_folder, whole):
    rng = np.random.default_rng(20)
    start = time.monotonic()
    run(corpus, bert_folder, tmp_path / "timed")
    seconds = time.monotonic() - start
    num_killed = 0
    for number in range(20):
        index_dir = tmp_path / str(number)
        job = Command(*arguments(corpus, bert_folder, index_dir))
        time.sleep(rng.uniform(0, seconds))
        num_killed += job.poll() is None
        job.send_signal(signal.SIGKILL)
        job.wait()
        store = store_of(index_dir)
        if store.path.exists():
            reused = sum(part.num_documents for part in store.parts().values())
            done = run(corpus, bert_folder, index_dir)
            assert done.returncode == 0, done.stderr
            told = (f"continuing: {reused} documents", "the index is complete already")
            assert not reused or any(words in done.stderr for words in told)
        elif not index_dir.exists():  # it had not begun
            assert run(corpus, bert_folder, index_dir).returncode == 0
        assert not store.path.exists()
        assert files_of(index_dir) == files_of(whole)
    assert num_killed >= 10


@pytest.mark.processes
def test_two_shards_in_two_processes_equal_one(tmp_path, corpus, bert_folder, whole):
    options = ["--num-shards", "2", "--shard-id"]
    jobs = [Command(*arguments(corpus, bert_folder, tmp_path / "index", *options, str(number))) for number in (0, 1)]
    outputs = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert files_of(tmp_path / "index") == files_of(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.processes
def test_a_shard_alone_writes_no_index_and_the_last_one_does(tmp_path, corpus, bert_folder, whole):
    shards = [Shard(number, 3) for number in range(3)]
    infos = [
        index_corpus(
            str(corpus),
            str(bert_folder),
            tmp_path / "index",
            IndexSettings(threads=1),
            EncoderOptions(dtype="fp32"),
            shard=shard,
        )
        for shard in shards
    ]
    assert infos[:2] == [None, None]
    assert infos[2].num_documents == NUM_DOCUMENTS
    assert files_of(tmp_path / "index") == files_of(whole)


@pytest.mark.parametrize(("num_parts", "count"), [(13, 1), (13, 2), (13, 13), (5, 8), (0, 3), (100, 7)])
def test_shards_are_contiguous_blocks_that_cover_every_part_once(num_parts, count):
    blocks = [Shard(number, count).parts(num_parts) for number in range(count)]
    assert [part for block in blocks for part in block] == list(range(num_parts))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.fixture(scope="module")
def three_parts_done(tmp_path_factory, corpus, encoder):
    """The store of a job that stopped after three parts."""

    def three_parts():
        for number, document in enumerate(read_corpus(corpus)):
            if number == 3 * PART_SIZE:
                raise InterruptedError("stopped")
            yield document

    summary, index_dir = scan_corpus(corpus), tmp_path_factory.mktemp("stopped") / "index"
    with pytest.raises(InterruptedError):
        build_index(three_parts(), encoder, index_dir, source=Source(sha256=summary.sha256))
    assert store_of(index_dir).parts().keys() == {0, 1, 2}
    return store_of(index_dir).path


@pytest.fixture
def stopped(tmp_path, three_parts_done):
    """The index folder, not there yet, of a job that stopped after three parts."""
    shutil.copytree(three_parts_done, store_of(tmp_path / "index").path)
    return tmp_path / "index"


def go_on(corpus, encoder, index_dir, **settings):
    sha256 = scan_corpus(corpus).sha256
    return build_index(read_corpus(corpus), encoder, index_dir, IndexSettings(**settings), source=Source(sha256=sha256))


def test_finished_parts_are_not_encoded_again(stopped, corpus, encoder):
    before = {path.name: path.stat().st_mtime_ns for path in store_of(stopped).path.glob("part-*")}
    assert go_on(corpus, encoder, stopped, keep_embeddings=True) == NUM_DOCUMENTS
    after = {path.name: path.stat().st_mtime_ns for path in store_of(stopped).path.glob("part-*")}
    assert len(after) == 3 * 13 and {name: after[name] for name in before} == before


def test_the_store_goes_after_success_unless_it_is_kept(stopped, corpus, encoder):
    go_on(corpus, encoder, stopped)
    assert not store_of(stopped).path.exists()


def test_a_part_the_manifest_does_not_list_is_encoded_again(stopped, corpus, encoder):
    (store_of(stopped).path / "part-00003.npy").write_bytes(b"half a file")
    (store_of(stopped).path / ".part-00004.npy.tmp").write_bytes(b"half a file")
    assert go_on(corpus, encoder, stopped) == NUM_DOCUMENTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "cls"}, r"encoder is \{'pooling': 'mean'\} there and \{'pooling': 'cls'\} now"),
        ({"dtype": "bf16"}, "dtype is float32 there and bfloat16 now"),
        ({"batch_tokens": 77}, "batch_tokens is 2048 there and 77 now"),
    ],
)
def test_a_store_of_another_job_is_an_error_that_names_the_difference(stopped, corpus, bert_folder, options, message):
    other = Encoder.from_pretrained(bert_folder, **{"dtype": "fp32", **options})
    with pytest.raises(ValueError, match=f"index.parts: its embeddings are of another job: {message}; another"):
        go_on(corpus, other, stopped)
    assert store_of(stopped).parts().keys() == {0, 1, 2}
    assert go_on(corpus, other, stopped, restart=True) == NUM_DOCUMENTS


def test_another_processor_is_warned_of_and_both_are_named(stopped, corpus, encoder, caplog):
    manifest = store_of(stopped).path / "manifest.json"
    here = processor_name(encoder.device)
    manifest.write_text(manifest.read_text().replace(json.dumps(here), '"a slide rule"'))
    assert go_on(corpus, encoder, stopped) == NUM_DOCUMENTS
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"{store_of(stopped).path} was begun on a slide rule, this is {here}: "
        "the last bits of vectors differ between the two"
    ]


def test_a_store_of_another_corpus_is_an_error(stopped, corpus, tmp_path, encoder):
    lines = corpus.read_text().splitlines()
    lines[5000] = json.dumps({"_id": "d05000", "text": "another text"})
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="corpus_sha256 is .* there and .* now"):
        go_on(tmp_path / "other.jsonl", encoder, stopped)


def test_a_finished_part_of_other_documents_is_an_error(tmp_path, encoder):
    def documents(word, stop):
        for number in range(2 * PART_SIZE):
            if number == stop:
                raise InterruptedError
            yield Document(str(number), word)

    with pytest.raises(InterruptedError):
        build_index(documents("cat", PART_SIZE + 1), encoder, tmp_path / "index")
    with pytest.raises(ValueError, match="part 0 is of other documents"):
        build_index(documents("dog", None), encoder, tmp_path / "index")
    assert (
        build_index(documents("dog", None), encoder, tmp_path / "index", IndexSettings(restart=True)) == 2 * PART_SIZE
    )


@pytest.mark.processes
def test_a_job_continues_with_the_arithmetic_it_was_begun_with(tmp_path, corpus, bert_folder):
    options = ["--dtype", "bf16", "--batch-tokens", "500"]
    kill_after(2, corpus, bert_folder, tmp_path / "index", *options)
    info = index_corpus(str(corpus), str(bert_folder), tmp_path / "index")
    assert info.dtype == "bfloat16"


def test_a_stopped_job_may_be_continued_with_another_kind(stopped, corpus, encoder):
    before = {path.name: path.stat().st_mtime_ns for path in store_of(stopped).path.glob("part-*")}
    go_on(corpus, encoder, stopped, kind="SQfp16", keep_embeddings=True)
    after = {path.name: path.stat().st_mtime_ns for path in store_of(stopped).path.glob("part-*")}
    assert len(before) == 3 * 3 and {name: after[name] for name in before} == before
    assert read_index_info(stopped).kind == "SQfp16"


@pytest.mark.parametrize("name", ["part-00001.npy", "part-00001.ids", "part-00001.tokens"])
def test_a_flipped_byte_is_an_error_that_names_the_file(stopped, corpus, encoder, name):
    path = store_of(stopped).path / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: damaged"):
        go_on(corpus, encoder, stopped)
    assert not stopped.exists()


def test_repairing_encodes_the_damaged_and_missing_parts_alone(tmp_path, stopped, corpus, encoder, bert_folder, caplog):
    folder = store_of(stopped).path
    (folder / "part-00001.ids").unlink()
    (folder / "part-00002.npy").write_bytes(b"half a file")
    before = (folder / "part-00000.npy").stat().st_mtime_ns
    with pytest.raises(ValueError, match="part-00001.ids: missing, .*; --repair encodes such parts again"):
        index_corpus(str(corpus), str(bert_folder), stopped)
    index_corpus(str(corpus), str(bert_folder), stopped, IndexSettings(repair=True, keep_embeddings=True))
    assert (folder / "part-00000.npy").stat().st_mtime_ns == before
    warnings = [record.getMessage() for record in caplog.records if "is encoded again" in record.getMessage()]
    assert [warning.rpartition(": ")[2] for warning in warnings] == [f"part {n} is encoded again" for n in (1, 2)]
    go_on(corpus, encoder, tmp_path / "undisturbed")
    assert files_of(stopped) == files_of(tmp_path / "undisturbed")


def test_kept_embeddings_stay_when_their_index_is_replaced_until_they_are_discarded(stopped, corpus, encoder):
    store = store_of(stopped)
    go_on(corpus, encoder, stopped, keep_embeddings=True)
    go_on(corpus, encoder, stopped, kind="SQ8", overwrite=True)
    assert sum(part.num_documents for part in store.parts().values()) == NUM_DOCUMENTS
    go_on(corpus, encoder, stopped, restart=True, overwrite=True)
    assert not store.path.exists()


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_with_files_of_others_is_no_store_and_nothing_in_it_is_deleted(tmp_path, corpus, encoder, restart):
    folder = store_of(tmp_path / "index").path
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="index.parts: mine.txt in it is no file of this program"):
        go_on(corpus, encoder, tmp_path / "index", restart=restart)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_missing_part_is_an_error_that_names_the_file(stopped, corpus, encoder):
    (store_of(stopped).path / "part-00002.npy").unlink()
    with pytest.raises(ValueError, match="part-00002.npy: missing"):
        go_on(corpus, encoder, stopped)


def test_a_part_of_another_store_is_an_error(stopped, corpus, encoder):
    store = store_of(stopped).path
    shutil.copy(store / "part-00000.npy", store / "part-00001.npy")
    with pytest.raises(ValueError, match="part-00001.npy: damaged"):
        go_on(corpus, encoder, stopped)


def test_a_line_that_a_kill_cut_off_is_no_part_and_the_next_one_takes_its_place(stopped, corpus, encoder, whole):
    store = store_of(stopped)
    lines = store.path / "parts.jsonl"
    content = lines.read_bytes()
    lines.write_bytes(content[:-7])
    assert store.parts().keys() == {0, 1}
    assert go_on(corpus, encoder, stopped, keep_embeddings=True) == NUM_DOCUMENTS
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["number"] for record in records] == list(range(-(-NUM_DOCUMENTS // PART_SIZE)))
    assert files_of(stopped) == files_of(whole)


def test_a_store_whose_manifest_lists_its_parts_is_continued(stopped, corpus, encoder, whole):
    store = store_of(stopped)
    parts = store.parts()
    list_in_manifest(store.path, without=[])
    assert store.parts() == parts and parts.keys() == {0, 1, 2}
    (store.path / "part-00001.npy").write_bytes(b"damaged")
    store.forget_damaged(range(9))
    assert store.parts().keys() == {0, 2}
    assert go_on(corpus, encoder, stopped) == NUM_DOCUMENTS
    assert files_of(stopped) == files_of(whole)


def test_a_part_costs_one_line_however_many_there_are(tmp_path, encoder):
    store = Store(tmp_path / "index.parts")
    store.path.mkdir()
    store.begin(settings_of(encoder, None))
    manifest, sizes = (store.path / "manifest.json").read_bytes(), []
    for number in range(5):
        documents = [Document(f"d{number}", "cat")]
        part = Part(1, 0, 0, documents_sha256(documents))
        store.write(number, np.zeros((1, 4), dtype=np.float32), documents, part, digests([np.array([1])]))
        sizes.append((store.path / "parts.jsonl").stat().st_size)
    assert len(set(np.diff([0, *sizes]))) == 1
    assert (store.path / "manifest.json").read_bytes() == manifest
    assert store.parts().keys() == set(range(5))


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"number": 1}', '{"number": "x", "num_documents": 1}'])
def test_a_damaged_line_is_an_error_that_names_it(stopped, corpus, encoder, line):
    with open(store_of(stopped).path / "parts.jsonl", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match="parts.jsonl, line 4"):
        go_on(corpus, encoder, stopped)


def test_lines_of_a_store_that_was_forgotten_are_not_taken_for_the_next_one(stopped, corpus, encoder):
    store = store_of(stopped)
    (store.path / "manifest.json").unlink()  # what a kill in the middle of --restart leaves
    assert store.parts() == {} and store.settings() is None
    store.begin(settings_of(encoder, None))
    assert store.parts() == {}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {}, "parts": {"0": {}}}'])
def test_a_damaged_manifest_is_an_error_that_names_it(stopped, corpus, encoder, content):
    (store_of(stopped).path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json"):
        go_on(corpus, encoder, stopped)


def test_a_shard_cannot_discard_the_parts_of_the_others(stopped, corpus, encoder):
    source = Source(num_documents=NUM_DOCUMENTS, sha256=scan_corpus(corpus).sha256)
    with pytest.raises(ValueError, match="--restart would discard the other shards' parts; delete .*index.parts"):
        build_index(
            read_corpus(corpus), encoder, stopped, IndexSettings(restart=True), shard=Shard(0, 2), source=source
        )
    assert store_of(stopped).parts().keys() == {0, 1, 2}


UNFINISHED = "the store of an index job that is not finished: 3,072 documents in 3 parts are encoded"


def test_info_of_a_stopped_job_s_store_says_what_it_is_and_how_far(stopped, encoder):
    store = store_of(stopped)
    facts = json.loads(describe(str(store.path), "json"))
    assert facts["state"].startswith(UNFINISHED)
    assert (facts["parts"], facts["documents"], facts["dimension"]) == (3, 3 * PART_SIZE, 32)
    assert (facts["model_sha256"], facts["encoder_pooling"]) == (encoder.weights_sha256, "mean")
    store.clear()
    assert "0 documents in 0 parts are encoded" in describe(str(store.path))
    with pytest.raises(ValueError, match="a plan is for a model"):
        describe(str(store.path), plan=PlanSettings(drop_mlp=1))


def test_a_store_is_no_index_to_search_or_verify(stopped, bert_folder):
    path = store_of(stopped).path
    for use in (
        load_encoder,
        read_index,
        lambda folder: rebuild_index(folder, folder.with_name("new"), IndexSettings(kind="SQ8")),
    ):
        with pytest.raises(ValueError, match=f"^{path}: is no index but {UNFINISHED}"):
            use(path)


def test_a_store_that_was_kept_is_told_from_one_of_a_stopped_job(stopped, corpus, encoder):
    go_on(corpus, encoder, stopped, keep_embeddings=True)
    assert "the embeddings that were kept of the index index beside it" in describe(str(store_of(stopped).path))
    with pytest.raises(ValueError, match="is no index but the embeddings that were kept"):
        load_encoder(store_of(stopped).path)


@pytest.mark.parametrize("shard", [Shard(), Shard(1, 2)])
def test_a_job_that_was_killed_after_it_wrote_the_index_is_done_by_the_same_command(
    stopped, corpus, bert_folder, encoder, shard
):
    go_on(corpus, encoder, stopped, keep_embeddings=True)
    store = store_of(stopped)
    (store.path / KEPT).unlink()  # it was not to be kept, and was about to go
    written = files_of(stopped)
    index_corpus(str(corpus), str(bert_folder), stopped, options=EncoderOptions(dtype="fp32"), shard=shard)
    assert not store.path.exists() and files_of(stopped) == written
    with pytest.raises(FileExistsError, match="an index is there already"):
        index_corpus(str(corpus), str(bert_folder), stopped, options=EncoderOptions(dtype="fp32"))


def test_parts_of_a_stopped_job_that_was_to_replace_an_index_are_not_removed(
    stopped, corpus, bert_folder, encoder, tmp_path
):
    begun = shutil.copytree(store_of(stopped).path, tmp_path / "begun")
    go_on(corpus, encoder, stopped)
    shutil.copytree(begun, store_of(stopped).path)
    with pytest.raises(FileExistsError, match="an index is there already"):
        index_corpus(str(corpus), str(bert_folder), stopped, options=EncoderOptions(dtype="fp32"))
    assert store_of(stopped).parts().keys() == {0, 1, 2}


def test_two_jobs_at_once_are_an_error(tmp_path):
    store = Store(tmp_path / "x.parts")
    with store.at_work(Shard()):
        with pytest.raises(OSError, match="another job is at work on it; wait for it, or stop it"):
            with store.at_work(Shard()):
                pytest.fail("two jobs hold the lock")
    with store.at_work(Shard()):
        pass


def test_two_jobs_on_one_shard_are_an_error_and_on_two_are_not(tmp_path):
    store = Store(tmp_path / "x.parts")
    with store.at_work(Shard(0, 2)), store.at_work(Shard(1, 2)):
        with pytest.raises(OSError, match="on shard 1 of 2"):
            with store.at_work(Shard(1, 2)):
                pytest.fail("two jobs hold the lock")
        with pytest.raises(OSError, match="in 2 shards, not 3"):
            with store.at_work(Shard(2, 3)):
                pytest.fail("shards of two divisions at once")


def test_a_store_gives_back_what_was_written_in_order(tmp_path, encoder):
    store = Store(tmp_path / "x.parts")
    store.path.mkdir()
    store.begin(settings_of(encoder, None))
    rng = np.random.default_rng(0)
    blocks = {number: rng.normal(size=(3, 32)).astype(np.float32) for number in (2, 0, 1)}
    for number, block in blocks.items():
        documents = [Document(f"{number}-{row}", "") for row in range(3)]
        tokens = digests(document.doc_id.encode() for document in documents)
        store.write(number, block, documents, Part(3, 3, 0, documents_sha256(documents)), tokens)
    found = list(store.read_all())
    np.testing.assert_array_equal(
        np.concatenate([rows for rows, _ in found]), np.concatenate([blocks[n] for n in range(3)])
    )
    assert [ids for _, ids in found] == [[f"{number}-{row}" for row in range(3)] for number in range(3)]


def test_encoding_in_parts_equals_encoding_each_part_alone(tmp_path, corpus, encoder):
    store = Store(tmp_path / "x.parts")
    documents = list(read_corpus(corpus))[: 2 * PART_SIZE + 7]
    with store.at_work(Shard()):
        store.begin(settings_of(encoder, None))
        assert encode_corpus(documents, encoder, store)[0] == 3
    for (rows, _), part in zip(store.read_all(), in_parts(documents), strict=True):
        np.testing.assert_allclose(rows, encoder.encode_documents(part), atol=1e-5)


def test_a_job_that_fails_does_not_go_on_reading_other_shards_documents(tmp_path, encoder):
    end, store = time.monotonic() + 60, Store(tmp_path / "x.parts")
    documents = (Document(str(number), "") for number in iter(itertools.count().__next__, None))
    with store.at_work(Shard(0, 10**6)):
        store.begin(settings_of(encoder, None))
        (store.path / "part-00000.npy").mkdir()  # where the first part is to be
        with pytest.raises(OSError, match="part-00000.npy"):
            encode_corpus(
                itertools.takewhile(lambda _document: time.monotonic() < end, documents),
                encoder,
                store,
                shard=Shard(0, 10**6),
                num_documents=10**6 * PART_SIZE,
            )
    assert time.monotonic() < end - 30


def test_items_come_in_order_from_a_thread_ahead():
    assert list(read_ahead(iter(range(100)), size=3)) == list(range(100))


def test_an_error_in_the_thread_is_raised_in_its_place():
    def items():
        yield 1
        raise KeyError("two")

    taken = []
    with pytest.raises(KeyError, match="two"):
        for item in read_ahead(items()):
            taken.append(item)
    assert taken == [1]


def test_the_thread_ends_when_nobody_takes_the_items():
    before = threading.active_count()
    for item in read_ahead(iter(range(10**9))):
        if item == 5:
            break
    del item
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_the_thread_stays_within_its_size():
    taken, given = 0, []
    for _ in read_ahead((given.append(number) or number for number in range(50)), size=2):
        taken += 1
        time.sleep(0.002)
        # Two wait, one is being put, one is being made.
        assert len(given) <= taken + 4
