"""FedGKT: Group Knowledge Transfer, Federated Learning of Large CNNs at the Edge.

He, Annavaram, Avestimehr; NeurIPS 2020; arXiv:2007.14513, Algorithm 1. Evidence: official-code (FedML-AI/FedML,
python/fedml/simulation/mpi/fedgkt). Clients train with cross-entropy and a KL to the server's last logits of their
records, and send features, logits and labels of each; the server trains a head on all of them, with cross-entropy and a
KL to the clients' logits, and answers logits. It is `strategies.fedd2s` with one cut that is never dropped.

Decided here, and other than in that code:

* The client's model is whole; the server's is what comes after ``after`` in that architecture, one for each. There, the
  client has a small extractor with a classifier of its own, and the server's is a much larger one (ResNet-8, -55).
* The KL's weight is on the KL at both ends; their server weights the cross-entropy instead (``KL + alpha CE``).
* Nothing is added to the teachers' probabilities (there 1e-7), as the KL is computed from logarithms.
* Logits belong to a record by its id. There they belong to a batch by its index, which takes an unshuffled loader for
  granted.
* With ``answers = "after"`` the server's logits are those after its training; there, and by default, those of each
  batch in the last epoch, before its step.
* The last, smaller batch counts by its own mean, with T^2 as there. Features of test records are not sent: clients are
  scored on their own models.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedkd.method import Evidence
from fedkd.models import Model
from strategies.fedd2s import FedD2S


class FedGKT(FedD2S):
    """Clients send features and logits of their records, the server's head answers logits."""

    evidence: ClassVar[Evidence] = "official-code"

    after: str | None = Field(None, description="block whose output is sent; default each model's last but one")
    mode: Literal["off"] = Field("off", description="fixed: this is what makes it FedGKT")
    kd_grad: Literal["all"] = Field("all", description="fixed: this is what makes it FedGKT")
    upload: Literal["per_sample"] = Field("per_sample", description="fixed: this is what makes it FedGKT")
    downlink: Literal["logits"] = Field("logits", description="fixed: this is what makes it FedGKT")
    inference: Literal["own"] = Field("own", description="fixed: this is what makes it FedGKT")
    heads: Literal["shared"] = Field("shared", description="fixed: this is what makes it FedGKT")
    feature_dtype: Literal["fp32"] = Field("fp32", description="fixed: this is what makes it FedGKT")
    dropping: None = Field(None, description="fixed: this is what makes it FedGKT")
    rate: None = Field(None, description="fixed: this is what makes it FedGKT")
    period: None = Field(None, description="fixed: this is what makes it FedGKT")
    order: Literal["deep_to_shallow"] = Field("deep_to_shallow", description="fixed: this is what makes it FedGKT")
    clock: Literal["global_round"] = Field("global_round", description="fixed: this is what makes it FedGKT")
    final: Literal["keep_last"] = Field("keep_last", description="fixed: this is what makes it FedGKT")

    def named(self) -> tuple[str, list[str] | None]:
        """The one block."""
        return "after", None if self.after is None else [self.after]

    def depths(self, model: Model) -> list[int]:
        """One cut."""
        return super().depths(model)[:1]
