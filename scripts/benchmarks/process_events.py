"""The kernel's own record of when processes begin, execute and end (the process connector).

This measures what a program does inside without asking it, and without slowing it down. It needs
root, and a kernel built with CONFIG_PROC_EVENTS.
"""

import os
import select
import socket
import struct
import time
from collections import namedtuple

NETLINK_CONNECTOR = 11
# The connector's index and value for process events, and its order to listen.
CN_IDX_PROC, CN_VAL_PROC = 1, 1
PROC_CN_MCAST_LISTEN = 1
NLMSG_DONE = 3
NETLINK_HEADER = struct.Struct("=IHHII")
CONNECTOR_HEADER = struct.Struct("=IIIIHH")
EVENT_HEADER = struct.Struct("=IIQ")
FORK, EXEC, EXIT = 1, 2, 0x80000000
RECEIVE_BUFFER_BYTES = 16 * 1024 * 1024
SO_RCVBUFFORCE = 33

Fork = namedtuple("Fork", "ns parent child")
Exec = namedtuple("Exec", "ns process")
Exit = namedtuple("Exit", "ns process")


class ProcessEvents:
    """Receives the events of all processes of this machine. To be used with `with`."""

    def __enter__(self):
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_CONNECTOR)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self._socket.bind((os.getpid(), CN_IDX_PROC))
        order = struct.pack("=I", PROC_CN_MCAST_LISTEN)
        message = CONNECTOR_HEADER.pack(CN_IDX_PROC, CN_VAL_PROC, 0, 0, len(order), 0) + order
        length = NETLINK_HEADER.size + len(message)
        self._socket.send(NETLINK_HEADER.pack(length, NLMSG_DONE, 0, 0, os.getpid()) + message)
        return self

    def __exit__(self, *_):
        self._socket.close()

    def watch(self, parent, act, patience_s=5):
        """Does `act`, in which process `parent` starts one process, and follows that one.

        Returns nanoseconds from its creation to the last `exec` among it and its descendants, and
        to its end; `None` if its end did not show within the time.
        """
        self._drain()
        act()
        events, end = [], time.monotonic() + patience_s
        while (left := end - time.monotonic()) > 0:
            if select.select([self._socket], [], [], left)[0]:
                events.extend(self._receive())
                found = follow(events, parent)
                if found:
                    return found
        return None

    def _drain(self):
        while select.select([self._socket], [], [], 0)[0]:
            self._receive()

    def _receive(self):
        try:
            data = self._socket.recv(65536)
        except OSError:
            # The buffer ran over: this command's events may be lost, and `watch` says so.
            return []
        at = NETLINK_HEADER.size + CONNECTOR_HEADER.size
        what, _, ns = EVENT_HEADER.unpack_from(data, at)
        at += EVENT_HEADER.size
        if what == FORK:
            _, parent_process, child, child_process = struct.unpack_from("=IIII", data, at)
            # A thread is of its parent's process.
            return [Fork(ns, parent_process, child)] if child == child_process else []
        task, process = struct.unpack_from("=II", data, at)
        if what == EXEC:
            return [Exec(ns, process)]
        if what == EXIT and task == process:
            return [Exit(ns, process)]
        return []


def follow(events, parent):
    """See `ProcessEvents.watch`. Events of two processors may come in the wrong order."""
    family, born, last_exec = set(), None, None
    for event in sorted(events, key=lambda event: event.ns):
        match event:
            case Fork(ns, of, child) if (of == parent and born is None) or of in family:
                family.add(child)
                if born is None:
                    born, first = ns, child
            case Exec(ns, process) if process in family:
                last_exec = ns
            case Exit(ns, process) if born is not None and process == first:
                return (last_exec or ns) - born, ns - born
    return None
