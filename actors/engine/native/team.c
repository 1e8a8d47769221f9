/* Threads take the parts of a phase one by one, so that one that has lost its core to another process holds the others
 * up by the part it is at and no more. They are those of OpenMP that torch has loaded: others would compete for the
 * cores with these, which stay awake for milliseconds after each use.
 */
#include "team.h"

#include <omp.h>
#include <sched.h>
#include <time.h>

/* Looks for the others' last parts before it is considered that they may have no core. */
#define LOOKS 2000
/* Seconds that a thread waits for others where each has a core, and parts are even. */
#define PATIENCE 1e-3
/* Most work that this thread does alone before it sees again whether the others have cores. */
#define LONGEST_ALONE 255

static int alone, pause_length;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static inline void breathe(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Waits for the parts that others have taken; the seconds if they were many. */
static double wait_for(struct phase *phase)
{
    double since = 0;
    for (int looks = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < phase->parts; looks++)
        if (looks < LOOKS)
            breathe();
        else {
            since = since ? since : now();
            sched_yield();
        }
    return since ? now() - since : 0;
}

/* The longest wait for other threads. */
static double take_parts(struct phase *phases, int count, int seat)
{
    double longest = 0;
    for (struct phase *phase = phases; phase < phases + count; phase++) {
        for (int part; (part = __atomic_fetch_add(&phase->next, 1, __ATOMIC_RELAXED)) < phase->parts;) {
            phase->work(phase->of, part, seat);
            __atomic_fetch_add(&phase->done, 1, __ATOMIC_RELEASE);
        }
        const double waited = wait_for(phase);
        longest = waited > longest ? waited : longest;
    }
    return longest;
}

/* Whether the other threads are to be left out: each time that they were waited for, for longer. */
static int are_away(void)
{
    const int left = __atomic_load_n(&alone, __ATOMIC_RELAXED);
    if (left > 0)
        __atomic_store_n(&alone, left - 1, __ATOMIC_RELAXED);
    return left > 0;
}

static void remember(double waited)
{
    const int before = __atomic_load_n(&pause_length, __ATOMIC_RELAXED);
    const int after = waited < PATIENCE ? before / 2 : before < LONGEST_ALONE ? 2 * before + 1 : before;
    __atomic_store_n(&pause_length, after, __ATOMIC_RELAXED);
    __atomic_store_n(&alone, waited < PATIENCE ? 0 : after, __ATOMIC_RELAXED);
}

void run_phases(struct phase *phases, int count, int threads)
{
    if (threads == 1 || are_away()) {
        take_parts(phases, count, 0);
        return;
    }
    double longest = 0, finished = 0;
#pragma omp parallel num_threads(threads)
    {
        const int seat = omp_get_thread_num();
        const double waited = take_parts(phases, count, seat);
        if (seat == 0)
            longest = waited, finished = now();
    }
    /* All threads come to the end, also those that found nothing left to do. */
    const double joined = now() - finished;
    remember(joined > longest ? joined : longest);
}
