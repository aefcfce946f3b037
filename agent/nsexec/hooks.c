/*
 * hooks.c: run hooks in the container's namespaces: createContainer, a host program, before pivot_root, and
 * startContainer, a program in the container, right before the container's process (OCI config.md, "POSIX-platform
 * Hooks").
 *
 * A hook runs in its own session, reads the container's state from stdin, and must exit with status 0 before its
 * timeout, when its process group is killed.  The tail of its output becomes part of the error.  prestart and
 * createRuntime hooks are run by the runtime, while nsexec waits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#include "nsexec.h"

#define OUTPUT_MAX 800u /* bytes of output quoted in an error */

struct hook_run {
	const struct context *ctx;
	bool creating;	/* createContainer, not startContainer */
	char point[40]; /* the hook's name and number, for errors */
	const struct hook_step *hook;
	int cwd; /* its working directory, -1 to inherit it */
	char output[OUTPUT_MAX + 1];
	size_t kept;
};

/* Complete the runtime's JSON state with the members that only this process knows. */
static const char *finish_state(const char *head, const char *status, size_t *size)
{
	static char state[1 << 16];
	int length = snprintf(state, sizeof(state), "%s,\"status\":\"%s\",\"pid\":%d}", head, status, getpid());

	if (length < 0 || (size_t)length >= sizeof(state))
		fail(EMSGSIZE, "hooks", "state", NULL);
	*size = (size_t)length;
	return state;
}

NORETURN static void exec_hook(const struct hook_run *run, int parent, int input, int output)
{
	const struct hook_step *hook = run->hook;
	const struct plan *plan = &run->ctx->plan;
	struct cursor strings = hook->strings;
	size_t size = ((size_t)hook->argc + hook->envc + 2) * sizeof(char *);
	char **vectors = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (vectors == MAP_FAILED)
		fail_errno(run->point, hook->path, NULL);
	for (uint32_t i = 0; i < hook->argc; i++)
		vectors[i] = (char *)(uintptr_t)read_text(&strings, "hook");
	for (uint32_t i = 0; i < hook->envc; i++)
		vectors[hook->argc + 1 + i] = (char *)(uintptr_t)read_text(&strings, "hook");
	signal(SIGPIPE, SIG_DFL);
	if (setsid() < 0 || prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0)
		fail_errno(run->point, hook->path, NULL);
	if (getppid() != parent)
		_exit(1);
	if (run->cwd >= 0 && fchdir(run->cwd) < 0)
		fail_errno(run->point, hook->path, "chdir");
	if (dup3(input, 0, 0) < 0 || dup3(output, 1, 0) < 0 || dup3(output, 2, 0) < 0)
		fail_errno(run->point, hook->path, NULL);
	if (run->creating)
		close_all_but(3, &run->ctx->fds.sync, 1);
	else if (plan->filter != NULL && !run->ctx->filtered)
		load_filter(plan);
	/* As in runc, a startContainer hook without an environment gets that of the container's process. */
	execve(hook->path, vectors, run->creating || hook->envc > 0 ? vectors + hook->argc + 1 : plan->envp);
	fail_errno(run->point, hook->path, NULL);
}

/* Read at most a pipe's capacity (pipe(7)), so that a hook that never stops writing cannot block us; keep the tail. */
static void drain(struct hook_run *run, int fd)
{
	static char chunk[1 << 16];
	ssize_t got;

	for (int i = 0; i < 16 && (got = read(fd, chunk, sizeof(chunk))) > 0; i++) {
		size_t fresh = (size_t)got < OUTPUT_MAX ? (size_t)got : OUTPUT_MAX;
		size_t old = run->kept < OUTPUT_MAX - fresh ? run->kept : OUTPUT_MAX - fresh;

		memmove(run->output, run->output + run->kept - old, old);
		memcpy(run->output + old, chunk + (size_t)got - fresh, fresh);
		run->kept = old + fresh;
	}
}

NORETURN static void fail_hook(struct hook_run *run, const char *format, ...) PRINTF(2, 3);

/* Fail with a reason and the tail of the hook's output. */
NORETURN static void fail_hook(struct hook_run *run, const char *format, ...)
{
	char why[128];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(why, sizeof(why), format, arguments);
	va_end(arguments);
	for (size_t i = 0; i < run->kept; i++)
		if (run->output[i] == '\0')
			run->output[i] = '?';
	while (run->kept > 0 && strchr(" \r\n\t", run->output[run->kept - 1]) != NULL)
		run->kept--;
	run->output[run->kept] = '\0';
	fail(0, run->point, run->hook->path, "%s%s%s", why, run->kept > 0 ? ": " : "", run->output);
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000ll + now.tv_nsec / 1000000;
}

