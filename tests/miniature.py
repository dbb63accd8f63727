"""The params of a pipeline in miniature, with the shape of the default's and independent of a user's changes there."""

import subprocess
from pathlib import Path

TOP = Path(__file__).parents[1]
PARAMS = """\
base:
  seed: 0
  device: cpu
  threads: 1
data:
  name: digits
  source: digits
  image_size: 32
  validation_fraction: 0.2
  test_fraction: 0.2
finetune:
  epochs: 2
  batch_size: 64
  optimizer: adamw
  learning_rate: 0.002
  horizontal_flip: false
  crop_padding: 2
models:
  convnext:
    library: timm
    architecture: convnext_atto
    arguments: {depths: [1, 1, 2, 1], dims: [16, 32, 64, 96], kernel_sizes: 3, conv_mlp: false, ls_init_value: null}
    input_size: 32
    weights: none
pruners:
  none: {method: none}
  continued: {method: continued, epochs: 2, learning_rate_factor: 0.5}
  oto50: {method: oto, epochs: 2, learning_rate_factor: 0.5, group_sparsity: 0.5, pruning_periods: 2}
  l1: {method: l1_unstructured, epochs: 2, learning_rate_factor: 0.5, sparsity: 0.8}
pruned:
  convnext-none: {model: convnext, pruner: none}
  convnext-continued: {model: convnext, pruner: continued}
  convnext-oto50: {model: convnext, pruner: oto50}
quantizers:
  fp32: {method: fp32}
  int8_dynamic: {method: int8_dynamic}
variants:
  convnext-none-fp32: {pruned: convnext-none, quantizer: fp32}
  convnext-oto50-int8_dynamic: {pruned: convnext-oto50, quantizer: int8_dynamic}
export: {opset: 21, batch: dynamic}
profile:
  batch_size: 256
edge_benchmark:
  windows: 2
  window_seconds: 0.02
report:
  metric: top1
  confidence: 0.95
"""


def committed(name: str) -> str:
    """A file of the repository, in a git checkout without the user's changes."""
    if not (TOP / ".git").exists():
        return (TOP / name).read_text()
    return subprocess.run(["git", "show", f"HEAD:{name}"], cwd=TOP, capture_output=True, text=True, check=True).stdout


def committed_params() -> list[str]:
    """The names of the default's params file and of each profile's."""
    return ["params.yaml", *(str(path.relative_to(TOP)) for path in sorted(TOP.glob("profiles/*/params.yaml")))]
