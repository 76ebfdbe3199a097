"""The pool keeps its promises: whatever a job does, its test hears about it and the next job finds a working pool."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import IMPORT_ROOT, Pool, RankFailure
from tests.processes import wait_until_gone


def describe() -> dict[str, Any]:
    """Who ran this, and what it draws and reduces."""
    rank = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(rank)
    return {
        "rank": dist.get_rank(),
        "pid": os.getpid(),
        "rank_sum": rank.item(),
        "random": torch.rand(3),
        "threads": torch.get_num_threads(),
        "hash": hash("the order of a set"),
    }


def echo(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Return what came in."""
    return dist.get_rank(), args, kwargs


def fail_everywhere() -> None:
    """Print, then raise on every rank."""
    print("about to fail")
    raise ValueError(f"rank {dist.get_rank()} is unhappy")


def fail_on_rank_one(folder: Path) -> None:
    """Leave rank 0 alone, on its way into a collective."""
    if dist.get_rank() == 0:
        (folder / "here").touch()
        dist.barrier()
    while not (folder / "here").exists():
        time.sleep(0.01)
    raise ValueError("only me")


def die_on_rank_one() -> None:
    """End a process without a word."""
    if dist.get_rank() == 1:
        os._exit(3)


def sleep_with_child(folder: Path) -> None:
    """Hang, with a process of its own on rank 0."""
    if dist.get_rank() == 0:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "written").write_text(str(child.pid))
        (folder / "written").rename(folder / "child")
    time.sleep(600)


def return_lambda() -> Any:
    """A result that cannot travel."""
    return lambda: None


def cpu_seconds() -> float:
    """Processor time this rank has used since its start."""
    return time.process_time()


def abandon_engine(stage: int) -> None:
    """Train two steps, then raise: the engine is not destroyed and a zero.Init never left."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    engine = deepspeed.initialize(model=model, config=config)[0]
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 8)).square().mean())
        engine.step()
    deepspeed.zero.Init(config_dict_or_path=config).__enter__()
    os.environ["LEFT_BEHIND"] = "1"
    raise ValueError("abandoned")


def accelerate_once() -> str:
    """Accelerate takes a DeepSpeed plugin only once per process."""
    accelerate = pytest.importorskip("accelerate")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}})
    return str(accelerate.Accelerator(deepspeed_plugin=plugin).distributed_type.name)


def train_on_zero3() -> None:
    from tests.distributed import cases  # which imports DeepSpeed, as only ranks do

    cases.train(cases.engine_config(3, cases.MUON), 1)


def process_groups() -> int:
    """How many gloo process groups this process has: each has a thread that never rests, until nothing holds the group."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop")


def leftovers() -> dict[str, Any]:
    """What the jobs before have left in this process."""
    import deepspeed

    gc.unfreeze()  # look also at what a rank has excluded from collections
    return {
        "engines": sum(issubclass(type(thing), deepspeed.DeepSpeedEngine) for thing in gc.get_objects()),
        "linear": torch.nn.functional.linear.__name__,
        "weight": tuple(torch.nn.Linear(3, 2).weight.shape),
        "environment": "LEFT_BEHIND" in os.environ,
    }


