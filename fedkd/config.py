"""The configuration: a frozen, typed tree from TOML and ``key=value`` overrides.

An unknown key, a wrong type or a contradiction is a `ConfigError` of one line, raised before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tomli_w
from pydantic import BaseModel, ValidationError

from fedkd import seeds
from fedkd.consistency import check
from fedkd.errors import ConfigError
from fedkd.method import Method
from fedkd.overrides import Raw, override, read_toml
from fedkd.registry import METHODS, method_class, near
from fedkd.sections import (
    MECHANISMS,
    SECTIONS,
    AuditConfig,
    DataConfig,
    EngineConfig,
    FederationConfig,
    ModelConfig,
    PrivacyConfig,
)


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
        check(config)
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

    @property
    def training_seed(self) -> int:
        """Seed of all that is drawn in training: orders, samples, noise. It is ``seed``, but a shadow has its own.

        A shadow (``audit.coins``) that shared its target's noise would tell it to whoever looks at both, and no
        mechanism promises anything against somebody who knows the noise. Data, initial weights and cohorts are shared.
        """
        if self.audit.coins is None:
            return self.seed
        return int(seeds.generator(self.seed, "shadow", self.audit.coins).integers(2**62))

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


def describe() -> dict[str, dict[str, tuple[str, Any]]]:
    """Every key with its description and default, by section; for ``--help`` and the docs."""
    sections: dict[str, type[BaseModel]] = dict(SECTIONS)
    sections |= {f"privacy ({name})": kind for name, kind in MECHANISMS.items()}
    sections |= {f"method ({name})": method_class(name) for name in METHODS}
    return {
        section: {name: (info.description or "", info.default) for name, info in kind.model_fields.items()}
        for section, kind in sections.items()
    }
