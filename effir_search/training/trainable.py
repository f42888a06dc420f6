"""An encoder made ready for training, and made plain again: which parameters are trained, LoRA, dropout, dtype."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, set_seed

from effir_search.encoding.config import own_config
from effir_search.encoding.encoder import Encoder
from effir_search.model.layers import lora_targets
from effir_search.settings import TrainingSettings
from effir_search.training.data import checkpoint_activations, keep_activations


def make_trainable(encoder: Encoder, settings: TrainingSettings) -> Encoder:
    """Return an encoder whose model can be trained: the parameters of LoRA, which are added, or all, in float32.

    The model itself is changed, so that the encoder before must not be used any more.

    Args:
        encoder: What learns.
        settings: See ``finetune.resolved_training``.

    Raises:
        ValueError: A model without gradient checkpointing, where that is asked for.
    """
    set_seed(settings.seed)
    model = encoder.model
    if not settings.dropout:
        _drop_nothing_out(model)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    if settings.lora_rank:
        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=lora_targets(model),
        )
        return encoder.with_model(get_peft_model(model, lora))
    model.float()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("pooler."))
    return encoder.with_model(model)


def _drop_nothing_out(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # what attentions hand to torch's kernels
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def make_plain(encoder: Encoder, dtype: torch.dtype) -> Encoder:
    """Undo ``make_trainable``: return an encoder of that dtype that reads as long a text as its model's files say.

    LoRA is merged. The model itself is changed, so that the encoder before must not be used any more.
    """
    model = encoder.model
    if isinstance(model, PeftModel):
        model = _merge_lora(model, dtype)
    model.to(dtype)
    keep_activations(model)
    own = own_config(encoder.files, model, encoder.tokenizer)
    return encoder.with_model(model).with_config(max_length=own.max_length)


@torch.no_grad()
def _merge_lora(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model with LoRA in its weights; it is merged in float32, one matrix at a time."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            matrix = module.get_base_layer()
            matrix.float()
            module.merge()
            matrix.to(dtype)
    return model.unload()
