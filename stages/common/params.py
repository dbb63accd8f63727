"""Typed parameters: `params.yaml` read, checked as a whole and refused with one readable message.

`python -m stages.common.params [file]` checks a file and prints the plan that it describes.
"""

import difflib
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML, YAMLError

from stages.common import paths
from stages.common.errors import UserError, run_stage

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Temperature = Annotated[float, Field(ge=0.1, le=100)]
Decay = Annotated[float, Field(ge=0, le=10)]
Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=65536)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator takes
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # names become folders and DVC keys: no dots


def _launcher(command: str) -> str:
    """What can be told of it without torch, which refuses the rest when it starts the processes."""
    try:
        program, *options = shlex.split(command) or [""]
    except ValueError as error:
        raise ValueError(str(error).lower()) from None
    if not (program == "torchrun" or (program == "python" and not options)):
        raise ValueError("must be python, or torchrun with its options (torchrun --nproc-per-node 2)")
    return command


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def _refuse_idle(self, beside: str, *keys: str) -> None:
        """Refuse a key that is given and would do nothing beside another setting."""
        for key in keys:
            if key in self.model_fields_set:
                raise PydanticCustomError(
                    "idle", "does nothing with {beside}: leave it out", {"key": key, "beside": beside}
                )


class Base(Section):
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads for training and accuracy; 0 takes all cores, or OMP_NUM_THREADS of them. Timing has its own:
    `edge_benchmark.threads`."""
    launcher: Annotated[str, AfterValidator(_launcher)] = "python"
    """Of stages that train: `torchrun --nproc-per-node 2`, for example, trains in two processes, each with half of
    every batch and `threads` threads; with several nodes the stage is started on each."""


class Data(Section):
    name: str
    source: Literal["digits", "cifar10", "parquet", "folder"]
    location: str | None = None
    """A folder, file or URL for `parquet` and `folder`; for `cifar10` optionally the official archive on disk."""
    sha256: dict[str, str] = {}
    """Expected checksums, by file name; a file that is not listed is taken as it comes."""
    image_size: Annotated[int, Field(ge=4, le=1024)]
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Only where the source brings no test part of its own."""
    split_seed: Seed = 0
    allow_unreadable: bool = False

    @model_validator(mode="after")
    def location_is_given(self) -> "Data":
        if self.source in ("parquet", "folder") and not self.location:
            raise ValueError(f"source: {self.source} needs a location (a folder, a file or a URL)")
        if self.source == "digits" and self.location is not None:
            self._refuse_idle("source: digits", "location")
        return self


class Model(Section):
    library: Literal["timm", "torchvision"]
    architecture: str
    arguments: dict[str, Any] = {}
    input_size: Annotated[int, Field(ge=8, le=1024)]
    weights: str = "none"
    """`none`, `pretrained` (asks the library's hub) or the path of a weights file."""
    seed: Seed | None = None
    """Instead of `base.seed`: the same settings under another seed are another entry."""


class Finetune(Section):
    epochs: Count
    batch_size: Count
    optimizer: Literal["adamw", "sgd", "muon"]
    learning_rate: Positive
    """AdamW's or SGD's; with `muon`, of all that Muon does not take."""
    muon_learning_rate: Positive = 0.02
    weight_decay: Decay = 0.05
    muon_weight_decay: Decay = 0.02
    muon_iterations: Annotated[int, Field(ge=1, le=10)] = 5
    """Newton-Schulz iterations in each of Muon's steps: fewer take less time and orthogonalise more coarsely."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    schedule: Literal["cosine", "linear"] = "cosine"
    label_smoothing: Fraction = 0.1
    horizontal_flip: bool = True
    crop_padding: Annotated[int, Field(ge=0)] = 4
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    trivial_augment: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the images that TrivialAugment changes (arXiv 2103.10158, its wide space): one random operation at one
    random strength."""
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability for each image of a grey rectangle over 2 to 33 % of it (arXiv 1708.04896)."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Exponential moving average of the weights; 0 switches it off."""
    early_input_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Side in pixels to which images are scaled in the first `early_fraction` of a training from scratch: smaller ones
    take less time. Validation, and trainings that go on from finished weights, use the model's `input_size`."""
    early_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of autocast; Muon's own products are in bfloat16 wherever that is faster."""
    compile: bool = False
    """`torch.compile` the training step: a minute or more to start, then faster, most of all on a GPU."""

    @model_validator(mode="after")
    def fraction_is_of_something(self) -> "Finetune":
        if self.early_input_size is None:
            self._refuse_idle("no early_input_size", "early_fraction")
        return self

    @model_validator(mode="after")
    def mixing_pairs_images(self) -> "Finetune":
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size = {self.batch_size}: mixup and cutmix pair images, so it must be even")
        return self


