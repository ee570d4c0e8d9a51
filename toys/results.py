"""The numbers of an experiment, as lines of a table."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """A number with its standard error, beside the exact value where there is one.

    error = 0: a number that is no estimate, and has to agree to the relative `tolerance`, by default the digits that
    are printed. exact = nan: none is known, or none is claimed. `biased`: an estimate that is shown because it misses
    the exact value. `remark` says where else the number can be found, or what it shows.
    """

    what: str
    found: float
    error: float = 0.0
    exact: float = math.nan
    remark: str = ""
    tolerance: float = 1e-4
    biased: bool = False

    @property
    def agrees(self) -> bool:
        """Within 4 standard errors of the exact value, and its tolerance; true where there is none to agree with."""
        if math.isnan(self.exact) or self.biased:
            return True
        return bool(abs(self.found - self.exact) <= 4 * self.error + self.tolerance * abs(self.exact))


def table(rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = ["| | found | standard error | exact | off by | |", "|---|---:|---:|---:|---:|---|"]
    for row in rows:
        error = f"{row.error:.1g}" if row.error else ""
        known = not math.isnan(row.exact)
        exact = f"{row.exact:.6g}" if known else ""
        lines.append(
            f"| {row.what} | {row.found:.6g} | {error} | {exact} | {_off(row) if known else ''} | {row.remark} |"
        )
    return "\n".join(lines) + "\n"


def _off(row: Row) -> str:
    """By how many errors; where not all digits are claimed, by what part of the exact value."""
    if row.biased:
        return "biased"
    if row.exact and row.tolerance > Row._field_defaults["tolerance"]:
        return f"{row.found / row.exact - 1:+.1%}"
    return f"{(row.found - row.exact) / row.error:+.1f} errors" if row.error else ""
