/*
 * channel.c: follow one nsexec, from spawn to execve of the program (libcontainer's channel.py and launcher.py).
 *
 * A member of the container's pid namespace may briefly get hold of the init socket: only known stages may announce
 * others.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../sys.h"
#include "front.h"

#define MFD_EXEC_FLAG 0x10u /* Linux 6.3; before that every memfd is executable */
#define PASSED_MAX (CGROUPS_MAX + 4)
#define ENV_SIZE 48

struct passed { /* descriptors passed to nsexec, by environment variable name */
	int fds[PASSED_MAX];
	char env[PASSED_MAX][ENV_SIZE];
	size_t count;
};

struct channel {
	int init, sync;
	pid_t stage0, stage1;
	struct process process;
	int stage1_pidfd;
	bool ready, failed, ended;
};

static void pass(struct passed *passed, const char *name, int fd)
{
	snprintf(passed->env[passed->count], ENV_SIZE, "%s=%d", name, fd);
	passed->fds[passed->count++] = fd;
}

/* Make a sealed copy, which even root in a container cannot write to (CVE-2019-5736). */
static int seal(const char *nsexec)
{
	int from = open(nsexec, O_RDONLY | O_CLOEXEC),
	    to = memfd_create("nsexec", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC_FLAG);
	struct stat stat;

	if (to < 0)
		to = memfd_create("nsexec", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (from < 0 || to < 0 || fstat(from, &stat) < 0)
		return -1;
	while (stat.st_size > 0) {
		ssize_t done = sendfile(to, from, NULL, (size_t)stat.st_size);

		if (done <= 0)
			return -1;
		stat.st_size -= done;
	}
	close(from);
	if (fchmod(to, 0511) < 0 ||
	    fcntl(to, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) < 0)
		return -1;
	return to;
}

/* Pass the cgroup v2 directory, unless controllers are enabled for its children, so that it accepts no processes. */
static bool pass_unified(const char *directory, struct passed *passed)
{
	char path[4096 + 32], text[1024];
	struct slice file;
	int fd;

	snprintf(path, sizeof(path), "%s/cgroup.subtree_control", directory);
	if (!read_file(AT_FDCWD, path, &file, text, sizeof(text)) || file.size > 1)
		return false;
	fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	pass(passed, "_CAISSON_CGROUP", fd);
	return fd >= 0;
}

/* Pass the files to join the container's cgroups; the freezer is last, since joining a frozen one stops the process. */
static bool pass_cgroups(const struct container *container, struct passed *passed)
{
	if (container->cgroup_count == 1 && container->cgroups[0].kind == 'u')
		return pass_unified(container->cgroups[0].path, passed);
	for (size_t i = 0; i < container->cgroup_count; i++) {
		char path[4096 + 16], name[32];
		int fd;

		snprintf(path, sizeof(path), "%s/cgroup.procs", container->cgroups[i].path);
		snprintf(name, sizeof(name), "_CAISSON_CGROUP_%zu", i);
		fd = open(path, O_WRONLY | O_CLOEXEC);
		if (fd < 0)
			return false;
		pass(passed, name, fd);
	}
	return true;
}

static bool spawn(int program, struct passed *passed, const int stdio[3], pid_t *pid)
{
	char path[32], *argv[] = {"nsexec", NULL}, *env[PASSED_MAX + 4];
	static char type[] = "_LIBCONTAINER_INITTYPE=setns", level[] = "_LIBCONTAINER_LOGLEVEL=4";
	posix_spawn_file_actions_t actions;
	posix_spawnattr_t attributes;
	sigset_t signals;
	size_t count = 0;
	int error = posix_spawn_file_actions_init(&actions) | posix_spawnattr_init(&attributes);

	sigfillset(&signals);
	error |= posix_spawnattr_setsigdefault(&attributes, &signals);
	error |= posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
	for (int i = 0; i < 3; i++)
		error |= posix_spawn_file_actions_adddup2(&actions, stdio[i], i);
	for (; count < passed->count; count++) {
		/* Onto itself: keeps the number, clears close-on-exec. */
		error |= posix_spawn_file_actions_adddup2(&actions, passed->fds[count], passed->fds[count]);
		env[count] = passed->env[count];
	}
	env[count++] = type;
	env[count++] = level;
#ifdef FAULTS
	static char fault[64];
	snprintf(fault, sizeof(fault), "_CAISSON_FAULT=%s", getenv("_CAISSON_FAULT") ? getenv("_CAISSON_FAULT") : "");
	env[count++] = fault;
#endif
	env[count] = NULL;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", program);
	return error == 0 && posix_spawn(pid, path, &actions, &attributes, argv, env) == 0;
}

/* Receive a message from the init socket: its text, sender and descriptor. */
static ssize_t receive(int init, char *text, size_t size, pid_t *sender, int *fd)
{
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(4 * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
	} control;
	struct iovec payload = {.iov_base = text, .iov_len = size};
	struct msghdr message = {
		.msg_iov = &payload, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.bytes)};
	ssize_t got = recvmsg(init, &message, MSG_CMSG_CLOEXEC);

	*sender = 0;
	*fd = -1;
	for (struct cmsghdr *header = got < 0 ? NULL : CMSG_FIRSTHDR(&message); header != NULL;
	     header = CMSG_NXTHDR(&message, header)) {
		if (header->cmsg_level != SOL_SOCKET)
			continue;
		if (header->cmsg_type == SCM_CREDENTIALS) {
			struct ucred sent;

			memcpy(&sent, CMSG_DATA(header), sizeof(sent));
			*sender = sent.pid;
		} else if (header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof(int))) {
			memcpy(fd, CMSG_DATA(header), sizeof(*fd));
		}
	}
	return got;
}

