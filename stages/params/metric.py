"""The one key of the section `report` that the training stages read: a new key of the report retrains nothing."""

from typing import Literal

from pydantic import ConfigDict

from stages.params.section import Section


class Metric(Section):
    model_config = ConfigDict(extra="ignore")  # the other keys are the report's

    metric: Literal["top1", "balanced_accuracy"] = "top1"
    """The validation figure that chooses: the epoch of a training, the headline of the report, the answer of `edgewise
    choose`. Balanced accuracy is the mean recall over the classes; with it, searches for bits also give every class
    the same weight in their loss. Use it if some classes have far fewer images than others."""
