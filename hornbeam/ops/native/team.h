/* A team of threads that share out the tasks of one call after the other. */
#pragma once

typedef void (*task_function)(const void *context, int task);

/* Start `num_helpers` threads beside the callers; does nothing if that many are there. Returns how many there are. */
int team_start(int num_helpers);

/* Run tasks 0 .. num_tasks - 1, in any order, on the calling thread and on helpers that are free; returns when all are
 * done. If another call is under way, the caller does its tasks alone. */
void team_run(task_function work, const void *context, int num_tasks);

/* Helpers and the caller. */
int team_size(void);
