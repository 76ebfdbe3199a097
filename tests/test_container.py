"""The Containerfile, as far as it can be tried without a container: what it copies builds the wheel, with our versions."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TEXT = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (ROOT / "Containerfile").read_text(encoding="utf-8"), flags=re.MULTILINE))
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PINS = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", CONSTRAINTS, re.MULTILINE)}
# Of the repository, into the first stage.
COPIED = [source for line in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.MULTILINE) for source in line.split()]


def test_every_source_is_there() -> None:
    assert len(COPIED) == 9
    assert [source for source in COPIED if not (ROOT / source).exists()] == []


def test_python_is_one_that_the_package_is_for() -> None:
    versions = set(re.findall(r"^FROM python:([\d.]+)-slim", TEXT, re.MULTILINE))
    (version,) = versions
    assert version in SpecifierSet(SETUP["options"]["python_requires"])
    assert f"Programming Language :: Python :: {version}\n" in SETUP["metadata"]["classifiers"] + "\n"


def test_everything_is_installed_with_our_versions() -> None:
    """torch is named with its version, and pip takes all others from constraints.txt, which has one for each."""
    installs = re.findall(r"pip install --no-cache-dir (.+?)(?: &&|$)", TEXT, re.MULTILINE)
    assert len(installs) == 3
    assert all(re.match(r"-c (/tmp/)?constraints\.txt ", each) for each in installs)
    named = re.findall(r"(?<= )[a-z][\w.-]+(?:==[\d.]+)?(?= |$)", " ".join(installs).replace("constraints.txt", ""))
    assert {canonicalize_name(Requirement(name).name) for name in named} <= PINS
    (torch,) = re.findall(r"torch==[\d.]+", TEXT)
    assert f"\n{torch}\n" in CONSTRAINTS


@pytest.mark.filterwarnings("ignore")
def test_what_it_copies_builds_the_wheel(tmp_path: Path) -> None:
    for source in COPIED:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / source, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, tmp_path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "dist").glob("ds_optforge-*.whl"))) == 1
