"""Run a command whose `pkt` stages need not import torch and transformers anew: `python -m pkt_stages.warm dvc repro`.

On a small profile half of a stage's time are imports. This process makes them once and runs the command with the
variable PKT_WARM set. Each `pkt` that the command starts then sends its arguments, folder, environment and streams over
a socket to this process, which forks a child to do the work and answers with its exit status. The work is that of a
`pkt` on its own; a client that is killed takes its child with it. Linux only; elsewhere the command just runs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

VARIABLE = "PKT_WARM"
# What stages import late. Importing starts no thread and touches no GPU, so a fork is safe.
HEAVY = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.trainer",
    "safetensors.torch",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "datasets",
    "peft",
    "scipy.stats",
)


def delegate() -> int | None:
    """Have the process that PKT_WARM names do this one's work; its exit status, or None if there is no such process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(os.environ[VARIABLE])
        except (KeyError, OSError):
            return None
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        request = json.dumps({"argv": sys.argv, "folder": os.getcwd(), "environment": environment}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        answer = connection.recv(16)
    return int(answer) if answer else 1


def main(command: Sequence[str]) -> int:
    """Run the command and serve its stages until it ends; its exit status."""
    if not hasattr(os, "pidfd_open"):
        return subprocess.run(command).returncode
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        address = str(Path(folder) / "socket")
        server.bind(address)
        server.listen()
        process = subprocess.Popen(command, env={**os.environ, VARIABLE: address})
        with contextlib.suppress(KeyboardInterrupt):  # the terminal interrupts the command and the children as well
            _serve(server, process.pid)
        return process.wait()


def _serve(server: socket.socket, command: int) -> None:
    """Fork a child per connection until the command ends; kill a child whose client has gone."""
    children: dict[int, tuple[int, socket.socket]] = {}  # pid and client, by the child's pidfd
    poll, ended = select.poll(), os.pidfd_open(command)
    poll.register(ended, select.POLLIN)
    poll.register(server, select.POLLIN)
    while True:
        for found, _ in poll.poll():
            if found == ended:
                return
            if found == server.fileno():
                client, _ = server.accept()
                for name in HEAVY:  # once: where every stage is up to date, nothing is imported
                    importlib.import_module(name)
                pid = os.fork()
                if pid == 0:
                    _work(client)
                child = os.pidfd_open(pid)
                children[child] = pid, client
                poll.register(child, select.POLLIN)
                poll.register(client, 0)  # reports nothing but its end
            elif found in children:
                pid, client = children.pop(found)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                poll.unregister(found)
                os.close(found)
                try:
                    poll.unregister(client)
                    client.sendall(str(status if status >= 0 else 128 - status).encode())
                except (KeyError, OSError):
                    pass  # it has gone
                client.close()
            else:
                poll.unregister(found)
                for pid, client in children.values():
                    if client.fileno() == found:
                        os.kill(pid, signal.SIGKILL)


def _work(client: socket.socket) -> NoReturn:
    """In the child: become the client, and run its command line."""
    status = 1
    try:
        header, streams, _, _ = socket.recv_fds(client, 8, 3)
        size, parts = int.from_bytes(header, "big"), []
        while size:
            parts.append(client.recv(size))
            size -= len(parts[-1]) or size
        request = json.loads(b"".join(parts))
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        for text in (sys.stdout, sys.stderr):
            text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = request["argv"]
        from pkt_stages.__main__ import main as pkt

        pkt()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
