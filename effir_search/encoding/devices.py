"""Which processor computes, and in which type of numbers."""

import os

import torch

from effir_search.errors import UserError

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def chosen_device(name: str) -> torch.device:
    """Return the device of a name: "auto" is a GPU if there is one, under a launcher each process its own.

    Raises:
        ValueError: No such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # torchrun's and SLURM's
        return torch.device("cuda", int(local_rank) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r}: known are auto, cpu, cuda, cuda:1, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r}: known are auto, cpu, cuda, cuda:1, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this torch ({torch.__version__}) sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def chosen_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """Return the type of a name, or of torch's own; "auto" is by device, "saved" is None.

    Raises:
        ValueError: Any other.
    """
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if name == "saved":
        return None
    if name == "auto":
        return torch.bfloat16 if computes_in_bf16(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r}: known are auto, saved, {', '.join(DTYPES)}")
    return DTYPES[name]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the CPU on another device; a GPU fetches it by itself while this process goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies in bfloat16 by itself, instead of converting to float32 and back."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return able.get("avx512_bf16", False) or able.get("amx_bf16", False)
