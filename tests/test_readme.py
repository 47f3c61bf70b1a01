"""What the README says can be done is done here."""

import re
import subprocess
from pathlib import Path

import click.testing
import duckdb
import pytest

from jobs.compare import main as compare
from pipeline.config import Config
from pipeline.driver import job
from pipeline.results.summary import summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "pipeline" / "results" / "README.md"
QUERIES = [
    query
    for path in (ROOT / "README.md", RESULTS)
    for query in re.findall(r"```sql\n(.*?)```", path.read_text(), re.DOTALL)
]


@pytest.fixture(scope="module")
def results_folder(local_ray, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    job.evaluate(Config(out=str(folder / "out"), epochs=3, report=False, device="cpu"))
    return folder


@pytest.fixture(scope="module")
def default_run(local_ray, tmp_path_factory):
    return job.evaluate(Config(out=str(tmp_path_factory.mktemp("default") / "out"), device="cpu"))


@pytest.mark.ray
@pytest.mark.parametrize("query", QUERIES, ids=[re.search(r"out/(\w+)", query)[1] for query in QUERIES])
def test_every_query_runs_as_it_stands(results_folder, monkeypatch, query):
    monkeypatch.chdir(results_folder)
    rows = duckdb.sql(query).fetchall()
    assert rows or re.search("skipped|duplicates|suspects", query)  # of which digits have none


@pytest.mark.ray
def test_the_first_command_prints_what_the_first_screen_shows(default_run):
    shown = re.search(r"```\n(best: .*?)\n\.\.\.\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert summary(default_run).startswith(shown)


@pytest.mark.ray
def test_a_comparison_prints_what_is_shown(default_run, results_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").symlink_to(default_run["out"])
    Path("b").symlink_to(results_folder / "out")
    shown = re.search(r"```\n(A  a\n.*?)\n\.\.\.\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert click.testing.CliRunner().invoke(compare, ["a", "b"]).stdout.startswith(f"{shown}\n\n")


@pytest.mark.ray
def test_the_python_example_runs_as_it_stands(local_ray, tmp_path, monkeypatch, capsys):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert "starting to decode 1,797 images" in lines
    assert lines[-6:-3] == ["majority_class 0.1012", "nearest_mean_l1 0.8521", "nearest_mean_rms 0.8754"]
    assert "<td>nearest_mean_rms</td><td>0.8754</td>" in names["run"]._repr_html_()


def test_there_is_a_query_for_every_table():
    tables = {re.search(r"out/(\w+)", query)[1] for query in QUERIES}
    assert tables == {
        "metrics", "predictions", "confusion", "means", "weights", "history", "skipped", "duplicates", "suspects"
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["jobs", "pipeline"])
def test_every_module_has_its_line(folder):
    text = (ROOT / folder / "README.md").read_text()
    modules = [path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")]
    assert [name for name in modules if f"| `{name}` |" not in text and not name.endswith("__init__.py")] == []


def test_the_ci_runs_the_readme_s_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    extract = next(line for line in script.splitlines() if line.startswith("test_command="))
    command = subprocess.run(
        ["bash", "-c", f'{extract}; echo "$test_command"'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert command == "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/pytest\n"
