import itertools

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import build_network, load_weights, spec_of
from stages.networks.reparameterize import PointwiseLinear
from stages.networks.spec import NetworkSpec
from stages.params.models import Model

ARGUMENTS = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
ATTO = NetworkSpec("timm", "convnext_atto", ARGUMENTS, 4)


def test_timm_and_torchvision_classifiers_are_built_by_name():
    for spec in (ATTO, NetworkSpec("torchvision", "squeezenet1_1", {}, 7)):
        network = build_network(spec).eval()
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, spec.classes)


def test_timms_own_linear_layers_are_torchs():
    assert type(build_network(NetworkSpec("timm", "mobilenetv3_small_050", {}, 3)).classifier) is nn.Linear


def test_a_torchvision_convnext_of_any_size_is_built_from_numbers():
    setting = [[8, 16, 1], [16, None, 2]]
    spec = NetworkSpec("torchvision", "convnext_tiny", {"block_setting": setting, "layer_scale": 1.0}, 3)
    network = build_network(spec).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == [8, 8, 16, 16, 16]
    assert spec.arguments["block_setting"] == setting


def test_the_spec_of_a_model_is_its_entry_in_the_params():
    model = Model(library="timm", architecture="convnext_atto", arguments=ARGUMENTS, input_size=32)
    assert spec_of(model, 4) == ATTO


@pytest.mark.parametrize(
    ("library", "architecture", "arguments", "message"),
    [
        ("timm", "convnext_atto", {"dephts": [1, 1, 1, 1]}, "timm convnext_atto does not take arguments"),
        ("torchvision", "squeezenet1_1", {"width": 3}, "torchvision squeezenet1_1 does not take arguments"),
        ("timm", "convnext_atto", {"num_classes": 10}, "num_classes is set from the images' classes"),
        *(
            ("timm", "convnext_atto", {"drop_path_rate": rate}, "drop_path_rate = .*: must be")
            for rate in (5, -0.1, "x")
        ),
        ("timm", "convnext_tinny", {}, "'convnext_tinny': timm has no such classifier; nearest: .*convnext_tiny"),
        ("torchvision", "convnext_tinny", {}, "'convnext_tinny': torchvision has no .* nearest: .*convnext_tiny"),
    ],
)
def test_unknown_architectures_and_wrong_arguments_are_refused(library, architecture, arguments, message):
    with pytest.raises(UserError, match=message):
        build_network(NetworkSpec(library, architecture, arguments, 4))


@torch.no_grad()
def test_folded_layer_scale_and_linear_pointwise_layers_follow_the_spec():
    spec = NetworkSpec("timm", "convnext_atto", ARGUMENTS, 4, layer_scale_folded=True, pointwise_as_linear=True)
    network = build_network(spec)
    assert not any(name.endswith("gamma") for name, _ in network.named_parameters())
    assert sum(isinstance(module, PointwiseLinear) for module in network.modules()) == 8


def saved(tmp_path, classes=4, change=None):
    torch.manual_seed(1)
    state = build_network(NetworkSpec("timm", "convnext_atto", ARGUMENTS, classes)).state_dict()
    if change:
        change(state)
    save_file(state, tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors"), state


def test_weights_of_a_file_are_loaded(tmp_path):
    path, state = saved(tmp_path)
    network = build_network(ATTO)
    assert load_weights(network, ATTO, path) == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_a_pth_state_dict_is_loaded_bare_or_wrapped(tmp_path, wrapping):
    state = build_network(ATTO).state_dict()
    torch.save({wrapping: state} if wrapping else state, tmp_path / "weights.pth")
    network = build_network(ATTO)
    assert load_weights(network, ATTO, str(tmp_path / "weights.pth")) == []
    assert torch.equal(network.stem[0].weight, state["stem.0.weight"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_networks_are_removed(tmp_path, prefix):
    path, state = saved(tmp_path, change=lambda state: [state.update({prefix + k: state.pop(k)}) for k in list(state)])
    network = build_network(ATTO)
    assert load_weights(network, ATTO, path) == []
    assert torch.equal(network.stem[0].weight, state[f"{prefix}stem.0.weight"])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path, _ = saved(tmp_path, change=lambda state: state["stem.0.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match=r"stem\.0\.weight .* not finite"):
        load_weights(build_network(ATTO), ATTO, path)


def test_a_head_of_another_number_of_classes_keeps_its_fresh_weights(tmp_path):
    path, state = saved(tmp_path, classes=1000)
    network = build_network(ATTO)
    fresh = network.head.fc.weight.detach().clone()
    assert sorted(load_weights(network, ATTO, path)) == ["head.fc.bias", "head.fc.weight"]
    assert torch.equal(network.head.fc.weight, fresh)
    assert torch.equal(network.stem[0].weight, state["stem.0.weight"])


def test_weights_of_another_network_are_refused(tmp_path):
    path, _ = saved(tmp_path, change=lambda state: state.pop("stem.0.weight"))
    with pytest.raises(UserError, match=r"1 tensors missing \(stem\.0\.weight\)"):
        load_weights(build_network(ATTO), ATTO, path)
    path, _ = saved(tmp_path, change=lambda state: state.update({"stem.0.weight": torch.zeros(8, 3, 2, 2)}))
    with pytest.raises(UserError, match=r"stem\.0\.weight has shape \(8, 3, 2, 2\), .* \(8, 3, 4, 4\)"):
        load_weights(build_network(ATTO), ATTO, path)


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_weights(build_network(ATTO), ATTO, str(tmp_path / "none.safetensors"))
    broken = itertools.product(("broken.safetensors", "broken.pth"), (b"these are no tensors", b"\x80\x02", b""))
    for name, content in broken:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as tensors"):
            load_weights(build_network(ATTO), ATTO, str(tmp_path / name))


def test_a_file_of_something_else_is_refused_and_never_unpickled(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="do not hold a state dict"):
        load_weights(build_network(ATTO), ATTO, str(tmp_path / "tensor.pth"))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"cannot be read as tensors: .* torch\.save\(model\.state_dict\(\)"):
        load_weights(build_network(ATTO), ATTO, str(tmp_path / "module.pth"))


def test_pretrained_weights_without_network_say_how_to_go_on(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route to the hub\nmore lines")

    network = build_network(ATTO)
    monkeypatch.setattr(timm.models, "model_entrypoint", offline)
    with pytest.raises(UserError, match=r"\(no route to the hub\): without network, download"):
        load_weights(network, ATTO, "pretrained")
