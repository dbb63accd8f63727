"""The pruners' course, each from the dense network to what it leaves; their steps are in the modules beside."""

import copy
from dataclasses import replace

import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import NetworkSpec, build_network
from stages.networks.reparameterize import fold_layer_scale
from stages.params.pruners import Continued, Depgraph, NonePruner, Oto, RandomStructured, SmallDense, Unstructured
from stages.pruning.costs import costs_of
from stages.pruning.depgraph import GroupLasso, find_ratio, lasso_steps, prune_depgraph
from stages.pruning.dhspg import Dhspg
from stages.pruning.groups import (
    ChannelGroup,
    by_group,
    cut_channels,
    relative_difference,
    with_layer_norm,
    zero_channels,
)
from stages.pruning.hesso import Hesso
from stages.pruning.only_train_once_adapter import exact_groups
from stages.pruning.session import Pruned, Session
from stages.pruning.targets import choose_channels
from stages.pruning.unstructured import KeepZeros, left_dense, sparsity_of
from stages.training.trainer import Trained

CUT_TOLERANCE = 1e-3
"""Largest difference between zeroed network and subnet, relative to the logits' scale."""
COMPARED_IMAGES = 64


def prune(session: Session) -> Pruned:
    """Prune the session's dense network as its pruner says.

    Raises:
        UserError: if the network cannot be pruned exactly or the target cannot be met.
    """
    match session.pruner:
        case NonePruner():
            metrics = {"validation_top1": session.parent.metrics["validation_top1"]}
            return Pruned(session.dense, session.parent.network, metrics)
        case Continued():
            trained = session.train(session.folded)
            return Pruned(trained.network, session.folded_spec, _metrics(trained), trained.curve)
        case Unstructured():
            return prune_unstructured(session)
        case Oto():
            return prune_oto(session)
        case RandomStructured():
            return prune_at_random(session)
        case SmallDense():
            return train_small_dense(session)
        case Depgraph():
            return prune_by_depgraph(session)


def prune_unstructured(session: Session) -> Pruned:
    """Zero single weights, at once or while training, and train while they stay zero."""
    network, pruner = session.folded, session.pruner
    keep = KeepZeros(network, pruner, session.steps, session.seed, session.param)
    trained = session.train(network, keep)
    keep.project(trained.network)  # the same zeros, all of one sign: gzip sees that
    metrics = _metrics(trained) | {"sparsity": sparsity_of(trained.network)}
    if pruner.pattern == "2:4":
        unfit = left_dense(network)
        metrics["layers_unpruned"] = len(unfit)
        print(f"{session.key}: dense, since 4 does not divide their inputs: {', '.join(unfit) or 'no layer'}")
    return Pruned(trained.network, session.folded_spec, metrics, trained.curve)


def prune_oto(session: Session) -> Pruned:
    """Drive channel groups to zero while training, cut them out, make sure that nothing changed, and train on."""
    network, pruner = session.folded, session.pruner
    groups, told = groups_of(session)
    settings = network, groups, costs_of(network, groups, session.input_size), pruner, session.steps, session.param
    optimizer = Hesso(*settings) if pruner.optimizer == "hesso" else Dhspg(*settings, session.learning_rate)
    phase = session.epochs_until(optimizer.schedule.end) or session.recipe.epochs  # 0 where nothing is to go
    if optimizer.schedule.end:
        _require_recovery(session, phase)
    keep = "last" if phase < session.recipe.epochs else "best"  # the last, where training goes on
    trained = session.train(network, optimizer, epochs=(0, phase), keep=keep, phase="pruning")
    pruned = optimizer.pruned_channels()
    subnet, spec, difference = _cut(session, trained.network, groups, pruned)
    metrics = _around_the_cut(session, trained.network, subnet, difference) | _channels(groups, pruned) | told
    if isinstance(optimizer, Dhspg):
        metrics |= _projected(session, optimizer)
    return recover(session, subnet, spec, trained, metrics)


