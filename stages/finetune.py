"""Fine-tune a dense classifier on the images: the network with which all others are compared.

In: `data/images` (train and validation parts, never test), the params sections `base`, `finetune`, `models.<model>`.
Out: the artifact `models/dense/<model>/` with the weights of the best epoch by validation top-1, and its training
curve `reports/curves/dense/<model>.csv`. After a kill, the next run resumes from the last checkpoint.

    python -m stages.finetune <model>
"""

import torch

from stages.artifacts.artifact import save_artifact
from stages.artifacts.description import Description
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import write_csv
from stages.datasets.store import Info, open_part, read_info
from stages.networks.build import build_network, load_weights, spec_of, state_hash
from stages.networks.spec import NetworkSpec
from stages.params.base import Base
from stages.params.finetune import Finetune
from stages.params.load import key_argument, load_params
from stages.params.models import Model
from stages.params.section import Name, Section
from stages.training.checkpoint import checkpoint_folder
from stages.training.distributed import is_main_process, launch, process_group
from stages.training.host import prepare_host
from stages.training.trainer import CURVE_COLUMNS, Trainer, TrainingData


class Params(Section):
    base: Base
    finetune: Finetune
    models: dict[Name, Model]


def describe(params: Params, key: str, spec: NetworkSpec, info: Info) -> Description:
    """The artifact's description before training."""
    model = params.models[key]
    return Description(
        name=key,
        stage="finetune",
        model=key,
        network=spec,
        classes=info.classes,
        image_size=info.image_size,
        input_size=model.input_size,
        mean=info.mean,
        std=info.std,
        data=info.as_parent(),
        parameters={"model": model.model_dump(), "finetune": params.finetune.model_dump()},
        seed=model.seed_or(params.base.seed),
    )


def refuse_large_batch(batch_size: int, images: int) -> None:
    """Raise a `UserError` if the training part does not fill one batch, which would change the recipe silently."""
    if batch_size > images:
        raise UserError(
            f"finetune.batch_size = {batch_size}: the training part of {paths.IMAGES} has only {images} images: use"
            " a tenth of them or less, so that an epoch has several steps"
        )


def finetune(params: Params, key: str, device: torch.device) -> None:
    info = read_info(paths.IMAGES)
    refuse_large_batch(params.finetune.batch_size, info.counts["train"])
    spec = spec_of(params.models[key], len(info.classes))
    description = describe(params, key, spec, info)
    torch.manual_seed(description.seed)
    network = build_network(spec)
    weights = params.models[key].weights
    if weights != "none":
        random = ", ".join(load_weights(network, spec, weights)) or "nothing"
        print(f"{key}: loaded {weights}; still random: {random}")
    identity = {
        "network": state_hash(network),
        "data": info.sha256,
        "parameters": description.parameters,
        "seed": description.seed,
        "base": params.base.model_dump(),
    }
    with checkpoint_folder(paths.SCRATCH / "finetune" / key, identity) as checkpoints:
        parts = open_part(paths.IMAGES, "train"), open_part(paths.IMAGES, "validation")
        data = TrainingData(*parts, description.preprocess())
        recipe = (
            params.finetune if weights == "none" else params.finetune.model_copy(update={"progressive_resize": None})
        )
        trainer = Trainer(network, data, recipe, device, seed=description.seed, title=f"finetune {key}")
        trained = trainer.fit(checkpoints=checkpoints)
        description.metrics = {"validation_top1": trained.validation_top1, "epoch": trained.epoch}
        if is_main_process():
            save_artifact(paths.dense(key), trained.network, description)
            write_csv(paths.dense_curve(key), trained.curve, CURVE_COLUMNS)
    print(
        f"{key}: epoch {trained.epoch} of {params.finetune.epochs},"
        f" validation top-1 {100 * trained.validation_top1:.2f} %"
    )


def main() -> None:
    params = load_params(Params)
    key = key_argument("models", params.models)
    launch(params.base)
    device = prepare_host(params.base)
    with process_group(device):
        finetune(params, key, device)


if __name__ == "__main__":
    run_stage(main)
