"""The values that `init` chooses: from the source's settings and the purpose of the run to the "params" of an OptForge section.

Everything that is a choice, and not arithmetic, is in `RECIPES` and the constants beside it.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ds_optforge.errors import ConfigError, did_you_mean
from ds_optforge.migrate.source import AUTO, Given, OptimizerSettings, Purpose, Reason


class Recipe(NamedTuple):
    """How the settings of an elementwise optimizer become those of a matrix rule, whose learning rate stays the same.

    Attributes:
        rms: root mean square of the matrices' updates before the learning rate.
        why_rms: with the source.
        momentum: of the matrices.
        nesterov: whether it looks ahead.
        why: of momentum and nesterov, with the source.
        lora: what becomes of the factors of adapters; None says nothing of them.
    """

    rms: float
    why_rms: str
    momentum: float
    nesterov: bool
    why: str
    lora: str | None = None


_JORDAN = "Muon's own value (Jordan et al. 2024, kellerjordan.github.io/posts/muon)"
RECIPES: dict[Purpose, Recipe] = {
    "pretrain": Recipe(
        rms=0.4,
        why_rms="NVIDIA's NeMo RL recommends 0.2 to 0.5 (its guide to Muon; 0.2 is Moonlight's, arXiv 2502.16982); momenta "
        "that are not of full rank reach two thirds of it, and AdamW's updates measured 0.2 to 0.3 (docs/from_adamw.md)",
        momentum=0.95,
        nesterov=True,
        why=_JORDAN,
    ),
    "finetune": Recipe(
        rms=0.8,
        why_rms="the authors of arXiv 2605.10468 fine-tune with two to five times AdamW's rate at 0.2; with AdamW's rate and "
        "0.2 Muon lost (docs/from_adamw.md)",
        momentum=0.9,
        nesterov=False,
        why="NVIDIA's NeMo RL fine-tunes AdamW-trained models with this value (its guide to Muon)",
    ),
    "lora": Recipe(
        rms=0.2,
        why_rms="Moonlight's (arXiv 2502.16982), with which arXiv 2605.10468 trains adapters at AdamW's rate",
        momentum=0.95,
        nesterov=True,
        why=_JORDAN,
        lora="both",
    ),
}

# The scale whose updates have the same size in matrices of all shapes, as AdamW's have.
SCALE = "match_rms_adamw"
_ONE_SIZE = "updates are of one size in matrices of all shapes"
# Each element of Lion's updates is 1 or -1.
LION_RMS = 1.0
# Of AdamW in the HF Trainer, where a file leaves them "auto" and no TrainingArguments are at hand.
TRAINER_BETAS, TRAINER_EPS = [0.9, 0.999], 1e-8

MATRIX_RULES = ("muon", "normuon")
_SAME_UPDATE: dict[str, tuple[str, ...]] = {"adamw": ("adamw", "adamw_8bit"), "lion": ("lion",), "muon": ()}


@dataclass(slots=True)
class Mapped:
    """The "params" of an OptForge section, and why they are what they are.

    Attributes:
        params: of the section.
        reasons: for each of them.
        not_carried: a line for each setting that they do not say.
    """

    params: dict[str, Any]
    reasons: list[Reason] = field(default_factory=list)
    not_carried: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, why: str) -> None:
        """Set the value of a key, such as "adamw.lr", and note the reason."""
        *sections, last = key.split(".")
        target = self.params
        for name in sections:
            target = target.setdefault(name, {})
        target[last] = value
        self.reasons.append(Reason(f"optimizer.params.{key}", value, why))

    def explain(self, key: str, value: Any = None, first: str = "") -> None:
        """Give a key's reason another value and a beginning; without a value, remove it."""
        path = f"optimizer.params.{key}"
        changed = [Reason(path, value, f"{first}: {each.why}") if each.path == path else each for each in self.reasons]
        self.reasons = [each for each in changed if value is not None or each.path != path]


def optimizer_params(settings: OptimizerSettings, purpose: Purpose, rule: str) -> Mapped:
    """Return the "params" of an OptForge section that continues ``settings``.

    Args:
        settings: of the source.
        purpose: of the run.
        rule: of the matrices, or of all parameters.

    Raises:
        ConfigError: a rule for which no bridge from the source's learning rates is known, or an "auto" that would have to be
            a number.
    """
    allowed = (*MATRIX_RULES, *_SAME_UPDATE[settings.family])
    if rule not in allowed:
        raise ConfigError(
            f"--rule: got '{rule}', to whose learning rate no bridge is known from that of {settings.family}; "
            f"{did_you_mean(rule, allowed)}allowed: {', '.join(allowed)}"
        )
    mapped = Mapped({"name": rule})
    mapped.reasons.append(
        Reason("optimizer.params.name", rule, "what orthogonalizes the hidden matrices" if rule in MATRIX_RULES else "--rule")
    )
    if rule not in MATRIX_RULES:
        _same_update(mapped, settings)
    elif settings.family == "adamw":
        _from_adamw(mapped, settings, RECIPES[purpose])
    elif settings.family == "lion":
        _from_lion(mapped, settings, RECIPES[purpose])
    else:
        _from_muon(mapped, settings)
    if RECIPES[purpose].lora is not None and rule in MATRIX_RULES:
        why = "both factors of an adapter are orthogonalized, as in the runs of arXiv 2605.10468 (docs/finetuning.md)"
        mapped.put("lora", RECIPES[purpose].lora, why)
    if settings.state_8bit and "state_dtype" not in mapped.params and rule != "adamw_8bit":
        mapped.put("state_dtype", "8bit", "the source's optimizer keeps its state in 8 bits")
    return mapped


