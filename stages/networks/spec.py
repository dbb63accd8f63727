"""The description from which a network is built again; reading it does not import torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that `build_network` needs apart from the weights; `model.json` stores it under `network`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    library: str
    architecture: str
    arguments: dict[str, Any]
    """Keyword arguments of the library's constructor."""
    classes: int
    channels: int = 3
    """Channels of the images."""
    source_sha256: str = ""
    """Hash of the user's file that defines the architecture; empty for a library's."""
    layer_scale_folded: bool = False
    pointwise_as_linear: bool = False
    widths: dict[str, dict[str, int]] = field(default_factory=dict)
    """Sizes of each module that pruning narrowed, by its name: `{"head.fc": {"in_features": 96}}`."""
    layer_norm_widths: dict[str, int] = field(default_factory=dict)
    """Original width of each narrowed LayerNorm and global response norm, by its name."""
    layer_norm: Literal["exact", "plain"] = "exact"
    """Form of narrowed LayerNorms, see `networks.norms.narrowed`; both forms have the same tensors."""
    pixel_stem: dict[str, int] = field(default_factory=dict)
    """Name of the convolution that takes stored pixels, and the factor by which it scales them up. Empty if the
    preprocessing scales and normalizes the images."""
