/*
 * rootfs.c: execute the plan steps that set up the root file system and the host name: propagation, root, mounts,
 * devices, links, hooks, pivot_root, console, read-only remounts, sysctls, read-only and masked paths.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "nsexec.h"

static void bind_device(int root, const struct device_step *device)
{
	struct stat st;
	int node = open(device->path, O_PATH | O_NOFOLLOW | O_CLOEXEC), tree, target;

	/* Device nodes cannot be created in a user namespace: bind the host's, if it is the right device. */
	if (node < 0 || fstat(node, &st) < 0)
		fail_errno("device", device->path, NULL);
	if ((st.st_mode & S_IFMT) != (device->mode & S_IFMT) || st.st_rdev != makedev(device->major, device->minor))
		fail(ENODEV, "device", device->path, "the host's node is another device");
	tree = clone_mount(node, "device", device->path, false);
	target = make_target_in(root, device->path, false);
	if (target < 0 || sys_move_mount(tree, target) < 0)
		fail_errno("device", device->path, NULL);
	close(target);
	close(tree);
	close(node);
}

/* The directory of the last device or link: it is usually that of the next one, too. */
struct directory {
	int fd;
	char path[PATH_MAX];
	bool gives_group; /* to what is created in it */
};

/* Open (or create) the parent directory of `path`, and copy the last component to `name`. */
static int open_parent(struct directory *last, int root, const char *path, char name[NAME_MAX + 1], const char *step)
{
	char parent[PATH_MAX];
	struct stat st;

	if (!split_path(path, parent, name))
		fail_errno(step, path, NULL);
	if (last->fd >= 0 && strcmp(parent, last->path) == 0)
		return last->fd;
	if (last->fd >= 0)
		close(last->fd);
	last->fd = make_directory_in(root, parent, 0755);
	if (last->fd < 0 || fstat(last->fd, &st) < 0)
		fail_errno(step, path, NULL);
	strcpy(last->path, parent);
	last->gives_group = (st.st_mode & S_ISGID) != 0;
	return last->fd;
}

static void make_device(struct directory *last, int root, const struct device_step *device)
{
	char name[NAME_MAX + 1];
	struct stat st;
	dev_t number = makedev(device->major, device->minor);
	int dir, node, made;

	if (device->bind != 0) {
		bind_device(root, device);
		return;
	}
	dir = open_parent(last, root, device->path, name, "device");
	/* Create it with the exact mode: a later chmod by name could hit another file. */
	umask(0);
	made = mknodat(dir, name, device->mode, number);
	if (made < 0 && errno != EEXIST)
		fail_errno("device", device->path, NULL);
	umask(DEFAULT_UMASK);
	if (made == 0 && !last->gives_group && device->uid == geteuid() && device->gid == getegid())
		return;
	node = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (node < 0 || fstat(node, &st) < 0)
		fail_errno("device", device->path, NULL);
	if ((st.st_mode & S_IFMT) != (device->mode & S_IFMT) || (!S_ISFIFO(st.st_mode) && st.st_rdev != number))
		fail(EEXIST, "device", device->path, "exists and is not this device");
	if (fchownat(node, "", device->uid, device->gid, AT_EMPTY_PATH) < 0)
		fail_errno("device", device->path, NULL);
	close(node);
}

static void make_link(struct directory *last, int root, const struct link_step *link)
{
	char name[NAME_MAX + 1];
	int dir = open_parent(last, root, link->path, name, "link");

	if (link->replace != 0 && unlinkat(dir, name, 0) < 0 && errno != ENOENT)
		fail_errno("link", link->path, NULL);
	if (symlinkat(link->target, dir, name) < 0 && (errno != EEXIST || link->replace != 0))
		fail_errno("link", link->path, NULL);
}

/*
 * Move the new root over a host root that pivot_root(2) cannot replace (an initramfs).  The host's own procfs and sysfs
 * must be unmounted: as long as they exist, unmasked, a user namespace may mount new ones (mount_too_revealing()).
 */
