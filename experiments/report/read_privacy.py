"""Read the privacy statement and the audit of a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from experiments.report.model import Audit, Certified, Exposure, Privacy, Secret, Target
from experiments.report.values import count, items, mapping, number, plain

CHANCE_EXPOSURE = 1 / math.log(2)  # bits: the mean of -log2 of a uniform rank


def read_privacy(value: Any) -> Privacy | None:
    """The statement; the outer epsilon and delta win over the statement's own."""
    if not isinstance(value, dict):
        return None
    said = mapping(value.get("statement"), None)
    outer, inner = number(value.get("epsilon")), number(said.get("epsilon"))
    delta = number(value.get("delta"))
    bound = said.get("upper_bound")
    return Privacy(
        epsilon=inner if outer is None else outer,
        delta=number(said.get("delta")) if delta is None else delta,
        **{name: plain(said.get(name)) for name in ("unit", "relation", "view", "sampling", "accountant", "text")},
        trust=plain(value.get("trust") or ""),
        upper_bound=bound if isinstance(bound, bool) else None,
        assumptions=tuple(plain(one) for one in items(said.get("assumptions"))),
        exclusions=tuple(plain(one) for one in items(said.get("exclusions"))),
    )


def read_audit(value: Any) -> Audit | None:
    """The audited targets, in the order of the file."""
    if not isinstance(value, dict):
        return None
    chance = mapping(value.get("chance"), None)
    exposure = number(chance.get("exposure"))
    level = CHANCE_EXPOSURE if exposure is None else exposure
    return Audit(
        targets=tuple(_target(one, level) for one in items(value.get("targets"))),
        auroc=number(value.get("auroc")),
        exposure=number(value.get("exposure_mean")),
        chance_auroc=number(chance.get("auroc")) or 0.5,
        chance_exposure=level,
        secrets=tuple(_secret(mapping(one, None)) for one in items(value.get("secrets"))),
        inferences=_inferences(value),
        certified=(
            *(_certified(mapping(one, None)) for one in items(value.get("verdicts"))),
            *((_of_noise(mapping(value["noise"], None)),) if "noise" in value else ()),
        ),
    )


def _certified(told: Mapping[str, Any]) -> Certified:
    """One verdict."""
    return Certified(
        target=plain(told.get("target") or "target"),
        claimed=number(told.get("claimed")),
        audited=number(told.get("audited")),
        visible=number(mapping(told.get("power"), None).get("mean")),
        contradicted=told.get("outcome") == "contradicted",
        sentence=plain(told.get("sentence") or ""),
    )


def _inferences(value: Mapping[str, Any]) -> tuple[str, ...]:
    """What else was tried, in a sentence each."""
    means = mapping(value.get("class_means"), None)
    told = [value.get("labels"), means.get("records"), means.get("presence")]
    said = [plain(mapping(one, None).get("sentence") or "") for one in told]
    return tuple(one for one in said if one)


def _of_noise(told: Mapping[str, Any]) -> Certified:
    """What canary clients found of the noise on messages."""
    return Certified(
        target=plain(told.get("target") or "noise"),
        claimed=number(told.get("claimed_epsilon")),
        audited=number(told.get("epsilon")),
        visible=None,
        contradicted=told.get("outcome") == "contradicted",
        sentence=plain(told.get("sentence") or ""),
    )


def _secret(told: Mapping[str, Any]) -> Secret:
    """One attack on one target; a target that does not say stays home is counted as leaving."""
    rows = [mapping(row, None) for row in items(told.get("by_repetition"))]
    return Secret(
        target=plain(told.get("target") or "target"),
        attack=plain(told.get("attack") or "attack"),
        leaves=told.get("leaves_client") is not False,
        space=count(told.get("space")),
        chance=number(told.get("chance")),
        planted=tuple(
            (copies, _exposure(row, "", count(row.get("n")), count(row.get("extracted"))))
            for row in rows
            if (copies := count(row.get("repetitions"))) is not None
        ),
        unplanted=Exposure(number(told.get("excluded_mean")), n=count(told.get("n_out"))),
        swapped=_exposure(told, "swap_"),
        p_value=number(told.get("p_value")),
    )


def _exposure(told: Mapping[str, Any], prefix: str, n: int | None = None, extracted: int | None = None) -> Exposure:
    """A mean with its interval."""
    mean, low, high = (number(told.get(f"{prefix}{name}")) for name in ("mean", "low", "high"))
    return Exposure(mean, low, high, n, extracted)


def _target(value: Any, level: float) -> Target:
    """One audited target; a target that does not say stays home is counted as leaving."""
    told = mapping(value, None)
    exposure = number(told.get("exposure_chance"))
    return Target(
        name=plain(told.get("target") or "target"),
        leaves=told.get("leaves_client") is not False,
        auroc=number(told.get("auroc")),
        low=number(told.get("auroc_low")),
        high=number(told.get("auroc_high")),
        null_low=number(told.get("null_low")),
        null_high=number(told.get("null_high")),
        p_value=number(told.get("p_value")),
        exposure=number(told.get("exposure_mean")),
        exposure_chance=level if exposure is None else exposure,
        n_in=count(told.get("n_in")),
        n_out=count(told.get("n_out")),
    )
