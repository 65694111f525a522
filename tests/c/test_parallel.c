/* Stress and contract checks of the thread pool (parallel.c) and of cpu.c's parsing; exit status 0 if all
 * hold.
 *
 *     cc -std=c11 -pthread -Icsrc tests/c/test_parallel.c csrc/cpu.c -lm -o test_parallel
 *
 * parallel.c is included, not linked, so that pthread_create can be made to fail. -DADA_NO_FUTEX checks its
 * portable way of sleeping; under ThreadSanitizer, which cannot follow fork(), the fork checks are left out.
 * Options: --bench prints the latency of small jobs and nothing else; --repeat=N runs all checks N times.
 */
#define _GNU_SOURCE 1
#include <pthread.h>
#include <stdbool.h>

static int create_thread(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *),
                         void *argument);
#define pthread_create create_thread
#include "../../csrc/parallel.c"
#undef pthread_create

#include <errno.h>
#include <fenv.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__SANITIZE_THREAD__)
#    define HAS_TSAN 1
#elif defined(__has_feature)
#    if __has_feature(thread_sanitizer)
#        define HAS_TSAN 1
#    endif
#endif

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                          \
            _exit(1);                                                                                        \
        }                                                                                                    \
    } while (0)

static atomic_int threads_allowed = INT_MAX;

static int create_thread(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *),
                         void *argument) {
    if (atomic_fetch_sub(&threads_allowed, 1) <= 0) return EAGAIN;
    return pthread_create(thread, attr, start, argument);
}

static double now(void) { return clock_ns(CLOCK_MONOTONIC) * 1e-9; }

static void work_for(double seconds) {
    for (double end = now() + seconds; now() < end;) cpu_relax();
}

/* ---- a job whose every task is checked ---- */

enum { MAX_TASKS = 4096, MAX_THREADS = 1024 };

typedef struct {
    int n_tasks, n_threads;
    uint64_t seed;
    atomic_int runs[MAX_TASKS];
    uint64_t results[MAX_TASKS]; /* written without synchronisation: the pool must provide it */
    atomic_int in_use[MAX_THREADS];
    atomic_int
        started; /* increasing order: task t finds at most n_threads - 1 of those before it not begun */
} counted;

static uint64_t expected(uint64_t seed, int64_t task) {
    uint64_t x = seed + (uint64_t)task;
    for (int i = 0; i < 20; i++) x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9;
    return x;
}

static void counted_task(void *context, ada_job *job, int64_t task, int worker) {
    counted *c = context;
    int before = atomic_fetch_add(&c->started, 1);
    CHECK(task < before + c->n_threads);
    CHECK(worker >= 0 && worker < c->n_threads);
    CHECK(atomic_exchange(&c->in_use[worker], 1) == 0);
    CHECK(!ada_job_cancelled(job, worker));
    atomic_fetch_add(&c->runs[task], 1);
    c->results[task] = expected(c->seed, task);
    atomic_store(&c->in_use[worker], 0);
}

static void run_counted(counted *c, int n_tasks, int n_threads, uint64_t seed) {
    memset(c, 0, sizeof *c);
    c->n_tasks = n_tasks, c->n_threads = n_threads > 1 ? n_threads : 1, c->seed = seed;
    CHECK(ada_parallel_for(n_tasks, n_threads, counted_task, c, NULL, NULL));
    for (int t = 0; t < n_tasks; t++) {
        CHECK(atomic_load(&c->runs[t]) == 1);
        CHECK(c->results[t] == expected(seed, t));
    }
}

static void check_counts(void) {
    static counted c;
    const int tasks[] = {0, 1, 2, 3, 5, 17, 64, 333, MAX_TASKS}, threads[] = {-1, 0, 1, 2, 3, 4, 9, 16};
    for (int round = 0; round < 20; round++)
        for (size_t i = 0; i < sizeof tasks / sizeof *tasks; i++)
            for (size_t j = 0; j < sizeof threads / sizeof *threads; j++)
                run_counted(&c, tasks[i], threads[j], (uint64_t)round << 20);
    for (int round = 0; round < 5000; round++) run_counted(&c, 2 + round % 3, 2 + round % 2, (uint64_t)round);
    run_counted(&c, -7, 4, 0);
}

