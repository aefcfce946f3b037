/* peer.c: the guest's end of load tests and benchmarks: executes the host's requests on a connection.
 *
 *     peer vsock:PORT tcp:PORT file:PATH dial:PORT:COUNT …
 *
 * Listens on a port, or opens a device, or connects COUNT times to a host port; all at once, each connection in its own
 * process.  The host sends requests (struct request, little-endian), one after the other:
 *
 *     ECHO    send back `receive` bytes, in pieces of `size`
 *     SINK    read `receive` bytes, answer with one byte
 *     SOURCE  send `send` bytes
 *     LOAD    send and receive both ways at once, see below; the connection ends with it
 *
 * LOAD's streams consist of blocks of 65521 bytes: connection number, block number (32 bits each), then bytes that are
 * the same in all blocks.  That reveals lost or duplicated data, and data of other connections.  The outcome is a line
 * on stdout: connection number, bytes received, bytes sent, and "whole" (EOF), "left" (this end hung up, as requested),
 * "broken" (the host's end did) or "wrong" (not the bytes of the stream).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef AF_VSOCK
#define AF_VSOCK 40
#endif

enum { ECHO = 1, SINK, SOURCE, LOAD };
enum { SLOW = 1, SHUT_READING = 2 }; /* flags of LOAD: read little at a time; stop reading instead of hanging up */

struct request {
	uint32_t operation, number, flags, size;
	uint64_t receive, send, limit; /* limit: bytes received after which LOAD hangs up, or stops reading */
};

struct vsock_address { /* linux/vm_sockets.h, which musl lacks */
	unsigned short family, reserved;
	unsigned int port, cid;
	unsigned char rest[4];
};

#define BLOCK 65521
static unsigned char pattern[BLOCK], data[1 << 18];

static void fail(const char *what)
{
	perror(what);
	_exit(1);
}

static int read_whole(int fd, void *to, size_t size)
{
	for (size_t done = 0; done < size;) {
		ssize_t got = read(fd, (char *)to + done, size - done);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return 0;
		done += got;
	}
	return 1;
}

static int write_whole(int fd, const void *from, size_t size)
{
	for (size_t done = 0; done < size;) {
		ssize_t put = write(fd, (const char *)from + done, size - done);
		if (put < 0 && errno == EINTR)
			continue;
		if (put <= 0)
			return 0;
		done += put;
	}
	return 1;
}

/* Return the stream's bytes from a position to the end of the block. */
static size_t stream(uint32_t number, uint64_t position, const unsigned char **bytes, unsigned char head[8])
{
	uint32_t block = position / BLOCK, offset = position % BLOCK;
	if (offset >= 8) {
		*bytes = pattern + offset;
		return BLOCK - offset;
	}
	memcpy(head, &number, 4);
	memcpy(head + 4, &block, 4);
	*bytes = head + offset;
	return 8 - offset;
}

static int right(const struct request *asked, uint64_t position, const unsigned char *got, size_t size)
{
	unsigned char head[8];
	while (size) {
		const unsigned char *expected;
		size_t part = stream(asked->number, position, &expected, head);
		if (part > size)
			part = size;
		if (memcmp(got, expected, part))
			return 0;
		got += part, size -= part, position += part;
	}
	return 1;
}

static size_t fill(const struct request *asked, uint64_t position, unsigned char *to, size_t size)
{
	unsigned char head[8];
	for (size_t done = 0; done < size;) {
		const unsigned char *from;
		size_t part = stream(asked->number, position + done, &from, head);
		if (part > size - done)
			part = size - done;
		memcpy(to + done, from, part);
		done += part;
	}
	return size;
}

