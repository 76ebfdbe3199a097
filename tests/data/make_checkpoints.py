"""Write the checkpoints that later commits must be able to load: tests/data/checkpoints/*.tar.xz, one archive per case.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/data/make_checkpoints.py [CASE ...]

Run it with the commit whose checkpoints shall be kept, in the root of a clean checkout of that commit: the package that it
imports is the one whose formats are written. (An older commit that lacks this script: copy tests/data/make_checkpoints.py and
tests/distributed/old_checkpoints.py into its checkout.) Never run it to make `tests/distributed/test_old_checkpoints.py` pass
again: that test fails when the current code cannot go on from what users have on their disks.

An archive holds, for every ZeRO stage of the case, on two ranks: the engine checkpoint, the portable checkpoint of the same
moment, and what must be found in them (`tests.distributed.old_checkpoints.Expected`).
"""

import argparse
import platform
import subprocess
import tarfile
import tempfile
from pathlib import Path

import deepspeed
import torch

import ds_optforge
from tests.distributed import old_checkpoints
from tests.distributed.old_checkpoints import ARCHIVES, CASES, RANKS, STAGES, Expected
from tests.distributed.pool import Pool

NOT_KEPT = ".py"  # DeepSpeed copies scripts of its own into every checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Write checkpoints for later commits to load.")
    parser.add_argument("cases", nargs="*", metavar="CASE", default=list(CASES), help=f"of {', '.join(CASES)}; default: all")
    names = parser.parse_args().cases
    ARCHIVES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pool = Pool(RANKS, folder)
        try:
            for name in names:
                make(name, pool, folder)
        finally:
            pool.close()


def make(name: str, pool: Pool, folder: Path) -> None:
    """One archive."""
    for stage in STAGES:
        run = folder / name / f"zero{stage}"
        run.mkdir(parents=True)
        first, *others = pool.run(old_checkpoints.save, name, stage, str(run))
        draws = [first["draws"], *(other["draws"] for other in others)]
        found = {**first, "draws": draws}
        Expected(**found, logical=old_checkpoints.logical_tensors(run / "portable"), written_by=written_by()).write(run)
    archive = ARCHIVES / f"{name}.tar.xz"
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted((folder / name).rglob("*")):
            if path.is_file() and path.suffix != NOT_KEPT:
                tar.add(path, path.relative_to(folder / name), filter=anonymous)
    print(f"{archive.name}: {archive.stat().st_size} bytes")


def written_by() -> dict[str, str]:
    """The commit and versions that wrote a checkpoint."""
    package = str(Path(ds_optforge.__file__).parent)
    git = ["git", "-C", package]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", package], capture_output=True, text=True, check=True).stdout
    return {
        "commit": commit + ", with changes" * bool(changed),
        "ds_optforge": ds_optforge.__version__,
        "deepspeed": deepspeed.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the owner, the mode and the time of the file."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry


if __name__ == "__main__":
    main()
