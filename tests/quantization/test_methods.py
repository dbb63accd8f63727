"""Every quantizer on a dense ConvNeXt and on one that is cut and sparse: what is stored, counted and exported."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from toy_project import PARAMS, pruned_project
from toys import part_of, session_of

from stages import quantize
from stages.artifacts.artifact import load_artifact, load_classifier, save_artifact
from stages.artifacts.description import LayerStorage, read_description
from stages.common import paths
from stages.common.errors import UserError
from stages.datasets.store import Part
from stages.export.session import int8_overflows, open_session, session_logits
from stages.networks.build import build_network
from stages.networks.integer_weights import Grid, integer_layers
from stages.networks.reparameterize import fold_layer_scale
from stages.networks.spec import NetworkSpec
from stages.params.quantizers import Int8Dynamic, Int8Static, SearchedBits, UniformBits
from stages.profiling.counts import count_layers, params_visible, totals
from stages.pruning.groups import cut_channels, zero_channels
from stages.pruning.only_train_once_adapter import exact_groups
from stages.quantization import methods as quantizers
from stages.quantization.calibration import calibration_images, hessians
from stages.quantization.rounding import inverse_factor, round_gptq

SEARCH = {"average_bits": 4.0, "evaluations": 40, "calibration_images": 4}
QUANTIZERS = {
    "fp32": {"method": "fp32"},
    "int8": {"method": "int8_dynamic"},
    "static": {"method": "int8_static", "calibration_images": 4},
    "static_7": {"method": "int8_static", "calibration_images": 4, "weight_bits": 7},
    "uniform_2": {"method": "uniform_bits", "bits": 2},
    "uniform_3": {"method": "uniform_bits", "bits": 3, "rounding": "gptq", "calibration_images": 4},
    "uniform_8": {"method": "uniform_bits", "bits": 8},
    "recovered": {"method": "uniform_bits", "bits": 3, "epochs": 1},
    "random": SEARCH | {"method": "searched_bits", "search": "random"},
    "greedy": SEARCH | {"method": "searched_bits", "search": "greedy"},
    "ilp": SEARCH | {"method": "searched_bits", "search": "ilp"},
    "learned": SEARCH | {"method": "learned_bits", "epochs": 1},
}
DENSE = ("random", "greedy")
VARIANTS = [f"toy-{'none' if quantizer in DENSE else 'cut'}-{quantizer}" for quantizer in QUANTIZERS]
ENTRIES = {name: {"pruned": name.rpartition("-")[0], "quantizer": name.rpartition("-")[2]} for name in VARIANTS}
SECTIONS = quantize.Params(base=PARAMS["base"], finetune=PARAMS["finetune"], variants=ENTRIES, quantizers=QUANTIZERS)


def compress(variant: str, params: quantize.Params = SECTIONS) -> quantizers.Quantized:
    parent, folder = paths.pruned(ENTRIES[variant]["pruned"]), paths.compressed(variant)
    return quantize.compress(params, variant, parent, folder, paths.IMAGES, 1)[0]


def make_cut_parent() -> None:
    """Make a network with a third of its channels cut and half of its weights zero."""
    network, description = load_artifact(paths.pruned("toy-none"))
    fold_layer_scale(network)
    spec = replace(description.network, layer_scale_folded=True)
    groups, _ = exact_groups(network, spec, 32, False)
    pruned = {group.name: torch.arange(group.channels) % 3 == 0 for group in groups}
    zero_channels(network, groups, pruned)
    network, spec = cut_channels(network, spec, groups, pruned)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand(parameter.shape, generator=generator) > 0.5
    save_artifact(paths.pruned("toy-cut"), network, replace(description, name="toy-cut", network=spec))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """All variants, quantized once, without the test part, which no quantizer may read."""
    folder = pruned_project(tmp_path_factory.mktemp("bits"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_cut_parent()
        for path in paths.IMAGES.glob("test_*"):
            path.unlink()
        for variant in VARIANTS:
            curve = compress(variant).curve
            assert len(curve) == QUANTIZERS[ENTRIES[variant]["quantizer"]].get("epochs", 0)
        yield folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_agrees_with_pytorch(project, variant):
    classifier, description = load_classifier(paths.compressed(variant))
    integers = description.onnx["quantized_operators"] > 0
    if integers and int8_overflows() and not variant.endswith("static_7"):
        pytest.skip("products of 8 bits overflow here")
    images = np.random.default_rng(1).integers(0, 256, (40, 24, 24, 3), dtype=np.uint8)
    session = open_session(paths.compressed(variant) / "model.onnx", 1)
    batch = 1 if description.spans_batch() else 20
    logits = session_logits(session, images, batch)
    with torch.no_grad():
        expected = torch.cat([classifier(x) for x in torch.from_numpy(images).split(batch)]).numpy()
    assert np.abs(logits - expected).max() < (0.2 if integers else 1e-3) * expected.std()


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantization_changes_neither_parameters_nor_macs(project, variant):
    network, description = load_artifact(paths.compressed(variant))
    parent, _ = load_artifact(paths.pruned(ENTRIES[variant]["pruned"]))
    counts, before = totals(count_layers(network, 32, description.layers)), totals(count_layers(parent, 32, {}))
    assert (counts["params"], counts["macs"]) == (before["params"], before["macs"])
    assert counts["params_nonzero"] <= before["params_nonzero"]
    if not description.spans_batch():  # PyTorch's own dynamic layers hide theirs
        assert params_visible(network) == counts["params"]


def expected_bytes(network: nn.Module, layers: dict[str, LayerStorage]) -> int:
    """Bytes of a float network's tensors once these layers are integers with one scale a channel, and have grids."""
    total = sum(tensor.nbytes for tensor in network.state_dict().values())
    for name, storage in layers.items():
        layer = network.get_submodule(name.removesuffix(".linear"))
        weights, bits = layer.weight.numel(), storage.weight_bits
        integers = weights if bits == 8 else -(-weights // 8) * bits
        sides = 1 if name.endswith(".linear") or isinstance(layer, nn.Linear) else 2
        grids = sides * (4 + 1) if storage.activations == "static" else 0  # float32 scale, uint8 zero point
        total += integers + 4 * len(layer.weight) + grids - 4 * weights
    return total


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_artifact_takes_the_bytes_of_its_bits(project, variant):
    description = read_description(paths.compressed(variant))
    entry = ENTRIES[variant]
    parent, _ = load_artifact(paths.pruned(entry["pruned"]))
    raw = (paths.compressed(variant) / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert len(raw) - 8 - header == expected_bytes(parent, description.layers)
    assert len(raw) == description.tensors["bytes"]
    bits = {"int8": 8, "static": 8, "static_7": 7, "recovered": 3, "uniform_2": 2, "uniform_3": 3, "uniform_8": 8}
    if entry["quantizer"] in bits:
        assert {storage.weight_bits for storage in description.layers.values()} == {bits[entry["quantizer"]]}
    assert bool(description.layers) == (entry["quantizer"] != "fp32")


@pytest.fixture(scope="module")
def million() -> tuple[nn.Module, NetworkSpec]:
    """A ConvNeXt of 1.04 million random weights."""
    torch.manual_seed(0)
    arguments = {"depths": [1, 1, 2, 1], "dims": [32, 64, 128, 256], "conv_mlp": True, "ls_init_value": None}
    spec = NetworkSpec("timm", "convnext_atto", arguments, 2)
    return build_network(spec).eval(), spec


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        *((UniformBits(method="uniform_bits", bits=bits), bits) for bits in (2, 3, 8)),
        (Int8Static(method="int8_static", calibration_images=4), 8),
        (Int8Dynamic(method="int8_dynamic"), 8),
    ],
)
def test_a_real_networks_file_is_little_more_than_its_bits(million, quantizer, bits, tmp_path):
    network, spec = million
    session = session_of(network, quantizer, spec=spec, input_size=32)
    quantized = quantizers.quantize(session)
    stored = replace(spec, pointwise_as_linear=quantized.pointwise_as_linear)
    description = replace(session.parent, network=stored, layers=quantized.layers)
    save_artifact(tmp_path / "artifact", quantized.network, description)
    expected = expected_bytes(network, quantized.layers)
    assert expected <= (tmp_path / "artifact" / "model.safetensors").stat().st_size <= 1.05 * expected
    assert {storage.weight_bits for storage in quantized.layers.values()} == {bits}
    packed = sum(network.get_submodule(name.removesuffix(".linear")).weight.numel() for name in quantized.layers)
    assert packed > (0.75 if quantizer.method == "int8_dynamic" else 0.95) * 1_037_634  # dynamic: no convolutions


