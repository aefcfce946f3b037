/*
 * delete.c: `delete` a container that has ended by itself, as Container.delete does.
 *
 * Anything beyond an empty cgroup and the files of a state directory is left to Python, which continues from there:
 * removing what is already gone is not a failure.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "front.h"

/* state.json is last: until then other commands can find the container. */
static const char *const FILES[] = {"config.json", "seccomp", "exec.plan", "exec.fifo", "front.state", "state.json"};

static bool holds_nothing_else(const struct container *container)
{
	int fd = openat(container->directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *directory = fd < 0 ? NULL : fdopendir(fd);
	const struct dirent *entry;
	bool found = directory != NULL;

	while (found && (entry = readdir(directory)) != NULL) {
		size_t number = 0;

		while (number < ARRAY_SIZE(FILES) && strcmp(entry->d_name, FILES[number]) != 0)
			number++;
		found = number < ARRAY_SIZE(FILES) || strcmp(entry->d_name, ".") == 0 ||
			strcmp(entry->d_name, "..") == 0;
	}
	return found;
}

int delete_container(const struct container *container, const struct request *request)
{
	(void)request; /* --force changes nothing for an ended container */
	if ((container->flags & (FLAG_POSTSTOP_HOOKS | FLAG_OWN_PIDS)) != FLAG_OWN_PIDS || !lock_container(container) ||
	    status_of(container) != STATUS_STOPPED || !holds_nothing_else(container))
		return HAND_OVER;
	FAULT(delete_cgroup);
	for (size_t i = 0; i < container->cgroup_count; i++)
		if (rmdir(container->cgroups[i].path) < 0 && errno != ENOENT)
			return HAND_OVER; /* it has child cgroups, or the kernel is still tearing down processes */
	FAULT(delete_directory);
	for (size_t i = 0; i < ARRAY_SIZE(FILES); i++)
		if (unlinkat(container->directory, FILES[i], 0) < 0 && errno != ENOENT)
			return HAND_OVER;
	return rmdir(container->path) < 0 ? HAND_OVER : 0;
}
