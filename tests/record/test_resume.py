"""Everything that uses the job runner, killed and interrupted: a run ends in what one that nobody disturbed
gives, after the same command where it was stopped, and no worker is left behind. The plain jobs are fast; real
users of the runner are slow, and a Ray cluster needs idle cores."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil
import pytest
from safetensors.torch import load_file

TIMES = (
    "seconds",
    "created",
    "environment",
    "overhead",
    "ttft",
    "_s",
    "spread",
    "speed",
    "load",
    "run_id",
    "_ci",
)
SPACE = """
name: tiny
recipe: {weights: {format: int3, scale: absmax}}
parameters:
  weights.granularity: [channel, g32, g64]
  weights.offset: {low: 0.0, high: 0.5, step: 0.5}
"""


@dataclass(frozen=True)
class Case:
    """words: for Python, before the folder; progressed: files of which some say that it is at work; survives:
    whether a run goes on when a worker is killed at work."""

    words: str
    progressed: str
    survives: bool = True


STUDY = "-m bitassay.cli study run"
EXPERIMENT = "--tokens 6 --prompt-tokens 12 --trials 3 --verifiers 2 --attacks w4 --jobs 2 --out"
SEARCH = "--sampler grid --trials 6 --windows 3 --window 64 --short 3 --jobs 2 --out"
BENCH = "--batches 1 2 --contexts --prompt-tokens 8 --new-tokens 2 --repeats 4 --out"
CASES = {
    "plain": Case("-c 'import sys, pathlib, workers; workers.squares(pathlib.Path(sys.argv[1]))'", "parts/*"),
    "cells": Case(
        f"{STUDY} phase2 --model stories260k --only w2 --windows 16 --window 48 --jobs 2 --out",
        "parts/*.safetensors",
    ),
    "experiment": Case(f"{STUDY} exp1 --model stories260k {EXPERIMENT}", "work/*/traces/*/*.json"),
    "search": Case(f"-m bitassay.cli search space.yaml --model stories260k {SEARCH}", "workers/*.log"),
    "bench": Case(f"-m bitassay.cli bench stories260k --recipe w8 {BENCH}", "parts/round*", survives=False),
}
FAST = [pytest.param("plain", id="plain")]
SLOW = [pytest.param(name, id=name, marks=pytest.mark.slow) for name in CASES if name != "plain"]


def begun(case, folder):
    """The run as a process of its own, with what it says in a file."""
    folder.mkdir(exist_ok=True)
    (folder / "space.yaml").write_text(SPACE)
    (folder / "out").mkdir(exist_ok=True)
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, *shlex.split(CASES[case].words), str(folder / "out")],
            cwd=folder,
            stdout=said,
            stderr=said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )


def eventually(what, seconds=240):
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def workers_of(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "bitassay.record.jobs" in " ".join(child.cmdline())]


def kill_workers(process):
    with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
        for worker in workers_of(process):
            worker.kill()


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(word in k for word in TIMES)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def result_of(case, folder):
    """What a run made, but for times."""
    out = folder / "out"
    files = sorted(
        path for path in out.rglob("*") if path.is_file() and path.parent.name not in ("workers", "logs")
    )
    if case == "search":
        trials = json.loads((out / "run.json").read_text())["trials"]
        return {json.dumps(trial["values"]): trial["objectives"] for trial in trials}
    if case == "bench":
        run = json.loads((out / "run.json").read_text())
        return [path.name for path in files], [(row["model"], row["batch"]) for row in run["rows"]]
    made = {}
    for path in files:
        name = str(path.relative_to(out))
        if path.suffix == ".json":
            made[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            made[name] = {key: tensor.tolist() for key, tensor in load_file(path).items()}
    return json.dumps(made).replace(str(folder), "")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run that nobody disturbs gives, by case."""
    results = {}

    def result(case):
        if case not in results:
            folder = tmp_path_factory.mktemp(case)
            assert begun(case, folder).wait() == 0, (folder / "said").read_text()
            results[case] = result_of(case, folder)
        return results[case]

    return result


@pytest.mark.parametrize("disturbed", ["worker", "parent", "interrupt"])
@pytest.mark.parametrize("case", FAST + SLOW)
def test_a_disturbed_run_ends_the_same(case, disturbed, undisturbed, tmp_path):
    expected, process = undisturbed(case), begun(case, tmp_path)
    eventually(lambda: list((tmp_path / "out").glob(CASES[case].progressed)) or process.poll() is not None)
    workers = eventually(lambda: workers_of(process))
    if disturbed == "worker" and CASES[case].survives:
        workers[-1].kill()
    elif disturbed == "worker":  # one that had nothing to do is started anew, and then is at work
        eventually(lambda: process.poll() is not None or kill_workers(process))
    elif disturbed == "parent":
        process.kill()
    else:
        process.send_signal(signal.SIGINT)
    status = process.wait(240)
    assert (status == 0) == (disturbed == "worker" and CASES[case].survives), (tmp_path / "said").read_text()
    for worker in workers:
        eventually(lambda worker=worker: is_gone(worker), 30)
    if status:
        assert begun(case, tmp_path).wait(240) == 0, (tmp_path / "said").read_text()
    assert result_of(case, tmp_path) == expected


def node_ports():
    """Ports that a node is told, so that it need not wait for its agents to find some."""
    names = (
        "metrics_agent_port",
        "metrics_export_port",
        "runtime_env_agent_port",
        "dashboard_agent_listen_port",
    )
    held = [socket.socket() for _ in names]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = dict(zip(names, [one.getsockname()[1] for one in held], strict=True))
    for one in held:
        one.close()
    return ports


@pytest.mark.ray
@pytest.mark.parametrize("disturbed", ["node", "actor", "nobody"])
def test_a_ray_cluster_ends_the_same(disturbed, undisturbed, tmp_path, monkeypatch):
    """Two nodes, of which one is killed, or an actor on one."""
    pytest.importorskip("ray")
    import ray
    from ray.cluster_utils import Cluster

    from bitassay.record.jobs import ray_workers, run_jobs
    from workers import jobs_of

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **node_ports()})
    said, out = [], tmp_path / "out"
    try:
        second = nodes.add_node(num_cpus=1, **node_ports())
        ray.init(address=nodes.address, log_to_driver=False)

        def disturb(done):
            if done != 1 or said:
                return
            if disturbed == "node" and second in nodes.worker_nodes:
                nodes.remove_node(second, allow_graceful=False)
            elif disturbed == "actor":
                actors = [p for p in psutil.process_iter() if p.name().startswith("ray::Node")]
                actors[0].kill()

        jobs = jobs_of([["square", n] for n in range(6)], out, 0.5)
        run_jobs(
            jobs, ray_workers("auto", 6, gpu=False), tick=disturb, progress=lambda what, *_: said.append(what)
        )
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert bool(said) == (disturbed != "nobody")
    assert {path.name: path.read_text() for path in (out / "parts").iterdir()} == {
        f"{n}.json": f"{n**2}\n" for n in range(6)
    }
