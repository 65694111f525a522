/* The machine of model.h. */
#include "ptx.cuh"

uint64_t ada_model_seed = 1;

namespace ada_model {
machine m;

static void start() {
    m.kernel();
    if (!m.fibers[(size_t)m.current].copies.empty()) fail("a thread ends with copies on their way");
    m.fibers[(size_t)m.current].is = DONE;
    give_way();
    fail("a thread goes on after its end");
}

bool run(int64_t blocks, int threads, int bytes) {
    const size_t stack = 128 * 1024;
    m.threads = threads, m.blocks = (int)blocks, m.shared_bytes = bytes;
    m.random = ada_model_seed * 0x9E3779B97F4A7C15u | 1;
    m.delay = 4u << draw() % 3 * 2;
    m.fibers.resize((size_t)threads);
    for (m.block = 0; m.block < m.blocks; m.block++) {
        m.shared.assign((size_t)bytes / 4 + 4, 0xffffffffu);
        for (fiber &f : m.fibers) {
            f.stack.resize(stack);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data();
            f.context.uc_stack.ss_size = stack;
            f.context.uc_link = nullptr;
            makecontext(&f.context, start, 0);
            f.started = false, f.is = READY, f.committed = 0;
            f.copies.clear();
        }
        const int end = _setjmp(m.home);
        if (end == 1) continue;
        if (end) return false;
        m.current = (int)(draw() % (uint32_t)threads);
        m.fibers[(size_t)m.current].started = true;
        setcontext(&m.fibers[(size_t)m.current].context);
    }
    return true;
}
} // namespace ada_model
