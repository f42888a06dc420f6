"""Public checkpoints of pruned models, LLM-Drop's and EffiR's LoRA folders, become model folders of this project.

Nothing in a checkpoint is executed. Every tensor in it is used, or known to be of no use here, or an error.

Source: LLM-Drop (https://github.com/CASE-Lab-UMD/LLM-Drop), src/llmtuner/compression/prune/models; EffiR,
scripts/eval_mteb.py; FlagEmbedding, finetune/embedder/decoder_only/base/load_model.py.
"""

import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from effir_search.encoding.config import encoder_config
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing
from effir_search.model.arithmetic import count, empty_model
from effir_search.model.checkpoint import (
    DROP_LISTS,
    TOKENIZERS,
    check_stock,
    hub_revision,
    load_tokenizer,
    named_errors,
    resolve_model,
    weight_files,
)
from effir_search.model.families import FAMILIES
from effir_search.model.modeling_effir import EffirConfig, EffirModel
from effir_search.model.sentence_files import SentenceFiles, read_sentence_files
from effir_search.settings import EncoderOptions

# Layers without MLP and layers without attention, sorted.
Plan = dict[str, list[int]]
# The same as options have them: None where an option is not given.
PlanOptions = dict[str, Iterable[int] | None]
Loaded = tuple[EffirModel, PreTrainedTokenizerBase, SentenceFiles]
# In a config.json.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Of an adapter_config.json: what the merged weights depend on, what they do not, and ways to start that leave the base
# model's weights alone. Any other setting that is set changes the result.
LORA_SETTINGS = {
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_bias", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
STARTS = (True, "gaussian", "orthogonal", "eva")
# The keys under which peft saves embeddings whole, and what all keys of a LoRA on the LM head start with.
BASE_EMBEDDINGS = {f"base_model.model.model.embed_tokens.{name}" for name in ("weight", "base_layer.weight")}
ADAPTER_OF_HEAD = "base_model.model.lm_head."
# How the released checkpoints read texts; titles and texts are joined by one space.
QUERY_PROMPT = "<instruct>Given a query, retrieve relevant passages that answer the query.\n<query>"
MAX_LENGTH = 512


def convert(
    source: str | Path,
    output: Path,
    *,
    base: str | Path | None = None,
    drop_mlp_layers: Iterable[int] | None = None,
    drop_attention_layers: Iterable[int] | None = None,
    options: EncoderOptions = DEFAULT_OPTIONS,
) -> EffirConfig:
    """Write a checkpoint as a pruned model folder, whole or not at all, and return its config.

    Weights keep the checkpoint's dtype; those of dropped parts are not read. LoRA is merged in float32 and rounded
    once. Settings that are None are the checkpoint's own, for a LoRA folder those of the released ones.

    Args:
        source: LLM-Drop checkpoint or EffiR LoRA folder, or a name of either on the Hugging Face hub.
        output: The new folder.
        base: For a LoRA folder: the model it was trained on, plain or an LLM-Drop checkpoint.
        drop_mlp_layers: 0-based layers without MLP, where no config.json says it.
        drop_attention_layers: The same for attentions.
        options: How the saved model makes a vector of a text; ``stock_architecture`` passes over code that the model
            names besides LLM-Drop's.

    Raises:
        ValueError: A folder of another format or family, code of the model's own, accounts of what is dropped that are
            malformed, disagree or are missing, a tensor that is missing, left over or of another shape, a file that
            cannot be read safely, a setting of the adapter that cannot be merged, or peft missing.
        OSError: A file cannot be read, or ``output`` exists or cannot be written.
    """
    refuse_existing(output, replaces=())
    folder = resolve_model(source, adapter=True)
    plan_options = {"mlp": drop_mlp_layers, "attention": drop_attention_layers}
    origin = {"checkpoint": str(source), "revision": hub_revision(folder)} if not Path(source).exists() else {}
    if (adapter := _adapter_folder(folder)) is None:
        if base is not None:
            raise UserError(f"{source}: is no LoRA folder, so it goes without --base")
        model, tokenizer, files = _read_llm_drop(folder, plan_options, origin, options.stock_architecture)
    else:
        model, tokenizer, files = _read_lora(folder, adapter, base, plan_options, origin, options.stock_architecture)
    config = encoder_config(files, model, tokenizer, options)
    Encoder(model, tokenizer, config, name=str(source), files=files).save(output)
    return model.config


def describe_conversion(config: EffirConfig) -> str:
    """Return a line about a pruned model: its family, what was dropped, its parameters and those of the full model."""
    full = EffirConfig(config.base_config)
    dropped = {"MLPs": config.mlp_widths.count(0), "attentions": len(config.dropped_attention)}
    parts = [f"{number} of {config.num_hidden_layers} {kind}" for kind, number in dropped.items() if number]
    sizes = [count(empty_model(of)).parameters for of in (config, full)]
    now, before = (f"{size / 1e9:.2f} B" if size >= 1e9 else f"{size / 1e6:.2f} M" for size in sizes)
    what = " and ".join(parts) or "nothing"
    return f"{config.base_config.model_type}, {what} dropped, {now} parameters ({before})"


def _read_llm_drop(folder: Path, plan_options: PlanOptions, origin: dict, stock: bool) -> Loaded:
    settings = _settings(folder)
    if not settings.keys() & {*DROP_LISTS.values()} and settings.get("model_type") != EffirConfig.model_type:
        raise UserError(
            f"{folder}: is neither an LLM-Drop checkpoint (config.json with drop_mlp_list or drop_attn_list) nor an "
            f"EffiR LoRA folder ({ADAPTER_CONFIG}, in it or in a checkpoint-N)"
        )
    base_config = _base_config(folder, stock)
    num_layers = base_config.num_hidden_layers
    plan = _agreed(_plan_of_config(folder, num_layers) | _plan_of_options(plan_options, num_layers)) or {
        kind: [] for kind in DROP_LISTS
    }
    config = _pruned_config(base_config, plan, {"source": "LLM-Drop"} | origin)
    config.base_model = _hub_name(settings.get("_name_or_path"))
    model = _load(folder, config)
    files = read_sentence_files(folder)
    tokenizer = load_tokenizer(folder, model, stock_architecture=stock)
    return model, tokenizer, files._replace(pooling=files.pooling or "last")


def _read_lora(
    folder: Path, adapter: Path, base: str | Path | None, plan_options: PlanOptions, origin: dict, stock: bool
) -> Loaded:
    settings = read_json(adapter / ADAPTER_CONFIG)
    base_name = settings.get("base_model_name_or_path")
    if base is None:
        raise UserError(f"{folder}: is a LoRA adapter of {base_name or 'a base model'}; give that one with --base")
    base_folder = resolve_model(base)
    base_config = _base_config(base_folder, stock)
    num_layers = base_config.num_hidden_layers
    plan = _agreed(
        _plan_of_config(folder, num_layers)
        | _plan_of_config(base_folder, num_layers)
        | _plan_of_options(plan_options, num_layers)
    )
    if plan is None:
        raise UserError(
            "what was dropped must be said by --drop-mlp-layers, --drop-attention-layers or both, since no config.json "
            f"does by drop_mlp_list or drop_attn_list: neither {folder}'s nor {base_folder}'s"
        )
    config = _pruned_config(base_config, plan, {"source": "EffiR LoRA"} | origin)
    names = (str(base) if not Path(base).exists() else None, base_name, _settings(base_folder).get("_name_or_path"))
    config.base_model = next(filter(None, map(_hub_name, names)), None)
    config.base_revision = hub_revision(base_folder) or settings.get("revision")
    places = list(dict.fromkeys([folder, adapter]))
    before, after = _embedding_files(places)
    lora_settings = _lora_settings(adapter / ADAPTER_CONFIG)  # before the weights, which take a while
    model = _load(base_folder, config)
    if before is not None:
        _set_embeddings(model, _read_embeddings(before), before)
    _merge(model, adapter, lora_settings)
    if after is not None:
        _set_embeddings(model, _read_embeddings(after), after)
    tokenizer_folder = next((place for place in places if any((place / n).is_file() for n in TOKENIZERS)), base_folder)
    files = read_sentence_files(folder)
    if files.pooling is None:
        contract = {"pooling": "last", "normalize": True, "similarity": "cosine", "query_prompt": QUERY_PROMPT}
        files = files._replace(**contract, max_length=MAX_LENGTH)
    return model, load_tokenizer(tokenizer_folder, model, stock_architecture=stock), files


# What was dropped


def _plan_of_config(folder: Path, num_layers: int) -> dict[str, Plan]:
    """Return what a folder's config.json says was dropped, under its name; nothing if it says nothing."""
    lists = {kind: _settings(folder).get(field) for kind, field in DROP_LISTS.items()}
    if all(value is None for value in lists.values()):
        return {}
    path = folder / "config.json"
    return {str(path): {k: _layers(v, f"{path}: {DROP_LISTS[k]}", num_layers) for k, v in lists.items()}}


def _plan_of_options(plan_options: PlanOptions, num_layers: int) -> dict[str, Plan]:
    """Return what the options say was dropped, under their names; nothing if none is given."""
    lists = {kind: None if value is None else list(value) for kind, value in plan_options.items()}
    if all(value is None for value in lists.values()):
        return {}
    plan = {kind: _layers(value, f"--drop-{kind}-layers", num_layers) for kind, value in lists.items()}
    return {"--drop-mlp-layers and --drop-attention-layers": plan}


def _layers(value: object, where: str, num_layers: int) -> list[int]:
    """Return the sorted layers of a list of numbers or of one boolean a layer; bool is an int to Python."""
    if value is None:
        return []
    problem = None
    if not isinstance(value, list) or {type(item) for item in value} not in ({int}, {bool}, set()):
        problem = f"is {str(value)[:60]}"
    elif value and isinstance(value[0], bool):
        if len(value) == num_layers:
            return [layer_idx for layer_idx, dropped in enumerate(value) if dropped]
        problem = f"has {len(value)} booleans"
    elif outside := [layer_idx for layer_idx in value if not 0 <= layer_idx < num_layers]:
        problem = f"names layer {outside[0]}"
    elif repeated := [layer_idx for layer_idx in value if value.count(layer_idx) > 1]:
        problem = f"names layer {repeated[0]} twice"
    if problem is not None:
        raise UserError(
            f"{where} {problem}; it must be null, different layers from 0 to {num_layers - 1} or {num_layers} booleans"
        )
    return sorted(value)


def _agreed(accounts: dict[str, Plan]) -> Plan | None:
    (first, plan), *others = accounts.items() or [("", None)]
    for place, other in others:
        if other != plan:
            raise UserError(f"{first} and {place} disagree on the dropped layers, which are {plan} or {other}")
    return plan


# The base model


def _settings(folder: Path) -> dict:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _base_config(folder: Path, stock_architecture: bool) -> PretrainedConfig:
    """Return the config of the stock model; that the checkpoint asks for LLM-Drop's code is forgotten."""
    model_type = str(_settings(folder).get("model_type"))
    if model_type == EffirConfig.model_type:
        raise UserError(f"{folder}: is a pruned model of this project already; every command takes it as it is")
    causal = [name for name, family in FAMILIES.items() if family.causal]
    if model_type not in causal:
        raise UserError(
            f"{folder}: models of type {model_type!r} cannot be converted; those that can: {', '.join(causal)}"
        )
    check_stock(folder / "config.json", stock_architecture=stock_architecture)
    with named_errors(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name in ("auto_map", *DROP_LISTS.values()):
        config.__dict__.pop(name, None)
    config.name_or_path = ""  # a path of this machine has no place in a saved config
    return config


def _pruned_config(base_config: PretrainedConfig, plan: Plan, record: dict) -> EffirConfig:
    width = base_config.intermediate_size
    widths = [0 if layer_idx in plan["mlp"] else width for layer_idx in range(base_config.num_hidden_layers)]
    return EffirConfig(base_config, mlp_widths=widths, dropped_attention=plan["attention"], plan=[plan | record])


def _load(folder: Path, config: EffirConfig) -> EffirModel:
    """Return the pruned model with a folder's weights. It cannot run: buffers that are not saved have no memory."""
    model = empty_model(config)
    expected = dict(model.named_parameters())
    dropped = dict(empty_model(EffirConfig(config.base_config)).named_parameters()).keys() - expected.keys()

    def name_of(key: str) -> str | None:
        name = key if key.startswith(("model.", "lm_head.")) else f"model.{key}"  # AutoModel saves without the prefix
        known = name in dropped or name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")
        return None if known else name

    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin, or parts of one with an index, in it")
    tensors: dict[str, Tensor] = {}
    for path in files:
        part = _read_tensors(path, name_of, dtype=config.base_config.dtype)
        if twice := sorted(part.keys() & tensors.keys()):
            raise UserError(f"{path}: {twice[0]} is in another file of the model too")
        tensors |= part
    _check(f"{folder}: the weights do not fit config.json", tensors, expected)
    model.load_state_dict(tensors, assign=True)
    model.config.dtype = model.config.base_config.dtype = model.dtype
    return model.eval()


def _read_tensors(
    path: Path, name_of: Callable[[str], str | None] = lambda key: key, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a weight file by the names that ``name_of`` gives to their keys; None = not read."""
    with named_errors(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = {key: name_of(key) for key in file.keys()}  # noqa: SIM118, it is no dict
                return {name: file.get_tensor(key).to(dtype) for key, name in names.items() if name is not None}
        # Of a file that is mapped, what is not used never gets into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise UserError("not a dictionary of tensors")
        return {name: tensor.to(dtype) for key, tensor in content.items() if (name := name_of(key)) is not None}


def _check(what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = [f"no tensor {name}" for name in expected if name not in tensors]
    problems += [f"{name} is not part of the model" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {list(tensor.shape)}, not {list(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        raise UserError(f"{what}: {problems[0]} ({len(problems)} such problems)")


def _hub_name(name: object) -> str | None:
    """Return a name that can be one on the hub, OWNER/MODEL, None for others, such as paths."""
    fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not Path(name).exists()
    return name if fits else None


# The adapter


def _adapter_folder(folder: Path) -> Path | None:
    """Return where a LoRA folder has its adapter, itself or its last checkpoint-N; None if it is no LoRA folder."""
    numbers = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.iterdir()}
    checkpoints = sorted((int(number[1]), path) for path, number in numbers.items() if number and path.is_dir())
    places = [folder, *(path for _number, path in checkpoints[-1:])]
    places = [place for place in places if (place / ADAPTER_CONFIG).is_file()]
    if not places:
        return None
    for place in places:
        if _adapter_weights(place) is not None:
            return place
    raise UserError(f"{places[-1]}: no {' or '.join(ADAPTER_WEIGHTS)} beside {ADAPTER_CONFIG}")


def _adapter_weights(place: Path) -> Path | None:
    return next((place / name for name in ADAPTER_WEIGHTS if (place / name).is_file()), None)


def _lora_settings(path: Path) -> dict:
    if find_spec("peft") is None:
        raise UserError(f"{path}: merging a LoRA needs peft: pip install 'effir_search[train]'")
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {settings.get('peft_type')!r} is not supported, only LORA")
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if not settings.get(name)]:
        raise UserError(f'{path}: no "{missing[0]}", which the merged weights depend on')
    for name, value in settings.items():
        known = name in LORA_SETTINGS | HARMLESS or (name == "init_lora_weights" and value in STARTS)
        if value and not known:
            raise UserError(f'{path}: the setting "{name}" ({str(value)[:60]}) is not supported')
    return {name: settings[name] for name in LORA_SETTINGS & settings.keys()}


def _merge(model: EffirModel, adapter: Path, settings: dict) -> None:
    """Add an adapter to the weights: in float32, matrix by matrix, each rounded once to the model's dtype."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    path = _adapter_weights(adapter)
    tensors = _read_tensors(path, dtype=torch.float32)
    for key in BASE_EMBEDDINGS & tensors.keys():
        _set_embeddings(model, tensors.pop(key), path)
    # peft asks transformers for a name that is going to change.
    with named_errors(path), warnings.catch_warnings(action="ignore", category=FutureWarning):
        full = empty_model(EffirConfig(model.config.base_config))
        full = PeftModel(full, LoraConfig(**settings), low_cpu_mem_usage=True)
        lora = PeftModel(model, LoraConfig(**settings))  # its matrices are float32, whatever the model's dtype
    expected = get_peft_model_state_dict(lora, save_embedding_layers=False)
    dropped = get_peft_model_state_dict(full, save_embedding_layers=False).keys() - expected.keys()
    tensors = {key: t for key, t in tensors.items() if key not in dropped and not key.startswith(ADAPTER_OF_HEAD)}
    _check(f"{path}: the weights do not fit {ADAPTER_CONFIG}", tensors, expected)
    with named_errors(path):
        set_peft_model_state_dict(lora, tensors)
        for module in lora.modules():
            if isinstance(module, LoraLayer):
                layer = module.get_base_layer()
                dtype = layer.weight.dtype
                layer.float()
                module.merge(safe_merge=True)
                layer.to(dtype)
    lora.unload()


# Embeddings of their own


def _embedding_files(places: list[Path]) -> tuple[Path | None, Path | None]:
    """Return the embeddings to set before and after merging, each None where there are none."""
    before, after, head = (
        next((path for place in places if (path := place / "embedding" / name).is_file()), None)
        for name in ("emb.pth", "input_emb.pth", "lm_head.pth")
    )
    if (after is None) != (head is None):
        raise UserError(
            f"{after or head}: EffiR uses input_emb.pth and lm_head.pth together, and the other one is not there; "
            "add it, or remove this one"
        )
    return before, after


def _read_embeddings(path: Path) -> Tensor:
    """Return the weight of a pickled nn.Embedding; no other class gets to run."""
    with named_errors(path), torch.serialization.safe_globals([nn.Embedding]):
        module = torch.load(path, map_location="cpu", weights_only=True)
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding) or not isinstance(weight, Tensor):
        raise UserError(f"{path}: holds a {type(module).__name__}, not an Embedding")
    return weight.detach()


def _set_embeddings(model: EffirModel, weight: Tensor, path: Path) -> None:
    """Replace the embeddings; the vocabulary is then as large as these."""
    if weight.dim() != 2 or weight.shape[1] != model.config.hidden_size:
        raise UserError(
            f"{path}: embeddings of shape {list(weight.shape)}; the model's hidden size is {model.config.hidden_size}"
        )
    embeddings = model.get_input_embeddings()
    embeddings.weight = nn.Parameter(weight.to(model.dtype), requires_grad=False)
    embeddings.num_embeddings = model.config.vocab_size = len(weight)
