import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_network import UNCOUNTABLE

from stages.networks import architectures
from stages.networks.build import build_network
from stages.networks.products import count_products, uncountable
from stages.networks.spec import NetworkSpec

FAMILIES = [
    ("timm", "inception_next_atto", {"depths": (1, 1, 1, 1)}, 32),
    ("timm", "edgenext_xx_small", {"depths": (1, 1, 1, 1)}, 64),
    ("timm", "efficientformer_l1", {"depths": (1, 1, 1, 2)}, 224),
    ("timm", "fastvit_s12", {"layers": (1, 1, 1, 1)}, 64),
    ("timm", "tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}, 224),
    ("timm", "levit_128s", {}, 224),
    ("timm", "caformer_s18", {}, 64),
    ("timm", "swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "img_size": 56}, 56),
    ("timm", "swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1), "img_size": 64}, 64),
    ("torchvision", "vit_b_16", {"image_size": 32}, 32),
    ("torchvision", "swin_t", {}, 64),
    ("torchvision", "regnet_y_400mf", {}, 64),  # its constructor needs the CPU
]


@pytest.mark.parametrize(("library", "architecture", "arguments", "size"), FAMILIES, ids=lambda value: str(value))
def test_products_are_those_of_torch_in_every_family(library, architecture, arguments, size):
    spec = NetworkSpec(library, architecture, arguments, 7)
    with torch.device("cpu" if "regnet" in architecture else "meta"):
        network = build_network(spec).eval()
        products = count_products(network, size)
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # FlopCounterMode does not see into it
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(torch.zeros(1, 3, size, size))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
    assert products.total == counter.get_total_flops() / 2 > 0
    assert set(products.by_parameter) <= {name for name, p in network.named_parameters() if p.ndim > 1}
    assert uncountable(spec, size) is None
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_the_count_is_the_same_on_the_cpu_where_the_meta_device_lacks_an_operator():
    class Selecting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.head(x.mean((2, 3)) if x.sum().item() < 1e9 else x)

    products = count_products(Selecting(), 4)
    assert products.by_parameter == {"conv.weight": 16 * 12, "head.weight": 8}


def test_an_uncountable_network_is_named_on_either_device(monkeypatch, tmp_path):
    monkeypatch.setattr(architectures, "CUSTOM", tmp_path)
    (tmp_path / "pairs.py").write_text(UNCOUNTABLE)
    problem = uncountable(NetworkSpec("custom", "pairs.py", {}, 7), 8)
    assert str(problem).startswith("pairs: Bilinear multiplies in aten._trilinear")


def test_gray_images_are_counted_with_one_channel():
    network = build_network(NetworkSpec("timm", "lcnet_035", {}, 7, channels=1))
    stem = count_products(network, 32).by_parameter["conv_stem.weight"]
    assert stem == 16 * 16 * network.conv_stem.weight.numel() == 16 * 16 * 8 * 9
