"""What was measured of several encoders, raw, and the medians and ratios that are told of it."""

import statistics
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from effir_search.evaluation.benchmark import shares_kept


@dataclass(frozen=True)
class Measured:
    """One encoder, raw.

    Attributes:
        label: What it is called: a name that holds on other machines, and the arithmetic.
        model: As it was named.
        dtype: Of the transformer's arithmetic.
        weights_sha256: Of the files that its weights are in.
        config: How a text becomes a vector.
        sizes: Parameters and bytes, see ``arithmetic.facts``; the bytes of an exported model are those of its graph.
        tokens: Of all texts, special ones included.
        flops: Of encoding all texts; None of a family whose work is not known.
        matmul_flops: Floating-point operations a second of a large product of matrices in this arithmetic.
        seconds: Of encoding all texts, by round.
        joules: Likewise; None where the machine does not tell.
        latencies: Seconds from a query's text to its vector, by round and query; empty without queries.
        memory: See ``memory.Memory``.
        cosine: Mean of its embeddings of the texts to the first encoder's; None where the lengths of vectors differ.
        ndcg: By query nDCG@10; None without topics and qrels.
    """

    label: str
    model: str
    dtype: str
    weights_sha256: str
    config: dict[str, object]
    sizes: dict[str, int]
    tokens: int
    flops: int | None
    matmul_flops: float
    seconds: list[float]
    joules: list[float] | None
    latencies: list[list[float]]
    memory: dict[str, int | None]
    cosine: float | None
    ndcg: dict[str, float] | None


@dataclass(frozen=True)
class BenchmarkRecord:
    """All that was measured.

    Attributes:
        command: That measures it again.
        machine: Its processor and system, by name.
        versions: By package.
        corpus: Its name, hash and number of documents.
        num_texts: Documents that were encoded for speed and memory.
        num_queries: That were asked for latency, and where they are from.
        encoders: The first one is what the others are compared with.
    """

    command: str
    machine: dict[str, object]
    versions: dict[str, str]
    corpus: dict[str, object]
    num_texts: int
    num_queries: tuple[int, str]
    encoders: list[Measured]


class Figures(NamedTuple):
    """What is told of an encoder; ratios are to the first one, and None is what was not measured.

    Attributes:
        documents_per_second: Median of the rounds.
        speedup: Median of the rounds' ratios; above 1 is faster.
        tokens_per_second: Median of the rounds.
        latency_p50: Milliseconds, over all rounds and queries.
        latency_p99: Likewise.
        latency_speedup: Median of the ratios of the rounds' medians; above 1 is faster.
        share_of_peak: Of what large products of matrices reach, at the median round.
        flops_per_text: Mean.
        flops_ratio: The first one's FLOPs by these; above 1 is less work.
        joules_per_thousand: Documents, median of the rounds.
        ndcg: Mean over queries.
        kept: The share of the first one's nDCG@10, with the ends of its 95 % interval.
    """

    documents_per_second: float
    speedup: float
    tokens_per_second: float
    latency_p50: float | None
    latency_p99: float | None
    latency_speedup: float | None
    share_of_peak: float | None
    flops_per_text: float | None
    flops_ratio: float | None
    joules_per_thousand: float | None
    ndcg: float | None
    kept: tuple[float, float, float] | None


def figures_of(record: BenchmarkRecord) -> list[Figures]:
    """Return the figures of each encoder, in their order."""
    first = record.encoders[0]
    shares = None
    if first.ndcg:
        shares = shares_kept({"": np.array([list(encoder.ndcg.values()) for encoder in record.encoders])})
    return [
        _figures(encoder, first, record.num_texts, shares[place] if shares else None)
        for place, encoder in enumerate(record.encoders)
    ]


def _figures(encoder: Measured, first: Measured, num_texts: int, kept: tuple[float, float, float] | None) -> Figures:
    seconds = statistics.median(encoder.seconds)
    ratios = [theirs / ours for theirs, ours in zip(first.seconds, encoder.seconds, strict=True)]
    latencies = zip(first.latencies, encoder.latencies, strict=True)
    latency_ratios = [statistics.median(theirs) / statistics.median(ours) for theirs, ours in latencies]
    p50, p99 = np.percentile(encoder.latencies, [50, 99]) * 1000 if encoder.latencies else (None, None)
    return Figures(
        documents_per_second=num_texts / seconds,
        speedup=statistics.median(ratios),
        tokens_per_second=encoder.tokens / seconds,
        latency_p50=None if p50 is None else float(p50),
        latency_p99=None if p99 is None else float(p99),
        latency_speedup=statistics.median(latency_ratios) if latency_ratios else None,
        share_of_peak=None if encoder.flops is None else encoder.flops / seconds / encoder.matmul_flops,
        flops_per_text=None if encoder.flops is None else encoder.flops / num_texts,
        flops_ratio=first.flops / encoder.flops if first.flops and encoder.flops else None,
        joules_per_thousand=1000 * statistics.median(encoder.joules) / num_texts if encoder.joules else None,
        ndcg=statistics.mean(encoder.ndcg.values()) if encoder.ndcg else None,
        kept=kept,
    )


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Return the places of points of which no other is as good in both figures and better in one; larger is better."""
    return [
        place
        for place, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]
