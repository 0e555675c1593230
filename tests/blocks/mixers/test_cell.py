"""Recurrent cells: laws, a library's LSTM as a second opinion, every kind of node, and what is illegal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import archspec
from archspec.blocks.carry import Carry
from archspec.errors import SpecError

from .laws import close, compiled, document, first_mixer, hold


def linear(activation: str, **of: Any) -> dict[str, Any]:
    maps = {name.replace("previous_", "previous."): each for name, each in of.items()}
    return {"kind": "linear", "of": maps, "offset": 0, "activation": activation}


GRU: dict[str, Any] = {
    "kind": "cell",
    "state": "h",
    "nodes": {
        "z": linear("sigmoid", input="dense", previous_h="dense"),
        "r": linear("sigmoid", input="dense", previous_h="dense"),
        "reset": {"kind": "product", "of": ["r", "previous.h"]},
        "g": linear("tanh", input="dense", reset="dense"),
        "h": {"kind": "blend", "of": ["g", "previous.h"], "by": "z"},
    },
    "output": "h",
}
# Every kind of node and of map, streams of other widths, nodes that no state enters, and names of a mapping's methods.
MIXED: dict[str, Any] = {
    "kind": "cell",
    "num_heads": 2,
    "dim": {"ratio": 0.5},
    "streams": {"items": {"conv": 3, "dim": 12, "activation": "silu"}, "near": {"dim": 8, "norm": "rms"}},
    "state": ["values", "n", "last"],
    "nodes": {
        "keys": {"kind": "linear", "of": {"items": {"kind": "head", "init": "fan_in"}}, "activation": "sigmoid"},
        "last": {"kind": "copy", "of": "near", "activation": "tanh"},
        "two": {"kind": "linear", "of": {"input": "dense", "last": "diagonal"}, "offset": 0.5},
        "early": {"kind": "sum", "of": [["previous.last", "keys"], "near"]},
        "g": linear("tanh", previous_values="head", early="diagonal"),
        "top": {"kind": "maximum", "of": ["g", "early", "two"]},
        "drop": {"kind": "difference", "of": ["top", ["keys", "previous.n"]], "activation": "softplus"},
        "n": {"kind": "sum", "of": ["drop", "keys"]},
        "part": {"kind": "quotient", "of": ["top", "n"]},
        "soft": {"kind": "copy", "of": ["part", "keys"], "activation": "softmax"},
        "values": {"kind": "blend", "of": ["soft", "previous.values"], "by": "keys"},
        "out": {"kind": "product", "of": ["values", "two"]},
    },
    "output": "out",
    "readout": {"norm": {"kind": "rms", "over": "model"}, "gate": {"kind": "silu", "from": "items"}},
}


def test_cells_hold_the_laws() -> None:
    hold(document(GRU), length=12)


def test_cells_of_every_kind_of_node_hold_the_laws() -> None:
    hold(document(MIXED), length=12)


def test_cells_without_an_output_projection_hold_the_laws() -> None:
    hold(document({**GRU, "project": False}), length=12)
    with pytest.raises(SpecError, match=r"project: h has 8 channels and the model 16; project them\."):
        archspec.load(document({**GRU, "dim": {"ratio": 0.5}, "project": False}))


def test_cells_can_stand_inside_compositions() -> None:
    hold(document({"kind": "parallel", "of": {"a": GRU, "b": MIXED}, "combine": "gated", "prefix": 2}), length=11)


def test_the_shipped_lstm_is_torchs() -> None:
    model = archspec.compile(archspec.loads("extends: lstm\nname: small\nmodel_dim: 16"), dtype=torch.float64)
    mixer: Any = model.get_submodule("layers.0.mixer")
    theirs: Any = nn.LSTM(16, 16, batch_first=True, dtype=torch.float64)
    p = dict(mixer.named_parameters())
    with torch.no_grad():
        for name, ours in (("weight_ih_l0", "w_input"), ("weight_hh_l0", "w_previous_h"), ("bias_ih_l0", "offset")):
            rows = [p[f"nodes.{node}.{ours}"] for node in "ifgo"]
            stacked = torch.cat([row.flatten() if ours == "offset" else row.t() for row in rows])
            getattr(theirs, name).copy_(stacked)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    carry = Carry(None, 0)
    output = mixer(x, carry)
    wanted, (h, c) = theirs(x)
    assert close(output, wanted @ mixer.output)
    assert close(carry.outgoing["layers.0.mixer.h"], h[0])
    assert close(carry.outgoing["layers.0.mixer.c"], c[0])


def test_every_node_is_what_it_says() -> None:
    """The mixed cell, token by token, written out."""
    mixer = first_mixer(document(MIXED))
    p = dict(mixer.named_parameters())
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    carry = Carry(None, 0)
    streams = {name: module({"input": x}, Carry(None, 0)) for name, module in mixer.streams.items()}
    zero = torch.zeros(2, 8, dtype=torch.float64)
    values, n, last = zero, zero, zero
    rows = []
    for t in range(7):
        near, items = streams["near"][:, t], streams["items"][:, t]
        weight = p["nodes.keys.w_items"]
        keys = torch.cat([items[:, :6] @ weight[0], items[:, 6:] @ weight[1]], dim=-1).sigmoid()
        new_last = torch.tanh(near)
        two = x[:, t] @ p["nodes.two.w_input"] + new_last * p["nodes.two.w_last"].flatten()
        two = two + p["nodes.two.offset"].flatten()
        early = last * keys + near
        weight = p["nodes.g.w_previous_values"]
        g = torch.cat([values[:, :4] @ weight[0], values[:, 4:] @ weight[1]], dim=-1)
        g = torch.tanh(g + early * p["nodes.g.w_early"].flatten() + p["nodes.g.offset"].flatten())
        top = torch.stack([g, early, two]).amax(0)
        n = torch.log1p(torch.exp(top - keys * n)) + keys
        product = top / n * keys
        soft = torch.cat([product[:, :4].softmax(-1), product[:, 4:].softmax(-1)], dim=-1)
        values, last = keys * values + (1 - keys) * soft, new_last
        rows.append(values * two)
    o = torch.stack(rows, dim=1)
    normed = o / torch.sqrt((o * o).mean(-1, keepdim=True) + 1e-6) * p["readout.norm.weight"]
    gate = streams["items"] @ p["readout.gate.source.weight"]
    wanted = (normed * gate * gate.sigmoid()) @ p["output"]
    assert close(mixer(x, carry), wanted)
    for name, tensor in (("values", values), ("n", n), ("last", last)):
        assert close(carry.outgoing[f"layers.0.mixer.{name}"], tensor)


def test_the_state_stays_in_fp32_in_a_bf16_model() -> None:
    model = archspec.compile(document(GRU), vocab_size=11, dtype=torch.bfloat16)
    output = model(torch.zeros(1, 4, dtype=torch.long))
    assert output.logits.dtype == torch.bfloat16
    assert output.state.tensors["layers.0.mixer.h"].dtype == torch.float32


def test_metrics_see_the_state_of_cells() -> None:
    model = compiled(document(GRU), "auto")
    states = model.memory_states(torch.zeros(3, 4, dtype=torch.long))
    assert [tuple(state.shape) for state in states] == [(3, 16), (3, 16)]


def test_explain_and_list_show_nominal_coordinates() -> None:
    text = str(archspec.explain("slstm"))
    assert "vector(c, n, m, h) x none x gated x cell" in text
    assert "runs as cell / recurrence on torch: the state enters nonlinearly" in text
    found = archspec.plan(archspec.load("gru"))
    assert found.families() == ["cell"]
    assert found.summary() == "2x cell/recurrence/torch"
    from archspec.zoo import models

    rows = {row["name"]: row for row in models()}
    assert rows["lstm"]["coordinates"] == "vector(c, h) x none x gated x cell"
    assert rows["lstm"]["family"] == "cell"


def test_the_order_of_nodes_and_states_says_nothing() -> None:
    shuffled = {**MIXED, "nodes": dict(reversed(MIXED["nodes"].items())), "state": ["last", "values", "n"]}
    first, second = (archspec.load(document(mixer)) for mixer in (MIXED, shuffled))
    assert archspec.architecture_hash(first) == archspec.architecture_hash(second)
    tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(4))
    assert close(archspec.compile(first)(tokens).logits, archspec.compile(second)(tokens).logits)
    changed = {**GRU["nodes"], "z": {**GRU["nodes"]["z"], "activation": "tanh"}}
    assert archspec.architecture_hash(archspec.load(document(GRU))) != archspec.architecture_hash(
        archspec.load(document({**GRU, "nodes": changed}))
    )


def cell(nodes: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return document({**GRU, "nodes": {**GRU["nodes"], **(nodes or {})}, **fields})


def test_what_is_illegal_is_said_with_its_place() -> None:
    cases: dict[str, dict[str, Any]] = {
        r"mixer\.nodes\.reset: unknown name 'q'; known here: g, h, input": cell(
            {"reset": {"kind": "product", "of": ["q", "previous.h"]}}
        ),
        r"mixer\.nodes\.reset: unknown name 'previous\.g'": cell(
            {"reset": {"kind": "product", "of": ["r", "previous.g"]}}
        ),
        r"mixer\.nodes: the nodes read each other: reset -> g -> reset; let one read 'previous\.reset'": cell(
            {"reset": {"kind": "product", "of": ["r", "g"]}}
        ),
        r"mixer\.nodes\.idle: nothing that is returned or kept reads 'idle'": cell(
            {"idle": linear("tanh", input="dense")}
        ),
        r"mixer\.state\[1\]: no node reads 'previous\.z'": cell(state=["h", "z"]),
        r"mixer\.state\[0\]: unknown name 'hh'": cell(state=["hh"]),
        r"mixer\.output: unknown name 'k'; known here: g, h, r, reset, z": cell(output="k"),
        r"mixer\.nodes\.g\.of\.reset\.kind: found 'densse'.*Did you mean 'dense'": cell(
            {"g": linear("tanh", input="dense", reset="densse")}
        ),
        r"mixer\.nodes\.g\.of\.input: input is 16 wide and the cell 8; use 'dense' or 'head'": cell(
            {"g": linear("tanh", input="diagonal", reset="dense")}, dim=8
        ),
        r"mixer\.nodes\.reset: input is 16 wide and the cell 8; use a 'dense' map": cell(
            {"reset": {"kind": "product", "of": ["r", "previous.h", "input"]}}, dim=8
        ),
        r"mixer\.nodes\.g\.of\.input: input is 16 wide, which num_heads=3 does not divide": cell(
            {"g": linear("tanh", input="head", reset="dense")}, dim=8, num_heads=3
        ),
        r"mixer\.dim: dim is 16 over all heads, which num_heads=3 does not divide": cell(num_heads=3),
        r"mixer\.nodes\.h: unknown node 'blent'.*Did you mean 'blend'": cell(
            {"h": {"kind": "blent", "of": ["g", "previous.h"], "by": "z"}}
        ),
        r"mixer\.nodes\.h\.of: ": cell({"h": {"kind": "blend", "of": ["g"], "by": "z"}}),
        r"mixer\.nodes\.h\.of\[0\]: found \{\}; required: a name": cell({"h": {"kind": "sum", "of": [{}, "z"]}}),
        r"mixer\.streams\.z: 'z' is taken": cell(streams={"z": {"kind": "identity", "conv": 2}}),
        r"mixer\.streams\.s\.from: unknown stream 'inputs'.*Did you mean 'input'": cell(
            streams={"s": {"from": "inputs"}}
        ),
        r"mixer\.readout\.skip: skip belongs to a memory": cell(readout={"skip": {}}),
        r"mixer\.readout\.gate\.from: unknown stream 'h'": cell(readout={"gate": {"kind": "silu", "from": "h"}}),
    }
    for message, spec in cases.items():
        with pytest.raises(SpecError, match=message):
            archspec.load(spec)
