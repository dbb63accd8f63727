import pytest
import timm
import torch
from torch import nn
from toy_training import BASE, Watched, interrupt_at, rows_of, weights

from stages.common.errors import UserError
from stages.params.finetune import Finetune, Pretrained
from stages.training.host import prepare_host
from stages.training.optimizers import Optimizers
from stages.training.pretrained import freeze, train_from_weights
from stages.training.trainer import TrainingData

HEAD = ["fc.weight", "fc.bias"]


@pytest.fixture
def network() -> nn.Module:
    """A network with batch norm whose head is zero, as `load_weights` leaves it."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=2, block_args=None, channels=(8, 8, 16, 16), stem_width=8)
    for parameter in network.fc.parameters():
        nn.init.zeros_(parameter)
    return network


@pytest.fixture
def train(parts, preprocess, recipe, tmp_path):
    def train(network: nn.Module, settings: dict, fresh=HEAD, part=None, folder="checkpoints", **changes):
        (checkpoints := tmp_path / folder).mkdir(exist_ok=True)
        changes = {"pretrained": Pretrained(**settings), "ema_decay": 0.0} | changes
        data = TrainingData(part or parts[0], parts[1], preprocess)
        return train_from_weights(
            network, data, recipe.model_copy(update=changes), prepare_host(BASE), fresh=fresh, seed=3,
            checkpoints=checkpoints, title="test",
        )  # fmt: skip

    return train


def changed(network: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_head_epochs_change_the_head_alone(network, train):
    before = copied(network)
    trained = train(network, {"head_epochs": 2, "body_factor": 0.0})
    assert [row["epoch"] for row in trained.curve] == [1, 2, 3]
    assert changed(trained.network, before) == set(HEAD)


def test_the_body_is_trained_after_the_head_and_without_a_fresh_head_at_once(network, train):
    before = copied(network)
    parameters = {name for name, _ in network.named_parameters()}
    assert changed(train(network, {"head_epochs": 2}).network, before) == parameters
    before = copied(network)
    first = train(network, {"head_epochs": 2}, fresh=[], folder="second")
    assert len(first.curve) == 3
    assert changed(first.network, before) == parameters


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_running_statistics_are_kept_or_updated(network, train, batch_norm):
    before = copied(network)
    buffers = {name for name, _ in network.named_buffers()}
    trained = train(network, {"head_epochs": 0, "batch_norm": batch_norm})
    assert changed(trained.network, before) & buffers == (buffers if batch_norm == "train" else set())


def test_frozen_tensors_do_not_change(network, train):
    before = copied(network)
    trained = train(network, {"head_epochs": 1, "freeze": ["layer1.*", "conv1.0.weight"]})
    assert not any(name.startswith("layer1.") or name == "conv1.0.weight" for name in changed(trained.network, before))
    assert "layer2.0.conv1.weight" in changed(trained.network, before)


def test_patterns_that_match_nothing_or_everything_are_refused(network):
    with pytest.raises(UserError, match=r"'layer9\.\*' matches no tensor; nearest: layer"):
        freeze(network, ["layer9.*"])
    with pytest.raises(UserError, match="matches all tensors"):
        freeze(network, ["*"])


@pytest.mark.parametrize("read", [2, 7])  # in the head's phase, and after it
def test_an_interrupted_training_resumes_bit_for_bit(network, train, parts, read):
    start = copied(network)
    settings = {"head_epochs": 1}
    whole = train(network, settings, folder="whole")
    expected, curve = weights(whole.network), rows_of(whole.curve)
    network.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        train(network, settings, part=Watched(parts[0], interrupt_at(read)))
    network.load_state_dict(start)
    resumed = train(network, settings)
    assert weights(resumed.network) == expected
    assert rows_of(resumed.curve) == curve


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_tensors_from_weights_have_the_body_factor(network, optimizer):
    recipe = Finetune(
        epochs=1, batch_size=8, optimizer=optimizer, learning_rate=0.5, pretrained=Pretrained(body_factor=0.1)
    )
    rates = {}
    optimizers = Optimizers(network, recipe, HEAD)
    flat = {id(matrix): parameter for parameter, matrix in optimizers._flat}
    for one in optimizers.all:
        for group in one.param_groups:
            rates |= {id(flat.get(id(p), p)): group["lr"] for p in group["params"]}
    peak = {"muon": recipe.muon_learning_rate}.get(optimizer, 0.5)
    assert rates[id(network.fc.weight)] == rates[id(network.fc.bias)] == 0.5
    assert rates[id(network.layer1[0].conv1.weight)] == pytest.approx(0.1 * peak)
    assert rates[id(network.layer1[0].bn1.weight)] == pytest.approx(0.05)
    assert len(rates) == len(list(network.parameters()))


def test_gradients_are_clipped_to_the_norm(network, train):
    before = copied(network)
    trained = train(
        network, {"head_epochs": 0, "body_factor": 1.0}, epochs=1, batch_size=96, optimizer="sgd", learning_rate=1.0,
        weight_decay=0.0, warmup_fraction=0.0, gradient_clip=1e-3,
    )  # fmt: skip
    moved = [
        (tensor.detach() - before[name]).double().square().sum() for name, tensor in trained.network.named_parameters()
    ]
    assert float(sum(moved).sqrt()) == pytest.approx(1.9e-3, rel=0.01)  # one step, with Nesterov momentum 0.9
