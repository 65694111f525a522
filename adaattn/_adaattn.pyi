from typing import Any

GPU_PRODUCTS: tuple[str, ...]
RUNGS: tuple[str, ...]
CANDIDATES: tuple[str, ...]
HEAD_FIELDS: tuple[str, ...]

def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    causal: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    kv_lengths: Any,
    query_offset: Any,
    scale: Any,
    dropout_p: Any,
    seed: Any,
    precision: Any,
    tolerance: Any,
    min_precision: Any,
    max_precision: Any,
    structure: Any,
    min_rank: Any,
    max_rank: Any,
    verify: Any,
    rates: Any,
    choices: Any,
    plan_only: bool,
    return_lse: Any,
    return_report: Any,
    out: Any,
    num_threads: Any,
    allocate: Any,
    device: Any,
    /,
) -> Any: ...
def attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    attn_mask: Any,
    causal: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    kv_lengths: Any,
    query_offset: Any,
    scale: Any,
    dropout_p: Any,
    seed: Any,
    needs: Any,
    precision: Any,
    tolerance: Any,
    verify: Any,
    rates: Any,
    return_report: Any,
    num_threads: Any,
    allocate: Any,
    /,
) -> tuple[Any, ...]: ...
def linear(
    packed: tuple[Any, ...],
    x: Any,
    bias: Any,
    tolerance: Any,
    first: int,
    report: bool,
    num_threads: Any,
    /,
) -> Any: ...
def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, allocate: Any, /) -> Any: ...
def _cache_count(cache_key: Any, cache_value: Any, key: Any, value: Any, /) -> int: ...
def _cache_append(
    cache_key: Any, cache_value: Any, key: Any, value: Any, lengths: Any, counts: Any, /
) -> None: ...
def _cache_code(stored: Any, values: bool, until: Any, /) -> None: ...
def _cache_reopen(stored: Any, sequence: int, page: int, /) -> None: ...
def cpu_info() -> dict[str, Any]: ...
def _store_bytes(dtype: str, kv_heads: int, head_size: int, value_size: int, /) -> tuple[int, int]: ...
def _store_address(array: Any, /) -> int: ...
def _store_stream(like: Any, /) -> int: ...
def _store_set(like: Any, table: int, at: Any, addresses: Any, /) -> None: ...
def _store_copy(like: Any, to: Any, source: Any, nbytes: int, /) -> None: ...
def _store_count(paged: Any, key: Any, value: Any, /) -> int: ...
def _store_append(paged: Any, key: Any, value: Any, lengths: Any, counts: Any, /) -> None: ...
def _store_reopen(like: Any, paged: Any, sequences: Any, pages: Any, /) -> None: ...
def _store_read(like: Any, paged: Any, lengths: Any, /) -> tuple[Any, Any, Any]: ...
def _gpu_numbers(array: Any, /) -> Any: ...
def _gpu_load(path: Any, /) -> None: ...
def _gpu_allocate(device: int, stream: int, nbytes: int, /) -> Any: ...
def _gpu_export(memory: Any, device: int, shape: tuple[int, ...], dtype: str, /) -> Any: ...
def _gpu_order(device: int, earlier: int, later: int, /) -> None: ...
def _gpu_captured(device: int, stream: int, /) -> bool: ...
def _gpu_linear(
    x: Any, weight: Any, bias: Any, product: int, features: tuple[int, ...], allocate: Any, /
) -> tuple[Any, float] | None: ...
def _gpu_open_blas(path: Any, device: int, /) -> None: ...
def _gpu_describe() -> tuple[str, int, int, list[tuple[str, int, int, int, int, int]]]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int | None, /) -> None: ...
def _lend_team(team: int, size: int, /) -> None: ...
def _alloc_fail_after(n: int, /) -> None: ...
def _plan_head(
    errors: Any,
    lse_errors: Any,
    rates: Any,
    finite: bool,
    tolerance: float,
    margin: float,
    lse: bool,
    dearest: int,
    cheapest: int,
    operations: float,
    elements: float,
    D: int,
    plain: int,
    /,
) -> int: ...
def _narrow_fault(factor: float, /) -> None: ...
def _sample_rows(shares: Any, n: int, stream: int, /) -> list[tuple[int, float]]: ...
def _limit_error(error2: Any, weight: Any, /) -> tuple[float, float, float]: ...
