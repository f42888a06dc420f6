"""Norms, gates and attention of Llama's kin for training on a CPU: they keep little and work within its caches.

In eager mode each of them is a dozen passes over tensors that no cache holds, in float32, and torch keeps most of these
for the backward pass. Here a few rows go through all passes at a time, and what is cheap is computed again when its
gradient is due. Results differ from the stock modules' by rounding only.
"""

from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from effir_search.model.packed import lowest_where

# Bytes of one float32 tensor of those that a few rows need at once, so that all stay in a core's cache.
CACHED_BYTES = 400_000
# The same of the scores of some texts' attention.
SCORE_BYTES = 1_000_000
# Tokens of a text up to which the scores of its attention are computed as a whole.
LONGEST = 512
# Norms whose output goes into linear layers, and so into autocast's dtype; the last norm's states are kept whole.
INNER_NORMS = ("input_layernorm", "post_attention_layernorm")


def use_decoder_kernels(model: nn.Module) -> None:
    """Let the norms, gates and attentions of Llama's kin compute by this file, in place; of other models none does.

    The model can be trained and saved as before.
    """
    for name, module in model.named_modules():
        if isinstance(module, LlamaRMSNorm | MistralRMSNorm | Qwen2RMSNorm | Qwen3RMSNorm):
            if name.endswith(INNER_NORMS):
                module.forward = MethodType(_norm_forward, module)
        elif isinstance(module, LlamaMLP | MistralMLP | Qwen2MLP | Qwen3MLP) and _is_silu(module):
            module.forward = MethodType(_mlp_forward, module)
        elif isinstance(module, LlamaAttention | MistralAttention | Qwen2Attention):
            module.forward = MethodType(_attention_forward, module)


def _is_silu(mlp: nn.Module) -> bool:
    return isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, _dtype_of_products(hidden_states))


def _mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(_GatedUnits.apply(self.gate_proj(x), self.up_proj(x)))


