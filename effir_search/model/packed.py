"""What makes a model faster on a CPU: matrices as oneDNN lays them out, and an attention for short texts."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# oneDNN chooses a layout for about so many rows; others are multiplied as rightly with it.
ROWS = 2048
# Up to so many tokens two plain products are faster than torch's fused attention, whose blocks are made for longer
# texts: 2.8 against 4.5 ms for 29 texts of 70 tokens, 13 against 8 for 8 of 256.
SHORT = 160
SHORT_ATTENTION = "effir_short"


class PackedLinear(nn.Module):
    """An ``nn.Linear`` on the CPU that only infers: its weight is kept in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias.detach() if linear.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out_features)`` for ``(..., in_features)``."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


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
    """Return what transformers' "sdpa" attention returns, by two plain products where the texts are short.

    Args:
        module: The attention it is called by.
        query: ``(batch, heads, seq, head_dim)``.
        key: ``(batch, key_heads, seq, head_dim)``.
        value: As ``key``.
        attention_mask: ``(batch, 1, seq, seq)`` bool, True = seen; None = all, or all up to itself if it is causal.
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
    products = torch.matmul(query * scaling, key.transpose(2, 3))  # (batch, heads, seq, seq)
    if attention_mask is not None:
        # The lowest number, not minus infinity: a row of padding that sees nothing stays finite.
        products.masked_fill_(~attention_mask, torch.finfo(products.dtype).min)
    return torch.matmul(products.softmax(dim=-1), value).transpose(1, 2), None


AttentionInterface.register(SHORT_ATTENTION, short_attention)
AttentionMaskInterface.register(SHORT_ATTENTION, sdpa_mask)


def pack(model: nn.Module) -> None:
    """Lay a CPU model in bfloat16 out for inference, in place; afterwards it cannot be trained or saved.

    Other dtypes and devices are left alone: their products are fast as they are.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    packed = False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.is_cpu:
                setattr(parent, name, PackedLinear(child))
                packed = True
    if packed:
        use_short_attention(model)


def use_short_attention(model: nn.Module) -> None:
    """Let a model attend by ``short_attention`` instead of "sdpa", in place; it can be trained and saved as before."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = SHORT_ATTENTION
