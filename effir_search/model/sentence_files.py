"""What a model folder says about itself in sentence-transformers' files: modules, pooling, prompts, length."""

import json
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.model.checkpoint import check_config, check_stock, model_configs, read_config_file, weight_files
from effir_search.model.families import family_of
from effir_search.settings import pooling_modes

logger = logging.getLogger(__name__)

# The names of sentence_bert_config.json before it had one name for all.
TRANSFORMER_CONFIGS = ("sentence_bert_config.json",) + tuple(
    f"sentence_{name}_config.json" for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# The parts of a pair of models, see ``encoding.pair``: names of folders and of routes of a Router.
ROUTES = ("query", "document")
SETTINGS_FILE = "config_sentence_transformers.json"
# Flags of a pooling in config.json before it had one name, in the order in which several are put behind one another.
LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Poolings that are called otherwise here.
OUR_NAMES = {"lasttoken": "last"}
THEIR_NAMES = {ours: theirs for theirs, ours in OUR_NAMES.items()}
# Settings of the Transformer module that change nothing here; any other that is set changes the embedding.
HARMLESS = {
    "max_seq_length",
    "do_lower_case",
    "unpad_inputs",
    "modality_config",
    "module_output_name",
    "transformer_task",
}


class SentenceFiles(NamedTuple):
    """A folder's own account; None where it says nothing. ``head`` lists what comes between pooling and the end."""

    folder: Path
    transformer_folder: Path
    head: list[tuple[str, Path]]
    pooling: str | None
    include_prompt: bool
    normalize: bool
    query_prompt: str
    document_prompt: str
    similarity: str | None
    dimension: int | None
    max_length: int | None
    lower_case: bool

    @property
    def weight_folders(self) -> list[Path]:
        """The folders with weights: that of the transformer and those of Dense modules."""
        return [self.transformer_folder, *(place for kind, place in self.head if kind == "Dense")]


def read_sentence_files(folder: Path) -> SentenceFiles:
    """Return what the sentence-transformers files of a model folder say, if it has any.

    Prompts follow ``encode_query`` and ``encode_document`` of sentence-transformers 6.2: the ones named "query" and
    "document", or none.

    Raises:
        ValueError: A module other than Transformer, Pooling, Normalize and Dense, an unknown pooling, a setting that is
            not supported; each is named.
        OSError: A file cannot be read.
    """
    modules = _modules(folder)
    transformer_folder = folder / modules[0][1]
    transformer = _transformer_settings(transformer_folder)
    for name, value in transformer.items():
        if name not in HARMLESS and value:
            raise UserError(f'{transformer_folder}: the setting "{name}" of sentence_bert_config.json is not supported')
    if (task := transformer.get("transformer_task", "feature-extraction")) != "feature-extraction":
        raise UserError(f'{transformer_folder}: transformer_task "{task}" is not supported, only feature-extraction')
    if "message" in transformer.get("modality_config", {}):
        raise UserError(f"{transformer_folder}: models that read texts through a chat template are not supported")

    length = transformer.get("max_seq_length")
    if length is not None and not (type(length) in (int, float) and length >= 1):
        raise UserError(
            f"{transformer_folder}: max_seq_length {length!r} is no number of tokens; put right or remove it"
        )

    pooling, include_prompt = None, True
    if len(modules) > 1:
        pooling, include_prompt = _pooling(folder / modules[1][1])
    head = [(kind, folder / path) for kind, path in modules[2:]]
    normalize = bool(head) and head[-1][0] == "Normalize"
    if normalize:
        head.pop()

    path = folder / SETTINGS_FILE
    settings = read_json(path) if path.is_file() else {}
    prompts = settings.get("prompts") or {}
    if not prompts.get("document") and (other := next((n for n in ("passage", "corpus") if prompts.get(n)), None)):
        logger.warning(
            'the model has a prompt "%s" (%r) and none named "document", so documents get none; '
            "--document-prompt sets one",
            other,
            prompts[other],
        )
    similarity = settings.get("similarity_fn_name")
    if similarity not in (None, "cosine", "dot"):
        raise UserError(
            f"{path}: similarity {similarity!r} is not supported; a FAISS inner product gives cosine or dot"
        )
    return SentenceFiles(
        folder=folder,
        transformer_folder=transformer_folder,
        head=head,
        pooling=pooling,
        include_prompt=include_prompt,
        normalize=normalize,
        query_prompt=prompts.get("query") or "",
        document_prompt=prompts.get("document") or "",
        similarity=similarity,
        dimension=settings.get("truncate_dim"),
        max_length=length,
        lower_case=bool(transformer.get("do_lower_case")),
    )


def check_stock_encoder(name: str | Path, *, stock_architecture: bool) -> None:
    """Raise ValueError if an encoder or a cross-encoder is code of its own; its weights need not be there.

    Args:
        name: Model folder or hub name.
        stock_architecture: See ``check_stock``.
    """
    with model_configs(name) as folder:
        for _module, place in _entries(folder)[:1]:
            if (path := folder / place / "config.json").is_file():
                check_config(path, stock_architecture=stock_architecture)
            check_stock(folder / place / "tokenizer_config.json", stock_architecture=stock_architecture)


def prunable_config(name: str, *, stock_architecture: bool = False) -> PretrainedConfig:
    """Return the config of an encoder's transformer; its weights need not be there.

    Args:
        name: Model folder or hub name.
        stock_architecture: See ``check_stock``.

    Raises:
        ValueError: No such config, or of a family that cannot be pruned.
        OSError: Neither a folder nor a hub model that can be had.
    """
    with model_configs(name) as folder:
        path = read_sentence_files(folder).transformer_folder / "config.json"
        config = read_config_file(path, stock_architecture=stock_architecture)
    family_of(config)
    return config


def write_sentence_files(output: Path, files: SentenceFiles, *, hidden_size: int) -> None:
    """Write what ``read_sentence_files`` reads, for a transformer that lies in ``output`` itself.

    The folders of Dense modules are copied as they are, and so is every setting of the source that has no place in
    ``SentenceFiles``, such as prompts of other names.

    Args:
        output: The new model folder.
        files: What it says; ``pooling`` and ``max_length`` must be set.
        hidden_size: Components of the pooled vector.
    """
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    for kind, place in [*files.head, *([("Normalize", None)] if files.normalize else [])]:
        modules.append((kind, f"{len(modules)}_{kind}"))
        if kind == "Dense":
            shutil.copytree(place, output / modules[-1][1])
        else:
            (output / modules[-1][1]).mkdir()
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    pooling = {"word_embedding_dimension": hidden_size, "include_prompt": files.include_prompt}
    modes = [THEIR_NAMES.get(mode, mode) for mode in pooling_modes(files.pooling)]
    # Older versions read the flags alone, which do not tell an order.
    flags = {flag: mode in modes for flag, mode in LEGACY_POOLING.items()}
    in_order = [mode for flag, mode in LEGACY_POOLING.items() if flags[flag]] == modes
    pooling |= flags if in_order else {"pooling_mode": modes}
    transformer = _transformer_settings(files.transformer_folder)
    transformer |= {"max_seq_length": files.max_length, "do_lower_case": files.lower_case}
    source = files.folder / SETTINGS_FILE
    settings = read_json(source) if source.is_file() else {"default_prompt_name": None}
    prompts = {"query": files.query_prompt, "document": files.document_prompt}
    settings["prompts"] = (settings.get("prompts") or {}) | prompts
    settings["similarity_fn_name"] = files.similarity
    if files.dimension is not None:
        settings["truncate_dim"] = files.dimension
    (output / "1_Pooling").mkdir()
    for name, content in (
        ("modules.json", entries),
        ("1_Pooling/config.json", pooling),
        (TRANSFORMER_CONFIGS[0], transformer),
        (SETTINGS_FILE, settings),
    ):
        (output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _transformer_settings(folder: Path) -> dict:
    return next((read_json(folder / name) for name in TRANSFORMER_CONFIGS if (folder / name).is_file()), {})


def _entries(folder: Path) -> list[tuple[str, str]]:
    """Return ``(type, path)`` of each module of sentence-transformers that modules.json lists, if it is there."""
    path = folder / "modules.json"
    if not path.is_file():
        return [("Transformer", "")]
    try:
        entries = [(str(entry["type"]), entry.get("path", "")) for entry in json.loads(path.read_bytes())]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a list of sentence-transformers modules ({error!r})") from error
    for position, (name, _place) in enumerate(entries):
        if not name.startswith("sentence_transformers."):
            raise UserError(f"{path}: module {position} is {name}, which is not supported: code of the model's own")
    return entries


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Return ``(kind, path)`` of each module, checked: Transformer, then at most Pooling, then Dense and Normalize."""
    path = folder / "modules.json"
    if not path.is_file():
        return _entries(folder)
    kinds = []
    for position, (name, place) in enumerate(_entries(folder)):
        kind = name.rpartition(".")[2]
        allowed = {0: ("Transformer",), 1: ("Pooling",)}.get(position, ("Dense", "Normalize"))
        if kind == "Router" and all((folder / route / "modules.json").is_file() for route in ROUTES):
            query, document = (folder / route for route in ROUTES)
            raise UserError(f"{folder}: is a pair of models: give {document} to index and {query} to search")
        if kind not in allowed:
            raise UserError(
                f"{path}: module {position} is {name}, which is not supported; expected {' or '.join(allowed)}"
            )
        kinds.append((kind, place))
    if len(kinds) < 2:
        raise UserError(f"{path}: no Pooling module, so this is not a model with one vector a text")
    return kinds


def _pooling(folder: Path) -> tuple[str, bool]:
    """Return the pooling's name and whether prompt tokens are pooled too."""
    path = folder / "config.json"
    settings = read_json(path)
    modes = (
        settings.get("pooling_mode") or [mode for key, mode in LEGACY_POOLING.items() if settings.get(key)] or "mean"
    )
    modes = [modes] if isinstance(modes, str) else list(modes)
    if unknown := [mode for mode in modes if mode not in LEGACY_POOLING.values()]:
        known = ", ".join(LEGACY_POOLING.values())
        raise UserError(f"{path}: pooling {unknown[0]} is not supported; known are {known}")
    return "+".join(OUR_NAMES.get(mode, mode) for mode in modes), settings.get("include_prompt", True)


class Dense(nn.Module):
    """The Dense module of sentence-transformers: a linear layer, an activation and, in some, a residual connection."""

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None) -> None:
        super().__init__()
        self.linear, self.activation, self.residual = linear, activation, residual

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map ``(batch, in_features)`` to ``(batch, out_features)``."""
        mapped = self.activation(self.linear(embeddings))
        return mapped if self.residual is None else mapped + self.residual(embeddings)


class Normalize(nn.Module):
    """The Normalize module of sentence-transformers where it is not the last one."""

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scale each row to length 1."""
        return nn.functional.normalize(embeddings, dim=-1)


def load_head(modules: list[tuple[str, Path]]) -> nn.Sequential:
    """Return the modules between pooling and the end, in float32; an empty one where there are none.

    Raises:
        ValueError: An activation outside torch.nn, an input that is not the pooled vector, weights that do not fit.
    """
    return nn.Sequential(*(Normalize() if kind == "Normalize" else _dense(folder) for kind, folder in modules)).eval()


def _dense(folder: Path) -> Dense:
    settings = read_json(folder / "config.json")
    name = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = getattr(nn, str(name).rpartition(".")[2], None)
    if not str(name).startswith("torch.nn.") or not (
        isinstance(activation, type) and issubclass(activation, nn.Module)
    ):
        raise UserError(f"{folder}: the activation {name} is not one of torch.nn")
    if settings.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise UserError(f"{folder}: a Dense module on {settings['module_input_name']} is not supported")
    try:
        width = settings["in_features"], settings["out_features"]
        linear = nn.Linear(*width, bias=settings.get("bias", True))
        residual = None
        if settings.get("use_residual"):
            residual = nn.Identity() if width[0] == width[1] else nn.Linear(*width, bias=False)
        dense = Dense(linear, activation(), residual)
        files = weight_files(folder)
        if not files:
            raise UserError("no model.safetensors in it")
        load = load_file if files[0].suffix == ".safetensors" else _load_pickle
        dense.load_state_dict({key: tensor.float() for key, tensor in load(files[0]).items()})
    except (KeyError, TypeError, RuntimeError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder}: this Dense module cannot be loaded: {' '.join(str(error).split())[:150]}"
        ) from error
    return dense


def _load_pickle(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)
