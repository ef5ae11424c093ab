"""Canary clients whose messages test the noise: does a mechanism do what its ledger books?

Each of m canary clients has a secret random direction in the space of messages and a fair coin. Heads, its raw message
goes far beyond the bound in that direction; tails, as far the opposite way (relation "replace"), or it stays away
("add_remove"). The mechanism bounds, noises and averages as in a run, again for every booked release, and only what
comes out is looked at. The idea is that of CANIFE (Maddock, Sablayrolles, Stock, ICLR 2023, arXiv 2210.02912) and of
"One-shot Empirical Privacy Estimation for Federated Learning" (Andrew et al. 2023, arXiv 2302.03098): one canary a
client, in random directions, which are nearly orthogonal.

Two results. **One run**: the scores <sum of the releases, direction> give a bound that holds of any mechanism
(``one_run_bound``). **Sigma**: two releases of the same messages differ by noise alone, canaries and all else
subtracted, so their differences estimate its variance with an exact chi-square interval, tensor by tensor. The signal
is what a release differs by between neighbouring inputs, one canary heads or tails, with noise of the same generator
state; where a mechanism draws its noise elsewhere, it does not cancel, and the t interval of the signal is honestly
wide. Together they give mu, the distance in standard deviations of the two Gaussians between which the canary's coin
decides, to be compared with the claim, sqrt(rounds) / noise multiplier. Both bounds on mu are by Bonferroni over
signal, noise and tensors.

Not seen: what a mechanism does wrong in a few directions only, or with weights; noise whose seed is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge
from privacy.arguments import integer
from privacy.audits.canary_clients import NOTHING, Canaries, Floats, Noisy, plant
from privacy.audits.one_run import OneRunResult, gaussian_epsilon, one_run_bound

Outcome = Literal["as claimed", "contradicted", "more noise than claimed", "not Gaussian"]

_NEIGHBOURS = 10  # pairs of neighbouring inputs, from which the signal is estimated
_FEWEST = 10  # releases, of which each pair estimates the noise
_SAMPLE = 10_000  # values of noise, at least; as many have their law tested, for more would show the grain of float32
_REJECTED = 1e-3  # probability with which Gaussian noise is called something else
_VAST = 1000.0  # a mu whose epsilon, half a million, is as good as infinite


@dataclass(frozen=True)
class MessageResult:
    """What canary clients found out about a mechanism's noise.

    Attributes:
        target: Which messages.
        claimed: mu of all releases together that the mechanism claims: sqrt(rounds) / noise multiplier.
        mu: mu that was measured; infinite where nothing hides a canary.
        mu_low: What mu is at least.
        mu_high: What mu is at most.
        confidence: Probability with which each of the two bounds holds, if the noise is Gaussian.
        signal: L2 distance by which one canary moves a release.
        noise: Standard deviation of the noise in a release; of several tensors, the one that would hide as much.
        moved: L2 distance by which a canary moves its own bounded message.
        sensitivity: What that distance is at most, as claimed.
        normality: Kolmogorov-Smirnov p-value of the noise as independent Gaussian; None where there is no noise.
        rounds: Number of releases.
        delta: The delta that both epsilons go with.
        one_run: Lower bound on epsilon that assumes nothing of the noise.
    """

    target: str
    claimed: float
    mu: float
    mu_low: float
    mu_high: float
    confidence: float
    signal: float
    noise: float
    moved: float
    sensitivity: float
    normality: float | None
    rounds: int
    delta: float
    one_run: OneRunResult

    @property
    def gaussian(self) -> bool:
        """Whether the noise passes for independent Gaussian noise, at the level of 0.1 %; no noise passes, too."""
        return self.normality is None or self.normality >= _REJECTED

    @property
    def outcome(self) -> Outcome:
        """Whether the mechanism does what it claims. "Not Gaussian" leaves it to ``one_run``, which assumes nothing."""
        if self.mu_low == math.inf > self.claimed:
            return "contradicted"
        if not self.gaussian:
            return "not Gaussian"
        if self.mu_low > self.claimed:
            return "contradicted"
        return "more noise than claimed" if self.mu_high < self.claimed else "as claimed"

    @property
    def epsilon(self) -> float | None:
        """Epsilon at ``delta`` of the least mu; infinite where it is vast, None where the noise is not Gaussian."""
        if self.mu_low == math.inf:
            return math.inf
        if not self.gaussian:
            return None
        return gaussian_epsilon(self.mu_low, self.delta) if self.mu_low < _VAST else math.inf

    @property
    def caveat(self) -> str:
        """What ``epsilon`` assumes, or why there is none."""
        if self.mu_low == math.inf:
            return "no noise hides the canaries"
        if not self.gaussian:
            return f"the noise is not independent Gaussian, Kolmogorov-Smirnov p = {self.normality:.2g}"
        return "assuming Gaussian noise, whose residuals' normality is tested"

    def __str__(self) -> str:
        """Return one sentence."""
        far = self.moved / self.sensitivity
        unbound = f", a message moves {far:.4g} times as far as claimed" if far > 1.001 else ""
        gdp = "no epsilon" if self.epsilon is None else f"epsilon at least {self.epsilon:.2f}"
        return (
            f"{self.target}: mu {self.mu:.3g} ({self.mu_low:.3g} to {self.mu_high:.3g}) measured over {self.rounds} "
            f"releases, {self.claimed:.3g} claimed{unbound}: {self.outcome}; {gdp} ({self.caveat}), at least "
            f"{self.one_run.epsilon:.2f} by one run of {self.one_run.m} canary clients (each bound at "
            f"{self.confidence:.0%}, delta {self.delta:g})."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values; what is infinite, which JSON does not know, becomes null."""
        values = {
            **asdict(self),
            "epsilon": self.epsilon,
            "claimed_epsilon": gaussian_epsilon(self.claimed, self.delta),
        }
        finite = {name: None if value == math.inf else value for name, value in values.items()}
        said = {"outcome": self.outcome, "caveat": self.caveat, "sentence": str(self)}
        return {**finite, **said, "one_run": self.one_run.to_json()}


