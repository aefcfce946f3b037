/*
 * front.h: declarations shared by the parts of the front.
 *
 * commands/caisson-oci starts the front first, with the Python interpreter's command line as its arguments.  The front
 * executes the simple forms of state, kill, start, delete and exec by itself, in a tenth of the time an interpreter
 * takes to start.  Anything it does not fully understand (an option, an unexpected state, any failure) it hands over:
 * it executes its arguments, and Python handles the whole command, with all messages and statuses.  That happens before
 * anything is changed, or where repeating the changes has the same result.
 *
 * It reads no JSON: Python has prepared all it needs to know about a container (agent/runtime/prepared.py).  These
 * files are bounded, and valid only as long as the files they were made from are unchanged.
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

/* --- files.c --- */
struct slice { /* of a file's contents */
	const char *at;
	size_t size;
};

#define READ_FLAGS (O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC) /* for what may not be a regular file */
bool read_whole(int fd, struct slice *out, char *room, size_t size);
bool read_found(int found, struct slice *out, char *room, size_t size);
bool read_file(int directory, const char *path, struct slice *out, char *room, size_t size);
bool write_all(int fd, const char *data, size_t size);

/* A file's identity: device, inode, size, mtime and ctime in nanoseconds. */
struct identity {
	uint64_t numbers[5];
};

bool is_same_file(int directory, const char *path, const struct identity *identity);

/* --- container.c --- */
#define FLAG_OWN_PIDS 1u       /* it has its own pid namespace: all processes end with the first */
#define FLAG_START_HOOKS 2u    /* it has startContainer or poststart hooks */
#define FLAG_POSTSTOP_HOOKS 4u /* it has poststop hooks */

struct container { /* front.state, written by runtime/prepared.py, and its directory */
	int directory;
	char path[4096];
	struct identity state; /* of state.json */
	uint64_t start_time;
	uint32_t pid, flags;
	struct slice before, after; /* the output of `state`: up to the pid, and from the status on */
	struct {
		char kind; /* 'f': with the freezer, 'u': version 2 */
		const char *path;
	} cgroups[CGROUPS_MAX]; /* the freezer is the last */
	size_t cgroup_count;
	const char *bundle;
};

enum status { STATUS_CREATED, STATUS_RUNNING, STATUS_PAUSED, STATUS_STOPPED };

bool decode_container(struct slice file, struct container *out);
bool load_container(const char *root, const char *id, struct container *out);
enum status status_of(const struct container *container);
int pidfd_of(const struct container *container);
bool has_executed(const struct container *container);
bool lock_container(const struct container *container);

/* --- commands: each returns the status to exit with, or HAND_OVER --- */
#define HAND_OVER (-1)
struct request {
	const char *nsexec;
	bool option; /* exec: --detach; delete: --force */
	char **args; /* after the id */
};

int print_state(const struct container *container, const struct request *request);
int kill_container(const struct container *container, const struct request *request);
int start_container(const struct container *container, const struct request *request);
int delete_container(const struct container *container, const struct request *request);
int execute(const struct container *container, const struct request *request);

/* --- messages.c --- */
#define NOBODY_ELSE UINT32_MAX

struct exec_plan {		/* exec.plan, written by runtime/prepared.py */
	struct identity config; /* of the bundle's config.json */
	uint32_t owner, group;	/* of pipes, in a user namespace; otherwise NOBODY_ELSE */
	uint32_t uid, has_home; /* if HOME is not set, it is looked up by uid */
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

/* --- points at which a test build (`make FAULTS=1`) is killed; release builds have none --- */
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
