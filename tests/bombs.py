"""Files that a few bytes of would fill a memory, or that reach for files beside their folder.

`tests/data/corpus` has those that are text; the others are made here. ``python -m tests.bombs FOLDER`` reads each with the
reader that users would call, within a limit of memory, and prints a line of JSON about each: its name, the error, its message.
"""

import json
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ds_optforge.checkpoint.chunks import flat_chunk
from ds_optforge.checkpoint.convert import convert
from ds_optforge.checkpoint.export import export
from ds_optforge.checkpoint.files import Checkpoint, write
from ds_optforge.checkpoint.manifest import MANIFEST, sha256_of, write_manifest
from ds_optforge.config.deepspeed import load_config
from ds_optforge.experiments.documents import Document
from ds_optforge.experiments.spec import read_sweep
from ds_optforge.forecast.skeletons import load as load_model
from ds_optforge.migrate.documents import load

CORPUS = Path(__file__).parent / "data" / "corpus"
MEMORY = 2**29  # beside what the imports have taken
TERABYTE = 2**40
EMPTY: dict[str, Any] = {"shapes": {}, "groups": {}, "block_cuts": {}, "counters": {}, "loss_scale": {}}
EMPTY |= {"scheduler": None, "client_state": {}}

Read = Callable[[], object]


class Call:
    """Is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def sparse(path: Path) -> Path:
    """A file that says it has a terabyte, and takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(TERABYTE)
    return path


def portable(folder: Path) -> Path:
    """A good checkpoint of one weight, ``a``, of ten elements."""
    write(folder, [flat_chunk("model/a", 10, 0, torch.arange(10.0))], {**EMPTY, "shapes": {"a": [10]}})
    return folder


def with_manifest(folder: Path, **other: Any) -> Path:
    """A checkpoint with other entries in its manifest, whose checksum is right."""
    manifest = json.loads((portable(folder) / MANIFEST).read_text()) | other
    del manifest["sha256"]
    write_manifest(folder / MANIFEST, manifest)
    return folder


def with_header(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """A checkpoint whose file has another header, with right checksums."""
    (path,) = portable(folder).glob("*.safetensors")
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = change(content[8 : 8 + size])
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    return with_files(folder)


def with_files(folder: Path) -> Path:
    """Write into the manifest what the files are now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in folder.glob("*.safetensors")}
    write_manifest(folder / MANIFEST, {**manifest, "files": files})
    return folder


def engine(folder: Path, states: Any) -> Path:
    folder.mkdir()
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    return folder


def packed(folder: Path) -> Path:
    """The pickle in it is 64 MiB of zeros, in 64 KiB."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "mp_rank_00_model_states.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bytes(2**26), 2))
        archive.writestr("archive/version", "3")
    return folder


