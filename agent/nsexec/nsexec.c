/*
 * nsexec.c: the stages, from a program started by the agent to a process in its namespaces.
 *
 *   stage 0  reads everything, then joins and makes namespaces in one clone3 whose child is the container's process.
 *   stage 1  only where one is needed in between: a user namespace needs somebody outside to write its maps, time offsets
 *            are written before the first process enters, and a process is born in its cgroup by a descriptor that nobody
 *            else may see.
 *   stage 2  carries the plan out and becomes the program.
 *
 * A pid namespace that is joined has others in it, who see each of its processes from its first moment; with CAP_SYS_PTRACE they may do
 * with it what they want, dumpable or not (CVE-2016-9962).  So it is entered last: there, the stage before (the last one outside)
 * carries out all of the plan, and stage 2 is born with the container's root, user and rights, with its standard streams and a socket
 * or two, and has only to execute the program.
 *
 * All are children of the agent (CLONE_PARENT).  Whoever makes one tells the agent {"stage1_pid", "stage2_pid"} (0 for what there is not)
 * and passes a pidfd of the last; the new one does nothing before that is sent, and nothing at all when its maker dies first.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "nsexec.h"

#define LIMIT_BOOTSTRAP (1u << 20)
#define LIMIT_PLAN (1u << 20)
#define LIMIT_STRINGS ((2u << 20) - 4096)

/* Values between stage 0 and stage 1, runc's. */
enum { USERMAP_PLS = 0x40, USERMAP_ACK = 0x41, ANNOUNCED = 0x44, FINISH = 0x45, TIMEOFFSETS_PLS = 0x46, TIMEOFFSETS_ACK = 0x47 };

static const struct namespace_name {
	const char *name;
	uint32_t flag;
} namespace_names[] = {
	{"user", NS_USER}, {"ipc", NS_IPC}, {"uts", NS_UTS}, {"net", NS_NET},
	{"pid", NS_PID},   {"mnt", NS_MNT}, {"time", NS_TIME}, {"cgroup", NS_CGROUP},
};
#define NAMESPACES ARRAY_SIZE(namespace_names)

struct joined {
	int fd;
	uint32_t flag;
	const char *name;
	bool done;
};

static struct bootstrap boot;
static struct plan plan;
static struct channels fds;
static struct joined joined[NAMESPACES];
static size_t joined_count;

/* --- what the agent gave --- */

static int descriptor_from(const char *name)
{
	const char *text = getenv(name);
	char *end;
	long number;

	if (text == NULL || text[0] == '\0')
		return -1;
	errno = 0;
	number = strtol(text, &end, 10);
	if (errno != 0 || *end != '\0' || number < 3 || number > INT_MAX)
		fail("environment", name, EINVAL, "is not the number of a descriptor");
	if (fcntl((int)number, F_SETFD, FD_CLOEXEC) < 0)
		fail("environment", name, errno, NULL);
	return (int)number;
}

static void read_environment(void)
{
	const char *level = getenv("_LIBCONTAINER_LOGLEVEL"), *type = getenv("_LIBCONTAINER_INITTYPE");

	fds.sync = descriptor_from("_LIBCONTAINER_SYNCPIPE");
	report_to(fds.sync, -1, 0);
	fds.log = descriptor_from("_LIBCONTAINER_LOGPIPE");
	report_to(fds.sync, fds.log, level == NULL ? 0 : atoi(level));
	fds.init = descriptor_from("_LIBCONTAINER_INITPIPE");
	fds.console = descriptor_from("_LIBCONTAINER_CONSOLE");
	fds.fifo = descriptor_from("_LIBCONTAINER_FIFOFD");
	fds.cgroup = descriptor_from("_CAISSON_CGROUP");
	fds.pidfd = descriptor_from("_CAISSON_PIDFD");
	fds.procfs = descriptor_from("_CAISSON_PROCFS");
	for (unsigned i = 0; i < CGROUPS_MAX; i++) {
		char name[32];

		snprintf(name, sizeof(name), "_CAISSON_CGROUP_%u", i);
		fds.joined[i] = descriptor_from(name);
	}
	if (type == NULL || (strcmp(type, "standard") != 0 && strcmp(type, "setns") != 0 && strcmp(type, "pause") != 0))
		fail("environment", "_LIBCONTAINER_INITTYPE", EINVAL, "is none of standard, setns and pause");
	fds.joins = strcmp(type, "setns") == 0;
	fds.pauses = strcmp(type, "pause") == 0;
}

