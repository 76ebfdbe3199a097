"""A PipelineModule with tensor parallelism inside its stages: matrices are whole, and norms count everything once."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.convert import convert
from tests.distributed import pipelines, sharded_pipelines, tensor_parallel
from tests.distributed.conftest import Pools
from tests.distributed.pool import Pool
from tests.oracles import EXACT

NORMUON = {"name": "normuon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3, "eps": 1e-5}, **EXACT}
CLIP = 0.1  # of gradients with a norm of about 2
TOLERANCE = 1e-5  # as in test_tensor_parallel.py; torch.optim.AdamW differs by 2e-7


@cache
def one_process(name: str, clip: float = 0.0) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    params = {"normuon": NORMUON, "watched": {**NORMUON, "telemetry": {"every": 2}}, "control": None}[name]
    return sharded_pipelines.in_one_process(params, clip)


def error(results: list[dict[str, Any]], name: str, clip: float = 0.0) -> float:
    """The largest relative error of a parameter of any stage; all stages have all parameters, and the losses."""
    losses, parameters, _ = one_process(name, clip)
    assert all(result["losses"] == pytest.approx(losses, rel=TOLERANCE) for result in results)
    assert set().union(*(result["parameters"] for result in results)) == parameters.keys()
    found = [(result["parameters"], {name: parameters[name] for name in result["parameters"]}) for result in results]
    return max(tensor_parallel.difference(*pair) for pair in found)


@pytest.mark.promise("tensor-parallel")
@pytest.mark.compatibility("pipeline_tensor", verdict="exact")
@pytest.mark.parametrize("stage", [0, 1])
def test_two_stages_of_two_tensor_ranks(stage: int, pools: Pools, record_errors: Callable[..., None]) -> None:
    config = pipelines.configuration(stage, NORMUON)
    muon = error(pools[4].run(sharded_pipelines.train, config), "normuon")
    adamw = error(pools[4].run(sharded_pipelines.train, config, control=True), "control")
    record_errors("pipeline_tensor", stage, muon=muon, adamw=adamw)
    assert max(muon, adamw) < TOLERANCE


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_are_clipped_by_the_norm_of_the_whole_model(stage: int, pools: Pools) -> None:
    """On ZeRO-0 DeepSpeed leaves out what later stages have whole, unless they are marked (AdamW without marks: 2e-3)."""
    config = pipelines.configuration(stage, NORMUON, gradient_clipping=CLIP)
    assert error(pools[4].run(sharded_pipelines.train, config), "normuon", CLIP) < TOLERANCE


@pytest.fixture
def eight(tmp_path: Path) -> Iterator[Pool]:
    """Eight ranks."""
    pool = Pool(8, tmp_path)
    yield pool
    pool.close()


def test_beside_data_parallelism(eight: Pool) -> None:
    """ZeRO-1 cuts the shards of a stage once more, over two data ranks."""
    config = pipelines.configuration(1, NORMUON, gradient_clipping=CLIP)
    assert error(eight.run(sharded_pipelines.train, config, 2), "normuon", CLIP) < TOLERANCE


@pytest.mark.parametrize("stage", [0, 1])
def test_telemetry_counts_what_tensor_ranks_share_once(stage: int, pools: Pools) -> None:
    config = pipelines.configuration(stage, {**NORMUON, "telemetry": {"every": 2}})
    expected = one_process("watched")[2]["groups"]
    for result in pools[4].run(sharded_pipelines.train, config):
        assert result["telemetry"]["groups"].keys() == expected.keys()
        for group, numbers in expected.items():
            # Each tensor rank keeps state of what it shares; the factors of Newton-Schulz amplify sums in another order.
            compared = {name: value for name, value in numbers.items() if name != "state_bytes"}
            found = result["telemetry"]["groups"][group]
            assert {name: found[name] for name in compared} == pytest.approx(compared, rel=1e-4), group


@pytest.mark.compatibility("pipeline_tensor_checkpoints", verdict="refused")
@pytest.mark.parametrize("stage", [0, 1])
def test_its_checkpoints_are_the_engines_own(stage: int, pools: Pools, tmp_path: Path) -> None:
    """They resume to the bit; a portable one is refused, and nothing is converted."""
    config = pipelines.configuration(stage, NORMUON)
    for message, same in pools[4].run(sharded_pipelines.save, config, str(tmp_path)):
        assert message.startswith("got tensor parallelism beside a pipeline; allowed: data parallelism alone")
        assert same
    with pytest.raises(CheckpointError, match="is of a tensor-parallel pipeline; allowed: "):
        convert(tmp_path / "engine", tmp_path / "converted")
    assert {path.name for path in tmp_path.iterdir()} == {"engine"}


@pytest.mark.compatibility("pipeline_autotp", stages=(0, 1), verdict="refused")
def test_autotp_of_a_pipeline_is_refused_before_there_is_an_engine(pools: Pools) -> None:
    """Of which DeepSpeed builds none, with any optimizer: its ranks wait for each other."""
    config = pipelines.configuration(1, NORMUON, tensor_parallel={"autotp_size": 2})
    for message in pools[4].run(sharded_pipelines.refused, config):
        assert message.startswith("tensor_parallel.autotp_size: got 2 with a PipelineModule; allowed: ")
        assert "PipeModelDataParallelTopology" in message
