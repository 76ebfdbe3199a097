"""What ``ds-optforge init`` does."""

from pathlib import Path

from ds_optforge.errors import ConfigError
from ds_optforge.migrate.kinds import read
from ds_optforge.migrate.source import Purpose

NEW_FILE = "ds_optforge.json"  # the name in a diff, where --out gives none


def init(from_file: Path, purpose: Purpose | None, rule: str, out: Path | None) -> str:
    """Read the user's file, and write the OptForge configuration that continues it.

    Args:
        from_file: in one of the forms that `ds_optforge.migrate.kinds` knows.
        purpose: of the run; None takes what the file says, or else "pretrain".
        rule: of the matrices.
        out: the new file, beside which the reasons are written; None writes nothing.

    Returns:
        What to print: the reasons and what to do, after a unified diff where nothing is written.

    Raises:
        ConfigError: a file that cannot be read, or cannot be carried over, or is there already. Nothing is written then.
    """
    source = read(from_file)
    reasons_file = None if out is None else out.with_name(out.name + ".reasons.md")
    for path in (out, reasons_file):
        if path is not None and path.exists():
            raise ConfigError(f"--out: got '{out}', but {path} is there already; allowed: a new name")
    from ds_optforge.migrate.writing import difference, explanation, result_of, text_of  # torch and DeepSpeed come with it

    chosen = purpose or source.purpose or "pretrain"
    said = "--purpose" if purpose else "the file says so" if source.purpose else "the default of --purpose"
    result = result_of(source, chosen, rule)
    name = str(out or NEW_FILE)
    explained = explanation(source, result, name, chosen, said)
    if out is None or reasons_file is None:
        return f"{difference(source, result, name)}\n{explained}"
    try:
        reasons_file.write_text(explained, encoding="utf-8")
        out.write_text(text_of(result.config), encoding="utf-8")
    except OSError as error:
        for path in (reasons_file, out):
            path.unlink(missing_ok=True)
        raise ConfigError(f"--out: got '{out}' ({error.strerror}); allowed: a file that can be written") from None
    return f"{out}, {reasons_file}: written\n\n{explained}"
