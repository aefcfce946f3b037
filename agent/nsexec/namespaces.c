/*
 * namespaces.c: join namespaces, and initialise new user, time and network namespaces.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "nsexec.h"

#define MAP_LINES_MAX 340 /* the kernel's UID_GID_MAP_MAX_EXTENTS */

static const struct namespace_name {
	const char *name;
	uint32_t flag;
} namespace_names[NAMESPACES] = {
	{"user", NS_USER}, {"ipc", NS_IPC}, {"uts", NS_UTS},   {"net", NS_NET},
	{"pid", NS_PID},   {"mnt", NS_MNT}, {"time", NS_TIME}, {"cgroup", NS_CGROUP},
};

static const struct namespace_name *find_name(const char *name, size_t length)
{
	for (size_t i = 0; i < NAMESPACES; i++)
		if (strlen(namespace_names[i].name) == length && memcmp(name, namespace_names[i].name, length) == 0)
			return &namespace_names[i];
	return NULL;
}

/* Read the next "type:path" of a list; false at its end. */
static bool next_namespace(const char **at, const struct namespace_name **name, char path[PATH_MAX])
{
	size_t type, length;

	if (*at == NULL || **at == '\0')
		return false;
	type = strcspn(*at, ":");
	length = (*at)[type] == ':' ? strcspn(*at + type + 1, ",") : 0;
	*name = find_name(*at, type);
	if (*name == NULL || length == 0 || length >= PATH_MAX)
		fail(EBADMSG, "bootstrap", "namespace paths", NULL);
	memcpy(path, *at + type + 1, length);
	path[length] = '\0';
	*at += type + 1 + length;
	*at += **at == ',';
	return true;
}

bool joins_by_path(const struct bootstrap *boot, uint32_t flag)
{
	const struct namespace_name *name;
	const char *at = boot->paths;
	char path[PATH_MAX];

	while (next_namespace(&at, &name, path))
		if (name->flag == flag)
			return true;
	return false;
}

/* Open the whole list "type:path,type:path" before joining the first: the paths are in the runtime's namespaces. */
void open_namespaces(const struct bootstrap *boot, struct namespace_files *files)
{
	const struct namespace_name *name;
	const char *at = boot->paths;
	char path[PATH_MAX];

	files->count = 0;
	while (next_namespace(&at, &name, path)) {
		struct namespace_file *file = &files->list[files->count];

		if (files->count == NAMESPACES)
			fail(EBADMSG, "bootstrap", "namespace paths", NULL);
		if ((boot->create & name->flag) != 0)
			fail(EINVAL, "namespace", path, "cannot be both created and joined");
		*file = (struct namespace_file){.flag = name->flag, .name = name->name};
		file->fd = open(path, O_RDONLY | O_CLOEXEC);
		if (file->fd < 0)
			fail_errno("namespace", path, NULL);
		files->count++;
	}
}

/* Become root in the user namespace that was entered or, if 0 is not mapped, the process's user. */
void become_root_of_namespace(const struct plan *plan)
{
	uint32_t uid = 0, gid = 0;

	if (syscall(SYS_setresgid, gid, gid, gid) < 0 && errno == EINVAL) {
		gid = plan->gid;
		uid = plan->uid;
		if (syscall(SYS_setresgid, gid, gid, gid) < 0)
			fail_errno("user namespace", "", "gid %u is not mapped", gid);
	}
	if (syscall(SYS_setresuid, uid, uid, uid) < 0)
		fail_errno("user namespace", "", "uid %u is not mapped", uid);
}

/* Join first the namespaces owned by the runtime's user namespace, then the user namespace, then those owned by it. */
static void join_files(const struct plan *plan, struct namespace_files *files)
{
	for (int pass = 0; pass < 3; pass++) {
		for (size_t i = 0; i < files->count; i++) {
			struct namespace_file *file = &files->list[i];

			if (file->joined || (pass == 1) != (file->flag == NS_USER))
				continue;
			if (syscall(SYS_setns, file->fd, file->flag) < 0) {
				if (errno == EPERM && pass == 0)
					continue;
				fail_errno("setns", file->name, NULL);
			}
			file->joined = true;
			close(file->fd);
			if (file->flag == NS_USER)
				become_root_of_namespace(plan);
		}
	}
}

