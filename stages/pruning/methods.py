"""The pruning methods: each turns the dense network of a session into the network that the prune stage saves."""

import copy
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.modules import excluded_modules
from stages.networks.predict import VALIDATION, Accuracy
from stages.networks.reparameterize import fold_layer_scale
from stages.networks.spec import NetworkSpec
from stages.params.pruners import (
    Continued,
    Depgraph,
    NonePruner,
    Oto,
    RandomStructured,
    SmallDense,
    Structured,
    Unstructured,
)
from stages.pruning.costs import costs_of
from stages.pruning.depgraph import GroupLasso, TorchPruning
from stages.pruning.dhspg import Dhspg
from stages.pruning.groups import (
    ChannelGroup,
    by_group,
    cut_channels,
    relative_difference,
    zero_channels,
)
from stages.pruning.hesso import Hesso
from stages.pruning.only_train_once_adapter import exact_groups
from stages.pruning.steering import pruning_schedule
from stages.pruning.targets import choose_channels
from stages.pruning.unstructured import KeepZeros, left_dense, sparsity_of
from stages.training.session import Session
from stages.training.trainer import Trained

CUT_TOLERANCE = 1e-3
"""Largest difference between zeroed network and subnet, relative to the logits' scale."""
COMPARED_IMAGES = 64


@dataclass
class Pruned:
    """The result of a pruning method."""

    network: nn.Module
    spec: NetworkSpec
    metrics: dict[str, float]
    """Figures on validation images, and counts of what was removed."""
    curve: list[dict[str, float]] = field(default_factory=list)
    accuracy: Accuracy | None = None
    """On validation images; None for the parent's network."""


def prune(session: Session) -> Pruned:
    """Prune the session's dense network as its settings say.

    Every method that trains starts from the network with its layer scale folded. The control does too: otherwise it
    would have other parameters.

    Raises:
        UserError: If the network cannot be pruned exactly or the target cannot be met.
    """
    if isinstance(session.settings, NonePruner):
        metrics = {figure: session.parent.metrics[figure] for figure in VALIDATION}
        return Pruned(session.network, session.parent.network, metrics)
    network = copy.deepcopy(session.network)
    fold_layer_scale(network)
    spec = replace(session.parent.network, layer_scale_folded=True)
    match session.settings:
        case Continued():
            trained = session.train(network)
            return _trained(trained, spec, {})
        case Unstructured() as pruner:
            return prune_unstructured(session, pruner, network, spec)
        case Oto() as pruner:
            return prune_oto(session, pruner, network, spec)
        case RandomStructured() as pruner:
            return prune_at_random(session, pruner, network, spec)
        case SmallDense() as pruner:
            return train_small_dense(session, pruner, network, spec)
        case Depgraph() as pruner:
            return prune_by_depgraph(session, pruner, network, spec)
    raise TypeError(f"{session.param} is not a pruner")


def prune_unstructured(session: Session, pruner: Unstructured, network: nn.Module, spec: NetworkSpec) -> Pruned:
    """Zero single weights, at once or during training, and train while they stay zero."""
    keep = KeepZeros(network, pruner, session.steps, session.seed, session.param)
    trained = session.train(network, keep)
    keep.project(trained.network)  # makes all zeros positive, so that gzip sees equal bytes
    metrics: dict[str, float] = {"sparsity": sparsity_of(trained.network)}
    if pruner.pattern == "2:4":
        unfit = left_dense(network)
        metrics["layers_unpruned"] = len(unfit)
        print(f"{session.key}: dense, since 4 does not divide their inputs: {', '.join(unfit) or 'no layer'}")
    return _trained(trained, spec, metrics)


def prune_oto(session: Session, pruner: Oto, network: nn.Module, spec: NetworkSpec) -> Pruned:
    """Drive channels to zero during training, cut them out, check that the output is the same, and train on."""
    groups, whole = groups_of(session, pruner, network, spec)
    settings = network, groups, costs_of(network, groups, session.input_size), pruner, session.steps, session.param
    optimizer = Hesso(*settings) if pruner.optimizer == "hesso" else Dhspg(*settings, session.learning_rate)
    phase = session.epochs_until(optimizer.schedule.end) or session.recipe.epochs  # 0 where no channel is to go
    if optimizer.schedule.end:
        _require_recovery(session, pruner, phase)
    keep: Literal["best", "last"] = "last" if phase < session.recipe.epochs else "best"  # recovery needs the last
    trained = session.train(network, optimizer, epochs=(0, phase), keep=keep, phase="pruning")
    pruned = optimizer.pruned_channels()
    subnet, spec, difference = _cut(session, pruner, trained.network, spec, groups, pruned)
    metrics = _around_the_cut(session, trained.network, subnet, difference) | _channels(groups, pruned) | whole
    if isinstance(optimizer, Dhspg):
        projected, redundant = optimizer.channels_projected, int(optimizer.redundant.sum())
        metrics["channels_projected"] = projected
        if projected < redundant / 2:
            print(
                f"{session.key}: DHSPG's projection took {projected} of {redundant} redundant channels; forgetting"
                f" shrank the others to zero at the end: raise {session.param}.penalty ({pruner.penalty:g})"
            )
    return recover(session, subnet, spec, trained, metrics)