def _projected(session: Session, optimizer: Dhspg) -> dict[str, float]:
    """How many channels DHSPG's own projection took; told aloud where the forgetting did most of its work."""
    projected, redundant = optimizer.channels_projected, int(optimizer.redundant.sum())
    if projected < redundant / 2:
        print(
            f"{session.key}: DHSPG's projection took {projected} of {redundant} redundant channels, the others were"
            f" shrunk to zero at the end of its phase: raise {session.param}.penalty ({session.pruner.penalty:g})"
        )
    return {"channels_projected": projected}


def prune_at_random(session: Session) -> Pruned:
    """Remove channels at random at once, then train what is left for the whole budget."""
    network = session.folded
    groups, told = groups_of(session)
    scores = torch.rand(sum(group.channels for group in groups), generator=torch.Generator().manual_seed(session.seed))
    pruned = _choose(session, network, groups, scores)
    zeroed = copy.deepcopy(network)
    zero_channels(zeroed, groups, pruned)
    subnet, spec, difference = _cut(session, zeroed, groups, pruned)
    metrics = _around_the_cut(session, network, subnet, difference) | _channels(groups, pruned) | told
    return recover(session, subnet, spec, None, metrics)


def train_small_dense(session: Session) -> Pruned:
    """Make every layer narrower by the same share, with fresh weights, and train for dense's steps and the budget's.

    Its recipe is finetune's over all those epochs: what a person would do who never heard of pruning.
    """
    groups, told = groups_of(session)
    uniform = torch.cat([torch.arange(group.channels) / group.channels for group in groups])
    pruned = _choose(session, session.folded, groups, uniform)
    torch.manual_seed(session.seed)
    fresh = build_network(session.parent.network)  # the library's own initialisation, which does not know of widths
    fold_layer_scale(fresh)
    spec = replace(session.folded_spec, layer_norm=session.pruner.layer_norm)
    network, spec = cut_channels(fresh, spec, groups, pruned)
    finetune = session.params.finetune
    recipe = finetune.model_copy(update={"epochs": finetune.epochs + session.pruner.epochs})
    trained = session.train(network, recipe=recipe)
    return Pruned(trained.network, spec, _metrics(trained) | _channels(groups, pruned) | told, trained.curve)


def prune_by_depgraph(session: Session) -> Pruned:
    """Torch-Pruning's pruner: at once, or after training with its group lasso; then recovery."""
    network, pruner, trained = session.folded, session.pruner, None
    settings = session.folded_spec, pruner, session.input_size, session.param
    first, last = lasso_steps(pruner, session.steps, session.param) if pruner.importance == "group_lasso" else (0, 0)
    phase = session.epochs_until(last)
    _require_recovery(session, phase)
    ratio = find_ratio(network, *settings)
    if phase and ratio:
        lasso = GroupLasso(network, pruner, session.input_size, first, last)
        trained = session.train(network, lasso, epochs=(0, phase), keep="last", phase="pruning")
        network = trained.network
    subnet, spec, channels = prune_depgraph(network, *settings, ratio)
    metrics = _around_the_cut(session, network, subnet, _difference(session, network, subnet)) | channels
    return recover(session, subnet, spec, trained, metrics)


def recover(
    session: Session, subnet: nn.Module, spec: NetworkSpec, before: Trained | None, metrics: dict[str, float]
) -> Pruned:
    """Train the smaller network through the epochs that are left of the budget.

    The learning rate goes on where the schedule stands; the optimizer's moments and the weight average begin afresh.
    """
    done = len(before.curve) if before else 0
    if done == session.recipe.epochs:
        metrics |= {"validation_top1": session.validation_top1(subnet), "epoch": done}
        return Pruned(subnet, spec, metrics, before.curve)
    trained = session.train(subnet, epochs=(done, session.recipe.epochs), phase="recovery")
    curve = (before.curve if before else []) + trained.curve
    return Pruned(trained.network, spec, metrics | _metrics(trained), curve)


