/*
 * nsexec.h: declarations shared by the parts of nsexec.
 *
 * The runtime (libcontainer, in Python) starts nsexec once for each process of a container.  nsexec reads three
 * messages from the init socket (bootstrap, plan, argv and envp), joins and creates namespaces, executes the plan's
 * steps in order and becomes the container's process.  The runtime decides policy; nsexec only executes.  It allocates
 * no memory, parses no text except numbers in its environment and id maps, and exits at the first failure, reported as
 * {step, path, errno}.
 */
#ifndef NSEXEC_H
#define NSEXEC_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "faults.h"
#include "sys.h"

#define NORETURN _Noreturn
#define PRINTF(text, first) __attribute__((__format__(__printf__, text, first)))
#define DEFAULT_UMASK 022u
#define CGROUPS_MAX 16 /* more than cgroup v1 has controllers */
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* --- descriptors passed by the runtime; -1 if absent --- */
struct channels {
	int init;     /* stream socket: messages down, pids up */
	int sync;     /* seqpacket socket: progress and errors up; EOF after execve */
	int log;      /* pipe: JSON lines up */
	int console;  /* stream socket: the pty master up */
	int fifo;     /* O_PATH exec.fifo, on which an init waits to be started */
	int gate;     /* listening socket used instead of the fifo in a joined pid namespace */
	int reported; /* pipe: the fork server has reported this process's pid */
	int cgroup;   /* cgroup v2 directory to start in */
	int cgroup_procs
		[CGROUPS_MAX]; /* cgroup.procs of cgroup v1, joined before anything is created; -1 after the last */
	int pidfd;	       /* process whose namespaces to join */
	int procfs;	       /* O_PATH directory on which the pause process mounts procfs of its pid namespace */
	bool joins;	       /* an exec into a container, rather than its init */
	bool pauses;	       /* the pause process: an init that runs no program */
	uint32_t namespaces;   /* NS_* in which the fork server has cloned this process as stage 2; else 0 */
	unsigned first_closed; /* descriptors from 3 up to this one, exclusive, belong to the program */
};

/* --- report.c --- */
void report_to(int sync, int log, int level);
void report_stage(int stage);
void log_debug(const char *text, const char *detail);
void log_close(void);
#define PROGRESS_READY "procReady" /* everything is set up; only execve is left */
#define PROGRESS_HOOKS "procHooks" /* the runtime may run its hooks; nsexec waits for one byte */
void report_progress(const char *what);
void report_started(int gate);
void report_listener(int fd); /* "procSeccomp": the filter's listener, as numbered here; nsexec waits for one byte */
void report_to_stderr_if_closed(void);
/* Pass a descriptor with one message over a stream socket.  Return 0, or -1 and errno; the descriptor, or -1. */
int send_descriptor(int socket, const void *data, size_t size, int fd);
int receive_descriptor(int socket, void *data, size_t size);
/* Report {step, path, error} with a reason ("": strerror(error) is enough); `fail`: formatted, or NULL, and exit. */
void report_error(int error, const char *step, const char *path, const char *why);
NORETURN void fail(int error, const char *step, const char *path, const char *format, ...) PRINTF(4, 5);
#define fail_errno(...) fail(errno, __VA_ARGS__)

/* --- tlv.c --- */
#define MESSAGE_BOOTSTRAP 62000
#define MESSAGE_PLAN 62001
#define MESSAGE_STRINGS 62002

struct attribute {
	uint16_t type;
	size_t size; /* of the payload */
	const uint8_t *data;
};

struct cursor {
	const uint8_t *at, *end;
};

struct inbox { /* all messages, back to back; pages never written to cost nothing */
	size_t used;
	_Alignas(8) uint8_t bytes[4u << 20];
};

struct cursor read_message(struct inbox *inbox, int fd, uint16_t type, size_t limit);
bool next_attribute(struct cursor *cursor, struct attribute *out);
uint32_t attribute_u32(const struct attribute *a);
bool attribute_bool(const struct attribute *a);
const char *attribute_text(const struct attribute *a);
void read_bytes(struct cursor *cursor, void *into, size_t size, const char *what);
const char *read_text(struct cursor *cursor, const char *what);
void read_end(const struct cursor *cursor, const char *what);
struct cursor attribute_cursor(const struct attribute *a);

/* --- plan.c --- */
struct bootstrap {
	uint32_t create;   /* NS_* to create */
	uint32_t join;	   /* NS_* to join from the pidfd */
	const char *paths; /* "type:path,…" to join */
	const char *uid_map, *gid_map, *oom_score_adj, *time_offsets;
	const char *uid_map_program, *gid_map_program; /* newuidmap and newgidmap, for an unprivileged runtime */
	bool setgroups, keep_keyring;
};

