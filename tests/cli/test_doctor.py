"""metalens doctor."""

import json

import mlx.core as mx


def test_doctor_reports_a_working_installation(run):
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found["problems"]
    assert found["native_problem"] == ""
    assert found["native"]["instruction_set"] in found["native"]["available_instruction_sets"]
    assert found["mlx"] == mx.__version__
    table = run("doctor")
    assert "instruction set" in table.stdout
    assert "Everything works" in table.stderr
