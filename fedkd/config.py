"""The configuration: a frozen, typed tree from TOML and ``key=value`` overrides.

An unknown key, a wrong type or a contradiction is a `ConfigError` of one line, raised before anything is written.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedkd.data.datasets import TEXTS
from fedkd.errors import ConfigError
from fedkd.method import Method
from fedkd.registry import METHODS, method_class, near

Raw = dict[str, Any]
Partition = Literal["iid", "dirichlet", "pathological", "quantity", "natural"]
PARTITION_FIELD = {"dirichlet": "alpha", "quantity": "alpha", "pathological": "classes"}


ENGINE_FIELDS = {
    "pool": {"workers"},
    "vectorised": {"block"},
    "ray": {"workers", "gpus_per_client", "address"},
    "auto": {"workers", "block"},
}


class Section(BaseModel):
    """One table of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images or text, and how they are split over clients."""

    name: str = Field("digits", description="data set; 'files' and 'text' read your own from data.path")
    path: str | None = Field(
        None, description="your own .npz, image folder, IDX or CIFAR batch files; or folder of .txt files, or .jsonl"
    )
    context: int | None = Field(None, ge=4, description="tokens that a model of text sees at once; default 64")
    vocabulary: str | None = Field(
        None, description="file of a byte-pair vocabulary, of 'fedkd vocabulary'; default the printable characters"
    )
    partition: Partition = Field("iid", description="how the data are split over clients")
    alpha: float | None = Field(None, gt=0, description="concentration of 'dirichlet' and 'quantity'; small is skewed")
    classes: int | None = Field(None, ge=1, description="classes a client of 'pathological'")
    public: int = Field(0, ge=0, description="public images held out for methods that need them")
    pool: Literal["imagenet32", "glyphs", "files"] | None = Field(
        None, description="web-like images to take the public ones from; default the data set"
    )
    pool_path: str | None = Field(None, description="your own images for data.pool='files'")
    far: float = Field(0.0, ge=0, le=1, description="share of the pool to replace by images far from the data")
    far_kind: Literal["textures", "letters", "noise"] = Field("textures", description="what these show")
    reserve: int = Field(0, ge=0, description="images held out like data.public but used by nobody")
    labelled: int = Field(0, ge=0, description="labelled public images held out for a server that tests its teachers")
    test: int = Field(500, ge=1, description="size of the balanced global test set")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of a client's data kept for its own test")
    min_size: int = Field(10, ge=2, description="smallest client allowed, in samples")
    limit: int | None = Field(None, ge=1, description="use a seeded subset of this many images")


class FederationConfig(Section):
    """Who takes part, and for how long."""

    clients: int = Field(10, ge=1, description="number of clients")
    rounds: int = Field(10, ge=1, description="number of rounds")
    cohort: int | float | None = Field(None, gt=0, description="clients a round: a number or a fraction; default all")
    quorum: int | float = Field(
        0.5, gt=0, description="usable answers a round needs: a number or a share of the cohort"
    )
    client_timeout: float | None = Field(None, gt=0, description="seconds a client may take; default no limit")
    evaluate: Literal["all", "cohort"] = Field("all", description="whom to evaluate; after the last round, always all")
    evaluate_every: int = Field(1, ge=1, description="evaluate every so many rounds, and after the last")

    def cohort_size(self) -> int:
        """Clients sampled each round."""
        if self.cohort is None:
            return self.clients
        return max(1, round(self.cohort * self.clients)) if _share(self.cohort) else int(self.cohort)

    def quorum_size(self) -> int:
        """Usable answers a round needs."""
        return math.ceil(self.quorum * self.cohort_size()) if _share(self.quorum) else int(self.quorum)


def _share(value: float) -> bool:
    return isinstance(value, float) and value <= 1  # 1 is one, 1.0 is all


class ModelConfig(Section):
    """Architectures."""

    name: str = Field("cnn", description="architecture of the clients and of the server's own model")
    by_client: list[str] = Field([], description="architectures of the clients, in turn; default all model.name")
    weights: str | None = Field(
        None, description="file that clients' models start from, of 'fedkd export'; {seed}, {client} stand for them"
    )


class NoPrivacy(Section):
    """Messages leave as they are."""

    mechanism: Literal["none"] = "none"


class GaussianPrivacy(Section):
    """Rows of logits, or an update of weights, are clipped and Gaussian noise is added: client-level."""

    mechanism: Literal["gaussian"] = "gaussian"
    epsilon: float = Field(10.0, gt=0, description="budget of the whole run")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of the whole run")
    clip: float = Field(
        5.0, gt=0, description="L2 bound of one row of logits (of probabilities at most 1), or of an update of weights"
    )
    trust: Literal["client", "server"] = Field("client", description="who adds the noise, and is trusted until then")


class AmbassadorPrivacy(Section):
    """A proxy model trained by DP-SGD answers in the client's place: record-level."""

    mechanism: Literal["ambassador"] = "ambassador"
    epsilon: float = Field(10.0, gt=0, description="budget of the whole run")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of the whole run")
    clip: float = Field(1.0, gt=0, description="L2 bound of one record's gradient")
    sampling_rate: float = Field(0.35, gt=0, le=1, description="Poisson sampling rate of records, for every client")
    steps: int = Field(8, ge=1, description="DP-SGD steps a round")
    lr: float = Field(0.7, gt=0, description="learning rate of DP-SGD")
    model: str | None = Field(None, description="architecture of the ambassadors; default each client's own")