/* Steps of a plan (its attribute types), in order of execution; those marked * may be repeated. */
enum {
	PLAN_VERSION = 27400,
	PLAN_PROPAGATION,
	PLAN_ROOTFS,
	PLAN_MOUNT,   /* * */
	PLAN_DEVICE,  /* * */
	PLAN_SYMLINK, /* * */
	PLAN_HOOK_STATE,
	PLAN_RUNTIME_HOOKS,
	PLAN_NETLINK,	  /* * */
	PLAN_CREATE_HOOK, /* * */
	PLAN_PIVOT,
	PLAN_ROOT_PROPAGATION,
	PLAN_CONSOLE,
	PLAN_REMOUNT, /* * */
	PLAN_ROOT_READONLY,
	PLAN_HOSTNAME,
	PLAN_DOMAINNAME,
	PLAN_SYSCTL,   /* * */
	PLAN_READONLY, /* * */
	PLAN_MASK,     /* * */
	PLAN_UMASK,
	PLAN_RLIMIT, /* * */
	PLAN_CPUS,
	PLAN_FINAL_CPUS,
	PLAN_SCHEDULER,
	PLAN_IO_PRIORITY,
	PLAN_PERSONALITY,
	PLAN_MEMORY_POLICY,
	PLAN_LABEL,
	PLAN_NO_NEW_PRIVS,
	PLAN_SECCOMP,
	PLAN_GROUPS, /* * */
	PLAN_USER,
	PLAN_CAPABILITIES,
	PLAN_CWD,
	PLAN_START_HOOK, /* * */
	PLAN_STRINGS,
	PLAN_END
};
#define PLAN_FORMAT 1
#define PIVOT_ROOT 0u
#define PIVOT_MOVE 1u	  /* MS_MOVE and chroot(2) instead of pivot_root(2) */
#define PIVOT_CHROOT 2u	  /* chroot(2) alone, in the runtime's own mount namespace */
#define GROUPS_MAX 65536  /* the kernel's NGROUPS_MAX; musl's is 32 */
#define CPU_MASK_MAX 1024 /* bytes */
#define SCHEDULER_SIZE 48 /* SCHED_ATTR_SIZE_VER0 */

#define MOUNT_BIND 1u		  /* the source is a path */
#define MOUNT_RECURSIVE 2u	  /* including submounts */
#define MOUNT_ORDINARY_DIR 4u	  /* the target must be a directory reached without a symbolic link */
#define MOUNT_OVER_PROC_FILE 8u	  /* the target may be a regular file in procfs, and nothing else */
#define MOUNT_COPY_UP 16u	  /* a tmpfs starts with the contents of the directory it covers */
#define MOUNT_IDMAP 32u		  /* id-mapped */
#define MOUNT_IDMAP_RECURSIVE 64u /* … including submounts */
#define MOUNT_REMOUNT 128u	  /* clear flags that are not given; without MOUNT_BIND, change the existing mount */
#define MOUNT_IN_CHILD 256u	  /* procfs of the pid namespace that this process's children are in */

struct mount_step {
	uint32_t flags, propagation;
	uint64_t set, clear, recursive_set, recursive_clear; /* MOUNT_ATTR_* */
	const char *target, *source, *type, *uid_map,
		*gid_map;      /* maps as in /proc/PID/uid_map; "" for those of the joined user namespace */
	struct cursor options; /* "key" or "key=value", each NUL-terminated */
};

struct device_step {
	uint32_t mode, major, minor, uid, gid, bind;
	const char *path;
};

struct link_step {
	uint32_t replace;
	const char *target, *path;
};

struct rlimit_step {
	uint32_t resource, reserved;
	uint64_t soft, hard;
};

struct netlink_step {
	const char *interface;
	struct cursor request; /* struct nlmsghdr and payload; nsexec fills in the interface index */
};

struct hook_step {
	uint32_t timeout, argc, envc; /* timeout in seconds; 0 waits forever */
	const char *path;
	struct cursor strings; /* argv, then envp */
};

struct capability_sets {
	uint64_t bounding, effective, permitted, inheritable, ambient;
};

struct console_step {
	uint16_t rows, columns;
	uint32_t bind;
};

struct plan {
	struct cursor steps; /* all attributes, validated */
	bool has_user, has_capabilities, has_umask, no_new_privs, has_console, has_sysctl;
	bool slave_root;    /* mounts may propagate from the host into the container's root */
	bool shares_mounts; /* the container stays in the runtime's mount namespace */
	uint32_t umask, uid, gid;
	size_t group_count; /* in all PLAN_GROUPS */
	struct capability_sets capabilities;
	struct console_step console;
	const uint8_t *cpus, *final_cpus; /* masks of whole words; NULL if not given */
	size_t cpus_size, final_cpus_size;
	const uint8_t *scheduler; /* struct sched_attr */
	bool has_io_priority, has_personality;
	uint32_t io_priority, personality;
	uint32_t memory_policy;
	const uint8_t *memory_nodes; /* a mask of whole words, NULL if there is no policy */
	size_t memory_nodes_size;
	const char *label_file, *label; /* a file below /proc/thread-self/attr, and its new content */
	const uint8_t *filter;		/* struct sock_filter, after a uint32_t of flags */
	size_t filter_size;
	const char *cwd, *hook_state; /* the state as JSON, without the members nsexec appends */
	char **argv, **envp;
	size_t vectors_size; /* bytes mapped for both */
};

