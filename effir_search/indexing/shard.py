"""Which block of a corpus's parts is a process's share."""

from typing import NamedTuple


class Shard(NamedTuple):
    """Shard ``number`` (0-based) of ``count``: the number-th contiguous block of parts."""

    number: int = 0
    count: int = 1

    def parts(self, num_parts: int) -> range:
        """Return the numbers of this shard's parts; any two shards differ by one part at most."""
        return range(num_parts * self.number // self.count, num_parts * (self.number + 1) // self.count)


WHOLE = Shard()
