"""Models: named blocks with a head, written once as a module and used as a pure function of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkd import seeds
from fedkd.errors import ConfigError
from fedkd.knowledge import Params
from fedkd.models.images import cnn, linear, mlp, resnet8

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Model:
    """An architecture: a list of named blocks whose last one is the head.

    It holds no weights. ``apply`` is a pure function of ``params``, so that clients can be stacked.

    Attributes:
        name: Registered name.
        net: The blocks; its own weights are never used.
    """

    name: str
    net: nn.Sequential

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks, shallow to deep; a layer cut is an index into this."""
        return tuple(name for name, _ in self.net.named_children())

    def init(self, seed: int, client: int = 0) -> Params:
        """Fresh parameters, a pure function of (seed, client)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seeds.generator(seed, f"init/{self.name}", client=client).integers(2**62)))
            for module in self.net.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def apply(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Logits (b, K) of inputs x (b, *shape)."""
        out: Tensor = functional_call(self.net, dict(params), (x,))
        return out

    def logits(self, params: Mapping[str, Tensor], x: Tensor, batch: int = 500) -> Tensor:
        """As `apply` without gradients and in batches, for whole data sets."""
        with torch.no_grad():
            parts = [self.apply(params, part) for part in torch.split(x, batch)]
        return torch.cat(parts)

    def features(self, params: Mapping[str, Tensor], x: Tensor, depth: int) -> Tensor:
        """Output of the first ``depth`` blocks (0 is x itself)."""
        return self._run(params, x, slice(0, depth))

    def head(self, params: Mapping[str, Tensor], h: Tensor, depth: int) -> Tensor:
        """Logits from the output ``h`` of the first ``depth`` blocks: ``head(features(x, d), d) == apply(x)``."""
        return self._run(params, h, slice(depth, None))

    def _run(self, params: Mapping[str, Tensor], x: Tensor, part: slice) -> Tensor:
        net = self.net[part]
        names = {name for name, _ in net.named_parameters()}
        out: Tensor = functional_call(net, {k: v for k, v in params.items() if k in names}, (x,))
        return out


Build = Callable[[Shape, int], nn.Sequential]

MODELS: dict[str, tuple[Build, str]] = {
    "linear": (linear, "softmax regression, a good ambassador"),
    "mlp": (mlp, "two hidden layers of 128 and 64 units"),
    "cnn": (cnn, "three convolutions (16, 32, 64 channels)"),
    "resnet8": (resnet8, "a stem and three residual blocks (16, 32, 64 channels)"),
}
"""Registered architectures: name -> (builder from input shape and number of classes, one line about it)."""


def build(name: str, shape: Shape, num_classes: int) -> Model:
    """Return the architecture ``name`` for inputs of ``shape`` (C, H, W)."""
    if name not in MODELS:
        raise ConfigError(f"no architecture '{name}'; expected one of {', '.join(MODELS)}")
    return Model(name, MODELS[name][0](shape, num_classes))
