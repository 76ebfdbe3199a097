"""Changes by dotted path, and what is read of a configuration."""

from typing import Any

import pytest

from ds_optforge.errors import ConfigError
from ds_optforge.experiments.changes import changed, described, differences, prepared, steady_start

CONFIG: dict[str, Any] = {"optimizer": {"params": {"lr": 1.0, "roles": {"scalar": {"lr": 2.0}}}}}


def test_values_are_set_by_path_and_the_original_stays() -> None:
    result = changed(CONFIG, {"optimizer.params.roles.scalar.lr": 3.0, "gradient_clipping": 1.0, "optimizer.params.new": [1]})
    assert result["optimizer"]["params"] == {"lr": 1.0, "roles": {"scalar": {"lr": 3.0}}, "new": [1]}
    assert result["gradient_clipping"] == 1.0
    assert CONFIG["optimizer"]["params"]["roles"]["scalar"]["lr"] == 2.0


def test_a_section_that_is_not_there_is_an_error() -> None:
    """Otherwise a misspelt path would make an experiment that changes nothing."""
    expected = r"optimizer.params.rolls.scalar.lr: .*no section 'optimizer.params.rolls'; did you mean 'roles'\? allowed: roles"
    with pytest.raises(ConfigError, match=expected):
        changed(CONFIG, {"optimizer.params.rolls.scalar.lr": 3.0})


def test_the_schedule_has_the_length_of_the_run() -> None:
    config = {"scheduler": {"params": {"total_num_steps": 7}}}
    assert prepared(config, 50)["scheduler"]["params"]["total_num_steps"] == 50


@pytest.mark.promise("steady-loss")
@pytest.mark.parametrize(
    ("schedule", "own", "expected"),
    [({"warmup_ratio": 0.1}, 0, 300), ({"warmup_num_steps": 20}, 0, 200), ({"name": "none"}, 90, 270), ({}, 0, 200)],
)
def test_steady_state_begins_after_three_warm_ups_and_after_200_steps(
    schedule: dict[str, Any], own: int, expected: int
) -> None:
    scheduler = {"type": "OptForgeSchedule", "params": {"total_num_steps": 1000, **schedule}}
    assert steady_start({"scheduler": scheduler, "optimizer": {"params": {"warmup_steps": own}}}) == expected


def test_differences_are_dotted_paths() -> None:
    one, other = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(one, other) == [("a.c", 2, 4), ("d", 3, None), ("e", None, 5)]


def test_changes_are_described_without_what_is_common_to_all() -> None:
    changes = {"optimizer.params.roles.embedding.lr": 0.3, "scheduler.params.warmup_ratio": 0.05}
    assert described(changes) == "embedding.lr = 0.3, warmup_ratio = 0.05"
