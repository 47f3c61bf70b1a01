"""The command as a user runs it, in processes of its own: what it prints, how it ends, and what it leaves behind."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import uuid
from dataclasses import fields

import click.testing
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from builders import ROOT, command, end_processes, processes_with
from gate import Gate, gated_command
from PIL import Image

from jobs import evaluate
from jobs.evaluate import main
from pipeline import __version__
from pipeline.config import Config
from pipeline.results.progress import Progress
from pipeline.results.texts import option_name

MARK = "IMAGE_BASELINE_TEST"


@pytest.fixture
def gate(tmp_path):
    return Gate(tmp_path / "gate")


def run(*args, **environment):
    process = command(*args, **environment)
    stdout, stderr = process.communicate(timeout=180)
    return process.returncode, stdout, stderr


def run_json(*args, **environment):
    code, stdout, stderr = run(*args, "--json", **environment)
    assert code == 0, stderr
    return json.loads(stdout)


def last_line(text):
    """Take the last line: before it, a slow machine shows progress."""
    return text.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "28x"], "--size: expected auto, or HxW"),
        (["--actors", "9"], "--actors: expected at most one for each of 8 lanes"),
        (["--actors", "many"], "expected auto or a whole number, got many; leave it at auto; try --help"),
        (["--epochs", "x"], "is not a valid integer; try --help"),
        (["--scores", ""], "--scores: expected a word or a file, got nothing"),
        (["--scores", "top", "--scores", "all"], "and one file, got top, all; leave one out; try --help"),
        (["--scores", "a.csv", "--scores", "b.csv"], "and one file, got a.csv, b.csv; leave one out; try --help"),
        (["--no-such-option"], "No such option '--no-such-option'; try --help"),
        (["--bogus"], "No such option '--bogus'; try --help"),
        (["--adress", "x"], "No such option '--adress'; is --address meant, or try --help"),
        (["--mode", "grey"], "is not one of 'auto', 'L', 'RGB'; try --help"),
        (["--resume"], "--resume: expected --out beside it, got none"),
        (["--out", ""], "--out: expected a folder or URI, got nothing"),
        (["--scratch", ""], "--scratch: expected a text, got nothing"),
        (["--classes", ""], "--classes: expected each class once, got nothing"),
        (["--classes", "a\nb"], "expected names and commas, got 'a\\nb'; put such names in double quotes"),
        (["--classes", '"a",a'], "--classes: expected each class once, got a,a"),
        (["--classes", "a , a"], "--classes: expected each class once, got a,a"),
        (["--classes", '"a","a "', "--epochs", "-1"], "--epochs: expected 0 or more"),
    ],
)
def test_bad_usage_exits_with_2_and_a_line(args, message):
    result = click.testing.CliRunner().invoke(main, args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", result.stderr)


def test_help_groups_all_options_and_fits_80_columns():
    text = click.testing.CliRunner().invoke(main, ["--help"]).stdout
    headings = [line for line in text.splitlines()[1:] if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Data:", "Model of your own:", "Training:", "Cluster:", "Results:", "Other:"]
    assert [
        option.opts[0] for option in main.params if not re.search(rf"^  (-h, )?{option.opts[0]}\b", text, re.M)
    ] == []
    assert max(map(len, text.splitlines())) <= 80


def test_options_are_shown_by_the_names_that_the_command_takes():
    known = {option for parameter in main.params for option in parameter.opts}
    assert {option_name(each.name).removesuffix(" FILE") for each in fields(Config)} <= known


def test_the_version_is_one_line():
    assert click.testing.CliRunner().invoke(main, ["--version"]).stdout == f"image-baseline {__version__}\n"


def test_a_missing_dataset_exits_with_1_and_one_line(tmp_path):
    code, stdout, stderr = run("--data", tmp_path / "none", "--out", tmp_path / "out")
    assert (code, stdout) == (1, "")
    assert (
        stderr == f"error: --data: expected a folder at {tmp_path / 'none'}, got nothing; "
        "give a folder with train and valid, or with class folders and --valid-fraction, or archives\n"
    )


def test_a_cluster_that_is_not_there_exits_with_1_and_one_line(tmp_path):
    code, stdout, stderr = run("--address", "127.0.0.1:1", "--out", tmp_path / "out")
    assert (code, stdout) == (1, "")
    assert re.fullmatch(r"error: --address 127.0.0.1:1: expected a cluster that answers, got .*\n", stderr)


def test_the_readme_names_every_option():
    readme, names = (ROOT / "README.md").read_text(), {option.opts[0] for option in main.params} - {"--version"}
    assert [name for name in names if f"`{name}`" not in readme] == []


@pytest.mark.ray
def test_the_summary_goes_to_standard_output_and_nothing_else(tmp_path):
    code, stdout, stderr = run("--out", tmp_path / "out", "--epochs", 2)
    assert code == 0, stderr
    assert "787 of 899" in stdout  # nearest_mean_rms, whatever is trained
    assert "1,797 listed: 898 to train on, 899 to validate on, 0 skipped" in stdout
    assert json.loads((tmp_path / "out" / "run.json").read_text())["results_sha256"] in stdout


@pytest.mark.ray
def test_threads_and_a_killed_actor_do_not_change_a_bit(tmp_path, gate):
    """One run as it is, and one with another OMP_NUM_THREADS of which an actor dies in the middle of training."""
    options = ("--epochs", 3, "--actors", 2, "--no-report", "--json")
    first = run_json(*options, "--out", tmp_path / "first", OMP_NUM_THREADS="1")
    mark = str(uuid.uuid4())
    options += ("--out", tmp_path / "second")
    process = gated_command(gate, "train", *options, OMP_NUM_THREADS="3", **{MARK: mark})
    with gate.held("train", process):
        os.kill(actors_of(mark)[0].pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert re.search(r"restarting all actors, to go on after epoch [12]\n", stderr)
    assert json.loads(stdout)["results_sha256"] == first["results_sha256"]


@pytest.mark.ray
def test_a_closed_stream_is_written_to_by_nobody(small_dataset, tmp_path):
    script = f"{sys.executable} {ROOT}/jobs/evaluate.py --data {small_dataset} --epochs 1 --out {tmp_path}/out 2>&-"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1251"}
    done = subprocess.run(
        ["/bin/sh", "-c", script], capture_output=True, text=True, timeout=180, check=True, env=environment
    )
    assert last_line(done.stdout).split()[0] == "page"
    assert re.search(r"^\\xe4 +12 ", done.stdout, re.MULTILINE)  # a class's name that the encoding lacks


def start(*args, stdout, stderr=subprocess.PIPE, **environment):
    arguments = [sys.executable, ROOT / "jobs" / "evaluate.py", *map(str, args)]
    environment = {**os.environ, "TERM": "xterm", **environment}
    return subprocess.Popen(arguments, stdout=stdout, stderr=stderr, text=True, env=environment)


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.ray
@pytest.mark.parametrize(
    ("opened", "reason"),
    [(closed_pipe, "Broken pipe"), (lambda: os.open("/dev/full", os.O_WRONLY), "No space left on device")],
)
def test_a_summary_that_cannot_be_written_is_one_line(small_dataset, tmp_path, opened, reason):
    options = ("--data", small_dataset, "--epochs", 0, "--no-report", "--out", tmp_path / "out")
    process = start(*options, stdout=opened())
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 1
    assert re.fullmatch(f"error: standard output: expected .*, got {reason}; .*", last_line(stderr))
    assert "Traceback" not in stderr
    assert (tmp_path / "out" / "run.json").exists()


def terminal_of(columns):
    """Open a terminal; return its two ends and what it has shown when all others have closed it."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = bytearray()

    def read():
        with contextlib.suppress(OSError):  # what reading gives when nobody can write any more
            while chunk := os.read(screen, 4096):
                shown.extend(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def finish():
        reader.join(60)
        os.close(screen)
        return shown.decode()

    return terminal, finish


@pytest.mark.ray
@pytest.mark.parametrize("columns", [50, *(pytest.param(columns, marks=pytest.mark.long) for columns in (20, 100))])
def test_a_terminal_has_one_line_of_progress_and_then_tables(small_dataset, tmp_path, columns):
    terminal, finish = terminal_of(columns)
    options = ("--data", small_dataset, "--epochs", 3, "--no-report", "--out", tmp_path / "out")
    # A plain Ray would say so in a line above the progress.
    # COLUMNS is that of another terminal, as where a shell passed it on.
    environment = {"IMAGE_BASELINE_PLAIN_RAY": "", "COLUMNS": "200"}
    process = start(*options, stdout=terminal, stderr=terminal, **environment)
    os.close(terminal)
    assert process.wait(180) == 0
    progress, _, tables = finish().rpartition("\x1b[2K")  # the last that is erased
    assert "\n" not in progress
    lines = re.split(r"\r\x1b\[2K", re.sub(r"\x1b\[[\d;]*m", "", progress.removesuffix("\r")))
    assert max(map(len, lines)) < columns
    assert "\x1b[?25l" not in progress  # a hidden cursor stays hidden where the process is killed
    assert columns == 20 or "━━━" in progress
    assert re.search("nearest_m", tables)
    assert re.search("^ä ", tables, re.M)


@pytest.mark.ray
def test_messages_stand_above_the_progress_of_a_terminal(small_dataset, tmp_path, gate):
    terminal, finish = terminal_of(80)
    mark = str(uuid.uuid4())
    options = ("--data", small_dataset, "--epochs", 3, "--no-report", "--out", tmp_path / "out")
    process = gated_command(gate, "train", *options, stderr=terminal, TERM="xterm", **{MARK: mark})
    os.close(terminal)
    with gate.held("train", process):
        os.kill(actors_of(mark)[0].pid, signal.SIGKILL)
    process.communicate(timeout=180)
    assert process.returncode == 0
    progress = re.compile(r"step|means|starting to decode|images, ")
    lines = [line.rpartition("\x1b[2K")[2] for line in finish().split("\n")[:-1]]  # what is left of each on the screen
    assert any("restarting all actors" in line for line in lines)
    assert [line for line in lines if progress.search(line)] == []


@pytest.mark.ray
def test_a_ray_that_does_not_start_is_one_line():
    script = """
import ray._private.services
from pipeline import errors
from pipeline.driver import connect
ray._private.services.GCS_SERVER_EXECUTABLE = "/bin/false"
try:
    with connect.connected("local"):
        pass
except errors.ClusterError as exc:
    print(exc)
"""
    mark = str(uuid.uuid4())
    environment = {**os.environ, MARK: mark, "RAY_gcs_server_port_wait_time_s": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert re.fullmatch(r"Ray: expected it to start, got Timed out .*; see .*/logs, and end what .*\n", done.stdout), (
        done.stderr
    )
    assert processes_with(MARK, mark) == []


@pytest.mark.ray
def test_a_local_job_listens_on_this_machine_alone(small_dataset, tmp_path, gate):
    mark = str(uuid.uuid4())
    # So many that it is training for certain when it is asked to end, wherever in Ray's code that is.
    options = ("--data", small_dataset, "--epochs", 1_000_000, "--actors", 2, "--address", "local")
    environment = {MARK: mark, "IMAGE_BASELINE_PLAIN_RAY": ""}  # as Ray comes, it listens on the machine's network
    process = gated_command(gate, "train", *options, "--out", tmp_path / "out", **environment)
    with gate.held("train", process):
        addresses = [address for each in processes_with(MARK, mark) for address in listening_addresses(each)]
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert set(addresses) == {"127.0.0.1"}
    assert (process.returncode, last_line(stderr)[:13]) == (130, "interrupted: ")


def listening_addresses(process):
    try:
        sockets = process.net_connections()
    except psutil.NoSuchProcess:  # Ray ends a worker that has nothing to do whenever it likes
        return []
    return [each.laddr.ip.removeprefix("::ffff:") for each in sockets if each.status == psutil.CONN_LISTEN]


def actors_of(mark):
    return [process for process in processes_with(MARK, mark) if "ray::ActorProcess" in " ".join(process.cmdline())]


LEFT_UNDONE = {
    "start": "nothing was evaluated",
    "decode": r"decoded \d+ of 156 images, .* is unfinished, run again",
    "train": r"epoch 2 of 3, step .* is unfinished, go on with \S+ \S*evaluate\S*\.py .*--data .* --resume",
}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("moment", "signum"),
    [
        ("start", signal.SIGINT),
        pytest.param("start", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("decode", signal.SIGINT, marks=pytest.mark.long),
        ("decode", signal.SIGTERM),
        ("train", signal.SIGINT),
        ("train", signal.SIGTERM),
    ],
)
def test_an_interrupt_says_what_was_left_and_leaves_no_process(small_dataset, tmp_path, gate, moment, signum):
    mark = str(uuid.uuid4())
    options = ("--data", small_dataset, "--shard-images", 4, "--epochs", 3, "--out", tmp_path / "out")
    process = gated_command(gate, moment, *options, **{MARK: mark})
    try:
        with gate.held(moment, process):
            # A terminal sends Ctrl-C to all that it started; whoever ends a job asks the job alone.
            os.killpg(process.pid, signum) if signum == signal.SIGINT else os.kill(process.pid, signum)
        stdout, stderr = process.communicate(timeout=60)
        left = processes_with(MARK, mark)
    finally:
        end_processes(processes_with(MARK, mark))
    assert (process.returncode, stdout) == (128 + signum, "")
    assert re.fullmatch(f"interrupted: {LEFT_UNDONE[moment]}", last_line(stderr))
    assert left == []
    assert not (tmp_path / "out" / "run.json").exists()
    assert not list(tmp_path.glob("out/**/*.tmp"))


@pytest.mark.parametrize(
    ("given", "added"),
    [(["--data", 'it\'s "a" $b', "--out=o p"], []), (["--overwrite", "--out", "x"], []), ([], ["--out", "now"])],
)
def test_the_command_that_goes_on_has_every_option_as_a_shell_needs_it(given, added, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *given])
    words = shlex.split(evaluate._left_undone(Progress("score", 1, 2, 0.5), Config(out="now")).partition(" with ")[2])
    kept = [word for word in given if word != "--overwrite"]
    assert words == [sys.executable, "jobs/evaluate.py", *kept, *added, "--resume"]


@pytest.mark.ray
def test_files_of_our_names_in_the_working_folder_are_not_taken_for_ours(small_dataset, tmp_path):
    for name in ("pipeline", "numpy", "pyarrow", "PIL", "tasks"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported from the working folder')")
    options = ["--data", small_dataset, "--epochs", "0", "--out", "out"]
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "evaluate.py", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "run.json").exists()


@pytest.mark.ray
@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_working_folder_that_was_removed_is_no_traceback(tmp_path, is_absolute):
    (tmp_path / "gone").mkdir()
    out = str(tmp_path / "out") if is_absolute else "out"
    words = f'rmdir "$PWD"; exec {sys.executable} {ROOT}/jobs/evaluate.py --epochs 0 --out {out}'
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path / "gone", capture_output=True, text=True, timeout=120, check=False
    )
    if is_absolute:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1
        assert "error: --out out: expected a working folder, got one that was removed; go to another" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_what_ray_s_processes_write_is_not_in_the_summary(small_dataset, tmp_path):
    options = ("--data", small_dataset, "--epochs", 0, "--no-report", "--out", tmp_path / "out", "--json")
    process = command(*options, RAY_LOG_TO_STDERR="1")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["num_train"] == 120
    assert "gcs_server" in stderr


