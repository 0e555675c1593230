"""Inputs and outputs that are not tokens: vectors in, numbers or classes out, pooled over the items so far."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import archspec
from archspec import complexity
from archspec.blocks.model import SequenceModel, num_parameters
from archspec.canonical import architecture_hash
from archspec.decoding import position_dependence
from archspec.errors import ShapeError, SpecError, UnsupportedError
from tests.forms import moved

LENGTH, SPLIT = 11, 4
VECTORS = {"kind": "continuous", "dim": 3}
ENDS: dict[str, tuple[Any, Any]] = {
    "regression of every item": (VECTORS, {"kind": "continuous", "dim": 2, "offset": 0}),
    "regression of the mean": (
        {**VECTORS, "offset": 0, "position": "learned"},
        {"kind": "continuous", "dim": 2, "pool": "mean"},
    ),
    "classes of a sequence": ({**VECTORS, "position": "sinusoidal"}, {"kind": "classes", "num_classes": 4}),
    "classes by the maximum": (VECTORS, {"kind": "classes", "num_classes": 4, "pool": "max", "offset": 0}),
    "classes of every token": ("tokens", {"kind": "classes", "num_classes": 4, "pool": "last"}),
    "tokens of a signal": (VECTORS, {"tied": False}),
}


def document(ends: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    mixer = {
        "num_heads": 2,
        "memory": "matrix",
        "qk": {"norm": "l2"},
        "update": "gradient_descent",
        "value": {"conv": 3},
    }
    shell = {"name": "ends", "model_dim": 8, "blocks": {"main": {"mixer": mixer, "feed_forward": "swiglu"}}}
    return {**shell, "layout": {"repeat": 2, "of": "main"}, "input": ends[0], "output": ends[1], **more}


def made(ends: tuple[Any, Any], backend: str = "auto") -> SequenceModel:
    model = archspec.compile(document(ends), vocab_size=7, dtype=torch.float64, backend=backend)
    return moved(model, 0.3)


def items(model: SequenceModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if model.spec.input.kind == "tokens":
        return torch.randint(0, 7, (2, LENGTH), generator=generator)
    return torch.randn(2, LENGTH, 3, generator=generator, dtype=torch.float64)


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    # fp64 over a dozen items: forms differ in the order of sums.
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ENDS)
def test_forms_split_and_steps_agree_and_sizes_are_as_predicted(name: str) -> None:
    model = made(ENDS[name])
    x = items(model)
    whole = model(x)
    assert whole.logits.shape == (2, LENGTH, {"continuous": 2, "classes": 4, "tokens": 7}[model.spec.output.kind])
    close(made(ENDS[name], "reference")(x).logits, whole.logits)
    head = model(x[:, :SPLIT])
    close(torch.cat([head.logits, model(x[:, SPLIT:], head.state).logits], dim=1), whole.logits)
    state, steps = None, list[torch.Tensor]()
    for t in range(LENGTH):
        output = model.step(x[:, t], state)
        state = output.state
        steps.append(output.logits)
    close(torch.stack(steps, dim=1), whole.logits)
    whole.logits.sin().sum().backward()  # type: ignore[no-untyped-call]
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
    predicted = complexity.predict(model.spec, 7)
    assert predicted.parameters == num_parameters(model)
    assert predicted.non_embedding_parameters == num_parameters(model, embedding=False)
    assert predicted.state_bytes(LENGTH, "float64") == sum(8 * kept[0].numel() for kept in whole.state.tensors.values())


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_what_is_pooled_is_of_the_items_so_far(pool: str) -> None:
    model = made((VECTORS, {"kind": "classes", "num_classes": 4, "pool": pool}))
    x = items(model)
    stream = model.features(x)[-1]
    for t in range(LENGTH):
        seen = stream[:, : t + 1]
        wanted = seen.mean(1) if pool == "mean" else seen.amax(1)
        close(model(x).logits[:, t], wanted @ model.get_parameter("head"))


def test_sizes_that_come_from_the_task_are_no_part_of_the_architecture() -> None:
    def hashed(dim: int, classes: int, **more: Any) -> str:
        ends = ({"kind": "continuous", "dim": dim, **more}, {"kind": "classes", "num_classes": classes})
        return architecture_hash(archspec.load(document(ends)))

    assert hashed(3, 4) == hashed(5, 10)
    assert hashed(3, 4) != hashed(3, 4, offset=0)
    assert hashed(3, 4) != architecture_hash(archspec.load(document((VECTORS, {"kind": "continuous", "dim": 4}))))


def test_a_classifier_of_signals_learns() -> None:
    """Which of two channels has the larger mean, from eight samples."""
    spec = document(({"kind": "continuous", "dim": 2}, {"kind": "classes", "num_classes": 2, "offset": 0}))
    model, generator = archspec.compile(spec), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        x = torch.randn(64, 8, 2, generator=generator)
        answer = x.mean(1).argmax(-1)
        loss = torch.nn.functional.cross_entropy(model(x).logits[:, -1], answer)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    x = torch.randn(256, 8, 2, generator=generator)
    found = model(x).logits[:, -1].argmax(-1)
    assert float((found == x.mean(1).argmax(-1)).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (
            (VECTORS, "tokens"),
            "output: tied to the embedding, it needs input tokens, found continuous; write tied: false.",
        ),
        (("continuous", "tokens"), "input.dim: the required key 'dim' is missing."),
        ((VECTORS, {"kind": "classes"}), "output.num_classes: the required key 'num_classes' is missing."),
        ((VECTORS, {"kind": "classes", "num_classes": 2, "pool": "sum"}), "required: one of last, mean, max."),
        (("pixels", "tokens"), "input: unknown input 'pixels'; known: continuous, tokens."),
        (({"dim": 3}, "tokens"), "input.dim: unknown key 'dim'; known here: max_length, position, scale."),
    ],
)
def test_ends_that_do_not_fit_are_refused(ends: tuple[Any, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        archspec.load(document(ends))
    assert said in str(caught.value)


def test_items_of_another_kind_are_refused() -> None:
    model = archspec.compile(document((VECTORS, {"tied": False})), vocab_size=7)
    with pytest.raises(
        ShapeError, match=r"input: found torch.float32 \[2, 5, 2\]; required: real numbers \[B, T, 3\]."
    ):
        model(torch.zeros(2, 5, 2))
    with pytest.raises(UnsupportedError, match="goes from tokens to tokens, and this model from continuous to tokens"):
        model.generate(torch.zeros(1, 2, 3), 1)
    with pytest.raises(ShapeError, match=r"found torch.float32 \[2, 5\]; tokens are whole numbers \[B, T\]."):
        archspec.compile("gla")(torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((VECTORS, {"tied": False}), "the graph's input is a token, and the model reads continuous items"),
        (("tokens", {"kind": "classes", "num_classes": 2}), "the output is a mean over the items so far"),
        (("tokens", {"kind": "classes", "num_classes": 2, "pool": "max"}), None),
    ],
)
def test_a_step_that_is_not_the_same_everywhere_is_not_decoded_by_one_graph(
    ends: tuple[Any, Any], said: str | None
) -> None:
    assert position_dependence(made(ends)) == said


def test_embeddings_are_scaled_where_they_enter_alone() -> None:
    """With tied logits: the table is sqrt(16) times as large where it is read, not where it is written."""
    spec = {"extends": "transformer", "name": "scaled", "model_dim": 16, "layout": {"repeat": 1, "of": "main"}}
    plain, scaled = (
        archspec.compile({**spec, "input": {"scale": scale}}, vocab_size=7, seed=0, dtype=torch.float64)
        for scale in ("none", "sqrt_dim")
    )
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        plain.get_parameter("embedding.weight").mul_(4.0)
        torch.testing.assert_close(plain(tokens).logits / 4.0, scaled(tokens).logits)
    hashes = [architecture_hash(archspec.load({**spec, "input": end})) for end in ({}, {"scale": "none"})]
    assert hashes[0] == hashes[1]
    assert architecture_hash(archspec.load({**spec, "input": {"scale": "sqrt_dim"}})) != hashes[0]
