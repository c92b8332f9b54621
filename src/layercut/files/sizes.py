"""Bytes as people read and write them: 200MB in a flag, 269.0 MB in a line. All sizes come from here."""

from __future__ import annotations

import math
import re

from layercut.errors import ConfigError

SIZES = {"B": 1} | {
    prefix + unit: base**power
    for unit, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def parse_bytes(flag: str, text: str) -> int:
    """Bytes of "200MB", "1.5GiB" or a plain number; MB is 10^6 bytes and MiB 2^20."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?i?b)?\s*", text, re.IGNORECASE)
    unit = (found[2] or "B").upper() if found else ""
    count = float(found[1]) * SIZES[unit] if found and unit in SIZES else 0.0
    size = round(count) if math.isfinite(count) else 0
    if size < 1:
        raise ConfigError(f"{flag} {text!r} is no size", f"allowed is a number with MB, GB, MiB or GiB: {flag} 200MB")
    return size


def size(count: float) -> str:
    """269030016 -> 269.0 MB; of bytes that make no unit of a thousand, their number: 100 B."""
    for limit, unit in UNITS:
        if abs(count) >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count:.0f} B"


def size_flag(count: float) -> str:
    """The size to give to a flag that allows so many bytes, rounded up: 71234567 -> 71.3MB."""
    for limit, unit in UNITS:
        if count >= limit:
            return f"{math.ceil(count / limit * 10) / 10:.10g}{unit}"
    return f"{math.ceil(count)}B"
