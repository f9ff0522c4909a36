#!/bin/sh
# Installs cortex mesh: the programs, and a hub or a node as a service.
#
#   install.sh                      the two programs only
#   install.sh hub                  and the hub as a service
#       [--grpc ADDR:PORT]          where nodes and operators reach it [127.0.0.1:7443]
#       [--http ADDR:PORT]          where machines install from, and browsers look [that address, :7480]
#       [--advertise HOST]          what invites tell them to dial
#   install.sh agent                and this machine as a node; `cortex-hubd invite create` prints the line
#       --hub HOST:PORT --ca PIN    what `cortex-hubd invite create` printed
#       --token-file F, --token-stdin, or CORTEX_TOKEN in the environment
#       [--name N] [--label K=V]... [--workspace-root DIR]
#       [--no-service]              join only; something else than systemd starts the agent
#   install.sh uninstall [--purge]  take back what it did; --purge: and all data
#
# For all:
#   --user         for this user alone (the default unless root): programs in ~/.local/bin
#   --prefix DIR   programs in DIR/bin [/usr/local]
#   --from PATH    a folder with the programs, or an archive of a release [this folder's build]
#   --from URL     with agent: a hub, https://HOST:PORT: its agent is downloaded, for this machine, and checked
#   --pin PIN      the key that this hub has to have, as curl takes it (sha256//...)
#   --sha256 HEX   what the archive has to be; without it, what SHA256SUMS beside it says, if there is one
#   --dry-run      print every step and do none
#
# Every step can be repeated: run it again to upgrade, or after an interruption.
set -eu

fail() {
  echo "error: $1" >&2
  [ $# -lt 2 ] || echo "hint: $2" >&2
  exit 1
}

usage() {
  echo "error: $1" >&2
  echo "hint: $0 --help" >&2
  exit 2
}

# Everything is read before anything is done: a script that arrives by halves does nothing.
main() {
  what=programs dry=false purge=false token_stdin=false no_service=false
  user='' prefix='' from='' sha256='' tls_pin='' grpc='' http='' advertise='' hub='' pin='' token_file='' name='' workspace_root='' labels=''
  case ${1:-} in
    hub | agent | uninstall) what=$1; shift ;;
  esac
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      --user) user=true ;;
      --dry-run) dry=true ;;
      --purge) purge=true ;;
      --token-stdin) token_stdin=true ;;
      --no-service) no_service=true ;;
      --prefix | --from | --sha256 | --pin | --grpc | --http | --advertise | --hub | --ca | --token-file | --name | --label | --workspace-root)
        [ $# -ge 2 ] || usage "$1 needs a value"
        case $1 in
          --prefix) prefix=$2 ;;
          --from) from=$2 ;;
          --pin) tls_pin=$2 ;;
          --sha256) sha256=$2 ;;
          --grpc) grpc=$2 ;;
          --http) http=$2 ;;
          --advertise) advertise=$2 ;;
          --hub) hub=$2 ;;
          --ca) pin=$2 ;;
          --token-file) token_file=$2 ;;
          --name) name=$2 ;;
          --label) labels="$labels$2
" ;;
          --workspace-root) workspace_root=$2 ;;
        esac
        shift ;;
      *) usage "unknown argument $1" ;;
    esac
    shift
  done
  [ "$(id -u)" = 0 ] || user=true
  if [ -z "$prefix" ]; then
    if [ -n "$user" ]; then prefix=$HOME/.local; else prefix=/usr/local; fi
  fi
  bin=$prefix/bin
  scratch=''
  temporary=''
  trap 'rm -rf "$scratch" "$temporary"' EXIT
  trap 'exit 130' INT TERM HUP

  case $what in
    programs)
      find_programs
      programs cortex-agent cortex-hubd
      ;;
    hub) install_hub ;;
    agent) install_agent ;;
    uninstall) uninstall ;;
  esac
}

# Says a step, and does it unless this is a dry run.
step() {
  echo "+ $*"
  if ! $dry; then "$@"; fi
}

# The same for a program of ours, which has a dry run of its own.
service() {
  program=$1
  shift
  echo "+ $program service $*"
  if ! $dry; then
    "$bin/$program" service "$@"
  elif [ -x "$found/$program" ]; then
    "$found/$program" service "$@" --dry-run | sed 's/^/  /'
  fi
}

