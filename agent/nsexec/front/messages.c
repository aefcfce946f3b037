/*
 * messages.c: build the messages for nsexec from exec.plan and the arguments.
 *
 * Python (libcontainer/plan) has already chosen the plan's steps from the bundle's current config.json; only the
 * program and its arguments are added here.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>

#include "../nsexec.h"
#undef FAULT
#include "front.h"

static const char PLAN_MAGIC[8] = {'C', 'A', 'I', 'S', 'E', 'X', 'E', '1'};
#define NUMBERS_SIZE (7 * sizeof(uint32_t))
#define HEADER_SIZE (sizeof(PLAN_MAGIC) + sizeof(struct identity) + NUMBERS_SIZE)
#define STRINGS_SIZE 12u /* a plan's last attribute: header, argc and envc */

bool decode_exec_plan(struct slice file, struct exec_plan *out)
{
	uint16_t last[2];
	const char *at = file.at + sizeof(PLAN_MAGIC);

	if (file.size < HEADER_SIZE || memcmp(file.at, PLAN_MAGIC, sizeof(PLAN_MAGIC)) != 0)
		return false;
	memcpy(&out->config, at, sizeof(out->config));
	memcpy(&out->owner, at + sizeof(out->config), NUMBERS_SIZE);
	out->plan = file.at + HEADER_SIZE;
	out->env = out->plan + out->plan_size;
	if (out->plan_size < STRINGS_SIZE || file.size - HEADER_SIZE < out->plan_size ||
	    file.size - HEADER_SIZE - out->plan_size != out->env_size)
		return false;
	memcpy(last, out->env - STRINGS_SIZE, sizeof(last));
	return last[0] == STRINGS_SIZE && last[1] == PLAN_STRINGS &&
	       (out->env_size == 0 ? out->env_count == 0 : out->env[out->env_size - 1] == '\0');
}

/* Find a user's home directory in a container's passwd(5), "/" if it has none; false if the file is unusual. */
bool home_in(struct slice passwd, uint32_t uid, struct slice *home)
{
	const char *end = passwd.at + passwd.size;
	char wanted[16];

	snprintf(wanted, sizeof(wanted), "%u", uid);
	home->at = "/";
	home->size = 1;
	for (size_t i = 0; i < passwd.size; i++)
		if ((unsigned char)passwd.at[i] >= 0x7f ||
		    ((unsigned char)passwd.at[i] < 0x20 && strchr("\n\t", passwd.at[i]) == NULL) ||
		    passwd.at[i] == '\0')
			return false;
	for (const char *line = passwd.at, *next; line < end; line = next) {
		struct slice fields[7];
		size_t count = 0;
		const char *stop = memchr(line, '\n', (size_t)(end - line));

		next = stop == NULL ? end : stop + 1;
		stop = stop == NULL ? end : stop;
		for (const char *at = line; count < ARRAY_SIZE(fields) && at <= stop; count++) {
			const char *colon = memchr(at, ':', (size_t)(stop - at));

			fields[count].at = at;
			fields[count].size = (size_t)((colon == NULL ? stop : colon) - at);
			at = colon == NULL ? stop + 1 : colon + 1;
		}
		if (count == ARRAY_SIZE(fields) && fields[2].size == strlen(wanted) &&
		    memcmp(fields[2].at, wanted, fields[2].size) == 0 && fields[5].size > 0) {
			*home = fields[5];
			return true;
		}
	}
	return true;
}

struct sheet {
	char *bytes;
	size_t used, room;
	bool full;
};

static void put(struct sheet *sheet, const void *data, size_t size)
{
	if (size > sheet->room - sheet->used) {
		sheet->full = true;
		return;
	}
	memcpy(sheet->bytes + sheet->used, data, size);
	sheet->used += size;
}

/* Write all three messages, back to back; return 0 if they do not fit. */
size_t nsexec_messages(const struct exec_plan *plan, struct slice home, char **args, char *out, size_t room)
{
	struct sheet sheet = {.bytes = out, .room = room};
	uint32_t counts[2] = {0, plan->env_count + (plan->has_home == 0)},
		 header[4] = {0, MESSAGE_STRINGS | 1u << 16, 1, 0};
	size_t start;

	while (args[counts[0]] != NULL)
		counts[0]++;
	put(&sheet, plan->plan, plan->plan_size - sizeof(counts));
	put(&sheet, counts, sizeof(counts));
	start = sheet.used;
	put(&sheet, header, sizeof(header));
	for (char **arg = args; *arg != NULL; arg++)
		put(&sheet, *arg, strlen(*arg) + 1);
	put(&sheet, plan->env, plan->env_size);
	if (plan->has_home == 0) {
		put(&sheet, "HOME=", 5);
		put(&sheet, home.at, home.size);
		put(&sheet, "", 1);
	}
	if (sheet.full)
		return 0;
	header[0] = (uint32_t)(sheet.used - start);
	memcpy(out + start, header, sizeof(header));
	return sheet.used;
}
