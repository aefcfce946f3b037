/* look.c: `state`, as runtime/inspect.py prints it. */
#include <stdio.h>
#include <string.h>

#include "front.h"

static const char *const NAMES[] = {"created", "running", "paused", "stopped"};

struct answer {
	char text[2 * FILE_MAX_SIZE];
	size_t used;
};

static void put(struct answer *answer, const char *text, size_t size)
{
	memcpy(answer->text + answer->used, text, size); /* it is never longer than state.json, twice */
	answer->used += size;
}

static void put_text(struct answer *answer, const char *text)
{
	put(answer, text, strlen(text));
}

static void put_member(struct answer *answer, const char *key, struct slice value)
{
	put_text(answer, key);
	put_text(answer, ": \"");
	put(answer, value.at, value.size);
	put_text(answer, "\",\n");
}

static void put_annotations(struct answer *answer, const struct container *container)
{
	if (container->label_count > 0)
		put_text(answer, "  \"annotations\": {\n");
	for (size_t i = 0; i < container->label_count; i++) {
		struct slice label = container->labels[i];
		const char *equals = memchr(label.at, '=', label.size);
		size_t key = equals == NULL ? label.size : (size_t)(equals - label.at);

		put_text(answer, "    \"");
		put(answer, label.at, key);
		put_text(answer, "\": \"");
		if (equals != NULL)
			put(answer, equals + 1, label.size - key - 1);
		put_text(answer, i + 1 < container->label_count ? "\",\n" : "\"\n  },\n");
	}
}

int print_state(const struct container *container)
{
	static struct answer answer;
	enum status status = status_of(container);
	const char *name = NAMES[status];
	char pid[32];

	snprintf(pid, sizeof(pid), "  \"pid\": %d,\n", status == STATUS_STOPPED ? 0 : container->pid);
	put_text(&answer, "{\n");
	put_member(&answer, "  \"ociVersion\"", container->version);
	put_member(&answer, "  \"id\"", container->id);
	put_text(&answer, pid);
	put_member(&answer, "  \"status\"", (struct slice){.at = name, .size = strlen(name)});
	put_member(&answer, "  \"bundle\"", container->bundle);
	put_member(&answer, "  \"rootfs\"", container->rootfs);
	put_member(&answer, "  \"created\"", container->created);
	put_annotations(&answer, container);
	put_text(&answer, "  \"owner\": \"\"\n}");
	write_all(1, answer.text, answer.used);
	return 0;
}
