#!/usr/bin/env bash
# Installs the requirements once, then starts a script. run.sh and run_test.sh source this file.
# `bash setup.sh --help` explains how to start it alone.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$repository/.venv

fail() {  # fail EXIT_CODE LINE...
    local code=$1
    shift
    printf 'error: %s\n' "$1" >&2
    [[ $# -lt 2 ]] || printf '       %s\n' "${@:2}" >&2
    exit "$code"
}

# Print the path of the interpreter $1 if its installed versions satisfy the requirements file $2. Nothing heavy is
# imported. An environment marked as incomplete (its installation was interrupted) does not count.
with_requirements() {
    "$1" - "$repository/$2" 2>/dev/null <<'EOF_PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement


def satisfied(path):
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            if not satisfied(path.with_name(line[3:].strip())):
                return False
        elif line:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate():
                continue
            try:
                installed = version(requirement.name)
            except PackageNotFoundError:
                return False
            if not requirement.specifier.contains(installed, prereleases=True):
                return False
    return True


complete = sys.version_info >= (3, 11) and not Path(sys.prefix, "incomplete").exists()
if not (complete and satisfied(Path(sys.argv[1]))):
    sys.exit(1)
print(sys.executable)
EOF_PYTHON
}

find_python() {  # find_python REQUIREMENTS
    with_requirements python3 "$1" || with_requirements python "$1" || with_requirements "$venv/bin/python" "$1" ||
        install "$1"
}

install() {  # install REQUIREMENTS; prints the path of the Python in .venv
    local log=$venv/install.log base
    exec 9<"$repository"
    if command -v flock >/dev/null; then flock 9; fi
    if with_requirements "$venv/bin/python" "$1"; then return; fi # another process has just installed them

    if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$(find_base) || exit
        "$base" -m venv --clear "$venv" >/dev/null 2>&1 || fail 1 "cannot create $venv with $base" \
            "Make $repository writable (and check that the disk is not full)," \
            "or activate a Python >= 3.11 that has the packages in $1."
    fi
    { : >"$venv/incomplete"; } 2>/dev/null || fail 1 "cannot write to $venv" \
        "Make it writable, or activate a Python >= 3.11 that has the packages in $1."
    echo "installing $1 into .venv (once, about 3 minutes and 6 GB) ..." >&2
    if ! "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off \
        -r "$repository/$1" -c "$repository/constraints.txt" >"$log" 2>&1; then
        { grep -E '^ *ERROR|^error' "$log" || cat "$log"; } | tail -n 5 | cut -c 1-300 >&2
        fail 1 "pip could not install $1 (full log: .venv/install.log); run the command again to retry" \
            "Without network access, activate a Python >= 3.11 that has these packages, or download them elsewhere with" \
            "'pip download -r $1 -c constraints.txt -d DIR' and set PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR."
    fi
    rm -f "$venv/incomplete"
    echo "$venv/bin/python"
}

find_base() {  # prints the first Python that can create a virtual environment
    local candidate old=
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                echo "$candidate"
                return
            fi
            old="$candidate lacks the modules venv and ensurepip (on Debian or Ubuntu: apt-get install python3-venv)"
        fi
    done
    fail 1 "${old:-no Python >= 3.11 found (python3 is $(python3 --version 2>/dev/null || echo absent))}" \
        "Install Python 3.11 or newer with its venv module, or activate an environment that has the requirements."
}

start() {  # start train|test [ARGUMENTS_FILE] [FLAGS...]
    local kind=$1 caller=$PWD file=$repository/$1_args/fashion_mnist_dit.txt task suffix script python
    shift
    if [[ $# -gt 0 && $1 != -* ]]; then
        file=$1
        shift
        case $file in
            /*) ;;
            *) if [[ -f $caller/$file ]]; then file=$caller/$file; else file=$repository/$file; fi ;;
        esac
    fi
    [[ -f $file ]] || fail 2 "arguments file $file not found" "Available: $(cd "$repository" && echo "$kind"_args/*.txt)"

    task=$(sed -n "s/^\([^#]*[[:space:]]\)\{0,1\}TASK=[\"']\{0,1\}\([^\"'#[:space:]]*\).*/\2/p" "$file" | tail -n 1)
    case ${task:-generate} in
        generate) suffix= ;;
        inpaint) suffix=_inpainting ;;
        semantic) suffix=_semantic_syn ;;
        *) fail 2 "$file: expected TASK=generate, inpaint or semantic, but found TASK=$task" ;;
    esac
    script=${kind}_flow_latent$suffix.py

    python=$(find_python requirements.txt)
    cd "$repository"
    exec "$python" "$script" --args_file "$file" "$@"
}

usage() {
    cat <<'EOF_USAGE'
usage: bash setup.sh [requirements.txt | requirements-dev.txt]

Prints the path of a Python that has the requirements. This is the active Python if it has them, or else the Python in .venv,
which is created and filled if necessary (once, about 3 minutes and 6 GB). Without a file, it uses requirements.txt.
EOF_USAGE
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    file=${1:-requirements.txt}
    case $file in
        -h | --help) usage && exit ;;
        requirements*.txt) ;;
        *) fail 2 "$file: expected requirements.txt or requirements-dev.txt" "$(usage | head -n 1)" ;;
    esac
    [[ $# -le 1 ]] || fail 2 "expected one requirements file, but got: $*" "$(usage | head -n 1)"
    [[ -f $repository/$file ]] || fail 2 "requirements file $file not found in $repository" "$(usage | head -n 1)"
    find_python "$file"
fi
