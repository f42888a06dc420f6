"""Servers as processes of their own, and how tests ask them."""

import json
import shutil
import socket
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlencode

import faiss
from conftest import save_model, save_sentence_files, write_jsonl
from processes import Command

from effir_search.indexing.build import index_corpus
from effir_search.settings import EncoderOptions

HUGE = "red " * 250_000
HOSTILE = {
    "<script>": ("<script>alert(1)</script>", "cat </p><img src=x onerror=alert(1)>"),
    "a/b?c#d%e": ("javascript:alert(1)", "cat \u202e cat \u0000 cat"),
    "huge": ("red " * 25_000, HUGE),
    "../../etc/passwd": ("", "cat & <b>cat</b> &amp;"),
}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body, parse_constant=_no_constant)


def _no_constant(name):
    raise AssertionError(f"{name} is no JSON")


class Server:
    """A server at work; ``with`` ends it."""

    def __init__(self, *arguments, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.command = Command("serve", "--port", self.port, *arguments, **options)

    def __enter__(self):
        end = time.monotonic() + 60
        while True:
            try:
                if self.get("/health").status == 200:
                    return self
            except OSError:
                pass
            assert self.command.poll() is None, self.command.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)

    def __exit__(self, *_):
        self.command.send_signal(15)
        self.command.communicate()

    def connect(self):
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def get(self, path, headers=None, **parameters):
        return self.ask("GET", path + (f"?{urlencode(parameters)}" if parameters else ""), None, headers)

    def post(self, path, content, headers=None):
        return self.ask("POST", path, json.dumps(content), {"Content-Type": "application/json", **(headers or {})})

    def ask(self, method, path, body=None, headers=None):
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """Send bytes, and return all that comes back."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: connection.recv(65536), b""))
            except OSError:  # it closed the connection
                return b""

    def start_post(self, path, body: bytes):
        """Send a request but for the last byte of its body; return the connection, on which that may follow."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body[:-1])
        return connection


def document_path(index, doc_id):
    return f"/v1/{index}/doc/{quote(doc_id, safe='')}"


def prompted_model(folder: Path) -> Path:
    """A tiny BERT that reads queries and documents with other prompts, trained to be cut at 16 components."""
    save_sentence_files(save_model(folder, "bert"), prompts={"query": "hot soup ", "document": "green tree "})
    (folder / "training.json").write_text(json.dumps({"losses": {"dimensions": [16, 32]}}))
    return folder


def index_of(corpus: Path, model: Path, index_dir: Path) -> Path:
    index_corpus(str(corpus), str(model), index_dir, options=EncoderOptions(dtype="fp32"))
    return index_dir


def hostile_corpus(folder: Path) -> Path:
    records = [{"_id": doc_id, "title": title, "text": text} for doc_id, (title, text) in HOSTILE.items()]
    return write_jsonl(folder / "hostile.jsonl", records)


def damaged_index(sound: Path, folder: Path) -> Path:
    """A copy of an index in which the vector of one document is so long that its scores are no cosines."""
    shutil.copytree(sound, folder)
    index = faiss.read_index(str(folder / "index"))
    vectors = index.reconstruct_n(0, index.ntotal)
    vectors[3] *= 1e6
    index.reset()
    index.add(vectors)
    faiss.write_index(index, str(folder / "index"))
    return folder
