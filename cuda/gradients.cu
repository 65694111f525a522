/* Gradients as the engine asks for them. */
#include "host.h"

#include "backward.h"

namespace ada_cuda {

static_assert((int)ADA_OF_QUERY == ADA_CU_OF_QUERY && (int)ADA_OF_SLOPES == ADA_CU_OF_SLOPES &&
                  (int)ADA_GRADIENTS == ADA_CU_GRADIENTS,
              "gradients");

int gradients(ada_cuda_call *call, const ada_backward_problem *x, ada_choice choice, uint32_t *again,
              ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    const size_t heads = (size_t)(p->B * p->G) * sizeof(uint32_t);
    ON_DEVICE(p->device);
    ada_cu_gradients c = {};
    c.p = call->params;
    c.p.rung = choice.qk == ADA_RUNG_FP64   ? ADA_CU_SIMT_F64
               : choice.qk == ADA_RUNG_FP16 ? ADA_CU_FP16
               : choice.qk == ADA_RUNG_BF16 ? ADA_CU_BFLOAT16
                                            : ADA_CU_SIMT_F32;
    c.p.out = array_of(&x->out), c.grad_out = array_of(&x->grad_out), c.lse = array_of(&x->lse);
    for (int i = 0; i < ADA_GRADIENTS; i++)
        if (x->needs[i]) c.results[i] = array_of(&x->results[i]);
    c.results[ADA_OF_SLOPES].stride[0] = x->results[ADA_OF_SLOPES].ndim == 2 ? p->H : 0;
    Memory workspace(call->stream), unfit(call->stream);
    TRY(workspace.allocate(ada_cu_backward_workspace(&c)));
    c.p.workspace = workspace.data;
    if (again) {
        TRY(unfit.allocate(heads));
        c.unfit = (uint32_t *)unfit.data;
    }
    TRY(ada_cu_backward(&c, call->stream));
    return again ? fetch(call->stream, again, unfit.data, heads, failure) : 0;
}

} // namespace ada_cuda
