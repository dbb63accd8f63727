"""Fine-tune a dense classifier on the images: the network with which all others are compared.

In: `data/images` (train and validation parts, never test), the params `base`, `finetune`, `models.<model>`,
`report.metric`.
Out: the artifact `models/dense/<model>/` with the weights of the best epoch by that metric, and its training curve
 `reports/curves/dense/<model>.csv`. With 0 epochs the artifact holds the given weights as they are. After a kill,
the next run resumes from the last checkpoint.

    python -m stages.finetune <model>
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from stages.artifacts.artifact import save_artifact
from stages.artifacts.description import Description
from stages.artifacts.initial_weights import load_weights, statistics
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import write_csv
from stages.datasets.findings import constant_top1
from stages.datasets.store import Info, open_part, read_info
from stages.networks.build import build_network, spec_of, state_hash
from stages.networks.predict import EVALUATION_BATCH, accuracy_of, predict_logits
from stages.networks.preprocess import Classifier
from stages.networks.products import count_products
from stages.networks.spec import NetworkSpec
from stages.params.base import Base
from stages.params.finetune import Finetune
from stages.params.load import key_argument, load_params
from stages.params.metric import Metric
from stages.params.models import Model
from stages.params.section import Name, Section
from stages.training.checkpoint import checkpoint_folder
from stages.training.class_weights import refuse_empty_classes
from stages.training.distributed import is_main_process, launch, process_group
from stages.training.host import prepare_host
from stages.training.pretrained import train_from_weights
from stages.training.trainer import CURVE_COLUMNS, Trained, Trainer, TrainingData


class Params(Section):
    base: Base
    finetune: Finetune
    models: dict[Name, Model]
    report: Metric = Metric()


def recipe_of(params: Params, key: str) -> Finetune:
    """The recipe of one model: `finetune`, with the model's own epochs.

    Raises:
        UserError: if nothing would train a model that starts from random weights.
    """
    model, recipe = params.models[key], params.finetune
    changes: dict[str, Any] = {} if model.epochs is None else {"epochs": model.epochs}
    if model.weights == "none" and changes.get("epochs", recipe.epochs) == 0:
        raise UserError(
            f"models.{key}.weights = 'none': finetune.epochs = 0 leaves random weights: set epochs or weights"
        )
    if model.weights != "none":
        changes["progressive_resize"] = None
    return recipe.model_copy(update=changes)


def describe(params: Params, key: str, recipe: Finetune, spec: NetworkSpec, info: Info) -> Description:
    """The artifact's description before training."""
    model = params.models[key]
    try:
        mean, std = statistics(model, (info.mean, info.std))
    except UserError as error:
        raise UserError(f"models.{key}.{error}") from None
    return Description(
        name=key,
        stage="finetune",
        model=key,
        network=spec,
        classes=info.classes,
        image_size=info.image_size,
        geometry=info.geometry,
        levels=info.levels,
        input_size=model.input_size,
        mean=mean,
        std=std,
        data=info.as_parent(),
        parameters={"model": model.model_dump(), "finetune": recipe.model_dump()},
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
    info, model, recipe = read_info(paths.IMAGES), params.models[key], recipe_of(params, key)
    refuse_large_batch(recipe.batch_size, info.counts["train"])
    train, validation = (open_part(paths.IMAGES, part) for part in ("train", "validation"))
    if recipe.class_weights == "balanced":
        refuse_empty_classes(train.labels, info.classes)
    spec = spec_of(model, len(info.classes), info.channels)
    description = describe(params, key, recipe, spec, info)
    torch.manual_seed(description.seed)
    network = build_network(spec)
    try:
        count_products(network, model.input_size)  # `profile` needs the counts, and would refuse the network at the end
    except UserError as error:
        raise UserError(f"models.{key}: {error}") from None
    constant = constant_top1(np.bincount(validation.labels).tolist())
    print(f"{key}: validation top-1 of a constant answer: {100 * constant:.2f} %")
    if model.weights != "none":
        try:
            loaded, line = load_weights(network, spec, model, info.classes)
        except UserError as error:
            raise UserError(f"models.{key}: {error}") from None
        description.weights = asdict(loaded)
        print(f"{key}: {line}")
        classifier = Classifier(description.preprocess(), network).to(device)
        logits = predict_logits(classifier, validation.images, EVALUATION_BATCH, device)
        before = accuracy_of(logits, validation.labels)
        network.cpu()
        state = "with an untrained head" if loaded.fresh else "as loaded"
        print(f"{key}: validation top-1 {state}: {100 * before.top1:.2f} % (n = {len(validation)})")
    if recipe.epochs == 0:
        save(key, Trained(network, [], before, 0), description)
        return
    identity = {
        "network": state_hash(network),
        "data": info.sha256,
        "parameters": description.parameters,
        "normalization": [description.mean, description.std],
        "seed": description.seed,
        "base": params.base.model_dump(),
        "metric": params.report.metric,
    }
    with checkpoint_folder(paths.SCRATCH / "finetune" / key, identity) as checkpoints:
        data = TrainingData(train, validation, description.preprocess())
        options: dict[str, Any] = {"seed": description.seed, "metric": params.report.metric, "title": f"finetune {key}"}
        if description.fresh is None:
            trained = Trainer(network, data, recipe, device, **options).fit(checkpoints=checkpoints)
        else:
            trained = train_from_weights(
                network, data, recipe, device, fresh=description.fresh, checkpoints=checkpoints, **options
            )
        save(key, trained, description)
    print(f"{key}: epoch {trained.epoch} of {recipe.epochs}, {trained.accuracy.text}")


def save(key: str, trained: Trained, description: Description) -> None:
    """Write the artifact and its curve, with a warning about classes that are never classified correctly."""
    accuracy, names = trained.accuracy, description.classes
    description.metrics = accuracy.metrics | {"epoch": trained.epoch}
    description.never_right = accuracy.never_right(names)
    if is_main_process():
        save_artifact(paths.dense(key), trained.network, description)
        write_csv(paths.dense_curve(key), trained.curve, CURVE_COLUMNS)
    for line in accuracy.warnings(names):
        print(f"{key}: warning: {line}")


def main() -> None:
    params = load_params(Params)
    key = key_argument("models", params.models)
    launch(params.base)
    device = prepare_host(params.base)
    with process_group(device):
        finetune(params, key, device)


if __name__ == "__main__":
    run_stage(main)
