/*
 * main.c: parse the options that the front understands, and dispatch the command.
 *
 *   caisson-oci PYTHON -I -S -c SCRIPT NAME PACKAGES [global options] COMMAND [options] ID [arguments]
 *
 * The user's command line follows PACKAGES; everything before it is the command to hand over to.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "front.h"

#define FIRST_ARGUMENT 8
#define ID_MAX 255
#define DEFAULT_ROOT "/run/runc"

struct call {
	const char *root, *log;
	bool systemd_cgroup;
	char **rest;
};

/* Return the value of the option `name`, from the same word or the next one; NULL for another word. */
static const char *value_of(const char *name, char ***word)
{
	const char *text = **word;
	size_t length = strlen(name);

	if (strncmp(text, name, length) != 0 || (text[length] != '=' && text[length] != '\0'))
		return NULL;
	if (text[length] == '=')
		return text + length + 1;
	if ((*word)[1] != NULL)
		++*word;
	return **word == text ? NULL : **word;
}

static bool read_globals(char **word, struct call *call)
{
	for (; *word != NULL && **word == '-'; word++) {
		const char *value;

		if ((value = value_of("--root", &word)) != NULL)
			call->root = value;
		else if ((value = value_of("--log", &word)) != NULL)
			call->log = value;
		else if ((value = value_of("--log-format", &word)) != NULL) {
			if (strcmp(value, "text") != 0 && strcmp(value, "json") != 0)
				return false;
		} else if (strcmp(*word, "--systemd-cgroup") == 0) {
			call->systemd_cgroup = true;
		} else {
			return false;
		}
	}
	call->rest = word;
	return *word != NULL;
}

/* Whether this is an absolute path in normal form. */
static bool is_plain_path(const char *path)
{
	size_t length = strlen(path);

	for (const char *at = path; (at = strchr(at, '/')) != NULL; at++)
		if (at[1] == '/' || (at[1] == '.' && (strchr("/.", at[2]) != NULL)))
			return false;
	return path[0] == '/' && length > 1 && length < PATH_MAX - ID_MAX - 2 && path[length - 1] != '/';
}

static bool is_id(const char *text)
{
	size_t length = strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+.-");

	return length > 0 && length <= ID_MAX && text[length] == '\0' && strcmp(text, ".") != 0 &&
	       strcmp(text, "..") != 0 && text[0] != '-';
}

/* Sockets and descriptors passed by a service manager, and closed standard streams, are left to Python. */
static bool is_plain_environment(void)
{
	for (int fd = 0; fd < 3; fd++)
		if (fcntl(fd, F_GETFD) < 0)
			return false;
	return getenv("NOTIFY_SOCKET") == NULL && getenv("LISTEN_PID") == NULL;
}

/* Every command creates the log, or fails if it is not writable; a command that succeeds writes nothing to it. */
static bool open_log(const char *path)
{
	int fd;

	if (path == NULL || path[0] == '\0')
		return true;
	fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_SYNC | O_CLOEXEC, 0644);
	if (fd < 0)
		return false;
	close(fd);
	return true;
}

static const char *nsexec_beside(const char *self)
{
	static char path[PATH_MAX];
	const char *named = getenv("CAISSON_NSEXEC"), *slash = strrchr(self, '/');

	if (named != NULL && named[0] != '\0')
		return named;
	if (slash == NULL ||
	    (size_t)snprintf(path, sizeof(path), "%.*snsexec", (int)(slash + 1 - self), self) >= sizeof(path))
		return NULL;
	return path;
}

static const struct command {
	const char *name, *option, *long_option; /* the only option allowed */
	size_t least, most;			 /* arguments after the id */
	bool cgroup_by_path;			 /* not if systemd manages the container's cgroup */
	int (*carry_out)(const struct container *container, const struct request *request);
} COMMANDS[] = {
	{"state", "", "", 0, 0, false, print_state},
	{"kill", "", "", 0, 1, false, kill_container},
	{"start", "", "", 0, 0, false, start_container},
	{"delete", "-f", "--force", 0, 0, true, delete_container},
	{"exec", "-d", "--detach", 1, SIZE_MAX, true, execute},
};

static size_t count_of(char **words)
{
	size_t count = 0;

	while (words[count] != NULL)
		count++;
	return count;
}

static int run(const char *self, const struct call *call)
{
	static struct container container;
	const struct command *command = COMMANDS;
	struct request request = {.nsexec = nsexec_beside(self)};
	char **words = call->rest + 1;

	while (strcmp(command->name, call->rest[0]) != 0)
		if (++command == COMMANDS + ARRAY_SIZE(COMMANDS))
			return HAND_OVER;
	if (words[0] != NULL &&
	    (strcmp(words[0], command->option) == 0 || strcmp(words[0], command->long_option) == 0)) {
		request.option = true;
		words++;
	}
	if (words[0] == NULL || !is_id(words[0]) || count_of(words + 1) < command->least ||
	    count_of(words + 1) > command->most || (command->cgroup_by_path && call->systemd_cgroup) ||
	    !is_plain_environment() || !load_container(call->root, words[0], &container) || !open_log(call->log))
		return HAND_OVER;
	request.args = words + 1;
	return command->carry_out(&container, &request);
}

int main(int argc, char **argv)
{
	struct call call = {.root = geteuid() == 0 && getenv("XDG_RUNTIME_DIR") == NULL ? DEFAULT_ROOT : ""};
	int status = HAND_OVER;

	if (argc < FIRST_ARGUMENT) {
		static const char usage[] = "caisson-oci is started by the script of that name\n";

		(void)!write(2, usage, sizeof(usage) - 1);
		return 1;
	}
	if (read_globals(argv + FIRST_ARGUMENT, &call) && is_plain_path(call.root))
		status = run(argv[0], &call);
	if (status != HAND_OVER)
		return status;
	execv(argv[1], argv + 1);
	dprintf(2, "%s: cannot be executed: %m\n", argv[1]);
	return 1;
}
