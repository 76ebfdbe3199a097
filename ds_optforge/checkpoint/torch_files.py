"""Files of torch.save, read without running code from them, and in no more memory than a few times their size.

They are opened with ``weights_only`` and mapped, not read, so that a tensor is in memory only while it is used. That leaves
ways for a few bytes to ask for all memory: compressed records, calls that make a tensor of any size, tensors that repeat
their values. What torch.save writes of a model and its optimizer has none of these, so they are refused.
"""

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optforge.errors import CheckpointError
from ds_optforge.reading import DATA_BYTES
from ds_optforge.zero.engine import safe_classes

# What torch.save names in a pickle of plain values, tensors and DeepSpeed's classes. Torch itself allows a few more, of which
# bytearray(n) fills memory by a number in the file.
_NAMED = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) (set|complex|getattr)|_codecs encode"
    r"|torch (Tensor|(?!\w*Tensor$)\w+)|torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2"
    r"|torch\._utils _rebuild_(tensor_v2|parameter|parameter_with_state)|deepspeed\..*"
)


def load(path: Path) -> Any:
    """Open a file of torch.save, mapped into memory, without running code from it.

    Raises:
        CheckpointError: the file cannot be read, or only by running code from it, or by more memory than it has bytes.
    """
    try:
        _refuse_packed(path)
        with safe_classes():
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        _refuse_larger(list(_tensors(found)), path.stat().st_size)
    except Exception as error:  # torch lets any through that a damaged pickle makes Python raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None
    return found


def _refuse_packed(path: Path) -> None:
    """Raise ValueError for records larger than the file, and for a pickle with calls that torch.save does not write."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if packed := [record for record in records if record.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"its record {packed[0].filename!r} is compressed; allowed: what torch.save wrote")
        pickles = [record for record in records if record.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > min(DATA_BYTES, path.stat().st_size):
            raise ValueError(f"has no record data.pkl of at most {DATA_BYTES} bytes; allowed: what torch.save wrote")
        for operation, named, _ in pickletools.genops(archive.read(pickles[0])):
            if operation.name == "GLOBAL" and not _NAMED.fullmatch(str(named)):
                raise ValueError(f"names {str(named).replace(' ', '.')!r}; allowed: tensors, plain values, DeepSpeed's classes")


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield every tensor inside dicts, lists, tuples and attributes, once."""
    seen: set[int] = set()
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, str | int | float | None) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
        left += getattr(value, "__dict__", {}).values()


def _refuse_larger(tensors: Sequence[Tensor], limit: int) -> None:
    """Raise ValueError for tensors that repeat their values, and for values that are not those of a file of ``limit`` bytes."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        held = tensor.untyped_storage()
        storages[held.data_ptr()] = held.nbytes()
        if tensor.numel() * tensor.itemsize > held.nbytes():
            raise ValueError(f"has a tensor of shape {list(tensor.shape)} with {held.nbytes()} bytes of values")
    if sum(storages.values()) > limit:
        raise ValueError(f"has tensors of {sum(storages.values())} bytes in a file of {limit} bytes")


def address(tensor: Tensor) -> tuple[int, int]:
    """A key that is equal for tensors in the same memory, as tied weights of a file are."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
