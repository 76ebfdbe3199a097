"""``ds-optforge init --from`` a DeepSpeed configuration: every value by hand, what is refused, and what is named."""

import json
from typing import Any, ClassVar

import pytest

from tests.migrate.conftest import Init

ADAMW = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}
BESIDE = {"train_batch_size": 8, "gradient_clipping": 0.5, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def section(kind: str, **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": params}


def refused(init: Init, config: dict[str, Any], *options: str) -> str:
    return init.refused("ds.json", json.dumps(config), *options)


def params(init: Init, optimizer: dict[str, Any], *options: str, **beside: Any) -> dict[str, Any]:
    """Those of the new optimizer section."""
    return dict(init({**BESIDE, "optimizer": optimizer, **beside}, *options)["optimizer"]["params"])


class TestAdamW:
    @pytest.mark.parametrize("kind", ["AdamW", "Adam", "FusedAdam", "CPUAdam", "adamw"])
    def test_rate_and_decay_stay_for_matrices_and_the_rest(self, kind: str, init: Init) -> None:
        """Matrices keep AdamW's rate, with updates of one size; decay is times the rate, which is the same."""
        assert init({**BESIDE, "optimizer": section(kind, **ADAMW)}) == {
            **BESIDE,
            "optimizer": {
                "type": "OptForge",
                "params": {
                    "name": "muon",
                    "lr": 3e-4,
                    "weight_decay": 0.1,
                    "momentum": 0.95,
                    "orthogonalization": {"scale": "match_rms_adamw", "rms": 0.4},
                    "adamw": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-6},
                },
            },
        }

    def test_deepspeeds_defaults_stand_in_for_what_is_not_said(self, init: Init) -> None:
        found = params(init, {"type": "AdamW"})
        assert found["lr"] == found["adamw"]["lr"] == 1e-3
        assert found["adamw"]["betas"] == [0.9, 0.999]
        assert found["adamw"]["eps"] == 1e-8
        assert "weight_decay" not in found
        assert "`optimizer.params.lr` is `0.001`: from the default of DeepSpeed" in init.reasons

    def test_torch_adam_decays_where_nothing_is_said(self, init: Init) -> None:
        """torch.optim.AdamW's default, which "torch_adam" makes DeepSpeed build, is 0.01; Adam's is 0."""
        assert params(init, section("AdamW", lr=1e-3, torch_adam=True))["weight_decay"] == 0.01
        assert "weight_decay" not in params(init, section("Adam", lr=1e-3, torch_adam=True, adam_w_mode=False))

    def test_every_value_has_a_reason(self, init: Init) -> None:
        found = params(init, section("AdamW", **ADAMW), "--purpose", "finetune")
        for key in (
            "lr",
            "weight_decay",
            "momentum",
            "nesterov",
            "orthogonalization.scale",
            "adamw.lr",
            "adamw.betas",
            "adamw.eps",
        ):
            value: Any = found
            for name in key.split("."):
                value = value[name]
            assert f"`optimizer.params.{key}` is `{json.dumps(value)}`: " in init.reasons, key
        assert "`train_batch_size`, `gradient_clipping`, `bf16`, `zero_optimization`: as in" in init.reasons

    def test_fine_tuning_is_gentle_and_says_where_that_is_from(self, init: Init) -> None:
        found = params(init, section("AdamW", **ADAMW), "--purpose", "finetune")
        assert (found["momentum"], found["nesterov"], found["lr"]) == (0.9, False, 3e-4)
        assert "arXiv 2605.10468" in init.reasons
        assert "Purpose: finetune (--purpose)" in init.reasons

    def test_normuon_has_muons_values(self, init: Init) -> None:
        found = params(init, section("AdamW", **ADAMW), "--rule", "normuon")
        assert (found["name"], found["lr"], found["orthogonalization"]) == (
            "normuon",
            3e-4,
            {"scale": "match_rms_adamw", "rms": 0.4},
        )

    def test_the_rule_adamw_keeps_everything(self, init: Init) -> None:
        assert params(init, section("AdamW", **ADAMW), "--rule", "adamw") == {"name": "adamw", **ADAMW}

    @pytest.mark.parametrize("rule", ["lion", "sgd", "mun"])
    def test_a_rule_without_a_bridge_is_refused(self, rule: str, init: Init) -> None:
        said = refused(init, {"optimizer": section("AdamW")}, "--rule", rule)
        assert f"--rule: got '{rule}'" in said
        assert "allowed: muon, normuon, adamw, adamw_8bit" in said

    def test_what_cannot_be_carried_over_is_named(self, init: Init) -> None:
        given = {
            "adam_w_mode": False,
            "amsgrad": True,
            "bias_correction": False,
            "torch_adam": True,
            "fp32_optimizer_states": False,
        }
        params(init, section("Adam", **ADAMW, **given))
        for key in given:
            assert f"optimizer.params.{key}" in init.left, key
        assert "weight decay of norms and biases" in init.left


class TestAutos:
    """Of a file for the HF Trainer: rate and decay are filled where they are, and nothing else is."""

    CONFIG: ClassVar[dict[str, Any]] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "optimizer": section("AdamW", lr="auto", betas="auto", eps="auto", weight_decay="auto"),
        "scheduler": section(
            "WarmupDecayLR", warmup_min_lr="auto", warmup_max_lr="auto", warmup_num_steps="auto", total_num_steps="auto"
        ),
    }

    def test_they_stay_where_the_trainer_fills_them(self, init: Init) -> None:
        found = init(self.CONFIG)
        assert found["optimizer"]["params"] == {
            "name": "muon",
            "lr": "auto",
            "weight_decay": "auto",
            "momentum": 0.95,
            "orthogonalization": {"scale": "match_rms_adamw", "rms": 0.4},
            "adamw": {"betas": [0.9, 0.999], "eps": 1e-8},
        }
        assert found["scheduler"]["params"] == {"name": "linear", "warmup_num_steps": "auto", "total_num_steps": "auto"}
        assert {key: found[key] for key in ("gradient_clipping", "bf16", "zero_optimization")} == {
            key: self.CONFIG[key] for key in ("gradient_clipping", "bf16", "zero_optimization")
        }
        assert 'optimizer.params.betas is "auto", which nobody fills in this section: the HF Trainer\'s default' in init.reasons

    def test_the_rule_adamw_leaves_all_of_them(self, init: Init) -> None:
        found = init(self.CONFIG, "--rule", "adamw")["optimizer"]["params"]
        assert found == {"name": "adamw", "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}

    def test_a_rate_that_roles_need_must_be_a_number(self, init: Init) -> None:
        said = refused(init, {"optimizer": section("Lion", lr="auto")})
        assert 'optimizer.params.lr: got "auto", but the roles that keep Lion need its rate' in said


class TestLion:
    def test_matrices_step_as_far_and_the_rest_keeps_lion(self, init: Init) -> None:
        """An element of Lion's update is 1 or -1: a root mean square of 1."""
        found = params(init, section("Lion", lr=1e-4, betas=[0.9, 0.99], weight_decay=1.0))
        rest = {"name": "lion", "lr": 1e-4, "betas": [0.9, 0.99]}
        assert found == {
            "name": "muon",
            "lr": 1e-4,
            "weight_decay": 1.0,
            "momentum": 0.95,
            "orthogonalization": {"scale": "match_rms_adamw", "rms": 1.0},
            "adamw": {"lr": 1e-4},
            "roles": {
                "embedding": {**rest, "weight_decay": 1.0},
                "unembedding": {**rest, "weight_decay": 1.0},
                "scalar": rest,
            },
        }

    def test_the_rule_lion_keeps_everything(self, init: Init) -> None:
        given = {"lr": 1e-4, "betas": [0.9, 0.98], "weight_decay": 0.5}
        assert params(init, section("Lion", **given), "--rule", "lion") == {"name": "lion", **given}

    def test_deepspeeds_defaults(self, init: Init) -> None:
        assert params(init, {"type": "Lion"})["roles"]["embedding"] == {"name": "lion", "lr": 1e-3, "betas": [0.9, 0.999]}


class TestMuon:
    def test_both_rates_are_kept(self, init: Init) -> None:
        given = {"muon_lr": 0.02, "adam_lr": 3e-4, "momentum": 0.9, "betas": [0.8, 0.95], "eps": 1e-9, "weight_decay": 0.1}
        assert params(init, section("Muon", **given, ns_method="standard")) == {
            "name": "muon",
            "lr": 0.02,
            "weight_decay": 0.1,
            "momentum": 0.9,
            "orthogonalization": {"scale": "shape", "method": "standard"},
            "adamw": {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-9},
        }

    def test_deepspeeds_defaults(self, init: Init) -> None:
        found = params(init, {"type": "Muon"})
        assert (found["lr"], found["momentum"]) == (0.02, 0.95)
        assert found["adamw"] == {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-10}

    def test_one_rate_is_that_of_both(self, init: Init) -> None:
        found = params(init, section("Muon", lr=0.01))
        assert found["lr"] == found["adamw"]["lr"] == 0.01

    def test_what_deepspeed_ignores_or_does_otherwise_is_named(self, init: Init) -> None:
        params(init, section("Muon", lr=0.01, ns_steps=7, per_head_muon=True))
        assert "optimizer.params.ns_steps: DeepSpeed's Muon never reads it" in init.left
        assert 'optimizer.params.per_head_muon: say which projections and how many heads: "overrides"' in init.left
        assert "gradient_clipping acts on the gradient" in init.left


class TestSchedules:
    def schedule(self, init: Init, kind: str, **params: Any) -> dict[str, Any]:
        found = init({**BESIDE, "optimizer": section("AdamW", **ADAMW), "scheduler": section(kind, **params)})
        assert found["scheduler"]["type"] == "OptForgeSchedule"
        return dict(found["scheduler"]["params"])

    def test_warmup_cosine(self, init: Init) -> None:
        found = self.schedule(init, "WarmupCosineLR", total_num_steps=1000, warmup_num_steps=20, cos_min_ratio=0.1)
        assert found == {"name": "cosine", "warmup_num_steps": 20, "total_num_steps": 1000, "final_lr_fraction": 0.1}
        assert "warmup_type log (DeepSpeed's default): the warm-up is linear" in init.reasons

    def test_deepspeeds_defaults_of_warmup_cosine(self, init: Init) -> None:
        found = self.schedule(init, "WarmupCosineLR", total_num_steps=5000)
        assert found == {"name": "cosine", "warmup_num_steps": 1000, "total_num_steps": 5000, "final_lr_fraction": 0.0001}

    def test_warmup_decay(self, init: Init) -> None:
        found = self.schedule(
            init, "WarmupDecayLR", total_num_steps=1000, warmup_num_steps=20, warmup_max_lr=3e-4, warmup_type="linear"
        )
        assert found == {"name": "linear", "warmup_num_steps": 20, "total_num_steps": 1000}
        assert "warmup_type" not in init.reasons

    def test_warmup(self, init: Init) -> None:
        assert self.schedule(init, "WarmupLR", warmup_num_steps=20) == {"name": "constant", "warmup_num_steps": 20}

    @pytest.mark.parametrize(
        ("kind", "params", "rate"),
        [
            ("WarmupDecayLR", {"total_num_steps": 1000, "warmup_num_steps": 20}, 0.001),
            ("WarmupDecayLR", {"total_num_steps": 1000, "warmup_num_steps": 20, "warmup_max_lr": 2e-4}, 2e-4),
            ("WarmupLR", {"warmup_max_lr": 2e-4}, 2e-4),
            ("WarmupLR", {}, 3e-4),
        ],
    )
    def test_the_rate_is_the_one_that_the_scheduler_wrote(
        self, kind: str, params: dict[str, Any], rate: float, init: Init
    ) -> None:
        """WarmupDecayLR writes warmup_max_lr, 0.001 by default, over the optimizer's 3e-4."""
        found = init({**BESIDE, "optimizer": section("AdamW", **ADAMW), "scheduler": section(kind, **params)})
        assert found["optimizer"]["params"]["lr"] == found["optimizer"]["params"]["adamw"]["lr"] == rate

    def test_rates_that_are_named_apart_stay_apart(self, init: Init) -> None:
        found = init(
            {
                **BESIDE,
                "optimizer": section("Muon", muon_lr=0.02, adam_lr=3e-4),
                "scheduler": section("WarmupLR", warmup_max_lr=0.02),
            }
        )
        assert (found["optimizer"]["params"]["lr"], found["optimizer"]["params"]["adamw"]["lr"]) == (0.02, 3e-4)
        assert "0.02 for both halves; the rates that optimizer.params names are kept apart" in init.reasons

    def test_beginnings_above_zero_are_named(self, init: Init) -> None:
        self.schedule(init, "WarmupCosineLR", total_num_steps=5000, warmup_min_ratio=0.1)
        assert "scheduler.params.warmup_min_ratio 0.1: the warm-up begins" in init.reasons


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no optimizer": (BESIDE, "optimizer: missing; allowed:"),
    "ours already": (
        {"optimizer": section("OptForge", name="muon")},
        "optimizer.type: got 'OptForge'; it is OptForge's already",
    ),
    "another optimizer": ({"optimizer": section("Lamb")}, "optimizer.type: got 'Lamb'; allowed: AdamW, Adam, "),
    "a near miss": ({"optimizer": section("AdamWW")}, "did you mean 'AdamW'? "),
    "an unknown key": (
        {"optimizer": section("AdamW", wieght_decay=0.1)},
        "optimizer.params.wieght_decay: unknown key; did you mean 'weight_decay'? allowed: ",
    ),
    "a rate in words": ({"optimizer": section("AdamW", lr="high")}, "optimizer.params.lr: got 'high'; allowed: a number"),
    "a negative rate": ({"optimizer": section("AdamW", lr=-1)}, "optimizer.params.lr: got -1; allowed: a number of at least 0"),
    "one beta": ({"optimizer": section("AdamW", betas=[0.9])}, "optimizer.params.betas: got [0.9]; allowed: a list of two"),
    "another scheduler": (
        {"optimizer": section("AdamW"), "scheduler": section("OneCycle")},
        "scheduler.type: got 'OneCycle'; allowed: WarmupLR, WarmupDecayLR, WarmupCosineLR",
    ),
    "an unknown key of a scheduler": (
        {"optimizer": section("AdamW"), "scheduler": section("WarmupLR", warmup_steps=3)},
        "scheduler.params.warmup_steps: unknown key; did you mean 'warmup_num_steps'?",
    ),
    "a cosine without a length": (
        {"optimizer": section("AdamW"), "scheduler": section("WarmupCosineLR")},
        "scheduler.params.total_num_steps: missing; allowed: a number",
    ),
    "a typo beside": (
        {"optimizer": section("AdamW"), "zero_optimisation": {"stage": 2}},
        "zero_optimisation: DeepSpeed knows no such key; did you mean 'zero_optimization'?",
    ),
    "what OptForge cannot train with": (
        {"optimizer": section("AdamW"), "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "zero_optimization.offload_optimizer.device: got 'nvme'; allowed: 'cpu' or 'none'",
    ),
    "an auto that nobody fills": (
        {"optimizer": section("Muon", muon_lr="auto")},
        "optimizer.params.muon_lr: got 'auto'; allowed: a number (nobody fills it)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_carried_over_is_refused_by_name(case: str, init: Init) -> None:
    config, said = BAD[case]
    found = refused(init, config)
    assert said in found
    assert found.startswith("ds.json: ")
