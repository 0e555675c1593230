"""Compiled specs against their definition, over a product of choices: every legal small mixer means the same thing in
every form, whole, split and token by token, and is as large as predicted."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archspec import complexity
from archspec.blocks.carry import State
from archspec.blocks.model import SequenceModel, num_parameters
from archspec.blocks.recurrence import recurrence
from archspec.compiler import compile  # noqa: A004
from archspec.errors import SpecError, UnsupportedError
from archspec.loading import load
from archspec.lowering import plan
from archspec.schema import Spec
from tests.forms import moved

LENGTH, SPLIT, VOCABULARY = 11, 5, 13

MEMORIES: dict[str, Any] = {
    "matrix": "matrix",
    "learned": {"kind": "matrix", "initial": "learned"},
    "normalised": {"kind": "matrix", "normalizer": {"floor": 1.0, "absolute": True}},
    "mlp": {"kind": "mlp", "expansion": 2, "residual": True, "norm": "post", "offsets": True},
    "gated": {
        "kind": "mlp",
        "expansion": 1,
        "gated": True,
        "activation": "tanh",
        "norm": "pre",
        "init": {"normal": 0.1},
    },
    "kv": "kv",
    "window": {"kind": "kv", "window": 4},
}
BIASES: dict[str, Any] = {
    "dot": "dot",
    "l2": "l2",
    "lp": {"kind": "lp", "p": 3, "smoothing": 10},
    "huber": {"kind": "huber", "form": "norm", "threshold": {"kind": "softplus", "offset": 0}},
    "omega": {"kind": "l2", "window": {"length": 3, "weights": "sigmoid"}},
}
RETENTIONS: dict[str, Any] = {
    "none": "none",
    "gdn": {"kind": "decay", "gate": "gdn"},
    "key": {"kind": "decay", "gate": {"kind": "sigmoid", "per": "key", "offset": 2}, "order": "together"},
    "after": {"kind": "decay", "gate": 0.9, "order": "step_first"},
    "value": {"kind": "decay", "gate": {"kind": "sigmoid", "per": "value", "offset": 2}, "order": "step_first"},
    "state": {"kind": "decay", "gate": "s6"},
    "kl": {"kind": "kl", "gate": "sigmoid", "order": "together"},
    "lq": {"kind": "lq", "gate": {"kind": "sigmoid", "offset": 2}, "order": "together"},
}
# Small steps: on a gated network the dynamics are cubic in the weights, and large ones really diverge.
STEP = {"kind": "sigmoid", "scale": 0.2}
UPDATES: dict[str, Any] = {
    "gd": {"kind": "gradient_descent", "step_size": STEP},
    "anchored": {"kind": "gradient_descent", "step_size": STEP, "anchor": 4},
    "mean": {"kind": "gradient_descent", "step_size": STEP, "anchor": {"every": 4, "reduce": "mean"}},
    "lag": {"kind": "gradient_descent", "step_size": STEP, "anchor": {"every": 4, "lag": True, "link": "anchor"}},
    "momentum": {"kind": "momentum", "step_size": STEP, "momentum": "sigmoid", "anchor": 4},
    "heavy": {"kind": "momentum", "step_size": STEP, "momentum": "sigmoid"},
    "muon": {"kind": "muon", "step_size": STEP, "momentum": "sigmoid", "iterations": 2, "anchor": 4},
    "multi": {"kind": "multi_step", "steps": 2, "step_size": STEP},
    "implicit": {"kind": "implicit", "step_size": STEP},
    "diagonal": {"kind": "implicit", "diagonal": True, "step_size": {**STEP, "per": "value"}},
    "mesa": {"kind": "conjugate_gradient", "step_size": STEP, "iterations": 6},
    "kernel": "nonparametric",
}


def document(memory: str, bias: str, retention: str, update: str) -> dict[str, Any]:
    mixer = {
        "num_heads": 2,
        "key_dim": 4,
        "value_dim": 4,
        "qkv": {"conv": 3, "activation": "silu"},
        "qk": {"norm": "l2"},
        "memory": MEMORIES[memory],
        "bias": BIASES[bias],
        "retention": RETENTIONS[retention],
        "update": UPDATES[update],
        "readout": {"norm": "rms", "gate": "silu"},
    }
    return {"name": "sweep", "model_dim": 8, "blocks": {"main": {"mixer": mixer}}, "layout": "main"}


def legal() -> list[tuple[str, str, str, str]]:
    found = []
    for choices in itertools.product(MEMORIES, BIASES, RETENTIONS, UPDATES):
        try:
            load(document(*choices))
        except SpecError:
            continue
        found.append(choices)
    return found


LEGAL = legal()
# A quarter of them, evenly spread: neighbours in the product differ in one choice.
SWEEP = [pytest.param(*choices, id="-".join(choices)) for choices in LEGAL[::4]]


def perturbed(spec: Spec, backend: str = "auto") -> SequenceModel:
    """A model in fp64 whose every parameter is away from special values."""
    model = compile(spec, vocab_size=VOCABULARY, dtype=torch.float64, backend=backend)
    return moved(model, 0.1)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def close(first: torch.Tensor, second: torch.Tensor, what: str, tolerance: float = 1e-8) -> None:
    # fp64 with at most a dozen tokens: forms differ in the order of sums, and links and roots magnify that.
    scale = max(1.0, float(second.detach().abs().max())) if second.numel() else 1.0
    assert first.shape == second.shape, what
    assert not second.numel() or float((first - second).detach().abs().max()) <= tolerance * scale, what


def test_the_product_is_worth_sweeping() -> None:
    assert len(LEGAL) > 250
    for place, names in enumerate((MEMORIES, BIASES, RETENTIONS, UPDATES)):
        assert {choices[place] for choices in LEGAL} == set(names)


@pytest.mark.parametrize(("memory", "bias", "retention", "update"), SWEEP)
def test_every_form_is_the_recurrence(memory: str, bias: str, retention: str, update: str) -> None:
    spec = load(document(memory, bias, retention, update))
    fast, slow = perturbed(spec), perturbed(spec, "reference")
    x = tokens()
    output, defined = fast(x), slow(x)
    close(output.logits, defined.logits, "logits")
    assert output.state.tensors.keys() == defined.state.tensors.keys()
    for name, tensor in defined.state.tensors.items():
        close(output.state.tensors[name].double(), tensor, name)
    for model, result in ((fast, output), (slow, defined)):
        model.zero_grad()
        result.logits.sin().sum().backward()
    for (name, parameter), other in zip(fast.named_parameters(), slow.parameters(), strict=True):
        first, second = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, other))
        assert bool(torch.isfinite(first).all()), name
        close(first, second, f"gradient of {name}", 1e-7)


@pytest.mark.parametrize(("memory", "bias", "retention", "update"), SWEEP[::2])
def test_whole_split_and_steps_agree_and_sizes_are_as_predicted(
    memory: str, bias: str, retention: str, update: str
) -> None:
    spec = load(document(memory, bias, retention, update))
    model, x = perturbed(spec), tokens()
    with torch.no_grad():
        whole = model(x)
        head = model(x[:, :SPLIT])
        saved = io.BytesIO()
        torch.save(head.state.tensors, saved)
        saved.seek(0)
        restored = State(torch.load(saved), head.state.position)
        close(torch.cat([head.logits, model(x[:, SPLIT:], restored).logits], 1), whole.logits, "split")
        state, stepped = None, []
        for t in range(LENGTH):
            step = model.step(x[:, t], state)
            state = step.state
            stepped.append(step.logits)
        close(torch.stack(stepped, 1), whole.logits, "steps")
        greedy = model.generate(x, 3, temperature=0)
        assert torch.equal(greedy[:, LENGTH], whole.logits[:, -1].argmax(-1))
    predicted = complexity.predict(spec, VOCABULARY)
    assert predicted.parameters == num_parameters(model)
    assert predicted.non_embedding_parameters == num_parameters(model, embedding=False)
    kept = sum(tensor[0].numel() * 8 for tensor in whole.state.tensors.values())
    assert predicted.state_bytes(LENGTH, "float64") == kept


@pytest.mark.parametrize(
    "choices", [("matrix", "l2", "none", "gd"), ("mlp", "l2", "none", "anchored"), ("kv", "l2", "none", "kernel")]
)
def test_predicted_flops_are_those_of_a_decoded_token(choices: tuple[str, str, str, str]) -> None:
    spec = load(document(*choices))
    model = compile(spec, vocab_size=VOCABULARY, backend="reference")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        state = model(tokens()[:1]).state
        before = counter.get_total_flops()
        model.step(torch.zeros(1, dtype=torch.long), state)
    counted = counter.get_total_flops() - before
    predicted = complexity.predict(spec, VOCABULARY, context=LENGTH + 1).flops_per_token
    # Convolutions are counted at the few tokens they keep, once per output they would give.
    assert counted == pytest.approx(predicted, rel=0.15)


def test_initialisation_depends_on_the_seed_and_on_nothing_else() -> None:
    spec = load(document("mlp", "huber", "gdn", "momentum"))
    torch.manual_seed(1)
    first = compile(spec, vocab_size=VOCABULARY, seed=3)
    torch.manual_seed(2)
    second = compile(spec, vocab_size=VOCABULARY, seed=3)
    other = compile(spec, vocab_size=VOCABULARY, seed=4)
    for (name, parameter), same in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter, same), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_explain_names_what_runs_and_what_was_rejected() -> None:
    decision = plan(load(document("matrix", "lp", "gdn", "gd"))).decisions["blocks.main.mixer"]
    assert decision.family == "sequential"
    reasons = {rejection.family: rejection.reason for rejection in decision.rejected}
    assert reasons["delta"] == "bias lp has an error that is not M(k) - v, weighed or not"
    assert reasons["online"] == "every token's gradient is taken at the weights that the token before it left"
    on_gpu = plan(load(document("matrix", "dot", "gdn", "gd")), device="cuda").decisions["blocks.main.mixer"]
    assert (on_gpu.family, on_gpu.kernel) == ("linear", "triton")


def test_explain_names_the_delta_rules_that_the_kernel_serves() -> None:
    spec = document("matrix", "l2", "gdn", "gd")
    on_gpu = plan(load(spec), device="cuda").decisions["blocks.main.mixer"]
    assert (on_gpu.family, on_gpu.kernel) == ("delta", "triton")
    assert plan(load(spec)).decisions["blocks.main.mixer"].kernel == "torch"
    late = plan(load(document("matrix", "l2", "key", "gd")), device="cuda").decisions["blocks.main.mixer"]
    assert (late.family, late.kernel) == ("delta", "torch")


def test_an_unknown_backend_is_one_clear_error() -> None:
    with pytest.raises(UnsupportedError, match=r"compile: unknown backend 'trition'; known: .*Did you mean 'triton'"):
        compile(load(document("matrix", "l2", "none", "gd")), backend="trition")


def test_a_loop_shares_weights_and_keeps_states_apart() -> None:
    mapping = document("matrix", "l2", "gdn", "gd")
    mapping["layout"] = {"loop": 3, "of": "main", "inject": True, "embed": "sinusoidal"}
    looped, plain = perturbed(load(mapping)), perturbed(load({**mapping, "layout": "main"}))
    assert num_parameters(looped) == num_parameters(plain)
    x = tokens()
    whole, head = looped(x), looped(x[:, :SPLIT])
    assert len(head.state.tensors) == 3 * len(plain(x).state.tensors)
    close(torch.cat([head.logits, looped(x[:, SPLIT:], head.state).logits], 1), whole.logits, "split")


@pytest.mark.parametrize("order", ["decay_first", "step_first"])
def test_several_steps_under_dot_share_one_decay(order: str) -> None:
    update = {"kind": "multi_step", "steps": 2, "step_size": 0.3}
    mapping = document("matrix", "dot", "none", "gd")
    mapping["blocks"]["main"]["mixer"] |= {
        "memory": {"kind": "matrix", "scale": 1},
        "update": update,
        "retention": {"kind": "decay", "gate": 0.5, "order": order},
    }
    model = perturbed(load(mapping))
    layers: Any = model.layers
    mixer = layers[0].mixer
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(1, 3, 2, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 6, 2, 4, generator=generator, dtype=torch.float64)
    ones = torch.ones(1, 1, 2, 1, 1, dtype=torch.float64)
    gates = {"update.step_size": 0.3 * ones, "retention.gate": (0.5 * ones).log()}
    quantities = mixer.quantities({"query": q, "key": k, "value": v}, gates)
    state, reads = torch.zeros(1, 2, 4, 4, dtype=torch.float64), []
    for t in range(3):
        written = 0.3 * sum(k[:, i, :, :, None] * v[:, i, :, None] for i in (2 * t, 2 * t + 1))
        state = 0.5 * state + written if order == "decay_first" else 0.5 * (state + written)
        reads.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    for form in (mixer.form, recurrence):
        close(form(mixer.rule, quantities, None, 0)[0], torch.stack(reads, 1), "reads")


@pytest.mark.parametrize(
    ("retention", "update"),
    [
        ({"gate": "sigmoid", "phase": "tanh"}, UPDATES["implicit"]),
        ({"gate": {"kind": "sigmoid", "per": "key"}, "phase": {"kind": "linear", "per": "key"}}, UPDATES["multi"]),
        ({"gate": 0.9, "phase": 0.7}, {**UPDATES["gd"], "write_size": "sigmoid"}),
    ],
)
def test_a_delta_rule_whose_decay_turns_pairs_of_keys_turns_the_keys_instead(
    retention: dict[str, Any], update: dict[str, Any]
) -> None:
    mapping = document("matrix", "l2", "none", "gd")
    mapping["blocks"]["main"]["mixer"] |= {"retention": {"kind": "complex_decay", **retention}, "update": update}
    assert plan(load(mapping)).decisions["blocks.main.mixer"].family == "delta"
    fast, slow = perturbed(load(mapping)), perturbed(load(mapping), "reference")
    x = tokens()
    output, defined = fast(x), slow(x)
    close(output.logits, defined.logits, "logits")
    for name, tensor in defined.state.tensors.items():
        close(output.state.tensors[name], tensor, name)
    for result in (output, defined):
        result.logits.sin().sum().backward()
    for (name, parameter), other in zip(fast.named_parameters(), slow.parameters(), strict=True):
        close(parameter.grad, other.grad, f"gradient of {name}", 1e-7)  # type: ignore[arg-type]
    with torch.no_grad():
        head = fast(x[:, :SPLIT])
        close(torch.cat([head.logits, fast(x[:, SPLIT:], head.state).logits], 1), output.logits, "split")
        state, stepped = None, []
        for t in range(LENGTH):
            step = fast.step(x[:, t], state)
            state = step.state
            stepped.append(step.logits)
        close(torch.stack(stepped, 1), output.logits, "steps")
