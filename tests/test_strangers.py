"""Files from strangers are read, or refused by name, in bounded memory; SECURITY.md says which and where.

`tests/bombs.py` makes files that mean harm. Damage and nonsense are made here, by hypothesis, of files that were saved once:
`tests/data/checkpoints` and `tests/data/init`.
"""

import contextlib
import copy
import json
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_optforge import CheckpointError, ConfigError
from ds_optforge.checkpoint.chunks import flat_chunk
from ds_optforge.checkpoint.convert import convert
from ds_optforge.checkpoint.export import export
from ds_optforge.checkpoint.files import Checkpoint, write
from ds_optforge.checkpoint.manifest import MANIFEST, plain, write_manifest
from ds_optforge.checkpoint.random_states import saved_random_states
from ds_optforge.checkpoint.torch_files import load
from ds_optforge.config.deepspeed import check, load_config
from ds_optforge.experiments.documents import Document
from ds_optforge.experiments.launching import read_record
from ds_optforge.experiments.live import last_row
from ds_optforge.experiments.run_files import read_rows, read_summary
from ds_optforge.migrate import kinds
from tests.bombs import CORPUS, EMPTY, nested, with_files
from tests.test_config_fuzz import JSON, change

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
ALLOWED = {"ConfigError", "CheckpointError"}
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# --------------------------------------------------------------------------------------------------- files that mean harm


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of every bomb, read in one process with 512 MiB beside what its imports take."""
    folder = tmp_path_factory.mktemp("bombs")
    command = [sys.executable, "-m", "tests.bombs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not (ROOT / "owned").exists()
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]


@pytest.mark.promise("files-from-strangers")
def test_a_file_that_means_harm_is_an_error_that_names_it_in_bounded_memory(refusals: list[dict[str, Any]]) -> None:
    assert len(refusals) > 2 * len(list(CORPUS.iterdir()))
    for refused in refusals:
        assert refused["error"] in ALLOWED, refused
        assert "/bombs" in refused["message"], refused  # the folder that all of them are in


# What the message says, for those that something else than their kind of harm might stop.
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aliases.yaml as a comparison", "has more than 100000 values, with what aliases repeat written out"),
        ("merges.yaml as a file of init", "has more than 100000 values, with what aliases repeat written out"),
        ("levels.json as a configuration", "is nested more than 64 levels deep"),
        ("number.yaml as a comparison", "has a number of 4002 digits; allowed: 240"),
        ("huge.json as a configuration", "has more than 1048576 bytes"),
        ("a grid", "got 10000000000 experiments; allowed: 10000"),
        ("layers", "num_hidden_layers: got 1000000000; allowed: 4096"),
        ("a file beside the folder", "../secret: leads out of"),
        ("an absolute path", "leads out of"),
        ("a link", "link.safetensors: leads out of"),
        ("a link as config.json", "config.json: leads out of"),
        ("a huge manifest", "has more than 268435456 bytes"),
        ("a shape", "'a' has 10 elements; allowed: 1152921504606846976, of the shape [1099511627776, 1048576]"),
        ("a shape that is none", "shapes.a[0]: got '10' (str); allowed: a whole number"),
        ("a chunk far away", "the files hold some elements of 'model/a' twice, or not at all"),
        ("latest: up", "leads out of"),
        ("latest: root", "leads out of"),
        ("states: a link", "leads out of"),
        ("states: packed", "its record 'archive/data.pkl' is compressed"),
        ("states: bytearray", "names '__builtin__.bytearray'"),
        ("states: Tensor", "has tensors of 268435456 bytes in a file of"),
        ("states: repeated", "has a tensor of shape [1099511627776] with 4 bytes of values"),
        ("states: elements", "says that 'a' has 1099511627776 elements"),
        ("states: ranks", "says that 'a' has 1099511627776 elements"),
    ],
)
def test_the_error_says_what_is_wrong(name: str, said: str, refusals: list[dict[str, Any]]) -> None:
    (message,) = [refused["message"] for refused in refusals if refused["name"] == name]
    assert said in message


def test_what_could_not_be_read_again_is_not_saved() -> None:
    assert plain(nested(60), "client_state") == nested(60)
    with pytest.raises(CheckpointError, match="client_state cannot be saved: is nested more than 64 levels deep"):
        plain(nested(70), "client_state")
    itself: dict[str, Any] = {}
    itself["a"] = itself
    with pytest.raises(CheckpointError, match="client_state cannot be saved: Circular reference"):
        plain(itself, "client_state")
    generator = 2**127 + 1  # numpy's generators have numbers of 128 bits
    assert plain({"state": generator}, "client_state") == {"state": generator}


def test_random_states_are_tried_out_before_anything_changes(tmp_path: Path) -> None:
    write(tmp_path / "saved", [flat_chunk("random/0/numpy", 3, 0, torch.tensor(list(b"[1]"), dtype=torch.uint8))], EMPTY)
    with pytest.raises(CheckpointError, match="saved: random/0 is no random state"):
        saved_random_states(Checkpoint(tmp_path / "saved"), 0)


# ------------------------------------------------------------------------------------------------- damaged text

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "remove", "double"]),
        st.floats(0, 1),
        st.floats(0, 0.2),
        st.sampled_from(list(b'{}[]:,"-!&*<>0x\n \xff\x00')),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, float, float, int]]) -> bytes:
    for how, where, length, byte in edits:
        start = int(where * len(content))
        end = start + 1 + int(length * len(content))
        middle = {"replace": bytes([byte]), "remove": b"", "double": content[start:end] * 2}[how]
        content = content[:start] + middle + content[(start + 1 if how == "replace" else end) :]
    return content


def refused_by_name(path: Path, read: Callable[[], object]) -> None:
    """Whatever it holds: it is read, or the error is ours and names the path."""
    message = str(path)
    try:
        read()
    except (ConfigError, CheckpointError) as error:
        message = str(error)
    assert str(path) in message


SOURCES = sorted(path for path in (DATA / "init").iterdir() if path.is_file())


@FUZZ
@given(st.sampled_from(SOURCES), EDITS)
def test_a_damaged_file_of_init(tmp_path_factory: pytest.TempPathFactory, source: Path, edits: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / source.name
    path.write_bytes(edited(source.read_bytes(), edits))
    refused_by_name(path, lambda: kinds.read(path))


@FUZZ
@given(st.sampled_from(sorted((ROOT / "ds_configs").glob("*.json"))), EDITS)
def test_a_damaged_configuration(tmp_path_factory: pytest.TempPathFactory, source: Path, edits: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / source.name
    path.write_bytes(edited(source.read_bytes(), edits))
    refused_by_name(path, lambda: load_config(path))


DOCUMENT = b"""out: &o runs/first
launcher: [python, train.py, --config, "{config}", --out, "{out}", --seed, "{seed}", --steps, "{steps}"]
seeds: [0, 1, 2]
steps: 1_000
base: &base {lr: 1e-3, changes: {optimizer.params.lr: 0x10, when: 2001-01-01}}
runs:
  muon: {<<: *base, config: a.json}
  adamw: {<<: [*base, {lr: .5}], config: *o}
