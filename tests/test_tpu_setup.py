"""tpu_setup.sh, run for real on fake machines; its Python programs with the real Python."""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fake_machine import SCRIPT, Machine
from packaging.requirements import Requirement

ODD = "mod-star train 'runs/a b' --data.template 'Q: {q}\n$A \"x\" \\' --x `y` # é"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_on_one_vm_it_installs_checks_trains_and_says_what_is_next(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert machine.calls("apt-get") == []
    assert machine.calls("make") == [["make", "PYTHON=python3", ".venv"]]
    [pip] = machine.calls("venv-python", "-m", "pip")
    assert pip[-3:] == ["-r", "requirements.lock", "jax[tpu]"]
    assert (machine.path / "sys/kernel/mm/transparent_hugepage/enabled").read_text() == "always\n"
    [train] = machine.calls("mod-star", "train")
    assert train[2] == "runs/tpu_setup-77"
    assert train[train.index("--train.batch-size") + 1] == "8"
    assert "has 8 of 8 chips, TPU v5 lite" in done.stdout
    assert "200 steps, 1000000 tokens/s, held-out loss 2.500" in done.stdout
    assert "Ready. Next:" in done.stdout
    assert list((machine.clone / "runs").iterdir()) == []


@pytest.mark.parametrize(("chips", "batch"), [(1, 8), (4, 8), (6, 12), (8, 8), (16, 16)])
def test_the_batch_is_a_multiple_of_the_number_of_chips(machine: Machine, chips: int, batch: int) -> None:
    machine.set("chips", f"chips\n{chips} 1 0 77\n")
    assert machine.run().returncode == 0
    [train] = machine.calls("mod-star", "train")
    assert train[train.index("--train.batch-size") + 1] == str(batch)


def test_a_python_that_is_too_old_gets_a_newer_one_beside_it(machine: Machine) -> None:
    machine.set("old", "")
    (machine.bin / "make").unlink()
    assert machine.run().returncode == 0
    update, install = machine.calls("apt-get")
    assert update[-1] == "update"
    assert install[-5:] == ["install", "--yes", "python3.11", "python3.11-venv", "make"]
    assert all("DPkg::Lock::Timeout=600" in call for call in (update, install))
    assert machine.calls("make") == [["make", "PYTHON=python3.11", ".venv"]]


def test_a_python_without_venv_gets_that(machine: Machine) -> None:
    machine.set("no-venv", "")
    assert machine.run().returncode == 0
    assert machine.calls("apt-get")[1][-1] == "python3.12-venv"
    assert machine.calls("make") == [["make", "PYTHON=python3", ".venv"]]


def test_the_second_time_there_is_nothing_to_do(machine: Machine) -> None:
    machine.set("old", "")
    (machine.bin / "make").unlink()
    assert machine.run().returncode == 0
    machine.set("sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never")  # as Linux shows it
    before = machine.files()
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert machine.calls("apt-get") == machine.calls("venv-python", "-m", "pip") == []
    assert "transparent_hugepage" not in done.stdout
    assert machine.files() == before


def test_training_becomes_a_service_that_is_left_alone_the_second_time(machine: Machine) -> None:
    done = machine.run("--train", ODD)
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in machine.calls("systemctl") if call[1] != "is-active"] == [
        "daemon-reload", "enable", "restart",
    ]  # fmt: skip
    unit = (machine.path / "etc/systemd/system/mod-star-train.service").read_text()
    assert "ExecStart=/bin/bash /etc/mod-star-train.sh\nRestart=on-failure\n" in unit
    assert "\nSuccessExitStatus=" not in unit, "after 143, the SIGTERM of another host of the slice, it goes on"
    assert "\nRequiresMountsFor=" not in unit
    assert (machine.path / "etc/mod-star-train.sh").read_text().partition("\n")[2] == ODD + "\n"
    assert "journalctl --unit mod-star-train" in done.stdout

    done = machine.run("--train", ODD)  # while it runs
    assert done.returncode == 0, done.stderr
    assert "running and has the chips: not checked" in done.stdout
    assert machine.calls("mod-star") == []
    assert {call[1] for call in machine.calls("systemctl")} == {"is-active"}

    assert machine.run("--train", "another").returncode == 0
    assert machine.calls("systemctl", "restart") != []


