"""``ds-optforge export``: a folder that ``from_pretrained`` reads, from a portable checkpoint or from what `convert` takes."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_optforge import reading
from ds_optforge.checkpoint import files
from ds_optforge.checkpoint.chunks import Chunk
from ds_optforge.checkpoint.convert import counted_on_a_bar, read, understood
from ds_optforge.checkpoint.files import Checkpoint
from ds_optforge.checkpoint.logical import buffer_name, misfits, weight_name
from ds_optforge.checkpoint.manifest import MANIFEST
from ds_optforge.errors import CheckpointError
from ds_optforge.rules.around import SCALARS, evaluated
from ds_optforge.rules.base import Rule
from ds_optforge.rules.registry import rule_settings

logger = logging.getLogger("ds_optforge")

CONFIG = "config.json"
# What from_pretrained of a model, a tokenizer or a processor reads beside the weights.
_BESIDE = (
    *(CONFIG, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "chat_template.*", "*processor_config.json"),
)
_PEFT = (".base_layer.", ".lora_", ".modules_to_save.")


class Source(Protocol):
    """Logical tensors and their manifest: of files, as `Checkpoint` reads them, or made when they are asked for."""

    manifest: dict[str, Any]

    @property
    def tensors(self) -> Mapping[str, tuple[int, torch.dtype]]:
        """Number of elements and dtype of each logical tensor, by name."""

    def whole(self, name: str) -> Tensor:
        """Return one whole logical tensor, flat."""


def export(source: Path, out: Path, dtype: torch.dtype | None = None, config: Path | None = None) -> None:
    """Write a folder that ``from_pretrained`` of transformers reads: weights in their shapes and under their names, and config.

    A parameter whose weights are averaged (Schedule-Free, or ``"average"``) is written as its average, one that is ahead
    (``"ema_nesterov"``) without its look-ahead, and tied weights once.
    ``module.``, with which every name of a wrapped model begins, and torch.compile's ``_orig_mod.`` are left out of the names.

    Args:
        source: the folder of a portable checkpoint, or anything that `convert` takes.
        out: the folder to make; it must not exist.
        dtype: data type to write trained parameters in, which config.json then names; None keeps the saved one.
        config: a folder with config.json, and perhaps the files of a tokenizer; None looks into ``source``, and beside it.

    Raises:
        CheckpointError: the checkpoint is damaged or cannot be read, or was trained by a rule that is not installed; or
            ``config`` has no config.json, or ``out`` exists or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} is there already; allowed: a new folder")
    with understood(source):
        beside = _beside(source, config)
        found: Source = _opened(source) if (source / MANIFEST).is_file() else _Converted(*read(source))
        chunks = list(_weights(source, found, dtype))
        _set_dtype(beside, {chunk.dtype for chunk in chunks if isinstance(chunk.values, _Weight) and chunk.values.rule})
        with counted_on_a_bar(chunks, "export") as counted:
            files.write_weights(out, counted, beside)


def _opened(source: Path) -> Checkpoint:
    checkpoint = Checkpoint(source)
    if problems := checkpoint.damage() or list(misfits(checkpoint)):
        raise CheckpointError("\n".join(problems))
    return checkpoint


