"""Host cost a call on the CPU against the committed figures: `pytest benchmarks/test_speed.py`, with pytest-benchmark.

Machines differ, so a call is measured in additions of two small tensors, timed beside it; CPU time, so that other load counts
little. `python -m benchmarks.test_speed` measures again and writes benchmarks/results/host_overhead.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import attention, embedding, mapping, perturbation

COMMITTED = Path(__file__).parent / "results" / "host_overhead.json"
BOUND = 4.0  # times the committed figure
CPU = torch.device("cpu")
clock = time.process_time


def host_calls() -> dict[str, Callable[[], Any]]:
    """Of every family."""
    return {
        name: call for family in (perturbation, embedding, attention, mapping) for name, call in family.host_calls(CPU).items()
    }


def addition_seconds() -> float:
    """The yardstick: the fastest of many small additions."""
    a, b = torch.rand(2, 64)
    best = float("inf")
    for _ in range(50):
        start = clock()
        for _ in range(100):
            a + b
        best = min(best, (clock() - start) / 100)
    return best


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", list(host_calls()))
def test_host_cost(benchmark: Any, name: str) -> None:
    committed = json.loads(COMMITTED.read_text())["additions"].get(name)
    assert committed, f"{name} has no committed figure; python -m benchmarks.test_speed measures all of them"
    call = host_calls()[name]
    benchmark.pedantic(call, rounds=50, iterations=20, warmup_rounds=5)
    additions = benchmark.stats.stats.min / addition_seconds()
    benchmark.extra_info["additions"] = additions
    assert additions <= BOUND * committed, f"{name}: {additions:.0f} additions, committed {committed}"


def main() -> None:
    """Writes the committed figures."""
    from .suite import conditions

    seconds = {}
    for name, call in host_calls().items():
        samples = []
        for _ in range(55):
            start = clock()
            for _ in range(20):
                call()
            samples.append((clock() - start) / 20)
        seconds[name] = min(samples[5:])
    unit = addition_seconds()
    report = {
        "conditions": conditions(CPU) | {"command": "python -m benchmarks.test_speed"},
        "addition_us": round(unit * 1e6, 3),
        "additions": {name: round(spent / unit, 1) for name, spent in seconds.items()},
        "microseconds": {name: round(spent * 1e6, 1) for name, spent in seconds.items()},
    }
    COMMITTED.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
