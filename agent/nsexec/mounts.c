/*
 * mounts.c: execute single mounts, by descriptor only (fsopen, open_tree, mount_setattr, move_mount).
 *
 * A mount is created detached, gets its attributes, and is then attached to a target resolved inside the container's
 * root: no path is looked up twice, and no mount is visible before it is read-only, nosuid, … as configured.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/wait.h>

#include "nsexec.h"

#define OPTION_MAX 4096
#define PROC_ROOT_INODE 1
#define CLONE_SHARE_FILES 0x400 /* CLONE_FILES, clone(2) */

/* Fail with the file system's own error message, if there is one (fsconfig(2)). */
NORETURN static void fail_filesystem(int fs, const char *path)
{
	int error = errno;
	char message[256];
	ssize_t got = fs < 0 ? -1 : read(fs, message, sizeof(message) - 1);

	if (got > 2) {
		message[got] = '\0';
		message[strcspn(message, "\n")] = '\0';
		fail(error, "mount", path, "%s", message + 2); /* after "e " */
	}
	fail(error, "mount", path, NULL);
}

void set_attributes(int fd, uint64_t set, uint64_t clear, bool recursive, const char *step, const char *path)
{
	struct mount_attr_args attr = {.attr_set = set, .attr_clr = clear};

	if ((set | clear) == 0)
		return;
	if (sys_mount_setattr(fd, AT_EMPTY_PATH | (recursive ? AT_RECURSIVE_FLAG : 0), &attr) < 0)
		fail_errno(step, path, NULL);
}

static void set_propagation(int fd, uint32_t propagation, const char *path)
{
	struct mount_attr_args attr = {.propagation = propagation & ~(uint32_t)MS_REC};

	if (propagation == 0)
		return;
	if (sys_mount_setattr(fd, AT_EMPTY_PATH | ((propagation & MS_REC) != 0 ? AT_RECURSIVE_FLAG : 0), &attr) < 0)
		fail_errno("propagation", path, NULL);
}

/* Return a detached clone of the mount at `fd`. */
int clone_mount(int fd, const char *step, const char *path, bool recursive)
{
	int tree = sys_open_tree(fd, "",
				 OPEN_TREE_CLONE | O_CLOEXEC | AT_EMPTY_PATH | (recursive ? AT_RECURSIVE_FLAG : 0));

	if (tree < 0)
		fail_errno(step, path, NULL);
	return tree;
}

/* Return a detached procfs: nobody can mount over it or place links in it (CVE-2025-52881). */
int private_procfs(bool processes_only)
{
	int fs = sys_fsopen("proc"), mount;

	if (fs < 0)
		fail_errno("private procfs", "", NULL);
	if (sys_fsconfig(fs, FSCONFIG_SET_STRING, "source", "proc") < 0)
		fail_filesystem(fs, "private procfs");
	if (processes_only && sys_fsconfig(fs, FSCONFIG_SET_STRING, "subset", "pid") < 0)
		fail_filesystem(fs, "private procfs");
	if (sys_fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL) < 0)
		fail_filesystem(fs, "private procfs");
	mount = sys_fsmount(fs, ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC);
	if (mount < 0)
		fail_filesystem(fs, "private procfs");
	close(fs);
	return mount;
}

/*
 * Make the mount that contains `path` private, or a slave: pivot_root(2) requires it, and mounts must not propagate to
 * its peers.
 */
static void isolate_parent_mount(const char *path, unsigned long propagation)
{
	char at[PATH_MAX];

	if (strlen(path) >= sizeof(at))
		fail(ENAMETOOLONG, "rootfs", path, NULL);
	strcpy(at, path);
	while (mount(NULL, at, NULL, propagation, NULL) < 0) {
		char *slash = strrchr(at, '/');

		/* EINVAL: not a mount point; try the parent directory. */
		if (errno != EINVAL || slash == NULL || strcmp(at, "/") == 0)
			fail_errno("rootfs", path, "the mount that it is on cannot be made private");
		slash[slash == at ? 1 : 0] = '\0';
	}
}

