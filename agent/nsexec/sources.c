/*
 * sources.c: sources of bind mounts that stage 0 opens, with the rights of the runtime.
 *
 * The root of a user namespace may not reach the source of a bind mount (a directory of mode 0700 above it), nor map
 * its owners: mount_setattr(2) with MOUNT_ATTR_IDMAP wants CAP_SYS_ADMIN over the file system.  So stage 0 clones the
 * mount, detached, and stage 2, which inherits the descriptor, attaches it.  Elsewhere stage 2 opens sources itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "nsexec.h"

struct id_maps {
	int userns;
	const char *uid_map, *gid_map;
};

/* A user namespace with these maps, which outlives the process that creates it by the descriptor alone. */
static int create_userns(const char *uid_map, const char *gid_map, const char *path)
{
	const struct bootstrap boot = {.uid_map = uid_map, .gid_map = gid_map, .setgroups = true};
	int pid = (int)syscall(SYS_clone, (unsigned long)NS_USER | SIGCHLD, NULL, NULL, NULL, NULL), fd;
	char file[64];

	if (pid < 0)
		fail_errno("id-mapped mount", path, "clone");
	if (pid == 0) {
		if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) == 0)
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

/* The user namespace with the maps of a mount; `last` keeps the one that was created last. */
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

/* A detached clone of the source; -1 where that takes privileges which need not be there. */
int open_source(const struct mount_step *step, bool must)
{
	bool recursive = (step->flags & MOUNT_RECURSIVE) != 0;
	int tree = sys_open_tree(AT_FDCWD, step->source,
				 OPEN_TREE_CLONE | O_CLOEXEC | (recursive ? AT_RECURSIVE_FLAG : 0));

	if (tree < 0 && (must || errno != EPERM))
		fail_errno("mount source", step->source, NULL);
	return tree;
}

/* A source below the root itself may be what an earlier mount puts there: stage 2 opens it when its turn comes. */
static bool is_below(const char *path, const char *rootfs)
{
	size_t length = rootfs == NULL ? 0 : strlen(rootfs);

	return length > 1 && strncmp(path, rootfs, length) == 0 && path[length] == '/';
}

/* Open the source of a mount in stage 2; `userns` has the maps of an id-mapped one, else it is -1. */
int open_late_source(const struct mount_step *step, int userns)
{
	int tree = open_source(step, true);

	if (userns >= 0) {
		map_ids(tree, step, userns);
		close(userns);
	}
	return tree;
}

void open_sources(struct context *ctx, int joined_userns)
{
	/* In the runtime's mount namespace the source may have peers, which must not get the container's mounts. */
	static const struct mount_attr_args slave = {.propagation = MS_SLAVE};
	const char *rootfs = NULL;
	struct cursor steps = ctx->plan.steps;
	struct id_maps last = {.userns = -1};
	struct mount_step step;
	struct attribute a;
	size_t index, next = 0;

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
			if ((step.flags & MOUNT_IDMAP) != 0)
				mapping = mapping_userns(&step, joined_userns, &last);
			if (is_below(step.source, rootfs) && !(ctx->has_userns && mapping >= 0)) {
				ctx->mappings[index] = mapping < 0 ? -1 : fcntl(mapping, F_DUPFD_CLOEXEC, 0);
				continue;
			}
			tree = open_source(&step, !ctx->has_userns || (step.flags & MOUNT_IDMAP) != 0);
			if (tree < 0) /* a runtime without privileges: its user namespace may */
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
}
