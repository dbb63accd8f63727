import numpy as np
import pytest

from stages.artifacts.packing import pack, packed_bytes, unpack

ALL_BITS = range(2, 9)


def values_of(bits: int, count: int) -> np.ndarray:
    generator = np.random.default_rng(bits)
    return generator.integers(-(1 << (bits - 1)), 1 << (bits - 1), count).astype(np.int8)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, 300_001])
def test_every_value_comes_back(bits, count):
    values = values_of(bits, count)
    assert np.array_equal(unpack(pack(values, bits), bits, (count,)), values)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_integer_of_the_width_comes_back_in_its_shape(bits):
    values = np.arange(-(1 << (bits - 1)), 1 << (bits - 1)).astype(np.int8).reshape(2, -1)
    assert np.array_equal(unpack(pack(values, bits), bits, values.shape), values)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_values_take_their_bits_and_no_more(bits):
    assert pack(values_of(bits, 8000), bits).nbytes == 1000 * bits
    assert packed_bytes(8001, bits) == 1001 * bits


def test_the_layout_is_planes_of_bits_the_lowest_first():
    packed = pack(np.array([1, -1, -4, 3, 0, 0, 0, 2], np.int8), 3)
    assert [f"{byte:08b}" for byte in packed] == ["11010000", "01010001", "01100000"]


@pytest.mark.parametrize(("bits", "value"), [(2, 2), (3, -5), (7, 64), (3, 259), (8, 300)])  # 259: 3 in 8 bits
def test_a_value_that_does_not_fit_is_refused(bits, value):
    with pytest.raises(ValueError, match=f"do not fit into {bits} bits"):
        pack(np.array([0, value]), bits)


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8"):
        pack(np.zeros(8, np.int8), bits)


def test_bytes_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"16 values of 3 bits take uint8 \[6\]"):
        unpack(np.zeros(5, np.uint8), 3, (4, 4))
