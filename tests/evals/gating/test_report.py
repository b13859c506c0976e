"""The report of a gating study: exact tables and JSON of a fixed input, what it keeps to itself, and the pictures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from intttrain.config import EvalConfig
from intttrain.config.errors import UserError
from intttrain.evals.bootstrap import Estimate
from intttrain.evals.gating import figure as gating_figure
from intttrain.evals.gating.figure import plot_gating
from intttrain.evals.gating.metrics import Controls, measure_rule
from intttrain.evals.gating.oracles import make_outcome
from intttrain.evals.gating.report import GateCost, GateRow, GateSetting, make_gating_report

CONFIG = EvalConfig(seq_len=8, documents=12, min_document_tokens=4, position_edges=(8,), bootstrap_samples=100, seed=0)
DOCUMENTS, CHUNK = 12, 4
FEW = "fewer than 30: intervals are wide for that, and rough where a few stand out"


def outcome(bits, gates_M, chunks, spread=0.0, documents=DOCUMENTS):
    """Losses of ``bits`` per token; documents differ by a fixed pattern, decisions in worth by ``spread``."""
    pattern_N1 = (np.arange(documents)[:, None] - (documents - 1) / 2) / 10
    weight_NM = np.full((documents, chunks), float(CHUNK))
    nll_NM = weight_NM * (bits + pattern_N1 * (1.0 + spread)) * math.log(2.0)
    return make_outcome(np.tile(gates_M[None, :, None], (documents, 1, 1)), nll_NM, weight_NM)


def row(rule, bits, rate, *, sign=1, chunks=4, oracle=2.0, cost=None, signal=True, documents=DOCUMENTS, shuffled=None):
    """One row of the study; ``rate`` of the gates are 1, the early ones, and the signal falls."""
    gates_M = (np.arange(chunks) < round(rate * (chunks - 1))).astype(float)

    def made(bits, gates_M=gates_M, spread=0.0):
        return outcome(bits, gates_M, chunks, spread, documents)

    blind = made(2.5, spread=0.05)
    controls = {"random": blind, "first": made(2.5), "last": made(2.625), "periodic": made(2.375)}
    metrics = measure_rule(
        made(bits, spread=0.1),
        references={
            "never": made(3.0, 0 * gates_M),
            "always": made(2.75, 0 * gates_M + 1),
            "greedy": made(2.875, 1 - gates_M),
        },
        controls=Controls(controls, np.tile(blind.nll_NM, (10, 1, 1))),
        oracles={"tree": made(oracle, np.arange(chunks) < 1.0)},
        weights_NM=np.full((documents, chunks), float(CHUNK)),
        signal_NMn=np.tile(np.arange(chunks, 0.0, -1.0)[None, :, None], (documents, 1, 1)) if signal else None,
        eval_config=CONFIG,
    )
    name = "reconstruction" if signal else None
    setting = GateSetting(rule, name, sign if signal else None, rate, chunks * CHUNK)
    return GateRow(setting, metrics, cost or GateCost(), shuffled)


def study():
    less = Estimate(*(np.array([x]) for x in (-0.5, -0.75, -0.25)))
    return [
        row("online", 2.25, 1 / 3, cost=GateCost(flops_share=0.9712, compiled_share=0.98, seconds=1.5), shuffled=less),
        row("online", 2.375, 2 / 3),
        row("online", 2.625, 2 / 3, sign=-1),
        row("periodic", 2.375, 2 / 3, signal=False),
        row("always", 2.75, 1.0, chunks=8, signal=False),
        row("online", 2.25, 3 / 7, chunks=8, oracle=2.5),
    ]


def report_of(rows=None):
    rows = study() if rows is None else rows
    return make_gating_report(rows, CONFIG, name="tiny", unit="bits per byte", train_tokens=16, chunk_tokens=CHUNK)


def test_table(golden):
    golden.check("evals/gating.txt", report_of().table())


def test_json_holds_the_numbers_of_the_table_and_nothing_odd():
    content = report_of().to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    first = content["rows"][0]
    assert (first["rule"], first["signal"], first["sign"], first["row_tokens"]) == ("online", "reconstruction", 1, 16)
    assert first["rate"] == first["realised_rates"]["rule"]["value"] == pytest.approx(1 / 3)
    assert first["realised_rates"]["greedy"]["value"] == pytest.approx(2 / 3)
    assert first["levels"]["rule"]["value"] == pytest.approx(2.25)
    for name, value in (("never", -0.75), ("always", -0.5), ("random", -0.25), ("last", -0.375), ("tree", 0.25)):
        assert first["differences"][f"rule - {name}"]["value"] == pytest.approx(value)
    assert first["recoveries"]["tree"]["random"]["share"]["value"] == pytest.approx(0.5)
    assert first["recoveries"]["tree"]["never"]["share"]["value"] == pytest.approx(0.75)
    assert first["recoveries"]["tree"]["never"]["span"]["value"] == pytest.approx(1.0)
    assert first["cost"] == {"flops_share": 0.9712, "compiled_share": 0.98, "seconds": 1.5}
    assert content["rows"][1]["cost"] == {"flops_share": None, "compiled_share": None, "seconds": None}
    assert len(first["random_seeds"]) == 10
    assert [chunk["mean_decision_per_layer"] for chunk in first["chunks"]] == [[1.0], [0.0], [0.0], [None]]
    assert first["chunks"][2]["rule - never"]["value"] == pytest.approx(-0.75)
    assert content["rows"][3]["selectivity"] is None
    assert first["shuffled"] == {"value": -0.5, "low": -0.75, "high": -0.25} and content["rows"][1]["shuffled"] is None


def test_a_share_inside_the_noise_is_not_printed_and_the_report_says_so():
    report = report_of()
    hidden = report.to_json()["rows"][5]["recoveries"]["tree"]
    assert hidden["random"]["share"] is None
    assert hidden["random"]["gain"]["value"] == pytest.approx(0.25)
    assert hidden["never"]["share"]["value"] == pytest.approx(1.5)
    (line,) = [line for line in report.table().splitlines() if "0.429" in line and "tree" in line]
    assert line.count("in the noise") == 1
    assert report.warnings == (
        f"12 documents of 16 tokens, 12 documents of 32 tokens, {FEW}",
        "rows of 32 tokens: no share is given where the gain of an oracle is inside the noise (its interval reaches "
        "0.0001 bits per byte or less): random - tree",
    )
    assert report_of(study()[:4]).warnings == (f"12 documents of 16 tokens, {FEW}",)


def test_warns_of_few_documents():
    (warning,) = report_of([row("online", 2.5, 1 / 3, documents=29)]).warnings
    assert warning == f"29 documents of 16 tokens, {FEW}"
    assert report_of([row("online", 2.5, 1 / 3, documents=30)]).warnings == ()


def test_warns_of_a_failed_rule(tmp_path):
    report = report_of([row("online", np.inf, 1 / 3, documents=30)])
    assert report.warnings == (
        "the loss of online high reconstruction at rate 0.333 with rows of 16 tokens is not finite",
    )
    level = json.loads(json.dumps(report.to_json(), allow_nan=False))["rows"][0]["levels"]["rule"]
    assert level == {"value": None, "low": None, "high": None}
    assert "n/a" in report.table()
    plot_gating(report, tmp_path)


def test_settings_differ_and_documents_do_not():
    with pytest.raises(ValueError, match="0 rows with 0 settings"):
        report_of([])
    with pytest.raises(ValueError, match="2 rows with 1 settings"):
        report_of([row("online", 2.0, 1 / 3), row("online", 2.5, 1 / 3)])
    with pytest.raises(ValueError, match="rows of 16 tokens were scored on different documents"):
        report_of([row("online", 2.0, 1 / 3), row("online", 2.5, 2 / 3, documents=11)])


PNG = b"\x89PNG\r\n\x1a\n"


def test_pictures_appear_whole_and_never_overwrite(tmp_path):
    plot_gating(report_of(), tmp_path)
    names = ["gating_maps.png", "gating_positions.png", "gating_quality.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(PNG)
    with pytest.raises(UserError, match=r"gating_quality.png exists and is never overwritten"):
        plot_gating(report_of(), tmp_path)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figures of the study by file name, not rendered."""
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(gating_figure, "publish", lambda figure, path: figures.update({path.name: figure}))
    plot_gating(report_of(), tmp_path)
    return figures


