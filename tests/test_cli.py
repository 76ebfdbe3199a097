"""The ``ds-optforge`` command: what it prints and how it exits."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

import ds_optforge
from ds_optforge.cli import main
from tests.oracles import table_rows

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.json"))
RULES = {"adamw_zero2.json": "adamw", "muon_zero1.json": "muon", "muon_zero2.json": "muon", "muon_zero3.json": "muon"}
MUON = {"type": "OptForge", "params": {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}}}


def write(folder: Path, config: Any) -> str:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


@pytest.mark.promise("one-config")
@pytest.mark.parametrize("name", SHIPPED)
def test_check_accepts_the_shipped_configurations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["check", str(CONFIGS / name)])
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out == f"{CONFIGS / name}: valid\n"
    assert status == 0


@pytest.mark.parametrize("name", RULES)
def test_explain_prints_the_routing_of_the_shipped_configurations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--config", str(CONFIGS / name), "--model", "gpt2"]) == 0
    rows = table_rows(capsys.readouterr().out)
    assert rows["layers.0-11.mlp.up.weight"][1:3] == ["matrix", RULES[name]]
    assert rows["token_embedding.weight"][1:3] == ["embedding", "adamw"]
    assert rows["layers.0-11.mlp_norm.weight"][1:3] == ["scalar", "adamw"]


def test_explain_and_plan_mean_the_same_model(capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 as published has 124.4 million parameters."""
    main(["explain", "--config", str(CONFIGS / "adamw_zero2.json"), "--model", "gpt2"])
    assert "adamw: 124,439,808 params" in capsys.readouterr().out
    main(["plan", "gpt2", "--world-size", "8", "--stage", "2"])
    assert "124,439,808 parameters" in capsys.readouterr().out


def test_explain_refuses_an_unknown_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--config", str(CONFIGS / "muon_zero2.json"), "--model", "huge"]) == 2
    assert "model: got 'huge'; allowed: gpt2" in capsys.readouterr().err


