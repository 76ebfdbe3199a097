"""A portable checkpoint goes on with other ranks, on another ZeRO stage, with offload toggled.

Tolerances: float32 throughout, 1e-5 relative, as between topologies without a checkpoint (`test_parity`). bfloat16 products
and wire: 1e-3; gradients are summed in another order, and what bfloat16 rounding makes of that was seen to be 1e-4 of a loss
within five steps. 8-bit state is requantized at the cuts, and has those products and wire: as bfloat16.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optforge.rules import rule_names
from ds_optforge.testing.params import formats_of, in_format, settings_of, usual
from tests.distributed import cases, checkpoints, external, skipped
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.oracles import EXACT

ROWS = 12  # of a global batch, so that 1, 2, 3 and 4 ranks can share it
WIDE = {"depth": 1, "width": 96}  # some parameters are large enough for 8-bit state

# (ranks, ZeRO stage, offload)
SAVED = (2, 2, False)
TOPOLOGIES = ((2, 2, False), (1, 1, False), (2, 3, True), (3, 3, False), (4, 1, True), (4, 2, False), (2, 0, False))

CASES = [(name, state_dtype) for name in rule_names() for state_dtype in formats_of(name)]
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-3, "8bit": 1e-3}


def configuration(topology: tuple[int, int, bool], params: dict[str, Any], **extra: Any) -> dict[str, Any]:
    _, stage, offload = topology
    config = cases.engine_config(stage, params, train_batch_size=ROWS, **extra)
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def params_of(name: str, state_dtype: str = "float32") -> dict[str, Any]:
    """A rule's "params". Compact state comes with the products and the wire that are the default."""
    params = in_format(usual(name), state_dtype)
    return params if state_dtype == "float32" else {key: value for key, value in params.items() if key not in EXACT}


def label(topology: tuple[int, int, bool]) -> str:
    ranks, stage, offload = topology
    return f"{ranks} rank{'s' * (ranks > 1)}, ZeRO-{stage}{', offload' * offload}"


def schedule(name: str) -> dict[str, Any]:
    """A schedule, except where averaging replaces it."""
    if settings_of(name).builds.replaces_schedule:
        return {}
    return {
        "scheduler": {"type": "OptForgeSchedule", "params": {"name": "cosine", "warmup_num_steps": 3, "total_num_steps": 10}}
    }


@pytest.mark.parametrize(("name", "state_dtype"), CASES)
def test_every_optimizer_moves_to_every_topology(
    name: str, state_dtype: str, pools: Pools, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """What is recorded becomes the table of docs/reliability.md (docs/reliability_table.py)."""
    params = params_of(name, state_dtype)
    saved = configuration(SAVED, params, **schedule(name))
    expected = pools[2].run(checkpoints.run_and_save, saved, str(tmp_path / "saved"), **WIDE)[0]
    for topology in TOPOLOGIES:
        config = configuration(topology, params, **schedule(name))
        for result in pools[topology[0]].run(checkpoints.resume, config, str(tmp_path / "saved"), **WIDE):
            assert result["steps"] == checkpoints.HALF
            if topology == SAVED:
                assert result["losses"] == expected["losses"]
                assert all(torch.equal(result["parameters"][n], p) for n, p in expected["parameters"].items())
            assert result["losses"] == pytest.approx(expected["losses"], rel=TOLERANCES[state_dtype]), topology
        off = max(abs(found / loss - 1) for found, loss in zip(result["losses"], expected["losses"], strict=True))
        record_property(label(topology), off)


def test_saving_again_is_lossless(pools: Pools, tmp_path: Path) -> None:
    """From 2 ranks to 3 on another stage and back: every tensor bit for bit, 8-bit codes inside the cuts included."""
    params = params_of("normuon", "bfloat16")
    there, elsewhere = configuration(SAVED, params), configuration((3, 3, False), params)
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    pools[2].run(checkpoints.run_and_save, there, first, frozen=True, shapes=True)
    pools[3].run(checkpoints.load_and_save, elsewhere, first, second, frozen=True, shapes=True)
    pools[2].run(checkpoints.load_and_save, there, second, third, frozen=True, shapes=True)
    original = checkpoints.logical_tensors(first)
    for copy in (checkpoints.logical_tensors(second), checkpoints.logical_tensors(third)):
        assert copy.keys() == original.keys()
        assert all(torch.equal(copy[name], tensor) for name, tensor in original.items())


HALF_PRECISION = {
    "bf16": {"bf16": {"enabled": True}},
    "bf16, float32 gradients": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}},
}


@pytest.mark.parametrize(
    ("precision", "stages"),
    [
        *product(HALF_PRECISION, [(1, 3), (3, 1)]),
        *product(["bf16", "fp16"], [(0, 2), (2, 0)]),  # DeepSpeed has no float32 gradients beside bf16 there
    ],
)
def test_low_precision_weights_come_from_float32_ones(
    precision: str, stages: tuple[int, int], pools: Pools, tmp_path: Path
) -> None:
    """Whatever wrapper DeepSpeed puts around the optimizer. 2e-2: losses of bfloat16 weights, gradients rounded to it.

    DeepSpeed's stage 0 sums gradients in fp16 otherwise than its other stages do, so that runs on them part without any
    checkpoint (by 4% in ten steps); there the loss that follows the checkpoint tells that everything has arrived.
    """
    extra = HALF_PRECISION[precision]
    params = {**cases.MUON, **EXACT}
    saved, other = (configuration((2, stage, False), params, **extra) for stage in stages)
    expected = pools[2].run(checkpoints.run_and_save, saved, str(tmp_path / "saved"))[0]
    again = pools[2].run(checkpoints.resume, saved, str(tmp_path / "saved"))[0]
    assert again["losses"] == expected["losses"]
    assert again["loss_scale"] == expected["loss_scale"]
    moved = pools[2].run(checkpoints.resume, other, str(tmp_path / "saved"))[0]
    common = moved["loss_scale"].keys() & expected["loss_scale"].keys()  # stage 0 has no hysteresis
    assert bool(common) == (precision == "fp16")
    assert all(moved["loss_scale"][key] == expected["loss_scale"][key] for key in common)
    compared = 1 if precision == "fp16" and 0 in stages else checkpoints.HALF
    assert moved["losses"][:compared] == pytest.approx(expected["losses"][:compared], rel=2e-2)


