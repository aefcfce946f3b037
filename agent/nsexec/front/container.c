/*
 * container.c: read a container's state directory, /proc files and cgroups (libcontainer's state.py, container.py).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "front.h"

#define PF_FORKNOEXEC 0x40u /* include/linux/sched.h: forked, but no execve since */
#define PID_MAX (1u << 22)

static const char MAGIC[8] = {'C', 'A', 'I', 'S', 'F', 'R', 'O', '1'};

struct header { /* of front.state; the variable-size parts follow in this order */
	char magic[8];
	struct identity state;
	uint64_t start_time;
	uint32_t pid, flags, before, after, cgroups, bundle;
};

static bool decode_cgroups(const char *at, size_t size, struct container *out)
{
	for (const char *end = at + size; at < end; at += strlen(at) + 1) {
		if (out->cgroup_count == CGROUPS_MAX || at[0] == '\0' || at[1] != '/')
			return false;
		out->cgroups[out->cgroup_count].kind = at[0];
		out->cgroups[out->cgroup_count++].path = at + 1;
	}
	return true;
}

bool decode_container(struct slice file, struct container *out)
{
	struct header header;
	const char *at = file.at + sizeof(header);
	size_t left;

	if (file.size < sizeof(header))
		return false;
	memcpy(&header, file.at, sizeof(header));
	left = file.size - sizeof(header);
	if (memcmp(header.magic, MAGIC, sizeof(MAGIC)) != 0 || header.before > left ||
	    header.after > left - header.before || header.cgroups > left - header.before - header.after ||
	    header.bundle != left - header.before - header.after - header.cgroups || header.bundle < 2 ||
	    file.at[file.size - 1] != '\0' || header.pid == 0 || header.pid > PID_MAX)
		return false;
	out->state = header.state;
	out->start_time = header.start_time;
	out->pid = header.pid;
	out->flags = header.flags;
	out->before = (struct slice){.at = at, .size = header.before};
	out->after = (struct slice){.at = at + header.before, .size = header.after};
	at += header.before + header.after;
	out->bundle = at + header.cgroups;
	return out->bundle[0] == '/' && (header.cgroups == 0 || out->bundle[-1] == '\0') &&
	       decode_cgroups(at, header.cgroups, out);
}

bool load_container(const char *root, const char *id, struct container *out)
{
	static char text[FILE_MAX_SIZE];
	struct slice file;

	memset(out, 0, sizeof(*out));
	if ((size_t)snprintf(out->path, sizeof(out->path), "%s/%s", root, id) >= sizeof(out->path))
		return false;
	out->directory = open(out->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	return out->directory >= 0 && read_file(out->directory, "front.state", &file, text, sizeof(text)) &&
	       decode_container(file, out) && is_same_file(out->directory, "state.json", &out->state);
}

/* Whether the first process is alive, and (in *executed) whether it has executed a program. */
static bool look_at(const struct container *container, bool *executed)
{
	char path[32], text[1024];
	const char *fields;
	struct slice file;
	unsigned long long flags, start;
	char state;

	snprintf(path, sizeof(path), "/proc/%u/stat", container->pid);
	if (!read_file(AT_FDCWD, path, &file, text, sizeof(text) - 1))
		return false;
	text[file.size] = '\0';
	fields = strrchr(text, ')'); /* the name before it may contain anything */
	if (fields == NULL ||
	    sscanf(fields + 1, " %c %*s %*s %*s %*s %*s %llu %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
		   &state, &flags, &start) != 3)
		return false;
	*executed = (flags & PF_FORKNOEXEC) == 0;
	return state != 'Z' && state != 'X' && start == container->start_time;
}

static const char *cgroup_of(const struct container *container, char kind)
{
	for (size_t i = 0; i < container->cgroup_count; i++)
		if (container->cgroups[i].kind == kind)
			return container->cgroups[i].path;
	return NULL;
}

static bool has_line(const char *directory, const char *name, const char *line)
{
	char path[4096 + 32], text[4096], *at, *rest = text;
	struct slice file;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	if (!read_file(AT_FDCWD, path, &file, text, sizeof(text) - 1))
		return false;
	text[file.size] = '\0';
	while ((at = strsep(&rest, "\n")) != NULL)
		if (strcmp(at, line) == 0)
			return true;
	return false;
}

enum status status_of(const struct container *container)
{
	const char *freezer = cgroup_of(container, 'f'), *unified = cgroup_of(container, 'u');
	bool executed;

	if (!look_at(container, &executed))
		return STATUS_STOPPED;
	if (freezer != NULL ? has_line(freezer, "freezer.state", "FROZEN")
			    : unified != NULL && has_line(unified, "cgroup.events", "frozen 1"))
		return STATUS_PAUSED;
	return executed ? STATUS_RUNNING : STATUS_CREATED;
}

/* Return a pidfd of the first process; -1 if it has ended. */
int pidfd_of(const struct container *container)
{
	int pidfd = (int)syscall(SYS_pidfd_open, container->pid, 0);
	bool executed;

	if (pidfd >= 0 && !look_at(container, &executed)) { /* checked after opening: the pid was not reused */
		close(pidfd);
		return -1;
	}
	return pidfd;
}

/* Whether the first process is alive and has executed a program. */
bool has_executed(const struct container *container)
{
	bool executed = true;

	look_at(container, &executed);
	return executed;
}

/* Lock the directory until this program exits; false if it is no longer the container's. */
bool lock_container(const struct container *container)
{
	struct stat held, now;

	return flock(container->directory, LOCK_EX) == 0 && fstat(container->directory, &held) == 0 &&
	       stat(container->path, &now) == 0 && held.st_dev == now.st_dev && held.st_ino == now.st_ino;
}
