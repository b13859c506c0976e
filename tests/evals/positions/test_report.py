"""The report: exact table and JSON of a fixed input, warnings, and the picture."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from intttrain.config import EvalConfig
from intttrain.config.errors import UserError
from intttrain.evals import PositionLosses, make_report

EDGES = (4, 8)
CONFIG = EvalConfig(seq_len=8, documents=12, min_document_tokens=4, position_edges=EDGES, bootstrap_samples=100, seed=0)
NAMES = ("on", "off", "dense", "unigram", "bigram")


def losses(bits, *, norm=None, documents=30, spread=True):
    """Losses of ``bits`` per token and bucket; documents differ by a fixed pattern with mean zero."""
    weight_NP = np.full((documents, 2), 4.0)
    pattern_N1 = (np.arange(documents)[:, None] - (documents - 1) / 2) / 10 if spread else 0.0
    nll_NP = weight_NP * (np.asarray(bits)[None] + pattern_N1) * math.log(2.0)
    return PositionLosses(EDGES, nll_NP, weight_NP, None if norm is None else np.tile(norm, (documents, 1)))


def report_of(names=NAMES, *, norm=(0.0, 2.5), **changes):
    given = {
        "on": losses((3.0, 2.25), norm=norm),
        "off": losses((3.0, 2.75)),
        "dense": losses((3.125, 2.5)),
        "unigram": losses((5.0, 5.0), spread=False),
        "bigram": losses((4.0, 4.0), spread=False),
    }
    given |= changes
    return make_report({name: given[name] for name in names}, CONFIG, name="tiny", unit="bits per byte")


def test_table(golden):
    given = {
        "on": losses((3.0, 2.2), norm=(0.0, 2.5), documents=12),
        "off": losses((3.0, 2.7), spread=False, documents=12),
        "dense": losses((3.1, 2.5), documents=12),
        "unigram": losses((5.0, 5.0), spread=False, documents=12),
        "bigram": losses((4.0, 4.0), spread=False, documents=12),
    }
    golden.check("evals/report.txt", report_of(**given).table())


def test_json_holds_the_numbers_of_the_table_and_nothing_odd():
    content = report_of().to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    last = content["buckets"][1]
    assert (last["begin"], last["end"], last["documents"], last["tokens"]) == (4, 8, 30, 120)
    assert list(last["levels"]) == list(NAMES)
    assert last["levels"]["on"]["value"] == pytest.approx(2.25)
    assert last["levels"]["on"]["low"] < 2.25 < last["levels"]["on"]["high"]
    assert last["state_norm"] == 2.5
    for name, value in (("on - off", -0.5), ("on - dense", -0.25), ("off - dense", 0.25)):
        assert last["differences"][name] == pytest.approx({"value": value, "low": value, "high": value})
    assert content["all"]["levels"]["on"]["value"] == pytest.approx((3.0 + 2.25) / 2)
    assert content["all"]["tokens"] == 240
    assert content["warnings"] == []


def test_totals_weigh_tokens_not_buckets():
    weight_NP = np.array([[1.0, 3.0], [1.0, 3.0]])
    on = PositionLosses(EDGES, weight_NP * [[4.0, 2.0]] * math.log(2.0), weight_NP)
    content = make_report({"on": on}, CONFIG, name="x", unit="bits per token").to_json()
    assert content["all"]["levels"]["on"]["value"] == pytest.approx((4 + 3 * 2) / 4)


def test_nothing_that_is_not_a_number_reaches_json():
    """A model that failed, a bucket that nobody reaches and unknown norms are null."""
    broken = losses((3.0, 2.0), norm=(np.nan, np.nan))
    broken.nll_NP[3, 0] = np.inf
    content = report_of(("on", "off"), on=broken).to_json()
    text = json.dumps(content, allow_nan=False)
    assert json.loads(text)["buckets"][0]["levels"]["on"] == {"value": None, "low": None, "high": None}
    assert content["buckets"][0]["differences"]["on - off"]["value"] is None
    assert content["buckets"][0]["state_norm"] is None
    assert content["buckets"][1]["levels"]["on"]["value"] == pytest.approx(2.0)
    assert "the loss of 'on' is not finite at positions 0-3" in content["warnings"]
    assert "n/a" in report_of(("on", "off"), on=broken).table()

    short = losses((3.0, 0.0), norm=(0.0, np.nan))
    short.weight_NP[:, 1] = 0.0
    report = make_report({"on": short}, CONFIG, name="x", unit="bits per token")
    assert report.to_json()["buckets"][1]["levels"]["on"]["value"] is None
    assert report.to_json()["all"]["state_norm"] == 0.0
    assert report.warnings == ("no document reaches positions 4-7",)


def test_warns_without_a_dense_model():
    report = report_of(("on", "off"))
    assert len(report.warnings) == 1
    assert "on - off overstates the gain" in report.warnings[0]
    assert "warning: no dense model was given" in report.table()
    assert "on - dense" not in report.table()
    assert report_of(("on", "off", "dense")).warnings == ()


def test_warns_of_a_large_state():
    assert report_of(norm=(0.0, 10.0)).warnings == ()
    (warning,) = report_of(norm=(3.0, 10.5)).warnings
    assert "grows to 10.5 times |W0|" in warning
    assert "above 10 at positions 4-7" in warning


def test_warns_of_few_documents_once():
    report = report_of(("dense",), dense=losses((3.0, 2.0), documents=29))
    said = "29 documents at all positions, fewer than 30: intervals are wide for that, and rough where a few stand out"
    assert report.warnings == (said,) and report.to_json()["warnings"] == [said]
    assert report.table().count("fewer than 30") == 1

    late = losses((3.0, 2.0))
    late.weight_NP[3:, 1] = late.nll_NP[3:, 1] = 0.0
    (warning,) = report_of(("dense",), dense=late).warnings
    assert warning.startswith("3 documents at positions 4-7, fewer than 30")


def test_a_dense_run_alone_has_levels_only():
    report = report_of(("dense", "bigram"))
    assert report.differences == {}
    assert report.state_norm_Q is None
    assert "|S|" not in report.table()


def test_conditions_must_be_known_and_see_the_same_tokens():
    with pytest.raises(ValueError, match="must be some of"):
        make_report({"best": losses((1.0, 1.0))}, CONFIG, name="x", unit="bits per byte")
    with pytest.raises(ValueError, match="'off' was not scored on the same tokens as 'on'"):
        report_of(("on", "off"), off=losses((1.0, 1.0), documents=11))
    other = dataclasses.replace(losses((1.0, 1.0)), edges=(3, 8))
    with pytest.raises(ValueError, match="'off' was not scored on the same tokens as 'on'"):
        report_of(("on", "off"), off=other)


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("names", [NAMES, ("on", "off"), ("dense",)])
def test_plot_writes_a_picture(tmp_path, names):
    path = tmp_path / "figure.png"
    report_of(names).plot(path)
    assert path.read_bytes().startswith(PNG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]


def test_plot_of_unknown_values(tmp_path):
    broken = losses((np.nan, np.nan), norm=(np.nan, np.nan))
    report_of(on=broken).plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_plot_never_overwrites(tmp_path):
    path = tmp_path / "figure.png"
    path.write_text("mine")
    with pytest.raises(UserError, match="is never overwritten"):
        report_of().plot(path)
    assert path.read_text() == "mine"
    with pytest.raises(UserError, match="cannot be written"):
        report_of().plot(tmp_path / "missing" / "figure.png")


def test_failed_plot_leaves_nothing_behind(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full_disk(self, path, **_):
        path.write_bytes(PNG)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(UserError, match="No space left"):
        report_of().plot(tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_loaded_by_plotting_only():
    program = "import sys, intttrain.evals; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"
