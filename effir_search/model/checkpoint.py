"""Load a transformer and its tokenizer from a folder: strictly, safely, and with a hash of the weights."""

import hashlib
import json
import pickle
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from effir_search.errors import UserError
from effir_search.files.reading import file_sha256, read_json
from effir_search.model.graph_model import GRAPH_FILES, OWN_CONFIG, graph_backend, graph_files
from effir_search.model.modeling_effir import EffirConfig

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")

# What the hub is asked for: no code, and no pickle but weights of which there are no others.
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")

# How huggingface_hub looks in its cache alone.
CACHE = {"local_files_only": True}

# What LoRA adapters may have besides; effir convert reads pickles without running what they hold.
ADAPTER_FILES = ("*adapter_model.bin", "*embedding/*.pth")

# The file beside the weights of this project's models, which run by the same code as it is installed.
OWN_CODE = "modeling_effir."

# What LLM-Drop's files are called, before the name of the family.
LLM_DROP_CODE = ("configuration_dropped_", "modeling_dropped_")

# Where LLM-Drop's config.json says what was dropped.
DROP_LISTS = {"mlp": "drop_mlp_list", "attention": "drop_attn_list"}

# What files and folders are called that have a name of their own only together with the folder they are in.
COMMON = ("model", "corpus", "queries", "train")

# What transformers, safetensors and torch raise about a folder or a file that is damaged or is something else.
LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, IndexError, EOFError, struct.error, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


def resolve_model(name: str | Path, *, adapter: bool = False) -> Path:
    """Return the folder of a model: the path itself, or that of a hub model, downloaded if the cache lacks it.

    Args:
        name: Folder or hub name.
        adapter: Whether it may be a LoRA adapter.

    Raises:
        OSError: Neither a folder nor a hub model that can be had.
        ValueError: A LoRA adapter, where it must not be one.
    """
    folder = Path(name)
    if not folder.exists():
        patterns = [*HUB_FILES, *(ADAPTER_FILES if adapter else ())]
        # A cache filled by another command lacks an adapter's own files without a sign, so the hub is asked first.
        folder = _from_hub(str(name), patterns, *([] if adapter else [CACHE]), {}, needed=WEIGHTS)
    return _checked(folder, name, adapter=adapter)


@contextmanager
def model_configs(name: str | Path) -> Iterator[Path]:
    """Give a folder with a model's JSON files: of a hub model that is not in the cache a temporary one, no weights.

    So a config can be looked at before gigabytes are fetched.

    Raises:
        OSError: As ``resolve_model``.
        ValueError: Likewise.
    """
    folder = Path(name)
    with tempfile.TemporaryDirectory() as temporary:
        if not folder.exists():
            folder = _from_hub(str(name), ["*.json"], CACHE, {"local_dir": temporary}, needed=["config.json"])
        yield _checked(folder, name)


