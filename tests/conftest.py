"""Tiny real models, a word-level tokenizer and a toy collection, all built in code."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from processes import Command, run_command
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

os.environ["HF_HUB_OFFLINE"] = "1"
# With so much imported, a pass of the collector over all objects takes a tenth of a second.
gc.set_threshold(100_000, 50, 100)

WORDS = (
    "a an and apple banana bread butter cat cheese chases cream dog drinks eats egg fish flour fresh fruit "
    "garden green grows honey hot in is it jam kitchen lemon makes market milk mouse of oil on onion orange "
    "oven pear pepper pie plum red rice salt sells sleeps small soup sugar sweet table tea the tomato tree "
    "under warm water with yellow ? ."
).split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]

DOCUMENTS = {
    "001": ("cat", "the cat chases the small mouse under the table ."),
    "002": ("dog", "the dog sleeps in the warm kitchen ."),
    "003": ("", "a fresh apple grows on the green tree in the garden ."),
    "004": ("bread", "flour , water and salt make bread in the hot oven ."),
    "005": ("", "the market sells cheese , butter , milk and cream ."),
    "006": ("tea", ""),
    "007": ("lemon", "tea with lemon and honey is sweet and warm ."),
    "008": ("soup", "hot tomato soup with onion , pepper and oil ."),
    "009": ("fish", "the cat eats fish and drinks milk ."),
    "010": ("", ""),
    "011": ("jam", "plum jam and orange jam with sugar on bread ."),
    "012": ("pie", "an apple pie with egg , butter , flour and sugar ."),
}
TOPICS = {"1": "what eats the cat ?", "2": "hot soup", "007": "sweet tea"}
QRELS = {("1", "009"): 2, ("1", "001"): 1, ("2", "008"): 1, ("2", "002"): 0, ("007", "007"): 1, ("007", "006"): 1}
# Texts of every length; the last three are longer than a short model reads, or short.
TEXTS = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()] + [
    "the " * 100,
    "cat",
    "red yellow orange plum " * 9,
]
QUERIES = ["what eats the cat ?", "hot soup", "tea " * 80]
# Of the fixture ``corpus``: twelve parts of 1,024, and a bit.
NUM_DOCUMENTS = 12 * 1024 + 100


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start processes come first: they take longest, so no process has one left at the end."""
    slow = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in slow)


def word_tokenizer(*, bos: bool = False, eos: bool = False, **options: object) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of some 70 words; ``bos`` and ``eos`` say what its post-processor adds."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos or eos:
        single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
        )
    names = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, "model_max_length": 64, **options})


def tiny_config(family: str) -> PretrainedConfig:
    """A config of 4 layers, hidden size 32 and intermediate size 48."""
    sizes = dict(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    decoder = sizes | dict(num_key_value_heads=2, head_dim=8)
    match family:
        case "bert":
            return transformers.BertConfig(**sizes)
        case "roberta":
            return transformers.RobertaConfig(**sizes)
        case "xlm_roberta":
            return transformers.XLMRobertaConfig(**sizes)
        case "mpnet":
            return transformers.MPNetConfig(**sizes)
        case "modernbert":
            return transformers.ModernBertConfig(**sizes, cls_token_id=1, sep_token_id=2)
        case "llama":
            return transformers.LlamaConfig(**decoder)
        case "mistral":
            return transformers.MistralConfig(**decoder, sliding_window=None)
        case "qwen2":
            return transformers.Qwen2Config(**decoder)
        case "qwen3":
            return transformers.Qwen3Config(**decoder)
        case "gemma2":
            return transformers.Gemma2Config(**decoder)
        case "gemma3":
            return transformers.Gemma3TextConfig(**decoder)
        case "t5":
            return transformers.T5Config(
                vocab_size=sizes["vocab_size"], d_model=32, d_ff=48, d_kv=8, num_layers=4, num_heads=4,
                pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
            )  # fmt: skip
    raise KeyError(family)


FAMILIES = ("bert", "roberta", "mpnet", "modernbert", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "t5")
DECODERS = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"}

# Those that can be pruned.
PRUNABLE = (*FAMILIES[:-1], "xlm_roberta")


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """A model in eval mode with larger weights, and random biases and norms, so that no error hides behind a 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1).add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def prunable_model(family: str) -> PreTrainedModel:
    """A seeded tiny model in eval mode, its biases and norms random too; kinds of attention mixed where they can be."""
    config = tiny_config(family)
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    match family:
        case "mistral":
            config.sliding_window = 4
        case "qwen2":
            config.use_sliding_window, config.sliding_window, config.layer_types = True, 4, types
        case "gemma2" | "gemma3":
            config.sliding_window, config.layer_types = 4, types
        case "modernbert":
            config.local_attention, config.layer_types = 8, types
    torch.manual_seed(sum(map(ord, family)))
    model = AutoModel.from_config(config)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return randomized(model)


def save_model(folder: Path, family: str, *, causal: bool = False, **tokenizer_options: object) -> Path:
    """Save a tiny model with seeded random weights, as a plain Hugging Face folder."""
    torch.manual_seed(sum(map(ord, family)))
    model = (AutoModelForCausalLM if causal else AutoModel).from_config(tiny_config(family))
    # Initial weights are so small that all texts get much the same vector; larger ones tell errors apart.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    specials = {"bos": True, "eos": family not in DECODERS}
    word_tokenizer(**{**specials, **tokenizer_options}).save_pretrained(folder)
    return folder


def save_sentence_files(
    folder: Path,
    *,
    pooling: str = "mean",
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
    similarity: str | None = "cosine",
    max_length: int | None = None,
    include_prompt: bool = True,
) -> Path:
    """Put sentence-transformers' files beside a model, as its older versions wrote them."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    flags |= {"weightedmean": "weightedmean_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens"}
    settings = {f"pooling_mode_{flag}": name == pooling for name, flag in flags.items()}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "include_prompt": include_prompt, **settings})
    )
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": max_length, "do_lower_case": False})
    )
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": prompts or {}, "default_prompt_name": None, "similarity_fn_name": similarity})
    )
    return folder


