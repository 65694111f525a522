"""`adaattn profile`: the attention of somebody's model or script, watched, and what budgets would save in it.

Everything goes to AdaAttn, exact: models of transformers by the integration, other PyTorch by its function in
the place of torch's own. The largest call of each module is kept with copies of its arrays, and afterwards
planned and timed within several tolerances beside the exact one, taking turns.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from .. import api
from ..demo import DATA
from ..errors import ArgumentError
from ..nn.stats import rungs
from ..rates import RUNGS
from ..stats import Plan, Report
from .results import known, shape_text, way_text
from .tables import Table, duration
from .timing import Runner, ratio, take_turns, timer

TOLERANCES = (1e-3, 1e-2, 5e-2)
FEW = 8  # queries: such calls wait for memory, and a budget changes nothing
_OPTIONS = (
    "attn_mask", "causal", "window", "softcap", "alibi_slopes", "sinks", "kv_lengths", "query_offset",
    "scale",
)  # fmt: skip


@dataclass
class HeadChoice:
    """One head within a tolerance; `saves` is the predicted share of its time, None where it is not known."""

    batch: int
    head: int
    rung: str
    structure: str
    predicted: float | None
    measured: float | None
    cheaper: bool
    saves: float | None


@dataclass
class Within:
    """A layer within one tolerance; `speedup` over exact, with planning and verifying."""

    tolerance: float
    seconds: float
    speedup: float
    retried: int
    heads: list[HeadChoice]

    @property
    def cheaper(self) -> list[HeadChoice]:
        return [head for head in self.heads if head.cheaper]


@dataclass
class Layer:
    """The largest call of a module, and how many it made."""

    name: str
    calls: int
    shape: list[int]  # B, H, T, S, D
    dtype: str
    seconds: float
    within: list[Within]


@dataclass
class Profile:
    """Layers in the order of their first call; `few` calls had at most 8 queries, `foreign` were on a GPU."""

    subject: str
    few: int
    foreign: int
    layers: list[Layer]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


# ---- recording


@dataclass
class _Call:
    """The largest of a module's calls so far, with arrays of its own."""

    calls: int = 0
    size: int = 0
    arrays: tuple[Any, ...] = ()
    options: dict[str, Any] | None = None


