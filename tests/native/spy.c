/*
 * spy.c: a container process that tries to reach the guest through every other process it sees, as fast as it can,
 * until SIGTERM (see CVE-2016-9962).  It prints each kind of object it reached once per process name, then counters.
 *
 * For each process it tries root, cwd, exe, fd/N, maps and mem.  Other containers' root and cwd are the spy's own "/",
 * as they share it; an empty directory is the pause process's root.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static volatile sig_atomic_t over;
static struct stat home;
static unsigned long rounds, seen, denied;
static char told[256][96];
static unsigned told_count;
static char comm[64];
static unsigned long long allowed_caps;

static void stop(int number)
{
	(void)number;
	over = 1;
}

static void tell(const char *what, const char *detail)
{
	char line[96];

	snprintf(line, sizeof(line), "%s %s %s", what, comm, detail);
	for (unsigned i = 0; i < told_count; i++)
		if (strcmp(told[i], line) == 0)
			return;
	if (told_count < 256) {
		strcpy(told[told_count++], line);
		puts(line);
		fflush(stdout);
	}
}

static int refused(void)
{
	if (errno == EACCES || errno == EPERM)
		denied++;
	return -1;
}

static void directory(const char *pid, const char *name)
{
	char path[64];
	struct stat st;
	DIR *dir;
	struct dirent *entry;
	int entries = 0;

	snprintf(path, sizeof(path), "/proc/%s/%s", pid, name);
	if (stat(path, &st) < 0) {
		refused();
		return;
	}
	if (st.st_dev == home.st_dev && st.st_ino == home.st_ino)
		return;
	if ((dir = opendir(path)) != NULL) {
		while ((entry = readdir(dir)) != NULL)
			entries += strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0;
		closedir(dir);
	}
	tell(entries == 0 ? "empty" : "outside", name);
}

static void program(const char *pid)
{
	char path[64], link[64] = "";
	int fd;

	snprintf(path, sizeof(path), "/proc/%s/exe", pid);
	if (readlink(path, link, sizeof(link) - 1) < 0) {
		refused();
		return;
	}
	if (strncmp(link, "/memfd:", 7) != 0)
		return;
	tell("exe", link);
	fd = open(path, O_WRONLY);
	if (fd >= 0)
		tell("exe-to-write", link);
	else if (errno != ETXTBSY && errno != ENOENT)
		refused();
	if (fd >= 0)
		close(fd);
}

static void descriptors(const char *pid)
{
	char path[96], link[64];
	struct dirent *entry;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%s/fd", pid);
	if ((dir = opendir(path)) == NULL) {
		refused();
		return;
	}
	while ((entry = readdir(dir)) != NULL) {
		ssize_t length;

		if (!isdigit((unsigned char)entry->d_name[0]) || atoi(entry->d_name) < 3)
			continue;
		snprintf(path, sizeof(path), "/proc/%s/fd/%.20s", pid, entry->d_name);
		length = readlink(path, link, sizeof(link) - 1);
		if (length < 0)
			continue;
		link[length] = '\0';
		link[strcspn(link, "[")] = '\0';
		tell("fd", link);
	}
	closedir(dir);
}

static void memory(const char *pid)
{
	char path[64], line[256];
	FILE *maps;
	int fd;

	snprintf(path, sizeof(path), "/proc/%s/maps", pid);
	if ((maps = fopen(path, "r")) == NULL) {
		refused();
		return;
	}
	if (fgets(line, sizeof(line), maps) != NULL && strstr(line, "memfd:nsexec") != NULL) {
		tell("maps", "nsexec");
		snprintf(path, sizeof(path), "/proc/%s/mem", pid);
		if ((fd = open(path, O_RDWR)) >= 0) {
			tell("mem", "nsexec");
			close(fd);
		}
	}
	fclose(maps);
}

/* A process that can be traced can be controlled by the spy: it must not have more privileges. */
static void rights(const char *pid)
{
	char path[64], line[128];
	FILE *status;

	snprintf(path, sizeof(path), "/proc/%s/status", pid);
	if ((status = fopen(path, "r")) == NULL)
		return;
	comm[0] = '\0';
	while (fgets(line, sizeof(line), status) != NULL) {
		if (sscanf(line, "Name:\t%60[^\n]", comm) == 1)
			seen += strncmp(comm, "nsexec", 6) == 0;
		else if (strncmp(line, "CapPrm:", 7) == 0 && (strtoull(line + 7, NULL, 16) & ~allowed_caps) != 0)
			tell("rights", "beyond a container's");
	}
	fclose(status);
}

int main(int argc, char **argv)
{
	char self[16];
	struct dirent *entry;
	DIR *proc;

	allowed_caps = argc > 1 ? strtoull(argv[1], NULL, 16) : 0;
	snprintf(self, sizeof(self), "%d", getpid());
	signal(SIGTERM, stop);
	if (stat("/", &home) < 0 || (proc = opendir("/proc")) == NULL)
		return 1;
	puts("ready");
	fflush(stdout);
	while (!over) {
		rewinddir(proc);
		rounds++;
		while ((entry = readdir(proc)) != NULL) {
			if (!isdigit((unsigned char)entry->d_name[0]) || strcmp(entry->d_name, self) == 0)
				continue;
			rights(entry->d_name);
			directory(entry->d_name, "root");
			directory(entry->d_name, "cwd");
			program(entry->d_name);
			descriptors(entry->d_name);
			memory(entry->d_name);
		}
	}
	printf("counted rounds=%lu nsexec=%lu denied=%lu\n", rounds, seen, denied);
	return 0;
}
