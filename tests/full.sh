#!/usr/bin/env bash
# Everything, for the environment that the package and its tests are installed in: the whole suite with --full under
# every ADAATTN_ISA of the machine, then all but its slowest parts on an engine built with sanitizers. Takes hours.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
failed=()

for isa in $(cd tests && "$python" -c 'from test_isa import machine_isas; print(*machine_isas())'); do
    echo "== ADAATTN_ISA=$isa"
    ADAATTN_ISA=$isa "$python" -m pytest --full "$@" || failed+=("$isa")
done

echo "== address and undefined behaviour sanitizers"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -z --cached --others --exclude-standard | tar -c --null --files-from=- | tar -x -C "$work"
(
    cd "$work"
    ADAATTN_SANITIZE=address,undefined "$python" setup.py --quiet build_ext --inplace
    export LD_PRELOAD="$(cc -print-file-name=libasan.so) $(cc -print-file-name=libubsan.so)"
    export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1
    "$python" -m pytest tests/test_{attention,bits,nan,fuzz,errors,dlpack,nn}.py "$@"
) || failed+=("sanitizers")

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all passed"