def save_cross_encoder(folder: Path, *, num_labels: int = 1) -> Path:
    """Save a tiny BERT with a layer that scores pairs."""
    torch.manual_seed(3)
    config = tiny_config("bert")
    config.num_labels = num_labels
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    word_tokenizer(bos=True, eos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with mean pooling and normalisation."""
    return save_sentence_files(save_model(tmp_path_factory.mktemp("bert"), "bert"))


@pytest.fixture(scope="session")
def encoder(bert_folder: Path):
    """The tiny BERT in float32; tests do not change it."""
    from effir_search.encoding.encoder import Encoder

    return Encoder.from_pretrained(bert_folder, dtype="fp32")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a causal language model, without sentence-transformers' files; its tokenizer adds BOS only."""
    return save_model(tmp_path_factory.mktemp("llama"), "llama", causal=True)


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny cross-encoder."""
    return save_cross_encoder(tmp_path_factory.mktemp("reranker"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 60 texts of random words."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("".join(" ".join(rng.choice(WORDS, rng.integers(3, 12))) + "\n" for _ in range(60)))
    return str(path)


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that makes a compression of a tiny model short."""
    path = tmp_path_factory.mktemp("recipe") / "short.toml"
    path.write_text("[prune]\nnum_texts = 16\n[slim]\nsteps = 2\nbatch_size = 8\n[finetune]\nbf16 = false\n")
    return path


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the BEIR layout: 12 documents, 3 topics, 6 judgments."""
    folder = tmp_path_factory.mktemp("collection")
    write_jsonl(folder / "corpus.jsonl", [{"_id": i, "title": t, "text": x} for i, (t, x) in DOCUMENTS.items()])
    write_jsonl(folder / "queries.jsonl", [{"_id": query_id, "text": text} for query_id, text in TOPICS.items()])
    (folder / "qrels").mkdir()
    rows = [f"{query_id}\t{doc_id}\t{grade}\n" for (query_id, doc_id), grade in QRELS.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


@pytest.fixture(scope="session")
def toy_index(tmp_path_factory: pytest.TempPathFactory, collection: Path, bert_folder: Path) -> Path:
    """The toy corpus indexed with the tiny BERT; tests copy it before they damage it."""
    from effir_search.indexing.build import index_corpus
    from effir_search.settings import EncoderOptions

    index_dir = tmp_path_factory.mktemp("indexes") / "toy"
    index_corpus(str(collection / "corpus.jsonl"), str(bert_folder), index_dir, options=EncoderOptions(dtype="fp32"))
    return index_dir


@pytest.fixture(scope="session")
def bm25_index(tmp_path_factory: pytest.TempPathFactory, collection: Path) -> Path:
    """The toy corpus indexed for BM25; tests copy it before they damage it."""
    from effir_search.searching.bm25 import index_bm25

    index_dir = tmp_path_factory.mktemp("bm25") / "toy"
    index_bm25(str(collection / "corpus.jsonl"), index_dir)
    return index_dir


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many documents that a store has parts of them, of many lengths."""
    words = ["cat", "dog", "soup", "tea", "red", "green", "hot", "sweet"]
    rng = np.random.default_rng(0)
    records = [
        {"_id": f"d{number:05}", "text": " ".join(rng.choice(words, size=rng.integers(0, 20)))}
        for number in range(NUM_DOCUMENTS)
    ]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", records)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path, bert_folder: Path) -> Path:
    """The index of an undisturbed job; tests copy it before they damage it."""
    index_dir = tmp_path_factory.mktemp("whole") / "index"
    places = ["--corpus", corpus, "--encoder", bert_folder, "--output", index_dir]
    done = run_command("index", *places, "--threads", 1, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    return index_dir


@pytest.fixture
def pyserini_folder(tmp_path: Path, toy_index: Path) -> Path:
    """The toy index as Pyserini would write it, without a record."""
    for name in ("index", "docid"):
        shutil.copy(toy_index / name, tmp_path / name)
    return tmp_path


def kill_when_there(process: Command, file: Path) -> None:
    """Kill a process at work with SIGKILL as soon as it has written a file."""
    while not file.is_file():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def list_in_manifest(store: Path, without: list[str]) -> None:
    """Make a store one of an earlier version, whose manifest lists the parts, without some fields."""
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["parts"] = {}
    for line in (store / "parts.jsonl").read_text().splitlines():
        record = json.loads(line)
        number = str(record.pop("number"))
        manifest["parts"][number] = {name: value for name, value in record.items() if name not in without}
    (store / "manifest.json").write_text(json.dumps(manifest))
    (store / "parts.jsonl").unlink()


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# The kernel counts a program's peak from that of the process which started it, so a small one does.
MEASURE = """
import resource, subprocess, sys
from effir_search.settings import EncoderOptions

subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(command: list[str]) -> int:
    """Run a command that must succeed and return the most bytes of memory it had."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024
