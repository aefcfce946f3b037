/* faults.c: see faults.h.  Part of test builds only. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "nsexec.h"

static enum fault_point wanted = FAULT_COUNT;

/* Must be called before the environment is replaced. */
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

static void interrupt(int number)
{
	(void)number;
}

/* Pause until the runtime dies; then continue, as a stage that was never stopped would. */
void fault(enum fault_point here)
{
	if (here != wanted)
		return;
	signal(SIGUSR1, interrupt);
	prctl(PR_SET_PDEATHSIG, SIGUSR1, 0, 0, 0);
	prctl(PR_SET_NAME, "nsexec:fault", 0, 0, 0);
	pause();
	prctl(PR_SET_NAME, "nsexec:after", 0, 0, 0);
	prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
	signal(SIGUSR1, SIG_DFL);
}
