/* follow.c: follow a foreground process: copy its streams, forward signals to it (runtime/foreground.py). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "front.h"

#define CHUNK 65536

struct streams {
	const struct process *process;
	int input, outputs[2]; /* our ends of its pipes; -1 after EOF */
	int signals, status;   /* status is -1 while it runs */
	bool stdin_open;
	size_t unsent, sent; /* in `buffer`, which holds input the process has not read yet */
	char buffer[CHUNK];
};

static void reap(struct streams *streams)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (pid == streams->process->pid)
			streams->status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void on_signal(struct streams *streams)
{
	struct signalfd_siginfo info;

	while (read(streams->signals, &info, sizeof(info)) == sizeof(info)) {
		if (info.ssi_signo == SIGCHLD)
			reap(streams);
		else if (streams->status < 0)
			syscall(SYS_pidfd_send_signal, streams->process->pidfd, info.ssi_signo, NULL, 0);
	}
}

/* Copy available output to stdout or stderr; return whether there was any. */
static bool copy_output(struct streams *streams, int number)
{
	static char data[CHUNK];
	ssize_t got = streams->outputs[number] < 0 ? -1 : read(streams->outputs[number], data, sizeof(data));

	if (got > 0) {
		write_all(number + 1, data, (size_t)got); /* dropped if nobody reads it */
		return true;
	}
	if (streams->outputs[number] >= 0 && (got == 0 || errno != EAGAIN)) {
		close(streams->outputs[number]);
		streams->outputs[number] = -1;
	}
	return false;
}

/* Close the process's stdin: it reads EOF after the rest of its input. */
static void end_input(struct streams *streams)
{
	if (streams->input >= 0)
		close(streams->input);
	streams->input = -1;
	streams->stdin_open = false;
}

static void send_input(struct streams *streams)
{
	ssize_t done = write(streams->input, streams->buffer + streams->sent, streams->unsent);

	if (done < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (done < 0) {
		end_input(streams); /* the process has closed stdin */
		return;
	}
	streams->sent += (size_t)done;
	streams->unsent -= (size_t)done;
}

static void read_input(struct streams *streams)
{
	ssize_t got = read(0, streams->buffer, sizeof(streams->buffer));

	if (got <= 0) {
		end_input(streams);
		return;
	}
	streams->sent = 0;
	streams->unsent = (size_t)got;
	send_input(streams);
}

static void step(struct streams *streams)
{
	struct pollfd polled[] = {
		{.fd = streams->signals, .events = POLLIN},
		{.fd = streams->process->pidfd, .events = POLLIN},
		{.fd = streams->outputs[0], .events = POLLIN},
		{.fd = streams->outputs[1], .events = POLLIN},
		{.fd = streams->stdin_open && streams->unsent == 0 ? 0 : -1, .events = POLLIN},
		{.fd = streams->unsent > 0 ? streams->input : -1, .events = POLLOUT},
	};

	if (poll(polled, ARRAY_SIZE(polled), -1) < 0)
		return;
	if (polled[0].revents != 0)
		on_signal(streams);
	for (int number = 0; number < 2; number++)
		if (polled[2 + number].revents != 0)
			copy_output(streams, number);
	if (polled[4].revents != 0)
		read_input(streams);
	if (polled[5].revents != 0)
		send_input(streams);
	if (polled[1].revents != 0)
		reap(streams);
}

/* Copy the streams and forward signals until the process ends; return its status, or 128 plus the signal. */
int follow(const struct process *process, int in, int out, int err)
{
	static struct streams streams;
	sigset_t passed;

	streams.process = process;
	streams.input = in;
	streams.outputs[0] = out;
	streams.outputs[1] = err;
	streams.status = -1;
	streams.stdin_open = true;
	for (int i = 0; i < 3; i++)
		fcntl((int[]){in, out, err}[i], F_SETFL, O_NONBLOCK | (i == 0 ? O_WRONLY : O_RDONLY));
	sigfillset(&passed);
	sigdelset(&passed, SIGURG);
	sigdelset(&passed, SIGWINCH); /* no terminal to resize */
	sigdelset(&passed, SIGPIPE);
	sigprocmask(SIG_BLOCK, &passed, NULL);
	streams.signals = signalfd(-1, &passed, SFD_CLOEXEC | SFD_NONBLOCK);
	reap(&streams);
	while (streams.status < 0)
		step(&streams);
	while (copy_output(&streams, 0) | copy_output(&streams, 1))
		;
	return streams.status;
}
