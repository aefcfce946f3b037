/* look.c: print the `state`, as runtime/inspect.py does. */
#include <stdio.h>

#include "front.h"

static const char *const NAMES[] = {"created", "running", "paused", "stopped"};

int print_state(const struct container *container, const struct request *request)
{
	static char text[FILE_MAX_SIZE + 64];
	enum status status = status_of(container);
	int size =
		snprintf(text, sizeof(text), "%.*s\"pid\": %u,\n  \"status\": \"%s\"%.*s", (int)container->before.size,
			 container->before.at, status == STATUS_STOPPED ? 0 : container->pid, NAMES[status],
			 (int)container->after.size, container->after.at);

	(void)request;
	return write_all(1, text, (size_t)size) ? 0 : HAND_OVER;
}
