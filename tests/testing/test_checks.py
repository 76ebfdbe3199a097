"""The checks of `ds_optforge.testing` find what is wrong with a rule, and say where."""

import pytest

from tests.distributed.pool import Pool
from tests.testing import jobs


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Ranks of its own: their registry holds bad rules."""
    pool = Pool(2, tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


FOUND = {
    ("partial", "parity"): [
        ": relative difference ",
        "ZeRO-1: ",
        "ZeRO-2, CPU offload: ",
        "ZeRO-3: ",
        " elements differ, by up to ",
    ],
    ("spoiling", "gradients_unchanged"): ["float32, gradients of step 1: ", "embed.weight"],
    ("forgetful", "state_dict"): ["float32: ", "not the same bit for bit"],
    ("forgetful", "portable_checkpoint"): ["float32, ZeRO-2: ", "float32, ZeRO-2 to ZeRO-3: "],
    ("restless", "zero_gradient"): ["float32, after 0 steps: ", "row_second_moment: not the same bit for bit"],
    ("greedy", "state_formats_track_float32"): ["bfloat16, ZeRO-1: loss ", "allowed 0.02"],
}


@pytest.mark.parametrize(("rule", "check"), FOUND)
def test_a_defect_is_found_with_its_place_and_its_numbers(rule: str, check: str, pool: Pool) -> None:
    said, same = pool.run(jobs.finding, check, rule)
    assert said == same
    assert all(line.startswith(f"{rule}, {check}, ") for line in said.splitlines())
    for words in FOUND[rule, check]:
        assert words in said


def test_each_rank_tells_what_all_found(pool: Pool) -> None:
    """A rule without that defect passes the same check."""
    assert pool.run(jobs.finding, "gradients_unchanged", "partial") == ["", ""]
