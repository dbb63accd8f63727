"""Pack integers of 2 to 8 bits into bytes: n values of b bits take ceil(n / 8) * b bytes.

The bits are stored in planes, the lowest first: plane p holds bit p of every value, eight values in a byte, the first
value in the highest bit. Thus every width packs without gaps, by a few vectorized operations.
"""

import numpy as np

SMALLEST, LARGEST = 2, 8  # range of bits of a value
CHUNK = 16384  # bytes of each plane that are unpacked at a time, so that they fit into a core's cache


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest signed integer of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def packed_bytes(values: int, bits: int) -> int:
    """Bytes that `values` integers of `bits` bits take."""
    return -(-values // 8) * bits


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack signed integers of any shape into uint8 `[packed_bytes(n, bits)]`; a `ValueError` if one does not fit."""
    if not SMALLEST <= bits <= LARGEST:
        raise ValueError(f"{bits} bits: a value takes {SMALLEST} to {LARGEST} bits")
    low, high = limits(bits)
    if values.size and not (low <= values.min() and values.max() <= high):
        raise ValueError(f"values from {values.min()} to {values.max()} do not fit into {bits} bits")
    unsigned = np.ascontiguousarray(values, np.int8).reshape(-1).view(np.uint8)
    return np.concatenate([np.packbits(unsigned & np.uint8(1 << plane)) for plane in range(bits)])


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack`: int8 of `shape`; a `ValueError` if the length of `packed` does not match."""
    count = int(np.prod(shape))
    if packed.dtype != np.uint8 or packed.shape != (packed_bytes(count, bits),):
        wanted = f"{count} values of {bits} bits take uint8 [{packed_bytes(count, bits)}]"
        raise ValueError(f"{packed.dtype} {list(packed.shape)}: {wanted}")
    planes = packed.reshape(bits, -1)
    values = np.empty(planes.shape[1] * 8, np.uint8)
    for start in range(0, planes.shape[1], CHUNK):
        part = values[8 * start : 8 * (start + CHUNK)]
        np.negative(np.unpackbits(planes[-1, start : start + CHUNK]), out=part)  # the sign bit fills all higher bits
        for plane in planes[-2::-1]:
            np.left_shift(part, 1, out=part)
            np.bitwise_or(part, np.unpackbits(plane[start : start + CHUNK]), out=part)
    return values[:count].view(np.int8).reshape(shape)
