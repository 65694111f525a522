/* The extension module adaattn._adaattn: arguments in, one engine call without the GIL, arrays out. */
#include "binding.h"

#include <stdlib.h>
#include <string.h>

#include "../attend.h"
#include "../codes.h"
#include "../cpu.h"
#include "../gpu.h"
#include "../gpu_store.h"
#include "../kernels.h"
#include "../parallel.h"

#ifndef ADA_BUILD_LEFT_OUT
#    define ADA_BUILD_LEFT_OUT                                                                               \
        "" /* "isa: reason" of each ISA that the compiler could not build, "; " between */
#endif

static ada_module_state *state_of(PyObject *module) { return PyModule_GetState(module); }

/* ---- precision ---- */

/* "auto" or a rung. */
static int rung_of(const ada_module_state *state, PyObject *object, const char *argument, ada_rung *rung) {
    static const char expected[] =
        "'auto', 'fp64', 'fp32', 'bf16x6', 'bf16x3', 'fp16', 'int16', 'bf16', 'int8' or 'fp8'";
    const char *names[ADA_RUNG_COUNT];
    int index;
    for (int i = 0; i < ADA_RUNG_COUNT; i++) names[i] = ada_rung_name((ada_rung)i);
    if (ada_name_of(state, object, argument, expected, names, ADA_RUNG_COUNT, &index)) return -1;
    *rung = (ada_rung)index;
    return 0;
}

/* ---- attention ---- */

bool ada_interrupted(void *context) {
    ada_released_gil *gil = context;
    PyEval_RestoreThread(gil->thread);
    bool raised = PyErr_CheckSignals() != 0;
    gil->thread = PyEval_SaveThread();
    return raised;
}

PyObject *ada_new_output(PyObject *query, PyObject *allocate, ada_dtype dtype, int ndim,
                         const int64_t *shape) {
    if (ada_is_numpy(query)) return ada_new_array(dtype, ndim, shape, query);
    PyObject *sizes = PyTuple_New(ndim);
    if (!sizes) return NULL;
    for (int i = 0; i < ndim; i++) {
        PyObject *size = PyLong_FromLongLong(shape[i]);
        if (!size) {
            Py_DECREF(sizes);
            return NULL;
        }
        PyTuple_SET_ITEM(sizes, i, size);
    }
    PyObject *array = PyObject_CallFunction(allocate, "OOs", query, sizes, ada_dtype_name(dtype));
    Py_DECREF(sizes);
    return array;
}

PyDoc_STRVAR(
    attention_doc,
    "attention($module, query, key, value, attn_mask, causal, window, softcap, alibi_slopes, "
    "sinks, kv_lengths, query_offset, scale, dropout_p, seed, precision, tolerance, min_precision, "
    "max_precision, structure, min_rank, max_rank, verify, rates, choices, plan_only, return_lse, "
    "return_report, out, "
    "num_threads, "
    "allocate, device, /)\n--\n\n"
    "adaattn.attention with every argument by position. rates: float64 (len(CANDIDATES), 3), or with "
    "a column of what a sparse head leaves, 4, and rows missing in the end are 0: not computed; choices: "
    "None, or of a plan (sizes, and float64 of all heads: "
    "indices into RUNGS of the scores, then of the values, predicted errors, sparse budgets, joints, kept "
    "shares, ranks, their gains and limits). "
    "allocate(query, shape, dtype) makes outputs where query is not a NumPy array. A report is "
    "float64 (B, H, len(HEAD_FIELDS)), the seconds of the phases, the operations of the call and "
    "its sizes (B, H, G, T, S, D, E, dtype), what rules out (sparse, low rank) heads, or None, and a "
    "picture of the blocks that sparse heads kept, or None; "
    "plan_only returns nothing else.");

/* A row of the report, and the names of its numbers. */
enum { HEAD_SCALARS = 22, HEAD_COLUMNS = HEAD_SCALARS + 3 * ADA_CANDIDATES };
static const char *const head_fields[HEAD_SCALARS] = {
    "precision_qk",  "precision_pv", "retried",       "finite",          "profiled_rows",  "verified_rows",
    "sparse_budget", "sparse_joint", "kept_fraction", "predicted_error", "measured_error", "error_limit",
    "error_bound",   "lse_error",    "entropy",       "entropy_std",     "block_entropy",  "local_entropy",
    "score_std",     "rank",         "rank_gain",     "rank_limit"};

static void fill_row(double *row, const ada_head *head) {
    const ada_forecast *f = &head->forecast;
    const double scalars[HEAD_SCALARS] = {
        head->choice.qk,      head->choice.pv,   head->retried,     f->finite,       f->rows,
        head->verified_rows,  head->budget2,     head->joint,       head->kept,      head->predicted_error,
        head->measured_error, head->error_limit, head->error_bound, head->lse_error, f->entropy,
        f->entropy_std,       f->block_entropy,  f->local_entropy,  f->score_std,    head->rank,
        head->rank_gain,      head->rank_limit};
    memcpy(row, scalars, sizeof scalars);
    memcpy(row + HEAD_SCALARS, f->error, sizeof f->error);
    memcpy(row + HEAD_SCALARS + ADA_CANDIDATES, f->lse_error, sizeof f->lse_error);
    memcpy(row + HEAD_SCALARS + 2 * ADA_CANDIDATES, head->seconds, sizeof head->seconds);
}