class NonePruner(Section):
    method: Literal["none"]


def _budget(section: "Training | Bits") -> tuple[int, float, float, float]:
    temperature = section.distillation_temperature if section.distillation else 0.0
    return section.epochs, section.learning_rate_factor, section.distillation, temperature


class Training(Section):
    """What every pruner that trains has: its budget. All else of the recipe is `finetune`'s."""

    epochs: Count
    learning_rate_factor: Positive
    """Times `finetune`'s learning rates, at the peak of the schedule."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the loss that asks for the dense parent's softened outputs (arXiv 1503.02531); 0 trains on labels."""
    distillation_temperature: Temperature = 2.0

    @model_validator(mode="after")
    def temperature_softens_something(self) -> "Training":
        if not self.distillation:
            self._refuse_idle("distillation: 0", "distillation_temperature")
        return self

    @property
    def budget(self) -> tuple[int, float, float, float]:
        """What two pruners must share to be compared: epochs, learning rate factor, distillation, its temperature."""
        return _budget(self)


class Continued(Training):
    method: Literal["continued"]


class Importance(Section):
    """Weights of HESSO's importance scores (arXiv 2409.09085); each score is normalised before it is weighted. One that
    is not named has none."""

    magnitude: Annotated[float, Field(ge=0)] = 0.0
    average_magnitude: Annotated[float, Field(ge=0)] = 0.0
    cosine_similarity: Annotated[float, Field(ge=0)] = 0.0
    taylor_first_order: Annotated[float, Field(ge=0)] = 0.0
    taylor_second_order: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def is_a_mapping(cls, given: Any) -> Any:
        if not isinstance(given, dict | Importance):
            raise ValueError(
                f"must map scores to weights ({{magnitude: 1.0}}); the scores: {', '.join(cls.model_fields)}"
            )
        return given

    @model_validator(mode="after")
    def some_weight(self) -> "Importance":
        if not any(self.model_dump().values()):
            raise ValueError("at least one weight must be above 0")
        return self


ALL_SCORES = Importance(**dict.fromkeys(Importance.model_fields, 0.2))


class Structured(Training):
    """What every pruner that removes whole channels has: one target, and what the narrower network must be like."""

    group_sparsity: Fraction | None = None
    """Share of the channels to remove: of all that can go, one for each group of a grouped convolution; of `depgraph`,
    in every layer."""
    params_reduction: Fraction | None = None
    """Share of the dense network's parameters to remove."""
    macs_reduction: Fraction | None = None
    """Share of the dense network's MACs to remove."""
    minimum_width: Width = 1
    """Channels that every layer keeps at least."""
    divisible_by: Width = 1
    """Every layer that is cut keeps a multiple of this, as vector units like it. Of a grouped convolution, which is
    cut by whole groups, so many groups; with `depgraph`, which cuts within them, channels, as many in each group."""
    layer_norm: Literal["exact", "exact_matmul", "plain"] = "exact"
    """How a cut LayerNorm counts: by its original width (by padding, or by sums as matrix products), or plainly."""
    allow_partial: bool = False
    """Prune what can be cut exactly and leave the rest whole, instead of refusing the network."""

    @model_validator(mode="after")
    def one_target(self) -> "Structured":
        if len(self.target) != 1:
            given = ", ".join(self.target) or "none"
            raise ValueError(f"give one of group_sparsity, params_reduction and macs_reduction (given: {given})")
        return self

    @property
    def target(self) -> dict[str, float]:
        """The one target by name."""
        targets = self.model_dump(include={"group_sparsity", "params_reduction", "macs_reduction"})
        return {name: value for name, value in targets.items() if value is not None}

    @property
    def inexact(self) -> str | None:
        """The setting by which a cut changes the network's output, which then has to recover; None: it does not."""
        return "layer_norm: plain" if self.layer_norm == "plain" else None


