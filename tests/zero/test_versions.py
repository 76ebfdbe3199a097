"""Which DeepSpeed is found, without importing it where that is possible, and which ones are refused."""

import configparser
from importlib.metadata import version
from pathlib import Path

import pytest

from ds_optforge.zero.versions import SUPPORTED_DEEPSPEED, found_deepspeed, is_supported
from tests.test_import import run

REGISTER = "import ds_optforge\nfrom torch import nn\nds_optforge.register(nn.Linear(2, 2))"
INITIALIZE = "import ds_optforge\nfrom torch import nn\nds_optforge.initialize(model=nn.Linear(2, 2), config={})"


def test_the_range_in_messages_is_the_one_that_is_installed() -> None:
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).resolve().parents[2] / "setup.cfg")
    assert f"deepspeed{SUPPORTED_DEEPSPEED}" in settings["options"]["install_requires"].split()


def test_what_is_installed_is_found_and_supported() -> None:
    assert found_deepspeed() == version("deepspeed")
    assert is_supported(found_deepspeed())


@pytest.mark.parametrize(
    ("found", "supported"),
    [
        ("0.16.8", False),
        ("0.16.9", True),
        ("0.17.6+unknown", True),
        ("0.19.9+a1b2c3d", True),
        ("0.20.0", False),
        ("1.0", False),
        ("none", False),
    ],
)
def test_the_range(found: str, supported: bool) -> None:
    """A build of DeepSpeed's sources carries the commit behind the release that it is to become."""
    assert is_supported(found) is supported


def installed(folder: Path, version: str, metadata: bool) -> str:
    """A package of that name and version, and nothing in it, at the front of the path."""
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "__init__.py").write_text(f"print('imported')\n__version__ = '{version}'\n")
    if metadata:
        (folder / f"deepspeed-{version}.dist-info").mkdir()
        (folder / f"deepspeed-{version}.dist-info" / "METADATA").write_text(f"Name: deepspeed\nVersion: {version}\n")
    return f"import sys\nsys.path.insert(0, {str(folder)!r})\n"


@pytest.mark.parametrize("script", [REGISTER, INITIALIZE], ids=["register", "initialize"])
@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "sources"])
def test_an_unsupported_one_is_refused_with_the_range(script: str, metadata: bool, tmp_path: Path) -> None:
    """And is imported only where nothing else tells its version: a folder of sources has no metadata."""
    process = run(installed(tmp_path, "0.15.4", metadata) + script)
    assert process.returncode != 0
    said = process.stderr.splitlines()[-1]
    assert said.startswith("ImportError: deepspeed: got version 0.15.4; allowed: " + SUPPORTED_DEEPSPEED)
    assert process.stdout == ("" if metadata else "imported\n")


def test_one_that_is_imported_already_tells_its_own_version(tmp_path: Path) -> None:
    """Whatever metadata lies about."""
    process = run(installed(tmp_path, "0.15.4", True) + "import deepspeed\ndeepspeed.__version__ = '0.15.3'\n" + REGISTER)
    assert "ImportError: deepspeed: got version 0.15.3; allowed: " in process.stderr


def test_plain_pytorch_asks_for_no_deepspeed(tmp_path: Path) -> None:
    build = "import ds_optforge\nfrom torch import nn\nds_optforge.build_optimizer(nn.Linear(2, 2), {'name': 'adamw'})"
    process = run(installed(tmp_path, "0.15.4", True) + build)
    assert process.returncode == 0, process.stderr
    assert "imported" not in process.stdout