"""


@FUZZ
@given(EDITS)
def test_a_damaged_comparison(tmp_path_factory: pytest.TempPathFactory, edits: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / "file.yaml"
    path.write_bytes(edited(DOCUMENT, edits))
    refused_by_name(path, lambda: Document.read(path))


@FUZZ
@given(JSON, EDITS)
def test_what_runs_leave_behind(tmp_path_factory: pytest.TempPathFactory, value: Any, edits: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    row = json.dumps(value).encode()
    (folder / "record.json").write_bytes(row)
    (folder / "summary.json").write_bytes(edited(row, edits))
    (folder / "metrics.jsonl").write_bytes(row + b"\n" + edited(row + b"\n", edits))
    refused_by_name(folder, lambda: read_record(folder))
    assert isinstance(last_row(folder), dict)
    assert all(isinstance(found, dict) for found in read_rows(folder))
    with contextlib.suppress(ValueError):  # which `measure` and `judged` catch
        assert isinstance(read_summary(folder), dict)


# ------------------------------------------------------------------------------------------------- changed checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks: a portable one, and engine checkpoints on ZeRO-0 to ZeRO-3, in float32 and in 8 bits."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("muon", "adamw_8bit"):
        with tarfile.open(DATA / "checkpoints" / f"{name}.tar.xz") as archive:
            archive.extractall(folder / name, filter="data")
    return folder


def copied(source: Path, folder: Path) -> Path:
    """Links to the files, of which any can be replaced."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).hardlink_to(path)
    return folder


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


