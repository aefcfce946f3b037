/* faults.c: see faults.h.  Part of test builds only. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "nsexec.h"

static enum fault_point wanted = FAULT_COUNT;

/* To be called before the environment is replaced. */
void faults_from_environment(void)
{
#define POINT(name) #name,
	static const char *const names[] = {FAULT_POINTS(POINT)};
#undef POINT
	const char *text = getenv("_CAISSON_FAULT");

	for (unsigned i = 0; text != NULL && i < FAULT_COUNT; i++)
		if (strcmp(text, names[i]) == 0)
			wanted = (enum fault_point)i;
}

void fault(enum fault_point here)
{
	if (here != wanted)
		return;
	prctl(PR_SET_NAME, "nsexec:fault", 0, 0, 0);
	for (;;)
		pause();
}
