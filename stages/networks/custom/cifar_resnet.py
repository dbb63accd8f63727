"""The residual networks for CIFAR-10 of He et al. 2015 (arXiv 1512.03385), section 4.2, with 6n + 2 layers.

Three stages of n blocks have 16, 32 and 64 channels on maps of 32, 16 and 8 pixels. Shortcuts have no weights
(option A): where the map shrinks, they take every second pixel and add channels of zeros on both sides. The tensors are
named as in the published checkpoints of `akamaster/pytorch_resnet_cifar10`, which therefore load.
"""

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalization of the published checkpoints."""
WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            before = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """`[N, channels, S, S]` to logits `[N, classes]`.

    Args:
        depth: 6n + 2 layers: 20, 32, 44, 56, 110.
    """

    def __init__(self, classes: int, channels: int, depth: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6n + 2, such as 20, 32 or 56")
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        inputs = WIDTHS[0]
        for stage, width in enumerate(WIDTHS, 1):
            blocks = []
            for block in range((depth - 2) // 6):
                blocks.append(Block(inputs, width, stride=2 if stage > 1 and block == 0 else 1))
                inputs = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def build(classes: int, channels: int, depth: int = 20) -> nn.Module:
    return CifarResNet(classes, channels, depth)
