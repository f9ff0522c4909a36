#!/bin/sh
# Installs cortex-agent and cortex-hubd from a local build.
#   ./install.sh [--prefix DIR]     default: /usr/local as root, ~/.local otherwise
set -eu

prefix=
while [ $# -gt 0 ]; do
  case $1 in
    --prefix)
      [ $# -ge 2 ] || { echo "error: --prefix needs a directory" >&2; exit 2; }
      prefix=$2
      shift 2
      ;;
    -h | --help)
      sed -n '2,3s/^# //p' "$0"
      exit 0
      ;;
    *)
      echo "error: unknown argument $1 (see --help)" >&2
      exit 2
      ;;
  esac
done
if [ -z "$prefix" ]; then
  if [ "$(id -u)" = 0 ]; then prefix=/usr/local; else prefix=$HOME/.local; fi
fi

here=$(cd "$(dirname "$0")" && pwd)
build=
for profile in dist release; do
  if [ -x "$here/target/$profile/cortex-agent" ] && [ -x "$here/target/$profile/cortex-hubd" ]; then
    build=$here/target/$profile
    break
  fi
done
if [ -z "$build" ]; then
  echo "error: there is no local build" >&2
  echo "hint: cargo build --release" >&2
  exit 1
fi

mkdir -p "$prefix/bin"
for program in cortex-agent cortex-hubd; do
  # Beside the target and renamed over it: a running program keeps its file, and an interrupted
  # installation leaves the old one.
  temporary=$prefix/bin/.$program.$$
  cp "$build/$program" "$temporary"
  chmod 755 "$temporary"
  mv -f "$temporary" "$prefix/bin/$program"
  echo "installed $prefix/bin/$program"
done
