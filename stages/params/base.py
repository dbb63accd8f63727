"""The section `base`: what all stages share."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.section import Section, Seed


class Base(Section):
    seed: Seed = 0
    """Seed of the initial weights, the order of images, augmentation and pruning. A model may have its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that trains; `auto` takes CUDA if it is available, else the CPU."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads for training and for accuracy. 0 takes `OMP_NUM_THREADS` if that is set, else all usable cores (with
    several processes, an equal number for each). Timing has its own key, `edge_benchmark.threads`. Unit: threads."""
    launcher: str = "python"
    """Command that starts the stages that train: `python`, or `torchrun` with its options. `torchrun
    --nproc-per-node 2` trains in two data-parallel processes, each with half of every batch and `threads` threads."""