@pytest.fixture
def short_grace(pool2: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on ranks soon after another one has failed."""
    monkeypatch.setattr(pool2, "grace_s", 5.0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_returns_its_result_from_one_process_group(size: int, request: pytest.FixtureRequest) -> None:
    results = request.getfixturevalue(f"pool{size}").run(describe)
    assert [result["rank"] for result in results] == list(range(size))
    assert {result["rank_sum"] for result in results} == {size * (size - 1) / 2}
    assert {result["threads"] for result in results} == {1}


def test_jobs_share_processes_and_start_from_the_same_seed(pool2: Pool) -> None:
    first, second = pool2.run(describe), pool2.run(describe)
    assert [result["pid"] for result in first] == [result["pid"] for result in second] == pool2.pids
    assert torch.equal(first[0]["random"], second[0]["random"])
    assert torch.equal(first[0]["random"], first[1]["random"])


@pytest.mark.skipif("PYTHONHASHSEED" in os.environ, reason="PYTHONHASHSEED is set")
def test_ranks_order_their_sets_differently(pool4: Pool) -> None:
    """As under a launcher: else no test would see collectives whose order is that of a set."""
    assert len({result["hash"] for result in pool4.run(describe)}) == 4


def test_tensors_travel_both_ways(pool2: Pool) -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T
    for rank, result in enumerate(pool2.run(echo, tensor, named={"same": tensor})):
        number, (positional,), keywords = result
        assert number == rank
        assert positional.dtype == torch.bfloat16
        assert torch.equal(positional, tensor)
        assert torch.equal(keywords["named"]["same"], tensor)


def test_a_failure_on_all_ranks_is_told_and_costs_no_restart(pool2: Pool) -> None:
    pids = [result["pid"] for result in pool2.run(describe)]
    for _ in range(2):
        with pytest.raises(RankFailure, match="rank 1 is unhappy") as caught:
            pool2.run(fail_everywhere)
    assert caught.value.types == {0: "ValueError", 1: "ValueError"}
    assert caught.value.messages == {0: "rank 0 is unhappy", 1: "rank 1 is unhappy"}
    assert "in fail_everywhere" in str(caught.value)
    assert str(caught.value).count("\nabout to fail") == 2
    assert [result["pid"] for result in pool2.run(describe)] == pids


def test_a_result_that_cannot_travel_is_a_failure(pool2: Pool) -> None:
    with pytest.raises(RankFailure, match="return_lambda"):
        pool2.run(return_lambda)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_abandoned_engine_does_not_reach_the_next_job(pool2: Pool, stage: int) -> None:
    before, pids = pool2.run(leftovers), pool2.pids
    with pytest.raises(RankFailure, match="abandoned"):
        pool2.run(abandon_engine, stage)
    assert pool2.run(leftovers) == before
    assert before[0] == {"engines": 0, "linear": "linear", "weight": (2, 3), "environment": False}
    assert pool2.pids == pids


def test_the_process_groups_of_a_job_end_with_it(tmp_path: Path) -> None:
    """On ZeRO-3, where DeepSpeed keeps them in caches of functions; in new ranks, in which no test has looked at objects."""
    pool = Pool(2, tmp_path)
    try:
        before = pool.run(process_groups)
        for _ in range(2):
            pool.run(train_on_zero3)
        assert pool.run(process_groups) == before == [1, 1]
    finally:
        pool.close()


def test_each_job_may_use_accelerate(pool2: Pool) -> None:
    pytest.importorskip("accelerate")
    pids = [result["pid"] for result in pool2.run(describe)]
    assert [pool2.run(accelerate_once) for _ in range(2)] == [["DEEPSPEED", "DEEPSPEED"]] * 2
    assert [result["pid"] for result in pool2.run(describe)] == pids


def test_idle_ranks_leave_the_processor_alone(pool2: Pool) -> None:
    """Half of the time is far from what a rank that polls would take, and from what one that waits does."""
    before = pool2.run(cpu_seconds)
    time.sleep(3)
    after = pool2.run(cpu_seconds)
    assert all(late - early < 1.5 for early, late in zip(before, after, strict=True))


@pytest.mark.usefixtures("short_grace")
def test_a_rank_that_waits_for_a_failed_one_is_killed_and_shows_where_it_was(pool2: Pool, tmp_path: Path) -> None:
    pids = [result["pid"] for result in pool2.run(describe)]
    with pytest.raises(RankFailure, match="only me") as caught:
        pool2.run(fail_on_rank_one, tmp_path)
    assert caught.value.types == {0: "Hung", 1: "ValueError"}
    assert "in barrier" in str(caught.value)
    assert not wait_until_gone(pids)
    assert pool2.run(describe)[1]["rank_sum"] == 1.0


def test_a_dead_rank_is_told_and_replaced(pool2: Pool) -> None:
    with pytest.raises(RankFailure, match="status 3") as caught:
        pool2.run(die_on_rank_one)
    assert caught.value.types == {1: "Died"}
    assert pool2.run(describe)[1]["rank_sum"] == 1.0


def test_a_job_past_its_time_is_killed_with_all_that_it_started(pool2: Pool, tmp_path: Path) -> None:
    pids = [result["pid"] for result in pool2.run(describe)]
    with pytest.raises(RankFailure, match="no answer after 5 s") as caught:
        pool2.run(sleep_with_child, tmp_path, timeout_s=5)
    assert "in sleep_with_child" in str(caught.value)
    assert not wait_until_gone([*pids, int((tmp_path / "child").read_text())])
    assert pool2.run(describe)[1]["rank_sum"] == 1.0


def test_ranks_end_with_the_process_that_owns_the_pool(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from tests.distributed import test_pool
        from tests.distributed.nursery import nursery_pids
        from tests.distributed.pool import Pool
        folder = Path(sys.argv[1])
        pool = Pool(2, folder)
        print(*[result["pid"] for result in pool.run(test_pool.describe)], *nursery_pids(), flush=True)
        pool.run(test_pool.sleep_with_child, folder)
    """
    environment = os.environ | {"PYTHONPATH": str(IMPORT_ROOT)}
    command = [sys.executable, "-c", "\n".join(line.strip() for line in script.splitlines()), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        deadline = time.monotonic() + 120
        while not (tmp_path / "child").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        owner.send_signal(signal.SIGKILL)
    assert len(pids) == 4
    assert not wait_until_gone([*pids, int((tmp_path / "child").read_text())])
