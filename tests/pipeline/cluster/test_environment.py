"""Ranks and the meeting point follow from the environment alone, whoever started the process."""

import pytest

from beitforge.pipeline.cluster import environment as rendezvous
from beitforge.pipeline.cluster.environment import (
    first_host,
    rank_info,
    rank_of,
    refuse_loopback_name,
    rendezvous_variables,
    under_srun,
)
from beitforge.pipeline.errors import ConfigError, HostError

STEP = {  # what srun -N3 -n5 gives its task 3, on the second of three nodes
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "n[07-08,11]",
    "SLURM_JOB_NODELIST": "n[01-20]",
}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def where(environment: dict[str, str]) -> tuple[int, int, int, int]:
    place = rank_info(environment)
    return place.rank, place.size, place.local_rank, place.local_size


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        (STEP, (3, 5, 1, 2)),
        ({**STEP, "SLURM_NODEID": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, (4, 5, 0, 1)),
        (DEEPSPEED, (5, 16, 1, 4)),
        ({"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, (5, 16, 1, 8)),
        ({**STEP, **DEEPSPEED}, (5, 16, 1, 4)),  # a launcher inside a step
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0, 1)),  # the batch script
        ({**STEP, "SLURM_STEP_ID": "4294967290"}, (0, 1, 0, 1)),  # an interactive shell of salloc
    ],
    ids=["alone", "srun", "last node", "deepspeed", "torchrun", "deepspeed in srun", "batch script", "salloc"],
)
def test_the_place_of_a_process(environment, expected):
    assert where(environment) == expected
    assert rank_of(environment) == expected[0]


def test_threads_are_the_users_then_slurms():
    assert rank_info({}).threads == 0
    assert rank_info({**STEP, "SLURM_CPUS_PER_TASK": "6"}).threads == 6
    assert rank_info({**STEP, "SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "1"}).threads == 1


def test_a_step_meets_on_its_own_first_host():
    """Not on the job's, which may have more nodes than this srun."""
    found = rendezvous_variables(STEP)
    assert found["MASTER_ADDR"] == "n07"
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("3", "5", "1")
    assert (
        rendezvous_variables({**STEP, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"] == found["MASTER_PORT"]
    )


def test_what_the_user_sets_wins():
    found = rendezvous_variables({**STEP, "MASTER_ADDR": "ib0.n07", "MASTER_PORT": "4321"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("ib0.n07", "4321")


def test_jobs_and_steps_on_one_node_have_ports_of_their_own():
    """Any two of a thousand jobs in a row, four steps each; and none that Linux gives away for outgoing connections."""
    ports = {
        rendezvous_variables({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(70000, 71000)
        for step in range(4)
    }
    assert len(ports) == 4000
    assert all(1024 < int(port) < 32768 for port in ports)


def test_alone_on_a_free_port():
    found = rendezvous_variables({})
    assert (found["MASTER_ADDR"], found["WORLD_SIZE"]) == ("127.0.0.1", "1")
    assert int(found["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("n[07-12,15],login", "n07"), ("n3,n[07-12]", "n3"), ("r[2-4]n[10-19]", "r2n10"), ("n[5]", "n5")],
)
def test_the_first_of_slurms_list(nodes, first):
    """tests/cluster asks scontrol the same."""
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({**DEEPSPEED}, "MASTER_ADDR"),
        ({**DEEPSPEED, **MEETING, "RANK": "16"}, "RANK is 16"),
        ({**DEEPSPEED, **MEETING, "RANK": "two"}, "RANK is 'two'"),
        ({**MEETING, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({**STEP, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "list of nodes is empty"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused(environment, words):
    with pytest.raises(ConfigError, match=words):
        rendezvous_variables(environment)


def test_a_name_that_stands_for_the_loopback_is_refused(monkeypatch):
    """Debian's 127.0.1.1: gloo would tell it to other hosts. On one host, or told the interface, it does no harm."""
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: "n07")
    monkeypatch.setattr(rendezvous.socket, "gethostbyname", lambda name: "127.0.1.1")
    place = rank_info(STEP)
    with pytest.raises(HostError, match=r"n07 stands for 127\.0\.1\.1"):
        refuse_loopback_name(place, STEP)
    refuse_loopback_name(place, {**STEP, "GLOO_SOCKET_IFNAME": "eth0"})
    refuse_loopback_name(rank_info({}), {})
    monkeypatch.setattr(rendezvous.socket, "gethostbyname", lambda name: "10.1.2.3")
    refuse_loopback_name(place, STEP)


def test_a_step_is_what_srun_started():
    assert under_srun(STEP)
    assert not under_srun({"SLURM_JOB_ID": "7"})
    assert not under_srun({**STEP, "SLURM_STEP_ID": "4294967291"})
