#!/usr/bin/env bash
# A batch script of SLURM: one task for each process, a checkpoint before the time limit, and the queue again after it.
#
#     sbatch --nodes=N --ntasks-per-node=M --time=HH:MM:SS [OPTION...] launch/slurm.sh COMMAND...
#     launch/slurm.sh --dry_run COMMAND...          prints the commands of the job
#
# Options of sbatch win over the ones below. SIGTERM reaches this script 300 s before the time limit; it passes it on,
# training saves, and the job is queued again. A failure starts COMMAND again in the same allocation, until MAX_RESTARTS
# (5) brought no newer checkpoint into its --workdir: a folder that all nodes see, or a bucket, listed with gcloud. 0, 2
# and 3 end the job.
#
#SBATCH --job-name=intttrain
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -u

MAX_RESTARTS=${MAX_RESTARTS:-5}

refuse() {
    echo "error: $1; sbatch [OPTION...] launch/slurm.sh COMMAND..., or launch/slurm.sh --dry_run COMMAND..." >&2
    exit 2
}

dry_run=false
if [ "${1-}" = --dry_run ]; then
    dry_run=true
    shift
fi
[ $# -ge 1 ] || refuse "there is no command"
[[ $MAX_RESTARTS =~ ^[0-9]{1,4}$ ]] || refuse "MAX_RESTARTS=$MAX_RESTARTS is not a whole number from 0 to 9999"
[ "$dry_run" = true ] || [ -n "${SLURM_JOB_ID-}" ] || refuse "this is not a job of SLURM"

# Sets `workdir` to the last --workdir among the words of a command, or in a script of a shell that one of them is; to
# nothing without one. Flags are read as the program does: one dash or two, the value after = or in the next word.
# As in workdir_of.sh, which is not there: SLURM runs a copy of this file from a folder of its own.
find_workdir() {
    local word flag flag_quote next=false double='"([^"]*)"' single="'([^']*)'"
    flag="(^|[[:space:]])([\"']?)--?workdir(=|[[:space:]]+)($double|$single|([^[:space:]\"';&|)]+))(.*)"
    workdir=''
    for word in "$@"; do
        if [ $next = true ]; then
            workdir=$word next=false
        elif [[ $word =~ ^--?workdir=(.*)$ ]]; then
            workdir=${BASH_REMATCH[1]}
        elif [[ $word =~ ^--?workdir$ ]]; then
            next=true
        else
            while [[ $word =~ $flag ]]; do
                workdir=${BASH_REMATCH[5]}${BASH_REMATCH[6]}${BASH_REMATCH[7]} word=${BASH_REMATCH[8]}
                flag_quote=${BASH_REMATCH[2]} # before the flag: the value goes on to the next one
                [ -z "$flag_quote" ] || { workdir+=${word%%"$flag_quote"*} && word=${word#*"$flag_quote"}; }
            done
        fi
    done
}

find_workdir "$@"
job=${SLURM_JOB_ID-JOB}
list=()
[[ $workdir != gs://* ]] || list=(gcloud storage ls "${workdir%/}/checkpoints/*/commit_success.txt") # written last
# Tasks end at slightly different times when they save, so the first one must not end the others; 600 s later it does.
step=(srun --kill-on-bad-exit=0 --wait=600 "$@")
signal=(scancel --signal=TERM "$job") # reaches the steps of a job, not its batch script
state=(squeue --noheader "--jobs=$job" --format=%T)
requeue=(scontrol requeue "$job")

if [ "$dry_run" = true ]; then
    show() { echo "# $1" && shift && printf '%q ' "$@" && echo; }
    show "the step" "${step[@]}"
    show "300 s before the time limit" "${signal[@]}"
    show "ended with 130 or 143; next only if RUNNING, so not after scancel" "${state[@]}"
    show "the same job, later" "${requeue[@]}"
    [ ${#list[@]} -eq 0 ] || show "ended with something else than 0, 2 or 3; then the step again" "${list[@]}"
    exit 0
fi

say() { echo "$(date '+%F %T') job $job: $1"; }

# newest_checkpoint: its step, 0 without any.
newest_checkpoint() {
    {
        echo 0
        if [ ${#list[@]} -gt 0 ]; then
            "${list[@]}" 2>/dev/null
        elif [ -n "$workdir" ]; then
            printf '%s\n' "$workdir"/checkpoints/*/
        fi
    } | sed -nE 's:^(.*/)?([0-9]+)(/|/commit_success.txt)?$:\2:p' | sort -n | tail -n 1
}

case $workdir in
    '') say "the command has no --workdir: $MAX_RESTARTS restarts in all, since no checkpoint can be looked for" ;;
    *[\$\`]*) say "--workdir=$workdir is not written out: $MAX_RESTARTS restarts in all" ;;
    gs://*) why=$("${list[@]}" 2>&1 >/dev/null) || [[ $why == *"matched no objects"* ]] ||
        say "$MAX_RESTARTS restarts in all unless this changes: no checkpoints can be looked for: ${why##*$'\n'}" ;;
esac

signals=0
trap 'signals=$((signals + 1)); [ $signals -gt 1 ] || "${signal[@]}"' TERM # a second one would cut the saving short
restarts=0
reached=$(newest_checkpoint)
while :; do
    "${step[@]}" &
    until before=$signals && wait $! && status=0 || status=$? && [ "$before" -eq "$signals" ]; do :; done
    say "the command ended with status $status"
    case $status in
        0 | 2 | 3) exit "$status" ;;
    esac
    if [ $signals -gt 0 ] || [ "$status" -eq 130 ] || [ "$status" -eq 143 ]; then
        [ "$("${state[@]}")" = RUNNING ] || exit "$status" # cancelled, or SLURM itself queues it again
        say "queued again"
        "${requeue[@]}"
        exit
    fi
    newest=$(newest_checkpoint)
    [ "$newest" -le "$reached" ] || restarts=0 reached=$newest
    if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
        say "giving up after $restarts restarts without a checkpoint newer than step $reached"
        exit 1
    fi
    restarts=$((restarts + 1))
    say "starting again (restart $restarts of $MAX_RESTARTS since step $reached)"
done
