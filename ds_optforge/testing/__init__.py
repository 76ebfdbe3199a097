"""Test an update rule, also one of your own, under every ZeRO stage: `check_rule` is the whole suite in one call.

    # test_renorm.py, beside renorm.py, which registers the rule "renorm"
    from ds_optforge.testing import check_rule

    import renorm


    def test_renorm_is_exact_under_zero() -> None:
        check_rule("renorm")


    def test_renorm_with_a_slow_average() -> None:
        check_rule("renorm", {"momentum": 0.99}, ranks=3)

It starts ranks of its own, trains a small model of awkward shapes on real DeepSpeed engines in them, and raises an
AssertionError that lists every check that failed, with the rule, the check, the ZeRO stage and the numbers. It needs no test
framework, and works from a script. A suite that has ranks of its own calls `run_check` in them instead, for each of `CHECKS`.
"""

from ds_optforge.testing.launch import check_rule
from ds_optforge.testing.suite import CHECKS, run_check

__all__ = ["CHECKS", "check_rule", "run_check"]
