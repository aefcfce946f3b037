/*
 * nsexec.c: the stages, from the program the runtime starts to the process in its namespaces.
 *
 *   runtime             stage 0                stage 1 (only if needed)      stage 2, the container's process
 *      |-- bootstrap, plan, strings -->|                  |                                |
 *      |                   |-- clone ------------------->|                                |
 *      |<- stage1_pid, pidfd --|                          |                                |
 *      |                   |-- PIDS_SENT --------------->| join namespaces                |
 *      |                   |<- USERMAP_PLS --------------| unshare(CLONE_NEWUSER)         |
 *      |       write maps  |-- USERMAP_ACK ------------->| become its root                |
 *      |                   |<- TIMEOFFSETS_PLS ----------| unshare(CLONE_NEWTIME)         |
 *      |    write offsets  |-- TIMEOFFSETS_ACK --------->|                                |
 *      |             exit  |<- CHILD_FINISH -------------|-- clone ---------------------->|
 *      |<- stage1_pid, stage2_pid, pidfd ----------------|                                |
 *      |                                           exit  |-- 1 byte (go) ---------------->| root file system
 *      |<- procHooks (sync) --------------------------------------------------------------|
 *      |-- 1 byte, after the runtime's hooks -------------------------------------------->| pivot_root, devices …
 *      |<- pty master (console) ----------------------------------------------------------| user, capabilities
 *      |<- procSeccomp (sync), if the filter has a listener ------------------------------|
 *      |-- 1 byte, after pidfd_getfd ---------------------------------------------------->| close it
 *      |<- procReady (sync) --------------------------------------------------------------|
 *      |-- opens exec.fifo, or connects to the start socket (joined pidns) -------------->| startContainer hooks
 *      |<- EOF, or procError (sync) ------------------------------------------------------| execve
 *
 * Stage 1 exists only if an intermediate process is needed: id maps of a user namespace are written from outside, time
 * offsets must be set before the first process enters, and the descriptor of a cgroup to start in must not be visible
 * to other members of a joined pid or user namespace.  Otherwise stage 0 clones stage 2 with all new namespaces.
 *
 * Members of a joined pid namespace see a new process from the moment it exists, and with CAP_SYS_PTRACE they control
 * it, dumpable or not (CVE-2016-9962).  So the pid namespace is entered last: the last stage outside executes the whole
 * plan (setup_before_pidns), and stage 2 (late_child_main) starts with the container's root, user and capabilities, its
 * stdio and the sync socket, and only has to execute the program.  If the clone would lose the scheduler, the runtime
 * sets it and sends a byte.
 *
 * A resident nsexec (server.c) clones stage 0 of an exec in place of the runtime, in its cgroup already.  An init that
 * needs no other stage outside than the one that clones it, it clones directly, in its new namespaces and its cgroup:
 * that is both stage 0 and stage 2.
 *
 * All stages are children of the runtime (CLONE_PARENT).  A stage that clones another sends the new stage's pid and a
 * pidfd to the runtime before letting it run; if it dies before that, the new stage exits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "nsexec.h"

#define LIMIT_BOOTSTRAP (1u << 20)
#define LIMIT_PLAN (1u << 20)
#define LIMIT_STRINGS ((2u << 20) - 4096)

/* Messages between stages 0 and 1: runc's enum sync_t (libcontainer/nsenter/nsexec.c), without its pid exchange. */
enum sync_word {
	USERMAP_PLS = 0x40,
	USERMAP_ACK = 0x41,
	PIDS_SENT = 0x43,
	CHILD_FINISH = 0x45,
	TIMEOFFSETS_PLS = 0x46,
	TIMEOFFSETS_ACK = 0x47,
};

/* --- what the runtime passed --- */

/* Return the number in an environment variable, or -1 if it is not set. */
static int number_from(const char *name, int least, const char *otherwise)
{
	const char *text = getenv(name);
	char *end;
	long number;

	if (text == NULL || text[0] == '\0')
		return -1;
	errno = 0;
	number = strtol(text, &end, 10);
	if (errno != 0 || *end != '\0' || number < least || number > INT_MAX)
		fail(EINVAL, "environment", name, "%s", otherwise);
	return (int)number;
}

