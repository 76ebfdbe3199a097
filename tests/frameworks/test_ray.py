"""Ray Train's own workers train with OptForge as one process does, also where one dies, and go on with other workers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases
from tests.distributed.test_parity import assert_same, one_process
from tests.frameworks.environments import launch
from tests.frameworks.ray_run import SCHEDULE, STEPS
from tests.frameworks.tuning import trained_portable
from tests.oracles import EXACT


def run(stage: int, workers: int, steps: int, folder: Path, *options: str) -> Any:
    """What Ray reported last, of the lines of docs/frameworks/ray.md."""
    command = " ".join(["python -m tests.frameworks.ray_run", *map(str, (stage, workers, steps, folder)), *options])
    (result,) = re.findall(r"^RESULT (.*)$", launch("ray", command, folder), re.MULTILINE)
    return json.loads(result)


@pytest.mark.compatibility("ray", stages=(2, 3), verdict="exact")
def test_workers_of_which_one_dies_and_others_after_them(tmp_path: Path) -> None:
    """Two workers on ZeRO-2, the second of which dies in step 6, end after 8 steps; one on ZeRO-3 goes on from there."""
    first = run(2, 2, 8, tmp_path, "--dies-at", "5")
    assert (tmp_path / "died").exists()
    assert first["step"] == 8
    last = run(3, 1, STEPS, tmp_path)
    groups, weights = trained_portable(Path(last["checkpoint"], "optforge"))
    assert set(groups) == {"matrix.muon", "embedding.adamw", "unembedding.adamw", "scalar.adamw"}
    losses, expected = one_process({**cases.MUON, **EXACT}, STEPS, schedule=SCHEDULE["params"])
    assert_same(weights, expected)
    assert last["loss"] < losses[0]
