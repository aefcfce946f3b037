/*
 * plan.c: decode the bootstrap and plan messages; both are fully validated before anything is executed.
 *
 * Bootstrap attribute types are runc's (27281-27290, libcontainer/message_linux.go) and two of our own; plan steps are
 * declared in nsexec.h.  Unknown, duplicate, misplaced or malformed attributes are errors.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <net/if.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "nsexec.h"

enum {
	BOOT_CLONE_FLAGS = 27281,
	BOOT_NS_PATHS,
	BOOT_UID_MAP,
	BOOT_GID_MAP,
	BOOT_SETGROUPS,
	BOOT_OOM_SCORE_ADJ,
	BOOT_UID_MAP_PATH = 27288,
	BOOT_GID_MAP_PATH,
	BOOT_TIME_OFFSETS,
	BOOT_JOIN_MASK = 27350, /* our own: namespaces to join from the pidfd, u32 */
	BOOT_KEEP_KEYRING,	/* our own: the process keeps the runtime's session keyring, bool */
	BOOT_END
};

#define FIRST_BOOT BOOT_CLONE_FLAGS
#define SEEN_BITS (BOOT_END - FIRST_BOOT)

NORETURN static void malformed(const char *what, const char *why)
{
	fail(EBADMSG, "bootstrap", what, "%s", why);
}

static uint32_t namespace_mask(const struct attribute *a)
{
	uint32_t mask = attribute_u32(a);

	if ((mask & ~NS_ALL) != 0)
		malformed("namespaces", "a flag that is not a namespace");
	return mask;
}

void decode_bootstrap(struct cursor message, struct bootstrap *out)
{
	bool seen[SEEN_BITS] = {false};
	struct attribute a;

	memset(out, 0, sizeof(*out));
	while (next_attribute(&message, &a)) {
		if (a.type < FIRST_BOOT || a.type >= BOOT_END)
			malformed("attribute", "an unknown type");
		if (seen[a.type - FIRST_BOOT])
			malformed("attribute", "a duplicate type");
		seen[a.type - FIRST_BOOT] = true;
		switch (a.type) {
		case BOOT_CLONE_FLAGS:
			out->create = namespace_mask(&a);
			break;
		case BOOT_JOIN_MASK:
			out->join = namespace_mask(&a);
			break;
		case BOOT_KEEP_KEYRING:
			out->keep_keyring = attribute_bool(&a);
			break;
		case BOOT_NS_PATHS:
			out->paths = attribute_text(&a);
			break;
		case BOOT_UID_MAP:
			out->uid_map = attribute_text(&a);
			break;
		case BOOT_GID_MAP:
			out->gid_map = attribute_text(&a);
			break;
		case BOOT_SETGROUPS:
			out->setgroups = attribute_bool(&a);
			break;
		case BOOT_OOM_SCORE_ADJ:
			out->oom_score_adj = attribute_text(&a);
			break;
		case BOOT_TIME_OFFSETS:
			out->time_offsets = attribute_text(&a);
			break;
		case BOOT_UID_MAP_PATH:
			out->uid_map_program = attribute_text(&a);
			break;
		case BOOT_GID_MAP_PATH:
			out->gid_map_program = attribute_text(&a);
			break;
		default:
			malformed("attribute", "an unknown type");
		}
	}
	if ((out->create & out->join) != 0)
		malformed("namespaces", "cannot be both created and joined");
	if ((out->uid_map != NULL || out->gid_map != NULL) && (out->create & NS_USER) == 0)
		malformed("maps", "id maps without a new user namespace");
	if (out->time_offsets != NULL && (out->create & NS_TIME) == 0)
		malformed("offsets", "time offsets without a new time namespace");
}

void decode_mount(const struct attribute *a, struct mount_step *out)
{
	struct cursor c = attribute_cursor(a), rest;

	read_bytes(&c, &out->flags, 4, "mount");
	read_bytes(&c, &out->propagation, 4, "mount");
	read_bytes(&c, &out->set, 8, "mount");
	read_bytes(&c, &out->clear, 8, "mount");
	read_bytes(&c, &out->recursive_set, 8, "mount");
	read_bytes(&c, &out->recursive_clear, 8, "mount");
	out->target = read_text(&c, "mount");
	out->source = read_text(&c, "mount");
	out->type = read_text(&c, "mount");
	out->uid_map = read_text(&c, "mount");
	out->gid_map = read_text(&c, "mount");
	out->options = c;
	for (rest = c; rest.at != rest.end;)
		if (read_text(&rest, "mount")[0] == '\0')
			malformed("mount", "an empty option");
	if ((out->flags & (MOUNT_BIND | MOUNT_REMOUNT)) == 0 && out->type[0] == '\0')
		malformed("mount", "no file system type");
	if ((out->flags & MOUNT_IDMAP) != 0 && (out->flags & MOUNT_BIND) == 0)
		malformed("mount", "id-mapped, but not a bind mount");
	if ((out->uid_map[0] == '\0') != (out->gid_map[0] == '\0'))
		malformed("mount", "maps of uids and gids go together");
}