def _attention_forward(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: object = None,
    **options: object,
) -> tuple[Tensor, None]:
    unusual = past_key_values is not None or (self.training and self.attention_dropout)
    masked = attention_mask is None or attention_mask.dtype == torch.bool
    if unusual or not masked or hidden_states.shape[1] > LONGEST:
        stock = type(self).forward
        return stock(self, hidden_states, position_embeddings, attention_mask, past_key_values, **options)
    query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
    cos, sin = (part[..., : self.head_dim // 2].float() for part in position_embeddings)
    seen = attention_mask if attention_mask is not None else causal_mask(hidden_states.shape[1], hidden_states.device)
    attended = _RotaryAttention.apply(query, key, value, cos, sin, seen, self.head_dim, self.scaling)
    return self.o_proj(attended), None


def causal_mask(seq: int, device: torch.device) -> Tensor:
    """Return which tokens each token sees, ``(1, 1, seq, seq)`` bool: itself and those before it."""
    return torch.ones(seq, seq, dtype=torch.bool, device=device).tril()[None, None]


class _RMSNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x ** 2) + eps)`` of each row, computed in float32.

    ``apply`` takes x ``(..., hidden_size)``, weight ``(hidden_size,)``, eps and the dtype of what is returned.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
        normed = torch.empty(rows.shape, dtype=dtype, device=x.device)
        scales = torch.empty(len(rows), 1, device=x.device)
        for part in _slices(len(rows), width):
            some = rows[part].float()
            scales[part] = (some.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
            normed[part] = (some * scales[part]).mul_(weight)
        ctx.save_for_backward(x, weight, scales)
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        rows, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
        of_x, of_weight = torch.empty_like(rows), torch.zeros(rows.shape[1], device=x.device)
        plain = weight.detach().float()
        for part in _slices(len(rows), rows.shape[1]):
            normed, some = rows[part] * scales[part], gradients[part].float()
            products = some * normed
            of_weight += products.sum(dim=0)
            shares = (products @ plain).div_(rows.shape[1])
            of_x[part] = (some * plain).addcmul_(normed, shares.unsqueeze(1), value=-1).mul_(scales[part])
        return of_x.view(x.shape), of_weight.to(weight.dtype), None, None


class _GatedUnits(torch.autograd.Function):
    """``silu(gate) * up``, computed in float32; both are ``(..., units)``, and so is what is returned."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        gates, ups = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        units = torch.empty_like(gates)
        for part in _slices(len(gates), gates.shape[1]):
            units[part] = nn.functional.silu(gates[part].float()).mul_(ups[part])
        return units.view(gate.shape)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gates, ups, gradients = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gate, up, gradient))
        of_gate, of_up = torch.empty_like(gates), torch.empty_like(ups)
        for part in _slices(len(gates), gates.shape[1]):
            some, one = gates[part].float(), gradients[part].float()
            share = some.sigmoid()
            active = some * share
            of_up[part] = active * one
            # The derivative of x s(x), with s the sigmoid, is s + x s (1 - s) = s + a - a s of a = x s.
            of_gate[part] = active.addcmul_(active, share, value=-1).add_(share).mul_(one).mul_(ups[part])
        return of_gate.view(gate.shape), of_up.view(up.shape)


class _RotaryAttention(torch.autograd.Function):
    """Attention with rotary positions, from what the linear layers give to what the output layer takes.

    ``apply`` takes query ``(batch, seq, heads * head_dim)``, key and value ``(batch, seq, key_heads * head_dim)``, cos
    and sin ``(batch or 1, seq, head_dim / 2)``, a mask ``(batch or 1, 1, seq, seq)`` bool, True = seen, head_dim and
    the scale of products. Only the first three are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        seen: Tensor,
        head_dim: int,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, cos, sin, seen)
        ctx.head_dim, ctx.scaling = head_dim, scaling
        attended = torch.empty_like(query)
        with torch.autocast(query.device.type, enabled=False):
            for part, parts in _texts(query, key, value, cos, sin, seen, head_dim=head_dim):
                _, _, values, weights = _weights(*parts, head_dim=head_dim, scaling=scaling)
                attended[part] = _rows(torch.matmul(weights.to(values.dtype), values), query.shape[1])
        return attended

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cos, sin, seen = ctx.saved_tensors
        seq, groups = query.shape[1], query.shape[2] // key.shape[2]
        of_query, of_key, of_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for part, parts in _texts(query, key, value, cos, sin, seen, head_dim=ctx.head_dim):
            queries, keys, values, weights = _weights(*parts, head_dim=ctx.head_dim, scaling=ctx.scaling)
            outputs = _heads(gradient[part], ctx.head_dim, groups)
            of_value[part] = _rows(torch.matmul(weights.to(values.dtype).transpose(2, 3), outputs), seq)
            of_weights = torch.matmul(outputs, values.transpose(2, 3)).float()
            of_weights -= (of_weights * weights).sum(dim=-1, keepdim=True)
            of_scores = of_weights.mul_(weights).to(values.dtype)
            _, _, _, some_cos, some_sin, _ = parts
            of_queries = _rows(torch.matmul(of_scores, keys), seq)
            of_query[part] = _rotated(of_queries, some_cos, -some_sin, ctx.head_dim) * ctx.scaling
            of_keys = _rows(torch.matmul(of_scores.transpose(2, 3), queries), seq)
            of_key[part] = _rotated(of_keys, some_cos, -some_sin, ctx.head_dim)
        return of_query, of_key, of_value, None, None, None, None, None


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    hidden: Tensor,
    *,
    head_dim: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rotated and scaled queries, rotated keys, values, and the float32 weights of the values.

    Each is ``(texts, key_heads, rows, ...)``. Rows of queries and weights are the tokens of each head that shares the
    key's; so keys are not repeated.
    """
    groups = query.shape[2] // key.shape[2]
    queries = _heads((_rotated(query, cos, sin, head_dim) * scaling).to(query.dtype), head_dim, groups)
    keys = _heads(_rotated(key, cos, sin, head_dim).to(key.dtype), head_dim)
    values = _heads(value, head_dim)
    scores = torch.matmul(queries, keys.transpose(2, 3)).float()  # (texts, key_heads, groups * seq, seq)
    scores.unflatten(2, (groups, -1)).add_(hidden)
    return queries, keys, values, scores.softmax(dim=-1)


def _rotated(rows: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Return ``(texts, seq, heads * head_dim)`` float32, each head's vector turned by its token's angles."""
    first, second = rows.unflatten(2, (-1, 2, head_dim // 2)).float().unbind(dim=3)  # (texts, seq, heads, head_dim / 2)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=3).flatten(2)


def _heads(rows: Tensor, head_dim: int, groups: int = 1) -> Tensor:
    """Return ``(texts, key_heads, groups * seq, head_dim)`` of ``(texts, seq, heads * head_dim)``, in order."""
    heads = rows.unflatten(2, (-1, groups, head_dim)).permute(0, 2, 3, 1, 4)
    return heads.flatten(2, 3).contiguous()


def _rows(heads: Tensor, seq: int) -> Tensor:
    """Undo ``_heads``."""
    return heads.unflatten(2, (-1, seq)).permute(0, 3, 1, 2, 4).flatten(2)


def _texts(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, *, head_dim: int
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield some texts at a time: their slice, and what ``_weights`` takes of them."""
    hidden = lowest_where(~seen, torch.float32).unsqueeze(2)  # (batch or 1, 1, 1, seq, seq)
    batch, seq = query.shape[:2]
    for part in _slices(batch, query.shape[2] // head_dim * seq * seq, SCORE_BYTES):
        shared = (tensor[part] if len(tensor) > 1 else tensor for tensor in (cos, sin, hidden))
        yield part, (query[part], key[part], value[part], *shared)


def _slices(rows: int, width: int, size: int = CACHED_BYTES) -> Iterator[slice]:
    """Yield slices of rows of so many float32 numbers that fit a size in bytes."""
    number = max(1, size // (width * torch.float32.itemsize))
    return (slice(start, start + number) for start in range(0, rows, number))


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """Return what a linear layer would compute in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