static PyObject *sizes_of(const ada_problem *p) {
    return Py_BuildValue("(LLLLLLLs)", (long long)p->B, (long long)p->H, (long long)p->G, (long long)p->T,
                         (long long)p->S, (long long)p->D, (long long)p->E, ada_dtype_name(p->query.dtype));
}

/* Shares of the blocks that sparse heads kept, (B, H, rows, columns): NaN where none is visible, and for
 * other heads; None where no head is sparse. */
static PyObject *new_picture(const ada_module_state *state, const ada_problem *p, const ada_budget *budget) {
    const ada_picture *from = budget->picture;
    bool some = false;
    for (int64_t i = 0; from && i < p->B * p->H; i++) some |= budget->heads[i].budget2 > 0;
    if (!some || budget->plan_only) Py_RETURN_NONE;
    const int64_t shape[4] = {p->B, p->H, from->rows, from->columns}, cells = shape[2] * shape[3];
    ada_view view = {0};
    PyObject *picture = ada_new_array(ADA_F32, 4, shape, NULL);
    if (!picture || ada_view_of(state, picture, "report", true, &ada_on_cpu, &view)) {
        Py_XDECREF(picture);
        return NULL;
    }
    float *to = view.array.data;
    for (int64_t i = 0; i < p->B * p->H * cells; i++) {
        const bool sparse = budget->heads[i / cells].budget2 > 0 && from->visible[i] > 0;
        to[i] = sparse ? (float)from->kept[i] / (float)from->visible[i] : NAN;
    }
    ada_view_release(&view);
    return picture;
}

static PyObject *new_report(const ada_module_state *state, const ada_problem *p, const ada_budget *budget) {
    const int64_t shape[3] = {p->B, p->H, HEAD_COLUMNS};
    ada_view view = {0};
    PyObject *table = ada_new_array(ADA_F64, 3, shape, NULL), *report = NULL;
    PyObject *picture = new_picture(state, p, budget);
    if (table && picture && ada_view_of(state, table, "report", true, &ada_on_cpu, &view) == 0) {
        for (int64_t i = 0; i < p->B * p->H; i++)
            fill_row((double *)view.array.data + i * HEAD_COLUMNS, &budget->heads[i]);
        const double *s = budget->seconds;
        report = Py_BuildValue("(O(dddd)dN(zz)O)", table, s[0], s[1], s[2], s[3], ada_operations(p),
                               sizes_of(p), ada_rules_out(p, ADA_STRUCTURE_SPARSE),
                               ada_rules_out(p, ADA_STRUCTURE_LOW_RANK), picture);
    }
    ada_view_release(&view);
    Py_XDECREF(picture);
    Py_XDECREF(table);
    return report;
}

/* Memory for a picture; heads of fewer queries or keys than a tile and a block have none. */
static int alloc_picture(const ada_problem *p, ada_picture *to) {
    const int64_t tiles = p->T / ADA_LANES, blocks = p->S / ADA_BLOCK;
    to->rows = (int)(tiles < ADA_PICTURE_MOST ? tiles : ADA_PICTURE_MOST);
    to->columns = (int)(blocks < ADA_PICTURE_MOST ? blocks : ADA_PICTURE_MOST);
    const size_t cells = (size_t)(p->B * p->H) * (size_t)to->rows * (size_t)to->columns;
    if (cells == 0) return 0;
    to->visible = PyMem_Calloc(2 * cells, sizeof *to->visible);
    if (!to->visible) return -1;
    to->kept = to->visible + cells;
    return 0;
}

/* Whether a plan is for this problem; raises where it is not. */
static bool fits(const ada_module_state *state, const ada_problem *p, PyObject *planned) {
    PyObject *sizes = sizes_of(p);
    const int same = sizes ? PyObject_RichCompareBool(sizes, planned, Py_EQ) : -1;
    if (same == 0)
        PyErr_Format(state->argument_error,
                     "plan: expected one for (B, H, G, T, S, D, E, dtype) = %R, got one for %R", sizes,
                     planned);
    Py_XDECREF(sizes);
    return same > 0;
}

