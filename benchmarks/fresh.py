"""Measures one case in a process of its own, so that nothing an earlier one left behind is counted."""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import torch
from cases import Case, build
from machine import PeakMemory, synchronize


def call(function: Callable[..., dict], *arguments, **named) -> dict:
    """``function(*arguments, **named)``, a function of a module, in a new Python; what it raises is raised here.

    {} where the process was ended from outside, which is what running out of memory looks like.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_end_with_parent) as pool:
        try:
            return pool.submit(function, *arguments, **named).result()
        except BrokenProcessPool:
            return {}


def _end_with_parent() -> None:
    """Without this, a benchmark that is killed leaves the case at hand computing beside whatever comes next."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def measure(name: str, case: Case, options: argparse.Namespace, memory: int | str | None = "auto", rounds: int = 1,
            keep: Path | None = None) -> dict:
    """Seconds of each of ``rounds`` calls, and the largest peak of extra memory in bytes, the result's own included.

    name, options: as :func:`cases.build` takes them.
    memory: our model's ``Tiling.memory``.
    keep: where to save the result for comparison.
    """
    contender = build(name, case.variant, options, memory)
    dtype = getattr(torch, options.dtype)
    # Libraries and threads are set up by the first call, and are no part of what a clip takes.  It is as small as can
    # be: what it leaves in the C heap is used again, and would be missing in the peak.
    small = replace(case, frames=5, height=16, width=16, batch=1)
    small.run(contender, small.input(options.device, dtype))
    x = case.input(options.device, dtype)
    seconds, peak, result = [], 0, None
    for _ in range(rounds):
        result = None
        with PeakMemory(options.device) as memory_taken:
            started = time.perf_counter()
            result = case.run(contender, x)
            synchronize(options.device)
            seconds.append(time.perf_counter() - started)
        peak = max(peak, memory_taken.extra)
    if keep is not None:
        torch.save(result.cpu(), keep)
    return {"contender": name, **case.describe(), "seconds": seconds, "peak_bytes": peak, "result_bytes": result.nbytes}
