#!/usr/bin/env bash
# Keeps a run going on TPU slices that may be pre-empted: requests them as a queued resource, waits, installs, starts
# the command, watches it, and does so again after a pre-emption or a failure. Training resumes from its checkpoints.
#
#     launch/queued.sh --name=NAME --zone=ZONE --accelerator_type=TYPE --runtime_version=VERSION [--project=PROJECT]
#         [--slices=N] [--spot | --reserved] [--python=PYTHON] [--delete] [--dry_run] -- COMMAND...
#
# --workdir in COMMAND has to be a bucket: hosts are deleted with what is on them. Ends with 0 when COMMAND did on all
# hosts (--delete: deletes the slices then), with 2 or 3 when COMMAND did and starting again cannot help, with 1 after
# MAX_RESTARTS (5) without a newer checkpoint. Ctrl-C leaves the slices and the run alone; the same call goes on.
set -u

POLL_SECONDS=${POLL_SECONDS:-60}
MAX_RESTARTS=${MAX_RESTARTS:-5}
PATIENCE_POLLS=10 # for hosts that do not answer, or do not end when others have; longer than the time-outs of training

refuse() {
    echo "error: $1; launch/queued.sh --name=NAME --zone=ZONE --accelerator_type=TYPE --runtime_version=VERSION" \
        "[--project=P] [--slices=N] [--spot | --reserved] [--python=P] [--delete] [--dry_run] -- COMMAND..." >&2
    exit 2
}

name='' zone='' project='' accelerator_type='' runtime_version='' slices=1 python='' tier='' delete=false dry_run=false
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --name=* | --zone=* | --project=* | --accelerator_type=* | --runtime_version=* | --slices=* | --python=*)
            flag=${1%%=*} && printf -v "${flag#--}" %s "${1#*=}" ;;
        --spot | --reserved)
            [ -z "$tier" ] || refuse "$tier and $1 exclude each other"
            tier=$1 ;;
        --delete) delete=true ;;
        --dry_run) dry_run=true ;;
        *) refuse "unknown argument $1" ;;
    esac
    shift
