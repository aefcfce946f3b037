/*
 * hog.c: allocate as many kernel objects as one container can get: files, inotify instances and watches, and epoll
 * watches, which are counted per user.  Prints the numbers, and keeps running.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/resource.h>
#include <unistd.h>

#define EVENTS 400

int main(void)
{
	struct rlimit limit;
	static int events[EVENTS];
	long watches = 0, instances = 0, files = 0;
	int fd;

	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	while ((fd = inotify_init1(IN_CLOEXEC)) >= 0 && instances < 10000) {
		inotify_add_watch(fd, "/", IN_ALL_EVENTS);
		instances++;
	}
	for (int i = 0; i < EVENTS; i++)
		events[i] = eventfd(0, EFD_CLOEXEC);
	for (int round = 0; round < 600; round++) {
		struct epoll_event event = {.events = EPOLLIN};
		int failed = 0;

		fd = epoll_create1(EPOLL_CLOEXEC);
		for (int i = 0; fd >= 0 && i < EVENTS && !failed; i++, watches += !failed)
			failed = epoll_ctl(fd, EPOLL_CTL_ADD, events[i], &event) < 0;
		if (fd < 0 || failed)
			break;
	}
	while (files < 20000 && open("/dev/null", O_RDONLY | O_CLOEXEC) >= 0)
		files++;
	printf("%ld inotify instances, %ld epoll watches, %ld files\n", instances, watches, files);
	fflush(stdout);
	pause();
	return 0;
}
