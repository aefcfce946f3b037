/*
 * server.c: the fork server, a resident nsexec that clones itself for each process that the runtime requests.
 *
 * The new process continues in main() as if it had just been spawned, but without execve(2), and already in its cgroup
 * and in the requested new namespaces, so that it needs no other stage to enter them.
 *
 * A request is one packet: the environment of the new process, NUL-terminated strings one after another, with its
 * descriptors: stdio, then those whose numbers are in the environment, counted from FIRST_PASSED.  They arrive with
 * these numbers, as no others are open.  The answer goes to the request's init socket, as for a stage 1 or, with new
 * namespaces, stage 2; or to its sync socket, as an error.  The server exits with the runtime, at EOF.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "nsexec.h"

#define FIRST_RECEIVED 3
#define FIRST_PASSED (FIRST_RECEIVED + 3) /* after stdio */
#define DESCRIPTORS_MAX 32
#define CONTROL (FIRST_RECEIVED + DESCRIPTORS_MAX + 3) /* beyond those of a request, the gate and the pidfd */
#define REQUEST_MAX 4096
#define STRINGS_MAX 32

extern char **environ;

/* Split an environment into its strings; false if it is malformed. */
static bool split(char *text, size_t size, char *strings[STRINGS_MAX + 1])
{
	size_t count = 0;

	if (size == 0 || text[size - 1] != '\0')
		return false;
	for (char *at = text; at < text + size; at += strlen(at) + 1) {
		if (count == STRINGS_MAX)
			return false;
		strings[count++] = at;
	}
	strings[count] = NULL;
	return true;
}

/* Receive the next request into the environment and the descriptors; exit at EOF, or if it is malformed. */
static void receive_request(void)
{
	static char text[REQUEST_MAX], *strings[STRINGS_MAX + 1];
	static union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
	} control;
	struct iovec payload = {.iov_base = text, .iov_len = sizeof(text)};
	struct msghdr message = {
		.msg_iov = &payload, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.bytes)};
	struct cmsghdr *header;
	ssize_t size;
	size_t count;
	int fd;

	do
		size = recvmsg(CONTROL, &message, MSG_CMSG_CLOEXEC);
	while (size < 0 && errno == EINTR);
	if (size == 0)
		_exit(0);
	header = size < 0 ? NULL : CMSG_FIRSTHDR(&message);
	if (header == NULL || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS ||
	    (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 || !split(text, (size_t)size, strings))
		_exit(1);
	count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
	for (size_t i = 0; i < count; i++) {
		memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
		if (fd != FIRST_RECEIVED + (int)i)
			_exit(1);
	}
	if (count < FIRST_PASSED - FIRST_RECEIVED)
		_exit(1);
	environ = strings;
}

/*
 * Clone the requested process, and send its pid to the runtime before letting it act.  Return the pipe at which it
 * waits for that in the new one, otherwise -1.
 */
static int clone_requested(void)
{
	int cgroup = descriptor_from("_CAISSON_CGROUP"), init = descriptor_from("_LIBCONTAINER_INITPIPE");
	int gate[2], pidfd = -1, pid = -1, error;
	uint32_t namespaces = namespaces_from_environment();

	if (pipe2(gate, O_CLOEXEC) == 0)
		pid = try_clone_sibling(namespaces, cgroup, &pidfd);
	if (pid < 0) {
		error = errno;
		report_to(descriptor_from("_LIBCONTAINER_SYNCPIPE"), descriptor_from("_LIBCONTAINER_LOGPIPE"), 0);
		report_error(error, cgroup >= 0 ? "clone into cgroup" : "clone", "", "");
		return -1;
	}
	if (pid != 0) {
		FAULT(server_cloned);
		if (send_stage(init, namespaces == 0 ? pid : 0, namespaces == 0 ? 0 : pid, pidfd) == 0)
			(void)!write(gate[1], "", 1);
		return -1;
	}
	close(gate[1]);
	unsetenv("_CAISSON_CGROUP");
	for (int fd = 0; fd < FIRST_PASSED - FIRST_RECEIVED; fd++)
		if (dup2(FIRST_RECEIVED + fd, fd) < 0)
			_exit(1);
	return gate[0];
}

int serve(int control)
{
	int gate;

	prctl(PR_SET_NAME, "nsexec:server", 0, 0, 0);
	signal(SIGPIPE, SIG_IGN);
	if ((control != CONTROL && dup3(control, CONTROL, O_CLOEXEC) < 0) || sys_close_range(CONTROL + 1, ~0u) < 0)
		_exit(1);
	do {
		if (sys_close_range(FIRST_RECEIVED, CONTROL - 1) < 0)
			_exit(1);
		receive_request();
		gate = clone_requested();
	} while (gate < 0);
	return gate;
}
