"""The values that `init` chooses: from the source's settings and the purpose of the run to the "params" of an OptForge section.

Everything that is a choice, and not arithmetic, is in `RECIPES` and the constants beside it.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ds_optforge.errors import ConfigError
from ds_optforge.migrate.documents import did_you_mean
from ds_optforge.migrate.source import AUTO, Given, OptimizerSettings, Purpose, Reason


class Recipe(NamedTuple):
    """How the settings of an elementwise optimizer become those of a matrix rule.

    Attributes:
        rate: the matrices' learning rate, times that with which AdamW trained them.
        rest_rate: the learning rate of what stays with AdamW, times that of the source.
        momentum: of the matrices.
        nesterov: whether it looks ahead.
        why: of momentum and nesterov, with the source.
        lora: what becomes of LoRA's factors; None leaves them to their shape.
    """

    rate: float
    rest_rate: float
    momentum: float
    nesterov: bool
    why: str
    lora: str | None = None


_JORDAN = "Muon's own value (Jordan et al. 2024, kellerjordan.github.io/posts/muon)"
RECIPES: dict[Purpose, Recipe] = {
    "pretrain": Recipe(rate=1.0, rest_rate=1.0, momentum=0.95, nesterov=True, why=_JORDAN),
    "finetune": Recipe(
        rate=1.0,
        rest_rate=1.0,
        momentum=0.9,
        nesterov=False,
        why="gentle: another optimizer than that of the pre-training harms, the more the stronger its updates are (arXiv "
        "2605.10468); NVIDIA's NeMo RL fine-tunes AdamW-trained models with this value (its guide to Muon)",
    ),
    "lora": Recipe(rate=1.0, rest_rate=1.0, momentum=0.95, nesterov=True, why=_JORDAN),
}

# The scale whose updates are as large as AdamW's: a root mean square of 0.2 (Moonlight, arXiv 2502.16982).
SCALE, SCALE_RMS = "match_rms_adamw", 0.2
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
    if purpose == "lora" and rule in MATRIX_RULES:
        _lora(mapped, RECIPES[purpose])
    if settings.state_8bit and "state_dtype" not in mapped.params and rule != "adamw_8bit":
        mapped.put("state_dtype", "8bit", "the source's optimizer keeps its state in 8 bits")
    return mapped


def times(given: Given, factor: float, key: str) -> Any:
    """Return a value times ``factor``, rounded to six digits; "auto" stays where the factor is 1.

    Raises:
        ConfigError: an "auto" that would have to be a number.
    """
    if factor == 1.0:
        return given.value
    if given.value == AUTO:
        raise ConfigError(
            f'{given.origin}: got "{AUTO}", of which {key} is {factor:g} times; allowed: a number, or --from the file that '
            "says learning_rate"
        )
    return float(f"{given.value * factor:.6g}")


def _same_update(mapped: Mapped, settings: OptimizerSettings) -> None:
    mapped.put("lr", settings.lr.value, f"from {settings.lr.origin}; the update is the same")
    mapped.put("betas", settings.betas.value, f"from {settings.betas.origin}")
    if settings.family == "adamw":
        mapped.put("eps", settings.eps.value, f"from {settings.eps.origin}")
    _decay(mapped, settings.weight_decay, 1.0)


def _from_adamw(mapped: Mapped, settings: OptimizerSettings, recipe: Recipe) -> None:
    lr = times(settings.lr, recipe.rate, "lr")
    factor = "the same" if recipe.rate == 1.0 else f"{recipe.rate:g} times as large"
    mapped.put("lr", lr, f"from {settings.lr.origin}, {factor}: with scale {SCALE} an update is as large as AdamW's")
    _decay(mapped, settings.weight_decay, 1 / recipe.rate)
    _momentum_and_scale(mapped, recipe)
    rest = times(settings.lr, recipe.rest_rate, "adamw.lr")
    if rest != AUTO:
        mapped.put("adamw.lr", rest, f"from {settings.lr.origin}: embeddings, head and vectors keep AdamW, and its rate")
    _betas_and_eps(mapped, settings)
    if recipe.rate != recipe.rest_rate and settings.weight_decay.value:
        decay = times(settings.weight_decay, 1 / recipe.rest_rate, "adamw.weight_decay")
        mapped.put("adamw.weight_decay", decay, f"from {settings.weight_decay.origin}, for the same decay per step")


def _from_lion(mapped: Mapped, settings: OptimizerSettings, recipe: Recipe) -> None:
    """Matrices get steps of the size that Lion's had; the rest keeps Lion, which it was tuned with."""
    factor = recipe.rate * LION_RMS / SCALE_RMS
    lr = times(settings.lr, factor, "lr")
    size = f"an element of Lion's update is {LION_RMS:g}, and of scale {SCALE} about {SCALE_RMS:g}: steps of the same size"
    mapped.put("lr", lr, f"from {settings.lr.origin}, {factor:g} times as large: {size}")
    _decay(mapped, settings.weight_decay, 1 / factor)
    _momentum_and_scale(mapped, recipe)
    mapped.put("adamw.lr", lr, "for matrices too long and thin for Muon, with AdamW's updates as large")
    for role in ("embedding", "unembedding", "scalar"):
        mapped.params.setdefault("roles", {})[role] = {
            "name": "lion",
            "lr": times(settings.lr, recipe.rest_rate, f"roles.{role}.lr"),
            "betas": settings.betas.value,
            **({"weight_decay": settings.weight_decay.value} if role != "scalar" and settings.weight_decay.value else {}),
        }
    why = f"from {settings.lr.origin}: what is no hidden matrix keeps Lion, with its rate, betas and decay"
    mapped.reasons.append(Reason("optimizer.params.roles", mapped.params["roles"], why))


