"""Accelerate with ZeRO on real ranks: what `make_accelerator` gives trains as a plain engine does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.distributed.test_parity import assert_same

pytest.importorskip("accelerate", reason="accelerate is not installed (extra 'hf')")
frameworks = pytest.importorskip("tests.distributed.frameworks", reason="transformers is not installed (extra 'hf')")

ROOT = Path(__file__).parents[2]
LAUNCHING = (ROOT / "docs" / "launching.md").read_text()
(SNIPPET,) = re.findall(r"<!-- snippet: accelerate -->\n```python\n(.*?)```", LAUNCHING, re.DOTALL)
STEPS = 6
SCHEDULE = {"scheduler": {"type": "OptForgeSchedule", "params": {"name": "cosine", "total_num_steps": "auto"}}}


def config(stage: int, params: dict[str, Any] = cases.MUON, **extra: Any) -> dict[str, Any]:
    """Batch sizes are Accelerate's to fill in."""
    left_open = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    return cases.engine_config(stage, params, **SCHEDULE, **left_open, **extra)


@pytest.mark.promise("accumulation", "clipping")
@pytest.mark.compatibility("accelerate", verdict="exact")
@pytest.mark.parametrize(("stage", "real"), [(1, False), (2, True), (3, False)])
def test_accumulation_and_clipping_are_those_of_a_plain_engine(stage: int, real: bool, pools: Pools) -> None:
    """Two micro-batches a step, gradients clipped to a tenth of their norm."""
    clipping = 0.1
    plain = cases.engine_config(stage, cases.MUON, gradient_clipping=clipping, gradient_accumulation_steps=2)
    plain["scheduler"] = {"type": "OptForgeSchedule", "params": {"name": "cosine", "total_num_steps": STEPS}}
    expected = pools[2].run(cases.train, plain, STEPS)[0]
    through = config(stage, gradient_clipping=clipping)
    for found in pools[2].run(frameworks.train_under_accelerate, through, STEPS, accumulation=2, real=real):
        assert found["processes"] == 2
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert_same(found["parameters"], expected["parameters"], 1e-6)
        assert len(found["norms"]) == STEPS
        assert min(found["norms"]) > 2 * clipping


@pytest.mark.parametrize(("stage", "real"), [(2, False), (3, True)])
def test_save_state_and_load_state(stage: int, real: bool, pools: Pools, tmp_path: Path) -> None:
    """A fresh process group goes on as the uninterrupted run does, scheduler included."""
    uninterrupted = pools[2].run(frameworks.save_state, config(stage), str(tmp_path), real)
    assert pools[2].run(frameworks.load_state, config(stage), str(tmp_path), real) == uninterrupted


@pytest.mark.promise("averaged-evaluation")
@pytest.mark.parametrize("stage", [2, 3])
def test_averaged_weights_are_evaluated_and_exported(stage: int, pools: Pools) -> None:
    """Accelerate's issue 4159: optimizer.eval() does not reach an engine's weights, `evaluation_weights` does."""
    schedule_free = {"name": "schedule_free_adamw", "lr": 3e-3}
    given = config(stage, schedule_free, zero_optimization={"stage3_gather_16bit_weights_on_model_save": True})
    given["scheduler"] = {"type": "OptForgeSchedule", "params": {"name": "none"}}
    results = pools[2].run(frameworks.averages_under_accelerate, given)
    for result in results:
        assert all(torch.equal(result["after"][name], weight) for name, weight in result["before"].items())
        assert not torch.equal(result["inside"]["up.weight"], result["before"]["up.weight"])
    exported = results[0]["exported"]
    assert all(torch.equal(exported[name], weight) for name, weight in results[0]["inside"].items())


@pytest.mark.compatibility("accelerate", stages=("offload",), verdict="exact")
def test_offload_keeps_the_real_optimizer(pools: Pools) -> None:
    """Accelerate would put DeepSpeed's Adam in its place."""
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    expected = pools[2].run(frameworks.train_under_accelerate, config(2), STEPS, 1)[0]
    found = pools[2].run(frameworks.train_under_accelerate, config(2, **offload), STEPS, 1, real=True)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_a_state_that_something_else_made_first_is_refused(pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(frameworks.after_another_state, config(2))
    for message in failure.value.messages.values():
        assert message.startswith("accelerator: counts 1 process(es) of 2; allowed: all (make_accelerator, before ")


def test_the_documented_loop_trains(pools: Pools) -> None:
    for losses in pools[2].run(cases.run_snippet, SNIPPET, str(ROOT)):
        assert losses[-1] < losses[0]
