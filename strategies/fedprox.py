"""FedProx: Federated Optimization in Heterogeneous Networks.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith; MLSys 2020; arXiv:1812.06127, Algorithm 2. Evidence: paper.
FedAvg whose clients minimise F_k(w) + mu/2 ||w - w_t||^2; every client does the same number of epochs (the paper's
gamma-inexact solutions, that is dropping or varying local work, are not modelled). The penalty is mu/2 times the
*squared* norm: a public version that takes the plain norm computes something else.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedkd.knowledge import Params
from fedkd.method import Evidence
from fedkd.task import Penalty
from strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """FedAvg with a proximal term that keeps clients near the global model."""

    evidence: ClassVar[Evidence] = "paper"

    mu: float = Field(0.01, ge=0, description="strength of the proximal term")

    def penalty(self, start: Params) -> Penalty:
        """mu/2 ||w - w_t||^2."""

        def proximal(w: Params) -> object:
            return self.mu / 2 * sum((w[name] - start[name]).square().sum() for name in start)

        return proximal  # type: ignore[return-value]
