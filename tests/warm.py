"""What the fork server imports, once, for all commands that it forks. No parallel loop runs here."""

import gc
from importlib import import_module

for name in (
    *("effir_search.cli", "effir_search.compression.compress", "effir_search.indexing.build"),
    *("effir_search.searching.search", "effir_search.training.finetune", "sentence_transformers"),
    "effir_search.serving.server",
    *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama"),
):
    import_module(name)

# A process that collects garbage would otherwise write to, and so copy, every page of what was imported.
gc.collect()
gc.freeze()
