"""Measure the validation loss where a step updates some rows of each matrix (``sharding.rows``), beside gathering rarely.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/rows.py [--steps 100] [--seeds 3] [--quick] [--out DIR]

As benchmarks/modes.py, whose model, batches and schedule these are. Which rows are chosen does not depend on the ranks; what
``gather_every`` does, does. Writes rows_RANKS.json and a picture.
"""

from typing import Any

from deepspeed import comm
from modes import run

PLAIN = {"nesterov": False}
MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole, no Nesterov": PLAIN,
    "rows 0.5": {**PLAIN, "sharding": {"rows": 0.5}},
    "rows 0.25": {**PLAIN, "sharding": {"rows": 0.25}},
    "gather every 4": {"sharding": {"mode": "shard_local", "gather_every": 4}},
}


if __name__ == "__main__":
    run("rows", MODES, __doc__)
    comm.destroy_process_group()  # a rank that leaves it open sometimes aborts at its end
