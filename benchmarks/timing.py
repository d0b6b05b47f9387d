"""One timer for every benchmark: the same rotated random inputs, interleaved providers, median and p20/p80.

GPU: CUDA events; what takes the device under 100 us is timed by replaying a CUDA graph of one call for each input set, where
it can be captured. The input sets and the outputs of a rotation together pass 240 MB, so the second-level cache is cold;
small ones do not (at most 64 sets), which is said in the result. A rotation takes 0.2 s at most: calls of milliseconds, which
move more than a cache holds, take turns on fewer sets. CPU: the host's clock. A second entry of the first provider
(A/A) says how far apart two timings of the same thing lie: the noise floor.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Call = Callable[[], Any]

# On a machine that others use: `time.process_time`, with one thread. Time spent waiting for a core is then left out.
host_clock = time.perf_counter

ROTATION = 0.2  # seconds at most for one call of each input set, but of two
COLD_BYTES = {"cuda": 240 << 20, "cpu": 96 << 20}
MAX_SETS = {"cuda": 64, "cpu": 4}


@dataclass(frozen=True)
class Time:
    """Seconds a call, and how they were taken."""

    median: float
    p20: float
    p80: float
    samples: int
    clock: str  # "host" | "process" | "events" | "graph"

    @classmethod
    def of(cls, samples: Sequence[float], clock: str) -> Time:
        ranked = sorted(samples)
        low, high = (ranked[int(share * (len(ranked) - 1))] for share in (0.2, 0.8))
        return cls(statistics.median(ranked), low, high, len(ranked), clock)


def sets_needed(set_bytes: int, device: torch.device) -> int:
    """How many input sets (with their outputs) make a rotation that no cache holds."""
    kind = device.type
    return max(2, min(MAX_SETS[kind], -(-COLD_BYTES[kind] // max(set_bytes, 1))))


def compare(
    providers: dict[str, list[Call]], device: torch.device, seconds: float = 1.0, failed: dict[str, Exception] | None = None
) -> dict[str, Time]:
    """Times providers against each other; each has one call for every input set of the rotation.

    Args:
        seconds: measuring time for each provider.
        failed: gets those that raise, and why; the others go on. None: what they raise is raised.
    """
    timers: dict[str, Any] = {}

    def attempt(name: str, do: Callable[[], Any]) -> None:
        try:
            do()
        except Exception as failure:
            if failed is None:
                raise
            failed[name] = failure
            timers.pop(name, None)

    timer = _EventTimer if device.type == "cuda" else _HostTimer
    for name, calls in providers.items():
        attempt(name, lambda name=name, calls=calls: timers.update({name: timer(calls, seconds)}))  # type: ignore[misc]
    spent, start = 0.0, time.perf_counter()
    while spent < seconds * len(timers) or any(len(t.samples) < 5 for t in timers.values()):
        for name in random.sample(list(timers), len(timers)):
            attempt(name, timers[name].sample)
        spent = time.perf_counter() - start
    return {name: Time.of(t.samples, t.clock) for name, t in timers.items()}


class _HostTimer:
    def __init__(self, calls: list[Call], seconds: float) -> None:
        self.calls, self.next = calls, 0
        self.clock = "host" if host_clock is time.perf_counter else "process"
        self.samples: list[float] = []
        once = min(self._run(1) for _ in range(3))
        self.repeat = max(1, min(1000, int(0.002 / max(once, 1e-9))))  # samples of 2 ms at least

    def _run(self, count: int) -> float:
        start = host_clock()
        for i in range(count):
            self.calls[(self.next + i) % len(self.calls)]()
        spent = host_clock() - start
        self.next += count
        return spent

    def sample(self) -> None:
        self.samples.append(self._run(self.repeat) / self.repeat)


class _EventTimer:
    """Samples are rotations: one call for each input set, whose outputs are kept so that no two share a buffer."""

    def __init__(self, calls: list[Call], seconds: float) -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls[0]()
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        self.calls, self.clock = calls[: max(2, int(ROTATION / max(once, 1e-9)))], "events"
        self.samples: list[float] = []
        self.outputs: list[Any] = [None] * len(self.calls)
        self.run = self._loop
        self._loop()
        start = time.perf_counter()
        self._loop()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        # Behind a sleep of twice the host's time (at 2 GHz) all calls are queued when the first one starts: the device's time.
        torch.cuda._sleep(int(4e9 * min(host, ROTATION)))
        self.sample()
        if self.samples.pop() < 100e-6 and self._runs_ahead():
            self._capture()

    def _loop(self) -> None:
        for i, call in enumerate(self.calls):
            self.outputs[i] = call()

    def _runs_ahead(self) -> bool:
        """Whether no call waits for the device. Asked before, because a capture that fails is hard to recover from."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._loop()
        except RuntimeError:
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Autograd replays a backward pass on its forward's stream, so everything runs on one.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._loop()
        except RuntimeError as failure:
            print(f"no CUDA graph: {failure}", file=sys.stderr)
            torch.cuda.synchronize()
            # After a capture that failed the generator refuses to draw until another one has succeeded.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
                torch.zeros(1, device="cuda")
            return
        self.run, self.clock = graph.replay, "graph"

    def sample(self) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.run()
        end.record()
        end.synchronize()
        self.samples.append(begin.elapsed_time(end) * 1e-3 / len(self.calls))


def host_cost(call: Call, count: int, device: torch.device) -> float:
    """Host seconds a call: the median of five runs of `count` calls that never wait for the device."""
    runs = []
    for repeat in range(6):  # the first one warms up
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = host_clock()
        for _ in range(count):
            call()
        if repeat:
            runs.append((host_clock() - start) / count)
    return statistics.median(runs)


def copy_ceiling(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes read plus bytes written a second by a large copy."""
    count = (1 << 28) if device.type == "cuda" else (1 << 25)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    spent = compare({"copy": [lambda: target.copy_(source)]}, device, seconds)["copy"].median
    return 2 * source.nbytes / spent


def matmul_ceiling(device: torch.device, seconds: float = 1.0) -> float:
    """FLOP/s of a large matrix product: bfloat16 on a GPU, float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    spent = compare({"matmul": [lambda: a @ b]}, device, seconds)["matmul"].median
    return 2 * side**3 / spent


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes allocated at the highest point of one call, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profiler:
        call()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels, copies and fills that one call starts on a GPU; None where nothing can be traced."""
    if device.type != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(1 for event in profiler.events() if event.device_type == on_gpu) or None


def page_faults(call: Call, device: torch.device) -> int | None:
    """Pages of fresh memory that one call touches on the host; None on a GPU, and where the system does not say."""
    if device.type != "cpu" or resource is None:
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
