"""An ssh server of our own on loopback, and ways to reach it."""

import getpass
import os
import shutil
import socket

from world import Failed, free_port


class SecureShell:
    """`sshd` for this user with its own keys. To be used with `with`."""

    def __init__(self, world, addresses=1):
        self._world = world
        self.port = free_port()
        # Where it listens: all of 127.0.0.0/8 is this machine.
        self.addresses = [f"127.0.0.{1 + number}" for number in range(addresses)]
        self._server = None
        self._master = None

    def __enter__(self):
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if not sshd or not shutil.which("ssh"):
            raise Failed("ssh and sshd are not installed")
        folder = self._world.folder("ssh")
        for key in ("host", "user"):
            self._world.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key])
        # Commands find an empty home: what this user's own shell does at its start (pyenv takes a
        # quarter of a second) is not what is measured.
        home = folder / "home"
        home.mkdir()
        listen = "\n".join(f"ListenAddress {address}" for address in self.addresses)
        (folder / "sshd_config").write_text(f"""\
{listen}
Port {self.port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxSessions 100
MaxStartups 200
SetEnv HOME={home}
""")
        host_key = (folder / "host.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.*]:{self.port} {host_key}")
        self._config = folder / "config"
        self._config.write_text(f"""\
Host peer peer-cold
  HostName 127.0.0.1
Host peer peer-cold 127.0.0.*
  Port {self.port}
  User {getpass.getuser()}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  LogLevel ERROR
Host peer
  ControlPath {folder}/master
""")
        if os.geteuid() == 0:
            # As root, sshd wants its empty directory, which its service would make.
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        self._server = self._world.start(
            [sshd, "-D", "-e", "-f", folder / "sshd_config"], folder / "sshd.log")
        self._world.wait_until("sshd listens", self._listens, patience_s=10)
        self._master = self._world.start(
            ["ssh", "-F", self._config, "-M", "-N", "peer"], folder / "master.log")
        self._world.wait_until("the master connection", (folder / "master").exists, patience_s=10)
        return self

    def __exit__(self, *_):
        for process in (self._master, self._server):
            if process:
                self._world.end(process)

    def _listens(self):
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        except OSError:
            return False

    def command(self, *args, cold=False):
        """`ssh` over the master connection, or over a new one."""
        return ["ssh", "-F", str(self._config), "peer-cold" if cold else "peer", *args]

    @property
    def config(self):
        """The configuration file of `ssh`, in which `peer` and all its addresses stand."""
        return self._config

    @property
    def transport(self):
        """Arguments of `ssh` before the host, for programs that start it themselves."""
        return ["-F", str(self._config)]