/* ---- several callers, nested calls ---- */

static void *caller_main(void *number) {
    counted *c = malloc(sizeof *c);
    CHECK(c);
    int me = (int)(intptr_t)number;
    for (int round = 0; round < 300; round++)
        run_counted(c, 1 + (round * 7 + me) % 200, 1 + (round + me) % 5, (uint64_t)me);
    free(c);
    return NULL;
}

static void check_callers(void) {
    enum { N = 6 };
    pthread_t threads[N];
    for (int i = 0; i < N; i++)
        CHECK(pthread_create(&threads[i], NULL, caller_main, (void *)(intptr_t)i) == 0);
    for (int i = 0; i < N; i++) CHECK(pthread_join(threads[i], NULL) == 0);
}

static void same_thread_task(void *context, ada_job *job, int64_t task, int worker) {
    (void)job, (void)task;
    CHECK(worker == 0 && pthread_equal(pthread_self(), *(pthread_t *)context));
}

static void nesting_task(void *context, ada_job *job, int64_t task, int worker) {
    pthread_t self = pthread_self();
    CHECK(ada_parallel_for(10, 4, same_thread_task, &self, NULL, NULL));
    counted_task(context, job, task, worker);
}

static void check_nested(void) {
    static counted c;
    for (int n_threads = 1; n_threads <= 4; n_threads++)
        for (int round = 0; round < 100; round++) {
            memset(&c, 0, sizeof c);
            c.n_threads = n_threads, c.seed = 9;
            CHECK(ada_parallel_for(50, n_threads, nesting_task, &c, NULL, NULL));
            for (int t = 0; t < 50; t++)
                CHECK(atomic_load(&c.runs[t]) == 1 && c.results[t] == expected(9, t));
        }
}

/* ---- both threads take part; what pool threads are like ---- */

typedef struct {
    atomic_int arrived;
    bool signals_blocked, faults_open, named;
} meeting;

/* Each of two tasks waits for the other: possible only if two threads run them at the same time. */
static void meet(meeting *m) {
    atomic_fetch_add(&m->arrived, 1);
    for (double end = now() + 10; atomic_load(&m->arrived) < 2 && now() < end;) cpu_relax();
    CHECK(atomic_load(&m->arrived) == 2);
}

static void meeting_task(void *context, ada_job *job, int64_t task, int worker) {
    (void)job, (void)task;
    meeting *m = context;
    meet(m);
    if (worker == 0) return;
    sigset_t mask;
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    m->signals_blocked =
        sigismember(&mask, SIGINT) && sigismember(&mask, SIGTERM) && sigismember(&mask, SIGUSR1);
    m->faults_open = !sigismember(&mask, SIGSEGV) && !sigismember(&mask, SIGFPE);
#ifdef __linux__
    char name[16] = "";
    pthread_getname_np(pthread_self(), name, sizeof name);
    m->named = strncmp(name, "adaattn-", 8) == 0;
#else
    m->named = true;
#endif
}

static void check_meeting(void) {
    for (int round = 0; round < 20; round++) {
        if (round % 4 == 0) usleep(1000); /* workers have gone to sleep */
        meeting m = {0};
        CHECK(ada_parallel_for(2, 2, meeting_task, &m, NULL, NULL));
        CHECK(m.signals_blocked && m.faults_open && m.named);
    }
    sigset_t mask;
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    CHECK(!sigismember(&mask, SIGINT));
}

/* ---- floating-point environment ---- */

static unsigned rounding(void) {
#ifdef __SSE__
    return _mm_getcsr() & 0x6000; /* fegetround() asks the x87 unit, which nothing here uses */
#else
    return (unsigned)fegetround();
#endif
}

