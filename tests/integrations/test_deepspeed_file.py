"""`ds-optforge check` and `initialize` read the whole DeepSpeed file: what DeepSpeed would refuse, ignore or leave "auto"."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ds_optforge import ConfigError
from ds_optforge.cli import main
from ds_optforge.config.deepspeed import check

MUON = {"type": "OptForge", "params": {"name": "muon"}}
BASE = {"train_batch_size": 8, "optimizer": MUON}


def said(sections: dict[str, Any], filled: bool = True) -> str:
    with pytest.raises(ConfigError) as error:
        check({**BASE, **sections}, filled)
    return str(error.value)


UNKNOWN: dict[str, tuple[dict[str, Any], str, str]] = {  # the section, where the key is, what it is taken for
    "at the top": ({"gradient_cliping": 1.0}, "gradient_cliping", "gradient_clipping"),
    "of a model of pydantic": ({"zero_optimization": {"stge": 2}}, "zero_optimization.stge", "stage"),
    "by another name": (
        {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}},
        "zero_optimization.stage3_max_live_parameter",
        "stage3_max_live_parameters",
    ),
    "of a model in a model": (
        {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
        "zero_optimization.offload_optimizer.devise",
        "device",
    ),
    "of a monitor": ({"wandb": {"enabled": True, "projct": "x"}}, "wandb.projct", "project"),
    "of a dict": (
        {"activation_checkpointing": {"partition_activation": True}},
        "activation_checkpointing.partition_activation",
        "partition_activations",
    ),
    "of a dict in a dict": ({"checkpoint": {"writer": {"typ": "FAST"}}}, "checkpoint.writer.typ", "type"),
    "of the optimizer": ({"optimizer": {**MUON, "parms": {}}}, "optimizer.parms", "params"),
    "of data types": ({"data_types": {"grad_acum_dtype": "bf16"}}, "data_types.grad_acum_dtype", "grad_accum_dtype"),
    "of AutoTP": ({"tensor_parallel": {"autotp_sze": 2}}, "tensor_parallel.autotp_sze", "autotp_size"),
    "of AutoEP": ({"expert_parallel": {"enabled": True, "autoep_sze": 2}}, "expert_parallel.autoep_sze", "autoep_size"),
}


@pytest.mark.parametrize("place", UNKNOWN)
def test_an_unknown_key(place: str) -> None:
    sections, where, meant = UNKNOWN[place]
    assert said(sections) == f"{where}: DeepSpeed knows no such key; did you mean '{meant}'?"


def test_a_key_like_no_other() -> None:
    assert said({"xyz": 1}) == "xyz: DeepSpeed knows no such key; allowed: remove it"


def test_every_unknown_key_is_listed() -> None:
    assert len(said({"gradient_cliping": 1.0, "flops_profiler": {"profile_stp": 1}}).splitlines()) == 2


def rate(lr: float) -> dict[str, Any]:
    return {"optimizer": {"type": "OptForge", "params": {"name": "muon", "lr": lr}}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stage 4": ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: got 4; allowed: 0, 1, 2, 3"),
    "two precisions": ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled: got true beside bf16.enabled"),
    "a word for a number": (
        {"zero_optimization": {"reduce_bucket_size": "big"}},
        "zero_optimization.reduce_bucket_size: got 'big'; allowed: ",
    ),
    "no dtype": ({"communication_data_type": "int3"}, "communication_data_type: DeepSpeed refuses it (Invalid"),
    "a removed section": ({"elasticity": {}}, "elasticity: DeepSpeed refuses it (Elastic training has been removed"),
    "a removed setting": (
        {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
        "zero_optimization.mics_shard_size: got 2; allowed: -1 (MiCS, which OptForge has not been tested with",
    ),
    "no section": ({"fp16": True}, "fp16: got True; allowed: an object"),
    "sections that contradict each other": (
        {"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}},
        "DeepSpeed refuses the configuration: gradient_allreduce_op='sum' is not supported with ZeRO stage 3",
    ),
    "batch sizes": (
        {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
        "train_batch_size: got 8; allowed: a multiple of 6 (train_micro_batch_size_per_gpu 2 x gradient_accumulation_steps 3)",
    ),
    "half a batch": ({"train_batch_size": 8.5}, "train_batch_size: got 8.5; allowed: a whole number of at least 1"),
    "a negative rate": (rate(-0.1), "optimizer.params.lr: got -0.1"),
    "no rate": (rate(float("nan")), "optimizer.params.lr: got nan"),
    "a rate of percents": (rate(20.0), "optimizer.params.lr: got 20.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_cannot_be(case: str) -> None:
    sections, begins = REFUSED[case]
    message = said(sections)
    assert message.startswith(begins)
    assert "\n" not in message


class TestAuto:
    """A framework fills some values before DeepSpeed sees them; `initialize` has no framework before it."""

    FILLED: ClassVar[dict[str, Any]] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }

    def test_initialize_refuses_what_nobody_has_filled(self) -> None:
        lines = said(self.FILLED).splitlines()
        assert [line.partition(":")[0] for line in lines] == [
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_clipping",
            "bf16.enabled",
            "zero_optimization.reduce_bucket_size",
        ]
        assert all(line.endswith('got "auto" that no framework filled; allowed: a value') for line in lines)

    def test_check_says_what_a_framework_must_fill(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps({**BASE, **self.FILLED}))
        assert main(["check", str(file)]) == 0
        assert capsys.readouterr().out == (
            f"{file}: valid, once Accelerate or the HF Trainer has filled train_batch_size, train_micro_batch_size_per_gpu, "
            "gradient_clipping, bf16.enabled, zero_optimization.reduce_bucket_size\n"
        )

    def test_one_that_no_framework_fills(self) -> None:
        expected = 'prescale_gradients: got "auto", which neither Accelerate nor the HF Trainer fills here; allowed: a value'
        assert said({"prescale_gradients": "auto"}, filled=False) == expected

    def test_deepspeeds_own_is_fine(self) -> None:
        check({**BASE, "pipeline": {"stages": "auto"}, "data_types": {"keep_in_fp32_modules": "auto"}})


@pytest.mark.parametrize(
    "sections",
    [
        {
            "steps_per_print": 10,
            "wall_clock_breakdown": False,
            "dump_state": False,
            "log_level": "info",
            "memory_breakdown": True,
        },
        {"tensorboard": {"enabled": True, "output_path": "x", "job_name": "y"}, "csv_monitor": {"enabled": False}},
        {"activation_checkpointing": {"partition_activations": True, "number_checkpoints": 4, "cpu_checkpointing": False}},
        {"flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "detailed": True, "output_file": None}},
        {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True}},
        {"aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True}},
        {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e9, "sub_group_size": 1e9, "cpu_offload": True}},
        {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "communication_data_type": "bf16"},
        {"fp16": {"enabled": False, "loss_scale": 0}, "bfloat16": {"enabled": True}, "gradient_accumulation_steps": 2},
        {"data_efficiency": {"enabled": True, "seed": 1, "data_sampling": {"enabled": False, "num_epochs": 1}}},
        {"checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": True}, "use_node_local_storage": True}},
        {"tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 1, "seq_parallel_communication_data_type": "fp32"},
        {"autotuning": {"enabled": False, "anything": 1}},
        {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    ],
    ids=lambda sections: next(iter(sections)),
)
def test_what_deepspeed_reads_is_fine(sections: dict[str, Any]) -> None:
    check({**BASE, **sections})


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_fine(file: Path) -> None:
    assert main(["check", str(file)]) == 0
