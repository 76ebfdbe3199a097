"""What happens to shards beside their orthogonalization."""

import logging

import pytest
import torch

from ds_optforge.step.bind import warn_of_thin_fragments
from ds_optforge.step.fragments import scale_to
from ds_optforge.zero.partition import Cut, Matrix, PartitionLayout


def layout(rows: int, ranks: int) -> PartitionLayout:
    """Two (rows, 10) matrices, as ZeRO-3 cuts them."""
    cut = Cut(0, 10 * rows // ranks, 0)
    return PartitionLayout(ranks, ("first", "second"), (cut, cut), (Matrix(0, 0, rows, 10), Matrix(1, 0, rows, 10)))


@pytest.mark.parametrize(("rows", "ranks", "warns"), [(128, 4, False), (124, 4, True), (20, 1, False), (20, 2, True)])
def test_shards_of_few_rows_are_told_once(rows: int, ranks: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    """32 rows are enough, and a matrix that has fewer is not made thinner by lying whole on a rank."""
    found = layout(rows, ranks)
    with caplog.at_level(logging.WARNING):
        for rank in range(ranks):
            warn_of_thin_fragments(found, list(found.fragments(rank)), rank)
    messages = [record.getMessage() for record in caplog.records]
    expected = f"shard_local: 2 of 2 matrices have fewer than 32 whole rows on this rank (first[0:{10 * rows}]"
    assert [message.startswith(expected) for message in messages] == [True] * warns


def test_a_shard_without_gradient_gets_no_update() -> None:
    """However large its norm would be."""
    updates = [torch.zeros(500, dtype=torch.bfloat16), torch.full((400,), 0.5, dtype=torch.bfloat16)]
    scale_to(updates, torch.tensor([100.0, 40.0]))
    assert not updates[0].any()
    torch.testing.assert_close(updates[1], torch.full((400,), 2.0, dtype=torch.bfloat16))
