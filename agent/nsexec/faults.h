/*
 * faults.h: points at which a stage of a test build (`make FAULTS=1`) stops, so that a test can kill it there.  Release
 * builds have none.
 *
 * At the point named by _CAISSON_FAULT a stage renames itself to "nsexec:fault" and waits.  It does not kill itself:
 * the first process of a pid namespace cannot.
 */
#ifndef NSEXEC_FAULTS_H
#define NSEXEC_FAULTS_H

/* In order of execution; those of the fork server and of stage 1 only if they exist. */
#define FAULT_POINTS(POINT)                                                                 \
	POINT(server_cloned)   /* the fork server's new process exists, not reported yet */ \
	POINT(entry)	       /* stage 0 knows its descriptors */                          \
	POINT(messages)	       /* it has read its messages */                               \
	POINT(stage1_cloned)   /* stage 1 exists, not reported to the runtime yet */        \
	POINT(stage1_reported) /* reported to the runtime, stage 1 waits */                 \
	POINT(stage1_entry)    /* stage 1, waiting for stage 0 */                           \
	POINT(stage1_joined)   /* it has joined its namespaces */                           \
	POINT(stage1_unmapped) /* in a user namespace without maps */                       \
	POINT(stage0_maps)     /* stage 0 has been asked for maps or offsets */             \
	POINT(stage1_mapped)   /* the maps are written */                                   \
	POINT(stage1_offsets)  /* about to ask for time offsets */                          \
	POINT(stage2_cloning)  /* about to clone stage 2 */                                 \
	POINT(stage2_cloned)   /* stage 2 exists, not reported to the runtime yet */        \
	POINT(stage2_reported) /* reported to the runtime, stage 2 waits */                 \
	POINT(stage2_entry)    /* stage 2, waiting for its parent */                        \
	POINT(stage2_released) /* it may run */                                             \
	POINT(root_mounted)    /* the root file system is complete, before pivot_root */    \
	POINT(set_up)	       /* after pivot_root */                                       \
	POINT(prepared)	       /* with the container's user and capabilities */             \
	POINT(ready)	       /* the runtime knows that it is ready */                     \
	POINT(executing)       /* started, about to execute */

#ifdef FAULTS
#define POINT(name) FAULT_##name,
enum fault_point { FAULT_POINTS(POINT) FAULT_COUNT };
#undef POINT
void faults_from_environment(void);
void fault(enum fault_point here);
#define FAULT(name) fault(FAULT_##name)
#else
#define faults_from_environment() ((void)0)
#define FAULT(name) ((void)0)
#endif

#endif
