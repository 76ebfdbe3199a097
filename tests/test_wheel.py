"""What a user installs: the wheel has every file, and works in an environment of its own, outside the checkout."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from trove_classifiers import classifiers

import ds_optforge
from tests.launch.commands import LAUNCH_LIMIT, ROOT, environment, port_of_a_run

LINK = "ds_optforge/configs"  # in git; in the wheel, a folder
STEPS = 5

IMPORT_ALL = """
import importlib, json, pkgutil
import ds_optforge

names = [module.name for module in pkgutil.walk_packages(ds_optforge.__path__, "ds_optforge.")]
print(json.dumps({name: importlib.import_module(name).__file__ for name in ["ds_optforge", *names]}))
"""

TRAIN = f"""
import json, os, sys
import deepspeed
import torch
import ds_optforge

deepspeed.init_distributed("gloo")
torch.manual_seed(0)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(256, 64)
        self.hidden = torch.nn.Linear(64, 64)
        self.lm_head = torch.nn.Linear(64, 256, bias=False)

    def forward(self, tokens, targets):
        logits = self.lm_head(self.hidden(self.embed(tokens)).relu())
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


model = Net()
ds_optforge.register(model)
engine, *_ = deepspeed.initialize(model=model, config="muon_zero2.json")
tokens = torch.randint(256, (16, 17))
losses = []
for _ in range({STEPS}):
    loss = engine(tokens[:, :-1], tokens[:, 1:])
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
with open(f"losses_{{engine.global_rank}}.json", "w") as file:
    json.dump({{"file": ds_optforge.__file__, "world": engine.world_size, "losses": losses}}, file)
torch.distributed.destroy_process_group()
"""

TYPED = """
import ds_optforge
from ds_optforge import ConfigError

reveal_type(ds_optforge.explain)
number: int = ds_optforge.__version__
problem: ConfigError = ValueError("x")
ds_optforge.no_such_name
ds_optforge.initialize(model=None, config=1)
"""


class Environment:
    """A virtual environment without pip, that nothing is installed into yet."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, folder / "bin" / "python"
        venv.create(folder, symlinks=True)
        (self.site_packages,) = folder.glob("lib/python*/site-packages")

    def install(self, *arguments: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-index", "--no-deps"]
        finished([*pip, *arguments], self.folder)

    def lend(self, *folders: Path) -> None:
        """Let it import what lies in folders of another environment; editable installs there are not among it."""
        (self.site_packages / "lent.pth").write_text("".join(f"{folder}\n" for folder in folders))

    def run(self, program: str, *arguments: str, cwd: Path, status: int = 0, **variables: str) -> str:
        return finished([self.folder / "bin" / program, *arguments], cwd, status, **variables)


def finished(command: list[str | Path], cwd: Path, status: int = 0, **variables: str) -> str:
    """Run it to its end; returns what it printed."""
    inherited = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    process = subprocess.run(command, cwd=cwd, env=inherited | variables, capture_output=True, text=True, timeout=LAUNCH_LIMIT)
    assert process.returncode == status, process.stdout + process.stderr
    return process.stdout + process.stderr


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files as they are now: no build is left in the checkout, and none that is there is used."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def tracked(under: str = ".") -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", under], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="session")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that is built of the sdist."""
    folder = tmp_path_factory.mktemp("built")
    finished([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source], folder)
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel, beside the packages that these tests run with."""
    made = Environment(tmp_path_factory.mktemp("installed") / "venv")
    made.install(wheel)
    made.lend(*(Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")))
    return made


class TestFiles:
    def test_the_wheel_has_the_tracked_files_of_the_package_and_the_configurations(self, wheel: Path) -> None:
        expected = {name: ROOT / name for name in tracked("ds_optforge") if name != LINK}
        expected |= {f"{LINK}/{Path(name).name}": ROOT / name for name in tracked("ds_configs")}
        with zipfile.ZipFile(wheel) as archive:
            found = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name].read_bytes()] == []

    def test_the_sdist_has_what_the_wheel_has_and_no_tests(self, built: Path, wheel: Path) -> None:
        (path,) = built.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            found = {name.partition("/")[2] for name in archive.getnames()}
        with zipfile.ZipFile(wheel) as packed:
            assert {name for name in packed.namelist() if ".dist-info/" not in name} <= found
        assert {"DESCRIPTION.md", "LICENSE", "pyproject.toml", "setup.cfg"} <= found
        assert [name for name in found if name.startswith("tests")] == []


