"""Matrices inside parameters: heads, fused projections, banks, filters, transposed storage. Each is a matrix like any other.

Always against the same matrices as parameters of their own, after three steps with momentum and decay, in one process
(tests/distributed/test_rules.py has the stages). 1e-5 of the change: float32 products in batches of other sizes.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ds_optforge import ConfigError, build_optimizer, explain
from ds_optforge.rules import rule_names
from ds_optforge.rules.muon import MuonSettings
from ds_optforge.testing.params import settings_of
from tests.layers import linears, matrix
from tests.oracles import EXACT, relative_error, table_rows

CONFIG = {"lr": 0.02, "weight_decay": 0.3, "max_aspect_ratio": 100, **EXACT}
RULES = [name for name in rule_names() if issubclass(settings_of(name), MuonSettings)]
STEPS = 3


def changes(model: nn.Module, gradients: list[Tensor], config: dict[str, Any]) -> Tensor:
    """What training does to the model's only parameter, given its gradient in each step."""
    (parameter,) = model.parameters()
    before = parameter.detach().clone()
    optimizer = build_optimizer(model, config)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach() - before


def separately(pieces: list[Tensor], gradients: list[list[Tensor]], config: dict[str, Any]) -> list[Tensor]:
    """The same of each matrix held as a layer of its own; a single row counts as one because an override says so."""
    config = {**config, "overrides": [{"match": "weight", "role": "matrix"}]}
    return [changes(linears(piece), of_piece, config) for piece, of_piece in zip(pieces, gradients, strict=True)]


def assert_rows_are_stepped_as_separate_matrices(
    layer: nn.Linear, rows: list[int], rule: str, override: dict[str, Any]
) -> None:
    """``layer`` under the override, against its row blocks of the given heights."""
    config = {"name": rule, **CONFIG}
    gradients = [matrix(*layer.weight.shape, seed=10 + step) for step in range(STEPS)]
    per_piece = [list(steps) for steps in zip(*(torch.split(g, rows) for g in gradients), strict=True)]
    expected = separately(list(torch.split(layer.weight.detach(), rows)), per_piece, config)
    found = changes(layer, gradients, {**config, "overrides": [{"match": "weight", **override}]})
    for piece, reference in zip(torch.split(found, rows), expected, strict=True):
        assert relative_error(piece, reference) < 1e-5


CUTS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "heads": ({"heads": 4}, [12] * 4),
    "one head": ({"heads": 1}, [48]),
    "a head per row": ({"heads": 48}, [1] * 48),
    "split": ({"split": [10, 31, 7]}, [10, 31, 7]),
    "split and heads": ({"split": [24, 16, 8], "heads": 2}, [12, 12, 8, 8, 4, 4]),
    "grouped-query attention": ({"split": [24, 12, 12], "heads": [4, 2, 2]}, [6] * 8),
    "values in one piece": ({"split": [24, 12, 12], "heads": [2, 2, 1]}, [12, 12, 6, 6, 12]),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cut", CUTS)
def test_row_blocks_of_a_fused_projection(cut: str, rule: str) -> None:
    override, rows = CUTS[cut]
    layer = nn.Linear(20, 48, bias=False)
    assert_rows_are_stepped_as_separate_matrices(layer, rows, rule, override)


def test_a_cut_changes_the_update() -> None:
    """So that the tests above can fail."""
    config = {"name": "muon", **CONFIG}
    gradients = [matrix(48, 20, seed=10 + step) for step in range(STEPS)]
    whole, cut = linears(matrix(48, 20)), linears(matrix(48, 20))
    fused = changes(cut, gradients, {**config, "overrides": [{"match": "weight", "heads": 4}]})
    assert relative_error(fused, changes(whole, gradients, config)) > 0.1


def test_a_later_override_decides() -> None:
    layer = nn.Linear(20, 48, bias=False)
    overrides = [{"match": "weight", "heads": 4}, {"match": "w", "heads": 2}]
    rows = table_rows(explain(layer, {"name": "muon", "overrides": overrides}))
    assert rows["weight"][3] == "2 of 24x20"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("idle", [None, 2])
