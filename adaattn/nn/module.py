"""The base of all modules: parameters by dotted path, training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from typing_extensions import Self

Seed = int | np.random.Generator | None
Array = NDArray[Any]


class Module:
    """Base of all modules; `training` says whether dropout is applied."""

    training = True

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Direct children with their paths, in the order of their creation."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", module) for i, module in enumerate(value))

    def train(self, mode: bool = True) -> Self:
        """Switch the module and its children to training (with False: to evaluation); returns the module."""
        self.training = mode
        for _, child in self.named_children():
            child.train(mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation: no dropout."""
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Parameters by dotted path: the arrays themselves, not copies."""
        state = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        for name, child in self.named_children():
            state |= {f"{name}.{key}": value for key, value in child.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy `state` into the parameters, cast to their dtype; nothing is changed when it does not fit.

        Raises
        ------
        ArgumentError
            When a parameter's key is missing or a key names no parameter.
        ShapeError
            When an array's shape is not its parameter's.
        """
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise ArgumentError(
                f"state: expected every parameter of the module, got none for {_join(missing)}"
            )
        if foreign := state.keys() - own.keys():
            raise ArgumentError(f"state: expected only parameters of the module, got {_join(foreign)}")
        for key, parameter in own.items():
            if (shape := np.shape(state[key])) != parameter.shape:
                raise ShapeError(f"state: expected {key} of shape {parameter.shape}, got {shape}")
        for key, parameter in own.items():
            parameter[...] = state[key]

    def parameters(self) -> list[Array]:
        """The parameters, in the order of `state_dict`."""
        return list(self.state_dict().values())

    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(parameter.size for parameter in self.parameters())


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
