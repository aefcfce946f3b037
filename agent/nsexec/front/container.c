/*
 * container.c: a container as its state directory, /proc and its cgroups say (libcontainer's state.py, container.py).
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

#define PF_FORKNOEXEC 0x40u /* include/linux/sched.h: forked, and nothing executed since */
#define PID_MAX (1 << 22)

/* A string that an encoder of Python's reads and writes again as it stands here. */
static struct slice stable_string(struct json *json)
{
	struct slice found = json_string(json);

	for (size_t i = 0; i < found.size; i++) {
		unsigned char c = (unsigned char)found.at[i];

		if (c >= 0x80)
			json->bad = true;
		if (c == '\\' && strchr("\"\\nrtbf", found.at[++i]) == NULL)
			json->bad = true;
	}
	return found;
}

/* What precedes the first "=" of a label, and what follows it. */
static struct slice key_of(struct slice label, struct slice *value)
{
	const char *equals = memchr(label.at, '=', label.size);
	struct slice key = {.at = label.at, .size = equals == NULL ? label.size : (size_t)(equals - label.at)};

	value->at = equals == NULL ? "" : equals + 1;
	value->size = equals == NULL ? 0 : label.size - key.size - 1;
	return key;
}

static void add_label(struct json *json, struct container *out)
{
	struct slice label = stable_string(json), value, other, key = key_of(label, &value);

	for (size_t i = 0; i < out->label_count; i++) {
		struct slice before = key_of(out->labels[i], &other);

		if (before.size == key.size && memcmp(before.at, key.at, key.size) == 0)
			json->bad = true;
	}
	if (is(key, "bundle")) {
		if (out->bundle.at != NULL)
			json->bad = true;
		out->bundle = value;
		return;
	}
	if (out->label_count == LABELS_MAX)
		json->bad = true;
	else
		out->labels[out->label_count++] = label;
}

static void decode_config(struct json *json, struct container *out)
{
	struct slice key;

	for (json_open(json, '{'); json_member(json, &key);) {
		if (is(key, "version"))
			out->version = stable_string(json);
		else if (is(key, "rootfs"))
			out->rootfs = stable_string(json);
		else if (is(key, "labels"))
			for (json_open(json, '['); json_element(json);)
				add_label(json, out);
		else
			json->bad = true;
	}
}

static void decode_cgroups(struct json *json, struct container *out)
{
	struct slice key;

	for (json_open(json, '{'); json_member(json, &key);) {
		if (out->cgroup_count == CGROUPS_MAX) {
			json->bad = true;
			return;
		}
		out->cgroups[out->cgroup_count].controller = key;
		if (!plain_text(json_string(json), out->cgroups[out->cgroup_count].path, sizeof(out->cgroups[0].path)))
			json->bad = true;
		out->cgroup_count++;
	}
}

/* The keys of State.to_json, each at most once. */
static const char *const KEYS[] = {"id",       "init_process_pid",  "init_process_start", "created",
				   "rootless", "cgroup_paths",	    "namespace_paths",	  "external_descriptors",
				   "config",   "joined_namespaces", "resources"};

bool decode_state(struct slice text, struct container *out)
{
	struct json json = json_of(text);
	struct slice key;
	unsigned seen = 0;
	int64_t pid = 0, start = 0;

	for (json_open(&json, '{'); json_member(&json, &key);) {
		unsigned number = 0;

		while (number < ARRAY_SIZE(KEYS) && !is(key, KEYS[number]))
			number++;
		if (number == ARRAY_SIZE(KEYS) || (seen & 1u << number) != 0)
			return false;
		seen |= 1u << number;
		if (is(key, "id")) {
			out->id = stable_string(&json);
		} else if (is(key, "init_process_pid")) {
			pid = json_number(&json);
		} else if (is(key, "init_process_start")) {
			start = json_number(&json);
		} else if (is(key, "created")) {
			out->created = stable_string(&json);
		} else if (is(key, "cgroup_paths")) {
			decode_cgroups(&json, out);
		} else if (is(key, "config")) {
			decode_config(&json, out);
		} else if (is(key, "joined_namespaces")) {
			for (json_open(&json, '{'); json_member(&json, &key); json_skip(&json))
				out->joins_pids |= is(key, "pid");
		} else {
			json_skip(&json);
		}
	}
	if (out->bundle.at == NULL)
		out->bundle.at = "";
	out->pid = (int)pid;
	out->start_time = (uint64_t)start;
	return json_ended(&json) && seen == (1u << ARRAY_SIZE(KEYS)) - 1 && pid > 0 && pid <= PID_MAX && start >= 0;
}

