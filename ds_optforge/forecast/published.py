"""Overheads that others have published, to compare a prediction with. Each with its source."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """One published figure.

    Attributes:
        figure: what was measured.
        source: by whom, where.
    """

    figure: str
    source: str


PUBLISHED = (
    Published(
        "Muon +1.7, +2.1 and +3.4% of a step over AdamW, on 16 nodes; exchanges hidden behind the passes, products of "
        "symmetric matrices at half cost",
        "dmuon, arXiv 2606.27153",
    ),
    Published(
        "Newton-Schulz 2 to 17% of the wall time, by batch, ranks and parallelism",
        "Zhang et al. 2026, dao-lab.ai/blog/2026/gram-newton-schulz",
    ),
    Published(
        "the optimizer's step 632 and 356 ms before, 157 ms after sharding whole layers, on 32 GB300",
        "NVIDIA Megatron-LM, pull requests 6676 and 6683",
    ),
)
