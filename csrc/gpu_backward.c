/* Gradients on a GPU: of the arrays' own format where tensor cores multiply it, else of floats. A mask is not
 * looked at, as the call whose output is given did: what is NaN there is NaN in the gradients. */
#include "gpu_backward.h"

#include <math.h>

#include "attending.h"
#include "gpu_gradient.h"
#include "memory.h"

/* What half arrays' own format errs by in a gradient, relative. */
#define BF16_ERROR ADA_GRADIENT_ERROR
#define FP16_ERROR (ADA_GRADIENT_ERROR / 8)

static ada_status check_budget(const ada_gradient_budget *budget, ada_error *error) {
    const ada_choice c = budget->asked;
    if (c.qk == ADA_RUNG_INT16)
        return ada_fail(
            error, ADA_ERR_ARGUMENT,
            "precision: expected 'auto', 'fp32' or 'fp64' for gradients on a GPU, got ('%s', '%s')",
            ada_rung_name(c.qk), ada_rung_name(c.pv));
    if (budget->tolerance > 0 && !ada_gpu_verifies_gradients())
        return ada_fail(error, ADA_ERR_ARGUMENT,
                        "tolerance: expected None, as this backend does not verify gradients, got %g",
                        budget->tolerance);
    return ADA_OK;
}

static bool is_verified(const ada_problem *p, const ada_gradient_budget *budget) {
    return budget->tolerance > 0 && budget->verify && p->T >= ADA_LEAST_QUERIES;
}

/* predicted: its error, NaN where it is exact for the dtype. */
static ada_choice choose(const ada_backward_problem *x, const ada_gradient_budget *budget,
                         const ada_cuda_call *call, double *predicted) {
    const ada_problem *p = &x->p;
    const bool is_f16 = p->query.dtype == ADA_F16, is_half = is_f16 || p->query.dtype == ADA_BF16;
    const ada_rung own = is_f16 ? ADA_RUNG_FP16 : ADA_RUNG_BF16;
    const ada_choice half = {own, own}, f32 = {ADA_RUNG_FP32, ADA_RUNG_FP32},
                     f64 = {ADA_RUNG_FP64, ADA_RUNG_FP64};
    const double error = is_f16 ? FP16_ERROR : BF16_ERROR;
    const double margin = is_verified(p, budget)
                              ? ADA_MARGIN * ada_reach_of_rows(ada_most_rows_to_verify(p->T))
                              : ADA_MARGIN_GUESSED;
    *predicted = NAN;
    if (p->only_f64 || p->query.dtype == ADA_F64) return f64;
    if (budget->asked.qk != ADA_RUNG_AUTO) return budget->asked;
    if (!is_half || !ada_gpu_table()->computes(call, half)) return f32;
    if (budget->tolerance == 0) return half;
    if (x->needs[ADA_OF_SLOPES] || error * margin > budget->tolerance) return f32;
    *predicted = error;
    return half;
}

static ada_status run(const ada_backward_problem *x, ada_gradient_budget *budget, uint32_t *again,
                      ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    const ada_problem *p = &x->p;
    const double start = ada_seconds_now();
    double predicted;
    ada_cuda_failure failure;
    ada_cuda_call *call;
    if (t->open(p, &call, &failure)) return ada_gpu_fail(&failure, error);
    const ada_choice choice = choose(x, budget, call, &predicted);
    const ada_choice in_f64 = {ADA_RUNG_FP64, ADA_RUNG_FP64};
    if (t->gradients(call, x, choice, again, &failure)) {
        t->close(call);
        return ada_gpu_fail(&failure, error);
    }
    for (int64_t i = 0; again && i < p->B * p->G; i++) {
        const bool retried = again[i] && choice.qk != ADA_RUNG_FP64;
        budget->heads[i] = (ada_gradient_head){.choice = retried ? in_f64 : choice,
                                               .predicted_error = retried ? NAN : predicted,
                                               .retried = retried,
                                               .key = {NAN, NAN, 0},
                                               .value = {NAN, NAN, 0}};
    }
    for (int64_t i = 0; again && i < p->B * p->H; i++) budget->queries[i] = (ada_measured){NAN, NAN, 0};
    const double now = ada_seconds_now();
    ada_status status = ADA_OK;
    if (is_verified(p, budget) && (x->needs[ADA_OF_QUERY] || x->needs[ADA_OF_KEY] || x->needs[ADA_OF_VALUE]))
        status = ada_gpu_verify_gradient(x, call, budget, error);
    t->close(call);
    budget->seconds[0] = now - start, budget->seconds[1] = ada_seconds_now() - now;
    return status;
}

ada_status ada_gpu_backward(const ada_backward_problem *given, ada_gradient_budget *budget,
                            ada_error *error) {
    const ada_problem *p = &given->p;
    ada_backward_problem x = *given;
    if (!ada_gpu_table()->gradients)
        return ada_fail(error, ADA_ERR_DEVICE,
                        "query: expected memory of the CPU, as this backend has no gradients");
    if (check_budget(budget, error)) return error->status;
    if (p->B * p->H * p->T > ADA_GPU_MOST || p->B * p->G * p->S > ADA_GPU_MOST)
        return ada_fail(error, ADA_ERR_SHAPE,
                        "query, key: expected at most %d rows on a GPU, got %lld and %lld", ADA_GPU_MOST,
                        (long long)(p->B * p->H * p->T), (long long)(p->B * p->G * p->S));
    if (p->D > 256 || p->E > 256)
        return ada_fail(error, ADA_ERR_SHAPE,
                        "query, value: expected head sizes of at most 256 on a GPU, got %lld and %lld",
                        (long long)p->D, (long long)p->E);
    if (x.needs[ADA_OF_MASK]) ada_broadcast(p, &x.results[ADA_OF_MASK]);
    const int64_t bytes = p->B * p->G * (int64_t)sizeof(uint32_t);
    uint32_t *again = budget->heads ? ada_scratch_take(bytes) : NULL;
    if (budget->heads && !again)
        return ada_fail(error, ADA_ERR_MEMORY, "attention_backward: no memory for %lld bytes of scratch",
                        (long long)bytes);
    const ada_status status = run(&x, budget, again, error);
    if (again) ada_scratch_give_back(again);
    return status;
}
