"""The sections `pruned` and `variants`, which join models, pruners and quantizers by name."""

from stages.params.section import Name, Section


class PrunedModel(Section):
    """One pruned network; its key is `<model>-<pruner>`."""

    model: Name
    """Entry of `models`."""
    pruner: Name
    """Entry of `pruners`."""


class Variant(Section):
    """One compressed network; its key is `<model>-<pruner>-<quantizer>`."""

    pruned: Name
    """Entry of `pruned`."""
    quantizer: Name
    """Entry of `quantizers`."""


class Joins(Section):
    """Sections of a stage that looks up what a variant is made of."""

    pruned: dict[Name, PrunedModel]
    variants: dict[Name, Variant]

    def model_of(self, variant: str) -> str:
        return self.pruned[self.variants[variant].pruned].model

    def pruner_of(self, variant: str) -> str:
        return self.pruned[self.variants[variant].pruned].pruner

    def baseline_of(self, variant: str) -> str:
        """The dense float32 variant of the same model, with which the variant is compared."""
        return f"{self.model_of(variant)}-none-fp32"
