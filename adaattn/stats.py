"""What the library tells about its own work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Report:
    """What each head of a call was computed with.

    Attributes
    ----------
    precision_qk, precision_pv : (B, H) array of str
        Rungs of the scores and of the values.
    retried : (B, H) array of bool
        The rung that was asked for could not hold the head, which went up to a wider one.
    """

    precision_qk: NDArray[np.str_]
    precision_pv: NDArray[np.str_]
    retried: NDArray[np.bool_]

    @classmethod
    def of(cls, heads: Sequence[Sequence[tuple[Any, ...]]]) -> Report:
        """From a tuple of all fields for each head of each sequence."""
        size = len(heads), len(heads[0])
        flat = [head for sequence in heads for head in sequence]
        return cls(*[np.array([head[i] for head in flat]).reshape(size) for i in range(len(flat[0]))])

    def table(self) -> str:
        """A line for each head, a column for each field."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        lines = [("batch", "head", *columns)]
        for at in np.ndindex(self.retried.shape):
            lines.append((*map(str, at), *(_cell(column[at]) for column in columns.values())))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cell(x: Any) -> str:
    if isinstance(x, np.bool_):
        return "yes" if x else ""
    return f"{x:.3g}" if isinstance(x, np.floating) else str(x)
