/* start.c: `start` through a fifo, as process/gate.py does. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "front.h"

#define GATE "exec.fifo"
#define REPORT_MAX 16384

static bool readable(int fd, int pidfd)
{
	struct pollfd polled[] = {{.fd = fd, .events = POLLIN}, {.fd = pidfd, .events = POLLIN}};
	int ready;

	while ((ready = poll(polled, 2, -1)) < 0 && errno == EINTR)
		;
	return ready > 0;
}

/* Read the init's report until it has executed its program, or ended; -1 if it never opened the fifo. */
static ssize_t read_report(int fd, int pidfd, char *report)
{
	size_t used = 0;
	ssize_t got;

	if (!readable(fd, pidfd))
		return -1;
	while (used < REPORT_MAX) {
		got = read(fd, report + used, REPORT_MAX - used);
		if (got < 0 && errno == EAGAIN) {
			struct pollfd polled = {.fd = fd, .events = POLLIN};

			if (used == 0)
				return -1;
			(void)!poll(&polled, 1, -1);
			continue;
		}
		if (got == 0)
			break;
		if (got < 0)
			return -1;
		used += (size_t)got;
	}
	return (ssize_t)used;
}

/* Hand the init's report to Python, in the environment, which turns it into an error message (gate.failure_of). */
static int report_failure(char *report, size_t size)
{
	report[size] = '\0';
	setenv("_CAISSON_START_FAILED", report, 1);
	return HAND_OVER;
}

int start_container(const struct container *container, const struct request *request)
{
	static char report[REPORT_MAX + 1];
	struct stat stat;
	ssize_t got;
	int pidfd, fd;

	(void)request;
	if ((container->flags & FLAG_START_HOOKS) != 0 || !lock_container(container) ||
	    status_of(container) != STATUS_CREATED)
		return HAND_OVER;
	pidfd = pidfd_of(container);
	fd = openat(container->directory, GATE, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
	if (pidfd < 0 || fd < 0 || fstat(fd, &stat) < 0 || !S_ISFIFO(stat.st_mode))
		return HAND_OVER;
	FAULT(start_opened);
	got = read_report(fd, pidfd, report);
	FAULT(start_read);
	if (got <= 0)
		return report_failure(report, 0);
	unlinkat(container->directory, GATE, 0);
	FAULT(start_removed);
	if (got == 1 && has_executed(container))
		return 0;
	return report_failure(report, (size_t)got);
}