def _checked(folder: Path, name: str | Path, *, adapter: bool = False) -> Path:
    if not folder.is_dir():
        advice = "; effir convert makes one of it" if folder.suffix == ".gguf" else ""
        raise NotADirectoryError(
            f"{name}: is a file; a model is a folder with config.json and model.safetensors{advice}"
        )
    if not adapter and (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{name}: is a LoRA adapter; merge it into its base model first (peft's merge_and_unload, or effir convert "
            "where layers were dropped)"
        )
    return folder


def load_transformer(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device, stock_architecture: bool = False
) -> PreTrainedModel:
    """Return a folder's transformer in eval mode, without LM head, its cache off; of an encoder-decoder, the encoder.

    Its dtype is the given one or, for None, that of the weights.

    Nothing in the folder is executed, and nothing is left to random numbers but the pooler, whose output is not used.

    Args:
        folder: The model's.
        dtype: Of the weights.
        device: Where they go.
        stock_architecture: See ``check_stock``.

    Raises:
        ValueError: No model folder, an unknown architecture, code of its own, or a weight that is missing, damaged or
            of another shape.
    """
    config = _read_config(folder, stock_architecture)
    for file in weight_files(folder):
        check_whole(file)
    with named_errors(folder):
        model, report = _auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    problems = [f"no tensor {key}" for key in sorted(report["missing_keys"]) if not key.startswith("pooler.")]
    problems += [
        f"{key} has shape {list(found)}, not {list(wanted)}" for key, found, wanted in report["mismatched_keys"]
    ]
    problems += list(report["error_msgs"])
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: {problems[0]} ({len(problems)} such problems)")
    return model.to(device).eval()


def empty_transformer(folder: Path, *, stock_architecture: bool = False) -> PreTrainedModel:
    """Return a folder's transformer on the meta device: all shapes, no weights, no memory.

    Of an exported model, whose weights are in a graph, that is what it was made from.
    """
    config = _read_config(folder, stock_architecture)
    with named_errors(folder), torch.device("meta"):
        return _auto_class(config).from_config(config, trust_remote_code=False)


def _read_config(folder: Path, stock_architecture: bool) -> PretrainedConfig:
    graphs = tuple(map(str, GRAPH_FILES.values()))
    for names in (("config.json",), (*WEIGHTS, *graphs), TOKENIZERS):
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{folder}: no {' or '.join(names[:3])} in it, so it is not a Hugging Face text encoder")
    file = folder / (OWN_CONFIG if (folder / OWN_CONFIG).is_file() else "config.json")
    check_config(file, stock_architecture=stock_architecture)
    with named_errors(folder):
        config = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    config.__dict__.pop("auto_map", None)  # the code it names will not lie beside a copy that is saved
    config.use_cache = False
    return config


def read_config_file(path: Path, *, stock_architecture: bool = False) -> PretrainedConfig:
    """Return the config of a model from its config.json alone; nothing else is needed, nor downloaded.

    Args:
        path: The file.
        stock_architecture: See ``check_stock``.

    Raises:
        ValueError: No config, or of an architecture that transformers does not know, or of code of its own.
        OSError: The file cannot be read.
    """
    settings = check_config(path, stock_architecture=stock_architecture)
    settings.pop("auto_map", None)
    with named_errors(path):
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


def check_config(path: Path, *, stock_architecture: bool = False) -> dict:
    """Return what a config.json says, if transformers' stock model is what it describes; see ``check_stock``.

    Raises:
        ValueError: No config of a model, one of code of its own, or LLM-Drop's of a model without some parts.
        OSError: The file cannot be read.
    """
    settings = read_json(path)
    if "model_type" not in settings:
        raise UserError(f"{path}: no model_type, so it is not a Hugging Face model's config")
    _check_whole_layers(settings, path)
    check_stock(path, stock_architecture=stock_architecture)
    return settings


def check_stock(path: Path, *, stock_architecture: bool = False) -> None:
    """Raise ValueError if a config.json or tokenizer_config.json names code of the model's own, which is never run.

    The weights would then run through transformers' stock model of that type, for which they may not have been made:
    gte-Qwen2 attends in both directions by its own code, the stock model in one. What this project's code and
    LLM-Drop's do is known.

    Args:
        path: The file; it need not be there.
        stock_architecture: Whether that is wanted.
    """
    settings = read_json(path) if path.is_file() else {}
    kind = settings.get("model_type")
    known = (OWN_CODE,) if kind == EffirConfig.model_type else ()
    known += LLM_DROP_CODE if settings.keys() & {*DROP_LISTS.values()} else ()
    code = [name for name in _strings(settings.get("auto_map")) if not name.rpartition("--")[2].startswith(known)]
    if not code:
        return
    if kind is not None and kind not in CONFIG_MAPPING:
        raise UserError(
            f"{path}: names code of its own ({code[-1]}), which is not run, and transformers has no model of type "
            f"{kind!r} to take instead"
        )
    if not stock_architecture:
        stock = f"model of type {kind!r}" if kind is not None else "tokenizer"
        raise UserError(
            f"{path}: names code of its own ({code[-1]}), which is not run; --stock-architecture takes transformers' "
            f"stock {stock} instead, whose vectors may be others"
        )


def _strings(value: object) -> list[str]:
    """Return the names of classes in an auto_map: of a dict, a list or one name."""
    if isinstance(value, dict | list):
        return [name for part in (value.values() if isinstance(value, dict) else value) for name in _strings(part)]
    return [] if value is None else [str(value)]


def _check_whole_layers(settings: dict[str, object], path: Path) -> None:
    """Raise ValueError for LLM-Drop's config of a model without some parts, which transformers would not leave out."""
    for name in DROP_LISTS.values():
        value = settings.get(name)
        if isinstance(value, list) and any(item is not False for item in value):
            raise UserError(
                f"{path}: is an LLM-Drop checkpoint ({name}), whose dropped parts would take part again; "
                "effir convert makes it a model of this project"
            )


def _auto_class(config: PretrainedConfig) -> type[AutoModel | AutoModelForTextEncoding]:
    """The class of an encoder alone, where there is a decoder or, as in a T5EncoderModel that was saved, was one."""
    return AutoModelForTextEncoding if config.is_encoder_decoder or type(config).is_encoder_decoder else AutoModel


def load_tokenizer(folder: Path, model: nn.Module, *, stock_architecture: bool = False) -> PreTrainedTokenizerBase:
    """Return a folder's tokenizer.

    Args:
        folder: The model's.
        model: What reads its tokens.
        stock_architecture: See ``check_stock``.

    Raises:
        ValueError: It cannot be read, is not a fast one, is code of its own, or has more tokens than the model has
            embeddings.
    """
    check_stock(folder / "tokenizer_config.json", stock_architecture=stock_architecture)
    with named_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.init_kwargs.pop("auto_map", None)
    check_tokenizer(tokenizer, model, folder)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module, folder: Path) -> None:
    """Raise ValueError for a tokenizer that is no fast one, or has more tokens than the model has embeddings."""
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: {type(tokenizer).__name__} is no fast tokenizer; a tokenizer.json is needed")
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model embeddings for {num_embeddings}"
        )