def test_training_goes_on_while_a_thread_writes(pools: Pools, tmp_path: Path) -> None:
    """What it writes is the moment of the call."""
    config = configuration(SAVED, params_of("normuon"))
    at_once, later = str(tmp_path / "at once"), str(tmp_path / "later")
    expected = pools[2].run(checkpoints.run_and_save, config, at_once)[0]
    result = pools[2].run(checkpoints.run_and_save, config, later, "background")[0]
    assert result["losses"] == expected["losses"]
    written, copied = checkpoints.logical_tensors(at_once), checkpoints.logical_tensors(later)
    assert written.keys() == copied.keys()
    assert all(torch.equal(copied[name], tensor) for name, tensor in written.items())


@pytest.mark.parametrize(("saved_as", "resumed_as"), [("float32", "8bit"), ("8bit", "float32"), ("bfloat16", "8bit")])
def test_another_state_format_takes_the_state_over(saved_as: str, resumed_as: str, pools: Pools, tmp_path: Path) -> None:
    before, after = (configuration(SAVED, params_of("adamw", name)) for name in (saved_as, resumed_as))
    expected = pools[2].run(checkpoints.run_and_save, before, str(tmp_path / "saved"), **WIDE)[0]
    result = pools[2].run(checkpoints.resume, after, str(tmp_path / "saved"), **WIDE, strict=False)[0]
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-2)


def test_state_of_another_kind_of_rule_starts_afresh(pools: Pools, tmp_path: Path) -> None:
    """SGD's sum of gradients has the name of Muon's average of them, and is twenty times as large."""
    before, after = configuration(SAVED, params_of("sgd")), configuration(SAVED, params_of("muon"))
    pools[2].run(checkpoints.run_and_save, before, str(tmp_path / "saved"))
    for found in pools[2].run(external.load_weights_alone, after, str(tmp_path / "saved")):
        assert found["steps"] == []
        assert found["losses"][-1] < found["losses"][0]


def test_state_of_a_run_before_the_load_is_dropped(pools: Pools, tmp_path: Path) -> None:
    """A group that starts afresh does so too in an engine that has taken steps."""
    before, after = configuration(SAVED, params_of("sgd")), configuration(SAVED, params_of("muon"))
    pools[2].run(checkpoints.run_and_save, before, str(tmp_path / "saved"))
    assert pools[2].run(skipped.load_into_a_run, after, str(tmp_path / "saved")) == [[], []]


def test_deepspeeds_counters_arrive(pools: Pools, tmp_path: Path) -> None:
    """Three steps of 12 samples, and one that was skipped."""
    config = configuration(SAVED, params_of("muon"))
    pools[2].run(skipped.save, config, str(tmp_path / "saved"), 3)
    for _, found in pools[2].run(skipped.load, config, str(tmp_path / "saved")):
        assert found["global_steps"] == 4
        assert found["global_samples"] == 48
        assert found["skipped_steps"] == 1


@pytest.mark.fp16
def test_all_of_the_loss_scaler_arrives(pools: Pools, tmp_path: Path) -> None:
    """Every number that DeepSpeed keeps of it, of which a new one has four otherwise."""
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 2}
    config = configuration(SAVED, params_of("muon"), fp16=fp16)
    expected = pools[2].run(skipped.save, config, str(tmp_path / "saved"), 3)
    for (fresh, found), saved in zip(pools[2].run(skipped.load, config, str(tmp_path / "saved")), expected, strict=True):
        assert found == saved
        different = {key for key, value in saved.items() if fresh[key] != value}
        assert different >= {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}


def test_another_gradient_accumulation_goes_on(pools: Pools, tmp_path: Path) -> None:
    """After a number of steps that it does not divide."""
    params = params_of("muon")
    expected = pools[2].run(checkpoints.run_and_save, configuration(SAVED, params), str(tmp_path / "saved"))[0]
    config = configuration(SAVED, params, gradient_accumulation_steps=2)
    result = pools[2].run(checkpoints.resume, config, str(tmp_path / "saved"))[0]
    assert result["losses"] == pytest.approx(expected["losses"], rel=TOLERANCES["float32"])


@pytest.mark.quick
def test_rates_and_random_states_arrive(pools: Pools, tmp_path: Path) -> None:
    config = configuration(SAVED, params_of("muon"), **schedule("muon"))
    expected = pools[2].run(checkpoints.draw_and_save, config, str(tmp_path / "saved"))
    for rank, drawn in enumerate(pools[2].run(checkpoints.load_and_draw, config, str(tmp_path / "saved"))):
        assert drawn == expected[rank]
    assert expected[0]["numbers"] != expected[1]["numbers"]


def test_experts_shared_out_over_ranks_are_refused(pools: Pools, tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(checkpoints.save_mixture, cases.engine_config(2, cases.MUON), str(tmp_path / "saved"))
    assert "ranks share out under the same names (ep_size > 1)" in failure.value.messages[0]
