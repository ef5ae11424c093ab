"""Models: named blocks with a head, written once as a module and used as a pure function of parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn

from fedkd import seeds
from fedkd.errors import ConfigError
from fedkd.knowledge import Params, Schema
from fedkd.models.images import cnn, linear, mlp, resnet8
from fedkd.models.text import transformer, transformer4

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

    @cached_property
    def schema(self) -> Schema:
        """Shape and type of each parameter, in the module's order."""
        return {name: (tuple(p.shape), p.dtype) for name, p in self.net.named_parameters()}

    def init(self, seed: int, client: int = 0) -> Params:
        """Fresh parameters, a pure function of (seed, client)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seeds.generator(seed, f"init/{self.name}", client=client).integers(2**62)))
            for module in sorted(self.net.modules(), key=_has_parts):  # last who redraws what its parts drew
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def apply(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Logits (b, K) of inputs x (b, *shape); of text, x (b, L) int64, one answer for each position (b, L, V)."""
        return _call(self.net, self._slots, params, x)

    def logits(self, params: Mapping[str, Tensor], x: Tensor, batch: int = 500) -> Tensor:
        """As `apply` without gradients and in batches, for whole data sets."""
        return in_batches(partial(self.apply, params), x, batch)

    def features(self, params: Mapping[str, Tensor], x: Tensor, depth: int) -> Tensor:
        """Output of the first ``depth`` blocks (0 is x itself)."""
        return _call(*self._part(None, depth), params, x)

    def head(self, params: Mapping[str, Tensor], h: Tensor, depth: int) -> Tensor:
        """Logits from the output ``h`` of the first ``depth`` blocks: ``head(features(x, d), d) == apply(x)``."""
        return _call(*self._part(depth, None), params, h)

    @contextmanager
    def lent(self, params: Mapping[str, Tensor]) -> Iterator[nn.Sequential]:
        """The blocks with ``params`` in place of their own, for who needs more of them than their output."""
        with _lent(self._slots, params):
            yield self.net

    @cached_property
    def _slots(self) -> Slots:
        return _slots(self.net)

    def under(self, depth: int) -> tuple[str, ...]:
        """Names of the parameters of the first ``depth`` blocks; the others are its head's."""
        return tuple(full for _, _, full in self._part(None, depth)[1])

    def _part(self, start: int | None, end: int | None) -> tuple[nn.Sequential, Slots]:
        if (start, end) not in self._parts:
            net = cast(nn.Sequential, self.net[start:end])
            self._parts[start, end] = net, _slots(net)
        return self._parts[start, end]

    @cached_property
    def _parts(self) -> dict[tuple[int | None, int | None], tuple[nn.Sequential, Slots]]:
        return {}


class _WithFeatures(nn.Sequential):
    depth: int

    def forward(self, x: Tensor) -> Tensor:
        kept = h = x
        for i, block in enumerate(self):
            kept = h if i == self.depth else kept
            h = block(h)
        return torch.cat([kept.flatten(1), h], 1)


@lru_cache(maxsize=64)
def with_features(model: Model, depth: int) -> Model:
    """The same parameters, answering with features after ``depth`` blocks and logits side by side (b, d + K)."""
    net = _WithFeatures(OrderedDict(model.net.named_children()))
    net.depth = depth
    return Model(f"{model.name} with features", net)


def at_pool(model: Model) -> tuple[Model, Model]:
    """A model as two: up to its last feature map (b, C, h, w), and from the pooling of this map to the logits.

    Where nothing is pooled the first ends before the head, with features (b, d). Parameters keep their names.
    """
    *before, (name, last), head = model.net.named_children()
    inner = list(last.named_children())
    pools = [i for i, (_, module) in enumerate(inner) if isinstance(module, nn.AdaptiveAvgPool2d)]
    if not isinstance(last, nn.Sequential) or not pools:
        body, tail = [*before, (name, last)], [head]
    else:
        at = pools[0]
        body = [*before, (name, nn.Sequential(OrderedDict(inner[:at])))]
        tail = [(name, nn.Sequential(OrderedDict(inner[at:]))), head]
    return (
        Model(f"{model.name} to its map", nn.Sequential(OrderedDict(body))),
        Model(f"{model.name} from its map", nn.Sequential(OrderedDict(tail))),
    )


