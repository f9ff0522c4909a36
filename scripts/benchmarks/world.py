"""The scratch directory, and every process that is started: all of them are ended by their ids."""

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

# Nothing that is measured here takes this long unless it hangs.
PATIENCE_S = 600
# What a process gets to end by itself before it is killed.
GRACE_S = 10


class Failed(Exception):
    """Something that is measured did not do what it should."""


class Finished:
    """A program that ran to its end."""

    def __init__(self, seconds, stdout):
        self.seconds = seconds
        self.stdout = stdout


class World:
    """Owns the scratch directory and the processes. Leaving it ends and removes them all."""

    def __init__(self):
        self.scratch = None
        self._children = []

    def __enter__(self):
        self.scratch = Path(tempfile.mkdtemp(prefix="cortex-bench."))
        # A polite request to end must clean up like Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *_):
        # A second Ctrl-C must not leave processes behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for child in reversed(self._children):
            self.end(child)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def say(self, text):
        """Tells what is going on, beside the results."""
        os.write(2, f"{text}\n".encode())

    def folder(self, name):
        """A new, empty directory of that name in the scratch directory."""
        path = self.scratch / name
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path

    def start(self, args, log, **options):
        """Starts a process that stays; its output goes to the file `log`."""
        with open(log, "ab") as output:
            options.setdefault("stdout", output)
            # Its own session: Ctrl-C reaches only us, and we end it in order.
            child = subprocess.Popen(
                [str(arg) for arg in args], stdin=subprocess.DEVNULL, stderr=output,
                start_new_session=True, **options)
        self._children.append(child)
        return child

    def end(self, child):
        """Ends a process that `start` started."""
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if child.stdout:
            child.stdout.close()
        if child in self._children:
            self._children.remove(child)

    def run(self, args, env=None):
        """Runs a program to its end. Fails, with what it said, if it does."""
        args = [str(arg) for arg in args]
        with tempfile.TemporaryFile(dir=self.scratch) as out, \
                tempfile.TemporaryFile(dir=self.scratch) as errors:
            started = time.perf_counter()
            child = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
                                     env=env, start_new_session=True)
            try:
                # Not `wait` with a timeout, which looks only every 50 ms.
                with open(os.pidfd_open(child.pid), "rb") as ended:
                    if not select.select([ended], [], [], PATIENCE_S)[0]:
                        raise Failed(f"{' '.join(args)[:200]}: not done in {PATIENCE_S} s")
                seconds = time.perf_counter() - started
                code = child.wait()
            except BaseException:
                child.kill()
                child.wait()
                raise
            out.seek(0)
            stdout = out.read().decode(errors="replace")
            if code != 0:
                errors.seek(0)
                said = errors.read().decode(errors="replace")[-2000:]
                raise Failed(f"{' '.join(args)[:200]}: exit code {code}: {said}")
        return Finished(seconds, stdout)

    def wait_until(self, what, check, patience_s=PATIENCE_S, interval_s=0.002):
        """Waits until `check()` is true; returns what it returned."""
        end = time.monotonic() + patience_s
        while True:
            answer = check()
            if answer:
                return answer
            if time.monotonic() > end:
                raise Failed(f"{what}: not within {patience_s} s")
            time.sleep(interval_s)


def free_port():
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def peak_memory_mib(pid):
    """The most memory that process has had resident so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise Failed(f"no VmHWM of process {pid}")


def memory_mib(pid):
    """The memory that process has resident now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise Failed(f"no VmRSS of process {pid}")


def cpu_seconds_exact(pid):
    """Processor time of that process so far, to the nanosecond, also of threads that have ended."""
    # What clock_getcpuclockid(3) makes of a process id; Python does not offer it.
    return time.clock_gettime((~pid << 3) | 2)


def cpu_seconds(pid):
    """Processor time that process has used so far, in user and kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class WireCounter:
    """Bytes on the TCP connections to a port of this machine, as the kernel counted them."""

    def __init__(self, world, port):
        self._world = world
        self._port = port
        self._before = self._read()

    def _read(self):
        """Bytes sent and received of each connection, seen from the side that connected."""
        lines = self._world.run(
            ["ss", "-tinpHO", "dport", "=", f":{self._port}"]).stdout.splitlines()
        counts = {}
        for line in lines:
            words = line.split()
            value = {key: int(text) for key, _, text in
                     (word.partition(":") for word in words)
                     if key in ("bytes_sent", "bytes_received")}
            pid = line.partition("pid=")[2].partition(",")[0]
            counts[words[3]] = (pid, value.get("bytes_sent", 0), value.get("bytes_received", 0))
        return counts

    def bytes_since(self, pid=None):
        """Bytes in both directions since this counter was made, of all or of one process's
        connections. `None` if a connection ended meanwhile, which takes its count along."""
        after = self._read()
        if any(name not in after for name in self._before):
            return None
        total = 0
        for name, (owner, sent, received) in after.items():
            if pid is None or owner == str(pid):
                _, sent_before, received_before = self._before.get(name, (owner, 0, 0))
                total += sent - sent_before + received - received_before
        return total
