"""What training needs besides gradients: a loss, an optimiser, clipping and a schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ArgumentError, DTypeError, ShapeError
from .module import Array, Module, copy_into


def cross_entropy(logits: Array, targets: ArrayLike, *, ignore_index: int = -100) -> tuple[float, Array]:
    """Mean negative log-likelihood, in nats, of target tokens, and its gradient.

    Parameters
    ----------
    logits : (..., V) float array
    targets : (...) ints
        From 0 to V - 1; `ignore_index` does not count.
    ignore_index : int
        Marks what does not count.

    Returns
    -------
    loss : float
        NaN where nothing counts.
    gradient : array of the shape and dtype of `logits`
        Zero where the target does not count.
    """
    targets = np.asarray(targets)
    if targets.dtype.kind not in "iu":
        raise DTypeError(f"targets: expected integers, got {targets.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ShapeError(f"targets: expected shape {logits.shape[:-1]}, got {targets.shape}")
    V = logits.shape[-1]
    counts, ids = (targets != ignore_index).reshape(-1), targets.reshape(-1)
    valid = ids[counts]
    if valid.size and (valid.min() < 0 or valid.max() >= V):
        raise ArgumentError(
            f"targets: expected {ignore_index} or ids from 0 to {V - 1}, got {valid.min()} to {valid.max()}"
        )
    rows, at = logits.reshape(-1, V), np.where(counts, ids, 0)[:, None]
    gradient = rows - rows.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(gradient, at, 1)[:, 0].astype(np.float64)
    np.exp(gradient, out=gradient)
    total = gradient.sum(axis=1, keepdims=True)
    loss = np.log(total[:, 0], dtype=np.float64) - chosen
    gradient /= total
    gradient[np.arange(len(rows)), at[:, 0]] -= 1
    gradient *= counts[:, None] * logits.dtype.type(1 / max(valid.size, 1))
    mean = float(loss[counts].mean()) if valid.size else math.nan
    return mean, gradient.reshape(logits.shape)


def clip_grad_norm(module: Module, max_norm: float) -> float:
    """Scale all gradients of a module down so that their norm together is at most `max_norm`.

    Returns the norm that they had. Where it is not finite, so are they afterwards: nothing is hidden.
    """
    if not 0 < max_norm < math.inf:
        raise ArgumentError(f"max_norm: expected a finite number above 0, got {max_norm}")
    gradients = module.gradients().values()
    norm = math.sqrt(sum(float(np.vdot(x, x)) for x in gradients))
    if not norm <= max_norm:
        for gradient in gradients:
            gradient *= gradient.dtype.type(max_norm / norm)
    return norm


def cosine_schedule(step: int, *, total: int, peak: float, warmup: int = 0, floor: float = 0.0) -> float:
    """Learning rate of step 0, 1, …: up linearly to `peak` over `warmup` steps, then half a cosine down to
    `floor` at step `total`, and `floor` from there on (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    if not 0 <= warmup <= total or step < 0:
        raise ArgumentError(
            f"warmup: expected 0 <= warmup <= total and 0 <= step, got {warmup}, {total} and {step}"
        )
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Parameters
    ----------
    module : Module
        Whose parameters `step` changes, by the gradients that it has.
    lr : float
        Learning rate, an attribute too.
    betas : (float, float)
        Decay of the means of gradients and of their squares.
    eps : float
        Added to the root of the latter.
    weight_decay : float
        Times the learning rate, of parameters with two or more axes: biases and norms do not decay.
    """

    def __init__(
        self,
        module: Module,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ArgumentError(f"betas: expected numbers from 0 to below 1, got {betas}")
        self.module, self.lr, self.betas, self.eps, self.weight_decay = module, lr, betas, eps, weight_decay
        self.steps = 0
        self._means = {name: np.zeros_like(x) for name, x in module.state_dict().items()}
        self._squares = {name: np.zeros_like(x) for name, x in module.state_dict().items()}

    def step(self) -> None:
        """Change the parameters, in place."""
        self.steps += 1
        first, second = self.betas
        fix = 1 - first**self.steps, math.sqrt(1 - second**self.steps)
        gradients = self.module.gradients()
        for name, parameter in self.module.state_dict().items():
            kind, gradient = parameter.dtype.type, gradients[name]
            mean, square = self._means[name], self._squares[name]
            mean += kind(1 - first) * (gradient - mean)
            square += kind(1 - second) * (gradient * gradient - square)
            if parameter.ndim > 1:
                parameter *= kind(1 - self.lr * self.weight_decay)
            root = np.sqrt(square)
            root /= kind(fix[1])
            root += kind(self.eps)
            np.divide(mean, root, out=root)
            root *= kind(self.lr / fix[0])
            parameter -= root

    def state_dict(self) -> dict[str, Array]:
        """All that `step` remembers, by name: the arrays themselves, and the number of steps."""
        state = {f"mean.{name}": x for name, x in self._means.items()}
        state |= {f"square.{name}": x for name, x in self._squares.items()}
        return state | {"steps": np.array(self.steps)}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Continue from another optimiser's state.

        Raises
        ------
        ArgumentError, ShapeError
            When it does not fit, by name; nothing is changed then.
        """
        own: dict[str, Any] = self.state_dict()
        if wrong := own.keys() ^ state.keys():
            raise ArgumentError(
                f"state: expected that of AdamW for this module, got it but for {sorted(wrong)}"
            )
        copy_into(own, state)
        self.steps = int(own["steps"])
