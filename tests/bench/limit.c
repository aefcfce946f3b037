/*
 * limit.c: the kernel's minimum for a container, in C, against which runtimes are measured.
 *
 *   limit exec PID ROUNDS PROGRAM      join all namespaces of PID, fork, execute, wait
 *   limit run ROOTFS ROUNDS PROGRAM    new namespaces, the usual mounts, pivot_root, execute, wait
 *
 * Prints the microseconds of each round.  No checks, no hardening, no limits: not a runtime.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NAMESPACES (CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET)

static const char *program;

static void need(int ok, const char *what)
{
	if (ok)
		return;
	perror(what);
	_exit(127);
}

static void execute(void)
{
	char *const argv[] = {(char *)program, NULL}, *const envp[] = {NULL};

	execve(program, argv, envp);
	need(0, program);
}

static void join(const char *target)
{
	int fd = (int)syscall(SYS_pidfd_open, atoi(target), 0);
	pid_t child;

	need(fd >= 0 && setns(fd, NAMESPACES) == 0, "setns");
	child = fork();
	need(child >= 0, "fork");
	if (child == 0)
		execute();
	waitpid(child, NULL, 0);
	_exit(0);
}

static void enter(const char *root)
{
	need(mount("", "/", NULL, MS_SLAVE | MS_REC, NULL) == 0, "propagation");
	need(mount(root, root, NULL, MS_BIND | MS_REC, NULL) == 0 && chdir(root) == 0, "root");
	need(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0, "proc");
	need(mount("tmpfs", "dev", "tmpfs", MS_NOSUID, "mode=755,size=64k") == 0, "dev");
	need(mkdir("dev/pts", 0755) == 0 && mkdir("dev/shm", 01777) == 0, "mkdir");
	need(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620") == 0, "pts");
	need(mount("shm", "dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=64k") == 0, "shm");
	need(mount("sysfs", "sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, NULL) == 0, "sys");
	need(syscall(SYS_pivot_root, ".", ".") == 0 && umount2(".", MNT_DETACH) == 0 && chdir("/") == 0, "pivot_root");
	execute();
}

int main(int argc, char **argv)
{
	int rounds = argc == 5 ? atoi(argv[3]) : 0;

	if (rounds < 1)
		return 2;
	program = argv[4];
	for (int i = 0; i < rounds; i++) {
		struct timespec from, to;
		pid_t child;

		clock_gettime(CLOCK_MONOTONIC, &from);
		if (strcmp(argv[1], "exec") == 0) {
			child = fork();
			if (child == 0)
				join(argv[2]);
		} else {
			child = (pid_t)syscall(SYS_clone, NAMESPACES | SIGCHLD, NULL, NULL, NULL, NULL);
			if (child == 0)
				enter(argv[2]);
		}
		need(child > 0 && waitpid(child, NULL, 0) == child, "child");
		clock_gettime(CLOCK_MONOTONIC, &to);
		printf("%ld\n", (to.tv_sec - from.tv_sec) * 1000000 + (to.tv_nsec - from.tv_nsec) / 1000);
		fflush(stdout);
	}
	return 0;
}
