"""The colors of figures, which people with any color vision tell apart (Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Iterable

# Each lens has its color in every figure.
LENSES = {"logit": "#E69F00", "tuned": "#0072B2"}
# Lines of other things take these in turn.
CYCLE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """Return the colors of lines by their names: those of the lenses for 'logit lens' and 'tuned lens', in turn for others."""
    of_lenses = {f"{lens} lens": color for lens, color in LENSES.items()}
    names = list(dict.fromkeys(names))
    taken = {of_lenses[name] for name in names if name in of_lenses}
    free = [color for color in CYCLE if color not in taken]
    others = [name for name in names if name not in of_lenses]
    return of_lenses | {name: free[i % len(free)] for i, name in enumerate(others)}