def test_quality_is_drawn_at_the_realised_rate_with_its_interval(drawn):
    short, long = drawn["gating_quality.png"].axes
    (curve,) = [c for c in short.containers if c.get_label() == "online high reconstruction"]
    np.testing.assert_allclose(curve.lines[0].get_xydata(), [(1 / 3, -0.75), (2 / 3, -0.625)])
    ends = [segment[:, 1] for segment in curve.lines[2][0].get_segments()]
    difference = report_of().rows[0].metrics.differences["rule - never"]
    np.testing.assert_allclose(ends[0], [difference.low_P[0], difference.high_P[0]])
    lines = {line.get_label(): line.get_ydata() for line in short.lines}
    assert (lines["never"][0], lines["always"][0]) == pytest.approx((0.0, -0.25))
    np.testing.assert_allclose(lines["random, same count"], -0.5)
    stars = {text.get_text(): text.xy for text in short.texts}
    assert stars == {"tree": pytest.approx((1 / 3, -1.0))}  # greedy differs between the rows
    colors = [
        [c.lines[0].get_color() for c in axes.containers if c.get_label() == "online high reconstruction"]
        for axes in (short, long)
    ]
    assert colors[0] == colors[1]  # although another curve comes first in the second panel


def test_maps_show_mean_decisions_without_the_dead_gate(drawn):
    panels = [axes for axes in drawn["gating_maps.png"].axes if axes.images]
    np.testing.assert_array_equal(panels[0].images[0].get_array(), [[1.0, 1.0, 0.0]])  # at the rate nearest to .5
    np.testing.assert_array_equal(panels[1].images[0].get_array(), [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    assert len(panels) == 5  # curves that a length has


def test_positions_show_the_difference_by_chunk(drawn):
    short, long = drawn["gating_positions.png"].axes
    (curve,) = [line for line in long.lines if line.get_label() == "online high reconstruction"]
    np.testing.assert_allclose(curve.get_xdata(), (np.arange(8) + 0.5) * CHUNK)
    np.testing.assert_allclose(curve.get_ydata(), -0.75)
    assert len(long.lines) == 4  # never, two rules, the training length
    assert len(short.lines) == 4  # never, three rules
