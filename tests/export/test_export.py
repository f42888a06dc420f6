"""Exports beside the models they were made from, through both runtimes, ours and by hand."""

import json
import re
import shutil

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
import transformers
from conftest import PRUNABLE, QUERIES, TEXTS, save_model, save_sentence_files, word_tokenizer
from processes import run_command
from transformers import AutoConfig, AutoModel, AutoTokenizer

from effir_search.benchmarking.benchmark import _work, benchmark
from effir_search.cli.errors import describe_error, is_for_users
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.export.export import _texts, compare_export, export_graph
from effir_search.indexing import fastest
from effir_search.indexing.build import index_corpus
from effir_search.indexing.index_record import read_index_info
from effir_search.indexing.verify import cosine
from effir_search.model import graph_model
from effir_search.model.surgery import prune
from effir_search.searching.info import describe_model
from effir_search.searching.searcher import Searcher
from effir_search.settings import BenchmarkSettings, EncoderOptions, EvaluationSettings, ExportSettings
from effir_search.text.trec import read_topics

TO_ONNX, TO_OPENVINO = ExportSettings(to="onnx"), ExportSettings(to="openvino")
FEW = ("bert", "llama")
# Of families that cannot be pruned.
SIZES = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def pruned_folder(folder, family):
    """A model with every kind of cut: layer 0 narrowed, 1 without MLP, 2 without attention, 3 gone."""
    pooling = "lasttoken" if family == "llama" else "mean"
    source = save_sentence_files(
        save_model(folder / "source", family), pooling=pooling, prompts={"query": "red ? "}, max_length=20
    )
    encoder = Encoder.from_pretrained(source, device="cpu", dtype="fp32")
    units = {0: torch.arange(48) % 3 > 0}
    encoder.model = prune(encoder.model, mlp=[1], attention=[2], block=[3], units=units, base_model="org/base")
    encoder.save(folder / "pruned")
    return folder / "pruned"


def vectors(folder, **options):
    encoder = Encoder.from_pretrained(folder, **{"dtype": "fp32", "device": "cpu", **options})
    one_by_one = [encoder.encode_documents([text]) for text in TEXTS[:3]]
    return np.concatenate([encoder.encode_documents(TEXTS), encoder.encode_queries(QUERIES), *one_by_one])


@pytest.fixture(scope="module")
def exported(tmp_path_factory, bert_folder):
    """The tiny BERT for each backend."""
    folder = tmp_path_factory.mktemp("exported")
    for settings in (TO_ONNX, TO_OPENVINO):
        export_graph(str(bert_folder), folder / settings.to, settings)
    return folder


@pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in PRUNABLE]
)
def test_an_export_of_a_pruned_model_gives_its_vectors(tmp_path, family):
    source = pruned_folder(tmp_path, family)
    wanted = vectors(source)
    for settings in (TO_ONNX, TO_OPENVINO):
        export_graph(str(source), tmp_path / settings.to, settings)
        np.testing.assert_allclose(vectors(tmp_path / settings.to), wanted, atol=1e-5)
        of_export, of_source = (Encoder.from_pretrained(folder) for folder in (tmp_path / settings.to, source))
        assert (of_export.config, of_export.backend) == (of_source.config, settings.to)
    _, facts = describe_model(str(source))
    _, exported_facts = describe_model(str(tmp_path / "onnx"))
    assert exported_facts["parameters"] == facts["parameters"]
    assert (exported_facts["exported_to"], exported_facts["int8"]) == ("onnx", False)


