"""`make mutants-ranks`: slips that only ranks show, each put into a copy of the package, must fail the tests named beside it.

    python tests/rank_mutants.py [NUMBER | FILE ...] [--no-baseline] [--logs DIR]

`tests/data/rank_mutants.yaml` lists them: the file below ds_optforge/, the text, what somebody might write for it, why that is
plausible, and the tests that must notice. An argument chooses by number, from 1, or by part of the file's name.

The repository is copied into a temporary folder, which is what the tests and their ranks import; the checkout is never
touched. A mutant's tests run in a fork of a process that has imported torch and DeepSpeed, and so do their ranks
(`tests.distributed.nursery`): neither has imported the package, and each imports the mutated one. That is shown first, by a
file that refuses to be imported by ranks. Then all tests of the chosen mutants must pass without any.

A mutant is killed if one of its tests fails. Ranks that wait for each other for ever are noticed by the tests themselves: a
collective ends after 30 s here (60 s in `make test`), a job on a pool after 120 s. A run that takes longer than `LIMIT_S` has
hung, and counts as survived. The status is 1 if any has survived, or is no longer to be found in its file.
"""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "data" / "rank_mutants.yaml"
LIMIT_S = 300.0  # of one mutant: twice what a job on a pool may take, and the start
COLLECTIVES_S = 30  # after which a rank waits no longer for another one
RANKS = 4  # numbers that a rank can have in a pool
IMPORTED = ("pytest", "deepspeed", "tests.distributed.pool")  # what no mutant changes, and takes long
CONTROL = "zero/exchange.py"  # which every rank imports with its first engine
REFUSAL = 'import os\nif "RANK" in os.environ:\n    raise ImportError("a mutant")\n'
OF_CONTROL = "test_parity.py::test_every_stage_equals_one_process[2-2]"


@dataclass(frozen=True)
class Mutant:
    """One slip."""

    number: int
    file: str
    original: str
    mutated: str
    slip: str
    tests: tuple[str, ...]

    @property
    def room(self) -> str:
        """The folder or file directly below the package."""
        return self.file.partition("/")[0]

    def source(self, root: Path = ROOT) -> str:
        """The mutated file. Raises ValueError where the text does not occur exactly once."""
        found = (root / "ds_optforge" / self.file).read_text(encoding="utf-8")
        if found.count(self.original) != 1:
            raise ValueError(
                f"{self.file} has {found.count(self.original)} times\n{self.original}\nallowed: once (mutant {self.number})"
            )
        return found.replace(self.original, self.mutated)


def listed() -> list[Mutant]:
    """All of them, in the order of the list."""
    entries = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return [Mutant(number, **{**entry, "tests": tuple(entry["tests"])}) for number, entry in enumerate(entries, start=1)]


def chosen(mutants: Sequence[Mutant], wanted: Sequence[str]) -> list[Mutant]:
    return [m for m in mutants if not wanted or any(w == str(m.number) or (not w.isdigit() and w in m.file) for w in wanted)]


class Copy:
    """A copy of what git knows of the repository, in which one file at a time is another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "--null", "--files-from=-", "-cf", f"{folder}.tar"], cwd=ROOT, check=True, input=names)
        folder.mkdir()
        subprocess.run(["tar", "-xf", f"{folder}.tar"], cwd=folder, check=True)
        Path(f"{folder}.tar").unlink()
        self._written = 0

    def write(self, file: str, source: str) -> None:
        """Put ``source`` in place of a file of the package, and see to it that nobody takes the bytecode of another."""
        path = self.folder / "ds_optforge" / file
        path.write_text(source, encoding="utf-8")
        self._written += 1
        os.utime(path, (self._written, self._written))
        for old in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            old.unlink()

    def restore(self, file: str) -> None:
        self.write(file, (ROOT / "ds_optforge" / file).read_text(encoding="utf-8"))


class Host:
    """The process that tests are forked of, in the folder of a copy, and those that their ranks are forked of.

    Args:
        copy: of the repository.
        logs: folder for the output of each run.
    """

    def __init__(self, copy: Copy, logs: Path) -> None:
        os.chdir(copy.folder)
        os.environ["PYTHONPATH"] = str(copy.folder)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["POOL_COLLECTIVES_S"] = str(COLLECTIVES_S)
        sys.path[:] = [
            str(copy.folder),
            *(path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "tests")),
        ]
        for name in IMPORTED:
            importlib.import_module(name)
        assert not any(name.partition(".")[0] == "ds_optforge" for name in sys.modules)
        self._copy, self._logs = copy, logs
        self._start_nurseries()

    def _start_nurseries(self) -> None:
        """Anew after a run that was cut short, which may have left them an answer that nobody took."""
        from tests.distributed import nursery, pool

        class Inherited(nursery.Nursery):
            """One that this process has started, as a fork of it sees it: it cannot wait for it."""

            @property
            def alive(self) -> bool:
                return Path(f"/proc/{self.pid}").exists()

        self.close()
        for rank in range(RANKS):
            started = Inherited(sys.executable, pool._common_environment(), self._logs / f"nursery{rank}.log")
            nursery._NURSERIES[sys.executable, rank] = started

    def close(self) -> None:
        """End the processes that ranks are forked of."""
        nursery = sys.modules["tests.distributed.nursery"]
        for pid in nursery.nursery_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def run(self, tests: Sequence[str], name: str, limit_s: float = LIMIT_S) -> tuple[int | None, str]:
        """Run tests until one fails; return pytest's status, or None if the time was up, and the output."""
        log = self._logs / f"{name}.log"
        base = self._copy.folder.parent / "basetemp"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._become_pytest(
                [*(f"tests/distributed/{test}" for test in tests), "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={base}"],
                log,
            )
        deadline = time.monotonic() + limit_s
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)  # its ranks end with it
                os.waitpid(pid, 0)
                self._start_nurseries()
                break
            time.sleep(0.05)
        status = os.waitstatus_to_exitcode(ended[1]) if ended[0] else None
        return status, log.read_text(encoding="utf-8", errors="replace")

    @staticmethod
    def _become_pytest(arguments: Sequence[str], log: Path) -> None:
        """Never returns."""
        status = 3
        try:
            os.setsid()
            with log.open("wb") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            status = int(importlib.import_module("pytest").main(list(arguments)))
        finally:
            with suppress(ValueError):
                sys.stdout.flush()
            os._exit(status)


