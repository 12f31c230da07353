# Sourced by scripts/{run,test,check}: makes .venv when it is missing or out of date. Not a command of its own.
#
# .venv/.stamp says what was installed, last of all, so an interrupted installation is simply done again. Two scripts
# that start at once take turns at the lock.

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
venv=$root/.venv

say() { printf '%s\n' "safelight: $*" >&2; }

fingerprint() { # of everything that an installation depends on, its place included
    { printf '%s\n' "$root"; cat "$root/pyproject.toml" "$root/constraints.txt"; } | sha256sum | cut -d' ' -f1
}

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3 python; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$name"
            return
        fi
    done
    say "Python 3.11 or newer, with its venv module, expected on PATH; found none." \
        "Install it (Debian: apt install python3 python3-venv) and run this again."
    return 1
}

is_ready() { # is_ready KIND: a dev installation also serves `run`
    local kind stamp
    [[ -f $venv/.stamp ]] || return 1
    read -r kind stamp <"$venv/.stamp"
    [[ $stamp == "$(fingerprint)" && ($kind == dev || $kind == "$1") ]]
}

install() { # install KIND
    local python target=.
    [[ $1 == dev ]] && target='.[dev]'
    rm -f "$venv/.stamp"
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null || [[ $(cat "$venv/.root" 2>/dev/null) != "$root" ]]; then
        python=$(find_python) || return 1
        say "making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || return 1
        printf '%s' "$root" >"$venv/.root"
    fi
    say "installing the packages of constraints.txt into .venv (about 1.3 GB; one to three minutes, this once)"
    (cd "$root" && "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        -c constraints.txt -e "$target") >&2 || return 1
    printf '%s %s\n' "$1" "$(fingerprint)" >"$venv/.stamp"
    say "ready"
}

ensure_environment() { # ensure_environment run|dev
    is_ready "$1" && return
    (
        exec 9>"$root/.venv.lock"
        flock -n 9 || { say "waiting for another installation into .venv"; flock 9; }
        is_ready "$1" || install "$1"
    ) || { say "the installation failed (see above); run this again to retry"; exit 1; }
}
