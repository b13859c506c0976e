#!/usr/bin/env bash
# Runs one command in several processes on this machine, with forced CPU devices: a pod for tests and for debugging.
#
#     launch/local.sh [--dry_run] PROCESSES DEVICES_PER_PROCESS COMMAND...
#
# Every line of output begins with the number of its process. Ctrl-C and SIGTERM reach all processes. When one fails,
# the others are asked to stop, and after GRACE_SECONDS (10) made to; the exit status is that of the first failure.
# When this script itself is killed, or its terminal closes, the same happens to all of them.
set -u

GRACE_SECONDS=${GRACE_SECONDS:-10}

refuse() {
    echo "error: $1; usage: launch/local.sh [--dry_run] PROCESSES DEVICES_PER_PROCESS COMMAND..." >&2
    exit 2
}

# natural NAME VALUE: refuses a value that is not 1, 2, 3, ...
natural() {
    [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || refuse "$1=$2 is not a whole number from 1 to 9999"
}

dry_run=false
if [ "${1-}" = --dry_run ]; then
    dry_run=true
    shift
fi
[ $# -ge 3 ] || refuse "$# of at least 3 arguments given"
natural GRACE_SECONDS "$GRACE_SECONDS"
natural PROCESSES "$1"
natural DEVICES_PER_PROCESS "$2"
count=$1
devices=$2
shift 2
[ "$dry_run" = true ] || command -v -- "$1" >/dev/null || refuse "there is no command $1"

# A port nobody listens on, below the range from which the system gives ports to outgoing connections.
free_port() {
    local port
    for _ in 1 2 3 4 5 6 7 8 9; do
        port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
        if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    refuse "no free port found"
}

port=$(free_port) || exit
flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
shared=(JAX_PLATFORMS=cpu "XLA_FLAGS=$flags" "INTTTRAIN_COORDINATOR=127.0.0.1:$port" "INTTTRAIN_NUM_PROCESSES=$count")

if [ "$dry_run" = true ]; then
    for ((process = 0; process < count; process++)); do
        printf '%q ' env "${shared[@]}" "INTTTRAIN_PROCESS_ID=$process" "$@"
        echo
    done
    exit 0
fi

# mark NUMBER: puts the number before each line, as soon as the line is there, also before a last one without an end.
mark() {
    local line
    trap '' INT TERM # the last words of a process that was told to stop
    while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

# start NUMBER COMMAND...: runs one process; ends with its status after its last line is out.
start() {
    local process=$1
    shift
    trap : INT TERM
    exec 9>&- # a process that held the lifeline would keep the guard from seeing the end of this script
    env "${shared[@]}" "INTTTRAIN_PROCESS_ID=$process" "$@" </dev/null 2>&1 | mark "$process"
    exit "${PIPESTATUS[0]}"
}

# send SIGNAL: to every process that still runs, and to what it started; fails when none does.
send() {
    local pid found=1
    for pid in "${running[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null && found=0; done
    return $found
}

# guard: reads the numbers of the processes from this script, and ends them if it is gone before it said `end`.
guard() {
    local pid running=()
    trap '' INT TERM HUP
    while read -r pid; do
        [ "$pid" != end ] || return
        running+=("$pid")
    done
    send TERM
    for ((pid = 0; pid < 10 * GRACE_SECONDS; pid++)); do
        send 0 || return
        sleep 0.1
    done
    send KILL
}

# shellcheck disable=SC2329 # called by the traps
forward() {
    signalled=true
    send "$1"
}

signalled=false
running=()
trap 'forward INT' INT
trap 'forward TERM' TERM
set -m # every process leads a group of its own, so that a signal reaches its children too
folder=$(mktemp -d) || refuse "no temporary folder can be made"
mkfifo "$folder/lifeline"
guard <"$folder/lifeline" &
exec 9>"$folder/lifeline"
rm -r "$folder"
for ((process = 0; process < count; process++)); do
    start "$process" "$@" &
    running+=($!)
    echo $! >&9
done

status=0
deadline=
while [ ${#running[@]} -gt 0 ]; do
    alive=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            alive+=("$pid")
            continue
        fi
        wait "$pid"
        ended=$?
        if [ $ended -ne 0 ] && [ $status -eq 0 ]; then
            status=$ended
            deadline=$((SECONDS + GRACE_SECONDS))
        fi
    done
    running=(${alive[@]+"${alive[@]}"})
    if [ -n "$deadline" ] && [ ${#running[@]} -gt 0 ]; then
        # A second signal would cut short the saving that the first one, the user's, asked for.
        [ "$signalled" = true ] || send TERM
        signalled=true
        [ "$SECONDS" -lt "$deadline" ] || send KILL
    fi
    [ ${#running[@]} -eq 0 ] || sleep 0.2
done 2>/dev/null # bash's own notices about ended jobs
echo end >&9
exit "$status"
