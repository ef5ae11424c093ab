"""Feature inversion: pictures that whoever sees a client's features can make of its images.

The worst case: the attacker knows the client's layers below the cut and has auxiliary images of the same kind, whose
features it computes for itself. Two attacks, which nobody need train:

* A *decoder*, from features to images: ridge regression, or kernel ridge regression with a Gaussian kernel. Of the
  layers it needs their answers on the auxiliary images only.
* *Descent* (after Mahendran, Vedaldi, "Understanding Deep Image Representations by Inverting Them", CVPR 2015, arXiv
  1412.0035, with another prior), where the layers are handed in. From the decoder's picture x_0 on, kept in range::

      minimise over x    |layers(x) - h|^2 / s^2 + w (x - m)^T C^-1 (x - m)

  s^2 is the variance of auxiliary features, m and C are the mean and covariance of auxiliary images.

The kernel, the regularisation, w and the number of steps are those that reconstruct best a fifth of the auxiliary
images, held out; no step, if that is best. Nothing is chosen on the private images.

Decided here: PSNR in dB is -10 log10(MSE / range^2), range that of the auxiliary images, 1 for images in [0, 1], and of
each image, then averaged; a floor under the MSE ends it at 100 dB. 59 dB is the rounding of pixels to 8 bits.

**What a low PSNR is not:** a proof that images cannot be had from the features. A generative model as prior, or more
auxiliary images, would do better. Of a client of FedD2S (MNIST, cnn, 9 rounds, 1,000 auxiliary images, one seed) the
decoder reached 26, 21 and 17 dB at the three cuts, where descent reached 85, 58 and 19; the mean image has 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit

from fedkd.errors import ConfigError
from fedkd.models import in_batches
from privacy.audits.class_means import exact_interval
from privacy.audits.reconstruct import Descent, Layers, decoder, gaps, psnr

Floats = npt.NDArray[np.float64]

_FEWEST = 10  # auxiliary images, of which two are then held out
_HELD_OUT = 5  # one in five
_JUDGED = 50  # held-out images on which descent is judged, at most


@dataclass(frozen=True, eq=False)
class Inversion:
    """What the features of one target give away of the images behind them.

    Attributes:
        target: Which features, for example ``"features after block1"``.
        decoder: What reconstructs: how a decoder, and how many steps of descent after it.
        psnr: Mean PSNR of the reconstructions in dB, at most 100.
        psnr_low: Lower end of its 95 % interval (Student's t, over images).
        psnr_high: Upper end of that interval.
        baseline: Mean PSNR of the mean auxiliary image, the answer of who has learnt nothing, in dB.
        identified: Share of reconstructions nearer to their own image than to every other candidate.
        identified_low: Lower end of its exact binomial 95 % interval.
        identified_high: Upper end of that interval.
        candidates: Number N of candidates, the own image included; guessing is right once in N times.
        auxiliary: Number of auxiliary images.
        each: (n,) PSNR of each private image, in dB.
        originals: (s, *image) a few private images, the first ones.
        reconstructions: (s, *image) what was made of their features, within the range of the auxiliary images.
    """

    target: str
    decoder: str
    psnr: float
    psnr_low: float
    psnr_high: float
    baseline: float
    identified: float
    identified_low: float
    identified_high: float
    candidates: int
    auxiliary: int
    each: Floats
    originals: Floats
    reconstructions: Floats

    @property
    def chance(self) -> float:
        """Share that is identified by guessing."""
        return 1 / self.candidates

    @property
    def leaks(self) -> bool:
        """Whether images are identified more often than by guessing; of features that say nothing, seldom true."""
        return self.identified_low > self.chance

    def __str__(self) -> str:
        """Return one sentence."""
        return (
            f"{self.target}: {len(self.each)} images reconstructed at {self.psnr:.1f} dB (95 % interval "
            f"{self.psnr_low:.1f} to {self.psnr_high:.1f}; {self.baseline:.1f} for the mean image) by {self.decoder}, "
            f"{100 * self.identified:.0f} % identified among {self.candidates} (chance {100 * self.chance:.2g} %)."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON values; pictures, which are private, are left out."""
        numbers = {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}
        return {**numbers, "each": self.each.tolist(), "chance": self.chance, "leaks": self.leaks}


def invert(
    target: str,
    aux_h: npt.ArrayLike,
    aux_x: npt.ArrayLike,
    h: npt.ArrayLike,
    x: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    layers: Layers | None = None,
    candidates: int = 100,
    shown: int = 8,
) -> Inversion:
    """Reconstruct images from their features.

    The decoder takes CPU seconds for a thousand auxiliary images, and the cube of their number. Descent takes up to 200
    passes of the layers, forwards and backwards, over the private images.

    Args:
        target: Which features.
        aux_h: (a, *feature) features of the auxiliary images, noised or rounded as the client's are.
        aux_x: (a, *image) auxiliary images, at least 10 and public: none of the private ones.
        h: (n, *feature) features as they left the client.
        x: (n, *image) the private images, which are compared with and not learnt from; at least 2.
        rng: Source of the held-out part and of the other candidates.
        layers: The client's layers below the cut, for descent; None: decoder alone.
        candidates: Images to tell the own one from, itself included; at most n of them.
        shown: Number of reconstructions kept for a picture, at most n.

    Raises:
        ConfigError: Shapes do not fit, there are too few images or candidates, a value is not finite, all auxiliary
            pixels are alike or the layers give features of another shape.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> images, turn = rng.random((150, 1, 3, 3)), rng.normal(size=(9, 9))
        >>> features = images.reshape(150, 9) @ turn
        >>> found = invert("turned images", features[:100], images[:100], features[100:], images[100:], rng)
        >>> found.decoder, found.psnr > 60, found.identified
        ('ridge regression', True, 1.0)
    """
    seen, pictures, sent, truth = (np.asarray(part, dtype=np.float64) for part in (aux_h, aux_x, h, x))
    _check(target, seen, pictures, sent, truth, candidates)
    low, high = float(pictures.min()), float(pictures.max())
    order = rng.permutation(len(seen))
    cut = len(seen) // _HELD_OUT
    held, used = order[:cut], order[cut:]
    known, answer = (pictures[used] - low) / (high - low), (pictures[held] - low) / (high - low)
    own = (truth - low) / (high - low)
    name, decode = decoder(seen[used], known, seen[held], answer)
    made = decode(sent)
    if layers is not None:
        judged = seen[held[:_JUDGED]]
        got = tuple(in_batches(layers, torch.from_numpy(pictures[:1].astype(np.float32))).shape[1:])
        if got != sent.shape[1:]:
            raise ConfigError(f"{target}: layers should give features {sent.shape[1:]}, got {got}; cut where h was cut")
        descent = Descent.of(layers, low, high, seen[used], known)
        weight, steps = descent.chosen(decode(judged), judged, answer[:_JUDGED])
        if steps:
            made = descent.pictures(made, sent, weight, (steps,))[0]
            name += f" and {steps} steps of descent through the layers" + (" with a prior" if weight else "")
    each = psnr(made, own)
    n, mean = len(each), float(each.mean())
    half = float(stdtrit(n - 1, 0.975) * each.std(ddof=1) / np.sqrt(n))
    among = min(candidates, n)
    hits = _identified(made, own, among, rng)
    identified_low, identified_high = exact_interval(hits, n)
    return Inversion(
        target=target,
        decoder=name,
        psnr=mean,
        psnr_low=mean - half,
        psnr_high=mean + half,
        baseline=float(psnr(known.mean(0)[None], own).mean()),
        identified=hits / n,
        identified_low=identified_low,
        identified_high=identified_high,
        candidates=among,
        auxiliary=len(seen),
        each=each,
        originals=truth[:shown],
        reconstructions=low + (high - low) * made[:shown],
    )


def _check(target: str, seen: Floats, pictures: Floats, sent: Floats, truth: Floats, candidates: int) -> None:
    pairs = len(seen) == len(pictures) and len(sent) == len(truth)
    if not pairs or seen.shape[1:] != sent.shape[1:] or pictures.shape[1:] != truth.shape[1:] or pictures.ndim < 2:
        raise ConfigError(
            f"{target}: aux_h and h should be (a, *feature) and (n, *feature), aux_x and x (a, *image) and (n, *image),"
            f" got {seen.shape}, {sent.shape}, {pictures.shape} and {truth.shape}"
        )
    if len(seen) < _FEWEST or len(sent) < 2 or candidates < 2:
        raise ConfigError(
            f"{target}: inversion needs {_FEWEST} auxiliary images, 2 private ones and 2 candidates or more, got "
            f"{len(seen)}, {len(sent)} and {candidates}; give more"
        )
    if not all(np.isfinite(part).all() for part in (seen, pictures, sent, truth)):
        raise ConfigError(f"{target}: features and images should be finite; did training diverge?")
    if pictures.min() == pictures.max():
        raise ConfigError(f"{target}: all auxiliary pixels are {pictures.min():g}; give images")


def _identified(made: Floats, own: Floats, candidates: int, rng: np.random.Generator) -> int:
    """How many reconstructions are nearer to their own image than to each of the others drawn for it; ties are not."""
    n = len(own)
    far = gaps(made.reshape(n, -1), own.reshape(n, -1))
    others = rng.random((n, n - 1)).argsort(1)[:, : candidates - 1]
    others += others >= np.arange(n)[:, None]  # all but the own
    return int((np.diagonal(far) < np.take_along_axis(far, others, 1).min(1)).sum())
