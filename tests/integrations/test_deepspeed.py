"""The doors into DeepSpeed, as far as no engine is needed: reading and checking a configuration, registering a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optforge
from ds_optforge import ConfigError
from ds_optforge.config.deepspeed import check, load_config

MUON = {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}}


def config(params: Any = MUON, **sections: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "OptForge", "params": params}, **sections}


def refused(loaded: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        check(loaded)
    return str(error.value)


class TestLoadConfig:
    def test_a_file_by_path_or_name(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config()))
        assert load_config(path) == load_config(str(path)) == config()

    def test_a_dict_is_taken_as_it_is_and_not_written_to(self) -> None:
        given = config()
        loaded = load_config(given)
        loaded["new"] = 1
        assert given == config()

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.json: No such file or directory; allowed: a DeepSpeed configuration"):
            load_config(tmp_path / "none.json")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="Is a directory; allowed: a DeepSpeed configuration"):
            load_config(tmp_path)

    @pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"{'name': 1}"], ids=["cut", "empty", "binary", "Python"])
    def test_a_file_that_is_not_json(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json: not JSON \(.*\); allowed: a DeepSpeed configuration"):
            load_config(path)

    @pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("3", "int"), ('"x"', "str"), ("null", "NoneType")])
    def test_json_that_is_no_object(self, content: str, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text(content)
        with pytest.raises(ConfigError, match=rf"config\.json: got a {kind}; allowed: a JSON object"):
            load_config(path)


REFUSED = {
    "no optimizer": ({}, "optimizer: missing; allowed: "),
    "optimizer no object": ({"optimizer": "OptForge"}, "optimizer: got 'OptForge'; allowed: an object"),
    "optimizer without type": ({"optimizer": {"params": MUON}}, "optimizer.type: got None; allowed: 'OptForge'"),
    "optimizer of DeepSpeed": ({"optimizer": {"type": "Muon"}}, "optimizer.type: got 'Muon'; allowed: 'OptForge'"),
    "params no object": (config(params=[1]), "optimizer.params: got [1]; allowed: an object"),
    "no params": ({"optimizer": {"type": "OptForge"}}, "optimizer.params.name: missing"),
    "bad params": (config({"name": "muon", "lr": -1}), "optimizer.params.lr: got -1"),
    "leftover auto": (config({"name": "muon", "lr": "auto"}), 'optimizer.params.lr: got "auto"'),
    "scheduler no object": (config(scheduler="OptForgeSchedule"), "scheduler: got 'OptForgeSchedule'; allowed: an object"),
    "scheduler without type": (config(scheduler={"params": {}}), "scheduler.type: got None; allowed: "),
    "bad schedule": (
        config(scheduler={"type": "OptForgeSchedule", "params": {"name": "linear"}}),
        "scheduler.params.total_num_steps: missing",
    ),
    "nvme": (
        config(zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme"}}),
        "zero_optimization.offload_optimizer.device: got 'nvme'; allowed: 'cpu' or 'none'",
    ),
    "ratio": (
        config(zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
        "zero_optimization.offload_optimizer.ratio: got 0.5; allowed: 1.0",
    ),
    "super_offload": (
        config(zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}),
        "zero_optimization.offload_optimizer.super_offload: got true; allowed: false",
    ),
    "zenflow": (
        config(zero_optimization={"stage": 2, "zenflow": {"topk_ratio": 0.1}}),
        "zero_optimization.zenflow: got a section; allowed: none",
    ),
    "elastic_checkpoint": (
        config(zero_optimization={"stage": 1, "elastic_checkpoint": True}),
        "zero_optimization.elastic_checkpoint: got true; allowed: false",
    ),
    "load_universal": (config(checkpoint={"load_universal": True}), "checkpoint.load_universal: got true; allowed: false"),
    "offload no object": (config(zero_optimization={"offload_optimizer": "cpu"}), "zero_optimization.offload_optimizer: got"),
    "ratio no number": (
        config(zero_optimization={"offload_optimizer": {"device": "cpu", "ratio": "half"}}),
        "zero_optimization.offload_optimizer.ratio: got 'half'",
    ),
    "checkpoint no object": (config(checkpoint=True), "checkpoint: got True"),
}


class TestCheck:
    @pytest.mark.promise("validated-fields")
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_is_refused(self, case: str) -> None:
        loaded, said = REFUSED[case]
        message = refused(loaded)
        assert message.startswith(said)
        assert message.count("\n") == 0

    @pytest.mark.parametrize(
        "sections",
        [
            {},
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}},
            {"zero_optimization": {"stage": 2, "offload_optimizer": None}},
            {"checkpoint": {"load_universal": False}},
            {"scheduler": {"type": "OptForgeSchedule", "params": {"name": "constant", "warmup_num_steps": 10}}},
            {"scheduler": {"type": "OptForgeSchedule"}},
        ],
    )
    def test_what_is_fine(self, sections: dict[str, Any]) -> None:
        check(config(**sections))

    def test_every_refused_feature_is_listed(self) -> None:
        offload = {"device": "nvme", "ratio": 0.5}
        zero = {"offload_optimizer": offload, "zenflow": {"topk_ratio": 0.1}}
        lines = refused(config(zero_optimization=zero)).splitlines()
        assert [line.split(":")[0].split(".")[-1] for line in lines] == ["device", "ratio", "zenflow"]

    @pytest.mark.promise("adamw-beside-curve")
    @pytest.mark.parametrize(
        ("kind", "params", "key"),
        [
            ("WarmupLR", {"warmup_max_lr": 0.02}, "warmup_max_lr"),
            ("WarmupLR", {"warmup_max_lr": "auto"}, "warmup_max_lr"),
            ("WarmupLR", {"warmup_min_lr": 1e-4, "warmup_max_lr": [0.02, 0.001]}, "warmup_min_lr"),
            ("WarmupDecayLR", {"total_num_steps": 100}, "warmup_max_lr"),
            ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 0.02}, "cycle_min_lr"),
            ("LRRangeTest", {}, "lr_range_test_min_lr"),
            ("OneCycleLR", {"max_lr": 0.02, "total_steps": 100}, "max_lr"),
            ("CyclicLR", {"base_lr": [0.02, 0.001], "max_lr": 0.02}, "max_lr"),
        ],
    )
    def test_a_scheduler_that_flattens_different_rates(self, kind: str, params: dict[str, Any], key: str) -> None:
        message = refused(config(scheduler={"type": kind, "params": params}))
        assert message.startswith(f"scheduler.params.{key}: got ")
        assert f"which '{kind}' writes into every group" in message
        assert "'OptForgeSchedule'" in message

    @pytest.mark.parametrize(
        ("kind", "params"),
        [
            ("WarmupLR", {}),
            ("WarmupLR", {"warmup_min_lr": "auto", "warmup_max_lr": [0.02, 0.001]}),
            ("WarmupDecayLR", {"total_num_steps": 100, "warmup_max_lr": [0.02, 0.001]}),
            ("WarmupCosineLR", {"total_num_steps": 100}),
            ("OneCycle", {"cycle_min_lr": [2e-3, 1e-4], "cycle_max_lr": [0.02, 0.001]}),
            ("LambdaLR", {}),
        ],
    )
    def test_a_scheduler_that_keeps_ratios_is_accepted(self, kind: str, params: dict[str, Any]) -> None:
        check(config(scheduler={"type": kind, "params": params}))

    @pytest.mark.parametrize(
        "params",
        [
            {"name": "adamw", "lr": 0.001, "overrides": [{"match": "norm", "lr": 0.01}]},
            {"name": "adamw", "lr": 0.001, "roles": {"embedding": {"lr": 0.01}}},
            {"name": "muon", "lr": 0.01, "adamw": {"lr": 0.001}, "roles": {r: {"lr": 0.01} for r in ("embedding", "scalar")}},
        ],
        ids=["by name", "by role", "of the head"],
    )
    def test_rates_may_differ_in_other_ways(self, params: dict[str, Any]) -> None:
        assert "warmup_max_lr" in refused(config(params, scheduler={"type": "WarmupDecayLR", "params": {}}))

    def test_a_rate_that_only_thin_matrices_have(self) -> None:
        """All roles run at 0.01, but a matrix beyond max_aspect_ratio falls back to adamw.lr."""
        roles = {role: {"lr": 0.01} for role in ("embedding", "unembedding", "scalar")}
        params = {"name": "muon", "lr": 0.01, "adamw": {"lr": 0.001}, "roles": roles}
        assert "warmup_max_lr" in refused(config(params, scheduler={"type": "WarmupDecayLR", "params": {}}))

    @pytest.mark.parametrize(
        "params",
        [{"name": "adamw", "lr": 0.001}, {"name": "muon", "lr": 0.01, "adamw": {"lr": 0.01}}],
        ids=["adamw alone", "one rate for both"],
    )
    def test_one_rate_may_be_scheduled_by_anything(self, params: dict[str, Any]) -> None:
        check(config(params, scheduler={"type": "WarmupDecayLR", "params": {}}))


class TestRegister:
    @pytest.mark.promise("client-optimizer")
    def test_the_names_are_found_where_deepspeed_looks(self) -> None:
        """Importing the package is enough for the names, so that the missing line can be named."""
        assert torch.optim.OptForge is ds_optforge.OptForge
        assert torch.optim.lr_scheduler.OptForgeSchedule is ds_optforge.OptForgeSchedule

    @pytest.mark.promise("client-optimizer")
    def test_deepspeed_knows_them_once_however_often_a_model_is_registered(self) -> None:
        from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        for _ in range(2):
            ds_optforge.register(nn.Linear(4, 4))
        assert ZERO_SUPPORTED_OPTIMIZERS.count(ds_optforge.OptForge) == 1
        assert VALID_LR_SCHEDULES.count("OptForgeSchedule") == 1

    def test_parameters_carry_their_names_and_nothing_that_deepspeeds_muon_looks_for(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        ds_optforge.register(model)
        assert [parameter.optforge_name for parameter in model.parameters()] == ["0.weight", "0.bias"]
        assert not any(hasattr(parameter, "use_muon") for parameter in model.parameters())

    def test_initialize_refuses_a_bad_configuration_before_anything_else(self) -> None:
        """No process group, no engine, no tags."""
        model = nn.Linear(4, 4)
        with pytest.raises(ConfigError, match=r"^optimizer\.params\.name: got 'adagrad'"):
            ds_optforge.initialize(model=model, config=config({"name": "adagrad"}))
        assert not torch.distributed.is_initialized()
        assert not hasattr(model.weight, "optforge_name")


class TestOptimizerObject:
    """What `initialize` says about an optimizer object, before any engine exists."""

    def refused(self, config: dict[str, Any], **arguments: Any) -> str:
        with pytest.raises(ConfigError) as error:
            ds_optforge.initialize(model=arguments.pop("model", nn.Linear(4, 4)), config=config, **arguments)
        return str(error.value)

    def test_a_section_beside_it(self) -> None:
        model = nn.Linear(4, 4)
        message = self.refused(config(), model=model, optimizer=ds_optforge.build_optimizer(model, MUON))
        assert message == (
            'optimizer: got a "optimizer" section in the configuration and the argument optimizer; allowed: one of them '
            "(remove the section to train with the object, or the argument to train with the section)"
        )

    def test_a_scheduler_section_beside_a_scheduler(self) -> None:
        model = nn.Linear(4, 4)
        optimizer = ds_optforge.build_optimizer(model, MUON)
        schedule = {"type": "OptForgeSchedule", "params": {"name": "constant"}}
        scheduler = ds_optforge.build_scheduler(optimizer, {"name": "constant"})
        message = self.refused({"scheduler": schedule}, model=model, optimizer=optimizer, lr_scheduler=scheduler)
        assert message.startswith('scheduler: got a "scheduler" section in the configuration and the argument lr_scheduler;')

    def test_one_of_another_class(self) -> None:
        model = nn.Linear(4, 4)
        message = self.refused({}, model=model, optimizer=torch.optim.AdamW(model.parameters()))
        assert message == "optimizer: got an object of AdamW; allowed: an OptForge (build_optimizer, MuonWithAuxAdam)"

    def test_neither_object_nor_section(self) -> None:
        assert self.refused({"train_batch_size": 8}).startswith("optimizer: missing; allowed: ")

    @pytest.mark.promise("adamw-beside-curve")
    def test_a_scheduler_that_flattens_its_rates(self) -> None:
        model = nn.Linear(4, 4)
        scheduler = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02}}}
        message = self.refused(scheduler, model=model, optimizer=ds_optforge.build_optimizer(model, MUON))
        assert message.startswith("scheduler.params.warmup_max_lr: got 0.02, which 'WarmupLR' writes into every group")

    def test_a_zero_feature_that_hides_its_slices(self) -> None:
        model = nn.Linear(4, 4)
        zero = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
        message = self.refused(zero, model=model, optimizer=ds_optforge.build_optimizer(model, MUON))
        assert message.startswith("zero_optimization.offload_optimizer.device: got 'nvme'")
