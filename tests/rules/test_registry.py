"""How rules are registered and found: by import, and by entry points of other packages."""

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field

from ds_optforge import ConfigError, build_optimizer, explain
from ds_optforge.rules import (
    Buffer,
    ElementwiseRule,
    Factor,
    MatrixRule,
    RuleError,
    RuleSettings,
    Statistic,
    Sum,
    register_rule,
    rule_names,
    rule_settings,
)
from tests.layers import linears, matrix, set_gradients
from tests.oracles import table_rows
from tests.rules.registering import registered

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _registry_as_before() -> Iterator[None]:
    with registered():
        yield


def elementwise(**members: Any) -> type[ElementwiseRule]:
    """A complete rule, whose members are those given (none: without it)."""

    def step(self: Any, parameters: Any, gradients: Any, state: Any, now: Any) -> None:
        for parameter, gradient, momentum in zip(parameters, gradients, state["momentum"], strict=True):
            momentum.add_(gradient)
            parameter.sub_(now["lr"] * momentum)

    complete = {"buffers": (Buffer("momentum"),), "scheduled": ("lr",), "step": step}
    return type("Plain", (ElementwiseRule,), {k: v for k, v in (complete | members).items() if v is not None})


def whole(**members: Any) -> type[MatrixRule]:
    """A matrix rule likewise."""
    names = ("cost", "direction", "update", "rms", "apply")
    complete: dict[str, Any] = {name: lambda self, *given: None for name in names}
    complete |= {"buffers": (Buffer("momentum"),), "scheduled": ("lr",)}
    return type("Whole", (MatrixRule,), {k: v for k, v in (complete | members).items() if v is not None})


def settings_of(built: Any, base: type = RuleSettings, /, **members: Any) -> Any:
    """Settings named ``test_rule`` that build a rule, whose members are those given (none: without it)."""
    complete: dict[str, Any] = {
        "__module__": __name__,
        "rule": "test_rule",
        "title": "Test rule",
        "builds": built,
        "decay_rates": (),
        "build": lambda self: built(),
    }
    return type("TestSettings", (base,), {k: v for k, v in (complete | members).items() if v is not None})


# ------------------------------------------------------------------------------------------ by import


def test_the_names_are_sorted_and_complete() -> None:
    """And a rule that is registered is among them at once."""
    written = "".join(path.read_text() for path in (ROOT / "ds_optforge" / "rules").glob("*.py"))
    own = re.findall(r'^    rule = "(\w+)"$', written, flags=re.MULTILINE)
    assert len(own) >= 7
    assert set(own) <= set(rule_names())
    assert "test_rule" not in rule_names()
    register_rule(settings_of(elementwise()))
    assert "test_rule" in rule_names()
    assert list(rule_names()) == sorted(rule_names())


def test_a_registered_rule_trains_and_is_explained() -> None:
    """m <- m + g; W <- W - lr m: after gradients 1 and 2, W = 0 - 0.5 (1 + 3) = -2."""
    register_rule(settings_of(elementwise()))
    model = linears(torch.zeros(3, 4))
    optimizer = build_optimizer(model, {"name": "test_rule", "lr": 0.5})
    for gradient in (1.0, 2.0):
        model[0].weight.grad = torch.full((3, 4), gradient)
        optimizer.step()
    assert torch.equal(model[0].weight, torch.full((3, 4), -2.0))
    assert table_rows(explain(model, {"name": "test_rule"}))["0.weight"][2] == "test_rule"


def test_it_stands_beside_others_by_role() -> None:
    register_rule(settings_of(elementwise()))
    model = linears(matrix(3, 4), matrix(3, 4))
    params = {"name": "muon", "adamw": {"lr": 1e-3}, "overrides": [{"match": "^1", "name": "test_rule", "lr": 0.25}]}
    rows = table_rows(explain(model, params))
    assert [rows[name][2] for name in ("0.weight", "1.weight")] == ["muon", "test_rule"]
    optimizer = build_optimizer(model, params)
    set_gradients(model.parameters(), 0)
    expected = model[1].weight.detach() - 0.25 * model[1].weight.grad
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), expected, rtol=1e-6, atol=1e-6)