def _same_update(mapped: Mapped, settings: OptimizerSettings) -> None:
    mapped.put("lr", settings.lr.value, f"from {settings.lr.origin}; the update is the same")
    mapped.put("betas", settings.betas.value, f"from {settings.betas.origin}")
    if settings.family == "adamw":
        mapped.put("eps", settings.eps.value, f"from {settings.eps.origin}")
    _decay(mapped, settings.weight_decay)


def _from_adamw(mapped: Mapped, settings: OptimizerSettings, recipe: Recipe) -> None:
    mapped.put("lr", settings.lr.value, f"from {settings.lr.origin}: {_ONE_SIZE}, as AdamW's are")
    _decay(mapped, settings.weight_decay)
    _momentum_and_scale(mapped, recipe, recipe.rms, recipe.why_rms)
    if settings.lr.value != AUTO:
        why = f"from {settings.lr.origin}: embeddings, head and vectors keep AdamW, and its rate"
        mapped.put("adamw.lr", settings.lr.value, why)
    _betas_and_eps(mapped, settings)


def _from_lion(mapped: Mapped, settings: OptimizerSettings, recipe: Recipe) -> None:
    """Matrices get steps of the size that Lion's had; the rest keeps Lion, which it was tuned with.

    Raises:
        ConfigError: a rate that a framework is to fill, since it fills none by role.
    """
    if settings.lr.value == AUTO:
        raise ConfigError(
            f'{settings.lr.origin}: got "{AUTO}", but the roles that keep Lion need its rate, and nobody fills it there; '
            "allowed: a number, or --from the file that says learning_rate"
        )
    mapped.put("lr", settings.lr.value, f"from {settings.lr.origin}: {_ONE_SIZE}, as Lion's are")
    _decay(mapped, settings.weight_decay)
    why = f"an element of Lion's update is {LION_RMS:g} or -{LION_RMS:g}: steps of the same size"
    _momentum_and_scale(mapped, recipe, LION_RMS, why)
    mapped.put("adamw.lr", settings.lr.value, "for what a matrix rule leaves, as routers, with AdamW's smaller updates")
    for role in ("embedding", "unembedding", "scalar"):
        mapped.params.setdefault("roles", {})[role] = {
            "name": "lion",
            "lr": settings.lr.value,
            "betas": settings.betas.value,
            **({"weight_decay": settings.weight_decay.value} if role != "scalar" and settings.weight_decay.value else {}),
        }
    why = f"from {settings.lr.origin}: what is no hidden matrix keeps Lion, with its rate, betas and decay"
    mapped.reasons.append(Reason("optimizer.params.roles", mapped.params["roles"], why))


def _from_muon(mapped: Mapped, settings: OptimizerSettings) -> None:
    mapped.put("lr", settings.lr.value, f"from {settings.lr.origin}: DeepSpeed's Muon has the same update")
    _decay(mapped, settings.weight_decay)
    mapped.put("momentum", settings.momentum.value, f"from {settings.momentum.origin}")
    mapped.put("orthogonalization.scale", "shape", "sqrt(max(1, out / in)), as DeepSpeed's Muon has it")
    if settings.method.value == "standard":
        mapped.put("orthogonalization.method", "standard", f"from {settings.method.origin}")
    if settings.rest_lr.value != AUTO:
        mapped.put("adamw.lr", settings.rest_lr.value, f"from {settings.rest_lr.origin}")
    _betas_and_eps(mapped, settings)
    mapped.not_carried.append(
        "which weights are matrices: DeepSpeed's Muon takes every weight of two dimensions or more without embed or lm_head in "
        "its name; `ds-optforge explain` prints which ones OptForge takes"
    )
    mapped.not_carried.append(
        "gradient_clipping acts on the gradient; DeepSpeed's Muon clips the orthogonalized update (its issue 8439), and so "
        "takes smaller steps: if the first losses are unsteady, lower the rate"
    )


def _momentum_and_scale(mapped: Mapped, recipe: Recipe, rms: float, why_rms: str) -> None:
    mapped.put("momentum", recipe.momentum, recipe.why)
    if not recipe.nesterov:
        mapped.put("nesterov", False, recipe.why)
    bridge = f"rms sqrt(max(out, in)): {_ONE_SIZE} (Moonlight, arXiv 2502.16982)"
    mapped.put("orthogonalization.scale", SCALE, bridge)
    mapped.put("orthogonalization.rms", rms, why_rms)


def _betas_and_eps(mapped: Mapped, settings: OptimizerSettings) -> None:
    for key, given, default in (("betas", settings.betas, TRAINER_BETAS), ("eps", settings.eps, TRAINER_EPS)):
        if given.value == AUTO:
            why = f'{given.origin} is "{AUTO}", which nobody fills in this section: the HF Trainer\'s default; if your '
            mapped.put(f"adamw.{key}", default, f"{why}TrainingArguments have another value, write that")
        else:
            mapped.put(f"adamw.{key}", given.value, f"from {given.origin}")


def _decay(mapped: Mapped, decay: Given) -> None:
    if decay.value:
        why = f"from {decay.origin}: it is times the rate, so a step decays the weights as before"
        mapped.put("weight_decay", decay.value, why)