def test_the_experts_of_a_bank(idle: int | None, rule: str) -> None:
    """(experts, out, in); one that saw no token stays as it is."""
    config = {"name": rule, **CONFIG}
    bank = nn.ParameterList([matrix(4, 6, 10)])
    gradients = [matrix(4, 6, 10, seed=10 + step) for step in range(STEPS)]
    if idle is not None:
        for gradient in gradients:
            gradient[idle] = 0
    expected = separately(list(matrix(4, 6, 10)), [[g[i] for g in gradients] for i in range(4)], config)
    found = changes(bank, gradients, config)
    for expert in range(4):
        if expert == idle:
            assert not found[expert].any()
        else:
            assert relative_error(found[expert], expected[expert]) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_gate_and_up_of_every_expert(rule: str) -> None:
    """(experts, gate + up, in) with a split: a cut of every member."""
    config = {"name": rule, **CONFIG}
    weight, rows = matrix(3, 12, 10), [8, 4]
    gradients = [matrix(3, 12, 10, seed=10 + step) for step in range(STEPS)]
    found = changes(nn.ParameterList([weight.clone()]), gradients, {**config, "overrides": [{"match": "", "split": rows}]})
    for expert in range(3):
        pieces = list(torch.split(weight[expert], rows))
        per_piece = [list(steps) for steps in zip(*(torch.split(g[expert], rows) for g in gradients), strict=True)]
        expected = separately(pieces, per_piece, config)
        for piece, reference in zip(torch.split(found[expert], rows), expected, strict=True):
            assert relative_error(piece, reference) < 1e-5


@pytest.mark.promise("muon-convolutions")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "filters",
    [
        nn.Conv1d(4, 8, 5, bias=False),
        nn.Conv2d(4, 8, 3, bias=False),
        nn.Conv3d(2, 8, 2, bias=False),
    ],
    ids=["Conv1d", "Conv2d", "Conv3d"],
)
def test_convolution_filters_are_outputs_by_all_the_rest(filters: nn.Module, rule: str) -> None:
    config = {"name": rule, **CONFIG}
    (weight,) = (parameter.detach().clone() for parameter in filters.parameters())
    gradients = [matrix(*weight.shape, seed=10 + step) for step in range(STEPS)]
    (expected,) = separately([weight.flatten(1)], [[g.flatten(1) for g in gradients]], config)
    assert relative_error(changes(filters, gradients, config).flatten(1), expected) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_each_group_of_a_convolution_is_a_matrix(rule: str) -> None:
    """Four groups of two outputs, two inputs and nine pixels each."""
    filters = nn.Conv2d(8, 8, 3, groups=4, bias=False)
    config = {"name": rule, **CONFIG}
    gradients = [matrix(8, 18, seed=10 + step) for step in range(STEPS)]
    pieces = list(filters.weight.detach().flatten(1).split(2))
    expected = separately(pieces, [[g[2 * group : 2 * group + 2] for g in gradients] for group in range(4)], config)
    found = changes(filters, [g.view(8, 2, 3, 3) for g in gradients], config)
    assert relative_error(found.flatten(1), torch.cat(expected)) < 1e-5


@pytest.mark.promise("muon-convolutions")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("transposed", [nn.ConvTranspose1d(4, 8, 5, bias=False), nn.ConvTranspose2d(8, 4, 3, bias=False)])
def test_filters_of_a_transposed_convolution_are_stored_in_out(transposed: nn.Module, rule: str) -> None:
    """They are (in, out, ...): its outputs are the columns, for the scale and for NorMuon's rows."""
    config = {"name": rule, **CONFIG}
    (weight,) = (parameter.detach().clone() for parameter in transposed.parameters())
    gradients = [matrix(*weight.shape, seed=10 + step) for step in range(STEPS)]
    (expected,) = separately([weight.flatten(1).T.contiguous()], [[g.flatten(1).T.contiguous() for g in gradients]], config)
    assert relative_error(changes(transposed, gradients, config).flatten(1).T, expected) < 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", ["shape", "spectral"])
