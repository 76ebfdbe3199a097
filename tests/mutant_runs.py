"""Runs mutants in forks, for `tests/mutation_score.py`."""

from __future__ import annotations

import contextlib
import enum
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from tests.mutants import Mutant

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "mutants"
RECORD = FOLDER / "tests_by_line.json"
SECONDS = 30  # of tests for each mutant, by the time that they took when the lines were recorded

# No ranks; a test of these that takes longer than SLOWEST is left out.
TESTS = (
    "tests/rules",
    "tests/orthogonalize",
    "tests/zero",
    "tests/experiments/test_noise.py",
    "tests/integrations/test_deepspeed_file.py",
    "tests/integrations/test_refused_features.py",
    "tests/test_average.py",
    "tests/test_config.py",
    "tests/test_config_bounds.py",
    "tests/test_decay_and_momentum.py",
    "tests/test_docs.py",
    "tests/test_ema_nesterov.py",
    "tests/test_fused_matrices.py",
    "tests/test_lora.py",
    "tests/test_nonfinite.py",
    "tests/test_optimizer.py",
    "tests/test_overrides.py",
    "tests/test_parameters.py",
    "tests/test_placement.py",
    "tests/test_qk_clip.py",
    "tests/test_roles.py",
    "tests/test_schedule_check.py",
    "tests/test_schedule_curves.py",
    "tests/test_schedules.py",
    "tests/test_slices.py",
    "tests/test_state.py",
)
# They read the fields of every section, whose classes no test runs.
READERS = {"tests/test_config_bounds.py", "tests/test_docs.py"}
SLOWEST = 6
A_DAY = 86400
ARGUMENTS = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore")


class Outcome(enum.Enum):
    """What came of a mutant."""

    KILLED = "killed"
    EQUIVALENT = "equivalent"
    SURVIVED = "survived"


@dataclass(frozen=True, slots=True)
class Job:
    """A mutant and its tests, in the order they run; `imported`: no test runs it, but its module's import may have."""

    mutant: Mutant
    tests: list[str]
    imported: bool = False


@dataclass(slots=True)
class Recording:
    """Which tests run which lines of the package.

    Attributes:
        seconds: of a processor, of each test that passed.
        lines: by test, then by file from the checkout's root.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    @property
    def tests(self) -> list[str]:
        return list(self.seconds)

    @classmethod
    def read(cls) -> Recording:
        return cls(**json.loads(RECORD.read_text(encoding="utf-8")))

    def job_of(self, mutant: Mutant) -> Job:
        """Those of the changed lines, or else of the function; those named like the file first, then the fastest.

        What no test runs may have been run when its module was imported, or is a constant or a field, which tests read
        without running a line: then all tests of the files in which one runs the module.
        """
        first, last = mutant.lines
        ran = {test: files[mutant.file] for test, files in self.lines.items() if mutant.file in files}
        own = [test for test, lines in ran.items() if any(first <= line <= last for line in lines)] if mutant.function else []
        if mutant.function and not own:
            own = [test for test, lines in ran.items() if any(mutant.first_line <= line <= first for line in lines)]
        stem = Path(mutant.file).stem
        beside = {test.partition("::")[0] for test in ran} | READERS
        others = [test for test in self.seconds if test.partition("::")[0] in beside]
        tests, left = [], float(SECONDS)
        for test in sorted(own or others, key=lambda test: (f"test_{stem}" not in test, self.seconds[test])):
            left -= self.seconds[test]
            if left < 0 and tests:
                break
            tests.append(test)
        return Job(mutant, tests, imported=not own)


def forked(work: Callable[[], int], seconds: int) -> int:
    """Return what `work` returned in a fork of this process; 1 if it raised, died, or took more `seconds` of a processor.

    (A busy machine must kill no mutant; ten times as long by the clock does, for one that waits for ever.)
    """
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # a fork begins at 0
            status = work()
        finally:
            os._exit(status)
    deadline = time.monotonic() + 10 * seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # and what its tests had started
    if not ended:
        _, status = os.waitpid(process, 0)
    return 1 if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def silent() -> int:
    """What pytest says goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return 0


def run(items: list[pytest.Item]) -> int:
    """Run collected tests until one fails; 0 if none does."""
    for index, item in enumerate(items):
        following = items[index + 1] if index + 1 < len(items) else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if item.session.testsfailed:
            return 1
    return 0


