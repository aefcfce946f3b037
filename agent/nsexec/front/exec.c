/* exec.c: `exec` a program with the process settings of the bundle's config.json, as runtime/execute.py does. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../sys.h"
#include "front.h"

#define MESSAGES_MAX (1u << 20)

static bool is_unchanged(const struct container *container, const struct exec_plan *plan)
{
	int bundle = open(container->bundle, O_PATH | O_DIRECTORY | O_CLOEXEC);

	return bundle >= 0 && is_same_file(bundle, "config.json", &plan->config);
}

/* Find the home directory in the container's passwd(5), resolved inside its root. */
static bool find_home(const struct container *container, uint32_t uid, struct slice *home)
{
	static char text[FILE_MAX_SIZE];
	char path[32];
	struct slice passwd = {.at = ""};
	int root, found;

	snprintf(path, sizeof(path), "/proc/%u/root", container->pid);
	root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root < 0)
		return false;
	found = sys_openat2(root, "etc/passwd", O_PATH | O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
	if (found < 0 && errno != ENOENT)
		return false;
	return (found < 0 || read_found(found, &passwd, text, sizeof(text))) && home_in(passwd, uid, home);
}

static bool make_pipes(const struct exec_plan *plan, int own[3], int theirs[3])
{
	for (int i = 0; i < 3; i++) {
		int ends[2];

		if (pipe2(ends, O_CLOEXEC) < 0)
			return false;
		own[i] = ends[i == 0];
		theirs[i] = ends[i != 0];
		if (plan->owner != NOBODY_ELSE && fchown(theirs[i], plan->owner, plan->group) < 0)
			return false;
	}
	return true;
}

int execute(const struct container *container, const struct request *request)
{
	static char file[FILE_MAX_SIZE], bytes[MESSAGES_MAX];
	int own[3], theirs[3] = {0, 1, 2};
	enum status status = status_of(container);
	struct process process;
	struct slice text, home = {.at = "", .size = 0}, messages = {.at = bytes};
	struct exec_plan plan;

	if ((status != STATUS_RUNNING && status != STATUS_CREATED) ||
	    !read_file(container->directory, "exec.plan", &text, file, sizeof(file)) ||
	    !decode_exec_plan(text, &plan) || !is_unchanged(container, &plan) ||
	    (plan.has_home == 0 && !find_home(container, plan.uid, &home)))
		return HAND_OVER;
	messages.size = nsexec_messages(&plan, home, request->args, bytes, sizeof(bytes));
	if (messages.size == 0 || (!request->option && !make_pipes(&plan, own, theirs)) ||
	    !launch(container, request->nsexec, messages, theirs, &process))
		return HAND_OVER;
	if (request->option)
		return 0;
	for (int i = 0; i < 3; i++)
		close(theirs[i]);
	return follow(&process, own[0], own[1], own[2]);
}