void decode_device(const struct attribute *a, struct device_step *out)
{
	struct cursor c = attribute_cursor(a);

	read_bytes(&c, &out->mode, 4, "device");
	read_bytes(&c, &out->major, 4, "device");
	read_bytes(&c, &out->minor, 4, "device");
	read_bytes(&c, &out->uid, 4, "device");
	read_bytes(&c, &out->gid, 4, "device");
	read_bytes(&c, &out->bind, 4, "device");
	out->path = read_text(&c, "device");
	read_end(&c, "device");
	if (!S_ISCHR(out->mode) && !S_ISBLK(out->mode) && !S_ISFIFO(out->mode))
		malformed("device", "not a character device, block device or fifo");
}

void decode_link(const struct attribute *a, struct link_step *out)
{
	struct cursor c = attribute_cursor(a);

	read_bytes(&c, &out->replace, 4, "link");
	out->target = read_text(&c, "link");
	out->path = read_text(&c, "link");
	read_end(&c, "link");
}

void decode_rlimit(const struct attribute *a, struct rlimit_step *out)
{
	struct cursor c = attribute_cursor(a);

	read_bytes(&c, out, sizeof(*out), "rlimit");
	read_end(&c, "rlimit");
}

void decode_hook(const struct attribute *a, struct hook_step *out)
{
	struct cursor c = attribute_cursor(a), rest;

	read_bytes(&c, &out->timeout, 4, "hook");
	read_bytes(&c, &out->argc, 4, "hook");
	read_bytes(&c, &out->envc, 4, "hook");
	out->path = read_text(&c, "hook");
	out->strings = c;
	if (out->path[0] != '/' || out->argc == 0 || out->argc > a->size || out->envc > a->size ||
	    out->timeout > INT_MAX / 1000)
		malformed("hook", "no absolute path, no arguments or a number out of range");
	rest = c;
	for (uint32_t i = 0; i < out->argc + out->envc; i++)
		(void)read_text(&rest, "hook");
	read_end(&rest, "hook");
}

void decode_netlink(const struct attribute *a, struct netlink_step *out)
{
	struct cursor c = attribute_cursor(a);
	uint32_t length;

	out->interface = read_text(&c, "netlink");
	out->request = c;
	read_bytes(&c, &length, sizeof(length), "netlink");
	/* struct nlmsghdr, and a header with the index at offset 4 (ifinfomsg, ifaddrmsg) */
	if (length < 24 || length != (size_t)(out->request.end - out->request.at) || strlen(out->interface) >= IFNAMSIZ)
		malformed("netlink", "not a whole request");
}

void decode_pair(const struct attribute *a, const char **first, const char **second)
{
	struct cursor c = attribute_cursor(a);

	*first = read_text(&c, "pair");
	*second = read_text(&c, "pair");
	read_end(&c, "pair");
}

void decode_remount(const struct attribute *a, uint64_t *set, const char **path)
{
	struct cursor c = attribute_cursor(a);

	read_bytes(&c, set, sizeof(*set), "remount");
	*path = read_text(&c, "remount");
	read_end(&c, "remount");
}

static bool may_repeat(uint16_t type)
{
	switch (type) {
	case PLAN_MOUNT:
	case PLAN_DEVICE:
	case PLAN_SYMLINK:
	case PLAN_NETLINK:
	case PLAN_CREATE_HOOK:
	case PLAN_START_HOOK:
	case PLAN_REMOUNT:
	case PLAN_SYSCTL:
	case PLAN_READONLY:
	case PLAN_MASK:
	case PLAN_RLIMIT:
	case PLAN_GROUPS:
		return true;
	default:
		return false;
	}
}

