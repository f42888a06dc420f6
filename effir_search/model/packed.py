"""Linear layers whose weights lie as the processor reads them: the same products, without a rearrangement each time."""

import torch
from torch import Tensor, nn

# oneDNN chooses a layout for about so many rows; others are multiplied as rightly with it.
ROWS = 2048


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


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a CPU model in bfloat16 by packed ones; afterwards it cannot be trained or saved.

    Other dtypes and devices are left alone: their products are fast as they are.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            packable = type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.is_cpu
            if packable:
                setattr(parent, name, PackedLinear(child))