done
for flag in name zone accelerator_type runtime_version; do [ -n "${!flag}" ] || refuse "--$flag is missing"; done
[[ $slices =~ ^[1-9][0-9]{0,2}$ ]] || refuse "--slices=$slices is not a whole number from 1 to 999"
[[ $MAX_RESTARTS =~ ^[0-9]{1,4}$ ]] || refuse "MAX_RESTARTS=$MAX_RESTARTS is not a whole number from 0 to 9999"
[[ $POLL_SECONDS =~ ^[0-9]*\.?[0-9]+$ ]] || refuse "POLL_SECONDS=$POLL_SECONDS is not a number of seconds"
[ $# -ge 2 ] || refuse "there is no command after --"
command=("${@:2}")
workdir=$("$(dirname "$0")/workdir_of.sh" "${command[@]}")
[[ $workdir == gs://* ]] || refuse "the command has no --workdir=gs://..., where new hosts find the checkpoints"
[[ $workdir != *[\$\`]* ]] || refuse "--workdir=$workdir is not written out; checkpoints are looked for there"
checkpoints=${workdir%/}/checkpoints/

where=("--zone=$zone" ${project:+"--project=$project"})
nodes=$name which=("--node-id=$name")
if [ "$slices" -gt 1 ]; then # the service numbers them
    nodes=$name-0 which=("--node-count=$slices" "--node-prefix=$name")
    for ((i = 1; i < slices; i++)); do nodes+=,$name-$i; done
fi
queue=(gcloud compute tpus queued-resources)
describe=("${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)')
create=("${queue[@]}" create "$name" "${where[@]}" "--accelerator-type=$accelerator_type"
    "--runtime-version=$runtime_version" "${which[@]}" ${tier:+"$tier"})
remove=("${queue[@]}" delete "$name" "${where[@]}" --force --quiet)
list=(gcloud storage ls "$checkpoints*/commit_success.txt") # which a save writes last
hosts=("$(dirname "$0")/tpu_vm.sh" "--name=$nodes" "${where[@]}" ${python:+"--python=$python"})
"${hosts[@]}" --dry_run --install >/dev/null || exit # what cannot be installed is not requested

# show COMMAND...: as a shell would read it.
show() { printf '%q ' "$@" && echo; }

# plan WHEN COMMAND...: a step of the dry run.
plan() {
    echo "# $1"
    "${@:2}"
}

if [ "$dry_run" = true ]; then
    hosts+=(--dry_run)
    plan "the state of the request, every $POLL_SECONDS s" show "${describe[@]}"
    plan "NOT_FOUND" show "${create[@]}"
    plan "ACTIVE" "${hosts[@]}" --status
    plan "not started" "${hosts[@]}" --install
    "${hosts[@]}" -- "${command[@]}"
    plan "ended with something else than 0, 2 or 3; then the command again" show "${list[@]}"
    plan "some hosts ended and others still run, $PATIENCE_POLLS times" "${hosts[@]}" --kill
    [ "$delete" = false ] || plan "ended with 0" show "${remove[@]}"
    plan "FAILED, SUSPENDED or unreachable $PATIENCE_POLLS times; then the request again" show "${remove[@]}"
    exit 0
fi

say() { echo "$(date '+%F %T') $name: $1"; }

# end STATUS MESSAGE: says how to delete what is still there.
end() {
    say "$2"
    [ $seen = false ] || [ "$state" = ABSENT ] || say "the slices stay, and cost; to delete them: $(show "${remove[@]}")"
    exit "$1"
}

left="no longer watched; what runs there goes on, and the same call watches it again"
trap 'end 130 "$left"' INT
trap 'end 143 "$left"' TERM
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

# Sets `state`: ABSENT without a request, UNKNOWN and the reason where gcloud fails.
look() {
    local now
    if now=$("${describe[@]}" 2>"$errors"); then
        seen=true
    elif grep -q NOT_FOUND "$errors"; then
        now=ABSENT
    else
        now="UNKNOWN, gcloud says: $(grep -m 1 ERROR "$errors")"
    fi
    [ "$now" = "$state" ] || say "$now"
    state=$now
}

# newest_checkpoint: its step, 0 without any.
newest_checkpoint() {
    { echo 0 && "${list[@]}" 2>/dev/null | sed -nE 's:.*/([0-9]+)/commit_success.txt$:\1:p'; } | sort -n | tail -n 1
}

# again REASON: counts a restart, gives up after too many without a newer checkpoint.
again() {
    local newest
    newest=$(newest_checkpoint)
    [ "$newest" -le "$reached" ] || restarts=0 reached=$newest
    [ "$restarts" -lt "$MAX_RESTARTS" ] ||
        end 1 "$1; giving up after $restarts restarts without a checkpoint newer than step $reached"
    restarts=$((restarts + 1))
    say "$1; starting again (restart $restarts of $MAX_RESTARTS since step $reached)"
}

request() {
    say "requesting $slices x $accelerator_type"
    "${create[@]}" && return
    look
    [ "$state" = ABSENT ] || return # on its way, although gcloud gave up waiting for it
    [ $seen = true ] || end 1 "the request was refused, see above"
    again "the request was refused, see above"
}

# request_again REASON: the next look finds the request gone.
request_again() {
    again "$1"
    patience=$PATIENCE_POLLS
    "${remove[@]}" || say "could not be deleted, see above; trying again"
}

# Installs where the states of the hosts, `lines`, say that nothing ever ran, and starts the command.
start() {
    say "starting the command"
    if [[ $lines == *": not started"* ]] && ! "${hosts[@]}" --install >/dev/null; then
        again "installing failed, see above"
    else
        "${hosts[@]}" -- "${command[@]}" >/dev/null || again "starting failed, see above"
    fi
}

finish() {
    [ "$delete" = false ] || { "${remove[@]}" && state=ABSENT; }
    end 0 "the command is done"
}
# Does what the hosts of an active slice need.
tend() {
    local lines statuses status
    if ! lines=$("${hosts[@]}" --status); then
        patience=$((patience - 1))
        [ $patience -gt 0 ] || request_again "hosts have not answered $PATIENCE_POLLS times"
        return
    fi
    statuses=$(sed -nE 's/.*: ended with status ([0-9]+)$/\1/p' <<<"$lines" | sort -nu | tr '\n' ' ')
    if [[ $lines != *": ended "* && $lines != *": running"* ]]; then
        start
    elif [[ $lines != *": running"* ]]; then
        [[ $lines == *": ended without"* || $lines == *": not started"* || $statuses != '0 ' ]] || finish
        for status in 2 3; do
            [[ " $statuses" != *" $status "* ]] ||
                end "$status" "the command ended with $status, starting again cannot help: $(show "${hosts[@]}" --logs)"
        done
        again "the command ended with status ${statuses:-unknown }"
        start
    elif [[ $lines == *": ended "* || $lines == *": not started"* ]]; then
        patience=$((patience - 1))
        [ $patience -gt 0 ] || "${hosts[@]}" --kill >/dev/null || true
        return
    fi
    patience=$PATIENCE_POLLS
}

state=ABSENT seen=false restarts=0 patience=$PATIENCE_POLLS reached=$(newest_checkpoint)
while :; do
    look
    case $state in
        ABSENT) request ;;
        ACTIVE) tend ;;
        FAILED | SUSPENDED) request_again "the slice is $state" ;;
        UNKNOWN*) [ $seen = true ] || end 1 "nothing was requested" ;;
    esac
    sleep "$POLL_SECONDS" &
    wait $!
done