def test_comparison_files_know_what_it_declares(tmp_path: Path) -> None:
    """A rule that replaces the schedule may be compared without one; whoever else has another schedule is unfair."""
    spec = pytest.importorskip("ds_optforge.experiments.spec", reason="the extra 'experiments' is not installed")
    files = pytest.importorskip("tests.experiments.files")
    schedule = {"type": "OptForgeSchedule", "params": {"name": "cosine", "total_num_steps": 10}}
    sections = {"adamw": {"scheduler": schedule}, "test_rule": {}}
    for name, section in sections.items():
        optimizer = {"type": "OptForge", "params": {"name": name, "lr": 0.5}}
        files.write_config(tmp_path, f"{name}.json", optimizer=optimizer, **section)
    runs = {name: {"config": str(tmp_path / f"{name}.json"), "lr": 0.5} for name in sections}
    path = files.write_yaml(tmp_path, files.common(tmp_path, runs=runs))
    with pytest.raises(ConfigError, match=r"optimizer\.params\.name: got 'test_rule'"):
        spec.read_comparison(path)
    register_rule(settings_of(elementwise()))
    with pytest.raises(ConfigError, match=r"runs\.test_rule: not a fair comparison: scheduler is None"):
        spec.read_comparison(path)
    register_rule(settings_of(elementwise(replaces_schedule=True)))
    assert [contender.name for contender in spec.read_comparison(path).contenders] == ["adamw", "test_rule"]


def test_a_name_nothing_offers_is_refused_with_all_that_are_allowed() -> None:
    assert rule_settings("test_rule") is None
    with pytest.raises(ConfigError) as error:
        build_optimizer(linears(matrix(3, 4)), {"name": "test_rule"})
    assert str(error.value).startswith(f"optimizer.params.name: got 'test_rule'; allowed: {', '.join(rule_names())}")


@pytest.mark.parametrize("name", [None, 3, ["muon"], {"name": "muon"}])
def test_a_name_that_is_no_text_is_no_rule(name: Any) -> None:
    assert rule_settings(name) is None


def test_the_same_class_may_come_again() -> None:
    """As when a notebook's cell runs twice, or a module is reloaded."""
    register_rule(settings_of(elementwise()))
    again = register_rule(settings_of(elementwise()))
    assert rule_settings("test_rule") is again


@pytest.mark.parametrize("name", ["test_rule", "muon"])
def test_a_name_cannot_be_taken_twice(name: str) -> None:
    register_rule(settings_of(elementwise()))
    another = settings_of(elementwise(), rule=name, __qualname__="Another")
    before = rule_settings(name)
    with pytest.raises(
        RuleError, match=rf"{__name__}\.Another: the name '{name}' is taken by [\w.]+Settings; allowed: another"
    ):
        register_rule(another)
    assert rule_settings(name) is before


WRONG_SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "update": ({"update": lambda self, batch, now: batch.matrices.mT}, r"Whole.update: got .*1, 6, 4\D.*\(1, 4, 6\)"),
    "update of nothing": ({"update": lambda self, batch, now: None}, "Whole.update: got None; allowed: a tensor of shape"),
    "direction": ({"direction": lambda self, gradients, *rest: gradients[:-1]}, r"Whole.direction: got \[\]; allowed"),
    "summand": (
        {"sums": (Sum("total"),), "summand": lambda self, name, weights, *rest: [weight * 1 for weight in weights]},
        r"Whole.summand\('total'\): got \[\]; allowed: a tensor like each of the 1 .*reads_weights",
    ),
    "settle": (
        {
            "sums": (Sum("total", per="row"),),
            "summand": lambda self, name, weights, values, *rest: [value * 1 for value in values],
            "settle": lambda self, of_update, values, now: {"root": values["total"][1:]},
        },
        r"Whole.settle: 'root' is not \(4,\), as what it is given",
    ),
}


@pytest.mark.parametrize("member", WRONG_SHAPES)
def test_a_member_that_returns_another_shape_is_named_in_the_first_step(member: str) -> None:
    """A transposed update would be scrambled in the same way on every stage, so no comparison of stages shows it."""
    members, message = WRONG_SHAPES[member]
    works = {"cost": lambda self, rows, cols: 1, "direction": lambda self, gradients, *rest: gradients}
    register_rule(settings_of(whole(**works | members)))
    model = linears(matrix(4, 6))
    optimizer = build_optimizer(model, {"name": "test_rule"})
    set_gradients(model.parameters(), 0)
    with pytest.raises(TypeError, match=message):
        optimizer.step()