class Scheduled(Section):
    """When pruning happens, as shares of the training's steps."""

    start_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Warm-up: the steps before pruning begins."""
    end_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """By here pruning has ended; the rest is recovery."""

    @model_validator(mode="after")
    def start_is_before_end(self) -> "Scheduled":
        if self.start_fraction >= self.end_fraction:
            raise ValueError("start_fraction must be less than end_fraction")
        return self

    def _refuse_no_recovery(self, epochs: int, cause: str) -> None:
        """Refuse what leaves no whole epoch behind a cut that changes the output, whatever the number of steps."""
        if epochs == 1 or self.end_fraction == 1:
            raise ValueError(
                f"{cause} changes the output when channels are cut, and end_fraction {self.end_fraction} of epochs"
                f" {epochs} leaves no whole epoch to recover: set epochs: 2 or more and end_fraction below 1"
            )


class Oto(Structured, Scheduled):
    method: Literal["oto"]
    optimizer: Literal["hesso", "dhspg"] = "hesso"
    pruning_periods: Count = 5
    """HESSO's; DHSPG picks its redundant channels once, when the warm-up ends."""
    importance: Importance = ALL_SCORES
    penalty: Positive = 50.0
    """DHSPG's lambda: the least weight of the norms of redundant channels. A step takes penalty x learning rate from a
    norm, so that penalty x learning rate x steps of the phase has to reach the channels' norms or nothing is projected:
    50 does at AdamW's learning rate of 0.001 and some hundred steps; SGD at 0.1 wants a hundredth of it."""
    penalty_limit: Positive = 200.0
    """DHSPG's largest lambda."""
    half_space: Fraction = 0.0
    """DHSPG's epsilon: a step that leaves this share of a channel's own direction or less makes it zero."""

    @model_validator(mode="after")
    def keys_are_those_of_its_optimizer(self) -> "Oto":
        others = ("penalty", "penalty_limit", "half_space") if self.optimizer == "hesso" else ("pruning_periods",)
        self._refuse_idle(f"optimizer: {self.optimizer}", *others)
        return self

    @model_validator(mode="after")
    def an_inexact_cut_can_be_recovered(self) -> "Oto":
        if self.inexact and any(self.target.values()):
            self._refuse_no_recovery(self.epochs, self.inexact)
        return self

    @model_validator(mode="after")
    def penalty_is_within_its_limit(self) -> "Oto":
        if self.penalty > self.penalty_limit:
            raise ValueError(
                f"penalty {self.penalty} is above penalty_limit {self.penalty_limit}: lower the one or raise the other"
            )
        return self


class RandomStructured(Structured):
    """Channels removed at random, at once, before training."""

    method: Literal["random_structured"]


class SmallDense(Structured):
    """No pruning: a uniformly narrower network, trained from scratch for the steps of the dense one and a pruner's."""

    method: Literal["small_dense"]
    layer_norm: Literal["exact", "exact_matmul", "plain"] = "plain"

    @model_validator(mode="after")
    def no_layer_norm_was_ever_wider(self) -> "SmallDense":
        self._refuse_idle("method: small_dense", "layer_norm")
        return self


class Depgraph(Structured, Scheduled):
    """Torch-Pruning's dependency-graph pruner (arXiv 2301.12900), as a peer."""

    method: Literal["depgraph"]
    importance: Literal["magnitude", "group_lasso"] = "magnitude"
    """`magnitude` prunes before training; `group_lasso` first trains with the library's group regularisation from
    `start_fraction` to `end_fraction`: `penalty` times 1 to 16 of a channel's weights is added to their gradients, the
    more the less important the channel is in its layer at the moment."""
    penalty: Positive = 1e-4
    """Of `group_lasso`: the regularisation's strength."""
    layer_norm: Literal["exact", "exact_matmul", "plain"] = "plain"

    @property
    def inexact(self) -> str:
        """Whatever the LayerNorms: the channels that it takes are not zero."""
        return "method: depgraph"

    @model_validator(mode="after")
    def keys_are_those_of_its_importance(self) -> "Depgraph":
        self._refuse_idle("method: depgraph", "allow_partial")
        if self.importance == "magnitude":
            self._refuse_idle("importance: magnitude", "penalty", "start_fraction", "end_fraction")
        else:
            self._refuse_no_recovery(self.epochs, self.inexact)
        return self


class Unstructured(Training, Scheduled):
    method: Literal["l1_unstructured", "random_unstructured"]
    sparsity: Fraction
    scope: Literal["global", "layer"] = "layer"
    pattern: Literal["none", "2:4"] = "none"
    """`2:4`: two of every four neighbouring inputs of an output are zero, as sparse tensor cores want it."""
    schedule: Literal["one_shot", "gradual"] = "one_shot"
    """`gradual`: cubic from 0 at `start_fraction` to `sparsity` at `end_fraction` (arXiv 1710.01878, equation 1)."""
    pruning_periods: Count = 10
    """Of the gradual schedule: how often the zeros are chosen anew."""

    @model_validator(mode="after")
    def only_the_gradual_schedule_takes_time(self) -> "Unstructured":
        if self.schedule == "one_shot":
            self._refuse_idle("schedule: one_shot", "pruning_periods", "start_fraction", "end_fraction")
        return self

    @model_validator(mode="after")
    def pattern_has_its_sparsity(self) -> "Unstructured":
        if self.pattern == "2:4" and (self.sparsity != 0.5 or self.scope != "layer"):
            raise ValueError("pattern 2:4 zeroes half of every layer: set sparsity: 0.5 and scope: layer")
        if self.pattern == "2:4" and self.schedule == "gradual":
            raise ValueError("pattern 2:4 is chosen at once: set schedule: one_shot, or pattern: none")
        return self


