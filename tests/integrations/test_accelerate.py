"""The door into Accelerate, as far as no engine is needed: what stops before Accelerate could leave DeepSpeed out."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_optforge import ConfigError

adapter = pytest.importorskip(
    "ds_optforge.integrations.accelerate", reason="accelerate and transformers are not installed (extra 'hf')"
)

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "OptForge", "params": {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}}},
}


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher sets."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


def refused(config: Any = CONFIG, **arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        adapter.make_accelerator(config, **arguments)
    return str(error.value).splitlines()


@pytest.mark.usefixtures("launcher")
class TestMakeAccelerator:
    def test_cpu(self) -> None:
        """Accelerate would train with DDP and say nothing."""
        assert refused(cpu=True) == [
            "cpu: got True, with which Accelerate trains by DDP; allowed: no such argument (DeepSpeed runs on a CPU too)"
        ]

    def test_the_same_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        (message,) = refused()
        assert message.startswith(
            "ACCELERATE_USE_CPU: got 'true', with which Accelerate trains by DDP; allowed: 'false' (use_cpu"
        )

    def test_no_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
        assert refused() == [
            "RANK, LOCAL_RANK, WORLD_SIZE: not set in the environment; allowed: a start by deepspeed, torchrun or accelerate "
            "launch, the last with distributed_type: DEEPSPEED in its file"
        ]

    def test_every_problem_is_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LOCAL_RANK")
        assert [line.split(":")[0] for line in refused(cpu=True)] == ["cpu", "LOCAL_RANK"]

    def test_a_plugin_beside_the_configuration(self) -> None:
        assert refused(deepspeed_plugin=object()) == [
            "deepspeed_plugin: got an argument; allowed: none, because config makes the plugin"
        ]

    def test_two_numbers_of_accumulation_steps(self) -> None:
        assert refused({**CONFIG, "gradient_accumulation_steps": 4}, gradient_accumulation_steps=2) == [
            "gradient_accumulation_steps: got 2, and 4 in the configuration; allowed: one of the two"
        ]

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({**CONFIG, "optimizer": {"type": "AdamW"}}, "optimizer.type: got 'AdamW'; allowed: 'OptForge'"),
            ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow: got a section"),
        ],
        ids=["optimizer", "ZeRO, without an optimizer"],
    )
    def test_a_bad_configuration(self, config: dict[str, Any], message: str) -> None:
        assert refused(config)[0].startswith(message)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        assert "none.json: No such file or directory" in refused(tmp_path / "none.json")[0]


@pytest.mark.parametrize("package", ["accelerate", "transformers"])
def test_a_missing_package_names_the_extra(package: str) -> None:
    """None in sys.modules is how Python marks a module that cannot be imported."""
    script = f"import sys; sys.modules[{package!r}] = None; import ds_optforge.integrations.accelerate"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    message = f"ModuleNotFoundError: {package} is not installed; allowed: pip install 'ds-optforge[hf]'"
    assert process.stderr.splitlines()[-1] == message
