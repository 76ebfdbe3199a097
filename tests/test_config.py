"""What a section may say, how its layers resolve, and that every mistake is one error: path, found, allowed."""

from typing import Any

import pytest

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.config.schedule import ScheduleConfig, schedule_config
from ds_optforge.config.sections import CommonSettings
from ds_optforge.errors import ConfigError
from ds_optforge.rules import rule_names
from ds_optforge.testing.params import settings_of

Section = dict[str, Any]


def problem(section: Section) -> str:
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(section)
    return str(error.value)


def muon(**section: Any) -> Section:
    return {"name": "muon", **section}


def adamw(**section: Any) -> Section:
    return {"name": "adamw", **section}


def orthogonalization(**section: Any) -> Section:
    return muon(orthogonalization=section)


def override(**section: Any) -> Section:
    return muon(overrides=[{"match": "blocks", **section}])


OUT_OF_RANGE = {
    "lr": (muon(lr=-1), "-1", "greater than or equal to 0"),
    "lr ": (muon(lr=float("nan")), "nan", "finite"),
    "weight_decay": (muon(weight_decay=-0.1), "-0.1", "greater than or equal to 0"),
    "momentum": (muon(momentum=1.0), "1.0", "less than 1"),
    "max_aspect_ratio": (muon(max_aspect_ratio=0.5), "0.5", "greater than or equal to 1"),
    "sharding.bucket_numel": (muon(sharding={"bucket_numel": 0}), "0", "greater than or equal to 1"),
    "sharding.gather_every": (muon(sharding={"mode": "shard_local", "gather_every": 1}), "1", "greater than or equal to 2"),
    "orthogonalization.steps": (orthogonalization(steps=0), "0", "greater than or equal to 1"),
    "betas[1]": (adamw(betas=[0.9, 1.0]), "1.0", "less than 1"),
    "eps": (adamw(eps=0), "0", "greater than 0"),
    "adamw.lr": (muon(adamw={"lr": -2}), "-2", "greater than or equal to 0"),
    "roles.embedding.betas[0]": (muon(roles={"embedding": {"betas": [-0.5, 0.9]}}), "-0.5", "greater than or equal to 0"),
    "overrides[0].momentum": (override(momentum=2), "2", "less than 1"),
}

WRONG_TYPE = {
    "lr": (muon(lr="0.02"), "'0.02' (str)", "a number"),
    "lr ": (muon(lr=True), "True (bool)", "a number"),
    "weight_decay": (muon(weight_decay=None), "None (NoneType)", "a number"),
    "nesterov": (muon(nesterov=1), "1 (int)", "true or false"),
    "adamw": (muon(adamw=3), "3 (int)", "an object"),
    "roles.matrix": (muon(roles={"matrix": 5}), "5 (int)", "an object"),
    "orthogonalization": (muon(orthogonalization=5), "5 (int)", "an object"),
    "orthogonalization.steps": (orthogonalization(steps=5.0), "5.0 (float)", "a whole number"),
    "betas": (adamw(betas=0.9), "0.9 (float)", "a list"),
    "betas[0]": (adamw(betas=["0.9", 0.95]), "'0.9' (str)", "a number"),
    "overrides": (muon(overrides={"match": "blocks"}), "{'match': 'blocks'} (dict)", "a list"),
    "overrides[0]": (muon(overrides=["blocks"]), "'blocks' (str)", "an object"),
    "overrides[0].match": (muon(overrides=[{"match": 3}]), "3 (int)", "a text"),
    "overrides[0].heads": (override(heads="all"), "'all' (str)", "integer"),
}