class Fp32(Section):
    method: Literal["fp32"]


class Int8Dynamic(Section):
    method: Literal["int8_dynamic"]
    per_channel: bool = True


class Calibrated(Section):
    """What every quantizer that looks at images has. They come from the training part."""

    calibration_images: Count = 256
    calibration_seed: Seed = 0


class Int8Static(Calibrated):
    method: Literal["int8_static"]
    weight_bits: Literal[7, 8] = 8
    """7 for x86 processors without VNNI, which add pairs of products in 16 bits: those of 8 bits overflow there."""
    calibration: Literal["minmax", "percentile", "entropy"] = "percentile"
    """How the range of an activation is chosen from what the calibration images show."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Of `percentile`: the share, in per cent, of values within the range."""

    @model_validator(mode="after")
    def percentile_is_asked_for(self) -> "Int8Static":
        if self.calibration != "percentile":
            self._refuse_idle(f"calibration: {self.calibration}", "percentile")
        return self


class Bits(Calibrated):
    """What every quantizer to few bits has: weights are integers, activations stay in float."""

    rounding: Literal["nearest", "gptq"] = "nearest"
    """`gptq` rounds column by column and makes up for each error in the next (arXiv 2210.17323)."""
    epochs: Annotated[int, Field(ge=0)] = 0
    """Of quantization-aware recovery, straight through the rounding; 0 only rounds."""
    learning_rate_factor: Positive = 0.1
    """Times `finetune`'s learning rates."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of recovery's loss that asks for the float parent's softened outputs (arXiv 1503.02531)."""
    distillation_temperature: Temperature = 2.0

    @property
    def budget(self) -> tuple[int, float, float, float]:
        """Of quantization-aware recovery, as `Training`'s."""
        return _budget(self)

    @model_validator(mode="after")
    def recovery_has_its_settings(self) -> "Bits":
        if not self.epochs:
            self._refuse_idle("epochs: 0", "learning_rate_factor", "distillation", "distillation_temperature")
        elif not self.distillation:
            self._refuse_idle("distillation: 0", "distillation_temperature")
        if self.epochs and self.rounding == "gptq":
            raise ValueError(
                f"rounding: gptq with epochs: {self.epochs}: recovery rounds to nearest in every step, so what gptq"
                " found would be lost: leave out one of the two"
            )
        return self


class UniformBits(Bits):
    method: Literal["uniform_bits"]
    bits: Annotated[int, Field(ge=2, le=8)]

    @model_validator(mode="after")
    def images_are_looked_at(self) -> "UniformBits":
        if self.rounding == "nearest":
            self._refuse_idle("rounding: nearest", "calibration_images", "calibration_seed")
        return self


class AllocatedBits(Bits):
    """Another number of bits for each layer, within a budget."""

    average_bits: Annotated[float, Field(ge=2, le=8)]
    """The budget: bits of all weights over their number. It is kept in every step of a search."""
    choices: Annotated[list[Annotated[int, Field(ge=2, le=8)]], Field(min_length=2)] = [2, 3, 4, 5, 6, 7, 8]
    """The numbers of bits that a layer may have."""
    evaluations: Count = 256
    """How often a search may evaluate the network on the calibration images, to measure sensitivities too."""
    objective: Literal["loss", "accuracy"] = "loss"
    """What a search minimises, or maximises, on the calibration images."""

    @model_validator(mode="after")
    def choices_allow_the_budget(self) -> "AllocatedBits":
        if sorted(set(self.choices)) != self.choices:
            raise ValueError("choices must rise, each once")
        if self.average_bits < self.choices[0]:
            raise ValueError(
                f"average_bits = {self.average_bits} is under the {self.choices[0]} bits that every layer needs by"
                " choices: raise it, or allow fewer bits"
            )
        if self.average_bits >= self.choices[-1]:
            raise ValueError(
                f"average_bits = {self.average_bits} leaves nothing to choose, since every layer may have the"
                f" {self.choices[-1]} bits that are the most of choices: lower it, or use uniform_bits"
            )
        return self