PrivacyConfig = NoPrivacy | GaussianPrivacy | AmbassadorPrivacy
MECHANISMS: dict[str, type[PrivacyConfig]] = {
    "none": NoPrivacy,
    "gaussian": GaussianPrivacy,
    "ambassador": AmbassadorPrivacy,
}


class AuditConfig(Section):
    """What is planted in order to measure leakage."""

    canaries: int = Field(
        0, ge=0, description="mislabelled images, or secrets in text, each included with probability 1/2"
    )
    repetitions: list[int] | None = Field(None, description="copies of a secret in text, in turn; default [1, 10, 50]")
    digits: int | None = Field(
        None, ge=1, le=12, description="digits of a secret in text; default 4, up to 5 are exact"
    )
    twin: bool | None = Field(
        None, description="true: draw the secrets in text and plant none, to see what chance gives"
    )
    templates: list[str] | None = Field(
        None, description="lines of text that hold {name} and end with {secret}; default eight of ours"
    )


class EngineConfig(Section):
    """What runs the clients."""

    name: Literal["loop", "pool", "vectorised", "ray", "auto"] = Field("loop", description="see README, engines")
    workers: int | None = Field(None, ge=1, description="processes of 'pool' and 'ray'; default one a core")
    device: str = Field("cpu", description="torch device of the clients' work, 'cpu' or 'cuda'")
    block: int | None = Field(None, ge=1, description="clients that 'vectorised' runs at once; default by memory")
    home_memory: int = Field(2000, ge=1, description="megabytes of clients' state kept in memory, the rest on disk")
    gpus_per_client: float = Field(0.0, ge=0, description="share of a GPU that 'ray' reserves for a client")
    address: str | None = Field(None, description="Ray cluster to join; default a Ray of this run's own")

    def home_bytes(self) -> int:
        """`home_memory` in bytes."""
        return self.home_memory * 1_000_000


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "federation": FederationConfig,
    "model": ModelConfig,
    "audit": AuditConfig,
    "engine": EngineConfig,
}


