"""Dynamic int8: weights stored as int8, activations quantized on the fly in every call."""

import copy

from torch import nn

from stages.artifacts.description import LayerStorage
from stages.networks.dynamic_int8 import dynamic_layers, quantize_linears
from stages.networks.reparameterize import pointwise_to_linear


def int8_dynamic(network: nn.Module, per_channel: bool) -> tuple[nn.Module, dict[str, LayerStorage]]:
    """Pack every Linear layer, and every 1x1 convolution as the Linear layer that it is, to int8.

    Args:
        network: float; left as it is.
        per_channel: one scale for each output channel, else one for the whole weight.

    Returns:
        The packed network, and how each packed layer is stored. All other layers stay float.
    """
    linear = copy.deepcopy(network)
    pointwise_to_linear(linear)
    packed = quantize_linears(linear, per_channel)
    scheme = "symmetric_per_channel" if per_channel else "symmetric_per_tensor"
    return packed, {name: LayerStorage(8, 8, scheme) for name in dynamic_layers(packed)}