def audit_messages(
    target: str,
    mechanism: Noisy,
    neutral: Knowledge,
    rounds: int,
    rng: np.random.Generator,
    *,
    m: int = 200,
    down: Knowledge = NOTHING,
    background: Sequence[Knowledge] = (),
    confidence: float = 0.95,
) -> MessageResult:
    """Send canary clients through a mechanism and compare what comes out with what is claimed.

    Args:
        target: Which messages.
        mechanism: What is audited.
        neutral: A raw message that weighs nothing in a mean: zeros for logits, what came down for an update.
        rounds: Number of releases that a client's ledger books in the run.
        rng: Of coins, directions and noise.
        m: Number of canary clients. A bound by one run needs many; the test of sigma does not. Two messages of each
            are held in memory.
        down: What the messages answer.
        background: Bounded messages of other clients, in every noisy mean. Where trust ends at the client, each message
            leaves alone, and these are not read.
        confidence: Probability with which each bound holds, in [0.5, 1).

    Raises:
        ConfigError: A number is outside its range; or as ``canary_clients.plant``.

    Example:
        >>> import torch
        >>> from privacy.gaussian import GaussianRows
        >>> honest = GaussianRows(clip=1.0, rows=20, cohort=4, noise_multiplier=5.0)
        >>> zeros = Knowledge({"logits": torch.zeros(20, 10)})
        >>> found = audit_messages("message", honest, zeros, 25, np.random.default_rng(0), m=50)
        >>> found.outcome, round(found.mu, 1), found.claimed
        ('as claimed', 1.0, 1.0)
    """
    rounds, m = integer("rounds", rounds, 1), integer("m", m, 2)
    if not 0.5 <= confidence < 1:
        raise ConfigError(f"confidence should be in [0.5, 1), got {confidence}")
    canaries = plant(mechanism, neutral, m, rng, down, background)
    scores, squares, pairs, sample = _releases(canaries, rounds, rng)
    audit = one_run_bound(-scores, canaries.coins, mechanism.delta, fair_coins=True, confidence=confidence)
    signal = np.stack([canaries.moved(canary, rng) for canary in range(min(m, _NEIGHBOURS))])
    mu, low, high = _mu(signal, squares, pairs * canaries.sizes, rounds, (1 - confidence) / 2)
    mean = float(np.linalg.norm(signal.mean(0)))
    return MessageResult(
        target=target,
        claimed=math.sqrt(rounds) / mechanism.noise_multiplier if mechanism.noise_multiplier else math.inf,
        mu=mu,
        mu_low=low,
        mu_high=high,
        confidence=confidence,
        signal=mean,
        noise=math.sqrt(rounds) * mean / mu if mu else math.inf,
        moved=float(np.mean([np.linalg.norm(canaries.apart(canary)) for canary in range(m)])),
        sensitivity=mechanism.sensitivity,
        normality=float(stats.kstest(sample, "norm").pvalue) if sample.size else None,
        rounds=rounds,
        delta=mechanism.delta,
        one_run=audit,
    )