@pytest.mark.ray
def test_a_job_that_fails_leaves_no_process(black_and_white, tmp_path):
    mark = str(uuid.uuid4())
    options = ("--data", black_and_white, "--learning-rate", 3e38, "--out", tmp_path / "out")
    code, stdout, stderr = run(*options, **{MARK: mark})
    left = processes_with(MARK, mark)
    end_processes(left)
    assert (code, stdout) == (1, "")
    assert re.search(r"error: epoch \d+: expected a loss, got (nan|inf); give a smaller --learning-rate .*\n\Z", stderr)
    assert left == []


@pytest.fixture
def odd_dataset(small_dataset, tmp_path):
    """The small dataset with one of each odd file in class 2, and the keys of these."""
    root = tmp_path / "odd"
    for path in small_dataset.rglob("*.png"):
        copy = root / path.relative_to(small_dataset)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    folder = root / "valid" / "2"
    good = (folder / "0.png").read_bytes()
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    (folder / "truncated.png").write_bytes(good[:-30])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "deep.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(folder / "inks.jpg")
    Image.new("P", (8, 8), 1).save(folder / "palette.gif")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    (os.fsencode(folder) + b"/\xff.png").decode("utf-8", "surrogateescape")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:  # noqa: PTH123 - a name of bytes
        file.write(good)
    (folder / "closed.png").write_bytes(good)
    (folder / "closed.png").chmod(0)
    return root