def prune_at_random(session: Session, pruner: RandomStructured, network: nn.Module, spec: NetworkSpec) -> Pruned:
    """Remove channels at random at once, then train the rest for the whole budget."""
    groups, whole = groups_of(session, pruner, network, spec)
    scores = torch.rand(sum(group.channels for group in groups), generator=torch.Generator().manual_seed(session.seed))
    pruned = _choose(session, pruner, network, groups, scores)
    zeroed = copy.deepcopy(network)
    zero_channels(zeroed, groups, pruned)
    subnet, spec, difference = _cut(session, pruner, zeroed, spec, groups, pruned)
    metrics = _around_the_cut(session, network, subnet, difference) | _channels(groups, pruned) | whole
    return recover(session, subnet, spec, None, metrics)


def train_small_dense(session: Session, pruner: SmallDense, network: nn.Module, spec: NetworkSpec) -> Pruned:
    """Make every layer narrower by the same fraction, with fresh weights, and train it as if it had never been wider.

    The recipe is that of `finetune`, over the epochs of the dense network and the pruner's together.
    """
    groups, whole = groups_of(session, pruner, network, spec)
    uniform = torch.cat([torch.arange(group.channels) / group.channels for group in groups])
    pruned = _choose(session, pruner, network, groups, uniform)
    torch.manual_seed(session.seed)
    fresh = build_network(session.parent.network)  # the library initializes the full widths
    fold_layer_scale(fresh)
    narrow, spec = cut_channels(fresh, replace(spec, layer_norm=pruner.layer_norm), groups, pruned)
    dense_epochs = session.parent.parameters["finetune"]["epochs"]
    recipe = session.finetune.model_copy(update={"epochs": dense_epochs + pruner.epochs})
    trained = session.train(narrow, recipe=recipe)
    return _trained(trained, spec, _channels(groups, pruned) | whole)


def prune_by_depgraph(session: Session, pruner: Depgraph, network: nn.Module, spec: NetworkSpec) -> Pruned:
    """Prune with Torch-Pruning, at once or after training with its group lasso, then recover."""
    library, trained = TorchPruning(spec, pruner, session.input_size, session.param), None
    regularized = pruner.importance == "group_lasso"
    lasso = pruning_schedule(pruner, session.steps, session.param) if regularized else None
    phase = session.epochs_until(lasso.end) if lasso else 0
    _require_recovery(session, pruner, phase)
    excluded_of(session, pruner, network)
    ratio = library.find_ratio(network)
    if lasso and ratio:
        constraint = GroupLasso(network, pruner, session.input_size, lasso)
        trained = session.train(network, constraint, epochs=(0, phase), keep="last", phase="pruning")
        network = trained.network
    subnet, spec, channels = library.prune(network, ratio)
    metrics = _around_the_cut(session, network, subnet, _difference(session, network, subnet)) | channels
    return recover(session, subnet, spec, trained, metrics)


def recover(
    session: Session, subnet: nn.Module, spec: NetworkSpec, before: Trained | None, metrics: dict[str, float]
) -> Pruned:
    """Train the smaller network for the epochs that are left of the budget.

    The learning rate continues its schedule; the optimizer's moments and the weight average start afresh.
    """
    done = len(before.curve) if before else 0
    if before and done == session.recipe.epochs:
        return _trained(Trained(subnet, before.curve, session.accuracy(subnet), done), spec, metrics)
    trained = session.train(subnet, epochs=(done, session.recipe.epochs), phase="recovery")
    trained.curve = (before.curve if before else []) + trained.curve
    return _trained(trained, spec, metrics)


