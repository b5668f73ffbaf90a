"""Encoders: what each kind lets cells exchange, and that graph attention goes along the edges and no further."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spaformer_sc.nn.encoder import ENCODERS, GRAPH_ENCODERS, Encoder
from spaformer_sc.nn.seeding import seeded

DIM, HEADS = 16, 4


def encoder(kind: str, n_layers: int = 2) -> Encoder:
    """An encoder whose attention, which starts at 0, has some weight."""
    with seeded(0):
        made = Encoder(DIM, n_layers, HEADS, kind=kind).eval()
    for i, layer in enumerate(made.layers):
        if layer.attention is not None:
            torch.nn.init.normal_(layer.attention.out.weight, generator=torch.Generator().manual_seed(i))
    return made


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def path(n: int, start: int = 0) -> Tensor:
    """Edges of a path through n tokens, both directions."""
    edges = torch.stack([torch.arange(n - 1), torch.arange(1, n)]) + start
    return torch.cat([edges, edges.flip(0)], dim=1)


def test_graph_encoders_are_encoders() -> None:
    assert {"gat"} == GRAPH_ENCODERS
    assert set(ENCODERS) == {"performer", "performer_relu", "exact", "gat", "mlp"}


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_graph_attention_reaches_one_step_per_layer_and_no_further(n_layers: int) -> None:
    net, x, edges = encoder("gat", n_layers), tokens(9), path(9)
    changed = x.clone()
    changed[4, 0] += 3.0
    moved = (net(changed, [9], edges) - net(x, [9], edges)).abs().amax(1)
    distance = (torch.arange(9) - 4).abs()
    assert bool((moved[distance <= n_layers] > 1e-4).all())
    assert not bool(moved[distance > n_layers].any())


@pytest.mark.parametrize("kind", ENCODERS)
def test_permuting_the_cells_permutes_the_result(kind: str) -> None:
    net, x, edges = encoder(kind), tokens(12), path(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    place = torch.empty(12, dtype=torch.int64)
    place[order] = torch.arange(12)
    torch.testing.assert_close(net(x[order], [12], place[edges]), net(x, [12], edges)[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_fov_does_not_depend_on_its_batch_mates(kind: str) -> None:
    net, lengths = encoder(kind), [7, 1, 5]
    x = tokens(13)
    # The single cell has no neighbours.
    graphs = [path(7), path(1), path(5)]
    starts = [0, 7, 8]
    together = net(x, lengths, torch.cat([g + s for g, s in zip(graphs, starts, strict=True)], dim=1))
    alone = [net(part, [len(part)], g) for part, g in zip(x.split(lengths), graphs, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert bool(torch.isfinite(together).all())


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_starts_as_the_one_without_attention(kind: str) -> None:
    x, edges = tokens(8), path(8)
    with seeded(3):
        net = Encoder(DIM, 2, HEADS, kind=kind)
    with seeded(3):
        plain = Encoder(DIM, 2, HEADS, kind="mlp")
    assert torch.equal(net(x, [8], edges), plain(x, [8]))
    parameters = dict(net.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in plain.named_parameters())


def test_a_graph_encoder_without_a_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="`edge_index` is None"):
        encoder("gat")(tokens(3), [3])


def test_only_the_feature_attention_is_redrawn() -> None:
    for kind in ENCODERS:
        net = encoder(kind)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        net.redraw(torch.Generator().manual_seed(5))
        moved = {
            name.rsplit(".", 1)[1] for name, value in net.state_dict().items() if not torch.equal(value, before[name])
        }
        assert moved == ({"features"} if kind.startswith("performer") else set())
