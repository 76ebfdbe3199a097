"""Facts that only the module tree knows, written onto the parameters before DeepSpeed flattens them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ds_optforge.errors import ConfigError
from ds_optforge.routing.lora import Part, adapter_parts
from ds_optforge.zero.pipeline import PLACEHOLDERS, Stage, enter_pipeline, is_pipeline, last_layer
from ds_optforge.zero.shards import NAME, full_shape

_ROLE, _MATRIX, _TRANSPOSED = "optforge_role", "optforge_matrix", "optforge_transposed"
_STAGE, _ADAPTER = "optforge_stage", "optforge_adapter"
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
        stage: the stage of the pipeline that trains it; None without a pipeline.
        adapter: what it is of an adapter; None for other parameters.
    """

    name: str | None
    role: Literal["embedding", "unembedding"] | None
    matrix: tuple[int, int] | None
    transposed: bool
    stage: Stage | None
    adapter: Part | None = None

    @property
    def placeholder(self) -> bool:
        """Whether it stands for the parameters of other stages, and is none of the model's own."""
        return self.name is not None and self.name.startswith(f"{PLACEHOLDERS}.")


def tags_of(parameter: Tensor) -> Tags:
    """Read what `tag` wrote onto ``parameter``."""
    return Tags(
        getattr(parameter, NAME, None),
        getattr(parameter, _ROLE, None),
        getattr(parameter, _MATRIX, None),
        getattr(parameter, _TRANSPOSED, False),
        getattr(parameter, _STAGE, None),
        getattr(parameter, _ADAPTER, None),
    )


def tag(model: nn.Module) -> None:
    """Write onto each parameter of ``model`` its qualified name, and what its module says of its role and shape."""
    _MODELS.pop(model, None)
    _MODELS[model] = None
    stage = enter_pipeline(model)
    heads = {id(parameter) for parameter in _head_weights(model)}
    for name, parameter in model.named_parameters():  # the first name of a tied parameter
        setattr(parameter, NAME, name)
        setattr(parameter, _ROLE, "unembedding" if id(parameter) in heads else None)
        setattr(parameter, _STAGE, stage)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            setattr(module.weight, _ROLE, "embedding")  # even if the head is tied to it
        elif isinstance(module, nn.modules.conv._ConvNd):
            shape = full_shape(module.weight)
            setattr(module.weight, _MATRIX, (shape[0], shape.numel() // shape[0]))
            setattr(module.weight, _TRANSPOSED, module.transposed)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers': a Linear stored (in, out)
            setattr(module.weight, _TRANSPOSED, True)
    for parameter, part in adapter_parts(model):
        setattr(parameter, _ADAPTER, part)
        if part == "embedding":
            setattr(parameter, _ROLE, "embedding")


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
    """Yield the weights of output embeddings.

    They are Hugging Face's, those of Linears named like a head outside any layer, and the Linear at the end of a chain.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    weight = getattr(get_output_embeddings(), "weight", None) if get_output_embeddings else None
    if isinstance(weight, Tensor):
        yield weight
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if is_pipeline(model):
            path = path[1:]  # the layer's number
        if isinstance(module, nn.Linear) and last in _HEAD_NAMES and not any(part.isdigit() for part in path):
            yield module.weight
    last = _last_layer(model)
    if last is not None and (linear := _only_linear(last)):
        yield linear.weight


def _last_layer(model: nn.Module) -> nn.Module | None:
    """The last layer with parameters of a PipelineModule, or of an nn.Sequential that holds an embedding; else None."""
    if is_pipeline(model):
        return last_layer(model)
    if not isinstance(model, nn.Sequential) or not any(isinstance(module, nn.Embedding) for module in model.modules()):
        return None
    return next((layer for layer in reversed(model) if any(True for _ in layer.parameters())), None)


def _only_linear(layer: nn.Module) -> nn.Linear | None:
    """The Linear that a layer is, or holds as its only one and its only matrix; else None."""
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    matrices = [parameter for parameter in layer.parameters() if len(full_shape(parameter)) > 1]
    return linears[0] if len(linears) == len(matrices) == 1 else None


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
