"""The patches of docs/upstream: what is wrong in the installed DeepSpeed, and that a patched copy of it is right.

The copy needs ranks of its own, so that its tests are slow ones: they change when a patch does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.incumbent import ranks
from tests.distributed import upstream
from tests.distributed.conftest import Pools

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "docs" / "upstream").glob("*.patch"))
RELEASE = "0.19.8"  # they are for this one
LIMIT = 300.0  # seconds


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the installed package to which every patch has been applied."""
    if (installed := importlib.metadata.version("deepspeed")) != RELEASE:
        pytest.skip(f"the patches are for DeepSpeed {RELEASE}, and {installed} is installed")
    folder = tmp_path_factory.mktemp("deepspeed")
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, folder / "deepspeed", ignore=shutil.ignore_patterns("__pycache__"))
    for patch in PATCHES:  # each by itself
        subprocess.run(["git", "apply", "--check", str(patch)], cwd=folder, check=True)
    subprocess.run(["git", "apply", *map(str, PATCHES)], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def found(patched: Path) -> dict[str, Any]:
    """What ranks that import the copy do."""
    path = os.pathsep.join(filter(None, [str(patched), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", "from tests.distributed.upstream import main; main()"]  # ranks import what they run
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["file"] == str(patched / "deepspeed" / "__init__.py")
    return result


def test_the_page_has_every_patch() -> None:
    page = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    assert re.findall(r"^\[upstream/([\w.-]+\.patch)\]", page, re.MULTILINE) == [patch.name for patch in PATCHES]


class TestUniversalCheckpoints:
    """Patch 1: states of any name."""

    def test_the_installed_release_knows_adams_states_alone(self, pools: Pools, tmp_path: Path) -> None:
        pools[2].run(upstream.save, upstream.SGD_ON_ZERO_2, str(tmp_path))
        error = pools[1].run(ranks.universal_error, str(tmp_path / "saved"), str(tmp_path / "universal"))
        assert error == ["KeyError: 'exp_avg'"]

    @pytest.mark.slow
    def test_with_the_patch_a_run_goes_on_from_two_ranks_on_one(self, found: dict[str, Any]) -> None:
        assert found["sgd_on_zero_2"] < 1e-5
        assert found["muon_on_zero_3"] < 1e-5
        assert found["adamw_on_zero_3"] < 1e-5  # as before

    @pytest.mark.slow
    def test_with_the_patch_what_cannot_be_cut_is_refused_by_name(self, found: dict[str, Any]) -> None:
        """On ZeRO-2 the built-in Muon has the momentum of whole matrices, also of those that a rank holds a part of."""
        expected = r"ValueError: The optimizer state 'momentum_buffer' has \d+ values for \d+ weights"
        assert re.match(expected, found["muon_on_zero_2"])


class TestAttributes:
    """Patch 2: what a caller has set on a parameter is on the one that replaces it."""

    def test_the_installed_release_loses_them(self, pools: Pools) -> None:
        """With them goes the tag from which the built-in Muon takes the heads of a shard: it counts all 8 on each rank."""
        assert pools[2].run(upstream.after_autotp, timeout_s=LIMIT)[0] == {"mark": None, "heads": 8}
        lost = ["experts.w1", "experts.w2", "experts.w3", "router.gate.weight"]
        assert pools[2].run(upstream.unmarked_after_autoep)[0] == lost

    @pytest.mark.slow
    def test_with_the_patch_they_stay(self, found: dict[str, Any]) -> None:
        assert found["after_autotp"] == {"mark": "a caller's", "heads": 4}
        assert found["unmarked_after_autoep"] == []


class TestRegistry:
    """Patch 3: optimizers of other packages by a name in the configuration."""

    def test_the_installed_release_has_none(self, pools: Pools) -> None:
        assert pools[2].run(upstream.named_in_json)[0] == "Signs is not a supported DeepSpeed Optimizer"

    @pytest.mark.slow
    def test_with_the_patch_a_registered_one_trains(self, found: dict[str, Any]) -> None:
        assert found["named_in_json"][-1] < found["named_in_json"][0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_test_of_clipping_fails_where_the_update_is_clipped(stage: int, patched: Path, pools: Pools) -> None:
    """Patch 4, which adds nothing but this test."""
    path = patched / "tests" / "unit" / "ops" / "muon" / "test_muon_clipping.py"
    assert pools[2].run(upstream.clipping, str(path), stage, timeout_s=LIMIT) == 2 * [stage == 0]