/* `propagation` is for the parent mount; 0 in the runtime's own mount namespace, where only the new mount changes. */
void attach_rootfs(const char *path, int *root, unsigned long propagation)
{
	static const struct mount_attr_args slave = {.propagation = MS_SLAVE};
	int target, tree;

	if (path[0] != '/')
		fail(EINVAL, "rootfs", path, "not an absolute path");
	if (propagation != 0)
		isolate_parent_mount(path, propagation);
	target = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (target < 0)
		fail_errno("rootfs", path, NULL);
	tree = clone_mount(target, "rootfs", path, true);
	if (sys_move_mount(tree, target) < 0 ||
	    (propagation == 0 && sys_mount_setattr(tree, AT_EMPTY_PATH | AT_RECURSIVE_FLAG, &slave) < 0))
		fail_errno("rootfs", path, NULL);
	close(target);
	*root = tree;
}

static bool has_option(struct cursor options, const char *key)
{
	size_t length = strlen(key);

	while (options.at != options.end) {
		const char *option = read_text(&options, "mount");

		if (strncmp(option, key, length) == 0 && (option[length] == '=' || option[length] == '\0'))
			return true;
	}
	return false;
}

static void set_option(int fs, const char *option, const char *path)
{
	char key[OPTION_MAX];
	const char *value = strchr(option, '=');
	int done;

	if (value == NULL) {
		done = sys_fsconfig(fs, FSCONFIG_SET_FLAG, option, NULL);
	} else {
		size_t length = (size_t)(value - option);

		if (length >= sizeof(key))
			fail(ENAMETOOLONG, "mount", path, "an option name that is too long");
		memcpy(key, option, length);
		key[length] = '\0';
		done = sys_fsconfig(fs, FSCONFIG_SET_STRING, key, value + 1);
	}
	if (done < 0)
		fail_filesystem(fs, path);
}

/* Give a tmpfs without a mode option the mode of the directory it covers. */
static void inherit_mode(int fs, int root, const struct mount_step *step)
{
	struct stat st;
	char mode[16];
	int dir;

	if (strcmp(step->type, "tmpfs") != 0 || has_option(step->options, "mode"))
		return;
	dir = open_in(root, step->target, O_PATH | O_DIRECTORY, 0);
	if (dir < 0)
		return; /* to be created with the default mode */
	if (fstat(dir, &st) == 0) {
		snprintf(mode, sizeof(mode), "%o", st.st_mode & 07777u);
		if (sys_fsconfig(fs, FSCONFIG_SET_STRING, "mode", mode) < 0)
			fail_filesystem(fs, step->target);
	}
	close(dir);
}

static int new_filesystem_here(int root, const struct mount_step *step)
{
	struct cursor options = step->options;
	int fs = sys_fsopen(step->type), mount;

	if (fs < 0)
		fail_errno("mount", step->target, errno == ENODEV ? "the kernel has no such file system" : NULL);
	if (step->source[0] != '\0' && sys_fsconfig(fs, FSCONFIG_SET_STRING, "source", step->source) < 0)
		fail_filesystem(fs, step->target);
	inherit_mode(fs, root, step);
	while (options.at != options.end)
		set_option(fs, read_text(&options, "mount"), step->target);
	if (sys_fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL) < 0)
		fail_filesystem(fs, step->target);
	mount = sys_fsmount(fs, step->set);
	if (mount < 0)
		fail_filesystem(fs, step->target);
	close(fs);
	return mount;
}

/*
 * Mount procfs in a child that shares this process's descriptors: procfs shows the pid namespace of its mounter, and
 * this process itself stays outside the one it has joined.  The child holds nothing more than its parent, and is not
 * dumpable.
 */