static void rounding_task(void *context, ada_job *job, int64_t task, int worker) {
    (void)context, (void)job, (void)task, (void)worker;
    volatile float tiny = 1e-38f, eighth = 0.125f, one = 1.0f, three = 3.0f;
    CHECK(rounding() == 0);
    CHECK(one / three == 0x1.555556p-2f);
    CHECK(tiny * eighth > 0); /* subnormal: neither flushed nor taken for zero */
}

static bool rounding_interrupt(void *context) {
    *(unsigned *)context = rounding();
    return false;
}

static void slow_task(void *context, ada_job *job, int64_t task, int worker) {
    (void)context, (void)job, (void)task, (void)worker;
    work_for(0.02);
}

static void check_float_env(void) {
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        CHECK(fesetround(FE_UPWARD) == 0);
#ifdef __SSE__
        unsigned mxcsr = _mm_getcsr() | 0x8040; /* flush to zero, denormals are zero */
        _mm_setcsr(mxcsr);
#endif
        CHECK(ada_parallel_for(100, n_threads, rounding_task, NULL, NULL, NULL));
        CHECK(ada_parallel_for(1, n_threads, rounding_task, NULL, NULL, NULL));
        unsigned mine = rounding(), seen = 0;
        CHECK(ada_parallel_for(5 * n_threads, n_threads, slow_task, NULL, rounding_interrupt, &seen));
        CHECK(seen == mine && mine != 0); /* the callback runs in the caller's own environment */
#ifdef __SSE__
        CHECK(_mm_getcsr() == mxcsr);
        _mm_setcsr(0x1F80);
#endif
        CHECK(fesetround(FE_TONEAREST) == 0);
    }
}

/* ---- cancellation ---- */

typedef struct {
    pthread_t caller;
    int asked, stop_after;
} stopper;

static bool stop_interrupt(void *context) {
    stopper *s = context;
    CHECK(pthread_equal(pthread_self(), s->caller));
    return ++s->asked >= s->stop_after;
}

static void endless_task(void *context, ada_job *job, int64_t task, int worker) {
    (void)context, (void)task;
    while (!ada_job_cancelled(job, worker)) work_for(5e-6);
}

/* Task 0 ends soon, wherever it runs; the caller must find out while it only waits for the other. */
static void endless_elsewhere_task(void *context, ada_job *job, int64_t task, int worker) {
    (void)task;
    meeting *m = context;
    meet(m);
    if (worker != 0) endless_task(context, job, task, worker);
}

/* Returns the longest time in seconds that a cancellation took. */
static double try_cancellation(void) {
    double slowest = 0;
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        stopper s = {pthread_self(), 0, 1};
        double start = now();
        CHECK(!ada_parallel_for(10, n_threads, endless_task, NULL, stop_interrupt, &s));
        if (now() - start > slowest) slowest = now() - start;
        CHECK(s.asked == 1);
    }
    meeting m = {0};
    stopper s = {pthread_self(), 0, 1};
    double start = now();
    CHECK(!ada_parallel_for(2, 2, endless_elsewhere_task, &m, stop_interrupt, &s));
    if (now() - start > slowest) slowest = now() - start;
    CHECK(s.asked == 1);

    s = (stopper){pthread_self(), 0, 4}; /* asked again and again, not on every poll */
    start = now();
    CHECK(!ada_parallel_for(2, 2, endless_task, NULL, stop_interrupt, &s));
    CHECK(s.asked == 4 && now() - start > 0.15);

    s = (stopper){pthread_self(), 0, INT_MAX};
    start = now();
    CHECK(ada_parallel_for(20, 2, slow_task, NULL, stop_interrupt, &s));
    CHECK(s.asked >= 1 && s.asked <= (now() - start) / 0.04);
    return slowest;
}

static void check_cancellation(void) {
    double slowest = 1;
    for (int attempt = 0; attempt < 5 && slowest >= 0.2; attempt++)
        slowest = try_cancellation(); /* busy machine */
    printf("  cancelled within %.0f ms\n", slowest * 1e3);
    CHECK(slowest < 0.2);
}