class SearchedBits(AllocatedBits):
    method: Literal["searched_bits"]
    search: Literal["random", "greedy", "ilp"]
    """`random` draws around the budget; the others work on measured sensitivities, step by step or exactly."""


class LearnedBits(AllocatedBits):
    """A controller that learns by policy gradient which layer gets how many bits."""

    method: Literal["learned_bits"]
    samples: Annotated[int, Field(ge=2)] = 8
    """Allocations that are tried between two steps of the controller."""
    learning_rate: Annotated[float, Field(ge=0)] = 0.02
    """The controller's; 0 leaves the policy as it begins: the control that tells what learning adds."""
    hidden_units: Annotated[int, Field(ge=1, le=4096)] = 32
    entropy_weight: Annotated[float, Field(ge=0)] = 0.02
    """Of the entropy bonus, which falls to 0 over the search."""

    @model_validator(mode="after")
    def the_controller_can_step(self) -> "LearnedBits":
        if self.evaluations < 2 * self.samples:
            raise ValueError(
                f"evaluations = {self.evaluations} leaves the controller nothing to try after its first step, which"
                f" takes samples = {self.samples}: set it to {2 * self.samples} or more, or lower samples"
            )
        return self


Pruner = Annotated[
    NonePruner | Continued | Oto | RandomStructured | SmallDense | Depgraph | Unstructured,
    Field(discriminator="method"),
]
Quantizer = Annotated[
    Fp32 | Int8Dynamic | Int8Static | UniformBits | SearchedBits | LearnedBits, Field(discriminator="method")
]


class PrunedModel(Section):
    model: Name
    pruner: Name


class Variant(Section):
    pruned: Name
    quantizer: Name


class Profile(Section):
    batch_size: Count = 256
    corrupted_images: Annotated[int, Field(ge=0)] = 1000
    """Test images that each corruption is tried on, or all where there are fewer; 0: no corruptions."""
    corruption_seed: Seed = 0


class Export(Section):
    """Of `model.onnx`."""

    opset: Annotated[int, Field(ge=21, le=23)] = 21
    """21 is the first with 4-bit integers; runtimes of a device may know no later one."""
    batch: Literal["dynamic", 1] = "dynamic"
    """The first axis of the file: free, or one image at a time, as some runtimes want it."""


class Soak(Section):
    """One variant, run on and on: does its latency drift?"""

    FEWEST_WINDOWS: ClassVar[int] = 4

    variant: Name
    minutes: Annotated[float, Field(gt=0, le=10080)]
    images_per_second: Annotated[float, Field(ge=0)] = 0.0
    """A camera's rate; 0 runs one inference after the other."""
    window_seconds: Positive = 5.0

    @model_validator(mode="after")
    def windows_tell_a_drift_from_noise(self) -> "Soak":
        if 60 * self.minutes < self.FEWEST_WINDOWS * self.window_seconds:
            raise ValueError(
                f"{60 * self.minutes:g} s in windows of {self.window_seconds:g} s: it needs at least"
                f" {self.FEWEST_WINDOWS} windows: make minutes longer, or window_seconds shorter"
            )
        if self.images_per_second and self.images_per_second * self.window_seconds < 1:
            raise ValueError(
                f"at {self.images_per_second:g} images_per_second windows of {self.window_seconds:g} s would be empty:"
                " make window_seconds longer"
            )
        return self


class Printed(Section):
    """One variant on test images that are printed and filmed in simulation."""

    variant: Name
    images: Count | None = None
    """null: 1,000, or all where the test part has fewer."""
    seed: Seed = 0


SSH_TARGET = re.compile(r"ssh://(?:(?P<user>[^\s@/:-][^\s@/:]*)@)?(?P<host>[^\s@/:-][^\s@/:]*)(?::(?P<port>\d+))?/?")


def _known_target(target: str) -> str:
    found = SSH_TARGET.fullmatch(target)
    if target == "local" or (found and (found["port"] is None or 0 < int(found["port"]) < 65536)):
        return target
    raise ValueError(
        "must be local or ssh://user@host[:port] with a port from 1 to 65535 (give an IPv6 address a name in"
        " ~/.ssh/config)"
    )


