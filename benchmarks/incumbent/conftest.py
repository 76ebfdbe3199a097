"""The warm pools of tests/distributed."""

from tests.distributed.conftest import pool1, pool2, pool3, pool4, pools

__all__ = ["pool1", "pool2", "pool3", "pool4", "pools"]