def test_whoever_reads_an_export_finds_a_plain_config_and_a_graph_of_token_states(tmp_path, exported, bert_folder):
    """As another program does it: tokenizer, graph, mean of the tokens' states, length 1; nothing of ours."""
    texts = ["a fresh apple grows", "cat"]
    folder = exported / "onnx"
    assert AutoConfig.from_pretrained(folder).model_type == "bert"
    tokens = dict(AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="np"))
    by_onnx = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in by_onnx.get_inputs()]
    arrays = {name: tokens.get(name, np.zeros_like(tokens["input_ids"])) for name in names}
    (states,) = by_onnx.run(["last_hidden_state"], arrays)
    by_openvino = openvino.Core().compile_model(exported / "openvino" / "openvino" / "openvino_model.xml", "CPU")
    np.testing.assert_allclose(by_openvino(arrays)["last_hidden_state"], states, atol=2e-2)  # maybe in bfloat16
    mask = tokens["attention_mask"][:, :, None]
    pooled = (states * mask).sum(axis=1) / mask.sum(axis=1)
    by_hand = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(
        by_hand, Encoder.from_pretrained(bert_folder, dtype="fp32").encode_documents(texts), atol=1e-5
    )


def test_in_int8_weights_are_a_quarter_and_vectors_are_close(tmp_path, bert_folder, exported, texts):
    settings = ExportSettings(to="openvino", int8=True, texts=(texts,), num_texts=20)
    export = export_graph(str(bert_folder), tmp_path / "int8", settings)
    ours, wanted = vectors(tmp_path / "int8"), vectors(bert_folder)
    mean = cosine(ours, wanted).mean()
    assert 0.97 < mean < 0.999999 and 0.97 < export.cosine < 1
    assert (export.calibration["texts"], export.compared) == (20, 10)
    record = json.loads((tmp_path / "int8" / "effir_export.json").read_text())
    assert record["int8"] is True and record["cosine"] == export.cosine
    graph = openvino.Core().read_model(tmp_path / "int8" / "openvino" / "openvino_model.xml")
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    in_int8 = sum(
        node.get_output_size() and node.data.size for node in constants if "8" in str(node.output(0).element_type)
    )
    # 4 layers: 4 square matrices of attention and 2 of the MLP.
    assert in_int8 >= 4 * (4 * 32 * 32 + 2 * 32 * 48)
    # Beside its model, an export counts what its files have: embeddings in float32, most of the rest in a byte each.
    folders = [str(bert_folder), str(tmp_path / "int8")]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    settings = BenchmarkSettings(dtypes=("fp32",), rounds=1)
    benchmark(folders, tmp_path / "benchmark", corpus=str(corpus), settings=settings)
    of_model, of_export = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())["encoders"]
    assert [of["label"].split()[1:] for of in (of_model, of_export)] == [["fp32"], ["int8", "openvino"]]
    assert f"in turns of {len(TEXTS)} documents" in (tmp_path / "benchmark" / "benchmark.md").read_text()
    files = (tmp_path / "int8" / "openvino").iterdir()
    assert of_export["sizes"]["weights_bytes"] == sum(file.stat().st_size for file in files)
    assert of_model["sizes"]["weights_bytes"] == 4 * of_model["sizes"]["parameters"]
    assert of_export["sizes"]["parameters"] == of_model["sizes"]["parameters"]


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_plain_model_is_computed_by_another_backend_to_the_same_vectors(bert_folder, backend):
    by_backend = Encoder.from_pretrained(bert_folder, backend=backend, dtype="fp32")
    assert (by_backend.backend, by_backend.dtype) == (backend, torch.float32)
    by_torch = Encoder.from_pretrained(bert_folder, dtype="fp32")
    np.testing.assert_allclose(by_backend.encode_documents(TEXTS), by_torch.encode_documents(TEXTS), atol=1e-5)
    assert by_backend.pack().dimension == by_torch.dimension
    assert by_backend.weights_sha256 == by_torch.weights_sha256