@pytest.mark.parametrize("field", ["heads", "sharding"])
def test_a_field_that_every_configuration_has_is_refused_by_name(field: str) -> None:
    """An override, or the section itself, would read it before the rule does."""
    register_rule(settings_of(elementwise(), __annotations__={field: int}, **{field: 1}))
    with pytest.raises(ConfigError, match=f"rule 'test_rule': its field '{field}' is a key of every configuration"):
        build_optimizer(linears(matrix(4, 4)), {"name": "test_rule"})


@pytest.mark.parametrize("thing", [elementwise(), 3, "muon", None, RuleSettings.build], ids=lambda thing: type(thing).__name__)
def test_what_is_no_rules_settings_is_refused(thing: Any) -> None:
    with pytest.raises(RuleError, match="is no rule; allowed: a subclass of RuleSettings"):
        register_rule(thing)


# ------------------------------------------------------------------------------------------ what it lacks


@pytest.mark.parametrize("member", ["cost", "direction", "update", "rms", "apply"])
def test_an_abstract_member_of_a_matrix_rule_that_is_missing_is_named(member: str) -> None:
    assert problems(settings_of(whole(**{member: None}))) == [f"Whole: lacks {member}; allowed: all abstract members defined"]


def test_all_abstract_members_were_tried() -> None:
    assert MatrixRule.__abstractmethods__ == {"cost", "direction", "update", "rms", "apply"}
    assert ElementwiseRule.__abstractmethods__ == {"step"}


class WithDecay(RuleSettings):
    """A setting that a schedule must reach."""

    decay_rates: ClassVar[tuple[str, ...]] = ()
    weight_decay: float = Field(0.0)


def summand(self: Any, name: str, weights: Any, values: Any, state: Any, now: Any) -> Any:
    return values


def settle(self: Any, of_update: Any, values: Any, now: Any) -> Any:
    return values


def team_cost(self: Any, device: Any, rows: Any, cols: Any, blocks: Any) -> Any:
    return 1, 1, 1


def averaged(weight: Any, buffers: Any, scalars: Any) -> Any:
    return weight


