import time

import numpy as np
import pytest
import torch

from effir_search.benchmarking.machine import energy_meter, machine_facts, matmul_peak
from effir_search.benchmarking.memory import measure_memory
from effir_search.settings import EncoderOptions


@pytest.fixture
def powercap(tmp_path):
    """Counters as Linux shows them: two packages, the first with a part of its own, and the whole platform."""

    def zone(name, of, microjoules):
        folder = tmp_path / name
        folder.mkdir()
        for file, value in {"name": of, "energy_uj": microjoules, "max_energy_range_uj": 10_000_000}.items():
            (folder / file).write_text(f"{value}\n")

    zone("intel-rapl:0", "package-0", 1_000_000)
    zone("intel-rapl:0:0", "core", 500_000)
    zone("intel-rapl:1", "package-1", 9_000_000)
    zone("intel-rapl:2", "psys", 3_000_000)
    return tmp_path


def test_energy_is_what_all_packages_have_taken_also_where_a_counter_starts_again(powercap):
    meter = energy_meter(powercap)
    assert meter() == 0
    (powercap / "intel-rapl:0" / "energy_uj").write_text("1500000\n")
    (powercap / "intel-rapl:0:0" / "energy_uj").write_text("900000\n")
    (powercap / "intel-rapl:2" / "energy_uj").write_text("8000000\n")
    assert meter() == 0.5  # the part is in its package, and the platform has both
    (powercap / "intel-rapl:1" / "energy_uj").write_text("250000\n")
    assert meter() == 0.5 + 1.25  # from 9 up to 10 and from 0 to 0.25
    assert meter() == 1.75


def test_a_machine_that_does_not_tell_has_no_meter(powercap, tmp_path):
    assert energy_meter(tmp_path / "nothing") is None
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    assert energy_meter(powercap) is None


def test_the_peak_is_no_slower_than_a_product_that_is_timed_by_hand():
    a = torch.randn(512, 512)
    peak = matmul_peak(torch.float32, torch.device("cpu"), size=512)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.matmul(a, a)
        seconds.append(time.perf_counter() - start)
    # A product is 512 * 512 sums of 512 multiply-adds; the fastest of 20 beats the slowest of 3.
    assert peak >= 2 * 512**3 / max(seconds)
    assert peak < 1e15  # seconds, not milliseconds


def test_the_machine_is_told_with_the_threads_of_the_moment():
    facts = machine_facts(torch.device("cpu"))
    assert facts["threads"] == torch.get_num_threads()
    assert facts["processor"] and facts["device"] == "cpu"


@pytest.mark.processes
def test_memory_is_that_of_the_process_that_encodes_alone(tmp_path, bert_folder):
    ballast = np.ones(1_500_000_000 // 8)  # this process is larger than one that imports torch
    options = EncoderOptions(device="cpu", dtype="fp32")
    memory = measure_memory(str(bert_folder), options, ["the cat"] * 9, threads=1, scratch=tmp_path / "memory.json")
    assert 50_000_000 < memory.before <= memory.peak < ballast.nbytes
    assert memory.gpu is None
    assert not list(tmp_path.iterdir())
