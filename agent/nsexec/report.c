/*
 * report.c: report progress and errors: JSON lines on the log pipe (best effort), and on the sync socket a packet for
 * each progress report and one for the error that ended nsexec.  Paths come from images: everything is escaped and
 * bounded.
 *
 * The destination of reports is the program's only global state, because any function may fail.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nsexec.h"

#define LEVEL_DEBUG 5
#define TEXT_MAX 1024

static int sync_fd = -1, log_fd = -1, log_level = LEVEL_DEBUG, stage = -1;

struct text {
	char bytes[TEXT_MAX * 8];
	size_t used;
};

void report_to(int sync, int log, int level)
{
	sync_fd = sync;
	log_fd = log;
	log_level = level;
}

void report_stage(int number)
{
	stage = number;
}

static void put(struct text *t, const char *s)
{
	size_t length = strlen(s);

	if (length > sizeof(t->bytes) - t->used)
		length = sizeof(t->bytes) - t->used;
	memcpy(t->bytes + t->used, s, length);
	t->used += length;
}

/* Append at most TEXT_MAX bytes of `s`, escaped for JSON: at worst six bytes each, so that a packet always fits. */
static void put_escaped(struct text *t, const char *s)
{
	char code[8];

	for (size_t i = 0; s[i] != '\0' && i < TEXT_MAX; i++) {
		unsigned char c = (unsigned char)s[i];

		if (c == '"' || c == '\\') {
			code[0] = '\\';
			code[1] = (char)c;
			code[2] = '\0';
		} else if (c < 0x20 || c == 0x7f) {
			snprintf(code, sizeof(code), "\\u%04X", c);
		} else {
			code[0] = (char)c;
			code[1] = '\0';
		}
		put(t, code);
	}
}

static void put_number(struct text *t, long number)
{
	char digits[24];

	snprintf(digits, sizeof(digits), "%ld", number);
	put(t, digits);
}

/* Use write(2) for the socket, too: every seccomp filter permits it.  SIGPIPE is ignored (reset_signals). */
static void send_all(int fd, const struct text *t)
{
	if (fd >= 0)
		(void)!write(fd, t->bytes, t->used);
}

static void log_line(const char *level, const char *text, const char *detail, int error)
{
	struct text t = {.used = 0};

	put(&t, "{\"level\":\"");
	put(&t, level);
	put(&t, "\", \"msg\": \"nsexec");
	if (stage >= 0) {
		put(&t, "-");
		put_number(&t, stage);
	}
	put(&t, "[");
	put_number(&t, getpid());
	put(&t, "]: ");
	put_escaped(&t, text);
	if (detail != NULL && detail[0] != '\0') {
		put(&t, " ");
		put_escaped(&t, detail);
	}
	if (error != 0) {
		put(&t, ": ");
		put_escaped(&t, strerror(error));
	}
	put(&t, "\"}\n");
	send_all(log_fd, &t);
}

void log_debug(const char *text, const char *detail)
{
	if (log_fd >= 0 && log_level >= LEVEL_DEBUG)
		log_line("debug", text, detail, 0);
}

/* The runtime reads the log until EOF: it must not stay open in a container that waits to be started. */
void log_close(void)
{
	if (log_fd >= 0)
		close(log_fd);
	log_fd = -1;
}

void report_progress(const char *what)
{
	struct text t = {.used = 0};

	put(&t, "{\"type\":\"");
	put(&t, what);
	put(&t, "\"}");
	/* The runtime was killed before this process was ready: nobody knows about it. */
	if (write(sync_fd, t.bytes, t.used) < 0)
		_exit(1);
}

/* Report to the starter, at the gate, that the process continues; later errors go there, too, and EOF means execve. */
void report_started(int gate)
{
	sync_fd = gate;
	(void)!write(gate, "0", 1);
}

void report_listener(int fd)
{
	struct text t = {.used = 0};

	put(&t, "{\"type\":\"procSeccomp\",\"fd\":");
	put_number(&t, fd);
	put(&t, "}");
	send_all(sync_fd, &t);
}

/* If the runtime has created the container and exited, later errors go to the container's stderr. */
void report_to_stderr_if_closed(void)
{
	struct pollfd polled = {.fd = sync_fd};

	if (poll(&polled, 1, 0) == 1 && (polled.revents & (POLLHUP | POLLERR)) != 0)
		sync_fd = -1;
}

/* Room for one descriptor, aligned. */
union descriptor_control {
	struct cmsghdr header;
	char bytes[CMSG_SPACE(sizeof(int))];
};

int send_descriptor(int socket, const void *data, size_t size, int fd)
{
	union descriptor_control control = {.bytes = {0}};
	struct iovec payload = {.iov_base = (void *)data, .iov_len = size};
	struct msghdr message = {
		.msg_iov = &payload, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.bytes)};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	return sendmsg(socket, &message, MSG_NOSIGNAL) == (ssize_t)size ? 0 : -1;
}

int receive_descriptor(int socket, void *data, size_t size)
{
	union descriptor_control control = {.bytes = {0}};
	struct iovec payload = {.iov_base = data, .iov_len = size};
	struct msghdr message = {
		.msg_iov = &payload, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.bytes)};
	struct cmsghdr *header;
	int fd;

	if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != (ssize_t)size)
		return -1;
	header = CMSG_FIRSTHDR(&message);
	if (header == NULL || header->cmsg_type != SCM_RIGHTS || header->cmsg_len != CMSG_LEN(sizeof(int)))
		return -1;
	memcpy(&fd, CMSG_DATA(header), sizeof(fd));
	return fd;
}

/* exit_group(2) or, if the filter denies it, a signal that cannot be ignored. */
NORETURN static void end(void)
{
	(void)syscall(SYS_exit_group, 1);
	__builtin_trap();
}

void report_error(int error, const char *step, const char *path, const char *why)
{
	struct text t = {.used = 0};

	log_line("fatal", step, path, error);
	if (sync_fd < 0) {
		const char *words = why[0] != '\0' ? why : strerror(error); /* uncapitalised, as in Go */

		dprintf(2, "%s %s: %c%s\n", strcmp(step, "execve") == 0 ? "exec" : step, path, words[0] | 0x20,
			words + 1);
		return;
	}
	put(&t, "{\"type\":\"procError\",\"step\":\"");
	put_escaped(&t, step);
	put(&t, "\",\"path\":\"");
	put_escaped(&t, path != NULL ? path : "");
	put(&t, "\",\"errno\":");
	put_number(&t, error);
	if (why[0] != '\0') {
		put(&t, ",\"why\":\"");
		put_escaped(&t, why);
		put(&t, "\"");
	}
	put(&t, "}");
	send_all(sync_fd, &t);
}

NORETURN void fail(int error, const char *step, const char *path, const char *format, ...)
{
	char why[TEXT_MAX] = "";
	va_list arguments;

	if (format != NULL) {
		va_start(arguments, format);
		vsnprintf(why, sizeof(why), format, arguments);
		va_end(arguments);
	}
	report_error(error, step, path, why);
	end();
}
