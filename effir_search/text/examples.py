"""Training data as examples: a query, one positive and its negatives on each line of a file, read by line."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from effir_search.errors import UserError
from effir_search.files.lines import Lines
from effir_search.files.whole import whole_file
from effir_search.text.training_records import read_records

Pair = tuple[str, str]
Scorer = Callable[[Sequence[Pair]], list[float]]


class Example(NamedTuple):
    """One line of a file that ``prepare_examples`` wrote.

    Attributes:
        query: Without a prompt.
        positive: The document that answers it.
        negatives: Maybe none.
        scores: A teacher's, of the positive and then of the negatives.
        known: ``document_key`` of all positives of this query text, this one among them.
    """

    query: str
    positive: str
    negatives: list[str]
    scores: list[float] | None
    known: list[int]


def document_key(text: str) -> int:
    """Return a signed 64-bit number that stands for a text: the first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big", signed=True)


def prepare_examples(
    source: str | Path,
    output: Path,
    *,
    corpus: str | Path | None = None,
    topics: str | Path | None = None,
    split: str = "train",
    max_negatives: int = 8,
) -> int:
    """Write training data as one line for each query and positive, for ``Examples``; return the number of lines.

    Args:
        source: As ``read_records`` takes it, like the next three; it is read twice.
        output: New file; it appears whole or not at all.
        corpus: See ``read_records``.
        topics: See ``read_records``.
        split: See ``read_records``.
        max_negatives: So many of a record's negatives are kept, the first ones.

    Raises:
        ValueError: A bad record, named with its line; no record at all.
        OSError: A file cannot be read or written.
    """
    if max_negatives < 0:
        raise UserError(f"max_negatives {max_negatives} must be at least 0")
    known: dict[int, dict[int, None]] = {}
    for _, record in read_records(source, corpus=corpus, topics=topics, split=split):
        keys = known.setdefault(document_key(record.query), {})
        keys.update(dict.fromkeys(map(document_key, record.positives)))
    num_lines = 0
    with whole_file(output) as file:
        for _, record in read_records(source, corpus=corpus, topics=topics, split=split, warn=False):
            keys = list(known[document_key(record.query)])
            negatives = record.negatives[:max_negatives]
            for number, positive in enumerate(record.positives):
                scores = None
                if record.scores is not None:
                    first = len(record.positives)
                    scores = [record.scores[number], *record.scores[first : first + len(negatives)]]
                file.write(_line(Example(record.query, positive, negatives, scores, keys)))
                num_lines += 1
    return num_lines


class Examples:
    """The examples of a file that ``prepare_examples`` wrote, read when they are asked for."""

    def __init__(self, path: str | Path) -> None:
        """Find the lines.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is empty.
        """
        self.lines = Lines(Path(path))
        if len(self.lines) == 0:
            raise UserError(f"{path}: no examples in it")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> Example:
        """Return one example, counted from 0.

        Raises:
            IndexError: There are not so many, or the number is negative.
            ValueError: The line is not one that ``prepare_examples`` writes.
        """
        record = self.lines[number]
        if missing := [name for name in ("query", "positive", "negatives", "known") if name not in record]:
            where = f"{self.lines.path}:{number + 1}"
            raise UserError(f"{where}: no {missing[0]!r} field, so these are no prepared examples; prepare them first")
        return Example(record["query"], record["positive"], record["negatives"], record.get("scores"), record["known"])


def with_scores(examples_file: Path, output: Path, score: Scorer, *, batch_size: int = 256) -> int:
    """Write prepared examples again, with a teacher's scores of the positive and each negative; return their number.

    What a call that was stopped has scored is in ``OUTPUT.part``, and the next one goes on after it.

    Args:
        examples_file: From ``prepare_examples``; scores that are there already are replaced.
        output: New file; it appears whole or not at all.
        score: Gives one score for each ``(query, document)``.
        batch_size: Examples whose pairs are scored together.

    Raises:
        ValueError: Not prepared examples, or scores of another number or not finite.
        OSError: A file cannot be read or written.
    """
    examples, part = Examples(examples_file), output.with_name(f"{output.name}.part")
    # Whole batches, so that the bits of scores are those of an undisturbed call.
    num_scored = _keep_whole_lines(part, batch_size)
    with (
        open(part, "a", encoding="utf-8") as file,
        tqdm(total=len(examples), initial=num_scored, unit="example", disable=None) as progress,
    ):
        for start in range(num_scored, len(examples), batch_size):
            batch = [examples[number] for number in range(start, min(start + batch_size, len(examples)))]
            pairs = [(example.query, text) for example in batch for text in (example.positive, *example.negatives)]
            scores = iter(checked_scores(score(pairs), len(pairs)))
            for example in batch:
                candidates = 1 + len(example.negatives)
                file.write(_line(example._replace(scores=list(itertools.islice(scores, candidates)))))
            file.flush()
            progress.update(len(batch))
        os.fsync(file.fileno())
    os.replace(part, output)
    return len(examples)


def _keep_whole_lines(path: Path, multiple: int) -> int:
    """Cut a file that a stopped job wrote to a multiple of so many lines, and return how many it has then."""
    if not path.is_file():
        return 0
    with open(path, "rb+") as file:
        number = end = at = 0
        for count, line in enumerate(file, start=1):
            at += len(line)
            if count % multiple == 0 and line.endswith(b"\n"):
                number, end = count, at
        file.truncate(end)
    return number


def checked_scores(scores: Sequence[float], number: int) -> Sequence[float]:
    """Return a teacher's scores.

    Raises:
        ValueError: There are not so many, or one is not finite.
    """
    if len(scores) != number:
        raise UserError(f"the teacher gave {len(scores)} scores for {number} pairs")
    if bad := [score for score in scores if not math.isfinite(score)]:
        raise UserError(f"the teacher gave the score {bad[0]}, which is not finite ({len(bad)} of {number})")
    return scores


def _line(example: Example) -> str:
    fields = example._asdict()
    if example.scores is None:
        del fields["scores"]
    return json.dumps(fields, ensure_ascii=False) + "\n"