static void decode_namespaces(struct json *json, bool *own_pids)
{
	struct slice key;

	for (json_open(json, '['); json_element(json);) {
		struct slice type = {.at = ""}, path = {.at = ""};

		for (json_open(json, '{'); json_member(json, &key);) {
			if (is(key, "type"))
				type = json_string(json);
			else if (is(key, "path") && json_is_string(json))
				path = json_string(json);
			else
				json_skip(json);
		}
		*own_pids |= is(type, "pid") && path.size == 0;
	}
}

static bool is_not_empty(struct json *json)
{
	const char *start = json->at;

	json_skip(json);
	for (; start < json->at; start++)
		if (*start == '{')
			return true;
	return false;
}

/* Of lists of hooks nothing is known but whether there are any. */
static void decode_hooks(struct json *json, struct configuration *out)
{
	struct slice key;

	for (json_open(json, '{'); json_member(json, &key);) {
		if (is(key, "poststop"))
			out->has_poststop_hooks |= is_not_empty(json);
		else if (is(key, "startContainer") || is(key, "poststart"))
			out->has_start_hooks |= is_not_empty(json);
		else
			json_skip(json);
	}
}

bool decode_configuration(struct slice text, struct configuration *out)
{
	struct json json = json_of(text);
	struct slice key;

	memset(out, 0, sizeof(*out));
	for (json_open(&json, '{'); json_member(&json, &key);) {
		if (is(key, "linux"))
			for (json_open(&json, '{'); json_member(&json, &key);)
				if (is(key, "namespaces"))
					decode_namespaces(&json, &out->own_pids);
				else
					json_skip(&json);
		else if (is(key, "hooks"))
			decode_hooks(&json, out);
		else
			json_skip(&json);
	}
	return json_ended(&json);
}

bool load_container(const char *root, const char *id, struct container *out)
{
	static char text[FILE_MAX_SIZE];
	struct slice state;

	memset(out, 0, sizeof(*out));
	if ((size_t)snprintf(out->path, sizeof(out->path), "%s/%s", root, id) >= sizeof(out->path))
		return false;
	out->directory = open(out->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (out->directory < 0 || !read_file(out->directory, "state.json", &state, text, sizeof(text)))
		return false;
	return decode_state(state, out) && is(out->id, id);
}

bool load_configuration(const struct container *container, struct configuration *out)
{
	static char text[FILE_MAX_SIZE];
	struct slice file;

	return read_file(container->directory, "config.json", &file, text, sizeof(text)) &&
	       decode_configuration(file, out);
}

/* Whether the first process lives, and has executed a program. */
static bool look_at(const struct container *container, bool *executed)
{
	char path[32], text[1024];
	const char *fields;
	struct slice file;
	unsigned long long flags, start;
	char state;

	snprintf(path, sizeof(path), "/proc/%d/stat", container->pid);
	if (!read_file(AT_FDCWD, path, &file, text, sizeof(text) - 1))
		return false;
	text[file.size] = '\0';
	fields = strrchr(text, ')'); /* the name before it may be anything */
	if (fields == NULL ||
	    sscanf(fields + 1, " %c %*s %*s %*s %*s %*s %llu %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
		   &state, &flags, &start) != 3)
		return false;
	*executed = (flags & PF_FORKNOEXEC) == 0;
	return state != 'Z' && state != 'X' && start == container->start_time;
}

static const char *cgroup_of(const struct container *container, const char *controller)
{
	for (size_t i = 0; i < container->cgroup_count; i++)
		if (is(container->cgroups[i].controller, controller))
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
	const char *freezer = cgroup_of(container, "freezer"), *unified = cgroup_of(container, "");
	bool executed;

	if (!look_at(container, &executed))
		return STATUS_STOPPED;
	if (freezer != NULL ? has_line(freezer, "freezer.state", "FROZEN")
			    : unified != NULL && has_line(unified, "cgroup.events", "frozen 1"))
		return STATUS_PAUSED;
	return executed ? STATUS_RUNNING : STATUS_CREATED;
}

/* A pidfd of the first process; -1 if that has ended. */
int pidfd_of(const struct container *container)
{
	int pidfd = (int)syscall(SYS_pidfd_open, container->pid, 0);
	bool executed;

	if (pidfd >= 0 && !look_at(container, &executed)) { /* after it was opened: it was not another's at that time */
		close(pidfd);
		return -1;
	}
	return pidfd;
}

/* Whether it has executed a program, if it is there at all. */
bool has_executed(const struct container *container)
{
	bool executed = true;

	look_at(container, &executed);
	return executed;
}

/* Lock the directory; false if it is not the container's any more. */
bool lock_container(const struct container *container)
{
	struct stat held, now;

	return flock(container->directory, LOCK_EX) == 0 && fstat(container->directory, &held) == 0 &&
	       stat(container->path, &now) == 0 && held.st_dev == now.st_dev && held.st_ino == now.st_ino;
}
