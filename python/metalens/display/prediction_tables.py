"""Tables of answers by layer, of the difficulty of examples, of anomalies, and of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from metalens.analysis.anomalies import Detection
from metalens.analysis.layer_accuracy import LayerAccuracy
from metalens.analysis.weight_readings import WeightReading
from metalens.display.format import decimals, interval, percent
from metalens.utils.token_display import readable


def accuracy_table(found: Mapping[str, Sequence[LayerAccuracy]], title: str) -> Table:
    """Make a table with a row for each layer, and the accuracy of each lens or set of demonstrations side by side.

    Args:
        found: {name: accuracy of every layer, and last of the model}. All have the same layers.
        title: text above the table.
    """
    table = Table(title=Text(title, style="table.title"))
    table.add_column("layer", justify="right")
    columns = list(found.values())
    calibrated = any(column[0].calibrated_accuracy is not None for column in columns)
    error = any(column[0].calibration_error is not None for column in columns)
    for name in found:
        table.add_column(f"{name}\naccuracy", justify="right")
        if calibrated:
            table.add_column(f"{name}\ncalibrated", justify="right")
        if error:
            table.add_column(f"{name}\nECE", justify="right")
    for row in zip(*columns, strict=True):
        if row[0].layer is None:
            table.add_section()
        cells = []
        for each in row:
            cells.append(f"{percent(each.accuracy.value)} ({100 * each.accuracy.low:.0f} to {100 * each.accuracy.high:.0f})")
            if calibrated:
                cells.append("" if each.calibrated_accuracy is None else percent(each.calibrated_accuracy))
            if error:
                cells.append("" if each.calibration_error is None else decimals(each.calibration_error))
        table.add_row("model" if row[0].layer is None else str(row[0].layer), *cells)
    return table


def depth_table(depths: Mapping[str, np.ndarray], layers: Sequence[int], title: str) -> Table:
    """Make a table of how many examples settle at each layer, cumulated.

    Args:
        depths: {name of the lens: prediction depth of every example}, as rows of `layers`.
        layers: the layers.
        title: text above the table.
    """
    table = Table(title=Text(title, style="table.title"))
    table.add_column("settled by layer", justify="right")
    for name in depths:
        table.add_column(name, justify="right")
    for row, layer in enumerate(layers):
        table.add_row(str(layer), *(percent(float((found <= row).mean())) for found in depths.values()))
    table.add_section()
    table.add_row("mean depth", *(f"{found.mean():.2f}" for found in depths.values()))
    return table


def detection_table(found: Mapping[str, Sequence[Detection]], title: str) -> Table:
    """Make a table of the AUROC of each detector, the lenses side by side.

    Args:
        found: {name of the lens or features: one detection for each detector, the same detectors in each}.
        title: text above the table.
    """
    table = Table(title=Text(title, style="table.title"))
    table.add_column("detector")
    for name in found:
        table.add_column(f"{name}\nAUROC (interval)", justify="right")
    for row in zip(*found.values(), strict=True):
        table.add_row(row[0].method, *(interval(each.auroc) for each in row))
    return table


def weight_table(reading: WeightReading, rows: Sequence[int] | np.ndarray, title: str, tokens: int = 6) -> Table:
    """Make a table of some rows of a matrix with the tokens that they promote and suppress.

    Args:
        reading: the reading.
        rows: numbers of the rows.
        title: text above the table.
        tokens: number of tokens to name.
    """
    table = Table(title=Text(title, style="table.title"))
    for column in ("row", "size", "cosine", "coherence"):
        table.add_column(column, justify="right")
    masses = [] if reading.mass is None or reading.opposite_mass is None else [reading.mass, reading.opposite_mass]
    for name in ("mass", "opposite's")[: len(masses)]:
        table.add_column(name, justify="right")
    table.add_column("promotes")
    table.add_column("suppresses")
    for row in rows:
        named = (" ".join(readable(reading.texts[int(i)]) for i in ids[row, :tokens]) for ids in (reading.top_ids, reading.bottom_ids))
        coherence = reading.coherence[row]
        shown = "" if np.isnan(coherence) else decimals(float(coherence))
        table.add_row(
            str(int(row)),
            decimals(float(reading.sizes[row])),
            decimals(float(reading.cosines[row])),
            shown,
            *(percent(float(mass[row])) for mass in masses),
            *map(Text, named),
        )
    return table