def groups_of(
    session: Session, pruner: Oto | RandomStructured | SmallDense, network: nn.Module, spec: NetworkSpec
) -> tuple[list[ChannelGroup], dict[str, float]]:
    """The channel groups that can provably be cut exactly, and how many groups are left whole.

    Raises:
        UserError: With the pruner's key and method, if there are none.
    """
    excluded = excluded_of(session, pruner, network)
    try:
        groups, whole = exact_groups(network, spec, session.input_size, pruner.allow_partial, excluded)
    except UserError as error:
        raise UserError(f"{session.param} (method {pruner.method}): {error}") from error
    if whole:
        print(f"{session.key}: left whole, since they cannot be cut exactly: {', '.join(whole)}")
    return groups, {"groups_left_whole": len(whole)}


def excluded_of(session: Session, pruner: Structured, network: nn.Module) -> set[str]:
    """Names of the modules whose output channels stay.

    Raises:
        UserError: With the pruner's key, if a pattern names nothing.
    """
    try:
        return excluded_modules(network, pruner.exclude)
    except UserError as error:
        raise UserError(f"{session.param}.{error}") from None


def _choose(
    session: Session, pruner: Structured, network: nn.Module, groups: list[ChannelGroup], scores: torch.Tensor
) -> dict[str, torch.Tensor]:
    costs = costs_of(network, groups, session.input_size)
    return by_group(groups, choose_channels(scores, groups, costs, pruner, key=session.param))


def _require_recovery(session: Session, pruner: Oto | Depgraph, phase: int) -> None:
    """Raise a `UserError` if the cut changes the output and no epoch is left to recover."""
    if pruner.inexact and phase >= session.recipe.epochs:
        raise UserError(
            f"{session.param}.end_fraction = {pruner.end_fraction}: pruning takes all {session.recipe.epochs} epochs,"
            f" but {pruner.inexact} changes the output when channels are cut, which needs at least one to recover:"
            " lower it or raise epochs"
        )


def _cut(
    session: Session,
    pruner: Structured,
    zeroed: nn.Module,
    spec: NetworkSpec,
    groups: list[ChannelGroup],
    pruned: dict[str, torch.Tensor],
) -> tuple[nn.Module, NetworkSpec, float]:
    """Remove channels that are zero, check that the output is the same, and then set the form of the LayerNorms.

    Returns:
        The smaller network, the spec that builds it, and its difference from the zeroed network (`_difference`).

    Raises:
        UserError: If the cut changes the output.
    """
    subnet, narrower = cut_channels(zeroed, spec, groups, pruned)
    difference = _difference(session, zeroed, subnet)
    if not difference <= CUT_TOLERANCE:
        raise UserError(
            f"{session.key}: after cutting, the logits differ by {difference:.2g} of their scale from the zeroed"
            f" network's (allowed: {CUT_TOLERANCE:g}): not saved; please report this network"
        )
    if pruner.layer_norm != spec.layer_norm:
        subnet, narrower = cut_channels(zeroed, replace(spec, layer_norm=pruner.layer_norm), groups, pruned)
        difference = _difference(session, zeroed, subnet)
    return subnet, narrower, difference


def _around_the_cut(session: Session, uncut: nn.Module, subnet: nn.Module, difference: float) -> dict[str, float]:
    """Metrics of the cut: validation top-1 before and after it, and the difference of the logits.

    Args:
        uncut: The network before the cut: zeroed by training for `oto`, whole for the others.
        difference: Of the cut network from the zeroed one, or from the whole one where no channel is ever zeroed.
    """
    return {
        "validation_top1_uncut": session.accuracy(uncut).top1,
        "validation_top1_cut": session.accuracy(subnet).top1,
        "cut_difference": difference,
    }


def _difference(session: Session, one: nn.Module, other: nn.Module) -> float:
    """Largest difference of a logit, relative to their scale, on validation images and on random inputs."""
    preprocess, size = session.parent.preprocess(), session.input_size
    images = preprocess(torch.from_numpy(session.validation_part.spread(COMPARED_IMAGES)))
    random = torch.randn(4, session.parent.network.channels, size, size, generator=torch.Generator().manual_seed(0))
    return max(relative_difference(one, other, x) for x in (images, random))


def _channels(groups: list[ChannelGroup], pruned: dict[str, torch.Tensor]) -> dict[str, float]:
    total, gone = sum(group.channels for group in groups), sum(int(channels.sum()) for channels in pruned.values())
    return {"channels_dense": total, "channels": total - gone, "group_sparsity": gone / total}


def _trained(trained: Trained, spec: NetworkSpec, metrics: dict[str, float]) -> Pruned:
    metrics = metrics | trained.accuracy.metrics | {"epoch": trained.epoch}
    return Pruned(trained.network, spec, metrics, trained.curve, trained.accuracy)
