/*
 * front.h: declarations shared by the parts of the front.
 *
 * The front is what commands/caisson-oci starts first, with the command line of the interpreter as its arguments.  It
 * carries out the plain forms of state, kill, start, delete and exec by itself, in a tenth of the time that an
 * interpreter takes to start.  Whatever it does not understand completely (an option, a surprising state, any failure)
 * it hands over: it executes its arguments, and Python does it all, with every text and status.  That happens before
 * anything was changed, or where what was changed would be done again to the same end.
 *
 * What it knows of a container Python has written for it (agent/runtime/prepared.py): it reads no JSON.  What it reads
 * is bounded, and good only as long as the files that it was made from are the same.
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
struct slice { /* of a file that was read */
	const char *at;
	size_t size;
};

#define READ_FLAGS (O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC) /* of what may not be a file */
bool read_whole(int fd, struct slice *out, char *room, size_t size);
bool read_file(int directory, const char *path, struct slice *out, char *room, size_t size);
bool write_all(int fd, const char *data, size_t size);

/* Which file it is: device, inode, size, mtime and ctime in nanoseconds. */
struct identity {
	uint64_t numbers[5];
};

bool is_same_file(int directory, const char *path, const struct identity *identity);

/* --- container.c --- */
#define FLAG_OWN_PIDS 1u       /* its pid namespace is its own: all in it end with the first process */
#define FLAG_START_HOOKS 2u    /* it has startContainer or poststart hooks */
#define FLAG_POSTSTOP_HOOKS 4u /* it has poststop hooks */

struct container { /* front.state as runtime/prepared.py writes it, and where it was found */
	int directory;
	char path[4096];
	struct identity state; /* of state.json */
	uint64_t start_time;
	uint32_t pid, flags;
	struct slice before, after; /* the answer of `state`, up to the pid and from the status on */
	struct {
		char kind; /* 'f' has the freezer, 'u' is of version 2 */
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

struct exec_plan {		/* exec.plan as runtime/prepared.py writes it */
	struct identity config; /* of the bundle's config.json */
	uint32_t owner, group;	/* of pipes, in a user namespace; else NOBODY_ELSE */
	uint32_t uid, has_home; /* without HOME it is that of the uid */
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
