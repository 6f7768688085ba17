"""Numbers as people read them."""

from __future__ import annotations


def gigabytes(count: int) -> str:
    """Return a number of bytes as '1.5 GB' or '20 MB'."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


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