static void move_root(int root)
{
	static const char *const revealing[] = {"/proc", "/sys"};

	for (size_t i = 0; i < ARRAY_SIZE(revealing); i++)
		while (umount2(revealing[i], MNT_DETACH | UMOUNT_NOFOLLOW) == 0)
			;
	if (fchdir(root) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		fail_errno("chroot", "/", NULL);
}

/* Enter the root in the runtime's own mount namespace: the mounts stay there, as with runc. */
static void enter_root(int root)
{
	if (fchdir(root) < 0 || chroot(".") < 0 || chdir("/") < 0)
		fail_errno("chroot", "/", NULL);
}

/* Call pivot_root(2) with new and old root on the same directory, then unmount the old root. */
static void change_root(int root, uint32_t way)
{
	int old;

	if (way == PIVOT_MOVE) {
		move_root(root);
		return;
	}
	if (way == PIVOT_CHROOT) {
		enter_root(root);
		return;
	}
	old = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (old < 0 || fchdir(root) < 0)
		fail_errno("pivot_root", "/", NULL);
	if (syscall(SYS_pivot_root, ".", ".") < 0)
		fail_errno("pivot_root", "/",
			   errno == EINVAL ? "the host's root is an initramfs: do without pivot_root" : NULL);
	if (fchdir(old) < 0 || mount(NULL, ".", NULL, MS_SLAVE | MS_REC, NULL) < 0 || umount2(".", MNT_DETACH) < 0)
		fail_errno("pivot_root", "old root", NULL);
	if (chdir("/") < 0)
		fail_errno("pivot_root", "/", NULL);
	close(old);
}

static void set_sysctl(int procfs, const char *path, const char *value)
{
	char name[PATH_MAX] = "sys/";
	int fd;

	if (strlen(path) + sizeof("sys/") > sizeof(name))
		fail(ENAMETOOLONG, "sysctl", path, NULL);
	strcat(name, path);
	fd = sys_openat2(procfs, name, O_WRONLY | O_CLOEXEC, 0,
			 RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV);
	if (fd < 0)
		fail_errno("sysctl", path, NULL);
	if (write(fd, value, strlen(value)) != (ssize_t)strlen(value))
		fail_errno("sysctl", path, NULL);
	close(fd);
}

/* The container's procfs and sysfs, by descriptor: other users of the image may rename the directories. */
struct kernel_mounts {
	struct {
		int fd;
		char target[64];
	} list[4];
	size_t count;
};

static void record_kernel_mount(struct kernel_mounts *mounts, int fd, const char *target)
{
	if (mounts->count == ARRAY_SIZE(mounts->list) || strlen(target) >= sizeof(mounts->list[0].target)) {
		close(fd); /* found by path, like other mounts */
		return;
	}
	mounts->list[mounts->count].fd = fd;
	strcpy(mounts->list[mounts->count].target, target);
	mounts->count++;
}

/*
 * Open a path to mask or make read-only.  Below a recorded mount it is looked up from there: a path swapped
 * temporarily would leave the real one unmasked (CVE-2019-19921).
 */
static int open_in_kernel_mount(const struct kernel_mounts *mounts, int root, const char *path)
{
	for (size_t i = mounts->count; i-- > 0;) {
		size_t length = strlen(mounts->list[i].target);

		if (strncmp(path, mounts->list[i].target, length) == 0 && (path[length] == '/' || path[length] == '\0'))
			return open_in(mounts->list[i].fd, path[length] == '\0' ? "." : path + length, O_PATH, 0);
	}
	return open_in(root, path, O_PATH, 0);
}

static void make_readonly(const struct kernel_mounts *mounts, int root, const char *path)
{
	int target = open_in_kernel_mount(mounts, root, path), tree;

	if (target < 0 && errno == ENOENT)
		return;
	if (target < 0)
		fail_errno("read-only path", path, NULL);
	tree = clone_mount(target, "read-only path", path, true);
	set_attributes(tree, ATTR_RDONLY, 0, false, "read-only path", path);
	if (sys_move_mount(tree, target) < 0)
		fail_errno("read-only path", path, NULL);
	close(tree);
	close(target);
}

/* Return an empty read-only directory; all masked directories share one tmpfs. */
static int empty_directory(int *cached)
{
	int fs;

	if (*cached >= 0)
		return clone_mount(*cached, "mask", "empty directory", false);
	fs = sys_fsopen("tmpfs");
	if (fs < 0 || sys_fsconfig(fs, FSCONFIG_SET_STRING, "mode", "555") < 0 ||
	    sys_fsconfig(fs, FSCONFIG_SET_STRING, "size", "4k") < 0 ||
	    sys_fsconfig(fs, FSCONFIG_SET_STRING, "nr_inodes", "2") < 0 ||
	    sys_fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL) < 0)
		fail_errno("mask", "empty directory", NULL);
	*cached = sys_fsmount(fs, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC);
	if (*cached < 0)
		fail_errno("mask", "empty directory", NULL);
	close(fs);
	/* The first mask attaches it; later ones attach clones of it. */
	return fcntl(*cached, F_DUPFD_CLOEXEC, 0);
}

