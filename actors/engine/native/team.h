/* Work in parts that several threads do together. */
#ifndef TEAM_H
#define TEAM_H

/* Parts that may be done in any order and at once, after all those of the phase before. */
struct phase {
    /* Does one part; threads that work at the same time have different seats, from 0. */
    void (*work)(const void *of, int part, int seat);
    const void *of;
    int parts;
    int next, done; /* 0 to begin with */
};

/* Has at most so many threads, this one among them, do all parts of all phases. */
void run_phases(struct phase *phases, int count, int threads);

#endif
