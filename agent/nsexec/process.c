/*
 * process.c: execute the last part of a plan: limits, LSM label, seccomp filter, user, capabilities, working directory
 * and program; then report procReady, wait to be started, and call execve.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "nsexec.h"

struct filter_program {
	unsigned short length;
	const void *instructions;
};

struct capability_header {
	uint32_t version;
	int pid;
};

struct capability_words {
	uint32_t effective, permitted, inheritable;
};

static const char *const limit_names[] = {
	"RLIMIT_CPU",	   "RLIMIT_FSIZE",  "RLIMIT_DATA",    "RLIMIT_STACK",  "RLIMIT_CORE",  "RLIMIT_RSS",
	"RLIMIT_NPROC",	   "RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "RLIMIT_AS",     "RLIMIT_LOCKS", "RLIMIT_SIGPENDING",
	"RLIMIT_MSGQUEUE", "RLIMIT_NICE",   "RLIMIT_RTPRIO",  "RLIMIT_RTTIME",
};

static const char *limit_name(uint32_t resource)
{
	return resource < ARRAY_SIZE(limit_names) ? limit_names[resource] : "unknown";
}

/*
 * Raise hard limits in stage 0, which has CAP_SYS_RESOURCE in the runtime's user namespace.  The exact values, which
 * may be too small for nsexec itself, are set last.
 */
void raise_hard_limits(const struct plan *plan)
{
	struct cursor steps = plan->steps;
	struct rlimit_step step;
	struct attribute a;
	struct rlimit now;

	while (next_attribute(&steps, &a)) {
		if (a.type != PLAN_RLIMIT)
			continue;
		decode_rlimit(&a, &step);
		if (getrlimit((int)step.resource, &now) < 0)
			fail_errno("rlimit", limit_name(step.resource), NULL);
		if (step.hard <= now.rlim_max)
			continue;
		now.rlim_max = step.hard;
		if (setrlimit((int)step.resource, &now) < 0)
			fail_errno("rlimit", limit_name(step.resource), "the runtime may not raise its own hard limit");
	}
}

void set_limits(const struct plan *plan)
{
	struct cursor steps = plan->steps;
	struct rlimit_step step;
	struct attribute a;

	while (next_attribute(&steps, &a)) {
		if (a.type != PLAN_RLIMIT)
			continue;
		decode_rlimit(&a, &step);
		struct rlimit limit = {.rlim_cur = step.soft, .rlim_max = step.hard};
		if (setrlimit((int)step.resource, &limit) < 0)
			fail_errno("rlimit", limit_name(step.resource), NULL);
	}
}

/* Set the LSM label for execve, through a private procfs (CVE-2019-16884). */
static void set_label(const struct plan *plan, int procfs)
{
	int own = procfs < 0 ? private_procfs(true) : -1, fd;
	char path[64];

	snprintf(path, sizeof(path), "thread-self/attr/%s", plan->label_file);
	fd = openat(own < 0 ? procfs : own, path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0 || write(fd, plan->label, strlen(plan->label)) != (ssize_t)strlen(plan->label))
		fail_errno("label", plan->label, NULL);
	close(fd);
	if (own >= 0)
		close(own);
}

/* Load the seccomp filter; return the listener's descriptor, if the filter's flags ask for one. */
int load_filter(const struct plan *plan)
{
	struct filter_program program;
	uint32_t flags;
	int result;

	memcpy(&flags, plan->filter, sizeof(flags));
	program.length = (unsigned short)((plan->filter_size - sizeof(flags)) / 8);
	program.instructions = plan->filter + sizeof(flags);
	result = (int)syscall(SYS_seccomp, SECCOMP_MODE_FILTER_OP, flags, &program);
	if (result < 0)
		fail_errno("seccomp", "", NULL);
	return result;
}

static bool has_listener(const struct plan *plan)
{
	uint32_t flags = 0;

	if (plan->filter != NULL)
		memcpy(&flags, plan->filter, sizeof(flags));
	return (flags & SECCOMP_NEW_LISTENER) != 0;
}

