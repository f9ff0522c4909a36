"""Measures cortex mesh beside its peers. Called by `scripts/bench`, which installs and builds."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import exec_bench
import hub_bench
import report
import sandbox_bench
import sync_bench
from mesh import ROOT
from results import Results
from world import Failed, World

PARTS = {"exec": exec_bench, "sandbox": sandbox_bench, "sync": sync_bench, "hub": hub_bench}
DOCS = ROOT / "docs/benchmarks.md"
VERSIONS = [["ssh", "-V"], ["rsync", "--version"], ["unison", "-version"],
            ["syncthing", "--version"], ["bwrap", "--version"],
            ["ansible", "--version"]]


def arguments():
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Measures cortex mesh beside its peers: rsync over ssh, "
        "unison, syncthing, ssh with a master connection, bubblewrap, ansible. Everything runs on loopback "
        "below one scratch directory (in TMPDIR).")
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--runs", type=int, default=5, metavar="N",
                        help="how often each is measured [default: 5; exec and sandbox starts: "
                        "20 times as often]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--write-docs", action="store_true", help="write docs/benchmarks.md anew")
    parser.add_argument("--from", type=Path, dest="earlier", metavar="FILE",
                        help="measure nothing; take the figures that --json wrote")
    parser.add_argument("--programs", type=Path, metavar="DIR",
                        help="measure the programs there, as scripts/release makes them")
    chosen = parser.parse_args()
    if chosen.runs < 1:
        parser.error("--runs: at least 1")
    return chosen


def said(command):
    """The first line of what a program prints, or nothing if it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except FileNotFoundError:
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else ""


def environment(world):
    """What machine this is, and what is measured on it."""
    dirty = " with changes" if said(["git", "status", "--porcelain", "--untracked-files=no"]) else ""
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.date.today().isoformat(),
        "commit": said(["git", "rev-parse", "--short=10", "HEAD"]) + dirty,
        "command": " ".join(["scripts/bench", *sys.argv[1:]]),
        "cores": os.cpu_count(),
        "cpu": cpu.group(1).strip() if cpu else platform.machine(),
        "memory_gib": round(int(memory.group(1)) / 1024 / 1024),
        "kernel": platform.release(),
        "filesystem": said(["stat", "-f", "-c", "%T", str(world.scratch)]),
        "load_at_start": f"{os.getloadavg()[0]:.1f}",
        "versions": [version for version in map(said, VERSIONS) if version],
    }


def main():
    chosen = arguments()
    if chosen.earlier:
        results = Results.from_json(json.loads(chosen.earlier.read_text()))
    else:
        with World() as world:
            results = Results(environment(world))
            for part, module in PARTS.items():
                if chosen.part not in (part, "all"):
                    continue
                try:
                    module.measure(world, results, chosen.runs)
                except Failed as error:
                    results.failed(part, str(error))
    if chosen.json:
        chosen.json.write_text(json.dumps(results.to_json(), indent=1) + "\n")
    if chosen.write_docs:
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(report.page(results))
    print(report.table(results))
    return 1 if results.failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
