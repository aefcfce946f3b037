/*
 * process.c: the last part of a plan: limits, filters, the user and exactly the capabilities asked for, the working directory, the
 * program; then "ready", the wait to be started, and execve.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
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
	"RLIMIT_CPU",	  "RLIMIT_FSIZE",  "RLIMIT_DATA",   "RLIMIT_STACK",	 "RLIMIT_CORE",	    "RLIMIT_RSS",
	"RLIMIT_NPROC",	  "RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "RLIMIT_AS",	 "RLIMIT_LOCKS",    "RLIMIT_SIGPENDING",
	"RLIMIT_MSGQUEUE", "RLIMIT_NICE",  "RLIMIT_RTPRIO", "RLIMIT_RTTIME",
};

static const char *limit_name(uint32_t resource)
{
	return resource < ARRAY_SIZE(limit_names) ? limit_names[resource] : "unknown";
}

/*
 * Hard limits go up in stage 0, which is privileged outside of any user namespace of the container; the exact values, which may
 * be too small for nsexec itself, come last.
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
			fail("rlimit", limit_name(step.resource), errno, NULL);
		if (step.hard <= now.rlim_max)
			continue;
		now.rlim_max = step.hard;
		if (setrlimit((int)step.resource, &now) < 0)
			fail("rlimit", limit_name(step.resource), errno, "the agent may not raise its own hard limit");
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
			fail("rlimit", limit_name(step.resource), errno, NULL);
	}
}

static void load_filter(const struct plan *plan)
{
	struct filter_program program;
	uint32_t flags;

	memcpy(&flags, plan->filter, sizeof(flags));
	program.length = (unsigned short)((plan->filter_size - sizeof(flags)) / 8);
	program.instructions = plan->filter + sizeof(flags);
	if (syscall(SYS_seccomp, SECCOMP_MODE_FILTER_OP, flags, &program) < 0)
		fail("seccomp", "", errno, NULL);
}

/* The working directory, resolved without magic links: /proc/self/fd/N leads nowhere (CVE-2024-21626).  0 or errno. */
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
		fail("cwd", path, errno, "cannot be told where it is");
	if (current[0] != '/')
		fail("cwd", path, EXDEV, "is outside of the container's root");
}

static void set_bounding(uint64_t wanted)
{
	for (unsigned capability = 0; capability < 64; capability++) {
		int held = prctl(PR_CAPBSET_READ, capability, 0, 0, 0);

		if (held < 0)
			break; /* past the last one that the kernel knows */
		if (held == 0 && (wanted >> capability & 1) != 0)
			fail("capabilities", "bounding", EPERM, "a capability that the agent itself does not have");
		if (held == 1 && (wanted >> capability & 1) == 0 && prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0)
			fail("capabilities", "bounding", errno, NULL);
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
		fail("capabilities", "effective, permitted, inheritable", errno,
		     errno == EPERM ? "a capability that the agent itself does not have, or effective beyond permitted" : NULL);
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		fail("capabilities", "ambient", errno, NULL);
	for (unsigned capability = 0; capability < 64; capability++)
		if ((wanted->ambient >> capability & 1) != 0 &&
		    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) < 0)
			fail("capabilities", "ambient", errno, "an ambient capability must be permitted and inheritable");
}

/* A user other than root must be able to reopen its own stdio.  Files are not ours to give away: pipes and terminals only. */
static void own_stdio(const struct plan *plan)
{
	struct stat st;

	for (int fd = 0; fd <= 2; fd++) {
		if (fstat(fd, &st) < 0 || st.st_uid == plan->uid)
			continue;
		if (!S_ISFIFO(st.st_mode) && !S_ISSOCK(st.st_mode) && !(plan->has_console && S_ISCHR(st.st_mode)))
			continue;
		if (fchown(fd, plan->uid, (gid_t)-1) < 0 && errno != EPERM && errno != EROFS && errno != EINVAL)
			fail("stdio", "owner", errno, NULL);
	}
}

static void become_user(const struct plan *plan)
{
	static gid_t groups[NGROUPS_MAX < 65536 ? NGROUPS_MAX : 65536];

	if (plan->group_count > ARRAY_SIZE(groups))
		fail("groups", "", EINVAL, "more than a process can have");
	if (plan->group_count > 0)
		memcpy(groups, plan->groups, plan->group_count * sizeof(gid_t));
	/* Where a user namespace denies setgroups, having none is all that can be had. */
	if (syscall(SYS_setgroups, plan->group_count, groups) < 0 && !(errno == EPERM && plan->group_count == 0))
		fail("groups", "", errno, NULL);
	if (syscall(SYS_setresgid, plan->gid, plan->gid, plan->gid) < 0)
		fail("user", "gid", errno, NULL);
	if (syscall(SYS_setresuid, plan->uid, plan->uid, plan->uid) < 0)
		fail("user", "uid", errno, NULL);
}

