"""`make mutants`: how many small changes of the package's pure modules the unit tests notice.

One run of the tests, line by line, says which tests run which line. Then every mutant (`tests/mutants.py`) of a seeded sample
gets a process of its own, a fork of one that has imported and collected everything, in which its function has the changed
code; it runs the tests of its lines, at most `SECONDS` of them, until one fails. What survives so, and what is no function's
code (fields, bounds, constants), is run once more in a fork that has imported nothing of the package, from changed source.

A script of ours, because mutmut 3.8.1 changes no function with a decorator but staticmethod and classmethod, no class body
and no constant of a module (mutmut/mutation/file_mutation.py): the published coefficients, the bounds of the configuration,
all properties and validators. cosmic-ray 8.7.0 does, but starts the whole command anew for each mutant, and the import of
torch and DeepSpeed takes longer than the tests.

A survivor that behaves as the original does is in tests/data/equivalent_mutants.json with its reason, and not counted. The
exit status is 1 below `WANTED`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import random
import sys
import time
from collections import Counter

from tests.mutant_runs import FOLDER, ROOT, SECONDS, TESTS, Job, Outcome, Recording, fresh, recorded_and_swapped
from tests.mutants import Mutant, mutants_of

WANTED = 0.95
EQUIVALENT = ROOT / "tests" / "data" / "equivalent_mutants.json"

# Without experiments/sweep.py and search.py: what they decide is in noise.py, and their tests launch programs.
MODULES = (
    "rules/*.py",
    "orthogonalize/*.py",
    "zero/partition.py",
    "zero/plan.py",
    "zero/buckets.py",
    "zero/placement.py",
    "schedules.py",
    "state.py",
    "routing/*.py",
    "config/*.py",
    "experiments/noise.py",
)
# Imported once, before all forks: nothing of them is changed.
OTHERS = ("torch", "torch._dynamo", "deepspeed", "transformers", "peft", "hypothesis", "optuna", "schedulefree", "bitsandbytes")


def sampled(per_file: int, seed: int, wanted: str) -> list[Mutant]:
    """The mutants of all modules whose path has `wanted` in it, at most so many of each; 0 takes all."""
    chosen: list[Mutant] = []
    for path in sorted(path for pattern in MODULES for path in (ROOT / "ds_optforge").glob(pattern)):
        name = str(path.relative_to(ROOT))
        if wanted in name:
            found = mutants_of(path, ROOT)
            drawn = found if not per_file else random.Random(f"{seed} {name}").sample(found, min(per_file, len(found)))
            chosen += sorted(drawn, key=lambda mutant: mutant.lines)
    return chosen


def equivalents() -> dict[tuple[str, str, str, str], str]:
    """The reasons, by mutant."""
    listed = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    return {(each["file"], each["function"], each["original"], each["mutated"]): each["reason"] for each in listed}


def jobs_of(mutants: list[Mutant], recording: Recording) -> list[Job]:
    """Each mutant with its tests."""
    return [recording.job_of(mutant) for mutant in mutants]


def table(results: list[tuple[Mutant, Outcome]]) -> str:
    """Counts by room."""
    counts = Counter((room_of(mutant), outcome) for mutant, outcome in results)
    lines = ["| room | mutants | killed | equivalent | survived |", "| --- | --- | --- | --- | --- |"]
    rooms = sorted({room for room, _ in counts})
    for room in [*rooms, "all"]:
        each = [sum(counts[name, outcome] for name in (rooms if room == "all" else [room])) for outcome in Outcome]
        lines.append(f"| {room} | {sum(each)} | {each[0]} | {each[1]} | {each[2]} |")
    return "\n".join(lines)


def room_of(mutant: Mutant) -> str:
    parts = mutant.file.split("/")[1:]
    return parts[0] + "/" if len(parts) > 1 else parts[0]


def main() -> int:
    """Run the sample that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--per-file", type=int, default=10, help="mutants of each file; 0 takes all (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--only", default="", help="files whose path has this text in it")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files and folders; all that need no ranks without any")
    parser.add_argument("--reuse", action="store_true", help="the last run's record of which tests run which lines")
    arguments = parser.parse_args()
    began, listed = time.monotonic(), equivalents()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in OTHERS:
        importlib.import_module(name)
    chosen = sampled(arguments.per_file, arguments.seed, arguments.only)
    counted = [mutant for mutant in chosen if mutant.key not in listed]
    FOLDER.mkdir(parents=True, exist_ok=True)
    killed = recorded_and_swapped(counted, jobs_of, arguments.tests, reuse=arguments.reuse)
    recording = Recording.read()
    left = jobs_of([mutant for mutant in counted if mutant.key not in killed], recording)
    check_controls(left)
    survivors: list[Mutant] = []
    for number, job in enumerate(left):
        print(f"{number + 1} of {len(left)} from source: {job.mutant.file} {job.mutant.function}", flush=True)
        if not fresh(job):
            survivors.append(job.mutant)
            shown(job, recording)
    outcome = {mutant.key: Outcome.SURVIVED for mutant in survivors} | dict.fromkeys(listed, Outcome.EQUIVALENT)
    results = [(mutant, outcome.get(mutant.key, Outcome.KILLED)) for mutant in chosen]
    (FOLDER / "survivors.json").write_text(json.dumps([written(mutant) for mutant in survivors], indent=1), encoding="utf-8")
    score = 1 - len(survivors) / max(1, len(counted))
    print(f"\n{table(results)}\n\n{score:.1%} of {len(counted)} killed, in {(time.monotonic() - began) / 60:.0f} minutes")
    return score < WANTED


def check_controls(jobs: list[Job]) -> None:
    """Without a change, no test of the first mutant of a room may fail."""
    for job in {room_of(job.mutant): job for job in jobs}.values():
        unchanged = dataclasses.replace(job.mutant, source=(ROOT / job.mutant.file).read_text(encoding="utf-8"))
        if fresh(Job(unchanged, job.tests)):
            raise SystemExit(f"{job.mutant.file}: a test fails without any change; allowed: none of {' '.join(job.tests)}")


def shown(job: Job, recording: Recording) -> None:
    ran = f"{len(job.tests)} tests of {len(recording.tests)}, at most {SECONDS} seconds of them"
    print(f"SURVIVED {job.mutant.file}:{job.mutant.lines[0]} {job.mutant.function} ({ran})", flush=True)
    print(f"  - {job.mutant.original}\n  + {job.mutant.mutated}", flush=True)


def written(mutant: Mutant) -> dict[str, str]:
    """As an entry of tests/data/equivalent_mutants.json, without its reason."""
    file, function, original, mutated = mutant.key
    return {"file": file, "function": function, "original": original, "mutated": mutated, "reason": ""}


if __name__ == "__main__":
    sys.exit(main())