def test_an_index_says_what_computed_it_and_is_searched_by_that(tmp_path, exported, bert_folder, collection, toy_index):
    corpus = str(collection / "corpus.jsonl")
    index_corpus(corpus, str(exported / "onnx"), tmp_path / "by export")
    index_corpus(corpus, str(bert_folder), tmp_path / "by backend", options=EncoderOptions(backend="onnx"))
    topics = list(read_topics(str(collection / "queries.jsonl")))
    wanted = [(hit.query_id, hit.doc_id) for hit in Searcher(toy_index).search(topics)]
    for name in ("by export", "by backend"):
        info = read_index_info(tmp_path / name)
        assert (info.backend, info.dtype) == ("onnx", "float32")
        assert info.versions["onnxruntime"] == onnxruntime.__version__
    searcher = Searcher(tmp_path / "by export")
    assert searcher.encoder.backend == "onnx"
    assert [(hit.query_id, hit.doc_id) for hit in searcher.search(topics)] == wanted
    # Of the very same weights, torch may encode the queries as well; of "auto" it is the index's.
    by_torch = Searcher(tmp_path / "by backend", options=EncoderOptions(backend="torch"))
    assert by_torch.encoder.backend == "torch"
    assert [(hit.query_id, hit.doc_id) for hit in by_torch.search(topics)] == wanted
    assert Searcher(tmp_path / "by backend", options=EncoderOptions(backend="auto")).encoder.backend == "onnx"
    # An export gives the vectors of its model, so it may encode queries for that one's index; not the other way round.
    by_export = Searcher(toy_index, str(exported / "onnx"))
    assert by_export.encoder.backend == "onnx"
    assert [(hit.query_id, hit.doc_id) for hit in by_export.search(topics)] == wanted
    with pytest.raises(UserError, match="this encoder is not the index's: weights"):
        Searcher(tmp_path / "by export", str(bert_folder))


def test_a_job_that_one_backend_began_is_not_continued_by_another(tmp_path, bert_folder, corpus):
    from effir_search.indexing.resume import settings_of
    from effir_search.indexing.store import Store

    by_torch = Encoder.from_pretrained(bert_folder, dtype="fp32")
    by_onnx = by_torch.as_graph("onnx", torch.float32)
    store = Store(tmp_path / "index.parts")
    store.path.mkdir()
    store.begin(settings_of(by_torch, "of a corpus"))
    with pytest.raises(UserError, match="backend is torch there and onnx now"):
        store.begin(settings_of(by_onnx, "of a corpus"))
    # Nor is the arithmetic of the first one a riddle of the second, which has it not.
    store = Store(tmp_path / "of openvino.parts")
    store.path.mkdir()
    store.begin(settings_of(by_torch.as_graph("openvino", torch.bfloat16), None))
    with pytest.raises(UserError, match="backend is openvino there and onnx now"):
        index_corpus(str(corpus), str(bert_folder), tmp_path / "of openvino", options=EncoderOptions(backend="onnx"))
    assert settings_of(by_onnx, None).versions["onnxruntime"] == onnxruntime.__version__


def test_auto_takes_the_fastest_backend_that_keeps_the_vectors(tmp_path, monkeypatch, bert_folder, collection, caplog):
    caplog.set_level("INFO")
    auto = EncoderOptions(backend="auto", dtype="fp32")
    index_corpus(str(collection / "corpus.jsonl"), str(bert_folder), tmp_path / "index", options=auto)
    (message,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("documents a sec")]
    speeds = {backend: float(message.split(f"{backend} ")[1].split()[0]) for backend in ("torch", "onnx", "openvino")}
    chosen = read_index_info(tmp_path / "index").backend
    assert message.endswith(f"{chosen} encodes")
    assert speeds[chosen] == max(speeds.values())
    monkeypatch.setattr(fastest, "LEAST_COSINE", 1.1)  # which none can have
    assert fastest.fastest_options(str(bert_folder), TEXTS, auto).backend == "torch"


