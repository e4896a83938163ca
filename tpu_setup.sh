#!/usr/bin/env bash
# Sets up mod_star on a TPU VM (one host), from a fresh clone: bash tpu_setup.sh [--dry-run]
#
# Finds Python 3.11 or newer (installs it with apt where there is none), makes .venv from requirements.lock, adds the
# TPU runtime that belongs to the locked JAX, and checks that JAX sees the chips. What is done already is not done
# again, so it can be run any number of times. --dry-run prints the commands and changes nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

dry_run=false
case "${1-}" in
    "") ;;
    --dry-run) dry_run=true ;;
    -h | --help)
        sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *)
        echo "tpu_setup.sh: unknown argument '$1' (only --dry-run is one)" >&2
        exit 2
        ;;
esac

run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    $dry_run || "$@"
}

apt_install() {
    local root=()
    ((EUID == 0)) || root=(sudo)
    run "${root[@]}" apt-get update
    run "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes "$@"
}

is_recent() { # is_recent COMMAND: is it a Python that JAX runs on?
    command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

# 1. What the machine must bring: Python with venv, and make.
packages=()
python=$(find_python)
if [[ -z $python ]]; then
    python=python3.11 # in Ubuntu 22.04, whose own python3 is 3.10; 24.04 has 3.12
    packages+=(python3.11 python3.11-venv)
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    packages+=("$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')")
fi
command -v make >/dev/null || packages+=(make)
((${#packages[@]} == 0)) || apt_install "${packages[@]}"

# 2. The package, and the libtpu of exactly the JAX that the lock names.
run make PYTHON="$python" .venv
run .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock 'jax[tpu]'

# 3. Are the chips there? JAX waits for a chip that another process holds, hence the limit.
look='
import jax
chips = jax.devices()
if chips[0].platform != "tpu":
    raise SystemExit(f"JAX {jax.__version__} runs on {chips[0].platform}: it sees no TPU")
print(f"JAX {jax.__version__} sees {len(chips)} chips: {chips[0].device_kind}")
'
printf '+ %s\n' ".venv/bin/python -c '… jax.devices() …'"
if $dry_run; then exit; fi
if ! timeout 180 .venv/bin/python -c "$look"; then
    cat >&2 <<'END'
tpu_setup.sh: everything is installed, but JAX cannot use a TPU here. Most often
  - this is no TPU VM (ls /dev/accel* /dev/vfio/* shows the chips of one);
  - another process holds them (sudo lsof /dev/accel* /dev/vfio/* names it);
  - this is one host of a slice of several, which come up only together.
END
    exit 1
fi

cat <<'END'

Ready. Next:
  make test                            the tests
  make demo                            a Mixture-of-Depths model beside its dense twin
  .venv/bin/mod-star train --help      train on your own text
END