static void drop_privileges(const struct plan *plan, int root, bool make_cwd)
{
	int cwd_error;

	set_bounding(plan->capabilities.bounding);
	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0)
		fail("capabilities", "keep", errno, NULL);
	own_stdio(plan);
	cwd_error = enter_cwd(root, plan->cwd, make_cwd);
	become_user(plan);
	if (cwd_error == EACCES || cwd_error == EPERM) /* root may be the one who may not: a network filesystem */
		cwd_error = enter_cwd(root, plan->cwd, false);
	if (cwd_error != 0)
		fail("cwd", plan->cwd, cwd_error, NULL);
	verify_cwd(plan->cwd);
	if (prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0) < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		fail("capabilities", "keep", errno, NULL);
	set_capabilities(&plan->capabilities);
}

/* 0, or errno and in *why what was asked when it failed: the order and the answers are those of Go's exec.LookPath. */
static int executable(const char *path, const char **why)
{
	struct stat st;

	*why = "stat";
	if (stat(path, &st) < 0)
		return errno;
	*why = NULL;
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
			fail("lookup", program, error, why);
		return program;
	}
	for (char **variable = plan->envp; *variable != NULL; variable++)
		if (strncmp(*variable, "PATH=", 5) == 0)
			path = *variable + 5;
	while (path != NULL && *path != '\0') {
		size_t directory = strcspn(path, ":");

		/* A relative entry would find programs wherever cwd happens to be. */
		if (path[0] == '/' && directory + length + 2 <= sizeof(candidate)) {
			memcpy(candidate, path, directory);
			candidate[directory] = '/';
			memcpy(candidate + directory + 1, program, length + 1);
			if (executable(candidate, &why) == 0)
				return candidate;
		}
		path += directory + (path[directory] == ':');
	}
	fail("lookup", program, ENOENT, "path");
}

/* Close all but stdio and those kept, for real: /proc/self/fd/N must find nothing, not even before execve (CVE-2024-21626). */
void close_all_but(const int *kept, size_t count)
{
	unsigned from = 3;

	for (;;) {
		unsigned next = ~0u;

		for (size_t i = 0; i < count; i++)
			if (kept[i] >= 0 && (unsigned)kept[i] >= from && (unsigned)kept[i] < next)
				next = (unsigned)kept[i];
		if (next > from && sys_close_range(from, next == ~0u ? next : next - 1) < 0)
			fail("close", "", errno, NULL);
		if (next == ~0u)
			return;
		from = next + 1;
	}
}

/* Opening the fifo to write blocks until somebody opens it to read: until the container is started. */
static void wait_for_start(const struct channels *fds, int procfs)
{
	char path[32];
	int fifo;

	snprintf(path, sizeof(path), "self/fd/%d", fds->fifo);
	do
		fifo = openat(procfs, path, O_WRONLY | O_CLOEXEC);
	while (fifo < 0 && errno == EINTR);
	if (fifo < 0)
		fail("exec fifo", "", errno, NULL);
	if (write(fifo, "0", 1) != 1)
		fail("exec fifo", "", errno, NULL);
}

/* One byte from the agent, who has done something or wants this process to go on. */
void wait_for_word(int sync)
{
	char word;
	ssize_t got;

	do
		got = recv(sync, &word, 1, 0);
	while (got < 0 && errno == EINTR);
	if (got != 1)
		_exit(1); /* the agent is gone, or has let go of it */
}

/* argv[0] as found by prepare_process */
static const char *program;

/* All that takes privileges, or others in the pid namespace should not see: afterwards this process has the container's rights only. */
void prepare_process(const struct plan *plan, const struct channels *fds, const struct handles *handles)
{
	if (plan->has_umask)
		umask(plan->umask);
	set_sharing(plan);
	if (plan->label != NULL)
		set_label(plan, handles->processes);
	if (plan->no_new_privs && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		fail("no_new_privs", "", errno, NULL);
	if (plan->filter != NULL && !plan->no_new_privs) /* needs privileges that are about to go */
		load_filter(plan);
	drop_privileges(plan, handles->root, !fds->joins);
	program = fds->pauses ? "" : look_up(plan);
	log_debug("ready to execute", program);
	log_close();
	FAULT(prepared);
}

/* Say that it is ready, wait to be started if that is how it is, execute it. */
NORETURN void run_program(const struct plan *plan, const struct channels *fds, const struct handles *handles)
{
	if (plan->filter != NULL && plan->no_new_privs)
		load_filter(plan);
	if (fds->fifo >= 0) {
		const int kept[] = {fds->sync, fds->fifo, handles->processes};

		/* Only what the wait needs stays open through it. */
		close_all_but(kept, ARRAY_SIZE(kept));
		report_progress(PROGRESS_READY);
		FAULT(ready);
		wait_for_start(fds, handles->processes);
	} else {
		report_progress(PROGRESS_READY);
		if (!fds->joins) { /* with others in its pid namespace it holds nothing of the guest through the wait */
			wait_for_word(fds->sync);
			report_progress(PROGRESS_RUN);
		}
	}
	close_all_but(&fds->sync, 1);
	run_hooks(plan, PLAN_START_HOOK, fds->sync, -1);
	FAULT(executing);
	execve(program, plan->argv, plan->envp);
	fail("execve", program, errno, NULL);
}