def test_what_an_export_cannot_do_is_told(tmp_path, monkeypatch, exported, bert_folder, collection, texts):
    with pytest.raises(
        UserError, match="was exported to onnx and has no weights, which torch needs; give the model it was made from"
    ):
        Encoder.from_pretrained(exported / "onnx", backend="torch")
    with pytest.raises(UserError, match="was exported to onnx and has no weights, so --backend openvino cannot"):
        Encoder.from_pretrained(exported / "onnx", backend="openvino")
    with pytest.raises(UserError, match="--dtype saved: the backend openvino computes in fp32 and bf16"):
        Encoder.from_pretrained(bert_folder, backend="openvino", dtype="saved")
    with pytest.raises(UserError, match="the backend onnx computes in fp32, not in bfloat16"):
        Encoder.from_pretrained(exported / "onnx", dtype="bf16")
    with pytest.raises(UserError, match="computes on the CPU alone"):
        Encoder.from_pretrained(bert_folder, backend="openvino", device="cuda")
    for command in (
        ("prune", "--encoder", exported / "onnx", "--drop-mlp-layers", "1"),
        ("analyze", "--encoder", exported / "onnx", "--texts", texts, "--dtype", "fp32"),
        ("export", exported / "onnx", "--to", "openvino"),
        ("compress", "--encoder", exported / "onnx", "--texts", texts),
        ("finetune", "--encoder", exported / "onnx", "--texts", texts, "--teacher", bert_folder),
    ):
        done = run_command(*command, "--output", tmp_path / command[0])
        assert done.returncode == 1
        assert "has no weights, which torch needs; give the model it was made from" in done.stderr.splitlines()[-1]
    with pytest.raises(FileExistsError):
        export_graph(str(bert_folder), exported / "onnx", TO_ONNX)
    found = graph_model.importlib.util.find_spec
    monkeypatch.setattr(
        graph_model.importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name)
    )
    with pytest.raises(ModuleNotFoundError) as raised:
        export_graph(str(bert_folder), tmp_path / "new", TO_OPENVINO)
    assert is_for_users(raised.value)
    assert describe_error(raised.value).startswith("openvino is not installed; pip install '.[export]'")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            transformers.LongformerConfig(**SIZES, attention_window=8),
            "torch cannot write a longformer as an ONNX graph: Failed to export the model with torch.export",
        ),
        (
            transformers.Phi3Config(
                **SIZES,
                rope_parameters={
                    **{"rope_type": "longrope", "rope_theta": 100.0, "factor": 6.0},
                    **{"short_factor": [1.0] * 4, "long_factor": [5.0] * 4, "original_max_position_embeddings": 16},
                },
            ),
            "a phi3 with longrope, whose RoPE depends on the length of a text, cannot be a graph",
        ),
    ],
    ids=["longformer", "longrope"],
)
def test_a_model_that_cannot_be_a_graph_is_told_in_a_line_and_auto_takes_torch(tmp_path, capfd, caplog, config, why):
    caplog.set_level("INFO")
    AutoModel.from_config(config).save_pretrained(tmp_path)
    word_tokenizer(bos=True, eos=True).save_pretrained(tmp_path)
    capfd.readouterr()
    with pytest.raises(UserError, match=re.escape(why)) as raised:
        Encoder.from_pretrained(tmp_path, backend="onnx")
    assert "\n" not in str(raised.value) and "def forward" not in capfd.readouterr().err
    auto = EncoderOptions(backend="auto", dtype="fp32")
    assert fastest.fastest_options(str(tmp_path), TEXTS, auto).backend == "torch"
    assert f"torch encodes: {raised.value}" in caplog.text


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_cut_graph_is_one_line(tmp_path, exported, backend):
    folder = shutil.copytree(exported / backend, tmp_path / "cut")
    file = folder / graph_model.GRAPH_FILES[backend]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="its graph is damaged"):
        Encoder.from_pretrained(folder)
    (folder / "effir_export.json").unlink()  # as in a folder that another program made
    with pytest.raises(UserError, match="cut, damaged or no .* model; export it again") as raised:
        Encoder.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_a_graph_whose_numbers_were_changed_is_refused(tmp_path, exported):
    folder = shutil.copytree(exported / "openvino", tmp_path / "changed")
    (folder / "openvino" / ".DS_Store").write_bytes(b"of a desktop")
    Encoder.from_pretrained(folder)  # which is no part of the graph
    file = folder / "openvino" / "openvino_model.bin"
    numbers = bytearray(file.read_bytes())
    numbers[len(numbers) // 2] ^= 255
    file.write_bytes(numbers)
    with pytest.raises(UserError, match="damaged or another than effir_export.json was written for; export it again"):
        Encoder.from_pretrained(folder)


def test_the_command_tells_what_it_made_and_refuses_what_would_be_ignored(tmp_path, bert_folder, collection, texts):
    places = [bert_folder, "--output", tmp_path / "out", "--evaluate", collection]
    done = run_command("export", *places, "--to", "openvino", "--int8", "--texts", texts, "--num-texts", 20)
    assert done.returncode == 0, done.stderr
    assert "for openvino, int8" in done.stdout and "nDCG@10" in done.stdout and "documents/s" in done.stdout
    assert "parameters" not in done.stdout  # which int8 does not change, and whose bytes torch would count
    for options, why in (
        (["--to", "onnx", "--int8", "--texts", texts], "--int8 goes with --to openvino"),
        (["--to", "openvino", "--int8"], "give --texts"),
        (["--to", "onnx", "--num-texts", 5], "goes with --int8"),
        (["--to", "onnx", "--evaluate", tmp_path / "nowhere"], "nowhere: has no corpus.jsonl"),
    ):
        done = run_command("export", bert_folder, "--output", tmp_path / "other", *options)
        assert done.returncode != 0 and why in done.stderr and not (tmp_path / "other").exists()


def test_a_family_that_cannot_be_pruned_is_compared_and_measured(tmp_path, collection):
    model = save_sentence_files(save_model(tmp_path / "t5", "t5"))
    done = run_command("export", model, "--to", "onnx", "--output", tmp_path / "out", "--evaluate", collection)
    assert done.returncode == 0, done.stderr
    assert "nDCG@10, mean" in done.stdout
    work, of_model = (
        _work(Encoder.from_pretrained(folder, dtype="fp32"), TEXTS) for folder in (tmp_path / "out", model)
    )
    assert (work.tokens, work.flops) == (of_model.tokens, None)
    assert work.sizes["parameters"] == of_model.sizes["parameters"]


def test_the_bytes_of_an_export_are_those_of_its_graph(exported):
    """Not those that its parameters had in torch's types, which int8 is none of."""
    work = _work(Encoder.from_pretrained(exported / "openvino", dtype="bf16"), TEXTS)
    files = (exported / "openvino" / "openvino").iterdir()
    assert work.sizes["weights_bytes"] == sum(file.stat().st_size for file in files)


def test_the_model_beside_an_export_reads_as_the_export_was_told_to(tmp_path, bert_folder, texts):
    """Of 5 tokens a text, both give the same vectors; a model of its own length gave others."""
    to_onnx, options = ExportSettings(to="onnx", texts=(texts,)), EncoderOptions(max_length=5)
    export_graph(str(bert_folder), tmp_path / "out", to_onnx, options)
    measured = compare_export(str(bert_folder), tmp_path / "out", to_onnx, EvaluationSettings(), options)
    assert measured.cosine > 0.999


@pytest.mark.parametrize(("number", "warns"), [(5, False), (40, False), (41, True)])
def test_fewer_texts_than_asked_for_are_warned_of(tmp_path, bert_folder, texts, caplog, number, warns):
    """There are 60: of three two are for ranges, one is compared on."""
    settings = ExportSettings(to="openvino", int8=True, texts=(texts,), num_texts=number)
    calibration, compared = _texts(settings)
    assert len(calibration.texts) == min(number, 40) and len(compared) == len(calibration.texts) // 2
    assert ("all that there are" in caplog.text) is warns
    caplog.clear()
    _texts(ExportSettings(to="openvino", texts=(texts,)))
    assert not caplog.records


def test_a_graph_of_another_program_is_an_encoder_too_unless_it_takes_more(tmp_path, exported, bert_folder):
    import onnx

    folder = shutil.copytree(exported / "onnx", tmp_path / "foreign")
    (folder / "effir_export.json").unlink()
    np.testing.assert_array_equal(vectors(folder), vectors(exported / "onnx"))
    _, facts = describe_model(str(folder))
    assert facts["exported_to"] == "onnx" and "exported_from" not in facts
    file = folder / graph_model.GRAPH_FILES["onnx"]
    graph = onnx.load(file)
    graph.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, [None, None]))
    onnx.save(graph, file)
    with pytest.raises(UserError, match="takes .*position_ids and gives last_hidden_state, so it is no text encoder"):
        Encoder.from_pretrained(folder)