UPDATED = Buffer("second", of_update=True)
ROWS = (Sum("square", per="row"),)
LACKING: dict[str, tuple[Any, str]] = {
    "step": (settings_of(elementwise(step=None)), "Plain: lacks step; allowed: all abstract members defined"),
    "rule": (settings_of(elementwise(), rule=None), "rule: got 'nothing'; allowed: a name of small letters"),
    "a name with a blank": (settings_of(elementwise(), rule="my rule"), "rule: got 'my rule'; allowed: a name of small"),
    "a name that is a number": (settings_of(elementwise(), rule="8bit"), "rule: got '8bit'; allowed: a name of small"),
    "title": (settings_of(elementwise(), title=None), "title: got 'nothing'; allowed: a name for people"),
    "an empty title": (settings_of(elementwise(), title=""), "title: got ''; allowed: a name for people"),
    "build": (settings_of(elementwise(), build=None), "build: missing; allowed: a method that returns the rule"),
    "builds": (settings_of(elementwise(), builds=None), "builds: got None; allowed: the class of the rule"),
    "builds no rule": (settings_of(elementwise(), builds=dict), "builds: got <class 'dict'>; allowed: the class of the rule"),
    "decay_rates": (settings_of(elementwise(), decay_rates=None), "decay_rates: missing; allowed: names of fields"),
    "decay_rates of no field": (settings_of(elementwise(), decay_rates=("beta",)), "decay_rates: got 'beta'; allowed: lr, "),
    "buffers": (settings_of(elementwise(buffers=None)), "Plain: buffers: missing; allowed: a tuple"),
    "buffers without a comma": (settings_of(elementwise(buffers=UPDATED)), "Plain: buffers: got Buffer(name='second'"),
    "a buffer's name alone": (settings_of(elementwise(buffers=("m",))), "Plain: buffers: got 'm'; allowed: Buffer"),
    "scheduled": (settings_of(elementwise(scheduled=None)), "Plain: scheduled: missing; allowed: a tuple"),
    "lr in scheduled": (settings_of(elementwise(scheduled=())), "Plain: scheduled: 'lr' is missing, so no schedule would"),
    "weight_decay in scheduled": (settings_of(elementwise(), WithDecay), "Plain: scheduled: 'weight_decay' is missing, so"),
    "scheduled of no field": (settings_of(elementwise(scheduled=("lr", "gamma"))), "Plain: scheduled: got 'gamma'; allowed: "),
    "averages": (settings_of(elementwise(averaged=staticmethod(averaged))), "Plain: averages and averaged: got one of them"),
    "averaged": (settings_of(elementwise(averages=("momentum",))), "Plain: averages and averaged: got one of them; allowed"),
    "averages of no buffer": (
        settings_of(elementwise(averages=("z",), averaged=staticmethod(averaged))),
        "Plain: averages: got 'z'; allowed: momentum",
    ),
    "summand": (settings_of(whole(sums=(Sum("square"),))), "Whole: sums and summand: got one of them; allowed: both"),
    "sums": (settings_of(whole(summand=summand)), "Whole: sums and summand: got one of them; allowed: both, or neither"),
    "team_cost": (settings_of(whole(in_teams=True)), "Whole: in_teams and team_cost: got one of them; allowed: both"),
    "in_teams": (settings_of(whole(team_cost=team_cost)), "Whole: in_teams and team_cost: got one of them; allowed: both"),
    "a sum's name alone": (settings_of(whole(sums=(Sum("x"), "y"), summand=summand)), "Whole: sums: got 'y'; allowed: Sum"),
    "two sums of one name": (
        settings_of(whole(sums=(Sum("square"), Sum("square", of_update=True)), summand=summand)),
        "Whole: sum 'square': a name that is taken; allowed: another one",
    ),
    "a sum per column": (
        settings_of(whole(sums=(Sum("square", per="column"),), summand=summand)),  # type: ignore[arg-type]
        "Whole: 'square': got per='column'; allowed: 'row', 'matrix'",
    ),
    "a statistic per column": (
        settings_of(whole(statistics=(Statistic("rms", per="column"),))),  # type: ignore[arg-type]
        "Whole: 'rms': got per='column'; allowed: 'row', 'matrix'",
    ),
    "a statistic that is given to nobody": (
        settings_of(whole(statistics=(Statistic("rms", given="all"),), sums=ROWS, summand=summand, settle=settle)),  # type: ignore[arg-type]
        "Whole: 'rms': got given='all'; allowed: 'update', 'direction', 'apply'",
    ),
    "settle": (
        settings_of(whole(statistics=(Statistic("rms", given="apply"),), sums=ROWS, summand=summand)),
        "Whole: 'rms': given to 'apply' without settle, which advances it; allowed: both",
    ),
    "sums to settle": (settings_of(whole(settle=settle)), "Whole: settle: got no sums; allowed: with sums"),
    "settle of rows and of matrices": (
        settings_of(whole(statistics=(Statistic("rms", "matrix", "apply"),), sums=ROWS, summand=summand, settle=settle)),
        "Whole: settle: got values per row and per matrix; allowed: one of them",
    ),
    "a factor of nothing that there is": (
        settings_of(whole(factors=(Factor("basis", of="row"),))),  # type: ignore[arg-type]
        "Whole: 'basis': got of='row'; allowed: 'rows', 'cols', 'matrix'",
    ),
    "a factor with the name of a buffer": (
        settings_of(whole(factors=(Factor("momentum", of="rows"),))),
        "Whole: state 'momentum': a name that is taken",
    ),
    "a statistic that is a buffer": (
        settings_of(whole(statistics=(Buffer("rms"),))),
        "Whole: statistics: got Buffer(name='rms'",
    ),
    "two momentum buffers": (
        settings_of(elementwise(buffers=(Buffer("a", momentum=True), Buffer("b", momentum=True)))),
        "Plain: buffers: more than one with momentum=True; allowed: one, or none",
    ),
    "a buffer of the update in an elementwise rule": (
        settings_of(elementwise(buffers=(UPDATED,))),
        "Plain: buffers: got of_update=True in an elementwise rule; allowed: in a matrix rule",
    ),
    "two buffers of one name": (
        settings_of(elementwise(buffers=(Buffer("m"), Buffer("m")))),
        "Plain: state 'm': a name that is taken; allowed: another one",
    ),
    "a statistic with a buffer's name": (
        settings_of(whole(statistics=(Statistic("momentum"),))),
        "Whole: state 'momentum': a name that is taken; allowed: another one",
    ),
    "a buffer of what is around rules": (
        settings_of(elementwise(buffers=(Buffer("weight_average"),))),
        "Plain: state 'weight_average': a name that is taken",
    ),
    "a buffer named step": (settings_of(elementwise(buffers=(Buffer("step"),))), "Plain: state 'step': a name that is taken"),
    "a buffer named as scales": (settings_of(elementwise(buffers=(Buffer("m_absmax"),))), "Plain: state 'm_absmax': a name"),
    "a buffer named as a path": (settings_of(elementwise(buffers=(Buffer("a/b"),))), "Plain: state 'a/b': allowed: a name of"),
    "both bases": (
        settings_of(type("Both", (ElementwiseRule, MatrixRule), {**vars(whole()), "step": elementwise().step})),
        "Both: is not one of ElementwiseRule and MatrixRule; allowed: exactly one as its base",
    ),
}


