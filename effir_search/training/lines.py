"""A JSONL file as a sequence: any line at any time, with only the places of the lines in memory."""

import json
from pathlib import Path

import numpy as np


class Lines:
    """The JSON values on the lines of a file, read when they are asked for. May be sent to other processes.

    Args:
        path: A file of UTF-8 lines that each hold one JSON value, as this project writes them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            lengths = np.fromiter(map(len, file), dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> object:
        if not 0 <= number < len(self):
            raise IndexError(f"line {number} of {len(self)} of {self.path}")
        with open(self.path, "rb") as file:
            file.seek(self._starts[number])
            return json.loads(file.readline())
