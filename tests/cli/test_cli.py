"""The lola command, in this process and in one of its own."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import checkpoints
import pytest

import lola
from lola import cli
from lola.eval import run, table

SHORT = ["--lengths", "640", "--samples", "2", "--sparse", "24", "--tasks", "niah_single_1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path)
    return str(checkpoints.save_adapter(path))


@pytest.fixture
def short_answers(monkeypatch):
    answers = run._answers
    monkeypatch.setattr(run, "_answers", lambda model, prompts, limits, *rest: answers(model, prompts, [6] * len(limits), *rest))


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "lola", *arguments], capture_output=True, text=True, timeout=300, **options)


def test_eval(folder, tmp_path, capsys, short_answers):
    path = tmp_path / "rows.json"
    assert cli.main(["eval", "--model", folder, *SHORT, "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no progress bar
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = json.loads(path.read_text())
    assert [row["attention"] for row in rows] == ["softmax", "base", "base", "window", "cache_only", "lola"]
    # One line says what each row is, and then each row has one of its own.
    for row in rows:
        found = [line for line in lines if line.split()[:2] == [row["attention"], row["mixing"] or "-"]]
        assert len(found) == 2 and f"{row['accuracy']:.3f}" in found[1]
    assert "niah_single_1 at 640 tokens, 2 samples" in out
    for word in ("hidden ", "asked ", "base ", "LoLA ", "kept by ", "of 8 heads", "--sparse-per query_head", "--sparse-per kv_head"):
        assert word in out
    assert "12 answers in" in lines[-1]


def test_eval_tables_of_several_tasks_and_lengths(folder, capsys, short_answers):
    arguments = ["eval", "--model", folder, "--samples", "1", "--sparse", "24", "--threads", "1", "--dtype", "float32"]
    assert cli.main([*arguments, "--tasks", "niah_single_3", "vt", "--lengths", "900", "960"]) == 0
    out = capsys.readouterr().out
    start = out.index("the teacher")
    places = [out.index(f"{task} at {length} tokens, ", start) for length in (900, 960) for task in ("niah_single_3", "vt")]
    assert places == sorted(places) and out.count("tokens/s") == 4
    assert out.count("full KV cache") == 2 + 1  # a line for each length, and softmax's explanation


def test_eval_without_an_adapter(tmp_path, capsys, short_answers):
    checkpoints.save(tmp_path)
    assert cli.main(["eval", "--model", str(tmp_path), *SHORT]) == 0
    out, err = capsys.readouterr()
    assert "softmax attention only" in err
    assert "lola" not in out and "softmax" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "noodle"], "model must be one of needle, needle-8k, or a folder with config.json; there is no 'noodle'"),
        (["--tasks", "niah_single_7"], "tasks must be one of niah_single_1, "),
        (["--tasks", "niah_single_1", "--lengths", "100"], "length must be at least"),
        (["--samples", "0"], "samples must be an integer, 1 or more; it is 0"),
        (["--window", "100"], "window must be"),
        (["--mixing", "none"], "mixing must be one of"),
        (["--score", "worst"], "score must be one of"),
        (["--sparse-per", "layer"], "sparse_per must be one of"),
        (["--sparse", "-3"], "sparse must be"),
        (["--device", "tpu"], "device must be None, 'cpu', 'cuda' or"),
        (["--threads", "0"], "threads must be"),
        (["--dtype", "float8"], "dtype must be one of float16, float32"),
        (["--adapter", "nowhere"], "adapter must be a folder with adapter.json"),
        (["--json", "no/such/folder/rows.json"], "--json: there is no folder"),
        (["--seed", "-1"], "seed must be"),
    ],
)
def test_wrong_arguments(folder, capsys, arguments, message):
    model = [] if "--model" in arguments else ["--model", folder]
    assert cli.main(["eval", *model, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lola eval: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["train"], ["eval", "--lengths", "many"], ["eval", "--split", "train"], ["eval", "--fast"]])
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: lola" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, wanted", [(["--help"], "info"), (["eval", "--help"], "examples:"), (["info", "--help"], "usage")])
def test_help(capsys, arguments, wanted):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    out = capsys.readouterr().out
    assert error.value.code == 0 and wanted in out
    assert max(map(len, out.splitlines())) <= 100


def test_help_names_every_task(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    out = capsys.readouterr().out
    for option in ("model", "tasks", "lengths", "sparse", "window", "chunk", "mixing", "score", "sparse-per", "samples", "seed", "device", "threads", "json"):
        assert f"--{option} " in out


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--version"])
    assert error.value.code == 0 and capsys.readouterr().out == f"lola {lola.__version__}\n"


def test_info(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["lola", "python", "numpy", "ISA", "threads", "BLAS", "CUDA"]
    assert lines["lola"] == lola.__version__ and all(lines.values())


def test_info_without_threadpoolctl(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert cli.main(["info"]) == 0
    assert "BLAS" in capsys.readouterr().out


def test_interrupted(folder, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Comparison, "run", interrupt)
    monkeypatch.setattr(run.Comparison, "needle", interrupt)
    assert cli.main(["eval", "--model", folder, *SHORT]) == 130
    assert capsys.readouterr().err == "\nlola: interrupted\n"


def test_as_a_module():
    done = command("info")
    assert done.returncode == 0 and done.stderr == "" and lola.__version__ in done.stdout


def test_errors_leave_no_traceback(tmp_path):
    done = command("eval", "--model", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"lola eval: error: {tmp_path} has no config.json\n"


def test_ctrl_c_ends_the_process(folder):
    arguments = [sys.executable, "-u", "-m", "lola", "eval", "--model", folder, "--samples", "5000", "--lengths", "700", "--tasks", "niah_single_1"]
    # A shell starts its background jobs with the signal ignored, and children inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        while "softmax" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "\nlola: interrupted\n"


def test_a_reader_that_goes_away(folder):
    arguments = [sys.executable, "-u", "-m", "lola", "eval", "--model", folder, *SHORT]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1 and err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_progress_on_a_terminal(monkeypatch, capsys, with_tqdm):
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = table.Progress("answers")
    for done in (1, 5, 10):
        progress.update(done, 10)
        progress.write(f"row {done}")
    progress.close()
    assert capsys.readouterr().out == "row 1\nrow 5\nrow 10\n"
    assert "answers" in terminal.getvalue() and "5/10" in terminal.getvalue()
    # Whatever was drawn is taken away in the end.
    assert terminal.getvalue().rstrip("\r")[-3:] in ("\033[K", "   ") or terminal.getvalue().endswith("\r")


def test_no_progress_in_a_pipe(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    progress = table.Progress("answers")
    progress.update(3, 10)
    progress.close()
    assert pipe.getvalue() == ""


def test_blas_is_held_without_threadpoolctl():
    """The wheels' own OpenBLAS is found, held to one thread and given its threads back."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    if not any("openblas" in library["filepath"] and "numpy" in library["filepath"] for library in threadpoolctl.threadpool_info()):
        return  # this NumPy has another BLAS
    script = """
import contextlib, sys, numpy, threadpoolctl
def threads():
    return [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
from lola.eval import run
before, module = threads(), sys.modules.pop("threadpoolctl")
with contextlib.ExitStack() as stack:
    sys.modules["threadpoolctl"] = None
    print(run._hold_blas(stack), threads())
print(threads() == before)
"""
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean, timeout=60)
    assert done.stderr == "" and done.stdout == "True [1]\nTrue\n"