def problems(settings: Any) -> list[str]:
    """What registration says, without the class's name."""
    with pytest.raises(RuleError) as error:
        register_rule(settings)
    assert rule_settings("test_rule") is None
    place = f"{__name__}.TestSettings: "
    lines = str(error.value).splitlines()
    assert all(line.startswith(place) for line in lines)
    return [line.removeprefix(place) for line in lines]


@pytest.mark.parametrize("lacking", LACKING)
def test_what_is_missing_or_wrong_is_named_and_nothing_else(lacking: str) -> None:
    settings, message = LACKING[lacking]
    (found,) = problems(settings)
    assert found.startswith(message)


def test_complete_ones_are_taken() -> None:
    """Else nothing above would show that it is the missing member that is refused."""
    sums = (Sum("square"), Sum("rows", per="row", of_update=True))
    complete = whole(sums=sums, summand=summand, statistics=(Statistic("rms", per="matrix"),), buffers=(UPDATED,))
    averaging = elementwise(averages=("momentum",), averaged=staticmethod(averaged))
    for rule in (elementwise(), whole(), complete, averaging):
        register_rule(settings_of(rule))


def test_everything_that_is_missing_is_said_at_once() -> None:
    found = problems(settings_of(whole(buffers=None, rms=None, apply=None), title=None, build=None))
    assert [line.partition(":")[0] for line in found] == ["title", "build", "Whole", "Whole"]
    assert "lacks apply, rms" in found[2]
    assert "buffers: missing" in found[3]


def test_a_build_that_returns_another_rule_is_an_error_that_names_both() -> None:
    register_rule(settings_of(elementwise(), build=lambda self: "no rule"))
    with pytest.raises(TypeError, match=re.escape("TestSettings.build: got 'no rule'; allowed: a Plain")):
        build_optimizer(linears(matrix(3, 4)), {"name": "test_rule"})


# ------------------------------------------------------------------------------------------ of other packages

RULE = """
from ds_optforge.rules.sgd import SGD, SGDSettings
from ds_optforge.rules import register_rule

@register_rule
class Settings(SGDSettings):
    rule = "{name}"
    title = "{name}"
"""