static void mask(const struct kernel_mounts *mounts, int root, const char *path, int *null, int *empty)
{
	struct stat st;
	int target = open_in_kernel_mount(mounts, root, path), tree;

	if (target < 0 && (errno == ENOENT || errno == ENOTDIR))
		return;
	if (target < 0 || fstat(target, &st) < 0)
		fail_errno("mask", path, NULL);
	if (S_ISDIR(st.st_mode)) {
		tree = empty_directory(empty);
	} else {
		if (*null < 0)
			*null = open_verified_null(root);
		if (*null < 0)
			fail_errno("mask", path, "the container's /dev/null is not the null device");
		tree = clone_mount(*null, "mask", path, false);
	}
	if (tree < 0 || sys_move_mount(tree, target) < 0)
		fail_errno("mask", path, NULL);
	close(tree);
	close(target);
}

static void make_mount_readonly(int root, const struct attribute *a)
{
	const char *path;
	uint64_t set;
	int fd;

	decode_remount(a, &set, &path);
	fd = open_in(root, path, O_PATH, 0);
	if (fd < 0)
		fail_errno("remount", path, NULL);
	set_attributes(fd, set, 0, false, "remount", path);
	close(fd);
}

static void do_device_or_link(struct directory *last, int root, const struct attribute *a)
{
	struct device_step device;
	struct link_step link;

	if (a->type == PLAN_DEVICE) {
		decode_device(a, &device);
		make_device(last, root, &device);
	} else {
		decode_link(a, &link);
		make_link(last, root, &link);
	}
}

static void set_names(const struct attribute *a)
{
	const char *name = attribute_text(a);

	if ((a->type == PLAN_HOSTNAME ? sethostname : setdomainname)(name, strlen(name)) < 0)
		fail_errno(a->type == PLAN_HOSTNAME ? "hostname" : "domainname", name, NULL);
}

struct rootfs_state {
	struct context *ctx;
	struct kernel_mounts mounts;
	struct directory directory;
	int null, empty;
	size_t mount_index; /* of the next PLAN_MOUNT */
	bool hooks_done;    /* the first createContainer step runs all of them */
};