# Fetches the file $1 from $2 at the hub, by the key that it has to have, if one was given. What was cut short
# goes on where it stopped; a hub from which many download at once says so, and is asked again. It gives up when
# not a byte more has come for this many seconds:
patience_busy=900 patience_cut=300
fetch() {
  file=$1 url=$2
  set -- curl -fsS --proto =https --connect-timeout 20 --speed-limit 1000 --speed-time 60 -C - -o "$file"
  if [ -n "$tls_pin" ]; then
    set -- "$@" --insecure --pinnedpubkey "$tls_pin"
  fi
  echo "+ $* $url"
  if $dry; then return; fi
  most=0 since=$(date +%s) told=''
  while :; do
    if answer=$("$@" -w '%{http_code}' "$url" 2>"$scratch/said"); then return; else code=$?; fi
    size=0
    [ ! -e "$file" ] || size=$(wc -c <"$file")
    now=$(date +%s)
    # A clock that was set back in between says nothing.
    if [ "$size" -gt "$most" ] || [ "$now" -lt "$since" ]; then most=$size since=$now; fi
    patience=$patience_cut
    case $code:$answer in
      *:408 | *:429 | *:5??) patience=$patience_busy ;;
      # It cannot go on in the middle, such as behind a proxy that does not know how, or has another agent now.
      33:* | 36:* | *:416) rm -f "$file" ;;
      # Nothing there, or another's key: so it will be the next time.
      22:* | 1:* | 2:* | 3:* | 23:* | 51:* | 60:* | 77:* | 90:*) patience=0 ;;
      # It was there before, if anything has come.
      5:* | 6:* | 7:*) [ "$size" -gt 0 ] || patience=0 ;;
    esac
    if [ $((now - since)) -ge $patience ]; then
      cat "$scratch/said" >&2
      return 1
    fi
    [ "$told" = "$code:$answer" ] || sed 's/$/; trying again/' "$scratch/said" >&2
    told=$code:$answer
    sleep 5
  done
}

# Makes a folder for what is to be installed beside where it goes: other places may not be for programs.
beside_target() {
  mkdir -p "$bin"
  rm -rf "$bin"/.cortex-download.*
  scratch=$(mktemp -d "$bin/.cortex-download.XXXXXX")
}

# Sets `found` to a folder with the agent that the hub has for this machine.
download() {
  command -v curl >/dev/null || fail "there is no curl on this machine" "install it, or the agent by hand"
  case $(uname -s)-$(uname -m) in
    Linux-x86_64 | Linux-amd64) platform=linux-x86_64 ;;
    Linux-aarch64 | Linux-arm64) platform=linux-aarch64 ;;
    *)
      fail "there is no agent for $(uname -s) on $(uname -m)" \
        "nodes are Linux on x86_64 or aarch64; elsewhere, build it from the sources"
      ;;
  esac
  found=$bin/.cortex-download
  if $dry; then
    echo "+ mkdir -p $bin"
  else
    beside_target
    found=$scratch
  fi
  remedy="is $from reached from here, and has that hub an agent for $platform (its setting http_agents)? \
or give --from with the archive of a release"
  fetch "$found/cortex-agent" "$from/v1/agent/$platform" ||
    fail "the agent cannot be downloaded from $from" "$remedy"
  fetch "$found/SHA256SUMS" "$from/v1/agent/$platform.sha256" ||
    fail "the hash of the agent cannot be downloaded from $from" "$remedy"
  step chmod 755 "$found/cortex-agent"
}

# Sets `found` to a folder with the programs.
find_programs() {
  case $0 in
    # Given to a shell on its standard input: no folder is this script's.
    *install.sh) here=$(cd "$(dirname "$0")" && pwd) ;;
    *)
      here=/nonexistent
      [ -n "$from" ] || fail "--from is missing" "--from with the hub, such as https://HOST:7480"
      ;;
  esac
  case $from in
    https://*)
      [ "$what" = agent ] || usage "--from with a hub is for \`agent\` only: a hub gives away no other program"
      download
      check_sums
      return
      ;;
    *://*) usage "--from takes https:// only" ;;
  esac
  if [ -n "$from" ] && [ -d "$from" ]; then
    found=$(cd "$from" && pwd)
  elif [ -n "$from" ]; then
    [ -r "$from" ] || fail "there is no $from" "--from takes a folder with the programs, or the archive of a release"
    check_archive
    if $dry; then scratch=$(mktemp -d); else beside_target; fi
    no_release="fetch cortex-*.tar.gz of a release again, or unpack what it is and give the folder"
    tar -xzf "$from" -C "$scratch" --strip-components=1 ||
      fail "$from is not an archive of a release" "$no_release"
    found=$scratch
    if [ ! -e "$found/SHA256SUMS" ] || [ ! -e "$found/RELEASE" ]; then
      fail "$from is not an archive of a release" "$no_release"
    fi
  elif [ -x "$here/cortex-agent" ]; then
    found=$here
  else
    found=''
    for profile in dist release; do
      if [ -x "$here/target/$profile/cortex-agent" ] && [ -x "$here/target/$profile/cortex-hubd" ]; then
        found=$here/target/$profile
        break
      fi
    done
    [ -n "$found" ] || fail "there is no local build" "cargo build --release, or --from with a release"
  fi
  check_sums
}