@pytest.mark.promise("muon-counts")
def test_explain_counts_parameters_by_rule(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a width of 768, 12 layers of 4 projections and 2 in the MLP of four times that are Muon's."""
    main(["explain", "--config", str(CONFIGS / "muon_zero2.json"), "--model", "gpt2"])
    assert f"muon: {12 * 12 * 768 * 768:,} params" in capsys.readouterr().out


class TestExplain:
    """What each weight gets is tested in test_families.py."""

    MUON = str(CONFIGS / "muon_zero2.json")

    def printed(self, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
        assert main(["explain", *arguments]) == 0
        return capsys.readouterr().out

    def test_what_is_alike_in_all_layers_has_one_row(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A 70B model on a screen: an embedding, seven matrices and two norms of a layer, the last norm and the head."""
        printed = self.printed("--config", self.MUON, "--model", "llama3-70b", capsys=capsys)
        rows = table_rows(printed)
        assert len(rows) == 12
        assert rows["layers.0-79.attention.k.weight"][0] == "1024x8192 (80 of them)"
        assert len(printed.splitlines()) < 20

    def test_full_has_a_row_for_each_parameter(self, capsys: pytest.CaptureFixture[str]) -> None:
        rows = table_rows(self.printed("--config", self.MUON, "--model", "llama3-70b", "--full", capsys=capsys))
        assert len(rows) == 80 * 9 + 3
        assert rows["layers.79.attention.k.weight"][0] == "1024x8192"

    def test_scale_and_reason(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The up projection of Llama 3 8B has 3.5 outputs for each input."""
        rows = table_rows(self.printed("--config", self.MUON, "--model", "llama3-8b", capsys=capsys))
        assert rows["layers.0-31.mlp.up.weight"][7:] == [f"{math.sqrt(3.5):.3g}", "hidden linear map"]
        assert rows["lm_head.weight"][7:] == ["-", "output: its name is 'lm_head'"]

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = json.loads(self.printed("--config", self.MUON, "--model", "gpt2", "--json", capsys=capsys))
        assert found["warnings"] == []
        numel = sum(row["count"] * math.prod(row["shape"]) for row in found["parameters"])
        assert numel == 124_439_808
        (row,) = (row for row in found["parameters"] if row["parameters"] == "layers.0-11.mlp.down.weight")
        assert (row["rule"], row["matrices"], row["scale"], row["why"]) == ("muon", [[768, 3072]], 1.0, "hidden linear map")

    def test_a_folder_with_a_config_of_hugging_face_and_what_could_be_cut(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        transformers.Phi3Config(**sizes, architectures=["Phi3ForSequenceClassification"], pad_token_id=0).save_pretrained(
            tmp_path
        )
        printed = self.printed("--config", self.MUON, "--model", str(tmp_path), capsys=capsys)
        assert table_rows(printed)["score.weight"][1] == "unembedding"
        assert 'could be cut: model.layers.0-1.self_attn.qkv_proj.weight: q, k, v, which "split": "auto" cuts' in printed

    def test_the_warnings_that_building_gives(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(tmp_path, {"optimizer": {"type": "OptForge", "params": {"name": "muon"}}})
        assert "warning: adamw.lr is not set" in self.printed("--config", path, capsys=capsys)

    def test_a_name_that_is_nearly_right(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", "--config", self.MUON, "--model", "llama3-8B"]) == 2
        assert "got 'llama3-8B' (did you mean 'llama3-8b'?)" in capsys.readouterr().err


class TestPlan:
    """What the figures mean is tested in test_planning.py."""

    def printed(self, arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
        assert main(["plan", *arguments.split()]) == 0
        return capsys.readouterr().out

    def test_a_shipped_model_rank_by_rank(self, capsys: pytest.CaptureFixture[str]) -> None:
        """12 layers of qkv, out, up and down."""
        printed = self.printed("gpt2 --world-size 8 --stage 3", capsys)
        assert "48 matrices with 84,934,656 of 124,439,808 parameters" in printed
        rows = table_rows(printed)
        assert [rows[str(rank)][0] for rank in range(8)] == ["6"] * 8
        sent = sum(float(rows[str(rank)][2]) for rank in range(8))
        assert sent == pytest.approx(2 * 2 * 84_934_656 * 7 / 8 / 1e6, abs=8 * 0.05 + 0.01)
        assert "FLOPs max/mean 1.036; critical path over ideal 1.036" in printed
        assert {"gather", "gather every 2", "gather every 5", "gather every 10", "shard_local"} <= rows.keys()
        assert [rows[mode][-1] for mode in rows].count("best") == 1
        assert "rows per shard (shard_local): 96 to 384" in printed

    def test_many_ranks_are_summed_up_and_too_many_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        printed = " ".join(self.printed("gpt2 --world-size 256 --stage 2", capsys).split())
        rows = table_rows(self.printed("gpt2 --world-size 256 --stage 2", capsys))
        assert {"min", "mean", "max"} <= rows.keys()
        assert "256" not in rows
        assert "256 ranks, 48 matrices: at least 208 ranks orthogonalize nothing." in printed
        assert "Recommended on ZeRO-2: " in printed

    def gather(self, arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
        """Of the only stage: seconds of gather, and its share over AdamW."""
        (stage,) = json.loads(self.printed(f"{arguments} --json", capsys))["stages"]
        (found,) = [each for each in stage["candidates"] if each["name"] == "gather"]
        return {**found["seconds"], "over_adamw": found["over_adamw"]}

    def test_the_link_sets_the_seconds_of_traffic(self, capsys: pytest.CaptureFixture[str]) -> None:
        slow, fast = (self.gather(f"gpt2 --world-size 8 --stage 3 --link-gbps {gbps}", capsys) for gbps in (1, 10))
        assert slow["traffic"] == pytest.approx(10 * fast["traffic"])
        assert slow["orthogonalization"] == fast["orthogonalization"]

    def test_the_overhead_is_smaller_the_more_tokens_a_step_has(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What a step costs beyond AdamW does not depend on them; both names of the option are the same."""
        few = self.gather("llama3-8b --world-size 8 --stage 2 --tokens-per-step 500000", capsys)
        many = self.gather("llama3-8b --world-size 8 --stage 2 --batch-tokens 5000000", capsys)
        assert many["optimizer"] == few["optimizer"]
        assert many["model"] == pytest.approx(10 * few["model"])
        assert many["over_adamw"] == pytest.approx(few["over_adamw"] / 10, rel=0.02)

    def test_the_device_sets_the_seconds_of_products(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Peaks of dense bfloat16 products by the datasheets."""
        a100, b200 = (self.gather(f"gpt2 --world-size 8 --stage 3 --device {name}", capsys) for name in ("a100", "b200"))
        assert a100["orthogonalization"] / b200["orthogonalization"] == pytest.approx(2250 / 312)
        given = self.gather("gpt2 --world-size 8 --stage 3 --device a100 --tflops 312", capsys)
        assert given["orthogonalization"] == pytest.approx(a100["orthogonalization"] / 2)

    def test_without_a_stage_all_are_compared(self, capsys: pytest.CaptureFixture[str]) -> None:
        printed = self.printed("llama3-8b --world-size 8", capsys)
        rows = table_rows(printed)
        assert {
            f"ZeRO-{stage}, {name}" for stage in (1, 2, 3) for name in ("AdamW", "DeepSpeed's Muon", "gather")
        } <= rows.keys()
        assert "The lowest stage that fits 80 GB without activations: ZeRO-1." in printed
        assert json.loads(printed.partition("To paste:")[2])["zero_optimization"] == {"stage": 1}

    def test_a_model_that_fits_no_device_is_said_not_to(self, capsys: pytest.CaptureFixture[str]) -> None:
        """46.7 billion parameters of 2 bytes are more than an H100 has."""
        printed = " ".join(self.printed("mixtral-8x7b --world-size 8 --stage 2", capsys).split())
        assert (
            "ZeRO-2 does not fit the device: 175.7 GB a rank without activations; it has 80 GB. Needed: a higher stage"
            in printed
        )
        assert "gather, +7.0% of your step over AdamW, -22.6 GB; no matrix is cut: every mode does the same." in printed

    def test_the_configuration_to_paste_is_one(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pasted = self.printed("llama3-8b --world-size 8 --stage 3", capsys).partition("To paste:")[2]
        assert json.loads(pasted)["train_batch_size"] == 128  # of 4,096 tokens each
        path = write(tmp_path, json.loads(pasted))
        assert main(["check", path]) == 0
        assert self.printed(f"llama3-8b --world-size 8 --config {path}", capsys).count("Recommended on ZeRO-3") == 1

    def test_the_configuration_to_paste_keeps_what_the_given_one_has(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sharding = {"mode": "shard_local", "gather_every": 3, "bucket_numel": 2**27}
        params = {**MUON["params"], "sharding": sharding}
        given = {"optimizer": {**MUON, "params": params}, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
        printed = self.printed(f"llama3-8b --world-size 8 --config {write(tmp_path, given)}", capsys)
        params["sharding"] = {"mode": "gather", "bucket_numel": 2**27}
        assert json.loads(printed.partition("To paste:")[2]) == given

    def test_json_has_all_that_is_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = json.loads(self.printed("gpt2 --world-size 8 --stage 3 --json", capsys))
        (stage,) = found["stages"]
        by_name = {each["name"]: each for each in stage["candidates"]}
        assert stage["recommended"] == "gather"
        assert by_name["AdamW"]["over_adamw"] == by_name["AdamW"]["bytes_over_adamw"] == 0
        memory = by_name["gather"]["memory_bytes"]
        assert memory["total"] == sum(memory[kind] for kind in ("parameters", "gradients", "state", "workspace"))
        assert len(stage["ranks"]) == 8
        assert found["config"]["optimizer"]["params"]["sharding"] == {"mode": "gather"}
        assert found["assumed"]["tokens"] == 2**19

    def test_published_figures_stand_beside_it_with_their_sources(self, capsys: pytest.CaptureFixture[str]) -> None:
        printed = " ".join(self.printed("gpt2 --world-size 8 --stage 3", capsys).split())
        assert "+1.7, +2.1 and +3.4% of a step over AdamW" in printed
        assert "arXiv 2606.27153" in printed
        assert "Assumed: h100, nvlink; 524,288 tokens a step in sequences of 4,096" in printed
        # NCCL allocates outside of torch's allocator: its first all-to-all took 3 GB on each of 8 H100 (NVIDIA/nccl#1685).
        assert "Not counted: activations, ZeRO's and NCCL's own buffers." in printed

    def test_a_configuration_decides_what_is_a_matrix(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        only_mlp = {"match": "attention", "role": "scalar"}
        path = write(tmp_path, {"optimizer": {"type": "OptForge", "params": {"name": "muon", "overrides": [only_mlp]}}})
        assert "24 matrices" in self.printed(f"gpt2 --world-size 8 --stage 3 --config {path}", capsys)
        path = write(tmp_path, {"optimizer": {"type": "OptForge", "params": {"name": "adamw"}}})
        assert "none of them a matrix" in self.printed(f"gpt2 --world-size 8 --stage 3 --config {path}", capsys)

    def test_sub_groups_of_the_configuration_are_planned_one_after_another(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A layer has 884,736 elements on each of 8 ranks; sub-groups end where they exceed a million."""
        path = write(tmp_path, {"optimizer": MUON, "zero_optimization": {"stage": 3, "sub_group_size": 1e6}})
        printed = " ".join(self.printed(f"gpt2 --world-size 8 --stage 3 --config {path}", capsys).split())
        assert "zero_optimization.sub_group_size 1000000 makes 9 sub-groups" in printed

    def test_a_hugging_face_configuration(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        path = write(tmp_path, {**config, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100})
        printed = " ".join(self.printed(f"{path} --world-size 2 --stage 3", capsys).split())
        numel = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
        assert f"14 matrices with {numel:,} of {numel + 2 * 100 * 64 + 5 * 64:,} parameters" in printed

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ("gpt5 --world-size 8 --stage 3", "model: got 'gpt5' (did you mean 'gpt2'?); allowed: gpt2, gpt2-medium"),
            ("gpt2 --world-size 0 --stage 3", "world size: got 0; allowed: at least 1"),
            ("gpt2 --world-size 8 --stage 4", "stage: got 4; allowed: 1, 2, 3"),
            ("gpt2 --world-size 8 --stage 3 --link-gbps 0", "link gbps: got 0; allowed: a positive number"),
            ("gpt2 --world-size 8 --stage 3 --tokens-per-step 0", "tokens per step: got 0; allowed: at least 1"),
            ("gpt2 --world-size 8 --stage 3 --sequence-length 0", "sequence length: got 0; allowed: at least 1"),
            ("gpt2 --world-size 8 --stage 3 --utilisation 40", "utilisation: got 40; allowed: a number above 0 and up to 1"),
            ("gpt2 --world-size 8 --stage 3 --saving 5", "saving: got 5; allowed: a share of the step between 0 and 1"),
            ("gpt2 --world-size 8 --stage 2 --expert-parallel 3", "expert parallel: got 3; allowed: a divisor of 8 ranks"),
            ("gpt2 --world-size 8 --stage 3 --config none.json", "none.json: No such file"),
        ],
    )
    def test_bad_input_is_named(self, arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", *arguments.split()]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert said in output.err

    @pytest.mark.parametrize("content", ["{", [1], {"hidden_size": 64}, {"model_type": "gpt5"}])
    def test_a_file_that_is_no_model(self, content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(tmp_path, content)
        assert main(["plan", path, "--world-size", "8", "--stage", "3"]) == 2
        assert f"{path}: not the config.json of a model that transformers knows" in capsys.readouterr().err

    @pytest.mark.parametrize("size", [0, "auto", True])
    def test_a_bad_size_of_sub_groups(self, size: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(tmp_path, {"optimizer": MUON, "zero_optimization": {"sub_group_size": size}})
        assert main(["plan", "gpt2", "--world-size", "8", "--stage", "3", "--config", path]) == 2
        assert f"zero_optimization.sub_group_size: got {size!r}; allowed: a number of at least 1" in capsys.readouterr().err


BAD = {
    "not JSON": ("{", "not JSON"),
    "no object": ([1], "got a list; allowed: a JSON object"),
    "no optimizer": ({}, "optimizer: missing"),
    "another optimizer": (
        {"optimizer": {"type": "AdamW"}},
        "optimizer.type: got 'AdamW'; allowed: 'OptForge'; `ds-optforge init --from FILE` writes one that continues it",
    ),
    "a rule that is almost one": (
        {"optimizer": {"type": "OptForge", "params": {"name": "mouon"}}},
        "optimizer.params.name: got 'mouon'; did you mean 'muon'? allowed: adamuon, adamw",
    ),
    "a bad value": (
        {"optimizer": {"type": "OptForge", "params": {"name": "muon", "lr": "x"}}},
        "optimizer.params.lr: got 'x' (str); allowed: a number",
    ),
}


@pytest.mark.parametrize("command", [["check"], ["explain", "--config"]], ids=["check", "explain"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_its_problem(
    case: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, said = BAD[case]
    if command[0] == "explain" and case == "no optimizer":
        said = "optimizer.params.name: missing"  # explain also takes the "params" alone
    path = write(tmp_path, config)
    status = main([*command, path])
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith(f"{path}:\n")
    assert said in output.err


@pytest.mark.parametrize("command", [["check"], ["explain", "--config"]], ids=["check", "explain"])
def test_a_file_that_is_not_there(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_check_accepts_the_autos_that_the_hugging_face_trainer_fills(key: str, tmp_path: Path) -> None:
    params = {"name": "adamw", key: "auto"}
    schedule = {"name": "linear", "total_num_steps": "auto", "warmup_num_steps": "auto"}
    config = {
        "optimizer": {"type": "OptForge", "params": params},
        "scheduler": {"type": "OptForgeSchedule", "params": schedule},
    }
    assert main(["check", write(tmp_path, config)]) == 0


def test_check_refuses_an_auto_that_nobody_fills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = {"name": "muon", "lr": "auto", "adamw": {"lr": "auto"}}
    assert main(["check", write(tmp_path, {"optimizer": {"type": "OptForge", "params": params}})]) == 2
    said = capsys.readouterr().err
    assert 'optimizer.params.adamw.lr: got "auto"' in said
    assert "optimizer.params.lr:" not in said


def test_check_refuses_a_scheduler_that_flattens_different_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02}}
    assert main(["check", write(tmp_path, {"optimizer": MUON, "scheduler": scheduler})]) == 2
    said = capsys.readouterr().err
    assert "scheduler.params.warmup_max_lr: got 0.02, which 'WarmupLR' writes into every group" in said
    assert "matrix 0.02" in said
    assert "embedding 0.001" in said
    assert "allowed: a list with a rate for each parameter group" in said


@pytest.mark.parametrize("warmup_max_lr", [[0.02, 0.001], None], ids=["a list", "the groups' own"])
def test_check_accepts_a_scheduler_that_is_given_a_rate_for_each_group(warmup_max_lr: object, tmp_path: Path) -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": warmup_max_lr}}
    assert main(["check", write(tmp_path, {"optimizer": MUON, "scheduler": scheduler})]) == 0


@pytest.mark.parametrize("command", ["convert", "export"])
def test_what_is_no_checkpoint_exits_with_2(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([command, str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'empty'}: has n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["train"], ["explain"], ["check"]])
def test_wrong_usage_exits_with_2_and_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: ds-optforge" in capsys.readouterr().err


class TestOneName:
    """Commands name alike what several of them have; what version 0.1 had without an option, or under another, still works."""

    CONFIG = str(CONFIGS / "muon_zero2.json")

    @pytest.mark.parametrize(
        ("named", "earlier"),
        [
            ("check --config CONFIG", "check CONFIG"),
            ("plan --model gpt2 --world-size 8 --stage 3", "plan --world-size 8 gpt2 --stage 3"),
            ("convert none --out OUT", "convert none OUT"),
            ("export none --out OUT --model MODEL", "export none OUT --config MODEL"),
        ],
    )
    def test_both_spellings_do_the_same(
        self, named: str, earlier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = []
        for command in (named, earlier):
            values = {"CONFIG": self.CONFIG, "OUT": str(tmp_path / "out"), "MODEL": str(tmp_path)}
            status = main([values.get(word, word) for word in command.split()])
            found.append((status, *capsys.readouterr()))
        assert found[0] == found[1]

    @pytest.mark.parametrize("arguments", ["check", "plan --world-size 8", "convert none", "check a --config b"])
    def test_it_is_given_once(self, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as error:
            main(arguments.split())
        assert error.value.code == 2
        assert re.search("--(config|model|out)", capsys.readouterr().err)

    def test_the_help_shows_the_name_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        for command in ("check", "plan", "convert", "export"):
            with pytest.raises(SystemExit):
                main([command, "--help"])
        printed = capsys.readouterr().out
        assert printed.count("--model") == 2 * 2  # of plan and export, in the usage and below it
        assert "==SUPPRESS==" not in printed


class TestCheckAsJson:
    def found(self, path: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
        status = main(["check", "--config", path, "--json"])
        return status, json.loads(capsys.readouterr().out)

    def test_valid(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(tmp_path, {"optimizer": MUON, "train_batch_size": "auto"})
        assert self.found(path, capsys) == (0, {"config": path, "valid": True, "problems": [], "auto": ["train_batch_size"]})

    def test_invalid(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(tmp_path, BAD["a bad value"][0])
        status, said = self.found(path, capsys)
        assert (status, said["valid"]) == (2, False)
        assert said["problems"] == ["optimizer.params.lr: got 'x' (str); allowed: a number"]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"ds-optforge {ds_optforge.__version__}\n"


class TestConfigs:
    def test_each_is_listed_with_what_is_in_its_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["configs"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split("  ")[0] == "name"
        listed = {line.split()[0]: re.split(r" {2,}", line)[1:] for line in lines[1:]}
        assert list(listed) == [name.removesuffix(".json") for name in SHIPPED]
        assert listed["muon_zero3_offload"] == ["muon", "3", "cpu"]
        assert listed["adamw_zero2"] == ["adamw", "2", "none"]
        assert listed["normuon_8bit_zero2"] == ["normuon, state 8bit", "2", "none"]

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["configs", "--json"]) == 0
        listed = {each.pop("name"): each for each in json.loads(capsys.readouterr().out)}
        assert list(listed) == [name.removesuffix(".json") for name in SHIPPED]
        assert listed["muon_zero3_offload"] == {"rule": "muon", "state_dtype": None, "stage": 3, "offload": "cpu"}

    @pytest.mark.parametrize("name", ["muon_zero2", "muon_zero2.json"])
    def test_one_is_written_as_it_is(self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["configs", name, "--out", str(tmp_path)]) == 0
        written = tmp_path / "muon_zero2.json"
        assert capsys.readouterr().out == f"{written}: written\n"
        assert written.read_bytes() == (CONFIGS / "muon_zero2.json").read_bytes()

    def test_the_current_folder_is_the_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["configs", "muon_zero1"]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["muon_zero1.json"]

    def test_a_file_is_never_overwritten(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "muon_zero2.json").write_text("mine")
        assert main(["configs", "muon_zero2", "--out", str(tmp_path)]) == 2
        assert f"{tmp_path / 'muon_zero2.json'}: is there already" in capsys.readouterr().err
        assert (tmp_path / "muon_zero2.json").read_text() == "mine"

    @pytest.mark.parametrize("name", ["muon_zero", "muon-zero2", "../config"])
    def test_an_unknown_name_is_answered_with_those_that_are_there(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["configs", name, "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"configuration: got '{name}'; ")
        assert ("did you mean 'muon_zero" in said) == name.startswith("muon")
        assert f"allowed: {', '.join(path.removesuffix('.json') for path in SHIPPED)}" in said
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_is_not_there_is_made(self, tmp_path: Path) -> None:
        assert main(["configs", "muon_zero2", "--out", str(tmp_path / "new" / "folder")]) == 0
        assert (tmp_path / "new" / "folder" / "muon_zero2.json").exists()

    def test_a_folder_that_cannot_be(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        assert main(["configs", "muon_zero2", "--out", str(tmp_path / "file")]) == 2
        assert f"--out: got '{tmp_path / 'file'}' (File exists)" in capsys.readouterr().err

    def test_a_reader_that_has_seen_enough_gets_no_traceback(self) -> None:
        """As when `head` has closed its end of the pipe."""
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "ds_optforge", "configs"]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")

    def test_out_without_a_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["configs", "--out", "."]) == 2
        assert "--out: got '.' without a NAME" in capsys.readouterr().err


class TestInit:
    """What it writes is tested in tests/migrate."""

    ADAMW = (
        '{"train_batch_size": 8, "zero_optimization": {"stage": 2}, '
        '"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "weight_decay": 0.1}}}'
    )

    def test_without_out_it_prints_a_diff_and_the_reasons(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(tmp_path, self.ADAMW)
        assert main(["init", "--from", path]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"--- {path}\n+++ ds_optforge.json\n@@ ")
        difference, _, reasons = printed.partition("\n\n")
        assert '-    "type": "AdamW",\n+    "type": "OptForge",' in difference
        assert '+        "betas": [0.9, 0.999],' in difference
        assert "train_batch_size" not in difference.partition("@@")[2].replace('   "train_batch_size": 8,', "")
        assert "- `optimizer.params.lr` is `0.001`: from optimizer.params.lr: updates are of one size" in reasons
        assert [file.name for file in tmp_path.iterdir()] == ["config.json"]

    @pytest.mark.parametrize("there", ["new.json", "new.json.reasons.md"])
    def test_a_file_is_never_overwritten(self, there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / there).write_text("mine")
        assert main(["init", "--from", write(tmp_path, self.ADAMW), "--out", str(tmp_path / "new.json")]) == 2
        assert f"{tmp_path / there} is there already; allowed: a new name" in capsys.readouterr().err
        assert (tmp_path / there).read_text() == "mine"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", there]

    def test_a_folder_that_is_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "none" / "new.json"
        assert main(["init", "--from", write(tmp_path, self.ADAMW), "--out", str(out)]) == 2
        assert f"--out: got '{out}' (No such file or directory)" in capsys.readouterr().err

    def test_a_file_that_is_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["init", "--from", str(tmp_path / "none.json")]) == 2
        assert capsys.readouterr().err == f"{tmp_path / 'none.json'}: No such file or directory; allowed: a JSON or YAML file\n"
