"""A server from its start to its end: bad starts, indexes replaced under load, a signal with work in flight."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time

import pytest
from conftest import DOCUMENTS, write_jsonl
from processes import run_command
from servers import Server, index_of

pytestmark = pytest.mark.processes


def test_a_signal_ends_it_once_requests_in_flight_are_answered(toy_index, bert_folder):
    body = json.dumps({"model": bert_folder.name, "input": ["tea"] * 100}).encode()
    with Server("--index", f"toy={toy_index}") as server, server.start_post("/v1/embeddings", body) as connection:
        idle = server.connect()
        idle.request("GET", "/health")
        idle.getresponse().read()
        server.command.send_signal(signal.SIGTERM)
        end = time.monotonic() + 30
        with contextlib.suppress(OSError):
            while time.monotonic() < end:  # until nobody new is let in
                server.get("/health")
                time.sleep(0.02)
        assert time.monotonic() < end and server.command.poll() is None
        connection.sendall(body[-1:])
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200") and answer.count(b'"embedding"') == 2 * 100
        # 128 + the number of the signal, as a shell says it.
        assert server.command.wait() == 143
        assert "Traceback" not in server.command.communicate()[1]


def test_an_index_that_is_replaced_is_opened_again_and_no_request_fails(tmp_path, toy_index, bert_folder):
    served = shutil.copytree(toy_index, tmp_path / "served")
    records = [{"_id": doc_id, "title": title, "text": text} for doc_id, (title, text) in DOCUMENTS.items()]
    corpus = write_jsonl(tmp_path / "more.jsonl", [*records, {"_id": "new", "text": "hot soup hot soup hot soup"}])
    index_of(corpus, bert_folder, tmp_path / "next")
    statuses, documents, stop = [], [], threading.Event()

    def ask(server):
        while not stop.is_set():
            answer = server.get("/v1/served/search", query="hot soup hot soup hot soup", hits=1)
            statuses.append(answer.status)
            documents.append((answer.json["candidates"][0]["docid"], bool(answer.json["candidates"][0]["doc"])))

    with Server("--index", served) as server:
        threads = [threading.Thread(target=ask, args=(server,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        while not documents:
            time.sleep(0.01)
        os.rename(served, tmp_path / "last")
        assert server.get("/v1/indexes/served/status").status == 200
        time.sleep(1.5)  # longer than from one look at the folder to the next
        os.rename(tmp_path / "next", served)
        end = time.monotonic() + 60
        while documents[-1] != ("new", True) and time.monotonic() < end:
            time.sleep(0.02)
        stop.set()
        for thread in threads:
            thread.join()
        assert documents[0] == ("008", True) and documents[-1] == ("new", True)
        assert set(statuses) == {200}
        assert b"effir_index_reloads_total 1\n" in server.get("/metrics").body
        server.command.send_signal(signal.SIGHUP)
        while b"effir_index_reloads_total 2\n" not in server.get("/metrics").body and time.monotonic() < end:
            time.sleep(0.05)
        assert time.monotonic() < end


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--index", "none"], "none: no such folder"),
    (["--index", "toy", "--index", "toy"], "another index is called toy"),
    (["--index", "indexes=toy"], "is no name for a path"),
    (["--index", "toy", "--corpus", "none.jsonl"], "none.jsonl"),
    (["--index", "toy", "--api-key-file", "empty"], "must be of visible ASCII characters, and not empty"),
    (["--index", "toy", "--api-key-file", "none"], "none: No such file"),
    (["--index", "toy", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
    (["--index", "toy", "--port", "70000"], "70000"),
    (["--index", "toy", "--mcp", "--host", "localhost"], "--host does not go with --mcp"),
    (["--index", "toy", "--mcp", "--max-body", "2"], "--max-body does not go with --mcp"),
    (["--index", "toy", "--timeout", "inf"], "--timeout"),
])  # fmt: skip
def test_a_start_that_cannot_be_is_one_line(tmp_path, toy_index, arguments, complaint):
    (tmp_path / "toy").symlink_to(toy_index)
    (tmp_path / "empty").write_text(" \n")
    done = run_command("serve", *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2) and complaint in done.stderr and "Traceback" not in done.stderr