def _releases(canaries: Canaries, rounds: int, rng: np.random.Generator) -> tuple[Floats, Floats, int, Floats]:
    """Release as booked, and beyond for more noise.

    Noise is the difference of two releases in a row over sqrt(2); no two differences have a release in common.

    Returns:
        Scores (m,), sum of squares of the noise (T,), number of pairs that it is from, and a sample of the noise over
        its standard deviation.
    """
    size = int(canaries.sizes.sum())
    enough = max(_FEWEST, math.ceil(2 * _SAMPLE / size))  # releases
    count = max(rounds, math.ceil(enough / len(canaries.streams)))
    count += count % 2
    scores, squares, sample = np.empty(len(canaries)), np.zeros(len(canaries.sizes)), list[Floats]()
    step = max(1, size // _SAMPLE)
    for stream in canaries.streams:
        total = -rounds * canaries.flat(canaries.neutral)
        before = np.empty(0)
        for t in range(count):
            now = canaries.release(stream, bool(canaries.coins[stream]), rng)
            if t < rounds:
                total += now
            if t % 2:
                noise = (now - before) / math.sqrt(2)
                squares += canaries.sums(noise**2)
                if len(sample) * (size // step) < _SAMPLE:
                    sample.append(noise[::step])
            before = now
        for canary in range(len(canaries)) if len(canaries.streams) == 1 else (stream,):
            direction = canaries.apart(canary)
            scores[canary] = total @ direction / np.linalg.norm(direction)
    pairs = len(canaries.streams) * count // 2
    std = np.repeat(np.sqrt(squares / (pairs * canaries.sizes)), canaries.sizes)[::step]
    return scores, squares, pairs, (np.stack(sample)[:, std > 0] / std[std > 0]).ravel()


def _mu(
    signal: Floats, squares: Floats, dof: npt.NDArray[np.int64], rounds: int, tail: float
) -> tuple[float, float, float]:
    """Return mu of all releases together, and a bound on either side that fails with probability 2 * tail at most.

    Args:
        signal: (n, T) by pair of neighbours and tensor.
        squares: (T,) sum of squares of the noise.
        dof: (T,) number of squares.
        rounds: Number of releases.
        tail: Probability with which a bound on the signals fails; as much for the noises.
    """
    n, tensors = signal.shape
    mean = signal.mean(0)
    error = signal.std(0, ddof=1) / math.sqrt(n) * stats.t.isf(tail / tensors, n - 1)

    def distance(moved: Floats, precision: Floats) -> float:
        moved = np.maximum(moved, 0)
        power = np.where(moved > 0, math.inf, 0.0)  # of what no noise hides
        np.divide(moved**2 * precision, squares, out=power, where=squares > 0)
        return math.sqrt(rounds * float(power.sum()))

    return (
        distance(mean, dof.astype(np.float64)),
        distance(mean - error, stats.chi2.ppf(tail / tensors, dof)),
        distance(mean + error, stats.chi2.isf(tail / tensors, dof)),
    )
