/*
 * console.c: set up the terminal of a process, and /dev/null as its stdio.  Both come from the container's /dev, which
 * is the image's or a bind mount: each node is verified to be the expected device before it is opened (CVE-2025-31133,
 * CVE-2025-52565).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>

#include "nsexec.h"

#ifndef TIOCGPTPEER
#define TIOCGPTPEER 0x5441
#endif
#define CONSOLE_PATH "/dev/console"

static int open_ptmx(int root)
{
	struct statfs fs;
	struct stat st;
	int dir = open_in(root, "/dev/pts", O_PATH | O_DIRECTORY, RESOLVE_NO_SYMLINKS), master;

	if (dir < 0)
		fail_errno("console", "/dev/pts", NULL);
	if (fstatfs(dir, &fs) < 0 || fs.f_type != MAGIC_DEVPTS)
		fail(ENODEV, "console", "/dev/pts", "is not a devpts filesystem");
	/* Only the kernel creates nodes in devpts; RESOLVE_NO_XDEV rules out a mount on top of one. */
	master = sys_openat2(dir, "ptmx", O_RDWR | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC, 0,
			     RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS);
	if (master < 0)
		fail_errno("console", "/dev/pts/ptmx", NULL);
	if (fstat(master, &st) < 0 || !S_ISCHR(st.st_mode) || st.st_rdev != makedev(5, 2))
		fail(ENODEV, "console", "/dev/pts/ptmx", "is not the pseudo-terminal multiplexer");
	close(dir);
	return master;
}

static void send_master(int socket, int master)
{
	if (send_descriptor(socket, "ptmx", 4, master) < 0)
		fail_errno("console", "socket", NULL);
}

static void bind_console(int root, int peer)
{
	struct stat st;
	int dir = open_in(root, "/dev", O_PATH | O_DIRECTORY, RESOLVE_NO_SYMLINKS), target, tree;

	if (dir < 0)
		fail_errno("console", "/dev", NULL);
	target = openat(dir, "console", O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
	if (target >= 0)
		close(target);
	target = openat(dir, "console", O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (target < 0 || fstat(target, &st) < 0)
		fail_errno("console", CONSOLE_PATH, NULL);
	if (!S_ISREG(st.st_mode) && !S_ISCHR(st.st_mode))
		fail(EEXIST, "console", CONSOLE_PATH, "is neither a file nor a device");
	tree = clone_mount(peer, "console", CONSOLE_PATH, false);
	if (sys_move_mount(tree, target) < 0)
		fail_errno("console", CONSOLE_PATH, NULL);
	close(tree);
	close(target);
	close(dir);
}

void open_console(int root, const struct console_step *console, int socket)
{
	struct winsize size = {.ws_row = console->rows, .ws_col = console->columns};
	int master, peer, unlock = 0;

	if (socket < 0)
		fail(EBADF, "console", "socket", "a terminal needs a console socket");
	master = open_ptmx(root);
	if (ioctl(master, TIOCSPTLCK, &unlock) < 0)
		fail_errno("console", "/dev/pts/ptmx", NULL);
	/* Open the peer without looking up its name. */
	peer = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (peer < 0)
		fail_errno("console", "terminal", NULL);
	if ((console->rows != 0 || console->columns != 0) && ioctl(peer, TIOCSWINSZ, &size) < 0)
		fail_errno("console", "terminal", NULL);
	if (console->bind != 0)
		bind_console(root, peer);
	send_master(socket, master);
	close(master);
	for (int fd = 0; fd <= 2; fd++)
		if (dup3(peer, fd, 0) < 0)
			fail_errno("console", "terminal", NULL);
	close(peer);
}

/* Make stdin the controlling terminal of this process's session, of which it is the leader. */
void set_controlling_terminal(void)
{
	if (ioctl(0, TIOCSCTTY, 0) < 0)
		fail_errno("console", "terminal", NULL);
}

/* Replace the host's /dev/null with the container's: whoever has the inode open can change its owner and mode. */
void replace_null_stdio(int root)
{
	int null = -1, node;

	for (int fd = 0; fd <= 2; fd++) {
		if (!is_null_device(fd))
			continue;
		if (null < 0) {
			node = open_verified_null(root);
			if (node < 0)
				fail_errno("stdio", "/dev/null", "the container has no null device");
			close(node);
			null = open_in(root, "/dev/null", O_RDWR | O_NOFOLLOW, RESOLVE_NO_SYMLINKS);
		}
		if (null < 0 || !is_null_device(null) || dup3(null, fd, 0) < 0)
			fail_errno("stdio", "/dev/null", NULL);
	}
	if (null >= 0)
		close(null);
}
