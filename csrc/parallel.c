/* The thread pool of parallel.h.
 *
 * All its state is a few atomic words, so a forked child makes a new pool by assigning to them. The word
 * `gate` is the whole protocol: places still open in the current job (high half) and workers inside it
 * (low half). To enter, a worker moves one place from the high to the low half in one step; the caller
 * closes the gate (no more places) and then waits until nobody is inside. Hence no worker touches a job,
 * which lies on its caller's stack, after the call returns, and one that wakes up late delays nobody. A
 * missed wake-up can only cost speed, as the caller runs every task that no worker takes.
 */
#define _GNU_SOURCE 1
#include "parallel.h"
#include "cpu.h"

#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    PLACE = 1 << 16,            /* the gate's unit of open places */
    INSIDE = PLACE - 1,         /* the gate's bits that count workers inside */
    PLACES = ~INSIDE,           /* and those that count open places */
    MAX_WORKERS = 1023,         /* far below INSIDE; no known machine gains from more */
    SPIN_NS = 50 * 1000,        /* twice a sleep and a wake-up: a step of decoding follows soon */
    MOVE_NS = 10 * 1000 * 1000, /* between two moves of a worker to another CPU, which cost some 10 us each */
    ASK_NS = 50 * 1000 * 1000   /* between two calls of interrupt */
};

#ifdef __SSE__
#    include <xmmintrin.h>
typedef unsigned float_env;
static void float_env_enter(float_env *saved) { *saved = _mm_getcsr(), _mm_setcsr(0x1F80); }
static void float_env_leave(const float_env *saved) { _mm_setcsr(*saved); }
#else
#    include <fenv.h>
typedef fenv_t float_env;
static void float_env_enter(float_env *saved) { fegetenv(saved), fesetenv(FE_DFL_ENV); }
static void float_env_leave(const float_env *saved) { fesetenv(saved); }
#endif

struct ada_job {
    _Alignas(64) _Atomic int64_t next; /* written for every task: a cache line of its own */
    _Alignas(64) int64_t n_tasks;
    ada_task_fn *task;
    void *context;
    atomic_bool cancelled;
    atomic_bool held;            /* workers leave after their present task: before_fork */
    ada_interrupt_fn *interrupt; /* this and what follows: the caller's thread only */
    void *interrupt_context;
    int64_t last_asked_ns;
    float_env caller_env;
};

static struct {
    _Alignas(64) atomic_uint gate;
    _Alignas(64) atomic_bool busy; /* some thread owns the pool */
    atomic_int created;            /* pool threads */
    atomic_int sleepers;           /* those asleep or about to be */
    atomic_int owner_cpu;
    atomic_uint owner_asleep; /* the owner waits for the last worker */
    ada_job *job;             /* valid for those inside */
    bool forks_well;          /* fork handlers are installed */
    int64_t spin_ns;
    _Atomic(ada_team_fn *) team;
    _Atomic(ada_team_size_fn *) team_size;
    bool in_team, team_is_gone; /* the owner's job runs on the team; this is a child without it */
    jmp_buf out_of_team;
} pool;
static pthread_once_t pool_once = PTHREAD_ONCE_INIT;

/* What this thread is doing. Only an OUTSIDE thread may take the pool; an ORPHAN is a pool thread that forked
 * inside a task: the child has no caller to return to. */
static _Thread_local enum { OUTSIDE, ALONE, OWNER, WORKER, ORPHAN } role;

/* ---- time, spinning, sleeping ---- */

#ifndef CLOCK_MONOTONIC_COARSE /* some milliseconds fine, a few nanoseconds to read */
#    define CLOCK_MONOTONIC_COARSE CLOCK_MONOTONIC
#endif

static int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Waits for a short while until some (or else none) of the gate's bits in mask are set; returns the gate. */
static unsigned spin(unsigned mask, bool some) {
    int64_t end = clock_ns(CLOCK_MONOTONIC) + pool.spin_ns;
    unsigned gate;
    do {
        for (int i = 0; i < 32; i++) {
            gate = atomic_load(&pool.gate);
            if (((gate & mask) != 0) == some) return gate;
            cpu_relax();
        }
        sched_yield(); /* whom we wait for may need this very CPU */
    } while (clock_ns(CLOCK_MONOTONIC) < end);
    return gate;
}

