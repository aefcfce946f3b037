"""A process in the foreground: copy its streams, share the terminal, pass on signals.

Source: runc(8), "terminals.md"; tty_ioctl(4), termios(3).
"""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal

CHUNK = 1 << 16
SIGCHLD, SIGURG, SIGWINCH, SIGPIPE, SIGKILL, SIGSTOP = 17, 23, 28, 13, 9, 19
#: Signals not passed on: this program's, and the C library's own.
OWN_SIGNALS = (SIGCHLD, SIGURG, SIGWINCH, SIGPIPE, SIGKILL, SIGSTOP, 32, 33)
SIGNALS = range(1, 65)


class Foreground:
    """Copy between this program's streams and a process's, until it exits.

    `own` are our ends of its pipes (stdin, stdout, stderr); `console` is the master of its terminal, or -1.
    """

    def __init__(self, pid: int, pidfd: int, own: list[int], console: int) -> None:
        self._pid = pid
        self._pidfd = pidfd
        self._console = console
        self._input = console if console >= 0 else own[0]
        #: Source and destination of output.
        self._outputs = {console: 1} if console >= 0 else {own[1]: 1, own[2]: 2}
        self._unsent = b""
        self._stdin_open = True
        self._status: int | None = None
        self._poll = select.poll()
        self._wakeup, self._signals = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._terminal = -1

    def run(self) -> int:
        """Run until the process exits; return its exit status, or 128 + signal."""
        for fd in (*self._outputs, self._input):
            os.set_blocking(fd, False)
        for number in SIGNALS:
            if number not in OWN_SIGNALS or number in (SIGCHLD, SIGWINCH):
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._signals, warn_on_full_buffer=False)
        self._terminal = find_terminal() if self._console >= 0 else -1
        saved = make_raw(self._terminal) if self._terminal >= 0 else None
        try:
            self._resize()
            self._loop()
        finally:
            if saved is not None:
                restore(self._terminal, saved)
            for fd in {*self._outputs, self._input} - {-1}:
                os.close(fd)
        return self._status or 0

    def _loop(self) -> None:
        for fd in (self._wakeup, self._pidfd, *self._outputs):
            self._poll.register(fd, select.POLLIN)
        self._poll.register(0, select.POLLIN)
        self._reap()
        while self._status is None:
            for fd, events in self._poll.poll():
                if fd == self._wakeup:
                    self._on_signals()
                elif fd == 0:
                    self._read_input()
                elif fd in self._outputs and events & ~select.POLLOUT:
                    self._copy_output(fd)
                elif fd == self._pidfd:
                    self._reap()
                if events & select.POLLOUT and fd == self._input:
                    self._send()
        while self._outputs and any([self._copy_output(fd) for fd in list(self._outputs)]):
            pass

    def _reap(self) -> None:
        """Reap the process, and orphans that this program got as a subreaper."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code

    def _on_signals(self) -> None:
        try:
            numbers = os.read(self._wakeup, CHUNK)
        except BlockingIOError:
            return
        for number in numbers:
            if number == SIGCHLD:
                self._reap()
            elif number == SIGWINCH:
                self._resize()
            elif self._status is None:
                try:
                    signal.pidfd_send_signal(self._pidfd, number)
                except OSError:  # it has just exited
                    pass

    def _read_input(self) -> None:
        if self._unsent:  # earlier input is still pending
            self._poll.unregister(0)
            return
        try:
            data = os.read(0, CHUNK)
        except OSError:
            data = b""
        if not data:
            self._stdin_open = False
            self._poll.unregister(0)
            self._end_input()
            return
        self._unsent = data
        self._send()

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._input, self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # it has stopped reading
            self._unsent = b""
            self._end_input()
            return
        wanted = select.POLLIN if self._input in self._outputs else 0
        if self._unsent:
            self._poll.register(self._input, wanted | select.POLLOUT)
            return
        if wanted:
            self._poll.register(self._input, wanted)
        else:
            self._forget(self._input)
        if self._stdin_open:
            self._poll.register(0, select.POLLIN)
        else:
            self._end_input()

    def _end_input(self) -> None:
        """Let the process read end-of-file; a terminal has none."""
        if self._console < 0 and self._input >= 0 and not self._unsent:
            self._forget(self._input)
            os.close(self._input)
            self._input = -1

    def _forget(self, fd: int) -> None:
        try:
            self._poll.unregister(fd)
        except KeyError:
            pass

    def _copy_output(self, fd: int) -> bool:
        """Copy available output; returns whether there was any."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # EIO: the last holder of the terminal has closed it
            data = b""
        if not data:
            self._forget(fd)
            if fd != self._input:
                del self._outputs[fd]
                os.close(fd)
            return False
        target = self._outputs[fd]
        try:
            while data:
                data = data[os.write(target, data) :]
        except OSError:  # there is no reader
            return True
        return True

    def _resize(self) -> None:
        if self._terminal < 0:
            return
        import fcntl
        import termios

        try:
            size = fcntl.ioctl(self._terminal, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(self._console, termios.TIOCSWINSZ, size)
        except OSError:
            pass


def find_terminal() -> int:
    """Find this program's terminal: among its streams, otherwise /dev/tty; -1 for none."""
    for fd in (2, 1, 0):
        if os.isatty(fd):
            return fd
    try:
        return os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1


def keep_newlines(master: int) -> None:
    """Make a terminal end lines with a newline only: our own terminal adds the carriage return."""
    import termios

    mode = termios.tcgetattr(master)
    mode[1] &= ~termios.ONLCR
    termios.tcsetattr(master, termios.TCSANOW, mode)


def make_raw(terminal: int) -> list[object] | None:
    """Put a terminal into raw mode; return its previous settings."""
    import termios

    try:
        saved = termios.tcgetattr(terminal)
        mode = termios.tcgetattr(terminal)
        mode[0] &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
            | termios.ICRNL | termios.IXON
        )  # fmt: skip
        mode[1] &= ~termios.OPOST
        mode[1] |= termios.OPOST | termios.ONLCR  # the process's lines end with a newline only
        mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        termios.tcsetattr(terminal, termios.TCSANOW, mode)
    except termios.error:
        return None
    return saved


def restore(terminal: int, saved: list[object]) -> None:
    """Restore a terminal's settings."""
    import termios

    try:
        termios.tcsetattr(terminal, termios.TCSADRAIN, saved)  # type: ignore[arg-type]
    except termios.error:
        pass
