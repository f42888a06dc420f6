"""Norms, gates and attention of Llama's kin for training on a CPU: they keep little and work within its caches.

In eager mode each of them is a dozen passes over tensors that no cache holds, in float32, and torch keeps most of these
for the backward pass. Here a few rows go through all passes at a time, and what is cheap is computed again when its
gradient is due. Results differ from the stock modules' by rounding only.
"""

from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from effir_search.model.packed import lowest_where

# Bytes of one float32 tensor of those that a few rows need at once, so that all stay in a core's cache.
CACHED_BYTES = 1_000_000
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
    seen = attention_mask
    if seen is None:
        # transformers hands on what the model's config says; without a word a language model sees what is before.
        causal = options.get("is_causal") is not False
        seen = visible(hidden_states.shape[1], hidden_states.device, causal=causal)
    attended = _RotaryAttention.apply(query, key, value, *position_embeddings, seen, self.head_dim, self.scaling)
    return self.o_proj(attended), None


def visible(seq: int, device: torch.device, *, causal: bool) -> Tensor:
    """Return which tokens each token sees, ``(1, 1, seq, seq)`` bool: all, or if causal itself and those before it."""
    everything = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=device)
    return everything.tril() if causal else everything


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
            lengths = torch.linalg.vector_norm(some, dim=-1, keepdim=True)
            scales[part] = (lengths.square_() / width + eps).rsqrt_()
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
            shares = torch.mv(products, plain).div_(rows.shape[1]).unsqueeze(1)
            some = some.mul_(plain) if gradients.dtype != torch.float32 else some * plain
            of_x[part] = some.addcmul_(normed, shares, value=-1).mul_(scales[part])
        return of_x.view(x.shape), of_weight.to(weight.dtype), None, None


class _GatedUnits(torch.autograd.Function):
    """``silu(gate) * up``; both are ``(..., units)``, and so is what is returned."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        gates, ups = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gate, up))
        units = torch.empty_like(gates)
        for part in _slices(len(gates), gates.shape[1]):
            torch.mul(F.silu(gates[part]), ups[part], out=units[part])
        return units.view(gate.shape)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gates, ups, gradients = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gate, up, gradient))
        of_gate, of_up = torch.empty_like(gates), torch.empty_like(ups)
        for part in _slices(len(gates), gates.shape[1]):
            torch.mul(F.silu(gates[part]), gradients[part], out=of_up[part])
            torch.ops.aten.silu_backward(gradients[part] * ups[part], gates[part], grad_input=of_gate[part])
        return of_gate.view(gate.shape), of_up.view(up.shape)


class _RotaryAttention(torch.autograd.Function):
    """Causal or masked attention with rotary positions, from what linear layers give to what the next one takes.

    ``apply`` takes query ``(batch, seq, heads * head_dim)``, key and value ``(batch, seq, key_heads * head_dim)``, cos
    and sin ``(batch or 1, seq, head_dim)``, a mask ``(batch or 1, 1, seq, seq)`` bool, True = seen, head_dim and the
    scale of products. Kept are the turned queries and keys, the values, and the weights of the values.
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
        batch, seq, _ = query.shape
        groups = query.shape[2] // key.shape[2]
        cos, sin = (part.to(query.dtype)[:, None, None] for part in (cos, sin))  # (batch or 1, 1, 1, seq, head_dim)
        hidden = lowest_where(~seen, query.dtype).unsqueeze(2)  # (batch or 1, 1, 1, seq, seq)
        turn = _half_turn(head_dim, query.dtype, query.device)
        heads = query.new_empty(batch, key.shape[2] // head_dim, groups + 2, seq, head_dim)
        weights = query.new_empty(batch, heads.shape[1], groups, seq, seq)
        attended = torch.empty_like(query)
        with torch.autocast(query.device.type, enabled=False):
            for part in _slices(batch, weights[0].numel(), SCORE_BYTES):
                some_cos, some_sin, some_hidden = (t[part] if len(t) > 1 else t for t in (cos, sin, hidden))
                some = heads[part]
                some[:, :, :groups] = _heads(query[part], head_dim, groups) * scaling
                some[:, :, groups] = _heads(key[part], head_dim)[:, :, 0]
                some[:, :, groups + 1] = _heads(value[part], head_dim)[:, :, 0]
                turned = some[:, :, : groups + 1]
                turned.copy_(_turned(turned, some_cos, some_sin, turn))
                queries, keys, values = _parts(some)
                scores = torch.matmul(queries, keys.transpose(2, 3)).view(weights[part].shape)
                weights[part] = scores.add_(some_hidden).softmax(dim=-1)
                outputs = torch.matmul(weights[part].flatten(2, 3), values)
                attended[part] = _rows(outputs.view(len(some), -1, groups, seq, head_dim))
        ctx.save_for_backward(heads, weights, cos, sin)
        ctx.scaling = scaling
        return attended

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        heads, weights, cos, sin = ctx.saved_tensors
        batch, key_heads, groups, seq, _ = weights.shape
        head_dim = heads.shape[-1]
        turn = _half_turn(head_dim, heads.dtype, heads.device)
        of_query = gradient.new_empty(batch, seq, key_heads * groups * head_dim)
        of_key, of_value = (gradient.new_empty(batch, seq, key_heads * head_dim) for _ in range(2))
        for part in _slices(batch, weights[0].numel(), SCORE_BYTES):
            some_cos, some_sin = (t[part] if len(t) > 1 else t for t in (cos, sin))
            queries, keys, values = _parts(heads[part])
            some = weights[part].flatten(2, 3)  # (texts, key_heads, groups * seq, seq)
            outputs = _heads(gradient[part], head_dim, groups).flatten(2, 3)
            of_value[part] = _rows(torch.matmul(some.transpose(2, 3), outputs).unsqueeze(2))
            of_weights = torch.matmul(outputs, values.transpose(2, 3))
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, some, -1, some.dtype)
            of_heads = torch.empty_like(heads[part][:, :, : groups + 1])
            of_heads[:, :, :groups] = torch.matmul(of_scores, keys).unflatten(2, (groups, seq))
            of_heads[:, :, groups] = torch.matmul(of_scores.transpose(2, 3), queries)
            of_heads = _turned(of_heads, some_cos, -some_sin, turn)
            of_query[part] = _rows(of_heads[:, :, :groups]) * ctx.scaling
            of_key[part] = _rows(of_heads[:, :, groups:])
        return of_query, of_key, of_value, None, None, None, None, None


