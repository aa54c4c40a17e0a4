"""The report of a deep network: layers that are alike share a line, those that differ keep theirs."""

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn.monitoring import listing

T, B, I, H = 30, 2, 2, 4


def report_of(model, loss=torch.sum):
    torch.manual_seed(1)
    with fastrnn.GradientMonitor(model) as monitor:
        loss(model(torch.randn(T, B, I))[0]).backward()
    return monitor.report()


@pytest.mark.parametrize("kind", [fastrnn.GRU, fastrnn.LSTM])
def test_twenty_layers_that_are_alike_take_seven_lines_at_most(kind):
    torch.manual_seed(0)
    report = report_of(kind(I, H, 20))
    assert len(report.findings) == 20 and {record.verdict for record in report} == {"vanishing"}
    lines = str(report).splitlines()
    assert len(lines) <= 7
    name = f"{kind.__name__.lower()}.l0-l19"
    states = len(report) // 20
    assert [line.split()[0] for line in lines[1 : 1 + states]] == [name] * states
    horizons = [record.horizon for record in report]
    assert f"{min(horizons)}..{max(horizons)} of {T}" in lines[1]
    shortest = min(report, key=lambda record: record.horizon)
    assert lines[states + 2].startswith(f"{name}: vanishing: the shortest horizon is that of {shortest.name}: ")
    told = [line for line in lines if line.startswith("  - ")]
    assert len(told) == len({rule for finding in report.findings for rule in finding.rules}) == 2
    assert max(map(len, lines)) < 250


def test_layers_that_differ_keep_their_lines():
    torch.manual_seed(0)
    rnn = fastrnn.RNN(I, H, 12, bidirectional=True, nonlinearity="relu")
    with torch.no_grad():
        rnn.weight_hh_l5.copy_(1.5 * torch.eye(H))
        rnn.bias_ih_l5.fill_(1.0)
    report = report_of(rnn)
    verdicts = {record.name: record.verdict for record in report}
    assert verdicts["rnn.l5"] != verdicts["rnn.l4"] == verdicts["rnn.l6"]
    runs = [listing.label(run) for run in listing.runs_of(report)]
    assert {"rnn.l5", "rnn.l6-l11"} <= set(runs) and any(run.endswith("_reverse") for run in runs)
    covered = [record.name for run in listing.runs_of(report) for record in run]
    assert sorted(covered) == sorted(verdicts)
    text = str(report)
    assert all(f"{run}: {verdicts[next(r.name for r in group)]}" in text
               for run, group in zip(runs, listing.runs_of(report), strict=True))  # fmt: skip


def test_a_layer_that_is_not_finite_is_never_hidden():
    torch.manual_seed(0)
    rnn = fastrnn.GRU(I, H, 10)
    weight = torch.ones(T, 1, 1)
    weight[4] = torch.nan
    report = report_of(rnn, lambda y: (y * weight).sum())
    assert len(listing.runs_of(report)) == 10 and str(report).count("not finite from step 4") >= 10


def test_a_shallow_report_names_every_layer():
    torch.manual_seed(0)
    model = fastrnn.GRU(I, H, listing.DEEP)
    assert [listing.label(run) for run in listing.runs_of(report_of(model))] == [
        f"gru.l{i}" for i in range(listing.DEEP)
    ]


def test_several_modules_do_not_mix():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = fastrnn.GRU(I, H, 5), fastrnn.GRU(H, H, 5)

        def forward(self, x):
            return self.b(self.a(x)[0])

    torch.manual_seed(0)
    assert {listing.label(run) for run in listing.runs_of(report_of(Model()))} >= {"a.l0-l4", "b.l0-l4"}