@dataclass(frozen=True)
class Config:
    """One run, fully determined.

    Attributes:
        seed: Every random choice follows from it.
        method_name: Registered name of ``method``.
        compare: Rows of the report's comparison: label -> overrides of this configuration.
    """

    seed: int
    data: DataConfig
    federation: FederationConfig
    model: ModelConfig
    method_name: str
    method: Method
    privacy: PrivacyConfig
    audit: AuditConfig
    engine: EngineConfig
    compare: Mapping[str, Sequence[str]] = field(default_factory=dict)

    KEYS: ClassVar[tuple[str, ...]] = ("seed", *SECTIONS, "method", "privacy", "compare")

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any]) -> Config:
        """Validate a nested mapping, as parsed from TOML or JSON.

        Raises:
            ConfigError: An unknown key, a wrong type, or fields that contradict one another.
        """
        for key in raw:
            if key not in cls.KEYS:
                raise ConfigError(f"unknown key {key!r}; expected one of {', '.join(cls.KEYS)}{near(key, [*cls.KEYS])}")
        seed = raw.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ConfigError(f"seed: expected a whole number from 0, got {seed!r}")
        sections: dict[str, Any] = {name: _parse(kind, name, raw.get(name, {})) for name, kind in SECTIONS.items()}
        method = dict(_table("method", raw.get("method", {})))
        name = _text("method.name", method.pop("name", "local"))
        privacy = _table("privacy", raw.get("privacy", {}))
        mechanism = _text("privacy.mechanism", privacy.get("mechanism", "none"))
        if mechanism not in MECHANISMS:
            raise ConfigError(f"privacy.mechanism: expected one of {', '.join(MECHANISMS)}, got '{mechanism}'")
        config = cls(
            seed=seed,
            method_name=name,
            method=_parse(method_class(name), "method", method),
            privacy=_parse(MECHANISMS[mechanism], "privacy", privacy),
            compare=_compare(raw.get("compare", {})),
            **sections,
        )
        _check(config)
        return config

    def raw(self) -> Raw:
        """The resolved nested mapping; `from_raw` of it gives an equal configuration."""

        def plain(model: BaseModel) -> Raw:
            return model.model_dump(exclude_none=True)

        return {
            "seed": self.seed,
            "data": plain(self.data),
            "federation": plain(self.federation),
            "model": plain(self.model),
            "method": {"name": self.method_name, **plain(self.method)},
            "privacy": plain(self.privacy),
            "audit": plain(self.audit),
            "engine": plain(self.engine),
            "compare": {label: list(row) for label, row in self.compare.items()},
        }

    def to_json(self) -> str:
        """The resolved configuration on one line, for Flower's flat run config."""
        return json.dumps(self.raw(), sort_keys=True)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that name what determines the results; engine and comparison rows do not."""
        raw = {key: value for key, value in self.raw().items() if key not in ("compare", "engine")}
        return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:16]

    def to_toml(self) -> str:
        """The resolved configuration as TOML, its hash in the first line."""
        return f"# config hash {self.hash}\n" + tomli_w.dumps(self.raw())

    def client_models(self) -> list[str]:
        """Architecture of each client."""
        names = self.model.by_client or [self.model.name]
        return [names[k % len(names)] for k in range(self.federation.clients)]


def from_json(text: str) -> Config:
    """Undo `Config.to_json`."""
    return Config.from_raw(json.loads(text))


def load(path: Path, overrides: Iterable[str] = (), seed: int | None = None) -> tuple[Config, list[str]]:
    """Read a TOML file and apply ``key=value`` overrides.

    Returns:
        The configuration, and a note for each field of the file that an override made moot.

    Raises:
        ConfigError: The file is missing or malformed, or its contents are not a valid configuration.
    """
    raw = read_toml(path)
    raw, notes = override(raw, overrides)
    if seed is not None:
        raw["seed"] = seed
    return Config.from_raw(raw), notes


def read_toml(path: Path) -> Raw:
    """Parse a TOML file.

    Raises:
        ConfigError: It is missing, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a TOML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None


def override(raw: Raw, overrides: Iterable[str]) -> tuple[Raw, list[str]]:
    """Apply ``key=value`` overrides to a nested mapping; ``key=`` takes a key away, so that its default holds.

    Overriding a ``name``, ``partition`` or ``mechanism`` drops the fields that only its predecessor had, unless they
    are overridden too; an unknown key stays, to be refused by `Config.from_raw`.
    """
    raw = copy.deepcopy(raw)
    given: dict[str, Any] = {}
    for text in overrides:
        key, sep, value = text.partition("=")
        if not sep or not key.strip():
            raise ConfigError(f"override: expected key=value, such as method.mu=0.1, got '{text}'")
        given[key.strip()] = _value(value.strip())
    notes = [note for key, value in given.items() for note in _drop(raw, key, value, given)]
    for key, value in given.items():
        *tables, last = key.split(".")
        table = raw
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"override: '{key}' does not name a field, because '{name}' is not a table")
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return raw, notes


