"""Nothing of the user's is lost: what a folder holds, a disk that is full, a signal, a second process."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import last_line, run
from test_parallel import ON_LOOPBACK, ROOT
from test_resume import pieces

import train
from support import evaluation, runs

TINY = "--base-steps 3 --max-steps 1 --eval-every 1 --prompts-per-step 2 --eval-steps 2 --eval-prompts 10".split()


def content(folder):
    """{name: bytes} of all that is in it."""
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@contextlib.contextmanager
def full_disk(most=0):
    """Within, no file may have more bytes: the system refuses them as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert run(*TINY, "--out", folder) == 0
    return folder


def unfinished(done, tmp_path):
    """A run that was killed after its base model had been measured."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in [*done.parent.glob("base-*/*"), done / "config.json", done / "base.json"]:
        to = tmp_path / path.relative_to(done.parent)
        to.parent.mkdir(exist_ok=True)
        to.write_bytes(path.read_bytes())
    return folder


# ---- The folder that --out names ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["model/thesis.txt", "base.json", "metrics.jsonl", "checkpoint-1", "notes", "x.tmp"])
def test_a_folder_that_is_not_empty_is_refused_and_not_touched(name, done, tmp_path, capsys):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_bytes((done / name).read_bytes() if (done / name).exists() else b"precious")
    before = content(tmp_path)
    assert run(*TINY, "--out", tmp_path / "mine") == 1
    assert "mine is not empty: choose another" in last_line(capsys)
    assert content(tmp_path) == before


def test_a_file_is_no_folder_for_a_run(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert run(*TINY, "--out", tmp_path / "file") == 1
    assert "choose another" in last_line(capsys) and (tmp_path / "file").read_text() == "precious"


def test_an_empty_folder_will_do(tmp_path):
    assert runs.new_folder(str(tmp_path), "run") == tmp_path


def test_a_folder_in_which_a_run_was_killed_before_it_wrote_anything_will_do(tmp_path):
    runs.hold(tmp_path)
    runs.release()
    assert runs.new_folder(str(tmp_path), "run") == tmp_path


def test_an_evaluation_goes_into_no_folder_with_anything_in_it(done, tmp_path, capsys):
    (tmp_path / "notes").write_text("precious")
    assert run("--evaluate", done, "--eval-prompts", 3, "--out", tmp_path) == 1
    assert "is not empty" in last_line(capsys) and list(content(tmp_path).values()) == [b"precious"]


# ---- Two processes on one run ------------------------------------------------------------------

HOLDER = "import sys, time; from support import runs; runs.hold(runs.Path(sys.argv[1])); print(1, flush=True); {then}"


def holder(folder, then="time.sleep(60)"):
    """Another process that works on the folder."""
    command = [sys.executable, "-c", HOLDER.format(then=then), str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    return process


def test_a_run_is_not_resumed_beside_the_process_that_works_on_it(done, tmp_path, capsys):
    folder = unfinished(done, tmp_path)
    (folder / "checkpoint-2.tmp").write_text("being written")
    process = holder(folder)
    before = content(tmp_path)
    try:
        assert run("--resume", folder) == 1
        assert f"another process works on {folder}" in last_line(capsys)
        assert content(tmp_path) == before
    finally:
        process.kill()
        process.communicate()


def test_the_lock_dies_with_its_process(done, tmp_path):
    folder = unfinished(done, tmp_path)
    process = holder(folder)
    process.kill()
    process.communicate()
    assert run("--resume", folder) == 0


def test_a_run_that_ended_is_no_longer_locked(done):
    holder(done, then="").communicate()
    assert not runs.HELD


def test_where_there_are_no_locks_a_run_goes_on_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    runs.hold(tmp_path)
    runs.release()


# ---- Signals -----------------------------------------------------------------------------------


def test_a_second_sigterm_changes_nothing():
    with runs.finish_what_was_begun() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert max(stop) == signal.SIGTERM


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt) as stop, runs.finish_what_was_begun():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert stop.value.args[0] == 130


def test_a_sigterm_while_the_reason_is_said_makes_no_traceback(monkeypatch, capsys):
    say = runs.leave
    monkeypatch.setattr(train, "main_job", lambda *_: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(runs, "leave", lambda *reason: signal.raise_signal(signal.SIGTERM) or say(*reason))
    assert run(*TINY) == 143
    assert "stopped" in last_line(capsys)


def test_after_ctrl_c_it_says_which_command_goes_on(done, tmp_path, monkeypatch, capsys):
    folder = unfinished(done, tmp_path)
    monkeypatch.setattr(train, "reinforce", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run("--resume", folder) == 130
    assert last_line(capsys).endswith(f"train.py --resume {folder}")


def test_an_evaluation_that_is_stopped_does_not_speak_of_resuming(done, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "grade", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run("--evaluate", done) == 130
    line = last_line(capsys)
    assert "the same command starts it again" in line and "resume" not in line


SLOW_SAVE = """
import os, sys, time
sys.path.insert(0, {root!r})
import torch, train
save = torch.save
def slowly(everything, to, **options):
    if "checkpoint" in str(to):  # what processes send each other is saved too
        open({begun!r}, "a").close()
        time.sleep(3)
    save(everything, to, **options)
