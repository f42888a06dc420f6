"""Models by their hub name: huggingface_hub as it is, a hub on this machine that answers as huggingface.co does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from conftest import save_model, save_sentence_files, write_jsonl
from processes import fork_server, run_command
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

REVISION = "1" * 40
INFO, TREE = "/api/models/tiny/bert/revision/main", f"/api/models/tiny/bert/tree/{REVISION}"
FILES = "/tiny/bert/resolve/"


class Hub(ThreadingHTTPServer):
    """A hub of one model, tiny/bert.

    Attributes:
        model: The model's folder; what it holds when it is asked for is what the hub has.
        fetched: The files that were fetched.
        address: Of the hub.
        cache: The home of those who ask it.
        variables: What tells them of both, read when huggingface_hub is imported.
        forks: What forks commands that ask it.
    """

    def __init__(self, cache):
        super().__init__(("127.0.0.1", 0), Answer)
        self.model, self.fetched, self.address = None, [], f"http://127.0.0.1:{self.server_port}"
        self.cache, self.variables = cache, {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        self.forks = fork_server(self.variables)

    def content_of(self, path):
        """What the hub answers; None = nothing."""
        if path == INFO:
            return json.dumps({"id": "tiny/bert", "sha": REVISION, "siblings": []}).encode()
        if path == TREE:
            files = [file for file in sorted(self.model.rglob("*")) if file.is_file()]
            facts = [(file.relative_to(self.model).as_posix(), file.read_bytes()) for file in files]
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in facts
            ]
            return json.dumps(entries).encode()
        file = self.model / name_of(path)
        return file.read_bytes() if path.startswith(FILES) and file.is_file() else None


def name_of(path):
    """The name of a file that is asked for, after the revision, also as "main"."""
    return path.removeprefix(FILES).partition("/")[2]


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        content = self.server.content_of(path)
        if content is None:
            return self.send_error(404)
        is_file = path not in (INFO, TREE)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": REVISION} if is_file else {}
        self.send_response(200)
        for header in (headers | {"Content-Length": len(content)}).items():
            self.send_header(*map(str, header))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            self.server.fetched.extend([name_of(path)] if is_file else [])

    do_HEAD = do_GET

    def log_message(self, *_args):
        pass


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("home") / "cache")
    Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def hub(tmp_path, running):
    """The hub with a new model, of which nothing was fetched, and an empty cache."""
    running.model, running.fetched = save_sentence_files(save_model(tmp_path / "bert", "bert")), []
    shutil.rmtree(running.cache, ignore_errors=True)
    return running


@pytest.fixture
def effir(tmp_path, hub):
    """Run a command that asks the hub."""
    return lambda *arguments: run_command(*arguments, server=hub.forks, environment=hub.variables, cwd=tmp_path)


def offline(tmp_path, hub, *arguments):
    """Run a command that has the cache alone."""
    variables = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | hub.variables | variables
    line = [sys.executable, "-m", "effir_search", *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.processes
def test_a_plan_fetches_no_weights_and_an_index_fetches_them_once(tmp_path, hub, effir):
    fetched = hub.fetched
    plan = effir("compress", "--encoder", "tiny/bert", "--texts", "x", "--output", "small", "--plan")
    assert plan.returncode == 0, plan.stderr
    assert "mlp parameters" in plan.stdout and "config.json" in fetched and "model.safetensors" not in fetched

    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "hot soup"}])
    given = ["index", "--corpus", corpus, "--encoder", "tiny/bert", "--output"]
    done = effir(*given, "one")
    assert done.returncode == 0, done.stderr
    assert fetched.count("model.safetensors") == 1
    assert "HTTP" not in done.stderr
    before = len(fetched)
    again = offline(tmp_path, hub, *given, "two")
    assert again.returncode == 0, again.stderr
    assert len(fetched) == before
    assert (tmp_path / "one" / "index").read_bytes() == (tmp_path / "two" / "index").read_bytes()


@pytest.mark.processes
def test_a_model_that_no_hub_has_is_one_line(tmp_path, hub, effir):
    done = effir("info", "tiny/other")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "Error: tiny/other: no such folder, and no such model in the Hugging Face cache or reachable on the hub"
    ]


@pytest.mark.processes
def test_a_model_with_code_of_its_own_is_an_error_before_its_weights_are_fetched(tmp_path, hub, effir):
    fetched = hub.fetched
    config = tmp_path / "bert" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "modeling_own.Model"}}))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "hot soup"}])
    done = effir("index", "--corpus", corpus, "--encoder", "tiny/bert", "--output", "one")
    assert done.returncode == 1 and "names code of its own (modeling_own.Model)" in done.stderr
    assert "config.json" in fetched and "model.safetensors" not in fetched


@pytest.mark.processes
def test_weights_of_the_older_format_are_fetched_where_there_are_no_others(tmp_path, hub, effir):
    fetched = hub.fetched
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "hot soup"}])
    given = ["index", "--corpus", corpus, "--encoder", "tiny/bert", "--output"]
    model = tmp_path / "bert"
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "training_args.bin").write_bytes(b"no weights")
    newer = effir(*given, "newer")
    assert newer.returncode == 0, newer.stderr
    assert "model.safetensors" in fetched and not [name for name in fetched if name.endswith(".bin")]

    shutil.rmtree(hub.cache)
    (model / "model.safetensors").unlink()
    older = effir(*given, "older")
    assert older.returncode == 0, older.stderr
    assert [name for name in fetched if name.endswith(".bin")] == ["pytorch_model.bin"]
    again = offline(tmp_path, hub, *given, "again")
    assert again.returncode == 0, again.stderr
    for name in ("older", "again"):
        assert (tmp_path / name / "index").read_bytes() == (tmp_path / "newer" / "index").read_bytes()


@pytest.mark.processes
def test_an_older_dense_module_beside_newer_weights_is_fetched_too(tmp_path, hub, effir):
    fetched = hub.fetched
    model = tmp_path / "bert"
    modules = [Transformer(str(model)), Pooling(32, "mean"), Dense(32, 8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "saved"))
    shutil.rmtree(model)
    (tmp_path / "saved").rename(model)
    torch.save(load_file(model / "2_Dense" / "model.safetensors"), model / "2_Dense" / "pytorch_model.bin")
    (model / "2_Dense" / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "hot soup"}])
    done = effir("index", "--corpus", corpus, "--encoder", "tiny/bert", "--output", "one")
    assert done.returncode == 0, done.stderr
    assert [name for name in fetched if name.endswith(".bin")] == ["2_Dense/pytorch_model.bin"]


@pytest.mark.processes
def test_weights_of_the_older_format_in_the_cache_are_enough(tmp_path, hub, effir):
    fetched = hub.fetched
    snapshot = shutil.copytree(tmp_path / "bert", hub.cache / "hub/models--tiny--bert/snapshots" / REVISION)
    torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(REVISION)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "hot soup"}])
    done = effir("index", "--corpus", corpus, "--encoder", "tiny/bert", "--output", "one")
    assert done.returncode == 0, done.stderr
    assert not fetched


@pytest.mark.processes
def test_a_cache_with_a_config_alone_is_filled_up(tmp_path, hub, effir):
    fetched = hub.fetched
    code = "from huggingface_hub import hf_hub_download; hf_hub_download('tiny/bert', 'config.json')"
    subprocess.run([sys.executable, "-c", code], env=os.environ | hub.variables, check=True, capture_output=True)
    assert "config.json" in fetched and "model.safetensors" not in fetched
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "hot soup"}])
    done = effir("index", "--corpus", corpus, "--encoder", "tiny/bert", "--output", "one")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in fetched
