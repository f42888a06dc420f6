"""Language models in GGUF, llama.cpp's format, become plain model folders: ``effir convert`` of a file.

transformers reads the file. Here is added what it leaves out without a word, and refused what cannot be.

Source: github.com/ggml-org/ggml, docs/gguf.md; github.com/ggml-org/llama.cpp, src/llama-vocab.cpp and
convert_hf_to_gguf.py.
"""

import json
import logging
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from effir_search.errors import UserError
from effir_search.files.reading import file_sha256
from effir_search.files.whole import refuse_existing, whole_folder
from effir_search.model.checkpoint import check_tokenizer, named_errors, quiet_transformers
from effir_search.model.families import FAMILIES

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
# Packages of the extra "gguf".
PACKAGES = ("gguf", "accelerate")
# Types that hold numbers as they are; others are quantised.
PLAIN = {"F64", "F32", "F16", "BF16"}
# Wavelengths of RoPE that Llama 3 lengthens: the same in all its models, in GGUF only as the factors that follow.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Settings of a config that transformers does not read from a file, by the file's names for them.
UNREAD = {
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Layers of Gemma models of 27 B, whose attention scores are divided otherwise than those of smaller ones.
GEMMA_27B = {("gemma2", 46), ("gemma3_text", 62)}
# How tokenizers split a text before merging bytes: as GPT-2's, and those that part digits, too.
SPLIT_AS_GPT2 = {None, "default", "gpt2", "gpt-2"}
SPLIT_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}


class Read(NamedTuple):
    """What was converted.

    Attributes:
        architecture: The model's class.
        parameters: How many numbers its weights are.
        types: How many tensors the file has of each type, by the types' names, the most frequent first.
    """

    architecture: str
    parameters: int
    types: dict[str, int]


def is_gguf(source: str | Path) -> bool:
    """Return whether this is a file that is, or by its name should be, GGUF."""
    path = Path(source)
    if not path.is_file():
        return path.suffix == ".gguf" and not path.is_dir()
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC or path.suffix == ".gguf"


def convert_gguf(source: Path, output: Path, *, bidirectional: bool = False) -> Read:
    """Write the causal language model in a GGUF file as a plain folder of its stock class, whole or not at all.

    The weights are what the file's numbers stand for, in float32. Nothing in the file is executed.

    Args:
        source: The file. What lies beside it is not read.
        output: The new folder.
        bidirectional: Let every token see those after it, too, as in LLM2Vec (arXiv 2404.05961): config.json then has
            ``"is_causal": false``, which transformers heeds. The model was not trained so; fine-tuning has to.

    Raises:
        ValueError: gguf is not installed, or the file is cut, of another format, one part of several, of a model that
            transformers cannot read or not in full, or without a tokenizer; or it is to be bidirectional and of a
            family that may not heed that.
        OSError: The file cannot be read, or ``output`` exists or cannot be written.
    """
    refuse_existing(output, replaces=())
    reader = _open(source)
    types = dict(Counter(tensor.tensor_type.name for tensor in reader.tensors).most_common())
    # transformers reads tokenizers and settings that lie beside the file, too; here nothing does.
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "model.gguf").symlink_to(source.resolve())
        config = _config(source, Path(place), reader)
        if bidirectional:
            _let_see_all(config, source)
        model = _model(source, Path(place), config, reader)
        tokenizer = _tokenizer(source, Path(place), reader)
    check_tokenizer(tokenizer, model, source)
    _split_as_trained(tokenizer, source, reader)
    read = Read(type(model).__name__, model.num_parameters(), types)
    with whole_folder(output) as folder, quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(read, source, output.name, reader, bidirectional), encoding="utf-8")
    return read


def describe_read(read: Read) -> str:
    """Return a line about a converted model: its class, size, and how the file held it."""
    return f"{read.architecture}, {read.parameters / 1e6:.2f} M parameters, float32 of {_told(read.types)}"


def _open(source: Path) -> "GGUFReader":
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"{source}: reading GGUF needs {missing[0]}: pip install 'effir_search[gguf]'")
    from gguf import GGUFReader

    with open(source, "rb") as file:
        if (start := file.read(len(MAGIC))) != MAGIC:
            raise UserError(f"{source}: is no GGUF file: it begins with {start!r}, not {MAGIC!r}")
    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise UserError(f"{source}: cut or damaged GGUF file, or of an unknown version ({error})") from error
    if (parts := _value(reader, "split.count", 1)) > 1:
        raise UserError(f"{source}: is one of {parts} parts of a model; join them first (llama-gguf-split --merge)")
    if not isinstance(_value(reader, "general.architecture"), str) or not reader.tensors:
        raise UserError(f"{source}: says no architecture or has no tensors, so it is no model")
    return reader


