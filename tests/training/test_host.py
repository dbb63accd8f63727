import time

import pytest
import torch

from stages.common.errors import UserError
from stages.params.base import Base
from stages.training import host
from stages.training.checkpoint import checkpoint_folder
from stages.training.host import prepare_host, use_bfloat16

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch):
    """Simulates a processor whose products take `seconds[dtype]`; returns the list of computed products."""
    host._measure_faster.cache_clear()
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
    host._measure_faster.cache_clear()


@pytest.mark.parametrize(("bfloat16", "wanted"), [(0.002, True), (0.008, False)], ids=["faster", "slower"])
def test_auto_is_bfloat16_if_its_products_are_faster(products, bfloat16, wanted):
    computed = products({torch.float32: 0.004, torch.bfloat16: bfloat16})
    assert use_bfloat16("auto", CPU) is wanted
    assert set(computed) == {torch.float32, torch.bfloat16}
    before = len(computed)
    assert use_bfloat16("auto", CPU) is wanted
    assert len(computed) == before  # measured once


def test_auto_is_float32_without_a_measurement_if_the_hardware_has_no_bfloat16(products):
    computed = products({}, native=False)
    assert not use_bfloat16("auto", CPU)
    assert computed == []


def test_a_named_precision_is_used(products):
    computed = products({torch.float32: 0.004, torch.bfloat16: 0.008})
    assert use_bfloat16("bfloat16", CPU)
    assert not use_bfloat16("float32", CPU)
    assert computed == []


@pytest.mark.parametrize("first", [True, False])
def test_a_stage_that_runs_again_keeps_its_precision(tmp_path, monkeypatch, first):
    def trained(identity: str, measured: bool) -> bool:
        monkeypatch.setattr(host, "_measure_faster", lambda: measured)
        with checkpoint_folder(tmp_path, {"a": identity}):
            return use_bfloat16("auto", CPU)

    assert trained("one", measured=first) is first
    assert trained("one", measured=not first) is first
    assert trained("another", measured=not first) is not first
    assert use_bfloat16("auto", CPU) is not first  # outside a stage nothing is stored


def test_cuda_is_refused_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no usable CUDA device"):
        prepare_host(Base(device="cuda"))


def test_processes_on_one_machine_divide_its_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    before = torch.get_num_threads()
    try:
        for threads, expected in [(0, 3), (2, 2)]:
            prepare_host(Base(device="cpu", threads=threads))
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
