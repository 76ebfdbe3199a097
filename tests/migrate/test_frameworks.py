"""``ds-optforge init --from`` a framework's file: the DeepSpeed file that it gets, and the lines to change in its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.migrate.conftest import FILES, Init

DS_Z3 = json.loads((FILES / "configs" / "ds_z3.json").read_text())
GENTLE = {"momentum": 0.9, "nesterov": False, "orthogonalization": {"scale": "match_rms_adamw", "rms": 0.8}}
OURS = {"momentum": 0.95, "orthogonalization": {"scale": "match_rms_adamw", "rms": 0.4}}
FILLED = {"warmup_num_steps": "auto", "total_num_steps": "auto"}


def sections(optimizer: dict[str, Any], schedule: dict[str, Any] | None) -> dict[str, Any]:
    written: dict[str, Any] = {"optimizer": {"type": "OptForge", "params": optimizer}}
    return written if schedule is None else {**written, "scheduler": {"type": "OptForgeSchedule", "params": schedule}}


class TestLlamaFactory:
    def test_a_full_fine_tuning(self, init: Init) -> None:
        """YAML reads its 1e-5 as a string. The rate, the decay (none) and the warm-up stay in its own file."""
        assert init.given("llama_factory.yaml") == {
            **DS_Z3,
            **sections(
                {"name": "muon", "lr": "auto", **GENTLE, "adamw": {"betas": [0.9, 0.999], "eps": 1e-8}},
                {"name": "cosine", **FILLED},
            ),
        }
        assert "Purpose: finetune (the file says so)." in init.reasons
        assert "the Trainer fills in learning_rate, 1e-05: from learning_rate" in init.reasons
        assert "In llama_factory.yaml:\n\n```\ndeepspeed: new.json\n```" in init.to_do
        assert "run_exp(callbacks=[Register()])" in init.to_do

    @pytest.mark.parametrize(
        ("line", "purpose"),
        [
            ("finetuning_type: lora", "lora"),
            ("finetuning_type: freeze", "finetune"),
            ("stage: pt\ntrain_from_scratch: true\nfinetuning_type: full", "pretrain"),
        ],
    )
    def test_the_purpose_is_what_it_trains(self, line: str, purpose: str, init: Init) -> None:
        found = init.text("train.yaml", f"model_name_or_path: gpt2\ntemplate: default\n{line}\n")
        assert f"Purpose: {purpose} (the file says so)." in init.reasons
        assert found["optimizer"]["params"].get("lora") == ("both" if purpose == "lora" else None)

    def test_another_optimizer_of_its_own_is_switched_off(self, init: Init) -> None:
        init.text("train.yaml", "model_name_or_path: gpt2\nfinetuning_type: full\nuse_galore: true\n")
        assert "(remove use_galore)" in init.to_do
        assert "use_galore: OptForge takes the place of that optimizer" in init.left


class TestAxolotl:
    def test_a_fine_tuning(self, init: Init) -> None:
        params = {"name": "muon", "lr": "auto", "weight_decay": "auto", **GENTLE, "adamw": {"betas": [0.9, 0.95], "eps": 1e-5}}
        expected = sections(params, {"name": "cosine", **FILLED, "final_lr_fraction": 0.1})
        assert init.given("axolotl.yaml") == {**DS_Z3, **expected}
        lines = 'deepspeed: new.json\nplugins: ["axolotl.integrations.liger.LigerPlugin", "optforge_plugin.Register"]'
        assert f"In axolotl.yaml:\n\n```\n{lines}\n```" in init.to_do
        assert "def post_model_load(self, cfg, model):" in init.to_do

    def test_its_own_cosines_stay_its_own(self, init: Init) -> None:
        given = "base_model: gpt2\nmicro_batch_size: 1\nlearning_rate: 1e-4\nlr_quadratic_warmup: true\n"
        assert "scheduler" not in init.text("train.yaml", given)
        assert "lr_quadratic_warmup: no curve of OptForgeSchedule; Axolotl goes on building it" in init.reasons

    def test_an_adapter_is_lora_and_groups_are_named(self, init: Init) -> None:
        init.text("train.yaml", "base_model: gpt2\nsequence_len: 8\nadapter: qlora\nembedding_lr: 1e-5\n")
        assert "Purpose: lora (the file says so)." in init.reasons
        assert "embedding_lr: a rate of its own for some parameters" in init.left

    def test_a_scheduler_that_writes_one_rate_is_refused(self, init: Init) -> None:
        said = init.refused("train.yaml", "base_model: gpt2\nsequence_len: 8\nlr_scheduler: one_cycle\n")
        assert said.startswith("train.yaml: lr_scheduler: got 'one_cycle'; allowed: linear, cosine, ")


class TestTrainingArguments:
    def test_with_the_deepspeed_file_that_it_names(self, init: Init) -> None:
        """Betas and eps are the arguments', since nobody fills them in an adamw section."""
        given = json.loads((FILES / "configs" / "ds_adamw_auto.json").read_text())
        params = {"name": "muon", "lr": "auto", "weight_decay": "auto", **OURS, "adamw": {"betas": [0.9, 0.95], "eps": 1e-8}}
        assert init.given("training_arguments.yaml") == {**given, **sections(params, {"name": "linear", **FILLED})}
        assert "In training_arguments.yaml:\n\n```\ndeepspeed: new.json\n```" in init.to_do
        assert "`ds_optforge.register(model)`" in init.to_do

    def test_without_one(self, init: Init) -> None:
        """Its schedule ends at 6e-5 of 6e-4."""
        params = {"name": "muon", "lr": "auto", "weight_decay": "auto", **OURS, "adamw": {"betas": [0.9, 0.95], "eps": 1e-8}}
        assert init.given("training_arguments.json") == {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "zero_optimization": {"stage": 2},
            **sections(params, {"name": "cosine", **FILLED, "final_lr_fraction": 0.1}),
        }
        assert "`zero_optimization.stage` is `2`: your file names no DeepSpeed configuration" in init.reasons

    def test_lion(self, init: Init) -> None:
        """Rate and decay stay in the own file, since the matrices keep both."""
        found = init.text("args.yaml", "output_dir: x\noptim: lion_32bit\nlearning_rate: 1e-4\nweight_decay: 1.0\n")
        params = found["optimizer"]["params"]
        assert (params["lr"], params["weight_decay"], params["roles"]["embedding"]["lr"]) == ("auto", "auto", 1e-4)
        assert "```\ndeepspeed: new.json\n```" in init.to_do

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            ("", {"name": "linear", **FILLED}),
            ("lr_scheduler_type: constant", {"name": "constant"}),
            ("lr_scheduler_type: constant_with_warmup", {"name": "constant", "warmup_num_steps": "auto"}),
            (
                "lr_scheduler_type: cosine_warmup_with_min_lr\nlr_scheduler_kwargs: '{\"min_lr_rate\": 0.2}'",
                {"name": "cosine", **FILLED, "final_lr_fraction": 0.2},
            ),
            (
                "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 50, decay_type: linear}",
                {"name": "wsd", **FILLED, "cooldown_num_steps": 50, "cooldown_shape": "linear"},
            ),
            ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0}", {"name": "cosine", **FILLED}),
            ("lr_scheduler_type: polynomial", None),
            ("lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}", None),
        ],
    )
    def test_schedules(self, lines: str, expected: dict[str, Any] | None, init: Init) -> None:
        """What OptForgeSchedule has no curve for, the Trainer goes on building."""
        found = init.text("args.yaml", f"output_dir: x\nlearning_rate: 1e-4\n{lines}\n")
        assert found.get("scheduler", {}).get("params") == expected
        assert ("the Trainer goes on building it" in init.reasons) == (expected is None)

    def test_zero_takes_the_place_of_fsdp(self, init: Init) -> None:
        init.text("args.yaml", "output_dir: x\nfsdp: full_shard\n")
        assert "(remove fsdp)" in init.to_do
        assert "fsdp: ZeRO shards in its place" in init.left

    def test_every_schedule_of_transformers_is_known_or_refused(self, init: Init) -> None:
        """Those that are no curve of the step alone cannot be kept beside an optimizer that DeepSpeed builds."""
        transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
        said = init.refused("args.yaml", "output_dir: x\nlr_scheduler_type: none\n")
        names = {kind.value for kind in transformers.SchedulerType}
        assert names - set(said.partition("allowed: ")[2].strip().split(", ")) <= {"reduce_lr_on_plateau", "greedy"}

    def test_8_bit_state_stays(self, init: Init) -> None:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra '8bit')")
        found = init.text("args.yaml", "output_dir: x\noptim: adamw_bnb_8bit\n")
        assert found["optimizer"]["params"]["state_dtype"] == "8bit"

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            ("learnig_rate: 1", "learnig_rate: unknown key; did you mean 'learning_rate'?"),
            ("learning_rate: fast", "learning_rate: got 'fast'; allowed: a number of at least 0"),
            ("optim: adamw_torhc", "optim: got 'adamw_torhc'; did you mean 'adamw_torch'? allowed: adamw_torch, "),
            ("optim: adafactor", "optim: got 'adafactor'; allowed: adamw_torch, "),
            ("lr_scheduler_type: cosin", "lr_scheduler_type: got 'cosin'; did you mean 'cosine'? allowed: "),
            ("lr_scheduler_type: reduce_lr_on_plateau", "lr_scheduler_type: got 'reduce_lr_on_plateau'; allowed: linear, "),
            ("lr_scheduler_kwargs: '{'", "lr_scheduler_kwargs: got '{'; allowed: an object"),
            ("lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_kwargs: got None; allowed: min_lr or min_lr_rate in it"),
            ("lr_scheduler_type: warmup_stable_decay", "lr_scheduler_kwargs: got None; allowed: num_decay_steps in it"),
            ("deepspeed: none.json", "names 'none.json', which is neither in the current folder nor beside it"),
        ],
    )
    def test_bad_values_are_named(self, lines: str, said: str, init: Init) -> None:
        found = init.refused("args.yaml", f"output_dir: x\n{lines}\n")
        assert found.startswith(f"args.yaml: {said}")


