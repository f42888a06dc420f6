"""A bound for what torch keeps of each shape of batch that it has seen: a server sees them all."""

import os

# Of oneDNN's own cache and of torch's before it. Each shape of a batch is 3.4 MB with all-MiniLM-L6-v2, so that the
# 1,024 kernels that both keep by themselves take hundreds of MB; with 16 a query takes as long.
KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


def bound_kernel_caches() -> None:
    """Let oneDNN and torch keep 16 kernels each, unless the environment says otherwise; call it before torch loads."""
    for name, number in KEPT.items():
        os.environ.setdefault(name, number)
