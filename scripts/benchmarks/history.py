"""This project's own history, in which a branch is switched: two of its commits, hundreds of files apart."""

import io
import subprocess
import tarfile

from mesh import ROOT

# Fixed, so that every run does the same.
OLD = "ad7d8b2f11a88f67d49fcb7db596cd41ed919e12"
NEW = "28128d4d2a7cbc616a860d5c60d7ef862e6a6cc8"


class History:
    """A clone whose working tree is wherever it is checked out."""

    def __init__(self, world):
        self._world = world
        self._clone = world.folder("history")
        world.run(["git", "clone", "-q", "--shared", "--no-checkout", ROOT, self._clone])
        contents = {commit: self._contents(commit) for commit in (OLD, NEW)}
        paths = contents[OLD].keys() | contents[NEW].keys()
        changed = [path for path in sorted(paths)
                   if contents[OLD].get(path) != contents[NEW].get(path)]
        # What stands at each path that differs; `None` where there is nothing.
        self.changed = {commit: {path: files.get(path) for path in changed}
                        for commit, files in contents.items()}

    @staticmethod
    def is_there():
        """Whether both commits can be had here."""
        return all(subprocess.run(["git", "-C", ROOT, "cat-file", "-e", f"{commit}^{{commit}}"],
                                  capture_output=True, check=False).returncode == 0
                   for commit in (OLD, NEW))

    def _contents(self, commit):
        packed = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True,
                                check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            return {member.name: archive.extractfile(member).read()
                    for member in archive if member.isfile()}

    def check_out(self, commit, folder):
        """Makes `folder` that commit's tree, as switching a branch does."""
        folder.mkdir(exist_ok=True)
        self._world.run(["git", f"--git-dir={self._clone}/.git", f"--work-tree={folder}",
                         "checkout", "-q", "-f", "--detach", commit])

    def arrival(self, commit, folder):
        """What tells whether all that differs is that commit's in `folder`."""
        waiting = list(self.changed[commit].items())

        def arrived():
            while waiting:
                path, content = waiting[-1]
                try:
                    there = (folder / path).read_bytes()
                except (FileNotFoundError, NotADirectoryError):
                    there = None
                if there != content:
                    return False
                waiting.pop()
            return True
        return arrived
