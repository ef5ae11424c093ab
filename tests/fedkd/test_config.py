"""Configuration: TOML and overrides to a typed tree and back; every mistake is one line that says what to do."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.config import Config, describe, from_json, load
from fedkd.errors import ConfigError
from fedkd.overrides import override
from fedkd.registry import METHODS, method_class

RICH = {
    "seed": 7,
    "data": {"name": "digits", "partition": "dirichlet", "alpha": 0.3, "public": 200, "test": 300},
    "federation": {"clients": 6, "rounds": 3, "cohort": 0.5, "client_timeout": 2.5},
    "model": {"name": "cnn", "by_client": ["mlp", "cnn"]},
    "method": {"name": "fedmd", "loss": "kl", "lr": 2e-3, "digest_epochs": 2},
    "privacy": {"mechanism": "ambassador", "epsilon": 8.0, "delta": 1e-3, "model": "linear"},
    "audit": {"canaries": 20},
    "compare": {"local": ["method.name=local"], "no protection": ["privacy.mechanism=none"]},
}


def configured(*overrides: str, base: dict | None = None) -> Config:
    return Config.from_raw(override(base or {}, overrides)[0])


def refusal(*overrides: str, base: dict | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        configured(*overrides, base=base)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_a_file_with_overrides_and_a_seed(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('seed = 3\n[method]\nname = "fedprox"\nmu = 0.5\n[federation]\nclients = 4\n', encoding="utf-8")

    config, notes = load(path, ["method.mu=0.25", "federation.rounds=2"], seed=11)

    assert (config.seed, config.method_name, config.method.mu) == (11, "fedprox", 0.25)
    assert (config.federation.clients, config.federation.rounds, notes) == (4, 2, [])
    assert load(path)[0].seed == 3


def test_the_shipped_configurations_load():
    found = sorted((Path(__file__).parents[2] / "experiments" / "conf").glob("*.toml"))
    assert found
    for path in found:
        config, notes = load(path)
        assert notes == []
        for row in config.compare.values():
            load(path, row)


def test_a_dated_comment_or_value_does_not_upset_the_reader(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("seed = 2020-01-01\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="seed: expected a whole number"):
        load(path, ["federation.clients=3"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"seed = = 1", "not valid TOML"), (b"\xff\xfe\x00", "cannot be read")],
)
def test_an_unreadable_file(tmp_path, content, reason):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_not_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


# --- Overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=3", 3),
        ("k=3.0", 3.0),
        ("k=1e-3", 1e-3),
        ("k=true", True),
        ("k=fedmd", "fedmd"),
        ('k="fedmd"', "fedmd"),
        ("k='3'", "3"),
        ("k=[1, 2]", [1, 2]),
        ("k=['a', 'b']", ["a", "b"]),
        ("k={a = 1}", {"a": 1}),
        ("k=my.module:Class", "my.module:Class"),
        ("k=a=b", "a=b"),
        ("k=''", ""),
        ("  k  =  two words ", "two words"),
        ("k=.5", ".5"),  # not a TOML number, so it stays text, for the type check to refuse
    ],
)
def test_override_values_are_toml_or_else_text(text, value):
    raw, notes = override({}, [text])
    assert raw == {"k": value} and type(raw["k"]) is type(value) and notes == []


def test_an_override_without_a_value_takes_the_key_away():
    assert override({"k": 3, "privacy": {"model": "mlp"}}, ["k=", "privacy.model = ", "z="]) == ({"privacy": {}}, [])
    assert configured("data.limit=", base={**RICH, "data": {**RICH["data"], "limit": 50}}) == Config.from_raw(RICH)


def test_overrides_nest_and_leave_the_given_mapping_alone():
    base = {"data": {"name": "digits"}, "x": [1]}
    raw, _ = override(base, ["data.limit=50", "audit.canaries=4", "data.limit=60"])
    assert raw == {"data": {"name": "digits", "limit": 60}, "audit": {"canaries": 4}, "x": [1]}
    raw["x"].append(2)
    assert base == {"data": {"name": "digits"}, "x": [1]}


@pytest.mark.parametrize("text", ["method.mu", "=3", " =3", ""])
def test_an_override_needs_a_key_and_a_value(text):
    assert "expected key=value" in refusal(text)


@pytest.mark.parametrize(
    ("text", "name"), [("data.name.first=1", "name"), ("seed.x=1", "seed"), ("method.lr.x=1", "lr")]
)
def test_an_override_cannot_reach_into_a_plain_value(text, name):
    assert f"because '{name}' is not a table" in refusal(text, base={**RICH, "seed": 1})


# --- What an override makes moot -------------------------------------------------------------------------------------


def test_another_method_drops_the_fields_of_its_predecessor_and_says_so():
    raw, notes = override(RICH, ["method.name=fedprox", "privacy.mechanism=none", "model.by_client=[]"])

    assert raw["method"] == {"name": "fedprox", "lr": 2e-3}
    assert "method.loss=kl dropped: method.name=fedprox has no such field" in notes
    assert "method.digest_epochs=2 dropped: method.name=fedprox has no such field" in notes
    assert not any("method.lr" in note for note in notes)
    assert Config.from_raw(raw).method.lr == 2e-3


def test_a_public_set_without_a_use_is_held_out_so_that_the_clients_keep_their_data():
    raw, notes = override({**RICH, "data": {"public": 200, "reserve": 5}}, ["method.name=local"])
    assert raw["data"] == {"reserve": 205}
    assert "local uses no public set: data.public=200 is held out as data.reserve instead" in notes


def test_another_mechanism_drops_the_fields_of_its_predecessor_and_keeps_what_both_have():
    raw, notes = override(RICH, ["privacy.mechanism=gaussian"])
    assert raw["privacy"] == {"mechanism": "gaussian", "epsilon": 8.0, "delta": 1e-3}
    assert notes == ["privacy.model=linear dropped: privacy.mechanism=gaussian has no such field"]


@pytest.mark.parametrize(
    ("partition", "kept"),
    [("iid", {}), ("natural", {}), ("quantity", {"alpha": 0.3}), ("pathological", {}), ("dirichlet", {"alpha": 0.3})],
)
def test_another_partition_drops_the_option_it_does_not_use(partition, kept):
    base = {"data": {"partition": "dirichlet", "alpha": 0.3}}
    raw, notes = override(base, [f"data.partition={partition}"])
    assert raw["data"] == {"partition": partition, **kept}
    assert len(notes) == 1 - len(kept)


def test_another_data_set_drops_the_path():
    raw, notes = override({"data": {"name": "files", "path": "a.npz"}}, ["data.name=digits"])
    assert raw["data"] == {"name": "digits"} and len(notes) == 1


def test_a_field_overridden_together_with_its_variant_is_kept_or_refused_but_never_dropped():
    both = ["data.partition=pathological", "data.classes=2"]
    assert configured(*both, base={"data": {"partition": "dirichlet", "alpha": 0.3}}).data.classes == 2
    message = refusal("method.name=fedavg", "method.mu=0.1", base={"method": {"name": "fedprox", "mu": 1.0}})
    assert message.startswith("unknown key 'method.mu'")


def test_a_misspelt_key_of_the_file_is_not_dropped_with_the_predecessors_fields():
    message = refusal("method.name=fedavg", base={"method": {"name": "fedprox", "muu": 1.0}})
    assert message.startswith("unknown key 'method.muu'")


@pytest.mark.parametrize(
    ("base", "text"),
    [
        ({"method": {"name": 3}}, "method.name=fedavg"),
        ({"data": {"partition": [1]}}, "data.partition=iid"),
        ({"privacy": {"mechanism": ["none"]}}, "privacy.mechanism=none"),
    ],
)
def test_an_override_repairs_a_nonsensical_choice(base, text):
    configured(text, base=base)


def test_an_override_meets_a_section_that_is_no_table():
    assert refusal("method.name=fedavg", base={"data": 3, "method": {}}) == "data: expected a table, got 3"


# --- Wrong keys and types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "start", "hint"),
    [
        ("methd.name=fedmd", "unknown key 'methd'", "did you mean 'method'?"),
        ("data.pubic=3", "unknown key 'data.pubic'", "did you mean 'public'?"),
        ("federation.client=3", "unknown key 'federation.client'", "did you mean 'clients'?"),
        ("method.epoch=3", "unknown key 'method.epoch'", "did you mean 'epochs'?"),
        ("federation.interval=3", "unknown key 'federation.interval'", "expected one of clients, "),
        ("privacy.epsilon=3", "unknown key 'privacy.epsilon'", "expected one of mechanism"),
        ("zzzz=3", "unknown key 'zzzz'", "expected one of seed, "),
        ("a\nb=3", "unknown key 'a\\nb'", "expected one of"),
        ("data.a\nb=3", "unknown key 'data.a\\nb'", "expected one of"),
    ],
)
def test_an_unknown_key_is_refused_with_a_near_name(text, start, hint):
    message = refusal(text)
    assert message.startswith(start) and hint in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("seed=-1", "seed"),
        ("seed=true", "seed"),
        ("seed=1.0", "seed"),
        ("seed=one", "seed"),
        ("data=digits", "data"),
        ("method=fedmd", "method"),
        ("privacy=none", "privacy"),
        ("compare=[]", "compare"),
        ("compare.row=method.name=local", "compare.row"),
        ("compare.row=[1]", "compare.row"),
        ("compare={'a/b' = []}", "compare.a/b"),
        ("compare={'.a' = []}", "compare..a"),
        ("method.name=3", "method.name"),
        ("privacy.mechanism=3", "privacy.mechanism"),
        ("privacy.mechanism=gausian", "privacy.mechanism"),
        ("data.partition=dirichelt", "data.partition"),
        ("data.alpha=0", "data.alpha"),
        ("data.public=-1", "data.public"),
        ("data.public=1.5", "data.public"),
        ("data.test=0", "data.test"),
        ("data.test_fraction=1.0", "data.test_fraction"),
        ("data.path=3", "data.path"),
        ("federation.clients=0", "federation.clients"),
        ("federation.clients='3'", "federation.clients"),
        ("federation.clients=true", "federation.clients"),
        ("federation.cohort=half", "federation.cohort"),
        ("federation.cohort=0", "federation.cohort"),
        ("federation.cohort=inf", "federation.cohort"),
        ("federation.quorum=nan", "federation.quorum"),
        ("federation.client_timeout=0", "federation.client_timeout"),
        ("model.by_client=mlp", "model.by_client"),
        ("model.by_client=['mlp', 3]", "model.by_client.1"),
        ("method.lr=abc", "method.lr"),
        ("method.lr=nan", "method.lr"),
        ("method.lr=inf", "method.lr"),
        ("method.lr=true", "method.lr"),
        ("method.epochs=-1", "method.epochs"),
        ("method.batch=0", "method.batch"),
        ("method.optimizer=adamw", "method.optimizer"),
        ("method.momentum=1.0", "method.momentum"),
        ("engine.workers=0", "engine.workers"),
        ("engine.name=fast", "engine.name"),
        ("audit.canaries=-2", "audit.canaries"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(text, key):
    assert refusal(text).startswith(f"{key}: ")


def test_the_refusal_quotes_what_was_given():
    assert refusal("method.lr=-0.5") == "method.lr: input should be greater than 0, got -0.5"


@pytest.mark.parametrize("name", ["fedmdd", "FedMD", "no", ":Class", ".here:Class", "os:path", "nosuch.module:Class"])
def test_a_method_that_is_not_there(name):
    message = refusal(f"method.name={name}")
    assert message.startswith("method.name: ") and f"'{name}'" in message
    assert "did you mean 'fedmd'?" in refusal("method.name=fedmdd")


def test_a_users_broken_module_is_a_config_error(tmp_path, monkeypatch):
    (tmp_path / "broken_method_module.py").write_text("def f(:\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert "cannot be imported (invalid syntax" in refusal("method.name=broken_method_module:Mine")


# --- Contradictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.partition=dirichlet"], r"data\.alpha: partition 'dirichlet' needs it"),
        (["data.partition=quantity"], r"data\.alpha: partition 'quantity' needs it"),
        (["data.partition=pathological"], r"data\.classes: partition 'pathological' needs it"),
        (["data.alpha=0.5"], r"data\.alpha=0\.5: partition 'iid' does not use it"),
        (["data.classes=2"], r"data\.classes=2: partition 'iid' does not use it"),
        (["data.partition=natural", "data.classes=2"], r"data\.classes=2: partition 'natural' does not use it"),
        (["method.name=fedmd"], r"data\.public=0: fedmd teaches through public images; set data\.public="),
        (["method.name=feddf"], r"data\.public=0: feddf teaches through public images"),
        (["data.public=50"], r"data\.public=50: local uses no public images; .*data\.reserve=50"),
        (["method.name=fedavg", "data.public=50"], r"data\.public=50: fedavg uses no public images"),
        (["federation.cohort=11"], r"federation\.cohort=11: there are only 10 clients"),
        (["federation.quorum=11"], r"federation\.quorum=11: a round asks only 10 clients"),
        (["federation.cohort=3", "federation.quorum=4"], r"federation\.quorum=4: a round asks only 3 clients"),
        (["method.name=fedavg", "model.by_client=['mlp', 'cnn']"], r"model\.by_client: fedavg averages weights"),
        (["method.name=fedprox", "model.by_client=['mlp']"], r"model\.by_client: fedprox averages weights"),
        (["engine.workers=2"], r"engine\.workers=2: engine 'loop' does not use it"),
        (
            ["method.name=fedmd", "data.public=20", "privacy.mechanism=gaussian", "privacy.delta=0.1"],
            r"privacy\.delta=0\.1: should be below 1/10, one over the number of clients",
        ),
        (["method.momentum=0.9"], r"method\.momentum=0\.9: only method\.optimizer='sgd' uses it"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    assert re.match(message, refusal(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.partition=dirichlet", "data.alpha=0.5"],
        ["data.partition=pathological", "data.classes=2"],
        ["method.name=fedmd", "data.public=50", "model.by_client=['mlp', 'cnn']"],
        ["data.reserve=50"],
        ["federation.cohort=10", "federation.quorum=10"],
        ["method.name=fedavg", "model.by_client=['mlp', 'mlp']", "model.name=mlp"],
        ["method.optimizer=sgd", "method.momentum=0.9"],
    ],
)
def test_what_is_no_contradiction_is_accepted(overrides):
    configured(*overrides)


@pytest.mark.parametrize(
    ("cohort", "size"), [(None, 10), (3, 3), (0.3, 3), (1, 1), (1.0, 10), (0.01, 1), (10, 10), (0.25, 2), (0.99, 10)]
)
def test_a_cohort_is_a_number_or_a_share(cohort, size):
    federation = {"clients": 10} | ({} if cohort is None else {"cohort": cohort, "quorum": 1})
    assert Config.from_raw({"federation": federation}).federation.cohort_size() == size


@pytest.mark.parametrize(("quorum", "size"), [(1, 1), (1.0, 4), (0.5, 2), (4, 4), (0.01, 1)])
def test_a_quorum_is_a_number_or_a_share_of_the_cohort(quorum, size):
    config = Config.from_raw({"federation": {"clients": 10, "cohort": 4, "quorum": quorum}})
    assert config.federation.quorum_size() == size


# --- Round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [{}, RICH], ids=["defaults", "rich"])
def test_round_trips_give_an_equal_configuration(base):
    config = Config.from_raw(base)
    assert Config.from_raw(config.raw()) == config
    assert from_json(config.to_json()) == config
    assert Config.from_raw(tomllib.loads(config.to_toml())) == config
    assert "\n" not in config.to_json()
    assert config.to_toml().startswith(f"# config hash {config.hash}\n")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mechanism", ["none", "gaussian", "ambassador"])
def test_every_default_survives_the_round_trip(method, mechanism):
    public = {"public": 100} if method_class(method).needs_public else {}
    raw = {"data": public, "method": {"name": method}, "privacy": {"mechanism": mechanism}}
    config = Config.from_raw(raw)
    assert from_json(config.to_json()) == config
    assert from_json(config.to_json()).hash == config.hash


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    lr=st.floats(1e-12, 1e3),
    clients=st.integers(1, 10**6),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8),
)
def test_any_value_survives_the_round_trip(seed, lr, clients, name):
    raw = {"seed": seed, "method": {"lr": lr}, "federation": {"clients": clients}, "data": {"path": name}}
    config = Config.from_raw(raw)
    assert from_json(config.to_json()) == config == Config.from_raw(tomllib.loads(config.to_toml()))


def test_the_hash_names_the_results_and_so_ignores_the_comparison_rows_and_the_engine():
    config = Config.from_raw(RICH)
    assert configured("engine.device=cuda", base=RICH).hash == config.hash
    without = {key: value for key, value in RICH.items() if key != "compare"}
    assert Config.from_raw(without).hash == config.hash
    assert re.fullmatch(r"[0-9a-f]{16}", config.hash)


@pytest.mark.parametrize(
    "text",
    [
        "seed=8",
        "data.alpha=0.31",
        "federation.rounds=4",
        "model.by_client=['cnn', 'mlp']",
        "method.lr=3e-3",
        "privacy.epsilon=8.5",
        "audit.canaries=22",
    ],
)
def test_the_hash_changes_with_every_section(text):
    assert configured(text, base=RICH).hash != Config.from_raw(RICH).hash


def test_a_default_written_out_has_the_same_hash():
    assert configured("federation.rounds=10", "method.name=local").hash == Config.from_raw({}).hash


def test_a_configuration_cannot_be_edited():
    config = Config.from_raw({})
    for part, name in ((config, "seed"), (config.data, "public"), (config.method, "lr"), (config.privacy, "mechanism")):
        with pytest.raises((AttributeError, ValueError)):
            setattr(part, name, 1)


def test_client_architectures_take_turns():
    config = configured("federation.clients=5", base={**RICH, "federation": {}})
    assert config.client_models() == ["mlp", "cnn", "mlp", "cnn", "mlp"]
    assert configured("federation.clients=2", "model.name=mlp").client_models() == ["mlp", "mlp"]


def test_every_field_is_described():
    sections = describe()
    assert {f"method ({name})" for name in METHODS} <= sections.keys()
    for section, fields in sections.items():
        for name, (text, _) in fields.items():
            assert text or name == "mechanism", f"{section}.{name} has no description"
