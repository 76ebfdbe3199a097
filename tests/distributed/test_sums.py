"""Sums over whole matrices and rows, and values kept for them, on every stage: what a rule is given, and what it costs.

The rule of `tests.rules.summing` keeps for each element what it was given, and what was summed; both are read from a
checkpoint, in which nothing is left of the cuts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optforge.checkpoint.convert import convert
from tests.distributed import cases, checkpoints, summed
from tests.distributed.conftest import Pools
from tests.rules.summing import GRADIENT_SUMS, MATRICES, PARAMS, SUMS
from tests.test_sums import assert_given_the_whole

STEPS = 3
ROWS = 12  # of a global batch, so that 2, 3 and 4 ranks can share it
TINY = {"wire_dtype": "float32", "bucket_numel": 700}

# (ZeRO stage, ranks, offload, elements of a bucket)
LAYOUTS: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "ZeRO-0 on 2": (0, 2, "none", {}),
    "ZeRO-1 on 2": (1, 2, "none", {}),
    "ZeRO-1 on 4, tiny buckets": (1, 4, "none", TINY),
    "ZeRO-2 on 3": (2, 3, "none", {}),
    "ZeRO-2 on 2, offload": (2, 2, "cpu", TINY),
    "ZeRO-3 on 2": (3, 2, "none", {}),
    "ZeRO-3 on 3, tiny buckets": (3, 3, "none", TINY),
    "ZeRO-3 on 4, offload": (3, 4, "cpu", {}),
    "ZeRO-3 on 4, tiny buckets and offload": (3, 4, "cpu", TINY),
}
SAVED = "ZeRO-2 on 3"


def configuration(layout: str, **params: Any) -> dict[str, Any]:
    stage, _, offload, sharding = LAYOUTS[layout]
    zero = {"offload_optimizer": {"device": offload}}
    given = {**PARAMS, **({"sharding": sharding} if sharding else {}), **params}
    return cases.engine_config(stage, given, train_batch_size=ROWS, zero_optimization=zero)


def state_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By parameter and buffer, what a portable checkpoint holds of the rule's state."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in MATRICES}
    for key, value in checkpoints.logical_tensors(folder).items():
        kind, _, rest = key.partition("/")
        name, _, buffer = rest.rpartition("/")
        if kind == "optimizer" and name in found:
            found[name][buffer] = value
    return found


def assert_close(found: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    """1e-4: gradients are averaged in another order, and a sum may be 100 times smaller than its terms."""
    for name, state in expected.items():
        assert found[name].keys() == state.keys()
        for buffer, value in state.items():
            error = (found[name][buffer] - value).norm() / value.norm().clamp(min=1e-12)
            assert error < 1e-4, (name, buffer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float]]]:
    """What has been run, by layout: each is run when it is first needed."""
    return {}


@pytest.fixture
def runs(saved: dict[str, Any], pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, later losses) of a layout."""

    def of(layout: str) -> tuple[Path, list[float]]:
        if layout not in saved:
            folder = tmp_path_factory.mktemp("summed")
            config, ranks = configuration(layout), LAYOUTS[layout][1]
            saved[layout] = folder, pools[ranks].run(summed.run_and_save, config, str(folder), STEPS)[0]
        return saved[layout]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_given_the_sum_of_its_whole_matrix_or_row(layout: str, runs: Any) -> None:
    """One value for all of it, so also the same bits on all ranks."""
    for name, state in state_of(runs(layout)[0] / "portable").items():
        assert_given_the_whole(state, MATRICES[name])


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != SAVED])
def test_sums_and_kept_values_do_not_depend_on_the_layout(layout: str, runs: Any) -> None:
    found, expected = (state_of(runs(which)[0] / "portable") for which in (layout, SAVED))
    assert_close(found, expected)
    for name, (count, rows, cols, transposed) in MATRICES.items():
        assert torch.equal(found[name]["steps"], torch.full((count,), float(STEPS)))
        assert torch.equal(found[name]["row_steps"], torch.full((count * (cols if transposed else rows),), float(STEPS)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_values_go_through_a_portable_checkpoint(layout: str, runs: Any, pools: Pools, tmp_path: Path) -> None:
    """Bit for bit into any layout; on the one that saved it, so are the steps that follow."""
    folder, losses = runs(SAVED)
    given = configuration(layout), str(folder), "portable", STEPS, str(tmp_path)
    resumed = pools[LAYOUTS[layout][1]].run(summed.resume, *given)[0]
    assert_equal(state_of(tmp_path / "again"), state_of(folder / "portable"))
    assert resumed == (losses if layout == SAVED else pytest.approx(losses, rel=1e-5))
    (assert_equal if layout == SAVED else assert_close)(state_of(tmp_path / "later"), state_of(folder / "later"))


@pytest.mark.parametrize("layout", ["ZeRO-0 on 2", "ZeRO-2 on 2, offload", "ZeRO-3 on 3, tiny buckets"])
def test_and_through_an_engine_checkpoint_and_its_conversion(layout: str, runs: Any, pools: Pools, tmp_path: Path) -> None:
    folder, losses = runs(layout)
    given = configuration(layout), str(folder), "engine", STEPS, str(tmp_path)
    assert pools[LAYOUTS[layout][1]].run(summed.resume, *given)[0] == losses
    convert(folder / "engine", tmp_path / "converted")
    for found, expected in (("again", "portable"), ("converted", "portable"), ("later", "later")):
        assert_equal(state_of(tmp_path / found), state_of(folder / expected))


def assert_equal(found: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, state in expected.items():
        assert found[name].keys() == state.keys()
        for buffer, value in state.items():
            assert torch.equal(found[name][buffer], value), (name, buffer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_values_reach_every_element_as_they_are(layout: str, pools: Pools, tmp_path: Path) -> None:
    """In float32, bit for bit, though the wire is bfloat16: a third of a step is no number of bfloat16, nor is a sum."""
    config = configuration(layout, name="settling", sharding={**LAYOUTS[layout][3], "wire_dtype": "bfloat16"})
    pools[LAYOUTS[layout][1]].run(summed.run_and_save, config, str(tmp_path), STEPS)
    third = torch.tensor(1 / 3)
    before = (third.double() + 1 / 3).float()  # the third step was given what two have made
    for name, state in state_of(tmp_path / "portable").items():
        count, rows, cols, transposed = MATRICES[name]
        shape = (count, 1, cols) if transposed else (count, rows, 1)
        assert torch.equal(state["got_thirds"].flatten(), before.expand(count * rows * cols)), name
        expected = state["before"].view(shape).expand(count, rows, cols)
        assert torch.equal(state["got_last"].view(count, rows, cols), expected), name
        assert state["before"].abs().min() > 0


# ------------------------------------------------------------------------------------------ what it costs


def values(sums: Any, names: list[str]) -> int:
    """How many numbers the sums of these matrices (a member each) are."""
    shapes = [MATRICES[name][1:] for name in names]
    outputs = [cols if transposed else rows for rows, cols, transposed in shapes]
    return sum(len(names) if item.per == "matrix" else sum(outputs) for item in sums)


def test_one_all_reduce_a_bucket_and_kind_of_8_bytes_a_value(pools: Pools) -> None:
    """ZeRO-3 on two ranks cuts the bank inside its second matrix: the others are whole where they are, and are not sent."""
    results = pools[2].run(summed.collectives, configuration("ZeRO-3 on 2"))
    of_update = [item for item in SUMS if item.of_update]
    for found in results:
        assert found["summed"] == sorted([values(GRADIENT_SUMS, [*MATRICES]), values(of_update, [*MATRICES])])
        assert found["alltoall_base_"] == 2  # out and back: one bucket


@pytest.mark.parametrize("layout", ["ZeRO-2 on 3", "ZeRO-1 on 4, tiny buckets", "ZeRO-3 on 3, tiny buckets"])
def test_as_many_all_reduces_as_exchanges(layout: str, pools: Pools) -> None:
    """An exchange is two all-to-alls, and there are two kinds of sums. The all-reduces beyond these are those without sums."""
    with_sums, without = (
        pools[LAYOUTS[layout][1]].run(summed.collectives, configuration(layout, name=name)) for name in ("summing", "silent")
    )
    for found, silent in zip(with_sums, without, strict=True):
        assert found["alltoall_base_"] == silent["alltoall_base_"] > 0
        assert len(found["summed"]) == found["allreduce_"] - silent["allreduce_"] == found["alltoall_base_"]
        assert silent["summed"] == []
    assert all(found["summed"] == with_sums[0]["summed"] for found in with_sums)


def test_nothing_is_sent_where_no_matrix_is_cut(pools: Pools) -> None:
    with_sums, without = (
        pools[2].run(summed.collectives, configuration("ZeRO-0 on 2", name=name)) for name in ("summing", "silent")
    )
    assert with_sums == without
    assert with_sums[0]["summed"] == []
