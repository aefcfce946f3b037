/*
 * paths.c: paths of a container, resolved inside its root by the kernel (openat2(2), RESOLVE_IN_ROOT), as descriptors.
 * No magic link is followed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>

#include "nsexec.h"

#define RACES 64 /* openat2 fails with EAGAIN while a concurrent rename makes ".." unsafe to resolve */

/* Open `path` as the container would see it.  -1 and errno on error. */
int open_in(int root, const char *path, int flags, uint64_t resolve)
{
	for (int attempt = 0;; attempt++) {
		int fd = sys_openat2(root, path, (uint64_t)flags | O_CLOEXEC, 0,
				     RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve);
		if (fd >= 0 || errno != EAGAIN || attempt == RACES)
			return fd;
	}
}

/* The next component of *path into `name`; false at the end.  A component ".." ends the walk with EINVAL. */
static bool next_component(const char **path, char name[NAME_MAX + 1], bool *bad)
{
	size_t length;

	*path += strspn(*path, "/");
	length = strcspn(*path, "/");
	if (length == 0)
		return false;
	*bad = length > NAME_MAX || (length == 2 && memcmp(*path, "..", 2) == 0);
	errno = length > NAME_MAX ? ENAMETOOLONG : EINVAL;
	if (!*bad) {
		memcpy(name, *path, length);
		name[length] = '\0';
	}
	*path += length;
	return !*bad;
}

/* The directory `path`, made with its parents where missing.  Existing parts may be links inside the root; new ones cannot. */
int make_directory_in(int root, const char *path, unsigned mode)
{
	char prefix[PATH_MAX], name[NAME_MAX + 1];
	const char *rest = path;
	bool bad = false, made = false;
	int dir, next;

	dir = open_in(root, path, O_PATH | O_DIRECTORY, 0);
	if (dir >= 0 || errno != ENOENT)
		return dir;
	if (strlen(path) >= sizeof(prefix)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	dir = open_in(root, "/", O_PATH | O_DIRECTORY, 0);
	while (dir >= 0 && next_component(&rest, name, &bad)) {
		if (!made) {
			memcpy(prefix, path, (size_t)(rest - path));
			prefix[rest - path] = '\0';
			next = open_in(root, prefix, O_PATH | O_DIRECTORY, 0);
		} else {
			next = -1;
			errno = ENOENT;
		}
		if (next < 0 && errno == ENOENT) {
			made = true;
			if (mkdirat(dir, name, mode) == 0 || errno == EEXIST)
				next = openat(dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		}
		close(dir);
		dir = next;
	}
	if (bad && dir >= 0) {
		close(dir);
		errno = EINVAL;
		return -1;
	}
	return dir;
}

/* Open (or make) the directory that holds `path` and copy out the last component. */
int open_parent_in(int root, const char *path, char name[NAME_MAX + 1])
{
	char parent[PATH_MAX];
	const char *slash = strrchr(path, '/');
	size_t length = slash == NULL ? 0 : (size_t)(slash - path);
	const char *last = slash == NULL ? path : slash + 1;

	if (length + 2 > sizeof(parent) || strlen(last) > NAME_MAX) {
		errno = ENAMETOOLONG;
		return -1;
	}
	if (last[0] == '\0' || strcmp(last, ".") == 0 || strcmp(last, "..") == 0) {
		errno = EINVAL;
		return -1;
	}
	strcpy(name, last);
	parent[0] = '/';
	memcpy(parent + 1, path, length);
	parent[length + 1] = '\0';
	return make_directory_in(root, parent, 0755);
}

/* Something of the right kind to mount on, O_PATH; made where missing. */
int make_target_in(int root, const char *path, bool directory)
{
	char name[NAME_MAX + 1];
	int fd, dir;

	if (directory)
		return make_directory_in(root, path, 0755);
	fd = open_in(root, path, O_PATH, 0);
	if (fd >= 0 || errno != ENOENT)
		return fd;
	dir = open_parent_in(root, path, name);
	if (dir < 0)
		return -1;
	fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
	if (fd >= 0) {
		close(fd);
		fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	}
	close(dir);
	return fd;
}

bool is_null_device(int fd)
{
	struct stat st;

	return fstat(fd, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3);
}

/* The container's /dev/null, O_PATH, only if it is that device and nothing else (CVE-2025-31133). */
int open_verified_null(int root)
{
	int fd = open_in(root, "/dev/null", O_PATH | O_NOFOLLOW, RESOLVE_NO_SYMLINKS);

	if (fd < 0)
		return -1;
	if (!is_null_device(fd)) {
		close(fd);
		errno = ENODEV;
		return -1;
	}
	return fd;
}