class Recorder:
    """In the place of `adaattn.attention`: computes, and keeps what was asked for."""

    def __init__(self, attention: Callable[..., Any]) -> None:
        self.attention = attention
        self.found: dict[str, _Call] = {}
        self.few = self.foreign = 0
        self.modules: list[Any] = []  # of torch, from the outermost that is being called
        self.names: dict[int, str] = {}
        self.alive: list[Any] = []  # so that no id is used twice

    def __call__(self, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        result = self.attention(query, key, value, *rest, **options)
        if options.get("device") is not None or not _on_cpu(query):
            self.foreign += 1
        elif query.shape[2] <= FEW:
            self.few += 1
        else:
            call = self.found.setdefault(self.name(), _Call())
            call.calls += 1
            size = int(np.prod(query.shape)) * int(key.shape[2])
            if size > call.size:
                call.size = size
                call.arrays = tuple(map(_copy, (query, key, value)))
                call.options = {name: _copy(options[name]) for name in _OPTIONS if name in options}
        return result

    def name(self) -> str:
        """Of the module of torch or `adaattn.nn` that calls, or else of the line of the program."""
        if self.modules:
            root, own = self.modules[0], self.modules[-1]
            if id(own) not in self.names:
                self.alive.append(own)
                path = next((path for path, module in root.named_modules() if module is own), "")
                self._name(own, path or type(own).__name__)
            return self.names[id(own)]
        frame = sys._getframe(2)
        package = str(Path(__file__).parents[1])
        while frame.f_back and frame.f_code.co_filename.startswith(package):
            owner = frame.f_locals.get("self")
            if type(owner).__module__.startswith("adaattn.nn."):
                if id(owner) not in self.names:
                    self.alive.append(owner)
                    self._name(owner, type(owner).__name__)
                return self.names[id(owner)]
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"

    def _name(self, module: Any, name: str) -> None:
        """Numbered where another one has that name."""
        taken = set(self.names.values())
        numbered = (name if i == 0 else f"{name} ({i})" for i in range(len(taken) + 1))
        self.names[id(module)] = next(x for x in numbered if x not in taken)


def _on_cpu(x: Any) -> bool:
    return isinstance(x, np.ndarray) or getattr(getattr(x, "device", None), "type", "") == "cpu"


def _copy(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x.copy()
    return x.detach().clone() if hasattr(x, "detach") else x


@contextmanager
def recording() -> Iterator[Recorder]:
    """Everything that computes attention by AdaAttn, torch or transformers is recorded."""
    import adaattn

    recorder = Recorder(api.attention)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(api, "attention", recorder))
        stack.enter_context(mock.patch.object(adaattn, "attention", recorder))
        if find_spec("torch"):
            _watch_torch(recorder, stack)
        yield recorder


def _watch_torch(recorder: Recorder, stack: ExitStack) -> None:
    import torch
    from torch.nn.modules import module as modules

    from ..integrations import torch as integration

    def enter(module: Any, _: Any) -> None:
        recorder.modules.append(module)

    def leave(module: Any, *_: Any) -> None:
        while recorder.modules and recorder.modules.pop() is not module:
            pass

    before = modules.register_module_forward_pre_hook(enter)
    after = modules.register_module_forward_hook(leave, always_call=True)
    stack.callback(before.remove)
    stack.callback(after.remove)
    function = integration.scaled_dot_product_attention
    stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", function))
    fast = torch.backends.mha.get_fastpath_enabled()  # would pass torch's function by
    torch.backends.mha.set_fastpath_enabled(False)
    stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
    if find_spec("transformers"):
        from ..integrations import transformers

        transformers.register("adaattn")


# ---- what is run


def run_script(path: str, arguments: Sequence[str]) -> None:
    """As `python SCRIPT ARGUMENTS` would; what it prints is its own affair.

    Raises
    ------
    ArgumentError
        It ends with an exit code other than 0.
    """
    with (
        mock.patch.object(sys, "argv", [path, *arguments]),
        mock.patch.object(sys, "path", [str(Path(path).resolve().parent), *sys.path]),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise ArgumentError(f"{path}: expected exit code 0, got {end.code}") from None


def run_model(folder: str, tokens: int, text: str | None) -> None:
    """One pass of a model of transformers over a text.

    Raises
    ------
    ImportError
        Without transformers.
    ArgumentError
        The folder has no model that reads tokens.
    """
    if find_spec("transformers") is None or find_spec("torch") is None:
        raise ImportError(
            "transformers: expected this package, got none; run `pip install adaattn[transformers]`"
        )
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(
            folder, attn_implementation="adaattn", local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{folder}: expected a model of transformers, got {error}") from None
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise ArgumentError(f"{folder}: expected a model that reads tokens, got {config.model_type!r}")
    length = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
    ids = _tokens(transformers, folder, text, length)
    if len(ids) < length and text is None:
        ids = np.random.default_rng(0).integers(0, vocabulary, length).tolist()
    inputs = {"input_ids": torch.tensor([ids])}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        model.eval()(**inputs)


def _tokens(transformers: Any, folder: str, text: str | None, length: int) -> list[int]:
    """Of the text, or the package's English one, at most `length`; none without a tokenizer or its words."""
    source = DATA / "english.txt" if text is None else Path(text)
    content = source.read_text(encoding="utf-8")
    with suppress(Exception):  # whatever a folder without one makes transformers raise
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids: list[int] = tokenizer(content, truncation=True, max_length=length)["input_ids"]
        if not set(ids) <= set(tokenizer.all_special_ids):
            return ids
    if text is not None:
        raise ArgumentError(f"--text: expected a tokenizer in {folder!r}, got none")
    return []


# ---- what budgets would do


def profile(
    subject: str,
    arguments: Sequence[str] = (),
    *,
    tolerances: Sequence[float] = TOLERANCES,
    tokens: int = 512,
    text: str | None = None,
    rounds: int = 5,
    progress: Callable[[str, float], None] = lambda step, done: None,
) -> Profile:
    """Run a script, or the model in a folder, and try budgets on its attention.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder.
    ArgumentError
        It is no script and no model, or computes no attention that could be recorded.
    """
    for t in tolerances:
        if not 0 < t < 1:
            raise ArgumentError(f"--tolerances: expected numbers between 0 and 1, got tolerance {t:g}")
    if tokens <= FEW:
        raise ArgumentError(f"--tokens: expected at least {FEW + 1}, got {tokens}")
    if not os.path.exists(subject):
        raise FileNotFoundError(f"{subject}: expected a Python script or a model's folder, got no such file")
    progress(f"running {subject}", 0.0)
    with recording() as recorder:
        if os.path.isdir(subject):
            run_model(subject, tokens, text)
        else:
            run_script(subject, arguments)
    if not recorder.found:
        raise ArgumentError(
            f"{subject}: expected attention with more than {FEW} queries on the CPU, got "
            f"{recorder.few} calls with fewer and {recorder.foreign} on a GPU"
        )
    layers = []
    for i, (name, call) in enumerate(recorder.found.items()):
        progress(name, i / len(recorder.found))
        layers.append(_try(name, call, tolerances, rounds))
    progress("done", 1.0)
    return Profile(subject, recorder.few, recorder.foreign, layers)


def _try(name: str, call: _Call, tolerances: Sequence[float], rounds: int) -> Layer:
    attend = partial(api.attention, *call.arrays, **(call.options or {}))
    runners = [Runner("exact", timer(attend))]
    runners += [Runner(f"{t:g}", timer(partial(attend, tolerance=t))) for t in tolerances]
    for runner in runners:
        runner.calibrate(0.005)
    take_turns(runners, rounds, budget=5.0)
    exact, *others = runners
    within = []
    for t, runner in zip(tolerances, others, strict=True):
        report = attend(tolerance=t, return_report=True)[1]
        speedup, retried = ratio(exact, runner)[1], int(report.retried.sum())
        within.append(Within(t, runner.seconds, speedup, retried, list(_heads(report))))
    query, key, _ = call.arrays
    B, H, T, D = query.shape
    dtype = str(query.dtype).removeprefix("torch.")
    return Layer(name, call.calls, [B, H, T, int(key.shape[2]), D], dtype, exact.seconds, within)


def _heads(report: Report) -> Iterator[HeadChoice]:
    plan: Plan | None = report.plan
    assert plan is not None
    for at, rung in zip(np.ndindex(report.retried.shape), rungs(report), strict=True):
        structure, saves = str(report.structure[at]), None
        if structure == "dense" and rung in plan.candidates:
            seconds = dict(zip(plan.candidates, plan.candidate_seconds[at], strict=True))
            saves = known(1 - seconds[rung] / seconds["fp32"])
        yield HeadChoice(
            at[0],
            at[1],
            rung,
            structure,
            known(report.predicted_error[at]),
            known(report.measured_error[at]),
            structure != "dense" or rung not in ("fp32", "fp64"),
            saves,
        )


# ---- as text


def tables(found: Profile) -> Iterator[Table]:
    """A line for each layer, then one for each head of the first sequence that may be cheaper."""
    tolerances = [one.tolerance for one in found.layers[0].within]
    rows = []
    for layer in found.layers:
        row = [
            layer.name, str(layer.calls), shape_text(layer.shape), layer.dtype, duration(layer.seconds)
        ]  # fmt: skip
        for one in layer.within:
            row += [f"{len(one.cheaper)}/{len(one.heads)}", f"{one.speedup:.2f}"]
        rows.append(row)
    total = sum(layer.seconds for layer in found.layers)
    row = ["all", "", "", "", duration(total)]
    for i in range(len(tolerances)):
        ones = [layer.within[i] for layer in found.layers]
        cheaper, heads = (sum(len(getattr(one, name)) for one in ones) for name in ("cheaper", "heads"))
        row += [f"{cheaper}/{heads}", f"{total / sum(one.seconds for one in ones):.2f}"]
    rows.append(row)
    header = ["module", "calls", "B,H,T:S,D", "dtype", "exact"]
    header += [text for t in tolerances for text in (f"cheaper at {t:g}", "x exact")]
    yield Table("Heads that could be cheaper, and how fast their layer is then", header, rows)

    rows = []
    for layer in found.layers:
        for b, h in np.ndindex(1, layer.shape[1]):
            choices = [one.heads[b * layer.shape[1] + h] for one in layer.within]
            if any(choice.cheaper for choice in choices):
                rows.append([layer.name, str(h), *map(_choice, choices)])
    if rows:
        header = ["module", "head", *(f"at {t:g}" for t in tolerances)]
        yield Table("What a head would be computed with, and the share of its time that saves", header, rows)


def _choice(choice: HeadChoice) -> str:
    if not choice.cheaper:
        return choice.rung
    name = way_text(choice.rung, choice.structure)
    return name if choice.saves is None else f"{name}, -{choice.saves:.0%}"


def summary(found: Profile) -> str:
    """What to do with it, in sentences."""
    total = sum(layer.seconds for layer in found.layers)
    lines = []
    gains = []
    for i, one in enumerate(found.layers[0].within):
        seconds = sum(layer.within[i].seconds for layer in found.layers)
        gains.append((total / seconds, one.tolerance))
    best, tolerance = max(gains)
    if best > 1.05:
        lines.append(
            f"The largest calls together take {duration(total)}; within a tolerance of {tolerance:g} "
            f"{duration(total / best)}."
        )
    else:
        lines.append(f"No tolerance saves more than 5 % of the {duration(total)} of the largest calls.")
    if found.few:
        lines.append(f"{found.few} calls had at most {FEW} queries: they wait for memory.")
    if found.foreign:
        lines.append(f"{found.foreign} calls were on a GPU and are left out.")
    offered = api.cpu_info()["rates"]["offered"]
    cheap = [rung for rung in RUNGS if rung in offered and rung not in ("fp64", "fp32")]
    lines.append(f"Faster than fp32 on this machine: {', '.join(cheap) or 'nothing'}.")
    return "\n".join(lines)