uint32_t namespaces_from_environment(void)
{
	int flags = number_from("_CAISSON_NAMESPACES", 0, "are not flags of clone(2)");

	return flags < 0 ? 0 : (uint32_t)flags;
}

int descriptor_from(const char *name)
{
	int fd = number_from(name, 3, "is not the number of a descriptor");

	if (fd >= 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
		fail_errno("environment", name, NULL);
	return fd;
}

static void read_environment(struct channels *fds)
{
	const char *type = getenv("_LIBCONTAINER_INITTYPE");
	int preserved;

	fds->sync = descriptor_from("_LIBCONTAINER_SYNCPIPE");
	report_to(fds->sync, -1, 0);
	fds->log = descriptor_from("_LIBCONTAINER_LOGPIPE");
	report_to(fds->sync, fds->log, number_from("_LIBCONTAINER_LOGLEVEL", 0, "is not a level"));
	fds->init = descriptor_from("_LIBCONTAINER_INITPIPE");
	fds->console = descriptor_from("_LIBCONTAINER_CONSOLE");
	fds->fifo = descriptor_from("_LIBCONTAINER_FIFOFD");
	fds->gate = descriptor_from("_CAISSON_START_SOCKET");
	preserved = number_from("_CAISSON_PRESERVED", 0, "is not a number of descriptors");
	fds->first_closed = 3 + (preserved < 0 ? 0 : (unsigned)preserved);
	fds->cgroup = descriptor_from("_CAISSON_CGROUP");
	fds->pidfd = descriptor_from("_CAISSON_PIDFD");
	fds->procfs = descriptor_from("_CAISSON_PROCFS");
	fds->namespaces = namespaces_from_environment();
	for (unsigned i = 0; i < CGROUPS_MAX; i++) {
		char name[32];

		snprintf(name, sizeof(name), "_CAISSON_CGROUP_%u", i);
		fds->cgroup_procs[i] = descriptor_from(name);
	}
	if (type == NULL || (strcmp(type, "standard") != 0 && strcmp(type, "setns") != 0 && strcmp(type, "pause") != 0))
		fail(EINVAL, "environment", "_LIBCONTAINER_INITTYPE", "must be standard, setns or pause");
	fds->joins = strcmp(type, "setns") == 0;
	fds->pauses = strcmp(type, "pause") == 0;
}

static void close_unknown_descriptors(const struct channels *fds)
{
	int known[10 + CGROUPS_MAX] = {fds->init, fds->sync,   fds->log,   fds->console, fds->fifo,
				       fds->gate, fds->cgroup, fds->pidfd, fds->procfs,	 fds->reported};

	memcpy(known + 10, fds->cgroup_procs, sizeof(fds->cgroup_procs));
	close_all_but(fds->first_closed, known, ARRAY_SIZE(known));
}

/*
 * Ignored signals survive execve.  The runtime resets all except those that libcs reserve, which may have been ignored
 * when the runtime started.
 */
static void reset_signals(void)
{
	static const uint64_t defaults[4], none; /* struct kernel_sigaction: SIG_DFL, no flags, an empty mask */

	for (int number = 32; number <= 34; number++)
		(void)!syscall(SYS_rt_sigaction, number, defaults, NULL, sizeof(none));
	if (syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof(none)) < 0)
		fail_errno("signals", "", NULL);
	signal(SIGPIPE, SIG_IGN); /* until the program is executed */
}

/* Whether an init needs a stage outside its new namespaces, beyond one that clones it. */
static bool needs_stages(const struct bootstrap *boot)
{
	return (boot->create & (NS_USER | NS_TIME)) != 0 || joins_by_path(boot, NS_USER) || joins_by_path(boot, NS_PID);
}