def _value(reader: "GGUFReader", key: str, default: object = None) -> object:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _config(source: Path, place: Path, reader: "GGUFReader") -> PretrainedConfig:
    with named_errors(source):
        config = AutoConfig.from_pretrained(place, gguf_file="model.gguf", local_files_only=True)
    config.name_or_path = ""
    architecture = _value(reader, "general.architecture")
    for key, name in UNREAD.items():
        value = _value(reader, f"{architecture}.{key}")
        if value is not None and hasattr(config, name):
            setattr(config, name, value)
    if (config.model_type, getattr(config, "num_hidden_layers", None)) in GEMMA_27B:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    scaling = _value(reader, f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" and scaling not in str(config.rope_parameters):
        raise UserError(f"{source}: its RoPE is scaled ({scaling}), which transformers does not read from GGUF")
    _scale_rope(source, config, reader)
    if _value(reader, f"{architecture}.attention.causal") is False:
        _let_see_all(config, source)
    return config


def _let_see_all(config: PretrainedConfig, source: Path) -> None:
    causal = [name for name, family in FAMILIES.items() if family.causal]
    if config.model_type not in causal:
        raise UserError(f"{source}: --bidirectional goes with {', '.join(causal)}, and this is a {config.model_type}")
    config.is_causal = False


def _scale_rope(source: Path, config: PretrainedConfig, reader: "GGUFReader") -> None:
    """Set the scaling of RoPE that leads to the factors in the file, of which transformers takes no notice."""
    rope_factors = next((tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    if rope_factors is None:
        return
    factors = torch.tensor(rope_factors).float()
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 2 * len(factors), 2) / (2 * len(factors)))
    config.rope_parameters |= LLAMA3 | {"rope_type": "llama3", "factor": float(factors.max())}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if scaled.shape != factors.shape or not torch.allclose(scaled, plain / factors, rtol=1e-4, atol=0):
        raise UserError(f"{source}: the factors of RoPE in it ({ROPE_FACTORS}) are not those of a Llama 3")


def _model(source: Path, place: Path, config: PretrainedConfig, reader: "GGUFReader") -> PreTrainedModel:
    """Return the model with all of the file's weights. It cannot run: buffers that are not saved have no memory."""
    from transformers import GgufConfig

    with named_errors(source):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file="model.gguf",
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            output_loading_info=True,
        )
    problems = [f"no tensor for {key}" for key in sorted(report["missing_keys"])]
    problems += [f"{key} has shape {list(found)}, not {list(want)}" for key, found, want in report["mismatched_keys"]]
    # A tensor that transformers has no name for is passed over without a word.
    held = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != ROPE_FACTORS)
    if held != (taken := loaded.num_parameters()):
        problems.append(f"it holds {held:,} numbers, of which {type(loaded).__name__} takes {taken:,}")
    if problems:
        raise UserError(f"{source}: transformers cannot read it in full: {problems[0]} ({len(problems)} such problems)")
    # transformers does not save a model that it read from GGUF.
    plain = loaded.config.to_dict()
    plain = {name: value for name, value in plain.items() if name not in ("quantization_config", "_model_name_or_path")}
    with torch.device("meta"):
        model = type(loaded)(type(config)(**plain))
    model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _tokenizer(source: Path, place: Path, reader: "GGUFReader") -> PreTrainedTokenizerBase:
    """Return the tokenizer, without the <|endoftext|> that transformers adds to every vocabulary of bytes."""
    try:
        with named_errors(source):
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file="model.gguf", local_files_only=True)
    except Exception as error:
        if type(error) is not Exception:  # that is what tokenizers raises
            raise
        raise UserError(f"{source}: its tokenizer cannot be read: {error}") from error
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    own = set(_value(reader, "tokenizer.ggml.tokens"))
    added = [token for token in state["added_tokens"] if token["content"] in own]
    if len(added) < len(state["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state | {"added_tokens": added}))
    return tokenizer


def _split_as_trained(tokenizer: PreTrainedTokenizerBase, source: Path, reader: "GGUFReader") -> None:
    """Let a tokenizer part digits where the file asks for it: transformers takes GPT-2's way for those it lacks."""
    pre = _value(reader, "tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) or pre in SPLIT_AS_GPT2:
        return
    if pre in SPLIT_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    else:
        logger.warning(
            "%s: its tokenizer splits texts as %r, which is not known here; they are split as GPT-2's are, so some may "
            "become other tokens than in training",
            source,
            pre,
        )


def _told(types: dict[str, int]) -> str:
    return ", ".join(f"{name} ({number} tensors)" for name, number in types.items())


def _card(read: Read, source: Path, name: str, reader: "GGUFReader", bidirectional: bool) -> str:
    """Return the README.md of the folder."""
    called, licence = (_value(reader, f"general.{key}") for key in ("name", "license"))
    lines = ["---", "library_name: transformers", *([f"license: {licence}"] if licence else []), "---", f"# {name}", ""]
    lines.append(f"A {read.architecture}{f' ({called})' if called else ''}, converted from `{source.name}`:")
    lines += [_told(read.types) + f"; SHA-256 {file_sha256(source)}.", ""]
    if quantised := [kind for kind in read.types if kind not in PLAIN]:
        lines += [
            f"The source is quantised ({', '.join(quantised)}). The weights are what its numbers stand for, in "
            "float32: what quantising lost is not back.",
            "",
        ]
    if bidirectional:
        lines += ["Each token is to see those after it, too, which the model was not trained to: fine-tune it.", ""]
    pooling = "--pooling mean" if bidirectional else "--pooling last --append-eos"
    lines += [
        "## Loading",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
        f"As an encoder, to be fine-tuned: `effir finetune --encoder {name} {pooling}`.",
    ]
    return "\n".join(lines) + "\n"