/* Rates and a plan's choices, made by adaattn.stats alone: only what would crash is checked. */
static int budget_of(const ada_module_state *state, const ada_problem *p, PyObject *rates, PyObject *choices,
                     ada_budget *budget, ada_rate table[ADA_CANDIDATES], ada_planned **given) {
    ada_view numbers = {0};
    ada_error error;
    int failed = -1;
    if (rates != Py_None) {
        if (ada_rates_of(state, rates, table)) return -1;
        budget->rates = table;
    }
    if (choices == Py_None) return 0;
    PyObject *planned, *heads;
    enum { QK, PV, PREDICTED, BUDGET2, JOINT, KEPT, RANK, GAIN, LIMIT, NUMBERS };
    const int64_t n = p->B * p->H;
    if (!PyArg_ParseTuple(choices, "OO", &planned, &heads) || !fits(state, p, planned) ||
        ada_view_of_numbers(state, heads, "plan", ADA_F64, &numbers))
        return -1;
    const ada_array *a = &numbers.array;
    if (a->ndim != 1 || a->shape[0] != NUMBERS * n) {
        PyErr_Format(state->argument_error, "plan: expected choices for %lld heads", (long long)n);
        goto done;
    }
    *given = PyMem_Malloc((size_t)n * sizeof **given);
    if (!*given) {
        PyErr_NoMemory();
        goto done;
    }
    for (int64_t i = 0; i < n; i++) {
        double x[NUMBERS];
        for (int c = 0; c < NUMBERS; c++)
            x[c] = *(const double *)((const char *)a->data + (c * n + i) * a->stride[0]);
        if (!(x[QK] > ADA_RUNG_AUTO && x[QK] < ADA_RUNG_COUNT && x[PV] > ADA_RUNG_AUTO &&
              x[PV] < ADA_RUNG_COUNT) ||
            (x[QK] == ADA_RUNG_FP64) != (x[PV] == ADA_RUNG_FP64)) {
            PyErr_SetString(state->argument_error, "plan: expected rungs");
            goto done;
        }
        for (int c = QK; c <= PV; c++)
            if (ada_check_rung(p, "plan", (ada_rung)x[c], &error)) {
                ada_raise(state, &error);
                goto done;
            }
        (*given)[i] = (ada_planned){.choice = {(ada_rung)x[QK], (ada_rung)x[PV]},
                                    .predicted_error = x[PREDICTED],
                                    .budget2 = x[BUDGET2],
                                    .joint = x[JOINT],
                                    .kept = x[KEPT],
                                    .rank = x[RANK] >= 0 && x[RANK] <= ADA_MOST_RANK ? (int)x[RANK] : 0,
                                    .rank_gain = x[GAIN],
                                    .rank_limit = x[LIMIT]};
    }
    budget->given = *given;
    failed = 0;
done:
    ada_view_release(&numbers);
    return failed;
}

/* The one that is there, or a tuple of those that are. */
static PyObject *pack_results(PyObject *out, PyObject *lse, PyObject *report) {
    if (lse && report) return PyTuple_Pack(3, out, lse, report);
    if (lse || report) return PyTuple_Pack(2, out, lse ? lse : report);
    return Py_NewRef(out);
}

/* Limits of the landmarks, or None. */
static int ranks_of(const ada_module_state *state, PyObject *least, PyObject *most, ada_budget *budget) {
    PyObject *const args[] = {least, most};
    static const char *const names[] = {"min_rank", "max_rank"};
    int *const to[] = {&budget->least_rank, &budget->most_rank};
    for (int i = 0; i < 2; i++) {
        int64_t n = 0;
        if (args[i] == Py_None) continue;
        if (ada_integer_of(state, args[i], names[i], "an int or None", &n)) return -1;
        if (n < 1) {
            PyErr_Format(state->argument_error, "%s: expected an int of at least 1, got %R", names[i],
                         args[i]);
            return -1;
        }
        *to[i] = n < INT_MAX ? (int)n : INT_MAX;
    }
    if (budget->most_rank && budget->least_rank > budget->most_rank) {
        PyErr_Format(state->argument_error, "max_rank: expected at least min_rank=%R, got %R", least, most);
        return -1;
    }
    return 0;
}

