"""State that the owners of matrices keep, on every stage: bit for bit where the gradients are, and moved by checkpoints.

Gradients do not depend on the weights here, and 1, 2 and 4 ranks average equal ones without rounding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optforge.checkpoint.convert import convert
from tests.distributed import cases, checkpoints, owned
from tests.distributed.conftest import Pools
from tests.oracles import EXACT

SOAP = {"name": "soap_muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3}, **EXACT}
TINY = {"wire_dtype": "float32", "bucket_numel": 700}

# (ZeRO stage, ranks, offload, what else is said of sharding)
LAYOUTS: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "ZeRO-0 on 1": (0, 1, "none", {}),
    "ZeRO-0 on 2": (0, 2, "none", {}),
    "ZeRO-1 on 2": (1, 2, "none", {}),
    "ZeRO-1 on 4, tiny buckets": (1, 4, "none", TINY),
    "ZeRO-2 on 2, offload": (2, 2, "cpu", TINY),
    "ZeRO-3 on 2": (3, 2, "none", {}),
    "ZeRO-3 on 4, tiny buckets and offload": (3, 4, "cpu", TINY),
}
SAVED = "ZeRO-3 on 2"


def configuration(layout: str, **params: Any) -> dict[str, Any]:
    stage, _, offload, sharding = LAYOUTS[layout]
    given = {**SOAP, **({"sharding": sharding} if sharding else {}), **params}
    return cases.engine_config(stage, given, zero_optimization={"offload_optimizer": {"device": offload}})


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    print({n: (float((found[n]-expected[n]).abs().max()), float(expected[n].abs().max())) for n in different})
    assert not different


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """What has been run, by layout: each is run when it is first needed."""
    return {}


@pytest.fixture
def runs(saved: dict[str, Any], pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, weights at the end, bytes of state of each rank) of a layout."""

    def of(layout: str) -> tuple[Path, Mapping[str, Tensor], list[dict[str, int]]]:
        if layout not in saved:
            folder = tmp_path_factory.mktemp("owned")
            results = pools[LAYOUTS[layout][1]].run(owned.run_and_save, configuration(layout), str(folder))
            saved[layout] = folder, results[0][0], [result[1] for result in results]
        return saved[layout]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_owners_keep_and_the_weights_do_not_depend_on_the_layout(layout: str, runs: Any) -> None:
    (folder, weights, _), (first, expected, _) = runs(layout), runs(SAVED)
    assert_equal(*(checkpoints.logical_tensors(which / "portable") for which in (folder, first)))
    assert_equal(weights, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_moves_to_other_owners_through_a_portable_checkpoint(layout: str, runs: Any, pools: Pools, tmp_path: Path) -> None:
    folder, weights, _ = runs(SAVED)
    given = configuration(layout), str(folder), "portable", str(tmp_path / "again")
    for found in pools[LAYOUTS[layout][1]].run(owned.resume, *given):
        assert_equal(found, weights)
    assert_equal(*(checkpoints.logical_tensors(which) for which in (tmp_path / "again", folder / "portable")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_through_an_engine_checkpoint_and_its_conversion(layout: str, runs: Any, pools: Pools, tmp_path: Path) -> None:
    folder, weights, _ = runs(layout)
    given = configuration(layout), str(folder), "engine", str(tmp_path / "again")
    for found in pools[LAYOUTS[layout][1]].run(owned.resume, *given):
        assert_equal(found, weights)
    convert(folder / "engine", tmp_path / "converted")
    for which in ("again", "converted"):
        assert_equal(checkpoints.logical_tensors(tmp_path / which), checkpoints.logical_tensors(folder / "portable"))
