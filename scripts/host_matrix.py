"""The tests inside a real ComfyUI, on several of its versions, all taken from the history of one clone.

    .venv/bin/python scripts/host_matrix.py ~/ComfyUI
    .venv/bin/python scripts/host_matrix.py ~/ComfyUI --versions 0.20.0 --own-packages

Each version is exported into a folder of its own; the clone is only read.  By default all run on the clone's packages,
and the table says which of a version's own requirements those do not meet.  With --own-packages each version gets a
.venv that adds what it misses; torch stays the clone's.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[1]
VERSIONS = ["0.11.0", "0.18.0", "0.24.0", "0.28.0", "0.33.0"]
TESTS = ["tests/host/test_contract.py", "tests/host/test_server.py"]

# Run by a host's python: the lines of its requirements.txt that its packages do not meet, and what is there instead.
UNMET = """
import sys
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement
for line in open(sys.argv[1], encoding="utf-8"):
    if line.strip() and not line.startswith("#"):
        wanted = Requirement(line.strip())
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = None
        if found is None or found not in wanted.specifier:
            print(wanted, "-" if found is None else found, sep="\\t")
"""


class Unreachable(Exception):
    """Why a version cannot be tested here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a git clone of ComfyUI with its history, and its packages in .venv")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="X.Y.Z")
    parser.add_argument("--hosts", type=Path, default=REPOSITORY / "runs" / "hosts", help="where versions are exported to")
    parser.add_argument("--python", type=Path, help="the packages' interpreter; default: the clone's .venv, else this one")
    parser.add_argument("--own-packages", action="store_true", help="install what a version misses, for it alone")
    parser.add_argument("--tests", nargs="+", default=TESTS)
    options = parser.parse_args()
    in_clone = options.clone.expanduser() / ".venv" / "bin" / "python"
    python = options.python or (in_clone if in_clone.exists() else Path(sys.executable))
    rows = []
    for version in options.versions:
        try:
            host = export(options.clone.expanduser(), version, options.hosts.resolve())
            interpreter = prepare(host, python.absolute(), options.own_packages)
            row = [version, *run_tests(host, interpreter, options.tests), "; ".join(unmet(host, interpreter)) or "all met"]
        except Unreachable as reason:
            row = [version, "not reached", " ".join(str(reason).split()), ""]
        rows.append(row)
        print("\t".join(row), flush=True)
    print("\n" + table([["ComfyUI", "outcome", "failed", "its requirements"], *rows]))
    sys.exit(any(outcome != "pass" for _, outcome, *_ in rows))


def table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- hosts -------------------------------------------------------------------------------------------


def export(clone: Path, version: str, hosts: Path) -> Path:
    """The files of ``version`` in a folder of ``hosts``, but those that the clone itself lacks: large ones, in some."""
    host = hosts / version
    if host.exists():
        return host
    files = [line.split("\t") for line in git(clone, "ls-tree", "-r", "-z", commit_of(clone, version)).split("\0") if line]
    hosts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=hosts) as partial:
        whole = Path(partial) / version
        for facts, name in files:
            _, kind, blob = facts.split()
            if kind == "blob":
                path = whole / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as file:
                    command = ["git", "-C", clone, "cat-file", "blob", blob]
                    found = subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL)
                if found.returncode:
                    print(f"{version}: {name} is not in the clone", file=sys.stderr)
                    path.unlink()
        whole.rename(host)
    return host


def commit_of(clone: Path, version: str) -> str:
    """The commit that made ``version``."""
    for commit in git(clone, "log", "--format=%H", "--", "comfyui_version.py").split():
        found = re.search(r'__version__ = "(.+)"', git(clone, "show", f"{commit}:comfyui_version.py"))
        if found and found[1] == version:
            return commit
    raise Unreachable(f"no commit of it in the history of {clone.name}")


def git(clone: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", clone, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Unreachable(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def prepare(host: Path, python: Path, own_packages: bool) -> Path:
    """Make the host's .venv, which the tests look for: the packages of ``python``, or those and its own."""
    folder = host / ".venv"
    if folder.is_symlink():
        folder.unlink()
    if not own_packages:
        if not folder.exists():
            folder.symlink_to(python.parent.parent, target_is_directory=True)
        return folder / "bin" / "python"
    interpreter = folder / "bin" / "python"
    if not folder.exists():
        venv.create(folder, with_pip=True, symlinks=True)
        shared = ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))")[0]
        own = ask(interpreter, "import sysconfig; print(sysconfig.get_path('purelib'))")[0]
        (Path(own) / "shared.pth").write_text(shared + "\n")  # after its own packages
    if missing := [line.partition(" instead of ")[2] for line in unmet(host, interpreter)]:
        done = subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *missing], capture_output=True, text=True)
        if done.returncode:
            raise Unreachable(f"pip: {done.stderr.strip().splitlines()[-1]}")
    return interpreter


def unmet(host: Path, python: Path) -> list[str]:
    """"1.2 instead of name==1.0" for each of the host's requirements that the packages of ``python`` do not meet."""
    found = (line.split("\t") for line in ask(python, UNMET, host / "requirements.txt"))
    return [f"{'nothing' if version == '-' else version} instead of {wanted}" for wanted, version in found]


def ask(python: Path, code: str, *arguments) -> list[str]:
    done = subprocess.run([python, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise Unreachable(f"{python.name}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.splitlines()


# -- tests -------------------------------------------------------------------------------------------


def run_tests(host: Path, python: Path, tests: list[str]) -> tuple[str, str]:
    """The outcome in a word or two, and the names of what failed."""
    report = host / "report.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {"COMFYUI_PATH": str(host), "COMFYUI_OLDEST_PATH": ""}
    subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests], cwd=REPOSITORY,
                   env=environment, stdout=sys.stderr)
    if not report.exists():
        return "not reached", "pytest did not start; its messages are above"
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    if failed or skipped or not passed:
        return f"{passed} passed, {len(failed)} failed, {skipped} skipped", ", ".join(failed)
    return "pass", ""


if __name__ == "__main__":
    main()
