"""The section `report`: what the report shows."""

from typing import Annotated

from pydantic import ConfigDict, Field

from stages.params.metric import Metric


class Report(Metric):
    model_config = ConfigDict(extra="forbid")

    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Confidence level of the intervals of accuracies."""
    headline_max_drop: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest drop of the validation figure (see `metric`) below the best dense network, as a fraction (0.01 is 1
    point). The headline is the smallest variant within it."""
    claims: str | None = None
    """File with the claims of a published study, relative to `params.yaml`. `python -m studies.edge_ai.claims` computes
    the verdicts from a finished report."""
