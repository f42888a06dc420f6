"""Model folders: what is in them, loading them strictly, and models of which parts are left out.

What comes in is a folder, a hub name or a GGUF file; what goes out is a transformer with its tokenizer, or a folder.
Open ``modeling_effir.py`` first: a pruned model as transformers knows it. ``checkpoint.py`` loads, ``save.py`` saves,
``families.py`` says where models keep their attentions and MLPs, ``layers.py`` finds them, ``surgery.py`` takes them
out, ``stock.py`` makes a stock model of what is left where it can be one.

Importing this package makes such models known to ``AutoConfig`` and ``AutoModel``, and so to sentence-transformers,
peft and everything else that loads by these.
"""

from transformers import AutoConfig, AutoModel

from effir_search.model.modeling_effir import EffirConfig, EffirModel

AutoConfig.register(EffirConfig.model_type, EffirConfig, exist_ok=True)
AutoModel.register(EffirConfig, EffirModel, exist_ok=True)
# Saving then copies modeling_effir.py and families.py beside the weights.
EffirConfig.register_for_auto_class()
EffirModel.register_for_auto_class("AutoModel")
