import argparse
import itertools
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from stages.common.errors import UserError
from stages.networks.weights import find_weights, load_match, read_tensors


def network(classes: int = 4, seed: int = 0) -> nn.Module:
    """A small network with batch norm, whose tensors depend on the seed."""
    torch.manual_seed(seed)
    made = timm.create_model("resnet10t", num_classes=classes)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    return made


def load(contents, classes=4, head_fits=True):
    """Load into a network of another seed; the network and the match."""
    target = network(classes, seed=1)
    match = find_weights(target, contents, "weights", classes, head_fits)
    load_match(target, match, "weights")
    return target, match


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


RAW, AVERAGED = network(seed=2), network(seed=3)
BARE = RAW.state_dict()


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in BARE.items()}


@pytest.mark.parametrize("wrapping", [(), ("state_dict",), ("model",), ("model_state_dict",), ("trainer", "net")])
def test_the_state_dict_is_found_wherever_a_file_has_it(wrapping):
    contents = {"optimizer": {"state": {0: {"step": torch.ones(1)}}}, "best": {"x": torch.ones(2)}} if wrapping else {}
    inner = BARE
    for name in reversed(wrapping):
        inner = {name: inner, "epoch": 3}
    loaded, match = load(contents | inner)
    assert same(loaded, RAW)
    assert match.entry == ".".join(wrapping)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_are_preferred_to_raw_ones(name):
    loaded, match = load({"state_dict": BARE, name: AVERAGED.state_dict()})
    assert same(loaded, AVERAGED)
    assert f"entry {name!r}" in str(match)


def test_two_entries_that_fit_are_refused():
    with pytest.raises(UserError, match=r"entries 'first' and 'second' both fit"):
        load({"first": BARE, "second": AVERAGED.state_dict()})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.backbone."])
def test_one_prefix_before_all_names_is_removed(prefix):
    loaded, match = load(
        {"state_dict": prefixed(prefix) | {"loss.weight": torch.ones(4), "n_averaged": torch.ones(())}}
    )
    assert same(loaded, RAW)
    assert match.prefix == prefix
    assert match.ignored == ["loss.weight", "n_averaged"]


def test_files_without_batch_norms_counters_are_loaded():
    counters = [name for name in BARE if name.endswith("num_batches_tracked")]
    assert counters
    loaded, _ = load({name: tensor for name, tensor in BARE.items() if name not in counters})
    assert same(loaded, RAW)


@pytest.mark.parametrize("case", ["another number of classes", "no head", "other classes of the same number"])
def test_a_head_that_does_not_fit_starts_at_zero(case):
    donor = network(classes=1000 if case == "another number of classes" else 4, seed=2).state_dict()
    if case == "no head":
        donor = {name: tensor for name, tensor in donor.items() if not name.startswith("fc.")}
    loaded, match = load(donor, head_fits=case != "other classes of the same number")
    assert match.fresh == ["fc.weight", "fc.bias"]
    assert not loaded.fc.weight.any()
    assert not loaded.fc.bias.any()
    assert torch.equal(loaded.layer1[0].conv1.weight, donor["layer1.0.conv1.weight"])


def test_weights_of_another_network_are_refused_with_the_tensors_that_differ():
    without = {name: tensor for name, tensor in BARE.items() if name != "layer1.0.conv1.weight"}
    with pytest.raises(
        UserError, match=r"1 of its \d+ tensors are missing \(layer1\.0\.conv1\.weight\), 0 are unknown"
    ):
        load(without)
    with pytest.raises(UserError, match=r"1 are unknown \(extra\)"):
        load(BARE | {"extra": torch.ones(1)})
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight has shape \(3,\), but the network needs"):
        load(BARE | {"layer1.0.conv1.weight": torch.ones(3)})
    with pytest.raises(UserError, match=r"fc\.weight has shape \(4, 7\)"):
        load(BARE | {"fc.weight": torch.ones(4, 7)})


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match=r"fc\.bias holds values that are not finite"):
        load(BARE | {"fc.bias": torch.tensor([1, 2, torch.nan, 4])})


def test_names_of_another_code_base_are_converted_as_timm_does():
    target = timm.create_model("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], num_classes=4)
    official = {}
    for name, tensor in target.state_dict().items():
        name = re.sub(r"^stem\.(\d)", r"downsample_layers.0.\1", name)
        name = re.sub(r"^stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        official[name.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = torch.randn_like(tensor)
    match = find_weights(target, {"model": official}, "weights", 4)
    assert match.converted
    assert torch.equal(match.tensors["stem.0.weight"], official["downsample_layers.0.0.weight"])


def test_filters_for_rgb_are_summed_for_gray_images():
    target = timm.create_model("resnet10t", num_classes=4, in_chans=1)
    match = find_weights(target, BARE, "weights", 4)
    torch.testing.assert_close(match.tensors["conv1.0.weight"], BARE["conv1.0.weight"].sum(1, keepdim=True))


def test_a_file_of_timms_training_script_is_read(tmp_path):
    options = argparse.Namespace(model="resnet10t", lr=0.1)
    saved = {
        "epoch": 3,
        "arch": "resnet10t",
        "state_dict": BARE,
        "args": options,
        "state_dict_ema": AVERAGED.state_dict(),
    }
    torch.save(saved, tmp_path / "last.pth.tar")
    assert same(load(read_tensors(tmp_path / "last.pth.tar"))[0], AVERAGED)


def test_a_safetensors_file_is_read(tmp_path):
    save_file(BARE, tmp_path / "weights.safetensors")
    assert same(load(read_tensors(tmp_path / "weights.safetensors"))[0], RAW)


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")
    broken = itertools.product(("broken.safetensors", "broken.pth"), (b"these are no tensors", b"\x80\x02", b""))
    for name, content in broken:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as tensors"):
            read_tensors(tmp_path / name)


def test_a_file_of_something_else_is_refused_and_never_unpickled(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="does not hold a state dict"):
        load(read_tensors(tmp_path / "tensor.pth"))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"it holds a torch\.nn\.modules\.linear\.Linear, .* torch\.save\("):
        read_tensors(tmp_path / "module.pth")
