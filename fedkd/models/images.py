"""Image classifiers. GroupNorm everywhere: batch statistics mix samples, which neither vmap nor DP-SGD allows."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn

Shape = tuple[int, ...]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 8, channels)


def linear(shape: Shape, num_classes: int) -> nn.Sequential:
    """Softmax regression: few parameters for DP-SGD's noise to fall on, and so the best ambassador we measured."""
    inputs = math.prod(shape)
    return nn.Sequential(OrderedDict(block1=nn.Flatten(), head=nn.Linear(inputs, num_classes)))


def mlp(shape: Shape, num_classes: int) -> nn.Sequential:
    """Two hidden layers of 128 and 64 units. With normalisation it did not survive DP-SGD's noise."""
    inputs = math.prod(shape)
    return nn.Sequential(
        OrderedDict(
            block1=nn.Sequential(nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU()),
            block2=nn.Sequential(nn.Linear(128, 64), nn.ReLU()),
            head=nn.Linear(64, num_classes),
        )
    )


def _conv(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, _norm(outputs), nn.ReLU())


def cnn(shape: Shape, num_classes: int) -> nn.Sequential:
    """Three convolutions of 16, 32 and 64 channels; the first two halve the image, the last is averaged to 2x2."""
    return nn.Sequential(
        OrderedDict(
            block1=_conv(shape[0], 16, stride=2, size=5),
            block2=_conv(16, 32, stride=2),
            block3=nn.Sequential(_conv(32, 64), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            head=nn.Linear(64 * 4, num_classes),
        )
    )


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., 2016), with GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, stride), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), _norm(outputs)
        )
        plain = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, inputs, h, w) to (b, outputs, h/stride, w/stride)."""
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


def resnet8(shape: Shape, num_classes: int) -> nn.Sequential:
    """A stem and three residual blocks; the stem halves images larger than 16 pixels to stay quick on a CPU."""
    stem_stride = 2 if shape[1] > 16 else 1
    return nn.Sequential(
        OrderedDict(
            stem=_conv(shape[0], 16, stem_stride),
            block1=Residual(16, 16, 1),
            block2=Residual(16, 32, 2),
            block3=nn.Sequential(Residual(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            head=nn.Linear(64, num_classes),
        )
    )
