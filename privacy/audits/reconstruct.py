"""Two ways from features back to images: a decoder in closed form, and descent through known layers.

``privacy.audits.inversion`` says what they are and judges them. Pictures are of range 1 here: 0 and 1 are the smallest
and the largest auxiliary pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkd.optim import Adam

Floats = npt.NDArray[np.float64]
Layers = Callable[[Tensor], Tensor]
"""Images (b, *image) float32 to features (b, *feature): the client's layers up to the cut."""
Rows = Callable[[Floats], Floats]
"""Features (q, *feature) to one row for each."""

_FLOOR = 1e-10  # of the MSE as a share of range^2
_RIDGE = 10.0 ** np.arange(-8, 2)  # regularisation, as a share of the kernel's mean eigenvalue
_WIDTHS = (1.0, 4.0, 16.0)  # of the Gaussian kernel, as a multiple of the median squared distance
_PRIOR = (0.0, 1e-3)  # weight w: exact where images follow from features, else towards likely images
_JITTER = 1e-3  # on the covariance's diagonal, as a share of range^2: borders that never vary
_STEPS = (10, 30, 100, 200)
_RATE = 0.05  # of Adam, as a share of the range
_BATCH = 100


def psnr(made: Floats, own: Floats) -> Floats:
    """PSNR (n,) in dB of pictures of range 1."""
    error = ((made - own) ** 2).reshape(len(own), -1).mean(1)
    return np.asarray(-10 * np.log10(np.maximum(error, _FLOOR)))


def gaps(a: Floats, b: Floats) -> Floats:
    """Squared distances (n, m) of rows (n, d) and (m, d)."""
    return np.asarray(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))


# --- The decoder -----------------------------------------------------------------------------------------------------


def decoder(h: Floats, x: Floats, held_h: Floats, held_x: Floats) -> tuple[str, Rows]:
    """The regression that reconstructs the held-out images best, by name and as a function of features."""
    mean, flat = x.mean(0), (x - x.mean(0)).reshape(len(x), -1)

    def picture(gram: Floats, solution: Floats) -> Floats:
        return np.asarray(np.clip(mean + (gram @ solution).reshape(-1, *mean.shape), 0, 1))

    found = []
    for name, kernel in _kernels(h.reshape(len(h), -1)):
        roots, turn = np.linalg.eigh(kernel(h))
        turned, gram, middle = turn.T @ flat, kernel(held_h), max(float(roots.mean()), _FLOOR)
        for share in _RIDGE * middle:
            solution = turn @ (turned / (np.maximum(roots, 0) + share)[:, None])
            found.append((float(psnr(picture(gram, solution), held_x).mean()), name, kernel, share))
    _, name, kernel, share = max(found, key=lambda one: one[0])
    chosen = np.linalg.solve(kernel(h) + share * np.eye(len(h)), flat)
    return name, lambda q: picture(kernel(q), chosen)


def _kernels(rows: Floats) -> Iterator[tuple[str, Rows]]:
    """Name of the regression, and products (q, n) of features (q, *feature) with the rows (n, d)."""
    mean = rows.mean(0)
    middle = float(np.median(gaps(rows, rows)[np.triu_indices(len(rows), 1)])) or 1.0

    def flat(q: Floats) -> Floats:
        return np.asarray(q.reshape(len(q), -1) - mean)

    def gaussian(q: Floats, width: float) -> Floats:
        return np.asarray(np.exp(-gaps(flat(q), rows - mean) / (2 * width * middle)))

    yield "ridge regression", lambda q: np.asarray(flat(q) @ (rows - mean).T)
    for width in _WIDTHS:
        yield "kernel ridge regression", partial(gaussian, width=width)


# --- Descent through the layers --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Descent:
    """What descent knows: the layers, the range, how much features vary, and which images are likely."""

    layers: Layers
    low: float
    high: float
    spread: float
    mean: Tensor
    precision: Tensor

    @classmethod
    def of(cls, layers: Layers, low: float, high: float, h: Floats, x: Floats) -> Descent:
        """Learn from auxiliary images x (a, *image), of range 1, and their features h (a, *feature)."""
        flat = x.reshape(len(x), -1)
        inverse = np.linalg.inv(np.atleast_2d(np.cov(flat.T)) + _JITTER * np.eye(flat.shape[1]))
        return cls(layers, low, high, float(h.var()) or 1.0, _tensor(flat.mean(0)), _tensor(inverse))

    def chosen(self, start: Floats, h: Floats, x: Floats) -> tuple[float, int]:
        """The weight of the prior and the number of steps that reconstruct images x (m, *image) best."""
        found = [(float(psnr(start, x).mean()), 0.0, 0)]
        for weight in _PRIOR:
            pictures = self.pictures(start, h, weight, _STEPS)
            found += [(float(psnr(p, x).mean()), weight, t) for p, t in zip(pictures, _STEPS, strict=True)]
        _, weight, steps = max(found, key=lambda one: one[0])
        return weight, steps

    def pictures(self, start: Floats, h: Floats, weight: float, steps: Sequence[int]) -> list[Floats]:
        """Pictures (n, *image) of range 1 after each of the numbers of steps."""
        parts = [
            self._batch(_tensor(start[i : i + _BATCH]), _tensor(h[i : i + _BATCH]), weight, steps)
            for i in range(0, len(h), _BATCH)
        ]
        return [torch.cat(each).double().numpy() for each in zip(*parts, strict=True)]

    def _batch(self, x: Tensor, h: Tensor, weight: float, steps: Sequence[int]) -> list[Tensor]:
        rule, found = Adam(_RATE), []
        state = rule.start({"x": x})
        for t in range(1, max(steps) + 1):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                loss = (self.layers(self.low + (self.high - self.low) * x) - h).square().sum() / self.spread
                if weight:
                    gap = x.flatten(1) - self.mean
                    loss = loss + weight * ((gap @ self.precision) * gap).sum()
            (slope,) = torch.autograd.grad(loss, x)
            with torch.no_grad():
                stepped, state = rule.step({"x": x}, {"x": slope}, state, t)
                x = stepped["x"].clamp(0, 1)
            if t in steps:
                found.append(x)
        return found


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