/*
 * A Python process ignores SIGPIPE and SIGXFSZ, and ignored signals survive execve.  By system call: the libraries keep 32 and 33
 * to themselves, and whoever started the agent may have ignored those too.
 */
static void reset_signals(void)
{
	static const uint64_t defaults[4], none; /* struct kernel_sigaction: SIG_DFL, no flags, an empty mask */

	for (int number = 1; number <= 64; number++)
		if (number != SIGKILL && number != SIGSTOP)
			(void)!syscall(SYS_rt_sigaction, number, defaults, NULL, sizeof(none));
	if (syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof(none)) < 0)
		fail("signals", "", errno, NULL);
}

/* --- small writes to the guest's own procfs, by its privileged stages only --- */

static void write_proc(const char *step, int pid, const char *file, const char *text)
{
	char path[64];
	int fd;

	if (pid == 0)
		snprintf(path, sizeof(path), "/proc/self/%s", file);
	else
		snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		fail(step, path, errno, NULL);
	close(fd);
}

static void write_maps(int pid)
{
	if (!boot.setgroups && boot.gid_map != NULL)
		write_proc("id maps", pid, "setgroups", "deny");
	if (boot.uid_map != NULL)
		write_proc("id maps", pid, "uid_map", boot.uid_map);
	if (boot.gid_map != NULL)
		write_proc("id maps", pid, "gid_map", boot.gid_map);
}

/*
 * cgroup v1 has no clone into a cgroup: this process goes into each, and what it makes is in them from the start.  The descriptors
 * end here, outside of all namespaces of the container.
 */
static void join_cgroups(void)
{
	for (unsigned i = 0; i < CGROUPS_MAX; i++) {
		int fd = fds.joined[i];

		if (fd < 0)
			continue;
		if (write(fd, "0", 1) != 1) {
			char link[64], path[PATH_MAX];
			int error = errno;
			ssize_t length;

			snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
			length = readlink(link, path, sizeof(path) - 1);
			path[length < 0 ? 0 : length] = '\0';
			fail("cgroup", path, error, NULL);
		}
		close(fd);
	}
}

/* --- namespaces --- */

/* Open all of "type:path,type:path" before the first is entered: the paths are those of the guest. */
static void open_namespaces(void)
{
	char path[PATH_MAX];
	const char *at = boot.paths;

	while (at != NULL && *at != '\0') {
		size_t type = strcspn(at, ":"), length = 0, i;

		if (at[type] == ':')
			length = strcspn(at + type + 1, ",");
		for (i = 0; i < NAMESPACES; i++)
			if (strlen(namespace_names[i].name) == type && memcmp(at, namespace_names[i].name, type) == 0)
				break;
		if (i == NAMESPACES || length == 0 || length >= sizeof(path) || joined_count == NAMESPACES)
			fail("bootstrap", "namespace paths", EBADMSG, NULL);
		memcpy(path, at + type + 1, length);
		path[length] = '\0';
		joined[joined_count].flag = namespace_names[i].flag;
		joined[joined_count].name = namespace_names[i].name;
		joined[joined_count].fd = open(path, O_RDONLY | O_CLOEXEC);
		if (joined[joined_count].fd < 0)
			fail("namespace", path, errno, NULL);
		if ((boot.create & namespace_names[i].flag) != 0)
			fail("namespace", path, EINVAL, "to be made and to be joined");
		joined_count++;
		at += type + 1 + length;
		at += *at == ',';
	}
}

static uint32_t joined_mask(void)
{
	uint32_t mask = boot.join;

	for (size_t i = 0; i < joined_count; i++)
		mask |= joined[i].flag;
	return mask;
}

/* Whether others are in the container's pid namespace already. */
static bool enters_last(void)
{
	return (joined_mask() & NS_PID) != 0;
}

static void become_root_of_namespace(void)
{
	if (syscall(SYS_setresgid, 0, 0, 0) < 0 || syscall(SYS_setresuid, 0, 0, 0) < 0)
		fail("user namespace", "", errno, "has no id 0");
}

