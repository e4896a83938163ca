"""Machines for `tpu_setup.sh` on which everything else is fake: python3, apt-get, gcloud, systemctl, ...

The PATH of such a machine holds nothing but a few of the system's own programs, and scripts that write down how they
were called. The fake gcloud has workers, which are directories, and runs commands in all of them at once.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tpu_setup.sh"
SYSTEM = "bash cat cp date dirname env git gzip id mkdir mktemp rm sed sh sort tail tar tee timeout touch"

FAKES = {
    # python3 is too old if the file "old" says so; it has no venv if "no-venv" is there.
    "python3": """
case "$*" in
    *"version_info < "*) [[ ! -e $FAKE/old || $0 == *python3.11 ]] ;;
    *"import ensurepip"*) [[ ! -e $FAKE/no-venv ]] ;;
    *print*) echo python3.12-venv ;;
esac""",
    "apt-get": """
[[ $* != *" python3.11 "* ]] || cp "$FAKE/bin/python3" "$FAKE/bin/python3.11"
[[ $* != *" make"* ]] || cp "$FAKE/make" "$FAKE/bin/make" """,
    "make": """
[[ ! -e $FAKE/make-fails-on-${WORKER-} ]] || { echo "no disk" >&2; exit 7; }
[[ ! -d .venv ]] || exit 0
mkdir -p .venv/bin
cp "$FAKE/venv-python" .venv/bin/python
cp "$FAKE/mod-star" .venv/bin/mod-star""",
    "venv-python": """
case "$*" in
    "-m pip install "*) touch .venv/libtpu ;;
    *packaging.requirements*) [[ -e .venv/libtpu ]] ;;
    *jax.devices*) sed "s/WORKER/${WORKER-0}/" "$FAKE/chips" ;;
    *) exec "$PYTHON" "$@" ;;
esac""",
    "mod-star": """
mkdir -p "$2"
cp "$FAKE/summary.json" "$2"
exit "$(cat "$FAKE/train-exit")" """,
    "sudo": """exec "$@" """,
    "systemctl": """
case $1 in
    is-active) [[ $(cat "$FAKE/service") == "active "* ]] ;;
    show)
        read -r state code status <"$FAKE/service"
        printf '%s\n' "ExecMainCode=$code" "ExecMainStatus=$status" "ActiveState=$state"
        ;;
    start | restart) echo active 0 0 >"$FAKE/service" ;;
esac""",
    "sleep": "",
    "gcloud": r"""
name=$5
for word; do
    case $word in
        --command=*) command=${word#*=} ;;
        --worker=all) workers=$(cat "$FAKE/workers") ;;
        --worker=0) workers=0 ;;
    esac
done
case "$3 $4" in
    "tpu-vm scp") for worker in $workers; do cp "$5" "$FAKE/worker-$worker/"; done ;;
    "tpu-vm ssh")
        for worker in $workers; do
            (cd "$FAKE/worker-$worker" && WORKER=$worker HOSTNAME=w-$worker bash -c "$command") &
            processes+=("$!")
        done
        for process in "${processes[@]}"; do
            wait "$process" || { status=$?; echo "##### Command execution failed with exit status $status" >&2; }
        done
        exit "${status-0}"
        ;;
    "queued-resources describe")
        read -r state service <"$FAKE/states" # and what has become of the service, if anything has
        sed -i 1d "$FAKE/states"
        [[ -z $service ]] || echo "$service" >"$FAKE/service"
        case $state in
            ABSENT) echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no $name" >&2; exit 1 ;;
            GLITCH) echo "ERROR: no route to host" >&2; exit 1 ;;
            *) echo "$state" ;;
        esac
        ;;
    "queued-resources create") [[ ! -e $FAKE/no-quota ]] ;;
    "queued-resources delete") echo inactive 0 0 >"$FAKE/service"; rm -rf "$FAKE"/worker-*/* ;;
esac""",
}


class Machine:
    """One with fake programs; `clone` is a repository with the script in it.

    Files in its directory say how the programs behave: see `FAKES`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.clone, self.bin = path, path / "a clone", path / "bin"
        for directory in (
            self.clone,
            self.bin,
            path / "etc/systemd/system",
            path / "sys/kernel/mm/transparent_hugepage",
        ):
            directory.mkdir(parents=True)
        shutil.copy(SCRIPT, self.clone)
        bash = shutil.which("bash")
        for name in SYSTEM.split():
            (self.bin / name).symlink_to(str(shutil.which(name)))
        for name, text in FAKES.items():
            at = path if name in ("venv-python", "mod-star") else self.bin
            note = f'printf \'%s\\x1f\' {name} "$@" >"$FAKE/log/$EPOCHREALTIME-$BASHPID"'
            (at / name).write_text(f"#!{bash}\n{note}\n{text}\n")
            (at / name).chmod(0o755)
        shutil.copy(self.bin / "make", path)
        self.set("chips", "JAX 0.10.2: host 0 of 1 has 8 of 8 chips, TPU v5 lite\n8 1 WORKER 77\n")
        self.set_result()
        self.set("train-exit", "0")
        self.set("service", "inactive 0 0")  # its ActiveState, ExecMainCode and ExecMainStatus
        self.set("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")

    def set(self, name: str, text: str) -> None:
        """Writes a file."""
        (self.path / name).write_text(text)

    def set_result(self, loss: float = 2.5, skipped: int = 0) -> None:
        """What the minute of training comes to."""
        summary = {"steps": 200, "tokens_per_second": 1e6, "skipped": skipped, "evaluation": {"eval_loss": loss}}
        self.set("summary.json", json.dumps(summary))

    def set_workers(self, number: int) -> None:
        """A slice of `number` hosts with 4 chips each, and a clone that git knows."""
        self.set("workers", " ".join(map(str, range(number))))
        self.set("chips", f"chips of host WORKER\n{4 * number} {number} WORKER 77\n")
        for worker in range(number):
            (self.path / f"worker-{worker}").mkdir()
        (self.clone / "mod_star").mkdir()
        (self.clone / "mod_star/new.py").touch()
        (self.clone / "mod_star/gone.py").touch()
        (self.clone / "data.bin").touch()
        for words in (["init", "-q"], ["add", "tpu_setup.sh", "mod_star"]):
            subprocess.run(["git", *words], cwd=self.clone, check=True)
        (self.clone / "mod_star/gone.py").unlink()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs the script there."""
        environment = {"PATH": str(self.bin), "FAKE": str(self.path), "HOME": str(self.path), "PYTHON": sys.executable}
        environment |= {"TPU_SETUP_ROOT": str(self.path), "TMPDIR": str(self.path), "LC_ALL": "C.UTF-8"}
        shutil.rmtree(self.path / "log", ignore_errors=True)
        (self.path / "log").mkdir()
        return subprocess.run(
            ["bash", str(self.clone / "tpu_setup.sh"), *words],
            cwd=self.path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def calls(self, *start: str) -> list[list[str]]:
        """How programs were called in the last run, those calls that begin like this."""
        calls = [path.read_text().split("\x1f")[:-1] for path in sorted((self.path / "log").iterdir())]
        return [call for call in calls if call[: len(start)] == list(start)]

    def files(self) -> dict[str, bytes]:
        """All of them but the log and git's."""
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in self.path.rglob("*")
            if path.is_file() and not path.is_symlink() and path.parent.name != "log" and ".git" not in path.parts
        }
