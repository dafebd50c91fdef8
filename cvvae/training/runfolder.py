"""A run's folder: checkpoints, logs, and what the run was made of.

    config.json         the resolved config, versions and git state
    losses.csv          every step            validation.csv   every validation
    checkpoints/        step_00000500.pt ..., the newest ``run.keep``
    best.safetensors    the EMA weights with the best validation so far
    model.safetensors   the EMA weights at the end
    reconstructions/    held-out clips, side by side          losses.png    the curves
    skipped.csv         files that could not be used, and why
"""

import csv
import dataclasses
import pickle
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import write_whole
from .config import ConfigError


class Checkpoints:
    """The files ``step_*.pt`` of a folder: written whole, the newest ``keep`` kept, the newest readable one loaded."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step_*.pt"))

    def save(self, step: int, state: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / f"step_{step:08d}.pt", lambda partial: torch.save(state, partial))
        for old in self.files()[:-self.keep]:
            old.unlink()

    def load(self, device: torch.device) -> dict:
        """Of the newest file that can be read; damaged newer ones are named and removed.

        Raises FileNotFoundError where there is none.
        """
        damaged = []
        for path in reversed(self.files()):
            try:
                state = torch.load(path, map_location=device, weights_only=True)
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError) as error:
                damaged.append(f"{path.name} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
                continue
            for name in damaged:
                print(f"{self.folder}: {name} is damaged and was left out; going on from {path.name}.")
            return state
        what = "no checkpoint" if not damaged else "no readable checkpoint; damaged: " + ", ".join(damaged)
        raise FileNotFoundError(f"--resume: there is {what} in {self.folder}. Without --resume a run starts from step 0.")


def check_resumable(saved: dict, config: Any, fixed: Sequence[str]) -> None:
    """Raise ConfigError where ``config`` does not go on with the run whose config was ``saved``.

    fixed: what a checkpoint's tensors and draws depend on; resuming with another value is another run.
    """
    now = dataclasses.asdict(config)
    changed = []
    for key in fixed:
        section, name = key.split(".")
        if saved[section][name] != now[section][name]:
            changed.append(f"{key} was {saved[section][name]!r} and is {now[section][name]!r}")
    if changed:
        raise ConfigError(f"--resume: this run began with other settings: {'; '.join(changed)}. Set them back, or choose "
                          "another run.out for a new run.")


class CsvLog:
    """Rows by step; on resume, rows of steps that will be taken again are dropped."""

    def __init__(self, path: Path, columns: list[str] | None, step: int):
        """columns: None takes those of the file that is there, or of the first row."""
        self.path = path
        self.columns = None if columns is None else ["step", *columns]
        kept = []
        if path.exists() and step:
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                kept = [row for row in reader if int(row["step"]) <= step]
                self.columns = self.columns or reader.fieldnames
        path.unlink(missing_ok=True)
        if self.columns is not None:
            self._write(kept)

    def _write(self, rows: list[dict]) -> None:
        def write(partial: str) -> None:
            with open(partial, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)

        write_whole(self.path, write)

    def append(self, step: int, values: dict[str, float]) -> None:
        """Values without a column are left out; columns without a value stay empty."""
        if self.columns is None:
            self.columns = ["step", *values]
            self._write([])
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow({"step": step} | values)


def provenance(config: Any) -> dict:
    """The resolved config, versions and git state, for the run's folder and the resulting file."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("cv-vae", "safetensors", "av", "kornia", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"config": dataclasses.asdict(config), "versions": versions, "git": _git_state()}


def _git_state() -> dict | None:
    """Commit of the checkout this code runs from, and whether it was changed; None outside of one."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True,
                              check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
