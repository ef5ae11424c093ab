"""What a report knows about a run, as frozen values; every number may be missing."""

from __future__ import annotations

from dataclasses import dataclass, field

LOCAL = "local"


@dataclass(frozen=True)
class Accuracy:
    """One scoring of all clients' models; fractions in [0, 1]. ECE: calibration error; perplexities of text."""

    balanced_mean: float | None = None
    personal_mean: float | None = None
    personal_std: float | None = None
    personal_worst10: float | None = None
    global_model: float | None = None
    personal_ece: float | None = None
    global_ece: float | None = None
    balanced_perplexity: float | None = None
    personal_perplexity: float | None = None
    global_perplexity: float | None = None


@dataclass(frozen=True)
class Failure:
    """One answer that was refused or never came."""

    round: int
    client: str
    reason: str


@dataclass(frozen=True)
class Round:
    """One line of ``metrics.jsonl``; the bytes are this round's, epsilon is spent so far."""

    number: int
    cohort: int | None
    accuracy: Accuracy
    up: int
    down: int
    epsilon: float | None
    failures: tuple[Failure, ...]
    seconds: float | None


@dataclass(frozen=True)
class ClientRow:
    """One client: its model, its data and how its model ended."""

    client: int
    model: str
    train: int | None
    test: int | None
    classes: tuple[int, ...]
    balanced: float | None
    personal: float | None
    epsilon: float | None


@dataclass(frozen=True)
class Target:
    """One audited model or message: how well an outsider tells canaries in from canaries out."""

    name: str
    leaves: bool
    auroc: float | None
    low: float | None
    high: float | None
    null_low: float | None
    null_high: float | None
    p_value: float | None
    exposure: float | None
    exposure_chance: float | None
    n_in: int | None
    n_out: int | None

    @property
    def leaks(self) -> bool | None:
        """Whether the AUROC is above the null band; None where either is missing."""
        if self.auroc is None or self.null_high is None:
            return None
        return self.auroc > self.null_high


@dataclass(frozen=True)
class Exposure:
    """Mean exposure in bits of some secrets, with its interval; ``extracted`` of ``n`` have rank 1."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    extracted: int | None = None


@dataclass(frozen=True)
class Secret:
    """One attack on one target that could give away secrets planted in text.

    Attributes:
        space: How many secrets each is ranked among.
        planted: By number of copies, ascending.
        unplanted: Those whose coin came up tails.
        swapped: The planted ones under another's prefix.
    """

    target: str
    attack: str
    leaves: bool
    space: int | None
    chance: float | None
    planted: tuple[tuple[int, Exposure], ...]
    unplanted: Exposure
    swapped: Exposure
    p_value: float | None

    @property
    def leaks(self) -> bool | None:
        """Whether planted secrets are exposed more than others, by a permutation test at 5 %; None where none was."""
        return None if self.p_value is None else self.p_value < 0.05


@dataclass(frozen=True)
class Certified:
    """One target's claimed upper bound on epsilon, its certified lower bound, and what the audit sees of the claim."""

    target: str
    claimed: float | None
    audited: float | None
    visible: float | None
    contradicted: bool
    sentence: str


@dataclass(frozen=True)
class Audit:
    """All audited targets, and what pure chance would give; of text also every attack on its secrets."""

    targets: tuple[Target, ...]
    auroc: float | None
    exposure: float | None
    chance_auroc: float
    chance_exposure: float
    secrets: tuple[Secret, ...] = ()
    certified: tuple[Certified, ...] = ()
    inferences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heated:
    """A record of text: ``heat`` has the temperature of each character, None where no answer is about it."""

    text: str
    heat: tuple[float | None, ...]


@dataclass(frozen=True)
class Strip:
    """Some records of text and how hot the soft targets about them are, from ``low`` to ``high``.

    Attributes:
        client: Whose records they are; None where the text is public.
        trouble: Why there are none.
    """

    lines: tuple[Heated, ...] = ()
    low: float = 1.0
    high: float = 1.0
    client: int | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Privacy:
    """The privacy statement; an epsilon of infinity protects nothing."""

    epsilon: float | None
    delta: float | None
    unit: str = ""
    relation: str = ""
    view: str = ""
    trust: str = ""
    sampling: str = ""
    accountant: str = ""
    upper_bound: bool | None = None
    assumptions: tuple[str, ...] = ()
    exclusions: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Run:
    """A run directory, read; ``finished`` says whether it has a summary."""

    label: str
    finished: bool
    method: str
    dataset: str
    seed: str
    clients: int | None
    planned: int | None
    mechanism: str
    accuracy: Accuracy
    up: int | None
    down: int | None
    privacy: Privacy | None
    audit: Audit | None
    failures: int
    seconds: float | None
    rounds: tuple[Round, ...] = ()
    rows: tuple[ClientRow, ...] = ()
    compare: tuple[Run, ...] = ()
    config_text: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    twin: bool = False
    strip: Strip | None = None

    @property
    def is_text(self) -> bool:
        """Whether models were scored on text, where there are perplexities."""
        return any(
            value is not None
            for got in (self.accuracy, *(line.accuracy for line in self.rounds))
            for value in (got.balanced_perplexity, got.personal_perplexity, got.global_perplexity)
        )

    @property
    def shared(self) -> str:
        """What kind of accuracy a model has on the test set that all clients share: text has no classes to balance."""
        return "next-token" if self.is_text else "balanced"

    @property
    def baseline(self) -> Run | None:
        """The first compared run that trained alone, unless this run is one itself."""
        return None if self.is_local else next((row for row in self.compare if row.is_local), None)

    @property
    def reference(self) -> Run | None:
        """The baseline, or the run itself when it trained alone: what all rows of the page are held against."""
        return self if self.is_local else self.baseline

    @property
    def is_local(self) -> bool:
        """Whether this run is training alone."""
        return self.method == LOCAL

    @property
    def last_round(self) -> int | None:
        """The number of the last round that left a line, None without any."""
        return self.rounds[-1].number if self.rounds else None

    @property
    def epsilon(self) -> float | None:
        """What was spent in the end: the summary's word, else the last round's."""
        if self.privacy is not None and self.privacy.epsilon is not None:
            return self.privacy.epsilon
        return next((line.epsilon for line in reversed(self.rounds) if line.epsilon is not None), None)
