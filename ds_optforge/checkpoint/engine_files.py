"""The files of ``engine.save_checkpoint``: which they are, and what is in them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_optforge import reading
from ds_optforge.checkpoint.chunks import Chunk
from ds_optforge.checkpoint.layer_files import base_state, stages
from ds_optforge.checkpoint.manifest import MANIFEST
from ds_optforge.checkpoint.torch_files import load
from ds_optforge.errors import CheckpointError
from ds_optforge.zero.engine import LOSS_SCALE

_MODEL_FILES, _OPTIMIZER_FILES, _LAYER_FILES = "*_model_states.pt", "*_optim_states.pt", "layer_*-model_states.pt"
_TENSOR_RANK = re.compile(r"mp_rank_0*[1-9]")  # another than the first
_TAG_BYTES = 4096  # of the file that names a folder
_SLICES = ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups", "fp32_groups_flat")

# The entries of a file of model states that are DeepSpeed's; the rest is the user's.
_OF_DEEPSPEED = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"),
    *("lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps", "global_steps"),
    *("global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version", "universal_checkpoint_info"),
    *("checkpoint_parallel_dimensions", "num_experts", "ds_autoep_layers", "folding"),
}


@dataclass(slots=True, eq=False)
class Found:
    """The content of the files read so far, from which the portable checkpoint is written.

    Attributes:
        chunks: chunks of flat logical tensors, of all ranks; the same chunk may come twice.
        copies: chunks of weights that an earlier stage of a pipeline has too, which must be the same.
        shapes: the shape of each parameter and buffer of the model, by name.
        groups, block_cuts: entries of the manifest.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[Chunk] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    block_cuts: dict[str, list[int]] = field(default_factory=dict)

    def add_members(self, group: str, rule: str, step: int, members: Iterable[str]) -> None:
        """Enter parameters of another optimizer into a group of the manifest, which the first call for it makes."""
        made = {"rule": rule, "step": step, "scalars": {}, "hyperparameters": {}, "members": []}
        self.groups.setdefault(group, made)["members"] += members


@dataclass(frozen=True, slots=True, eq=False)
class EngineCheckpoint:
    """The files of one ``engine.save_checkpoint``; of a pipeline, those of one stage.

    Attributes:
        folder: of the files.
        models: model states, by rank on ZeRO-3; else those of rank 0.
        shards: state dicts of the optimizer, by rank.
    """

    folder: Path
    models: Sequence[Mapping[str, Any]]
    shards: Sequence[Mapping[str, Any]]

    @property
    def model(self) -> Mapping[str, Any]:
        """The model states of rank 0."""
        first: Mapping[str, Any] = self.models[0]
        return first

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the folder: no parameter has more elements."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    @property
    def client_state(self) -> dict[str, Any]:
        """What the user gave to engine.save_checkpoint, which lies beside DeepSpeed's own entries."""
        return {key: value for key, value in self.model.items() if key not in _OF_DEEPSPEED}

    def optimizer(self, shard: int) -> Mapping[str, Any]:
        """The state dict of the optimizer under DeepSpeed's wrapper, as the rank ``shard`` saved it."""
        return base_state(self.shards[shard])

    def slices(self, shard: int) -> list[Tensor]:
        """The flat float32 tensors that the optimizer of a rank steps; empty where it steps the model's own."""
        found: Sequence[Any] = next((self.shards[shard][key] for key in _SLICES if key in self.shards[shard]), [])
        return [tensor for entry in found for tensor in (entry if isinstance(entry, list) else [entry])]

    @property
    def loss_scale(self) -> dict[str, Any]:
        """The state of a dynamic loss scale, with the keys of `ds_optforge.zero.engine.loss_scale`; empty without one."""
        shard = self.shards[0]
        scaler = shard.get("loss_scaler")
        dynamic = scaler.dynamic if scaler is not None else shard.get("dynamic_loss_scale", False)
        values = vars(scaler) if scaler is not None else shard
        return {key: values[key] for key in LOSS_SCALE if key in values} if dynamic else {}


def open_checkpoint(folder: Path) -> list[EngineCheckpoint]:
    """Open the files of one ``engine.save_checkpoint``: one checkpoint, or one per stage of a pipeline.

    Args:
        folder: the folder that was saved to (its file ``latest`` names the tag), or a tag's folder in it.

    Raises:
        CheckpointError: the folder holds no such checkpoint, or experts of a DeepSpeed MoE layer, or a file that cannot be
            read without running code from it, or not all files of a pipeline.
    """
    inside = _tagged(folder)
    if experts := sorted(inside.glob("layer_*_expert_*")):
        raise CheckpointError(f"{experts[0]}: holds an expert of a DeepSpeed MoE layer; allowed: models without them")
    models, shards = (_opened(inside.glob(pattern)) for pattern in (_MODEL_FILES, _OPTIMIZER_FILES))
    if (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: is a portable checkpoint already, which load_checkpoint and 'export' take as it is")
    if not models:
        raise CheckpointError(
            f"{folder}: has neither a file 'latest' nor {_MODEL_FILES}; allowed: what engine.save_checkpoint wrote"
        )
    if layers := _opened(inside.glob(_LAYER_FILES)):
        return [EngineCheckpoint(inside, *stage) for stage in stages(models, shards, layers)]
    if cut := sorted(path for path in models if _TENSOR_RANK.search(path.name)):
        raise CheckpointError(
            f"{cut[0]}: holds shards of tensor parallelism; allowed: whole parameters (ds_optforge.save_checkpoint from the "
            "run itself writes a checkpoint that resumes and exports anywhere)"
        )
    _refuse_autoep(*next(iter(models.items())))
    of_ranks = list(models.values())
    states = [shard["optimizer_state_dict"] for shard in shards.values()] or [of_ranks[0]["optimizer"]]  # the latter on stage 0
    return [EngineCheckpoint(inside, of_ranks, states)]


def _tagged(folder: Path) -> Path:
    """The folder that ``latest`` names, or the one that was given."""
    latest = folder / "latest"
    try:
        return reading.inside(folder, reading.text(latest, _TAG_BYTES).strip()) if latest.is_file() else folder
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{latest}: {error}; allowed: the name of a folder beside it") from None


def _opened(paths: Iterable[Path]) -> dict[Path, Any]:
    """The content of files, sorted by the numbers in their names."""
    found = sorted(paths, key=lambda path: [int(word) for word in re.split(r"[_-]", path.stem) if word.isdigit()])
    return {path: load(_of_folder(path)) for path in found}


def _of_folder(path: Path) -> Path:
    try:
        return reading.inside(path.parent, path.name)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; allowed: files of the folder itself") from None


def _refuse_autoep(path: Path, model: Mapping[str, Any]) -> None:
    """Raise CheckpointError for AutoEP's experts on ZeRO-3, where each rank's files hold its own under the names of all."""
    ranks = max((layer["ep_size"] for layer in model.get("ds_autoep_layers") or ()), default=1)
    if ranks > 1:
        raise CheckpointError(
            f"{path}: holds one of {ranks} ranks' experts (expert_parallel.autoep_size); allowed: models whose ranks hold all "
            "experts (autoep_size 1)"
        )