/* word_wait sleeps if *word == value until a wake-up, a signal, the timeout, or for no reason. */
#if defined(__linux__) && defined(__LP64__) && !defined(ADA_NO_FUTEX)
#    include <linux/futex.h>
#    include <sys/syscall.h>
#    include <unistd.h>

static void word_wait(atomic_uint *word, unsigned value, const struct timespec *timeout) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, timeout);
}
static void word_wake(atomic_uint *word, int n) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n); }
static void word_reset(void) {}
#else
static pthread_mutex_t word_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t word_changed = PTHREAD_COND_INITIALIZER;

static void word_wait(atomic_uint *word, unsigned value, const struct timespec *timeout) {
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_nsec += timeout->tv_nsec;
    end.tv_sec += timeout->tv_sec + end.tv_nsec / 1000000000;
    end.tv_nsec %= 1000000000;
    pthread_mutex_lock(&word_mutex);
    if (atomic_load(word) == value) pthread_cond_timedwait(&word_changed, &word_mutex, &end);
    pthread_mutex_unlock(&word_mutex);
}
static void word_wake(atomic_uint *word, int n) {
    (void)word, (void)n; /* one condition for all words: everybody looks again */
    pthread_mutex_lock(&word_mutex);
    pthread_mutex_unlock(&word_mutex);
    pthread_cond_broadcast(&word_changed);
}
static void word_reset(void) {
    word_mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    word_changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}
#endif

/* ---- the job, as each thread runs it ---- */

static void ask_interrupt(ada_job *job) {
    int64_t now = clock_ns(CLOCK_MONOTONIC_COARSE);
    if (now - job->last_asked_ns < ASK_NS) return;
    job->last_asked_ns = now;
    float_env_leave(&job->caller_env);
    bool stop = job->interrupt(job->interrupt_context);
    float_env_enter(&job->caller_env);
    if (stop) job->interrupt = NULL; /* not to be asked again */
    atomic_store(&job->cancelled, stop);
}

bool ada_job_cancelled(ada_job *job, int worker) {
    if (worker == 0 && job->interrupt) ask_interrupt(job);
    return atomic_load_explicit(&job->cancelled, memory_order_relaxed);
}

static void run_tasks(ada_job *job, int worker) {
    while (!ada_job_cancelled(job, worker)) {
        if (worker != 0 && atomic_load_explicit(&job->held, memory_order_relaxed)) return;
        int64_t task = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (task >= job->n_tasks) return;
        job->task(job->context, job, task, worker);
        if (worker != 0 && role == ORPHAN) return; /* the job has gone with its caller */
    }
}

/* Wakes sleeping workers for places that no worker awake will take: two at most, each wakes two more, so that
 * nobody spends long on waking. */
static void wake_workers(unsigned gate) {
    int sleepers = atomic_load(&pool.sleepers);
    int idle_awake = atomic_load(&pool.created) - sleepers - (int)(gate & INSIDE);
    int missing = (int)(gate / PLACE) - idle_awake;
    if (sleepers > 0 && missing > 0) word_wake(&pool.gate, missing < 2 ? missing : 2);
}

static void leave_job(void) {
    atomic_fetch_and(&pool.gate, INSIDE); /* closes it: nobody need come any more */
    if (atomic_fetch_sub(&pool.gate, 1) != 1 || !atomic_load(&pool.owner_asleep)) return;
    atomic_store(&pool.owner_asleep, 0);
    word_wake(&pool.owner_asleep, 1);
}

/* Returns the gate as last seen, with open places. */
static unsigned wait_for_places(void) {
    static const struct timespec an_hour = {.tv_sec = 3600};
    unsigned gate = spin(PLACES, true);
    while (!(gate & PLACES)) {
        atomic_fetch_add(&pool.sleepers, 1); /* first this, then the look: the reverse of opening the gate */
        gate = atomic_load(&pool.gate);
        if (!(gate & PLACES)) word_wait(&pool.gate, gate, &an_hour);
        atomic_fetch_sub(&pool.sleepers, 1);
    }
    return gate;
}