/* Change to the working directory, without magic links such as /proc/self/fd/N (CVE-2024-21626).  Return 0 or errno. */
static int enter_cwd(int root, const char *path, bool make)
{
	int fd = make ? make_directory_in(root, path, 0755) : open_in(root, path, O_PATH | O_DIRECTORY, 0);
	int done;

	if (fd < 0)
		return errno;
	done = fchdir(fd) < 0 ? errno : 0;
	close(fd);
	return done;
}

static void verify_cwd(const char *path)
{
	static char current[PATH_MAX];

	if (syscall(SYS_getcwd, current, sizeof(current)) < 0)
		fail_errno("cwd", path, "getcwd");
	if (current[0] != '/')
		fail(EXDEV, "cwd", path, "is outside of the container's root");
}

/* Save system calls: drop unwanted capabilities right away, and read them only if that is not permitted. */
static void set_bounding(uint64_t wanted)
{
	for (unsigned capability = 0; capability < 64; capability++) {
		int held;

		if ((wanted >> capability & 1) != 0) {
			held = prctl(PR_CAPBSET_READ, capability, 0, 0, 0);
			if (held == 0)
				fail(EPERM, "capabilities", "bounding",
				     "a capability that the runtime itself does not have");
		} else if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0) {
			int error = errno;

			held = prctl(PR_CAPBSET_READ, capability, 0, 0, 0);
			if (held == 1)
				fail(error, "capabilities", "bounding", NULL);
		} else {
			continue;
		}
		if (held < 0)
			break; /* past the last capability of this kernel */
	}
}

static void set_capabilities(const struct capability_sets *wanted)
{
	struct capability_header header = {.version = CAPABILITY_VERSION_3, .pid = 0};
	struct capability_words words[2];

	for (unsigned i = 0; i < 2; i++) {
		words[i].effective = (uint32_t)(wanted->effective >> (32 * i));
		words[i].permitted = (uint32_t)(wanted->permitted >> (32 * i));
		words[i].inheritable = (uint32_t)(wanted->inheritable >> (32 * i));
	}
	if (syscall(SYS_capset, &header, words) < 0)
		fail_errno("capabilities", "effective, permitted, inheritable",
			   errno == EPERM
				   ? "a capability that the runtime itself does not have, or effective beyond permitted"
				   : NULL);
}

static void set_ambient(uint64_t wanted)
{
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		fail_errno("capabilities", "ambient", NULL);
	for (unsigned capability = 0; capability < 64; capability++)
		if ((wanted >> capability & 1) != 0 &&
		    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) < 0)
			fail_errno("capabilities", "ambient",
				   "an ambient capability must be permitted and inheritable");
}

/* Make the user own stdio pipes, sockets and terminals, so that it can reopen them.  Files keep their owner. */
static void own_stdio(const struct plan *plan)
{
	struct stat st;

	for (int fd = 0; fd <= 2; fd++) {
		if (fstat(fd, &st) < 0 || st.st_uid == plan->uid)
			continue;
		if (!S_ISFIFO(st.st_mode) && !S_ISSOCK(st.st_mode) && !(plan->has_console && S_ISCHR(st.st_mode)))
			continue;
		if (fchown(fd, plan->uid, (gid_t)-1) < 0 && errno != EPERM && errno != EROFS && errno != EINVAL)
			fail_errno("stdio", "owner", NULL);
	}
}

static void set_groups(const struct plan *plan)
{
	static gid_t groups[GROUPS_MAX];
	struct cursor steps = plan->steps;
	struct attribute a;
	size_t count = 0;

	while (next_attribute(&steps, &a))
		if (a.type == PLAN_GROUPS) {
			memcpy(groups + count, a.data, a.size);
			count += a.size / sizeof(gid_t);
		}
	/* A user namespace may deny setgroups; then only an empty list is accepted. */
	if (syscall(SYS_setgroups, count, groups) < 0 && !(errno == EPERM && count == 0))
		fail_errno("groups", "", NULL);
}

static void become_user(const struct plan *plan)
{
	set_groups(plan);
	if (syscall(SYS_setresgid, plan->gid, plan->gid, plan->gid) < 0)
		fail_errno("user", "gid", NULL);
	if (syscall(SYS_setresuid, plan->uid, plan->uid, plan->uid) < 0)
		fail_errno("user", "uid", NULL);
}

