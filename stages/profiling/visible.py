"""What the usual tools see: the counts that published tables use, kept beside the true ones.

Neither looks into PyTorch's dynamically quantized layers, so dynamic quantization seems to remove nearly all parameters
and MACs: the numbers of arXiv 2409.02134 are counted this way. Our own layers with integer weights are seen as the
float layers that they stand for: those tools have no other view of them.
"""

import contextlib
import io
import warnings

import torch
from torch import nn

from stages.networks.integer_weights import without_integers


def params_visible(network: nn.Module) -> int:
    """The sum over `parameters()`; weights in PyTorch's dynamic layers are not among them."""
    return sum(p.numel() for p in without_integers(network).parameters())


def macs_visible(network: nn.Module, input_size: int) -> int:
    """What `thop.profile` calls MACs, for one image `[3, input_size, input_size]`.

    thop also counts the work of some normalisations and poolings, and nothing for kinds that it does not know, packed
    layers among them. It adds buffers to the modules, hence the copy.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import thop

        macs, _ = thop.profile(
            without_integers(network).cpu().eval(), (torch.zeros(1, 3, input_size, input_size),), verbose=False
        )
    return int(macs)