static PyObject *attention(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    enum {
        QUERY,
        KEY,
        VALUE,
        MASK,
        CAUSAL,
        WINDOW,
        SOFTCAP,
        ALIBI,
        SINKS,
        LENGTHS,
        OFFSET,
        SCALE,
        DROPOUT,
        SEED,
        PRECISION,
        TOLERANCE,
        MIN_PRECISION,
        MAX_PRECISION,
        STRUCTURE,
        MIN_RANK,
        MAX_RANK,
        VERIFY,
        RATES,
        CHOICES,
        PLAN_ONLY,
        RETURN_LSE,
        RETURN_REPORT,
        OUT,
        NUM_THREADS,
        ALLOCATE,
        DEVICE,
        N_ARGS
    };
    enum { N_VIEWS = 10 };
    const ada_module_state *state = state_of(module);
    ada_problem p = {0};
    ada_error error;
    ada_view views[N_VIEWS] = {0};
    ada_pages pages[2];
    ada_codes codes[2];
    ada_cuda_store store;
    ada_view lse_view = {0};
    ada_budget budget = {0};
    ada_rate rates[ADA_CANDIDATES];
    ada_planned *given = NULL;
    ada_picture picture = {0};
    ada_place place = ada_on_cpu;
    PyObject *out = NULL, *lse = NULL, *report = NULL, *result = NULL;
    if (nargs != N_ARGS) {
        PyErr_Format(PyExc_TypeError, "attention: expected %d positional arguments, got %zd", N_ARGS, nargs);
        return NULL;
    }

    if ((args[DEVICE] != Py_None || !ada_is_numpy(args[QUERY])) &&
        ada_place_of(args[QUERY], args[DEVICE], &place))
        return NULL;
    p.on_gpu = place.on_gpu || place.staged, p.staged = place.staged;
    p.device = place.device, p.stream = place.stream;
    if (ada_is_paged(args[KEY]) && ada_use_paged(state, args[KEY], &place, &store, &p)) goto done;
    ada_view *view = views;
    const struct {
        int arg;
        const char *name;
        ada_array *array;
    } arrays[] = {{QUERY, "query", &p.query},
                  {KEY, "key", &p.key},
                  {VALUE, "value", &p.value},
                  {MASK, "attn_mask", &p.attn_mask}};
    for (int i = 0; i < 4; i++, view++) {
        if ((i == 3 && args[MASK] == Py_None) || (p.paged && (i == 1 || i == 2))) continue;
        PyObject *array = args[arrays[i].arg];
        const bool stored = (i == 1 || i == 2) && ada_is_stored(array);
        if (stored ? ada_view_of_stored(array, &pages[i - 1], &codes[i - 1], view)
                   : ada_view_of(state, array, arrays[i].name, false, &place, view))
            goto done;
        if (stored && p.on_gpu) {
            PyErr_Format(state->device_error, "%s: expected an array on the GPU, got a cache of the CPU",
                         arrays[i].name);
            goto done;
        }
        p.stored |= stored;
        *arrays[i].array = view->array;
    }
    p.has_tolerance = args[TOLERANCE] != Py_None;
    if (ada_options_of(state, args + CAUSAL, view, &p) || ada_threads_of(state, args[NUM_THREADS], &p) ||
        (p.has_tolerance && ada_number_of(state, args[TOLERANCE], "tolerance", &p.tolerance)) ||
        ada_precision_of(state, args[PRECISION], &p.precision) ||
        rung_of(state, args[MIN_PRECISION], "min_precision", &budget.cheapest) ||
        rung_of(state, args[MAX_PRECISION], "max_precision", &budget.dearest))
        goto done;
    if (budget.cheapest != ADA_RUNG_AUTO && budget.cheapest < budget.dearest) {
        PyErr_Format(state->argument_error,
                     "max_precision: expected a rung at least as exact as min_precision=%R, got %R",
                     args[MIN_PRECISION], args[MAX_PRECISION]);
        goto done;
    }
    if (ada_check_rung(&p, "min_precision", budget.cheapest, &error) ||
        ada_check_rung(&p, "max_precision", budget.dearest, &error)) {
        ada_raise(state, &error);
        goto done;
    }
    view += ADA_OPTION_VIEWS;
    bool return_lse, return_report;
    if (ada_flag_of(state, args[RETURN_LSE], "return_lse", &return_lse) ||
        ada_flag_of(state, args[RETURN_REPORT], "return_report", &return_report))
        goto done;
    static const char *const structures[] = {"auto", "dense", "sparse", "low_rank"};
    int structure;
    if (ada_name_of(state, args[STRUCTURE], "structure", "'auto', 'dense', 'sparse' or 'low_rank'",
                    structures, 4, &structure) ||
        ranks_of(state, args[MIN_RANK], args[MAX_RANK], &budget))
        goto done;
    budget.structure = (ada_structure)structure;
    budget.verify = PyObject_IsTrue(args[VERIFY]);
    budget.verify_all = args[VERIFY] == Py_True;
    budget.plan_only = args[PLAN_ONLY] == Py_True;
    budget.report = return_report;
    budget.asked = p.precision;
    if (ada_problem_init(&p, &error)) {
        ada_raise(state, &error);
        goto done;
    }
    budget.tolerance = p.has_tolerance ? p.tolerance : 0;
    if (budget_of(state, &p, args[RATES], args[CHOICES], &budget, rates, &given)) goto done;
    if (return_report || budget.plan_only || p.has_tolerance) {
        budget.heads = PyMem_Calloc((size_t)(p.B * p.H), sizeof *budget.heads);
        p.ran = PyMem_Malloc((size_t)(p.B * p.H) * sizeof *p.ran);
        if (!budget.heads || !p.ran || (return_report && p.has_tolerance && alloc_picture(&p, &picture))) {
            PyErr_NoMemory();
            goto done;
        }
        if (picture.visible) budget.picture = &picture;
    }

    const int64_t out_shape[4] = {p.B, p.H, p.T, p.E};
    if (budget.plan_only) {
        p.lse = return_lse ? budget.heads : NULL; /* wanted, and never written: nothing is executed */
        goto run;
    }
    out = args[OUT] != Py_None ? Py_NewRef(args[OUT])
                               : ada_new_output(args[QUERY], args[ALLOCATE], p.query.dtype, 4, out_shape);
    if (!out || ada_view_of(state, out, "out", true, &place, view)) goto done;
    p.out = view->array;
    if (ada_problem_check_out(&p, &error)) {
        ada_raise(state, &error);
        goto done;
    }
    if (return_lse) {
        lse = ada_new_output(args[QUERY], args[ALLOCATE], p.query.dtype == ADA_F64 ? ADA_F64 : ADA_F32, 3,
                             out_shape);
        if (!lse || ada_view_of(state, lse, "lse", true, &place, &lse_view)) goto done;
        p.lse = lse_view.array.data;
    }

run:;
    ada_released_gil gil = {PyEval_SaveThread()};
    ada_status status = ada_attend(&p, &budget, ada_interrupted, &gil, &error);
    if (!status && place.wait) status = ada_gpu_wait(&p, &error);
    PyEval_RestoreThread(gil.thread);
    if (status) {
        ada_raise(state, &error);
        goto done;
    }
    if ((return_report || budget.plan_only) && !(report = new_report(state, &p, &budget))) goto done;
    result = budget.plan_only ? Py_NewRef(report) : pack_results(out, lse, report);
done:
    ada_view_release(&lse_view);
    for (int i = 0; i < N_VIEWS; i++) ada_view_release(&views[i]);
    PyMem_Free(p.ran);
    PyMem_Free(budget.heads);
    PyMem_Free(picture.visible);
    PyMem_Free(given);
    Py_XDECREF(report);
    Py_XDECREF(out);
    Py_XDECREF(lse);
    return result;
}

