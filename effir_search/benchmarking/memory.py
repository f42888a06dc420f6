"""How much memory encoding takes: measured in a process that does nothing else."""

import json
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from effir_search.encoding.encoder import Encoder
from effir_search.files.reading import read_json
from effir_search.files.whole import whole_file
from effir_search.indexing.workers import run_workers
from effir_search.settings import EncoderOptions

STATUS = Path("/proc/self/status")


class Memory(NamedTuple):
    """Bytes of memory of a process that loads an encoder and encodes texts.

    Attributes:
        before: The most until the model is loaded: Python, libraries, the texts.
        peak: The most at all.
        gpu: The most that torch had on a GPU; None on a CPU.
    """

    before: int
    peak: int
    gpu: int | None


class MemoryJob(NamedTuple):
    """What a process measures: ``output`` gets a ``Memory`` as JSON."""

    model: str
    options: EncoderOptions
    texts: list[str]
    threads: int
    output: Path


def measure_memory(model: str, options: EncoderOptions, texts: list[str], *, threads: int, scratch: Path) -> Memory:
    """Return the memory that an encoder takes in a process of its own.

    Args:
        model: Folder or hub name.
        options: How it is loaded.
        texts: Documents that it encodes.
        threads: Of torch.
        scratch: A file that is written, read and removed.
    """
    run_workers(encode_measured, [MemoryJob(model, options, texts, threads, scratch)])
    memory = Memory(**read_json(scratch))
    scratch.unlink()
    return memory


def encode_measured(job: MemoryJob) -> None:
    """Load, encode, and write down the memory of this process."""
    torch.set_num_threads(job.threads)
    before = peak_memory()
    encoder = Encoder.from_pretrained(job.model, job.options).pack()
    encoder.encode_documents(job.texts)
    gpu = torch.cuda.max_memory_allocated(encoder.device) if encoder.device.type == "cuda" else None
    with whole_file(job.output) as file:
        json.dump(Memory(before, peak_memory(), gpu)._asdict(), file)


def peak_memory() -> int:
    """Return the most bytes that were resident of this process."""
    if STATUS.is_file():
        # getrusage would count those of the process that started this one, too.
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