def groups_of(session: Session) -> tuple[list[ChannelGroup], dict[str, float]]:
    """The channel groups of the folded network, proven to be removable exactly, and how many were left whole.

    Raises:
        UserError: with the pruner's key and method, if there are none.
    """
    partial = session.pruner.allow_partial
    try:
        groups, whole = exact_groups(session.folded, session.folded_spec, session.input_size, partial)
    except UserError as error:
        raise UserError(f"{session.param} (method {session.pruner.method}): {error}") from error
    if whole:
        print(f"{session.key}: left whole, since they cannot be cut exactly: {', '.join(whole)}")
    return groups, {"groups_left_whole": len(whole)}


def _choose(session: Session, network: nn.Module, groups: list[ChannelGroup], scores: torch.Tensor) -> dict:
    costs = costs_of(network, groups, session.input_size)
    chosen = choose_channels(scores, groups, costs, session.pruner, key=session.param)
    return by_group(groups, chosen)


def _require_recovery(session: Session, phase: int) -> None:
    """Raise a `UserError` where the cut changes the output and no epoch would be left to mend it."""
    if session.pruner.inexact and phase >= session.recipe.epochs:
        raise UserError(
            f"{session.param}.end_fraction = {session.pruner.end_fraction}: pruning takes all {session.recipe.epochs}"
            f" epochs, but {session.pruner.inexact} changes the output when channels are cut, which needs at least one"
            " to recover: lower it or raise epochs"
        )


def _cut(
    session: Session, zeroed: nn.Module, groups: list[ChannelGroup], pruned: dict[str, torch.Tensor]
) -> tuple[nn.Module, NetworkSpec, float]:
    """Remove channels that are zero, prove that nothing changed, and then give LayerNorms the form that is asked for.

    Returns:
        The smaller network, what builds it, and the change of its logits from the zeroed network's (`_difference`).

    Raises:
        UserError: if an exact form gives another output than the zeroed network.
    """
    subnet, spec = cut_channels(zeroed, session.folded_spec, groups, pruned)
    difference = _difference(session, zeroed, subnet)
    _require_equal(session, spec.layer_norm, difference)
    if session.pruner.layer_norm != spec.layer_norm:
        subnet, spec = with_layer_norm(subnet, spec, session.pruner.layer_norm)
        difference = _difference(session, zeroed, subnet)
        if spec.layer_norm != "plain":
            _require_equal(session, spec.layer_norm, difference)
    return subnet, spec, difference


def _require_equal(session: Session, layer_norm: str, difference: float) -> None:
    if not difference <= CUT_TOLERANCE:
        raise UserError(
            f"{session.key}: after cutting (layer_norm: {layer_norm}), the logits differ by {difference:.2g} of their"
            f" scale from the zeroed network's (allowed: {CUT_TOLERANCE:g}): not saved; please report this network"
        )


def _around_the_cut(session: Session, uncut: nn.Module, subnet: nn.Module, difference: float) -> dict[str, float]:
    """What the report tells of the jump: validation top-1 on both sides, and the change of the logits.

    Args:
        uncut: the network as it stood: zeroed by training for `oto`, whole for the others.
        difference: from the zeroed network to the cut one, or from the whole one where nothing is ever zeroed.
    """
    return {
        "validation_top1_uncut": session.validation_top1(uncut),
        "validation_top1_cut": session.validation_top1(subnet),
        "cut_difference": difference,
    }


def _difference(session: Session, one: nn.Module, other: nn.Module) -> float:
    """Largest change of a logit, relative to their scale, on validation images and on random inputs."""
    preprocess = session.parent.preprocess()
    size = preprocess.input_size
    images = preprocess(torch.from_numpy(session.validation_part.spread(COMPARED_IMAGES)))
    random = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    return max(relative_difference(one, other, x) for x in (images, random))


def _channels(groups: list[ChannelGroup], pruned: dict[str, torch.Tensor]) -> dict[str, float]:
    total, gone = sum(group.channels for group in groups), sum(int(channels.sum()) for channels in pruned.values())
    return {"channels_dense": total, "channels": total - gone, "group_sparsity": gone / total}


def _metrics(trained: Trained) -> dict[str, float]:
    return {"validation_top1": trained.validation_top1, "epoch": trained.epoch}
