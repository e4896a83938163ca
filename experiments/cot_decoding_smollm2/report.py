"""Tables and picture of `experiments.cot_decoding_smollm2`: see `experiments.support.path_report`."""

from __future__ import annotations

from experiments.support.path_report import Report
from mod_star.evaluation.branch_records import COUNTED

REPORT = Report(
    "cot_decoding_smollm2",
    {"multiarith": "MultiArith", "gsm8k": "GSM8K", "coin_flip": "coin flip"},
    ("plain", "step by step"),
    COUNTED,
)
