/*
 * sources.c: open sources of bind mounts in stage 0, with the runtime's privileges.
 *
 * Root in a user namespace may be unable to reach the source of a bind mount (below a directory of mode 0700, say) or
 * to id-map it: mount_setattr(2) with MOUNT_ATTR_IDMAP requires CAP_SYS_ADMIN over the file system.  So stage 0 clones
 * the mount, detached, and stage 2, which inherits the descriptor, attaches it.  Otherwise stage 2 opens sources
 * itself; those it cannot map, it requests from a process that stage 0 leaves behind (serve_sources).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "nsexec.h"

struct id_maps {
	int userns;
	const char *uid_map, *gid_map;
};

/* Create a user namespace with these maps; the descriptor keeps it alive after the process that creates it. */
static int create_userns(const char *uid_map, const char *gid_map, const char *path)
{
	const struct bootstrap boot = {.uid_map = uid_map, .gid_map = gid_map, .setgroups = true};
	int parent = getpid(), pid, fd;
	char file[64];

	pid = (int)syscall(SYS_clone, (unsigned long)NS_USER | SIGCHLD, NULL, NULL, NULL, NULL);
	if (pid < 0)
		fail_errno("id-mapped mount", path, "clone");
	if (pid == 0) {
		/* getppid: the parent may have died before prctl took effect. */
		if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) == 0 && getppid() == parent)
			pause();
		_exit(1);
	}
	write_id_maps(&boot, pid);
	snprintf(file, sizeof(file), "/proc/%d/ns/user", pid);
	fd = open(file, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		fail_errno("id-mapped mount", path, NULL);
	kill(pid, SIGKILL);
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	return fd;
}

/* Return a user namespace with the maps of a mount; `last` caches the one created last. */
static int mapping_userns(const struct mount_step *step, int joined_userns, struct id_maps *last)
{
	if (step->uid_map[0] == '\0') {
		if (joined_userns < 0)
			fail(EINVAL, "id-mapped mount", step->target, "no mappings");
		return joined_userns;
	}
	if (last->userns < 0 || strcmp(step->uid_map, last->uid_map) != 0 ||
	    strcmp(step->gid_map, last->gid_map) != 0) {
		if (last->userns >= 0)
			close(last->userns);
		last->userns = create_userns(step->uid_map, step->gid_map, step->target);
		last->uid_map = step->uid_map;
		last->gid_map = step->gid_map;
	}
	return last->userns;
}

static void map_ids(int tree, const struct mount_step *step, int userns)
{
	bool recursive = (step->flags & MOUNT_IDMAP_RECURSIVE) != 0;
	struct mount_attr_args attr = {.attr_set = ATTR_IDMAP, .userns_fd = (uint64_t)userns};

	if (sys_mount_setattr(tree, AT_EMPTY_PATH | (recursive ? AT_RECURSIVE_FLAG : 0), &attr) < 0)
		fail_errno("id-mapped mount", step->target,
			   errno == EINVAL ? "its file system does not support it" : NULL);
}

/* Return a detached clone of the source; -1 if that is not permitted and not a must. */
int open_source(const struct mount_step *step, bool must)
{
	bool recursive = (step->flags & MOUNT_RECURSIVE) != 0;
	int tree = sys_open_tree(AT_FDCWD, step->source,
				 OPEN_TREE_CLONE | O_CLOEXEC | (recursive ? AT_RECURSIVE_FLAG : 0));

	if (tree < 0 && (must || errno != EPERM))
		fail_errno("mount source", step->source, NULL);
	return tree;
}

/* A source below the root may be provided by an earlier mount: stage 2 opens it when its turn comes. */
static bool is_below(const char *path, const char *rootfs)
{
	size_t length = rootfs == NULL ? 0 : strlen(rootfs);

	return length > 1 && strncmp(path, rootfs, length) == 0 && path[length] == '/';
}

static int open_mapped_source(const struct mount_step *step, int userns)
{
	int tree = open_source(step, true);

	map_ids(tree, step, userns);
	return tree;
}

/* Open the source of a mount in stage 2. */
int open_late_source(struct context *ctx, const struct mount_step *step, size_t index)
{
	int userns = index < SOURCES_MAX ? ctx->mappings[index] : -1, mounts, tree;

	if (userns < 0)
		return open_source(step, true);
	if (ctx->source_server < 0)
		return open_mapped_source(step, userns);
	mounts = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
	if (mounts < 0 || send_descriptor(ctx->source_server, &index, sizeof(index), mounts) < 0)
		fail_errno("mount source", step->source, "mount namespace");
	close(mounts);
	tree = receive_descriptor(ctx->source_server, &index, sizeof(index));
	if (tree < 0)
		_exit(1); /* the server has reported the error */
	return tree;
}

