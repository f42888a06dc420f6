"""Save a pruned model as a folder that everything loads: transformers, sentence-transformers, peft, this project."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effir_search.files import whole_folder
from effir_search.model.arithmetic import count, empty_model
from effir_search.model.checkpoint import dtype_name, quiet_transformers
from effir_search.model.modeling_effir import EffirConfig, EffirModel
from effir_search.model.sentence_files import SentenceFiles, write_sentence_files


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: SentenceFiles, output: Path) -> None:
    """Write a model folder, whole or not at all: weights in the model's dtype, code, tokenizer, settings, model card.

    Args:
        model: A pruned model; LoRA must be merged.
        tokenizer: Its tokenizer.
        files: What the folder is to say; see ``write_sentence_files``.
        output: The new folder.

    Raises:
        ValueError: The model is not an ``EffirModel``.
        OSError: ``output`` exists, or cannot be written.
    """
    if not isinstance(model, EffirModel):
        raise ValueError(f"{output}: a {type(model).__name__} is not a pruned model, so it is not saved as one")
    with whole_folder(output) as folder:
        try:
            with quiet_transformers():
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(f"{output}: the weights cannot be written: {error}") from error
        write_sentence_files(folder, files, hidden_size=model.config.hidden_size)
        (folder / "README.md").write_text(model_card(model, output.name), encoding="utf-8")


def model_card(model: EffirModel, name: str) -> str:
    """Return the README.md of a saved model: what was dropped, from what, how large it is, how it is loaded."""
    config = model.config
    sizes, full = count(model), count(empty_model(EffirConfig(config.base_config)))
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
        "Weights": f"{sizes.bytes(model.dtype):,} bytes, {dtype_name(model.dtype)}",
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- effir
---

# {name}

{base}, pruned for dense retrieval with EffiR (arXiv 2512.20612). Layers have the 0-based numbers of the base model.

| | |
| --- | --- |
{table}

The plan that led to this, with its scores, is in `config.json` under `plan`.

## Loading

`modeling_effir.py` beside the weights is the code of the model; `trust_remote_code=True` lets it run:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
model.encode_query(["what is pruned?"])
```

Where effir_search is installed, `import effir_search.model` does instead, for sentence-transformers and for
`AutoModel.from_pretrained`, and the folder is an encoder for its commands.
"""


def _layers(layers: list[int], num_hidden_layers: int) -> str:
    return f"{len(layers)} of {num_hidden_layers}" + (f": {', '.join(map(str, layers))}" if layers else "")
