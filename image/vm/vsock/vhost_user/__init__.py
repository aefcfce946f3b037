"""A virtio-vsock device in user space, for hosts without vhost_vsock: a vhost-user back end in its own process.

QEMU (``-device vhost-user-vsock-pci``) is the front end and speaks the vhost-user protocol over one end of a
socketpair; the guest's memory is shared by memfd.  Host programs reach the guest through Unix sockets, and the guest
them.  The guest is hostile: every index, descriptor, address and length is checked before use.

    protocol    vhost-user messages                session     vhost-user requests to virtqueues and memory
    memory      guest memory, checked              ring        a split virtqueue
    device      the tx virtqueue, dispatch         rx          the rx virtqueue and what waits for its buffers
    table       connections by their ports         connection  one stream: a host socket and a pair of ports
    packet      the 44-byte header                 sink        from the guest into a host socket, within buf_alloc
    host        listeners, CONNECT, dialling       limits      what may be used up
    loop        epoll, timers, busy polling        log         lines on stderr at a bounded rate

Each uses only what is below it: session -> device -> table -> connection -> rx -> ring -> memory.

Only the standard library, only relative imports: ``python -I -S <this directory> …`` starts without all the rest.
Sources: virtio 1.2 sections 2.7 (split virtqueues) and 5.10 (socket device); QEMU's docs/interop/vhost-user.rst.
"""