/* Record the process cloned last: stage 1, or the process itself. */
static void on_init(struct channel *channel)
{
	char text[256];
	pid_t sender;
	int fd, stage1, stage2;
	ssize_t got = receive(channel->init, text, sizeof(text) - 1, &sender, &fd);

	text[got < 0 ? 0 : got] = '\0';
	if (got <= 0) {
		close(channel->init);
		channel->init = -1;
	} else if (fd >= 0 && (sender == channel->stage0 || (channel->stage1 > 0 && sender == channel->stage1)) &&
		   sscanf(text, "{\"stage1_pid\":%d,\"stage2_pid\":%d}", &stage1, &stage2) == 2 && stage1 >= 0) {
		if (stage2 > 0 && channel->process.pidfd < 0) {
			channel->process = (struct process){.pid = stage2, .pidfd = fd};
			return;
		}
		if (stage2 == 0 && stage1 > 0 && channel->stage1_pidfd < 0) {
			channel->stage1 = stage1;
			channel->stage1_pidfd = fd;
			return;
		}
	}
	if (fd >= 0)
		close(fd);
}

static void on_sync(struct channel *channel)
{
	static char packet[16384];
	ssize_t got = recv(channel->sync, packet, sizeof(packet) - 1, 0);

	if (got <= 0)
		channel->ended = true;
	else if (got == 20 && memcmp(packet, "{\"type\":\"procReady\"}", 20) == 0)
		channel->ready = true;
	else
		channel->failed = true; /* Python will find out and report why */
}

/* Follow nsexec until EOF on the sync socket: the program was executed, or all stages have ended. */
static void follow_setup(struct channel *channel)
{
	while (!channel->ended && !channel->failed) {
		struct pollfd polled[] = {{.fd = channel->init, .events = POLLIN},
					  {.fd = channel->sync, .events = POLLIN}};

		if (poll(polled, 2, -1) < 0 && errno != EINTR)
			channel->failed = true;
		else if (polled[0].revents != 0) /* pids first: they are sent before progress */
			on_init(channel);
		else if (polled[1].revents != 0)
			on_sync(channel);
	}
}

/* Kill and reap all stages: nothing may be left when handing over. */
static void end_setup(const struct channel *channel)
{
	const int pidfds[] = {channel->stage1_pidfd, channel->process.pidfd};
	const pid_t pids[] = {channel->stage0, channel->stage1, channel->process.pid};

	kill(channel->stage0, SIGKILL);
	for (size_t i = 0; i < ARRAY_SIZE(pidfds); i++)
		if (pidfds[i] >= 0)
			syscall(SYS_pidfd_send_signal, pidfds[i], SIGKILL, NULL, 0);
	for (size_t i = 0; i < ARRAY_SIZE(pids); i++)
		if (pids[i] > 0)
			waitpid(pids[i], NULL, 0);
}

bool launch(const struct container *container, const char *nsexec, struct slice messages, const int stdio[3],
	    struct process *out)
{
	struct channel channel = {.process = {.pidfd = -1}, .stage1_pidfd = -1};
	struct passed passed = {.count = 0};
	int init[2], sync[2], program = seal(nsexec), pidfd = pidfd_of(container), on = 1;

	if (program < 0 || pidfd < 0 || !pass_cgroups(container, &passed) ||
	    socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, init) < 0 ||
	    socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sync) < 0 ||
	    setsockopt(init[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) < 0)
		return false;
	pass(&passed, "_CAISSON_PIDFD", pidfd);
	pass(&passed, "_LIBCONTAINER_INITPIPE", init[1]);
	pass(&passed, "_LIBCONTAINER_SYNCPIPE", sync[1]);
	signal(SIGPIPE, SIG_IGN);
	if (!spawn(program, &passed, stdio, &channel.stage0))
		return false;
	channel.init = init[0];
	channel.sync = sync[0];
	for (size_t i = 0; i < passed.count; i++)
		close(passed.fds[i]);
	if (!write_all(init[0], messages.at, messages.size))
		channel.failed = true;
	follow_setup(&channel);
	if (!channel.failed && channel.ready && channel.process.pidfd < 0) {
		dprintf(2, "exec failed: nsexec broke off\n"); /* too late to hand over: the program was executed */
		_exit(255);
	}
	if (channel.failed || !channel.ready || channel.process.pidfd < 0) {
		end_setup(&channel);
		return false;
	}
	waitpid(channel.stage0, NULL, 0); /* zombies would count as processes of the container */
	if (channel.stage1 > 0)
		waitpid(channel.stage1, NULL, 0);
	*out = channel.process;
	return true;
}
