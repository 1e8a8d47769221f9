/* Threads that help whoever has work in parts; `kernels.c` has. A helper that is late finds nothing left to do, and
 * nobody has waited for it: where other processes have the cores, threads that all have to come to the end of every
 * product (as OpenMP's do) wait for each other's turn on a core each time. Whoever finds the helpers taken works alone.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#define MOST_HELPERS 255
/* Looks for work before a helper goes to sleep, about 50 us: the products of a step follow each other within that. */
#define LOOKS 2000

static struct {
    pthread_mutex_t taken, asleep;
    pthread_cond_t wake;
    atomic_int open, inside, next, jobs, sleepers;
    int helpers, seats, parts;
    void (*work)(const void *, int);
    const void *of;
} crew;

static void forget_helpers(void)
{
    memset(&crew, 0, sizeof crew);
    pthread_mutex_init(&crew.taken, NULL);
    pthread_mutex_init(&crew.asleep, NULL);
    pthread_cond_init(&crew.wake, NULL);
}

__attribute__((constructor)) static void begin(void)
{
    forget_helpers();
    pthread_atfork(NULL, NULL, forget_helpers); /* a forked process has none of the threads */
}

static inline void breathe(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_parts(void)
{
    for (int part; (part = atomic_fetch_add(&crew.next, 1)) < crew.parts;)
        crew.work(crew.of, part);
}

static void *help(void *seat)
{
    for (int seen = 0;;) {
        for (int looks = 0; looks < LOOKS && atomic_load(&crew.jobs) == seen; looks++)
            breathe();
        if (atomic_load(&crew.jobs) == seen) {
            pthread_mutex_lock(&crew.asleep);
            atomic_fetch_add(&crew.sleepers, 1);
            while (atomic_load(&crew.jobs) == seen)
                pthread_cond_wait(&crew.wake, &crew.asleep);
            atomic_fetch_sub(&crew.sleepers, 1);
            pthread_mutex_unlock(&crew.asleep);
        }
        seen = atomic_load(&crew.jobs);
        /* Whoever has work closes it, and then waits until nobody is inside: one of both sees the other. */
        atomic_fetch_add(&crew.inside, 1);
        if (atomic_load(&crew.open) && (ptrdiff_t)seat < crew.seats)
            take_parts();
        atomic_fetch_sub(&crew.inside, 1);
    }
    return NULL;
}

static void hire(int helpers)
{
    for (pthread_t thread; crew.helpers < helpers && crew.helpers < MOST_HELPERS; crew.helpers++) {
        if (pthread_create(&thread, NULL, help, (void *)(ptrdiff_t)crew.helpers))
            return;
        pthread_detach(thread);
    }
}

void share(int parts, int threads, void (*work)(const void *, int), const void *of);

/* Has `threads` do all parts of some work, this one among them. */
void share(int parts, int threads, void (*work)(const void *, int), const void *of)
{
    if (threads == 1 || pthread_mutex_trylock(&crew.taken)) {
        for (int part = 0; part < parts; part++)
            work(of, part);
        return;
    }
    hire(threads - 1);
    crew.work = work, crew.of = of, crew.parts = parts, crew.seats = threads - 1;
    atomic_store(&crew.next, 0);
    atomic_store(&crew.open, 1);
    atomic_fetch_add(&crew.jobs, 1);
    if (atomic_load(&crew.sleepers)) {
        pthread_mutex_lock(&crew.asleep);
        pthread_cond_broadcast(&crew.wake);
        pthread_mutex_unlock(&crew.asleep);
    }
    take_parts();
    atomic_store(&crew.open, 0);
    for (int looks = 0; atomic_load(&crew.inside); looks++)
        looks < LOOKS ? breathe() : (void)sched_yield();
    pthread_mutex_unlock(&crew.taken);
}
