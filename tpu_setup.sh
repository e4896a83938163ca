#!/usr/bin/env bash
# Sets up mod_star on Cloud TPUs, checks the chips, trains for about a minute on all of them, and says what is next.
#
#   on a TPU VM, in a clone:     ./tpu_setup.sh [OPTIONS]
#   on your machine, by gcloud:  ./tpu_setup.sh --all-workers TPU --zone ZONE [--project ID] [OPTIONS]
#   a spot TPU, kept alive:      ./tpu_setup.sh --all-workers TPU --zone ZONE [--project ID] --train COMMAND
#                                    --spot ACCELERATOR_TYPE --runtime-version VERSION [OPTIONS] [-- GCLOUD_FLAGS]
#
#   --prepare COMMAND      on every worker, before the check: mount a disk, fetch data. Runs every time.
#   --runs PLACE           where the minute of training goes (default: runs), a directory or gs://BUCKET/NAME. The hosts
#                          of a slice must share it; without it they check the chips only.
#   --train COMMAND        then, on every worker: as a service, which survives log-out, crashes and reboots
#   --only install|check   on one VM: one half. The hosts of a slice must start the check together.
#   --dry-run              print the commands, change nothing
#
# It can be run any number of times: what is done already is not done again. --all-workers copies the files of this
# clone that git tracks, as they are now, to ~/mod_star on every worker; there bash runs the COMMANDs, that of --train
# with .venv/bin on its path. --spot makes the TPU as a queued resource of the same name (GCLOUD_FLAGS go to its
# creation), makes it again after each preemption, and ends when training has ended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

root=${TPU_SETUP_ROOT-} # where /etc and /sys are: elsewhere in the tests
service=mod-star-train
sudo=()
((EUID == 0)) || sudo=(sudo)

fail() { # fail MESSAGE [EXIT_CODE]
    echo "tpu_setup.sh: $1" >&2
    exit "${2-1}"
}

quoted() { # its arguments as bash would read them
    local word
    for word; do
        if [[ $word =~ ^[[:alnum:]_./:=@%+,-]+$ ]]; then printf ' %s' "$word"; else printf ' %s' "${word@Q}"; fi
    done
}

run() {
    echo "+$(quoted "$@")"
    $dry_run || "$@"
}

# ---- on a TPU VM ----

