"""Save a model as a folder that everything loads: transformers, sentence-transformers, peft, this project."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from effir_search.files.whole import whole_folder
from effir_search.model.arithmetic import count, empty_model
from effir_search.model.checkpoint import dtype_name, lasting_name, quiet_transformers, read_config_file, weights_sha256
from effir_search.model.modeling_effir import EffirConfig
from effir_search.model.sentence_files import SentenceFiles, write_sentence_files

TRAINING_FILE = "training.json"
# Its fields with the hash of the weights that were trained, which lie beside it, and with the models whose vectors
# these have learned to give, see ``encoding.same_space``.
WEIGHTS_FIELD, SPACES_FIELD = "weights_sha256", "same_space_as"
HEADER = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- effir
---
"""
CODE = """`modeling_effir.py` and `families.py` beside the weights are the code of the model, which
`trust_remote_code=True` lets run. `SentenceTransformer`, `AutoModel` and `AutoTokenizer` each need it. Where
effir_search is installed, `import effir_search.model` does instead, and the folder is an encoder for its commands.
"""


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: SentenceFiles,
    output: Path,
    *,
    training: dict | None = None,
    beside: Mapping[str, str] = MappingProxyType({}),
    measured: str = "",
) -> None:
    """Write a model folder, whole or not at all: weights in the model's dtype, tokenizer, settings, model card.

    Beside the weights of a pruned model lies its code.

    Args:
        model: A pruned model, or any base model as AutoModel loads it; LoRA must be merged.
        tokenizer: Its tokenizer.
        files: What the folder is to say; see ``write_sentence_files``.
        output: The new folder.
        training: How it was trained, which becomes ``training.json``, with the hash of the weights as they are saved,
            and a part of the card; JSON types.
        beside: Text files to lie beside it, by name.
        measured: A last section of the card.

    Raises:
        OSError: ``output`` exists, or cannot be written.
    """
    model.config.name_or_path = ""  # a path of this machine has no place in a saved config
    with whole_folder(output) as folder:
        try:
            with quiet_transformers():
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(f"{output}: the weights cannot be written: {error}") from error
        write_sentence_files(folder, files, hidden_size=model.config.hidden_size)
        if training is not None:
            places = [folder, *sorted(folder.glob("[0-9]_Dense"))]
            training = training | {WEIGHTS_FIELD: weights_sha256(folder, places)}
        card = model_card(model.config, model.dtype, output.name, training=training)
        _write_texts(folder, card, training=training, beside=beside, measured=measured)


def copy_model(source: Path, output: Path, *, training: dict, beside: Mapping[str, str], measured: str) -> None:
    """Write a model folder again under another name, whole or not at all: the same files, but for the card.

    Args:
        source: What ``save_model`` wrote.
        output: The new folder.
        training: What its ``training.json`` says, hash of the weights included.
        beside: Likewise.
        measured: Likewise.

    Raises:
        OSError: ``output`` exists, or a file cannot be read or written.
    """
    config = read_config_file(source / "config.json")
    card = model_card(config, config.dtype, output.name, training=training)
    with whole_folder(output) as folder:
        shutil.copytree(source, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
        _write_texts(folder, card, training=training, beside=beside, measured=measured)


def _write_texts(folder: Path, card: str, *, training: dict | None, beside: Mapping[str, str], measured: str) -> None:
    """Write how a model was trained, what is to lie beside it, and its card."""
    if training is not None:
        text = json.dumps(training, indent=1, ensure_ascii=False)
        (folder / TRAINING_FILE).write_text(text + "\n", encoding="utf-8")
    for name, text in beside.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card + (f"\n{measured}" if measured else ""), encoding="utf-8")


