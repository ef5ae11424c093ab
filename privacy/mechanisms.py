"""Which mechanism a configuration asks for, and whether its method can honour it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from fedkd.cohort import participations
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.federation import Federation
from fedkd.sections import AmbassadorPrivacy, GaussianPrivacy
from privacy.accounting import Relation
from privacy.ambassador import Ambassador
from privacy.calibration import calibrate
from privacy.dp_sgd import DpSgd
from privacy.gaussian import Gaussian, GaussianRows, GaussianUpdate
from privacy.mechanism import Mechanism


def build(federation: Federation) -> Mechanism:
    """The mechanism of a configuration, its noise calibrated so that the whole run stays within epsilon.

    Raises:
        ConfigError: The method cannot honour the mechanism.
    """
    privacy = federation.config.privacy
    refuse(federation.config)
    if isinstance(privacy, GaussianPrivacy):
        return _gaussian(federation, privacy)
    if isinstance(privacy, AmbassadorPrivacy):
        return _ambassador(federation, privacy)
    return Mechanism()


def refuse(config: Config) -> None:
    """Raise `ConfigError` if the method cannot honour the mechanism; needs no data."""
    method, name, privacy = config.method, config.method_name, config.privacy
    if privacy.mechanism != "none" and method.sends == "nothing":
        raise ConfigError(f"privacy.mechanism={privacy.mechanism}: {name} sends nothing to protect; use 'none'")
    if isinstance(privacy, GaussianPrivacy):
        if method.sends != "logits" and not method.answers_parameters:
            raise ConfigError(
                f"privacy.mechanism=gaussian bounds rows of logits, and updates of parameters that came down, but "
                f"{name} sends other {method.sends}; use 'ambassador'"
            )
        if method.clients_choose:
            raise ConfigError(
                f"privacy.mechanism=gaussian: {name}'s clients choose public images by their private models, and which "
                "ones is a release of its own that no noise covers; use rad, whose server chooses, or 'ambassador'"
            )
        if method.adds_noise():
            raise ConfigError(
                f"privacy.mechanism=gaussian: adds its own noise, calibrated and booked, and {name} adds some too; set "
                "method.noise=none"
            )
        if privacy.trust == "server" and method.needs_each:
            raise ConfigError(
                f"privacy.trust=server: {name} reads each client's answer, not only their mean; use 'client'"
            )
    if isinstance(privacy, AmbassadorPrivacy):
        if method.reads_records:
            raise ConfigError(
                f"privacy.mechanism=ambassador: {name} reads records outside training, "
                "which DP-SGD does not cover; use another mechanism or method"
            )
        if privacy.model is not None and method.sends != "logits":
            raise ConfigError(
                f"privacy.model={privacy.model}: {name} sends {method.sends}, so an ambassador must have its client's "
                "architecture; take it away with privacy.model="
            )


def _gaussian(federation: Federation, privacy: GaussianPrivacy) -> Gaussian:
    config = federation.config
    relation: Relation = "replace" if privacy.trust == "client" else "add_remove"
    sigma = calibrate(privacy.epsilon, privacy.delta, 1.0, participations(config), relation)
    common: dict[str, Any] = {
        "delta": privacy.delta,
        "budget": privacy.epsilon,
        "relation": relation,
        "trust": privacy.trust,
        "cohort": config.federation.cohort_size(),
        "noise_multiplier": sigma,
    }
    if config.method.sends != "logits":
        return GaussianUpdate(clip=privacy.clip, **common)
    rows = config.method.rows(federation.server_task)
    return GaussianRows(clip=min(privacy.clip, config.method.row_norm()), rows=rows, **common)


def _ambassador(federation: Federation, privacy: AmbassadorPrivacy) -> Ambassador:
    config = federation.config
    for name, model in federation.models.items():
        if any(isinstance(module, _BatchNorm) for module in model.net.modules()):
            raise ConfigError(
                f"privacy.mechanism=ambassador: model '{name}' has BatchNorm, whose statistics mix records, so that no "
                "record's gradient can be clipped; use GroupNorm"
            )
    sizes = [len(index) for index in federation.split.train]
    if privacy.delta >= 1 / max(sizes):
        raise ConfigError(
            f"privacy.delta={privacy.delta:g}: should be below 1/{max(sizes)}, one over the records of the largest "
            "client, or the statement says nothing"
        )
    steps = privacy.steps * participations(config)
    sigma = calibrate(privacy.epsilon, privacy.delta, privacy.sampling_rate, steps, "add_remove")
    dp = DpSgd(
        clip=privacy.clip,
        noise_multiplier=sigma,
        sampling_rate=privacy.sampling_rate,
        steps=privacy.steps,
        lr=privacy.lr,
        expected_batch=max(round(privacy.sampling_rate * sum(sizes) / len(sizes), 1), 0.1),
    )
    return Ambassador(delta=privacy.delta, budget=privacy.epsilon, dp=dp, model=privacy.model)


ABOUT: Mapping[str, str] = {
    "none": "messages leave as they are; no privacy is claimed",
    "gaussian": "logits by row, or an update of weights, clipped and noised: client-level, trust at client or server",
    "ambassador": "a proxy trained by DP-SGD answers for the client: record-level, for any method that learns by fit",
}
"""One line about each mechanism."""
