"""Bytes that a step holds beside weights, gradients and state: exchanges in flight, a local bucket, temporary tensors.

On a CPU a few matrices are orthogonalized at a time, and temporary tensors count as one matrix. On an accelerator it is a batch
of matrices, up to a whole bucket, and everything elementwise takes portions as large.
"""

from collections import Counter
from collections.abc import Sequence
from math import prod

import torch

from ds_optforge.forecast.exchange_sizes import ExchangeSizes
from ds_optforge.orthogonalize import accurate_method, coefficient_set, gram_dtype, uses_gram
from ds_optforge.rules.base import MatrixRule
from ds_optforge.rules.muon import Muon, Orthogonalization
from ds_optforge.step.slices import chunk_numel
from ds_optforge.zero.partition import Matrix
from ds_optforge.zero.plan import ExchangePlan

_FLOAT = 4


def workspaces(rule: MatrixRule, plan: ExchangePlan, sizes: Sequence[ExchangeSizes], wire_bytes: int, device: str) -> list[int]:
    """Return the bytes of each rank.

    Args:
        rule: of the group.
        plan: of the group.
        sizes: of its exchanges.
        wire_bytes: of an element that travels.
        device: type of the ranks' devices.
    """
    layout = plan.layout
    number_of = {matrix: number for number, exchange in enumerate(plan.exchanges) for matrix in exchange}
    local, largest_local, largest, temporary = ([0] * layout.world_size for _ in range(4))
    # By owner, shape, and exchange (-1 for none): what may be in one batch.
    together: Counter[tuple[int, Matrix, int]] = Counter()
    teams = {team.matrix: team for team in plan.teams}
    for index, (matrix, owner) in enumerate(zip(layout.matrices, plan.owners, strict=True)):
        if index in teams:  # whose members have the whole matrix beside their block of it
            for rank in teams[index].ranks:
                largest[rank] = max(largest[rank], matrix.numel)
                held = wire_bytes * matrix.numel + temporaries(rule, matrix, wire_bytes, device)
                temporary[rank] = max(temporary[rank], held)
            continue
        number = number_of.get(index, -1)
        largest[owner] = max(largest[owner], matrix.numel)
        together[owner, _alike(matrix), number] += 1
        if number < 0:
            local[owner] += matrix.numel
            largest_local[owner] = max(largest_local[owner], matrix.numel)
    numel = plan.local_numel(device)
    for (owner, matrix, number), count in together.items():
        count = min(count, max(numel // matrix.numel, 1))
        held = wire_bytes * matrix.numel if number >= 0 else 0  # assembled of its fragments
        found = count * (held + temporaries(rule, matrix, wire_bytes, device))
        temporary[owner] = max(temporary[owner], found)
    result = []
    for rank in range(layout.world_size):
        bucket = max(min(local[rank], numel), largest_local[rank])
        sent = max((size.sends[rank] for size in sizes), default=0)
        scratch = scratch_bytes(max(sent, bucket), device)
        beside = wire_bytes * largest[rank] if device == "cpu" else max(temporary[rank], scratch)
        result.append(wire_bytes * (_in_flight(sizes, rank) + bucket) + beside)
    return result


def scratch_bytes(numel: int, device: str) -> int:
    """Return the bytes of directions or updates in float32 of a portion of a bucket of ``numel`` elements."""
    return _FLOAT * min(numel, chunk_numel(torch.device(device)))


def _alike(matrix: Matrix) -> Matrix:
    """The same for all matrices of one shape."""
    return Matrix(0, 0, matrix.rows, matrix.cols, matrix.transposed, joins=matrix.joins)


def _in_flight(sizes: Sequence[ExchangeSizes], rank: int) -> int:
    """Elements of one exchange that returns, one that is orthogonalized in its receive buffer, and one that is collected.

    Done, the second one returns too.
    """
    both = [0, *(size.sends[rank] + size.receives[rank] for size in sizes), 0]
    received = [size.receives[rank] for size in sizes]
    under_way = (max(both[k] + now + both[k + 2], both[k + 1] + both[k + 2]) for k, now in enumerate(received))
    return max(under_way, default=0)


def temporaries(rule: MatrixRule, matrix: Matrix, wire_bytes: int, device: str) -> int:
    """Return the most bytes that `update` holds beside each matrix of a batch; of a rule that is not known, those of a copy.

    Args:
        rule: of the group.
        matrix: one of the batch.
        wire_bytes: of an element in which it arrived.
        device: type of the device.
    """
    if not isinstance(rule, Muon):
        return _FLOAT * matrix.numel
    rows, cols = matrix.part_shape
    size = rule.orthogonalization.dtype.itemsize
    most = orthogonalization_bytes(rule.orthogonalization, rows, cols, device)
    if size != wire_bytes:  # a copy in its own dtype
        most += size * rows * cols
    if rule.statistics:  # the factor and its square in float32
        most = max(most, 2 * _FLOAT * rows * cols)
    if rule.factors:  # a copy of all, and either the directions on their way or L A, its columns in order, Q and R of one side
        own = sum(prod(matrix.factor(factor.of)[1:]) for factor in rule.factors)
        most += _FLOAT * (own + rows * cols + max(2 * rows * cols, 4 * max(rows, cols) ** 2))
    return matrix.parts * most


def orthogonalization_bytes(own: Orthogonalization, rows: int, cols: int, device: str) -> int:
    """Return the most bytes that orthogonalizing a (rows, cols) matrix allocates on an accelerator, the result included."""
    chosen = coefficient_set(own.coefficients)
    steps = len(chosen.sequence(own.steps))
    narrow = gram_dtype(own.dtype, device)
    n, long = min(rows, cols), rows * cols
    size = own.dtype.itemsize
    if not uses_gram(rows, cols, steps, accurate_method(own.method, steps, narrow, chosen.steep)):
        return size * (long * (2 - steps % 2) + 2 * n * n)  # a second buffer for an even number; X X^T, and the polynomial
    # The result, X, and X after a restart or before it is rounded; R, Z, Q, and two products on their way to the next R.
    if narrow != own.dtype:
        return size * max(2 * long + (5 if steps > 3 else 4) * n * n, 3 * long + 3 * n * n)
    return size * ((1 + (steps > 2) + (steps > 5)) * long + (5 if steps > 3 else 4) * n * n)