/* Write the state and read the output until the hook exits (true) or times out (false). */
static bool wait_hook(struct hook_run *run, int pidfd, int input, int output, const char *state, size_t size)
{
	long long deadline = now_ms() + run->hook->timeout * 1000ll;

	for (;;) {
		struct pollfd polled[] = {{.fd = pidfd, .events = POLLIN},
					  {.fd = output, .events = POLLIN},
					  {.fd = input, .events = POLLOUT}};
		long long left = run->hook->timeout == 0 ? -1 : deadline - now_ms();
		int found = left < 0 && run->hook->timeout != 0 ? 0 : poll(polled, ARRAY_SIZE(polled), (int)left);

		if (found < 0 && errno != EINTR)
			fail_errno(run->point, run->hook->path, NULL);
		if (found == 0)
			return false;
		if (found < 0)
			continue;
		if (polled[1].revents != 0) {
			drain(run, output);
			if ((polled[1].revents & POLLIN) == 0)
				output = -1; /* closed by all writers; poll(2) ignores -1 */
		}
		if (polled[2].revents != 0) {
			ssize_t taken = write(input, state, size);

			if (taken > 0) {
				state += taken;
				size -= (size_t)taken;
			}
			if (size == 0 || (taken < 0 && errno != EAGAIN && errno != EINTR)) {
				close(input);
				input = -1;
			}
		}
		if (polled[0].revents != 0)
			break;
	}
	if (input >= 0)
		close(input);
	return true;
}

static void run_hook(struct hook_run *run, const char *state, size_t size)
{
	int input[2], output[2], pidfd = -1, pid, status, parent = getpid();
	bool ended;

	if (pipe2(input, O_CLOEXEC) < 0 || pipe2(output, O_CLOEXEC) < 0 || fcntl(input[1], F_SETFL, O_NONBLOCK) < 0 ||
	    fcntl(output[0], F_SETFL, O_NONBLOCK) < 0)
		fail_errno(run->point, run->hook->path, "pipe");
	/* clone, because most filters deny clone3. */
	pid = (int)syscall(SYS_clone, (unsigned long)(CLONE3_PIDFD | SIGCHLD), NULL, &pidfd, NULL, NULL);
	if (pid < 0)
		fail_errno(run->point, run->hook->path, "clone");
	if (pid == 0)
		exec_hook(run, parent, input[0], output[1]);
	close(input[0]);
	close(output[1]);
	ended = wait_hook(run, pidfd, input[1], output[0], state, size);
	if (!ended) {
		kill(-pid, SIGKILL); /* its process group, unless it has not called setsid yet */
		kill(pid, SIGKILL);
	}
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			fail_errno(run->point, run->hook->path, "waitpid");
	drain(run, output[0]);
	close(output[0]);
	close(pidfd);
	if (!ended)
		fail_hook(run, "timed out after %u s and was killed", run->hook->timeout);
	if (WIFSIGNALED(status))
		fail_hook(run, "signal: %s", strsignal(WTERMSIG(status)));
	if (WEXITSTATUS(status) != 0)
		fail_hook(run, "exit status %d", WEXITSTATUS(status));
}

void run_hooks(const struct context *ctx, uint16_t type, int cwd)
{
	bool creating = type == PLAN_CREATE_HOOK;
	struct hook_run run = {.ctx = ctx, .creating = creating, .cwd = cwd};
	struct cursor steps = ctx->plan.steps;
	struct attribute a;
	struct hook_step hook;
	const char *state = NULL;
	size_t size = 0;
	int number = 0;

	while (next_attribute(&steps, &a)) {
		if (a.type != type)
			continue;
		if (state == NULL) {
			state = finish_state(ctx->plan.hook_state, creating ? "creating" : "created", &size);
			signal(SIGPIPE, SIG_IGN); /* the hook may not read it */
		}
		decode_hook(&a, &hook);
		snprintf(run.point, sizeof(run.point), "%s hook #%d", creating ? "createContainer" : "startContainer",
			 number++);
		run.hook = &hook;
		run.kept = 0;
		run_hook(&run, state, size);
	}
	if (state != NULL && ctx->filtered)
		signal(SIGPIPE, SIG_DFL);
}

/* Wait while the runtime runs its hooks, after the mounts and before pivot_root. */
void wait_for_runtime_hooks(int sync)
{
	report_progress(PROGRESS_HOOKS);
	wait_for_runtime(sync);
}
