"""All sections of `params.yaml` together, for the report and for the commands."""

from typing import Annotated

from pydantic import Field

from stages.params.base import Base
from stages.params.data import Data
from stages.params.edge_benchmark import EdgeBenchmark
from stages.params.export import Export
from stages.params.finetune import Finetune
from stages.params.models import Model
from stages.params.profile import Profile
from stages.params.pruners import Pruner
from stages.params.quantizers import Quantizer
from stages.params.report import Report
from stages.params.section import Name
from stages.params.variants import Joins, PrunedModel, Variant


class Params(Joins):
    base: Base
    data: Data
    finetune: Finetune
    models: Annotated[dict[Name, Model], Field(min_length=1)]
    pruners: dict[Name, Pruner]
    pruned: dict[Name, PrunedModel]
    quantizers: dict[Name, Quantizer]
    variants: dict[Name, Variant]
    export: Export = Export()
    profile: Profile = Profile()
    edge_benchmark: EdgeBenchmark = EdgeBenchmark()
    report: Report = Report()
