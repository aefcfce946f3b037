/*
 * pause.c: the first process of a pid namespace that containers share.  It reaps what they leave behind (pid_namespaces(7)) and does
 * nothing else: no rights, an empty root, no descriptors.  It ends by the agent's SIGKILL, which is the only signal that reaches it, or
 * with the agent; everything in the namespace ends with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "nsexec.h"

/*
 * A procfs of this pid namespace for the containers to come, where the agent has its mount namespace.  They mount copies of it: only
 * somebody inside can make one, and nobody with the rights to should be there once they are.
 */
void offer_procfs(int target)
{
	int procfs = private_procfs(false);

	if (sys_move_mount(procfs, target) < 0)
		fail("pause", "procfs", errno, NULL);
	close(procfs);
	close(target);
}

NORETURN void become_pause(int sync)
{
	static const uint64_t chld = 1ull << (SIGCHLD - 1);
	char none;

	prctl(PR_SET_NAME, "pause", 0, 0, 0);
	if (syscall(SYS_rt_sigprocmask, SIG_BLOCK, &chld, NULL, sizeof(chld)) < 0)
		fail("pause", "signals", errno, NULL);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0)
		fail("pause", "parent", errno, NULL);
	if (recv(sync, &none, 1, MSG_DONTWAIT) == 0)
		_exit(1); /* the agent ended before it was asked to tell */
	report_progress(PROGRESS_READY);
	if (sys_close_range(0, ~0u) < 0)
		_exit(1);
	for (;;) {
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		(void)!syscall(SYS_rt_sigtimedwait, &chld, NULL, NULL, sizeof(chld));
	}
}