@pytest.mark.parametrize(("out", "into"), [(48, 20), (20, 48)])
def test_conv1d_of_transformers_is_a_linear_stored_in_out(out: int, into: int, scale: str, rule: str) -> None:
    """GPT-2's layers: scales and row statistics are those of the transpose."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    config = {"name": rule, **CONFIG, "orthogonalization": {"dtype": "float32", "scale": scale}}
    model = conv1d(out, into)
    model.bias.requires_grad_(False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, config)
    gradients = [matrix(into, out, seed=10 + step) for step in range(STEPS)]
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimizer.step()
    (expected,) = separately([before.T.contiguous()], [[g.T.contiguous() for g in gradients]], config)
    assert relative_error((model.weight.detach() - before).T, expected) < 1e-5


def test_a_conv1d_of_ones_own_is_no_linear() -> None:
    """The name alone tells nothing: transformers' has `nf`, its number of outputs."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(matrix(48, 20))

    config = {"name": "muon", **CONFIG}
    gradients = [matrix(48, 20, seed=10 + step) for step in range(STEPS)]
    found = changes(Conv1D(), gradients, config)
    assert relative_error(found, changes(linears(matrix(48, 20)), gradients, config)) < 1e-5


def test_every_matrix_is_orthogonalized_whatever_its_aspect_ratio() -> None:
    """Who names matrices inside a parameter means them, thin ones too."""
    rows = table_rows(explain(nn.Linear(48, 48, bias=False), {"name": "muon", "overrides": [{"match": "", "heads": 24}]}))
    assert rows["weight"][2:4] == ["muon", "24 of 2x48"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"heads": 5}, r"^0\.weight: overrides\[0\]\.heads: got 5 for 48 rows; allowed: a divisor of 48"),
    "split": (
        {"split": [10, 20]},
        r"^0\.weight: overrides\[0\]\.split: got \[10, 20\], 30 rows; allowed: parts of its 48 rows",
    ),
    "heads of a part": (
        {"split": [40, 8], "heads": 16},
        r"^0\.weight: overrides\[0\]\.heads: got 16 for 40 rows; allowed: a divisor of 40",
    ),
    "a list of another length": (
        {"split": [24, 24], "heads": [2, 2, 2]},
        r"^0\.weight: overrides\[0\]\.heads: got 3 counts; allowed: 2, one per entry of split",
    ),
    "a list without a split": ({"heads": [2, 2]}, r"^0\.weight: overrides\[0\]\.heads: got 2 counts; allowed: 1, one per"),
}


@pytest.mark.parametrize("bad", BAD)
def test_numbers_that_do_not_fit_are_an_error_with_the_parameter_and_both_numbers(bad: str) -> None:
    override, message = BAD[bad]
    with pytest.raises(ConfigError, match=message):
        build_optimizer(linears(matrix(48, 20)), {"name": "muon", "overrides": [{"match": "weight", **override}]})


@pytest.mark.parametrize("override", [{"heads": 2}, {"split": [30, 18]}], ids=["heads", "split"])
def test_a_cut_of_a_weight_stored_in_out_is_an_error_that_says_so(override: dict[str, Any]) -> None:
    """Its outputs are columns, which are no contiguous range; a split into equal parts is one, and nothing else."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    (key,) = override
    with pytest.raises(ConfigError, match=rf"^weight: overrides\[0\]\.{key} cuts rows, but this weight is stored \(in, out\)"):
        build_optimizer(conv1d(48, 20), {"name": "muon", "overrides": [{"match": "weight", **override}]})


def test_an_override_that_fits_one_layer_and_not_another_names_the_other() -> None:
    with pytest.raises(ConfigError, match=r"^1\.weight: overrides\[0\]\.heads: got 4 for 30 rows"):
        build_optimizer(
            linears(matrix(48, 20), matrix(30, 20)), {"name": "muon", "overrides": [{"match": "weight", "heads": 4}]}
        )


def test_explain_counts_the_matrices() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(20, 48, bias=False), "experts": nn.ParameterList([matrix(4, 6, 10)])})
    rows = table_rows(explain(model, {"name": "muon", "overrides": [{"match": "qkv", "split": [24, 12, 12]}]}))
    assert [rows[name][3] for name in ("qkv.weight", "experts.0")] == ["1 of 24x20 + 2 of 12x20", "4 of 6x10"]


class Experts(nn.Module):
    """Banks of two experts with a gate and an up projection, as GPT-OSS and Llama 4 store them."""

    def __init__(self, by_turns: bool) -> None:
        super().__init__()
        self.is_transposed, self.is_concatenated = True, not by_turns
        self.gate_up_proj = nn.Parameter(torch.stack([matrix(10, 12, seed=index) for index in range(2)]))


class GPTNeoXAttention(nn.Module):
    """Attention with 4 heads of 3 rows of queries, keys and values in turn: recognised by the name of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.query_key_value = nn.Linear(20, 36, bias=False)


