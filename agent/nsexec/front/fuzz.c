/*
 * fuzz.c: fuzz the files that the front reads: the first byte selects the kind of file, the rest is its contents.
 *
 * With clang by libFuzzer; with gcc (-DSTANDALONE) by a mutator: ROUNDS SEED FILE…; with 0 rounds each file is tried
 * unchanged, and all must be accepted.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "container.c"
#include "files.c"
#include "messages.c"

static long accepted;

/* Read every byte of an accepted slice: it must lie within the file. */
static void touch(struct slice text)
{
	static volatile char last;

	for (size_t i = 0; i < text.size; i++)
		last = text.at[i];
	(void)last;
}

static bool try_container(struct slice file)
{
	static struct container container;

	memset(&container, 0, sizeof(container));
	if (!decode_container(file, &container))
		return false;
	touch(container.before);
	touch(container.after);
	touch((struct slice){.at = container.bundle, .size = strlen(container.bundle)});
	for (size_t i = 0; i < container.cgroup_count; i++)
		touch((struct slice){.at = container.cgroups[i].path, .size = strlen(container.cgroups[i].path)});
	return true;
}

static bool try_plan(struct slice file)
{
	static char room[1 << 17];
	char *args[] = {"program", "argument", NULL};
	struct exec_plan plan;

	return decode_exec_plan(file, &plan) && nsexec_messages(&plan, file, args, room, sizeof(room)) > 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct slice file = {.at = (const char *)data + 1, .size = size - 1}, home;
	bool good = false;

	if (size < 1)
		return 0;
	switch (data[0]) {
	case 'S':
		good = try_container(file);
		break;
	case 'P':
		good = try_plan(file);
		break;
	case 'H':
		good = home_in(file, 7, &home);
		if (good)
			touch(home);
		break;
	}
	accepted += good;
	return 0;
}

#ifdef STANDALONE
int main(int argc, char **argv)
{
	static uint8_t input[1u << 16];
	long rounds = argc < 4 ? -1 : atol(argv[1]);

	if (rounds < 0)
		return 2;
	srandom((unsigned)atol(argv[2]));
	for (long round = 0; round < (rounds == 0 ? argc - 3 : rounds); round++) {
		FILE *file = fopen(argv[3 + round % (argc - 3)], "rb");
		size_t size = file == NULL ? 0 : fread(input, 1, sizeof(input), file);
		uint8_t *exact;

		if (file != NULL)
			fclose(file);
		for (long changes = rounds == 0 ? 0 : random() % 6; changes > 0 && size > 1; changes--)
			input[1 + (size_t)random() % (size - 1)] = (uint8_t)random();
		if (rounds != 0 && random() % 8 == 0)
			size = (size_t)random() % (size + 1);
		exact = malloc(size + 1); /* so that reading one byte too far is detected */
		memcpy(exact, input, size);
		LLVMFuzzerTestOneInput(exact, size);
		free(exact);
	}
	printf("%ld accepted\n", accepted);
	return accepted == 0;
}
#endif
