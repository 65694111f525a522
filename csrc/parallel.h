/* The thread pool: one per process, grown on demand, owned by this library alone.
 *
 * No OpenMP of our own: two OpenMP runtimes in one process fight over cores, and theirs do not survive
 * fork(). But a library that has one may lend it: its threads wait for work by spinning on the cores that
 * ours need. One job runs at a time; a second caller that finds the pool busy computes on its own thread.
 * Which thread runs a task never influences the result: tasks are independent and their number is
 * fixed by the problem.
 */
#ifndef ADA_PARALLEL_H
#define ADA_PARALLEL_H

#include <stdbool.h>
#include <stdint.h>

/* No job runs on more; no known machine gains from more. */
#define ADA_MAX_THREADS 1024

typedef struct ada_job ada_job;

/* Runs one task. worker is 0 for the calling thread, else 1 ... n_threads - 1; never two tasks at
 * once with the same worker, so it may index scratch memory. */
typedef void ada_task_fn(void *context, ada_job *job, int64_t task, int worker);

/* Asked by the calling thread about every 50 ms; true means: stop as soon as possible. */
typedef bool ada_interrupt_fn(void *context);

/* Runs tasks 0 ... n_tasks - 1, started in increasing order, on at most n_threads (at most 1024) threads, the
 * caller among them; on the caller's alone when the pool is busy, when called from inside a task or
 * interrupt, and when no thread can be created. Every thread computes under the default floating-point
 * environment; interrupt runs under the caller's, which is restored at the end. Returns false when interrupt
 * (may be NULL) answered true; some tasks then never ran or stopped half way.
 *
 * fork() is safe at any time, also inside a task or interrupt: the child has a new pool, and goes on with the
 * job it was in on its own. Only a child forked by a pool thread cannot, as it has no caller: that thread
 * ends when its task returns. */
bool ada_parallel_for(int64_t n_tasks, int n_threads, ada_task_fn *task, void *context,
                      ada_interrupt_fn *interrupt, void *interrupt_context);

/* OpenMP's entry points, by GNU's names: GOMP_parallel, which runs function(context) on a team that the
 * caller is a member of (n_threads = 0: of as many as size says), and omp_get_max_threads. */
typedef void ada_team_fn(void (*function)(void *), void *context, unsigned n_threads, unsigned flags);
typedef int ada_team_size_fn(void);

/* From now on, jobs of up to size() threads run on the team instead of the pool; NULL, NULL: never. Nothing
 * else changes. A child of fork() has the pool alone. */
void ada_lend_team(ada_team_fn *team, ada_team_size_fn *size);

/* To be called now and then (every few microseconds of work) inside a task: true means return now. Costs
 * nanoseconds. */
bool ada_job_cancelled(ada_job *job, int worker);

/* Threads used by default: ada_set_num_threads, else ADAATTN_NUM_THREADS, else OMP_NUM_THREADS, else the
 * CPUs that the affinity mask and the cgroup quota allow; at least 1. */
int ada_get_num_threads(void);
void ada_set_num_threads(int n); /* n >= 1; 0 returns to the default */

#endif
