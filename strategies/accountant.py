"""A `PrivacyAccountant` for Flower's own strategies, by privacy loss distributions.

Flower 1.41 counts by Renyi divergences (``flwr.serverapp.RdpAccountant``). This one gives the same kinds of answers
from ``privacy.accounting``: tighter where clients are drawn by Poisson or not at all, stricter where they are drawn
without replacement. There, Flower hands noise over the *clipping norm* to a theorem that wants noise over the
*replace-one sensitivity*, which is twice that norm, so that its number is no bound (``privacy.events.FixedSize``).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flwr.serverapp import GaussianPrivacyEvent, PrivacyConfig, PrivacySpent, SamplingMethod

from fedkd.errors import ConfigError
from privacy.accounting import FINAL_INTERVAL, LIVE_INTERVAL, delta_at, epsilon
from privacy.events import DpEvent, Event, FixedSize, Relation

_FORMAT = 1
_BACKEND = "fedkd"


class Accountant:
    """Cumulative client-level privacy loss of a Flower strategy; a ``flwr`` ``PrivacyAccountant``.

    Args:
        config: Flower's own: delta, population, relation, sampling method, budget.

    Example:
        >>> from flwr.serverapp import NeighboringRelation
        >>> relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.POISSON
        >>> accountant = Accountant(PrivacyConfig(1e-5, 100, relation, sampling))
        >>> accountant.compose(GaussianPrivacyEvent(1.0, 20, 100), count=100)
        >>> round(accountant.get_epsilon(1e-5), 2)
        14.53
    """

    def __init__(self, config: PrivacyConfig) -> None:
        self._config = config
        self._compositions: list[tuple[GaussianPrivacyEvent, int]] = []

    @property
    def config(self) -> PrivacyConfig:
        """Flower's configuration."""
        return self._config

    @property
    def num_releases(self) -> int:
        """Number of composed releases."""
        return sum(count for _, count in self._compositions)

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        """Count one or more equal releases.

        Raises:
            ConfigError: Another population than the configuration's, or a count that is not 1 or more.
        """
        self._event(event, count)  # refuses before anything changes
        self._compositions.append((event, count))

    def get_epsilon(self, delta: float) -> float:
        """Cumulative epsilon at a delta, in nats."""
        return epsilon(self._events(), delta, self._relation)

    def get_delta(self, epsilon: float) -> float:
        """Cumulative delta at an epsilon."""
        return delta_at(self._events(), epsilon, self._relation)

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """Epsilon so far, at the configuration's delta unless another is given."""
        delta = self._config.target_delta if delta is None else delta
        fixed = self._config.sampling_method is SamplingMethod.WITHOUT_REPLACEMENT
        return PrivacySpent(self.get_epsilon(delta), delta, self.num_releases, "rdp" if fixed else "pld")

    def would_exceed(self, event: GaussianPrivacyEvent, max_epsilon: float | None = None, count: int = 1) -> bool:
        """Whether composing the event would bring epsilon above a limit; nothing is composed.

        Args:
            event: One release.
            max_epsilon: The limit; None for the configuration's.
            count: How many equal releases.

        Raises:
            ConfigError: No limit, or one that is not positive; otherwise as for ``compose``.
        """
        limit = self._config.max_epsilon if max_epsilon is None else max_epsilon
        if limit is None or not limit > 0:
            raise ConfigError(f"max_epsilon should be positive, in PrivacyConfig or here, got {limit!r}")
        after, delta = [*self._events(), self._event(event, count)], self._config.target_delta
        # Both grids give upper bounds, so the coarse one may acquit; only the fine one may convict.
        return all(epsilon(after, delta, self._relation, grid) > limit for grid in (LIVE_INTERVAL, FINAL_INTERVAL))

    def state_dict(self) -> dict[str, object]:
        """Everything there is to know, as JSON values."""
        return {
            "schema_version": _FORMAT,
            "backend": _BACKEND,
            "config": self._config_state(),
            "compositions": [{"event": asdict(event), "count": count} for event, count in self._compositions],
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what ``state_dict`` described.

        Raises:
            ConfigError: Another backend, version or configuration, or not such a state; nothing has changed then.
        """
        expected = {"schema_version": _FORMAT, "backend": _BACKEND, "config": self._config_state()}
        for name, value in expected.items():
            if state.get(name) != value:
                raise ConfigError(f"accountant state: expected {name} {value!r}, got {state.get(name)!r}")
        fresh = Accountant(self._config)
        entries: Any = state.get("compositions")
        try:
            for entry in entries:
                fresh.compose(GaussianPrivacyEvent(**entry["event"]), entry["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"accountant state: compositions cannot be read ({error})") from error
        self._compositions = fresh._compositions

    @property
    def _relation(self) -> Relation:
        fixed = (
            self._config.sampling_method is SamplingMethod.WITHOUT_REPLACEMENT
        )  # Flower allows one relation for each
        return "replace" if fixed else "add_remove"

    def _events(self) -> list[DpEvent]:
        return [self._event(event, count) for event, count in self._compositions]

    def _event(self, event: GaussianPrivacyEvent, count: int) -> DpEvent:
        """Flower's noise is over the clipping norm, ours over the sensitivity."""
        if event.population_size != self._config.population_size:
            raise ConfigError(
                f"population_size should be {self._config.population_size}, as in PrivacyConfig, got "
                f"{event.population_size}"
            )
        drawn, population = event.sample_size, event.population_size
        match self._config.sampling_method:
            case SamplingMethod.POISSON:
                return Event(event.noise_multiplier, drawn / population, count)
            case SamplingMethod.WITHOUT_REPLACEMENT:
                return FixedSize(event.noise_multiplier / 2, drawn, population, count)
            case SamplingMethod.NO_AMPLIFICATION:
                return Event(event.noise_multiplier, 1.0, count)

    def _config_state(self) -> dict[str, object]:
        config = self._config
        return {
            "target_delta": config.target_delta,
            "population_size": config.population_size,
            "neighboring_relation": config.neighboring_relation.value,
            "sampling_method": config.sampling_method.value,
            "max_epsilon": config.max_epsilon,
        }