class EdgeBenchmark(Section):
    target: Annotated[str, AfterValidator(_known_target)] = "local"
    """This machine, or a device: `ssh://user@host[:port]`."""
    runtimes: Annotated[
        list[Literal["onnxruntime", "openvino", "executorch", "torch-eager", "torch-compile"]],
        Field(min_length=1),
    ] = ["onnxruntime"]
    """In which every variant is timed. PyTorch's two time the dense float networks only, and eager always does: it is
    the baseline."""
    threads: Count = 1
    affinity: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """The cores that may be used; null leaves it to the system."""
    batch: Count = 1
    """Images in each call."""
    warmup_runs: Count = 20
    windows: Annotated[int, Field(ge=2)] = 10
    window_seconds: Positive = 0.3
    """Shortest duration of a window."""
    minimum_runs: Count = 5
    """Recorded calls in each window, however long they take."""
    seed: Seed = 0
    soak: Soak | None = None
    printed: Printed | None = None

    @model_validator(mode="after")
    def runtimes_hold_the_one_that_ships(self) -> "EdgeBenchmark":
        if "onnxruntime" not in self.runtimes:
            raise ValueError("runtimes must hold onnxruntime: it is what the bundle ships")
        if len(set(self.runtimes)) < len(self.runtimes):
            raise ValueError("runtimes: each once")
        return self

    @model_validator(mode="after")
    def affinity_holds_the_threads(self) -> "EdgeBenchmark":
        if self.affinity is None:
            return self
        if len(set(self.affinity)) < len(self.affinity):
            raise ValueError("affinity: each core once")
        if len(self.affinity) < self.threads:
            raise ValueError(
                f"affinity names {len(self.affinity)} cores for {self.threads} threads: they would take turns"
            )
        return self


class Report(Section):
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    headline_max_drop: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The headline variant is the smallest whose validation top-1 is at most this much under the baseline's."""


class Params(Section):
    root: str = "."
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

    def pruning_benchmarks(self) -> Path:
        """Where `tests/benchmarks/pruning.py` leaves its results, a file for each device, for all profiles."""
        return Path(self.root) / paths.REPORTS / "benchmarks/pruning"

    def seed_of(self, model: str) -> int:
        own = self.models[model].seed
        return self.base.seed if own is None else own

    def sizes_of(self, model: str) -> dict[str, int]:
        """The sizes in pixels at which it is trained, by the keys that say so."""
        early, section = self.finetune.early_input_size, self.models[model]
        sizes = {"input_size": section.input_size}
        return sizes | ({"finetune.early_input_size": early} if early and self.begins_fresh(model) else {})

    def begins_fresh(self, model: str) -> bool:
        """Whether it is trained from fresh weights: by finetune, or by a `small_dense` pruner."""
        pruners = [self.pruners.get(pruning.pruner) for pruning in self.pruned.values() if pruning.model == model]
        return self.models[model].weights == "none" or any(isinstance(pruner, SmallDense) for pruner in pruners)

    def model_of(self, variant: str) -> str:
        return self.pruned[self.variants[variant].pruned].model

    def pruner_of(self, variant: str) -> str:
        return self.pruned[self.variants[variant].pruned].pruner

    def baseline_of(self, variant: str) -> str:
        """The dense float variant of the same model: what a variant is compared with."""
        return f"{self.model_of(variant)}-none-fp32"


def load_params(path: Path = paths.PARAMS) -> Params:
    """Read and check a whole file.

    Raises:
        UserError: with one line for each problem: the key's path, the value given, what is allowed.
    """
    try:
        # YAML 1.2, as DVC reads and writes it: to PyYAML's 1.1, 5e-05 is a text
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.absolute()} is missing: run from the top folder or from profiles/<name>") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_of_yaml(error)}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: no setting is") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections (a mapping), not {type(raw).__name__}")
    try:
        params = Params.model_validate(raw)
        problems = _broken_references(params)
    except ValidationError as error:
        problems = [_readable(detail, raw) for detail in error.errors()]
    _refuse(path, problems)
    return params


