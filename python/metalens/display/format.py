"""Numbers as people read them."""

from __future__ import annotations

import math

from metalens.analysis.resampling import Interval


def gigabytes(count: int) -> str:
    """Return a number of bytes as '1.5 GB', '20 MB' or '3 kB'."""
    if count >= 999_500:
        return f"{count / 1e9:.1f} GB" if count >= 999_500_000 else f"{count / 1e6:.0f} MB"
    return f"{count / 1e3:.0f} kB" if count >= 1000 else f"{count} bytes"


def operations(count: float) -> str:
    """Return a number of multiplications and additions as '4.13 TFLOP', in the unit that fits."""
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if count >= unit or unit == 1e6:
            return f"{count / unit:,.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"
    raise AssertionError


def duration(seconds: float) -> str:
    """Return a time as people say it: '12 s', '5 min', '3.5 hours', '4.2 days'."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    days = seconds / 86400
    return f"{seconds / 3600:.1f} hours" if days < 2 else f"{days:.1f} days" if days < 100 else f"{days:,.0f} days"


def decimals(value: float) -> str:
    """Return a number with three decimals, and zero without a minus sign."""
    return f"{value:z.3f}"


def percent(value: float) -> str:
    """Return a fraction as '12.3 %'."""
    return f"{100 * value:.1f} %"


def rate(value: float) -> str:
    """Return a number per second: whole numbers from 100 on, one decimal below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def yes_or_no(value: bool) -> str:
    """Return 'yes' or 'no'."""
    return "yes" if value else "no"


def interval(found: Interval) -> str:
    """Return a value with its interval: '0.912 (0.880 to 0.941)'; without one if it has none, and '-' for no value."""
    if math.isnan(found.value):
        return "-"
    return decimals(found.value) if math.isnan(found.low) else f"{decimals(found.value)} ({decimals(found.low)} to {decimals(found.high)})"
