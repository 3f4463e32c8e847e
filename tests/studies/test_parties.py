"""How machines and precisions are spelled."""

import pytest

from bitassay.errors import BitassayError
from bitassay.studies.machines import Machine
from bitassay.studies.parties import PROVER, Party, is_recipe, party_job


def test_a_machine_is_a_device_and_numerics():
    machine = Machine("cpu+avx2+eager+2threads")
    assert (machine.device, machine.attention) == ("cpu", "eager")
    assert machine.variables == {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"}
    assert (Machine("cpu").attention, Machine("cpu").variables) == ("auto", {})
    assert Machine("cuda:1").label == "cuda1"


@pytest.mark.parametrize("name", ["", "tpu", "cpu+fast", "cpu+", "cuda:x", "+avx2", "cpu+threads"])
def test_what_is_no_machine(name):
    with pytest.raises(BitassayError, match="is no machine"):
        Machine(name)


def test_verifiers_differ_while_there_are_numerics_left():
    names = [machine.name for machine in Machine("cpu+avx2").verifiers(5)]
    assert names[:4] == ["cpu+avx2", "cpu+avx2+eager", "cpu+avx2+1thread", "cpu+avx2+eager+1thread"]
    assert names[4] == names[0]
    assert [machine.name for machine in Machine("cuda:0").verifiers(2)] == ["cuda:0", "cuda:0+eager"]


def test_a_process_sees_its_gpu_alone(tmp_path):
    def machine_of(name, gpus):
        job = party_job(PROVER, Party("bf16", Machine(name)), "m", [], tmp_path, gpus=gpus)
        return job.start.setup["party"][1]

    assert machine_of("cuda:3+eager", [3, 5]) == "cuda:0+eager"
    assert machine_of("cuda:3+eager", []) == "cuda:3+eager"
    assert machine_of("cpu+avx2", [3, 5]) == "cpu+avx2"


def test_labels_can_be_file_names():
    assert Party("a folder/x y", Machine("cuda:0+eager")).label == "x-y_cuda0+eager"
    assert [is_recipe(word) for word in ("w4", "fp16", "some/w4.yaml", "some/folder")] == [
        True,
        False,
        True,
        False,
    ]
