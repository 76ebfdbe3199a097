"""What is read from DeepSpeed's objects, and what is said when they are not as expected.

The objects here have a few of DeepSpeed's attributes and lack others, on purpose; that the layout is read right from real
engines is shown in tests/distributed.
"""

from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_optforge.zero.layout import LayoutError, bind
from ds_optforge.zero.partition import Cut
from ds_optforge.zero.shards import full_shape
from ds_optforge.zero.versions import SUPPORTED_DEEPSPEED

NAMES = ["a.weight", "b.weight"]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[dist.ProcessGroup]:
    """A real process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def message(parameters: list[Any], slices: list[Tensor], names: list[str] = NAMES) -> str:
    with pytest.raises(LayoutError) as error:
        bind(parameters, names, slices)
    return str(error.value)


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5))]


class TestReplicated:
    def test_every_parameter_is_one_piece_and_they_lie_in_a_row(self) -> None:
        parameters = weights()
        binding = bind(parameters, NAMES, parameters)
        assert binding.indices == (0, 1)
        assert binding.cuts == (Cut(0, 24, 0), Cut(0, 5, 24))
        assert (binding.rank, binding.world_size, binding.process_group) == (0, 1, None)
        assert binding.device == parameters[0].device

    def test_clones_of_the_parameters_are_found_by_position(self) -> None:
        """Stage 0 in fp16 and bf16."""
        parameters = weights()
        assert bind(parameters, NAMES, [p.detach().clone() for p in parameters]).cuts == (Cut(0, 24, 0), Cut(0, 5, 24))

    def test_a_slice_that_no_attribute_explains(self) -> None:
        """An unknown DeepSpeed: one flat tensor, and parameters that tell nothing about it."""
        said = message(list(weights()), [torch.zeros(29)])
        assert said.startswith("a.weight: the optimizer steps 1 tensor(s) in place of 2 parameter(s)")
        assert "'_hp_mapping'" in said
        assert "'ds_id'" in said
        assert SUPPORTED_DEEPSPEED in said

    def test_tensors_of_other_shapes(self) -> None:
        assert "a.weight: " in message(list(weights()), [torch.zeros(6, 4), torch.zeros(5)])


def zero3_optimizer(**attributes: Any) -> SimpleNamespace:
    """The least that a ZeRO-3 optimizer has had in every version; attributes given as None are missing."""
    known = {
        "fp32_partitioned_groups_flat": [],
        "fp16_groups": [[]],
        "dp_process_group": dist.group.WORLD,
        "offload_optimizer": False,
        "grad_partitions_flat_buffer": torch.zeros(1000),
        **attributes,
    }
    return SimpleNamespace(**{name: value for name, value in known.items() if value is not None})


def zero3_parameter(optimizer: Any, shape: tuple[int, ...] = (4, 6)) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id = 0
    parameter.ds_shape = torch.Size(shape)
    parameter.partition_numel = torch.Size(shape).numel
    parameter._z3_optimizer = optimizer
    return parameter


class TestZero3:
    def test_partitions_lie_in_the_slice_in_the_order_of_the_sub_group(self, one_rank: dist.ProcessGroup) -> None:
        piece = torch.zeros(39)
        optimizer = zero3_optimizer(fp32_partitioned_groups_flat=[torch.zeros(3), piece])
        first, second = zero3_parameter(optimizer), zero3_parameter(optimizer, (3, 5))
        optimizer.fp16_groups = [[], [second, first]]
        binding = bind([first, second], NAMES, [piece])
        assert binding.indices == (1, 0)
        assert binding.cuts == (Cut(0, 15, 0), Cut(0, 24, 15))
        assert (binding.rank, binding.world_size) == (0, 1)
        assert binding.process_group is one_rank

    def test_a_sub_group_that_has_ranks_of_its_own_is_cut_over_them(self, one_rank: dist.ProcessGroup) -> None:
        """As newer DeepSpeed has it; in older all have those of the whole optimizer."""
        piece, asked = torch.zeros(24), []
        optimizer = zero3_optimizer(fp32_partitioned_groups_flat=[piece], dp_process_group=None)
        optimizer._get_sub_group_process_group = lambda index: asked.append(index) or one_rank
        parameter = zero3_parameter(optimizer)
        optimizer.fp16_groups = [[parameter]]
        assert bind([parameter], NAMES, [piece]).process_group is one_rank
        assert asked == [0]

    def test_gradients_that_it_keeps_are_those_of_the_sub_group(self, one_rank: dist.ProcessGroup) -> None:
        """One buffer holds the gradients of all sub-groups; a step uses up those of its own."""
        first, second = torch.zeros(24), torch.zeros(15)
        optimizer = zero3_optimizer(fp32_partitioned_groups_flat=[first, second], grad_partitions_flat_buffer=torch.ones(39))
        parameter = zero3_parameter(optimizer, (3, 5))
        optimizer.fp16_groups = [[], [parameter]]
        bind([parameter], NAMES, [second]).clear_spent_gradients([second])
        assert torch.equal(optimizer.grad_partitions_flat_buffer, torch.cat([torch.ones(24), torch.zeros(15)]))

    def test_the_shape_of_an_emptied_parameter_is_that_of_the_whole(self) -> None:
        assert full_shape(zero3_parameter(None, (3, 5))) == (3, 5)

    @pytest.mark.parametrize(
        "missing",
        [
            "fp32_partitioned_groups_flat",
            "dp_process_group",
            "fp16_groups",
            "offload_optimizer",
            "grad_partitions_flat_buffer",
        ],
    )
    def test_an_attribute_that_its_optimizer_lacks_is_named(self, missing: str, one_rank: dist.ProcessGroup) -> None:
        piece = torch.zeros(24)
        parameter = zero3_parameter(None)
        known = {"fp32_partitioned_groups_flat": [piece], "fp16_groups": [[parameter]]}
        parameter._z3_optimizer = zero3_optimizer(**{**known, missing: None})
        said = message([parameter], [piece])
        assert f"has no attribute '{missing}'" in said
        assert f"DeepSpeed {SUPPORTED_DEEPSPEED}; found: {version('deepspeed')}" in said

    @pytest.mark.parametrize("missing", ["_z3_optimizer", "partition_numel"])
    def test_an_attribute_that_a_parameter_lacks_is_named(self, missing: str, one_rank: dist.ProcessGroup) -> None:
        piece = torch.zeros(24)
        optimizer = zero3_optimizer(fp32_partitioned_groups_flat=[piece])
        parameter = zero3_parameter(optimizer)
        optimizer.fp16_groups = [[parameter]]
        delattr(parameter, missing)
        said = message([parameter], [piece])
        assert f"Parameter has no attribute '{missing}'" in said
        assert SUPPORTED_DEEPSPEED in said

    def test_a_slice_that_is_none_of_its_sub_groups(self) -> None:
        optimizer = zero3_optimizer(fp32_partitioned_groups_flat=[torch.zeros(24)])
        assert "none of ZeRO-3's fp32_partitioned_groups_flat" in message([zero3_parameter(optimizer)], [torch.zeros(24)])

    def test_partitions_that_do_not_fill_the_slice(self, one_rank: dist.ProcessGroup) -> None:
        piece = torch.zeros(30)
        optimizer = zero3_optimizer(fp32_partitioned_groups_flat=[piece])
        parameter = zero3_parameter(optimizer)
        optimizer.fp16_groups = [[parameter]]
        assert "sub-group 0: its partitions hold 24 elements, its slice 30" in message([parameter], [piece])

    def test_several_slices_at_once_are_no_layout_that_is_known(self) -> None:
        parameter = zero3_parameter(zero3_optimizer())
        assert SUPPORTED_DEEPSPEED in message([parameter], [torch.zeros(24), torch.zeros(24)])

    def test_a_sub_group_with_a_parameter_of_another_group(self, one_rank: dist.ProcessGroup) -> None:
        piece = torch.zeros(48)
        optimizer = zero3_optimizer(fp32_partitioned_groups_flat=[piece])
        parameter, stranger = zero3_parameter(optimizer), zero3_parameter(optimizer)
        optimizer.fp16_groups = [[parameter, stranger]]
        assert SUPPORTED_DEEPSPEED in message([parameter], [piece])

    @pytest.mark.parametrize(
        ("attributes", "said"),
        [
            ({"swap_optimizer": True}, "zero_optimization.offload_optimizer.device: got 'nvme'; allowed: 'cpu' or 'none'"),
            (
                {"offload_optimizer": True, "partial_offload": 0.5},
                "zero_optimization.offload_optimizer.ratio: got 0.5; allowed: 1.0",
            ),
            ({"zenflow": True}, "zero_optimization.zenflow: got a section; allowed: none"),
        ],
        ids=["nvme", "ratio", "zenflow"],
    )
    def test_a_feature_that_hides_the_slices_is_refused_by_name(self, attributes: dict[str, Any], said: str) -> None:
        optimizer = zero3_optimizer(**attributes)
        assert message([zero3_parameter(optimizer)], [torch.zeros(24)]).startswith(said)


def flat_partition(*shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], Tensor]:
    """Parameters as views of one flat buffer, in order, and the fp32 slice of a single rank."""
    numels = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.randn(sum(numels))
    parameters = []
    for part, shape in zip(flat.split(numels), shapes, strict=True):
        parameter = nn.Parameter(torch.empty(0))
        parameter.data = part.view(shape)
        parameter._hp_mapping = None
        parameter._dp_group = dist.group.WORLD
        parameters.append(parameter)
    return parameters, flat.clone()


class TestFlatPartition:
    def test_the_place_in_the_buffer_is_the_place_of_the_weight(self, one_rank: dist.ProcessGroup) -> None:
        """Whatever the order of the parameters is."""
        (first, second), piece = flat_partition((4, 6), (5,))
        binding = bind([second, first], NAMES, [piece])
        assert binding.indices == (1, 0)
        assert binding.cuts == (Cut(0, 29, 0), Cut(24, 29, 0))
        assert (binding.rank, binding.world_size) == (0, 1)

    def test_an_attribute_that_a_parameter_lacks_is_named(self) -> None:
        parameter = nn.Parameter(torch.randn(4, 6))
        parameter._hp_mapping = None
        said = message([parameter], [torch.zeros(24)])
        assert said.startswith("Parameter has no attribute '_dp_group'")
        assert f"DeepSpeed {SUPPORTED_DEEPSPEED}; found: {version('deepspeed')}" in said

    def test_an_attribute_that_its_mapping_lacks_is_named(self, one_rank: dist.ProcessGroup) -> None:
        parameters, piece = flat_partition((4, 6), (5,))
        parameters[1]._hp_mapping = SimpleNamespace()
        assert "has no attribute 'use_offload'" in message(list(parameters), [piece])

    @pytest.mark.parametrize("offload", [True, False])
    def test_gradients_are_used_up_where_offload_keeps_them(self, offload: bool, one_rank: dist.ProcessGroup) -> None:
        parameters, piece = flat_partition((4, 6), (5,))
        parameters[0]._hp_mapping = SimpleNamespace(use_offload=offload)
        piece.grad = torch.ones(29)
        bind(parameters, NAMES, [piece]).clear_spent_gradients([piece])
        assert piece.grad.any().item() is not offload

    def test_a_weight_outside_the_buffer_is_named(self, one_rank: dist.ProcessGroup) -> None:
        (first, second), piece = flat_partition((4, 6), (5,))
        second.data = second.detach().clone()
        said = message([first, second], [piece])
        assert said.startswith("b.weight: its weight is not a view of its group's flat buffer")
        assert SUPPORTED_DEEPSPEED in said

    def test_a_slice_with_other_values_than_the_weight_is_named(self, one_rank: dist.ProcessGroup) -> None:
        parameters, piece = flat_partition((4, 6), (5,))
        piece[26] += 1
        problem = bind(list(parameters), ["a.weight", "b.weight"], [piece]).problem
        assert problem.startswith("b.weight: ZeRO's slice on rank 0 does not hold the weight's")

    def test_several_slices_at_once_are_no_layout_that_is_known(self, one_rank: dist.ProcessGroup) -> None:
        parameters, piece = flat_partition((4, 6), (5,))
        assert SUPPORTED_DEEPSPEED in message(list(parameters), [piece, piece])