def _value(text: str) -> Any:
    if not text:
        return None
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _drop(raw: Raw, key: str, value: Any, given: Mapping[str, Any]) -> list[str]:
    """Delete what only the predecessor of a newly chosen variant had; return notes."""
    section, _, last = key.partition(".")
    table = raw.get(section)
    if not isinstance(table, dict) or not isinstance(value, str):
        return []
    notes = []
    data = raw.get("data")
    public = data.get("public") if isinstance(data, dict) else None
    if key == "method.name" and isinstance(public, int) and public and not method_class(value).needs_public:
        raw["data"]["reserve"] = raw["data"].get("reserve", 0) + raw["data"].pop("public")
        notes.append(f"{value} uses no public set: data.public={public} is held out as data.reserve instead")
    old, new = _fields(key, table.get(last)), _fields(key, value)
    for name in [n for n in table if n in old and n not in new and f"{section}.{n}" not in given]:
        notes.append(f"{section}.{name}={table.pop(name)} dropped: {key}={value} has no such field")
    return notes


def _fields(key: str, variant: Any) -> set[str]:
    """Names of the fields that a variant has, for the keys that choose one."""
    if not isinstance(variant, str):
        variant = ""
    if key == "method.name":
        return set(method_class(variant or "local").model_fields)
    if key == "privacy.mechanism":
        return set(MECHANISMS.get(variant or "none", NoPrivacy).model_fields)
    if key == "data.partition":
        return {PARTITION_FIELD[variant]} if variant in PARTITION_FIELD else set()
    if key == "data.name":
        own = {"path"} if variant in ("files", "text") else set()
        return own | {"context", "vocabulary"} if variant in TEXTS else own
    if key == "data.pool":
        return {"pool_path"} if variant == "files" else set()
    if key == "engine.name":
        return ENGINE_FIELDS.get(variant, set())
    return set()


def _table(name: str, raw: Any) -> Raw:
    if not isinstance(raw, dict):
        raise ConfigError(f"{name}: expected a table, got {raw!r}")
    return raw


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name}: expected a name, got {value!r}")
    return value


def _parse(kind: type[Any], section: str, raw: Any) -> Any:
    try:
        return kind.model_validate(_table(section, raw))
    except ValidationError as error:
        raise ConfigError(_one_line(error, section, list(kind.model_fields))) from None


