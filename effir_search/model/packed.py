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
# made for longer ones: 1.0 against 3.2 ms for 47 texts of 43 tokens, 3.8 against 6.3 for 8 of 256, in bfloat16.
SHORT = 256
# Bytes of scores that stay in a core's cache from one step to the next; larger tensors cost page faults as well.
CACHED_BYTES = 2_000_000
# Scores within so much of 0 have exponentials, and sums of them, that are numbers in bfloat16 without a shift.
EXPONENT = 60.0
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

    The softmax is computed in float32, as in the fused one; in bfloat16, where nothing is trained, by
    ``weighted_by_exponentials``.

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
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    all_seen = attention_mask is None and not causal
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    if unusual or query.shape[2] > SHORT or not (all_seen or masked):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch, heads, seq, _ = query.shape
    seen = attention_mask.expand(batch, -1, -1, -1) if attention_mask is not None else None
    weighted, itemsize = weighted_by_softmax, torch.float32.itemsize
    if query.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        weighted, itemsize = weighted_by_exponentials, torch.bfloat16.itemsize
    num_texts = max(1, CACHED_BYTES // (heads * seq * seq * itemsize))
    attended = []
    for start in range(0, batch, num_texts):
        texts = slice(start, start + num_texts)
        # The product takes half as long with keys that were copied in order, and transposed, as with keys as they come.
        scores = torch.matmul(query[texts] * scaling, key[texts].contiguous().transpose(2, 3))
        products = weighted(scores, value[texts], ~seen[texts] if seen is not None else None)
        attended.append(products.transpose(1, 2))
    return torch.cat(attended), None


def weighted_by_softmax(scores: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """Return ``softmax(scores) value``: ``(texts, heads, seq, head_dim)``, the softmax computed in float32.

    Args:
        scores: ``(texts, heads, seq, seq)``.
        value: ``(texts, heads, seq, head_dim)``.
        hidden: ``(texts, 1, seq, seq)`` bool, True = weight 0; None = none is.
    """
    scores = scores.float()
    if hidden is not None:
        scores += lowest_where(hidden, scores.dtype)
    return torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)


def weighted_by_exponentials(scores: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """Return what ``weighted_by_softmax`` does, in the scores' own arithmetic, bfloat16; they are overwritten.

    exp(scores) is multiplied with the values and with a column of ones, which gives the sums to divide by. The largest
    score of a row, which a softmax looks for and takes off first, is left there if all are within ``EXPONENT`` of 0.
    """
    bounded = all(abs(float(bound)) < EXPONENT for bound in torch.aminmax(scores))
    if hidden is not None:
        scores += lowest_where(hidden, scores.dtype)
    if not bounded:
        scores -= scores.float().amax(dim=-1, keepdim=True).to(scores.dtype)  # faster than amax of bfloat16
    products = torch.matmul(scores.exp_(), F.pad(value, (0, 1), value=1.0))
    return products[..., :-1] / products[..., -1:].clamp_min(torch.finfo(scores.dtype).tiny)


def lowest_where(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what hides scores when it is added: not minus infinity, so that a row that sees nothing stays finite."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


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