# A release says what its files are, and for which machines; and so does a hub.
check_sums() {
  if [ -e "$found/SHA256SUMS" ]; then
    named=' '
    # Line by line: busybox has no --ignore-missing.
    while read -r sum file; do
      file=${file#\*}
      named="$named$file "
      [ -e "$found/$file" ] || continue
      is=$(sha256sum <"$found/$file" | cut -d ' ' -f 1)
      [ "$is" = "$sum" ] ||
        fail "the programs in $found are not what SHA256SUMS says: $file" "fetch the release again"
    done <"$found/SHA256SUMS"
    for program in cortex-agent cortex-hubd; do
      [ -e "$found/$program" ] || continue
      case $named in
        *" $program "*) ;;
        *) fail "SHA256SUMS in $found does not say what $program is" "fetch the release again" ;;
      esac
    done
  fi
  if [ -e "$found/RELEASE" ]; then
    made_for=$(sed -n 's/^architecture=//p' "$found/RELEASE")
    [ "$made_for" = "$(uname -m)" ] ||
      fail "this release is for $made_for, and this machine is $(uname -m)" "take the release for it"
  fi
}

# The archive is what the caller says, or what the list beside it says.
check_archive() {
  if [ -z "$sha256" ] && [ -e "$(dirname "$from")/SHA256SUMS" ]; then
    sha256=$(sed -n "s/^\([0-9a-f]*\)  $(basename "$from" | sed 's/[.[\*^$/]/\\&/g')\$/\1/p" "$(dirname "$from")/SHA256SUMS")
    [ -n "$sha256" ] || fail "SHA256SUMS beside $from does not name it" "fetch both again, or give --sha256"
  fi
  [ -n "$sha256" ] || return 0
  is=$(sha256sum <"$from" | cut -d ' ' -f 1)
  [ "$is" = "$sha256" ] || fail "$from has the SHA-256 $is, not $sha256" "fetch it again"
}

# A program for another machine, or one that was torn on its way, is not asked anything.
runs_here() {
  # In a dry run, there is none yet from a hub.
  [ -e "$found/$1" ] || return 0
  "$found/$1" --version >/dev/null 2>&1 ||
    fail "$found/$1 does not run on this machine ($(uname -m))" "take the release for it"
}

# Puts programs into place: beside the target and renamed over it, so that a running program keeps its
# file and an interrupted installation leaves the old one.
programs() {
  step mkdir -p "$bin"
  for program in "$@"; do
    if $dry && [ ! -e "$found" ]; then
      echo "+ put $program into $bin"
      continue
    fi
    [ -x "$found/$program" ] || fail "there is no $program in $found"
    runs_here "$program"
    if cmp -s "$found/$program" "$bin/$program"; then
      echo "$bin/$program is up to date"
      continue
    fi
    temporary=$bin/.$program.$$
    if ! $dry; then rm -f "$bin/.$program".*; fi
    step cp "$found/$program" "$temporary"
    step chmod 755 "$temporary"
    # A machine that loses its power has the old program or the new one, whole.
    step sync "$temporary"
    step mv -f "$temporary" "$bin/$program"
  done
  temporary=''
}

has_systemctl() {
  command -v systemctl >/dev/null || fail "there is no systemd on this machine" \
    "the programs are in $bin: start \`$1\` with what this machine has"
}

install_hub() {
  find_programs
  programs cortex-hubd cortex-agent
  has_systemctl "cortex-hubd serve"
  set -- install ${user:+--user}
  [ -z "$grpc" ] || set -- "$@" --grpc "$grpc"
  [ -z "$http" ] || set -- "$@" --http "$http"
  [ -z "$advertise" ] || set -- "$@" --advertise "$advertise"
  service cortex-hubd "$@"
  if $dry; then return; fi
  cat <<TEXT

The hub runs. Next, here:
  cortex-hubd operator create NAME --role admin      prints the line to log in with
  cortex-hubd invite create                          prints the line that admits a node
TEXT
  tell_of_agent
}

