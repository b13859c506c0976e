#!/usr/bin/env bash
# Prints the --workdir of a command, for launchers that look there for checkpoints; nothing for a command without one.
#
#     launch/workdir_of.sh COMMAND...
set -u

# Sets `workdir` to the last --workdir among the words of a command, or in a script of a shell that one of them is; to
# nothing without one. Flags are read as the program does: one dash or two, the value after = or in the next word.
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
printf %s "$workdir"
