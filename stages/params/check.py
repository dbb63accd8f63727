"""`edgewise check`: the whole of `params.yaml`, with cross-references, networks and files, and the plan it describes.

A stage checks only the sections that it reads. Run this after every edit: it finds what a stage would find hours later.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from stages.common import paths
from stages.common.errors import UserError
from stages.params.budget import Budget
from stages.params.load import load_params, refuse
from stages.params.models import Model
from stages.params.pruners import Continued, SmallDense
from stages.params.section import Excluding
from stages.params.whole import Params


def check(path: Path = paths.PARAMS) -> Params:
    """The params of a file in which everything fits together.

    Raises:
        UserError: with one line for each problem.
    """
    params = load_params(Params, path, whole=True)
    refuse(path, sorted([*left_out(params), *bad_settings(params), *missing_files(params, path)]))
    refuse(path, list(bad_networks(params, path)))  # last, since it imports the libraries
    return params


def left_out(params: Params) -> Iterator[str]:
    """Sections and single keys that `dvc.yaml` names and the file lacks: DVC knows no defaults."""
    for name in Params.model_fields.keys() - params.model_fields_set:
        yield f"{name}: is required and missing"
    for name, section, key in (("base", params.base, "threads"), ("report", params.report, "metric")):
        if name in params.model_fields_set and key not in section.model_fields_set:
            default = getattr(section, key)
            yield f"{name}.{key}: is required and missing; its usual value is {default}"


def bad_settings(params: Params) -> Iterator[str]:
    """Settings of different sections that do not fit together."""
    if params.edge_benchmark.batch > 1 and params.export.batch == 1:
        yield (
            f"edge_benchmark.batch = {params.edge_benchmark.batch}: export.batch = 1 lets the files take one image at a"
            " time"
        )
    if (padding := params.finetune.crop_padding) >= params.data.image_size:
        yield (
            f"finetune.crop_padding = {padding}: must be less than data.image_size = {params.data.image_size}, or a"
            " crop would show nothing of its image"
        )
    if "none" in params.pruners and params.pruners["none"].method != "none":
        yield "pruners.none.method: 'none' names the baseline: none"
    if "fp32" in params.quantizers and params.quantizers["fp32"].method != "fp32":
        yield "quantizers.fp32.method: 'fp32' names the baseline: fp32"
    for name, model in params.models.items():
        if model.weights == "none" and model.epochs is None and params.finetune.epochs == 0:
            yield f"models.{name}.weights = 'none': finetune.epochs = 0 leaves random weights: set epochs or weights"
        early = params.finetune.progressive_resize
        if early and starts_from_random_weights(params, name) and early.input_size >= model.input_size:
            yield (
                f"finetune.progressive_resize.input_size = {early.input_size}: must be less than"
                f" models.{name}.input_size = {model.input_size}"
            )
        if f"{name}-none-fp32" not in params.variants:
            yield (
                f"models.{name}: its baseline is missing: list {name}-none under pruned and {name}-none-fp32 under"
                " variants"
            )
        yield from _missing_controls(params, name)


def starts_from_random_weights(params: Params, model: str) -> bool:
    """Whether finetune, or a `small_dense` pruner, trains this model from random weights."""
    pruners = [params.pruners[pruned.pruner] for pruned in params.pruned.values() if pruned.model == model]
    return params.models[model].weights == "none" or any(isinstance(pruner, SmallDense) for pruner in pruners)


def _missing_controls(params: Params, model: str) -> Iterator[str]:
    pruners = [params.pruners[pruned.pruner] for pruned in params.pruned.values() if pruned.model == model]
    trained = {p.budget for p in pruners if isinstance(p, Budget) and not isinstance(p, Continued)}
    controls = {p.budget for p in pruners if isinstance(p, Continued)}
    for epochs, factor, distillation, temperature in sorted(trained - controls):
        softened = f", distillation {distillation} and temperature {temperature}" if distillation else ""
        yield (
            f"models.{model}: a pruner trains for {epochs} epochs at learning_rate_factor {factor}{softened}: list a"
            " pruner of method continued with the same settings for this model (the control)"
        )


def missing_files(params: Params, path: Path) -> Iterator[str]:
    """Paths in the file, relative to its folder, at which there is nothing."""
    for name, model in params.models.items():
        local = model.weights not in ("none", "pretrained") and not model.weights.startswith("hf:")
        if local and not (path.parent / model.weights).exists():
            yield (
                f"models.{name}.weights = {model.weights!r}: no such file or folder (seen from the folder of"
                " params.yaml), and not none, pretrained or hf:<owner>/<repository>"
            )
    if params.report.claims is not None and not (path.parent / params.report.claims).is_file():
        yield f"report.claims = {params.report.claims!r}: no such file (seen from the folder of params.yaml)"


def bad_networks(params: Params, path: Path) -> Iterator[str]:
    """Networks that cannot be built or counted, that take no images of their size, or whose weights do not fit."""
    from stages.networks.architectures import CLASSES, refused, unknown
    from stages.networks.build import spec_of
    from stages.networks.products import uncountable

    for name, model in params.models.items():
        sizes = {"input_size": model.input_size}
        if (early := params.finetune.progressive_resize) and starts_from_random_weights(params, name):
            sizes["finetune.progressive_resize.input_size"] = early.input_size
        if problem := unknown(model.library, model.architecture):
            yield f"models.{name}.architecture = {model.architecture!r}: {problem}"
        elif found := refused(model.library, model.architecture, model.arguments, sizes, params.data.channels):
            key, reason = found
            yield f"models.{name}{key}: {reason}"
        elif params.finetune.batch_size == 1 and (norms := _norms_of_one_value(params, name)):
            yield (
                f"finetune.batch_size = 1: batch norm ({norms[0]}) of models.{name} sees one value of each channel and"
                " cannot train on one image: use 2 or more"
            )
        elif problem := uncountable(spec_of(model, CLASSES, params.data.channels), model.input_size):
            yield f"models.{name}: {model.library} {model.architecture}: {problem}"
        elif problem := bad_weights(model, path, params.data.channels):
            yield f"models.{name}.{problem}"
        else:
            yield from bad_excludes(params, name)


def bad_excludes(params: Params, model: str) -> Iterator[str]:
    """Names under `exclude` that a model's network does not have, and lists that leave no layer to compress."""
    from torch import nn

    from stages.networks.architectures import CLASSES
    from stages.networks.build import build_network, spec_of
    from stages.networks.modules import excluded_modules

    pruned = {key: entry.pruner for key, entry in params.pruned.items() if entry.model == model}
    quantizers = [variant.quantizer for variant in params.variants.values() if variant.pruned in pruned]
    methods = {f"pruners.{name}": params.pruners[name] for name in pruned.values()}
    excluding = {
        key: method
        for key, method in (methods | {f"quantizers.{name}": params.quantizers[name] for name in quantizers}).items()
        if isinstance(method, Excluding) and method.exclude
    }
    if not excluding:
        return
    network = build_network(spec_of(params.models[model], CLASSES, params.data.channels))
    layers = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    for key, method in excluding.items():
        try:
            excluded = excluded_modules(network, method.exclude)
        except UserError as error:
            yield f"{key}.{error} (model {model})"
        else:
            if layers <= excluded:
                yield f"{key}.exclude = {method.exclude}: leaves no layer to compress: shorten it (model {model})"


