"""Numbers as people read them."""

import pytest

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
