/*
 * rootfs.c: the filesystem part of a plan, in the order of the OCI runtime: propagation, root, mounts, devices, links, pivot_root,
 * console, then what is made read-only, named, set and hidden.
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

	/* Where nodes cannot be made (a user namespace), the guest's own is used, if it is the one that is meant. */
	if (node < 0 || fstat(node, &st) < 0)
		fail("device", device->path, errno, NULL);
	if ((st.st_mode & S_IFMT) != (device->mode & S_IFMT) || st.st_rdev != makedev(device->major, device->minor))
		fail("device", device->path, ENODEV, "the guest's node is another device");
	tree = clone_mount(node, "device", device->path, false);
	target = make_target_in(root, device->path, false);
	if (target < 0 || sys_move_mount(tree, target) < 0)
		fail("device", device->path, errno, NULL);
	close(target);
	close(tree);
	close(node);
}

static void make_device(int root, const struct device_step *device)
{
	char name[NAME_MAX + 1];
	struct stat st;
	dev_t number = makedev(device->major, device->minor);
	int dir, node;

	if (device->bind != 0) {
		bind_device(root, device);
		return;
	}
	dir = open_parent_in(root, device->path, name);
	if (dir < 0)
		fail("device", device->path, errno, NULL);
	/* The exact mode at once: a later chmod by name could hit something else. */
	umask(0);
	if (mknodat(dir, name, device->mode, number) < 0 && errno != EEXIST)
		fail("device", device->path, errno, NULL);
	umask(DEFAULT_UMASK);
	node = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (node < 0 || fstat(node, &st) < 0)
		fail("device", device->path, errno, NULL);
	if ((st.st_mode & S_IFMT) != (device->mode & S_IFMT) || (!S_ISFIFO(st.st_mode) && st.st_rdev != number))
		fail("device", device->path, EEXIST, "something else has that name");
	if (fchownat(node, "", device->uid, device->gid, AT_EMPTY_PATH) < 0)
		fail("device", device->path, errno, NULL);
	close(node);
	close(dir);
}

static void make_link(int root, const struct link_step *link)
{
	char name[NAME_MAX + 1];
	int dir = open_parent_in(root, link->path, name);

	if (dir < 0)
		fail("link", link->path, errno, NULL);
	if (link->replace != 0 && unlinkat(dir, name, 0) < 0 && errno != ENOENT)
		fail("link", link->path, errno, NULL);
	if (symlinkat(link->target, dir, name) < 0 && (errno != EEXIST || link->replace != 0))
		fail("link", link->path, errno, NULL);
	close(dir);
}

/* pivot_root(2) with new and old root on the same directory, then the old one is let go of. */
static void pivot(int root, uint32_t way)
{
	int old;

	if (way != 0)
		fail("pivot_root", "", EINVAL, "an unknown way to change the root");
	old = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (old < 0 || fchdir(root) < 0)
		fail("pivot_root", "/", errno, NULL);
	if (syscall(SYS_pivot_root, ".", ".") < 0)
		fail("pivot_root", "/", errno, errno == EINVAL ? "the guest's own root must be a mount with a parent" : NULL);
	if (fchdir(old) < 0 || mount(NULL, ".", NULL, MS_SLAVE | MS_REC, NULL) < 0 || umount2(".", MNT_DETACH) < 0)
		fail("pivot_root", "old root", errno, NULL);
	if (chdir("/") < 0)
		fail("pivot_root", "/", errno, NULL);
	close(old);
}

static void set_sysctl(int procfs, const char *path, const char *value)
{
	char name[PATH_MAX] = "sys/";
	int fd;

	if (strlen(path) + sizeof("sys/") > sizeof(name))
		fail("sysctl", path, ENAMETOOLONG, NULL);
	strcat(name, path);
	fd = sys_openat2(procfs, name, O_WRONLY | O_CLOEXEC, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV);
	if (fd < 0)
		fail("sysctl", path, errno, NULL);
	if (write(fd, value, strlen(value)) != (ssize_t)strlen(value))
		fail("sysctl", path, errno, NULL);
	close(fd);
}

/* procfs and sysfs of the container, by descriptors: their names may be exchanged by others who have the image. */
struct kernel_mounts {
	struct {
		int fd;
		char target[64];
	} list[4];
	size_t count;
};

static void remember(struct kernel_mounts *mounts, int fd, const char *target)
{
	if (mounts->count == ARRAY_SIZE(mounts->list) || strlen(target) >= sizeof(mounts->list[0].target)) {
		close(fd); /* an unusual place, or one of many: found by its name */
		return;
	}
	mounts->list[mounts->count].fd = fd;
	strcpy(mounts->list[mounts->count].target, target);
	mounts->count++;
}

/*
 * What is to be hidden or read-only.  Below a mount that is known it is looked for there: a name that leads elsewhere for a moment
 * would leave it bare (CVE-2019-19921).
 */
static int open_hidden(const struct kernel_mounts *mounts, int root, const char *path)
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
	int target = open_hidden(mounts, root, path), tree;

	if (target < 0 && errno == ENOENT)
		return;
	if (target < 0)
		fail("read-only path", path, errno, NULL);
	tree = clone_mount(target, "read-only path", path, true);
	set_attributes(tree, ATTR_RDONLY, 0, false, "read-only path", path);
	if (sys_move_mount(tree, target) < 0)
		fail("read-only path", path, errno, NULL);
	close(tree);
	close(target);
}

/* An empty read-only directory; one filesystem serves all masked directories. */
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
		fail("mask", "empty directory", errno, NULL);
	*cached = sys_fsmount(fs, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC);
	if (*cached < 0)
		fail("mask", "empty directory", errno, NULL);
	close(fs);
	/* The first use attaches it; later ones copy the attached mount. */
	return dup(*cached);
}