static int new_filesystem_in_child(int root, const struct mount_step *step)
{
	int answer[2], mount = -1, pid, status;

	if (pipe2(answer, O_CLOEXEC) < 0)
		fail_errno("mount", step->target, "pipe");
	pid = (int)syscall(SYS_clone, (unsigned long)(CLONE_SHARE_FILES | SIGCHLD), NULL, NULL, NULL, NULL);
	if (pid < 0)
		fail_errno("mount", step->target, "clone");
	if (pid == 0) {
		mount = new_filesystem_here(root, step);
		_exit(write(answer[1], &mount, sizeof(mount)) == sizeof(mount) ? 0 : 1);
	}
	while (waitpid(pid, &status, __WALL) < 0)
		if (errno != EINTR)
			fail_errno("mount", step->target, "waitpid");
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) /* it has reported the error */
		_exit(1);
	if (read(answer[0], &mount, sizeof(mount)) != sizeof(mount))
		fail(EIO, "mount", step->target, NULL);
	close(answer[0]);
	close(answer[1]);
	return mount;
}

static int new_filesystem(int root, const struct mount_step *step)
{
	return (step->flags & MOUNT_IN_CHILD) != 0 ? new_filesystem_in_child(root, step)
						   : new_filesystem_here(root, step);
}

/* Open or create the target: never the root itself, nor anything in procfs except files that may be mounted over. */
static int mount_target(int root, const struct mount_step *step, bool directory)
{
	struct stat root_stat, st;
	struct statfs fs;
	int fd;

	if ((step->flags & MOUNT_ORDINARY_DIR) != 0) {
		/* A link would mount procfs elsewhere, and masks would miss it (CVE-2019-19921). */
		fd = open_in(root, step->target, O_PATH | O_DIRECTORY | O_NOFOLLOW, RESOLVE_NO_SYMLINKS);
		if (fd < 0 && (errno == ELOOP || errno == ENOTDIR))
			fail_errno("mount", step->target, "must be mounted on ordinary directory");
		if (fd < 0 && errno == ENOENT)
			fd = make_target_in(root, step->target, true);
	} else {
		fd = make_target_in(root, step->target, directory);
	}
	if (fd < 0)
		fail_errno("mount target", step->target, NULL);
	if (fstat(fd, &st) < 0 || fstat(root, &root_stat) < 0 || fstatfs(fd, &fs) < 0)
		fail_errno("mount target", step->target, NULL);
	if (st.st_dev == root_stat.st_dev && st.st_ino == root_stat.st_ino)
		fail(EINVAL, "mount target", step->target, "is the container's root");
	if (fs.f_type == MAGIC_PROC && !((step->flags & MOUNT_OVER_PROC_FILE) != 0 && S_ISREG(st.st_mode)) &&
	    !((step->flags & MOUNT_ORDINARY_DIR) != 0 && st.st_ino == PROC_ROOT_INODE)) /* procfs over procfs */
		fail(EPERM, "mount target", step->target, "is inside procfs");
	if (S_ISDIR(st.st_mode) != directory)
		fail(ENOTDIR, "mount target", step->target, directory ? NULL : "a file cannot be mounted here");
	return fd;
}

#define LOCKABLE (ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC)

/* Clear attributes that are not given, except those locked by a user namespace (mount_namespaces(7)). */
static void clear_other_attributes(int fd, const struct mount_step *step, bool locked)
{
	struct mount_attr_args attr = {.attr_clr = (ATTR_NOSYMFOLLOW | (locked ? 0 : LOCKABLE)) & ~step->set};

	if (attr.attr_clr == 0 || sys_mount_setattr(fd, AT_EMPTY_PATH, &attr) == 0)
		return;
	if (errno == EPERM && !locked)
		clear_other_attributes(fd, step, true);
	else
		fail_errno("mount", step->target, NULL);
}

