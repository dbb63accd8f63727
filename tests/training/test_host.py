import time

import pytest
import torch

from stages.training import host
from stages.training.host import use_bfloat16

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch):
    """Makes a processor of which each product takes `seconds[dtype]`; gives back those that were computed."""
    host._faster_in_bfloat16.cache_clear()
    computed = []

    def processor(seconds: dict[torch.dtype, float], native: bool = True) -> list[torch.dtype]:
        def linear(x, weight):
            assert x.dtype == weight.dtype
            computed.append(x.dtype)
            time.sleep(seconds[x.dtype])

        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        return computed

    yield processor
    host._faster_in_bfloat16.cache_clear()


@pytest.mark.parametrize(("bfloat16", "wanted"), [(0.002, True), (0.008, False)], ids=["faster", "slower"])
def test_auto_is_bfloat16_where_its_products_are_the_faster_ones(products, bfloat16, wanted):
    computed = products({torch.float32: 0.004, torch.bfloat16: bfloat16})
    assert use_bfloat16("auto", CPU) is wanted
    assert set(computed) == {torch.float32, torch.bfloat16}
    before = len(computed)
    assert use_bfloat16("auto", CPU) is wanted
    assert len(computed) == before  # measured once


def test_auto_is_float32_without_a_product_where_the_hardware_has_no_bfloat16(products):
    computed = products({}, native=False)
    assert not use_bfloat16("auto", CPU)
    assert computed == []


def test_a_precision_that_is_named_is_taken(products):
    computed = products({torch.float32: 0.004, torch.bfloat16: 0.008})
    assert use_bfloat16("bfloat16", CPU)
    assert not use_bfloat16("float32", CPU)
    assert computed == []