def in_batches(f: Callable[[Tensor], Tensor], x: Tensor, batch: int = 500) -> Tensor:
    """``f(x)`` without gradients, some rows at a time, for whole data sets."""
    with torch.no_grad():
        parts = [f(part) for part in torch.split(x, batch)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache(maxsize=64)
def feature_shape(model: Model, depth: int, shape: Shape) -> Shape:
    """Shape of one input's features at a depth, given the input's own; nothing is computed."""
    params = {name: torch.empty_like(p, device="meta") for name, p in model.net.named_parameters()}
    x = torch.empty((1, *shape), device="meta", dtype=torch.int64 if len(shape) == 1 else None)
    return tuple(model.features(params, x, depth).shape[1:])


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in module.children())


Slots = list[tuple[dict[str, Tensor | None], str, str]]
"""Where a module keeps its parameters: (a submodule's own mapping, its name there, its full name)."""


def _slots(net: nn.Module) -> Slots:
    return [
        (cast(dict[str, Tensor | None], module._parameters), name, f"{prefix}.{name}" if prefix else name)
        for prefix, module in net.named_modules()
        for name in module._parameters
        if module._parameters[name] is not None
    ]


@contextmanager
def _lent(slots: Slots, params: Mapping[str, Tensor]) -> Iterator[None]:
    own = [home[name] for home, name, _ in slots]
    try:
        for home, name, full in slots:
            home[name] = params[full]
        yield
    finally:
        for (home, name, _), parameter in zip(slots, own, strict=True):
            home[name] = parameter


def _call(net: nn.Module, slots: Slots, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Run ``net`` with ``params`` in place of its own: what `torch.func.functional_call` does, at a tenth of its cost.

    Tied weights and buffers, which our architectures do not have, would need the real thing.
    """
    with _lent(slots, params):
        out: Tensor = net(x)
    return out


Build = Callable[[Shape, int], nn.Sequential]

IMAGE_MODELS: dict[str, tuple[Build, str]] = {
    "linear": (linear, "softmax regression, a good ambassador"),
    "mlp": (mlp, "two hidden layers of 128 and 64 units"),
    "cnn": (cnn, "three convolutions (16, 32, 64 channels)"),
    "resnet8": (resnet8, "a stem and three residual blocks (16, 32, 64 channels)"),
}
"""Architectures for inputs (C, H, W): name -> (builder from input shape and number of classes, one line about it)."""

TEXT_MODELS: dict[str, tuple[Build, str]] = {
    "transformer": (transformer, "text: two causal blocks of width 64"),
    "transformer4": (transformer4, "text: four causal blocks of width 128, a teacher"),
}
"""Architectures for inputs (L,), tokens; the number of classes is that of the vocabulary."""

MODELS: dict[str, tuple[Build, str]] = {**IMAGE_MODELS, **TEXT_MODELS}
"""Registered architectures."""


def build(name: str, shape: Shape, num_classes: int) -> Model:
    """Return the architecture ``name`` for images of ``shape`` (C, H, W), or for text (L,).

    Raises:
        ConfigError: No architecture has this name, or it is not for inputs of this shape.
    """
    if name not in MODELS:
        raise ConfigError(f"no architecture '{name}'; expected one of {', '.join(MODELS)}")
    text = len(shape) == 1
    if (name in TEXT_MODELS) != text:
        known, inputs = (TEXT_MODELS, "text (L,)") if text else (IMAGE_MODELS, "images (C, H, W)")
        fit = ", ".join(known)
        raise ConfigError(f"model '{name}': expected one for {inputs}, for the inputs are {shape}; choose one of {fit}")
    with torch.random.fork_rng(devices=[]):  # modules draw weights when made; those are never used
        return Model(name, MODELS[name][0](shape, num_classes))