static void read_messages(struct context *ctx, struct inbox *inbox)
{
	const struct channels *fds = &ctx->fds;
	const struct bootstrap *boot = &ctx->boot;
	bool own_mounts;

	decode_bootstrap(read_message(inbox, fds->init, MESSAGE_BOOTSTRAP, LIMIT_BOOTSTRAP), &ctx->boot);
	decode_plan(read_message(inbox, fds->init, MESSAGE_PLAN, LIMIT_PLAN), fds->joins, &ctx->plan);
	decode_strings(read_message(inbox, fds->init, MESSAGE_STRINGS, LIMIT_STRINGS), &ctx->plan);
	/* An init in the runtime's mount namespace changes the host's mounts: only if requested. */
	own_mounts = (boot->create & NS_MNT) != 0 || joins_by_path(boot, NS_MNT);
	if (fds->joins ? boot->join == 0 && boot->paths == NULL : own_mounts == ctx->plan.shares_mounts)
		fail(EINVAL, "bootstrap", "namespaces", "do not fit the type of process");
	if ((boot->join != 0) != (fds->pidfd >= 0) || (fds->joins && (fds->fifo >= 0 || fds->gate >= 0)) ||
	    fds->pauses != (fds->procfs >= 0) || (fds->pauses && (boot->create & NS_PID) == 0))
		fail(EINVAL, "bootstrap", "descriptors", "do not fit the type of process");
	if (fds->namespaces != 0 && (fds->namespaces != (boot->create & ~NS_CGROUP) || needs_stages(boot)))
		fail(EINVAL, "bootstrap", "namespaces", "do not fit the request");
}

/*
 * cgroup v1 has no CLONE_INTO_CGROUP: this process joins each cgroup, and its children start there.  The descriptors
 * are closed here, outside all of the container's namespaces.
 */
static void join_cgroups(const struct channels *fds)
{
	for (unsigned i = 0; i < CGROUPS_MAX; i++) {
		int fd = fds->cgroup_procs[i];

		if (fd < 0)
			continue;
		if (write(fd, "0", 1) != 1) {
			char link[64], path[PATH_MAX];
			int error = errno;
			ssize_t length;

			snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
			length = readlink(link, path, sizeof(path) - 1);
			path[length < 0 ? 0 : length] = '\0';
			fail(error, "cgroup", path, NULL);
		}
		close(fd);
	}
}

/* --- stages --- */

/*
 * Clone a sibling: another child of the runtime.  clone3 with CLONE_PARENT inherits the exit signal and rejects an
 * explicit one.  Use clone unless clone3 is needed: the container's filter may already be active, and most deny clone3,
 * whose arguments they cannot inspect.
 */
int try_clone_sibling(uint32_t namespaces, int cgroup, int *pidfd)
{
	struct clone3_args args = {.flags = CLONE3_PARENT | CLONE3_PIDFD | namespaces,
				   .pidfd = (uint64_t)(uintptr_t)pidfd};

	if (cgroup < 0)
		return (int)syscall(SYS_clone, (unsigned long)args.flags | SIGCHLD, NULL, pidfd, NULL, NULL);
	args.flags |= CLONE3_INTO_CGROUP;
	args.cgroup = (uint64_t)cgroup;
	return sys_clone3(&args);
}

static int clone_sibling(uint32_t namespaces, int cgroup, int *pidfd)
{
	int pid = try_clone_sibling(namespaces, cgroup, pidfd);

	if (pid < 0)
		fail_errno(cgroup >= 0 ? "clone into cgroup" : "clone", "", NULL);
	return pid;
}

static void close_cgroup(struct channels *fds)
{
	if (fds->cgroup >= 0)
		close(fds->cgroup);
	fds->cgroup = -1;
}

static void become_stage2(struct channels *fds)
{
	report_stage(2);
	prctl(PR_SET_NAME, "nsexec:[2:INIT]", 0, 0, 0);
	close(fds->init);
	fds->init = -1;
}

/* Block until the process that cloned this one has sent its pid to the runtime. */
static void wait_until_reported(int *gate)
{
	char go;

	if (read(*gate, &go, 1) != 1)
		_exit(1); /* it died before */
	close(*gate);
	*gate = -1;
}

static void wait_for_parent(struct channels *fds, int gate)
{
	become_stage2(fds);
	FAULT(stage2_entry);
	wait_until_reported(&gate);
	FAULT(stage2_released);
}