def _norms_of_one_value(params: Params, model: str) -> list[str]:
    from stages.networks.architectures import CLASSES
    from stages.networks.build import build_network, spec_of
    from stages.networks.modules import norms_of_one_value

    spec = spec_of(params.models[model], CLASSES, params.data.channels)
    return norms_of_one_value(build_network(spec), params.models[model].input_size)


def bad_weights(model: Model, path: Path, channels: int) -> str | None:
    """What is wrong with the weights of a model whose network is sound; weights of a hub are not downloaded."""
    from stages.artifacts.initial_weights import load_weights, statistics, unknown_tag
    from stages.networks.architectures import CLASSES
    from stages.networks.build import build_network, spec_of

    if problem := unknown_tag(model):
        return f"weights_tag = {model.weights_tag!r}: {problem}"
    if model.weights.startswith("hf:"):
        return None
    local = model.weights not in ("none", "pretrained")
    if local:
        model = model.model_copy(update={"weights": str(path.parent / model.weights)})
    try:
        statistics(model, ([0.5] * channels, [0.5] * channels))
        if local:
            spec = spec_of(model, CLASSES, channels)
            load_weights(build_network(spec), spec, model, [])
    except UserError as error:
        return str(error)
    return None


def plan(params: Params) -> str:
    """What `dvc repro` makes, for a person to read."""
    lines = [
        f"data      {params.data.name} from {params.data.source}, {params.data.image_size} px,"
        f" {params.data.geometry}, {'gray' if params.data.channels == 1 else 'RGB'}"
    ]
    for name, model in params.models.items():
        lines.append(
            f"model     {name}: {model.library} {model.architecture}, input {model.input_size} px,"
            f" weights {model.weights}, seed {model.seed_or(params.base.seed)},"
            f" {params.finetune.epochs if model.epochs is None else model.epochs} epochs"
        )
    for key, pruned in params.pruned.items():
        pruner = params.pruners[pruned.pruner]
        settings = ", ".join(f"{k} {v}" for k, v in pruner.model_dump(exclude={"method"}, exclude_unset=True).items())
        lines.append(f"pruned    {key}: {pruner.method}" + (f" ({settings})" if settings else ""))
    for key, variant in params.variants.items():
        lines.append(f"variant   {key}: {params.quantizers[variant.quantizer].method}")
    used = {variant.pruned for variant in params.variants.values()}
    lines += [f"remark    pruned.{key}: no variant uses it" for key in params.pruned if key not in used]
    location = params.data.location
    if location and "://" not in location and not Path(location).expanduser().exists():
        lines.append(f"remark    data.location: {location} does not exist (seen from {Path.cwd()})")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, default=paths.PARAMS, help="the params file (params.yaml)")


def run(arguments: argparse.Namespace) -> None:
    print(plan(check(arguments.file)))
