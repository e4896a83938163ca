"""Parquet files: their rows as records."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mod_star.errors import InputError

ROWS = 1_000
"""Rows that are read at once."""


def parquet_records(path: str, content: bytes | None, fields: Collection[str]) -> Iterator[tuple[Any, str]]:
    """The rows of a Parquet file as dicts by column, and where each stands ("FILE, row 7").

    Args:
        path: The file.
        content: Its bytes, where it is not on a disk.
        fields: Columns to read, if all of them are there; otherwise, or if empty, all columns are read.

    Raises:
        InputError: The file can't be read, is no Parquet file, is broken, or has no rows.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with (
            Path(path).open("rb") if content is None else io.BytesIO(content) as file,
            parquet.ParquetFile(file) as table,
        ):
            columns = sorted(fields) if fields and set(fields) <= set(table.schema_arrow.names) else None
            for batch in table.iter_batches(ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield record, f"{path}, row {number}"
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as Parquet ({reason})") from None
    if not number:
        raise InputError(f"{path}: holds no records")
