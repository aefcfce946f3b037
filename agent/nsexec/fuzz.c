/*
 * fuzz.c: fuzz the parser of bootstrap and plan with libFuzzer, AddressSanitizer and UBSan (`make fuzz`), or, with
 * -DSTANDALONE, with a built-in mutator for machines that have only gcc (`make fuzz-gcc`).  No plan is executed.
 *
 * Input: one byte (1: an exec's plan), then the three messages as on the init pipe.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#include "plan.c"
#include "tlv.c"

static jmp_buf rejected;
static long accepted;

/* Replaces report.c's fail(): rejecting an input is a good outcome. */
NORETURN void fail(int error, const char *step, const char *path, const char *format, ...)
{
	(void)step, (void)path, (void)error, (void)format;
	longjmp(rejected, 1);
}

/* Decode again all steps that rootfs.c decodes when it executes the plan. */
static void walk(const struct plan *plan)
{
	struct cursor steps = plan->steps;
	struct attribute a;

	while (next_attribute(&steps, &a))
		if (a.type < PLAN_UMASK && a.type != PLAN_CONSOLE)
			check_step(&a);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct bootstrap boot;
	static struct plan plan;
	static struct inbox inbox;
	static int fd;

	if (size < 1)
		return 0;
	fd = memfd_create("input", MFD_CLOEXEC);
	if (fd < 0 || write(fd, data + 1, size - 1) != (ssize_t)(size - 1) || lseek(fd, 0, SEEK_SET) != 0)
		abort();
	inbox.used = 0;
	memset(&plan, 0, sizeof(plan));
	if (setjmp(rejected) == 0) {
		decode_bootstrap(read_message(&inbox, fd, MESSAGE_BOOTSTRAP, 1u << 20), &boot);
		decode_plan(read_message(&inbox, fd, MESSAGE_PLAN, 1u << 20), data[0] == 1, &plan);
		decode_strings(read_message(&inbox, fd, MESSAGE_STRINGS, (2u << 20) - 4096), &plan);
		walk(&plan);
		accepted++;
	}
	if (plan.argv != NULL)
		munmap(plan.argv, plan.vectors_size);
	close(fd);
	return 0;
}

#ifdef STANDALONE
static size_t read_file(const char *path, uint8_t *data, size_t room)
{
	FILE *file = fopen(path, "rb");
	size_t size = file == NULL ? 0 : fread(data, 1, room, file);

	if (file != NULL)
		fclose(file);
	return size;
}

/*
 * fuzz-gcc ROUNDS SEED FILE…: mutate the files' bytes, mostly lengths and types.  Some inputs must still be accepted.
 * With 0 rounds each file is tried unchanged, and all must be accepted.
 */
int main(int argc, char **argv)
{
	static uint8_t input[1u << 16];
	long rounds;

	if (argc < 4)
		return 2;
	rounds = atol(argv[1]);
	srandom((unsigned)atol(argv[2]));
	for (int i = 3; rounds == 0 && i < argc; i++) {
		LLVMFuzzerTestOneInput(input, read_file(argv[i], input, sizeof(input)));
		if (accepted != i - 2) {
			printf("%s is not accepted\n", argv[i]);
			return 1;
		}
	}
	for (long round = 0; round < rounds; round++) {
		size_t size = read_file(argv[3 + round % (argc - 3)], input, sizeof(input));

		if (size < 40)
			return 2;
		for (long changes = random() % 6; changes >= 0; changes--) {
			size_t at = (size_t)random() % size;
			static const uint16_t words[] = {0,	1,     2,     3,     4,	    5,	   0x7fff, 0xffff,
							 27281, 27288, 27290, 27350, 27351, 27400, 27414,  27436};

			if (random() % 3 == 0)
				input[at] = (uint8_t)random();
			else if ((at & ~(size_t)3) + 3 < size)
				memcpy(input + (at & ~(size_t)1) + 1, &words[(size_t)random() % ARRAY_SIZE(words)], 2);
		}
		LLVMFuzzerTestOneInput(input, random() % 8 == 0 ? (size_t)random() % size : size);
	}
	printf("%ld accepted\n", accepted);
	return accepted == 0;
}
#endif