static void mask(const struct kernel_mounts *mounts, int root, const char *path, int *null, int *empty)
{
	struct stat st;
	int target = open_hidden(mounts, root, path), tree;

	if (target < 0 && (errno == ENOENT || errno == ENOTDIR))
		return;
	if (target < 0 || fstat(target, &st) < 0)
		fail("mask", path, errno, NULL);
	if (S_ISDIR(st.st_mode)) {
		tree = empty_directory(empty);
	} else {
		if (*null < 0)
			*null = open_verified_null(root);
		if (*null < 0)
			fail("mask", path, errno, "/dev/null of the container is not the null device");
		tree = clone_mount(*null, "mask", path, false);
	}
	if (tree < 0 || sys_move_mount(tree, target) < 0)
		fail("mask", path, errno, NULL);
	close(tree);
	close(target);
}

static void remount(int root, const struct attribute *a)
{
	const char *path;
	uint64_t set;
	int fd;

	decode_remount(a, &set, &path);
	fd = open_in(root, path, O_PATH, 0);
	if (fd < 0)
		fail("remount", path, errno, NULL);
	set_attributes(fd, set, 0, false, "remount", path);
	close(fd);
}

static void do_device_or_link(int root, const struct attribute *a)
{
	struct device_step device;
	struct link_step link;

	if (a->type == PLAN_DEVICE) {
		decode_device(a, &device);
		make_device(root, &device);
	} else {
		decode_link(a, &link);
		make_link(root, &link);
	}
}

static void name_host(const struct attribute *a)
{
	const char *name = attribute_text(a);

	if ((a->type == PLAN_HOSTNAME ? sethostname : setdomainname)(name, strlen(name)) < 0)
		fail(a->type == PLAN_HOSTNAME ? "hostname" : "domainname", name, errno, NULL);
}

struct state {
	struct handles *handles;
	const struct plan *plan;
	const struct channels *fds;
	struct kernel_mounts mounts;
	int null, empty;
	bool hooked; /* createContainer hooks have run, all of them */
};

static void do_step(const struct attribute *a, struct state *s)
{
	struct mount_step step;
	const char *first, *second;
	int *root = &s->handles->root, fd;

	switch (a->type) {
	case PLAN_PROPAGATION:
		if (mount(NULL, "/", NULL, attribute_u32(a), NULL) < 0)
			fail("propagation", "/", errno, NULL);
		break;
	case PLAN_ROOTFS:
		attach_rootfs(attribute_text(a), root);
		break;
	case PLAN_MOUNT:
		decode_mount(a, &step);
		fd = do_mount(*root, &step);
		if ((step.flags & MOUNT_ORDINARY_DIR) != 0)
			remember(&s->mounts, fd, step.target);
		else
			close(fd);
		break;
	case PLAN_DEVICE:
	case PLAN_SYMLINK:
		do_device_or_link(*root, a);
		break;
	case PLAN_RUNTIME_HOOKS:
		wait_for_runtime_hooks(s->fds->sync);
		break;
	case PLAN_CREATE_HOOK:
		if (!s->hooked)
			run_hooks(s->plan, PLAN_CREATE_HOOK, s->fds->sync, *root);
		s->hooked = true;
		break;
	case PLAN_PIVOT:
		FAULT(root_mounted);
		pivot(*root, attribute_u32(a));
		replace_null_stdio(*root);
		break;
	case PLAN_ROOT_PROPAGATION:
		if (mount(NULL, "/", NULL, attribute_u32(a), NULL) < 0)
			fail("propagation", "/", errno, NULL);
		break;
	case PLAN_CONSOLE:
		open_console(*root, &s->plan->console, s->fds->console);
		break;
	case PLAN_REMOUNT:
		remount(*root, a);
		break;
	case PLAN_ROOT_READONLY: {
		/* cwd is made on demand, which is too late once the root is read-only. */
		int cwd = make_directory_in(*root, s->plan->cwd, 0755);

		if (cwd < 0)
			fail("cwd", s->plan->cwd, errno, NULL);
		close(cwd);
		set_attributes(*root, ATTR_RDONLY, 0, false, "read-only root", "/");
		break;
	}
	case PLAN_HOSTNAME:
	case PLAN_DOMAINNAME:
		name_host(a);
		break;
	case PLAN_SYSCTL:
		decode_pair(a, &first, &second);
		set_sysctl(s->handles->sysctl, first, second);
		break;
	case PLAN_READONLY:
		make_readonly(&s->mounts, *root, attribute_text(a));
		break;
	case PLAN_MASK:
		mask(&s->mounts, *root, attribute_text(a), &s->null, &s->empty);
		break;
	default: /* what belongs to the process is process.c's */
		break;
	}
}

void build_rootfs(const struct plan *plan, const struct channels *fds, struct handles *handles)
{
	struct state state = {.handles = handles, .plan = plan, .fds = fds, .null = -1, .empty = -1};
	struct cursor steps = plan->steps;
	struct attribute a;

	/* Before anything of the container is reachable, and while the guest's own procfs still allows a new one. */
	if (fds->fifo >= 0)
		handles->processes = private_procfs(true);
	if (plan->has_sysctl)
		handles->sysctl = private_procfs(false);
	while (next_attribute(&steps, &a))
		do_step(&a, &state);
	if (handles->sysctl >= 0)
		close(handles->sysctl);
	if (state.null >= 0)
		close(state.null);
	if (state.empty >= 0)
		close(state.empty);
	for (size_t i = 0; i < state.mounts.count; i++)
		close(state.mounts.list[i].fd);
	handles->sysctl = -1;
}