/* Do all setup in the container's namespaces, except that of the process itself. */
static void set_up(struct context *ctx)
{
	struct channels *fds = &ctx->fds;
	const struct plan *plan = &ctx->plan;

	log_debug("child process in init()", "");
	umask(DEFAULT_UMASK);
	/* The container must not inherit the runtime's session keyring. */
	if (!ctx->boot.keep_keyring && syscall(SYS_keyctl, KEYCTL_JOIN_SESSION, NULL) < 0 && errno != ENOSYS)
		fail_errno("session keyring", "", NULL);
	if ((ctx->boot.create & NS_CGROUP) != 0 && syscall(SYS_unshare, NS_CGROUP) < 0)
		fail_errno("unshare", "cgroup", NULL);
	if ((ctx->boot.create & NS_NET) != 0)
		bring_loopback_up();
	if (fds->joins) {
		ctx->handles.root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
		if (ctx->handles.root < 0)
			fail_errno("root", "/", NULL);
		replace_null_stdio(ctx->handles.root);
		if (plan->has_console)
			open_console(ctx->handles.root, &plan->console, fds->console);
	} else {
		build_rootfs(ctx);
	}
	if (ctx->source_server >= 0)
		close(ctx->source_server);
	FAULT(set_up);
}

static void start_session(void)
{
	if (setsid() < 0)
		fail_errno("setsid", "", NULL);
}

/* Run stage 2, unless it joins a pid namespace. */
NORETURN static void stage2_main(struct context *ctx)
{
	start_session();
	if (ctx->fds.pauses) {
		attach_pause_procfs(ctx->fds.procfs);
		if (syscall(SYS_unshare, NS_MNT) < 0)
			fail_errno("unshare", "mnt", NULL);
	}
	set_up(ctx);
	if (ctx->plan.has_console)
		set_controlling_terminal();
	set_limits(&ctx->plan);
	prepare_process(ctx, false);
	if (ctx->fds.pauses)
		pause_main(ctx->fds.sync);
	run_program(ctx);
}

NORETURN static void child_main(struct context *ctx, int gate)
{
	close_cgroup(&ctx->fds);
	wait_for_parent(&ctx->fds, gate);
	stage2_main(ctx);
}

/* Run stage 2 in a joined pid namespace. */
NORETURN static void late_child_main(struct context *ctx, int gate)
{
	start_session();
	wait_for_parent(&ctx->fds, gate);
	if (scheduler_is_lost_by_clone(&ctx->plan))
		wait_for_runtime(ctx->fds.sync); /* which sets the scheduler */
	if (ctx->plan.has_console)
		set_controlling_terminal();
	set_limits(&ctx->plan); /* only now: RLIMIT_NPROC would also count the stages outside */
	run_program(ctx);
}

/* Send the runtime the pids of the cloned stages as JSON, with a pidfd of the last.  0 means no such stage. */
int send_stage(int init, int stage1, int stage2, int pidfd)
{
	char text[64];
	int length = snprintf(text, sizeof(text), "{\"stage1_pid\":%d,\"stage2_pid\":%d}\n", stage1, stage2);

	return send_descriptor(init, text, (size_t)length, pidfd);
}

static void send_pids(const struct channels *fds, int stage1, int stage2, int pidfd)
{
	if (send_stage(fds->init, stage1, stage2, pidfd) < 0)
		fail_errno("pids", "init pipe", NULL);
}

/* Clone stage 2, send its pid to the runtime, let it run. */
static void spawn_child(struct context *ctx, uint32_t namespaces, int cgroup, int stage1,
			void (*child)(struct context *ctx, int gate))
{
	int gate[2], pidfd = -1, pid;

	if (pipe2(gate, O_CLOEXEC) < 0)
		fail_errno("pipe", "", NULL);
	FAULT(stage2_cloning);
	pid = clone_sibling(namespaces, cgroup, &pidfd);
	if (pid == 0) {
		close(gate[1]);
		child(ctx, gate[0]);
		_exit(1);
	}
	FAULT(stage2_cloned);
	send_pids(&ctx->fds, stage1, pid, pidfd);
	FAULT(stage2_reported);
	if (write(gate[1], "", 1) != 1)
		fail_errno("pipe", "", NULL);
}

