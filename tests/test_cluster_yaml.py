"""cluster.yaml, as far as it can be seen without a cloud: Ray takes it, versions agree, nothing is public."""

import re
import subprocess
import tomllib

import pytest
import ray
import yaml
from hosts import ROOT, own_machines
from packaging.requirements import Requirement
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.util import prepare_config, validate_config

TEXT = (ROOT / "cluster.yaml").read_text()
CONFIG = yaml.safe_load(TEXT)
NODE_TYPES = CONFIG["available_node_types"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "pipeline" / "driver" / "README.md").read_text()
START_COMMANDS = CONFIG["head_start_ray_commands"] + CONFIG["worker_start_ray_commands"]


@pytest.mark.parametrize("config", [CONFIG, own_machines()], ids=["aws", "own machines"])
def test_ray_takes_the_file(config):
    prepared = prepare_config(config)
    validate_config(prepared)
    # Nothing of Ray's own defaults is left that would be run on a node.
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == CONFIG["setup_commands"]


def test_machines_of_one_s_own_differ_in_the_readme_s_lines_alone():
    config = own_machines()
    assert config["provider"]["type"] == "local"
    assert {key for key in CONFIG if config.get(key) != CONFIG[key]} == {
        "provider", "auth", "available_node_types", "head_node_type", "max_workers"
    }  # fmt: skip
    assert set(config) <= set(CONFIG)


def test_the_pinned_versions_are_within_what_pyproject_asks_for():
    install = next(line for line in CONFIG["setup_commands"] if "uv pip install" in line)
    pinned = dict(re.findall(r"(\w+)==([\w.]+)", install))
    required = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
    assert set(pinned) == set(required)
    assert [name for name, version in pinned.items() if not required[name].specifier.contains(version)] == []
    assert pinned["ray"] == ray.__version__


def test_the_pinned_python_is_one_that_pyproject_takes():
    [python] = re.findall(r"--python (\d[\d.]+)", TEXT)
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)


def test_what_is_to_be_filled_in_is_named_by_the_readme_s_word():
    assert set(re.findall(r"[\w-]*FILL_IN[\w-]*", TEXT)) >= {"ami-FILL_IN", "sg-FILL_IN"}
    assert "FILL_IN" in README


def test_nothing_is_bound_to_a_public_address():
    for text in (TEXT, README):
        assert not re.search(r"0\.0\.0\.0|\[::\]", text)
    head = CONFIG["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head


def test_every_start_of_ray_asks_for_the_token_that_every_node_gets():
    starts = [line for line in START_COMMANDS if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in line for line in starts)
    assert CONFIG["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in line for line in CONFIG["setup_commands"])


def test_ray_makes_no_security_group_of_its_own():
    """It would open port 22 to the world; where every node names its groups, Ray asks the cloud for nothing."""
    prepared = prepare_config(CONFIG)
    assert aws._configure_security_group(prepared) == prepared
    assert all(node["node_config"]["SecurityGroupIds"] for node in NODE_TYPES.values())


def test_there_are_no_keys_but_profiles():
    assert all(node["node_config"]["IamInstanceProfile"] for node in NODE_TYPES.values())
    assert not re.search(r"(?i)secret|aws_access|AKIA", TEXT)


def test_the_head_does_no_work_and_workers_are_spot_from_a_small_minimum():
    head = NODE_TYPES[CONFIG["head_node_type"]]
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0, "GPU": 0}, 0)
    workers = [node for name, node in NODE_TYPES.items() if name != CONFIG["head_node_type"]]
    assert all(node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for node in workers)
    assert all(0 <= node["min_workers"] <= 1 < node["max_workers"] for node in workers)
    assert "InstanceMarketOptions" not in head["node_config"]


def test_what_is_brought_to_the_nodes_can_be_installed():
    """The mounted files hold everything that a build of the package reads."""
    mounted = [source for target, source in CONFIG["file_mounts"].items() if target.startswith("~/image-baseline/")]
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "pipeline"}
    assert set(mounted) == needed
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", *mounted], capture_output=True, text=True, check=False)
    assert tracked.returncode or set(tracked.stdout.split()) >= {"pyproject.toml", "pipeline/data/digits.parquet"}
