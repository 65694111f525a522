"""Where 8-bit codes lie, as the engine's products take them (`code_products` in csrc/kernels.h)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CHUNK = 32  # lanes whose codes lie together


def code_places(lanes: int, numbers: int) -> NDArray[np.intp]:
    """Place of each lane's numbers, (lanes, numbers): in chunks of lanes, each [numbers / 4][lanes][4]."""
    lane, number = np.arange(lanes)[:, None], np.arange(numbers)
    chunk = lane // _CHUNK * _CHUNK
    wide = np.minimum(lanes - chunk, _CHUNK)
    return chunk * numbers + 4 * (number // 4 * wide + lane - chunk) + number % 4
