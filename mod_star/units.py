"""How numbers, times and sizes are written for people."""

from __future__ import annotations


def short_number(value: float) -> str:
    """Three digits and a suffix: 1234567 -> "1.23M"; from 1e15 on in powers of ten."""
    magnitude = abs(value)
    if magnitude >= 1e15:
        return f"{value:.2e}"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if magnitude >= 0.9995 * limit:
            return f"{value / limit:#.3g}".rstrip(".") + suffix
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """In the two largest units: "8 s", "3 min 05 s", "2 h 07 min", "1 d 04 h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600:02} h"


def size(value: float) -> str:
    """Bytes in words, in binary units: 1.5 GiB."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            scaled = value / factor
            return f"{scaled:#.3g}".rstrip(".") + f" {unit}" if scaled < 999.5 else f"{scaled:.0f} {unit}"
    return f"{value:.0f} B"
