//! What people and programs do in a workspace, and must be able to.

use tempfile::TempDir;

use crate::support::{in_workspace, run, succeeds_outside};

/// What it is, the program it needs, a script, and what that prints last.
const WORK: [(&str, &str, &str, &str); 14] = [
    (
        "compile and run C",
        "gcc",
        "printf '#include <stdio.h>\\nint main(void) { puts(\"compiled\"); }\\n' > m.c &&
         gcc -O1 -pthread -o m m.c && ./m",
        "compiled",
    ),
    (
        "git from init to log",
        "git",
        "git init -q . && echo x > f && git add f &&
         git -c user.name=a -c user.email=a@b commit -q -m first && git status --short &&
         git checkout -q -b other && git log --format=%s",
        "first",
    ),
    (
        "python in several processes",
        "python3",
        "cat > p.py <<'END'
import multiprocessing as m
def square(x): return x * x
if __name__ == '__main__':
    lock = m.Lock()
    with lock, m.Pool(3) as pool: print(sum(pool.map(square, range(10))))
END
/usr/bin/python3 p.py",
        "285",
    ),
    (
        "threads and shared memory of python",
        "python3",
        "cat > t.py <<'END'
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import shared_memory
s = shared_memory.SharedMemory(create=True, size=64); s.buf[0] = 7
with ThreadPoolExecutor(4) as e: print(sum(e.map(lambda n: n + s.buf[0], range(4))))
s.close(); s.unlink()
END
/usr/bin/python3 t.py",
        "34",
    ),
    (
        "a package script of node",
        "npm",
        "echo '{\"name\":\"n\",\"scripts\":{\"hi\":\"node -p 6*7\"}}' > package.json
         npm --offline run -s hi",
        "42",
    ),
    (
        "a python package without network",
        "python3",
        "mkdir -p pkg && echo 'print(\"packaged\")' > pkg/__main__.py &&
         /usr/bin/python3 -m zipapp pkg -o pkg.pyz && /usr/bin/python3 pkg.pyz",
        "packaged",
    ),
    ("process substitution", "bash", "cat <(echo one) <(echo two)", "two"),
    ("/dev/stdout by name", "bash", "echo err > /dev/stderr; echo out > /dev/stdout", "out"),
    (
        "a terminal of its own",
        "script",
        "script -qec 'test -t 0 && tty > tty' /dev/null > /dev/null; cat tty",
        "/dev/pts/0",
    ),
    ("a named pipe", "bash", "mkfifo p; echo through > p & cat p", "through"),
    (
        "tar and back",
        "tar",
        "mkdir a; echo t > a/t; tar czf a.tgz a && rm -r a && tar xzf a.tgz && cat a/t",
        "t",
    ),
    (
        "make, with jobs",
        "make",
        "printf 'all: a b\\na b:\\n\\t@echo $@ > $@.out\\n' > Makefile
         make -s -j2 && cat a.out b.out",
        "b",
    ),
    (
        "a server and a client on the private loopback",
        "perl",
        "perl -MIO::Socket -e '
            $s = IO::Socket::INET->new(Listen => 1, LocalAddr => \"127.0.0.1\") or die;
            if (!fork) { $c = $s->accept; print $c \"served\\n\"; exit }
            $c = IO::Socket::INET->new(\"127.0.0.1:\" . $s->sockport) or die; print <$c>'",
        "served",
    ),
    (
        "locks, time limits and the user's name",
        "flock",
        "flock f -c 'timeout 5 echo locked'; test -n \"$(date)\" && id -un",
        "cortex",
    ),
];

#[tokio::test]
async fn everyday_work_is_possible() {
    for (what, program, text, last) in WORK {
        // Only what lies in a directory of programs of the system is visible inside.
        let visible = format!("PATH=/usr/local/bin:/usr/bin:/bin command -v {program}");
        if !succeeds_outside(&visible, std::path::Path::new("/")) {
            eprintln!("skipped: {what}: no {program} on this machine");
            continue;
        }
        let workspace = TempDir::new().unwrap();
        let ran = run(in_workspace(text, workspace.path())).await;
        assert!(ran.succeeded(), "{what}: {ran:?}");
        assert_eq!(ran.stdout.lines().last(), Some(last), "{what}: {ran:?}");
    }
}