class TestAccelerate:
    def test_values_of_the_plugin_become_a_file(self, init: Init) -> None:
        """The optimizer is the script's: `prepare` fills rate and decay from DummyOptim. Mixed precision may not stay."""
        params = {"name": "muon", "lr": "auto", "weight_decay": "auto", **OURS, "adamw": {"betas": [0.9, 0.999], "eps": 1e-8}}
        assert init.given("accelerate_inline.yaml") == {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 1.0,
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu"},
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "bf16": {"enabled": True},
            **sections(params, None),
        }
        assert "parameter groups of your script's optimizer" in init.left
        assert "remove mixed_precision, which is in new.json now" in init.to_do
        lines = ("deepspeed_config_file: new.json", "deepspeed_multinode_launcher: standard", "zero3_init_flag: true")
        assert "```yaml\ndeepspeed_config:\n  " + "\n  ".join(lines) + "\n```" in init.to_do
        assert "DummyOptim(list(model.parameters()), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)" in init.to_do

    def test_the_file_that_it_names_is_carried_over(self, init: Init) -> None:
        given = json.loads((FILES / "ds_adamw.json").read_text())
        params = {"name": "muon", "lr": 3e-4, "weight_decay": 0.1, **OURS}
        params["adamw"] = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8}
        schedule = {"name": "cosine", "warmup_num_steps": 200, "total_num_steps": 10000, "final_lr_fraction": 0.1}
        assert init.given("accelerate_file.yaml") == {**given, **sections(params, schedule)}

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            ("distributed_type: FSDP", "distributed_type: got 'FSDP'; allowed: DEEPSPEED"),
            ("deepspeed_config: {zero_stag: 3}", "deepspeed_config.zero_stag: unknown key; did you mean 'zero_stage'?"),
            ("deepspeed_config: {zero_stage: 4}", "deepspeed_config.zero_stage: got 4; allowed: 0, 1, 2, 3"),
            ("deepspeed_config: 3", "deepspeed_config: got 3; allowed: an object"),
        ],
    )
    def test_bad_values_are_named(self, lines: str, said: str, init: Init) -> None:
        found = init.refused("launch.yaml", f"num_processes: 2\ncompute_environment: LOCAL_MACHINE\n{lines}\n")
        assert found.startswith(f"launch.yaml: {said}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", "{", "not JSON ("),
        ("x.json", "[1]", "got a list; allowed: an object"),
        ("x.yaml", "a: [", "not YAML ("),
        ("x.yaml", "only words", "got a str; allowed: an object"),
        ("x.yaml", "colour: red", "got an object with the keys colour; allowed, by a key of theirs: the YAML of accelerate"),
    ],
)
def test_a_file_of_no_kind(name: str, content: str, said: str, init: Init) -> None:
    assert init.refused(name, content).startswith(f"{name}: {said}")


def test_every_kind_of_file_has_an_example() -> None:
    from ds_optforge.migrate.kinds import KINDS

    names = {path.name.split(".")[0].split("_")[0] for path in Path(FILES).iterdir() if path.is_file()}
    assert names == {"accelerate", "axolotl", "llama", "ds", "training"}
    assert len(KINDS) == len(names)
