"""What a terminal shows beside the output of commands: progress with an estimate of the end, and completion in a shell."""

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ds_optforge import shipped_configs
from ds_optforge.forecast.catalog import MODEL_SHAPES

# 200 kB in a fifth of a second, of 20 MB: some twenty seconds are left.
WORK = """
import time
from ds_optforge.terminal import progress
with progress("convert", 20_000_000, in_bytes=True) as advance:
    for _ in range(5):
        time.sleep(0.2)
        advance(200_000)
    time.sleep(0.3)
print("written")
"""


def test_a_terminal_shows_how_much_is_done_and_how_long_the_rest_takes() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"COLUMNS": "120"}
    )
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 4096):
            drawn += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    output, _ = process.communicate()
    assert output == b"written\n"
    text = re.sub(r"\x1b\[[\d;?]*\w", "", drawn.decode())
    assert re.search(r"convert \S* *1\.0/20\.0 MB [\d.]+ [kM]B/s left 0:00:[123]\d", text)


def test_nothing_else_does() -> None:
    process = subprocess.run([sys.executable, "-c", WORK.replace("0.2", "0")], capture_output=True, check=True)
    assert (process.stdout, process.stderr) == (b"written\n", b"")


BASH = shutil.which("bash")
PATHS = {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}


def completed(line: str, folder: Path) -> set[str]:
    """What bash offers for the last word of ``line``, as docs/commands.md sets it up; files where that is nothing."""
    words = line.split(" ")
    script = f"""
        eval "$(register-python-argcomplete ds-optforge)"
        COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_TYPE=9 COMP_WORDS=({shlex.join(words)})
        COMP_CWORD={len(words) - 1}
        $(complete -p ds-optforge | sed 's/.*-F \\([^ ]*\\).*/\\1/') ds-optforge
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    process = subprocess.run([str(BASH), "-c", script], cwd=folder, env=os.environ | PATHS, capture_output=True, text=True)
    return {word.strip() for word in process.stdout.splitlines() if word.strip()}


@pytest.mark.skipif(BASH is None, reason="needs bash")
class TestCompletion:
    def test_commands_and_options(self, tmp_path: Path) -> None:
        assert completed("ds-optforge comp", tmp_path) == {"compare"}
        assert completed("ds-optforge check --", tmp_path) == {"--help", "--config", "--json"}

    def test_names_of_models_and_configurations(self, tmp_path: Path) -> None:
        found = completed("ds-optforge plan --model llama3", tmp_path)
        assert found == {name for name in MODEL_SHAPES if name.startswith("llama3")}
        found = completed("ds-optforge configs muon_zero", tmp_path)
        assert found == {name for name in shipped_configs.names() if name.startswith("muon_zero")}

    def test_files_for_a_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "mine.json").touch()
        assert completed("ds-optforge check --config mi", tmp_path) == {"mine.json"}