def _of_yaml(error: YAMLError) -> str:
    """The parser's reason and its line, without its advice."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem.splitlines()[0]}"


def check_models(params: Params, path: Path = paths.PARAMS) -> None:
    """Refuse a model that cannot be built, takes no images of its size, or lacks its weights (imports the libraries).

    Args:
        path: the file that `params` was read from; paths in it are relative to its folder.

    Raises:
        UserError: with one line for each problem; an unknown architecture comes with the nearest names.
    """
    from stages.common.architectures import refused, unknown

    problems = []
    for name, model in params.models.items():
        if problem := unknown(model.library, model.architecture):
            problems.append(f"models.{name}.architecture = {model.architecture!r}: {problem}")
        elif found := refused(model.library, model.architecture, model.arguments, params.sizes_of(name)):
            key, reason = found
            problems.append(f"models.{name}{key}: {reason}")
        if model.weights not in ("none", "pretrained") and not (path.parent / model.weights).is_file():
            problems.append(
                f"models.{name}.weights = {model.weights!r}: no such file (seen from the folder of params.yaml), nor"
                " one of none, pretrained"
            )
    _refuse(path, problems)


def check_for_dvc(params: Params, path: Path = paths.PARAMS) -> None:
    """Refuse what DVC itself would stumble over, some of it hours later.

    Raises:
        UserError: for a section that is left out (DVC knows no defaults), or a `root` under which the code is not.
    """
    problems = [f"{name}: is required and missing" for name in Params.model_fields.keys() - params.model_fields_set]
    root = path.parent / params.root
    if not (root / "stages/common/params.py").is_file():
        problems.append(
            f"root = {params.root!r}: {root.resolve()} holds no folder `stages` with the code (../.. in"
            " profiles/<name>/params.yaml, . at the top)"
        )
    _refuse(path, sorted(problems))


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise UserError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}\n  " + "\n  ".join(problems))


def _broken_references(params: Params) -> list[str]:
    problems = []

    def reference(key: str, value: str, section: str, known: dict) -> bool:
        if value not in known:
            problems.append(f"{key} = {value!r}: not listed under {section} ({', '.join(known) or 'which is empty'})")
        return value in known

    def joined(section: str, key: str, expected: str) -> None:
        if key != expected:
            problems.append(f"{section}.{key}: the key must be its joined parts, {expected!r}")

    for key, pruning in params.pruned.items():
        reference(f"pruned.{key}.model", pruning.model, "models", params.models)
        reference(f"pruned.{key}.pruner", pruning.pruner, "pruners", params.pruners)
        joined("pruned", key, f"{pruning.model}-{pruning.pruner}")
    for key, variant in params.variants.items():
        reference(f"variants.{key}.pruned", variant.pruned, "pruned", params.pruned)
        reference(f"variants.{key}.quantizer", variant.quantizer, "quantizers", params.quantizers)
        joined("variants", key, f"{variant.pruned}-{variant.quantizer}")
    if problems:
        return problems

    edge = params.edge_benchmark
    for key, section in [("soak", edge.soak), ("printed", edge.printed)]:
        if section is not None:
            reference(f"edge_benchmark.{key}.variant", section.variant, "variants", params.variants)
    if edge.batch > 1 and params.export.batch == 1:
        problems.append(
            f"edge_benchmark.batch = {edge.batch}: export.batch = 1 lets the files take one image at a time"
        )
    if (padding := params.finetune.crop_padding) >= params.data.image_size:
        problems.append(
            f"finetune.crop_padding = {padding}: must be less than data.image_size = {params.data.image_size}: a crop"
            " would show nothing of its image"
        )
    early = params.finetune.early_input_size
    for key, model in params.models.items():
        if early and params.begins_fresh(key) and early >= model.input_size:
            problems.append(
                f"finetune.early_input_size = {early}: must be less than models.{key}.input_size = {model.input_size}:"
                " smaller images save time"
            )
    for key, method, section in [("none", "none", params.pruners), ("fp32", "fp32", params.quantizers)]:
        if key in section and section[key].method != method:
            problems.append(
                f"{'pruners' if key == 'none' else 'quantizers'}.{key}.method: {key!r} names the baseline: {method}"
            )
    for model in params.models:
        if f"{model}-none-fp32" not in params.variants:
            problems.append(
                f"models.{model}: its baseline is missing: list {model}-none under pruned and {model}-none-fp32 under"
                " variants"
            )
        pruners = [params.pruners[p.pruner] for p in params.pruned.values() if p.model == model]
        trained = {p.budget for p in pruners if isinstance(p, Training) and p.method != "continued"}
        control = {p.budget for p in pruners if p.method == "continued"}
        for epochs, factor, distillation, temperature in sorted(trained - control):
            softly = f" with distillation {distillation} at temperature {temperature}" if distillation else ""
            problems.append(
                f"models.{model}: a pruner trains for {epochs} more epochs at learning_rate_factor {factor}{softly}, so"
                " a continued pruner with the same settings must be listed for it (the control: the same steps"
                " without pruning)"
            )
    return problems


def _readable(detail: dict, raw: Any) -> str:
    """One line for pydantic's error: the path as it stands in the file (pydantic adds its own tags to it)."""
    where, value = [], raw
    for position, part in enumerate(detail["loc"]):
        last = position == len(detail["loc"]) - 1
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, dict) and part in value):
            value = value[part]
        elif part == "[key]" or not last or detail["type"] != "missing":
            continue
        where.append(str(part))
    key = ".".join(where) or "the file"
    match detail["type"]:
        case "missing":
            return f"{key}: is required and missing"
        case "extra_forbidden":
            return f"{key} = {_shown(value)}: unknown key{_known_keys(where, raw)}"
        case "string_type" if "[key]" in detail["loc"]:
            return f"{key}: the name {detail['input']!r} is no text: put it in quotes"
        case "string_pattern_mismatch":  # of names alone
            return (
                f"{key}{'' if '[key]' in detail['loc'] else f' = {value!r}'}: names hold letters, digits, _ and - only,"
                " and begin with a letter or digit: they become folders and DVC's keys"
            )
        case "idle":
            given = detail["ctx"]["key"]
            return f"{key}.{given} = {value[given]!r}: {detail['msg']}"
        case "union_tag_invalid":
            return f"{key}.method = {value.get('method')!r}: must be one of {detail['ctx']['expected_tags']}"
        case "union_tag_not_found":
            return f"{key}.method: is required and missing"
        case "dict_type" | "model_type" | "model_attributes_type" if value is None:
            return f"{key}: is empty: its keys are missing"
        case "too_short":
            return f"{key}: needs entries, at least {detail['ctx']['min_length']}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    shown = "" if isinstance(value, dict) else f" = {_shown(value)}"
    return (
        f"{key}{shown}: must be {message}" if detail["msg"].startswith("Input should") else f"{key}{shown}: {message}"
    )


