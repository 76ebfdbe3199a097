"""Facts that only the module tree knows, written onto the parameters before DeepSpeed flattens them."""

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ds_optforge.errors import ConfigError
from ds_optforge.routing.kinds import UNKNOWN, Kind, kinds_of
from ds_optforge.zero.pipeline import PLACEHOLDERS, Stage, enter_pipeline
from ds_optforge.zero.shards import NAME, full_shape

_KIND, _STAGE = "optforge_kind", "optforge_stage"

# The models that were tagged and still exist, in the order in which they were.
_MODELS: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Tags:
    """The facts that `tag` wrote onto a parameter.

    Attributes:
        name: qualified name; None for a parameter that was never tagged.
        kind: what it is; `UNKNOWN` where nothing tells.
        stage: the stage of the pipeline that trains it; None without a pipeline.
    """

    name: str | None
    kind: Kind
    stage: Stage | None

    @property
    def placeholder(self) -> bool:
        """Whether it stands for the parameters of other stages, and is none of the model's own."""
        return self.name is not None and self.name.startswith(f"{PLACEHOLDERS}.")


def tags_of(parameter: Tensor) -> Tags:
    """Read what `tag` wrote onto ``parameter``."""
    return Tags(getattr(parameter, NAME, None), getattr(parameter, _KIND, UNKNOWN), getattr(parameter, _STAGE, None))


def tag(model: nn.Module) -> None:
    """Write onto each parameter of ``model`` its qualified name, and what it is according to its module."""
    _MODELS.pop(model, None)
    _MODELS[model] = None
    stage = enter_pipeline(model)
    for name, parameter in model.named_parameters():  # the first name of a tied parameter
        setattr(parameter, NAME, name)
        setattr(parameter, _STAGE, stage)
    for parameter, kind in kinds_of(model):
        setattr(parameter, _KIND, kind)


def tag_new(parameters: Iterable[Tensor]) -> None:
    """Tag those models again that have got some of ``parameters`` since they were tagged.

    DeepSpeed's AutoEP, and AutoTP under zero.Init, replace parameters before a JSON optimizer is built; PEFT adds some. Where a
    model is inside another that was tagged later, the names are those of the later one.
    """
    untagged = {id(parameter) for parameter in parameters if tags_of(parameter).name is None}
    for model in list(_MODELS):
        if not untagged.isdisjoint(map(id, model.parameters())):
            tag(model)


def models_of(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """Return the tagged models that have any of ``parameters``, the one that was tagged last first."""
    numbers = set(map(id, parameters))
    return [model for model in reversed(list(_MODELS)) if not numbers.isdisjoint(map(id, model.parameters()))]


def replaced(parameters: Iterable[Tensor]) -> list[str]:
    """Return the names of those ``parameters`` that are in no model any more which has some of the others."""
    names = {id(parameter): name for parameter in parameters if (name := tags_of(parameter).name) is not None}
    models = [{id(parameter) for parameter in model.parameters()} for model in list(_MODELS)]
    held = set().union(*(model for model in models if not model.isdisjoint(names)))
    return [name for number, name in names.items() if number not in held] if held else []


def parameter_name(parameter: Tensor) -> str:
    """Return the qualified name that `tag` wrote onto ``parameter``.

    Raises:
        ConfigError: a parameter that was never tagged.
    """
    name = tags_of(parameter).name
    if name is None:
        raise ConfigError(
            f"a parameter of shape {tuple(full_shape(parameter))} is not registered; call ds_optforge.register(model) "
            "before deepspeed.initialize, Accelerator.prepare or Trainer, with the model that is trained (in plain PyTorch, "
            "ds_optforge.build_optimizer(model, config) does so). Where layers were added or replaced after that, as by PEFT, "
            "call it again: ds_optforge.register(trainer.model) before trainer.train() where a Trainer wraps the model itself"
        )
    return name
