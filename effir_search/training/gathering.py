"""The rows of all processes that train together, with their gradients."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def process_rank() -> int:
    """Return the number of this process, 0 where there is no other."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gathered(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the rows of all processes, in their order; gradients flow to the process that a row comes from."""
    return _Gather.apply(tensor, sizes) if len(sizes) > 1 else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        ctx.start, ctx.rows = sum(sizes[: process_rank()]), len(tensor)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.rows], None