void decode_bootstrap(struct cursor message, struct bootstrap *out);
void decode_plan(struct cursor message, bool joins, struct plan *out);
void decode_strings(struct cursor message, const struct plan *plan);
void decode_mount(const struct attribute *a, struct mount_step *out);
void decode_device(const struct attribute *a, struct device_step *out);
void decode_link(const struct attribute *a, struct link_step *out);
void decode_rlimit(const struct attribute *a, struct rlimit_step *out);
void decode_hook(const struct attribute *a, struct hook_step *out);
void decode_netlink(const struct attribute *a, struct netlink_step *out);
void decode_pair(const struct attribute *a, const char **first, const char **second);
void decode_remount(const struct attribute *a, uint64_t *set, const char **path);

#define SOURCES_MAX 512 /* mounts in a plan */

/* State passed from stage to stage.  Stages are cloned without CLONE_VM, so each has its own copy. */
struct context {
	struct channels fds;
	struct bootstrap boot;
	struct plan plan;
	struct handles {
		int root;      /* O_PATH of the container's "/" */
		int processes; /* private procfs with subset=pid, -1 if not needed */
		int sysctl;    /* private full procfs, -1 if not needed */
	} handles;
	int sources[SOURCES_MAX];  /* of the plan's mounts, opened by stage 0; else -1 */
	int mappings[SOURCES_MAX]; /* user namespaces to map sources opened by stage 2; else -1 */
	int source_server;	   /* socket to the process that maps sources for an unprivileged stage 2; else -1 */
	const char *program;	   /* argv[0] as found in PATH */
	bool filtered;		   /* the seccomp filter is active */
	bool has_userns;	   /* the container has a user namespace, created or joined */
};

/* --- nsexec.c --- */
uint32_t namespaces_from_environment(void); /* of channels */
int descriptor_from(const char *name); /* number in an environment variable, close-on-exec from now on; -1 if not set */
int try_clone_sibling(uint32_t namespaces, int cgroup, int *pidfd); /* as clone(2); -1 and errno */
int send_stage(int init, int stage1, int stage2, int pidfd);	    /* 0, or -1 and errno */

/* --- server.c --- */
/* Return in each requested process a pipe to wait at until its pid is reported; the server exits with the runtime. */
int serve(int control);

/* --- namespaces.c --- */
struct namespace_file {
	int fd;
	uint32_t flag;
	const char *name;
	bool joined;
};
#define NAMESPACES 8

struct namespace_files {
	struct namespace_file list[NAMESPACES];
	size_t count;
};

bool joins_by_path(const struct bootstrap *boot, uint32_t flag); /* whether the list of paths includes that type */
void open_namespaces(const struct bootstrap *boot, struct namespace_files *files);
void join_namespaces(struct context *ctx, struct namespace_files *files);
void become_root_of_namespace(const struct plan *plan);
void write_proc(const char *step, int pid, const char *file, const char *text);
void write_id_maps(const struct bootstrap *boot, int pid);
void bring_loopback_up(void);
void request_netlink(const struct netlink_step *step);

/* --- paths.c: every container path is resolved inside its root --- */
int open_in(int root, const char *path, int flags, uint64_t resolve);
int make_directory_in(int root, const char *path, unsigned mode);
int make_target_in(int root, const char *path, bool directory);
bool split_path(const char *path, char parent[PATH_MAX], char name[NAME_MAX + 1]);
int open_verified_null(int root);
bool is_null_device(int fd);

/* --- rootfs.c --- */
void build_rootfs(struct context *ctx);

/* --- mounts.c --- */
int private_procfs(bool processes_only);
void attach_rootfs(const char *path, int *root, unsigned long propagation);
int do_mount(int root, const struct mount_step *step, int source, bool locked);
int clone_mount(int fd, const char *step, const char *path, bool recursive);
void set_attributes(int fd, uint64_t set, uint64_t clear, bool recursive, const char *step, const char *path);

/* --- sources.c --- */
int open_source(const struct mount_step *step, bool must);
int open_late_source(struct context *ctx, const struct mount_step *step, size_t index);
void open_sources(struct context *ctx, int joined_userns);

/* --- copyup.c --- */
void copy_up(int covered, int mount, const char *path);

/* --- scheduling.c --- */
void set_initial_cpus(const struct plan *plan);
bool scheduler_is_lost_by_clone(const struct plan *plan);
void set_scheduling(const struct plan *plan, bool before_clone);

/* --- console.c --- */
void set_controlling_terminal(void);
void open_console(int root, const struct console_step *console, int socket);
void replace_null_stdio(int root);

/* --- hooks.c --- */
void run_hooks(const struct context *ctx, uint16_t type, int cwd);
void wait_for_runtime_hooks(int sync);

/* --- process.c --- */
void close_all_but(unsigned from, const int *kept, size_t count);
void raise_hard_limits(const struct plan *plan);
void wait_for_runtime(int sync);
void set_limits(const struct plan *plan);
void prepare_process(struct context *ctx, bool before_clone);
int load_filter(const struct plan *plan);
void load_early_filter(struct context *ctx);
NORETURN void run_program(struct context *ctx);

/* --- pause.c --- */
void attach_pause_procfs(int target);
NORETURN void pause_main(int sync);

#endif
