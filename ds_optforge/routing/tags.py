"""Facts that only the module tree knows, written onto the parameters before DeepSpeed flattens them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ds_optforge.errors import ConfigError
from ds_optforge.zero.shards import full_shape

_NAME, _ROLE, _MATRIX, _TRANSPOSED = "optforge_name", "optforge_role", "optforge_matrix", "optforge_transposed"
_STAGE = "optforge_stage"
_HEAD_NAMES = {"lm_head", "head", "unembed", "unembedding", "embed_out", "output", "output_layer"}

# The models that were tagged and still exist, in the order in which they were.
_MODELS: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Tags:
    """The facts that `tag` wrote onto a parameter.

    Attributes:
        name: qualified name; None for a parameter that was never tagged.
        role: "embedding" or "unembedding"; None if the shape decides.
        matrix: (rows, cols) of each of its matrices; None if the shape decides.
        transposed: whether it is stored (in, out).
        of_stage: whether its model is one stage of a pipeline, so that this rank does not know all names.
    """

    name: str | None
    role: Literal["embedding", "unembedding"] | None
    matrix: tuple[int, int] | None
    transposed: bool
    of_stage: bool


def tags_of(parameter: Tensor) -> Tags:
    """Read what `tag` wrote onto ``parameter``."""
    return Tags(
        getattr(parameter, _NAME, None),
        getattr(parameter, _ROLE, None),
        getattr(parameter, _MATRIX, None),
        getattr(parameter, _TRANSPOSED, False),
        getattr(parameter, _STAGE, False),
    )


def tag(model: nn.Module) -> None:
    """Write onto each parameter of ``model`` its qualified name, and what its module says of its role and shape."""
    _MODELS.pop(model, None)
    _MODELS[model] = None
    heads = {id(parameter) for parameter in _head_weights(model)}
    of_stage = any(base.__name__ == "PipelineModule" for base in type(model).__mro__)  # DeepSpeed's
    for name, parameter in model.named_parameters():  # the first name of a tied parameter
        setattr(parameter, _STAGE, of_stage)
        setattr(parameter, _NAME, name)
        setattr(parameter, _ROLE, "unembedding" if id(parameter) in heads else None)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            setattr(module.weight, _ROLE, "embedding")  # even if the head is tied to it
        elif isinstance(module, nn.modules.conv._ConvNd):
            shape = full_shape(module.weight)
            setattr(module.weight, _MATRIX, (shape[0], shape.numel() // shape[0]))
            setattr(module.weight, _TRANSPOSED, module.transposed)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers': a Linear stored (in, out)
            setattr(module.weight, _TRANSPOSED, True)


def tag_new(parameters: Iterable[Tensor]) -> None:
    """Tag those models again that have got some of ``parameters`` since they were tagged.

    DeepSpeed's AutoEP, and AutoTP under zero.Init, replace parameters before a JSON optimizer is built; PEFT adds some. Where a
    model is inside another that was tagged later, the names are those of the later one.
    """
    untagged = {id(parameter) for parameter in parameters if tags_of(parameter).name is None}
    for model in list(_MODELS):
        if not untagged.isdisjoint(map(id, model.parameters())):
            tag(model)


def replaced(parameters: Iterable[Tensor]) -> list[str]:
    """Return the names of those ``parameters`` that are in no model any more which has some of the others."""
    names = {id(parameter): name for parameter in parameters if (name := tags_of(parameter).name) is not None}
    models = [{id(parameter) for parameter in model.parameters()} for model in list(_MODELS)]
    held = set().union(*(model for model in models if not model.isdisjoint(names)))
    return [name for number, name in names.items() if number not in held] if held else []


def _head_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of output embeddings: Hugging Face's, and those of Linears named like a head outside any layer."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    weight = getattr(get_output_embeddings(), "weight", None) if get_output_embeddings else None
    if isinstance(weight, Tensor):
        yield weight
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if isinstance(module, nn.Linear) and last in _HEAD_NAMES and not any(part.isdigit() for part in path):
            yield module.weight


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