/* Execute the whole plan here, outside the joined pid namespace, so that only the finished process enters it. */
static void setup_before_pidns(struct context *ctx, uint32_t namespaces, int stage1)
{
	const int kept[] = {ctx->fds.sync, ctx->fds.init, ctx->fds.gate};

	if (namespaces != 0 && syscall(SYS_unshare, namespaces) < 0)
		fail_errno("unshare", "", NULL);
	close_cgroup(&ctx->fds);
	set_up(ctx);
	prepare_process(ctx, true);
	close_all_but(ctx->fds.first_closed, kept, ARRAY_SIZE(kept));
	if (ctx->plan.filter != NULL && !ctx->plan.no_new_privs)
		load_early_filter(ctx);
	spawn_child(ctx, 0, -1, stage1, late_child_main);
}

static void request_stage0(int peer, enum sync_word request, enum sync_word answer, const char *step)
{
	uint32_t word = request;

	if (write(peer, &word, sizeof(word)) != sizeof(word) || read(peer, &word, sizeof(word)) != sizeof(word) ||
	    word != answer)
		_exit(1); /* stage 0 died, or reported an error */
	log_debug("done by stage 0:", step);
}

NORETURN static void stage1_main(struct context *ctx, struct namespace_files *files, bool joins_pidns, int peer)
{
	uint32_t word, create = ctx->boot.create, rest = create & ~(NS_USER | NS_CGROUP | NS_TIME);
	bool privileged = geteuid() == 0;

	report_stage(1);
	prctl(PR_SET_NAME, "nsexec:[1:CHILD]", 0, 0, 0);
	FAULT(stage1_entry);
	if (read(peer, &word, sizeof(word)) != sizeof(word))
		_exit(1); /* stage 0 died before it sent the pid */
	close_cgroup(&ctx->fds);
	join_namespaces(ctx, files);
	FAULT(stage1_joined);
	if ((create & NS_USER) != 0) {
		if (syscall(SYS_unshare, NS_USER) < 0)
			fail_errno("unshare", "user", NULL);
		FAULT(stage1_unmapped);
		/* A non-dumpable process's /proc files belong to root: others could not write the maps (proc(5)). */
		if (!privileged && prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) < 0)
			fail_errno("dumpable", "", NULL);
		request_stage0(peer, USERMAP_PLS, USERMAP_ACK, "id maps");
		if (!privileged && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
			fail_errno("dumpable", "", NULL);
		become_root_of_namespace(&ctx->plan);
		FAULT(stage1_mapped);
	}
	if ((create & NS_TIME) != 0) {
		if (syscall(SYS_unshare, NS_TIME) < 0)
			fail_errno("unshare", "time", NULL);
		FAULT(stage1_offsets);
		if (ctx->boot.time_offsets != NULL)
			request_stage0(peer, TIMEOFFSETS_PLS, TIMEOFFSETS_ACK, "time offsets");
	}
	word = CHILD_FINISH;
	(void)!write(peer, &word, sizeof(word));
	close(peer);
	if (joins_pidns)
		setup_before_pidns(ctx, rest, getpid());
	else
		spawn_child(ctx, rest, -1, getpid(), child_main);
	_exit(0);
}

/* Write maps and offsets for stage 1, which cannot, from outside its user namespace; exit at CHILD_FINISH. */
NORETURN static void serve_stage1(const struct context *ctx, int peer, int pid)
{
	uint32_t word;

	for (;;) {
		if (read(peer, &word, sizeof(word)) != sizeof(word))
			_exit(1);
		if (word == CHILD_FINISH)
			_exit(0);
		FAULT(stage0_maps);
		if (word == USERMAP_PLS)
			write_id_maps(&ctx->boot, pid);
		else if (word == TIMEOFFSETS_PLS)
			write_proc("time offsets", pid, "timens_offsets", ctx->boot.time_offsets);
		else
			fail(EPROTO, "stage 1", "", NULL);
		word++;
		if (write(peer, &word, sizeof(word)) != sizeof(word))
			_exit(1);
	}
}

