"""Requests that are wrong: each gets a 4xx with one sentence, and the server goes on."""

import json
import socket

import pytest
from servers import Server

pytestmark = pytest.mark.processes
KEY = {"X-API-Key": "open-sesame"}
SEARCH, OLD, EMBED = "/v1/toy/search", "/v1/indexes/toy/search", "/v1/embeddings"
NOT_NUMBERS = ("-1", "0", "1001", "1.5", "NaN", "1e3", "abc", "9" * 5000, "１", "0x10", " 3", "+3", "--3")


@pytest.fixture(scope="module")
def server(tmp_path_factory, toy_index):
    key_file = tmp_path_factory.mktemp("key") / "key.txt"
    key_file.write_text("open-sesame\n")
    options = ["--api-key-file", key_file, "--max-inputs", 4, "--timeout", 2, "--server-name", "search.example"]
    with Server("--index", f"toy={toy_index}", *options) as running:
        yield running


def embedding(model, **fields):
    return json.dumps({"model": model, "input": "tea", **fields})


def bad_requests(model):
    """Method, path, body, more headers, and the status that is due."""
    yield from (("GET", f"{SEARCH}?query=tea&hits={number}", None, {}, 400) for number in NOT_NUMBERS[:7])
    for number in NOT_NUMBERS[7:]:
        yield "GET", f"{SEARCH}?query=tea&hits={json.dumps(number)[1:-1].replace(' ', '%20')}", None, {}, 400
    for query in ("", "?query=", "?query=%20%0A", "?hits=3", f"?query={'a' * 4097}", "?query=tea&parse=maybe"):
        yield "GET", SEARCH + query, None, {}, 400
    for length in ("0", "-5", "NaN", "9999999999"):
        yield "GET", f"{SEARCH}?query=tea&max_doc_length={length}", None, {}, 400
    for name in ("none", "..", "%2e%2e", "toy%00", "%2Fetc%2Fpasswd", "..%2F..%2Fetc", "a" * 3000, "%ff%fe"):
        yield "GET", f"/v1/{name}/search?query=tea", None, {}, 404
    for doc_id in ("none", "../001", "..%2F..%2Fetc%2Fpasswd", "%00", "%ED%A0%80", "'; DROP TABLE documents; --"):
        yield "GET", f"/v1/toy/doc/{doc_id.replace(' ', '%20')}", None, {}, 404
    for path in (
        "/v1",
        "/v1/toy",
        "/../../etc/passwd",
        "/page.js/../../setup.py",
        "/docs",
        "/.env",
        "//",
        "/v1/toy/doc/",
    ):
        yield "GET", path, None, {}, 404
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        yield method, SEARCH, None, {}, 405
    yield "POST", SEARCH, "{}", {}, 405
    yield "GET", EMBED, None, {}, 405
    yield "GET", "/mcp", None, {}, 405
    deep, number = "[" * 100_000, '{"model": ' + "9" * 10_000 + "}"
    texts = (
        "",
        "{",
        "null",
        "[]",
        '"tea"',
        "{'query': 'tea'}",
        "\ufeff{}",
        deep,
        number,
        '{"input": NaN}',
        '{"a": Infinity}',
    )
    for path in (OLD, EMBED):
        yield from (("POST", path, text.encode(), {}, 400) for text in texts)
        yield "POST", path, b'{"query": "\xff"}', {}, 400
    for field in (
        {"query": None}, {"query": 7}, {"query": ["tea"]}, {"query": {"query_txt": 1}}, {"query": "\ud800"}, {},
        {"query": "tea", "hits": True}, {"query": "tea", "hits": 2.5}, {"query": "tea", "hits": -3},
        {"query": "tea", "hits": None}, {"query": "tea", "hits": [1]}, {"query": "tea", "qid": {}},
    ):  # fmt: skip
        yield "POST", OLD, json.dumps(field), {}, 400
    for inputs in (None, 7, [], {}, [None], [[1, 2]], [1, 2], "", ["tea", " "], ["\ud800"], ["a"] * 5):
        yield "POST", EMBED, embedding(model, input=inputs), {}, 400
    for field in (
        {"encoding_format": "int8"}, {"dimensions": 0}, {"dimensions": -1}, {"dimensions": True}, {"dimensions": "8"},
        {"dimensions": 31.5}, {"dimensions": 32.0}, {"prompt_name": "title"}, {"prompt_name": []}, {"colour": "red"},
    ):  # fmt: skip
        yield "POST", EMBED, embedding(model, **field), {}, 400
    for name in ("none", None, 7, [], "../model"):
        yield "POST", EMBED, embedding(name), {}, 404
    for path in (EMBED, OLD, "/mcp"):
        yield "POST", path, b"x" * 2_000_001, {}, 413
    yield "GET", SEARCH, b"x" * 2_000_001, {}, 413
    for headers in ({"Host": "evil.example"}, {"Host": "search.example.evil"}, {"Host": "a b"}, {"Host": ""}):
        yield "GET", f"{SEARCH}?query=tea", None, headers, 421
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        yield "GET", f"{SEARCH}?query=tea", None, headers, 403
    wrong = ("wrong", "", "open-sesam", "open-sesame2", "OPEN-SESAME", "\xfc")
    yield from (("GET", f"{SEARCH}?query=tea", None, {"X-API-Key": key}, 401) for key in wrong)
    for value in (
        "Bearer wrong",
        "Bearer",
        "Basic !!!",
        "Basic \xfc",
        "Basic d3Jvbmc=",
        "Digest open-sesame",
        "open-sesame",
    ):
        yield "GET", "/", None, {"X-API-Key": None, "Authorization": value}, 401


