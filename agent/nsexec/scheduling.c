/*
 * scheduling.c: set CPU affinity, scheduler, I/O priority, personality and memory policy of the process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "nsexec.h"

#define IOPRIO_WHO_PROCESS 1
#define POLICY_DEADLINE 6u
#define FLAG_RESET_ON_FORK 1u

/* Log a mask as one hexadecimal number, without leading zeros. */
static void log_cpus(const uint8_t *mask, size_t size)
{
	static char text[2 * CPU_MASK_MAX + 3];
	size_t at = size;
	int used;

	while (at > 1 && mask[at - 1] == 0)
		at--;
	used = snprintf(text, sizeof(text), "0x%x", mask[--at]);
	while (at > 0)
		used += snprintf(text + used, sizeof(text) - (size_t)used, "%02x", mask[--at]);
	log_debug("affinity:", text);
}

static void set_cpus(const uint8_t *mask, size_t size)
{
	static uint64_t every[CPU_MASK_MAX / 8];

	if (mask == NULL) {
		memset(every, 0xff, sizeof(every));
		mask = (const uint8_t *)every;
		size = sizeof(every);
	} else {
		log_cpus(mask, size);
	}
	if (syscall(SYS_sched_setaffinity, 0, size, mask) < 0)
		fail_errno("cpu affinity", "", errno == EINVAL ? "none of these CPUs is available" : NULL);
}

/* The runtime's own CPU affinity must not be inherited by the container. */
void set_initial_cpus(const struct plan *plan)
{
	set_cpus(plan->cpus, plan->cpus_size);
}

/*
 * Whether a clone would lose this process's scheduler: it is reset, or clone fails (sched(7)).  Then the runtime sets
 * it, because the cloning stage has only the container's capabilities left.
 */
bool scheduler_is_lost_by_clone(const struct plan *plan)
{
	uint32_t policy;
	uint64_t flags;

	if (plan->scheduler == NULL)
		return false;
	memcpy(&policy, plan->scheduler + 4, sizeof(policy));
	memcpy(&flags, plan->scheduler + 8, sizeof(flags));
	return policy == POLICY_DEADLINE || (flags & FLAG_RESET_ON_FORK) != 0;
}

/* Must be called with full capabilities; `before_clone` if called by the stage that clones the process. */
void set_scheduling(const struct plan *plan, bool before_clone)
{
	bool later = before_clone && scheduler_is_lost_by_clone(plan);

	if (plan->final_cpus != NULL || plan->cpus != NULL)
		set_cpus(plan->final_cpus, plan->final_cpus_size);
	if (plan->scheduler != NULL && !later && syscall(SYS_sched_setattr, 0, plan->scheduler, 0) < 0)
		fail_errno("scheduler", "", NULL);
	if (plan->has_io_priority && syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, plan->io_priority) < 0)
		fail_errno("io priority", "", NULL);
	if (plan->has_personality && syscall(SYS_personality, (unsigned long)plan->personality) < 0)
		fail_errno("personality", "", NULL);
	if (plan->memory_nodes != NULL &&
	    syscall(SYS_set_mempolicy, plan->memory_policy, plan->memory_nodes_size == 0 ? NULL : plan->memory_nodes,
		    plan->memory_nodes_size * 8 + 1) < 0)
		fail_errno("memory policy", "", "set_mempolicy");
}
