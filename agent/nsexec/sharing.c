/*
 * sharing.c: how a process shares the machine with others (CPUs, scheduler, I/O priority, personality), and its label for a security
 * module.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "nsexec.h"

#define IOPRIO_WHO_PROCESS 1

static void set_cpus(const uint8_t *mask, size_t size)
{
	static uint64_t every[CPU_MASK_MAX / 8];

	if (mask == NULL) {
		memset(every, 0xff, sizeof(every));
		mask = (const uint8_t *)every;
		size = sizeof(every);
	}
	if (syscall(SYS_sched_setaffinity, 0, size, mask) < 0)
		fail("cpu affinity", "", errno, errno == EINVAL ? "none of these CPUs is to be had" : NULL);
}

/* The agent's own set of CPUs is none of the container's business. */
void set_first_cpus(const struct plan *plan)
{
	set_cpus(plan->cpus, plan->cpus_size);
}

/* While all rights are still there. */
void set_sharing(const struct plan *plan)
{
	if (plan->final_cpus != NULL || plan->cpus != NULL)
		set_cpus(plan->final_cpus, plan->final_cpus_size);
	if (plan->scheduler != NULL && syscall(SYS_sched_setattr, 0, plan->scheduler, 0) < 0)
		fail("scheduler", "", errno, NULL);
	if (plan->has_io_priority && syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, plan->io_priority) < 0)
		fail("io priority", "", errno, NULL);
	if (plan->has_personality && syscall(SYS_personality, (unsigned long)plan->personality) < 0)
		fail("personality", "", errno, NULL);
}

/* The label that execve changes to, told through a procfs that nobody else has prepared (CVE-2019-16884). */
void set_label(const struct plan *plan, int procfs)
{
	int own = procfs < 0 ? private_procfs(true) : -1, fd;
	char path[64];

	snprintf(path, sizeof(path), "thread-self/attr/%s", plan->label_file);
	fd = openat(own < 0 ? procfs : own, path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0 || write(fd, plan->label, strlen(plan->label)) != (ssize_t)strlen(plan->label))
		fail("label", plan->label, errno, NULL);
	close(fd);
	if (own >= 0)
		close(own);
}
