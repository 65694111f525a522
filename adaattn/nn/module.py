"""The base of all modules: parameters and gradients by dotted path, training and evaluation."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..errors import ArgumentError, DTypeError, ShapeError
from ..products import PackedWeight
from ..stats import tolerance_of

if TYPE_CHECKING:
    from typing_extensions import Self

Seed = int | np.random.Generator | None
Array = NDArray[Any]


class Packed(NamedTuple):
    """A weight, its codes, what error a product with them may have, and whether one could write to it
    before."""

    weight: Array
    kept: PackedWeight
    tolerance: float
    writeable: bool


class Module:
    """Base of all modules.

    Parameters are the attributes that are arrays, children those that are modules or lists of them; names
    with a leading underscore are neither. In training (`training` is True, as it is at first) dropout is
    applied, and a call keeps what `backward` needs; in evaluation it keeps nothing.
    """

    training = True
    _saved: Any = None  # by the last call in training, for `backward`
    _packed: Packed | None = None  # of what `_product` says

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Direct children with their paths, in the order of their creation."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list) and not name.startswith("_"):
                yield from ((f"{name}.{i}", module) for i, module in enumerate(value))

    def named_modules(self, path: str = "") -> Iterator[tuple[str, Module]]:
        """The module itself, under the given path, and all that it is made of."""
        yield path, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{path}.{name}" if path else name)

    def train(self, mode: bool = True) -> Self:
        """Switch the module and its children to training (with False: to evaluation); returns the module.

        Training unpacks weights, see `pack`.
        """
        if mode:
            self.unpack()
        for _, module in self.named_modules():
            module.training = mode
            module._saved = None
        return self

    def eval(self) -> Self:
        """Switch to evaluation: no dropout, and nothing is kept for `backward`."""
        return self.train(False)

    def pack(self, tolerance: float | None = None, *, policy: str | None = None) -> Self:
        """Switch to evaluation, with weights kept in 8 and 16 bits too; returns the module.

        Products of few rows, such as those of each new token, are then computed from the fewest bits that
        keep the tolerance, see `adaattn.linear`; many rows are as without. It takes half of the weights'
        memory more, and they are read-only as long as it lasts: `train`, `load_state_dict` and `unpack` end
        it, and copies and pickles of the module are not packed.

        Parameters
        ----------
        tolerance : float
            Largest relative error of a row that a product gives.
        policy : "quality", "balanced" or "speed"
            Name of a tolerance, in its place.

        Raises
        ------
        ArgumentError
            There is no tolerance, or it is not a finite number above 0.
        DTypeError
            The parameters are not float32.
        """
        tolerance = tolerance_of(tolerance, policy)
        if tolerance is None or not 0 < tolerance < math.inf:
            raise ArgumentError(f"tolerance: expected a finite number above 0, got {tolerance}")
        self.eval().unpack()
        modules = [module for _, module in self.named_modules()]
        weights = [(module, weight) for module in modules if (weight := module._product()) is not None]
        packed = [Packed(w, PackedWeight(w), tolerance, w.flags.writeable) for _, w in weights]
        for (module, weight), kept in zip(weights, packed, strict=True):
            module._packed, weight.flags.writeable = kept, False
        return self

    def unpack(self) -> Self:
        """Give up what `pack` made; returns the module."""
        for _, module in self.named_modules():
            if module._packed is not None:
                module._packed.weight.flags.writeable = module._packed.writeable
                module._packed = None
        return self

    def _product(self) -> Array | None:
        """The parameter that calls multiply rows with, if there is one."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_packed"}

    def _by_path(self, of_module: Any) -> dict[str, Array]:
        """Joins dicts of arrays by parameter, one for each module."""
        return {
            f"{path}.{name}" if path else name: value
            for path, module in self.named_modules()
            for name, value in of_module(module).items()
        }

    def state_dict(self) -> dict[str, Array]:
        """Parameters by dotted path: the arrays themselves, not copies."""
        return self._by_path(_parameters)

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
        self.unpack()
        copy_into(own, state)

    def parameters(self) -> list[Array]:
        """The parameters, in the order of `state_dict`."""
        return list(self.state_dict().values())

    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(parameter.size for parameter in self.parameters())

    def gradients(self) -> dict[str, Array]:
        """Sums of what `backward` found since `zero_grad`, with the keys of `state_dict`: the arrays
        themselves, not copies."""
        return self._by_path(lambda module: {name: module._gradient(name) for name in _parameters(module)})

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for gradient in self.gradients().values():
            gradient[...] = 0

    def backward(self, grad_out: Array) -> Any:
        """Gradient of the input of the last call in training, from that of its result.

        The parameters' gradients are added to `gradients`. What the call kept is used up.

        Raises
        ------
        ArgumentError
            No call in training came before, or its `backward` has been done.
        """
        raise NotImplementedError(f"{type(self).__name__}.backward")

    def random_state(self) -> dict[str, Any]:
        """State of the generators that dropout draws from, by path, of JSON types."""
        states = {}
        for path, module in self.named_modules():
            rng = vars(module).get("_rng")
            if rng is not None:
                states[path] = rng.bit_generator.state
        return states

    def set_random_state(self, states: Mapping[str, Any]) -> None:
        """Continue where `random_state` was asked for; generators that modules share stay shared."""
        for path, module in self.named_modules():
            if path in states:
                vars(module)["_rng"].bit_generator.state = states[path]

    def _gather(self) -> None:
        """Move all parameters to one block of memory, where large pages serve them: a quarter less time for
        the products with single vectors that generation consists of."""
        parameters = self.state_dict().values()
        space = sum(x.nbytes + -x.nbytes % 64 for x in parameters) + 64
        block = np.empty(space, np.uint8)
        start = -block.ctypes.data % 64
        for _, module in self.named_modules():
            for name, x in _parameters(module).items():
                own = block[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
                own[...] = x
                setattr(module, name, own)
                start += x.nbytes + -x.nbytes % 64

    def _gradient(self, name: str) -> Array:
        """Where gradients of an own parameter are summed."""
        own: dict[str, Array] = vars(self).setdefault("_gradients", {})
        if name not in own:
            own[name] = np.zeros_like(getattr(self, name))
        return own[name]

    def _recall(self) -> Any:
        """What the last call in training kept; once."""
        saved, self._saved = self._saved, None
        if saved is None:
            raise ArgumentError("backward: expected a call in training before it, got none")
        return saved


def _parameters(module: Module) -> dict[str, Array]:
    own = vars(module).items()
    return {name: x for name, x in own if isinstance(x, np.ndarray) and not name.startswith("_")}


def copy_into(arrays: Mapping[str, Array], state: Mapping[str, ArrayLike]) -> None:
    """Fill arrays with those of the same names, if all shapes fit."""
    for name, array in arrays.items():
        if (shape := np.shape(state[name])) != array.shape:
            raise ShapeError(f"state: expected {name} of shape {array.shape}, got {shape}")
    for name, array in arrays.items():
        array[...] = state[name]


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def float_type(dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype of parameters: float32 or float64."""
    if (kind := np.dtype(dtype)) not in (np.float32, np.float64):
        raise DTypeError(f"dtype: expected float32 or float64, got {kind}")
    return kind


def at_least_one(**sizes: int) -> None:
    """Refuse sizes below 1, by name."""
    for name, size in sizes.items():
        integer(name, size, 1)


def integer(name: str, value: Any, least: int) -> int:
    """The value, if it is an integer and large enough."""
    try:
        found = operator.index(value)
    except TypeError:
        raise DTypeError(f"{name}: expected an int, got {value!r}") from None
    if found < least:
        raise ArgumentError(f"{name}: expected at least {least}, got {found}")
    return found


def check_dropout(p: float) -> None:
    """Refuse what is no probability."""
    if not 0 <= p <= 1:
        raise ArgumentError(f"dropout: expected a number from 0 to 1, got {p}")


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse an option that is not among its choices."""
    if value not in (choices := tuple(choices)):
        raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