def _half_turn(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what a head's vector is multiplied with to be (-second half, first half), as rotary positions need."""
    half = head_dim // 2
    matrix = torch.zeros(head_dim, head_dim, dtype=dtype, device=device)
    matrix[:half, half:].fill_diagonal_(1)
    matrix[half:, :half].fill_diagonal_(-1)
    return matrix


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, turn: Tensor) -> Tensor:
    """Return ``(..., seq, head_dim)``, each vector turned by its token's angles; ``turn`` is a ``_half_turn``."""
    return torch.addcmul(heads * cos, torch.matmul(heads, turn), sin)


def _heads(rows: Tensor, head_dim: int, groups: int = 1) -> Tensor:
    """Return ``(texts, key_heads, groups, seq, head_dim)`` of ``(texts, seq, heads * head_dim)``.

    The heads that share a key are its group, so that keys need not be repeated.
    """
    return rows.unflatten(2, (-1, groups, head_dim)).permute(0, 2, 3, 1, 4)


def _rows(heads: Tensor) -> Tensor:
    """Undo ``_heads``."""
    return heads.permute(0, 3, 1, 2, 4).flatten(2)


def _parts(heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries ``(texts, key_heads, groups * seq, head_dim)``, and keys and values with ``seq`` rows."""
    groups = heads.shape[2] - 2
    return heads[:, :, :groups].flatten(2, 3), heads[:, :, groups], heads[:, :, groups + 1]


def _slices(rows: int, width: int, size: int = CACHED_BYTES) -> Iterator[slice]:
    """Yield slices of rows of so many float32 numbers that fit a size in bytes."""
    number = max(1, size // (width * torch.float32.itemsize))
    return (slice(start, start + number) for start in range(0, rows, number))


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """Return what a linear layer would compute in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
