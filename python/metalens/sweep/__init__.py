"""Sweeps: models x recipes x texts x seeds -> lenses, evaluations, transfer between models, and a report."""

from metalens.sweep.report import write_report
from metalens.sweep.results import Results
from metalens.sweep.run import SweepResult, run_sweep
from metalens.sweep.settings import Sweep, read_sweep

__all__ = ["Results", "Sweep", "SweepResult", "read_sweep", "run_sweep", "write_report"]
