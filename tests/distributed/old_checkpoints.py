"""Checkpoints that an older commit wrote: what was run for them, and what ranks run to write and to load them.

`tests/data/make_checkpoints.py` writes them and `test_old_checkpoints` loads them. Model, data and configurations are kept
here, apart from those of other tests: whoever changes any of them must make the archives again, with the old commit's package.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optforge

# All that is used here of the package beside its public names.
from ds_optforge.checkpoint.convert import convert as convert
from ds_optforge.checkpoint.files import Checkpoint
from tests.distributed.cases import base_optimizer, full_parameters
from tests.distributed.checkpoints import draw
from tests.oracles import EXACT

ARCHIVES = Path(__file__).parents[1] / "data" / "checkpoints"
RANKS = 2
HALF = 5  # steps before the checkpoint, and after it
CLIENT_STATE = {"next": HALF}
VOCABULARY = 24

STAGES = (0, 2, 3)
COSINE = {"name": "cosine", "warmup_num_steps": 3, "total_num_steps": 2 * HALF}
CONSTANT = {"name": "constant", "warmup_num_steps": 3}
BESIDE = {"adamw": {"lr": 3e-3, "eps": 1e-5}, "overrides": [{"match": "fused", "split": [14, 16]}]}

# How far a loss may be from the stored one. float32: another CPU, and another build of torch, sums in another order; 1e-5, as
# between topologies (`test_parity`). 8bit: that may also move a value to the next of the 256 codes; 1e-3, as between topologies
# (`test_portable`). bfloat16: or to the next bfloat16, of which a weight has 8 bits; 2e-2, as there.
TOLERANCES = {"float32": 1e-5, "8bit": 1e-3, "bfloat16": 2e-2}
# And weights at the end, by norm. 8bit: where cuts move, blocks are requantized, and orthogonalization makes as much of small
# directions as of large ones; 2.5e-3 was seen.
TOLERANCES_OF_WEIGHTS = {**TOLERANCES, "8bit": 1e-2}


@dataclass(frozen=True, slots=True)
class Case:
    """One run. ``precision``: the lowest in it, a key of `TOLERANCES`."""

    params: dict[str, Any]
    schedule: dict[str, Any] = field(default_factory=lambda: COSINE)
    extra: dict[str, Any] = field(default_factory=dict)
    width: int = 20
    precision: str = "float32"

    def config(self, stage: int) -> dict[str, Any]:
        """For DeepSpeed, in full: no default of another test comes in."""
        return {
            "train_batch_size": 8,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "OptForge", "params": self.params},
            "scheduler": {"type": "OptForgeSchedule", "params": self.schedule},
            "zero_optimization": {"stage": stage, **({"sub_group_size": 1000} if stage == 3 else {})},
            **self.extra,
        }


CASES = {
    "muon": Case({"name": "muon", "weight_decay": 0.1, "momentum_warmup": {"from": 0.85, "steps": 8}, **BESIDE, **EXACT}),
    "normuon": Case({"name": "normuon", "weight_decay": 0.1, "weight_decay_schedule": "linear", **BESIDE, **EXACT}),
    "schedule_free_adamw": Case({"name": "schedule_free_adamw", "eps": 1e-5, "betas": [0.9, 0.99]}, CONSTANT),
    "adamw_8bit": Case({"name": "adamw", "lr": 3e-3, "eps": 1e-5, "state_dtype": "8bit"}, width=65, precision="8bit"),
    "normuon_8bit": Case({"name": "normuon", "state_dtype": "8bit", **BESIDE, **EXACT}, width=65, precision="8bit"),
    "muon_bf16": Case({"name": "muon", **BESIDE, **EXACT}, extra={"bf16": {"enabled": True}}, precision="bfloat16"),
}


class OldNet(nn.Module):
    """A few thousand parameters: every role, a fused matrix, a bank of matrices, a frozen parameter and a buffer.

    With ``width`` 65 one matrix has the 4096 elements from which on state is kept in 8 bits, and ranks cut it inside a block.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.up = nn.Linear(12, width)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width), requires_grad=False)
        self.block = nn.Linear(width, width, bias=False)
        self.fused = nn.Linear(width, 30, bias=False)
        self.bank = nn.Parameter(0.2 * torch.randn(2, 30, 7))
        self.norm = nn.LayerNorm(30)
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, 30))
        self.lm_head = nn.Linear(30, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = F.gelu(self.up(self.embed(tokens))) * self.gain
        x = self.fused(x + F.gelu(self.block(x)))
        x = self.norm(x + torch.einsum("bi,eij,ekj->bk", x, self.bank, self.bank)) + self.shift
        return F.cross_entropy(self.lm_head(x.to(self.lm_head.weight.dtype)).float(), targets)


def build(case: Case, stage: int) -> Any:
    torch.manual_seed(0)
    return ds_optforge.initialize(model=OldNet(case.width), config=case.config(stage))[0]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's share of a step's eight tokens and targets."""
    tokens = torch.randint(VOCABULARY, (8,), generator=torch.Generator().manual_seed(step))
    share = slice(dist.get_rank(), None, dist.get_world_size())
    return tokens[share], ((tokens * 7 + 3) % VOCABULARY)[share]


def take_steps(engine: Any, first: int) -> list[float]:
    """Half of the steps; the mean loss over ranks of each."""
    losses = []
    for step in range(first, first + HALF):
        loss = engine(*batch(step))
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def facts(engine: Any) -> dict[str, Any]:
    """What a run is beside its tensors, as JSON gives it back: hyperparameters, step counts, place on the schedule."""
    optimizer = base_optimizer(engine)
    groups = {g["optforge_group"]: {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups}
    states = list(optimizer.state.values())
    found = {
        "groups": groups,
        "steps": sorted({int(state["step"]) for state in states}),
        "scalars": sorted({f"{key} {value!r}" for s in states for key, value in s.items() if isinstance(value, float)}),
        "schedule": engine.lr_scheduler.state_dict()["last_epoch"],
        "counters": [engine.global_steps, engine.global_samples, engine.skipped_steps],
    }
    return json.loads(json.dumps(found))


def logical_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Everything in a portable checkpoint but the random states."""
    checkpoint = Checkpoint(Path(folder))
    assert not checkpoint.damage()
    return {name: checkpoint.whole(name) for name in checkpoint.tensors if not name.startswith("random/")}


@dataclass(frozen=True, slots=True)
class Expected:
    """What is stored beside the checkpoints of one run.

    Attributes:
        saved, later: whole parameters in float32, at the moment of saving and after the other half of the steps.
        logical: weights and optimizer state at the moment of saving, under the names of portable checkpoints.
        facts: at that moment, as `facts`.
        losses: of the other half of the steps.
        draws: by rank, the next numbers of its random generators.
        written_by: versions.
    """

    saved: dict[str, Tensor]
    later: dict[str, Tensor]
    logical: dict[str, Tensor]
    facts: dict[str, Any]
    losses: list[float]
    draws: list[list[float]]
    written_by: dict[str, str]

    _TENSORS = ("saved", "later", "logical")
    _PLAIN = ("facts", "losses", "draws", "written_by")

    def write(self, folder: Path) -> None:
        tensors = {f"{kind}/{name}": t.contiguous() for kind in self._TENSORS for name, t in getattr(self, kind).items()}
        save_file(tensors, folder / "expected.safetensors")
        plain = {kind: getattr(self, kind) for kind in self._PLAIN}
        (folder / "expected.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Expected":
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in cls._TENSORS}
        for key, tensor in load_file(folder / "expected.safetensors").items():
            kind, _, name = key.partition("/")
            tensors[kind][name] = tensor
        return cls(**tensors, **json.loads((folder / "expected.json").read_bytes()))


# ------------------------------------------------------------------------------------------ what ranks run


def save(name: str, stage: int, folder: str) -> dict[str, Any]:
    """Half of the steps, both kinds of checkpoint, the other half; what `Expected` holds of it."""
    engine = build(CASES[name], stage)
    take_steps(engine, 0)
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(100 + dist.get_rank())
    engine.save_checkpoint(f"{folder}/engine", client_state=dict(CLIENT_STATE))
    ds_optforge.save_checkpoint(engine, f"{folder}/portable", CLIENT_STATE)
    found = {"saved": full_parameters(engine.module), "facts": facts(engine), "draws": draw()}
    found |= {"losses": take_steps(engine, HALF), "later": full_parameters(engine.module)}
    engine.destroy()
    return found


def load(name: str, stage: int, how: str, folder: str, target: str) -> dict[str, Any]:
    """Load a checkpoint of that kind into a fresh engine, save all that is in it to ``target``, take the other steps."""
    engine = build(CASES[name], stage)
    if how == "engine":
        path, client_state = engine.load_checkpoint(f"{folder}/engine")
        assert path is not None
    else:
        client_state = ds_optforge.load_checkpoint(engine, f"{folder}/portable")
    ds_optforge.save_checkpoint(engine, target)
    found = {"saved": full_parameters(engine.module), "facts": facts(engine), "draws": draw()}
    found |= {"losses": take_steps(engine, HALF), "later": full_parameters(engine.module)}
    engine.destroy()
    return found | {"client_state": client_state}
