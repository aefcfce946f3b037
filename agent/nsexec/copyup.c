/*
 * copyup.c: fill a tmpfs with the contents of the directory it will cover (mount option tmpcopyup).
 *
 * Files are opened relative to descriptors only, without following symbolic links.  Owners, modes, times and device
 * numbers are preserved; hard links become separate files, extended attributes are not copied.  The limit is the size
 * of the tmpfs.
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

#define DEPTH_MAX 64 /* nested directories; each needs a buffer and two descriptors */

struct linux_dirent {
	uint64_t inode;
	int64_t offset;
	unsigned short length;
	unsigned char type;
	char name[];
};

static void copy_metadata(int fd, const char *name, const struct stat *st)
{
	const struct timespec times[2] = {st->st_atim, st->st_mtim};

	/* Owner first, then mode: chown clears setuid bits. */
	if (fchown(fd, st->st_uid, st->st_gid) < 0 || fchmod(fd, st->st_mode & 07777u) < 0 || futimens(fd, times) < 0)
		fail_errno("tmpcopyup", name, NULL);
}

static void copy_file(int from, int to, const char *name, const struct stat *st)
{
	int source = openat(from, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	int target = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	ssize_t copied;

	if (source < 0 || target < 0)
		fail_errno("tmpcopyup", name, NULL);
	do
		copied = sendfile(target, source, NULL, 1u << 20);
	while (copied > 0 || (copied < 0 && errno == EINTR));
	if (copied < 0)
		fail_errno("tmpcopyup", name,
			   errno == ENOSPC ? "the tmpfs is too small for what the image has there" : NULL);
	copy_metadata(target, name, st);
	close(source);
	close(target);
}

static void copy_link(int from, int to, const char *name, const struct stat *st)
{
	static char link[PATH_MAX];
	ssize_t length = readlinkat(from, name, link, sizeof(link) - 1);

	if (length < 0)
		fail_errno("tmpcopyup", name, NULL);
	link[length] = '\0';
	if (symlinkat(link, to, name) < 0 || fchownat(to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW) < 0)
		fail_errno("tmpcopyup", name, NULL);
}

static void copy_node(int to, const char *name, const struct stat *st)
{
	if (mknodat(to, name, st->st_mode & (S_IFMT | 0700u), st->st_rdev) < 0 ||
	    fchownat(to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW) < 0 ||
	    fchmodat(to, name, st->st_mode & 07777u, 0) < 0)
		fail_errno("tmpcopyup", name, NULL);
}

static void copy_directory(int from, int to, const char *name, unsigned depth);

static void copy_below(int from, int to, const char *name, const struct stat *st, unsigned depth)
{
	int source, target;

	if (mkdirat(to, name, 0700) < 0)
		fail_errno("tmpcopyup", name, NULL);
	source = openat(from, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	target = openat(to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (source < 0 || target < 0)
		fail_errno("tmpcopyup", name, NULL);
	copy_directory(source, target, name, depth + 1);
	copy_metadata(target, name, st);
	close(source);
	close(target);
}

static void copy_entry(int from, int to, const char *name, unsigned depth)
{
	struct stat st;

	if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
		return;
	if (fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
		fail_errno("tmpcopyup", name, NULL);
	if (S_ISDIR(st.st_mode))
		copy_below(from, to, name, &st, depth);
	else if (S_ISREG(st.st_mode))
		copy_file(from, to, name, &st);
	else if (S_ISLNK(st.st_mode))
		copy_link(from, to, name, &st);
	else
		copy_node(to, name, &st);
}

static void copy_directory(int from, int to, const char *name, unsigned depth)
{
	_Alignas(struct linux_dirent) char buffer[2048];
	long got;

	if (depth > DEPTH_MAX)
		fail(ELOOP, "tmpcopyup", name, "more than %d nested directories", DEPTH_MAX);
	while ((got = syscall(SYS_getdents64, from, buffer, sizeof(buffer))) > 0)
		for (long at = 0; at < got;) {
			const struct linux_dirent *entry = (const struct linux_dirent *)(buffer + at);

			copy_entry(from, to, entry->name, depth);
			at += entry->length;
		}
	if (got < 0)
		fail_errno("tmpcopyup", name, NULL);
}

/* Copy `covered`, the directory in the image, into `mount`, the new file system, which is not attached yet. */
void copy_up(int covered, int mount, const char *path)
{
	int from = openat(covered, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int to = openat(mount, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct stat st;

	if (from < 0 || to < 0 || fstat(from, &st) < 0)
		fail_errno("tmpcopyup", path, NULL);
	copy_directory(from, to, path, 0);
	if (fchown(to, st.st_uid, st.st_gid) < 0)
		fail_errno("tmpcopyup", path, NULL);
	close(from);
	close(to);
}
