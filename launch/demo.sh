#!/bin/sh
# The whole path on one machine: text -> tokens -> two models side by side (with TTT and its dense twin, stopped half
# way and resumed) -> evaluation by position -> Hugging Face folder -> a sample. About ten minutes on two cores.
# Every command is an ordinary one and is printed before it runs. Running the script again continues where it was.
set -eu
cd "$(dirname "$0")/.."

RUN=runs/tiny
CONFIG=configs/tiny.py
PROMPT='def read_lines(path):
    """Return the lines of a file."""
'
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"  # two runs at once would fight over one accelerator

show() {
    printf '\n$'
    printf ' %s' "$@"
    printf '\n'
    "$@"
}

# on_core CORE COMMAND...: keeps a run to one core, where the system can do that.
on_core() {
    core=$1
    shift
    if command -v taskset >/dev/null 2>&1 && taskset -c "$core" true 2>/dev/null; then
        taskset -c "$core" "$@"
    else
        "$@"
    fi
}

# mark NAME: puts a name before each line, as soon as the line is there.
if sed -u '' </dev/null >/dev/null 2>&1; then
    mark() { sed -u "s/^/[$1] /"; }
else
    mark() { sed "s/^/[$1] /"; }
fi

# train_both FLAGS...: trains both models at the same time; lines are marked with the model's name.
train_both() {
    printf '\n$ intttrain train --config=%s --workdir=%s/ttt %s &' "$CONFIG" "$RUN" "$*"
    printf '\n$ intttrain train --config=%s:dense --workdir=%s/dense %s\n' "$CONFIG" "$RUN" "$*"
    rm -f "$RUN/failed"
    {
        on_core 0 intttrain train --config="$CONFIG" --workdir="$RUN/ttt" "$@" 2>&1 || touch "$RUN/failed"
    } | mark 'ttt  ' &
    {
        on_core 1 intttrain train --config="$CONFIG:dense" --workdir="$RUN/dense" "$@" 2>&1 || touch "$RUN/failed"
    } | mark dense
    wait
    if [ -e "$RUN/failed" ]; then
        echo "error: training failed, see above" >&2
        exit 1
    fi
}

if [ -e "$RUN" ]; then
    echo "$RUN exists: continuing there (remove it to start afresh)"
fi

echo
echo "1/6  Python's standard library -> tokens, some files held out"
if [ -e "$RUN/data" ]; then
    echo "     $RUN/data is there already"
else
    show intttrain prepare --config="$CONFIG" --output="$RUN/data"
fi

echo
echo "2/6  Train the model with TTT and its dense twin, one core each, and stop half way as if pre-empted"
train_both --stop_at_step=300

echo
echo "3/6  The same commands again: both runs resume from their checkpoints"
train_both

echo
echo "4/6  Held-out loss by position: update on, update off, and the model that never had one"
show intttrain eval --config="$CONFIG" --workdir="$RUN/ttt" --dense_workdir="$RUN/dense"

echo
echo "5/6  Export to a Hugging Face folder"
if [ -e "$RUN/hf" ]; then
    echo "     $RUN/hf is there already"
else
    show intttrain export --workdir="$RUN/ttt" --output="$RUN/hf"
fi

echo
echo "6/6  A sample"
show intttrain generate --workdir="$RUN/ttt" --prompt="$PROMPT" --max_new_tokens=200 --temperature=0.5

echo
echo "Plot:                 $RUN/ttt/eval/600/positions.png"
echo "Hugging Face folder:  $RUN/hf"
echo "TensorBoard logs:     $RUN/ttt/tensorboard and $RUN/dense/tensorboard"