/* Fail if attributes to clear would be locked, had the mount been opened in the user namespace. */
static void check_locked_attributes(int tree, const struct mount_step *step)
{
	struct statvfs fs;
	uint64_t held = 0, atime;

	if (fstatvfs(tree, &fs) < 0)
		fail_errno("mount", step->target, NULL);
	held |= (fs.f_flag & ST_RDONLY) != 0 ? ATTR_RDONLY : 0;
	held |= (fs.f_flag & ST_NOSUID) != 0 ? ATTR_NOSUID : 0;
	held |= (fs.f_flag & ST_NODEV) != 0 ? ATTR_NODEV : 0;
	held |= (fs.f_flag & ST_NOEXEC) != 0 ? ATTR_NOEXEC : 0;
	atime = (fs.f_flag & ST_NOATIME) != 0 ? ATTR_NOATIME : (fs.f_flag & ST_RELATIME) != 0 ? 0 : ATTR_STRICTATIME;
	atime |= (fs.f_flag & ST_NODIRATIME) != 0 ? ATTR_NODIRATIME : 0;
	if ((held & step->clear) != 0 ||
	    ((step->clear & ATTR_ATIME) != 0 && atime != (step->set & (ATTR_ATIME | ATTR_NODIRATIME))))
		fail(EPERM, "mount", step->target, NULL);
}

/* Change the existing mount, and its file system's options, if any are given. */
static int remount(int root, const struct mount_step *step)
{
	struct cursor options = step->options;
	int fd = open_in(root, step->target, O_PATH, 0), fs;

	if (fd < 0)
		fail_errno("mount target", step->target, NULL);
	if (options.at != options.end) {
		fs = sys_fspick(fd);
		if (fs < 0)
			fail_errno("mount", step->target, "remount");
		while (options.at != options.end)
			set_option(fs, read_text(&options, "mount"), step->target);
		if (sys_fsconfig(fs, FSCONFIG_CMD_RECONFIGURE, NULL, NULL) < 0)
			fail_filesystem(fs, step->target);
		close(fs);
	}
	clear_other_attributes(fd, step, false);
	set_attributes(fd, step->set, step->clear, false, "mount", step->target);
	return fd;
}

/* Only the root of a procfs may be bind-mounted over procfs. */
static void check_procfs(int tree, const struct mount_step *step)
{
	struct statfs fs;
	struct stat st;

	if (fstatfs(tree, &fs) < 0 || fstat(tree, &st) < 0)
		fail_errno("mount source", step->source, NULL);
	if (fs.f_type != MAGIC_PROC || st.st_ino != PROC_ROOT_INODE)
		fail(EPERM, "mount", step->target, "only a procfs can be mounted there");
}

/*
 * Execute a mount step and return the descriptor of the mount.  `source` is that of a bind mount; `locked` says whether
 * it was opened for a user namespace.
 */
int do_mount(int root, const struct mount_step *step, int source, bool locked)
{
	bool directory = true;
	int tree, target;

	if ((step->flags & MOUNT_BIND) != 0) {
		struct stat st;

		tree = source;
		if (fstat(tree, &st) < 0)
			fail_errno("mount source", step->source, NULL);
		directory = S_ISDIR(st.st_mode);
		if ((step->flags & MOUNT_ORDINARY_DIR) != 0)
			check_procfs(tree, step);
		if (locked)
			check_locked_attributes(tree, step);
		if ((step->flags & MOUNT_REMOUNT) != 0)
			clear_other_attributes(tree, step, locked);
		set_attributes(tree, step->set, step->clear, false, "mount", step->target);
	} else if ((step->flags & MOUNT_REMOUNT) != 0) {
		tree = remount(root, step);
	} else {
		tree = new_filesystem(root, step);
	}
	set_attributes(tree, step->recursive_set, step->recursive_clear, true, "mount", step->target);
	if ((step->flags & (MOUNT_BIND | MOUNT_REMOUNT)) != MOUNT_REMOUNT) {
		target = mount_target(root, step, directory);
		if ((step->flags & MOUNT_COPY_UP) != 0)
			copy_up(target, tree, step->target);
		if (sys_move_mount(tree, target) < 0)
			fail_errno("mount", step->target, NULL);
		close(target);
	}
	set_propagation(tree, step->propagation, step->target);
	return tree;
}