static const char *load(int fd, const struct request *asked, uint64_t *received, uint64_t *sent)
{
	int reading = 1, writing = 1;
	size_t piece = asked->flags & SLOW ? 4096 : sizeof data;
	fcntl(fd, F_SETFL, O_NONBLOCK);
	while (reading || writing) {
		if (writing && *sent == asked->send) {
			shutdown(fd, SHUT_WR);
			writing = 0;
			continue;
		}
		struct pollfd poll_fd = {fd, (reading ? POLLIN : 0) | (writing ? POLLOUT : 0), 0};
		if (poll(&poll_fd, 1, -1) < 0)
			fail("poll");
		if (reading && poll_fd.revents & (POLLIN | POLLHUP | POLLERR)) {
			ssize_t got = recv(fd, data, piece, 0);
			if (got > 0 && !right(asked, *received, data, got))
				return "wrong";
			if (got > 0)
				*received += got;
			else if (!got && !writing && *received == asked->receive)
				return "whole";
			else if (!got && *received == asked->receive)
				reading = 0;
			else if (!got || errno != EAGAIN)
				return "broken";
			if (*received >= asked->limit) {
				if (!(asked->flags & SHUT_READING))
					return "left";
				shutdown(fd, SHUT_RD);
				reading = 0;
			}
			if (asked->flags & SLOW)
				nanosleep(&(struct timespec){0, 2000000}, NULL);
		}
		if (writing && poll_fd.revents & (POLLOUT | POLLHUP | POLLERR)) {
			size_t size = asked->send - *sent < sizeof data ? asked->send - *sent : sizeof data;
			ssize_t put = send(fd, data, fill(asked, *sent, data, size), MSG_NOSIGNAL);
			if (put > 0)
				*sent += put;
			else if (errno != EAGAIN)
				return "broken";
		}
	}
	return *received == asked->receive ? "whole" : "left";
}

static void serve(int fd)
{
	struct request asked;
	while (read_whole(fd, &asked, sizeof asked)) {
		if (asked.operation == LOAD) {
			uint64_t received = 0, sent = 0;
			const char *end = load(fd, &asked, &received, &sent);
			char line[99];
			int size = snprintf(line, sizeof line, "%u %llu %llu %s\n", asked.number, (unsigned long long)received,
					    (unsigned long long)sent, end);
			close(fd);
			write_whole(1, line, size);
			return;
		}
		for (uint64_t left = asked.operation == SOURCE ? asked.send : asked.receive; left;) {
			size_t size = asked.operation == ECHO ? asked.size : sizeof data;
			if (size > left)
				size = left;
			if (asked.operation != SOURCE) {
				ssize_t got = asked.operation == ECHO ? (read_whole(fd, data, size) ? (ssize_t)size : 0)
								       : read(fd, data, size);
				if (got <= 0)
					return;
				size = got;
			}
			if (asked.operation != SINK && !write_whole(fd, data, size))
				return;
			left -= size;
		}
		if (asked.operation == SINK && !write_whole(fd, "", 1))
			return;
	}
}

static int open_socket(int family, unsigned port, int dial)
{
	struct vsock_address vsock = {.family = AF_VSOCK, .port = port, .cid = dial ? 2 : -1U};
	struct sockaddr_in tcp = {.sin_family = AF_INET, .sin_port = htons(port)};
	struct sockaddr *address = family == AF_VSOCK ? (struct sockaddr *)&vsock : (struct sockaddr *)&tcp;
	socklen_t size = family == AF_VSOCK ? sizeof vsock : sizeof tcp;
	int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	if (fd < 0)
		fail("socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (dial ? connect(fd, address, size) : bind(fd, address, size) || listen(fd, 2048))
		fail(dial ? "connect" : "listen");
	return fd;
}

static void accept_all(int family, unsigned port)
{
	int listener = open_socket(family, port, 0), one = 1;
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		if (fd < 0)
			fail("accept");
		if (family == AF_INET)
			setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		if (!fork()) {
			close(listener);
			serve(fd);
			_exit(0);
		}
		close(fd);
	}
}

int main(int count, char **words)
{
	uint32_t state = 1;
	for (int i = 0; i < BLOCK; i++) {
		state = state * 1664525 + 1013904223;
		pattern[i] = state >> 24;
	}
	signal(SIGCHLD, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	for (int i = 1; i < count; i++) {
		unsigned port, times;
		if (sscanf(words[i], "dial:%u:%u", &port, &times) == 2) {
			while (times--)
				if (!fork()) {
					serve(open_socket(AF_VSOCK, port, 1));
					_exit(0);
				}
		} else if (!fork()) {
			if (sscanf(words[i], "vsock:%u", &port) == 1)
				accept_all(AF_VSOCK, port);
			else if (sscanf(words[i], "tcp:%u", &port) == 1)
				accept_all(AF_INET, port);
			int fd = open(words[i] + strlen("file:"), O_RDWR);
			if (fd < 0)
				fail(words[i]);
			serve(fd);
			_exit(0);
		}
	}
	for (;;)
		pause();
}
