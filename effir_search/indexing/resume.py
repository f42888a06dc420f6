"""What a stopped job and the one that continues it must have in common, to the bit."""

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

import torch

from effir_search.encoding.encoder import Encoder
from effir_search.model.checkpoint import dtype_name
from effir_search.model.graph_model import PACKAGES

# Documents of a part: few enough that a stopped job loses little, enough that texts of one length find each other.
PART_SIZE = 1024


@dataclass(frozen=True)
class StoreSettings:
    """What the vectors of a store depend on, to the bit: a job that differs in one of these cannot continue it.

    The processor is the exception: on another one the last bits differ, which makes the vectors no worse.

    Attributes:
        model_sha256: See ``model.checkpoint.weights_sha256``.
        encoder: The fields of the ``EncoderConfig``.
        backend: What computes, see ``Encoder``.
        dtype: Of the transformer's arithmetic, as torch names it.
        device: "cpu" or "cuda".
        threads: Of torch.
        batch_tokens: See ``Encoder``.
        dimension: Components of a vector.
        part_size: Documents of a part; the last may have fewer.
        corpus_sha256: See ``corpus.CorpusHasher``; None where a program hands over the documents.
        versions: Of the packages that do the arithmetic.
        processor: Of the job that began the store, see ``processor_name``.
    """

    model_sha256: str
    encoder: dict[str, object]
    backend: str = field(default="torch", kw_only=True)  # before what depends on it: the first difference is told
    dtype: str
    device: str
    threads: int
    batch_tokens: int
    dimension: int
    part_size: int
    corpus_sha256: str | None
    versions: dict[str, str]
    processor: str


ARITHMETIC = ("torch", "transformers", "tokenizers")


def settings_of(encoder: Encoder, corpus_sha256: str | None) -> StoreSettings:
    """Return what the vectors of a job with this encoder depend on."""
    return StoreSettings(
        model_sha256=encoder.weights_sha256,
        encoder=asdict(encoder.config),
        dtype=dtype_name(encoder.dtype),
        device=encoder.device.type,
        threads=torch.get_num_threads(),
        batch_tokens=encoder.batch_tokens,
        dimension=encoder.dimension,
        part_size=PART_SIZE,
        corpus_sha256=corpus_sha256,
        versions={package: version(package) for package in (*ARITHMETIC, *packages_of(encoder.backend))},
        processor=processor_name(encoder.device),
        backend=encoder.backend,
    )


def processor_name(device: torch.device) -> str:
    """Return the model of a GPU or CPU; of a CPU also what torch computes with, since virtual machines hide models."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    able = torch.cpu.get_capabilities()
    sets = [torch.backends.cpu.get_cpu_capability(), *(name for name in ("avx512_bf16", "amx_bf16") if able.get(name))]
    return f"{able.get('cpu_name') or platform.machine()} ({', '.join(sets)})"


def packages_of(backend: str) -> list[str]:
    """Return what computes besides torch."""
    return [PACKAGES[backend]] if backend in PACKAGES else []