torch.save = slowly
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_sigterm_that_reaches_torchrun_and_its_workers_leaves_the_checkpoint(tmp_path):
    """As Slurm sends it: to every process; and torchrun sends it to its own once more."""
    script, begun, folder = tmp_path / "slow.py", tmp_path / "begun", tmp_path / "run"
    script.write_text(SLOW_SAVE.format(root=str(ROOT), begun=str(begun)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(21000 + os.getpid() % 10000), script, *TINY, "--out", folder]
    flags = ["--max-steps", "10000", "--save-every", "10000"]
    options = {"cwd": ROOT, "env": os.environ | ON_LOOPBACK, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, command), *flags], **options)
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in [*map(int, children), process.pid]:
        os.kill(number, signal.SIGTERM)
    stderr = process.communicate()[1]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert begun.exists() and [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{steps[-1]}"], stderr
    assert "Traceback" not in stderr.partition("torch/distributed")[0]


def saver(rank, folder):
    """One of two processes that save, of which the first is slow: is the checkpoint there when save_checkpoint ends?"""
    os.environ |= ON_LOOPBACK
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    save, everything = torch.save, pieces()
    torch.save = lambda stored, to, **how: (time.sleep(isinstance(to, Path) and 1), save(stored, to, **how))
    runs.save_checkpoint(folder, 1, 0.0, *everything)
    (folder / f"{rank} saw {[path.name for path in runs.checkpoints(folder)]}").touch()
    dist.destroy_process_group()


@pytest.mark.slow
def test_no_process_goes_on_before_the_first_has_saved(tmp_path):
    torch.multiprocessing.spawn(saver, (tmp_path,), nprocs=2)
    assert {f"{rank} saw ['checkpoint-1']" for rank in (0, 1)} <= {path.name for path in tmp_path.iterdir()}


# ---- A full disk -------------------------------------------------------------------------------


def test_a_disk_that_is_full_when_the_base_model_is_saved_is_one_line_and_leaves_nothing(tmp_path, capsys):
    with full_disk(2**16):
        assert run(*TINY, "--out", tmp_path / "run") == 1
    assert "could not be written: " in last_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_that_is_full_when_the_model_is_saved_is_one_line_and_leaves_nothing(
    done, tmp_path, monkeypatch, capsys
):
    folder, save = unfinished(done, tmp_path), train.save_model

    def saving(*arguments):
        with full_disk(2**16):
            save(*arguments)

    monkeypatch.setattr(train, "save_model", saving)
    assert run("--resume", folder) == 1
    assert f"{folder / 'model'} could not be written: " in last_line(capsys)
    assert not list(folder.glob("model*")) and not list(folder.glob("*.tmp"))


def test_a_disk_that_is_full_when_a_line_is_appended_names_the_file(tmp_path):
    with full_disk(), pytest.raises(ValueError, match=r"metrics\.jsonl could not be written: "):
        runs.append_line(tmp_path / "metrics.jsonl", {"step": 1})


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import safetensors.torch, train
safetensors.torch.save_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
train.main(sys.argv[1:])
"""


def test_what_a_killed_run_left_of_its_base_model_is_removed_when_it_is_resumed(tmp_path):
    command = [sys.executable, "-c", KILLED.format(root=str(ROOT)), *TINY, "--out", str(tmp_path / "run")]
    killed = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.glob("base-*.tmp"))) == 1
    (other := tmp_path / "base-countdown-0123456789ab.a.run.tmp").mkdir()  # that of a run named a.run
    assert run("--resume", tmp_path / "run") == 0
    assert list(tmp_path.glob("base-*.tmp")) == [other]


# ---- Evaluations -------------------------------------------------------------------------------


def test_an_evaluation_does_not_replace_another(done):
    before = set(content(done))
    for flags in ("--eval-prompts 3", "--eval-prompts 4", "--eval-prompts 3 --eval-split validation"):
        assert run("--evaluate", done, *flags.split()) == 0
    assert run("--evaluate", done, "--eval-prompts", 3, "--eval-steps", 4) == 0
    assert {path.removeprefix(f"{done}/") for path in set(content(done)) - before} == {
        f"{kind}-countdown-{name}"
        for kind, end in (("evaluation", "json"), ("completions", "jsonl"))
        for name in (
            f"test-3-sampled-greedy-2.{end}",
            f"test-4-sampled-greedy-2.{end}",
            f"validation-3-sampled-greedy-2.{end}",
            f"test-3-sampled-greedy-4.{end}",
        )
    }


def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_answer(done, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "grade", lambda *_: pytest.fail("answers"))
    with full_disk():
        assert run("--evaluate", done, "--eval-prompts", 3) == 1
    assert f"{done} cannot be written: choose an --out" in last_line(capsys)


# ---- A power failure ---------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """What is flushed, renamed and removed, in this order: [(what, path), ...]."""
    calls = []

    def noting(what, original):
        def call(first, *rest, **options):
            path = Path(os.readlink(f"/proc/self/fd/{first}")) if what == "fsync" else first
            calls.append((what, path))
            return original(first, *rest, **options)

        return call

    for module, what in ((os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "unlink")):
        monkeypatch.setattr(module, what, noting(what, getattr(module, what)))
    return calls


def test_a_file_and_its_folder_are_on_the_disk_before_and_after_the_rename(disk, tmp_path):
    runs.write_text(tmp_path / "file", "text")
    (first, file), (then, renamed), (last, folder) = disk[:3]
    assert (first, then, last) == ("fsync", "replace", "fsync") and file == renamed and folder == tmp_path


def test_a_checkpoint_is_on_the_disk_with_the_lines_before_it_before_the_older_one_is_removed(disk, tmp_path):
    runs.save_checkpoint(tmp_path, 1, 0.0, *pieces())
    runs.append_line(tmp_path / "metrics.jsonl", {"step": 1})
    disk.clear()
    runs.save_checkpoint(tmp_path, 2, 0.0, *pieces())
    removed = disk.index(("unlink", tmp_path / "checkpoint-1"))
    assert [what for what, _ in disk[:removed]][:4] == ["fsync", "fsync", "replace", "fsync"]
    assert disk[0][1] == tmp_path / "metrics.jsonl" and disk[3][1] == tmp_path


def test_every_file_of_a_model_is_on_the_disk_before_its_folder_has_its_name(disk, tmp_path):
    with runs.whole(tmp_path / "model") as unfinished:
        (unfinished / "deep").mkdir(parents=True)
        torch.save({}, unfinished / "deep" / "weights")
    flushed = {path for what, path in disk[: disk.index(("replace", unfinished))]}
    assert flushed == {unfinished, unfinished / "deep", unfinished / "deep" / "weights"}


def test_a_run_resumed_with_other_code_or_libraries_says_so_in_one_line(done, tmp_path, capsys):
    folder = unfinished(done, tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    stored |= {"commit": "abc", "versions": stored["versions"] | {"torch": "1.0"}}
    (folder / "config.json").write_text(json.dumps(stored))
    assert run("--resume", folder) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "was begun with" in line]
    assert len(lines) == 1 and "commit abc, now " in lines[0] and f"torch 1.0, now {torch.__version__}" in lines[0]
    assert "python" not in lines[0].partition("begun")[2]


def test_a_run_resumed_as_it_was_begun_says_nothing_of_it(done, tmp_path, capsys):
    assert run("--resume", unfinished(done, tmp_path)) == 0
    assert "was begun with" not in capsys.readouterr().out
