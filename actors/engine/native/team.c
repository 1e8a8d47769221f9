/* Threads take the parts of a phase one by one, so that one that has lost its core to another process holds the others
 * up by the part it is at and no more. They are those of OpenMP that torch has loaded: others would compete for the
 * cores with these, which stay awake for milliseconds after each use.
 */
#include "team.h"

#include <omp.h>
#include <time.h>

/* Looks for the others' last parts before the time is taken. */
#define LOOKS 1000
/* Seconds that a thread waits for another that has a core of its own, at most. */
#define PATIENCE 5e-4
/* Once another had none, this thread works alone for so many times as long as it waited: where other processes have the
 * cores, two threads are no slower than one then, and else by a twentieth. */
#define ALONE 20

/* When others may take part again. */
static double alone_until;

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

/* Waits for the parts that others have taken; for how long, if that was long. Awake: whoever yields its core here waits
 * for a turn of the other process then, and did ten times as little in a trial. */
static double wait_for(struct phase *phase)
{
    double since = 0, waited = 0;
    for (int looks = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < phase->parts; looks++) {
        breathe();
        if (looks % LOOKS == LOOKS - 1) {
            since = since ? since : now();
            waited = now() - since;
        }
    }
    return waited;
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

void run_phases(struct phase *phases, int count, int threads)
{
    if (threads > 1) {
        double until;
        __atomic_load(&alone_until, &until, __ATOMIC_RELAXED);
        threads = until == 0 || now() > until ? threads : 1;
    }
    if (threads == 1) {
        take_parts(phases, count, 0);
        return;
    }
    double waited = 0, finished = 0;
#pragma omp parallel num_threads(threads)
    {
        const int seat = omp_get_thread_num();
        const double longest = take_parts(phases, count, seat);
        if (seat == 0)
            waited = longest, finished = now();
    }
    /* All threads have to come to the end, also those that found nothing left to do. */
    const double end = now();
    waited = end - finished > waited ? end - finished : waited;
    if (waited > PATIENCE) {
        const double until = end + ALONE * waited;
        __atomic_store(&alone_until, &until, __ATOMIC_RELAXED);
    }
}
