"""How fast encoders are side by side: they take turns, so that a slow moment of the machine meets all of them."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from effir_search.encoding.encoder import Encoder
from effir_search.indexing.verify import cosine

# Rounds of encoding, of which the median counts, and the texts that a model encodes before it is the next one's turn:
# so many that those of a batch are of like lengths, as they are while a corpus is encoded.
ROUNDS, TURN = 3, 256


class Turns(NamedTuple):
    """What was measured of encoders in turns.

    Attributes:
        seconds: That all texts took, ``(rounds, models)``.
        joules: Likewise, that the machine took meanwhile; None where it does not tell.
        cosines: Between each model's embeddings of a text and the first model's, the mean; None where their vectors
            are of different lengths.
    """

    seconds: np.ndarray
    joules: np.ndarray | None
    cosines: list[float | None]


def encode_in_turns(
    encoders: Sequence[Encoder],
    texts: Sequence[str],
    *,
    rounds: int = ROUNDS,
    joules: Callable[[], float] | None = None,
) -> Turns:
    """Let encoders encode the same texts, each a few of them before it is the next one's turn.

    They can then be neither trained nor saved.

    Args:
        encoders: The first is the one that cosines are to.
        texts: Documents, at least one.
        rounds: How often all of them are encoded.
        joules: Tells the energy taken since some moment.
    """
    for encoder in encoders:
        encoder.pack().encode_documents(texts[:TURN])  # warm up
    seconds, energy = np.zeros((2, rounds, len(encoders)))
    cosines: list[list[float]] = [[] for _ in encoders]
    with tqdm(total=rounds * len(texts), desc="Encoding in turns", unit=" documents", disable=None) as progress:
        for row in range(rounds):
            for start in range(0, len(texts), TURN):
                turn, embeddings = texts[start : start + TURN], []
                for column, encoder in enumerate(encoders):
                    before, begun = joules() if joules else 0.0, clock(encoder.device)
                    embeddings.append(encoder.encode_documents(turn))
                    seconds[row, column] += clock(encoder.device) - begun
                    energy[row, column] += joules() - before if joules else 0.0
                for column, vectors in enumerate(embeddings):
                    if vectors.shape == embeddings[0].shape:
                        cosines[column] += cosine(vectors, embeddings[0]).tolist()
                progress.update(len(turn))
    means = [statistics.mean(values) if values else None for values in cosines]
    return Turns(seconds, energy if joules else None, means)


def answer_in_turns(encoders: Sequence[Encoder], queries: Sequence[str], *, rounds: int = ROUNDS) -> np.ndarray:
    """Return the seconds from a query's text to its vector, one query at a time, ``(rounds, queries, models)``.

    Args:
        encoders: Each answers a query before the next query comes.
        queries: Texts, at least one.
        rounds: How often all of them are asked.
    """
    for encoder in encoders:
        encoder.pack()
        for query in queries[:10]:  # warm up
            encoder.encode_queries([query])
    seconds = np.zeros((rounds, len(queries), len(encoders)))
    with tqdm(total=rounds * len(queries), desc="One query at a time", unit=" queries", disable=None) as progress:
        for of_round in seconds:
            for of_query, query in zip(of_round, queries, strict=True):
                for column, encoder in enumerate(encoders):
                    begun = clock(encoder.device)
                    encoder.encode_queries([query])
                    of_query[column] = clock(encoder.device) - begun
                progress.update()
    return seconds


def clock(device: torch.device) -> float:
    """Return the time in seconds, once a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
