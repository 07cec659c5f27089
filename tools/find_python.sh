#!/bin/sh
# Print the first Python that can set the project up: 3.10 to 3.13, with venv. If there is none, print one line that
# says what to install. An argument names the only Python to try.
# Python 3.11 goes first because the published weights and figures were made with it.
[ -n "${1-}" ] || set -- python3.11 python3.12 python3.13 python3.10 python3
unfit=
no_venv=
for python in "$@"; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null) || continue
    case $version in
    3.1[0-3])
        if "$python" -c 'import ensurepip, venv' 2> /dev/null; then
            echo "$python"
            exit 0
        fi
        no_venv=${no_venv:-"$python has no venv; on Debian or Ubuntu: apt install python$version-venv"}
        ;;
    *) unfit="$python is Python $version; install one from 3.10 to 3.13 and name it: make PYTHON=<path>" ;;
    esac
done
if [ $# -eq 1 ]; then
    missing="$1: no such Python; make PYTHON=<path> takes one from 3.10 to 3.13"
else
    missing="no Python found; install 3.10 to 3.13 with venv, on Debian or Ubuntu: apt install python3 python3-venv"
fi
echo "error: ${no_venv:-${unfit:-$missing}}" >&2
exit 1