/* ---- threads that cannot be created; fork ---- */

static void check_creation_failure(void) {
    static counted c;
    int have = atomic_load(&pool.created);
    atomic_store(&threads_allowed, 0);
    run_counted(&c, 500, have + 5, 1);
    CHECK(atomic_load(&pool.created) == have);
    atomic_store(&threads_allowed, 1);
    run_counted(&c, 500, have + 5, 2);
    CHECK(atomic_load(&pool.created) == have + 1);
    atomic_store(&threads_allowed, INT_MAX);
    run_counted(&c, 500, have + 5, 3);
    CHECK(atomic_load(&pool.created) == have + 4);
    usleep(20000); /* let them start before anything forks, as AddressSanitizer needs it */
}

#ifndef HAS_TSAN

static void expect_success(pid_t child) {
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void compute(void) {
    static counted c;
    for (int i = 0; i < 20; i++) run_counted(&c, 100, 3, (uint64_t)i);
    if (role != OUTSIDE) return;
    meeting m = {0};
    CHECK(ada_parallel_for(2, 2, meeting_task, &m, NULL, NULL));
}

/* What a child does: computes, with new threads unless inside a task, so does a child of its own, and ends.
 */
static void live_as_child(void) {
    compute();
#    ifdef __SANITIZE_ADDRESS__
    usleep(20000); /* its allocator, which starting threads use, does not survive fork() */
#    endif
    pid_t child = fork();
    compute();
    if (child != 0) expect_success(child);
    _exit(0);
}

typedef struct {
    counted *counted;
    int forking_worker; /* -1: any */
    atomic_int forked;
    bool child_goes_on; /* instead of ending inside the task */
    pid_t child;
} forking;

static void end_at_once(void) { _exit(0); }

static void forking_task(void *context, ada_job *job, int64_t task, int worker) {
    forking *f = context;
    work_for(20e-6);
    if ((worker == f->forking_worker || f->forking_worker < 0) && atomic_exchange(&f->forked, 1) == 0) {
        pid_t child = fork();
        if (child == 0 && !f->child_goes_on) live_as_child();
        if (child == 0 && worker != 0) atexit(end_at_once); /* returns into the pool, which ends the thread */
        f->child = child;
    }
    counted_task(f->counted, job, task, worker);
}

static void *forking_main(void *stop) {
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (child == 0) live_as_child();
        expect_success(child);
    }
    atomic_store((atomic_bool *)stop, true);
    return NULL;
}

static bool fork_interrupt(void *context) {
    (void)context;
    pid_t child = fork();
    if (child == 0) live_as_child();
    expect_success(child);
    return false;
}

static void check_fork(void) {
    static counted c;
    for (int i = 0; i < 10; i++) { /* between jobs */
        run_counted(&c, 100, 3, 4);
        pid_t child = fork();
        if (child == 0) live_as_child();
        run_counted(&c, 100, 3, 5);
        expect_success(child);
        run_counted(&c, 100, 3, 6);
    }
    int forks = 0;
    for (int i = 0; i < 40; i++) { /* inside a task, of the caller, of a worker; the child ends or goes on */
        forking f = {&c, i % 4 - 1, 0, i % 8 >= 4, 0};
        memset(&c, 0, sizeof c);
        c.n_threads = 3, c.seed = 7;
        pid_t parent = getpid();
        CHECK(ada_parallel_for(300, 3, forking_task, &f, NULL, NULL));
        for (int t = 0; t < 300; t++) CHECK(atomic_load(&c.runs[t]) == 1 && c.results[t] == expected(7, t));
        if (getpid() != parent) live_as_child(); /* every task was done in the child as well */
        if (f.forked) expect_success(f.child), forks++;
    }
    CHECK(forks >= 10);         /* one by whichever worker comes first; a certain one may never come */
    for (int i = 0; i < 3; i++) /* in the interrupt callback */
        CHECK(ada_parallel_for(8, 2, slow_task, NULL, fork_interrupt, NULL));
    atomic_bool stop = false; /* while another thread is within jobs */
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, forking_main, &stop) == 0);
    while (!atomic_load(&stop)) run_counted(&c, 200, 3, 8);
    CHECK(pthread_join(thread, NULL) == 0);
}