VALUES = JSON | st.sampled_from([torch.zeros(3), torch.zeros(0), torch.zeros((), dtype=torch.int8), 2**62, -1, [0], {}])
WAYS = st.lists(st.integers(0, 99), min_size=1, max_size=8)
CHANGES = st.lists(
    st.tuples(WAYS, st.sampled_from(["replace", "remove", "add"]), st.text(max_size=3), VALUES),
    min_size=1,
    max_size=2,
)


def changed(content: Any, changes: list[tuple[list[int], str, str, Any]]) -> Any:
    content = copy.deepcopy(content)
    for numbers, how, key, value in changes:
        change(content, tuple(place(content, numbers)), how, key, value)
    return content


def place(content: Any, numbers: list[int]) -> Iterator[str | int]:
    """The way down to a value, as deep as there are numbers, each of which chooses one of what is there."""
    for number in numbers:
        keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
        if not keys:
            return
        yield (key := keys[number % len(keys)])
        content = content[key]


@FUZZ
@given(CHANGES)
def test_a_changed_manifest_with_the_right_checksum(saved: Path, tmp_path_factory: Any, changes: Any) -> None:
    folder = tmp_path_factory.mktemp("changed")
    source = copied(saved / "muon" / "zero2" / "portable", folder / "saved")
    manifest = json.loads((source / MANIFEST).read_text())
    del manifest["sha256"]
    try:
        content = plain(changed(manifest, changes), "it")
    except CheckpointError:
        return  # a tensor is no JSON
    (source / MANIFEST).unlink()
    write_manifest(source / MANIFEST, content)
    refused_by_name(folder, lambda: export(source, folder / "out"))


@FUZZ
@given(EDITS)
def test_a_damaged_header_with_the_right_checksum(saved: Path, tmp_path_factory: Any, edits: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    source = copied(saved / "muon" / "zero2" / "portable", folder / "saved")
    path = min(source.glob("*.safetensors"))
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = edited(content[8 : 8 + size], edits)
    replaced(path, struct.pack("<Q", len(header)) + header + content[8 + size :])
    replaced(source / MANIFEST, (source / MANIFEST).read_bytes())  # no longer the same file as that of `saved`
    refused_by_name(folder, lambda: export(with_files(source), folder / "out"))


def engines(saved: Path) -> Iterator[Path]:
    for name in ("muon", "adamw_8bit"):
        yield from (saved / name / stage / "engine" / "global_step5" for stage in ("zero0", "zero2", "zero3"))


@FUZZ
@given(st.integers(0, 5), st.integers(0, 3), CHANGES)
def test_a_changed_engine_checkpoint(saved: Path, tmp_path_factory: Any, which: int, file: int, changes: Any) -> None:
    folder = tmp_path_factory.mktemp("changed")
    source = copied(list(engines(saved))[which], folder / "saved")
    files = sorted(source.iterdir())
    path = files[file % len(files)]
    content = changed(load(path), changes)
    path.unlink()
    torch.save(content, path)
    refused_by_name(folder, lambda: convert(source, folder / "out"))


@FUZZ
@given(st.integers(0, 5), EDITS)
def test_a_damaged_engine_checkpoint(saved: Path, tmp_path_factory: Any, which: int, edits: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    source = copied(list(engines(saved))[which], folder / "saved")
    path = min(source.iterdir())
    replaced(path, edited(path.read_bytes(), edits))
    refused_by_name(folder, lambda: convert(source, folder / "out"))


def test_undamaged_ones_are_read(saved: Path, tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    for number, source in enumerate(engines(saved)):
        convert(source, tmp_path / str(number))
    export(copied(saved / "muon" / "zero2" / "portable", tmp_path / "copy"), tmp_path / "out")
    for source in (ROOT / "ds_configs").glob("*.json"):
        check(load_config(source), filled=False)
    (tmp_path / "file.yaml").write_bytes(DOCUMENT)
    assert Document.read(tmp_path / "file.yaml").content["runs"]["adamw"]["lr"] == 0.001  # the first of what is merged