/* Those that the guest's root owns first, then the user namespace, then those that belong to that one. */
static void join_paths(void)
{
	for (int pass = 0; pass < 3; pass++) {
		for (size_t i = 0; i < joined_count; i++) {
			struct joined *j = &joined[i];

			if (j->done || (pass == 1) != (j->flag == NS_USER))
				continue;
			if (syscall(SYS_setns, j->fd, j->flag) < 0) {
				if (errno == EPERM && pass == 0)
					continue;
				fail("setns", j->name, errno, NULL);
			}
			j->done = true;
			close(j->fd);
			if (j->flag == NS_USER)
				become_root_of_namespace();
		}
	}
}

static void join_namespaces(void)
{
	if (boot.join != 0 && syscall(SYS_setns, fds.pidfd, boot.join) < 0)
		fail("setns", "the container's init", errno, errno == ESRCH ? "it is gone" : NULL);
	if ((boot.join & NS_USER) != 0)
		become_root_of_namespace();
	join_paths();
	if (fds.pidfd >= 0)
		close(fds.pidfd);
	fds.pidfd = -1;
}

static void loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo"};
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (s < 0 || ioctl(s, SIOCGIFFLAGS, &request) < 0)
		fail("loopback", "lo", errno, NULL);
	request.ifr_flags |= IFF_UP;
	if (ioctl(s, SIOCSIFFLAGS, &request) < 0)
		fail("loopback", "lo", errno, NULL);
	close(s);
}

/* --- stages --- */

/*
 * A child of the agent, like this process.  clone3 inherits the exit signal with CLONE_PARENT and wants none given.  Where it need not be
 * clone3, it is clone: a container's filter may be in force already, and common ones deny what they cannot look into.
 */
static int clone_sibling(uint32_t namespaces, int cgroup, int *pidfd)
{
	struct clone3_args args = {.flags = CLONE3_PARENT | CLONE3_PIDFD | namespaces, .pidfd = (uint64_t)(uintptr_t)pidfd};
	int pid;

	if (cgroup >= 0) {
		args.flags |= CLONE3_INTO_CGROUP;
		args.cgroup = (uint64_t)cgroup;
		pid = sys_clone3(&args);
	} else {
		pid = (int)syscall(SYS_clone, (unsigned long)args.flags | SIGCHLD, NULL, pidfd, NULL, NULL);
	}
	if (pid < 0)
		fail(cgroup >= 0 ? "clone into cgroup" : "clone", "", errno, NULL);
	return pid;
}

static void pass_gate(int gate)
{
	char go;

	report_stage(2);
	prctl(PR_SET_NAME, "nsexec:[2:INIT]", 0, 0, 0);
	close(fds.init);
	FAULT(stage2_entry);
	if (read(gate, &go, 1) != 1)
		_exit(1); /* whoever should have told the agent of this process is gone */
	close(gate);
	FAULT(stage2_gone_on);
}

/* All that is done in the container's namespaces before its process is what it shall be. */
static void set_up(struct handles *handles)
{
	umask(DEFAULT_UMASK);
	/* The agent's session keyring stays the agent's. */
	if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION, NULL) < 0 && errno != ENOSYS)
		fail("session keyring", "", errno, NULL);
	if ((boot.create & NS_CGROUP) != 0 && syscall(SYS_unshare, NS_CGROUP) < 0)
		fail("unshare", "cgroup", errno, NULL);
	if ((boot.create & NS_NET) != 0)
		loopback_up();
	if (fds.joins) {
		handles->root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
		if (handles->root < 0)
			fail("root", "/", errno, NULL);
		replace_null_stdio(handles->root);
		if (plan.has_console)
			open_console(handles->root, &plan.console, fds.console);
	} else {
		build_rootfs(&plan, &fds, handles);
	}
	FAULT(set_up);
}

NORETURN static void stage_two(int gate)
{
	struct handles handles = {.root = -1, .processes = -1, .sysctl = -1};

	if (fds.cgroup >= 0)
		close(fds.cgroup);
	pass_gate(gate);
	if (setsid() < 0)
		fail("setsid", "", errno, NULL);
	if (fds.pauses) {
		offer_procfs(fds.procfs);
		if (syscall(SYS_unshare, NS_MNT) < 0)
			fail("unshare", "mnt", errno, NULL);
	}
	set_up(&handles);
	if (plan.has_console)
		take_terminal();
	set_limits(&plan);
	prepare_process(&plan, &fds, &handles);
	if (fds.pauses)
		become_pause(fds.sync);
	run_program(&plan, &fds, &handles);
}

