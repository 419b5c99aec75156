"""Processes of a pod watch each other: where one is lost, the others end soon, with a line that names it.

JAX's own coordination service notices a lost process after a minute and more, and then aborts the others from C++. Here
every process holds a connection to process 0, which the kernel closes at once when a process dies; where a whole host
or the network fails, beats stop coming.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

STATUS = 143  # as after a preemption: the same command continues

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 40.0
_GRACE_SECONDS = 5.0
_LOST = 'was lost (killed, or its host or network failed)'


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where process 0 listens.

    Attributes:
      addresses: names and numbers under which other hosts may reach it, the likeliest first.
      port: of TCP.
      token: what a process says first, so that it is known to be of this run.
      host: the name of process 0's host.
    """

    addresses: tuple[str, ...]
    port: int
    token: str
    host: str


def _end(process: int, host: str, why: str) -> None:
    """Ends this process with one line: its other threads wait for what will never come."""
    line = f'jaxtune: process {process} on {host} {why}; the same command on all hosts continues'
    print(line, file=sys.stderr, flush=True)
    os._exit(STATUS)


class _Link:
    """A connection on which both sides send lines of JSON: beats, `bye`, and the news of a lost process.

    Args:
      connection: a connected socket.
      process, host: who is at its other end.
      on_lost: called with `(process, host, why)` when the other end falls silent or tells of another that did.
      on_message: called with `(process, host, message)` for what the other end has sent as `message`.
    """

    def __init__(
        self,
        connection: socket.socket,
        process: int,
        host: str,
        on_lost: Callable[[int, str, str], None],
        on_message: Callable[[int, str, Any], None],
    ) -> None:
        self.connection, self.process, self.host = connection, process, host
        self.on_lost, self.on_message = on_lost, on_message
        self._lock = threading.Lock()
        connection.settimeout(SILENCE_SECONDS)
        for target in (self._listen, self._beat):
            threading.Thread(target=target, name=f'liveness-{process}', daemon=True).start()

    def send(self, **message: Any) -> bool:
        """Whether the line could be sent."""
        try:
            with self._lock:
                self.connection.sendall(json.dumps(message).encode() + b'\n')
        except OSError:
            return False
        return True

    def _beat(self) -> None:
        while self.send(beat=True):
            time.sleep(BEAT_SECONDS)

    def _listen(self) -> None:
        try:
            with self.connection.makefile('rb') as lines:
                for line in lines:
                    message = json.loads(line)
                    if 'bye' in message:
                        if status := message['bye']:  # this process is about to end as well, or would wait for ever
                            time.sleep(SILENCE_SECONDS)
                            self.on_lost(self.process, self.host, f'ended with status {status}')
                        return
                    if 'message' in message:
                        self.on_message(self.process, self.host, message['message'])
                    if 'lost' in message:
                        self.on_lost(*message['lost'])
        except (OSError, ValueError):
            pass
        self.on_lost(self.process, self.host, _LOST)


class Watch:
    """This process's links to the others: in process 0 to all of them, elsewhere to process 0.

    Attributes:
      links: the connections.
      leaving: whether this process is about to end.
      receive: takes the messages of other processes, with their number and host; None ignores them.
    """

    def __init__(self) -> None:
        self.links: list[_Link] = []
        self.receive: Callable[[int, str, Any], None] | None = None
        self.leaving = False
        self._lock = threading.Lock()

    def lost(self, process: int, host: str, why: str) -> None:
        """Tells the others, and ends this process."""
        with self._lock:
            if self.leaving:
                return
            self.leaving = True
            for link in self.links:
                link.send(lost=[process, host, why])
            _end(process, host, why)

    def message(self, process: int, host: str, message: Any) -> None:
        """Hands a message on."""
        if self.receive is not None:
            with contextlib.suppress(Exception):  # what goes wrong with it is no sign of a lost process
                self.receive(process, host, message)

    def leave(self, status: int) -> None:
        """Says that this process is about to end of its own accord, with that exit status."""
        with self._lock:
            self.leaving = True
        for link in self.links:
            link.send(bye=status)


def listen(watch: Watch, others: int, address: str = '') -> Meeting:
    """Process 0: opens a port for the others, and waits for them in a thread.

    Args:
      watch: gets a link to each that comes.
      others: how many are to come.
      address: under which others are known to reach this host, or ''.
    """
    server = socket.create_server(('', 0), backlog=others)
    meeting = Meeting(tuple(_addresses(address)), server.getsockname()[1], secrets.token_hex(8), socket.gethostname())

    def accept() -> None:
        while len(watch.links) < others:
            connection, _ = server.accept()
            connection.settimeout(SILENCE_SECONDS)
            try:
                told = json.loads(_first_line(connection))
                if told['token'] != meeting.token:
                    raise ValueError('another run')
                watch.links.append(
                    _Link(connection, int(told['process']), str(told['host']), watch.lost, watch.message)
                )
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()
        server.close()

    threading.Thread(target=accept, name='liveness', daemon=True).start()
    return meeting


def join(watch: Watch, meeting: Meeting, process: int) -> bool:
    """The others: connects to process 0; whether that could be done."""
    for address in meeting.addresses:
        try:
            connection = socket.create_connection((address, meeting.port), timeout=3.0)
            told = {'token': meeting.token, 'process': process, 'host': socket.gethostname()}
            connection.sendall(json.dumps(told).encode() + b'\n')
        except OSError:
            continue
        watch.links.append(_Link(connection, 0, meeting.host, watch.lost, watch.message))
        return True
    return False


def wait_for_verdict() -> None:
    """Gives the links time to find that a process was lost, which is why others fail in all kinds of ways."""
    time.sleep(_GRACE_SECONDS)


def _first_line(connection: socket.socket) -> bytes:
    line = b''
    while not line.endswith(b'\n') and len(line) < 4096:
        byte = connection.recv(1)
        if not byte:
            break
        line += byte
    return line


def _addresses(known: str) -> list[str]:
    """Under what other hosts may reach this one."""
    addresses = [known] if known else []
    addresses.append(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(('10.255.255.255', 1))  # sends nothing: asks the routing table for the address used
            addresses.append(probe.getsockname()[0])
        except OSError:
            pass
    return list(dict.fromkeys(addresses))
