"""Counts and times of requests, as Prometheus reads them."""

import resource
import sys
from collections import Counter
from pathlib import Path

# Upper bounds of the classes of seconds that a request took.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """What was answered so far.

    Attributes:
        in_flight: Requests that are being answered.
        num_requests: By name of what they asked for and HTTP status.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.num_requests: Counter[tuple[str, int]] = Counter()
        self._seconds = 0.0
        self._classes = Counter()

    def add(self, endpoint: str, status: int, seconds: float) -> None:
        """Take in an answered request."""
        self.num_requests[endpoint, status] += 1
        self._seconds += seconds
        self._classes[next((bound for bound in BOUNDS if seconds <= bound), None)] += 1

    def text(self, **numbers: float) -> str:
        """Return all of it in Prometheus' text format.

        Args:
            numbers: More of them by name, gauges, or counters where the name ends in "total".
        """
        lines = ["# TYPE effir_requests_total counter"]
        for (endpoint, status), number in sorted(self.num_requests.items()):
            lines.append(f'effir_requests_total{{endpoint="{endpoint}",status="{status}"}} {number}')
        lines.append("# TYPE effir_request_seconds histogram")
        below = 0
        for bound in BOUNDS:
            below += self._classes[bound]
            lines.append(f'effir_request_seconds_bucket{{le="{bound:g}"}} {below}')
        total = sum(self._classes.values())
        lines.append(f'effir_request_seconds_bucket{{le="+Inf"}} {total}')
        lines += [f"effir_request_seconds_sum {self._seconds:.6f}", f"effir_request_seconds_count {total}"]
        own = {"requests_in_flight": self.in_flight, "resident_memory_bytes": resident_memory()}
        for name, number in {**own, **numbers}.items():
            kind = "counter" if name.endswith("total") else "gauge"
            lines += [f"# TYPE effir_{name} {kind}", f"effir_{name} {number}"]
        return "\n".join(lines) + "\n"


def resident_memory() -> int:
    """Return the bytes of memory that this process has now; where the system does not say, the most it had."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
