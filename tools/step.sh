#!/bin/sh
# sh tools/step.sh TITLE LOG COMMAND...: print the title, run the command with all that it prints in the log, and print
# how long it took. If it fails, print the last line of the log and where the rest is.
title=$1 log=$2
shift 2
mkdir -p "$(dirname "$log")"
echo "$title (follow it: tail -f $log)"
started=$(date +%s)
# unbuffered, or the error would stand before what was printed earlier
PYTHONUNBUFFERED=1 "$@" > "$log" 2>&1
code=$?
seconds=$(($(date +%s) - started))
if [ $code -ne 0 ]; then
    tr '\r' '\n' < "$log" | grep -v '^ *$' | tail -n 1 >&2
    echo "failed after $seconds s; all that it printed: $log" >&2
    exit $code
fi
echo "    done in $((seconds / 60)) min $((seconds % 60)) s"
