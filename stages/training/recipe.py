"""What follows from a recipe: its steps, its learning rates, and the recipe of a training after fine-tuning."""

import math

from stages.params.budget import Budget
from stages.params.finetune import Finetune


def recipe_for(finetune: Finetune, budget: Budget) -> Finetune:
    """The recipe of `finetune` with the epochs and the learning rate factor of a pruner or quantizer."""
    factor = budget.learning_rate_factor
    return finetune.model_copy(
        update={
            "epochs": budget.epochs,
            "learning_rate": finetune.learning_rate * factor,
            "muon_learning_rate": finetune.muon_learning_rate * factor,
            "progressive_resize": None,  # the weights are trained for the full size
        }
    )


def steps_per_epoch(recipe: Finetune, images: int) -> int:
    """Full batches in one epoch. The images of an incomplete batch are left out; the next epoch has another order."""
    return max(1, images // recipe.batch_size)


def steps_in(recipe: Finetune, images: int) -> int:
    """Optimizer steps in the whole training."""
    return recipe.epochs * steps_per_epoch(recipe, images)


def schedule(step: int, steps: int, recipe: Finetune) -> float:
    """Factor of the peak learning rate: linear warm-up, then cosine or linear decay to 0 at the end."""
    warmup = max(1, round(recipe.warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, steps - warmup + 1)
    return 1 - progress if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
