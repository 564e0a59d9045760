/* A team of threads that share out the tasks of one call after the other.
 *
 * Calls follow each other within microseconds while a step runs, and not at all between requests: so helpers look for
 * work for a moment, then sleep. Tasks are taken one by one from a counter, and the caller takes them, too: a helper
 * that wakes late, or whose core another process has, costs nothing but its help.
 */
#include "team.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum { PAUSES_BEFORE_SLEEP = 2000, PAUSES_BEFORE_YIELD = 2000 }; /* some tens of microseconds */

/* The state of the team: bit 0 says that there is a call whose tasks can be taken, the lower half above it counts the
 * helpers that are at it, the upper half counts calls. What a call consists of changes only while no helper is at it. */
static const uint64_t OPEN = 1, HELPER = 2, CALL = (uint64_t)1 << 32;
static _Atomic uint64_t state;

static task_function call_work;
static const void *call_context;
static int call_tasks;
static _Atomic int next_task;

static pthread_mutex_t caller_lock = PTHREAD_MUTEX_INITIALIZER; /* one call at a time; guards num_started */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static _Atomic int num_sleeping;
static _Atomic int num_started;

static void take_tasks(void) {
    for (int task; (task = atomic_fetch_add(&next_task, 1)) < call_tasks;) call_work(call_context, task);
}

static void sleep_until_open(void) {
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&num_sleeping, 1);
    while (!(atomic_load(&state) & OPEN)) pthread_cond_wait(&wake, &sleep_lock);
    atomic_fetch_sub(&num_sleeping, 1);
    pthread_mutex_unlock(&sleep_lock);
}

static void *help(void *unused) {
    uint64_t done = 0; /* the last call that this helper was at */
    for (int idle = 0;; idle++) {
        uint64_t seen = atomic_load(&state);
        if ((seen & OPEN) && seen / CALL != done) {
            if (!atomic_compare_exchange_strong(&state, &seen, seen + HELPER)) continue;
            take_tasks();
            done = seen / CALL;
            atomic_fetch_sub(&state, HELPER);
            idle = 0;
        } else if (idle < PAUSES_BEFORE_SLEEP) {
            _mm_pause();
        } else if (seen & OPEN) {
            sched_yield(); /* its tasks are taken, but not all done */
        } else {
            sleep_until_open();
            idle = 0;
        }
    }
    return unused;
}

int team_start(int num_helpers) {
    pthread_mutex_lock(&caller_lock);
    while (num_started < num_helpers) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, NULL)) break;
        pthread_detach(thread);
        atomic_fetch_add(&num_started, 1);
    }
    pthread_mutex_unlock(&caller_lock);
    return num_started;
}

int team_size(void) { return num_started + 1; }

void team_run(task_function work, const void *context, int num_tasks) {
    if (num_tasks <= 1 || !num_started || pthread_mutex_trylock(&caller_lock)) {
        for (int task = 0; task < num_tasks; task++) work(context, task);
        return;
    }
    call_work = work;
    call_context = context;
    call_tasks = num_tasks;
    atomic_store(&next_task, 0);
    atomic_fetch_add(&state, CALL + OPEN);
    if (atomic_load(&num_sleeping)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
    take_tasks();
    atomic_fetch_sub(&state, OPEN);
    for (int waited = 0; atomic_load(&state) % CALL; waited++) {
        if (waited < PAUSES_BEFORE_YIELD) _mm_pause();
        else sched_yield();
    }
    pthread_mutex_unlock(&caller_lock);
}