def _one_line(error: ValidationError, section: str, known: list[str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in (section, *first["loc"]) if part not in ("int", "float"))
    if first["type"] == "extra_forbidden":
        choices = ["name", *known] if section == "method" else known
        return f"unknown key {key!r}; expected one of {', '.join(choices)}{near(str(first['loc'][0]), choices)}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _compare(raw: Any) -> dict[str, list[str]]:
    rows = _table("compare", raw)
    for label, row in rows.items():
        if not isinstance(row, list) or not all(isinstance(item, str) for item in row):
            raise ConfigError(f"compare.{label}: expected a list of key=value overrides, got {row!r}")
        if not label or any(c in label for c in "/\\\0") or label.startswith("."):
            raise ConfigError(f"compare.{label}: expected a label that can name a folder")
    return rows


def _check(config: Config) -> None:
    """Refuse fields that contradict one another."""
    data, federation, method = config.data, config.federation, config.method
    wanted = PARTITION_FIELD.get(data.partition)
    for name in ("alpha", "classes"):
        value = getattr(data, name)
        if value is None and name == wanted:
            raise ConfigError(f"data.{name}: partition '{data.partition}' needs it; set data.{name}=...")
        if value is not None and name != wanted:
            raise ConfigError(f"data.{name}={value}: partition '{data.partition}' does not use it; remove it")
    _check_text(config)
    if method.needs_public and not data.public:
        raise ConfigError(f"data.public=0: {config.method_name} teaches through public images; set data.public=1000")
    if isinstance(config.privacy, GaussianPrivacy) and config.privacy.delta >= 1 / federation.clients:
        raise ConfigError(
            f"privacy.delta={config.privacy.delta:g}: should be below 1/{federation.clients}, one over the number of "
            "clients, or the statement says nothing"
        )
    if data.public and not method.needs_public:
        raise ConfigError(
            f"data.public={data.public}: {config.method_name} uses no public images; "
            f"set data.public=0, or data.reserve={data.public} to keep the same partition as a method that does"
        )
    if data.pool is None and (data.pool_path is not None or data.far):
        raise ConfigError("data.pool_path and data.far: are about a pool of web-like images; set data.pool='files'")
    if data.pool is not None and not data.public:
        raise ConfigError(f"data.pool='{data.pool}': nobody uses public images; set data.public, or data.pool=")
    if (data.pool == "files") != (data.pool_path is not None):
        raise ConfigError("data.pool_path: goes with data.pool='files', the two together; give both or none")
    if data.labelled and not method.reads_labelled:
        raise ConfigError(
            f"data.labelled={data.labelled}: {config.method_name} reads no labelled public images; set "
            "data.labelled=0, or add them to data.reserve to keep the same partition as a method that does"
        )
    for name in ("cohort", "quorum"):
        value = getattr(federation, name)
        if value is not None and value > 1 and value != int(value):
            raise ConfigError(f"federation.{name}={value}: expected a whole number, or a share of at most 1.0")
    if federation.cohort_size() > federation.clients:
        raise ConfigError(f"federation.cohort={federation.cohort}: there are only {federation.clients} clients")
    if federation.quorum_size() > federation.cohort_size():
        raise ConfigError(
            f"federation.quorum={federation.quorum}: a round asks only {federation.cohort_size()} clients"
        )
    models = set(config.client_models())
    if method.same_model and models != {config.model.name}:
        raise ConfigError(
            f"model.by_client: {config.method_name} averages weights, so every client must have model.name "
            f"('{config.model.name}'), got {sorted(models)}; use fedmd or feddf for mixed architectures"
        )
    if config.model.weights is not None and "{client}" not in config.model.weights and len(models) > 1:
        raise ConfigError(
            f"model.weights: expected clients of one architecture, got {', '.join(sorted(models))}; give each client "
            "a file of its own, with {client} in the name"
        )
    for name in ("workers", "block", "gpus_per_client", "address"):
        value = getattr(config.engine, name)
        if value and name not in ENGINE_FIELDS.get(config.engine.name, set()):
            raise ConfigError(f"engine.{name}={value}: engine '{config.engine.name}' does not use it; remove it")
    if method.optimizer == "adam" and method.momentum:
        raise ConfigError(f"method.momentum={method.momentum}: only method.optimizer='sgd' uses it")


def _check_text(config: Config) -> None:
    data, audit = config.data, config.audit
    if data.name not in TEXTS:
        for name, value in (("data.context", data.context), ("data.vocabulary", data.vocabulary)):
            if value is not None:
                raise ConfigError(f"{name}={value}: is about text, and {data.name} is images; remove it")
        for name, given in (
            ("audit.repetitions", audit.repetitions),
            ("audit.digits", audit.digits),
            ("audit.twin", audit.twin),
            ("audit.templates", audit.templates),
        ):
            if given is not None:
                raise ConfigError(f"{name}: is about canaries in text, and {data.name} is images; remove it")
        return
    if not config.method.text:
        able = ", ".join(name for name in METHODS if method_class(name).text)
        raise ConfigError(f"method.name={config.method_name}: does not work on text; choose one of {able}")
    if data.partition in ("dirichlet", "pathological"):
        raise ConfigError(
            f"data.partition={data.partition}: splits classes, which text has none of; use natural, iid or quantity"
        )
    for name, used in (("data.pool", data.pool), ("data.labelled", data.labelled), ("data.far", data.far)):
        if used:
            raise ConfigError(f"{name}={used}: is about images, and {data.name} is text; remove it")
    if audit.repetitions is not None and (not audit.repetitions or min(audit.repetitions) < 1):
        raise ConfigError(f"audit.repetitions: expected whole numbers from 1, got {audit.repetitions}")
    if audit.templates is not None and not audit.templates:
        raise ConfigError("audit.templates: expected at least one line of text, got none; remove it for ours")


def describe() -> dict[str, dict[str, tuple[str, Any]]]:
    """Every key with its description and default, by section; for ``--help`` and the docs."""
    sections: dict[str, type[BaseModel]] = dict(SECTIONS)
    sections |= {f"privacy ({name})": kind for name, kind in MECHANISMS.items()}
    sections |= {f"method ({name})": method_class(name) for name in METHODS}
    return {
        section: {name: (info.description or "", info.default) for name, info in kind.model_fields.items()}
        for section, kind in sections.items()
    }