NOT_A_CHOICE = {
    "name": ({"name": "adagrad"}, "'adagrad'", ["muon", "adamw"]),
    "name ": ({"name": ["muon"]}, "['muon']", ["muon", "adamw"]),
    "roles.embedding.name": (muon(roles={"embedding": {"name": "adagrad"}}), "'adagrad'", ["muon", "adamw"]),
    "overrides[0].name": (override(name="adagrad"), "'adagrad'", ["muon", "adamw"]),
    "overrides[0].role": (override(role="head"), "'head'", ["matrix", "embedding", "unembedding", "scalar"]),
    "roles.head": (muon(roles={"head": {}}), "'head'", ["matrix", "embedding", "unembedding", "scalar"]),
    "sharding.mode": (muon(sharding={"mode": "scatter"}), "'scatter'", ["gather", "shard_local"]),
    "sharding.wire_dtype": (muon(sharding={"wire_dtype": "fp16"}), "'fp16'", ["float32", "bfloat16"]),
    "orthogonalization.method": (orthogonalization(method="svd"), "'svd'", ["auto", "standard", "gram"]),
    "orthogonalization.dtype": (orthogonalization(dtype="float16"), "'float16'", ["float32", "bfloat16"]),
    "orthogonalization.rms": (orthogonalization(rms=0.0, scale="match_rms_adamw"), "0", "greater than 0"),
    "orthogonalization.scale": (orthogonalization(scale="rms"), "'rms'", ["shape", "match_rms_adamw", "spectral", "none"]),
    "orthogonalization.coefficients": (
        orthogonalization(coefficients="quintc"),
        "'quintc'",
        ["quintic", "polar_express", "you", "cans", "deepseek_v4", "list of triples"],
    ),
}

UNKNOWN_KEY = {
    "lrr": (muon(lrr=0.02), "lr"),
    "overides": (muon(overides=[]), "overrides"),
    "orthogonalization.stepz": (orthogonalization(stepz=5), "steps"),
    "sharding.bucket_nume": (muon(sharding={"bucket_nume": 5}), "bucket_numel"),
    "adamw.beta": (muon(adamw={"beta": [0.9, 0.95]}), "betas"),
    "roles.scalar.epsi": (muon(roles={"scalar": {"epsi": 1e-8}}), "eps"),
    "overrides[0].momentun": (override(momentun=0.9), "momentum"),
    "momentum_warmup.step": (muon(momentum_warmup={"step": 300}), "steps"),
}

# The key belongs to the second rule; the section is the first one's.
KEY_OF_ANOTHER_RULE = {
    "betas": (muon(betas=[0.9, 0.95]), "muon", "adamw"),
    "momentum": (adamw(momentum=0.9), "adamw", "muon"),
    "orthogonalization": (adamw(orthogonalization={"steps": 5}), "adamw", "muon"),
    "adamw.momentum": (muon(adamw={"momentum": 0.9}), "adamw", "muon"),
    "roles.matrix.betas": (muon(roles={"matrix": {"betas": [0.9, 0.95]}}), "muon", "adamw"),
    "roles.embedding.nesterov": (muon(roles={"embedding": {"nesterov": True}}), "adamw", "muon"),
    "overrides[0].eps": (override(role="matrix", eps=1e-8), "muon", "adamw"),
    "overrides[0].momentum": (override(name="adamw", momentum=0.9), "adamw", "muon"),
}

BAD_COEFFICIENTS = {
    "a number": (5, "5"),
    "no triples": ([], "[]"),
    "a pair": ([[1.0, 2.0]], "[[1.0, 2.0]]"),
    "text in a triple": ([["1", 2.0, 3.0]], "'1'"),
    "infinite": ([[float("inf"), 2.0, 3.0]], "inf"),
}


def of_path(key: str) -> str:
    """The key of a table above: a trailing space tells two cases of one path apart."""
    return f"optimizer.params.{key.strip()}: "


@pytest.mark.promise("validated-fields")
@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_value_out_of_range(key: str) -> None:
    section, found, allowed = OUT_OF_RANGE[key]
    message = problem(section)
    assert message.startswith(f"{of_path(key)}got {found} ")
    assert message.count("\n") == 0
    assert allowed in message.split("allowed: ")[1]


@pytest.mark.promise("validated-fields")
@pytest.mark.parametrize("key", WRONG_TYPE)
def test_a_value_of_the_wrong_type(key: str) -> None:
    """Numbers are numbers, not strings or booleans."""
    section, found, allowed = WRONG_TYPE[key]
    message = problem(section)
    assert message.startswith(f"{of_path(key)}got {found}; allowed: ")
    assert message.count("\n") == 0
    assert allowed in message.split("allowed: ")[1]


