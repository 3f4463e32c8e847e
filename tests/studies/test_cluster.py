"""Cells on a Ray cluster of two nodes, one of which is killed."""

import json
import socket

import pytest

pytest.importorskip("ray")
pytest.importorskip("lm_eval")

from bitassay.data.windows import Protocol
from bitassay.errors import BitassayError, MissingError
from bitassay.models.identity import Identity
from bitassay.models.source import resolve
from bitassay.record.run import RunFolder
from bitassay.studies import cluster
from bitassay.studies.cells import Bench, Cell
from bitassay.studies.cluster import Worker, run_on_ray
from bitassay.studies.eight_bit.study import eight_bit_plan

PLAN = eight_bit_plan("task3.1", "stories260k", 1, Protocol(windows=2, window_tokens=48))
CELLS = [Cell("questions", place) for place in range(4)]


@pytest.fixture
def described(monkeypatch):
    monkeypatch.delenv("BITASSAY_DATA", raising=False)
    return PLAN.described("eight-bit", Identity(resolve("stories260k")).weights_digest)


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
    found = dict(zip(names, [one.getsockname()[1] for one in held], strict=True))
    for one in held:
        one.close()
    return found


@pytest.mark.ray
def test_a_lost_node_loses_its_cell_to_the_other(described, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **node_ports()})
    try:
        second = nodes.add_node(num_cpus=1, **node_ports())
        ray.init(address=nodes.address, log_to_driver=False)
        folder, said = RunFolder(tmp_path / "ray", described), []

        def progress(what, done=0, _total=0):
            said.append(what)
            if done == 1 and second in nodes.worker_nodes:
                nodes.remove_node(second, allow_graceful=False)

        run_on_ray(folder, CELLS, "auto", progress)
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert any("lost a worker" in what for what in said)
    here = RunFolder(tmp_path / "here", described)
    bench = Bench(described)
    for cell in CELLS:
        bench.work(cell, here)
        name = f"parts/{cell.name}.json"
        assert json.loads((folder.path / name).read_text()) == json.loads((here.path / name).read_text())


class Reference:
    """What a call of an actor gives."""

    def __init__(self, actor, arguments):
        self.actor, self.arguments = actor, arguments


class Lost(Exception):
    pass


class FakeRay:
    """As much of Ray as is used, in this process. lost: how many calls lose their actor."""

    def __init__(self, lost, cpus=2):
        self.lost, self.cpus, self.calls, self.killed = lost, cpus, [], []
        self.exceptions = self
        self.RayActorError = Lost

    def remote(self, **_):
        return lambda kind: self._Made(self, kind)

    class _Made:
        def __init__(self, ray, kind):
            self.ray, self.kind = ray, kind

        def remote(self, described):
            actor = type("Actor", (), {})()
            worker, ray = self.kind(described), self.ray
            actor.work = type("M", (), {"remote": staticmethod(lambda *a: Reference(worker, a))})()
            ray.actors = [*getattr(ray, "actors", []), actor]
            return actor

    def cluster_resources(self):
        return {"CPU": self.cpus}

    def wait(self, references, **_):
        return references[:1], references[1:]

    def get(self, reference):
        self.calls.append(reference.arguments)
        if len(self.calls) <= self.lost:
            raise Lost
        return reference.actor.work(*reference.arguments)

    def kill(self, actor):
        self.killed.append(actor)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_cells_of_lost_workers_are_done_by_others(lost, described, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "connected", lambda _: fake)
    fake, cells = FakeRay(lost), CELLS[:2]
    folder = RunFolder(tmp_path / "r", described)
    run_on_ray(folder, cells, "auto")
    assert all(folder.has(cell.name) for cell in cells)
    assert len(fake.calls) == len(cells) + lost
    assert len(fake.actors) == (3 if lost == 2 else 2)  # a new one where none is left


def test_a_cell_that_loses_every_worker_is_given_up(described, tmp_path, monkeypatch):
    fake = FakeRay(100)
    monkeypatch.setattr(cluster, "connected", lambda _: fake)
    with pytest.raises(MissingError, match="questions-00: lost 3 workers"):
        run_on_ray(RunFolder(tmp_path / "r", described), CELLS[:1], "auto")


def test_a_workers_complaint_is_raised(described, tmp_path, monkeypatch):
    described["weights_digest"] = "0" * 64
    monkeypatch.setattr(cluster, "connected", lambda _: FakeRay(0))
    with pytest.raises(BitassayError, match="not those that this study began with"):
        run_on_ray(RunFolder(tmp_path / "r", described), CELLS[:1], "auto")


def test_a_cluster_without_room(described, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "connected", lambda _: FakeRay(0, cpus=0))
    with pytest.raises(MissingError, match="has no CPU"):
        run_on_ray(RunFolder(tmp_path / "r", described), CELLS[:1], "auto")


def test_a_worker_sends_the_files_that_a_local_process_writes(described, tmp_path):
    made = Worker(described).work("questions", 1)
    here = RunFolder(tmp_path / "here", described)
    Bench(described).work(CELLS[1], here)
    assert {"questions-01.json", "facts-int8-tensor-fake.json"} == made.keys()
    assert made["questions-01.json"] == (here.path / "parts/questions-01.json").read_bytes()


def test_without_ray(monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"bitassay\[ray\]"):
        cluster.connected("auto")
