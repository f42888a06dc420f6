"""Documents encoded a second, beside Pyserini's AutoDocumentEncoder and sentence-transformers, in one process.

    python benchmarks/encode.py CORPUS MODEL [--rounds 3] [--limit 2000] [--threads 2] [--batch-size 64]
        [--openvino EXPORT] [--int8 EXPORT]

The peers run batches of 64 texts of 256 tokens at most, Pyserini in float32, sentence-transformers in float32 and
bfloat16. With exports (effir export --to openvino, and --int8) sentence-transformers runs them, too, by optimum-intel,
which must be installed. Ours runs in float32 and bfloat16, by torch and by OpenVINO, and in int8. All take turns, round
after round, so that a slow moment of the machine meets all of them; medians and ratios of the rounds are printed, and
the mean cosine of each embedding to those of sentence-transformers in float32.
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


def ours(model: str, dtype: str | None = None) -> Callable[[list[str]], np.ndarray]:
    """Encode as ``effir index`` does: parts, tokenized ahead of the model."""
    encoder = Encoder.from_pretrained(model, dtype=dtype, device="cpu").pack()

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


def sentence_transformers(model: str, batch_size: int, **settings: object) -> Callable[[list[str]], np.ndarray]:
    """Encode with sentence-transformers, batches sorted by length."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu", **settings)
    encoder.max_seq_length = 256
    return lambda texts: encoder.encode_document(texts, batch_size=batch_size, show_progress_bar=False)


def by_openvino(model: str, batch_size: int, threads: int, hint: str) -> Callable[[list[str]], np.ndarray]:
    """Encode an export with sentence-transformers and OpenVINO, whose products are in "f32" or "bf16" by a hint."""
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return sentence_transformers(model, batch_size, backend="openvino", model_kwargs={"ov_config": settings})


@click.command()
@click.argument("corpus")
@click.argument("model")
@click.option("--rounds", default=3)
@click.option("--limit", default=2000, help="Documents that are encoded.")
@click.option("--threads", default=2)
@click.option("--batch-size", default=64, help="Of sentence-transformers.")
@click.option("--openvino", help="Export of the model in float32.")
@click.option("--int8", help="Export of the model in int8.")
def main(
    corpus: str,
    model: str,
    rounds: int,
    limit: int,
    threads: int,
    batch_size: int,
    openvino: str | None,
    int8: str | None,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    texts = [document_text(document) for document in itertools.islice(read_corpus(corpus), limit)]
    peers = {
        "sentence-transformers": sentence_transformers(model, batch_size),
        "sentence-transformers bf16": sentence_transformers(model, batch_size, model_kwargs={"dtype": torch.bfloat16}),
        "Pyserini": pyserini(model),
        "effir fp32": ours(model, "fp32"),
        "effir bf16": ours(model, "bf16"),
    }
    if openvino:
        for hint in ("f32", "bf16"):
            peers[f"sentence-transformers OpenVINO {hint}"] = by_openvino(openvino, batch_size, threads, hint)
        peers["effir OpenVINO fp32"] = ours(openvino, "fp32")
        peers["effir OpenVINO bf16"] = ours(openvino, "bf16")
    if int8:
        peers["sentence-transformers OpenVINO int8"] = by_openvino(int8, batch_size, threads, "bf16")
        peers["effir int8"] = ours(int8)
    speeds: dict[str, list[float]] = {name: [] for name in peers}
    embeddings = {}
    for encode in peers.values():
        encode(texts[:256])  # warm up
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