static void drop_privileges(const struct plan *plan, int root, bool make_cwd)
{
	int cwd_error;

	set_bounding(plan->capabilities.bounding);
	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0)
		fail_errno("capabilities", "keep", NULL);
	own_stdio(plan);
	cwd_error = enter_cwd(root, plan->cwd, make_cwd);
	become_user(plan);
	if (cwd_error == EACCES ||
	    cwd_error == EPERM) /* root may have less access than the user, on a network file system */
		cwd_error = enter_cwd(root, plan->cwd, false);
	if (cwd_error != 0)
		fail(cwd_error, "cwd", plan->cwd, NULL);
	verify_cwd(plan->cwd);
	if (prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0) < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		fail_errno("capabilities", "keep", NULL);
	struct capability_sets held = plan->capabilities;
	if (plan->filter != NULL && !plan->no_new_privs) { /* dropped by load_early_filter */
		held.effective |= CAPABILITY_SYS_ADMIN;
		held.permitted |= CAPABILITY_SYS_ADMIN;
	}
	set_capabilities(&held);
	set_ambient(plan->capabilities.ambient);
}

/* Return 0, or errno and in *why the failed call ("" if none); order and errors are those of Go's exec.LookPath. */
static int executable(const char *path, const char **why)
{
	struct stat st;

	*why = "stat";
	if (stat(path, &st) < 0)
		return errno;
	*why = "";
	if (S_ISDIR(st.st_mode))
		return EISDIR;
	return syscall(SYS_faccessat2, AT_FDCWD, path, X_OK, AT_EACCESS) < 0 ? errno : 0;
}

static const char *look_up(const struct plan *plan)
{
	static char candidate[PATH_MAX];
	const char *program = plan->argv[0], *path = NULL, *why;
	size_t length = strlen(program);

	if (strchr(program, '/') != NULL) {
		int error = executable(program, &why);

		if (error != 0)
			fail(error, "lookup", program, "%s", why);
		return program;
	}
	for (char **variable = plan->envp; *variable != NULL; variable++)
		if (strncmp(*variable, "PATH=", 5) == 0)
			path = *variable + 5;
	while (path != NULL && *path != '\0') {
		size_t directory = strcspn(path, ":");

		/* Relative entries of PATH are ignored, as in Go. */
		if (path[0] == '/' && directory + length + 2 <= sizeof(candidate)) {
			memcpy(candidate, path, directory);
			candidate[directory] = '/';
			memcpy(candidate + directory + 1, program, length + 1);
			if (executable(candidate, &why) == 0)
				return candidate;
		}
		path += directory + (path[directory] == ':');
	}
	fail(ENOENT, "lookup", program, "path");
}

/* Close all descriptors from one on, except those kept, before execve of, say, /proc/self/fd/N (CVE-2024-21626). */
void close_all_but(unsigned from, const int *kept, size_t count)
{
	for (;;) {
		unsigned next = ~0u;

		for (size_t i = 0; i < count; i++)
			if (kept[i] >= 0 && (unsigned)kept[i] >= from && (unsigned)kept[i] < next)
				next = (unsigned)kept[i];
		if (next > from && sys_close_range(from, next == ~0u ? next : next - 1) < 0)
			fail_errno("close", "", NULL);
		if (next == ~0u)
			return;
		from = next + 1;
	}
}

/* Block until exec.fifo is opened for reading. */
static int open_fifo(const struct channels *fds, int procfs)
{
	char path[32];
	int fifo;

	snprintf(path, sizeof(path), "self/fd/%d", fds->fifo);
	do
		fifo = openat(procfs, path, O_WRONLY | O_CLOEXEC);
	while (fifo < 0 && errno == EINTR);
	if (fifo < 0 || close(fds->fifo) < 0 || close(procfs) < 0)
		fail_errno("exec fifo", "", NULL);
	return fifo;
}

/* Block until a client connects and sends a byte. */
static int accept_start(int gate)
{
	for (;;) {
		char byte;
		int connection = accept4(gate, NULL, NULL, SOCK_CLOEXEC);

		if (connection < 0 && errno != EINTR && errno != ECONNABORTED)
			fail_errno("start socket", "", NULL);
		if (connection >= 0 && read(connection, &byte, 1) == 1) {
			close(gate);
			return connection;
		}
		if (connection >= 0)
			close(connection); /* the client has gone */
	}
}

