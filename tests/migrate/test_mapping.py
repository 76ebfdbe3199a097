"""The arithmetic of the mapping, for constants other than today's: whoever changes `RECIPES` changes nothing else."""

import json

import pytest

from ds_optforge.migrate.mapping import RECIPES
from tests.migrate.conftest import Init

# Matrices at four times AdamW's rate, the rest at twice: decays of a quarter and of half take the same share in every step.
OTHER = RECIPES["pretrain"]._replace(rate=4.0, rest_rate=2.0, lora="both")
GIVEN = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def other_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "pretrain", OTHER)


def test_rates_are_multiplied_and_decays_divided(init: Init) -> None:
    params = init({"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": GIVEN}})["optimizer"]["params"]
    assert (params["lr"], params["weight_decay"]) == (1.2e-3, 0.025)
    assert params["adamw"] == {"lr": 6e-4, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.05}
    assert "`optimizer.params.weight_decay` is `0.025`: from optimizer.params.weight_decay, divided by 4" in init.reasons
    assert "`optimizer.params.lr` is `0.0012`: from optimizer.params.lr, 4 times as large" in init.reasons


def test_the_users_file_says_what_the_trainer_fills_in(init: Init) -> None:
    """A number in DeepSpeed's file would have to equal the Trainer's."""
    found = init.text("args.yaml", "output_dir: x\nlearning_rate: 3e-4\nweight_decay: 0.1\n")
    params = found["optimizer"]["params"]
    assert (params["lr"], params["weight_decay"]) == ("auto", "auto")
    assert (params["adamw"]["lr"], params["adamw"]["weight_decay"]) == (6e-4, 0.05)
    assert "```\ndeepspeed: new.json\nlearning_rate: 0.0012\nweight_decay: 0.025\n```" in init.to_do


def test_an_auto_that_would_have_to_be_multiplied_is_refused(init: Init) -> None:
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    assert 'optimizer.params.lr: got "auto", of which lr is 4 times' in init.refused("ds.json", json.dumps(config))
