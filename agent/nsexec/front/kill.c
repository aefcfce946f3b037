/* kill.c: `kill` the first process, as Container.kill does. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "front.h"

/* signal(7), by number, without the prefix; aliases and real-time signals are left to Python. */
static const char *const SIGNALS[] = {"",     "HUP",  "INT",  "QUIT", "ILL",  "TRAP", "ABRT",	"BUS",	"FPE",	"KILL",
				      "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP",
				      "TSTP", "TTIN", "TTOU", "URG",  "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH"};

static int signal_number(const char *text)
{
	size_t digits = strspn(text, "0123456789");

	if (digits > 0 && digits < 3 && text[digits] == '\0')
		return atoi(text) <= 64 ? atoi(text) : -1;
	if (strncasecmp(text, "SIG", 3) == 0)
		text += 3;
	for (size_t i = 1; i < ARRAY_SIZE(SIGNALS); i++)
		if (strcasecmp(text, SIGNALS[i]) == 0)
			return (int)i;
	return -1;
}

int kill_container(const struct container *container, const struct request *request)
{
	int number = signal_number(request->args[0] == NULL ? "TERM" : request->args[0]), pidfd;
	enum status status = status_of(container);

	if (number < 0 || status == STATUS_STOPPED)
		return HAND_OVER;
	/* Without its own pid namespace it is killed through its cgroup; a paused one must be thawed to die. */
	if (number == SIGKILL && (status == STATUS_PAUSED || (container->flags & FLAG_OWN_PIDS) == 0))
		return HAND_OVER;
	pidfd = pidfd_of(container);
	FAULT(kill_signal);
	if (pidfd < 0 || syscall(SYS_pidfd_send_signal, pidfd, number, NULL, 0) < 0)
		return HAND_OVER;
	/* If it was paused just now, it would die only when resumed. */
	return number == SIGKILL && status_of(container) == STATUS_PAUSED ? HAND_OVER : 0;
}
