/* sys.h: system calls and constants without a musl wrapper or header (Linux 5.12 and later; raw syscall(2)). */
#ifndef NSEXEC_SYS_H
#define NSEXEC_SYS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* clone(2), unshare(2), setns(2) */
#define NS_TIME 0x00000080u
#define NS_MNT 0x00020000u
#define NS_CGROUP 0x02000000u
#define NS_UTS 0x04000000u
#define NS_IPC 0x08000000u
#define NS_USER 0x10000000u
#define NS_PID 0x20000000u
#define NS_NET 0x40000000u
#define NS_ALL (NS_TIME | NS_MNT | NS_CGROUP | NS_UTS | NS_IPC | NS_USER | NS_PID | NS_NET)
#define CLONE3_PIDFD 0x00001000ull
#define CLONE3_PARENT 0x00008000ull
#define CLONE3_INTO_CGROUP 0x200000000ull

struct clone3_args {
	uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size,
		cgroup;
};

/* openat2(2) */
#define RESOLVE_NO_XDEV 0x01u
#define RESOLVE_NO_MAGICLINKS 0x02u
#define RESOLVE_NO_SYMLINKS 0x04u
#define RESOLVE_BENEATH 0x08u
#define RESOLVE_IN_ROOT 0x10u

struct open_how_args {
	uint64_t flags, mode, resolve;
};

/* the mount API of Linux 5.2 and 5.12: open_tree, move_mount, fsopen, fsconfig, fsmount, mount_setattr */
#ifndef OPEN_TREE_CLONE /* defined by glibc, with which the fuzzer is built */
#define OPEN_TREE_CLONE 1u
#define FSOPEN_CLOEXEC 1u
#define FSMOUNT_CLOEXEC 1u
#endif
#define AT_RECURSIVE_FLAG 0x8000u
#define FSCONFIG_SET_FLAG 0u
#define FSCONFIG_SET_STRING 1u
#define FSCONFIG_CMD_CREATE 6u
#define FSCONFIG_CMD_RECONFIGURE 7u
#define FSPICK_CLOEXEC_FLAG 1u
#define FSPICK_EMPTY_PATH_FLAG 8u
#define MOVE_F_EMPTY_PATH 0x04u
#define MOVE_T_EMPTY_PATH 0x40u
#define ATTR_RDONLY 0x1ull
#define ATTR_NOSUID 0x2ull
#define ATTR_NODEV 0x4ull
#define ATTR_NOEXEC 0x8ull
#define ATTR_NOATIME 0x10ull
#define ATTR_STRICTATIME 0x20ull
#define ATTR_ATIME 0x70ull
#define ATTR_NODIRATIME 0x80ull
#define ATTR_NOSYMFOLLOW 0x200000ull
#define ATTR_IDMAP 0x100000ull

struct mount_attr_args {
	uint64_t attr_set, attr_clr, propagation, userns_fd;
};

/* netlink(7) */
#define NETLINK_ROUTE_FAMILY 0
#define NETLINK_HEADER 16u /* struct nlmsghdr */

/* statfs(2) f_type */
#define MAGIC_PROC 0x9fa0
#define MAGIC_DEVPTS 0x1cd1

/* capset(2), seccomp(2), keyctl(2) */
#define CAPABILITY_VERSION_3 0x20080522u
#define SECCOMP_MODE_FILTER_OP 1u
#define SECCOMP_NEW_LISTENER 8u
#define CAPABILITY_SYS_ADMIN (1ull << 21)
#define KEYCTL_JOIN_SESSION 1

static inline int sys_clone3(struct clone3_args *args)
{
	return (int)syscall(SYS_clone3, args, sizeof(*args));
}

static inline int sys_openat2(int dir, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve)
{
	struct open_how_args how = {.flags = flags, .mode = mode, .resolve = resolve};
	return (int)syscall(SYS_openat2, dir, path, &how, sizeof(how));
}

static inline int sys_open_tree(int dir, const char *path, unsigned flags)
{
	return (int)syscall(SYS_open_tree, dir, path, flags);
}

static inline int sys_move_mount(int from, int to)
{
	return (int)syscall(SYS_move_mount, from, "", to, "", MOVE_F_EMPTY_PATH | MOVE_T_EMPTY_PATH);
}

static inline int sys_fsopen(const char *type)
{
	return (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
}

static inline int sys_fspick(int fd)
{
	return (int)syscall(SYS_fspick, fd, "", FSPICK_CLOEXEC_FLAG | FSPICK_EMPTY_PATH_FLAG);
}

static inline int sys_fsconfig(int fs, unsigned command, const char *key, const char *value)
{
	return (int)syscall(SYS_fsconfig, fs, command, key, value, 0);
}

static inline int sys_fsmount(int fs, uint64_t attributes)
{
	return (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, (unsigned)attributes);
}

static inline int sys_mount_setattr(int dir, unsigned flags, const struct mount_attr_args *attr)
{
	return (int)syscall(SYS_mount_setattr, dir, "", flags, attr, sizeof(*attr));
}

static inline int sys_close_range(unsigned first, unsigned last)
{
	return (int)syscall(SYS_close_range, first, last, 0u);
}

#endif
