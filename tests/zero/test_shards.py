"""What is said of shards that nothing describes; described ones are in tests/distributed/test_tensor_parallel.py."""

import pytest
import torch
from torch import nn

from ds_optforge.routing.tags import tag
from ds_optforge.zero.layout import LayoutError
from ds_optforge.zero.shards import full_shape
from ds_optforge.zero.versions import SUPPORTED_DEEPSPEED


def test_a_parameter_that_an_older_autotp_has_cut_is_named() -> None:
    """It marks the parameters of the layers that it replaced, and does not say along which dimension."""
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    tag(model)
    model["q_proj"].weight.data = torch.randn(4, 8)
    model["q_proj"].weight.tensor_model_parallel = True
    with pytest.raises(LayoutError) as error:
        full_shape(model["q_proj"].weight)
    said = str(error.value)
    assert said.startswith("q_proj.weight: is cut by tensor parallelism, and nothing tells how")
    assert "ds_autotp_universal_checkpoint_meta" in said
    assert SUPPORTED_DEEPSPEED in said


def test_one_that_is_registered_afterwards_has_no_name_but_a_shape() -> None:
    parameter = nn.Parameter(torch.randn(4, 8))
    parameter.tensor_model_parallel = True
    with pytest.raises(LayoutError, match=r"^a parameter of shape \(4, 8\): is cut by tensor parallelism"):
        full_shape(parameter)