void join_namespaces(struct context *ctx, struct namespace_files *files)
{
	uint32_t mask = ctx->boot.join;

	if (mask != 0 && syscall(SYS_setns, ctx->fds.pidfd, mask) < 0)
		fail_errno("setns", "the container's init", errno == ESRCH ? "it has exited" : NULL);
	if ((mask & NS_USER) != 0)
		become_root_of_namespace(&ctx->plan);
	join_files(&ctx->plan, files);
	if (ctx->fds.pidfd >= 0)
		close(ctx->fds.pidfd);
	ctx->fds.pidfd = -1;
}

/* Write a file in /proc/PID (0: of this process).  Only for stages that still see the runtime's own procfs. */
void write_proc(const char *step, int pid, const char *file, const char *text)
{
	char path[64];
	int fd;

	if (pid == 0)
		snprintf(path, sizeof(path), "/proc/self/%s", file);
	else
		snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		fail_errno(step, path, NULL);
	close(fd);
}

/* Run newuidmap or newgidmap: PROGRAM PID, then the numbers of the map. */
static void run_map_program(const char *program, int pid, const char *map)
{
	static char numbers[1u << 15], pid_text[16], *argv[3 + 3 * MAP_LINES_MAX];
	static char *const envp[] = {NULL};
	size_t argc = 2;
	int child, status = 0;

	if (strlen(map) >= sizeof(numbers))
		fail(E2BIG, "id maps", program, NULL);
	strcpy(numbers, map);
	snprintf(pid_text, sizeof(pid_text), "%d", pid);
	argv[0] = (char *)(uintptr_t)program;
	argv[1] = pid_text;
	for (char *next = strtok(numbers, " \n"); next != NULL; next = strtok(NULL, " \n")) {
		if (argc == ARRAY_SIZE(argv) - 1)
			fail(E2BIG, "id maps", program, NULL);
		argv[argc++] = next;
	}
	child = (int)syscall(SYS_clone, (unsigned long)SIGCHLD, NULL, NULL, NULL, NULL);
	if (child == 0) {
		execve(program, argv, envp);
		fail_errno("id maps", program, NULL);
	}
	while (child > 0 && waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			fail_errno("id maps", program, "waitpid");
	if (child < 0 || status != 0)
		fail(EPERM, "id maps", program, "failed for the map %s", map);
}

/* Write the id maps of a user namespace, from outside it (user_namespaces(7)). */
void write_id_maps(const struct bootstrap *boot, int pid)
{
	if (!boot->setgroups && boot->gid_map != NULL)
		write_proc("id maps", pid, "setgroups", "deny");
	if (boot->uid_map != NULL && boot->uid_map_program != NULL)
		run_map_program(boot->uid_map_program, pid, boot->uid_map);
	else if (boot->uid_map != NULL)
		write_proc("id maps", pid, "uid_map", boot->uid_map);
	if (boot->gid_map != NULL && boot->gid_map_program != NULL)
		run_map_program(boot->gid_map_program, pid, boot->gid_map);
	else if (boot->gid_map != NULL)
		write_proc("id maps", pid, "gid_map", boot->gid_map);
}

void bring_loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo"};
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (s < 0 || ioctl(s, SIOCGIFFLAGS, &request) < 0)
		fail_errno("loopback", "lo", NULL);
	request.ifr_flags |= IFF_UP;
	if (ioctl(s, SIOCSIFFLAGS, &request) < 0)
		fail_errno("loopback", "lo", NULL);
	close(s);
}

/* Send a request about an interface of this network namespace (rtnetlink(7)), and wait for the acknowledgement. */
void request_netlink(const struct netlink_step *step)
{
	static uint8_t buffer[1u << 16];
	size_t size = (size_t)(step->request.end - step->request.at);
	int s = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE_FAMILY), error;
	uint32_t index = if_nametoindex(step->interface);

	if (s < 0 || index == 0 || size > sizeof(buffer))
		fail_errno("network device", step->interface, NULL);
	memcpy(buffer, step->request.at, size);
	memcpy(buffer + NETLINK_HEADER + 4, &index, sizeof(index));
	if (send(s, buffer, size, 0) != (ssize_t)size ||
	    recv(s, buffer, sizeof(buffer), 0) < (ssize_t)(NETLINK_HEADER + sizeof(error)))
		fail_errno("network device", step->interface, NULL);
	memcpy(&error, buffer + NETLINK_HEADER, sizeof(error)); /* struct nlmsgerr */
	if (error != 0)
		fail(-error, "network device", step->interface, NULL);
	close(s);
}