/* Schedulers may leave a worker on its owner's CPU, where they take turns, for many milliseconds. */
static bool move_off_owner_cpu(int64_t *last_ns) {
    int64_t now = clock_ns(CLOCK_MONOTONIC_COARSE);
    int cpu = atomic_load(&pool.owner_cpu);
    if (now - *last_ns < MOVE_NS || ada_current_cpu() != cpu) return false;
    *last_ns = now;
    ada_leave_cpu(cpu);
    return true;
}

static void *worker_main(void *number) {
    char name[16];
    snprintf(name, sizeof name, "adaattn-%d", (int)(intptr_t)number);
#if defined(__linux__)
    pthread_setname_np(pthread_self(), name);
#elif defined(__APPLE__)
    pthread_setname_np(name);
#endif
    role = WORKER;
    int64_t last_moved_ns = 0;
    for (float_env ignored;;) {
        unsigned gate = wait_for_places();
        if (move_off_owner_cpu(&last_moved_ns)) continue; /* before entering: the owner need not wait */
        if (!atomic_compare_exchange_strong(&pool.gate, &gate, gate - PLACE + 1)) continue;
        wake_workers(gate - PLACE + 1);
        float_env_enter(&ignored);
        run_tasks(pool.job, (int)(gate / PLACE));
        if (role == ORPHAN) return NULL;
        leave_job();
    }
}

/* ---- the pool, as its owner sees it ---- */

/* Closes the gate and waits for those inside; asks the interrupt of job, if there is one, meanwhile. */
static void wait_for_workers(ada_job *job) {
    static const struct timespec nap = {.tv_nsec = ASK_NS / 2};
    atomic_fetch_and(&pool.gate, INSIDE);
    unsigned gate = spin(INSIDE, false);
    while (gate & INSIDE) {
        atomic_store(&pool.owner_asleep, 1); /* first this, then the look: the reverse of leave_job */
        gate = atomic_load(&pool.gate);
        if (gate & INSIDE) word_wait(&pool.owner_asleep, 1, &nap);
        if (job && job->interrupt) ask_interrupt(job);
    }
    atomic_store(&pool.owner_asleep, 0);
}

/* A thread that forks in the midst of its own job first sends the workers away, so that in parent and child
 * every task is either done or still to be taken by the forking thread, which finishes the job alone. */
static void before_fork(void) {
    if (role != OWNER) return;
    atomic_store(&pool.job->held, true);
    wait_for_workers(NULL);
}

static void after_fork_in_child(void) {
    if (role == WORKER) role = ORPHAN;
    ada_lend_team(NULL, NULL);
    pool.team_is_gone = pool.in_team;
    atomic_store(&pool.gate, 0);
    atomic_store(&pool.created, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.owner_asleep, 0);
    atomic_store(&pool.busy, role == OWNER);
    word_reset();
}

static void set_up_pool(void) {
    pool.spin_ns = ada_cpu_count() > 1 ? SPIN_NS : 0;
    pool.forks_well = pthread_atfork(before_fork, NULL, after_fork_in_child) == 0;
}