@pytest.mark.ray
def test_odd_files_are_decoded_right_or_named_with_their_reason(odd_dataset, tmp_path):
    out = tmp_path / "out"
    result = run_json("--data", odd_dataset, "--out", out, "--epochs", 1, "--no-report")
    skipped = {row["key"]: row["reason"] for row in pq.read_table(out / "skipped.parquet").to_pylist()}
    used = set(pq.read_table(out / "predictions")["key"].to_pylist())
    expected = {
        "truncated": "damaged", "text": "unidentified", "empty": "empty", "loop": "unreadable", "pipe": "not_a_file"
    }  # fmt: skip
    if os.geteuid() != 0:  # root may read what nobody may
        expected["closed"] = "unreadable"
    assert skipped == {f"valid/2/{name}.png": reason for name, reason in expected.items()}
    assert {f"valid/2/{name}" for name in ("deep.png", "inks.jpg", "palette.gif", r"\xff.png")} <= used
    assert result["num_listed"] == 166 == result["num_train"] + result["num_valid"] + result["num_skipped"]
    assert result["num_skipped"] == len(expected)


_ASK_TO_END_IN_A_FORK = """
import os, signal, sys
def ask():
    if sys.argv[0].endswith("evaluate.py"):
        os.kill(os.getpid(), signal.SIGTERM)
os.register_at_fork(after_in_parent=ask)
"""