def _from_muon(mapped: Mapped, settings: OptimizerSettings) -> None:
    mapped.put("lr", settings.lr.value, f"from {settings.lr.origin}: DeepSpeed's Muon has the same update")
    _decay(mapped, settings.weight_decay, 1.0)
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


def _lora(mapped: Mapped, recipe: Recipe) -> None:
    if recipe.lora is not None:
        mapped.put("lora", recipe.lora, "the factors of an adapter, orthogonalized at their own aspect")
    else:
        mapped.not_carried.append(
            "LoRA's factors are thinner than max_aspect_ratio allows Muon, so the adamw section trains them as before; other "
            "trained matrices get Muon"
        )


def _momentum_and_scale(mapped: Mapped, recipe: Recipe) -> None:
    mapped.put("momentum", recipe.momentum, recipe.why)
    if not recipe.nesterov:
        mapped.put("nesterov", False, recipe.why)
    bridge = "0.2 sqrt(max(out, in)): updates as large as AdamW's, so its rate and decay fit (Moonlight, arXiv 2502.16982)"
    mapped.put("orthogonalization.scale", SCALE, bridge)


def _betas_and_eps(mapped: Mapped, settings: OptimizerSettings) -> None:
    for key, given, default in (("betas", settings.betas, TRAINER_BETAS), ("eps", settings.eps, TRAINER_EPS)):
        if given.value == AUTO:
            why = f'{given.origin} is "{AUTO}", which nobody fills in this section: the HF Trainer\'s default; if your '
            mapped.put(f"adamw.{key}", default, f"{why}TrainingArguments have another value, write that")
        else:
            mapped.put(f"adamw.{key}", given.value, f"from {given.origin}")


def _decay(mapped: Mapped, decay: Given, factor: float) -> None:
    if not decay.value:
        return
    value = times(decay, factor, "weight_decay")
    divided = "" if factor == 1.0 else f", divided by {1 / factor:g}"
    why = f"from {decay.origin}{divided}: it is times the rate, so a step decays the weights as before"
    mapped.put("weight_decay", value, why)
