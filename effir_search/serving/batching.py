"""Requests that wait are answered together: one forward pass and one search for all of them."""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from ir_measures import ScoredDoc

from effir_search.encoding.encoder import Encoder
from effir_search.searching.searcher import Searcher

logger = logging.getLogger(__name__)

# Texts that are encoded together, and those of one request for embeddings: between two such pieces others have a turn.
BATCH, PIECE = 64, 16


class Embeddings(NamedTuple):
    """``vectors`` is ``(texts, dimension)`` float32; ``num_tokens`` counts what was read, special tokens included."""

    vectors: np.ndarray
    num_tokens: int


@dataclass(eq=False)
class _Job:
    """Texts that one request wants encoded, or one query to be searched for.

    Attributes:
        encoder: Of the texts.
        prompt: Put before each.
        texts: One text if it is a query.
        searcher: Where the query is searched; None = the vectors are asked for.
        hits: Hits of the query.
        answer: An ``Embeddings``, or a list of ``ScoredDoc``.
    """

    encoder: Encoder
    prompt: str
    texts: Sequence[str]
    searcher: Searcher | None = None
    hits: int = 0
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Encodes and searches, in a thread of its own, whatever waits at the moment; nobody waits for a batch to fill.

    Attributes:
        num_batches: Batches so far.
        num_texts: Texts in them.
    """

    def __init__(self) -> None:
        self.num_batches = self.num_texts = 0
        self._queries: deque[_Job] = deque()
        self._pieces: deque[_Job] = deque()
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "batches")

    async def search(self, searcher: Searcher, text: str, hits: int) -> list[ScoredDoc]:
        """Return the best hits of a query, best first.

        Raises:
            ValueError: A damaged index, a vector that is not finite.
        """
        encoder = searcher.encoder
        job = _Job(encoder, encoder.config.query_prompt, [text], searcher, hits)
        self._queries.append(job)
        self._work.set()
        return await job.answer

    async def encode(self, encoder: Encoder, texts: Sequence[str], prompt: str) -> Embeddings:
        """Return the embeddings of texts, in order, as the encoder gives them.

        Raises:
            ValueError: A vector that is not finite.
        """
        pieces = [texts[start : start + PIECE] for start in range(0, len(texts), PIECE)]
        jobs = [_Job(encoder, prompt, piece) for piece in pieces]
        self._pieces.extend(jobs)
        self._work.set()
        done = await asyncio.gather(*(job.answer for job in jobs))
        return Embeddings(np.concatenate([one.vectors for one in done]), sum(one.num_tokens for one in done))

    async def run(self) -> None:
        """Answer jobs until the task is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            jobs = self._next_batch()
            if not jobs:
                self._work.clear()
                continue
            self.num_batches += 1
            self.num_texts += sum(len(job.texts) for job in jobs)
            for job, answer in await loop.run_in_executor(self._thread, _answers, jobs):
                if job.answer.done():  # its request is over its time
                    continue
                if isinstance(answer, Exception):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)

    def _next_batch(self) -> list[_Job]:
        """Take queries that wait, and pieces: at least one of these in every batch, so that none waits for ever."""
        jobs: list[_Job] = []
        room = BATCH
        for waiting, least in ((self._queries, PIECE), (self._pieces, 0)):
            while waiting and room > (least if self._pieces else 0):
                job = waiting.popleft()
                if not job.answer.done():
                    jobs.append(job)
                    room -= len(job.texts)
        return jobs


Answer = Embeddings | list[ScoredDoc] | Exception


def _answers(jobs: Sequence[_Job]) -> list[tuple[_Job, Answer]]:
    """Return each job with its answer."""
    answers: list[tuple[_Job, Answer]] = []
    for group in _grouped(jobs, lambda job: (id(job.encoder), job.prompt)):
        answers += _one_by_one_if_it_fails(group, _encode_and_search)
    return answers


def _grouped(jobs: Sequence[_Job], key: Callable[[_Job], object]) -> list[list[_Job]]:
    groups: dict[object, list[_Job]] = {}
    for job in jobs:
        groups.setdefault(key(job), []).append(job)
    return list(groups.values())


def _one_by_one_if_it_fails(
    jobs: list[_Job], answer: Callable[[list[_Job]], list[tuple[_Job, Answer]]]
) -> list[tuple[_Job, Answer]]:
    """Answer jobs together; if that fails, each alone, so that only the one whose fault it is gets the error."""
    try:
        return answer(jobs)
    except Exception as error:  # whoever waits for the answer gets it, whatever it is
        if len(jobs) == 1:
            return [(jobs[0], error)]
        return [pair for job in jobs for pair in _one_by_one_if_it_fails([job], answer)]


def _encode_and_search(jobs: list[_Job]) -> list[tuple[_Job, Answer]]:
    """Answer jobs of one encoder and prompt."""
    encoder, prompt = jobs[0].encoder, jobs[0].prompt
    tokens = encoder.tokenize([text for job in jobs for text in job.texts], prompt=prompt)
    vectors = encoder.encode_tokens(tokens).embeddings  # (texts, dimension)
    ends = list(itertools.accumulate(len(job.texts) for job in jobs))
    rows = {job: slice(end - len(job.texts), end) for job, end in zip(jobs, ends, strict=True)}
    answers: list[tuple[_Job, Answer]] = []
    for group in _grouped(jobs, lambda job: (id(job.searcher), job.hits)):
        searcher = group[0].searcher
        if searcher is None:
            for job in group:
                num_tokens = sum(map(len, tokens.input_ids[rows[job]]))
                answers.append((job, Embeddings(vectors[rows[job]], num_tokens)))
        else:
            found = searcher.search_vectors(np.concatenate([vectors[rows[job]] for job in group]), group[0].hits)
            answers += zip(group, found, strict=True)
    return answers