class _Converted:
    """What `convert` would write of another checkpoint, of which each tensor is made when it is asked for."""

    def __init__(self, chunks: Iterable[Chunk], manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._chunks = {chunk.name: chunk for chunk in chunks}

    @property
    def tensors(self) -> Mapping[str, tuple[int, torch.dtype]]:
        return {name: (chunk.size[0], chunk.dtype) for name, chunk in self._chunks.items()}

    def whole(self, name: str) -> Tensor:
        values = self._chunks[name].values
        assert not isinstance(values, Tensor)
        return values()


def _weights(source: Path, found: Source, dtype: torch.dtype | None) -> Iterable[Chunk]:
    """Yield a chunk for each parameter and buffer that has any elements."""
    group_of = {name: group for group in found.manifest["groups"].values() for name in group["members"]}
    names, tensors = _plain_names(list(found.manifest["shapes"])), found.tensors
    for name, shape in found.manifest["shapes"].items():
        if weight_name(name) in tensors:
            group = group_of.get(name)
            kept = dtype if dtype is not None and group is not None else tensors[weight_name(name)][1]
            rule = _rule_of(source, group) if group else None
            make = _Weight(found, name, tuple(shape), kept, rule, group["scalars"] if group else {})
            yield Chunk(names[name], tuple(shape), (0,) * len(shape), tuple(shape), kept, make)


def _plain_names(names: list[str]) -> dict[str, str]:
    """Each name without what wrappers of the model put before it. Warns of PEFT's, which make other names of the model's."""
    plain = {name: name.replace("_orig_mod.", "") for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: inner.removeprefix("module.") for name, inner in plain.items()}
    if peft := [name for name in names if any(part in f".{name}" for part in _PEFT)]:
        logger.warning(
            "%d names are of PEFT's adapters, as '%s', which from_pretrained of the model does not read: save the merged model "
            "(merge_and_unload) or the adapters (save_pretrained) from PEFT",
            len(peft),
            peft[0],
        )
    return plain


def _rule_of(source: Path, group: Mapping[str, Any]) -> type[Rule]:
    settings = rule_settings(group["rule"])
    if settings is None:
        raise CheckpointError(
            f"{source}: was trained by the rule '{group['rule']}', which nothing here offers, and which knows whether its "
            "weights are averaged; allowed: install the package of that rule"
        )
    return settings.builds


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """Reads one weight; the average, where there is one and it has begun."""

    source: Source
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rule: type[Rule] | None
    scalars: Mapping[str, float]

    def __call__(self) -> Tensor:
        weight = self.source.whole(weight_name(self.name))
        names = {buffer: buffer_name(self.name, buffer) for buffer in (*self.rule.averages, *SCALARS)} if self.rule else {}
        buffers = {buffer: self.source.whole(name) for buffer, name in names.items() if name in self.source.tensors}
        if self.rule and buffers:
            weight = evaluated(self.rule, weight, buffers, self.scalars)
        return weight.view(self.shape).to(self.dtype)


def _beside(source: Path, config: Path | None) -> dict[str, bytes]:
    """The files to copy, by name. Warns, by the folders that were searched, where there is no config.json."""
    folders = [config] if config is not None else [source, source.parent] if source.is_dir() else [source.parent]
    for folder in folders:
        if (folder / CONFIG).is_file():
            paths = {path.name: path for pattern in _BESIDE for path in folder.glob(pattern) if path.is_file()}
            return {name: _copied(path, given=config is not None) for name, path in sorted(paths.items())}
    if config is not None:
        raise CheckpointError(f"{config}: has no {CONFIG}; allowed: the folder of a Hugging Face model")
    looked = " or ".join(map(str, folders))
    logger.warning("%s: no %s there, so from_pretrained will not read the result; --model FOLDER copies one", looked, CONFIG)
    return {}


def _copied(path: Path, given: bool) -> bytes:
    """The content of a file to copy. Links are followed in a ``given`` folder: Hugging Face's cache has them."""
    try:
        return reading.content(path if given else reading.inside(path.parent, path.name), reading.DATA_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; allowed: --config with the folder of a Hugging Face model") from None


def _set_dtype(beside: dict[str, bytes], dtypes: set[torch.dtype]) -> None:
    """Name in config.json what the trained parameters are written in, to which from_pretrained casts all of them."""
    if CONFIG in beside and len(dtypes) == 1:
        config = _object(beside[CONFIG])
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtypes.pop()).removeprefix("torch.")
        beside[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()


def _object(written: bytes) -> dict[str, Any]:
    try:
        config = reading.json_value(written)
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: not JSON ({error}); allowed: a model's {CONFIG}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{CONFIG}: got a {type(config).__name__}; allowed: an object")
    return config