/* Stage 2 in a pid namespace that was joined. */
NORETURN static void last_stage(int gate)
{
	struct handles handles = {.root = -1, .processes = -1, .sysctl = -1};

	pass_gate(gate);
	if (setsid() < 0)
		fail("setsid", "", errno, NULL);
	if (plan.has_console)
		take_terminal();
	set_limits(&plan); /* of which the number of processes would have counted against the stages outside, too */
	run_program(&plan, &fds, &handles);
}

static void tell_agent(int stage1, int stage2, int pidfd)
{
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = {.bytes = {0}};
	char text[64];
	struct iovec payload = {.iov_base = text};
	struct msghdr message = {
		.msg_iov = &payload, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.bytes)};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	int length = snprintf(text, sizeof(text), "{\"stage1_pid\":%d,\"stage2_pid\":%d}\n", stage1, stage2);

	payload.iov_len = (size_t)length;
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &pidfd, sizeof(pidfd));
	if (sendmsg(fds.init, &message, MSG_NOSIGNAL) != length)
		fail("pids", "init pipe", errno, NULL);
}

/* Make stage 2, tell the agent, let it go. */
static void launch(uint32_t namespaces, int cgroup, int stage1, void (*stage)(int gate))
{
	int gate[2], pidfd = -1, pid;

	if (pipe2(gate, O_CLOEXEC) < 0)
		fail("pipe", "", errno, NULL);
	FAULT(stage2_making);
	pid = clone_sibling(namespaces, cgroup, &pidfd);
	if (pid == 0) {
		close(gate[1]);
		stage(gate[0]);
		_exit(1);
	}
	FAULT(stage2_cloned);
	tell_agent(stage1, pid, pidfd);
	FAULT(stage2_told);
	if (write(gate[1], "", 1) != 1)
		fail("pipe", "", errno, NULL);
}

/* Do everything here, outside of the pid namespace, and let only the outcome in. */
static void finish_outside(uint32_t namespaces, int stage1)
{
	struct handles handles = {.root = -1, .processes = -1, .sysctl = -1};

	if (namespaces != 0 && syscall(SYS_unshare, namespaces) < 0)
		fail("unshare", "", errno, NULL);
	if (fds.cgroup >= 0)
		close(fds.cgroup);
	fds.cgroup = -1;
	set_up(&handles);
	prepare_process(&plan, &fds, &handles);
	const int kept[] = {fds.sync, fds.init};
	close_all_but(kept, ARRAY_SIZE(kept));
	launch(0, -1, stage1, last_stage);
}

static void ask(int peer, uint32_t question, uint32_t answer, const char *step)
{
	uint32_t got;

	if (write(peer, &question, sizeof(question)) != sizeof(question) ||
	    read(peer, &got, sizeof(got)) != sizeof(got) || got != answer)
		_exit(1); /* stage 0 is gone, or has said why */
	log_debug("done by stage 0:", step);
}

NORETURN static void stage_one(int peer)
{
	uint32_t finish = FINISH, word;
	uint32_t rest = boot.create & ~(NS_USER | NS_CGROUP | NS_TIME);

	report_stage(1);
	prctl(PR_SET_NAME, "nsexec:[1:CHILD]", 0, 0, 0);
	FAULT(stage1_entry);
	if (read(peer, &word, sizeof(word)) != sizeof(word))
		_exit(1); /* stage 0 is gone, before it told the agent of this process */
	if (fds.cgroup >= 0)
		close(fds.cgroup);
	fds.cgroup = -1;
	join_namespaces();
	FAULT(stage1_joined);
	if ((boot.create & NS_USER) != 0) {
		if (syscall(SYS_unshare, NS_USER) < 0)
			fail("unshare", "user", errno, NULL);
		FAULT(stage1_unmapped);
		ask(peer, USERMAP_PLS, USERMAP_ACK, "id maps");
		become_root_of_namespace();
		FAULT(stage1_mapped);
	}
	if ((boot.create & NS_TIME) != 0) {
		if (syscall(SYS_unshare, NS_TIME) < 0)
			fail("unshare", "time", errno, NULL);
		FAULT(stage1_offsets);
		if (boot.time_offsets != NULL)
			ask(peer, TIMEOFFSETS_PLS, TIMEOFFSETS_ACK, "time offsets");
	}
	(void)!write(peer, &finish, sizeof(finish));
	close(peer);
	if (enters_last())
		finish_outside(rest, getpid());
	else
		launch(rest, -1, getpid(), stage_two);
	_exit(0);
}