def recorded_and_swapped(
    mutants: list[Mutant], jobs_of: Callable[[list[Mutant], Recording], list[Job]], tests: Sequence[str], *, reuse: bool
) -> set[tuple[str, str, str, str]]:
    """Record the lines of the tests; return the keys of the mutants that are killed with their functions swapped."""
    results = FOLDER / "swapped.jsonl"
    results.write_text("", encoding="utf-8")
    loop = _Loop(mutants, jobs_of, reuse and RECORD.exists(), results)
    forked(lambda: silent() or int(pytest.main([*ARGUMENTS, *tests], plugins=[loop])), A_DAY)
    return {tuple(json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()}


class _Loop:
    """A pytest plugin that runs mutants in place of the collected tests, and tests in forks."""

    def __init__(
        self,
        mutants: list[Mutant],
        jobs_of: Callable[[list[Mutant], Recording], list[Job]],
        reuse: bool,
        results: Path,
    ) -> None:
        self.mutants, self.jobs_of, self.reuse, self.results = mutants, jobs_of, reuse, results
        self.out = os.dup(1)  # pytest captures the other
        self.recording = False

    def say(self, text: str) -> None:
        os.write(self.out, f"{text}\n".encode())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        with _limited(SLOWEST) if self.recording else contextlib.nullcontext():
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if not self.reuse:
            self.say(f"recording the lines of {len(session.items)} tests")
            self.recording = True
            forked(lambda: record(session.items, self.say), A_DAY)
            self.recording = False
        by_name = {item.nodeid: item for item in session.items}
        for name in {module_of(mutant.file) for mutant in self.mutants}:
            importlib.import_module(name)  # a rule's module otherwise when its name is first asked for
        functions = live_functions()
        jobs = [job for job in self.jobs_of(self.mutants, Recording.read()) if not job.imported]
        for number, job in enumerate(jobs):
            items = [by_name[test] for test in job.tests if test in by_name]
            killed = bool(items) and forked(lambda: swap(job.mutant, functions) or run(items), 4 * SECONDS) == 1  # noqa: B023
            if killed:
                with self.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(job.mutant.key) + "\n")
            if number % 20 == 0:
                self.say(f"{number + 1} of {len(jobs)}: {job.mutant.file}")
            if not killed:
                self.say(
                    f"not by its code alone: {job.mutant.file}:{job.mutant.lines[0]} {job.mutant.function}, {len(items)} tests"
                )
                self.say(f"  - {job.mutant.original}\n  + {job.mutant.mutated}")
        return True


def record(items: list[pytest.Item], say: Callable[[str], None]) -> int:
    """Run every test for itself and write which lines of the package it ran."""
    package = str(ROOT / "ds_optforge") + os.sep
    recording = Recording()

    for number, item in enumerate(items):
        lines: dict[str, set[int]] = defaultdict(set)

        def local(frame: FrameType, event: str, _: Any, lines: dict[str, set[int]] = lines) -> Any:
            lines[frame.f_code.co_filename].add(frame.f_lineno)
            return local

        def called(frame: FrameType, event: str, _: Any, local: Any = local) -> Any:
            return local(frame, event, None) if frame.f_code.co_filename.startswith(package) else None

        began, failed = used(), item.session.testsfailed
        following = items[number + 1] if number + 1 < len(items) else None
        sys.settrace(called)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        sys.settrace(None)
        if number % 200 == 0:
            say(f"{number} of {len(items)}")
        seconds = round(used() - began, 3)
        if item.session.testsfailed == failed and seconds <= SLOWEST:
            recording.seconds[item.nodeid] = seconds
            recording.lines[item.nodeid] = {str(Path(n).relative_to(ROOT)): sorted(each) for n, each in lines.items()}
        else:
            say(f"left out: {item.nodeid}")
        if number % 200 == 0 or following is None:
            RECORD.write_text(json.dumps({"seconds": recording.seconds, "lines": recording.lines}), encoding="utf-8")
    return 0


def used() -> float:
    """Seconds of a processor that this process and those that it started have taken."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """A test that takes more of a processor fails."""

    def end(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def module_of(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place_of(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, getattr(code, "co_qualname", code.co_name), code.co_firstlineno


def live_functions() -> dict[tuple[str, str, int], list[FunctionType]]:
    """The package's functions by where their code is."""
    package, found = str(ROOT / "ds_optforge") + os.sep, defaultdict(list)
    for each in gc.get_objects():
        if isinstance(each, FunctionType) and each.__code__.co_filename.startswith(package):
            found[place_of(each.__code__)].append(each)
    return found


def swap(mutant: Mutant, functions: dict[tuple[str, str, int], list[FunctionType]]) -> int:
    """Give the mutant's function its new code, wherever it is bound; 2 where that cannot be done."""
    pending, done = [compile(mutant.source, str(ROOT / mutant.file), "exec")], 0
    while pending:
        code = pending.pop()
        inside = getattr(code, "co_qualname", code.co_name)
        if inside == mutant.function or inside.startswith(f"{mutant.function}."):
            for function in functions.get(place_of(code), []):
                if function.__code__.co_freevars != code.co_freevars:
                    return 2
                function.__code__ = code
                done += 1
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return 0 if done else 2


def fresh(job: Job) -> bool:
    """Return True if a test fails in a process that imports the changed source, and nothing of the package before."""
    files = list(dict.fromkeys(test.partition("::")[0] for test in job.tests))

    def work() -> int:
        sys.meta_path.insert(0, _Finder(job.mutant))
        silent()
        status = int(pytest.main([*ARGUMENTS, "-x", *files], plugins=[_Chosen(job.tests)]))
        return 0 if status in (0, 5) else 1

    return bool(job.tests) and forked(work, 60 + 4 * SECONDS) == 1


class _Chosen:
    """A pytest plugin that keeps the tests of a mutant, in their order."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: number for number, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid])


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the mutant's module, with its source in place of the file's."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = module_of(mutant.file)
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        loader = _Loader(fullname, str(ROOT / self.mutant.file), self.mutant.source)
        return importlib.util.spec_from_file_location(fullname, loader.path, loader=loader)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a file's name with another text."""

    def __init__(self, fullname: str, path: str, text: str) -> None:
        super().__init__(fullname, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)
