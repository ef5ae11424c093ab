"""The tables of a configuration, typed: what every key means and what it may be."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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


class Promise(Section):
    """What every mechanism but 'none' promises."""

    epsilon: float = Field(10.0, gt=0, description="budget of the whole run")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of the whole run")


class ClientLevel(Promise):
    """The budget is about all data of a client."""


class GaussianPrivacy(ClientLevel):
    """Messages are clipped and Gaussian noise is added: client-level."""

    mechanism: Literal["gaussian"] = "gaussian"
    clip: float = Field(
        5.0,
        gt=0,
        description="L2 bound of one row of logits (of probabilities at most 1), of an update, or of a class's mean",
    )
    trust: Literal["client", "server"] = Field("client", description="who adds the noise, and is trusted until then")
    quantile: float | None = Field(
        None, gt=0, lt=1, description="adapt the clip of updates so that this share is within it; default a fixed clip"
    )
    count_share: float | None = Field(
        None, gt=0, lt=1, description="share of the budget for counting the updates within the clip; default 0.1"
    )
    min_count: float | None = Field(
        None, ge=0, description="noisy count below which a class is absent, in standard deviations; default 1"
    )
    noise_cohort_size: int | None = Field(
        None, ge=1, description="simulate the noise of so many clients a round with fewer; nothing is private then"
    )


class LaplacePrivacy(ClientLevel):
    """Rows of logits are clipped in L1 and Laplace noise is added: client-level."""

    mechanism: Literal["laplace"] = "laplace"
    epsilon: float = Field(10.0, gt=0, le=100, description="budget of the whole run")  # more has no price
    clip: float = Field(5.0, gt=0, description="L1 bound of one row of logits (of probabilities at most 1)")
    trust: Literal["client", "server"] = Field("client", description="who adds the noise, and is trusted until then")


class VotesPrivacy(ClientLevel):
    """Clients vote on public inputs, a trusted server adds noise to the counts (GNMax): client-level."""

    mechanism: Literal["votes"] = "votes"
    scale: float = Field(5.0, gt=0, description="logit of a vote, for methods that exchange logits")
    threshold: float | None = Field(
        None, gt=0, le=1, description="share of the cohort a winner needs (confident GNMax); default none"
    )
    threshold_share: float | None = Field(
        None, gt=0, lt=1, description="share of the budget for testing the threshold; default 0.3"
    )
    answers: int | None = Field(None, ge=1, description="most rows answered a round, with a threshold; default a third")


class LocalVotesPrivacy(ClientLevel):
    """Clients answer public inputs by k-ary randomised response: client-level, nobody is trusted."""

    mechanism: Literal["local_votes"] = "local_votes"
    scale: float = Field(5.0, gt=0, description="logit of a vote, for methods that exchange logits")


class LabelPrivacy(Promise):
    """Each record's label is randomised once before training (k-ary randomised response): label-level."""

    mechanism: Literal["labels"] = "labels"


class AmbassadorPrivacy(Promise):
    """A proxy model trained by DP-SGD answers in the client's place: record-level."""

    mechanism: Literal["ambassador"] = "ambassador"
    clip: float = Field(1.0, gt=0, description="L2 bound of one record's gradient")
    sampling_rate: float = Field(0.35, gt=0, le=1, description="Poisson sampling rate of records, for every client")
    steps: int = Field(8, ge=1, description="DP-SGD steps a round")
    lr: float = Field(0.7, gt=0, description="learning rate of DP-SGD")
    model: str | None = Field(None, description="architecture of the ambassadors; default each client's own")
    row_clip: float | None = Field(
        None, gt=0, description="L2 bound of one record's row in sums by class, where they are sent; default 1"
    )
    sums_share: float | None = Field(
        None, gt=0, lt=1, description="share of epsilon for the noise on sums by class and counts; default 0.3"
    )
    min_count: float | None = Field(
        None, ge=0, description="noisy count below which a class is absent, in standard deviations; default 1"
    )


PrivacyConfig = (
    NoPrivacy | GaussianPrivacy | LaplacePrivacy | VotesPrivacy | LocalVotesPrivacy | AmbassadorPrivacy | LabelPrivacy
)
MECHANISMS: dict[str, type[PrivacyConfig]] = {
    "none": NoPrivacy,
    "gaussian": GaussianPrivacy,
    "laplace": LaplacePrivacy,
    "votes": VotesPrivacy,
    "local_votes": LocalVotesPrivacy,
    "ambassador": AmbassadorPrivacy,
    "labels": LabelPrivacy,
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
    coins: int | None = Field(
        None, ge=1, description="set by 'fedkd shadows': the same run with the canaries' coins and its noise drawn anew"
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
