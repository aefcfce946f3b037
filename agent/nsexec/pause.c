/*
 * pause.c: the first process of a pid namespace that containers share.  It only reaps orphans (pid_namespaces(7)): it
 * has no capabilities, an empty root and no descriptors.  It is ended by the runtime's SIGKILL, the only signal that
 * reaches it, or with the runtime, and all processes of the namespace end with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "nsexec.h"

/*
 * Mount a procfs of this pid namespace on a directory in the runtime's mount namespace.  Containers get clones of it:
 * only a privileged member of the namespace could mount one, and once containers have joined there must be none.
 */
void attach_pause_procfs(int target)
{
	int procfs = private_procfs(false);

	if (sys_move_mount(procfs, target) < 0)
		fail_errno("pause", "procfs", NULL);
	close(procfs);
	close(target);
}

NORETURN void pause_main(int sync)
{
	static const uint64_t chld = 1ull << (SIGCHLD - 1);
	char none;

	prctl(PR_SET_NAME, "pause", 0, 0, 0);
	if (syscall(SYS_rt_sigprocmask, SIG_BLOCK, &chld, NULL, sizeof(chld)) < 0)
		fail_errno("pause", "signals", NULL);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0)
		fail_errno("pause", "parent", NULL);
	if (recv(sync, &none, 1, MSG_DONTWAIT) == 0)
		_exit(1); /* the runtime exited before prctl took effect */
	report_progress(PROGRESS_READY);
	if (sys_close_range(0, ~0u) < 0)
		_exit(1);
	for (;;) {
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		(void)!syscall(SYS_rt_sigtimedwait, &chld, NULL, NULL, sizeof(chld));
	}
}