/* Map argv and envp, which will point into the strings message that follows: there is no heap. */
static void make_vectors(const struct attribute *a, struct plan *out)
{
	struct cursor c = attribute_cursor(a);
	uint32_t argc, envc;
	char **vectors;

	read_bytes(&c, &argc, 4, "strings");
	read_bytes(&c, &envc, 4, "strings");
	read_end(&c, "strings");
	if (argc == 0 || argc > (1u << 20) || envc > (1u << 20))
		malformed("strings", "too many, or none");
	out->vectors_size = ((size_t)argc + envc + 2) * sizeof(char *);
	vectors = mmap(NULL, out->vectors_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (vectors == MAP_FAILED)
		fail_errno("bootstrap", "strings", NULL);
	for (uint32_t i = 0; i < argc + envc + 1; i++)
		vectors[i] = (char *)""; /* decode_strings replaces all of them up to NULL */
	vectors[argc] = NULL;
	vectors[argc + 1 + envc] = NULL;
	out->argv = vectors;
	out->envp = vectors + argc + 1;
}

static void check_step(const struct attribute *a)
{
	struct mount_step mount;
	struct device_step device;
	struct link_step link;
	struct rlimit_step limit;
	struct hook_step hook;
	struct netlink_step netlink;
	const char *first, *second;
	uint64_t set;

	switch (a->type) {
	case PLAN_MOUNT:
		decode_mount(a, &mount);
		break;
	case PLAN_DEVICE:
		decode_device(a, &device);
		break;
	case PLAN_SYMLINK:
		decode_link(a, &link);
		break;
	case PLAN_REMOUNT:
		decode_remount(a, &set, &first);
		break;
	case PLAN_SYSCTL:
		decode_pair(a, &first, &second);
		break;
	case PLAN_RLIMIT:
		decode_rlimit(a, &limit);
		break;
	case PLAN_PROPAGATION:
	case PLAN_ROOT_PROPAGATION:
		if ((attribute_u32(a) & ~(uint32_t)(MS_REC | MS_SHARED | MS_SLAVE | MS_PRIVATE | MS_UNBINDABLE)) != 0)
			malformed("propagation", "unknown flags");
		break;
	case PLAN_PIVOT:
		if (attribute_u32(a) > PIVOT_CHROOT)
			malformed("pivot_root", "unknown mode");
		break;
	case PLAN_ROOT_READONLY:
	case PLAN_RUNTIME_HOOKS:
		(void)attribute_bool(a);
		break;
	case PLAN_NETLINK:
		decode_netlink(a, &netlink);
		break;
	case PLAN_CREATE_HOOK:
	case PLAN_START_HOOK:
		decode_hook(a, &hook);
		break;
	default: /* PLAN_ROOTFS, PLAN_HOSTNAME, PLAN_DOMAINNAME, PLAN_READONLY, PLAN_MASK */
		(void)attribute_text(a);
	}
}

static const uint8_t *decode_cpus(const struct attribute *a)
{
	if (a->size == 0 || a->size % 8 != 0 || a->size > CPU_MASK_MAX)
		malformed("cpus", "not a mask of whole words");
	return a->data;
}

static void decode_plan_step(const struct attribute *a, struct plan *out)
{
	struct cursor c = attribute_cursor(a);

	switch (a->type) {
	case PLAN_CONSOLE:
		read_bytes(&c, &out->console.rows, 2, "console");
		read_bytes(&c, &out->console.columns, 2, "console");
		read_bytes(&c, &out->console.bind, 4, "console");
		read_end(&c, "console");
		out->has_console = true;
		break;
	case PLAN_UMASK:
		out->umask = attribute_u32(a);
		out->has_umask = true;
		break;
	case PLAN_CPUS:
		out->cpus = decode_cpus(a);
		out->cpus_size = a->size;
		break;
	case PLAN_FINAL_CPUS:
		out->final_cpus = decode_cpus(a);
		out->final_cpus_size = a->size;
		break;
	case PLAN_SCHEDULER: {
		uint32_t size;

		read_bytes(&c, &size, 4, "scheduler");
		if (a->size != SCHEDULER_SIZE || size != SCHEDULER_SIZE)
			malformed("scheduler", "an unknown size");
		out->scheduler = a->data;
		break;
	}
	case PLAN_IO_PRIORITY:
		out->io_priority = attribute_u32(a);
		out->has_io_priority = true;
		break;
	case PLAN_PERSONALITY:
		out->personality = attribute_u32(a);
		out->has_personality = true;
		break;
	case PLAN_MEMORY_POLICY:
		read_bytes(&c, &out->memory_policy, 4, "memory policy");
		out->memory_nodes = c.at;
		out->memory_nodes_size = (size_t)(c.end - c.at);
		if (out->memory_nodes_size % 8 != 0 || out->memory_nodes_size > CPU_MASK_MAX)
			malformed("memory policy", "not a mask of whole words");
		break;
	case PLAN_LABEL:
		decode_pair(a, &out->label_file, &out->label);
		if (strcmp(out->label_file, "exec") != 0 && strcmp(out->label_file, "apparmor/exec") != 0)
			malformed("label", "an unknown attribute file");
		break;
	case PLAN_NO_NEW_PRIVS:
		out->no_new_privs = attribute_bool(a);
		break;
	case PLAN_SECCOMP:
		if (a->size <= 4 || (a->size - 4) % 8 != 0)
			malformed("seccomp", "not flags and whole instructions");
		out->filter = a->data;
		out->filter_size = a->size;
		break;
	case PLAN_GROUPS:
		if (a->size % 4 != 0)
			malformed("groups", "not whole numbers");
		out->group_count += a->size / 4;
		if (out->group_count > GROUPS_MAX)
			malformed("groups", "more than a process can have");
		break;
	case PLAN_USER:
		read_bytes(&c, &out->uid, 4, "user");
		read_bytes(&c, &out->gid, 4, "user");
		read_end(&c, "user");
		out->has_user = true;
		break;
	case PLAN_CAPABILITIES:
		read_bytes(&c, &out->capabilities, sizeof(out->capabilities), "capabilities");
		read_end(&c, "capabilities");
		out->has_capabilities = true;
		break;
	case PLAN_CWD:
		out->cwd = attribute_text(a);
		break;
	case PLAN_HOOK_STATE:
		out->hook_state = attribute_text(a);
		break;
	case PLAN_STRINGS:
		make_vectors(a, out);
		break;
	default:
		out->has_sysctl |= a->type == PLAN_SYSCTL;
		check_step(a);
	}
}

void decode_plan(struct cursor message, bool joins, struct plan *out)
{
	uint16_t previous = 0;
	bool has_rootfs = false, has_pivot = false;
	struct attribute a;

	memset(out, 0, sizeof(*out));
	out->steps = message;
	if (!next_attribute(&message, &a) || a.type != PLAN_VERSION || attribute_u32(&a) != PLAN_FORMAT)
		malformed("plan", "not the version of this nsexec");
	out->steps = message;
	while (next_attribute(&message, &a)) {
		if (a.type <= PLAN_VERSION || a.type >= PLAN_END)
			malformed("plan", "an unknown step");
		if (a.type < previous || (a.type == previous && !may_repeat(a.type)))
			malformed("plan", "a step out of order, or duplicate");
		if (joins && ((a.type < PLAN_UMASK && a.type != PLAN_CONSOLE) || a.type == PLAN_START_HOOK))
			malformed("plan", "a step that an exec cannot have");
		has_rootfs |= a.type == PLAN_ROOTFS;
		has_pivot |= a.type == PLAN_PIVOT;
		out->slave_root |= a.type == PLAN_ROOT_PROPAGATION && (attribute_u32(&a) & MS_SLAVE) != 0;
		out->shares_mounts |= a.type == PLAN_PIVOT && attribute_u32(&a) == PIVOT_CHROOT;
		previous = a.type;
		if ((a.type == PLAN_CREATE_HOOK || a.type == PLAN_START_HOOK) && out->hook_state == NULL)
			malformed("plan", "hooks without a state");
		decode_plan_step(&a, out);
	}
	if (!out->has_user || !out->has_capabilities || out->cwd == NULL || out->argv == NULL)
		malformed("plan", "no user, capabilities, cwd or strings");
	if (!joins && (!has_rootfs || !has_pivot))
		malformed("plan", "an init without a root file system");
}

void decode_strings(struct cursor message, const struct plan *plan)
{
	for (char **arg = plan->argv; *arg != NULL; arg++)
		*arg = (char *)(uintptr_t)read_text(&message, "argv");
	for (char **variable = plan->envp; *variable != NULL; variable++)
		*variable = (char *)(uintptr_t)read_text(&message, "envp");
	read_end(&message, "strings");
}