# A hub's machine may be a node as well: its agent goes on with the program that it had.
tell_of_agent() {
  process=$(systemctl ${user:+--user} show --property=MainPID --value cortex-agent.service 2>/dev/null) || return 0
  [ "$(readlink "/proc/${process:-0}/exe")" = "$(cd "$bin" && pwd -P)/cortex-agent (deleted)" ] || return 0
  cat <<TEXT

This machine is a node as well, and its agent still runs the old version. To renew it when no command runs:
  the same again with agent in place of hub
TEXT
}

# Whether there is a systemd that services can be given to.
can_serve() {
  command -v systemctl >/dev/null || return 1
  [ -z "$user" ] || systemctl --user show-environment >/dev/null 2>&1
}

install_agent() {
  state=/var/lib/cortex-agent
  [ -z "$user" ] || state=${XDG_DATA_HOME:-$HOME/.local/share}/cortex-agent
  if [ -n "$hub" ]; then
    [ -n "$pin" ] || usage "--ca is missing"
  else
    [ -z "$pin$token_file" ] || usage "--hub is missing"
  fi
  find_programs
  runs_here cortex-agent
  # Only the agent can tell: files of a node are left behind by one that has left, or did not join to the end.
  if [ -z "$hub" ] && [ -x "$found/cortex-agent" ] &&
    ! problem=$("$found/cortex-agent" --state "$state" identity show 2>&1 >/dev/null); then
    echo "$problem" >&2
    usage "--hub is missing"
  fi
  programs cortex-agent
  # A node of this mesh keeps its identity, and one of another is told so.
  [ -z "$hub" ] || join
  # A node without systemd is a node all the same, once something starts it.
  if $no_service || ! { $dry || can_serve; }; then
    $no_service || echo "systemd cannot be used here; start the node with what there is:"
    echo "CORTEX_STATE=$state $bin/cortex-agent run"
    return
  fi
  service cortex-agent install ${user:+--user}
}

join() {
  [ -n "$user" ] || [ -n "$workspace_root" ] || workspace_root=/srv/cortex
  set -- --state "$state" join "$hub" --ca "$pin"
  [ -z "$name" ] || set -- "$@" --name "$name"
  [ -z "$workspace_root" ] || set -- "$@" --workspace-root "$workspace_root"
  if [ -n "$token_file" ]; then set -- "$@" --token-file "$token_file"; fi
  if $token_stdin; then set -- "$@" --token-stdin; fi
  old_ifs=$IFS
  IFS='
'
  # As they are, and not as patterns of files' names.
  set -f
  for label in $labels; do set -- "$@" --label "$label"; done
  set +f
  IFS=$old_ifs
  # The token is in a file, on standard input or in the environment: never in arguments.
  step "$bin/cortex-agent" "$@"
}

uninstall() {
  found=$bin
  for program in cortex-agent cortex-hubd; do
    if [ -x "$bin/$program" ] && "$bin/$program" --version >/dev/null 2>&1; then
      set -- uninstall ${user:+--user}
      if $purge; then set -- "$@" --purge; fi
      service "$program" "$@"
    else
      without_program "$program"
    fi
    step rm -f "$bin/$program"
  done
}

# What a program does to uninstall itself, where there is none that runs.
without_program() {
  units=$1.service
  [ "$1" != cortex-hubd ] || units="$units cortex-hubd.socket cortex-hubd-http.socket"
  settings=/etc/cortex folder=/etc/systemd/system state=/var/lib/$1
  if [ -n "$user" ]; then
    settings=${XDG_CONFIG_HOME:-$HOME/.config}/cortex
    folder=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
    state=${XDG_DATA_HOME:-$HOME/.local/share}/$1
  fi
  for unit in $units; do
    [ -e "$folder/$unit" ] || continue
    # Without a service manager that can be asked, nothing runs of it.
    step systemctl ${user:+--user} disable --now "$unit" || true
    step rm -f "$folder/$unit" "$folder"/*.wants/"$unit"
    step systemctl ${user:+--user} daemon-reload || true
  done
  $purge || return 0
  [ ! -e "$state" ] || step rm -rf "$state"
  if [ "$1" = cortex-hubd ] && [ -e "$settings/hubd.toml" ]; then step rm -f "$settings/hubd.toml"; fi
  if [ "$1" = cortex-hubd ] && [ -z "$user" ] && id cortex-hubd >/dev/null 2>&1; then
    step userdel cortex-hubd || true
  fi
}

main "$@"