@pytest.mark.promise("validated-fields")
@pytest.mark.parametrize("name", rule_names())
def test_every_field_of_every_rule_refuses_what_it_cannot_hold(name: str) -> None:
    """None of them takes any text."""
    fields = {**settings_of(name).model_fields, **CommonSettings.model_fields}
    assert len(fields) >= 14
    for field in fields:
        assert problem({"name": name, field: "no such"}).startswith(f"optimizer.params.{field}: got 'no such'")
        assert "allowed: " in problem({"name": name, field: "no such"})


@pytest.mark.promise("validated-fields")
@pytest.mark.parametrize("field", ScheduleConfig.model_fields)
def test_every_field_of_a_schedule_refuses_what_it_cannot_hold(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^scheduler\.params\.{field}: got 'no such' \(str\); allowed: "):
        schedule_config({field: "no such"})


@pytest.mark.promise("unknown-name")
@pytest.mark.parametrize("key", NOT_A_CHOICE)
def test_a_name_that_is_none_of_the_known_ones_lists_them(key: str) -> None:
    section, found, allowed = NOT_A_CHOICE[key]
    message = problem(section)
    assert message.startswith(f"{of_path(key)}got {found}")
    assert message.count("\n") == 0
    assert [name for name in allowed if name not in message.split("allowed: ")[1]] == []


@pytest.mark.parametrize("key", UNKNOWN_KEY)
def test_an_unknown_key_suggests_the_closest_one(key: str) -> None:
    section, suggestion = UNKNOWN_KEY[key]
    message = problem(section)
    assert message.startswith(of_path(key))
    assert f"did you mean '{suggestion}'?" in message
    assert suggestion in message.split("allowed: ")[1].split(", ")


@pytest.mark.promise("unread-field")
@pytest.mark.parametrize("key", KEY_OF_ANOTHER_RULE)
def test_a_key_that_the_chosen_rule_does_not_read_says_which_rule_does(key: str) -> None:
    section, rule, reader = KEY_OF_ANOTHER_RULE[key]
    message = problem(section)
    assert message.startswith(f"{of_path(key)}'{rule}' does not read it (read by ")
    assert reader in message.split("(read by ")[1].split(")")[0].split(", ")


@pytest.mark.parametrize("section", ["roles", "adamw"])
def test_a_key_that_belongs_to_the_top_level_alone_is_not_offered_elsewhere(section: str) -> None:
    inner = {"max_aspect_ratio": 3.0}
    message = problem(muon(**{section: {"matrix": inner} if section == "roles" else inner}))
    assert "did you mean 'max_aspect_ratio'" not in message
    assert "max_aspect_ratio" not in message.split("allowed: ")[1]


@pytest.mark.parametrize("case", BAD_COEFFICIENTS)
def test_coefficients_that_are_no_triples_of_finite_numbers(case: str) -> None:
    coefficients, found = BAD_COEFFICIENTS[case]
    message = problem(orthogonalization(coefficients=coefficients))
    assert message.startswith("optimizer.params.orthogonalization.coefficients")
    assert message.count("\n") == 0
    assert found in message
    assert "triple" in message.split("allowed: ")[1]
    assert "tuple[" not in message  # pydantic's name of the type


@pytest.mark.parametrize(("coefficients", "most"), [("polar_express", 5), ("you", 5), ([[3, -3, 1], [2, -1.5, 0.5]], 2)])
def test_more_steps_than_the_coefficients_hold(coefficients: Any, most: int) -> None:
    message = problem(orthogonalization(coefficients=coefficients, steps=most + 1))
    assert message.startswith(f"optimizer.params.orthogonalization.steps: got {most + 1}; allowed: 1 to {most}")


@pytest.mark.promise("unknown-name")
def test_a_missing_name_lists_the_known_ones() -> None:
    message = problem({"lr": 0.02})
    assert message.startswith("optimizer.params.name: missing; allowed: ")
    assert {"muon", "adamw"} <= set(message.split("allowed: ")[1].split(", "))


def test_an_override_without_a_pattern_says_what_is_allowed() -> None:
    message = problem(muon(overrides=[{"lr": 0.1}]))
    assert message.startswith("optimizer.params.overrides[0].match: missing; allowed: ")


def test_an_override_whose_pattern_does_not_compile() -> None:
    message = problem(muon(overrides=[{"match": "fine"}, {"match": "blocks.(0"}]))
    assert message.startswith("optimizer.params.overrides[1].match: got 'blocks.(0' (str); allowed: a regular expression (")


def test_an_override_must_make_sense_for_some_role() -> None:
    """momentum is Muon's and betas are AdamW's: no parameter can have both."""
    assert problem(override(momentum=0.9, betas=[0.9, 0.95])).startswith("optimizer.params.overrides[0].")


@pytest.mark.parametrize(
    ("section", "path"),
    [
        (muon(lr="auto"), "optimizer.params.lr"),
        (muon(adamw={"betas": ["auto", 0.95]}), "optimizer.params.adamw.betas[0]"),
        (muon(roles={"embedding": {"lr": "auto"}}), "optimizer.params.roles.embedding.lr"),
        (override(weight_decay="auto"), "optimizer.params.overrides[0].weight_decay"),
        (orthogonalization(steps="auto"), "optimizer.params.orthogonalization.steps"),
    ],
)
def test_a_leftover_auto_is_an_error_with_its_path(section: Section, path: str) -> None:
    assert problem(section).startswith(f'{path}: got "auto" that no framework filled; allowed: ')


def test_every_leftover_auto_is_listed() -> None:
    message = problem(muon(lr="auto", adamw={"lr": "auto"}))
    assert [line.split(":")[0] for line in message.splitlines()] == ["optimizer.params.lr", "optimizer.params.adamw.lr"]


@pytest.mark.parametrize(
    "section",
    [
        orthogonalization(method="auto"),
        muon(roles={"matrix": {"orthogonalization": {"method": "auto"}}}),
        muon(overrides=[{"match": "auto", "lr": 0.1}]),
    ],
    ids=["method", "method of a role", "a pattern that says auto"],
)
def test_an_auto_that_is_a_value_is_fine(section: Section) -> None:
    OptimizerConfig(section)


def test_several_mistakes_are_one_error_with_a_line_each() -> None:
    message = problem(muon(lr=-1, momentum=2, colour="red"))
    paths = [line.split(":")[0] for line in message.splitlines()]
    assert paths == [f"optimizer.params.{key}" for key in ("lr", "momentum", "colour")]


def test_an_adamw_section_beside_adamw_is_refused() -> None:
    message = problem(adamw(adamw={"lr": 1e-3}))
    assert message.startswith("optimizer.params.adamw: got a section; allowed: none")


@pytest.mark.promise("muon-defaults", "muon-scale")
def test_defaults_of_muon() -> None:
    settings = OptimizerConfig({"name": "muon"}).settings("matrix")
    assert (settings.rule, settings.lr, settings.weight_decay) == ("muon", 0.02, 0.0)
    assert (settings.momentum, settings.nesterov) == (0.95, True)
    chosen = settings.orthogonalization
    assert (chosen.coefficients, chosen.steps, chosen.method) == ("quintic", None, "auto")
    assert (chosen.dtype, chosen.scale) == ("bfloat16", "shape")


@pytest.mark.parametrize(
    ("sharding", "gathers"),
    [
        ({}, [True] * 5),
        ({"mode": "shard_local"}, [False] * 5),
        ({"mode": "shard_local", "gather_every": 2}, [True, False, True, False, True]),
        ({"mode": "shard_local", "gather_every": 4}, [True, False, False, False, True]),
    ],
)
def test_a_period_begins_with_gathering(sharding: dict[str, Any], gathers: list[bool]) -> None:
    found = OptimizerConfig(muon(sharding=sharding)).common.sharding
    assert [found.gathers(step) for step in range(1, 6)] == gathers
    assert found.travels is any(gathers)


def test_a_period_needs_the_mode_that_it_interrupts() -> None:
    with pytest.raises(ConfigError, match="gather_every: got 5 with mode 'gather'; allowed: mode 'shard_local'"):
        OptimizerConfig(muon(sharding={"gather_every": 5}))


def test_defaults_of_sharding() -> None:
    common = OptimizerConfig({"name": "muon"}).common
    assert (common.sharding.mode, common.sharding.wire_dtype, common.max_aspect_ratio) == ("gather", "bfloat16", None)


@pytest.mark.parametrize("role", ["embedding", "unembedding", "scalar"])
def test_beside_muon_everything_but_a_matrix_gets_adamw(role: Any) -> None:
    assert OptimizerConfig({"name": "muon"}).settings(role).rule == "adamw"


@pytest.mark.promise("muon-aspect-ratio")
def test_a_matrix_that_is_left_to_adamw_gets_its_settings() -> None:
    config = OptimizerConfig(muon(adamw={"lr": 1e-3}))
    assert config.settings("matrix", left=True) == config.settings("embedding")


@pytest.mark.promise("muon-aspect-ratio")
def test_settings_of_the_matrix_role_are_not_pressed_on_a_matrix_that_falls_back() -> None:
    """Momentum means nothing to AdamW, and a rate for Muon is not a rate for AdamW."""
    config = OptimizerConfig(muon(adamw={"lr": 1e-3}, roles={"matrix": {"momentum": 0.9, "lr": 0.05}}))
    assert config.settings("matrix").lr == 0.05
    assert config.settings("matrix", left=True).lr == 1e-3


def test_a_matrix_left_to_adamw_that_is_named_by_an_override_keeps_its_rule() -> None:
    config = OptimizerConfig(override(name="muon"))
    assert config.settings("matrix", overrides=(0,), left=True).rule == "muon"


@pytest.mark.promise("adamw-beside-rate")
def test_the_learning_rate_of_adamw_defaults_to_lr() -> None:
    assert OptimizerConfig(muon(lr=0.3)).settings("embedding").lr == 0.3
    assert OptimizerConfig(muon()).settings("embedding").lr == 0.02
    assert OptimizerConfig(muon(lr=0.3, adamw={"lr": 1e-3})).settings("embedding").lr == 1e-3


def test_weight_decay_of_the_top_level_reaches_matrices_and_tables_but_not_scalars() -> None:
    config = OptimizerConfig(muon(weight_decay=0.1))
    decays = {role: config.settings(role).weight_decay for role in ("matrix", "embedding", "unembedding", "scalar")}
    assert decays == {"matrix": 0.1, "embedding": 0.1, "unembedding": 0.1, "scalar": 0.0}


def test_adamw_alone_does_not_decay_scalars_unless_their_role_says_so() -> None:
    assert OptimizerConfig(adamw(weight_decay=0.1)).settings("scalar").weight_decay == 0.0
    asked = adamw(weight_decay=0.1, roles={"scalar": {"weight_decay": 0.2}})
    assert OptimizerConfig(asked).settings("scalar").weight_decay == 0.2


@pytest.mark.promise("role-rates", "role-betas")
def test_each_role_has_its_own_learning_rate_and_betas() -> None:
    roles = {
        "matrix": {"lr": 0.04},
        "embedding": {"lr": 0.6, "betas": [0.8, 0.95]},
        "unembedding": {"lr": 0.004, "betas": [0.7, 0.9]},
        "scalar": {"lr": 0.5},
    }
    config = OptimizerConfig(muon(roles=roles, adamw={"betas": [0.6, 0.8]}))
    rates = [config.settings(role).lr for role in ("matrix", "embedding", "unembedding", "scalar")]
    betas = [config.settings(role).betas for role in ("embedding", "unembedding", "scalar")]
    assert rates == [0.04, 0.6, 0.004, 0.5]
    assert betas == [(0.8, 0.95), (0.7, 0.9), (0.6, 0.8)]


@pytest.mark.promise("choose-by-name")
def test_a_role_may_name_another_rule() -> None:
    config = OptimizerConfig(muon(lr=0.02, roles={"matrix": {"name": "adamw"}, "embedding": {"name": "muon", "momentum": 0.9}}))
    assert config.settings("matrix").rule == "adamw"
    assert (config.settings("embedding").rule, config.settings("embedding").momentum) == ("muon", 0.9)


def test_the_layers_from_weak_to_strong() -> None:
    section = muon(
        lr=1.0,
        roles={"matrix": {"lr": 2.0}},
        overrides=[{"match": "a", "lr": 4.0}, {"match": "b", "lr": 5.0}],
    )
    config = OptimizerConfig(section)
    own = {"lr": 3.0}
    assert OptimizerConfig(muon(lr=1.0)).settings("matrix").lr == 1.0
    assert config.settings("matrix").lr == 2.0
    assert config.settings("matrix", own=own).lr == 3.0
    assert config.settings("matrix", overrides=(0,), own=own).lr == 4.0
    assert config.settings("matrix", overrides=(0, 1), own=own).lr == 5.0


def test_a_later_override_adds_to_an_earlier_one() -> None:
    section = muon(overrides=[{"match": "a", "lr": 4.0, "momentum": 0.8}, {"match": "b", "lr": 5.0}])
    settings = OptimizerConfig(section).settings("matrix", overrides=(0, 1))
    assert (settings.lr, settings.momentum) == (5.0, 0.8)


def test_a_nested_section_is_merged_key_by_key() -> None:
    section = muon(
        orthogonalization={"steps": 3, "scale": "spectral"},
        roles={"matrix": {"orthogonalization": {"steps": 7}}},
    )
    settings = OptimizerConfig(section).settings("matrix").orthogonalization
    assert (settings.steps, settings.scale) == (7, "spectral")


SCHEDULE_ERRORS = {
    "unknown curve": ({"name": "wsdd"}, "name: got 'wsdd'", "'linear'"),
    "no total": ({"name": "linear"}, "total_num_steps: missing", "an integer of at least 1"),
    "ratio without total": ({"warmup_ratio": 0.1}, "total_num_steps: missing", "an integer of at least 1"),
    "auto": ({"name": "linear", "total_num_steps": "auto"}, 'total_num_steps: got "auto"', "a value"),
    "unknown key": ({"warmup_num_step": 3}, "warmup_num_step: unknown key", "warmup_num_steps"),
    "none with a warm-up": ({"name": "none", "warmup_num_steps": 3}, "name: got 'none' with a warm-up", "'constant'"),
    "too long": ({"warmup_num_steps": 5, "total_num_steps": 4}, "total_num_steps: got 4", "at least 5 steps of warm-up"),
    "both": ({"warmup_ratio": 0.1, "warmup_num_steps": 3, "total_num_steps": 9}, "warmup_ratio: got both", "one of them"),
    "negative": ({"warmup_num_steps": -1}, "warmup_num_steps: got -1", "greater than or equal to 0"),
    "fraction": ({"final_lr_fraction": 1.1}, "final_lr_fraction: got 1.1", "less than or equal to 1"),
    "type": ({"total_num_steps": 10.0}, "total_num_steps: got 10.0 (float)", "a whole number"),
    "no step": ({"name": "cosine", "total_num_steps": 0}, "total_num_steps: got 0", "greater than or equal to 1"),
}


@pytest.mark.promise("validated-fields")
@pytest.mark.parametrize("case", SCHEDULE_ERRORS)
def test_a_bad_schedule_section(case: str) -> None:
    section, found, allowed = SCHEDULE_ERRORS[case]
    with pytest.raises(ConfigError) as error:
        schedule_config(section)
    message = str(error.value)
    assert message.startswith(f"scheduler.params.{found}")
    assert message.count("\n") == 0
    assert allowed in message.split("allowed: ")[1]


@pytest.mark.promise("schedule-parts")
def test_a_schedule_section_may_be_empty() -> None:
    assert schedule_config({}) == ScheduleConfig(name="constant", warmup_num_steps=0)