def assert_ends_while_ray_starts(tmp_path, ask, **environment):
    mark = str(uuid.uuid4())
    process = command("--out", tmp_path / "out", **{MARK: mark}, **environment)
    try:
        ask(process)
        stdout, stderr = process.communicate(timeout=60)
        assert processes_with(MARK, mark) == []
    finally:
        end_processes(processes_with(MARK, mark))
        process.communicate()
    assert (process.returncode, stdout) == (143, "")
    assert last_line(stderr) == "interrupted: nothing was evaluated"


@pytest.mark.ray
def test_a_request_to_end_while_ray_starts_its_processes_is_heard(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(_ASK_TO_END_IN_A_FORK)
    assert_ends_while_ray_starts(tmp_path, lambda _: None, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")


# Stands still in the fork that starts Ray's node manager, once that runs.
_GATE_IN_A_FORK = """
import os, pathlib, sys, time
def stand_still():
    import psutil
    if not sys.argv[0].endswith("evaluate.py"):
        return
    driver = psutil.Process()
    while driver.cmdline() in [child.cmdline() for child in driver.children()]:  # it is not yet what it is to be
        time.sleep(0.001)
    if "raylet" in {child.name() for child in driver.children()}:
        folder = pathlib.Path(os.environ["GATE"])
        (folder / "raylet").touch()
        while not (folder / "raylet.go").exists():
            time.sleep(0.01)
os.register_at_fork(after_in_parent=stand_still)
"""


@pytest.mark.ray
def test_a_request_to_all_of_the_group_while_ray_starts_is_answered(tmp_path, gate):
    def ask(process):
        with gate.held("raylet", process):
            os.killpg(process.pid, signal.SIGTERM)

    gate.folder.mkdir()
    (tmp_path / "sitecustomize.py").write_text(_GATE_IN_A_FORK)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    assert_ends_while_ray_starts(tmp_path, ask, GATE=str(gate.folder), PYTHONPATH=path)


_NOTE_SLOW_IMPORTS = """
import os, sys
class Note:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "pyarrow.compute", "rich"):
            with open(os.environ["NOTES"], "a") as notes:
                print(name, file=notes)
sys.meta_path.insert(0, Note())
"""


@pytest.mark.ray
def test_no_process_loads_what_takes_long_and_is_not_needed(small_dataset, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(_NOTE_SLOW_IMPORTS)
    notes, path = tmp_path / "notes", f"{tmp_path}{os.pathsep}{ROOT}"
    for number in range(2):
        options = ("--data", small_dataset, "--out", tmp_path / f"out {number}", "--cache", tmp_path / "cache")
        process = command(*options, "--epochs", number, "--no-report", NOTES=str(notes), PYTHONPATH=path)
        _, stderr = process.communicate(timeout=180)
        assert process.returncode == 0, stderr
    assert notes.read_text() == "torch\n" * 2  # each time by the actor


def test_the_driver_never_loads_torch():
    code = "import sys, pipeline.driver; sys.exit('torch' in sys.modules)"
    process = psutil.Popen([os.sys.executable, "-c", code])
    assert process.wait(timeout=60) == 0
