"""What makes a model faster: widths that suit processors, oneDNN's layout of matrices, an attention for short texts."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from effir_search.model.layers import mlp_inputs, mlp_output, mlp_widths
from effir_search.model.modeling_effir import EffirModel

# oneDNN chooses a layout for about so many rows; others are multiplied as rightly with it.
ROWS = 2048
# Widths that are multiples of this fill a processor's vectors: in float32 a product with 1,195 rows takes as long as
# one with 1,536.
ALIGNED = 16
# Up to so many tokens plain products, a few texts at a time, are at least as fast as torch's fused attention, which is
# made for longer ones: 2.3 against 4.5 ms for 47 texts of 43 tokens, 6.6 against 8.1 for 8 of 256, in bfloat16.
SHORT = 256
# Scores, in float32, that stay in a core's cache from one step to the next; larger tensors cost page faults as well.
CACHED_SCORES = 500_000
SHORT_ATTENTION = "effir_short"


class PackedLinear(nn.Module):
    """An ``nn.Linear`` on the CPU that only infers: its weight is kept in oneDNN's own layout.

    Args:
        linear: Whose products it gives.
        activation: What they go through at once, "none" or "gelu".
    """

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias.detach() if linear.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out_features)`` for ``(..., in_features)``."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "none")


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Return what transformers' "sdpa" attention returns, by plain products where the texts are short.

    The softmax is computed in float32, as in the fused one.

    Args:
        module: The attention it is called by.
        query: ``(batch, heads, seq, head_dim)``.
        key: ``(batch, key_heads, seq, head_dim)``.
        value: As ``key``.
        attention_mask: ``(batch or 1, 1, seq, seq)`` bool, True = seen; None = all, or what is before if it is causal.
        scaling: Of the products; None = 1 / sqrt(head_dim).
        **options: Handed on to "sdpa".

    Returns:
        ``(batch, seq, heads, head_dim)``, and None for the attention's weights.
    """
    unusual = options.get("dropout") or options.get("position_bias") is not None or query.shape != key.shape
    all_seen = attention_mask is None and not getattr(module, "is_causal", True)
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    if unusual or query.shape[2] > SHORT or not (all_seen or masked):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch, heads, seq, _ = query.shape
    num_texts = max(1, CACHED_SCORES // (heads * seq * seq))
    attended = []
    for start in range(0, batch, num_texts):
        texts = slice(start, start + num_texts)
        scores = torch.matmul(query[texts] * scaling, key[texts].transpose(2, 3)).float()  # (texts, heads, seq, seq)
        if attention_mask is not None:
            hidden = ~attention_mask.expand(batch, -1, -1, -1)[texts]
            # The lowest number, not minus infinity: a row of padding that sees nothing stays finite.
            scores += torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)
        attended.append(torch.matmul(scores.softmax(dim=-1).to(value.dtype), value[texts]).transpose(1, 2))
    return torch.cat(attended), None


AttentionInterface.register(SHORT_ATTENTION, short_attention)
AttentionMaskInterface.register(SHORT_ATTENTION, sdpa_mask)


def pack(model: PreTrainedModel) -> None:
    """Lay a model out for inference, in place; afterwards it can be neither trained nor saved.

    On a GPU only ``align_units`` does something; on a CPU matrices that are not in bfloat16 are fast as they are.
    """
    align_units(model)
    if model.device.type != "cpu":
        return
    use_short_attention(model)
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16:
                setattr(parent, name, PackedLinear(child))
        # BERT and its kin: the MLP's inner product, and what it goes through.
        inner, activation = getattr(parent, "dense", None), getattr(parent, "intermediate_act_fn", None)
        if isinstance(inner, PackedLinear) and isinstance(activation, GELUActivation):
            inner.activation, parent.intermediate_act_fn = "gelu", nn.Identity()


def use_short_attention(model: nn.Module) -> None:
    """Let a model attend by ``short_attention`` instead of "sdpa", in place; it can be trained and saved as before."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = SHORT_ATTENTION


def align_units(model: PreTrainedModel) -> None:
    """Give narrowed MLPs units that write nothing, in place, up to the next multiple of ``ALIGNED``."""
    if not isinstance(model, EffirModel):
        return
    with torch.no_grad():
        for layer_idx, width in enumerate(mlp_widths(model)):
            more = -width % ALIGNED
            if not more:
                continue
            for linear in mlp_inputs(model, layer_idx):
                blocks = linear.weight.view(-1, width, linear.in_features)
                linear.weight = nn.Parameter(F.pad(blocks, (0, 0, 0, more)).flatten(0, 1))
                if linear.bias is not None:
                    linear.bias = nn.Parameter(F.pad(linear.bias.view(-1, width), (0, more)).flatten())
                linear.out_features = len(linear.weight)
            output = mlp_output(model, layer_idx)
            output.weight = nn.Parameter(F.pad(output.weight, (0, more)))
            output.in_features = width + more