@pytest.mark.parametrize("quantizer", [quantizer for quantizer in QUANTIZERS if quantizer not in DENSE])
def test_zeros_stay_zero(project, quantizer):
    parent, _ = load_artifact(paths.pruned("toy-cut"))
    network, description = load_artifact(paths.compressed(f"toy-cut-{quantizer}"))
    before = {row.name: row for row in count_layers(parent, 32, {})}
    trained = QUANTIZERS[quantizer].get("epochs")  # biases too
    for row in count_layers(network, 32, description.layers) if not trained else ():
        assert row.params_nonzero <= before[row.name.removesuffix(".linear")].params_nonzero, row.name
    for name, layer in integer_layers(network).items():
        zero = parent.get_submodule(name.removesuffix(".linear")).weight.reshape(layer.weight.shape) == 0
        assert not layer.weight[zero].any(), name


@pytest.mark.parametrize("variant", ["toy-none-random", "toy-none-greedy", "toy-cut-ilp", "toy-cut-learned"])
def test_the_budget_is_kept_and_the_search_is_recorded(project, variant):
    network, description = load_artifact(paths.compressed(variant))
    layers = integer_layers(network)
    used = sum(layer.weight.numel() * layer.bits for layer in layers.values())
    assert used <= 4 * sum(layer.weight.numel() for layer in layers.values())
    search = description.search
    assert search["used_bits"] == used
    assert search["evaluations"] <= 40
    assert search["best"] == min(search["tried"])
    assert {name: layer.bits for name, layer in layers.items()} == {
        name: storage.weight_bits for name, storage in description.layers.items()
    }


