"""``ds-optforge export`` makes a folder that from_pretrained reads: the same logits as those of the run that was saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.chunks import Chunk
from ds_optforge.checkpoint.export import export
from ds_optforge.checkpoint.files import write_weights
from ds_optforge.cli import main
from tests.distributed import cases
from tests.distributed.conftest import Pools

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
from tests.distributed import frameworks  # noqa: E402


def logits_of(folder: Path) -> torch.Tensor:
    """Of the model that from_pretrained makes, with no weight missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=frameworks.prompt()).logits
    return found


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_loads_what_was_trained(kind: str, stage: int, pools: Pools, tmp_path: Path) -> None:
    """From either kind of checkpoint; the tied weights of GPT-2 are written once."""
    config = cases.engine_config(stage, cases.MUON, train_batch_size=4)
    expected = pools[2].run(frameworks.save_language_model, config, kind, str(tmp_path))[0]
    (tmp_path / "engine" / "generation_config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "engine" / "tokenizer_config.json").write_text("{}")
    assert main(["export", str(tmp_path / "engine"), str(tmp_path / "one")]) == 0
    assert main(["export", str(tmp_path / "portable"), str(tmp_path / "other"), "--config", str(tmp_path / "engine")]) == 0
    for name in ("one", "other"):
        folder = tmp_path / name
        assert torch.equal(logits_of(folder), expected)
        beside = {"config.json", "generation_config.json", "tokenizer_config.json"}
        assert {path.name for path in folder.iterdir()} == {"model.safetensors", *beside}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
        assert ("lm_head.weight" in names_in(folder)) == (kind == "llama")


def test_an_adamw_run_is_exported_as_well(pools: Pools, tmp_path: Path) -> None:
    config = {"train_batch_size": 4, "zero_optimization": {"stage": 3}}
    expected = pools[2].run(frameworks.save_language_model, config, "gpt2", str(tmp_path), False)[0]
    export(tmp_path / "engine", tmp_path / "model", torch.bfloat16)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert found.dtype == torch.bfloat16
    assert logits_of(tmp_path / "model").float().sub(expected).abs().max() < 0.05
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_a_config_the_folders_that_were_searched_are_named(
    pools: Pools, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = cases.engine_config(2, cases.MUON, train_batch_size=4)
    pools[2].run(frameworks.save_language_model, config, "gpt2", str(tmp_path))
    export(tmp_path / "portable", tmp_path / "model")
    assert f"{tmp_path / 'portable'} or {tmp_path}: no config.json there" in caplog.text
    with pytest.raises(CheckpointError, match=r"portable: has no config\.json; allowed"):
        export(tmp_path / "portable", tmp_path / "again", config=tmp_path / "portable")
    assert not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match=r"model is there already"):
        export(tmp_path / "portable", tmp_path / "model")


def test_large_models_get_shards_and_their_index(tmp_path: Path) -> None:
    """A file holds 256 MiB: the third tensor of 100 MiB goes to the second."""
    chunks = []
    for number in range(3):
        values = torch.full((100, 2**18), float(number))
        chunks.append(Chunk(f"layers.{number}.weight", (100, 2**18), (0, 0), (100, 2**18), torch.float32, values))
    write_weights(tmp_path / "model", chunks, {})
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 3 * 100 * 2**20},
        "weight_map": {"layers.0.weight": files[0], "layers.1.weight": files[0], "layers.2.weight": files[1]},
    }
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors.index.json", *files}
    with safe_open(tmp_path / "model" / files[1], "pt") as file:
        assert file.get_tensor("layers.2.weight")[99, -1] == 2.0


class Wrapped(torch.nn.Module):
    """As DDP wraps a model, with one layer that is compiled and one of PEFT's adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.ModuleDict({"_orig_mod": torch.nn.Linear(3, 2), "lora_A": torch.nn.Linear(2, 2, bias=False)})


def test_prefixes_of_wrappers_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Wrapped()
    optimizer = torch.optim.AdamW(model.named_parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    export(tmp_path / "run.pt", tmp_path / "model")
    assert names_in(tmp_path / "model") == {"weight", "bias", "lora_A.weight"}
    assert "1 names are of PEFT's adapters, as 'module.lora_A.weight'" in caplog.text
