"""Tells which DeepSpeed is there, and refuses one that is not supported."""

import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

SUPPORTED_DEEPSPEED = ">=0.16.9,<0.20"  # as in setup.cfg


def found_deepspeed() -> str:
    """Return the version of the DeepSpeed that is imported, or would be; "none" where there is none.

    DeepSpeed takes seconds to import, so its version is read from the metadata beside it, where it has any.
    """
    if "deepspeed" not in sys.modules:
        spec = find_spec("deepspeed")
        if spec is None:
            return "none"
        if spec.origin is not None:
            for distribution in distributions(name="deepspeed", path=[str(Path(spec.origin).parents[1])]):
                return distribution.version
    import deepspeed

    return str(deepspeed.__version__)


def require_supported_deepspeed() -> None:
    """Refuse a DeepSpeed outside the supported range, before anything of it is used.

    Raises:
        ImportError: there is none, or it is not supported; the message has the range and the version that was found.
    """
    found = found_deepspeed()
    if not is_supported(found):
        raise ImportError(
            f"deepspeed: got {'no installation' if found == 'none' else f'version {found}'}; allowed: {SUPPORTED_DEEPSPEED} "
            f"(pip install 'deepspeed{SUPPORTED_DEEPSPEED}')",
            name="deepspeed",
        )


def is_supported(version: str) -> bool:
    """Whether ``version`` of DeepSpeed is supported; a build of its sources counts as the release that it names."""
    return version != "none" and _in_range(version, SUPPORTED_DEEPSPEED)


def waits_for_gathers() -> bool:
    """Whether the DeepSpeed that is there waits for every all-gather of ZeRO-3's whole parameters, not only for the last.

    Up to 0.19.4 it does not, and nothing but its version tells; 0.19.5 to 0.19.7 were not looked at.
    """
    return _in_range(found_deepspeed(), ">=0.19.8")


def _in_range(version: str, allowed: str) -> bool:
    from packaging.specifiers import SpecifierSet  # which DeepSpeed needs too

    return SpecifierSet(allowed).contains(version, prereleases=True)


def versions() -> str:
    """Return a sentence for messages about something unknown in DeepSpeed: the supported range and the version found."""
    return f"ds_optforge reads the layout of DeepSpeed {SUPPORTED_DEEPSPEED}; found: {found_deepspeed()}."
