"""Exceptions of the package. Each message is one sentence: the argument, what was expected, what came."""


class Error(Exception):
    """Base of every exception that AdaAttn defines."""


class ArgumentError(Error, ValueError):
    """An argument has a value that its contract excludes."""


class ShapeError(ArgumentError):
    """An array has the wrong number of dimensions or sizes that do not fit the other arguments."""


class DTypeError(Error, TypeError):
    """An argument has a type or dtype that is not taken there."""


class DeviceError(Error, RuntimeError):
    """A device cannot be used, or arrays lie on devices that do not fit together."""


class NumericalError(Error, ArithmeticError):
    """A result could not be computed to the accuracy that was asked for."""