NORETURN static void spawn_stage1(struct context *ctx, struct namespace_files *files, bool joins_pidns)
{
	int pair[2], pid, pidfd = -1;
	uint32_t word = PIDS_SENT;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		fail_errno("socketpair", "", NULL);
	pid = clone_sibling(0, ctx->fds.cgroup, &pidfd);
	if (pid == 0) {
		close(pair[0]);
		stage1_main(ctx, files, joins_pidns, pair[1]);
	}
	close(pair[1]);
	FAULT(stage1_cloned);
	send_pids(&ctx->fds, pid, 0, pidfd);
	FAULT(stage1_reported);
	if (write(pair[0], &word, sizeof(word)) != sizeof(word))
		_exit(1);
	serve_stage1(ctx, pair[0], pid);
}

NORETURN static void stage0_main(struct context *ctx)
{
	struct namespace_files files;
	const struct bootstrap *boot = &ctx->boot;
	uint32_t joined = boot->join;
	int userns = -1;
	bool joins_pidns;

	open_namespaces(boot, &files);
	for (size_t i = 0; i < files.count; i++) {
		joined |= files.list[i].flag;
		if (files.list[i].flag == NS_USER)
			userns = files.list[i].fd;
	}
	joins_pidns = (joined & NS_PID) != 0;
	ctx->has_userns = ((boot->create | joined) & NS_USER) != 0;
	if (!ctx->fds.joins)
		open_sources(ctx, userns);
	join_cgroups(&ctx->fds);
	FAULT(messages);
	if ((boot->create & NS_USER) != 0 || boot->time_offsets != NULL ||
	    (ctx->fds.cgroup >= 0 && (joined & (NS_PID | NS_USER)) != 0))
		spawn_stage1(ctx, &files, joins_pidns);
	join_namespaces(ctx, &files);
	if (ctx->fds.namespaces != 0) { /* the fork server has cloned stage 2 */
		become_stage2(&ctx->fds);
		stage2_main(ctx);
	}
	if ((boot->create & NS_TIME) != 0 && syscall(SYS_unshare, NS_TIME) < 0)
		fail_errno("unshare", "time", NULL);
	if (joins_pidns)
		setup_before_pidns(ctx, boot->create & ~(NS_CGROUP | NS_TIME), 0);
	else /* the pause process first mounts its procfs in the runtime's mount namespace, where the runtime sees it */
		spawn_child(ctx, boot->create & ~(NS_CGROUP | NS_TIME | (ctx->fds.pauses ? NS_MNT : 0)),
			    ctx->fds.cgroup, 0, child_main);
	_exit(0);
}

int main(void)
{
	static struct inbox inbox;
	struct context ctx = {
		.fds = {.reported = -1}, .handles = {.root = -1, .processes = -1, .sysctl = -1}, .source_server = -1};

	faults_from_environment();
	if (getenv("_CAISSON_SERVER") != NULL)
		ctx.fds.reported = serve(descriptor_from("_CAISSON_SERVER")); /* and continue in a requested process */
	if (getenv("_LIBCONTAINER_INITPIPE") == NULL) {
		static const char usage[] = "nsexec is started by Caisson's runtime; it does nothing by itself\n";

		(void)!write(2, usage, sizeof(usage) - 1);
		return 1;
	}
	read_environment(&ctx.fds);
	prctl(PR_SET_NAME, "nsexec:[0:PAR]", 0, 0, 0);
	close_unknown_descriptors(&ctx.fds);
	reset_signals();
	FAULT(entry);
	read_messages(&ctx, &inbox);
	if (ctx.fds.reported >= 0)
		wait_until_reported(&ctx.fds.reported);
	report_stage(0);
	log_debug("=> nsexec container setup", "");
	if (ctx.boot.oom_score_adj != NULL)
		write_proc("oom_score_adj", 0, "oom_score_adj", ctx.boot.oom_score_adj);
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		fail_errno("dumpable", "", NULL);
	raise_hard_limits(&ctx.plan);
	set_initial_cpus(&ctx.plan);
	stage0_main(&ctx);
}