def placed(folder: Path, numel: int, size: int) -> Path:
    """A checkpoint of OptForge in which a parameter has so many elements, so many of them on a rank."""
    matrix = {"parameter": 0, "start": 0, "rows": 1, "cols": numel, "transposed": False, "shards": 1, "dim": 0, "joins": None}
    placement = {"rank": 0, "world_size": numel // size, "starts": [0], "names": ["a"], "matrices": [matrix]}
    placement["cuts"] = [{"base": 0, "size": size, "offset": 0}]
    stepped = {"placement": placement, "tensors": [0], "shapes": [[numel]], "buffers": ["m"], "group": "g", "rule": "muon"}
    state = {"step": torch.tensor(1), "m": torch.zeros(8, dtype=torch.uint8), "m_absmax": torch.zeros(1)}
    groups = [{"optforge_group": "g", "params": [0]}]
    optimizer = {"optforge": [{**stepped, "statistics": []}], "state": {0: state}, "param_groups": groups}
    counters = {"global_steps": 1, "global_samples": 1, "skipped_steps": 0}
    return engine(folder, {"module": {"a": torch.zeros(8)}, "buffer_names": [], "optimizer": optimizer, **counters})


def of_text(path: Path) -> Iterator[tuple[str, Read]]:
    if path.suffix == ".json":
        yield f"{path.name} as a configuration", lambda: load_config(path)
    else:
        yield f"{path.name} as a comparison", lambda: Document.read(path)
    yield f"{path.name} as a file of init", lambda: load(path)


def of_documents(folder: Path) -> Iterator[tuple[str, Read]]:
    for path in sorted(CORPUS.iterdir()):
        yield from of_text(Path(shutil.copy(path, folder)))
    huge = sparse(folder / "huge.json")
    yield from of_text(huge)
    yield "a model", lambda: load_model(str(huge))
    grid = {f"optimizer.params.{letter}": list(range(10)) for letter in "abcdefghij"}
    content = {"out": "o", "launcher": ["true", "{config}{out}{seed}{steps}"], "steps": 1, "seeds": [0, 1]}
    (folder / "config.json").write_text(json.dumps({"optimizer": {"type": "SGD", "params": {}}}))
    content |= {"config": str(folder / "config.json"), "phases": [{"name": "all", "grid": grid}]}
    (folder / "grid.yaml").write_text(json.dumps(content))
    yield "a grid", lambda: read_sweep(folder / "grid.yaml")
    (folder / "layers.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 10**9}))
    yield "layers", lambda: load_model(str(folder / "layers.json"))


def of_portable(folder: Path) -> Iterator[tuple[str, Read]]:
    def exported(name: str, made: Path) -> tuple[str, Read]:
        return name, lambda: export(made, folder / f"out of {made.name}")

    entry = {"bytes": 3, "sha256": sha256_of(secret(folder))}
    yield exported("a file beside the folder", with_manifest(folder / "beside", files={"../secret": entry}))
    yield exported("an absolute path", with_manifest(folder / "absolute", files={str(folder / "secret"): entry}))
    linked = with_manifest(folder / "linked", files={"link.safetensors": entry})
    (linked / "link.safetensors").symlink_to(folder / "secret")
    yield exported("a link", linked)
    config = portable(folder / "config")
    (config / "config.json").symlink_to(folder / "secret")
    yield exported("a link as config.json", config)
    huge = portable(folder / "huge")
    sparse(huge / MANIFEST)
    yield exported("a huge manifest", huge)
    yield exported("a shape", with_manifest(folder / "shape", shapes={"a": [2**40, 2**20]}))
    yield exported("a shape that is none", with_manifest(folder / "none", shapes={"a": ["10"]}))
    far = with_header(folder / "far", lambda header: header.replace(rb"[0]", rb"[%d]" % 2**55))
    yield exported("a chunk far away", far)
    yield exported("a long header", with_header(folder / "long", lambda header: header[:-1] + b"[" * 2**20))
    levels = with_header(folder / "levels", lambda header: header.replace(rb"[0]", b"[" * 500 + b"]" * 500))
    yield exported("a nested header", levels)
    cut = portable(folder / "cut")
    (path,) = cut.glob("*.safetensors")
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    yield exported("the size of a header", with_files(cut))
    state = with_manifest(folder / "deep", client_state=nested(100))
    yield "a nested client_state", lambda: Checkpoint(state)


def secret(folder: Path) -> Path:
    (folder / "secret").write_text("abc")
    return folder / "secret"


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def of_engines(folder: Path) -> Iterator[tuple[str, Read]]:
    def converted(name: str, made: Path) -> tuple[str, Read]:
        return name, lambda: convert(made, folder / f"out of {made.name}")

    engine(folder / "other", {})
    for name, tag in {"up": "../other", "root": str(folder / "other")}.items():
        made = folder / name
        made.mkdir()
        (made / "latest").write_text(tag)
        yield converted(f"latest: {name}", made)
    (folder / "huge tag").mkdir()
    sparse(folder / "huge tag" / "latest")
    yield converted("latest: huge", folder / "huge tag")
    (folder / "states linked").mkdir()
    (folder / "states linked" / "mp_rank_00_model_states.pt").symlink_to(folder / "other" / "mp_rank_00_model_states.pt")
    yield converted("states: a link", folder / "states linked")
    yield converted("states: packed", packed(folder / "packed"))
    yield converted("states: bytearray", engine(folder / "bytearray", Call(bytearray, TERABYTE)))
    yield converted("states: Tensor", engine(folder / "tensor", Call(torch.Tensor, 2**26)))
    yield converted("states: repeated", engine(folder / "repeated", {"module": {"a": torch.zeros(1).expand(TERABYTE)}}))
    shape = Call(torch._utils._rebuild_tensor_v2, torch.zeros(2).storage(), 0, (TERABYTE,), (1,), False, {})
    yield converted("states: a shape", engine(folder / "shape", {"module": {"a": shape}}))
    yield converted("states: elements", placed(folder / "elements", TERABYTE, TERABYTE))
    yield converted("states: ranks", placed(folder / "ranks", TERABYTE, 1))


def main(folder: Path) -> None:
    reads: list[tuple[str, Read]] = []
    for kind in (of_documents, of_portable, of_engines):
        (folder / kind.__name__).mkdir()
        reads += kind(folder / kind.__name__)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY,) * 2)
    for name, read in reads:
        try:
            read()
            said = {"error": None, "message": ""}
        except BaseException as error:
            said = {"error": type(error).__name__, "message": str(error)[:500]}
        print(json.dumps({"name": name, **said}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
