"""What the documentation site needs beside the pages: pages from the root, and links that leave the pages as text.

mkdocs.yml names this file; mkdocs calls the functions by their names.
"""

import re
from typing import Any

from mkdocs.structure.files import File, Files

_INTO_DOCS = re.compile(r"\]\(docs/")
_OF_THE_ROOT = re.compile(r"\[([^\]]+)\]\((?!docs/)[\w.]+\)")  # CONTRIBUTING.md, say


def on_files(files: Files, config: Any) -> Files:
    """Add CHANGELOG.md and SECURITY.md of the repository's root as pages."""
    for name in ("CHANGELOG.md", "SECURITY.md"):
        with open(name, encoding="utf-8") as file:
            content = _OF_THE_ROOT.sub(r"\1", file.read())
        files.append(File.generated(config, name.lower(), content=_INTO_DOCS.sub("](", content)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leave the text of links to files of the repository, which the site does not have: they lead up and out of the pages."""
    up = page.file.src_uri.count("/") + 1
    return re.sub(rf"\[([^\]]+)\]\((?:\.\./){{{up}}}[^)]+\)", r"\1", markdown)