/* Wait to be started: at the fifo or, in a joined pid namespace, at the gate's socket.  Then report to the starter. */
static void wait_for_start(struct context *ctx)
{
	struct channels *fds = &ctx->fds;
	int started = fds->fifo >= 0 ? open_fifo(fds, ctx->handles.processes) : accept_start(fds->gate);

	close(fds->sync);
	fds->sync = started;
	report_started(started);
}

/* Block until the runtime sends a byte: it has run its hooks, or lets the program start. */
void wait_for_runtime(int sync)
{
	char byte;
	ssize_t got;

	do
		got = read(sync, &byte, 1);
	while (got < 0 && errno == EINTR);
	if (got != 1)
		_exit(1); /* the runtime has exited, or closed the socket */
}

/* Do everything that needs privileges or must not be visible in the pid namespace; then drop to the container's. */
void prepare_process(struct context *ctx, bool before_clone)
{
	const struct plan *plan = &ctx->plan;

	if (plan->has_umask)
		umask(plan->umask);
	set_scheduling(plan, before_clone);
	if (plan->label != NULL)
		set_label(plan, ctx->handles.processes);
	if (plan->no_new_privs && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		fail_errno("no_new_privs", "", NULL);
	drop_privileges(plan, ctx->handles.root, !ctx->fds.joins);
	ctx->program = ctx->fds.pauses ? "" : look_up(plan);
	log_debug(ctx->fds.joins ? "setns_init: about to exec" : "init: closing the pipe to signal completion", "");
	log_close();
	FAULT(prepared);
}

/*
 * The filter is loaded last, so that it need only permit execve, and write for an error.  Two kinds cannot wait:
 * without no_new_privs, loading requires CAP_SYS_ADMIN, which a process that waits to be started must not have; and a
 * listener must reach the runtime before it exits.  These must permit the rest of run_program: only system calls that
 * every profile allows.
 */
static bool needs_early_filter(const struct plan *plan)
{
	return plan->filter != NULL && (!plan->no_new_privs || has_listener(plan));
}

void load_early_filter(struct context *ctx)
{
	const struct plan *plan = &ctx->plan;
	int listener;

	signal(SIGPIPE, SIG_DFL);
	listener = load_filter(plan);
	ctx->filtered = true;
	if (has_listener(plan)) { /* before any system call that the filter may pass to it */
		report_listener(listener);
		wait_for_runtime(ctx->fds.sync);
		close(listener);
	}
	if (!plan->no_new_privs &&
	    (plan->capabilities.permitted & plan->capabilities.effective & CAPABILITY_SYS_ADMIN) == 0)
		set_capabilities(&plan->capabilities);
}

static void end_by_signal(int number)
{
	_exit(128 + number);
}

/* These signals end the first process of a pid namespace only if it has handlers; execve resets them. */
static void end_on_signals(void)
{
	static const int numbers[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM};

	for (size_t i = 0; i < ARRAY_SIZE(numbers); i++)
		signal(numbers[i], end_by_signal);
}

/* Report that the process is ready, wait to be started if it is an init, and execute the program. */
NORETURN void run_program(struct context *ctx)
{
	const struct channels *fds = &ctx->fds;
	const struct plan *plan = &ctx->plan;
	const int kept[] = {fds->sync, fds->fifo, fds->gate, fds->fifo < 0 ? -1 : ctx->handles.processes};

	if (!ctx->filtered) { /* else the previous stage loaded the filter, and closed the descriptors */
		if (!fds->joins)
			end_on_signals();
		close_all_but(fds->first_closed, kept, ARRAY_SIZE(kept));
		if (needs_early_filter(plan))
			load_early_filter(ctx);
	}
	report_progress(PROGRESS_READY);
	if (fds->fifo >= 0 || fds->gate >= 0) {
		FAULT(ready);
		wait_for_start(ctx);
	}
	if (!fds->joins)
		report_to_stderr_if_closed();
	run_hooks(ctx, PLAN_START_HOOK, -1);
	FAULT(executing);
	if (!ctx->filtered) {
		signal(SIGPIPE, SIG_DFL);
		if (plan->filter != NULL)
			load_filter(plan);
	}
	execve(ctx->program, plan->argv, plan->envp);
	fail_errno("execve", ctx->program, NULL);
}