/* ---- merge ---- */

PyDoc_STRVAR(merge_doc, "merge($module, out_a, lse_a, out_b, lse_b, allocate, /)\n--\n\nSee adaattn.merge.");

static PyObject *merge(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const char *const names[] = {"out_a", "lse_a", "out_b", "lse_b"};
    const ada_module_state *state = state_of(module);
    ada_merge_problem m = {0};
    ada_array *const arrays[] = {&m.out_a, &m.lse_a, &m.out_b, &m.lse_b, &m.out, &m.lse};
    ada_error error;
    ada_view views[6] = {0};
    PyObject *out = NULL, *lse = NULL, *result = NULL;
    if (nargs != 5) {
        PyErr_Format(PyExc_TypeError, "merge: expected 5 positional arguments, got %zd", nargs);
        return NULL;
    }
    ada_place place = ada_on_cpu;
    if (!ada_is_numpy(args[0]) && ada_place_of(args[0], Py_None, &place)) return NULL;
    for (int i = 0; i < 4; i++) {
        if (ada_view_of(state, args[i], names[i], false, &place, &views[i])) goto done;
        *arrays[i] = views[i].array;
    }
    if (ada_merge_init(&m, &error)) {
        ada_raise(state, &error);
        goto done;
    }
    out = ada_new_output(args[0], args[4], m.out_a.dtype, 4, m.out_a.shape);
    lse = out ? ada_new_output(args[0], args[4], m.lse_a.dtype, 3, m.out_a.shape) : NULL;
    if (!lse || ada_view_of(state, out, "out", true, &place, &views[4]) ||
        ada_view_of(state, lse, "lse", true, &place, &views[5]))
        goto done;
    m.out = views[4].array, m.lse = views[5].array;
    ada_released_gil gil = {PyEval_SaveThread()};
    ada_status status = place.on_gpu ? ada_gpu_merge(&m, place.device, place.stream, place.wait, &error)
                                     : ada_merge(&m, ada_interrupted, &gil, &error);
    PyEval_RestoreThread(gil.thread);
    result = status ? ada_raise(state, &error) : PyTuple_Pack(2, out, lse);
done:
    for (int i = 0; i < 6; i++) ada_view_release(&views[i]);
    Py_XDECREF(out);
    Py_XDECREF(lse);
    return result;
}

/* ---- the machine ---- */

