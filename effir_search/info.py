"""What is in a folder: an index, with what it was built from, or a model, with its sizes and settings."""

import json
from dataclasses import asdict
from pathlib import Path

from effir_search.encoder import EncoderConfig, own_config
from effir_search.index import DOCID_FILE, INFO_FILE, read_index, read_index_info
from effir_search.model.checkpoint import empty_transformer, load_tokenizer, resolve_model, weight_files, weights_sha256
from effir_search.model.sentence_files import read_sentence_files

Facts = dict[str, object]


def describe(model_or_index: str, form: str = "text") -> str:
    """Return a description of an index folder or a model: ``effir info``.

    Args:
        model_or_index: Index folder, model folder or hub name.
        form: "text" or "json".

    Raises:
        ValueError: A folder that is neither.
        OSError: A file cannot be read.
    """
    path = Path(model_or_index)
    is_index = (path / DOCID_FILE).is_file() or (path / INFO_FILE).is_file()
    facts = describe_index(path) if is_index else describe_model(model_or_index)
    if form == "json":
        return json.dumps(facts, indent=2, ensure_ascii=False)
    width = max(map(len, facts))
    return "\n".join(f"{name.replace('_', ' '):{width}}  {_plain(value)}" for name, value in facts.items())


def describe_index(index_dir: Path) -> Facts:
    """Return what an index folder holds, and what it was built from where it says so."""
    index, doc_ids = read_index(index_dir)
    facts: Facts = {"index": str(index_dir), "documents": index.ntotal, "dimension": index.d}
    facts["bytes"] = sum(file.stat().st_size for file in index_dir.iterdir())
    facts["first_ids"] = doc_ids[:3]
    info = read_index_info(index_dir)
    if info is None:
        return facts | {"built_by": f"another program: no {INFO_FILE}, so a search needs --encoder"}
    facts |= {f"encoder_{name}": value for name, value in _settings(info.encoder).items()}
    shown_above = ("encoder", "num_documents", "dimension")
    return facts | {name: value for name, value in asdict(info).items() if name not in shown_above}


def describe_model(name: str) -> Facts:
    """Return the sizes of a model, counted from its config on the meta device, and its settings as an encoder."""
    folder = resolve_model(name)
    files = read_sentence_files(folder)
    model = empty_transformer(files.transformer_folder)
    settings = own_config(files, model, load_tokenizer(files.transformer_folder, model))
    embeddings = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    parameters = model.num_parameters()
    config = model.config
    places = [files.transformer_folder, *(place for kind, place in files.head if kind == "Dense")]
    facts: Facts = {"model": name, "architecture": type(model).__name__, "model_type": config.model_type}
    for size in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        facts[size] = getattr(config, size, None)
    return facts | {
        "parameters": parameters,
        "parameters_without_embeddings": parameters - embeddings,
        "weights_bytes": sum(file.stat().st_size for place in places for file in weight_files(place)),
        "weights_sha256": weights_sha256(folder, places),
        **_settings(settings),
    }


def _settings(config: EncoderConfig) -> Facts:
    """The fields of a config, its dimension under a name that tells it from that of the vectors."""
    settings = asdict(config)
    dimension = settings.pop("dimension")
    return settings | {"truncate_dimension": dimension}


def _plain(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value) if str(value) else "(none)"