#endif

/* ---- a team that was lent, as OpenMP's would be ---- */

enum { TEAM = 4 };
static struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    void (*function)(void *);
    void *context;
    int jobs, running;
} lent = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void *member_main(void *ignored) {
    (void)ignored;
    CHECK(fesetround(FE_UPWARD) == 0);
    const unsigned mine = rounding();
    for (int done = 0;; done++) {
        pthread_mutex_lock(&lent.mutex);
        while (lent.jobs == done) pthread_cond_wait(&lent.changed, &lent.mutex);
        pthread_mutex_unlock(&lent.mutex);
        lent.function(lent.context);
        CHECK(rounding() == mine && mine != 0);
        pthread_mutex_lock(&lent.mutex);
        lent.running--;
        pthread_cond_broadcast(&lent.changed);
        pthread_mutex_unlock(&lent.mutex);
    }
    return NULL;
}

static int team_size(void) { return TEAM; }

static void run_team(void (*function)(void *), void *context, unsigned n_threads, unsigned flags) {
    const pid_t process = getpid();
    CHECK(n_threads == 0 && flags == 0);
    pthread_mutex_lock(&lent.mutex);
    lent.function = function, lent.context = context;
    lent.jobs++, lent.running = TEAM - 1;
    pthread_cond_broadcast(&lent.changed);
    pthread_mutex_unlock(&lent.mutex);
    function(context);
    CHECK(getpid() == process); /* a child has no team to end the region with */
    pthread_mutex_lock(&lent.mutex);
    while (lent.running > 0) pthread_cond_wait(&lent.changed, &lent.mutex);
    pthread_mutex_unlock(&lent.mutex);
}

static void check_team(void) {
    static counted c;
    static pthread_t members[TEAM - 1];
    if (lent.jobs == 0)
        for (int i = 0; i < TEAM - 1; i++) CHECK(pthread_create(&members[i], NULL, member_main, NULL) == 0);
    usleep(20000);
    ada_lend_team(run_team, team_size);
    for (int n_threads = 1; n_threads <= TEAM + 2; n_threads++) {
        const int before = lent.jobs;
        run_counted(&c, 100, n_threads, 9);
        CHECK(lent.jobs - before == (n_threads > 1 && n_threads <= TEAM));
    }
    for (int round = 0; round < 2000; round++)
        run_counted(&c, 2 + round % 30, 2 + round % 3, (uint64_t)round);
    check_callers();
    check_nested();
    check_float_env();
    check_cancellation();
#ifndef HAS_TSAN
    check_fork();
#endif
    ada_lend_team(NULL, NULL);
}

/* ---- thread counts, cgroups, instruction sets ---- */

static int threads_under(const char *ours, const char *openmp) {
    ours ? setenv("ADAATTN_NUM_THREADS", ours, 1) : unsetenv("ADAATTN_NUM_THREADS");
    openmp ? setenv("OMP_NUM_THREADS", openmp, 1) : unsetenv("OMP_NUM_THREADS");
    ada_set_num_threads(0);
    return ada_get_num_threads();
}

static void check_default_threads(void) {
    int cpus = ada_cpu_count();
    CHECK(cpus >= 1 && threads_under(NULL, NULL) == cpus);
    CHECK(threads_under("3", NULL) == 3);
    CHECK(threads_under("3", "5") == 3);
    CHECK(threads_under(NULL, "5") == 5);
    CHECK(threads_under(NULL, "4,2") == 4);
    CHECK(threads_under(NULL, " 6 , 2") == 6);
    const char *malformed[] = {
        "", " ", "0", "-2", "x", "3x", "2.5", "0x4", ",3", "99999999999999999999", "4294967297"};
    for (size_t i = 0; i < sizeof malformed / sizeof *malformed; i++) {
        CHECK(threads_under(malformed[i], "7") == 7);
        CHECK(threads_under(NULL, malformed[i]) == cpus);
    }
    ada_set_num_threads(11);
    CHECK(ada_get_num_threads() == 11);
    CHECK(threads_under(NULL, NULL) == cpus);
}

