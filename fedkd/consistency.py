"""Fields of a configuration that contradict one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkd.data.datasets import TEXTS
from fedkd.errors import ConfigError
from fedkd.registry import METHODS, method_class
from fedkd.sections import ENGINE_FIELDS, PARTITION_FIELD, ClientLevel

if TYPE_CHECKING:
    from fedkd.config import Config


def check(config: Config) -> None:
    """Refuse fields that contradict one another.

    Raises:
        ConfigError: The first such, with what to do.
    """
    data, federation, method = config.data, config.federation, config.method
    wanted = PARTITION_FIELD.get(data.partition)
    for name in ("alpha", "classes"):
        value = getattr(data, name)
        if value is None and name == wanted:
            raise ConfigError(f"data.{name}: partition '{data.partition}' needs it; set data.{name}=...")
        if value is not None and name != wanted:
            raise ConfigError(f"data.{name}={value}: partition '{data.partition}' does not use it; remove it")
    _check_text(config)
    if config.audit.coins is not None and (data.name in TEXTS or not config.audit.canaries):
        raise ConfigError(
            f"audit.coins={config.audit.coins}: is about canaries among images, and there are none; remove it"
        )
    if method.needs_public and not data.public:
        raise ConfigError(f"data.public=0: {config.method_name} teaches through public images; set data.public=1000")
    if isinstance(config.privacy, ClientLevel) and config.privacy.delta >= 1 / federation.clients:
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