/* Serve stage 1 from outside of its user namespace until it is done. */
NORETURN static void serve_stage_one(int peer, int pid)
{
	uint32_t word;

	for (;;) {
		if (read(peer, &word, sizeof(word)) != sizeof(word))
			_exit(1);
		if (word == FINISH)
			_exit(0);
		FAULT(stage0_maps);
		if (word == USERMAP_PLS)
			write_maps(pid);
		else if (word == TIMEOFFSETS_PLS)
			write_proc("time offsets", pid, "timens_offsets", boot.time_offsets);
		else
			fail("stage 1", "", EPROTO, NULL);
		word++;
		if (write(peer, &word, sizeof(word)) != sizeof(word))
			_exit(1);
	}
}

NORETURN static void stage_zero(void)
{
	bool guarded = fds.cgroup >= 0 && (joined_mask() & (NS_PID | NS_USER)) != 0;

	if ((boot.create & NS_USER) != 0 || boot.time_offsets != NULL || guarded) {
		int pair[2], pid, pidfd = -1;
		uint32_t announced = ANNOUNCED;

		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
			fail("socketpair", "", errno, NULL);
		pid = clone_sibling(0, fds.cgroup, &pidfd);
		if (pid == 0) {
			close(pair[0]);
			stage_one(pair[1]);
		}
		close(pair[1]);
		FAULT(stage1_cloned);
		tell_agent(pid, 0, pidfd);
		FAULT(stage1_told);
		if (write(pair[0], &announced, sizeof(announced)) != sizeof(announced))
			_exit(1);
		serve_stage_one(pair[0], pid);
	}
	join_namespaces();
	if ((boot.create & NS_TIME) != 0 && syscall(SYS_unshare, NS_TIME) < 0)
		fail("unshare", "time", errno, NULL);
	if (enters_last())
		finish_outside(boot.create & ~(NS_CGROUP | NS_TIME), 0);
	else /* the pause process shows the agent something first, in the agent's own mount namespace */
		launch(boot.create & ~(NS_CGROUP | NS_TIME | (fds.pauses ? NS_MNT : 0)), fds.cgroup, 0, stage_two);
	_exit(0);
}

int main(void)
{
	struct cursor strings;

	if (getenv("_LIBCONTAINER_INITPIPE") == NULL) {
		static const char words[] = "nsexec is a part of Caisson's agent, which starts it; it does nothing by itself\n";

		(void)!write(2, words, sizeof(words) - 1);
		return 1;
	}
	faults_from_environment();
	read_environment();
	prctl(PR_SET_NAME, "nsexec:[0:PAR]", 0, 0, 0);
	int given[8 + CGROUPS_MAX] = {fds.init, fds.sync, fds.log, fds.console, fds.fifo, fds.cgroup, fds.pidfd, fds.procfs};
	memcpy(given + 8, fds.joined, sizeof(fds.joined));
	close_all_but(given, ARRAY_SIZE(given));
	reset_signals();
	FAULT(entry);
	decode_bootstrap(read_message(fds.init, MESSAGE_BOOTSTRAP, LIMIT_BOOTSTRAP), &boot);
	decode_plan(read_message(fds.init, MESSAGE_PLAN, LIMIT_PLAN), fds.joins, &plan);
	strings = read_message(fds.init, MESSAGE_STRINGS, LIMIT_STRINGS);
	decode_strings(strings, &plan);
	/* An init without a mount namespace of its own would rearrange the guest's mounts. */
	if (fds.joins ? boot.join == 0 && boot.paths == NULL : (boot.create & NS_MNT) == 0)
		fail("bootstrap", "namespaces", EINVAL, "those to make or to join do not fit what is to be started");
	if ((boot.join != 0) != (fds.pidfd >= 0) || (fds.joins && fds.fifo >= 0) || fds.pauses != (fds.procfs >= 0) ||
	    (fds.pauses && (boot.create & NS_PID) == 0))
		fail("bootstrap", "descriptors", EINVAL, "those given do not fit what is asked for");
	report_stage(0);
	log_debug("starting", plan.argv[0]);
	if (boot.oom_score_adj != NULL)
		write_proc("oom_score_adj", 0, "oom_score_adj", boot.oom_score_adj);
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		fail("dumpable", "", errno, NULL);
	raise_hard_limits(&plan);
	set_first_cpus(&plan);
	open_namespaces();
	join_cgroups();
	FAULT(messages);
	stage_zero();
}
