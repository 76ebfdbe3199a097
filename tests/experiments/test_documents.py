"""YAML files: what is wrong is named with its file, line and field, and nothing in them is executed."""

from pathlib import Path

import pytest

from ds_optforge.errors import ConfigError
from ds_optforge.experiments.documents import Document
from ds_optforge.experiments.spec import read_comparison, read_sweep
from tests.experiments.files import common, lr, phase, sweep, write_config, write_yaml

HEAD = 'out: o\nlauncher: [python, "{config}", "{out}", "{seed}", "{steps}"]\nseeds: [0, 1]\n'


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        read_sweep(write_yaml(folder, text))
    return str(raised.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out: [\n", "file.yaml:2: not YAML"),
        ("out: a\nout: b\n", "file.yaml:2: out: given twice, first on line 1; allowed: once"),
        ("- a\n", "file.yaml:1: got a list; allowed: a mapping"),
        ("", "file.yaml:1: got an empty file; allowed: a mapping"),
        ("phases:\n  1: a\n", "file.yaml:2: phases: got the key '1'; allowed: text (quote it)"),
        ("phases: &a\n  - *a\n", "file.yaml: has an alias that contains itself (line 1)"),
        (
            HEAD.replace("seeds: [0, 1]", "seeds: [0]") + "steps: 3\n",
            "file.yaml:3: seeds: got [0] (list); allowed: 2 or more entries",
        ),
        (HEAD + "steps: many\n", "file.yaml:4: steps: got 'many' (str); allowed: a whole number"),
        (HEAD + "steps: 3\nphasis: []\n", "file.yaml:5: phasis: unknown key; did you mean 'phases'?"),
        (HEAD.replace("[0, 1]", "[0]"), "file.yaml:3: seeds: got [0] (list); allowed: "),
        (HEAD.replace("[0, 1]", "[1, 1]"), "file.yaml:3: seeds: got [1, 1] (list); allowed: seeds that differ"),
        (HEAD.replace("{seed}", "{sead}"), "file.yaml:2: launcher: got {sead}; allowed: {config}, {out}, {seed}"),
        (HEAD.replace('"{seed}"', "'7'"), "file.yaml:2: launcher: {seed} is in none of its arguments"),
        (HEAD.replace("python", "no-such-program"), "file.yaml:2: launcher: got the program 'no-such-program', which is not"),
    ],
)
def test_the_problem_is_named_with_file_line_and_field(text: str, expected: str, tmp_path: Path) -> None:
    complete = text if not text.startswith("out: o") else text + "config: c\n"
    if complete.startswith("out: o") and "steps: " not in complete:
        complete += "steps: 3\n"
    if complete.startswith("out: o") and "phas" not in complete:
        complete += "phases: [{}]\n"
    assert expected in refusal(tmp_path, complete)


def test_a_missing_field_is_named_with_what_it_should_be(tmp_path: Path) -> None:
    assert "file.yaml:1: config: missing; allowed: the first baseline, a DeepSpeed configuration file" in refusal(
        tmp_path, HEAD
    )


def test_no_object_is_made_and_no_command_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    text = HEAD + f'config: !!python/object/apply:os.system ["touch {trace}"]\n'
    assert "file.yaml:4: not YAML, or not the safe part of it" in refusal(tmp_path, text)
    assert not trace.exists()


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    read = Document.read(write_yaml(tmp_path, "a: 1e-3\nb: -2E+5\nc: 3.5e2\nd: e1\n"))
    assert read.content == {"a": 0.001, "b": -2e5, "c": 350.0, "d": "e1"}


@pytest.mark.parametrize(
    ("phases", "line", "expected"),
    [
        ([phase("p", A=lr(0.1, prioritty="low"))], "prioritty", "phases[0].experiments.A.prioritty: unknown key; did you mean"),
        (
            [phase("p", A=lr(0.1, priority="urgent"))],
            "urgent",
            "phases[0].experiments.A.priority: got 'urgent' (str); allowed:",
        ),
        ([phase("p", A={"changes": {"optimiser.params.lr": 1}})], "A:", "no section 'optimiser'; did you mean 'optimizer'?"),
        ([phase("p", A=lr(1)), phase("q", A=lr(1))], "", "phases[1].experiments.A: a second 'A', the first is in phases[0]"),
        ([{"name": "p"}], "- name", "phases[0].experiments: got none of experiments, grid and search"),
        ([phase("p", **{"a/b": lr(1)})], "a/b", "got the name 'a/b'; allowed: letters, digits"),
        ([{"name": "p", "grid": {}}], "grid", "phases[0].grid: got {} (dict); allowed: 1 or more entries"),
        (["p"], "- p", "phases[0]: got 'p'; allowed: a mapping of name, experiments, grid"),
    ],
)
def test_a_problem_of_an_experiment_is_found_before_anything_is_launched(
    phases: list[object], line: str, expected: str, tmp_path: Path
) -> None:
    path = sweep(tmp_path, phases)
    with pytest.raises(ConfigError) as raised:
        read_sweep(path)
    assert expected in str(raised.value)
    if line:
        number = next(number for number, text in enumerate(path.read_text().splitlines(), start=1) if line in text)
        assert f"file.yaml:{number}: " in str(raised.value)


def test_an_optforge_section_is_validated_with_the_changes_in_it(tmp_path: Path) -> None:
    optimizer = {"type": "OptForge", "params": {"name": "lion", "lr": 0.1}}
    config = write_config(tmp_path, optimizer=optimizer)
    phases = [phase("p", A={"changes": {"optimizer.params.eps": 1e-8}})]
    with pytest.raises(
        ConfigError, match=r"file.yaml:\d+: phases\[0\].experiments.A: no configuration to run: .*does not read it"
    ):
        read_sweep(write_yaml(tmp_path, common(tmp_path, config=config, phases=phases)))


def test_one_budget_is_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps: got both of or none of steps and seconds; allowed: one of them"):
        read_sweep(sweep(tmp_path, [phase("p", A=lr(1))], seconds=3.0))


@pytest.mark.promise("fair-comparison")
def test_each_configuration_of_a_comparison_says_its_learning_rate(tmp_path: Path) -> None:
    runs = {"a": {"config": write_config(tmp_path)}, "b": {"config": write_config(tmp_path), "lr": 1.0}}
    with pytest.raises(ConfigError, match=r"file.yaml:\d+: runs.a.lr: missing; allowed: its learning rate"):
        read_comparison(write_yaml(tmp_path, common(tmp_path, runs=runs)))
