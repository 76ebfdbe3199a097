"""Memory of a rank between the passes of a step, by kind."""

from collections.abc import Mapping
from dataclasses import dataclass

from ds_optforge.forecast.forecast import Forecast, RankFigures

_MASTER = 4  # bytes of an element of the slices that ZeRO has stepped: float32


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device of the rank that holds most. Activations, ZeRO's own buckets and NCCL's buffers come on top.

    Attributes:
        parameters: the model's, and the float32 slice that is stepped.
        gradients: the model's, and the largest slice of them in float32, which ``step()`` gets.
        state: of the optimizer.
        workspace: of the optimizer's step.
    """

    parameters: int
    gradients: int
    state: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them, in bytes."""
        return self.parameters + self.gradients + self.state + self.workspace

    @property
    def gigabytes(self) -> Mapping[str, float]:
        """By kind and in total, 10^9 bytes."""
        kinds = ("parameters", "gradients", "state", "workspace", "total")
        return {kind: getattr(self, kind) / 1e9 for kind in kinds}


def memory(predicted: Forecast, model_bytes: int, state: int, workspace: int) -> Memory:
    """Return the memory of the rank with the largest slice.

    Args:
        predicted: where the parameters lie.
        model_bytes: of an element of the model: 2 in bfloat16.
        state, workspace: bytes of the optimizer.
    """
    rank = max(predicted.ranks, key=lambda each: each.slice_numel)
    stage = predicted.topology.stage
    parameters = model_bytes * (rank.slice_numel if stage == 3 else rank.model_numel) + _MASTER * rank.slice_numel
    gradients = model_bytes * (rank.slice_numel if stage > 1 else rank.model_numel) + _MASTER * rank.largest_slice_numel
    return Memory(parameters, gradients, state, workspace)


def own_memory(predicted: Forecast, model_bytes: int, exchanges: bool) -> Memory:
    """Return the memory with the optimizer that was planned; without ``exchanges`` a matrix is stepped alone."""
    workspace = _workspace if exchanges else _local_workspace
    most = max(workspace(rank) for rank in predicted.ranks)
    return memory(predicted, model_bytes, max(rank.state_bytes for rank in predicted.ranks), most)


def adamw_memory(predicted: Forecast, model_bytes: int) -> Memory:
    """Return the memory with AdamW in place of it: two float32 moments, and no workspace."""
    return memory(predicted, model_bytes, 8 * max(rank.slice_numel for rank in predicted.ranks), 0)


def _workspace(rank: RankFigures) -> int:
    return rank.workspace_bytes


def _local_workspace(rank: RankFigures) -> int:
    return rank.local_workspace_bytes
