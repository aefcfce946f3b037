/*
 * front.h: declarations shared by the parts of the front.
 *
 * The front is what commands/caisson-oci starts first, with the command line of the interpreter as its arguments.  It
 * carries out the plain forms of state, kill, start, delete and exec by itself, in a tenth of the time that an
 * interpreter takes to start.  Whatever it does not understand completely (an option, a field, a surprising state, any
 * failure) it hands over: it executes its arguments, and Python does it all, with every text and status.  So a function
 * here returns false for "not here", and hands over is only called before anything was changed, or after what was
 * changed would be done again to the same end.
 */
#ifndef FRONT_H
#define FRONT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define FILE_MAX_SIZE (1u << 20)
#define CGROUPS_MAX 16
#define LABELS_MAX 64

/* --- json.c --- */
struct slice { /* of a JSON string as it is encoded, without its quotes; or of any text */
	const char *at;
	size_t size;
};

struct json {
	const char *at, *end;
	unsigned depth;
	bool first, bad;
};

struct json json_of(struct slice text);
bool json_open(struct json *json, char bracket);
bool json_member(struct json *json, struct slice *key);
bool json_element(struct json *json);
struct slice json_string(struct json *json);
int64_t json_number(struct json *json);
bool json_is_string(struct json *json);
void json_skip(struct json *json);
bool json_ended(struct json *json);
bool is(struct slice text, const char *word);
bool plain_text(struct slice encoded, char *into, size_t room);

/* --- files.c --- */
#define READ_FLAGS (O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC) /* of what may not be a file */
bool read_whole(int fd, struct slice *out, char *room, size_t size);
bool read_file(int directory, const char *path, struct slice *out, char *room, size_t size);
bool write_all(int fd, const char *data, size_t size);

/* --- container.c --- */
struct container {
	int directory; /* its state directory */
	char path[4096];
	struct slice id, created, version, rootfs, bundle;
	struct slice labels[LABELS_MAX];
	size_t label_count;
	struct {
		struct slice controller;
		char path[4096];
	} cgroups[CGROUPS_MAX];
	size_t cgroup_count;
	int pid;
	uint64_t start_time;
	bool joins_pids; /* of a namespace that is not its own, beyond its configuration */
};

enum status { STATUS_CREATED, STATUS_RUNNING, STATUS_PAUSED, STATUS_STOPPED };

struct configuration { /* what matters here of config.json as it was created with */
	bool own_pids, has_start_hooks, has_poststop_hooks;
};

bool decode_state(struct slice text, struct container *out);
bool decode_configuration(struct slice text, struct configuration *out);
bool load_container(const char *root, const char *id, struct container *out);
bool load_configuration(const struct container *container, struct configuration *out);
enum status status_of(const struct container *container);
int pidfd_of(const struct container *container);
bool has_executed(const struct container *container);
bool lock_container(const struct container *container);

/* --- commands: each returns the status to exit with, or HAND_OVER --- */
#define HAND_OVER (-1)
int print_state(const struct container *container);
int kill_container(const struct container *container, const char *signal);
int start_container(const struct container *container);
int delete_container(const struct container *container);
int execute(const struct container *container, const char *nsexec, bool detach, char **args);

/* --- prepared.c --- */
#define NOBODY_ELSE UINT32_MAX

struct exec_plan {	       /* exec.plan as runtime/prepared.py writes it */
	uint64_t identity[5];  /* of the bundle's config.json: device, inode, size, mtime and ctime in nanoseconds */
	uint32_t owner, group; /* of pipes, where the container has a user namespace, else NOBODY_ELSE */
	uint32_t uid, has_home;
	uint32_t env_count, env_size, plan_size;
	const char *plan, *env;
};

bool decode_exec_plan(struct slice file, struct exec_plan *out);
bool home_in(struct slice passwd, uint32_t uid, struct slice *home);
size_t nsexec_messages(const struct exec_plan *plan, struct slice home, char **args, char *out, size_t room);

/* --- channel.c --- */
struct process {
	pid_t pid;
	int pidfd;
};

bool launch(const struct container *container, const char *nsexec, struct slice messages, const int stdio[3],
	    struct process *out);

/* --- follow.c --- */
int follow(const struct process *process, int in, int out, int err);

/* --- points at which a test build (`make FAULTS=1`) is killed; the program that is shipped has none --- */
#ifdef FAULTS
#include <signal.h>
#include <stdlib.h>
#include <string.h>
static inline void fault_here(const char *name)
{
	const char *wanted = getenv("_CAISSON_FAULT");

	if (wanted != NULL && strcmp(wanted, name) == 0)
		raise(SIGKILL);
}
#define FAULT(name) fault_here(#name)
#else
#define FAULT(name) ((void)0)
#endif

#endif
