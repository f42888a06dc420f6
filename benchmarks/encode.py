"""Documents encoded a second, beside Pyserini's AutoDocumentEncoder and sentence-transformers, in one process.

    python benchmarks/encode.py CORPUS MODEL [--rounds 3] [--limit 2000] [--threads 2]

The peers run as they come: float32, batches of 64 texts, 256 tokens at most. Ours runs in bf16 and in float32. All take
turns, round after round, so that a slow moment of the machine meets all of them; medians and ratios of the rounds are
printed, and the mean cosine of each embedding to sentence-transformers'.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import torch

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import Encoder
from effir_search.indexing.encode import in_parts
from effir_search.indexing.read_ahead import read_ahead
from effir_search.indexing.verify import cosine
from effir_search.searching.pyserini_bridge import pyserini_faiss
from effir_search.text.corpus import document_text, read_corpus


def ours(model: str, dtype: str) -> Callable[[list[str]], np.ndarray]:
    """Encode as ``effir index`` does: parts, tokenized ahead of the model."""
    encoder = Encoder.from_pretrained(model, dtype=dtype).pack()

    def encode(texts: list[str]) -> np.ndarray:
        tokens = read_ahead(encoder.tokenize(part, prompt=encoder.config.document_prompt) for part in in_parts(texts))
        return scale(np.concatenate([encoder.encode_tokens(part).embeddings for part in tokens]), encoder.config)

    return encode


def pyserini(model: str) -> Callable[[list[str]], np.ndarray]:
    """Encode with Pyserini's own encoder, batches of 64 in corpus order."""
    pyserini_faiss()
    from pyserini.encode import AutoDocumentEncoder

    encoder = AutoDocumentEncoder(model, device="cpu", pooling="mean", l2_norm=True)

    def encode(texts: list[str]) -> np.ndarray:
        batches = [texts[start : start + 64] for start in range(0, len(texts), 64)]
        return np.concatenate([encoder.encode(batch, max_length=256) for batch in batches])

    return encode


def sentence_transformers(model: str) -> Callable[[list[str]], np.ndarray]:
    """Encode with sentence-transformers, batches of 64 sorted by length."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    encoder.max_seq_length = 256
    return lambda texts: encoder.encode_document(texts, batch_size=64, show_progress_bar=False)


@click.command()
@click.argument("corpus")
@click.argument("model")
@click.option("--rounds", default=3)
@click.option("--limit", default=2000, help="Documents that are encoded.")
@click.option("--threads", default=2)
def main(corpus: str, model: str, rounds: int, limit: int, threads: int) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    texts = [document_text(document) for document in itertools.islice(read_corpus(corpus), limit)]
    peers = {
        "sentence-transformers": sentence_transformers(model),
        "Pyserini": pyserini(model),
        "effir fp32": ours(model, "fp32"),
        "effir bf16": ours(model, "bf16"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in peers}
    embeddings = {}
    for encode in peers.values():
        encode(texts[:64])  # warm up
    for _ in range(rounds):
        for name, encode in peers.items():
            start = time.perf_counter()
            embeddings[name] = encode(texts)
            speeds[name].append(len(texts) / (time.perf_counter() - start))
    reference = embeddings["sentence-transformers"]
    print(f"{len(texts)} documents of {corpus}, {threads} threads, medians of {rounds} rounds\n")
    print("| encoder | documents/s | beside Pyserini | beside sentence-transformers | mean cosine |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, of_rounds in speeds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(of_rounds, speeds[peer], strict=True))
            for peer in ("Pyserini", "sentence-transformers")
        ]
        similarity = cosine(embeddings[name], reference).mean()
        cells = [
            name,
            f"{statistics.median(of_rounds):.0f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{similarity:.5f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
