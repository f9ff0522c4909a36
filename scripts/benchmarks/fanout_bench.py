"""One command on fifty nodes of one machine, beside ansible with fifty entries in its inventory."""

import os
import shutil

from mesh import Mesh
from results import Lower
from secure_shell import SecureShell
from world import Failed

NODES = 50
# sshd listens on 16 addresses at most.
ADDRESSES = 16
FANOUT = f"`true` on {NODES} nodes of one machine"
# Ansible of one fork for each takes as long as 50 starts of Python do.
ANSIBLE_RUNS = 3
# What is run by each of them, and how it is called: module and forks.
PLAYS = [("ansible, raw, 50 forks", "raw", NODES), ("ansible, raw, 5 forks (its default)", "raw", 5),
         ("ansible, command, 50 forks", "command", NODES),
         ("ansible, command, 5 forks (its default)", "command", 5)]


class Ansible:
    """Ansible with an inventory of many entries, each with a connection of its own to one ssh server."""

    def __init__(self, world, folder, shell):
        self._world = world
        self._folder = folder
        self._sockets = folder / "s"
        self._sockets.mkdir()
        entries = [f"node{number} ansible_host={shell.addresses[number % ADDRESSES]} "
                   f"ansible_control_path={self._sockets}/{number}" for number in range(NODES)]
        folder.joinpath("inventory").write_text("\n".join(entries) + "\n")
        # None of this machine's. It wants a name that ends like one of its own.
        settings = folder / "ansible.cfg"
        settings.touch()
        self.environment = {
            **os.environ, "HOME": str(folder), "ANSIBLE_CONFIG": str(settings),
            "ANSIBLE_SSH_ARGS": f"-F {shell.config} -o ControlMaster=auto -o ControlPersist=60s",
            "ANSIBLE_HOST_KEY_CHECKING": "True", "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3",
            "ANSIBLE_LOCALHOST_WARNING": "False"}

    def command(self, module, forks):
        """Program and arguments of an ad-hoc call on all of them."""
        return ["ansible", "all", "-i", str(self._folder / "inventory"), "-f", str(forks),
                "-m", module, "-a", "true"]

    def end(self):
        """Ends the master connections that it left behind."""
        for socket in self._sockets.iterdir():
            try:
                self._world.run(["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "any"])
            except Failed:
                # It ended by itself meanwhile.
                continue


def measure(world, results, runs):
    """Measures `cortex-agent exec --all` and ansible, interleaved."""
    results.note(FANOUT, f"cortex mesh: `cortex-agent exec --all -- true`, each in the STRICT sandbox of its own "
                 f"agent, {NODES} of them; ansible: an ad-hoc call, `raw` (the command alone) and "
                 "`command` (its default, which starts Python at the target); over connections of "
                 "ssh that it keeps from the call before, one for each entry, all to one sshd")
    if not shutil.which("ansible"):
        results.skip(FANOUT, "ansible is not installed: no peer")
    names = [f"node{number}" for number in range(NODES)]
    with SecureShell(world, addresses=ADDRESSES) as shell, \
            Mesh(world, world.folder("fanout"), names) as mesh:
        ours = mesh.command("exec", "--all", "--", "true")
        ansible = Ansible(world, world.folder("ansible"), shell)
        try:
            world.run(ours, env=mesh.environment)
            plays = PLAYS if shutil.which("ansible") else []
            for _, module, forks in plays:
                # Connects, which does not count.
                world.run(ansible.command(module, forks), env=ansible.environment)
            for run in range(max(runs, ANSIBLE_RUNS)):
                done = world.run(ours, env=mesh.environment)
                results.add("exec", FANOUT, "cortex mesh", "s", Lower, done.seconds)
                if run < min(runs, ANSIBLE_RUNS):
                    for name, module, forks in plays:
                        done = world.run(ansible.command(module, forks), env=ansible.environment)
                        results.add("exec", FANOUT, name, "s", Lower, done.seconds)
                world.say(f"fan-out, run {run + 1} of {max(runs, ANSIBLE_RUNS)}")
        finally:
            ansible.end()
