import time

import pytest
import torch

from stages.training import host
from stages.training.checkpoint import checkpoint_folder
from stages.training.host import use_bfloat16

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch):
    """Makes a processor of which each product takes `seconds[dtype]`; gives back those that were computed."""
    host._measured_faster.cache_clear()
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
    host._measured_faster.cache_clear()


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


@pytest.mark.parametrize("first", [True, False])
def test_a_stage_that_is_run_again_keeps_the_precision_in_which_it_began(tmp_path, monkeypatch, first):
    def trained(identity: str, measured: bool) -> bool:
        monkeypatch.setattr(host, "_measured_faster", lambda: measured)
        with checkpoint_folder(tmp_path, {"a": identity}):
            return use_bfloat16("auto", CPU)

    assert trained("one", measured=first) is first
    assert trained("one", measured=not first) is first
    assert trained("another", measured=not first) is not first
    assert use_bfloat16("auto", CPU) is not first  # out of any stage: as it is measured
