"""The kept plans belong to the configurations as they are, and the page shows what is kept."""

from __future__ import annotations

import dataclasses

from intttrain.planner import record


def test_records_are_of_the_configurations_as_they_are():
    wanted = {item.name: item.digest() for item in record.wanted_plans()}
    kept = record.load_records()
    assert kept, "docs/plans.json has no plan"
    stale = [name for name, entry in kept.items() if wanted.get(name) != entry["digest"]]
    assert not stale, f"python -m intttrain.planner.record compiles these again: {stale}"


def test_the_page_shows_what_is_kept(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(record.PAGE.read_text())
    record.write_page(record.load_records(), page)
    assert page.read_text() == record.PAGE.read_text(), "python -m intttrain.planner.record writes the table"


def test_the_tables_of_the_files_show_what_is_kept():
    for file in {item.file for item in record.wanted_plans()}:
        text = (record.REPO / "configs" / f"{file}.py").read_text()
        assert record.fill_table(text, file, record.load_records()) == text, "python -m intttrain.planner.record"


def test_a_row_has_both_twins():
    text = """    | variant | topology | mesh | rows | peak GiB    | step s      |
    |---------|----------|------|------|-------------|-------------|
    | a       | v5e:2x2  | m    | r    |             | old         |
    | b       | v5e:2x2  | m    | r    |             | old         |
"""
    records = {
        "f:a v5e:2x2": {"peak_gib": 3.21, "step_seconds": 1.5}, "f:a_dense v5e:2x2": {"peak_gib": 20.0},
        "f:b v4:2x2x1": {"peak_gib": 1.0, "step_seconds": 1.0},
    }  # fmt: skip
    rows = record.fill_table(text, "f", records).splitlines()
    assert rows[:2] == text.splitlines()[:2]
    assert rows[2] == "    | a       | v5e:2x2  | m    | r    | 3.2 / 20.0  | 1.50 / -    |"
    assert rows[3] == "    | b       | v5e:2x2  | m    | r    | - / -       | - / -       |"


def test_a_plan_compiled_again_is_compared():
    old = {"digest": "a", "versions": {"jax": "1"}, "peak_gib": 10.0, "step_seconds": 2.0, "matmul_tflop": 100.0}
    assert record.differences(old, old | {"step_seconds": 2.009}) == []
    assert record.differences(old, old | {"step_seconds": 2.02}) == [
        "step_seconds: 2.0 is recorded (jax 1), 2.02 came out"
    ]
    newer = {"versions": {"jax": "2"}}
    assert record.differences(old, old | newer | {"step_seconds": 2.2, "peak_gib": 9.0}) == []
    assert len(record.differences(old, old | newer | {"step_seconds": 2.4, "matmul_tflop": 102.0})) == 2
    assert len(record.differences(old, old | {"digest": "b"})) == 1
    assert len(record.differences(old, {**old, "step_seconds": None})) == 1, "no longer fits"


def test_the_digest_follows_what_shapes_the_step():
    item = next(item for item in record.wanted_plans() if item.variant == "4b_8k")
    free = dataclasses.replace(item.config, name="other", train=dataclasses.replace(item.config.train, num_steps=7))
    assert dataclasses.replace(item, config=free).digest() == item.digest()
    model = dataclasses.replace(item.config.model, remat="dots")
    changed = dataclasses.replace(item.config, model=model)
    assert dataclasses.replace(item, config=changed).digest() != item.digest()


def test_a_plan_that_does_not_fit_is_kept_without_a_time():
    plan = {
        "versions": {"jax": "1", "libtpu": "2"}, "mesh": "fsdp 4", "tokens_per_step": 10, "remat": "full",
        "microbatches": 1, "verdict": {"needed": 3 * 2**30, "available": 2 * 2**30}, "prediction": None,
    }  # fmt: skip
    entry = record.to_record(plan, "abc")
    assert (entry["peak_gib"], entry["spare_gib"]) == (3.0, -1.0) and "step_seconds" not in entry
    assert "| -1.00 | - | - | - |" in record.to_table({"a b": entry})


def test_plans_of_an_older_program_have_a_star():
    new = dict.fromkeys(("tokens_per_step", "microbatches", "peak_gib", "spare_gib", "mfu", "step_seconds"), 1)
    new |= {"mesh": "m", "remat": "full", "tokens_per_second_per_chip": 1, "program": record.PROGRAM}
    new |= {"versions": {"jax": "1", "libtpu": "2"}}
    table = record.to_table({"new": new, "old": new | {"program": record.PROGRAM - 1}}).splitlines()
    assert ("| 1.00 |" in table[-2], "| 1.00 * |" in table[-1]) == (True, True)
