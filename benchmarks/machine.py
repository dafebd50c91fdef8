"""What the benchmarks measure with: the machine they ran on, interleaved timing, peak memory, and the reports."""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

Call = Callable[[], object]
Row = dict[str, object]


def describe() -> dict:
    """The machine and what runs on it, JSON-ready."""
    try:
        cores = len(os.sched_getaffinity(0))  # those this process may use; Linux only
    except AttributeError:
        cores = os.cpu_count()
    facts = {"cpu": _cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability(), "cores": cores,
             "threads": torch.get_num_threads(), "ram_gib": round(psutil.virtual_memory().total / 2**30, 1), "gpu": None,
             "os": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "gpu_ram_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version(), "tf32_convolutions": torch.backends.cudnn.allow_tf32}
    return facts


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# -- time --------------------------------------------------------------------------------------------


def synchronize(device: str | torch.device) -> None:
    """Wait for what was started on ``device``; a CPU never runs ahead."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(calls: dict[str, Call], rounds: int, device: str | torch.device = "cpu",
               check: Callable[[dict[str, object]], None] | None = None) -> dict[str, list[float]]:
    """Seconds of ``rounds`` calls of each, taken in turn (A, B, A, B, ...), so that a slow minute hits all alike.

    Each is called once before, untimed.
    check: is given what those first calls returned; may raise to stop.
    """
    results = {name: call() for name, call in calls.items()}
    synchronize(device)
    if check is not None:
        check(results)
    del results  # held during the rounds they would only take memory
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def matrix_rate(device: str | torch.device, dtype: torch.dtype, side: int = 8192, rounds: int = 10) -> float:
    """Floating-point operations in a second of a product of two square matrices of random numbers; a median."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    taken = interleave({"product": lambda: a @ b}, rounds, device)["product"]
    return 2 * side ** 3 / statistics.median(taken)


def seconds_text(seconds: list[float]) -> str:
    """Median and, of several, range: "1.23 s (1.20 to 1.31)"."""
    median = f"{_three_digits(statistics.median(seconds))} s"
    return median if len(seconds) == 1 else f"{median} ({_three_digits(min(seconds))} to {_three_digits(max(seconds))})"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# -- memory ------------------------------------------------------------------------------------------


class PeakMemory:
    """What a ``with`` block takes at its peak beyond what was held when it began: ``extra``, in bytes.

    On the CPU it is the process's resident memory, looked at every 2 ms; on CUDA, what tensors and kernels
    hold of the allocator's memory.
    """

    INTERVAL = 0.002  # seconds; filling 200 MB takes ten times as long

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"Memory of {self.device.type!r} cannot be measured; only of cpu and cuda.")
        self.extra = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
        else:
            trim()
            self.process = psutil.Process()
            self.start = self.peak = self.process.memory_info().rss
            self.stop = threading.Event()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(self.INTERVAL):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self.extra = torch.cuda.max_memory_allocated(self.device) - self.start
        else:
            self.stop.set()
            self.thread.join()
            self._look()
            self.extra = self.peak - self.start


def trim() -> None:
    """Give freed memory back to the system where there is glibc; what it keeps would hide what is taken next."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def megabytes(size: int) -> str:
    """Of 10^6 bytes, as a ``Tiling.memory`` counts them."""
    return f"{size / 1e6:.0f} MB"


# -- reports -----------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Markdown; a column for every key of the rows, in the order they first come; nothing where a row lacks it."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(name: str, title: str, options: argparse.Namespace, rows: list[Row], measurements: list[dict],
            notes: str = "") -> None:
    """Print the table, and ``notes`` below it; write them as ``name.md``, and every number behind them as ``name.json``,
    into ``options.out``.

    Of paths among the options only the name is kept: where something lay is nobody's business.
    """
    machine = describe()
    text = "\n\n".join([table(rows), *([notes] if notes else [])])
    print(f"\n{text}")
    options.out.mkdir(parents=True, exist_ok=True)
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    (options.out / f"{name}.md").write_text(f"# {title}\n\n{text}\n\n{facts}\n")
    report = {"title": title, "machine": machine, "options": vars(options), "measurements": measurements}
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1, default=lambda path: path.name) + "\n")
    print(f"\nWritten: {options.out / name}.md and .json")
