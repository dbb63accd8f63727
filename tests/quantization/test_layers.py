"""Which layers may have integers."""

import torch
from torch import nn

from stages.quantization.layers import integer_candidates


def test_candidates_stand_in_the_order_of_execution_and_the_others_are_named():
    class Unordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.auxiliary = nn.Linear(6, 2), nn.Linear(6, 2)
            self.first, self.turned = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.turned(self.first(x)).mean((2, 3)))

    layers, kept = integer_candidates(Unordered(), 8)
    assert [layer.name for layer in layers] == ["first", "head"]
    assert sorted(kept) == ["auxiliary", "turned"]
