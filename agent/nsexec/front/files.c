/* files.c: read whole files, up to a limit, and write whole output. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "front.h"

/* Read an open file of at most `size` bytes, and close it. */
bool read_whole(int fd, struct slice *out, char *room, size_t size)
{
	struct stat stat;
	size_t used = 0;
	ssize_t got = -1;

	if (fd < 0)
		return false;
	if (fstat(fd, &stat) == 0 && S_ISREG(stat.st_mode))
		while (used < size && (got = read(fd, room + used, size - used)) > 0)
			used += (size_t)got;
	close(fd);
	out->at = room;
	out->size = used;
	return got == 0;
}

/*
 * Read a regular file that is open with O_PATH, and close it.  Nothing else is opened for reading: opening a device can
 * start it.
 */
bool read_found(int found, struct slice *out, char *room, size_t size)
{
	char path[32];
	struct stat stat;
	int fd = -1;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", found);
	if (fstat(found, &stat) == 0 && S_ISREG(stat.st_mode))
		fd = open(path, READ_FLAGS);
	close(found);
	return read_whole(fd, out, room, size);
}

bool read_file(int directory, const char *path, struct slice *out, char *room, size_t size)
{
	return read_whole(openat(directory, path, READ_FLAGS | O_NOFOLLOW), out, room, size);
}

bool is_same_file(int directory, const char *path, const struct identity *identity)
{
	struct stat now;
	const uint64_t second = 1000000000u;

	if (fstatat(directory, path, &now, 0) < 0)
		return false;
	return identity->numbers[0] == now.st_dev && identity->numbers[1] == now.st_ino &&
	       identity->numbers[2] == (uint64_t)now.st_size &&
	       identity->numbers[3] == (uint64_t)now.st_mtim.tv_sec * second + (uint64_t)now.st_mtim.tv_nsec &&
	       identity->numbers[4] == (uint64_t)now.st_ctim.tv_sec * second + (uint64_t)now.st_ctim.tv_nsec;
}

bool write_all(int fd, const char *data, size_t size)
{
	while (size > 0) {
		ssize_t done = write(fd, data, size);

		if (done < 0 && errno == EAGAIN) {
			struct pollfd room = {.fd = fd, .events = POLLOUT};

			poll(&room, 1, -1);
		} else if (done < 0 && errno != EINTR) {
			return false;
		}
		if (done > 0) {
			data += done;
			size -= (size_t)done;
		}
	}
	return true;
}