def _shown(value: Any) -> str:
    """As it stands in the file, if that is short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _known_keys(where: list[str], raw: Any) -> str:
    """What might stand at the place of an unknown key."""
    section = _section_of(Params, where[:-1], raw)
    if section is None:
        return ""
    near = difflib.get_close_matches(where[-1], section.model_fields, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(section.model_fields)}"


def _section_of(annotation: Any, where: list[str], raw: Any) -> type[Section] | None:
    """The typed section at a place in the file; None where the file does not tell which it is."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        if not where:
            return annotation
        field = annotation.model_fields.get(where[0])
        return field and _section_of(field.annotation, where[1:], raw[where[0]])
    if get_origin(annotation) is dict:
        return _section_of(get_args(annotation)[1], where[1:], raw[where[0]])
    if get_origin(annotation) is Annotated:
        return _section_of(get_args(annotation)[0], where, raw)
    for one in get_args(annotation):  # a union, told apart by the method
        methods = one.model_fields["method"] if isinstance(one, type) and issubclass(one, Section) else None
        if methods is not None and raw.get("method") in get_args(methods.annotation):
            return _section_of(one, where, raw)
    return None


def key_argument(section: str, known: dict[str, Any]) -> str:
    """The entry of `section` that the command line names.

    Raises:
        UserError: if it names none, or one that is not listed.
    """
    if len(sys.argv) == 2 and sys.argv[1] in known:
        return sys.argv[1]
    given = " ".join(sys.argv[1:])
    raise UserError(f"{given!r}: give one entry of {section}: {', '.join(known)}")


def plan(params: Params) -> str:
    """What `dvc repro` would make, for a person to read."""
    lines = [f"data      {params.data.name} from {params.data.source}, {params.data.image_size} px"]
    for name, model in params.models.items():
        lines.append(
            f"model     {name}: {model.library} {model.architecture}, input {model.input_size} px,"
            f" weights {model.weights}, seed {params.seed_of(name)}, {params.finetune.epochs} epochs"
        )
    for key, pruning in params.pruned.items():
        pruner = params.pruners[pruning.pruner]
        settings = ", ".join(f"{k} {v}" for k, v in pruner.model_dump(exclude={"method"}, exclude_unset=True).items())
        lines.append(f"pruning   {key}: {pruner.method}" + (f" ({settings})" if settings else ""))
    for key, variant in params.variants.items():
        lines.append(f"variant   {key}: {params.quantizers[variant.quantizer].method}")
    used = {variant.pruned for variant in params.variants.values()}
    lines += [
        f"remark    pruned.{key}: no variant uses it: it would be made, and neither measured nor reported"
        for key in params.pruned
        if key not in used
    ]
    location = params.data.location
    if location and "://" not in location and not Path(location).expanduser().exists():
        lines.append(f"remark    data.location: {location} is not there (seen from {Path.cwd()}): download would stop")
    return "\n".join(lines)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else paths.PARAMS
    params = load_params(path)
    check_for_dvc(params, path)
    check_models(params, path)
    print(plan(params))


if __name__ == "__main__":
    run_stage(main)
