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
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.forecast import Forecast, forecast
from ds_optforge.forecast.topology import Topology
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


@pytest.mark.promise("owners-state")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_owners_keep_and_the_weights_do_not_depend_on_the_layout(layout: str, runs: Any) -> None:
    (folder, weights, _), (first, expected, _) = runs(layout), runs(SAVED)
    assert_equal(*(checkpoints.logical_tensors(which / "portable") for which in (folder, first)))
    assert_equal(weights, expected)


@pytest.mark.promise("owners-state")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_moves_to_other_owners_through_a_portable_checkpoint(layout: str, runs: Any, pools: Pools, tmp_path: Path) -> None:
    folder, weights, _ = runs(SAVED)
    given = configuration(layout), str(folder), "portable", str(tmp_path / "again")
    for found in pools[LAYOUTS[layout][1]].run(owned.resume, *given):
        assert_equal(found, weights)
    assert_equal(*(checkpoints.logical_tensors(which) for which in (tmp_path / "again", folder / "portable")))


@pytest.mark.promise("owners-state")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_through_an_engine_checkpoint_and_its_conversion(layout: str, runs: Any, pools: Pools, tmp_path: Path) -> None:
    folder, weights, _ = runs(layout)
    given = configuration(layout), str(folder), "engine", str(tmp_path / "again")
    for found in pools[LAYOUTS[layout][1]].run(owned.resume, *given):
        assert_equal(found, weights)
    convert(folder / "engine", tmp_path / "converted")
    for which in ("again", "converted"):
        assert_equal(checkpoints.logical_tensors(tmp_path / which), checkpoints.logical_tensors(folder / "portable"))


# ------------------------------------------------------------------------------------------ where it is


FACTORS = ("momentum", "second_moment", "row_covariance", "col_covariance", "row_basis", "col_basis")
# 4 bytes each: 2 m n + 2 m^2 + 2 n^2, of the square, the wide, the tall and the odd matrix, and of three in the bank.
OF_MATRICES = {"square": 13_824, "wide": 21_152, "tall": 19_328, "odd": 10_952, "bank": 3 * 4_736}


def forecast_of(params: dict[str, Any], topology: Topology) -> Forecast:
    return forecast(owned.Given(), OptimizerConfig(params), topology)


@pytest.mark.promise("owners-state")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_has_state_of_the_matrices_that_it_owns_and_the_plan_knows_how_much(layout: str, runs: Any) -> None:
    stage, ranks, _, sharding = LAYOUTS[layout]
    found = [sum(of_rank[name] for name in FACTORS) for of_rank in runs(layout)[2]]
    planned = forecast_of(
        {**SOAP, **({"sharding": sharding} if sharding else {})}, Topology(ranks, stage) if stage else Topology(1, 1)
    )
    if stage == 0:
        assert found == [sum(OF_MATRICES.values())] * ranks
        assert found[0] == planned.ranks[0].state_bytes
    else:
        assert sum(found) == sum(OF_MATRICES.values())
        assert found == [rank.state_bytes for rank in planned.ranks]
        assert max(found) < sum(found)


def test_no_more_travels_than_with_muon() -> None:
    """A fragment to its owner and the update back, on ranks that each own something."""
    of_ranks = [forecast_of({**SOAP, "name": name}, Topology(2, 3)).ranks for name in ("muon", "soap_muon")]
    assert sum(rank.sent_bytes for rank in of_ranks[0]) == sum(rank.sent_bytes for rank in of_ranks[1]) > 0


def test_a_portable_checkpoint_of_another_split_is_refused(runs: Any, pools: Pools) -> None:
    folder = runs(SAVED)[0]
    overrides = [{"match": "tall", "split": [16, 20]}]
    for message in pools[2].run(owned.refused, configuration(SAVED, overrides=overrides), str(folder), "portable"):
        assert "'optimizer/tall/row_basis.0' holds 1296 elements; allowed: 256, of this run's matrix" in message


@pytest.mark.promise("owners-state")
def test_an_engine_checkpoint_of_other_owners_is_refused(runs: Any, pools: Pools) -> None:
    """With bases that hardly ever turn, other matrices cost most."""
    folder = runs(SAVED)[0]
    for message in pools[2].run(owned.refused, configuration(SAVED, every=1000), str(folder)):
        assert "owned it in the checkpoint" in message
        assert "ds_optforge.load_checkpoint" in message
