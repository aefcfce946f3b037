/*
 * longargs.c: run with a command line of any length (PR_SET_MM_MAP, prctl(2)), in memory that is never allocated: a
 * mapping with MAP_NORESERVE.  Prints "ready" and keeps running.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int count, char **words)
{
	size_t size = (count > 1 ? strtoul(words[1], NULL, 10) : 1500) << 20;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t at = (uint64_t)(uintptr_t)memory, code = (uint64_t)(uintptr_t)main;
	struct prctl_mm_map map = {
		.start_code = code,
		.end_code = code + 1,
		.start_data = at,
		.end_data = at,
		.start_brk = (uint64_t)(uintptr_t)sbrk(0),
		.brk = (uint64_t)(uintptr_t)sbrk(0),
		.start_stack = at,
		.arg_start = at,
		.arg_end = at + size - 4096,
		.env_start = at + size - 4096,
		.env_end = at + size,
		.auxv = NULL,
		.auxv_size = 0,
		.exe_fd = (uint32_t)-1,
	};

	if (memory == MAP_FAILED)
		return 2;
	strcpy(memory, "longargs");

	if (prctl(PR_SET_MM, PR_SET_MM_MAP, (unsigned long)&map, sizeof(map), 0) < 0) {
		perror("PR_SET_MM_MAP");
		return 3;
	}
	puts("ready");
	fflush(stdout);
	pause();
	return 0;
}
