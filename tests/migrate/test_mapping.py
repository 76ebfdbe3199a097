"""What the mapping chooses: whoever changes `RECIPES` changes nothing else."""

import pytest

from ds_optforge.migrate.mapping import RECIPES
from tests.migrate.conftest import Init

OTHER = RECIPES["pretrain"]._replace(rms=0.7, momentum=0.8, nesterov=False, lora="both")
GIVEN = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}


def test_rate_and_decay_stay_and_the_size_of_updates_is_chosen(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "pretrain", OTHER)
    params = init({"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": GIVEN}})["optimizer"]["params"]
    assert (params["lr"], params["weight_decay"]) == (3e-4, 0.1)
    assert params["adamw"] == {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-6}
    assert params["orthogonalization"] == {"scale": "match_rms_adamw", "rms": 0.7}
    assert (params["momentum"], params["nesterov"], params["lora"]) == (0.8, False, "both")


@pytest.mark.parametrize(("purpose", "rms"), [("pretrain", 0.4), ("finetune", 0.8), ("lora", 0.2)])
def test_the_size_of_updates_by_purpose(purpose: str, rms: float, init: Init) -> None:
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": GIVEN}}
    assert init(config, "--purpose", purpose)["optimizer"]["params"]["orthogonalization"]["rms"] == rms
    assert f"`optimizer.params.orthogonalization.rms` is `{rms}`" in init.reasons
