"""What is registered before a model is wrapped or its layers are replaced: names refreshed by a second call, or an error."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, OptForge, build_optimizer, register
from ds_optforge.optimizer import groups_of

MUON = {"name": "muon", "lr": 0.02, "adamw": {"lr": 1e-3}}


class LoRA(nn.Module):
    """PEFT's way: a frozen layer inside a new one, with two trained matrices beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.Linear(layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return found


def wrapped(model: nn.Sequential) -> nn.Module:
    """``model`` with a LoRA layer, inside PEFT's two wrappers."""
    model[0] = LoRA(model[0])
    return nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})})


def names(optimizer: OptForge) -> list[str]:
    return sorted(route.name for members in groups_of(optimizer).members.values() for route in members.routes)


def test_layers_that_were_added_after_register_are_named_when_the_optimizer_is_built() -> None:
    """Also if nothing else is trained, so that none of the parameters was there when the model was registered."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    register(model)
    whole = wrapped(model)
    model[1].requires_grad_(False)
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    assert names(OptForge(trained, **MUON)) == ["0.lora_A.weight", "0.lora_B.weight"]


def test_layers_outside_of_what_was_registered_are_an_error_with_the_line_to_add() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    register(model)
    whole = nn.ModuleDict({"model": model, "reward": nn.Linear(8, 1)})
    with pytest.raises(ConfigError, match=r"\(1, 8\) is not registered; .*register\(trainer\.model\) before trainer"):
        OptForge(whole.parameters(), **MUON)


def test_of_two_models_that_hold_a_new_parameter_the_later_names_it() -> None:
    """On every rank alike."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    whole = nn.ModuleDict({"policy": model})
    register(model)
    register(whole)
    model[0] = nn.Linear(8, 8, bias=False)
    assert names(OptForge(whole.parameters(), **MUON)) == ["policy.0.weight", "policy.1.weight"]
    register(model)
    model[1] = nn.Linear(8, 8, bias=False)
    assert names(OptForge(whole.parameters(), **MUON)) == ["0.weight", "1.weight"]


def test_a_model_is_not_kept_alive() -> None:
    model = nn.Linear(8, 8)
    register(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_a_second_call_gives_every_parameter_its_present_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    register(model)
    whole = wrapped(model)
    register(whole)
    assert names(OptForge(whole.parameters(), **MUON)) == [
        "base_model.model.0.lora_A.weight",
        "base_model.model.0.lora_B.weight",
        "base_model.model.1.weight",
    ]


def test_build_optimizer_refreshes_them_by_itself() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    build_optimizer(model, MUON)
    assert names(build_optimizer(nn.Sequential(model[1]), MUON)) == ["0.bias", "0.weight"]


def test_two_models_whose_parameters_have_the_same_names_are_refused() -> None:
    """Their state could not be told apart in a checkpoint."""
    actor, critic = nn.Linear(8, 8), nn.Linear(8, 8)
    register(actor)
    register(critic)
    both = [*actor.parameters(), *critic.parameters()]
    with pytest.raises(ConfigError, match=r"^weight: 2 parameters were registered under this name.*ModuleDict"):
        OptForge(both, **MUON)
    register(nn.ModuleDict({"actor": actor, "critic": critic}))
    assert names(OptForge(both, **MUON)) == ["actor.bias", "actor.weight", "critic.bias", "critic.weight"]


def test_a_copy_of_a_registered_model_is_to_be_registered() -> None:
    """torch's copies of parameters have no attributes; build_optimizer registers it, OptForge alone says what to do."""
    model = nn.Linear(8, 8)
    register(model)
    again = copy.deepcopy(model)
    with pytest.raises(ConfigError, match=r"not registered; call ds_optforge\.register"):
        OptForge(again.parameters(), **MUON)
    assert names(build_optimizer(again, MUON)) == ["bias", "weight"]
    assert torch.equal(again.weight, model.weight)
