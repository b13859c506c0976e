"""Commands of one process, started in several: each refuses before it reads or writes anything."""

from __future__ import annotations

import pytest

from intttrain.app import cli
from intttrain.app.harness import load_respondent
from intttrain.config.errors import UserError

COMMANDS = {
    "prepare": ["--config=configs/tiny.py", "--output=OUT"],
    "export": ["--workdir=RUN", "--output=OUT"],
    "generate": ["--workdir=RUN", "--prompt=a"],
}


@pytest.fixture(autouse=True)
def mpirun(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1.0;tcp://127.0.0.1:1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_of_one_process_refuse_company(name, tmp_path, capsys):
    flags = [flag.replace("=OUT", f"={tmp_path}/out").replace("=RUN", f"={tmp_path}/run") for flag in COMMANDS[name]]
    assert cli.run([name, *flags]) == 2
    said = capsys.readouterr().err
    assert f"error: intttrain {name} runs in one process, and was started in each of the 2 processes of OMPI" in said
    assert not list(tmp_path.iterdir())


def test_the_harness_refuses_company(tmp_path):
    with pytest.raises(UserError, match="the harness runs in one process"):
        load_respondent(workdir=str(tmp_path))