def test_more_bits_are_nearer_to_the_float_network(project):
    images = np.random.default_rng(1).integers(0, 256, (40, 24, 24, 3), dtype=np.uint8)
    logits = {
        quantizer: session_logits(open_session(paths.compressed(f"toy-cut-{quantizer}") / "model.onnx", 1), images, 20)
        for quantizer in ("fp32", "uniform_2", "uniform_3", "uniform_8")
    }
    far = [float(np.abs(logits[q] - logits["fp32"]).mean()) for q in ("uniform_2", "uniform_3", "uniform_8")]
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.05 * logits["fp32"].std()


def test_a_search_with_too_few_evaluations_is_refused_and_the_old_artifact_stays(project):
    few = SECTIONS.quantizers["greedy"].model_copy(update={"evaluations": 5})
    params = SECTIONS.model_copy(update={"quantizers": {"greedy": few}})
    file = paths.compressed("toy-none-greedy") / "model.json"
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"^quantizers\.greedy\.evaluations = 5: .* 17 layers take at least 17"):
        compress("toy-none-greedy", params)
    assert file.read_bytes() == before


def test_calibration_images_come_from_the_training_part():
    parts = part_of(20, pixel=0, label=0), part_of(30, pixel=255, label=1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.zeros_(network[1].weight)
    network[1].bias.data = torch.tensor([9.0, 0.0])  # right about each image of the one, wrong about all of the other

    static = Int8Static(method="int8_static", calibration_images=10)
    found = quantizers.quantize(session_of(network, static, parts))
    grid = Grid.of(found.network[1], "input")
    assert (grid.scale, grid.zero_point) == (pytest.approx(2 / 255), 255)  # of [-2, 0]

    searched = SearchedBits(method="searched_bits", **SEARCH, search="random")
    assert quantizers.quantize(session_of(network, searched, parts)).search["float"] < 0.01


def test_gptq_compensates_on_the_training_part():
    generator = np.random.default_rng(0)
    parts = [Part(generator.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), np.zeros(8, np.int64)) for _ in range(2)]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2)).eval()
    quantizer = UniformBits(method="uniform_bits", bits=3, rounding="gptq", calibration_images=8)
    session = session_of(network, quantizer, tuple(parts))
    found = quantizers.quantize(session).network[0].weight
    by_part = []
    for part in parts:
        images, _ = calibration_images(part, quantizer, "quantizers.toy")
        hessian = hessians(session.classifier, {"0": network[0]}, images)["0"]
        by_part.append(round_gptq(network[0].weight, 3, inverse_factor(hessian)).integers)
    assert torch.equal(found, by_part[0])
    assert not torch.equal(found, by_part[1])


BY_METHOD = {
    "dynamic": Int8Dynamic(method="int8_dynamic", exclude=["head"]),
    "static": Int8Static(method="int8_static", exclude=["head"], calibration_images=4),
    "uniform": UniformBits(method="uniform_bits", bits=4, exclude=["head"]),
    "searched": SearchedBits(
        method="searched_bits", search="greedy", average_bits=4, evaluations=20, exclude=["head"], calibration_images=4
    ),
}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.body(x.mean((2, 3)))))


@pytest.mark.parametrize("name", BY_METHOD)
def test_an_excluded_layer_stays_in_float_and_is_listed(name):
    network = TwoLayers()
    quantized = quantizers.quantize(session_of(network, BY_METHOD[name]))
    assert quantized.layers.keys() == {"body"}
    assert quantized.float_layers == ["head"]
    assert torch.equal(quantized.network.head.weight, network.head.weight)
    assert quantized.search.get("weights", 24) == 24  # a search's budget counts the other layers alone


@pytest.mark.parametrize("name", BY_METHOD)
@pytest.mark.parametrize(("exclude", "reason"), [(["haed"], "head"), (["act"], "weights"), (["*"], "leaves no layer")])
def test_an_exclude_that_names_nothing_or_leaves_nothing_is_refused(name, exclude, reason):
    quantizer = BY_METHOD[name].model_copy(update={"exclude": exclude})
    with pytest.raises(UserError, match=rf"^quantizers.toy.exclude = .*{reason}"):
        quantizers.quantize(session_of(TwoLayers(), quantizer))