find_python() { # the first Python that JAX runs on
    local python
    for python in python3 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

# Is the libtpu there that the installed JAX asks for?
libtpu_program='
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement

def fits(need):
    try:
        return need.specifier.contains(version(need.name), prereleases=True)
    except PackageNotFoundError:
        return False

needs = [need for need in map(Requirement, requires("jax")) if need.marker and need.marker.evaluate({"extra": "tpu"})]
raise SystemExit(not needs or not all(map(fits, needs)))'

install() {
    local packages=() python huge_pages=$root/sys/kernel/mm/transparent_hugepage/enabled
    python=$(find_python)
    if [[ -z $python ]]; then
        python=python3.11 # in Ubuntu 22.04, whose own python3 is 3.10; 24.04 has 3.12
        packages+=(python3.11 python3.11-venv)
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        packages+=("$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')")
    fi
    command -v make >/dev/null || packages+=(make)
    if ((${#packages[@]})); then
        # A new VM updates itself for some minutes: wait for its lock.
        local apt=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600)
        run "${apt[@]}" update
        run "${apt[@]}" install --yes "${packages[@]}"
    fi
    run make PYTHON="$python" .venv
    if ! [[ -x .venv/bin/python ]] || ! .venv/bin/python -c "$libtpu_program"; then
        run .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock 'jax[tpu]'
    fi
    # JAX asks for it on v5e and newer: the TPU's runtime starts faster.
    if [[ -f $huge_pages && $(<"$huge_pages") != *"[always]"* ]]; then
        run "${sudo[@]}" sh -c "echo always > $huge_pages"
    fi
    [[ -z $prepare ]] || run bash -c "$prepare"
}

# Prints what there is and, in the last line: chips, hosts, this host's number, and a number that all hosts agree on.
chips_program='
import time
import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

try:
    jax.distributed.initialize()  # needs no options on a Cloud TPU; the hosts of a slice wait for one another here
except ValueError:
    pass  # JAX detects no cluster: one machine
chips, here, hosts, host = jax.devices(), jax.local_device_count(), jax.process_count(), jax.process_index()
if chips[0].platform != "tpu":
    raise SystemExit(f"JAX {jax.__version__} runs on {chips[0].platform}: it sees no TPU")
if len(chips) != hosts * here:
    raise SystemExit(f"{len(chips)} chips on {hosts} hosts, but {here} on this one")
agreed = broadcast_one_to_all(np.int32(time.time()))
print(f"JAX {jax.__version__}: host {host} of {hosts} has {here} of {len(chips)} chips, {chips[0].device_kind}")
print(len(chips), hosts, host, agreed)'

result_program='
import json, math, sys

from mod_star.runs.buckets import working_copy

result = json.loads((working_copy(sys.argv[1]) / "summary.json").read_text(encoding="utf-8"))
loss, skipped = result["evaluation"]["eval_loss"], result["skipped"]
if skipped or not loss < math.log(256):
    raise SystemExit(f"held-out loss {loss}, {skipped} steps skipped: no better than chance")
print("%d steps, %.0f tokens/s, held-out loss %.3f" % (result["steps"], result["tokens_per_second"], loss))'

check() {
    local found=$'(say one host of 8 chips)\n8 1 0 0' chips hosts host agreed runs=$runs
    if systemctl is-active --quiet $service 2>/dev/null; then
        echo "$service is running and has the chips: not checked"
        return
    fi
    echo "+ timeout 400 .venv/bin/python -c '… jax.devices() …'"
    if ! $dry_run; then
        [[ -x .venv/bin/python ]] || fail "there is no .venv yet: leave out --only check"
        found=$(timeout 400 .venv/bin/python -c "$chips_program") ||
            fail "all is installed, but JAX cannot use a TPU here. Most often
  - this is no TPU VM (ls /dev/accel* /dev/vfio/* shows the chips of one);
  - another process holds them (sudo lsof /dev/accel* /dev/vfio/* names it);
  - this is one host of a slice of several, which come up only together: --all-workers does that."
    fi
    echo "${found%$'\n'*}"
    read -r chips hosts host agreed <<<"${found##*$'\n'}"
    if ((hosts > 1)) && [[ -z $runs ]]; then
        echo "No training yet: the $hosts hosts need a directory that they share, or a bucket (--runs; docs/how-to/tpu.md)"
        return
    fi
    runs=${runs:-runs}/tpu_setup-$agreed
    # The batch: a multiple of the number of chips, at least 8.
    run timeout 900 .venv/bin/mod-star train "$runs" --preset small --train.steps 200 --model.dtype bfloat16 \
        --train.batch-size $((chips * ((7 + chips) / chips))) || fail "the chips are there, training failed: see $runs"
    ((host == 0)) || return 0
    echo "+ .venv/bin/python -c '… held-out loss …' $runs"
    $dry_run || .venv/bin/python -c "$result_program" "$runs" || fail "training went wrong: see $runs"
    if [[ $runs == gs://* ]]; then
        run gcloud storage rm --recursive "$runs"
    else
        run rm -rf "$runs"
    fi
}

put() { # put FILE: makes FILE what comes on standard input; if it wasn't yet, says so and sets $changed
    local text
    text=$(cat)
    [[ ! -f $1 || $(<"$1") != "$text" ]] || return 0
    changed=true
    printf '+ write %s:\n%s\n' "$1" "$text"
    $dry_run || "${sudo[@]}" tee "$1" >/dev/null <<<"$text"
}

start_training() {
    local changed=false mounts=""
    [[ $runs != /* ]] || mounts=$'\n'"RequiresMountsFor=\"${runs//%/%%}\""
    put "$root/etc/$service.sh" <<END
cd$(quoted "$PWD") && export PATH="\$PWD/.venv/bin:\$PATH" || exit
$train
END
    # Exit code 2 is a mistake in the command. After all others it goes on from its last checkpoint, but not for ever.
    # Also after 143: another host of the slice got a SIGTERM, which is rebooted, say, and comes back.
    put "$root/etc/systemd/system/$service.service" <<END
[Unit]
Description=mod_star training
Wants=network-online.target
After=network-online.target remote-fs.target$mounts
StartLimitIntervalSec=1h
StartLimitBurst=10

[Service]
User=$(id -un)
ExecStart=/bin/bash /etc/$service.sh
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=2

[Install]
WantedBy=multi-user.target
END
    if $changed; then
        run "${sudo[@]}" systemctl daemon-reload
        run "${sudo[@]}" systemctl enable $service
        run "${sudo[@]}" systemctl restart $service
    elif ! systemctl is-active --quiet $service; then
        run "${sudo[@]}" systemctl start $service
    fi
}

# ---- on your own machine ----

on_workers() { # on_workers COMMAND: on all at once
    run gcloud compute tpus tpu-vm ssh "$all_workers" "${where[@]}" --worker=all --command="$1"
}

pack() { # pack FILE: the tracked files that exist
    local name
    git ls-files -z | while IFS= read -r -d '' name; do
        [[ ! -e $name ]] || printf '%s\0' "$name"
    done | tar -czf "$1" --null --files-from=-
}

set_up_workers() { # called with ||, where set -e is off
    local here=. options=()
    [[ -z $prepare ]] || options+=(--prepare "$prepare")
    [[ -z $runs ]] || options+=(--runs "$runs")
    [[ -z $train ]] || options+=(--train "$train")
    echo "+ git ls-files | tar -czf mod_star.tar.gz"
    $dry_run || { here=$(mktemp -d) && pack "$here/mod_star.tar.gz"; } || return
    run gcloud compute tpus tpu-vm scp "$here/mod_star.tar.gz" "$all_workers:" "${where[@]}" --worker=all || return
    $dry_run || rm -r "$here"
    # Everywhere first the one, then the other: what fails to install fails before hosts wait for one another.
    on_workers "mkdir -p mod_star && cd mod_star && rm -rf mod_star && tar -xzf ../mod_star.tar.gz && \
bash tpu_setup.sh --only install$(quoted "${options[@]}")" || return
    on_workers "cd mod_star && bash tpu_setup.sh --only check$(quoted "${options[@]}")" || return
}

spot_state() { # what the queued resource is: ABSENT, WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...
    local answer describe=(gcloud compute tpus queued-resources describe "$all_workers" "${where[@]}")
    if answer=$("${describe[@]}" --format='value(state.state)' 2>&1); then
        tail -n 1 <<<"$answer"
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo ABSENT
    else
        echo "UNKNOWN, ${answer##*$'\n'}"
    fi
}

keep_spot() {
    local state=ABSENT before="" failures=0 watching=false
    local see="$all_workers still runs: see journalctl --unit $service there"
    while true; do
        $dry_run || state=$(spot_state)
        [[ $state == "$before" ]] || echo "$(date +%T) $all_workers: $state"
        before=$state
        case $state:$watching in
            ABSENT:*)
                watching=false
                run gcloud compute tpus queued-resources create "$all_workers" --node-id="$all_workers" "${where[@]}" \
                    --accelerator-type="$spot" --runtime-version="$runtime_version" --spot "${create_flags[@]}" ||
                    ((++failures < 3)) || fail "$all_workers cannot be created"
                if $dry_run; then set_up_workers && return; fi
                ;;
            FAILED:* | SUSPENDED:*)
                watching=false
                run gcloud compute tpus queued-resources delete "$all_workers" "${where[@]}" --force --quiet ||
                    ((++failures < 3)) || fail "$all_workers cannot be deleted"
                ;;
            ACTIVE:false)
                if set_up_workers; then
                    watching=true failures=0
                else
                    ((++failures < 3)) || fail "the set-up failed three times on end; $all_workers still runs"
                fi
                ;;
            ACTIVE:true)
                case $(gcloud compute tpus tpu-vm ssh "$all_workers" "${where[@]}" --worker=0 \
                    --command="systemctl show --property=ActiveState,ExecMainCode,ExecMainStatus $service | sort" \
                    2>/dev/null </dev/null | tail -n 3) in
                    $'ActiveState=inactive\nExecMainCode=1\nExecMainStatus=0') return 0 ;; # it has exited with 0
                    ActiveState=inactive*) # stopped, or not started; for a moment also in a reboot or a preemption
                        ((++failures < 3)) || fail "training was stopped or never started; $see"
                        ;;
                    ActiveState=failed*) fail "training failed; $see" ;;
                esac
                ;;
        esac
        sleep 60
    done
}

# ---- options ----

usage() { fail "$1; see tpu_setup.sh --help" 2; }

((BASH_VERSINFO[0] >= 5)) || fail "needs bash 5 or newer, this is $BASH_VERSION"
dry_run=false
all_workers="" zone="" project="" prepare="" runs="" train="" only="" spot="" runtime_version="" create_flags=()
while (($#)); do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
        --all-workers | --zone | --project | --prepare | --runs | --train | --only | --spot | --runtime-version)
            [[ -n ${2-} ]] || usage "$1 needs a value"
            option=${1#--}
            printf -v "${option//-/_}" %s "$2"
            shift
            ;;
        --dry-run) dry_run=true ;;
        --) create_flags=("${@:2}") && break ;;
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) usage "unknown argument '$1'" ;;
    esac
    shift
done
[[ $only =~ ^(install|check)?$ ]] || usage "--only = '$only': must be install or check"
[[ -z $only || -z $all_workers ]] || usage "--only is for one VM, not for --all-workers"
[[ -n $all_workers || -z $zone$project$spot ]] || usage "--zone, --project and --spot need --all-workers TPU"
[[ -z $spot || (-n $runtime_version && -n $train) ]] || usage "--spot needs --runtime-version and --train"
[[ -n $spot || (-z $runtime_version && ${#create_flags[@]} == 0) ]] || usage "--runtime-version and -- need --spot"
where=(${zone:+--zone="$zone"} ${project:+--project="$project"})

# ---- and off ----

if [[ -n $all_workers ]]; then
    command -v gcloud >/dev/null || $dry_run || fail "there is no gcloud here (the Google Cloud CLI)"
    if [[ -n $spot ]]; then
        keep_spot
    else
        set_up_workers || fail "not every worker is set up: gcloud names the one that failed, its output says why"
    fi
    at="$all_workers$(quoted "${where[@]}")"
    next="  gcloud compute tpus tpu-vm ssh $at                     # then: cd mod_star
  gcloud compute tpus tpu-vm ssh $at --worker=all --command='cd mod_star && .venv/bin/mod-star train ...'
  gcloud compute tpus $([[ -n $spot ]] && echo "queued-resources delete --force" || echo "tpu-vm delete") $at"
else
    if [[ -n $only ]]; then # so that the workers' outputs can be told apart
        exec > >(sed -u "s/^/[$HOSTNAME] /") 2>&1
    fi
    [[ $only == check ]] || install
    [[ $only == install ]] || check
    [[ $only == install || -z $train ]] || start_training
    next="  make test                            the tests
  make demo                            a Mixture-of-Depths model beside its dense twin
  .venv/bin/mod-star train --help      train on your own text"
fi
if [[ -n $train ]]; then
    next="  journalctl --unit $service --follow     on a worker: what training says
  sudo systemctl stop $service            on every worker: save and stop
$next"
fi
[[ -n $only ]] || printf '\nReady. Next:\n%s\n' "$next"
