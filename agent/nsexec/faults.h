/*
 * faults.h: points at which a stage of a test build (`make FAULTS=1`) stands still, for a test to kill it there.  The program that is
 * shipped has none of it.
 *
 * The one that is named by _CAISSON_FAULT waits under the name "nsexec:fault".  It does not kill itself: the first process of a pid
 * namespace cannot.
 */
#ifndef NSEXEC_FAULTS_H
#define NSEXEC_FAULTS_H

/* In the order in which they are come by; those of stage 1 only where there is one. */
#define FAULT_POINTS(POINT)                                                              \
	POINT(entry)            /* stage 0 knows its descriptors */                      \
	POINT(messages)         /* it has read what to do */                             \
	POINT(stage1_cloned)    /* there is a stage 1, of which the agent is not told */ \
	POINT(stage1_told)      /* it is told, stage 1 waits for that */                 \
	POINT(stage1_entry)     /* stage 1, before it may go on */                       \
	POINT(stage1_joined)    /* it has joined what there is to join */                \
	POINT(stage1_unmapped)  /* in a user namespace without maps */                   \
	POINT(stage0_maps)      /* stage 0 is asked for them */                          \
	POINT(stage1_mapped)    /* they are there */                                     \
	POINT(stage1_offsets)   /* about to ask for time offsets */                      \
	POINT(stage2_making)    /* whoever makes stage 2 is about to */                  \
	POINT(stage2_cloned)    /* there is one, of which the agent is not told */       \
	POINT(stage2_told)      /* it is told, stage 2 waits for that */                 \
	POINT(stage2_entry)     /* stage 2, before it may go on */                       \
	POINT(stage2_gone_on)   /* it may */                                             \
	POINT(root_mounted)     /* the root file system is complete, but not entered */  \
	POINT(set_up)           /* it is entered */                                      \
	POINT(prepared)         /* with the container's own rights only */               \
	POINT(ready)            /* the agent knows */                                    \
	POINT(executing)        /* started, about to execute */

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