static char tree[] = "/tmp/test_parallel.XXXXXX";

/* Writes a file below the tree, creating its folders. */
static void put(const char *path, const char *text) {
    char full[512];
    snprintf(full, sizeof full, "%s%s", tree, path);
    for (char *slash = full + strlen(tree); (slash = strchr(slash + 1, '/'));) {
        *slash = '\0';
        CHECK(mkdir(full, 0700) == 0 || errno == EEXIST);
        *slash = '/';
    }
    FILE *file = fopen(full, "w");
    CHECK(file && fputs(text, file) >= 0 && fclose(file) == 0);
}

static void check_cgroups(void) {
    strcpy(strrchr(tree, '.'), ".XXXXXX");
    CHECK(mkdtemp(tree));
    CHECK(ada_cgroup_cpus(tree) == INT_MAX); /* no such files */
    put("/proc/self/cgroup", "0::/user/job\n");
    CHECK(ada_cgroup_cpus(tree) == INT_MAX);
    put("/sys/fs/cgroup/user/job/cpu.max", "max 100000\n");
    CHECK(ada_cgroup_cpus(tree) == INT_MAX);
    put("/sys/fs/cgroup/user/job/cpu.max", "350000 100000\n");
    CHECK(ada_cgroup_cpus(tree) == 4); /* rounded up */
    put("/sys/fs/cgroup/user/cpu.max", "200000 100000\n");
    CHECK(ada_cgroup_cpus(tree) == 2); /* an ancestor's is tighter */
    put("/sys/fs/cgroup/cpu.max", "50000 100000\n");
    CHECK(ada_cgroup_cpus(tree) == 1); /* as a container sees itself */
    const char *malformed[] = {"", "\n", "x", "100000", "-5 100000", "100000 0", "max"};
    put("/sys/fs/cgroup/user/cpu.max", "max 100000\n");
    put("/sys/fs/cgroup/user/job/cpu.max", "max 100000\n");
    for (size_t i = 0; i < sizeof malformed / sizeof *malformed; i++) {
        put("/sys/fs/cgroup/cpu.max", malformed[i]);
        CHECK(ada_cgroup_cpus(tree) == INT_MAX);
    }
    put("/proc/self/cgroup", "5:cpuset:/\n4:cpu,cpuacct:/docker/77\n3:memory:/\nmalformed\n0::/\n");
    CHECK(ada_cgroup_cpus(tree) == INT_MAX);
    put("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "250000\n");
    CHECK(ada_cgroup_cpus(tree) == INT_MAX); /* no period */
    put("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
    CHECK(ada_cgroup_cpus(tree) == 3);
    put("/sys/fs/cgroup/cpu/docker/77/cpu.cfs_period_us", "50000\n");
    put("/sys/fs/cgroup/cpu/docker/77/cpu.cfs_quota_us", "100000\n");
    CHECK(ada_cgroup_cpus(tree) == 2);
    put("/sys/fs/cgroup/cpu/docker/77/cpu.cfs_quota_us", "-1\n");
    CHECK(ada_cgroup_cpus(tree) == 3);
    const char *lists[] = {"1:cpu:/", "1:cpuacct,cpu:/", "1:a,cpu,b:/", "1:cpuset,cpuacct:/", "1:xcpu:/"};
    for (int i = 0; i < 5; i++) {
        put("/proc/self/cgroup", lists[i]);
        CHECK(ada_cgroup_cpus(tree) == (i < 3 ? 3 : INT_MAX));
    }
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", tree);
    CHECK(system(command) == 0);
}

static void check_isa(void) {
    static const char *const names[] = {"scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"};
    uint32_t mask, found = ada_cpu_isa();
    for (int i = 0; i < 6; i++) {
        uint32_t bit = i ? 1u << (i - 1) : 0;
        CHECK(strcmp(ada_isa_name(bit), names[i]) == 0);
        CHECK(ada_isa_parse(names[i], &mask) == 0 && mask == (1u << i) - 1);
    }
    CHECK(!ada_isa_name(3) && !ada_isa_name(1u << 5));
    CHECK(ada_isa_parse("", &mask) == -1 && ada_isa_parse("AVX2", &mask) == -1 &&
          ada_isa_parse("zen4", &mask) == -1);
    CHECK((found & (found + 1)) == 0 && found == ada_cpu_isa()); /* each bundle implies those before */
#ifdef __x86_64__
    CHECK(!(found & ADA_ISA_AVX2) == !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
    CHECK(!(found & ADA_ISA_AVX512) || __builtin_cpu_supports("avx512vl"));
#endif
    char name[64], cut[4];
    ada_cpu_name(name, sizeof name);
    ada_cpu_name(cut, sizeof cut);
    CHECK(strlen(name) > 0 && strlen(cut) <= 3 && strncmp(name, cut, strlen(cut)) == 0);
    printf("  %s, %d CPUs, isa mask %#x\n", name, ada_cpu_count(), (unsigned)found);
}

/* ---- latency ---- */

static void timed_task(void *context, ada_job *job, int64_t task, int worker) {
    (void)job, (void)task, (void)worker;
    work_for(*(double *)context);
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void bench(void) {
    enum { N = 300 };
    static double times[N];
    double task_s[] = {0, 5e-6, 20e-6, 50e-6}, pauses[] = {0, 10e-6, 500e-6};
    printf("median and 90th percentile of a job of 2 tasks, us\n%8s %8s %10s %18s %18s\n", "task", "pause",
           "", "1 thread", "2 threads");
    for (int t = 0; t < 4; t++)
        for (int p = 0; p < 3; p++) {
            printf("%8.0f %8.0f %10s", task_s[t] * 1e6, pauses[p] * 1e6, pauses[p] > 1e-4 ? "(asleep)" : "");
            for (int n_threads = 1; n_threads <= 2; n_threads++) {
                for (int i = 0; i < N; i++) {
                    if (pauses[p] > 1e-4)
                        usleep((useconds_t)(pauses[p] * 1e6));
                    else
                        work_for(pauses[p]);
                    double start = now();
                    ada_parallel_for(2, n_threads, timed_task, &task_s[t], NULL, NULL);
                    times[i] = now() - start;
                }
                qsort(times, N, sizeof *times, compare_doubles);
                printf("  %8.2f %8.2f", times[N / 2] * 1e6, times[N * 9 / 10] * 1e6);
            }
            printf("\n");
        }
}

int main(int argc, char **argv) {
    int repeat = 1;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--bench") == 0) return bench(), 0;
        if (sscanf(argv[i], "--repeat=%d", &repeat) != 1)
            return fprintf(stderr, "unknown option %s\n", argv[i]), 2;
    }
    for (int i = 0; i < repeat; i++) {
        setvbuf(stdout, NULL, _IONBF, 0);
        puts("default thread count"), check_default_threads();
        puts("cgroup quotas"), check_cgroups();
        puts("instruction sets"), check_isa();
        puts("task counts"), check_counts();
        puts("two threads at once"), check_meeting();
        puts("several callers"), check_callers();
        puts("nested calls"), check_nested();
        puts("floating-point environment"), check_float_env();
        puts("cancellation"), check_cancellation();
        puts("failing thread creation"), check_creation_failure();
#ifdef HAS_TSAN
        puts("fork: left out under ThreadSanitizer");
#else
        puts("fork"), check_fork();
#endif
        puts("a team that was lent"), check_team();
    }
    puts("ok");
    return 0;
}
