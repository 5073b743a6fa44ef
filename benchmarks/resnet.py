"""ResNet of CIFAR-10 (He et al. 2015, section 4.2): 6n + 2 layers of 16, 32 and 64 channels, shortcuts without parameters (option A)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut that, where the shape changes, takes every other pixel and pads channels by zeros."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.stride, self.new = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.new or self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(out + x)


class ResNet(nn.Module):
    """Images fp32 [B, 3, side, side] -> logits [B, classes].

    Args:
        n: blocks of each width; 3 is ResNet-20.
    """

    def __init__(self, n: int = 3, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = (16, 32, 64)
        self.blocks = nn.Sequential(
            *(
                Block(widths[max(0, k - (i == 0))], width, 2 if k and i == 0 else 1)
                for k, width in enumerate(widths)
                for i in range(n)
            )
        )
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        # Convolutions of a CPU are faster on channels that lie side by side.
        x = F.relu(self.norm(self.stem(x.contiguous(memory_format=torch.channels_last))))
        return self.head(self.blocks(x).mean((2, 3)))
