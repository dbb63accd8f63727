import pytest

from stages.params.quantizers import UniformBits
from stages.reporting.wording import (
    bytes_text,
    count_text,
    describe,
    drop_text,
    ms_text,
    p_equals,
    percent_text,
    points_text,
    ratio_text,
    size_ratio_text,
    wrapped,
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([bytes_text(n) for n in (812, 61_250, 1_246_000, 99_960_000)], ["812 bytes", "61.2 KB", "1.25 MB", "100 MB"]),
        ([count_text(n) for n in (9, 61_300, 2_484_000)], ["9", "61.3 k", "2.48 M"]),
        ([drop_text(x) for x in (0.01, 0.005, 0.025)], ["1 point", "0.5 points", "2.5 points"]),
        ([points_text(x) for x in (-0.0123, -0.0001, 0.02)], ["\N{MINUS SIGN}1.2", "+0.0", "+2.0"]),
        ([ms_text(x) for x in (0.08874, 1.2, 1234.0)], ["0.089 ms", "1.20 ms", "1,234 ms"]),
        ([p_equals(x) for x in (0.0004, 0.0314)], ["p < 0.001", "p = 0.031"]),
        ([ratio_text(x) for x in (9.2407, 15.5)], ["9.24\N{MULTIPLICATION SIGN}", "15.5\N{MULTIPLICATION SIGN}"]),
        ([percent_text(x) for x in (0.8771, -0.009, -0.0001)], ["87.7 %", "\N{MINUS SIGN}0.9 %", "0.0 %"]),
        (
            [size_ratio_text(x) for x in (30.04, 1.001, 0.5)],
            ["30.0 times smaller than", "as large as", "2.00 times as large as"],
        ),
        (wrapped("structured-pruning-long-int8_dynamic", 22), "structured-pruning-\nlong-int8_dynamic"),
        (wrapped("x" * 30 + "-int8", 22), "x" * 30 + "-\nint8"),
        (wrapped("continued-int8", 22), "continued-int8"),
    ],
)
def test_numbers_and_names_as_a_person_reads_them(words, expected):
    assert words == expected


def test_only_settings_that_were_given_are_described():
    quantizer = UniformBits(method="uniform_bits", bits=4)
    assert describe("uniform_4", quantizer) == "uniform_4 (uniform_bits, bits 4)"
