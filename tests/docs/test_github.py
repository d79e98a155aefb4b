"""What GitHub reads can be read, and names files, extras and versions that are there."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import tdm_lightning as tdm

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
WORKFLOWS = {path.stem: path for path in GITHUB.glob("workflows/*.yml")}


def read(path):
    return yaml.safe_load(path.read_text("utf-8"))


def steps(name):
    """The shell text of a workflow's steps."""
    jobs = read(WORKFLOWS[name])["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_what_is_expected_is_there():
    assert {*WORKFLOWS} == {"ci", "nightly", "release"}
    names = {path.name for path in GITHUB.iterdir()}
    assert names == {
        *("CODE_OF_CONDUCT.md", "ISSUE_TEMPLATE", "PULL_REQUEST_TEMPLATE.md", "SECURITY.md"),
        *("dependabot.yml", "workflows"),
    }
    assert {
        update["package-ecosystem"] for update in read(GITHUB / "dependabot.yml")["updates"]
    } == {
        *("github-actions", "pip"),
    }


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_whole(name):
    flow = read(WORKFLOWS[name])
    assert flow["permissions"] == {"contents": "read"}  # more is asked for by the job
    for job in flow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
        assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)
    for command in steps(name):
        for extra in re.findall(r'-e "\.\[(\w+)\]"', command):
            assert re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE)
        for path in re.findall(r"(?:^|\s)((?:\.ci|docs|tests)/?[\w/]*)", command):
            assert (ROOT / path.replace("docs/_build", "docs")).exists(), path


def test_every_python_from_the_first_is_tried():
    (first,) = re.findall(r'^requires-python = ">=3\.(\d+)"', PROJECT, re.MULTILINE)
    matrix = read(WORKFLOWS["ci"])["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == [f"3.{minor}" for minor in range(int(first), 15)]
    assert {row["packages"] for row in matrix["include"]} == {"lowest"}


def test_the_manual_is_built_as_contributors_are_told():
    (command,) = [line for line in steps("ci") if "sphinx" in line]
    assert command in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def test_a_release_reads_the_version():
    (check,) = [step for step in steps("release") if "GITHUB_REF_NAME" in step]
    shell = check.splitlines()[0] + '\necho "$version"'
    printed = subprocess.run(
        shell, shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == tdm.__version__


def test_only_the_upload_may_ask_for_a_token():
    jobs = {
        (name, job): text
        for name in WORKFLOWS
        for job, text in read(WORKFLOWS[name])["jobs"].items()
    }
    asked = {key: job["permissions"] for key, job in jobs.items() if "permissions" in job}
    assert asked == {("release", "publish"): {"id-token": "write"}}


@pytest.mark.parametrize("form", ["bug", "method", "model"])
def test_an_issue_form_is_whole(form):
    read_form = read(GITHUB / "ISSUE_TEMPLATE" / f"{form}.yml")
    assert {*read_form} == {"name", "description", "labels", "body"}
    assert all(field["attributes"]["label"] for field in read_form["body"])
    assert any(field.get("validations", {}).get("required") for field in read_form["body"])
