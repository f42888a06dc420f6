"""What a machine is called, how fast it multiplies matrices, how much energy it takes."""

import platform
import re
import time
from pathlib import Path

import torch
import transformers

from effir_search import __version__
from effir_search.evaluation.turns import clock
from effir_search.searching.searcher import available_cores

POWERCAP = Path("/sys/class/powercap")
# Rows and columns of the matrices whose product shows what a processor can reach, by kind of device.
SQUARE = {"cpu": 2048, "cuda": 8192}
# Seconds that products are repeated for, and how often at most; the fastest one counts.
PEAK_SECONDS, PEAK_TIMES = 2.0, 20


def machine_facts(device: torch.device) -> dict[str, object]:
    """Return what the machine is called, by name."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return {
        "processor": model[1] if model else platform.processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return versions by package."""
    return {
        "python": platform.python_version(),
        "effir_search": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def matmul_peak(dtype: torch.dtype, device: torch.device, *, size: int | None = None) -> float:
    """Return the floating-point operations a second of a large product of matrices, a multiply-add counted as two.

    Args:
        dtype: Of the matrices.
        device: That multiplies, with torch's threads of the moment.
        size: Rows and columns; None = by kind of device.
    """
    size = size or SQUARE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    torch.matmul(a, b)  # warm up
    fastest, end = float("inf"), time.perf_counter() + PEAK_SECONDS
    for _ in range(PEAK_TIMES):
        begun = clock(device)
        torch.matmul(a, b)
        fastest = min(fastest, clock(device) - begun)
        if time.perf_counter() > end:
            break
    return 2 * size**3 / fastest


class EnergyMeter:
    """Energy that the processor packages of a machine have taken since the meter was made.

    Args:
        zones: Folders of packages in Linux's powercap, see ``energy_meter``.

    Source: Linux, Documentation/power/powercap/powercap.rst: ``energy_uj`` starts again at 0 after
    ``max_energy_range_uj``.
    """

    def __init__(self, zones: list[Path]) -> None:
        self._zones = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        self._last = {zone: _microjoules(zone) for zone in zones}
        self._taken = 0

    def __call__(self) -> float:
        """Return joules; it must be asked before a counter has come round twice, which takes minutes."""
        for zone, largest in self._zones.items():
            now = _microjoules(zone)
            self._taken += now - self._last[zone] if now >= self._last[zone] else largest - self._last[zone] + now
            self._last[zone] = now
        return self._taken / 1e6


def energy_meter(folder: Path = POWERCAP) -> EnergyMeter | None:
    """Return a meter of all processor packages, or None where the machine does not tell, or not everyone."""
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", zone.name)]
    try:
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        return EnergyMeter(packages) if packages else None
    except OSError:  # many systems let root alone read the counters
        return None


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())
