"""Routed memories: laws, untouched memories, sharing, adapters, the balance loss, and what is illegal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import archspec
from archspec.blocks.carry import Carry
from archspec.errors import SpecError

from .laws import ATTENTION, MATRIX, ONLINE, close, compiled, document, first_mixer, hold

MOM: dict[str, Any] = {
    "always_on": 1,
    "experts": 3,
    "router": {"top_k": 2, "renormalize": True, "balance_loss": 0.01, "conv": 2},
    "share": ["query", "key.conv", "value.conv", "retention.gate.rate", "retention.gate.offset"],
    "readout": {"norm": "rms", "gate": "silu"},
}
SSE: dict[str, Any] = {
    "of": {**MATRIX, "qk": {"activation": "softmax"}, "bias": "dot", "update": "gradient_descent"},
    "always_on": 2,
    "router": {"weigh": "read_and_write"},
    "share": ["query", "key", "value", "retention", "update"],
    "adapt": {"query": {"rank": 2}},
    "readout": {"norm": {"kind": "rms", "over": "model"}, "gate": "silu"},
}
STEPS = {**MATRIX, "update": {"kind": "multi_step", "steps": 2, "step_size": "sigmoid"}}
CHUNKS = {**ONLINE, "update": {"kind": "gradient_descent", "step_size": "sigmoid", "anchor": 4}}


def routed(**fields: Any) -> dict[str, Any]:
    return document({"kind": "routed", "experts": 2, "of": MATRIX, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        MOM,
        SSE,
        {"of": CHUNKS, "share": ["memory", "readout"]},
        {"of": STEPS, "share": ["key"], "always_on": 1, "adapt": {"key": {"rank": 3}}, "router": {"top_k": 2}},
    ],
    ids=["plain", "mom", "sse", "chunks", "steps"],
)
def test_routed_memories_hold_the_laws(fields: dict[str, Any]) -> None:
    hold(routed(**fields), length=15)


@pytest.mark.parametrize("of", [MATRIX, SSE["of"], STEPS, CHUNKS], ids=["delta", "linear", "steps", "chunks"])
def test_a_token_leaves_the_memories_that_do_not_take_it_as_they_are(of: dict[str, Any]) -> None:
    mixer = first_mixer(routed(of=of, experts=3))
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    carry = Carry(None, 0)
    mixer(x, carry)
    before = carry.outgoing
    for t in range(9, 17):
        token = torch.randn(2, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        carry = Carry(before, t)
        mixer(token, carry)
        taken = mixer._route(token, Carry(None, 0))[1][:, 0]
        assert (taken.sum(-1) == 1).all()
        for path in (path for path in before if ".dual." in path):
            index = int(path.split(".experts.")[1].split(".")[0])
            moved = (carry.outgoing[path] != before[path]).flatten(1).any(-1)
            assert torch.equal(moved, taken[:, index] > 0), path
        before = carry.outgoing


def test_weights_are_the_largest_probabilities() -> None:
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for renormalize in (False, True):
        mixer = first_mixer(routed(experts=5, router={"top_k": 3, "renormalize": renormalize}))
        weights, taken = mixer._route(x, Carry(None, 0))
        chances = (x @ mixer.router.weight).softmax(-1)
        wanted = chances * (chances >= chances.sort(-1, descending=True).values[..., 2:3])
        assert close(weights, wanted / wanted.sum(-1, keepdim=True) if renormalize else wanted)
        assert torch.equal(taken, (wanted > 0).to(taken.dtype))


def test_the_balance_loss_is_one_where_routing_is_even_and_grows_where_it_is_not() -> None:
    """E sum_e f_e P_e: 1 when all experts have the same chance, E when one expert has them all."""
    spec = routed(experts=4, router={"balance_loss": 0.5})
    model = compiled(spec, "auto")
    tokens = torch.zeros(1, 8, dtype=torch.long)
    router = model.get_parameter("layers.0.mixer.router.weight"), model.get_parameter("layers.1.mixer.router.weight")
    with torch.no_grad():
        for weight in router:
            weight.zero_()
    even = model(tokens).auxiliary_loss
    assert even is not None
    assert even.item() == pytest.approx(0.5 * 2 * 1.0)
    x = torch.ones(1, 8, 16, dtype=torch.float64)
    mixer = first_mixer(spec)
    with torch.no_grad():
        mixer.router.weight.zero_()
        mixer.router.weight[:, 2] = 10.0
    carry = Carry(None, 0)
    mixer(x, carry)
    assert carry.auxiliary[0].item() == pytest.approx(0.5 * 4)


def test_what_is_shared_belongs_to_the_first_memory() -> None:
    model = archspec.compile(routed(**MOM))
    names = [name for name, _ in model.named_parameters() if name.startswith("layers.0.mixer.")]
    assert sum("query" in name for name in names) == 2
    assert sum(name.endswith("projections.key.source.conv") for name in names) == 1
    assert sum(name.endswith("projections.key.source.weight") for name in names) == 4
    assert sum(name.endswith("log_rate") for name in names) == 1
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_copy_of_a_model_shares_within_itself() -> None:
    from copy import deepcopy

    model = compiled(routed(**MOM), "auto")
    other = deepcopy(model)
    tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(4))
    before = model(tokens).logits
    with torch.no_grad():
        other.get_parameter("layers.0.mixer.experts.0.projections.key.source.conv").mul_(2)
    assert torch.equal(model(tokens).logits, before)
    assert not torch.equal(other(tokens).logits, before)


def test_adapters_start_at_nothing() -> None:
    """B starts at zero: before training the query that is told apart is the shared one."""
    tokens = torch.randint(0, 11, (1, 9), generator=torch.Generator().manual_seed(4))
    without = {**SSE, "adapt": {}}
    assert close(archspec.compile(routed(**SSE))(tokens).logits, archspec.compile(routed(**without))(tokens).logits)


def test_hashes_see_inside_and_ignore_the_order_of_sharing() -> None:
    def digest(**fields: Any) -> str:
        return archspec.architecture_hash(archspec.load(routed(**{**MOM, **fields})))

    assert digest(share=list(reversed(MOM["share"]))) == digest()
    assert digest(router={**MOM["router"], "weigh": "write_and_read"}) == digest(
        router={**MOM["router"], "weigh": "read_and_write"}
    )
    changes: list[dict[str, Any]] = [{"share": []}, {"of": STEPS}, {"experts": 4}, {"router": {"top_k": 2}}]
    assert len({digest(), *(digest(**change) for change in changes)}) == 5


def test_flops_are_of_the_memories_that_take_a_token() -> None:
    def flops(**fields: Any) -> int:
        return archspec.predict(archspec.load(routed(**fields)), vocab_size=11).flops_per_token

    # Two layers; another expert adds a column to the router's map, another memory that takes the token all of itself.
    assert flops(experts=5) - flops(experts=4) == 2 * 2 * 16
    one_more = flops(experts=4, router={"top_k": 2}) - flops(experts=4, router={"top_k": 1})
    plain = archspec.predict(archspec.load(document(MATRIX)), vocab_size=11).flops_per_token
    assert one_more == flops(experts=4, always_on=1) - flops(experts=4)
    feed_forward, logits, output = 2 * 3 * 16 * 16, 2 * 11 * 16, 2 * 16 * 16
    assert one_more == plain - logits - 2 * feed_forward - 2 * output


def test_what_is_illegal_is_said_with_its_place() -> None:
    cases: dict[str, dict[str, Any]] = {
        r"mixer\.of\.memory: a token that is not taken leaves no trace": {"of": ATTENTION},
        r"mixer\.of\.update: momentum moves the weights": {"of": ONLINE},
        r"mixer\.of: an expert is a memory of its own; found serial": {"of": {"kind": "serial", "of": [MATRIX]}},
        r"mixer\.of\.prefix: learned tokens": {"of": {**MATRIX, "prefix": 1}},
        r"mixer\.of\.bias\.window: a window holds": {"of": {**MATRIX, "bias": {"kind": "l2", "window": {"length": 2}}}},
        r"mixer\.of\.update\.anchor\.reduce: a mean": {
            "of": {
                **CHUNKS,
                "retention": "none",
                "update": {"kind": "gradient_descent", "anchor": {"every": 4, "reduce": "mean"}},
            }
        },
        r"mixer\.router\.top_k: 9 of 2 experts; use at most 2": {"router": {"top_k": 9}},
        r"mixer\.router\.renormalize: a single weight": {"router": {"renormalize": True}},
        r"mixer\.router\.from: the router reads": {"router": {"from": "key"}},
        r"mixer\.router\.weigh: found 'reed'.*Did you mean 'read'": {"router": {"weigh": "reed"}},
        r"mixer\.share\[0\]: the experts learn nothing called 'querry'\. Did you mean 'query'": {"share": ["querry"]},
        r"mixer\.adapt\.query: adapters belong": {"share": ["query"], "adapt": {"query": {"rank": 2}}},
        r"mixer\.adapt\.query: an adapter tells": {"always_on": 1, "adapt": {"query": {"rank": 2}}},
        r"mixer\.readout\.skip: skip belongs to a memory": {"readout": {"skip": {}}},
        r"mixer\.readout\.gate\.from: unknown stream 'key'": {"readout": {"gate": {"kind": "sigmoid", "from": "key"}}},
        r"mixer\.of\.key\.blend: experts have no": {
            "of": {**MATRIX, "key": {"blend": {"with": "first_layer", "gate": 0.5}}}
        },
    }
    for message, fields in cases.items():
        with pytest.raises(SpecError, match=message):
            archspec.load(routed(**fields))
