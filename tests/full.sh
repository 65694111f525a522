#!/usr/bin/env bash
# Everything, for the environment that the package and its tests are installed in: the whole suite with --full under
# every ADAATTN_ISA of the machine, then all but its slowest parts on an engine built with sanitizers, then what
# threads share on one that looks for races, then the coverage of Python and C. Takes hours.
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
    # What is freed is kept for a while: few megabytes, as tests look at the memory that calls take.
    export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=4
    export UBSAN_OPTIONS=halt_on_error=1
    "$python" -m pytest tests/test_{attention,backward,bits,budget,cache,certified,dlpack,errors,fuzz,linear,lowrank}.py \
        tests/test_{nan,nn,nn_gradients,nn_rank,plan,promise,report,rungs,sampling,sparse,torch}.py "$@"
) || failed+=("sanitizers")

echo "== thread sanitizer, without AVX-512: it does not see what those kernels load and store"
work=$(mktemp -d)
git ls-files -z --cached --others --exclude-standard | tar -c --null --files-from=- | tar -x -C "$work"
(
    cd "$work"
    ADAATTN_SANITIZE=thread "$python" setup.py --quiet build_ext --inplace
    export LD_PRELOAD="$(cc -print-file-name=libtsan.so)" ADAATTN_ISA=avx2 OPENBLAS_NUM_THREADS=1
    export TSAN_OPTIONS=exitcode=66:report_signal_unsafe=0
    # Without addresses at random, which the sanitizer cannot always place itself among.
    setarch -R "$python" -m pytest tests/test_{budget,certified,gradient_budget,linear}.py "$@"
) || failed+=("thread sanitizer")

echo "== coverage"
work=$(mktemp -d)
git ls-files -z --cached --others --exclude-standard | tar -c --null --files-from=- | tar -x -C "$work"
(
    cd "$work"
    ADAATTN_COVERAGE=1 ADAATTN_WERROR=1 "$python" setup.py --quiet build_ext --inplace --build-temp build/coverage
    "$python" -m pytest -q --cov=adaattn --cov-report=term --ignore=tests/test_sdpa_grid.py \
        --ignore=tests/test_native.py | tail -n 25
    find build/coverage -name '*.gcda' -exec gcov --no-output {} + 2>/dev/null | awk '
        /^File/ { file = $2; gsub("\x27", "", file) }
        /^Lines executed/ && file ~ /^csrc\// {
            split($0, part, /[:%]| of /)
            lines[file] += part[4]; hit[file] += part[2] * part[4] / 100
            all += part[4]; all_hit += part[2] * part[4] / 100
            file = ""  # a total without a file of its own may follow
        }
        END {
            for (file in lines) printf "%-40s %6d lines %6.1f%%\n", file, lines[file], 100 * hit[file] / lines[file] | "sort"
            close("sort")
            if (all) printf "%-40s %6d lines %6.1f%%\n", "C in total", all, 100 * all_hit / all
        }'
) || failed+=("coverage")

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all passed"
