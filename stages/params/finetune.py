"""The section `finetune`: the training recipe, which pruning and quantization use too."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.section import Count, Decay, Fraction, Pixels, Positive, Section


class ProgressiveResize(Section):
    """Smaller images in the first part of a training from random weights, which saves time."""

    input_size: Pixels
    """Side of the images in the first part; it must be smaller than the model's `input_size`. Unit: pixels."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of the steps that use the smaller images."""


class Pretrained(Section):
    """Settings for models with `weights`, whose tensors need smaller and fewer steps than random ones."""

    head_epochs: Annotated[int, Field(ge=0)] = 2
    """Epochs at the beginning that train only a head that starts afresh, while all other tensors stay as they are. They
    are part of `epochs`. Unit: epochs."""
    body_factor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Factor on the learning rate of all tensors that came from the weights, also in pruning and in recovery. A head
    that starts afresh has the whole learning rate."""
    batch_norm: Literal["frozen", "train"] = "frozen"
    """`frozen` keeps the running statistics of batch norm and normalizes by them, in fine-tuning, pruning and recovery;
    `train` normalizes by each batch and updates them."""
    freeze: list[str] = []
    """Names or glob patterns of tensors (`blocks.0.*`) that fine-tuning does not change."""


class Finetune(Section):
    epochs: Annotated[int, Field(ge=0)]
    """Passes over the training images. 0 takes the weights of every model as they are. Unit: epochs."""
    batch_size: Count
    """Images in each optimizer step, over all processes together. Unit: images."""
    optimizer: Literal["adamw", "sgd", "muon"]
    """`sgd` has Nesterov momentum 0.9. `muon` updates hidden matrices with Muon and all other parameters with AdamW."""
    learning_rate: Positive
    """Peak learning rate of AdamW or SGD. With `optimizer: muon` it applies to the parameters that Muon does not
    update."""
    muon_learning_rate: Positive = 0.02
    """Peak learning rate of the matrices that Muon updates. Only with `optimizer: muon`."""
    weight_decay: Decay = 0.05
    """Weight decay of AdamW or SGD. Biases, norms and layer scales have none."""
    muon_weight_decay: Decay = 0.02
    """Weight decay of the matrices that Muon updates. Only with `optimizer: muon`."""
    muon_iterations: Annotated[int, Field(ge=1, le=10)] = 5
    """Newton-Schulz iterations in each Muon step. Fewer are faster and orthogonalize less precisely. Only with
    `optimizer: muon`."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of the steps in which the learning rate rises from 0 to its peak."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay to 0 after the warm-up."""
    label_smoothing: Fraction = 0.1
    """Probability mass that cross entropy spreads over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` multiplies the loss of each training image by N / (classes * images of its class), so that every class
    counts the same, also in pruning and in recovery."""
    horizontal_flip: bool = True
    """Mirror half of the training images at random. Use false if a mirrored image has another meaning, as with
    digits."""
    crop_padding: Annotated[int, Field(ge=0)] = 4
    """Largest random shift of a training image in each direction, with reflection at the border. Unit: stored
    pixels."""
    random_resized_crop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Smallest area of a random crop (arXiv 1409.4842) as a fraction of the stored image; each crop is scaled to the
    model's `input_size`. Stored images may be larger than that. 0 uses `crop_padding` instead."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Parameter of the Beta distribution of mixup (arXiv 1710.09412); 0 switches it off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Parameter of the Beta distribution of CutMix (arXiv 1905.04899); 0 switches it off. If mixup is on too, each
    batch uses one of the two."""
    trivial_augment: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the training images that TrivialAugment changes (arXiv 2103.10158, wide space): one random operation
    at one random strength."""
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a gray rectangle covers 2 to 33 % of a training image (arXiv 1708.04896)."""
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient of all parameters together; larger ones are scaled down to it. 0 switches it off."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest decay of the exponential moving average (EMA) of the weights, which is validated and saved; 0 switches it
    off. The decay rises over the first steps as (1 + n) / (10 + n)."""
    progressive_resize: ProgressiveResize | None = None
    """Smaller images in the first part of a training from random weights; null trains at `input_size` throughout.
    Validation, and trainings that start from trained weights, always use the model's `input_size`."""
    pretrained: Pretrained = Pretrained()
    """Settings for models with `weights`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype. `auto` uses bfloat16 on GPUs that support it, and on CPUs whose bfloat16 matrix products are
    measurably faster. Muon's Newton-Schulz iterations use bfloat16 wherever it is faster."""
    compile: bool = False
    """Compile the training step with `torch.compile`, which takes a minute or more to start and is then faster, above
    all on a GPU. On one GPU it also records CUDA graphs; without `compile` a GPU gets one call for each operation."""