class TestMetadata:
    def test_a_package_index_would_take_it(self, built: Path) -> None:
        said = finished([sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()], built)
        assert said.count("PASSED") == 2

    def test_its_classifiers_are_known(self, metadata: Message) -> None:
        given = metadata.get_all("Classifier", [])
        assert [name for name in given if name not in classifiers] == []
        assert {"Development Status", "Intended Audience", "Operating System", "Environment", "Typing"} <= {
            name.partition(" :: ")[0] for name in given
        }

    def test_license_keywords_and_version(self, metadata: Message) -> None:
        assert metadata["License-Expression"] == "MIT"
        assert metadata["License-File"] == "LICENSE"
        assert "deepspeed" in metadata["Keywords"]
        assert metadata["Version"] == ds_optforge.__version__

    def test_the_description_has_no_dead_links_and_the_snippets_of_the_readme(self, metadata: Message) -> None:
        description = metadata.get_payload()
        assert isinstance(description, str)
        assert re.findall(r"\]\((?!https?://)[^)]*\)", description) == []
        snippets = re.findall(r"```python\n(.*?)```", description, re.DOTALL)
        assert len(snippets) == 2
        assert [snippet for snippet in snippets if snippet not in (ROOT / "README.md").read_text()] == []


class TestInstalled:
    def test_every_module_can_be_imported(self, installed: Environment, tmp_path: Path) -> None:
        printed = installed.run("python", "-c", IMPORT_ALL, cwd=tmp_path)
        files = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
        assert all(Path(file).is_relative_to(installed.site_packages) for file in files.values())
        assert len(files) == len([name for name in tracked("ds_optforge") if name.endswith(".py")])

    def test_its_version(self, installed: Environment, tmp_path: Path) -> None:
        assert installed.run("ds-optforge", "--version", cwd=tmp_path) == f"ds-optforge {ds_optforge.__version__}\n"
        asked = "from importlib.metadata import version; print(version('ds-optforge'))"
        assert installed.run("python", "-c", asked, cwd=tmp_path) == f"{ds_optforge.__version__}\n"

    def test_from_a_shipped_configuration_to_a_plan(self, installed: Environment, tmp_path: Path) -> None:
        for name in (Path(name).stem for name in tracked("ds_configs")):
            assert f"\n{name} " in installed.run("ds-optforge", "configs", cwd=tmp_path)
        installed.run("ds-optforge", "configs", "muon_zero3", "--out", ".", cwd=tmp_path)
        assert (tmp_path / "muon_zero3.json").read_bytes() == (ROOT / "ds_configs" / "muon_zero3.json").read_bytes()
        installed.run("ds-optforge", "configs", "muon_zero3", "--out", ".", cwd=tmp_path, status=2)
        assert "valid" in installed.run("ds-optforge", "check", "muon_zero3.json", cwd=tmp_path)
        assert "lm_head.weight" in installed.run("ds-optforge", "explain", "--config", "muon_zero3.json", cwd=tmp_path)
        plan = ("gpt2", "--world-size", "8", "--stage", "3", "--config", "muon_zero3.json")
        assert "48 matrices" in installed.run("ds-optforge", "plan", *plan, cwd=tmp_path)

    def test_two_ranks_train_with_the_configuration_alone(self, installed: Environment, tmp_path: Path) -> None:
        """Of the same batch, over and over."""
        (tmp_path / "script.py").write_text(TRAIN)
        installed.run("ds-optforge", "configs", "muon_zero2", "--out", ".", cwd=tmp_path)
        with port_of_a_run() as port:
            launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "script.py")
            installed.run("python", *launch, cwd=tmp_path, DS_ACCELERATOR="cpu")
        for rank in range(2):
            left = json.loads((tmp_path / f"losses_{rank}.json").read_text())
            assert Path(left["file"]).is_relative_to(installed.site_packages)
            assert left["world"] == 2
            losses = left["losses"]
            assert len(losses) == STEPS
            assert all(math.isfinite(loss) for loss in losses)
            assert losses == sorted(losses, reverse=True)
            assert losses[-1] < losses[0]


def test_a_type_checker_sees_an_editable_install(source: Path, tmp_path: Path) -> None:
    """What it imports is not installed there: that is no error of the script."""
    editable = Environment(tmp_path / "venv")
    backend = tmp_path / "backend"
    backend.mkdir()
    setuptools = distribution("setuptools")
    for name in {file.parts[0] for file in setuptools.files or ()} - {".."}:
        (backend / name).symlink_to(str(setuptools.locate_file(name)))
    editable.lend(backend)
    editable.install("--no-build-isolation", "--editable", source)
    (tmp_path / "script.py").write_text(TYPED)
    mypy: list[str | Path] = [sys.executable, "-m", "mypy", "--strict", "--python-executable", editable.python]
    said = finished([*mypy, "--cache-dir", tmp_path / "cache", "script.py"], tmp_path, status=1)
    assert 'note: Revealed type is "def (model: Any, config: ' in said
    assert re.findall(r"^script\.py:(\d+): error: .* \[([\w-]+)\]$", said, re.MULTILINE) == [
        ("6", "assignment"),
        ("7", "assignment"),
        ("8", "attr-defined"),
        ("9", "arg-type"),
    ]
    assert "Found 4 errors in 1 file" in said
    (tmp_path / "elsewhere").mkdir()
    where = "import ds_optforge, ds_optforge.shipped_configs as shipped; print(ds_optforge.__file__, len(shipped.names()))"
    count = len(tracked("ds_configs"))
    assert editable.run("python", "-c", where, cwd=tmp_path / "elsewhere") == f"{source}/ds_optforge/__init__.py {count}\n"
