"""Scale and normalize stored pixels for a network; training, evaluation and the exported file share this code."""

import torch
import torch.nn.functional as F
from torch import nn


class Preprocess(nn.Module):
    """uint8 pixels `[N, H, W, C]` to normalized float32 `[N, C, S, S]`.

    Args:
        mean, std: mean and standard deviation of each of the C channels, for pixels in [0, 1].
        input_size: side S in pixels; images of another size are resized bilinearly.
    """

    def __init__(self, mean: list[float], std: list[float], input_size: int) -> None:
        super().__init__()
        scale = 1 / (255 * torch.tensor(std))  # (x / 255 - mean) / std as one multiplication and one addition
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1), persistent=False)
        self.input_size = input_size

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 `[N, H, W, C]` to normalized float32 `[N, C, H, W]`, in channels-last memory."""
        return pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift

    def resize(self, x: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """`[N, C, H, W]` to `[N, C, S, S]`, or to the side `size` in pixels."""
        size = size or self.input_size
        if x.shape[-2:] == (size, size):
            return x
        return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.resize(self.normalize(pixels))


class Classifier(nn.Module):
    """Preprocessing and network: stored pixels uint8 `[N, H, W, C]` in, logits `[N, classes]` out."""

    def __init__(self, preprocess: Preprocess, network: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.network = preprocess, network
        self.training = network.training

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(self.preprocess(pixels))
