"""The numbers of an experiment, as lines of a table."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """A number with its standard error, beside the exact value where there is one.

    error = 0: a number that is no estimate, and has to agree to the digits of `found`. exact = nan: none is known, or
    none is claimed. `remark` says where else the number can be found, or what it shows.
    """

    what: str
    found: float
    error: float = 0.0
    exact: float = math.nan
    remark: str = ""

    @property
    def agrees(self) -> bool:
        """Within 4 standard errors of the exact value; true where there is none."""
        if math.isnan(self.exact):
            return True
        return bool(abs(self.found - self.exact) <= 4 * self.error + 1e-4 * abs(self.exact))


def table(rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = ["| | found | standard error | exact | off by | |", "|---|---:|---:|---:|---:|---|"]
    for row in rows:
        error = f"{row.error:.1g}" if row.error else ""
        known = not math.isnan(row.exact)
        exact = f"{row.exact:.6g}" if known else ""
        off = f"{(row.found - row.exact) / row.error:+.1f} errors" if known and row.error else ""
        lines.append(f"| {row.what} | {row.found:.6g} | {error} | {exact} | {off} | {row.remark} |")
    return "\n".join(lines) + "\n"
