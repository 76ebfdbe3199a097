"""What is around rules in checkpoints: on another topology, and in runs that begin with it or leave it out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import cases, checkpoints
from tests.distributed.conftest import Pools
from tests.distributed.test_parity import assert_same
from tests.distributed.test_portable import SAVED, configuration, label
from tests.oracles import EXACT

MUON = {**cases.MUON, **EXACT}
AHEAD = {"ema_nesterov": {"decay": 0.9, "start": 0}}
EMA, TAIL = {"kind": "ema", "decay": 0.8}, {"kind": "tail", "start": 3}


def saved(pools: Pools, folder: Path, **average: Any) -> dict[str, Tensor]:
    """Save after five steps; return the weights to evaluate with at that moment."""
    config = configuration(SAVED, {**MUON, **average})
    return pools[2].run(checkpoints.save_and_average, config, str(folder))[0]


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.promise("average-checkpoints", "ema-nesterov")
@pytest.mark.parametrize("around", [{"average": EMA}, {"average": TAIL}, AHEAD, {**AHEAD, "average": EMA}], ids=list)
def test_it_moves_to_other_topologies(around: dict[str, Any], pools: Pools, tmp_path: Path) -> None:
    """Bit for bit at first. Five steps later 1e-5: gradients are summed in another order."""
    expected = saved(pools, tmp_path / "saved", **around)
    later: dict[str, Tensor] = {}
    for topology in (SAVED, (1, 1, False), (2, 3, True), (3, 3, False), (2, 0, False), (4, 2, False)):
        config = configuration(topology, {**MUON, **around})
        for result in pools[topology[0]].run(checkpoints.load_and_average, config, str(tmp_path / "saved")):
            assert result["lines"] == []
            assert_same_bits(result["averages"], expected)
            later = later or result["later"]
            assert_same(result["later"], later, 1e-5)
    assert not torch.equal(later["up.weight"], expected["up.weight"]), label(SAVED)


@pytest.mark.promise("average-checkpoints")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_engine_checkpoint_has_it(stage: int, pools: Pools, tmp_path: Path) -> None:
    config = configuration((2, stage, False), {**MUON, "average": TAIL})
    expected = pools[2].run(checkpoints.save_and_average, config, str(tmp_path / "saved"))[0]
    found = pools[2].run(checkpoints.load_and_average, config, str(tmp_path / "saved engine"), "engine")[0]
    again = pools[2].run(checkpoints.load_and_average, config, str(tmp_path / "saved"))[0]
    assert_same_bits(found["averages"], expected)
    assert_same_bits(found["later"], again["later"])


@pytest.mark.promise("average-checkpoints")
@pytest.mark.parametrize("average", [EMA, TAIL], ids=["ema", "tail"])
def test_a_run_that_had_none_begins_with_the_weights_as_they_are(average: dict[str, Any], pools: Pools, tmp_path: Path) -> None:
    """And says so, once for each parameter group; a tail's start is past, so that it begins with the next step."""
    trained = saved(pools, tmp_path / "saved")
    config = configuration((2, 3, False), {**MUON, "average": average})
    for result in pools[2].run(checkpoints.load_and_average, config, str(tmp_path / "saved")):
        assert_same_bits(result["averages"], trained)
        assert not torch.equal(result["later"]["up.weight"], trained["up.weight"])
        assert len(result["lines"]) == 4
        for line in result["lines"]:
            assert "goes on from step 5 with a new weight_average, which begins with the weights as they are" in line


@pytest.mark.promise("average-checkpoints")
def test_a_run_without_one_leaves_it_out_and_says_so(pools: Pools, tmp_path: Path) -> None:
    saved(pools, tmp_path / "saved", average=EMA)
    plain = configuration(SAVED, MUON)
    for result in pools[2].run(checkpoints.load_and_average, plain, str(tmp_path / "saved")):
        assert_same_bits(result["averages"], result["trained"])
        assert all("goes on from step 5 with no weight_average, which the checkpoint has" in line for line in result["lines"])
        assert len(result["lines"]) == 4


@pytest.mark.promise("ema-nesterov")
def test_a_run_without_look_ahead_is_refused_the_weights_that_are_ahead(pools: Pools, tmp_path: Path) -> None:
    """They are not the trained ones. Once the look-ahead has ended they are, and only the average of changes is left out."""
    saved(pools, tmp_path / "ahead", **AHEAD)
    plain = configuration(SAVED, MUON)
    for strict in (True, False):
        for message, unchanged in pools[2].run(checkpoints.refused, plain, str(tmp_path / "ahead"), strict):
            assert unchanged
            assert "parameter group 'embedding.adamw': the weights are ahead of the trained ones by ema_nesterov's" in message
    trained = saved(pools, tmp_path / "ended", ema_nesterov={"decay": 0.9, "start": 0, "stop": 5})
    for result in pools[2].run(checkpoints.load_and_average, plain, str(tmp_path / "ended")):
        assert_same_bits(result["trained"], trained)
        assert all("goes on from step 5 with no update_average, which the checkpoint has" in line for line in result["lines"])
        assert len(result["lines"]) == 4


@pytest.mark.promise("ema-nesterov")
def test_a_run_may_begin_to_look_ahead(pools: Pools, tmp_path: Path) -> None:
    trained = saved(pools, tmp_path / "saved")
    for result in pools[2].run(checkpoints.load_and_average, configuration(SAVED, {**MUON, **AHEAD}), str(tmp_path / "saved")):
        assert_same_bits(result["trained"], trained)
        assert_same_bits(result["averages"], trained)
        assert all("with a new update_average, from zeros" in line for line in result["lines"])
        assert len(result["lines"]) == 4
