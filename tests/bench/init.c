/*
 * init.c: a minimal guest.  As process 1 it listens on vsock port 1024, prints a marker on the console, and echoes the
 * first byte of each connection: the rest of the boot time is that of the kernel and the machine.
 */
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

int main(void)
{
	static const char marker[] = "caisson-bench-init\n";
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 1024};
	int listener = socket(AF_VSOCK, SOCK_STREAM, 0);

	/* A kernel with vsock as a module has none here: the benchmark waits only for the marker. */
	if (listener >= 0 && (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 8)))
		return 1;
	if (write(1, marker, sizeof(marker) - 1) < 0)
		return 1;
	for (;;) {
		int peer = listener >= 0 ? accept(listener, NULL, NULL) : pause();
		char byte;

		while (peer >= 0 && read(peer, &byte, 1) == 1 && write(peer, &byte, 1) == 1)
			;
		close(peer);
	}
}