def model_card(config: PretrainedConfig, dtype: torch.dtype, name: str, *, training: dict | None = None) -> str:
    """Return the README.md of a saved model: what was dropped, how it was trained, how large it is, how it loads."""
    parts = [HEADER, f"# {name}\n"]
    if isinstance(config, EffirConfig):
        parts.append(_pruned(config, dtype))
    if training is not None:
        parts.append(_trained(training))
    code = ", trust_remote_code=True" if isinstance(config, EffirConfig) else ""
    parts.append(
        f'''## Loading

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{code})
model.encode_query(["what is pruned?"])
```
'''
    )
    if code:
        parts.append(CODE)
    return "\n".join(parts)


def _pruned(config: EffirConfig, dtype: torch.dtype) -> str:
    sizes, full = count(empty_model(config)), count(empty_model(EffirConfig(config.base_config)))
    width = config.base_config.intermediate_size
    no_mlp = [i for i, units in enumerate(config.mlp_widths) if units == 0]
    narrowed = {i: units for i, units in enumerate(config.mlp_widths) if 0 < units < width}
    base = f"{config.base_model or 'A model'} ({config.base_config.model_type})"
    if config.base_revision:
        base += f", revision {config.base_revision}"
    rows = {
        "MLPs dropped": _layers(no_mlp, config.num_hidden_layers),
        "Attentions dropped": _layers(config.dropped_attention, config.num_hidden_layers),
        f"MLPs narrowed from {width} units": ", ".join(f"layer {i}: {n}" for i, n in narrowed.items()) or "none",
        "Parameters": f"{sizes.parameters:,} of {full.parameters:,} ({sizes.parameters / full.parameters:.1%})",
        "Without embeddings": f"{sizes.without_embeddings:,} of {full.without_embeddings:,}",
        "Weights": f"{sizes.bytes(dtype):,} bytes, {dtype_name(dtype)}",
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return f"""{base}, pruned for dense retrieval with EffiR (arXiv 2512.20612).
Layers have the 0-based numbers of the base model.

| | |
| --- | --- |
{table}

The plan that led to this, with its scores, is in `config.json` under `plan`.
"""


def _trained(training: dict) -> str:
    data, recipe, result = training["data"], training["recipe"], training["result"]
    rows = {
        "Trained from": training["model"],
        "Examples": _names(data["train"]),
        "Texts": _names(*data["texts"]),
        "Queries": _names(*data["queries"]),
        "Teacher": _names(data["teacher"], data["reranker"]),
        "Tokens of a text read": training["encoder"]["max_length"],
        "Gives the vectors of": ", ".join(space["model"] for space in training.get(SPACES_FIELD, [])),
    }
    of_labels = {"contrastive_weight", "distillation_weight", "distill_over", "teacher_temperature"}
    unused = {"score_weight", "token_weight"} if data["train"] else of_labels
    unused |= set() if recipe["lora_rank"] else {"lora_rank", "lora_alpha", "lora_dropout"}
    settings = {name: value for name, value in (recipe | training["losses"]).items() if name not in unused}
    rows |= {name.replace("_", " "): value for name, value in settings.items()}
    rows |= {"steps": f"{result['steps']:,} with {result['num_examples']:,} examples"}
    if result["measure"]:
        split = f"{_names(data['dev'])}, split {data['dev_split']}" if data["dev"] else "held-out texts"
        rows[f"{result['measure']} before"] = f"{result['before']:.4f} ({split})"
        rows[f"{result['measure']} after"] = f"{result['best']:.4f} (step {result['best_step']}, which is this model)"
    rows = {what: value for what, value in rows.items() if value not in (None, "", [], ())}
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return f"""## Training

| | |
| --- | --- |
{table}

All settings, hashes of the data and the log are in `{TRAINING_FILE}`.
"""


def _names(*sources: str | None) -> str:
    """Hub names as they are, of files and folders their last part."""
    return ", ".join(lasting_name(source) for source in sources if source)


def _layers(layers: list[int], num_hidden_layers: int) -> str:
    return f"{len(layers)} of {num_hidden_layers}" + (f": {', '.join(map(str, layers))}" if layers else "")