class Packages:
    """Distributions on a path of their own: a folder of a module and its metadata each, as pip would leave them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, distribution: str, module: str, code: str, **offers: str) -> None:
        (self.folder / f"{module}.py").write_text(code)
        metadata = self.folder / f"{distribution}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in offers.items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[ds_optforge.rules]", *lines]) + "\n")

    def run(self, code: str) -> list[str]:
        """The lines that code prints in a process that has these packages installed."""
        begin = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(self.folder)!r}]\nimport torch, ds_optforge\n"
        begin += "from ds_optforge.rules import rule_names, rule_settings\n"
        begin += "def refused(name):\n"
        begin += "    try: ds_optforge.build_optimizer(torch.nn.Linear(2, 2), {'name': name})\n"
        begin += "    except ds_optforge.ConfigError as error: return str(error).replace('\\n', ' ')\n"
        finished = subprocess.run(
            [sys.executable, "-c", begin + textwrap.dedent(code)], capture_output=True, text=True, timeout=300
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout.splitlines()


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    return Packages(tmp_path)


def test_a_package_is_imported_when_a_configuration_asks_for_its_rule_and_broken_ones_hurt_nobody_else(
    packages: Packages,
) -> None:
    """Six packages: one that works, one whose rule is defined in another module, and four that are broken."""
    packages.add("good", "good_rule", RULE.format(name="good"), good="good_rule")
    packages.add("parts", "front", "import good_parts", parted="front")
    (packages.folder / "good_parts.py").write_text(RULE.format(name="parted"))
    packages.add("broken", "broken_rule", "raise OSError('no such device')", broken="broken_rule")
    packages.add("absent", "unrelated", "", absent="absent_rule")
    packages.add("empty", "empty_rule", "", empty="empty_rule")
    packages.add("wrong", "wrong_rule", RULE.format(name="Wrong!"), wrong="wrong_rule")
    packages.add("first", "first_rule", RULE.format(name="twice"), twice="first_rule")
    packages.add("second", "second_rule", RULE.format(name="twice"), twice="second_rule")
    packages.add("greedy", "greedy_rule", RULE.format(name="lion"), lion="greedy_rule")
    lines = packages.run(
        """
        offered = {"good", "parted", "broken", "absent", "empty", "wrong", "twice"}
        print(offered <= set(rule_names()), list(rule_names()) == sorted(rule_names()))
        print(refused("muon"), refused("adamw"), refused("sgd"))
        print([name for name in sys.modules if name.endswith("_rule")])
        print(refused("good"), refused("good"), rule_settings("good").__module__)
        print([name for name in sys.modules if name.endswith("_rule")])
        print(refused("parted"), refused("parted"), rule_settings("parted").__module__)
        for name in ("broken", "broken", "absent", "empty", "wrong", "twice", "lion", "unknown"):
            print(refused(name))
        print(refused("muon"), refused("good"))
        """
    )
    assert lines[:6] == [
        "True True",
        "None None None",
        "[]",
        "None None good_rule",
        "['good_rule']",
        "None None good_parts",
    ]
    cannot = "rule 'broken' of broken (broken_rule): cannot be imported: OSError: no such device"
    assert lines[6:8] == [cannot, cannot]
    assert lines[8].startswith("rule 'absent' of absent (absent_rule): cannot be imported: ModuleNotFoundError: ")
    assert lines[9].startswith("rule 'empty' of empty (empty_rule): was imported but registers no rule of this name; allowed: ")
    assert lines[10].startswith(
        "rule 'wrong' of wrong (wrong_rule): cannot be imported: RuleError: wrong_rule.Settings: rule: "
    )
    assert re.fullmatch(r"rule 'twice': offered by (first|second)_rule and by (first|second)_rule; .*", lines[11])
    assert lines[12].startswith("rule 'lion': offered by greedy_rule and by ds_optforge.rules.lion.LionSettings; allowed: one")
    assert lines[13].startswith("optimizer.params.name: got 'unknown'; allowed: ")
    assert lines[14] == "None None"


def test_the_command_line_checks_explains_and_plans_with_it(packages: Packages, tmp_path: Path) -> None:
    packages.add("good", "good_rule", RULE.format(name="good"), good="good_rule")
    config = tmp_path / "config.json"
    config.write_text('{"optimizer": {"type": "OptForge", "params": {"name": "good", "momentum": 0.5}}}')
    bad = tmp_path / "bad.json"
    bad.write_text('{"optimizer": {"type": "OptForge", "params": {"name": "good", "beta": 0.5}}}')
    lines = packages.run(
        f"""
        from ds_optforge.cli import main
        print(main(["check", {str(config)!r}]))
        print(main(["explain", "--config", {str(config)!r}, "--model", "gpt2"]))
        print(main(["plan", "gpt2", "--world-size", "2", "--stage", "2", "--config", {str(config)!r}]))
        print(main(["check", {str(bad)!r}]))
        """
    )
    assert lines[:2] == [f"{config}: valid", "0"]
    rows = table_rows("\n".join(lines))
    assert rows["layers.0-11.mlp.up.weight"][2] == "good"
    assert [line for line in lines if line in ("0", "2")] == ["0", "0", "0", "2"]
    assert any("none of them a matrix" in line for line in lines)


def test_a_package_that_was_imported_before_is_the_one_that_its_entry_point_names(packages: Packages) -> None:
    """And one that is found twice on the path, as in a checkout that is installed too, counts once."""
    packages.add("good", "good_rule", RULE.format(name="good"), good="good_rule")
    copy = packages.folder / "copy"
    copy.mkdir()
    Packages(copy).add("good", "good_rule", RULE.format(name="good"), good="good_rule")
    lines = packages.run(
        f"""
        sys.path.append({str(copy)!r})
        import good_rule
        print(refused("good"), rule_settings("good") is good_rule.Settings)
        """
    )
    assert lines == ["None True"]
