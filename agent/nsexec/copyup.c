/*
 * copyup.c: a tmpfs begins with what the image has in the directory that it covers (mount option tmpcopyup).
 *
 * By descriptors only, and no symbolic link is followed: what is in the image leads nowhere.  Owners, modes, times and device numbers are
 * kept; a hard link becomes a file of its own, extended attributes stay behind.  The size of the tmpfs is the limit.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>

#include "nsexec.h"

#define DEPTH_MAX 64 /* of directories in each other; each has a buffer and two descriptors */

struct linux_dirent {
	uint64_t inode;
	int64_t offset;
	unsigned short length;
	unsigned char type;
	char name[];
};

static const char *whole; /* the mount's path, for errors */

static void keep(int fd, const struct stat *st)
{
	const struct timespec times[2] = {st->st_atim, st->st_mtim};

	/* chown takes setuid bits away: first the owner, then the mode */
	if (fchown(fd, st->st_uid, st->st_gid) < 0 || fchmod(fd, st->st_mode & 07777u) < 0 || futimens(fd, times) < 0)
		fail("tmpcopyup", whole, errno, NULL);
}

static void copy_file(int from, int to, const char *name, const struct stat *st)
{
	int source = openat(from, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	int target = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	ssize_t copied;

	if (source < 0 || target < 0)
		fail("tmpcopyup", name, errno, NULL);
	do
		copied = sendfile(target, source, NULL, 1u << 20);
	while (copied > 0 || (copied < 0 && errno == EINTR));
	if (copied < 0)
		fail("tmpcopyup", name, errno, errno == ENOSPC ? "the tmpfs is too small for what the image has there" : NULL);
	keep(target, st);
	close(source);
	close(target);
}

static void copy_link(int from, int to, const char *name, const struct stat *st)
{
	static char link[PATH_MAX];
	ssize_t length = readlinkat(from, name, link, sizeof(link) - 1);

	if (length < 0)
		fail("tmpcopyup", name, errno, NULL);
	link[length] = '\0';
	if (symlinkat(link, to, name) < 0 || fchownat(to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW) < 0)
		fail("tmpcopyup", name, errno, NULL);
}

static void copy_node(int from, int to, const char *name, const struct stat *st)
{
	(void)from;
	if (mknodat(to, name, st->st_mode & (S_IFMT | 0700u), st->st_rdev) < 0 ||
	    fchownat(to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW) < 0 || fchmodat(to, name, st->st_mode & 07777u, 0) < 0)
		fail("tmpcopyup", name, errno, NULL);
}

static void copy_directory(int from, int to, unsigned depth);

static void copy_below(int from, int to, const char *name, const struct stat *st, unsigned depth)
{
	int source, target;

	if (mkdirat(to, name, 0700) < 0)
		fail("tmpcopyup", name, errno, NULL);
	source = openat(from, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	target = openat(to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (source < 0 || target < 0)
		fail("tmpcopyup", name, errno, NULL);
	copy_directory(source, target, depth + 1);
	keep(target, st);
	close(source);
	close(target);
}

static void copy_entry(int from, int to, const char *name, unsigned depth)
{
	struct stat st;

	if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
		return;
	if (fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
		fail("tmpcopyup", name, errno, NULL);
	if (S_ISDIR(st.st_mode))
		copy_below(from, to, name, &st, depth);
	else if (S_ISREG(st.st_mode))
		copy_file(from, to, name, &st);
	else if (S_ISLNK(st.st_mode))
		copy_link(from, to, name, &st);
	else
		copy_node(from, to, name, &st);
}

static void copy_directory(int from, int to, unsigned depth)
{
	_Alignas(struct linux_dirent) char buffer[2048];
	long got;

	if (depth > DEPTH_MAX)
		fail("tmpcopyup", whole, ELOOP, "directories that are too deep in each other");
	while ((got = syscall(SYS_getdents64, from, buffer, sizeof(buffer))) > 0)
		for (long at = 0; at < got;) {
			const struct linux_dirent *entry = (const struct linux_dirent *)(buffer + at);

			copy_entry(from, to, entry->name, depth);
			at += entry->length;
		}
	if (got < 0)
		fail("tmpcopyup", whole, errno, NULL);
}

/* `covered` is the directory in the image, `mount` the new file system that is not mounted yet. */
void copy_up(int covered, int mount, const char *path)
{
	int from = openat(covered, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int to = openat(mount, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct stat st;

	whole = path;
	if (from < 0 || to < 0 || fstat(from, &st) < 0)
		fail("tmpcopyup", path, errno, NULL);
	copy_directory(from, to, 0);
	if (fchown(to, st.st_uid, st.st_gid) < 0)
		fail("tmpcopyup", path, errno, NULL);
	close(from);
	close(to);
}
