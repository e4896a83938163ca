"""Parametrised tests of which some values are left to the nightly run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some_nightly(values: Iterable[Any], *nightly: Any) -> list[Any]:
    """All `values`, for `pytest.mark.parametrize`; those in `nightly` only `make nightly` runs.

    A tuple has the values of several arguments.
    """
    values = list(values)
    assert all(each in values for each in nightly), "a value that is not there would be left to no run"
    several = [each if isinstance(each, tuple) else (each,) for each in values]
    marks = [[pytest.mark.nightly] if each in nightly else [] for each in values]
    return [pytest.param(*each, marks=own) for each, own in zip(several, marks, strict=True)]