def weights_sha256(folder: Path, places: Sequence[Path]) -> str:
    """Return the SHA-256 of a model's weights: of the file where there is one, else of the ``sha256sum`` lines of all.

    Args:
        folder: The model's folder, which the names in those lines are relative to.
        places: The folders, in or below it, whose weight files count: the transformer's and those of Dense modules.
    """
    files = [file for place in places for file in weight_files(place)]
    digests = [(file_sha256(file), file.relative_to(folder).as_posix()) for file in files]
    if len(digests) == 1:
        return digests[0][0]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in digests).encode()).hexdigest()


def weight_files(place: Path) -> list[Path]:
    """Return the weight files that loading reads from one folder, in the order of their names; else its graph's."""
    name = next((name for name in WEIGHTS if (place / name).is_file()), None)
    if name is None:
        return graph_files(place)
    if name.endswith(".index.json"):
        return [place / shard for shard in sorted(set(read_json(place / name).get("weight_map", {}).values()))]
    return [place / name]


def exported_backend(place: Path) -> str | None:
    """Return the backend whose graph a folder has in place of weights, as ``effir export`` writes it; None = it has."""
    return None if any((place / name).is_file() for name in WEIGHTS) else graph_backend(place)


def check_whole(path: Path) -> None:
    """Raise ValueError if a safetensors file has not the number of bytes that its header says; others are not checked.

    Source: github.com/huggingface/safetensors, README.md, section Format.
    """
    if path.suffix != ".safetensors":
        return
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: cut or damaged, its header cannot be read; get it again") from error
    if size != expected:
        raise UserError(f"{path}: cut or damaged, {size:,} bytes and its header says {expected:,}; get it again")


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's own name of a type of numbers, as in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def hub_revision(folder: Path) -> str | None:
    """Return the revision of a model folder that lies in the Hugging Face cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def lasting_name(name: str) -> str:
    """Return a name that holds on other machines: a hub name, or the last part of a path; the last two of ``COMMON``.

    Of a folder in the Hugging Face cache it is the hub name.
    """
    path = Path(name).resolve()
    if not path.exists():
        return name
    if path.parent.name == "snapshots":
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return f"{path.parent.name}/{path.name}" if path.name.split(".")[0] in COMMON else path.name


def _from_hub(name: str, patterns: Sequence[str], *ways: dict[str, object], needed: Sequence[str]) -> Path:
    """Return the folder with a hub model's files of these names, by the first of ways that gets one of those needed."""
    for way in ways:
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(patterns), **way))
            # A cache may hold no more than the config or the tokenizer that another program looked at.
            if way != ways[-1] and not any(any(folder.rglob(file)) for file in needed):
                continue
            if needed == WEIGHTS and (older := _older_weights(folder)):
                if way != ways[-1]:
                    continue
                snapshot_download(name, allow_patterns=older, **way)
            return folder
        except HFValidationError as error:
            raise FileNotFoundError(f"{name}: no such model folder") from error
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            failure = error
    unreachable = f"{name}: no such folder, and no such model in the Hugging Face cache or reachable on the hub"
    raise FileNotFoundError(unreachable) from failure


def _older_weights(folder: Path) -> list[str]:
    """Return the names of PyTorch's weights for those parts of a hub model of which there are no weights so far."""
    names = []
    for config in (folder / "config.json", *sorted(folder.glob("[0-9]_*/config.json"))):
        # Transformers have a model_type, Dense modules in_features; other modules have no weights.
        has_weights = config.is_file() and read_json(config).keys() & {"model_type", "in_features"}
        files = weight_files(config.parent)
        if has_weights and not (files and all(file.is_file() for file in files)):
            names.append(config.with_name("pytorch_model*.bin").relative_to(folder).as_posix())
    return names


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Keep transformers quiet, and turn what it, safetensors and torch raise about a place into one ValueError."""
    try:
        with quiet_transformers():
            yield
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be loaded: {reason[:150]}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside the block, let transformers neither warn nor draw progress bars."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
