"""What the ranks of a pool run to test the checks."""

import importlib

from ds_optforge.testing import run_check
from ds_optforge.testing.suite import CheckFailure


def finding(check: str, rule: str) -> str:
    """What a check says about one of the bad rules; "" if nothing."""
    importlib.import_module("tests.testing.bad_rules")
    try:
        run_check(check, rule)
    except CheckFailure as failure:
        return str(failure)
    return ""