/* Creates pool threads up to the wanted number; returns how many of those there are. */
static int grow(int wanted) {
    int n = atomic_load(&pool.created);
    if (n >= wanted) return wanted;
    const int synchronous[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
    sigset_t blocked, callers;
    sigfillset(&blocked); /* signals go to the user's threads, but crash handlers shall still work */
    for (size_t i = 0; i < sizeof synchronous / sizeof *synchronous; i++) sigdelset(&blocked, synchronous[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &callers);
    for (pthread_t thread; n < wanted; n++) {
        if (pthread_create(&thread, NULL, worker_main, (void *)(intptr_t)(n + 1)) != 0) break;
        pthread_detach(thread);
        atomic_store(&pool.created, n + 1);
    }
    pthread_sigmask(SIG_SETMASK, &callers, NULL);
    return n;
}

static void open_gate(ada_job *job, int n_workers) {
    pool.job = job;
    atomic_store(&pool.owner_cpu, ada_current_cpu());
    unsigned gate = PLACE * (unsigned)grow(n_workers);
    atomic_store(&pool.gate, gate);
    wake_workers(gate);
}

/* ---- a team that was lent: its members are workers for one job ---- */

void ada_lend_team(ada_team_fn *team, ada_team_size_fn *size) {
    atomic_store(&pool.team_size, size);
    atomic_store(&pool.team, team);
}

static ada_team_fn *team_for(int n_threads) {
    ada_team_fn *team = atomic_load(&pool.team);
    ada_team_size_fn *size = atomic_load(&pool.team_size);
    return team && size && n_threads <= size() ? team : NULL;
}

static void join_job(void *job) {
    if (role == OWNER) {
        run_tasks(job, 0);
        wait_for_workers(job);
        if (pool.team_is_gone)
            longjmp(pool.out_of_team, 1); /* nobody is left to end a parallel region with */
        return;
    }
    unsigned gate = atomic_load(&pool.gate);
    while ((gate & PLACES) && !atomic_compare_exchange_weak(&pool.gate, &gate, gate - PLACE + 1)) {
    }
    if (!(gate & PLACES)) return;
    float_env own;
    float_env_enter(&own);
    role = WORKER;
    run_tasks(pool.job, (int)(gate / PLACE));
    if (role == ORPHAN) pthread_exit(NULL);
    role = OUTSIDE;
    float_env_leave(&own);
    leave_job();
}

static void run_on_team(ada_team_fn *team, ada_job *job, int n_workers) {
    pool.job = job;
    pool.team_is_gone = false;
    pool.in_team = true;
    atomic_store(&pool.gate, PLACE * (unsigned)n_workers);
    if (setjmp(pool.out_of_team) == 0) team(join_job, job, 0, 0);
    pool.in_team = false;
}

bool ada_parallel_for(int64_t n_tasks, int n_threads, ada_task_fn *task, void *context,
                      ada_interrupt_fn *interrupt, void *interrupt_context) {
    ada_job job = {.n_tasks = n_tasks,
                   .task = task,
                   .context = context,
                   .interrupt = interrupt,
                   .interrupt_context = interrupt_context};
    if (interrupt) job.last_asked_ns = clock_ns(CLOCK_MONOTONIC_COARSE);
    if (n_threads > n_tasks) n_threads = (int)n_tasks;
    bool nested = role != OUTSIDE;
    bool pooled = !nested && n_threads > 1 && pthread_once(&pool_once, set_up_pool) == 0 && pool.forks_well &&
                  !atomic_exchange(&pool.busy, true);
    if (!nested) role = pooled ? OWNER : ALONE;
    float_env_enter(&job.caller_env);
    const int n_workers = n_threads <= MAX_WORKERS ? n_threads - 1 : MAX_WORKERS;
    ada_team_fn *team = pooled ? team_for(n_workers + 1) : NULL;
    if (team) {
        run_on_team(team, &job, n_workers);
    } else {
        if (pooled) open_gate(&job, n_workers);
        run_tasks(&job, 0);
        if (pooled) wait_for_workers(&job);
    }
    if (pooled) atomic_store(&pool.busy, false);
    float_env_leave(&job.caller_env);
    if (!nested) role = OUTSIDE;
    return !atomic_load(&job.cancelled);
}

/* ---- the default number of threads ---- */

static atomic_int default_threads; /* 0: not known yet */

/* The first number of a list such as "4,2"; 0 if there is none or it is not a valid number of threads. */
static int parse_threads(const char *text) {
    if (!text) return 0;
    char *end;
    long n = strtol(text, &end, 10);
    end += strspn(end, " \t");
    return end != text && (*end == '\0' || *end == ',') && n >= 1 && n <= INT_MAX ? (int)n : 0;
}

int ada_get_num_threads(void) {
    int n = atomic_load(&default_threads);
    if (n > 0) return n;
    int found = parse_threads(getenv("ADAATTN_NUM_THREADS"));
    if (!found) found = parse_threads(getenv("OMP_NUM_THREADS"));
    if (!found) found = ada_cpu_count();
    return atomic_compare_exchange_strong(&default_threads, &n, found) ? found : n;
}

void ada_set_num_threads(int n) { atomic_store(&default_threads, n > 0 ? n : 0); }