def verdict(status: int | None, output: str) -> tuple[str, str]:
    """(what became of a mutant, the first line that tells how)."""
    if status is None:
        return "HUNG", f"no end after {LIMIT_S:.0f} s"
    if status == 0:
        return ("NOT TESTED", "every test was skipped") if not re.search(r"\b\d+ passed", output) else ("SURVIVED", "")
    if status != 1:
        return "NOT TESTED", f"pytest ended with status {status}"
    failed = re.search(r"^(?:FAILED|ERROR) (.*)$", output, flags=re.MULTILINE)
    return "killed", failed.group(1)[:200] if failed else ""


def prove(host: Host, copy: Copy) -> None:
    """Show that ranks import the copy: a file that they refuse fails the test, on a rank, and by that refusal."""
    copy.write(CONTROL, REFUSAL + (ROOT / "ds_optforge" / CONTROL).read_text(encoding="utf-8"))
    status, output = host.run([OF_CONTROL], "control")
    copy.restore(CONTROL)
    if status != 1 or "ImportError: a mutant" not in output or "RankFailure" not in output:
        raise SystemExit(f"ranks do not import the copy: status {status}\n{output[-4000:]}")


def baseline(host: Host, mutants: Sequence[Mutant]) -> None:
    """All tests must pass before any of them can notice anything."""
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    status, output = host.run(tests, "baseline", limit_s=60.0 * max(10, len(tests)))
    if status != 0:
        raise SystemExit(f"without a mutant: pytest ended with status {status}\n{output[-8000:]}")


def judge(host: Host, copy: Copy, mutants: Sequence[Mutant]) -> int:
    """Run each mutant; return how many were not killed."""
    left = 0
    for mutant in mutants:
        began = time.monotonic()
        copy.write(mutant.file, mutant.source())
        what, how = verdict(*host.run(mutant.tests, f"{mutant.number:03}"))
        copy.restore(mutant.file)
        left += what != "killed"
        print(f"{mutant.number:3} {what:10} {time.monotonic() - began:4.0f} s  {mutant.file}: {mutant.slip}", flush=True)
        print(f"      {how}", flush=True)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", metavar="NUMBER | FILE", help="mutants to run; default: all")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mutant first")
    parser.add_argument("--logs", type=Path, help="where the output of pytest is kept, by number")
    options = parser.parse_args()
    mutants = chosen(listed(), options.wanted)
    lost = []
    for mutant in mutants:
        try:
            compile(mutant.source(), mutant.file, "exec")
        except (ValueError, SyntaxError, OSError) as error:
            lost.append(str(error))
    if lost or not mutants:
        print("\n\n".join(lost) or "no such mutant")
        return 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs = (options.logs or Path(folder) / "logs").resolve()
        logs.mkdir(parents=True, exist_ok=True)
        copy = Copy(Path(folder).resolve() / "copy")
        host = Host(copy, logs)
        try:
            prove(host, copy)
            if not options.no_baseline:
                baseline(host, mutants)
            left = judge(host, copy, mutants)
        finally:
            host.close()
            os.chdir(ROOT)
    print(f"{len(mutants) - left} of {len(mutants)} killed, in {(time.monotonic() - began) / 60:.0f} minutes")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
