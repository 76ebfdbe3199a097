"""Write the examples of planning.md, by running their commands.

    python docs/planning_examples.py

Rewrites what follows the command in each block that a comment `<!-- plan -->` marks: what it prints above its table of ranks.
"""

import contextlib
import io
import os
import re
from pathlib import Path

from ds_optforge.cli import main

PAGE = Path(__file__).parent / "planning.md"
_BLOCK = re.compile(r"(<!-- plan -->\n```console\n)(\$ ds-optforge (plan [^\n]*)\n).*?(^```$)", re.DOTALL | re.MULTILINE)


def printed(command: str) -> str:
    """Return what ``ds-optforge COMMAND`` prints, without its table of ranks and what follows, run in the repository."""
    output = io.StringIO()
    before = os.getcwd()
    os.chdir(PAGE.parents[1])
    try:
        with contextlib.redirect_stdout(output):
            main(command.split())
    finally:
        os.chdir(before)
    lines = output.getvalue().splitlines()
    end = next((number for number, line in enumerate(lines) if line.startswith("┃ rank ")), len(lines) + 1) - 1
    return "".join(f"{line.rstrip()}\n" for line in lines[:end])


def rewritten(text: str) -> str:
    """Return the page with every example made anew."""
    return _BLOCK.sub(lambda found: found[1] + found[2] + printed(found[3]) + found[4], text)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
