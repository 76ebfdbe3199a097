"""What is imported when: a training script has everything at once, the command line waits for neither torch nor DeepSpeed."""

import json
import subprocess
import sys

import pytest

import ds_optforge
from tests.launch.commands import ROOT, environment, port_of_a_run

HEAVY = ("torch", "deepspeed", "pydantic", "numpy")
NO_REGISTER = {"train_batch_size": 1, "optimizer": {"type": "OptForge", "params": {"name": "muon"}}}


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter, where only what it imports is imported."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=300)


def imported(script: str, packages: tuple[str, ...] = HEAVY) -> list[str]:
    """Those of the packages that the script imports."""
    process = run(f"{script}\nimport json, sys\nprint(json.dumps([name for name in {packages!r} if name in sys.modules]))")
    assert process.returncode == 0, process.stderr
    return list(json.loads(process.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "plan --help",
        "explain --help",
        "",
        "plan",
        "train",
        "configs",
        "configs muon_zero9",
        "configs --out x",
        "init --help",
    ],
)
def test_a_command_that_computes_nothing_imports_neither_torch_nor_deepspeed(arguments: str) -> None:
    call = f"from ds_optforge.cli import main\ntry:\n    main({arguments.split()!r})\nexcept SystemExit:\n    pass"
    assert imported(call) == []


def test_a_file_that_init_cannot_read_imports_neither_torch_nor_deepspeed() -> None:
    refused = "from ds_optforge.cli import main\nassert main(['init', '--from', 'ruff.toml']) == 2"
    assert imported(refused) == []


def test_yaml_without_pyyaml_gets_the_line_to_install_it() -> None:
    process = run(
        "import sys\nsys.modules['yaml'] = None\nfrom ds_optforge.cli import main\nmain(['init', '--from', 'ruff.toml'])"
    )
    assert process.stderr == "ruff.toml: YAML needs PyYAML; run: pip install 'ds-optforge[experiments]'\n"


def test_the_package_alone_imports_none_of_its_names() -> None:
    listed = "import ds_optforge\nassert set(ds_optforge.__all__) <= set(dir(ds_optforge))\nassert ds_optforge.__version__"
    assert imported(listed) == []


def test_the_command_line_that_does_work_does_not_import_deepspeed() -> None:
    work = "from ds_optforge.cli import main\nassert main(['explain', '--config', 'ds_configs/muon_zero2.json']) == 0"
    assert imported(work) == ["torch", "pydantic", "numpy"]


def test_a_name_that_is_not_there_is_refused_without_an_import() -> None:
    missing = (
        "import ds_optforge\n"
        "try:\n    ds_optforge.Optforge\n"
        "except AttributeError as error:\n    assert str(error) == \"module 'ds_optforge' has no attribute 'Optforge'\"\n"
        "else:\n    raise AssertionError"
    )
    assert imported(missing) == []


def test_the_first_name_that_is_used_brings_all() -> None:
    used = (
        "import ds_optforge\nds_optforge.ConfigError\n"
        "assert set(ds_optforge.__all__) <= vars(ds_optforge).keys()\n"
        "import torch\nassert torch.optim.OptForge is ds_optforge.OptForge"
    )
    assert "torch" in imported(used)


def test_what_is_for_the_trainer_alone_brings_transformers() -> None:
    assert imported("import ds_optforge\nds_optforge.OptForge", ("transformers",)) == []
    assert imported("import ds_optforge\nds_optforge.TrainerOptimizer", ("transformers",)) == ["transformers"]


def test_without_transformers_the_trainers_names_say_what_to_install() -> None:
    process = run("import sys\nsys.modules['transformers'] = None\nimport ds_optforge\nds_optforge.OptForgeCallback")
    assert "transformers is not installed; allowed: pip install 'ds-optforge[hf]'" in process.stderr


def test_every_name_is_the_one_of_its_module() -> None:
    for name in ds_optforge.__all__:
        found = getattr(ds_optforge, name)
        assert found.__name__ == name
        assert getattr(sys.modules[found.__module__], name) is found


def test_behind_torch_everything_is_imported_at_once() -> None:
    published = "import torch, ds_optforge\nassert torch.optim.OptForge is vars(ds_optforge)['OptForge']"
    assert imported(published, ("torch", "deepspeed")) == ["torch"]


@pytest.mark.parametrize("first", ["import torch", "import deepspeed", ""])
def test_checkpoints_are_imported_when_one_is_used(first: str) -> None:
    assert imported(f"{first}\nimport ds_optforge\nds_optforge.save_checkpoint", ("torch.distributed.checkpoint",)) == []


def test_a_sub_package_does_not_hide_the_function_of_its_name() -> None:
    hidden = "import ds_optforge.optimizer, types\nassert isinstance(ds_optforge.orthogonalize, types.FunctionType)"
    assert "torch" in imported(hidden)


@pytest.mark.parametrize("order", ["import ds_optforge, deepspeed", "import deepspeed, ds_optforge"])
def test_a_script_that_forgets_to_register_is_told_in_either_order(order: str) -> None:
    script = f"{order}\nfrom torch import nn\ndeepspeed.initialize(model=nn.Linear(4, 4), config={NO_REGISTER!r})"
    with port_of_a_run() as port:
        process = run(script, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port)
    assert process.returncode != 0
    assert "call ds_optforge.register(model)" in process.stderr
