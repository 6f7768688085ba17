"""Numbers as people read them."""

import math

import pytest

from metalens.analysis import Interval
from metalens.display import format


@pytest.mark.parametrize(
    ("write", "value", "shown"),
    [
        (format.gigabytes, 20_400_000, "20 MB"),
        (format.gigabytes, 1_540_000_000, "1.5 GB"),
        (format.decimals, 1.23456, "1.235"),
        (format.decimals, -0.0001, "0.000"),
        (format.percent, 0.1234, "12.3 %"),
        (format.rate, 99.94, "99.9"),
        (format.rate, 12345.6, "12,346"),
        (format.yes_or_no, True, "yes"),
        (format.yes_or_no, False, "no"),
    ],
)
def test_formats(write, value, shown):
    assert write(value) == shown


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (Interval(0.9123, 0.88, 0.941), "0.912 (0.880 to 0.941)"),
        (Interval(-0.0001, math.nan, math.nan), "0.000"),
        (Interval(math.nan, math.nan, math.nan), "-"),
    ],
)
def test_intervals(found, shown):
    assert format.interval(found) == shown


def test_numbers_have_the_unit_that_fits():
    sizes, work, times = (
        (0, 999, 4000, 999_600, 20_000_000, 1_500_000_000),
        (5.68e12, 2.49e16, 3.4e9, 1.08e8, 4.2e18),
        (0.2, 12, 100, 5400, 9000, 1.7e6, 1e9),
    )
    assert [format.gigabytes(n) for n in sizes] == ["0 bytes", "999 bytes", "4 kB", "1 MB", "20 MB", "1.5 GB"]
    assert [format.operations(n) for n in work] == ["5.68 TFLOP", "24.9 PFLOP", "3.4 GFLOP", "108 MFLOP", "4,200 PFLOP"]
    assert [format.duration(n) for n in times] == ["1 s", "12 s", "2 min", "90 min", "2.5 hours", "19.7 days", "11,574 days"]
