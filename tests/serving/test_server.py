"""A server as a process of its own, asked by the clients that people have."""

import asyncio
import base64
import importlib.util
import sys
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
from conftest import DOCUMENTS
from mcp import Client, StdioServerParameters
from servers import HOSTILE, HUGE, Server, damaged_index, document_path, hostile_corpus, index_of, prompted_model

from effir_search.encoding.encoder import Encoder
from effir_search.searching.searcher import Searcher

pytestmark = pytest.mark.processes
PACKAGE = Path(__file__).parents[2] / "effir_search"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    return prompted_model(tmp_path_factory.mktemp("prompted"))


@pytest.fixture(scope="module")
def server(tmp_path_factory, toy_index, bert_folder, collection, prompted):
    folder = tmp_path_factory.mktemp("served")
    second = index_of(collection / "corpus.jsonl", prompted, folder / "second")
    hostile = index_of(hostile_corpus(folder), bert_folder, folder / "hostile")
    damaged = damaged_index(toy_index, folder / "damaged")
    indexes = (toy_index, f"two={second}", hostile, damaged)
    with Server(*(word for index in indexes for word in ("--index", index))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def test_a_search_has_pyserinis_answer_and_the_searchers_hits(server, toy_index):
    answer = requests.get(f"{server.address}/v1/toy/search", {"query": "hot soup", "hits": 3}).json()
    expected = Searcher(toy_index).search_text("hot soup", 3)
    assert {**answer, "candidates": ...} == {
        "api": "v1", "index": "toy", "query": {"text": "hot soup"}, "candidates": ...,
    }  # fmt: skip
    assert [(hit["docid"], hit["rank"]) for hit in answer["candidates"]] == [
        (hit.doc_id, rank) for rank, hit in enumerate(expected, start=1)
    ]
    for hit, other in zip(answer["candidates"], expected, strict=True):
        assert hit["score"] == pytest.approx(other.score, abs=1e-6)
        assert (hit["doc"]["title"], hit["doc"]["text"]) == DOCUMENTS[hit["docid"]]


def test_ten_hits_are_the_default_and_all_there_are_the_most(server):
    assert len(server.get("/v1/toy/search", query="cat").json["candidates"]) == 10
    assert len(server.get("/v1/toy/search", query="cat", hits=1000).json["candidates"]) == 12


def test_a_document_has_pyserinis_answer(server):
    answer = server.get("/v1/toy/doc/001").json
    doc = {"title": "cat", "text": "the cat chases the small mouse under the table ."}
    assert answer == {"api": "v1", "index": "toy", "docid": "001", "doc": doc}
    raw = server.get("/v1/toy/doc/001", parse="false").json["doc"]
    assert raw == '{"_id": "001", "title": "cat", "text": "the cat chases the small mouse under the table ."}'


def test_the_texts_of_hits_are_cut_where_that_is_asked_for(server):
    hits = server.get("/v1/toy/search", query="cat", max_doc_length=5).json["candidates"]
    assert {hit["docid"]: hit["doc"]["text"] for hit in hits}["001"] == "the c"


def test_pyserini_16_has_its_paths(server, toy_index):
    body = {"query": "hot soup", "hits": 2, "qid": "7", "ef_search": None}
    answer = server.post("/v1/indexes/toy/search", body).json
    assert answer["query"] == {
        "qid": "7", "query_txt": "hot soup", "query_img_path": None, "query_modality": "text", "fp16": False,
    }  # fmt: skip
    assert [hit["docid"] for hit in answer["candidates"]] == [
        hit.doc_id for hit in Searcher(toy_index).search_text("hot soup", 2)
    ]
    assert {hit["docid"]: hit["document_txt"] for hit in answer["candidates"]}["008"].startswith("soup hot tomato")
    assert server.get("/v1/indexes/toy/documents/002").json["_id"] == "002"
    assert server.get("/v1/indexes/", index_type="faiss").json == ["toy", "two", "hostile", "damaged"]
    size = sum(path.stat().st_size for path in toy_index.iterdir())
    assert server.get("/v1/indexes/toy/status").json == {"downloaded": True, "size_bytes": str(size)}


def test_openais_client_gets_the_encoders_vectors_and_what_they_took(client, encoder):
    texts = ["the cat eats fish", "tea"]
    for form in ("float", "base64"):
        answer = client.embeddings.create(model=encoder_name(encoder), input=texts, encoding_format=form)
        vectors = [one.embedding for one in answer.data]
        if form == "base64":
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        np.testing.assert_allclose(vectors, encoder.encode(texts).embeddings, atol=1e-6)
        assert [one.index for one in answer.data] == [0, 1]
        # Four words and one, each text between <s> and </s>.
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 4 + 2 + 1 + 2


def encoder_name(encoder):
    return Path(encoder.name).name


def test_openais_client_alone_asks_for_base64_and_reads_it(client, encoder):
    answer = client.embeddings.create(model=encoder_name(encoder), input="tea")
    np.testing.assert_allclose(answer.data[0].embedding, encoder.encode(["tea"]).embeddings[0], atol=1e-6)


def test_a_models_name_or_prompt_name_says_whether_texts_are_queries(client, prompted):
    model = Encoder.from_pretrained(prompted, dtype="fp32")
    for side, expected in (("query", model.encode_queries(["tea"])), ("document", model.encode_documents(["tea"]))):
        by_name = client.embeddings.create(model=f"{prompted.name}-{side}", input="tea").data[0].embedding
        extra = {"prompt_name": side}
        by_field = client.embeddings.create(model=prompted.name, input="tea", extra_body=extra).data[0].embedding
        np.testing.assert_allclose(by_name, expected[0], atol=1e-6)
        assert by_field == by_name
    with pytest.raises(openai.BadRequestError, match=f"ask for {prompted.name}-query or"):
        client.embeddings.create(model=prompted.name, input="tea")
    with pytest.raises(openai.BadRequestError, match="is for a query, and prompt_name says document"):
        client.embeddings.create(model=f"{prompted.name}-query", input="tea", extra_body={"prompt_name": "document"})


def test_embeddings_are_cut_where_the_model_was_trained_to_be(client, prompted):
    name = f"{prompted.name}-query"
    cut = client.embeddings.create(model=name, input="tea", dimensions=16).data[0].embedding
    encoder = Encoder.from_pretrained(prompted, dtype="fp32", dimension=16)
    np.testing.assert_allclose(cut, encoder.encode_queries(["tea"])[0], atol=1e-6)
    assert len(client.embeddings.create(model=name, input="tea", dimensions=32).data[0].embedding) == 32
    with pytest.raises(openai.BadRequestError, match="must be 16, 32, not 8"):
        client.embeddings.create(model=name, input="tea", dimensions=8)
    with pytest.raises(openai.BadRequestError, match="must be 16, 32, not 16.0"):
        client.embeddings.create(model=name, input="tea", dimensions=16.0)


def test_a_model_without_such_training_is_not_cut(client, bert_folder):
    with pytest.raises(openai.BadRequestError, match="must be 32, not 16"):
        client.embeddings.create(model=bert_folder.name, input="tea", dimensions=16)


def test_many_texts_keep_their_order(client, encoder):
    texts = ["tea " * length for length in range(1, 60)]
    answer = client.embeddings.create(model=encoder_name(encoder), input=texts)
    vectors = [one.embedding for one in answer.data]
    np.testing.assert_allclose(vectors, encoder.encode(texts).embeddings, atol=1e-5)


def test_the_models_are_listed(client, bert_folder, prompted):
    sides = ("", "-query", "-document")
    names = {f"{folder.name}{side}" for folder in (bert_folder, prompted) for side in sides}
    assert {model.id for model in client.models.list()} == names


async def use_tools(client):
    """What an agent does: look, search, read."""
    async with client:
        assert {"search", "get_document", "list_indexes", "fuse_search_results"} <= {
            tool.name for tool in (await client.list_tools()).tools
        }
        listed = (await client.call_tool("list_indexes", {})).structured_content["indexes"]
        found = await client.call_tool("search", {"query": "hot soup", "index_name": listed[0]["name"], "k": 2})
        first = found.structured_content["candidates"][0]
        read = await client.call_tool("get_document", {"docid": first["docid"], "index_name": "toy"})
        wrong = await client.call_tool("search", {"query": "tea", "index_name": "none"})
        unknown = await client.call_tool("search", {"query": "tea", "index": "toy"})
        assert unknown.is_error and "search has no argument 'index'; it has: query, index_name, k" in str(
            unknown.content
        )
        # Scaled to 0 to 1: a 1, b 0.5, c 0 and c 1, a 0; a document that a list lacks has its lowest score there, 0.
        lists = {"hits1": {"a": 4.0, "b": 3.0, "c": 2.0}, "hits2": {"c": 0.9, "a": 0.1}}
        hits = {
            name: [{"docid": doc_id, "score": score} for doc_id, score in one.items()] for name, one in lists.items()
        }
        fused = (await client.call_tool("fuse_search_results", hits)).structured_content["candidates"]
    assert {hit["docid"]: hit["score"] for hit in fused} == pytest.approx({"a": 0.5, "c": 0.5, "b": 0.25})
    return listed, first, read.structured_content, wrong


def check_tools(listed, first, read, wrong):
    assert listed[0] == {"name": "toy", "documents": 12, "dimension": 32, "kind": "Flat", "has_texts": True}
    assert read == {"_id": first["docid"], **first["doc"]}
    assert wrong.is_error and "there is no index 'none'; there are: toy" in wrong.content[0].text


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_an_mcp_client_uses_the_tools_over_http(server, mode):
    check_tools(*asyncio.run(use_tools(Client(f"{server.address}/mcp", mode=mode))))


def test_an_mcp_client_uses_the_tools_over_standard_input_and_output(toy_index):
    arguments = ["-m", "effir_search", "serve", "--mcp", "--index", f"toy={toy_index}"]
    environment = {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    process = StdioServerParameters(command=sys.executable, args=arguments, env=environment)
    check_tools(*asyncio.run(use_tools(Client(process, mode="legacy"))))


def test_pyserinis_bridge_for_agents_uses_the_tools(server):
    path = Path(importlib.util.find_spec("pyserini").submodule_search_locations[0], "server/mcp/pyserini_bridge.py")
    spec = importlib.util.spec_from_file_location("bridge", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bridge = module.PyseriniToolsBridge()
    post = bridge.session.post  # its address is fixed
    bridge.session.post = lambda url, **options: post(url.replace("http://localhost:8000", server.address), **options)
    tools = bridge.handle_message({"id": 1, "method": "tools/list"})["result"]["tools"]
    assert {"search", "get_document"} <= {tool["name"] for tool in tools}
    call = {"name": "get_document", "arguments": {"docid": "001", "index_name": "toy"}}
    answer = bridge.handle_message({"id": 2, "method": "tools/call", "params": call})
    assert answer["result"]["structuredContent"]["title"] == "cat"


def test_hostile_documents_arrive_as_data_and_nothing_else(server):
    answer = server.get("/v1/hostile/search", query="cat </script><script>alert(1)</script>", max_doc_length=100)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json["query"] == {"text": "cat </script><script>alert(1)</script>"}
    texts = {hit["docid"]: (hit["doc"]["title"], hit["doc"]["text"]) for hit in answer.json["candidates"]}
    assert texts == {doc_id: (title[:100], text[:100]) for doc_id, (title, text) in HOSTILE.items()}
    for doc_id, (_, text) in HOSTILE.items():
        assert server.get(document_path("hostile", doc_id)).json["doc"]["text"] == text
    assert len(server.get("/v1/hostile/search", query="cat").body) > len(HUGE)


def test_a_score_that_no_sound_index_gives_does_not_leave(server):
    answer = server.get("/v1/damaged/search", query="tea", hits=12)
    assert answer.status == 500 and answer.json == {"error": "the server failed; its log says more"}
    assert server.get("/v1/toy/search", query="tea", hits=12).status == 200


def test_the_page_may_run_its_own_script_alone_and_makes_no_markup_of_texts(server):
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        answer = server.get(path)
        assert answer.status == 200 and answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in answer.headers["content-security-policy"]
        assert (
            b"http://" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in answer.body
        )
    script = server.get("/page.js").body.decode()
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert name not in script
    page = server.get("/").body.decode()
    assert "<script src=" in page and "onclick" not in page and "style=" not in page


def test_metrics_count_what_was_asked(server):
    def numbers():
        lines = server.get("/metrics").body.decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}

    before = numbers()
    server.get("/v1/toy/search", query="tea")
    after = numbers()
    name = 'effir_requests_total{endpoint="search",status="200"}'
    assert after[name] == before.get(name, 0) + 1
    assert after['effir_request_seconds_bucket{le="+Inf"}'] == after["effir_request_seconds_count"]
    # The search, and the first look at these numbers.
    assert after["effir_request_seconds_count"] == before["effir_request_seconds_count"] + 2
    assert after["effir_resident_memory_bytes"] > 50_000_000


def test_what_the_server_answers_is_written_down(server):
    import yaml

    paths = yaml.safe_load(server.get("/openapi.yaml").body)["paths"]
    assert {"/v1/{index}/search", "/v1/{index}/doc/{docid}", "/v1/embeddings", "/health", "/metrics"} <= set(paths)
