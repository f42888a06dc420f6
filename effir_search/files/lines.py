"""A JSONL file as a sequence: any line at any time, with only the places of the lines in memory."""

from pathlib import Path

import numpy as np

from effir_search.files.reading import decode, parse_json_object


class Lines:
    """The JSON objects on the lines of a file, read when they are asked for.

    Only where each line begins is kept in memory, 8 bytes each. No file stays open, so that an object can be pickled
    and shared by the processes of a data loader.
    """

    def __init__(self, path: Path) -> None:
        """Find the lines.

        Raises:
            OSError: The file cannot be read.
        """
        self.path = path
        with open(path, "rb") as file:
            lengths = np.fromiter(map(len, file), dtype=np.int64)
        self._starts = np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> dict:
        """Return the object on one line, counted from 0.

        Raises:
            IndexError: There are not so many, or the number is negative.
            ValueError: The line holds no JSON object.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path}: no line {number}, there are {len(self)}, counted from 0")
        with open(self.path, "rb") as file:
            file.seek(self._starts[number])
            line = file.readline()
        where = f"{self.path}:{number + 1}"
        return parse_json_object(decode(line, where), where)