static void find_mount(const struct plan *plan, size_t index, struct mount_step *out)
{
	struct cursor steps = plan->steps;
	struct attribute a;

	while (next_attribute(&steps, &a))
		if (a.type == PLAN_MOUNT && index-- == 0) {
			decode_mount(&a, out);
			return;
		}
	_exit(1);
}

/* Open and map sources by index, in the mount namespace sent with each request, until the peer closes the socket. */
NORETURN static void serve_sources(const struct context *ctx, int peer)
{
	struct mount_step step;
	size_t index;
	int mounts, tree;

	while ((mounts = receive_descriptor(peer, &index, sizeof(index))) >= 0) {
		find_mount(&ctx->plan, index, &step);
		if (syscall(SYS_setns, mounts, NS_MNT) < 0)
			fail_errno("mount source", step.source, "mount namespace");
		tree = open_mapped_source(&step, ctx->mappings[index]);
		if (send_descriptor(peer, &index, sizeof(index), tree) < 0)
			_exit(1);
		close(tree);
		close(mounts);
	}
	_exit(0);
}

static void start_source_server(struct context *ctx)
{
	int pair[2], pid;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		fail_errno("socketpair", "", NULL);
	pid = (int)syscall(SYS_clone, (unsigned long)SIGCHLD, NULL, NULL, NULL, NULL);
	if (pid < 0)
		fail_errno("id-mapped mount", "", "clone");
	if (pid == 0) {
		close(pair[0]);
		serve_sources(ctx, pair[1]);
	}
	close(pair[1]);
	ctx->source_server = pair[0];
}

/* Duplicate the user namespace for a mount that stage 2 maps: without it the mount would have the wrong owners. */
static int keep_userns(int userns, const char *path)
{
	int fd = fcntl(userns, F_DUPFD_CLOEXEC, 0);

	if (fd < 0)
		fail_errno("id-mapped mount", path, NULL);
	return fd;
}

void open_sources(struct context *ctx, int joined_userns)
{
	/* In the runtime's mount namespace the source may have peers, to which mounts must not propagate. */
	static const struct mount_attr_args slave = {.propagation = MS_SLAVE};
	const char *rootfs = NULL;
	struct cursor steps = ctx->plan.steps;
	struct id_maps last = {.userns = -1};
	struct mount_step step;
	struct attribute a;
	size_t index, next = 0;
	bool asks = false;

	for (size_t i = 0; i < SOURCES_MAX; i++)
		ctx->sources[i] = ctx->mappings[i] = -1;
	while (next_attribute(&steps, &a)) {
		int tree, mapping = -1;

		if (a.type == PLAN_ROOTFS)
			rootfs = attribute_text(&a);
		if (a.type != PLAN_MOUNT)
			continue;
		index = next++;
		decode_mount(&a, &step);
		if ((step.flags & MOUNT_BIND) != 0 && (ctx->has_userns || (step.flags & MOUNT_IDMAP) != 0)) {
			if (index >= SOURCES_MAX)
				fail(E2BIG, "mount", step.target, "more than %d mounts", SOURCES_MAX);
			if (ctx->fds.namespaces != 0) /* /proc is not that of this pid namespace */
				fail(EINVAL, "mount", step.target, "id-mapped, unlike the request");
			if ((step.flags & MOUNT_IDMAP) != 0)
				mapping = mapping_userns(&step, joined_userns, &last);
			if (is_below(step.source, rootfs)) {
				ctx->mappings[index] = mapping < 0 ? -1 : keep_userns(mapping, step.target);
				asks |= ctx->has_userns && mapping >= 0;
				continue;
			}
			tree = open_source(&step, !ctx->has_userns || (step.flags & MOUNT_IDMAP) != 0);
			if (tree < 0) /* an unprivileged runtime: its user namespace may */
				continue;
			if (sys_mount_setattr(tree, AT_EMPTY_PATH | AT_RECURSIVE_FLAG, &slave) < 0)
				fail_errno("mount source", step.source, "propagation");
			if (mapping >= 0)
				map_ids(tree, &step, mapping);
			ctx->sources[index] = tree;
		}
	}
	if (last.userns >= 0)
		close(last.userns);
	if (asks)
		start_source_server(ctx);
}