def turns(parts: int, block: int, outputs: int) -> list[list[int]]:
    """The outputs of each part: ``block`` of the first, of the second, ..., of the last, and again."""
    return [[row for row in range(outputs) if row // block % parts == part] for part in range(parts)]


JOINED: dict[str, tuple[Callable[[], nn.Module], Any, list[list[int]]]] = {
    "columns": (lambda: Conv1D(36, 20), [12, 12, 12], turns(3, 12, 36)),
    "experts, halves of columns": (lambda: Experts(False), "auto", turns(2, 6, 12)),
    "experts, columns by turns": (lambda: Experts(True), "auto", turns(2, 1, 12)),
    "rows by turns": (GPTNeoXAttention, "auto", turns(3, 3, 36)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", JOINED)
def test_matrices_that_are_no_ranges_of_a_weight(case: str, rule: str) -> None:
    """Queries, keys and values as columns, or in turn head by head; gate and up by turns."""
    make, split, outputs = JOINED[case]
    model = nn.ModuleDict({"attn": nn.ModuleDict({"experts": make()}) if "experts" in case else make()})
    for parameter in list(model.parameters())[1:]:
        parameter.requires_grad_(False)  # the bias of a Conv1D
    weight = next(model.parameters())
    stored = case != "rows by turns"
    gradients = [torch.stack([matrix(*weight.shape[-2:], seed=10 * step + bank) for bank in range(2)]) for step in range(STEPS)]
    gradients = [g if weight.dim() == 3 else g[0] for g in gradients]
    config = {"name": rule, **CONFIG}

    def pieces_of(tensor: Tensor) -> list[Tensor]:
        banks = tensor.detach().unbind() if tensor.dim() == 3 else [tensor.detach()]
        return [(bank.mT if stored else bank)[rows].contiguous() for bank in banks for rows in outputs]

    expected = separately(pieces_of(weight), [list(steps) for steps in zip(*map(pieces_of, gradients), strict=True)], config)
    before = weight.detach().clone()
    optimizer = build_optimizer(model, {**config, "overrides": [{"match": "", "split": split}]})
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    for piece, reference in zip(pieces_of(weight.detach() - before), expected, strict=True):
        assert relative_error(piece, reference) < 1e-5


def test_matrices_that_are_no_ranges_need_whole_weights() -> None:
    model = nn.ModuleDict({"attn": GPTNeoXAttention()})
    with pytest.raises(ConfigError, match=r"query_key_value.*3 matrices that are no ranges.*got sharding.mode 'shard_local'"):
        build_optimizer(model, {"name": "muon", "split": "auto", "sharding": {"mode": "shard_local"}})


@pytest.mark.promise("normuon-rows")
def test_row_statistics_of_all_matrices_follow_each_other() -> None:
    """There is one value per output row of each."""
    layer = nn.Linear(20, 48, bias=False)
    optimizer = build_optimizer(layer, {"name": "normuon", **EXACT, "overrides": [{"match": "", "split": [24, 16, 8]}]})
    layer.weight.grad = matrix(48, 20)
    optimizer.step()
    rows = optimizer.state[layer.weight]["row_second_moment"]
    for low, high in itertools.pairwise([0, 24, 40, 48]):
        alone = linears(matrix(48, 20)[low:high])
        reference = build_optimizer(alone, {"name": "normuon", **EXACT})
        alone[0].weight.grad = matrix(48, 20)[low:high]
        reference.step()
        assert relative_error(rows[low:high], reference.state[alone[0].weight]["row_second_moment"]) < 1e-5