def test_the_service_runs_its_command_in_the_clone_with_the_environment_first(machine: Machine) -> None:
    assert machine.run("--train", 'pwd; echo "${PATH%%:*}"').returncode == 0
    command = ["bash", str(machine.path / "etc/mod-star-train.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(machine.clone), str(machine.clone / ".venv/bin")]


@pytest.mark.parametrize(
    ("runs", "line"),
    [("/mnt/a %b'c", 'RequiresMountsFor="/mnt/a %%b\'c"'), ("here/runs", None), ("gs://bucket/runs", None)],
)
def test_the_service_waits_for_the_mount_that_runs_are_on(machine: Machine, runs: str, line: str | None) -> None:
    machine.set("service", "active 0 0")  # no minute of training
    assert machine.run("--train", "x", "--runs", runs).returncode == 0
    unit = (machine.path / "etc/systemd/system/mod-star-train.service").read_text().partition("\n\n")[0]
    assert [found for found in unit.splitlines() if "Mounts" in found] == ([line] if line else [])


WORKERS = ("--all-workers", "my-tpu", "--zone=z")
SPOT = (
    *WORKERS,
    "--spot",
    "v5litepod-16",
    "--runtime-version",
    "v2-alpha-tpuv5-lite",
    "--train",
    "mod-star train runs/x",
)


@pytest.mark.parametrize("words", [("--train", "x", "--prepare", "touch y"), (*WORKERS, "--train", "x"), SPOT])
def test_a_dry_run_shows_the_commands_and_changes_nothing(machine: Machine, words: Sequence[str]) -> None:
    machine.set_workers(2)
    before = machine.files()
    done = machine.run("--dry-run", *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert machine.files() == before
    assert {call[0] for call in machine.calls()} <= {"python3", "systemctl"}
    assert not [call for call in machine.calls("systemctl") if call[1] != "is-active"]
    shown = "\n".join(line for line in done.stdout.splitlines() if line.startswith("+ "))
    if words[0] == "--train":
        assert "+ make PYTHON=python3 .venv\n" in shown
        assert "-r requirements.lock 'jax[tpu]'\n" in shown
        assert "mod-star train runs/tpu_setup-0 --preset small" in shown
        assert "systemctl restart mod-star-train" in shown
    else:
        assert "+ gcloud compute tpus tpu-vm scp ./mod_star.tar.gz my-tpu: --zone=z --worker=all\n" in shown
        assert shown.count("+ gcloud compute tpus tpu-vm ssh my-tpu --zone=z --worker=all") == 2
    assert ("queued-resources create my-tpu --node-id=my-tpu --zone=z" in shown) is (words == SPOT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dryrun"], "unknown argument '--dryrun'"),
        (["my-tpu"], "unknown argument 'my-tpu'"),
        (["--train"], "--train needs a value"),
        (["--only", "test"], "--only = 'test': must be install or check"),
        (["--zone", "z"], "need --all-workers"),
        ([*WORKERS, "--only", "check"], "--only is for one VM"),
        ([*WORKERS, "--spot", "v5litepod-16"], "--spot needs --runtime-version and --train"),
        ([*WORKERS, "--runtime-version", "v2"], "need --spot"),
        ([*WORKERS, "--", "--network=n"], "need --spot"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_done(machine: Machine, words: list[str], message: str) -> None:
    done = machine.run(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert machine.calls() == []


def test_help_shows_the_options(machine: Machine) -> None:
    done = machine.run("--help")
    assert done.returncode == 0
    for option in ("--all-workers", "--prepare", "--runs", "--train", "--only", "--spot", "--dry-run"):
        assert option in done.stdout
    assert "set -" not in done.stdout


def test_without_a_tpu_it_fails_and_says_what_may_be_wrong(machine: Machine) -> None:
    (machine.path / "chips").unlink()
    done = machine.run("--train", "x")
    assert done.returncode == 1
    assert "this is no TPU VM" in done.stderr
    assert machine.calls("mod-star") == machine.calls("systemctl", "restart") == []
    assert "Ready" not in done.stdout


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda machine: machine.set("train-exit", "1"), "the chips are there, training failed"),
        (lambda machine: machine.set_result(loss=float("nan")), "no better than chance"),
        (lambda machine: machine.set_result(loss=5.6), "no better than chance"),
        (lambda machine: machine.set_result(skipped=1), "1 steps skipped"),
    ],
)
def test_training_that_goes_wrong_fails_the_set_up(
    machine: Machine, break_it: Callable[[Machine], None], message: str
) -> None:
    break_it(machine)
    done = machine.run("--train", "x")
    assert done.returncode == 1
    assert message in done.stderr
    assert (machine.clone / "runs/tpu_setup-77/summary.json").is_file(), "kept, to look at"
    assert machine.calls("systemctl", "restart") == []


def test_a_slice_is_set_up_on_all_workers_before_any_is_checked(machine: Machine) -> None:
    machine.set_workers(4)
    stale = machine.path / "worker-0/mod_star/mod_star/stale.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    shared = machine.path / "shared"
    done = machine.run(*WORKERS, "--project", "p", "--runs", str(shared))
    assert done.returncode == 0, done.stderr
    scp, *ssh = machine.calls("gcloud")
    assert scp[1:5] == ["compute", "tpus", "tpu-vm", "scp"]
    assert Path(scp[5]).name == "mod_star.tar.gz"
    assert scp[6:] == ["my-tpu:", "--zone=z", "--project=p", "--worker=all"]
    assert [re.findall("--only [a-z]+", call[-1]) for call in ssh] == [["--only install"], ["--only check"]]
    assert not Path(scp[5]).parent.exists(), "the archive here is removed"
    for worker in range(4):
        there = machine.path / f"worker-{worker}/mod_star"
        assert {path.name for path in there.iterdir()} == {"tpu_setup.sh", "mod_star", ".venv"}, "tracked files"
        assert [path.name for path in (there / "mod_star").iterdir()] == ["new.py"], "as they are now"
        assert f"[w-{worker}] chips of host {worker}" in done.stdout
    names = [call[0] for call in machine.calls()]
    assert max(i for i, name in enumerate(names) if name == "make") < names.index("mod-star")
    trains = machine.calls("mod-star", "train")
    assert len(trains) == 4
    for train in trains:
        assert train[2] == f"{shared}/tpu_setup-77", "all the same"
        assert train[train.index("--train.batch-size") + 1] == "16"
    assert done.stdout.count("held-out loss 2.500") == 1, "one of them looks at the result"
    assert list(shared.iterdir()) == []


def test_a_slice_without_a_shared_directory_has_its_chips_checked_only(machine: Machine) -> None:
    machine.set_workers(2)
    done = machine.run(*WORKERS)
    assert done.returncode == 0, done.stderr
    assert machine.calls("mod-star") == []
    assert done.stdout.count("the 2 hosts need a directory that they share") == 2


def test_the_minute_of_training_may_be_in_a_bucket(machine: Machine) -> None:
    done = machine.run("--dry-run", "--runs", "gs://bucket/runs")
    assert done.returncode == 0, done.stderr
    assert re.search(r"mod-star train gs://bucket/runs/tpu_setup-\d+ ", done.stdout)
    assert re.search(r"gcloud storage rm --recursive gs://bucket/runs/tpu_setup-\d+\n", done.stdout)


def test_a_worker_that_fails_is_reported_and_no_other_waits_for_it(machine: Machine) -> None:
    machine.set_workers(3)
    machine.set("make-fails-on-1", "")
    done = machine.run(*WORKERS, "--train", "x")
    assert done.returncode == 1
    assert "[w-1] no disk" in done.stdout
    assert "not every worker is set up" in done.stderr
    assert "Ready" not in done.stdout
    assert len(machine.calls("gcloud", "compute", "tpus", "tpu-vm", "ssh")) == 1, "no check"


def test_odd_arguments_arrive_unchanged_on_the_workers(machine: Machine) -> None:
    machine.set_workers(2)
    runs = machine.path / "r u'n$s"
    odd = "é 'x' \"$HOME\" \\ `true` ; # & \n end"
    done = machine.run(*WORKERS, "--train", ODD, "--runs", str(runs), f"--prepare=printf %s {sh_quoted(odd)} >prepared")
    assert done.returncode == 0, done.stderr
    for worker in range(2):
        assert (machine.path / f"worker-{worker}/mod_star/prepared").read_text() == odd
    assert (machine.path / "etc/mod-star-train.sh").read_text().partition("\n")[2] == ODD + "\n"
    assert {call[2] for call in machine.calls("mod-star", "train")} == {f"{runs}/tpu_setup-77"}


def sh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def queued_resources(machine: Machine) -> list[str]:
    verbs = [call[4] for call in machine.calls("gcloud", "compute", "tpus", "queued-resources")]
    return [verb for verb in verbs if verb != "describe"]


def test_a_spot_tpu_is_made_again_after_a_preemption_until_training_has_ended(machine: Machine) -> None:
    machine.set_workers(2)
    first = ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "GLITCH", "ACTIVE"]
    first += ["ACTIVE inactive 2 15", "SUSPENDING", "SUSPENDED"]  # the machine stops its services before it goes
    second = ["ABSENT", "CREATING", "ACTIVE", "ACTIVE", "ACTIVE inactive 1 0"]
    machine.set("states", "\n".join(first + second) + "\n")
    done = machine.run(*SPOT, "--", "--network=n", "--labels=a=b c")
    assert done.returncode == 0, done.stderr
    assert queued_resources(machine) == ["create", "delete", "create"]
    create = machine.calls("gcloud", "compute", "tpus", "queued-resources", "create")[0]
    assert create[5:] == [
        "my-tpu", "--node-id=my-tpu", "--zone=z", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--network=n", "--labels=a=b c",
    ]  # fmt: skip
    assert len(machine.calls("gcloud", "compute", "tpus", "tpu-vm", "scp")) == 2, "set up twice"
    assert (machine.path / "etc/mod-star-train.sh").read_text().endswith("\nmod-star train runs/x\n")
    assert "UNKNOWN, ERROR: no route to host" in done.stdout
    assert "queued-resources delete --force my-tpu --zone=z" in done.stdout
    assert (machine.path / "states").read_text() == ""


def test_a_spot_tpu_whose_training_fails_ends_the_watch(machine: Machine) -> None:
    machine.set_workers(1)
    machine.set("states", "ACTIVE\nACTIVE\nACTIVE failed 1 2\n")
    done = machine.run(*SPOT)
    assert done.returncode == 1
    assert "training failed; my-tpu still runs" in done.stderr
    assert queued_resources(machine) == []


@pytest.mark.parametrize("service", ["inactive 2 15", "inactive 1 143", "inactive 0 0"])
def test_a_spot_tpu_whose_training_was_stopped_has_not_ended_it(machine: Machine, service: str) -> None:
    machine.set_workers(1)
    machine.set("states", f"ACTIVE\nACTIVE\nACTIVE {service}\nACTIVE\nACTIVE\n")
    done = machine.run(*SPOT)
    assert done.returncode == 1
    assert "training was stopped or never started; my-tpu still runs" in done.stderr
    assert (machine.path / "states").read_text() == "", "it has looked three times"
    assert queued_resources(machine) == []


@pytest.mark.parametrize(
    ("file", "states", "message"),
    [
        ("no-quota", "ABSENT\n" * 3, "my-tpu cannot be created"),
        ("make-fails-on-0", "ACTIVE\n" * 3, "the set-up failed three times on end; my-tpu still runs"),
    ],
)
def test_a_spot_tpu_is_given_up_after_three_failures(machine: Machine, file: str, states: str, message: str) -> None:
    machine.set_workers(1)
    machine.set(file, "")
    machine.set("states", states)
    done = machine.run(*SPOT)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(machine.calls("sleep", "60")) == 2


# The Python programs inside the script, with the real Python.


def program(name: str) -> str:
    found = re.search(rf"^{name}='(.*?)'$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def run_program(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program(name)], env=os.environ | environment, capture_output=True, text=True
    )


def test_the_check_of_the_chips_refuses_a_cpu() -> None:
    done = run_program("chips_program", JAX_PLATFORMS="cpu")
    assert done.returncode == 1
    assert "runs on cpu: it sees no TPU" in done.stderr
    assert done.stdout == ""


def test_the_libtpu_must_be_the_one_that_jax_asks_for(tmp_path: Path) -> None:
    needs = map(Requirement, importlib.metadata.requires("jax") or [])
    [need] = [need for need in needs if need.name == "libtpu"]
    wanted = str(need.specifier).removeprefix("==").replace("*", "3")
    assert need.specifier.contains(wanted)
    for version, code in ((wanted, 0), ("0.0.1", 1)):
        path = tmp_path / version / f"libtpu-{version}.dist-info"
        path.mkdir(parents=True)
        (path / "METADATA").write_text(f"Metadata-Version: 2.1\nName: libtpu\nVersion: {version}\n")
        assert run_program("libtpu_program", PYTHONPATH=str(path.parent)).returncode == code