static PyObject *isa_list(uint32_t mask) {
    PyObject *list = PyList_New(0);
    for (uint32_t bit = 1; list && bit; bit <<= 1) {
        if (!(mask & bit) || !ada_isa_name(bit)) continue;
        PyObject *name = PyUnicode_FromString(ada_isa_name(bit));
        if (!name || PyList_Append(list, name)) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *kernel_dict(void) {
    const char *isa_of[ADA_SLOT_COUNT];
    ada_kernels kernels;
    ada_kernels_select(ada_isa_allowed(), &kernels, isa_of);
    PyObject *dict = PyDict_New();
    for (int i = 0; dict && i < ADA_SLOT_COUNT; i++) {
        if (!isa_of[i]) continue; /* an optional slot */
        PyObject *isa = PyUnicode_FromString(isa_of[i]);
        if (!isa || PyDict_SetItemString(dict, ada_slot_name(i), isa)) Py_CLEAR(dict);
        Py_XDECREF(isa);
    }
    return dict;
}

PyDoc_STRVAR(cpu_info_doc, "cpu_info($module, /)\n--\n\nSee adaattn.cpu_info.");

static PyObject *cpu_info(PyObject *module, PyObject *Py_UNUSED(ignored)) {
    (void)module;
    char cpu[128];
    ada_cpu_name(cpu, sizeof cpu);
    return Py_BuildValue("{s:s, s:s, s:N, s:N, s:N, s:N, s:i, s:i, s:{s:s, s:N, s:N, s:s}}", "version",
                         ADA_VERSION, "cpu", cpu, "isa_detected", isa_list(ada_cpu_isa()), "isa_denied",
                         isa_list(ada_cpu_isa_denied()), "isa_used", isa_list(ada_isa_allowed()), "kernels",
                         kernel_dict(), "num_threads", ada_get_num_threads(), "cpu_count", ada_cpu_count(),
                         "build", "compiler", __VERSION__, "isa", isa_list(ada_isa_built()), "emulated",
                         isa_list(ada_isa_emulated()), "left_out", ADA_BUILD_LEFT_OUT);
}

PyDoc_STRVAR(get_num_threads_doc, "get_num_threads($module, /)\n--\n\nSee adaattn.get_num_threads.");

static PyObject *get_num_threads(PyObject *module, PyObject *Py_UNUSED(ignored)) {
    (void)module;
    return PyLong_FromLong(ada_get_num_threads());
}

PyDoc_STRVAR(set_num_threads_doc, "set_num_threads($module, n, /)\n--\n\nSee adaattn.set_num_threads.");

static PyObject *set_num_threads(PyObject *module, PyObject *object) {
    const ada_module_state *state = state_of(module);
    int64_t n = 0;
    if (object != Py_None) {
        if (ada_integer_of(state, object, "n", "an int or None", &n)) return NULL;
        if (n < 1)
            return PyErr_Format(state->argument_error, "n: expected an int of at least 1, got %S", object);
    }
    ada_set_num_threads(n > INT_MAX ? INT_MAX : (int)n);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(lend_team_doc, "_lend_team($module, team, size, /)\n--\n\n"
                            "Run jobs on an OpenMP's threads: the addresses of GOMP_parallel and "
                            "omp_get_max_threads, or 0 and 0.");

static PyObject *lend_team(PyObject *module, PyObject *args) {
    (void)module;
    Py_ssize_t team, size;
    if (!PyArg_ParseTuple(args, "nn:_lend_team", &team, &size)) return NULL;
    ada_lend_team((ada_team_fn *)(intptr_t)team, (ada_team_size_fn *)(intptr_t)size);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(backward_doc, "attention_backward($module, grad_out, query, key, value, out, lse, attn_mask, "
                           "causal, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset, scale, "
                           "dropout_p, seed, needs, precision, tolerance, verify, rates, return_report, "
                           "num_threads, allocate, /)\n--\n\n"
                           "adaattn.attention_backward with every argument by position: a tuple, and with "
                           "return_report (that tuple, float64 of key heads, of query heads, seconds).");
PyDoc_STRVAR(cache_count_doc, "_cache_count($module, cache_key, cache_value, key, value, /)\n--\n\n"
                              "Tokens in key and value, which fit the cache.");
PyDoc_STRVAR(
    cache_append_doc,
    "_cache_append($module, cache_key, cache_value, key, value, lengths, counts, /)\n--\n\n"
    "Stores the first counts[b] tokens behind the first lengths[b] ones, all or none; there is room.");
PyDoc_STRVAR(cache_reopen_doc, "_cache_reopen($module, stored, sequence, page, /)\n--\n\n"
                               "Makes a closed page the open one, with what its codes are worth.");
PyDoc_STRVAR(cache_code_doc, "_cache_code($module, stored, values, until, /)\n--\n\n"
                             "Makes codes of the pages of each sequence b that have none, before until[b].");
PyDoc_STRVAR(gpu_load_doc, "_gpu_load($module, path, /)\n--\n\n"
                           "Opens the CUDA backend at this path, once for the process.");
PyDoc_STRVAR(gpu_allocate_doc, "_gpu_allocate($module, device, stream, nbytes, /)\n--\n\n"
                               "Memory of a device that is freed with the capsule that holds it.");
PyDoc_STRVAR(gpu_export_doc, "_gpu_export($module, memory, device, shape, dtype, /)\n--\n\n"
                             "A DLPack capsule over such memory, which it keeps.");
PyDoc_STRVAR(gpu_captured_doc, "_gpu_captured($module, device, stream, /)\n--\n\n"
                               "Whether what comes on a stream goes into a CUDA graph.");
PyDoc_STRVAR(gpu_order_doc, "_gpu_order($module, device, earlier, later, /)\n--\n\n"
                            "What comes on the later stream waits for what stands on the earlier one.");
PyDoc_STRVAR(gpu_describe_doc,
             "_gpu_describe($module, /)\n--\n\n"
             "Of the backend that is open: versions of its own, of driver and runtime, and for each device "
             "(name, major, minor, multiprocessors, bytes of memory, mask of rungs).");
PyDoc_STRVAR(plan_head_doc,
             "_plan_head($module, errors, lse_errors, rates, finite, tolerance, margin, lse, dearest, "
             "cheapest, operations, elements, D, plain, /)\n--\n\n"
             "For tests: the index of the candidate that the planner chooses for one head.");
PyDoc_STRVAR(narrow_fault_doc, "_narrow_fault($module, factor, /)\n--\n\n"
                               "For tests: outputs of rungs below fp32 are wrong by this factor; 1: right.");
PyDoc_STRVAR(sample_rows_doc, "_sample_rows($module, shares, n, stream, /)\n--\n\n"
                              "For tests: pairs (row, inverse of its probability).");
PyDoc_STRVAR(limit_error_doc, "_limit_error($module, error2, weight, /)\n--\n\n"
                              "For tests: estimate, lower and upper limit of a head's error.");
PyDoc_STRVAR(fail_doc,
             "_alloc_fail_after($module, n, /)\n--\n\n"
             "For tests: the (n + 1)-th allocation of the engine from now on fails once; -1: none.");

static PyObject *alloc_fail_after(PyObject *module, PyObject *object) {
    int64_t n;
    if (ada_integer_of(state_of(module), object, "n", "an int", &n)) return NULL;
    ada_alloc_fail_after((int)n);
    Py_RETURN_NONE;
}

/* ---- the module ---- */

PyDoc_STRVAR(linear_doc,
             "linear($module, packed, x, bias, tolerance, first, report, num_threads, /)\n--\n\n"
             "Rows x times the weight that a PackedWeight keeps, from the rung of index first on, and with "
             "report a table of each row's rung and predicted error.");

PyDoc_STRVAR(
    gpu_linear_doc,
    "_gpu_linear($module, x, weight, bias, product, features, allocate, /)\n--\n\n"
    "x weight^T + bias on a GPU by the product of this index, and its error measured on these features "
    "(NaN: on none); None where there is no such product. bias has shape (1, N).");
PyDoc_STRVAR(gpu_open_blas_doc, "_gpu_open_blas($module, path, device, /)\n--\n\n"
                                "Opens cuBLAS on a device: the process's own (None), or at a path, or by a "
                                "name.");
PyDoc_STRVAR(store_doc, "Of caches on a GPU: what adaattn.pages asks for.");

static PyMethodDef methods[] = {
    {"attention", (PyCFunction)(void (*)(void))attention, METH_FASTCALL, attention_doc},
    {"attention_backward", (PyCFunction)(void (*)(void))ada_py_attention_backward, METH_FASTCALL,
     backward_doc},
    {"linear", (PyCFunction)(void (*)(void))ada_py_linear, METH_FASTCALL, linear_doc},
    {"merge", (PyCFunction)(void (*)(void))merge, METH_FASTCALL, merge_doc},
    {"_cache_count", (PyCFunction)(void (*)(void))ada_py_cache_count, METH_FASTCALL, cache_count_doc},
    {"_cache_append", (PyCFunction)(void (*)(void))ada_py_cache_append, METH_FASTCALL, cache_append_doc},
    {"_cache_reopen", ada_py_cache_reopen, METH_VARARGS, cache_reopen_doc},
    {"_cache_code", ada_py_cache_code, METH_VARARGS, cache_code_doc},
    {"cpu_info", cpu_info, METH_NOARGS, cpu_info_doc},
    {"_gpu_load", ada_py_gpu_load, METH_O, gpu_load_doc},
    {"_gpu_allocate", ada_py_gpu_allocate, METH_VARARGS, gpu_allocate_doc},
    {"_gpu_export", ada_py_gpu_export, METH_VARARGS, gpu_export_doc},
    {"_gpu_order", ada_py_gpu_order, METH_VARARGS, gpu_order_doc},
    {"_gpu_captured", ada_py_gpu_captured, METH_VARARGS, gpu_captured_doc},
    {"_gpu_linear", (PyCFunction)(void (*)(void))ada_py_gpu_linear, METH_FASTCALL, gpu_linear_doc},
    {"_gpu_open_blas", ada_py_gpu_open_blas, METH_VARARGS, gpu_open_blas_doc},
    {"_gpu_describe", ada_py_gpu_describe, METH_NOARGS, gpu_describe_doc},
    {"_store_bytes", ada_py_store_bytes, METH_VARARGS, store_doc},
    {"_store_address", ada_py_store_address, METH_O, store_doc},
    {"_store_stream", ada_py_store_stream, METH_O, store_doc},
    {"_store_set", ada_py_store_set, METH_VARARGS, store_doc},
    {"_store_copy", ada_py_store_copy, METH_VARARGS, store_doc},
    {"_store_count", ada_py_store_count, METH_VARARGS, store_doc},
    {"_store_append", ada_py_store_append, METH_VARARGS, store_doc},
    {"_store_reopen", ada_py_store_reopen, METH_VARARGS, store_doc},
    {"_store_read", ada_py_store_read, METH_VARARGS, store_doc},
    {"_gpu_numbers", ada_py_gpu_numbers, METH_O, store_doc},
    {"get_num_threads", get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"set_num_threads", set_num_threads, METH_O, set_num_threads_doc},
    {"_lend_team", lend_team, METH_VARARGS, lend_team_doc},
    {"_alloc_fail_after", alloc_fail_after, METH_O, fail_doc},
    {"_plan_head", ada_py_plan_head, METH_VARARGS, plan_head_doc},
    {"_narrow_fault", ada_py_narrow_fault, METH_O, narrow_fault_doc},
    {"_sample_rows", ada_py_sample_rows, METH_VARARGS, sample_rows_doc},
    {"_limit_error", ada_py_limit_error, METH_VARARGS, limit_error_doc},
    {NULL, NULL, 0, NULL}};

/* A tuple of n names, name(i) the i-th, as the module's attribute. */
static int add_names(PyObject *module, const char *attribute, int n, void (*name)(int, char[64])) {
    PyObject *tuple = PyTuple_New(n);
    for (int i = 0; tuple && i < n; i++) {
        char text[64];
        name(i, text);
        PyObject *string = PyUnicode_FromString(text);
        if (string)
            PyTuple_SET_ITEM(tuple, i, string);
        else
            Py_CLEAR(tuple);
    }
    const int failed = tuple ? PyModule_AddObjectRef(module, attribute, tuple) : -1;
    Py_XDECREF(tuple);
    return failed;
}

static void rung_text(int i, char text[64]) { snprintf(text, 64, "%s", ada_rung_name((ada_rung)i)); }

static void candidate_text(int i, char text[64]) {
    const ada_choice c = ada_candidates[i];
    snprintf(text, 64, c.qk == c.pv ? "%s" : "%s/%s", ada_rung_name(c.qk), ada_rung_name(c.pv));
}

static void field_text(int i, char text[64]) {
    static const char *const kinds[] = {"error", "lse_error", "seconds"};
    const int column = i - HEAD_SCALARS;
    char candidate[64];
    if (column >= 0) candidate_text(column % ADA_CANDIDATES, candidate);
    if (column < 0)
        snprintf(text, 64, "%s", head_fields[i]);
    else
        snprintf(text, 64, "%s %.40s", kinds[column / ADA_CANDIDATES], candidate);
}

static void product_text(int i, char text[64]) {
    static const char *const names[] = {
#define ADA_PRODUCT(NAME, name) name,
#include "../../cuda/products.def"
#undef ADA_PRODUCT
    };
    snprintf(text, 64, "%s", names[i]);
}

static int module_exec(PyObject *module) {
    uint32_t mask;
    const char *isa = getenv("ADAATTN_ISA");
    if (ada_array_import_numpy() || ada_errors_import(state_of(module)) ||
        add_names(module, "RUNGS", ADA_RUNG_COUNT, rung_text) ||
        add_names(module, "CANDIDATES", ADA_CANDIDATES, candidate_text) ||
        add_names(module, "GPU_PRODUCTS", ADA_PRODUCTS, product_text) ||
        add_names(module, "HEAD_FIELDS", HEAD_COLUMNS, field_text))
        return -1;
    if (!isa || ada_isa_parse(isa, &mask) == 0) return 0;
    PyErr_Format(
        state_of(module)->argument_error,
        "ADAATTN_ISA: expected 'scalar', 'avx2', 'avx512', 'avx512vnni', 'avx512bf16' or 'amx', got '%s'",
        isa);
    return -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    ada_module_state *state = state_of(module);
    Py_VISIT(state->argument_error);
    Py_VISIT(state->shape_error);
    Py_VISIT(state->dtype_error);
    Py_VISIT(state->device_error);
    Py_VISIT(state->numerical_error);
    return 0;
}

static int module_clear(PyObject *module) {
    ada_errors_clear(state_of(module));
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
                                   {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_mod_gil
                                   {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
                                   {0, NULL}};

static PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT,
                                 .m_name = "adaattn._adaattn",
                                 .m_doc = "AdaAttn's engine.",
                                 .m_size = sizeof(ada_module_state),
                                 .m_methods = methods,
                                 .m_slots = slots,
                                 .m_traverse = module_traverse,
                                 .m_clear = module_clear};

PyMODINIT_FUNC PyInit__adaattn(void) { return PyModuleDef_Init(&definition); }
