"""Numbers for people: times, sizes in bytes, quantities with SI prefixes."""

from __future__ import annotations

from collections.abc import Sequence

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def clock(seconds: float) -> str:
    """90 -> "1:30", 5400 -> "1:30:00"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """41.6 -> "42 s", 358 -> "5 min 58 s", 200000 -> "2 d 8 h"."""
    minutes, hours = seconds / 60, seconds / 3600
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        return f"{int(round(seconds) // 60)} min {round(seconds) % 60:02d} s"
    if round(minutes) < 48 * 60:
        return f"{int(round(minutes) // 60)} h {round(minutes) % 60:02d} min"
    return f"{int(round(hours) // 24)} d {round(hours) % 24} h"


def size(number: float) -> str:
    """Bytes: exact below 100,000, where caches are compared, else in binary units."""
    if number < 100_000:
        return f"{number:,.0f} B"
    return _three_digits(*_scaled(number, (" B", " KiB", " MiB", " GiB", " TiB"), base=1024))


def gigabytes(number: float) -> str:
    """Bytes in decimal units, as the memory of cards is given."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def si(number: float, unit: str) -> str:
    """2.4e10 -> "24.0 GFLOP/s"."""
    return _three_digits(*_scaled(number, [f" {prefix}{unit}" for prefix in _PREFIXES]))


def short(number: float) -> str:
    """A number of things: 1234 -> "1,234", 20971520 -> "21.0M", 671e9 -> "671B"."""
    return f"{number:,.0f}" if number < 10_000 else _three_digits(*_scaled(number, ("", "K", "M", "B", "T")))


def compact(number: float, digits: int = 3, space: str = "") -> str:
    """At most so many digits: 1.65e7 -> "16.5M", 2e14 -> "200T"."""
    number, prefix = _scaled(number, _PREFIXES, digits=digits)
    return f"{number:.{digits}g}{space if prefix else ''}{prefix}"


def _scaled(number: float, units: Sequence[str], base: int = 1000, digits: int = 3) -> tuple[float, str]:
    """In the unit, each `base` times the one before, that keeps the number below `base` when it is rounded to `digits`."""
    power = 0
    while number >= base * (1 - 0.5 * 10.0**-digits) and power < len(units) - 1:
        number, power = number / base, power + 1
    return number, units[power]


def _three_digits(number: float, unit: str) -> str:
    return (f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}") + unit
