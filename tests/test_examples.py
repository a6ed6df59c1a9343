"""Examples do what they say."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import vqmill
from pipelines.cli import app


@pytest.mark.usefixtures("ray_session")
def test_a_diffusers_vqmodel_fills_a_store(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(Path(__file__).parents[1])
    module, store = "examples.diffusers_vqmodel:make", tmp_path / "codes.zarr"
    assert app(["check-tokenizer", module]) == 0
    assert capsys.readouterr().out.count("pass: ") == 8
    words = ["tokenize", scenes, "--tokenizer-module", module, "--out", str(store), "--workers", "1", "--size", "16"]
    assert app(words) == 0
    codes = vqmill.open_codes(store)
    assert codes["codes"].shape == (300, 4, 4)
    assert len(set(codes["codes"][:].flatten().tolist())) > 4
    capsys.readouterr()
    assert app(["evaluate", scenes, "--tokenizer-module", module, "--limit", "8", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["images"], figures["size"], figures["codes/codebook_size"]) == (8, 32, 64)
    assert 0 < figures["ssim"] < 1
    assert app(["decode", str(store), "--tokenizer-module", module, "--out", str(tmp_path / "grid.png")]) == 0


CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"
# Fields of ray.io/v1 (KubeRay 1.7): https://ray-project.github.io/kuberay/reference/api/
RAY_JOB = {
    "spec": {
        "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec", "activeDeadlineSeconds",
        "submissionMode", "runtimeEnvYAML", "entrypointNumCpus", "submitterPodTemplate", "suspend", "jobId", "metadata",
    },
    "rayClusterSpec": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions"},
    "headGroupSpec": {"rayStartParams", "template", "serviceType", "headService", "enableIngress"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template", "scaleStrategy"},
}  # fmt: skip


def accepted(command: str) -> dict[str, Any]:
    """The arguments of a `vqmill` command as our command line takes them."""
    words = shlex.split(command)
    assert words[:2] == ["vqmill", "tokenize"]
    return dict(app.parse_args(words[1:], exit_on_error=False, print_error=False)[1].arguments)


def test_the_kuberay_job_has_known_fields_and_a_command_that_is_ours() -> None:
    manifest = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    head, [group] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for name, found in (
        ("spec", spec),
        ("rayClusterSpec", cluster),
        ("headGroupSpec", head),
        ("workerGroupSpecs", group),
    ):
        assert set(found) <= RAY_JOB[name], name
    assert cluster["authOptions"] == {"mode": "token"}
    for part in (head, group):
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
        [container] = part["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    command, _, otherwise = spec["entrypoint"].partition(" || ")
    assert otherwise == "test $? -eq 3", "quarantined samples are no failure"
    assert accepted(command)["workers"] == group["replicas"]


def test_the_cluster_file_is_what_ray_up_takes() -> None:
    text = (CLUSTER / "ray-cluster.yaml").read_text()
    found = importlib.util.find_spec("ray")
    assert found
    assert found.origin
    schema = Path(found.origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(yaml.safe_load(text), json.loads(schema.read_text()))
    [command] = [
        line.partition('"')[2].partition('"')[0] for line in text.splitlines() if line.startswith("#     ray exec")
    ]
    assert accepted(command)["cluster"].address == "auto"


def test_the_slurm_script_is_well_formed_and_its_command_is_ours() -> None:
    script = (CLUSTER / "slurm.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    command = script[script.index("    vqmill tokenize") :].partition("\\\n")[0]
    assert accepted(command.strip())["cluster"].address == "auto"
