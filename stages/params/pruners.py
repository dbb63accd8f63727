"""The section `pruners`: how a network is made smaller, or trained on without pruning."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.budget import Budget
from stages.params.section import Count, Excluding, Fraction, Positive, Section

Width = Annotated[int, Field(ge=1, le=65536)]


class NonePruner(Section):
    """No pruning: the dense baseline."""

    method: Literal["none"]


class Continued(Budget):
    """No pruning, but the same further training as the pruners: the control."""

    method: Literal["continued"]


class Importance(Section):
    """Weights of HESSO's importance scores (arXiv 2409.09085). Each score is normalized before it is weighted; a score
    that is not named has weight 0."""

    magnitude: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the Euclidean norm of a channel's parameters."""
    average_magnitude: Annotated[float, Field(ge=0)] = 0.0
    """Weight of that norm divided by the number of the channel's parameters."""
    cosine_similarity: Annotated[float, Field(ge=0)] = 0.0
    """Weight of 1 + the cosine between a channel's parameters and its negative gradient."""
    taylor_first_order: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the first-order estimate of the change of the loss if the channel is zeroed."""
    taylor_second_order: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the second-order term, with the gradient's outer product as the Hessian."""


ALL_SCORES = Importance(**dict.fromkeys(Importance.model_fields, 0.2))


class Structured(Budget, Excluding):
    """Pruners that remove whole channels. Each takes exactly one of the three targets."""

    group_sparsity: Fraction | None = None
    """Target: fraction of the removable channels that goes. A group of a grouped convolution counts as one channel.
    `depgraph` removes this fraction in every layer."""
    params_reduction: Fraction | None = None
    """Target: fraction of the dense network's parameters that goes."""
    macs_reduction: Fraction | None = None
    """Target: fraction of the dense network's MACs that goes."""
    minimum_width: Width = 1
    """Channels that every layer keeps at least; every layer also keeps 5 % of its own. Unit: channels."""
    divisible_by: Width = 1
    """Every pruned layer keeps a multiple of this width; 8 or 16 suits vector units. Grouped convolutions lose whole
    groups, and the multiple counts groups; with `depgraph` it counts the channels of each group. Unit: channels."""
    layer_norm: Literal["exact", "plain"] = "exact"
    """Divisor of a pruned LayerNorm's mean and variance: `exact` keeps the original width, so that the output does not
    change when zero channels are removed; `plain` divides by the new width."""
    allow_partial: bool = False
    """Prune the layers that can be cut exactly and keep the others whole, instead of refusing the network."""

    @property
    def target(self) -> dict[str, float]:
        """The targets that are given, by name; the rules ask for exactly one."""
        targets = self.model_dump(include={"group_sparsity", "params_reduction", "macs_reduction"})
        return {name: value for name, value in targets.items() if value is not None}

    @property
    def inexact(self) -> str | None:
        """The setting by which the cut changes the network's output, so that it needs recovery; None if it is exact."""
        return "layer_norm: plain" if self.layer_norm == "plain" else None


class Scheduled(Section):
    """The phase of a training in which pruning takes place."""

    start_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the steps before pruning begins."""
    end_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Fraction of the steps after which pruning has ended; the remaining steps are recovery."""


class Oto(Structured, Scheduled):
    """Drives channel groups to zero while training, removes them and trains on (OTOv3)."""

    method: Literal["oto"]
    optimizer: Literal["hesso", "dhspg"] = "hesso"
    """`hesso` (arXiv 2409.09085) or `dhspg` (arXiv 2303.06862)."""
    pruning_periods: Count = 5
    """Equal steps in which HESSO reaches the target. Only with `optimizer: hesso`."""
    importance: Importance = ALL_SCORES
    """Weights of the importance scores that rank the channels."""
    penalty: Positive = 50.0
    """Smallest penalty (lambda) on the norms of redundant channels. A step subtracts penalty x learning rate from a
    norm, so penalty x learning rate x steps of the phase must reach the channels' norms: 50 suits AdamW at 0.001 and
    some hundred steps, 0.5 suits SGD at 0.1. Only with `optimizer: dhspg`."""
    penalty_limit: Positive = 200.0
    """Largest penalty (lambda). Only with `optimizer: dhspg`."""
    half_space: Fraction = 0.0
    """Threshold (epsilon) of the half-space projection: a step sets a channel to zero if it leaves at most this
    fraction of the channel's own direction. Only with `optimizer: dhspg`."""


class RandomStructured(Structured):
    """Removes random channels at once and then trains."""

    method: Literal["random_structured"]


class SmallDense(Structured):
    """Trains a uniformly narrower network from random weights, for the dense network's epochs and these."""

    method: Literal["small_dense"]
    layer_norm: Literal["exact", "plain"] = "plain"
    """The narrower network was never wider: its LayerNorms are plain, and the key is refused."""


class Depgraph(Structured, Scheduled):
    """Torch-Pruning's dependency-graph pruner (arXiv 2301.12900), a peer."""

    method: Literal["depgraph"]
    importance: Literal["magnitude", "group_lasso"] = "magnitude"
    """`magnitude` removes channels before training. `group_lasso` first trains with the library's group regularization
    from `start_fraction` to `end_fraction`, which adds `penalty` times 1 to 16 of a channel's weights to their
    gradients: more for channels that are less important in their layer."""
    penalty: Positive = 1e-4
    """Strength of the group regularization. Only with `importance: group_lasso`."""
    layer_norm: Literal["exact", "plain"] = "plain"
    """Divisor of a pruned LayerNorm's mean and variance, as for the other structured pruners."""

    @property
    def inexact(self) -> str:
        """The removed channels are not zero, so the cut always changes the output."""
        return "method: depgraph"


class Unstructured(Budget, Scheduled):
    """Sets single weights to zero and keeps them there while training."""

    method: Literal["l1_unstructured", "random_unstructured"]
    sparsity: Fraction
    """Fraction of the weights of convolutions and Linear layers that becomes zero."""
    scope: Literal["global", "layer"] = "layer"
    """Rank the weights within each layer or over the whole network."""
    pattern: Literal["none", "2:4"] = "none"
    """`2:4` zeroes two of every four neighboring inputs of an output, as sparse tensor cores need it. It requires
    `sparsity: 0.5`, `scope: layer` and `schedule: one_shot`."""
    schedule: Literal["one_shot", "gradual"] = "one_shot"
    """`gradual` raises the sparsity cubically from 0 at `start_fraction` to `sparsity` at `end_fraction` (arXiv
    1710.01878, equation 1)."""
    pruning_periods: Count = 10
    """How often the gradual schedule chooses the zeros anew. Only with `schedule: gradual`."""


Pruner = Annotated[
    NonePruner | Continued | Oto | RandomStructured | SmallDense | Depgraph | Unstructured,
    Field(discriminator="method"),
]