def test_each_is_a_4xx_with_one_sentence_and_the_server_goes_on(server, bert_folder):
    requests = list(bad_requests(bert_folder.name))
    assert len(requests) > 60
    for method, path, body, more, status in requests:
        headers = {name: value for name, value in {**KEY, **more}.items() if value is not None}
        answer = server.ask(method, path, body, headers)
        case = f"{method} {path[:80]} {str(body)[:60]} {more}: {answer.status} {answer.body[:200]}"
        assert answer.status == status, case
        error = answer.json["error"]
        sentence = error["message"] if path in (EMBED, "/v1/models") else error
        assert isinstance(sentence, str) and 10 < len(sentence) < 300 and "\n" not in sentence, case
        assert (
            "Traceback" not in sentence and "site-packages" not in sentence and str(bert_folder.parent) not in sentence
        )
    assert server.get(SEARCH, KEY, query="hot soup").status == 200
    assert server.command.poll() is None


@pytest.mark.parametrize("data", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 200_000,
    b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
], ids=lambda data: repr(data[-20:]))  # fmt: skip
def test_what_is_no_http_is_a_4xx_or_nothing(server, data):
    assert server.raw(data)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 401", b"HTTP/1.1 421", b"")
    assert server.get("/health").status == 200


@pytest.mark.parametrize(
    "headers",
    [{"X-API-Key": "open-sesame"}, {"Authorization": "Bearer open-sesame"}, {"authorization": "bearer  open-sesame"},
     {"Authorization": "Basic YW55Ym9keTpvcGVuLXNlc2FtZQ=="}],
)  # fmt: skip
def test_the_key_opens_everything_and_only_health_needs_none(server, headers):
    for path in ("/", "/page.js", "/metrics", "/openapi.yaml", "/v1/models", "/v1/indexes", "/v1/toy/doc/001"):
        assert server.get(path).status == 401
        assert server.get(path, headers).status == 200
    assert server.get("/health").status == 200


def test_a_browser_that_opens_the_page_asks_for_the_key(server):
    assert server.get("/").headers["www-authenticate"] == 'Basic realm="effir_search"'
    assert server.get("/v1/models").headers["www-authenticate"] == "Bearer"


def test_names_and_origins_of_its_own_are_answered(server):
    for name in ("localhost", "127.0.0.1:8081", "[::1]:8081", "192.168.1.7", "search.example", "SEARCH.example:443"):
        headers = {**KEY, "Host": name, "Origin": f"https://{name}", "Sec-Fetch-Site": "same-origin"}
        assert server.get("/v1/models", headers).status == 200
    from_a_link = {**KEY, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert server.get("/", from_a_link).status == 200
    assert server.get(SEARCH, from_a_link, query="tea").status == 403


def test_a_body_that_does_not_arrive_is_given_up(server):
    with server.start_post(EMBED, b"{}" * 20) as connection:
        assert b"401" in connection.recv(65536).splitlines()[0]  # at once: who has no key costs nothing


def test_a_slow_body_is_a_408(tmp_path, toy_index):
    with (
        Server("--index", f"toy={toy_index}", "--timeout", 0.5, "--max-requests", 2) as server,
        server.start_post(EMBED, b"{}" * 20) as first,
        server.start_post(EMBED, b"{}" * 20) as second,
    ):
        crowded = server.get(SEARCH, query="tea")
        assert crowded.status == 429 and crowded.headers["retry-after"] == "1"
        assert server.get("/health").status == 200
        for connection in (first, second):
            assert b"408" in connection.recv(65536).splitlines()[0]
        assert server.get(SEARCH, query="tea").status == 200


def test_a_connection_that_does_not_ask_is_closed(server):
    for beginning in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(beginning)
            assert connection.recv(1) == b""
