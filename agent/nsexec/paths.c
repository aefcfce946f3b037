/*
 * paths.c: resolve container paths to descriptors; the kernel keeps them inside the root (openat2(2), RESOLVE_IN_ROOT).
 * Magic links are never followed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>

#include "nsexec.h"

#define RACES 64     /* openat2 fails with EAGAIN while a concurrent rename makes ".." unsafe to resolve */
#define LINK (-2)    /* instead of a descriptor: a dangling link was replaced in the path */
#define LINKS_MAX 40 /* followed in one path, as in the kernel (path_resolution(7)) */

/* Open `path` as the container would see it.  Return -1 and set errno on error. */
int open_in(int root, const char *path, int flags, uint64_t resolve)
{
	for (int attempt = 0;; attempt++) {
		int fd = sys_openat2(root, path, (uint64_t)flags | O_CLOEXEC, 0,
				     RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve);
		if (fd >= 0 || errno != EAGAIN || attempt == RACES)
			return fd;
	}
}

/* Copy the next component of *path to `name`.  False at the end, and, with errno set, if a component is too long. */
static bool next_component(const char **path, char name[NAME_MAX + 1])
{
	size_t length;

	*path += strspn(*path, "/");
	length = strcspn(*path, "/");
	errno = length > NAME_MAX ? ENAMETOOLONG : 0;
	if (length == 0 || length > NAME_MAX)
		return false;
	memcpy(name, *path, length);
	name[length] = '\0';
	*path += length;
	return true;
}

/*
 * Replace, in `path`, the dangling link `name` in `dir` with its target: /parent/name/rest becomes /parent/target/rest.
 * `parent` and `rest` are parts of `path`.  False with errno set on error.
 */
static bool follow_link(int dir, const char *name, char path[PATH_MAX], size_t parent, const char *rest)
{
	char target[PATH_MAX], result[PATH_MAX];
	ssize_t length = readlinkat(dir, name, target, sizeof(target) - 1);
	int size;

	if (length < 0)
		return false;
	target[length] = '\0';
	size = snprintf(result, sizeof(result), "%.*s/%s%s", target[0] == '/' ? 0 : (int)parent, path, target, rest);
	if (size < 0 || (size_t)size >= sizeof(result)) {
		errno = ENAMETOOLONG;
		return false;
	}
	memcpy(path, result, (size_t)size + 1);
	return true;
}

/*
 * Walk down `path` once, creating missing directories.  Return the directory, -1 with errno set, or LINK if a dangling
 * link was replaced in `path`.
 */
static int walk_and_make(int root, char path[PATH_MAX], unsigned mode)
{
	char prefix[PATH_MAX], name[NAME_MAX + 1];
	const char *rest = path;
	bool made = false;
	int dir = open_in(root, "/", O_PATH | O_DIRECTORY, 0), next;
	size_t parent = 0;

	while (dir >= 0 && next_component(&rest, name)) {
		size_t length = (size_t)(rest - path);

		next = -1;
		errno = made && strcmp(name, "..") == 0 ? EINVAL
							: ENOENT; /* ".." makes no sense in a directory just created */
		if (!made) {
			memcpy(prefix, path, length);
			prefix[length] = '\0';
			next = open_in(root, prefix, O_PATH | O_DIRECTORY, 0);
		}
		if (next < 0 && errno == ENOENT) {
			if (mkdirat(dir, name, mode) == 0 || errno == EEXIST)
				next = openat(dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
			if (next < 0 && (errno == ENOTDIR || errno == ELOOP) && !made)
				next = follow_link(dir, name, path, parent, rest) ? LINK : -1;
			made = true;
		}
		close(dir);
		dir = next;
		parent = length;
	}
	if (dir >= 0 && errno == ENAMETOOLONG) {
		close(dir);
		return -1;
	}
	return dir;
}

/* Split a path into its parent, as an absolute path, and its last component.  False with errno set on error. */
bool split_path(const char *path, char parent[PATH_MAX], char name[NAME_MAX + 1])
{
	const char *slash = strrchr(path, '/');
	size_t length = slash == NULL ? 0 : (size_t)(slash - path);
	const char *last = slash == NULL ? path : slash + 1;

	if (length + 2 > PATH_MAX || strlen(last) > NAME_MAX) {
		errno = ENAMETOOLONG;
		return false;
	}
	if (last[0] == '\0' || strcmp(last, ".") == 0 || strcmp(last, "..") == 0) {
		errno = EINVAL;
		return false;
	}
	strcpy(name, last);
	parent[0] = '/';
	memcpy(parent + 1, path, length);
	parent[length + 1] = '\0';
	return true;
}

/* Create the directory `path` if, as usual, nothing but its last component is missing; otherwise return -1. */
static int make_last_directory(int root, const char *path, unsigned mode)
{
	char parent[PATH_MAX], name[NAME_MAX + 1];
	int dir = split_path(path, parent, name) ? open_in(root, parent, O_PATH | O_DIRECTORY, 0) : -1, made = -1;

	if (dir < 0)
		return -1;
	if (mkdirat(dir, name, mode) == 0)
		made = openat(dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	close(dir);
	return made;
}

/* Open the directory `path` inside the root, creating it with missing parents; for a dangling link, its target. */
int make_directory_in(int root, const char *path, unsigned mode)
{
	char current[PATH_MAX];
	int dir = open_in(root, path, O_PATH | O_DIRECTORY, 0);

	if (dir >= 0 || errno != ENOENT)
		return dir;
	dir = make_last_directory(root, path, mode);
	if (dir >= 0)
		return dir;
	if (strlen(path) >= sizeof(current)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(current, path);
	for (int links = 0; links < LINKS_MAX; links++) {
		dir = walk_and_make(root, current, mode);
		if (dir != LINK)
			return dir;
	}
	errno = ELOOP;
	return -1;
}

static int make_file_in(int root, char path[PATH_MAX])
{
	char parent[PATH_MAX], name[NAME_MAX + 1];
	int dir = split_path(path, parent, name) ? make_directory_in(root, parent, 0755) : -1, fd;

	if (dir < 0)
		return -1;
	fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
	if (fd >= 0) {
		close(fd);
		fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	} else if (errno == EEXIST && follow_link(dir, name, path, strlen(path) - strlen(name), "")) {
		fd = LINK;
	}
	close(dir);
	return fd;
}

/* Open a directory or file to mount on, O_PATH; create it if missing. */
int make_target_in(int root, const char *path, bool directory)
{
	char current[PATH_MAX];
	int fd;

	if (directory)
		return make_directory_in(root, path, 0755);
	if (strlen(path) >= sizeof(current)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(current, path);
	for (int links = 0; links < LINKS_MAX; links++) {
		fd = open_in(root, current, O_PATH, 0);
		if (fd < 0 && errno == ENOENT)
			fd = make_file_in(root, current);
		if (fd != LINK)
			return fd;
	}
	errno = ELOOP;
	return -1;
}

bool is_null_device(int fd)
{
	struct stat st;

	return fstat(fd, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3);
}

/* Open the container's /dev/null, O_PATH; fail if it is anything but that device (CVE-2025-31133). */
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
