"""Which mechanism a configuration asks for, and whether its method can honour it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

from torch.nn.modules.batchnorm import _BatchNorm

from fedkd.cohort import participations
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.federation import Federation
from fedkd.method import Method
from fedkd.sections import (
    AmbassadorPrivacy,
    ClientLevel,
    GaussianPrivacy,
    LabelPrivacy,
    LaplacePrivacy,
    LocalVotesPrivacy,
    VotesPrivacy,
)
from privacy.adaptive import AdaptiveUpdate
from privacy.ambassador import Ambassador
from privacy.calibration import calibrate, calibrate_by
from privacy.class_sums import GaussianSums, RecordSums
from privacy.dp_sgd import DpSgd
from privacy.events import DpEvent, Event, Laplace, RandomisedResponse, Relation
from privacy.gaussian import Gaussian, GaussianRows, GaussianUpdate
from privacy.laplace import LaplaceRows
from privacy.mechanism import Mechanism
from privacy.releases import votes
from privacy.votes import GNMax, LocalVotes, RandomLabels

_SUMMING = {"upload": "class_mean", "weighting": "counts", "downlink": "logits", "kd_grad": "all"}
"""Fields of methods that may answer with sums by class, and what they then are."""


def build(federation: Federation) -> Mechanism:
    """The mechanism of a configuration, its noise calibrated so that the whole run stays within epsilon.

    Raises:
        ConfigError: The method cannot honour the mechanism.
    """
    privacy = federation.config.privacy
    refuse(federation.config)
    if isinstance(privacy, GaussianPrivacy):
        return _gaussian(federation, privacy)
    if isinstance(privacy, LaplacePrivacy):
        return _laplace(federation, privacy)
    if isinstance(privacy, VotesPrivacy):
        return _votes(federation, privacy)
    if isinstance(privacy, LocalVotesPrivacy):
        return _local_votes(federation, privacy)
    if isinstance(privacy, AmbassadorPrivacy):
        return _ambassador(federation, privacy)
    if isinstance(privacy, LabelPrivacy):
        return _labels(federation, privacy)
    return Mechanism()


# --- What does not go together ---------------------------------------------------------------------------------------


def refuse(config: Config) -> None:
    """Raise `ConfigError` if the method cannot honour the mechanism; needs no data."""
    method, name, privacy = config.method, config.method_name, config.privacy
    if privacy.mechanism != "none" and method.sends == "nothing":
        raise ConfigError(f"privacy.mechanism={privacy.mechanism}: {name} sends nothing to protect; use 'none'")
    if isinstance(privacy, ClientLevel):
        _refuse_client_level(config)
    if isinstance(privacy, GaussianPrivacy):
        _refuse_gaussian(privacy, name, method)
    if isinstance(privacy, VotesPrivacy) and privacy.threshold is None and (privacy.threshold_share or privacy.answers):
        raise ConfigError("privacy.threshold_share and privacy.answers: have no meaning without privacy.threshold")
    if isinstance(privacy, AmbassadorPrivacy):
        _refuse_ambassador(privacy, name, method)
    if isinstance(privacy, GaussianPrivacy | AmbassadorPrivacy):
        _refuse_silence(privacy, name, method)
    if isinstance(privacy, LabelPrivacy) and method.text:
        _refuse_labels_of_text(config)


def _refuse_client_level(config: Config) -> None:
    method, name, privacy = config.method, config.method_name, config.privacy
    kind = privacy.mechanism
    if kind == "gaussian":
        fine = method.sends == "logits" or method.answers_parameters or method.answers_sums()
        what = "rows of logits, updates of parameters that came down, and sums by class"
    else:
        fine, what = method.sends == "logits", "rows of logits"
    if not fine:
        sums = _by_sums(method, "upload", "weighting")
        instead = "use 'ambassador'" if kind == "gaussian" or not sums else f"use 'gaussian' and {sums}"
        instead += f", or {sums}" if kind == "gaussian" and sums else ""
        raise ConfigError(f"privacy.mechanism={kind} bounds {what}, but {name} sends other {method.sends}; {instead}")
    if method.clients_choose:
        raise ConfigError(
            f"privacy.mechanism={kind}: {name}'s clients choose public images by their private models, and which "
            "ones is a release of its own that no noise covers; use rad, whose server chooses, or 'ambassador'"
        )
    if method.adds_noise():
        raise ConfigError(
            f"privacy.mechanism={kind}: adds its own noise, calibrated and booked, and {name} adds some too; set "
            "method.noise=none"
        )
    trust = "server" if kind == "votes" else getattr(privacy, "trust", "client")
    if trust == "server" and method.needs_each:
        raise ConfigError(
            f"privacy.mechanism={kind} with trust in the server: {name} reads each client's answer, not only their "
            "mean; use trust=client" + (", or local_votes" if kind == "votes" else "")
        )


def _refuse_gaussian(privacy: GaussianPrivacy, name: str, method: Method) -> None:
    if privacy.quantile is not None and not method.answers_parameters:
        raise ConfigError(
            f"privacy.quantile: adapts the clip of updates, and {name} sends {method.sends}; leave it out"
        )
    if privacy.count_share is not None and privacy.quantile is None:
        raise ConfigError("privacy.count_share: has no meaning with a fixed clip; set privacy.quantile")
    if privacy.min_count is not None and not method.answers_sums():
        raise ConfigError(f"privacy.min_count: is about sums by class, and {name} sends {method.sends}; leave it out")
    if privacy.noise_cohort_size is not None and privacy.trust != "server":
        raise ConfigError(
            "privacy.noise_cohort_size: each client adds the noise with trust=client, however many there are; use "
            "trust=server"
        )


def _refuse_ambassador(privacy: AmbassadorPrivacy, name: str, method: Method) -> None:
    if method.reads_records():
        sums = _by_sums(method, *_SUMMING)
        instead = f"; set {sums}" if sums else "; use another mechanism or method"
        raise ConfigError(
            f"privacy.mechanism=ambassador: {name} reads records outside training, which DP-SGD does not cover{instead}"
        )
    if privacy.model is not None and method.sends != "logits":
        raise ConfigError(
            f"privacy.model={privacy.model}: {name} sends {method.sends}, so an ambassador must have its client's "
            "architecture; take it away with privacy.model="
        )
    for field in ("row_clip", "sums_share", "min_count"):
        if getattr(privacy, field) is not None and not method.answers_sums():
            raise ConfigError(f"privacy.{field}: is about sums by class, and {name} sends {method.sends}; leave it out")


def _by_sums(method: Method, *fields: str) -> str:
    """What to set of these fields so that the method answers with sums by class; empty where it cannot."""
    own = type(method).model_fields
    wrong = {name: _SUMMING[name] for name in fields if name in own and getattr(method, name) != _SUMMING[name]}
    if any(value not in get_args(own[name].annotation) for name, value in wrong.items()):
        return ""
    return " and ".join(f"method.{name}={value}" for name, value in wrong.items())


def _refuse_silence(privacy: GaussianPrivacy | AmbassadorPrivacy, name: str, method: Method) -> None:
    if method.answers_sums() and getattr(method, "final", None) == "stop":
        raise ConfigError(
            f"privacy.mechanism={privacy.mechanism}: every round is paid for, and with method.final=stop {name} sends "
            "nothing in the last ones; use method.final=keep_last"
        )


def _refuse_labels_of_text(config: Config) -> None:
    if (
        config.data.context is not None
        or config.data.vocabulary is not None
        or config.data.name in ("shakespeare", "text")
    ):
        raise ConfigError(
            "privacy.mechanism=labels: a token is input and label at once; use another mechanism for text"
        )


# --- What does -------------------------------------------------------------------------------------------------------


def _gaussian(federation: Federation, privacy: GaussianPrivacy) -> Gaussian:
    config = federation.config
    relation: Relation = "replace" if privacy.trust == "client" else "add_remove"
    common: dict[str, Any] = {
        "delta": privacy.delta,
        "budget": privacy.epsilon,
        "relation": relation,
        "trust": privacy.trust,
        "cohort": config.federation.cohort_size(),
        "noise_multiplier": calibrate(privacy.epsilon, privacy.delta, 1.0, participations(config), relation),
        "noise_cohort": privacy.noise_cohort_size,
    }
    if privacy.noise_cohort_size is not None and privacy.noise_cohort_size < common["cohort"]:
        raise ConfigError(
            f"privacy.noise_cohort_size={privacy.noise_cohort_size}: expected at least the {common['cohort']} clients "
            "that are asked in a round"
        )
    if config.method.answers_sums():
        least = 1.0 if privacy.min_count is None else privacy.min_count
        return GaussianSums(clip=privacy.clip, min_count=least, **common)
    if config.method.sends != "logits":
        if privacy.quantile is None:
            return GaussianUpdate(clip=privacy.clip, **common)
        share = 0.1 if privacy.count_share is None else privacy.count_share
        return AdaptiveUpdate(clip=privacy.clip, quantile=privacy.quantile, count_share=share, **common)
    rows = config.method.rows(federation.server_task)
    return GaussianRows(clip=min(privacy.clip, config.method.row_norm()), rows=rows, **common)


def _laplace(federation: Federation, privacy: LaplacePrivacy) -> LaplaceRows:
    config, rounds = federation.config, participations(federation.config)
    relation: Relation = "replace" if privacy.trust == "client" else "add_remove"
    noise = calibrate_by(lambda b: [Laplace(b, steps=rounds)], privacy.epsilon, privacy.delta, relation)
    return LaplaceRows(
        delta=privacy.delta,
        budget=privacy.epsilon,
        relation=relation,
        trust=privacy.trust,
        cohort=config.federation.cohort_size(),
        noise_multiplier=noise,
        clip=min(privacy.clip, config.method.row_norm()),
        rows=config.method.rows(federation.server_task),
    )


def _votes(federation: Federation, privacy: VotesPrivacy) -> GNMax:
    config, rows = federation.config, federation.config.method.rows(federation.server_task)
    whole = calibrate(privacy.epsilon, privacy.delta, 1.0, participations(config), "replace")  # of one round, as one
    answers = min(rows, privacy.answers or -(-rows // 3))
    per_vote = 1 / votes(1.0, "replace", "client", 1).noise_multiplier  # what one vote moves
    make = partial(
        GNMax,
        delta=privacy.delta,
        budget=privacy.epsilon,
        cohort=config.federation.cohort_size(),
        rows=rows,
        scale=_vote_scale(config.method, privacy.scale),
    )
    if privacy.threshold is None:
        return make(std=whole * per_vote * rows**0.5)
    share = 0.3 if privacy.threshold_share is None else privacy.threshold_share
    return make(
        std=whole * per_vote * (answers / (1 - share)) ** 0.5,
        threshold=privacy.threshold,
        threshold_std=whole * (rows / share) ** 0.5,
        answers=answers,
    )


def _local_votes(federation: Federation, privacy: LocalVotesPrivacy) -> LocalVotes:
    config, classes = federation.config, federation.dataset.outputs
    rows = config.method.rows(federation.server_task)

    def reports(noise: float) -> list[DpEvent]:
        return [RandomisedResponse(min(1 / noise, 100.0), classes, rows * participations(config))]

    return LocalVotes(
        delta=privacy.delta,
        budget=privacy.epsilon,
        cohort=config.federation.cohort_size(),
        rows=rows,
        scale=_vote_scale(config.method, privacy.scale),
        report_epsilon=1 / calibrate_by(reports, privacy.epsilon, privacy.delta, "replace", least=0.01),
        classes=classes,
    )


def _labels(federation: Federation, privacy: LabelPrivacy) -> RandomLabels:
    _meaningful(privacy.delta, [len(index) for index in federation.split.train])
    if federation.notes(0):
        instead = "set method.score=none" if hasattr(federation.config.method, "score") else "use another mechanism"
        raise ConfigError(
            f"privacy.mechanism=labels: {federation.config.method_name} notes something about private records before "
            f"their labels are drawn, which may tell the true ones; {instead}"
        )
    return RandomLabels(
        delta=privacy.delta,
        budget=privacy.epsilon,
        report_epsilon=min(privacy.epsilon, 100.0),
        classes=federation.dataset.outputs,
    )


def _ambassador(federation: Federation, privacy: AmbassadorPrivacy) -> Ambassador:
    config = federation.config
    for name, model in federation.models.items():
        if any(isinstance(module, _BatchNorm) for module in model.net.modules()):
            raise ConfigError(
                f"privacy.mechanism=ambassador: model '{name}' has BatchNorm, whose statistics mix records, so that no "
                "record's gradient can be clipped; use GroupNorm"
            )
    sizes = [len(index) for index in federation.split.train]
    _meaningful(privacy.delta, sizes)
    rounds, summary = participations(config), None
    if config.method.answers_sums():
        share = 0.3 if privacy.sums_share is None else privacy.sums_share
        summary = RecordSums(
            clip=privacy.row_clip or 1.0,
            noise_multiplier=calibrate(share * privacy.epsilon, privacy.delta, 1.0, rounds, "add_remove"),
            min_count=1.0 if privacy.min_count is None else privacy.min_count,
        )
    dp = DpSgd(
        clip=privacy.clip,
        noise_multiplier=_sgd_noise(privacy, rounds, summary),
        sampling_rate=privacy.sampling_rate,
        steps=privacy.steps,
        lr=privacy.lr,
        expected_batch=max(round(privacy.sampling_rate * sum(sizes) / len(sizes), 1), 0.1),
    )
    return Ambassador(delta=privacy.delta, budget=privacy.epsilon, dp=dp, model=privacy.model, summary=summary)


def _sgd_noise(privacy: AmbassadorPrivacy, rounds: int, summary: RecordSums | None) -> float:
    """Noise of DP-SGD for what the sums leave of the budget."""
    steps = privacy.steps * rounds
    if summary is None:
        return calibrate(privacy.epsilon, privacy.delta, privacy.sampling_rate, steps, "add_remove")
    booked = Event(summary.noise_multiplier, steps=rounds)

    def both(sigma: float) -> list[DpEvent]:
        return [booked, Event(sigma, privacy.sampling_rate, steps)]

    return calibrate_by(both, privacy.epsilon, privacy.delta, "add_remove", least=0.2)


def _meaningful(delta: float, sizes: list[int]) -> None:
    if delta >= 1 / max(sizes):
        raise ConfigError(
            f"privacy.delta={delta:g}: should be below 1/{max(sizes)}, one over the records of the largest client, or "
            "the statement says nothing"
        )


def _vote_scale(method: Method, scale: float) -> float:
    return 1.0 if method.row_norm() <= 1 else scale  # probabilities stay such


ABOUT: Mapping[str, str] = {
    "none": "messages leave as they are; no privacy is claimed",
    "gaussian": "logits by row, an update of weights, or sums by class, clipped and noised: client-level",
    "laplace": "logits by row, clipped in L1, with Laplace noise: client-level, trust at client or server",
    "votes": "clients vote on public inputs, the server counts with noise (GNMax, confident GNMax): client-level",
    "local_votes": "clients answer public inputs by randomised response: client-level, nobody is trusted",
    "ambassador": "a proxy trained by DP-SGD answers for the client: record-level, for any method that learns by fit",
    "labels": "labels are randomised once before training: label-level, for any method",
}
"""One line about each mechanism."""
