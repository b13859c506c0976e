#!/usr/bin/env bash
# Installs and runs intttrain on every host of a TPU VM or pod slice, or of several slices, through gcloud.
#
#     launch/tpu_vm.sh --name=NAME[,NAME...] --zone=ZONE [--project=PROJECT] [--python=PYTHON] [--dry_run] ACTION
#
#     --install      copies this checkout to ~/intttrain on all hosts and installs it into ~/intttrain/venv, with the
#                    tested releases of other packages
#     -- COMMAND...  starts the same command in the background on all hosts, in ~/intttrain
#     --status       says on each host whether it runs, or with which status it ended
#     --logs         the last lines on each host
#     --stop         SIGTERM on all hosts: training saves a checkpoint and ends
#     --kill         SIGKILL on all hosts, for a program that does not end; nothing is saved
#
# Several names are the slices of one run, in this order. --dry_run prints the commands and runs none; the address of
# the first host, which gcloud would be asked for, then stands there as COORDINATOR_IP.
set -eu

refuse() {
    echo "error: $1; launch/tpu_vm.sh --name=NAME[,NAME...] --zone=ZONE [--project=PROJECT] [--python=PYTHON]" \
        "[--dry_run] (--install | --status | --logs | --stop | --kill | -- COMMAND...)" >&2
    exit 2
}

names=()
zone='' project='' python=python3 dry_run=false action=''
while [ $# -gt 0 ] && [ "$action" != run ]; do
    case $1 in
        --name=*) IFS=, read -r -a names <<<"${1#*=}" ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --python=*) python=${1#*=} ;;
        --dry_run) dry_run=true ;;
        --install | --status | --logs | --stop | --kill | --)
            [ -z "$action" ] || refuse "two actions, --$action and $1"
            action=${1#--}
            action=${action:-run}
            ;;
        *) refuse "unknown argument $1" ;;
    esac
    shift
done
[ ${#names[@]} -gt 0 ] || refuse "--name is missing"
[ -n "$zone" ] || refuse "--zone is missing"
[ -n "$action" ] || refuse "there is nothing to do"
[ "$action" != run ] || [ $# -gt 0 ] || refuse "there is no command after --"
checkout=$(cd "$(dirname "$0")/.." && pwd)
[ "$action" != install ] || [ -f "$checkout/setup.py" ] ||
    refuse "--install copies a checkout of intttrain, and $checkout is none; use the launchers of a checkout"
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

# quote TEXT: the text as one word of any shell, as readable as possible.
quote() {
    case $1 in
        '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//\'/\'\\\'\'}" ;;
        *) printf '%s' "$1" ;;
    esac
}

# call COMMAND...: runs it, or prints it so that a shell would read the same words.
call() {
    local word
    if [ "$dry_run" != true ]; then
        "$@"
        return
    fi
    for word in "$@"; do
        quote "$word"
        printf ' '
    done
    echo
}

# on_hosts NAME SCRIPT: runs a script of bash on all hosts of one slice, whatever the login shell there is.
on_hosts() {
    call gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --worker=all --command="bash -c $(quote "$2")" || {
        echo "error: failed on $1, see above; slices named before it were reached, later ones were not" >&2
        exit 1
    }
}

# What the scripts on the hosts begin with. `alive` also looks where the process runs: after a restart of the host the
# number may belong to another program.
# shellcheck disable=SC2016 # expanded on the hosts
begin='set -eu
cd ~/intttrain
host=$(hostname)
alive() { [ -f run.pid ] && [ "$(readlink "/proc/$(cat run.pid)/cwd")" = "$(pwd -P)" ]; }
'

# The shell in between notes the status that the command ends with; it outlives the SIGTERM that both receive.
# shellcheck disable=SC2016
start='if alive; then echo "$host: already running, number $(cat run.pid)" >&2; exit 1; fi
rm -f run.status
export PATH="$PWD/venv/bin:$PATH"
nohup setsid bash -c '\''trap : TERM; "$@"; echo $? >run.status'\'' run "$@" >run.log 2>&1 </dev/null &
echo $! >run.pid
echo "$host: started, number $(cat run.pid), output in ~/intttrain/run.log"'

# shellcheck disable=SC2016
status='if alive; then echo "$host: running, number $(cat run.pid)"
elif [ -f run.status ]; then echo "$host: ended with status $(cat run.status)"
elif [ -f run.pid ]; then echo "$host: ended without a status; was it killed, or the host restarted?"
else echo "$host: not started"; fi'

# shellcheck disable=SC2016
logs='[ ! -f run.log ] || tail -n 20 run.log | sed "s/^/$host: /"'

# shellcheck disable=SC2016
stop='if alive; then kill -TERM -- "-$(cat run.pid)"; echo "$host: asked to stop"; else echo "$host: not running"; fi'

# shellcheck disable=SC2016
kill='if alive; then kill -KILL -- "-$(cat run.pid)"; echo "$host: killed"; else echo "$host: not running"; fi'

install() {
    local archive name script
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    archive=$folder/intttrain.tar.gz
    call tar -czf "$archive" -C "$checkout" --exclude=__pycache__ \
        intttrain configs launch pyproject.toml setup.py constraints.txt README.md LICENSE
    script="set -eu; mkdir -p ~/intttrain; cd ~/intttrain; tar -xzf ~/intttrain.tar.gz; rm ~/intttrain.tar.gz
$(printf '%q' "$python") -m venv venv; venv/bin/python -m pip install --quiet --upgrade -c constraints.txt '.[tpu,gcs]'
echo \"\$(hostname): installed\""
    for name in "${names[@]}"; do
        call gcloud compute tpus tpu-vm scp "$archive" "$name:intttrain.tar.gz" "${where[@]}" --worker=all
        on_hosts "$name" "$script"
    done
}

# run COMMAND...: one slice finds its hosts by itself; several have to be told about each other.
run() {
    local command coordinator=COORDINATOR_IP describe slice together=''
    command=$(printf '%q ' "$@")
    if [ ${#names[@]} -gt 1 ]; then
        describe=(gcloud compute tpus tpu-vm describe "${names[0]}" "${where[@]}"
            '--format=value(networkEndpoints[0].ipAddress)')
        if [ "$dry_run" = true ]; then call "${describe[@]}"; else coordinator=$("${describe[@]}"); fi
        [ -n "$coordinator" ] || refuse "${names[0]} has no network address yet"
    fi
    for slice in "${!names[@]}"; do
        [ ${#names[@]} -eq 1 ] || together="export MEGASCALE_COORDINATOR_ADDRESS=$coordinator \
MEGASCALE_NUM_SLICES=${#names[@]} MEGASCALE_SLICE_ID=$slice
"
        on_hosts "${names[$slice]}" "$begin${together}set -- $command
$start"
    done
}

on_all() {
    local name
    # shellcheck disable=SC2016
    for name in "${names[@]}"; do
        on_hosts "$name" '[ -d ~/intttrain ] || { echo "$(hostname): not started"; exit 0; }
'"$begin$1"
    done
}

case $action in
    install) install ;;
    run) run "$@" ;;
    status) on_all "$status" ;;
    logs) on_all "$logs" ;;
    stop) on_all "$stop" ;;
    kill) on_all "$kill" ;;
esac