static void do_step(const struct attribute *a, struct rootfs_state *s)
{
	struct mount_step step;
	struct netlink_step netlink;
	const char *first, *second;
	struct handles *handles = &s->ctx->handles;
	const struct plan *plan = &s->ctx->plan;
	const struct channels *fds = &s->ctx->fds;
	int *root = &handles->root, fd;
	bool opened;

	switch (a->type) {
	case PLAN_PROPAGATION:
		if (mount(NULL, "/", NULL, attribute_u32(a), NULL) < 0)
			fail_errno("propagation", "/", NULL);
		break;
	case PLAN_ROOTFS:
		attach_rootfs(attribute_text(a), root,
			      plan->shares_mounts ? 0
			      : plan->slave_root  ? MS_SLAVE
						  : MS_PRIVATE);
		break;
	case PLAN_MOUNT:
		decode_mount(a, &step);
		fd = s->mount_index < SOURCES_MAX ? s->ctx->sources[s->mount_index] : -1;
		opened = fd >= 0;
		if (!opened && (step.flags & MOUNT_BIND) != 0)
			fd = open_late_source(s->ctx, &step, s->mount_index);
		s->mount_index++;
		fd = do_mount(*root, &step, fd, opened && s->ctx->has_userns);
		if ((step.flags & MOUNT_ORDINARY_DIR) != 0)
			record_kernel_mount(&s->mounts, fd, step.target);
		else
			close(fd);
		break;
	case PLAN_DEVICE:
	case PLAN_SYMLINK:
		do_device_or_link(&s->directory, *root, a);
		break;
	case PLAN_RUNTIME_HOOKS:
		wait_for_runtime_hooks(fds->sync);
		break;
	case PLAN_NETLINK:
		decode_netlink(a, &netlink);
		request_netlink(&netlink);
		break;
	case PLAN_CREATE_HOOK:
		if (!s->hooks_done)
			run_hooks(s->ctx, PLAN_CREATE_HOOK, *root);
		s->hooks_done = true;
		break;
	case PLAN_PIVOT:
		FAULT(root_mounted);
		change_root(*root, attribute_u32(a));
		replace_null_stdio(*root);
		break;
	case PLAN_ROOT_PROPAGATION:
		if (mount(NULL, "/", NULL, attribute_u32(a), NULL) < 0)
			fail_errno("propagation", "/", NULL);
		break;
	case PLAN_CONSOLE:
		open_console(*root, &plan->console, fds->console);
		break;
	case PLAN_REMOUNT:
		make_mount_readonly(*root, a);
		break;
	case PLAN_ROOT_READONLY: {
		/* Create a missing working directory now: a read-only root would prevent it later. */
		int cwd = make_directory_in(*root, plan->cwd, 0755);

		if (cwd < 0)
			fail_errno("cwd", plan->cwd, NULL);
		close(cwd);
		set_attributes(*root, ATTR_RDONLY, 0, false, "read-only root", "/");
		break;
	}
	case PLAN_HOSTNAME:
	case PLAN_DOMAINNAME:
		set_names(a);
		break;
	case PLAN_SYSCTL:
		decode_pair(a, &first, &second);
		set_sysctl(handles->sysctl, first, second);
		break;
	case PLAN_READONLY:
		make_readonly(&s->mounts, *root, attribute_text(a));
		break;
	case PLAN_MASK:
		mask(&s->mounts, *root, attribute_text(a), &s->null, &s->empty);
		break;
	default: /* steps of process.c */
		break;
	}
}

void build_rootfs(struct context *ctx)
{
	struct rootfs_state state = {.ctx = ctx, .directory = {.fd = -1}, .null = -1, .empty = -1};
	struct handles *handles = &ctx->handles;
	struct cursor steps = ctx->plan.steps;
	struct attribute a;

	/* Before any of the container's files is reachable, and while the host's procfs still permits a new one. */
	if (ctx->fds.fifo >= 0)
		handles->processes = private_procfs(true);
	if (ctx->plan.has_sysctl)
		handles->sysctl = private_procfs(false);
	while (next_attribute(&steps, &a))
		do_step(&a, &state);
	if (handles->sysctl >= 0)
		close(handles->sysctl);
	if (state.directory.fd >= 0)
		close(state.directory.fd);
	if (state.null >= 0)
		close(state.null);
	if (state.empty >= 0)
		close(state.empty);
	for (size_t i = 0; i < state.mounts.count; i++)
		close(state.mounts.list[i].fd);
	handles->sysctl = -1;
}
