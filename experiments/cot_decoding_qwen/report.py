"""Tables and picture of `experiments.cot_decoding_qwen`: see `experiments.support.path_report`."""

from __future__ import annotations

from experiments.support.path_report import Report
from mod_star.evaluation.branch_records import COUNTED, OF_CONFIDENCE

REPORT = Report(
    "cot_decoding_qwen",
    {"multiarith": "MultiArith", "gsm8k": "GSM8K", "coin_flip": "coin flip", "year_parity": "year parity"},
    ("plain", "plain, step by step", "chat", "chat, step by step"),
    COUNTED | OF_CONFIDENCE,
    weigh=True,
    pool=True,
)
