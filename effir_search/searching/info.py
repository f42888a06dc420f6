"""What is in a folder, an index or a model, and what a plan would make of a model: ``effir info``."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig

from effir_search.encoding.config import EncoderConfig, own_config
from effir_search.encoding.devices import DTYPES
from effir_search.encoding.same_space import read_spaces
from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.indexing.copies import read_copies
from effir_search.indexing.index_record import DOCID_FILE, INFO_FILE, describe_store, read_index, read_index_info
from effir_search.indexing.store import Store
from effir_search.model.arithmetic import LENGTH, empty_model, flops, format_facts, planned
from effir_search.model.arithmetic import facts as sizes_of
from effir_search.model.checkpoint import (
    check_whole,
    empty_transformer,
    exported_backend,
    load_tokenizer,
    read_config_file,
    resolve_model,
    weight_files,
    weights_sha256,
)
from effir_search.model.families import FAMILIES
from effir_search.model.graph_model import EXPORT_FILE
from effir_search.model.modeling_effir import EffirConfig
from effir_search.model.sentence_files import read_sentence_files
from effir_search.searching.bm25 import is_bm25, read_bm25_info
from effir_search.searching.pyserini_bridge import lucene_searcher
from effir_search.settings import PlanSettings, WeightDtype

Facts = dict[str, object]
# In these two facts stand the sizes of a model before and after pruning; as text they are a table.
FULL, PRUNED = "full", "pruned"
NO_PLAN = PlanSettings()


def describe(
    model_or_index: str | None,
    form: str = "text",
    *,
    config_file: Path | None = None,
    plan: PlanSettings = NO_PLAN,
    length: int = LENGTH,
    dtype: WeightDtype | None = None,
    stock_architecture: bool = False,
) -> str:
    """Return a description of an index folder, a store, a model, or a plan for a model: ``effir info``.

    Args:
        model_or_index: Index folder, store of an index job, model folder or hub name; None for a plan from a config.
        form: "text" or "json".
        config_file: A model's config.json, instead.
        plan: What would be dropped and narrowed.
        length: Tokens of the text whose FLOPs are counted.
        dtype: Of the weights whose bytes are counted, a key of ``DTYPES``; None = the model's.
        stock_architecture: As ``Encoder.from_pretrained`` takes it.

    Raises:
        ValueError: A folder that is none of these, a plan that cannot be, or a family that cannot be pruned and a plan.
        OSError: A file cannot be read.
    """
    if model_or_index is not None and config_file is not None:
        raise UserError(f"give either {model_or_index} or --config {config_file}, not both")
    if model_or_index is None and config_file is None:
        raise UserError("give a model, an index, or --config with a model's config.json")
    user_plan = plan.given()
    if config_file is not None:
        config = read_config_file(config_file, stock_architecture=stock_architecture)
        facts: Facts = {"config": str(config_file), "model_type": config.model_type}
    elif (facts := _facts_of_folder(Path(model_or_index), has_plan=bool(user_plan))) is not None:
        config = None
    else:
        config, facts = describe_model(model_or_index, length=length, stock_architecture=stock_architecture)
    if config is not None and (user_plan or config_file is not None or isinstance(config, EffirConfig)):
        facts |= compare_sizes(config, user_plan, length=length, dtype=dtype)
    return json.dumps(facts, indent=2, ensure_ascii=False) if form == "json" else _as_text(facts, length)


def _facts_of_folder(folder: Path, *, has_plan: bool) -> Facts | None:
    """Return what a folder is that is an index or a store; None for any other."""
    if is_bm25(folder):
        if has_plan:
            raise UserError(f"{folder}: is a BM25 index; a plan is for a model")
        return describe_bm25_index(folder)
    if (folder / DOCID_FILE).is_file() or (folder / INFO_FILE).is_file():
        if has_plan:
            raise UserError(f"{folder}: is an index; a plan is for a model")
        return describe_index(folder)
    if (store := Store(folder)).is_there():
        if has_plan:
            raise UserError(f"{folder}: is {describe_store(store)}; a plan is for a model")
        return facts_of_store(store)
    return None


def _as_text(facts: Facts, length: int) -> str:
    """One fact a line, and the sizes before and after pruning as a table below."""
    full, pruned = facts.get(FULL), facts.get(PRUNED)
    shown = {name: value for name, value in facts.items() if name not in (FULL, PRUNED)}
    width = max(map(len, shown))
    lines = [f"{name.replace('_', ' '):{width}}  {_plain(value)}" for name, value in shown.items()]
    return "\n".join(lines + (["", format_facts(full, pruned, length=length)] if full else []))


def compare_sizes(config: PretrainedConfig, plan: Facts, *, length: int, dtype: WeightDtype | None) -> Facts:
    """Return what a model has lost and would lose by a plan, and its sizes then beside those of the base model."""
    pruned = planned(config, **plan)
    base, width = pruned.base_config, pruned.base_config.intermediate_size
    sizes = {"length": length, "dtype": DTYPES[dtype] if dtype else base.dtype}
    lost: Facts = {}
    if isinstance(config, EffirConfig):
        lost = {
            "base_model": config.base_model,
            "mlps_dropped": [i for i, units in enumerate(config.mlp_widths) if units == 0],
            "attentions_dropped": config.dropped_attention,
            "mlps_narrowed": {f"layer {i}": units for i, units in enumerate(config.mlp_widths) if 0 < units < width},
            "criteria": list(dict.fromkeys(step["criterion"] for step in config.plan if "criterion" in step)),
        }
    if plan:  # which layers it would be is not known yet
        lost |= {"plan": ("besides, " if lost else "") + _plain(plan).replace("_", " ")}
    lost |= {"text_length": length}
    return lost | {FULL: sizes_of(empty_model(base), **sizes), PRUNED: sizes_of(empty_model(pruned), **sizes)}


def describe_index(index_dir: Path) -> Facts:
    """Return what an index folder holds, and what it was built from where it says so."""
    index, doc_ids = read_index(index_dir)
    num_copies = sum(map(len, read_copies(index_dir, index.ntotal).values()))
    facts: Facts = {"index": str(index_dir), "documents": index.ntotal + num_copies, "dimension": index.d}
    if num_copies:
        facts["documents_with_the_vector_of_another"] = num_copies
    facts["bytes"] = sum(file.stat().st_size for file in index_dir.iterdir())
    facts["first_ids"] = doc_ids[:3]
    info = read_index_info(index_dir)
    if info is None:
        return facts | {"built_by": f"another program: no {INFO_FILE}, so a search needs --encoder"}
    facts |= {f"encoder_{name}": value for name, value in _settings(info.encoder).items()}
    shown_above = ("encoder", "num_documents", "dimension")
    return facts | {name: value for name, value in asdict(info).items() if name not in shown_above}


def describe_bm25_index(index_dir: Path) -> Facts:
    """Return what a BM25 index holds, and what it was built from where it says so."""
    num_documents = int(lucene_searcher(index_dir).num_docs)
    facts: Facts = {"bm25_index": str(index_dir), "indexed_documents": num_documents}
    facts["bytes"] = sum(file.stat().st_size for file in index_dir.iterdir())
    info = read_bm25_info(index_dir)
    if info is None:
        return facts | {"built_by": "another program, such as Pyserini"}
    return facts | {name: value for name, value in asdict(info).items() if name != "num_indexed"}


def facts_of_store(store: Store) -> Facts:
    """Return what a store of embeddings is, how far its job is, and what the vectors depend on."""
    parts, settings = store.parts().values(), store.settings()
    facts: Facts = {"store": str(store.path), "state": describe_store(store)}
    facts |= {"parts": len(parts), "documents": sum(part.num_documents for part in parts)}
    facts["bytes"] = sum(file.stat().st_size for file in store.path.iterdir())
    if settings is None:
        return facts
    facts |= {f"encoder_{name}": value for name, value in _settings(EncoderConfig(**settings.encoder)).items()}
    return facts | {name: value for name, value in asdict(settings).items() if name != "encoder"}


def describe_model(
    name: str, *, length: int = LENGTH, stock_architecture: bool = False
) -> tuple[PretrainedConfig, Facts]:
    """Return a model's config, its sizes, counted on the meta device, and its settings as an encoder."""
    folder = resolve_model(name)
    files = read_sentence_files(folder)
    stock = {"stock_architecture": stock_architecture}
    model = empty_transformer(files.transformer_folder, **stock)
    settings = own_config(files, model, load_tokenizer(files.transformer_folder, model, **stock))
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # no embedding depends on it
    # A table that several modules share counts once, as in the number of all parameters.
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings = sum(table.numel() for table in tables)
    parameters = model.num_parameters()
    config = model.config
    weights = [file for place in files.weight_folders for file in weight_files(place)]
    for file in weights:
        check_whole(file)
    exported = exported_backend(files.transformer_folder)
    if isinstance(config, EffirConfig) and not exported:
        _check_tensors(files.transformer_folder, config)
    facts: Facts = {"model": name, "architecture": type(model).__name__, "model_type": config.model_type}
    if exported:
        facts["exported_to"] = exported
        if (file := files.transformer_folder / EXPORT_FILE).is_file():  # other programs write such folders, too
            record = read_json(file)
            facts |= {"exported_from": record["model"], "int8": record["int8"]}
    for size in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        facts[size] = getattr(config, size, None)
    facts |= {
        "parameters": parameters,
        "parameters_without_embeddings": parameters - embeddings,
        "bytes_on_disk": sum(file.stat().st_size for file in weights),
        "weights_sha256": weights_sha256(folder, files.weight_folders),
        **_settings(settings),
    }
    if spaces := read_spaces(folder, facts["weights_sha256"]):
        facts["same_space_as"] = [f"{space.model} {space.model_sha256}" for space in spaces]
    if config.model_type in FAMILIES:
        facts |= {"flops_per_text": flops(empty_model(config), length), "text_length": length}
    return config, facts


def _check_tensors(folder: Path, config: EffirConfig) -> None:
    """Raise ValueError if the weights of a pruned model lack a tensor."""
    names: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    if missing := sorted(empty_model(config).state_dict().keys() - names):
        raise UserError(f"{folder}: the weights do not fit config.json: no tensor {missing[0]}")


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
    if value in ([], {}):
        return "(none)"
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value) if str(value) else "(none)"
