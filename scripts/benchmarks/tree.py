"""The files that are synced: made from fixed seeds, so that every run has the same."""

import hashlib
import itertools
import math
import os
import random
import shutil
from pathlib import Path

SEED = 20260101
FILES = 10_000
FOLDERS = 800
# Lognormal, as sizes of source files are: median 3.6 kB, mean about 8.5 kB.
SIZE_MEDIAN = 3600
SIZE_SIGMA = 1.31
MAX_SIZE = 400_000
BIG_FILE_BYTES = 512 * 1024 * 1024
INSERTED_BYTES = 1024
INSERTED_AT = 4096

SUFFIXES = [".rs", ".c", ".h", ".py", ".ts", ".go", ".md", ".json", ".toml"]
SEPARATORS = [" ", " ", " ", " = ", "(", ") ", ", ", ".", "::", ";\n    ", ";\n        ", "\n",
              " {\n        ", "\n    }\n", "  // "]


class SourceText:
    """Text that compresses about as well as source code: zstd -1 makes it 4.6 times smaller."""

    def __init__(self, rng):
        self._rng = rng
        letters = "etaoinsrhldcumfpgwybvkxjqz"
        weights = [1 / (rank + 3) for rank in range(len(letters))]
        words = ["".join(rng.choices(letters, weights, k=rng.randint(2, 11))) for _ in range(4000)]
        often = falling(len(words), 4)
        # Code says the same things again and again: idioms, each of a few words.
        self._pieces = words + [
            "".join(itertools.chain.from_iterable(zip(
                rng.choices(words, cum_weights=often, k=length),
                rng.choices(SEPARATORS, k=length))))
            for length in rng.choices(range(3, 12), k=3000)]
        rng.shuffle(self._pieces)
        self._often = falling(len(self._pieces), 10)

    def make(self, size):
        """That many bytes."""
        rng, parts, length = self._rng, [], 0
        while length < size:
            pieces = rng.choices(self._pieces, cum_weights=self._often, k=200)
            separators = rng.choices(SEPARATORS, k=200)
            part = "".join(itertools.chain.from_iterable(zip(pieces, separators)))
            parts.append(part)
            length += len(part)
        return "".join(parts).encode()[:size]


def falling(count, flatness):
    """Cumulative weights of things of which the first are the most frequent."""
    return list(itertools.accumulate(1 / (rank + flatness) for rank in range(count)))


def make_tree(root):
    """Makes the tree of many small files below `root`; returns the paths of the files in it."""
    rng = random.Random(SEED)
    text = SourceText(rng)
    folders = [Path()]
    while len(folders) < FOLDERS:
        parent = rng.choice(folders)
        if len(parent.parts) < 6:
            folders.append(parent / f"part{len(folders)}")
            (root / folders[-1]).mkdir()
    paths = []
    for number in range(FILES):
        size = int(SIZE_MEDIAN * math.exp(rng.gauss(0, SIZE_SIGMA)))
        path = rng.choice(folders) / f"file{number}{rng.choice(SUFFIXES)}"
        (root / path).write_bytes(text.make(min(size, MAX_SIZE)))
        paths.append(path)
    return paths


def make_big_file(path):
    """Makes the big file: every other MiB is text, the rest does not compress."""
    rng = random.Random(SEED + 1)
    text = SourceText(rng).make(8 * 1024 * 1024)
    mib = 1024 * 1024
    with open(path, "wb") as file:
        for number in range(BIG_FILE_BYTES // mib):
            if number % 2:
                file.write(rng.randbytes(mib))
            else:
                # Different each time, so that no block is the same as another.
                start = rng.randrange(len(text) - mib)
                file.write(rng.randbytes(64) + text[start:start + mib - 64])


def insert_near_start(source, target):
    """Writes a copy of a file that has a little more near its start."""
    rng = random.Random(SEED + 2)
    with open(source, "rb") as old, open(target, "wb") as new:
        new.write(old.read(INSERTED_AT))
        new.write(rng.randbytes(INSERTED_BYTES))
        shutil.copyfileobj(old, new, 4 * 1024 * 1024)


def count_files(root):
    """How many files the peers' users see in a tree."""
    return sum(len(files) for _, files in walk(root))


def walk(root):
    """Folders and their files, without what the programs keep for themselves."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in (".cortex", ".stfolder")]
        yield folder, files


def digest(root):
    """One value for all names and contents of a tree."""
    lines = []
    for folder, files in walk(root):
        for name in files:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "blake2b").hexdigest()
            lines.append(f"{os.path.relpath(path, root)}\0{content}")
    return hashlib.blake2b("\n".join(sorted(lines)).encode()).hexdigest()
