"""Tables: of an evaluation, of a reading, of a plan, and of machines, installations and models."""

from metalens.display.tables.evaluation import closed_form_table, evaluation_table, transfer_table
from metalens.display.tables.machine import (
    KERNEL_LABELS,
    ROOFLINE_LABELS,
    diagnosis_facts,
    diagnosis_table,
    fraction_text,
    fractions_table,
    roofline_table,
    support_table,
)
from metalens.display.tables.plan import DISK_LABELS, MEMORY_LABELS, WORK_LABELS, plan_remarks, plan_table
from metalens.display.tables.reading import chosen_remarks, chosen_table, reading_table

__all__ = [
    "DISK_LABELS",
    "KERNEL_LABELS",
    "MEMORY_LABELS",
    "ROOFLINE_LABELS",
    "WORK_LABELS",
    "chosen_remarks",
    "chosen_table",
    "closed_form_table",
    "diagnosis_facts",
    "diagnosis_table",
    "evaluation_table",
    "fraction_text",
    "fractions_table",
    "plan_remarks",
    "plan_table",
    "reading_table",
    "roofline_table",
    "support_table",
    "transfer_table",
]
